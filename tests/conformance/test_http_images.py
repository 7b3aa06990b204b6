"""Image parameters of reads, and orientation on upload, over HTTP (contract http.md 6.7, 6.9, 8.7)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_bench import Bench, Reply, serving
from PIL import Image


def picture(kind: str, size: tuple[int, int] = (60, 40), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(out, kind, **options)
    return out.getvalue()


def shape(reply: Reply) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(reply.body)) as opened:
        return opened.format, opened.size


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving(tmp_path_factory.mktemp("images")) as running:
        yield running


def upload(bench: Bench, data: bytes, name: str, media: str) -> str:
    fid = bench.fid()
    headers = (("Content-Type", media), ("Content-Disposition", f'attachment; filename="{name}"'))
    assert bench.ask("PUT", f"/{fid}?ts=1700000000", headers, data).status == 201
    return fid


def test_resize_by_stored_name_by_url_and_by_path(bench: Bench) -> None:
    data = picture("PNG")
    fid = upload(bench, data, "p.png", "image/png")
    vid, hex_ = fid.split(",")
    for target in (f"/{fid}?width=30", f"/{fid}.png?width=30", f"/{vid}/{hex_}/x.png?width=30", f"/{fid}.PNG?width=30"):
        reply = bench.ask("GET", target)
        assert (shape(reply), reply.get("Content-Type")) == (("PNG", (30, 20)), "image/png"), target
        assert reply.get("Etag") == bench.ask("GET", f"/{fid}").get("Etag")
        assert reply.get("Content-Length") == str(len(reply.body))
    assert bench.ask("GET", f"/{vid}/{hex_}/x.txt?width=30").body == data
    assert bench.ask("GET", f"/{fid}?width=60").body == data
    assert bench.ask("GET", f"/{fid}.jpg?width=30").body[:2] == b"\xff\xd8"


def test_head_tells_the_length_of_what_would_come(bench: Bench) -> None:
    fid = upload(bench, picture("PNG"), "p.png", "image/png")
    body = bench.ask("GET", f"/{fid}?width=30").body
    head = bench.ask("HEAD", f"/{fid}?width=30")
    assert (head.status, head.get("Content-Length")) == (200, str(len(body)))


def test_a_range_applies_to_the_result(bench: Bench) -> None:
    fid = upload(bench, picture("PNG"), "p.png", "image/png")
    whole = bench.ask("GET", f"/{fid}?width=30").body
    part = bench.ask("GET", f"/{fid}?width=30", (("Range", "bytes=0-9"),))
    assert (part.status, part.body, part.get("Content-Range")) == (206, whole[:10], f"bytes 0-9/{len(whole)}")


def test_conditions_go_by_the_original(bench: Bench) -> None:
    fid = upload(bench, picture("PNG"), "p.png", "image/png")
    etag = bench.ask("GET", f"/{fid}").get("Etag")
    assert bench.ask("GET", f"/{fid}?width=30", (("If-None-Match", etag or ""),)).status == 304


def test_webp_becomes_png_under_its_old_type(bench: Bench) -> None:
    fid = upload(bench, picture("WEBP"), "p.webp", "image/webp")
    reply = bench.ask("GET", f"/{fid}?width=30")
    assert (shape(reply), reply.get("Content-Type")) == (("PNG", (30, 20)), "image/webp")


def test_a_large_picture_is_resized_only_by_the_extension_in_the_url(bench: Bench) -> None:
    noise = Image.effect_noise((1200, 1000), 90).convert("RGB")
    out = io.BytesIO()
    noise.save(out, "PNG", compress_level=0)
    assert len(out.getvalue()) > 1 << 20
    fid = upload(bench, out.getvalue(), "p.png", "image/png")
    assert bench.ask("GET", f"/{fid}?width=30").body == out.getvalue()
    assert shape(bench.ask("GET", f"/{fid}.png?width=30")) == ("PNG", (30, 25))
    assert bench.ask("HEAD", f"/{fid}.png?width=30").get("Content-Length") == str(len(out.getvalue()))


def test_what_is_no_picture_is_served_as_it_is(bench: Bench) -> None:
    fid = upload(bench, b"\x89PNG\r\n\x1a\nbroken", "p.png", "image/png")
    reply = bench.ask("GET", f"/{fid}?width=5&crop_x2=3&crop_y2=3")
    assert (reply.status, reply.body) == (200, b"\x89PNG\r\n\x1a\nbroken")


def test_orientation_is_fixed_on_upload_when_asked_for(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture("JPEG", (32, 16), exif=exif.tobytes())
    with serving(tmp_path, fix_orientation=True) as bench:
        fid = bench.fid()
        reply = bench.ask("PUT", f"/{fid}", (("Content-Type", "image/jpeg"),), data)
        assert f'"size":{len(data)},' in reply.body.decode(), "the size is that of the upload"
        assert shape(bench.ask("GET", f"/{fid}")) == ("JPEG", (16, 32))
        other = bench.fid()
        bench.ask("PUT", f"/{other}", (("Content-Type", "image/png"),), data)
        assert bench.ask("GET", f"/{other}").body == data
