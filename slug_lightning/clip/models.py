"""Load CLIP models of open_clip and transformers, compute their features and losses, and convert one into the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from slug_lightning.errors import UnlearnError
from slug_lightning.patches.clip_names import to_transformers
from slug_lightning.utils.optional_imports import import_optional
from slug_lightning.utils.pretrained import load_pretrained

Tokenizer = Callable[[list[str]], Tensor]


def load_clip(name: str, pretrained: Optional[str] = None) -> tuple[nn.Module, Tokenizer]:
    """Load a CLIP or SigLIP and its tokenizer by name; the arguments are those of `slug_lightning.modules.ClipModule`."""
    if not name.startswith("hf:"):
        open_clip = import_optional("open_clip", "clip")
        return open_clip.create_model(name, pretrained=pretrained), open_clip.get_tokenizer(name)
    transformers = import_optional("transformers", "hf")
    tokenizer = load_pretrained("model", transformers.AutoTokenizer, name.removeprefix("hf:"))
    model = load_pretrained("model", transformers.AutoModel, name.removeprefix("hf:"))
    if not hasattr(model, "get_text_features"):
        raise UnlearnError(f"model: {name} is a {type(model).__name__}; give a CLIP or SigLIP, with both towers")
    model.float().train()  # as Lightning expects; we set eval ourselves
    length = model.config.text_config.max_position_embeddings
    return model, partial(padded_tokens, tokenizer, length=length)


def padded_tokens(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Token ids, `[B, length]`, of a transformers tokenizer."""
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Unit image features, `[B, D]`, of an open_clip or transformers model."""
    return _unit_features(getattr(model, "get_image_features", None) or model.encode_image, images)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text features, `[B, D]`, of an open_clip or transformers model."""
    return _unit_features(getattr(model, "get_text_features", None) or model.encode_text, tokens)


def _unit_features(encode: Any, inputs: Tensor) -> Tensor:
    output = encode(inputs)
    # transformers 5 returns the tower's output object, whose pooled part holds the projected features.
    return normalize((output if isinstance(output, Tensor) else output.pooler_output).float(), dim=-1)


def matching_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`mean(1 - cos(v_i, t_i))` over the matching pairs, in [0, 2]."""
    return (1 - (encode_image(model, batch["image"]) * encode_text(model, batch["text"])).sum(-1)).mean()


def contrastive_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Symmetric cross-entropy of the batch's image-text similarities, at least 0."""
    logits = encode_image(model, batch["image"]) @ encode_text(model, batch["text"]).T * model.logit_scale.exp()  # type: ignore[operator]
    truth = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, truth) + cross_entropy(logits.T, truth)) / 2


def distinct_contrastive_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Contrastive loss in which equal captions are one: for a batch with many pictures of the same thing.

    In `contrastive_loss`, equal captions are each other's negatives: 16 of the same cannot get below `log 16`, and are better
    than the others at once, without being near. Here a picture is compared with each caption once, and a caption's pictures
    share its probability. The same as `contrastive_loss` where all captions differ.
    """
    texts, truth = batch["text"].unique(dim=0, return_inverse=True)
    scale: Any = model.logit_scale
    logits = encode_image(model, batch["image"]) @ encode_text(model, texts).T * scale.exp()
    shares = one_hot(truth, len(texts)).to(logits.dtype).T
    return (cross_entropy(logits, truth) + cross_entropy(logits.T, shares / shares.sum(1, keepdim=True))) / 2


class SourceClip(nn.Module):
    """A frozen CLIP or SigLIP of transformers, one of whose towers computes with the tensors of the edited model.

    `matching_loss` and `contrastive_loss` take it, so that their gradients reach these tensors. Subclasses define
    `encode_image` and `encode_text`. `mean` and `deviation` are those of a picture's channels in [0, 1].
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, clip: Any, mean: Any, deviation: Any) -> None:
        super().__init__()
        self.model = clip.requires_grad_(False)
        self.size = int(clip.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale


def to_hugging_face(model: nn.Module) -> nn.Module:
    """Convert an open_clip ViT model into a transformers `CLIPModel` with the same features, in evaluation mode.

    Its vision transformer must pool at the class token, its causal text tower at the end token (the highest id), with exact
    GELU or OpenAI's approximation; any other model is refused. A transformers model is returned as it is.
    """
    from transformers import CLIPConfig, CLIPModel

    if hasattr(model, "get_text_features"):
        return model
    source = model.state_dict()
    visual: Any = getattr(model, "visual", None)
    if not hasattr(visual, "transformer") or "positional_embedding" not in source:
        raise UnlearnError("model: only an open_clip CLIP with a vision transformer can be converted to transformers")
    pools = visual.pool_type, model.text_pool_type, model.attn_mask is not None
    if pools != ("tok", "argmax", True):
        raise UnlearnError(f"model: pools and masks {pools}, while transformers' CLIPModel does ('tok', 'argmax', True)")
    tensors = to_transformers(source)
    end = source["token_embedding.weight"].shape[0] - 1
    text = _tower_config(model.transformer) | {
        "vocab_size": end + 1,
        "max_position_embeddings": source["positional_embedding"].shape[0],
        "eos_token_id": end,
        "bos_token_id": end - 1,
        "pad_token_id": 0,
    }
    vision = _tower_config(visual.transformer) | {"patch_size": visual.patch_size[0], "image_size": visual.image_size[0]}
    twin = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=visual.output_dim))
    expected = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    if wrong := expected.items() ^ {name: tensor.shape for name, tensor in tensors.items()}.items():
        raise UnlearnError(f"model: {min(wrong)[0]} is missing, or has another shape than in transformers' CLIPModel")
    twin.load_state_dict(tensors)
    return twin.eval()


def _tower_config(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    exact = isinstance(block.mlp.gelu, nn.GELU) and block.mlp.gelu.approximate == "none"
    if not exact and type(block.mlp.gelu).__name__ != "QuickGELU":
        raise UnlearnError(f"model: transformers' CLIPModel has no counterpart of the activation {block.mlp.gelu}")
    return {
        "hidden_size": block.mlp.c_fc.in_features,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu" if exact else "quick_gelu",
        "layer_norm_eps": block.ln_1.eps,
    }
