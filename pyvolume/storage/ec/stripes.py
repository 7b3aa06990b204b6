"""Long jobs over all shards of a volume, cut into stretches that several threads work on. May import _native only.

One stretch is one block of checksums, so each gives one checksum for each shard. While a thread waits for the disk
another codes. A job takes WORKERS times 256 KiB for each shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

from pyvolume.storage.ec.sidecar import BLOCK_BYTES

WORKERS: Final = 2

SYNCERS: Final = 4
"""Files flushed at a time: a disk works on the flushes of several files together."""

T = TypeVar("T")


def run(total_bytes: int, work: Callable[[int, int], T], go_on: Callable[[], None]) -> Sequence[T]:
    """work(start, end) for each stretch of [0, total_bytes); the results in order.

    go_on is called between stretches and may raise, which ends the job, as an error of work does. Blocks until no
    thread is at it any more.
    """
    stretches = [(at, min(at + BLOCK_BYTES, total_bytes)) for at in range(0, total_bytes, BLOCK_BYTES)]
    results: dict[int, T] = {}
    with ThreadPoolExecutor(min(WORKERS, max(1, len(stretches))), thread_name_prefix="ec-work") as pool:
        running: dict[Future[T], int] = {}
        waiting = list(enumerate(stretches))[::-1]
        try:
            while waiting or running:
                go_on()
                while waiting and len(running) < WORKERS:
                    number, (start, end) = waiting.pop()
                    running[pool.submit(work, start, end)] = number
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)] = future.result()
        finally:
            for future in running:
                future.cancel()
    return [results[number] for number in range(len(stretches))]


def sync(fds: Sequence[int], go_on: Callable[[], None]) -> None:
    """Flushes files, several at a time. Raises OSError, and what go_on raises once the flushes under way have ended."""
    with ThreadPoolExecutor(min(SYNCERS, max(1, len(fds))), thread_name_prefix="ec-sync") as pool:
        running = [pool.submit(os.fsync, fd) for fd in fds]
        try:
            for future in running:
                go_on()
                future.result()
        finally:
            for future in running:
                future.cancel()
