"""Each family of vision-language models is asked, taught and read as its own processor and plain transformers do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _tiny_vlm import (
    COLOURS,
    ENDS,
    FAMILIES,
    QUESTIONS,
    SIDE,
    asked_text,
    knowing_vlm,
    pictures,
    plain_inputs,
    plain_loss,
    tiny_tokenizer,
    tiny_vlm,
    tower_of,
)
from torch.utils.flop_counter import FlopCounterMode

from slug_lightning.modules.vlm import VLMModule
from slug_lightning.vlm.prompts import QuestionEncoder
from slug_lightning.vlm.towers import image_features

pytestmark = pytest.mark.uncovered

THINGS = list(COLOURS)


@pytest.fixture(params=FAMILIES)
def family(request) -> Any:
    return request.param


def odd_batch(family: str) -> dict[str, Any]:
    """Of questions and answers of different lengths, and of pictures in sizes that make different numbers of tokens."""
    sizes = [(SIDE, SIDE), (SIDE, 2 * SIDE), (2 * SIDE, SIDE)]
    images = [pictures([thing], seed, size)[0] for seed, (thing, size) in enumerate(zip(THINGS, sizes, strict=True))]
    return {"image": images, "question": [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], "answer": ["cat", "the sea dog", "a frog"]}


def samples(batch: dict[str, Any]) -> list[tuple[Any, str, str]]:
    return list(zip(batch["image"], batch["question"], batch["answer"], strict=True))


def test_a_question_is_put_as_the_family_puts_it_with_the_answer_right_behind(family):
    model, processor = tiny_vlm(family)
    encoder = VLMModule(model, processor=processor).question_encoder
    batch = odd_batch(family)
    asked = encoder.ask(batch["image"], batch["question"])
    whole, labels = encoder.answered(asked, batch["question"], batch["answer"])
    assert len({int(row.sum()) for row in asked["attention_mask"]}) > 1  # so that something is padded
    assert asked["attention_mask"][:, -1].all()
    for row, sample in enumerate(samples(batch)):
        for got, of in ((asked, sample[:2]), (whole, sample)):
            plain = plain_inputs(family, processor, *of)
            kept = got["attention_mask"][row].bool()
            assert torch.equal(got["input_ids"][row][kept], plain["input_ids"][0])
            for kind in {"token_type_ids", "mm_token_type_ids"} & plain.keys():
                assert torch.equal(got[kind][row][kept], plain[kind][0])
        words = encoder.tokenizer.convert_ids_to_tokens(labels[row][labels[row] >= 0])
        assert words == [*sample[2].split(), ENDS[family]]
        assert torch.equal(whole["input_ids"][row, -labels.shape[1] :][labels[row] >= 0], labels[row][labels[row] >= 0])


def test_the_answer_loss_is_that_of_each_sample_alone_as_transformers_computes_it(family):
    model, processor = knowing_vlm(family)
    module, batch = VLMModule(model, processor=processor), odd_batch(family)
    with torch.no_grad():
        alone = torch.stack([plain_loss(family, model, processor, *sample) for sample in samples(batch)])
        assert alone.max() > 2 * alone.min()  # a mean over all tokens would be another one
        torch.testing.assert_close(module.answer_loss(batch), alone.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.forget_step(batch, 0), module.retain_step(batch, 0))


def test_what_may_be_edited_is_what_the_loss_of_an_answer_depends_on_in_the_tower(family):
    model, processor = tiny_vlm(family)
    tower = tower_of(model)
    plain_loss(family, model, processor, *samples(odd_batch(family))[0]).backward()
    seen = {name for name, p in tower.named_parameters() if p.grad is not None}
    model.zero_grad()
    module = VLMModule(model, processor=processor)
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert free == {f"{module.tower_name}.{name}" for name in seen} and seen
    module.forget_step(odd_batch(family), 0).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == free
    unseen = {name for name, _ in tower.named_parameters()} - seen
    if family.startswith("llava"):  # reads what goes into the last layer
        assert {name.split("layers.")[-1][0] for name in unseen if "layers." in name} == {"2"}
        assert {name.rsplit(".", 2)[-2] for name in unseen if "layers." not in name} == {"post_layernorm"}
    else:
        assert not unseen


def test_answers_of_a_batch_are_those_of_each_question_alone(family):
    model, processor = knowing_vlm(family)
    module, batch = VLMModule(model, processor=processor, max_new_tokens=5), odd_batch(family)
    together = module.answer(batch)
    assert together == [module.answer({name: [values[row]] for name, values in batch.items()})[0] for row in range(3)]
    for (image, question, _), said in zip(samples(batch), together, strict=True):
        inputs = plain_inputs(family, processor, image, question)
        inputs.pop("labels", None)
        plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, inputs["input_ids"].shape[1] :]
        assert said == processor.tokenizer.decode(plain, skip_special_tokens=True)
    plain_batch = {"image": pictures(THINGS, 77), "question": [QUESTIONS[row % 2] for row in range(3)]}
    assert module.answer(plain_batch) == THINGS


def test_a_choice_is_the_one_whose_tokens_are_likeliest_in_passes_of_their_own(family):
    """With choices of different numbers and lengths; one row has but one. What has learned looks at places, too."""
    model, processor = knowing_vlm(family)
    module, batch = VLMModule(model, processor=processor), odd_batch(family)
    batch["choices"] = [["cat", "the sea dog", "bird"], ["a frog"], ["colour of the bird", "dog", "a", "sea dog ?"]]
    with torch.no_grad():
        found, said = module._likely(batch), module.answer(batch)
    for (image, question, _), some, likely, one in zip(samples(batch), batch["choices"], found, said, strict=True):
        with torch.no_grad():
            lost = [plain_loss(family, model, processor, image, question, other) for other in some]
        expected = -torch.stack([loss * (len(other.split()) + 1) for loss, other in zip(lost, some, strict=True)])
        torch.testing.assert_close(likely, expected, rtol=1e-4, atol=1e-4)
        assert one == some[int(expected.argmax())]


def test_scores_tell_the_kinds_of_questions_apart(family):
    model, processor = knowing_vlm(family)
    module = VLMModule(model, processor=processor)
    batch = {"image": pictures(THINGS, 77), "question": [QUESTIONS[0]] * 3, "kind": ["thing", "other", "thing"]}
    batch["aliases"] = [["Cat", "kitten"], ["fish", "sea"], ["dog"]]
    found = module.scores(batch, 0)
    assert {name: values.tolist()[:1] for name, values in found.items()}.keys() == {
        "answer_accuracy",
        "thing_accuracy",
        "other_accuracy",
    }
    assert found["answer_accuracy"].tolist() == [1, 1, 0]
    torch.testing.assert_close(found["thing_accuracy"], torch.tensor([1, torch.nan, 0]), equal_nan=True)
    torch.testing.assert_close(found["other_accuracy"], torch.tensor([torch.nan, 1, torch.nan]), equal_nan=True)


def test_an_answer_of_paligemma_is_read_from_left_to_right_and_its_question_as_a_whole():
    model, processor = tiny_vlm("paligemma")
    encoder, batch = VLMModule(model, processor=processor).question_encoder, odd_batch("paligemma")
    whole, labels = encoder.answered(encoder.ask(batch["image"], batch["question"]), batch["question"], batch["answer"])

    def read(inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    first, count = read(whole), labels.shape[1]
    other = {**whole, "input_ids": whole["input_ids"].clone()}
    other["input_ids"][1, -2] += 1
    second = read(other)
    assert torch.equal(first[:, :-2], second[:, :-2]) and not torch.equal(first[1, -2:], second[1, -2:])
    other["input_ids"][1, -count - 1] += 1  # a token of the question is seen by those in front of it
    assert not torch.equal(second[1, -count - 2], read(other)[1, -count - 2])


def flops(run: Callable[[], torch.Tensor], backward: bool) -> int:
    """Of what `run` does, and of the gradients of what it gives."""
    with FlopCounterMode(display=False) as counter:
        found = run()
        if backward:
            found.sum().backward()
    return counter.get_total_flops()


def test_a_gradient_goes_through_the_language_model_and_none_is_taken_of_it():
    model, processor = tiny_vlm("llava")
    module, batch = VLMModule(model, processor=processor), odd_batch("llava")
    inputs = module.question_encoder.ask(batch["image"], batch["question"])

    def of_language_model(backward: bool) -> int:
        seeing = flops(lambda: torch.cat(image_features(model, inputs)), backward)
        return flops(lambda: module.answer_loss(batch), backward) - seeing

    forward = of_language_model(False)
    assert 2 * forward <= of_language_model(True) <= 2.2 * forward  # of the scores of attention, both factors need a gradient
    model.requires_grad_(True)
    assert of_language_model(True) > 2.9 * forward


def test_only_answers_are_read_out():
    model, processor = tiny_vlm("llava")
    module, batch = VLMModule(model, processor=processor), odd_batch("llava")
    shapes: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    module.answer_loss(batch)
    assert shapes == [(3, 1 + 4)]  # "the sea dog" and its end, and what comes before


def metaspace_processor(family: Any) -> Any:
    """One whose tokenizer, as SentencePiece's, marks the beginning of words, and of a text alone that of its first word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    _, processor = tiny_vlm(family)
    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<image>", "▁USER:", "\n", "what", "▁?", "▁ASSISTANT:"])}
    ids |= {"▁cat": len(ids), "cat": len(ids) + 1, "▁": len(ids) + 2}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    own = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(processor.image_processor, tokenizer, chat_template=processor.chat_template, **own)


def test_an_answer_has_the_tokens_that_it_has_behind_a_question():
    encoder = QuestionEncoder(tiny_vlm("llava")[0], metaspace_processor("llava"))
    ids = encoder.tokens_of("what ?", "cat")
    whole = encoder.tokenizer(asked_text("llava", "what ?") + " cat</s>", add_special_tokens=False).input_ids
    assert whole[-len(ids) :] == ids.tolist()
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == ["▁cat", "</s>"]


def test_a_tokenizer_without_padding_is_padded_with_what_ends_a_text():
    model, processor = tiny_vlm("llava")
    processor.tokenizer = tiny_tokenizer("llava")
    processor.tokenizer.pad_token = None
    module = VLMModule(model, processor=processor)
    assert processor.tokenizer.pad_token == "</s>"
    assert len(module.answer(odd_batch("llava"))) == 3
