"""Go's JSON: escapes on the way out, words for what is broken on the way in."""

from __future__ import annotations

import json
import re

import pytest

from pyvolume.ops import gojson


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", b'"plain"'),
        ("<a href='x'>&", b"\"\\u003ca href='x'\\u003e\\u0026\""),
        ("line\u2028para\u2029", b'"line\\u2028para\\u2029"'),
        ('quote" back\\ tab\t nul\0 del\x7f', b'"quote\\" back\\\\ tab\\t nul\\u0000 del\x7f"'),
        ("d\u00e9j\u00e0 \u65e5\u672c \U0001f600", '"d\u00e9j\u00e0 \u65e5\u672c \U0001f600"'.encode()),
    ],
)
def test_strings_are_escaped_as_go_does(text: str, expected: bytes) -> None:
    assert gojson.dumps(text) == expected


def test_each_bad_byte_becomes_one_replacement_character() -> None:
    assert gojson.utf8(b"a\xe2\x82b\xff") == "a\ufffd\ufffdb\ufffd"
    assert gojson.dumps(b"\xe2\x82z".decode("utf-8", "surrogateescape")) == '"\ufffd\ufffdz"'.encode()


def test_pretty_indents_by_two_and_keeps_order() -> None:
    value = {"b": 1, "a": [], "c": {}, "d": [1, None]}
    expected = b'{\n  "b": 1,\n  "a": [],\n  "c": {},\n  "d": [\n    1,\n    null\n  ]\n}'
    assert gojson.dumps(value, pretty=True) == expected
    assert gojson.error("x") == b'{"error":"x"}'


@pytest.mark.parametrize(
    ("value", "text"), [(29.281769, "29.281769"), (0.1, "0.1"), (100.0, "100.0"), (1 / 3, "0.33333334")]
)
def test_float32_prints_the_shortest_single_precision_text(value: float, text: str) -> None:
    assert json.dumps(gojson.float32(value)) == text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "unexpected end of JSON input"),
        (b"  ", "unexpected end of JSON input"),
        (b'{"a":1', "unexpected end of JSON input"),
        (b"{broken", "invalid character 'b' looking for beginning of object key string"),
        (b"nope", "invalid character 'o' in literal null (expecting 'u')"),
        (b"<html>", "invalid character '<' looking for beginning of value"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
        (b'{"a":1,}', "invalid character '}' looking for beginning of object key string"),
        (b"[1 2]", "invalid character '2' after array element"),
        (b"[1,]", "invalid character ']' looking for beginning of value"),
        (b"{} x", "invalid character 'x' after top-level value"),
        (b'"a\nb"', "invalid character '\\n' in string literal"),
        (b'"\\x"', "invalid character 'x' in string escape code"),
        (b'"\\u12g4"', "invalid character 'g' in \\u hexadecimal character escape"),
        (b"-x", "invalid character 'x' in numeric literal"),
        (b"1.x", "invalid character 'x' after decimal point in numeric literal"),
        (b"1ex", "invalid character 'x' in exponent of numeric literal"),
        (b"01", "invalid character '1' after top-level value"),
        (b"tru", "unexpected end of JSON input"),
        (b"NaN", "invalid character 'N' looking for beginning of value"),
        (b"\xff", "invalid character '\u00ff' looking for beginning of value"),
        (b"'", "invalid character '\\'' looking for beginning of value"),
        (b"[" * 10_001, "exceeded max depth"),
    ],
)
def test_syntax_errors_have_gos_words(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        gojson.loads(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":[1,-2.5e3,true,false,null,"x\\u0041"],"b":{}}',
        b" [] ",
        b"0",
        b'"\xff"',
        b'{"k":{"k":[[{}]]}}',
        b"-0.0E-1",
    ],
)
def test_valid_documents_pass_the_scanner(data: bytes) -> None:
    assert gojson.loads(data) == json.loads(data.decode("utf-8", "replace"))


def test_half_a_surrogate_pair_could_be_read_but_not_written() -> None:
    assert gojson.loads(rb'{"\udc00": ["\ud800\u0041", "\ud83d\ude00", "\\ud800"]}') == {
        "\ufffd": ["\ufffdA", "\U0001f600", "\\ud800"]
    }
