"""Random numbers that depend on nothing but a number."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_for_batch(number: int) -> None:
    """Random numbers that depend on the batch's number alone: two passes differ by the edit, and not by luck.

    The caller puts the random state back.

    Example:
        >>> with torch.random.fork_rng():
        ...     draws = [seed_for_batch(number) or torch.rand(1).item() for number in (3, 4, 3)]
        >>> draws[0] == draws[2] != draws[1]
        True
    """
    seed = torch.manual_seed if _accelerator_draws() else torch.default_generator.manual_seed
    seed(number)
    np.random.seed(number)
    random.seed(number)


def _accelerator_draws() -> bool:
    """Whether a device other than the CPU may draw random numbers.

    Where none does, `torch.manual_seed` keeps the seed in case one is used later, each time with a formatted stack: nine tenths
    of the time of a tiny model's batches. Asking whether there is a CUDA device could spoil a later fork; a CUDA that nobody has
    initialised draws nothing.
    """
    return torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_available()
