"""Benchmarks: pyvolume beside a bare waitress app and the reference servers, measured in turns in one run."""
