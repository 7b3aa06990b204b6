"""Command line flags, their other sources (environment, -options file), and the one frozen ServerConfig they give.

Leaf: must not import any layer (cli, server, ops, storage, _native). The grammar and the sources follow
`weed/util/fla9/fla9.go`, the checks of lists `weed/command/volume.go`; what differs is in docs/COMPATIBILITY.md.

Reading happens in two steps, because the second one looks at disks and logs: `parse_flags` turns words into values or
raises UsageError; `build_config` checks directories and counts, raising ConfigFatal. `parse_args` does both.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pwd
import re
import socket
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pyvolume.log import ERROR, SEVERITY_NAMES, LogConfig
from pyvolume.types import normalize_disk_type

_log = logging.getLogger(__name__)

PROGRAM = "pyvolume"
USAGE_STATUS = 2
MIB = 1 << 20
GRPC_PORT_OFFSET = 10000
INDEX_KINDS = ("memory", "leveldb", "leveldbMedium", "leveldbLarge")
READ_MODES = ("local", "proxy", "redirect")


class UsageError(Exception):
    """The command line cannot be used (or is a call for help): print `text` on standard error, exit `exit_code`."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.text = text


class ConfigFatal(Exception):
    """Flags that parse but cannot be served, with upstream's text: a FATAL line and exit status 255."""


# --- texts of Go's strconv and time packages -------------------------------------------------------------------------

_INT = re.compile(r"[+-]?(0[xX](_?[0-9a-fA-F])+|0[oO](_?[0-7])+|0[bB](_?[01])+|0(_?[0-7])*|[1-9](_?[0-9])*)", re.ASCII)
_DECIMAL_INT = re.compile(r"[+-]?[0-9]+", re.ASCII)
_DECIMAL_FLOAT = re.compile(
    r"[+-]?([0-9](_?[0-9])*(\.([0-9](_?[0-9])*)?)?|\.[0-9](_?[0-9])*)([eE][+-]?[0-9](_?[0-9])*)?", re.ASCII
)
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))
_ESCAPES = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    '"': r"\"",
    "\\": r"\\",
}
_NANOSECONDS = {
    "ns": 1,
    "us": 1000,
    "\u00b5s": 1000,
    "\u03bcs": 1000,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}


def go_quote(text: str) -> str:
    """Text in double quotes as Go's %q writes it."""
    out = []
    for char in text:
        code = ord(char)
        if char in _ESCAPES:
            out.append(_ESCAPES[char])
        elif 0xDC80 <= code <= 0xDCFF:  # a byte of an argument that is no UTF-8
            out.append(f"\\x{code - 0xDC00:02x}")
        elif char == " " or (char.isprintable() and char != "\u00ad"):
            out.append(char)
        elif code < 0x80:
            out.append(f"\\x{code:02x}")
        else:
            out.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return '"' + "".join(out) + '"'


def _time_quote(text: str) -> str:
    """Text in double quotes as Go's time package writes it: bytes beyond ASCII as escapes."""
    data = text.encode("utf-8", "surrogateescape")
    out = (f"\\{chr(b)}" if b in b'"\\' else chr(b) if 0x20 <= b < 0x80 else f"\\x{b:02x}" for b in data)
    return '"' + "".join(out) + '"'


def _number_error(function: str, text: str, reason: str) -> ValueError:
    return ValueError(f"strconv.{function}: parsing {go_quote(text)}: {reason}")


def parse_int(text: str) -> int:
    """A 64-bit integer with 0x, 0o, 0b and 0 prefixes and `_` between digits. ValueError with Go's text."""
    if _INT.fullmatch(text) is None:
        raise _number_error("ParseInt", text, "invalid syntax")
    value = _int_of(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise _number_error("ParseInt", text, "value out of range")
    return value


def parse_uint(text: str) -> int:
    """As parse_int, without a sign."""
    if _INT.fullmatch(text) is None or text[0] in "+-":
        raise _number_error("ParseUint", text, "invalid syntax")
    value = _int_of(text)
    if value >= 1 << 64:
        raise _number_error("ParseUint", text, "value out of range")
    return value


def _int_of(text: str) -> int:
    digits = text.lstrip("+-").replace("_", "")
    if len(digits) > 1 and digits[0] == "0":
        kind = digits[1].lower()
        base = {"x": 16, "o": 8, "b": 2}.get(kind, 8)
        value = int(digits[2:] if kind in "xob" else digits, base)
    else:
        value = int(digits)
    return -value if text[0] == "-" else value


def parse_atoi(text: str) -> int:
    """A decimal 64-bit integer. ValueError with the text of Go's Atoi."""
    if _DECIMAL_INT.fullmatch(text) is None:
        raise _number_error("Atoi", text, "invalid syntax")
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise _number_error("Atoi", text, "value out of range")
    return value


def parse_bool(text: str) -> bool:
    """One of the twelve words Go takes for a truth value."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise _number_error("ParseBool", text, "invalid syntax")


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of a Go duration such as `300ms` or `1h30m`. ValueError with Go's text."""
    quoted = _time_quote(text)
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0
    invalid = ValueError(f"time: invalid duration {quoted}")
    if not rest:
        raise invalid
    total = 0
    while rest:
        digits = re.match(r"([0-9]*)(?:\.([0-9]*))?", rest, re.ASCII)
        assert digits is not None
        whole, fraction = digits[1], digits[2] or ""
        if not whole and not fraction:
            raise invalid
        rest = rest[digits.end() :]
        unit_text = re.match(r"[^.0-9]*", rest, re.ASCII)
        assert unit_text is not None
        if not unit_text[0]:
            raise ValueError(f"time: missing unit in duration {quoted}")
        unit = _NANOSECONDS.get(unit_text[0])
        if unit is None:
            raise ValueError(f"time: unknown unit {_time_quote(unit_text[0])} in duration {quoted}")
        rest = rest[unit_text.end() :]
        total += int(whole or "0") * unit
        if fraction:
            total += int(fraction) * unit // 10 ** len(fraction)
        if total > 1 << 63:
            raise invalid
    if text[0] == "-":
        return -total
    if total >= 1 << 63:
        raise invalid
    return total


def format_duration(nanoseconds: int) -> str:
    """A duration as Go prints it: `1m0s`, `300ms`, `1h30m0s`."""
    if nanoseconds == 0:
        return "0s"
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    if rest < 10**9:
        for name, unit in (("ms", 10**6), ("\u00b5s", 1000), ("ns", 1)):
            if rest >= unit:
                return f"{sign}{_trimmed(rest, unit)}{name}"
    minutes, rest = divmod(rest, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    out = f"{_trimmed(rest, 10**9)}s"
    if hours or minutes:
        out = f"{minutes}m{out}"
    if hours:
        out = f"{hours}h{out}"
    return sign + out


def _trimmed(value: int, unit: int) -> str:
    whole, part = divmod(value, unit)
    if not part:
        return str(whole)
    return f"{whole}.{part:0{len(str(unit)) - 1}d}".rstrip("0")


# --- kinds of values -------------------------------------------------------------------------------------------------


def _parse_severity(text: str) -> int:
    upper = text.upper()
    return SEVERITY_NAMES.index(upper) if upper in SEVERITY_NAMES else parse_atoi(text)


_VMODULE_SYNTAX = "syntax error: expect comma-separated list of filename=N"


def _parse_vmodule(text: str) -> tuple[tuple[str, int], ...]:
    filters = []
    for item in text.split(","):
        if not item:
            continue
        parts = item.split("=")
        if len(parts) != 2 or not parts[0] or not parts[1]:
            raise ValueError(_VMODULE_SYNTAX)
        try:
            level = parse_atoi(parts[1])
        except ValueError:
            raise ValueError(_VMODULE_SYNTAX) from None
        if level < 0:
            raise ValueError("negative value for vmodule level")
        if level > 0:
            filters.append((parts[0], level))
    return tuple(filters)


def _parse_backtrace(text: str) -> tuple[str, int] | None:
    syntax = ValueError("syntax error: expect file.go:234")
    parts = text.split(":")
    if len(parts) != 2 or "." not in parts[0]:
        raise syntax
    try:
        line = parse_atoi(parts[1])
    except ValueError:
        raise syntax from None
    if line <= 0:
        raise ValueError("negative or zero value for level")
    return parts[0], line


def _parse_offset_width(text: str) -> int:
    width = parse_int(text)
    if width not in (4, 5):
        raise ValueError("the offset width is 4 or 5 bytes")
    return width


def _not_negative(parse: Callable[[str], int]) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        value = parse(text)
        if value < 0:
            raise ValueError("must not be negative")
        return value

    return parsed


@dataclass(frozen=True)
class Kind:
    """How a flag's text becomes a value, and the word that stands for the value in the usage text."""

    word: str
    parse: Callable[[str], Any]
    is_bool: bool = False


STRING = Kind("string", str)
BOOL = Kind("", parse_bool, is_bool=True)
INT = Kind("int", parse_int)
UINT = Kind("uint", parse_uint)
DURATION = Kind("duration", parse_duration_ns)
TEXT_VALUE = Kind("value", str)
LEVEL_VALUE = Kind("value", parse_atoi)
SEVERITY_VALUE = Kind("value", _parse_severity)
VMODULE_VALUE = Kind("value", _parse_vmodule)
BACKTRACE_VALUE = Kind("value", _parse_backtrace)
OFFSET_WIDTH = Kind("int", _parse_offset_width)
NOT_NEGATIVE_INT = Kind("int", _not_negative(parse_int))
NOT_NEGATIVE_DURATION = Kind("duration", _not_negative(parse_duration_ns))

GLOBAL, VOLUME = "global", "volume"


@dataclass(frozen=True)
class Flag:
    """One flag. `default` is the value, or a function of the environment for the two detected ones."""

    name: str
    kind: Kind
    default: Any
    help: str
    scope: str = VOLUME
    ours: bool = False
    """A flag upstream does not have."""

    def default_value(self, environ: Mapping[str, str]) -> Any:
        return self.default(environ) if callable(self.default) else self.default

    def env_name(self) -> str:
        """The environment variable that sets it. Quirk of upstream: those of volume flags have no prefix."""
        name = self.name.upper().replace("-", "_").replace(".", "_")
        return f"WEED_{name}" if self.scope == GLOBAL else name


def _temp_dir(environ: Mapping[str, str]) -> str:
    return environ.get("TMPDIR") or "/tmp"


_OPTIONS_HELP = "file with more flags, one name=value in a line; the command line and the environment win over it"

GLOBAL_FLAGS: tuple[Flag, ...] = (
    Flag("alsologtostderr", BOOL, True, "write log lines to standard error and to files", GLOBAL),
    Flag("config_dir", TEXT_VALUE, "", "directory searched first for security.toml and volume.toml", GLOBAL),
    Flag("log_backtrace_at", BACKTRACE_VALUE, None, "add a stack to the log line written at file:N", GLOBAL),
    Flag("log_compress", BOOL, False, "compress log files with gzip once they are rotated", GLOBAL),
    Flag("log_json", BOOL, False, "write each log line as one JSON object", GLOBAL),
    Flag("log_max_files", INT, 5, "log files kept for each severity (0 means 5)", GLOBAL),
    Flag("log_max_size_mb", UINT, 1800, "start a new log file at this size in MiB (0 means 10)", GLOBAL),
    Flag("log_rotate_hours", INT, 168, "start a new log file at this age in hours (0 means never)", GLOBAL),
    Flag("logdir", STRING, "", "directory of the log files (the system's temporary directory if empty)", GLOBAL),
    Flag("logtostderr", BOOL, False, "write log lines to standard error only, no files", GLOBAL),
    Flag("options", STRING, "", _OPTIONS_HELP, GLOBAL),
    Flag(
        "stderrthreshold",
        SEVERITY_VALUE,
        ERROR,
        "with -alsologtostderr=false: still write lines of this severity (INFO, WARNING, ERROR, FATAL or 0 to 3) "
        "and above to standard error",
        GLOBAL,
    ),
    Flag("v", LEVEL_VALUE, 0, "verbosity of the log, 0 to 4", GLOBAL),
    Flag("vmodule", VMODULE_VALUE, (), "verbosity by source file, as pattern=N[,pattern=N]...", GLOBAL),
)


def _volume_flags() -> tuple[Flag, ...]:
    return (
        Flag("compactionMBps", INT, 0, "limit of vacuum and copy speed in MiB/s, 0 for none"),
        Flag("concurrentDownloadLimitMB", INT, 0, "limit of bytes in flight to clients in MiB, 0 for none"),
        Flag("concurrentUploadLimitMB", INT, 0, "limit of bytes in flight from clients in MiB, 0 for none"),
        Flag("cpuprofile", STRING, "", "file for a CPU profile"),
        Flag("dataCenter", STRING, "", "name of the data center this server stands in"),
        Flag("debug", BOOL, False, "serve profiles on -debug.port"),
        Flag("debug.port", INT, 6060, "port of the profile listener"),
        Flag("dir", STRING, _temp_dir, "directories of the data files, dir[,dir]..."),
        Flag("dir.idx", STRING, "", "directory of the .idx files, if not beside the data"),
        Flag("disk", STRING, "", "disk type of each directory: hdd, ssd or any tag, type[,type]..."),
        Flag("fileSizeLimitMB", INT, 256, "largest upload in MiB"),
        Flag("hasSlowRead", BOOL, True, "let large reads go piecewise (no effect here: reads never hold a lock)"),
        Flag("id", STRING, "", "name of this server towards masters (ip:port if empty)"),
        Flag("idleTimeout", INT, 30, "close HTTP connections without traffic after this many seconds"),
        Flag("images.fix.orientation", BOOL, False, "turn uploaded JPEGs upright by what their camera noted"),
        Flag(
            "index",
            STRING,
            "memory",
            "where the needle maps live: memory, leveldb, leveldbMedium or leveldbLarge",
        ),
        Flag(
            "index.leveldbTimeout",
            INT,
            0,
            "close the leveldb map of a volume not used for this many hours, 0 never",
        ),
        Flag("inflightDownloadDataTimeout", DURATION, 60 * 10**9, "how long a download waits for room under its limit"),
        Flag("inflightUploadDataTimeout", DURATION, 60 * 10**9, "how long an upload waits for room under its limit"),
        Flag("ip", STRING, lambda _environ: detect_host_address(), "address or name announced to masters"),
        Flag("ip.bind", STRING, "", "address to listen on (that of -ip if empty)"),
        Flag(
            "maintenanceMBps",
            INT,
            0,
            "limit of replication and balance copying in MiB/s, 0 for none",
        ),
        Flag("master", STRING, "localhost:9333", "masters, host:port[,host:port]..."),
        Flag("max", STRING, "8", "largest number of volumes of each directory, n[,n]...; 0 goes by free space"),
        Flag("memprofile", STRING, "", "file for a memory profile"),
        Flag(
            "metricsIp",
            STRING,
            "",
            "address of the metrics listener (that of -ip.bind if empty)",
        ),
        Flag("metricsPort", INT, 0, "port for Prometheus, 0 for none"),
        Flag(
            "minFreeSpace",
            STRING,
            "",
            "below this much free space all volumes turn read-only, each directory one: a percentage up to 100, or a "
            "size like 10GiB",
        ),
        Flag("minFreeSpacePercent", STRING, "1", "the same in percent; older name, used if -minFreeSpace is empty"),
        Flag("mserver", STRING, "", "older name of -master, which it overrides"),
        Flag("options", STRING, "", _OPTIONS_HELP),
        Flag("port", INT, 8080, "port for HTTP"),
        Flag("port.grpc", INT, 0, "port for gRPC (-port plus 10000 if 0)"),
        Flag("port.public", INT, 0, "second, read-only port for HTTP (none if 0 or equal to -port)"),
        Flag("pprof", BOOL, False, "serve profiles on -port"),
        Flag("preStopSeconds", INT, 10, "seconds to go on serving between the last heartbeat and the stop"),
        Flag("publicUrl", STRING, "", "address announced to clients (ip:port.public if empty)"),
        Flag("rack", STRING, "", "name of the rack this server stands in"),
        Flag("readBufferSizeMB", INT, 4, "size in MiB of the pieces of large reads"),
        Flag(
            "readMode",
            STRING,
            "proxy",
            "reads of volumes that are elsewhere: local (answer 404), proxy (fetch them) or redirect",
        ),
        Flag("tags", STRING, "", "tags of each directory, tag:tag[,tag:tag]..."),
        Flag(
            "volume.allowUntrustedRemoteEndpoints",
            BOOL,
            False,
            "let FetchAndWriteNeedle read from any address, loopback and metadata services included",
        ),
        Flag("whiteList", STRING, "", "addresses and networks that may write and administer, all if empty"),
    )


OUR_FLAGS: tuple[Flag, ...] = (
    Flag(
        "fastLane",
        BOOL,
        True,
        "serve plain reads and writes by threads outside of Python",
        ours=True,
    ),
    Flag(
        "fastLane.threads",
        NOT_NEGATIVE_INT,
        0,
        "number of those threads (0 goes by the processors)",
        ours=True,
    ),
    Flag("guardPeers", BOOL, False, "put every state-changing RPC behind -whiteList, those of peers too", ours=True),
    Flag("offsetBytes", OFFSET_WIDTH, 4, "offset width of new volumes: 4 (to 32 GiB) or 5 (to 8 TiB)", ours=True),
    Flag("repairOnLoad", BOOL, True, "mend volumes that a crash left with an incomplete last record", ours=True),
    Flag("securityFile", STRING, "", "read this security.toml and search for no other", ours=True),
    Flag("stopTimeout", NOT_NEGATIVE_DURATION, 30 * 10**9, "longest wait for running requests at a stop", ours=True),
)

VOLUME_FLAGS: tuple[Flag, ...] = _volume_flags() + OUR_FLAGS


# --- grammar and sources ---------------------------------------------------------------------------------------------


class FlagError(Exception):
    """A word, variable or line that cannot be used; the text is the first line of the usage message."""


class HelpAsked(Exception):
    """-h or -help was given."""


class OptionsFileMissing(Exception):
    """The -options file cannot be opened."""

    def __init__(self, path: str, cause: OSError) -> None:
        super().__init__(f"open {path}: {error_text(cause)}")


@dataclass
class Parsed:
    """Values by flag name, the source of each that was given, and the words after the point where flags ended."""

    values: dict[str, Any]
    given: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    options_error: OptionsFileMissing | None = None


class FlagSet:
    """Flags that are parsed together."""

    def __init__(self, flags: Sequence[Flag]) -> None:
        self._flags = {flag.name: flag for flag in flags}

    @property
    def flags(self) -> list[Flag]:
        """Sorted by name, as the usage text lists them."""
        return [self._flags[name] for name in sorted(self._flags)]

    def split_word(self, word: str) -> tuple[str, str | None] | None:
        """(name, value or None) of a word that is a flag; None where flags end. FlagError for a malformed one."""
        if len(word) < 2 or word[0] != "-" or word == "--":
            return None
        name = word[2:] if word[1] == "-" else word[1:]
        if not name or name[0] in "-=":
            raise FlagError(f"bad flag syntax: {word}")
        if name.startswith("test."):
            return None  # Quirk: upstream's parser stops here without a word
        cut = name.find("=", 1)
        return (name, None) if cut < 0 else (name[:cut], name[cut + 1 :])

    def walk(self, words: Sequence[str]) -> tuple[list[str], int, bool]:
        """Names of the flags in `words`, the index of the word that ends them, and whether that word is an error.

        Values are not looked at.
        """
        names: list[str] = []
        at = 0
        while at < len(words):
            try:
                split = self.split_word(words[at])
            except FlagError:
                return names, at, True
            if split is None:
                break
            flag = self._flags.get(split[0])
            if flag is None:
                return names, at, True
            names.append(flag.name)
            at += 1 if split[1] is not None or flag.kind.is_bool else 2
        return names, min(at, len(words)), False

    def parse(self, words: Sequence[str], environ: Mapping[str, str]) -> Parsed:
        """Reads all sources in their order. Raises FlagError or HelpAsked; a missing file is only noted."""
        parsed = Parsed({flag.name: None for flag in self._flags.values()})
        self._parse_words(words, parsed)
        self._parse_environment(environ, parsed)
        path = parsed.values.get("options") or self._options_in(parsed.rest)
        if path:
            self._parse_file(path, parsed)
        for name, flag in self._flags.items():
            if name not in parsed.given:
                parsed.values[name] = flag.default_value(environ)
        return parsed

    def _parse_words(self, words: Sequence[str], parsed: Parsed) -> None:
        rest = list(words)
        while rest:
            split = self.split_word(rest[0])
            if split is None:
                if rest[0] == "--":
                    del rest[0]
                break
            name, value = split
            del rest[0]
            flag = self._flags.get(name)
            if flag is None:
                if name in ("h", "help"):
                    raise HelpAsked
                raise FlagError(f"flag provided but not defined: -{name}")
            if flag.kind.is_bool:
                try:
                    parsed.values[name] = True if value is None else flag.kind.parse(value)
                except ValueError as exc:
                    raise FlagError(f"invalid boolean value {go_quote(value or '')} for -{name}: {exc}") from None
            else:
                if value is None:
                    if not rest:
                        raise FlagError(f"flag needs an argument: -{name}")
                    value = rest.pop(0)
                parsed.values[name] = self._value(flag, value, f"flag -{name}")
            parsed.given[name] = "command line"
        parsed.rest = rest

    def _parse_environment(self, environ: Mapping[str, str], parsed: Parsed) -> None:
        for flag in self.flags:
            if flag.name in parsed.given:
                continue
            text = environ.get(flag.env_name())
            if text is None:
                continue
            if flag.kind.is_bool and text == "":
                text = "true"
            parsed.values[flag.name] = self._value(flag, text, f"environment variable {flag.name}")
            parsed.given[flag.name] = f"environment variable {flag.env_name()}"

    @staticmethod
    def _options_in(rest: Sequence[str]) -> str:
        """Quirk: -options is also seen among the words after the end of the flags (single dash only)."""
        for at, word in enumerate(rest):
            if word == "-options" and at + 1 < len(rest):
                return rest[at + 1]
            if word.startswith("-options="):
                return word.removeprefix("-options=")
        return ""

    def _parse_file(self, path: str, parsed: Parsed) -> None:
        try:
            data = Path(path).read_bytes()
        except OSError as exc:
            parsed.options_error = OptionsFileMissing(path, exc)
            return
        for raw in data.decode("utf-8", "surrogateescape").split("\n"):
            line = raw.strip()
            if not line or line[0] == "#":
                continue
            name, value = line, ""
            cut = re.search(r"[= :]", line)
            if cut is not None:
                name, value = line[: cut.start()].strip(), line[cut.end() :].strip()
            name = name.removeprefix("-")
            flag = self._flags.get(name)
            if flag is None or name in parsed.given:
                continue
            if flag.kind.is_bool and value == "":
                value = "true"
            parsed.values[name] = self._value(flag, value, f"configuration variable {name}")
            parsed.given[name] = f"options file {path}"

    @staticmethod
    def _value(flag: Flag, text: str, where: str) -> Any:
        try:
            return flag.kind.parse(text)
        except ValueError as exc:
            raise FlagError(f"invalid value {go_quote(text)} for {where}: {exc}") from None

    def usage(self, environ: Mapping[str, str]) -> str:
        """The flags with their help and defaults, sorted by name, in the layout of Go's flag package."""
        return "".join(_usage_of(flag, flag.default_value(environ)) for flag in self.flags)


def _usage_of(flag: Flag, default: Any) -> str:
    head = f"  -{flag.name}" + (f" {flag.kind.word}" if flag.kind.word else "")
    text = head + ("\t" if len(head) <= 4 else "\n    \t") + flag.help
    shown = shown_default(flag, default)
    return text + (f" (default {shown})" if shown else "") + "\n"


def shown_default(flag: Flag, default: Any) -> str:
    """A default as Go's flag package shows it; empty for those that it does not show."""
    if flag.kind is STRING and default:
        return go_quote(default)
    if flag.kind.word == "duration" and default:
        return format_duration(default)
    if flag.kind.word in ("int", "uint") and default:
        return str(default)
    return "true" if flag.kind.is_bool and default else ""


GLOBAL_SET = FlagSet(GLOBAL_FLAGS)
VOLUME_SET = FlagSet(VOLUME_FLAGS)
VERSION_SET = FlagSet([flag for flag in VOLUME_FLAGS if flag.name == "options"])
COMBINED_SET = FlagSet([*(flag for flag in GLOBAL_FLAGS if flag.name != "options"), *VOLUME_FLAGS])
"""Both kinds together, for calls without a subcommand."""


# --- the values a server runs on -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinFreeSpace:
    """The reserve of a directory: a percentage of its file system, or (percent None) bytes."""

    percent: float | None = 1.0
    size_bytes: int = 0


@dataclass(frozen=True)
class DirConfig:
    """One entry of -dir with what the other lists say about it."""

    path: str
    idx_path: str
    max_volumes: int = 8
    """0: by free space; negative: no new volumes."""
    disk_type: str = ""
    """Empty for hdd."""
    min_free: MinFreeSpace = MinFreeSpace()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServerConfig:
    """Everything the flags say, checked and in plain units. Built once at start and never changed."""

    ip: str = "127.0.0.1"
    ip_detected: bool = False
    """-ip was given empty and found out instead."""
    bind_ip: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 18080
    public_port: int = 8080
    public_url: str = "127.0.0.1:8080"
    server_id: str = "127.0.0.1:8080"
    masters: tuple[str, ...] = ("localhost:9333",)
    dirs: tuple[DirConfig, ...] = ()
    idx_dir: str = ""
    data_center: str = ""
    rack: str = ""
    index_kind: str = "memory"
    index_leveldb_timeout_h: int = 0
    read_mode: str = "proxy"
    white_list: tuple[str, ...] = ()
    """Entries of -whiteList as given; SecurityConfig checks and joins them with those of security.toml."""
    file_size_limit_bytes: int = 256 * MIB
    upload_limit_bytes: int = 0
    download_limit_bytes: int = 0
    upload_wait_s: float = 60.0
    download_wait_s: float = 60.0
    idle_timeout_s: int = 30
    has_slow_read: bool = True
    read_buffer_bytes: int = 4 * MIB
    compaction_bytes_per_s: int = 0
    maintenance_bytes_per_s: int = 0
    fix_orientation: bool = False
    pre_stop_s: int = 10
    metrics_port: int = 0
    metrics_ip: str = "127.0.0.1"
    cpu_profile: str = ""
    mem_profile: str = ""
    pprof: bool = False
    debug: bool = False
    debug_port: int = 6060
    allow_untrusted_remote: bool = False
    config_dir: str = ""
    fast_lane: bool = True
    fast_lane_threads: int = 0
    repair_on_load: bool = True
    offset_bytes: int = 4
    guard_peers: bool = False
    stop_timeout_s: float = 30.0
    security_file: str = ""
    log: LogConfig = field(default_factory=LogConfig)
    disk_setting: str = ""
    """The whole text of -disk: it chooses the threshold of the disk probe."""

    @property
    def has_public_listener(self) -> bool:
        """Whether -port.public asks for a second, read-only listener."""
        return self.public_port != self.port


@dataclass(frozen=True)
class ParsedFlags:
    """Flags of one call that starts a server, before anything was checked against the machine."""

    values: Mapping[str, Any]
    given: Mapping[str, str]
    warnings: tuple[str, ...]
    log: LogConfig


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> ServerConfig:
    """Words after the program's name to a configuration. UsageError, or ConfigFatal once the words are understood."""
    return build_config(parse_flags(argv, environ))


def parse_flags(argv: Sequence[str], environ: Mapping[str, str]) -> ParsedFlags:
    """Reads `[flags]` or `[global flags] volume [volume flags]`; other subcommands are the caller's business."""
    words = list(argv)
    form = classify(words)
    if form.command is None:
        return parse_combined(words, environ)
    parsed_global = parse_global(words, environ)
    if form.command != VOLUME:
        raise unknown_subcommand(form.command)
    return parse_volume(parsed_global, environ)


@dataclass(frozen=True)
class Form:
    """What kind of call the words are: a subcommand's, or (command None) flags of both kinds without one."""

    command: str | None


OFFLINE_COMMANDS = ("check", "fix", "export", "compact")
"""Work on files that no server has; their flags are their own (pyvolume.offline)."""
KNOWN_COMMANDS = frozenset(("volume", "version", "help"))


def classify(words: list[str]) -> Form:
    """Upstream's form `[global flags] command ...`, or ours without a command. Looks at no values."""
    names, stop, wrong = COMBINED_SET.walk(words)
    known_global = {flag.name for flag in GLOBAL_FLAGS}
    only_global = all(name in known_global for name in names)
    if wrong:
        # The parser of either form raises the error; only the usage text after it depends on the form.
        return Form(VOLUME if only_global and VOLUME in words[stop:] else None)
    rest = words[stop + 1 :] if words[stop : stop + 1] == ["--"] else words[stop:]
    if not rest:
        return Form(None)
    return Form(rest[0] if only_global or rest[0] in KNOWN_COMMANDS else None)


def parse_global(words: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """The global flags before a subcommand. UsageError with the program's usage."""
    try:
        parsed = GLOBAL_SET.parse(words, environ)
    except FlagError as exc:
        raise UsageError(USAGE_STATUS, f"{exc}\n{program_usage(environ)}") from None
    except HelpAsked:
        raise UsageError(USAGE_STATUS, program_usage(environ)) from None
    if parsed.options_error is not None:
        raise UsageError(USAGE_STATUS, "")  # Quirk: upstream leaves without a word
    return parsed


def parse_volume(parsed_global: Parsed, environ: Mapping[str, str]) -> ParsedFlags:
    """The words after `volume`. A missing options file is ignored here, as upstream does."""
    try:
        parsed = VOLUME_SET.parse(parsed_global.rest[1:], environ)
    except FlagError as exc:
        raise UsageError(USAGE_STATUS, f"{exc}\n{volume_usage(environ)}") from None
    except HelpAsked:
        raise UsageError(USAGE_STATUS, volume_usage(environ)) from None
    values = {**parsed.values, **{k: v for k, v in parsed_global.values.items() if k != "options"}}
    given = {**parsed_global.given, **parsed.given}
    return _parsed_flags(values, given, parsed.rest, parsed_global.rest[1:])


def parse_combined(words: Sequence[str], environ: Mapping[str, str]) -> ParsedFlags:
    """Flags of both kinds in one row, as the Rust port takes them."""
    usage = combined_usage(environ) if words else program_usage(environ)
    if not words:
        raise UsageError(USAGE_STATUS, usage)
    if "OPTIONS" not in environ and "WEED_OPTIONS" in environ:
        environ = {**environ, "OPTIONS": environ["WEED_OPTIONS"]}
    try:
        parsed = COMBINED_SET.parse(words, environ)
    except FlagError as exc:
        raise UsageError(USAGE_STATUS, f"{exc}\n{usage}") from None
    except HelpAsked:
        raise UsageError(USAGE_STATUS, usage) from None
    if parsed.options_error is not None:
        raise UsageError(USAGE_STATUS, f"{parsed.options_error}\n")
    return _parsed_flags(parsed.values, parsed.given, parsed.rest, words)


def _parsed_flags(
    values: Mapping[str, Any], given: Mapping[str, str], rest: Sequence[str], words: Sequence[str]
) -> ParsedFlags:
    warnings = []
    if rest:
        warnings.append(_stray_warning(rest, words))
    return ParsedFlags(dict(values), dict(given), tuple(warnings), _log_config(values))


def _stray_warning(rest: Sequence[str], words: Sequence[str]) -> str:
    """What upstream passes over in silence: a word that ended the flags, and the flags lost behind it."""
    before = len(words) - len(rest) - 1
    ended_by = "--" if before >= 0 and words[before] == "--" else rest[0]
    lost = [word for word in rest if len(word) > 1 and word[0] == "-" and word != "--"]
    text = f"the word {go_quote(ended_by)} ends the flags"
    if lost:
        text += f"; not read: {' '.join(lost)}"
    if before >= 0 and not ended_by.startswith("-"):
        split = VOLUME_SET.split_word(words[before])
        flag = next((f for f in (*GLOBAL_FLAGS, *VOLUME_FLAGS) if split and f.name == split[0]), None)
        if flag is not None and flag.kind.is_bool and split is not None and split[1] is None:
            text += f" (a value of -{flag.name} is written -{flag.name}={ended_by})"
    return text


def _log_config(values: Mapping[str, Any]) -> LogConfig:
    return LogConfig(
        verbosity=values["v"],
        vmodule=values["vmodule"],
        to_stderr=values["logtostderr"],
        also_to_stderr=values["alsologtostderr"],
        stderr_threshold=values["stderrthreshold"],
        directory=values["logdir"],
        backtrace_at=values["log_backtrace_at"],
        json=values["log_json"],
        max_size_bytes=(values["log_max_size_mb"] or 10) * MIB,
        max_files=values["log_max_files"] if values["log_max_files"] > 0 else 5,
        rotate_hours=values["log_rotate_hours"],
        compress=values["log_compress"],
        program=PROGRAM,
    )


# --- usage texts -----------------------------------------------------------------------------------------------------


def volume_usage(environ: Mapping[str, str]) -> str:
    """What follows the message of a wrong volume flag, and what -h prints."""
    return (
        "Example: weed volume -port=8080 -dir=/tmp -max=5 -ip=server_name -master=localhost:9333\n"
        f"Default Usage:\n{VOLUME_SET.usage(environ)}"
        "Description:\n"
        "  serve the volumes found in some directories, and create new ones there when a master asks for it\n"
    )


def program_summary() -> str:
    """The commands, as `help` prints them."""
    return f"""
{PROGRAM}: a volume server for SeaweedFS clusters

Usage:

\t{PROGRAM} [global flags] command [flags]
\t{PROGRAM} [global flags and flags of volume]

The commands are:

    volume      start a volume server
    check       look for damage in volumes that no server has
    fix         rebuild their indexes from their data
    export      list their needles, or write them to a tar file or a directory
    compact     vacuum them
    completion  print completion for bash, zsh or fish
    version     print the version
    help        print this text, or that of a command

Use "{PROGRAM} help [command]" for more information about a command.

"""


def program_usage(environ: Mapping[str, str]) -> str:
    """What follows the message of a wrong global flag."""
    return program_summary() + f"The global flags are:\n{GLOBAL_SET.usage(environ)}"


def combined_usage(environ: Mapping[str, str]) -> str:
    """The usage of a call without a subcommand: flags of both kinds."""
    return program_usage(environ) + f"The flags of volume are:\n{VOLUME_SET.usage(environ)}"


def unknown_subcommand(word: str) -> UsageError:
    """For a first word that is no command of ours."""
    return UsageError(USAGE_STATUS, f"weed: unknown subcommand {go_quote(word)}\nRun 'weed help' for usage.\n")


# --- checks against each other and the machine -----------------------------------------------------------------------


def error_text(exc: OSError) -> str:
    """The reason of a failed system call in Go's words (lower case)."""
    text = os.strerror(exc.errno) if exc.errno else str(exc)
    return text[:1].lower() + text[1:]


def build_config(flags: ParsedFlags) -> ServerConfig:
    """Checks lists and directories in upstream's order. ConfigFatal with its text at the first thing wrong.

    Logs one line for each data directory; touches nothing on disk.
    """
    v = flags.values
    metrics_ip = v["metricsIp"] or v["ip.bind"] or v["ip"]
    masters = tuple(item for item in (v["mserver"] or v["master"]).split(",") if item)
    dirs = _build_dirs(v)
    ip = v["ip"] or detect_host_address()
    public_port = v["port.public"] or v["port"]
    return ServerConfig(
        ip=ip,
        ip_detected=not v["ip"],
        bind_ip=v["ip.bind"] or ip,
        port=v["port"],
        grpc_port=v["port.grpc"] or v["port"] + GRPC_PORT_OFFSET,
        public_port=public_port,
        public_url=v["publicUrl"] or join_host_port(ip, public_port),
        server_id=v["id"].strip() or join_host_port(ip, v["port"]),
        masters=masters,
        dirs=dirs,
        idx_dir=resolve_path(v["dir.idx"]),
        data_center=v["dataCenter"],
        rack=v["rack"],
        index_kind=v["index"] if v["index"] in INDEX_KINDS else "memory",
        index_leveldb_timeout_h=v["index.leveldbTimeout"],
        read_mode=v["readMode"] if v["readMode"] in READ_MODES else "redirect",
        white_list=tuple(v["whiteList"].split(",")) if v["whiteList"] else (),
        file_size_limit_bytes=v["fileSizeLimitMB"] * MIB,
        upload_limit_bytes=v["concurrentUploadLimitMB"] * MIB,
        download_limit_bytes=v["concurrentDownloadLimitMB"] * MIB,
        upload_wait_s=v["inflightUploadDataTimeout"] / 1e9,
        download_wait_s=v["inflightDownloadDataTimeout"] / 1e9,
        idle_timeout_s=v["idleTimeout"],
        has_slow_read=v["hasSlowRead"],
        read_buffer_bytes=v["readBufferSizeMB"] * MIB,
        compaction_bytes_per_s=v["compactionMBps"] * MIB,
        maintenance_bytes_per_s=v["maintenanceMBps"] * MIB,
        fix_orientation=v["images.fix.orientation"],
        pre_stop_s=v["preStopSeconds"],
        metrics_port=v["metricsPort"],
        metrics_ip=metrics_ip,
        cpu_profile=resolve_path(v["cpuprofile"]),
        mem_profile=resolve_path(v["memprofile"]),
        pprof=v["pprof"],
        debug=v["debug"],
        debug_port=v["debug.port"],
        allow_untrusted_remote=v["volume.allowUntrustedRemoteEndpoints"],
        config_dir=v["config_dir"],
        fast_lane=v["fastLane"],
        fast_lane_threads=v["fastLane.threads"],
        repair_on_load=v["repairOnLoad"],
        offset_bytes=v["offsetBytes"],
        guard_peers=v["guardPeers"],
        stop_timeout_s=v["stopTimeout"] / 1e9,
        security_file=v["securityFile"],
        log=flags.log,
        disk_setting=v["disk"],
    )


def _build_dirs(v: Mapping[str, Any]) -> tuple[DirConfig, ...]:
    min_free = [parse_min_free_space(item) for item in (v["minFreeSpace"] or v["minFreeSpacePercent"]).split(",")]
    paths = [_checked_dir(item) for item in v["dir"].split(",")]
    limits = [_parse_max(item) for item in v["max"].split(",")]
    limits = _for_each_dir(paths, limits, "{} directories by -dir, but only {} max is set by -max")
    min_free = _for_each_dir(
        paths, min_free, "{} directories by -dir, but only {} minFreeSpacePercent is set by -minFreeSpacePercent"
    )
    types = [normalize_disk_type(item) for item in v["disk"].split(",")]
    types = _for_each_dir(paths, types, "{} directories by -dir, but only {} disk types is set by -disk")
    tags = parse_tags(v["tags"], len(paths))
    idx_dir = resolve_path(v["dir.idx"])
    return tuple(
        DirConfig(path, idx_dir or path, limit, disk_type, free, tag)
        for path, limit, disk_type, free, tag in zip(paths, limits, types, min_free, tags, strict=True)
    )


_T = TypeVar("_T")


def _for_each_dir(paths: Sequence[str], items: list[_T], message: str) -> list[_T]:
    if len(items) == 1:
        return items * len(paths)
    if len(items) != len(paths):
        raise ConfigFatal(message.format(len(paths), len(items)))
    return items


def _parse_max(text: str) -> int:
    if _DECIMAL_INT.fullmatch(text) is None or not -(1 << 63) <= int(text) < 1 << 63:
        raise ConfigFatal(f"The max specified in -max not a valid number {text}")
    return (int(text) + (1 << 31)) % (1 << 32) - (1 << 31)  # Quirk: wraps to 32 bits


def _checked_dir(item: str) -> str:
    path = resolve_path(item)
    prefix = f"Check Data Folder(-dir) Writable {path} : "
    try:
        status = os.stat(path)
    except OSError as exc:
        raise ConfigFatal(f"{prefix}stat {path}: {error_text(exc)}") from None
    except ValueError:  # a NUL in the name
        raise ConfigFatal(f"{prefix}stat {path}: {os.strerror(errno.EINVAL).lower()}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigFatal(f"{prefix}Not a valid folder!")
    _log.info("Folder %s Permission: %s", path, permission_text(status.st_mode))
    if not status.st_mode & stat.S_IWUSR:
        raise ConfigFatal(f"{prefix}Not writable!")
    return path


def permission_text(mode: int) -> str:
    """`-rwxr-xr-x`: the nine permission bits alone."""
    return "-" + "".join(char if mode >> (8 - bit) & 1 else "-" for bit, char in enumerate("rwxrwxrwx"))


def resolve_path(path: str) -> str:
    """Expands `~`, `~/x` and `~user/x`; anything else, and unknown users, come back unchanged."""
    if not path.startswith("~"):
        return path
    name, slash, rest = path[1:].partition("/")
    try:
        entry = pwd.getpwnam(name) if name else pwd.getpwuid(os.getuid())
    except KeyError:
        return path
    return os.path.normpath(os.path.join(entry.pw_dir, rest)) if slash else entry.pw_dir  # noqa: PTH118


_SIZE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _SIZE_UNITS |= {_letter: 1000**_power, _letter + "b": 1000**_power}
    _SIZE_UNITS |= {_letter + "i": 1024**_power, _letter + "ib": 1024**_power}


def parse_size(text: str) -> int:
    """Bytes of a size such as `10GiB` or `1,000 kb`. ValueError if it is none."""
    digits = re.match(r"[0-9.,]*", text)
    assert digits is not None
    number = digits[0].replace(",", "")
    unit = _SIZE_UNITS.get(text[digits.end() :].strip().lower())
    if unit is None or _DECIMAL_FLOAT.fullmatch(number) is None:
        raise ValueError(f"not a size: {text}")
    value = float(number) * unit
    if value >= 1 << 64:
        raise ValueError(f"too large: {text}")
    return int(value)


def parse_min_free_space(item: str) -> MinFreeSpace:
    """One item of -minFreeSpace. Quirk: a plain number above 100 is refused, it needs a unit."""
    text = item.strip()
    fatal = ConfigFatal(f"The value specified in -minFreeSpace not a valid value {item}")
    if _DECIMAL_FLOAT.fullmatch(text) is not None:
        percent = float(text)
        if not 0 <= percent <= 100:
            raise fatal
        return MinFreeSpace(percent=percent)
    try:
        size = parse_size(text)
    except ValueError:
        raise fatal from None
    if size <= 100:
        raise fatal
    return MinFreeSpace(percent=None, size_bytes=size)


def parse_tags(text: str, count: int) -> list[tuple[str, ...]]:
    """Tags of `count` directories: one group goes for all, several go by position. Never an error."""
    groups = [_tag_group(group) for group in text.split(",")] if text.strip() else []
    if len(groups) == 1:
        return groups * count
    return [groups[at] if at < len(groups) else () for at in range(count)]


def _tag_group(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag for tag in (part.strip().lower() for part in text.split(":")) if tag))


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address that has none."""
    if host.startswith("[") and host.endswith("]"):
        return f"{host}:{port}"
    return f"[{host}]:{port}" if ":" in host or "%" in host else f"{host}:{port}"


# --- the address this machine is known by ----------------------------------------------------------------------------

_NLMSG_HEADER = struct.Struct("=IHHII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTATTR = struct.Struct("=HH")
_RTM_NEWADDR, _RTM_GETADDR, _NLMSG_DONE, _NLMSG_ERROR = 20, 22, 3, 2
_NLM_F_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1


def detect_host_address() -> str:
    """The first address that is not loopback, on an interface that is up: IPv4, else global IPv6, else localhost."""
    try:
        addresses = _interface_addresses()
    except OSError:
        return "localhost"
    for family in (socket.AF_INET, socket.AF_INET6):
        for _, candidate, packed in addresses:
            if candidate != family:
                continue
            text = socket.inet_ntop(family, packed)
            loopback = packed[0] == 127 if family == socket.AF_INET else packed == b"\0" * 15 + b"\1"
            link_local = family == socket.AF_INET6 and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
            if not loopback and not link_local:
                return text
    return "localhost"


def _interface_addresses() -> list[tuple[int, int, bytes]]:
    """(interface index, family, packed address) of interfaces that are up, in the order of their indexes."""
    found: list[tuple[int, int, bytes]] = []
    up = _interfaces_up()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        sock.settimeout(2)
        body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = _NLMSG_HEADER.size + len(body)
        sock.send(_NLMSG_HEADER.pack(size, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0) + body)
        while True:
            data = sock.recv(65536)
            while data:
                length, kind, _, _, _ = _NLMSG_HEADER.unpack_from(data)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _NLMSG_HEADER.size:
                    return sorted(found, key=lambda item: item[0])
                if kind == _RTM_NEWADDR:
                    entry = _parse_address(data[_NLMSG_HEADER.size : length])
                    if entry is not None and entry[0] in up:
                        found.append(entry)
                data = data[(length + 3) & ~3 :]


def _parse_address(message: bytes) -> tuple[int, int, bytes] | None:
    family, _, _, _, index = _IFADDRMSG.unpack_from(message)
    attributes: dict[int, bytes] = {}
    rest = message[_IFADDRMSG.size :]
    while len(rest) >= _RTATTR.size:
        length, kind = _RTATTR.unpack_from(rest)
        if length < _RTATTR.size:
            break
        attributes[kind] = rest[_RTATTR.size : length]
        rest = rest[(length + 3) & ~3 :]
    packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    return None if packed is None else (index, family, packed)


def _interfaces_up() -> set[int]:
    up = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for index, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sH14x", name.encode(), 0))
            except OSError:
                continue  # the interface went away meanwhile
            if struct.unpack("16sH14x", answer)[1] & _IFF_UP:
                up.add(index)
    return up
