"""Log lines, their levels and files, and the ways a process ends (contract operations.md 1.4)."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvolume import log
from pyvolume.log import GlogHandler, LogConfig

LINE = re.compile(rb"([IWEF])(\d{4}) (\d\d:\d\d:\d\d)\.(\d{6}) (\S+\.py):(\d+) (.*)\n", re.DOTALL)


def record(
    message: str = "hello", level: int = logging.INFO, *, file: str = "/x/store.py", **extra: object
) -> logging.LogRecord:
    made = logging.LogRecord("pyvolume.x", level, file, 42, message, (), None)
    made.__dict__.update(extra)
    return made


@pytest.fixture
def capture() -> Iterator[Callable[[LogConfig], tuple[GlogHandler, Callable[[], bytes]]]]:
    """Makes handlers that write their standard error into a pipe."""
    opened: list[int] = []
    handlers: list[GlogHandler] = []

    def make(config: LogConfig) -> tuple[GlogHandler, Callable[[], bytes]]:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        opened.extend((reader, writer))
        handler = GlogHandler(config, stderr_fd=writer)
        handlers.append(handler)

        def read() -> bytes:
            try:
                return os.read(reader, 1 << 16)
            except BlockingIOError:
                return b""

        return handler, read

    yield make
    for handler in handlers:
        handler.close()
    for fd in opened:
        os.close(fd)


Capture = Callable[[LogConfig], tuple[GlogHandler, Callable[[], bytes]]]


@pytest.mark.parametrize(
    ("level", "extra", "letter"),
    [
        (logging.INFO, {}, b"I"),
        (log.V3, {}, b"I"),
        (logging.WARNING, {}, b"W"),
        (logging.ERROR, {}, b"E"),
        (logging.CRITICAL, {}, b"E"),
        (logging.CRITICAL, {"pv_fatal": True}, b"F"),
    ],
)
def test_shape_of_a_line(capture: Capture, level: int, extra: dict[str, object], letter: bytes) -> None:
    handler, read = capture(LogConfig(to_stderr=True, verbosity=4))
    made = record("disk 3 is full", level, **extra)
    handler.emit(made)
    match = LINE.fullmatch(read())
    assert match is not None
    then = time.localtime(made.created)
    assert match.group(1, 5, 6, 7) == (letter, b"store.py", b"42", b"disk 3 is full")
    assert match[2].decode() == time.strftime("%m%d", then)
    assert match[3].decode() == time.strftime("%H:%M:%S", then)


def test_nothing_a_client_sends_starts_a_line(capture: Capture) -> None:
    handler, read = capture(LogConfig(to_stderr=True))
    handler.emit(record("name a\nF0101 00:00:00.000000 x.py:1 forged\r\x1b[2J"))
    line = read()
    assert line.count(b"\n") == 1
    assert line.endswith(b"name a\\nF0101 00:00:00.000000 x.py:1 forged\\r\\x1b[2J\n")


def test_message_that_cannot_be_formatted_is_not_lost(capture: Capture) -> None:
    handler, read = capture(LogConfig(to_stderr=True))
    made = record("%d of %d")
    made.args = (1,)
    handler.emit(made)
    assert b"%d of %d (1,) (unformattable" in read()


def test_text_that_is_no_unicode(capture: Capture) -> None:
    handler, read = capture(LogConfig(to_stderr=True))
    handler.emit(record("path \udcff"))
    assert read().endswith(b"path \\udcff\n")


def test_traceback_follows_its_line(capture: Capture) -> None:
    handler, read = capture(LogConfig(to_stderr=True))
    try:
        raise ValueError("inner")
    except ValueError:
        made = record("outer", logging.ERROR)
        made.exc_info = sys.exc_info()
    handler.emit(made)
    text = read().decode()
    assert text.startswith("E") and "outer\nTraceback (most recent call last):\n" in text
    assert text.endswith("ValueError: inner\n")


def test_json_lines(capture: Capture) -> None:
    handler, read = capture(LogConfig(to_stderr=True, json=True))
    handler.emit(record('say "hi"\n\t\\ \u00e9', logging.WARNING))
    line = read()
    fields = json.loads(line)
    assert line.count(b"\n") == 1
    assert list(fields) == ["ts", "level", "file", "line", "msg"]
    assert (fields["level"], fields["file"], fields["line"]) == ("WARNING", "store.py", 42)
    assert fields["msg"] == 'say "hi"\n\t\\ \u00e9'
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", fields["ts"])


@pytest.mark.parametrize(
    ("verbosity", "vmodule", "level", "file", "seen"),
    [
        (0, (), logging.INFO, "store.py", True),
        (0, (), log.V1, "store.py", False),
        (1, (), log.V1, "store.py", True),
        (1, (), log.V2, "store.py", False),
        (3, (), logging.DEBUG, "store.py", False),
        (4, (), logging.DEBUG, "store.py", True),
        (0, (("store", 2),), log.V2, "store.py", True),
        (0, (("store", 2),), log.V3, "store.py", False),
        (0, (("store", 2),), log.V1, "volume.py", False),
        (0, (("st*", 1),), log.V1, "store.py", True),
        (0, (("store", 1), ("st*", 4)), log.V4, "store.py", False),
        (0, (("store.py", 1),), log.V1, "store.py", False),
        (3, (("store", 1),), log.V3, "store.py", True),
    ],
)
def test_which_levels_are_seen(
    capture: Capture, verbosity: int, vmodule: tuple[tuple[str, int], ...], level: int, file: str, seen: bool
) -> None:
    handler, read = capture(LogConfig(to_stderr=True, verbosity=verbosity, vmodule=vmodule))
    handler.emit(record("x", level, file=f"/a/{file}"))
    assert bool(read()) is seen


def test_backtrace_at_one_line(capture: Capture) -> None:
    handler, read = capture(LogConfig(to_stderr=True, backtrace_at=("store.py", 42)))
    handler.emit(record("x"))
    assert b"test_backtrace_at_one_line" in read()
    handler.emit(record("x", file="/x/other.py"))
    assert b"test_backtrace" not in read()


# --- files -----------------------------------------------------------------------------------------------------------


def body(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines() if not line.startswith((b"Log ", b"Running", b"Binary"))]


def test_files_by_severity(capture: Capture, tmp_path: Path) -> None:
    handler, read = capture(LogConfig(directory=str(tmp_path)))
    handler.emit(record("i"))
    handler.emit(record("w", logging.WARNING))
    handler.emit(record("e", logging.ERROR))
    handler.flush()
    messages = {
        severity: [line.split()[-1] for line in body(tmp_path / f"pyvolume.{severity}")]
        for severity in ("INFO", "WARNING", "ERROR")
    }
    assert messages == {"INFO": [b"i", b"w", b"e"], "WARNING": [b"w", b"e"], "ERROR": [b"e"]}
    assert not (tmp_path / "pyvolume.FATAL").exists()
    assert [line.split()[-1] for line in read().splitlines()] == [b"i", b"w", b"e"]


def test_name_and_head_of_a_file(capture: Capture, tmp_path: Path) -> None:
    handler, _ = capture(LogConfig(directory=str(tmp_path), program="prog"))
    handler.emit(record())
    handler.flush()
    (path,) = handler.files()
    assert re.fullmatch(rf"prog\.[^.]+\.[^.]+\.log\.INFO\.\d{{8}}-\d{{6}}\.{os.getpid()}", path.name)
    assert (tmp_path / "prog.INFO").is_symlink()
    assert os.readlink(tmp_path / "prog.INFO") == path.name
    head = path.read_text().splitlines()[:4]
    assert [line.split(":")[0] for line in head] == [
        "Log file created at",
        "Running on machine",
        "Binary",
        "Log line format",
    ]


def test_json_files_have_no_head(capture: Capture, tmp_path: Path) -> None:
    handler, _ = capture(LogConfig(directory=str(tmp_path), json=True))
    handler.emit(record())
    handler.flush()
    assert [json.loads(line)["msg"] for line in handler.files()[0].read_text().splitlines()] == ["hello"]


@pytest.mark.parametrize(
    ("also", "threshold", "seen"),
    [
        (True, log.ERROR, [b"i", b"w", b"e"]),
        (False, log.ERROR, [b"e"]),
        (False, log.WARNING, [b"w", b"e"]),
        (False, log.INFO, [b"i", b"w", b"e"]),
        (False, 7, []),
    ],
)
def test_what_goes_to_standard_error(
    capture: Capture, tmp_path: Path, also: bool, threshold: int, seen: list[bytes]
) -> None:
    handler, read = capture(LogConfig(directory=str(tmp_path), also_to_stderr=also, stderr_threshold=threshold))
    for level, message in ((logging.INFO, "i"), (logging.WARNING, "w"), (logging.ERROR, "e")):
        handler.emit(record(message, level))
    assert [line.split()[-1] for line in read().splitlines()] == seen


def test_standard_error_only_makes_no_files(capture: Capture, tmp_path: Path) -> None:
    handler, read = capture(LogConfig(directory=str(tmp_path), to_stderr=True, also_to_stderr=False))
    handler.emit(record())
    assert read() and not list(tmp_path.iterdir())


def test_directory_that_cannot_be_written(capture: Capture, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    handler, read = capture(LogConfig(directory=str(missing), also_to_stderr=False))
    handler.emit(record("first"))
    handler.emit(record("second"))
    lines = read().splitlines()
    assert [line.split()[-1] for line in (lines[0], lines[2])] == [b"first", b"second"]
    assert lines[1].startswith(f"glog: exiting because of error: log: cannot create log: open {missing}/".encode())
    assert lines[1].endswith(b": no such file or directory")
    assert len(lines) == 3


def test_rotation_by_size_keeps_the_newest(capture: Capture, tmp_path: Path) -> None:
    handler, read = capture(LogConfig(directory=str(tmp_path), max_size_bytes=400, max_files=3))
    for number in range(12):
        handler.emit(record(f"{number:02d}" + "x" * 150))
        read()
    handler.flush()
    files = sorted(p for p in tmp_path.iterdir() if not p.is_symlink())
    assert len(files) == 3
    assert all(p.stat().st_size <= 400 for p in files)
    kept = [line.split()[-1][:2] for p in files for line in body(p)]
    assert kept == sorted(kept) and kept[-1] == b"11"
    assert (tmp_path / "pyvolume.INFO").resolve() == files[-1].resolve()


def test_rotation_by_age(tmp_path: Path) -> None:
    now = [time.time()]
    handler = GlogHandler(
        LogConfig(directory=str(tmp_path), also_to_stderr=False, rotate_hours=2), clock=lambda: now[0]
    )
    handler.emit(record("a"))
    now[0] += 7199
    handler.emit(record("b"))
    now[0] += 1
    handler.emit(record("c"))
    handler.close()
    files = sorted(p for p in tmp_path.iterdir() if not p.is_symlink())
    assert [[line.split()[-1] for line in body(p)] for p in files] == [[b"a", b"b"], [b"c"]]


def test_rotated_files_are_compressed(tmp_path: Path) -> None:
    config = LogConfig(directory=str(tmp_path), also_to_stderr=False, max_size_bytes=400, compress=True)
    handler = GlogHandler(config)
    for number in range(4):
        handler.emit(record(f"{number}" + "x" * 150))
    handler.close()
    for thread in threading.enumerate():
        if thread.name == "log-compress":
            thread.join()
    packed = sorted(tmp_path.glob("*.gz"))
    assert len(packed) == 3
    assert b" 0xxx" in gzip.decompress(packed[0].read_bytes())
    assert len([p for p in tmp_path.iterdir() if not p.is_symlink()]) == 4


def test_compressed_files_count_among_those_kept(tmp_path: Path) -> None:
    config = LogConfig(directory=str(tmp_path), also_to_stderr=False, max_size_bytes=400, max_files=2, compress=True)
    handler = GlogHandler(config)
    for number in range(6):
        handler.emit(record(f"{number}" + "x" * 150))
        for thread in threading.enumerate():
            if thread.name == "log-compress":
                thread.join()
    handler.close()
    assert len([p for p in tmp_path.iterdir() if not p.is_symlink()]) == 2


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_floods_of_one_place_are_held_back_and_counted(
    capture: Callable[..., tuple[GlogHandler, Callable[[], bytes]]],
) -> None:
    handler, read = capture(LogConfig(to_stderr=True))
    now = [0.0]
    handler._gate = log.FloodGate(interval_s=10, burst=3, clock=lambda: now[0])

    def emit(text: str, name: str, line: int) -> None:
        handler.handle(logging.LogRecord(name, logging.WARNING, "read.py", line, text, (), None))

    for number in range(8):
        emit(f"bad {number}", "pyvolume.ops.read", 10)
        emit(f"other {number}", "pyvolume.ops.read", 11)
        emit(f"volume {number}", "pyvolume.storage.volume_load", 10)
    now[0] = 10.0
    emit("bad again", "pyvolume.ops.read", 10)
    lines = [line.split(b"] ")[-1].split(b" ", 3)[-1] for line in read().splitlines()]
    assert [line for line in lines if line.startswith(b"bad")] == [b"bad 0", b"bad 1", b"bad 2", b"bad again"]
    assert len([line for line in lines if line.startswith(b"other")]) == 3
    assert len([line for line in lines if line.startswith(b"volume")]) == 8, "no request leads there"
    assert lines[-2] == b"5 more lines like the next one were left out"


def test_nothing_is_held_back_when_more_is_asked_for(
    capture: Callable[..., tuple[GlogHandler, Callable[[], bytes]]],
) -> None:
    handler, read = capture(LogConfig(to_stderr=True, verbosity=1))
    for _ in range(200):
        handler.handle(logging.LogRecord("pyvolume.ops.read", logging.WARNING, "read.py", 10, "bad", (), None))
    assert read().count(b"bad") == 200


# --- ends of a process -----------------------------------------------------------------------------------------------


def run_code(code: str, tmp_path: Path) -> subprocess.CompletedProcess[bytes]:
    head = f"from pyvolume import log; import logging; log.setup(log.LogConfig(directory={str(tmp_path)!r}, %s));"
    return subprocess.run([sys.executable, "-c", head.replace("%s", "") + code], capture_output=True, check=False)


def test_fatal_prints_stacks_and_exits_255(tmp_path: Path) -> None:
    done = run_code("\ndef deep(): log.fatal('no %s', 'port')\ndeep()", tmp_path)
    assert done.returncode == 255
    match = re.match(rb"F\d{4} \S+ <string>:\d+ no port\n", done.stderr)
    assert match, done.stderr
    assert b'thread "MainThread"' in done.stderr and b"in deep" in done.stderr
    for severity in ("INFO", "WARNING", "ERROR", "FATAL"):
        text = (tmp_path / f"pyvolume.{severity}").read_bytes()
        assert b"no port" in text and b'thread "log-flush"' in text


def test_fatal_with_standard_error_only_has_no_stack(tmp_path: Path) -> None:
    code = "log.setup(log.LogConfig(to_stderr=True)); log.fatal('x')"
    done = run_code(code, tmp_path)
    assert done.returncode == 255
    assert done.stderr.count(b"\n") == 1


def test_exit_with_has_no_stack(tmp_path: Path) -> None:
    done = run_code("log.exit_with(1, 'key %s', 'k')", tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rb"F\d{4} \S+ <string>:1 key k\n", done.stderr)


def test_fatal_from_another_thread_ends_the_process(tmp_path: Path) -> None:
    code = "import threading, time; threading.Thread(target=lambda: log.fatal('x')).start(); time.sleep(60)"
    assert run_code(code, tmp_path).returncode == 255


def test_files_are_written_out_at_a_normal_exit(tmp_path: Path) -> None:
    done = run_code("logging.getLogger('pyvolume.a').info('last words')", tmp_path)
    assert done.returncode == 0
    assert b"last words" in (tmp_path / "pyvolume.INFO").read_bytes()


def test_other_packages_show_warnings_only(tmp_path: Path) -> None:
    code = "logging.getLogger('waitress').info('chatter'); logging.getLogger('waitress').warning('trouble')"
    done = run_code(code, tmp_path)
    assert b"chatter" not in done.stderr and b"trouble" in done.stderr


def test_uncaught_exceptions_of_threads_are_error_lines(tmp_path: Path) -> None:
    code = (
        "log.install_exception_hooks(); import threading\n"
        "t = threading.Thread(target=lambda: 1 / 0, name='worker'); t.start(); t.join()"
    )
    done = run_code(code, tmp_path)
    assert re.match(rb"E\d{4} \S+ log\.py:\d+ thread worker died\nTraceback", done.stderr)


def test_closed_standard_error_does_no_harm(tmp_path: Path) -> None:
    code = "import os; os.close(2); logging.getLogger('pyvolume').warning('x'); os._exit(7)"
    assert run_code(code, tmp_path).returncode == 7
