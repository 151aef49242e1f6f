"""What lies near: how it is found, measured by itself, and bounds the search."""

import math
from functools import partial

import pytest
import torch
from _callback import unlearn_callback
from _simulated import simulate
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset

from _tiny import CLASSES, FORGET, Classifier, PlainRunner, blobs, fit, loader, outside, part, trained, trainer
from slug_lightning import UnlearnError, UnlearnReport
from slug_lightning.datamodules import EmojiDataModule, UnlearnDataModule
from slug_lightning.methods import SLUG
from slug_lightning.methods.near import near_tolerance, pooled
from slug_lightning.objective.module_hooks import ModuleHooks
from slug_lightning.objective.nearness import CONCEPTS, features_of, find_nearest, near_rows
from slug_lightning.objective.objective import Objective
from slug_lightning.reports.several import JointReport
from slug_lightning.utils.rows import Rows, rows_of, shuffles_anew, take


class Seeing(Classifier):
    """Says which samples are alike: by their points, or by the class."""

    retain_metric = "val_acc"
    forget_metric = "val_acc"
    num_classes = CLASSES

    def embed(self, batch):
        return batch[0]

    def labels(self, batch):
        return {"class": [str(label) for label in batch[1].tolist()]}


class Counting(Seeing):
    """Remembers the sizes of the batches that the retain gradient sees."""

    def __init__(self):
        super().__init__()
        self.told = outside(sizes=[])

    @property
    def sizes(self) -> list[int]:
        return self.told().sizes

    def retain_step(self, batch, batch_idx):
        self.sizes.append(len(batch[1]))
        return self.training_step(batch, batch_idx)

    def log(self, *_, **__):
        pass


class Unlabelled(Seeing):
    labels = None


def objective_of(module, batch_size=32, processes=None):
    retain, forget = (dict.fromkeys(("train", "val", "test"), loader(kind, batch_size=batch_size)) for kind in (False, True))
    return Objective(module, {"forget": forget, "retain": retain}, PlainRunner(processes))


def nearest(objective):
    return find_nearest(features_of(objective, "forget"), partial(features_of, objective, "retain"))


def centres():
    x, y = blobs().tensors
    return {str(label): x[y == label][:16].double().mean(0) for label in range(CLASSES)}


def test_the_nearest_concepts_are_those_with_the_largest_cosine_less_the_mean_of_the_others():
    found, means = nearest(objective_of(trained(Seeing))), centres()
    own = means.pop(str(FORGET))
    mean = torch.stack(list(means.values())).mean(0)
    cosine = {name: torch.cosine_similarity(m - mean, own - mean, dim=0).item() for name, m in means.items()}
    assert found.kind == "class" and found.concepts == sorted(cosine, key=cosine.get, reverse=True)[:CONCEPTS]


def test_without_labels_the_nearest_twentieth_of_the_samples_is_near_by_one_threshold_for_all_splits():
    objective = objective_of(trained(Unlabelled))
    found = nearest(objective)
    x = torch.cat([batch[0] for batch in loader(False)]).double()
    own = torch.cat([batch[0] for batch in loader(True)]).double().mean(0)
    cosine = torch.cosine_similarity(x - x.mean(0), own - x.mean(0))
    assert found.kind is None and found.threshold == pytest.approx(cosine.quantile(0.95).item(), abs=1e-5)
    near = near_rows(objective, found)
    rows = torch.cat([batch[0] for batch in near.splits["val"]])
    assert torch.equal(rows.double(), x[cosine >= found.threshold]) and near.is_part
    assert len(rows) == pytest.approx(0.05 * len(x), abs=1)


@pytest.mark.parametrize("kind", [Seeing, Unlabelled])
def test_many_processes_find_the_same_as_one(kind):
    def found(processes):
        objective = objective_of(trained(kind), 8, processes)
        found = nearest(objective)
        return found.concepts, found.threshold, [batch[0] for batch in near_rows(objective, found).splits["val"]]

    (concepts, threshold, batches), *others = simulate(1, found) + simulate(3, found)
    for names, other, rows in others:
        assert names == concepts and other == pytest.approx(threshold, abs=1e-6)
        assert torch.equal(torch.cat(rows), torch.cat(batches))


def test_only_samples_with_labels_of_the_kind_that_is_asked_for_are_embedded():
    """Of other kinds there may be many more labels, and few samples of each."""

    class Named(Seeing):
        embedded = 0

        def embed(self, batch):
            self.embedded += len(batch[1])
            return batch[0]

        def labels(self, batch):
            forgets = bool((batch[1] == FORGET).all())
            names = [None if forgets else f"{x:.3f}" for x in batch[0][:, 0].tolist()]
            return super().labels(batch) | {"name": names}

    module = trained(Named)
    every = objective_of(module, batch_size=4)
    found = nearest(every)
    assert found.concepts == nearest(objective_of(trained(Seeing), batch_size=4)).concepts
    samples = {kind: sum(len(batch[1]) for batch in every.loaders[kind]["train"]) for kind in ("forget", "retain")}
    assert samples["retain"] > 100 and module.embedded - samples["forget"] <= (CLASSES - 1) * 16 + (CLASSES - 1) * 4


def test_a_module_that_cannot_tell_has_nothing_near():
    assert nearest(objective_of(trained())) is None
    callback = unlearn_callback(loader(True), loader(False))
    fit(callback, trained())
    assert "near" not in callback.report.before and "near" not in callback.report.bounds


# ---- rows of batches


@given(st.data(), st.integers(1, 9), st.integers(1, 4))
def test_rows_are_the_same_whether_a_dataset_can_be_indexed_or_not(data, count, size):
    dataset = TensorDataset(torch.arange(count), torch.arange(count).float())
    chosen = [data.draw(st.lists(st.integers(0, len(b[0]) - 1), unique=True).map(sorted)) for b in DataLoader(dataset, size)]
    sizes = [len(batch[0]) for batch in DataLoader(dataset, size)]
    by_index = [x.tolist() for x, _ in rows_of(DataLoader(dataset, size), chosen, sizes)]
    by_batch = [x.tolist() for x, _ in Rows(list(DataLoader(dataset, size)), chosen, sizes)]
    flat = [size * number + row for number, rows in enumerate(chosen) for row in rows]
    assert sum(by_index, []) == sum(by_batch, []) == flat


def test_rows_of_a_batch_are_taken_from_every_column_and_from_nothing_else():
    batch = {"x": torch.arange(6).view(3, 2), "text": ["a", "b", "c"], "mean": torch.ones(2), "deep": (torch.arange(3), "all")}
    taken = take(batch, [2, 0], 3)
    assert taken["x"].tolist() == [[4, 5], [0, 1]] and taken["text"] == ["c", "a"] and taken["deep"][0].tolist() == [2, 0]
    assert taken["mean"] is batch["mean"] and taken["deep"][1] == "all"
    x, y = take([torch.tensor([[1.0], [2.0]]), torch.tensor([3, 4])], [1], 2)
    assert x.tolist() == [[2.0]] and y.tolist() == [4]


# ---- the bound


def test_the_default_tolerance_is_what_so_many_samples_can_tell():
    assert near_tolerance(1000) == 0.02 and near_tolerance(100) == pytest.approx(1.96 * math.sqrt(0.02 / 100))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=4))
def test_the_union_has_the_mean_of_all_samples(parts):
    found = pooled([({"acc": value}, {"acc": count}) for value, count in parts])["acc"]
    every = [value for value, count in parts for _ in range(count)]
    assert found == pytest.approx(sum(every) / len(every))


def near_loader(label, **options):
    labels = blobs().tensors[1]
    return DataLoader(Subset(blobs(), (labels == label).nonzero()[:, 0].tolist()), batch_size=16, **options)


def near_report(method, **options):
    callback = unlearn_callback(loader(True), loader(False), method=method, retain_tolerance=0.1, **options)
    fit(callback, trained(Seeing))
    return callback.report


def test_near_data_are_measured_shown_and_do_not_change_what_is_published():
    plain, shown = near_report(SLUG.paper(), near_retain=None), near_report(SLUG.paper())
    assert shown.trace == plain.trace and shown.step_size == plain.step_size
    (mine,), (other,) = shown.patch.edits, plain.patch.edits
    assert all(torch.equal(mine.directions[name], other.directions[name]) for name in other.directions)
    assert "near" not in plain.before and shown.before["near"].keys() == shown.after["near"].keys() == {"val_acc"}
    assert shown.search_before["near"] and shown.search_after["near"] and shown.bounds["near"]["binds"] is False
    assert any("shown, and not a bound" in note for note in shown.notes)
    row = next(line for line in shown.to_text().splitlines() if "near: val_acc" in line)
    assert row.rstrip(" │").endswith("no bound")
    assert UnlearnReport.from_dict(shown.to_dict()).to_text() == shown.to_text()


def test_what_is_near_counts_as_part_of_the_whole_and_by_itself():
    """Every trial that was measured to the end: the usage by hand, from the values that it reports."""
    report = near_report(SLUG.paper(near_binds=True), near_retain=["0"], near_tolerance=0.3)
    measured = [trial for trial in report.trace if trial["retain"]]
    assert report.bounds["near_tolerance"] == 0.3 and measured and all(trial["near"] for trial in measured)
    for trial in measured:
        lost = {kind: report.search_before[kind]["val_acc"] - trial[kind]["val_acc"] for kind in ("near", "retain")}
        usage = max(lost["near"] / 0.3, lost["retain"] / 0.1)
        assert trial["constraint_usage"] == pytest.approx(usage, abs=1e-6)
    assert report.bounds["near"]["concepts"] == ["0"] and report.bounds["near"]["what"].startswith("as named: '0'")


def test_an_edit_that_costs_what_is_near_too_much_is_not_made_and_the_report_says_so():
    class Fragile(Seeing):
        """Class 0 is lost by any edit."""

        def validation_step(self, batch, batch_idx):
            if (batch[1] == 0).all() and any(not torch.equal(p, q) for p, q in zip(self.parameters(), self.first, strict=True)):
                batch = batch[0], batch[1] + 1
            super().validation_step(batch, batch_idx)

    model = trained(Fragile)
    model.first = [p.detach().clone() for p in model.parameters()]
    callback = unlearn_callback(
        loader(True),
        loader(False),
        method=SLUG.paper(near_binds=True),
        near_retain=["0"],
        retain_tolerance=0.9,
        near_tolerance=0.2,
    )
    fit(callback, model)
    report = callback.report
    assert report.status == "infeasible" and "violates near_tolerance: near val_acc=0" in report.to_text(400)
    assert all(trial["retain"] is None for trial in report.trace)  # cheapest first: the rest was not asked


def test_a_loader_of_its_own_joins_the_retain_set_once():
    own = near_loader(0)
    callback = unlearn_callback(loader(True), {s: near_loader(1) for s in ("train", "val", "test")}, near_retain=own)
    fit(callback, model := trained(Counting))
    assert sum(model.sizes) == 60 + 30  # half of the near samples are for the gradient
    assert callback.report.bounds["near"]["what"].startswith("given; one set of 60 samples split into 30 train")


def test_names_that_nothing_has_are_refused():
    for names in (["dog"], ["0", "dog"]):
        with pytest.raises(UnlearnError, match=r"no sample of the retain set has the label 'dog'; there are '0', '1', '3'"):
            near_report(SLUG.paper(), near_retain=names)
    with pytest.raises(UnlearnError, match=r"near_retain: names need a method labels\(batch\) of the module"):
        fit(unlearn_callback(loader(True), loader(False), near_retain=["0"]), trained())
    with pytest.raises(UnlearnError, match="near_tolerance must be >= 0 and finite, got -1"):
        unlearn_callback(near_tolerance=-1)


def test_every_concept_has_its_own():
    labels = blobs().tensors[1]
    forget = {str(label): near_loader(label) for label in (0, 1)}
    retain = DataLoader(Subset(blobs(), (labels >= 2).nonzero()[:, 0].tolist()), batch_size=16)
    callback = unlearn_callback(forget, retain, near_retain={"0": ["2"], "1": ["3"]}, near_binds=True, retain_tolerance=0.5)
    trainer(callback).fit(trained(Seeing), retain, retain)
    report = callback.report
    assert isinstance(report, JointReport)
    assert [one.bounds["near"]["concepts"] for one in report.concepts.values()] == [["2"], ["3"]]
    assert "near 0: val_acc" in report.to_text() and set(report.rounds[-1]["near"]) <= {"0", "1"}


# ---- the margin


def margin_report(margin, tolerance, **options):
    callback = unlearn_callback(loader(True), loader(False), step_margin=margin, retain_tolerance=tolerance, **options)
    fit(callback, trained(Seeing))
    return callback.report


@pytest.mark.parametrize("margin", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.2])
def test_a_margin_never_makes_a_feasible_request_infeasible(margin, tolerance):
    bare, wide = margin_report(0.0, tolerance), margin_report(margin, tolerance)
    assert wide.status == bare.status
    if wide.status == "unlearned":
        usage = [t["constraint_usage"] for t in wide.trace if t["relative_step"] == wide.relative_step]
        assert min(usage) <= 1 and wide.search_after["forget"]["val_acc"] <= wide.bounds["forget_target"] + 1e-6
        held = [t.get("margin", 0.0) for t in wide.trace if t["relative_step"] == wide.relative_step]
        note = next(note for note in wide.notes if note.startswith("step_margin"))
        assert ("all of it" in note) == (max(held) == margin)


def test_where_the_whole_margin_costs_too_much_a_part_of_it_is_held():
    """A loss that grows with the step: the bound lies between the smallest step and the margin."""

    class Rising(Seeing):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            moved = sum((p - q).norm() for p, q in zip(self.parameters(), self.first, strict=True))
            self.log("drift_loss", 1 + moved)

    def report(margin, tolerance):
        model = trained(Rising)
        model.first = [p.detach().clone() for p in model.parameters()]
        callback = unlearn_callback(
            loader(True), loader(False), layers="net.6.weight", step_margin=margin, retain_metric="drift_loss",
            retain_tolerance=tolerance,
        )  # fmt: skip
        fit(callback, model)
        return callback.report

    bare = report(0.0, 1e6)
    (moved,) = (bare.search_after["retain"][name] - 1 for name in ("drift_loss",))
    part = report(1.0, 1.4 * moved)
    assert bare.relative_step * 1.2 < part.relative_step <= bare.relative_step * 1.4
    assert any(note.startswith("step_margin: 1 beyond") and "38% of it is within" in note for note in part.notes)


def test_least_change_directions_have_a_margin_and_heed_what_is_near_of_their_own_accord():
    assert SLUG(direction="gradient")._margin() == SLUG.paper()._margin() == 0
    assert SLUG(direction=["gradient", "covariance"])._margin() == 0.5
    assert SLUG(direction="covariance", step_margin=0.1)._margin() == 0.1
    binding = [SLUG(direction="covariance"), SLUG(near_binds=True)]
    assert [one.binds_near() for one in [*binding, SLUG(), SLUG.paper(), SLUG(direction="kfac", near_binds=False)]] == [
        True, True, True, False, False,
    ]  # fmt: skip


# ---- the drawings


def test_near_drawings_are_rendered_more_often_and_never_those_to_forget():
    data = EmojiDataModule(thing="octopus", style="noto")
    data.setup("fit")
    splits = data.render_near(["squid", "crab", "octopus", "blob style"])
    val, test = (list(splits[split]) for split in ("val", "test"))
    assert sum(len(batch["thing"]) for batch in val) >= 100 and sum(len(batch["thing"]) for batch in test) >= 500
    things = set(torch.cat([batch["thing"] for batch in val]).tolist())
    octopus = load_index("octopus")
    assert octopus not in things and 4 not in torch.cat([batch["style"] for batch in val]).tolist()
    assert not torch.equal(val[0]["image"][0], test[0]["image"][0])
    assert data.render_near(["nothing"]) is None


def load_index(name):
    from slug_lightning.embedded.drawings import load_drawings

    return load_drawings().thing_names.index(name)


def test_a_datamodule_may_say_what_is_near():
    x, y = blobs().tensors
    by_label = {str(label): TensorDataset(x[y == label], y[y == label]) for label in range(CLASSES)}
    data = UnlearnDataModule(
        {"two": by_label["2"], "three": by_label["3"]}, by_label["1"], near_retain={"two": by_label["0"]}, batch_size=16
    )
    callback = unlearn_callback(near_binds=True, retain_tolerance=0.5)
    trainer(callback).fit(trained(Seeing), datamodule=data)
    report = callback.report
    assert report.concepts["two"].bounds["near"]["what"].startswith("given; one set of 60 samples split into 30 train")
    assert report.concepts["two"].bounds["near"]["samples"] == {"val": 15, "test": 15}
    assert report.concepts["three"].bounds["near"]["what"].startswith("the nearest by")  # chosen, as none is given
    with pytest.raises(UnlearnError, match="near_retain: give a dict by concept, 'two'"):
        UnlearnDataModule({"two": by_label["2"]}, by_label["1"], near_retain={"four": by_label["0"]})


def test_the_same_fit_again_reads_near_data_once_each_time():
    retain = {split: near_loader(1) for split in ("train", "val", "test")}
    callback = unlearn_callback(loader(True), retain, near_retain=near_loader(0))
    for _ in range(2):
        fit(callback, model := trained(Counting))
        assert sum(model.sizes) == 60 + 30


# ---- what must not go wrong


def test_a_module_may_have_these_names_for_other_things():
    class Embedding(Classifier):
        def __init__(self):
            super().__init__()
            self.embed, self.labels = torch.nn.Embedding(4, 2).requires_grad_(False), ["a", "b"]

    class Tokens(Classifier):
        def embed(self, token_ids, mask):
            return token_ids * mask

    for module in (Embedding(), Tokens()):
        hooks = ModuleHooks(module)
        assert hooks.embed is hooks.labels is None
    assert callable(ModuleHooks(trained(Seeing)).embed) and callable(ModuleHooks(trained(Seeing)).labels)


def test_near_data_are_measured_by_what_they_log():
    class Asking(Seeing):
        """Of class 0 it logs another metric than of the others."""

        retain_metric = ("val_acc", "other_acc")

        def validation_step(self, batch, batch_idx):
            right = (self.net(batch[0]).argmax(1) == batch[1]).float()
            for name, rows in (("val_acc", batch[1] != 0), ("other_acc", batch[1] == 0)):
                if rows.any():
                    self.log(name, right[rows].mean(), batch_size=int(rows.sum()))

    callback = unlearn_callback(loader(True), loader(False), near_binds=True, near_retain=["0"], retain_tolerance=0.5)
    fit(callback, trained(Asking))
    report = callback.report
    assert report.before["near"].keys() == {"other_acc"} and report.before["retain"].keys() == {"val_acc", "other_acc"}
    assert "near: other_acc" in report.to_text()


def test_one_loader_for_several_concepts_joins_once():
    x, y = blobs().tensors
    forget = {name: TensorDataset(x[y == label], y[y == label]) for name, label in (("two", 2), ("three", 3))}
    forget = {name: DataLoader(one, batch_size=16) for name, one in forget.items()}
    retain = {split: near_loader(1) for split in ("train", "val", "test")}
    callback = unlearn_callback(forget, retain, near_retain=near_loader(0), retain_tolerance=0.5)
    trainer(callback).fit(model := trained(Counting), near_loader(1), near_loader(1))
    assert sum(model.sizes) == 60 + 30
    trainer(callback, limit_train_batches=1).fit(model := trained(Counting), near_loader(1), near_loader(1))
    assert sum(model.sizes) == 16 + 16


def test_rows_of_a_loader_that_shuffles_by_a_generator_of_its_own_are_not_taken():
    objective = objective_of(trained(Seeing))
    shuffled = DataLoader(part(False), batch_size=16, shuffle=True, generator=torch.Generator())
    objective.loaders["retain"]["val"] = shuffled
    assert shuffles_anew(shuffled) and not shuffles_anew(DataLoader(part(False), shuffle=True))
    assert shuffles_anew(DataLoader(part(False), batch_sampler=BatchSampler(shuffled.sampler, 4, drop_last=False)))
    assert near_rows(objective, nearest(objective)) is None


def test_a_margin_ends_at_the_longest_step_that_is_tried():
    bare = margin_report(0.0, 0.9)
    most = 1.2 * bare.relative_step
    wide = margin_report(3.0, 0.9, max_step=most, layers=bare.layer)
    assert wide.status == "unlearned" and max(t["relative_step"] for t in wide.trace) <= most * (1 + 1e-9)


def test_the_margin_of_a_second_layer_is_tried_with_the_first_one_edited():
    """Two layers of which each alone gets halfway: what the margin's trials show adds to the first edit."""

    class Halves(Seeing):
        def validation_step(self, batch, batch_idx):
            moved = [(p - q).norm() / q.norm() for p, q in zip(self.ends(), self.first, strict=True)]
            self.log("gone_loss", sum(m.clamp(max=0.5) for m in moved))
            self.log("drift_loss", 1 + sum(moved))

        def ends(self):
            return self.net[0].weight, self.net[6].weight

    model = trained(Halves)
    model.first = [p.detach().clone() for p in model.ends()]
    callback = unlearn_callback(
        loader(True), loader(False), layers=["net.0.weight", "net.6.weight"], max_layers=2, max_step=1.0, step_margin=0.4,
        forget_metric="gone_loss", forget_target=0.7, retain_metric="drift_loss", retain_tolerance=100.0,
    )  # fmt: skip
    fit(callback, model)
    report = callback.report
    assert report.status == "unlearned" and len(report.tensors) == 2
    beyond = [t for t in report.trace if t.get("margin")]
    assert beyond and all(t["forget"] >= 0.7 for t in beyond)
