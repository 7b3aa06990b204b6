"""How full a file system is, when that is too full, and whether it still answers and takes writes.

May import the leaves only. Upstream: `weed/stats/disk.go`, `disk_supported.go`, `weed/util/minfreespace.go`. Only
`DiskProbe.check`, `IoProbe.check` and `disk_usage` touch the disk; the probes wait no longer than they are told to,
however dead the disk is.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

from pyvolume.config import MinFreeSpace
from pyvolume.errors import errno_text, os_error_text
from pyvolume.log import V1
from pyvolume.security_config import DiskProbeConfig

log = logging.getLogger(__name__)

STATFS_TIMEOUT_S: Final = 0.5
MAX_STAT_FAILURES: Final = 5
"""Consecutive failures after which a disk counts as unavailable (`max.stat.failures` of volume.toml)."""
RECOVERY_COEF: Final = 0.5
"""`recovery.coef`: int(failures * (1 / coef - 1)) successes in a row make the disk available again."""


def _float32(value: float) -> float:
    """Rounded to single precision, in which upstream keeps and prints percentages."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Figures of one file system in bytes; free is what an unprivileged user may take. Percentages are float32."""

    directory: str
    all_bytes: int = 0
    used_bytes: int = 0
    free_bytes: int = 0
    percent_free: float = 0.0
    percent_used: float = 0.0
    error: str = ""

    def describe(self) -> str:
        return f"{self.directory}: {self.free_bytes} of {self.all_bytes} bytes free ({self.percent_free:.2f}%)"


def disk_usage(directory: str) -> DiskUsage:
    """statvfs of a directory. Raises OSError; may block for as long as the file system does."""
    fs = os.statvfs(directory)
    all_bytes = fs.f_blocks * fs.f_frsize
    free = fs.f_bavail * fs.f_frsize
    used = all_bytes - free
    return DiskUsage(
        directory,
        all_bytes,
        used,
        free,
        _float32(free / all_bytes * 100) if all_bytes else 0.0,
        _float32(used / all_bytes * 100) if all_bytes else 0.0,
    )


# --------------------------------------------------------------------------------------------------- minimum free space


def is_low(reserve: MinFreeSpace, usage: DiskUsage) -> tuple[bool, str]:
    """Whether the free space is below the reserve, and upstream's words for the log either way."""
    if reserve.percent is not None:
        low = usage.percent_free < _float32(reserve.percent)
        return low, f"disk free {usage.percent_free:.2f}% {'<' if low else '>='} required {reserve.percent:.2f}%"
    low = usage.free_bytes < reserve.size_bytes
    free, required = human_bytes(usage.free_bytes), human_bytes(reserve.size_bytes)
    return low, f"disk free {free} {'<' if low else '>='} required {required}"


def available_bytes(reserve: MinFreeSpace, usage: DiskUsage) -> int:
    """Free bytes above the reserve, at least 0."""
    kept = reserve.size_bytes
    if reserve.percent is not None:
        kept = int(_float32(_float32(_float32(usage.all_bytes) * _float32(reserve.percent)) / 100))
    return max(0, usage.free_bytes - kept)


def human_bytes(size: int) -> str:
    """`1.50 GiB`, as upstream's log lines print sizes."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        if value < 1024 or unit == "EiB":
            break
    return f"{value:.2f} {unit}"


# ------------------------------------------------------------------------------------------------------------ the probe


@dataclass
class DiskProbe:
    """Takes the figures of one directory without ever hanging on it, and tells when the disk stopped answering.

    statfs runs on a thread of its own; while one is stuck no other is started. Thread-safe; `check` holds no lock while
    it waits. Upstream: diskProbe.
    """

    directory: str
    timeout_s: float = STATFS_TIMEOUT_S
    max_failures: int = MAX_STAT_FAILURES
    recovery_coef: float = RECOVERY_COEF
    io: IoProbe | None = None
    """Also writes, if volume.toml says so; only while statfs answers."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _checking: bool = False
    _failures: int = 0
    _successes: int = 0
    _last_error: str = ""
    _last_good: DiskUsage | None = None

    @classmethod
    def configured(cls, directory: str, config: DiskProbeConfig) -> DiskProbe:
        """As volume.toml says."""
        return cls(
            directory,
            max_failures=config.max_stat_failures,
            recovery_coef=config.recovery_coefficient,
            io=IoProbe(directory, config) if config.enabled else None,
        )

    def check(self) -> DiskUsage:
        """New figures, or the last good ones if the disk does not answer within timeout_s.

        `error` is set once max_failures checks in a row failed, and until enough succeeded again; likewise for writes.
        """
        usage, answered = self._check_stat()
        if self.io is not None and answered:
            self.io.check()
            with self._lock:
                return replace(usage, error=self._error_text())
        return usage

    def _check_stat(self) -> tuple[DiskUsage, bool]:
        """The figures, and whether the disk answered just now."""
        with self._lock:
            if self._checking:
                return self._failed("statfs still in progress"), False
            self._checking = True
        done = threading.Event()
        outcome: list[DiskUsage | OSError] = []

        def run() -> None:
            try:
                outcome.append(disk_usage(self.directory))
            except OSError as exc:
                outcome.append(exc)
            finally:
                with self._lock:
                    self._checking = False
                done.set()

        threading.Thread(target=run, name="statfs", daemon=True).start()
        if not done.wait(self.timeout_s):
            with self._lock:
                return self._failed("statfs timeout"), False
        result = outcome[0]
        with self._lock:
            if isinstance(result, OSError):
                return self._failed(errno_text(result.errno) if result.errno else str(result)), False
            return self._succeeded(result), True

    @property
    def error(self) -> str:
        """`disk health check failed: statfs: …; io: …` while the disk counts as unavailable, else empty."""
        with self._lock:
            return self._error_text()

    def _error_text(self) -> str:
        problems = []
        if self._failures >= self.max_failures and self._last_error:
            problems.append(f"statfs: {self._last_error}")
        if self.io is not None and self.io.error:
            problems.append(f"io: {self.io.error}")
        return "disk health check failed: " + "; ".join(problems) if problems else ""

    def _failed(self, reason: str) -> DiskUsage:
        self._failures += 1
        self._successes = 0
        self._last_error = reason
        good = self._last_good
        if good is None:
            return DiskUsage(self.directory, error=self._error_text())
        return replace(good, error=self._error_text())

    def _succeeded(self, usage: DiskUsage) -> DiskUsage:
        if self._failures < self.max_failures:
            self._failures = self._successes = 0
        else:
            self._successes += 1
            if self._successes >= self._successes_needed():
                self._failures = self._successes = 0
        self._last_good = usage
        return replace(usage, error=self._error_text())

    def _successes_needed(self) -> int:
        if self.max_failures <= 1:
            return 1
        if self.recovery_coef <= 0:
            return self.max_failures * 2
        return max(1, int(self.max_failures * (1 / self.recovery_coef - 1)))


# ------------------------------------------------------------------------------------------------------------- writing

HEALTH_FILE: Final = ".disk-health-check"
_PROBE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    slow: bool
    failed: bool


@dataclass
class IoProbe:
    """Writes and flushes a block now and then, and tells when too many of these were slow or failed.

    Each write is made on a thread of its own; while one is stuck no other is started. Thread-safe; `check` holds no
    lock while it waits, at most config.timeout_s. Quirk: with the default settings (a look a minute, a window of one
    minute, ten samples wanted) there are never enough samples for a verdict. Upstream: checkDiskIOLatency.
    """

    directory: str
    config: DiskProbeConfig
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _running: bool = False
    _number: int = 0
    _last_s: float = float("-inf")
    _samples: deque[_Sample] = field(default_factory=deque, repr=False)
    _degraded: bool = False
    _error: str = ""

    @property
    def error(self) -> str:
        """Why the disk counts as bad, else empty."""
        with self._lock:
            return self._error if self._degraded else ""

    def check(self) -> None:
        """Makes one probe if config.interval_s is over since the last."""
        with self._lock:
            if time.monotonic() - self._last_s < self.config.interval_s:
                return
            self._last_s = time.monotonic()
            if self._running:
                self._observe(self.config.timeout_s, "disk io still in progress")
                return
            self._running = True
            self._number += 1
            number = self._number
        done = threading.Event()
        outcome: list[tuple[float, str]] = []

        def run() -> None:
            began_s = time.monotonic()
            reason = write_probe(self.directory)
            outcome.append((time.monotonic() - began_s, reason))
            done.set()
            with self._lock:
                if self._number == number:
                    self._running = False
                    self._last_s = time.monotonic()

        threading.Thread(target=run, name="io-probe", daemon=True).start()
        finished = done.wait(self.config.timeout_s)
        with self._lock:
            self._last_s = time.monotonic()
            if not finished:
                self._observe(self.config.timeout_s, "disk io timeout")
                return
            latency_s, reason = outcome[0]
            self._running = False
            self._observe(self.config.timeout_s if reason else latency_s, reason)
            log.log(
                V1,
                "disk io latency dir=%s latency=%s degraded=%s samples=%d error=%s",
                self.directory,
                go_duration(latency_s),
                self._degraded,
                len(self._samples),
                self._error,
            )

    def _observe(self, latency_s: float, failure: str) -> None:
        """Needs the lock. Takes a sample in and judges those of the window."""
        now_s = time.monotonic()
        self._samples.append(_Sample(now_s, latency_s >= self.config.slow_latency_s, bool(failure)))
        while self._samples and self._samples[0].at_s <= now_s - self.config.window_s:
            self._samples.popleft()
        if len(self._samples) >= self.config.min_samples:
            share = 100 / len(self._samples) if self._samples else 0.0
            slow = sum(sample.slow for sample in self._samples) * share
            failed = sum(sample.failed for sample in self._samples) * share
            if self._degraded:  # leaves only well below the limits
                keep = self.config.recovery_coefficient
                self._degraded = slow > self.config.slow_percent * keep or failed > self.config.error_percent * keep
            else:
                self._degraded = slow >= self.config.slow_percent or failed >= self.config.error_percent
        if self._degraded:
            self._error = failure or f"disk io degradation detected latency={go_duration(latency_s)}"
        else:
            self._error = ""


def write_probe(directory: str) -> str:
    """Writes a block to `.disk-health-check` and flushes it; empty, or why that failed. Blocks on disk."""
    path = f"{directory}/{HEALTH_FILE}"
    operation = "open"
    try:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            operation = "write"
            os.pwrite(fd, bytes(_PROBE_BYTES), 0)
            operation = "sync"
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        return os_error_text(operation, path, exc.errno or 0)
    return ""


def go_duration(seconds: float) -> str:
    """`612.345ms`, `1.25s`, as Go prints a duration below a minute."""
    for unit, scale, digits in (("s", 1, 9), ("ms", 1e3, 6), ("µs", 1e6, 3)):
        if seconds * scale >= 1:
            text = f"{seconds * scale:.{digits}f}"
            return text.rstrip("0").rstrip(".") + unit
    return f"{int(seconds * 1e9)}ns"
