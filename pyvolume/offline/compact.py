"""Vacuum volumes: copy what is live, put the copy in place. The same result as a vacuum by a server.

Unlike `weed compact`, which leaves its result to be deleted by the next start, this commits (departure P3). May import
common, storage and the leaves.
"""

from __future__ import annotations

import argparse

from pyvolume._native import engine
from pyvolume.offline.common import (
    Finding,
    Job,
    Progress,
    VolumeFiles,
    add_common_arguments,
    explained,
    for_each_volume,
    layout_of,
    plural,
    positive_rate,
)
from pyvolume.storage import compact, compact_recovery, files
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE
from pyvolume.storage.volume_load import LoadOptions, load_volume


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, changes=True)
    parser.add_argument(
        "--garbage", type=float, default=0.0, metavar="SHARE", help="only volumes with more garbage than this (0.3)"
    )
    parser.add_argument(
        "--rate", type=positive_rate, default=0, metavar="MB", help="write at most so many MiB a second (0: no limit)"
    )


def run(job: Job) -> None:
    done = freed = 0
    for volume in for_each_volume(job, will_write=not job.args.dry_run):
        facts: dict[str, object] = {"id": volume.vid, "collection": volume.collection, "path": volume.dat}
        with explained(job, volume):
            facts |= _dry_run(job, volume) if job.args.dry_run else compact_volume(job, volume)
        done += bool(facts.get("compacted"))
        freed += int(str(facts.get("freed_bytes", 0)))
        job.report(**facts)
    if job.args.dry_run:
        job.say(f"{plural(len(job.volumes), 'volume')} looked at, nothing changed")
    else:
        job.say(f"{plural(len(job.volumes), 'volume')} looked at, {done} compacted, {freed} bytes freed")


def _ratio(stat: engine.VolumeStat) -> float:
    """Share of garbage (contract storage.md 16)."""
    if stat.file_bytes == 0:
        return 0.0
    if stat.deleted_count > 0 and stat.deleted_bytes == 0:
        return (stat.dat_bytes - stat.file_bytes - SUPER_BLOCK_SIZE) / stat.dat_bytes
    return stat.deleted_bytes / stat.file_bytes


def _dry_run(job: Job, volume: VolumeFiles) -> dict[str, object]:
    layout = layout_of(volume, job.args.offset_bytes)
    flags = engine.OpenFlag.DAT_READONLY | engine.OpenFlag.IDX_READONLY
    with engine.Volume.open(volume.dat, volume.idx, vid=volume.vid, flags=flags, offset_width=layout.width) as opened:
        stat = opened.stat()
    ratio = _ratio(stat)
    if ratio > job.args.garbage:
        text = f"would be compacted: {ratio:.1%} of it, {stat.deleted_bytes} bytes, is garbage"
        job.find(Finding("warning", volume.dat, text))
    return {"garbage": ratio, "bytes": stat.dat_bytes, "deleted_bytes": stat.deleted_bytes}


def compact_volume(job: Job, volume: VolumeFiles) -> dict[str, object]:
    """Vacuums one volume and commits. Raises StorageError, OSError; the volume is then as it was."""
    if files.exists(volume.base + ".note"):
        job.find(Finding("error", volume.base + ".note", "a copy of this volume was not completed", "copy it again"))
        return {}
    compact_recovery.recover(volume.directory, volume.idx_directory, volume.name, default_width=job.args.offset_bytes)
    opened = load_volume(
        volume.directory,
        volume.idx_directory,
        volume.collection,
        volume.vid,
        options=LoadOptions(offset_width=job.args.offset_bytes),
    )
    try:
        if opened.no_write_or_delete and not opened.info.read_only:
            text = "the volume is damaged or cannot be written to: nothing was done"
            job.find(Finding("error", volume.dat, text, "see what `pyvolume check` says"))
            return {"compacted": False}
        before = opened.stat()
        ratio = opened.garbage_ratio
        facts: dict[str, object] = {"garbage": ratio, "bytes": before.dat_bytes, "compacted": False}
        if ratio <= job.args.garbage:
            job.say(f"{volume.dat}: {ratio:.1%} garbage, left as it is")
            return facts
        with Progress(job, before.dat_bytes, volume.name) as progress:

            def go_on(source_offset: int) -> bool:
                progress.to(source_offset)
                return True

            stats = compact.compact(opened, bytes_per_s=job.args.rate, go_on=go_on)
        compact.commit(opened)
        after = opened.stat()
        if stats is not None and stats.dropped_needles:
            text = (
                f"{plural(stats.dropped_needles, 'needle')} could not be read and were left behind, the first is "
                f"{stats.first_dropped_key:x}"
            )
            job.find(Finding("error", volume.dat, text, "copy them from a replica", stats.first_dropped_offset))
        freed = before.dat_bytes - after.dat_bytes
        job.say(f"{volume.dat}: {before.dat_bytes} -> {after.dat_bytes} bytes, {after.map_entries} needles")
        return facts | {
            "compacted": True,
            "new_bytes": after.dat_bytes,
            "freed_bytes": freed,
            "needles": after.map_entries,
            "revision": after.compaction_revision,
        }
    finally:
        opened.close()
