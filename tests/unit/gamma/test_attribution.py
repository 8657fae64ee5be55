"""Properties of `collai.gamma.attribution`: values of games, and of games that are only known from scores."""

import importlib.util
import itertools
import math
import os

import matplotlib
import numpy as np
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.eval.stats import resample_counts
from collai.gamma import attribution as module
from collai.gamma.attribution import (
    attribute,
    banzhaf,
    effects,
    interaction,
    measure,
    one_at_a_time,
    owen,
    plot_interactions,
    plot_shapley,
    resampled_sums,
    shapley,
    shapley_effects,
    shapley_sampled,
    walsh,
)
from collai.gamma.design import fractional_factorial, full_factorial

matplotlib.use("Agg")
NAN, INF = float("nan"), float("inf")
quickly = settings(deadline=None, derandomize=True, max_examples=12)
FIVE = ["topology", "role", "scale", "protocol", "diversity"]
LOG_PHI = math.log(0.35)
MAIN = np.array([0.20, 0.15, 0.0, -0.10, 0.10])
TRUTH = np.array([0.225, 0.175, 0.0, -0.06, 0.14])


@st.composite
def games(draw):
    k = draw(st.integers(1, 5))
    return np.random.default_rng(draw(st.integers(0, 999))).uniform(-10, 10, 2**k)


def factors(v):
    return len(v).bit_length() - 1


def by_orders(v, orders):
    """Mean of what each factor adds, one order after the other."""
    added = np.zeros(factors(v))
    orders = list(orders)
    for order in orders:
        chosen = 0
        for i in order:
            added[i] += v[chosen | 1 << i] - v[chosen]
            chosen |= 1 << i
    return added / len(orders)


def moebius(v):
    """Dividends, subset by subset."""
    return [
        sum((-1) ** ((T ^ S).bit_count()) * v[S] for S in range(len(v)) if S & ~T == 0) for T in range(len(v))
    ]


def world(x):
    """Log score of the reference world, levels 0 and 1."""
    return LOG_PHI + x @ MAIN + 0.05 * x[..., 0] * x[..., 1] + 0.08 * x[..., 3] * x[..., 4]


def planted(design, n, seed):
    """Scores of the reference world's runs and of its single agent."""
    rng = np.random.default_rng(seed)
    luck = rng.uniform(0.5, 1.5, (n, 1))
    Y = rng.random((n, len(design.X))) < np.exp(world((design.X + 1) // 2)) * luck
    return Y.astype(float), (rng.random(n) < 0.45 * luck[:, 0]).astype(float)


FULL = full_factorial(FIVE)
Y400, SAS400 = planted(FULL, 400, 0)


@given(games())
@quickly
def test_walsh_coefficients_rebuild_the_game(v):
    w = walsh(v)
    for S in range(len(v)):
        signs = [math.prod(1 if S >> i & 1 else -1 for i in range(factors(v)) if T >> i & 1) for T in range(len(v))]
        assert math.isclose(sum(w * signs), v[S], abs_tol=1e-12)


@given(games())
@quickly
def test_shapley_values_are_the_mean_over_all_orders_and_add_up(v):
    expected = by_orders(v, itertools.permutations(range(factors(v))))
    assert np.allclose(shapley(v), expected, atol=1e-12)
    assert math.isclose(shapley(v).sum(), v[-1] - v[0], abs_tol=1e-12)


@given(games())
@quickly
def test_banzhaf_values_are_the_mean_over_all_sets(v):
    k = factors(v)
    for i, value in enumerate(banzhaf(v)):
        gains = [v[S | 1 << i] - v[S] for S in range(2**k) if not S >> i & 1]
        assert math.isclose(value, sum(gains) / len(gains), abs_tol=1e-12)


@given(games())
@quickly
def test_the_efficiency_gap_of_main_effects_is_made_of_odd_coefficients(v):
    odd = [T for T in range(len(v)) if T.bit_count() % 2 and T.bit_count() > 2]
    assert math.isclose(banzhaf(v).sum() - (v[-1] - v[0]), -2 * walsh(v)[odd].sum(), abs_tol=1e-11)


@given(games())
@quickly
def test_the_moebius_form_agrees(v):
    m, k = moebius(v), factors(v)
    sets = range(1, 2**k)
    for i in range(k):
        mine = [T for T in sets if T >> i & 1]
        assert math.isclose(shapley(v)[i], sum(m[T] / T.bit_count() for T in mine), abs_tol=1e-11)
        assert math.isclose(banzhaf(v)[i], sum(m[T] / 2 ** (T.bit_count() - 1) for T in mine), abs_tol=1e-11)
        on, off = one_at_a_time(v)
        assert math.isclose(on[i], m[1 << i], abs_tol=1e-11)
        assert math.isclose(off[i], sum(m[T] for T in mine), abs_tol=1e-11)
        for j in range(k):
            both = [T for T in mine if T >> j & 1]
            expected = sum(m[T] / (T.bit_count() - 1) for T in both) if i != j else 0
            assert math.isclose(interaction(v)[i, j], expected, abs_tol=1e-11)


@given(games())
@quickly
def test_interactions_are_shapley_means_of_second_differences(v):
    k = factors(v)
    found = interaction(v)
    for i, j in itertools.permutations(range(k), 2):
        rest = [p for p in range(k) if p not in (i, j)]
        total = 0.0
        for size in range(k - 1):
            for chosen in itertools.combinations(rest, size):
                S = sum(1 << p for p in chosen)
                second = v[S | 1 << i | 1 << j] - v[S | 1 << i] - v[S | 1 << j] + v[S]
                total += second / ((k - 1) * math.comb(k - 2, size))
        assert math.isclose(found[i, j], total, abs_tol=1e-11)
    assert np.array_equal(found, found.T)
    assert not found.diagonal().any()


@given(games(), st.randoms(use_true_random=False))
@quickly
def test_owen_values_are_the_mean_over_orders_that_keep_groups_together(v, random):
    k = factors(v)
    members = list(range(k))
    random.shuffle(members)
    cuts = sorted(random.sample(range(1, k), random.randint(0, k - 1)))
    groups = [members[a:b] for a, b in zip([0, *cuts], [*cuts, k], strict=True)]
    orders = [
        [i for part in parts for i in part]
        for perm in itertools.permutations(groups)
        for parts in itertools.product(*(list(itertools.permutations(g)) for g in perm))
    ]
    found = owen(v, groups)
    assert np.allclose(found, by_orders(v, orders), atol=1e-12)
    quotient = [v[sum(sum(1 << i for i in g) for n, g in enumerate(groups) if H >> n & 1)] for H in range(2 ** len(groups))]
    assert np.allclose([found[g].sum() for g in groups], shapley(quotient), atol=1e-11)


def test_owen_values_of_single_factors_or_of_one_group_are_shapley_values():
    v = np.random.default_rng(1).standard_normal(64)
    assert np.allclose(owen(v, [[i] for i in range(6)]), shapley(v), atol=1e-13)
    assert np.allclose(owen(v, [[3, 1, 0, 2, 5, 4]]), shapley(v), atol=1e-13)


def test_the_one_pass_agrees_with_the_walsh_form_for_many_factors():
    for k in (1, 2, 9, 14):
        v = np.random.default_rng(k).standard_normal(2**k)
        w = walsh(v)
        sets = np.arange(2**k)
        size = np.bitwise_count(sets).astype(int)
        for i in {0, k // 2, k - 1}:
            mine = (sets >> i & 1 == 1) & (size % 2 == 1)
            assert math.isclose(shapley(v)[i], (2 * w[mine] / size[mine]).sum(), abs_tol=1e-11)


def test_an_offset_does_not_cost_precision():
    v = np.random.default_rng(0).standard_normal(2**12).astype(np.float32)
    found = shapley(torch.tensor(v + 1000.0))
    assert np.allclose(found.numpy(), shapley(v.astype(np.float32) + np.float32(1000)), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_worked_on_where_they_lie(dtype):
    v = torch.randn(2**11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    before = v.clone()
    found = shapley(v)
    assert isinstance(found, torch.Tensor)
    assert (found.dtype, found.device, tuple(found.shape)) == (dtype, v.device, (11,))
    assert np.allclose(found.numpy(), shapley(v.numpy()), atol=1e-12 if dtype is torch.float64 else 1e-5)
    assert torch.equal(v, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_values():
    v = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    found = shapley(v.cuda())
    assert found.is_cuda
    assert np.allclose(found.cpu().numpy(), shapley(v.double().numpy()), atol=1e-5)


def test_a_shapley_value_is_linear_so_gradients_flow():
    v = torch.randn(16, dtype=torch.float64, requires_grad=True)
    shapley(v)[2].backward()
    unit = [shapley(np.eye(16)[S])[2] for S in range(16)]
    assert np.allclose(v.grad.numpy(), unit, atol=1e-15)


def test_games_are_left_as_they_are():
    v = np.arange(8.0)
    for f in (walsh, shapley, banzhaf, interaction, one_at_a_time, lambda v: owen(v, [[0], [1, 2]])):
        f(v)
        assert np.array_equal(v, np.arange(8.0))
    groups = [[0], [1, 2]]
    owen(v, groups)
    assert groups == [[0], [1, 2]]


@pytest.mark.parametrize("f", [walsh, shapley, banzhaf, interaction, one_at_a_time, lambda v: owen(v, [[0]])])
@pytest.mark.parametrize(("v", "text"), [
    ([1.0, 2.0, 3.0], "len(v) must be a power of two, at least 2, got 3"),
    ([1.0], "len(v) must be a power of two, at least 2, got 1"),
    ([], "len(v) must be a power of two, at least 2, got 0"),
    (np.ones((2, 2)), "v must have 1 dimension, got 2"),
    ([1.0, NAN], "v must be finite, got nan"),
    ([INF, 1.0], "v must be finite, got inf"),
])
def test_bad_games_are_refused(f, v, text):
    with pytest.raises(ValueError) as caught:
        f(v)
    assert text in str(caught.value)


def test_too_many_factors_and_other_tensors_are_refused():
    with pytest.raises(ValueError, match=r"v may have 2\*\*24 values at most, got 2\*\*25: use shapley_sampled"):
        shapley(torch.zeros(1).expand(2**25))
    with pytest.raises(TypeError, match=r"v must be float32 or float64, got torch.int64"):
        shapley(torch.arange(4))
    with pytest.raises(ValueError, match="v must be finite, got nan"):
        shapley(torch.tensor([0.0, NAN]))
    with pytest.raises(ValueError, match=r"len\(v\) must be a power of two, at least 2, got 3"):
        shapley(torch.zeros(3))


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2]], [[0], [1], [3]], [[0, 1, 2], []], []])
def test_groups_that_are_no_partition_are_refused(groups):
    with pytest.raises(ValueError, match="groups must hold each of the factors 0 to 2 once, got"):
        owen(np.zeros(8), groups)


def lookup(v):
    """A value function that reads a table, and what it was asked."""
    asked = []

    def value(sets):
        asked.extend(map(tuple, sets))
        return v[sets @ (1 << np.arange(sets.shape[1]))]

    return value, asked


def test_sampled_values_are_within_their_errors_and_add_up():
    v = np.random.default_rng(3).standard_normal(256)
    found, se = shapley_sampled(lookup(v)[0], 8, n_pairs=2000, seed=1)
    assert (np.abs(found - shapley(v)) < 4.5 * se).all()
    assert math.isclose(found.sum(), v[-1] - v[0], abs_tol=1e-12)
    again = [shapley_sampled(lookup(v)[0], 8, n_pairs=50, seed=s)[0] for s in range(60)]
    error = np.std(again, axis=0)
    assert np.allclose(error, se * math.sqrt(2000 / 50), rtol=0.5)


def test_one_pair_of_orders_is_exact_without_interactions_of_three_and_more():
    sets = np.arange(64)
    x = (sets[:, None] >> np.arange(6) & 1).astype(float)
    rng = np.random.default_rng(0)
    v = x @ rng.standard_normal(6) + np.einsum("si,ij,sj->s", x, rng.standard_normal((6, 6)), x)
    found, se = shapley_sampled(lookup(v)[0], 6, n_pairs=2)
    assert np.allclose(found, shapley(v), atol=1e-12)
    assert (se < 1e-12).all()


def test_sampling_reaches_beyond_the_exact_limit_and_asks_for_each_set_once():
    weight = np.linspace(-1, 1, 40)
    asked = []

    def value(sets):
        asked.extend(map(tuple, sets))
        return sets @ weight

    found, se = shapley_sampled(value, 40, n_pairs=3, seed=5)
    assert np.allclose(found, weight, atol=1e-12)
    assert (se < 1e-12).all()
    assert len(asked) == len(set(asked)) <= 6 * 39 + 2


def test_sampling_in_pieces_gives_as_many_pairs(monkeypatch):
    sizes = []
    original = module._pair_means
    monkeypatch.setattr(module, "_pair_means", lambda value, orders: sizes.append(len(orders)) or original(value, orders))
    shapley_sampled(lambda sets: sets.sum(axis=1), 100, n_pairs=500)
    assert sum(sizes) == 500
    assert len(sizes) > 1


@pytest.mark.parametrize(("args", "error", "text"), [
    ((0, 10), ValueError, "k must be >= 1, got 0"),
    ((2.5, 10), TypeError, "k must be an integer, got 2.5"),
    ((3, 1), ValueError, "n_pairs must be >= 2, got 1"),
    ((3, 2, -1), ValueError, "seed must be >= 0, got -1"),
])
def test_bad_sampling_is_refused(args, error, text):
    with pytest.raises(error) as caught:
        shapley_sampled(lambda sets: sets.sum(axis=1), *args)
    assert text in str(caught.value)


@pytest.mark.parametrize("bad", [lambda s: np.full(len(s), NAN), lambda s: s, lambda s: 1.0])
def test_a_value_function_must_return_one_finite_number_a_set(bad):
    with pytest.raises(ValueError, match="value must return .* finite numbers, got shape"):
        shapley_sampled(bad, 3, 2)


def conditional_variance(grid, chosen):
    """Variance of the mean given the levels of some factors, level by level."""
    axes = tuple(i for i in range(grid.ndim) if i not in chosen)
    return float(np.var(grid.mean(axis=axes)))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2), (3, 2, 4), (2, 3, 2, 2)])
def test_shapley_effects_are_the_shapley_values_of_the_explained_variance(shape):
    grid = np.random.default_rng(len(shape)).standard_normal(shape)
    before, k = grid.copy(), grid.ndim
    game = [conditional_variance(grid, [i for i in range(k) if S >> i & 1]) for S in range(2**k)]
    found = shapley_effects(grid)
    assert np.allclose(found["shapley"], by_orders(np.array(game), itertools.permutations(range(k))), atol=1e-13)
    assert math.isclose(found["variance"], np.var(grid), abs_tol=1e-13)
    assert math.isclose(sum(found["components"].values()), np.var(grid), abs_tol=1e-13)
    assert math.isclose(found["shapley"].sum(), np.var(grid), abs_tol=1e-13)
    for i in range(k):
        others = [j for j in range(k) if j != i]
        assert math.isclose(found["first"][i], game[1 << i] / np.var(grid), abs_tol=1e-12)
        assert math.isclose(found["total"][i], 1 - conditional_variance(grid, others) / np.var(grid), abs_tol=1e-12)
    assert all(c >= 0 for c in found["components"].values())
    assert np.array_equal(grid, before)


@pytest.mark.skipif(importlib.util.find_spec("SALib") is None, reason="SALib is not installed")
def test_sobol_indices_are_those_of_salib():
    from SALib.analyze import sobol
    from SALib.sample import sobol as sample

    grid = np.random.default_rng(0).standard_normal((4, 4, 4))
    problem = {"num_vars": 3, "names": list("abc"), "bounds": [[0, 4]] * 3}
    x = np.minimum(sample.sample(problem, 2**12).astype(int), 3)
    peer = sobol.analyze(problem, grid[tuple(x.T)])
    found = shapley_effects(grid)
    assert np.allclose(peer["S1"], found["first"], atol=0.05)
    assert np.allclose(peer["ST"], found["total"], atol=0.05)


@pytest.mark.skipif(importlib.util.find_spec("shapiq") is None, reason="shapiq is not installed")
def test_values_are_those_of_shapiq():
    import shapiq

    v = np.random.default_rng(0).standard_normal(32)
    computer = shapiq.ExactComputer(n_players=5, game=lambda sets: v[np.asarray(sets) @ (1 << np.arange(5))])
    peer = computer("SV")
    assert np.allclose([peer[(i,)] for i in range(5)], shapley(v), atol=1e-12)


def test_shapley_effects_of_a_constant_are_zero_and_bad_grids_are_refused():
    found = shapley_effects(np.ones((2, 3)))
    assert found["variance"] == 0
    assert not np.concatenate([found[name] for name in ("first", "total", "shapley")]).any()
    for grid, text in ((1.0, r"1 to 12 dimensions and a value, got shape \(\)"), (np.ones((2, 0)), r"got shape \(2, 0\)"),
                       (np.ones((1,) * 13), "1 to 12 dimensions"), ([1, NAN], "values_grid must be finite, got nan")):
        with pytest.raises(ValueError, match=text):
            shapley_effects(grid)


def test_walsh_effects_are_differences_of_log_means():
    table = effects(Y400, FULL, SAS400, n_boot=50)
    logs = np.log(Y400.mean(axis=0))
    assert table.terms[:6] == ["mas", *FIVE]
    assert table.terms[6] == "topology:role"
    assert (len(table.terms), table.unit, table.method, table.aliases) == (16, "log Γ", "walsh", {})
    assert math.isclose(table.estimate[0], logs.mean() - math.log(SAS400.mean()), abs_tol=1e-12)
    high = FULL.X > 0
    for i, name in enumerate(FIVE):
        expected = logs[high[:, i]].mean() - logs[~high[:, i]].mean()
        assert math.isclose(table.estimate[table.terms.index(name)], expected, abs_tol=1e-12)
        for j in range(i):
            changes = [logs[high[:, i] & side].mean() - logs[~high[:, i] & side].mean() for side in (high[:, j], ~high[:, j])]
            at = table.terms.index(f"{FIVE[j]}:{name}")
            assert math.isclose(table.estimate[at], changes[0] - changes[1], abs_tol=1e-12)


def test_the_bootstrap_draws_whole_tasks():
    table = effects(Y400, FULL, n_boot=60, seed=4)
    counts = resample_counts(400, 60, 4)
    draws = []
    for row in counts:
        logs = np.log(np.repeat(Y400, row, axis=0).mean(axis=0))
        draws.append([logs[FULL.X[:, i] > 0].mean() - logs[FULL.X[:, i] < 0].mean() for i in range(5)])
    assert np.allclose(table.ci[:5], np.quantile(draws, [0.025, 0.975], axis=0).T, atol=1e-12)


def test_bands_hold_all_intervals_and_follow_max_t():
    table = effects(Y400, FULL, n_boot=500, level=0.9)
    width, band = np.diff(table.ci, axis=1)[:, 0], np.diff(table.band, axis=1)[:, 0]
    assert (band > 1.3 * width).all()
    assert np.allclose(table.band.mean(axis=1), table.estimate, atol=1e-12)
    single = effects(Y400[:, :2], full_factorial(["a"]), n_boot=4000, level=0.9)
    assert math.isclose(np.diff(single.band)[0, 0], np.diff(single.ci)[0, 0], rel_tol=0.06)


def test_a_saturated_poisson_regression_gives_the_same_effects():
    design = full_factorial(["a", "b"])
    Y, sas = Y400[:, :4], SAS400
    by_hand, gee = effects(Y, design, sas, n_boot=4000), effects(Y, design, sas, "gee")
    assert by_hand.terms == gee.terms == ["mas", "a", "b", "a:b"]
    assert np.allclose(by_hand.estimate, gee.estimate, atol=1e-7)
    assert np.allclose(by_hand.ci, gee.ci, atol=0.03)
    assert gee.unit == "log Γ"


def test_regressions_are_those_of_statsmodels_by_formula():
    import pandas as pd

    design, Y = full_factorial(["a", "b"]), Y400[:100, :4]
    rows = [(t, x[0] / 2, x[1] / 2, y) for t, scores in enumerate(Y) for x, y in zip(design.X, scores, strict=True)]
    frame = pd.DataFrame(rows, columns=["task", "a", "b", "y"])
    gee = smf.gee("y ~ a * b", "task", frame, family=sm.families.Poisson()).fit()
    found = effects(Y, design, method="gee")
    assert np.allclose(found.estimate, gee.params[1:], atol=1e-8)
    assert np.allclose(found.ci, gee.conf_int().to_numpy()[1:], atol=1e-7)
    mixed = smf.mixedlm("y ~ a * b", frame, groups="task").fit()
    found = effects(Y, design, method="mixed")
    assert np.allclose(found.estimate, mixed.fe_params[1:], atol=1e-6)
    assert np.allclose(found.ci, mixed.conf_int().to_numpy()[1:4], atol=1e-5)
    assert (found.unit, found.method) == ("score", "mixed")


def test_the_mixed_model_is_finite_when_tasks_do_not_differ():
    rng = np.random.default_rng(0)
    Y = np.stack([rng.permuted([0.0, 0.2, 0.4, 0.6]) for _ in range(20)])
    found = effects(Y, full_factorial(["a", "b"]), method="mixed")
    residual = Y - Y.mean(axis=0)
    se = math.sqrt(np.square(residual).sum() / (20 * 4 - 4) / 20)
    assert np.allclose(np.diff(found.ci, axis=1)[:2, 0], 2 * 1.959964 * se, atol=1e-7)


def test_the_mixed_model_with_a_single_agent_is_that_of_statsmodels():
    Y, sas, design = Y400[:40, :4], SAS400[:40], full_factorial(["a", "b"])
    cells = np.column_stack([np.ones(5), [1, 1, 1, 1, 0], *(np.append(x, 0) for x in (design.X / 2).T),
                             np.append(design.X.prod(axis=1) / 4, 0)])
    y = np.column_stack([Y, sas])
    peer = sm.MixedLM(y.ravel(), np.tile(cells, (40, 1)), groups=np.repeat(np.arange(40), 5)).fit()
    found = effects(Y, design, sas, "mixed")
    assert np.allclose(found.estimate, peer.params[1:5], atol=1e-6)
    assert np.allclose(found.ci, peer.conf_int()[1:5], atol=1e-4)


@pytest.mark.parametrize("method", ["gee", "mixed"])
def test_bands_of_regressions_hold_all_terms_and_equal_the_interval_of_a_single_one(method):
    single = effects(Y400[:100, :2], full_factorial(["a"]), method=method, n_boot=20_000)
    assert math.isclose(np.diff(single.band)[0, 0], np.diff(single.ci)[0, 0], rel_tol=0.03)
    several = effects(Y400[:100, :4], full_factorial(["a", "b"]), method=method, n_boot=20_000)
    wider = np.diff(several.band, axis=1) / np.diff(several.ci, axis=1)
    assert np.allclose(wider, wider[0])
    assert 1.1 < wider[0, 0] < 1.25  # 2.39 / 1.96 for three independent terms


def test_only_pairs_that_can_be_told_from_factors_are_listed():
    design = fractional_factorial(list("pqrst"), ["a", "b", "c", "ab", "ac"])
    Y = Y400[:60, :8]
    table = effects(Y, design, n_boot=20)
    assert table.terms == ["p", "q", "r", "s", "t", "q:r", "q:t"]
    assert table.aliases["p"] == ["q:s", "r:t"]
    assert table.aliases["q:r"] == ["s:t"]
    assert "q:s = r:t" in table.to_frame().loc["p", "aliases"]
    for method in ("gee", "mixed"):
        assert effects(Y, design, method=method).terms == table.terms


def test_a_frame_has_one_row_a_term():
    frame = effects(Y400, FULL, n_boot=20).to_frame()
    assert list(frame.columns) == ["estimate", "lo", "hi", "band_lo", "band_hi", "times", "aliases"]
    assert np.allclose(frame["times"], np.exp(frame["estimate"]))
    assert "times" not in effects(Y400[:50, :4], full_factorial(["a", "b"]), method="mixed").to_frame()


def test_a_resample_without_any_success_counts_half_a_success():
    Y = np.zeros((6, 2))
    Y[0, 0] = Y[:, 1] = 1
    Y[1, 1] = 0.25
    table = effects(Y, full_factorial(["a"]), n_boot=400, seed=1)
    draws = []
    for row in resample_counts(6, 400, 1):
        low, high = row @ Y
        draws.append(math.log(high) - math.log(low or 0.5))
    assert any(row[0] == 0 for row in resample_counts(6, 400, 1))
    assert np.allclose(table.ci[0], np.quantile(draws, [0.025, 0.975]), atol=1e-12)


def test_values_of_a_full_factorial_are_the_shapley_values_of_log_means():
    found = attribute(Y400, SAS400, FULL, n_boot=100)
    logs = np.log(Y400.mean(axis=0))
    assert np.allclose(found.shapley, shapley(logs), atol=1e-13)
    assert math.isclose(found.shapley.sum(), logs[-1] - logs[0], abs_tol=1e-12)
    assert math.isclose(found.efficiency_gap, banzhaf(logs).sum() - (logs[-1] - logs[0]), abs_tol=1e-12)
    odd = [T for T in range(32) if T.bit_count() in (3, 5)]
    assert math.isclose(found.efficiency_gap, -2 * walsh(logs)[odd].sum(), abs_tol=1e-12)
    assert not found.bias_factor.any()
    assert found.aliases == {}
    assert found.names == FIVE
    assert found.effects.terms[0] == "mas"


def test_intervals_of_values_come_from_the_resampled_tasks():
    found = attribute(Y400, SAS400, FULL, n_boot=60, seed=2, level=0.8)
    draws = [shapley(np.log(np.repeat(Y400, row, axis=0).mean(axis=0))) for row in resample_counts(400, 60, 2)]
    assert np.allclose(found.ci, np.quantile(draws, [0.1, 0.9], axis=0).T, atol=1e-12)
    se = np.std(draws, axis=0, ddof=1)
    half = np.quantile(np.max(np.abs(draws - found.shapley) / se, axis=1), 0.8) * se
    assert np.allclose(found.band, np.stack([found.shapley - half, found.shapley + half], axis=1), atol=1e-12)


def test_the_single_agent_only_shifts():
    first, second = attribute(Y400, SAS400, FULL, n_boot=50), attribute(Y400, 1 - SAS400, FULL, n_boot=50)
    assert np.array_equal(first.shapley, second.shapley)
    assert np.array_equal(first.ci, second.ci)
    assert first.effects.estimate[0] != second.effects.estimate[0]
    assert np.array_equal(first.effects.estimate[1:], second.effects.estimate[1:])


def test_the_order_of_the_runs_belongs_to_the_design():
    reverse = fractional_factorial(FIVE, ["-a", "-b", "-c", "-d", "-e"])
    assert np.array_equal(reverse.X, FULL.X[::-1])
    found = attribute(Y400[:, ::-1], SAS400, reverse, n_boot=20)
    assert np.allclose(found.shapley, attribute(Y400, SAS400, FULL, n_boot=20).shapley, atol=1e-13)
    assert np.allclose(found.efficiency_gap, attribute(Y400, SAS400, FULL, n_boot=20).efficiency_gap, atol=1e-13)


def test_planted_values_lie_in_their_intervals_and_classes_are_right():
    Y, sas = planted(FULL, 20_000, 7)
    found = attribute(Y, sas, FULL, n_boot=200)
    assert np.abs(found.shapley - TRUTH).max() < 0.02
    assert ((found.band[:, 0] <= TRUTH) & (found.band[:, 1] >= TRUTH)).all()
    assert found.classes == {"topology": "I", "role": "I", "scale": "II", "protocol": "II", "diversity": "I"}
    few = attribute(*planted(FULL, 60, 3), FULL, n_boot=200)
    assert few.classes["scale"] == "undetermined"


@pytest.mark.parametrize(("lo", "hi", "name"), [
    (0.001, 0.01, "I"), (-0.2, -0.1, "II"), (-0.019, 0.019, "II"), (-0.0199, 0.0199, "undetermined"),
    (-0.1, 0.0, "undetermined"), (0.0, 0.03, "undetermined"), (0.0, 0.01, "II"), (1e-17, 0.03, "undetermined"),
    (-0.1, -1e-17, "undetermined"), (1e-17, 0.01, "II"),
])
def test_classes_follow_the_interval(lo, hi, name):
    assert module._class(lo, hi, True) == module._class(lo, hi, False) == name


@pytest.mark.parametrize(("value", "name"), [(0.0, "II"), (1e-17, "II"), (0.5, "I"), (-0.5, "II")])
def test_an_interval_without_width_needs_scores_that_vary(value, name):
    assert module._class(value, value, True) == name
    assert module._class(value, value, False) == "undetermined"


def test_a_factor_that_changes_no_score_is_useless_whatever_the_rounding():
    design, rows = full_factorial(list("abcd")), np.arange(16)
    for seed, i in itertools.product(range(20), range(4)):
        Y = (np.random.default_rng(seed).random((60, 16)) < 0.6).astype(float)[:, rows & ~(1 << i)]
        assert attribute(Y, np.ones(60), design, n_boot=200).classes["abcd"[i]] == "II"


def test_scores_that_do_not_vary_prove_nothing():
    names = ["a", "b"]
    for Y in (np.ones((2, 4)), np.tile([0.5, 1.0, 0.5, 1.0], (9, 1)), np.array([[1, 1, 1, 1]] * 4 + [[1, 1, 0, 0.0]])):
        assert attribute(Y, np.ones(len(Y)), full_factorial(names), n_boot=50).classes["a"] == "undetermined"
    doubled = np.random.default_rng(0).uniform(0.1, 0.5, (30, 1)) * [1, 2]
    assert attribute(doubled, np.ones(30), full_factorial(["a"]), n_boot=50).classes == {"a": "I"}


def test_few_tasks_near_a_score_of_one_do_not_make_a_helpful_factor_useless():
    rng, found = np.random.default_rng(0), []
    for seed in range(150):
        Y = (rng.random((8, 2)) < [0.9, 0.99]).astype(float)
        found.append(attribute(Y, np.ones(8), full_factorial(["a"]), n_boot=100, seed=seed).classes["a"])
    assert found.count("II") <= 1


def test_half_the_runs_give_exact_values_of_a_world_with_pairs():
    half = fractional_factorial(FIVE, ["a", "b", "c", "d", "abcd"])
    scores = np.repeat(np.exp(world((half.X + 1) // 2))[None], 3, axis=0)
    found = attribute(scores, [1.0, 0.5, 0.25], half, n_boot=10)
    assert np.allclose(found.shapley, TRUTH, atol=1e-12)
    assert math.isnan(found.efficiency_gap)
    assert found.aliases == {}
    third = fractional_factorial(FIVE, ["a", "b", "ab", "c", "ac"])
    assert attribute(Y400[:, :8], SAS400, third, n_boot=10).aliases["topology"] == ["role:scale", "protocol:diversity"]


@pytest.mark.parametrize("generators", [["a", "b", "c", "abc"], ["a", "b", "c", "-abc"], ["a", "b", "-ab", "c", "ac"],
                                        ["a", "b", "c", "d", "-abcd"], ["a", "b", "c", "d", "abcd"],
                                        ["a", "b", "c", "d", "-abc"], ["a", "b", "ab"]])
def test_the_error_of_a_fraction_stays_within_its_bound_which_is_attained(generators):
    names = [f"f{i}" for i in range(len(generators))]
    design, k = fractional_factorial(names, generators), len(generators)
    found = module._bias_factors(design)
    runs = (design.X > 0) @ (1 << np.arange(k))
    signs = np.array([[math.prod(1 if S >> i & 1 else -1 for i in range(k) if T >> i & 1) for T in range(2**k)]
                      for S in range(2**k)])
    errors = [module._shapley_rows(design) @ signs[runs, T] - shapley(signs[:, T].astype(float))
              for T in range(2**k) if T.bit_count() > 1]
    assert np.allclose(found, np.max(np.abs(errors), axis=0), atol=1e-12)


def test_scores_are_left_as_they_are():
    Y, sas = Y400[:30, :4].copy(), SAS400[:30].copy()
    design = full_factorial(["a", "b"])
    attribute(Y, sas, design, n_boot=10)
    for method in ("walsh", "gee", "mixed"):
        effects(Y, design, sas, method, n_boot=10)
    assert np.array_equal(Y, Y400[:30, :4])
    assert np.array_equal(sas, SAS400[:30])


DESIGN = full_factorial(["a", "b"])
FINE = Y400[:30, :4]


@pytest.mark.parametrize(("change", "text"), [
    ({"Y": FINE[:, :3]}, "Y has shape (30, 3), the design has 4 runs: Y must be (tasks, runs)"),
    ({"Y": FINE[:, 0]}, "Y has shape (30,), the design has 4 runs"),
    ({"Y": FINE[:1], "sas": [1.0]}, "Y must have at least 2 tasks, got 1"),
    ({"sas": SAS400[:28]}, "Y has 30 tasks, sas has 28 tasks: scores must be paired by task"),
    ({"sas": FINE}, "Y has 30 tasks, sas has shape (30, 4): scores must be paired by task"),
    ({"Y": FINE * 2}, "scores must be finite and in [0, 1], got 2.0"),
    ({"Y": np.where(FINE == 1, NAN, FINE)}, "scores must be finite and in [0, 1], got nan"),
    ({"sas": SAS400[:30] - 0.5}, "scores must be finite and in [0, 1], got -0.5"),
    ({"sas": np.zeros(30)}, "single-agent score is zero: Γ is undefined; use delta"),
    ({"Y": FINE * [1, 1, 0, 1]}, "run 2 of Y has score zero: its log Γ is undefined"),
    ({"design": full_factorial({"a": 2, "b": 2})},
     "effects need levels -1 and +1, got [0, 1]: make the design from a list of names"),
    ({"design": fractional_factorial(list("abc"), ["a", "b", "-b"])},
     "factors 'b' and 'c' change together: their effects can't be told apart"),
    ({"level": 1.0}, "level must be in (0, 1), got 1.0"),
    ({"n_boot": 1}, "n_boot must be >= 2, got 1"),
    ({"seed": -1}, "seed must be >= 0, got -1"),
])
def test_bad_scores_and_options_are_refused(change, text):
    given_ = {"Y": FINE, "sas": SAS400[:30], "design": DESIGN} | change
    for f in (attribute, effects):
        with pytest.raises(ValueError) as caught:
            f(**given_)
        assert text in str(caught.value)


def test_unknown_methods_and_factors_are_refused():
    with pytest.raises(ValueError, match="method must be 'walsh', 'gee' or 'mixed', got 'ols'"):
        effects(FINE, DESIGN, method="ols")
    with pytest.raises(ValueError, match="n_boot must be >= 2, got 0"):
        effects(FINE, DESIGN, method="gee", n_boot=0)
    with pytest.raises(KeyError, match="no factor 'c' in the design; it has a, b"):
        plot_interactions(FINE, DESIGN, "a", "c")


def test_the_figures_show_the_numbers():
    _, ax = matplotlib.pyplot.subplots()
    found = attribute(Y400, SAS400, FULL, n_boot=50)
    assert plot_shapley(found, ax) is ax
    points = {tuple(p) for line in ax.lines if line.get_marker() == "o" for p in line.get_xydata()}
    assert {(v, float(4 - i)) for i, v in enumerate(found.shapley)} == points
    assert [t.get_text() for t in ax.get_yticklabels()] == FIVE
    _, ax = matplotlib.pyplot.subplots()
    assert plot_interactions(Y400, FULL, "role", "scale", n_boot=50, ax=ax) is ax
    logs = np.log(Y400.mean(axis=0))
    for line, side in zip([c[0] for c in ax.containers], (-1, 1), strict=True):
        expected = [np.exp(logs[(FULL.X[:, 1] == x) & (FULL.X[:, 2] == side)].mean()) for x in (-1, 1)]
        assert np.allclose(line.get_ydata(), expected, atol=1e-12)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["scale low", "scale high"]
    matplotlib.pyplot.close("all")


# --- a hundred thousand resamples ------------------------------------------------------------------------------------


def poisson_cuts(rate):
    """Words below which a count is 0, 1, …, for a mean of our choice."""
    law = [math.exp(-rate) * rate**k / math.factorial(k) for k in range(12)]
    return np.array([2**32 - 1 - round((1 - sum(law[: k + 1])) * 2**32) for k in range(11)], dtype=np.uint32)


@quickly
@given(st.integers(1, 300), st.integers(1, 30), st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_resamples_have_the_size_of_the_sample_and_depend_on_their_number_alone(n, rows, seed, first):
    counts = module._counts_numpy(n, rows, seed, first)
    assert counts.shape == (rows, n) and counts.min() >= 0
    assert (counts.sum(axis=1, dtype=int) == n).all()
    assert np.array_equal(module._counts_numpy(n, 1, seed, first + rows - 1), counts[-1:])


def test_cuts_are_the_law_of_poisson_numbers():
    from scipy.stats import poisson

    above = poisson.sf(np.arange(len(module._cuts(10_000))), 0.96) * 2**32
    assert np.abs(2**32 - 1 - module._cuts(10_000).astype(float) - above).max() <= 0.5 + 1e-6
    assert [len(module._cuts(n)) for n in (1, 16, 10_000, 10**8)] == [0, 0, 12, 12]


@pytest.mark.parametrize("rate", [None, 0.2, 1.0])
def test_counts_have_the_law_of_single_draws(monkeypatch, rate):
    if rate is not None:
        monkeypatch.setattr(module, "_cuts", lambda n: poisson_cuts(rate))
    counts = module._counts_numpy(3, 40_000, 7).astype(int)
    found = np.bincount(counts @ [16, 4, 1], minlength=64) / len(counts)
    assert (counts.sum(axis=1) == 3).all()
    for k in itertools.product(range(4), repeat=3):
        p = 6 / math.prod(map(math.factorial, k)) / 27 if sum(k) == 3 else 0.0
        assert abs(found[np.dot(k, [16, 4, 1])] - p) < 5 * math.sqrt(p / len(counts)) + 1e-12


def test_counts_of_many_tasks_have_the_moments_of_multinomial_ones():
    n, rows = 400, 2000
    counts = module._counts_numpy(n, rows, 1).astype(float)
    assert np.abs(counts.mean(axis=0) - 1).max() < 5 / math.sqrt(rows)
    assert abs(counts.var(axis=0).mean() - (1 - 1 / n)) < 5 * math.sqrt(2 / (n * rows)) * 1.3
    pairs = (counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)).mean() / (n * (n - 1))  # E K_i K_j = 1 - 1/n
    assert abs(pairs - (1 - 1 / n)) < 1e-4
    shares = [(counts == k).mean() for k in range(5)]
    assert np.allclose(shares, [math.comb(n, k) * (1 / n) ** k * (1 - 1 / n) ** (n - k) for k in range(5)], atol=2e-3)


def test_resampled_sums_are_products_and_spread_like_the_usual_bootstrap():
    Y = np.random.default_rng(0).random((60, 5))
    sums = resampled_sums(Y, 3000, 4)
    assert np.allclose(sums, module._counts_numpy(60, 3000, 4) @ Y)
    usual = resample_counts(60, 3000, 4) @ Y
    assert np.allclose(sums.std(axis=0), usual.std(axis=0), rtol=0.1)
    assert np.allclose(resampled_sums(Y, 7, 4), sums[:7]) and not np.allclose(resampled_sums(Y, 7, 5), sums[:7])
    parts = pytest.MonkeyPatch()
    with parts.context() as patch:
        patch.setattr(module, "_counts_numpy", lambda n, rows, seed, first: np.full((rows, n), first))
        assert resampled_sums(np.ones((2**21, 1)), 3)[:, 0].tolist() == [0, 2**21, 2**22]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float32, torch.float64])
def test_a_tensor_gets_the_sums_of_an_array(dtype):
    Y = (torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.5).to(dtype)
    before = Y.clone()
    found = resampled_sums(Y, 20, 1)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float64
    assert np.array_equal(found.numpy(), resampled_sums(Y.numpy(), 20, 1)) and torch.equal(Y, before)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"Y": [1.0, 0.0]}, ValueError, r"Y must be a table \(tasks, runs\), got shape \(2,\)"),
    ({"Y": np.ones((0, 3))}, ValueError, r"Y must be a table \(tasks, runs\), got shape \(0, 3\)"),
    ({"Y": torch.ones(2, 2, 2)}, ValueError, r"Y must be a table \(tasks, runs\), got shape \(2, 2, 2\)"),
    ({"Y": [[1.0, NAN]]}, ValueError, "Y must be finite, got nan"),
    ({"Y": torch.tensor([[1.0, INF]])}, ValueError, "Y must be finite, got inf"),
    ({"n_boot": 0}, ValueError, "n_boot must be >= 1, got 0"),
    ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
    ({"seed": 2**63}, ValueError, r"seed must be below 2\*\*63, got 9223372036854775808"),
    ({"n_boot": 2.5}, TypeError, "n_boot must be an integer, got 2.5"),
])
def test_wrong_resamples_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        resampled_sums(**({"Y": [[1.0, 0.0]], "n_boot": 5} | change))


def triton_device():
    """Where the kernel can run: a GPU, the processor by Triton's interpreter, or nowhere."""
    if importlib.util.find_spec("triton") is None:
        return None
    return "cuda" if torch.cuda.is_available() else "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


needs_triton = pytest.mark.skipif(
    triton_device() is None, reason="the kernel needs the package triton, and either a GPU or TRITON_INTERPRET=1")


@pytest.fixture
def _index_of_arrays(monkeypatch):
    """Triton 3.6's interpreter takes int() of an array with one entry, which numpy refuses from 2.4 on."""
    if triton_device() == "cpu":
        from triton.runtime import interpreter
        patch = interpreter._patch_lang_tensor

        def repaired(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", repaired)


@needs_triton
@pytest.mark.parametrize(("n", "rows", "rate"), [(1, 2, None), (17, 5, None), (130, 5, None), (300, 3, None), (40, 9, 1.0),
                                                 (40, 4, 0.1)])
@pytest.mark.usefixtures("_index_of_arrays")
def test_the_kernel_draws_what_arrays_draw(monkeypatch, n, rows, rate):
    if rate is not None:  # 1.0: half of the resamples are drawn again; 0.1: several blocks of single draws
        monkeypatch.setattr(module, "_cuts", lambda n: poisson_cuts(rate))
    seed = 9 + 2**35
    found = module._counts_triton(n, rows, seed, triton_device(), first=11, block=32).cpu().numpy()
    assert np.array_equal(found[:, :n], module._counts_numpy(n, rows, seed, 11)) and not found[:, n:].any()


@needs_triton
@pytest.mark.usefixtures("_index_of_arrays")
def test_sums_by_the_kernel_are_those_of_arrays():
    Y = torch.rand(21, 3, generator=torch.Generator().manual_seed(0))
    for table in ((3 * Y).floor(), Y):
        found = module._sums_torch(table.to(triton_device()), 33, 5, most=1).cpu().numpy()
        assert found.dtype == np.float64
        wanted = resampled_sums(table.numpy(), 33, 5)
        assert np.allclose(found, wanted, atol=1e-12) if table is Y else np.array_equal(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available() or triton_device() is None, reason="needs a GPU and the package triton")
def test_a_gpu_gives_the_same_sums():
    Y = torch.rand(1000, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    assert np.array_equal(resampled_sums(Y.cuda(), 500).cpu().numpy(), resampled_sums(Y.numpy(), 500))


def test_the_measurement_has_a_row_and_knows_its_devices(monkeypatch):
    monkeypatch.setattr(module, "shapley", lambda v: v[:1])
    monkeypatch.setattr(module, "resampled_sums", lambda Y, n_boot: Y[:1])
    rows = measure("cpu")
    assert [row["name"] for row in rows] == ["shapley_k20", "bootstrap_256x1000x1000"]
    assert all(row["unit"] == "ms" and 0 <= row["low"] <= row["measured"] <= row["high"] for row in rows)
    assert rows[1]["peer"] > rows[1]["peer_product"] > 0
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")


def test_the_check_of_the_measurement_counts_what_differs():
    table = (torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    counts = torch.nn.functional.pad(torch.from_numpy(module._counts_numpy(50, 120, 0)), (0, 78))
    sums = counts[:, :50].double() @ table.double()
    assert module._differing(counts, sums, table, rows=50) == 0
    sums[110, 2] += 1
    assert module._differing(counts, sums, table, rows=50) == 1
    counts[3, 7] += 1
    assert module._differing(counts, sums, table, rows=50) >= 3
