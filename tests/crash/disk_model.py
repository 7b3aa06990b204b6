"""What may be on a disk after a crash, from the log that csrc/test/iotrace.c writes.

`Trace.killed(cut)` is what a killed process leaves: every call up to the cut took effect, the last write perhaps in
part. `Trace.power_lost(cut, rng)` is one of the many states after a loss of power: of each file, what was written
since its last finished flush is there or not, write by write or page by page, and of each directory, the last names
are there or not. A write that a failed flush should have covered may be lost for good, whatever is flushed later.
"""

from __future__ import annotations

import json
import os
import random
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

HEADER = struct.Struct("=IIQQQQQ")
PAGE = 4096


class Op(IntEnum):
    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC_BEGIN = 4
    SYNC_END = 5
    RENAME = 6
    UNLINK = 7
    NOTE = 8


@dataclass(slots=True)
class Change:
    """A write (data) or a truncate (data None) of a file."""

    at: int
    """Number of its entry in the log."""
    offset: int
    data: bytes | None

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            if len(content) > self.offset:
                del content[self.offset :]
            else:
                content.extend(bytes(self.offset - len(content)))
            return
        if len(content) < self.offset:
            content.extend(bytes(self.offset - len(content)))
        content[self.offset : self.offset + len(self.data)] = self.data


@dataclass(slots=True)
class Flush:
    begin: int
    end: int | None = None
    """Number of the entry where it had succeeded; None if it never did."""


@dataclass
class File:
    changes: list[Change] = field(default_factory=list)
    flushes: list[Flush] = field(default_factory=list)

    def durable_through(self, cut: int) -> list[bool]:
        """For each change before the cut: whether it must be on disk."""
        done = [f for f in self.flushes if f.end is not None and f.end < cut]
        failed = [f for f in self.flushes if f.end is None]
        out = []
        for change in self.changes:
            if change.at >= cut:
                break
            # the first flush that began behind it decides: a failed one marks the pages as clean
            begins = [f.begin for f in done if f.begin > change.at]
            lost = [f.begin for f in failed if f.begin > change.at]
            out.append(bool(begins) and not (lost and min(lost) < min(begins)))
        return out


@dataclass(slots=True)
class Naming:
    """One change of a directory."""

    at: int
    op: Op
    path: str
    file: File | None = None
    target: str = ""


@dataclass
class Trace:
    """The parsed log. Paths are relative to the watched directory."""

    names: list[Naming] = field(default_factory=list)
    directory_flushes: dict[str, list[Flush]] = field(default_factory=dict)
    notes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    """Places just before a call that changes something, and the end: notes in between belong to the state before. None
    before the note `filled`, if there is one."""
    writes: dict[int, Change] = field(default_factory=dict)
    """By the cut that is the first to include it."""

    @classmethod
    def read(cls, log: Path, base: Path) -> Trace:
        trace = cls()
        raw = log.read_bytes()
        files: dict[int, File] = {}
        directories: dict[int, str] = {}
        flushes: dict[int, Flush] = {}
        at = position = 0
        last_write: Change | None = None
        while position < len(raw):
            op_number, _, inode, offset, length, token, _ = HEADER.unpack_from(raw, position)
            data = raw[position + HEADER.size : position + HEADER.size + length]
            position += HEADER.size + length
            op = Op(op_number)
            if op in (Op.CREATE, Op.WRITE, Op.TRUNCATE, Op.RENAME, Op.UNLINK):
                if last_write is not None:
                    trace.writes[at] = last_write
                    last_write = None
                trace.cuts.append(at)
            if op is Op.NOTE:
                note = json.loads(data)
                if note["e"] == "filled":
                    trace.cuts.clear()
                if note["e"] == "dir":
                    directories[note["inode"]] = os.path.relpath(note["path"], base)
                trace.notes.append((at, note))
            elif op is Op.CREATE:
                files[inode] = File()
                trace.names.append(Naming(at, op, os.path.relpath(data.decode(), base), files[inode]))
            elif op is Op.WRITE or op is Op.TRUNCATE:
                change = Change(at, offset, data if op is Op.WRITE else None)
                files[inode].changes.append(change)
                last_write = change if op is Op.WRITE else None
            elif op is Op.RENAME:
                source, target = data.decode().split("\0")
                relative = os.path.relpath(source, base), os.path.relpath(target, base)
                trace.names.append(Naming(at, op, relative[0], target=relative[1]))
            elif op is Op.UNLINK:
                trace.names.append(Naming(at, op, os.path.relpath(data.decode(), base)))
            elif op is Op.SYNC_BEGIN:
                flushes[token] = Flush(at)
                if inode in directories:
                    trace.directory_flushes.setdefault(directories[inode], []).append(flushes[token])
                else:
                    files[inode].flushes.append(flushes[token])
            else:
                flushes[token].end = at
            at += 1
        if last_write is not None:
            trace.writes[at] = last_write
        trace.cuts.append(at)
        return trace

    def _named(self, names: list[Naming]) -> dict[str, File]:
        out: dict[str, File] = {}
        for n in names:
            if n.op is Op.CREATE and n.file is not None:
                out[n.path] = n.file
            elif n.op is Op.UNLINK:
                out.pop(n.path, None)
            elif n.path in out:
                out[n.target] = out.pop(n.path)
        return out

    def killed(self, cut: int, torn: int | None = None) -> dict[str, bytearray]:
        """The files after the calls before the cut; `torn`: how many bytes of the last write took effect."""
        out: dict[str, bytearray] = {}
        for path, file in self._named([n for n in self.names if n.at < cut]).items():
            content = bytearray()
            for change in file.changes:
                if change.at >= cut:
                    break
                if torn is not None and change is self.writes.get(cut) and change.data is not None:
                    change = Change(change.at, change.offset, change.data[:torn])
                change.apply(content)
            out[path] = content
        return out

    def power_lost(self, cut: int, rng: random.Random) -> dict[str, bytearray]:
        """One state that may be found after power was lost at the cut."""
        directories = {os.path.dirname(n.path) for n in self.names}
        names = []
        for directory in sorted(directories):
            own = [n for n in self.names if n.at < cut and os.path.dirname(n.path) == directory]
            done = [f.begin for f in self.directory_flushes.get(directory, []) if f.end is not None and f.end < cut]
            kept = sum(n.at < max(done, default=-1) for n in own)
            names += own[: rng.choice((kept, len(own), rng.randint(kept, len(own))))]
        names.sort(key=lambda n: n.at)
        return {path: self._survivors(file, cut, rng) for path, file in self._named(names).items()}

    def _survivors(self, file: File, cut: int, rng: random.Random) -> bytearray:
        durable = file.durable_through(cut)
        changes = file.changes[: len(durable)]
        how = rng.choice(("none", "all", "some", "first", "most", "pages", "torn"))
        if how == "pages":
            return self._pages(changes, durable, rng)
        loose = [i for i, must in enumerate(durable) if not must]
        kept: set[int]
        if how == "none":
            kept = set()
        elif how in ("all", "torn"):
            kept = set(loose)
        elif how == "first":
            kept = set(loose[: rng.randint(0, len(loose))])
        else:
            share = 0.5 if how == "some" else 0.9
            kept = {i for i in loose if rng.random() < share}
        content = bytearray()
        for i, change in enumerate(changes):
            if not durable[i] and i not in kept:
                continue
            if how == "torn" and loose and i == loose[-1] and change.data is not None:
                change = Change(change.at, change.offset, change.data[: rng.randint(0, len(change.data))])
            change.apply(content)
        return content

    def _pages(self, changes: list[Change], durable: list[bool], rng: random.Random) -> bytearray:
        """Each page as it was after some change, at or behind the last that must be there; so is the length."""
        first = max((i + 1 for i, must in enumerate(durable) if must), default=0)
        loose_before = any(not must for must in durable[:first])
        versions: list[bytearray] = []
        content = bytearray()
        for i, change in enumerate(changes):
            if i >= first:
                versions.append(bytearray(content))
            if durable[i] or i >= first or not loose_before or rng.random() < 0.5:
                change.apply(content)
        versions.append(content)
        out = bytearray(rng.choice(versions))
        for at in range(0, len(out), PAGE):
            page = rng.choice(versions)[at : at + PAGE]
            size = min(PAGE, len(out) - at)
            out[at : at + size] = (page + bytes(PAGE))[:size]
        return out
