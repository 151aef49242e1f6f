"""Questions about pictures, with the answers that a vision-language model is to forget or to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slug_lightning.datamodules.pairs import whole_words
from slug_lightning.errors import UnlearnError


class Question(NamedTuple):
    """A question about a picture, and what is a right answer.

    Attributes:
        picture: which one it is about.
        question: as it is put to the model.
        answer: as the model should give it: the gradient is taken of its likelihood.
        aliases: an answer is right if it names one of these.
        kind: of question; each kind has an accuracy of its own.
        text: what the picture shows, for a CLIP to compare it with.
        choices: possible answers, the right one among them; none if the model is to answer freely.
    """

    picture: int
    question: str
    answer: str
    aliases: tuple[str, ...]
    kind: str
    text: str
    choices: tuple[str, ...] = ()


class Pictures(Protocol):
    """Pictures by number, uint8, RGB, each `[3, H, W]`: a tensor of them, or what reads them when they are asked for."""

    def __getitem__(self, index: int, /) -> Tensor: ...


class Questions(Dataset):
    """Questions with their pictures, as `VLMModule` wants them; batches are made by `question_batch`.

    A sample is a dict: "index", its number; "image", uint8 `[3, H, W]`; "question", "answer", "text" and "kind", texts;
    "aliases", a list of texts, and where the question has choices, "choices", another one.

    Args:
        pictures: uint8, RGB, each `[3, H, W]`.
        questions: about them; several may be about the same one.

    Example:
        >>> asked = [Question(0, "what is this?", "a cat", ("cat",), "thing", "a cat")]
        >>> sample = Questions(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), asked)[0]
        >>> sample["image"].shape, sample["question"], sample["aliases"]
        (torch.Size([3, 8, 8]), 'what is this?', ['cat'])
    """

    def __init__(self, pictures: Pictures, questions: Sequence[Question]) -> None:
        self.pictures, self.questions = pictures, list(questions)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        asked = self.questions[index]
        texts = {"question": asked.question, "answer": asked.answer, "text": asked.text, "kind": asked.kind}
        choices = {"choices": list(asked.choices)} if asked.choices else {}
        return {"index": index, "image": self.pictures[asked.picture], **texts, "aliases": list(asked.aliases), **choices}


def question_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put samples of `Questions` into a batch.

    Args:
        samples: B of them, all with choices or none.

    Returns:
        "index", int64 `[B]`; "image", uint8 `[B, 3, H, W]`, or a list of B tensors if their sizes differ; lists of B for the
        rest.

    Example:
        >>> asked = [Question(0, "what is this?", name, (name,), "thing", name) for name in ("cat", "dog")]
        >>> data = Questions(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), asked)
        >>> batch = question_batch([data[0], data[1]])
        >>> batch["index"], batch["image"].shape, batch["aliases"]
        (tensor([0, 1]), torch.Size([2, 3, 8, 8]), [['cat'], ['dog']])
    """
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    # It stands first: samples are counted by the first tensor, and a list of pictures has one of 3 channels there.
    batch["index"] = torch.tensor(batch["index"])
    if len({picture.shape for picture in batch["image"]}) == 1:
        batch["image"] = torch.stack(batch["image"])
    return batch


def refuse_few_choices(count: int) -> None:
    """Refuse a number of choices that leaves nothing to choose.

    Raises:
        UnlearnError: if it is neither 0 nor at least 2.
    """
    if count < 2 and count != 0:
        raise UnlearnError(f"choices: {count} leave nothing to choose; give at least 2, or 0 to have answers generated")


def with_choices(
    questions: Sequence[Question], count: int, answers: Mapping[str, Sequence[str]], generator: torch.Generator
) -> list[Question]:
    """Give each question possible answers to choose from: its own, and others to questions of its kind, in any order.

    Args:
        questions: to complete.
        count: how many choices each gets, at least 2; fewer where there are not so many answers.
        answers: all answers by kind, each once. Those that name the right one by an alias are no wrong choices.
        generator: draws the wrong ones, and the order.

    Raises:
        UnlearnError: if there is no wrong answer to a question.

    Example:
        >>> asked = [Question(0, "what is this?", "cat", ("cat",), "thing", "cat")]
        >>> (found,) = with_choices(asked, 3, {"thing": ["cat", "dog", "black cat", "owl"]}, torch.Generator())
        >>> sorted(found.choices)
        ['cat', 'dog', 'owl']
    """
    wrong: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}  # the same for many questions
    found = []
    for asked in questions:
        key = asked.kind, asked.answer, asked.aliases
        if key not in wrong:
            right = whole_words("aliases", asked.aliases)
            wrong[key] = [answer for answer in answers[asked.kind] if answer != asked.answer and not right.search(answer)]
        others = wrong[key]
        if not others:
            raise UnlearnError(
                f"choices: of kind {asked.kind!r} all answers name {asked.answer!r}; give 0 to have answers generated"
            )
        drawn = torch.randperm(len(others), generator=generator)[: count - 1].tolist()
        every = [asked.answer, *(others[i] for i in drawn)]
        order = torch.randperm(len(every), generator=generator).tolist()
        found.append(asked._replace(choices=tuple(every[i] for i in order)))
    return found
