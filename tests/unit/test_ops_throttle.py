"""Byte limits and slots: who waits, who is let in, that nothing is lost when somebody leaves."""

from __future__ import annotations

import threading
import time

from pyvolume.ops.context import Helpers
from pyvolume.ops.throttle import ByteGate, Slots, Verdict, Waiter


def test_one_request_may_exceed_the_limit_alone() -> None:
    gate = ByteGate(100, 1.0, 4)
    assert gate.enter(1000)
    assert gate.over_limit()
    assert not gate.enter(1)
    assert gate.enter(5, exempt=True)
    gate.remove(5)
    gate.remove(1000)
    assert gate.in_flight == 0


def test_no_limit_counts_all_the_same() -> None:
    gate = ByteGate(0, 1.0, 4)
    assert gate.enter(1 << 40)
    assert not gate.over_limit()
    assert gate.in_flight == 1 << 40


def test_at_the_limit_is_not_over_it() -> None:
    gate = ByteGate(100, 1.0, 4)
    gate.add(100)
    assert gate.enter(50)


def test_waiters_are_admitted_in_order_and_counted() -> None:
    gate = ByteGate(100, 1.0, 4)
    gate.add(150)
    order: list[str] = []
    first = Waiter(120, lambda: order.append("first"))
    second = Waiter(10, lambda: order.append("second"))
    assert not gate.queue(first)
    assert not gate.queue(second)
    gate.remove(150)
    assert order == ["first"], "the first alone is over the limit again"
    assert gate.in_flight == 120
    gate.remove(120)
    assert order == ["first", "second"]
    assert gate.in_flight == 10


def test_who_left_is_skipped_and_who_was_admitted_cannot_leave() -> None:
    gate = ByteGate(100, 1.0, 4)
    gate.add(150)
    order: list[str] = []
    gone = Waiter(1, lambda: order.append("gone"))
    stays = Waiter(1, lambda: order.append("stays"))
    gate.queue(gone)
    gate.queue(stays)
    assert gate.leave(gone)
    assert not gate.leave(gone)
    gate.remove(150)
    assert order == ["stays"]
    assert not gate.leave(stays)


def test_queue_lets_in_when_there_is_room_after_all() -> None:
    gate = ByteGate(100, 1.0, 4)
    waiter = Waiter(7, lambda: None)
    assert gate.queue(waiter)
    assert gate.in_flight == 7
    assert not gate.leave(waiter)


def test_blocking_wait_ends_when_there_is_room() -> None:
    gate = ByteGate(100, 30.0, 4)
    gate.add(150)
    threading.Timer(0.05, gate.remove, (150,)).start()
    waited = gate.wait(lambda: False)
    assert waited.verdict is Verdict.ADMITTED


def test_blocking_wait_times_out_with_the_count_seen() -> None:
    gate = ByteGate(100, 0.02, 4)
    gate.add(150)
    waited = gate.wait(lambda: False)
    assert (waited.verdict, waited.in_flight) == (Verdict.TIMEOUT, 150)


def test_blocking_wait_ends_when_the_client_has_gone() -> None:
    gate = ByteGate(100, 30.0, 4)
    gate.add(150)
    assert gate.wait(lambda: True).verdict is Verdict.GONE


def test_too_many_blocked_are_refused_at_once() -> None:
    gate = ByteGate(100, 30.0, 0)
    gate.add(150)
    started = time.monotonic()
    assert gate.wait(lambda: False).verdict is Verdict.TIMEOUT
    assert time.monotonic() - started < 5


def test_slots_are_handed_on() -> None:
    slots = Slots(1)
    assert slots.take(Waiter(1, lambda: None))
    got: list[int] = []
    left = Waiter(1, lambda: got.append(1))
    next_one = Waiter(1, lambda: got.append(2))
    assert not slots.take(left)
    assert not slots.take(next_one)
    assert slots.leave(left)
    slots.give()
    assert got == [2]
    assert slots.taken == 1
    slots.give()
    assert slots.taken == 0
    assert slots.take(Waiter(1, lambda: None))


def test_counts_survive_many_threads() -> None:
    gate = ByteGate(50, 30.0, 100)

    def work() -> None:
        for _ in range(200):
            admitted = threading.Event()
            if not gate.queue(Waiter(20, admitted.set)):
                assert admitted.wait(20)
            gate.remove(20)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert gate.in_flight == 0


def test_helpers_run_what_they_are_given_on_a_bounded_number_of_threads() -> None:
    helpers = Helpers(3)
    together = threading.Barrier(3)
    names = [helpers.submit(lambda: (together.wait(10), threading.current_thread().name)[1]) for _ in range(3)]
    assert {future.result(10) for future in names} == {"fan-out-1", "fan-out-2", "fan-out-3"}
    more = [helpers.submit(lambda: threading.current_thread().name) for _ in range(20)]
    assert {future.result(10) for future in more} <= {"fan-out-1", "fan-out-2", "fan-out-3"}
    failing = helpers.submit(lambda: 1 // 0)
    assert isinstance(failing.exception(10), ZeroDivisionError)
    assert helpers.submit(lambda: 5).result(10) == 5
    helpers.close()


def test_helpers_skip_what_was_cancelled() -> None:
    helpers = Helpers(1)
    hold = threading.Event()
    first = helpers.submit(lambda: hold.wait(10))
    ran: list[int] = []
    second = helpers.submit(lambda: ran.append(1))
    assert second.cancel()
    hold.set()
    assert first.result(10)
    assert helpers.submit(lambda: ran).result(10) == []
    helpers.close()
