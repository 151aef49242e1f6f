"""What a text-to-image pipeline is to forget and to keep: pictures with captions for the gradient, prompts for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal, cast

from torch.utils.data import Dataset, Subset

from slug_lightning.datamodules.base import alike, three_parts
from slug_lightning.datamodules.image_text.image_text import ImageTextDataModule, Words
from slug_lightning.datamodules.image_text.pairs import ImageTextPairs, Transform, class_finder, only_class
from slug_lightning.datamodules.text.reading import read_content
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import labelled, listed
from slug_lightning.utils.optional_imports import import_optional

Texts = str | list[str]

Held = Literal["val", "test"]
"""The parts that are drawn: "val" for the search, "test" for the report."""
BLOCK = 1_000_000
"""Seeds of the noise for each seed of a datamodule: half of them for the search, half for the report."""


def noise_seeds(split: Held, count: int, seed: int = 0) -> range:
    """Seeds of the noise that pictures start from; none serves both the search and the report.

    Args:
        split: "val" (search) or "test" (report).
        count: how many, at least 1.
        seed: other seeds for another one.

    Raises:
        UnlearnError: if there are not so many.

    Example:
        >>> noise_seeds("val", 3), noise_seeds("test", 2, seed=1)
        (range(0, 3), range(1500000, 1500002))
    """
    if not 1 <= count <= BLOCK // 2:
        raise UnlearnError(f"search, report: {count} pictures of a prompt cannot be drawn; give at least 1, at most {BLOCK // 2}")
    start = seed * BLOCK + (BLOCK // 2 if split == "test" else 0)
    return range(start, start + count)


class Prompts(Dataset):
    """Prompts to draw and what should be seen on the pictures: the samples of search and report.

    A sample is a dict: "text", the prompt; "seed", of the noise; "steps", of sampling; and under each judge's name the index of
    the right class, or -1 where it is not asked. All prompts are drawn from the first seed, then from the next.

    Args:
        prompts: texts.
        seeds: each prompt is drawn once from each.
        steps: of sampling, at least 1.
        labels: by the judge's name, a class for each prompt.

    Raises:
        UnlearnError: if there are no steps.

    Example:
        >>> data = Prompts(["a cat", "a dog"], range(7, 9), 20, {"animal": [0, 1]})
        >>> len(data), data[3]
        (4, {'text': 'a dog', 'seed': 8, 'steps': 20, 'animal': 1})
    """

    def __init__(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, labels: Mapping[str, Sequence[int]]) -> None:
        if steps < 1:
            raise UnlearnError(f"search_steps, report_steps: {steps} steps draw nothing; give at least 1")
        self.prompts, self.seeds, self.steps, self.labels = list(prompts), seeds, steps, labels

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, number = divmod(index, len(self.prompts))
        own = {kind: classes[number] for kind, classes in self.labels.items()}
        return {"text": self.prompts[number], "seed": self.seeds[turn], "steps": self.steps, **own}


def how_drawn(search: Prompts, report: Prompts) -> str:
    """A part of a note: which prompts are drawn, how often, and in how many steps.

    Example:
        >>> search, report = (Prompts(["a cat"], noise_seeds(split, 3), 20, {}) for split in ("val", "test"))
        >>> how_drawn(search, report)
        'search and report draw the same 1 prompts, 3 and 3 times each, from other seeds, in 20 and 20 steps'
    """
    counts = len(search.prompts), len(report.prompts)
    which = f"the same {counts[0]} prompts" if search.prompts == report.prompts else "{} and {} prompts".format(*counts)
    times = f"{len(search.seeds)} and {len(report.seeds)} times each"
    return f"search and report draw {which}, {times}, from other seeds, in {search.steps} and {report.steps} steps"


class TextToImageDataModule(ImageTextDataModule):
    """What a text-to-image pipeline is to forget and to keep: image-text pairs, and prompts to draw.

    The gradient is taken over pairs of pictures and captions, from files as `ImageTextDataModule` reads them. Search and report
    draw prompts, and judges tell what is seen on the pictures. A judge's name and its classes are in `labels`: the class of a
    prompt is the one that stands in it. Without `labels`, pairs serve search and report, too, as for a module whose metrics are
    its losses.

    Prompts that are given serve both search and report, each with seeds of its own, as half of them might leave classes
    out. Where none are given, captions of pairs that are held out from the gradient serve: some for the search, others for the
    report; those that cannot be judged are passed over.

    Gradient samples are dicts: "image", float32 `[3, size, size]`, RGB in [-1, 1]; "text", the caption; and what is to be
    forgotten has "concept", the words of `concept` as they stand in the caption, or "". For the others see `Prompts`:
    of a forget prompt only `asked` is judged, of a retain prompt all that stands in it.

    Args:
        forget: source of pairs to forget, as in `ImageTextDataModule`; for several concepts, a dict of sources.
        retain: source of pairs to keep.
        data: instead of these, one source for both, which `concept` divides.
        concept: what is to be forgotten, and other names of it, as in `ImageTextDataModule`. With `forget` and `retain` it may
            be left out; if it is given, the captions must name it.
        labels: class names by judge, in the judge's order, such as `{"thing": ["cat", "dog"]}`; None if nothing is drawn.
        asked: which judge tells whether the concept is forgotten; for several concepts perhaps a dict. May be left out
            where there is but one judge.
        forget_prompts: a list of prompts, or a text file with one a line; for several concepts, a dict of such.
        retain_prompts: likewise, of what is to be kept.
        captions: where no prompts are given, how many captions serve as such, in search and report each, at most.
        size: of the pictures, in pixels: the shorter side is resized to it, then the middle is cut out.
        search_seeds: how many pictures of each prompt the search draws.
        report_seeds: likewise of the report.
        search_steps: of sampling, in the search.
        report_steps: of sampling, in the report.
        image_column: of a CSV, the column of image paths.
        caption_column: of a CSV, the column of captions.
        delimiter: of a CSV; None finds it.
        limit: how many pairs to retain at most: the first.
        batch_size: samples in a batch, of the gradient and of the pictures that are drawn at once.
        num_workers: worker processes of each loader.
        seed: of the splits, of the order of samples, and of the noise that pictures are drawn from.

    Raises:
        UnlearnError: if the arguments do not say where the data come from or what is judged, or if a dict has other concepts; in
            `setup`, if a source or a file of prompts cannot be read, if nothing is left to forget or to retain, if captions
            or forget prompts never name the concept, if a prompt names no class, or if a retain prompt names what is to be
            forgotten.

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
        forget: str | dict[str, str] | None = None,
        retain: str | None = None,
        data: str | None = None,
        concept: Words | dict[str, Words] | None = None,
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
        image_column: str = "filepath",
        caption_column: str = "title",
        delimiter: str | None = None,
        limit: int = 10_000,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            forget=forget,
            retain=retain,
            data=data,
            concept=concept,
            transform=picture_transform(size),
            tokenize=list,  # a caption stays a text: each text encoder of a pipeline has a tokenizer of its own
            image_column=image_column,
            caption_column=caption_column,
            delimiter=delimiter,
            limit=limit,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        concepts = self.forget or self.words
        alike("concept", concept, concepts)
        labels = labels or {}
        if not labels and any(given is not None for given in (asked, forget_prompts, retain_prompts)):
            raise UnlearnError("labels: asked or prompts are given, and no judge; give the class names by judge")
        if reserved := [name for name in labels if name in ("text", "seed", "steps")]:
            raise UnlearnError(f"labels: {reserved[0]!r} is the name of another part of a sample; choose another")
        self.judges = {name: class_finder(f"labels: {name}", classes) for name, classes in labels.items()}
        asking = alike("asked", asked, concepts) if isinstance(asked, Mapping) else dict.fromkeys(concepts, asked)
        self.asked = {name: self._judge_of(name, asking.get(name)) for name in concepts if labels}
        self.forget_prompts = alike("forget_prompts", forget_prompts, concepts)
        self.retain_prompts = retain_prompts
        self.captions = captions
        self.seeds: dict[Held, int] = {"val": search_seeds, "test": report_seeds}
        self.steps: dict[Held, int] = {"val": search_steps, "test": report_steps}
        self._gone: set[tuple[str, int]] = set()  # judge and class of each forget prompt

    def _judge_of(self, concept: str | None, asked: str | None) -> str:
        """Who tells whether a concept is forgotten."""
        if asked is None and len(self.judges) == 1:
            (asked,) = self.judges
        if asked not in self.judges:
            told = "nothing was given" if asked is None else f"{asked!r} is none of them"
            raise UnlearnError(
                f"{labelled('asked', concept)}: name the judge in labels, {listed(list(self.judges))}, who tells whether the "
                f"concept is forgotten; {told}"
            )
        return asked

    def set_pairs(self, kind: str, pairs: Dataset, concept: str | None = None) -> None:
        """Set the data of `kind`: pairs for the gradient, prompts for search and report."""
        label = labelled(kind, concept)
        if kind == "forget":
            self._refuse_unnamed(label, "captions", _captions(pairs), concept)
            pairs = _Named(pairs, self.finders.get(concept))
        if not self.judges:
            return self.set_parts(kind, pairs, concept=concept)
        given = self.forget_prompts.get(concept) if kind == "forget" else self.retain_prompts
        texts: dict[Held, list[str]]
        if given is None:
            parts, _ = three_parts(label, pairs, None, None, self.seed)
            texts = {split: self._from_captions(kind, _captions(parts[split]), concept) for split in self.seeds}
            pairs = parts["train"]
        else:
            texts = dict.fromkeys(self.seeds, self._from_prompts(kind, given, concept))
        prompts = [
            Prompts(own, noise_seeds(split, self.seeds[split], self.seed), self.steps[split], self._labels(kind, own, concept))
            for split, own in texts.items()
        ]
        if kind == "forget":
            self._gone.update((self.asked[concept], one) for own in prompts for one in own.labels[self.asked[concept]])
        self.set_parts(kind, pairs, *prompts, concept=concept)
        self.notes[label] += f"; {how_drawn(*prompts)}"

    def _from_prompts(self, kind: str, given: Texts, concept: str | None) -> list[str]:
        """The prompts that were given, each once."""
        argument = labelled(f"{kind}_prompts", concept)
        texts = _different(read_content(argument, given).split("\n") if isinstance(given, str) else given)
        if not texts:
            raise UnlearnError(f"{argument}: there is no prompt; give at least one")
        for text in texts:
            if reason := self._unfit(kind, text, concept):
                raise UnlearnError(f"{argument}: {text!r} {reason}; leave it out, or mend it or labels")
        if kind == "forget":
            self._refuse_unnamed(argument, "prompts", texts, concept)
        return texts

    def _from_captions(self, kind: str, captions: list[str], concept: str | None) -> list[str]:
        """Captions that may serve as prompts, each once."""
        texts = _different(captions)
        fit = [text for text in texts if not self._unfit(kind, text, concept)]
        if not fit:
            reason = f", as {texts[0]!r} {self._unfit(kind, texts[0], concept)}" if texts else ""
            raise UnlearnError(
                f"{labelled(kind, concept)}: of {len(captions)} captions held out for search or report none can serve as a "
                f"prompt{reason}; give {kind}_prompts, or mend labels"
            )
        return fit[: self.captions]

    def _unfit(self, kind: str, text: str, concept: str | None) -> str:
        """Why a text cannot be a prompt; empty if it can."""
        found = {name: find(text) for name, find in self.judges.items()}
        if kind == "forget":
            asked = self.asked[concept]
            return "" if len(found[asked]) == 1 else f"does not name one class of {asked!r} in labels"
        if any(one in found[name] for name, one in self._gone) or any(finder.search(text) for finder in self.finders.values()):
            return "names what is to be forgotten"
        return "" if any(len(classes) == 1 for classes in found.values()) else "does not name one class of any judge in labels"

    def _labels(self, kind: str, texts: list[str], concept: str | None) -> dict[str, list[int]]:
        """The class of each text by judge; of what is to be forgotten, only the judge that is asked has any."""
        judged = self.judges if kind == "retain" else {self.asked[concept]}
        return {name: [only_class(find(text)) if name in judged else -1 for text in texts] for name, find in self.judges.items()}

    def _refuse_unnamed(self, label: str, what: str, texts: list[str], concept: str | None) -> None:
        """Refuse texts none of which names the concept: the gradient would be of something else."""
        finder = self.finders.get(concept)
        if finder is not None and texts and not any(map(finder.search, texts)):
            raise UnlearnError(
                f"{label}: the {what} never name the concept: none of {len(texts)} contains any of {self.words[concept]} as "
                f"whole words, see {texts[0]!r}; add to concept the words they use, or mend the {what}"
            )


class _Named(Subset):
    """Pairs to forget, each with the words of the concept in its caption."""

    def __init__(self, pairs: Dataset, finder: re.Pattern[str] | None) -> None:
        # Of a subset the same rows, so that it can be told which samples concepts share.
        whole, rows = (pairs.dataset, pairs.indices) if isinstance(pairs, Subset) else (pairs, range(len(cast(Sized, pairs))))
        super().__init__(whole, rows)
        self.words = [found.group() if finder and (found := finder.search(text)) else "" for text in _captions(self)]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {**super().__getitem__(index), "concept": self.words[index]}

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def _captions(pairs: Dataset) -> list[str]:
    if isinstance(pairs, Subset):
        whole = _captions(pairs.dataset)
        return [whole[i] for i in pairs.indices]
    return [pair.caption for pair in cast(ImageTextPairs, pairs).pairs]


def _different(texts: Iterable[str]) -> list[str]:
    """Texts that are not empty, each once, with single spaces."""
    return list(filter(None, dict.fromkeys(" ".join(text.split()) for text in texts)))


def picture_transform(size: int) -> Transform:
    """Make a function of a PIL image that gives its middle as a square.

    Args:
        size: of the square in pixels; the image's shorter side is resized to it.

    Returns:
        A function that gives float32 `[3, size, size]`, RGB in [-1, 1].

    Raises:
        UnlearnError: if torchvision is not installed.

    Example:
        >>> from PIL import Image
        >>> picture = picture_transform(8)(Image.new("RGB", (30, 20), (255, 0, 255)))
        >>> picture.shape, picture[:, 0, 0]
        (torch.Size([3, 8, 8]), tensor([ 1., -1.,  1.]))
    """
    vision = import_optional("torchvision.transforms", "clip")
    half = [0.5, 0.5, 0.5]
    return vision.Compose([vision.Resize(size), vision.CenterCrop(size), vision.ToTensor(), vision.Normalize(half, half)])
