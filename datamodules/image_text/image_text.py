"""Image-text pairs to forget and to retain, from files, with an open_clip model's preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from slug_lightning.datamodules.base import UnlearnDataModule, for_concepts
from slug_lightning.datamodules.image_text.pairs import (
    Columns,
    ImageTextPairs,
    Tokenize,
    Transform,
    open_pairs,
    refuse_shared,
    sources_by_concept,
    whole_words,
)
from slug_lightning.errors import UnlearnError
from slug_lightning.utils.names import by_concept, labelled, listed
from slug_lightning.utils.optional_imports import import_optional

CONFIG = "open_clip_config.json"
Texts = str | list[str]


class ImageTextDataModule(UnlearnDataModule):
    """Image-text pairs to forget and to retain, from files.

    Either `forget` and `retain` are two sources, or `data` is one, which `concept` divides by its captions. A source is a `.csv`
    or `.tsv` file with image paths relative to its folder, a folder with one such file, or tar shards (see
    `ImageTextShards`). Samples are as `ImageTextPairs` has them, without random augmentation.

    Args:
        forget: source of the pairs to forget; for several concepts, a dict of sources by the concept's name.
        retain: source of the pairs to retain.
        data: one source for both. It is read twice, however many concepts there are.
        concept: with `data`: the name of the concept to forget, and its other names. A pair whose caption contains any of
            them as whole words, ignoring case, is forgotten; so list plurals too. For several concepts, a dict of such names
            by the concept. A pair may belong to several; one that belongs to none is retained.
        model: an open_clip model's name, or `local-dir:` and a folder, or `hf-hub:` and a repository, whose
            preprocessing and tokenizer are used; no weights are loaded.
        pretrained: open_clip's tag of the model's weights, or a file; some weights have a normalisation of their own.
        transform: instead of the model's: makes a float tensor `[3, H, W]` of a PIL image.
        tokenize: instead of the model's: makes token ids `[N, T]` of a list of N texts.
        image_column: the CSV's column of image paths.
        caption_column: the CSV's column of captions.
        delimiter: the CSV's delimiter; None detects it.
        label_columns: columns of a CSV, or fields of the `.json` in a shard, with integer labels for the samples.
        labels: class names by label name, looked for in the captions; see `ImageTextPairs`.
        limit: retain only the first so many pairs.
        batch_size: samples in a batch. A contrastive loss depends on it.
        num_workers: worker processes of each loader.
        seed: of the splits and of the order of samples within them.

    Raises:
        UnlearnError: if an argument is missing or two contradict each other; in `setup`, if a source cannot be read, or if
            nothing is left to forget or to retain.

    Example:
        >>> import torch
        >>> from slug_lightning.embedded import SHARD
        >>> data = ImageTextDataModule(
        ...     data=str(SHARD), concept={"airplane": "airplane", "felines": ["cat", "tiger"]}, limit=100,
        ...     transform=lambda image: torch.zeros(3, *image.size), tokenize=list,
        ... )
        >>> data.setup("fit")
        >>> {name: sum(len(data.forget_dataloader(split, name).dataset) for split in ("train", "val", "test"))
        ...  for name in data.concepts}
        {'airplane': 5, 'felines': 10}
    """

    combinations: tuple[set[str], ...] = ({"forget", "retain"}, {"data", "concept"})
    """Which of the sources may be given together."""

    def __init__(
        self,
        *,
        forget: str | dict[str, str] | None = None,
        retain: str | None = None,
        data: str | None = None,
        concept: Texts | dict[str, Texts] | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        transform: Transform | None = None,
        tokenize: Tokenize | None = None,
        image_column: str = "filepath",
        caption_column: str = "title",
        delimiter: str | None = None,
        label_columns: list[str] | None = None,
        labels: dict[str, list[str]] | None = None,
        limit: int = 10_000,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        sources = {"forget": forget, "retain": retain, "data": data, "concept": concept}
        given = {name for name, source in sources.items() if source is not None}
        if given not in self.combinations:
            raise UnlearnError(
                "give forget and retain (two sources), or data and concept (one source to divide); "
                f"given: {', '.join(sorted(given)) or 'none'}"
            )
        self.forget = {} if forget is None else sources_by_concept(forget, retain)
        words = {} if concept is None else by_concept("concept", concept)
        self.words: dict[str | None, list[str]] = {name: [own] if isinstance(own, str) else own for name, own in words.items()}
        self.finders = {name: whole_words(labelled("concept", name), own) for name, own in self.words.items()}
        for_concepts("concept", concept, self.forget or self.words)
        if model is None and (transform is None or tokenize is None):
            raise UnlearnError("model: give an open_clip model, or both transform and tokenize")
        if reserved := [name for name in (*(label_columns or ()), *(labels or ())) if name in ("image", "text")]:
            raise UnlearnError(f"labels: {reserved[0]!r} is the name of another part of a sample; choose another")
        self.retain, self.data, self.concept = retain, data, [concept] if isinstance(concept, str) else concept
        self.model, self.pretrained, self.transform, self.tokenize = model, pretrained, transform, tokenize
        self.columns = Columns(image_column, caption_column, delimiter, label_columns or ())
        self.labels, self.limit = labels, limit

    def setup(self, stage: str | None = None) -> None:
        """Read the sources and divide them; further calls change nothing."""
        if self.notes:
            return
        if self.model is not None and (self.transform is None or self.tokenize is None):
            transform, tokenize = clip_preprocessing(self.model, self.pretrained)
            self.transform, self.tokenize = self.transform or transform, self.tokenize or tokenize
        forget: Mapping[str | None, Dataset]
        if self.retain is not None:
            forget = opened = {name: self._open(labelled("forget", name), source) for name, source in self.forget.items()}
            retain = self._open("retain", self.retain, limit=self.limit)
            refuse_shared("pairs", {name: _keys(pairs) for name, pairs in opened.items()}, _keys(retain))
        else:
            forget, retain = self._divide(self.data or "")
        for concept, pairs in forget.items():
            self.set_pairs("forget", pairs, concept)
        self.set_pairs("retain", retain)
        if len(retain) == self.limit:
            self.notes["retain"] += f"; only the first {self.limit} pairs were read (limit)"

    def set_pairs(self, kind: str, pairs: Dataset, concept: str | None = None) -> None:
        """Set the data of one set to pairs; a subclass may make other samples of some."""
        self.set_parts(kind, pairs, concept=concept)

    def _divide(self, data: str) -> tuple[dict[str | None, Dataset], ImageTextPairs]:
        """Return the pairs of each concept, and those of none, from one source."""
        every = [word for own in self.words.values() for word in own]
        named = whole_words("concept", every)
        forget = self._open("data", data, where=named.search)
        chosen: dict[str | None, Dataset] = {}
        for concept, finder in self.finders.items():
            own = [i for i, pair in enumerate(forget.pairs) if finder.search(pair.caption)]
            if not own:
                which, words = labelled("concept", concept), self.words[concept]
                raise UnlearnError(f"{which}: no caption of {data} contains any of {words} as whole words; add other names")
            chosen[concept] = forget if concept is None else Subset(forget, own)
        retain = self._open("data", data, where=lambda caption: not named.search(caption), limit=self.limit)
        if not len(retain):
            raise UnlearnError(f"concept: every caption of {data} contains one of {listed(every)}; add pairs to retain")
        return chosen, retain

    def _open(self, argument: str, source: str, **choice: Any) -> ImageTextPairs:
        """Return the dataset of one source; `choice` is `where` and `limit`."""
        tools: dict[str, Any] = {"transform": self.transform, "tokenize": self.tokenize}  # set by now
        return ImageTextPairs(open_pairs(argument, source, self.columns), labels=self.labels, **tools, **choice)


def _keys(pairs: ImageTextPairs) -> list[tuple[str, str]]:
    return [(pair.caption, pair.name) for pair in pairs.pairs]


def clip_preprocessing(model: str, pretrained: str | None = None) -> tuple[Transform, Tokenize]:
    """Load an open_clip model's preprocessing (of a PIL image, to float32 `[3, H, W]`) and tokenizer, without its weights."""
    open_clip = import_optional("open_clip", "clip")
    transforms = open_clip.transform
    schema, name = open_clip.factory.parse_model_name(model)
    if schema is None:
        model = name.replace("/", "-")
        if model not in open_clip.list_models():
            raise UnlearnError(f"model: open_clip has no {model!r}; see open_clip.list_models()")
        preprocess = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
        if pretrained and not preprocess and not Path(pretrained).is_file():
            tags = open_clip.list_pretrained_tags_by_model(model)
            raise UnlearnError(f"pretrained: must be a file or one of {model}'s tags, {tags}, got {pretrained!r}")
        architecture = open_clip.get_model_config(model)
    else:
        download = open_clip.pretrained.download_pretrained_from_hf
        file = Path(name) / CONFIG if schema == "local-dir" else Path(download(name, filename=CONFIG))
        if not file.is_file():
            raise UnlearnError(f"model: {file} does not exist; local-dir: must name the folder of an open_clip model")
        config = json.loads(file.read_text(encoding="utf-8"))
        architecture, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
    settings = transforms.merge_preprocess_dict(transforms.PreprocessCfg(), preprocess)
    settings["size"] = architecture["vision_cfg"].get("image_size", settings["size"])
    transform = transforms.image_transform_v2(transforms.PreprocessCfg(**settings), is_train=False)
    return transform, open_clip.get_tokenizer(model)
