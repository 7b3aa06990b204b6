"""The engine leaves no hold on a caller's memoryview: the collector of Pythons before 3.12.4 crashes on those."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyvolume._native.borrow import borrow

PREAMBLE = """
import gc, threading
from pyvolume._native import ec, engine, gzip, http
from pyvolume.server import profiling

def kept(call):
    \"\"\"Makes a cycle of an exception and the frames it came through: a variable that holds it.\"\"\"
    try:
        call()
    except Exception as exc:
        failure = exc
"""
FAILING = {
    "a record that is none": "engine.parse_needle(memoryview(bytearray(64)), 3, 12)",
    "a record's end": "engine.parse_needle_meta(memoryview(bytearray(20)), memoryview(bytearray(9)), 9)",
    "a super block": "engine.superblock_parse(memoryview(bytearray(3)))",
    "an upload": "http.parse_upload(method=b'POST', path=b'/1,01', body=memoryview(bytearray(b'--x')), size_limit=9,"
    " table=None, content_type=b'multipart/form-data; boundary=x')",
    "shards of no ratio": "ec.recover(0, 0, {0: memoryview(bytearray(8))}, 1)",
}


def survives(text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PREAMBLE + text],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("call", FAILING.values(), ids=FAILING.keys())
def test_a_kept_exception_does_not_crash_the_collector(call: str) -> None:
    survives(f"for _ in range(3):\n    kept(lambda: {call})\n    gc.collect()\n")


def test_a_kept_exception_of_a_volume_does_not_crash_the_collector(tmp_path: object) -> None:
    survives(f"""
v = engine.Volume.open({str(tmp_path)!r} + "/1.dat", {str(tmp_path)!r} + "/1.idx", vid=1, offset_width=4,
                       flags=engine.OpenFlag.CREATE, superblock=bytes([3, 0, 0, 0, 0, 0, 0, 0]))
v.close()
data = memoryview(bytearray(b"data"))
for call in (
    lambda: v.write(1, 2, data, name=data, mime=data, pairs=data),
    lambda: v.write_blob(1, 4, data),
    lambda: v.pread_into(0, data, 0),
):
    kept(call)
    gc.collect()
""")


def test_a_profile_of_threads_in_the_engine_does_not_crash_the_collector() -> None:
    survives("""
stop = threading.Event()
record = memoryview(engine.frame_needle(1, 2, bytes(4 << 20)))

def work():
    while not stop.is_set():
        engine.parse_needle(record[:], 3, None)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
sampler = profiling.Sampler(0.001).start()
for _ in range(40):
    profiling.stacks_text(True)
    gc.collect()
sampler.stop()
stop.set()
for thread in threads:
    thread.join()
""")


def test_what_is_borrowed() -> None:
    whole = bytearray(b"0123456789")
    view = memoryview(whole)[2:5]
    pointer, length = borrow(view)
    assert (length, pointer[0:3]) == (3, [50, 51, 52]) or bytes(pointer[0:3]) == b"234"
    view.release()  # BufferError if something had a hold on it
    for data in (b"abc", whole):
        assert borrow(data)[1] == len(data)
    with pytest.raises(BufferError):
        borrow(memoryview(b"constant"), writable=True)
