"""Further ways of asking a CLIP for what it sees, such as "cat in blob style" for "blob style"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import NamedTuple

import torch
from torch import Tensor

from slug_lightning.errors import UnlearnError


class Wording(NamedTuple):
    """One way of asking for a set of classes.

    Attributes:
        name: of the set that is asked for.
        template: such as "{thing} in {style}", with the names of sets in braces.
        others: the other sets that it names, of which each sample has its own.
        classes: by set, the names of its classes.
    """

    name: str
    template: str
    others: tuple[str, ...]
    classes: Mapping[str, Sequence[str]]

    def is_asked(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether a batch says what is needed."""
        return self.name in batch and all(f"shown_{other}" in batch for other in self.others)

    def groups(self, batch: Mapping[str, Tensor]) -> dict[tuple[int, ...], Tensor]:
        """The rows that ask for the set, by the labels of the other sets."""
        asked = (batch[self.name] >= 0).nonzero()[:, 0]
        labels = [batch[f"shown_{other}"][asked] for other in self.others]
        if not labels or not len(asked):
            return {(): asked} if len(asked) else {}
        keys, which = torch.stack(labels, 1).unique(dim=0, return_inverse=True)
        return {tuple(key): asked[which == number] for number, key in enumerate(keys.tolist())}

    def prompts(self, key: Sequence[int]) -> list[str]:
        """The prompts of all classes of the set, with these classes of the other sets.

        Example:
            >>> Wording("style", "{thing} in {style}", ("thing",), {"thing": ["cat"], "style": ["oil", "ink"]}).prompts([0])
            ['cat in oil', 'cat in ink']
        """
        own = {other: self.classes[other][label] for other, label in zip(self.others, key, strict=True)}
        return [self.template.format(**{**own, self.name: name}) for name in self.classes[self.name]]


class Wordings:
    """All further wordings of a module, by the metric that each logs.

    Args:
        classes: by set, the names of its classes.
        templates: by set, then by the wording's own name.

    Raises:
        UnlearnError: if a template doesn't name the set that it asks for, or names an unknown one.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]], templates: Mapping[str, Mapping[str, str]]) -> None:
        self.by_metric: dict[str, Wording] = {}
        for name, own in templates.items():
            for label, template in own.items():
                fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
                if name not in fields or not set(fields) <= classes.keys():
                    raise UnlearnError(
                        f"wordings: {template!r} must name {{{name}}}, and only sets of prompts ({', '.join(classes)})"
                    )
                others = tuple(dict.fromkeys(field for field in fields if field != name))
                self.by_metric[f"{name}_{label}_accuracy"] = Wording(name, template, others, classes)
