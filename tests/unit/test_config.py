"""Flags: grammar, sources, defaults, lists (contract operations.md 1; departure S4)."""

from __future__ import annotations

import logging
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvolume import config
from pyvolume.config import (
    COMBINED_SET,
    GLOBAL_FLAGS,
    OUR_FLAGS,
    VOLUME_FLAGS,
    VOLUME_SET,
    ConfigFatal,
    FlagError,
    HelpAsked,
    MinFreeSpace,
    ServerConfig,
    UsageError,
    parse_args,
    parse_flags,
)

# Contract 1.5: name, default text as upstream's -h shows it (None: not shown), word for the value.
UPSTREAM_VOLUME_FLAGS: dict[str, tuple[Any, str]] = {
    "port": (8080, "int"),
    "port.grpc": (0, "int"),
    "port.public": (0, "int"),
    "ip.bind": ("", "string"),
    "id": ("", "string"),
    "publicUrl": ("", "string"),
    "master": ("localhost:9333", "string"),
    "mserver": ("", "string"),
    "dir": ("/tmp", "string"),
    "dir.idx": ("", "string"),
    "max": ("8", "string"),
    "minFreeSpace": ("", "string"),
    "minFreeSpacePercent": ("1", "string"),
    "disk": ("", "string"),
    "tags": ("", "string"),
    "dataCenter": ("", "string"),
    "rack": ("", "string"),
    "index": ("memory", "string"),
    "index.leveldbTimeout": (0, "int"),
    "readMode": ("proxy", "string"),
    "whiteList": ("", "string"),
    "fileSizeLimitMB": (256, "int"),
    "concurrentUploadLimitMB": (0, "int"),
    "concurrentDownloadLimitMB": (0, "int"),
    "inflightUploadDataTimeout": (60 * 10**9, "duration"),
    "inflightDownloadDataTimeout": (60 * 10**9, "duration"),
    "idleTimeout": (30, "int"),
    "hasSlowRead": (True, ""),
    "readBufferSizeMB": (4, "int"),
    "compactionMBps": (0, "int"),
    "maintenanceMBps": (0, "int"),
    "images.fix.orientation": (False, ""),
    "preStopSeconds": (10, "int"),
    "metricsPort": (0, "int"),
    "metricsIp": ("", "string"),
    "pprof": (False, ""),
    "cpuprofile": ("", "string"),
    "memprofile": ("", "string"),
    "debug": (False, ""),
    "debug.port": (6060, "int"),
    "volume.allowUntrustedRemoteEndpoints": (False, ""),
    "options": ("", "string"),
}
UPSTREAM_GLOBAL_FLAGS: dict[str, tuple[Any, str]] = {
    "config_dir": ("", "value"),
    "options": ("", "string"),
    "v": (0, "value"),
    "vmodule": ((), "value"),
    "logtostderr": (False, ""),
    "alsologtostderr": (True, ""),
    "stderrthreshold": (2, "value"),
    "logdir": ("", "string"),
    "log_backtrace_at": (None, "value"),
    "log_json": (False, ""),
    "log_max_size_mb": (1800, "uint"),
    "log_max_files": (5, "int"),
    "log_rotate_hours": (168, "int"),
    "log_compress": (False, ""),
}


def volume(words: Sequence[str], environ: dict[str, str] | None = None) -> dict[str, Any]:
    """Values of a `volume` call."""
    return dict(parse_flags(["volume", *words], environ or {}).values)


def usage_error(words: Sequence[str], environ: dict[str, str] | None = None) -> str:
    """First line of the message of a wrong call; checks the status."""
    with pytest.raises(UsageError) as caught:
        parse_flags(words, environ or {})
    assert caught.value.exit_code == 2
    return caught.value.text.partition("\n")[0]


# --- the tables ------------------------------------------------------------------------------------------------------


def test_the_flags_are_those_of_the_contract() -> None:
    assert {f.name for f in VOLUME_FLAGS} - {f.name for f in OUR_FLAGS} == {*UPSTREAM_VOLUME_FLAGS, "ip"}
    assert len(UPSTREAM_VOLUME_FLAGS) + 1 == 43
    assert {f.name for f in GLOBAL_FLAGS} == set(UPSTREAM_GLOBAL_FLAGS)


@pytest.mark.parametrize(("name", "expected"), UPSTREAM_VOLUME_FLAGS.items())
def test_default_of_volume_flag(name: str, expected: tuple[Any, str]) -> None:
    flag = next(f for f in VOLUME_FLAGS if f.name == name)
    assert (flag.default_value({}), flag.kind.word) == expected
    assert volume([])[name] == expected[0]


@pytest.mark.parametrize(("name", "expected"), UPSTREAM_GLOBAL_FLAGS.items())
def test_default_of_global_flag(name: str, expected: tuple[Any, str]) -> None:
    flag = next(f for f in GLOBAL_FLAGS if f.name == name)
    assert (flag.default_value({}), flag.kind.word) == expected


def test_defaults_of_our_flags() -> None:
    values = volume([])
    assert {f.name: values[f.name] for f in OUR_FLAGS} == {
        "fastLane": True,
        "fastLane.threads": 0,
        "guardPeers": False,
        "offsetBytes": 4,
        "repairOnLoad": True,
        "securityFile": "",
        "stopTimeout": 30 * 10**9,
    }


def test_every_help_text_is_there_and_says_something() -> None:
    for flag in (*GLOBAL_FLAGS, *VOLUME_FLAGS):
        assert len(flag.help) >= 10, flag.name


def test_configuration_without_flags(tmp_path: Path) -> None:
    got = parse_args(["-ip=10.1.1.1", f"-dir={tmp_path}"], {})
    assert got == ServerConfig(
        ip="10.1.1.1",
        bind_ip="10.1.1.1",
        public_url="10.1.1.1:8080",
        server_id="10.1.1.1:8080",
        metrics_ip="10.1.1.1",
        dirs=(config.DirConfig(str(tmp_path), str(tmp_path)),),
    )


# --- grammar (1.1) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["-port=1"], "port", 1),
        (["--port=1"], "port", 1),
        (["-port", "1"], "port", 1),
        (["--port", "1"], "port", 1),
        (["-id="], "id", ""),
        (["-id==x"], "id", "=x"),
        (["-rack", "-dataCenter"], "rack", "-dataCenter"),
        (["-port=1", "-port=2"], "port", 2),
        (["-port=25_083"], "port", 25083),
        (["-port=0x61fb"], "port", 0x61FB),
        (["-port=060773"], "port", 0o60773),
        (["-port=0b101"], "port", 5),
        (["-port=0o17"], "port", 15),
        (["-port=-1"], "port", -1),
        (["-port=0"], "port", 0),
        (["-port=+7"], "port", 7),
        (["-port=0x_1f"], "port", 0x1F),
        (["-debug"], "debug", True),
        *((["-hasSlowRead=" + word], "hasSlowRead", False) for word in ("0", "f", "F", "FALSE", "false", "False")),
        *((["-debug=" + word], "debug", True) for word in ("1", "t", "T", "TRUE", "true", "True")),
        (["-inflightUploadDataTimeout=300ms"], "inflightUploadDataTimeout", 300 * 10**6),
        (["-inflightUploadDataTimeout=1h30m"], "inflightUploadDataTimeout", 5400 * 10**9),
        (["-inflightUploadDataTimeout=1.5s"], "inflightUploadDataTimeout", 1_500_000_000),
        (["-inflightUploadDataTimeout=.5s"], "inflightUploadDataTimeout", 500_000_000),
        (["-inflightUploadDataTimeout=-2us"], "inflightUploadDataTimeout", -2000),
        (["-inflightUploadDataTimeout=0"], "inflightUploadDataTimeout", 0),
    ],
)
def test_values(words: list[str], name: str, value: Any) -> None:
    assert volume(words)[name] == value


# Each first line is that of the Go binary for `weed volume <words>`.
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-bogus"], "flag provided but not defined: -bogus"),
        (["--bogus=1"], "flag provided but not defined: -bogus"),
        (["-v=1"], "flag provided but not defined: -v"),
        (["-version"], "flag provided but not defined: -version"),
        (["---x"], "bad flag syntax: ---x"),
        (["-=x"], "bad flag syntax: -=x"),
        (["--=x"], "bad flag syntax: --=x"),
        (["-port"], "flag needs an argument: -port"),
        (["-port="], 'invalid value "" for flag -port: strconv.ParseInt: parsing "": invalid syntax'),
        (["-port=abc"], 'invalid value "abc" for flag -port: strconv.ParseInt: parsing "abc": invalid syntax'),
        (["-port=08"], 'invalid value "08" for flag -port: strconv.ParseInt: parsing "08": invalid syntax'),
        (["-port=1__0"], 'invalid value "1__0" for flag -port: strconv.ParseInt: parsing "1__0": invalid syntax'),
        (["-port= 1"], 'invalid value " 1" for flag -port: strconv.ParseInt: parsing " 1": invalid syntax'),
        (
            ["-port=99999999999999999999"],
            'invalid value "99999999999999999999" for flag -port: strconv.ParseInt: '
            'parsing "99999999999999999999": value out of range',
        ),
        (
            ["-debug=maybe"],
            'invalid boolean value "maybe" for -debug: strconv.ParseBool: parsing "maybe": invalid syntax',
        ),
        (["-debug="], 'invalid boolean value "" for -debug: strconv.ParseBool: parsing "": invalid syntax'),
        (
            ["-inflightUploadDataTimeout=60"],
            'invalid value "60" for flag -inflightUploadDataTimeout: time: missing unit in duration "60"',
        ),
        (
            ["-inflightUploadDataTimeout=x"],
            'invalid value "x" for flag -inflightUploadDataTimeout: time: invalid duration "x"',
        ),
        (
            ["-inflightUploadDataTimeout=1d"],
            'invalid value "1d" for flag -inflightUploadDataTimeout: time: unknown unit "d" in duration "1d"',
        ),
        (
            ["-inflightUploadDataTimeout=\u00b5"],
            'invalid value "\u00b5" for flag -inflightUploadDataTimeout: time: invalid duration "\\xc2\\xb5"',
        ),
        (["-offsetBytes=6"], 'invalid value "6" for flag -offsetBytes: the offset width is 4 or 5 bytes'),
        (["-stopTimeout=-1s"], 'invalid value "-1s" for flag -stopTimeout: must not be negative'),
        (["-fastLane.threads=-1"], 'invalid value "-1" for flag -fastLane.threads: must not be negative'),
    ],
)
def test_usage_errors_of_volume(words: list[str], line: str) -> None:
    assert usage_error(["volume", *words]) == line
    assert usage_error(["-config_dir=/x", "volume", *words]) == line
    if words != ["-v=1"]:
        assert usage_error(words) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-port=1", "volume"], "flag provided but not defined: -port"),
        (["-v=abc", "volume"], 'invalid value "abc" for flag -v: strconv.Atoi: parsing "abc": invalid syntax'),
        (
            ["-vmodule=x", "volume"],
            'invalid value "x" for flag -vmodule: syntax error: expect comma-separated list of filename=N',
        ),
        (["-vmodule=x=-1", "volume"], 'invalid value "x=-1" for flag -vmodule: negative value for vmodule level'),
        (
            ["-stderrthreshold=foo", "volume"],
            'invalid value "foo" for flag -stderrthreshold: strconv.Atoi: parsing "foo": invalid syntax',
        ),
        (
            ["-log_backtrace_at=foo", "volume"],
            'invalid value "foo" for flag -log_backtrace_at: syntax error: expect file.go:234',
        ),
        (
            ["-log_max_size_mb=-1", "volume"],
            'invalid value "-1" for flag -log_max_size_mb: strconv.ParseUint: parsing "-1": invalid syntax',
        ),
        (["nosuch"], 'weed: unknown subcommand "nosuch"'),
        (["-v=2", "no\nsuch"], 'weed: unknown subcommand "no\\nsuch"'),
        (["-options=/nonexistent/file", "volume"], ""),
        (["volume", "-options=/nonexistent/file"], ""),
    ],
)
def test_usage_errors_of_the_program(words: list[str], line: str) -> None:
    assert usage_error(words) == line


def test_usage_text_of_volume_has_upstreams_shape() -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(["volume", "-h"], {})
    lines = caught.value.text.splitlines()
    assert lines[0] == "Example: weed volume -port=8080 -dir=/tmp -max=5 -ip=server_name -master=localhost:9333"
    assert lines[1] == "Default Usage:"
    assert lines[-2] == "Description:"
    names = [line.split()[0].removeprefix("-") for line in lines if line.startswith("  -")]
    assert names == sorted(f.name for f in VOLUME_FLAGS)
    assert "  -port int" in lines and "  -debug" in lines and "  -idleTimeout int" in lines
    assert any(line.startswith("    \t") and line.endswith("(default 8080)") for line in lines)
    assert any(line.endswith('(default "localhost:9333")') for line in lines)
    assert any(line.endswith("(default 1m0s)") for line in lines)
    assert any(line.endswith("(default true)") for line in lines)


def test_help_asked_by_either_word_without_a_message() -> None:
    for words in (["volume", "-h"], ["volume", "-help"], ["volume", "--help"], ["volume", "-port=1", "-h"]):
        assert usage_error(words).startswith("Example: weed volume")
    with pytest.raises(HelpAsked):
        VOLUME_SET.parse(["-h"], {})


def test_help_without_subcommand_lists_every_flag() -> None:
    with pytest.raises(UsageError) as caught:
        parse_flags(["-h"], {})
    listed = {line.split()[0] for line in caught.value.text.splitlines() if line.startswith("  -")}
    assert listed == {f"-{f.name}" for f in (*GLOBAL_FLAGS, *VOLUME_FLAGS)}


# --- the end of the flags (1.1, S4) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pprof", "warning"),
    [
        (
            ["-hasSlowRead", "false", "-pprof"],
            False,
            'the word "false" ends the flags; not read: -pprof (a value of -hasSlowRead is written -hasSlowRead=false)',
        ),
        (["-pprof", "word"], True, 'the word "word" ends the flags (a value of -pprof is written -pprof=word)'),
        (["-pprof", "-rack=r", "word"], True, 'the word "word" ends the flags'),
        (["--", "-pprof"], False, 'the word "--" ends the flags; not read: -pprof'),
        (["-", "-pprof"], False, 'the word "-" ends the flags; not read: -pprof'),
        (["-test.v", "-pprof"], False, 'the word "-test.v" ends the flags; not read: -test.v -pprof'),
    ],
)
def test_stray_words_end_the_flags_with_a_warning(words: list[str], pprof: bool, warning: str) -> None:
    for call in (["volume", *words], ["-port=1", *words]):
        flags = parse_flags(call, {})
        assert flags.values["pprof"] is pprof
        assert flags.warnings[0] == warning


def test_no_warning_without_a_stray_word() -> None:
    assert parse_flags(["volume", "-port=1", "-rack", "false"], {}).warnings == ()


def test_no_flag_warns_that_it_does_nothing() -> None:
    for flag in (*GLOBAL_FLAGS, *VOLUME_FLAGS):
        other = {"": "true", "int": "7", "string": "x", "value": "1", "uint": "7", "duration": "7s"}[flag.kind.word]
        if flag.name in ("options", "offsetBytes", "vmodule", "log_backtrace_at"):
            continue
        if flag.name == "index":
            other = "leveldb"
        assert parse_flags([f"-{flag.name}={other}"], {}).warnings == ()


# --- forms of calls --------------------------------------------------------------------------------------------------


def test_both_kinds_of_flags_without_a_subcommand() -> None:
    flags = parse_flags(["-v=3", "--port", "25000", "-config_dir=/c", "--securityFile", "/c/security.toml"], {})
    assert flags.log.verbosity == 3
    assert flags.values["port"] == 25000
    assert flags.values["config_dir"] == "/c"
    assert flags.values["securityFile"] == "/c/security.toml"


def test_global_flags_before_the_subcommand_reach_the_configuration() -> None:
    flags = parse_flags(["-config_dir=/c", "-v=2", "-logtostderr", "volume", "-port=7"], {})
    assert (flags.values["config_dir"], flags.values["port"]) == ("/c", 7)
    assert (flags.log.verbosity, flags.log.to_stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], None),
        (["-port=1"], None),
        (["-v=1"], None),
        (["volume"], "volume"),
        (["-v", "1", "volume", "-port=1"], "volume"),
        (["-v", "volume"], None),
        (["-dir", "volume", "-port=1"], None),
        (["-dir", "volume", "-bogus"], None),
        (["-bogus", "volume"], "volume"),
        (["-port=1", "volume"], "volume"),
        (["-debug", "false", "-rack=r"], None),
        (["version"], "version"),
        (["nosuch"], "nosuch"),
        (["-v=1", "nosuch"], "nosuch"),
        (["--", "-port=1"], "-port=1"),
        (["-v=1", "--", "volume"], "volume"),
        (["-port=1", "--", "-rack=r"], None),
        (["-"], "-"),
        ([""], ""),
        (["-test.x", "volume"], "-test.x"),
        (["---x", "volume"], "volume"),
    ],
)
def test_which_form_a_call_has(words: list[str], command: str | None) -> None:
    assert config.classify(words).command == command


def test_a_call_without_any_word_shows_the_usage() -> None:
    assert usage_error([]) == ""


# --- sources (1.2, 1.3) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("PORT", "25001", "port", 25001),
        ("PORT_GRPC", "25002", "port.grpc", 25002),
        ("PORT_PUBLIC", "25003", "port.public", 25003),
        ("IP", "10.0.0.9", "ip", "10.0.0.9"),
        ("IP_BIND", "0.0.0.0", "ip.bind", "0.0.0.0"),
        ("DIR", "/x", "dir", "/x"),
        ("DIR_IDX", "/i", "dir.idx", "/i"),
        ("MAX", "5", "max", "5"),
        ("MASTER", "m:1", "master", "m:1"),
        ("MSERVER", "m:2", "mserver", "m:2"),
        ("DISK", "ssd", "disk", "ssd"),
        ("ID", "me", "id", "me"),
        ("INDEX", "leveldb", "index", "leveldb"),
        ("RACK", "r", "rack", "r"),
        ("TAGS", "a:b", "tags", "a:b"),
        ("DATACENTER", "d", "dataCenter", "d"),
        ("PUBLICURL", "u", "publicUrl", "u"),
        ("WHITELIST", "1.1.1.1", "whiteList", "1.1.1.1"),
        ("READMODE", "local", "readMode", "local"),
        ("DEBUG", "", "debug", True),
        ("DEBUG_PORT", "1", "debug.port", 1),
        ("PPROF", "1", "pprof", True),
        ("METRICSPORT", "9", "metricsPort", 9),
        ("RACK", "", "rack", ""),
        ("VOLUME_ALLOWUNTRUSTEDREMOTEENDPOINTS", "true", "volume.allowUntrustedRemoteEndpoints", True),
        ("WEED_PORT", "1", "port", 8080),
    ],
)
def test_environment_of_volume_flags_has_no_prefix(variable: str, text: str, name: str, value: Any) -> None:
    assert volume([], {variable: text})[name] == value


def test_environment_of_global_flags_has_a_prefix() -> None:
    environ = {"WEED_V": "3", "WEED_LOGTOSTDERR": "", "WEED_LOGDIR": "/l", "WEED_CONFIG_DIR": "/c", "V": "1"}
    for words in (["volume"], ["-port=1"]):
        flags = parse_flags(words, environ)
        assert (flags.log.verbosity, flags.log.to_stderr, flags.log.directory) == (3, True, "/l")
        assert flags.values["config_dir"] == "/c"


def test_empty_variable_of_a_number_is_an_error() -> None:
    line = 'invalid value "" for environment variable idleTimeout: strconv.ParseInt: parsing "": invalid syntax'
    assert usage_error(["volume"], {"IDLETIMEOUT": ""}) == line


def test_order_of_sources(tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("port=3\nport.grpc=33\nrack=file\nid=file\n")
    environ = {"PORT_GRPC": "22", "RACK": "env", "OPTIONS": str(options)}
    values = volume(["-rack=word", "-dataCenter=d"], environ)
    assert (values["rack"], values["port.grpc"], values["id"], values["port"]) == ("word", 22, "file", 3)
    assert values["max"] == "8"


def test_options_file_lines(tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text(
        "# comment\n"
        "// not a comment, but no flag either\n"
        "\n"
        "  port=25010  \n"
        "port=1\n"
        "port.grpc 25011\n"
        "idleTimeout: 7\n"
        "-rack=r1\n"
        "--dataCenter=lost\n"
        'id="quoted"\n'
        "debug\n"
        "publicUrl=http://h:1\n"
        "nosuch=1\n"
    )
    values = volume([f"-options={options}"])
    assert values["port"] == 25010
    assert values["port.grpc"] == 25011
    assert values["idleTimeout"] == 7
    assert values["rack"] == "r1"
    assert values["dataCenter"] == ""
    assert values["id"] == '"quoted"'
    assert values["debug"] is True
    assert values["publicUrl"] == "http://h:1"


def test_options_file_of_volume_is_read_for_global_flags_too(tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("v=1\nlogtostderr\nport=77\n")
    for words in (["volume", f"-options={options}"], ["volume", "-options", str(options)], [f"-options={options}"]):
        flags = parse_flags(words, {})
        assert (flags.log.verbosity, flags.log.to_stderr, flags.values["port"]) == (1, True, 77)


def test_global_options_file_sets_no_volume_flags(tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("v=1\nport=77\n")
    flags = parse_flags([f"-options={options}", "volume"], {})
    assert (flags.log.verbosity, flags.values["port"]) == (1, 8080)
    assert parse_flags(["volume"], {"WEED_OPTIONS": str(options)}).log.verbosity == 1
    assert parse_flags(["-rack=r"], {"WEED_OPTIONS": str(options)}).values["port"] == 77


def test_missing_options_file_seen_by_volume_only_is_ignored() -> None:
    assert volume(["--options=/nonexistent/f", "-port=5"])["port"] == 5
    assert volume([], {"OPTIONS": "/nonexistent/f"})["port"] == 8080


def test_missing_options_file_without_subcommand_is_named() -> None:
    line = "open /nonexistent/f: no such file or directory"
    assert usage_error(["-options=/nonexistent/f"]) == line


def test_bad_value_in_options_file(tmp_path: Path) -> None:
    options = tmp_path / "options"
    options.write_text("port=abc\n")
    line = 'invalid value "abc" for configuration variable port: strconv.ParseInt: parsing "abc": invalid syntax'
    assert usage_error(["volume", f"-options={options}"]) == line
    assert usage_error([f"-options={options}"]) == line


# --- from values to the configuration (1.5) --------------------------------------------------------------------------


def build(tmp_path: Path, *words: str) -> ServerConfig:
    return parse_args(["-ip=10.1.1.1", f"-dir={tmp_path}", *words], {})


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["-port=90"], "grpc_port", 10090),
        (["-port=90", "-port.grpc=91"], "grpc_port", 91),
        (["-port=90"], "public_port", 90),
        (["-port=90", "-port.public=92"], "public_url", "10.1.1.1:92"),
        (["-port=90", "-port.public=92"], "server_id", "10.1.1.1:90"),
        (["-publicUrl=any thing"], "public_url", "any thing"),
        (["-id= me "], "server_id", "me"),
        (["-id= "], "server_id", "10.1.1.1:8080"),
        (["-ip.bind=0.0.0.0"], "bind_ip", "0.0.0.0"),
        (["-ip.bind=0.0.0.0"], "metrics_ip", "0.0.0.0"),
        (["-ip.bind=0.0.0.0", "-metricsIp=1.2.3.4"], "metrics_ip", "1.2.3.4"),
        (["-ip=::1"], "public_url", "[::1]:8080"),
        (["-ip=[::1]"], "server_id", "[::1]:8080"),
        (["-master=a:1,,b:2.3, c:4"], "masters", ("a:1", "b:2.3", " c:4")),
        (["-master=a:1", "-mserver=b:2"], "masters", ("b:2",)),
        (["-master="], "masters", ()),
        (["-index=leveldbLarge"], "index_kind", "leveldbLarge"),
        (["-index=redb"], "index_kind", "memory"),
        (["-readMode=local"], "read_mode", "local"),
        (["-readMode=Proxy"], "read_mode", "redirect"),
        (["-whiteList=1.1.1.1, 2.2.2.2,"], "white_list", ("1.1.1.1", " 2.2.2.2", "")),
        (["-fileSizeLimitMB=1"], "file_size_limit_bytes", 1 << 20),
        (["-concurrentUploadLimitMB=2"], "upload_limit_bytes", 2 << 20),
        (["-concurrentDownloadLimitMB=2"], "download_limit_bytes", 2 << 20),
        (["-inflightUploadDataTimeout=1500ms"], "upload_wait_s", 1.5),
        (["-inflightDownloadDataTimeout=2s"], "download_wait_s", 2.0),
        (["-readBufferSizeMB=1"], "read_buffer_bytes", 1 << 20),
        (["-compactionMBps=3"], "compaction_bytes_per_s", 3 << 20),
        (["-maintenanceMBps=3"], "maintenance_bytes_per_s", 3 << 20),
        (["-stopTimeout=5s"], "stop_timeout_s", 5.0),
        (["-offsetBytes=5"], "offset_bytes", 5),
        (["-repairOnLoad=false"], "repair_on_load", False),
        (["-guardPeers"], "guard_peers", True),
        (["-fastLane=false", "-fastLane.threads=3"], "fast_lane", False),
        (["-disk=ssd"], "disk_setting", "ssd"),
    ],
)
def test_configuration_fields(tmp_path: Path, words: list[str], field: str, value: Any) -> None:
    assert getattr(build(tmp_path, *words), field) == value


def test_public_listener_only_for_another_port(tmp_path: Path) -> None:
    assert not build(tmp_path, "-port=90", "-port.public=90").has_public_listener
    assert not build(tmp_path, "-port=90").has_public_listener
    assert build(tmp_path, "-port=90", "-port.public=91").has_public_listener


def test_empty_ip_is_detected_but_metrics_listen_everywhere(tmp_path: Path) -> None:
    got = parse_args(["-ip=", f"-dir={tmp_path}"], {})
    assert got.ip_detected and got.ip == got.bind_ip == config.detect_host_address()
    assert got.metrics_ip == ""


def test_detected_address_is_one_of_this_machine() -> None:
    import socket

    address = config.detect_host_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((address, 0))


# --- lists (1.6) -----------------------------------------------------------------------------------------------------


def fatal(*words: str) -> str:
    with pytest.raises(ConfigFatal) as caught:
        parse_args(["-ip=10.1.1.1", *words], {})
    return str(caught.value)


def test_lists_of_two_directories(tmp_path: Path) -> None:
    a, b, idx = tmp_path / "a", tmp_path / "b", tmp_path / "nonexistent-idx"
    a.mkdir()
    b.mkdir()
    words = [
        f"-dir={a},{b}",
        f"-dir.idx={idx}",
        "-max=3,-1",
        "-disk=SSD,hdd",
        "-tags=A:b: a,c",
        "-minFreeSpace=5,10GiB",
    ]
    first, second = parse_args(["-ip=10.1.1.1", *words], {}).dirs
    assert (first.path, first.idx_path, first.max_volumes, first.disk_type) == (str(a), str(idx), 3, "ssd")
    assert (first.tags, first.min_free) == (("a", "b"), MinFreeSpace(percent=5.0))
    assert (second.path, second.max_volumes, second.disk_type, second.tags) == (str(b), -1, "", ("c",))
    assert second.min_free == MinFreeSpace(percent=None, size_bytes=10 << 30)


def test_one_value_goes_for_all_directories(tmp_path: Path) -> None:
    got = parse_args(["-ip=1.1.1.1", f"-dir={tmp_path},{tmp_path}", "-max=4294967297", "-disk=nvme", "-tags=x"], {})
    assert [(d.max_volumes, d.disk_type, d.tags, d.min_free.percent) for d in got.dirs] == [
        (1, "nvme", ("x",), 1.0)
    ] * 2


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("", [(), (), ()]),
        (" ", [(), (), ()]),
        ("a", [("a",)] * 3),
        ("a,b", [("a",), ("b",), ()]),
        (",b", [(), ("b",), ()]),
        ("a,b,c,d", [("a",), ("b",), ("c",)]),
        ("A: a :b::B", [("a", "b")] * 3),
    ],
)
def test_tags(text: str, groups: list[tuple[str, ...]]) -> None:
    assert config.parse_tags(text, 3) == groups


@pytest.mark.parametrize(
    ("item", "percent", "size"),
    [
        ("1", 1.0, 0),
        (" 2.5 ", 2.5, 0),
        ("0", 0.0, 0),
        ("100", 100.0, 0),
        ("1e1", 10.0, 0),
        ("1_0", 10.0, 0),
        (".5", 0.5, 0),
        ("5.", 5.0, 0),
        ("10GiB", None, 10 << 30),
        ("10gb", None, 10 * 1000**3),
        ("10 g", None, 10 * 1000**3),
        ("1ki", None, 1024),
        ("1,000kb", None, 10**6),
        ("1.5MiB", None, 3 << 19),
        ("2t", None, 2 * 1000**4),
        ("1pib", None, 1 << 50),
        ("1e", None, 10**18),
        ("101b", None, 101),
    ],
)
def test_min_free_space(item: str, percent: float | None, size: int) -> None:
    assert config.parse_min_free_space(item) == MinFreeSpace(percent, size)


@pytest.mark.parametrize("item", ["101", "50B", "-1", "x", "", "100b", "1xb", "20eb", "1.2.3gb", "1__0", "inf"])
def test_bad_min_free_space(item: str) -> None:
    text = f"The value specified in -minFreeSpace not a valid value {item}"
    with pytest.raises(ConfigFatal) as caught:
        config.parse_min_free_space(item)
    assert str(caught.value) == text
    if item:
        assert fatal(f"-minFreeSpace={item}", "-dir=/nonexistent") == text
        assert fatal(f"-minFreeSpacePercent={item}") == text


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    missing = tmp_path / "missing"
    prefix = "Check Data Folder(-dir) Writable"
    assert fatal(f"-dir={missing}") == f"{prefix} {missing} : stat {missing}: no such file or directory"
    assert fatal(f"-dir={file}") == f"{prefix} {file} : Not a valid folder!"
    assert fatal(f"-dir={locked}") == f"{prefix} {locked} : Not writable!"
    assert fatal("-dir=") == f"{prefix}  : stat : no such file or directory"
    assert fatal(f"-dir={tmp_path},") == f"{prefix}  : stat : no such file or directory"
    assert fatal(f"-dir={tmp_path}, {tmp_path}").startswith(f"{prefix}  {tmp_path} : stat  {tmp_path}: no such file")


def test_counts_that_do_not_match(tmp_path: Path) -> None:
    two = f"-dir={tmp_path},{tmp_path}"
    assert fatal(two, "-max=1,2,3") == "2 directories by -dir, but only 3 max is set by -max"
    assert (
        fatal(two, "-minFreeSpace=1,2,3")
        == "2 directories by -dir, but only 3 minFreeSpacePercent is set by -minFreeSpacePercent"
    )
    assert fatal(two, "-disk=a,b,c") == "2 directories by -dir, but only 3 disk types is set by -disk"
    assert fatal(two, "-max=x") == "The max specified in -max not a valid number x"
    assert fatal(two, "-max= 1") == "The max specified in -max not a valid number  1"
    assert fatal(two, "-max=1_0") == "The max specified in -max not a valid number 1_0"


def test_order_of_the_checks(tmp_path: Path) -> None:
    wrong = ["-minFreeSpace=x", "-dir=/nonexistent", "-max=x", "-disk=a,b,c"]
    assert "minFreeSpace" in fatal(*wrong)
    assert "/nonexistent" in fatal(*wrong[1:])
    assert "-max" in fatal(f"-dir={tmp_path}", *wrong[2:])
    assert "-disk" in fatal(f"-dir={tmp_path}", *wrong[3:])


def test_each_directory_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o755)
    with caplog.at_level(logging.INFO, "pyvolume"):
        build(tmp_path)
    assert caplog.messages == [f"Folder {tmp_path} Permission: -rwxr-xr-x"]


def test_permission_text_shows_nine_bits() -> None:
    assert config.permission_text(stat.S_IFDIR | 0o1755) == "-rwxr-xr-x"
    assert config.permission_text(0o640) == "-rw-r-----"


def test_home_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    entry = pwd.getpwuid(0)
    home = pwd.getpwuid(__import__("os").getuid()).pw_dir
    assert config.resolve_path("~") == home
    assert config.resolve_path("~/x/y") == f"{home.rstrip('/')}/x/y"
    assert config.resolve_path(f"~{entry.pw_name}/d") == f"{entry.pw_dir.rstrip('/')}/d"
    assert config.resolve_path("~nobody-like-this/d") == "~nobody-like-this/d"
    assert config.resolve_path("/a/~") == "/a/~"


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1500, "1.5\u00b5s"),
        (300 * 10**6, "300ms"),
        (60 * 10**9, "1m0s"),
        (5400 * 10**9, "1h30m0s"),
        (1_500_000_000, "1.5s"),
        (-(2 * 10**9), "-2s"),
    ],
)
def test_durations_print_as_in_go(nanoseconds: int, text: str) -> None:
    assert config.format_duration(nanoseconds) == text
    assert config.parse_duration_ns(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("abc", '"abc"'),
        ('a"b\\', '"a\\"b\\\\"'),
        ("\n\t\x01\x7f", '"\\n\\t\\x01\\x7f"'),
        ("h\u00e9\u4e16", '"h\u00e9\u4e16"'),
        ("\u200b", '"\\u200b"'),
        ("\udcff", '"\\xff"'),
    ],
)
def test_quoting_is_gos(text: str, quoted: str) -> None:
    assert config.go_quote(text) == quoted


def test_flag_sets_refuse_what_they_do_not_know() -> None:
    with pytest.raises(FlagError, match="flag provided but not defined: -logdir"):
        VOLUME_SET.parse(["-logdir=/x"], {})
    assert COMBINED_SET.parse(["-logdir=/x"], {}).values["logdir"] == "/x"
