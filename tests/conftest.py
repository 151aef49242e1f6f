"""What all tests share: helpers on the path, and the marks that make long ones short."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# What LightningCLI calls, jsonargparse has renamed.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
# Several tests run at once; the models are too small to gain by threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test that is marked `uncovered` without measuring coverage, its fixtures too."""
    from _coverage import measuring

    coverage = measuring() if item.get_closest_marker("uncovered") else None
    if coverage:
        coverage.stop()
    try:
        return (yield)
    finally:
        if coverage:
            coverage.start()


@pytest.fixture(scope="module")
def quick_figures() -> Iterator[None]:
    """Draw figures small and without a layout: for tests of runs so tiny that their figures take longer than all the rest."""
    from matplotlib.figure import Figure

    own = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *args, **options: own(self, *args, **{**options, "dpi": 40}))
        patch.setattr(Figure, "get_layout_engine", lambda self: None)
        yield
