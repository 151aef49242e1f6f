"""Questions about pictures, with the answers that a vision-language model is to forget or to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slug_lightning.datamodules.base import UnlearnDataModule, split_indices
from slug_lightning.datamodules.image_text.pairs import ImageTextPairs, Pair
from slug_lightning.datamodules.text.reading import read_content
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.loaders import Split
from slug_lightning.utils.names import by_concept, labelled, listed
from slug_lightning.vlm.answers import names

FIELDS = ("image", "question", "answer", "aliases", "kind", "text")


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
            wrong[key] = [one for one in answers[asked.kind] if one != asked.answer and not names(one, asked.aliases)]
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


class VisualQuestionDataModule(UnlearnDataModule):
    r"""Questions about pictures of your own, from files: what is to be forgotten, and what is to be kept.

    A file is `.jsonl`, a JSON object a line: "image", a path relative to the file's folder; "question", a text, or a list of
    wordings, each of which is asked; "answer", a text. It may have "aliases", a list of the names of which a right answer has
    one (else the answer); "kind", which gives these questions a metric of their own, `<kind>_accuracy` (else "general"); and
    "text", what a CLIP is to compare the picture with (else the answer).

    To keep there should be questions about others of the same kind, whom an edit touches first, and general ones. One picture may
    be asked about in both files: who it is may go, and what it shows may stay.

    It is pictures that are divided into gradient, search and report, each with all its questions: else the report would ask in
    other words about pictures that were tuned on. Batches are those of `question_batch`; pictures keep their size.

    Args:
        forget: the file of what is to be forgotten; for several concepts, a dict of files by the concept's name.
        retain: the file of what is to be kept.
        choices: so many possible answers to choose from in the search: the right one, and others to questions of its kind in
            all files. 0 has answers generated, as in the report, a pass for each token: that is slower where answers are long and
            choices few, and faster the other way round. Of choices a right one is found by chance, too: `forget_target`
            must be higher.
        batch_size: questions in a batch.
        num_workers: worker processes of each loader.
        seed: of the division, of the order and of the choices.

    Raises:
        UnlearnError: if there is but one choice, or concepts have the same file; in `setup`, if a file or a line cannot be read,
            a picture is missing, there are fewer than three pictures, or a question is both to be forgotten and kept; as a
            sample is read, if its picture cannot be decoded.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("ann", "bob"):
        ...     for i in range(4):
        ...         Image.new("RGB", (8, 6)).save(folder / f"{name}{i}.png")
        ...     lines = [{"image": f"{name}{i}.png", "question": ["who?", "name?"], "answer": name.title()} for i in range(4)]
        ...     _ = (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        >>> data = VisualQuestionDataModule(forget={"Ann": str(folder / "ann.jsonl")}, retain=str(folder / "bob.jsonl"))
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("val")))
        >>> batch["image"].shape, batch["question"], batch["answer"]
        (torch.Size([2, 3, 6, 8]), ['who?', 'name?'], ['Ann', 'Ann'])
    """

    def __init__(
        self,
        forget: Union[str, dict[str, str]],
        retain: str,
        *,
        choices: int = 0,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, collate_fn=question_batch, seed=seed)
        refuse_few_choices(choices)
        self.forget, self.retain, self.choices = by_concept("forget", forget), retain, choices
        self.concept = [name for name in self.forget if name is not None]
        if repeated := [name for name, source in self.forget.items() if list(self.forget.values()).count(source) > 1]:
            raise UnlearnError(f"forget: {listed(repeated)} have the same file; give one for each concept")

    def setup(self, stage: str | None = None) -> None:
        """Read the files and divide their pictures, once.

        Args:
            stage: Lightning's; it makes no difference.

        Raises:
            UnlearnError: as the class says.
        """
        if self.notes:
            return
        forget = {name: read_questions(labelled("forget", name), source) for name, source in self.forget.items()}
        retain = read_questions("retain", self.retain)
        _refuse_shared(forget, retain)
        answers: dict[str, list[str]] = {}
        for asked in (asked for _, questions in (*forget.values(), retain) for asked in questions):
            if asked.answer not in answers.setdefault(asked.kind, []):
                answers[asked.kind].append(asked.answer)
        generator = torch.Generator().manual_seed(self.seed)
        for name, read in forget.items():
            self._divide("forget", *read, answers, generator, name)
        self._divide("retain", *retain, answers, generator)
        gone = [alias for _, questions in forget.values() for asked in questions for alias in asked.aliases]
        if named := [asked.answer for asked in retain[1] if names(asked.answer, gone)]:
            self.notes["retain"] += f"; {len(named)} answers name what is to be forgotten, such as {named[0]!r}"

    def _divide(
        self,
        kind: str,
        paths: list[Path],
        questions: list[Question],
        answers: Mapping[str, Sequence[str]],
        generator: torch.Generator,
        concept: str | None = None,
    ) -> None:
        """Set the data of `kind`: each picture with all its questions in one part."""
        label = labelled(kind, concept)
        if len(paths) < 3:
            raise UnlearnError(
                f"{label}: {len(paths)} pictures are too few to keep gradient, search and report apart; give at least 3"
            )
        pictures = _Files(paths)
        part_of = {picture: split for split, own in split_indices(len(paths), self.seed).items() for picture in own}
        parts: dict[Split, list[Question]] = {"train": [], "val": [], "test": []}
        for asked in questions:
            parts[part_of[asked.picture]].append(asked)
        if self.choices:
            parts["val"] = with_choices(parts["val"], self.choices, answers, generator)
        self.set_parts(kind, *(Questions(pictures, own) for own in parts.values()), concept=concept)
        offered = f"; the search offers {self.choices} answers to choose from, the report none" if self.choices else ""
        self.notes[label] += f", all questions about each of {len(paths)} pictures in one of them, seed {self.seed}{offered}"


class _Files:
    """Pictures that are decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.pairs = ImageTextPairs((Pair(str(path), path, "", {}) for path in paths), _as_bytes, list)

    def __getitem__(self, index: int, /) -> Tensor:
        return self.pairs[index]["image"]


def _as_bytes(image: Any) -> Tensor:
    """A PIL image, RGB, as it is: uint8, `[3, H, W]`."""
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_questions(argument: str, file: str | Path) -> tuple[list[Path], list[Question]]:
    """Read a file of questions, as `VisualQuestionDataModule` describes it.

    Args:
        argument: that named the file, for messages.
        file: `.jsonl`.

    Returns:
        The pictures' paths, each once, and the questions about them.

    Raises:
        UnlearnError: if it cannot be read, if there is no question in it, or if a line is not as it should be.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "ann.jsonl"
        >>> _ = file.write_text('{"image": "a.png", "question": ["who is this?", "a name?"], "answer": "Ann", "kind": "name"}')
        >>> paths, questions = read_questions("forget", file)
        >>> [path.name for path in paths], [asked.question for asked in questions], questions[0].aliases
        (['a.png'], ['who is this?', 'a name?'], ('Ann',))
    """
    file = Path(file)
    numbers: dict[Path, int] = {}
    found = []
    for number, line in enumerate(read_content(argument, file).split("\n"), start=1):  # only that ends a line of JSON
        if not line.strip():
            continue
        read = _fields(f"{argument}: line {number} of {file}", line)
        picture = numbers.setdefault((file.parent / read["image"][0]).resolve(), len(numbers))
        (answer,), (kind,), (text,) = (read[name] for name in ("answer", "kind", "text"))
        found += [Question(picture, one, answer, tuple(read["aliases"]), kind, text) for one in read["question"]]
    if not found:
        raise UnlearnError(f"{argument}: there is no question in {file}; give at least one a picture")
    return list(numbers), found


def _fields(where: str, line: str) -> dict[str, list[str]]:
    """The fields of a line, each a list of texts; of one, unless it is a question or the aliases."""
    try:
        read = json.loads(line)
    except ValueError as error:
        raise UnlearnError(f"{where} is no JSON ({error}); mend or remove it") from error
    if not isinstance(read, dict):
        raise UnlearnError(f"{where} is no object; mend or remove it")
    if unknown := [name for name in read if name not in FIELDS]:
        raise UnlearnError(
            f"{where} has {listed(unknown)}, and there are only {listed(FIELDS, len(FIELDS))}; rename or remove it"
        )
    answer = read.get("answer")
    read = {"aliases": [answer], "kind": "general", "text": answer, **read}
    found: dict[str, list[str]] = {}
    for name in FIELDS:
        given = read.get(name)
        texts: list[Any] = given if isinstance(given, list) and name in ("question", "aliases") else [given]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UnlearnError(f'{where} has no text under "{name}"; mend or remove it')
        found[name] = texts
    if found["kind"] == ["answer"]:
        raise UnlearnError(f'{where} has the kind "answer", and answer_accuracy is that of all kinds; choose another name')
    return found


def _refuse_shared(
    forget: Mapping[str | None, tuple[list[Path], list[Question]]], retain: tuple[list[Path], list[Question]]
) -> None:
    kept = {(retain[0][asked.picture], asked.question) for asked in retain[1]}
    for concept, (paths, questions) in forget.items():
        shared = [asked for asked in questions if (paths[asked.picture], asked.question) in kept]
        if shared:
            raise UnlearnError(
                f"{labelled('forget', concept)}, retain: {len(shared)} questions of {len(questions)} are in retain too, such as "
                f"{shared[0].question!r} about {paths[shared[0].picture]}; leave them out of retain"
            )
