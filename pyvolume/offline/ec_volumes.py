"""What the offline commands share on erasure coded volumes: which there are, reading the data through their shards.

The files of one volume may lie in several of the directories given, which are held together. May import common,
storage, _native and the leaves.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from pyvolume._native import ec, engine
from pyvolume.errors import from_native, from_os_error
from pyvolume.offline.common import CannotRun, Job, held
from pyvolume.storage import files, vif
from pyvolume.storage.ec import index
from pyvolume.storage.ec.encode import ratio_of
from pyvolume.storage.ec.layout import Layout, Ratio, layout_of
from pyvolume.storage.superblock import CURRENT_VERSION, SUPER_BLOCK_SIZE, SuperBlock
from pyvolume.types import parse_volume_base_name

HEADER_BYTES: Final = 16
_SHARD: Final = re.compile(r"\.ec(\d\d)")
_BATCH: Final = 4096
_HEADER: Final = struct.Struct(">IQi")


@dataclass
class EcFiles:
    """Where the files of one erasure coded volume are; one path for each file, in the order of the directories."""

    collection: str
    vid: int
    name: str
    directories: list[str] = field(default_factory=list)
    shards: dict[int, list[str]] = field(default_factory=dict)
    ecx: list[str] = field(default_factory=list)
    ecj: list[str] = field(default_factory=list)
    vifs: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)
    dat: str = ""
    """A plain volume of the same name, which a server prefers."""
    others: list[str] = field(default_factory=list)
    """Files of working names."""
    idx_directory: str = ""

    @property
    def base(self) -> str:
        return f"{self.directories[0]}/{self.name}"

    def __str__(self) -> str:
        return self.base

    def info(self) -> vif.VifResult:
        """The first .vif that there is; `missing` without any."""
        return vif.load(self.vifs[0] if self.vifs else self.base + ".vif")


def _take(found: dict[str, EcFiles], place: str, entry: str, *, is_data: bool) -> None:
    base, extension = os.path.splitext(entry)
    working = extension in (".tmp", ".rebuilding", ".fixing")
    if working:
        base, extension = os.path.splitext(base)
    is_shard = _SHARD.fullmatch(extension)
    if not is_shard and extension not in (".ecx", ".ecj", ".vif", ".ecsum", ".dat"):
        return
    try:
        collection, vid = parse_volume_base_name(base)
    except ValueError:
        return
    path = f"{place}/{entry}"
    if not os.path.isfile(path):
        return
    volume = found.setdefault(base, EcFiles(collection, vid, base))
    if working:
        if is_shard or extension == ".ecx":
            volume.others.append(path)
    elif is_shard:
        if is_data:
            volume.shards.setdefault(int(is_shard[1]), []).append(path)
    elif extension == ".dat":
        volume.dat = volume.dat or path
    else:
        {".ecx": volume.ecx, ".ecj": volume.ecj, ".vif": volume.vifs, ".ecsum": volume.sums}[extension].append(path)
    if is_data and (is_shard or extension == ".ecx") and place not in volume.directories:
        volume.directories.append(place)


def ec_volumes_in(job: Job) -> list[EcFiles]:
    """The erasure coded volumes of all directories that the options ask for, by id. Raises OSError."""
    args = job.args
    found: dict[str, EcFiles] = {}
    places = {os.path.normpath(directory): True for directory in args.directories if os.path.isdir(directory)}
    if args.idx_dir:
        places.setdefault(os.path.normpath(args.idx_dir), False)
    for place, is_data in places.items():
        for entry in sorted(os.listdir(place)):
            _take(found, place, entry, is_data=is_data)
    chosen = []
    for volume in found.values():
        wanted = (not args.volume_id or volume.vid in args.volume_id) and args.collection in (None, volume.collection)
        if wanted and volume.directories:
            volume.ecx.sort(key=lambda path: os.path.getsize(path) == 0)
            volume.idx_directory = os.path.normpath(args.idx_dir) if args.idx_dir else volume.directories[0]
            chosen.append(volume)
    return sorted(chosen, key=lambda volume: (volume.vid, volume.name))


def ec_ids(job: Job) -> set[int]:
    """Ids of the erasure coded volumes of the directories; what cannot be read has none."""
    try:
        return {volume.vid for volume in ec_volumes_in(job)}
    except OSError:
        return set()


def for_each_ec_volume(job: Job, *, will_write: bool) -> Iterator[EcFiles]:
    """All erasure coded volumes, while all directories that hold some are held. What hinders becomes an error."""
    try:
        with contextlib.ExitStack() as stack:
            for directory in sorted({place for volume in ec_volumes_in(job) for place in volume.directories}):
                stack.enter_context(held(directory, will_write=will_write))
            yield from ec_volumes_in(job)
    except CannotRun as exc:
        if str(exc) not in job.errors:
            job.fail(str(exc))
    except BrokenPipeError:
        raise
    except OSError as exc:
        job.fail(str(from_os_error(exc, "open", exc.filename or job.args.directories[0])))


def width_of(volume: EcFiles, default: int) -> int:
    """Offset width of the index: as the .vif says, else what its length allows, `default` first."""
    said = volume.info().info.bytes_offset
    if said in (4, 5):
        return said
    other = 9 - default
    size = os.path.getsize(volume.ecx[0]) if volume.ecx else 0
    return other if size % index.row_bytes(default) and not size % index.row_bytes(other) else default


def rows_of(fd: int, width: int) -> Iterator[engine.IdxRow]:
    """All whole rows of an open index. Raises NativeError."""
    at = 0
    while rows := engine.idx_read(fd, width, at, _BATCH):
        yield from rows
        at += len(rows)


class Shards:
    """The data of a volume, read through its shards; what is missing is made of the others.

    Opens at construction all shards of the length that most have; `others` are those of another length. Raises OSError;
    CannotRun with less than the data shards. Use as a context, which closes them.
    """

    def __init__(self, volume: EcFiles, *, without: Collection[int] = ()) -> None:
        found = volume.info()
        self.ratio: Ratio = ratio_of(found.info)
        self.encoded_bytes = found.info.dat_file_size
        self.paths = {n: paths[0] for n, paths in sorted(volume.shards.items()) if n < self.ratio.total}
        sizes = {n: os.path.getsize(path) for n, path in self.paths.items()}
        counts = list(sizes.values())
        self.shard_bytes = max(counts, key=lambda size: (counts.count(size), size)) if counts else 0
        self.others = {n: size for n, size in sizes.items() if size != self.shard_bytes}
        self._stack = contextlib.ExitStack()
        self.fds: dict[int, int] = {}
        good = [n for n in self.paths if n not in self.others and n not in without]
        if len(good) < self.ratio.data or not self.shard_bytes:
            raise CannotRun(
                f"{volume}: {len(good)} usable shards of {self.ratio.data} that are needed; give all directories that "
                "have some, or copy shards here"
            )
        try:
            for n in good:
                self.fds[n] = self._stack.enter_context(files.opened(self.paths[n]))
            self.layout: Layout = layout_of(self.ratio, self.encoded_bytes, self.shard_bytes)
            self.block = SuperBlock.parse(self.read(0, SUPER_BLOCK_SIZE))
        except BaseException:
            self._stack.close()
            raise
        if not self.block.is_supported:
            self._stack.close()
            raise CannotRun(f"{self.paths.get(0, volume)}: offset 0: unknown version {self.block.version}")

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    @property
    def data_bytes(self) -> int:
        """Where the data ends; with zeros behind it if the .vif does not tell."""
        most = self.ratio.data * self.shard_bytes
        return min(self.encoded_bytes, most) if self.encoded_bytes > 0 else most

    def read(self, offset: int, length: int, without: Collection[int] = ()) -> bytes:
        """A stretch of the data, shorter at its end. `without`: shards not to be trusted. Raises OSError, CannotRun."""
        length = max(0, min(length, self.data_bytes - offset))
        pieces = [
            self._piece(part.shard, part.offset, part.length, without) for part in self.layout.locate(offset, length)
        ]
        return b"".join(pieces)

    def _piece(self, shard: int, offset: int, length: int, without: Collection[int]) -> bytes:
        if shard in self.fds and shard not in without:
            return os.pread(self.fds[shard], length, offset)
        sources = [n for n in self.fds if n not in without][: self.ratio.data]
        if len(sources) < self.ratio.data:
            raise CannotRun(f"shard {shard} cannot be made of {len(sources)} others")
        pieces = {n: os.pread(self.fds[n], length, offset) for n in sources}
        return bytes(ec.recover(self.ratio.data, self.ratio.parity, pieces, shard))

    def needle(self, offset: int, size: int, key: int | None = None) -> engine.Needle:
        """The needle of a record, checksum and id verified. Raises OSError, NativeError, BadRecord.

        Where a record cannot be read, each shard that it lies in is taken for damaged in turn, and made of the others.
        """
        length = engine.needle_record_len(size, self.block.version)
        if size < 0 or offset + length > -(-self.data_bytes // 8) * 8:
            raise BadRecord(f"it would end at {offset + length}, the data ends at {self.data_bytes}")
        failure: Exception
        try:
            return self._parsed(self.read(offset, length), offset, size, key)
        except (engine.NativeError, BadRecord) as exc:
            failure = exc
        involved = {part.shard for part in self.layout.locate(offset, length)} & set(self.fds)
        if len(self.fds) > self.ratio.data:
            for shard in sorted(involved):
                with contextlib.suppress(engine.NativeError, BadRecord):
                    return self._parsed(self.read(offset, length, {shard}), offset, size, key)
        raise failure

    def _parsed(self, record: bytes, offset: int, size: int, key: int | None) -> engine.Needle:
        record += bytes(-len(record) % 8)
        needle = engine.parse_needle(record, self.block.version, size, offset=offset)
        if key is not None and needle.id != key:
            raise BadRecord(f"the record there is of needle {needle.id:x}")
        return needle

    def records(self) -> Iterator[EcRecord]:
        """All records from the first on, to the end of the data. Raises BadRecord where the next cannot be told,
        OSError, CannotRun."""
        at = self.block.block_bytes
        while at + HEADER_BYTES < self.data_bytes:
            record = self._record_at(at)
            if record is None:
                return
            yield record
            at += record.record_len

    def _record_at(self, at: int) -> EcRecord | None:
        """The record at an offset, which may be damaged; None for zeros, which are what is behind the last."""
        version = self.block.version
        damaged = None
        suspects = sorted({part.shard for part in self.layout.locate(at, HEADER_BYTES)} & set(self.fds))
        if len(self.fds) <= self.ratio.data:
            suspects = []
        blank = False
        for without in ((), *((shard,) for shard in suspects)):
            cookie, key, size = _HEADER.unpack(self.read(at, HEADER_BYTES, without).ljust(HEADER_BYTES, b"\0"))
            length = engine.needle_record_len(max(size, 0), version)
            if size < 0 or at + length > -(-self.data_bytes // 8) * 8:
                continue
            if not size:
                tail = self.read(at + HEADER_BYTES + 4, 8, without)
                if any(tail) if version == CURRENT_VERSION else key or cookie:
                    return EcRecord(at, key, cookie, 0, length)
                blank = blank or not without
                continue
            record = EcRecord(at, key, cookie, size, length)
            try:
                self.needle(at, size, key)
            except (engine.NativeError, BadRecord) as exc:
                damaged = damaged or replace(record, fault=exc)
                continue
            return record
        if blank and not damaged:
            return None
        if damaged is None:
            raise BadRecord(f"offset {at}: no further record can be told apart")
        return damaged


@dataclass(frozen=True, slots=True)
class EcRecord:
    """One record met on the way through the data; size 0: a delete or an empty file. fault: why it cannot be read."""

    offset: int
    key: int
    cookie: int
    size: int
    record_len: int
    fault: Exception | None = None


class BadRecord(Exception):
    """What stands at a place is not the record that is looked for; str() says why."""


def why(exc: Exception, path: str) -> str:
    """Why a record cannot be read, in words."""
    return str(from_native(exc.code, exc.info, path=path)) if isinstance(exc, engine.NativeError) else str(exc)
