"""The callback as a whole: what it changes, what it leaves, what it says."""

import json

import lightning.pytorch as pl
import pytest
import torch
from _callback import unlearn_callback
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import slug_lightning.callbacks.unlearn as unlearn
import slug_lightning.methods.reporting as reporting
import slug_lightning.methods.slug.concept_search as concept_search
import slug_lightning.methods.slug.config as config
import slug_lightning.objective.objective as objective
from _tiny import CLASSES, FORGET, Classifier, accuracy, blobs, changed, fit, loader, part, snapshot, trained, trainer
from slug_lightning import UnlearnError, UnlearnPatch, UnlearnReport
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.methods.slug.choice import LeastUsage


def callback(**options):
    return unlearn_callback(**{"forget": loader(True), "retain": loader(False), **options})


def test_a_module_that_knows_nothing_of_forgetting_forgets_a_class():
    model, forgetting = trained(), callback()
    assert accuracy(model, forget=True) == accuracy(model, forget=False) == 1
    fit(forgetting, model)
    report = forgetting.report
    assert report.status == "unlearned" and report.holds
    assert accuracy(model, forget=True) <= 1 / CLASSES
    assert accuracy(model, forget=False) >= 0.98
    assert report.after["forget"]["loss"] >= report.bounds["forget_target"] > report.before["forget"]["loss"]
    assert model.trained_batches == 0


class StopAtOnce(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.should_stop = True


def test_only_the_edited_tensors_change():
    model, forgetting = trained(), callback()
    before, modes = snapshot(model), {name: m.training for name, m in model.named_modules()}
    other = trained()
    torch.manual_seed(1)
    fit(StopAtOnce(), other)
    random = torch.get_rng_state()  # what the trainer itself draws
    torch.manual_seed(1)
    fit(forgetting, model)
    assert changed(model, before) == set(forgetting.report.tensors) == {forgetting.report.layer}
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert "log" not in vars(model)


def test_the_edit_climbs_the_forget_loss():
    model, forgetting = trained(), callback()
    model.eval()
    direction = None

    def loss():
        x, y = part(True).dataset.tensors
        return cross_entropy(model.net(x[y == FORGET]), y[y == FORGET])

    before = snapshot(model)
    value = loss()
    fit(forgetting, model.train())
    model.eval()
    (edit,) = forgetting.report.patch.edits
    assert edit.step > 0
    ((name, direction),) = edit.directions.items()
    model.load_state_dict(before)
    parameter = dict(model.named_parameters())[name]
    (gradient,) = torch.autograd.grad(loss(), [parameter])
    assert (gradient * direction).sum() > 0
    with torch.no_grad():
        parameter.add_(direction, alpha=1e-3 * edit.step)
    assert loss() > value


def test_the_gradient_is_taken_at_the_original_weights_in_evaluation_mode():
    model, forgetting = trained(), callback(layers="net.6.weight")
    twin = trained().eval()
    fit(forgetting, model)
    (edit,) = forgetting.report.patch.edits
    # The gradient part of the split, found from the loaders that the run would make.
    data = unlearn.resolve_loaders({"two": forgetting.forget}, forgetting.retain, None).forget["two"]["train"]
    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    (expected,) = torch.autograd.grad(cross_entropy(twin.net(x), y), [twin.net[6].weight])
    torch.testing.assert_close(edit.directions["net.6.weight"], expected)


def test_an_accuracy_falls_to_chance_and_the_target_is_stated():
    model = trained()
    model.num_classes = CLASSES
    forgetting = callback(forget_metric="val_acc", retain_metric=["val_acc", "val_loss"], retain_tolerance=0.05)
    fit(forgetting, model)
    report = forgetting.report
    assert report.bounds["forget_target"] == 1 / CLASSES and "chance" in report.bounds["forget_target_reason"]
    assert report.after["forget"]["val_acc"] <= 1 / CLASSES
    assert set(report.after["retain"]) == {"val_acc", "val_loss"}
    for name, before in report.search_before["retain"].items():
        lost = (
            before - report.search_after["retain"][name]
            if name == "val_acc"
            else report.search_after["retain"][name] / before - 1
        )
        assert lost <= 0.05 + 1e-6


def test_the_module_may_name_its_metrics_and_steps():
    class Named(Classifier):
        forget_metric = "val_acc"
        retain_metric = "val_acc"
        num_classes = CLASSES

        def forget_step(self, batch, batch_idx):
            assert (batch[1] == FORGET).all()
            return super().training_step(batch, batch_idx)

        def retain_step(self, batch, batch_idx):
            assert (batch[1] != FORGET).all()
            return super().training_step(batch, batch_idx)

        def training_step(self, batch, batch_idx):
            raise AssertionError("the module's own steps come first")

    forgetting = callback()
    fit(forgetting, trained(Named))
    assert forgetting.report.status == "unlearned"
    assert list(forgetting.report.before["retain"]) == ["val_acc"]


def test_infeasible_leaves_every_bit_and_says_so():
    model = trained()
    before = snapshot(model)
    forgetting = callback(forget_target=1e6, max_evaluations=2)
    made = fit(forgetting, model)
    report = forgetting.report
    assert report.status == "infeasible" and report.patch is None and report.layer is None
    assert report.after == report.before
    assert len(report.trace) == 2 * sum(s["on_front"] for s in report.scores)
    assert changed(model, before) == set()
    assert made.should_stop


@pytest.mark.parametrize(
    ("room", "phase"),
    [
        (unlearn, "resolve_loaders"),
        (config, "find_layers"),
        (concept_search, "layer_statistics"),
        (concept_search, "close_calls"),
        (concept_search, "LayerSearch"),
        (objective, "Replay"),
        (reporting, "combined_usage"),
        (LeastUsage, "__call__"),
        (reporting.UnlearnPatch, "active"),
        (unlearn, "publish"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_raises_the_weights_are_as_they_were(room, phase, monkeypatch):
    model = trained()
    before = snapshot(model)

    def fail(*_, **__):
        raise RuntimeError(phase)

    monkeypatch.setattr(room, phase, fail)
    with pytest.raises(RuntimeError, match=phase):
        fit(callback(), model)
    assert changed(model, before) == set()
    assert "log" not in vars(model)


@pytest.mark.parametrize("kind", ["forget", "retain"])
@pytest.mark.parametrize("number", range(1, 10, 2))
def test_a_step_that_raises_midway_leaves_every_bit(kind, number):
    class Failing(Classifier):
        calls = 0

        def training_step(self, batch, batch_idx):
            Failing.calls += kind == ("forget" if (batch[1] == FORGET).all() else "retain")
            if Failing.calls == number:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    model = trained(Failing)
    before = snapshot(model)
    made = trainer(callback())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        made.fit(model, loader(False), loader(False))
    assert changed(model, before) == set()


def test_disk_trouble_undoes_the_edit(monkeypatch, tmp_path):
    model = trained()
    before = snapshot(model)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(unlearn, "save_run", full)
    with pytest.raises(OSError, match="no space"):
        fit(callback(output_dir=str(tmp_path / "run")), model)
    assert changed(model, before) == set()


def test_training_goes_on_from_the_edited_weights_if_asked():
    model, forgetting = trained(), callback(continue_training=True)
    fit(forgetting, model)
    assert model.trained_batches == len(loader(False))
    assert accuracy(model, forget=True) <= 0.5


def test_a_training_step_may_return_a_dict_or_none():
    class Moody(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else {"loss": loss, "other": 1}

    forgetting = callback(forget=loader(True, batch_size=4), retain=loader(False, batch_size=16))
    fit(forgetting, trained(Moody))
    assert forgetting.report.status == "unlearned"


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=1.0) for i in (0, 4)]


def test_manual_optimisation_is_refused_without_steps_of_its_own():
    model = trained(Manual)
    before = snapshot(model)
    with pytest.raises(UnlearnError, match="Manual: its training_step optimizes manually.*forget_step"):
        fit(callback(), model)
    assert changed(model, before) == set()


def test_several_optimizers_work_with_steps_of_its_own():
    class Own(Manual):
        def forget_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

        retain_step = forget_step

    model, forgetting = trained(Own), callback()
    before = snapshot(model)
    fit(forgetting, model)
    assert changed(model, before) == {forgetting.report.layer}


class Stream(IterableDataset):
    def __init__(self, forget):
        self.items = [part(forget)[i] for i in range(len(part(forget)))]

    def __iter__(self):
        return iter(self.items)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # Lightning's from_datasets sets it
@pytest.mark.parametrize("shape", ["loader", "list", "stream", "batches", "datamodule", "unlearn_datamodule", "named"])
def test_every_sample_counts_once_whatever_the_source(shape):
    """The batches that the steps see are the given samples, each in one split only."""

    class Recording(Classifier):
        seen: dict[bool, list] = {}

        def training_step(self, batch, batch_idx):
            self.seen[bool((batch[1] == FORGET).all())].append((torch.is_grad_enabled(), batch[0]))
            return super().training_step(batch, batch_idx)

    def source(forget):
        half = range(len(part(forget)))
        if shape == "list":
            sets = [torch.utils.data.Subset(part(forget), list(half[start::2])) for start in (0, 1)]
            return [DataLoader(dataset, batch_size=5) for dataset in sets]
        if shape == "stream":
            return DataLoader(Stream(forget), batch_size=3)
        if shape == "batches":
            return list_of_batches(forget)
        if shape == "datamodule":
            return pl.LightningDataModule.from_datasets(part(forget), batch_size=7)
        if shape == "unlearn_datamodule":
            return UnlearnDataModule(part(True), part(False), batch_size=7)
        return {"class two": loader(forget)} if shape == "named" and forget else loader(forget, shuffle=True, drop_last=True)

    class list_of_batches:  # starts anew each time, but is no loader
        def __init__(self, forget):
            self.loader = DataLoader(part(forget), batch_size=4)

        def __iter__(self):
            return iter(self.loader)

    model = trained(Recording)
    model.seen.update({True: [], False: []})
    forgetting = callback(forget=source(True), retain=source(False), max_evaluations=1)
    fit(forgetting, model)
    for forget, seen in model.seen.items():
        gradient = torch.cat([x for grad, x in seen if grad])
        others = torch.cat([x for grad, x in seen if not grad])
        everything = {tuple(x.tolist()) for x, _ in part(forget)}
        in_gradient = [tuple(x.tolist()) for x in gradient]
        assert len(in_gradient) == len(set(in_gradient)), "the gradient counts no sample twice"
        rest = {tuple(x.tolist()) for x in others}
        assert set(in_gradient).isdisjoint(rest), "search and report data are apart from the gradient's"
        assert set(in_gradient) | rest == everything, "no sample is lost"
    if shape == "named":
        assert forgetting.report.concept == "class two"


def test_the_trainers_own_datamodule_is_the_source():
    data = UnlearnDataModule(part(True), part(False), batch_size=16)
    forgetting = unlearn_callback()
    trainer(forgetting).fit(trained(), datamodule=data)
    assert forgetting.report.status == "unlearned"
    assert "split into" in forgetting.report.notes[0]


def test_search_and_report_data_are_apart():
    sets = {}
    for kind, forget in (("forget", True), ("retain", False)):
        thirds = torch.arange(len(part(forget))).chunk(3)
        parts = [torch.utils.data.Subset(part(forget), third.tolist()) for third in thirds]
        sets |= {kind: parts[0], f"{kind}_val": parts[1], f"{kind}_test": parts[2]}
    forgetting = unlearn_callback()
    model = trained()
    trainer(forgetting).fit(model, datamodule=UnlearnDataModule(**sets, batch_size=16))
    model.eval()
    for split, stated in (("forget_val", forgetting.report.search_after), ("forget_test", forgetting.report.after)):
        x, y = next(iter(DataLoader(sets[split], batch_size=1000)))
        with torch.no_grad():
            assert stated["forget"]["loss"] == pytest.approx(cross_entropy(model.net(x), y).item(), rel=1e-5)


def test_tied_tensors_are_edited_once():
    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.again = self.net[6]

    model = Tied()
    model.load_state_dict(trained().state_dict() | {f"again.{n}": t for n, t in trained().net[6].state_dict().items()})
    before = snapshot(model)
    forgetting = callback(layers="net.6.weight")
    fit(forgetting, model)
    assert [s["layer"] for s in forgetting.report.scores] == ["net.6.weight"]
    edit = forgetting.report.patch.edits[0]
    torch.testing.assert_close(model.net[6].weight.data, before["net.6.weight"] + edit.step * edit.directions["net.6.weight"])


@pytest.mark.parametrize("granularity", ["module", "siblings"])
def test_groups_are_edited_together(granularity):
    model, forgetting = trained(), callback(granularity=granularity, layers=["net.4.*", "net.6.*"], retain_tolerance=1.0)
    before = snapshot(model)
    fit(forgetting, model)
    expected = {"net.4.weight", "net.6.weight"} if granularity == "siblings" else {f"{forgetting.report.layer}.weight"}
    assert changed(model, before) == expected == set(forgetting.report.tensors)


def nan_weights():
    model = trained()
    with torch.no_grad():
        model.net[6].bias[0] = float("nan")
    return model


def large(forget):
    return DataLoader(TensorDataset(torch.full((8, 8), 1e38 if forget else 1.0), torch.zeros(8).long()), batch_size=4)


class Explaining(Classifier):
    """Knows what to look at where nothing is left to forget."""

    def nothing_to_forget(self):
        return "names: it never says so"


class Silent(Classifier):
    def training_step(self, batch, batch_idx):
        return None


class Vector(Classifier):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class Detached(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).detach()


def empty():
    return DataLoader(TensorDataset(torch.zeros(0, 8), torch.zeros(0).long()), sampler=[])


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"forget": empty()}, trained, "forget: .*empty"),
        ({"retain": empty()}, trained, "retain: .*empty"),
        ({"forget": [], "retain": loader(False)}, trained, "forget: .*empty"),
        ({"retain": loader(True)}, trained, "same data"),
        ({"forget": None}, trained, "forget: nothing was given.*pass forget="),
        ({"forget": 3}, trained, "forget: must be a DataLoader, .*got int"),
        ({"forget": iter([1])}, trained, "forget: an iterator can be read only once"),
        ({"forget_metric": "val_accuracy"}, trained, "forget_metric: .*val_accuracy.*only.*val_acc.*val_loss"),
        ({"retain_metric": ["val_acc", "nope"]}, trained, "retain_metric: .*nope.*only"),
        ({"layers": "nett.*"}, trained, "layers: 'nett.*'.*near misses: net"),
        ({"layers": "*.bias"}, trained, "layers: .*only vectors"),
        ({}, lambda: trained(frozen=True), "layers: all 3 candidates are frozen.*requires_grad"),
        (
            {"forget_target": 0.0},
            trained,
            "forget_target: nothing to forget.*; look at the forget data, or give a stricter",
        ),
        ({"forget_target": 0.0}, lambda: trained(Explaining), r"forget_target: nothing to forget.*already; names: it never says"),
        ({"forget_metric": "val_acc"}, trained, "forget_target: the chance level of 'val_acc' is unknown.*num_classes"),
        ({}, nan_weights, "_metric: loss is nan before any edit"),
        ({}, lambda: trained(Silent), "forget_metric: the step returns no loss"),
        ({}, lambda: trained(Vector), "training_step must return a scalar loss"),
        ({}, lambda: trained(Detached), "forget: the loss of the step has no graph"),
    ],
)
def test_bad_input_is_named_with_its_remedy_and_changes_nothing(options, model, message):
    made = model()
    before = snapshot(made)
    with pytest.raises(UnlearnError, match=message):
        fit(callback(**options), made)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain_tolerance": -0.1}, "retain_tolerance"),
        ({"max_evaluations": 0}, "max_evaluations"),
        ({"granularity": "layer"}, "granularity"),
        ({"forget_target": float("nan")}, "forget_target"),
        ({"forget": {}}, "forget must name at least one concept"),
        ({"step_margin": -1}, "step_margin"),
        ({"scales": [float("inf")]}, "scales"),
        ({"on_infeasible": "ask"}, "on_infeasible"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(UnlearnError, match=message):
        callback(**options)


def test_nan_in_a_gradient_names_the_layer():
    class Cusp(Classifier):
        """Its loss is finite, its slope isn't: sqrt at zero."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self.net[6].weight * 0).square().sum().sqrt()

    with pytest.raises(UnlearnError, match=r"forget: the gradient of net\.6\.weight holds NaN"):
        fit(callback(), trained(Cusp))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_epochs": 1}, "min_epochs"),
        ({"min_steps": 1}, "min_steps"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"limit_train_batches": 0}, "limit_train_batches=0"),
    ],
)
def test_a_trainer_that_would_undo_the_edit_is_refused(options, message):
    model = trained()
    with pytest.raises(UnlearnError, match=message):
        fit(callback(), model, **options)


def test_the_folder_holds_the_evidence_and_plain_torch_reads_it(tmp_path):
    model, folder = trained(), tmp_path / "run"
    original = trained()
    forgetting = callback(output_dir=str(folder))
    fit(forgetting, model)
    assert UnlearnReport.from_json(folder / "report.json").layer == forgetting.report.layer
    assert json.loads((folder / "report.json").read_text())["status"] == "unlearned"
    checkpoint = torch.load(folder / "unlearned.ckpt", weights_only=True)
    assert not changed(model, checkpoint["state_dict"])
    from safetensors.torch import load_file

    assert not changed(model, load_file(folder / "weights.safetensors"))
    patch = UnlearnPatch.load(folder / "patch.safetensors")
    patch.apply(original)
    assert not changed(original, model.state_dict())
    patch.revert(original)
    assert not changed(original, trained().state_dict())
    assert {path.name for path in (folder / "figures").iterdir()} == {"pareto.png", "trade_off.png"}


def test_a_second_run_never_overwrites_the_first(tmp_path):
    for _ in range(2):
        fit(callback(output_dir=str(tmp_path / "run")), trained())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]


def test_a_resumed_training_is_not_edited_again(tmp_path):
    model = trained()
    fit(callback(output_dir=str(tmp_path / "run"), continue_training=True), model)
    checkpoint = torch.load(tmp_path / "run" / "unlearned.ckpt", weights_only=True)
    again, forgetting = trained(), callback(continue_training=True)
    trainer(forgetting).fit(again, loader(False), loader(False), ckpt_path=str(tmp_path / "run" / "unlearned.ckpt"))
    (name,) = forgetting.report.tensors
    moved = (dict(again.named_parameters())[name] - checkpoint["state_dict"][name]).abs().max()
    assert forgetting.report.status == "unlearned" and again.trained_batches == len(loader(False))
    assert moved < 0.05 < (checkpoint["state_dict"][name] - trained().state_dict()[name]).abs().max()


def test_a_checkpoint_with_an_edit_does_not_answer_for_another_request(tmp_path):
    fit(callback(output_dir=str(tmp_path / "run")), trained())
    path = str(tmp_path / "run" / "unlearned.ckpt")
    x, y = blobs().tensors
    zero, others = ([i for i in range(len(y)) if (y[i] == 0) == wanted and y[i] != FORGET] for wanted in (True, False))
    sets = [DataLoader(torch.utils.data.Subset(blobs(), chosen), batch_size=16) for chosen in (zero, others)]
    other, forgetting = trained(), unlearn_callback({"class zero": sets[0]}, sets[1], retain_tolerance=20.0)
    trainer(forgetting).fit(other, loader(False), loader(False), ckpt_path=path)
    assert forgetting.report.concept == "class zero" and forgetting.report.status == "unlearned"
    other.eval()
    assert (other.net(x[zero]).argmax(1) == 0).float().mean() <= 1 / CLASSES


def test_a_fit_that_ends_before_the_edit_says_so(tmp_path):
    done = trainer(enable_checkpointing=False)
    done.fit(trained(), loader(False), loader(False))
    done.save_checkpoint(tmp_path / "done.ckpt", weights_only=False)
    with pytest.raises(UnlearnError, match="ended before the edit.*raise max_epochs"):
        trainer(callback()).fit(trained(), loader(False), loader(False), ckpt_path=str(tmp_path / "done.ckpt"))


def test_steps_may_leave_out_batch_idx_and_hooks_before_the_transfer_are_called():
    class Short(Classifier):
        num_classes = CLASSES

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch[0], "y": batch[1]}

        def training_step(self, batch):
            return cross_entropy(self.net(batch["x"]), batch["y"])

        def validation_step(self, batch):
            assert self.trainer.validating
            self.log("val_acc", (self.net(batch["x"]).argmax(1) == batch["y"]).float().mean())

    forgetting = callback(forget_metric="val_acc")
    made = fit(forgetting, trained(Short))
    assert forgetting.report.status == "unlearned"
    assert not made.validating


def test_two_measurements_of_the_same_weights_agree_though_the_data_are_drawn_at_random():
    class Noisy(torch.utils.data.Dataset):
        def __init__(self, forget):
            self.part = part(forget)

        def __len__(self):
            return len(self.part)

        def __getitem__(self, i):
            x, y = self.part[i]
            return x + torch.randn(8), y

    reports = []
    for _ in range(2):
        torch.rand(7)
        forgetting = callback(forget=DataLoader(Noisy(True), 16), retain=DataLoader(Noisy(False), 16), max_evaluations=2)
        fit(forgetting, trained())
        reports.append(forgetting.report)
    assert reports[0].trace == reports[1].trace and reports[0].before == reports[1].before


def test_a_broken_model_counts_as_too_large_a_step():
    class Fragile(Classifier):
        """Its loss is NaN as soon as any logit is larger than a trained one."""

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            return cross_entropy(logits, batch[1]) + (0 if logits.abs().max() < self.most else float("nan"))

    model = trained(Fragile).eval()
    model.most = 1.05 * model.net(blobs().tensors[0]).abs().max().item()
    forgetting = callback(layers="net.6.weight", max_evaluations=12, forget_target=1000.0)
    fit(forgetting, model.train())
    steps = [t["relative_step"] for t in forgetting.report.trace]
    broken = [t["relative_step"] for t in forgetting.report.trace if t["forget"] != t["forget"]]
    assert broken and max(steps) <= 2 * min(broken)


def test_the_edit_is_of_the_model_and_not_of_a_copy_beside_it():
    import copy

    from slug_lightning.modules import ClassifierModule

    module = ClassifierModule(trained().net, num_classes=CLASSES)
    module.a = copy.deepcopy(module.model).requires_grad_(False)
    reference = snapshot(module.a)
    forgetting = callback(retain_tolerance=0.05)
    trainer(forgetting).fit(module, loader(False), loader(False))
    assert forgetting.report.status == "unlearned"
    assert not changed(module.a, reference)
    assert changed(module.model, reference) == set(forgetting.report.tensors)


def test_a_failed_apply_leaves_no_report_behind(monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    model, forgetting = trained(), callback()
    before = snapshot(model)
    monkeypatch.setattr(UnlearnPatch, "apply", fail)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(forgetting, model)
    assert forgetting.report is None and not changed(model, before)


def test_an_offloaded_gradient_leads_to_the_same_edit():
    found = []
    for offload in (False, True):
        forgetting, model = callback(offload_gradient=offload), trained()
        fit(forgetting, model)
        found.append((forgetting.report.layer, forgetting.report.step_size, forgetting.report.patch_digest))
    assert found[0] == found[1]


@pytest.mark.parametrize("bar", ["rich", "tqdm"])
def test_bars_and_table_are_shown(bar, capsys):
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    forgetting = callback()
    made = trainer(forgetting, {"rich": RichProgressBar, "tqdm": TQDMProgressBar}[bar](), enable_progress_bar=True)
    made.fit(trained(), loader(False), loader(False))
    shown = capsys.readouterr().out
    assert "relative step" in shown and f"{forgetting.report.layer}: " in shown


def test_a_trainer_of_the_older_package_works():
    import pytorch_lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    forgetting = callback()

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = trained().net

        training_step = Classifier.training_step
        validation_step = Classifier.validation_step
        configure_optimizers = Classifier.configure_optimizers

    made = pytorch_lightning.Trainer(accelerator="cpu", max_epochs=1, callbacks=[forgetting], **quiet)
    made.fit(Other(), loader(False), loader(False))
    assert forgetting.report.status == "unlearned"
