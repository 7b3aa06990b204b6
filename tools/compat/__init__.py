"""Compares a server with what a Go server said and wrote: recorded exchanges and volumes, no Go binary needed."""
