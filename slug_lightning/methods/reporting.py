"""What a run has found becomes its report, with the patches; the same for every method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from slug_lightning.methods.base import Context, Outcome
from slug_lightning.methods.concept import Concept
from slug_lightning.methods.near import combined_usage
from slug_lightning.objective.samples import Gallery
from slug_lightning.patches.edit import Edit
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.patches.temporary import EditStep
from slug_lightning.reports.several import AnyReport, JointReport
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.dtensor import whole
from slug_lightning.utils.modules import unwrap_model


@dataclass
class Measured:
    """The metrics of one split: of forget sets and near data by concept, then by name, of the retain set by name."""

    forget: dict[str, dict[str, float]] = field(default_factory=dict)
    near: dict[str, dict[str, float]] = field(default_factory=dict)
    retain: dict[str, float] = field(default_factory=dict)


@dataclass
class Findings:
    """What a run has found; `before` and `after` are on the test split."""

    outcomes: Mapping[str, Outcome]
    edits: Mapping[str, EditStep]
    before: Measured
    after: Measured
    collateral: dict[str, dict[str, float]]
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    forget_galleries: dict[str, Gallery] = field(default_factory=dict)
    retain_gallery: Gallery | None = None


def build_report(context: Context, findings: Findings, cost: tuple[dict[str, Any], list[str]]) -> AnyReport:
    """Make the report of a run, with its cost and sentences on that; for a sharded model, in every process."""
    before, after, edits = findings.before, findings.after, findings.edits
    near = {
        c.name: (c.near, before.near[c.name], after.near[c.name])
        for c in context.concepts
        if c.near is not None and c.near.binds and c.name in edits and c.name in after.near
    }
    tolerance, values = context.retain_tolerance, (before.retain, after.retain)
    is_retained = combined_usage(context.objective, tolerance, "test", values, near) <= 1
    reports = {concept.name: _concept_report(concept, context, findings, is_retained) for concept in context.concepts}
    versions = {name: version(name) for name in ("slug-lightning", "lightning", "torch")}
    galleries = {} if findings.retain_gallery is None else {"retain": findings.retain_gallery}
    if len(reports) == 1:
        (report,) = reports.values()
        report.notes = context.notes + report.notes + cost[1]
        report.cost, report.versions, report.gallery = cost[0], versions, report.gallery | galleries
        return report
    new = [concept.name for concept in context.concepts if concept.report is None]
    joint = JointReport(
        "infeasible" if not edits else "unlearned" if len(edits) == len(reports) else "partly",
        reports,
        context.rounds,
        findings.collateral,
        _by_concept(context, before),
        _by_concept(context, after),
        holds=is_retained and all(reports[name].holds for name in edits if name in new) if edits else None,
        cost=cost[0],
        notes=context.notes + cost[1],
        versions=versions,
        gallery=galleries,
    )
    if edits:
        joint.patch = UnlearnPatch.combine([patch for name in edits if (patch := reports[name].patch) is not None])
        joint.patch_digest = joint.patch.digest
    return joint


def _by_concept(context: Context, measured: Measured) -> dict[str, dict[str, float]]:
    """What a report of several concepts says: of each, the forget metric that counts."""
    forget = {c.name: c.value_that_counts(measured.forget[c.name]) for c in context.concepts if c.name in measured.forget}
    return {"forget": forget, "retain": measured.retain}


def _of(concept: Concept, measured: Measured) -> dict[str, dict[str, float]]:
    """What the report of one concept says."""
    near = {} if concept.near is None else {"near": measured.near[concept.name]}
    return {"forget": measured.forget[concept.name], **near, "retain": measured.retain}


def _concept_report(concept: Concept, context: Context, findings: Findings, is_retained: bool) -> UnlearnReport:
    """The report of one concept, with its patch."""
    outcome, edit = findings.outcomes[concept.name], findings.edits.get(concept.name)
    if concept.report is not None:
        report = concept.report
        if edit is not None:
            return replace(report, search_after=outcome.search_after or report.search_after)
        report = replace(report, status="infeasible", holds=None, tensors=[], search_after=report.search_before)
        report.layer = report.step_size = report.relative_step = report.patch = report.patch_digest = None
        return report
    before, after = findings.before, findings.after
    unedited: dict[str, float] = {target.metric.name: target.before for target in concept.targets}
    near = concept.near
    search_before = {"forget": unedited, **({} if near is None else {"near": near.before}), "retain": context.retain_before()}
    report = UnlearnReport(
        "infeasible",
        concept.name,
        bounds=concept.bounds(context.retain_tolerance),
        scores=outcome.layers,
        trace=[trial.to_dict() for trial in outcome.trials],
        before=_of(concept, before),
        after=_of(concept, after),
        search_before=search_before,
        search_after=search_before,
        strengths=findings.curves.get(concept.name, []),
        notes=outcome.notes,
    )
    if edit is None:
        return report
    report.status, report.search_after = "unlearned", outcome.search_after
    report.holds = concept.is_forgotten(after.forget[concept.name]) and is_retained
    report.layer, report.step_size, report.relative_step = edit.layer.name, edit.step, outcome.relative_step
    if report.relative_step is None:
        report.relative_step = edit.step / context.unit_step(edit.layer, edit.direction)
    if concept.name in findings.forget_galleries:
        report.gallery = {"forget": findings.forget_galleries[concept.name]}
    report.patch = _patch(concept, report, edit)
    report.tensors, report.patch_digest = list(report.patch.base), report.patch.digest
    return report


def _patch(concept: Concept, report: UnlearnReport, edit: EditStep) -> UnlearnPatch:
    """The patch of one edit; of a sharded model, every process must ask for it."""
    active = UnlearnPatch.active(unwrap_model(concept.objective.module))
    details = {"layer": report.layer, "relative_step": report.relative_step, "before": report.before, "after": report.after}
    made = Edit(concept.name, edit.step, edit.for_patch, details, parents=active.as_parents() if active else [])
    named = zip(made.directions, edit.layer.parameters.values(), strict=True)
    return UnlearnPatch({name: whole(p).cpu().clone() for name, p in named}, [made])
