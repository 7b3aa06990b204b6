"""Being here, this file puts tests/ on sys.path, so that every test can say `from oracle import formats`."""
