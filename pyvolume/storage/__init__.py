"""What a volume is: formats, files on disk, life cycle. Imports _native and the leaves only."""
