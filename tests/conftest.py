"""What all tests share: helpers on the path, and the marks that make long ones short."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from _coverage import measuring
from hypothesis import settings

# Of each property less than a third of its examples; `make slow` takes all.
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.register_profile("quick", max_examples=30, deadline=None)
settings.load_profile("quick")

# What LightningCLI calls, jsonargparse has renamed.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
# Several tests run at once; the models are too small to gain by threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextmanager
def unmeasured(wanted: bool = True) -> Iterator[None]:
    """Inside, coverage is not measured, if it is at all."""
    coverage = measuring() if wanted else None
    if coverage:
        coverage.stop()
    try:
        yield
    finally:
        if coverage:
            coverage.start()


@pytest.hookimpl(trylast=True)  # after pytest-cov's own
def pytest_sessionstart() -> None:
    """Let a worker import the large libraries before coverage looks on, which would double the time that takes."""
    if measuring() and "PYTEST_XDIST_WORKER" in os.environ:
        with unmeasured():
            for name in ("lightning.pytorch", "open_clip", "diffusers", "transformers", "peft", "sklearn", "webdataset"):
                importlib.import_module(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Do not measure coverage of a test that is marked `uncovered`, and of one that runs the same lines for many examples."""
    many = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    with unmeasured(many or item.get_closest_marker("uncovered") is not None):
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def _figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave figures blank, but where a file of tests is about them: they take longer than all the rest of a tiny run."""
    from matplotlib.figure import Figure

    own = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("figures") is None:
            patch.setattr(Figure, "savefig", lambda self, *args, **options: own(self, *args, **{**options, "dpi": 20}))
            patch.setattr(Figure, "draw", lambda self, renderer: None)
        yield
