"""Locks whose waits can be seen: a watchdog tells who waits, for how long, who holds, and shows all stacks.

Leaf: must not import any layer. A `WatchedLock` is a plain lock with a name. A thread that has to wait for one, or that
is inside of `waiting_for`, leaves a note in one table. The thread `lock-watch` looks there and logs what has been in it
for too long, each wait once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from pyvolume import log

_log = logging.getLogger(__name__)

LIMIT_S: Final = 30.0
"""A wait that is longer is told."""
LOOK_S: Final = 5.0
DUMP_AGAIN_S: Final = 600.0
"""Stacks are shown once in this time at most."""


@dataclass(frozen=True)
class Wait:
    """One wait under way: for what, since when (monotonic seconds), and the lock, if it is one."""

    what: str
    since_s: float
    lock: WatchedLock | None


_waits: dict[int, Wait] = {}
"""By thread. Single operations on it only, so it needs no lock."""


class WatchedLock:
    """A lock, not reentrant. `name` says in the log what it guards."""

    __slots__ = ("_holder", "_lock", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._holder = 0

    def acquire(self, blocking: bool = True) -> bool:
        """Takes the lock; False if it is taken and `blocking` is false."""
        if not self._lock.acquire(False):
            if not blocking:
                return False
            me = threading.get_ident()
            before = _waits.get(me)
            _waits[me] = Wait(self.name, time.monotonic(), self)
            try:
                self._lock.acquire()
            finally:
                _restore(me, before)
        self._holder = threading.get_ident()
        return True

    def release(self) -> None:
        """Gives the lock back. RuntimeError if nobody holds it."""
        self._holder = 0
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    @property
    def holder(self) -> str:
        """The thread that holds it, by name; empty if nobody does or the thread has ended."""
        return next((thread.name for thread in threading.enumerate() if thread.ident == self._holder), "")

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _restore(thread: int, before: Wait | None) -> None:
    if before is None:
        _waits.pop(thread, None)
    else:
        _waits[thread] = before


class waiting_for:
    """Around a call that may wait where no Python lock is seen, in the engine for instance."""

    __slots__ = ("_before", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._before: Wait | None = None

    def __enter__(self) -> None:
        me = threading.get_ident()
        self._before = _waits.get(me)
        _waits[me] = Wait(self._what, time.monotonic(), None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(threading.get_ident(), self._before)


class Watchdog:
    """Looks at the waits. `long_waits` counts those told so far, for the metrics."""

    def __init__(
        self,
        limit_s: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        stacks: Callable[[], str] = log.all_stacks,
    ) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._stacks = stacks
        self._told: set[tuple[int, float]] = set()
        self._dump_after = float("-inf")
        self.long_waits = 0

    @property
    def waiting(self) -> int:
        """Waits under way that are longer than the limit."""
        now = self._clock()
        return sum(now - wait.since_s >= self._limit_s for wait in list(_waits.values()))

    def look(self) -> None:
        """One look: each long wait is told once, with all stacks if those were not shown lately. One thread only."""
        now = self._clock()
        late = {
            (thread, wait.since_s): wait for thread, wait in list(_waits.items()) if now - wait.since_s >= self._limit_s
        }
        fresh = [key for key in late if key not in self._told]
        self._told = set(late)
        if not fresh:
            return
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for key in fresh:
            wait = late[key]
            holder = wait.lock.holder if wait.lock is not None else ""
            _log.warning(
                "thread %s has waited %.0f s for %s%s",
                names.get(key[0], str(key[0])),
                now - wait.since_s,
                wait.what,
                f", which thread {holder} holds" if holder else "",
            )
        self.long_waits += len(fresh)
        if now >= self._dump_after:
            self._dump_after = now + DUMP_AGAIN_S
            log.raw(self._stacks())

    def run(self, quit_event: threading.Event) -> None:
        """Looks every few seconds until the event is set."""
        while not quit_event.wait(min(LOOK_S, self._limit_s)):
            try:
                self.look()
            except Exception:  # the top of this thread
                _log.exception("the watchdog of waits failed")
