"""Whose deprecations fail the suite: a run of pytest by the project's own settings, over files that warn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = ["DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"]
LIBRARY = """
import warnings
class OldName(DeprecationWarning): ...
def renamed(category):
    warnings.warn("called by its old name inside", category)
def renamed_for_its_caller(category):
    warnings.warn("called by its old name outside", category, stacklevel=2)
"""
# What counts as ours, as pytest names it: modules of the package, of the folders that doctests name, and helpers of tests.
OURS = ["slug_lightning/lm/module.py", "callbacks/module.py", "datamodules/module.py", "configs/module.py", "tests/module.py"]
HELPERS = [path.stem for path in sorted((ROOT / "tests").glob("*.py")) if path.stem.startswith("_")]


@pytest.fixture
def suite(tmp_path):
    """Run tests by the project's settings where there is a library that warns; gives exit code and output."""

    def run(files: dict[str, str], also: dict[str, str] | None = None) -> tuple[int, str]:
        for name, text in {"somebody/__init__.py": "", "somebody/library.py": LIBRARY, **files, **(also or {})}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=60", *files]
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'tests'}"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_deprecation_of_another_package_is_listed_and_fails_nothing(suite):
    kinds = [*KINDS, "OldName"]
    tests = "from somebody.library import *\n" + "".join(f"def test_{kind}(): renamed({kind})\n" for kind in kinds)
    code, out = suite({"tests/test_library.py": tests})
    assert code == 0, out
    assert all(f"{kind}: called by its old name inside" in out for kind in kinds)
    assert "4 passed" in out


def test_ours_and_what_a_library_says_of_our_call_fail_the_suite(suite):
    warn = "from somebody.library import renamed_for_its_caller\n"
    tests = "".join(f"def test_{kind}(): renamed_for_its_caller({kind})\n" for kind in KINDS)
    # Helpers are on the path, and so have no package before their names.
    helpers = {f"helpers/{name}.py": f"{warn}def call(): renamed_for_its_caller(FutureWarning)\n" for name in HELPERS}
    tests += "import sys\nsys.path.append('helpers')\n"
    tests += "".join(f"def test_helper_{name}():\n    import {name}\n    {name}.call()\n" for name in HELPERS)
    files = {"tests/test_ours.py": warn + tests}
    for name in OURS:
        files[name] = f'def old():\n    """\n    >>> old()\n    """\n    {warn}    renamed_for_its_caller(FutureWarning)\n'
    code, out = suite(files, also=helpers)
    assert code == 1, out
    failed = {line.split(" - ")[0] for line in out.splitlines() if line.startswith("FAILED")}
    assert failed == {f"FAILED tests/test_ours.py::test_{kind}" for kind in [*KINDS, *(f"helper_{n}" for n in HELPERS)]} | {
        f"FAILED {name}::{name.removesuffix('.py').replace('/', '.')}.old" for name in OURS
    }


def test_any_other_warning_fails_the_suite_whoever_it_is_from(suite):
    tests = "from somebody.library import renamed\ndef test(): renamed(UserWarning)\n"
    code, out = suite({"tests/test_library.py": tests})
    assert code == 1 and "UserWarning: called by its old name inside" in out
