"""The embedded development master: for trying out and tests, never imported by the server."""
