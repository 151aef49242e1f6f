"""Make a language model forget passages that it recites: ICU beside its baselines and SLUG, at equal forgetting.

Every method starts from the same model, on the same passages, and stops as soon as memorization accuracy and extraction
likelihood (from one prefix) are where they are on passages that the model never saw; SLUG, which has one bound, as soon as the
accuracy is. What counts then is what it cost: the perplexity of other text. Means are over the draws that were forgotten.
Settings that are no paper's were chosen on draw 100, which is not reported. Of SLUG there are four: the layer may be a tensor or
all of an attention or of an MLP ("siblings"; `granularity="module"` is that of tensors, as their modules hold one matrix each),
and where one is too much at once, the second half of the way goes along another. "MA at +5 %" is how far accuracy falls if the
same edit is only as strong as makes other text (search data) five per cent more perplexing.

    python benchmarks/passages.py                                    # the embedded model, five draws of passages
    python benchmarks/passages.py --model FOLDER --texts stories.txt # another model, which first learns its passages by heart

Each line is added to the output as soon as it is there; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas
import torch

from slug_lightning.callbacks import ICUCallback, UnlearnCallback
from slug_lightning.datamodules import PassageDataModule, PythonDocsDataModule
from slug_lightning.datamodules.text.reading import read_texts
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.completion import teacher_forced
from slug_lightning.lm.criteria import MemorizationBelow
from slug_lightning.lm.losses import DPO, ICU, KL, NPO, GradDiff, GradientAscent, LMLoss, SimNPO
from slug_lightning.lm.metrics import memorization_accuracy
from slug_lightning.lm.sequences import pad
from slug_lightning.methods import SLUG
from slug_lightning.methods.icu.examination import Examiner, means_of
from slug_lightning.modules import CausalLMModule, EmbeddedLM
from slug_lightning.tensors.layers import Granularity

METHODS: dict[str, tuple[LMLoss, dict[str, Any], dict[str, Any]]] = {
    "ICU": (ICU(), {"pairing": "nearest"}, {}),
    "ICU, unlikelihood": (
        ICU(0.03, 0.1, 1.0, unlikelihood=True),
        {"pairing": "nearest", "neighbours": 8},
        {"lr": 3e-4, "scheduler": partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=8)},
    ),
    "KUMPR": (GradientAscent(), {"pairing": "random"}, {}),
    "KL": (KL(), {"pairing": "random"}, {}),
    "NPO": (NPO(), {"pairing": "random"}, {}),
    "SimNPO": (SimNPO(), {"pairing": "random"}, {}),
    "GradDiff": (GradDiff(), {"pairing": "random"}, {}),
    "DPO": (DPO(), {"pairing": "random"}, {}),
}
"""Loss with the weights of its paper, which texts are kept beside each passage, and what else is unlike the others.

The second is that of `configs/icu.yaml`, whose settings were found on draw 100.
"""
BY_SLUG: dict[str, tuple[int, Granularity]] = {
    "SLUG": (1, "tensor"),
    "SLUG, siblings": (1, "siblings"),
    "SLUG, two layers": (2, "tensor"),
    "SLUG, two layers of siblings": (2, "siblings"),
}
"""How many layers are edited, one after the other, and what counts as one."""
Make = Callable[..., CausalLMModule]
N = 10
MOST_RISE = 0.05
"""Of the perplexity of other text, at which it is told what SLUG has forgotten."""
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


def run(method: str, make: Make, data: Callable[..., PassageDataModule], options: argparse.Namespace) -> dict:
    """Forget, by one method; gives a line of the table."""
    pl.seed_everything(0, verbose=False)
    if method in BY_SLUG:
        return slug(make(), data(), options, *BY_SLUG[method])
    loss, kept, more = METHODS[method]
    callback = ICUCallback(forgotten=[MemorizationBelow()], refine=method.startswith("ICU"), n=N)
    trainer = pl.Trainer(max_epochs=options.epochs, limit_val_batches=4, callbacks=[callback], **QUIET)
    trainer.fit(make(loss=loss, **more), data(**kept))
    report = callback.report
    assert report is not None
    seconds = report.cost["seconds"]
    return {
        "status": report.status,
        "epochs": len(report.trace) - 1,
        "validation / training": seconds["validation"] / seconds["training"],
        "seconds": seconds["validation"] + seconds["training"],
    } | line(report.before, report.after)


def slug(
    module: CausalLMModule, data: PassageDataModule, options: argparse.Namespace, layers: int, granularity: Granularity
) -> dict:
    """The same by one searched step along each layer, each an equal part of the way: as far as it takes, whatever that costs."""
    data.tokenizer = module.tokenizer
    data.setup()
    before = measured(module, data)
    original = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    start, end = (before[kind]["memorization_accuracy"] for kind in ("forget", "unseen"))
    edited = []
    began = time.perf_counter()
    for stage in range(1, layers + 1):
        callback = UnlearnCallback(
            method=SLUG.paper(granularity=granularity, max_evaluations=options.evaluations),
            forget_target=start + (end - start) * stage / layers,
            retain_tolerance=1e6,
        )
        pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(module, data)
        report = callback.report
        assert report is not None
        if report.status != "unlearned":
            break
        edited.append(report.layer)
        for name in report.tensors:  # the next one is another: what is frozen is no candidate
            module.model.get_parameter(name).requires_grad_(False)
    seconds = time.perf_counter() - began
    found = {"status": report.status, "epochs": 0, "layer": edited, "seconds": seconds} | line(before, measured(module, data))
    return found | {f"MA at +{MOST_RISE:.0%}": weakened(module, data, original)}


def weakened(module: CausalLMModule, data: PassageDataModule, original: dict[str, torch.Tensor]) -> float:
    """Accuracy on the passages where the edit is as strong as the perplexity of other text allows."""
    examiner = examiner_of(module, data)
    moves = {name: p.detach() - original[name] for name, p in module.model.named_parameters()}

    @torch.no_grad()
    def perplexity(strength: float) -> float:
        for name, p in module.model.named_parameters():
            p.copy_(original[name] + strength * moves[name])
        return examiner.perplexity(data.val_dataloader())

    most = (1 + MOST_RISE) * perplexity(0.0)
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if perplexity(middle) <= most else (low, middle)
    perplexity(low)
    predicted = pad(teacher_forced(module.model, data.forget_passages)[0])["input_ids"]
    return memorization_accuracy(predicted, pad(data.forget_passages)).mean().item()


def examiner_of(module: CausalLMModule, data: PassageDataModule) -> Examiner:
    """What measures for `ICUCallback`, without one."""
    from slug_lightning.distributed.strategy import Runner
    from slug_lightning.utils.progress import Progress

    trainer = pl.Trainer(max_epochs=1, **QUIET)
    trainer.strategy.connect(module)
    return Examiner(module, Runner(trainer.strategy, trainer.state), data.prefix, [], N, 64, Progress(None))


def measured(module: CausalLMModule, data: PassageDataModule) -> dict[str, dict[str, float]]:
    """What `ICUCallback` reports, for a method that it has no part in."""
    examiner = examiner_of(module, data)
    means = {
        kind: means_of(examiner.of(rows, None))
        for kind, rows in (("forget", data.forget_passages), ("unseen", data.unseen_passages))
    }
    return means | {"other": {"perplexity": examiner.perplexity(data.test_dataloader())}}


def line(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the table shows of a run; all on whole passages and report data."""
    found = {"MA before": before["forget"]["memorization_accuracy"], "MA unseen": before["unseen"]["memorization_accuracy"]}
    found |= {"MA": after["forget"]["memorization_accuracy"], f"EL_{N} before": before["forget"]["extraction_likelihood"]}
    found |= {f"EL_{N} unseen": before["unseen"]["extraction_likelihood"], f"EL_{N}": after["forget"]["extraction_likelihood"]}
    found |= {"BLEU": after["forget"]["bleu"], "diversity": after["forget"]["diversity"]}
    was, now = before["other"]["perplexity"], after["other"]["perplexity"]
    return found | {"other perplexity": was, "rise %": 100 * (now / was - 1)}


# ---- another model, which first learns its passages by heart


def own_texts(path: str, tokenizer: Any, length: int, seed: int, passages: int) -> dict[str, list[str]]:
    """Texts of at least `length` tokens: those to learn and forget, those never seen, and the rest."""
    texts = [text for text in read_texts("texts", path) if len(tokenizer(text)["input_ids"]) >= length]
    random.Random(seed).shuffle(texts)
    return {"forget": texts[:passages], "unseen": texts[passages : 2 * passages], "keep": texts[2 * passages :]}


def learn(model: torch.nn.Module, data: PassageDataModule, most: int = 1000) -> float:
    """Train a model on its passages and, so that it stays what it is, on other texts, until it recites 97 %."""
    module = CausalLMModule(model, tokenizer=data.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    passages, others = pad(data.forget_passages), itertools.cycle(data.retain_dataloader("train"))
    recited = 0.0
    for step in range(most):
        loss = module.forget_step(passages, 0) + module.retain_step(next(others), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            predicted = torch.stack(teacher_forced(model, data.forget_passages)[0])
            recited = (predicted == passages["input_ids"][:, 1:]).float().mean().item()
            if recited >= 0.97:
                break
    return recited


def world(
    options: argparse.Namespace, draw: int
) -> tuple[Callable[[LMLoss | None], CausalLMModule], Callable[[], PassageDataModule]]:
    """What makes the model of a draw, and its data."""

    def own(lr: float = options.lr, **more: Any) -> dict[str, Any]:
        return {"optimizer": partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.98)), **more}

    if options.model is None:
        return lambda **more: EmbeddedLM(**own(**more)), partial(PythonDocsDataModule, options.passages, seed=draw)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = own_texts(options.texts, tokenizer, options.prefix + options.suffix, draw, options.passages)

    def data(**more: Any) -> PassageDataModule:
        sizes = {"prefix": options.prefix, "suffix": options.suffix, "seed": draw}
        return PassageDataModule(**texts, **sizes, tokenizer=tokenizer, **more)

    made_of = [options.model, Path(options.texts).read_text(), options.prefix, options.suffix, options.passages, draw]
    folder = options.output.parent / f"recites-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}"
    if not folder.exists():
        torch.manual_seed(draw)
        model = AutoModelForCausalLM.from_pretrained(options.model).float()
        whole = data(pairing="random", batch_size=64)
        whole.setup()
        print(f"draw {draw}: learned by heart, memorization accuracy {learn(model, whole):.3f}", flush=True)
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        part.rename(folder)
    return lambda **more: CausalLMModule(folder, tokenizer=tokenizer, **own(**more)), data


def table(lines: list[dict]) -> str:
    """Mean ± standard deviation over draws, by method."""
    frame = pandas.DataFrame(lines).drop(columns=["draw", "layer", "options"], errors="ignore")
    rows = {}
    for method, of_method in frame.groupby("method", sort=False):
        numbers = of_method[of_method.status == "unlearned"].select_dtypes("number")  # the others have forgotten less
        rows[method] = {"forgotten": f"{(of_method.status == 'unlearned').sum()} of {len(of_method)}"} | {
            name: f"{column.mean():.3g} ± {column.std():.2g}" for name, column in numbers.items()
        }
    return pandas.DataFrame(rows).T.to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=list(range(5)), help="seeds of the passages (default: 0 to 4)")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *BY_SLUG], choices=[*METHODS, *BY_SLUG], metavar="METHOD")
    parser.add_argument("--passages", type=int, default=32, help="how many to forget (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="at most (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="of Adam (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=10, help="of SLUG, for each layer (default: %(default)s)")
    parser.add_argument("--model", help="folder or name of another causal language model; needs --texts")
    parser.add_argument("--texts", help="of that model: a .txt file with blank lines between texts, or .jsonl")
    parser.add_argument("--prefix", type=int, default=32, help="tokens, of another model (default: %(default)s)")
    parser.add_argument("--suffix", type=int, default=32, help="tokens, of another model (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/passages.jsonl"), help="(default: %(default)s)")
    options = parser.parse_args()
    if (options.model is None) != (options.texts is None):
        parser.error("--model and --texts go together")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in options.output.read_text().splitlines()] if options.output.exists() else []
    asked = {name: str(value) for name, value in vars(options).items() if name not in ("draws", "methods", "output")}
    for draw in options.draws:
        make, data = world(options, draw)
        for method in options.methods:
            if any((done["draw"], done["method"], done["options"]) == (draw, method, asked) for done in lines):
                continue
            try:
                found = run(method, make, data, options)
            except UnlearnError as error:  # such as a training that has diverged: the other lines count all the same
                found = {"status": f"failed: {error}"}
            lines.append({"draw": draw, "method": method, "options": asked} | found)
            with options.output.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(json.dumps(lines[-1]), flush=True)
    print(table([line for line in lines if line["options"] == asked]))


if __name__ == "__main__":
    main()
