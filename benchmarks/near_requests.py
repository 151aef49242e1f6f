"""The requests of `near.py`, what is near each, and what is measured of them beside the callback's report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from families import NEAR, Request, digit_parts, digits, near_rows, passages
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from unlearn_canvas import STYLES, TEN
from vlm import CONCEPTS, questions_about

from slug_lightning.clip.models import encode_image, encode_text
from slug_lightning.datamodules import CanvasDataModule, EmojiDataModule, EmojiQuestionDataModule, SampleDataModule
from slug_lightning.datamodules.demo.canvas import canvas_drawings
from slug_lightning.datamodules.demo.emoji import caption_of, emoji_pairs
from slug_lightning.datamodules.demo.questions import QUESTIONS
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import Drawings, load_drawings
from slug_lightning.modules import EmbeddedCanvas, EmbeddedClip, EmbeddedVLM

PICTURES = 500
"""Near pictures of a report, at least."""
FORGOTTEN = 0.05
"""What may be left on report data of what pipelines draw and vision-language models say."""
Makes = Callable[[int, Path], Request]
"""What makes a request, from a seed and the folder where models are kept that are trained for it."""


def clip(kind: str, concept: str, seed: int, folder: Path) -> Request:
    """As configs/thing.yaml and configs/demo.yaml, asked for in two wordings."""
    asked = [f"{kind}_accuracy", f"{kind}_combined_accuracy"]
    kept = ["style_accuracy", "thing_accuracy"]
    bounds = {"forget_metric": asked, "retain_metric": kept, "retain_tolerance": 0.02}
    data = EmojiDataModule(**{kind: concept}, seed=seed)
    return Request(EmbeddedClip(), data, bounds, near_metric=f"{kind}_accuracy", evaluations=6 if kind == "thing" else 10)


def canvas(kind: str, concept: str, seed: int, folder: Path) -> Request:
    """As configs/unlearn_canvas.yaml, with 200 report pictures of a concept in 10 steps in place of 120 in 25."""
    data = CanvasDataModule(**{kind: concept}, seed=seed, search_steps=6, report_pictures=200, report_steps=10)
    bounds = {"forget_target": FORGOTTEN, "retain_tolerance": 0.05}
    return Request(EmbeddedCanvas(), data, bounds, near_metric=f"{kind}_accuracy", replay=False)


def vlm(kind: str, concept: str, objective: str, seed: int, folder: Path) -> Request:
    """As configs/vlm.yaml."""
    layers = ["*.layers.[45].mlp.*", "*multi_modal_projector.linear_2*"]
    bounds = {"forget_target": 0.02, "retain_tolerance": 0.03, "near_tolerance": 0.05}
    data = EmojiQuestionDataModule(**{kind: concept}, seed=seed)
    return Request(EmbeddedVLM(objective), data, bounds, near_metric="answer_accuracy", layers=layers, replay=False)


def digit(digit: int | None, draw: int, tolerance: float, seed: int, folder: Path) -> Request:
    """A class, down to chance; or a random 5 % of the training set, to the accuracy and loss of pictures never seen."""
    request = digits(digit, folder, draw, seed)
    request.bounds["retain_tolerance"] = tolerance
    if digit is None:
        parts = {name: TensorDataset(*part) for name, part in digit_parts(seed).items()}
        count = len(parts["train"])
        gone = torch.randperm(count, generator=torch.Generator().manual_seed(draw))[: count // 20].tolist()
        unseen = ConcatDataset([parts["val"], parts["test"]])
        request.data = SampleDataModule(parts["train"], indices=gone, holdout=unseen, seed=seed)
        request.bounds |= {"forget_metric": ["accuracy", "nll"], "forget_target": "as_holdout"}
    return request


def recited(first: int, seed: int, folder: Path) -> Request:
    """Other passages for each seed, whatever that costs."""
    request = passages(first + seed, folder)
    request.bounds["retain_tolerance"] = 1e6
    return request


def things() -> list[str]:
    """Twenty things that nothing was chosen on."""
    names = load_drawings().thing_names
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    return [names[i] for i in order if names[i] not in ("octopus", "cat")][:20]


def families(dev: bool) -> dict[str, dict[str, Makes]]:
    """Return what makes the requests, by family and concept: those that recipes are chosen on, or others."""
    chosen_on = {"style": ["blob", "fluent"], "thing": ["cat"]}
    of_canvas = {"style": STYLES, "thing": TEN}
    drawn = chosen_on if dev else {kind: [n for n in names if n not in chosen_on[kind]] for kind, names in of_canvas.items()}
    asked = {"thing": ["octopus", "cat"], "style": ["fluent"]} if dev else CONCEPTS
    return {
        "clip": {name: partial(clip, "thing", name) for name in (["octopus", "cat"] if dev else things())},
        "styles": {name: partial(clip, "style", name) for name in drawn["style"]},
        "sd": {name: partial(canvas, kind, name) for kind, names in drawn.items() for name in names},
        "vlm": {
            f"{name}, {objective}": partial(vlm, kind, name, objective)
            for kind, names in asked.items()
            for name in names
            for objective in ("answers", "clip")
        },
        "digits": {str(number): partial(digit, number, 1, 0.01) for number in ((0, 1) if dev else (3, 5, 8))},
        "random": {f"draw {draw}": partial(digit, None, draw, 0.015) for draw in ((1,) if dev else (2, 3, 4))},
        "lm": {"passages": partial(recited, 100 if dev else 1)},
    }


# ---- what is near


def asked(drawings: Drawings, data: EmojiDataModule) -> tuple[str, Tensor, list[str]]:
    """Return what is to be forgotten, "style" or "thing", with every drawing's label and the labels' names."""
    if data.styles:
        return "style", drawings.styles, drawings.style_names
    return "thing", drawings.things, drawings.thing_names


class NearData(NamedTuple):
    """Batches for the module's `scores`, and the names of the classes in their labels, if these are numbers."""

    batches: list[Any]
    names: list[str]


def near_data(request: Request, names: Iterable[str], seed: int) -> NearData:
    """Return report data of what is near: of these names, or of those of `families.py` if there are none."""
    data = request.data
    if not isinstance(data, EmojiDataModule):  # digits have theirs, passages none
        return NearData(request.near, [str(digit) for digit in range(10)])
    drawings = canvas_drawings() if isinstance(data, CanvasDataModule) else load_drawings()
    kind, own, known = asked(drawings, data)
    near = [known.index(name.removesuffix(" style")) for name in names]
    rows = (
        torch.isin(own, torch.tensor(near)).nonzero()[:, 0]
        if near
        else near_rows(drawings, kind, (data.styles or data.things)[0])
    )
    if isinstance(data, CanvasDataModule):
        rows = rows.repeat(math.ceil(PICTURES / len(rows)))
        batches = [drawn(drawings, part, kind, NEAR * (1 + seed) + 128 * i) for i, part in enumerate(rows.split(128))]
        return NearData(batches, known)
    if isinstance(data, EmojiQuestionDataModule):
        wordings = len(QUESTIONS[kind])
        rows = rows[:: max(len(rows) * wordings // PICTURES, 1)]
        rows = rows.repeat(math.ceil(PICTURES / wordings / len(rows)))
        return NearData(questions_about(drawings, rows, kind, NEAR + seed), [])
    return NearData(list(data.render_near([known[i] for i in sorted(set(own[rows].tolist()))])["test"]), known)


def drawn(drawings: Drawings, rows: Tensor, kind: str, first_seed: int) -> dict[str, Any]:
    """Return prompts of drawings, from seeds that no datamodule uses."""
    return {
        "text": [caption_of(drawings, int(row)) for row in rows],
        "seed": torch.arange(len(rows)) + first_seed,
        "steps": torch.full((len(rows),), 10),
        kind: (drawings.styles if kind == "style" else drawings.things)[rows],
    }


# ---- what the report doesn't say


@torch.no_grad()
def by_concept(request: Request, near: NearData) -> dict[str, list[float]]:
    """Return what the module, as it is, gets right of what is near: a number for each sample, by concept."""
    module, found = request.module.eval(), defaultdict(list)
    label = request.near_metric.removesuffix("_accuracy")
    for number, batch in enumerate(near.batches):
        if isinstance(batch, Mapping) and "aliases" in batch:
            shown = [aliases[0] for aliases in batch["aliases"]]
        else:
            shown = [near.names[i] for i in (batch[label] if isinstance(batch, Mapping) else batch[1]).tolist()]
        for name, right in zip(shown, module.scores(batch, number)[request.near_metric].tolist(), strict=True):
            found[name].append(right)
    return dict(found)


@torch.no_grad()
def in_phrases(request: Request, seed: int) -> float | None:
    """Return how often pictures go with their forgotten style, or thing, in "octopus in blob style"; None if not of a CLIP."""
    module, data = request.module, request.data
    if not isinstance(module, EmbeddedClip):
        return None
    drawings = load_drawings()
    kind, labels, known = asked(drawings, data)
    rows = (labels == known.index((data.styles or data.things)[0])).nonzero()[:, 0]
    rows = rows.repeat(math.ceil(240 / len(rows)))
    pairs = emoji_pairs(drawings, rows, torch.Generator().manual_seed(2 * NEAR + seed), thing=True, style=True)
    texts = [f"{thing} in {style} style" for thing in drawings.thing_names for style in drawings.style_names]
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")(texts)
    phrases = encode_text(module.model.eval(), tokens).unflatten(0, (len(drawings.thing_names), -1))
    right = []
    for batch in DataLoader(pairs, 128):
        # Those that differ from the right one in what is to be forgotten alone.
        among = phrases[batch["thing"]] if kind == "style" else phrases[:, batch["style"]].transpose(0, 1)
        image = encode_image(module.model, batch["image"])
        right.append((among @ image[..., None])[..., 0].argmax(1) == batch[kind])
    return 100 * torch.cat(right).float().mean().item()
