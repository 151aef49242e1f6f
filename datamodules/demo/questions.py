"""Questions about the embedded drawings, as the embedded vision-language model was taught to answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from torch.utils.data import Dataset

from slug_lightning.datamodules.demo.emoji import EmojiDataModule, Names, Part, caption_of, render
from slug_lightning.datamodules.image_text.questions import Question, Questions, choices_note, question_batch, with_choices
from slug_lightning.embedded.drawings import Drawings
from slug_lightning.utils.loaders import Split

QUESTIONS = {
    "thing": ("what is this?", "what does the picture show?", "what can you see here?", "name the thing in this picture."),
    "style": ("which style is this?", "in which style is it drawn?", "name the style of this picture."),
    "both": ("describe this picture.", "what is this, and in which style is it drawn?"),
    "count": ("how many drawings are there?", "count the drawings."),
}
"""Wordings of a question, by what is asked."""
NUMBERS = ("one", "two")


def answer_of(drawings: Drawings, row: int, asked: str) -> str:
    """Return the right answer to a question of kind `asked`, a key of `QUESTIONS`, about a single drawing."""
    return NUMBERS[0] if asked == "count" else caption_of(drawings, row, asked != "style", asked != "thing")


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Put two drawings side by side, each at half its size; both and the result are RGBA, uint8, `[B, 4, H, W]`."""
    rgba = torch.cat([left, right], dim=3).float()
    rgba[:, :3] = rgba[:, :3] * rgba[:, 3:] / 255  # times opacity, so that colours can be averaged
    both = avg_pool2d(rgba, 2)
    rest = left.shape[2] - both.shape[2]
    both = pad(both, (0, 0, rest // 2, rest - rest // 2))
    alpha = both[:, 3:]
    return torch.cat([both[:, :3] / alpha.clamp(min=1) * 255, alpha], dim=1).clamp(0, 255).to(torch.uint8)


class EmojiQuestionDataModule(EmojiDataModule):
    """Forget art styles, objects, or some of both, of the embedded drawings, as questions; retain all other answers.

    Every image is a fresh rendering, and the drawings are split, as in `EmojiDataModule`. In the train split the concept is asked
    for by itself, and in the retain set the object, the style or both. In validation and test split the concept is also asked
    for by questions about object and style, of whose answers only the concept counts; and in the retain set there are also
    questions on how many drawings there are, one or two side by side: an ability that the gradient knows nothing of. Within a
    set, all wordings of a question are equally frequent.

    What else the drawings to forget show is retained: an object's style, a style's objects, and the number. Batches are those of
    `question_batch`; the kinds of questions are the keys of `QUESTIONS`. What is near is asked for as the concept is: in all
    wordings of its own kind, and by questions about object and style, of whose answers only the one counts.

    Each of these wordings has a name, by its number in `QUESTIONS`, and `VLMModule` logs an accuracy for each:
    "thing_1_accuracy" to "thing_4_accuracy" for an object, "style_1_accuracy" to "style_3_accuracy" for a style, and for
    either "both_1_accuracy" and "both_2_accuracy". With all of them in the callback's `forget_metric`, and
    `forget_target=0.05`, each must be forgotten; the search has about 13 questions a wording of an object, so that none may
    be answered by name.

    Args:
        style: a style to forget, or several: blob, emojione, firefox, fluent or noto. The concept is "blob style".
        thing: an object to forget, such as "cat", or several.
        choices: number of possible answers to choose from in the validation split; 0 generates answers, as in the test split.
            Choices save passes only if answers are longer than the few words here. A choice can be right by chance, so
            `forget_target` must be higher.
        options: `batch_size` and `seed` (of wordings and choices, too), as in `EmojiDataModule`.

    Raises:
        UnlearnError: as `EmojiDataModule`, and if `choices` is 1.

    Example:
        >>> data = EmojiQuestionDataModule(thing="octopus")
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("train")))
        >>> batch["image"].shape, batch["image"].dtype, set(batch["answer"])
        (torch.Size([80, 3, 64, 64]), torch.uint8, {'octopus'})
    """

    samples = "questions about fresh renderings"

    def __init__(self, style: Names = None, thing: Names = None, *, choices: int = 0, **options: Any) -> None:
        super().__init__(style, thing, **options)
        self.collate_fn = question_batch
        self.choices, self.note = choices, choices_note(choices)

    def _near_part(self, kind: str, rows: Tensor, times: int) -> Part:
        """What is asked of drawings that are near by their kind: the same as of what is to be forgotten."""
        return Part("near", rows, times, (kind,))

    def _make(self, drawings: Drawings, parts: Sequence[Part], split: Split, generator: torch.Generator) -> Sequence[Dataset]:
        """Ask about each part."""
        rows = range(len(drawings.things))
        choices = self.choices if split == "val" else 0
        answers = {kind: list(dict.fromkeys(answer_of(drawings, row, kind) for row in rows)) for kind in QUESTIONS}
        answers["count"] = list(NUMBERS)
        made = []
        for part in parts:
            pictures, questions = _ask(drawings, part, split, generator)
            made.append(Questions(pictures, with_choices(questions, choices, answers, generator)))
        return made


def _ask(drawings: Drawings, part: Part, split: Split, generator: torch.Generator) -> tuple[Tensor, list[Question]]:
    """Ask one question about each rendering of a part; return the renderings, uint8 `[N, 3, H, W]`, and the questions."""
    kinds = [*part.kinds, "both"] if len(part.kinds) == 2 else [*part.kinds]
    if split != "train":
        kinds.append("both" if part.concept else "count")
    rows = part.rows.repeat(part.times)
    wordings = [(kind, question, False) for kind in kinds for question in QUESTIONS[kind]]
    wordings += [("count", question, True) for question in QUESTIONS["count"] if "count" in kinds]  # half of the counts are two
    turns = torch.randperm(len(rows), generator=generator) % len(wordings)
    chosen = [wordings[turn] for turn in turns.tolist()]
    pictures = drawings.pictures[rows]
    others = pictures[torch.randperm(len(rows), generator=generator)]
    doubled = torch.tensor([two for _, _, two in chosen])
    pictures[doubled] = side_by_side(pictures[doubled], others[doubled])
    renderings = torch.cat([render(some, generator) for some in pictures.split(256)])
    images = ((renderings.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    questions = []
    for picture, (row, (kind, question, two)) in enumerate(zip(rows.tolist(), chosen, strict=True)):
        answer = NUMBERS[1] if two else answer_of(drawings, row, kind)
        counts = part.kinds[0] if part.concept else kind  # of a forget answer only the concept counts, whatever was asked
        alias = answer_of(drawings, row, counts).removesuffix(" style") if counts in ("thing", "style") else answer
        text = caption_of(drawings, row, "thing" in part.kinds, "style" in part.kinds)
        wording = f"{kind}_{QUESTIONS[kind].index(question) + 1}" if part.concept else ""
        shows = {one: answer_of(drawings, row, one) for one in part.kinds}
        questions.append(Question(picture, question, answer, (alias,), kind, text, wording=wording, shows=shows))
    return images, questions
