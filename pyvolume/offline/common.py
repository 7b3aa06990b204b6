"""What the offline commands share: arguments, the directories' locks, the volumes in them, findings, output, progress.

May import storage, _native and the leaves. Results go to standard output (text, or one JSON object with --json),
progress to standard error and only when that is a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Final, Literal, Self

from pyvolume._native import engine
from pyvolume.errors import DirectoryInUse, PyvolumeError, StorageError, from_native, from_os_error
from pyvolume.storage import dir_lock, files, index_files, vif
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE, SuperBlock
from pyvolume.types import parse_volume_base_name

EXIT_CLEAN: Final = 0
EXIT_FINDINGS: Final = 1
EXIT_NOT_RUN: Final = 2

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know of one file. `info` is no finding that changes the exit code."""

    level: Level
    file: str
    reason: str
    remedy: str = ""
    offset: int | None = None
    key: int | None = None

    def __str__(self) -> str:
        place = self.file if self.offset is None else f"{self.file}: offset {self.offset}"
        text = f"{self.level}: {place}: {self.reason}"
        return f"{text}; {self.remedy}" if self.remedy else text

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


class CannotRun(PyvolumeError):
    """The command cannot do its work on a directory or volume; str() says why and what to do."""


@dataclass(frozen=True, slots=True)
class VolumeFiles:
    """Where the files of one volume are, or would be."""

    directory: str
    idx_directory: str
    collection: str
    vid: int
    name: str

    @property
    def base(self) -> str:
        return f"{self.directory}/{self.name}"

    @property
    def dat(self) -> str:
        return self.base + ".dat"

    @property
    def vif(self) -> str:
        return self.base + ".vif"

    @property
    def idx(self) -> str:
        """The index; one beside the data wins over the idx directory, as at a server."""
        beside = self.base + ".idx"
        return beside if files.exists(beside) else f"{self.idx_directory}/{self.name}.idx"

    def __str__(self) -> str:
        return self.base


@dataclass(frozen=True, slots=True)
class Layout:
    """What a volume's files say about how they are to be read."""

    block: SuperBlock
    width: int
    dat_bytes: int


@dataclass
class Job:
    """One run of a command: its options, and what it has to say so far."""

    args: argparse.Namespace
    volumes: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    needles: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line for a person; silent with --json."""
        if not self.args.json:
            print(text, file=self.text_out, flush=True)

    @property
    def text_out(self) -> Any:
        """Where texts go: not to the standard output when that carries the data."""
        return sys.stderr if getattr(self.args, "output", "") == "-" else sys.stdout

    def find(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.say(str(finding))

    def fail(self, text: str) -> None:
        self.errors.append(text)
        print(f"pyvolume {self.args.command}: {text}", file=sys.stderr, flush=True)

    def report(self, **facts: Any) -> None:
        """What is to be said of one volume in the JSON answer."""
        self.volumes.append(facts)

    def report_needle(self, columns: dict[str, Any]) -> None:
        """A line of a list, for the JSON answer."""
        self.needles.append(columns)

    @property
    def exit_code(self) -> int:
        if self.errors:
            return EXIT_NOT_RUN
        return EXIT_FINDINGS if any(f.level != "info" for f in self.findings) else EXIT_CLEAN

    def finish(self) -> int:
        if self.args.json:
            answer = {
                "command": self.args.command,
                "exit_code": self.exit_code,
                "volumes": self.volumes,
                "findings": [finding.to_json() for finding in self.findings],
                "errors": self.errors,
            }
            if getattr(self.args, "dry_run", False):
                answer["dry_run"] = True
            if self.args.command == "export" and not self.args.output:
                answer["needles"] = self.needles
            json.dump(answer, self.text_out, indent=2)
            print(file=self.text_out, flush=True)
        return self.exit_code


def add_common_arguments(parser: argparse.ArgumentParser, *, changes: bool) -> None:
    parser.add_argument("directories", nargs="+", metavar="DIR", help="data directory, as a server's -dir")
    parser.add_argument("--idx-dir", default="", metavar="DIR", help="where the indexes are, as a server's -dir.idx")
    parser.add_argument("--volume-id", type=int, action="append", default=[], metavar="N", help="only this volume")
    parser.add_argument("--collection", default=None, metavar="NAME", help="only volumes of this collection")
    parser.add_argument(
        "--offset-bytes", type=int, choices=(4, 5), default=4, help="offset width of volumes that do not tell (4)"
    )
    parser.add_argument("--json", action="store_true", help="answer with one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, even on a terminal")
    if changes:
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")


# ------------------------------------------------------------------------------------------------------- directories


@contextlib.contextmanager
def held(directory: str, *, will_write: bool) -> Iterator[None]:
    """Keeps servers off a directory for the length of the block. Raises CannotRun when one has it.

    A directory that is only read is not given an identity file if it has none, and may be on a medium that cannot be
    written to.
    """
    if not os.path.isdir(directory):
        raise CannotRun(f"{directory} is no directory")
    lock: dir_lock.DirectoryLock | None = None
    try:
        if will_write or files.exists(f"{directory}/{dir_lock.UUID_FILE_NAME}"):
            try:
                lock = dir_lock.lock_directory(directory)
            except DirectoryInUse:
                raise
            except StorageError as exc:
                if will_write:
                    raise CannotRun(str(exc)) from exc
        for pid, path in dir_lock.writers_of_volumes(directory):
            text = f"{directory} is in use by process {pid}, which holds {path} open for writing"
            raise CannotRun(f"{text}: stop it first")
        yield
    except DirectoryInUse as exc:
        raise CannotRun(f"{exc}: stop that server first") from exc
    finally:
        if lock is not None:
            lock.release()


def volumes_in(directory: str, args: argparse.Namespace) -> list[VolumeFiles]:
    """The volumes of a directory that the options ask for, by id. Names from data and index files, and from `.vif`."""
    directory = os.path.normpath(directory)
    idx_directory = os.path.normpath(args.idx_dir) if args.idx_dir else directory
    names: set[str] = set()
    for place in dict.fromkeys((directory, idx_directory)):
        for entry in os.listdir(place):
            base, extension = os.path.splitext(entry)
            if extension in (".dat", ".idx") and os.path.isfile(f"{place}/{entry}"):
                names.add(base)
    found: list[VolumeFiles] = []
    for name in names:
        try:
            collection, vid = parse_volume_base_name(name)
        except ValueError:
            continue
        wanted = (not args.volume_id or vid in args.volume_id) and args.collection in (None, collection)
        beside = files.exists(f"{directory}/{name}.dat") or files.exists(f"{directory}/{name}.idx")
        # an index directory may be shared: what is only there belongs to another data directory
        if wanted and beside:
            found.append(VolumeFiles(directory, idx_directory, collection, vid, name))
    return sorted(found, key=lambda volume: (volume.vid, volume.name))


def for_each_volume(job: Job, *, will_write: bool, elsewhere: Collection[int] = ()) -> Iterator[VolumeFiles]:
    """All volumes of all directories, each while its directory is held. What cannot be run on becomes an error.

    elsewhere: ids of volumes that are there in another form.
    """
    for directory in dict.fromkeys(map(os.path.normpath, job.args.directories)):
        try:
            with held(directory, will_write=will_write):
                found = volumes_in(directory, job.args)
                yield from found
        except CannotRun as exc:
            job.fail(str(exc))
        except BrokenPipeError:
            raise
        except OSError as exc:
            job.fail(str(from_os_error(exc, "open", directory)))
    missing = set(job.args.volume_id) - {facts["id"] for facts in job.volumes} - set(elsewhere)
    if missing and not job.errors:
        job.fail(f"there is no volume {', '.join(map(str, sorted(missing)))} in {', '.join(job.args.directories)}")


def layout_of(volume: VolumeFiles, default_width: int) -> Layout:
    """How the files are to be read. Raises CannotRun naming the file and why, OSError, StorageError."""
    size = os.stat(volume.dat).st_size
    if size < SUPER_BLOCK_SIZE:
        raise CannotRun(f"{volume.dat}: offset 0: {size} bytes are no super block")
    with contextlib.ExitStack() as stack:
        dat_fd = stack.enter_context(files.opened(volume.dat))
        block = SuperBlock.read(dat_fd)
        if not block.is_supported:
            raise CannotRun(f"{volume.dat}: offset 0: unknown version {block.version}")
        idx_fd = stack.enter_context(files.opened(volume.idx)) if files.exists(volume.idx) else None
        said = vif.load(volume.vif).info.bytes_offset
        said = said if said in (4, 5) else 0
        width = index_files.resolve_width(said, volume.vif, dat_fd, idx_fd, block, default_width)
    return Layout(block, width, size)


@contextlib.contextmanager
def explained(job: Job, volume: VolumeFiles) -> Iterator[None]:
    """Turns what keeps a command from working on one volume into an error that names it; the others go on."""
    try:
        yield
    except CannotRun as exc:
        job.fail(str(exc))
    except BrokenPipeError:
        raise
    except StorageError as exc:
        job.fail(f"{volume}: {exc}")
    except engine.NativeError as exc:
        job.fail(f"{volume}: {from_native(exc.code, exc.info, vid=volume.vid, path=volume.dat)}")
    except OSError as exc:
        job.fail(f"{volume}: {from_os_error(exc, 'open', exc.filename or volume.dat)}")


def keep_and_replace(new: str, path: str) -> str:
    """Keeps a file as `<path>.bak-<time>`, if it is there, and puts the new one in its place; gives that name.

    A crash leaves the one or the other. Raises OSError.
    """
    backup = ""
    if files.exists(path):
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for attempt in count():
            backup = f"{path}.bak-{stamp}" + (f".{attempt}" if attempt else "")
            try:
                os.link(path, backup)
            except FileExistsError:
                continue
            except OSError as exc:
                if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                os.rename(path, backup)  # no hard links here: for a moment there is no index
            break
        files.sync_dir(os.path.dirname(path))
    os.replace(new, path)
    files.sync_dir(os.path.dirname(path))
    return backup


# ---------------------------------------------------------------------------------------------------------- progress


class Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, job: Job, total: int, label: str, unit: str = "B") -> None:
        self._bar: Any = None
        if sys.stderr.isatty() and not job.args.quiet:
            from tqdm import tqdm

            scale = unit == "B"
            self._bar = tqdm(
                total=total, desc=label, unit=unit, unit_scale=scale, unit_divisor=1024, leave=False, file=sys.stderr
            )

    def to(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def positive_rate(text: str) -> int:
    """MB/s of the command line as bytes per second; 0 is no limit."""
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return int(value * (1 << 20))


def _module_of(command: str) -> Any:
    from pyvolume.offline import check, compact, export, fix

    return {"check": check, "fix": fix, "export": export, "compact": compact}[command]


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one of the offline commands. KeyError for another one."""
    module = _module_of(command)
    parser = argparse.ArgumentParser(
        prog=f"pyvolume {command}",
        description=module.__doc__.partition("\n\n")[0] if module.__doc__ else None,
        epilog="Exit status: 0 clean, 1 there are findings, 2 could not run. No server may have the directories.",
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def main(words: Sequence[str]) -> int:
    """Runs `check ...`, `fix ...`, `export ...` or `compact ...`; returns the exit status."""
    args = parser_of(words[0]).parse_args(list(words[1:]))
    module = _module_of(words[0])
    args.command = words[0]
    job = Job(args)
    try:
        try:
            module.run(job)
        except KeyboardInterrupt:
            job.fail("interrupted")
        code = job.finish()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has gone, which is theirs to know
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NOT_RUN
    return code
