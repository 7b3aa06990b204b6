"""The protocol description: same descriptors as upstream's, importable modules."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from pyvolume.pb import master_pb2, remote_pb2, volume_server_pb2
from pyvolume.server.grpc.methods import OPEN_BUT_CHANGING, RPCS, Maintenance
from pyvolume.server.rpc import VOLUME_SERVICE

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ROOT / "tests" / "data" / "proto-4.44" / "shape.txt"
SCALARS = {
    1: "double",
    2: "float",
    3: "int64",
    4: "uint64",
    5: "int32",
    8: "bool",
    9: "string",
    12: "bytes",
    13: "uint32",
}
REPEATED = 3


def shape(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """Lines that say all of a file that matters on the wire and to reflection."""
    imports = " ".join(file.dependency) or "nothing"
    lines = [f"file {file.name} package {file.package} syntax {file.syntax} imports {imports}"]
    for message in file.message_type:
        lines += message_shape(message, file.package)
    for enum in file.enum_type:
        lines += enum_shape(enum, file.package)
    for service in file.service:
        for method in service.method:
            asks = ("stream " if method.client_streaming else "") + method.input_type.lstrip(".")
            answers = ("stream " if method.server_streaming else "") + method.output_type.lstrip(".")
            lines.append(f"rpc {file.package}.{service.name}.{method.name} {asks} -> {answers}")
    return lines


def message_shape(message: descriptor_pb2.DescriptorProto, scope: str) -> list[str]:
    name = f"{scope}.{message.name}"
    lines = [f"message {name}"]
    lines += [f"{name} reserved {span.start}-{span.end - 1}" for span in message.reserved_range]
    for field in message.field:
        kind = field.type_name.lstrip(".") if field.type_name else SCALARS[field.type]
        label = "repeated " if field.label == REPEATED else "optional " if field.proto3_optional else ""
        in_oneof = field.HasField("oneof_index") and not field.proto3_optional
        group = f" in {message.oneof_decl[field.oneof_index].name}" if in_oneof else ""
        lines.append(f"{name} {field.number} {label}{kind} {field.name}{group}")
    if message.options.map_entry:
        lines.append(f"{name} is a map entry")
    for nested in message.nested_type:
        lines += message_shape(nested, name)
    for enum in message.enum_type:
        lines += enum_shape(enum, name)
    return lines


def enum_shape(enum: descriptor_pb2.EnumDescriptorProto, scope: str) -> list[str]:
    return [f"enum {scope}.{enum.name} {value.number} {value.name}" for value in enum.value]


def test_descriptors_equal_upstreams() -> None:
    ours: list[str] = []
    for module in (remote_pb2, volume_server_pb2, master_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        ours += shape(file)
    theirs = [line for line in SHAPE.read_text().splitlines() if not line.startswith("#")]
    assert sorted(ours) == theirs


def test_digest_of_zero_is_sent() -> None:
    beat = master_pb2.Heartbeat(volume_digest=0)
    assert beat.HasField("volume_digest")
    assert master_pb2.Heartbeat.FromString(beat.SerializeToString()).HasField("volume_digest")
    assert not master_pb2.Heartbeat().HasField("volume_digest")


def load_generator() -> object:
    spec = importlib.util.spec_from_file_location("pyvolume_proto_generate", ROOT / "proto" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generator_writes_importable_modules(tmp_path: Path) -> None:
    generator = load_generator()
    package = tmp_path / "fresh" / "pb"
    assert not generator.is_current(package)  # type: ignore[attr-defined]
    written = generator.generate(package)  # type: ignore[attr-defined]
    assert {path.name for path in written} == {"__init__.py", "remote_pb2.py", "volume_server_pb2.py", "master_pb2.py"}
    assert {path.name for path in package.iterdir()} == {path.name for path in written}, "nothing is left behind"
    assert generator.is_current(package)  # type: ignore[attr-defined]
    (tmp_path / "fresh" / "__init__.py").touch()
    program = (
        "from fresh.pb import master_pb2 as m; "
        "print(m.Heartbeat.DESCRIPTOR.fields_by_name['state'].message_type.file.name)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "volume_server.proto"), done.stderr


def test_generator_leaves_current_output_alone(tmp_path: Path) -> None:
    generator = load_generator()
    generator.generate(tmp_path)  # type: ignore[attr-defined]
    before = (tmp_path / "master_pb2.py").stat().st_ino
    generator.generate(tmp_path, force=False)  # type: ignore[attr-defined]
    assert (tmp_path / "master_pb2.py").stat().st_ino == before
    (tmp_path / "remote_pb2.py").unlink()
    generator.generate(tmp_path, force=False)  # type: ignore[attr-defined]
    assert (tmp_path / "remote_pb2.py").exists()


def test_generator_reports_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator()
    source = tmp_path / "proto"
    source.mkdir()
    (source / "remote.proto").write_text('syntax = "proto3"; message {')
    monkeypatch.setattr(generator, "PROTO_DIR", source)
    monkeypatch.setattr(generator, "PROTO_FILES", ("remote.proto",))
    with pytest.raises(RuntimeError, match="protoc refused"):
        generator.generate(tmp_path / "out")  # type: ignore[attr-defined]
    assert not (tmp_path / "out" / "remote_pb2.py").exists()


# -- the gate matrix: contract/grpc.md 3 --------------------------------------------------------------------------

GUARDED = [
    "BatchDelete",
    "VacuumVolumeCompact",
    "VacuumVolumeCommit",
    "VacuumVolumeCleanup",
    "DeleteCollection",
    "AllocateVolume",
    "VolumeMount",
    "VolumeUnmount",
    "VolumeConsolidateIndex",
    "VolumeDelete",
    "VolumeMarkReadonly",
    "VolumeMarkWritable",
    "VolumeConfigure",
    "SetState",
    "VolumeCopy",
    "ReadAllNeedles",
    "VolumeTailReceiver",
    "VolumeEcShardsGenerate",
    "VolumeEcShardsRebuild",
    "VolumeEcShardsCopy",
    "VolumeEcShardsDelete",
    "VolumeEcShardsUnmount",
    "VolumeEcShardsToVolume",
    "VolumeTierMoveDatToRemote",
    "VolumeTierMoveDatFromRemote",
    "VolumeServerLeave",
    "FetchAndWriteNeedle",
    "ScrubVolume",
    "ScrubEcVolume",
    "VolumeNeedleStatus",
]
MAINTENANCE = [
    "BatchDelete",
    "VacuumVolumeCompact",
    "VacuumVolumeCommit",
    "VacuumVolumeCleanup",
    "AllocateVolume",
    "VolumeConsolidateIndex",
    "VolumeDelete",
    "VolumeConfigure",
    "VolumeCopy",
    "ReceiveFile",
    "WriteNeedleBlob",
    "VolumeEcShardsGenerate",
    "VolumeEcShardsRebuild",
    "VolumeEcShardsCopy",
    "VolumeEcShardsDelete",
    "VolumeEcBlobDelete",
    "VolumeEcShardsToVolume",
    "VolumeTierMoveDatToRemote",
    "FetchAndWriteNeedle",
]


def test_matrix_has_every_rpc() -> None:
    assert set(RPCS) == {method.name for method in VOLUME_SERVICE.methods}
    assert len(RPCS) == 49


def test_matrix_of_the_white_list() -> None:
    assert {rpc.name for rpc in RPCS.values() if rpc.guarded} == set(GUARDED)
    assert len(GUARDED) == 30


def test_matrix_of_the_maintenance_gate() -> None:
    assert {rpc.name for rpc in RPCS.values() if rpc.maintenance is Maintenance.FIRST} == set(MAINTENANCE)
    later = {rpc.name for rpc in RPCS.values() if rpc.maintenance is Maintenance.IN_HANDLER}
    assert later == {"VolumeMarkReadonly", "VolumeMarkWritable"}


def test_calls_that_change_something_but_stay_open() -> None:
    assert set(OPEN_BUT_CHANGING) == {"ReceiveFile", "WriteNeedleBlob", "VolumeEcBlobDelete", "VolumeEcShardsMount"}
