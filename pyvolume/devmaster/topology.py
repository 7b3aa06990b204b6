"""What the development master knows: servers, their volumes, what may be written, and ids given out.

No I/O but the small file of `Sequence`; imports leaves only. One lock guards everything; methods are short. Shapes of
documents and texts of errors are those of upstream's master (`weed/topology`), as far as clients and tests look.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyvolume.digest import report_hash
from pyvolume.types import FileId, ReplicaPlacement, Ttl, normalize_disk_type, readable_disk_type

DEFAULT_DATA_CENTER = "DefaultDataCenter"
DEFAULT_RACK = "DefaultRack"
VOLUME_VERSION = 3
VOLUMES_PER_GROWTH = {1: 7, 2: 6, 3: 3}
"""Volumes made at once, by number of copies; one for more copies."""
SEQUENCE_STEP = 10_000
NO_WRITABLE = "No writable volumes"


class MasterError(Exception):
    """A request that cannot be met; str() is what the client sees. out_of_space: growing cannot help either."""

    def __init__(self, text: str, *, out_of_space: bool = False) -> None:
        super().__init__(text)
        self.out_of_space = out_of_space


class Layout(NamedTuple):
    """Volumes that are alike: an assignment asks for one of these."""

    collection: str
    replication: int
    ttl: int
    disk_type: str

    @classmethod
    def of(cls, volume: Any) -> Layout:
        """The layout of a reported volume."""
        return cls(volume.collection, volume.replica_placement, volume.ttl, volume.disk_type)


@dataclass(frozen=True, slots=True)
class Wish:
    """What an assignment or a growth asks for."""

    collection: str = ""
    replication: ReplicaPlacement = field(default_factory=lambda: ReplicaPlacement.parse("000"))
    ttl: Ttl = Ttl.NONE
    disk_type: str = ""
    data_center: str = ""
    rack: str = ""
    data_node: str = ""
    memory_map_max_mb: int = 0
    preallocate: int = 0

    @classmethod
    def parse(cls, values: Mapping[str, str], default_replication: str) -> Wish:
        """From request parameters. Raises MasterError with upstream's text."""
        try:
            return cls(
                collection=values.get("collection", ""),
                replication=ReplicaPlacement.parse(values.get("replication") or default_replication),
                ttl=Ttl.parse(values.get("ttl", "")),
                disk_type=normalize_disk_type(values.get("disk", "")),
                data_center=values.get("dataCenter", ""),
                rack=values.get("rack", ""),
                data_node=values.get("dataNode", ""),
                preallocate=int(values.get("preallocate") or 0),
            )
        except ValueError as exc:
            raise MasterError(str(exc)) from None

    @property
    def layout(self) -> Layout:
        return Layout(self.collection, self.replication.byte, self.ttl.to_u32(), self.disk_type)

    def describe(self) -> str:
        """Upstream's JSON of the wish, which its error texts embed."""
        counts = {"node": self.replication.node, "rack": self.replication.rack, "dc": self.replication.dc}
        shown: dict[str, Any] = {
            "collection": self.collection,
            "replication": {name: count for name, count in counts.items() if count},
            "ttl": {"Count": self.ttl.count, "Unit": self.ttl.unit},
            "disk": self.disk_type,
            "preallocate": self.preallocate,
            "dataCenter": self.data_center,
            "rack": self.rack,
            "dataNode": self.data_node,
            "memoryMapMaxSizeMb": self.memory_map_max_mb,
            "version": VOLUME_VERSION,
        }
        return json.dumps(
            {name: value for name, value in shown.items() if value or name in ("replication", "ttl")},
            separators=(",", ":"),
        )

    def accepts(self, node: Node) -> bool:
        """Whether the node lies where the wish wants it."""
        return (
            (not self.data_center or node.data_center == self.data_center)
            and (not self.rack or node.rack == self.rack)
            and (not self.data_node or node.id == self.data_node)
        )


@dataclass(eq=False)
class Node:
    """One volume server, as long as its heartbeat stream is open."""

    id: str
    ip: str
    port: int
    grpc_port: int
    public_url: str
    data_center: str
    rack: str
    uuids: tuple[str, ...] = ()
    max_counts: dict[str, int] = field(default_factory=dict)
    volumes: dict[tuple[int, int], Any] = field(default_factory=dict)
    """(disk id, volume id) → VolumeInformationMessage."""
    ec_shards: dict[tuple[int, int], Any] = field(default_factory=dict)
    """(disk id, volume id) → VolumeEcShardInformationMessage."""
    readonly_marks: set[int] = field(default_factory=set)
    reserved: dict[str, int] = field(default_factory=dict)
    """Volumes being made, by disk type."""
    guessed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Volumes just made whose disk the server has not told yet: volume id → key under which they stand."""

    @property
    def url(self) -> str:
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"{host}:{self.port}"

    def volumes_with_id(self, vid: int) -> list[Any]:
        return [volume for (_, held), volume in self.volumes.items() if held == vid]

    def hold(self, volume: Any) -> None:
        """Takes in what the server says of a volume."""
        guess = self.guessed.pop(volume.id, None)
        if guess is not None:
            self.volumes.pop(guess, None)
        self.volumes[volume.disk_id, volume.id] = volume

    def free_slots(self, disk_type: str) -> int:
        used = sum(volume.disk_type == disk_type for volume in self.volumes.values())
        free: int = self.max_counts.get(disk_type, 0) - used - self.reserved.get(disk_type, 0)
        return free

    def digest(self) -> int:
        """What the server's own digest must be when nothing was missed."""
        value = 0
        for volume in self.volumes.values():
            value ^= report_hash(volume)
        return value


@dataclass(frozen=True, slots=True)
class Assignment:
    """One assigned file id and the servers that hold its volume; the first one is to be written to."""

    fid: str
    count: int
    nodes: list[Node]


class Sequence:
    """Ids of volumes and files. With a directory they survive a restart; without one, servers' reports do for them."""

    def __init__(self, directory: str = "") -> None:
        self._path = Path(directory) / "devmaster.json" if directory else None
        self._next_key = 1
        self._key_ceiling = 0
        self.max_vid = 0
        if self._path is not None and self._path.exists():
            saved = json.loads(self._path.read_text())
            self.max_vid, self._next_key = int(saved["max_volume_id"]), int(saved["next_file_key"])

    def next_vid(self) -> int:
        self.max_vid += 1
        self._save()
        return self.max_vid

    def next_keys(self, count: int) -> int:
        """The first of count ids in a row."""
        first = self._next_key
        self._next_key += count
        if self._next_key > self._key_ceiling:
            self._key_ceiling = self._next_key + SEQUENCE_STEP
            self._save()
        return first

    def seen(self, max_key: int, vids: Iterable[int] = ()) -> None:
        """Ids that servers hold already."""
        self._next_key = max(self._next_key, max_key + 1)
        self.max_vid = max(self.max_vid, *vids, 0)

    def _save(self) -> None:
        if self._path is None:
            return
        text = json.dumps({"max_volume_id": self.max_vid, "next_file_key": max(self._key_ceiling, self._next_key)})
        part = self._path.with_suffix(".tmp")
        part.write_text(text)
        os.replace(part, self._path)


class Topology:
    """All of it. Thread-safe."""

    def __init__(self, volume_size_limit_bytes: int, sequence: Sequence, rng: random.Random | None = None) -> None:
        self.volume_size_limit_bytes = volume_size_limit_bytes
        self._sequence = sequence
        self._random = rng if rng is not None else random.Random()
        self._lock = threading.RLock()
        self._nodes: dict[str, Node] = {}
        self._asked_layouts: dict[Layout, None] = {}

    # -- servers ------------------------------------------------------------------------------------------------------

    def register(self, beat: Any) -> tuple[Node | None, list[str]]:
        """A new node from the first message of a stream; (None, uuids) if another server serves these directories."""
        node_id = beat.id or f"{beat.ip}:{beat.port}"
        with self._lock:
            taken = {uuid for node in self._nodes.values() if node.id != node_id for uuid in node.uuids}
            duplicates = [uuid for uuid in beat.location_uuids if uuid in taken]
            if duplicates:
                return None, duplicates
            node = Node(
                id=node_id,
                ip=beat.ip,
                port=beat.port,
                grpc_port=beat.grpc_port,
                public_url=beat.public_url or f"{beat.ip}:{beat.port}",
                data_center=beat.data_center or DEFAULT_DATA_CENTER,
                rack=beat.rack or DEFAULT_RACK,
                uuids=tuple(beat.location_uuids),
            )
            self._nodes[node_id] = node
            return node, []

    def unregister(self, node: Node) -> None:
        """The node's stream has ended. A newer stream of the same server is left alone."""
        with self._lock:
            if self._nodes.get(node.id) is node:
                del self._nodes[node.id]

    def apply(self, node: Node, beat: Any) -> bool:
        """Takes over what a message says; true when the master should ask for the whole list."""
        with self._lock:
            if beat.max_volume_counts:
                node.max_counts = dict(beat.max_volume_counts)
            for short in beat.new_volumes:
                self._add_short(node, short)
            for short in beat.deleted_volumes:
                node.volumes.pop((short.disk_id, short.id), None)
            for volume in beat.changed_volumes:
                node.hold(volume)
            is_full = bool(beat.volumes) or beat.has_no_volumes
            if is_full:
                node.volumes = {(volume.disk_id, volume.id): volume for volume in beat.volumes}
                node.guessed.clear()
            self._apply_ec(node, beat)
            self._sequence.seen(beat.max_file_key, (vid for _, vid in node.volumes))
            for volume in node.volumes.values():
                self._asked_layouts.setdefault(Layout.of(volume))
            return beat.HasField("volume_digest") and not is_full and beat.volume_digest != node.digest()

    @staticmethod
    def _add_short(node: Node, short: Any) -> None:
        """A volume known from a delta: with counts of zero until the next beat."""
        if short.id in node.guessed or (short.disk_id, short.id) not in node.volumes:
            node.hold(_information(short))

    @staticmethod
    def _apply_ec(node: Node, beat: Any) -> None:
        for shards in beat.new_ec_shards:
            known = node.ec_shards.get((shards.disk_id, shards.id))
            if known is None:
                node.ec_shards[shards.disk_id, shards.id] = shards
            else:
                known.ec_index_bits |= shards.ec_index_bits
        for shards in beat.deleted_ec_shards:
            known = node.ec_shards.get((shards.disk_id, shards.id))
            if known is not None:
                known.ec_index_bits &= ~shards.ec_index_bits
                if not known.ec_index_bits:
                    del node.ec_shards[shards.disk_id, shards.id]
        if beat.ec_shards or beat.has_no_ec_shards:
            node.ec_shards = {(shards.disk_id, shards.id): shards for shards in beat.ec_shards}

    # -- lookups ------------------------------------------------------------------------------------------------------

    @property
    def max_vid(self) -> int:
        with self._lock:
            return self._sequence.max_vid

    def lookup(self, vid: int, collection: str = "") -> list[Node]:
        """The servers that hold a volume, as a normal one or as shards."""
        with self._lock:
            found = [
                node
                for node in self._nodes.values()
                if any(not collection or volume.collection == collection for volume in node.volumes_with_id(vid))
            ]
            return found or [node for node in self._nodes.values() if any(held == vid for _, held in node.ec_shards)]

    def lookup_ec(self, vid: int) -> dict[int, list[Node]]:
        """Servers by shard of an EC volume."""
        found: dict[int, list[Node]] = {}
        with self._lock:
            for node in self._nodes.values():
                bits = 0
                for (_, held), shards in node.ec_shards.items():
                    bits |= shards.ec_index_bits if held == vid else 0
                for shard in range(bits.bit_length()):
                    if bits >> shard & 1:
                        found.setdefault(shard, []).append(node)
        return found

    def nodes_of_collection(self, collection: str) -> list[Node]:
        """The servers that hold something of a collection."""
        with self._lock:
            return [
                node
                for node in self._nodes.values()
                if any(held.collection == collection for held in (*node.volumes.values(), *node.ec_shards.values()))
            ]

    def forget_collection(self, collection: str) -> None:
        """After its volumes were deleted."""
        with self._lock:
            for node in self._nodes.values():
                node.volumes = {key: held for key, held in node.volumes.items() if held.collection != collection}
                node.ec_shards = {key: held for key, held in node.ec_shards.items() if held.collection != collection}
            self._asked_layouts = {layout: None for layout in self._asked_layouts if layout.collection != collection}

    def mark(self, ip: str, port: int, vid: int, readonly: bool) -> None:
        """A server says that a volume takes no more writes, or takes them again."""
        with self._lock:
            for node in self._nodes.values():
                if (node.ip, node.port) == (ip, port):
                    (node.readonly_marks.add if readonly else node.readonly_marks.discard)(vid)
                    if not readonly:
                        for volume in node.volumes_with_id(vid):
                            volume.read_only = False

    # -- writing ------------------------------------------------------------------------------------------------------

    def writable(self, layout: Layout) -> dict[int, list[Node]]:
        """Volumes of a layout that have all their copies, room, and no copy that is read-only."""
        holders: dict[int, list[Node]] = {}
        spoilt = set()
        with self._lock:
            for node in self._nodes.values():
                for (_, vid), volume in node.volumes.items():
                    if Layout.of(volume) != layout:
                        continue
                    holders.setdefault(vid, []).append(node)
                    if (
                        volume.read_only
                        or vid in node.readonly_marks
                        or volume.size >= self.volume_size_limit_bytes
                        or volume.version != VOLUME_VERSION
                    ):
                        spoilt.add(vid)
        copies = ReplicaPlacement.from_byte(layout.replication).copy_count
        return {vid: nodes for vid, nodes in holders.items() if len(nodes) >= copies and vid not in spoilt}

    def pick(self, count: int, wish: Wish) -> Assignment:
        """A file id in a volume that may be written. Raises MasterError when there is none."""
        with self._lock:
            self._asked_layouts.setdefault(wish.layout)
            all_writable = self.writable(wish.layout)
            fitting = {vid: nodes for vid, nodes in all_writable.items() if any(map(wish.accepts, nodes))}
            if not fitting:
                reason = NO_WRITABLE
                if all_writable:
                    reason += f" in DataCenter:{wish.data_center} Rack:{wish.rack} DataNode:{wish.data_node}"
                full = self.free_slots(wish) <= 0
                text = (
                    f"failed to find writable volumes for collection:{wish.collection} "
                    f"replication:{wish.replication} ttl:{wish.ttl} error: {reason}"
                )
                if full:
                    text += f" and no free volumes left for {wish.describe()}"
                raise MasterError(text, out_of_space=full)
            vid = self._random.choice(sorted(fitting))
            nodes = fitting[vid]
            preferred = [node for node in nodes if wish.accepts(node)]
            first = self._random.choice(preferred)
            key = self._sequence.next_keys(count)
            fid = str(FileId(vid, key, self._random.getrandbits(32)))
            return Assignment(fid, count, [first, *(node for node in nodes if node is not first)])

    def free_slots(self, wish: Wish) -> int:
        """Volumes that may still be made where the wish wants them."""
        with self._lock:
            return sum(max(0, node.free_slots(wish.disk_type)) for node in self._nodes.values() if wish.accepts(node))

    def has_data_center(self, name: str) -> bool:
        """True for no name, too."""
        with self._lock:
            return not name or any(node.data_center == name for node in self._nodes.values())

    def plan(self, wish: Wish) -> tuple[int, list[Node]]:
        """A new volume id and the servers to make it on, with slots reserved; end with settle(). Raises MasterError."""
        with self._lock:
            nodes = self._choose_nodes(wish)
            vid = self._sequence.next_vid()
            for node in nodes:
                node.reserved[wish.disk_type] = node.reserved.get(wish.disk_type, 0) + 1
            return vid, nodes

    def settle(self, wish: Wish, vid: int, nodes: list[Node], made: bool) -> None:
        """Gives the reserved slots back; a volume that was made is known from now on."""
        with self._lock:
            for node in nodes:
                node.reserved[wish.disk_type] -= 1
                if made and not node.volumes_with_id(vid):
                    node.guessed[vid] = (0, vid)
                    node.volumes[0, vid] = _new_volume(wish, vid)

    def _choose_nodes(self, wish: Wish) -> list[Node]:
        """Servers as the replication asks for: in one rack, in other racks, in other data centers."""
        placement = wish.replication
        candidates = [node for node in self._nodes.values() if node.free_slots(wish.disk_type) > 0]
        mains = [node for node in candidates if wish.accepts(node)]
        self._random.shuffle(mains)
        self._random.shuffle(candidates)
        mains.sort(key=lambda node: -node.free_slots(wish.disk_type))
        for main in mains:
            in_rack = [n for n in candidates if n is not main and _rack(n) == _rack(main)]
            other_racks = _one_each(
                (n for n in candidates if n.data_center == main.data_center and n.rack != main.rack), _rack
            )
            other_centers = _one_each(
                (n for n in candidates if n.data_center != main.data_center), lambda node: node.data_center
            )
            parts = ((in_rack, placement.node), (other_racks, placement.rack), (other_centers, placement.dc))
            if all(len(part) >= wanted for part, wanted in parts):
                return [main, *(node for part, wanted in parts for node in part[:wanted])]
        raise MasterError("no server can take another volume with all its copies", out_of_space=True)

    # -- documents ----------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The topology as /dir/status shows it."""
        with self._lock:
            centers: dict[str, dict[str, list[Node]]] = {}
            for node in self._nodes.values():
                centers.setdefault(node.data_center, {}).setdefault(node.rack, []).append(node)
            maximum = sum(sum(node.max_counts.values()) for node in self._nodes.values())
            used = sum(len(node.volumes) for node in self._nodes.values())
            return {
                "Max": maximum,
                "Free": maximum - used,
                "DataCenters": [
                    {
                        "Id": center,
                        "Racks": [
                            {
                                "Id": rack,
                                "DataNodes": [_describe_node(node) for node in sorted(nodes, key=lambda n: n.url)],
                            }
                            for rack, nodes in sorted(racks.items())
                        ],
                    }
                    for center, racks in sorted(centers.items())
                ]
                or None,
                "Layouts": [
                    {
                        "replication": str(ReplicaPlacement.from_byte(layout.replication)),
                        "ttl": str(Ttl.from_u32(layout.ttl)),
                        "writables": sorted(self.writable(layout)) or None,
                        "collection": layout.collection,
                        "diskType": readable_disk_type(layout.disk_type),
                    }
                    for layout in self._asked_layouts
                ]
                or None,
            }


def _rack(node: Node) -> tuple[str, str]:
    return node.data_center, node.rack


def _one_each(nodes: Iterable[Node], place: Callable[[Node], Any]) -> list[Node]:
    """The first node of each place."""
    found: dict[Any, Node] = {}
    for node in nodes:
        found.setdefault(place(node), node)
    return list(found.values())


def _describe_node(node: Node) -> dict[str, Any]:
    vids = sorted({vid for _, vid in node.volumes})
    return {
        "Url": node.url,
        "PublicUrl": node.public_url,
        "Volumes": len(node.volumes),
        "EcShards": sum(shards.ec_index_bits.bit_count() for shards in node.ec_shards.values()),
        "Max": sum(node.max_counts.values()),
        "VolumeIds": " " + _ranges(vids),
    }


def _ranges(numbers: list[int]) -> str:
    """`1-3 7 9-10` for sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@dataclass
class _Volume:
    """A volume of which only the identity is known yet; the fields of VolumeInformationMessage."""

    id: int
    collection: str
    replica_placement: int
    ttl: int
    disk_type: str
    version: int = VOLUME_VERSION
    disk_id: int = 0
    size: int = 0
    file_count: int = 0
    delete_count: int = 0
    deleted_byte_count: int = 0
    read_only: bool = False
    compact_revision: int = 0
    modified_at_second: int = 0
    remote_storage_name: str = ""


def _information(short: Any) -> _Volume:
    return _Volume(
        id=short.id,
        collection=short.collection,
        replica_placement=short.replica_placement,
        ttl=short.ttl,
        disk_type=short.disk_type,
        version=short.version,
        disk_id=short.disk_id,
    )


def _new_volume(wish: Wish, vid: int) -> _Volume:
    layout = wish.layout
    return _Volume(vid, layout.collection, layout.replication, layout.ttl, layout.disk_type)
