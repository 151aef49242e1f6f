"""Names in messages and in the names of files."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST = 80
"""Bytes of a file name, which leaves every file system room for a prefix and a suffix."""


def file_name(concept: str) -> str:
    """A name for a concept's files: letters and digits of any script in lower case, and dashes for all else.

    At most 80 bytes in UTF-8, never empty. Where something must be cut off, or where nothing would be left, a digest of the
    concept keeps the names of different concepts apart.

    Example:
        >>> file_name("Fire Truck!"), file_name("größe"), file_name("火车")
        ('fire-truck', 'grösse', '火车')
        >>> file_name("?")
        'concept-8a8de823'
    """
    plain = _plain(_plain(concept).casefold())
    # With their marks: without its vowel signs, a word in Hindi is another one.
    dashed = "".join(letter if unicodedata.category(letter)[0] in "LMN" else "-" for letter in plain)
    name = re.sub("-+", "-", dashed).strip("-")
    if name and len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(plain.encode(errors="backslashreplace")).hexdigest()[:8]
    start = name.encode()[: LONGEST - len(digest) - 1].decode(errors="ignore").rstrip("-")
    return f"{start or 'concept'}-{digest}"


def _plain(text: str) -> str:
    """The one way to write it in Unicode, of several that look alike."""
    return unicodedata.normalize("NFKC", text)


def labelled(kind: str, concept: str | None) -> str:
    """How messages begin: with the argument, and with the concept where it has a name.

    Example:
        >>> labelled("forget", "cat"), labelled("retain", None)
        ("forget 'cat'", 'retain')
    """
    return kind if concept is None else f"{kind} {concept!r}"


def listed(names: Sequence[Any], most: int = 5) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> listed(["cat", "dog", "owl"]), listed(range(200), most=2)
        ("'cat', 'dog', 'owl'", '0, 1 and 198 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def grouped(sentences: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Make one sentence of those that differ in their numbers alone.

    Args:
        sentences: by name.

    Returns:
        For each group the names, and a sentence with ranges of numbers.

    Example:
        >>> grouped({"cat": "4 samples, seed 0", "dog": "9 samples, seed 0", "owl": "a stream"})
        [(['cat', 'dog'], '4 to 9 samples, seed 0'), (['owl'], 'a stream')]
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, sentence in sentences.items():
        groups.setdefault(tuple(re.split(r"\d+", sentence)), []).append(name)
    found = []
    for words, names in groups.items():
        numbers = zip(*(map(int, re.findall(r"\d+", sentences[name])) for name in names), strict=True)
        ranges = [str(min(each)) if min(each) == max(each) else f"{min(each)} to {max(each)}" for each in numbers]
        found.append((names, "".join(word + number for word, number in zip(words, [*ranges, ""], strict=True))))
    return found


def some_of(names: Iterable[str], most: int = 5) -> str:
    """A few names, for messages, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
