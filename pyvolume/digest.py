"""The hash of a reported volume, from which server and master compute the digests they compare.

Leaf: imports nothing of the package. Upstream: `weed/storage/volume_report_hash.go`; the value is part of the protocol.
"""

from __future__ import annotations

from typing import Any

import xxhash

_U32_MAX = (1 << 32) - 1
_U64_MASK = (1 << 64) - 1
_FOLD_FACTOR = 0x9E3779B97F4A7C15


def report_hash(info: Any) -> int:
    """The hash of one volume. A digest is the XOR of the hashes of all volumes reported.

    info has the fields of VolumeInformationMessage; remote_storage_key is not part of the hash, counts are cut to 32
    bits, a ttl without a count is none.
    """
    head = b"".join(
        (
            info.id.to_bytes(4, "little"),
            info.size.to_bytes(8, "little"),
            min(info.file_count, _U32_MAX).to_bytes(8, "little"),
            min(info.delete_count, _U32_MAX).to_bytes(8, "little"),
            info.deleted_byte_count.to_bytes(8, "little"),
            (info.replica_placement & 0xFF).to_bytes(4, "little"),
            info.version.to_bytes(4, "little"),
            (info.ttl if info.ttl >> 8 else 0).to_bytes(4, "little"),
            info.compact_revision.to_bytes(4, "little"),
            info.disk_id.to_bytes(4, "little"),
            b"\x01" if info.read_only else b"\x00",
        )
    )
    value: int = xxhash.xxh64_intdigest(head)
    for part in (
        (info.modified_at_second & _U64_MASK).to_bytes(8, "little"),
        info.collection.encode(),
        info.disk_type.encode(),
        info.remote_storage_name.encode(),
    ):
        value = (value ^ xxhash.xxh64_intdigest(part)) * _FOLD_FACTOR & _U64_MASK
        value ^= value >> 29
    return value
