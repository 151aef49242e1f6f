"""Keywords of version 0.1 go where they belong now, and say so; what an old checkpoint was asked for is recognised."""

from __future__ import annotations

import copy

import pytest
from jsonargparse import ArgumentParser

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.callbacks.deprecated import DEFAULTS, OF_METHOD, OF_RUNTIME
from slug_lightning.errors import UnlearnError
from slug_lightning.methods import SLUG, Method, Runtime
from slug_lightning.objective.retain_cache import RetainCache
from slug_lightning.trainer.previous_run import PreviousRun


class Other(Method):
    def run(self, context):
        return []


@pytest.mark.parametrize(
    ("old", "place", "new"),
    [
        ({"layers": "a.*"}, r"layers='a.\*' is now method=SLUG\(layers=…\)", {"method": SLUG(layers="a.*")}),
        ({"granularity": "module"}, r"method=SLUG\(granularity=…\)", {"method": SLUG(granularity="module")}),
        ({"max_evaluations": 3}, r"method=SLUG\(max_evaluations=…\)", {"method": SLUG(max_evaluations=3)}),
        ({"margin": 0.2}, r"margin=0.2 is now method=SLUG\(step_margin=…\)", {"method": SLUG(step_margin=0.2)}),
        ({"strengths": [0.5]}, r"strengths=\[0.5\] is now scales=…", {"scales": [0.5]}),
        ({"then": "continue"}, "then='continue' is now continue_training=True", {"continue_training": True}),
        ({"replay": False}, r"replay=False is now runtime=Runtime\(replay=…\)", {"runtime": Runtime(replay=False)}),
        ({"replay_budget": 0}, r"runtime=Runtime\(replay_budget=…\)", {"runtime": Runtime(replay_budget=0)}),
        ({"count_cost": True}, r"runtime=Runtime\(count_cost=…\)", {"runtime": Runtime(count_cost=True)}),
        ({"offload_gradient": True}, r"runtime=Runtime\(offload_gradient=…\)", {"runtime": Runtime(offload_gradient=True)}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_old_keyword_does_what_the_new_one_does_and_names_it(old, place, new):
    with pytest.warns(FutureWarning, match=place) as caught:
        callback = UnlearnCallback(**old)
    assert caught[0].filename == __file__
    for name, value in new.items():
        assert getattr(callback, name) == value


def test_a_cache_is_taken_over_too():
    cache = RetainCache()
    with pytest.warns(FutureWarning, match="retain_cache=.* is now"):
        assert UnlearnCallback(retain_cache=cache).runtime.retain_cache is cache


def test_old_and_new_ones_go_together():
    with pytest.warns(FutureWarning, match="layers=.* is now .*; replay=.* is now"):
        callback = UnlearnCallback(layers="a.*", replay=False, method=SLUG(step_margin=0.1))
    assert callback.method == SLUG(layers="a.*", step_margin=0.1) and callback.runtime == Runtime(replay=False)


@pytest.mark.filterwarnings("ignore:UnlearnCallback")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "go"}, "then must be 'stop' or 'continue', got 'go'"),
        ({"margin": -1}, "step_margin must be >= 0"),
        ({"layers": "a", "method": Other()}, "layers: options of SLUG; give Other options of its own"),
        ({"layers": "a", "method": SLUG(layers="b")}, "layers is given twice: 'a' by its old keyword, 'b' by the new"),
        ({"replay_budget": 1, "runtime": Runtime(replay_budget=2)}, "replay_budget is given twice"),
    ],
)
def test_what_is_wrong_is_refused_as_ever(options, message):
    with pytest.raises(UnlearnError, match=message):
        UnlearnCallback(**options)


def test_the_defaults_of_an_old_config_ask_for_nothing():
    """It has every keyword, and what is given beside them counts."""
    method, runtime = SLUG(layers="a.*", step_margin=0.3), Runtime(replay=False)
    callback = UnlearnCallback(**DEFAULTS, method=method, runtime=runtime, scales=[2.0], continue_training=True)
    assert (callback.method, callback.runtime, callback.scales, callback.continue_training) == (method, runtime, [2.0], True)
    assert isinstance(UnlearnCallback(**DEFAULTS, method=Other()).method, Other)


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match=r"UnlearnCallback.__init__\(\) got an unexpected keyword argument 'nonsense'"):
        UnlearnCallback(nonsense=1)


OLD = {
    "concepts": None, "layers": "*", "granularity": "tensor", "forget_metric": None, "forget_target": None,
    "retain_metric": None, "retain_tolerance": 0.01, "margin": 0.0, "on_infeasible": "skip",
}  # fmt: skip
"""As version 0.1 wrote it into a checkpoint."""
PAPER = UnlearnCallback(method=SLUG.paper())


@pytest.mark.parametrize(
    ("changed", "callback", "is_same"),
    [
        ({}, PAPER, True),
        ({"margin": 0.1}, UnlearnCallback(method=SLUG.paper(step_margin=0.1)), True),
        ({}, UnlearnCallback(method=SLUG.paper(max_evaluations=3)), True),  # which was not recorded
        ({"margin": 0.1}, PAPER, False),
        ({"layers": "a.*"}, PAPER, False),
        ({"concepts": ["a"]}, PAPER, False),
        ({}, UnlearnCallback(), False),  # which is more than that version could do
        ({}, UnlearnCallback(method=Other()), False),
        ({}, UnlearnCallback(method=SLUG.paper(curve=min)), False),  # of which there was one only
    ],
)
def test_a_request_of_version_0_1_is_recognised(changed, callback, is_same):
    assert PreviousRun(None, OLD | changed, None).is_same_request(callback._request()) == is_same


@pytest.mark.parametrize("other", [SLUG(max_evaluations=3), SLUG(search=min), Other()], ids=["option", "rule", "method"])
def test_a_request_of_now_is_the_same_only_if_all_of_it_is(other):
    recorded = UnlearnCallback()._request()
    assert PreviousRun(None, recorded, None).is_same_request(UnlearnCallback()._request())
    assert not PreviousRun(None, recorded, None).is_same_request(UnlearnCallback(method=other)._request())


def test_an_option_that_is_newer_than_a_checkpoint_had_its_default():
    recorded = copy.deepcopy(PAPER._request())
    del recorded["method"]["step_margin"]
    assert PreviousRun(None, recorded, None).is_same_request(PAPER._request())
    assert not PreviousRun(None, recorded, None).is_same_request(UnlearnCallback(method=SLUG.paper(step_margin=0.1))._request())
    assert PreviousRun(None, recorded, None).is_same_request(UnlearnCallback(method=SLUG.paper(check_rounding=True))._request())


def test_what_is_near_is_part_of_a_request_where_it_changes_something():
    recorded = PreviousRun(None, PAPER._request(), None)
    assert recorded.is_same_request(UnlearnCallback(method=SLUG.paper(), near_retain=None)._request())  # shown, and not a bound
    assert not recorded.is_same_request(UnlearnCallback(method=SLUG.paper(), near_retain=["cat"])._request())
    recorded = PreviousRun(None, UnlearnCallback()._request(), None)
    assert recorded.is_same_request(UnlearnCallback()._request())
    assert not recorded.is_same_request(UnlearnCallback(near_retain=None)._request())


def test_every_keyword_that_has_moved_is_an_option_where_it_went():
    assert {"step_margin" if name == "margin" else name for name in OF_METHOD} <= vars(SLUG()).keys()
    assert set(OF_RUNTIME) == vars(Runtime()).keys()


@pytest.mark.parametrize("keyword", ["layers", "then", "strengths", "replay", "retain_cache"])
def test_yaml_may_have_an_old_keyword(keyword):
    values = {"layers": "a.*", "then": "continue", "strengths": [0.5], "replay": False, "retain_cache": "kept"}
    parser = ArgumentParser()
    parser.add_argument("--callback", type=UnlearnCallback)
    given = {"class_path": "slug_lightning.callbacks.UnlearnCallback", "init_args": {keyword: values[keyword]}}
    parsed = parser.parse_object({"callback": given})
    with pytest.warns(FutureWarning, match=f"{keyword}=.* is now"):
        parser.instantiate(parsed)
