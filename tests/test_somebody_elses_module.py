"""A LightningModule that Lightning itself ships, unchanged: nothing but the callback is added."""

import lightning.pytorch as pl
import pytest
import torch
from _callback import unlearn_callback
from lightning.pytorch.demos.transformer import LightningTransformer
from torch.utils.data import DataLoader, Subset, TensorDataset

pytestmark = pytest.mark.uncovered

WORDS, LENGTH, CLASSES = 24, 8, 4


def sentences() -> TensorDataset:
    """Four classes of sentence: each goes round in six words of its own, so the next word is sure once it is known."""
    start = torch.arange(6).repeat(CLASSES * 6)
    kind = torch.arange(CLASSES).repeat_interleave(36)
    words = (start[:, None] + torch.arange(LENGTH + 1)) % 6 + 6 * kind[:, None]
    return TensorDataset(words[:, :-1].contiguous(), words[:, 1:].contiguous())


def part(data: TensorDataset, kind: int, is_kind: bool) -> Subset:
    return Subset(data, ((data.tensors[0][:, 0] // 6 == kind) == is_kind).nonzero()[:, 0].tolist())


@pytest.fixture(scope="module")
def knowing():
    torch.manual_seed(0)
    model = LightningTransformer(vocab_size=WORDS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    once = torch.arange(CLASSES * 36) % 36 < 6  # of each sentence there are six
    inputs, target = (words[once] for words in sentences().tensors)
    for _ in range(40):
        optimizer.zero_grad()
        model.training_step((inputs, target), 0).backward()
        optimizer.step()
    return model


def next_words_right(model: LightningTransformer, data: Subset) -> float:
    inputs, target = next(iter(DataLoader(data, batch_size=len(data))))
    model.eval()
    with torch.no_grad():
        found = (model(inputs, target).argmax(-1).view(-1) == target.view(-1)).float().mean().item()
    model.train()
    return found


def test_a_module_of_lightnings_demos_forgets_a_class_with_nothing_but_the_callback(knowing, monkeypatch):
    monkeypatch.setattr(LightningTransformer, "prepare_data", lambda _: None)  # it would download a corpus
    data, kind = sentences(), 1
    before = {name: tensor.clone() for name, tensor in knowing.state_dict().items()}
    assert next_words_right(knowing, part(data, kind, True)) >= 0.95
    assert next_words_right(knowing, part(data, kind, False)) >= 0.95
    forget, retain = (DataLoader(part(data, kind, is_kind), batch_size=12) for is_kind in (True, False))

    callback = unlearn_callback(forget=forget, retain=retain)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(knowing, retain)

    print(callback.report.to_text())
    assert callback.report.status == "unlearned" and callback.report.holds
    assert next_words_right(knowing, part(data, kind, True)) <= 1 / 6 + 1e-6  # as guessing among the class's words
    assert next_words_right(knowing, part(data, kind, False)) >= 0.95
    assert {n for n, t in knowing.state_dict().items() if not torch.equal(t, before[n])} == set(callback.report.tensors)
