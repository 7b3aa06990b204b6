"""Frames of all threads: as the interpreter gives them, and without the danger that lies in asking."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from pyvolume.frames import current_frames

BUSY = """
import gc, sys, threading, time
from pyvolume.frames import current_frames

class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self):
        time.sleep(0.0001)  # lets another thread run

def leaf():
    Cycle()
    time.sleep(0.0001)

def work():
    while not stop.is_set():
        leaf()

def threads():
    while not stop.is_set():
        thread = threading.Thread(target=leaf)
        thread.start()
        thread.join()

stop = threading.Event()
gc.set_threshold(5)
for target in [work] * 20 + [threads] * 4:
    threading.Thread(target=target, daemon=True).start()
for _ in range(20_000):
    current_frames()
stop.set()
print("done")
"""


def test_a_collection_while_frames_were_taken_froze_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], check=False, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        frames = current_frames()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
    assert {thread.ident for thread in threading.enumerate()} <= set(frames)
    assert frames.pop(threading.get_ident()).f_code.co_name == "current_frames"
