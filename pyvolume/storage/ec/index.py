"""The journal of deletes (`.ecj`) and what it does to the sorted index (`.ecx`).

May import _native, files and the leaves only. Everything blocks on disk. A journal is bare big-endian ids, each synced;
what is torn at its end is no delete. The index is only ever changed here, by setting the size of a row to -1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Final

from pyvolume._native import ec, engine
from pyvolume.errors import StorageError, from_native, from_os_error
from pyvolume.faults import fault
from pyvolume.storage import files

ID_BYTES: Final = 8
_TOMBSTONE: Final = b"\xff\xff\xff\xff"


def journal_data(path: str) -> bytes:
    """The bytes of a journal; a missing file has none. Raises OSError."""
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except FileNotFoundError:
        return b""


def read_journal(path: str) -> list[int]:
    """The whole ids of a journal, in order; a missing file has none. Raises OSError."""
    return ids_of(journal_data(path))


def ids_of(data: bytes) -> list[int]:
    """The whole ids in the bytes of a journal."""
    whole = len(data) - len(data) % ID_BYTES
    return [int.from_bytes(data[at : at + ID_BYTES], "big") for at in range(0, whole, ID_BYTES)]


def bytes_of(keys: Iterable[int]) -> bytes:
    """A journal of these ids."""
    return b"".join(key.to_bytes(ID_BYTES, "big") for key in keys)


def row_bytes(width: int) -> int:
    """Bytes of one row of an index."""
    return 12 + width


def bury(ecx_path: str, width: int, keys: Iterable[int]) -> int:
    """Marks rows as deleted, synced; the number of keys found. Raises StorageError."""
    found = 0
    try:
        with files.opened(ecx_path, os.O_RDWR) as fd:
            rows = os.fstat(fd).st_size // row_bytes(width)
            for key in keys:
                row = ec.ecx_find(fd, width, rows, key)
                if row is None:
                    continue
                found += 1
                if row[2] != -1:
                    os.pwrite(fd, _TOMBSTONE, row[0] * row_bytes(width) + 8 + width)
            fault("ec.fold")
            os.fsync(fd)
    except OSError as exc:
        raise from_os_error(exc, "open", ecx_path) from exc
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, path=ecx_path) from exc
    return found


def fold_file(ecx_path: str, width: int, ecj_path: str) -> None:
    """Folds a journal that nobody has open into the index, and removes it. Raises StorageError.

    A torn end keeps the journal and changes nothing: it may be an id that is being copied.
    """
    try:
        with open(ecj_path, "rb") as handle:
            data = handle.read()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise from_os_error(exc, "open", ecj_path) from exc
    if len(data) % ID_BYTES:
        raise StorageError("rebuild: read ecj: unexpected EOF")
    bury(ecx_path, width, ids_of(data))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(ecj_path)
    except OSError as exc:
        raise from_os_error(exc, "remove", ecj_path) from exc
