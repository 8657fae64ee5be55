"""Theory of token baselines: enumeration, exact variances, laws of groups, finite groups."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.claims import load_results, save_results
from collai.otb import theory
from collai.otb.theory import (
    enumerate_policy,
    estimate_advantages,
    finite_group_study,
    gradient_variance,
    group_law,
    measure,
    position_baselines,
    variance_ladder,
)
from collai.rl.adv import otb_advantage

QUICK = settings(deadline=None, derandomize=True, max_examples=20)
POLICIES = {"seed": st.integers(0, 10**6), "vocab": st.integers(2, 4), "horizon": st.integers(1, 4), "eos": st.booleans()}


def answers(vocab, horizon, eos, prefix=()):
    """Depth first, smallest token first."""
    if len(prefix) == horizon or (eos and prefix[-1:] == (0,)):
        return [prefix]
    return [a for v in range(vocab) for a in answers(vocab, horizon, eos, (*prefix, v))]


def slow_ladder(seed, vocab, horizon, eos):
    """The ladder by loops over answers and tokens, without any array of the module."""
    rng = np.random.default_rng(seed)
    u = 1.2 * rng.standard_normal((vocab, 4))
    f = {prefix: rng.standard_normal(4) for n in range(horizon) for prefix in itertools.product(range(vocab), repeat=n)}
    total, lists = 0.0, []
    for answer in answers(vocab, horizon, eos):
        reward = float(rng.random() < (0.7 if answer[0] == 1 else 0.3))
        p, scores, energy = 1.0, [], []
        for t, token in enumerate(answer):
            z = u @ f[answer[:t]]
            q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            slope = np.eye(vocab)[token] - q
            p *= q[token]
            scores.append(np.outer(slope, f[answer[:t]]).ravel())
            energy.append(slope @ slope)
        lists.append((p, scores, energy, reward))
        total += p
    assert abs(total - 1) < 1e-12
    weights = {"mean_t": lambda s, e, t: 1.0, "token": lambda s, e, t: e[t], "cumulative": lambda s, e, t: sum(e[:t + 1]),
               "token_true": lambda s, e, t: s[t] @ s[t], "cumulative_true": lambda s, e, t: sum(x @ x for x in s[:t + 1])}
    b = {"none": [0.0] * horizon, "mean": [sum(p * r for p, _, _, r in lists)] * horizon}
    whole = [(p, sum(s) @ sum(s), r) for p, s, _, r in lists]
    b["sequence"] = [sum(p * w * r for p, w, r in whole) / sum(p * w for p, w, _ in whole)] * horizon
    for name, weight in weights.items():
        b[name] = [sum(p * weight(s, e, t) * r for p, s, e, r in lists if t < len(s))
                   / sum(p * weight(s, e, t) for p, s, e, _ in lists if t < len(s)) for t in range(horizon)]
    b["exact"] = [sum(p * r * (s[t] @ sum(s)) for p, s, _, r in lists if t < len(s))
                  / sum(p * (s[t] @ s[t]) for p, s, _, _ in lists if t < len(s)) for t in range(horizon)]
    found = {}
    for name, base in b.items():
        g = [(p, sum(x * (r - base[t]) for t, x in enumerate(s))) for p, s, _, r in lists]
        mean = sum(p * x for p, x in g)
        found[name] = sum(p * (x - mean) @ (x - mean) for p, x in g)
    return found


# --- enumeration and ladder ----------------------------------------------------------------------

@pytest.mark.parametrize(("seed", "vocab", "horizon", "eos"), [(0, 3, 5, True), (7, 3, 3, False), (1, 2, 4, True), (2, 4, 1, True)])
def test_the_ladder_is_that_of_loops_over_answers(seed, vocab, horizon, eos):
    fast, slow = variance_ladder(seed, vocab, horizon, eos), slow_ladder(seed, vocab, horizon, eos)
    assert list(fast) == ["none", "mean", "mean_t", "sequence", "token", "cumulative", "token_true", "cumulative_true", "exact"]
    for name, value in fast.items():
        assert np.isclose(value, slow[name], rtol=1e-9, atol=1e-12), name


def test_the_ladder_of_thirty_policies_is_the_known_one():
    ratios = {k: np.mean([x[k] / x["mean"] for x in map(variance_ladder, range(30))]) for k in variance_ladder()}
    known = {"none": 2.881, "mean": 1, "mean_t": 0.938, "sequence": 0.817, "cumulative": 0.739, "cumulative_true": 0.700,
             "token": 0.651, "token_true": 0.640, "exact": 0.620}
    assert {k: round(v, 3) for k, v in ratios.items()} == pytest.approx(known, abs=6e-4)


@QUICK
@given(**POLICIES)
def test_answers_are_complete_and_in_order(seed, vocab, horizon, eos):
    policy = enumerate_policy(seed, vocab, horizon, eos)
    assert [tuple(t[m].tolist()) for t, m in zip(policy.tokens, policy.mask, strict=True)] == answers(vocab, horizon, eos)
    assert np.isclose(policy.probs.sum(), 1, atol=1e-12) and (policy.energy[~policy.mask] == 0).all()
    assert np.abs(policy.probs @ policy.scores.reshape(len(policy.probs), -1)).max() < 1e-12      # E s_t = 0


@QUICK
@given(shift=st.floats(-5, 5), **POLICIES)
def test_no_position_baseline_beats_the_exact_one(shift, seed, vocab, horizon, eos):
    policy = enumerate_policy(seed, vocab, horizon, eos)
    baselines = position_baselines(policy)
    best = gradient_variance(policy, baselines["exact"])
    noise = np.random.default_rng(seed).normal(size=horizon)
    size = policy.probs @ (policy.scores**2).sum(axis=2)
    moved = gradient_variance(policy, baselines["exact"] + shift * noise)
    assert np.isclose(moved, best + size @ (shift * noise) ** 2, rtol=1e-9, atol=1e-9)            # (otb.0.5)
    assert all(best <= gradient_variance(policy, b) + 1e-9 for b in baselines.values())


@pytest.mark.parametrize(("call", "text"), [
    (lambda: variance_ladder(vocab=1), "vocab must be an integer >= 2, got 1"),
    (lambda: variance_ladder(horizon=0), "horizon must be an integer >= 1, got 0"),
    (lambda: variance_ladder(seed=-1), "seed must be an integer >= 0, got -1"),
    (lambda: variance_ladder(horizon=2.5), r"horizon must be an integer >= 1, got 2\.5"),
    (lambda: variance_ladder(vocab=8, horizon=8), "vocab=8, horizon=8 means 4294967296 scores"),
    (lambda: gradient_variance(enumerate_policy(), np.zeros(3)), r"baseline must be \(5,\) and finite"),
    (lambda: gradient_variance(enumerate_policy(), np.full(5, np.nan)), "baseline must be"),
])
def test_bad_sizes_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# --- groups --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "options"), [
    ("rloo", {}), ("otb", {"leave_one_out": True}), ("otb", {"leave_one_out": True, "finished": "keep"}),
    ("otb", {"leave_one_out": True, "weighting": "token"}), ("otb", {"leave_one_out": True, "weighting": "sequence"})])
@pytest.mark.parametrize("n", [2, 3])
def test_leave_one_out_estimators_are_unbiased(name, options, n):
    law = group_law(enumerate_policy(3, 3, 3), name, n, **options)
    assert abs(law.scale - 1) < 1e-6 and law.bias < 1e-6


def test_self_inclusion_bends_the_gradient_and_the_mean_only_shrinks_it():
    biases = [group_law(enumerate_policy(seed), "otb", zero_tail=False).bias for seed in range(3)]
    assert np.allclose(biases, [0.416, 0.174, 0.055], atol=5e-4)
    law = group_law(enumerate_policy(0, 3, 3), "grpo", 3, scale="none")
    assert abs(law.scale - 2 / 3) < 1e-6 and law.bias < 1e-6


@pytest.mark.parametrize("n", [2, 3])
def test_the_variance_of_the_leave_one_out_mean_obeys_its_formula(n):
    policy = enumerate_policy(5, 3, 3)
    p, r, whole = policy.probs, policy.rewards, policy.scores.sum(axis=1)
    mu, true = p @ r, p @ (whole * r[:, None])
    rule = gradient_variance(policy, np.full(3, mu)) + (p @ (r - mu) ** 2 * (p @ (whole**2).sum(axis=1)) + true @ true) / (n - 1)
    assert np.isclose(n * group_law(policy, "rloo", n).variance, rule, rtol=1e-6)


def test_one_rollout_alone_keeps_its_return():
    policy = enumerate_policy(4, 3, 3)
    assert np.isclose(group_law(policy, "otb", 1).variance, gradient_variance(policy, np.zeros(3)), rtol=1e-9)


@pytest.mark.parametrize(("n", "text"), [(0, "n must be an integer >= 1, got 0"), (4, "63 answers in groups of 4 are 63011844 rollouts")])
def test_bad_groups_are_refused(n, text):
    with pytest.raises(ValueError, match=text):
        group_law(enumerate_policy(), "rloo", n)


@pytest.mark.parametrize(("estimator", "options", "text"), [
    ("otb", {"foo": 1}, "unknown otb option 'foo', use one of 'is_weights', 'weighting', 'align'"),
    ("otb", {"energy": torch.ones(2, 2)}, "unknown otb option 'energy'"), ("rloo", {"foo": 1}, "unknown rloo option 'foo'"),
    (lambda rewards, mask, uid, weight=1: rewards, {"foo": 1}, "unknown <lambda> option 'foo', use one of 'weight'"),
    ("best", {}, "unknown advantage 'best'")])
def test_options_that_an_estimator_does_not_know_are_refused_by_name(estimator, options, text):
    with pytest.raises(ValueError, match=text):
        estimate_advantages(estimator, options, torch.ones(2, 2), torch.ones(2, 2), [0, 0], torch.ones(2, 2))
    if isinstance(estimator, str) and "energy" not in options:
        with pytest.raises(ValueError, match=text):
            group_law(enumerate_policy(0, 2, 2), estimator, 2, **options)


def test_advantages_are_those_of_the_estimator_and_of_functions():
    rewards, mask, energy = torch.tensor([[0.0, 1], [0, 0]]), torch.ones(2, 2), torch.rand(2, 2) + 0.1
    mine = otb_advantage(rewards, mask, [0, 0], energy, weighting="token", is_weights=2 * mask).advantages
    options = {"weighting": "token", "is_weights": 2 * mask}
    assert torch.equal(estimate_advantages("otb", options, rewards, mask, [0, 0], energy), mine) and len(options) == 2
    assert torch.equal(estimate_advantages(lambda rewards, mask, uid, energy: energy * rewards, {}, rewards, mask, [0, 0], energy),
                       energy * rewards)
    with pytest.raises(ValueError, match="estimator 'otb' takes energies, and the rollouts hold none"):
        estimate_advantages("otb", {}, rewards, mask, [0, 0])


# --- sampled groups ------------------------------------------------------------------------------

def test_the_value_of_the_bigram_policy_is_that_of_its_listed_answers():
    logits = torch.tensor(np.random.default_rng(1).normal(size=(3, 3)))
    p, total = torch.softmax(logits, 1).numpy(), 0.0
    for answer in answers(3, 4, True):
        prob = np.prod([p[a, b] for a, b in itertools.pairwise((0, *answer))])
        total += prob * (sum(1 if t % 2 else -1 for t in answer) > 0)
    assert np.isclose(theory._value(logits, 4).item(), total, atol=1e-12)


def test_samples_end_at_the_first_zero_and_are_distributed_as_the_policy():
    p = torch.softmax(torch.tensor(np.random.default_rng(2).normal(size=(4, 4))), 1).numpy()
    s = theory._rollouts(np.random.default_rng(0), p, 20_000, 6)
    length = s.mask.sum(axis=1)
    assert all((row[:n - 1] != 0).all() and (n == 6 or row[n - 1] == 0) for row, n in zip(s.tokens, length, strict=True))
    first = np.bincount(s.tokens[:, 0], minlength=4) / 20_000
    assert np.abs(first - p[0]).max() < 5 * 0.5 / np.sqrt(20_000)
    row, t = np.argwhere(s.mask & (s.tokens == 2))[0]
    assert np.isclose(s.energy[row, t], np.sum((np.eye(4)[2] - p[s.context[row, t]]) ** 2))


def test_the_study_agrees_with_what_is_proved():
    by = {r["name"]: r for r in finite_group_study(0, 600, n=4, vocab=4, horizon=8)}
    assert by["rloo"]["ratio"] == by["rloo"]["lo"] == by["rloo"]["hi"] == 1
    assert abs(by["mean"]["ratio"] - 1) < 1e-5 and abs(by["mean"]["scale"] / by["rloo"]["scale"] - 0.75) < 1e-5
    assert by["known_mean"]["ratio"] < 1 and all(r["lo"] <= r["ratio"] <= r["hi"] for r in by.values())
    assert finite_group_study(0, 600, n=4, vocab=4, horizon=8)[5] == by["token"]


@pytest.mark.parametrize(("sizes", "text"), [({"groups": 199}, "groups must be an integer >= 200, got 199"),
                                             ({"n": 1}, "n must be an integer >= 2, got 1"),
                                             ({"horizon": 0}, "horizon must be an integer >= 1, got 0")])
def test_bad_studies_are_refused(sizes, text):
    with pytest.raises(ValueError, match=text):
        finite_group_study(**sizes)


def test_rows_of_the_measurement_can_be_stored(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        measure("cuda")
    ladders, small = theory._ladder_rows, theory._group_rows
    monkeypatch.setattr(theory, "_ladder_rows", lambda policies, horizons: ladders(3, (3, 4)))
    monkeypatch.setattr(theory, "_group_rows", lambda policies, groups: small(2, 200))
    save_results(tmp_path / "x.json", measure("cpu"))
    rows = load_results(tmp_path / "x.json")["rows"]
    assert {"ladder_exact_4", "ladder_cumulative_3", "groups_otb_loo"} <= rows.keys()
    assert all(r["ci"][0] <= r["measured"] <= r["ci"][1] for r in rows.values())
