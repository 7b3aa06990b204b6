"""Hypothesis profiles: default is quick; PYVOLUME_HYPOTHESIS=ci or expensive looks harder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# Times vary on shared machines, so no example has a deadline; files are made per example, not per test.
settings.register_profile(
    "default", max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", settings.get_profile("default"), max_examples=1000)
settings.register_profile("expensive", settings.get_profile("default"), max_examples=20000)
settings.load_profile(os.environ.get("PYVOLUME_HYPOTHESIS", "default"))

# The servers of other tests are used here as they are: those of the HTTP and of the gRPC tests.
for neighbour in ("conformance", "unit"):
    sys.path.append(str(Path(__file__).parents[1] / neighbour))
