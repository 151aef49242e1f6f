"""Gradients along a path of one layer: to the last bit those of whole passes, at the price of what the layer changes."""

from dataclasses import replace
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from _search import context_of
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from _tiny import PlainRunner, trained
from slug_lightning.distributed.backward import Backward
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.targets import Target
from slug_lightning.modules import EmbeddedClip
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.cost import flop_counter
from slug_lightning.tensors.bits import bitwise_equal
from slug_lightning.tensors.layers import find_layers

pytestmark = pytest.mark.uncovered


class Wrapped(pl.LightningModule):
    """A network of 8 inputs and 4 classes."""

    def __init__(self, net, without=()):
        super().__init__()
        self.net, self.without = net, without

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.without else cross_entropy(self.net(batch[0]), batch[1])


def batches(counts=(5, 5, 3)):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, 8, generator=generator), torch.arange(count) % 4) for count in counts]


def context(module, data, replay=True, budget=None, runner=None):
    """A context with one concept, for a module in evaluation mode."""
    torch.manual_seed(0)
    loaders = {kind: dict.fromkeys(("train", "val"), data) for kind in ("forget", "retain")}
    objective = Objective(module.eval(), loaders, runner or PlainRunner(), replay_budget=budget)
    objective.replays = replay
    return context_of(objective, 0.1, [Concept("it", objective, [])], find_layers(module))


def edits_of(layer, count=2):
    generator = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(p.shape, generator=generator) for name, p in layer.parameters.items()}
    return [EditStep(layer, directions, 0.02 * (number + 1)) for number in range(count)]


def along(asked, layers, recorded=True):
    """The gradients at two edits of each layer, and the FLOPs of the second, when everything has been compared."""
    (concept,) = asked.concepts
    found, flops = {}, {}
    with asked.passes.path_recorded(concept, layers if recorded else []):
        for layer in layers:
            first, second = edits_of(layer)
            at_first = asked.gradient("forget", [layer], concept, at=[first])
            with flop_counter() as counter:
                at_second = asked.gradient("forget", [layer], concept, at=[second])
            found[layer.name], flops[layer.name] = (at_first, at_second), counter.get_total_flops()
    return found, flops


def assert_same(found, others):
    assert found.keys() == others.keys()
    for layer, pairs in found.items():
        for ours, plain in zip(pairs, others[layer], strict=True):
            assert all(bitwise_equal(ours[name], plain[name]) for name in plain), layer
            assert any(tensor.any() for tensor in plain.values()), layer


def compared(module, data, layers=None, **options):
    """Both ways along these layers; gives the FLOPs of both, and the replay."""
    asked = context(module, data, **options)
    layers = layers or asked.layers
    plain, whole = along(context(module, data, replay=False), layers)
    found, flops = along(asked, layers)
    assert_same(found, plain)
    (replay,) = asked.objective.replayed
    assert not replay.batches and not asked.objective.gradient_replays
    return flops, whole, replay


def mlp(width=8, depth=4, between=nn.ReLU):
    blocks = [block for _ in range(depth) for block in (nn.Linear(width, width), between())]
    return nn.Sequential(nn.Linear(8, width), *blocks, nn.Linear(width, 4))


def test_the_gradients_of_every_layer_are_the_same_to_the_bit():
    flops, whole, replay = compared(Wrapped(mlp()), batches())
    assert replay.notes() == [] and replay.skipped_calls > 0
    names = list(flops)
    assert flops[names[0]] == whole[names[0]]
    assert [flops[a] > flops[b] for a, b in pairwise(names)] == [True] * (len(names) - 1)


def test_the_last_layer_of_a_deep_network_costs_its_own_part():
    flops, whole, _ = compared(Wrapped(mlp(64, 12)), batches())
    first, *_, last = flops
    assert 40 * flops[last] < whole[last] < whole[first]


@pytest.mark.parametrize("name", ["dropout", "noise", "inplace", "batch norm", "transformer"])
def test_awkward_modules_give_the_same_gradients(name):
    def transformer():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 3)
        return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 8), encoder, nn.Flatten(), nn.Linear(16, 4))

    net = {
        "dropout": lambda: mlp(between=nn.Dropout),
        "noise": lambda: nn.Sequential(nn.Linear(8, 8), Noise(), nn.Linear(8, 8), Noise(), nn.Linear(8, 4)),
        "inplace": lambda: mlp(between=lambda: nn.ReLU(inplace=True)),
        "batch norm": lambda: mlp(between=lambda: nn.BatchNorm1d(8)),
        "transformer": transformer,
    }[name]
    _, _, replay = compared(Wrapped(net()), batches())
    assert replay.skipped_calls > 0 and replay.notes() == []


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Writing(nn.Module):
    """Writes into what its first layer gave, but only where that is in no graph and the last layer's is."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.first(x)
        if self.last.weight.requires_grad:
            hidden += 1
        return self.last(hidden)


def test_what_is_written_to_only_in_a_gradient_pass_is_noticed():
    module = Wrapped(Writing())
    layers = find_layers(module, "net.last.weight")
    _, _, replay = compared(module, batches(), layers)
    assert "net.last.weight computed whole in every gradient pass" in replay.notes()[0]


class Checkpointed(nn.Module):
    """In its backward pass it computes a block again, of whose two layers one could have been skipped."""

    def __init__(self):
        super().__init__()
        self.front, self.block, self.last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(checkpoint(self.block, self.front(x), use_reentrant=False))


def test_a_checkpoint_computes_again_what_its_forward_pass_was_spared():
    _, _, replay = compared(Wrapped(Checkpointed()), batches())
    assert replay.notes() == [] and replay.skipped_calls > 0


class Halving(GradScaler):
    """Counts how often the scale was too large."""

    halved = 0

    def update(self, new_scale=None):
        self.halved += 1
        super().update(new_scale)


def test_a_batch_whose_gradient_overflows_is_replayed_again():
    scalers = []

    def scaled():
        runner = PlainRunner()
        scalers.append(Halving("cpu", init_scale=2.0**127))
        runner.backward = Backward(runner.processes, scalers[-1])
        return runner

    module, data = Wrapped(mlp()), [(300 * x, y) for x, y in batches()]
    plain, _ = along(context(module, data, replay=False, runner=scaled()), find_layers(module))
    asked = context(module, data, runner=scaled())
    found, _ = along(asked, find_layers(module))
    assert_same(found, plain)
    assert scalers[0].halved == scalers[1].halved > 0 and asked.objective.replayed[0].notes() == []


@pytest.mark.parametrize("without", [(0,), (1,), (0, 2)])
def test_a_batch_without_a_loss_is_left_out(without):
    _, _, replay = compared(Wrapped(mlp(), without), batches())
    assert replay.notes() == [] and replay.skipped_calls > 0


def test_a_set_without_any_loss_is_refused_as_ever():
    asked = context(Wrapped(mlp(), (0, 1, 2)), batches())
    (concept,), layer = asked.concepts, asked.layers[-1]
    with asked.passes.path_recorded(concept, [layer]), pytest.raises(Exception, match="no loss for any batch"):
        asked.gradient("forget", [layer], concept, at=edits_of(layer, 1))


class Logging(Wrapped):
    def __init__(self):
        super().__init__(mlp())
        self.register_buffer("calls", torch.zeros(()))

    def forget_step(self, batch, batch_idx):
        loss = self.training_step(batch, batch_idx)
        self.calls += 1
        self.log("loss", loss + 7)
        return loss


def test_nothing_that_is_logged_or_counted_while_recording_stays():
    module = Logging()
    asked = context(module, batches())
    before = asked.objective.measured("forget", "val")
    own = set(vars(module))
    module.calls.zero_()
    with asked.passes.path_recorded(asked.concepts[0], asked.layers):
        assert module.calls == 0
    assert set(vars(module)) == own and all(p.requires_grad and p.grad is None for p in module.parameters())
    compared(Logging(), batches())
    assert asked.objective.measured("forget", "val") == before


@pytest.mark.parametrize("budget", [0, 200])
def test_a_small_budget_is_slower_and_never_wrong(budget):
    _, _, replay = compared(Wrapped(mlp()), batches(), budget=budget)
    assert replay.over_budget > 0 and replay.most_held <= 2 * budget and "replay_budget" in replay.notes()[-1]


def test_a_compiled_part_is_computed_whole_and_costs_no_recording():
    module = Wrapped(nn.Sequential(torch.compile(nn.Linear(8, 8), backend="aot_eager"), nn.Linear(8, 4)))
    asked = context(module, batches())
    with asked.passes.path_recorded(asked.concepts[0], asked.layers):
        assert asked.objective.forward_samples == 0
    assert "compiled" in asked.objective.replayed[0].notes()[0]


def test_without_replay_nothing_is_recorded():
    asked = context(Wrapped(mlp()), batches(), replay=False)
    with asked.passes.path_recorded(asked.concepts[0], asked.layers):
        pass
    assert asked.objective.replayed == [] and asked.objective.forward_samples == 0


def test_among_other_edits_than_while_recording_a_gradient_is_computed_whole():
    asked = context(Wrapped(mlp()), batches())
    (concept,), (first, *_, last) = asked.concepts, asked.layers
    (other,), (edit,) = edits_of(first, 1), edits_of(last, 1)
    outside = asked.gradient("forget", [last], concept, at=[edit])
    plain = asked.gradient("forget", [last], concept, at=[other, edit])
    with asked.passes.path_recorded(concept, asked.layers):
        several = asked.gradient("forget", [last], concept, at=[other, edit])
        with asked.edits.applied(other):
            around = asked.gradient("forget", [last], concept, at=[edit])
        assert asked.objective.replayed[0].skipped_calls == 0
    with asked.passes.path_recorded(concept, [first]):
        unknown = asked.gradient("forget", [last], concept, at=[edit])
        assert asked.objective.replayed[1].skipped_calls == 0
    assert all(bitwise_equal(unknown[name], tensor) for name, tensor in outside.items())
    with asked.edits.applied(other), asked.passes.path_recorded(concept, asked.layers):
        within = asked.gradient("forget", [last], concept, at=[edit])
    assert asked.objective.replayed[2].skipped_calls > 0
    for found in (several, around, within):
        assert all(bitwise_equal(found[name], tensor) for name, tensor in plain.items())


def test_a_recording_of_evaluations_and_one_of_gradients_go_together():
    module = trained()
    asked = context(module, batches())
    asked.objective.measured("forget", "val")
    concept, layer = (
        replace(asked.concepts[0], targets=[Target(asked.objective.metrics["loss"], 0.0, "given", 1.0)]),
        asked.layers[-1],
    )
    edit, gradients, trials = edits_of(layer, 1)[0], [], []
    for is_on in (False, True):
        asked.objective.replays = is_on
        with asked.evaluator(concept, asked.layers) as evaluate, asked.passes.path_recorded(concept, asked.layers):
            for _ in range(2):
                trials.append(evaluate(edit, 0.1))
                gradients.append(asked.gradient("forget", [layer], concept, at=[edit]))
    assert trials[1:] == trials[:-1]
    assert all(bitwise_equal(one[name], gradients[0][name]) for one in gradients for name in one)


# ---- the embedded CLIP


def pictures():
    generator = torch.Generator().manual_seed(0)
    module = EmbeddedClip()
    size, length = module.model.visual.image_size, module.model.context_length
    size = size if isinstance(size, tuple) else (size, size)
    data = [
        {"image": torch.randn(4, 3, *size, generator=generator), "text": torch.randint(1, 40, (4, length), generator=generator)}
        for _ in range(2)
    ]
    return module, data


def test_of_a_clip_the_other_tower_and_what_is_in_front_of_a_layer_cost_nothing():
    module, data = pictures()
    every = find_layers(module)
    vision = [layer for layer in every if layer.name.startswith("model.vis") and "mlp.c_proj" in layer.name]
    text = [layer for layer in every if not layer.name.startswith("model.vis") and "mlp.c_proj" in layer.name]
    chosen = [vision[0], vision[-1], text[0], text[-1]]
    flops, whole, replay = compared(module, data, chosen)
    assert replay.notes() == []
    assert 4 * flops[vision[-1].name] < flops[vision[0].name] < whole[vision[0].name]
    assert 4 * flops[text[-1].name] < flops[text[0].name] < whole[text[0].name]
