"""Waits for locks are seen and told with stacks, by name of who waits and who holds."""

from __future__ import annotations

import threading
import time

import pytest
from test_lifecycle import wait_for

from pyvolume import lockwatch
from pyvolume.lockwatch import Watchdog, WatchedLock, waiting_for


def test_it_is_a_lock() -> None:
    lock = WatchedLock("it")
    with lock:
        assert lock.locked()
        assert not lock.acquire(blocking=False)
        assert lock.holder == threading.current_thread().name
    assert not lock.locked() and lock.holder == ""
    counted = 0

    def count() -> None:
        nonlocal counted
        for _ in range(2000):
            with lock:
                before = counted
                time.sleep(0)
                counted = before + 1

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted == 6000
    assert not lockwatch._waits


def test_a_long_wait_is_told_once_with_stacks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(lockwatch.log, "raw", shown.append)
    lock = WatchedLock("the state of volume 7")
    late = time.monotonic() + 31
    dog = Watchdog(clock=lambda: late)
    with lock:
        waiter = threading.Thread(target=lock.acquire, name="waiter")
        waiter.start()
        wait_for(lambda: bool(lockwatch._waits), "the wait")
        assert Watchdog().waiting == 0, "not long yet"
        assert dog.waiting == 1
        with caplog.at_level("WARNING"):
            for _ in range(3):
                dog.look()
    waiter.join()
    assert len(caplog.messages) == 1
    assert "thread waiter has waited 3" in caplog.messages[0]
    assert "for the state of volume 7, which thread MainThread holds" in caplog.messages[0]
    assert len(shown) == 1 and 'thread "waiter"' in shown[0] and "lockwatch.py" in shown[0]
    assert dog.long_waits == 1 and dog.waiting == 0


def test_stacks_are_not_shown_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(lockwatch.log, "raw", shown.append)
    now = [time.monotonic() + 100]
    dog = Watchdog(clock=lambda: now[0])
    for _ in range(3):
        with waiting_for("an append to volume 3"):
            dog.look()
        now[0] += lockwatch.DUMP_AGAIN_S / 2.5
    assert dog.long_waits == 3
    assert len(shown) == 1
    with waiting_for("an append to volume 3"):
        dog.look()
    assert len(shown) == 2


def test_a_wait_inside_of_another_gives_its_place_back() -> None:
    with waiting_for("outer"):
        with waiting_for("inner"):
            assert [wait.what for wait in lockwatch._waits.values()] == ["inner"]
        assert [wait.what for wait in lockwatch._waits.values()] == ["outer"]
    assert not lockwatch._waits
