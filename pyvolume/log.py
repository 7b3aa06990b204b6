"""Log lines in the shape of glog, on top of the standard logging module.

Leaf: imports nothing of the package, so that anything may import it.

Every module uses its own `logging.getLogger(__name__)`. INFO is what upstream calls V(0); `log.log(V1, ...)` to
`log.log(V4, ...)` are its V-levels (`-v`, `-vmodule`), and DEBUG counts as V4. A line reads

    I1123 09:02:11.123456 file.py:42 message

with the letter I, W, E or F and local time. Lines go to standard error and to files, one file for each severity, where
a severity also goes to the files of all lower ones. `fatal` and `exit_with` are the two ways to end the process.
"""

from __future__ import annotations

import contextlib
import fnmatch
import getpass
import gzip
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

from pyvolume.frames import current_frames

V1, V2, V3, V4 = 19, 18, 17, 16
"""Levels for `Logger.log`: seen from -v=1 ... -v=4 on."""

INFO, WARNING, ERROR, FATAL = range(4)
SEVERITY_NAMES = ("INFO", "WARNING", "ERROR", "FATAL")

FATAL_STATUS = 255
BUILT_IN_MAX_BYTES = 10 << 20
"""Rotation size when -log_max_size_mb is 0."""

_LETTERS = b"IWEF"
_BUFFER_BYTES = 256 << 10
_FLUSH_INTERVAL_S = 30.0
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_DEFAULT_MAX_FILES = 5


@dataclass(frozen=True)
class LogConfig:
    """The logging flags, validated. Defaults are those of the flags, but for the directory and the program's name."""

    verbosity: int = 0
    vmodule: tuple[tuple[str, int], ...] = ()
    """(pattern, level): patterns of source file names without .py; the first that matches counts."""
    to_stderr: bool = False
    also_to_stderr: bool = True
    stderr_threshold: int = ERROR
    directory: str = ""
    """Where the files are written; empty means the system's directory for temporary files."""
    backtrace_at: tuple[str, int] | None = None
    json: bool = False
    max_size_bytes: int = 1800 << 20
    max_files: int = _DEFAULT_MAX_FILES
    rotate_hours: int = 168
    compress: bool = False
    program: str = "pyvolume"


def severity_of(record: logging.LogRecord) -> int:
    """Index into SEVERITY_NAMES. FATAL only for lines of `fatal` and `exit_with`."""
    if getattr(record, "pv_fatal", False):
        return FATAL
    if record.levelno >= logging.ERROR:
        return ERROR
    return WARNING if record.levelno >= logging.WARNING else INFO


def v_level_of(levelno: int) -> int:
    """0 for INFO and above, 1 to 4 for V-levels and DEBUG."""
    return max(0, min(4, logging.INFO - levelno))


def one_line(text: str) -> str:
    """Text with control characters written as escapes, so that nothing a client sends can start a line of its own."""
    if _CONTROL.search(text) is None:
        return text
    return _CONTROL.sub(lambda m: {"\n": "\\n", "\r": "\\r"}.get(m[0], f"\\x{ord(m[0]):02x}"), text)


class GlogFormatter:
    """Turns a record into the bytes of a line (or several, for a traceback)."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._second = -1
        self._prefix = b""

    def format(self, record: logging.LogRecord) -> bytes:
        try:
            message = record.getMessage()
        except Exception as exc:  # a wrong number of arguments must not lose the line
            message = f"{record.msg} {record.args!r} (unformattable: {exc})"
        extra = self._traceback_of(record)
        if self._json:
            return self._json_line(record, message + ("\n" + extra if extra else ""))
        second = int(record.created)
        if second != self._second:
            t = time.localtime(second)
            clock = f"{t.tm_mon:02d}{t.tm_mday:02d} {t.tm_hour:02d}:{t.tm_min:02d}:{t.tm_sec:02d}"
            self._prefix, self._second = clock.encode(), second
        micros = int((record.created - second) * 1_000_000)
        head = b"%c%s.%06d " % (_LETTERS[severity_of(record)], self._prefix, micros)
        body = f"{record.filename}:{record.lineno} {one_line(message)}\n"
        if extra:
            body += extra + "\n"
        return head + body.encode("utf-8", "backslashreplace")

    @staticmethod
    def _traceback_of(record: logging.LogRecord) -> str:
        parts = []
        if record.exc_info and record.exc_info[0] is not None:
            parts.append("".join(traceback.format_exception(*record.exc_info)).rstrip())
        if record.stack_info:
            parts.append(record.stack_info.rstrip())
        return "\n".join(parts)

    @staticmethod
    def _json_line(record: logging.LogRecord, message: str) -> bytes:
        stamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f").rstrip("0").rstrip(".")
        fields = {
            "ts": stamp + "Z",
            "level": SEVERITY_NAMES[severity_of(record)],
            "file": record.filename,
            "line": record.lineno,
            "msg": message.rstrip("\n"),
        }
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace") + b"\n"


class LogFile:
    """The file of one severity: named by start time, rotated by size and age, old ones removed or compressed.

    Not thread-safe: the handler's lock guards it. Raises OSError when a file cannot be made or written.
    """

    def __init__(self, severity: int, config: LogConfig) -> None:
        self._config = config
        self._tag = SEVERITY_NAMES[severity]
        self._file: BinaryIO | None = None
        self._size = 0
        self._opened_at = 0.0
        self._name_second = 0
        self.path: Path | None = None

    def write(self, data: bytes, *, now: float) -> None:
        """Appends whole lines; rotates first if the file is full or too old."""
        if self._file is None:
            self._open(now)
        elif self._size + len(data) >= self._config.max_size_bytes or self._too_old(now):
            self._rotate(now)
        assert self._file is not None
        self._file.write(data)
        self._size += len(data)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _too_old(self, now: float) -> bool:
        hours = self._config.rotate_hours
        return hours > 0 and now - self._opened_at >= hours * 3600

    def _rotate(self, now: float) -> None:
        old = self.path
        self.close()
        self._open(now)
        if old is not None and self._config.compress:
            threading.Thread(target=_compress, args=(old,), name="log-compress", daemon=True).start()

    def _open(self, now: float) -> None:
        config = self._config
        directory = Path(config.directory or tempfile.gettempdir())
        stem = f"{config.program}.{_host()}.{_user()}.log.{self._tag}."
        self._remove_old(directory, stem)
        # A second file within one second would get the name of the first: its name is moved on instead.
        self._name_second = max(int(now), self._name_second + 1)
        name = f"{stem}{time.strftime('%Y%m%d-%H%M%S', time.localtime(self._name_second))}.{os.getpid()}"
        self.path = directory / name
        self._file = self.path.open("wb", buffering=_BUFFER_BYTES)
        self._opened_at, self._size = now, 0
        link = directory / f"{config.program}.{self._tag}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(name)
        except OSError:
            pass  # the link is a convenience; another user's process may own it
        if not config.json:
            header = (
                f"Log file created at: {time.strftime('%Y/%m/%d %H:%M:%S', time.localtime(now))}\n"
                f"Running on machine: {_host()}\n"
                f"Binary: {sys.implementation.name} {sys.version.split()[0]} on {sys.platform}\n"
                "Log line format: [IWEF]mmdd hh:mm:ss.uuuuuu file:line message\n"
            ).encode()
            self._file.write(header)
            self._size = len(header)

    def _remove_old(self, directory: Path, stem: str) -> None:
        """Leaves room for one more file among those that are kept; a compressed file counts with its plain one."""
        try:
            names = os.listdir(directory)
        except OSError:
            return
        old: dict[str, list[str]] = {}
        for name in names:
            if name.startswith(stem):
                old.setdefault(name.removesuffix(".gz"), []).append(name)
        keep = self._config.max_files or _DEFAULT_MAX_FILES
        for bare in sorted(old)[: max(0, len(old) - keep + 1)]:
            for name in old[bare]:
                with contextlib.suppress(OSError):  # taken away by someone else meanwhile, or not ours
                    (directory / name).unlink()


def _compress(path: Path) -> None:
    """Replaces a rotated file by its .gz; on any failure the plain file stays."""
    target = path.with_name(path.name + ".gz")
    part = path.with_name(path.name + ".gz.tmp")
    try:
        with path.open("rb") as source, gzip.open(part, "wb", compresslevel=1) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        part.rename(target)
        path.unlink()
    except OSError:
        part.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().partition(".")[0] or "unknownhost"


def _user() -> str:
    try:
        return getpass.getuser().replace("\\", "_").replace("/", "_")
    except (KeyError, OSError):
        return "unknownuser"


class FloodGate:
    """Holds back lines of one place in the code beyond a few in an interval; what a client does must not fill a disk.

    Only for places that requests reach: elsewhere each line has news of its own. Used under the handler's lock.
    """

    PLACES = ("pyvolume.ops", "pyvolume.server.grpc", "pyvolume.server.http_", "pyvolume.server.waitress_ext")

    def __init__(self, interval_s: float = 10.0, burst: int = 50, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._burst = burst
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}

    def left_out(self, record: logging.LogRecord) -> int | None:
        """None: hold it back. Else write it, and say that so many like it were held back before."""
        if not record.name.startswith(self.PLACES):
            return 0
        place = (record.name, record.lineno)
        now = self._clock()
        since, count = self._seen.get(place, (now, 0))
        before = 0
        if now - since >= self._interval_s:
            before = max(0, count - self._burst)
            since, count = now, 0
        self._seen[place] = (since, count + 1)
        return before if count < self._burst else None


class GlogHandler(logging.Handler):
    """Writes records to standard error and to the files. One for the process, on the root logger."""

    def __init__(
        self,
        config: LogConfig,
        *,
        stderr_fd: int = 2,
        clock: Callable[[], float] = time.time,
        flood_gate: FloodGate | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self._fd = stderr_fd
        self._clock = clock
        self._text = GlogFormatter(as_json=config.json)
        self._gate = FloodGate() if flood_gate is None else flood_gate
        self._files: list[LogFile] | None = None
        if not config.to_stderr:
            self._files = [LogFile(severity, config) for severity in (INFO, WARNING, ERROR, FATAL)]
        self.broken = False
        """True once a log file could not be made or written: from then on everything goes to standard error."""

    def wants(self, record: logging.LogRecord) -> bool:
        """Whether -v and -vmodule let the record through."""
        level = v_level_of(record.levelno)
        if level <= self.config.verbosity or record.levelno >= logging.INFO:
            return True
        base = record.filename.removesuffix(".py")
        for pattern, limit in self.config.vmodule:
            if fnmatch.fnmatchcase(base, pattern):
                return level <= limit
        return False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.wants(record):
            return
        held_back = self._gate.left_out(record) if self.config.verbosity <= 0 else 0
        if held_back is None:
            return
        try:
            data = self._text.format(record)
            if held_back:
                text = f"{held_back} more lines like the next one were left out"
                note = {**record.__dict__, "msg": text, "args": (), "exc_info": None, "exc_text": None}
                data = self._text.format(logging.makeLogRecord(note)) + data
            if self.config.backtrace_at == (record.filename, record.lineno):
                data += _stack_of(sys._getframe(1)).encode("utf-8", "backslashreplace")
            self.write(severity_of(record), data)
        except Exception:
            self.handleError(record)

    def write(self, severity: int, data: bytes, *, stderr: bool | None = None) -> None:
        """Puts finished lines where lines of that severity go. The handler's lock is held."""
        config = self.config
        if stderr is None:
            stderr = config.to_stderr or config.also_to_stderr or severity >= config.stderr_threshold
        if stderr or self.broken:
            self._to_stderr(data)
        if self._files is None or self.broken:
            return
        try:
            for file in self._files[: severity + 1]:
                file.write(data, now=self._clock())
                if severity >= WARNING:
                    file.flush()
        except OSError as exc:
            self.broken = True
            if not stderr:
                self._to_stderr(data)
            reason = f"{(exc.strerror or str(exc)).lower()}"
            self._to_stderr(
                f"glog: exiting because of error: log: cannot create log: open {exc.filename}: {reason}\n".encode()
            )

    def _to_stderr(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            pass  # nobody reads it any more; that must not hurt the server

    def flush(self) -> None:
        if self._files is None or self.broken or not self._acquire_for_flush():
            return
        try:
            for file in self._files:
                file.flush()
        except (OSError, ValueError):
            self.broken = True
        except RuntimeError:
            pass  # a signal handler flushes while its own thread was writing: that write goes on or is lost
        finally:
            self.release()

    def _acquire_for_flush(self) -> bool:
        # A thread may hold the lock for ever (a reader of standard error that stopped reading): do not wait for it.
        return self.lock is None or self.lock.acquire(timeout=2)

    def close(self) -> None:
        if self._files is not None and self._acquire_for_flush():
            try:
                for file in self._files:
                    file.close()
            except OSError:
                pass  # closing at exit: there is nowhere left to report to
            finally:
                self.release()
        super().close()

    def files(self) -> list[Path]:
        """The files written so far, lowest severity first."""
        return [f.path for f in self._files or [] if f.path is not None]


@dataclass
class _Process:
    """What the one logging set-up of this process consists of."""

    handler: GlogHandler | None = None
    flusher: threading.Thread | None = None
    exit: Callable[[int], Any] = os._exit


_process = _Process()


def setup(config: LogConfig) -> GlogHandler:
    """Takes over the root logger, once at start. A second call replaces what the first one set up.

    Loggers outside of the package show warnings and errors only, unless -v is 4 or more.
    """
    handler = GlogHandler(config)
    root = logging.getLogger()
    if _process.handler is not None:
        root.removeHandler(_process.handler)
        _process.handler.close()
    root.addHandler(handler)
    _process.handler = handler
    highest = max([config.verbosity, *(level for _, level in config.vmodule)])
    logging.getLogger("pyvolume").setLevel(logging.DEBUG if highest >= 4 else logging.INFO - max(0, highest))
    root.setLevel(logging.INFO if config.verbosity >= 4 else logging.WARNING)
    if not config.to_stderr and _process.flusher is None:
        _process.flusher = threading.Thread(target=_flush_for_ever, name="log-flush", daemon=True)
        _process.flusher.start()
    return handler


def _flush_for_ever() -> None:
    while True:
        time.sleep(_FLUSH_INTERVAL_S)
        flush()


def flush() -> None:
    """Writes out what the files' buffers hold. Never blocks for more than a few seconds."""
    if _process.handler is not None:
        _process.handler.flush()


def exit_process(status: int) -> NoReturn:
    """Ends the process at once, from any thread, with the log files written out. No clean-up of anything else."""
    flush()
    _process.exit(status)
    raise SystemExit(status)


def fatal(message: str, *args: object, stacklevel: int = 1) -> NoReturn:
    """Logs an F line, the stack of this thread on standard error, all stacks in the files; ends with status 255.

    Only for starting up and for what makes going on dangerous: no request may lead here.
    """
    _log_fatal(message, args, stacklevel + 2)
    handler = _process.handler
    if handler is not None:
        with _locked(handler):
            if not handler.config.to_stderr:
                handler.write(INFO, _stack_of(sys._getframe(1)).encode("utf-8", "backslashreplace"), stderr=True)
                handler.write(FATAL, all_stacks().encode("utf-8", "backslashreplace"), stderr=False)
    exit_process(FATAL_STATUS)


def exit_with(status: int, message: str, *args: object, stacklevel: int = 1) -> NoReturn:
    """Logs an F line without stacks and ends with `status`: for refusing to start where the message says it all."""
    _log_fatal(message, args, stacklevel + 2)
    exit_process(status)


def _log_fatal(message: str, args: tuple[object, ...], stacklevel: int) -> None:
    logger = logging.getLogger("pyvolume")
    if _process.handler is None:
        text = message % args if args else message
        sys.stderr.write(f"{text}\n")
        return
    logger.critical(message, *args, stacklevel=stacklevel, extra={"pv_fatal": True})


def raw(text: str) -> None:
    """Puts a text of many lines where warnings go, without heads: stacks, for instance."""
    data = text.encode("utf-8", "backslashreplace")
    handler = _process.handler
    if handler is None:
        return
    with _locked(handler):
        handler.write(WARNING, data)


class _locked:
    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._handler.acquire()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._handler.release()


def _stack_of(frame: Any) -> str:
    name = threading.current_thread().name
    return f'thread "{name}":\n' + "".join(traceback.format_stack(frame))


def all_stacks() -> str:
    """The stacks of all Python threads, named; threads that stand at the same place are listed together."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    places: dict[str, list[str]] = {}
    for ident, frame in current_frames().items():
        places.setdefault("".join(traceback.format_stack(frame)), []).append(str(names.get(ident, ident)))
        del frame  # one is this very function's: a variable that holds it would be a cycle
    parts = []
    for stack, there in places.items():
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        parts.append(f'thread "{min(there)}"{more}:\n{stack}')
    return "\n".join(parts)


def install_exception_hooks() -> None:
    """Uncaught exceptions of any thread become E lines instead of bare tracebacks."""
    logger = logging.getLogger("pyvolume")

    def main_hook(kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, exc, tb)
            return
        logger.error("uncaught exception", exc_info=(kind, exc, tb))

    def thread_hook(args: threading.ExceptHookArgs) -> None:
        if issubclass(args.exc_type, SystemExit) or args.exc_value is None:
            return
        name = args.thread.name if args.thread else "?"
        logger.error("thread %s died", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    sys.excepthook = main_hook
    threading.excepthook = thread_hook
