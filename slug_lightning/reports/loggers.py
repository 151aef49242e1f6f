"""Show a report through the Trainer's own loggers: scalars in all, figures and tables in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from slug_lightning.reports.several import JointReport
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.layers import edited_layers

STEP_SCALE = 10_000
"""Loggers take integer steps: the horizontal axis of the search is the relative step times this."""


def publish(report: UnlearnReport | JointReport, loggers: Iterable[Logger]) -> None:
    """Send a report to every logger of the trainer.

    All get scalars: `search/forget/<layer>`, `search/retain_<metric>/<layer>` and `search/near_<metric>/<layer>` over the
    relative step (× 10,000),
    `strength/…` over the edit's strength (× 10,000), and `before/...`, `after/...` on the test split. TensorBoard also gets
    figures, the table of the front, the closing table, and hyperparameters with the outcome. With several concepts, the
    name of the concept comes first.
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
        if hasattr(getattr(logger, "experiment", None), "add_figure"):
            _publish_tensorboard(report, reports, logger)
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


def _publish_tensorboard(report: UnlearnReport | JointReport, reports: dict[str, UnlearnReport], logger: Any) -> None:
    writer = logger.experiment
    for name, figure in report.figures().items():
        writer.add_figure(f"unlearn/{name}", figure)
    for prefix, single in reports.items():
        writer.add_text(f"unlearn/{prefix}front", front_table(single))
    writer.add_text("unlearn/report", f"<pre>{report.to_text()}</pre>")
    outcome = {f"hp/{kind}_{name}": v for kind, values in report.after.items() for name, v in values.items() if v is not None}
    bounds = next(iter(reports.values())).bounds
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


def front_table(report: UnlearnReport) -> str:
    """Return the front as a Markdown table, most important layer first."""
    rows = ["| tower | layer | importance | alignment | edited |", "|---|---|---|---|---|"]
    for s in sorted(report.scores, key=lambda s: -s["importance"]):
        is_edited = s["layer"] in edited_layers(report.layer)
        if s["on_front"] or is_edited:
            mark = "" if not is_edited else "yes" if s["on_front"] else "yes, off the front"
            alignment = "–" if s["alignment"] is None else f"{s['alignment']:.3f}"
            rows.append(f"| {s['tower']} | {s['layer']} | {s['importance']:.3g} | {alignment} | {mark} |")
    return "\n".join(rows)
