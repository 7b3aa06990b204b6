"""A bucket of an S3 store as a tier: ranged reads, uploads in parts, downloads in ranges.

May import tier.backends and the leaves. The client library is imported with the first request. Upstream:
`weed/storage/backend/s3_backend`.

Time-outs: a read gives up after CONNECT_S and READ_S for each of two tries, a transfer counts only the time in which
nothing moves. At most MAX_READS requests of a store run at a time; more wait for SLOT_WAIT_S.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import ssl
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree

from pyvolume.errors import RemoteError, StorageError, from_os_error
from pyvolume.faults import fault
from pyvolume.storage.tier.backends import TransferStopped, Watcher
from pyvolume.version import VERSION

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_STORAGE_CLASS: Final = "STANDARD_IA"
DEFAULT_REGION: Final = "us-east-1"
PART_BYTES: Final = 64 << 20
MOST_PARTS: Final = 1000
PARALLEL: Final = 5
"""Parts or ranges of one transfer under way at a time."""
PIECE_BYTES: Final = 1 << 20
"""Bytes between two looks at the progress and at the wish to go on."""
SEND_BYTES: Final = 256 << 10
RETRY_WAITS_S: tuple[float, ...] = (1.0, 1.5, 2.25, 3.375, 5.0625)
"""Pauses between attempts of a whole upload."""
CONNECT_S: Final = 5.0
READ_S: Final = 15.0
TRANSFER_SILENCE_S: Final = 30.0
MAX_READS: Final = 32
SLOT_WAIT_S: Final = 30.0
BODY_ATTEMPTS: Final = 3
MAX_UNFINISHED: Final = 100
START_S: Final = 3.0
DISTRUST_S: Final = 10.0
"""How long a store that did not answer while volumes were loaded is not asked again for that."""
USER_AGENT: Final = f"SeaweedFS/{VERSION}"
MANAGED_USER_AGENT: Final = f"{USER_AGENT} S3Manager"

_ABOUT: Final = re.compile(r"HTTPS?Connection(?:Pool)?\(host='([^']*)', port=(\d+)\): ")
_FALSE_TEXTS: Final = ("0", "f", "F", "false", "FALSE", "False")


def part_bytes_for(size: int) -> int:
    """Length of the parts of an upload."""
    part = PART_BYTES
    while part * MOST_PARTS < size:
        part *= 4
    return part


class _FilePart:
    """A stretch of a file as the body of a request: read in pieces, twice (once for its checksum)."""

    def __init__(self, fd: int, start: int, length: int, sent: Callable[[int], None], watcher: Watcher) -> None:
        self._fd = fd
        self._start = start
        self._length = length
        self._sent = sent
        self._watcher = watcher
        self._at = 0

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        return self._length > 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> int:
        self._sent(position - self._at)
        self._at = position
        return position

    def read(self, size: int = -1) -> bytes:
        self._watcher.check()
        piece = self._pread(self._at, self._length - self._at if size < 0 else min(size, self._length - self._at))
        self._at += len(piece)
        self._sent(len(piece))
        return piece

    def sha256(self) -> str:
        digest = hashlib.sha256()
        at = 0
        while at < self._length:
            self._watcher.check()
            piece = self._pread(at, min(PIECE_BYTES, self._length - at))
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()

    def _pread(self, at: int, length: int) -> bytes:
        if not length:
            return b""
        try:
            fault("tier.read")
            piece = os.pread(self._fd, length, self._start + at)
        except OSError as exc:
            raise from_os_error(exc, "read") from exc
        if not piece:
            raise StorageError("the file became shorter while it was uploaded")
        return piece


def _client_class() -> Any:
    from minio import Minio

    class Client(Minio):  # type: ignore[misc]  # untyped
        """Signs the body of a _FilePart by reading it, and says who asks as upstream does."""

        def _build_headers(self, host: str, headers: Any = None, body: Any = None, creds: Any = None) -> Any:
            if not isinstance(body, _FilePart):
                return super()._build_headers(host, headers, body, creds)
            built, date = super()._build_headers(host, dict(headers or {}), None, creds)
            built.pop("Content-MD5", None)
            built["Content-Length"] = str(len(body))
            built["x-amz-content-sha256"] = body.sha256()
            return built, date

    return Client


class S3Backend:
    """See tier.backends.Backend. Thread-safe; nothing is sent before the first call."""

    def __init__(self, id_: str, properties: Mapping[str, str]) -> None:
        """Raises ValueError for an endpoint that is none."""
        self.id = id_
        self.name = f"s3.{id_}"
        self.bucket = properties.get("bucket", "")
        self.storage_class = properties.get("storage_class", "") or DEFAULT_STORAGE_CLASS
        self._access_key = properties.get("aws_access_key_id", "")
        self._secret_key = properties.get("aws_secret_access_key", "")
        self._region = properties.get("region", "") or DEFAULT_REGION
        self._path_style = properties.get("force_path_style", "") not in _FALSE_TEXTS
        endpoint = properties.get("endpoint", "")
        if endpoint and "://" not in endpoint:
            endpoint = f"https://{endpoint}"
        parts = urlsplit(endpoint or f"https://s3.{self._region}.amazonaws.com")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"endpoint {endpoint!r} is no http or https address of a host")
        self._host = parts.netloc
        self._secure = parts.scheme == "https"
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, float, float], Any] = {}
        self._slots = threading.BoundedSemaphore(MAX_READS)
        self._distrusted_until_s = 0.0
        self._unfinished: dict[str, str] = {}
        """Uploads that could not be aborted, and their keys."""

    def __repr__(self) -> str:
        return f"region {self._region} bucket {self.bucket}"

    # ------------------------------------------------------------------------------------------------------- requests

    def _client(self, agent: str, connect_s: float, silence_s: float) -> Any:
        """The client with these time-outs."""
        wanted = agent, connect_s, silence_s
        with self._lock:
            client = self._clients.get(wanted)
            if client is None:
                client = self._clients[wanted] = self._make_client(*wanted)
            return client

    def _make_client(self, agent: str, connect_s: float, silence_s: float) -> Any:
        import urllib3
        from minio import credentials

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry is told otherwise
        tries = 1 if silence_s >= READ_S else 0
        settings: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=connect_s, read=silence_s),
            "maxsize": MAX_READS,
            "blocksize": SEND_BYTES,
            "retries": urllib3.Retry(
                total=3 * tries,
                connect=tries,
                read=tries,
                status=2 * tries,
                redirect=0,
                backoff_factor=0.2,
                status_forcelist=(500, 502, 503, 504),
                raise_on_status=False,
            ),
        }
        if self._secure:
            settings["ssl_context"] = ssl.create_default_context()
        proxy = _proxy_for(self._host, "https" if self._secure else "http")
        pool = urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
        keys: dict[str, Any] = {}
        if self._access_key and self._secret_key:
            keys = {"access_key": self._access_key, "secret_key": self._secret_key}
        else:
            chain = [credentials.EnvAWSProvider(), credentials.AWSConfigProvider(), credentials.IamAwsProvider()]
            keys = {"credentials": credentials.ChainedProvider(chain)}
        client = _client_class()(
            endpoint=self._host, secure=self._secure, region=self._region, http_client=pool, **keys
        )
        client._user_agent = agent
        if self._path_style:
            client.disable_virtual_style_endpoint()
        else:
            client.enable_virtual_style_endpoint()
        return client

    def _reads(self) -> Any:
        return self._client(USER_AGENT, CONNECT_S, READ_S)

    def _transfers(self) -> Any:
        return self._client(MANAGED_USER_AGENT, CONNECT_S, TRANSFER_SILENCE_S)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._slots.acquire(timeout=SLOT_WAIT_S):
            raise RemoteError(f"{MAX_READS} requests to {self.name} are under way", is_transient=True)
        try:
            yield
        finally:
            self._slots.release()

    # -------------------------------------------------------------------------------------------------------- reading

    def read_at(self, key: str, offset: int, length: int) -> memoryview:
        """See Backend. `bucket %s GetObject %s: …`. A body that breaks off is asked for anew from there on."""
        return self._read(self._reads, key, offset, length, BODY_ATTEMPTS)

    def read_start(self, key: str, length: int) -> memoryview:
        """See Backend."""
        if time.monotonic() < self._distrusted_until_s:
            raise RemoteError(self._get_text(key, "the store did not answer a moment ago"), is_transient=True)
        try:
            return self._read(lambda: self._client(USER_AGENT, START_S, START_S), key, 0, length, 1)
        except RemoteError as exc:
            if exc.is_transient:
                self._distrusted_until_s = time.monotonic() + DISTRUST_S
            raise

    def _get_text(self, key: str, reason: object) -> str:
        return f"bucket {self.bucket} GetObject {key}: {reason}"

    def _read(self, client: Callable[[], Any], key: str, offset: int, length: int, attempts: int) -> memoryview:
        key = key.removeprefix("/")
        buf = bytearray(length)
        at = 0

        def take(piece: bytes) -> None:
            nonlocal at
            buf[at : at + len(piece)] = piece
            at += len(piece)

        with self._slot():
            for left in range(attempts - 1, -1, -1):
                try:
                    self._get_range(client(), key, offset + at, length - at, take)
                    self._distrusted_until_s = 0.0
                    break
                except RemoteError as exc:
                    if not left or not exc.is_transient or not exc.in_body:
                        raise RemoteError(self._get_text(key, exc), is_transient=exc.is_transient) from exc
        return memoryview(buf).toreadonly()

    def _get_range(self, client: Any, key: str, offset: int, length: int, take: Callable[[bytes], None]) -> None:
        """Gives take() the bytes of a range, piece by piece. Raises RemoteError, in_body once some may be taken."""
        fault_or_remote("tier.get")
        response = _asked(lambda: client.get_object(self.bucket, key, offset=offset, length=length))
        whole = False
        try:
            if response.status != 206 and offset:
                raise RemoteError(f"the store answers a range with status {response.status}")
            got = 0
            while got < length:
                piece = _asked(partial(response.read, min(PIECE_BYTES, length - got)), in_body=True)
                if not piece:
                    raise RemoteError("unexpected EOF", is_transient=True, in_body=True)
                got += len(piece)
                take(piece)
            whole = response.status == 206
        finally:
            if not whole:
                response.close()
            response.release_conn()

    def size_of(self, key: str) -> int:
        """See Backend."""
        with self._slot():
            return int(_asked(lambda: self._reads().stat_object(self.bucket, key.removeprefix("/"))).size)

    def delete(self, key: str) -> None:
        """See Backend."""
        fault_or_remote("tier.delete")
        with self._slot():
            _asked(lambda: self._reads().remove_object(self.bucket, key.removeprefix("/")))

    # ------------------------------------------------------------------------------------------------------ transfers

    def download(self, key: str, fd: int, size: int, watcher: Watcher) -> None:
        """See Backend. Also raises DiskError."""
        key = key.removeprefix("/")
        progress = _Progress(watcher)

        def fetch(start: int) -> None:
            end = min(start + PART_BYTES, size)
            at = start

            def take(piece: bytes) -> None:
                nonlocal at
                watcher.check()
                _pwrite_all(fd, piece, at)
                at += len(piece)
                progress.add(len(piece))

            for left in range(BODY_ATTEMPTS - 1, -1, -1):
                watcher.check()
                before = at
                try:
                    self._get_range(self._transfers(), key, at, end - at, take)
                    return
                except RemoteError as exc:
                    if not exc.is_transient or (not left and at == before):
                        raise

        _in_parallel(fetch, range(0, size, PART_BYTES))

    def upload(self, path: str, size: int, watcher: Watcher) -> str:
        """See Backend. Also raises DiskError. A store that fails for a moment is tried again, for about 15 s."""
        key = str(uuid.uuid4())
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for wait_s in (*RETRY_WAITS_S, None):
                try:
                    self._upload_once(key, fd, size, watcher)
                    self._abort_unfinished()
                    return key
                except RemoteError as exc:
                    if wait_s is None or not exc.is_transient:
                        raise RemoteError(
                            f"failed to upload file {path}: {exc}", is_transient=exc.is_transient
                        ) from exc
                    log.info("upload of %s to %s failed, again in %g s: %s", path, self.name, wait_s, exc)
                    _pause(wait_s, watcher)
            raise AssertionError("unreachable")
        finally:
            os.close(fd)

    def _upload_once(self, key: str, fd: int, size: int, watcher: Watcher) -> None:
        progress = _Progress(watcher)
        part_bytes = part_bytes_for(size)
        client = self._transfers()
        headers = {"x-amz-storage-class": self.storage_class}
        if size <= part_bytes:
            part = _FilePart(fd, 0, size, progress.add, watcher)
            fault_or_remote("tier.put")
            _asked(lambda: client._put_object(self.bucket, key, part, headers))
            return
        upload = _asked(lambda: client._create_multipart_upload(self.bucket, key, headers))
        from minio.datatypes import Part

        try:

            def send(start: int) -> Any:
                number = start // part_bytes + 1
                part = _FilePart(fd, start, min(part_bytes, size - start), progress.add, watcher)
                where = {"partNumber": str(number), "uploadId": upload}
                fault_or_remote("tier.put")
                return Part(number, _asked(lambda: client._put_object(self.bucket, key, part, None, where)).etag)

            parts = _in_parallel(send, range(0, size, part_bytes))
            watcher.check()
            fault_or_remote("tier.complete")
            _asked(lambda: client._complete_multipart_upload(self.bucket, key, upload, parts))
        except BaseException:
            self._abort(upload, key)
            raise

    def _abort(self, upload: str, key: str) -> None:
        """Removes the parts of an upload. If the store does not answer, that is tried again after the next upload."""
        with self._lock:
            if len(self._unfinished) < MAX_UNFINISHED:
                self._unfinished[upload] = key
        client = self._client(MANAGED_USER_AGENT, START_S, START_S)  # a stop may be waiting for this
        try:
            _asked(lambda: client._abort_multipart_upload(self.bucket, key, upload))
        except RemoteError as exc:
            log.warning("upload %s of %s to %s is left unfinished: %s", upload, key, self.name, exc)
            if exc.is_transient:
                return
        with self._lock:
            self._unfinished.pop(upload, None)

    def _abort_unfinished(self) -> None:
        with self._lock:
            unfinished = list(self._unfinished.items())
        for upload, key in unfinished:
            self._abort(upload, key)


class _Progress:
    """Adds up what the threads of a transfer have done."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._watcher.tell(self._done)


def _in_parallel(work: Callable[[int], T], starts: range) -> list[T]:
    """Results of work for each start, in order, PARALLEL at a time. The first failure ends the rest."""
    failed = threading.Event()

    def run(start: int) -> T:
        if failed.is_set():
            raise TransferStopped
        try:
            return work(start)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(PARALLEL, max(1, len(starts))), thread_name_prefix="tier-part") as pool:
        futures = [pool.submit(run, start) for start in starts]
    causes = [exc for future in futures if (exc := future.exception()) is not None]
    for cause in causes:
        if not isinstance(cause, TransferStopped):
            raise cause
    if causes:
        raise causes[0]
    return [future.result() for future in futures]


def _pwrite_all(fd: int, piece: bytes, at: int) -> None:
    view = memoryview(piece)
    try:
        fault("tier.write")
        while view:
            count = os.pwrite(fd, view, at)
            view, at = view[count:], at + count
    except OSError as exc:
        raise from_os_error(exc, "write") from exc


def _pause(seconds: float, watcher: Watcher) -> None:
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        watcher.check()
        time.sleep(min(left_s, 0.2))


def fault_or_remote(point: str) -> None:
    """A failpoint at a request: an error that is set there looks as if the store could not be reached."""
    try:
        fault(point)
    except OSError as exc:
        raise RemoteError(str(exc), is_transient=True) from exc


def _asked(request: Callable[[], T], *, in_body: bool = False) -> T:
    """Runs a request; whatever the library raises becomes a RemoteError with a short text."""
    import urllib3
    from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

    try:
        return request()
    except S3Error as exc:
        status = getattr(exc.response, "status", 0) if exc.response is not None else 0
        raise RemoteError(f"{exc.code}: {exc.message}", is_transient=status >= 500) from exc
    except ServerError as exc:
        raise RemoteError(str(exc), is_transient=exc.status_code >= 500) from exc
    except InvalidResponseError as exc:
        raise RemoteError(" ".join(str(exc).split()), is_transient=exc._code >= 500) from exc
    except urllib3.exceptions.MaxRetryError as exc:
        raise RemoteError(_short(exc.reason or exc), is_transient=True, in_body=in_body) from exc
    except (urllib3.exceptions.HTTPError, OSError) as exc:
        raise RemoteError(_short(exc), is_transient=True, in_body=in_body) from exc
    except (MinioException, ValueError, ElementTree.ParseError) as exc:
        raise RemoteError(str(exc)) from exc


def _short(exc: BaseException) -> str:
    """The text of an error of the HTTP library, with an address for the object it is about."""
    text = str(exc)
    about = _ABOUT.match(text)
    return text if about is None else f"{about[1]}:{about[2]}: {text[about.end() :]}"


def _proxy_for(host: str, scheme: str) -> str:
    """The proxy that the environment names for a host, as upstream's client goes by it; empty for none."""
    proxy = ""
    with suppress(ValueError):
        name = host.rpartition(":")[0] if ":" in host else host
        if not urllib.request.proxy_bypass(name):
            proxy = urllib.request.getproxies().get(scheme, "")
    return proxy
