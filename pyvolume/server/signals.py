"""Signals of the process: handlers that only put a note into a queue, which the main thread reads.

Must not import any other module of server, so that it can be in force before the slow imports. From the first moment on
SIGTERM, SIGINT and SIGALRM end the process with status 0 until the server serves (`Inbox.defer`), as upstream does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from collections import deque
from types import FrameType

from pyvolume import log

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
QUIT_STATUS = 2


class Inbox:
    """Where the main thread sleeps. put() may be called from signal handlers and from any thread.

    It sleeps on a pipe and not on a lock: the kernel may hand a signal that follows another closely to any thread, and
    then only the byte that the interpreter writes to its wake-up descriptor tells the main thread to run the handler.
    """

    def __init__(self) -> None:
        self._notes: deque[object] = deque()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)
        self._deferred = False

    def install(self) -> None:
        """Installs the handlers; main thread only.

        SIGQUIT prints all stacks and ends with status 2, SIGUSR1 prints them and goes on. The stacks of SIGQUIT, and
        those of a crash, are printed without the interpreter's help, so that they come out even if it is stuck.
        """
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_hangup)
        signal.signal(signal.SIGQUIT, _on_quit)
        signal.signal(signal.SIGUSR1, _on_show)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error may be closed
            faulthandler.enable(file=sys.stderr, all_threads=True)
            faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True, chain=True)

    def defer(self) -> None:
        """From now on stop signals are notes for the main thread instead of ending the process at once."""
        self._deferred = True

    def put(self, note: object) -> None:
        self._notes.append(note)
        with contextlib.suppress(BlockingIOError):  # full: there is enough in it to wake the reader
            os.write(self._writer, b"\0")

    def get(self) -> object:
        """The next note; waits for it. Handlers run while it waits."""
        while not self._notes:
            os.read(self._reader, 512)
        return self._notes.popleft()

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        if not self._deferred:
            log.exit_process(0)
        self.put(signal.Signals(number))

    def _on_hangup(self, number: int, _frame: FrameType | None) -> None:
        if self._deferred:
            self.put(signal.Signals(number))


def _on_quit(_number: int, _frame: FrameType | None) -> None:
    log.exit_process(QUIT_STATUS)


def _on_show(_number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, log.all_stacks().encode("utf-8", "backslashreplace"))
