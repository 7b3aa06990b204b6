"""Volumes whose data lies in a remote store: the stores, reading from them, moving a volume there and back."""
