"""Vision-language models that no longer recognise what they are to forget, by an edit of the part that sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from slug_lightning.clip.models import contrastive_loss, matching_loss
from slug_lightning.embedded import CLIP, VLM
from slug_lightning.errors import UnlearnError
from slug_lightning.lm.kv_cache import cache_argument, cache_of
from slug_lightning.modules.base import UnlearnModule
from slug_lightning.objective.batch_utils import batch_samples
from slug_lightning.objective.samples import MOST
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.vlm.answers import names
from slug_lightning.vlm.loading import refuse_unfit
from slug_lightning.vlm.pretrained import load_vlm
from slug_lightning.vlm.prompts import Prompts
from slug_lightning.vlm.towers import SourceClip, by_depth, freeze_unseen, vision_tower


class VLMModule(UnlearnModule):
    """An image-text-to-text model of transformers that is to forget what pictures show: a person, a thing, a style.

    Candidates are the matrices of its vision tower that the language model gets to see, as in SLUG (arXiv 2407.11867, section
    4.4); name others with `layers=`, such as "*multi_modal_projector*". The rest is frozen: the language model is run forward,
    and backward only to bring the gradient to the tower. The early, the middle and the late third of the tower's blocks are
    ranked apart, as the towers of a CLIP are: an edit of an early block that forgets harms most of what the later ones read,
    but gradients are as large there or larger, so that ranked together no late block may be left on the front.

    For the gradient, a batch is `{"index", "image", "question", "answer", "text"}`: "index" is any tensor of B numbers, by which
    samples are counted; pictures are uint8, `[B, 3, H, W]` (then "index" may be missing) or a list of `[3, H, W]`; the rest is
    lists of B strings. "text" is what a CLIP is to compare a picture with. `question_batch` of
    `slug_lightning.datamodules.image_text.questions` makes such batches. In search and report it is
    `{"image", "question", "answer", "aliases", "kind"}`: `answer_accuracy` is how many answers name what is asked for by any of
    its aliases (whole words, whatever the case, accents and signs), and `<kind>_accuracy` that of the questions of a kind. Of
    what is to be forgotten this says how often it is named still.

    Answers are generated, greedily and in batches. Where a batch has "choices", lists of possible answers of which the
    likeliest is taken, nothing is generated: one forward pass, and one over the choices alone, in place of one for every new
    token. That is cheaper for a large model with long answers, not for a small one; and a choice among few is often right by
    chance: give `forget_target` accordingly.

    Args:
        model: name or folder of such a model (LLaVA, LLaVA-NeXT, Idefics3, SmolVLM, PaliGemma, Qwen-VL, …), or the model.
        processor: name, folder or object; default: the one that belongs to `model` by its name.
        route: "answers": the loss of the model's own answers. "clip": how well pictures fit their texts for the CLIP or
            SigLIP that the tower comes from, without the language model: far cheaper.
        clip: that CLIP, by name: "hf:openai/clip-vit-large-patch14-336", or as open_clip names a folder or a repository.
        dtype: of the weights, if the model is loaded by name: "float32", "float16" or "bfloat16".
        max_new_tokens: how long an answer may be.
        learning_rate: of AdamW, used only by a callback with `then="continue"`.

    Raises:
        UnlearnError: if the model has no vision tower of its own, or one that cannot be edited; if its processor does not fit;
            or if the CLIP is another one.

    Example:
        >>> from slug_lightning.embedded import VLM
        >>> module = VLMModule(VLM)
        >>> batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "question": ["what is this?"] * 2}
        >>> module.forget_step({**batch, "answer": ["cat", "alarm clock"]}, 0).requires_grad
        True
        >>> len(module.answer(batch))
        2
    """

    forget_metric: Optional[str] = "answer_accuracy"
    retain_metric: Optional[str] = "answer_accuracy"
    forget_target: Optional[float] = 0.05

    def __init__(
        self,
        model: Union[str, Path, nn.Module],
        *,
        processor: Any = None,
        route: Literal["answers", "clip"] = "answers",
        clip: Optional[str] = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        max_new_tokens: int = 16,
        learning_rate: float = 1e-5,
    ) -> None:
        if route not in ("answers", "clip"):
            raise UnlearnError(f"route: {route!r} is not known; give 'answers' or 'clip'")
        if route == "clip" and clip is None:
            raise UnlearnError(
                "clip: route='clip' compares pictures with texts; give the CLIP or SigLIP that the vision tower comes from "
                '(LLaVA 1.5: "hf:openai/clip-vit-large-patch14-336"), or route="answers"'
            )
        loaded, processor = load_vlm(model, processor, getattr(torch, dtype))
        super().__init__(loaded, loss=_never, learning_rate=learning_rate)
        self.strict_loading = False  # checkpoints hold what may be edited, and not the rest
        self.prompts = Prompts(loaded, processor)
        self.tower_name, tower = vision_tower(loaded)
        refuse_unfit(loaded, tower, differentiates=route == "answers")
        freeze_unseen(loaded, tower, self.prompts)
        self.towers = {part: [f"model.{self.tower_name}.{some}" for some in own] for part, own in by_depth(tower).items()}
        self.clip = SourceClip(clip, tower, processor.image_processor) if route == "clip" and clip else None
        self.max_new_tokens = max_new_tokens
        self._said: list[tuple[str, list[str]]] = []

    def configure_model(self) -> None:
        """Refuse to be sharded: processes generate answers of different lengths, and would wait for each other."""
        if self.device_mesh is not None:
            raise UnlearnError("strategy: a vision-language model cannot be sharded over devices; use ddp, or one device")

    def forget_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a forget batch, which the edit raises: that of the answers, or `mean(1 - cos)` of pictures and texts."""
        _refuse_miscounted(batch)
        return self.answer_loss(batch) if self.clip is None else matching_loss(self.clip, dict(batch))

    def retain_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a retain batch, which the edit keeps low: that of the answers, or the contrastive one."""
        _refuse_miscounted(batch)
        return self.answer_loss(batch) if self.clip is None else contrastive_loss(self.clip, dict(batch))

    def answer_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean over samples of the mean negative log-likelihood of the tokens of an answer, in nats."""
        inputs = self._asked(batch)
        inputs, labels = self.prompts.answered(inputs, batch["question"], batch["answer"])
        lost = self._nll(inputs, labels)
        return (lost.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()

    @torch.no_grad()
    def answer(self, batch: Mapping[str, Any]) -> list[str]:
        """What the model says to the questions of a batch: generated greedily, or the likeliest of its choices."""
        return self._choose(batch) if "choices" in batch else self._generate(batch)

    def scores(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Whether each answer names what was asked for, `[B]`, of all questions and by kind; NaN for those of another kind."""
        _refuse_miscounted(batch)
        said = self.answer(batch)
        self._said = list(zip(said, batch["aliases"], strict=True))
        right = [float(names(answer, aliases)) for answer, aliases in self._said]
        found = {"answer_accuracy": torch.tensor(right, device=self.device)}
        for kind in dict.fromkeys(batch.get("kind", ())):
            if kind == "answer":
                raise UnlearnError("kind: 'answer_accuracy' is that of all questions; call this kind something else")
            other = torch.tensor([one != kind for one in batch["kind"]], device=self.device)
            found[f"{kind}_accuracy"] = found["answer_accuracy"].masked_fill(other, torch.nan)
        return found

    def nothing_to_forget(self) -> str:
        """What to look at if no answer named what is to be forgotten, else nothing; the callback adds it to its message."""
        if not self._said or any(names(answer, aliases) for answer, aliases in self._said):
            return ""
        said = ", ".join(repr(answer) for answer in dict.fromkeys(answer for answer, _ in self._said[:3]))
        wanted = sorted({alias for _, aliases in self._said for alias in aliases})
        return f"aliases: the model says {said}, in which none of {wanted} stands; list the names that it uses itself"

    def gallery_step(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[Tensor, list[str]]:
        """A few pictures of an evaluation batch, evenly spaced: `[n, 3, H, W]` in [0, 1], and question and answer of each."""
        count = len(batch["question"])
        rows = torch.linspace(0, count - 1, min(MOST, count)).long().tolist()
        some = {name: [batch[name][row] for row in rows] for name in ("image", "question")}
        side = max(max(image.shape[1:]) for image in some["image"])
        pictures = [interpolate(image[None].float(), (side, side)) for image in some["image"]]
        answers = self._generate(some)
        return torch.cat(pictures) / 255, [f"{q} → {a}" for q, a in zip(some["question"], answers, strict=True)]

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write model and processor as plain transformers loads them."""
        model: Any = self.model
        model.save_pretrained(folder)
        self.prompts.processor.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is as it was: all but the tower, and what was edited."""
        edited = UnlearnPatch.active(self.model)
        names = {f"model.{name}" for name in (edited.base if edited else ())}
        kept = {
            name: p
            for name, p in checkpoint["state_dict"].items()
            if name.startswith(f"model.{self.tower_name}.") or name in names
        }
        checkpoint["state_dict"] = kept

    # ---- how answers come about

    def _asked(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The questions of a batch as the model reads them, on its device and in its precision."""
        inputs = self.prompts.ask(batch["image"], batch["question"])
        dtype = next(p for name, p in self.model.named_parameters() if name.startswith(self.tower_name)).dtype
        return {name: t.to(self.device, dtype if t.is_floating_point() else None) for name, t in inputs.items()}

    def _nll(self, inputs: Mapping[str, Any], labels: Tensor, **more: Any) -> Tensor:
        """Negative log-likelihood of each token of the answers that end the sequences, `[B, A]`; 0 where labels are -100."""
        length = labels.shape[1]
        logits = self.model(**inputs, use_cache=False, logits_to_keep=length + 1, **more).logits[:, -length - 1 : -1]
        return cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")

    def _generate(self, batch: Mapping[str, Any]) -> list[str]:
        inputs = self._asked(batch)
        model: Any = self.model
        pad = self.prompts.tokenizer.pad_token_id
        found = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=pad)
        own = found[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.prompts.tokenizer.batch_decode(own, skip_special_tokens=True)]

    def _choose(self, batch: Mapping[str, Any]) -> list[str]:
        choices: Sequence[Sequence[str]] = batch["choices"]
        return [some[int(likely.argmax())] for some, likely in zip(choices, self._likely(batch), strict=True)]

    def _likely(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Log-likelihood of the choices of each question, all of their tokens together; the question is read once for all."""
        inputs = self._asked(batch)
        choices: Sequence[Sequence[str]] = batch["choices"]
        model: Any = self.model
        read = model(**inputs, use_cache=True, logits_to_keep=1)
        first = read.logits[:, -1:].float()
        rows = [row for row, some in enumerate(choices) for _ in some]
        tokens = [self.prompts.tokens_of(batch["question"][row], one) for row, some in enumerate(choices) for one in some]
        labels = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100).to(self.device)
        which = torch.tensor(rows, device=self.device)
        cache = cache_of(read)
        cache.batch_select_indices(which)
        mask = torch.cat([inputs["attention_mask"][which], (labels != -100).to(inputs["attention_mask"].dtype)], dim=1)
        more: dict[str, Any] = {"attention_mask": mask, cache_argument(model): cache, "use_cache": True}
        if (deltas := getattr(model.model, "rope_deltas", None)) is not None:  # Qwen-VL: a picture has fewer places than tokens
            places = (mask.cumsum(1) - 1)[:, -labels.shape[1] :] + deltas[which]
            more["position_ids"] = places.expand(3, -1, -1)
        rest = model(input_ids=labels.clamp(min=0), **more).logits.float()
        logits = torch.cat([first[which], rest[:, :-1]], dim=1)
        likely = -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        return likely.split([len(some) for some in choices])


def _refuse_miscounted(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that would be weighted as if it had another number of samples."""
    asked, counted = len(batch["question"]), batch_samples(batch)
    if asked != counted:
        raise UnlearnError(
            f'image: a batch of {asked} questions counts as {counted} samples; put a tensor "index" '
            "of their numbers first, as question_batch of slug_lightning.datamodules.image_text.questions does"
        )


def _never(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("the steps of a VLMModule have losses of their own")


class EmbeddedVLM(VLMModule):
    """The vision-language model that ships with the package: small, ours, taught to answer questions about emoji only.

    It has the vision tower of the embedded CLIP, and says which thing a picture shows, in which style, and how many there are.

    Args:
        route: as in `VLMModule`.
        learning_rate: likewise.

    Example:
        >>> EmbeddedVLM().forget_metric
        'answer_accuracy'
    """

    def __init__(self, route: Literal["answers", "clip"] = "answers", *, learning_rate: float = 1e-5) -> None:
        super().__init__(VLM, route=route, clip=f"local-dir:{CLIP}" if route == "clip" else None, learning_rate=learning_rate)
