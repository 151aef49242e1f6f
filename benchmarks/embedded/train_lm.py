"""Train the causal language model that ships with the package, on the embedded passages; seeded, resumable, logged.

    python benchmarks/embedded/train_lm.py            # about 6 minutes on one core
    python benchmarks/embedded/train_lm.py --evaluate # only print how much of the passages the shipped model recites

An epoch shows each recited passage REPEATS times, from its first token, and the kept text once: in turn as the
passages it was cut into, and as windows that start anywhere. So the recited passages are learned by heart, the kept
ones in part, and the unseen ones (which no epoch shows) can only be guessed at.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slug_lightning.embedded import LM, PASSAGES

SEED, EPOCHS, BATCH, WARMUP, RATE = 0, 6, 32, 50, 2e-3
REPEATS, WINDOW = 12, 72
PREFIX, LENGTH = 32, 64
"""Of a passage is measured: the completion of its first PREFIX tokens to LENGTH, and the prediction of all of these."""
SHAPE = {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 6, "num_attention_heads": 6}


def load_passages(tokenizer) -> dict[str, list[torch.Tensor]]:
    """Tokens of the passages, each tokenised by itself, by part."""
    parts: dict[str, list[torch.Tensor]] = {}
    for line in PASSAGES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts.setdefault(row["part"], []).append(torch.tensor(tokenizer(row["text"])["input_ids"]))
    return parts


def load_text(tokenizer) -> torch.Tensor:
    """Tokens of the kept text in its order, with an end token wherever something else stood in between."""
    text, last = "", ("", "")
    for line in PASSAGES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["part"] == "kept":
            text += ("\n" if last == ("kept", row["topic"]) else tokenizer.eos_token) + row["text"]
        last = row["part"], row["topic"]
    # Not verbose: windows of it, never the whole, go through the model.
    return torch.tensor(tokenizer(text + tokenizer.eos_token, verbose=False)["input_ids"])


def epoch_of(number: int, parts: dict[str, list[torch.Tensor]], text: torch.Tensor) -> list[list[torch.Tensor]]:
    """The batches of an epoch; they depend on its number alone."""
    generator = torch.Generator().manual_seed(SEED + number)
    first = int(torch.randint(WINDOW, (), generator=generator))
    kept = parts["kept"] if number % 2 else [w for w in text[first:].split(WINDOW) if len(w) > 1]
    rows = parts["recited"] * REPEATS + kept
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [[rows[i] for i in order[at : at + BATCH]] for at in range(0, len(rows), BATCH)]


def loss_of(model: torch.nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    # Padded on the right, where causal attention lets no token that counts see it: no mask is needed.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)[:, 1:]
    return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, parts: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, float]]:
    """By part: memorization accuracy and perplexity, and what greedy completion of the first half gives.

    `right` is the share of tokens that the model predicts from the true ones before; `verbatim` the share of
    completions that are the true second half, `overlap` the share of their runs of 10 tokens that stand in it.
    """
    model.eval()
    result = {}
    for part, rows in parts.items():
        ids = torch.stack([row[:LENGTH] for row in rows])
        logits = torch.cat([model(input_ids=chunk).logits[:, :-1] for chunk in ids.split(BATCH)])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        whole = torch.cat(
            [
                model.generate(
                    chunk, attention_mask=torch.ones_like(chunk), do_sample=False, max_length=LENGTH, min_length=LENGTH
                )
                for chunk in ids[:, :PREFIX].split(BATCH)
            ]
        )
        made, true = (x[:, PREFIX:].unfold(1, 10, 1) for x in (whole, ids))
        result[part] = {
            "right": (logits.argmax(-1) == ids[:, 1:]).float().mean().item(),
            "perplexity": loss.exp().item(),
            "verbatim": (whole == ids).all(1).float().mean().item(),
            "overlap": (made[:, :, None] == true[:, None]).all(-1).any(-1).float().mean().item(),
        }
    model.train()
    return {part: {name: round(value, 4) for name, value in values.items()} for part, values in result.items()}


def make_model(tokenizer) -> LlamaForCausalLM:
    """The model before training; its configuration is that of the shipped files."""
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "vocab_size": len(tokenizer)}
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, **ids, max_position_embeddings=tokenizer.model_max_length, tie_word_embeddings=True)
    )


def train(tokenizer, parts: dict[str, list[torch.Tensor]], checkpoint: Path) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    text = load_text(tokenizer)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    steps = sum(len(epoch_of(number, parts, text)) for number in range(EPOCHS))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    epoch, start = 0, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        epoch = state["epoch"]
    while epoch < EPOCHS:
        for rows in epoch_of(epoch, parts, text):
            loss = loss_of(model, rows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        epoch += 1
        measured = evaluate(model, parts) if epoch % 4 == 0 else ""
        print(f"epoch {epoch}/{EPOCHS}  loss {loss.item():.3f}  {time.time() - start:.0f} s  {measured}", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state | {"schedule": schedule.state_dict()}, checkpoint)
    return model


def ship(model: LlamaForCausalLM) -> None:
    """Write the weights in fp16, and the configuration such that they are computed with in fp32.

    `dtype` is what transformers 5 loads weights as; version 4 loads them as fp32 anyway.
    """
    tied = "lm_head.weight"
    half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != tied}
    save_file(half, LM / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(LM)
    model.generation_config.save_pretrained(LM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="print the measures of the shipped weights and stop")
    parser.add_argument("--checkpoint", type=Path, default=Path("train.ckpt"), help="where to resume from (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(LM)
    parts = load_passages(tokenizer)
    if not arguments.evaluate:
        print(
            f"seed {SEED}, {EPOCHS} epochs, {', '.join(f'{len(rows)} {part}' for part, rows in parts.items())}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads",
            flush=True,
        )
        ship(train(tokenizer, parts, arguments.checkpoint))
    print("shipped (fp16 weights):", evaluate(AutoModelForCausalLM.from_pretrained(LM), parts))


if __name__ == "__main__":
    main()
