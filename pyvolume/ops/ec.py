"""Reads and deletes of needles in erasure coded volumes (contract erasure-coding.md 8, 9). Must not import server.

A stretch of a needle comes from a shard on this server, else from a server that has the shard, else it is made of the
same stretch of enough other shards. Where shards are is asked of the master and kept for a while, which depends on how
many are known. A server that does not answer is left alone for PENALTY_S, then tried by one read, and left alone for
longer, so that it costs one time-out and not one for each needle. Departure E4: only the record is read, nothing behind
it. Upstream: `weed/storage/store_ec.go`, `store_ec_delete.go`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from pyvolume._native import ec, engine
from pyvolume.errors import CorruptNeedle, NeedleDeleted, NeedleNotFound, PyvolumeError, StorageError, from_native
from pyvolume.faults import fault
from pyvolume.ops.context import Helpers
from pyvolume.storage.ec.layout import Interval, Layout
from pyvolume.storage.ec.members import EcMembers
from pyvolume.storage.ec.volume import EcShard, EcVolume, RecentDelete

log = logging.getLogger(__name__)

READ_TIMEOUT_S: Final = 10.0
DELETE_TIMEOUT_S: Final = 30.0
DELETE_FRESH_S: Final = 1.0
"""So old may be what is known of shards when a needle is deleted: who gave a shard away does not serve it any more."""
HAND_OVER_S, HAND_OVER_PAUSE_S = 3.0, 0.1
RECENT_S: Final = 3600.0
"""Deletes of this time are told to whoever takes a shard over, if they came after it was copied."""
PENALTY_S: Final = 10.0
MAX_PENALTY_S: Final = 120.0
MAX_THREADS: Final = 64
FRESH_FEW_S, FRESH_ENOUGH_S, FRESH_ALL_S = 11.0, 7 * 60.0, 37 * 60.0
FALLBACK_SHARDS: Final = 14


Mark = Literal["", "holder", "keep"]
"""With a delete that a server sends on: to who has the shard, and does not send it on again; or to who is to keep it,
for nobody has the shard. None: from who deletes."""


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

    def delete(
        self, address: str, vid: int, collection: str, key: int, version: int, timeout_s: float, *, mark: Mark
    ) -> None:
        """Has a server note a delete. Raises PeerDown, PyvolumeError."""

    def read_journal(self, address: str, vid: int, collection: str, timeout_s: float) -> list[int]:
        """The deletes that a server knows of. Raises PeerDown, PyvolumeError."""

    def is_self(self, address: str) -> bool:
        """Whether an address is this server's."""

    def delete_plain(self, vid: int, key: int, timeout_s: float) -> bool:
        """Deletes a needle of a plain volume wherever it is; false if it is nowhere. Raises PyvolumeError."""


class EcReader:
    """Thread-safe. `delete_here(vid, key, at_ns)` deletes a needle of a plain volume of this server unless it was
    written after that time; false if there is no such volume, or it takes no deletes."""

    def __init__(
        self,
        members: EcMembers,
        peers: EcPeers,
        delete_here: Callable[[int, int, int], bool] = lambda _vid, _key, _at_ns: False,
    ) -> None:
        self._members = members
        self._peers = peers
        self._delete_here = delete_here
        self._helpers = Helpers(MAX_THREADS)
        self._lock = threading.Lock()
        self._down: dict[str, _Down] = {}
        self._master_down_until_s = 0.0

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
        if size < 0 or any(other.is_deleted(key) for other in self._members.copies(volume.vid) if other is not volume):
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

    def refresh(self, volume: EcVolume, limit_s: float = FRESH_ALL_S) -> None:
        """Asks the master where shards are unless that is known well enough, or for longer than limit_s.

        Raises StorageError.
        """
        if self._fresh_s(volume) > 0 and time.monotonic() - volume.locations_at_s < limit_s:
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

    def _is_somewhere_by_now(self, volume: EcVolume, intervals: Sequence[Interval], fds: Sequence[int]) -> bool:
        """Whether another server has a shard that nobody had a while ago: it may know of deletes."""
        self._refresh_if_possible(volume, FRESH_FEW_S)
        return any(fds[each.shard] < 0 and volume.shard_locations.get(each.shard) for each in intervals)

    def _has_lowest(self, volume: EcVolume) -> bool:
        """Whether this server has the first shard that there is: its holder notes deletes of needles that begin in a
        shard which nobody has."""
        elsewhere = [shard for shard, addresses in volume.shard_locations.items() if addresses]
        here = [shard for each in self._members.copies(volume.vid) for shard in each.shards]
        return bool(here) and min(here) <= min(elsewhere, default=min(here))

    def _tell_lane(self, volume: EcVolume) -> None:
        """Lets the fast lane make what nobody has of the shards here, as long as that is known."""
        view = volume.view
        if view is not None and self._has_lowest(volume):
            valid_s = min(FRESH_FEW_S, self._fresh_s(volume))
            view.elsewhere([shard for shard, at in volume.shard_locations.items() if at], valid_s)

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
                if self._fresh_s(volume) <= 0 or self._is_somewhere_by_now(volume, layout.locate(offset, length), fds):
                    return None
                for number in range(ratio.total):
                    if len(held) >= ratio.data:
                        break
                    if fds[number] < 0:
                        self._hold(volume, number, fds, held)
                if len(held) < ratio.data or not self._has_lowest(volume):
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
        if data is None and self._is_known_anew(volume):
            data = self.read_remote(volume, key, interval)
        if data is not None:
            return data
        try:
            return self._recover(volume, key, interval)
        except NeedleDeleted:
            raise
        except StorageError as exc:
            raise StorageError(f"ReadEcShardIntervals: {exc}") from exc

    def _is_known_anew(self, volume: EcVolume) -> bool:
        """Asks the master about shards, of which one is not where it was, unless that was done just now."""
        before_s = volume.locations_at_s
        self._refresh_if_possible(volume, FRESH_FEW_S)
        return volume.locations_at_s != before_s

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
            self._leave_alone(address)
            raise
        except PyvolumeError:
            self._has_answered(address)
            raise
        self._has_answered(address)
        if deleted:
            raise NeedleDeleted("already deleted")
        if len(data) != interval.length:
            raise StorageError(f"{len(data)} bytes of {interval.length}")
        return data

    def _leave_alone(self, address: str) -> None:
        """Each time that a server is tried again and silent again it is left alone for twice as long."""
        with self._lock:
            down, now_s = self._down.get(address), time.monotonic()
            if down is not None and not down.is_tried and down.until_s > now_s:
                return  # asked at the same time as the one that told so
            penalty_s = PENALTY_S if down is None else min(2 * down.penalty_s, MAX_PENALTY_S)
            self._down[address] = _Down(now_s + penalty_s, penalty_s, is_tried=False)

    def _is_down(self, address: str) -> bool:
        """Whether a server is to be left alone. When its time is over one caller tries it, for all others it is down
        until that one knows."""
        with self._lock:
            down, now_s = self._down.get(address), time.monotonic()
            if down is None:
                return False
            if down.until_s > now_s:
                return True
            self._down[address] = _Down(now_s + READ_TIMEOUT_S + 1.0, down.penalty_s, is_tried=True)
            return False

    def _has_answered(self, address: str) -> None:
        if address in self._down:
            with self._lock:
                self._down.pop(address, None)

    def _recover(self, volume: EcVolume, key: int, wanted: Interval) -> bytes:
        """Makes a stretch of the same stretch of other shards; asks their servers all at once.

        Deletes of needles that begin in a shard which is lost are noted by a holder of the first shard that there is:
        unless that is this server, its answer is waited for.
        """
        data = volume.ratio.data
        pieces: dict[int, bytes] = {}
        elsewhere: list[Interval] = []
        witness: int | None = None
        for shard in range(volume.ratio.total):
            if shard == wanted.shard:
                continue
            interval = Interval(shard, wanted.offset, wanted.length)
            piece = self.read_local(volume, interval) if len(pieces) < data else None
            if piece is not None:
                pieces[shard] = piece
            elif volume.shard_locations.get(shard):
                if not pieces and not elsewhere:
                    witness = shard
                elsewhere.append(interval)
        if len(pieces) >= data:
            elsewhere = [interval for interval in elsewhere if interval.shard == witness]
        self._collect(volume, key, elsewhere, pieces, witness)
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

    def _collect(
        self,
        volume: EcVolume,
        key: int,
        intervals: Sequence[Interval],
        pieces: dict[int, bytes],
        witness: int | None,
    ) -> None:
        """Adds pieces of other servers until there are enough and the holder of `witness` has answered.

        Upstream forgets where a shard is that cannot be had. Here that would mean that nobody has it.
        """
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
            if shard == witness:
                witness = None
            if outcome is not None:
                pieces[shard] = outcome
            if witness is None and len(pieces) >= volume.ratio.data:
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
        self._refresh_if_possible(volume, DELETE_FRESH_S)
        first = self._first_shard(volume, key)
        failure = self._delete_at(volume, key, first)
        if failure is None:
            return reported
        if not isinstance(failure, _NoHolder):
            raise failure
        for shard in range(max(FALLBACK_SHARDS, volume.ratio.total)):
            if shard != first and self._delete_at(volume, key, shard) is None:
                return reported
        raise failure

    def _refresh_if_possible(self, volume: EcVolume, limit_s: float) -> None:
        """Asks the master where shards are by now. Without an answer what is known has to do for a while."""
        with self._lock:
            if self._master_down_until_s > time.monotonic():
                return
        try:
            self.refresh(volume, limit_s)
        except StorageError as exc:
            log.info("ec volume %d: %s", volume.vid, exc)
            with self._lock:
                self._master_down_until_s = time.monotonic() + PENALTY_S

    def _first_shard(self, volume: EcVolume, key: int) -> int:
        """The shard with the first byte of a needle. Raises NeedleNotFound, StorageError."""
        offset, size = volume.lookup(key)
        return volume.layout.locate(offset, max(1, volume.record_bytes(max(0, size))))[0].shard

    def _delete_at(self, volume: EcVolume, key: int, shard: int, *, mark: Mark = "") -> StorageError | None:
        """Has one holder of a shard note the delete; the last failure if none did. With a mark: another server."""
        addresses = volume.shard_locations.get(shard, ())
        if mark:
            addresses = tuple(address for address in addresses if not self._peers.is_self(address))
        what = f"ec shard {volume.vid}.{shard}"
        return self._tell(addresses, volume.vid, volume.collection, key, volume.version, what, mark)

    def _tell(
        self,
        addresses: Iterable[str],
        vid: int,
        collection: str,
        key: int,
        version: int,
        what: str,
        mark: Mark,
    ) -> StorageError | None:
        """Has one of the servers note a delete; the last failure if none did. One that is down is not asked again."""
        failure: StorageError = _NoHolder(f"{what}: ec shard missing")
        for address in addresses:
            skipped = PeerDown(f"{address} did not answer")
            try:
                if self._is_down(address):
                    raise skipped
                self._peers.delete(address, vid, collection, key, version, DELETE_TIMEOUT_S, mark=mark)
            except PyvolumeError as exc:
                if exc is not skipped:
                    (self._leave_alone if isinstance(exc, PeerDown) else self._has_answered)(address)
                failure = StorageError(f"failed to delete from ec shard {vid} on {address}: {exc}")
                continue
            self._has_answered(address)
            return None
        return failure

    def note_delete(self, vid: int, key: int, *, mark: Mark) -> None:
        """What a server is to do with a delete that is sent to it. Raises NeedleNotFound, StorageError.

        It is noted in the journal of the first disk that has the volume. A server that does not have the shard of the
        needle tells one that has it: the sender did not know that the shard has moved. Upstream notes it here, or
        nowhere if the volume has gone, and says that all is well.
        """
        volume = self._members.find(vid)
        if volume is None:
            if not self._delete_here(vid, key, time.time_ns()):
                if mark:
                    raise StorageError(f"ec volume {vid} is not here any more")
                self._delete_elsewhere(vid, key)
            return
        _, size = volume.lookup(key)
        if size < 0 or self._members.is_deleted(vid, key):
            return
        first = self._first_shard(volume, key)
        if self._members.find_shard(vid, first) is not None:
            volume.journal(key, first=first)
            if self._members.find_shard(vid, first) is None:  # it went meanwhile
                self._pass_on(volume, key, first, 0.0)
            return
        if mark == "holder":
            raise StorageError(f"ec shard {vid}.{first} is not here any more")
        if mark != "keep" and self._pass_on(volume, key, first, 0.0):
            return
        # Nobody has the shard. Whoever gets it asks for this journal then; who has got it by now is told.
        volume.journal(key, first=first)
        if mark != "keep":
            self._pass_on(volume, key, first, 0.0)

    def catch_up(self, vid: int, shards: Collection[int]) -> bool:
        """Fetches the deletes of needles in these shards, which were just mounted, that others noted while nobody had
        them. False if the master could not be asked; a server that does not answer is passed over."""
        volume = self._members.find(vid)
        if volume is None or not shards:
            return True
        until_s = time.monotonic() + HAND_OVER_S
        while True:
            try:
                found = self._peers.locate(vid)
            except PyvolumeError as exc:
                log.info("ec volume %d: deletes noted elsewhere are not known: %s", vid, exc)
                return False
            holders = {address for addresses in found.values() for address in addresses}
            others = {address for address in holders if not self._peers.is_self(address)}
            if not others:
                return True
            listed = {number for number, addresses in found.items() if any(map(self._peers.is_self, addresses))}
            if listed.issuperset(shards) or time.monotonic() >= until_s:  # from then on deletes come here
                break
            time.sleep(HAND_OVER_PAUSE_S)
        for address in sorted(others):
            if self._is_down(address):
                continue
            try:
                keys = self._peers.read_journal(address, vid, volume.collection, DELETE_TIMEOUT_S)
                self._has_answered(address)
                volume.merge_deletes([key for key in keys if self._begins_in(volume, key, shards)])
            except PyvolumeError as exc:
                if isinstance(exc, PeerDown):
                    self._leave_alone(address)
                else:
                    self._has_answered(address)
                log.warning("ec volume %d: deletes noted on %s: %s", vid, address, exc)
        return True

    def _begins_in(self, volume: EcVolume, key: int, shards: Collection[int]) -> bool:
        """Whether a needle is live here and has its first byte in one of the shards."""
        if key in volume.deleted:
            return False
        try:
            offset, size = volume.lookup(key)
        except NeedleNotFound:
            return False
        return size >= 0 and volume.layout.locate(offset, 1)[0].shard in shards

    def _pass_on(self, volume: EcVolume, key: int, first: int, fresh_s: float = DELETE_FRESH_S) -> bool:
        """Tells another holder of the needle's first shard; false if there is none. Raises StorageError."""
        self._refresh_if_possible(volume, fresh_s)
        failure = self._delete_at(volume, key, first, mark="holder")
        if failure is not None and not isinstance(failure, _NoHolder):
            raise failure
        return failure is None

    def _delete_elsewhere(self, vid: int, key: int) -> bool:
        """Tells whoever has the volume by now, as shards or plain; false if nobody has. Raises StorageError."""
        if not self._peers.master:
            return False
        try:
            found = self._peers.locate(vid)
        except PyvolumeError as exc:
            log.info("ec volume %d: %s", vid, exc)  # a master that knows of no shards says so with an error
            found = {}
        addresses = dict.fromkeys(each for shard in found.values() for each in shard if not self._peers.is_self(each))
        if addresses:
            # not marked: who is told may have other shards than the needle's, and passes it on
            failure = self._tell(addresses, vid, "", key, 0, f"ec volume {vid}", "")
            if failure is not None:
                raise failure
            return True
        return self._delete_plain(vid, key)

    def _delete_plain(self, vid: int, key: int) -> bool:
        try:
            return self._peers.delete_plain(vid, key, DELETE_TIMEOUT_S)
        except StorageError:
            raise
        except PyvolumeError as exc:
            raise StorageError(f"delete from volume {vid}: {exc}") from exc

    def hand_over(self, volumes: Sequence[EcVolume], shards: Sequence[int], done: set[RecentDelete]) -> None:
        """Tells whoever takes these shards over of the deletes that were noted here after they had been copied.

        Called before shards are given away, when another server has them already and got the journal as it was then,
        and once more afterwards; `done` collects what need not be told again. Nobody else having the shards is no
        error. Takes HAND_OVER_S and the calls that succeed. Raises StorageError.
        """
        until_s = time.monotonic() + HAND_OVER_S
        for volume in volumes:
            for delete in volume.recent_deletes(RECENT_S):
                if delete in done:
                    continue
                sent_s = volume.sent_at_s.get(delete.first)
                is_sent = delete.first in shards and sent_s is not None and sent_s <= delete.at_s
                if self._delete_here(volume.vid, delete.key, delete.at_ns) or (
                    is_sent and self._hand_over_one(volume, delete, set(volume.shards) <= set(shards), until_s)
                ):
                    done.add(delete)

    def _hand_over_one(self, volume: EcVolume, delete: RecentDelete, is_last: bool, until_s: float) -> bool:
        """Whether somebody was told. is_last: nothing of the volume will be left here. The new holder may not be known
        to the master yet, or be about to give the shard away, too: this is tried until then."""
        while True:
            failure = None
            try:
                if self._pass_on(volume, delete.key, delete.first, 0.0):
                    return True
                if is_last and self._delete_plain(volume.vid, delete.key):
                    return True
            except StorageError as exc:
                failure = exc
            if time.monotonic() >= until_s:
                if failure is not None:
                    raise failure
                return is_last and self._keep_elsewhere(volume, delete.key)
            time.sleep(HAND_OVER_PAUSE_S)

    def _keep_elsewhere(self, volume: EcVolume, key: int) -> bool:
        """Has any server with other shards note a delete; false if there is none. Raises StorageError."""
        addresses = {each for shard in volume.shard_locations.values() for each in shard}
        others = [address for address in sorted(addresses) if not self._peers.is_self(address)]
        what = f"ec volume {volume.vid}"
        failure = self._tell(others, volume.vid, volume.collection, key, volume.version, what, "keep")
        if failure is not None and not isinstance(failure, _NoHolder):
            raise failure
        return failure is None


@dataclass(frozen=True, slots=True)
class _Down:
    """A server that did not answer: until when it is left alone, how long that was, whether somebody tries it now."""

    until_s: float
    penalty_s: float
    is_tried: bool


class _NoHolder(StorageError):
    """No server is known to hold a shard."""
