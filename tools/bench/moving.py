"""The table of copying: one volume server pulls a volume from another, by CopyFile (VolumeCopy) and by following it
(VolumeTailReceiver). The puller is the reference server where there is one, so that only the source differs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench import storage
from tools.bench.storage import CALL_LIMIT_S, VID, Made, Turn, channel_of, fresh_copy, in_turns, make_volume, median
from tools.bench.targets import HOST, Target, pyvolume_command, references

if TYPE_CHECKING:
    from tools.bench.__main__ import Bench

VOLUME_BYTES = 1 << 30
OBJECTS = ((1 << 20, "1 MiB"), (64 << 10, "64 KiB"), (4 << 10, "4 KiB"))


def copying(bench: Bench) -> None:
    """Seconds until the last byte of a 1 GiB volume is at the puller; CPU of the source."""
    puller_name, command = next(iter(references()), ("pyvolume", pyvolume_command()))
    bench.say(f"\n## A volume of {VOLUME_BYTES >> 30} GiB pulled by {puller_name}\n")
    bench.say("| how | objects | source | s | MiB/s | CPU s of the source | pyvolume's share of the time |")
    bench.say("|---|--:|---|--:|--:|--:|--:|")
    for size, label in OBJECTS:
        made = make_volume(bench, VOLUME_BYTES // size, "rising", (size, size))
        for how in ("VolumeCopy", "VolumeTailReceiver"):
            rows = in_turns(bench, lambda t, m=made, h=how: _pull(bench, t, command, m, h))
            own = median(rows["pyvolume"], "seconds")
            for name, turns in rows.items():
                took = median(turns, "seconds")
                bench.say(
                    f"| {how} | {label} | {name} | {took:.2f} | {made.dat_bytes / took / (1 << 20):,.0f} "
                    f"| {median(turns, 'cpu_s'):.2f} | {own / took:.2f} |"
                )
        shutil.rmtree(made.directory)


def _pull(bench: Bench, source: Target, command: list[str], made: Made, how: str) -> Turn:
    puller = bench.target("puller", command)
    room = bench.base / "pulled"
    room.mkdir()
    try:
        source.start(fresh_copy(bench, made))
        puller.start(room)
        storage.wait_for_needle(source, made, time.monotonic())
        return _timed(source, puller, room, made, how)
    finally:
        puller.stop()
        shutil.rmtree(room, ignore_errors=True)


def _timed(source: Target, puller: Target, room: Path, made: Made, how: str) -> Turn:
    import grpc

    from pyvolume.pb import volume_server_pb2 as pb
    from tools.compat.bed import unary_call

    node = f"{HOST}:{source.port}.{source.grpc_port}"
    with channel_of(puller) as channel:
        grpc.channel_ready_future(channel).result(30)
        if how == "VolumeCopy":
            copy = channel.unary_stream(
                "/volume_server_pb.VolumeServer/VolumeCopy",
                request_serializer=pb.VolumeCopyRequest.SerializeToString,
                response_deserializer=pb.VolumeCopyResponse.FromString,
            )
            cpu, began = source.cpu_s(), time.monotonic()
            for _ in copy(pb.VolumeCopyRequest(volume_id=VID, source_data_node=node), timeout=CALL_LIMIT_S):
                pass
            return Turn(time.monotonic() - began, source.cpu_s() - cpu)
        unary_call(channel, "AllocateVolume", volume_id=VID, replication="000", version=3)
        follow = channel.unary_unary(
            "/volume_server_pb.VolumeServer/VolumeTailReceiver",
            request_serializer=pb.VolumeTailReceiverRequest.SerializeToString,
            response_deserializer=pb.VolumeTailReceiverResponse.FromString,
        )
        cpu, began = source.cpu_s(), time.monotonic()
        call = follow.future(
            pb.VolumeTailReceiverRequest(volume_id=VID, idle_timeout_seconds=1, source_volume_server=node),
            timeout=CALL_LIMIT_S,
        )
        data = room / f"{VID}.dat"
        while data.stat().st_size < made.dat_bytes:
            if call.done() or time.monotonic() - began > CALL_LIMIT_S:
                raise RuntimeError(f"{source.name}: {data.stat().st_size} of {made.dat_bytes} bytes came")
            time.sleep(0.005)
        turn = Turn(time.monotonic() - began, source.cpu_s() - cpu)
        call.result()
        return turn
