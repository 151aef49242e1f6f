"""A CLIP is asked in more than one way."""

import pytest
import torch

from slug_lightning import UnlearnError
from slug_lightning.clip.wordings import Wording, Wordings
from slug_lightning.datamodules import EmojiDataModule
from slug_lightning.modules import EmbeddedClip
from slug_lightning.objective.log_capture import read_logs

CLASSES = {"thing": ["cat", "dog", "owl"], "style": ["oil", "ink"]}


def test_the_prompts_of_a_sample_have_its_own_thing_and_each_style():
    wording = Wordings(CLASSES, {"style": {"both": "a {thing} in {style}"}}).by_metric["style_both_accuracy"]
    batch = {"style": torch.tensor([0, -1, 1, 1]), "shown_thing": torch.tensor([2, 0, 1, 2])}
    groups = {key: rows.tolist() for key, rows in wording.groups(batch).items()}
    assert groups == {(1,): [2], (2,): [0, 3]}
    assert wording.prompts((2,)) == ["a owl in oil", "a owl in ink"]
    assert not wording.is_asked({"style": batch["style"]})


def test_a_wording_without_another_set_is_asked_of_all_at_once():
    wording = Wording("style", "drawn with {style}", (), CLASSES)
    assert {key: rows.tolist() for key, rows in wording.groups({"style": torch.tensor([-1, 0, 1])}).items()} == {(): [1, 2]}
    assert wording.groups({"style": torch.tensor([-1])}) == {}


@pytest.mark.parametrize("template", ["{thing} alone", "{style} by {painter}", "nothing"])
def test_a_template_must_name_its_set_and_known_ones_only(template):
    with pytest.raises(UnlearnError, match=r"wordings: .* must name \{style\}, and only sets of prompts \(thing, style\)"):
        Wordings(CLASSES, {"style": {"bad": template}})


def test_the_metric_is_how_often_the_right_prompt_is_the_nearest():
    """Sample by sample, each against the prompts of its own thing, by the text tower as it is."""
    module = EmbeddedClip().eval()
    data = EmojiDataModule(style="noto")
    data.setup("fit")
    batch = next(iter(data.forget_dataloader("val")))
    with torch.no_grad(), read_logs(module) as reader:
        module.validation_step(batch, 0)
        values = reader.values()
        image = module.embed(batch, 0)
        right = []
        for row, thing in enumerate(batch["shown_thing"].tolist()):
            texts = [f"{module.prompts['thing'][thing]} in {style}" for style in module.prompts["style"]]
            features = torch.nn.functional.normalize(module.model.encode_text(module.tokenizer(texts)), dim=-1)
            right.append(float((image[row] @ features.T).argmax() == batch["style"][row]))
    assert values["style_combined_accuracy"] == pytest.approx(sum(right) / len(right))
    assert "thing_combined_accuracy" not in values  # no thing is asked for


def test_what_is_not_wanted_is_not_computed():
    module = EmbeddedClip().eval()
    data = EmojiDataModule(style="noto")
    data.setup("fit")
    batch = next(iter(data.forget_dataloader("val")))
    with torch.no_grad(), read_logs(module, wanted=["style_accuracy"]) as reader:
        module.validation_step(batch, 0)
        assert "style_combined_accuracy" not in reader.logged() and "style_accuracy" in reader.logged()
    assert module.wanted_metrics is None
