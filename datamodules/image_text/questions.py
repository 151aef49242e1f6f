"""Questions about images, with answers that a vision-language model is to forget or to retain."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slug_lightning.datamodules.base import UnlearnDataModule, split_indices
from slug_lightning.datamodules.image_text.pairs import ImageTextPairs, Pair, refuse_shared, sources_by_concept
from slug_lightning.datamodules.text.reading import read_content
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import labelled, listed
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.vlm.answers import mentions

Sources = Union[str, dict[str, str]]
Choose = Callable[[list["Question"]], list["Question"]]
FIELDS = ("image", "question", "answer", "aliases", "kind", "text")


class Question(NamedTuple):
    """A question about a picture, and its right answer."""

    picture: int  # its index
    question: str
    answer: str  # whose likelihood the gradient is taken of
    aliases: tuple[str, ...]  # a generated answer is right if it names one of these
    kind: str  # each kind has its own accuracy
    text: str  # what the picture shows, for a CLIP to compare it with
    choices: tuple[str, ...] = ()  # the right one among them; empty if the model generates an answer
    wording: str = ""  # its name; each wording has its own accuracy
    shows: Mapping[str, str] = {}  # by kind, what the picture shows, whatever is asked; empty if only the answer is known


class Questions(Dataset):
    """Questions with their pictures, as `VLMModule` expects them; `question_batch` collates them.

    A sample is a dict: "index", of the question; "image", uint8 `[3, H, W]`; "question", "answer", "text" and "kind", texts;
    "aliases", a list of texts, and if the question has them, "choices", another one, "wording", a text, and "shows", a dict.
    `pictures` has by index uint8 `[3, H, W]`, RGB: it is a tensor, or reads a picture when it is needed.
    """

    def __init__(self, pictures: Any, questions: Sequence[Question]) -> None:
        self.pictures, self.questions = pictures, list(questions)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = self.questions[index]
        texts = {name: getattr(question, name) for name in ("question", "answer", "text", "kind")}
        more: dict[str, Any] = {"choices": list(question.choices)} if question.choices else {}
        if question.wording:
            more["wording"] = question.wording
        if question.shows:
            more["shows"] = dict(question.shows)
        image = self.pictures[question.picture]
        return {"index": index, "image": image, **texts, "aliases": list(question.aliases), **more}


def question_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate B samples of `Questions`, all with the same columns.

    "index" becomes int64 `[B]`; "image", uint8 `[B, 3, H, W]`, or a list of B tensors if their sizes differ; the rest, lists.
    """
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    # "index" comes first: samples are counted by the first tensor, and a list of pictures has one of 3 channels there.
    batch["index"] = torch.tensor(batch["index"])
    if len({picture.shape for picture in batch["image"]}) == 1:
        batch["image"] = torch.stack(batch["image"])
    return batch


def choices_note(count: int) -> str:
    """Write the part of a note on the choices that are offered, after checking their number."""
    if count < 2 and count != 0:
        raise UnlearnError(f"choices: must be >= 2, or 0 to have answers generated, got {count}")
    return f"; the validation split offers {count} answers to choose from, the test split none" if count else ""


def with_choices(
    questions: list[Question], count: int, answers: Mapping[str, Iterable[str]], generator: torch.Generator
) -> list[Question]:
    """Give each question `count` answers to choose from, shuffled: its own, and others to questions of its kind; 0: none.

    `answers` has all distinct answers by kind. Those that name the right one by an alias are not wrong choices; if there are
    not so many wrong ones, there are fewer choices.
    """
    if not count:
        return questions
    wrong: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}  # the same for many questions
    found = []
    for question in questions:
        key = question.kind, question.answer, question.aliases
        if key not in wrong:
            every = answers[question.kind]
            wrong[key] = [one for one in every if one != question.answer and not mentions(one, question.aliases)]
        others = wrong[key]
        if not others:
            raise UnlearnError(
                f"choices: all answers of kind {question.kind!r} name {question.answer!r}; give 0 to have answers generated"
            )
        drawn = torch.randperm(len(others), generator=generator)[: count - 1].tolist()
        choices = [question.answer, *(others[i] for i in drawn)]
        order = torch.randperm(len(choices), generator=generator).tolist()
        found.append(question._replace(choices=tuple(choices[i] for i in order)))
    return found


class VisualQuestionDataModule(UnlearnDataModule):
    r"""Questions about your own images, from files, to forget and to retain.

    A file is `.jsonl`, one JSON object per line: "image", a path relative to the file's folder; "question", a text, or a list of
    wordings, each of which is asked; "answer", a text. Optional are "aliases", a list of names of which a right answer has
    one (default: the answer); "kind", whose questions get their own metric, `<kind>_accuracy` (default: "general"), and so does
    each of the wordings by its number in the list, `<kind>_1_accuracy`, `<kind>_2_accuracy` and so on; and
    "text", what a CLIP compares the image with (default: the answer).

    The retain set should have questions about others of the same kind, whom an edit affects first, and general ones. Both
    files may ask about the same image: who it is may be forgotten, and what it shows retained.

    Images are split with all questions about them: otherwise the test split would reword questions about images that the edit
    was tuned on. Batches are those of `question_batch`; images keep their size.

    Args:
        forget: the file of questions to forget; for several concepts, a dict of files by the concept's name.
        retain: the file of questions to retain.
        choices: number of possible answers to choose from in the validation split: the right one, and others to questions of its
            kind in all files. 0 generates answers, as in the test split, one pass per token: slower if answers are long and
            choices few, faster otherwise. A choice can be right by chance, so `forget_target` must be higher.
        batch_size: questions in a batch.
        num_workers: worker processes of each loader.
        seed: of the split, of the order and of the choices.

    Raises:
        UnlearnError: if `choices` is 1, or if two sets have the same file; in `setup`, if a line cannot be read, an image is
            missing, a set has fewer than three images, or a question is both to forget and to retain.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for i in range(4):
        ...     Image.new("RGB", (8, 6)).save(folder / f"{i}.png")
        >>> for name, question in (("Ann", ["who?", "name?"]), ("Bob", "and who is on the left?")):
        ...     lines = [{"image": f"{i}.png", "question": question, "answer": name} for i in range(4)]
        ...     _ = (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        >>> data = VisualQuestionDataModule(forget={"Ann": str(folder / "Ann.jsonl")}, retain=str(folder / "Bob.jsonl"))
        >>> data.setup("fit")
        >>> batch = next(iter(data.forget_dataloader("val")))
        >>> batch["image"].shape, batch["question"], batch["answer"]
        (torch.Size([2, 3, 6, 8]), ['who?', 'name?'], ['Ann', 'Ann'])
    """

    def __init__(
        self, forget: Sources, retain: str, *, choices: int = 0, batch_size: int = 8, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, collate_fn=question_batch, seed=seed)
        self.choices, self.note = choices, choices_note(choices)
        self.forget, self.retain = sources_by_concept(forget, retain), retain
        self.concept = [name for name in self.forget if name is not None]

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split their images; further calls change nothing."""
        if self.notes:
            return
        forget = {name: read_questions(labelled("forget", name), source) for name, source in self.forget.items()}
        retain = read_questions("retain", self.retain)
        refuse_shared("questions", {name: _keys(*read) for name, read in forget.items()}, _keys(*retain))
        answers: dict[str, dict[str, None]] = defaultdict(dict)  # by kind, each once, in the files' order
        for _, questions in (*forget.values(), retain):
            for question in questions:
                answers[question.kind][question.answer] = None
        generator = torch.Generator().manual_seed(self.seed)
        choose = partial(with_choices, count=self.choices, answers=answers, generator=generator)
        for name, read in forget.items():
            self._set("forget", *read, choose, name)
        self._set("retain", *retain, choose)
        gone = [alias for _, questions in forget.values() for question in questions for alias in question.aliases]
        if named := [question.answer for question in retain[1] if mentions(question.answer, gone)]:
            self.notes["retain"] += f"; {len(named)} retain answers name what to forget, such as {named[0]!r}"

    def _set(self, kind: str, paths: list[Path], questions: list[Question], choose: Choose, concept: str | None = None) -> None:
        """Set the splits of one set: each picture with all its questions in one; `choose` adds choices for validation."""
        label = labelled(kind, concept)
        if len(paths) < 3:
            raise UnlearnError(
                f"{label}: {len(paths)} images are too few for separate train, validation and test splits; give at least 3"
            )
        pictures = _Files(paths)
        parts = split_indices(len(paths), self.seed)
        train, val, test = ([question for question in questions if question.picture in own] for own in map(set, parts.values()))
        splits = [Questions(pictures, own) for own in (train, choose(val), test)]
        self.set_parts(kind, *splits, concept=concept)
        self.notes[label] += f"; split by image ({len(paths)} images, seed {self.seed}){self.note}"


class _Files:
    """Pictures that are decoded when they are read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        to_tensor = import_optional("torchvision.transforms.functional", "hf").pil_to_tensor
        self.pairs = ImageTextPairs((Pair(str(path), path, "", {}) for path in paths), to_tensor, list)

    def __getitem__(self, index: int, /) -> Tensor:
        return self.pairs[index]["image"]


def _keys(paths: list[Path], questions: list[Question]) -> list[tuple[str, Path]]:
    return [(question.question, paths[question.picture]) for question in questions]


def read_questions(argument: str, file: str | Path) -> tuple[list[Path], list[Question]]:
    """Read a file as `VisualQuestionDataModule` describes it; return the images' paths, each once, and the questions."""
    file, found = Path(file), []
    numbers: dict[Path, int] = {}
    for number, line in enumerate(read_content(argument, file).split("\n"), start=1):  # only that ends a line of JSON
        if not line.strip():
            continue
        read = _fields(f"{argument}: line {number} of {file}", line)
        (image,), (answer,), (kind,), (text,) = (read[name] for name in ("image", "answer", "kind", "text"))
        picture = numbers.setdefault((file.parent / image).resolve(), len(numbers))
        found += [
            Question(picture, one, answer, tuple(read["aliases"]), kind, text, wording=f"{kind}_{turn}")
            for turn, one in enumerate(read["question"], start=1)
        ]
    if not found:
        raise UnlearnError(f"{argument}: there is no question in {file}; give at least one for each image")
    return list(numbers), found


def _fields(where: str, line: str) -> dict[str, list[str]]:
    """Parse a line into a list of texts for each field; all but "question" and "aliases" have one."""
    try:
        read = json.loads(line)
    except ValueError as error:
        raise UnlearnError(f"{where} is not JSON ({error}); correct or remove it") from error
    if not isinstance(read, dict):
        raise UnlearnError(f"{where} is not an object; correct or remove it")
    if unknown := [name for name in read if name not in FIELDS]:
        raise UnlearnError(f"{where} may only have {listed(FIELDS, len(FIELDS))}, got {listed(unknown)}; rename or remove it")
    answer = read.get("answer")
    read = {"aliases": [answer], "kind": "general", "text": answer, **read}
    found: dict[str, list[str]] = {}
    for name in FIELDS:
        given = read.get(name)
        texts: list[Any] = given if isinstance(given, list) and name in ("question", "aliases") else [given]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UnlearnError(f'{where} has no text under "{name}"; correct or remove it')
        found[name] = texts
    if found["kind"] == ["answer"]:
        raise UnlearnError(f'{where} has the kind "answer", but answer_accuracy is that of all kinds; choose another name')
    return found
