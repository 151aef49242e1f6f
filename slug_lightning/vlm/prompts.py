"""Questions about pictures as a model's own processor puts them: for an answer to be generated, or with an answer behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional

Inputs = dict[str, Tensor]
"""What a model is called with: `input_ids` and `attention_mask`, `[B, T]`, `pixel_values`, and what else its processor makes."""


class Prompts:
    r"""Puts questions as the model's processor does, by its chat template; without one, as PaliGemma: the picture, then the text.

    Questions are padded on the left, answers on the right, so that all answers of a batch begin at the same place.

    Args:
        model: a transformers image-text-to-text model.
        processor: its processor.

    Example:
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from slug_lightning.embedded import VLM
        >>> prompts = Prompts(AutoModelForImageTextToText.from_pretrained(VLM), AutoProcessor.from_pretrained(VLM))
        >>> prompts.text("what is this?")
        'USER: <image>\nwhat is this? ASSISTANT:'
        >>> inputs = prompts.ask(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["what is this?"])
        >>> inputs["input_ids"].shape, inputs["pixel_values"].shape
        (torch.Size([1, 26]), torch.Size([1, 3, 64, 64]))
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.config: Any = model.config
        if self.tokenizer.pad_token_id is None:  # what is padded is masked, so that any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def image_token(self) -> int:
        """The id of the tokens whose places the picture's features take."""
        return next(i for name in ("image_token_id", "image_token_index") if (i := getattr(self.config, name, None)) is not None)

    @property
    def context(self) -> int | None:
        """How many tokens the language model was made for, if its config says so."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def text(self, question: str) -> str:
        """A question about a picture, up to where the answer is to begin."""
        if getattr(self.processor, "chat_template", None) is None:
            return f"{getattr(self.processor, 'image_token', '<image>')}{question}"
        return self.processor.apply_chat_template([_turn("user", question)], add_generation_prompt=True)

    def ask(self, images: Union[Tensor, Sequence[Tensor]], questions: Sequence[str]) -> Inputs:
        """Make of pictures and questions what the model is called with, on the CPU.

        Args:
            images: uint8, RGB, each `[3, H, W]`.
            questions: one a picture.

        Raises:
            UnlearnError: if it is more tokens than the language model was made for.
        """
        pictures = [[picture] for picture in as_pil(images)]
        texts = [self.text(question) for question in questions]
        # A template may have put the first token already; a tokenizer would put it once more.
        begun = self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token)
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if begun:
            options["add_special_tokens"] = False
        inputs = dict(self.processor(images=pictures, text=texts, **options))
        inputs.pop("labels", None)  # PaliGemma's
        self._refuse_long(inputs, questions)
        return inputs

    def answered(self, inputs: Mapping[str, Tensor], questions: Sequence[str], answers: Sequence[str]) -> tuple[Inputs, Tensor]:
        """Put an answer behind each question.

        Args:
            inputs: of `ask`.
            questions: as put there.
            answers: one a question.

        Returns:
            The inputs with the answers, and the answers' own tokens, `[B, A]`, -100 where one is shorter: they are the last
            A of each sequence.

        Raises:
            UnlearnError: if it is more tokens than the language model was made for.
        """
        rows = [self.tokens_of(question, answer) for question, answer in zip(questions, answers, strict=True)]
        labels = pad_sequence(rows, batch_first=True, padding_value=-100).to(inputs["input_ids"].device)
        counts = labels != -100
        whole = dict(inputs)
        for name, tensor in inputs.items():
            if tensor.shape != inputs["input_ids"].shape:
                continue
            # Of the kinds of tokens, 1 is an answer for PaliGemma (which it may not read beforehand), 0 is text for Qwen.
            more = {"input_ids": labels.clamp(min=0), "attention_mask": counts, "token_type_ids": torch.ones_like(labels)}
            behind = more.get(name, torch.zeros_like(labels)).to(tensor.dtype)
            whole[name] = torch.cat([tensor, behind], dim=1)
        self._refuse_long(whole, [f"{q} {a}" for q, a in zip(questions, answers, strict=True)])
        return whole, labels

    def tokens_of(self, question: str, answer: str) -> Tensor:
        """An answer's tokens, `[A]`, as they stand behind the question, with the one that ends it."""
        end = self.tokenizer.eos_token or ""
        if getattr(self.processor, "chat_template", None) is None:
            return self._tokens(answer + end)
        before, answer = self.text(question), answer.strip()
        turns = [_turn("user", question), _turn("assistant", answer)]
        whole: str = self.processor.apply_chat_template(turns).rstrip()
        rest = whole.removeprefix(before) if whole.startswith(before) else f" {answer}"
        rest = rest + end if rest.endswith(answer) and not (end and rest.endswith(end)) else rest  # a template may end it, too
        # A tokenizer reads the same letters otherwise at the beginning of a text than behind another one.
        head, both = self._tokens(before), self._tokens(before + rest)
        return both[len(head) :] if both[: len(head)].equal(head) else self._tokens(rest)

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    def _refuse_long(self, inputs: Mapping[str, Tensor], texts: Iterable[str]) -> None:
        length = inputs["input_ids"].shape[1]
        if self.context is not None and length > self.context:
            row = int(inputs["attention_mask"].sum(1).argmax())
            pictures = int((inputs["input_ids"][row] == self.image_token).sum())
            raise UnlearnError(
                f"question: {list(texts)[row]!r} makes {length} tokens with its picture ({pictures} tokens), and the language "
                f"model was made for {self.context}; shorten it, or give the processor smaller pictures"
            )


def as_pil(images: Union[Tensor, Sequence[Tensor]]) -> list[Any]:
    """Pictures as every image processor reads them, of uint8 tensors, RGB, each `[3, H, W]`."""
    fromarray = import_optional("PIL.Image", "hf").fromarray
    return [fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]


def _turn(role: str, text: str) -> dict[str, Any]:
    picture = [{"type": "image"}] if role == "user" else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}]}
