"""Show a report through the Trainer's own loggers: scalars in all, figures and tables as each of them takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger

from slug_lightning.reports.several import JointReport
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.layers import edited_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT = ["tower", "layer", "importance", "alignment", "edited"]
"""Columns of the table of the front."""
STEP_SCALE = 10_000
"""Loggers take integer steps: the horizontal axis of the search is the relative step times this."""


def publish(report: UnlearnReport | JointReport, loggers: Iterable[Logger]) -> None:
    """Send a report to every logger of the trainer.

    All get scalars: `search/forget/<layer>`, `search/retain_<metric>/<layer>` and `search/near_<metric>/<layer>` over the
    relative step (× 10,000), `strength/…` over the edit's strength (× 10,000), and `before/...`, `after/...` on the test split.
    TensorBoard, Weights & Biases, MLflow and Comet get the figures, the table of the front and the closing table as well,
    TensorBoard also hyperparameters with the outcome. With several concepts, the name of the concept comes first.
    """
    reports = {f"{name}/": one for name, one in report.concepts.items()} if isinstance(report, JointReport) else {"": report}
    for logger in loggers:
        for prefix, single in reports.items():
            _publish_search(single, logger, prefix)
        for when, measured in (("before", report.before), ("after", report.after)):
            flat = {f"{when}/{kind}_{name}": v for kind, values in measured.items() for name, v in values.items()}
            _log(logger, flat, 0)
        for prefix, single in reports.items() if isinstance(report, JointReport) else ():
            for when, values in (("before", single.before.get("near", {})), ("after", single.after.get("near", {}))):
                _log(logger, {f"{prefix}{when}/near_{name}": v for name, v in values.items()}, 0)
        if (show := _way_to_show(logger)) is not None:
            show(_Shown(report, reports), logger)
        logger.save()


def _publish_search(report: UnlearnReport, logger: Logger, prefix: str) -> None:
    """Log the search of one concept, and the metrics over its strength."""
    for trial in sorted(report.trace, key=lambda t: t["relative_step"]):
        kind = f"{prefix}search" + ("_together" if trial.get("together") else "")
        values = {f"{kind}/forget/{trial['layer']}": trial["forget"]}
        for measured in ("near", "retain"):
            values |= {f"{kind}/{measured}_{name}/{trial['layer']}": v for name, v in (trial.get(measured) or {}).items()}
        _log(logger, values, trial["relative_step"])
    for point in report.strengths:
        values = {f"{prefix}strength/{kind}_{name}": v for kind in ("forget", "retain") for name, v in point[kind].items()}
        _log(logger, values, point["strength"])


def _log(logger: Logger, values: Mapping[str, float | None], step: float) -> None:
    """Leave out None, which stands for what isn't finite in the report of an earlier run: loggers refuse it."""
    logger.log_metrics({name: v for name, v in values.items() if v is not None}, step=round(step * STEP_SCALE))


@dataclass
class _Shown:
    """What is looked at rather than plotted."""

    report: UnlearnReport | JointReport
    reports: Mapping[str, UnlearnReport]
    """By what comes before their names."""

    @property
    def figures(self) -> dict[str, Figure]:
        """By name."""
        return {f"unlearn/{name}": figure for name, figure in self.report.figures().items()}

    @property
    def fronts(self) -> dict[str, list[list[str]]]:
        """Rows of the table of each front, by name."""
        return {f"unlearn/{prefix}front": front_rows(single) for prefix, single in self.reports.items()}


def _way_to_show(logger: Any) -> Callable[[_Shown, Any], None] | None:
    """How a logger takes figures and tables, by the methods that it has; None if it takes numbers only."""
    experiment = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        return _to_tensorboard
    if hasattr(logger, "log_image") and hasattr(logger, "log_table"):
        return _to_wandb
    if hasattr(experiment, "log_figure"):
        return _to_mlflow if hasattr(experiment, "log_artifact") else _to_comet
    return None


def _to_tensorboard(shown: _Shown, logger: Any) -> None:
    writer = logger.experiment
    for name, figure in shown.figures.items():
        writer.add_figure(name, figure)
    for name, rows in shown.fronts.items():
        writer.add_text(name, front_table(rows))
    report = shown.report
    writer.add_text("unlearn/report", f"<pre>{report.to_text()}</pre>")
    outcome = {f"hp/{kind}_{name}": v for kind, values in report.after.items() for name, v in values.items() if v is not None}
    bounds = next(iter(shown.reports.values())).bounds
    parameters = {
        "concept": report.concept,
        "status": report.status,
        "layer": report.layer or "none",
        "forget_target": bounds["forget_target"],
        "retain_tolerance": bounds["retain_tolerance"],
    }
    if isinstance(report, UnlearnReport):
        parameters["relative_step"] = report.relative_step or 0.0
    logger.log_hyperparams(parameters, outcome)


def _to_wandb(shown: _Shown, logger: Any) -> None:
    for name, figure in shown.figures.items():
        logger.log_image(key=name, images=[figure])
    for name, rows in shown.fronts.items():
        logger.log_table(key=name, columns=FRONT, data=rows)
    logger.log_table(key="unlearn/report", columns=["report"], data=[[shown.report.to_text()]])


def _to_mlflow(shown: _Shown, logger: Any) -> None:
    for name, figure in shown.figures.items():
        logger.experiment.log_figure(logger.run_id, figure, f"{name}.png")
    for name, rows in shown.fronts.items():
        logger.experiment.log_text(logger.run_id, front_table(rows), f"{name}.md")
    logger.experiment.log_text(logger.run_id, shown.report.to_text(), "unlearn/report.txt")


def _to_comet(shown: _Shown, logger: Any) -> None:
    for name, figure in shown.figures.items():
        logger.experiment.log_figure(figure_name=name, figure=figure)
    for name, rows in shown.fronts.items():
        logger.experiment.log_table(f"{name.replace('/', '_')}.csv", tabular_data=rows, headers=FRONT)
    logger.experiment.log_text(shown.report.to_text())


def front_rows(report: UnlearnReport) -> list[list[str]]:
    """Return the rows of the table of the front, most important layer first; `FRONT` names the columns."""
    rows = []
    for s in sorted(report.scores, key=lambda s: -s["importance"]):
        is_edited = s["layer"] in edited_layers(report.layer)
        if s["on_front"] or is_edited:
            mark = "" if not is_edited else "yes" if s["on_front"] else "yes, off the front"
            alignment = "–" if s["alignment"] is None else f"{s['alignment']:.3f}"
            rows.append([s["tower"], s["layer"], f"{s['importance']:.3g}", alignment, mark])
    return rows


def front_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of the front as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (FRONT, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(FRONT), *lines[1:]])
