"""The exception tree and the texts that engine codes become."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvolume import errors
from pyvolume.errors import NativeCode, from_native


@dataclass
class Info:
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    sys_errno: int = 0


U64 = (1 << 64) - 1


@pytest.mark.parametrize(
    ("code", "info", "cls", "text"),
    [
        (NativeCode.ENOTFOUND, Info(), errors.NeedleNotFound, "not found"),
        (NativeCode.EDELETED, Info(a=20), errors.NeedleDeleted, "already deleted"),
        (NativeCode.ECOOKIE, Info(a=0xDEADBEE0, b=1), errors.CookieMismatch, "mismatching cookie deadbee0"),
        (NativeCode.ECOOKIE, Info(a=0xAB), errors.CookieMismatch, "mismatching cookie ab"),
        (NativeCode.EEOF, Info(a=8), errors.CorruptNeedle, "EOF"),
        (
            NativeCode.ECRC,
            Info(a=1, b=0x9A71BB4C, c=0x1F),
            errors.CrcMismatch,
            "invalid CRC for needle 1f (got 00000001, want 9a71bb4c), data on disk corrupted: needle data corrupted",
        ),
        (NativeCode.ESIZE, Info(a=8, b=1, c=2, d=3), errors.SizeMismatch, "size mismatch"),
        (
            NativeCode.ESIZE,
            Info(a=1 << 35, b=1, c=0xFFFFFFFF, d=3),
            errors.SizeMismatch,
            "size mismatch: entry not found: offset 34359738368 found id 31 size -1, expected size 3",
        ),
        (NativeCode.ECORRUPT, Info(a=5), errors.CorruptNeedle, "index out of range 5: needle data corrupted"),
        (
            NativeCode.EMETA,
            Info(a=U64 - 99, b=7, c=1200000, d=8),
            errors.CorruptNeedle,
            "invalid needle meta size -100: DataSize=7, size=1200000, offset=8",
        ),
        (NativeCode.EID, Info(a=0x10, b=0x2F, c=8), errors.CorruptNeedle, "index key 2f does not match needle's Id 10"),
        (NativeCode.EVERSION, Info(a=9), errors.StorageError, "unsupported version: 9"),
        (NativeCode.ECLOSED, Info(), errors.VolumeClosed, "volume 3 is closed"),
        (NativeCode.EREADONLY, Info(), errors.VolumeReadOnly, "volume 3 is read only"),
        (
            NativeCode.EFULL,
            Info(a=1 << 35, b=1 << 35),
            errors.VolumeFull,
            "Volume Size 34359738368 Exceeded 34359738368",
        ),
        (
            NativeCode.EALIGN,
            Info(a=33),
            errors.VolumeLoadError,
            "index file's size is 33 bytes, maybe corrupted",
        ),
        (NativeCode.ESTALE, Info(), errors.VolumeMoved, "volume 3 is compacted"),
        (NativeCode.EEXISTS, Info(), errors.VolumeExists, "Volume Id 3 already exists!"),
        (NativeCode.ENOMEM, Info(), errors.StorageError, "cannot allocate memory"),
        (
            NativeCode.ESYS,
            Info(a=8, b=48, sys_errno=errno.EIO),
            errors.DiskError,
            "read /d/3.dat: input/output error",
        ),
    ],
)
def test_texts(code: NativeCode, info: Info, cls: type[errors.StorageError], text: str) -> None:
    error = from_native(code, info, vid=3, path="/d/3.dat")
    assert type(error) is cls
    assert str(error) == text


def test_corrupt_errors_say_where() -> None:
    error = from_native(NativeCode.ESIZE, Info(a=4096, b=1, c=2, d=3), path="/d/3.dat")
    assert isinstance(error, errors.CorruptNeedle)
    assert (error.path, error.offset) == ("/d/3.dat", 4096)
    wide = from_native(NativeCode.ESIZE, Info(a=8, b=0x1A, c=2, d=3), offset_width=5)
    assert str(wide) == "size mismatch: entry not found: offset 8 found id 3161 size 2, expected size 3"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_its_own_class(number: int) -> None:
    error = from_native(NativeCode.ESYS, Info(sys_errno=number), path="/d/3.dat", operation="write")
    assert isinstance(error, errors.NoSpace)
    assert error.errno == number
    assert str(error) == f"write /d/3.dat: {errors.errno_text(number)}"


def test_errno_texts_are_gos() -> None:
    assert errors.errno_text(errno.ENOSPC) == "no space left on device"
    assert errors.errno_text(errno.EIO) == "input/output error"
    assert errors.errno_text(errno.ENOENT) == "no such file or directory"
    assert errors.errno_text(errno.EROFS) == "read-only file system"


def test_os_errors_are_wrapped_with_errno() -> None:
    try:
        Path("/nonexistent/3.dat").read_bytes()
    except OSError as exc:
        error = errors.from_os_error(exc, "open")
    assert type(error) is errors.DiskError
    assert error.errno == errno.ENOENT
    assert error.path == "/nonexistent/3.dat"
    assert str(error) == "open /nonexistent/3.dat: no such file or directory"
    assert isinstance(errors.from_os_error(OSError(errno.ENOSPC, "x"), "write", "/d/3.dat"), errors.NoSpace)
    assert str(errors.from_os_error(OSError("odd"), "read", "/d")) == "read /d: odd"


def test_unknown_codes_are_not_swallowed() -> None:
    error = from_native(-1999, Info(a=1, b=2))
    assert type(error) is errors.StorageError
    assert "-1999" in str(error)
    assert "EINVAL" in str(from_native(NativeCode.EINVAL, None, key=0x1F)) and "1f" in str(
        from_native(NativeCode.EINVAL, None, key=0x1F)
    )


def test_codes_are_those_of_the_header() -> None:
    header = (Path(__file__).resolve().parents[2] / "csrc" / "pv.h").read_text()
    body = re.search(r"enum pv_err \{(.*?)\};", header, re.S)
    assert body is not None
    declared = {name: int(value) for name, value in re.findall(r"PV_(\w+) = (-?\d+)", body.group(1))}
    assert declared == {code.name: code.value for code in NativeCode}


def test_every_code_has_a_text_of_its_own() -> None:
    for code in NativeCode:
        if code is not NativeCode.OK:
            assert not str(from_native(code, Info())).startswith("engine error"), code
