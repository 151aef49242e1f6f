"""Train the CLIP that ships with the package, on the embedded pictures; seeded, resumable, logged.

    python benchmarks/embedded/train.py            # about 45 minutes on two idle cores
    python benchmarks/embedded/train.py --evaluate # only print the accuracies of what is shipped

Each step draws 256 fresh renderings. Their captions name the thing, the style, or both; the image-text
contrast is taken against all thing captions, all style captions and the batch's own full captions, so
that no two captions of a contrast mean the same. A fifth of the things have one drawing that is never
trained on: accuracy on those says how far the model carries to drawings it has not seen.
"""

import argparse
import json
import math
import time
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import Drawings, load_drawings

SEED, STEPS, BATCH, WARMUP, RATE = 0, 2000, 256, 150, 1e-3
DECAY_FROM, PERIOD = 1200, 3200
CONTEXT = 16
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}")
"""Wordings of a caption; `{}` is an object, or a style as in "noto style", or both."""
CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 256, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 3},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def make_tokenizer(drawings: Drawings) -> None:
    """Write a word-level tokenizer that open_clip and transformers both read; the end token has the highest id.

    Both libraries pool the text at the end token: open_clip finds it as the highest id, transformers by its id.
    """
    words = set(" ".join([*TEMPLATES, *drawings.thing_names, *drawings.style_names, "in", "style"]).split()) - {"{}"}
    vocabulary = ["<pad>", "<unk>", "<start>", *sorted(words), "<end>"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])]
    )
    CLIP.mkdir(exist_ok=True)
    tokenizer.save(str(CLIP / "tokenizer.json"))
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    special |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    (CLIP / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    text = CONFIG["text_cfg"] | {"vocab_size": len(ids), "hf_tokenizer_name": "."}
    config = {"model_cfg": CONFIG | {"text_cfg": text}, "preprocess_cfg": PREPROCESS}
    (CLIP / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def captions(drawings: Drawings, template: str) -> tuple[list[str], list[str]]:
    """Captions of every thing and of every style in one wording."""
    return (
        [template.format(t) for t in drawings.thing_names],
        [template.format(f"{s} style") for s in drawings.style_names],
    )


def hold_out(drawings: Drawings) -> torch.Tensor:
    """Mask of the drawings that training never sees: of every fifth thing, one vendor's."""
    thing, style = drawings.things, drawings.styles
    return (thing % 5 == 0) & (style == (thing // 5) % 5)


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokenizer, drawings: Drawings, seed: int = 10_000) -> dict[str, float]:
    """Zero-shot accuracies, in [0, 1], on four fresh renderings of each drawing."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    images = torch.cat(
        [model.encode_image(render(part, generator), normalize=True) for _ in range(4) for part in drawings.pictures.split(256)]
    )
    result = {}
    unseen = hold_out(drawings).repeat(4)
    for kind, texts, truth in zip(("thing", "style"), captions(drawings, TEMPLATES[0]), drawings[1:3], strict=True):
        right = (images @ model.encode_text(tokenizer(texts), normalize=True).T).argmax(1) == truth.repeat(4)
        result[f"{kind}, new renderings"] = right[~unseen].float().mean().item()
        result[f"{kind}, unseen drawings"] = right[unseen].float().mean().item()
    model.train()
    return {name: round(value, 4) for name, value in result.items()}


def loss_of(model, tokenizer, drawings: Drawings, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    template = TEMPLATES[int(torch.randint(len(TEMPLATES), (1,), generator=generator))]
    things, styles = drawings.things[batch], drawings.styles[batch]
    by_thing, by_style = captions(drawings, template)
    both = [
        template.format(f"{drawings.thing_names[t]} in {drawings.style_names[s]} style")
        for t, s in zip(things, styles, strict=True)
    ]
    image = model.encode_image(render(drawings.pictures[batch], generator), normalize=True)
    text = model.encode_text(tokenizer(by_thing + by_style + both), normalize=True)
    logits = model.logit_scale.exp() * image.float() @ text.float().T
    to_thing, to_style, to_both = logits.split([len(by_thing), len(by_style), len(both)], dim=1)
    diagonal = torch.arange(len(batch))
    cross_entropy = torch.nn.functional.cross_entropy
    return (
        cross_entropy(to_thing, things)
        + cross_entropy(to_style, styles)
        + (cross_entropy(to_both, diagonal) + cross_entropy(to_both.T, diagonal)) / 2
    )


def rate_at(step: int) -> float:
    """Factor of the learning rate: warm-up, the start of a long cosine, then straight down to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step, DECAY_FROM) / PERIOD))
    return min(step / WARMUP, cosine) * min(1.0, (STEPS - step) / (STEPS - DECAY_FROM))


def train(drawings: Drawings, checkpoint: Path) -> torch.nn.Module:
    torch.manual_seed(SEED)
    model = open_clip.create_model(f"local-dir:{CLIP}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    generator = torch.Generator().manual_seed(SEED)
    known = (~hold_out(drawings)).nonzero()[:, 0]
    step, start = 0, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        step = state["step"]
    while step < STEPS:
        # Drawings without repetition: a caption that stands twice in a batch would be its own negative.
        batch = known[torch.randperm(len(known), generator=generator)[:BATCH]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokenizer, drawings, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        step += 1
        if step % 100 == 0:
            measured = evaluate(model, tokenizer, drawings) if step % 400 == 0 else ""
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {time.time() - start:.0f} s  {measured}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"schedule": schedule.state_dict(), "generator": generator.get_state()}, checkpoint)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="print the accuracies of the shipped weights and stop")
    parser.add_argument("--checkpoint", type=Path, default=Path("train.ckpt"), help="where to resume from (default: %(default)s)")
    arguments = parser.parse_args()
    drawings = load_drawings()
    if not arguments.evaluate:
        make_tokenizer(drawings)
        print(
            f"seed {SEED}, {STEPS} steps of {BATCH}, {int((~hold_out(drawings)).sum())} drawings trained on, "
            f"{int(hold_out(drawings).sum())} held out, torch {torch.__version__}, {torch.get_num_threads()} threads",
            flush=True,
        )
        model = train(drawings, arguments.checkpoint)
        half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(half, CLIP / "open_clip_model.safetensors")
    model = open_clip.create_model(f"local-dir:{CLIP}")
    print("shipped (fp16 weights):", evaluate(model, open_clip.get_tokenizer(f"local-dir:{CLIP}"), drawings, seed=20_000))


if __name__ == "__main__":
    main()
