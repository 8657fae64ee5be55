"""Psychometric curves, flips, and what chains claim."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from collai.eval import stats as shared
from collai.viabench import stats
from collai.viabench.stats import Fit, chain_claims, fit_psychometric, flips, mirage

LEVELS = np.linspace(-0.4, 0.4, 9)
SIDES = ["Both are equally long", "The upper one", "The lower one", "Not Sure"]
LONGER = "Which of the two horizontal lines is longer?"
TRUTH = {"a": {"kind": "segment", "x0": 0, "x1": 41, "y0": 30, "y1": 30}, "b": {"kind": "segment", "x0": 0, "x1": 38, "y0": 10, "y1": 10}}


def nll(mu, sigma, x, k, n, lapse):
    p = lapse / 2 + (1 - lapse) * ndtr((np.asarray(x) - mu) / sigma)
    return -float(np.sum(k * np.log(p) + (np.asarray(n) - k) * np.log(1 - p)))


@given(st.integers(0, 10_000))
def test_the_fit_equals_a_probit_regression(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(5, 40, 9)
    k = rng.binomial(n, ndtr((LEVELS - rng.uniform(-0.2, 0.2)) / rng.uniform(0.08, 0.4)))
    fit = fit_psychometric(LEVELS, k, n)
    assume(not fit.separable)
    peer = sm.GLM(np.c_[k, n - k], sm.add_constant(LEVELS), family=sm.families.Binomial(sm.families.links.Probit())).fit(
        tol=1e-14, maxiter=300)
    (b0, b1), V = peer.params, peer.cov_params()
    g = np.array([-1 / b1, b0 / b1**2])
    assert fit.pse == pytest.approx(-b0 / b1, abs=1e-7) and fit.sigma == pytest.approx(1 / b1, abs=1e-7)
    assert fit.se_pse == pytest.approx(math.sqrt(g @ V @ g), rel=1e-6)
    assert fit.jnd == pytest.approx(fit.sigma * ndtri(0.75), rel=1e-12)
    assert fit.nll == pytest.approx(nll(fit.pse, fit.sigma, LEVELS, k, n, 0.0), rel=1e-9)


@given(st.integers(0, 10_000))
def test_no_curve_with_lapses_is_better_than_the_fit(seed):
    rng = np.random.default_rng(seed)
    k = rng.binomial(20, 0.01 + 0.98 * ndtr((LEVELS - 0.1) / 0.15))
    fit = fit_psychometric(LEVELS, k, 20, 0.02)
    assume(not fit.separable)
    assert fit.nll == pytest.approx(nll(fit.pse, fit.sigma, LEVELS, k, 20, 0.02), rel=1e-9)
    free = minimize(lambda b: nll(b[0], math.exp(b[1]), LEVELS, k, 20, 0.02), [0.0, -1.5], method="Nelder-Mead")
    assert fit.nll <= free.fun + 1e-7


def test_recorded_numbers_of_the_peer():
    fit = fit_psychometric([-0.3, -0.15, 0.0, 0.15, 0.3], [1, 4, 12, 18, 20], 20)
    recorded = (-0.0392549268, 0.1434340894, 0.0245991109, 34.21577965)  # statsmodels 0.15.0, GLM, probit link
    assert (fit.pse, fit.sigma, fit.se_pse, fit.nll) == pytest.approx(recorded, rel=1e-6)


@given(st.floats(-5, 5), st.floats(0.01, 100))
def test_shift_and_scale_of_the_levels_carry_over(shift, scale):
    x, k = np.array([-0.2, 0.0, 0.2]), [3, 11, 17]
    base, moved = fit_psychometric(x, k, 20), fit_psychometric(shift + scale * x, k, 20)
    assert moved.pse == pytest.approx(shift + scale * base.pse, rel=1e-7, abs=1e-7)
    assert moved.sigma == pytest.approx(scale * base.sigma, rel=1e-6) and moved.se_pse == pytest.approx(scale * base.se_pse, rel=1e-6)


def test_order_and_split_of_the_levels_do_not_matter():
    whole = fit_psychometric([-0.2, 0.0, 0.2], [3, 11, 17], 20)
    split = fit_psychometric([0.2, -0.2, 0.0, 0.2, -0.2], [10, 1, 11, 7, 2], [12, 10, 20, 8, 10])
    assert split.pse == pytest.approx(whole.pse, abs=1e-10) and split.se_pse == pytest.approx(whole.se_pse, abs=1e-10)


@pytest.mark.parametrize("lapse", [0.0, 0.02])
@pytest.mark.parametrize("k", [[0, 0, 5, 5], [0, 2, 5, 5], [5, 5, 0, 0], [0, 0, 0, 0], [5, 5, 5, 5], [0, 0, 0, 5]])
def test_steps_are_reported_and_not_fitted(k, lapse):
    fit = fit_psychometric([0, 1, 2, 3], k, 5, lapse)
    assert fit.separable and all(math.isnan(one) for one in (fit.pse, fit.sigma, fit.jnd, fit.se_pse, fit.nll))


def test_an_observer_that_does_not_look_has_no_pse():
    fit = fit_psychometric([0, 1, 2], [3, 3, 3], 10)
    assert math.isnan(fit.pse) and fit.sigma == math.inf and not fit.separable
    assert fit_psychometric([0, 1], [7, 3], 10).sigma < 0


def test_inputs_are_left_alone():
    x, k, n = np.array([0.2, 0.0]), np.array([7, 3]), np.array([10, 10])
    fit_psychometric(x, k, n)
    assert x.tolist() == [0.2, 0.0] and k.tolist() == [7, 3] and n.tolist() == [10, 10]


@pytest.mark.parametrize(("arguments", "text"), [
    (([0, 1], [3, 7], [5, 5]), r"k must be in \[0, n\], got k=7 with n=5"), (([0, 1], [-1, 2], 5), "got k=-1 with n=5"),
    (([0, 1], [0, 0], [5, 0]), "n must be at least 1, got 0"), (([0, 1], [0, 0], [5, -2]), "n must be at least 1, got -2"),
    (([1, 1], [2, 3], 5), r"delta must have at least 2 levels, got \[1.0\]"), (([0.5], [2], 5), r"at least 2 levels, got \[0.5\]"),
    (([0, 1], [1.5, 2], 5), "k must hold whole numbers, got 1.5"), (([0, math.nan], [1, 2], 5), "delta must be finite, got nan"),
    (([0, 1, 2], [1, 2], 5), "must be lists of equal length"), (([0, 1], [1, 2], 5, 1.0), r"lapse must be in \[0, 1\), got 1.0"),
    (([0, 1], [1, 2], 5, -0.1), "got -0.1"), (([0, 1], [1, 2], 5, math.nan), "got nan")])
def test_bad_counts_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        fit_psychometric(*arguments)


def test_the_shared_statistics_are_the_same_objects():
    for name in ("wilson", "holm", "mcnemar_exact", "paired_bootstrap", "bootstrap_mean", "fleiss_kappa", "cohen_kappa"):
        assert getattr(stats, name) is getattr(shared, name)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_flips_count_both_ways(pairs):
    direct, chain = [x for x, _ in pairs], [y for _, y in pairs]
    found = flips(direct, chain, n_boot=50)
    assert found["help"] == sum(y and not x for x, y in pairs) and found["harm"] == sum(x and not y for x, y in pairs)
    assert found["gain"] == pytest.approx((found["help"] - found["harm"]) / len(pairs))
    assert found["low"] <= found["gain"] + 1e-12 and found["gain"] <= found["high"] + 1e-12
    assert found["p"] == shared.mcnemar_exact(found["harm"], found["help"])


@pytest.mark.parametrize(("chain", "letters"), [
    ("upper 38 lower 41 lower longer so Answer: C", ["C", "C"]), ("upper 40 lower 40 equal so Answer: A", ["A", "A"]),
    ("a is 41 px, b is 38 px", ["C"]), ("a is longer", ["C"]), ("b is longer than a", ["B"]), ("The upper one is shorter.", ["C"]),
    ("The upper line looks longer, but both are the same length.", ["A"]), ("They aren't equal.", ["BC"]),
    ("The lower one is not longer than the upper one.", ["AB"]), ("I like it. Answer: B", []), ("The top line is longer", ["B"])])
def test_claims_of_a_chain(chain, letters):
    assert ["".join(sorted(one.letters)) for one in chain_claims(chain, LONGER, SIDES, TRUTH)] == letters


@pytest.mark.parametrize(("chain", "question", "options", "letters"), [
    ("same colour so Answer: A", "Are they of the same colour?", ["Yes", "No", "Not Sure"], ["A"]),
    ("different colour", "Are they of the same colour?", ["No", "Yes", "Not Sure"], ["A"]),
    ("count 5 so Answer: B", "How many legs does this elephant have?", ["4", "5", "3", "Not Sure"], ["B"]),
    ("There are nine.", "How many legs does this elephant have?", ["4", "5", "3", "Not Sure"], [""]),
    ("left 128 right 120 left lighter", "Which square is lighter?", ["The right one", "The left one", "Both are equally light"], ["B", "B"]),
    ("left 128 right 120", "Which square is darker?", ["The right one", "The left one", "Both are equally dark"], ["A"]),
    ("The right one is darker", "Which square is lighter?", ["The right one", "The left one", "Both are equally light"], ["B"]),
    ("Square 1 is lighter.", "Which square has the lighter grey?", ["Square 2", "Square 1", "Both are equally light"], ["B"]),
    ("No so Answer: B", "Can this fork exist?", ["Yes", "No", "Not Sure"], ["B"])])
def test_claims_follow_question_and_options(chain, question, options, letters):
    assert ["".join(sorted(one.letters)) for one in chain_claims(chain, question, options, {})] == letters


def test_mirages_are_counted():
    item = SimpleNamespace(question=LONGER, options=SIDES, answer="C", truth=TRUTH)
    chains = ["lower longer so Answer: C", "upper longer so Answer: B", "upper longer so Answer: C", "lower longer so Answer: A",
              "I just know it. Answer: C", "B", "no idea"]
    found = mirage(chains, [item] * len(chains))
    assert found["chains"] == 7 and found["claims"] == 4 and found["claim_precision"][0] == 0.5
    assert found["self_contradiction"][0] == 0.5 and found["mirage"][0] == 3 / 5
    assert found["table"].tolist() == [[1, 1], [1, 1]]
    assert found["mirage"][1:] == shared.wilson(3, 5)
    assert math.isnan(mirage([], [])["mirage"][0])


def test_mirage_refuses_what_it_cannot_judge():
    item = SimpleNamespace(question=LONGER, options=SIDES, answer=None, truth=TRUTH)
    with pytest.raises(ValueError, match="items must have an answer, got None"):
        mirage(["A"], [item])
    with pytest.raises(ValueError, match="chains and items must have equal length, got 1 and 0"):
        mirage(["A"], [])


def test_a_fit_cannot_be_changed():
    with pytest.raises(AttributeError):
        Fit(0.0, 1.0, 0.7, 0.1, False, 3.0).pse = 1.0
