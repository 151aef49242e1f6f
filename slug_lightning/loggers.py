"""Show a report through the Trainer's own loggers: scalars in all, figures and tables in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger

from slug_lightning.report import UnlearnReport

STEP_SCALE = 10_000
"""Loggers count steps in whole numbers: the horizontal axis of the search is the relative step times this."""


def publish(report: UnlearnReport, loggers: Iterable[Logger]) -> None:
    """Send a report to every logger.

    All get scalars: `search/forget/<layer>` and `search/retain_<metric>/<layer>` over the relative step (× 10,000),
    and `before/...`, `after/...` on report data. TensorBoard also gets both figures, the table of the front, the
    closing table, and hyperparameters with the outcome.

    Args:
        report: of a run.
        loggers: the trainer's.
    """
    for logger in loggers:
        for trial in sorted(report.trace, key=lambda t: t["relative_step"]):
            values = {f"search/forget/{trial['layer']}": trial["forget"]}
            values |= {f"search/retain_{name}/{trial['layer']}": v for name, v in (trial["retain"] or {}).items()}
            logger.log_metrics(values, step=round(trial["relative_step"] * STEP_SCALE))
        for when, measured in (("before", report.before), ("after", report.after)):
            flat = {f"{when}/{kind}_{name}": v for kind, values in measured.items() for name, v in values.items()}
            logger.log_metrics(flat, step=0)
        if hasattr(getattr(logger, "experiment", None), "add_figure"):
            _publish_tensorboard(report, logger)
        logger.save()


def _publish_tensorboard(report: UnlearnReport, logger: Any) -> None:
    writer = logger.experiment
    for name, figure in report.figures().items():
        writer.add_figure(f"unlearn/{name}", figure)
    writer.add_text("unlearn/front", front_table(report))
    writer.add_text("unlearn/report", f"<pre>{report.to_text()}</pre>")
    outcome = {f"hp/forget_{name}": value for name, value in report.after["forget"].items()}
    outcome |= {f"hp/retain_{name}": value for name, value in report.after["retain"].items()}
    parameters = {
        "concept": report.concept,
        "status": report.status,
        "layer": report.layer or "none",
        "relative_step": report.relative_step or 0.0,
        "forget_target": report.bounds["forget_target"],
        "retain_tolerance": report.bounds["retain_tolerance"],
    }
    logger.log_hyperparams(parameters, outcome)


def front_table(report: UnlearnReport) -> str:
    """The front as a Markdown table, most important layer first."""
    rows = ["| tower | layer | importance | alignment | edited |", "|---|---|---|---|---|"]
    for s in sorted(report.scores, key=lambda s: -s["importance"]):
        if s["on_front"]:
            mark = "yes" if s["layer"] == report.layer else ""
            rows.append(f"| {s['tower']} | {s['layer']} | {s['importance']:.3g} | {s['alignment']:.3f} | {mark} |")
    return "\n".join(rows)
