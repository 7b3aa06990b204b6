"""Damaged records, full disks and other troubles as clients see them (contract http.md 6.2, 6.8; departure A5)."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from http_bench import Bench, serving

from pyvolume.errors import disk_error
from pyvolume.storage.volume import Volume
from tools.compat.bed import wait_for

OCTETS = ("Content-Type", "application/octet-stream")
SMALL = b"small needle " * 20
LARGE = bytes(range(251)) * 6000


def overwrite(bench: Bench, old: bytes, new: bytes) -> None:
    """Changes bytes of the data file behind the server's back."""
    volume = bench.context.store.find_volume(1)
    assert volume is not None
    path = Path(volume.dat_path)
    data = path.read_bytes()
    assert data.count(old) == 1
    with path.open("r+b") as file:
        file.seek(data.index(old))
        file.write(new)


def test_a_damaged_small_needle_is_500(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        fid = bench.fid()
        bench.ask("PUT", f"/{fid}", (OCTETS,), SMALL)
        overwrite(bench, SMALL, SMALL[:-1] + b"X")
        for method in ("GET", "HEAD"):
            reply = bench.ask(method, f"/{fid}")
            assert (reply.status, reply.body, reply.get("Content-Type"), reply.get("Etag")) == (500, b"", None, None)
        deleted = bench.ask("DELETE", f"/{fid}")
        assert (deleted.status, deleted.body) == (404, b'{"size":0}')


def test_a_read_that_meets_a_volume_just_closed_is_404(tmp_path: Path) -> None:
    """Between finding a volume and reading from it, an unmount may close it: it was 500."""
    with serving(tmp_path) as bench:
        fid = bench.fid()
        bench.ask("PUT", f"/{fid}", (OCTETS,), SMALL)
        volume = bench.context.store.find_volume(int(fid.split(",")[0]))
        assert volume is not None
        volume.close()
        for method in ("GET", "HEAD"):
            reply = bench.ask(method, f"/{fid}")
            assert (reply.status, reply.body) == (404, b"")


def test_a_damaged_large_needle_is_delivered_and_counted(tmp_path: Path) -> None:
    seen: list[str] = []
    with serving(tmp_path) as bench:
        fid = bench.fid()
        bench.ask("PUT", f"/{fid}", (OCTETS,), LARGE)
        overwrite(bench, LARGE, b"X" + LARGE[1:])
        bench.ops.events.handler = seen.append  # type: ignore[method-assign]
        reply = bench.ask("GET", f"/{fid}")
        assert (reply.status, reply.body) == (200, b"X" + LARGE[1:])
        assert wait_for(lambda: seen == ["errorCRC"], 20)  # counted when the last byte is out


def test_an_unreadable_large_needle_is_500_with_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise disk_error("read /d/1.dat: input/output error", errno.EIO)
        yield b""

    with serving(tmp_path, fast_lane=False) as bench:  # what is replaced here is Python's
        fid = bench.fid()
        bench.ask("PUT", f"/{fid}?ts=1700000000", (("Content-Type", "a/b"),), LARGE)
        monkeypatch.setattr(Volume, "stream_data", broken)
        reply = bench.ask("GET", f"/{fid}")
        assert (reply.status, reply.body) == (500, b"read /d/1.dat: input/output error\n")
        assert reply.get("Content-Type") == "text/plain; charset=utf-8"
        assert reply.get("Last-Modified") == "Tue, 14 Nov 2023 22:13:20 GMT"
        client = bench.client()
        client.send(f"GET /{fid} HTTP/1.1\r\nHost: h\r\nRange: bytes=5-9\r\n\r\n".encode())
        with pytest.raises(ConnectionError):
            client.read()


def test_a_full_disk_is_500_and_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, fast_lane=False) as bench:  # what is replaced here is Python's
        fid = bench.fid()

        def full(*_: object, **__: object) -> object:
            raise disk_error("write /d/1.dat: no space left on device", errno.ENOSPC)

        with monkeypatch.context() as patch:
            patch.setattr(Volume, "write_needle", full)
            reply = bench.ask("PUT", f"/{fid}", (OCTETS,), b"x")
        text = b'{"error":"failed to write to local disk: write /d/1.dat: no space left on device"}'
        assert (reply.status, reply.body) == (500, text)
        assert bench.ask("GET", f"/{fid}").status == 404
        assert bench.ask("PUT", f"/{fid}", (OCTETS,), b"x").status == 201


def test_an_unexpected_error_is_500_and_the_server_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("a bug")

    with serving(tmp_path) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(Volume, "read_needle", broken)
            reply = bench.ask("GET", f"/{bench.fid()}")
        assert (reply.status, reply.body) == (500, b"")
        assert reply.get("Server") is not None
        assert bench.ask("GET", f"/{bench.fid()}").status == 404


def test_a_body_larger_than_memory_keeps_to_a_file(tmp_path: Path) -> None:
    with serving(tmp_path, fast_lane=False) as bench:
        fid = bench.fid()
        bench.admin.server.spool_bytes = 1 << 20
        data = bytes(range(256)) * 20_000
        assert bench.ask("PUT", f"/{fid}", (OCTETS,), data).status == 201
        assert bench.ask("GET", f"/{fid}").body == data
        assert bench.admin.server.stats.bodies_spooled == 1


@pytest.mark.parametrize("cut", ["raw", "form", "form-after-the-file"])
def test_bodies_that_break_off(tmp_path: Path, cut: str) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n' + SMALL
    kind, body = {
        "raw": ("application/octet-stream", SMALL),
        "form": ("multipart/form-data; boundary=b", part),
        "form-after-the-file": ("multipart/form-data; boundary=b", part + b"\r\n--b--\r\n"),
    }[cut]
    with serving(tmp_path) as bench:
        fid = bench.fid()
        client = bench.client()
        head = f"POST /{fid} HTTP/1.1\r\nHost: h\r\nContent-Type: {kind}\r\nContent-Length: {len(body) + 50}\r\n\r\n"
        client.send(head.encode() + body)
        sock = client.connect()
        sock.shutdown(1)
        reply = client.read("POST")
        client.close()
        if cut == "form-after-the-file":
            assert reply.status == 201
            assert bench.ask("GET", f"/{fid}").body == SMALL
        else:
            assert (reply.status, reply.body) == (400, b'{"error":"unexpected EOF"}')
            assert bench.ask("GET", f"/{fid}").status == 404
