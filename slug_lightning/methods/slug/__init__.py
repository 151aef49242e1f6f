"""SLUG: one layer, one searched step along its forget gradient (arXiv 2407.11867)."""

from slug_lightning.methods.slug.config import SLUG

__all__ = ["SLUG"]
