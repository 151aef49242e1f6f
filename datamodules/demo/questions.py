"""Questions about the embedded pictures, as the embedded vision-language model was taught to answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from slug_lightning.datamodules.demo.emoji import EmojiDataModule, caption_of, parted, render
from slug_lightning.datamodules.image_text.questions import Question, Questions, question_batch, refuse_few_choices, with_choices
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import SPLITS, Split
from slug_lightning.utils.names import labelled

QUESTIONS = {
    "thing": ("what is this?", "what does the picture show?", "what can you see here?", "name the thing in this picture."),
    "style": ("which style is this?", "in which style is it drawn?", "name the style of this picture."),
    "both": ("describe this picture.", "what is this, and in which style is it drawn?"),
    "count": ("how many drawings are there?", "count the drawings."),
}
"""Wordings of a question, by what is asked."""
NUMBERS = ("one", "two")


def answer_of(drawings: Drawings, row: int, asked: str) -> str:
    """The right answer to a question about a single drawing.

    Args:
        drawings: all drawings.
        row: which one.
        asked: a key of `QUESTIONS`.

    Example:
        >>> from slug_lightning.embedded.drawings import load_drawings
        >>> [answer_of(load_drawings(), 0, asked) for asked in QUESTIONS]
        ['airplane', 'blob style', 'airplane in blob style', 'one']
    """
    thing = drawings.thing_names[int(drawings.things[row])]
    style = f"{drawings.style_names[int(drawings.styles[row])]} style"
    return {"thing": thing, "style": style, "both": f"{thing} in {style}", "count": NUMBERS[0]}[asked]


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two drawings in one, each at half its size.

    Args:
        left: RGBA, uint8, `[B, 4, H, W]`.
        right: likewise.

    Returns:
        RGBA, uint8, `[B, 4, H, W]`, transparent above and below.

    Example:
        >>> one = torch.full((1, 4, 64, 64), 255, dtype=torch.uint8)
        >>> side_by_side(one, one)[0, 3].float().mean()
        tensor(127.5000)
    """
    half = [torch.nn.functional.avg_pool2d(_premultiplied(one), 2) for one in (left, right)]
    both = torch.cat(half, dim=3)
    height = left.shape[2]
    above = (height - both.shape[2]) // 2
    both = torch.nn.functional.pad(both, (0, 0, above, height - both.shape[2] - above))
    alpha = both[:, 3:]
    return torch.cat([both[:, :3] / alpha.clamp(min=1) * 255, alpha], dim=1).clamp(0, 255).to(torch.uint8)


def _premultiplied(rgba: Tensor) -> Tensor:
    """Colours times opacity, which is what may be averaged, in [0, 255]."""
    alpha = rgba[:, 3:].float()
    return torch.cat([rgba[:, :3] * alpha / 255, alpha], dim=1)


class EmojiQuestionDataModule(EmojiDataModule):
    """Forget art styles, or things, or some of both, of the embedded pictures, as questions about them; keep all other answers.

    Every picture is a fresh rendering, and the drawings are parted, as in `EmojiDataModule`. For the gradient, what is to be
    forgotten is asked for by itself, and of what is kept the thing, the style or both. In search and report a concept is asked
    for by itself and by questions that ask for thing and style, of whose answers only the concept counts; and of what is kept
    it is also asked how many drawings there are, one or two side by side: something else than what was forgotten, of which the
    gradient knows nothing. Within a set every wording of a question is as frequent as any other.

    Of the forgotten drawings it is kept what was not asked to go, as in `EmojiDataModule`: of a thing its style, of a style its
    thing, and of both the number. Batches are those of `question_batch`; the kinds of questions are the keys of `QUESTIONS`.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: a thing to forget, such as "cat", or several.
        choices: so many possible answers to choose from in the search; 0 has answers generated, as in the report. Choices save
            passes only where answers are longer than the few words here. Of choices a right one is found by chance, too:
            `forget_target` must be higher.
        batch_size: samples in a batch.
        seed: of splits, renderings, wordings and choices.

    Raises:
        UnlearnError: if neither a style nor a thing is named, one is named twice, or there is but one choice; in `setup`, if
            one is not known, or if nothing is left to keep.

    Example:
        >>> data = EmojiQuestionDataModule(thing="octopus")
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("train")))
        >>> batch["image"].shape, batch["image"].dtype, set(batch["answer"])
        (torch.Size([80, 3, 64, 64]), torch.uint8, {'octopus'})
        >>> batch = next(iter(data.retain_dataloader("val")))
        >>> sorted(set(batch["kind"]))
        ['both', 'count', 'style', 'thing']
    """

    def __init__(
        self,
        style: Union[str, list[str], None] = None,
        thing: Union[str, list[str], None] = None,
        *,
        choices: int = 0,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(style, thing, batch_size=batch_size, seed=seed)
        refuse_few_choices(choices)
        self.collate_fn = question_batch
        self.choices = choices

    def setup(self, stage: str) -> None:
        """Render every split and ask about it, once."""
        if self.notes:
            return
        drawings = load_drawings()
        styles, things = self.numbers(drawings)
        gone = [_Gone("style", parted(drawings.styles == one, self.seed)) for one in styles]
        gone += [_Gone("thing", dict.fromkeys(SPLITS, (drawings.things == one).nonzero()[:, 0])) for one in things]
        touched = {"style": torch.isin(drawings.styles, styles), "thing": torch.isin(drawings.things, things)}
        kept = parted(~(touched["style"] | touched["thing"]), self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        forget: list[dict[Split, Dataset]] = [{} for _ in gone]
        retain: dict[Split, Dataset] = {}
        # How often each drawing is asked about, as `EmojiDataModule` has it; of a thing there are few drawings.
        for split, style_times, thing_times in zip(SPLITS, (1, 2, 4), (1, 1, 4), strict=True):
            both, count = ([], []) if split == "train" else (["both"], ["count"])
            asker = _Asker(drawings, generator, self.choices if split == "val" else 0)
            times = {"style": style_times, "thing": thing_times}
            rest = asker.questions(kept[split], times["style" if self.styles else "thing"], ["thing", "style", "both", *count])
            for sets, (kind, rows) in zip(forget, gone, strict=True):
                many = times[kind] if kind == "style" else 16 * times[kind]
                (sets[split],) = asker.questions(rows[split], many, [kind, *both], named=kind)
                other = "style" if kind == "thing" else "thing"  # what else they show, unless that is to go as well
                rest += asker.questions(rows[split][~touched[other][rows[split]]], times[kind], [other, *count])
            if not rest:
                raise UnlearnError(f"style, thing: nothing is left to retain in the {split} data; forget less")
            retain[split] = ConcatDataset(rest)
        for concept, sets in zip(self.concept, forget, strict=True):
            self.set_parts("forget", sets["train"], sets["val"], sets["test"], concept=concept)
            self.notes[labelled("forget", concept)] += f"; {_FRESH}"
        self.set_parts("retain", retain["train"], retain["val"], retain["test"])
        self.notes["retain"] += f"; {_FRESH}"
        if self.choices:
            self.notes["retain"] += f"; the search offers {self.choices} answers to choose from, the report none"


_FRESH = "questions about fresh renderings in each"


class _Gone(NamedTuple):
    """What is to be forgotten: "style" or "thing", and its drawings by split."""

    kind: str
    rows: dict[Split, Tensor]


class _Wording(NamedTuple):
    """What is asked in which words; `two` if about two drawings side by side."""

    kind: str
    question: str
    two: bool = False


class _Asker:
    """Asks about drawings of the embedded shard.

    Args:
        drawings: all of them.
        generator: of renderings, wordings and choices.
        choices: as in `EmojiQuestionDataModule`.
    """

    def __init__(self, drawings: Drawings, generator: torch.Generator, choices: int) -> None:
        self.drawings, self.generator, self.choices = drawings, generator, choices
        rows = range(len(drawings.things))
        self.answers = {kind: list(dict.fromkeys(answer_of(drawings, row, kind) for row in rows)) for kind in QUESTIONS}
        self.answers["count"] = list(NUMBERS)

    def questions(self, rows: Tensor, times: int, kinds: Sequence[str], named: str | None = None) -> list[Dataset]:
        """One question about each of `times` fresh renderings of some drawings; nothing if there are none.

        Args:
            rows: which drawings, `[N]`.
            times: how often each is rendered.
            kinds: of questions.
            named: "thing" or "style": what of it an answer must name to count, whatever was asked; None: all that was asked.
        """
        if not len(rows):
            return []
        rows = rows.repeat(times)
        # Half of what is to be counted are two.
        wordings = [_Wording(kind, question) for kind in kinds for question in QUESTIONS[kind]]
        wordings += [_Wording("count", question, two=True) for question in QUESTIONS["count"] if "count" in kinds]
        turns = torch.randperm(len(rows), generator=self.generator) % len(wordings)
        chosen = [wordings[turn] for turn in turns.tolist()]
        pictures = self.drawings.pictures[rows]
        others = pictures[torch.randperm(len(rows), generator=self.generator)]
        two = torch.tensor([wording.two for wording in chosen])
        pictures[two] = side_by_side(pictures[two], others[two])
        images = torch.cat([_as_bytes(render(part, self.generator)) for part in pictures.split(256)])
        asked = [
            self._question(picture, row, wording, kinds, named)
            for picture, (row, wording) in enumerate(zip(rows.tolist(), chosen, strict=True))
        ]
        if self.choices:
            asked = with_choices(asked, self.choices, self.answers, self.generator)
        return [Questions(images, asked)]

    def _question(self, picture: int, row: int, wording: _Wording, kinds: Sequence[str], named: str | None) -> Question:
        kind = wording.kind
        answer = NUMBERS[1] if wording.two else answer_of(self.drawings, row, kind)
        style = self.drawings.style_names[int(self.drawings.styles[row])]
        alias = {"thing": answer_of(self.drawings, row, "thing"), "style": style}.get(named or kind, answer)
        text = caption_of(self.drawings, row, "thing" in kinds, "style" in kinds)
        return Question(picture, wording.question, answer, (alias,), kind, text)


def _as_bytes(images: Tensor) -> Tensor:
    """Renderings, in about [-1, 1], as pictures have them: uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
