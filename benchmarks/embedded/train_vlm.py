"""Train the vision-language model that ships with the package: the embedded CLIP's vision tower and a small language model.

    python benchmarks/embedded/train_vlm.py            # less than an hour on one core
    python benchmarks/embedded/train_vlm.py --evaluate # only print how many answers of what is shipped are right

They are joined by transformers' own `LlavaForConditionalGeneration`. The tower is frozen, as LLaVA's is, and so stays that
of the embedded CLIP, bit for bit. Each step draws 128 fresh renderings and asks of each one question: which thing it is,
which style it is in, both, or how many drawings it shows (one, or two side by side). The drawings that the CLIP never saw are
not shown here either.
"""

import argparse
import math
import time
from pathlib import Path

import open_clip
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from train import hold_out
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from slug_lightning.clip.models import to_hugging_face
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.datamodules.demo.questions import NUMBERS, QUESTIONS, answer_of, side_by_side
from slug_lightning.embedded import CLIP, VLM
from slug_lightning.embedded.drawings import Drawings, load_drawings

SEED, STEPS, BATCH, WARMUP, RATE = 0, 1500, 128, 100, 1e-3
MIX = {"thing": 0.45, "style": 0.2, "both": 0.2, "count": 0.15}
"""How often what is asked."""
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
SIDE, PATCH = 64, 16
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %}{% for part in message.content %} {{ part.text }}{% endfor %}</s>{% endif %}{% endfor %}"
)


def make_processor(drawings: Drawings) -> LlavaProcessor:
    """A word-level tokenizer, an image processor that changes no pixel of 64 x 64 pictures, and LLaVA's way to join them."""
    questions = " ".join(question for wordings in QUESTIONS.values() for question in wordings)
    text = " ".join([questions, *NUMBERS, *drawings.thing_names, *drawings.style_names, "in style user assistant :"])
    words = {word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)}
    ids = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=["<image>"], padding_side="left", **names)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The embedded CLIP's vision tower, frozen, before a language model that has learned nothing yet."""
    tokenizer = processor.tokenizer
    clip = to_hugging_face(open_clip.create_model(f"local-dir:{CLIP}"))
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2 + 1,
        vision_feature_layer=-1,  # the class token of the last layer is what the CLIP's own features are made of
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower.load_state_dict({name.removeprefix("vision_model."): p for name, p in clip.vision_model.state_dict().items()})
    tower.requires_grad_(False)
    return model


def chat(processor: LlavaProcessor, question: str, answer: str | None = None) -> str:
    """A question about a picture, and its answer, as the model reads them."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return processor.apply_chat_template(messages)


def encode(processor: LlavaProcessor, texts: list[str]) -> dict[str, torch.Tensor]:
    """Tokens, padded on the right, with every picture's place kept by as many tokens as it will have."""
    long = [text.replace("<image>", "<image>" * ((SIDE // PATCH) ** 2 + 1)) for text in texts]
    return processor.tokenizer(long, padding=True, padding_side="right", return_tensors="pt")


def ask(drawings: Drawings, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, list, list, list]:
    """Fresh renderings `[B, 3, 64, 64]` of some drawings, and of each what is asked, the question and the answer."""
    asked = [list(MIX)[int(i)] for i in torch.multinomial(torch.tensor(list(MIX.values())), len(rows), True, generator=generator)]
    wordings = [QUESTIONS[kind] for kind in asked]
    questions = [some[int(torch.randint(len(some), (), generator=generator))] for some in wordings]
    answers = [answer_of(drawings, int(row), kind) for row, kind in zip(rows, asked, strict=True)]
    pictures = drawings.pictures[rows]
    others = drawings.pictures[rows[torch.randperm(len(rows), generator=generator)]]
    twice = torch.tensor([kind == "count" for kind in asked]) & (torch.rand(len(rows), generator=generator) < 0.5)
    pictures = torch.where(twice[:, None, None, None], side_by_side(pictures, others), pictures)
    answers = [NUMBERS[1] if two else answer for two, answer in zip(twice.tolist(), answers, strict=True)]
    # As the image processor sees pictures: 8 bits a channel.
    images = ((render(pictures, generator).clamp(-1, 1) + 1) / 2 * 255).round() / 255 * 2 - 1
    return images, asked, questions, answers


def loss_of(model, processor, drawings: Drawings, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    images, _, questions, answers = ask(drawings, rows, generator)
    whole = encode(processor, [chat(processor, *pair) for pair in zip(questions, answers, strict=True)])
    prompt = encode(processor, [chat(processor, question) for question in questions])["attention_mask"].sum(1, keepdim=True)
    positions = torch.arange(whole["input_ids"].shape[1])
    counts = (positions >= prompt) & whole["attention_mask"].bool()
    labels = whole["input_ids"].masked_fill(~counts, -100)
    inputs = {name: whole[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, pixel_values=images, labels=labels).loss


@torch.no_grad()
def evaluate(model, processor, drawings: Drawings, rows: torch.Tensor, seed: int) -> dict[str, float]:
    """How many answers are word for word right, in [0, 1], by what was asked, on fresh renderings of some drawings."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    right: dict[str, list[bool]] = {kind: [] for kind in MIX}
    for part in rows.split(256):
        images, asked, questions, answers = ask(drawings, part, generator)
        long = encode(processor, [chat(processor, question) for question in questions])
        texts = processor.tokenizer.batch_decode(long["input_ids"].masked_fill(long["attention_mask"] == 0, 0))
        texts = [text.replace("<pad>", "").replace("<s>", "").strip() for text in texts]
        inputs = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found = model.generate(**inputs, pixel_values=images, max_new_tokens=12, do_sample=False)
        said = processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for kind, text, answer in zip(asked, said, answers, strict=True):
            right[kind].append(text.strip() == answer)
    model.train()
    every = [one for some in right.values() for one in some]
    return {kind: round(sum(some) / max(1, len(some)), 4) for kind, some in (right | {"all": every}).items()}


def rate_at(step: int) -> float:
    """Factor of the learning rate: warm-up, then a cosine down to nothing."""
    return min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def train(model, processor, drawings: Drawings, checkpoint: Path) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
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
        rows = known[torch.randperm(len(known), generator=generator)[:BATCH]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, processor, drawings, rows, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % 100 == 0:
            some = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(step))[:512]]
            measured = evaluate(model, processor, drawings, some, seed=10_000 + step) if step % 300 == 0 else ""
            print(f"step {step}/{STEPS}  loss {loss.item():.4f}  {time.time() - start:.0f} s  {measured}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"schedule": schedule.state_dict(), "generator": generator.get_state()}, checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="print how the shipped weights answer, and stop")
    parser.add_argument("--checkpoint", type=Path, default=Path("vlm.ckpt"), help="where to resume from (default: %(default)s)")
    arguments = parser.parse_args()
    drawings = load_drawings()
    if not arguments.evaluate:
        processor = make_processor(drawings)
        model = make_model(processor)
        count = sum(p.numel() for p in model.parameters())
        print(
            f"seed {SEED}, {STEPS} steps of {BATCH}, {count} parameters, {len(processor.tokenizer)} words, torch "
            f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads",
            flush=True,
        )
        train(model, processor, drawings, arguments.checkpoint)
        model.half().save_pretrained(VLM)
        processor.save_pretrained(VLM)
    model = AutoModelForImageTextToText.from_pretrained(VLM, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(VLM)
    for name, mask in (("new renderings", ~hold_out(drawings)), ("unseen drawings", hold_out(drawings))):
        rows = mask.nonzero()[:, 0].repeat(1 if name == "new renderings" else 4)
        print(f"shipped (fp16 weights), {len(rows)} questions, {name}:", evaluate(model, processor, drawings, rows, seed=20_000))


if __name__ == "__main__":
    main()
