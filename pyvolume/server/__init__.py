"""Network services: HTTP lanes, gRPC, heartbeat, life cycle."""
