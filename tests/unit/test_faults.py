"""Failpoints: grammar, modes, counting, and that they are off without the variable."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from pyvolume import faults


def test_off_by_default() -> None:
    assert faults.active() == ()
    faults.fault("anything")
    assert faults.hits("anything") == 0


def test_error_carries_errno_and_name() -> None:
    with faults.set_points("disk.write=error:ENOSPC"):
        faults.fault("disk.read")
        with pytest.raises(OSError, match=r"failpoint disk\.write") as caught:
            faults.fault("disk.write")
    assert caught.value.errno == errno.ENOSPC
    faults.fault("disk.write")


def test_error_by_number() -> None:
    with faults.set_points("x=error:5"), pytest.raises(OSError) as caught:
        faults.fault("x")
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("calls", "failing"),
    [("", [1, 2, 3, 4]), ("@2", [2]), ("@3+", [3, 4]), ("@1", [1])],
)
def test_which_calls_are_hit(calls: str, failing: list[int]) -> None:
    seen = []
    with faults.set_points(f"x=error:EIO{calls}"):
        for call in range(1, 5):
            try:
                faults.fault("x")
            except OSError:
                seen.append(call)
        assert faults.hits("x") == 4
    assert seen == failing


def test_count_only_counts() -> None:
    with faults.set_points("a=count, b=count"):
        for _ in range(3):
            faults.fault("a")
        assert (faults.hits("a"), faults.hits("b")) == (3, 0)
        assert faults.active() == ("a", "b")


def test_sleep_stalls() -> None:
    with faults.set_points("a=sleep:30"):
        before = time.monotonic()
        faults.fault("a")
        assert time.monotonic() - before >= 0.03


def test_points_come_back_after_a_block() -> None:
    with faults.set_points("a=count"):
        faults.fault("a")
        with faults.set_points("b=count"):
            assert faults.active() == ("b",)
        assert faults.active() == ("a",)
        assert faults.hits("a") == 1
    assert faults.active() == ()


@pytest.mark.parametrize(
    "spec",
    [
        "a",
        "=count",
        "a=nosuch",
        "a=count:1",
        "a=error",
        "a=error:ENOTANERROR",
        "a=error:errorcode",
        "a=sleep",
        "a=sleep:x",
        "a=exit:x",
        "a=count@0",
        "a=count@x",
        "a=count@",
    ],
)
def test_bad_specs_are_named(spec: str) -> None:
    with pytest.raises(ValueError, match="failpoint"):
        faults.parse(spec)


@pytest.mark.parametrize(
    ("spec", "status"), [("", 0), ("b=exit", 0), ("a=exit", faults.EXIT_STATUS), ("a=exit:7", 7), ("a=exit@2", 0)]
)
def test_the_variable_sets_points_of_a_process(spec: str, status: int) -> None:
    code = "from pyvolume.faults import fault; fault('a')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, faults.ENVIRONMENT: spec}, check=False)
    assert done.returncode == status
