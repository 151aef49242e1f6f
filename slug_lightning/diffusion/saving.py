"""Save a pipeline so that loading it gives the edited weights, whatever adapters it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors.torch import save_file

from slug_lightning.utils.model_parts import adapted, parts_of
from slug_lightning.utils.names import file_name
from slug_lightning.utils.pretrained import WITH_ADAPTERS

ADAPTERS = "adapters"


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Save a pipeline as plain diffusers loads it, with its weights below any adapters; the pipeline stays as it is.

    diffusers would save only the adapters of a text encoder with LoRA, and the UNet under names that no plain one has: both
    would load without the edit. Here each adapter that is not fused goes to `adapters/<adapter>/<component>/`, as
    `peft.PeftModel.from_pretrained` reads it.
    """
    written = _save_adapters(pipeline, Path(folder) / ADAPTERS)
    with _without_adapters(pipeline):
        pipeline.save_pretrained(folder)
    if written:
        rank_zero_info(
            f"The adapters {', '.join(written)} are not part of the saved weights; they are in {Path(folder) / ADAPTERS}. Load "
            "the pipeline, then the adapters"
        )


def _save_adapters(pipeline: Any, folder: Path) -> list[str]:
    """Save the adapters in PEFT's own layout, which keeps all of their settings, and return their names."""
    written: dict[str, None] = {}
    part: Any
    for component, part in parts_of(pipeline).items():
        wrapped = [module for _, _, module in adapted(part)]
        fused = {name for module in wrapped for name in getattr(module, "merged_adapters", [])}
        for name in [name for name in part.peft_config if name not in fused] if wrapped else []:
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(part, adapter_name=name, save_embedding_layers=False)
            there = folder / file_name(name) / component
            part.peft_config[name].save_pretrained(there)
            prefix = "base_model.model."  # a PeftModel's keys have it already
            tensors = {prefix + key.removeprefix(prefix): tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            save_file(tensors, there / "adapter_model.safetensors", metadata={"format": "pt"})
            written[name] = None
    return list(written)


@contextmanager
def _without_adapters(pipeline: Any) -> Iterator[None]:
    """Put every module back in place of its adapter wrapper while the context lasts."""
    part: Any
    with ExitStack() as back:
        for component, part in parts_of(pipeline).items():
            for holder, name, module in list(adapted(part)):
                back.callback(setattr, holder, name, module)
                setattr(holder, name, module.base_layer)
            if vars(part).get(WITH_ADAPTERS):
                back.callback(setattr, part, WITH_ADAPTERS, vars(part)[WITH_ADAPTERS])
                setattr(part, WITH_ADAPTERS, False)
            if hasattr(part, "get_base_model"):  # a PeftModel
                back.callback(setattr, pipeline, component, part)
                setattr(pipeline, component, part.get_base_model())
        yield
