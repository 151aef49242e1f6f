"""Whether an answer names what it was asked about."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def normal(text: str) -> str:
    """A text as it is compared: its words in lower case, without accents and signs, one space between them.

    Example:
        >>> normal("It's  Beyoncé!"), normal("T-shirt"), normal("ΣΊΣΥΦΟΣ") == normal("Σίσυφος")
        ('it s beyonce', 't shirt', True)
    """
    # Twice, as a letter of another shape has its case only once it is a plain one.
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return " ".join(re.findall(r"\w+", "".join(sign for sign in plain if not unicodedata.combining(sign))))


def names(answer: str, aliases: Sequence[str]) -> bool:
    """Whether an answer names something by any of its names: as whole words, side by side, whatever the case and the signs.

    Args:
        answer: of a model.
        aliases: names that count; of a plural, list it too.

    Example:
        >>> names("This is Brad Pitt, the actor.", ["brad pitt", "William Pitt"])
        True
        >>> names("A catalogue.", ["cat"]), names("A cat's eye.", ["cat"]), names("", ["cat"])
        (False, True, False)
    """
    said = f" {normal(answer)} "
    return any(f" {own} " in said for own in map(normal, aliases) if own)
