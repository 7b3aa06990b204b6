"""Long jobs over all shards of a volume, cut into stretches that several threads work on. May import _native only.

One stretch is one block of checksums. While some threads wait for the disk others code. Files go past the page cache
where the file system has O_DIRECT, so that a job does not drive out what is served. A job takes WORKERS times 512 KiB
for each file it touches: at most 64 MiB.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from pyvolume._native import ec
from pyvolume._native.ec import File
from pyvolume.storage.ec.sidecar import BLOCK_BYTES

WORKERS: Final = 4

SYNCERS: Final = 4
"""Files flushed at a time: a disk works on the flushes of several files together."""

STEP_BYTES: Final = 2 << 20
"""Of each file, between two looks at whether to go on and how fast."""

_WAIT_S: Final = 0.05


class Limit(Protocol):
    """Bytes a second; storage.compact.RateLimit is one."""

    def pause_s(self, done_bytes: int) -> float: ...


Step = Callable[[int, int, list[int], mmap.mmap], None]
"""step(start, end, sums, memory): goes on with the checksums of the stretch."""


@contextlib.contextmanager
def opened(paths: Mapping[int, str], flags: int) -> Iterator[dict[int, File]]:
    """Descriptors of several files, by O_DIRECT too where that can be had. Raises OSError that names the file."""
    fds: list[int] = []
    try:
        files = {}
        for number, path in paths.items():
            fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
            fds.append(fd)
            direct = -1
            with contextlib.suppress(OSError):
                direct = os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_DIRECT | os.O_CLOEXEC)
                fds.append(direct)
            files[number] = (fd, direct)
        yield files
    finally:
        for fd in fds:
            os.close(fd)


class _Pacer:
    """Whether the workers of a job go on, and how fast."""

    def __init__(self, limit: Limit | None, bytes_per_byte: int) -> None:
        self.stop = threading.Event()
        self._limit = limit
        self._weight = bytes_per_byte
        self._lock = threading.Lock()

    def pause(self, done: int) -> None:
        if self._limit is None:
            return
        with self._lock:
            end_s = time.monotonic() + self._limit.pause_s(done * self._weight)
        self.stop.wait(max(0.0, end_s - time.monotonic()))


def run(
    total_bytes: int,
    step: Step,
    go_on: Callable[[], None],
    *,
    files: int,
    sums: int,
    limit: Limit | None = None,
    weight: int = 1,
    stretch_bytes: int = BLOCK_BYTES,
) -> list[list[int]]:
    """step for each piece of each stretch of [0, total_bytes); the checksums (`sums` of them) of each stretch in order.

    `files`: how many a step has in its memory. `weight`: bytes moved for each byte of total_bytes, for the limit. go_on
    is called meanwhile and may raise, which ends the job, as an error of a step does. Blocks until no thread is at it.
    """
    stretches = [(at, min(at + stretch_bytes, total_bytes)) for at in range(0, total_bytes, stretch_bytes)]
    results = [[0] * sums for _ in stretches]
    numbers = iter(range(len(stretches)))
    take = threading.Lock()
    pacer = _Pacer(limit, weight)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            memory = ec.scratch(files)
            while True:
                with take:
                    number = next(numbers, None)
                if number is None:
                    break
                at, end = stretches[number]
                while at < end:
                    if pacer.stop.is_set():
                        return
                    stop = min(at + STEP_BYTES, end)
                    step(at, stop, results[number], memory)
                    pacer.pause(stop - at)
                    at = stop
        except BaseException as exc:  # handed to the caller, who raises it
            ended.put(exc)
        else:
            ended.put(None)

    threads = [
        threading.Thread(target=work, name=f"ec-work_{n}", daemon=True) for n in range(min(WORKERS, len(stretches)))
    ]
    try:
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            go_on()
            try:
                failure = ended.get(timeout=_WAIT_S)
            except queue.Empty:
                continue
            if failure is not None:
                raise failure
            left -= 1
    finally:
        pacer.stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return results


def sync(files: Sequence[File], go_on: Callable[[], None]) -> None:
    """Flushes files, several at a time. Raises OSError, and what go_on raises once the flushes under way have ended."""

    def flush(file: File) -> None:
        os.fsync(file[0])
        with contextlib.suppress(OSError):
            os.posix_fadvise(file[0], 0, 0, os.POSIX_FADV_DONTNEED)

    with ThreadPoolExecutor(min(SYNCERS, max(1, len(files))), thread_name_prefix="ec-sync") as pool:
        running = [pool.submit(flush, file) for file in files]
        try:
            for future in running:
                go_on()
                future.result()
        finally:
            for future in running:
                future.cancel()
