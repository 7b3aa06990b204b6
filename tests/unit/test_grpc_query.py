"""Query (contract replication-tiering.md D) and the paths into JSON that it takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_nodes import COOKIE, Server, put
from hypothesis import given
from hypothesis import strategies as st

from pyvolume.ops import jsonpath
from pyvolume.ops.jsonpath import Kind

Code = grpc.StatusCode
LINES = b'{"a":12,"b":"yy","o":{"p":5}}\n{"a":"30","b":"z z","n":null} {"b":"x","t":true,\n"f":false}\nnoise 7'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    volume = made.make(3)
    put(volume, 1, LINES)
    put(volume, 2, b"")
    yield made
    made.end()


def fid(key: int, cookie: int = COOKIE, vid: int = 3) -> str:
    return f"{vid},{key:x}{cookie:08x}"


def ask(
    server: Server, *fids: str, sel: tuple[str, ...] = ("a", "b"), where: tuple[str, str, str] = ("b", "", "")
) -> Any:
    return server.call(
        "Query",
        selections=sel,
        from_file_ids=fids,
        filter={"field": where[0], "operand": where[1], "value": where[2]},
        input_serialization={"json_input": {}},
    )


def stripes(answer: Any) -> list[bytes]:
    assert answer.code is Code.OK, (answer.code, answer.details)
    return [message.records for message in answer.messages]


def test_one_stripe_for_each_file(server: Server) -> None:
    answer = ask(server, fid(1), fid(2), fid(1))
    records = b'{a:12,b:"yy"}{a:"30",b:"z z"}{a:,b:"x"}'
    assert stripes(answer) == [records, b"", records]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (("a", "", ""), b'{a:12}{a:"30"}'),
        (("a", "=", "12"), b"{a:12}"),
        (("a", ">", "10"), b'{a:12}{a:"30"}'),
        (("a", "<", "5"), b'{a:"30"}'),
        (("a", "!=", "x"), b'{a:12}{a:"30"}'),
        (("b", "%", "z*"), b'{a:"30"}'),
        (("b", "!%", "z*"), b"{a:12}{a:}"),
        (("o.p", ">=", "5"), b"{a:12}"),
        (("t", "=", "true"), b"{a:}"),
        (("t", ">", "false"), b"{a:}"),
        (("t", ">=", "whatever"), b"{a:}"),
        (("f", "<", "true"), b"{a:}"),
        (("f", "<=", ""), b"{a:}"),
        (("f", "!=", "false"), b""),
        (("n", "", ""), b'{a:"30"}'),
        (("n", "=", ""), b""),
        (("o", "=", '{"p":5}'), b""),
        (("a", "~", "12"), b""),
        (("", "", ""), b""),
        (("none", "", ""), b""),
    ],
)
def test_filters(server: Server, where: tuple[str, str, str], found: bytes) -> None:
    assert stripes(ask(server, fid(1), sel=("a",), where=where)) == [found]


def test_selections(server: Server) -> None:
    first = ("o", "", "")
    assert stripes(ask(server, fid(1), sel=(), where=first)) == [b"{}"]
    assert stripes(ask(server, fid(1), sel=("o.p", "x", "o"), where=first)) == [b'{o.p:5,x:,o:{"p":5}}']
    assert stripes(ask(server, fid(1), sel=("n",), where=("n", "", ""))) == [b"{n:}"]


def test_only_json_gives_anything(server: Server) -> None:
    base = {"selections": ["a"], "from_file_ids": [fid(1)], "filter": {"field": "a"}}
    for kind in ({"csv_input": {}}, {"parquet_input": {}}, {}):
        assert stripes(server.call("Query", **base, input_serialization=kind)) == []
    assert stripes(server.call("Query", selections=["a"])) == []


def test_what_ends_upstreams_process_is_refused(server: Server) -> None:
    answer = server.call("Query", from_file_ids=[fid(1)], filter={"field": "a"})
    assert (answer.code, answer.details) == (Code.INVALID_ARGUMENT, "input_serialization: missing")
    answer = server.call("Query", from_file_ids=[fid(1)], input_serialization={"json_input": {}})
    assert (answer.code, answer.details) == (Code.INVALID_ARGUMENT, "filter: missing")
    assert stripes(ask(server, fid(1), sel=("a",), where=("a", "=", "12"))) == [b"{a:12}"]


def test_file_ids(server: Server) -> None:
    for bad, text in (
        ("nonsense", "Wrong fid format."),
        (",x", "Wrong fid format."),
        ("3,zz", "Invalid fid: zz"),
        (fid(9), "not found"),
        (fid(1, vid=77), "volume 77 not found"),
    ):
        answer = ask(server, bad)
        assert (answer.code, answer.details) == (Code.UNKNOWN, text), bad
    server.volume(3).delete_needle(1, COOKIE)
    assert ask(server, fid(1)).details == "already deleted"


def test_a_wrong_cookie_ends_the_stream_with_success(server: Server) -> None:
    assert len(stripes(ask(server, fid(1), fid(1, 5), fid(1)))) == 1


def test_an_error_leaves_the_stripes_before_it(server: Server) -> None:
    answer = ask(server, fid(1), fid(9))
    assert (answer.code, answer.details, len(answer.messages)) == (Code.UNKNOWN, "not found", 1)


def test_paths_are_bounded(server: Server) -> None:
    answer = ask(server, fid(1), sel=("a" * 5000,))
    assert (answer.code, answer.details) == (Code.INVALID_ARGUMENT, "path of 5000 bytes: at most 4096")
    for path in ("a." * 2000, "#." * 2000, "#(" * 2000, "|" * 4000, "*" * 4000, "\\" * 4000, "#(a" * 900 + ")" * 900):
        assert ask(server, fid(1), sel=(path,)).code is Code.OK, path[:10]


def test_hostile_data_takes_bounded_time(server: Server) -> None:
    volume = server.volume(3)
    began_s = time.monotonic()
    for number, data in enumerate(
        (
            b"[" * 200_000,
            b'{"a":' * 50_000,
            b'"' + b"\\" * 200_001,
            b'{"' * 50_000,
            b"\xff\x00" * 100_000,
            b"1" * 300_000,
            b'{"b":"' + b"ab" * 50_000 + b'"}',
            b"n" * 1000 + b"-" * 1000,
        )
    ):
        put(volume, 100 + number, data)
        assert ask(server, fid(100 + number), where=("b", "%", "*a*b*a*b*c")).code is Code.OK
        assert ask(server, fid(100 + number), sel=("a.b", "#.a", "*.*"), where=("*", "", "")).code is Code.OK
    assert time.monotonic() - began_s < 20


# -- paths ------------------------------------------------------------------------------------------------------------

DOCUMENT = (
    b'{"name":{"first":"Tom","last":"Anderson"},"age":37,"children":["Sara","Alex","Jack"],'
    b'"fav.movie":"Deer Hunter","friends":['
    b'{"first":"Dale","last":"Murphy","age":44,"nets":["ig","fb","tw"]},'
    b'{"first":"Roger","last":"Craig","age":68,"nets":["fb","tw"]},'
    b'{"first":"Jane","last":"Murphy","age":47,"nets":["ig","tw"]}],'
    b'"dup":1,"dup":{"x":2},"e\\u0041c":"\\ud83d\\ude00\\n","deep":[[1,2],[3]],"empty":[],"num":-1.5e3}'
)


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("name.last", b'"Anderson"'),
        ("age", b"37"),
        ("children", b'["Sara","Alex","Jack"]'),
        ("children.#", b"3"),
        ("children.1", b'"Alex"'),
        ("children.3", None),
        ("children.x", None),
        ("child*.2", b'"Jack"'),
        ("c?ildren.0", b'"Sara"'),
        ("fav\\.movie", b'"Deer Hunter"'),
        ("fav.movie", None),
        ("friends.#.first", b'["Dale","Roger","Jane"]'),
        ("friends.1.last", b'"Craig"'),
        ('friends.#(last=="Murphy").first', b'"Dale"'),
        ('friends.#(last="Murphy")#.first', b'["Dale","Jane"]'),
        ("friends.#(age>45)#.last", b'["Craig","Murphy"]'),
        ('friends.#(first%"D*").last', b'"Murphy"'),
        ('friends.#(first!%"D*").last', b'"Craig"'),
        ('friends.#(nets.#(=="fb"))#.first', b'["Dale","Roger"]'),
        ("friends.#(nope)#", b"[]"),
        ("friends.#(nope)", None),
        ("friends.#(nope)#.x|#", b"[]"),
        ("friends.#(nope)#|#", b"0"),
        ("friends.#(age)#.x|#", b"0"),
        ("friends.#(age", None),
        ('children.#(>"K")#', b'["Sara"]'),
        ("friends.#.nets.#", b"[3,2,2]"),
        ("friends.#.first|#", b"3"),
        ("friends|0|first", b'"Dale"'),
        ('friends.#(first=="Jane").nets|1', b'"tw"'),
        ("dup", b"1"),
        ("dup.x", b"2"),
        ("eAc", b'"\\ud83d\\ude00\\n"'),
        ("deep.0.1", b"2"),
        ("deep.#.#", b"[2,1]"),
        ("empty.#", b"0"),
        ("empty.0", None),
        ("num", b"-1.5e3"),
        ("age.x", None),
        ("@this", None),
        ("", None),
    ],
)
def test_paths(path: str, raw: bytes | None) -> None:
    found = jsonpath.get(DOCUMENT, path.encode())
    assert (None if found is None else found.raw) == raw


def test_values() -> None:
    text = b' {"a":1}x[2] "s\\n" tru null nan -5,true}3\n{"cut":'
    found = [(value.kind, value.raw) for value in jsonpath.values(text)]
    assert found == [
        (Kind.CONTAINER, b'{"a":1}'),
        (Kind.CONTAINER, b"[2]"),
        (Kind.STRING, b'"s\\n"'),
        (Kind.TRUE, b"tru"),
        (Kind.NULL, b"null"),
        (Kind.NUMBER, b"nan"),
        (Kind.NUMBER, b"-5"),
        (Kind.TRUE, b"true"),
        (Kind.NUMBER, b"3"),
        (Kind.CONTAINER, b'{"cut":'),
    ]
    assert list(jsonpath.values(b'1 "open 2')) == list(jsonpath.values(b"1"))


@pytest.mark.parametrize(
    ("path", "raw"), [("0", b"1"), ("1.0", b"2"), ("#", None), ("#.0", None), ("#(>0)#", None), ("2", None)]
)
def test_arrays_cut_within_a_string(path: str, raw: bytes | None) -> None:
    for cut in (b'[1,[2],"open', b'[1,[2],{"open'):
        found = jsonpath.get(cut, path.encode())
        if path == "2" and cut.endswith(b'{"open'):
            assert found is not None and found.raw == b'{"open'
        else:
            assert (None if found is None else found.raw) == raw
    assert jsonpath.get(b"[1,[2],{", b"#") == jsonpath.get(b"[1,2,3]", b"#")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"1", 1.0),
        (b"-1.5e2", -150.0),
        (b"1e999", float("inf")),
        (b"0x1p4", 16.0),
        (b".5", 0.5),
        (b"x", 0.0),
        (b"", 0.0),
        (b"1_0", 0.0),
        (b" 1", 0.0),
        (b"1\n", 0.0),
        (b"0x1p99999", float("inf")),
    ],
)
def test_numbers(text: bytes, number: float) -> None:
    assert jsonpath.parse_float(text) == number


@pytest.mark.parametrize(
    ("text", "pattern", "fits"),
    [
        ("abc", "*", True),
        ("", "*", True),
        ("", "", True),
        ("abc", "a*c", True),
        ("abc", "a?c", True),
        ("ac", "a?c", False),
        ("a*c", "a\\*c", True),
        ("abc", "a\\*c", False),
        ("abcabc", "*bc", True),
        ("abcab", "*bc", False),
        ("aXbXc", "a*b*c", True),
        ("ab", "a*b*c", False),
        ("aba", "ab*ba", False),
        ("übung", "?bung", True),
        ("a\nb", "a*b", True),
        ("abc", "abc\\", False),
        ("x", "**", True),
    ],
)
def test_globs(text: str, pattern: str, fits: bool) -> None:
    assert jsonpath.Glob(pattern.encode()).matches(text.encode()) is fits


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc.*é", max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(JSON, max_size=6))
def test_values_of_real_json(documents: list[Any]) -> None:
    text = "\n".join(json.dumps(document) for document in documents).encode()
    found = [json.loads(value.raw) for value in jsonpath.values(text)]
    assert found == documents


def _escaped(name: str) -> str:
    return "".join("\\" + char if char in ".*?\\|" else char for char in name)


@given(JSON)
def test_every_path_of_real_json_is_found(document: Any) -> None:
    text = json.dumps(document).encode()

    def check(value: Any, path: list[str]) -> None:
        if path:
            found = jsonpath.get(text, ".".join(path).encode())
            assert found is not None, path
            assert json.loads(found.raw) == value
        if isinstance(value, dict):
            for key, inner in value.items():
                if key:
                    check(inner, [*path, _escaped(key)])
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                check(inner, [*path, str(number)])

    check(document, [])


@given(st.binary(max_size=80), st.binary(max_size=20))
def test_nothing_raises(text: bytes, path: bytes) -> None:
    for value in jsonpath.values(text):
        jsonpath.get(value.raw, path)
    jsonpath.get(text, path)
    jsonpath.Glob(path).matches(text)


@given(st.text('{}[]",:\\ a1#.|', max_size=60), st.text('a.#()[]|*?\\"=1~', max_size=20))
def test_nothing_raises_near_json(text: str, path: str) -> None:
    for value in jsonpath.values(text.encode()):
        jsonpath.compare(jsonpath.get(value.raw, path.encode()), "%", path.encode())
