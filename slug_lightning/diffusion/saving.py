"""Write a pipeline so that whoever loads it has the edit, whatever adapters are on it."""

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
    """Write a pipeline as plain diffusers loads it, its weights as they are without adapters.

    By itself, a pipeline with LoRA would write, of a text encoder, the adapters alone, and the UNet under names that no plain
    one has: both would come back without the edit. Here each adapter that is not fused lies beside, in
    `adapters/<adapter>/<component>/`, as `peft.PeftModel.from_pretrained` reads it.

    Args:
        pipeline: that of diffusers; afterwards it is as before.
        folder: where to.

    Example:
        >>> import tempfile
        >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
        >>> blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
        >>> unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
        >>> folder = tempfile.mkdtemp()
        >>> save_pipeline(DDIMPipeline(unet, DDIMScheduler()), folder)
        >>> sorted(path.name for path in Path(folder).iterdir())
        ['model_index.json', 'scheduler', 'unet']
    """
    written = _save_adapters(pipeline, Path(folder) / ADAPTERS)
    with _without_adapters(pipeline):
        pipeline.save_pretrained(folder)
    if written:
        rank_zero_info(
            f"The adapters {', '.join(written)} are not in the weights, but beside them in {Path(folder) / ADAPTERS}; load the "
            "pipeline, and them on top of it"
        )


def _save_adapters(pipeline: Any, folder: Path) -> list[str]:
    """Write adapters in PEFT's own layout, which keeps all of their settings; gives their names."""
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
            tensors = {f"base_model.model.{_plain(key)}": tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            save_file(tensors, there / "adapter_model.safetensors", metadata={"format": "pt"})
            written[name] = None
    return list(written)


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.")  # a PeftModel has it already


@contextmanager
def _without_adapters(pipeline: Any) -> Iterator[None]:
    """Inside, every module is the one that it was before adapters came around it."""
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
