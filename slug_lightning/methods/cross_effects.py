"""What each edit does to the other concepts, and what more or less of it would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slug_lightning.methods.base import Context, recorded
from slug_lightning.methods.concept import Concept
from slug_lightning.patches.temporary import EditStep

MAX_CONCEPTS = 32
"""Concepts up to which the effect of each edit on each is measured: their number is squared."""


def collateral(concepts: Sequence[Concept], edits: Mapping[str, EditStep], context: Context) -> dict[str, dict[str, float]]:
    """Measure the forget metric of at most `MAX_CONCEPTS` concepts under every single edit, on the validation split."""
    concepts = concepts[:MAX_CONCEPTS]
    found: dict[str, dict[str, float]] = {concept.name: {} for concept in concepts}
    layers = list({edits[c.name].layer.name: edits[c.name].layer for c in concepts}.values())
    for concept in context.progress.track(concepts, "collateral"):
        objective = concept.objective
        with objective.replaying(layers), recorded(objective, "forget", "val", layers):
            for other in concepts:
                with context.edits.applied(edits[other.name]):
                    values = objective.measured("forget", "val", edited=edits[other.name].layer.name)
                found[other.name][concept.name] = concept.value_that_counts(values)
    return found


def strength_curves(
    concepts: Sequence[Concept], edits: Mapping[str, EditStep], context: Context, scales: Sequence[float]
) -> dict[str, list[dict[str, Any]]]:
    """Measure both metrics over the scale of each concept's edit, on the validation split, while all other edits stay.

    Returns:
        By concept, a list of `{"strength": …, "forget": {…}, "retain": {…}}`, weakest first; 1 is always among them.
    """
    others = sorted(set(scales) - {1.0})
    curves: dict[str, list[dict[str, Any]]] = {}
    own = [edits[concept.name] for concept in concepts]
    layers = list({edit.layer.name: edit.layer for edit in own}.values())
    with context.edits.applied(*edits.values()):
        for concept, edit in zip(context.progress.track(concepts, "scales, forget metrics"), own, strict=True):
            objective, layer = concept.objective, edit.layer
            with objective.replaying([layer]), recorded(objective, "forget", "val", [layer]) as full:
                curve = curves[concept.name] = [{"strength": 1.0, "forget": full}]
                for scale in others:
                    # So much more or less of it than there is already: up to rounding, as good as anew.
                    with context.edits.applied(replace(edit, step=(scale - 1) * edit.step)):
                        values = objective.measured("forget", "val", edited=layer.name)
                    curve.append({"strength": scale, "forget": values})
        objective = context.objective
        with objective.replaying(layers), recorded(objective, "retain", "val", layers) as full:
            for concept, edit in zip(context.progress.track(concepts, "scales, retain metrics"), own, strict=True):
                for point in curves[concept.name]:
                    point["retain"] = full
                    if point["strength"] != 1:
                        with context.edits.applied(replace(edit, step=(point["strength"] - 1) * edit.step)):
                            point["retain"] = objective.measured("retain", "val", edited=edit.layer.name)
    return {name: sorted(curve, key=lambda point: point["strength"]) for name, curve in curves.items()}
