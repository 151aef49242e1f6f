"""Write the folder of a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slug_lightning.distributed.processes import Processes
from slug_lightning.modules.causal_lm import CausalLMModule
from slug_lightning.reports.passages import PassagesReport
from slug_lightning.reports.run_files import CHECKPOINT, FIGURES, MODEL, PATCH, REPORT, WEIGHTS, patch_of
from slug_lightning.reports.several import JointReport
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.tensors.dtensor import whole
from slug_lightning.tensors.layers import plain_name
from slug_lightning.utils.files import atomic_write
from slug_lightning.utils.modules import unwrap_model


def save_run(
    folder: Path, report: UnlearnReport | JointReport, trainer: Trainer, module: LightningModule, processes: Processes
) -> None:
    """Write report and figures, and after an edit the patch, the checkpoint and the plain weights; all ranks call it.

    Each of several concepts also has a patch of its own. The plain weights are those of the wrapped model, under its own
    names, so that its library loads them; where the module has a `save_pretrained(folder)`, that writes them, to `model`. Each
    file is written atomically, and the report comes last: a folder with a report is complete.
    """
    by_itself = _saves_itself(module)
    weights = _first_names(unwrap_model(module), keep=processes.is_first) if report.patch is not None and not by_itself else {}
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        save_patches(folder, report)
        if report.patch is not None and by_itself:
            _save_pretrained(folder, module)
        elif report.patch is not None:
            with atomic_write(folder / WEIGHTS) as part:
                save_file(weights, part)
    _finish(folder, report, trainer, processes, report.patch is not None)


def save_patches(folder: Path, report: UnlearnReport | JointReport) -> None:
    """Write the patch, if there is one, and that of each of several concepts."""
    if report.patch is not None:
        report.patch.save(folder / PATCH)
        for name, single in report.unlearned.items() if isinstance(report, JointReport) else ():
            assert single.patch is not None
            single.patch.save(patch_of(folder, name))


def save_passages(folder: Path, report: PassagesReport, trainer: Trainer, module: CausalLMModule, processes: Processes) -> None:
    """Write report, figures, checkpoint, and the model as transformers loads it; all ranks call it."""
    model: Any = module.model
    state = _gathered(model.state_dict(), keep=processes.is_first)
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder / MODEL, state_dict=state)
        module.tokenizer.save_pretrained(folder / MODEL)
    _finish(folder, report, trainer, processes, True)


def _finish(
    folder: Path, report: UnlearnReport | JointReport | PassagesReport, trainer: Trainer, processes: Processes, edited: bool
) -> None:
    """Write figures, the checkpoint of an edited model, and at last the report."""
    if processes.is_first:
        for name, figure in report.figures().items():
            (folder / FIGURES / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / FIGURES / f"{name}.png") as part:
                figure.savefig(part, dpi=150, format="png")
    processes.all_gather_object("files", None)
    if edited:
        with processes.elsewhere():  # the Trainer has its own ways to wait for the others
            trainer.save_checkpoint(folder / CHECKPOINT, weights_only=False)
    if processes.is_first:
        save_report(folder, report)


def save_report(folder: Path, report: UnlearnReport | JointReport | PassagesReport) -> None:
    """Write the report of a run, in place of an earlier one."""
    with atomic_write(folder / REPORT) as part:
        report.to_json(part)


def _saves_itself(module: LightningModule) -> bool:
    """Whether a module can write the weights as its library loads them; of a sharded one, no rank has them all."""
    return hasattr(module, "save_pretrained") and not any(isinstance(p, DTensor) for p in module.parameters())


def _save_pretrained(folder: Path, module: Any) -> None:
    part = folder / f"{MODEL}.part"
    try:
        module.save_pretrained(part)
        part.replace(folder / MODEL)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _first_names(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather a model's tensors, tied ones once, under the name that stands first: the one that patches use.

    Unless `keep`, this rank only helps to gather what is sharded, one tensor after the other.
    """
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[object, str] = {}
    for name, tensor in held:
        first.setdefault(_identity(tensor), name)
    tied = {name for name, tensor in held if first[_identity(tensor)] != name}
    return _gathered({name: tensor for name, tensor in model.state_dict().items() if name not in tied}, keep)


def _gathered(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather tensors on the host, by their plain names; `keep` as in `_first_names`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        gathered = whole(tensor)
        if keep:
            tensors[plain_name(name)] = gathered.cpu().contiguous()
    return tensors


def _identity(tensor: Tensor) -> object:
    """The same for names of one memory, which an empty shard does not have."""
    if isinstance(tensor, DTensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape)
