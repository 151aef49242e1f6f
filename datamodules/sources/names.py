"""Concepts by name: in arguments, in notes, in the names of files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import file_name, grouped, labelled, listed


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
