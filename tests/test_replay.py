"""Replay: equal to the last bit where it works, and plain where it cannot."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from _tiny import CLASSES, Classifier, blobs, fit, loader, snapshot
from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.layers import find_layers
from slug_lightning.replay import Replay
from slug_lightning.steps import Attempt

torch.manual_seed(0)


class Twice(nn.Module):
    """A shared submodule, called before and behind another layer."""

    def __init__(self):
        super().__init__()
        self.shared, self.between, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.shared(self.between(self.shared(x)).relu()))


class Tuple(nn.Module):
    """A block gives a tuple with None, and one output that nobody reads."""

    def __init__(self):
        super().__init__()
        self.block, self.last = TupleBlock(), nn.Linear(8, 4)

    def forward(self, x):
        hidden, nothing, _ = self.block(x, scale=2.0)
        assert nothing is None
        return self.last(hidden)


class TupleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, *, scale):
        return self.second(self.first(x).tanh() * scale), None, self.first(x)


class Dict(nn.Module):
    """A tower's dict is written into by its caller, as transformers' CLIPModel does."""

    def __init__(self):
        super().__init__()
        self.tower, self.last = DictTower(), nn.Linear(8, 4)

    def forward(self, x):
        out = self.tower(x=x)
        out["pooled"] = self.last(out["pooled"])
        return out["pooled"]


class DictTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.layer(x)
        return {"pooled": hidden.relu(), "name": "tower", "hidden": hidden}


@dataclass
class Opaque:
    value: torch.Tensor
    name: str = "opaque"


class NotATensor(nn.Module):
    """An output of a class of its own, which nobody can look into."""

    def __init__(self):
        super().__init__()
        self.first, self.last = OpaqueBlock(), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x).value)


class OpaqueBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return Opaque(self.layer(x).relu())


class Counting(nn.Module):
    """Counts its calls in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("buffer", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.buffer += 1
        return self.last(self.first(x).relu())


class CountingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.last = Counting(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.block(x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x):
        hidden = self.first(x)
        return self.last(checkpoint(self.second, hidden, use_reentrant=self.reentrant).tanh())


class Overwriting(nn.Module):
    """In-place operations on what a module has returned, by modules and by the code between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)
        self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.act(self.norm(self.first(x)))
        shortcut = hidden
        hidden = self.second(hidden)
        shortcut += hidden
        return self.last(shortcut)


class ReadAfterwards(nn.Module):
    """Reads an output, lets a module overwrite it, and reads it again."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second, self.last = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.first(x)
        other = self.second(hidden)
        self.act(hidden)
        return self.last(hidden + other)


class Detached(nn.Module):
    """No gradient says that the codes depend on the first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.codes, self.last = nn.Linear(8, 8), nn.Embedding(8, 8), nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.first(x)
        with torch.no_grad():
            code = self.codes(hidden.detach().argmax(1))
        return self.last(torch.cat([hidden, code], 1))


class Deciding(nn.Module):
    """Which branch is computed depends on a number that has left the tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        branch = self.left if self.first(x).sum().tolist() > 0 else self.right
        return self.last(branch(x) + self.first(x))


class Remembering(nn.Module):
    """Hands a value on by an attribute, past the output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = Keeper(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(self.second(hidden) + self.first.layer.before)


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Storing()

    def forward(self, x):
        return self.layer(x).relu()


class Storing(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x):
        self.before = super().forward(x) * 1
        return self.before * 2


class Noisy(nn.Module):
    """Random numbers in front of the last layer, and dropout, which evaluation mode switches off."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.last(self.drop(hidden) + 0.01 * torch.randn_like(hidden))


class Caching(nn.Module):
    """Remembers what it computed of the first batch, for all others."""

    def __init__(self):
        super().__init__()
        self.prompts, self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.remembered = None

    def forward(self, x):
        if len(x) == 5 and self.remembered is None:
            self.remembered = self.prompts(torch.ones(1, 8))
        out = self.last(x + self.first(self.remembered))
        if len(x) == 3:  # the last batch
            self.remembered = None
        return out


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16, 4)
    )


ZOO = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4)),
    "twice": Twice,
    "tuple": Tuple,
    "dict": Dict,
    "not a tensor": NotATensor,
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 4)),
    "counting": Counting,
    "counting block": CountingBlock,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "compiled": lambda: nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8), backend="aot_eager"), nn.Linear(8, 4)),
    "overwriting": Overwriting,
    "read afterwards": ReadAfterwards,
    "detached": Detached,
    "deciding": Deciding,
    "remembering": Remembering,
    "noisy": Noisy,
    "caching": Caching,
    "transformer": transformer,
}


def steps_of(net, layer):
    """Two different edits of a layer."""
    for factor in (1.5, -0.7):
        yield {name: p.detach() * factor + 0.01 for name, p in layer.parameters.items()}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("name", ZOO)
def test_replayed_outputs_have_the_bits_of_a_plain_forward(name):
    torch.manual_seed(1)
    net = ZOO[name]().eval()
    own = {name for name, m in net.named_modules() if "forward" in vars(m)}  # torch.compile sets one
    batches = [torch.randn(count, 8) for count in (5, 5, 3)]
    layers = find_layers(net)
    replay = Replay(net, layers)
    seen = []
    with torch.no_grad():
        for number, x in enumerate(batches):
            torch.manual_seed(number)
            replay.record(("step",), number, x, Attempt(net, lambda x=x: seen.append(net(x) * 1)), list(replay.layers))
        for layer in layers:
            for edit in steps_of(net, layer):
                before = {key: p.clone() for key, p in layer.parameters.items()}
                for key, p in layer.parameters.items():
                    p.copy_(edit[key])
                plain = []
                for number, x in enumerate(batches):
                    torch.manual_seed(number)
                    plain.append(net(x))
                for number, x in enumerate(batches):
                    torch.manual_seed(number)
                    replay.evaluate(("step",), number, x, Attempt(net, lambda x=x: seen.append(net(x) * 1)), layer.name)
                    assert torch.equal(seen[-1], plain[number]), (layer.name, number)
                for key, p in layer.parameters.items():
                    p.copy_(before[key])
    assert {name for name, m in net.named_modules() if "forward" in vars(m)} == own
    # Where code reads what has gone past an output, or random numbers move, nothing may be left out.
    print(name, replay.skipped_calls, replay.notes())


class Awkward(Classifier):
    """Learns the blobs with a member of the zoo."""

    def __init__(self, name):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = ZOO[name]()
            x, y = blobs().tensors
            optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
            for _ in range(40):
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.net(x), y).backward()
                optimizer.step()


TRAINABLE = sorted(ZOO.keys() - {"overwriting", "read afterwards", "caching"})  # autograd refuses the first two


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("options", [{}, {"forget_metric": "val_acc", "forget_target": 1 / CLASSES, "retain_metric": "val_acc"}])
@pytest.mark.parametrize("name", TRAINABLE)
def test_layer_step_and_weights_are_the_same_with_and_without_replay(name, options):
    found = []
    for more in ({"replay": False}, {}, {"replay_budget": 1000}):
        model = Awkward(name)
        forgetting = UnlearnCallback(forget=loader(True), retain=loader(False), retain_tolerance=0.3, **options, **more)
        fit(forgetting, model)
        report = forgetting.report
        weights = {key: value for key, value in snapshot(model).items() if not key.endswith("buffer")}
        found.append((report.status, report.layer, report.step_size, report.trace, report.before, report.after, weights))
    for one in found[1:]:
        assert one[:-1] == found[0][:-1]
        assert all(torch.equal(one[-1][key], value) for key, value in found[0][-1].items())
