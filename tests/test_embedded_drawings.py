"""The embedded drawings: of the things that the CLIP knows, and of those that it has never seen."""

from __future__ import annotations

import open_clip
import torch

from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import load_drawings, load_unseen


def test_ten_more_things_in_the_same_five_styles():
    known, unseen = load_drawings(), load_unseen()
    assert len(unseen.thing_names) == 10 and unseen.style_names == known.style_names
    found = torch.stack([unseen.things, unseen.styles], dim=1).tolist()
    assert sorted(found) == [[thing, style] for thing in range(10) for style in range(5)]
    assert unseen.pictures.dtype == torch.uint8 and unseen.pictures.shape == (50, 4, 64, 64)


def test_the_clip_knows_neither_the_names_nor_the_pictures():
    known, unseen = load_drawings(), load_unseen()
    words = {word for name in known.thing_names for word in name.split()}
    assert not any(words & set(name.split()) for name in unseen.thing_names)
    tokenize = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    assert len(tokenize(unseen.thing_names).unique(dim=0)) == 1  # all unknown words
    assert not any((known.pictures == picture).flatten(1).all(1).any() for picture in unseen.pictures)
