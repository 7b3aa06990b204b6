"""Replays recorded exchanges of a Go server against the server under test.

A recording is one `<profile>.jsonl.xz`: a head line (profile, flags, security_toml, public_port, volumes, readonly),
then one line an exchange (episode, family, step, answers, at). tests/data/README.md describes the fields.
"""

from __future__ import annotations

import base64
import json
import lzma
import re
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from tools.compat.bed import HOST, Bed, ServerFailed
from tools.compat.judge import CLOCK_SLACK_S, Judge, Step, imf_date
from tools.compat.report import Report
from tools.compat.wire import Answer, Client, Connection


def _bytes(packed: dict[str, Any] | None) -> bytes | None:
    return None if packed is None else base64.b64decode(packed["b64"])


def _step(line: dict[str, Any]) -> Step:
    step: Step = dict(line["step"], family=line["family"], body=_bytes(line["step"]["body"]))
    if step.get("raw"):
        step["raw"] = [["send", _bytes(op[1])] if op[0] == "send" else op for op in step["raw"]]
    return step


def _answer(recorded: dict[str, Any], at_s: float) -> Answer:
    """The recorded answer as it would look today: what was the server's clock then is moved to now."""
    answer = Answer(**{k: recorded[k] for k in ("version", "status", "reason", "framing", "interim", "error", "asked")})
    answer.body = _bytes(recorded["body"]) or b""
    shift_s = time.time() - at_s
    for name, value in recorded["headers"]:
        when = imf_date(value) if name.lower() == "last-modified" else None
        if when and abs(when - at_s) < CLOCK_SLACK_S:
            value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(when + shift_s))
        answer.headers.append((name, value))
    return answer


class Side:
    """The connections to one server, and the ETags it gave."""

    def __init__(self, bed: Bed) -> None:
        self.ports = {"admin": bed.port, "public": bed.public_port}
        self.clients = {name: Client(HOST, port) for name, port in self.ports.items()}
        self.etags: dict[str, str] = {}

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    def send(self, step: Step) -> list[Answer]:
        if step.get("raw"):
            return self._raw(step)
        client = self.clients[step.get("port", "admin")]
        headers = [(k, self._with_etags(v)) for k, v in step["headers"]]
        answer = client.request(
            step["method"],
            self._with_etags(step["target"]),
            headers,
            step["body"],
            fresh=bool(step.get("fresh")),
            version=step.get("version", "HTTP/1.1"),
        )
        if etag := answer.get("etag"):
            self.etags[re.split(r"[/?.]", step["target"].lstrip("/"), maxsplit=1)[0]] = etag
        return [answer]

    def _with_etags(self, text: str) -> str:
        return re.sub(r"@ETAG:([^@]*)@", lambda m: self.etags.get(m.group(1), '"unknown"'), text)

    def _raw(self, step: Step) -> list[Answer]:
        out: list[Answer] = []
        conn = Connection(HOST, self.ports[step.get("port", "admin")])
        try:
            for op, *args in step["raw"]:
                if op == "send":
                    try:
                        conn.send(args[0])
                    except OSError:
                        continue  # the server may have hung up on purpose: its answer is what counts
                elif op == "recv":
                    answer = conn.receive(args[0])
                    answer.asked = args[0]
                    out.append(answer)
                elif op == "half":
                    conn.half_close()
                elif op == "sleep":
                    time.sleep(args[0])  # part of the recorded exchange: a client that pauses
                else:
                    closed = conn.peer_closed(0.6 if op == "closed" else 0.15)
                    out.append(Answer(error="peer closed" if closed else "peer keeps open"))
        finally:
            conn.close()
        return out


def describe(step: Step) -> str:
    """The request in one line, as a person would repeat it."""
    if step.get("raw"):
        return "raw: " + " | ".join(
            f"send {op[1][:300]!r}" if op[0] == "send" else " ".join(map(str, op)) for op in step["raw"]
        )
    words = ["curl", "-i", "-X", step["method"]]
    for k, v in step["headers"]:
        words += ["-H", f"{k}: {v}"]
    if step["body"] is not None:
        words += ["--data-binary", f"<{len(step['body'])} bytes>"]
    port = step.get("port", "admin")
    return shlex.join([*words, "--path-as-is", f"http://{port}{step['target']}"])


def replay(path: Path, command: str, report: Report, families: set[str] | None, gaps: set[str]) -> None:
    """Replays one recording; families in `gaps` are left out and said so by the caller."""
    with lzma.open(path, "rt", encoding="utf-8") as f:
        head = json.loads(f.readline())
        lines = [json.loads(x) for x in f]
    profile = head["profile"]
    lines = [x for x in lines if (not families or x["family"] in families) and not _gap(gaps, profile, x["family"])]
    if not lines:
        return
    with tempfile.TemporaryDirectory(prefix="pyvolume-compat-") as base:
        bed = Bed(
            Path(base),
            command=command,
            flags=head["flags"],
            security_toml=head["security_toml"],
            public_port=head["public_port"],
            size_limit_mb=head["size_limit_mb"],
        )
        try:
            with bed:
                _prepare(bed, head)
                _run(bed, profile, lines, report)
        except ServerFailed as e:
            report.add(f"{profile}/start", str(e), [("the server", "starts", "does not")])


def _gap(gaps: set[str], profile: str, family: str) -> bool:
    return family in gaps or f"{profile}/{family}" in gaps


def _prepare(bed: Bed, head: dict[str, Any]) -> None:
    made = [v["volume_id"] for v in head["volumes"] if bed.allocate(**v)]
    for vid in head["readonly"]:
        try:
            bed.call("VolumeMarkReadonly", volume_id=vid)
        except grpc.RpcError:
            continue  # a server that whitelists nobody refuses this; the recording was made the same way
    bed.wait_registered(made)


def _run(bed: Bed, profile: str, lines: list[dict[str, Any]], report: Report) -> None:
    side = Side(bed)
    judge = Judge(bed.scrub)
    try:
        for line in lines:
            step = _step(line)
            if step.get("wait"):
                time.sleep(step["wait"])  # part of the recorded exchange
            got = side.send(step)
            want = [_answer(a, line["at"]) for a in line["answers"]]
            differences = [("answers", len(want), len(got))] if len(want) != len(got) else []
            for a, b in zip(want, got, strict=False):
                differences += judge.compare(dict(step, method=a.asked or "GET") if step.get("raw") else step, a, b)
            report.add(line["family"], f"{profile}#{line['episode']} {describe(step)}", differences)
        assert bed.server is not None
        if not bed.server.alive:
            report.add(f"{profile}/alive", bed.server.tail(), [("the server", "lives", "died")])
    finally:
        side.close()
        report.tolerated += judge.tolerated
