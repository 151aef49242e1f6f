"""The report of a run that made a language model forget passages: plain data -> JSON, tables, figures."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from slug_lightning.reports.figures import TITLES, Values, forgetting_figure
from slug_lightning.reports.json_file import JsonFile
from slug_lightning.reports.single import closing_lines, console_of, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class PassagesReport(JsonFile):
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PassagesReport:
        """The inverse of `to_dict`; what a newer version added is left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def to_text(self, width: int = 100) -> str:
        """The closing table, as text of at most `width` columns."""
        from rich.table import Table

        table = Table(title=f"{self.method}: {self.status}", title_justify="left", title_style="bold")
        for column in ("texts", "metric", "before", "after", "bound"):
            table.add_column(column, justify="left" if column in ("texts", "metric") else "right")
        for texts, values in self.before.items():
            for name, value in values.items():
                bound = f"≤ {number(self.thresholds[name])}" if texts == "forget" and name in self.decided else ""
                if bound:
                    bound += f" (judged: {number(self.trace[-1].get(name))})"
                table.add_row(texts, TITLES.get(name, name), number(value), number(self.after[texts][name]), bound)
        stream = io.StringIO()
        console = console_of(stream, width)
        console.print(table)
        left = sum(passage["remembered"] for passage in self.passages)
        returned = sum(passage["returns"] for passage in self.passages)
        console.print(f"{self.reason}; {left} of {len(self.passages)} passages still remembered, {returned} had come back")
        closing_lines(console, len(self.trace), self.cost, self.notes, width)
        return stream.getvalue().rstrip("\n")

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
