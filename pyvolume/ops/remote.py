"""Reads of remote stores into needles: FetchAndWriteNeedle (contract replication-tiering.md C). Must not import server.

What is read, from where, with whose keys and to which replicas, all comes from the request; so endpoints and replicas
pass `endpoint_guard`, and the size is held against what a needle may hold before a byte is allocated. Upstream:
`weed/server/volume_grpc_remote.go`, `weed/remote_storage`.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import ipaddress
import logging
import os
import random
import re
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import SplitResult, quote

from pyvolume.errors import PyvolumeError
from pyvolume.ops import endpoint_guard, gojson, replicate
from pyvolume.ops.context import Events, Helpers
from pyvolume.ops.endpoint_guard import EndpointRefused, Rule
from pyvolume.ops.gourl import SplitUrl, split_url
from pyvolume.ops.peers import Cancel, PeerClient, PeerError
from pyvolume.storage.volume import FLAG_HAS_LAST_MODIFIED, NeedleIn
from pyvolume.types import format_key_cookie, go_quote
from pyvolume.version import VERSION

if TYPE_CHECKING:
    from pyvolume._native.http import MimeTable
    from pyvolume.storage.store import Store
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

MAX_NEEDLE_DATA_BYTES: Final = (1 << 31) - 64
"""What a needle may hold, its other fields aside: its Size is a signed 32 bit number."""
MAX_BYTES_AT_ONCE: Final = 256 << 20
"""Data of all fetches under way; one that is larger than that runs alone."""
FETCH_LIMIT_S: Final = 600.0
"""For one call, whatever the client's deadline."""
MAX_CLIENTS: Final = 16
MAX_REPLICA_THREADS: Final = 32
UPLOAD_ATTEMPTS: Final = 3
UPLOAD_PAUSE_S: Final = 0.237
"""Times the number of the attempt, before the second and third."""
READ_ATTEMPTS: Final = 4
CREDENTIALS_TIMEOUT_S: Final = 5.0
_PIECE: Final = 1 << 16
_ERROR_BYTES: Final = 1 << 16
_EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()


class RemoteError(PyvolumeError):
    """A remote store cannot be read; `str()` is upstream's text."""


class InvalidField(PyvolumeError):
    """A request that upstream's process dies of, or that names what cannot be (departure A4); the text names the
    field."""


class Job:
    """One call under way: its end by the client or by the clock, seen by everything that waits for it."""

    def __init__(self, limit_s: float = FETCH_LIMIT_S) -> None:
        self.cancel = Cancel()
        self._ended = threading.Event()
        self._deadline = time.monotonic() + limit_s
        self._timer = threading.Timer(limit_s, self.end)
        self._timer.daemon = True

    def __enter__(self) -> Job:
        self._timer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    def end(self) -> None:
        """Nobody waits for the result any more. From any thread, idempotent."""
        self._ended.set()
        self.cancel.cancel()

    def check(self) -> None:
        """Raises RemoteError once the job has ended."""
        if time.monotonic() >= self._deadline:
            raise RemoteError("context deadline exceeded")
        if self._ended.is_set():
            raise RemoteError("context canceled")

    def sleep(self, seconds: float) -> None:
        """Raises RemoteError when the job ends meanwhile."""
        self._ended.wait(seconds)
        self.check()

    @property
    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


class Room:
    """Bytes that may be in memory at a time. Who asks for more than there ever is waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int, job: Job) -> Iterator[None]:
        """Holds `count` bytes in the block; waits for them. Raises RemoteError when the job ends first."""
        with self._changed:
            while self._taken and self._taken + count > self._limit:
                job.check()
                self._changed.wait(min(0.25, job.left_s))
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Place:
    """An object of a store."""

    bucket: str
    path: str  # begins with a slash

    @property
    def key(self) -> str:
        return self.path[1:]

    def __str__(self) -> str:
        return self.bucket + self.path


class Client(Protocol):
    """A way to one remote store. Thread-safe."""

    def read(self, place: Place, offset: int, size: int, job: Job) -> bytes | bytearray:
        """[offset, offset + size) of an object, exactly. Raises RemoteError, EndpointRefused."""

    def close(self) -> None:
        """Closes idle connections; requests under way go on."""


# -------------------------------------------------------------------------------------------------------- fetching


class Fetcher:
    """FetchAndWriteNeedle of one server. Thread-safe.

    tls and source_ip: as for PeerClient, for the replicas. store_tls: the context for https to stores, None for the
    system's authorities.
    """

    def __init__(
        self,
        store: Store,
        mime: MimeTable,
        events: Events,
        *,
        allow_untrusted: bool,
        tls: Callable[[], ssl.SSLContext] | None = None,
        source_ip: str | None = None,
        store_tls: ssl.SSLContext | None = None,
    ) -> None:
        self._store = store
        self._mime = mime
        self._events = events
        self._guarded = not allow_untrusted
        self._store_tls = store_tls
        self._peers = PeerClient(tls, source_ip, guarded=self._guarded)
        self._pool = Helpers(MAX_REPLICA_THREADS)
        self._room = Room(MAX_BYTES_AT_ONCE)
        self._lock = threading.Lock()
        self._clients: OrderedDict[tuple[bool, bytes], Client] = OrderedDict()

    def fetch_and_write(self, request: Any, request_id: str, job: Job) -> str:
        """Does what a FetchAndWriteNeedleRequest says; the entity tag of the needle. Raises PyvolumeError with the
        text for the client, InvalidField for INVALID_ARGUMENT. Blocks on the network and on disk.

        Quirk: when a replica fails the call fails, but the needle stays, here and on other replicas.
        """
        volume = self._store.find_volume(request.volume_id)
        if volume is None:
            raise RemoteError(f"not found volume id {request.volume_id}")
        if not request.HasField("remote_conf"):
            raise InvalidField("remote_conf is missing")
        client = self._client(request.remote_conf)
        if not request.HasField("remote_location"):
            raise InvalidField("remote_location is missing")
        place = Place(request.remote_location.bucket, request.remote_location.path)
        if not place.path:
            raise InvalidField("remote_location: path is empty")
        if not 0 <= request.size <= MAX_NEEDLE_DATA_BYTES:
            raise InvalidField(f"size: a needle cannot hold {request.size} bytes")
        if request.offset < 0:
            raise InvalidField(f"offset: {request.offset} is before the begin of the object")
        with self._room.taken(request.size, job):
            data = self._read(client, request, place, job)
            self._check_replicas(request, job)
            return self._write(volume, request, data, request_id, job)

    def _read(self, client: Client, request: Any, place: Place, job: Job) -> bytes | bytearray:
        shown = _show_location(request.remote_location)
        try:
            job.check()
            data = client.read(place, request.offset, request.size, job)
        except (RemoteError, EndpointRefused) as exc:
            raise RemoteError(f"read from remote {shown}: {exc}") from exc
        if len(data) != request.size:
            raise RemoteError(f"read from remote {shown}: got {len(data)} bytes, want {request.size}")
        return data

    def _check_replicas(self, request: Any, job: Job) -> None:
        if not self._guarded:
            return
        for replica in request.replicas:
            job.check()
            try:
                endpoint_guard.check_replica(replica.url)
            except EndpointRefused as exc:
                raise RemoteError(f"reject replica target: {exc}") from exc

    def _write(self, volume: Volume, request: Any, data: bytes | bytearray, request_id: str, job: Job) -> str:
        """Writes here and uploads to all replicas at once; waits for all. The local failure wins."""
        upload = partial(self._upload, request, data, request_id, job)
        uploads: list[Future[None]] = [self._pool.submit(partial(upload, replica.url)) for replica in request.replicas]
        failure: PyvolumeError | None = None
        checksum = 0
        try:
            needle = NeedleIn(request.needle_id, request.cookie, data, FLAG_HAS_LAST_MODIFIED)
            needle.last_modified_s = int(time.time())
            checksum = volume.write_needle(needle, check_cookie=True, fsync=False).checksum
        except PyvolumeError as exc:
            failure = RemoteError(f"local write needle {request.needle_id} size {request.size}: {exc}")
        for future in uploads:
            try:
                future.result()
            except PyvolumeError as exc:
                failure = failure or exc
        if failure is not None:
            raise failure
        return f"{checksum:08x}"

    def _upload(self, request: Any, data: bytes | bytearray, request_id: str, job: Job, host: str) -> None:
        fid = f"{request.volume_id},{format_key_cookie(request.needle_id, request.cookie)}"
        needle = replicate.ReplicaWrite(
            path=f"/{fid}".encode(), data=data, token=request.auth, request_id=request_id, last_modified_s=0
        )
        for attempt in range(1, UPLOAD_ATTEMPTS + 1):
            try:
                job.check()
                replicate.upload(
                    self._peers, self._mime, self._events, host, f"/{fid}?type=replicate", needle, job.cancel
                )
                return
            except PyvolumeError as exc:
                if attempt == UPLOAD_ATTEMPTS or not isinstance(exc, PeerError) or job.cancel.cancelled:
                    text = f"remote write needle {request.needle_id} size {request.size}: {exc}"
                    raise RemoteError(text) from exc
                log.warning("uploading %d to %s: %s", attempt - 1, host, exc)
            job.sleep(UPLOAD_PAUSE_S * (attempt + 1))

    # -- clients --------------------------------------------------------------------------------------------------

    def _client(self, conf: Any) -> Client:
        """The way to the store of a RemoteConf. Endpoint and credentials are looked at for every call; the client is
        kept, since its connections lead to addresses that were checked when they were dialled."""
        rule = None
        if self._guarded:
            if conf.type == "gcs":
                try:
                    check_gcs_credentials(conf.gcs_google_application_credentials)
                except RemoteError as exc:
                    raise RemoteError(f"reject remote credentials: {exc}") from exc
            endpoint = guarded_endpoint(conf)
            if endpoint is not None:
                try:
                    endpoint_guard.check_endpoint(endpoint)
                except EndpointRefused as exc:
                    raise RemoteError(f"reject remote endpoint: {exc}") from exc
                rule = Rule(endpoint)
        key = (rule is not None, conf.SerializeToString(deterministic=True))
        with self._lock:
            client = self._clients.get(key)
            if client is not None:
                self._clients.move_to_end(key)
                return client
        try:
            made = make_client(conf, rule, self._store_tls)
        except RemoteError as exc:
            where = "" if rule is not None else f"make remote storage client {conf.name}: "
            raise RemoteError(f"get remote client: {where}{exc}") from exc
        with self._lock:
            client = self._clients.setdefault(key, made)
            surplus = [made] if client is not made else []
            while len(self._clients) > MAX_CLIENTS:
                surplus.append(self._clients.popitem(last=False)[1])
        for unused in surplus:
            unused.close()
        return client

    def close(self) -> None:
        """Closes idle connections and lets the helpers end. Idempotent."""
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close()
        self._pool.close()
        self._peers.close()


def _show_location(location: Any) -> str:
    """A RemoteStorageLocation as upstream prints it."""
    shown = [f"{field.name}:{_show_value(value)}" for field, value in location.ListFields()]
    return " ".join(shown)


def _show_value(value: Any) -> str:
    return go_quote(value) if isinstance(value, str) else str(value)


# ------------------------------------------------------------------------------------------------- kinds of stores


@dataclass(frozen=True, slots=True)
class S3Options:
    """How a store that speaks S3 is asked."""

    endpoint: str
    region: str
    access_key: str
    secret_key: str
    path_style: bool = False
    anonymous_without_keys: bool = False


def s3_options(conf: Any) -> S3Options | None:
    """The settings of an S3-speaking kind of store; None for another kind."""
    match conf.type:
        case "s3":
            return S3Options(
                conf.s3_endpoint,
                conf.s3_region,
                conf.s3_access_key,
                conf.s3_secret_key,
                conf.s3_force_path_style,
                anonymous_without_keys=True,
            )
        case "aliyun":
            keys = _keys(conf, "aliyun", "ALICLOUD_ACCESS_KEY_ID", "ALICLOUD_ACCESS_KEY_SECRET")
            return S3Options(conf.aliyun_endpoint, conf.aliyun_region, *keys)
        case "b2":
            keys = (conf.backblaze_key_id, conf.backblaze_application_key)
            return S3Options(conf.backblaze_endpoint, conf.backblaze_region, *keys, path_style=True)
        case "baidu":
            keys = _keys(conf, "baidu", "BDCLOUD_ACCESS_KEY", "BDCLOUD_SECRET_KEY")
            return S3Options(conf.baidu_endpoint, conf.baidu_region, *keys)
        case "contabo":
            keys = _keys(conf, "contabo", "ACCESS_KEY", "SECRET_KEY")
            return S3Options(conf.contabo_endpoint, conf.contabo_region, *keys, path_style=True)
        case "filebase":
            keys = _keys(conf, "filebase", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            return S3Options(conf.filebase_endpoint, "us-east-1", *keys, path_style=True)
        case "storj":
            keys = _keys(conf, "storj", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            return S3Options(conf.storj_endpoint, "us-west-2", *keys, path_style=True)
        case "tencent":
            keys = (
                conf.tencent_secret_id or os.environ.get("COS_SECRETID", ""),
                conf.tencent_secret_key or os.environ.get("COS_SECRETKEY", ""),
            )
            return S3Options(conf.tencent_endpoint, "us-west-2", *keys, path_style=True)
        case "wasabi":
            keys = (conf.wasabi_access_key, conf.wasabi_secret_key)
            return S3Options(conf.wasabi_endpoint, conf.wasabi_region, *keys, path_style=True)
    return None


def _keys(conf: Any, kind: str, access_name: str, secret_name: str) -> tuple[str, str]:
    """The two keys of a kind, from the environment where the request has none."""
    return (
        getattr(conf, f"{kind}_access_key") or os.environ.get(access_name, ""),
        getattr(conf, f"{kind}_secret_key") or os.environ.get(secret_name, ""),
    )


GCS_TOKEN_ENDPOINT: Final = "https://oauth2.googleapis.com/token"
GCS_STATIC_TYPES: Final = ("service_account", "authorized_user")
"""Credentials that hold their own key. All other types have the library read a URL, a file or a program's output."""


def parse_gcs_credentials(text: str) -> tuple[str, str]:
    """(type, token URL) of credentials in JSON. Raises RemoteError."""
    try:
        document = gojson.loads(text.encode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as exc:
        raise RemoteError(f"parse gcs credentials: {exc}") from None
    if document is not None and not isinstance(document, dict):
        kind = "array" if isinstance(document, list) else "string" if isinstance(document, str) else "number"
        raise RemoteError(f"parse gcs credentials: json: cannot unmarshal {kind} into Go value of type struct")
    found = []
    for name in ("type", "token_uri"):
        value = (document or {}).get(name)
        if value is not None and not isinstance(value, str):
            kind = {bool: "bool", dict: "object", list: "array"}.get(type(value), "number")
            text = f"json: cannot unmarshal {kind} into Go struct field .{name} of type string"
            raise RemoteError(f"parse gcs credentials: {text}")
        found.append(value or "")
    return found[0], found[1] or GCS_TOKEN_ENDPOINT


def check_gcs_credentials(text: str) -> None:
    """Raises RemoteError unless the credentials are absent, or inline and self-contained."""
    if not text:
        return
    if not text.startswith("{"):
        raise RemoteError("gcs credentials must be inline JSON")
    kind, _ = parse_gcs_credentials(text)
    if kind not in GCS_STATIC_TYPES:
        raise RemoteError(f"gcs credential type {go_quote(kind)} is not accepted here")


def guarded_endpoint(conf: Any) -> str | None:
    """The URL of the request that would be dialled; None where nothing of it steers the destination."""
    options = s3_options(conf)
    if options is not None:
        return options.endpoint
    if conf.type == "azure" and conf.azure_endpoint:
        return str(conf.azure_endpoint)
    if conf.type == "gcs" and conf.gcs_google_application_credentials:
        return parse_gcs_credentials(conf.gcs_google_application_credentials)[1]
    return None


def make_client(conf: Any, rule: Rule | None, tls: ssl.SSLContext | None = None) -> Client:
    """The client for a RemoteConf. rule: what its connections are held to. Raises RemoteError."""
    options = s3_options(conf)
    if options is not None:
        return S3Client(options, rule, tls)
    if conf.type not in ("gcs", "azure"):
        raise RemoteError(f"remote storage type {conf.type} not found")
    from pyvolume.ops import remote_cloud

    make = remote_cloud.make_gcs if conf.type == "gcs" else remote_cloud.make_azure
    return make(conf, rule)


# -------------------------------------------------------------------------------------------------------------- S3

_DNS_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_XML_FIELD = re.compile(rb"<(Code|Message|RequestId|HostId)>(.*?)</\1>", re.DOTALL)
_THROTTLED = re.compile("SlowDown|Throttl|LimitExceeded|TooManyRequests|PriorRequestNotComplete")
_RANGE = re.compile(r"bytes (\d+)-\d+/")


class S3Client:
    """Ranged reads of a store that speaks S3, signed by minio's signer. The library's own client is not used: it
    refuses endpoints with a path, and asks for the bucket's region first."""

    def __init__(self, options: S3Options, rule: Rule | None, tls: ssl.SSLContext | None = None) -> None:
        from pyvolume.ops import remote_http

        self._options = options
        endpoint = options.endpoint or _amazon(options.region)
        if "://" not in endpoint:
            endpoint = f"https://{endpoint}"
        try:
            self._url: SplitUrl = split_url(endpoint)
        except ValueError as exc:
            raise RemoteError(str(exc)) from None
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise RemoteError(f"remote endpoint {go_quote(endpoint)} is no URL of a store")
        self._http = remote_http
        self._manager = remote_http.make_manager(rule, endpoint, tls)
        self._credentials: Callable[[], Any] | None = None
        self._credentials_lock = threading.Lock()

    def read(self, place: Place, offset: int, size: int, job: Job) -> bytearray:
        """Asks up to READ_ATTEMPTS times, with growing pauses, where trying again may help."""
        if not self._options.region:
            raise RemoteError(_failed(place, "MissingRegion: could not find region configuration"))
        missing = "Bucket" if not place.bucket else "Key" if not place.key else ""
        if missing:
            text = "InvalidParameter: 1 validation error(s) found.\n"
            text += f"- minimum field size of 1, GetObjectInput.{missing}.\n"
            raise RemoteError(_failed(place, text))
        attempt = 1
        while True:
            try:
                with self._http.cut_by(job.cancel):
                    return self._get(place, offset, size, job)
            except _TryAgain as exc:
                if attempt == READ_ATTEMPTS:
                    raise RemoteError(_failed(place, str(exc))) from exc
                least_s = 0.5 if exc.throttled else 0.03
            job.sleep(least_s * (1 + random.random()) * 2 ** (attempt - 1))
            attempt += 1

    def _get(self, place: Place, offset: int, size: int, job: Job) -> bytearray:
        """One request. Raises _TryAgain, RemoteError, EndpointRefused."""
        host, path = self._target(place)
        port = int(self._url.port) if self._url.port else (443 if self._url.scheme == "https" else 80)
        bare = f"[{host}]" if ":" in host else host
        shown = f"{self._url.scheme}://{bare}{':' + self._url.port if self._url.port else ''}{path}"
        headers = {
            "Host": f"{bare}:{self._url.port}" if self._url.port else bare,
            "User-Agent": f"SeaweedFS/{VERSION} S3Manager",
            "Accept-Encoding": "identity",
            "Range": f"bytes={offset}-{offset + size - 1}",
        }
        self._sign(place, path, headers)
        http = self._http
        try:
            pool = self._manager.connection_from_host(host, port, self._url.scheme)
            response = pool.urlopen("GET", path, headers=headers, redirect=False, preload_content=False, retries=False)
        except (*http.FAILURES, ValueError, EndpointRefused, http.Cut) as exc:
            job.check()
            text = f'RequestError: send request failed\ncaused by: Get "{shown}": {_dial_text(host, port, exc)}'
            if not isinstance(exc, http.FAILURES):
                raise RemoteError(_failed(place, text)) from exc
            raise _TryAgain(text) from exc
        try:
            if response.status not in (200, 206):
                raise self._refusal(place, response)
            return self._body(place, response, offset, size, job)
        except http.FAILURES as exc:
            job.check()
            raise _TryAgain(http.reason(exc)) from exc
        finally:
            _end(response)

    def _target(self, place: Place) -> tuple[str, str]:
        """Host and encoded path of an object: the bucket in the path, or in the name where that is asked for and can
        be."""
        base = self._url.path.rstrip("/")
        key = quote(place.key, safe="/~")
        host = self._url.host
        in_name = (
            not self._options.path_style
            and _DNS_BUCKET.fullmatch(place.bucket) is not None
            and ".." not in place.bucket
            and not (self._url.scheme == "https" and "." in place.bucket)
            and not _is_address(host)
        )
        if in_name:
            return f"{place.bucket}.{host}", f"{base}/{key}"
        return host, f"{base}/{quote(place.bucket, safe='~')}/{key}"

    def _sign(self, place: Place, path: str, headers: dict[str, str]) -> None:
        options = self._options
        if options.access_key and options.secret_key:
            from minio.credentials import Credentials

            keys = Credentials(options.access_key, options.secret_key)
        elif options.anonymous_without_keys and not options.access_key and not options.secret_key:
            return
        else:
            keys = self._from_environment(place)
        from minio.signer import sign_v4_s3

        now = datetime.now(UTC)
        signed = {
            "Host": headers["Host"],
            "Range": headers["Range"],
            "X-Amz-Content-Sha256": _EMPTY_SHA256,
            "X-Amz-Date": now.strftime("%Y%m%dT%H%M%SZ"),
        }
        if keys.session_token:
            signed["X-Amz-Security-Token"] = keys.session_token
        sign_v4_s3(
            method="GET",
            url=SplitResult("", "", path, "", ""),
            region=options.region,
            headers=signed,
            credentials=keys,
            content_sha256=_EMPTY_SHA256,
            date=now,
        )
        headers.update(signed)

    def _from_environment(self, place: Place) -> Any:
        """Amazon's chain: variables, the shared file, the role of the machine. Raises RemoteError."""
        from minio.credentials import providers

        with self._credentials_lock:
            if self._credentials is None:
                role_http = self._http.role_http(CREDENTIALS_TIMEOUT_S)
                chain = [
                    providers.EnvAWSProvider(),
                    providers.AWSConfigProvider(),
                    providers.IamAwsProvider(http_client=role_http),
                ]
                self._credentials = providers.ChainedProvider(chain).retrieve
            try:
                return self._credentials()
            except Exception as exc:  # whatever a provider ran into
                log.info("no credentials for %s: %s", self._options.endpoint, exc)
        text = "NoCredentialProviders: no valid providers in chain. Deprecated.\n\t"
        text += "For verbose messaging see aws.Config.CredentialsChainVerboseErrors"
        raise RemoteError(_failed(place, text))

    def _refusal(self, place: Place, response: Any) -> PyvolumeError:
        """What a status other than success means: an exception to raise."""
        raw = response.read(_ERROR_BYTES, decode_content=False) or b""
        found = {name: html.unescape(value.decode("utf-8", "replace")) for name, value in _XML_FIELD.findall(raw)}
        code = found.get(b"Code", "")
        text = f"{code}: {found.get(b'Message', '')}"
        if not code:
            code = "SerializationError"
            text = f"{code}: failed to unmarshal error message"
        request_id = response.headers.get("x-amz-request-id", "")
        text += f"\n\tstatus code: {response.status}, request id: {request_id}"
        text += f", host id: {response.headers.get('x-amz-id-2', '')}"
        throttled = _THROTTLED.search(code) is not None or response.status == 429
        if throttled or response.status >= 500 or code in ("RequestTimeout", "RequestTimeoutException"):
            return _TryAgain(text, throttled=throttled)
        return RemoteError(_failed(place, text))

    def _body(self, place: Place, response: Any, offset: int, size: int, job: Job) -> bytearray:
        """The body, which must be the range asked for. A longer one is told by its announced length, or by the first
        byte too many: memory is taken for `size` bytes only."""
        announced = response.headers.get("Content-Length")
        if announced is not None and announced.isdecimal() and int(announced) != size:
            raise RemoteError(_short(place, offset, int(announced), size))
        found = _RANGE.match(response.headers.get("Content-Range", ""))
        if (int(found[1]) if found else 0 if response.status == 200 else offset) != offset:
            # upstream takes such bytes for those asked for
            raise RemoteError(_failed(place, "the store answered with another range than the one asked for"))
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while piece := response.read1(_PIECE, decode_content=False):
            job.check()
            if done + len(piece) > size:
                raise RemoteError(_short(place, offset, done + len(piece), size))
            view[done : done + len(piece)] = piece
            done += len(piece)
        job.check()
        if done != size:
            if announced is not None:
                raise _TryAgain("unexpected EOF")
            raise RemoteError(_short(place, offset, done, size))
        return data

    def close(self) -> None:
        self._manager.clear()


class _TryAgain(PyvolumeError):
    """A request that failed in a way that may pass; `str()` is the reason."""

    def __init__(self, text: str, *, throttled: bool = False) -> None:
        super().__init__(text)
        self.throttled = throttled


def _end(response: Any) -> None:
    """Gives the connection back if the body was read to its end, else closes it."""
    if not response.isclosed():
        response.close()
    response.release_conn()


def _amazon(region: str) -> str:
    """Where Amazon keeps S3 in a region."""
    place = "s3" if region in ("", "us-east-1") else f"s3.{region}"
    return f"https://{place}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _failed(place: Place, why: str) -> str:
    return f"failed to download file {place}: {why}"


def _short(place: Place, offset: int, got: int, want: int) -> str:
    return f"short read from {place} at offset {offset}: got {got} bytes, want {want}"


def _dial_text(host: str, port: int, exc: BaseException) -> str:
    from pyvolume.ops import remote_http

    text = remote_http.reason(exc)
    if text == "no such host":
        return f"dial tcp: lookup {host}: {text}"
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"dial tcp {at}: connect: {text}" if text in ("connection refused", "network is unreachable") else text
