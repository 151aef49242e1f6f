"""Whether an answer names what it was asked about."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ACCENTS = re.compile("[\u0300-\u036f]")
"""Combining diacritical marks."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
UNSPACED = re.compile(f"[{_UNSPACED}]")
"""Thai, Lao, Burmese, Khmer, Japanese, Chinese, Korean."""
_SPACED = f"[^ {_UNSPACED}]"


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
    they stand; an end of such a name that is in another script, as of "iPhone手机", must still be the end of a word.

    Args:
        answer: of a model.
        aliases: names that count; of a plural, list it too.

    Example:
        >>> names("This is Brad Pitt, the actor.", ["brad pitt", "William Pitt"])
        True
        >>> names("A catalogue.", ["cat"]), names("A cat's eye.", ["cat"]), names("", ["cat"])
        (False, True, False)
        >>> names("这是一只猫。", ["猫"]), names("我的iPhone手机", ["iPhone手机"]), names("01 ก", ["1 ก"])
        (True, True, False)
    """
    said = normal(answer)
    return any(_stands_in(said, name) for name in map(normal, aliases) if name)


def _stands_in(said: str, name: str) -> bool:
    """Whether a name is in what was said; both are `normal`."""
    if not UNSPACED.search(name):
        return f" {name} " in f" {said} "
    start = "" if UNSPACED.match(name[0]) else f"(?<!{_SPACED})"
    end = "" if UNSPACED.match(name[-1]) else f"(?!{_SPACED})"
    return re.search(f"{start}{re.escape(name)}{end}", said) is not None
