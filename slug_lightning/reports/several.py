"""The evidence of a run that forgot several concepts: a report for each, and what their edits do together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from rich.table import Table

from slug_lightning.objective.samples import Gallery
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.base import Report, number, table
from slug_lightning.reports.figures import SHOWN, Values, collateral_figure, sample_figures
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.utils.names import file_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class JointReport(Report):
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
        """Return a copy as plain data, without patches and galleries; the reports of the concepts come last."""
        plain = super().to_dict()
        plain["concepts"] = plain.pop("concepts")
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> JointReport:
        """Build the report that `to_dict` described, also of version 0.1; what a newer version added is left out."""
        return super().from_dict(data | {"concepts": {n: UnlearnReport.from_dict(one) for n, one in data["concepts"].items()}})

    def _shown(self, width: int) -> Iterator[Table | str]:
        yield self._concept_table()
        retain = table("retain metrics, all edits together", ("test split", "before", "after", "bound"))
        for name, value in self.before["retain"].items():
            bound = next(iter(self.concepts.values())).bound("retain", name, value)
            retain.add_row(f"retain: {name}", number(value), number(self.after["retain"][name]), bound)
        for concept, report in self.concepts.items():
            for name, value in report.before.get("near", {}).items():
                bound = report.bound("near", name, value)
                retain.add_row(f"near {concept}: {name}", number(value), number(report.after["near"][name]), bound)
        yield retain
        if 1 < len(self.collateral) <= SHOWN:
            title = "each concept (column) under each edit alone (row), validation split"
            alone = table(title, ("edit", *self.collateral), overflow="fold")
            for edit, values in self._by_edit("none", "all"):
                alone.add_row(edit, *(number(values.get(concept)) for concept in self.collateral))
            yield alone
        for found in self.rounds:
            if found["change"]:
                yield f"together, constraint usage {number(found['constraint_usage'])}: {found['change']}"
        yield from self._cost_and_notes(self.cost.get("evaluations", 0), width)
        yield self._verdict()

    def _concept_table(self) -> Table:
        title = f"{len(self.unlearned)} of {len(self.concepts)} concepts unlearned: {self.status}"
        columns = ("test split", "layer", "step", "before", "after", "bound", "holds")
        concepts = table(title, columns, words=2, bold=True, overflow="fold")
        for name, report in self.concepts.items():
            edited = report.status == "unlearned"
            concepts.add_row(
                name,
                report.layer if edited else "left as it was",
                number(report.relative_step) if edited else "",
                number(self.before["forget"].get(name)),
                number(self.after["forget"].get(name)),
                ", ".join(report.bound("forget", metric, None) for metric in report.goals),
                {None: "", True: "yes", False: "no"}[self._is_forgotten(name)],
            )
        return concepts

    def _by_edit(self, before: str, after: str) -> list[tuple[str, Values]]:
        """Pair each edit with every concept's forget metric under it; in pairs, as a concept may have the name of a row."""
        return [(before, self._search("before")), *self.collateral.items(), (after, self._search("after"))]

    def _search(self, when: str) -> Values:
        """The forget metric of every concept on the validation split, before or after all edits."""
        measured = {name: getattr(report, f"search_{when}").get("forget", {}) for name, report in self.concepts.items()}
        return {name: next(iter(values.values())) for name, values in measured.items() if values}

    def _is_forgotten(self, name: str) -> bool | None:
        """Whether a concept's forget bound holds on the test split; None where that was not measured, or nothing edited."""
        report, value = self.concepts[name], self.after["forget"].get(name)
        if value is None or report.status != "unlearned":
            return None
        goals = report.goals
        return not report.remembered(report.after["forget"] if len(goals) > 1 else dict.fromkeys(goals, value))

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
            figures["collateral"] = collateral_figure(list(self.collateral), self._by_edit("no edit", "all edits"))
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
