"""As test_sigkill, with needle maps on disk: what was acknowledged is found through the map that the kill left behind,
brought up to date from the index.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from test_sigkill import CLIENTS, COMMIT_POINTS, MODES, SEED, VID, Client, check, kill_under_load

from tools.compat.bed import Bed

ROUNDS = 6
ROUND_OPS = (500, 4_000)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_acknowledged_state_is_found_in_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    clients = [Client(i + 1, random.Random(f"{SEED}-{i}")) for i in range(CLIENTS)]
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume", flags=["-index=leveldb"], size_limit_mb=30000) as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        for number in range(ROUNDS):
            kill_under_load(bed, clients, MODES[number % len(MODES)], rng.randrange(*ROUND_OPS), rng)
            # points are set when a server starts: for the next round
            following = MODES[(number + 1) % len(MODES)]
            monkeypatch.setenv("PYVOLUME_FAILPOINTS", COMMIT_POINTS if following == "commit" else "")
            bed.start_server()
            check(bed, clients)
            databases = [path.name for path in (bed.data_dir / f"{VID}.rocks").iterdir() if path.is_dir()]
            assert len(databases) == 1
