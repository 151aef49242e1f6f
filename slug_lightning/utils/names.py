"""Names of concepts: in arguments, notes and file names."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from slug_lightning.errors import UnlearnError

LONGEST = 80
"""Bytes of a file name, which leaves every file system room for a prefix and a suffix."""


def file_name(concept: str) -> str:
    """Return a name for a concept's files: letters and digits of any script in lower case, and dashes for all else.

    At most 80 bytes in UTF-8, never empty. If the name must be cut, or nothing would be left, a digest of the concept keeps
    the names of different concepts apart.
    """
    # One form for texts that look the same.
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", concept).casefold())
    # With their marks: without its vowel signs, a word in Hindi is another one.
    dashed = "".join(letter if unicodedata.category(letter)[0] in "LMN" else "-" for letter in plain)
    name = re.sub("-+", "-", dashed).strip("-")
    if name and len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(plain.encode(errors="backslashreplace")).hexdigest()[:8]
    start = name.encode()[: LONGEST - len(digest) - 1].decode(errors="ignore").rstrip("-")
    return f"{start or 'concept'}-{digest}"


def labelled(kind: str, concept: str | None) -> str:
    """Begin a message with the argument, and the concept if it has a name: `forget 'cat'`."""
    return kind if concept is None else f"{kind} {concept!r}"


def some_of(names: Iterable[str], most: int = 5) -> str:
    """List the first names, and say how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def listed(names: Iterable[Any], most: int = 5) -> str:
    """List the first names in quotes, and say how many more there are."""
    return some_of(map(repr, names), most)


def grouped(sentences: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Make one sentence, with ranges, of those that differ only in their numbers; gives names and sentence of each group.

    So "4 samples, seed 0" and "9 samples, seed 0" become "4 to 9 samples, seed 0".
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


def notes_on(sentences: Mapping[str, str], total: int) -> list[str]:
    """Write notes on the forget sets of some of `total` concepts: a few in full, more of the same form in one."""
    notes = []
    for names, sentence in grouped(sentences):
        if len(names) > 3:
            which = f"forget: {total} concepts" if len(names) == total else f"forget {listed(names)}"
            notes.append(f"{which}, each: {sentence}")
        else:
            notes += [f"{labelled('forget', name if total > 1 else None)}: {sentences[name]}" for name in names]
    return notes


def concept_of(datamodule: Any) -> str:
    """Return what the data call the concept: `concept` of the datamodule, one word or several, else "the forget set"."""
    named = getattr(datamodule, "concept", None) or "the forget set"
    return named if isinstance(named, str) else ", ".join(map(str, named))


def check_names(argument: str, names: Iterable[Any]) -> None:
    """Refuse the names of a run's concepts if there are none, one is blank, or two give the same file name."""
    files: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UnlearnError(f"{argument}: {name!r} is not a concept name; give a non-empty string")
        file = file_name(name)
        if file in files:
            raise UnlearnError(
                f"{argument}: the concepts {files[file]!r} and {name!r} would have the same files, {file!r}; rename one"
            )
        files[file] = name
    if not files:
        raise UnlearnError(f"{argument}: no concept is given; name at least one")


def by_concept(argument: str, given: Any) -> dict[str | None, Any]:
    """Return an argument by the concepts' names, which are checked; a single value without a name is under None."""
    if not isinstance(given, Mapping):
        return {None: given}
    check_names(argument, given)
    return dict(given)
