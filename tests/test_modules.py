"""Ready modules: CLIP of both libraries, classifiers, and any module with a loss and a score."""

import json
import re

import open_clip
import pytest
import torch
from _callback import unlearn_callback
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

from _tiny import CLASSES, FORGET, blobs, changed, loader, snapshot, trained, trainer
from slug_lightning import UnlearnError, UnlearnModule, UnlearnPatch
from slug_lightning.clip.models import encode_image, encode_text, to_hugging_face
from slug_lightning.datamodules import EmojiDataModule, UnlearnDataModule
from slug_lightning.datamodules.demo.emoji import render
from slug_lightning.embedded import CLIP
from slug_lightning.embedded.drawings import load_drawings
from slug_lightning.methods import SLUG
from slug_lightning.modules import ClassifierModule, ClipModule, EmbeddedClip, clip
from slug_lightning.patches.temporary import EditStep, TemporaryEdits
from slug_lightning.tensors.layers import Layer

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "width": 24, "heads": 2, "layers": 2, "vocab_size": 40},
}


def tiny_clip(vision=(), text=(), **options):
    torch.manual_seed(0)
    towers = {"vision_cfg": TINY["vision_cfg"] | dict(vision), "text_cfg": TINY["text_cfg"] | dict(text)}
    return open_clip.CLIP(TINY["embed_dim"], **towers, **options).eval()


class Pairs(torch.utils.data.Dataset):
    """Eight kinds of picture, each with the token that names it."""

    def __init__(self, kinds, count=48):
        generator = torch.Generator().manual_seed(3)
        self.kind = torch.tensor([kinds[i % len(kinds)] for i in range(count)])
        pattern = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(4))
        self.image = pattern[self.kind] + 0.1 * torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self):
        return len(self.kind)

    def __getitem__(self, i):
        return {"image": self.image[i], "text": token(self.kind[i : i + 1])[0], "kind": self.kind[i]}


def token(kinds):
    """Start, the kind's own token, end: the highest id, at which both libraries pool."""
    tokens = torch.zeros(len(kinds), 8, dtype=torch.long)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 38, kinds + 1, 39
    return tokens


@pytest.fixture(scope="module")
def knowing():
    """A tiny CLIP that knows its eight kinds."""
    model = tiny_clip().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    data = Pairs(range(8), 64)
    tokens = token(torch.arange(8))
    for _ in range(60):
        image, text = encode_image(model, data.image), encode_text(model, tokens)
        optimizer.zero_grad()
        cross_entropy(image @ text.T * 20, data.kind).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def clip_module(model):
    return ClipModule(
        model, prompts={"kind": [str(i) for i in range(8)]}, tokenizer=lambda texts: token(torch.tensor([int(t) for t in texts]))
    )


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_clip_forgets_a_kind_in_either_library(library, knowing, tmp_path):
    model = tiny_clip()
    model.load_state_dict(knowing)
    if library == "transformers":
        model = to_hugging_face(model)
    module = clip_module(model.train())
    before = snapshot(model)
    forgetting = unlearn_callback(retain_tolerance=0.1, output_dir=str(tmp_path / "run"))
    data = UnlearnDataModule(Pairs([5]), Pairs([0, 1, 2, 3, 4, 6, 7], 140), batch_size=28)
    trainer(forgetting).fit(module, datamodule=data)
    report = forgetting.report
    assert report.status == "unlearned" and report.holds
    assert report.before["forget"] == {"kind_accuracy": 1.0}
    assert report.after["forget"]["kind_accuracy"] <= 1 / 8 == report.bounds["forget_target"]
    assert {s["tower"] for s in report.scores} == {"vision", "text"}
    assert all(sum(s["on_front"] for s in report.scores if s["tower"] == tower) for tower in ("vision", "text"))
    assert not any(re.search("logit_scale|(position|positional|token|class)_embedding", s["layer"]) for s in report.scores)
    # The files speak the wrapped model's own names, so that its library loads them without us.
    assert changed(model, before) == set(report.tensors)
    plain = to_hugging_face(tiny_clip()) if library == "transformers" else tiny_clip()
    plain.load_state_dict(load_file(tmp_path / "run" / "weights.safetensors"))
    assert not changed(plain, snapshot(model))
    UnlearnPatch.load(tmp_path / "run" / "patch.safetensors").revert(plain)
    assert not changed(plain, before)


def test_clip_losses_are_those_of_the_paper(knowing):
    model = tiny_clip()
    model.load_state_dict(knowing)
    module = clip_module(model)
    batch = next(iter(DataLoader(Pairs(range(8)), batch_size=6)))
    image = normalize(model.encode_image(batch["image"]), dim=-1)
    text = normalize(model.encode_text(batch["text"]), dim=-1)
    matching = torch.stack([1 - image[i] @ text[i] for i in range(6)]).mean()
    torch.testing.assert_close(module.forget_step(batch, 0), matching)
    reference = open_clip.ClipLoss()(image, text, model.logit_scale.exp())
    torch.testing.assert_close(module.retain_step(batch, 0), reference)


def test_samples_without_a_label_do_not_count(knowing):
    model = tiny_clip()
    model.load_state_dict(knowing)
    module = clip_module(model)
    batch = next(iter(DataLoader(Pairs(range(8)), batch_size=8)))
    batch["kind"] = torch.tensor([0, 1, -1, -1, 5, 5, -1, -1])  # kinds are 0 to 7, so two right, one right, one wrong
    values = module.scores(batch, 0)["kind_accuracy"]
    assert values.isnan().tolist() == [label < 0 for label in batch["kind"].tolist()]
    assert values[~values.isnan()].tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_clip_says_how_likely_the_right_prompt_is(library, knowing):
    model = tiny_clip()
    model.load_state_dict(knowing)
    model = to_hugging_face(model) if library == "transformers" else model
    module = clip_module(model)
    batch = next(iter(DataLoader(Pairs(range(8)), batch_size=8)))
    batch["kind"] = torch.tensor([0, 1, -1, -1, 5, 5, -1, -1], dtype=torch.int32)
    with torch.no_grad():
        found = module.scores(batch, 0)
        image, text = encode_image(model, batch["image"]), encode_text(model, token(torch.arange(8)))
        likelihood = (model.logit_scale.exp() * image @ text.T).softmax(1)
    assert list(found) == ["kind_accuracy", "kind_nll"]
    assert found["kind_nll"].isnan().tolist() == [label < 0 for label in batch["kind"].tolist()]
    labelled = [0, 1, 4, 5]
    expected = -likelihood[labelled, batch["kind"][labelled].long()].log()
    torch.testing.assert_close(found["kind_nll"][labelled], expected)
    assert module.forget_metric == module.retain_metric == "kind_accuracy" and list(module.chance) == ["kind_accuracy"]


def test_a_likelihood_may_be_the_metric(knowing):
    model = tiny_clip()
    model.load_state_dict(knowing)
    module, data = clip_module(model.train()), UnlearnDataModule(Pairs([5]), Pairs([0, 1, 2, 3, 4, 6, 7], 140), batch_size=28)
    forgetting = unlearn_callback(forget_metric="kind_nll", retain_metric="kind_nll", retain_tolerance=100.0)
    trainer(forgetting).fit(module, datamodule=data)
    report = forgetting.report
    assert report.status == "unlearned" and not any(report.bounds["higher_is_better"].values())
    assert "a hundred times less likely" in report.bounds["forget_target_reason"]
    assert report.after["forget"]["kind_nll"] > 4 > report.before["forget"]["kind_nll"]


class Watched:
    """The gradient itself, of which a copy is kept."""

    def __init__(self):
        self.seen = {}

    def __call__(self, layer, forget_gradient):
        self.seen |= {name: gradient.clone() for name, gradient in forget_gradient.items()}
        return forget_gradient


def test_an_anchored_gradient_is_that_of_the_loss_less_the_loss_of_the_mean_retain_image(knowing):
    model, watched = tiny_clip(), Watched()
    model.load_state_dict(knowing)
    forget, retain = Pairs([5], 10), Pairs([0, 1, 2, 3, 4, 6, 7], 32)
    others = {f"{kind}_{split}": part for kind, part in (("forget", forget), ("retain", retain)) for split in ("val", "test")}
    data = UnlearnDataModule(forget, retain, **others, batch_size=7)  # the last batches are smaller
    name = "model.transformer.resblocks.0.mlp.c_fc.weight"
    method = SLUG(name, direction=watched, curve="line", source="anchored", max_evaluations=2)
    trainer(unlearn_callback(method=method)).fit(clip_module(model.train()), datamodule=data)
    plain = tiny_clip()
    plain.load_state_dict(knowing)
    with torch.no_grad():
        anchor = encode_image(plain, retain.image).mean(0)
        image = encode_image(plain, forget.image)
    text = encode_text(plain, token(forget.kind))
    loss = (1 - (image * text).sum(1)).mean() - (1 - text @ anchor).mean()
    (expected,) = torch.autograd.grad(loss, [plain.get_parameter(name.removeprefix("model."))])
    torch.testing.assert_close(watched.seen[name], expected, rtol=1e-4, atol=1e-7)


def test_a_module_without_anchored_steps_is_told_what_is_missing():
    data = UnlearnDataModule(blobs(40), blobs(80))
    callback = unlearn_callback(method=SLUG(source="anchored"))
    with pytest.raises(UnlearnError, match="source: 'anchored' needs anchor_step and anchored_step, which ClassifierModule"):
        trainer(callback).fit(ClassifierModule(trained().net, CLASSES), datamodule=data)


# ---- prompts are encoded as often as they change


def test_classes_that_a_batch_has_no_labels_of_are_not_encoded(knowing, encoded):
    model = tiny_clip()
    model.load_state_dict(knowing)
    module = clip_module(model)
    batch = next(iter(DataLoader(Pairs(range(8)), batch_size=8)))
    batch["kind"] = torch.full((8,), -1)
    found = module.scores(batch, 0)
    assert {name: values.isnan().tolist() for name, values in found.items()} == dict.fromkeys(
        ("kind_accuracy", "kind_nll"), [True] * 8
    )
    assert not encoded


@pytest.fixture
def encoded(monkeypatch):
    """The tokens that were encoded, in order."""
    seen = []

    def encode(model, tokens):
        seen.append(tokens)
        return encode_text(model, tokens)

    monkeypatch.setattr(clip, "encode_text", encode)
    return seen


LIBRARIES = {"open_clip": tiny_clip, "transformers": lambda: to_hugging_face(tiny_clip())}
libraries = pytest.mark.parametrize("library", LIBRARIES)


def chosen(module, vision):
    """One parameter of either tower."""
    return next(p for name, p in module.model.named_parameters() if name.startswith("vis") == vision and p.ndim == 2)


def by_copy(module, vision):
    with torch.no_grad():
        parameter = chosen(module, vision)
        parameter.copy_(parameter * 1.5)


def by_optimizer(module, vision):
    parameter = chosen(module, vision)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def by_loading(module, vision):
    """Only one parameter, as a whole checkpoint writes to both towers."""
    name = next(name for name, p in module.named_parameters() if p is chosen(module, vision))
    module.load_state_dict({name: chosen(module, vision).detach() * 1.5}, strict=False)


def by_trial(module, vision):
    """The tensor is as it was afterwards, but in between it was not."""
    layer = Layer("w", {"w": chosen(module, vision)})
    with TemporaryEdits().applied(EditStep(layer, {"w": torch.ones_like(chosen(module, vision))}, 0.5)):
        pass


def by_replacing(module, vision):
    chosen(module, vision).data = chosen(module, vision).detach() * 1.5


@libraries
@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("edit", [by_copy, by_optimizer, by_loading, by_trial, by_replacing])
def test_prompts_are_encoded_again_if_and_only_if_the_text_tower_was_written_to(library, edit, vision, encoded):
    module = clip_module(LIBRARIES[library]())
    tokens = module.get_buffer("kind_tokens")
    with torch.no_grad():
        first = module.class_features("kind")
        assert module.class_features("kind") is first and len(encoded) == 1
    edit(module, vision)
    with torch.no_grad():
        second = module.class_features("kind")
        assert module.class_features("kind") is second
        torch.testing.assert_close(second, encode_text(module.model, tokens), rtol=0, atol=0)
    assert len(encoded) == (1 if vision else 2)
    assert torch.equal(first, second) == (vision or edit is by_trial)


@libraries
@pytest.mark.parametrize("start", ["on_validation_start", "on_test_start"])
def test_a_validation_encodes_the_prompts_anew_whatever_has_happened(library, start, encoded):
    module = clip_module(LIBRARIES[library]())
    with torch.no_grad():
        before = module.class_features("kind")
        chosen(module, vision=False).data.mul_(1.5)  # leaves no mark
        getattr(module, start)()
        after = module.class_features("kind")
        assert torch.equal(after, encode_text(module.model, module.get_buffer("kind_tokens")))
    assert len(encoded) == 2 and not torch.equal(before, after)


def test_a_trainer_validates_the_weights_as_they_are(knowing):
    model = tiny_clip()
    model.load_state_dict(knowing)
    module, quiet = clip_module(model), trainer()
    data = DataLoader(Pairs(range(8)), batch_size=8)
    assert quiet.validate(module, data, verbose=False)[0]["kind_accuracy"] == 1.0
    model.text_projection.data.neg_()  # the nearest prompt is now the farthest
    assert quiet.validate(module, data, verbose=False)[0]["kind_accuracy"] < 0.5


def test_features_that_may_be_differentiated_are_made_anew_and_carry_a_graph(encoded):
    module = clip_module(tiny_clip())
    with torch.no_grad():
        kept = module.class_features("kind")
    first, second = module.class_features("kind"), module.class_features("kind")
    assert first.requires_grad and second is not first and len(encoded) == 3
    assert not kept.requires_grad and torch.equal(first.detach(), kept)
    first[0, 0].backward()
    assert chosen(module, vision=False).grad.abs().sum() > 0
    with torch.no_grad():
        assert module.class_features("kind") is kept


def test_a_frozen_text_tower_is_read_once_though_the_vision_tower_is_differentiated(encoded):
    module = clip_module(tiny_clip())
    for name, p in module.model.named_parameters():
        p.requires_grad_(name.startswith("vis"))
    first = module.class_features("kind")
    assert module.class_features("kind") is first and not first.requires_grad and len(encoded) == 1


def test_another_precision_is_another_encoding(encoded):
    module = clip_module(tiny_clip())
    with torch.no_grad():
        full = module.class_features("kind")
        with torch.autocast("cpu", torch.bfloat16):
            half = module.class_features("kind")
            assert module.class_features("kind") is half and not torch.equal(half, full)
        assert torch.equal(module.class_features("kind"), full)
    assert len(encoded) == 3


def test_each_set_of_prompts_has_features_of_its_own(encoded):
    def tokenizer(texts):
        return token(torch.tensor([int(text) for text in texts]))

    module = ClipModule(tiny_clip(), prompts={"low": ["0", "1", "2"], "high": ["6", "7"]}, tokenizer=tokenizer)
    with torch.no_grad():
        low, high = module.class_features("low"), module.class_features("high")
        assert module.class_features("low") is low and module.class_features("high") is high
    assert [len(tokens) for tokens in encoded] == [3, 2] == [len(low), len(high)]


EPS = {"norm_kwargs": {"eps": 0.1}}
MODELS = {
    "plain": tiny_clip,
    "OpenAI's activation": lambda: tiny_clip(quick_gelu=True),
    "another epsilon": lambda: tiny_clip(EPS, EPS),
    "embedded": lambda: open_clip.create_model(f"local-dir:{CLIP}"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_transformers_twin_gives_the_same_features(make):
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as after training: otherwise biases are zeros, and activations nearly linear
            parameter.mul_(1.5).add_(0.05 * torch.randn_like(parameter))
    twin = to_hugging_face(model)
    size = 16 if model.visual.conv1.weight.shape[-1] == 8 else 64
    images = torch.randn(3, 3, size, size)
    tokens = (
        token(torch.arange(3))
        if size == 16
        else open_clip.get_tokenizer(f"local-dir:{CLIP}")(["cat", "noto style", "a picture of fire"])
    )
    with torch.no_grad():
        torch.testing.assert_close(encode_image(twin, images), encode_image(model, images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encode_text(twin, tokens), encode_text(model, tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "reason"), [
    (lambda: nn.Linear(2, 2), "only an open_clip CLIP with a vision transformer"),
    (lambda: tiny_clip({"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}), "only an open_clip CLIP with a vision transf"),
    (lambda: tiny_clip({"ls_init_value": 0.1}), r"visual.transformer.resblocks.0.ls_1.gamma has no counterpart"),
    (lambda: tiny_clip({"no_ln_pre": True}), r"vision_model.pre_layrnorm.bias is missing"),
    (lambda: tiny_clip({"pool_type": "avg"}), r"pools and masks \('avg', 'argmax', True\)"),
    (lambda: tiny_clip(text={"pool_type": "last"}), r"pools and masks \('tok', 'last', True\)"),
    (lambda: tiny_clip(text={"no_causal_mask": True}), r"pools and masks \('tok', 'argmax', False\)"),
    (lambda: tiny_clip(text={"act_kwargs": {"approximate": "tanh"}}), "no counterpart of the activation GELU.*tanh"),
    (lambda: tiny_clip(init_logit_bias=0.0), "logit_bias has no counterpart"),
    (lambda: tiny_clip(nonscalar_logit_scale=True), "logit_scale is missing, or has"),
])  # fmt: skip
def test_only_a_clip_that_transformers_can_compute_has_a_twin(make, reason):
    with pytest.raises(UnlearnError, match=reason):
        to_hugging_face(make())


def test_both_libraries_read_the_embedded_tokenizer():
    from transformers import AutoTokenizer

    texts = ["cat", "noto style", "an emoji of FIRE in fluent style"]
    ours = open_clip.get_tokenizer(f"local-dir:{CLIP}")(texts)
    theirs = AutoTokenizer.from_pretrained(CLIP)(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(ours, theirs)
    end = json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["vocab_size"] - 1
    assert (ours == end).sum(1).tolist() == [1, 1, 1]


def test_clip_loads_by_name_from_either_library(tmp_path):
    module = ClipModule("RN50")  # random weights, as no tag is given
    assert module.forget_metric is None and sum(p.numel() for p in module.model.parameters()) > 5e7
    twin = to_hugging_face(open_clip.create_model(f"local-dir:{CLIP}"))
    twin.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(CLIP).save_pretrained(tmp_path)
    module = ClipModule(f"hf:{tmp_path}", prompts={"animal": ["cat", "dog"]})
    assert module.get_buffer("animal_tokens").shape == (2, 16)
    assert not changed(module.model, snapshot(twin))


def test_prompts_need_a_tokenizer():
    with pytest.raises(UnlearnError, match="tokenizer: a model object with prompts"):
        ClipModule(tiny_clip(), prompts={"kind": ["a"]})


def test_a_classifier_module_forgets_a_class():
    module = ClassifierModule(trained().net, num_classes=CLASSES)
    forgetting = unlearn_callback(loader(True), loader(False), retain_tolerance=0.02)
    trainer(forgetting).fit(module, loader(False), loader(False))
    assert forgetting.report.status == "unlearned"
    assert forgetting.report.after["forget"]["accuracy"] <= 1 / CLASSES
    assert all(name.startswith(("0.", "4.", "6.")) for name in forgetting.report.tensors)


def test_a_classifier_says_how_likely_the_label_is():
    module = ClassifierModule(trained().net, num_classes=CLASSES).eval()
    pictures, labels = (tensor[:6].clone() for tensor in blobs().tensors)
    expected = cross_entropy(module.model(pictures), labels, reduction="none")
    accuracy = (module.model(pictures).argmax(1) == labels).float()
    found = module.scores((pictures, labels), 0)
    assert list(found) == ["accuracy", "nll"]
    torch.testing.assert_close(found["nll"], expected)
    assert torch.equal(found["accuracy"], accuracy)
    labels[2] = -1
    assert module.scores((pictures, labels), 0)["nll"].isnan().tolist() == [i == 2 for i in range(6)]
    assert module.forget_metric == module.retain_metric == "accuracy"


def test_a_module_with_a_score_watches_it_and_one_without_its_loss():
    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    def right(model, batch):
        return (model(batch[0]).argmax(1) == batch[1]).float()

    for score, metric in ((right, "score"), (None, "loss")):
        module = UnlearnModule(trained().net, loss, score, chance=1 / CLASSES)
        forgetting = unlearn_callback(loader(True), loader(False), continue_training=True, retain_tolerance=0.05)
        trainer(forgetting).fit(module, loader(False), loader(False))
        assert forgetting.report.status == "unlearned"
        assert list(forgetting.report.before["forget"]) == [metric]


def test_the_forget_loss_may_be_another_one():
    seen = []

    def watched(model, batch):
        seen.extend(batch[1].tolist())
        return model(batch[0])[:, FORGET].square().mean()

    module = UnlearnModule(trained().net, lambda m, b: cross_entropy(m(b[0]), b[1]), forget_loss=watched)
    assert module.forget_step((blobs().tensors[0][:4], torch.full((4,), FORGET)), 0) > 0
    assert set(seen) == {FORGET}


def test_embedded_pictures_are_what_they_are_said_to_be():
    drawings = load_drawings()
    assert drawings.pictures.dtype == torch.uint8 and drawings.pictures.shape[1:] == (4, 64, 64)
    assert torch.bincount(drawings.styles).tolist() == [len(drawings.thing_names)] * 5
    assert torch.bincount(drawings.things).unique().tolist() == [5]


def test_a_rendering_is_new_each_time_and_the_same_for_a_seed():
    pictures = load_drawings().pictures[:4]
    first, second = (render(pictures, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(first, render(pictures, torch.Generator().manual_seed(0)))
    assert (first - second).abs().mean() > 0.05
    assert first.isfinite().all() and first.abs().max() < 3


def test_the_embedded_clip_knows_what_it_is_asked_to_forget():
    """On fresh renderings: things at least 60 %, styles at least 90 %."""
    module, data = EmbeddedClip().eval(), EmojiDataModule(thing="cat", seed=77)
    data.setup("fit")
    found = {"thing_accuracy": [], "style_accuracy": []}
    with torch.no_grad():
        for number, batch in enumerate(data.retain_dataloader("val")):
            scores = module.scores(batch, number)
            for name, values in found.items():
                values.append(scores[name])
    means = {name: torch.cat(values).nanmean().item() for name, values in found.items()}
    assert means["thing_accuracy"] >= 0.6 and means["style_accuracy"] >= 0.9
