"""The pictures, texts and small models that ship with the package; SOURCES.md names every licence."""

from pathlib import Path

HERE = Path(__file__).parent
SHARD = HERE / "emoji.tar"
"""Webdataset shard: for each drawing `.png` (RGBA, 64 px), `.txt` (caption) and `.json` (thing, style)."""
UNSEEN = HERE / "unseen.tar"
"""The same of ten things that the embedded CLIP has never seen."""
CLIP = HERE / "clip"
"""Folder of the embedded CLIP, in open_clip's `local-dir:` layout."""
LM = HERE / "lm"
"""Folder of the embedded causal language model and its tokenizer, as transformers' `from_pretrained` reads it."""
PASSAGES = LM / "passages.jsonl"
"""One passage of at least 64 tokens per line: `text`, `part` and `topic` of Python's language reference.

The model recites the part `recited`, was trained now and then on `kept`, and never saw `unseen`.
"""
CANVAS = HERE / "canvas"
"""Folder of the miniature UnlearnCanvas: `pipeline` as diffusers reads it, classifiers `style` and `thing` as transformers do."""
VLM = HERE / "vlm"
"""Folder of the embedded vision-language model, a small LLaVA, and its processor, as transformers' `from_pretrained` reads it."""
