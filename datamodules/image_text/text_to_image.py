"""Data for a text-to-image pipeline: images with captions for the gradient, prompts to draw for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch.utils.data import Dataset, Subset

from slug_lightning.datamodules.base import for_concepts, make_splits
from slug_lightning.datamodules.image_text.image_text import ImageTextDataModule, Texts
from slug_lightning.datamodules.image_text.pairs import Transform, class_finder, only_class
from slug_lightning.datamodules.text.reading import read_content
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import labelled, listed
from slug_lightning.utils.optional_imports import import_optional

Held = Literal["val", "test"]
"""The splits that are drawn."""
BLOCK = 1_000_000
"""Noise seeds for each seed of a datamodule: half of them for validation, half for test."""


def noise_seeds(split: Held, count: int, seed: int = 0) -> range:
    """Return the seeds of the noise that images start from, different ones for each split and each `seed`."""
    if not 1 <= count <= BLOCK // 2:
        raise UnlearnError(f"search, report: the number of images per prompt must be from 1 to {BLOCK // 2}, got {count}")
    start = seed * BLOCK + (BLOCK // 2 if split == "test" else 0)
    return range(start, start + count)


class Prompts(Dataset):
    """Prompts to draw, and what should be seen in the images: the samples of validation and test split.

    A sample is a dict: "text", the prompt; "seed", of the noise; "steps", of sampling; and under each judge's name the index
    of the right class, or -1 if the judge is not asked. All prompts are drawn from the first seed, then from the next. `labels`
    has a class for each prompt, by judge.
    """

    def __init__(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, labels: Mapping[str, Sequence[int]]) -> None:
        if steps < 1:
            raise UnlearnError(f"search_steps, report_steps: must be >= 1, got {steps}")
        self.prompts, self.seeds, self.steps, self.labels = list(prompts), seeds, steps, labels

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, number = divmod(index, len(self.prompts))
        own = {kind: classes[number] for kind, classes in self.labels.items()}
        return {"text": self.prompts[number], "seed": self.seeds[turn], "steps": self.steps, **own}


def how_drawn(val: Prompts, test: Prompts) -> str:
    """Write the part of a note on which prompts are drawn, how often, and in how many steps."""
    first, second = len(val.prompts), len(test.prompts)
    which = f"the same {first} prompts" if val.prompts == test.prompts else f"{first} and {second} prompts"
    times = f"{len(val.seeds)} and {len(test.seeds)} times each"
    return f"validation and test split draw {which}, {times}, from different seeds, in {val.steps} and {test.steps} steps"


class TextToImageDataModule(ImageTextDataModule):
    """Data for a text-to-image pipeline: image-text pairs, and prompts to draw.

    The gradient is taken over images with captions, from files as `ImageTextDataModule` reads them. Validation and test split
    have prompts to draw, and judges (image classifiers) tell what the images show. A judge's name and its classes are in
    `labels`: the class of a prompt is the one that its text names. Without `labels`, all three splits have pairs, for a module
    whose metrics are its losses.

    Given prompts serve both splits, each with seeds of its own, as half of them might leave classes out. If none are given,
    captions of pairs that are held out from the gradient serve, different ones in the two splits; captions that cannot be
    judged are skipped.

    Training samples are dicts: "image", float32 `[3, size, size]`, RGB in [-1, 1]; "text", the caption; and in the forget set
    "concept", the words of `concept` as they appear in the caption, or "". For the others see `Prompts`: a forget prompt is
    judged by `asked` alone, a retain prompt by all judges.

    Args:
        labels: class names by judge, in the judge's order, such as `{"thing": ["cat", "dog"]}`; None if nothing is drawn.
        asked: which judge decides whether the concept is forgotten; for several concepts, optionally a dict. Not needed if
            there is one judge.
        forget_prompts: a list of prompts, or a text file with one per line; for several concepts, a dict of these.
        retain_prompts: likewise, to retain.
        captions: if no prompts are given, how many captions serve as prompts at most, in each of the two splits.
        size: of the images, in pixels: the shorter side is resized to it, then the center is cropped.
        search_seeds: images per prompt in the validation split.
        report_seeds: images per prompt in the test split.
        search_steps: sampling steps in the validation split.
        report_steps: sampling steps in the test split.
        batch_size: samples in a batch, also of the images that are drawn at once.
        options: `forget`, `retain`, `data`, `concept`, the columns, `limit`, `num_workers` and `seed` (which seeds the noise,
            too) of `ImageTextDataModule`. `concept` may be left out if `forget` and `retain` are given; otherwise the
            captions must name it.

    Raises:
        UnlearnError: if an argument is missing or two contradict each other; in `setup`, if a file cannot be read, if nothing is
            left to forget or to retain, if captions or forget prompts never name the concept, if a prompt names no class, or if
            a retain prompt names what to forget.

    Example:
        >>> from slug_lightning.embedded import SHARD
        >>> data = TextToImageDataModule(
        ...     data=str(SHARD), concept=["octopus", "octopuses"], limit=100, labels={"thing": ["octopus", "cat", "dog"]},
        ...     forget_prompts=["a picture of octopus"], retain_prompts=["a cat", "a dog"], size=32,
        ... )
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("train")))
        >>> batch["image"].shape, batch["text"][0], batch["concept"][0]
        (torch.Size([4, 3, 32, 32]), 'octopus in firefox style', 'octopus')
        >>> next(iter(data.retain_dataloader("val")))
        {'text': ['a cat', 'a dog'], 'seed': tensor([0, 0]), 'steps': tensor([10, 10]), 'thing': tensor([1, 2])}
    """

    combinations = (*ImageTextDataModule.combinations, {"forget", "retain", "concept"})

    def __init__(
        self,
        *,
        labels: dict[str, list[str]] | None = None,
        asked: str | dict[str, str] | None = None,
        forget_prompts: Texts | dict[str, Texts] | None = None,
        retain_prompts: Texts | None = None,
        captions: int = 50,
        size: int = 512,
        search_seeds: int = 1,
        report_seeds: int = 4,
        search_steps: int = 10,
        report_steps: int = 50,
        batch_size: int = 4,
        **options: Any,
    ) -> None:
        # A caption stays a text: each text encoder of a pipeline has a tokenizer of its own.
        super().__init__(
            model=None,
            pretrained=None,
            transform=picture_transform(size),
            tokenize=list,
            label_columns=None,
            labels=None,
            batch_size=batch_size,
            **options,
        )
        concepts = self.forget or self.words
        labels = labels or {}
        if not labels and any(given is not None for given in (asked, forget_prompts, retain_prompts)):
            raise UnlearnError("labels: asked or prompts are given, but no judge; give the class names by judge")
        if reserved := [name for name in labels if name in ("text", "seed", "steps")]:
            raise UnlearnError(f"labels: {reserved[0]!r} is the name of another part of a sample; choose another")
        self.judges = {name: class_finder(f"labels: {name}", classes) for name, classes in labels.items()}
        asking = for_concepts("asked", asked, concepts) if isinstance(asked, Mapping) else dict.fromkeys(concepts, asked)
        self.asked = {name: self._judge_of(name, asking.get(name)) for name in concepts if labels}
        self.forget_prompts = for_concepts("forget_prompts", forget_prompts, concepts)
        self.retain_prompts, self.captions = retain_prompts, captions
        self.seeds: dict[Held, int] = {"val": search_seeds, "test": report_seeds}
        self.steps: dict[Held, int] = {"val": search_steps, "test": report_steps}
        self._targets: set[tuple[str, int]] = set()  # judge and class of each forget prompt

    def _judge_of(self, concept: str | None, asked: str | None) -> str:
        """Return which judge decides whether a concept is forgotten."""
        if asked is None and len(self.judges) == 1:
            (asked,) = self.judges
        if asked not in self.judges:
            raise UnlearnError(
                f"{labelled('asked', concept)}: must name the judge who decides whether the concept is forgotten, one of "
                f"{listed(list(self.judges))}, got {asked!r}"
            )
        return asked

    def set_pairs(self, kind: str, pairs: Dataset, concept: str | None = None) -> None:
        """Set the splits of one set: pairs in train, prompts in validation and test."""
        label = labelled(kind, concept)
        if kind == "forget":
            self._refuse_unnamed(label, "captions", _captions(pairs), concept)
            pairs = _Named(pairs, self.finders.get(concept))
        if not self.judges:
            return self.set_parts(kind, pairs, concept=concept)
        given = self.forget_prompts.get(concept) if kind == "forget" else self.retain_prompts
        texts: dict[Held, list[str]]
        if given is None:
            splits, _ = make_splits(label, pairs, seed=self.seed)
            texts = {split: self._from_captions(kind, _captions(splits[split]), concept) for split in self.seeds}
            pairs = splits["train"]
        else:
            texts = dict.fromkeys(self.seeds, self._from_prompts(kind, given, concept))
        asked = self.judges if kind == "retain" else {self.asked[concept]}
        prompts = []
        for split, own in texts.items():
            labels = {name: [only_class(find(one)) if name in asked else -1 for one in own] for name, find in self.judges.items()}
            prompts.append(Prompts(own, noise_seeds(split, self.seeds[split], self.seed), self.steps[split], labels))
            if kind == "forget":
                self._targets.update((self.asked[concept], one) for one in labels[self.asked[concept]])
        self.set_parts(kind, pairs, *prompts, concept=concept)
        self.notes[label] += f"; {how_drawn(*prompts)}"

    def _from_prompts(self, kind: str, given: Texts, concept: str | None) -> list[str]:
        """Return the given prompts, each once."""
        argument = labelled(f"{kind}_prompts", concept)
        texts = _distinct(read_content(argument, given).split("\n") if isinstance(given, str) else given)
        if not texts:
            raise UnlearnError(f"{argument}: there is no prompt; give at least one")
        for text in texts:
            if reason := self._unfit(kind, text, concept):
                raise UnlearnError(f"{argument}: {text!r} {reason}; leave it out, or correct it or labels")
        if kind == "forget":
            self._refuse_unnamed(argument, "prompts", texts, concept)
        return texts

    def _from_captions(self, kind: str, captions: list[str], concept: str | None) -> list[str]:
        """Return captions that can serve as prompts, each once."""
        texts = _distinct(captions)
        fit = [text for text in texts if not self._unfit(kind, text, concept)]
        if not fit:
            reason = f", as {texts[0]!r} {self._unfit(kind, texts[0], concept)}" if texts else ""
            raise UnlearnError(
                f"{labelled(kind, concept)}: none of {len(captions)} captions held out for validation or test can serve as a "
                f"prompt{reason}; give {kind}_prompts, or correct labels"
            )
        return fit[: self.captions]

    def _unfit(self, kind: str, text: str, concept: str | None) -> str:
        """Return why a text cannot be a prompt; "" if it can."""
        found = {name: find(text) for name, find in self.judges.items()}
        if kind == "forget":
            asked = self.asked[concept]
            return "" if len(found[asked]) == 1 else f"does not name one class of {asked!r} in labels"
        if any(one in found[name] for name, one in self._targets) or any(finder.search(text) for finder in self.finders.values()):
            return "names what to forget"
        return "" if any(len(classes) == 1 for classes in found.values()) else "does not name one class of any judge in labels"

    def _refuse_unnamed(self, label: str, what: str, texts: list[str], concept: str | None) -> None:
        """Refuse texts none of which names the concept: the gradient would be of something else."""
        finder = self.finders.get(concept)
        if finder is not None and texts and not any(map(finder.search, texts)):
            raise UnlearnError(
                f"{label}: none of {len(texts)} {what} contains any of {self.words[concept]} as whole words, see {texts[0]!r}; "
                f"add the words they use to concept, or correct the {what}"
            )


class _Named(Subset):
    """Pairs to forget, each with the words of the concept in its caption."""

    def __init__(self, pairs: Any, finder: re.Pattern[str] | None) -> None:
        super().__init__(pairs, range(len(pairs)))
        self.words = [found.group() if finder and (found := finder.search(text)) else "" for text in _captions(self)]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {**super().__getitem__(index), "concept": self.words[index]}

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def _captions(pairs: Any) -> list[str]:
    if isinstance(pairs, Subset):
        whole = _captions(pairs.dataset)
        return [whole[i] for i in pairs.indices]
    return [pair.caption for pair in pairs.pairs]


def _distinct(texts: Iterable[str]) -> list[str]:
    """Return the texts that are not empty, each once, with single spaces."""
    return list(filter(None, dict.fromkeys(" ".join(text.split()) for text in texts)))


def picture_transform(size: int) -> Transform:
    """Make a function of a PIL image that resizes its shorter side and crops its center: float32 `[3, size, size]` in [-1, 1]."""
    vision = import_optional("torchvision.transforms", "clip")
    half = [0.5, 0.5, 0.5]
    return vision.Compose([vision.Resize(size), vision.CenterCrop(size), vision.ToTensor(), vision.Normalize(half, half)])
