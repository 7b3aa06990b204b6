"""Request semantics without sockets. Imports storage, _native and the leaves; never server."""
