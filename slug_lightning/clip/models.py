"""CLIP models of open_clip and transformers, alike: loaded by name, their features, their losses, and one as the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from slug_lightning.errors import UnlearnError
from slug_lightning.patches.clip_names import to_transformers
from slug_lightning.utils.optional_imports import import_optional

Tokenizer = Callable[[list[str]], Tensor]


def load_clip(name: str, pretrained: Optional[str] = None) -> tuple[nn.Module, Tokenizer]:
    """Load a CLIP and its tokenizer by name.

    Args:
        name: as in `slug_lightning.modules.ClipModule`.
        pretrained: likewise.

    Raises:
        UnlearnError: if the library is missing.
    """
    if name.startswith("hf:"):
        transformers = import_optional("transformers", "hf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name.removeprefix("hf:"))
        model = transformers.AutoModel.from_pretrained(name.removeprefix("hf:"))
        if not hasattr(model, "get_text_features"):
            raise UnlearnError(f"model: {name} is a {type(model).__name__}; give a CLIP or SigLIP, with both towers")
        model.float().train()  # as Lightning expects; we set eval ourselves
        length = model.config.text_config.max_position_embeddings

        def tokenize(texts: list[str]) -> Tensor:
            return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

        return model, tokenize
    open_clip = import_optional("open_clip", "clip")
    return open_clip.create_model(name, pretrained=pretrained), open_clip.get_tokenizer(name)


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Unit image features, `[B, D]`, of an open_clip or transformers model."""
    encode: Any = getattr(model, "get_image_features", None) or model.encode_image
    return normalize(_features(encode(images)).float(), dim=-1)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text features, `[B, D]`, of an open_clip or transformers model."""
    encode: Any = getattr(model, "get_text_features", None) or model.encode_text
    return normalize(_features(encode(tokens)).float(), dim=-1)


def _features(output: Any) -> Tensor:
    # transformers 5 gives the tower's output object, whose pooled part holds the projected features.
    return output if isinstance(output, Tensor) else output.pooler_output


def matching_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`mean(1 - cos(v_i, t_i))` over the matching pairs, in [0, 2]."""
    return (1 - (encode_image(model, batch["image"]) * encode_text(model, batch["text"])).sum(-1)).mean()


def contrastive_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Symmetric cross-entropy of the batch's image-text similarities, at least 0."""
    logits = encode_image(model, batch["image"]) @ encode_text(model, batch["text"]).T * model.logit_scale.exp()  # type: ignore[operator]
    truth = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, truth) + cross_entropy(logits.T, truth)) / 2


def to_hugging_face(model: nn.Module) -> nn.Module:
    """Make a transformers `CLIPModel` with the weights of an open_clip ViT model: same features, other names.

    Args:
        model: open_clip `CLIP` whose vision transformer pools at its class token, and whose causal text tower pools at the
            end token (the highest id); with exact GELU or OpenAI's approximation.

    Returns:
        The `CLIPModel`, in evaluation mode.

    Raises:
        UnlearnError: if the model is no such CLIP.

    Example:
        >>> import open_clip
        >>> from slug_lightning.embedded import CLIP
        >>> twin = to_hugging_face(open_clip.create_model(f"local-dir:{CLIP}"))
        >>> type(twin).__name__, twin.config.text_config.hidden_act
        ('CLIPModel', 'gelu')
    """
    from transformers import CLIPConfig, CLIPModel

    source = model.state_dict()
    visual: Any = getattr(model, "visual", None)
    if not hasattr(visual, "transformer") or "positional_embedding" not in source:
        raise UnlearnError("model: not an open_clip CLIP with a vision transformer; only such have a transformers twin")
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
        raise UnlearnError(f"model: {min(wrong)[0]} is not there, or not as transformers' CLIPModel has it")
    twin.load_state_dict(tensors)
    return twin.eval()


def _tower_config(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    exact = isinstance(block.mlp.gelu, nn.GELU) and block.mlp.gelu.approximate == "none"
    if not exact and type(block.mlp.gelu).__name__ != "QuickGELU":
        raise UnlearnError(f"model: no transformers twin for the activation {block.mlp.gelu}")
    return {
        "hidden_size": block.mlp.c_fc.in_features,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu" if exact else "quick_gelu",
        "layer_norm_eps": block.ln_1.eps,
    }
