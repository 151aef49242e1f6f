"""What a text-to-image pipeline is to forget and to keep: pictures with captions for the gradient, prompts for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.utils.data import Dataset

from slug_lightning.errors import UnlearnError

BLOCK = 1_000_000
"""Seeds of the noise for each seed of a datamodule: half of them for the search, half for the report."""


def noise_seeds(split: Literal["val", "test"], count: int, seed: int = 0) -> range:
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
