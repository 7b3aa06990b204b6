"""A cluster with mutual TLS for gRPC, HTTPS everywhere and signing keys: Go master, filer, shell and volume server, and
ours.

Needs the binary of upstream: WEED_BIN=/path/to/weed. Without it these tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from unit.tls_helpers import HOST, Authority, Identity

from pyvolume.server.rpc import VOLUME_SERVICE, method_classes
from tools.ports import free_port

WEED = os.environ.get("WEED_BIN", "")
LIMIT_S = 60.0

pytestmark = [
    pytest.mark.skipif(not WEED, reason="set WEED_BIN to the binary of SeaweedFS 4.44 to run these"),
    pytest.mark.timeout(240),
]


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    end = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, AssertionError):
            value = condition()
            if value:
                return value
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.2)


def security_toml(authority: Authority, names: dict[str, Identity]) -> str:
    def pair(section: str, identity: Identity, more: str = "") -> str:
        return f'[{section}]\ncert = "{identity.cert}"\nkey = "{identity.key}"\n{more}'

    ca = f'ca = "{authority.path}"\n'
    return (
        '[jwt.signing]\nkey = "write-secret"\nexpires_after_seconds = 60\n'
        '[jwt.signing.read]\nkey = "read-secret"\nexpires_after_seconds = 60\n'
        f"[grpc]\n{ca}"
        + pair("grpc.master", names["master"], 'allowed_commonNames = "master,volume,client,filer"\n')
        + pair("grpc.volume", names["volume"], 'allowed_commonNames = "master,volume,client,filer"\n')
        + pair("grpc.filer", names["filer"], 'allowed_commonNames = "master,volume,client,filer"\n')
        + pair("grpc.client", names["client"])
        + pair("https.master", names["master"], ca)
        + pair("https.volume", names["volume"], ca)
        + pair("https.filer", names["filer"], ca)
        + pair("https.client", names["client"], f"enabled = true\n{ca}")
    )


class Cluster:
    """A Go master and filer, a Go volume server and ours, in one rack."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.authority = Authority(base / "ca")
        issue = self.authority.issue
        # gRPC of the cluster knows roles, not hosts: the volume servers' names are those of no machine. HTTPS of Go
        # clients does look at them, so that 127.0.0.1 is in every certificate.
        self.names = {
            name: issue(name, f"{name}.role", HOST, common_name=name)
            for name in ("master", "volume", "client", "filer")
        }
        self.conf = base / "conf"
        self.conf.mkdir()
        text = security_toml(self.authority, self.names)
        (self.conf / "security.toml").write_text(text)
        self.own_conf = base / "own"
        self.own_conf.mkdir()
        (self.own_conf / "security.toml").write_text(text + '[tls]\nmin_version = "TLS 1.3"\n')
        self.master, self.go, self.own, self.filer = (free_port() for _ in range(4))
        self.ports = {port: free_port() for port in (self.master, self.go, self.own, self.filer)}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.client = self.authority.client(self.names["client"])

    def run(self, name: str, *words: str) -> None:
        with (self.base / f"{name}.log").open("wb") as out:
            environ = {**os.environ, "HOME": str(self.base)}
            process = subprocess.Popen(
                words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=self.base, env=environ
            )
        self.processes.append(process)

    def log(self, name: str) -> str:
        return (self.base / f"{name}.log").read_text(errors="replace")

    def start(self) -> None:
        for name in ("m", "g", "o", "f"):
            (self.base / name).mkdir()
        where = f"-ip={HOST}"
        master = [
            f"-port={self.master}",
            f"-port.grpc={self.ports[self.master]}",
            f"-mdir={self.base}/m",
            "-peers=none",
        ]
        self.run("master", WEED, f"-config_dir={self.conf}", "master", where, *master, "-volumeSizeLimitMB=32")
        volume = [where, f"-master={HOST}:{self.master}.{self.ports[self.master]}", "-max=60", "-preStopSeconds=0"]
        go = [f"-port={self.go}", f"-port.grpc={self.ports[self.go]}", f"-dir={self.base}/g"]
        self.run("go", WEED, f"-config_dir={self.conf}", "volume", *volume, *go)
        own = [f"-port={self.own}", f"-port.grpc={self.ports[self.own]}", f"-dir={self.base}/o"]
        self.run(
            "own",
            sys.executable,
            "-m",
            "pyvolume",
            "-logtostderr",
            f"-config_dir={self.own_conf}",
            "volume",
            *volume,
            *own,
        )
        where_master = f"-master={HOST}:{self.master}.{self.ports[self.master]}"
        filer = [f"-port={self.filer}", f"-port.grpc={self.ports[self.filer]}", f"-defaultStoreDir={self.base}/f"]
        self.run("filer", WEED, f"-config_dir={self.conf}", "filer", where, where_master, *filer)
        wait_for(self.joined, "both volume servers joined")
        for port in (self.go, self.own):  # Go joins before it listens
            wait_for(lambda port=port: self.ask("GET", f"{HOST}:{port}/healthz")[0] == 200, "serving")
        wait_for(self.filer_ready, "the filer serves")

    def filer_ready(self) -> bool:
        return self.ask("GET", f"{HOST}:{self.filer}/")[0] == 200

    def joined(self) -> bool:
        racks = self.json("/dir/status")["Topology"]["DataCenters"][0]["Racks"]
        return len(racks[0]["DataNodes"]) == 2

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    # -- clients

    def ask(
        self, method: str, url: str, body: bytes | None = None, token: str = "", context: ssl.SSLContext | None = None
    ) -> tuple[int, bytes]:
        request = urllib.request.Request(f"https://{url}", body, method=method)
        request.add_header("Content-Type", "application/octet-stream")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=20, context=context or self.client) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str) -> Any:
        status, body = self.ask("GET", f"{HOST}:{self.master}{path}")
        assert status == 200, body
        return json.loads(body)

    def signed(self, path: str) -> tuple[dict[str, Any], str]:
        """An answer of the master, and the token that it came with."""
        request = urllib.request.Request(f"https://{HOST}:{self.master}{path}")
        with urllib.request.urlopen(request, timeout=20, context=self.client) as answer:
            return json.load(answer), str(answer.headers["Authorization"] or "")[len("Bearer ") :]

    def located(self, vid: str) -> list[str]:
        return sorted(place["url"] for place in self.json(f"/dir/lookup?volumeId={vid}")["locations"])

    def read_token(self, fid: str) -> str:
        return self.signed(f"/dir/lookup?fileId={fid}&read=yes")[1]

    def shell(self, *commands: str) -> str:
        words = [WEED, f"-config_dir={self.conf}", "shell", f"-master={HOST}:{self.master}.{self.ports[self.master]}"]
        lines = "\n".join(["lock", *commands, "unlock", "exit", ""])
        done = subprocess.run(
            words,
            input=lines.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=30,
            check=False,
            cwd=self.base,
        )
        return done.stdout.decode(errors="replace")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    except BaseException:
        for name in ("master", "go", "own", "filer"):
            with contextlib.suppress(OSError):
                print(f"--- {name}\n{made.log(name)[-4000:]}")
        raise
    finally:
        made.stop()


def assign(cluster: Cluster, query: str) -> dict[str, Any]:
    def once() -> dict[str, Any] | None:
        given, token = cluster.signed(f"/dir/assign?{query}")
        return {**given, "auth": token} if "fid" in given else None

    return dict(wait_for(once, "an assignment"))


def test_files_are_replicated_read_and_deleted_over_tls(cluster: Cluster) -> None:
    own, go = f"{HOST}:{cluster.own}", f"{HOST}:{cluster.go}"
    for first, second in ((own, go), (go, own)):
        given = assign(cluster, "replication=001")
        fid, token = given["fid"], given["auth"]
        data = f"written to {first}".encode() * 5000
        assert cluster.ask("PUT", f"{first}/{fid}", data, token)[0] == 201
        read = cluster.read_token(fid)
        for server in (first, second):
            assert cluster.ask("GET", f"{server}/{fid}", token=read) == (200, data)
        assert cluster.ask("GET", f"{second}/{fid}")[0] == 401, "no token"
        assert cluster.ask("PUT", f"{second}/{fid}", b"x")[0] == 401
        assert cluster.ask("DELETE", f"{second}/{fid}")[0] == 401
        assert cluster.ask("DELETE", f"{first}/{fid}", token=token)[0] == 202
        for server in (first, second):
            assert cluster.ask("GET", f"{server}/{fid}", token=read)[0] == 404


def test_reads_are_proxied_over_tls(cluster: Cluster) -> None:
    servers = {f"{HOST}:{cluster.own}", f"{HOST}:{cluster.go}"}
    seen = set()
    for _ in range(40):
        given = assign(cluster, "collection=alone")
        fid, holder = given["fid"], given["url"]
        seen.add(holder)
        (other,) = servers - {holder}
        assert cluster.ask("PUT", f"{holder}/{fid}", b"alone", given["auth"])[0] == 201
        assert cluster.ask("GET", f"{other}/{fid}", token=cluster.read_token(fid)) == (200, b"alone")
        if seen == servers:
            break
    assert seen == servers


def test_files_of_a_filer_are_written_read_and_deleted(cluster: Cluster) -> None:
    """The filer signs nothing for itself here: it has the master's tokens to write, and signs its own to read."""
    filer = f"{HOST}:{cluster.filer}"
    holders: dict[str, str] = {}
    for number in range(60):
        path, data = f"{filer}/dir/{number}.bin", os.urandom(30_000)
        assert cluster.ask("PUT", f"{path}?collection=filed", data)[0] == 201
        assert cluster.ask("GET", path) == (200, data)
        entry = json.loads(cluster.ask("GET", f"{path}?metadata=true")[1])
        fid = entry["chunks"][0]["file_id"]
        found, token = cluster.signed(f"/dir/lookup?fileId={fid}&read=yes")
        holder = found["locations"][0]["url"]
        assert cluster.ask("GET", f"{holder}/{fid}")[0] == 401, "chunks are for those with a token"
        assert cluster.ask("GET", f"{holder}/{fid}", token=token) == (200, data)
        assert cluster.ask("DELETE", path)[0] == 204
        holders[holder] = fid
        if len(holders) == 2:
            break
    assert len(holders) == 2, "both servers had some"
    for holder, fid in holders.items():
        token = cluster.read_token(fid)
        wait_for(lambda: cluster.ask("GET", f"{holder}/{fid}", token=token)[0] == 404, "the filer deletes its chunks")  # noqa: B023


def test_volumes_are_copied_over_mutual_tls(cluster: Cluster) -> None:
    given = assign(cluster, "collection=copied")
    fid, vid, data = given["fid"], given["fid"].partition(",")[0], b"copied" * 9000
    assert cluster.ask("PUT", f"{given['url']}/{fid}", data, given["auth"])[0] == 201
    there = given["url"]
    read = cluster.read_token(fid)
    for _ in range(2):  # there and back: each server pulls once
        (other,) = {f"{HOST}:{cluster.own}", f"{HOST}:{cluster.go}"} - {there}
        dotted = [f"{one}.{cluster.ports[int(one.rpartition(':')[2])]}" for one in (there, other)]
        out = cluster.shell(
            f"volume.copy -volumeId={vid} -source={dotted[0]} -target={dotted[1]}",
            f"volume.delete -volumeId={vid} -node={dotted[0]}",
        )
        wait_for(lambda: cluster.located(vid) == [other], out)  # noqa: B023
        assert cluster.ask("GET", f"{other}/{fid}", token=read) == (200, data)
        there = other


def test_shell_works_over_mutual_tls(cluster: Cluster) -> None:
    for _ in range(3):
        given = assign(cluster, "collection=shell&replication=001")
        assert cluster.ask("PUT", f"{HOST}:{cluster.own}/{given['fid']}", b"x" * 4096, given["auth"])[0] == 201
        assert cluster.ask("DELETE", f"{HOST}:{cluster.own}/{given['fid']}", token=given["auth"])[0] == 202
    out = cluster.shell(
        "volume.list",
        f"volume.vacuum -garbageThreshold=0.0001 -volumeId={given['fid'].partition(',')[0]}",
        "collection.delete -collection=shell -apply",
    )
    assert f"{HOST}:{cluster.own}" in out
    assert "rror" not in out, out
    vid = given["fid"].partition(",")[0]
    assert f"Complete Committing vacuum {vid} on {HOST}:{cluster.own}" in cluster.log("master")
    wait_for(lambda: not list((cluster.base / "o").glob("shell_*.dat")), "the collection is gone from our disk")


def test_shards_travel_over_mutual_tls(cluster: Cluster) -> None:
    given = assign(cluster, "collection=coded")
    fid, data = given["fid"], b"coded" * 40_000
    assert cluster.ask("PUT", f"{given['url']}/{fid}", data, given["auth"])[0] == 201
    out = cluster.shell(f"ec.encode -volumeId={fid.partition(',')[0]} -collection=coded -force")

    def shards(directory: str) -> int:
        return len(list((cluster.base / directory).glob("coded_*.ec[0-9][0-9]")))

    assert shards("o") and shards("g"), out
    assert shards("o") + shards("g") == 14, out
    read = cluster.read_token(fid)
    for port in (cluster.own, cluster.go):
        wait_for(lambda port=port: cluster.ask("GET", f"{HOST}:{port}/{fid}", token=read) == (200, data), "the file")
    assert cluster.ask("DELETE", f"{HOST}:{cluster.own}/{fid}")[0] == 401, "no token"
    assert cluster.ask("DELETE", f"{HOST}:{cluster.own}/{fid}", token=given["auth"])[0] == 202
    wait_for(lambda: cluster.ask("GET", f"{HOST}:{cluster.own}/{fid}", token=read)[0] == 404, "deleted")


def call_delete(cluster: Cluster, identity: Identity | None) -> grpc.RpcError:
    """How VolumeDelete at our server ends for this client; without an identity it comes in plain text."""
    target = f"{HOST}:{cluster.ports[cluster.own]}"
    if identity is None:
        channel = grpc.insecure_channel(target)
    else:
        files = (cluster.authority.path, identity.key, identity.cert)
        credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
        channel = grpc.secure_channel(target, credentials, (("grpc.ssl_target_name_override", "volume.role"),))
    path, request_class, _ = method_classes(VOLUME_SERVICE, "VolumeDelete")
    try:
        channel.unary_unary(path)(request_class(volume_id=1).SerializeToString(), timeout=20)
    except grpc.RpcError as exc:
        return exc
    finally:
        channel.close()
    raise AssertionError("served")


def test_who_has_no_right_is_refused_on_each_path(cluster: Cluster, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger").issue("client")
    bare, wrong = cluster.authority.client(), cluster.authority.client(stranger)
    for port in (cluster.own, cluster.go):
        for context in (bare, wrong):
            with pytest.raises(OSError):
                cluster.ask("GET", f"{HOST}:{port}/status", context=context)
    grpc_port = cluster.ports[cluster.own]
    for identity in (None, stranger):
        context = cluster.authority.client(identity)
        context.set_alpn_protocols(["h2"])
        context.check_hostname = False
        with pytest.raises(OSError), context.wrap_socket(socket.create_connection((HOST, grpc_port), 10)) as sock:
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            while sock.recv(4096):
                pass
            raise ConnectionResetError("closed without a word, as others do it")
    other = cluster.authority.issue("somebody", "somebody.role")
    refused = call_delete(cluster, other)
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert refused.details() == "Authenticate: invalid subject client common name: somebody"
    assert call_delete(cluster, stranger).code() is grpc.StatusCode.UNAVAILABLE
    assert call_delete(cluster, None).code() is grpc.StatusCode.UNAVAILABLE
    conf = tmp_path / "conf"
    conf.mkdir()
    text = security_toml(cluster.authority, {**cluster.names, "client": other})
    (conf / "security.toml").write_text(text)
    words = [WEED, f"-config_dir={conf}", "backup", f"-master={HOST}:{cluster.master}.{cluster.ports[cluster.master]}"]
    done = subprocess.run([*words, "-volumeId=1", f"-dir={tmp_path}"], capture_output=True, timeout=60, check=False)
    assert not list(tmp_path.glob("*.dat")), done.stdout


def test_grpc_honours_the_least_version(cluster: Cluster) -> None:
    context = cluster.authority.client(cluster.names["client"])
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    port = cluster.ports[cluster.own]
    with context.wrap_socket(socket.create_connection((HOST, port), 10)) as sock:
        assert sock.version() == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError), context.wrap_socket(socket.create_connection((HOST, port), 10)):
        pass


def test_no_token_and_no_key_is_logged(cluster: Cluster) -> None:
    given = assign(cluster, "replication=001")
    cluster.ask("PUT", f"{HOST}:{cluster.own}/{given['fid']}", b"x", given["auth"] + "broken")
    log = cluster.log("own")
    assert given["auth"] not in log
    assert "secret" not in log
