"""CLIP models of open_clip and transformers."""
