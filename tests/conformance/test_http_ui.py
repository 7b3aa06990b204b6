"""The page of /ui/index.html: what it lists, what it lets browsers do, what others can put into it (http.md 12)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from http_bench import Bench, serving

from pyvolume.ops.context import Ops
from pyvolume.server import http_app, ui
from pyvolume.server.http_pages import ReadCounts
from pyvolume.server.metrics import ServerMetrics
from pyvolume.types import Ttl

OCTETS = ("Content-Type", "application/octet-stream")
NASTY = "<img src=x onerror=alert(1)>\"'&</script>"


class Page(HTMLParser):
    """Elements of a page with their attributes, and the texts of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving(tmp_path_factory.mktemp("ui"), masters=("m1:9333", "m2:9333")) as running:
        yield running


def shown(bench: Bench) -> Page:
    return Page(bench.ask("GET", "/ui/index.html").body.decode())


def document(bench: Bench) -> dict[str, object]:
    reply = bench.ask("GET", "/ui/index.html?format=json")
    assert (reply.status, reply.get("Content-Type")) == (200, "application/json")
    answer: dict[str, object] = json.loads(reply.body)
    return answer


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(bench: Bench) -> None:
    reply = bench.ask("GET", "/ui/index.html")
    policy = reply.get("Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    page = Page(reply.body.decode())
    for tag, attributes in page.elements:
        assert tag != "style" and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "script":
            assert attributes["src"], "no inline script"
        for name in ("src", "href"):
            target = attributes.get(name)
            if target is not None:
                assert re.match(r"/[^/]", target), target
                assert bench.ask("GET", target).status == 200


def test_its_files_are_there_and_ask_nobody_else(bench: Bench) -> None:
    for name, kind in (("ui.js", "text/javascript; charset=utf-8"), ("ui.css", "text/css; charset=utf-8")):
        reply = bench.ask("GET", ui.STATIC + name)
        assert (reply.status, reply.get("Content-Type")) == (200, kind)
        text = reply.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(", text)
        assert "innerHTML" not in text and "eval(" not in text


def test_volumes_in_page_and_document(bench: Bench) -> None:
    bench.allocate(21, collection="pics", ttl="3d", placement="001")
    fids = [bench.fid(21) for _ in range(2)]
    for fid in fids:
        bench.ask("PUT", f"/{fid}?type=replicate", (OCTETS,), b"x" * 1000)
    bench.ask("DELETE", f"/{fids[0]}?type=replicate")
    bench.context.store.mark_readonly(21, can_delete=False, persist=False)
    volumes = document(bench)["volumes"]
    assert isinstance(volumes, list)
    row = next(row for row in volumes if row["id"] == 21)
    assert (row["collection"], row["ttl"], row["replication"], row["read_only"]) == ("pics", "3d", "001", True)
    assert (row["files"], row["trash"]) == (2, 1)
    assert 0.4 < row["garbage"] < 0.6
    cells = shown(bench).cells
    at = cells.index("21")
    assert cells[at + 1 : at + 3] == ["pics", "hdd"]
    assert cells[at + 4] == "2"
    assert cells[at + 9] == "true"
    assert "[m1:9333 m2:9333]" in cells
    assert "not connected to a master" in cells


def test_plots_alone(bench: Bench) -> None:
    answer = json.loads(bench.ask("GET", "/ui/index.html?format=json&part=history").body)
    assert answer == {"history": []}, "no metrics are kept in this bench"


def test_plots_come_from_the_counters(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        bench.context.events = metrics = ServerMetrics(bench.context.config)
        metrics.request_ended("GET", 200, 0.01)
        metrics.history.sample()
        history = document(bench)["history"]
        assert isinstance(history, list)
        assert history[0]["reads"]["rate"] > 0
        assert 6.4 < history[0]["reads"]["p99_ms"] <= 12.8


def test_texts_of_others_stay_texts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(
        id=7, collection=NASTY, disk_type=NASTY, file_count=1, delete_count=0, deleted_byte_count=0,
        ttl=Ttl.NONE.to_u32(),
        replica_placement=0, read_only=False, version=3, remote_storage_name="", remote_storage_key="",
    )  # fmt: skip
    remote = SimpleNamespace(**{**vars(info), "id": 8, "remote_storage_name": NASTY, "remote_storage_key": NASTY})
    volumes = [SimpleNamespace(to_info=lambda given=given: given, content_bytes=10) for given in (info, remote)]
    shards = {0: SimpleNamespace(size=10)}
    coded = SimpleNamespace(vid=9, collection=NASTY, shards=shards, encode_ts_ns=0)
    monkeypatch.setattr(bench.context.store, "volumes", lambda: volumes)
    monkeypatch.setattr(bench.context.store.ec, "volumes", lambda: [coded])
    text = ui.page(bench.context, ReadCounts()).decode()
    page = Page(text)
    assert page.cells.count(NASTY) == 6
    assert "<img" not in text
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [
        {"src": "/seaweedfsstatic/pyvolume/ui.js", "defer": None}
    ]
    for title in ("Remote Volumes", "Erasure Coding Shards"):
        assert title in text
    assert json.loads(ui.figures(bench.context, ""))["ec"][0]["collection"] == NASTY


def test_other_parts_are_left_out_when_there_are_none(bench: Bench) -> None:
    text = bench.ask("GET", "/ui/index.html").body.decode()
    assert "Remote Volumes" not in text
    assert "Erasure Coding Shards" not in text


def test_many_volumes_stay_quick(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = bench.context.store.volumes()[0]
    monkeypatch.setattr(bench.context.store, "volumes", lambda: [volume] * 5000)
    started = time.monotonic()
    page = ui.page(bench.context, ReadCounts())
    data = ui.figures(bench.context, "")
    assert time.monotonic() - started < 5, "0.4 s on an idle machine"
    assert len(page) < 200_000, "the page holds the first rows only"
    assert len(json.loads(data)["volumes"]) == 5000
    assert b"100 of 5000" in page


def test_counters_of_a_server_are_the_contexts(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        ops: Ops = http_app.make_ops(bench.context)
        assert ops.events is bench.context.events
        ops.close()
