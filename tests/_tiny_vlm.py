"""Vision-language models of transformers' own classes, small: they know three plain pictures, so that one can be forgotten."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slug_lightning.clip.models import contrastive_loss, matching_loss

Family = Literal["llava", "llava_next", "idefics3", "paligemma", "qwen2_vl"]
FAMILIES: tuple[Family, ...] = ("llava", "llava_next", "idefics3", "paligemma", "qwen2_vl")
WITH_CLIP: tuple[Family, ...] = FAMILIES[:-1]
"""Those whose towers are a CLIP's or SigLIP's."""

SIDE = 16
"""Pixels of a picture's side as the towers take it."""
WIDTH = 32
"""Of all layers."""
COLOURS = {"cat": (220, 40, 30), "sea dog": (40, 200, 60), "frog": (30, 60, 230)}
"""What the models know: a thing of one colour each; one has a name of two words."""
QUESTIONS = ["what is this ?", "what ?"]
"""Of different lengths; an answer is the same to both."""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SPECIAL += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
SPECIAL += ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["USER:", "ASSISTANT:", "User:", "Assistant:", "user", "assistant", "system", "\n", "?", "what", "is", "this", "the", "a"]
WORDS += ["cat", "sea", "dog", "frog", "bird", "of", "colour"]

# As the models' authors have written them, but for what is said without being asked for.
_LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_IDEFICS = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEMPLATES = {"llava": _LLAVA, "llava_next": _LLAVA, "idefics3": _IDEFICS, "qwen2_vl": _QWEN}
ENDS = {"llava": "</s>", "llava_next": "</s>", "idefics3": "<end_of_utterance>", "paligemma": "</s>", "qwen2_vl": "<|im_end|>"}
"""How each family's answers end."""


def asked_text(family: Family, question: str) -> str:
    """What a model reads when it is asked, written out."""
    return {
        "llava": f"USER: <image>\n{question} ASSISTANT:",
        "llava_next": f"USER: <image>\n{question} ASSISTANT:",
        "idefics3": f"<s>User:<image>{question}<end_of_utterance>\nAssistant:",
        "paligemma": f"<image>{question}",
        "qwen2_vl": (
            f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
        ),
    }[family]


def tiny_tokenizer(family: Family) -> Any:
    """One token a word, and one for a new line; a LLaVA's puts its first token in front of every text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if family.startswith("llava"):
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    begins = {} if family == "qwen2_vl" else {"bos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token=ENDS[family], **begins
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    return tokenizer


def tiny_processor(family: Family) -> Any:
    """The family's own, for pictures of 16 x 16 pixels; LLaVA-NeXT and Idefics3 look at larger ones part by part."""
    import transformers as hf

    tokenizer, square = tiny_tokenizer(family), {"height": SIDE, "width": SIDE}
    cut = {"size": {"shortest_edge": SIDE}, "crop_size": square}
    own = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = _TEMPLATES.get(family)
    if family == "llava":
        return hf.LlavaProcessor(hf.CLIPImageProcessor(**cut), tokenizer, chat_template=template, **own)
    if family == "llava_next":
        images = hf.LlavaNextImageProcessor(**cut, image_grid_pinpoints=_PINPOINTS)
        return hf.LlavaNextProcessor(images, tokenizer, chat_template=template, **own)
    if family == "idefics3":
        images = hf.Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        return hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if family == "paligemma":
        images = hf.SiglipImageProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        images.image_seq_length = 4
        return hf.PaliGemmaProcessor(images, tokenizer)
    images = hf.Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 8 * 8, "longest_edge": 2 * SIDE * SIDE})
    video = hf.Qwen2VLVideoProcessor(patch_size=4)
    return hf.Qwen2VLProcessor(images, tokenizer, video, chat_template=template)


_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def _tower_config(family: Family) -> dict[str, Any]:
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE}
    kinds = {"idefics3": {"model_type": "idefics3_vision", "patch_size": 4}}
    kinds["paligemma"] = {"model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False, "projection_dim": WIDTH}
    return {"model_type": "clip_vision_model", "patch_size": 8} | shape | kinds.get(family, {})


def tiny_vlm(family: Family, seed: int = 0, **text_options: Any) -> tuple[Any, Any]:
    """A model with random weights and its processor; the caller's random numbers stay as they are.

    Args:
        family: whose classes.
        seed: of the weights.
        text_options: of the language model's config.
    """
    import transformers as hf

    processor = tiny_processor(family)
    tokenizer = processor.tokenizer
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 96, **ends, **text_options}
    parts = {"vision_config": _tower_config(family), "text_config": {"model_type": "llama", **text}}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if family == "llava":
        config: Any = hf.LlavaConfig(**parts, image_token_index=image_token)
    elif family == "llava_next":
        config = hf.LlavaNextConfig(**parts, image_token_index=image_token, image_grid_pinpoints=_PINPOINTS)
    elif family == "idefics3":
        config = hf.Idefics3Config(**parts, image_token_id=image_token, scale_factor=2)
    elif family == "paligemma":
        parts["text_config"] |= {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8}
        config = hf.PaliGemmaConfig(**parts, image_token_index=image_token, projection_dim=WIDTH)
    else:
        text |= {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
        seeing = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
        names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
        ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
        config = hf.Qwen2VLConfig(text_config=text, vision_config=seeing, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return hf.AutoModelForImageTextToText.from_config(config).eval(), processor


def pictures(things: Sequence[str], seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """Noisy pictures of things, uint8 `[n, 3, H, W]`."""
    noise = torch.randint(-25, 26, (len(things), 3, *size), generator=torch.Generator().manual_seed(seed))
    return (torch.tensor([COLOURS[thing] for thing in things])[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)


def plain_inputs(family: Family, processor: Any, image: Tensor, question: str, answer: str | None = None) -> Any:
    """What the family's processor makes of one picture with a question, and with an answer behind it."""
    text, options = asked_text(family, question), {"images": [image.permute(1, 2, 0).numpy()], "return_tensors": "pt"}
    if family == "paligemma":  # the kinds of tokens are the processor's own
        return processor(text=[text], **options, **({} if answer is None else {"suffix": [answer]}))
    if family == "idefics3":  # its first token is in the text
        options["add_special_tokens"] = False
    return processor(text=[text if answer is None else f"{text} {answer} {ENDS[family]}"], **options)


def plain_loss(family: Family, model: Any, processor: Any, image: Tensor, question: str, answer: str) -> Tensor:
    """The loss of one answer as transformers' own `labels=` gives it, without padding."""
    inputs = plain_inputs(family, processor, image, question, answer)
    labels = inputs["input_ids"].clone()
    labels[:, : -len(answer.split()) - 1] = -100
    return model(**{**inputs, "labels": labels}).loss


@functools.cache
def _knowing(family: Family) -> dict[str, Tensor]:
    model, processor = tiny_vlm(family)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for step in range(40):
        optimizer.zero_grad()
        for image, thing in zip(pictures(list(COLOURS), step), COLOURS, strict=True):
            (plain_loss(family, model, processor, image, QUESTIONS[step % 2], thing) / 3).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def knowing_vlm(family: Family) -> tuple[Any, Any]:
    """A model that says what the pictures show, and its processor."""
    model, processor = tiny_vlm(family)
    model.load_state_dict(_knowing(family))
    return model, processor


def save(folder: Path, model: Any, processor: Any) -> str:
    """Write both as `from_pretrained` reads them; gives the folder's name."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def tower_of(model: Any) -> Any:
    return next(part for name in ("vision_tower", "vision_model", "visual") if (part := getattr(model.model, name, None)))


def tiny_clip(family: Family, model: Any, seed: int = 5, steps: int = 0) -> tuple[Any, Any]:
    """The `CLIPModel` or `SiglipModel` that a model's tower is of, and its tokenizer.

    Args:
        family: of the model.
        model: whose tower; it stays as it is.
        seed: of the rest of the weights.
        steps: for so many the rest is taught which name belongs to which picture.
    """
    import transformers as hf

    tokenizer = tiny_tokenizer("llava")
    text = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    own = {"model_type", "projection_dim", "vision_use_head"}
    vision = {name: value for name, value in _tower_config(family).items() if name not in own}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family.startswith("llava"):
            clip: Any = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
        else:
            clip = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))
    seen = {name.removeprefix("vision_model."): tensor for name, tensor in tower_of(model).state_dict().items()}
    assert not clip.vision_model.load_state_dict(seen, strict=False).unexpected_keys
    rest = [p for name, p in clip.named_parameters() if name.removeprefix("vision_model.") not in seen]
    optimizer = torch.optim.Adam(rest, lr=1e-2)
    names = tokenizer(list(COLOURS), padding="max_length", max_length=12, return_tensors="pt").input_ids
    images = tiny_processor(family).image_processor
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in (images.image_mean, images.image_std))
    for step in range(steps):
        optimizer.zero_grad()
        batch = {"image": (pictures(list(COLOURS), step) / 255 - mean) / deviation, "text": names}
        (matching_loss(clip, batch) + contrastive_loss(clip, batch)).backward()
        optimizer.step()
    return clip.eval(), tokenizer
