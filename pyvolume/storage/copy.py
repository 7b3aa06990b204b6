"""Files of volumes on their way out to a peer and in from one: names, room, staging, renames, what a crash leaves.

May import everything of storage but store, _native and the leaves. Nothing here talks to a network. All of it blocks on
disk and raises StorageError (with upstream's words), NoSpace or DiskError. Upstream: `weed/server/volume_grpc_copy.go`.

What comes in is written under a working name beside its place (`.copying`, `.receiving`), flushed, and renamed once it
is whole, so a valid name never stands for half a file. A copied volume replaces an old replica only after it was
verified (departure V3). Between that and the last rename a marker `<base>.copied` says that the copy is whole:
`recover` finishes what a crash cut short, and removes working files that nobody will finish.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

from pyvolume._native import engine, since
from pyvolume.config import go_quote
from pyvolume.errors import (
    NoFreeLocation,
    StorageError,
    VolumeClosed,
    disk_error,
    from_native,
    from_os_error,
    os_error_text,
)
from pyvolume.faults import fault
from pyvolume.storage import disk_space, ec_files, files, index_files, vif
from pyvolume.storage.ec import index
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import remove_volume_files
from pyvolume.types import is_plain_file_part, normalize_disk_type, readable_disk_type, volume_base_name

if TYPE_CHECKING:
    from pyvolume.storage.disk_location import DiskLocation
    from pyvolume.storage.ec.members import EcMembers
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 2 << 20
"""Upstream's limit for one message."""
ANY_REVISION: Final = 0xFFFFFFFF
WRITE_BACK_BYTES: Final = 32 << 20
"""So often the system is told to begin writing what was received, so that the flush at the end is short."""
STAGED: Final = ".copying"
RECEIVING: Final = ".receiving"
FETCHING: Final = ".fetching"
"""Of a .dat that comes back from a remote store (tier.move)."""
MARKER: Final = ".copied"
VOLUME_PARTS: Final = (".dat", ".idx", ".vif")
"""In the order of the renames: with less than the first two no server takes the name for a volume."""
NOTE_MODE: Final = 0o755

_IDX_DIR_EXTENSIONS: Final = (".idx", ".cpx", ".ldb", ".cpldb", ".rdb")
_INDEX_CACHES: Final = (".sdx", ".ldb", ".rdb")
_OPEN_FILES: Final = (".dat", ".idx", ".sdx", ".ldb", ".rdb", ".cpd", ".cpx", ".cpc", ".cpldb")
"""What a mounted volume has open or may open: not to be written by anybody else."""
_EXTENSION: Final = re.compile(r"\.[0-9A-Za-z]+", re.ASCII)
_SHARD_EXTENSION: Final = re.compile(r"\.ec([0-9]{2})")
_INT64_MAX: Final = (1 << 63) - 1
_MAX_SHARDS: Final = ec_files.MAX_SHARDS


def check_names(extension: str, collection: str) -> None:
    """Raises StorageError with upstream's text for names that would lead out of the directory (departure S5)."""
    if not _EXTENSION.fullmatch(extension):
        raise StorageError(f"invalid file extension {go_quote(extension)}")
    if not is_plain_file_part(collection):
        raise StorageError(f"invalid collection {go_quote(collection)}")


# ------------------------------------------------------------------------------------------------------------- sending


class OutgoingFile:
    """A file opened to be sent, as it was at that moment. Use it in a with-block."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise from_os_error(exc, "open", path) from exc
        self.path = path
        self.modified_ts_ns = os.fstat(self._fd).st_mtime_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def pieces(self, stop_offset: int) -> Iterator[bytes]:
        """The first stop_offset bytes, or all there are, in pieces.

        Quirk: the number is taken as signed; 2^63 and above send nothing (volume_grpc_copy.go).
        """
        if stop_offset > _INT64_MAX:
            return
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        at = 0
        while at < stop_offset:
            try:
                fault("copy.read")
                piece = os.pread(self._fd, min(PIECE_BYTES, stop_offset - at), at)
            except OSError as exc:
                raise from_os_error(exc, "read", self.path) from exc
            if not piece:
                return
            yield piece
            at += len(piece)


def open_volume_file(volume: Volume, extension: str, revision: int, *, may_be_missing: bool) -> OutgoingFile | None:
    """A file of a mounted volume, flushed before; None if it does not exist and may be missing.

    Raises StorageError `volume %d is compacted` for another revision than the volume has, VolumeClosed, DiskError.
    """
    _check_revision(volume, revision)
    try:
        volume.sync()
    except VolumeClosed:
        raise
    except StorageError as exc:
        log.warning("volume %d: sync before a copy: %s", volume.vid, exc)
    opened = _open_unless_missing(path_in_volume(volume, extension), may_be_missing)
    try:
        _check_revision(volume, revision)  # a commit may have put other files there in between
    except BaseException:
        if opened is not None:
            opened.__exit__(None, None, None)
        raise
    return opened


def _check_revision(volume: Volume, revision: int) -> None:
    if revision not in (ANY_REVISION, volume.compaction_revision):
        raise StorageError(f"volume {volume.vid} is compacted")


def path_in_volume(volume: Volume, extension: str) -> str:
    """Where the file of a mounted volume with this extension is."""
    return (volume.idx_base_path if extension in _IDX_DIR_EXTENSIONS else volume.base_path) + extension


class OutgoingBytes(OutgoingFile):
    """Bytes that are sent as a file with the time of another."""

    def __init__(self, data: bytes, like: OutgoingFile) -> None:
        self._data = data
        self.path = like.path
        self.modified_ts_ns = like.modified_ts_ns

    def __exit__(self, *_exc: object) -> None:
        pass

    def pieces(self, stop_offset: int) -> Iterator[bytes]:
        data = self._data[: stop_offset if stop_offset <= _INT64_MAX else 0]
        for at in range(0, len(data), PIECE_BYTES):
            yield data[at : at + PIECE_BYTES]


def open_ec_file(holder: Holder, vid: int, collection: str, extension: str) -> OutgoingFile | None:
    """A file of an EC volume, flushed if it is mounted; None if no directory has it. Quirk: the last hit wins.

    A journal tells of all deletes that this server knows of: those of its other disks, and those that were folded into
    an index, too.
    """
    mounted = [each for each in holder.ec.copies(vid) if each.collection == collection]
    if match := _SHARD_EXTENSION.fullmatch(extension):
        for each in mounted:
            each.note_sent(int(match[1]))
    found = _open_ec_file(holder, vid, collection, extension)
    if found is None or extension != ".ecj" or not mounted:
        return found
    try:
        more: set[int] = set().union(*(each.buried() for each in mounted), *(list(each.deleted) for each in mounted))
        with found:
            data = b"".join(found.pieces(_INT64_MAX))
            more -= set(index.ids_of(data))
            if more:  # half an id at the end is no delete, and nothing may be put behind it
                data = data[: len(data) - len(data) % index.ID_BYTES] + index.bytes_of(sorted(more))
            return OutgoingBytes(data, found)
    except StorageError as exc:
        raise StorageError(f"deletes of ec volume {vid}: {exc}") from exc


def _open_ec_file(holder: Holder, vid: int, collection: str, extension: str) -> OutgoingFile | None:
    for mounted in holder.ec.copies(vid):
        mounted.sync()
    name = volume_base_name(collection, vid) + extension
    found = None
    for location in holder.locations:
        for directory in (location.directory, location.idx_directory):
            if files.exists(f"{directory}/{name}"):
                found = f"{directory}/{name}"
    return None if found is None else OutgoingFile(found)


def _open_unless_missing(path: str, may_be_missing: bool) -> OutgoingFile | None:
    try:
        return OutgoingFile(path)
    except StorageError as exc:
        if may_be_missing and getattr(exc, "errno", 0) == errno.ENOENT:
            return None
        raise


# ----------------------------------------------------------------------------------------------------------- receiving


class IncomingFile:
    """One file being written under a working name. finish() flushes it, place() gives it its name.

    discard() removes it as long as it was not placed; it is safe at any time. Raises from_os_error's errors with
    the words `open`, `write`, `sync`, `rename`.
    """

    def __init__(self, path: str, working_suffix: str) -> None:
        self.path = path
        self.working_path = path + working_suffix
        self.bytes_written = 0
        self._written_back = 0
        self._fd = -1
        self.is_placed = False
        try:
            fault("copy.create")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self.working_path, flags, 0o644)
        except OSError as exc:
            raise from_os_error(exc, "open", path) from exc

    def write(self, piece: bytes | memoryview) -> None:
        """Appends a piece."""
        try:
            fault("copy.write")
            files.write_all(self._fd, piece)
        except OSError as exc:
            raise from_os_error(exc, "write", self.path) from exc
        self.bytes_written += len(piece)
        if self.bytes_written - self._written_back >= WRITE_BACK_BYTES:
            # Besides dropping what is clean this makes the system begin to write what is not, without waiting for it.
            with contextlib.suppress(OSError):
                length = self.bytes_written - self._written_back
                os.posix_fadvise(self._fd, self._written_back, length, os.POSIX_FADV_DONTNEED)
            self._written_back = self.bytes_written

    def finish(self, modified_ts_ns: int = 0) -> None:
        """Flushes and closes; the file gets this time if there is one."""
        try:
            if modified_ts_ns > 0:
                os.utime(self._fd, ns=(modified_ts_ns, modified_ts_ns))
            fault("copy.sync")
            os.fsync(self._fd)
        except OSError as exc:
            raise from_os_error(exc, "sync", self.path) from exc
        finally:
            self._close()

    def place(self) -> None:
        """Renames to the final name, durably."""
        try:
            fault("copy.rename")
            os.rename(self.working_path, self.path)
            self.is_placed = True
            files.sync_dir(os.path.dirname(self.path))
        except OSError as exc:
            raise from_os_error(exc, "rename", self.path) from exc

    def discard(self) -> None:
        """Removes the working file unless it was placed. What fails is logged."""
        self._close()
        if not self.is_placed:
            _remove(self.working_path)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _remove(path: str) -> None:
    try:
        files.remove_if_exists(path)
    except OSError as exc:
        log.warning("cannot remove %s: %s", path, from_os_error(exc, "unlink", path))


class Holder(Protocol):
    """The part of a store that choosing a place needs."""

    locations: list[DiskLocation]
    ec: EcMembers

    def find_volume(self, vid: int) -> Volume | None: ...


def receive_path(
    holder: Holder, vid: int, collection: str, extension: str, *, is_ec: bool, disk_id: int, disk_type: str
) -> str:
    """Where a pushed file goes. Raises StorageError with upstream's texts.

    A file that the mounted volume of this id has open is refused: upstream overwrites it under the running volume.
    """
    check_names(extension, collection)
    name = volume_base_name(collection, vid)
    if is_ec:
        return f"{_ec_directory(holder, vid, collection, disk_id)}/{name}{extension}"
    volume = holder.find_volume(vid)
    if volume is not None:
        if extension in _OPEN_FILES:
            raise StorageError(f"volume {vid} is mounted; unmount before ReceiveFile of {extension}")
        return path_in_volume(volume, extension)
    if not disk_type:
        raise StorageError(f"volume {vid} not found")
    wanted = normalize_disk_type(disk_type)
    mounted_on = {shards.disk_id for shards in holder.ec.copies(vid)}
    best, most = None, 0
    for location in holder.locations:
        if location.disk_type != wanted or location.is_low or location.is_unavailable or location.free_slots <= most:
            continue
        if location.disk_id not in mounted_on and not _holds_shards(location, name):
            best, most = location, location.free_slots
    if best is None:
        raise StorageError(f"no {disk_type} disk location with a free slot for volume {vid}")
    return f"{best.directory}/{name}{extension}{STAGED}"


def _holds_shards(location: DiskLocation, name: str) -> bool:
    for shard in range(_MAX_SHARDS):
        with contextlib.suppress(OSError):
            if os.stat(f"{location.directory}/{name}.ec{shard:02d}").st_size > 0:
                return True
    return False


def _ec_directory(holder: Holder, vid: int, collection: str, disk_id: int) -> str:
    """The data directory of the disk asked for, else of the one where another shard goes best."""
    mounted_on = [shards.disk_id for shards in holder.ec.copies(vid)]
    if mounted_on:
        disks = " ".join(map(str, mounted_on))
        raise StorageError(f"ec volume {vid} is mounted on disk_ids:[{disks}]; unmount before ReceiveFile")
    if disk_id > 0:
        if disk_id >= len(holder.locations):
            raise StorageError(f"invalid disk_id {disk_id}: only have {len(holder.locations)} disks")
        return holder.locations[disk_id].directory
    target = holder.ec.target_location(collection, vid)
    if target is None:
        raise StorageError("no storage location available")
    return target.directory


# ------------------------------------------------------------------------------------------------------ a whole volume


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """What the source says of its volume (ReadVolumeFileStatus)."""

    vid: int
    collection: str
    version: int
    dat_bytes: int
    idx_bytes: int
    dat_modified_s: int
    compaction_revision: int
    disk_type: str
    is_remote: bool
    bytes_offset: int

    @property
    def needed_bytes(self) -> int:
        """Room that the copy takes, next to nothing of it besides."""
        return self.idx_bytes if self.is_remote else self.dat_bytes


@dataclass
class _Underway:
    """Copies that are being received by one store: which volumes, and what they will still take of each disk."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    vids: set[int] = field(default_factory=set)
    bytes_by_disk: dict[int, int] = field(default_factory=dict)
    slots_by_disk: dict[int, int] = field(default_factory=dict)


class CopyRoom:
    """Gives places to copies so that those under way together fit. One for each store; thread-safe."""

    def __init__(self) -> None:
        self._underway = _Underway()

    @contextlib.contextmanager
    def admit(
        self, locations: list[DiskLocation], vid: int, needed_bytes: int, disk_type: str
    ) -> Iterator[DiskLocation]:
        """The directory of that type with the most free slots that has room, reserved for the length of the block.

        A replica of the same volume does not count as a slot: it will be replaced. Raises NoFreeLocation `no space left
        for disk type %s`, StorageError when the volume is being copied already. Blocks on statvfs.
        """
        wanted = normalize_disk_type(disk_type)
        room = {
            location.disk_id: _available_bytes(location)
            for location in locations
            if location.disk_type == wanted and not location.is_low and not location.is_unavailable
        }
        state = self._underway
        with state.lock:
            if vid in state.vids:
                raise StorageError(f"volume {vid} is being copied already")
            best, most = None, 0
            for location in locations:
                disk = location.disk_id
                if room.get(disk, 0) - state.bytes_by_disk.get(disk, 0) <= needed_bytes:
                    continue
                slots = location.free_slots - state.slots_by_disk.get(disk, 0) + (location.find(vid) is not None)
                if slots > most:
                    best, most = location, slots
            if best is None:
                raise NoFreeLocation(f"no space left for disk type {readable_disk_type(wanted)}")
            disk = best.disk_id
            state.vids.add(vid)
            state.bytes_by_disk[disk] = state.bytes_by_disk.get(disk, 0) + needed_bytes
            state.slots_by_disk[disk] = state.slots_by_disk.get(disk, 0) + 1
        try:
            yield best
        finally:
            with state.lock:
                state.vids.discard(vid)
                state.bytes_by_disk[disk] -= needed_bytes
                state.slots_by_disk[disk] -= 1


def _available_bytes(location: DiskLocation) -> int:
    """Room above the reserve, looked up now: what is kept from minute to minute may be spent."""
    try:
        return disk_space.available_bytes(location.min_free, location.disk_usage())
    except OSError as exc:
        log.warning("disk %s: %s", location.directory, exc)
        return 0


class IncomingVolume:
    """The files of one volume being copied to a location. Use it in a with-block: what was not placed is removed.

    Steps: begin, open/finish each file, verify, place (by the store, once the old replica is out of the way).
    """

    def __init__(self, location: DiskLocation, status: SourceStatus) -> None:
        if not is_plain_file_part(status.collection):
            raise StorageError(f"invalid collection {go_quote(status.collection)}")
        self.status = status
        self.location = location
        self.name = volume_base_name(status.collection, status.vid)
        self._base = f"{location.directory}/{self.name}"
        self._idx_base = f"{location.idx_directory}/{self.name}"
        self._files: dict[str, IncomingFile] = {}
        self._noted = False
        self._whole = False
        self._placing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_note()
        if self._placing and not all(file.is_placed for file in self._files.values()):
            log.error(
                "volume %d: its copy is not all in place, the old replica is gone: %s* and %s are kept, the next start "
                "finishes",
                self.status.vid,
                self._base,
                self._base + MARKER,
            )
            return
        for file in self._files.values():
            file.discard()
        if self._whole:
            _remove(self._base + MARKER)

    def path(self, extension: str) -> str:
        """The final name of a part."""
        return (self._idx_base if extension == ".idx" else self._base) + extension

    def begin(self, source: str) -> None:
        """Writes the `.note` that tells people, and loaders, of an unfinished copy.

        Not where files of that name are: a loader that finds a note deletes them. Raises StorageError `write .note for
        volume %d: …`.
        """
        if any(files.exists(self.path(extension)) for extension in VOLUME_PARTS):
            return
        path = self._base + ".note"
        self._noted = True
        try:
            with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, NOTE_MODE) as fd:
                files.write_all(fd, f"copying from {source}".encode("utf-8", "replace"))
        except OSError as exc:
            error = from_os_error(exc, "open", path)
            raise disk_error(f"write .note for volume {self.status.vid}: {error}", error.errno, path=path) from exc

    def open(self, extension: str) -> IncomingFile:
        """Begins a part."""
        file = IncomingFile(self.path(extension), STAGED)
        self._files[extension] = file
        return file

    def drop(self, extension: str) -> None:
        """Forgets a part that the source does not have."""
        self._files.pop(extension).discard()

    def verify(self, *, replaces: bool) -> int:
        """Holds what arrived against the source's figures; returns the append time of the last record in ns.

        With `replaces` the files must also make a sound volume, because an old replica goes for them. Raises
        StorageError with upstream's texts.
        """
        status = self.status
        self._check_size(".idx")
        if status.is_remote:
            return status.dat_modified_s * 1_000_000_000
        self._check_size(".dat")
        last_ns = 0
        try:
            with contextlib.ExitStack() as stack:
                dat_fd = stack.enter_context(files.opened(self._working(".dat")))
                has_index = ".idx" in self._files
                idx_fd = stack.enter_context(files.opened(self._working(".idx"))) if has_index else None
                width = self._width(dat_fd, idx_fd)
                if idx_fd is not None and status.idx_bytes:
                    last_ns = self._last_append_ns(dat_fd, idx_fd, width)
                if replaces:
                    self._check_sound(dat_fd, idx_fd, width)
        except OSError as exc:
            raise from_os_error(exc, "open", self.path(".dat")) from exc
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, vid=status.vid, path=self.path(".dat")) from exc
        return last_ns or status.dat_modified_s * 1_000_000_000

    def _working(self, extension: str) -> str:
        return self._files[extension].working_path

    def _check_size(self, extension: str) -> None:
        expected = self.status.idx_bytes if extension == ".idx" else self.status.dat_bytes
        path = self.path(extension)
        file = self._files.get(extension)
        if file is None:
            reason = os_error_text("stat", path, errno.ENOENT)
            if extension == ".dat":
                raise StorageError(f"get dat file info failed, {reason}")
            if expected:
                raise StorageError(f"stat idx file {path} failed: {reason}")
            return
        if file.bytes_written != expected:
            what = f"idx file {path}" if extension == ".idx" else "the dat file"
            raise StorageError(f"{what} size [{file.bytes_written}] is not same as origin file size [{expected}]")

    def _width(self, dat_fd: int, idx_fd: int | None) -> int:
        said = self.status.bytes_offset
        if ".vif" in self._files:
            said = vif.load(self._working(".vif")).info.bytes_offset or said
        block = self._block(dat_fd)
        default = self.location.options.offset_width
        return index_files.resolve_width(said, self.path(".vif"), dat_fd, idx_fd, block, default)

    def _block(self, dat_fd: int) -> SuperBlock:
        try:
            return SuperBlock.read(dat_fd)
        except ValueError as exc:
            raise StorageError(f"copied volume {self.status.vid} has no super block: {exc}") from exc

    def _last_append_ns(self, dat_fd: int, idx_fd: int, width: int) -> int:
        """0 where it cannot be told; that is no error, as upstream."""
        rows = self.status.idx_bytes // (12 + width)
        try:
            row = engine.idx_read(idx_fd, width, max(0, rows - 1), 1)
            if not row or row[0].offset == 0:
                return 0
            return since.append_time(dat_fd, self.status.version or 3, row[0].offset)
        except engine.NativeError as exc:
            log.info("volume %d: append time of the last record: %s", self.status.vid, exc)
            return 0

    def _check_sound(self, dat_fd: int, idx_fd: int | None, width: int) -> None:
        vid, block = self.status.vid, self._block(dat_fd)
        kept = "the replica that is here was kept"
        if not block.is_supported:
            raise StorageError(f"copied volume {vid} has version {block.version}: {kept}")
        if idx_fd is None:
            return
        summary = engine.idx_summarize(idx_fd, width, block.version, self.status.dat_bytes)
        if summary.past_end:
            text = f"{summary.past_end} needles of its index lie behind the end of its data"
            raise StorageError(f"copied volume {vid} is damaged: {text}; {kept}")
        verdict, _, _ = engine.check_tail(dat_fd, idx_fd, width, block.version)
        if verdict not in (engine.TailVerdict.OK, engine.TailVerdict.DAT_LONGER):
            raise StorageError(f"copied volume {vid} is damaged: {verdict.name}; {kept}")

    def seal(self) -> None:
        """From here on the copy counts as whole: a crash is finished by `recover`. Removes the note before.

        Raises StorageError `remove .note for volume %d: …`.
        """
        path = self._base + ".note"
        if self._noted:
            try:
                files.remove_if_exists(path)
            except OSError as exc:
                error = from_os_error(exc, "remove", path)
                raise StorageError(f"remove .note for volume {self.status.vid}: {error}") from exc
            self._noted = False
        try:
            fault("copy.seal")
            for directory in {self.location.directory, self.location.idx_directory}:
                files.sync_dir(directory)
            files.replace_file(self._base + MARKER, " ".join(self._files).encode("ascii"), point="copy.marker")
        except OSError as exc:
            raise from_os_error(exc, "write", self._base + MARKER) from exc
        self._whole = True

    def place(self) -> None:
        """Renames all parts to their names. Called with the id's lock, when the old replica is gone: no way back."""
        self._placing = True
        try:
            _remove_index_caches(self._idx_base)
        except OSError as exc:
            raise from_os_error(exc, "remove", self._idx_base) from exc
        for extension in VOLUME_PARTS:
            if extension in self._files:
                self._files[extension].place()

    def _remove_note(self) -> None:
        if self._noted:
            _remove(self._base + ".note")


def _remove_index_caches(idx_base: str) -> None:
    for extension in _INDEX_CACHES:
        files.remove_if_exists(idx_base + extension)


# ------------------------------------------------------------------------------------------------------- after a crash


def recover(directory: str, idx_directory: str) -> None:
    """Finishes sealed copies and removes working files in directories that nobody uses yet. To be called at start only.

    A sealed copy is finished if the volume it was to replace is gone already (it lacks .dat or .idx); otherwise that
    one stays and the copy goes. Raises nothing; what was done, or failed, is logged.
    """
    for name in sorted(_list(directory)):
        base, extension = os.path.splitext(name)
        if extension == MARKER:
            _recover_sealed(directory, idx_directory, base)
        elif extension == ".note":
            _remove_lone_note(directory, base)
    for name in sorted(_list(directory)):
        stem, extension = os.path.splitext(name)
        base, part = os.path.splitext(stem)
        if name.endswith(MARKER + ".tmp"):
            _remove(f"{directory}/{name}")
        if extension not in (STAGED, RECEIVING, FETCHING) or not _EXTENSION.fullmatch(part):
            continue
        log.info("removing %s/%s of an interrupted copy", directory, name)
        _remove(f"{directory}/{name}")
        # The idx directory may be another server's too: only what belongs to a copy of ours goes.
        if extension == STAGED and idx_directory != directory:
            _remove(f"{idx_directory}/{base}.idx{STAGED}")


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as exc:
        log.warning("cannot list %s: %s", directory, exc)
        return []


def _recover_sealed(directory: str, idx_directory: str, name: str) -> None:
    marker = f"{directory}/{name}{MARKER}"
    try:
        with files.opened(marker) as fd:
            listed = os.read(fd, 256).decode("ascii", "replace").split()
        parts = {
            extension: f"{idx_directory if extension == '.idx' else directory}/{name}{extension}"
            for extension in VOLUME_PARTS
            if extension in listed
        }
        waiting = [path for path in parts.values() if files.exists(path + STAGED)]
        has_begun = len(waiting) < len(parts)
        # The index of the old replica may lie beside its data, where a loader looks first.
        indexes = (f"{place}/{name}.idx" for place in (directory, idx_directory))
        has_old = files.exists(f"{directory}/{name}.dat") and any(files.exists(path) for path in indexes)
        if has_begun or not has_old:
            log.warning("finishing the copy of volume %s that a crash interrupted", name)
            if not has_begun:
                _remove_rest(directory, idx_directory, name)
            _remove_index_caches(f"{idx_directory}/{name}")
            for path in waiting:
                # Once the renames have begun nothing of the old replica is left: what is there now was made since.
                if not (has_begun and files.exists(path)):
                    os.rename(path + STAGED, path)
            for place in {directory, idx_directory}:
                files.sync_dir(place)
        files.remove_if_exists(marker)
    except OSError as exc:
        log.error("cannot finish the copy of volume %s in %s: %s", name, directory, exc)


def _remove_rest(directory: str, idx_directory: str, name: str) -> None:
    """What a crash left of a replica that was being removed for a copy: nothing of it may be taken for the copy's.

    Raises OSError if it stays: then the copy waits for another start.
    """
    keep_vif = ec_files.has_nonempty_ecx(directory, idx_directory, name)
    places = dict.fromkeys((directory, idx_directory))
    for place in places:
        remove_volume_files(f"{place}/{name}", keep_vif)
    for path in (f"{place}/{name}{extension}" for place in places for extension in (".idx", ".cpc")):
        if files.exists(path):
            raise OSError(errno.EIO, "the old replica cannot be removed", path)
    for place in places:
        files.sync_dir(place)


def _remove_lone_note(directory: str, name: str) -> None:
    """Removes a note, and the data it tells to be unfinished, where no loader would come by and do so."""
    if any(files.exists(path) for path in (f"{directory}/{name}.idx", f"{directory}/{name}.vif")):
        return
    log.warning("volume %s in %s was not completed", name, directory)
    for extension in (".dat", ".note"):
        _remove(f"{directory}/{name}{extension}")
