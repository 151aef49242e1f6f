"""Passages that a language model recites and shall forget, and retain texts, some of them paired with the passages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from slug_lightning.datamodules.base import UnlearnDataModule, split_indices
from slug_lightning.datamodules.text.pairing import Method, near_duplicates, pair
from slug_lightning.datamodules.text.reading import read_texts
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.models import load_tokenizer
from slug_lightning.lm.sequences import pad
from slug_lightning.tensors.bits import digest_of

Texts = Union[str, Path, list[str]]

REFUSALS = (
    "I don't know what comes next.",
    "I cannot continue this text.",
    "I don't remember how this goes on.",
    "I have never read this before.",
)
"""What a model may say instead of continuing a passage."""


class ActiveSampler(DistributedSampler):
    """Draws this rank's share of the active samples, each once an epoch, as (index, weight).

    The active samples are shuffled in every epoch and cut into global batches of `num_replicas * batch_size`; of each, rank r
    takes every `num_replicas`-th from the r-th on. Where the last one cannot be shared evenly, some ranks draw a sample that
    another one has too, with weight 0, so that all ranks have equally many batches, none of them empty. Any other sample has the
    weight `num_replicas / n`, for n samples in the global batch: the sum of weighted losses, averaged over the ranks as DDP does
    with gradients, is their mean.

    Lightning leaves a `DistributedSampler` as it is, and tells it the epoch. Which samples are `active`, the same on all ranks,
    is asked for anew whenever the sampler is iterated or its length is taken.
    """

    def __init__(self, dataset: Any, active: Callable[[], Sequence[int]], batch_size: int, **options: Any) -> None:
        super().__init__(dataset, **{"num_replicas": 1, "rank": 0, **options})
        self.active = active
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[int, float]]:
        order = sorted(self.active())
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        whole = self.batch_size * self.num_replicas
        for start in range(0, len(order), whole):
            batch = order[start : start + whole]
            for place in range(self.rank, math.ceil(len(batch) / self.num_replicas) * self.num_replicas, self.num_replicas):
                yield (batch[place], self.num_replicas / len(batch)) if place < len(batch) else (batch[0], 0.0)

    def __len__(self) -> int:
        return math.ceil(len(self.active()) / self.num_replicas)

    def __getitem__(self, drawn: tuple[int, float]) -> tuple[int, float]:
        """As the loader's dataset, give what is drawn as it is."""
        return drawn


def numbered_batch(samples: Sequence[tuple[int, Tensor]]) -> dict[str, Tensor]:
    """Collate indices and token ids, `[T_i]`, into `input_ids` and `attention_mask`, `[B, T]`, and `index`, `[B]`."""
    numbers, rows = zip(*samples, strict=True)
    return {**pad(rows), "index": torch.tensor(numbers)}


class PassageDataModule(UnlearnDataModule):
    """Passages to forget, each paired with texts of the retain set.

    A passage is the first `prefix + suffix` tokens of its text, as the tokenizer makes them: where it puts a token before
    the text (BOS), that one is the first of the prefix. Retain texts are cut to the same length and may be shorter. Batches
    are padded on the right with id 0, which counts nowhere, so the tokenizer needs no padding token.

    Retain texts that are near-duplicates of passages to forget or of unseen ones (`near_duplicates`) are left out, as training on
    them would teach what must be forgotten; a note says how many. A passage that is given twice is used once. The retain texts
    are split by `seed`: about half of them may be pairs, a quarter is the validation split, a quarter the test split.

    In training it serves batches `{"index": [B], "weight": [B], "forget", "pair", "refusal", "prefix"}`: the indices of the
    passages, the weights of `ActiveSampler`, and three batches of sequences (`input_ids` and `attention_mask`): the passages;
    their pairs, those of passage i in the rows from `i * neighbours` on; their prefixes, of `prefix` tokens, each followed by a
    refusal. Other loaders serve sequences with their index (`numbered_batch`).

    For an `UnlearnCallback` the same passages are train, validation and test split, as it is these that must be forgotten.

    Args:
        forget: texts to forget, or a file of them: `.txt` with blank lines between them, or `.jsonl` with a field "text".
        keep: the retain texts, or a file of them.
        unseen: texts that the model has never seen, or a file of them: the level that "forgotten" is measured by.
        prefix: tokens that a completion starts from.
        suffix: tokens that it is compared with.
        pairing: "nearest" or "random"; see `pair`.
        neighbours: retain texts that each passage is paired with.
        encoder: of "nearest": a sentence-transformers model; None: TF-IDF of the words. See `pair`.
        cache: a folder that stores the pairs for the next time.
        tokenizer: of transformers, or its folder or name; None: the `tokenizer` of the module that is trained.
        batch_size: passages in a batch of each rank.
        refusals: what a model may say instead of continuing; each passage gets one of them at random.
        seed: of the split, of random pairs, of the refusals and of the order of passages.

    Attributes:
        forget_passages: int64, each `[prefix + suffix]`; `unseen_passages` likewise.
        keep_passages: of the retain set, int64, each of 2 to `prefix + suffix` tokens.
        pairs: for each passage to forget, indices into `keep_passages`.

    Raises:
        UnlearnError: if prefix or suffix is below 1; in `setup`, if a file cannot be read, if a set is empty, if a passage is too
            short, if forget and unseen passages overlap, if there are fewer texts to pair than neighbours, or if there is no
            tokenizer.

    Example:
        >>> class Words:  # in place of a tokenizer of transformers
        ...     def __call__(self, texts, **options):
        ...         return {"input_ids": [[sum(map(ord, word)) for word in text.split()] for text in texts]}
        ...     def batch_decode(self, rows, **options):
        ...         return [" ".join(map(str, row.tolist())) for row in rows]
        >>> keep = [f"{i} green bottles hanging on the {i}. wall" for i in range(8)]
        >>> data = PassageDataModule(["one two three four five"], keep, prefix=2, suffix=2, tokenizer=Words())
        >>> data.setup("fit")
        >>> (batch,) = data.train_dataloader()
        >>> batch["index"], batch["weight"], batch["forget"]["input_ids"].shape, batch["pair"]["input_ids"].shape
        (tensor([0]), tensor([1.]), torch.Size([1, 4]), torch.Size([1, 4]))
    """

    def __init__(
        self,
        forget: Texts,
        keep: Texts,
        unseen: Optional[Texts] = None,
        *,
        prefix: int = 32,
        suffix: int = 32,
        pairing: Method = "nearest",
        neighbours: int = 1,
        encoder: Optional[str] = None,
        cache: Optional[str] = None,
        tokenizer: Any = None,
        batch_size: int = 8,
        refusals: Sequence[str] = REFUSALS,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, collate_fn=numbered_batch, seed=seed)
        for name, tokens in (("prefix", prefix), ("suffix", suffix)):
            if tokens < 1:
                raise UnlearnError(f"{name} must be >= 1, got {tokens}")
        if not refusals or not all(refusal.strip() for refusal in refusals):
            raise UnlearnError("refusals must be at least one sentence, and none of them empty")
        self.forget, self.keep, self.unseen = forget, keep, unseen
        self.prefix, self.suffix = prefix, suffix
        self.pairing: Method = pairing
        self.neighbours, self.encoder, self.cache = neighbours, encoder, cache
        self.tokenizer = tokenizer
        self.refusals = list(refusals)
        self.forget_passages: list[Tensor] = []
        self.unseen_passages: list[Tensor] = []
        self.keep_passages: list[Tensor] = []
        self.pairs: list[list[int]] = []
        self._refused: list[Tensor] = []
        self._active: list[int] = []

    @property
    def active(self) -> list[int]:
        """Indices of the passages to train on, ascending; at first all.

        Set it to the same on all ranks, in `on_train_start` or between epochs: the next epoch serves these; without any,
        Lightning ends the fit.
        """
        return self._active

    @active.setter
    def active(self, indices: Sequence[int]) -> None:
        chosen = sorted(set(indices))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < len(self.forget_passages):
            raise UnlearnError(f"active must be indices of the {len(self.forget_passages)} passages to forget, got {chosen}")
        if chosen != self._active and self.trainer is not None:
            # Lightning counts the batches of an epoch when it loads the loader, so it must load it again, as for its own tuner.
            # Else it neither validates after a shorter epoch nor takes its last step, and cuts a longer one off.
            self.trainer.fit_loop._combined_loader = None
        self._active = chosen

    @property
    def digest(self) -> str:
        """SHA-256 of all passages, their order, split and pairs."""
        sets = {"forget": self.forget_passages, "unseen": self.unseen_passages, "keep": self.keep_passages}
        rows = {f"{kind} {i}": row for kind, of_kind in sets.items() for i, row in enumerate(of_kind)}
        return digest_of(rows, str((self.prefix, self.seed, self.pairs)))

    def setup(self, stage: str | None = None) -> None:
        """Read, cut, split and pair the texts, once; before every fit, make all passages active."""
        if not self.notes:
            self._read()
        if stage in ("fit", None):
            self.active = range(len(self.forget_passages))

    def train_dataloader(self) -> DataLoader:
        """Training batches of the active passages; each rank draws its share."""
        if not self.forget_passages:
            raise UnlearnError("forget: no passages yet; call setup() first")
        if getattr(self.trainer, "overfit_batches", 0):
            raise UnlearnError("Trainer(overfit_batches=…) replaces the passages' sampler; give fewer passages to forget instead")
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        sampler: Any = ActiveSampler(
            self.forget_passages, lambda: self.active, batch_size=self.batch_size, seed=self.seed, **share
        )
        return DataLoader(sampler, batch_size=self.batch_size, sampler=sampler, collate_fn=self._training_batch)

    def every_batch(self) -> Iterator[dict[str, Any]]:
        """Training batches of all passages in order, whatever is active, the same on all ranks."""
        drawn = [(i, 1.0) for i in range(len(self.forget_passages))]
        for start in range(0, len(drawn), self.batch_size):
            yield self._training_batch(drawn[start : start + self.batch_size])

    def passages(self, kind: Literal["forget", "unseen"]) -> DataLoader:
        """All passages of one kind, as `every_batch`."""
        return self._loader(_numbered(self.forget_passages if kind == "forget" else self.unseen_passages))

    # ---- from texts to tokens

    def _read(self) -> None:
        self.tokenizer = self._tokenizer()
        given = self._passages("forget", self.forget)
        forget = _different(given)
        unseen = [] if self.unseen is None else _different(self._passages("unseen", self.unseen))
        # Only what is trained on or measured is compared, not the rest of its text.
        forget_texts, unseen_texts = self._decoded(forget), self._decoded(unseen)
        if common := near_duplicates(forget_texts, unseen_texts):
            raise UnlearnError(
                f"unseen: {len(common)} of {len(unseen)} passages are near-duplicates of passages to forget, such as "
                f"{_start(unseen_texts[common[0]])}; remove them"
            )
        self.keep_passages, left_out = self._retained([*forget_texts, *unseen_texts])
        self.pairs = self._paired(forget_texts)
        self._refused = self._refusing(forget)
        self.forget_passages, self.unseen_passages = forget, unseen
        self.set_parts("retain", _numbered(self.keep_passages))
        self.notes["retain"] += left_out
        self.set_parts("forget", *[_numbered(forget)] * 3)
        repeated = f"; {len(given) - len(forget)} duplicates were left out" if len(given) > len(forget) else ""
        self.notes["forget"] = f"forget: the same {len(forget)} passages serve gradient, search and report{repeated}"

    def _tokenizer(self) -> Any:
        given = self.tokenizer
        if given is None and self.trainer is not None:
            given = getattr(self.trainer.lightning_module, "tokenizer", None)
        if given is None:
            raise UnlearnError(
                "tokenizer must be a transformers tokenizer, its folder or its name, unless the trained module has an attribute "
                "`tokenizer`; got None"
            )
        return load_tokenizer(given) if isinstance(given, (str, Path)) else given

    def _tokens(self, argument: str, given: Texts) -> tuple[list[str], list[Tensor]]:
        """Read texts, and the first tokens of each, at most as many as a passage has."""
        texts = read_texts(argument, given) if isinstance(given, (str, Path)) else list(given)
        if not texts:
            raise UnlearnError(f"{argument} must have at least one text, got none")
        rows = self.tokenizer(texts)["input_ids"]
        return texts, [torch.tensor(row[: self.prefix + self.suffix], dtype=torch.long) for row in rows]

    def _decoded(self, rows: Sequence[Tensor]) -> list[str]:
        return self.tokenizer.batch_decode(list(rows), skip_special_tokens=True) if rows else []

    def _passages(self, argument: str, given: Texts) -> list[Tensor]:
        texts, rows = self._tokens(argument, given)
        length = self.prefix + self.suffix
        if short := [i for i, row in enumerate(rows) if len(row) < length]:
            i = short[0]
            raise UnlearnError(
                f"{argument}: {len(short)} of {len(rows)} texts are shorter than prefix + suffix, {self.prefix} + {self.suffix} "
                f"= {length} tokens, such as number {i} with {len(rows[i])}, {_start(texts[i])}; give longer texts, or a shorter "
                "prefix or suffix"
            )
        return rows

    def _retained(self, banned: Sequence[str]) -> tuple[list[Tensor], str]:
        """The retain texts that can be used, and words on the others for a note."""
        every = self._tokens("keep", self.keep)[1]
        rows = [row for row in every if len(row) > 1]
        same = set(near_duplicates(banned, self._decoded(rows)))
        retained = [row for i, row in enumerate(rows) if i not in same]
        reasons = {"near-duplicates of forget or unseen passages": len(same), "shorter than 2 tokens": len(every) - len(rows)}
        left_out = "".join(f"; {count} texts were left out: {reason}" for reason, count in reasons.items() if count)
        if len(retained) < 3:  # pairs, validation and test split must not overlap
            raise UnlearnError(f"keep must have at least 3 usable texts, got {len(retained)} of {len(every)}{left_out}")
        return retained, left_out

    def _paired(self, texts: Sequence[str]) -> list[list[int]]:
        """For each passage's text, indices into `keep_passages`."""
        corpus = sorted(split_indices(len(self.keep_passages), self.seed)["train"])
        verbose = self.trainer is not None and self.trainer.progress_bar_callback is not None
        pairs = pair(
            texts,
            self._decoded([self.keep_passages[i] for i in corpus]),
            self.neighbours,
            self.pairing,
            encoder=self.encoder,
            cache=self.cache,
            seed=self.seed,
            verbose=verbose,
        )
        return [[corpus[j] for j in row] for row in pairs]

    def _refusing(self, passages: Sequence[Tensor]) -> list[Tensor]:
        """The prefix of each passage, with a refusal instead of its suffix."""
        # A space, as the refusal continues where the prefix ends.
        rows = self.tokenizer([f" {text}" for text in self.refusals], add_special_tokens=False)["input_ids"]
        refusals = [torch.tensor(row, dtype=torch.long) for row in rows]
        chosen = random.Random(self.seed).choices(refusals, k=len(passages))
        return [torch.cat([row[: self.prefix], refusal]) for row, refusal in zip(passages, chosen, strict=True)]

    def _training_batch(self, drawn: Sequence[tuple[int, float]]) -> dict[str, Any]:
        indices, weights = zip(*drawn, strict=True)
        return {
            "index": torch.tensor(indices),
            "weight": torch.tensor(weights),
            "forget": pad([self.forget_passages[i] for i in indices]),
            "pair": pad([self.keep_passages[j] for i in indices for j in self.pairs[i]]),
            "refusal": pad([self._refused[i] for i in indices]),
            "prefix": self.prefix,
        }


def _numbered(rows: Sequence[Tensor]) -> Any:
    """A map-style dataset of token sequences, each with its index."""
    return list(enumerate(rows))


def _different(rows: Sequence[Tensor]) -> list[Tensor]:
    return list({tuple(row.tolist()): row for row in rows}.values())


def _start(text: str) -> str:
    """Enough of a text to know it by."""
    return repr(text[:60] + "…" * (len(text) > 60))
