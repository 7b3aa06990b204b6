"""The gRPC side of the development master, and the growing of volumes.

Imports the leaves, pyvolume.pb and its own package only. Calls beyond its few methods answer UNIMPLEMENTED.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import message_factory

from pyvolume.devmaster.topology import VOLUME_VERSION, VOLUMES_PER_GROWTH, MasterError, Node, Topology, Wish
from pyvolume.pb import master_pb2, volume_server_pb2

log = logging.getLogger(__name__)

MAX_SERVERS = 64
"""Heartbeat streams at once; each holds a thread."""
UNARY_THREADS = 32
CALL_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 1 << 30

_SERVICE = master_pb2.DESCRIPTOR.services_by_name["Seaweed"]
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
)


class Master:
    """What HTTP and gRPC share: the topology, and calls to volume servers."""

    def __init__(self, topology: Topology, *, default_replication: str, address: Callable[[], str]) -> None:
        self.topology = topology
        self.default_replication = default_replication
        self.address = address
        self._growing = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}
        self._channels_lock = threading.Lock()

    def assign(self, count: int, wish: Wish, volume_count: int = 0) -> Any:
        """An assignment, with volumes made first when there are none. Raises MasterError."""
        try:
            return self.topology.pick(count, wish)
        except MasterError as exc:
            if exc.out_of_space:
                raise
        with self._growing:
            try:
                return self.topology.pick(count, wish)  # somebody else may have made some meanwhile
            except MasterError as exc:
                if exc.out_of_space:
                    raise
            self._grow(volume_count or VOLUMES_PER_GROWTH.get(wish.replication.copy_count, 1), wish)
        return self.topology.pick(count, wish)

    def grow(self, count: int, wish: Wish) -> int:
        """Makes up to count volumes; the number made. Raises MasterError when not one could be."""
        with self._growing:
            return self._grow(count, wish)

    def _grow(self, count: int, wish: Wish) -> int:
        made = 0
        for _ in range(count):
            try:
                self._make_volume(wish)
            except MasterError:
                if not made:
                    raise
                break
            made += 1
        return made

    def _make_volume(self, wish: Wish) -> None:
        vid, nodes = self.topology.plan(wish)
        made: list[Node] = []
        try:
            for node in nodes:
                self._allocate(node, vid, wish)
                made.append(node)
        except MasterError:
            for node in made:
                self._call_quietly(node, "VolumeDelete", volume_server_pb2.VolumeDeleteRequest(volume_id=vid))
            self.topology.settle(wish, vid, nodes, made=False)
            raise
        self.topology.settle(wish, vid, nodes, made=True)
        log.info("made volume %d on %s", vid, ", ".join(node.url for node in nodes))

    def _allocate(self, node: Node, vid: int, wish: Wish) -> None:
        request = volume_server_pb2.AllocateVolumeRequest(
            volume_id=vid,
            collection=wish.collection,
            replication=str(wish.replication),
            ttl=str(wish.ttl),
            preallocate=wish.preallocate,
            memory_map_max_size_mb=wish.memory_map_max_mb,
            disk_type=wish.disk_type,
            version=VOLUME_VERSION,
        )
        self.call(node, "AllocateVolume", request)

    def delete_collection(self, collection: str) -> bool:
        """Has all servers delete it; false when nobody holds anything of it. Raises MasterError."""
        nodes = self.topology.nodes_of_collection(collection)
        for node in nodes:
            self.call(node, "DeleteCollection", volume_server_pb2.DeleteCollectionRequest(collection=collection))
        self.topology.forget_collection(collection)
        return bool(nodes)

    def call(self, node: Node, name: str, request: Any) -> Any:
        """A unary call to a volume server. Raises MasterError."""
        service = volume_server_pb2.DESCRIPTOR.services_by_name["VolumeServer"]
        response_class = message_factory.GetMessageClass(service.methods_by_name[name].output_type)
        method = self._channel(node).unary_unary(
            f"/{service.full_name}/{name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_class.FromString,
        )
        try:
            return method(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as exc:
            details = exc.details() if isinstance(exc, grpc.Call) else str(exc)
            raise MasterError(f"{name} on {node.url}: {details}") from exc

    def _call_quietly(self, node: Node, name: str, request: Any) -> None:
        try:
            self.call(node, name, request)
        except MasterError as exc:
            log.warning("%s", exc)

    def _channel(self, node: Node) -> grpc.Channel:
        host = f"[{node.ip}]" if ":" in node.ip else node.ip
        target = f"{host}:{node.grpc_port or node.port + 10000}"
        with self._channels_lock:
            channel = self._channels.get(target)
            if channel is None:
                channel = self._channels[target] = grpc.insecure_channel(target, options=_OPTIONS)
            return channel

    def close(self) -> None:
        with self._channels_lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()


def location_of(node: Node) -> Any:
    """A server as the messages name it."""
    return master_pb2.Location(
        url=node.url, public_url=node.public_url, grpc_port=node.grpc_port, data_center=node.data_center
    )


class Service:
    """The methods; each is registered under its RPC's name by make_server."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._topology = master.topology

    def methods(self) -> Mapping[str, Callable[[Any, grpc.ServicerContext], Any]]:
        """RPC name → behaviour."""
        return {
            "SendHeartbeat": self.send_heartbeat,
            "GetMasterConfiguration": self.get_master_configuration,
            "LookupVolume": self.lookup_volume,
            "LookupEcVolume": self.lookup_ec_volume,
            "Assign": self.assign,
            "VolumeMarkReadonly": self.volume_mark_readonly,
            "Ping": self.ping,
        }

    def send_heartbeat(self, beats: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """One volume server, for as long as its stream is open."""
        node: Node | None = None
        try:
            for beat in beats:
                if node is None:
                    if not beat.ip:
                        continue
                    node, duplicates = self._topology.register(beat)
                    if node is None:
                        log.warning("%s:%d serves directories of another server: %s", beat.ip, beat.port, duplicates)
                        yield master_pb2.HeartbeatResponse(duplicated_uuids=duplicates)
                        context.abort(grpc.StatusCode.UNKNOWN, "volume: Duplicated volume directories were loaded")
                        return
                    log.info("added volume server %s", node.id)
                    self._topology.apply(node, beat)
                    yield self._orders(volume_digest_supported=True)
                elif self._topology.apply(node, beat):
                    log.info("volume server %s holds other volumes than reported: asking for all", node.id)
                    yield self._orders(resend_full_volume_list=True)
        finally:
            if node is not None:
                self._topology.unregister(node)
                log.info("removed volume server %s", node.id)

    def _orders(self, **flags: bool) -> Any:
        return master_pb2.HeartbeatResponse(volume_size_limit=self._topology.volume_size_limit_bytes, **flags)

    def get_master_configuration(self, request: Any, context: grpc.ServicerContext) -> Any:
        return master_pb2.GetMasterConfigurationResponse(
            default_replication=self._master.default_replication,
            leader=self._master.address(),
            volume_size_limit_m_b=self._topology.volume_size_limit_bytes >> 20,
        )

    def lookup_volume(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = master_pb2.LookupVolumeResponse()
        for asked in request.volume_or_file_ids:
            vid_text = asked.partition(",")[0] if not asked.startswith(",") else asked
            entry = answer.volume_id_locations.add(volume_or_file_id=vid_text)
            if not (vid_text.isascii() and vid_text.isdigit()):
                entry.error = f"Unknown volume id {vid_text}"
                continue
            nodes = self._topology.lookup(int(vid_text), request.collection)
            entry.locations.extend(map(location_of, nodes))
            if not nodes:
                entry.error = f"volume id {vid_text} not found"
        return answer

    def lookup_ec_volume(self, request: Any, context: grpc.ServicerContext) -> Any:
        shards = self._topology.lookup_ec(request.volume_id)
        if not shards:
            context.abort(grpc.StatusCode.UNKNOWN, f"ec volume {request.volume_id} not found")
        answer = master_pb2.LookupEcVolumeResponse(volume_id=request.volume_id)
        for shard, nodes in sorted(shards.items()):
            answer.shard_id_locations.add(shard_id=shard, locations=map(location_of, nodes))
        return answer

    def assign(self, request: Any, context: grpc.ServicerContext) -> Any:
        values = {
            "collection": request.collection,
            "replication": request.replication,
            "ttl": request.ttl,
            "disk": request.disk_type,
            "dataCenter": request.data_center,
            "rack": request.rack,
            "dataNode": request.data_node,
        }
        try:
            wish = Wish.parse(values, self._master.default_replication)
            found = self._master.assign(max(1, request.count), wish, request.writable_volume_count)
        except MasterError as exc:
            context.abort(grpc.StatusCode.UNKNOWN, str(exc))
        first, *others = map(location_of, found.nodes)
        return master_pb2.AssignResponse(fid=found.fid, count=found.count, location=first, replicas=others)

    def volume_mark_readonly(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._topology.mark(request.ip, request.port, request.volume_id, request.is_readonly)
        return master_pb2.VolumeMarkReadonlyResponse()

    def ping(self, request: Any, context: grpc.ServicerContext) -> Any:
        now = time.time_ns()
        return master_pb2.PingResponse(start_time_ns=now, stop_time_ns=time.time_ns())


def make_server(master: Master, bind: str) -> tuple[grpc.Server, int]:
    """A bound server and its port; start() is the caller's. Raises RuntimeError when the port is taken."""
    pool = futures.ThreadPoolExecutor(MAX_SERVERS + UNARY_THREADS, thread_name_prefix="devmaster-grpc")
    server = grpc.server(pool, options=_OPTIONS)
    behaviours = Service(master).methods()
    handlers = {method.name: _method_handler(method, behaviours.get(method.name)) for method in _SERVICE.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))
    return server, server.add_insecure_port(bind)


def _method_handler(method: Any, behaviour: Callable[[Any, grpc.ServicerContext], Any] | None) -> Any:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    if behaviour is None:

        def behaviour(_request: Any, context: grpc.ServicerContext) -> Any:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"method {method.name} not implemented")

    return makers[method.client_streaming, method.server_streaming](
        behaviour,
        request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
        response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
    )
