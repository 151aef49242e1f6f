"""Texts from files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from slug_lightning.errors import UnlearnError


def read_texts(argument: str, path: str | Path) -> list[str]:
    """Read texts from a `.txt` file, with blank lines between them, or from a `.jsonl` file with a field "text"."""
    if Path(path).suffix == ".jsonl":
        return [line["text"] for line in read_lines(argument, path)]
    if Path(path).suffix == ".txt":
        return [text for text in re.split(r"\n(?:[ \t]*\n)+", read_content(argument, path).strip()) if text]
    raise UnlearnError(f"{argument} must be a .txt or .jsonl file, or a list of texts, got {path}")


def read_lines(argument: str, path: str | Path, *fields: str) -> list[dict[str, str]]:
    """Read the objects of a `.jsonl` file, each with strings under "text" and `fields`."""
    found = []
    lines = read_content(argument, path).split("\n")  # not splitlines, which also splits at line ends within JSON strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
        except ValueError as error:
            raise UnlearnError(f"{argument}: line {number} of {path} is not JSON ({error}); fix or remove it") from error
        for field in ("text", *fields):
            if not isinstance(read, dict) or not isinstance(read.get(field), str):
                raise UnlearnError(f'{argument}: line {number} of {path} has no string under "{field}"; fix or remove it')
        found.append(read)
    return found


def read_content(argument: str, path: str | Path) -> str:
    """Read a whole text file, or raise an `UnlearnError` that names the `argument`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnlearnError(f"{argument}: {path} cannot be read ({error}); give a text file in UTF-8") from error
