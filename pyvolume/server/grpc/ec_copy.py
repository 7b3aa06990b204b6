"""Pulling the files of an erasure coded volume from another server (contract erasure-coding.md 10.2, 10.5).

Must not import http_app or heartbeat. Each file is received under a working name and gets its own when it is whole and
flushed. A journal is not replaced: the deletes in it are added to those that are known here (departure E4).
"""

from __future__ import annotations

import logging
import os
from contextlib import closing
from typing import Any

from pyvolume.errors import PyvolumeError, StorageError, from_os_error
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.address import same_server, with_grpc_port
from pyvolume.server.ec_peers import MAX_JOURNAL_BYTES
from pyvolume.server.grpc import wire
from pyvolume.server.grpc.calls import Call, check_file_part
from pyvolume.server.grpc.copy import peer_address
from pyvolume.server.pull import PeerLink
from pyvolume.server.rpc import RpcFailure
from pyvolume.storage import copy as storage_copy
from pyvolume.storage import files
from pyvolume.storage.compact import RateLimit
from pyvolume.storage.ec import index
from pyvolume.storage.ec.layout import MAX_SHARDS
from pyvolume.types import volume_base_name

log = logging.getLogger(__name__)

LOOKUP_TIMEOUT_S = 60.0
_STOP_OFFSET = (1 << 63) - 1


class _Puller:
    """Fetches files of one EC volume from one server, within one rate limit."""

    def __init__(self, call: Call, peer: PeerLink, collection: str, vid: int, limit: RateLimit) -> None:
        self._call = call
        self._peer = peer
        self._collection = collection
        self._vid = vid
        self._limit = limit

    def fetch(self, base: str, extension: str, *, may_be_missing: bool) -> bool:
        """Fetches one file to `<base><extension>`; false if the source has none, which leaves the old one.

        Raises PyvolumeError.
        """
        path = base + extension
        try:
            return self._fetch(path, extension, may_be_missing)
        except RpcFailure as exc:
            raise PyvolumeError(f"failed to copy {path} file: receiving {path}: {exc}") from exc
        except StorageError as exc:
            raise PyvolumeError(f"failed to copy {path} file: {exc}") from exc

    def _request(self, extension: str, may_be_missing: bool) -> Any:
        return pb.CopyFileRequest(
            volume_id=self._vid,
            ext=extension,
            compaction_revision=storage_copy.ANY_REVISION,
            stop_offset=_STOP_OFFSET,
            collection=self._collection,
            is_ec_volume=True,
            ignore_source_file_not_found=may_be_missing,
        )

    def _fetch(self, path: str, extension: str, may_be_missing: bool) -> bool:
        file = storage_copy.IncomingFile(path, storage_copy.RECEIVING)
        modified_ts_ns = 0
        try:
            with closing(self._peer.pull("CopyFile", self._request(extension, may_be_missing))) as messages:  # type: ignore[type-var]
                for message in messages:
                    modified, content = _parts(message, path)
                    modified_ts_ns = modified or modified_ts_ns
                    file.write(content)
                    self._pause(len(content))
            if modified_ts_ns == 0:
                return False
            file.finish()
            file.place()
            return True
        finally:
            file.discard()

    def fetch_journal(self, base: str) -> None:
        """Adds the deletes of the source to those known here; without any the journal is empty.

        Raises PyvolumeError.
        """
        path = base + ".ecj"
        data = bytearray()
        try:
            with closing(self._peer.pull("CopyFile", self._request(".ecj", True))) as messages:  # type: ignore[type-var]
                for message in messages:
                    data += _parts(message, path)[1]
                    if len(data) > MAX_JOURNAL_BYTES:
                        raise StorageError(f"receiving {path}: more than {MAX_JOURNAL_BYTES} bytes")
        except RpcFailure as exc:
            raise PyvolumeError(f"failed to copy {path} file: receiving {path}: {exc}") from exc
        except StorageError as exc:
            raise PyvolumeError(f"failed to copy {path} file: {exc}") from exc
        fresh = index.ids_of(bytes(data))
        members = self._call.server.store.ec
        mounted = next((v for v in members.copies(self._vid) if v.ecj_path == path), None)
        if mounted is not None:
            members.merge_deletes(mounted, fresh)
            return
        try:
            known = index.read_journal(path)
            if known and not set(fresh) - set(known):
                return
            files.replace_file(path, index.bytes_of(dict.fromkeys([*known, *fresh])), point="ec.ecj")
        except OSError as exc:
            raise PyvolumeError(f"failed to copy {path} file: {from_os_error(exc, 'write', path)}") from exc

    def _pause(self, moved: int) -> None:
        self._call.check()
        for _ in self._limit.waits(moved):
            self._call.check()


def _parts(message: bytes, path: str) -> tuple[int, memoryview]:
    try:
        fields = wire.read_fields(message)
    except ValueError as exc:
        raise StorageError(f"receiving {path}: {exc}") from None
    return wire.number(fields, wire.MODIFIED_FIELD), wire.content(fields, wire.CONTENT_FIELD)


def copy(call: Call, request: Any) -> Any:
    """Pulls shards and the files that go with them. Mounts nothing."""
    check_file_part("collection", request.collection)
    store, vid = call.server.store, request.volume_id
    if request.disk_id > 0:
        if request.disk_id >= len(store.locations):
            raise PyvolumeError(f"invalid disk_id {request.disk_id}: only have {len(store.locations)} disks")
        location = store.locations[request.disk_id]
    else:
        chosen = store.ec.target_location(request.collection, vid)
        if chosen is None:
            raise PyvolumeError("no space left")
        location = store.locations[chosen.disk_id]
    name = volume_base_name(request.collection, vid)
    base, idx_base = f"{location.directory}/{name}", f"{location.idx_directory}/{name}"
    wanted = (request.copy_ecx_file, request.copy_ecj_file, request.copy_vif_file, request.copy_ecsum_file)
    if not request.shard_ids and not any(wanted):
        return pb.VolumeEcShardsCopyResponse()
    source = peer_address("source_data_node", request.source_data_node)
    limit = RateLimit(request.io_byte_per_second or call.server.config.maintenance_bytes_per_s)
    try:
        with PeerLink(call.server.master.channels, source, call) as peer:
            puller = _Puller(call, peer, request.collection, vid, limit)
            for shard in request.shard_ids:
                if shard >= MAX_SHARDS:
                    raise PyvolumeError(f"shard id {shard} is out of range")
                puller.fetch(base, f".ec{shard:02d}", may_be_missing=False)
            if request.copy_ecx_file:
                _fetch_index(puller, idx_base)
            if request.copy_ecj_file:
                puller.fetch_journal(idx_base)
            if request.copy_vif_file:
                puller.fetch(base, ".vif", may_be_missing=True)
            if request.copy_ecsum_file:
                puller.fetch(base, ".ecsum", may_be_missing=True)
    except (StorageError, RpcFailure) as exc:
        raise PyvolumeError(f"VolumeEcShardsCopy volume {vid}: {exc}") from exc
    except PyvolumeError as exc:
        call.check()
        raise PyvolumeError(f"VolumeEcShardsCopy volume {vid}: {exc}") from exc
    return pb.VolumeEcShardsCopyResponse()


def _fetch_index(puller: _Puller, idx_base: str) -> None:
    path = idx_base + ".ecx"
    puller.fetch(idx_base, ".ecx", may_be_missing=False)
    try:
        size = os.stat(path).st_size
    except OSError as exc:
        raise PyvolumeError(f"stat copied .ecx {path}: {from_os_error(exc, 'stat', path)}") from exc
    if size == 0:
        os.unlink(path)
        raise PyvolumeError("source .ecx is 0 bytes")


def recover_indexes(call: Call, vid: int) -> None:
    """Fetches the index of shards that have none on this server from a peer, and mounts them. Failures are logged."""
    server = call.server
    config, members = server.config, server.store.ec
    recovered = 0
    for collection, each, location in members.missing_index(vid):
        try:
            shards = server.master.lookup_ec_volume(each, timeout_s=call.timeout_s(LOOKUP_TIMEOUT_S))
        except RpcFailure as exc:
            log.warning("ec volume %d: cannot look up peers to recover missing .ecx: %s", each, exc)
            continue
        own = f"{config.ip}:{config.port}"
        peers = dict.fromkeys(
            with_grpc_port(where.url, where.grpc_port) for found in shards.values() for where in found
        )
        name = volume_base_name(collection, each)
        base, idx_base = f"{location.directory}/{name}", f"{location.idx_directory}/{name}"
        for address in peers:
            if same_server(address, own):
                continue
            try:
                with PeerLink(server.master.channels, address, call) as peer:
                    puller = _Puller(call, peer, collection, each, RateLimit(0))
                    _fetch_index(puller, idx_base)
                    try:
                        puller.fetch(base, ".vif", may_be_missing=True)
                        puller.fetch_journal(idx_base)
                    except PyvolumeError as exc:
                        log.warning("ec volume %d: from %s: %s", each, address, exc)
            except PyvolumeError as exc:
                call.check()
                log.info("ec volume %d: fetch missing .ecx from %s failed: %s", each, address, exc)
                continue
            recovered += 1
            break
    if recovered:
        members.mount_recovered()
