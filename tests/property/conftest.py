"""The servers of other tests are used here as they are: those of the HTTP and of the gRPC tests."""

from __future__ import annotations

import sys
from pathlib import Path

for neighbour in ("conformance", "unit"):
    sys.path.append(str(Path(__file__).parents[1] / neighbour))
