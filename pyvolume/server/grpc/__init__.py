"""The gRPC service, one module for each family of calls. `service.make_grpc_server` is the way in."""
