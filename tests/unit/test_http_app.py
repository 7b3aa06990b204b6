"""Parts of server.http_app that need no server."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

from pyvolume.server import http_app


def test_request_ids_are_all_different() -> None:
    """They are made of numbers fetched many at a time; threads that find them used up must not share the next ones."""

    def some(_: int) -> list[str]:
        return [http_app.new_request_id() for _ in range(5000)]

    with ThreadPoolExecutor(8) as pool:
        drawn = [one for ids in pool.map(some, range(8)) for one in ids]
    assert len(set(drawn)) == len(drawn)
    assert len({one[-8:] for one in drawn}) > len(drawn) - 50
    assert all(re.fullmatch("[0-9A-F]{24}", one) for one in drawn)
