"""The probe of volume.toml: what it writes, when it judges, when it relents, and what follows from its verdict."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from storage_util import config_of, create, put

from pyvolume.security_config import DiskProbeConfig
from pyvolume.storage import disk_space
from pyvolume.storage.disk_space import HEALTH_FILE, DiskProbe, IoProbe, go_duration
from pyvolume.storage.store import Store

MS = 0.001


class Disk:
    """A clock that only the test moves, and writes that take as long or fail as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.latency_s = 0.0
        self.failure = ""
        self.writes = 0
        monkeypatch.setattr(disk_space.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(disk_space, "write_probe", self.write)

    def write(self, _directory: str) -> str:
        self.writes += 1
        self.now_s += self.latency_s
        return self.failure

    def look(self, probe: IoProbe, times: int = 1, every_s: float = 60.0) -> str:
        for _ in range(times):
            self.now_s += every_s
            probe.check()
        return probe.error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def probe_with(**fields: float) -> IoProbe:
    defaults = {"window_s": 3600.0, "min_samples": 10, "slow_latency_s": 0.1}
    return IoProbe("/d", DiskProbeConfig(enabled=True, **{**defaults, **fields}))  # type: ignore[arg-type]


def test_writes_4096_zero_bytes(tmp_path: Path) -> None:
    probe = IoProbe(str(tmp_path), DiskProbeConfig(enabled=True))
    probe.check()
    assert (tmp_path / HEALTH_FILE).read_bytes() == bytes(4096)
    probe.check()
    assert probe.error == ""
    gone = IoProbe(f"{tmp_path}/gone", DiskProbeConfig(enabled=True, min_samples=1))
    gone.check()
    assert gone.error == f"open {tmp_path}/gone/{HEALTH_FILE}: no such file or directory"


def test_slow_writes(disk: Disk) -> None:
    probe = probe_with()
    assert disk.look(probe, 9) == ""
    disk.latency_s = 0.25
    assert disk.look(probe) == "", "one of ten is 10 %"
    assert disk.look(probe) == "", "two of eleven"
    assert disk.look(probe) == "disk io degradation detected latency=250ms", "three of twelve"
    disk.latency_s = 0.0
    assert disk.look(probe, 17) != "", "three of twenty-nine are more than half of 20 %"
    assert disk.look(probe) == "", "three of thirty"


def test_failed_writes(disk: Disk) -> None:
    probe = probe_with(slow_percent=101)
    disk.look(probe, 9)
    disk.failure = "sync /d/x: input/output error"
    assert disk.look(probe) == disk.failure, "one of ten"
    disk.failure = ""
    assert disk.look(probe, 9) == "disk io degradation detected latency=0ns"
    assert disk.look(probe) == "", "one of twenty"


def test_too_few_samples_judge_nothing(disk: Disk) -> None:
    probe = probe_with()
    disk.failure = "dead"
    assert disk.look(probe, 9) == ""
    assert disk.look(probe) == "dead"
    # Quirk: with the default window and a look a minute there is never more than one
    usual = IoProbe("/d", DiskProbeConfig(enabled=True))
    assert disk.look(usual, 100) == ""


def test_interval(disk: Disk) -> None:
    probe = probe_with(interval_s=300)
    disk.look(probe, 10)
    assert disk.writes == 2


def test_a_write_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    begun: list[str] = []

    def hang(directory: str) -> str:
        begun.append(directory)
        go_on.wait(20)
        return ""

    monkeypatch.setattr(disk_space, "write_probe", hang)
    probe = IoProbe("/d", DiskProbeConfig(enabled=True, timeout_s=0.01, interval_s=0, min_samples=1))
    probe.check()
    assert probe.error == "disk io timeout"
    probe.check()
    assert probe.error == "disk io still in progress"
    assert len(begun) == 1, "no second thread goes after the first"
    go_on.set()


@pytest.mark.parametrize(
    ("failures", "coef", "needed"), [(5, 0.5, 5), (1, 0.5, 1), (4, 0, 8), (4, 0.9, 1), (3, 0.25, 9)]
)
def test_recovery_of_statfs(monkeypatch: pytest.MonkeyPatch, failures: int, coef: float, needed: int) -> None:
    config = DiskProbeConfig(max_stat_failures=failures, recovery_coefficient=coef)
    probe = DiskProbe.configured("/d", config)
    assert probe.io is None

    def dead(path: str) -> disk_space.DiskUsage:
        raise OSError(5, "x")

    monkeypatch.setattr(disk_space, "disk_usage", dead)
    for _ in range(failures):
        assert not probe.error
        probe.check()
    assert probe.error == "disk health check failed: statfs: input/output error"
    monkeypatch.setattr(disk_space, "disk_usage", lambda path: disk_space.DiskUsage(path, 10, 5, 5, 50.0, 50.0))
    for _ in range(needed):
        assert probe.error
        probe.check()
    assert not probe.error


def test_bad_disk_takes_no_volumes_and_is_not_reported(tmp_path: Path, disk: Disk) -> None:
    create(tmp_path, 3).close()
    store = Store(config_of(tmp_path, max_volumes=8))
    store.watch_disks(DiskProbeConfig(enabled=True, window_s=36000, min_samples=2, interval_s=1))
    disk.failure = "sync /d/x: input/output error"
    store.load()
    try:
        (location,) = store.locations
        assert not location.is_unavailable and len(store.heartbeat_volumes()) == 1
        disk.now_s += 60
        store.check_free_space()
        assert location.is_unavailable and not location.can_take_volume()
        assert location.usage.error == "disk health check failed: io: sync /d/x: input/output error"
        assert store.heartbeat_volumes() == []
        volume = store.find_volume(3)
        assert volume is not None
        put(volume, 1, b"still served")
        disk.failure = ""
        for _ in range(60):
            disk.now_s += 60
            store.check_free_space()
        assert not location.is_unavailable and len(store.heartbeat_volumes()) == 1
    finally:
        store.close()


def test_off_by_default_and_with_several_directories(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(config_of(tmp_path / "a", tmp_path / "b"))
    with caplog.at_level(logging.WARNING):
        store.watch_disks(DiskProbeConfig(enabled=True))
    assert caplog.messages == [
        f"disk IO probe is disabled for multiple volume directories: [{tmp_path}/a {tmp_path}/b]"
    ]
    store.check_free_space()
    one = Store(config_of(tmp_path / "c"))
    one.watch_disks(DiskProbeConfig())
    one.check_free_space()
    assert disk.writes == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ns"), (1e-7, "100ns"), (0.00025, "250µs"), (0.612345678, "612.345678ms"), (1.25, "1.25s"), (2, "2s")],
)
def test_go_duration(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
