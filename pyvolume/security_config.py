"""security.toml and volume.toml: where they are searched, how they merge, what the environment overrides.

Leaf of the server: must not import server, ops or storage. Follows `weed/util/config.go` and the viper library it uses
(contract operations.md 2); unlike them a setting that would protect the server and cannot be used is an error, never a
server that is open (departures S1 and S2). Read formats are TOML and JSON; a `security` file in another format that
upstream would read is refused rather than passed over.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyvolume import jsontext
from pyvolume.config import ServerConfig, error_text, parse_bool, parse_duration_ns, parse_int, resolve_path
from pyvolume.log import V1

_log = logging.getLogger(__name__)

ENV_PREFIX = "WEED_"
EXTENSIONS = ("json", "toml", "yaml", "yml", "properties", "props", "prop", "hcl", "tfvars", "dotenv", "env", "ini")
_READABLE = ("json", "toml")
START_STATUS = 1
"""Exit status when a security setting forbids to start."""


class SecurityError(Exception):
    """A setting that cannot be honoured. The text names key, file and reason. At start: exit 1; at a reload: keep."""


class SettingsFileError(Exception):
    """A file that cannot be read or parsed."""


# --- the key space ---------------------------------------------------------------------------------------------------


class Settings:
    """Keys of all files read so far, overridden by WEED_ variables. Keys are lower case with dots.

    Not thread-safe: only the thread that starts the server, and later the one that reloads, touches it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._values: dict[str, Any] = {}
        self._origin: dict[str, Path] = {}

    def copy(self) -> Settings:
        """One that later changes of this one leave alone."""
        made = Settings(self._environ)
        made._values, made._origin = dict(self._values), dict(self._origin)
        return made

    def merge(self, tree: Mapping[str, Any], origin: Path) -> None:
        """Lays the tree of one file over what is there. Keys it does not have keep their values."""
        for key, value in _flatten(tree, ""):
            if any(old.startswith(key + ".") for old in self._values):
                continue  # a table is not replaced by a plain value
            parts = key.split(".")
            for end in range(1, len(parts)):
                self._values.pop(".".join(parts[:end]), None)
            self._values[key] = value
            self._origin[key] = origin

    def get(self, key: str) -> Any:
        """The value of a key, None if nobody set it. An empty variable counts as not set."""
        text = self._environ.get(env_name(key))
        if text:
            return text
        if self.hidden_by(key) is not None:
            return None
        return self._values.get(key)

    def hidden_by(self, key: str) -> str | None:
        """Quirk: the variable named like a parent of the key, which makes the key invisible; None if there is none."""
        parts = key.split(".")
        for end in range(1, len(parts)):
            name = env_name(".".join(parts[:end]))
            if self._environ.get(name):
                return name
        return None

    def in_file(self, key: str) -> bool:
        """Whether a file gives the key, be it overridden or hidden."""
        return key in self._values

    def is_table(self, key: str) -> bool:
        """Whether a file has keys below this one."""
        return any(name.startswith(key + ".") for name in self._values)

    def where(self, key: str) -> str:
        """Where the value of a key comes from, for messages."""
        if self._environ.get(env_name(key)):
            return f"environment variable {env_name(key)}"
        return str(self._origin.get(key, "no file"))

    def text(self, key: str) -> str:
        """As text; lists and tables read as the empty text."""
        value = self.get(key)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, float):
            return repr(value).removesuffix(".0")
        return str(value) if isinstance(value, (str, int)) else ""

    def boolean(self, key: str) -> bool:
        """As a truth value; what is none reads as false."""
        value = self.get(key)
        if isinstance(value, str):
            try:
                return parse_bool(value)
            except ValueError:
                return False
        return bool(value) if isinstance(value, (bool, int, float)) else False

    def integer(self, key: str, default: int = 0) -> int:
        """As an integer; `default` if nobody set it, 0 if it is none."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, str):
            try:
                return parse_int(value.strip())
            except ValueError:
                return 0
        if isinstance(value, float) and not math.isfinite(value):
            return 0
        return int(value) if isinstance(value, (bool, int, float)) else 0

    def number(self, key: str, default: float) -> float:
        """As a number; `default` if nobody set it, 0 if it is none."""
        value = self.get(key)
        if value is None:
            return default
        try:
            return float(value)
        except (TypeError, ValueError):
            return 0.0

    def seconds(self, key: str, default: float) -> float:
        """A duration in seconds; a bare number counts nanoseconds, as in upstream."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, str):
            try:
                return parse_duration_ns(value if any(c in "nsu\u00b5mh" for c in value) else value + "ns") / 1e9
            except ValueError:
                return 0.0
        return float(value) / 1e9 if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def env_name(key: str) -> str:
    """The variable that overrides a key."""
    return ENV_PREFIX + key.upper().replace(".", "_")


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name.lower()}"
        if isinstance(value, Mapping):
            yield from _flatten(value, key + ".")
        else:
            yield key, value


# --- files -----------------------------------------------------------------------------------------------------------


def search_directories(config_dir: str, environ: Mapping[str, str]) -> list[Path]:
    """Where files are looked for, in order. -config_dir comes first but is not the only one."""
    directories = [Path(resolve_path(config_dir))] if config_dir else []
    home = environ.get("HOME", "")
    directories += [
        Path("."),
        Path(home or "/", ".seaweedfs"),
        Path("/usr/local/etc/seaweedfs"),
        Path("/etc/seaweedfs"),
    ]
    return directories


def find_file(base: str, directories: Sequence[Path], hidden: list[OSError] | None = None) -> Path | None:
    """The first `<base>.<extension>` there is; within a directory json goes before toml.

    Directories that may not be searched count as empty, as upstream has it; why goes to `hidden`.
    """
    for directory in directories:
        for extension in EXTENSIONS:
            path = directory / f"{base}.{extension}"
            try:
                if path.is_file():
                    return path
            except OSError as exc:
                if hidden is not None:
                    hidden.append(exc)
                break
    return None


def read_file(path: Path) -> dict[str, Any]:
    """The tree in a TOML or JSON file. SettingsFileError with a reason."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise SettingsFileError(f"open {path}: {error_text(exc)}") from exc
    try:
        text = data.decode("utf-8")
        tree = jsontext.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        raise SettingsFileError(f"While parsing config: {exc}") from exc
    if not isinstance(tree, dict):
        raise SettingsFileError("While parsing config: not a table of keys")
    if (number := _beyond_int64(tree)) is not None:
        raise SettingsFileError(f"While parsing config: {number:#x} is not within 64 bits")
    return tree


def _beyond_int64(value: Any) -> int | None:
    """An integer of the tree that upstream's 64 bits do not hold, None if there is none."""
    if isinstance(value, (dict, list)):
        found = map(_beyond_int64, value.values() if isinstance(value, dict) else value)
        return next((number for number in found if number is not None), None)
    return value if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63 else None


def load_optional(settings: Settings, base: str, config_dir: str, environ: Mapping[str, str]) -> None:
    """Searches, reads and merges one base name. A missing file is fine; a broken one is logged and passed over, but for
    the security file: SecurityError, as for one in a format that only upstream reads, and for a place that may not be
    searched, unless that is the current directory or the home directory: those are often another user's.
    """
    directories = search_directories(config_dir, environ)
    hidden: list[OSError] = []
    path = find_file(base, directories, hidden)
    for error in hidden:
        place = Path(str(error.filename)).parent
        reason = f"{place}: {error_text(error)}: a {base}.toml in it could not be seen"
        if base == "security" and place not in (Path("."), directories[-3]):
            raise SecurityError(reason)
        _log.warning("%s", reason)
    if path is None:
        places = " ".join(str(directory.absolute()) for directory in directories)
        _log.log(V1, 'Reading : Config File "%s" Not Found in "[%s]"', base, places)
        return
    if path.suffix.lower().removeprefix(".") not in _READABLE:
        reason = f"{path}: only {base}.toml and {base}.json are read; convert it, or remove it if it is not in use"
        if base == "security":
            raise SecurityError(reason)
        _log.warning("Reading %s. Skipping optional configuration.", reason)
        return
    try:
        settings.merge(read_file(path), path)
    except SettingsFileError as exc:
        if base == "security":
            raise SecurityError(f"{path}: {exc}") from exc
        _log.warning("Reading %s: %s. Skipping optional configuration.", path, exc)
        return
    _log.log(V1, "Reading %s.toml from %s", base, path)


# --- what the server takes from them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TlsSettings:
    """Keys of TLS as written in the files. Empty: not set."""

    grpc_ca: str = ""
    grpc_cert: str = ""
    grpc_key: str = ""
    grpc_client_cert: str = ""
    grpc_client_key: str = ""
    grpc_allowed_common_names: str = ""
    grpc_allowed_wildcard_domain: str = ""
    min_version: str = ""
    max_version: str = ""
    cipher_suites: str = ""
    https_cert: str = ""
    https_key: str = ""
    https_ca: str = ""
    client_enabled: bool = False
    client_cert: str = ""
    client_key: str = ""
    client_ca: str = ""
    client_insecure_skip_verify: bool = False
    refresh_s: float = 5 * 3600.0
    """WEED_TLS_CERT_REFRESH_INTERVAL: how often the files are looked at for new contents."""

    @property
    def serves_https(self) -> bool:
        return bool(self.https_cert)

    @property
    def uses_grpc_tls(self) -> bool:
        """Both directions."""
        return bool(self.grpc_cert)


_TLS_KEYS = (
    ("grpc_ca", "grpc.ca"),
    ("grpc_cert", "grpc.volume.cert"),
    ("grpc_key", "grpc.volume.key"),
    ("grpc_client_cert", "grpc.volume.client_cert"),
    ("grpc_client_key", "grpc.volume.client_key"),
    ("grpc_allowed_common_names", "grpc.volume.allowed_commonnames"),
    ("grpc_allowed_wildcard_domain", "grpc.allowed_wildcard_domain"),
    ("min_version", "tls.min_version"),
    ("max_version", "tls.max_version"),
    ("cipher_suites", "tls.cipher_suites"),
    ("https_cert", "https.volume.cert"),
    ("https_key", "https.volume.key"),
    ("https_ca", "https.volume.ca"),
    ("client_cert", "https.client.cert"),
    ("client_key", "https.client.key"),
    ("client_ca", "https.client.ca"),
)
_GRPC_KEYS = (
    "grpc.volume.cert",
    "grpc.volume.key",
    "grpc.ca",
    "grpc.volume.client_cert",
    "grpc.volume.client_key",
    "grpc.volume.allowed_commonnames",
    "grpc.allowed_wildcard_domain",
)
_HTTPS_KEYS = ("https.volume.cert", "https.volume.key", "https.volume.ca")
TLS_VERSIONS = ("SSLv3", "TLS 1.0", "TLS 1.1", "TLS 1.2", "TLS 1.3")
"""Names that upstream knows, in order. Below 1.2 nothing is spoken here."""
_ECDHE_SUITES = {
    "AES_128_CBC_SHA": "AES128-SHA",
    "AES_256_CBC_SHA": "AES256-SHA",
    "AES_128_GCM_SHA256": "AES128-GCM-SHA256",
    "AES_256_GCM_SHA384": "AES256-GCM-SHA384",
    "CHACHA20_POLY1305_SHA256": "CHACHA20-POLY1305",
}
CIPHER_SUITES: Mapping[str, str] = {
    **dict.fromkeys(("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"), ""),
    **{
        f"TLS_ECDHE_{kind}_WITH_{name}": f"ECDHE-{kind}-{openssl}"
        for kind in ("ECDSA", "RSA")
        for name, openssl in _ECDHE_SUITES.items()
    },
}
"""OpenSSL's names of the suites that upstream accepts; those of TLS 1.3, which are always on, have none."""
DEFAULT_REFRESH_S = 5 * 3600.0
_TLS_FLAGS = (
    ("client_enabled", "https.client.enabled"),
    ("client_insecure_skip_verify", "https.client.insecure_skip_verify"),
)


@dataclass(frozen=True)
class SecurityConfig:
    """What guards the server. A reload gives a new one; `ui_access` and `tls` keep their values from the start."""

    jwt_write_key: bytes = b""
    jwt_write_expires_s: int = 10
    jwt_read_key: bytes = b""
    jwt_read_expires_s: int = 60
    white_list: tuple[str, ...] = ()
    """Addresses in their usual spelling, and networks; empty admits everyone."""
    ui_access: bool = False
    tls: TlsSettings = field(default_factory=TlsSettings)


@dataclass(frozen=True)
class DiskProbeConfig:
    """Keys `volume.disk.io.*` of volume.toml."""

    enabled: bool = False
    timeout_s: float = 2.0
    interval_s: float = 60.0
    slow_latency_s: float = 0.5
    window_s: float = 60.0
    min_samples: int = 10
    slow_percent: float = 20.0
    error_percent: float = 10.0
    max_stat_failures: int = 5
    recovery_coefficient: float = 0.5


class SecurityLoader:
    """Reads the files at start and again at each reload, over what it read before."""

    def __init__(self, config: ServerConfig, environ: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._environ = dict(os.environ if environ is None else environ)
        self.settings = Settings(self._environ)

    def load(self) -> SecurityConfig:
        """For the start. SecurityError if a setting cannot be honoured. Certificates are read later (server.tls)."""
        self._read(at_start=True)
        self._warn_of_hidden()
        tls = tls_settings(self.settings, self._environ)
        check_tls(self.settings, tls)
        return self._security(ui_access=self.settings.boolean("access.ui"), tls=tls)

    def reload(self, current: SecurityConfig) -> SecurityConfig:
        """For SIGHUP: keys, expiries and white list anew, the rest as it is. SecurityError: `current` stays in force.

        Quirk: a key removed from the file keeps its value; it is cleared by setting it to "". Nothing of a refused file
        is kept.
        """
        before = self.settings.copy()
        try:
            self._read(at_start=False)
            self._warn_of_hidden()
            return self._security(ui_access=current.ui_access, tls=current.tls)
        except BaseException:
            self.settings = before
            raise

    def load_disk_probe(self) -> DiskProbeConfig:
        """Reads volume.toml, once."""
        load_optional(self.settings, "volume", self._config.config_dir, self._environ)
        return disk_probe(self.settings, self._config.disk_setting)

    def _read(self, *, at_start: bool) -> None:
        exact = self._config.security_file
        if not exact:
            load_optional(self.settings, "security", self._config.config_dir, self._environ)
            return
        path = Path(resolve_path(exact))
        try:
            self.settings.merge(read_file(path), path)
        except SettingsFileError as exc:
            raise SecurityError(f"-securityFile {exact}: {exc}") from exc
        _log.log(V1, "Reading security settings from %s%s", path, "" if at_start else " again")

    def _warn_of_hidden(self) -> None:
        for key in ("jwt.signing.key", "jwt.signing.read.key", "guard.white_list"):
            name = self.settings.hidden_by(key)
            if name is not None and self.settings.in_file(key) and self.settings.get(key) is None:
                _log.warning("environment variable %s hides %s of %s", name, key, self.settings.where(key))

    def _security(self, *, ui_access: bool, tls: TlsSettings) -> SecurityConfig:
        settings = self.settings
        return SecurityConfig(
            jwt_write_key=_signing_key(settings, "jwt.signing.key"),
            jwt_write_expires_s=settings.integer("jwt.signing.expires_after_seconds", 10),
            jwt_read_key=_signing_key(settings, "jwt.signing.read.key"),
            jwt_read_expires_s=settings.integer("jwt.signing.read.expires_after_seconds", 60),
            white_list=white_list(self._config.white_list, settings),
            ui_access=ui_access,
            tls=tls,
        )


def _signing_key(settings: Settings, key: str) -> bytes:
    """The text as it stands, in UTF-8: the same on masters and filers, so nothing is trimmed or decoded."""
    value = settings.get(key)
    if isinstance(value, (list, tuple)) or (value is None and settings.is_table(key) and not settings.hidden_by(key)):
        raise SecurityError(f"{key} in {settings.where(key)} must be a text, so that nothing is left open")
    return settings.text(key).encode("utf-8", "surrogateescape")


def white_list(flag_entries: Sequence[str], settings: Settings) -> tuple[str, ...]:
    """Entries of -whiteList followed by those of guard.white_list, trimmed and checked.

    SecurityError for an entry that can never match, and for a list that is written but empty: upstream takes both for
    "everyone may".
    """
    entries = _checked_entries(flag_entries, "-whiteList") if flag_entries else ()
    value = settings.get("guard.white_list")
    where = f"guard.white_list in {settings.where('guard.white_list')}"
    if value is None or value in ("", []):
        return entries
    if isinstance(value, str):
        items = value.split(",")
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        items = [part for item in value for part in item.split(",")]
    else:
        raise SecurityError(f"{where} must be a text or a list of texts")
    return entries + _checked_entries(items, where)


def _checked_entries(items: Sequence[str], where: str) -> tuple[str, ...]:
    trimmed = [item.strip() for item in items]
    entries = tuple(_checked_entry(item, where) for item in trimmed if item)
    if not entries:
        raise SecurityError(f"{where} holds no address")
    return entries


def _checked_entry(entry: str, where: str) -> str:
    try:
        if "/" in entry:
            if not entry.rpartition("/")[2].isdecimal():
                raise ValueError("the part after / is no number of bits")
            ipaddress.ip_network(entry, strict=False)
            return entry
        address = ipaddress.ip_address(entry)
    except ValueError as exc:
        kind = "CIDR address" if "/" in entry else "IP address"
        raise SecurityError(f"{where}: invalid {kind}: {entry} ({exc})") from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def tls_settings(settings: Settings, environ: Mapping[str, str] | None = None) -> TlsSettings:
    """All keys of TLS as they stand."""
    texts: dict[str, Any] = {name: settings.text(key) for name, key in _TLS_KEYS}
    flags: dict[str, Any] = {name: settings.boolean(key) for name, key in _TLS_FLAGS}
    return TlsSettings(
        **texts, **flags, refresh_s=_refresh_s((environ or {}).get("WEED_TLS_CERT_REFRESH_INTERVAL", ""))
    )


def _refresh_s(text: str) -> float:
    try:
        seconds = parse_duration_ns(text) / 1e9 if text else DEFAULT_REFRESH_S
    except ValueError as exc:
        _log.warning("WEED_TLS_CERT_REFRESH_INTERVAL: %s; using 5h", exc)
        return DEFAULT_REFRESH_S
    return seconds if seconds > 0 else DEFAULT_REFRESH_S


def check_tls(settings: Settings, tls: TlsSettings) -> None:
    """SecurityError for settings that ask for TLS and cannot give it: upstream serves in plain text then (S1)."""
    for _, key in _TLS_KEYS:
        value = settings.get(key)
        if value is None and settings.is_table(key) and not settings.hidden_by(key):
            value = {}
        if value is not None and not isinstance(value, str):
            raise SecurityError(f"{key} in {settings.where(key)} must be a text")
    _need(settings, _HTTPS_KEYS, ("https.volume.cert", "https.volume.key"))
    _need(settings, _GRPC_KEYS, ("grpc.volume.cert", "grpc.volume.key", "grpc.ca"))
    if tls.serves_https or tls.uses_grpc_tls:
        _check_tls_limits(settings, tls)
    if tls.client_enabled and bool(tls.client_cert) != bool(tls.client_key):
        key = "https.client.cert" if tls.client_cert else "https.client.key"
        raise SecurityError(
            f"{key} in {settings.where(key)}: https.client: both cert and key must be set "
            f'(got cert="{tls.client_cert}" key="{tls.client_key}")'
        )


def _need(settings: Settings, keys: Sequence[str], needed: Sequence[str]) -> None:
    """If any of `keys` is set, all of `needed` must be."""
    asking = next((key for key in keys if settings.text(key)), None)
    missing = [key for key in needed if not settings.text(key)]
    if asking is not None and missing:
        raise SecurityError(
            f"{asking} in {settings.where(asking)} asks for TLS, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; refusing to serve in plain text instead"
        )


def _check_tls_limits(settings: Settings, tls: TlsSettings) -> None:
    """[tls] of a server that speaks TLS, whether or not upstream would apply it there."""
    for key, value in (("tls.min_version", tls.min_version), ("tls.max_version", tls.max_version)):
        if value and value not in TLS_VERSIONS:
            known = ", ".join(TLS_VERSIONS)
            raise SecurityError(f"{key} in {settings.where(key)}: invalid tls version {value} (known: {known})")
    if tls.max_version and TLS_VERSIONS.index(tls.max_version) < TLS_VERSIONS.index("TLS 1.2"):
        where = settings.where("tls.max_version")
        raise SecurityError(
            f"tls.max_version in {where}: {tls.max_version} leaves nothing, TLS 1.2 is the least spoken"
        )
    if tls.max_version == "TLS 1.2" and tls.min_version == "TLS 1.3":
        raise SecurityError(f"tls.max_version in {settings.where('tls.max_version')} is below tls.min_version")
    if tls.max_version == "TLS 1.2" and tls.uses_grpc_tls:
        where = settings.where("tls.max_version")
        raise SecurityError(f"tls.max_version in {where}: gRPC cannot be kept from TLS 1.3; remove the limit")
    try:
        suites = cipher_list(tls.cipher_suites)
    except ValueError as exc:
        raise SecurityError(f"tls.cipher_suites in {settings.where('tls.cipher_suites')}: {exc}") from None
    if suites == "" and tls.max_version == "TLS 1.2":
        where = settings.where("tls.cipher_suites")
        raise SecurityError(f"tls.cipher_suites in {where} names suites of TLS 1.3 only, tls.max_version forbids that")


def cipher_list(names: str) -> str | None:
    """OpenSSL's list for TLS 1.2 of upstream's comma list: None without limits, "" if only TLS 1.3 is left.

    ValueError with upstream's text.
    """
    if not names.strip():
        return None
    found = []
    for name in (item.strip() for item in names.split(",")):
        if name not in CIPHER_SUITES:
            raise ValueError(f"invalid tls cipher suite name {name}")
        found.append(CIPHER_SUITES[name])
    return ":".join(item for item in found if item)


def disk_probe(settings: Settings, disk_setting: str) -> DiskProbeConfig:
    """The probe's settings; the whole text of -disk picks the threshold, anything but ssd and nvme counts as hdd."""
    kind = disk_setting if disk_setting in ("ssd", "nvme") else "hdd"
    default_latency = {"hdd": 0.5, "ssd": 0.1, "nvme": 0.05}[kind]
    prefix = "volume.disk.io."
    return DiskProbeConfig(
        enabled=settings.boolean(prefix + "probe"),
        timeout_s=settings.seconds(prefix + "timeout", 2.0),
        interval_s=settings.seconds(prefix + "interval", 60.0),
        slow_latency_s=settings.seconds(f"{prefix}slow.latency.{kind}", default_latency),
        window_s=settings.seconds(prefix + "window", 60.0),
        min_samples=settings.integer(prefix + "min.samples", 10),
        slow_percent=settings.number(prefix + "slow.percent", 20.0),
        error_percent=settings.number(prefix + "error.percent", 10.0),
        max_stat_failures=settings.integer(prefix + "max.stat.failures", 5),
        recovery_coefficient=settings.number(prefix + "recovery.coef", 0.5),
    )
