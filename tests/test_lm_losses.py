"""What makes a language model forget: closed forms, signs, and nothing of the padding."""

from __future__ import annotations

import math

import pytest
import torch
from _amounts import examples
from hypothesis import example, given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Categorical, kl_divergence

from slug_lightning.errors import UnlearnError
from slug_lightning.lm.losses import (
    DPO,
    ICU,
    KL,
    NPO,
    GradDiff,
    GradientAscent,
    LMLoss,
    SimNPO,
    log_likelihood,
    sequence_kl,
    sequence_nll,
    sequence_unlikelihood,
)
from slug_lightning.lm.sequences import pad

V = 7
ALL = [ICU(), ICU(unlikelihood=True), GradientAscent(), GradDiff(), KL(), NPO(), SimNPO(), DPO()]
FORGET_ONLY = [
    ICU(learn=0, keep=0),
    ICU(learn=0, keep=0, unlikelihood=True),
    GradientAscent(),
    GradDiff(retain=0),
    NPO(retain=0),
    SimNPO(retain=0),
    DPO(retain=0),
]
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any)
seeds = st.integers(0, 1000)
quick = examples(25)


class Bigrams:
    """A language model and a reference that know one table: logits of the next token by the last one, `[V, V]`."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, sequences):
        return self.table[sequences["input_ids"]]

    def kl(self, logits, sequences):
        return sequence_kl(logits, self(sequences), sequences)

    def log_likelihood(self, sequences, start=1):
        return log_likelihood(self(sequences), sequences, start).detach()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(counts, seed: int) -> list[Tensor]:
    draw = generator(seed)
    return [torch.randint(V, (count,), generator=draw) for count in counts]


def random_table(seed: int) -> Tensor:
    return torch.randn(V, V, generator=generator(seed)).requires_grad_()


def batch_of(passages: int = 2, pairs: int = 1, seed: int = 0) -> dict:
    """Passages of 5 tokens, 2 of them prefix; refusals of 4 tokens with the same prefix; pairs of 3 to 6 tokens."""
    forget = random_rows([5] * passages, seed)
    refusals = [torch.cat([row[:2], answer]) for row, answer in zip(forget, random_rows([2] * passages, seed + 1), strict=True)]
    kept = random_rows([3 + i % 4 for i in range(passages * pairs)], seed + 2)
    return {"forget": pad(forget), "pair": pad(kept), "refusal": pad(refusals), "prefix": 2}


def total(loss: LMLoss, table: Tensor, batch: dict, original: Tensor) -> Tensor:
    return torch.stack(list(loss(Bigrams(table), batch, Bigrams(original)).values())).sum()


# ---- of one sequence


# Of logits up to 16 in fp32: the likelihood of a token that is nearly certain is the difference of two such numbers.
ROUNDING = 16 * 2.0**-24


@quick
@given(lengths, seeds, st.integers(1, 4))
@example([4], 196, 3)
def test_likelihoods_are_those_that_one_token_after_the_other_gives(counts, seed, start):
    rows = random_rows(counts, seed)
    sequences = pad(rows)
    logits = 3 * torch.randn(*sequences["input_ids"].shape, V, generator=generator(seed))

    def slowly(b, first):
        return [Categorical(logits=logits[b, t - 1]).log_prob(rows[b][t]).item() for t in range(first, len(rows[b]))]

    nll = [-sum(slowly(b, 1)) / max(len(row) - 1, 1) for b, row in enumerate(rows)]
    assert sequence_nll(logits, sequences).tolist() == pytest.approx(nll, rel=1e-5, abs=ROUNDING)
    summed = [sum(slowly(b, start)) for b in range(len(rows))]
    assert log_likelihood(logits, sequences, start).tolist() == pytest.approx(summed, rel=1e-5, abs=ROUNDING)


@quick
@given(lengths, seeds)
def test_the_divergence_is_that_of_the_original_from_the_current_model(counts, seed):
    sequences = pad(random_rows(counts, seed))
    current, original = 3 * torch.randn(2, *sequences["input_ids"].shape, V, generator=generator(seed))
    expected = []
    for b, count in enumerate(counts):
        each = kl_divergence(Categorical(logits=original[b]), Categorical(logits=current[b]))[: max(count - 1, 0)]
        expected.append(each.mean().item() if count > 1 else 0.0)
    assert sequence_kl(current, original, sequences).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # A distribution is the same whatever is added to its logits.
    assert sequence_kl(current + 500, original - 300, sequences).tolist() == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert sequence_kl(original, original, sequences).tolist() == [0.0] * len(counts)


@quick
@given(lengths, seeds, st.integers(1, 5))
def test_padding_changes_no_bit_whatever_it_holds_and_however_long_it_is(counts, seed, more):
    sequences = pad(random_rows(counts, seed))
    logits, original = torch.randn(2, *sequences["input_ids"].shape, V, generator=generator(seed))
    longer = {
        "input_ids": torch.nn.functional.pad(sequences["input_ids"], (0, more), value=3),
        "attention_mask": torch.nn.functional.pad(sequences["attention_mask"], (0, more)),
    }
    longer["input_ids"][longer["attention_mask"] == 0] = 5
    filled = [torch.nn.functional.pad(values, (0, 0, 0, more)) for values in (logits, original)]
    for values in filled:
        values[longer["attention_mask"] == 0] = math.nan
        values.requires_grad_()
    for short, long in (
        (sequence_nll(logits, sequences), sequence_nll(filled[0], longer)),
        (sequence_kl(logits, original, sequences), sequence_kl(*filled, longer)),
        (log_likelihood(logits, sequences, 2), log_likelihood(filled[0], longer, 2)),
    ):
        assert torch.equal(short, long.detach())
        (gradient,) = torch.autograd.grad(long.sum(), filled[0])
        assert gradient.isfinite().all() and not gradient[longer["attention_mask"] == 0].any()


def test_a_token_that_the_original_excludes_costs_nothing_and_one_that_only_the_model_does_costs_all():
    sequences = pad([torch.tensor([0, 1])])
    excluded, free = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, requires_grad=True)
    excluded[..., 3] = -math.inf
    found = sequence_kl(free, excluded, sequences)
    assert found.item() == pytest.approx(math.log(4 / 3))
    assert torch.autograd.grad(found.sum(), free)[0].isfinite().all()
    assert sequence_kl(excluded, free, sequences).item() == math.inf


@quick
@given(lengths, seeds)
def test_unlikelihood_is_minus_the_logarithm_of_what_the_other_tokens_get(counts, seed):
    rows = random_rows(counts, seed)
    model = Bigrams(random_table(seed).detach().double())
    found = sequence_unlikelihood(model(pad(rows)), pad(rows))
    for row, value in zip(rows, found, strict=True):
        p = model.table.softmax(1)[row[:-1], row[1:]]
        expected = -(1 - p).log().mean() if len(row) > 1 else torch.tensor(0.0)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_unlikelihood_pushes_what_is_certain_and_lets_go_of_what_is_not():
    """Ascent on the likelihood does the opposite, which is how it runs away."""
    sequences = {"input_ids": torch.tensor([[0, 1]]), "attention_mask": torch.ones(1, 2).long()}
    pushed = {}
    for certainty in (40.0, 0.0, -40.0):
        logits = torch.zeros(1, 2, 2)
        logits[0, 0, 1] = certainty
        for loss in (sequence_unlikelihood, lambda *given: -sequence_nll(*given)):
            given = logits.clone().requires_grad_()
            loss(given, sequences).sum().backward()
            pushed.setdefault(certainty, []).append(given.grad[0, 0, 1].item())
    assert pushed == {40.0: [1.0, 0.0], 0.0: [0.5, 0.5], -40.0: [pytest.approx(0.0, abs=1e-15), 1.0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_logits_are_computed_with_in_fp32(dtype):
    sequences = pad(random_rows([6, 3], 0))
    logits, original = (8 * torch.randn(2, 2, 6, V, generator=generator(0))).to(dtype)
    assert torch.equal(sequence_nll(logits, sequences), sequence_nll(logits.float(), sequences))
    with torch.autocast("cpu", torch.bfloat16):
        found = sequence_kl(logits, original, sequences)
    assert found.dtype == torch.float32
    assert torch.equal(found, sequence_kl(logits.float(), original.float(), sequences))


def test_logits_of_other_positions_than_the_tokens_are_refused():
    with pytest.raises(UnlearnError, match=r"model: logits have shape \[1, 9\] for tokens of shape \[1, 5\]"):
        sequence_nll(torch.zeros(1, 9, V), pad(random_rows([5], 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_held_for_the_backward_pass_is_what_is_said(dtype):
    sequences = pad(random_rows([40, 20], 0))
    logits, original = torch.randn(2, 2, 40, 500).to(dtype)
    logits.requires_grad_()
    one = (39 + 19) * 500 * 4

    def held(compute) -> float:
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            keeps_the_graph = compute()
        del keeps_the_graph
        return sum(storages.values()) / one

    assert held(lambda: sequence_nll(logits, sequences)) == pytest.approx(1, abs=0.01)
    assert held(lambda: sequence_kl(logits, original, sequences)) == pytest.approx(2, abs=0.01)


# ---- of a passage


@pytest.mark.parametrize("loss", FORGET_ONLY, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("seed", range(5))
def test_a_step_down_the_loss_makes_the_passage_less_likely(loss, seed):
    batch, table, original = batch_of(seed=seed), random_table(seed), random_table(seed + 50)
    (direction,) = torch.autograd.grad(total(loss, table, batch, original), table)
    (slope,) = torch.autograd.grad(log_likelihood(Bigrams(table)(batch["forget"]), batch["forget"], 2).sum(), table)
    assert (slope * -direction).sum() < 0
    small = 1e-2 / direction.norm()

    def likelihood(at):
        return log_likelihood(Bigrams(at)(batch["forget"]), batch["forget"], 2).sum()

    assert likelihood(table - small * direction) < likelihood(table)


@pytest.mark.parametrize("loss", [ICU(forget=0), GradDiff(), NPO(), SimNPO(), DPO()], ids=lambda loss: type(loss).__name__)
def test_a_step_down_the_part_to_learn_makes_the_pairs_likelier(loss):
    batch, table, original = batch_of(), random_table(0), random_table(9)
    part = loss(Bigrams(table), batch, Bigrams(original))["learn"].sum()
    (direction,) = torch.autograd.grad(part, table)
    nll = [sequence_nll(Bigrams(at)(batch["pair"]), batch["pair"]).sum() for at in (table, table - 1e-2 * direction)]
    assert nll[1] < nll[0]


def test_the_parts_are_what_the_papers_write():
    batch, table, original = batch_of(), random_table(0), random_table(9)
    model, before = Bigrams(table), Bigrams(original)
    nll = sequence_nll(model(batch["forget"]), batch["forget"])
    learn = sequence_nll(model(batch["pair"]), batch["pair"])
    keep = sequence_kl(model(batch["pair"]), before(batch["pair"]), batch["pair"])
    ratio = log_likelihood(model(batch["forget"]), batch["forget"]) - before.log_likelihood(batch["forget"])

    def answers(kind):
        return log_likelihood(model(batch[kind]), batch[kind], 2) - before.log_likelihood(batch[kind], 2)

    margin = answers("refusal") - answers("forget")
    expected = {
        ICU(): {"forget": -nll, "learn": 0.5 * learn, "keep": keep},
        ICU(2.0, 3.0, 4.0): {"forget": -2 * nll, "learn": 3 * learn, "keep": 4 * keep},
        GradientAscent(): {"forget": -nll},
        GradDiff(0.25): {"forget": -nll, "learn": 0.25 * learn},
        KL(0.5): {"forget": -nll, "keep": 0.5 * keep},
        NPO(0.3, 0.5): {"forget": -2 / 0.3 * (1 / (1 + (0.3 * ratio).exp())).log(), "learn": 0.5 * learn},
        SimNPO(2.0, 0.5, 3.0): {"forget": -2 / 2.0 * (1 / (1 + (-2.0 * nll + 0.5).exp())).log(), "learn": 3 * learn},
        DPO(0.3, 0.5): {"forget": -(1 / (1 + (-0.3 * margin).exp())).log(), "learn": 0.5 * learn},
    }
    for loss, parts in expected.items():
        found = loss(model, batch, before)
        assert list(found) == list(parts)
        for name, values in parts.items():
            torch.testing.assert_close(found[name], values)
            assert found[name].shape == (2,)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_a_passage_counts_the_same_whatever_is_beside_it(loss):
    batch, table, original = batch_of(passages=3, pairs=2), random_table(0), Bigrams(random_table(9))
    together = loss(Bigrams(table), batch, original)
    rows = {"forget": slice(1, 2), "refusal": slice(1, 2), "pair": slice(2, 4)}
    alone = {kind: {key: values[at] for key, values in batch[kind].items()} for kind, at in rows.items()}
    for name, values in loss(Bigrams(table), {**alone, "prefix": 2}, original).items():
        assert torch.equal(values, together[name][1:2])


def test_the_pairs_of_a_passage_are_averaged():
    batch, table, original = batch_of(passages=2, pairs=3), random_table(0), random_table(9)
    found = ICU(forget=0, learn=1)(Bigrams(table), batch, Bigrams(original))
    nll = sequence_nll(table[batch["pair"]["input_ids"]], batch["pair"])
    torch.testing.assert_close(found["learn"], torch.stack([nll[:3].mean(), nll[3:].mean()]))
    with pytest.raises(UnlearnError, match="pair: got 6 sequences for 4 passages"):
        GradDiff()(Bigrams(table), {**batch, "forget": pad(random_rows([5] * 4, 0))}, None)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_sequences_without_a_token_to_predict_cost_nothing(loss):
    short = pad([torch.tensor([1]), torch.tensor([], dtype=torch.long)])
    batch = {"forget": short, "pair": short, "refusal": short, "prefix": 1}
    table = random_table(0)
    found = total(loss, table, batch, random_table(9))
    (gradient,) = torch.autograd.grad(found, table)
    assert found.item() == 0 and not gradient.any()


@pytest.mark.parametrize("seed", range(3))
def test_npo_becomes_gradient_ascent_as_beta_goes_to_zero(seed):
    batch, table, original = batch_of(seed=seed), random_table(seed), random_table(seed + 50)
    (ascent,) = torch.autograd.grad(log_likelihood(Bigrams(table)(batch["forget"]), batch["forget"]).sum(), table)
    distances = []
    for beta in (0.1, 0.01, 0.001):
        (found,) = torch.autograd.grad(total(NPO(beta, retain=0), table, batch, original), table)
        distances.append(((found - ascent).norm() / ascent.norm()).item())
    assert distances[2] < distances[1] < distances[0] and distances[2] < 0.01


@quick
@given(seeds, st.floats(0.05, 3))
def test_the_gradient_of_npo_is_that_of_ascent_weighted_by_what_is_left(seed, beta):
    batch, table, original = batch_of(passages=1, seed=seed), random_table(seed), random_table(seed + 50)
    log_p = log_likelihood(Bigrams(table)(batch["forget"]), batch["forget"])
    (ascent,) = torch.autograd.grad(log_p.sum(), table)
    p, p0 = log_p.detach().double().exp(), Bigrams(original).log_likelihood(batch["forget"]).double().exp()
    weight = 2 * p**beta / (p**beta + p0**beta)  # arXiv 2404.05868, below eq. 4
    (found,) = torch.autograd.grad(total(NPO(beta, retain=0), table, batch, original), table)
    torch.testing.assert_close(found, (weight * ascent).float(), rtol=1e-3, atol=1e-6)


def test_npo_and_dpo_are_finite_however_far_the_model_has_gone():
    batch, original = batch_of(), random_table(9)
    for scale in (1e4, -1e4):
        table = (scale * original.detach()).requires_grad_()
        for loss in (NPO(beta=5.0), DPO(beta=5.0), SimNPO()):
            found = total(loss, table, batch, original)
            (gradient,) = torch.autograd.grad(found, table)
            assert found.isfinite() and gradient.isfinite().all()


@quick
@given(seeds, st.floats(0.1, 5), st.floats(0, 2))
def test_simnpo_is_bounded_and_lets_go_of_what_is_forgotten(seed, beta, gamma):
    batch, loss = batch_of(seed=seed), SimNPO(beta, gamma, retain=0)
    found = loss(Bigrams(random_table(seed)), batch, None)["forget"]
    assert (found > 0).all() and (found <= 2 / beta * math.log1p(math.exp(gamma)) + 1e-6).all()
    forgotten = torch.full((V, V), 0.0)
    for row in batch["forget"]["input_ids"]:
        forgotten[row[:-1], row[1:]] = -200.0
    forgotten.requires_grad_()
    after = total(loss, forgotten, batch, forgotten)
    if len(batch["forget"]["input_ids"].unique()) < V:  # else a token may have no other that follows it
        (gradient,) = torch.autograd.grad(after, forgotten)
        assert after < 1e-3 and gradient.abs().max() < 1e-3


def test_dpo_looks_at_nothing_before_the_prefix_has_ended():
    batch, original = batch_of(passages=1), Bigrams(random_table(9))
    batch["forget"], batch["refusal"] = pad([torch.tensor([0, 1, 2, 3])]), pad([torch.tensor([0, 1, 4])])
    table = random_table(0)
    (gradient,) = torch.autograd.grad(DPO(retain=0)(Bigrams(table), batch, original)["forget"].sum(), table)
    assert gradient.any(1).tolist() == [False, True, True, False, False, False, False]


def test_of_gradients_none_flows_to_the_original():
    batch, table, original = batch_of(), random_table(0), random_table(9)
    for loss in ALL:
        total(loss, table, batch, original).backward()
        assert table.grad.any() and original.grad is None
        table.grad = None


# ---- what a user writes


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_a_reference_is_needed_where_it_is_said(loss):
    assert loss.needs_reference == (type(loss) in (ICU, KL, NPO, DPO))
    if loss.needs_reference:
        with pytest.raises(UnlearnError, match="reference must be given: .* pass a FrozenCopy"):
            loss(Bigrams(random_table(0)), batch_of(), None)
    else:
        loss(Bigrams(random_table(0)), batch_of(), None)


def test_a_part_without_a_coefficient_is_not_computed():
    asked = []

    def forward(sequences):
        asked.append(sequences)
        return random_table(0)[sequences["input_ids"]]

    batch = batch_of()
    assert list(NPO(retain=0)(forward, batch, Bigrams(random_table(9)))) == ["forget"]
    assert list(ICU(forget=0, keep=0)(forward, batch, None)) == ["learn"]
    assert asked == [batch["forget"], batch["pair"]]


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (ICU, ["forget", "learn", "keep"]),
        (GradDiff, ["retain"]),
        (KL, ["keep"]),
        (NPO, ["beta", "retain"]),
        (SimNPO, ["beta", "gamma", "retain"]),
        (DPO, ["beta", "retain"]),
    ],
)
def test_a_coefficient_out_of_its_range_is_named(kind, names, bad):
    for name in names:
        with pytest.raises(UnlearnError, match=rf"^{name} must be >=? 0 and finite, got {bad}"):
            kind(**{name: bad})


def test_zeros_that_leave_nothing_to_train_are_refused():
    with pytest.raises(UnlearnError, match="at least one of forget, learn and keep must be > 0"):
        ICU(0, 0, 0)
    for kind in (NPO, SimNPO, DPO):
        with pytest.raises(UnlearnError, match="^beta must be > 0 and finite, got 0"):
            kind(beta=0)
    with pytest.raises(UnlearnError, match="^keep must be > 0 and finite, got 0"):
        KL(keep=0)


def test_a_config_names_a_loss_and_its_coefficients():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=LMLoss)
    found = parser.parse_args(["--loss=slug_lightning.lm.losses.NPO", "--loss.beta=0.2"])
    assert parser.instantiate_classes(found).loss == NPO(beta=0.2)
    with pytest.raises(Exception, match="retain"):
        parser.parse_args(["--loss=slug_lightning.lm.losses.NPO", "--loss.retain=much"])
