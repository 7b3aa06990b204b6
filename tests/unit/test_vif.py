"""Reading and writing .vif files (contract storage.md 6)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pyvolume.errors import DiskError, StorageError
from pyvolume.faults import set_points
from pyvolume.storage import vif
from pyvolume.storage.vif import EcShardConfig, RemoteFile, VolumeInfo

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "go-4.44"
BY_GO = sorted(path for path in GOLDEN.glob("*/data/*.vif") if not path.parent.parent.name.startswith("own-"))

FULL = VolumeInfo(
    files=[RemoteFile("s3", "default", 'k"ey\\\n\x01é', 1, 2, 3, ".dat"), RemoteFile()],
    version=3,
    replication="010",
    bytes_offset=5,
    dat_file_size=-1,
    expire_at_sec=(1 << 64) - 1,
    read_only=True,
    ec_shard_config=EcShardConfig(10, 4, 1700000000000000000),
    read_only_can_delete=True,
)


def parse(text: str) -> vif.VifResult:
    return vif.parse(text.encode())


@pytest.mark.parametrize("path", BY_GO, ids=lambda path: f"{path.parent.parent.name}/{path.name}")
def test_writes_what_go_wrote(path: Path) -> None:
    data = path.read_bytes()
    result = vif.parse(data)
    assert result.status == "ok"
    text = vif.render(result.info)
    assert text.replace(":  ", ": ") == data.decode().replace(":  ", ": ")


def test_golden_values() -> None:
    result = vif.load(str(GOLDEN / "v3-basic" / "data" / "1.vif"))
    assert result.status == "ok" and result.found and not result.has_remote_file
    assert result.info == VolumeInfo(version=3, bytes_offset=4)


def test_text_is_gos_to_the_byte() -> None:
    assert vif.render(VolumeInfo(version=3, bytes_offset=4)) == (
        "{\n"
        '  "files":  [],\n'
        '  "version":  3,\n'
        '  "replication":  "",\n'
        '  "bytesOffset":  4,\n'
        '  "datFileSize":  "0",\n'
        '  "expireAtSec":  "0",\n'
        '  "readOnly":  false,\n'
        '  "ecShardConfig":  null,\n'
        '  "readOnlyCanDelete":  false\n'
        "}"
    )


def test_round_trip_of_every_field() -> None:
    text = vif.render(FULL)
    assert vif.parse(text.encode()) == vif.VifResult(FULL, "ok")
    assert json.loads(text)["files"][0]["offset"] == "1"
    assert '    {\n      "backendType":  "s3",' in text
    assert '"encodeTsNs":  "1700000000000000000"\n  },' in text


def test_copy_is_deep() -> None:
    copy = FULL.copy()
    copy.files[0].key = "x"
    assert copy.ec_shard_config is not None
    copy.ec_shard_config.data_shards = 1
    assert FULL.files[0].key != "x"
    assert FULL.ec_shard_config is not None and FULL.ec_shard_config.data_shards == 10


def test_names_numbers_and_nulls_as_protojson_takes_them() -> None:
    text = """{"files": [{"backend_type": "s3", "backendId": "b", "file_size": 7, "modifiedTime": "8"}],
      "version": "2", "bytes_offset": 5.0, "dat_file_size": 12, "expire_at_sec": 1e3, "read_only": true,
      "replication": null, "ec_shard_config": {"data_shards": 9, "encode_ts_ns": "-5"},
      "read_only_can_delete": false}"""
    result = parse(text)
    assert result.status == "ok", result.error
    info = result.info
    assert info.files == [RemoteFile("s3", "b", file_size=7, modified_time=8)]
    assert info.files[0].backend_name == "s3.b"
    assert (info.version, info.bytes_offset, info.dat_file_size, info.expire_at_sec) == (2, 5, 12, 1000)
    assert info.read_only and info.replication == ""
    assert info.ec_shard_config == EcShardConfig(9, 0, -5)
    assert result.has_remote_file
    assert parse("{}").info == VolumeInfo()


@pytest.mark.parametrize(
    "member",
    [
        '"surprise": 1',
        '"version": -1',
        '"version": 4294967296',
        '"version": 1.5',
        '"version": true',
        '"version": "x"',
        '"version": " 1"',
        '"version": NaN',
        '"version": 1e999999999',
        '"version": 1e99999999999999999999',
        '"version": "1e-99999999999999999999"',
        '"datFileSize": ' + "1" * 5000,
        '"expireAtSec": -1',
        '"datFileSize": "9223372036854775808"',
        '"readOnly": "true"',
        '"readOnly": 1',
        '"replication": 1',
        '"replication": "\\ud800"',
        '"files": {}',
        '"files": [null]',
        '"files": [{"nope": 1}]',
        '"files": [{"key": 1}]',
        '"ecShardConfig": []',
        '"version": 3, "version": 3',
        '"bytesOffset": 4, "bytes_offset": 4',
        '"version": 3,',
        "version: 3",
        "'version': 3",
    ],
)
def test_what_protojson_refuses(member: str) -> None:
    result = parse("{" + member + "}")
    assert result.status == "unparsable"
    assert result.error.startswith("unmarshal error: ")
    assert result.found and not result.has_remote_file


@pytest.mark.parametrize("text", ["", " ", "[]", "3", '{"version": 3} x', '{"version": 3', "\ufeff{}", '{"a"', "{,}"])
def test_broken_texts(text: str) -> None:
    assert parse(text).status == "unparsable"
    assert vif.parse(b'{"version": 3, "replication": "\xff"}').status == "unparsable"


def test_deep_nesting_is_no_crash() -> None:
    assert parse('{"files": ' + "[" * 100_000).status == "unparsable"


def test_members_before_a_tear_are_kept() -> None:
    text = vif.render(VolumeInfo(version=3, bytes_offset=5, read_only=True))
    result = parse(text[: text.index('"ecShardConfig"') + 5])
    assert result.status == "unparsable"
    assert result.info.read_only and result.info.bytes_offset == 5


def test_old_schema() -> None:
    text = '{"files": [], "version": 2, "BytesOffset": 5, "DestroyTime": "99", "readOnly": true, "datFileSize": "7"}'
    result = parse(text)
    assert result.status == "old" and result.found
    assert result.info == VolumeInfo(version=2, bytes_offset=5, expire_at_sec=99, read_only=True, dat_file_size=7)
    assert parse('{"BytesOffset": 5, "surprise": 1}').status == "unparsable"


def test_load_of_missing_empty_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "3.vif"
    assert vif.load(str(path)) == vif.VifResult(VolumeInfo(), "missing")
    path.touch()
    empty = vif.load(str(path))
    assert empty.status == "empty" and not empty.found
    path.write_text("{}")
    path.chmod(0o200)
    unreadable = vif.load(str(path))
    assert unreadable.status == "unreadable" and unreadable.found
    assert unreadable.error == f"can not read {path}"
    directory = tmp_path / "4.vif"
    directory.mkdir()
    assert vif.load(str(directory)).status == "unreadable"
    huge = tmp_path / "5.vif"
    huge.write_bytes(b" " * (1 << 20) + b"{}")
    assert vif.load(str(huge)).status == "unparsable"


def test_save_sets_mode_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "3.vif"
    vif.save(str(path), FULL)
    assert path.stat().st_mode & 0o777 == 0o644 & ~_umask()
    assert vif.load(str(path)).info == FULL
    path.chmod(0o600)
    vif.save(str(path), VolumeInfo(version=3))
    assert path.stat().st_mode & 0o777 == 0o600
    assert vif.load(str(path)).info == VolumeInfo(version=3)
    assert [p.name for p in tmp_path.iterdir()] == ["3.vif"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_save_refuses_a_file_without_owner_write(tmp_path: Path) -> None:
    path = tmp_path / "3.vif"
    path.write_text("{}")
    path.chmod(0o444)
    with pytest.raises(StorageError) as caught:
        vif.save(str(path), FULL)
    assert str(caught.value) == f"failed to check {path} not writable"
    assert path.read_text() == "{}"


def test_save_into_nothing_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "none" / "3.vif"
    with pytest.raises(DiskError) as caught:
        vif.save(str(path), FULL)
    assert str(caught.value) == f"failed to write {path}: open {path}: no such file or directory"


@pytest.mark.parametrize("point", ["vif.write", "vif.rename"])
def test_failed_save_keeps_the_old_text(tmp_path: Path, point: str) -> None:
    path = tmp_path / "3.vif"
    vif.save(str(path), FULL)
    with set_points(f"{point}=error:ENOSPC"), pytest.raises(DiskError, match="no space left on device"):
        vif.save(str(path), VolumeInfo())
    assert vif.load(str(path)).info == FULL
    assert [p.name for p in tmp_path.iterdir()] == ["3.vif"]
