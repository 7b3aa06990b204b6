"""Named failpoints for tests: make a chosen step fail, stall, end the process, or just count.

Leaf: imports nothing of the package. Does nothing at all unless the environment variable PYVOLUME_FAILPOINTS is set
when the module is first imported; then `fault("name")` costs one dictionary look-up, else one truth test.

    PYVOLUME_FAILPOINTS="load.volume=error:EIO; stop.flush=sleep:200@2; compact.commit=exit; write.append=count"

Points are separated by `;` or `,`. A mode is `error:<errno name or number>`, `exit[:<status>]`, `sleep:<ms>` or
`count`. `@N` restricts it to the Nth call, `@N+` to the Nth and all later calls; without it every call is hit. A test
that walks "fail the Nth call" raises N until `hits(name) < N`, which means the run got through.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENVIRONMENT = "PYVOLUME_FAILPOINTS"
EXIT_STATUS = 86
"""Status of the mode `exit` without a number: unlike any status the server uses by itself."""


@dataclass(slots=True)
class _Point:
    mode: str
    value: int
    first: int
    last: int | None
    calls: int = 0


_lock = threading.Lock()
_points: dict[str, _Point] = {}


def fault(name: str) -> None:
    """Marks a step. Raises OSError, sleeps or ends the process if the point `name` is set so; otherwise returns.

    The caller treats the OSError as it would one from the system call that follows the mark.
    """
    if not _points:
        return
    point = _points.get(name)
    if point is None:
        return
    with _lock:
        point.calls += 1
        hit = point.calls >= point.first and (point.last is None or point.calls <= point.last)
    if not hit or point.mode == "count":
        return
    if point.mode == "error":
        raise OSError(point.value, os.strerror(point.value), f"failpoint {name}")
    if point.mode == "sleep":
        time.sleep(point.value / 1000)
        return
    os._exit(point.value)


def hits(name: str) -> int:
    """How often the point `name` was passed since it was set; 0 if it is not set."""
    point = _points.get(name)
    return 0 if point is None else point.calls


def active() -> tuple[str, ...]:
    """Names of all points that are set; empty in normal operation."""
    return tuple(sorted(_points))


def configure(spec: str) -> None:
    """Replaces all points by those of `spec` (grammar above). ValueError names the part that is wrong."""
    points = parse(spec)
    with _lock:
        _points.clear()
        _points.update(points)


@contextmanager
def set_points(spec: str) -> Iterator[None]:
    """Points of `spec` for the length of a with-block; the previous ones come back afterwards."""
    with _lock:
        before = dict(_points)
    configure(spec)
    try:
        yield
    finally:
        with _lock:
            _points.clear()
            _points.update(before)


def parse(spec: str) -> dict[str, _Point]:
    """Reads the grammar of the module's text."""
    points: dict[str, _Point] = {}
    for part in spec.replace(";", ",").split(","):
        item = part.strip()
        if not item:
            continue
        name, equals, rule = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"failpoint {item!r}: expected name=mode")
        rule, at, calls = rule.strip().partition("@")
        first, last = _parse_calls(item, calls) if at else (1, None)
        mode, _, argument = rule.partition(":")
        points[name.strip()] = _Point(mode, _parse_argument(item, mode, argument), first, last)
    return points


def _parse_calls(item: str, text: str) -> tuple[int, int | None]:
    digits = text.removesuffix("+")
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"failpoint {item!r}: expected @N or @N+ with N of 1 or more")
    return int(digits), None if text.endswith("+") else int(digits)


def _parse_argument(item: str, mode: str, argument: str) -> int:
    if mode == "error":
        if argument.isdecimal():
            return int(argument)
        value = getattr(errno, argument, None) if argument.startswith("E") else None
        if not isinstance(value, int):
            raise ValueError(f"failpoint {item!r}: unknown errno {argument!r}")
        return value
    if mode == "sleep":
        if not argument.isdecimal():
            raise ValueError(f"failpoint {item!r}: sleep needs milliseconds")
        return int(argument)
    if mode == "exit":
        if argument and not argument.isdecimal():
            raise ValueError(f"failpoint {item!r}: exit takes a status number")
        return int(argument) if argument else EXIT_STATUS
    if mode == "count" and not argument:
        return 0
    raise ValueError(f"failpoint {item!r}: unknown mode {mode!r}")


if os.environ.get(ENVIRONMENT):
    configure(os.environ[ENVIRONMENT])
