"""Reads of Google's and Azure's stores with their own client libraries, which are optional extras: `pyvolume[gcs]`,
`pyvolume[azure]`.

Both run over requests, whose connections are those of `remote_http`: guarded at each dial, cut with their job. Imported
on first use. Must not import storage or server. Upstream: `weed/remote_storage/gcs`, `weed/remote_storage/azure`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
import os
import re
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvolume.errors import PyvolumeError
from pyvolume.ops.endpoint_guard import EndpointRefused, Rule
from pyvolume.ops.gourl import split_url
from pyvolume.ops.remote import GCS_TOKEN_ENDPOINT, Job, Place, RemoteError, parse_gcs_credentials
from pyvolume.types import go_quote

if TYPE_CHECKING:
    import requests

READ_BLOCK_BYTES = 4 << 20
RETRY_LIMIT_S = 20.0
GCS_SCOPE = "https://www.googleapis.com/auth/devstorage.full_control"
_ACCOUNT = re.compile("[a-z0-9]{3,24}")


class _Sink(io.RawIOBase):
    """Takes the bytes of an object, no more than were asked for; ends with the job."""

    def __init__(self, size: int, job: Job) -> None:
        super().__init__()
        self.data = bytearray(size)
        self.done = 0
        self._job = job

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self._job.check()
        count = len(piece)
        if self.done + count > len(self.data):
            raise RemoteError(f"more than the {len(self.data)} bytes asked for")
        self.data[self.done : self.done + count] = piece
        self.done += count
        return count


def _session(rule: Rule | None) -> requests.Session:
    """A session of requests whose connections are ours. With a rule nothing of the environment counts: no proxy, no
    .netrc."""
    import requests
    from requests.adapters import HTTPAdapter

    from pyvolume.ops import remote_http

    class Adapter(HTTPAdapter):  # type: ignore[misc]
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            self.poolmanager = remote_http.make_manager(rule)

    session = requests.Session()
    _prepare(session, Adapter(), rule)
    return session


def _prepare(session: requests.Session, adapter: Any, rule: Rule | None) -> None:
    session.trust_env = rule is None
    session.verify = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile or True
    session.mount("https://", adapter)
    session.mount("http://", adapter)


class _CloudClient:
    """Reads through a function that puts a range of an object into a sink."""

    def __init__(self, fetch: Callable[[Place, int, int, _Sink], None], session: requests.Session) -> None:
        self._fetch = fetch
        self._session = session

    def read(self, place: Place, offset: int, size: int, job: Job) -> bytes | bytearray:
        """[offset, offset + size) of an object; retries are the library's. Raises RemoteError, EndpointRefused."""
        from pyvolume.ops import remote_http

        if not size:
            return b""
        sink = _Sink(size, job)
        try:
            with remote_http.cut_by(job.cancel):
                self._fetch(place, offset, size, sink)
        except EndpointRefused:
            raise
        except Exception as exc:  # of the library, of requests, of urllib3
            job.check()
            raise RemoteError(f"failed to download file {place}: {exc}") from exc
        if sink.done != size:
            raise RemoteError(f"short read from {place} at offset {offset}: got {sink.done} bytes, want {size}")
        return sink.data

    def close(self) -> None:
        self._session.close()


def _missing(kind: str, extra: str, exc: ImportError) -> RemoteError:
    text = f"remote storage type {kind} needs the optional dependency pyvolume[{extra}]: {exc}"
    return RemoteError(text)


# ---------------------------------------------------------------------------------------------------------- Google


def make_gcs(conf: Any, rule: Rule | None) -> _CloudClient:
    """The client of a RemoteConf of type gcs; without credentials in it those of the environment are used. Raises
    RemoteError."""
    try:
        from google.auth.transport.requests import AuthorizedSession, Request
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
    except ImportError as exc:
        raise _missing("gcs", "gcs", exc) from exc
    text = conf.gcs_google_application_credentials or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    project = conf.gcs_project_id or os.environ.get("GOOGLE_CLOUD_PROJECT") or None
    plain = _session(rule)
    try:
        credentials = _gcs_credentials(_gcs_document(text) if text else None)
        authorized = AuthorizedSession(credentials, auth_request=Request(session=plain))
        _prepare(authorized, plain.get_adapter("https://"), rule)
        client = storage.Client(project=project or "none", credentials=credentials, _http=authorized)
    except PyvolumeError:
        raise
    except Exception as exc:  # whatever the library makes of the credentials
        raise RemoteError(f"failed to parse credentials: {exc}") from exc

    def fetch(place: Place, offset: int, size: int, sink: _Sink) -> None:
        blob = client.bucket(place.bucket).blob(place.key)
        # raw: unpacking of gzip would break ranges
        blob.download_to_file(
            sink,
            start=offset,
            end=offset + size - 1,
            raw_download=True,
            checksum=None,
            timeout=(10, 60),
            retry=DEFAULT_RETRY.with_timeout(RETRY_LIMIT_S).with_delay(initial=0.2, maximum=2.0),
        )

    return _CloudClient(fetch, authorized)


def _gcs_document(text: str) -> dict[str, Any]:
    """The credentials, inline or in a file (of the environment; the guard lets no path through from a request)."""
    if not text.startswith("{"):
        path = os.path.expanduser(text)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, ValueError) as exc:
            raise RemoteError(f"failed to read credentials file {path}: {exc}") from exc
    _, token_url = parse_gcs_credentials(text)
    document: dict[str, Any] = json.loads(text)
    document["token_uri"] = token_url or GCS_TOKEN_ENDPOINT
    return document


def _gcs_credentials(document: dict[str, Any] | None) -> Any:
    import google.auth
    from google.oauth2 import credentials, service_account

    if document is None:
        return google.auth.default(scopes=[GCS_SCOPE])[0]
    if document.get("type") == "service_account":
        return service_account.Credentials.from_service_account_info(document, scopes=[GCS_SCOPE])
    if document.get("type") == "authorized_user":
        names = ("client_id", "client_secret", "refresh_token")
        given = {name: document.get(name) for name in names}
        return credentials.Credentials(None, token_uri=document["token_uri"], scopes=[GCS_SCOPE], **given)
    return google.auth.load_credentials_from_dict(document, scopes=[GCS_SCOPE])[0]


# ----------------------------------------------------------------------------------------------------------- Azure


def make_azure(conf: Any, rule: Rule | None) -> _CloudClient:
    """The client of a RemoteConf of type azure; account and key are completed from the environment. Without a key Entra
    ID is used. Raises RemoteError."""
    account = conf.azure_account_name or os.environ.get("AZURE_STORAGE_ACCOUNT", "")
    key = conf.azure_account_key
    if not key and not conf.azure_client_id:  # who names a client asks for Entra ID
        key = os.environ.get("AZURE_STORAGE_ACCESS_KEY", "")
    if not account:
        raise RemoteError("neither azure_account_name nor the AZURE_STORAGE_ACCOUNT environment variable is set")
    if not _ACCOUNT.fullmatch(account):
        text = "expecting 3 to 24 lowercase letters and digits"
        raise RemoteError(f"invalid azure account name {go_quote(account)}: {text}")
    url = _service_url(account, conf.azure_endpoint)
    if key:
        _check_account_key(account, key)
    try:
        from azure.core.pipeline.transport import RequestsTransport
        from azure.storage.blob import BlobServiceClient, ExponentialRetry

        credential = {"account_name": account, "account_key": key} if key else _entra(conf.azure_client_id)
    except ImportError as exc:
        raise _missing("azure", "azure", exc) from exc
    logging.getLogger("azure").setLevel(logging.WARNING)  # it logs each request
    session = _session(rule)
    try:
        service = BlobServiceClient(
            url,
            credential=credential,
            transport=RequestsTransport(
                session=session,
                session_owner=False,
                use_env_settings=rule is None,
                connection_verify=session.verify,
                connection_timeout=10,
                read_timeout=60,
            ),
            max_single_get_size=READ_BLOCK_BYTES,
            max_chunk_get_size=READ_BLOCK_BYTES,
            retry_policy=ExponentialRetry(initial_backoff=1, increment_base=2, retry_total=3, random_jitter_range=0),
        )
    except Exception as exc:
        raise RemoteError(f"failed to create Azure client: {exc}") from exc

    def fetch(place: Place, offset: int, size: int, sink: _Sink) -> None:
        blob = service.get_blob_client(place.bucket, place.key)
        for piece in blob.download_blob(offset=offset, length=size, max_concurrency=1).chunks():
            sink.write(piece)

    return _CloudClient(fetch, session)


def _service_url(account: str, endpoint: str) -> str:
    if not endpoint:
        return f"https://{account}.blob.core.windows.net/"
    try:
        url = split_url(endpoint)
    except ValueError as exc:
        raise RemoteError(f"invalid azure endpoint {go_quote(endpoint)}: {exc}") from None
    if url.scheme != "https" or not url.host:
        text = f"expecting an https service url, such as https://{account}.blob.core.usgovcloudapi.net/"
        raise RemoteError(f"invalid azure endpoint {go_quote(endpoint)}: {text}")
    return endpoint


def _check_account_key(account: str, key: str) -> None:
    try:
        base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        at = next((at for at, ch in enumerate(key) if not (ch.isascii() and (ch.isalnum() or ch in "+/="))), len(key))
        text = f"decode account key: illegal base64 data at input byte {at}"
        raise RemoteError(f"failed to create Azure credential with account name:{account}: {text}") from None


def _entra(client_id: str) -> Any:
    """Workload identity, managed identity or a developer's login, as the environment has it."""
    from azure import identity

    if not client_id:
        return identity.DefaultAzureCredential()
    if os.environ.get("AZURE_FEDERATED_TOKEN_FILE"):
        return identity.WorkloadIdentityCredential(client_id=client_id)
    return identity.ManagedIdentityCredential(client_id=client_id)
