"""Datamodules of the embedded pictures and texts."""
