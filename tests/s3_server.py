"""S3 servers on loopback for tests: a small one in this process that can be made to misbehave, and upstream's gateway.

`FakeS3` knows what a tier and a remote fetch use: objects (PUT, GET with Range, HEAD, DELETE) and multipart uploads. It
refuses unsigned requests and a body whose SHA-256 is not the signed one. `GoS3` is the gateway of a `weed server`,
which checks the signatures too; it needs WEED_BIN.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from tools.ports import free_port

BUCKET = "tier"
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
REGION = "us-east-1"
START_S = 60.0


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    length: int = 0

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


@dataclass
class Object:
    data: bytes
    headers: dict[str, str] = field(default_factory=dict)


Hook = Callable[[Seen], int | None]
"""Called for each request once its body is read: a status to answer instead, 0 to cut the connection, None to go on."""


class FakeS3:
    """An S3 server on a port the system chose. Buckets need not be made. Use as a context manager, or close()."""

    def __init__(self, port: int = 0) -> None:
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.seen: list[Seen] = []
        self.hook: Hook | None = None
        self.cut_after: int | None = None
        """Bytes of a GET's body after which the connection is cut, once."""
        self.lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.fake = self
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def properties(self, **more: str) -> dict[str, str]:
        """Of a storage backend, as a master tells them."""
        return properties(self.endpoint, **more)

    def keys(self) -> list[str]:
        """Keys in the bucket, without its name."""
        with self.lock:
            return sorted(path.partition("/")[2] for path in self.objects)

    def data(self, key: str, bucket: str = BUCKET) -> bytes:
        with self.lock:
            return self.objects[f"{bucket}/{key}"].data

    def requests(self, method: str) -> list[Seen]:
        with self.lock:
            return [seen for seen in self.seen if seen.method == method]

    def close(self) -> None:
        """Stops listening and cuts all connections: the server is gone, as if killed. Objects stay."""
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeS3

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut is what a test wanted."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        with self.server.fake.lock:
            self.server.fake._connections.add(self.connection)

    def finish(self) -> None:
        with self.server.fake.lock:
            self.server.fake._connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        fake = self.server.fake
        target = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(target.query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", "0"))
        body = self.rfile.read(length) if length else b""
        seen = Seen(self.command, unquote(target.path).lstrip("/"), query, headers, length)
        with fake.lock:
            fake.seen.append(seen)
        status = fake.hook(seen) if fake.hook is not None else None
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            self._error(status, {404: "NoSuchKey", 403: "AccessDenied", 503: "SlowDown"}.get(status, "InternalError"))
            return
        if "AWS4-HMAC-SHA256 Credential=" not in headers.get("authorization", ""):
            self._error(403, "AccessDenied")
            return
        signed = headers.get("x-amz-content-sha256", "")
        if len(signed) == 64 and signed != hashlib.sha256(body).hexdigest():
            self._error(400, "XAmzContentSHA256Mismatch")
            return
        getattr(self, "_" + self.command.lower())(fake, seen, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fake = self.server.fake
        cut, fake.cut_after = (fake.cut_after, None) if self.command == "GET" else (None, fake.cut_after)
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        self._answer(status, text.encode(), Content_Type="application/xml")

    def _head(self, fake: FakeS3, seen: Seen, body: bytes) -> None:
        found = fake.objects.get(seen.path)
        if found is None:
            self._error(404, "NoSuchKey")
            return
        self._answer(200, Content_Length=str(len(found.data)), ETag=_etag(found.data), Accept_Ranges="bytes")

    def _get(self, fake: FakeS3, seen: Seen, body: bytes) -> None:
        found = fake.objects.get(seen.path)
        if found is None:
            self._error(404, "NoSuchKey")
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", seen.range)
        if wanted is None:
            self._answer(200, found.data, ETag=_etag(found.data))
            return
        start = int(wanted[1])
        end = min(int(wanted[2]) if wanted[2] else len(found.data) - 1, len(found.data) - 1)
        if start > end:
            self._error(416, "InvalidRange")
            return
        span = f"bytes {start}-{end}/{len(found.data)}"
        self._answer(206, found.data[start : end + 1], Content_Range=span, ETag=_etag(found.data))

    def _put(self, fake: FakeS3, seen: Seen, body: bytes) -> None:
        if "uploadId" in seen.query:
            with fake.lock:
                parts = fake.uploads.get(seen.query["uploadId"])
                if parts is not None:
                    parts[int(seen.query["partNumber"])] = body
            if parts is None:
                self._error(404, "NoSuchUpload")
            else:
                self._answer(200, ETag=_etag(body))
            return
        if "/" in seen.path:
            with fake.lock:
                fake.objects[seen.path] = Object(body, seen.headers)
        self._answer(200, ETag=_etag(body))

    def _post(self, fake: FakeS3, seen: Seen, body: bytes) -> None:
        bucket, _, key = seen.path.partition("/")
        if "uploads" in seen.query:
            upload = uuid.uuid4().hex
            with fake.lock:
                fake.uploads[upload] = {}
            text = (
                f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}</Key>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
            self._answer(200, text.encode(), Content_Type="application/xml")
            return
        with fake.lock:
            parts = fake.uploads.pop(seen.query.get("uploadId", ""), None)
        if parts is None:
            self._error(404, "NoSuchUpload")
            return
        listed = [
            int(part.text or 0) for part in ElementTree.fromstring(body).iter() if part.tag.endswith("PartNumber")
        ]
        data = b"".join(parts[number] for number in listed)
        with fake.lock:
            fake.objects[seen.path] = Object(data, seen.headers)
        text = (
            f"<CompleteMultipartUploadResult><Location>x</Location><Bucket>{bucket}</Bucket><Key>{key}</Key>"
            f"<ETag>{_etag(data)}</ETag></CompleteMultipartUploadResult>"
        )
        self._answer(200, text.encode(), Content_Type="application/xml")

    def _delete(self, fake: FakeS3, seen: Seen, body: bytes) -> None:
        with fake.lock:
            if "uploadId" in seen.query:
                fake.uploads.pop(seen.query["uploadId"], None)
            else:
                fake.objects.pop(seen.path, None)
        self._answer(204)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def properties(endpoint: str, **more: str) -> dict[str, str]:
    """Of a storage backend of type s3, as a master tells them."""
    return {
        "aws_access_key_id": ACCESS_KEY,
        "aws_secret_access_key": SECRET_KEY,
        "region": REGION,
        "bucket": BUCKET,
        "endpoint": endpoint,
        "storage_class": "",
        **more,
    }


# ------------------------------------------------------------------------------------------------- upstream's gateway


class GoS3:
    """A `weed server` with its S3 gateway, with BUCKET made. close() kills it, start() brings it back on its port."""

    def __init__(self, weed: str, directory: Path) -> None:
        self._weed = weed
        self.directory = directory
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir(parents=True)
        identity = {
            "name": "t",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = {name: free_port() for name in ("master", "volume", "filer")}
        self._grpc = {name: free_port() for name in ("master", "volume", "filer", "s3")}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def properties(self, **more: str) -> dict[str, str]:
        return properties(self.endpoint, **more)

    def start(self) -> Self:
        """Raises AssertionError when the gateway does not answer in time."""
        arguments = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.directory / 'data'}", "-s3", "-filer"]
        arguments += [f"-s3.port={self.port}", f"-s3.config={self.directory / 's3.json'}", "-volume.max=20"]
        arguments += ["-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0", f"-s3.port.grpc={self._grpc['s3']}"]
        arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false"]
        for name, port in self._ports.items():
            arguments += [f"-{name}.port={port}", f"-{name}.port.grpc={self._grpc[name]}"]
        with (self.directory / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._weed, "server", *arguments], stdout=log, stderr=log, cwd=self.directory, env=_plain_environment()
            )
        from minio import Minio

        client = Minio(f"127.0.0.1:{self.port}", ACCESS_KEY, SECRET_KEY, secure=False, region=REGION)
        deadline = time.monotonic() + START_S
        while True:
            try:
                if not client.bucket_exists(BUCKET):
                    client.make_bucket(BUCKET)
                return self
            except Exception as exc:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    log_text = (self.directory / "weed.log").read_text()[-3000:]
                    raise AssertionError(f"no S3 gateway: {exc}\n{log_text}") from exc
                time.sleep(0.1)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}


def weed_binary() -> str | None:
    """Upstream's program, if there is one to test with."""
    weed = os.environ.get("WEED_BIN", "")
    return shutil.which(weed) if weed else None


def any_s3(directory: Path) -> Iterator[FakeS3 | GoS3]:
    """Body of a fixture: upstream's gateway if there is one, else the server of this process."""
    weed = weed_binary()
    with FakeS3() if weed is None else GoS3(weed, directory) as server:
        yield server
