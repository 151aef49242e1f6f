"""The README and the pages under docs/: code runs, commands, links and pictures exist, and lines are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]
EDITING = {"README.md", "your-own-module.md", "several-concepts.md", "patches.md"}
"""Pages whose code forgets something."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def pages_with(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks, one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name} block {number}", "exec"), names)
    callbacks = [value for value in names.values() if isinstance(value, UnlearnCallback)]
    assert all(callback.report.status == "unlearned" for callback in callbacks)
    assert callbacks or page.name not in EDITING


def test_the_quickstart_forgets_in_25_lines():
    (quickstart,) = blocks(README, "python")
    assert sum(bool(line) for line in quickstart.splitlines()) <= 25
    assert "UnlearnCallback(" in quickstart and "patch.save(" in quickstart


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_the_yaml_of_a_page_is_whole(page):
    assert all(yaml.safe_load(block) for block in blocks(page, "yaml"))


@pytest.mark.parametrize("page", pages_with("sh"))
def test_the_commands_of_a_page_exist(page, capsys):
    """Every verb and target is known."""
    text = "\n".join(blocks(page, "sh"))
    assert "make demo" in text or page != README
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) <= targets
    verbs = re.findall(r"slug-lightning (patch \w+|[a-z][a-z-]+)", text)
    for verb in sorted(set(verbs) - {"fit"}):
        with pytest.raises(SystemExit, match="0"):
            main([*verb.split(), "--help"])


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page):
    text = page.read_text()
    for path in re.findall(r"\b(?:configs|benchmarks|tests)/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    """Each file is there, pictures too, and each heading in it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    links = set(re.findall(r"\]\((docs/[^)#\s]+\.md)", README.read_text()))
    assert links == {f"docs/{page.name}" for page in PAGES[1:]}


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_lines_of_a_page_are_short(page):
    """But for rows of tables and pictures, which cannot be broken."""
    long = [line for line in page.read_text().splitlines() if len(line) > 100]
    assert [line for line in long if not line.startswith(("|", "!["))] == []
