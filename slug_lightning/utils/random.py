"""Seeds that depend on the batch alone."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_for_batch(number: int) -> None:
    """Seed every generator by the batch's number, so that two passes differ by the edit alone; the caller restores the state.

    Where nothing but the CPU draws, `torch.manual_seed` would store the seed for a later device, each time with a formatted
    stack: nine tenths of the time of a tiny model's batches. Asking whether there is a CUDA device could break a later fork;
    a CUDA that is not initialised draws nothing.
    """
    device_draws = torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_available()
    seed = torch.manual_seed if device_draws else torch.default_generator.manual_seed
    seed(number)
    np.random.seed(number)
    random.seed(number)
