"""Reads and deletes of needles in erasure coded volumes (contract erasure-coding.md 8, 9). Must not import server.

A stretch of a needle comes from a shard on this server, else from a server that has the shard, else it is made of the
same stretch of enough other shards. Where shards are is asked of the master and kept for a while, which depends on how
many are known. A server that does not answer is left alone for PENALTY_S, so that it costs one time-out and not one for
each needle. Departure E4: only the record is read, nothing behind it. Upstream: `weed/storage/store_ec.go`,
`store_ec_delete.go`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from pyvolume._native import ec, engine
from pyvolume.errors import CorruptNeedle, NeedleDeleted, PyvolumeError, StorageError, from_native
from pyvolume.faults import fault
from pyvolume.ops.context import Helpers
from pyvolume.storage.ec.layout import Interval, Layout
from pyvolume.storage.ec.members import EcMembers
from pyvolume.storage.ec.volume import EcShard, EcVolume

log = logging.getLogger(__name__)

READ_TIMEOUT_S: Final = 10.0
DELETE_TIMEOUT_S: Final = 30.0
PENALTY_S: Final = 10.0
MAX_THREADS: Final = 64
FRESH_FEW_S, FRESH_ENOUGH_S, FRESH_ALL_S = 11.0, 7 * 60.0, 37 * 60.0
FALLBACK_SHARDS: Final = 14


class PeerDown(StorageError):
    """A server did not answer at all, or not in time."""


class UnexpectedCookie(StorageError):
    """`unexpected cookie %x`: the needle is another one."""


class EcPeers(Protocol):
    """Masters and peers. Methods block within their own time-outs; addresses are what `locate` gave."""

    @property
    def master(self) -> str: ...

    def locate(self, vid: int) -> Mapping[int, Sequence[str]]:
        """Servers of each shard; raises PyvolumeError."""

    def read_shard(
        self,
        address: str,
        vid: int,
        shard: int,
        offset: int,
        length: int,
        key: int,
        encode_ts_ns: int,
        timeout_s: float,
    ) -> tuple[bytes, bool]:
        """(bytes, whether the needle is deleted there). Raises PeerDown, StorageError."""

    def delete(self, address: str, vid: int, collection: str, key: int, version: int, timeout_s: float) -> None:
        """Notes a delete. Raises PyvolumeError."""


class EcReader:
    """Thread-safe. `clock` is for tests."""

    def __init__(self, members: EcMembers, peers: EcPeers) -> None:
        self._members = members
        self._peers = peers
        self._helpers = Helpers(MAX_THREADS)
        self._lock = threading.Lock()
        self._down_until_s: dict[str, float] = {}

    def close(self) -> None:
        """Ends the helper threads."""
        self._helpers.close()

    # ------------------------------------------------------------------------------------------------------------ reads

    def read(self, volume: EcVolume, key: int) -> engine.Needle:
        """A needle, its checksum verified. Raises NeedleNotFound, NeedleDeleted, StorageError with upstream's texts."""
        return self._read(volume, key)[0]

    def _read(self, volume: EcVolume, key: int) -> tuple[engine.Needle, int]:
        """The needle and the size that a delete of it reports."""
        offset, size = volume.lookup(key)
        if size < 0:
            raise NeedleDeleted("already deleted")
        length = volume.record_bytes(size)
        layout = volume.layout
        data: bytes | bytearray | None = self._read_here(volume, layout, offset, length)
        if data is None and self._fresh_s(volume) <= 0:
            self.refresh(volume)
            data = self._read_here(volume, layout, offset, length)
        if data is None:
            intervals = layout.locate(offset, length)
            pieces = [self._piece(volume, key, interval) for interval in intervals]
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            needle = engine.parse_needle(data, volume.version, size)
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=volume.base_path, key=key) from exc
        if needle.id != key and not needle.empty:
            raise CorruptNeedle(f"index key {key:x} does not match needle's Id {needle.id:x}", path=volume.base_path)
        return needle, volume.record_bytes(length)

    def refresh(self, volume: EcVolume) -> None:
        """Asks the master where shards are unless that is known well enough. Raises StorageError."""
        if self._fresh_s(volume) > 0:
            return
        try:
            found = self._peers.locate(volume.vid)
        except PyvolumeError as exc:
            text = f"failed to locate shard via master grpc {self._peers.master}: lookup ec volume {volume.vid}: {exc}"
            raise StorageError(f"ReadEcShardIntervals: {text}") from exc

        def change(cache: dict[int, tuple[str, ...]]) -> None:
            for shard, addresses in found.items():
                cache.pop(shard, None)
                if addresses:
                    cache[shard] = tuple(addresses)

        volume.update_locations(change)
        volume.locations_at_s = time.monotonic()
        self._tell_lane(volume)

    @staticmethod
    def _fresh_s(volume: EcVolume) -> float:
        """How long what is known of shards elsewhere is good for; 0 or less: no more."""
        known, ratio = len(volume.shard_locations), volume.ratio
        fresh_s = FRESH_FEW_S if known < ratio.data else FRESH_ALL_S if known == ratio.total else FRESH_ENOUGH_S
        return fresh_s - (time.monotonic() - volume.locations_at_s)

    def _tell_lane(self, volume: EcVolume) -> None:
        """Lets the fast lane make what nobody has of the shards here, as long as that is known."""
        view = volume.view
        if view is not None:
            view.elsewhere([shard for shard, at in volume.shard_locations.items() if at], self._fresh_s(volume))

    def _read_here(self, volume: EcVolume, layout: Layout, offset: int, length: int) -> bytearray | None:
        """A record, in one go, if this server's shards give all of it; None if they do not, for whatever reason.

        Nobody is asked for what is here; what is lost is made here if it is known that nobody has it.
        """
        ratio = volume.ratio
        fds = [-1] * ratio.total
        held: list[EcShard] = []
        lost = False
        try:
            for interval in layout.locate(offset, length):
                if fds[interval.shard] < 0 and not self._hold(volume, interval.shard, fds, held):
                    if volume.shard_locations.get(interval.shard):
                        return None  # it is somewhere else
                    lost = True
            if lost:
                if self._fresh_s(volume) <= 0:
                    return None
                for number in range(ratio.total):
                    if len(held) >= ratio.data:
                        break
                    if fds[number] < 0:
                        self._hold(volume, number, fds, held)
                if len(held) < ratio.data:
                    return None
            if not held or offset + length > ratio.data * held[0].size:
                return None
            fault("ec.shard_read")
            cut = (ratio.data, ratio.parity, layout.large_block, layout.small_block, layout.large_rows)
            data = ec.read(fds, cut, offset, length)
            if lost:
                self._tell_lane(volume)
            return data
        except (OSError, engine.NativeError) as exc:
            log.debug("read record at %d of ec volume %d here: %s", offset, volume.vid, exc)
            return None
        finally:
            for shard in held:
                shard.let_go()

    def _hold(self, volume: EcVolume, number: int, fds: list[int], held: list[EcShard]) -> bool:
        """Keeps a shard of this server open; whether there is one of this encode."""
        shard = self._local_shard(volume, number)
        if shard is None:
            return False
        fds[number] = shard.hold()
        held.append(shard)
        return True

    def _local_shard(self, volume: EcVolume, number: int) -> EcShard | None:
        found = self._members.find_shard(volume.vid, number)
        if found is None:
            return None
        holder, shard = found
        return None if volume.encode_ts_ns and holder.encode_ts_ns != volume.encode_ts_ns else shard

    def _piece(self, volume: EcVolume, key: int, interval: Interval) -> bytes:
        data = self.read_local(volume, interval)
        if data is not None:
            return data
        data = self.read_remote(volume, key, interval)
        if data is not None:
            return data
        try:
            return self._recover(volume, key, interval)
        except NeedleDeleted:
            raise
        except StorageError as exc:
            raise StorageError(f"ReadEcShardIntervals: {exc}") from exc

    def read_local(self, volume: EcVolume, interval: Interval) -> bytes | None:
        """The bytes from a shard on this server; None if it has none of this encode, or they cannot be read."""
        shard = self._local_shard(volume, interval.shard)
        if shard is None:
            return None
        try:
            data = shard.read(interval.offset, interval.length)
        except OSError as exc:
            log.warning("read local ec shard %d.%d at %d: %s", volume.vid, interval.shard, interval.offset, exc)
            return None
        if len(data) != interval.length:
            log.warning("local ec shard %d.%d ends before %d", volume.vid, interval.shard, interval.offset)
            return None
        return data

    def read_remote(self, volume: EcVolume, key: int, interval: Interval) -> bytes | None:
        """The bytes from a server that has the shard; None if none gives them. Raises NeedleDeleted."""
        for address in volume.shard_locations.get(interval.shard, ()):
            if self._is_down(address):
                continue
            try:
                return self._ask(volume, key, address, interval)
            except NeedleDeleted:
                raise
            except PyvolumeError as exc:
                log.info("read remote ec shard %d.%d from %s: %s", volume.vid, interval.shard, address, exc)
        return None

    def _ask(self, volume: EcVolume, key: int, address: str, interval: Interval) -> bytes:
        try:
            data, deleted = self._peers.read_shard(
                address,
                volume.vid,
                interval.shard,
                interval.offset,
                interval.length,
                key,
                volume.encode_ts_ns,
                READ_TIMEOUT_S,
            )
        except PeerDown:
            with self._lock:
                self._down_until_s[address] = time.monotonic() + PENALTY_S
            raise
        if deleted:
            raise NeedleDeleted("already deleted")
        if len(data) != interval.length:
            raise StorageError(f"{len(data)} bytes of {interval.length}")
        return data

    def _is_down(self, address: str) -> bool:
        with self._lock:
            return self._down_until_s.get(address, 0.0) > time.monotonic()

    def _recover(self, volume: EcVolume, key: int, wanted: Interval) -> bytes:
        """Makes a stretch of the same stretch of other shards; asks their servers all at once."""
        data = volume.ratio.data
        pieces: dict[int, bytes] = {}
        elsewhere = []
        for shard in range(volume.ratio.total):
            if shard == wanted.shard:
                continue
            interval = Interval(shard, wanted.offset, wanted.length)
            piece = self.read_local(volume, interval) if len(pieces) < data else None
            if piece is not None:
                pieces[shard] = piece
            elif volume.shard_locations.get(shard):
                elsewhere.append(interval)
        if len(pieces) < data:
            self._collect(volume, key, elsewhere, pieces)
        if len(pieces) < data:
            missing = [n for n in range(volume.ratio.total) if n not in pieces and n != wanted.shard]
            have = " ".join(str(n) for n in sorted(pieces))
            lost = " ".join(str(n) for n in missing)
            raise StorageError(
                f"cannot recover shard {volume.vid}.{wanted.shard}: only {len(pieces)} shards available [{have}], "
                f"need at least {data} (missing: [{lost}])"
            )
        try:
            return bytes(ec.recover(data, volume.ratio.parity, pieces, wanted.shard))
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info) from exc

    def _collect(self, volume: EcVolume, key: int, intervals: Sequence[Interval], pieces: dict[int, bytes]) -> None:
        """Adds pieces of other servers until there are enough. A shard that cannot be had is dropped from the cache."""
        answers: queue.SimpleQueue[tuple[int, bytes | NeedleDeleted | None]] = queue.SimpleQueue()

        def fetch(interval: Interval) -> None:
            outcome: bytes | NeedleDeleted | None = None
            try:
                outcome = self.read_remote(volume, key, interval)
            except NeedleDeleted as exc:
                outcome = exc
            finally:
                answers.put((interval.shard, outcome))

        for interval in intervals:
            self._helpers.submit(lambda interval=interval: fetch(interval))  # type: ignore[misc]
        for _ in intervals:
            shard, outcome = answers.get()
            if isinstance(outcome, NeedleDeleted):
                raise outcome
            if outcome is None:
                volume.update_locations(lambda cache, shard=shard: cache.pop(shard, None))  # type: ignore[misc]
                continue
            pieces[shard] = outcome
            if len(pieces) >= volume.ratio.data:
                return

    # ---------------------------------------------------------------------------------------------------------- deletes

    def delete(self, volume: EcVolume, key: int, cookie: int) -> int:
        """Deletes a needle; the size that is reported. Cookie 0 is not checked.

        Exactly one server notes it: a holder of the shard with the needle's first byte, else of any shard. Raises as
        `read`, UnexpectedCookie, StorageError.
        """
        needle, reported = self._read(volume, key)
        self.refresh(volume)
        if cookie and not needle.empty and needle.cookie != cookie:
            raise UnexpectedCookie(f"unexpected cookie {cookie:x}")
        offset, size = volume.lookup(key)
        first = volume.layout.locate(offset, max(1, volume.record_bytes(max(0, size))))[0].shard
        failure = self._delete_at(volume, key, first)
        if failure is None:
            return reported
        if not isinstance(failure, _NoHolder):
            raise failure
        for shard in range(max(FALLBACK_SHARDS, volume.ratio.total)):
            if shard != first and self._delete_at(volume, key, shard) is None:
                return reported
        raise failure

    def _delete_at(self, volume: EcVolume, key: int, shard: int) -> StorageError | None:
        """Has one holder of a shard note the delete; the last failure if none did."""
        failure: StorageError = _NoHolder(f"ec shard {volume.vid}.{shard}: ec shard missing")
        for address in volume.shard_locations.get(shard, ()):
            try:
                self._peers.delete(address, volume.vid, volume.collection, key, volume.version, DELETE_TIMEOUT_S)
            except PyvolumeError as exc:
                failure = StorageError(f"failed to delete from ec shard {volume.vid} on {address}: {exc}")
                continue
            return None
        return failure


class _NoHolder(StorageError):
    """No server is known to hold a shard."""
