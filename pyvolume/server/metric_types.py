"""Counters, gauges and histograms, and the two formats in which they leave: Prometheus text and delimited protobuf.

Knows nothing of the server; imports nothing of the package. prometheus-client is not used: it appends `_total` to every
counter, which upstream does not, and writes numbers in Python's way, and dashboards and
tests compare names and numbers.
"""

from __future__ import annotations

import bisect
import math
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]

_KIND_NUMBERS: Final[dict[str, int]] = {"counter": 0, "gauge": 1, "histogram": 4}
_PLAIN_LIMIT = 1_000_000
"""Go's %g turns to the exponent from here on."""
_LEAST_PLAIN_EXPONENT = -4


def exponential_buckets(start: float, factor: float, count: int) -> tuple[float, ...]:
    """Upper bounds as Go computes them: each the one before times the factor."""
    bounds = [start]
    while len(bounds) < count:
        bounds.append(bounds[-1] * factor)
    return tuple(bounds)


# ------------------------------------------------------------------------------------------------------------ children


class Value:
    """One series of a counter or gauge. Thread-safe."""

    __slots__ = ("_lock", "created_s", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value: float = 0
        self.created_s = time.time()

    def inc(self, amount: float = 1) -> None:
        with self._lock:
            self.value += amount

    def dec(self) -> None:
        with self._lock:
            self.value -= 1

    def set(self, value: float) -> None:
        self.value = value


class Distribution:
    """One series of a histogram. Thread-safe."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum", "created_s")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._lock = threading.Lock()
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum: float = 0
        self.created_s = time.time()

    def observe(self, value: float) -> None:
        place = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += 1
            self._sum += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Many observations at once, counted elsewhere by the same bounds: one number per bound, and one for above."""
        if len(counts) != len(self._counts):
            raise ValueError("other bounds")
        with self._lock:
            self._counts = [mine + more for mine, more in zip(self._counts, counts, strict=True)]
            self._sum += total

    def read(self) -> tuple[list[int], float]:
        """(cumulative counts of the bounds and of infinity, sum) of one moment."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        for place in range(1, len(counts)):
            counts[place] += counts[place - 1]
        return counts, total


# ------------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True, slots=True)
class Sample:
    """One series at one moment: a value, or the cumulative counts and the sum of a histogram."""

    labels: tuple[tuple[str, str], ...]
    value: float
    counts: tuple[int, ...] = ()
    created_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One family at one moment. Only families with samples are made into one."""

    name: str
    kind: Kind
    help: str
    bounds: tuple[float, ...]
    samples: tuple[Sample, ...]


class Family:
    """One name with its series. Label names must be given sorted, as they are written."""

    def __init__(self, name: str, kind: Kind, help_text: str, labels: Labels, bounds: tuple[float, ...] = ()) -> None:
        if list(labels) != sorted(labels):
            raise ValueError(f"labels of {name} are not sorted")
        self.name = name
        self.kind: Kind = kind
        self.help = help_text
        self.labels = labels
        self.bounds = bounds
        self._lock = threading.Lock()
        self._children: dict[Labels, Value | Distribution] = {}

    def _child(self, values: Labels) -> Value | Distribution:
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}")
        child = self._children.get(values)
        if child is None:
            with self._lock:
                made = Distribution(self.bounds) if self.kind == "histogram" else Value()
                child = self._children.setdefault(values, made)
        return child

    def value(self, *values: str) -> Value:
        """The series of these label values; it shows from now on. To be kept by callers that need it often."""
        child = self._child(values)
        assert isinstance(child, Value)
        return child

    def distribution(self, *values: str) -> Distribution:
        """The same for a histogram."""
        child = self._child(values)
        assert isinstance(child, Distribution)
        return child

    def all_labels(self) -> list[Labels]:
        """Label values of all series."""
        with self._lock:
            return list(self._children)

    def remove(self, *values: str) -> None:
        """The series shows no more. Who kept it counts into nothing."""
        with self._lock:
            self._children.pop(values, None)

    def replace(self, values: dict[Labels, float]) -> None:
        """These are all series from now on."""
        for labels, value in values.items():
            self.value(*labels).set(value)
        for labels in self.all_labels():
            if labels not in values:
                self.remove(*labels)

    def snapshot(self) -> Snapshot | None:
        """None as long as there is no series."""
        with self._lock:
            children = sorted(self._children.items())
        if not children:
            return None
        samples = []
        for values, child in children:
            labels = tuple(zip(self.labels, values, strict=True))
            if isinstance(child, Value):
                samples.append(Sample(labels, child.value, (), child.created_s))
            else:
                counts, total = child.read()
                samples.append(Sample(labels, total, tuple(counts), child.created_s))
        return Snapshot(self.name, self.kind, self.help, self.bounds, tuple(samples))


class Registry:
    """All families, and what brings those up to date that are read from elsewhere."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._refreshers: list[tuple[Callable[[], None], bool]] = []

    def _add(self, family: Family) -> Family:
        if family.name in self._families:
            raise ValueError(f"{family.name} is there already")
        self._families[family.name] = family
        return family

    def counter(self, name: str, help_text: str, *labels: str) -> Family:
        return self._add(Family(name, "counter", help_text, labels))

    def gauge(self, name: str, help_text: str, *labels: str) -> Family:
        return self._add(Family(name, "gauge", help_text, labels))

    def histogram(self, name: str, help_text: str, bounds: tuple[float, ...], *labels: str) -> Family:
        return self._add(Family(name, "histogram", help_text, labels, bounds))

    def refresh_with(self, refresher: Callable[[], None], *, is_slow: bool = False) -> None:
        """Calls `refresher` before families are gathered, on the gathering thread. A slow one only looks at states."""
        self._refreshers.append((refresher, is_slow))

    def refresh(self, *, counts_only: bool = False) -> None:
        """Brings everything up to date, or what is counted elsewhere alone."""
        for refresher, is_slow in self._refreshers:
            if not (is_slow and counts_only):
                refresher()

    def families(self) -> list[Family]:
        return [family for _, family in sorted(self._families.items())]

    def gather(self, names: Collection[str] = ()) -> list[Snapshot]:
        """Families by name, those without series left out; only the named ones if names are given."""
        self.refresh()
        wanted = [family for family in self.families() if not names or family.name in names]
        return [snapshot for snapshot in (family.snapshot() for family in wanted) if snapshot is not None]


# ---------------------------------------------------------------------------------------------------------------- text


def number(value: float) -> str:
    """A number as Go's %g writes it: shortest digits, an exponent from 1e+06 on and below 1e-04."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if -_PLAIN_LIMIT < value < _PLAIN_LIMIT and value == int(value):
        return str(int(value))
    sign, digits, exponent = Decimal(repr(float(value))).as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits)).rstrip("0")
    first = len(digits) + exponent - 1  # exponent of the first digit
    if _LEAST_PLAIN_EXPONENT <= first < len(str(_PLAIN_LIMIT)) - 1:
        return repr(float(value)) if first >= 0 else f"{'-' if sign else ''}0.{'0' * (-first - 1)}{text}"
    rest = f".{text[1:]}" if len(text) > 1 else ""
    return f"{'-' if sign else ''}{text[0]}{rest}e{'-' if first < 0 else '+'}{abs(first):02d}"


@lru_cache(1024)
def _bound(value: float) -> str:
    return number(value)


def _escaped_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escaped_value(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def text_format(snapshots: Iterable[Snapshot]) -> bytes:
    """The text exposition format 0.0.4, as Go's encoder writes it."""
    out: list[str] = []
    for family in snapshots:
        out.append(f"# HELP {family.name} {_escaped_help(family.help)}\n# TYPE {family.name} {family.kind}\n")
        for sample in family.samples:
            pairs = ",".join(f'{name}="{_escaped_value(value)}"' for name, value in sample.labels)
            if family.kind != "histogram":
                out.append(f"{family.name}{f'{{{pairs}}}' if pairs else ''} {number(sample.value)}\n")
                continue
            start = f"{family.name}_bucket{{{pairs}{',' if pairs else ''}le="
            for bound, count in zip(family.bounds, sample.counts, strict=False):
                out.append(f'{start}"{_bound(bound)}"}} {number(count)}\n')
            out.append(f'{start}"+Inf"}} {number(sample.counts[-1])}\n')
            ending = f"{{{pairs}}}" if pairs else ""
            out.append(f"{family.name}_sum{ending} {number(sample.value)}\n")
            out.append(f"{family.name}_count{ending} {number(sample.counts[-1])}\n")
    return "".join(out).encode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------ protobuf


def varint(value: int) -> bytes:
    """An unsigned number in protobuf's variable length."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_bytes(tag: int, data: bytes) -> bytes:
    """A length-delimited field: a text, bytes, or a message."""
    return varint(tag << 3 | 2) + varint(len(data)) + data


def field_int(tag: int, value: int) -> bytes:
    return varint(tag << 3) + varint(value)


def _field_double(tag: int, value: float) -> bytes:
    return varint(tag << 3 | 1) + struct.pack("<d", value)


def _timestamp(tag: int, seconds: float) -> bytes:
    whole = int(seconds)
    nanos = int((seconds - whole) * 1e9)
    return field_bytes(tag, field_int(1, whole) + (field_int(2, nanos) if nanos else b""))


def _metric(family: Snapshot, sample: Sample) -> bytes:
    """One io.prometheus.client.Metric. Go leaves the bucket of infinity out: the count says the same."""
    out = b"".join(
        field_bytes(1, field_bytes(1, name.encode()) + field_bytes(2, value.encode("utf-8", "replace")))
        for name, value in sample.labels
    )
    if family.kind == "gauge":
        return out + field_bytes(2, _field_double(1, sample.value))
    if family.kind == "counter":
        return out + field_bytes(3, _field_double(1, sample.value) + _timestamp(3, sample.created_s))
    parts = [field_int(1, sample.counts[-1]), _field_double(2, sample.value)]
    for bound, count in zip(family.bounds, sample.counts, strict=False):
        parts.append(field_bytes(3, field_int(1, count) + _field_double(2, bound)))
    parts.append(_timestamp(15, sample.created_s))
    return out + field_bytes(7, b"".join(parts))


def protobuf_format(snapshots: Sequence[Snapshot]) -> bytes:
    """MetricFamily messages, each behind its length."""
    out = bytearray()
    for family in snapshots:
        message = b"".join(
            (
                field_bytes(1, family.name.encode()),
                field_bytes(2, family.help.encode()),
                field_int(3, _KIND_NUMBERS[family.kind]),
                *(field_bytes(4, _metric(family, sample)) for sample in family.samples),
            )
        )
        out += varint(len(message)) + message
    return bytes(out)
