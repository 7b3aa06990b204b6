"""Results of the offline commands, read by a Go server and compared with Go's own tools.

Needs the binary of upstream: WEED_BIN=/path/to/weed. Without it these tests are skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from grpc_helpers import VolumeClient
from storage_util import COOKIE, create, golden, put

from pyvolume import cli
from pyvolume.types import format_key_cookie
from tools.ports import free_port

WEED = os.environ.get("WEED_BIN", "")
LIMIT_S = 60.0
HOST = "127.0.0.1"

pytestmark = [
    pytest.mark.skipif(not WEED, reason="set WEED_BIN to the binary of SeaweedFS 4.44 to run these"),
    pytest.mark.timeout(240),
]


@contextlib.contextmanager
def go_server(base: Path, data: Path) -> Iterator[tuple[str, VolumeClient]]:
    """A Go master and a Go volume server on a directory."""
    master, master_grpc, port, grpc_port = (free_port() for _ in range(4))
    (base / "meta").mkdir()
    processes = []

    def run(name: str, *words: str) -> None:
        with (base / f"{name}.log").open("wb") as out:
            environ = {**os.environ, "HOME": str(base)}
            processes.append(subprocess.Popen([WEED, *words], stdout=out, stderr=out, cwd=base, env=environ))

    run("master", "master", f"-ip={HOST}", f"-port={master}", f"-port.grpc={master_grpc}", f"-mdir={base}/meta")
    where = [f"-ip={HOST}", f"-port={port}", f"-port.grpc={grpc_port}", f"-dir={data}", "-max=50"]
    run("volume", "volume", *where, f"-master={HOST}:{master}.{master_grpc}")
    try:
        end_s = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/status", timeout=5):
                break
            assert time.monotonic() < end_s, (base / "volume.log").read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        client = VolumeClient(grpc_port)
        try:
            yield f"http://{HOST}:{port}", client
        finally:
            client.close()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def get(url: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()


def check_fids(url: str, entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        status, body = get(f"{url}/{entry['fid']}")
        assert status == entry["status"], entry["fid"]
        if status == 200:
            assert hashlib.sha256(body).hexdigest() == entry["body_sha256"], entry["fid"]


def test_fixed_and_compacted_volumes_are_served(tmp_path: Path) -> None:
    data = tmp_path / "data"
    basic = golden("v3-basic", data)  # volume 1: its index is lost
    torn = golden("torn-dat", data)  # 71, 72, 73
    ragged = golden("torn-idx", tmp_path / "ragged")
    for path in (tmp_path / "ragged").iterdir():
        number = int(path.stem) + 100
        shutil.copy(path, data / f"{number}{path.suffix}")
    (data / "1.idx").unlink()
    volume = create(data, 9)
    dice = random.Random(5)
    state: dict[int, bytes | None] = {}
    for step in range(300):
        key = dice.randrange(1, 60)
        if dice.random() < 0.3:
            volume.delete_needle(key, COOKIE)
            state[key] = None
        else:
            state[key] = bytes([step % 251]) * dice.randrange(1, 2000)
            put(volume, key, state[key] or b"")
    volume.close()
    (data / "9.idx").write_bytes((data / "9.idx").read_bytes()[:1007])
    assert cli.main(["fix", str(data)]) == 1  # torn-dat has lost needles
    assert cli.main(["check", str(data)]) == 0
    assert cli.main(["compact", "--volume-id", "9", str(data)]) == 0
    assert cli.main(["check", str(data)]) == 0
    with go_server(tmp_path, data) as (url, client):
        check_fids(url, basic["needles"])
        fixed = [entry for entry in torn["needles"] if entry["status"] == 200]
        check_fids(url, fixed)
        for entry in ragged["needles"]:
            if entry["status"] == 200:
                vid, _, rest = entry["fid"].partition(",")
                assert get(f"{url}/{int(vid) + 100},{rest}")[0] == 200
        for key, wanted in state.items():
            status, body = get(f"{url}/9,{format_key_cookie(key, COOKIE)}")
            assert (status, body if status == 200 else None) == (404 if wanted is None else 200, wanted)
        for vid in (1, 9, 71, 72, 73, 171, 172, 173):
            assert not client.call("VolumeStatus", {"volume_id": vid}).first.is_read_only, vid
        said = client.call("ScrubVolume", {"mode": 2}).first
        assert list(said.details) == [] and said.total_volumes == 8


@pytest.mark.parametrize(
    ("name", "vid", "collection"),
    [("v3-basic", 1, ""), ("own-v1", 101, ""), ("own-v2", 102, ""), ("vacuumed", 31, ""), ("collection", 7, "photos")],
)
def test_lists_and_tar_files_are_those_of_weed_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, vid: int, collection: str
) -> None:
    data = tmp_path / "data"
    golden(name, data)
    theirs = [WEED, "export", f"-dir={data}", f"-volumeId={vid}", f"-collection={collection}"]
    listed = subprocess.run(theirs, capture_output=True, text=True, check=True).stdout
    ours = ["export", "--volume-id", str(vid), "--collection", collection]
    capsys.readouterr()
    assert cli.main([*ours, str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Go counts empty files as deleted here
    assert [line for line in lines if line.split("\t")[2] != "0"] == listed.splitlines()
    subprocess.run([*theirs, f"-o={tmp_path}/theirs.tar"], capture_output=True, check=True)
    assert cli.main([*ours, "-o", f"{tmp_path}/ours.tar", str(data)]) == 0
    assert members(tmp_path / "ours.tar") == members(tmp_path / "theirs.tar"), "empty files aside"


def members(path: Path) -> list[tuple[str, int, str]]:
    with tarfile.open(path) as archive:
        return [
            (m.name, int(m.mtime), hashlib.sha256(archive.extractfile(m).read()).hexdigest())  # type: ignore[union-attr]
            for m in archive
            if m.size
        ]
