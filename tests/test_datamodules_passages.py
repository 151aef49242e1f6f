"""Passages and their pairs: what each batch holds, what is left out and refused, and what Lightning makes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from _processes import in_processes
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from slug_lightning import embedded
from slug_lightning.datamodules.demo.python_docs import PythonDocsDataModule
from slug_lightning.datamodules.sources.resolve import resolve_loaders
from slug_lightning.datamodules.text.passages import REFUSALS, PassageDataModule
from slug_lightning.datamodules.text.reading import read_texts
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.sequences import counted
from slug_lightning.utils.loaders import SPLITS

WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "nu") for b in ("ra", "so", "ti", "vu") for c in ("b", "d", "g", "")]
LENGTH = 8
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def texts(count: int, seed: int, length: int = 12) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(random_.choices(WORDS, k=length)) for _ in range(count)]


FORGET, KEEP, UNSEEN = texts(11, 1), texts(30, 2), texts(5, 3)


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Of whole words, without a padding token."""
    known = ["<unk>", "<s>", *WORDS, *sorted({word for text in REFUSALS for word in text.split()})]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


TOKENIZER = tokenizer()


def made(forget: Any = FORGET, keep: Any = KEEP, unseen: Any = UNSEEN, **options: Any) -> PassageDataModule:
    options = {"prefix": 5, "suffix": 3, "tokenizer": TOKENIZER, "batch_size": 4, **options}
    data = PassageDataModule(forget, keep, unseen, **options)
    data.setup("fit")
    return data


def rows(sequences: Any) -> list[list[int]]:
    return [row.tolist() for row in counted(sequences)]


def listed(passages: Sequence[Tensor]) -> list[list[int]]:
    return [row.tolist() for row in passages]


def tokens(some: Sequence[str]) -> list[list[int]]:
    return [row[:LENGTH] for row in TOKENIZER(list(some))["input_ids"]]


def kept(loader: Any) -> list[int]:
    """The numbers of the texts that a loader serves."""
    return [number for batch in loader for number in batch["index"].tolist()]


# ---- batches


def test_a_training_batch_holds_each_passage_with_its_pairs_and_its_refusal():
    data = made(neighbours=3)
    batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [4, 4, 3]
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(11))
    refusals = [TOKENIZER(f" {text}", add_special_tokens=False)["input_ids"] for text in REFUSALS]
    for batch in batches:
        indices = batch["index"].tolist()
        assert batch["weight"].dtype == torch.float32
        assert batch["weight"].tolist() == pytest.approx([1 / len(indices)] * len(indices))
        assert rows(batch["forget"]) == [tokens(FORGET)[i] for i in indices]
        assert len(rows(batch["pair"])) == 3 * len(indices)
        for place, own in enumerate(rows(batch["pair"])):
            assert own == data.keep_passages[data.pairs[indices[place // 3]][place % 3]].tolist()
        assert batch["prefix"] == 5
        for i, own in zip(indices, rows(batch["refusal"]), strict=True):
            assert own[:5] == tokens(FORGET)[i][:5] and own[5:] in refusals


def test_passages_are_the_first_tokens_of_texts_and_texts_to_keep_may_be_shorter():
    data = made(keep=[*KEEP, "kara losob", "kara"])
    assert listed(data.forget_passages) == tokens(FORGET) and listed(data.unseen_passages) == tokens(UNSEEN)
    assert listed(data.keep_passages) == tokens([*KEEP, "kara losob"])
    assert data.notes["retain"].endswith("; 1 texts were left out: shorter than 2 tokens")
    for kind, expected in (("forget", FORGET), ("unseen", UNSEEN)):
        batches = list(data.passages(kind))
        assert [row for batch in batches for row in rows(batch)] == tokens(expected)
        assert kept(batches) == list(range(len(expected)))


def test_a_token_that_the_tokenizer_puts_first_is_the_first_of_the_prefix():
    with_bos = tokenizer(bos=True)
    data = made(tokenizer=with_bos)
    assert listed(data.forget_passages) == [[1, *row[: LENGTH - 1]] for row in tokens(FORGET)]
    (batch, *_) = data.train_dataloader()
    assert all(row[0] == 1 and 1 not in row[1:] for row in rows(batch["refusal"]))


def test_a_tokenizer_without_a_padding_token_serves_as_one_with_it():
    padding = tokenizer()
    padding.pad_token = WORDS[3]
    assert TOKENIZER.pad_token is None
    for one, other in zip(made().train_dataloader(), made(tokenizer=padding).train_dataloader(), strict=True):
        for name in ("forget", "pair", "refusal"):
            assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])


def test_every_batch_is_there_whatever_is_active():
    data = made()
    data.active = [3]
    batches = list(data.every_batch())
    assert [index for batch in batches for index in batch["index"].tolist()] == list(range(11))
    assert [len(batch["index"]) for batch in batches] == [4, 4, 3]
    served = {tuple(row) for batch in batches for row in rows(batch["pair"])}
    assert served == {tuple(data.keep_passages[j].tolist()) for row in data.pairs for j in row}


# ---- the division of what is kept


def test_pairs_come_from_the_part_of_keep_that_is_neither_for_validation_nor_for_the_report():
    data = made(neighbours=5)
    train, val, test = (set(kept(data.retain_dataloader(split))) for split in SPLITS)
    assert train | val | test == set(range(30)) and len(train) + len(val) + len(test) == 30
    assert {j for row in data.pairs for j in row} <= train
    assert set(kept(data.val_dataloader())) == val and set(kept(data.test_dataloader())) == test
    for batch in data.test_dataloader():
        assert rows(batch) == [tokens(KEEP)[i] for i in batch["index"].tolist()]


def test_an_unlearn_callback_gets_the_passages_for_everything_and_three_parts_of_keep():
    data = made(neighbours=1)
    found = resolve_loaders(None, None, data)
    ((_, forget),) = found.forget.items()
    assert all(sorted(kept(forget[split])) == list(range(11)) for split in SPLITS)
    assert sum(len(kept(found.retain[split])) for split in SPLITS) == 30
    assert found.notes[0] == "forget: the same 11 passages serve gradient, search and report"
    assert found.notes[2].startswith("retain: one set of 30 samples split into 16 train, 7 validation, 7 test")


def test_the_same_seed_gives_the_same_and_another_one_does_not():
    def served(seed: int) -> list[Any]:
        data = made(seed=seed, pairing="random")
        return [data.pairs, [(batch["index"].tolist(), rows(batch["refusal"])) for batch in data.train_dataloader()]]

    assert served(0) == served(0)
    assert all(one != other for one, other in zip(served(0), served(1), strict=True))


def test_pairs_are_kept_on_the_disk_by_what_is_trained(tmp_path):
    first = made(cache=str(tmp_path))
    (path,) = tmp_path.iterdir()
    assert made(cache=str(tmp_path)).pairs == first.pairs and list(tmp_path.iterdir()) == [path]
    longer = [f"{text} kara" for text in FORGET]  # beyond what a passage holds
    assert made(forget=longer, cache=str(tmp_path)).pairs == first.pairs and list(tmp_path.iterdir()) == [path]
    made(neighbours=2, cache=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


# ---- what is left out


def test_forget_and_unseen_texts_in_keep_are_neither_pairs_nor_retain_nor_other_text():
    hidden = [
        FORGET[0],
        " ".join([*FORGET[1].split()[:6], "kara", *FORGET[1].split()[7:]]),
        " ".join(["kara", *FORGET[2].split()]),
        UNSEEN[0],
    ]
    data = made(keep=[*KEEP[:10], *hidden, *KEEP[10:]], neighbours=16)
    assert listed(data.keep_passages) == tokens(KEEP)
    assert all(set(row) == set(kept(data.retain_dataloader("train"))) for row in data.pairs)
    assert data.notes["retain"].endswith("; 4 texts were left out: near-duplicates of forget or unseen passages")


def test_only_what_is_trained_is_compared():
    beyond = [f"{text} {FORGET[0]}" for text in texts(3, 5, LENGTH)]
    assert listed(made(keep=[*KEEP, *beyond]).keep_passages) == tokens([*KEEP, *beyond])


def test_a_passage_that_is_given_twice_is_asked_for_once():
    data = made(forget=[*FORGET, FORGET[3], f"{FORGET[4]} and more"])
    assert listed(data.forget_passages) == tokens(FORGET)
    assert data.active == list(range(11))
    assert data.notes["forget"].endswith("; 2 duplicates were left out")


def test_without_unseen_texts_there_are_no_unseen_passages():
    data = made(unseen=None)
    assert data.unseen_passages == [] and list(data.passages("unseen")) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": 0}, "prefix must be >= 1, got 0"),
        ({"suffix": -1}, "suffix must be >= 1, got -1"),
        ({"refusals": ()}, "refusals must be"),
        ({"refusals": ["no", " "]}, "refusals must be"),
        ({"forget": []}, "forget must have at least one text"),
        ({"keep": []}, "keep must have at least one text"),
        ({"unseen": []}, "unseen must have at least one text"),
        (
            {"forget": [*FORGET, "kara losob nuvu"]},
            r"forget: 1 of 12 texts are shorter than prefix \+ suffix, 5 \+ 3 = 8 tokens, such as number 11 with 3, "
            "'kara losob nuvu'; give longer texts, or a shorter prefix or suffix",
        ),
        ({"unseen": ["kara", *UNSEEN]}, "unseen: 1 of 6 texts are shorter .* number 0 with 1, 'kara'"),
        (
            {"unseen": [*UNSEEN, FORGET[2]]},
            f"unseen: 1 of 6 passages are near-duplicates of passages to forget, such as '{FORGET[2][:20]}",
        ),
        ({"keep": FORGET}, "keep must have at least 3 usable texts, got 0 of 11; 11 texts were left out: near-dup"),
        ({"keep": KEEP[:2]}, "keep must have at least 3 usable texts, got 2 of 2"),
        ({"neighbours": 17}, "neighbours must be <= 16, got 17: 0 of 16"),
        ({"neighbours": 0}, "neighbours must be >= 1, got 0"),
        ({"pairing": "closest"}, "pairing must be .* got 'closest'"),
        ({"tokenizer": None}, "tokenizer must be .* got None"),
        ({"tokenizer": "/no/such/folder"}, "tokenizer: '/no/such/folder' cannot be loaded"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(options, message):
    with pytest.raises(UnlearnError, match=message):
        made(**options)


def test_nothing_is_half_done_after_a_refusal():
    data = PassageDataModule(FORGET, KEEP, prefix=5, suffix=3, tokenizer=TOKENIZER, neighbours=17)
    for _ in range(2):
        with pytest.raises(UnlearnError, match="neighbours"):
            data.setup("fit")
    with pytest.raises(UnlearnError, match="forget: no passages yet"):
        data.train_dataloader()


def test_active_passages_must_exist():
    data = made()
    data.active = (5, 2, 5)
    assert data.active == [2, 5]
    for wrong in ([11], [-1]):
        with pytest.raises(UnlearnError, match="active must be indices of the 11 passages"):
            data.active = wrong
    assert data.active == [2, 5]


def test_the_digest_is_of_all_texts_their_order_and_their_division():
    assert made().digest == made().digest
    others = [{"forget": FORGET[::-1]}, {"forget": FORGET[1:]}, {"prefix": 4, "suffix": 4}]
    others += [{"seed": 1}, {"keep": KEEP[1:]}, {"unseen": None}]
    assert len({made().digest, *(made(**other).digest for other in others)}) == 1 + len(others)


# ---- files


def test_files_serve_as_lists_do(tmp_path):
    (tmp_path / "forget.txt").write_text("\n\n" + "\n \n\n".join(FORGET) + "\n")
    lines = [json.dumps({"text": text, "id": i}, ensure_ascii=False) for i, text in enumerate(KEEP)]
    (tmp_path / "keep.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]))
    data = made(str(tmp_path / "forget.txt"), str(tmp_path / "keep.jsonl"))
    assert listed(data.forget_passages) == tokens(FORGET) and listed(data.keep_passages) == tokens(KEEP)
    (tmp_path / "two.txt").write_text("one line\nanother line\r\n\r\na second text")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "one\u2028text"}, ensure_ascii=False))
    assert read_texts("keep", tmp_path / "two.txt") == ["one line\nanother line", "a second text"]
    assert read_texts("keep", tmp_path / "odd.jsonl") == ["one\u2028text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "forget: .*none.txt cannot be read"),
        ("texts.csv", "text\n", "forget must be a .txt or .jsonl file, .* got .*texts.csv"),
        ("empty.txt", " \n\n", "forget must have at least one text"),
        ("odd.jsonl", '{"text": "a"}\n{"words": "b"}', 'forget: line 2 of .*odd.jsonl has no string under "text"'),
        ("number.jsonl", '{"text": 5}', 'line 1 of .* has no string under "text"'),
        ("list.jsonl", "[1]", 'line 1 of .* has no string under "text"'),
        ("broken.jsonl", '\n{"text": "a', "line 2 of .*broken.jsonl is not JSON"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "forget: .*latin.txt cannot be read .*UTF-8"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnlearnError, match=message):
        made(forget=str(tmp_path / name))


# ---- in a Trainer


class Seen(pl.LightningModule):
    """Notes which passages it is served in which epoch; its weight falls by the weights of these."""

    tokenizer = TOKENIZER

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.served: list[list[int]] = []
        self.steps = self.validated = 0

    def on_train_epoch_start(self):
        self.served.append([])

    def training_step(self, batch, batch_idx):
        self.served[-1] += batch["index"][batch["weight"] > 0].tolist()
        return (batch["weight"] * self.weight).sum()

    def optimizer_step(self, *args, **options):
        self.steps += 1
        super().optimizer_step(*args, **options)

    def validation_step(self, batch, batch_idx):
        self.validated += batch_idx == 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Plan(pl.Callback):
    """What is active in each epoch."""

    def __init__(self, *plan: Sequence[int]) -> None:
        self.plan = plan

    def on_train_start(self, trainer, pl_module):
        trainer.datamodule.active = self.plan[0]

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.datamodule.active = self.plan[(trainer.current_epoch + 1) % len(self.plan)]


def fitted(data: PassageDataModule, plan: Sequence[Sequence[int]], **options: Any) -> Seen:
    module = Seen()
    options = {"accelerator": "cpu", "max_epochs": len(plan), "num_sanity_val_steps": 0, **SILENT, **options}
    pl.Trainer(callbacks=[Plan(*plan)], **options).fit(module, datamodule=data)
    return module


PLAN = (range(5), range(11), [7], range(2, 11))


def test_every_epoch_serves_what_is_active_validates_and_takes_its_last_step():
    data = PassageDataModule(FORGET, KEEP, prefix=5, suffix=3, batch_size=2)  # with the module's tokenizer
    module = fitted(data, PLAN, accumulate_grad_batches=2)
    assert [sorted(epoch) for epoch in module.served] == [list(active) for active in PLAN]
    assert (module.steps, module.validated) == (2 + 3 + 1 + 3, 4)  # of 3, 6, 1 and 5 batches


def test_a_fit_ends_with_an_epoch_in_which_nothing_is_active_and_the_next_begins_with_all(recwarn):
    data = made()
    assert [len(epoch) for epoch in fitted(data, ([0, 1], [], [])).served] == [2, 0]
    data.setup("test")
    assert data.active == []
    assert [len(epoch) for epoch in fitted(data, (range(11),)).served] == [11]


def test_the_sampler_cannot_be_taken_away():
    with pytest.raises(UnlearnError, match="overfit_batches"):
        fitted(made(), PLAN, overfit_batches=1)


def in_two() -> tuple:
    module = fitted(made(batch_size=2), PLAN, devices=2, strategy="ddp")
    return module.served, module.steps, module.weight.item()


def test_two_processes_share_the_passages_of_one():
    alone = fitted(made(batch_size=4), PLAN)
    shares = in_processes(2, in_two)
    assert all(isinstance(share, tuple) for share in shares), shares
    for (served, steps, weight), other in zip(shares, reversed(shares), strict=True):
        assert (steps, weight) == (alone.steps, pytest.approx(alone.weight.item()))
        for mine, theirs, whole in zip(served, other[0], alone.served, strict=True):
            assert sorted(mine + theirs) == sorted(whole)


# ---- the embedded passages


@pytest.fixture
def docs(tmp_path, monkeypatch):
    path = tmp_path / "passages.jsonl"
    parts = [*(("recited", text) for text in texts(9, 1, 70)), *(("kept", text) for text in texts(12, 2, 70))]
    parts += [("unseen", text) for text in texts(4, 3, 70)]
    path.write_text("".join(json.dumps({"text": text, "part": part, "topic": "with"}) + "\n" for part, text in parts))
    monkeypatch.setattr(embedded, "PASSAGES", path, raising=False)


def test_the_embedded_passages_are_drawn_by_seed(docs):
    def drawn(seed: int) -> PassageDataModule:
        data = PythonDocsDataModule(passages=5, unseen=3, seed=seed, tokenizer=TOKENIZER)
        data.setup("fit")
        return data

    recited = [tuple(row[:64]) for row in TOKENIZER(texts(9, 1, 70))["input_ids"]]
    first = {tuple(row.tolist()) for row in drawn(0).forget_passages}
    assert len(first) == 5 and first < set(recited)
    assert (
        first
        == {tuple(row.tolist()) for row in drawn(0).forget_passages}
        != {tuple(row.tolist()) for row in drawn(1).forget_passages}
    )
    assert (len(drawn(0).keep_passages), len(drawn(0).unseen_passages)) == (12, 3)


@pytest.mark.parametrize("count", [0, 10])
def test_more_than_are_recited_cannot_be_drawn(docs, count):
    with pytest.raises(UnlearnError, match=f"passages: must be from 1 to 9, got {count}"):
        PythonDocsDataModule(passages=count, unseen=4, tokenizer=TOKENIZER).setup("fit")


@pytest.mark.parametrize(
    ("kind", "own"),
    [(PythonDocsDataModule, ["--passages", "8"]), (PassageDataModule, ["--forget", "forget.txt", "--keep", '["a", "b"]'])],
)
def test_a_config_names_every_option(kind, own):
    parser = ArgumentParser()
    parser.add_class_arguments(kind)
    common = ["--neighbours", "2", "--pairing", "random", "--tokenizer", "folder", "--refusals", '["No."]', "--seed", "3"]
    data = kind(**parser.parse_args([*own, *common]).as_dict())
    assert (data.neighbours, data.pairing, data.tokenizer, data.refusals, data.seed) == (2, "random", "folder", ["No."], 3)
