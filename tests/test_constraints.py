"""The known-good set pins one version of everything that pyproject.toml asks for, for every Python and platform."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD = SETTINGS["project"], SETTINGS["build-system"]["requires"]
EXTRAS = PROJECT["optional-dependencies"]
PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
    "darwin": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
    "win32": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
}


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def asked(text: str) -> list[Requirement]:
    """A requirement of pyproject.toml, or all those of the extras of its own that it names."""
    requirement = Requirement(text)
    if requirement.name != PROJECT["name"]:
        return [requirement]
    return [one for extra in requirement.extras for line in EXTRAS[extra] for one in asked(line)]


PINS = lines("constraints.txt")
ASKED = [one for some in (PROJECT["dependencies"], BUILD, *EXTRAS.values()) for line in some for one in asked(line)]
HELD_BACK = [Requirement(line) for line in lines("constraints.in")]


def test_its_lines_are_names_and_versions_with_markers_and_nothing_else():
    for line in PINS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[\w.]+( ; [^@:#]+)?", line), line
    assert len(PINS) > 100


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_it_satisfies_every_range_of_the_project_and_what_is_held_back(python, platform):
    machine = "arm64" if platform == "darwin" else "AMD64" if platform == "win32" else "x86_64"
    environment = {"python_version": python, "python_full_version": f"{python}.1", "platform_machine": machine, "extra": ""}
    environment |= PLATFORMS[platform] | {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    pins: dict[str, str] = {}
    for pin in map(Requirement, PINS):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pins.setdefault(pin.name, str(pin.specifier)) == str(pin.specifier), f"{pin.name} has two versions"
    for requirement in ASKED + HELD_BACK:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{requirement.name} is not pinned; run `make constraints`"
            assert requirement.specifier.contains(pins[name].removeprefix("==")), f"{requirement}, but {name}{pins[name]}"


def test_each_library_has_one_floor():
    """Two would leave the lower one untried: the floors are installed together."""
    ranges: dict[str, set[str]] = {}
    for requirement in ASKED:
        ranges.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    assert {name: some for name, some in ranges.items() if len(some) > 1} == {}
    assert all(">=" in one for some in ranges.values() for one in some)


def test_the_malicious_releases_of_lightning_are_excluded():
    (lightning,) = {str(one.specifier): one for one in ASKED if one.name == "lightning"}.values()
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))
