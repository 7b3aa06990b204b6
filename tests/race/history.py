"""A shared record of what was asked and answered for each key, against which concurrent readers judge what they see.

Every change of a key has a number; one writer at a time changes a key, so its changes have an order. A reader notes
what was acknowledged before its read and what was asked when it ended: what it saw must be the outcome of one in
between.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Refused(Exception):
    """The store says it does not serve just now: the change was not made, or nothing was read."""


class Store(Protocol):
    """What the threads run against, one for each thread."""

    def put(self, key: int, data: bytes) -> None: ...

    def delete(self, key: int) -> None: ...

    def get(self, key: int) -> bytes | None: ...


def body_of(key: int, change: int) -> bytes:
    unit = b"%d:%d;" % (key, change)
    return unit * (1 + (key * 7 + change * 13) % 60)


@dataclass
class Key:
    changes: list[bool] = field(default_factory=lambda: [False])
    """Whether the key is live after each change asked for; the first is the state before any."""
    acknowledged: int = 0

    def allows(self, number: int, data: bytes | None, floor: int, key: int) -> bool:
        live = self.changes[number]
        if number < floor:
            return False
        return data == body_of(key, number) if live else data is None


@dataclass
class History:
    """All keys of one volume, the failures met, and counters."""

    keys: dict[int, Key]
    problems: list[str] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=lambda: {"put": 0, "delete": 0, "get": 0, "refused": 0})
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, count: int) -> History:
        return cls({key: Key() for key in range(1, count + 1)})

    def judge(self, key: int, data: bytes | None, floor: int) -> None:
        """What was read must be the outcome of a change from floor on."""
        known = self.keys[key]
        if not any(known.allows(n, data, floor, key) for n in range(floor, len(known.changes))):
            self.problems.append(f"key {key} is {None if data is None else data[:30]!r}, floor {floor}")

    def change(self, store: Store, key: int, live: bool) -> None:
        known = self.keys[key]
        number = len(known.changes)
        known.changes.append(live)
        try:
            if live:
                store.put(key, body_of(key, number))
            else:
                store.delete(key)
        except Refused:
            self.done["refused"] += 1
            return
        known.acknowledged = number
        self.done["put" if live else "delete"] += 1

    def write_loop(self, open_store: Callable[[], Store], own: list[int], seed: int) -> None:
        """Changes its own keys, and reads each back at times: nobody else changes them."""

        def run(store: Store, rng: random.Random) -> None:
            key = rng.choice(own)
            live = self.keys[key].changes[self.keys[key].acknowledged]
            self.change(store, key, not (live and rng.random() < 0.3))
            if rng.random() < 0.3:
                self.read(store, rng.choice(own))

        self._loop(run, open_store, seed)

    def read_loop(self, open_store: Callable[[], Store], seed: int) -> None:
        keys = list(self.keys)
        self._loop(lambda store, rng: self.read(store, rng.choice(keys)), open_store, seed)

    def read(self, store: Store, key: int) -> None:
        floor = self.keys[key].acknowledged
        try:
            data = store.get(key)
        except Refused:
            self.done["refused"] += 1
            return
        self.judge(key, data, floor)
        self.done["get"] += 1

    def _loop(self, step: Callable[[Store, random.Random], None], open_store: Callable[[], Store], seed: int) -> None:
        rng = random.Random(seed)
        try:
            store = open_store()
            while not self.stop.is_set() and not self.problems:
                step(store, rng)
        except Exception as exc:  # a thread must not end unseen
            self.problems.append(f"{type(exc).__name__}: {exc}")

    def start(self, open_store: Callable[[], Store], writers: int, readers: int) -> list[threading.Thread]:
        keys = list(self.keys)
        threads = [
            threading.Thread(target=self.write_loop, args=(open_store, keys[i::writers], i), name=f"writer-{i}")
            for i in range(writers)
        ]
        threads += [
            threading.Thread(target=self.read_loop, args=(open_store, 1000 + i), name=f"reader-{i}")
            for i in range(readers)
        ]
        for t in threads:
            t.start()
        return threads

    def finish(self, threads: list[threading.Thread], store: Store) -> None:
        """Ends the threads, then every key must be in its last acknowledged state (or a later, refused one)."""
        self.stop.set()
        for t in threads:
            t.join(60)
            assert not t.is_alive(), f"{t.name} hangs"
        self.check(store)

    def check(self, store: Store) -> None:
        for key, known in self.keys.items():
            self.judge(key, store.get(key), known.acknowledged)
        assert self.problems == []
