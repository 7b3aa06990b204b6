"""How full a file system is, when that is too full, and whether it still answers.

May import the leaves only. Upstream: `weed/stats/disk.go`, `disk_supported.go`, `weed/util/minfreespace.go`. Only
`DiskProbe.check` and `disk_usage` touch the disk; the probe waits at most half a second, however dead the disk is.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass, field, replace
from typing import Final

from pyvolume.config import MinFreeSpace
from pyvolume.errors import errno_text

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
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _checking: bool = False
    _failures: int = 0
    _successes: int = 0
    _last_error: str = ""
    _last_good: DiskUsage | None = None

    def check(self) -> DiskUsage:
        """New figures, or the last good ones if the disk does not answer within timeout_s.

        `error` is set once max_failures checks in a row failed, and until enough succeeded again.
        """
        with self._lock:
            if self._checking:
                return self._failed("statfs still in progress")
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
                return self._failed("statfs timeout")
        result = outcome[0]
        with self._lock:
            if isinstance(result, OSError):
                return self._failed(errno_text(result.errno) if result.errno else str(result))
            return self._succeeded(result)

    @property
    def error(self) -> str:
        """`disk health check failed: statfs: …` while the disk counts as unavailable, else empty."""
        with self._lock:
            return self._error_text()

    def _error_text(self) -> str:
        if self._failures < self.max_failures:
            return ""
        return f"disk health check failed: statfs: {self._last_error}"

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
            if self._successes >= max(1, int(self.max_failures * (1 / self.recovery_coef - 1))):
                self._failures = self._successes = 0
        self._last_good = usage
        return replace(usage, error=self._error_text())
