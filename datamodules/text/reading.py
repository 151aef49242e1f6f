"""Texts from files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from slug_lightning.errors import UnlearnError


def read_texts(argument: str, path: str | Path) -> list[str]:
    r"""Read texts from a file.

    Args:
        argument: that named the file, for messages.
        path: `.txt` with blank lines between the texts, or `.jsonl` with a field "text".

    Raises:
        UnlearnError: if there is no such file, if it cannot be read or is of another kind, or if a line has no text.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "poems.txt"
        >>> _ = path.write_text("The cat\nsat.\n\n\nA dog.\n")
        >>> read_texts("forget", path)
        ['The cat\nsat.', 'A dog.']
    """
    if Path(path).suffix == ".jsonl":
        return [line["text"] for line in read_lines(argument, path)]
    if Path(path).suffix == ".txt":
        return [text for text in re.split(r"\n(?:[ \t]*\n)+", read_content(argument, path).strip()) if text]
    raise UnlearnError(f"{argument}: {path} is neither .txt nor .jsonl; give one of these, or a list of texts")


def read_lines(argument: str, path: str | Path, *fields: str) -> list[dict[str, str]]:
    """Read the objects of a `.jsonl` file, which have strings under "text" and under each of `fields`."""
    found = []
    lines = read_content(argument, path).split("\n")  # as only that ends a line of JSON, unlike for splitlines
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
        except ValueError as error:
            raise UnlearnError(f"{argument}: line {number} of {path} is no JSON ({error}); mend or remove it") from error
        for field in ("text", *fields):
            if not isinstance(read, dict) or not isinstance(read.get(field), str):
                raise UnlearnError(f'{argument}: line {number} of {path} has no string under "{field}"; mend or remove it')
        found.append(read)
    return found


def read_content(argument: str, path: str | Path) -> str:
    """Read a whole file of text.

    Raises:
        UnlearnError: if there is no such file, or if it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UnlearnError(f"{argument}: {path} cannot be read ({error}); give a file of text in UTF-8") from error
