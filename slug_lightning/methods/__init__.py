"""How an edit is found: a `Method`, of which `SLUG` is one, and the harness around it."""

from slug_lightning.methods.base import Context, Method, Outcome
from slug_lightning.methods.harness import Runtime
from slug_lightning.methods.slug import SLUG
from slug_lightning.methods.trial import Trial

__all__ = ["SLUG", "Context", "Method", "Outcome", "Runtime", "Trial"]
