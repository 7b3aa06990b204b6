"""Two hundred long streams that stand still all run, leave short calls their turn, and give everything back."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import grpc
from race.server import HttpStore, threads_and_fds

from pyvolume.pb import volume_server_pb2 as pb
from tools.compat.bed import HOST, Bed, wait_for

STREAMS = 200
CHANNELS = 10
ANY_REVISION = 0xFFFFFFFF


def test_two_hundred_streams_leave_short_calls_their_turn(tmp_path: Path) -> None:
    with Bed(tmp_path, command=f"{shlex.quote(sys.executable)} -m pyvolume") as bed:
        bed.call("AllocateVolume", volume_id=1, replication="000", version=3)
        store = HttpStore(bed, 1)
        for key in range(1, 17):
            store.put(key, os.urandom(1 << 20))  # more than the windows of flow control hold
        bed.call("Ping")
        files = threads_and_fds(bed)[1]
        channels = [
            grpc.insecure_channel(f"{HOST}:{bed.grpc_port}", options=(("grpc.use_local_subchannel_pool", 1),))
            for _ in range(CHANNELS)
        ]
        requests: dict[str, Any] = {
            "VolumeTailSender": pb.VolumeTailSenderRequest(volume_id=1),
            "CopyFile": pb.CopyFileRequest(
                volume_id=1, ext=".dat", stop_offset=1 << 40, compaction_revision=ANY_REVISION
            ),
        }
        streams = []
        for number in range(STREAMS):
            name = ("VolumeTailSender", "CopyFile")[number % 2]
            start = channels[number % CHANNELS].unary_stream(
                f"/volume_server_pb.VolumeServer/{name}",
                request_serializer=type(requests[name]).SerializeToString,
                response_deserializer=getattr(pb, f"{name}Response").FromString,
            )
            streams.append(start(requests[name]))
        for stream in streams:  # nobody reads on: they stand still, full
            next(stream)
        for _ in range(20):
            assert bed.call("Ping").start_time_ns > 0
            assert bed.call("VolumeStatus", volume_id=1).file_count == 16
        for stream in streams:
            stream.cancel()
        for channel in channels:
            channel.close()
        assert wait_for(lambda: threads_and_fds(bed)[1] <= files, 20), (threads_and_fds(bed), files)

        def tails() -> bool:
            with grpc.insecure_channel(f"{HOST}:{bed.grpc_port}") as channel:
                tail = channel.unary_stream(
                    "/volume_server_pb.VolumeServer/VolumeTailSender",
                    request_serializer=pb.VolumeTailSenderRequest.SerializeToString,
                    response_deserializer=pb.VolumeTailSenderResponse.FromString,
                )
                try:
                    return len(list(tail(pb.VolumeTailSenderRequest(volume_id=1, idle_timeout_seconds=1)))) >= 16
                except grpc.RpcError as exc:
                    assert exc.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    return False

        assert wait_for(tails, 20), "no slot came back"
        assert bed.stop_server() == 0
