"""Whether an answer mentions what it was asked about."""

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


def normalise(text: str) -> str:
    """Reduce a text to its words in lower case, without accents and signs, one space between them.

    Accents are those of Latin, Greek and Cyrillic; the vowels of other scripts stay. So do + and # behind a letter.
    """
    kept: list[str] = []
    # Decomposed twice, as a letter in another shape has a case only once it is a plain one.
    for sign in ACCENTS.sub("", unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())):
        belongs = sign.isalnum() or unicodedata.category(sign).startswith("M") or (sign in "+#" and kept and kept[-1] != " ")
        kept.append(sign if belongs else " ")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def mentions(answer: str, aliases: Sequence[str]) -> bool:
    """Whether an answer contains one of the aliases as whole words next to each other, whatever the case and the signs.

    Aliases in scripts that put no spaces between words, or endings behind them (Chinese, Japanese, Korean, Thai, …), count
    anywhere; an end of such an alias that is in another script, as of "iPhone手机", must still be the end of a word. List
    plurals as aliases of their own.

    Example:
        >>> mentions("This is Brad Pitt, the actor.", ["brad pitt", "William Pitt"])
        True
        >>> mentions("A catalogue.", ["cat"]), mentions("A cat's eye.", ["cat"]), mentions("", ["cat"])
        (False, True, False)
        >>> mentions("这是一只猫。", ["猫"]), mentions("我的iPhone手机", ["iPhone手机"]), mentions("01 ก", ["1 ก"])
        (True, True, False)
    """
    said = normalise(answer)
    return any(_contains(said, alias) for alias in map(normalise, aliases) if alias)


def _contains(said: str, alias: str) -> bool:
    """Whether an alias is in an answer; both are normalised."""
    if not UNSPACED.search(alias):
        return f" {alias} " in f" {said} "
    start = "" if UNSPACED.match(alias[0]) else f"(?<!{_SPACED})"
    end = "" if UNSPACED.match(alias[-1]) else f"(?!{_SPACED})"
    return re.search(f"{start}{re.escape(alias)}{end}", said) is not None
