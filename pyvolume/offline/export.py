"""List the needles of volumes, or write them to a tar file or a directory.

Columns, template and choice of needles are those of `weed export`. Unlike there, empty files are there, too, what is
deleted says so, an index that is missing is an error, names cannot leave the target, and memory is bounded.

May import common, check_ec, ec_volumes, storage, _native and the leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import posixpath
import re
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, Any, Final

from pyvolume._native import engine
from pyvolume.errors import from_native
from pyvolume.offline.check_ec import explained_ec
from pyvolume.offline.common import (
    CannotRun,
    Finding,
    Job,
    Layout,
    Progress,
    VolumeFiles,
    add_common_arguments,
    explained,
    for_each_volume,
    layout_of,
    plural,
)
from pyvolume.offline.ec_volumes import (
    BadRecord,
    EcFiles,
    Shards,
    ec_ids,
    for_each_ec_volume,
    rows_of,
    why,
    width_of,
)
from pyvolume.storage import files
from pyvolume.storage.ec import index as ec_index
from pyvolume.types import Ttl, format_key_cookie

_DEFAULT_FORMAT: Final = "{{.Id}}_{{.Name}}{{.Ext}}"
_COLUMNS: Final = "key\tname\tsize\tgzip\tmime\tmodified\tttl\tdeleted\tstart\tstop"
_FIELD: Final = re.compile(r"\{\{\s*\.(\w+)\s*\}\}")
_FIELDS: Final = ("Id", "Name", "Mime", "Key", "Ext")
_BATCH: Final = 4096
_CHUNK_BYTES: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"
_NAME_MAX: Final = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, changes=False)
    parser.add_argument(
        "-o",
        "--output",
        default="",
        metavar="OUT",
        help="a file that ends in .tar, - for a tar stream on standard output, or a directory; without it a list",
    )
    parser.add_argument("--format", default=_DEFAULT_FORMAT, metavar="TEMPLATE", help=f"file names ({_DEFAULT_FORMAT})")
    parser.add_argument(
        "--newer", type=_moment, default=None, metavar="TIME", help="only needles modified since, 2006-01-02T15:04:05"
    )
    parser.add_argument("--deleted", action="store_true", help="deleted and overwritten needles, too")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most so many needles of a volume")


def _moment(text: str) -> int:
    """Local time, as upstream takes it."""
    try:
        return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").timestamp())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not of the form 2006-01-02T15:04:05") from None


def run(job: Job) -> None:
    unknown = [name for name in _FIELD.findall(job.args.format) if name not in _FIELDS]
    if unknown:
        job.fail(f"--format {job.args.format}: no field {unknown[0]}; there are {', '.join(_FIELDS)}")
        return
    try:
        with _target(job) as target:
            for volume in for_each_volume(job, will_write=False, elsewhere=ec_ids(job)):
                facts: dict[str, object] = {"id": volume.vid, "collection": volume.collection, "path": volume.dat}
                with explained(job, volume):
                    facts["needles"] = export_volume(job, volume, target)
                job.report(**facts)
            for shards in for_each_ec_volume(job, will_write=False):
                if shards.dat:  # which was written out already
                    continue
                facts = {"id": shards.vid, "collection": shards.collection, "path": shards.base}
                with explained_ec(job, shards):
                    facts["needles"] = export_ec_volume(job, shards, target)
                job.report(**facts)
    except OSError as exc:
        if isinstance(exc, BrokenPipeError):
            raise
        job.fail(f"{job.args.output or 'standard output'}: {exc.strerror or exc}")
    if job.args.output:
        total = sum(int(str(facts.get("needles", 0))) for facts in job.volumes)
        job.say(f"{plural(total, 'needle')} of {plural(len(job.volumes), 'volume')} written to {job.args.output}")


# ------------------------------------------------------------------------------------------------------------ targets


class _List:
    """Prints a line for each needle; with --json the lines become part of the answer."""

    wants_data = False

    def __init__(self, job: Job) -> None:
        self._job = job
        if not job.args.json:
            job.say(_COLUMNS)

    def line(self, columns: tuple[Any, ...]) -> None:
        if self._job.args.json:
            self._job.report_needle(dict(zip(_COLUMNS.split("\t"), columns, strict=True)))
        else:
            self._job.say("\t".join(_go(value) for value in columns))

    def file(self, _name: str, _modified_s: int, _size: int, _data: IO[bytes]) -> None:
        raise AssertionError("a list takes no data")


def _go(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Tar:
    wants_data = True

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def file(self, name: str, modified_s: int, size: int, data: IO[bytes]) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = size, modified_s, 0o644
        self._archive.addfile(member, data)


class _Directory:
    wants_data = True

    def __init__(self, path: str) -> None:
        self._path = path

    def file(self, name: str, modified_s: int, _size: int, data: IO[bytes]) -> None:
        path = f"{self._path}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{os.path.dirname(path)}/.{os.path.basename(path)[:200]}.partial"
        try:
            with open(partial, "wb") as out:
                while piece := data.read(_CHUNK_BYTES):
                    out.write(piece)
            os.utime(partial, (modified_s, modified_s))
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise


@contextlib.contextmanager
def _target(job: Job) -> Iterator[Any]:
    output = job.args.output
    if not output:
        yield _List(job)
    elif output == "-":
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            yield _Tar(archive)
        sys.stdout.buffer.flush()
    elif output.endswith(".tar"):
        partial = output + ".partial"
        try:
            with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
                yield _Tar(archive)
            os.replace(partial, output)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
    else:
        os.makedirs(output, exist_ok=True)
        yield _Directory(output)


# --------------------------------------------------------------------------------------------------------- one volume


class _Data(io.RawIOBase):
    """The data of one needle as a file; the checksum is verified when the last byte has been read."""

    def __init__(self, volume: engine.Volume | None, needle: engine.Needle) -> None:
        super().__init__()
        self._volume, self._needle = volume, needle
        self._at, self._crc = 0, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        needle = self._needle
        left = needle.data_size - self._at
        want = left if size is None or size < 0 else min(size, left)
        if want <= 0:
            return b""
        if needle.data is not None or self._volume is None:
            assert needle.data is not None
            piece = bytes(needle.data[self._at : self._at + want])
        else:
            want = min(want, _CHUNK_BYTES)
            piece = bytes(self._volume.pread(needle.data_offset + self._at, want, needle.entry_revision))
            self._crc = engine.crc32c(piece, self._crc)
            if want == left and needle.checksum not in (self._crc, engine.crc_legacy(self._crc)):
                raise _Damaged(
                    f"invalid CRC for needle {needle.id:x} (got {self._crc:08x}, want {needle.checksum:08x})"
                )
        self._at += len(piece)
        return piece


class _Damaged(Exception):
    """The data of a needle turned out to be damaged while it was being written out."""


def export_volume(job: Job, volume: VolumeFiles, target: Any) -> int:
    """Gives the needles of one volume, in the order of the data file, to the target; returns how many."""
    if not files.exists(volume.dat):
        raise CannotRun(f"{volume.dat} does not exist")
    if not files.exists(volume.idx):
        raise CannotRun(f"{volume.idx} does not exist: run `pyvolume fix` first")
    layout = layout_of(volume, job.args.offset_bytes)
    flags = engine.OpenFlag.DAT_READONLY | engine.OpenFlag.IDX_READONLY
    count = 0
    with (
        files.opened(volume.dat) as dat_fd,
        engine.Volume.open(volume.dat, volume.idx, vid=volume.vid, flags=flags, offset_width=layout.width) as opened,
        Progress(job, layout.dat_bytes, volume.name) as progress,
    ):
        for offset, size, record_len, key, live in _candidates(job, volume, layout, dat_fd, opened):
            progress.to(offset)
            if not live and not job.args.deleted:
                continue
            entry = engine.Entry(offset, size, layout.block.compaction_revision)
            try:
                needle = _read(opened, dat_fd, layout, key, entry)
            except engine.NativeError as exc:
                why = from_native(exc.code, exc.info, path=volume.dat, offset_width=layout.width)
                job.find(Finding("error", volume.dat, f"needle {key:x} left out: {why}", "", offset, key))
                continue
            if job.args.newer is not None and needle.has_last_modified and needle.last_modified_s < job.args.newer:
                continue
            if job.args.limit and count >= job.args.limit:
                break
            deleted = not live
            if target.wants_data:
                if not live and needle.data_size == 0:
                    continue
                try:
                    name = _file_name(job.args.format, volume.vid, needle, opened)
                    target.file(name, needle.last_modified_s, needle.data_size, _Data(opened, needle))
                except _Damaged as exc:
                    job.find(Finding("error", volume.dat, str(exc), "its copy is damaged, too", offset, key))
            else:
                target.line(_columns(volume.vid, needle, deleted, offset, record_len))
            count += 1
        progress.to(layout.dat_bytes)
    return count


def export_ec_volume(job: Job, volume: EcFiles, target: Any) -> int:
    """As export_volume, of the shards of an erasure coded volume; as many as are parity may be missing.

    Each record is in memory as a whole, one at a time.
    """
    if not volume.ecx:
        raise CannotRun(f"{volume.base}.ecx does not exist: run `pyvolume fix` first")
    width = width_of(volume, job.args.offset_bytes)
    deleted = {key for path in volume.ecj for key in ec_index.read_journal(path)}
    with files.opened(volume.ecx[0]) as fd:
        live = {
            row.offset: (row.key, row.size) for row in rows_of(fd, width) if row.size >= 0 and row.key not in deleted
        }
    count = 0
    with Shards(volume) as shards, Progress(job, shards.data_bytes, volume.name) as progress:
        for offset, key, size in _ec_candidates(job, volume, shards, live):
            progress.to(offset)
            is_live = offset in live
            try:
                needle = shards.needle(offset, size, key)
            except (engine.NativeError, BadRecord) as exc:
                text = f"needle {key:x} left out: {why(exc, volume.base)}"
                job.find(Finding("error", volume.base, text, "", offset, key))
                continue
            if job.args.newer is not None and needle.has_last_modified and needle.last_modified_s < job.args.newer:
                continue
            if job.args.limit and count >= job.args.limit:
                break
            if target.wants_data:
                if not is_live and needle.data_size == 0:
                    continue
                name = _file_name(job.args.format, volume.vid, needle, None)
                target.file(name, needle.last_modified_s, needle.data_size, _Data(None, needle))
            else:
                length = engine.needle_record_len(size, shards.block.version)
                target.line(_columns(volume.vid, needle, not is_live, offset, length))
            count += 1
        progress.to(shards.data_bytes)
    return count


def _ec_candidates(
    job: Job, volume: EcFiles, shards: Shards, live: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """(offset, key, Size) of the records wanted, in the order of the data."""
    if not job.args.deleted:
        for offset, (key, size) in sorted(live.items()):
            yield offset, key, size
        return
    try:
        for record in shards.records():
            yield record.offset, record.key, record.size
    except BadRecord as exc:
        job.find(Finding("error", volume.base, str(exc), "run `pyvolume check`"))


def _candidates(
    job: Job, volume: VolumeFiles, layout: Layout, dat_fd: int, opened: engine.Volume
) -> Iterator[tuple[int, int, int, int, bool]]:
    """(offset, Size, length, key, whether it is the live record of the key) of every record."""
    at = layout.block.block_bytes
    while at < layout.dat_bytes:
        try:
            records, after = engine.dat_scan(dat_fd, layout.block.version, at, 0, False, _BATCH)
        except engine.NativeError as exc:
            why = from_native(exc.code, exc.info, path=volume.dat, offset_width=layout.width)
            job.find(Finding("error", volume.dat, f"no further record can be read: {why}", "run `pyvolume check`", at))
            return
        if not records:
            return
        for record in records:
            live = False
            with contextlib.suppress(engine.NativeError):
                entry = opened.lookup(record.id)
                live = entry.size >= 0 and entry.offset == record.offset
            yield record.offset, record.size, record.record_len, record.id, live
        at = after


def _read(opened: engine.Volume, dat_fd: int, layout: Layout, key: int, entry: engine.Entry) -> engine.Needle:
    """The needle of a record; one without data is read for its cookie, too."""
    if entry.size > 0:
        return opened.read(key, meta_ok=True, entry=entry)
    length = engine.needle_record_len(0, layout.block.version)
    return engine.parse_needle(os.pread(dat_fd, length, entry.offset), layout.block.version, 0)


def _columns(vid: int, needle: engine.Needle, deleted: bool, offset: int, record_len: int) -> tuple[Any, ...]:
    name = "*tombstone" if deleted and needle.data_size == 0 else _text(needle.name)
    size = needle.size if needle.version == 1 else needle.data_size
    # Quirk: without a time it is the beginning of 1970
    modified = datetime.fromtimestamp(needle.last_modified_s, UTC).astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    return (
        f"{vid},{format_key_cookie(needle.id, needle.cookie)}",
        name,
        size,
        needle.is_compressed,
        _text(needle.mime),
        modified,
        str(Ttl(needle.ttl_count, needle.ttl_unit)),
        deleted,
        offset,
        offset + record_len,
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").replace("\t", " ").replace("\n", " ")


def _file_name(template: str, vid: int, needle: engine.Needle, opened: engine.Volume | None) -> str:
    """The template filled in; never a path that leaves the target."""
    raw = needle.name.decode("utf-8", "surrogateescape")
    values = {
        "Id": f"{needle.id:x}",
        "Name": raw,
        "Mime": needle.mime.decode("utf-8", "replace"),
        "Key": f"{vid},{format_key_cookie(needle.id, needle.cookie)}",
        "Ext": posixpath.splitext("_" + posixpath.basename(raw))[1] if "." in raw else "",
    }
    name = _FIELD.sub(lambda match: values[match[1]], template)
    parts = [part for part in name.replace("\0", "_").split("/") if part not in ("", ".", "..")]
    name = "/".join(part[-_NAME_MAX:] for part in parts) or f"{needle.id:x}"
    if needle.is_compressed and needle.data_size >= 2 and posixpath.splitext(name)[1] != ".gz":
        head = (
            bytes((needle.data or b"")[:2])
            if needle.data is not None or opened is None
            else bytes(opened.pread(needle.data_offset, 2, needle.entry_revision))
        )
        if head == _GZIP:
            name += ".gz"
    return name
