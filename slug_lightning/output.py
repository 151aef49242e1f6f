"""The folder of a run: what stays on disk, and that nothing in it is overwritten."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from slug_lightning.modules.base import own_model
from slug_lightning.report import UnlearnReport

REPORT, PATCH, CHECKPOINT, WEIGHTS, FIGURES = (
    "report.json",
    "patch.safetensors",
    "unlearned.ckpt",
    "weights.safetensors",
    "figures",
)


def fresh_folder(path: str | Path, *more: str) -> Path:
    """Give `path`, or `path-2`, `path-3`, ... where a run has been kept there already.

    Args:
        path: the folder asked for.
        more: names of further files that mark a folder as used.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> fresh_folder(root / "demo").name
        'demo'
        >>> (root / "demo").mkdir(), (root / "demo" / "report.json").touch()
        (None, None)
        >>> fresh_folder(root / "demo").name
        'demo-2'
    """
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()  # "." and ".." have no name to number
    number, free = 1, path
    while any((free / name).exists() for name in (REPORT, PATCH, CHECKPOINT, WEIGHTS, *more)):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def save_run(folder: Path, report: UnlearnReport, trainer: Trainer, module: LightningModule) -> None:
    """Write report and figures, and where something was unlearned the patch, the checkpoint and the plain weights.

    The plain weights are those of the wrapped model, under its own names, so that its library loads them.

    Args:
        folder: where to.
        report: of the run.
        trainer: writes the checkpoint in its own format.
        module: holds the edited model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if report.patch is not None:
        report.patch.save(folder / PATCH)
        trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)
        save_file(_first_names(own_model(module)), folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors leaves what only its owner reads
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, figure in report.figures().items():
        figure.savefig(folder / FIGURES / f"{name}.png", dpi=150)
    report.to_json(folder / REPORT)  # last: a folder with a report is whole


def _first_names(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors, tied ones once, under the name that stands first: the one that patches use."""
    found: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() == 0 or found.setdefault(key, name) == name:
            tensors[name] = tensor.contiguous()
    return tensors
