"""Figures of a report, from plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slug_lightning.objective.metrics import Goal
from slug_lightning.objective.samples import Gallery
from slug_lightning.tensors.layers import edited_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, float]
SHOWN = 12
"""Above this number of concepts, tables, legends and figures leave some out; the file holds all."""
TITLES = {
    "memorization_accuracy": "memorization accuracy",
    "extraction_likelihood": "extraction likelihood",
    "bleu": "BLEU of completions",
    "perplexity": "perplexity",
    "diversity": "distinct 3-grams of completions",
}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    """Make a figure and its axes, in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def pareto_figure(concept: str, scores: list[dict[str, Any]], layer: str | None) -> Figure:
    """Plot layers by importance and alignment, with the front of each tower and the edited layer."""
    figure, (axes,) = _figure(10, 5)
    number, edited = 0, edited_layers(layer)
    for hue, tower in enumerate(sorted({s["tower"] for s in scores})):
        own = [s for s in scores if s["tower"] == tower]
        front = sorted((s for s in own if s["on_front"]), key=lambda s: s["importance"])
        rest = [s for s in own if not s["on_front"]]
        axes.scatter([s["importance"] for s in rest], [s["alignment"] for s in rest], s=14, alpha=0.4, color=f"C{hue}")
        label = f"front of the {tower} tower" if tower != "model" else "front"
        axes.plot([s["importance"] for s in front], [s["alignment"] for s in front], "-", color=f"C{hue}", label=label)
        off_front = [s for s in rest if s["layer"] in edited]
        for s in front + off_front:  # numbers, since names are longer than the gaps between points
            number += 1
            mark, size, note = ("*", 15, "  (edited)") if s["layer"] in edited else ("o", 6, "")
            at, name = (s["importance"], s["alignment"]), f"{number}  {s['layer']}{note}"
            axes.plot(*at, mark, ms=size, color=f"C{hue}", label=name)
            axes.annotate(str(number), at, (7, 5), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel="importance ‖g_f‖ / ‖θ‖  (right is better)", ylabel="|cos(g_f, g_r)|  (low is better)")
    axes.tick_params(axis="x", which="minor", labelsize=6, labelrotation=45)
    axes.set_title(f"Layers for forgetting: {concept}")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def trade_off_figure(
    trace: list[dict[str, Any]],
    before: dict[str, Values],
    after: dict[str, Values],
    edited: tuple[str, float | None] | None,
    goals: Mapping[str, Goal],
    limits: Values,
    near_limits: Values | None = None,
) -> Figure:
    """Plot the search: the forget metric over the step, and over the first retain metric.

    `trace` holds every trial; `before` and `after` are the metrics on the validation split, `edited` is the chosen layer with
    its relative step, `goals` the target of each forget metric, of which each trial shows the one that counts, `limits` the worst
    allowed value of each retain metric.
    """
    figure, (left, right) = _figure(11, 5.5, 2)
    forget_before = next(iter(before["forget"].values()))
    retain_name = next(iter(before["retain"]))
    alone = [t for t in trace if not t.get("together")]
    own = {_way(t) for t in alone if edited is not None and (t["layer"], t["relative_step"]) == edited}
    for way in dict.fromkeys(map(_way, alone)):
        chosen = way in own if own else edited is not None and way[0] in edited_layers(edited[0])
        style: dict[str, Any] = {"color": "black", "zorder": 3, "linewidth": 2} if chosen else {"zorder": 2, "linewidth": 1}
        trials = sorted((t for t in alone if _way(t) == way), key=lambda t: t["relative_step"])
        steps = [0.0, *(t["relative_step"] for t in trials)]
        label = way[0] + (f" ({way[1]}, {way[2]})" if way[1:] != ("gradient", "line") else "")
        left.plot(steps, [forget_before, *(t["forget"] for t in trials)], ".-", label=label, **style)
        measured = [t for t in trials if t["retain"]]
        right.plot([t["retain"][retain_name] for t in measured], [t["forget"] for t in measured], ".", markersize=9, **style)
        hollow = {**style, "fillstyle": "none", "linestyle": ""}
        near = [t for t in trials if t.get("near")]
        right.plot([t["near"][retain_name] for t in near], [t["forget"] for t in near], "o", markersize=6, **hollow)
    if after and edited is not None:
        star: dict[str, Any] = {"marker": "*", "color": "crimson", "markersize": 16, "zorder": 4, "linestyle": ""}
        chosen_trial = next((t for t in reversed(trace) if (t["layer"], t["relative_step"]) == edited), None)
        forget_after = next(iter(after["forget"].values())) if len(goals) == 1 or chosen_trial is None else chosen_trial["forget"]
        left.plot(edited[1], forget_after, **star)
        right.plot(after["retain"][retain_name], forget_after, label="chosen", **star)
    right.plot(before["retain"][retain_name], forget_before, "s", color="grey", label="before")
    right.axvline(limits[retain_name], color="grey", linestyle=":", label="retain bound")
    if near_limits and retain_name in near_limits:
        right.plot([], [], "o", markersize=6, color="grey", fillstyle="none", label="an edit, on near data")
        right.plot(before["near"][retain_name], forget_before, "s", color="grey", fillstyle="none", label="before, near data")
        right.axvline(near_limits[retain_name], color="C1", linestyle=":", label="near bound")
    for axes in (left, right):
        _draw_goals(axes, goals)
    left.set_xscale("symlog", linthresh=0.1)  # linear up to the first step, logarithmic beyond
    left.set_xlim(left=0)
    left.set(xlabel="relative step ‖Δ‖/‖θ‖", title="Validation split: forgetting over the step")
    right.set(xlabel=f"retain: {retain_name}", title="Validation split: what it costs")
    right.legend(fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def strength_figure(curves: dict[str, list[dict[str, Any]]], goals: Mapping[str, Goal], limits: Values) -> Figure:
    """Plot forget and retain metrics over the strength of each edit; `curves` holds its measurements, weakest first."""
    figure, (left, *right) = _figure(11, 5, 1 + len(limits))
    for concept, curve in curves.items():
        strengths = [point["strength"] for point in curve]
        for name in goals:
            label = concept if len(goals) == 1 else f"{concept}: {name}"
            left.plot(strengths, [point["forget"].get(name) for point in curve], ".-", label=label)
        for axes, name in zip(right, limits, strict=True):
            axes.plot(strengths, [point["retain"][name] for point in curve], ".-")
    _draw_goals(left, goals)
    for axes, name in zip(right, limits, strict=True):
        axes.set_ylabel(f"retain: {name}")
        axes.axhline(limits[name], color="grey", linestyle="--", linewidth=1)
    for axes in (left, *right):
        axes.set_xlabel("strength of the edit")
        axes.axvline(1, color="grey", linestyle=":", linewidth=1)
    if len(curves) <= SHOWN:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("Validation split: more or less of an edit" + ("; the others stay" if len(curves) > 1 else ""))
    return figure


def _draw_goals(axes: Any, goals: Mapping[str, Goal]) -> None:
    """Draw the targets of the forget metrics, and name the axis."""
    for number, end in enumerate(dict.fromkeys(end for goal in goals.values() for end in _ends(goal))):
        axes.axhline(end, color="crimson", linestyle="--", linewidth=1, label="" if number else "forget target")
    axes.set_ylabel(f"forget: {next(iter(goals))}" if len(goals) == 1 else f"forget: the one of {len(goals)} metrics that counts")


def _ends(goal: Goal) -> Sequence[float]:
    return [goal] if isinstance(goal, (int, float)) else goal


def sample_figures(gallery: dict[str, Gallery], concept: str) -> dict[str, Figure]:
    """Show what a generator draws before and after: "samples/forget" and "samples/retain"."""
    headings = {"forget": f"Forget set: {concept}", "retain": f"Retain set, with {concept} forgotten"}
    return {f"samples/{kind}": pictures.figure(headings[kind]) for kind, pictures in gallery.items()}


def collateral_figure(concepts: list[str], rows: list[tuple[str, Values]]) -> Figure:
    """Show the forget metric of each concept under each edit, as a matrix with a row for each edit."""
    # None is what JSON gives back for what isn't finite.
    values = [[math.nan if row.get(concept) is None else row[concept] for concept in concepts] for _, row in rows]
    side = max(5.0, 0.5 * len(concepts) + 3)
    figure, (axes,) = _figure(side + 1, side)
    shown = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(concepts)), concepts, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [edit for edit, _ in rows], fontsize=8)
    if len(concepts) <= SHOWN:
        low, high = shown.get_clim()
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "w" if value < (low + high) / 2 else "k"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="measured on", ylabel="edit", title="Validation split: forget metric of each concept under each edit")
    figure.colorbar(shown, ax=axes, shrink=0.7)
    return figure


def _way(trial: dict[str, Any]) -> tuple[str, str, str]:
    """Layer, direction and curve of a trial; the paper's are not written down."""
    return trial["layer"], trial.get("direction", "gradient"), trial.get("curve", "line")


def forgetting_figure(trace: list[dict[str, Any]], levels: Values) -> Figure:
    """Plot means of the metrics over the epochs of a run over passages, with the levels that they must fall below."""
    figure, (left, middle, right) = _figure(12, 4, 3)
    epochs = [entry["epoch"] for entry in trace]
    for colour, name in enumerate(("memorization_accuracy", "extraction_likelihood", "bleu")):
        left.plot(epochs, [entry.get(name) for entry in trace], ".-", color=f"C{colour}", label=TITLES[name])
        if name in levels:
            left.axhline(levels[name], color=f"C{colour}", linestyle="--", linewidth=1)
    left.set(xlabel="epoch", title="Passages to forget (dashed: threshold)", ylim=(0, 1))
    left.legend(fontsize=8)
    middle.plot(epochs, [entry["remembered"] for entry in trace], ".-", color="black")
    middle.set(xlabel="epoch", title="Passages still remembered", ylim=(0, None))
    right.plot(epochs, [entry["other_perplexity"] for entry in trace], ".-", color="C3")
    right.set(xlabel="epoch", title="Perplexity of other text (validation)")
    for axes in (left, middle, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure
