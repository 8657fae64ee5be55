"""Properties of `collai.gamma.metric`: a ratio with honest intervals, a fair baseline, equal spending, enough tasks."""

import math

import matplotlib
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.parallel import item_seed
from collai.eval.stats import bonett_price, mcnemar_exact, sign_flip_test
from collai.gamma import metric
from collai.gamma.ledger import Budget, Usage
from collai.gamma.metric import (
    METHODS,
    RESOURCES,
    collaboration_gain,
    confidence_sequence,
    gamma_at_spend,
    measure,
    parity_report,
    plot_gamma_forest,
    plot_power,
    power,
    required_tasks,
    saturated_baseline,
)

matplotlib.use("Agg")
NAN, INF = float("nan"), float("inf")
quickly = settings(deadline=None, derandomize=True, max_examples=25)


@st.composite
def soft_scores(draw, least=3):
    n = draw(st.sampled_from([least, 3, 5, 11, 25, 60]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return rng.uniform(0.05, 1, n), rng.uniform(0.05, 1, n)


@st.composite
def hard_scores(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    table = rng.multinomial(draw(st.integers(5, 80)), rng.dirichlet(np.ones(4))) + np.array([1, 0, 0, 0])
    return np.repeat([1.0, 1.0, 0.0, 0.0], table), np.repeat([1.0, 0.0, 1.0, 0.0], table), table.tolist()


def gain(*arguments, **keywords):
    """`collaboration_gain` without its slowest part, the sign flips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric, "sign_flip_test", lambda *_, **__: 1.0)
        return collaboration_gain(*arguments, **keywords)


# --- the estimate -----------------------------------------------------------------------------------------------------


@given(soft_scores())
@quickly
def test_the_gain_is_a_ratio_of_means_with_the_delta_error(scores):
    m, s = scores
    result, n = gain(m, s, "delta"), len(m)
    assert result.gamma == pytest.approx(m.mean() / s.mean(), rel=1e-12)
    assert result.log_gamma == pytest.approx(math.log(m.mean() / s.mean()), abs=1e-12)
    cov = np.cov(m, s)
    variance = cov[0, 0] / m.mean() ** 2 + cov[1, 1] / s.mean() ** 2 - 2 * cov[0, 1] / (m.mean() * s.mean())
    assert result.se_log == pytest.approx(math.sqrt(variance / n), rel=1e-9)
    half = scipy.stats.t.isf(0.025, n - 1) * result.se_log
    assert np.allclose(np.log(result.ci), [result.log_gamma - half, result.log_gamma + half], atol=1e-9)
    assert (result.method, result.n_tasks, result.flags, result.cap_matched) == ("delta", n, (), None)


@given(soft_scores())
@quickly
def test_difference_and_normalised_gain_stand_beside_the_ratio(scores):
    m, s = scores
    result = gain(m, s)
    lo, hi = scipy.stats.ttest_rel(m, s).confidence_interval(0.95)
    assert result.delta == pytest.approx(m.mean() - s.mean(), abs=1e-12)
    assert np.allclose(result.delta_ci, (max(lo, -1), min(hi, 1)), atol=1e-9)
    assert result.normalized_gain == pytest.approx((m.mean() - s.mean()) / (1 - s.mean()), rel=1e-9)
    assert (result.phi_mas, result.phi_sas) == (pytest.approx(m.mean()), pytest.approx(s.mean()))


@given(soft_scores())
@quickly
def test_log_intervals_turn_over_when_the_systems_are_exchanged(scores):
    m, s = scores
    for method in ("delta", "gee"):
        lo, hi = gain(m, s, method).ci
        assert np.allclose(gain(s, m, method).ci, (1 / hi, 1 / lo), rtol=1e-9)
        wide = gain(m, s, method, level=0.99).ci
        assert wide[0] < lo < m.mean() / s.mean() < hi < wide[1]


@pytest.mark.parametrize(("seeds_m", "seeds_s"), [(1, 1), (3, 3), (2, 5)])
def test_gee_is_the_poisson_regression_of_statsmodels(seeds_m, seeds_s):
    rng = np.random.default_rng(seeds_m)
    ability = rng.random((30, 1))
    m, s = rng.random((30, seeds_m)) < ability, rng.random((30, seeds_s)) < 0.8 * ability
    y = np.r_[m.ravel(), s.ravel()].astype(float)
    X = np.stack([np.ones(len(y)), np.r_[np.ones(m.size), np.zeros(s.size)]], axis=1)
    groups = np.r_[np.repeat(np.arange(30), seeds_m), np.repeat(np.arange(30), seeds_s)]
    fit = sm.GEE(y, X, groups=groups, family=sm.families.Poisson()).fit()
    result = gain(m, s, "gee", level=0.9)
    assert result.log_gamma == pytest.approx(fit.params[1], abs=1e-9)
    assert result.se_log == pytest.approx(fit.bse[1], rel=1e-8)
    assert np.allclose(result.ci, np.exp(fit.conf_int(0.1)[1]), rtol=1e-8)
    assert gain(m, s, "delta").se_log * math.sqrt(29 / 30) == pytest.approx(result.se_log, rel=1e-12)


@given(soft_scores(), st.floats(0.5, 0.99))
@quickly
def test_the_ends_of_fieller_solve_its_t_test(scores, level):
    m, s = scores
    lo, hi = gain(m, s, "fieller", level).ci
    assert 0 <= lo <= m.mean() / s.mean() <= hi
    t = scipy.stats.t.isf((1 - level) / 2, len(m) - 1)
    for theta in (lo, hi):
        if 0 < theta < INF:
            d = m - theta * s
            assert abs(d.mean()) == pytest.approx(t * d.std(ddof=1) / math.sqrt(len(d)), rel=1e-6)


@given(st.integers(0, 10_000), st.floats(0, 0.7))
@quickly
def test_fieller_is_the_hull_of_the_values_that_the_test_keeps(seed, weak):
    rng = np.random.default_rng(seed)
    m, s = rng.random(4), np.maximum(rng.random(4) - weak, 0) + 1e-3
    lo, hi = gain(m, s, "fieller").ci
    grid = np.concatenate([np.linspace(0, 20, 4001), np.geomspace(20, 1e7, 800)])
    d = m[:, None] - s[:, None] * grid
    kept = grid[d.mean(axis=0) ** 2 <= scipy.stats.t.isf(0.025, 3) ** 2 * d.var(axis=0, ddof=1) / 4]
    assert lo <= kept.min() + 1e-9 and hi >= kept.max() * (1 - 1e-9)
    inside = grid[(grid >= lo) & (grid <= hi)]
    assert inside[0] == kept[0] and inside[-1] == kept[-1]


def test_fieller_is_open_when_the_single_agent_may_be_zero():
    lo, hi = gain([0.9, 0.8, 0.95], [0.3, 0.0, 0.0], "fieller").ci
    assert hi == INF and 0 <= lo < 9


def test_fieller_is_cut_at_zero():
    lo, hi = gain([0.0, 0.0, 0.9], [0.5, 0.6, 0.55], "fieller").ci
    assert lo == 0.0 and 0.9 / 1.65 < hi < INF


# --- bootstraps -------------------------------------------------------------------------------------------------------


def ratios(m, s, n_boot, seed):
    rows = np.random.default_rng(item_seed(seed, 0)).integers(0, len(m), (n_boot, len(m)))
    return sorted(m[row].mean() / s[row].mean() for row in rows)


@pytest.mark.parametrize(("n_boot", "level"), [(99, 0.9), (199, 0.95), (250, 0.8)])
def test_percentile_limits_are_order_statistics_of_resampled_ratios(n_boot, level):
    rng = np.random.default_rng(1)
    m, s = rng.random(20), rng.random(20)
    found = gain(m, s, "bootstrap", level, n_boot, seed=7).ci
    every = ratios(m, s, n_boot, 7)
    k = math.floor((n_boot + 1) * (1 - level) / 2 + 1e-9)
    assert np.allclose(found, (every[k - 1], every[n_boot - k]), rtol=1e-12)
    assert found != gain(m, s, "bootstrap", level, n_boot, seed=8).ci


def test_bca_is_the_textbook_formula_and_close_to_scipy():
    rng = np.random.default_rng(2)
    m, s = rng.beta(5, 1, 60), rng.beta(2, 2, 60)
    gamma, every, u = m.mean() / s.mean(), ratios(m, s, 999, 3), m / m.mean() - s / s.mean()
    z0 = scipy.stats.norm.ppf(np.mean([r < gamma for r in every]))
    a = sum(u**3) / 6 / sum(u**2) ** 1.5
    ends = []
    for z, rounded in ((-1.959963984540054, math.floor), (1.959963984540054, math.ceil)):
        beta = scipy.stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
        ends.append(every[rounded(1000 * beta) - 1])
    found = gain(m, s, "bca", n_boot=999, seed=3).ci
    assert np.allclose(found, ends, rtol=1e-12)
    peer = scipy.stats.bootstrap((m, s), lambda x, y: np.mean(x) / np.mean(y), paired=True, vectorized=False,
                                 n_resamples=1999, rng=np.random.default_rng(0)).confidence_interval
    assert np.allclose(np.log(gain(m, s, "bca", seed=3).ci), np.log(peer), atol=0.02)


def test_ties_count_one_half_in_the_bias_correction():
    m = np.repeat([1.0, 1.0, 0.0, 0.0], [6, 3, 3, 4])
    s = np.repeat([1.0, 0.0, 1.0, 0.0], [6, 3, 3, 4])
    turned = gain(s, m, "bca", n_boot=9_999).ci
    lo, hi = gain(m, s, "bca", n_boot=9_999).ci
    assert np.allclose(np.log((1 / hi, 1 / lo)), np.log(turned), atol=0.12)


def test_resampling_in_blocks_gives_the_same_law(monkeypatch):
    rng = np.random.default_rng(4)
    m, s = rng.random(50), rng.random(50)
    whole = np.array(gain(m, s, "bootstrap", seed=1).ci)
    monkeypatch.setattr(metric, "_BLOCK_ENTRIES", 50 * 1000)
    blocks = np.array(gain(m, s, "bootstrap", seed=1).ci)
    assert (blocks != whole).all() and np.allclose(blocks, whole, rtol=0.03)
    assert len(np.unique(metric._resampled(m, s, 9_999, 1))) > 9_990


def test_resamples_without_a_single_agent_success_push_the_upper_limit_to_infinity():
    m, s = np.r_[np.ones(8), np.zeros(2)], np.r_[np.ones(1), np.zeros(9)]
    assert gain(m, s, "bootstrap", n_boot=999).ci[1] == INF
    assert gain(m, s, "bca", n_boot=999).ci[1] == INF


# --- choice of method, tests, regimes ---------------------------------------------------------------------------------


@given(hard_scores())
@quickly
def test_single_binary_scores_get_bonett_price_and_mcnemar(scores):
    m, s, (n11, n10, n01, _) = scores
    for mas, sas in ((m, s), (m[:, None], s.astype(int)), (m.astype(bool), s.tolist())):
        result = collaboration_gain(mas, sas)
        assert result.method == "bonett_price" and result.ci == bonett_price(n11, n10, n01)
        assert result.p_value == mcnemar_exact(n10, n01)


def test_several_seeds_or_fractions_get_delta_and_sign_flips():
    rng = np.random.default_rng(0)
    m, s = (rng.random((25, 3)) < 0.7).astype(float), (rng.random(25) < 0.5).astype(float)
    result = collaboration_gain(m, s, seed=5)
    assert result.method == "delta" and result.ci == collaboration_gain(m.mean(axis=1), s, "delta").ci
    assert result.p_value == sign_flip_test(m.mean(axis=1) - s, 10_000, seed=5)


@pytest.mark.parametrize(("ci", "equivalence_first", "regime", "factor_class"), [
    ((1.0001, 1.3), False, "gain", "I"), ((1.0, 1.3), False, "undetermined", "undetermined"),
    ((0.5, 0.999), False, "loss", "II"), ((0.5, 1.0), False, "undetermined", "undetermined"),
    ((0.981, 1.019), False, "parity", "II"), ((0.9802, 1.019), False, "undetermined", "undetermined"),
    ((0.981, 1.02), False, "undetermined", "undetermined"), ((1.001, 1.01), False, "gain", "I"),
    ((1.001, 1.01), True, "parity", "II"), ((0.985, 0.99), False, "loss", "II"), ((0.985, 0.99), True, "parity", "II"),
    ((1.001, 1.05), True, "gain", "I"), ((0.0, INF), True, "undetermined", "undetermined"),
])
def test_regimes_follow_from_the_interval(monkeypatch, ci, equivalence_first, regime, factor_class):
    monkeypatch.setattr(metric, "_interval", lambda *_: ci)
    result = collaboration_gain([0.5, 0.7], [0.6, 0.4], equivalence_first=equivalence_first)
    assert (result.regime, result.factor_class) == (regime, factor_class)


def test_the_margin_widens_parity():
    m, s = np.tile([1.0, 0.9], 200), np.tile([0.9, 1.0], 200)
    assert gain(m, s, margin=0.02).regime == "parity"
    assert gain(m, s, margin=0.005).regime == "undetermined"


def test_a_team_that_solves_nothing_is_flagged_and_gets_an_honest_limit():
    s = np.linspace(0.3, 0.9, 30)
    for method in set(METHODS) - {"bonett_price"}:
        result = gain(np.zeros(30), s, method)
        assert result.log_gamma == -INF and math.isnan(result.se_log) and result.gamma == 0.0
        assert result.method == "fieller" and "phi_mas is zero" in result.flags[0]
        most = 1 - 0.025 ** (1 / 30)
        least = s.mean() - scipy.stats.t.isf(0.025, 29) * s.std(ddof=1) / math.sqrt(30)
        assert result.ci == (0.0, pytest.approx(most / least, rel=1e-12)) and result.regime == "loss"
        assert "Lemma 4" in result.flags[0] and "fieller" not in result.flags[0]
    binary = collaboration_gain(np.zeros(30), s > 0.5, "delta")
    assert binary.method == "bonett_price" and binary.ci[0] == 0.0 < binary.ci[1] and binary.flags
    assert collaboration_gain([0.0, 0.0], [0.5, 0.51]).regime == "undetermined"


def test_intervals_without_width_and_full_scores_are_flagged():
    s = np.array([0.2, 0.4, 0.9])
    assert any("no width" in flag for flag in collaboration_gain(s / 2, s).flags)
    full = collaboration_gain([1, 0, 1, 1], [1, 1, 1, 1])
    assert math.isnan(full.normalized_gain) and any("phi_sas is 1" in flag for flag in full.flags)


@pytest.mark.parametrize("method", ["delta", "fieller", "gee", "bootstrap", "bca"])
@pytest.mark.parametrize(("mas", "sas"), [([0.5, 1.0], [0.5, 1.0]), ([1, 1], [0.5, 0.5]), ([0.25, 0.5], [0.5, 1])])
def test_an_interval_without_width_gives_no_verdict(method, mas, sas):
    result = collaboration_gain([mas] * 2, [sas] * 2, method, n_boot=99)
    assert result.regime == result.factor_class == "undetermined" and "no width" in result.flags[0]


def test_equal_systems_have_gain_one_and_no_evidence():
    s = np.random.default_rng(0).random(40) < 0.6
    result = collaboration_gain(s, s)
    assert result.gamma == 1.0 and result.p_value == 1.0 and result.ci[0] < 1 < result.ci[1]


def test_inputs_are_left_as_they_were():
    rng = np.random.default_rng(0)
    m, s = rng.random((20, 2)), rng.random((20, 2))
    spend, levels = rng.uniform(10, 20, 20), np.array([[5.0], [50.0]]) * rng.uniform(0.9, 1.1, (2, 20))
    kept = [x.copy() for x in (m, s, spend, levels)]
    for method in ("delta", "fieller", "bca"):
        collaboration_gain(m, s, method, n_boot=99)
    confidence_sequence(m, s)
    saturated_baseline({"a": m, "b": s})
    gamma_at_spend(m[:, 0], spend, s.T, levels)
    assert all((x == y).all() for x, y in zip((m, s, spend, levels), kept, strict=True))


@pytest.mark.parametrize(("mas", "sas", "keywords", "message"), [
    ([0.5] * 50, [0.5] * 48, {}, "mas has 50 tasks, sas has 48: scores must be paired by task"),
    ([0.5, NAN], [0.5, 0.5], {}, r"scores must be finite and in \[0, 1\], mas has nan"),
    ([0.5, 0.5], [INF, 0.5], {}, r"scores must be finite and in \[0, 1\], sas has inf"),
    ([0.5, -0.1], [0.5, 0.5], {}, r"scores must be finite and in \[0, 1\], mas has -0\.1"),
    ([0.5, 0.5], [0.5, 1.01], {}, r"scores must be finite and in \[0, 1\], sas has 1\.01"),
    ([0.5, 0.5], [0.0, 0.0], {}, "single-agent score is zero: Γ is undefined; use delta"),
    ([0.5], [0.5], {}, "at least 2 tasks are needed, got 1"),
    ([[[0.5]]], [0.5], {}, r"mas must have shape \(n_tasks,\) or \(n_tasks, n_seeds\), got \(1, 1, 1\)"),
    ([0.5, 0.5], np.ones((2, 0)), {}, r"sas must have shape .*, got \(2, 0\)"),
    ([0.5, 0.6], [0.5, 0.5], {"level": 0.0}, r"level must be in \(0, 1\), got 0\.0"),
    ([0.5, 0.6], [0.5, 0.5], {"level": 1.0}, r"level must be in \(0, 1\), got 1\.0"),
    ([0.5, 0.6], [0.5, 0.5], {"method": "wald"}, "method must be one of auto, delta, fieller, bonett_price, .*, got 'wald'"),
    ([0.5, 0.6], [0.5, 0.5], {"method": "bonett_price"}, "bonett_price needs one score a task, each 0 or 1"),
    ([[1, 0], [1, 1]], [1, 0], {"method": "bonett_price"}, "bonett_price needs one score a task, each 0 or 1"),
    ([0.5, 0.6], [0.5, 0.5], {"margin": 0}, "margin must be positive and finite, got 0"),
    ([0.5, 0.6], [0.5, 0.5], {"method": "bootstrap", "n_boot": 38}, "n_boot must be at least 39 for level 0.95, got 38"),
    ([0.5, 0.6], [0.5, 0.5], {"method": "bca", "n_boot": 0}, "n_boot must be at least 39 for level 0.95, got 0"),
])
def test_bad_scores_and_arguments_are_refused(mas, sas, keywords, message):
    with pytest.raises(ValueError, match=message):
        collaboration_gain(mas, sas, **keywords)


def test_coverage_near_the_ceiling_is_the_exact_sum_of_the_notebook():
    expected = {"bonett_price": 0.963, "delta": 0.950, "gee": 0.937}
    hits, asked = metric._coverage((0.95, 0.90, 0.3, 50), list(expected), 1_500, 0, np.random.default_rng(1))
    for method, share in expected.items():
        assert asked == 1_500 and abs(hits[method] / asked - share) < 4 * 0.0057


# --- baseline ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 7))
@quickly
def test_every_fold_is_scored_by_the_strategy_that_won_elsewhere(seed, k, folds):
    rng = np.random.default_rng(seed)
    table = rng.random((k, int(rng.integers(folds, 30))))
    result = saturated_baseline({f"s{j}": row for j, row in enumerate(table)}, folds, seed)
    order, total = np.random.default_rng(seed).permutation(table.shape[1]), []
    for fold, chosen in zip(np.array_split(order, folds), result.chosen, strict=True):
        outside = [np.mean([x for i, x in enumerate(row) if i not in fold]) for row in table]
        assert chosen == f"s{int(np.argmax(outside))}"
        total += [(i, table[int(chosen[1:]), i]) for i in fold]
    assert result.scores.tolist() == [x for _, x in sorted(total)]
    assert result.naive_max == pytest.approx(table.mean(axis=1).max(), rel=1e-12)


def test_choosing_does_not_look_at_the_tasks_that_are_scored():
    rng = np.random.default_rng(0)
    a, b = rng.random(20), rng.random(20)
    first = saturated_baseline({"a": a, "b": b}, 4, 1)
    fold = np.array_split(np.random.default_rng(1).permutation(20), 4)[2]
    b[fold], chosen = 1.0, first.chosen[2]
    assert saturated_baseline({"a": a, "b": b}, 4, 1).chosen[2] == chosen


def test_the_naive_maximum_is_biased_and_the_cross_fit_is_not():
    rng, naive, fitted = np.random.default_rng(0), [], []
    for i in range(800):
        result = saturated_baseline({f"s{j}": row for j, row in enumerate(rng.random((6, 100)) < 0.6)}, seed=i)
        naive.append(result.naive_max)
        fitted.append(result.scores.mean())
    assert abs(np.mean(naive) - 0.6 - 1.267 * math.sqrt(0.0024)) < 0.005
    assert abs(np.mean(fitted) - 0.6) < 4 * np.std(fitted) / math.sqrt(800)


@pytest.mark.parametrize(("strategies", "folds", "message"), [
    ({}, 5, r"every strategy needs a score for the same tasks, got \[\]"),
    ({"a": [1, 0, 1], "b": [1, 0]}, 2, r"every strategy needs a score for the same tasks, got \[3, 2\]"),
    ({"a": [1, 0, 1]}, 1, "folds must be between 2 and the 3 tasks, got 1"),
    ({"a": [1, 0, 1]}, 4, "folds must be between 2 and the 3 tasks, got 4"),
    ({"a": [1, 0, 2]}, 2, r"scores must be finite and in \[0, 1\], a has 2\.0"),
])
def test_a_baseline_without_paired_scores_or_folds_is_refused(strategies, folds, message):
    with pytest.raises(ValueError, match=message):
        saturated_baseline(strategies, folds)


# --- spending ---------------------------------------------------------------------------------------------------------

ALONE = [Usage(100, 50, 1, 0.01, 2.0, 1e9), Usage(300, 150, 3, 0.05, 4.0, 3e9)]


def test_the_report_has_means_maxima_use_and_ratio_of_every_resource():
    team = [Usage(400, 200, 9, 0.03, 3.0, 2e9)]
    report = parity_report(team, ALONE, Budget(tokens=600, calls=8))
    assert tuple(row.resource for row in report.rows) == RESOURCES == ("tokens", "prompt_tokens", "completion_tokens", "calls",
                                                                      "usd", "seconds", "flops")
    tokens = report["tokens"]
    assert (tokens.cap, tokens.mean_mas, tokens.max_mas, tokens.mean_sas, tokens.max_sas) == (600, 600, 600, 300, 450)
    assert (tokens.utilisation_mas, tokens.utilisation_sas) == (1.0, 0.5)
    assert tokens.log_ratio == pytest.approx(math.log(2)) and not tokens.matched
    assert report["usd"].cap is None and report["usd"].utilisation_mas is None
    assert report["usd"].matched and report["seconds"].matched and report["flops"].matched
    assert report.unmatched == ("tokens", "prompt_tokens", "completion_tokens", "calls")
    assert report.over_cap == ("calls",)
    frame = report.to_frame()
    assert list(frame.index) == list(RESOURCES) and frame.loc["tokens", "mean_sas"] == 300
    with pytest.raises(KeyError, match="no resource 'money'; the resources are tokens, prompt_tokens"):
        report["money"]


def test_a_resource_that_only_one_side_uses_is_not_matched():
    report = parity_report([Usage(calls=1)], [Usage(calls=1, usd=0.5)], Budget(calls=0))
    assert report["usd"].log_ratio == -INF and not report["usd"].matched
    assert parity_report([Usage(usd=0.5)], [Usage()], Budget())["usd"].log_ratio == INF
    assert report["tokens"].log_ratio == 0.0 and report["tokens"].matched
    assert report["calls"].utilisation_mas is None and report.over_cap == ("calls",)


def test_the_tolerance_is_on_the_log_ratio():
    team, alone = [Usage(completion_tokens=105)], [Usage(completion_tokens=100)]
    assert parity_report(team, alone, Budget())["tokens"].matched
    assert parity_report(alone, team, Budget())["tokens"].matched
    assert not parity_report(team, alone, Budget(), tol=0.048)["tokens"].matched


@pytest.mark.parametrize(("team", "alone", "tol", "message"), [
    ([], ALONE, 0.05, "mas_usage is empty"), (ALONE, [], 0.05, "sas_usage is empty"),
    (ALONE, ALONE, -0.1, "tol must be at least 0 and finite, got -0.1"), (ALONE, ALONE, NAN, "tol must be at least 0 .*, got nan"),
])
def test_a_report_on_nothing_is_refused(team, alone, tol, message):
    with pytest.raises(ValueError, match=message):
        parity_report(team, alone, Budget(), tol)


def curve(seed, levels=5, tasks=25):
    rng = np.random.default_rng(seed)
    spend = np.geomspace(50, 2_000, levels)[:, None] * rng.uniform(0.8, 1.2, (levels, tasks))
    rise = np.linspace(0.2, 0.8, levels)[:, None]
    return rng, np.clip(rise + rng.normal(0, 0.3, (levels, tasks)), 0, 1), spend


def matched_score(c, scores, spend, weight):
    """Isotonic curve over log mean spend, read at the team's mean spend, all means weighted."""
    fit = scipy.optimize.isotonic_regression(scores @ weight).x
    return np.interp(np.log(c @ weight), np.log(spend @ weight), fit)


@pytest.mark.parametrize("seed", range(6))
def test_the_spend_matched_gain_reads_the_isotonic_curve_and_carries_its_noise(seed):
    rng, scores, spend = curve(seed)
    m, c, n = rng.random(25), rng.uniform(200, 400, 25), 25
    result, equal, step = gamma_at_spend(m, c, scores[::-1], spend[::-1]), np.full(n, 1 / n), 1e-6
    phi = matched_score(c, scores, spend, equal)
    assert result.phi_sas == pytest.approx(phi, rel=1e-10) and result.gamma == pytest.approx(m.mean() / phi, rel=1e-10)
    slopes = []
    for one in np.eye(n):
        up, down = (np.log(m @ w) - np.log(matched_score(c, scores, spend, w))
                    for w in (equal + step * (one - equal), equal - step * (one - equal)))
        slopes.append((up - down) / (2 * step))
    assert result.se_log == pytest.approx(math.sqrt(np.sum(np.square(slopes)) / (n * (n - 1))), rel=1e-5)
    half = scipy.stats.t.isf(0.025, n - 1) * result.se_log
    assert np.allclose(np.log(result.ci), (result.log_gamma - half, result.log_gamma + half), atol=1e-9)


def test_the_spend_matched_gain_has_flags_of_its_own():
    rng = np.random.default_rng(0)
    spend, sas = np.array([[100.0], [400.0]]) * np.ones(40), np.stack([(rng.random(40) < 0.5).astype(float), np.ones(40)])
    half = gamma_at_spend((rng.random(40) < 0.7).astype(float), np.full(40, 150.0), sas, spend)
    assert half.phi_sas < 1 and half.flags == () and any("phi_sas is 1" in flag for flag in half.cap_matched.flags)
    none = gamma_at_spend(np.zeros(40), np.full(40, 150.0), sas, spend)
    assert none.method == "fieller" and len(none.flags) == 1 and "Lemma 4" in none.flags[0]


def test_a_dip_in_the_curve_is_pooled():
    scores = np.stack([np.full(10, x) for x in (0.2, 0.6, 0.4, 0.8)])
    scores[:, ::2] += 0.1
    spend, m = np.array([[10.0], [100.0], [1_000.0], [10_000.0]]) * np.ones(10), np.linspace(0.3, 0.9, 10)
    for at in (100.0, 300.0, 1_000.0):
        assert gamma_at_spend(m, np.full(10, at), scores, spend).phi_sas == pytest.approx(0.55)


def test_the_cap_matched_gain_stands_beside_and_the_ends_of_the_curve_are_inside():
    rng, scores, spend = curve(0)
    m = rng.random(25)
    result = gamma_at_spend(m, spend[-1], scores, spend, level=0.9)
    assert result.cap_matched == collaboration_gain(m, scores[-1], "delta", 0.9)
    assert result.gamma == pytest.approx(m.mean() / scipy.optimize.isotonic_regression(scores.mean(axis=1)).x[-1])
    first = gamma_at_spend(m, spend[0], scores, spend)
    assert first.phi_sas == pytest.approx(scipy.optimize.isotonic_regression(scores.mean(axis=1)).x[0])


@pytest.mark.parametrize(("change", "message"), [
    ({"mas_spend": 5_000.0}, "mean spend of the multi-agent system, 5000, is outside the single-agent curve, 50.* to 2008"),
    ({"mas_spend": 10.0}, "mean spend of the multi-agent system, 10, is outside the single-agent curve"),
    ({"mas_spend": 0.0}, r"spends must be positive and finite, got 0\.0"),
    ({"mas_spend": NAN}, "spends must be positive and finite, got nan"),
    ({"sas_spend": -1.0}, r"spends must be positive and finite, got -1\.0"),
    ({"sas": 1.5}, r"scores must be finite and in \[0, 1\], sas has 1\.5"),
    ({"mas": NAN}, r"scores must be finite and in \[0, 1\], mas has nan"),
    ({"sas": 0.0}, "single-agent score is zero"),
])
def test_spends_and_scores_that_fit_no_curve_are_refused(change, message):
    rng, scores, spend = curve(1)
    given_values = {"mas": rng.random(25), "mas_spend": np.full(25, 300.0), "sas": scores, "sas_spend": spend}
    for name, value in change.items():
        given_values[name] = np.full_like(given_values[name], value)
    with pytest.raises(ValueError, match=message):
        gamma_at_spend(**given_values)


def test_a_wrong_score_below_the_highest_level_is_refused_too():
    rng, scores, spend = curve(1)
    scores[0, 3] = NAN
    with pytest.raises(ValueError, match=r"scores must be finite and in \[0, 1\], sas has nan"):
        gamma_at_spend(rng.random(25), np.full(25, 300.0), scores, spend)


def test_curves_of_the_wrong_shape_are_refused():
    rng, scores, spend = curve(2)
    m, c = rng.random(25), np.full(25, 300.0)
    for arguments in ((m, c, scores[:1], spend[:1]), (m, c[:5], scores, spend), (m, c, scores[:, :5], spend), (m[:5], c, scores, spend)):
        with pytest.raises(ValueError, match=r"shapes must be \(n_tasks,\), \(n_tasks,\), \(n_levels >= 2, n_tasks\) twice, got"):
            gamma_at_spend(*arguments)
    spend[1] = spend[0]
    with pytest.raises(ValueError, match="two levels of sas_spend have the same mean"):
        gamma_at_spend(m, c, scores, spend)


# --- power ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "expected"), [((0.60, 1.10, 0.3), 718), ((0.60, 1.05, 0.3), 2897),
                                                     ((0.30, 1.20, 0), 971), ((0.80, 1.05, 0.5), 733)])
def test_worked_sizes(arguments, expected):
    assert required_tasks(*arguments) == expected


@given(st.floats(0.1, 0.7), st.sampled_from([0.7, 0.9, 1.1, 1.3]), st.floats(0, 0.5), st.floats(0.5, 0.95), st.floats(0.001, 0.2))
@quickly
def test_the_required_size_is_the_smallest_with_the_power(phi, gamma, corr, wanted, alpha):
    n = required_tasks(phi, gamma, corr, wanted, alpha)
    assert power(phi, gamma, n, corr, alpha) >= wanted - 1e-12
    assert power(phi, gamma, 4 * n, corr, alpha) > power(phi, gamma, n, corr, alpha)
    if n > 20:
        assert power(phi, gamma, int(0.98 * n) - 1, corr, alpha) < wanted


@given(st.floats(0.2, 0.9), st.floats(0.5, 1.1), st.floats(0, 0.3))
@quickly
def test_the_variance_behind_the_power_is_that_of_four_cells(phi, gamma, corr):
    cells = np.array(metric._cells(phi * gamma, phi, corr))
    if cells.min() < 0:
        return
    values = np.array([1, 1, 0, 0]) / (phi * gamma) - np.array([1, 0, 1, 0]) / phi
    variance = cells @ values**2 - (cells @ values) ** 2
    shift = math.sqrt(200 / variance) * abs(math.log(gamma))
    expected = scipy.stats.norm.sf(1.959963984540054 - shift) + scipy.stats.norm.cdf(-1.959963984540054 - shift)
    assert power(phi, gamma, 200, corr) == pytest.approx(expected, abs=1e-9)


def test_the_power_at_no_gain_is_the_level_and_grows_with_correlation():
    assert power(0.6, 1, 50, 0.3, 0.01) == pytest.approx(0.01, abs=1e-12)
    assert power(0.6, 1.1, 300, 0.5) > power(0.6, 1.1, 300, 0.0) > power(0.6, 1.1, 300, -0.5)
    assert required_tasks(0.5, 2.0) == required_tasks(0.5, 1.9999999999999998) == 17
    assert required_tasks(0.8, 1.25) > 2


def test_the_formula_predicts_how_often_a_simulated_study_sees_the_gain():
    tables = np.random.default_rng(0).multinomial(718, metric._cells(0.66, 0.6, 0.3), 1_500)
    seen = [bonett_price(*row[:3])[0] > 1 for row in tables.tolist()]
    assert abs(np.mean(seen) - 0.80) < 0.045


@pytest.mark.parametrize(("function", "arguments", "message"), [
    (required_tasks, (0.9, 1.2), r"required MAS score above 1: 1\.2 \* 0\.9 = 1\.08"),
    (power, (0.9, 1.2, 100), r"required MAS score above 1: 1\.2 \* 0\.9 = 1\.08"),
    (required_tasks, (0.6, 1.0), "gamma must differ from 1"),
    (required_tasks, (0.0, 1.1), r"phi_sas must be in \(0, 1\], got 0\.0"),
    (required_tasks, (1.1, 0.5), r"phi_sas must be in \(0, 1\], got 1\.1"),
    (required_tasks, (0.6, 0.0), r"gamma must be positive and finite, got 0\.0"),
    (required_tasks, (0.6, NAN), "gamma must be positive and finite, got nan"),
    (required_tasks, (0.9, 1.05, -0.5), r"corr of 0/1 scores with means 0\.945 and 0\.9 must be in \[-0\.0804.*, 0\.7237.*\], got -0\.5"),
    (required_tasks, (0.9, 1.05, 0.9), r"corr of 0/1 scores .*, got 0\.9"),
    (required_tasks, (0.6, 1.1, NAN), r"corr of 0/1 scores .*, got nan"),
    (required_tasks, (0.6, 1.1, 0.0, 1.0), r"power must be in \(0, 1\), got 1\.0"),
    (required_tasks, (0.6, 1.1, 0.0, 0.8, 0.0), r"alpha must be in \(0, 1\), got 0\.0"),
    (power, (0.6, 1.1, 1), "n_tasks must be >= 2, got 1"),
])
def test_impossible_questions_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# --- stopping early ---------------------------------------------------------------------------------------------------


def plain_loop(x, alpha):
    mean, square, variance, bets, total, cost = 0.5, 0.25, 0.25, 0.0, 0.0, 0.0
    for t, value in enumerate(x, 1):
        bet = min(math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(1 + t))), 0.5)
        bets, total = bets + bet, total + bet * value
        cost += 4 * (value - mean) ** 2 * (-math.log(1 - bet) - bet) / 4
        mean = (0.5 + sum(x[:t])) / (t + 1)
        square += (value - mean) ** 2
        variance = square / (t + 1)
        half = (math.log(2 / alpha) + cost) / bets
        yield 2 * (total / bets - half) - 1, 2 * (total / bets + half) - 1


@given(soft_scores(least=1), st.floats(0.5, 0.99))
@quickly
def test_the_confidence_sequence_is_its_published_formula(scores, level):
    m, s = scores
    lo, hi = confidence_sequence(m, s, level)
    low, high = -1.0, 1.0
    for t, (a, b) in enumerate(plain_loop(((m - s + 1) / 2).tolist(), 1 - level)):
        low, high = max(low, a), min(high, b)
        assert lo[t] == pytest.approx(low, abs=1e-9) and hi[t] == pytest.approx(high, abs=1e-9)


def test_bets_that_are_no_longer_capped_follow_the_formula_too():
    rng = np.random.default_rng(0)
    m, s = (rng.random(500) < 0.9).astype(float), (rng.random(500) < 0.5).astype(float)
    pairs = np.array(list(plain_loop(((m - s + 1) / 2).tolist(), 0.05)))
    lo, hi = confidence_sequence(m, s)
    assert np.allclose(lo, np.maximum.accumulate(np.maximum(pairs[:, 0], -1)), atol=1e-9)
    assert np.allclose(hi, np.minimum.accumulate(np.minimum(pairs[:, 1], 1)), atol=1e-9)


def test_the_sequence_narrows_and_rarely_loses_the_truth_at_any_time():
    rng, lost = np.random.default_rng(0), 0
    for _ in range(200):
        m, s = rng.random((200, 2)) < 0.7, rng.random(200) < 0.6
        lo, hi = confidence_sequence(m, s)
        assert (np.diff(lo) >= 0).all() and (np.diff(hi) <= 0).all() and (lo <= hi).all()
        lost += bool((lo > 0.1).any() or (hi < 0.1).any())
    assert lost <= 10
    lo, hi = confidence_sequence(np.tile([1.0, 1.0, 0.0], 2_000), np.tile([0.0, 1.0, 0.0], 2_000))
    assert 0.25 < lo[-1] < 1 / 3 < hi[-1] < 0.42


def test_a_sequence_whose_truth_moves_keeps_its_last_interval():
    m = np.r_[np.ones(400), np.zeros(4_000)]
    lo, hi = confidence_sequence(m, 1 - m)
    assert (lo <= hi).all() and lo[-1] > 0.5


def test_one_task_is_enough_to_begin_and_bad_input_is_refused():
    assert np.allclose(confidence_sequence([1.0], [0.0]), [[-1.0], [1.0]])
    with pytest.raises(ValueError, match="mas has 2 tasks, sas has 3: scores must be paired by task"):
        confidence_sequence([1, 1], [1, 1, 1])
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1\.5"):
        confidence_sequence([1, 1], [1, 0], 1.5)
    with pytest.raises(ValueError, match=r"scores must be finite and in \[0, 1\], sas has nan"):
        confidence_sequence([1, 1], [1, NAN])


# --- figures and the measurement --------------------------------------------------------------------------------------


def test_the_forest_shows_every_row_with_its_interval_and_prediction():
    rng = np.random.default_rng(0)
    results = {name: collaboration_gain(rng.random(40), rng.random(40)) for name in ("a", "b")}
    results["open"] = collaboration_gain([0.9, 0.8, 0.95], [0.3, 0.0, 0.0], "fieller")
    results["nothing"] = collaboration_gain(np.zeros(20), np.ones(20))
    ax = plot_gamma_forest(results, {"b": 1.1})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "open", "nothing"] and ax.get_xscale() == "log"
    drawn = [line.get_xydata() for line in ax.lines]
    assert any(np.allclose(xy, [[results["a"].ci[0], 0], [results["a"].ci[1], 0]]) for xy in drawn)
    assert any(np.allclose(xy, [[1.1, 1]]) for xy in drawn)
    arrows = {line.get_marker(): line.get_ydata()[0] for line in ax.lines if line.get_marker() in "<>"}
    assert arrows == {">": 2, "<": 3}
    low, high = ax.get_xlim()
    assert all(low <= x <= high for xy in drawn for x, _ in xy)
    with pytest.raises(ValueError, match="predicted has 'c', results have a, b"):
        plot_gamma_forest(results, {"c": 1.0})
    matplotlib.pyplot.close("all")


def test_the_power_figure_draws_the_function():
    ax = plot_power(0.6, [1.1, 1.2], corr=0.3, n_tasks=(50, 500))
    for line, gamma in zip(ax.lines, (1.1, 1.2), strict=True):
        x, y = line.get_data()
        assert x[0] == 50 and abs(x[-1] - 500) <= 1
        assert np.allclose(y, [power(0.6, gamma, int(n), 0.3) for n in x])
    matplotlib.pyplot.close("all")


def test_the_measurement_counts_studies_and_needs_no_gpu(monkeypatch):
    real = metric._coverage
    monkeypatch.setattr(metric, "_coverage", lambda study, methods, trials, n_boot, rng: real(study, methods, 8, 99, rng))
    rows = measure("cpu")
    assert len(rows) == 18 and len({row["name"] for row in rows}) == 18
    for row in rows:
        assert row["measured"] == row["hits"] / row["trials"] and row["low"] <= row["measured"] <= row["high"]
        assert row["trials"] <= 8
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        measure("cuda")
