"""The gRPC service, one module for each family of calls."""
