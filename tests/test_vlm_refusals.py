"""What a vision-language model cannot be asked, or cannot forget, is refused, with the argument and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _callback import unlearn_callback
from _tiny_vlm import FAMILIES, QUESTIONS, WITH_CLIP, knowing_vlm, pictures, save, tiny_clip, tiny_tokenizer, tiny_vlm, tower_of

from _tiny import trainer
from slug_lightning import UnlearnError
from slug_lightning.datamodules import UnlearnDataModule
from slug_lightning.datamodules.image_text.questions import Question, Questions, question_batch
from slug_lightning.modules.vlm import VLMModule


def refused(match: str, *remedies: str) -> Any:
    """That an error begins with the argument (a pattern), and says what to do."""
    rest = "".join(f"(?=.*{remedy})" for remedy in remedies)
    return pytest.raises(UnlearnError, match=f"(?s)^{match}{rest}")


def test_an_objective_that_is_not_known_is_refused_and_so_is_that_of_a_clip_without_one():
    model, processor = tiny_vlm("llava")
    with refused("objective must be 'answers' or 'clip', got 'gradient'"):
        VLMModule(model, processor=processor, objective="gradient")  # type: ignore[arg-type]
    with refused("clip: objective='clip'", "give the CLIP", "hf:openai/clip-vit-large-patch14-336", 'objective="answers"'):
        VLMModule(model, processor=processor, objective="clip")


def test_a_model_without_a_processor_or_with_one_that_reads_no_pictures_is_refused(tmp_path):
    model, processor = tiny_vlm("llava")
    with refused("processor: a model object needs its processor", "give its name, or the object"):
        VLMModule(model)
    with refused("processor: .* reads no pictures", "AutoProcessor"):
        VLMModule(model, processor=processor.tokenizer)
    with refused("model: '.*nowhere' cannot be loaded", "folder"):
        VLMModule(tmp_path / "nowhere")
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with refused("processor: .* reads no pictures|model: nothing is found"):
        VLMModule(model, processor=str(tmp_path / "tokenizer"))


def test_a_model_that_sees_nothing_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    with refused("model: LlamaForCausalLM has no vision tower", "vision_tower, vision_model, visual"):
        VLMModule(LlamaForCausalLM(LlamaConfig(**shape)), processor=tiny_vlm("llava")[1])


@pytest.mark.parametrize(
    ("option", "value", "tokens"),
    [("patch_size", 4, 16), ("vision_feature_select_strategy", "full", 5), ("num_additional_image_tokens", 0, 3)],
)
def test_a_processor_that_makes_more_or_fewer_tokens_than_the_tower_makes_features_is_refused(option, value, tokens, tmp_path):
    model, processor = tiny_vlm("llava")
    setattr(processor, option, value)
    with refused(f"processor: it reserves {tokens} tokens .* computes 4 features", "patch_size", "select_strategy", "additional"):
        VLMModule(save(tmp_path, model, processor))


def test_a_tower_that_is_no_clip_has_no_objective_by_one(tmp_path):
    model, processor = tiny_vlm("qwen2_vl")
    name = save(tmp_path, *tiny_clip("llava", tiny_vlm("llava")[0]))
    with refused("clip: the vision tower, a Qwen2VisionTransformer", "is not that of", "if there is none", "objective='answers'"):
        VLMModule(model, processor=processor, objective="clip", clip=f"hf:{name}")


@pytest.mark.parametrize("family", WITH_CLIP)
def test_another_clip_is_refused_and_the_first_tensor_named_in_which_it_differs(family, tmp_path):
    model, processor = tiny_vlm(family)
    matrices = sum(p.ndim > 1 for p in tower_of(model).parameters())
    name = save(tmp_path, *tiny_clip(family, tiny_vlm(family, seed=1)[0]))
    with refused(
        f"clip: the vision tower, a .*, is not that of hf:{name}",
        rf"{matrices} of {matrices} matrices, such as \['embeddings\S+weight'",
    ) as said:
        VLMModule(model, processor=processor, objective="clip", clip=f"hf:{name}")
    assert "was taken from" in str(said.value) and "objective='answers'" in str(said.value)


def test_a_clip_of_another_shape_is_another_one(tmp_path):
    model, processor = tiny_vlm("llava")
    clip, tokenizer = tiny_clip("idefics3", tiny_vlm("idefics3")[0])  # its patches are smaller
    with refused("clip: the vision tower, a .*, is not that of", "embeddings.patch_embedding.weight"):
        VLMModule(model, processor=processor, objective="clip", clip=f"hf:{save(tmp_path, clip, tokenizer)}")


def test_a_tower_that_an_edit_has_changed_is_known_by_the_rest(tmp_path):
    """As of a model that has forgotten something, and is to forget more."""
    model, processor = tiny_vlm("llava")
    name = save(tmp_path, *tiny_clip("llava", model))
    with torch.no_grad():
        edited = next(p for name, p in model.named_parameters() if name.endswith("layers.1.mlp.fc1.weight"))
        edited += 1
    module = VLMModule(model, processor=processor, objective="clip", clip=f"hf:{name}")
    assert any(p is edited for p in module.clip.model.parameters())


def test_a_processor_of_an_old_checkpoint_is_refused_with_what_to_set():
    model, processor = tiny_vlm("llava")
    processor.patch_size = None
    with refused("processor: without a patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        VLMModule(model, processor=processor)


def test_a_question_of_the_kind_answer_is_refused():
    """Its accuracy would take the place of that of all questions."""
    model, processor = tiny_vlm("llava")
    module = VLMModule(model, processor=processor).eval()
    batch = {"image": pictures(["frog"]), "question": [QUESTIONS[0]], "aliases": [["frog"]], "kind": ["answer"]}
    with refused("kind: 'answer_accuracy' is that of other questions"):
        module.scores(batch, 0)


def test_a_model_is_not_sharded(monkeypatch):
    model, processor = tiny_vlm("llava")
    module = VLMModule(model, processor=processor)
    monkeypatch.setattr(VLMModule, "device_mesh", object())
    with refused("strategy: a vision-language model cannot be sharded", "ddp"):
        module.configure_model()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_longer_than_the_context_is_refused_with_its_number_of_tokens(family):
    model, processor = tiny_vlm(family, max_position_embeddings=96)
    module = VLMModule(model, processor=processor)
    images, long = pictures(["cat", "cat"]), " ".join(["the cat"] * 50)
    batch = {"image": images, "question": [QUESTIONS[0], long], "answer": ["cat", "cat"]}
    with refused(r"question: 'the cat the cat .*' has \d+ tokens with its picture \(\d+ tokens\)", "context .* is 96", "shorten"):
        module.answer(batch)
    with refused("question: 'what is this . the cat the cat", "context .* is 96"):
        module.answer_loss({**batch, "question": [QUESTIONS[0]] * 2, "answer": ["cat", long]})
    fits = module.question_encoder.ask(images[:1], [QUESTIONS[0]])["input_ids"].shape[1]
    model.config.get_text_config().max_position_embeddings = fits
    assert module.answer({"image": images[:1], "question": QUESTIONS[:1]})
    with refused("question: 'what is this ", f"{fits + 2} tokens", f"context .* is {fits}"):
        module.answer_loss({"image": images[:1], "question": QUESTIONS[:1], "answer": ["cat"]})


def asked_about(things: list[str], aliases: tuple[str, ...], seed: int) -> Questions:
    asked = [Question(row, QUESTIONS[0], thing, aliases, "thing", thing) for row, thing in enumerate(things)]
    return Questions(pictures(things, seed), asked)


def test_names_that_the_model_does_not_use_are_listed_with_what_it_says():
    model, processor = knowing_vlm("llava")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forget, retain = asked_about(["frog"] * 6, ("toad", "Kermit"), 1), asked_about(["cat"] * 6, ("cat",), 2)
    data = UnlearnDataModule(forget, retain, batch_size=4, collate_fn=question_batch)
    found = r"aliases: the model answers 'frog', which contains none of \['Kermit', 'toad'\]"
    with refused("forget_target: nothing to forget", "answer_accuracy is 0 ", found, "list the names"):
        trainer(unlearn_callback()).fit(VLMModule(model.train(), processor=processor), datamodule=data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_template_that_puts_the_first_token_itself_gets_no_second_one():
    model, processor = tiny_vlm("llava")
    processor.chat_template = "<s>" + processor.chat_template
    encoder = VLMModule(model, processor=processor).question_encoder
    ids = encoder.ask(pictures(["cat"]), ["what ?"])["input_ids"][0]
    assert (ids == tiny_tokenizer("llava").bos_token_id).sum() == 1
