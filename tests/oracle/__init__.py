"""Slow, plain references of what the engine does in C. Written from the contract; import nothing of pyvolume."""
