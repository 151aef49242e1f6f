"""Copy the figures of a demo run to where the README and the pages under docs/ show them, and draw what the demo forgot.

make demo && make figures

With --canvas FOLDER, of a run of configs/unlearn_canvas.yaml, only what the miniature UnlearnCanvas has forgotten is drawn.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from slug_lightning import UnlearnPatch, UnlearnReport
from slug_lightning.clip.models import encode_image, encode_text
from slug_lightning.datamodules import EmojiDataModule
from slug_lightning.datamodules.demo.canvas import canvas_drawings
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.modules import EmbeddedCanvas, EmbeddedClip

DOCS = Path(__file__).parent.parent / "docs"


def answers(module: EmbeddedClip, images: torch.Tensor) -> dict[str, list[str]]:
    """What the model says of each image: its style and its thing."""
    drawings = load_drawings()
    found = {}
    with torch.no_grad():
        features = encode_image(module.model, images)
        for kind, names in (("style", drawings.style_names), ("thing", drawings.thing_names)):
            classes = encode_text(module.model, module.get_buffer(f"{kind}_tokens"))
            found[kind] = [names[i] for i in (features @ classes.T).argmax(1)]
    return found


def things_on_forgotten_pictures(module: EmbeddedClip, style: str) -> float:
    """Share of the report's pictures in the forgotten style whose thing is named right."""
    data = EmojiDataModule(style=style)
    data.setup("test")
    right: list[torch.Tensor] = []
    with torch.no_grad():
        for number, batch in enumerate(data.retain_dataloader("test")):
            right.append(module.scores(batch, number)["thing_accuracy"][batch["style"] < 0])
    return torch.cat(right).mean().item()


def draw_answers(before: EmbeddedClip, after: EmbeddedClip, concept: str) -> Figure:
    """Pictures of every style with the model's answers before and after."""
    drawings = load_drawings()
    # Of every fifth thing the model was not trained on one drawing (embedded/train.py).
    things = [t for t in torch.randperm(len(drawings.thing_names), generator=torch.Generator().manual_seed(3)) if t % 5][:8]
    styles = [concept] * 5 + [style for style in drawings.style_names if style != concept][:3]
    rows = [
        int(((drawings.things == t) & (drawings.styles == drawings.style_names.index(s))).nonzero())
        for t, s in zip(things, styles, strict=True)
    ]
    images = render(drawings.pictures[rows], torch.Generator().manual_seed(5))
    said = answers(before, images), answers(after, images)
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, 8)):
        axes.imshow((images[i].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1).numpy())
        axes.axis("off")
        lines = [f"{when}: {s['style'][i]},\n{s['thing'][i]}" for when, s in zip(("before", "after"), said, strict=True)]
        axes.set_title(f"drawn by {styles[i]}", fontsize=8, color="crimson" if styles[i] == concept else "black")
        axes.text(0.5, -0.05, "\n".join(lines), fontsize=7, ha="center", va="top", transform=axes.transAxes)
    return figure


def draw_canvas(run: Path, columns: int = 8) -> Figure:
    """Every style, by row, of the first things, by column: before the edit on the left, after it on the right."""
    drawings = canvas_drawings()
    concept = UnlearnReport.from_json(run / "report.json").concept.removesuffix(" style")
    prompts = [f"{thing} in {style} style" for style in drawings.style_names for thing in drawings.thing_names[:columns]]
    batch = {"text": prompts, "seed": torch.arange(len(prompts)) + 555_000, "steps": torch.full((len(prompts),), 25)}
    module = EmbeddedCanvas().eval()
    before = module.draw(batch)
    UnlearnPatch.load(run / "patch.safetensors").apply(module.pipeline)
    after = module.draw(batch)
    size = len(drawings.style_names), columns
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for half, name, pictures in zip(figure.subfigures(1, 2, wspace=0.03), ("before", "after"), (before, after), strict=True):
        half.suptitle(name)
        grid = half.subplots(*size)
        shown = ((pictures + 1) / 2).clamp(0, 1).view(*size, *pictures.shape[1:])
        for style, row, drawn in zip(drawings.style_names, grid, shown, strict=True):
            colour = "crimson" if style == concept else "black"
            row[0].set_ylabel(style, color=colour, rotation=0, ha="right", va="center")
            for axes, thing, picture in zip(row, drawings.thing_names, drawn, strict=False):
                axes.imshow(picture.permute(1, 2, 0).numpy())
                axes.set(xticks=[], yticks=[], title=thing if style == drawings.style_names[0] else "")
                axes.title.set_fontsize(8)
                for side in axes.spines.values():
                    side.set(color=colour, visible=style == concept)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--canvas", type=Path, help="folder of a run of configs/unlearn_canvas.yaml, to draw that instead")
    options = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    if options.canvas is not None:
        draw_canvas(options.canvas).savefig(DOCS / "canvas.png", dpi=110)
        print(f"wrote canvas.png to {DOCS}")
        return
    run = options.run
    for name, figure in UnlearnReport.from_json(run / "report.json").figures().items():
        figure.savefig(DOCS / f"{name}.png", dpi=110)
    before, after = EmbeddedClip().eval(), EmbeddedClip().eval()
    after.model.load_state_dict(load_file(run / "weights.safetensors"))
    style = UnlearnReport.from_json(run / "report.json").concept.removesuffix(" style")
    draw_answers(before, after, style).savefig(DOCS / "answers.png", dpi=110)
    kept = [things_on_forgotten_pictures(module, style) for module in (before, after)]
    print(f"things named right on {style} pictures: {kept[0]:.1%} before, {kept[1]:.1%} after")
    print(f"wrote {', '.join(sorted(path.name for path in DOCS.glob('*.png')))} to {DOCS}")


if __name__ == "__main__":
    main()
