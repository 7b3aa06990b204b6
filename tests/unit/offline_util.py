"""What the tests of the offline commands share: running them, what a directory holds, what a volume answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from storage_util import load

from pyvolume import cli
from pyvolume.errors import CorruptNeedle, DiskError, NeedleNotFound, StorageError
from pyvolume.storage.volume import Volume


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `pyvolume words...`."""
    capsys.readouterr()
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as exc:
        status = int(str(exc.code))
    out, err = capsys.readouterr()
    return status, out, err


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The JSON answer; its exit code is that of the process."""
    status, out, _ = command(capsys, *words, "--json")
    said: dict[str, Any] = json.loads(out)
    assert said["exit_code"] == status
    return said


def contents(directory: Path) -> dict[str, str]:
    """Digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@contextmanager
def loaded(directory: Path, vid: int, collection: str = "") -> Iterator[Volume]:
    volume = load(directory, vid, collection, repair=False)
    try:
        yield volume
    finally:
        volume.close()


def state_of(directory: Path, vid: int, keys: range | set[int]) -> dict[int, bytes | str]:
    """What each key gives: its data, `gone` or `error`."""
    state: dict[int, bytes | str] = {}
    with loaded(directory, vid) as volume:
        for key in keys:
            try:
                state[key] = bytes(volume.read_needle(key).data or b"")
            except NeedleNotFound:
                state[key] = "gone"
            except (CorruptNeedle, DiskError, StorageError):
                state[key] = "error"
    return state
