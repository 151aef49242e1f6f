"""The report of a run that made a language model forget passages: plain data -> JSON, tables, figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from slug_lightning.reports.base import Report, number, table
from slug_lightning.reports.figures import TITLES, Values, forgetting_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class PassagesReport(Report):
    """The outcome of a run over passages.

    Attributes:
        status: "unlearned" where the stopping rule ended the training; "unfinished" where the epochs ended before.
        method: name of the loss.
        reason: what ended the training, in words.
        thresholds: at or below which the mean of a metric stops the training, by name.
        bounds: at or below which a passage counts as forgotten, by criterion.
        decided: names of the metrics that decided when to stop.
        passages: of each passage to forget: `number`, `remembered`, `epochs` trained, `returns`, `values` by criterion at the
            end, metrics `before` and `after`.
        trace: before the first and after each epoch: `epoch`, `step`, how many passages were `trained` and how many are
            `remembered`, means of the metrics over all passages (`extraction_likelihood` from some prefixes, which decides;
            `before` and `after` have it from all), `other_perplexity` on the retain set's validation split.
        before: means by set of texts ("forget", "unseen", "other": the retain set's test split) and metric, of the original.
        after: the same of the trained model.
        samples: completions of some passages: `prompt`, `truth`, `before`, `after`.
        cost: `seconds` by phase ("training", "validation" in and after each epoch, "report"), the ratio of validation to
            training, bytes of the `reference`, how many passages were trained on in all epochs.
        notes: decisions made during the run.
        versions: of the libraries.

    Example:
        >>> report = PassagesReport("unlearned", "ICU")
        >>> PassagesReport.from_dict(report.to_dict()) == report
        True
    """

    status: Literal["unlearned", "unfinished"]
    method: str
    reason: str = ""
    thresholds: Values = field(default_factory=dict)
    bounds: Values = field(default_factory=dict)
    decided: list[str] = field(default_factory=list)
    passages: list[dict[str, Any]] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Values] = field(default_factory=dict)
    after: dict[str, Values] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def _shown(self, width: int) -> Iterator[Table | str]:
        columns = ("texts", "metric", "before", "after", "bound")
        metrics = table(f"{self.method}: {self.status}", columns, words=2, bold=True)
        for texts, values in self.before.items():
            for name, value in values.items():
                bound = f"≤ {number(self.thresholds[name])}" if texts == "forget" and name in self.decided else ""
                if bound:
                    bound += f" (judged: {number(self.trace[-1].get(name))})"
                metrics.add_row(texts, TITLES.get(name, name), number(value), number(self.after[texts][name]), bound)
        yield metrics
        left = sum(passage["remembered"] for passage in self.passages)
        returned = sum(passage["returns"] for passage in self.passages)
        yield f"{self.reason}; {left} of {len(self.passages)} passages still remembered, {returned} had come back"
        yield from self._cost_and_notes(len(self.trace), width)

    def figures(self) -> dict[str, Figure]:
        """Figures of the run: "forgetting", the metrics over the epochs with their thresholds."""
        return {"forgetting": forgetting_figure(self.trace, self.bounds | self.thresholds)}


def samples_table(samples: list[dict[str, str]]) -> str:
    """Completions before and after, as a Markdown table."""
    rows = ["| prompt (its end) | truth | before | after |", "|---|---|---|---|"]
    for sample in samples:
        cells = (sample["prompt"][-80:], *(sample[name] for name in ("truth", "before", "after")))
        rows.append("| " + " | ".join(cell.replace("|", "¦").replace("\n", "⏎").strip() for cell in cells) + " |")
    return "\n".join(rows)
