"""Bytes in flight and the limits on them (contract http.md 5.4, departures A6), and slots for network-bound requests.

A ByteGate counts the bytes of requests that were let in. Over the limit a request waits until enough others have
ended: as a Waiter, which holds no thread, or blocking, where a worker has the request already. Must not import server
or storage.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

_GONE_POLL_S = 0.25  # how often a blocked waiter looks whether its client has left


class Verdict(Enum):
    """How a wait ended."""

    ADMITTED = 1
    TIMEOUT = 2
    GONE = 3


@dataclass(frozen=True)
class Waited:
    """`in_flight` is the count seen at the last wake-up, for the refusal's text."""

    verdict: Verdict
    in_flight: int


class Waiter:
    """A place in a queue. `admit` is called once, on the thread that made room, without a lock held; after that what
    the waiter stands for is counted in."""

    __slots__ = ("admit", "count", "left")

    def __init__(self, count: int, admit: Callable[[], None]) -> None:
        self.count = count
        self.admit = admit
        self.left = False


class _Queue:
    """Waiters in order of arrival. Those that left are skipped; all methods with the owner's lock held."""

    def __init__(self) -> None:
        self._waiting: deque[Waiter] = deque()

    def __bool__(self) -> bool:
        while self._waiting and self._waiting[0].left:
            self._waiting.popleft()
        return bool(self._waiting)

    def __len__(self) -> int:
        return sum(not waiter.left for waiter in self._waiting)

    def add(self, waiter: Waiter) -> None:
        self._waiting.append(waiter)

    def next(self) -> Waiter:
        waiter = self._waiting.popleft()
        waiter.left = True
        return waiter


class ByteGate:
    """Counts bytes in flight against a limit (0 = none). Thread-safe; holds its lock only to count."""

    def __init__(self, limit_bytes: int, timeout_s: float, max_blocked: int) -> None:
        self.limit_bytes = limit_bytes
        self.timeout_s = timeout_s
        self._max_blocked = max_blocked
        self._changed = threading.Condition(threading.Lock())
        self._in_flight = 0
        self._blocked = 0
        self._queue = _Queue()

    @property
    def in_flight(self) -> int:
        """Bytes of admitted requests that have not ended."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for room, with and without a thread."""
        with self._changed:
            return self._blocked + len(self._queue)

    def over_limit(self) -> bool:
        """True if a new request would have to wait."""
        return self.limit_bytes != 0 and self._in_flight > self.limit_bytes

    def add(self, count: int) -> None:
        """Counts bytes in, whatever the limit. Pair it with `remove`."""
        with self._changed:
            self._in_flight += count

    def remove(self, count: int) -> None:
        """Counts bytes out and lets waiters in as far as the limit goes."""
        admitted = []
        with self._changed:
            self._in_flight -= count
            while self._queue and not self.over_limit():
                waiter = self._queue.next()
                self._in_flight += waiter.count
                admitted.append(waiter)
            if self._blocked:
                self._changed.notify_all()
        for waiter in admitted:
            waiter.admit()

    def enter(self, count: int, *, exempt: bool = False) -> bool:
        """Counts `count` in if the limit permits it now (or the request is exempt). Never blocks."""
        with self._changed:
            if not exempt and self.over_limit():
                return False
            self._in_flight += count
            return True

    def queue(self, waiter: Waiter) -> bool:
        """Queues a waiter for its count. True: there was room after all and it is counted in, `admit` is not called."""
        with self._changed:
            if not self.over_limit():
                self._in_flight += waiter.count
                waiter.left = True
                return True
            self._queue.add(waiter)
            return False

    def leave(self, waiter: Waiter) -> bool:
        """Takes a waiter out. False: it was admitted already, and its bytes are counted."""
        with self._changed:
            if waiter.left:
                return False
            waiter.left = True
            return True

    def wait(self, client_gone: Callable[[], bool]) -> Waited:
        """Blocks until the count is within the limit, at most for the gate's time-out. Counts nothing in.

        Each waiter holds a thread, so beyond a bound of them a request is refused as if its time were up.
        """
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            if self.over_limit() and self._blocked >= self._max_blocked:
                return Waited(Verdict.TIMEOUT, self._in_flight)
            self._blocked += 1
            try:
                while self.over_limit():
                    seen = self._in_flight
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return Waited(Verdict.TIMEOUT, seen)
                    self._changed.wait(min(left, _GONE_POLL_S))
                    if client_gone():
                        return Waited(Verdict.GONE, seen)
                return Waited(Verdict.ADMITTED, self._in_flight)
            finally:
                self._blocked -= 1


class Slots:
    """How many requests may wait for other servers at a time.

    It is less than there are workers, so that some are always left for requests that this server answers alone: those
    that other servers wait for. Otherwise two servers that replicate to each other could wait for each other with all
    their workers.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._taken = 0
        self._queue = _Queue()

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        with self._lock:
            return len(self._queue)

    def take(self, waiter: Waiter) -> bool:
        """Takes a slot (True), or queues the waiter, whose `admit` is called when it has one."""
        with self._lock:
            if self._taken < self.limit:
                self._taken += 1
                waiter.left = True
                return True
            self._queue.add(waiter)
            return False

    def leave(self, waiter: Waiter) -> bool:
        """Takes a waiter out of the queue. False: it has a slot, which must be given back."""
        with self._lock:
            if waiter.left:
                return False
            waiter.left = True
            return True

    def give(self) -> None:
        """Gives a slot back, to the first waiter if there is one."""
        with self._lock:
            if not self._queue:
                self._taken -= 1
                return
            waiter = self._queue.next()
        waiter.admit()
