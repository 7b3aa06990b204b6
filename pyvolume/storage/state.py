"""The server's own persisted state, `state.pb`: maintenance mode and the version that guards its changes.

May import storage.files and the leaves only. The file is the binary message VolumeServerState (1 bool maintenance,
2 uint32 version), so a Go server reads it. Upstream: `weed/storage/store_state.go`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from pyvolume.errors import StateVersionMismatch, StorageError, from_os_error
from pyvolume.storage.files import replace_file

STATE_FILE_NAME: Final = "state.pb"


@dataclass(frozen=True, slots=True)
class ServerState:
    maintenance: bool = False
    version: int = 0


def encode(state: ServerState) -> bytes:
    """Proto3 binary form; default values are left out."""
    out = bytearray()
    if state.maintenance:
        out += b"\x08\x01"
    if state.version:
        out.append(0x10)
        value = state.version
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("unexpected end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError("varint too long")


def decode(data: bytes) -> ServerState:
    """Reads the binary form; unknown fields are skipped, the last value of a field counts. Raises ValueError."""
    maintenance, version = False, 0
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise ValueError("field number 0")
        if wire == 0:
            value, at = _varint(data, at)
            if number == 1:
                maintenance = value != 0
            elif number == 2:
                version = value & 0xFFFFFFFF
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        at += length
        if at > len(data):
            raise ValueError("unexpected end")
    return ServerState(maintenance, version)


class StateFile:
    """The current state and its file in the idx directory of the first location. Thread-safe.

    One lock of its own guards the value and serialises updates; it is held while the file is written (no other lock is
    taken under it).
    """

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/{STATE_FILE_NAME}"
        self._lock = threading.Lock()
        self._state = ServerState()

    def load(self) -> None:
        """Reads the file; a missing one is the default state. Raises StorageError; blocks on disk."""
        try:
            with open(self.path, "rb") as handle:
                data = handle.read(1 << 20)
        except FileNotFoundError:
            return
        except OSError as exc:
            error = from_os_error(exc, "open", self.path)
            raise type(error)(f"failed to read store state from {self.path} : {error}", error.errno) from exc
        try:
            state = decode(data)
        except ValueError as exc:
            text = (
                f"failed to parse store state from {self.path} : proto: cannot parse invalid wire-format data ({exc})"
            )
            raise StorageError(text) from None
        with self._lock:
            self._state = state

    @property
    def current(self) -> ServerState:
        with self._lock:
            return self._state

    @property
    def maintenance(self) -> bool:
        return self.current.maintenance

    @property
    def version(self) -> int:
        return self.current.version

    def update(self, wanted: ServerState) -> ServerState:
        """Takes wanted's fields if its version is the current one, counts the version up, and writes the file.

        Raises StateVersionMismatch, or DiskError (and the state stays as it was). Blocks on disk.
        Failpoints: state.write, state.rename.
        """
        with self._lock:
            if wanted.version != self._state.version:
                raise StateVersionMismatch(
                    f"version mismatch for VolumeServerState (got {self._state.version}, want {wanted.version})"
                )
            state = ServerState(wanted.maintenance, (wanted.version + 1) & 0xFFFFFFFF)
            try:
                replace_file(self.path, encode(state), point="state")
            except OSError as exc:
                error = from_os_error(exc, "open", self.path)
                raise type(error)(f"failed to write store state to {self.path} : {error}", error.errno) from exc
            self._state = state
            return state
