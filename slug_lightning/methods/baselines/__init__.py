"""Other ways to forget, on the same footing as `slug_lightning.methods.SLUG`: the same data, bounds and report."""

from slug_lightning.methods.baselines.null_space import NullSpace

__all__ = ["NullSpace"]
