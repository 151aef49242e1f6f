"""Vision-language models, edited in the vision tower."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.utils.rnn import pad_sequence

from slug_lightning.clip.models import contrastive_loss, matching_loss
from slug_lightning.embedded import CLIP, VLM
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.models import cache_argument, cache_of
from slug_lightning.modules.base import UnlearnModule
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.objective.samples import MAX_SAMPLES
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.vlm.answers import mentions
from slug_lightning.vlm.loading import load_vlm, refuse_unfit
from slug_lightning.vlm.prompts import QuestionEncoder
from slug_lightning.vlm.towers import VisionSourceClip, by_depth, freeze_unseen, image_features, vision_tower


class VLMModule(UnlearnModule):
    """Wrap an image-text-to-text model of transformers to forget what pictures show: a person, an object, a style.

    Candidates are the matrices of its vision tower that the language model gets to see, as in SLUG (arXiv 2407.11867, section
    4.4); name others with `layers=`, such as "*multi_modal_projector*". All else is frozen. The early, middle and late third
    of the tower's blocks are ranked separately: an edit of an early block damages most of what later blocks read, but its
    gradients are as large or larger, so that ranked together no late block might be left on the front.

    For the gradient, a batch is `{"index", "image", "question", "answer", "text"}`: "index" is any tensor of B numbers, by which
    samples are counted; pictures are uint8, `[B, 3, H, W]` (then "index" may be missing) or a list of `[3, H, W]`; the rest is
    lists of B strings. A CLIP compares pictures with "text". Near data are found by "shows", a list of dicts of what a picture
    shows by kind, such as `{"thing": "cat"}`, or without it by "kind" and "aliases". On the validation and test splits a batch
    is `{"image", "question", "answer", "aliases", "kind"}`: `answer_accuracy` is how many answers mention one of the aliases
    (whole words, whatever the case, accents and signs), and `<kind>_accuracy` the same for the questions of a kind. With
    "wording", a list of names such as "thing_2", `<wording>_accuracy` is logged, too: `answer_accuracy` is a mean over
    wordings, so that under one of them what is forgotten may still be named. A callback with all of them in its
    `forget_metric`, and `forget_target=0.05`, looks at each.
    `question_batch` of `slug_lightning.datamodules.image_text.questions` makes such batches.

    Answers are generated greedily. If a batch has "choices", lists of possible answers, the likeliest one is taken instead: one
    forward pass, and one over the choices alone, in place of one per new token. That is cheaper for a large model with long
    answers, not for a small one; and few choices are often right by chance: set `forget_target` accordingly.

    Args:
        model: name or folder of such a model (LLaVA, LLaVA-NeXT, Idefics3, SmolVLM, PaliGemma, Qwen-VL, …), or the model.
        processor: name, folder or object; default: the one stored with the model.
        objective: "answers": the loss of the model's own answers. "clip": how well pictures fit their texts for the CLIP or
            SigLIP that the tower comes from, without the language model: far cheaper.
        clip: that CLIP, by name: "hf:openai/clip-vit-large-patch14-336", or as open_clip names a folder or a repository.
        dtype: of the weights, if the model is loaded by name.
        max_new_tokens: maximum length of an answer.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.
        route: deprecated, the former name of `objective`.

    Raises:
        UnlearnError: if the model's vision tower is missing or cannot be edited, or the processor or `clip` does not fit it.

    Example:
        >>> from slug_lightning.embedded import VLM
        >>> module = VLMModule(VLM)
        >>> batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "question": ["what is this?"] * 2}
        >>> len(module.answer(batch))
        2
    """

    model: Any
    forget_metric: Optional[str] = "answer_accuracy"
    retain_metric: Optional[str] = "answer_accuracy"
    forget_target: Optional[float] = 0.05

    def __init__(
        self,
        model: Union[str, Path, nn.Module],
        *,
        processor: Any = None,
        objective: Literal["answers", "clip"] = "answers",
        clip: Optional[str] = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        max_new_tokens: int = 16,
        learning_rate: float = 1e-5,
        route: Optional[Literal["answers", "clip"]] = None,
    ) -> None:
        if route is not None:
            warnings.warn("route is deprecated and will be removed; use objective", FutureWarning, stacklevel=2)
            objective = route
        if objective not in ("answers", "clip"):
            raise UnlearnError(f"objective must be 'answers' or 'clip', got {objective!r}")
        if objective == "clip" and clip is None:
            raise UnlearnError(
                "clip: objective='clip' compares pictures with texts; give the CLIP or SigLIP that the vision tower comes from "
                '(LLaVA 1.5: "hf:openai/clip-vit-large-patch14-336"), or objective="answers"'
            )
        loaded, processor = load_vlm(model, processor, getattr(torch, dtype))
        super().__init__(loaded, loss=None, learning_rate=learning_rate)
        self.strict_loading = False  # checkpoints hold only what may be edited
        self.question_encoder = QuestionEncoder(loaded, processor)
        self.tower_name, tower = vision_tower(loaded)
        refuse_unfit(loaded, tower, differentiates=objective == "answers")
        freeze_unseen(loaded, tower, self.question_encoder)
        self.towers = {part: [f"model.{self.tower_name}.{some}" for some in own] for part, own in by_depth(tower).items()}
        self.clip = VisionSourceClip(clip, tower, processor.image_processor) if objective == "clip" and clip else None
        self.max_new_tokens = max_new_tokens
        self._answered: list[tuple[str, list[str]]] = []

    def configure_model(self) -> None:
        """Refuse FSDP2: ranks generate answers of different lengths, and would wait for each other."""
        if self.device_mesh is not None:
            raise UnlearnError("strategy: a vision-language model cannot be sharded over devices; use ddp, or one device")

    def forget_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of a forget batch, of answers or `mean(1 - cos)` of pictures and texts; the edit raises it."""
        _refuse_miscounted(batch)
        return self.answer_loss(batch) if self.clip is None else matching_loss(self.clip, dict(batch))

    def retain_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of a retain batch, of answers or the contrastive one; the edit keeps it low."""
        _refuse_miscounted(batch)
        return self.answer_loss(batch) if self.clip is None else contrastive_loss(self.clip, dict(batch))

    def embed(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the mean of what the language model reads of each picture, `[B, D]`, which it is not run for."""
        inputs = self._asked(batch)
        tokens = torch.cat([found.flatten(0, -2) for found in image_features(self.model, inputs)])
        counts = (inputs["input_ids"] == self.question_encoder.image_token).sum(1)  # with tiles, not the same of all
        return torch.stack([own.float().mean(0) for own in tokens.split(counts.tolist())])

    def labels(self, batch: Mapping[str, Any]) -> dict[str, list[Optional[str]]]:
        """Return by kind what the pictures show, B texts, None where that isn't known: "shows", or what a right answer names.

        Without "shows", the kinds are those of the questions. Where several names count, or answers are worded in several ways,
        the first of the aliases stands for them, so that wordings are not taken for concepts.
        """
        if "shows" in batch:
            kinds = sorted({kind for shown in batch["shows"] for kind in shown})
            return {kind: [shown.get(kind) for shown in batch["shows"]] for kind in kinds}
        names = [some[0] for some in batch.get("aliases", ())] or batch["answer"]
        asked = batch.get("kind", ())
        return {
            kind: [name if own == kind else None for own, name in zip(asked, names, strict=True)] for kind in sorted(set(asked))
        }

    def answer_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean over samples of the mean negative log-likelihood of an answer's tokens, in nats."""
        inputs = self._asked(batch)
        inputs, labels = self.question_encoder.answered(inputs, batch["question"], batch["answer"])
        length = labels.shape[1]
        logits = self.model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, -length - 1 : -1]
        nll = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # 0 where labels are -100
        return (nll.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()

    @torch.no_grad()
    def answer(self, batch: Mapping[str, Any]) -> list[str]:
        """Answer the questions of a batch: generated greedily, or the likeliest of their choices."""
        if "choices" not in batch:
            return self._generate(batch)
        return [some[int(likely.argmax())] for some, likely in zip(batch["choices"], self._likely(batch), strict=True)]

    def scores(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return whether each answer mentions an alias, `[B]`: of all questions, by kind and by wording; NaN for others."""
        _refuse_miscounted(batch)
        self._answered = list(zip(self.answer(batch), batch["aliases"], strict=True))
        right = [float(mentions(answer, aliases)) for answer, aliases in self._answered]
        found = {"answer_accuracy": torch.tensor(right, device=self.device)}
        for column in ("kind", "wording"):
            for name in dict.fromkeys(batch.get(column, ())):
                if f"{name}_accuracy" in found:
                    raise UnlearnError(f"{column}: '{name}_accuracy' is that of other questions; rename the {column} {name!r}")
                other = torch.tensor([one != name for one in batch[column]], device=self.device)
                found[f"{name}_accuracy"] = found["answer_accuracy"].masked_fill(other, torch.nan)
        return found

    def nothing_to_forget(self) -> str:
        """Return a hint for the callback's message if no answer mentioned what should be forgotten, else ""."""
        if not self._answered or any(mentions(answer, aliases) for answer, aliases in self._answered):
            return ""
        said = ", ".join(repr(answer) for answer in dict.fromkeys(answer for answer, _ in self._answered[:3]))
        wanted = sorted({alias for _, aliases in self._answered for alias in aliases})
        return f"aliases: the model answers {said}, which contains none of {wanted}; list the names that it uses itself"

    def gallery_step(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[Tensor, list[str]]:
        """Take a few pictures of an evaluation batch, evenly spaced: `[n, 3, H, W]` in [0, 1], each with question and answer."""
        count = len(batch["question"])
        rows = torch.linspace(0, count - 1, min(MAX_SAMPLES, count)).long().tolist()
        some = {name: [batch[name][row] for row in rows] for name in ("image", "question")}
        side = max(max(image.shape[1:]) for image in some["image"])
        pictures = [interpolate(image[None].float(), (side, side)) for image in some["image"]]
        answers = self._generate(some)
        return torch.cat(pictures) / 255, [f"{q} → {a}" for q, a in zip(some["question"], answers, strict=True)]

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write model and processor as plain transformers loads them."""
        self.model.save_pretrained(folder)
        self.question_encoder.processor.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out all but the tower and other edited tensors."""
        edited = UnlearnPatch.active(self.model)
        names = {f"model.{name}" for name in (edited.base if edited else ())}
        tower, tensors = f"model.{self.tower_name}.", checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: p for name, p in tensors.items() if name.startswith(tower) or name in names}

    def _asked(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Encode the questions of a batch, on the model's device and in its precision."""
        inputs = self.question_encoder.ask(batch["image"], batch["question"])
        dtype = next(p for name, p in self.model.named_parameters() if name.startswith(self.tower_name)).dtype
        return {name: t.to(self.device, dtype if t.is_floating_point() else None) for name, t in inputs.items()}

    def _generate(self, batch: Mapping[str, Any]) -> list[str]:
        inputs, tokenizer = self._asked(batch), self.question_encoder.tokenizer
        found = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        own = found[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(own, skip_special_tokens=True)]

    def _likely(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Compute the log-likelihood of each question's choices, summed over tokens; the question is read once for all."""
        inputs = self._asked(batch)
        read = self.model(**inputs, use_cache=True, logits_to_keep=1)
        choices = [(row, choice) for row, some in enumerate(batch["choices"]) for choice in some]
        tokens = [self.question_encoder.tokens_of(batch["question"][row], choice) for row, choice in choices]
        labels = pad_sequence(tokens, batch_first=True, padding_value=-100).to(self.device)
        rows = torch.tensor([row for row, _ in choices], device=self.device)
        cache = cache_of(read)
        cache.batch_select_indices(rows)
        mask = torch.cat([inputs["attention_mask"][rows], (labels != -100).to(inputs["attention_mask"].dtype)], dim=1)
        more: dict[str, Any] = {"attention_mask": mask, cache_argument(self.model): cache, "use_cache": True}
        deltas = getattr(self.model.model, "rope_deltas", None)
        if deltas is not None:  # Qwen-VL: a picture spans fewer positions than tokens
            positions = (mask.cumsum(1) - 1)[:, -labels.shape[1] :] + deltas[rows]
            more["position_ids"] = positions.expand(3, -1, -1)
        rest = self.model(input_ids=labels.clamp(min=0), **more).logits.float()
        logits = torch.cat([read.logits[:, -1:].float()[rows], rest[:, :-1]], dim=1)
        likely = -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        return likely.split([len(some) for some in batch["choices"]])


def _refuse_miscounted(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that would be weighted by another number of samples."""
    asked, counted = len(batch["question"]), batch_samples(batch)
    if asked != counted:
        raise UnlearnError(
            f'image: a batch of {asked} questions counts as {counted} samples; put a tensor "index" '
            "of their numbers first, as question_batch of slug_lightning.datamodules.image_text.questions does"
        )


class EmbeddedVLM(VLMModule):
    """Load the small vision-language model that ships with the package. It answers questions about emoji only.

    It has the vision tower of the embedded CLIP, and says which thing a picture shows, in which style, and how many there are.
    The arguments are those of `VLMModule`.

    Example:
        >>> EmbeddedVLM().forget_metric
        'answer_accuracy'
    """

    def __init__(
        self,
        objective: Literal["answers", "clip"] = "answers",
        *,
        learning_rate: float = 1e-5,
        route: Optional[Literal["answers", "clip"]] = None,
    ) -> None:
        super().__init__(VLM, objective=objective, clip=f"local-dir:{CLIP}", learning_rate=learning_rate, route=route)
