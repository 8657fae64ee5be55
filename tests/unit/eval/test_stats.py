"""Properties of `collai.eval.stats`: equal to its peers, honest at the edges, strict about its input."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix, f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import fleiss_kappa as fleiss_peer
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from collai.eval import stats
from collai.eval.stats import (
    agreement,
    bh_reject,
    bonett_price,
    bootstrap_mean,
    cohen_kappa,
    fleiss_kappa,
    holm,
    krippendorff_alpha,
    mcnemar_exact,
    paired_bootstrap,
    pass_at_k,
    required_pairs,
    resample_counts,
    sign_flip_test,
    wilson,
)

NAN, INF = float("nan"), float("inf")
quickly = settings(deadline=None, derandomize=True, max_examples=40)
counts = st.integers(0, 60)
levels = st.floats(0.01, 0.999)
scores = st.lists(st.floats(-100, 100), min_size=2, max_size=25)


@given(st.integers(1, 5000), st.data(), levels)
@quickly
def test_wilson_is_statsmodels_and_solves_the_score_equation(n, data, conf):
    k = data.draw(st.integers(0, n))
    lo, hi = wilson(k, n, conf)
    assert np.allclose((lo, hi), proportion_confint(k, n, 1 - conf, "wilson"), atol=1e-12, rtol=0)
    assert 0 <= lo <= k / n <= hi <= 1
    z = scipy.stats.norm.isf((1 - conf) / 2)
    for p in (lo, hi):
        assert math.isclose((k - n * p) ** 2, z * z * n * p * (1 - p), rel_tol=1e-6, abs_tol=1e-7)
    assert np.allclose(wilson(n - k, n, conf), (1 - hi, 1 - lo), atol=1e-12)


def test_wilson_touches_zero_and_one_exactly():
    for n in (1, 2, 7, 1000):
        assert wilson(0, n)[0] == 0.0 < wilson(0, n)[1] < 1
        assert wilson(n, n)[1] == 1.0 > wilson(n, n)[0] > 0


@given(counts, counts)
@quickly
def test_mcnemar_is_statsmodels_and_symmetric(b, c):
    assert abs(mcnemar_exact(b, c) - mcnemar([[3, b], [c, 2]], exact=True).pvalue) < 1e-12
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)
    tail = sum(Fraction(math.comb(b + c, i), 2 ** (b + c)) for i in range(min(b, c) + 1))
    assert abs(mcnemar_exact(b, c) - min(1.0, float(2 * tail))) < 1e-12


def test_mcnemar_without_discordant_tasks_is_one():
    assert mcnemar_exact(0, 0) == 1.0


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=9))
@quickly
def test_sign_flips_are_counted_exactly_for_few_tasks(diff):
    patterns = itertools.product([-1, 1], repeat=len(diff))
    extreme = [abs(sum(s * d for s, d in zip(p, diff, strict=True))) >= abs(sum(diff)) for p in patterns]
    assert abs(sign_flip_test(diff) - np.mean(extreme)) < 1e-12


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.sampled_from([3, 10, 7e-9, 1e12]))
@quickly
def test_sign_flips_do_not_depend_on_the_unit_of_the_scores(diff, unit):
    assert sign_flip_test(np.array(diff) / unit) == sign_flip_test(diff)


def test_a_mean_of_zero_up_to_rounding_is_no_evidence():
    assert sign_flip_test(np.array([0, 1, 2, 1, 1, 1, -2, 0, 3, -3, -3, -1]) / 3) == 1.0


def test_sixteen_differences_are_exact_and_seventeen_are_sampled():
    diff = np.linspace(-1, 2, 17)
    assert sign_flip_test(diff[:16], n_flips=10, seed=1) == sign_flip_test(diff[:16], seed=2)
    assert sign_flip_test(diff, seed=1) != sign_flip_test(diff, seed=2)
    assert abs(sign_flip_test(diff, 50_000, seed=1) - sign_flip_test(diff, 2**17)) < 0.02
    peer = scipy.stats.permutation_test(
        (diff,), np.mean, permutation_type="samples", n_resamples=999, rng=np.random.default_rng(4)
    )
    assert abs(sign_flip_test(diff, 999, seed=4) - peer.pvalue) < 1e-12


def test_one_difference_and_all_zeros_say_nothing():
    assert sign_flip_test([0.3]) == 1.0
    assert sign_flip_test(np.zeros(30)) == 1.0


@given(counts, counts, counts, levels)
@quickly
def test_bonett_price_holds_the_ratio_and_turns_over(n11, n10, n01, conf):
    lo, hi = bonett_price(n11, n10, n01, conf)
    assert 0 <= lo <= hi
    x1, x2 = n11 + n10, n11 + n01
    if x1 and x2:
        assert lo < x1 / x2 < hi
        assert np.allclose(bonett_price(n11, n01, n10, conf), (1 / hi, 1 / lo), rtol=1e-9)
        wider = bonett_price(n11, n10, n01, (1 + conf) / 2)
        assert wider[0] < lo and wider[1] > hi
    assert (lo == 0) == (x1 == 0) and math.isinf(hi) == (x2 == 0)


def test_bonett_price_is_the_published_formula():
    n11, n10, n01, z = 43, 12, 4, scipy.stats.norm.isf(0.025)
    x1, x2, a = n11 + n10, n11 + n01, n11 + n10 + n01
    joint = np.sqrt((n10 + n01 + 2) / ((x1 + 1) * (x2 + 1)))
    first = np.sqrt((1 - (x1 + 1) / (a + 2)) / (x1 + 1))
    second = np.sqrt((1 - (x2 + 1) / (a + 2)) / (x2 + 1))
    level = 2 * scipy.stats.norm.sf(z * joint / (first + second))
    lo1, hi1 = proportion_confint(x1, a, level, "wilson")
    lo2, hi2 = proportion_confint(x2, a, level, "wilson")
    assert np.allclose(bonett_price(n11, n10, n01), (lo1 / hi2, hi1 / lo2), atol=1e-12, rtol=0)


def test_bonett_price_covers_the_ratio():
    p11, p10, p01 = 0.55, 0.17, 0.11
    draws = np.random.default_rng(0).multinomial(100, [p11, p10, p01, 0.17], size=1500).tolist()
    limits = np.array([bonett_price(*row[:3]) for row in draws])
    truth = (p11 + p10) / (p11 + p01)
    assert abs(((limits[:, 0] <= truth) & (truth <= limits[:, 1])).mean() - 0.95) < 0.025


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40))
@quickly
def test_rows_of_counts_are_histograms_of_drawn_indices(n, n_boot, seed):
    W = resample_counts(n, n_boot, seed)
    assert W.dtype == np.int32 and W.shape == (n_boot, n) and (W.sum(axis=1) == n).all()
    indices = np.random.default_rng(seed).integers(0, n, (n_boot, n))
    assert (W == np.stack([np.bincount(row, minlength=n) for row in indices])).all()


def test_counts_do_not_depend_on_the_block_size(monkeypatch):
    whole = resample_counts(30, 50, 7)
    monkeypatch.setattr(stats, "_BLOCK_ENTRIES", 64)
    assert (resample_counts(30, 50, 7) == whole).all()
    monkeypatch.setattr(stats, "_BLOCK_ENTRIES", 1)
    assert (resample_counts(30, 50, 7) == whole).all()


def test_counts_have_the_moments_of_a_multinomial():
    W = resample_counts(8, 40_000, 3)
    assert abs(W.mean(axis=0) - 1).max() < 0.03
    assert abs(np.cov(W.T) - (np.eye(8) - 1 / 8)).max() < 0.04


@given(scores, st.integers(0, 2**30), st.floats(0.1, 0.99))
@quickly
def test_bootstrap_mean_is_scipy(y, seed, conf):
    mean, lo, hi = bootstrap_mean(y, n_boot=60, conf=conf, seed=seed)
    drawn = np.random.default_rng(seed).integers(0, len(y), (60, len(y)))
    limits = np.quantile(np.array(y)[drawn].mean(axis=1), [(1 - conf) / 2, (1 + conf) / 2])
    assert np.allclose((mean, lo, hi), (np.mean(y), *limits), atol=1e-9, rtol=1e-12)
    assert bootstrap_mean(y, range(len(y)), 60, conf, seed) == (mean, lo, hi)


def test_bootstrap_mean_is_scipys_percentile_interval():
    y = np.random.default_rng(1).normal(size=70)
    peer = scipy.stats.bootstrap(
        (y,), np.mean, n_resamples=400, method="percentile", confidence_level=0.9, rng=np.random.default_rng(9)
    ).confidence_interval
    assert np.allclose(bootstrap_mean(y, None, 400, 0.9, 9)[1:], (peer.low, peer.high), atol=1e-12, rtol=0)


def test_whole_clusters_are_drawn_and_their_names_do_not_matter():
    rng = np.random.default_rng(2)
    y, names = rng.normal(size=40), np.repeat(["d", "a", "c", "b"], [25, 5, 2, 8])
    groups = [y[names == name] for name in "dacb"]
    drawn = np.random.default_rng(6).integers(0, 4, (300, 4))
    means = [np.concatenate([groups[g] for g in row]).mean() for row in drawn]
    result = bootstrap_mean(y, names, 300, seed=6)
    assert np.allclose(result, (y.mean(), *np.quantile(means, [0.025, 0.975])), atol=1e-12)
    assert bootstrap_mean(y, np.repeat([7, 9, 1, 3], [25, 5, 2, 8]), 300, seed=6) == result
    assert bootstrap_mean(pd.Series(y), list(names), 300, seed=6) == result


def test_bands_are_columns_with_shared_draws():
    y = np.random.default_rng(3).normal(size=(30, 4))
    clusters = np.arange(30) // 3
    mean, lo, hi = bootstrap_mean(y, clusters, 200, seed=5)
    assert mean.shape == lo.shape == hi.shape == (4,)
    for j in range(4):
        assert np.allclose(bootstrap_mean(y[:, j], clusters, 200, seed=5), (mean[j], lo[j], hi[j]), atol=1e-12)


def test_drawing_items_is_too_sure_of_clustered_scores():
    rng = np.random.default_rng(4)
    y = np.repeat(rng.normal(size=(30, 200)), 6, axis=0)
    clusters = np.repeat(np.arange(30), 6)
    _, lo, hi = bootstrap_mean(y, clusters, 400)
    _, lo_items, hi_items = bootstrap_mean(y, None, 400)
    assert abs(np.mean((hi - lo) / (hi_items - lo_items)) - math.sqrt(6)) < 0.15
    assert ((lo <= 0) & (hi >= 0)).mean() > 0.88 > ((lo_items <= 0) & (hi_items >= 0)).mean()


@given(scores, st.integers(0, 99))
@quickly
def test_the_paired_bootstrap_is_the_bootstrap_of_the_difference(y, seed):
    x = np.array(y) * 0.5 + np.arange(len(y))
    result = paired_bootstrap(x, y, None, 50, 0.9, seed)
    assert result == bootstrap_mean(x - np.array(y), None, 50, 0.9, seed)
    turned = paired_bootstrap(y, x, None, 50, 0.9, seed)
    assert np.allclose(turned, (-result[0], -result[2], -result[1]), atol=1e-9)


def test_inputs_are_not_changed():
    y, clusters = np.arange(6.0), np.array([0, 0, 1, 1, 2, 2])
    bootstrap_mean(y, clusters, 10)
    paired_bootstrap(y, y, clusters, 10)
    holm(p := np.array([0.5, 0.01, 0.2]))
    assert (y == np.arange(6.0)).all() and (p == [0.5, 0.01, 0.2]).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 0.5))
@settings(quickly, max_examples=15)
def test_holm_is_statsmodels_and_the_step_rule(p, alpha):
    adjusted = holm(p)
    assert np.allclose(adjusted, multipletests(p, alpha, "holm")[1], atol=1e-12, rtol=0)
    order, running = np.argsort(p, kind="stable"), 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, p[i] * (len(p) - place)))
        assert abs(adjusted[i] - running) < 1e-12


@given(st.lists(st.floats(0, 1), min_size=1, max_size=25), st.floats(0.01, 0.9))
@quickly
def test_bh_and_by_are_the_step_up_rules(p, q):
    for method, weight in (("bh", 1.0), ("by", sum(1 / r for r in range(1, len(p) + 1)))):
        limits = q / weight * np.arange(1, len(p) + 1) / len(p)
        passed = np.flatnonzero(np.sort(p) <= limits)
        bound = np.sort(p)[passed[-1]] if passed.size else -1.0
        close = abs(np.sort(p) - limits).min() < 1e-12
        assert close or (bh_reject(p, q, method) == (np.array(p) <= bound)).all()
        assert (bh_reject(p, q, method) == multipletests(p, q, f"fdr_{method}")[0]).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
@quickly
def test_agreement_is_scikit_learn(pairs):
    a, b = (list(column) for column in zip(*pairs, strict=True))
    result = agreement(a, b)
    assert abs(result["accuracy"] - np.mean(np.array(a) == b)) < 1e-12
    assert abs(result["macro_f1"] - f1_score(a, b, average="macro", zero_division=0)) < 1e-12
    assert result["confusion"].to_numpy().sum() == len(a)
    assert list(result["confusion"].index) == sorted({*a, *b}) and result["confusion"].index.name == "truth"
    assert result["kappa"] == cohen_kappa(a, b)
    assert abs(result["alpha"] - krippendorff_alpha([a, b])) < 1e-12
    if len({*a, *b}) > 1:
        assert (result["confusion"].to_numpy() == confusion_matrix(a, b)).all()
        assert abs(cohen_kappa(a, b) - cohen_kappa_score(a, b)) < 1e-12


def test_one_label_is_perfect_agreement():
    assert cohen_kappa(["x"], ["x"]) == 1.0
    assert fleiss_kappa([[0, 3], [0, 3]]) == 1.0
    assert krippendorff_alpha([[1, 1], [1, NAN]]) == 1.0
    assert agreement(["x", "x"], ["x", "x"])["alpha"] == 1.0


def test_constant_but_different_raters_do_not_agree():
    assert cohen_kappa([0, 0, 0], [1, 1, 1]) == 0.0


@given(st.integers(1, 12), st.integers(2, 6), st.integers(2, 4), st.integers(0, 999))
@quickly
def test_fleiss_is_statsmodels_and_alpha_follows_from_it(items, raters, labels, seed):
    ratings = np.random.default_rng(seed).integers(0, labels, (raters, items))
    table = (ratings[:, :, None] == np.arange(labels)).sum(axis=0)
    if len(np.unique(ratings)) == 1:
        assert fleiss_kappa(table) == krippendorff_alpha(ratings) == 1.0
    else:
        kappa = fleiss_kappa(table)
        assert abs(kappa - fleiss_peer(table)) < 1e-12
        total = raters * items
        assert abs(1 - krippendorff_alpha(ratings) - (1 - kappa) * (total - 1) / total) < 1e-12


@given(st.integers(0, 999))
@quickly
def test_alpha_counts_pairs_and_leaves_lonely_ratings_out(seed):
    rng = np.random.default_rng(seed)
    ratings = np.where(rng.random((4, 12)) < 0.5, NAN, rng.integers(0, 3, (4, 12)))
    items = [column[~np.isnan(column)] for column in ratings.T]
    items = [column for column in items if len(column) > 1]
    pooled = np.concatenate(items) if items else np.array([])
    if len(np.unique(pooled)) < 2:
        return
    observed = sum(
        sum(s != t for s, t in itertools.permutations(column, 2)) / (len(column) - 1) for column in items
    ) / len(pooled)
    expected = np.mean([s != t for s, t in itertools.permutations(pooled, 2)])
    assert abs(krippendorff_alpha(ratings) - (1 - observed / expected)) < 1e-12
    assert abs(krippendorff_alpha(ratings[::-1, ::-1] * 10 + 3) - (1 - observed / expected)) < 1e-12


@given(st.integers(1, 60), st.data())
@quickly
def test_pass_at_k_is_the_hypergeometric_tail(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert abs(pass_at_k(n, c, k) - scipy.stats.hypergeom.sf(0, n, c, k)) < 1e-12
    assert abs(pass_at_k(n, c, 1) - c / n) < 1e-12
    assert pass_at_k(n, c, n) == float(c > 0)


def test_pass_at_k_is_right_for_many_tries():
    assert abs(pass_at_k(100_000, 3, 50_000) - 0.875) < 1e-4


def test_required_pairs_gives_the_known_value():
    assert required_pairs(0.15, 0.05) == required_pairs(0.05, 0.15) == 155
    assert required_pairs(1, 0) == 4
    assert required_pairs(0.15, 0.05, power=0.9) > 155 > required_pairs(0.15, 0.05, alpha=0.1)


@given(st.floats(0.02, 0.45), st.floats(0.02, 0.45), st.floats(0.55, 0.99))
@quickly
def test_required_pairs_is_the_first_size_with_enough_power(p10, p01, power):
    d, e = p10 + p01, abs(p10 - p01)
    if e < 1e-3:
        return

    def reached(n):
        shift = n * e - scipy.stats.norm.isf(0.025) * math.sqrt(n * d)
        return scipy.stats.norm.cdf(shift / math.sqrt(n * (d - e * e)))

    n = required_pairs(p10, p01, power)
    assert reached(n) >= power - 1e-9 and (n == 1 or reached(n - 1) < power + 1e-9)


BAD = [
    (lambda: wilson(11, 10), r"k must be in \[0, 10\], got 11"),
    (lambda: wilson(-1, 10), r"k must be in \[0, 10\], got -1"),
    (lambda: wilson(0, 0), "n must be >= 1, got 0"),
    (lambda: wilson(1, 2, 1.0), r"conf must be in \(0, 1\), got 1\.0"),
    (lambda: wilson(1, 2, NAN), r"conf must be in \(0, 1\), got nan"),
    (lambda: mcnemar_exact(3, -2), "c must be >= 0, got -2"),
    (lambda: bonett_price(-1, 0, 0), "n11 must be >= 0, got -1"),
    (lambda: bonett_price(1, 0, 0, 0.0), r"conf must be in \(0, 1\), got 0\.0"),
    (lambda: sign_flip_test([]), r"diff is empty, got shape \(0,\)"),
    (lambda: sign_flip_test([1.0, NAN]), "diff must be finite, got nan"),
    (lambda: sign_flip_test([1.0], 0), "n_flips must be >= 1, got 0"),
    (lambda: resample_counts(0, 3), "n must be >= 1, got 0"),
    (lambda: resample_counts(3, 0), "n_boot must be >= 1, got 0"),
    (lambda: resample_counts(3, 2, -1), "seed must be >= 0, got -1"),
    (lambda: bootstrap_mean([1.0, INF]), "y must be finite, got inf"),
    (lambda: bootstrap_mean([]), "y is empty"),
    (lambda: bootstrap_mean(np.zeros((2, 2, 2))), r"y must have 1 or 2 dimension\(s\), got 3"),
    (lambda: bootstrap_mean([1.0]), "at least 2 items or clusters, got 1"),
    (lambda: bootstrap_mean([1.0, 2.0], ["a", "a"]), "at least 2 items or clusters, got 1"),
    (lambda: bootstrap_mean([1.0, 2.0], [1]), r"clusters has shape \(1,\), y has 2 items"),
    (lambda: bootstrap_mean([1.0, 2.0], [(1, 2), (3, 4)]), r"clusters has shape \(2, 2\)"),
    (lambda: bootstrap_mean([1.0, 2.0], [1.0, NAN]), "clusters must not hold NaN, got nan"),
    (lambda: bootstrap_mean([1.0, 2.0], conf=1.5), r"conf must be in \(0, 1\), got 1\.5"),
    (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "x has 2 items, y has 3"),
    (lambda: paired_bootstrap([1, NAN], [1, 2]), "x must be finite, got nan"),
    (lambda: paired_bootstrap(np.ones((2, 2)), [1, 2]), r"x must have 1 dimension\(s\), got 2"),
    (lambda: holm([0.2, -0.1]), r"p must be in \[0, 1\], got -0\.1"),
    (lambda: holm([NAN]), "p must be finite, got nan"),
    (lambda: bh_reject([1.01]), r"p must be in \[0, 1\], got 1\.01"),
    (lambda: bh_reject([0.1], q=1.0), r"q must be in \(0, 1\), got 1\.0"),
    (lambda: bh_reject([0.1], method="x"), "method must be 'bh' or 'by', got 'x'"),
    (lambda: cohen_kappa([1], [1, 2]), r"a has shape \(1,\), b has \(2,\)"),
    (lambda: cohen_kappa([], []), "a is empty"),
    (lambda: cohen_kappa([1.0, NAN], [1.0, 1.0]), "labels must not hold NaN"),
    (lambda: agreement(["a"], ["a", "b"]), r"a has shape \(1,\), b has \(2,\)"),
    (lambda: fleiss_kappa([[1, 1], [2, 1]]), "equal sums, got 2 and 3"),
    (lambda: fleiss_kappa([[1, 0], [0, 1]]), "at least 2 ratings, got 1"),
    (lambda: fleiss_kappa([[1.5, 1.5]]), r"whole numbers >= 0, got 1\.5"),
    (lambda: fleiss_kappa([[3, -1]]), "whole numbers >= 0, got -1"),
    (lambda: fleiss_kappa([1, 2]), r"counts must have 2 dimension\(s\), got 1"),
    (lambda: krippendorff_alpha([1, 2]), "ratings must have 2 dimensions, got 1"),
    (lambda: krippendorff_alpha([[1, INF], [1, 2]]), "finite or NaN, got inf"),
    (lambda: krippendorff_alpha([[1, NAN], [NAN, 1]]), "no item has two ratings"),
    (lambda: pass_at_k(5, 6, 1), r"c must be in \[0, 5\], got 6"),
    (lambda: pass_at_k(5, 2, 6), r"k must be in \[1, 5\], got 6"),
    (lambda: pass_at_k(5, 2, 0), r"k must be in \[1, 5\], got 0"),
    (lambda: pass_at_k(0, 0, 1), "n must be >= 1, got 0"),
    (lambda: required_pairs(0.1, 0.1), r"p10 and p01 must differ, got 0\.1 and 0\.1"),
    (lambda: required_pairs(0.7, 0.6), r"add up to at most 1, got 0\.7 and 0\.6"),
    (lambda: required_pairs(1.2, 0.1), r"p10 must be in \[0, 1\], got 1\.2"),
    (lambda: required_pairs(0.2, 0.1, power=1.0), r"power must be in \(0, 1\), got 1\.0"),
    (lambda: required_pairs(0.2, 0.1, alpha=0.0), r"alpha must be in \(0, 1\), got 0\.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(2.5, 10), r"k must be an integer, got 2\.5"),
        (lambda: mcnemar_exact("3", 1), "b must be an integer, got '3'"),
        (lambda: pass_at_k(5, 1.0, 1), r"c must be an integer, got 1\.0"),
        (lambda: cohen_kappa([1, 2], ["1", "2"]), "labels differ in type"),
    ],
)
def test_wrong_types_are_refused_with_their_value(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_lists_tuples_arrays_series_and_numpy_numbers_are_accepted():
    k, n = np.int64(3), np.int32(9)
    assert wilson(k, n) == wilson(3, 9)
    assert mcnemar_exact(k, n) == mcnemar_exact(3, 9)
    assert bonett_price(k, n, 2) == bonett_price(3, 9, 2)
    assert pass_at_k(n, k, 2) == pass_at_k(9, 3, 2)
    assert (resample_counts(n, 5, np.int64(2)) == resample_counts(9, 5, 2)).all()
    for y in ((1, 2.0, 4), [True, False, True], np.arange(3), pd.Series([1.0, 2.0, 3.0])):
        assert bootstrap_mean(y, n_boot=9) == bootstrap_mean(np.asarray(y, float), n_boot=9)
        assert paired_bootstrap(y, (0, 0, 0), ["a", "b", "b"], n_boot=9)[0] == np.mean(y)
        assert sign_flip_test(y) == sign_flip_test(np.asarray(y, float))
    assert len(bootstrap_mean([[1, 2], [3, 4]], n_boot=9)) == 3
    assert holm((0.1, 0.2)).shape == bh_reject([0, 1], q=0.1).shape == (2,)
    assert fleiss_kappa([[2, 0], [0, 2]]) == krippendorff_alpha(((1, 2), (1, 2))) == 1.0
    assert cohen_kappa(("a", "b"), ["a", "b"]) == agreement([1, 2], (1, 2))["kappa"] == 1.0


def test_import_loads_no_heavy_peer():
    code = (
        "import sys, collai.eval.stats, collai.eval; "
        "print({'pandas', 'sklearn', 'statsmodels', 'torch', 'scipy.stats', 'openai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
