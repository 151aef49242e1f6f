"""What is said where nothing can be loaded, and where transformers refuses the installed PEFT."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, integrations

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.models import load_causal_lm
from slug_lightning.modules import CausalLMModule
from slug_lightning.utils import pretrained
from slug_lightning.utils.pretrained import load_pretrained, peft_refusal


def model():
    return GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))


@pytest.fixture
def adapted(tmp_path):
    """A folder with adapters, which transformers loads onto their base."""
    model().save_pretrained(tmp_path / "base")
    made = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    # By PEFT itself, which asks for no version.
    get_peft_model(made, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path / "adapted")
    return tmp_path / "adapted"


def test_a_refused_peft_is_named_with_both_versions_and_the_line_to_install(adapted, monkeypatch):
    monkeypatch.setattr(integrations.peft, "MIN_PEFT_VERSION", "98.7")
    refusal = f"transformers {transformers.__version__} refuses the installed PEFT {version('peft')} (it needs 98.7 or later); "
    with pytest.raises(UnlearnError) as error:
        load_causal_lm(adapted)
    major, minor, *_ = transformers.__version__.split(".")
    older = f"transformers<{major}.{minor}"
    assert str(error.value) == (
        f"model: GPT2LMHeadModel has adapters, but {refusal}"
        f'pip install "peft>=98.7", or where there is none yet, pip install --upgrade peft "{older}"'
    )


def test_adapters_are_loaded_where_peft_is_not_refused(adapted, monkeypatch):
    monkeypatch.setattr(integrations.peft, "MIN_PEFT_VERSION", version("peft"))
    assert any("lora" in name for name, _ in load_causal_lm(adapted).named_parameters())


@pytest.mark.parametrize(("lowest", "refused"), [("0.1", False), (version("peft"), False), ("98.7", True)])
def test_peft_is_refused_below_what_transformers_asks_for(lowest, refused, monkeypatch):
    monkeypatch.setattr(integrations.peft, "MIN_PEFT_VERSION", lowest)
    assert bool(peft_refusal()) == refused


def test_a_model_that_is_given_is_refused_like_one_that_is_named(adapted, monkeypatch):
    given = GPT2LMHeadModel.from_pretrained(adapted)
    monkeypatch.setattr(integrations.peft, "MIN_PEFT_VERSION", "98.7")
    with pytest.raises(UnlearnError, match="^model: GPT2LMHeadModel has adapters, but transformers .* refuses"):
        CausalLMModule(given)


def test_without_peft_nothing_is_refused(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pretrained, "version", missing)
    assert peft_refusal() == ""


def test_another_fault_is_not_laid_to_peft(tmp_path, monkeypatch):
    monkeypatch.setattr(integrations.peft, "MIN_PEFT_VERSION", "98.7")
    with pytest.raises(UnlearnError, match=f"^encoder: '{tmp_path}' cannot be loaded .*; give its folder"):
        load_pretrained("encoder", GPT2LMHeadModel, tmp_path)
