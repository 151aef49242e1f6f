"""The folder of a run: what stays on disk, and that nothing in it is overwritten."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.layers import plain_name
from slug_lightning.modules.base import own_model
from slug_lightning.patch import at_once
from slug_lightning.processes import Processes
from slug_lightning.report import UnlearnReport
from slug_lightning.sharded import whole

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


def save_run(folder: Path, report: UnlearnReport, trainer: Trainer, module: LightningModule, processes: Processes) -> None:
    """Write report and figures, and where something was unlearned the patch, the checkpoint and the plain weights.

    The plain weights are those of the wrapped model, under its own names, so that its library loads them. Each file is
    there whole or not at all, and the report comes last: a folder with a report is whole.

    Args:
        folder: where to.
        report: of the run.
        trainer: writes the checkpoint in its own format.
        module: holds the edited model.
        processes: of which the first writes; the others help to gather what is sharded.
    """
    weights = _first_names(own_model(module), keep=processes.is_first) if report.patch is not None else {}
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        if report.patch is not None:
            report.patch.save(folder / PATCH)
            with at_once(folder / WEIGHTS) as part:
                save_file(weights, part)
        (folder / FIGURES).mkdir(exist_ok=True)
        for name, figure in report.figures().items():
            with at_once(folder / FIGURES / f"{name}.png") as part:
                figure.savefig(part, dpi=150, format="png")
    processes.exchange("files", None)
    if report.patch is not None:
        with processes.elsewhere():  # the Trainer has its own ways to wait for the others
            trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)
    if processes.is_first:
        with at_once(folder / REPORT) as part:
            report.to_json(part)


def _first_names(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A model's tensors, whole, tied ones once, under the name that stands first: the one that patches use.

    Args:
        model: sharded or not.
        keep: whether this process wants them, or only helps to gather what is sharded, one after the other.
    """
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[object, str] = {}
    for name, tensor in held:
        first.setdefault(_identity(tensor), name)
    tied = {name for name, tensor in held if first[_identity(tensor)] != name}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            gathered = whole(tensor)
            if keep:
                tensors[plain_name(name)] = gathered.cpu().contiguous()
    return tensors


def _identity(tensor: Tensor) -> object:
    """The same for names of one memory; a shard may be empty, and has none of its own."""
    if isinstance(tensor, DTensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape)
