"""Budgets: hull marginals, certificate, nestedness, exact and linear solvers, curves, rounding, baselines."""
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from collai.lukv import allocate as module
from collai.lukv.allocate import (
    AllocationResult,
    allocate,
    baseline_budgets,
    budget_curve,
    convex_marginals,
    measure,
    round_budgets,
)

QUICK = settings(deadline=None, derandomize=True, max_examples=40)
KINDS = ("uniform", "heavy", "tied", "empty", "float32", "plateau", "sorted", "reversed", "tiny")


def utilities(kind, h, t, seed):
    """Ranked utilities of one kind."""
    rng = np.random.default_rng(seed)
    x = rng.random((h, t))
    return {"uniform": x, "heavy": rng.pareto(0.7, (h, t)), "tied": rng.integers(0, 3, (h, t)).astype(float),
            "empty": x * (rng.random((h, 1)) < 0.5), "float32": x.astype(np.float32), "plateau": np.round(x, 1),
            "sorted": -np.sort(-x, axis=1), "reversed": np.sort(x, axis=1), "tiny": x * 1e-200}[kind]


INSTANCES = st.builds(utilities, st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))


def curve(x):
    """Loss of one head by number of kept entries, in exact order of summation from the end."""
    return [*np.cumsum(x[::-1].astype(float))[::-1].tolist(), 0.0]


def optimum(u, total, low):
    """Least loss over all integer budgets, by enumeration head after head."""
    best = {0: 0.0}
    for x, a in zip(u, low, strict=True):
        losses, new = curve(x), {}
        for used, value in best.items():
            for b in range(a, len(x) + 1):
                new[used + b] = min(new.get(used + b, np.inf), value + losses[b])
        best = new
    return best[total]


def with_peak(call):
    """Result of a call and the most bytes it held at once."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def scale(u):
    """Size of rounding errors."""
    return 1e-11 * max(float(u.sum(dtype=float)), 1e-300)


# --- marginals -----------------------------------------------------------------------------------

@QUICK
@given(INSTANCES)
def test_marginals_are_the_slopes_of_the_concave_majorant(u):
    for x, m in zip(u.astype(float), convex_marginals(u), strict=True):
        for r in range(len(x)):  # min-max formula of isotonic regression
            means = [max(x[a:b + 1].mean() for b in range(r, len(x))) for a in range(r + 1)]
            assert abs(m[r] - min(means)) <= scale(u)
        assert (np.diff(m) <= 0).all() and abs(m.sum() - x.sum()) <= scale(u)


def test_marginals_are_float64_of_the_shape_given_and_leave_the_input_alone():
    for dtype in (np.float32, np.float64, np.int64, np.float16):
        u = np.array([[1, 3, 2], [0, 0, 5]], dtype)
        kept = u.copy()
        m = convex_marginals(u)
        assert m.dtype == np.float64 and m.tolist() == [[2, 2, 2], [5 / 3] * 3]
        assert np.array_equal(u, kept) and u.dtype == kept.dtype


@pytest.mark.parametrize("bad", [[[1.0, -1e-300]], [[np.nan, 1.0]], [[1.0, np.inf]], [[1e308, 1e308]], [[-np.inf, 0.0]]])
def test_utilities_without_meaning_are_refused(bad):
    for call in (convex_marginals, lambda u: allocate(u, 1), lambda u: budget_curve(u, 1, 1)):
        with pytest.raises(ValueError, match="^utility must be finite and non-negative"):
            call(np.array(bad))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (1, 2, 3)])
def test_utilities_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"u_ranked must be \(H, T\) and not empty, got shape"):
        allocate(np.ones(shape), 1)


# --- allocation ----------------------------------------------------------------------------------

@QUICK
@given(INSTANCES, st.integers(0, 10**6))
def test_the_certificate_holds_for_every_total(u, seed):
    low = np.random.default_rng(seed).integers(0, u.shape[1] + 1, len(u))
    totals, eps = np.arange(low.sum(), u.size + 1), scale(u)
    ours = allocate(u, totals, floor=low)
    best = np.array([optimum(u, total, low) for total in totals])
    losses = [curve(x) for x in u]
    assert np.allclose(ours.loss, [sum(c[b] for c, b in zip(losses, row, strict=True)) for row in ours.budgets], rtol=0, atol=eps)
    assert (ours.budgets.sum(axis=1) == totals).all() and (ours.budgets >= low).all() and (ours.budgets <= u.shape[1]).all()
    assert (ours.lower_bound <= best + eps).all() and (best <= ours.loss + eps).all()
    assert (ours.loss >= ours.lower_bound).all() and (ours.loss <= ours.lower_bound + ours.gap_bound + eps).all()
    assert np.allclose(ours.loss[ours.gap_bound == 0], best[ours.gap_bound == 0], rtol=0, atol=eps)
    assert (np.diff(ours.budgets, axis=0) >= 0).all()
    assert np.allclose(-np.diff(ours.lower_bound), ours.shadow_price[:-1], rtol=0, atol=eps)
    assert ours.shadow_price[-1] == 0 and ours.loss[-1] == 0 and ours.lower_bound[-1] == 0


@QUICK
@given(INSTANCES, st.integers(0, 10**6))
def test_the_gap_bound_is_the_taken_part_of_one_segment(u, seed):
    total = int(np.random.default_rng(seed).integers(0, u.size + 1))
    found, m = allocate(u, total), convex_marginals(u)
    cut = []
    for row, b in zip(m, found.budgets[0], strict=True):
        if 0 < b < len(row) and row[b - 1] == row[b]:
            cut.append(row[b] * (b - int(np.flatnonzero(row == row[b])[0])))
    assert len(cut) <= 1 and np.isclose(found.gap_bound[0], sum(cut), rtol=1e-12, atol=0)


@QUICK
@given(INSTANCES, st.integers(0, 10**6))
def test_dynamic_programming_finds_the_optimum(u, seed):
    low = np.random.default_rng(seed).integers(0, u.shape[1] + 1, len(u))
    totals = list(range(int(low.sum()), u.size + 1))
    exact, hull = (allocate(u, totals, floor=low, method=m) for m in ("exact", "hull"))
    assert np.allclose(exact.loss, [optimum(u, total, low) for total in totals], rtol=0, atol=scale(u))
    assert (exact.budgets.sum(axis=1) == totals).all() and (exact.budgets >= low).all()
    assert not exact.gap_bound.any()
    assert np.array_equal(exact.lower_bound, hull.lower_bound) and np.array_equal(exact.shadow_price, hull.shadow_price)


def test_dynamic_programming_in_several_blocks():
    u = utilities("heavy", 2, 2000, 3)
    totals = [700, 2500, 4000]
    found, peak = with_peak(lambda: allocate(u, totals, method="exact"))
    assert peak < 24e6  # all 4001 x 2001 sums at once are 64e6 bytes
    hull, losses = allocate(u, totals), [curve(x) for x in u]
    for total, loss in zip(totals, found.loss, strict=True):
        every = [losses[0][b] + losses[1][total - b] for b in range(max(0, total - 2000), min(total, 2000) + 1)]
        assert np.isclose(loss, min(every), rtol=1e-12, atol=1e-9)
    assert (hull.lower_bound <= found.loss + 1e-9).all() and (hull.loss <= found.loss + hull.gap_bound + 1e-9).all()


@settings(deadline=None, derandomize=True, max_examples=8)
@given(INSTANCES, st.integers(0, 10**6))
def test_the_linear_program_has_the_value_of_the_hull(u, seed):
    low = np.random.default_rng(seed).integers(0, u.shape[1] + 1, len(u))
    totals = np.arange(low.sum(), u.size + 1)[:: 3]
    linear, hull = (allocate(u, totals, floor=low, method=m) for m in ("lp", "hull"))
    assert np.allclose(linear.lower_bound, hull.lower_bound, rtol=0, atol=1e-8 * max(1e-300, u.sum()))
    assert (linear.budgets.sum(axis=1) == totals).all() and (linear.budgets >= low).all()
    assert (linear.loss <= linear.lower_bound + linear.gap_bound + 1e-8 * max(1e-300, u.sum())).all()
    assert np.array_equal(linear.shadow_price, hull.shadow_price)


def test_the_lower_bound_is_the_value_of_another_linear_solver():
    u, low = utilities("heavy", 3, 7, 5), [1, 0, 2]
    kept = np.concatenate([np.arange(a, 8) for a in low])
    cost = np.concatenate([curve(x)[a:] for x, a in zip(u, low, strict=True)])
    rows = np.repeat(np.eye(3), [7, 8, 6], axis=1)
    for total in range(3, 22):
        peer = linprog(cost, A_eq=np.vstack([rows, kept]), b_eq=[1, 1, 1, total], method="highs")
        assert np.isclose(allocate(u, total, floor=low).lower_bound[0], peer.fun, rtol=1e-9, atol=1e-12)


def test_the_bound_is_attained():
    found = allocate(np.array([[1.0, 1, 1], [0, 0, 3]]), 2)
    assert found.budgets.tolist() == [[0, 2]] and found.loss[0] - 4 == found.gap_bound[0] == 2


def test_among_equal_slopes_the_lowest_head_gives_first():
    assert allocate(np.ones((3, 2)), [1, 3, 5]).budgets.tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]
    u = np.array([[2.0, 1], [1, 1], [2, 0]])
    assert allocate(u, [1, 2, 3, 4]).budgets.tolist() == [[0, 0, 1], [1, 0, 1], [1, 1, 1], [1, 2, 1]]


@QUICK
@given(INSTANCES)
def test_both_heaps_agree_to_the_last_tie(u):
    totals = list(range(u.size + 1))
    expected = allocate(u, totals).budgets
    assert np.array_equal(module._heap(u, totals), expected) and np.array_equal(module._plain_heap(u, totals), expected)


def test_rows_come_in_the_order_given():
    u = utilities("heavy", 4, 6, 1)
    order = [7, 0, 24, 7, 3]
    found = allocate(u, order)
    for row, total in enumerate(order):
        one = allocate(u, total)
        for name in ("budgets", "loss", "lower_bound", "gap_bound", "shadow_price"):
            assert np.allclose(getattr(found, name)[row], getattr(one, name)[0], rtol=1e-12)
    assert found.budgets.shape == (5, 4) and found.budgets.dtype == np.int64 and found.loss.dtype == np.float64
    none = allocate(u, [])
    assert none.budgets.shape == (0, 4) and none.loss.shape == (0,)


def test_every_integer_type_is_a_total_and_a_floor():
    u = utilities("uniform", 2, 5, 0)
    for total in (4, np.int32(4), np.array([4]), np.array(4), [np.uint8(4)], (4,)):
        assert allocate(u, total).budgets.tolist() == allocate(u, 4).budgets.tolist()
    for floor in (2, np.int64(2), [2, 2], np.array([2, 2], np.int16)):
        assert allocate(u, 4, floor=floor).budgets.tolist() == [[2, 2]]


def test_floors_keep_columns_of_no_value_and_count_in_the_loss():
    u = np.array([[0.0, 0, 5, 1], [9, 1, 1, 1]])
    found = allocate(u, 4, floor=[2, 1], method="hull")
    assert found.budgets.tolist() == [[3, 1]] and found.loss[0] == 4
    full = allocate(u, [8], floor=4)
    assert full.budgets.tolist() == [[4, 4]] and full.loss[0] == full.gap_bound[0] == full.shadow_price[0] == 0
    for method in ("exact", "lp"):
        assert allocate(u, 8, floor=4, method=method).budgets.tolist() == [[4, 4]]


def test_the_input_stays_as_it_was():
    u, totals, low = utilities("float32", 3, 6, 0), np.array([9, 6]), np.array([1, 0, 2])
    copies = u.copy(), totals.copy(), low.copy()
    for method in ("hull", "exact", "lp"):
        allocate(u, totals, floor=low, method=method)
        assert all(np.array_equal(x, y) for x, y in zip((u, totals, low), copies, strict=True))


@QUICK
@given(INSTANCES, st.sampled_from([-2, 1, 3]))
def test_a_unit_changes_no_budget(u, power):
    totals = list(range(u.size + 1))
    a, b = allocate(u, totals), allocate(u * np.float32(2.0**power), totals)
    assert np.array_equal(a.budgets, b.budgets) and np.allclose(a.loss * 2.0**power, b.loss, rtol=1e-12)


def test_small_losses_keep_their_digits():
    u = np.array([[1e12, 1e-6, 1e-6], [1e3, 1e-9, 0]])
    found = allocate(u, [4, 5, 6])
    assert found.budgets.tolist() == [[3, 1], [3, 2], [3, 3]] and found.loss.tolist() == [1e-9, 0, 0]


@pytest.mark.parametrize("x", [[0.1] * 3, [0.3] * 11, [0.7] * 16])
def test_no_rounding_puts_a_loss_below_its_bound(x):
    found = allocate(np.array([x]), range(len(x) + 1))
    assert (found.loss >= found.lower_bound).all() and np.allclose(found.loss, found.lower_bound, rtol=1e-14)


@pytest.mark.parametrize("budget", [13, -1, [3, 13], np.array([0, -1])])
def test_totals_out_of_reach_are_refused(budget):
    with pytest.raises(ValueError, match=r"^budget B=(13|-1) outside \[0, 12\]"):
        allocate(np.ones((3, 4)), budget)


def test_totals_below_the_floors_are_refused():
    with pytest.raises(ValueError, match=r"budget B=5 outside \[6, 12\]"):
        allocate(np.ones((3, 4)), 5, floor=2)
    with pytest.raises(ValueError, match=r"budget B=2 outside \[3, 12\]"):
        allocate(np.ones((3, 4)), 2, floor=[0, 3, 0])


@pytest.mark.parametrize("budget", [2.0, [1, 2.5], np.array([2.0]), True, "3", None])
def test_totals_that_are_no_integers_are_refused(budget):
    with pytest.raises(TypeError, match="^budget must be an integer number of entries"):
        allocate(np.ones((3, 4)), budget)


def test_other_bad_arguments_are_refused():
    u = np.ones((3, 4))
    for options, kind, text in (({"floor": 5}, ValueError, r"floor must be in \[0, 4\], got 5"),
                                ({"floor": -1}, ValueError, r"floor must be in \[0, 4\]"),
                                ({"floor": [1, 1]}, ValueError, r"floor must be an integer or \(3,\)"),
                                ({"floor": []}, ValueError, r"floor must be an integer or \(3,\)"),
                                ({"floor": 0.5}, TypeError, "floor must be an integer number of entries"),
                                ({"method": "greedy"}, ValueError, "method must be 'hull', 'exact' or 'lp', got 'greedy'")):
        with pytest.raises(kind, match=text):
            allocate(u, 3, **options)
    with pytest.raises(ValueError, match="or a sequence of them, got shape"):
        allocate(u, np.ones((2, 2), int))


def test_methods_say_what_is_too_large_for_them():
    with pytest.raises(ValueError, match="problem too large for method 'exact'"):
        allocate(np.ones((100, 1000)), 2001, method="exact")
    with pytest.raises(ValueError, match="problem too large for method 'lp'"):
        allocate(np.ones((3, 6667)), 5, method="lp")


def test_a_large_case_needs_little_memory():
    u = module._profile(64, 8192, 0, np.float32)
    totals = module._percent(u.size)
    found, peak = with_peak(lambda: allocate(u, totals))
    assert peak < u.nbytes / 2 and (found.budgets.sum(axis=1) == totals).all()
    assert (found.loss - found.lower_bound).max() <= 1e-3 * u.sum()


# --- curve ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize(("layers", "heads", "t"), [(1, 1, 40), (2, 3, 97), (2, 2, 800)])
def test_a_curve_has_the_right_mean_and_its_floors(layerwise, layers, heads, t):
    u = module._profile(layers * heads, t, 3)
    found = budget_curve(u, layers, heads, layerwise=layerwise)
    low, p = max(round(0.01 * t), 5), np.arange(1, 100)
    assert found.shape == (99, layers, heads) and found.dtype == np.float64
    free = p / 100 <= 1 - low / t
    mean = found.mean(axis=(1, 2))
    assert np.abs(mean - p / 100)[free].max() <= 1 / t and np.allclose(found[~free], 1 - low / t)
    assert (np.diff(found, axis=0) >= -1e-12).all() and found.min() >= 0 and found.max() <= 1 - low / t + 1e-12
    assert np.allclose(found * t, np.rint(found * t), atol=1e-9)
    if not layerwise:
        assert np.abs(found.mean(axis=2) - p[:, None] / 100)[free].max() <= 1 / t


def test_each_row_of_a_curve_is_one_allocation():
    u = module._profile(6, 200, 1)
    found = budget_curve(u, 2, 3, sink=6, window=2)
    for p in (1, 50, 80, 96):
        assert np.allclose(found[p - 1].ravel(), 1 - allocate(u, round((100 - p) * 12), floor=8).budgets[0] / 200)


def test_rows_above_the_threshold_are_uniform():
    u = module._profile(6, 200, 1)
    found = budget_curve(u, 2, 3, threshold=70)
    assert np.array_equal(found[:70], budget_curve(u, 2, 3)[:70])
    for p in range(71, 100):
        assert np.allclose(found[p - 1], min(p / 100, 1 - 5 / 200))
    assert np.allclose(budget_curve(u, 2, 3, threshold=0)[:97, 0, 0], np.arange(1, 98) / 100)


def test_a_short_context_is_kept_where_the_floor_says_so():
    assert not budget_curve(np.ones((2, 3)), 1, 2).any()
    assert not budget_curve(np.ones((2, 3)), 1, 2, threshold=50).any()


@pytest.mark.parametrize(("options", "kind", "text"), [
    ({"L": 2}, ValueError, r"u_ranked has 3 rows, not L \* Hkv = 2 \* 3"),
    ({"L": 0}, ValueError, r"L must be in \[1, inf\], got 0"),
    ({"Hkv": 1.5}, TypeError, "Hkv must be an integer, got 1.5"),
    ({"sink": -1}, ValueError, r"sink must be in \[0, inf\]"),
    ({"window": -1}, ValueError, r"window must be in \[0, inf\]"),
    ({"threshold": 100}, ValueError, r"threshold must be in \[0, 99\]"),
])
def test_bad_arguments_of_a_curve_are_refused(options, kind, text):
    with pytest.raises(kind, match=text):
        budget_curve(np.ones((3, 9)), **({"L": 1, "Hkv": 3} | options))


# --- rounding ------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 60), st.integers(0, 70), st.integers(0, 10**6))


@QUICK
@given(SHAPES)
def test_rounding_keeps_total_floor_and_cap(case):
    layers, heads, t, floor, seed = case
    rng = np.random.default_rng(seed)
    r = rng.random((layers, heads)) ** rng.integers(1, 4)
    r[rng.random(r.shape) < 0.2] = rng.integers(0, 2)
    low = min(t, max(1, floor))
    total = int(rng.integers(low * r.size, t * r.size + 1))
    b = round_budgets(r, t, total=total, floor=floor)
    assert b.sum() == total and b.min() >= low and b.max() <= t and b.dtype == np.int64 and b.shape == r.shape


@QUICK
@given(SHAPES)
def test_without_floors_in_the_way_it_is_the_largest_remainder_rule(case):
    layers, heads, t, _, seed = case
    r = np.random.default_rng(seed).uniform(0, 0.4, (layers, heads))
    if (1 - r.max()) * t < 1:
        return
    ideal = (1 - r.ravel()) * t
    whole = np.floor(ideal).astype(int)
    for i in np.argsort(-(ideal - whole), kind="stable")[:round(float(ideal.sum())) - whole.sum()]:
        whole[i] += 1
    assert round_budgets(r, t).ravel().tolist() == whole.tolist()


def test_more_value_never_means_less_room():
    r = np.linspace(0.9, 0.1, 12).reshape(3, 4)
    for total in (40, 333, 600, 1100):
        assert (np.diff(round_budgets(r, 100, total=total, floor=3).ravel()) >= 0).all()


def test_what_floors_add_is_taken_in_proportion_to_slack():
    b = round_budgets(np.array([[0.99, 0.5, 0.1]]), 100, floor=11, total=141)
    assert b.tolist() == [[11, 47, 83]]  # targets 1, 50, 90; excess 10 on slacks 39, 79


@pytest.mark.parametrize(("args", "options", "kind", "text"), [
    (([[0.99, 0.5]], 10), {"floor": 4}, ValueError, r"budget B=5 outside \[8, 20\]"),
    (([[0.5]], 10), {"total": 11}, ValueError, r"budget B=11 outside \[1, 10\]"),
    (([[0.5]], 10), {"total": 5.0}, TypeError, "budget must be an integer number of entries"),
    (([[0.5]], 10), {"floor": 1.5}, TypeError, "floor must be an integer"),
    (([[0.5, 1.1]], 10), {}, ValueError, "^not a prune-ratio curve: values outside"),
    (([[0.5, np.nan]], 10), {}, ValueError, "^not a prune-ratio curve: values outside"),
    (([0.5], 10), {}, ValueError, r"ratios must be \(L, Hkv\)"),
    (([[0.5]], 0), {}, ValueError, r"T must be in \[1, inf\]"),
    (([[0.5]], 2.5), {}, TypeError, "T must be an integer"),
    (([[0.5]], 10), {"rounding": "nearest"}, ValueError, "rounding must be 'global' or 'kvpress', got 'nearest'"),
])
def test_bad_arguments_of_rounding_are_refused(args, options, kind, text):
    with pytest.raises(kind, match=text):
        round_budgets(np.array(args[0]), args[1], **options)


def test_rounding_by_layer_drifts_and_ignores_total_and_floor():
    r = np.full((4, 2), 0.75)
    found = round_budgets(r, 9, rounding="kvpress", total=1, floor=9)
    assert found.tolist() == [[2, 2]] * 4 and round_budgets(r, 9).sum() == 18
    assert round_budgets(np.array([[1.0, 1.0, 0.0]]), 5, rounding="kvpress").tolist() == [[1, 1, 5]]


def test_rounding_by_layer_counts_in_float32():
    r = np.array([[0.03, 0.73]])  # 824.5 and 229.5 entries: float32 decides who gets the last one
    assert ((np.float32(1) - r.astype(np.float32)) * np.float32(850) % 1).argmax() == 0
    assert round_budgets(r, 850, rounding="kvpress").tolist() == [[825, 229]]


# --- baselines -----------------------------------------------------------------------------------

def test_adakv_keeps_the_best_of_a_layer_and_protects_every_head():
    scores = np.zeros((1, 2, 10))
    scores[0, 0] = np.arange(10) + 100
    assert baseline_budgets("adakv", scores, 1, 2, 10, 0.5).tolist() == [[9, 1]]
    assert baseline_budgets("adakv", scores, 1, 2, 10, 0.5, alpha=0).tolist() == [[10, 0]]
    assert baseline_budgets("adakv", scores, 1, 2, 10, 0.5, alpha=1).tolist() == [[5, 5]]
    scores[0, 1, [0, 1, 9]] = np.inf
    assert baseline_budgets("adakv", scores, 1, 2, 10, 0.5).tolist() == [[7, 3]]


def test_adakv_ties_go_to_the_lower_head():
    assert baseline_budgets("adakv", np.ones((1, 3, 4)), 1, 3, 4, 0.5, alpha=0).tolist() == [[4, 2, 0]]


def test_a_pyramid_falls_in_a_straight_line_and_stays_in_the_context():
    found = baseline_budgets("pyramid", None, 5, 2, 1000, 0.8)
    assert found[:, 0].tolist() == [390, 295, 200, 105, 10] and np.array_equal(found[:, 0], found[:, 1])
    steep = baseline_budgets("pyramid", None, 3, 1, 100, 0.3)
    assert steep[:, 0].tolist() == [100, 70, 40]
    assert baseline_budgets("pyramid", None, 4, 1, 100, 0.8, window=50)[:, 0].tolist() == [20] * 4
    assert baseline_budgets("pyramid", None, 3, 1, 10, 0.9).min() == 1


@pytest.mark.parametrize(("args", "options", "kind", "text"), [
    (("uniform", None, 1, 1, 9, 1.0), {}, ValueError, r"^ratio must be in \[0, 1\)"),
    (("uniform", None, 1, 1, 9, -0.1), {}, ValueError, r"^ratio must be in \[0, 1\)"),
    (("uniform", None, 1, 1, 9, float("nan")), {}, ValueError, r"^ratio must be in \[0, 1\)"),
    (("uniform", None, 1, 1, 0, 0.5), {}, ValueError, r"T must be in \[1, inf\]"),
    (("best", None, 1, 1, 9, 0.5), {}, ValueError, "kind must be one of uniform, adakv, pyramid; got 'best'"),
    (("adakv", None, 1, 1, 9, 0.5), {}, ValueError, r"scores must be \(L, Hkv, T\) = \(1, 1, 9\)"),
    (("adakv", np.full((1, 1, 9), np.nan), 1, 1, 9, 0.5), {}, ValueError, "without NaN"),
    (("adakv", np.ones((1, 1, 9)), 1, 1, 9, 0.5), {"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\]"),
    (("pyramid", None, 2, 1, 9, 0.5), {"beta": 0.9}, ValueError, r"beta must be in \[1, inf\]"),
    (("pyramid", None, 2, 1, 9, 0.5), {"window": -1}, ValueError, r"window must be in \[0, inf\]"),
    (("uniform", None, 2, 1, 9, 0.5), {"beta": 2}, TypeError, "uniform has no option 'beta'; it has none"),
    (("pyramid", None, 2, 1, 9, 0.5), {"alpha": 0.2}, TypeError, "pyramid has no option 'alpha'; it has beta, window"),
])
def test_bad_arguments_of_baselines_are_refused(args, options, kind, text):
    with pytest.raises(kind, match=text):
        baseline_budgets(*args, **options)


# --- measurement ---------------------------------------------------------------------------------

def test_the_measurement_gives_rows_that_can_be_stored(monkeypatch):
    small = module._measure_size
    monkeypatch.setattr(module, "_measure_size", lambda h, t, n, peer, ordered=False: small(2, 32, 2, peer, ordered))
    gaps = module._gap_row
    monkeypatch.setattr(module, "_gap_row", lambda n: gaps(n // 1000))
    rows = {row["name"]: row for row in json.loads(json.dumps(measure("cpu")))}
    assert {"allocate_2x32", "allocate_sorted_2x32", "allocate_speedup", "allocate_gap"} == rows.keys()
    speed, gap, ordered = rows["allocate_speedup"], rows["allocate_gap"], rows["allocate_sorted_2x32"]
    assert speed["ci"][0] <= speed["measured"] <= speed["ci"][1] and speed["unit"] == "ratio"
    assert 0 < gap["measured"] <= gap["bound"] and len(gap["above"]) == 101 and gap["above"][100] == 0
    assert ordered["segments"] == ordered["entries"] == 64 and ordered["measured"] > 0


def test_there_is_nothing_to_measure_on_a_gpu():
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        measure("cuda")


def test_neither_torch_nor_cvxpy_is_loaded():
    check = ("import sys; from collai.lukv.allocate import allocate; import numpy as np; allocate(np.ones((2, 3)), 2);"
             "sys.exit(bool({'torch', 'transformers', 'cvxpy'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_a_result_cannot_be_changed_by_mistake():
    found = allocate(np.ones((2, 3)), 2)
    assert isinstance(found, AllocationResult)
    with pytest.raises(AttributeError):
        found.loss = None
