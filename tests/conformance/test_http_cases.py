"""Runs the case table against a server, and holds docs/SEMANTICS.md to it.

The server is one of this process, or the one that `PYVOLUME_TEST_TARGET` names (see target.py): any other volume server
can be held to the table too. Cases that upstream answers otherwise by design are in `DEPARTURES`; there they may fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_bench import Bench, Reply, serving
from http_cases import ANY, CASES, Case, Step
from target import ADDRESS, Target

ROOT = Path(__file__).resolve().parents[2]
DEPARTURES = {
    "path.bad.wrapping-vid": "upstream cuts volume ids to 32 bits",
    "path.bad.many-slashes": "upstream closes the connection",
    "path.write-error.vid-32-bit": "upstream cuts volume ids to 32 bits",
    "path.write-error.many-slashes": "upstream closes the connection",
    "pairs.cannot-change-the-framing": "upstream sends a stored Content-Length",
    "write.missing-volume": "upstream answers 201 and stores nothing",
}
"""Cases that upstream's server does not pass, by design: docs/COMPATIBILITY.md."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench | Target]:
    if ADDRESS:
        target = Target(ADDRESS)
        target.prepare()
        yield target
        return
    with serving(tmp_path_factory.mktemp("cases"), file_size_limit_bytes=2 << 20, read_mode="local") as running:
        running.allocate(2)
        running.allocate(3, ttl="3d")
        running.allocate(4, collection="pics")
        running.allocate(5, placement="001")
        running.context.store.mark_readonly(2, can_delete=False, persist=False)
        yield running


class _Words:
    """The words of one case, and what its answers add to them."""

    def __init__(self, bench: Bench | Target, case: Case) -> None:
        fid = bench.fid(case.volume)
        vid, hex_ = fid.split(",")
        key, cookie = hex_[:-8], hex_[-8:]
        self.values = {
            "fid": fid,
            "vid": vid,
            "hex": hex_,
            "key": key,
            "cookie": cookie,
            "other": f"{key}{int(cookie, 16) ^ 1:08x}",
            "next1": f"{int(key, 16) + 1:x}{cookie}",
            "next2": f"{int(key, 16) + 2:x}{cookie}",
            "etag": "",
        }

    def fill(self, text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: self.values.get(match[1], match[0]), text)


def check(step: Step, words: _Words, reply: Reply) -> None:
    assert reply.status == step.status, (step, reply)
    for name, value in step.want.items():
        got = reply.get(name)
        if value is None:
            assert got is None, (name, got)
        elif value == ANY:
            assert got is not None, name
        else:
            assert got == words.fill(value), name
    if step.body is None:
        return
    if callable(step.body):
        assert step.body(reply.body), reply.body[:300]
    elif isinstance(step.body, bytes):
        assert reply.body == step.body
    else:
        text = words.fill(step.body)
        if reply.status >= 400 and (reply.get("Content-Type") or "") == "application/json" and text[:1] != "{":
            assert json.loads(reply.body) == {"error": text}
        else:
            assert reply.body.decode() == text


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_case(bench: Bench | Target, case: Case, request: pytest.FixtureRequest) -> None:
    if isinstance(bench, Target) and case.name in DEPARTURES:
        request.applymarker(pytest.mark.xfail(reason=f"departure: {DEPARTURES[case.name]}"))
    words = _Words(bench, case)
    clients = {"admin": bench.client(), "public": bench.client(public=True)}
    try:
        for step in case.steps:
            client = clients[step.port]
            if client is None:
                pytest.skip("PYVOLUME_TEST_TARGET_PUBLIC is not set")
            send = step.send
            if send is not None and (b"{vid}" in send or b"{next1}" in send):
                send = words.fill(send.decode()).encode()
            headers = [(name, words.fill(value)) for name, value in step.headers]
            reply = client.ask(step.method, words.fill(step.target), headers, send)
            check(step, words, reply)
            words.values["etag"] = reply.get("Etag") or words.values["etag"]
    finally:
        for client in clients.values():
            if client is not None:
                client.close()


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_the_document_lists_exactly_these_cases() -> None:
    text = (ROOT / "docs" / "SEMANTICS.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z][\w.\-]*)` \|", text, re.MULTILINE)
    expanded = set()
    for name in listed:
        expanded |= {case.name for case in CASES if case.name == name or case.name.startswith(name + ".")}
        assert any(case.name == name or case.name.startswith(name + ".") for case in CASES), f"no case {name}"
    assert {case.name for case in CASES} - expanded == set(), "cases that the document does not mention"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("target", ["/1.5,01deadbeef", "/.1,01deadbeef"])
def test_a_dot_before_the_comma_closes_the_connection(bench: Bench | Target, method: str, target: str) -> None:
    client = bench.client()
    assert client is not None
    with pytest.raises(ConnectionError):
        client.ask(method, target, (("Content-Type", "a/b"),), b"x" if method == "PUT" else None)
    client.close()
    assert client.ask("GET", "/healthz").status == 200
    client.close()
