"""What was computed of the data to keep is used again where everything is the same, and nowhere else."""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from _amounts import examples
from _callback import unlearn_callback
from _processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from _tiny import PlainRunner, blobs, fit, loader, part, trained
from slug_lightning import RetainCache
from slug_lightning.distributed.processes import Processes
from slug_lightning.modules import UnlearnModule
from slug_lightning.objective.eval_mode import preserve_state
from slug_lightning.objective.log_capture import LogReader
from slug_lightning.objective.objective import Objective
from slug_lightning.tensors.bits import bitwise_equal, digest_of


def temperate(temperature):
    return lambda model, batch: cross_entropy(model(batch[0]) / temperature, batch[1].long())


def made(loss=None) -> UnlearnModule:
    """A module with a buffer, made anew each time."""
    torch.manual_seed(0)
    module = UnlearnModule(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)), loss or temperate(1.0))
    module.prompts = {"thing": ["cat", "dog"]}
    return module.eval()


@functools.cache
def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [blobs()[i] for i in range(20)]


def batches(size=8, chosen=None):
    return DataLoader(samples() if chosen is None else chosen, batch_size=size)


def objective(module, data=None, **how) -> Objective:
    loaders = dict.fromkeys(("train", "val", "test"), batches() if data is None else data)
    return Objective(module, {"retain": loaders}, PlainRunner(**how), retain_metric=how.pop("metric", None))


def asked(cache, module=None, data=None, names=("model.0.weight", "model.2.weight"), **how):
    """One request; gives the gradient, whether it was taken from the cache, and the report's notes."""
    module = module or made()
    data = batches() if data is None else data
    first = len(next(iter(data))[0])
    measuring, notes, before = objective(module, data, **how), [], cache.reused
    parameters = {name: dict(module.named_parameters())[name] for name in names}
    with preserve_state(module):
        found = cache.gradient(measuring, parameters, notes)
    reused = cache.reused > before
    assert (measuring.backward_samples <= first) == reused  # the first batch is always computed
    return found, reused, notes


def computed(module=None, data=None, names=("model.0.weight", "model.2.weight")):
    """The same without a cache."""
    module = module or made()
    with preserve_state(module):
        return objective(module, data).gradient("retain", {name: dict(module.named_parameters())[name] for name in names}).tensors


def same(one, other) -> bool:
    return list(one) == list(other) and all(bitwise_equal(one[name], other[name]) for name in one)


@pytest.fixture(params=["folder", "memory"])
def cache(request, tmp_path) -> RetainCache:
    return RetainCache(tmp_path / "new" / "kept" if request.param == "folder" else None)


# ---- the same, and not the same


def test_the_same_made_anew_is_used_again_to_the_last_bit(cache):
    first = asked(cache)
    again = asked(cache if cache.folder is None else RetainCache(str(cache.folder)))
    assert (first[1], again[1]) == (False, True) and same(first[0], again[0]) and same(first[0], computed())
    assert first[2] == [] and len(again[2]) == 1
    if cache.folder is not None:
        (file,) = cache.folder.iterdir()
        assert again[2] == [f"retain: gradient taken from {file}"] and file.name.startswith("retain-gradient-")
        assert file.stat().st_mode & 0o777 == 0o644


def bit(tensor):
    tensor.view(torch.int32).flatten()[0] ^= 1


def other_sample():
    chosen = [(x.clone(), y) for x, y in samples()]
    bit(chosen[-1][0])
    return batches(chosen=chosen)


def changed(change):
    def make():
        module = made()
        with torch.no_grad():
            change(module)
        return {"module": module}

    return make


def attached(model, batch):
    return cross_entropy(model[2](model[1](model[0](batch[0])) * 2), batch[1])


def detached(model, batch):  # the same loss, and another gradient
    hidden = model[1](model[0](batch[0]))
    return cross_entropy(model[2](hidden + hidden.detach()), batch[1])


CHANGES = {
    "a bit of a weight": changed(lambda m: bit(m.model[0].weight)),
    "a bit of a weight that is no candidate": changed(lambda m: bit(m.model[2].bias)),
    "a buffer": changed(lambda m: m.model[1].num_batches_tracked.add_(1)),
    "a bit of the last sample": lambda: {"data": other_sample()},
    "a sample less": lambda: {"data": batches(chosen=samples()[:-1])},
    "batch size": lambda: {"data": batches(4)},
    "order": lambda: {"data": batches(chosen=samples()[::-1])},
    "order within a batch": lambda: {"data": batches(chosen=[*samples()[:-2], samples()[-1], samples()[-2]])},
    "dtype of labels": lambda: {"data": batches(chosen=[(x, y.int()) for x, y in samples()])},
    "precision": lambda: {"precision": "bf16-mixed"},
    "candidates": lambda: {"names": ("model.0.weight",)},
    "a hyperparameter": changed(lambda m: m.save_hyperparameters({"words": ["cat", "owl"]})),
    "the class of a part": changed(lambda m: m.model.__setitem__(2, Other.of(m.model[2]))),
}


class Other(nn.Linear):
    """Computes what its base does, as far as is known."""

    @classmethod
    def of(cls, layer):
        new = cls(layer.in_features, layer.out_features)
        new.load_state_dict(layer.state_dict())
        return new


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_computed_anew_without_a_word(change, cache):
    asked(cache)
    options = CHANGES[change]()
    found, reused, notes = asked(cache, **options)
    options.pop("precision", None)  # only its name, here
    assert not reused and notes == [] and same(found, computed(**options))


STALE = ["retain: cached gradient not used but computed again: the first batch no longer gives the same loss and gradient"]


def negated(model, batch):  # the same loss, and gradients of the same norms
    loss = attached(model, batch)
    return 2 * loss.detach() - loss


SOMEBODYS = """
class Somebodys(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def training_step(self, batch, batch_idx):
        return {loss}
"""


def somebodys(loss):
    """A module of the same class name, whose code may have changed."""
    scope = {"pl": pl, "torch": torch, "nn": nn, "cross_entropy": cross_entropy, "__name__": "somebodys"}
    exec(SOMEBODYS.format(loss=loss), scope)
    return scope["Somebodys"]().eval()


CODE = {
    "the loss of a step": (
        lambda: somebodys("cross_entropy(self.model(batch[0]), batch[1])"),
        lambda: somebodys("cross_entropy(self.model(batch[0]), batch[1], label_smoothing=0.1)"),
    ),
    "what a closure holds": (made, lambda: made(temperate(2.0))),
    "an attribute of a part": (made, lambda: changed(lambda m: setattr(m.model[1], "eps", 1e-3))()["module"]),
    "only the gradient": (lambda: made(attached), lambda: made(detached)),
    "only the gradient's sign": (lambda: made(attached), lambda: made(negated)),
}


@pytest.mark.parametrize("what", CODE)
def test_a_gradient_of_other_code_is_computed_again_and_a_note_says_so(what, cache):
    before, now = CODE[what]
    first = asked(cache, before())
    found, reused, notes = asked(cache, now())
    assert not reused and notes == STALE and same(found, computed(now())) and not same(found, first[0])
    assert asked(cache, now())[1]
    if "only" in what:
        modules = [make() for make in CODE[what]]
        losses = [objective(m).gradient("retain", {"model.0.weight": m.model[0].weight}).loss for m in modules]
        assert losses[0] == losses[1]


def test_a_user_s_key_tells_code_apart_that_the_first_batch_cannot(tmp_path):
    found = [asked(RetainCache(tmp_path, key=key))[1] for key in ("", "one", "other", "one")]
    assert found == [False, False, False, True]


def test_gradients_that_differ_as_much_as_kernels_do_are_still_the_same(cache):
    def rounding(model, batch):
        loss = attached(model, batch)
        return loss + 1e-4 * (loss - loss.detach())

    asked(cache, made(attached))
    assert asked(cache, made(rounding))[1]


def test_without_a_loss_of_the_first_batch_nothing_is_cached(cache):
    def late(model, batch):
        return None if len(batch[0]) == 4 else attached(model, batch)

    data = [(x, y) for x, y in batches()][::-1]
    for _ in range(2):
        found, reused, notes = asked(cache, made(late), data)
        assert not reused and len(notes) == 1 and "the first one has no loss" in notes[0]
        assert same(found, computed(made(late), data))


class Hidden:
    """What it holds is in no attribute that is plain data."""

    def __init__(self, factor):
        self.held = [torch.tensor(factor)]

    def __call__(self, model, batch):
        return temperate(1.0)(model, batch) * self.held[0]


def test_what_nothing_else_tells_the_loss_of_the_first_batch_does(cache):
    one, other = asked(cache, made(Hidden(1.0))), asked(cache, made(Hidden(2.0)))
    again = asked(cache, made(Hidden(2.0)))
    assert [found[1] for found in (one, other, again)] == [False, False, True] and other[2] == STALE
    assert same(other[0], again[0]) and not same(one[0], other[0])


def test_how_matrices_are_multiplied_counts(cache):
    asked(cache)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
        assert not asked(cache)[1]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection")  # of objects
def test_data_that_cannot_be_compared_are_not_cached_and_a_note_says_so(cache):
    x, y = blobs().tensors
    data = [(x[:4], y[:4], object())] * 2
    for _ in range(2):
        found, reused, notes = asked(cache, made(), data)
        assert not reused and len(notes) == 1 and "cannot be compared" in notes[0]
        assert same(found, computed(made(), data))
    assert cache.folder is None or not cache.folder.exists()


def test_several_are_kept_in_a_folder_and_the_last_one_in_memory(cache):
    for size in (4, 8):
        asked(cache, data=batches(size))
    assert asked(cache, data=batches(4))[1] == (cache.folder is not None)


ELSEWHERE = """
import sys, torch
from slug_lightning import RetainCache
from slug_lightning.modules.clip import EmbeddedClip
from slug_lightning.objective.objective import Objective
from _tiny import PlainRunner

def request(folder):
    torch.manual_seed(0)
    x, tokens = torch.randn(6, 3, 64, 64), torch.randint(1, 40, (6, 77))
    module = EmbeddedClip().eval()
    x = torch.nn.functional.interpolate(x, module.model.visual.image_size)
    tokens = tokens[:, :module.model.context_length]
    data = [{"image": x[:4], "text": tokens[:4]}, {"image": x[4:], "text": tokens[4:]}]
    objective = Objective(module, {"retain": {"train": data}}, PlainRunner())
    cache, name = RetainCache(folder), "model.visual.proj"
    return cache.gradient(objective, {name: dict(module.named_parameters())[name]}, [])[name], cache.reused
if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    found, reused = request(sys.argv[1])
    torch.save((found, reused), sys.argv[2])
"""


def test_another_process_uses_it_again_to_the_last_bit(tmp_path):
    scope = {"__name__": "elsewhere"}
    exec(ELSEWHERE, scope)
    here = [scope["request"](tmp_path / "kept") for _ in range(2)]
    assert [reused for _, reused in here] == [0, 1]
    arguments = [str(tmp_path / "kept"), str(tmp_path / "found"), str(torch.get_num_threads())]
    env = os.environ | {"PYTHONHASHSEED": "7"}  # sets come in another order
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], env=env, cwd=Path(__file__).parent, check=True)
    found, reused = torch.load(tmp_path / "found", weights_only=True)
    assert reused == 1 and bitwise_equal(found, here[0][0])


# ---- damaged files


def kept(folder) -> tuple[Path, bytes]:
    asked(RetainCache(folder))
    (path,) = folder.iterdir()
    return path, path.read_bytes()


IGNORED = "Ignoring cache file .* its content is computed again"


def assert_refused(folder, match=IGNORED):
    """It is warned of, computed anew, and written over."""
    with pytest.warns(UserWarning, match=match):
        found, reused, notes = asked(RetainCache(folder))
    assert not reused and notes == [] and same(found, computed())
    assert asked(RetainCache(folder))[1]


@examples(40)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), way=st.sampled_from(["cut", "flip", "grow"]))
def test_a_file_cut_or_altered_anywhere_is_never_used(place, flip, way, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    path, content = kept(folder)
    at = int(place * len(content))
    damaged = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :],
        "grow": content + bytes([flip]),
    }[way]
    path.write_bytes(damaged)
    end = 8 + int.from_bytes(content[:8], "little")
    if way == "flip" and content.rindex(b"}", 0, end) < at < end:  # blanks after the header
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            assert same(asked(RetainCache(folder))[0], computed())
    else:
        assert_refused(folder)


def rewritten(path, tensors=lambda t: t, text=lambda _: {}, **metadata):
    """Forge a file whose digest is right."""
    with safe_open(path, framework="pt") as file:
        found, old = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    new, header = tensors(found), {name: old[name] for name in ("format", "key", "data")}
    header |= text(header)
    header["sha256"] = digest_of(new, "\0".join(header.values()))
    save_file(new, path, metadata=header | metadata)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


FOREIGN = {
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("ran")))), "header"),
    "torch's": (lambda path: torch.save(Trap(path.with_name("ran")), path), "header"),
    "nothing": (lambda path: path.write_bytes(b""), "header"),
    "weights": (lambda path: save_file({"model.0.weight": torch.ones(6, 8)}, path), "its format is not"),
    "another version": (lambda path: rewritten(path, format="slug-lightning cache 0"), "its format is not"),
    "another digest": (lambda path: rewritten(path, sha256="0" * 64), "does not match its digest"),
    "another name": (lambda path: rewritten(path, lambda t: {"x": t.popitem()[1], **t}), "other tensors"),
    "another shape": (lambda path: rewritten(path, lambda t: {n: v.T.contiguous() for n, v in t.items()}), "other tensors"),
    "another dtype": (lambda path: rewritten(path, lambda t: {n: v.double() for n, v in t.items()}), "other tensors"),
    "a tensor less": (lambda path: rewritten(path, lambda t: dict([t.popitem()])), "other tensors"),
    "another key": (lambda path: rewritten(path, text=lambda h: {"key": h["key"].replace("32-", "16-")}), "another key"),
    "no loss": (lambda path: rewritten(path, text=lambda _: {"data": "[{}]"}), "loss"),
    "no gradient": (lambda path: rewritten(path, text=lambda _: {"data": '[{"loss": "0"}]'}), "gradient"),
    "no object": (lambda path: rewritten(path, text=lambda _: {"data": '"text"'}), "indices"),
    "a number": (lambda path: rewritten(path, text=lambda _: {"data": "5"}), "not iterable"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_of_another_kind_is_named_in_a_warning_and_never_used(what, tmp_path):
    path, _ = kept(tmp_path)
    change, reason = FOREIGN[what]
    change(path)
    assert_refused(tmp_path, f"Ignoring cache file .*{path.name}, .*{reason}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"Cannot write cache file .*retain-gradient-"):
        found, reused, _ = asked(RetainCache(tmp_path / "file" / "kept"))
    assert not reused and same(found, computed())
    path, _ = kept(tmp_path / "kept")
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match=IGNORED), pytest.warns(UserWarning, match="Cannot write"):
        found, reused, _ = asked(RetainCache(tmp_path / "kept"))
    assert not reused and same(found, computed())
    assert list((tmp_path / "kept").iterdir()) == [path]


# ---- measurements


class Scripted(pl.LightningModule):
    """Batch i logs `rows[i]`."""

    def __init__(self, rows) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.ones(1))

    def validation_step(self, batch, batch_idx):
        self.log_dict(self.rows[batch_idx])


def measured(folder, module, data, metric="acc", processes=None, split="val"):
    measuring = Objective(module, {"retain": {split: data}}, PlainRunner(processes), retain_metric=metric)
    cache, notes = RetainCache(folder), []
    with preserve_state(module):
        values = cache.measured(measuring, split, notes)
    return values, measuring, notes


def bits_of(value: float) -> bytes:
    return struct.pack(">d", value)


doubles = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", bits.to_bytes(8, "big"))[0])


@examples(30)
@given(rows=st.lists(st.tuples(st.integers(1, 5), doubles | st.floats(0, 1), doubles), min_size=1, max_size=4))
def test_what_was_logged_comes_back_to_the_last_bit_and_so_do_means_and_bounds(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    data = [torch.zeros(count) for count, *_ in rows]
    logged = [{"acc": torch.tensor(a, dtype=torch.float64), "other": torch.tensor(b, dtype=torch.float64)} for _, a, b in rows]
    first, again = (measured(folder, Scripted(logged), data) for _ in range(2))
    plain = Objective(Scripted(logged), {"retain": {"val": data}}, PlainRunner(), retain_metric="acc")
    expected = plain.measured("retain", "val")
    assert bits_of(first[0]["acc"]) == bits_of(again[0]["acc"]) == bits_of(expected["acc"]) or math.isnan(expected["acc"])
    assert first[2] == [] and again[2] == [f"retain: values on val data taken from {next(folder.iterdir())}"]
    entries = [
        [(e.number, e.name, bits_of(float(e.value)), e.weight) for e in found.complete["retain", "val"].entries]
        for found in (plain, first[1], again[1])
    ]
    assert entries[0] == entries[1] == entries[2]
    assert again[1].forward_samples == rows[0][0] and first[1].forward_samples == sum(row[0] for row in rows)
    assert again[1].metrics == plain.metrics
    reader = LogReader()
    reader.log("acc", 0.0, batch_size=rows[0][0])
    assert repr(again[1].at_best("retain", "val", reader)) == repr(plain.at_best("retain", "val", reader))


def test_a_loss_and_each_split_and_metric_are_measured_for_themselves(tmp_path):
    module, data = trained(), loader(False)
    values = {}
    for metric, split in ((None, "val"), ("val_acc", "val"), ("val_acc", "test"), (["val_loss", "val_acc"], "val")):
        for hit in (False, True):
            found, measuring, notes = measured(tmp_path, module, data, metric, split=split)
            # The data are the same, and so is what they are measured by: the split's name doesn't matter.
            assert bool(notes) == (hit or split == "test")
            assert found == values.setdefault(str(metric), found) and len(measuring.complete) == 1
    assert len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():
        module.net[0].weight[0, 0] += 1e-3
    assert not measured(tmp_path, module, data, None)[2]


def test_a_metric_object_is_measured_each_time(tmp_path):
    class WithObject(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(4)
            self.weight = nn.Parameter(torch.ones(1))

        def validation_step(self, batch, batch_idx):
            self.accuracy.update(batch[1], batch[1].flip(0))
            self.log("accuracy", self.accuracy)

    found = [measured(tmp_path, WithObject(), loader(False), "accuracy") for _ in range(2)]
    assert found[0][0] == found[1][0] and not found[1][2] and list(tmp_path.iterdir()) == []


def test_what_logs_something_else_now_is_measured_anew(tmp_path):
    class Holding(Scripted):
        def __init__(self, value):
            super().__init__(None)
            self._held = [torch.tensor(value)]

        def validation_step(self, batch, batch_idx):
            self.log("acc", self._held[0])

    data = [torch.zeros(2), torch.zeros(3)]
    found = [measured(tmp_path, Holding(value), data) for value in (0.5, 0.25, 0.25)]
    assert [values["acc"] for values, *_ in found] == [0.5, 0.25, 0.25]
    stale = "retain: cached values on val data not used but computed again: the first batch no longer gives the same values"
    assert [notes for *_, notes in found[:2]] == [[], [stale]] and "taken from" in found[2][2][0]


@examples(30)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_of_values_is_never_used(place, flip, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    module, data = Scripted([{"acc": 0.5}, {"acc": 0.25}]), [torch.zeros(2), torch.zeros(3)]
    measured(folder, module, data)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    at = int(place * len(content))
    path.write_bytes(content[:at] if cut else content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values, _, notes = measured(folder, module, data)
    # In JSON some bytes mean the same as others: what is used is what was written.
    assert values == {"acc": 0.35} and (len(said) == 1) != bool(notes)
    assert measured(folder, module, data)[2]


ENTRY = [0, "acc", bits_of(0.5).hex(), 2]


@pytest.mark.parametrize("entries", [
    "x", [[0, "acc"]], [[*ENTRY[:2], "00", 2]], [[*ENTRY[:2], "zz", 2]], [[*ENTRY[:3], 0]], [[*ENTRY[:3], "many"]],
    [[None, *ENTRY[1:]]], [[0, "other", *ENTRY[2:]]], None,
])  # fmt: skip
def test_forged_values_whose_digest_is_right_are_refused(entries, tmp_path):
    module, data = Scripted([{"acc": 0.5}]), [torch.zeros(2)]
    measured(tmp_path, module, data)
    (path,) = tmp_path.iterdir()
    rewritten(path, text=lambda _: {"data": json.dumps(entries)})
    with pytest.warns(UserWarning, match=IGNORED):
        assert measured(tmp_path, module, data)[0] == {"acc": 0.5}
    path.write_bytes(b"{}")
    with pytest.warns(UserWarning, match=IGNORED):
        assert measured(tmp_path, module, data)[0] == {"acc": 0.5}
    assert measured(tmp_path, module, data)[2]


def test_without_a_folder_values_are_measured_each_time():
    found = [measured(None, Scripted([{"acc": 0.5}]), [torch.zeros(2)]) for _ in range(2)]
    assert [(values, notes) for values, _, notes in found] == [({"acc": 0.5}, [])] * 2


# ---- several processes


def in_turn(folder: Path, here: Path) -> list:
    """Requests of each of two processes."""
    dist.init_process_group("gloo")
    processes = Processes(dist.get_rank(), dist.get_world_size())
    found = []

    def ask(where, **options):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            gradient, reused, _ = asked(RetainCache(where), processes=processes, **options)
        found.append((reused, len(said), [tensor.tolist() for tensor in gradient.values()]))

    ask(folder)
    ask(folder)
    ask(here / str(processes.rank))  # each has a folder of its own, and the second one's stays empty
    ask(here / str(processes.rank))
    path = next(folder.iterdir())
    processes.all_gather_object("all have asked", None)
    if processes.is_first:
        path.write_bytes(path.read_bytes()[:-1])
    processes.all_gather_object("damaged", None)
    ask(folder)
    ask(folder)
    module = made(Hidden(2.0 + processes.rank))  # the first one's loss decides
    ask(folder, module=module)
    ask(folder, module=module)
    values = [measured(folder, trained(), loader(False), "val_acc", processes) for _ in range(2)]
    return [found, [(value, bool(notes)) for value, _, notes in values]]


def test_processes_hit_and_miss_alike(tmp_path):
    alone = asked(RetainCache(tmp_path / "alone"))[0]
    one, other = in_processes(2, in_turn, tmp_path / "kept", tmp_path / "own")
    assert [(reused, gradient) for reused, _, gradient in one[0]] == [(reused, gradient) for reused, _, gradient in other[0]]
    assert [reused for reused, *_ in one[0]] == [False, True, False, False, False, True, False, True]
    assert [said for _, said, _ in one[0]] == [0, 0, 0, 0, 1, 0, 0, 0] and not any(said for _, said, _ in other[0])
    for tensor, values in zip(alone.values(), one[0][0][2], strict=True):
        torch.testing.assert_close(torch.tensor(values), tensor)
    assert one[1] == other[1] and [hit for _, hit in one[1]] == [False, True] and one[1][0][0] == one[1][1][0]


def after_one(folder: Path) -> bool:
    dist.init_process_group("gloo")
    return asked(RetainCache(folder), processes=Processes(dist.get_rank(), dist.get_world_size()))[1]


def test_what_one_process_has_kept_two_use(tmp_path):
    asked(RetainCache(tmp_path))
    assert in_processes(2, after_one, tmp_path) == [True, True]


def test_of_a_sharded_model_nothing_is_written(tmp_path):
    cache = RetainCache(tmp_path)
    measuring = objective(made())
    measuring.runner.is_sharded = True
    parameters = {"model.0.weight": measuring.module.model[0].weight}
    notes: list[str] = []
    first, again = (cache.gradient(measuring, parameters, notes) for _ in range(2))
    assert cache.reused == 1 and same(first, again) and notes == ["retain: gradient taken from memory"]
    measuring.names["retain"] = ["loss"]
    assert [cache.measured(measuring, "val", notes) for _ in range(2)].count(measuring.measured("retain", "val")) == 2
    assert list(tmp_path.iterdir()) == [] and len(notes) == 1


# ---- requests


def test_the_next_request_at_the_same_weights_costs_no_retain_pass(cache):
    model, reused = trained(), []

    def request(module=model, **options):
        forgetting = unlearn_callback(forget=loader(True), retain=loader(False), retain_cache=cache, **options)
        fit(forgetting, module)
        reused.append(cache.reused)
        forgetting.report.patch.revert(module)
        return forgetting.report

    first, second, third = request(), request(), request(trained())
    assert first.scores == second.scores == third.scores and first.step_size == second.step_size == third.step_size
    assert second.cost["backward_samples"] < first.cost["backward_samples"]
    for report, taken in ((first, 0), (second, 1), (third, 1)):
        assert sum(note.startswith("retain: gradient taken from") for note in report.notes) == taken
    request(layers="net.6.weight")  # other candidates
    with torch.no_grad():
        model.net[0].weight[0, 0] += 1e-6
    request(layers="net.6.weight")
    assert reused == [0, 1, 2, 2, 2]


def test_a_retain_gradient_of_fewer_batches_is_not_used_again(cache):
    model, reused = trained(), []
    for limit in (1, 1.0, 1.0):
        options = {"forget": loader(True), "retain": loader(False), "retain_cache": cache}
        fit(unlearn_callback(**options, forget_target=1e6, max_evaluations=1), model, limit_train_batches=limit)
        reused.append(cache.reused)
    assert reused == [0, 0, 1]


def test_data_that_are_drawn_anew_with_the_same_seeds_are_the_same(cache):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(8), y

    retain = Noisy(*(torch.stack(column) for column in zip(*part(False), strict=True)))
    found = [asked(cache, data=DataLoader(retain, batch_size=16, shuffle=True)) for _ in range(2)]
    assert [reused for _, reused, _ in found] == [False, True]
