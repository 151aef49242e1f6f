"""Pair each text to forget with texts of the retain set."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

from slug_lightning.errors import UnlearnError
from slug_lightning.tensors.file_store import cache_path, read_entry, write_entry
from slug_lightning.utils.optional_imports import import_optional

Method = Literal["nearest", "random"]

WORDS = 3
"""Words in a sequence that two texts are compared by."""
SHARED = 0.5
"""Share of common word sequences from which on two texts are near-duplicates."""


def near_duplicates(texts: Sequence[str], corpus: Sequence[str]) -> list[int]:
    """Find the texts of a corpus that nearly duplicate one of some texts: indices into the corpus, ascending.

    They do if at least half of the sequences of three words in the shorter one are also in the other, whatever the case, white
    space and punctuation. So a text is found that was edited (each changed word costs three sequences), that contains one of the
    texts or is contained in it, or was cut from the same source less than half its length off. The shorter one decides, since a
    long text that contains a passage to forget teaches it as well as the passage alone. Unrelated texts, even of one field,
    share only a few stock phrases. Words are runs of letters and digits: in a language without spaces, edited texts are rarely
    found.
    """
    grams = [_grams(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, own in enumerate(grams):
        for gram in own:
            holders[gram].append(i)
    found = []
    for j, text in enumerate(corpus):
        own = _grams(text)
        common: dict[int, int] = defaultdict(int)
        for gram in own:
            for i in holders.get(gram, ()):
                common[i] += 1
        if any(count >= SHARED * min(len(own), len(grams[i])) for i, count in common.items()):
            found.append(j)
    return found


def pair(
    forget: Sequence[str],
    corpus: Sequence[str],
    k: int = 1,
    method: Method = "nearest",
    *,
    encoder: Optional[str] = None,
    cache: Optional[Union[str, Path]] = None,
    seed: int = 0,
    verbose: bool = False,
) -> list[list[int]]:
    """Choose k retain texts for each text to forget; never a near-duplicate of a text to forget (`near_duplicates`).

    Gives for each k indices into the corpus, all different, the nearest first; texts that are equally near come in the order of
    the corpus. The same input gives the same pairs.

    Args:
        forget: texts to forget.
        corpus: the retain texts.
        k: how many to choose for each; refused if there are fewer.
        method: "nearest" by the cosine between two texts, or "random", the control.
        encoder: of texts: a sentence-transformers model, as a folder or a name, which that library downloads where needed. None:
            TF-IDF of the words, by scikit-learn; the default whatever is installed, so that nothing is downloaded unasked.
        cache: a folder that stores the pairs for the next time. They are found there only for the same texts, method, encoder
            (a folder by its content, a name by the name), k and seed. A damaged file is made anew, with a warning.
        seed: of "random".
        verbose: whether sentence-transformers shows its progress.
    """
    if k < 1:
        raise UnlearnError(f"neighbours must be >= 1, got {k}")
    if method not in ("nearest", "random"):
        raise UnlearnError(f"pairing must be 'nearest' or 'random', got {method!r}")
    path = None
    if cache is not None:
        key = _key(forget, corpus, k, method, encoder, seed)
        path = cache_path(cache, "pairs", key)
        if (found := read_entry(path, key)) is not None:
            return found.data
    excluded = set(near_duplicates(forget, corpus))
    candidates = [i for i in range(len(corpus)) if i not in excluded]
    if len(candidates) < k:
        raise UnlearnError(
            f"neighbours must be <= {len(candidates)}, got {k}: {len(excluded)} of {len(corpus)} retain texts are near-duplicates"
            " of texts to forget; add retain texts, or ask for fewer neighbours"
        )
    if method == "random":
        pairs = [random.Random(f"{seed} {i}").sample(candidates, k) for i in range(len(forget))]
    else:
        vectors = _tf_idf(forget, corpus) if encoder is None else _embeddings(encoder, forget, corpus, verbose)
        pairs = [[candidates[j] for j in row] for row in _nearest(vectors[0], vectors[1][candidates], k)]
    if path is not None:
        write_entry(path, key, pairs, {})
    return pairs


def _grams(text: str) -> set[tuple[str, ...]]:
    """The word sequences of a text; a text of fewer words is one sequence."""
    words = re.findall(r"\w+", text.casefold()) or text.split()
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


# ---- vectors, and which are near


def _tf_idf(forget: Sequence[str], corpus: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF vectors, with the document frequencies of the corpus."""
    words = import_optional("sklearn.feature_extraction.text", "lm").TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    try:
        words.fit(corpus)
    except ValueError as error:
        raise UnlearnError(f"pairing: no retain text has a word ({error}); give an encoder, or pair at random") from error
    return words.transform(forget), words.transform(corpus)


def _embeddings(encoder: str, forget: Sequence[str], corpus: Sequence[str], verbose: bool) -> tuple[Any, Any]:
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(encoder)
    except ImportError as error:
        raise UnlearnError(
            f"encoder: cannot import sentence-transformers ({error}); pip install sentence-transformers"
        ) from error
    except (OSError, ValueError) as error:
        raise UnlearnError(
            f"encoder: {encoder!r} cannot be loaded ({error}); give the folder or the name of a sentence-transformers model"
        ) from error
    forget_vectors, corpus_vectors = (model.encode(list(texts), show_progress_bar=verbose) for texts in (forget, corpus))
    return forget_vectors, corpus_vectors


def _nearest(queries: Any, vectors: Any, k: int) -> list[list[int]]:
    """Indices of the k vectors nearest to each query by cosine, compared in chunks that fit into memory."""
    import numpy as np

    def first(distances: Any, start: int) -> Any:
        # Rounded, as equal vectors may differ in the last bits by where they stand in a matrix product.
        return np.argsort(distances.round(6), axis=1, kind="stable")[:, :k]

    chunked = import_optional("sklearn.metrics", "lm").pairwise_distances_chunked
    return np.concatenate(list(chunked(queries, vectors, metric="cosine", reduce_func=first))).tolist()


def _key(forget: Sequence[str], corpus: Sequence[str], k: int, method: str, encoder: str | None, seed: int) -> str:
    """Digest all that pairs depend on."""
    files = sorted(path for path in Path(encoder).rglob("*") if path.is_file()) if encoder and Path(encoder).is_dir() else []
    content = [(path.relative_to(str(encoder)).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    everything = [WORDS, SHARED, list(forget), list(corpus), k, method, content or encoder, seed]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()
