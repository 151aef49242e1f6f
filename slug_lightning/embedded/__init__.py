"""The pictures and the small CLIP that ship with the package; SOURCES.md beside this file names every licence."""

from pathlib import Path

HERE = Path(__file__).parent
SHARD = HERE / "emoji.tar"
"""Webdataset shard: one drawing a key, as `.png` (RGBA, 64 px), `.txt` (caption) and `.json` (thing, style)."""
CLIP = HERE / "clip"
"""Folder of the embedded CLIP, in open_clip's `local-dir:` layout."""
