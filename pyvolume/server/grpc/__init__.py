"""The gRPC service, one module for each family of calls; `make_grpc_server` is the way in."""

from pyvolume.server.grpc.service import GrpcServer, make_grpc_server

__all__ = ["GrpcServer", "make_grpc_server"]
