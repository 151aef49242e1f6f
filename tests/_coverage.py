"""Coverage where it is not wanted."""

from __future__ import annotations

import sys
from typing import Any


def measuring() -> Any:
    """The `coverage.Coverage` that measures this process, or None."""
    coverage = sys.modules.get("coverage")
    return coverage.Coverage.current() if coverage else None
