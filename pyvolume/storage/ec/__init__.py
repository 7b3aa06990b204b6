"""Erasure coded volumes: how bytes are cut, the files, and what is mounted. Facts: contract erasure-coding.md."""
