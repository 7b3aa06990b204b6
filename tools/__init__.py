"""Tools of the project: compatibility runner, benchmarks, developer helpers. None of them is needed to run a server."""
