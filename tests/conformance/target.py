"""A server that runs already, for the case table: `PYVOLUME_TEST_TARGET=host:port` and what goes with it.

The server must be fresh (volumes 1 to 5 and 77 unknown, or made by an earlier run of this), with a master, and started
with `-readMode=local -fileSizeLimitMB=2`. `PYVOLUME_TEST_TARGET_GRPC` names the gRPC address, else port + 10000;
`PYVOLUME_TEST_TARGET_PUBLIC` that of the public port, else its cases are left out.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from dataclasses import dataclass, field

import grpc
from http_bench import TIMEOUT_S, Client

from pyvolume.pb import volume_server_pb2

ADDRESS = os.environ.get("PYVOLUME_TEST_TARGET", "")
VOLUMES: dict[int, dict[str, str]] = {
    1: {},
    2: {},
    3: {"ttl": "3d"},
    4: {"collection": "pics"},
    5: {"replication": "001"},
}


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


@dataclass
class Target:
    """What the cases need of a server that is somewhere."""

    address: str
    _keys: itertools.count[int] = field(default_factory=lambda: itertools.count(secrets.randbits(40) << 8, 0x10))

    def client(self, *, public: bool = False) -> Client | None:
        """None for the public port of a server whose public port is not named."""
        address = os.environ.get("PYVOLUME_TEST_TARGET_PUBLIC", "") if public else self.address
        return Client(*reversed(_split(address))) if address else None

    def fid(self, vid: int = 1) -> str:
        """A file id that no run used before."""
        return f"{vid},{next(self._keys):x}{secrets.randbits(32):08x}"

    def prepare(self) -> None:
        """Makes the volumes of the case table, but for those that are there, and waits until the master knows them."""
        host, port = _split(self.address)
        grpc_address = os.environ.get("PYVOLUME_TEST_TARGET_GRPC") or f"{host}:{port + 10000}"
        with grpc.insecure_channel(grpc_address) as channel:
            for vid, settings in VOLUMES.items():
                request = volume_server_pb2.AllocateVolumeRequest(volume_id=vid, version=3, **settings)
                try:
                    _call(channel, "AllocateVolume", request)
                except grpc.RpcError as exc:
                    if "already exists" not in str(exc.details()):
                        raise
            _call(channel, "VolumeMarkReadonly", volume_server_pb2.VolumeMarkReadonlyRequest(volume_id=2))
        client = self.client()
        assert client is not None
        end = time.monotonic() + TIMEOUT_S
        expected = b"replicating operations [1] is less than volume 5 replication copy count [2]"
        while expected not in (last := client.ask("PUT", f"/{self.fid(5)}", (("Content-Type", "a/b"),), b"x").body):
            assert time.monotonic() < end, f"the master does not know the volumes: {last!r}"
            time.sleep(0.1)
        client.close()


def _call(channel: grpc.Channel, name: str, request: object) -> bytes:
    send = channel.unary_unary(
        f"/volume_server_pb.VolumeServer/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=bytes,
    )
    answer: bytes = send(request, timeout=TIMEOUT_S)
    return answer
