"""CLIP: open_clip models by name, Hugging Face `CLIPModel`, and the small one that ships with the package."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.clip.models import Tokenizer, contrastive_loss, encode_image, encode_text, load_clip, matching_loss
from slug_lightning.embedded import CLIP
from slug_lightning.errors import UnlearnError
from slug_lightning.modules.base import UnlearnModule


class ClipModule(UnlearnModule):
    """Forgets by the cosine of matching pairs, keeps by the contrastive loss, watches zero-shot accuracy.

    A batch is a dict: `image`, `[B, 3, H, W]`, `text`, tokens `[B, T]`, and for each set of prompts the index of the
    right one under the set's name, `[B]`, or -1 for a sample that has none.

    `L_forget = mean(1 - cos(v_i, t_i))` over the pairs; `L_retain` is the symmetric contrastive loss of the batch
    (SLUG, arXiv 2407.11867; contrastive loss: CLIP, arXiv 2103.00020, figure 3). The two towers compete on fronts of
    their own.

    Args:
        model: name of an open_clip model ("ViT-B-32", "local-dir:…"), "hf:" and the name or folder of a transformers
            `CLIPModel`, or a model of either library.
        pretrained: open_clip tag or checkpoint file; None for random weights.
        prompts: classes by the name of a set, for zero-shot accuracy: `{"identity": ["a photo of …", …]}` logs
            `identity_accuracy`. Without prompts the losses are the metrics, and a forget loss of 1 counts as forgotten:
            a cosine of 0, at which pictures and captions have nothing to do with each other.
        tokenizer: makes tokens `[N, T]` of texts; needed only where `model` is given as an object and there are prompts.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Example:
        >>> module = ClipModule(f"local-dir:{CLIP}", prompts={"animal": ["cat", "dog"]})
        >>> module.chance
        {'animal_accuracy': 0.5}
    """

    towers = {"vision": "model.vis*", "text": "*"}
    methods = ("encode_image", "encode_text", "get_image_features", "get_text_features")

    def __init__(
        self,
        model: Union[str, nn.Module],
        pretrained: Optional[str] = None,
        prompts: Optional[dict[str, list[str]]] = None,
        *,
        tokenizer: Optional[Tokenizer] = None,
        learning_rate: float = 1e-5,
    ) -> None:
        if isinstance(model, str):
            model, tokenizer = load_clip(model, pretrained)
        super().__init__(model, contrastive_loss, forget_loss=matching_loss, learning_rate=learning_rate)
        self.prompts = {name: list(classes) for name, classes in (prompts or {}).items()}
        self.chance = {f"{name}_accuracy": 1 / len(classes) for name, classes in self.prompts.items()}
        self.forget_target = None if self.prompts else 1.0
        if self.prompts:
            if tokenizer is None:
                raise UnlearnError("tokenizer: prompts are given, and a model object brings no tokenizer; pass tokenizer=…")
            names = list(self.chance)
            self.forget_metric, self.retain_metric = names[0], names if len(names) > 1 else names[0]  # type: ignore[assignment]
        for name, classes in self.prompts.items():
            assert tokenizer is not None
            self.register_buffer(f"{name}_tokens", tokenizer(classes), persistent=False)
        self._classes: dict[str, tuple[Any, Tensor]] = {}

    def on_validation_start(self) -> None:
        """Encode the prompts anew: weights may have changed in ways that leave no mark on them."""
        self._classes.clear()

    on_test_start = on_validation_start

    def class_features(self, name: str) -> Tensor:
        """Unit features of a set of prompts, `[C, D]`; computed again only if the text tower was written to.

        There may be thousands of prompts, and an edit of the vision tower changes none of them.
        """
        tokens = self.get_buffer(f"{name}_tokens")
        parameters = [p for key, p in self.model.named_parameters() if not key.startswith("vis")]
        # A sharded tower is run by all processes together, and its parameters don't tell when they are written to.
        sharded = any(isinstance(p, DTensor) for p in parameters)
        if sharded or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return encode_text(self.model, tokens)
        kind = tokens.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        state = precision, torch.is_inference_mode_enabled(), [(p.data_ptr(), p._version) for p in parameters]
        if name not in self._classes or self._classes[name][0] != state:
            self._classes[name] = state, encode_text(self.model, tokens)
        return self._classes[name][1]

    def scores(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Zero-shot: whether the nearest prompt of a set is the right one, `[B]`; NaN for a label of -1."""
        image = encode_image(self.model, batch["image"])
        found = {}
        for name in [name for name in self.prompts if name in batch]:
            right = (image @ self.class_features(name).T).argmax(1) == batch[name]
            found[f"{name}_accuracy"] = right.float().masked_fill(batch[name] < 0, torch.nan)
        return found


class EmbeddedClip(ClipModule):
    """The CLIP that ships with the package: small, ours, trained on emoji only. It knows 234 things and 5 styles.

    Example:
        >>> module = EmbeddedClip()
        >>> sorted(module.chance)
        ['style_accuracy', 'thing_accuracy']
    """

    def __init__(self, *, learning_rate: float = 1e-5) -> None:
        from slug_lightning.embedded.drawings import load_drawings

        drawings = load_drawings()
        prompts = {"style": [f"{style} style" for style in drawings.style_names], "thing": drawings.thing_names}
        super().__init__(f"local-dir:{CLIP}", prompts=prompts, learning_rate=learning_rate)
