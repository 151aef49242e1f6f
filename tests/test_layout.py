"""What the layers contract of pyproject.toml cannot say of the packages."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slug_lightning"
# Modules and datamodules have a `trainer` of their own.
BELOW_THE_TRAINER = ("utils", "tensors", "embedded", "distributed", "patches", "clip", "objective")
BELOW_THE_TRAINER += ("lm", "vlm", "diffusion", "reports", "audit", "methods")


def test_in_the_root_there_are_packages_and_what_they_all_need():
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {"__init__.py", "errors.py", "py.typed"}


@pytest.mark.parametrize("package", BELOW_THE_TRAINER)
def test_no_trainer_is_known_below_the_package_for_it(package):
    found = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = isinstance(node, ast.ImportFrom) and any(alias.name == "Trainer" for alias in node.names)
            if imported or (isinstance(node, ast.Attribute) and node.attr in ("trainer", "Trainer")):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def sources() -> list[Path]:
    root = PACKAGE.parent
    return [path for folder in (PACKAGE, root / "callbacks", root / "datamodules") for path in sorted(folder.rglob("*.py"))]


def test_functions_have_at_most_60_lines_and_classes_300():
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            most = {ast.FunctionDef: 60, ast.ClassDef: 300}.get(type(node))
            if most and node.end_lineno - node.lineno + 1 > most:
                long.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines, {most} are enough")
    assert long == []
