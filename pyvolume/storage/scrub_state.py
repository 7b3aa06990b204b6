"""Where the scrub of a volume has come, in a small file beside its data, so that a restart does not begin it anew.

May import volume, scrub, files and the leaves. `<base>.scrub` means nothing to upstream; it goes with the volume, and
when the scrub that it belongs to is done. What is read from it is checked, and not believed for longer than a day:
then, or after a vacuum, or with another file in the data file's place, all is read anew.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from pyvolume.storage import files
from pyvolume.storage.scrub import ScrubPosition

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

EXTENSION: Final = "scrub"
SAVE_INTERVAL_S: Final = 30.0
MAX_AGE_S: Final = 24 * 3600
"""From the beginning of a scrub: how long what was read counts as read."""
MAX_FINDINGS: Final = 1000
"""With more the position is noted no further: the next scrub finds what is behind it again."""
_MAX_BYTES: Final = 1 << 20
_MAX_TEXT: Final = 4096
_FORMAT: Final = 1

_lock = threading.Lock()
"""Held while one of the files is written: two scrubs of a volume would share the temporary."""


class ScrubState:
    """The noted position of one volume. `position` is where to go on from; None to begin anew."""

    def __init__(self, volume: Volume) -> None:
        """Reads what an earlier scrub has left. Blocks on disk; what cannot be used is passed over."""
        self._vid = volume.vid
        self._dat_path = volume.dat_path
        self._path = f"{volume.base_path}.{EXTENSION}"
        self._began_s = time.time()
        self._saved_s = time.monotonic()
        self._complained = False
        self.position: ScrubPosition | None = None
        try:
            began_s, position = self._read()
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            log.warning("volume %d: %s: %s; the scrub begins anew", self._vid, self._path, exc)
            return
        if 0 <= self._began_s - began_s < MAX_AGE_S and position.revision == volume.compaction_revision:
            self._began_s, self.position = began_s, position
            log.info("volume %d: the scrub goes on at offset %d", self._vid, position.offset)

    def _read(self) -> tuple[float, ScrubPosition]:
        with files.opened(self._path) as fd:
            content = os.read(fd, _MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError("it is too long")
        said: dict[str, Any] = json.loads(content)
        if not isinstance(said, dict) or said.get("format") != _FORMAT:
            raise ValueError("this is not what a scrub left")
        numbers = [said[key] for key in ("offset", "revision", "began_s", "inode")]
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a number is out of range")
        findings = tuple((row, text) for row, text in said["findings"])
        if len(findings) > MAX_FINDINGS or any(type(row) is not int or type(text) is not str for row, text in findings):
            raise ValueError("the findings are not what a scrub left")
        offset, revision, began_s, inode = numbers
        dat = os.stat(self._dat_path)
        if dat.st_ino != inode or offset > dat.st_size:
            raise ValueError("it tells of another data file")
        return float(began_s), ScrubPosition(offset, revision, findings)

    def note(self, position: ScrubPosition) -> None:
        """Takes note now and then; cheap otherwise."""
        if time.monotonic() - self._saved_s >= SAVE_INTERVAL_S:
            self.save(position)

    def save(self, position: ScrubPosition) -> None:
        """Writes the position. A failure is logged once. Failpoints: scrub.state.write, scrub.state.rename."""
        self._saved_s = time.monotonic()
        if not position.offset or len(position.findings) > MAX_FINDINGS:
            return
        try:
            content = {
                "format": _FORMAT,
                "offset": position.offset,
                "revision": position.revision,
                "began_s": int(self._began_s),
                "inode": os.stat(self._dat_path).st_ino,
                "findings": [(row, text[:_MAX_TEXT]) for row, text in position.findings],
            }
            text = json.dumps(content).encode()
            if len(text) <= _MAX_BYTES:
                with _lock:
                    files.replace_file(self._path, text, point="scrub.state")
        except OSError as exc:
            if not self._complained:
                log.warning("volume %d: noting where the scrub is: %s", self._vid, exc)
            self._complained = True

    def forget(self) -> None:
        """Removes the file: the scrub is done."""
        try:
            with _lock:
                files.remove_if_exists(self._path)
        except OSError as exc:
            log.warning("volume %d: %s: %s", self._vid, self._path, exc)
