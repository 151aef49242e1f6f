"""Datamodules of the embedded drawings and texts."""
