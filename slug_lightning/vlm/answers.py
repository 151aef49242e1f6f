"""Whether an answer names what it was asked about."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ACCENTS = re.compile("[\u0300-\u036f]")
"""Combining diacritical marks."""
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
"""Thai, Lao, Burmese, Khmer, Japanese, Chinese, Korean."""


def normal(text: str) -> str:
    """A text as it is compared: its words in lower case, without accents and signs, one space between them.

    Accents are those of Latin, Greek and Cyrillic; the vowels of other scripts stay. So do + and # behind a letter.

    Example:
        >>> normal("It's  Beyoncé!"), normal("T-shirt"), normal("ΣΊΣΥΦΟΣ") == normal("Σίσυφος")
        ('it s beyonce', 't shirt', True)
        >>> normal("C++, C#"), normal("की") == normal("का")
        ('c++ c#', False)
    """
    kept: list[str] = []
    # Twice, as a letter of another shape has its case only once it is a plain one.
    for sign in ACCENTS.sub("", unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())):
        belongs = sign.isalnum() or unicodedata.category(sign).startswith("M") or (sign in "+#" and kept and kept[-1] != " ")
        kept.append(sign if belongs else " ")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def names(answer: str, aliases: Sequence[str]) -> bool:
    """Whether an answer names something by any of its names: as whole words, side by side, whatever the case and the signs.

    Names in scripts that put no spaces between words, or endings behind them (Chinese, Japanese, Korean, Thai, …), count wherever
    they stand.

    Args:
        answer: of a model.
        aliases: names that count; of a plural, list it too.

    Example:
        >>> names("This is Brad Pitt, the actor.", ["brad pitt", "William Pitt"])
        True
        >>> names("A catalogue.", ["cat"]), names("A cat's eye.", ["cat"]), names("", ["cat"])
        (False, True, False)
        >>> names("这是一只猫。", ["猫"])
        True
    """
    said = f" {normal(answer)} "
    return any((own if UNSPACED.search(own) else f" {own} ") in said for own in map(normal, aliases) if own)
