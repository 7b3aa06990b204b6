"""Completion for shells: made from the flags, and does what it should where the shell is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pyvolume import completion, config
from pyvolume.cli import main

FLAGS = [flag.name for flag in (*config.GLOBAL_FLAGS, *config.VOLUME_FLAGS)]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_flag_and_command_is_there(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name in FLAGS:
        assert (f" {name} " if shell == "fish" else f"-{name}") in text, name
    for command in ("volume", "version", "help", "completion", *config.OFFLINE_COMMANDS):
        assert command in text
    for option in ("dry-run", "idx-dir", "index-only"):
        assert option in text


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words]) == 2
    assert capsys.readouterr().err == "usage: pyvolume completion bash|zsh|fish\n"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_shell_takes_it(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(completion.script(shell))
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ch"], ["check"]),
        (["-index", "=", "leveldbM"], ["leveldbMedium"]),
        (["-index", "mem"], ["memory"]),
        (["-readM"], ["-readMode"]),
        (["volume", "-port."], ["-port.grpc", "-port.public"]),
        (["volume", "-hasSlowRead", "=", "f"], ["false"]),
        (["fix", "--dry"], ["--dry-run"]),
        (["fix", "--port"], []),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["-dir", "{here}/da"], ["{here}/data"]),
        (["check", "{here}/da"], ["{here}/data"]),
        (["-port", "8"], []),
    ],
)
def test_what_bash_offers(typed: list[str], offered: list[str], tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "data").mkdir()
    typed = [word.replace("{here}", str(tmp_path)) for word in typed]
    code = (
        completion.script("bash")
        + 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _pyvolume; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    argv = ["bash", "--norc", "-c", code, "bash", "pyvolume", *typed]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(out) == sorted(word.replace("{here}", str(tmp_path)) for word in offered)


@pytest.mark.parametrize(
    ("line", "offered"),
    [("pyvolume -index mem", ["memory"]), ("pyvolume che", ["check"]), ("pyvolume fix --dry", ["--dry-run"])],
)
def test_what_fish_offers(line: str, offered: list[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    code = f"{completion.script('fish')}\ncomplete -C '{line}'"
    out = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True).stdout
    assert [row.split("\t")[0] for row in out.splitlines()] == offered
