"""Profiles of the running process: stacks of all threads, CPU by sampling, memory; and the pages below /debug/.

Profiles leave in the format of pprof (`go tool pprof` and every viewer that reads it), as folded stacks for flame
graphs, as pstats for Python's tools, or as text. Must not import other modules of server but metric_types.

The sampler is a thread of our own. It takes the stack of every thread each 10 ms and charges it with the CPU time that
the kernel counted for that thread since the last sample, so waiting threads weigh nothing and threads without a Python
frame (gRPC's, the engine's) are seen by their names.
"""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import marshal
import math
import os
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from types import FrameType
from typing import Any, Final, NamedTuple

from pyvolume.frames import current_frames
from pyvolume.server.metric_types import field_bytes, field_int, varint

INTERVAL_S: Final = 0.01
MAX_DEPTH: Final = 128
DEFAULT_SECONDS: Final = 30.0
MAX_SECONDS: Final = 300.0
TOP_LINES: Final = 100
TRACE_FRAMES: Final = 8
"""Frames that tracemalloc keeps of each allocation."""


class Frame(NamedTuple):
    """One step of a stack."""

    name: str
    file: str
    line: int
    first_line: int


Stack = tuple[Frame, ...]
"""Innermost frame first, as pprof has it."""


@dataclass
class Profile:
    """Weights by stack. `kinds` are (name, unit) of the weights."""

    kinds: tuple[tuple[str, str], ...]
    weights: dict[Stack, list[int]] = field(default_factory=dict)
    started_ns: int = 0
    duration_ns: int = 0
    period: int = 0
    default: str = ""

    def add(self, stack: Stack, values: Sequence[int]) -> None:
        have = self.weights.get(stack)
        if have is None:
            self.weights[stack] = list(values)
        else:
            for place, value in enumerate(values):
                have[place] += value


# -------------------------------------------------------------------------------------------------------------- stacks


def stack_of(frame: FrameType | None) -> Stack:
    """The stack that ends in `frame`, at most MAX_DEPTH frames of it."""
    out: list[Frame] = []
    while frame is not None and len(out) < MAX_DEPTH:
        code = frame.f_code
        line = frame.f_lineno or code.co_firstlineno
        out.append(Frame(code.co_qualname, code.co_filename, line, code.co_firstlineno))
        frame = frame.f_back
    return tuple(out)


def thread_stacks() -> list[tuple[str, int, Stack]]:
    """(name, id of the system, stack) of every thread that runs Python, by name."""
    names = {thread.ident: (thread.name, thread.native_id or 0) for thread in threading.enumerate()}
    stacks = []
    for ident, frame in current_frames().items():
        name, native = names.get(ident, (f"thread-{ident}", 0))
        stacks.append((name, native, stack_of(frame)))
        del frame  # one is this very function's: a variable that holds it would be a cycle
    return sorted(stacks, key=lambda row: row[:2])


def stacks_text(grouped: bool) -> str:
    """All stacks as people read them; equal ones once if grouped."""
    lines = []
    rows = thread_stacks()
    if grouped:
        groups: dict[Stack, list[str]] = {}
        for name, _, stack in rows:
            groups.setdefault(stack, []).append(name)
        lines.append(f"threads: total {len(rows)}, {len(groups)} different stacks\n")
        for stack, names in sorted(groups.items(), key=lambda item: -len(item[1])):
            lines += [f"{len(names)} @ {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}", *_frame_lines(stack)]
    else:
        for name, native, stack in rows:
            lines += [f"thread {native} {name}:", *_frame_lines(stack)]
    return "\n".join(lines) + "\n"


def _frame_lines(stack: Stack) -> list[str]:
    return [*(f"\t{frame.name}\n\t\t{frame.file}:{frame.line}" for frame in stack), ""]


def threads_profile() -> Profile:
    profile = Profile((("threads", "count"),), started_ns=time.time_ns(), period=1)
    for _, _, stack in thread_stacks():
        profile.add(stack, (1,))
    return profile


# ----------------------------------------------------------------------------------------------------------------- CPU


class _TaskClock:
    """CPU time of the threads of this process, from /proc, by descriptors kept open."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._spent: dict[int, int] = {}

    def tick(self) -> dict[int, int]:
        """Nanoseconds that each thread ran since the last call, those at 0 left out; new threads count from now on."""
        alive = set()
        out = {}
        for name in os.listdir("/proc/self/task"):
            task = int(name)
            alive.add(task)
            file = self._files.get(task)
            try:
                if file is None:
                    file = self._files[task] = os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
                spent = int(os.pread(file, 64, 0).split(b" ", 1)[0])
            except (OSError, ValueError):
                continue
            ran = spent - self._spent.get(task, spent)
            self._spent[task] = spent
            if ran > 0:
                out[task] = ran
        for task in self._files.keys() - alive:
            os.close(self._files.pop(task))
            self._spent.pop(task, None)
        return out

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


class Sampler:
    """A CPU profile in the making: start, then stop from any thread, which gives the profile."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._profile = Profile(
            (("samples", "count"), ("cpu", "nanoseconds")), period=int(interval_s * 1e9), default="cpu"
        )
        self._thread = threading.Thread(target=self._run, name="cpu-profile", daemon=True)

    def start(self) -> Sampler:
        self._profile.started_ns = time.time_ns()
        self._thread.start()
        return self

    def stop(self) -> Profile:
        """Ends sampling. May be called again and gives the same."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._profile.duration_ns = time.time_ns() - self._profile.started_ns
        return self._profile

    def _run(self) -> None:
        clock = _TaskClock()
        own = threading.get_native_id()
        names: dict[int, str] = {}
        try:
            clock.tick()
            while not self._stop.wait(self._interval_s):
                ran = clock.tick()
                ran.pop(own, None)
                if ran:
                    self._charge(ran, names)
        finally:
            clock.close()

    def _charge(self, ran: dict[int, int], names: dict[int, str]) -> None:
        frames = current_frames()
        del frames[threading.get_ident()]  # this very function's: a cycle, and with it all the others would stay
        by_task = {thread.native_id: thread for thread in threading.enumerate()}
        for task, nanoseconds in ran.items():
            thread = by_task.get(task)
            frame = frames.get(thread.ident or 0) if thread is not None else None
            if frame is not None and thread is not None:
                stack = (*stack_of(frame), Frame(f"[thread] {_kind(thread.name)}", "", 0, 0))
            else:
                if task not in names:
                    names[task] = _native_name(task)
                stack = (Frame(f"[native] {names[task]}", "", 0, 0),)
            self._profile.add(stack, (1, nanoseconds))


def _kind(name: str) -> str:
    """The name of a thread without its number, so that the threads of a pool are one."""
    return name.rstrip("0123456789").rstrip("-_ ") or name


def _native_name(task: int) -> str:
    with suppress(OSError), open(f"/proc/self/task/{task}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()
    return "thread"


# -------------------------------------------------------------------------------------------------------------- memory


def memory_profile(snapshot: tracemalloc.Snapshot | None = None) -> Profile:
    """What tracemalloc knows of the memory in use by line; without it, the objects in use by their types."""
    profile = Profile((("objects", "count"), ("space", "bytes")), started_ns=time.time_ns(), default="space")
    if snapshot is None and tracemalloc.is_tracing():
        snapshot = tracemalloc.take_snapshot()
    if snapshot is not None:
        for places, (count, size) in _by_place(snapshot, MAX_DEPTH).items():
            profile.add(tuple(Frame(os.path.basename(file), file, line, 0) for file, line in places), (count, size))
        return profile
    for name, (count, size) in object_census().items():
        profile.add((Frame(name, "", 0, 0),), (count, size))
    return profile


def _by_place(snapshot: tracemalloc.Snapshot, depth: int) -> dict[tuple[tuple[str, int], ...], list[int]]:
    """(blocks, bytes) by the innermost `depth` places of their stacks. Snapshot.statistics does the same in seconds
    where this takes tenths: it makes an object of each frame of each block."""
    out: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for _, size, places, *_ in snapshot.traces._traces:  # type: ignore[attr-defined]
        have = out.setdefault(places[:depth], [0, 0])
        have[0] += 1
        have[1] += size
    return out


def object_census() -> dict[str, tuple[int, int]]:
    """(number, bytes) by type of the objects the garbage collector knows: containers, not plain texts and numbers."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        name = f"{kind.__module__}.{kind.__qualname__}"
        counts[name] += 1
        with suppress(Exception):  # __sizeof__ of a foreign type
            sizes[name] += sys.getsizeof(thing)
    return {name: (count, sizes[name]) for name, count in counts.items()}


def memory_text(snapshot: tracemalloc.Snapshot | None = None) -> str:
    """The largest consumers, for people."""
    lines = [f"gc: {gc.get_count()} pending, {gc.get_stats()}"]
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        lines += [line.rstrip() for line in file if line.startswith(("VmRSS", "VmHWM", "VmData", "RssAnon", "Threads"))]
    if snapshot is None and tracemalloc.is_tracing():
        snapshot = tracemalloc.take_snapshot()
    if snapshot is not None:
        lines_of = sorted(_by_place(snapshot, 1).items(), key=lambda item: -item[1][1])
        total = sum(size for _, (_, size) in lines_of)
        lines += [f"traced: {total} bytes in {len(lines_of)} lines", "", "bytes, blocks, line"]
        for ((name, number),), (count, size) in lines_of[:TOP_LINES]:
            lines.append(f"{size:12d} {count:9d} {name}:{number}")
    else:
        lines += ["memory is not traced by line: start with -memprofile, or ask with ?seconds=N", ""]
        lines.append("bytes, objects, type")
        census = sorted(object_census().items(), key=lambda item: -item[1][1])
        lines += [f"{size:12d} {count:9d} {name}" for name, (count, size) in census[:TOP_LINES]]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------- formats


def pprof_format(profile: Profile) -> bytes:
    """The profile as a gzipped perftools.profiles.Profile message."""
    texts: dict[str, int] = {"": 0}
    functions: dict[tuple[str, str, int], int] = {}
    places: dict[Frame, int] = {}
    out = bytearray()

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts))

    def packed(tag: int, values: Iterable[int]) -> bytes:
        return field_bytes(tag, b"".join(map(varint, values)))

    def place(frame: Frame) -> int:
        return places.setdefault(frame, len(places) + 1)

    def kind(tag: int, name: str, unit: str) -> bytes:
        return field_bytes(tag, field_int(1, text(name)) + field_int(2, text(unit)))

    for name, unit in profile.kinds:
        out += kind(1, name, unit)
    for stack, weights in profile.weights.items():
        out += field_bytes(2, packed(1, map(place, stack)) + packed(2, weights))
    for frame, number in places.items():
        function = functions.setdefault((frame.name, frame.file, frame.first_line), len(functions) + 1)
        line = field_int(1, function) + field_int(2, frame.line)
        out += field_bytes(4, field_int(1, number) + field_bytes(4, line))
    for (name, file, first), number in functions.items():
        parts = field_int(1, number) + field_int(2, text(name)) + field_int(3, text(name)) + field_int(4, text(file))
        out += field_bytes(5, parts + field_int(5, first))
    last_kind = kind(11, *profile.kinds[-1]) + field_int(12, profile.period) + field_int(14, text(profile.default))
    for value in texts:
        out += field_bytes(6, value.encode("utf-8", "replace"))
    out += field_int(9, profile.started_ns) + field_int(10, profile.duration_ns) + last_kind
    return gzip.compress(bytes(out), 6)


def folded_format(profile: Profile) -> bytes:
    """A line for each stack, outermost frame first, with the last weight: what flame graph tools read."""
    lines = []
    for stack, weights in sorted(profile.weights.items()):
        frames = (f"{f.name} ({os.path.basename(f.file)}:{f.line})" if f.file else f.name for f in reversed(stack))
        lines.append(f"{';'.join(frame.replace(';', ',') for frame in frames)} {weights[-1]}\n")
    return "".join(lines).encode("utf-8", "replace")


def pstats_format(profile: Profile) -> bytes:
    """What Python's pstats loads. Times are from samples; numbers of calls are numbers of samples."""
    Key = tuple[str, int, str]
    own: Counter[Key] = Counter()
    total: Counter[Key] = Counter()
    hits: Counter[Key] = Counter()
    callers: dict[Key, dict[Key, list[float]]] = {}
    for stack, (samples, nanoseconds) in profile.weights.items():
        seconds = nanoseconds / 1e9
        keys = [(frame.file or "~", frame.first_line, frame.name) for frame in stack]
        own[keys[0]] += seconds  # type: ignore[assignment]
        for key in set(keys):
            total[key] += seconds  # type: ignore[assignment]
            hits[key] += samples
        for place, (callee, caller) in enumerate(itertools.pairwise(keys)):
            row = callers.setdefault(callee, {}).setdefault(caller, [0, 0, 0.0, 0.0])
            row[0] += samples
            row[1] += samples
            row[2] += 0.0 if place else seconds
            row[3] += seconds
    stats = {
        key: (
            hits[key],
            hits[key],
            float(own[key]),
            float(total[key]),
            {who: (int(row[0]), int(row[1]), row[2], row[3]) for who, row in callers.get(key, {}).items()},
        )
        for key in hits
    }
    return marshal.dumps(stats)


# --------------------------------------------------------------------------------------------------------------- pages


class Page(NamedTuple):
    """An answer of the pages below /debug/."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


_NOSNIFF = ("X-Content-Type-Options", "nosniff")
_TEXT = ("Content-Type", "text/plain; charset=utf-8")
_PREFIX: Final = "/debug/pprof/"
_one_profile = threading.Lock()


def _download(name: str, data: bytes) -> Page:
    disposition = ("Content-Disposition", f'attachment; filename="{name}"')
    return Page(200, [disposition, ("Content-Type", "application/octet-stream"), _NOSNIFF], data)


def _plain(status: int, text: str) -> Page:
    return Page(status, [_TEXT, _NOSNIFF], text.encode("utf-8", "replace"))


NOT_FOUND: Final = _plain(404, "404 page not found\n")


def _seconds(query: Mapping[str, str], default: float) -> float:
    try:
        asked = float(query.get("seconds", "") or default)
    except ValueError:
        return default
    return default if math.isnan(asked) else min(max(asked, 0.0), MAX_SECONDS)


def _cpu(query: Mapping[str, str]) -> Page:
    """Samples for ?seconds, one request at a time."""
    if not _one_profile.acquire(blocking=False):
        return _plain(500, "Could not enable CPU profiling: cpu profiling already in use\n")
    try:
        sampler = Sampler().start()
        time.sleep(_seconds(query, DEFAULT_SECONDS) or DEFAULT_SECONDS)
        profile = sampler.stop()
    finally:
        _one_profile.release()
    shape = query.get("format", "")
    if shape == "folded":
        return Page(200, [_TEXT, _NOSNIFF], folded_format(profile))
    if shape == "pstats":
        return _download("profile.pstats", pstats_format(profile))
    return _download("profile", pprof_format(profile))


def _threads(query: Mapping[str, str]) -> Page:
    debug = query.get("debug", "")
    if debug not in ("", "0"):
        return Page(200, [_TEXT, _NOSNIFF], stacks_text(grouped=debug == "1").encode("utf-8", "replace"))
    return _download("goroutine", pprof_format(threads_profile()))


def _memory(query: Mapping[str, str]) -> Page:
    """With ?seconds the allocations of that time that are still there, else what is known."""
    wait_s = _seconds(query, 0.0)
    started = False
    if wait_s and not tracemalloc.is_tracing():
        if not _one_profile.acquire(blocking=False):
            return _plain(500, "memory is being traced already\n")
        started = True
        tracemalloc.start(TRACE_FRAMES)
    try:
        if wait_s:
            time.sleep(wait_s)
        if query.get("debug", "") not in ("", "0"):
            return Page(200, [_TEXT, _NOSNIFF], memory_text().encode("utf-8", "replace"))
        return _download("heap", pprof_format(memory_profile()))
    finally:
        if started:
            tracemalloc.stop()
            _one_profile.release()


def _created(_query: Mapping[str, str]) -> Page:
    names = Counter(_kind(thread.name) for thread in threading.enumerate())
    lines = [f"{count:6d} {name}" for name, count in names.most_common()]
    return _plain(
        200,
        f"{len(os.listdir('/proc/self/task'))} threads of the system, of these in Python:\n" + "\n".join(lines) + "\n",
    )


def _cmdline(_query: Mapping[str, str]) -> Page:
    return Page(200, [_TEXT, _NOSNIFF], "\0".join(sys.orig_argv).encode("utf-8", "surrogateescape"))


_PROFILES: Final[dict[str, tuple[str, Callable[[Mapping[str, str]], Page]]]] = {
    "cmdline": ("the command line of this process, with NUL between its words", _cmdline),
    "goroutine": ("stacks of all threads; ?debug=1 and ?debug=2 are texts", _threads),
    "heap": ("memory in use; ?debug=1 is a text; ?seconds=N traces what is allocated meanwhile", _memory),
    "allocs": ("the same as heap", _memory),
    "profile": ("CPU, sampled for ?seconds=N (30); ?format=folded or pstats for other tools", _cpu),
    "symbol": ("for old pprof tools: symbols are in the profiles", lambda _: _plain(200, "num_symbols: 1\n")),
    "threadcreate": ("number of threads by name", _created),
}


def _index() -> Page:
    rows = "".join(
        f'<tr><td><a href="{name}{"?debug=1" if name in ("goroutine", "heap", "allocs") else ""}">{name}</a></td>'
        f"<td>{escape(text)}</td></tr>\n"
        for name, (text, _) in _PROFILES.items()
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>/debug/pprof/</title></head>\n<body>\n'
        f"<h1>/debug/pprof/</h1>\n<table>\n{rows}</table>\n"
        '<p><a href="goroutine?debug=2">full thread stack dump</a></p>\n</body>\n</html>\n'
    )
    return Page(200, [("Content-Type", "text/html; charset=utf-8"), _NOSNIFF], page.encode())


def debug_page(path: str, query: Mapping[str, str]) -> Page | None:
    """The answer to a path below /debug/pprof/, None for every other path. Blocks for as long as a profile takes."""
    if not path.startswith(_PREFIX):
        return None
    name = path[len(_PREFIX) :]
    if not name:
        return _index()
    known = _PROFILES.get(name)
    if known is None:
        return _plain(404, "Unknown profile\n")
    return known[1](query)


def variables(figures: Mapping[str, Any]) -> Page:
    """/debug/vars: a JSON object of whatever the server wants to show."""
    memory = {"objects": len(gc.get_objects()), "collections": [row["collections"] for row in gc.get_stats()]}
    document = {"cmdline": sys.orig_argv, "memstats": memory, "threads": threading.active_count(), **figures}
    return Page(200, [("Content-Type", "application/json; charset=utf-8")], json.dumps(document, indent=0).encode())


# ---------------------------------------------------------------------------------------------------- files at the end


class FileProfiles:
    """-cpuprofile and -memprofile: begun at the start, written by finish(). Files are created first: OSError."""

    def __init__(self, cpu_path: str, memory_path: str) -> None:
        self._paths = (cpu_path, memory_path)
        for path in self._paths:
            if path:
                with open(path, "wb"):
                    pass
        self._sampler = Sampler().start() if cpu_path else None
        if memory_path and not tracemalloc.is_tracing():
            tracemalloc.start(TRACE_FRAMES)

    def finish(self) -> list[str]:
        """Writes the profiles; returns the files. Raises OSError."""
        written = []
        cpu_path, memory_path = self._paths
        if self._sampler is not None:
            profile = self._sampler.stop()
            written += [
                _write(cpu_path, pprof_format(profile)),
                _write(cpu_path + ".folded", folded_format(profile)),
                _write(cpu_path + ".pstats", pstats_format(profile)),
            ]
        if memory_path:
            snapshot = tracemalloc.take_snapshot()
            tracemalloc.stop()  # what follows would be traced, too, and take many times as long
            written.append(_write(memory_path, pprof_format(memory_profile(snapshot))))
            written.append(_write(memory_path + ".txt", memory_text(snapshot).encode("utf-8", "replace")))
        return written


def _write(path: str, data: bytes) -> str:
    with open(path, "wb") as file:
        file.write(data)
    return path
