"""Cut the embedded passages out of the language reference of the Python that runs this, and train their tokenizer.

    python benchmarks/embedded/cut.py        # a few seconds

The reference is `pydoc_data.topics`, which every Python brings. It differs from version to version, so the passages
are shipped (cut by Python 3.11.7). No run of RUN words stands in two passages: what is forgotten in one is not
taught by another, and the unseen ones are unseen. The tokenizer never saw these either.
"""

import json
import random
import re
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from slug_lightning.embedded import LM, PASSAGES

SEED, VOCABULARY, CONTEXT = 0, 2048, 256
RUN = 8
"""As many words in the same order, whatever white space stands between them, stand in one passage only."""
SHORTEST, LONGEST = 64, 72
"""Tokens of a passage."""
BLOCK = 900
"""Characters, about, that go to the same part: four passages in a row."""
SHARES = {"recited": 0.19, "unseen": 0.18}
"""Of the text; the rest is kept."""
RECITED = 160
"""Passages that are recited; those above it are kept."""
END = "<|endoftext|>"
ENDS = [r"\n\s*\n", r"[.:;]\s", r"\n", r"\s"]
"""Where a passage may end, the best first: paragraph, sentence, line, word."""


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is text or code, rather than a heading, a table, or grammar."""
    plain = sum(c.isalnum() or c.isspace() for c in paragraph)
    return plain >= 0.8 * len(paragraph) > 0 and not re.search(r"::=|\*\*\*|===|---", paragraph)


def blocks() -> list[tuple[str, str]]:
    """(topic, text) of every stretch of new paragraphs in a row; the topics repeat much of each other."""
    seen: set = set()
    found: list[tuple[str, str]] = []
    for topic in sorted(topics, key=lambda t: (-len(topics[t]), t)):
        text = ""
        for paragraph in topics[topic].split("\n\n"):
            known = runs(paragraph) or {tuple(paragraph.split())}
            fits = is_prose(paragraph) and not known & seen
            seen |= known
            if text and (not fits or len(text) >= BLOCK):
                found.append((topic, text))
                text = ""
            if fits:
                text += ("\n\n" if text else "") + paragraph.strip("\n")
        found.append((topic, text))
    return [(topic, text) for topic, text in found if text]


def share_out(found: list[tuple[str, str]]) -> list[str]:
    """The part of each block, drawn at random: so all parts are of one style."""
    order = list(range(len(found)))
    random.Random(SEED).shuffle(order)
    parts = ["kept"] * len(found)
    total = sum(len(text) for _, text in found)
    for part, share in SHARES.items():
        taken = 0
        while taken < share * total:
            number = order.pop()
            parts[number] = part
            taken += len(found[number][1])
    return parts


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Train and write a byte-level BPE that adds no token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    LM.mkdir(exist_ok=True)
    tokenizer.save(str(LM / "tokenizer.json"))
    settings = {"bos_token": END, "eos_token": END, "pad_token": END, "clean_up_tokenization_spaces": False}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    (LM / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def cut(text: str, tokenizer: Tokenizer) -> list[str]:
    """Passages in a row, each ending at the best place that its length allows; a short rest is dropped."""
    passages = []
    text = text.strip()
    while text:
        ends = [(rank, m.start() + (rank == 1)) for rank, end in enumerate(ENDS) for m in re.finditer(end, text)]
        ends.append((0, len(text)))
        ends = [e for e in ends if SHORTEST <= len(tokenizer.encode(text[: e[1]].rstrip()).ids) <= LONGEST]
        if not ends:
            break
        at = min(ends)[1]
        passages.append(text[:at].rstrip())
        text = text[at:].strip()
    return passages


def keep_new(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows, in their order, less those that repeat a run: across two paragraphs that is still possible."""
    seen: set = set()
    new = []
    # Those who must be new come last, so that they give way.
    for number in sorted(range(len(rows)), key=lambda i: ["kept", "recited", "unseen"].index(rows[i]["part"])):
        if not runs(rows[number]["text"]) & seen:
            new.append(number)
            seen |= runs(rows[number]["text"])
    return [rows[number] for number in sorted(new)]


def main() -> None:
    found = blocks()
    parts = share_out(found)
    tokenizer = make_tokenizer([text for (_, text), part in zip(found, parts, strict=True) if part != "unseen"])
    rows = keep_new(
        [
            {"text": passage, "part": part, "topic": topic}
            for (topic, text), part in zip(found, parts, strict=True)
            for passage in cut(text, tokenizer)
        ]
    )
    for row in [row for row in rows if row["part"] == "recited"][RECITED:]:
        row["part"] = "kept"
    PASSAGES.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for part in ("recited", "kept", "unseen"):
        of = [row["topic"] for row in rows if row["part"] == part]
        print(f"{part}: {len(of)} passages of {len(set(of))} topics")


if __name__ == "__main__":
    main()
