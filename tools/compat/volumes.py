"""Opens copies of volumes that a Go server made, and checks every answer and file their manifests name."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from tools.compat.bed import HOST, Bed, ServerFailed
from tools.compat.judge import image_info
from tools.compat.report import Report
from tools.compat.wire import Client

# of another machine's clock or file layout, or told elsewhere
NOT_COMPARED = {"modified_ts_ns", "encode_ts_ns", "last_append_at_ns", "volume_info"}
OF_THIS_SERVER = {"date", "server", "connection"}


def unpack(source: Path, target: Path) -> None:
    """Copies a data directory, gunzipping shards that are stored packed."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if re.search(r"\.ec\d\d\.gz$", path.name):
            with gzip.open(path) as f, (target / path.name[:-3]).open("wb") as out:
                shutil.copyfileobj(f, out)
        else:
            shutil.copy(path, target / path.name)


def check(fixture: Path, command: str, report: Report, gaps: set[str]) -> None:
    """Runs one fixture: files as stored, needles, exchanges in their order, gRPC facts."""
    manifest = json.loads((fixture / "manifest.json").read_text())
    name = manifest["name"]

    def same(what: str, want: Any, got: Any) -> bool:
        report.add(name, what, [] if want == got else [(re.sub(r"[0-9a-f]{6,}|\d+,", "#", what), want, got)])
        return bool(want == got)

    with tempfile.TemporaryDirectory(prefix="pyvolume-compat-") as base:
        data = Path(base) / "volume"
        unpack(fixture / "data", data)
        for file, facts in manifest["files"].items():
            if (data / file).exists():
                same(f"stored file {file}", facts["sha256"], hashlib.sha256((data / file).read_bytes()).hexdigest())
        flags = list(manifest.get("flags", []))
        if name.startswith("torn-"):
            flags.append("-repairOnLoad=false")  # the manifest tells what Go does, which repairs nothing
        try:
            with Bed(Path(base), command=command, flags=flags, data_dir=data) as bed:
                bed.wait_registered([v["id"] for v in manifest["volumes"]], limit_s=8)
                client = Client(HOST, bed.port)
                try:
                    _needles(manifest, client, same)
                    _exchanges(manifest, client, same)
                finally:
                    client.close()
                _facts(manifest, bed, same, gaps)
        except ServerFailed as e:
            same("the server starts", manifest.get("go_start", "starts"), str(e))


def _needles(manifest: dict[str, Any], client: Client, same: Any) -> None:
    for needle in manifest.get("needles", []):
        what = f"GET {needle['fid']}"
        got = client.request("GET", "/" + needle["fid"], [("Accept-Encoding", "identity")])
        if not same(f"{what} status ({needle.get('note', '')})", needle["status"], got.status) or got.status != 200:
            continue
        digest = hashlib.sha256(got.body).hexdigest()
        same(f"{what} body", (needle["body_length"], needle["body_sha256"]), (len(got.body), digest))
        for k, v in needle["headers"].items():
            same(f"{what} header {k}", v, got.get(k))


def _exchanges(manifest: dict[str, Any], client: Client, same: Any) -> None:
    for exchange in manifest.get("exchanges", []):
        request, want = exchange["request"], exchange["response"]
        got = client.request(request["method"], request["target"], [(k, v) for k, v in request["headers"]])
        what = f"{request['method']} {request['target']} {request['headers'] or ''}"
        if not same(what + " status", want["status"], got.status):
            continue
        picture = want.get("image")
        ranges = want["headers"].get("Content-Type", "").startswith("multipart/byteranges")
        if picture:
            same(what + " image", (picture["format"], picture["width"], picture["height"]), image_info(got.body))
        elif not ranges:
            same(what + " body", want["body_sha256"], hashlib.sha256(got.body).hexdigest())
        for k, v in want["headers"].items():
            if k.lower() in OF_THIS_SERVER or (k == "Content-Length" and (picture or _is_resized(request["target"]))):
                continue
            if v.startswith("multipart/byteranges"):
                same(f"{what} header {k}", True, (got.get(k) or "").startswith("multipart/byteranges"))
            else:
                same(f"{what} header {k}", v, got.get(k))


def _is_resized(target: str) -> bool:
    """Whether the answer is a picture made anew, whose length is the encoder's choice (a HEAD tells no more)."""
    return "width=" in target or "height=" in target or "crop_" in target


def _facts(manifest: dict[str, Any], bed: Bed, same: Any, gaps: set[str]) -> None:
    if any(e["request"]["method"] in ("DELETE", "PUT", "POST") for e in manifest.get("exchanges", [])):
        return
    for vid, methods in manifest.get("grpc", {}).items():
        for method, want in methods.items():
            if f"rpc:{method}" in gaps:
                continue
            try:
                reply = bed.call(method, volume_id=int(vid))
            except grpc.RpcError as e:
                same(f"{method} of {vid}: succeeds", "error" not in want, False)
                if "error" in want:
                    same(f"{method} of {vid}: error", (want["error"], want["message"]), (e.code().name, e.details()))
                continue
            same(f"{method} of {vid}: succeeds", "error" not in want, True)
            got = json_format.MessageToDict(
                reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            for k, v in want.items():
                if k not in NOT_COMPARED and "error" not in want:
                    same(f"{method} of {vid}: {k}", _sorted(v), _sorted(got.get(k)))


def _sorted(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
