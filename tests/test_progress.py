"""Every kind of bar hands on every item and follows the trainer's own bar."""

from __future__ import annotations

import pytest
import rich.progress
import tqdm.auto
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_utilities.core import rank_zero

from slug_lightning.utils.progress import Progress


def disabled():
    bar = TQDMProgressBar()
    bar.disable()
    return bar


BARS = {
    "rich": (RichProgressBar, "rich"),
    "tqdm": (TQDMProgressBar, "tqdm"),
    "none": (lambda: None, None),
    "off": (disabled, None),
    "refresh rate zero": (lambda: RichProgressBar(refresh_rate=0), None),
}
every_bar = pytest.mark.parametrize(("make", "kind"), BARS.values(), ids=BARS.keys())


@every_bar
def test_the_kind_follows_the_trainers_bar(make, kind):
    assert Progress(make()).kind == kind


@every_bar
@pytest.mark.parametrize("items", [[], [1, 2, 3]])
def test_every_item_arrives_in_order_with_and_without_a_length(make, kind, items):
    progress = Progress(make())
    assert list(progress.track(items, "reading")) == items
    assert list(progress.track(iter(items), "reading")) == items


@every_bar
def test_a_bar_may_be_shown_within_another(make, kind):
    progress = Progress(make())
    with progress.bar("search", 2) as advance:
        for _ in range(2):
            assert list(progress.track(range(3), "evaluating")) == [0, 1, 2]
            progress.say("one more")
            advance()


@every_bar
def test_leaving_early_or_failing_closes_the_bar(make, kind):
    progress = Progress(make())
    items = progress.track(range(3), "reading")
    assert next(items) == 0
    items.close()

    with pytest.raises(ValueError, match="mine"), progress.bar("search", 2):
        raise ValueError("mine")
    assert list(progress.track(range(2), "again")) == [0, 1]


def test_rich_advances_by_one_an_item_towards_the_length(monkeypatch):
    seen = []
    original = rich.progress.Progress.advance

    def advance(self, task_id, advance=1):
        original(self, task_id, advance)
        seen.append((self.tasks[0].description, self.tasks[0].completed, self.tasks[0].total))

    monkeypatch.setattr(rich.progress.Progress, "advance", advance)
    list(Progress(RichProgressBar()).track([5, 6], "reading"))
    assert seen == [("reading", 1, 2), ("reading", 2, 2)]


def test_tqdm_advances_by_one_an_item_towards_the_length(monkeypatch):
    seen = []

    class Recorded(tqdm.auto.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.desc, self.n, self.total))

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorded)
    list(Progress(TQDMProgressBar()).track([5, 6], "reading"))
    assert seen == [("reading", 1, 2), ("reading", 2, 2)]


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_with_a_bar_a_line_is_printed(bar, capsys):
    Progress(bar()).say("b.weight: found [it]")
    assert "b.weight: found [it]" in capsys.readouterr().out


def test_without_a_bar_a_line_is_logged(monkeypatch, capsys):
    records = []
    # Of which package of Lightning it is depends on which was imported last.
    monkeypatch.setattr(rank_zero.log, "handle", lambda record: records.append(record.getMessage()))
    Progress(None).say("b.weight: found")
    assert records == ["b.weight: found"]
    assert capsys.readouterr().out == ""
