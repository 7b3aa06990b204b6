"""Failing disks on an untouched build: a size limit of the process, and a preloaded library that fails chosen calls.

Each case runs in a process of its own, since both reach the whole process. The C tests (csrc/test/test_vol.c) walk
through every call of longer scripts; here the wrapper, the shipped build and the real system calls are in the loop.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# fault_set(op, nth, errno, take): the nth call of a kind from now fails with errno; a write first takes `take` bytes.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, SYNC, TRUNCATE, READ, KINDS };
static struct { _Atomic long nth; int error; long take; _Atomic long calls; } plan[KINDS];

void fault_set(int op, long nth, int error, long take) {
    plan[op].error = error;
    plan[op].take = take;
    plan[op].nth = nth;
}
long fault_calls(int op) { return plan[op].calls; }

static int due(int op) {
    plan[op].calls++;
    return plan[op].nth > 0 && --plan[op].nth == 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t at) {
    if (due(WRITE)) {
        if (plan[WRITE].take > 0) {
            struct iovec part = {iov[0].iov_base, plan[WRITE].take};
            plan[WRITE].take = 0;
            plan[WRITE].nth = 1; /* the rest of it fails */
            return REAL(pwritev)(fd, &part, 1, at);
        }
        errno = plan[WRITE].error;
        return -1;
    }
    return REAL(pwritev)(fd, iov, n, at);
}
ssize_t pwritev64(int fd, const struct iovec *iov, int n, off_t at) { return pwritev(fd, iov, n, at); }
int fdatasync(int fd) { if (due(SYNC)) { errno = plan[SYNC].error; return -1; } return REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t n) {
    if (due(TRUNCATE)) { errno = plan[TRUNCATE].error; return -1; }
    return REAL(ftruncate)(fd, n);
}
int ftruncate64(int fd, off_t n) { return ftruncate(fd, n); }
ssize_t pread(int fd, void *buf, size_t n, off_t at) {
    if (due(READ)) { errno = plan[READ].error; return -1; }
    return REAL(pread)(fd, buf, n, at);
}
ssize_t pread64(int fd, void *buf, size_t n, off_t at) { return pread(fd, buf, n, at); }
"""

PRELUDE = """
import ctypes, errno, os, sys
from pathlib import Path
from pyvolume._native import engine
from pyvolume._native.engine import NativeError, OpenFlag, SuperBlockFields, Volume
from pyvolume.errors import NativeCode, NoSpace, from_native

WRITE, SYNC, TRUNCATE, READ = range(4)
C = 0xfc0044a0
here = Path(sys.argv[1])
dat, idx = here / "7.dat", here / "7.idx"

def open_volume(**more):
    return Volume.open(dat, idx, vid=7, **more)

def create():
    return open_volume(flags=OpenFlag.CREATE, superblock=SuperBlockFields(3, 0, 0, 0, 0, 0))

def fault(op, nth, error, take=0):
    shim = ctypes.CDLL(None)
    shim.fault_set(op, ctypes.c_long(nth), error, ctypes.c_long(take))

def fails(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except NativeError as exc:
        assert exc.code == code, exc
        return exc
    raise AssertionError("did not fail")

def sizes():
    return dat.stat().st_size, idx.stat().st_size
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("shim")
    source, library = directory / "shim.c", directory / "shim.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run(script: str, directory: Path, preload: Path | None = None, max_file_bytes: int = 0) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(directory)],
        env=environment,
        preexec_fn=limit if max_file_bytes else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_file_size_limit_rolls_back_and_room_heals(tmp_path: Path) -> None:
    """EFBIG comes from the kernel itself, after part of the record was written."""
    run(
        """
import resource
v = create()
v.write(1, C, b"fits")
before = sizes()
error = fails(NativeCode.ESYS, v.write, 2, C, bytes(100_000))
assert error.info.sys_errno == errno.EFBIG
assert error.info.a == before[0] == error.offset
assert sizes() == before
assert not v.stat().no_write
fails(NativeCode.ENOTFOUND, v.read, 2)
v.write(3, C, b"small ones still fit")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
v.write(2, C, bytes(100_000))
v.close()
with open_volume() as v:
    assert v.read(1).data == b"fits"
    assert v.read(2).data == bytes(100_000)
    assert v.read(3).data == b"small ones still fit"
""",
        tmp_path,
        max_file_bytes=50_000,
    )


def test_index_limit_rolls_back_both_files(tmp_path: Path) -> None:
    run(
        """
v = create()
key = 0
while True:
    try:
        v.write(key := key + 1, C, b"")
    except NativeError as exc:
        assert exc.info.sys_errno == errno.EFBIG
        break
# 32 bytes a record meet the limit before 16 bytes a row do; now let the index meet it first
assert sizes() == (v.stat().dat_bytes, v.stat().idx_bytes)
assert dat.stat().st_size == 8 + 32 * (key - 1)
v.close()
os.truncate(dat, 8)
with open(idx, "r+b") as f:
    f.truncate(0)
    while f.tell() + 16 <= 50_000:
        f.write(bytes(8) + b"\\0\\0\\0\\0\\xff\\xff\\xff\\xff")
v = open_volume()
before = sizes()
error = fails(NativeCode.ESYS, v.write, 5, C, b"no row for this")
assert error.info.d == 2 and error.info.sys_errno == errno.EFBIG
assert sizes() == before
fails(NativeCode.ENOTFOUND, v.read, 5)
""",
        tmp_path,
        max_file_bytes=50_000,
    )


@pytest.mark.parametrize("take", [0, 1, 17])
def test_full_disk(tmp_path: Path, shim: Path, take: int) -> None:
    run(
        f"""
v = create()
v.write(1, C, b"first")
before = sizes()
fault(WRITE, 1, errno.ENOSPC, {take})
error = fails(NativeCode.ESYS, v.write, 2, C, b"second")
assert error.info.sys_errno == errno.ENOSPC and error.info.d == 0
assert error.info.c == {take}
assert error.size == 4 + 6 + 1
assert isinstance(from_native(error.code, error.info, operation="write"), NoSpace)
assert sizes() == before
assert v.read(1).data == b"first"
fault(WRITE, 2, errno.ENOSPC, {take and 5})
error = fails(NativeCode.ESYS, v.delete, 1, C)
assert error.info.d == 2
assert sizes() == before
assert v.read(1).data == b"first"
fault(WRITE, 1, errno.EDQUOT, {take})
fails(NativeCode.ESYS, v.write_blob, 4, 0, bytes(32))
assert sizes() == before
v.write(2, C, b"second")
assert v.delete(1, C)[0] > 0
v.close()
with open_volume() as v:
    assert v.read(2).data == b"second"
    fails(NativeCode.EDELETED, v.read, 1)
""",
        tmp_path,
        shim,
    )


def test_cut_fails_then_works(tmp_path: Path, shim: Path) -> None:
    run(
        """
v = create()
v.write(1, C, b"first")
before = sizes()
fault(TRUNCATE, 1, errno.EIO)
fault(WRITE, 1, errno.ENOSPC, 9)
error = fails(NativeCode.ESYS, v.write, 2, C, b"second")
assert error.info.d == 8
assert sizes()[0] == before[0] + 9
assert v.stat().no_write and v.stat().no_delete
fails(NativeCode.EREADONLY, v.write, 2, C, b"second")
assert v.read(1).data == b"first"
v.set_readonly(False, False)
assert sizes() == before
v.write(2, C, b"second")
""",
        tmp_path,
        shim,
    )


def test_flush_fails(tmp_path: Path, shim: Path) -> None:
    run(
        """
v = create()
v.write(1, C, b"first")
before = sizes()
fault(SYNC, 1, errno.EIO)
error = fails(NativeCode.ESYS, v.write, 1, C, b"second", fsync=True)
assert error.info.d == 4 and error.info.sys_errno == errno.EIO
assert v.stat().eio_count == 1
assert sizes() == before
assert v.read(1).data == b"first"
assert v.stat().eio_count == 0
# what the page cache shows may be lost since: the same data to be flushed is written anew
assert not v.write(1, C, b"first", fsync=True).unchanged
assert v.write(1, C, b"first").unchanged
v.write(1, C, b"third", fsync=True)
v.close()
with open_volume() as v:
    assert v.read(1).data == b"third"
""",
        tmp_path,
        shim,
    )


def test_deleted_key_is_deleted_anew_after_a_failed_flush(tmp_path: Path, shim: Path) -> None:
    """The tombstone of a plain delete may be what the failed flush lost: to find the key deleted promises nothing."""
    run(
        """
v = create()
v.write(1, C, b"first")
v.write(2, C, b"other")
assert v.delete(1, C)[0] > 0
settled = sizes()
assert v.delete(1, C, fsync=True)[0] == -1 and sizes() == settled
fault(SYNC, 1, errno.EIO)
assert fails(NativeCode.ESYS, v.write, 2, C, b"more", fsync=True).info.d == 4
assert sizes() == settled
stat = v.stat()
assert v.delete(1, C, fsync=True) == (-1, None)
assert sizes() == (settled[0] + 32, settled[1] + 16)
assert v.delete(1, C) == (-1, None) and v.delete(9, C, fsync=True) == (-1, None)
assert sizes() == (settled[0] + 32, settled[1] + 16)
assert (v.stat().deleted_count, v.stat().deleted_bytes) == (stat.deleted_count, stat.deleted_bytes)
fails(NativeCode.EDELETED, v.read, 1)
v.close()
with open_volume() as v:
    fails(NativeCode.EDELETED, v.read, 1)
    assert v.read(2).data == b"other"
""",
        tmp_path,
        shim,
    )


def test_flushes_are_shared(tmp_path: Path, shim: Path) -> None:
    """Many threads asking for durability need fewer flushes than writes."""
    run(
        """
import threading
v = create()
shim = ctypes.CDLL(None)
shim.fault_calls.restype = ctypes.c_long
threads = [threading.Thread(target=lambda n=n: [v.write(n * 100 + i, C, b"x" * 500, fsync=True) for i in range(10)])
           for n in range(16)]
for t in threads: t.start()
for t in threads: t.join()
assert v.stat().file_count == 160
assert shim.fault_calls(SYNC) < 120, shim.fault_calls(SYNC)
""",
        tmp_path,
        shim,
    )


def test_reads_that_fail_are_counted(tmp_path: Path, shim: Path) -> None:
    run(
        """
v = create()
v.write(1, C, b"first")
for n in (1, 2, 3):
    fault(READ, 1, errno.EIO)
    assert fails(NativeCode.ESYS, v.read, 1).info.sys_errno == errno.EIO
    assert v.stat().eio_count == n
assert v.read(1).data == b"first"
assert v.stat().eio_count == 0
""",
        tmp_path,
        shim,
    )
