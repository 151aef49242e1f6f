"""What each edit does to the other concepts, and what more or less of it would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slug_lightning.methods.slug.concept import Request
from slug_lightning.methods.slug.layer_search import recorded
from slug_lightning.objective.objective import Objective
from slug_lightning.patches.temporary import TemporaryEdits
from slug_lightning.utils.progress import Progress

MOST = 32
"""Concepts up to which the effect of each edit on each is measured: their number is squared."""


def collateral(requests: Sequence[Request], bench: TemporaryEdits, progress: Progress) -> dict[str, dict[str, float]]:
    """Measure every concept under every single edit, on search data.

    Args:
        requests: with an edit each; at most `MOST` of them are looked at.
        bench: without any edit.
        progress: shows how far it is.

    Returns:
        By edit, then by concept, the concept's forget metric.
    """
    requests = requests[:MOST]
    found: dict[str, dict[str, float]] = {request.name: {} for request in requests}
    layers = list({request.layer.name: request.layer for request in requests}.values())
    for concept in progress.track(requests, "collateral"):
        objective = concept.objective
        with objective.sparing(layers), recorded(objective, "forget", "val", layers):
            for request in requests:
                with bench.step(request.move()):
                    values = objective.measured("forget", "val", edited=request.layer.name)
                (found[request.name][concept.name],) = values.values()
    return found


def strength_curves(
    requests: Sequence[Request], objective: Objective, bench: TemporaryEdits, strengths: Sequence[float], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Measure forget and retain metrics over the strength of each edit, on search data; all others stay at full strength.

    Args:
        requests: with an edit each; of those of an earlier run the curves are known.
        objective: measures what is kept.
        bench: without any edit.
        strengths: 1 is added.
        progress: shows how far it is.

    Returns:
        By concept, a list of `{"strength": …, "forget": {…}, "retain": {…}}`, weakest first.
    """
    others = sorted(set(strengths) - {1.0})
    curves: dict[str, list[dict[str, Any]]] = {}
    new = [request for request in requests if not request.is_taken_over]
    layers = list({request.layer.name: request.layer for request in new}.values())
    with bench.step(*(request.move() for request in requests)):
        for request in progress.track(new, "strength, what is forgotten"):
            layer = request.layer
            with request.objective.sparing([layer]), recorded(request.objective, "forget", "val", [layer]) as full:
                curve = curves[request.name] = [{"strength": 1.0, "forget": full}]
                for strength in others:
                    # So much more or less of it than there is already: up to rounding, as good as anew.
                    with bench.step(request.move(strength - 1)):
                        values = request.objective.measured("forget", "val", edited=layer.name)
                    curve.append({"strength": strength, "forget": values})
        with objective.sparing(layers), recorded(objective, "retain", "val", layers) as full:
            for request in progress.track(new, "strength, what is kept"):
                for point in curves[request.name]:
                    point["retain"] = full
                    if point["strength"] != 1:
                        with bench.step(request.move(point["strength"] - 1)):
                            point["retain"] = objective.measured("retain", "val", edited=request.layer.name)
    return {name: sorted(curve, key=lambda point: point["strength"]) for name, curve in curves.items()}
