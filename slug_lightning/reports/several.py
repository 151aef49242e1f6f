"""The evidence of a run that forgot several concepts: a report for each, and what their edits do together."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from slug_lightning.objective.metrics import Metric
from slug_lightning.objective.samples import Gallery
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.figures import SHOWN, Values, collateral_figure, sample_figures
from slug_lightning.reports.json_file import JsonFile, renamed
from slug_lightning.reports.single import (
    NOT_PLAIN,
    UnlearnReport,
    closing_lines,
    console_of,
    number,
)
from slug_lightning.utils.names import file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class JointReport(JsonFile):
    """Everything that a run over several concepts found out.

    Attributes:
        status: "unlearned", "partly" where some concepts had to be left out, or "infeasible" where nothing was edited.
        concepts: the report of each, by name; `before` and `after` are measured with all edits together.
        rounds: every measurement of all edits together on the validation split: `forget` by concept, `retain`,
            `constraint_usage` (1 is the tolerance), `remembered`, and the `change` that was made: what was traded for what.
        collateral: by edit, then by concept, the concept's forget metric on the validation split under that edit alone.
        before: on the test split, `{"forget": {concept: value}, "retain": {metric: value}}`.
        after: the same with all edits; without the concepts that an earlier run has forgotten: of these, `concepts` has what
            was measured there on the test split, and now on the validation split (`search_after`).
        holds: whether all bounds of what was forgotten hold on the test split as well; None where nothing was edited.
        cost: as in `UnlearnReport`, of the whole run.
        notes: what was decided on the way.
        versions: of the libraries.
        patch_digest: of the combined patch.
        patch: all edits; the patch of each concept is in its own report.
        gallery: of a generator, pictures of "retain" data before and after; those of each concept are in its own report.

    Example:
        >>> report = JointReport("infeasible", {"cats": UnlearnReport("infeasible", "cats")})
        >>> JointReport.from_dict(report.to_dict()) == report
        True
    """

    status: Literal["unlearned", "partly", "infeasible"]
    concepts: dict[str, UnlearnReport]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    collateral: dict[str, Values] = field(default_factory=dict)
    before: dict[str, Values] = field(default_factory=dict)
    after: dict[str, Values] = field(default_factory=dict)
    holds: bool | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    patch_digest: str | None = None
    patch: UnlearnPatch | None = field(default=None, repr=False, compare=False)
    gallery: dict[str, Gallery] = field(default_factory=dict, repr=False, compare=False)

    @property
    def concept(self) -> str:
        """All names, in words."""
        return ", ".join(self.concepts)

    @property
    def unlearned(self) -> dict[str, UnlearnReport]:
        """The reports of the concepts that were unlearned."""
        return {name: report for name, report in self.concepts.items() if report.status == "unlearned"}

    @property
    def layer(self) -> str | None:
        """The edited layers, in words."""
        return ", ".join(dict.fromkeys(str(report.layer) for report in self.unlearned.values())) or None

    @property
    def tensors(self) -> list[str]:
        """Names of the edited tensors."""
        return list(dict.fromkeys(name for report in self.unlearned.values() for name in report.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without patches and galleries."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"concepts", *NOT_PLAIN}}
        return own | {"concepts": {name: report.to_dict() for name, report in self.concepts.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> JointReport:
        """The inverse of `to_dict`; what a newer version added is left out."""
        known = {f.name for f in fields(cls)} - {"concepts", *NOT_PLAIN}
        concepts = {name: UnlearnReport.from_dict(report) for name, report in data["concepts"].items()}
        rounds = renamed(data.get("rounds", []))
        return cls(concepts=concepts, **{name: value for name, value in data.items() if name in known} | {"rounds": rounds})

    def to_text(self, width: int = 100) -> str:
        """The closing tables, as text of at most `width` columns."""
        stream = io.StringIO()
        console = console_of(stream, width)
        console.print(self._concept_table())
        console.print(self._retain_table())
        if 1 < len(self.collateral) <= SHOWN:
            console.print(self._collateral_table())
        for found in self.rounds:
            if found["change"]:
                console.print(f"together, constraint usage {number(found['constraint_usage'])}: {found['change']}")
        closing_lines(console, self.cost.get("evaluations", 0), self.cost, self.notes, width)
        console.print(self._verdict())
        return stream.getvalue().rstrip("\n")

    def _concept_table(self) -> Any:
        from rich.table import Table

        title = f"{len(self.unlearned)} of {len(self.concepts)} concepts unlearned: {self.status}"
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in ("test split", "layer", "step", "before", "after", "bound", "holds"):
            table.add_column(column, justify="left" if column in ("test split", "layer") else "right", overflow="fold")
        for name, report in self.concepts.items():
            edited = report.status == "unlearned"
            table.add_row(
                name,
                report.layer if edited else "left as it was",
                number(report.relative_step) if edited else "",
                number(self.before["forget"].get(name)),
                number(self.after["forget"].get(name)),
                report.bound("forget", report.bounds["forget_metric"], None),
                {None: "", True: "yes", False: "no"}[self._is_forgotten(name)],
            )
        return table

    def _retain_table(self) -> Any:
        from rich.table import Table

        table = Table(title="retain metrics, all edits together", title_justify="left")
        for column in ("test split", "before", "after", "bound"):
            table.add_column(column, justify="left" if column == "test split" else "right")
        some = next(iter(self.concepts.values()))
        for name, value in self.before["retain"].items():
            after = self.after["retain"][name]
            table.add_row(f"retain: {name}", number(value), number(after), some.bound("retain", name, value))
        return table

    def _collateral_table(self) -> Any:
        from rich.table import Table

        table = Table(title="each concept (column) under each edit alone (row), validation split", title_justify="left")
        table.add_column("edit")
        for concept in self.collateral:
            table.add_column(concept, justify="right", overflow="fold")
        # Pairs: a concept may be called "all".
        for edit, values in [("none", self._search("before")), *self.collateral.items(), ("all", self._search("after"))]:
            table.add_row(edit, *(number(values.get(concept)) for concept in self.collateral))
        return table

    def _search(self, when: str) -> Values:
        """The forget metric of every concept on the validation split, before or after all edits."""
        measured = {name: getattr(report, f"search_{when}").get("forget", {}) for name, report in self.concepts.items()}
        return {name: next(iter(values.values())) for name, values in measured.items() if values}

    def _is_forgotten(self, name: str) -> bool | None:
        """Whether a concept's forget bound holds on the test split; None where that was not measured, or nothing edited."""
        report, value = self.concepts[name], self.after["forget"].get(name)
        if value is None or report.status != "unlearned":
            return None
        bounds = report.bounds
        metric = Metric(bounds["forget_metric"], bounds["higher_is_better"][bounds["forget_metric"]])
        return metric.reaches(value, bounds["forget_target"])

    def _verdict(self) -> str:
        """One sentence on how it ended."""
        left = [name for name, report in self.concepts.items() if report.status != "unlearned"]
        said = f"Left as they were: {', '.join(left)}. " if left else ""
        if self.status == "infeasible":
            return f"{said}Nothing was edited; the weights are as they were."
        failing = [name for name in self.unlearned if self._is_forgotten(name) is False]
        if self.holds:
            return f"{said}All bounds hold on the test split as well."
        if failing:
            return f"{said}The forget bound does not hold on the test split for: {', '.join(failing)}."
        return f"{said}A retain bound does not hold on the test split."

    def figures(self) -> dict[str, Figure]:
        """Pictures: "collateral", a matrix; "strength", curves; "pareto/…" and "trade_off/…" of up to `SHOWN` concepts.

        Of a generator also "samples/retain", and "samples/forget/…" of these concepts.
        """
        figures = sample_figures(self.gallery, ", ".join(self.unlearned))
        if self.collateral:
            rows = [("no edit", self._search("before")), *self.collateral.items(), ("all edits", self._search("after"))]
            figures["collateral"] = collateral_figure(list(self.collateral), rows)
        curves = {name: report.strengths for name, report in self.concepts.items() if report.strengths}
        if curves:
            figures["strength"] = self.concepts[next(iter(curves))].strength_figure(curves)
        for name, report in list(self.concepts.items())[:SHOWN]:
            if report.scores:
                figures |= {
                    f"{kind}/{file_name(name)}": figure for kind, figure in report.figures().items() if kind != "strength"
                }
        return figures


AnyReport = Union[UnlearnReport, JointReport]


def report_from_dict(data: dict[str, Any]) -> AnyReport:
    """A report of either kind."""
    return JointReport.from_dict(data) if "concepts" in data else UnlearnReport.from_dict(data)


def report_from_json(path: str | Path) -> AnyReport:
    """A report of either kind, from its file."""
    return report_from_dict(json.loads(Path(path).read_text()))
