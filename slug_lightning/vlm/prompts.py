"""Encode questions about pictures with a model's own processor, with or without an answer behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from slug_lightning.errors import UnlearnError
from slug_lightning.utils.optional_imports import import_optional


class QuestionEncoder:
    """Encode questions by the processor's chat template; without one, as for PaliGemma: the picture, then the text.

    Questions are padded on the left, answers on the right, so that all answers of a batch begin at the same place.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.config: Any = model.config
        if self.tokenizer.pad_token_id is None:  # padding is masked, so that any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def image_token(self) -> int:
        """The id of the tokens that the picture's features replace."""
        return next(i for name in ("image_token_id", "image_token_index") if (i := getattr(self.config, name, None)) is not None)

    def text(self, question: str) -> str:
        """Return the prompt of a question about a picture, up to where the answer begins."""
        if getattr(self.processor, "chat_template", None) is None:
            return f"{getattr(self.processor, 'image_token', '<image>')}{question}"
        return self.processor.apply_chat_template([_turn("user", question)], add_generation_prompt=True)

    def ask(self, images: Union[Tensor, Sequence[Tensor]], questions: Sequence[str]) -> dict[str, Tensor]:
        """Encode pictures (uint8, RGB, each `[3, H, W]`) with a question each: the model's arguments, on the CPU."""
        pictures = [[picture] for picture in as_pil(images)]
        texts = [self.text(question) for question in questions]
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token):
            options["add_special_tokens"] = False  # or the tokenizer would add the template's first token again
        inputs = dict(self.processor(images=pictures, text=texts, **options))
        inputs.pop("labels", None)  # PaliGemma's
        self._refuse_long(inputs, questions)
        return inputs

    def answered(
        self, inputs: Mapping[str, Tensor], questions: Sequence[str], answers: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Append an answer to each question that `ask` has encoded.

        Returns the inputs with the answers, and the answers' own tokens, `[B, A]`, padded by -100: the last A of each sequence.
        """
        tokens = [self.tokens_of(question, answer) for question, answer in zip(questions, answers, strict=True)]
        ids = inputs["input_ids"]
        labels = pad_sequence(tokens, batch_first=True, padding_value=-100).to(ids.device)
        # Of token_type_ids, 1 is an answer for PaliGemma (which the question must not attend to); 0 is text for Qwen.
        added = {"input_ids": labels.clamp(min=0), "attention_mask": labels != -100, "token_type_ids": torch.ones_like(labels)}
        whole = dict(inputs)
        for name in [name for name, tensor in inputs.items() if tensor.shape == ids.shape]:
            behind = added.get(name, torch.zeros_like(labels)).to(inputs[name].dtype)
            whole[name] = torch.cat([inputs[name], behind], dim=1)
        self._refuse_long(whole, [f"{q} {a}" for q, a in zip(questions, answers, strict=True)])
        return whole, labels

    def tokens_of(self, question: str, answer: str) -> Tensor:
        """Return the tokens of an answer behind its question, `[A]`, with the one that ends it."""
        end = self.tokenizer.eos_token or ""
        if getattr(self.processor, "chat_template", None) is None:
            return self._tokens(answer + end)
        before, answer = self.text(question), answer.strip()
        turns = [_turn("user", question), _turn("assistant", answer)]
        whole: str = self.processor.apply_chat_template(turns).rstrip()
        rest = whole.removeprefix(before) if whole.startswith(before) else f" {answer}"
        rest = rest + end if rest.endswith(answer) and not (end and rest.endswith(end)) else rest  # a template may end it, too
        # The same letters may have other tokens at the beginning of a text.
        head, both = self._tokens(before), self._tokens(before + rest)
        return both[len(head) :] if both[: len(head)].equal(head) else self._tokens(rest)

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    def _refuse_long(self, inputs: Mapping[str, Tensor], texts: Iterable[str]) -> None:
        """Refuse sequences that exceed the context of the language model."""
        length = inputs["input_ids"].shape[1]
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length > context:
            row = int(inputs["attention_mask"].sum(1).argmax())
            pictures = int((inputs["input_ids"][row] == self.image_token).sum())
            raise UnlearnError(
                f"question: {list(texts)[row]!r} has {length} tokens with its picture ({pictures} tokens), and the context of "
                f"the language model is {context}; shorten the question, or have the processor resize pictures to fewer"
            )


def as_pil(images: Union[Tensor, Sequence[Tensor]]) -> list[Any]:
    """Convert uint8 tensors, RGB, each `[3, H, W]`, into the PIL images that every image processor reads."""
    fromarray = import_optional("PIL.Image", "hf").fromarray
    return [fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]


def _turn(role: str, text: str) -> dict[str, Any]:
    picture = [{"type": "image"}] if role == "user" else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}]}
