"""The sampler of what is active: each once, in batches that no process has empty, and what Lightning makes of it."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from _amounts import examples
from _processes import in_processes
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from slug_lightning.datamodules.text.passages import ActiveSampler

COUNT = 60
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

cases = given(
    active=st.lists(st.integers(0, COUNT - 1), unique=True),
    world=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)


def batches(active, batch_size, world=1, rank=0, seed=0, epoch=0) -> list[list[tuple[int, float]]]:
    """What one process' loader serves in an epoch."""
    sampler = ActiveSampler(range(COUNT), lambda: active, batch_size=batch_size, num_replicas=world, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    loader = DataLoader(Drawn(), batch_size=batch_size, sampler=sampler, collate_fn=list)
    served = list(loader)
    assert len(served) == len(loader)
    assert sum(map(len, served)) == len(sampler)
    return served


class Drawn(Dataset):
    """What the sampler draws, as it is."""

    def __len__(self):
        return COUNT

    def __getitem__(self, drawn):
        return drawn


@examples(150)
@cases
def test_each_active_sample_counts_once_over_all_processes_and_no_batch_is_empty(active, world, batch_size, seed, epoch):
    shares = [batches(active, batch_size, world, rank, seed, epoch) for rank in range(world)]
    drawn = [sample for share in shares for batch in share for sample in batch]
    assert sorted(index for index, weight in drawn if weight) == sorted(active)
    assert {index for index, _ in drawn} == set(active)  # stand-ins, too, are active
    assert len({len(share) for share in shares}) == 1
    for together in zip(*shares, strict=True):
        assert len({len(batch) for batch in together}) == 1 and all(together)
        weights = [weight for batch in together for _, weight in batch if weight]
        # Averaged over processes, as DDP does: the mean over the samples that count.
        assert weights == pytest.approx([world / len(weights)] * len(weights))
        assert len(weights) > world * (len(together[0]) - 1)  # no more stand-ins than it takes


@examples(100)
@cases
def test_the_batches_of_all_processes_are_those_of_one_that_serves_as_many(active, world, batch_size, seed, epoch):
    alone = batches(active, batch_size * world, 1, 0, seed, epoch)
    shares = [batches(active, batch_size, world, rank, seed, epoch) for rank in range(world)]
    for one, together in zip(alone, zip(*shares, strict=True), strict=True):
        in_turn = [sample for places in zip(*together, strict=True) for sample in places]
        assert [index for index, weight in in_turn if weight] == [index for index, _ in one]


def test_the_order_is_of_the_seed_and_the_epoch_alone():
    def order(active, seed=0, epoch=0):
        sampler = ActiveSampler(range(COUNT), lambda: active, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return [index for index, _ in sampler]

    state = torch.get_rng_state()
    ascending = list(range(30))
    first = order(ascending)
    assert first == order(ascending[::-1]) == order(ascending)
    assert len({tuple(order(ascending, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_active_is_asked_for_anew():
    active = [3, 5, 8]
    sampler = ActiveSampler(range(10), lambda: active, batch_size=2)
    assert len(sampler) == 3
    active = [1]
    assert (len(sampler), list(sampler)) == (1, [(1, 1.0)])
    active = []
    assert (len(sampler), list(sampler)) == (0, [])


# ---- in a Trainer


class Seen(pl.LightningModule):
    """Notes what it is served, the epoch in which, the samplers and the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.served: list[list[tuple[int, float]]] = []
        self.samplers: list[tuple[type, int]] = []
        self.steps: list[int] = []
        self.validated = 0

    def on_train_epoch_start(self):
        self.served.append([])
        self.steps.append(0)

    def training_step(self, batch, batch_idx):
        self.served[-1] += batch
        sampler = self.trainer.train_dataloader.sampler
        self.samplers.append((type(sampler), sampler.epoch))
        return self.weight * sum(weight for _, weight in batch)

    def optimizer_step(self, *args, **options):
        self.steps[-1] += 1
        super().optimizer_step(*args, **options)

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size
        self.active = list(range(COUNT))

    def train_dataloader(self):
        share = self.trainer.distributed_sampler_kwargs or {}
        sampler = ActiveSampler(Drawn(), lambda: self.active, batch_size=self.batch_size, **share)
        return DataLoader(Drawn(), batch_size=self.batch_size, sampler=sampler, collate_fn=list)

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))


class Plan(pl.Callback):
    """What is active after each epoch."""

    def __init__(self, *plan):
        self.plan = plan

    def setup(self, trainer, pl_module, stage):
        trainer.reload_dataloaders_every_n_epochs = 1

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.datamodule.active = list(self.plan[trainer.current_epoch])


class Unreloaded(Plan):
    def setup(self, trainer, pl_module, stage):
        """Leave the trainer as it is."""


PLAN = (range(5), range(20, 60), [], [7], range(COUNT), [])


def fitted(callback: Plan, **options) -> Seen:
    module = Seen()
    options = {"accelerator": "cpu", "max_epochs": 6, "num_sanity_val_steps": 0, **SILENT, **options}
    pl.Trainer(callbacks=[callback], **options).fit(module, datamodule=Data(4))
    return module


def in_two() -> tuple:
    module = fitted(Unreloaded(*PLAN), devices=2, strategy="ddp", use_distributed_sampler=True)
    return module.served, module.samplers, module.weight.item()


@pytest.mark.filterwarnings("ignore:.*returned 0 length")
def test_lightning_leaves_the_sampler_and_tells_it_the_epoch_in_two_processes():
    shares = in_processes(2, in_two)
    assert all(isinstance(share, tuple) for share in shares), shares
    for epoch, active in enumerate([range(COUNT), *PLAN[:-1]]):
        drawn = [sample for served, _, _ in shares for sample in served[epoch]]
        assert sorted(index for index, weight in drawn if weight) == list(active), epoch
    (_, samplers, weight), (_, others, other) = shares
    assert samplers == others
    assert {kind for kind, _ in samplers} == {ActiveSampler}
    assert {epoch for _, epoch in samplers} == {0, 1, 2, 4, 5}  # there was nothing to do in 3
    assert weight == other == pytest.approx(-(8 + 1 + 5 + 1 + 8))  # a step of 1 for each batch, whatever its size


@pytest.mark.filterwarnings("ignore:.*returned 0 length")
@pytest.mark.parametrize("kind", [Plan, Unreloaded])
def test_epochs_that_shrink_and_grow_are_served_whole_with_a_step_for_the_last_window(kind):
    plan = (range(5), range(20, 60), [7], range(COUNT), range(9), [])
    module = fitted(kind(*plan), accumulate_grad_batches=2)
    served = [sorted(index for index, _ in epoch) for epoch in module.served]
    assert served == [list(active) for active in (range(COUNT), *plan[:-1])]
    assert module.steps == [8, 1, 5, 1, 8, 2]  # of 15, 2, 10, 1, 15 and 3 batches
    # Lightning validates after as many batches as it counted when it loaded the loader.
    assert module.validated == (6 if kind is Plan else 2)


def test_what_is_active_at_a_resumed_run_s_start_does_not_bound_later_epochs_if_loaders_are_reloaded():
    for kind, expected in ((Plan, [[2], list(range(9))]), (Unreloaded, [[2], [0, 1, 2, 3]])):
        data, module = Data(4), Seen()
        data.active = [2]
        callback = kind(range(9), [])
        pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], num_sanity_val_steps=0, **SILENT).fit(module, data)
        served = [sorted(index for index, _ in epoch) for epoch in module.served]
        assert [len(epoch) for epoch in served] == [len(epoch) for epoch in expected]
        if kind is Plan:
            assert served == expected
