"""Being here, this file puts tests/ on sys.path, so that every test can say `from oracle import formats`.

Hypothesis profiles: the default looks at the same examples each time, so that a run says something of what was changed;
PYVOLUME_HYPOTHESIS=ci or expensive looks at other ones, more of them, for as long as it takes.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("PYVOLUME_HYPOTHESIS", "default")

# Times vary on shared machines, so no example has a deadline; files are made per example, not per test.
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
random = settings(max_examples=1000, deadline=None, suppress_health_check=quiet, print_blob=True)
settings.register_profile("default", random, max_examples=150, derandomize=True)
settings.register_profile("ci", random)
settings.register_profile("expensive", random, max_examples=20000)
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PROFILE != "default":
        for item in items:
            item.add_marker(pytest.mark.timeout(0), append=False)
