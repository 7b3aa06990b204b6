"""The command: exit codes, texts and streams, as a process (contract operations.md 1, 6.4)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pyvolume import cli, config, version

ROOT = Path(__file__).parents[2]
COMPATIBILITY = ROOT / "docs" / "COMPATIBILITY.md"
ALL_FLAGS = sorted({flag.name for flag in (*config.GLOBAL_FLAGS, *config.VOLUME_FLAGS)})


EXAMPLE = "Example: weed volume -port=8080 -dir=/tmp -max=5 -ip=server_name -master=localhost:9333"


def pyvolume(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environ}
    return subprocess.run(
        [sys.executable, "-m", "pyvolume", *words], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )


# Status and first line of standard error are those of `weed <words>`; nothing goes to standard output.
@pytest.mark.parametrize(
    ("words", "environ", "line"),
    [
        (["volume", "-bogus"], {}, "flag provided but not defined: -bogus"),
        (["volume", "-port"], {}, "flag needs an argument: -port"),
        (
            ["volume", "-port=abc"],
            {},
            'invalid value "abc" for flag -port: strconv.ParseInt: parsing "abc": invalid syntax',
        ),
        (
            ["volume"],
            {"IDLETIMEOUT": ""},
            'invalid value "" for environment variable idleTimeout: strconv.ParseInt: parsing "": invalid syntax',
        ),
        (["volume", "-v=1"], {}, "flag provided but not defined: -v"),
        (["-port=1", "volume"], {}, "flag provided but not defined: -port"),
        (["-version"], {}, "flag provided but not defined: -version"),
        (["nosuch"], {}, 'weed: unknown subcommand "nosuch"'),
        (["volume", "-h"], {}, EXAMPLE),
        (["help", "volume", "extra"], {}, "usage: weed help command"),
        (["help", "nosuch"], {}, "Unknown help topic `nosuch`.  Run 'weed help'."),
        (["version", "extra"], {}, "Example: weed version"),
        (["version", "-x"], {}, "flag provided but not defined: -x"),
        (["-", "x"], {}, 'weed: unknown subcommand "-"'),
    ],
)
def test_usage_errors(words: list[str], environ: dict[str, str], line: str) -> None:
    done = pyvolume(*words, **environ)
    assert (done.returncode, done.stdout, done.stderr.partition("\n")[0]) == (2, "", line)


def test_unknown_subcommand_is_two_lines() -> None:
    assert pyvolume("nosuch").stderr == "weed: unknown subcommand \"nosuch\"\nRun 'weed help' for usage.\n"


def test_missing_options_file_gives_no_output() -> None:
    done = pyvolume("volume", "-options=/nonexistent/f")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_version() -> None:
    done = pyvolume("version")
    assert done.returncode == 0
    assert re.fullmatch(r"version 30GB 4\.44  linux (amd64|arm64)\n", done.stdout)
    assert done.stderr == f"pyvolume {version.PYVOLUME_VERSION}\n"


def test_version_numbers_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == version.PYVOLUME_VERSION
    assert version.SERVER_HEADER == "SeaweedFS Volume 30GB 4.44"
    assert version.server_header(5) == "SeaweedFS Volume 8000GB 4.44"
    assert version.full_version(4) == "30GB 4.44 "
    with pytest.raises(ValueError, match="4 or 5"):
        version.size_tag(6)


def test_help_goes_to_standard_output() -> None:
    done = pyvolume("help")
    assert done.returncode == 0 and "volume      start a volume server" in done.stdout and not done.stderr
    done = pyvolume("help", "volume")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: pyvolume volume -port=8080")
    assert done.stderr.startswith("Default Parameters:\n  -compactionMBps int\n")


def test_help_without_a_command_shows_both_kinds_of_flags() -> None:
    done = pyvolume("-h")
    assert done.returncode == 2 and not done.stdout
    listed = sorted({line.split()[0][1:] for line in done.stderr.splitlines() if line.startswith("  -")})
    assert listed == ALL_FLAGS


def test_no_words_at_all_shows_the_usage() -> None:
    done = pyvolume()
    assert done.returncode == 2 and not done.stdout and "The commands are:" in done.stderr


def fatal_line(done: subprocess.CompletedProcess[str]) -> str:
    found = [line for line in done.stderr.splitlines() if line.startswith("F")]
    assert len(found) == 1, done.stderr
    return found[0].split(" ", 3)[3]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-dir=/nonexistent/d"], "/nonexistent/d : stat /nonexistent/d: no such file or directory"),
        (["-max=x"], "The max specified in -max not a valid number x"),
        (["-minFreeSpace=101"], "The value specified in -minFreeSpace not a valid value 101"),
        (["-disk=a,b"], "1 directories by -dir, but only 2 disk types is set by -disk"),
    ],
)
def test_flags_that_cannot_be_served_are_fatal(tmp_path: Path, words: list[str], text: str) -> None:
    done = pyvolume("-logtostderr", "-ip=127.0.0.1", f"-dir={tmp_path}", *words)
    assert done.returncode == 255
    assert fatal_line(done).endswith(text)


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        ('[https.volume]\ncert = "c"\n', "https.volume.cert in "),
        ('[guard]\nwhite_list = "nonsense"\n', "guard.white_list in "),
    ],
)
def test_security_settings_that_cannot_be_honoured_refuse_the_start(tmp_path: Path, toml: str, text: str) -> None:
    (tmp_path / "security.toml").write_text(toml)
    done = pyvolume(f"-config_dir={tmp_path}", "-logtostderr", "volume", "-ip=127.0.0.1", f"-dir={tmp_path}")
    assert done.returncode == 1
    assert text in fatal_line(done) and str(tmp_path / "security.toml") in fatal_line(done)
    done = pyvolume("-logtostderr", "-ip=127.0.0.1", f"-dir={tmp_path}", "--securityFile", f"{tmp_path}/security.toml")
    assert done.returncode == 1


def test_missing_security_file_refuses_the_start(tmp_path: Path) -> None:
    done = pyvolume("-logtostderr", "-ip=127.0.0.1", f"-dir={tmp_path}", "-securityFile=/nonexistent/s.toml")
    assert done.returncode == 1
    reason = "-securityFile /nonexistent/s.toml: open /nonexistent/s.toml: no such file or directory"
    assert fatal_line(done).endswith(reason)


def test_stray_word_is_named_in_the_log(tmp_path: Path) -> None:
    done = pyvolume("-logtostderr", "-dir=/nonexistent/d", "-hasSlowRead", "false", "-pprof")
    assert done.returncode == 255
    warnings = [line for line in done.stderr.splitlines() if line.startswith("W")]
    assert len(warnings) == 1 and 'the word "false" ends the flags; not read: -pprof' in warnings[0]


# --- documents -------------------------------------------------------------------------------------------------------


def rows_of_flags() -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for line in COMPATIBILITY.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `-") and len(cells) >= 3:
            rows[cells[0].strip("`").removeprefix("-")] = cells
    return rows


@pytest.mark.parametrize("name", ALL_FLAGS)
def test_each_flag_is_in_the_compatibility_table(name: str) -> None:
    assert rows_of_flags()[name][1].split()[0].rstrip(":;") in ("works", "differs")


def test_compatibility_table_names_no_other_flags() -> None:
    assert sorted(rows_of_flags()) == ALL_FLAGS


def test_compatibility_table_names_tests_that_exist() -> None:
    for name, row in rows_of_flags().items():
        for reference in re.findall(r"`([^`]+\.py)(?:::(\w+))?`", row[2]):
            path = ROOT / "tests" / reference[0]
            assert path.is_file(), f"-{name}: {reference[0]}"
            if reference[1]:
                assert f"def {reference[1]}(" in path.read_text(), f"-{name}: {reference[1]}"
        assert row[2], f"-{name} names no test"


def test_manual_page_has_every_flag() -> None:
    text = cli.manpage_parser().format_help()
    assert all(re.search(rf"^\s+-{re.escape(name)}\b", text, re.MULTILINE) for name in ALL_FLAGS)
