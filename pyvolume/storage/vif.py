"""The `.vif` file of a volume: what is known of it besides its data, as JSON text of the message VolumeInfo.

May import storage.files and the leaves only. Reading accepts what protojson accepts (either spelling of a name, 64-bit
numbers as text or number, null for the default) and, failing that, the schema of old releases; an unknown field makes
the text unparsable, as upstream (`weed/storage/volume_info`), so no field of our own may ever be added. `load` and
`save` block on disk.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

from pyvolume.errors import StorageError, from_os_error
from pyvolume.storage.files import check_file, replace_file

VifStatus = Literal["missing", "empty", "ok", "old", "unparsable", "unreadable"]

_DISK_ERRORS: Final = (
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EINTR,
)

_MAX_BYTES: Final = 1 << 20
"""A .vif is a few hundred bytes; more than this is not one."""


@dataclass(slots=True)
class RemoteFile:
    """Where the data of a tiered volume lives. Times in unix seconds, sizes in bytes."""

    backend_type: str = ""
    backend_id: str = ""
    key: str = ""
    offset: int = 0
    file_size: int = 0
    modified_time: int = 0
    extension: str = ""

    @property
    def backend_name(self) -> str:
        """`<type>.<id>`, the name heartbeats carry."""
        return f"{self.backend_type}.{self.backend_id}"


@dataclass(slots=True)
class EcShardConfig:
    data_shards: int = 0
    parity_shards: int = 0
    encode_ts_ns: int = 0


@dataclass(slots=True)
class VolumeInfo:
    """Content of a .vif. `version` 0 means 3 and `bytes_offset` 0 the server's default width to a reader."""

    files: list[RemoteFile] = field(default_factory=list)
    version: int = 0
    replication: str = ""
    bytes_offset: int = 0
    dat_file_size: int = 0
    expire_at_sec: int = 0
    read_only: bool = False
    ec_shard_config: EcShardConfig | None = None
    read_only_can_delete: bool = False

    def copy(self) -> VolumeInfo:
        """A deep copy."""
        ec = self.ec_shard_config
        return replace(
            self,
            files=[replace(f) for f in self.files],
            ec_shard_config=None if ec is None else replace(ec),
        )


@dataclass(frozen=True, slots=True)
class VifResult:
    """What `load` found. `info` is never None: with `unparsable` it holds what stood before the fault."""

    info: VolumeInfo
    status: VifStatus
    error: str = ""
    disk_failed: bool = False
    """Unreadable because a system call failed, not for its mode: what it says is there, and not known."""

    @property
    def found(self) -> bool:
        """Whether a file with content is there (also one that cannot be understood): it is not rewritten at load."""
        return self.status not in ("missing", "empty")

    @property
    def has_remote_file(self) -> bool:
        return self.status in ("ok", "old") and bool(self.info.files)


# ------------------------------------------------------------------------------------------------------------- reading


class _Unparsable(ValueError):
    pass


_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WHITESPACE = re.compile(r"[ \t\n\r]*")


def _reject_constant(text: str) -> Any:
    raise _Unparsable(f"invalid value {text}")


class _JsonObject(list[tuple[str, Any]]):
    """The pairs of one JSON object in their order: a repeated name must be seen. Tells an object from a list."""


def _decimal(text: str) -> Decimal:
    """A number, whose digits may be as many as the file is long. Python refuses some of those in ways of its own."""
    try:
        return Decimal(text)
    except InvalidOperation:
        raise _Unparsable(f"invalid value {text[:40]}") from None


_DECODER = json.JSONDecoder(
    parse_float=_decimal, parse_int=_decimal, parse_constant=_reject_constant, object_pairs_hook=_JsonObject
)


def _integer(value: Any, low: int, high: int) -> int:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise _Unparsable(f"invalid value for integer: {value!r}")
        value = _decimal(value)
    if isinstance(value, Decimal):
        if value.adjusted() > 20 or value != value.to_integral_value():
            raise _Unparsable(f"invalid value for integer: {value}")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _Unparsable(f"invalid value for integer: {value!r}")
    return value


def _u32(value: Any) -> int:
    return _integer(value, 0, (1 << 32) - 1)


def _u64(value: Any) -> int:
    return _integer(value, 0, (1 << 64) - 1)


def _i64(value: Any) -> int:
    return _integer(value, -(1 << 63), (1 << 63) - 1)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unparsable(f"invalid value for string: {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Unparsable("invalid UTF-8 in string") from None
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Unparsable(f"invalid value for bool: {value!r}")
    return value


_Schema = dict[str, tuple[str, Callable[[Any], Any]]]


def _schema(**fields: Callable[[Any], Any]) -> _Schema:
    """Both spellings of each field: the proto name and its lowerCamel JSON name."""
    table: _Schema = {}
    for name, convert in fields.items():
        head, *rest = name.split("_")
        table[name] = table[head + "".join(word.capitalize() for word in rest)] = (name, convert)
    return table


_REMOTE_FILE = _schema(
    backend_type=_text,
    backend_id=_text,
    key=_text,
    offset=_u64,
    file_size=_u64,
    modified_time=_u64,
    extension=_text,
)
_EC_SHARD_CONFIG = _schema(data_shards=_u32, parity_shards=_u32, encode_ts_ns=_i64)


def _fill(target: Any, schema: _Schema, pairs: _JsonObject, seen: set[str] | None = None) -> None:
    """Sets attributes in the order of the text, so that those before a fault are kept."""
    seen = set() if seen is None else seen
    for json_name, value in pairs:
        if json_name not in schema:
            raise _Unparsable(f'unknown field "{json_name}"')
        name, convert = schema[json_name]
        if name in seen:
            raise _Unparsable(f'duplicate field "{json_name}"')
        seen.add(name)
        if value is not None:
            setattr(target, name, convert(value))


def _remote_files(value: Any) -> list[RemoteFile]:
    if isinstance(value, _JsonObject) or not isinstance(value, list):
        raise _Unparsable("invalid value for list")
    files = []
    for item in value:
        if not isinstance(item, _JsonObject):
            raise _Unparsable("invalid value for message")
        remote = RemoteFile()
        _fill(remote, _REMOTE_FILE, item)
        files.append(remote)
    return files


def _ec_shard_config(value: Any) -> EcShardConfig:
    if not isinstance(value, _JsonObject):
        raise _Unparsable("invalid value for message")
    config = EcShardConfig()
    _fill(config, _EC_SHARD_CONFIG, value)
    return config


_VOLUME_INFO = _schema(
    files=_remote_files,
    version=_u32,
    replication=_text,
    bytes_offset=_u32,
    dat_file_size=_i64,
    expire_at_sec=_u64,
    read_only=_bool,
    ec_shard_config=_ec_shard_config,
    read_only_can_delete=_bool,
)

_OLD_VOLUME_INFO: _Schema = {
    **_schema(files=_remote_files, version=_u32, replication=_text, dat_file_size=_i64, read_only=_bool),
    "BytesOffset": ("bytes_offset", _u32),
    "DestroyTime": ("expire_at_sec", _u64),
}


def _parse_top(text: str, schema: _Schema, info: VolumeInfo) -> None:
    """Parses one JSON object member by member, so that a torn text still gives the members before the tear."""

    def skip(at: int) -> int:
        match = _WHITESPACE.match(text, at)
        return match.end() if match else at

    seen: set[str] = set()
    try:
        at = skip(0)
        if text[at : at + 1] != "{":
            raise _Unparsable("unexpected token")
        at = skip(at + 1)
        first = True
        while text[at : at + 1] != "}":
            if not first:
                if text[at : at + 1] != ",":
                    raise _Unparsable("unexpected token")
                at = skip(at + 1)
            first = False
            if text[at : at + 1] != '"':
                raise _Unparsable("unexpected token")
            name, at = _DECODER.raw_decode(text, at)
            at = skip(at)
            if text[at : at + 1] != ":":
                raise _Unparsable("unexpected token")
            value, at = _DECODER.raw_decode(text, skip(at + 1))
            _fill(info, schema, _JsonObject([(name, value)]), seen)
            at = skip(at)
        if skip(at + 1) != len(text):
            raise _Unparsable("unexpected token after the object")
    except (json.JSONDecodeError, RecursionError) as exc:
        raise _Unparsable(f"syntax error: {exc}") from None


def parse(data: bytes) -> VifResult:
    """Reads the text of a .vif; the status is ok, old or unparsable. Does not touch the disk."""
    info = VolumeInfo()
    try:
        text = data.decode()
        _parse_top(text, _VOLUME_INFO, info)
        return VifResult(info, "ok")
    except (UnicodeDecodeError, _Unparsable) as exc:
        reason = str(exc)
    old = VolumeInfo()
    try:
        _parse_top(data.decode(), _OLD_VOLUME_INFO, old)
        return VifResult(old, "old")
    except (UnicodeDecodeError, _Unparsable) as exc:
        error = f"unmarshal error: {reason} oldFormat: failed to unmarshal old version volume info: {exc}"
    return VifResult(info, "unparsable", error)


def load(path: str) -> VifResult:
    """Reads a .vif. Never raises: a file that is absent, empty or broken gives defaults and a status that says so.

    Quirk kept from upstream: a file without the owner's read bit counts as unreadable even for root.
    """
    checked = check_file(path)
    if not checked.exists:
        return VifResult(VolumeInfo(), "missing")
    if not checked.can_read:
        return VifResult(VolumeInfo(), "unreadable", f"can not read {path}", checked.error in _DISK_ERRORS)
    try:
        with open(path, "rb") as handle:
            data = handle.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return VifResult(VolumeInfo(), "missing")
    except OSError as exc:
        error = f"fail to read {path} : {from_os_error(exc, 'open', path)}"
        return VifResult(VolumeInfo(), "unreadable", error, exc.errno in _DISK_ERRORS)
    if not data:
        return VifResult(VolumeInfo(), "empty")
    if len(data) > _MAX_BYTES:
        return VifResult(VolumeInfo(), "unparsable", f"unmarshal error: more than {_MAX_BYTES} bytes")
    return parse(data)


# ------------------------------------------------------------------------------------------------------------- writing


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _members(pairs: list[tuple[str, str]], indent: str) -> str:
    return "{\n" + ",\n".join(f'{indent}  "{name}":  {value}' for name, value in pairs) + f"\n{indent}}}"


def _remote_file_text(remote: RemoteFile, indent: str) -> str:
    pairs = [
        ("backendType", _quoted(remote.backend_type)),
        ("backendId", _quoted(remote.backend_id)),
        ("key", _quoted(remote.key)),
        ("offset", f'"{remote.offset}"'),
        ("fileSize", f'"{remote.file_size}"'),
        ("modifiedTime", f'"{remote.modified_time}"'),
        ("extension", _quoted(remote.extension)),
    ]
    return indent + _members(pairs, indent)


def render(info: VolumeInfo) -> str:
    """The text upstream's protojson writes: every field, 64-bit numbers as text, no newline at the end."""
    ec = info.ec_shard_config
    files = "[\n" + ",\n".join(_remote_file_text(f, "    ") for f in info.files) + "\n  ]" if info.files else "[]"
    config = (
        "null"
        if ec is None
        else _members(
            [
                ("dataShards", str(ec.data_shards)),
                ("parityShards", str(ec.parity_shards)),
                ("encodeTsNs", f'"{ec.encode_ts_ns}"'),
            ],
            "  ",
        )
    )
    return _members(
        [
            ("files", files),
            ("version", str(info.version)),
            ("replication", _quoted(info.replication)),
            ("bytesOffset", str(info.bytes_offset)),
            ("datFileSize", f'"{info.dat_file_size}"'),
            ("expireAtSec", f'"{info.expire_at_sec}"'),
            ("readOnly", "true" if info.read_only else "false"),
            ("ecShardConfig", config),
            ("readOnlyCanDelete", "true" if info.read_only_can_delete else "false"),
        ],
        "",
    )


def save(path: str, info: VolumeInfo) -> None:
    """Writes a .vif, synced, by rename: a crash leaves the old text or the new one (upstream truncates in place).

    Raises StorageError if the file exists without the owner's write bit, DiskError (NoSpace) if a system call fails.
    Failpoints: vif.write, vif.rename.
    """
    checked = check_file(path)
    if checked.exists and not checked.can_write:
        raise StorageError(f"failed to check {path} not writable")
    try:
        replace_file(path, render(info).encode(), point="vif")
    except OSError as exc:
        error = from_os_error(exc, "open", os.fspath(path))
        raise type(error)(f"failed to write {path}: {error}", error.errno, path=path) from exc
