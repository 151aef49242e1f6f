"""Where ways compete: which are searched first, and that only the winner's step is narrowed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from _callback import unlearn_callback
from _competition import KEEPING, TOLERANCE, World, competition, forgets_at, never, passes_of, rows
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from _tiny import Classifier, blobs, fit, loader, trained
from slug_lightning.methods import SLUG
from slug_lightning.methods.slug.candidates import Candidate
from slug_lightning.methods.slug.concept_search import SCREENED, ConceptSearch
from slug_lightning.methods.slug.layer_search import ROUGH
from slug_lightning.methods.slug.step_search import FINE, OVERSHOOT
from slug_lightning.methods.slug.ways import Ways

THRESHOLDS = st.floats(0.02, 1.5)
POWERS = st.floats(0.5, 3.0)


def contest(ways, kept, **options):
    return competition(World(ways, kept), is_contest=True, max_step=2.0, **options)


@given(THRESHOLDS, POWERS)
def test_a_search_that_rested_goes_on_as_if_it_never_had(threshold, power):
    kept = {None: rows(0.9), "a": rows(0.9)}
    whole, (way,) = contest({"a": forgets_at(threshold, power)}, kept)
    whole.search_steps(way)
    rested, (way,) = contest({"a": forgets_at(threshold, power)}, kept)
    rested.search_steps(way, roughly=True)
    rough = list(rested.trials)
    rested.search_steps(way)
    assert rested.trials == whole.trials and rested.smallest == whole.smallest
    assert rough == whole.trials[: len(rough)]


@given(THRESHOLDS, POWERS)
def test_roughly_is_to_a_quarter(threshold, power):
    search, (way,) = contest({"a": forgets_at(threshold, power)}, {None: rows(0.9), "a": rows(0.9)})
    search.search_steps(way, roughly=True)
    found = search.smallest[way.key].relative_step
    assert threshold * (1 - 1e-9) <= found
    # Or the rule itself was content, as the metric is hardly beyond its target.
    assert found <= threshold / (1 - ROUGH) * (1 + 1e-9) or (found / threshold) ** power <= 1 + OVERSHOOT + 1e-9


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(THRESHOLDS, st.floats(0.7, 0.9)), min_size=1))
def test_the_winner_is_narrowed_and_nothing_else(table):
    kept = {None: rows(0.9)} | {name: rows(accuracy) for name, (_, accuracy) in table.items()}
    search, ways = contest({name: forgets_at(threshold) for name, (threshold, _) in table.items()}, kept)
    decision, _ = search.run(ways)
    rough = len(search.trials)
    chosen = search.refine(decision.trial)
    assert chosen is not None and chosen.layer == decision.trial.layer and chosen.feasible
    assert {trial.layer for trial in search.trials[rough:]} <= {chosen.layer}
    threshold, _ = table[chosen.layer]
    assert threshold * (1 - 1e-9) <= chosen.relative_step <= threshold * (1 + max(FINE, OVERSHOOT)) / (1 - FINE)


class Costly(World):
    """Its layer loses the more accuracy the further it goes, and has lost the tolerance at a step of `most`."""

    most = math.inf

    def validation_step(self, batch, batch_idx):
        name, step = self.edit()
        if name and int(batch[0, 0]) == KEEPING:
            self.log("acc", 0.9 - TOLERANCE * step / self.most)
        else:
            super().validation_step(batch, batch_idx)


def test_what_is_within_bounds_only_at_the_narrow_step_is_not_called_infeasible():
    def searched(most):
        world = Costly({"a": lambda step: 2.0 * (step >= 0.62)}, {None: rows(0.9)})
        world.most = most
        search, (way,) = competition(world, is_contest=True, max_step=2.0)
        return search, search.run([way])[0].trial

    search, rough = searched(math.inf)
    narrow = search.refine(rough)
    assert narrow.relative_step < rough.relative_step
    search, found = searched((narrow.relative_step + rough.relative_step) / 2)
    assert found is None
    found = search.refine(None)
    assert found.feasible and found.relative_step == narrow.relative_step


def test_the_margin_is_tried_only_where_the_smallest_step_holds():
    kept = {None: rows(0.9), "good": rows(0.9), "bad": rows(0.1)}
    search, ways = contest({"good": forgets_at(0.3), "bad": forgets_at(0.3)}, kept, step_margin=0.5)
    search.run(ways)
    assert {trial.layer for trial in search.trials if trial.margin} == {"good"}


def test_what_is_not_reached_costs_no_measurement_of_what_is_kept():
    search, ways = contest({"a": never, "b": forgets_at(0.2)}, {None: rows(0.9), "b": rows(0.9)})
    search.run(ways)
    assert [name for kind, name in passes_of(search.objective.module) if kind == KEEPING] == [None, "b"]


# ---- which ways are searched first


def every(layers):
    return [Candidate(layer.name) for layer in layers]


def forgotten(module, target=0.0, **options):
    metrics = {"forget_metric": "val_acc", "retain_metric": "val_acc", "direction": "covariance", "curve": "both"}
    callback = unlearn_callback(
        forget=loader(True), retain=loader(False), score=every, forget_target=target, **metrics, **options
    )
    fit(callback, module)
    return callback.report


def changes_of(module, monkeypatch):
    """What is said of all layers of a module, by name, and its gradient data, by kind."""
    found = {}

    def rounds(self):
        pairs = self._pairs(0)
        found["changes"] = dict(zip([one.name for one, _ in pairs], self._ways.output_changes(pairs), strict=True))
        loaders = self.objective.loaders
        found["data"] = {kind: [torch.cat(c) for c in zip(*loaders[kind]["train"], strict=True)] for kind in ("forget", "retain")}
        yield pairs

    monkeypatch.setattr(ConceptSearch, "_rounds", rounds)
    forgotten(module)
    return found["changes"], found["data"]


def test_an_output_change_is_what_the_layer_gives_out_differently(monkeypatch):
    """Measured: the layer's own inputs on the retain set through ΔW and through W, for a first-order gain of one."""
    module = trained()
    changes, data = changes_of(trained(), monkeypatch)
    inputs: dict[str, torch.Tensor] = {}
    module.eval()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda m, given, out, name=name: inputs.update({f"{name}.weight": given[0].detach().double()})
            )
    x, y = data["forget"]
    nn.functional.cross_entropy(module.net(x), y).backward()
    module.net(data["retain"][0])
    assert len(changes) == 3
    for name, change in changes.items():
        a, weight = inputs[name], module.get_parameter(name)
        second = a.T @ a / len(a)
        damped = second + 0.1 * second.trace() / len(second) * torch.eye(len(second), dtype=torch.float64)
        g = weight.grad.double()
        d = g @ torch.linalg.inv(damped)
        changed = (a @ (d / (d * g).sum()).T).square().sum()
        assert change == pytest.approx((changed / (a @ weight.detach().double().T).square().sum()).item(), rel=1e-3)


def test_an_output_change_does_not_depend_on_how_outputs_are_scaled(monkeypatch):
    first, _ = changes_of(trained(), monkeypatch)
    module = trained()
    with torch.no_grad():  # behind a ReLU, a factor can move from one layer to the next
        module.net[4].weight *= 8
        module.net[4].bias *= 8
        module.net[6].weight /= 8
    second, _ = changes_of(module, monkeypatch)
    assert second == pytest.approx(first, rel=1e-3) and all(map(math.isfinite, first.values()))


class Wide(Classifier):
    """More layers than are searched at once."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.Linear(12, 12, bias=False) for _ in range(SCREENED)]
        self.net = nn.Sequential(nn.Linear(8, 12), *inner, nn.Linear(12, 4))


@pytest.fixture(scope="module")
def wide():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Wide()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    x, y = blobs().tensors
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.net(x), y).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("evaluations", [10, 1])
def test_layers_that_change_least_of_what_is_retained_come_first_and_the_others_only_if_none_is_feasible(
    wide, monkeypatch, evaluations
):
    asked, own = {}, Ways.output_changes

    def told(self, pairs):
        found = own(self, pairs)
        asked.update({one.name: change for (one, _), change in zip(pairs, found, strict=True)})
        return found

    monkeypatch.setattr(Ways, "output_changes", told)
    report = forgotten(copy.deepcopy(wide), max_evaluations=evaluations)
    first = sorted(asked, key=lambda name: asked[name])[:SCREENED]
    assert len(asked) == SCREENED + 2
    searched = {trial["layer"] for trial in report.trace}
    is_enough = any(t["retain"] and t["constraint_usage"] <= 1 for t in report.trace if t["layer"] in first)
    assert is_enough == (evaluations == 10)
    assert searched == (set(first) if is_enough else asked.keys())


class Deep(Classifier):
    """Two dozen layers, most of which are neither known by their place nor on the front."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.Linear(12, 12, bias=False) for _ in range(22)]
        self.net = nn.Sequential(nn.Linear(8, 12), *inner, nn.Linear(12, 4))


def test_of_a_later_round_with_many_layers_the_best_come_first_as_well():
    callback = unlearn_callback(
        forget=loader(True), retain=loader(False), method=SLUG(max_evaluations=1, max_step=1e-3), retain_tolerance=0.5
    )
    module = Deep()
    fit(callback, module)
    layers = [name for name, p in module.named_parameters() if p.ndim == 2]
    assert callback.report.status == "infeasible"
    assert {trial["layer"] for trial in callback.report.trace} == set(layers)


def test_the_edit_of_a_rough_trial_is_the_one_that_was_measured_whatever_was_found_since():
    """A path bends where the search has bent it, and goes straight from the step that the margin is counted from."""
    world = World({"a": lambda step: 2.0 * (step >= 0.62)}, {None: rows(0.9), "a": rows(0.9)})
    search, (way,) = competition(world, is_contest=True, max_step=2.0, step_margin=0.5)
    bends = []
    way = way._replace(point=lambda at, straight_after=math.inf, own=way.point: bends.append(straight_after) or own(at))
    decision, _ = search.run([way])
    rough = search.smallest[way.key].relative_step
    assert decision.trial.margin == 0.5
    search.refine(decision.trial)
    assert search.smallest[way.key].relative_step < rough
    search.edit(decision.trial)
    assert bends[-1] == rough


@pytest.mark.parametrize("names", ["abcd", "dcba"])
def test_however_many_ways_come_near_each_is_searched_to_its_end_before_none_is_called_feasible(names):
    """Three cost a little too much whatever their step; the fourth comes within bounds at its narrow step."""

    class Four(Costly):
        def validation_step(self, batch, batch_idx):
            name, _ = self.edit()
            if name in ("a", "b", "c") and int(batch[0, 0]) == KEEPING:
                self.log("acc", 0.9 - 1.02 * TOLERANCE)
            else:
                super().validation_step(batch, batch_idx)

    def searched(most):
        world = Four(dict.fromkeys(names, lambda step: 2.0 * (step >= 0.62)), {None: rows(0.9)})
        world.most = most
        search, ways = competition(world, is_contest=True, max_step=2.0)
        return search, search.run(ways)[0].trial

    search, rough = searched(math.inf)
    narrow = search.refine(rough)
    search, found = searched((narrow.relative_step + rough.relative_step) / 2)
    assert found is None
    found = search.refine(None)
    assert found is not None and found.layer == "d"
