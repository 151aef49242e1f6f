"""CLIP models of open_clip and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.clip.models import Tokenizer, contrastive_loss, encode_image, encode_text, load_clip, matching_loss
from slug_lightning.clip.wordings import Wording, Wordings
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.errors import UnlearnError
from slug_lightning.modules.base import UnlearnModule, negative_log_likelihood


class ClipModule(UnlearnModule):
    """Wrap a CLIP: the cosine of matching pairs to forget, the contrastive loss to retain, zero-shot accuracy to measure.

    A batch is a dict: `image`, `[B, 3, H, W]`, `text`, tokens `[B, T]`, and for each set of prompts the index of the
    right one under the set's name, `[B]`, or -1 for a sample that has none.

    `L_forget = mean(1 - cos(v_i, t_i))` over the pairs; `L_retain` is the symmetric contrastive loss of the batch
    (SLUG, arXiv 2407.11867; contrastive loss: CLIP, arXiv 2103.00020, figure 3). The two towers are ranked separately.

    Args:
        model: name of an open_clip model ("ViT-B-32", "local-dir:…"), "hf:" and the name or folder of a transformers
            `CLIPModel`, or a model of either library.
        pretrained: open_clip tag or checkpoint file; None for random weights.
        prompts: class prompts by the name of a set, for zero-shot accuracy: `{"identity": ["a photo of …", …]}` logs
            `identity_accuracy`, which is the metric, and `identity_nll`. Without prompts the losses are the metrics, and a
            forget loss of 1 counts as forgotten: the mean cosine of pictures and captions is then 0.
        wordings: further ways of asking for a set: `{"style": {"combined": "{thing} in {style}"}}` logs
            `style_combined_accuracy`, among prompts that have the sample's own thing and each style in turn. What a sample
            shows of the other sets is `batch["shown_thing"]`, `[B]`; without it the wording isn't asked. Name these metrics in
            `forget_metric`, too: what is forgotten by one wording may still be known by another.
        tokenizer: makes tokens `[N, T]` of texts; needed only where `model` is an object and there are prompts.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Example:
        >>> module = ClipModule(f"local-dir:{CLIP}", prompts={"animal": ["cat", "dog"]})
        >>> module.chance
        {'animal_accuracy': 0.5}
    """

    towers = {"vision": "model.vis*", "text": "*"}
    wanted_metrics: Optional[Sequence[str]] = None
    methods = ("encode_image", "encode_text", "get_image_features", "get_text_features")

    def __init__(
        self,
        model: Union[str, nn.Module],
        pretrained: Optional[str] = None,
        prompts: Optional[dict[str, list[str]]] = None,
        *,
        wordings: Optional[dict[str, dict[str, str]]] = None,
        tokenizer: Optional[Tokenizer] = None,
        learning_rate: float = 1e-5,
    ) -> None:
        if isinstance(model, str):
            model, tokenizer = load_clip(model, pretrained)
        super().__init__(model, contrastive_loss, forget_loss=matching_loss, learning_rate=learning_rate)
        self.prompts = {name: list(classes) for name, classes in (prompts or {}).items()}
        self.wordings = Wordings(self.prompts, wordings or {})
        self.chance = {f"{name}_accuracy": 1 / len(classes) for name, classes in self.prompts.items()}
        names = list(self.chance)
        self.chance |= {metric: 1 / len(self.prompts[one.name]) for metric, one in self.wordings.by_metric.items()}
        self.forget_target = None if self.prompts else 1.0
        if self.prompts:
            if tokenizer is None:
                raise UnlearnError("tokenizer: a model object with prompts needs a tokenizer; pass tokenizer=…")
            self.forget_metric, self.retain_metric = names[0], names if len(names) > 1 else names[0]  # type: ignore[assignment]
            for name, classes in self.prompts.items():
                self.register_buffer(f"{name}_tokens", tokenizer(classes), persistent=False)
        self.tokenizer = tokenizer
        self._classes: dict[Any, tuple[Any, Tensor]] = {}

    def anchor_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the unit image features, `[B, D]`."""
        return self.embed(batch, batch_idx)

    def anchored_step(self, batch: dict[str, Tensor], batch_idx: int, anchor: Tensor) -> Tensor:
        """Return `L_forget` less that of the anchor, `[D]`, in place of all images: what they share with it drops out."""
        text = encode_text(self.model, batch["text"])
        return ((anchor - encode_image(self.model, batch["image"])) * text).sum(-1).mean()

    def embed(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the unit image features, `[B, D]`: concepts whose pictures have similar ones are near each other."""
        return encode_image(self.model, batch["image"])

    def labels(self, batch: dict[str, Tensor]) -> dict[str, list[Optional[str]]]:
        """Return what the samples show by set of prompts, B names, None for a label of -1."""
        asked = {name: classes for name, classes in self.prompts.items() if name in batch}
        return {
            name: [None if label < 0 else classes[label] for label in batch[name].tolist()] for name, classes in asked.items()
        }

    def on_validation_start(self) -> None:
        """Drop cached prompt features: weights may have changed without a new `_version`."""
        self._classes.clear()

    on_test_start = on_validation_start

    def class_features(self, name: str) -> Tensor:
        """Return the unit features of a set of prompts, `[C, D]`, cached until the text tower is written to.

        There may be thousands of prompts, and an edit of the vision tower changes none of them.
        """
        return self._encoded(name, lambda: self.get_buffer(f"{name}_tokens"))

    def _encoded(self, key: Any, tokens: Callable[[], Tensor]) -> Tensor:
        """Return the unit features of tokens, cached under a key until the text tower is written to."""
        parameters = self._text_parameters()
        # Those of a sharded tower have no version.
        if _is_sharded(parameters) or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return encode_text(self.model, tokens())
        device = self.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        state = precision, torch.is_inference_mode_enabled(), [(p.data_ptr(), p._version) for p in parameters]
        if key not in self._classes or self._classes[key][0] != state:
            self._classes[key] = state, encode_text(self.model, tokens())
        return self._classes[key][1]

    def _text_parameters(self) -> list[Tensor]:
        return [p for key, p in self.model.named_parameters() if not key.startswith("vis")]

    def scores(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return whether the nearest prompt of each set is the right one, and its negative log-likelihood among the set.

        `<name>_accuracy` and `<name>_nll`, in nats, each `[B]`; NaN for a label of -1. The likelihood tells apart what the
        accuracy calls equal. A set of which the batch has no labels isn't encoded: there may be thousands of prompts.
        """
        image = encode_image(self.model, batch["image"])
        runs_together = _is_sharded(self._text_parameters())  # all ranks, whatever their batches hold
        accuracies, likelihoods = {}, {}
        for name in [name for name in self.prompts if name in batch]:
            if not runs_together and bool((batch[name] < 0).all()):
                nothing = torch.full((len(image),), torch.nan, device=image.device)
                accuracies[f"{name}_accuracy"] = likelihoods[f"{name}_nll"] = nothing
                continue
            similarity = image @ self.class_features(name).T
            right = similarity.argmax(1) == batch[name]
            accuracies[f"{name}_accuracy"] = right.float().masked_fill(batch[name] < 0, torch.nan)
            logits = self.model.logit_scale.exp() * similarity.float()  # type: ignore[operator]
            likelihoods[f"{name}_nll"] = negative_log_likelihood(logits, batch[name])
        return accuracies | likelihoods | self._worded(image, batch)

    def _worded(self, image: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whether the right prompt of a further wording is the nearest, `[B]`, by metric, of those that are wanted."""
        found = {}
        for metric, wording in self.wordings.by_metric.items():
            if (self.wanted_metrics is not None and metric not in self.wanted_metrics) or not wording.is_asked(batch):
                continue
            found[metric] = torch.full((len(image),), torch.nan, device=image.device)
            for key, rows in wording.groups(batch).items():
                features = self._encoded((metric, key), partial(self._tokens_of, wording, key))
                nearest = (image[rows] @ features.T).argmax(1)
                found[metric][rows] = (nearest == batch[wording.name][rows]).to(image.dtype)
        return found

    def _tokens_of(self, wording: Wording, key: tuple[int, ...]) -> Tensor:
        assert self.tokenizer is not None
        return self.tokenizer(wording.prompts(key)).to(self.device)


def _is_sharded(parameters: Iterable[Tensor]) -> bool:
    return any(isinstance(p, DTensor) for p in parameters)


class EmbeddedClip(ClipModule):
    """Load the small CLIP that ships with the package. It was trained on emoji only: 234 things in 5 styles.

    Example:
        >>> module = EmbeddedClip()
        >>> sorted(module.chance)
        ['style_accuracy', 'style_combined_accuracy', 'thing_accuracy', 'thing_combined_accuracy']
    """

    def __init__(self, *, learning_rate: float = 1e-5) -> None:
        drawings = load_drawings()
        prompts = {"style": [f"{style} style" for style in drawings.style_names], "thing": drawings.thing_names}
        wordings = {name: {"combined": "{thing} in {style}"} for name in prompts}
        super().__init__(f"local-dir:{CLIP}", prompts=prompts, wordings=wordings, learning_rate=learning_rate)
