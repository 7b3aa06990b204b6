"""The metrics against scrapes of the Go server: names, help, types, labels, buckets, numbers (operations.md 4)."""

from __future__ import annotations

import gzip
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from prometheus_client.parser import text_string_to_metric_families

from pyvolume.config import DirConfig, ServerConfig
from pyvolume.server import metrics as metrics_module
from pyvolume.server.lifecycle import Process
from pyvolume.server.master_client import MasterConfiguration
from pyvolume.server.metric_types import Registry, exponential_buckets, number, protobuf_format, text_format
from pyvolume.server.metrics import MAX_METHODS, ServerMetrics
from pyvolume.server.side_http import PROTOBUF_TYPE, Pusher, SideServer, metrics_page, negotiate, side_pages
from pyvolume.storage.store import Store
from pyvolume.types import ReplicaPlacement, Ttl

GOLDEN = Path(__file__).parents[1] / "data" / "metrics"

OF_THE_FILER = "SeaweedFS_filer_handler_total"
"""Go's uploader counts repeated uploads on kept connections under the filer's name; nothing here does."""


class Family:
    """One family of an exposition."""

    def __init__(self) -> None:
        self.help = ""
        self.kind = ""
        self.series: dict[str, str] = {}


def parsed(text: str) -> dict[str, Family]:
    """Families in the order they stand; a series is keyed by its whole text but for the value."""
    out: dict[str, Family] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "#":
            what, name, value = rest.split(" ", 2)
            family = out.setdefault(name, Family())
            if what == "HELP":
                family.help = value
            else:
                family.kind = value
            continue
        series, _, value = line.rpartition(" ")
        bare = series.partition("{")[0]
        name = bare if bare in out else re.sub(r"_(bucket|sum|count)$", "", bare)
        out[name].series[series] = value
    return out


def golden(name: str) -> dict[str, Family]:
    families = parsed((GOLDEN / f"go-4.44-{name}.txt").read_text())
    families.pop(OF_THE_FILER, None)
    return families


def shown(metrics: ServerMetrics) -> dict[str, Family]:
    return parsed(text_format(metrics.registry.gather()).decode())


def config_for(*directories: str, **settings: Any) -> ServerConfig:
    dirs = tuple(DirConfig(directory, "", 20) for directory in directories)
    return ServerConfig(ip="127.0.0.1", bind_ip="127.0.0.1", masters=(), dirs=dirs, **settings)


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics(config_for())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(config_for(str(tmp_path)))
    store.load()
    yield store
    store.close()


# --- against Go ------------------------------------------------------------------------------------------------------


def test_a_fresh_server_shows_what_gos_does(store: Store, tmp_path: Path) -> None:
    metrics = ServerMetrics(config_for(str(tmp_path)))
    metrics.watch_store(store)
    ours = {name: family for name, family in shown(metrics).items() if not name.startswith("pyvolume_")}
    expected = golden("fresh")
    assert list(ours) == list(expected), "the same families in the same order"
    for name, family in expected.items():
        got = ours[name]
        assert (got.kind, got.help) == (family.kind, family.help), name
        assert list(got.series) == [series.replace('name="d"', f'name="{tmp_path}"') for series in family.series]
        if not name.startswith("process_") and name not in (
            "SeaweedFS_volumeServer_resource", "SeaweedFS_volumeServer_start_time_seconds",
        ):  # fmt: skip
            assert list(got.series.values()) == list(family.series.values()), name


@pytest.mark.parametrize("name", ["scrape", "cluster"])
def test_every_series_of_gos_can_be_made_and_looks_the_same(metrics: ServerMetrics, name: str) -> None:
    families = {family.name: family for family in metrics.registry.families()}
    for title, expected in golden(name).items():
        family = families[title]
        assert family.kind == expected.kind
        assert expected.help in ("", family.help)
        for series in expected.series:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', series))
            labels.pop("le", None)
            assert tuple(labels) == family.labels, series
            (family.distribution if family.kind == "histogram" else family.value)(*labels.values())
    ours = shown(metrics)
    for title, expected in golden(name).items():
        if title.startswith("process_"):
            continue
        assert list(ours[title].series) == list(expected.series), title


def test_families_that_no_scrape_has(metrics: ServerMetrics) -> None:
    metrics.ec_rebuilt(True, 3.0)
    metrics.upload_error(0)
    metrics.disconnections.value("127.0.0.1:9333").set(2)
    ours = shown(metrics)
    rebuilds = ours["SeaweedFS_volumeServer_ec_rebuild_seconds"]
    assert rebuilds.help == "Bucketed histogram of EC shard rebuild/reconstruct duration by result."
    assert next(iter(rebuilds.series)) == 'SeaweedFS_volumeServer_ec_rebuild_seconds_bucket{result="success",le="0.01"}'
    assert len(rebuilds.series) == 20 + 3
    assert ours["SeaweedFS_volumeServer_ec_rebuild_total"].series == {
        'SeaweedFS_volumeServer_ec_rebuild_total{result="success"}': "1"
    }
    assert ours["SeaweedFS_upload_error_total"].series == {'SeaweedFS_upload_error_total{code="0"}': "1"}
    gone = ours["SeaweedFS_volumeServer_master_disconnections"]
    assert (gone.kind, gone.series) == (
        "counter",
        {'SeaweedFS_volumeServer_master_disconnections{address="127.0.0.1:9333"}': "2"},
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (-1, "-1"), (0.36, "0.36"), (999999, "999999"), (1e6, "1e+06"), (1048576, "1.048576e+06"),
        (270553174016, "2.70553174016e+11"), (5.5905e-05, "5.5905e-05"), (0.0001, "0.0001"), (838.8608, "838.8608"),
        (123456.789, "123456.789"), (1234567.89, "1.23456789e+06"), (-0.00012, "-0.00012"), (1e100, "1e+100"),
        (1.8446744073709552e19, "1.8446744073709552e+19"), (float("inf"), "+Inf"), (float("-inf"), "-Inf"),
        (float("nan"), "NaN"), (1.795426335e09, "1.795426335e+09"), (0.000454307, "0.000454307"),
    ],
)  # fmt: skip
def test_numbers_are_gos(value: float, text: str) -> None:
    assert number(value) == text


def test_every_number_in_the_scrapes_is_written_as_it_was_read() -> None:
    for name in ("scrape", "cluster", "fresh"):
        for family in golden(name).values():
            for text in family.series.values():
                assert number(float(text)) == text


def test_texts_are_escaped() -> None:
    registry = Registry()
    registry.gauge("g", 'help "x" \\ and\nmore', "a", "b").value('q"uote', "back\\slash\nnewline").set(1.5)
    text = text_format(registry.gather()).decode()
    assert text == (
        '# HELP g help "x" \\\\ and\\nmore\n# TYPE g gauge\ng{a="q\\"uote",b="back\\\\slash\\nnewline"} 1.5\n'
    )
    (family,) = text_string_to_metric_families(text)
    assert family.samples[0].labels == {"a": 'q"uote', "b": "back\\slash\nnewline"}


def test_another_implementation_reads_all_of_it(metrics: ServerMetrics) -> None:
    metrics.request_ended("GET", 200, 0.003)
    families = {f.name: f for f in text_string_to_metric_families(text_format(metrics.registry.gather()).decode())}
    seconds = families["SeaweedFS_volumeServer_request_seconds"]
    buckets = {s.labels["le"]: s.value for s in seconds.samples if s.name.endswith("_bucket")}
    assert (buckets["0.0016"], buckets["0.0032"], buckets["+Inf"]) == (0, 1, 1)


# --- counting --------------------------------------------------------------------------------------------------------


def test_upper_bounds_belong_to_their_buckets() -> None:
    registry = Registry()
    child = registry.histogram("h", "", (1.0, 2.0)).distribution()
    for value in (1, 1.5, 2, 2.5):
        child.observe(value)
    assert child.read() == ([1, 3, 4], 7.0)
    assert exponential_buckets(0.01, 2, 3) == (0.01, 0.02, 0.04)


def test_no_count_is_lost_between_threads(metrics: ServerMetrics) -> None:
    def work() -> None:
        for _ in range(2000):
            metrics.request_begins("GET")
            metrics.request_ended("GET", 200, 0.001)
            metrics.in_flight_ended("GET")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours = shown(metrics)
    assert ours["SeaweedFS_volumeServer_request_total"].series == {
        'SeaweedFS_volumeServer_request_total{code="200",type="GET"}': "16000"
    }
    assert ours["SeaweedFS_volumeServer_in_flight_requests"].series == {
        'SeaweedFS_volumeServer_in_flight_requests{type="GET"}': "0"
    }
    count = 'SeaweedFS_volumeServer_request_seconds_count{type="GET"}'
    assert ours["SeaweedFS_volumeServer_request_seconds"].series[count] == "16000"


def test_clients_cannot_make_series_without_end(metrics: ServerMetrics) -> None:
    for index in range(MAX_METHODS * 3):
        method = f"METHOD{index}"
        metrics.request_begins(method)
        metrics.in_flight_ended(method)
        metrics.request_ended(method, 400, 0.0)
    ours = shown(metrics)
    assert len(ours["SeaweedFS_volumeServer_request_total"].series) <= MAX_METHODS + 1
    flights = ours["SeaweedFS_volumeServer_in_flight_requests"].series
    assert len(flights) <= MAX_METHODS + 1
    assert set(flights.values()) == {"0"}


def test_writes_in_flight_are_seen_and_end(metrics: ServerMetrics) -> None:
    metrics.local_write_begins()
    metrics.replica_writes_begin()
    flights = shown(metrics)["SeaweedFS_volumeServer_in_flight_requests"].series
    assert sorted(flights.values()) == ["1", "1"]
    metrics.local_write(0.1)
    metrics.replica_writes(0.1)
    ours = shown(metrics)
    assert set(ours["SeaweedFS_volumeServer_in_flight_requests"].series.values()) == {"0"}
    assert 'SeaweedFS_volumeServer_request_seconds_count{type="writeToReplicas"}' in (
        ours["SeaweedFS_volumeServer_request_seconds"].series
    )


def test_replication(metrics: ServerMetrics) -> None:
    metrics.replicated("write", 0)
    metrics.replicated("write", 2)
    metrics.replication_ended("write", False, 0.2)
    metrics.replication_failed("write", "connection_refused")
    ours = shown(metrics)
    targets = ours["SeaweedFS_volumeServer_replication_targets"].series
    assert [value for series, value in targets.items()] == ["1", "2", "2", "2", "2", "2", "2", "2"]
    assert ours["SeaweedFS_volumeServer_replication_operations_total"].series == {
        'SeaweedFS_volumeServer_replication_operations_total{operation="write",result="failure"}': "1"
    }
    assert ours["SeaweedFS_volumeServer_replication_failures_total"].series == {
        'SeaweedFS_volumeServer_replication_failures_total{operation="write",reason="connection_refused"}': "1"
    }


def test_calls_by_grpc(metrics: ServerMetrics) -> None:
    from pyvolume.pb import volume_server_pb2 as pb

    metrics.rpc_ended("VacuumVolumeCompact", None, None, True, 0.01)
    metrics.rpc_ended("VacuumVolumeCommit", None, None, False, 0.01)
    metrics.rpc_ended("ReadNeedleBlob", None, None, False, 0.01)
    metrics.rpc_ended("ReadNeedleBlob", None, object(), True, 0.01)
    metrics.rpc_ended("WriteNeedleBlob", None, None, False, 0.01)
    scrub = pb.ScrubVolumeRequest(mode=pb.VolumeScrubMode.FULL)
    metrics.rpc_ended("ScrubVolume", scrub, pb.ScrubVolumeResponse(broken_volume_ids=[3, 4]), True, 1.0)
    shards = pb.ScrubEcVolumeRequest(mode=pb.VolumeScrubMode.LOCAL)
    metrics.rpc_ended("ScrubEcVolume", shards, pb.ScrubEcVolumeResponse(), True, 1.0)
    ours = shown(metrics)
    p = "SeaweedFS_volumeServer_"
    assert ours[p + "vacuuming_compact_count"].series == {p + 'vacuuming_compact_count{success="true"}': "1"}
    assert ours[p + "vacuuming_commit_count"].series == {p + 'vacuuming_commit_count{success="false"}': "1"}
    assert p + 'vacuuming_seconds_count{type="compact"}' in ours[p + "vacuuming_seconds"].series
    assert ours[p + "file_read_failures"].series == {p + "file_read_failures": "1"}
    assert ours[p + "file_write_failures"].series == {p + "file_write_failures": "1"}
    assert ours[p + "scrub_volume_failures"].series == {
        p + 'scrub_volume_failures{mode="FULL"}': "2",
        p + 'scrub_volume_failures{mode="LOCAL"}': "0",
    }
    assert ours[p + "scrub_shard_failures"].series == {p + 'scrub_shard_failures{mode="LOCAL"}': "0"}
    calls = ours["pyvolume_grpc_calls_total"].series
    assert calls['pyvolume_grpc_calls_total{method="ReadNeedleBlob",result="failed"}'] == "1"


# --- figures of the store --------------------------------------------------------------------------------------------


def allocate(store: Store, vid: int, collection: str) -> None:
    none = ReplicaPlacement.parse("000")
    store.allocate_volume(vid, collection, none, Ttl.NONE, preallocate=0, disk_type="", version=3)


def test_volumes_by_collection(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "STORE_REFRESH_S", 0.0)
    metrics = ServerMetrics(config_for(str(tmp_path)))
    metrics.watch_store(store)
    for vid, collection in ((1, ""), (2, "pics"), (3, "pics")):
        allocate(store, vid, collection)
    store.mark_readonly(3, can_delete=True, persist=False)
    p = "SeaweedFS_volumeServer_"
    ours = shown(metrics)
    assert ours[p + "volumes"].series == {
        p + 'volumes{collection="",type="volume"}': "1",
        p + 'volumes{collection="pics",type="volume"}': "2",
    }
    marks = ours[p + "read_only_volumes"].series
    assert [series.rpartition("{")[2] for series in marks][4:] == [
        'collection="pics",type="IsReadOnly"}',
        'collection="pics",type="isDiskSpaceLow"}',
        'collection="pics",type="noWriteCanDelete"}',
        'collection="pics",type="noWriteOrDelete"}',
    ]
    assert list(marks.values()) == ["0", "0", "0", "0", "1", "0", "1", "0"]
    assert ours[p + "total_disk_size"].series[p + 'total_disk_size{collection="pics",type="normal"}'] == "16"
    assert ours[p + "max_volumes"].series == {p + "max_volumes": "20"}
    assert set(ours[p + "resource"].series) == {
        p + f'resource{{name="{tmp_path}",type="{kind}"}}' for kind in ("all", "avail", "free", "used")
    }

    store.delete_volume(1)
    ours = shown(metrics)
    assert ours[p + "volumes"].series[p + 'volumes{collection="",type="volume"}'] == "0", "a series stays"
    assert not any('collection=""' in series for series in ours[p + "total_disk_size"].series)
    assert not any('collection=""' in series for series in ours[p + "read_only_volumes"].series)

    store.delete_collection("pics")
    metrics.rpc_ended("DeleteCollection", SimpleNamespace(collection="pics"), object(), True, 0.1)
    ours = shown(metrics)
    assert list(ours[p + "volumes"].series) == [p + 'volumes{collection="",type="volume"}']
    assert p + "total_disk_size" not in ours


def test_shards_by_collection(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {number: SimpleNamespace(size=1000 + number) for number in range(3)}
    monkeypatch.setattr(store.ec, "volumes", lambda: [SimpleNamespace(collection="pics", shards=shards)])
    metrics = ServerMetrics(config_for(str(tmp_path)))
    metrics.watch_store(store)
    p = "SeaweedFS_volumeServer_"
    ours = shown(metrics)
    assert ours[p + "volumes"].series == {p + 'volumes{collection="pics",type="ec_shards"}': "3"}
    assert ours[p + "total_disk_size"].series == {p + 'total_disk_size{collection="pics",type="ec"}': "3003"}


# --- formats on the wire ---------------------------------------------------------------------------------------------


def metric_family_class() -> Any:
    """io.prometheus.client.MetricFamily, described here on its own: what is written must be readable by others."""
    file = descriptor_pb2.FileDescriptorProto(name="metrics_of_test.proto", package="io.prometheus.client")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, str, bool]) -> None:
        out = file.message_type.add(name=name)
        for title, tag, kind, type_name, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            out.field.add(name=title, number=tag, type=kind, type_name=type_name or None, label=label)

    package = ".io.prometheus.client."
    text, double, u64 = kinds.TYPE_STRING, kinds.TYPE_DOUBLE, kinds.TYPE_UINT64
    nested, i64, i32 = kinds.TYPE_MESSAGE, kinds.TYPE_INT64, kinds.TYPE_INT32
    message("LabelPair", ("name", 1, text, "", False), ("value", 2, text, "", False))
    message("Time", ("seconds", 1, i64, "", False), ("nanos", 2, i32, "", False))
    message("Gauge", ("value", 1, double, "", False))
    message("Counter", ("value", 1, double, "", False), ("created", 3, nested, package + "Time", False))
    message("Bucket", ("cumulative_count", 1, u64, "", False), ("upper_bound", 2, double, "", False))
    message(
        "Histogram",
        ("sample_count", 1, u64, "", False),
        ("sample_sum", 2, double, "", False),
        ("bucket", 3, nested, package + "Bucket", True),
        ("created", 15, nested, package + "Time", False),
    )
    message(
        "Metric",
        ("label", 1, nested, package + "LabelPair", True),
        ("gauge", 2, nested, package + "Gauge", False),
        ("counter", 3, nested, package + "Counter", False),
        ("histogram", 7, nested, package + "Histogram", False),
    )
    message(
        "MetricFamily",
        ("name", 1, text, "", False),
        ("help", 2, text, "", False),
        ("type", 3, i32, "", False),
        ("metric", 4, nested, package + "Metric", True),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("io.prometheus.client.MetricFamily"))


def delimited(data: bytes) -> list[Any]:
    kind, out, at = metric_family_class(), [], 0
    while at < len(data):
        length = shift = 0
        while True:
            byte = data[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        out.append(kind.FromString(data[at : at + length]))
        at += length
    return out


def test_protobuf_says_the_same_as_text(metrics: ServerMetrics) -> None:
    metrics.request_ended("GET", 404, 0.003)
    snapshots = metrics.registry.gather()
    families = delimited(protobuf_format(snapshots))
    assert [family.name for family in families] == [snapshot.name for snapshot in snapshots]
    assert [family.help for family in families] == [snapshot.help for snapshot in snapshots]
    by_name = {family.name: family for family in families}
    total = by_name["SeaweedFS_volumeServer_request_total"]
    assert (total.type, total.metric[0].counter.value) == (0, 1)
    assert [(pair.name, pair.value) for pair in total.metric[0].label] == [("code", "404"), ("type", "GET")]
    assert abs(total.metric[0].counter.created.seconds - time.time()) < 60
    histogram = by_name["SeaweedFS_volumeServer_request_seconds"].metric[0].histogram
    assert by_name["SeaweedFS_volumeServer_request_seconds"].type == 4
    assert (histogram.sample_count, histogram.sample_sum, len(histogram.bucket)) == (1, 0.003, 24)
    assert [bucket.cumulative_count for bucket in histogram.bucket[4:6]] == [0, 1]
    assert by_name["SeaweedFS_build_info"].type == 1


def test_a_gauge_has_the_bytes_that_go_sends() -> None:
    registry = Registry()
    registry.gauge("SeaweedFS_volumeServer_max_volumes", "Maximum number of volumes.").value().set(20)
    recorded = (
        b'O\n"SeaweedFS_volumeServer_max_volumes\x12\x1aMaximum number of volumes.\x18\x01"\x0b\x12\t\t'
        + struct.pack("<d", 20)
    )
    assert protobuf_format(registry.gather()) == recorded


@pytest.mark.parametrize(
    ("accept", "protobuf", "escaping"),
    [
        ("", False, "underscores"),
        ("*/*", False, "underscores"),
        ("application/openmetrics-text", False, "underscores"),
        (PROTOBUF_TYPE, True, "underscores"),
        (f"{PROTOBUF_TYPE};q=0.5,text/plain;version=0.0.4;q=0.9", False, "underscores"),
        (f"{PROTOBUF_TYPE};escaping=allow-utf-8;q=0.9,*/*;q=0.1", True, "allow-utf-8"),
        ("application/vnd.google.protobuf", False, "underscores"),
    ],
)
def test_which_format_is_sent(accept: str, protobuf: bool, escaping: str) -> None:
    got, kind = negotiate(accept)
    assert got is protobuf
    assert kind.endswith(f"; escaping={escaping}")
    assert kind.startswith(PROTOBUF_TYPE if protobuf else "text/plain; version=0.0.4; charset=utf-8")


def test_only_the_named_families(metrics: ServerMetrics) -> None:
    page = metrics_page(metrics.registry, "name[]=SeaweedFS_build_info&name[]=nothing", {})
    assert list(parsed(page.body.decode())) == ["SeaweedFS_build_info"]
    assert metrics_page(metrics.registry, "name[]=nothing", {}).body == b""


# --- listener --------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener(metrics: ServerMetrics) -> Iterator[SideServer]:
    server = SideServer("127.0.0.1", 0, side_pages(metrics.registry), "test-metrics")
    server.start()
    yield server
    server.stop()


def ask(server: SideServer, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_metrics_for_any_method(listener: SideServer, method: str) -> None:
    status, headers, body = ask(listener, method, "/metrics")
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"
    assert b"SeaweedFS_build_info{" in body


def test_head_has_no_body(listener: SideServer) -> None:
    status, _, body = ask(listener, "HEAD", "/metrics")
    assert (status, body) == (200, b"")


def test_gzip_when_asked(listener: SideServer) -> None:
    _, headers, body = ask(listener, "GET", "/metrics", **{"accept-encoding": "deflate, gzip"})
    assert headers["content-encoding"] == "gzip"
    assert b"SeaweedFS_build_info{" in gzip.decompress(body)


def test_other_paths_of_the_listener(listener: SideServer) -> None:
    status, headers, body = ask(listener, "GET", "/")
    assert (status, body, headers["x-content-type-options"]) == (404, b"404 page not found\n", "nosniff")
    assert b"http-test" not in body
    assert ask(listener, "GET", "/debug/pprof/")[0] == 200
    assert b'"cmdline"' in ask(listener, "GET", "/debug/vars")[2]


def test_a_bad_request_does_not_stop_the_listener(listener: SideServer) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), 10) as sock:
        sock.sendall(b"\x00\x01 nonsense\r\n\r\n")
        sock.recv(100)
    assert ask(listener, "GET", "/metrics")[0] == 200


# --- push ------------------------------------------------------------------------------------------------------------


class Gateway(HTTPServer):
    """Stands for a push gateway: keeps what it gets, answers with the statuses it was given, then 202."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, str, bytes]] = []
        self.statuses: list[int] = []
        super().__init__(("127.0.0.1", 0), GatewayHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class GatewayHandler(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.command, self.path, self.headers["Content-Type"], body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    yield server
    server.shutdown()
    server.server_close()


def test_push_is_gos(metrics: ServerMetrics, gateway: Gateway) -> None:
    Pusher(metrics.registry, gateway.address, 15, "10.0.0.5:8080").push()
    ((method, path, kind, body),) = gateway.got
    assert (method, path) == ("PUT", "/metrics/job/volumeServer/instance/10.0.0.5%3A8080")
    assert kind == PROTOBUF_TYPE
    assert "SeaweedFS_build_info" in [family.name for family in delimited(body)]


def test_push_goes_on_when_the_gateway_fails(
    metrics: ServerMetrics, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.statuses = [500]
    pusher = Pusher(metrics.registry, gateway.address, 0.01, "h:1")
    stop = threading.Event()
    with caplog.at_level("INFO"):
        thread = threading.Thread(target=pusher.run, args=(stop,))
        thread.start()
        end = time.monotonic() + 20
        while len(gateway.got) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        stop.set()
        thread.join(10)
    assert len(gateway.got) >= 3
    assert (
        f"could not push metrics to prometheus push gateway {gateway.address}: unexpected status code 500 while "
        f"pushing to http://{gateway.address}/metrics/job/volumeServer/instance/h%3A1: "
    ) in caplog.text


def test_the_masters_configuration_starts_the_push(
    metrics: ServerMetrics, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    process = Process(SimpleNamespace(), SimpleNamespace(), {})  # type: ignore[arg-type]
    process._metrics = metrics
    process.context = SimpleNamespace(config=config_for(), awaiting_master=True)  # type: ignore[assignment]
    process._apply_master(MasterConfiguration(metrics_address=gateway.address, metrics_interval_s=0))
    process._apply_master(MasterConfiguration(metrics_address="", metrics_interval_s=15))
    process._apply_master(MasterConfiguration(metrics_address=gateway.address, metrics_interval_s=-1))
    with caplog.at_level("INFO"):
        process._apply_master(MasterConfiguration(metrics_address=gateway.address, metrics_interval_s=15))
    end = time.monotonic() + 20
    while not gateway.got and time.monotonic() < end:
        time.sleep(0.01)
    process._quit.set()
    assert [path for _, path, _, _ in gateway.got] == ["/metrics/job/volumeServer/instance/127.0.0.1%3A8080"]
    assert f"volumeServer server sends metrics to {gateway.address} every 15 seconds" in caplog.text


# --- history ---------------------------------------------------------------------------------------------------------


def test_history_tells_rates_and_latencies(metrics: ServerMetrics) -> None:
    metrics.history.sample()
    for _ in range(100):
        metrics.request_ended("GET", 200, 0.00015)
    metrics.request_ended("PUT", 201, 0.3)
    metrics.history.sample()
    metrics.history.sample()
    quiet, busy, after = metrics.history.points()
    assert (quiet["reads"]["rate"], quiet["reads"]["p50_ms"]) == (0, None)
    assert busy["reads"]["rate"] > 0
    assert 0.1 < busy["reads"]["p50_ms"] <= busy["reads"]["p99_ms"] <= 0.2
    assert 204.8 < busy["writes"]["p99_ms"] <= 409.6
    assert after["reads"]["rate"] == 0


def test_history_counts_what_is_counted_elsewhere_but_looks_at_no_state(metrics: ServerMetrics) -> None:
    looked: list[str] = []
    metrics.registry.refresh_with(lambda: metrics.request_ended("GET", 200, 0.001))
    metrics.registry.refresh_with(lambda: looked.append("volumes"), is_slow=True)
    metrics.history.sample()
    assert metrics.history.points()[0]["reads"]["rate"] > 0
    assert not looked
    metrics.registry.gather()
    assert looked == ["volumes"]
