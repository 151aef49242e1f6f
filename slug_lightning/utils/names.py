"""Names of concepts: in arguments, in notes, in the names of files."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slug_lightning.errors import UnlearnError

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
    return some_of(map(repr, names), most)


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


def concept_of(datamodule: Any) -> str:
    """The name that the data have for what is to be forgotten: `concept` of the datamodule, one word or several.

    Example:
        >>> concept_of(None)
        'the forget set'
    """
    named = getattr(datamodule, "concept", None) or "the forget set"
    return named if isinstance(named, str) else ", ".join(map(str, named))


def check_names(argument: str, names: Iterable[Any]) -> None:
    """Refuse names of concepts that cannot be told apart, as names or as files.

    Args:
        argument: which gave them, for the message.
        names: of all concepts of a run.

    Raises:
        UnlearnError: if there is none, if one is no text or an empty one, or if two give the same file name.

    Example:
        >>> check_names("forget", ["cat", "dog"])
        >>> check_names("forget", ["Cat", "cat"])
        Traceback (most recent call last):
        slug_lightning.errors.UnlearnError: forget: the concepts 'Cat' and 'cat' would have the same files, 'cat'; rename one
    """
    files: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UnlearnError(f"{argument}: {name!r} is no name of a concept; give a text that is not empty")
        file = file_name(name)
        if file in files:
            raise UnlearnError(
                f"{argument}: the concepts {files[file]!r} and {name!r} would have the same files, {file!r}; rename one"
            )
        files[file] = name
    if not files:
        raise UnlearnError(f"{argument}: no concept is given; name at least one")


def by_concept(argument: str, given: Any) -> dict[str | None, Any]:
    """An argument by the concepts' names; None is the name of what was given without one.

    Raises:
        UnlearnError: if the names cannot be told apart.

    Example:
        >>> by_concept("forget", [1, 2]), by_concept("forget", {"cat": [1, 2]})
        ({None: [1, 2]}, {'cat': [1, 2]})
    """
    if not isinstance(given, Mapping):
        return {None: given}
    check_names(argument, given)
    return dict(given)


def notes_on(sentences: Mapping[str, str], total: int) -> list[str]:
    """Notes on the sets of some of `total` concepts: a few in full, more of a kind in one note.

    Example:
        >>> notes_on({f"concept {i}": f"{i + 4} samples" for i in range(200)}, 200)
        ['forget: 200 concepts, each: 4 to 203 samples']
        >>> notes_on({"cat": "4 samples"}, 1), notes_on({"cat": "4 samples"}, 2)
        (['forget: 4 samples'], ["forget 'cat': 4 samples"])
    """
    notes = []
    for names, sentence in grouped(sentences):
        if len(names) > 3:
            which = f"forget: {total} concepts" if len(names) == total else f"forget {listed(names)}"
            notes.append(f"{which}, each: {sentence}")
        else:
            notes += [f"{labelled('forget', name if total > 1 else None)}: {sentences[name]}" for name in names]
    return notes
