"""Shell blocks of documents that are marked ```sh run: all of a document's, one after the other, in one shell.

Ports and directories are replaced by some of this test's; `weed master` is the development master; /data holds volumes
that a Go server made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.ports import free_ports

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("docs/QUICKSTART.md", "docs/MIGRATING.md")
BLOCK = re.compile(r"^ *```sh run\n(.*?)^ *```$", re.M | re.S)
LIMIT_S = 100
WEED = """#!/bin/sh
[ "$1" = master ] || { echo "only weed master is here" >&2; exit 2; }
shift
exec "{python}" -m pyvolume.devmaster "$@"
"""


def blocks(document: str) -> list[str]:
    return BLOCK.findall((ROOT / document).read_text("utf-8"))


def test_every_marked_document_is_run() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        if re.search(r"^ *```sh run$", path.read_text("utf-8"), re.M)
    }
    assert marked == set(DOCUMENTS)
    assert all(len(blocks(document)) >= 4 for document in DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_of(document: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("needs bash and curl")
    script = "".join(blocks(document))
    master, master_grpc, port, port_grpc, metrics = free_ports(5)
    named = {"9333": master, "8080": port, "9325": metrics}
    script = re.sub(r"(?<![\d.])(9333|8080|9325)(?!\d)", lambda match: str(named[match[1]]), script)
    # gRPC is at the port plus 10000 by itself, which may be taken or none at all
    script = script.replace(f"-port={master}", f"-port={master} -port.grpc={master_grpc}")
    script = script.replace(f"-port={port}", f"-port={port} -port.grpc={port_grpc}")
    script = script.replace(f"-master=localhost:{master}", f"-master=localhost:{master}.{master_grpc}")
    script = re.sub(r"(?<![\w/])/(tmp|data)\b", rf"{tmp_path}/\1", script)
    (tmp_path / "tmp").mkdir()
    shutil.copytree(ROOT / "tests" / "data" / "go-4.44" / "v3-basic" / "data", tmp_path / "data")
    shims = tmp_path / "bin"
    shims.mkdir()
    (shims / "weed").write_text(WEED.replace("{python}", sys.executable))
    (shims / "weed").chmod(0o755)
    path = os.pathsep.join([str(shims), str(Path(sys.executable).parent), os.environ["PATH"]])
    begin = "set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n"
    try:
        done = subprocess.run(
            ["bash", "-c", begin + script],
            cwd=tmp_path,
            env={"PATH": path, "HOME": str(tmp_path), "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        pytest.fail(f"{document} did not end:\n{exc.stdout!r}\n{exc.stderr!r}")
    logs = "".join(log.read_text()[-2000:] for log in tmp_path.rglob("*.log"))
    assert done.returncode == 0, f"{document}:\n{done.stdout}\n{done.stderr}\n{logs}"
