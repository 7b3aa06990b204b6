"""Bytes in flight and the limits on them (contract http.md 5.4, departures A6).

A ByteGate counts the bytes of requests that were let in. Over the limit a request waits until enough others have
ended, at most `timeout_s`; the number of waiters is bounded, since each holds a worker thread. Must not import server
or storage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

_GONE_POLL_S = 0.25  # how often a waiter looks whether its client has left


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


class ByteGate:
    """Counts bytes in flight against a limit (0 = none). Thread-safe; holds its lock only to count."""

    def __init__(self, limit_bytes: int, timeout_s: float, max_waiters: int) -> None:
        self.limit_bytes = limit_bytes
        self.timeout_s = timeout_s
        self._max_waiters = max_waiters
        self._changed = threading.Condition(threading.Lock())
        self._in_flight = 0
        self._waiters = 0

    @property
    def in_flight(self) -> int:
        """Bytes of admitted requests that have not ended."""
        return self._in_flight

    def over_limit(self) -> bool:
        """True if a new request would have to wait."""
        return self.limit_bytes != 0 and self._in_flight > self.limit_bytes

    def add(self, count: int) -> None:
        """Counts bytes in, whatever the limit. Pair it with `remove`."""
        with self._changed:
            self._in_flight += count

    def remove(self, count: int) -> None:
        """Counts bytes out and wakes the waiters."""
        with self._changed:
            self._in_flight -= count
            if self._waiters:
                self._changed.notify_all()

    def try_enter(self, count: int, *, exempt: bool = False) -> bool:
        """Counts `count` in if the limit permits it now (or the request is exempt). Never blocks."""
        with self._changed:
            if not exempt and self.limit_bytes and self._in_flight > self.limit_bytes:
                return False
            self._in_flight += count
            return True

    def wait(self, client_gone: Callable[[], bool], *, count: int = 0, deadline_s: float | None = None) -> Waited:
        """Blocks until the count is within the limit; then counts `count` in, in the same step.

        deadline_s is a time.monotonic() value; without it the gate's own timeout runs from now. A request that finds
        as many others waiting as the bound allows is refused at once, as if its time were up.
        """
        deadline = time.monotonic() + self.timeout_s if deadline_s is None else deadline_s
        with self._changed:
            if self._in_flight > self.limit_bytes and self._waiters >= self._max_waiters:
                return Waited(Verdict.TIMEOUT, self._in_flight)
            self._waiters += 1
            try:
                while self.limit_bytes and self._in_flight > self.limit_bytes:
                    seen = self._in_flight
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return Waited(Verdict.TIMEOUT, seen)
                    self._changed.wait(min(left, _GONE_POLL_S))
                    if client_gone():
                        return Waited(Verdict.GONE, seen)
                self._in_flight += count
                return Waited(Verdict.ADMITTED, self._in_flight)
            finally:
                self._waiters -= 1
