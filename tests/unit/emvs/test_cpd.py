"""Properties, parity and bad inputs of collai.emvs.cpd."""

import json
import runpy
import sys

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac

from collai.emvs import cpd as module
from collai.emvs.cpd import (
    batched_cpd,
    benchmark_tensor,
    cp_to_tensor,
    cpd,
    factor_error,
    identifiability_report,
    khatri_rao,
    kruskal_condition,
    kruskal_rank,
    measure,
)
from collai.emvs.field import Targets, complex_normal, manifold

examples = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def factors(rng, shape, K):
    return tuple(complex_normal((n, K), rng) for n in shape)


def noisy(rng, shape, K, noise):
    F = factors(rng, shape, K)
    return cp_to_tensor(*F) + noise * complex_normal(shape, rng), F


def residual(X, F):
    return np.linalg.norm(X - cp_to_tensor(*F)) / np.linalg.norm(X)


@examples
@given(seeds, st.tuples(*3 * [st.integers(1, 5)]), st.integers(1, 4))
def test_products_agree_with_tensorly(seed, shape, K):
    A, B, C = factors(np.random.default_rng(seed), shape, K)
    assert np.allclose(khatri_rao(A, B), tensorly.tenalg.khatri_rao([A, B]))
    assert np.allclose(cp_to_tensor(A, B, C), tensorly.cp_to_tensor((None, [A, B, C])))


def test_products_reject_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="factors must be"):
        khatri_rao(np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="factors must be"):
        khatri_rao(np.ones(3), np.ones((2, 3)))
    with pytest.raises(ValueError, match="factors must share K columns"):
        cp_to_tensor(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 2)))


def test_kruskal_rank_counts_the_weakest_set():
    assert kruskal_rank(np.eye(4)) == 4
    assert kruskal_rank([[1, 0, 1], [0, 1, 1]]) == 2
    assert kruskal_rank([[1, 0, 2], [0, 1, 0]]) == 1  # parallel columns
    assert kruskal_rank([[1, 0], [0, 0]]) == 0  # a zero column
    assert kruskal_rank([[1, 1 + 1e-12], [1, 1]]) == 1
    assert kruskal_rank([[1, 1 + 1e-12], [1, 1]], tol=0) == 2
    assert kruskal_rank(np.ones((2, 0))) == 0
    three_of_four = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0.0]])
    assert kruskal_rank(three_of_four) == 2
    with pytest.raises(ValueError, match="limited to 8 columns, got 9"):
        kruskal_rank(np.eye(9))
    with pytest.raises(ValueError, match=r"must be \(I, K\)"):
        kruskal_rank(np.ones(3))


def test_shared_direction_and_polarisation_break_the_condition():
    rng = np.random.default_rng(0)
    A, B, C = factors(rng, (6, 6, 10), 2)
    assert kruskal_condition(A, B, C)
    assert not kruskal_condition(A[:, [0, 0]], B, C)
    assert not kruskal_condition(A, B, C[:1])
    assert kruskal_condition(A[:, :1], B[:, :1], C[:, :1])
    assert not kruskal_condition(A[:, :1], B[:, :1], 0 * C[:, :1])
    with pytest.raises(ValueError, match="factors must share K columns"):
        kruskal_condition(A, B, C[:, :1])
    pol = [[0.3, 0.9], [1.0, 2.0]]
    two = manifold([[0, 0, 0], [3, 0, 0]], [0.7, 0.7], [1.0, 1.0], *pol)
    assert kruskal_rank(two) == 2  # same direction, two polarisations


@examples
@given(seeds)
def test_the_report_agrees_with_explicit_least_squares(seed):
    A, B, C = F = factors(np.random.default_rng(seed), (5, 4, 7), 3)
    report = identifiability_report(F)
    for m, Z in enumerate((khatri_rao(B, C), khatri_rao(A, C), khatri_rao(A, B))):
        assert np.allclose(report["variance"][m], np.sum(np.abs(np.linalg.pinv(Z)) ** 2, axis=1))
        assert np.all(report["inflation"][m] >= 1 - 1e-9)
    assert report["unique"] and report["k_ranks"] == (3, 3, 3)
    assert np.all((0 < report["min_angle"]) & (report["min_angle"] <= np.pi / 2))


def test_the_report_sees_small_angles_and_single_targets():
    A = np.array([[1, 1], [0, 1e-11]])
    assert np.isclose(identifiability_report((A, np.eye(2), np.eye(2)))["min_angle"][0], 1e-11, atol=0)
    alone = identifiability_report((A[:, :1], A[:, :1], A[:, :1]))
    assert np.allclose(alone["min_angle"], np.pi / 2) and np.allclose(alone["inflation"], 1)
    assert identifiability_report(tuple(np.eye(9) for _ in range(3)))["unique"] is None


@examples
@given(seeds, st.integers(1, 4), st.sampled_from(["tals", "nls"]), st.sampled_from(["gevd", "hosvd", "random"]))
def test_noise_free_factors_come_back(seed, K, method, init):
    rng = np.random.default_rng(seed)
    F = factors(rng, map(int, rng.integers(K + 1, 9, 3)), K)
    result = cpd(cp_to_tensor(*F), K, method=method, init=init, rng=seed)
    if init == "gevd":  # from other starts a local minimum may win
        assert factor_error(result.factors, F).max() < 1e-7
    else:
        assert result.rel_residual < 0.9
    lengths = np.linalg.norm(result.factors[2], axis=0)
    assert np.all(np.diff(lengths) <= 0)
    assert all(np.allclose(np.linalg.norm(f, axis=0), 1) for f in result.factors[:2])


@pytest.mark.parametrize("shape", [(2, 6, 7), (6, 2, 7), (7, 6, 2), (4, 4, 2), (4, 2, 4), (6, 6, 40)])
def test_more_targets_than_a_mode_is_long(shape):
    F = factors(np.random.default_rng(1), shape, 4)
    X = cp_to_tensor(*F)
    assert factor_error(cpd(X, 4).factors, F).max() < 1e-7
    found = batched_cpd(torch.from_numpy(X)[None], 4)
    assert factor_error(tuple(f[0].numpy() for f in found), F).max() < 1e-6


def test_nearly_collinear_noise_free_targets_come_back():
    rng, d = np.random.default_rng(3), np.deg2rad(1) * np.arange(2)
    pos = np.stack([np.arange(6) * 0.5, np.zeros(6), np.zeros(6)], 1)
    ends = [manifold(pos, 0.6 + d, 0.4 + 0 * d, 0.5 + 0 * d, 1.0 + 0 * d) for _ in range(2)]
    F = (*ends, complex_normal((20, 2), rng))
    assert factor_error(cpd(cp_to_tensor(*F), 2).factors, F).max() < 1e-7


@examples
@given(seeds, st.integers(1, 4), st.sampled_from([0.01, 0.3, 3.0]))
def test_the_residual_is_never_larger_than_the_peers(seed, K, noise):
    rng = np.random.default_rng(seed)
    X, _ = noisy(rng, tuple(map(int, rng.integers(K + 1, 10, 3))), K, noise)
    peer = parafac(X, K, init="svd", n_iter_max=100, tol=1e-9)
    ours = cpd(X, K)
    assert ours.rel_residual <= np.linalg.norm(X - tensorly.cp_to_tensor(peer)) / np.linalg.norm(X) * (1 + 1e-9)
    assert np.isclose(ours.rel_residual, residual(X, ours.factors), rtol=1e-7)


@examples
@given(seeds, st.booleans(), st.booleans(), st.sampled_from(["tals", "nls"]))
def test_the_residual_never_rises(seed, compress, line_search, method):
    X, _ = noisy(np.random.default_rng(seed), (7, 6, 8), 3, 0.3)
    result = cpd(X, 3, method=method, compress=compress, line_search=line_search)
    assert np.all(np.diff(result.history) <= 1e-12)
    assert len(result.history) == result.n_iter + 1 and result.converged
    assert np.isclose(result.history[-1], result.rel_residual)


def test_swamps_are_crossed_on_every_way():
    X, K = benchmark_tensor("swamp", 1)
    for options in ({}, {"method": "nls"}, {"line_search": True}, {"compress": False}):
        result = cpd(X, K, **options)
        assert result.converged and result.rel_residual < 0.01005 and result.n_iter < 250, options


def test_the_line_search_helps_on_complex_data():
    X, K = benchmark_tensor("swamp", 0)
    core = module._compress(X, K)[1]
    power, F = np.linalg.norm(core) ** 2, factors(np.random.default_rng(2), (3, 3, 3), 3)
    ends = {}
    for search in (False, True):
        G, error = module._sweep(core, F, power)
        for _ in range(60):
            new, after = module._sweep(core, G, power)
            G, error = module._search(core, G, new, after) if search else (new, after)
        ends[search] = error
        assert np.isclose(error, np.linalg.norm(core - cp_to_tensor(*G)) ** 2, rtol=1e-6)
    assert ends[True] < ends[False]


def test_a_useless_step_is_refused():
    X, F = noisy(np.random.default_rng(5), (4, 4, 4), 2, 0.0)
    worse = tuple(f + 0.5 for f in F)
    kept, error = module._search(X, worse, F, 0.0)  # F has no error: only rounding can be gained
    assert error == 0.0 and all(np.allclose(k, f, atol=1e-12) for k, f in zip(kept, F, strict=True))
    kept, error = module._search(X, F, F, 0.0)
    assert kept is F and error == 0.0


def test_results_repeat_without_rng_and_inputs_stay_as_they_are():
    X, _ = noisy(np.random.default_rng(7), (6, 5, 7), 3, 0.2)
    before = X.copy()
    for init in ("gevd", "hosvd", "random"):
        first, second = cpd(X, 3, init=init), cpd(X, 3, init=init)
        assert all(np.array_equal(f, g) for f, g in zip(first.factors, second.factors, strict=True))
    assert np.array_equal(X, before)
    F_order = np.asfortranarray(X)
    assert np.isclose(cpd(F_order, 3).rel_residual, cpd(X, 3).rel_residual)


def test_edge_cases_have_answers():
    X, _ = noisy(np.random.default_rng(8), (5, 4, 6), 2, 0.1)
    zero = cpd(np.zeros((3, 4, 5), int), 2)
    assert zero.rel_residual == 0 and zero.converged and zero.factors[2].shape == (5, 2)
    assert np.isclose(cpd(1e-170 * X, 2).rel_residual, cpd(X, 2).rel_residual)
    assert factor_error(cpd(1e150 * X, 2).factors, cpd(X, 2).factors).max() < 1e-9
    assert cpd(X.real.tolist(), np.int64(2)).rel_residual < 1
    assert cpd(np.ones((1, 1, 1)), 1).rel_residual < 1e-12
    two, _ = noisy(np.random.default_rng(9), (5, 5, 5), 2, 0.0)
    assert cpd(two, 3).rel_residual < 1e-6  # one target too many
    corner = np.zeros((3, 3, 3))
    corner[0, 0, 0] = 1
    assert cpd(corner, 2).rel_residual < 1e-9  # singular pencils
    stopped = cpd(X, 2, max_iter=1)
    assert stopped.n_iter == 1 and not stopped.converged


def test_noise_alone_takes_a_second_start_and_keeps_the_better_one(monkeypatch):
    X = complex_normal((2, 4, 16), np.random.default_rng(32))
    plain, calls = module._plain, []
    monkeypatch.setattr(module, "_plain", lambda X, *rest: calls.append(1) or (None, [1.0, np.inf], True))
    first = cpd(X, 1)
    monkeypatch.setattr(module, "_plain", plain)
    assert calls and first.rel_residual < 1
    assert cpd(X, 1).rel_residual < 0.999 * first.rel_residual
    assert cpd(X, 1, max_iter=40).rel_residual < 1


@pytest.mark.parametrize(("X", "rank", "text"), [
    (np.ones((3, 3)), 2, r"^tensor must be 3-D \(6M, 6N, L\)"),
    (np.full((3, 3, 3), np.inf), 2, "^tensor contains non-finite values"),
    (np.ones((3, 3, 3)), 0, "^rank must be a positive integer"),
    (np.ones((3, 3, 3)), 1.5, "^rank must be a positive integer"),
    (np.ones((3, 3, 3)), True, "^rank must be a positive integer"),
    (np.ones((3, 3, 1)), 2, "^not identifiable: one pulse cannot separate"),
    (np.ones((2, 2, 9)), 3, "^not identifiable: "),
])
def test_bad_tensors_and_ranks_are_refused(X, rank, text):
    with pytest.raises(ValueError, match=text):
        cpd(X, rank)
    if np.isfinite(X).all():
        with pytest.raises(ValueError, match=text):
            batched_cpd(torch.from_numpy(X.astype(complex))[None], rank)


@pytest.mark.parametrize("options", [{"method": "als"}, {"init": "svd"}, {"max_iter": 0}, {"n_restarts": 0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        cpd(np.ones((3, 3, 3)), 1, **options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_batches_agree_with_single_decompositions(dtype):
    X, truth = module._random_stack(6, "cpu", torch.complex128, seed=11)
    found = batched_cpd(X.to(dtype), 3)
    for z in range(6):
        single = cpd(X[z].numpy(), 3)
        one = tuple(f[z].numpy() for f in found)
        assert residual(X[z].numpy(), one) < single.rel_residual * (1 + 1e-6)
        true = tuple(t[z].numpy() for t in truth)
        assert np.all(factor_error(one, true) < 1.02 * factor_error(single.factors, true))
    assert all(f.dtype == dtype for f in found)
    assert torch.all(found[2].norm(dim=1).diff(dim=1) <= 0)


def test_batches_are_cut_without_a_trace(monkeypatch):
    X, _ = module._random_stack(3, "cpu", torch.complex128, seed=12)
    whole = batched_cpd(X, np.int64(3), n_iter=5)
    for z in range(3):
        alone = batched_cpd(X[z : z + 1], 3, n_iter=5)
        assert all(torch.allclose(f[z], g[0], atol=1e-9) for f, g in zip(whole, alone, strict=True))


def test_batches_without_a_pencil_start_at_random():
    F = factors(np.random.default_rng(6), (5, 5, 30), 6)
    A, B, C = batched_cpd(torch.from_numpy(cp_to_tensor(*F))[None], 6, n_iter=200)
    assert residual(cp_to_tensor(*F), (A[0].numpy(), B[0].numpy(), C[0].numpy())) < 0.05


def test_bad_stacks_are_refused():
    with pytest.raises(ValueError, match="tensor must be 3-D"):
        batched_cpd(np.zeros((2, 3, 3, 3), complex), 1)
    with pytest.raises(ValueError, match="tensor must be 3-D"):
        batched_cpd(torch.zeros(3, 3, 3, dtype=torch.complex64), 1)
    with pytest.raises(ValueError, match="tensor must be complex64 or complex128"):
        batched_cpd(torch.zeros(2, 3, 3, 3), 1)
    zero = batched_cpd(torch.zeros(2, 3, 3, 3, dtype=torch.complex64), 2)
    assert all(torch.isfinite(f).all() for f in zero)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_real_products_agree_with_complex_ones(dtype):
    rng = np.random.default_rng(2)
    X, P, Q = (torch.from_numpy(complex_normal(shape, rng)).to(dtype) for shape in ((3, 5, 7), (3, 5, 2), (3, 7, 2)))
    assert torch.allclose(module._real_right(X, Q), X @ Q, atol=1e-5)
    assert torch.allclose(module._real_right(X, Q.conj()), X @ Q.conj(), atol=1e-5)
    assert torch.allclose(module._real_right(X[0], Q[0]), X[0] @ Q[0], atol=1e-5)
    assert torch.allclose(module._real_left(P, X), P.mH @ X, atol=1e-5)


def test_conjugate_and_strided_stacks_are_accepted():
    X, _ = module._random_stack(2, "cpu", torch.complex128, seed=13)
    straight, other = batched_cpd(X.conj().resolve_conj(), 3), batched_cpd(X.conj(), 3)
    assert all(torch.allclose(f, g) for f, g in zip(straight, other, strict=True))
    turned = batched_cpd(X.transpose(1, 2), 3)
    assert torch.allclose(turned[2].abs(), batched_cpd(X, 3)[2].abs(), rtol=1e-2, atol=1e-2)


@examples
@given(seeds, st.integers(1, 6))
def test_eigenvectors_without_an_eigenvalue_routine(seed, K):
    M = torch.from_numpy(complex_normal((3, K, K), np.random.default_rng(seed)))
    V = module._eigenvectors(M.permute(1, 2, 0)).permute(2, 0, 1)
    D = torch.linalg.solve(V, M @ V)
    assert (D - torch.diag_embed(D.diagonal(dim1=1, dim2=2))).abs().max() < 1e-5 * torch.linalg.cond(V).max()


def test_factor_error_ignores_order_and_scale_and_sees_angles():
    A, B, C = F = factors(np.random.default_rng(1), (4, 5, 6), 3)
    assert factor_error((2j * A[:, ::-1], B[:, ::-1], -C[:, ::-1]), F).max() < 1e-12
    tilted = A / np.linalg.norm(A, axis=0)
    normal = np.linalg.svd(A)[0][:, 3:]
    assert np.allclose(factor_error((tilted + np.tan(1e-3) * normal, B, C), F), [np.sin(1e-3), 0, 0], atol=1e-12)


@pytest.mark.parametrize("case", ["easy_36", "easy_48", "close", "swamp"])
def test_benchmark_tensors_repeat_and_keep_their_size(case):
    X, K = benchmark_tensor(case, 3)
    assert np.array_equal(X, benchmark_tensor(case, 3)[0])
    assert X.shape == {"easy_48": (48, 48, 200), "close": (36, 36, 20)}.get(case, (36, 36, 100))
    assert K == {"easy_48": 4, "close": 2}.get(case, 3)
    assert isinstance(Targets(*module._directions(K, 1.0, np.random.default_rng(0)) * 2), Targets)


def test_measure_writes_rows_against_the_peer(tmp_path, monkeypatch):
    gaps = {"easy_36": None, "close": 1.0, "swamp": 3.0}
    monkeypatch.setattr(module, "_CASES", {case: (1, 9, 1, gap, (40, 40)) for case, gap in gaps.items()})
    for name in ("_compare", "_compare_batch"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda case, *a, f=original, **k: f(case, 2))
    rows = {row["name"]: row for row in measure("cpu")}
    assert rows["cpd_close"]["measured"] > 0 and rows["cpd_close"]["residual_ratio"] <= 1 + 1e-9
    assert rows["cpd_close"]["ci"][0] <= rows["cpd_close"]["measured"] <= rows["cpd_close"]["ci"][1]
    assert {"cpd_batch_complex64", "cpd_batch_complex128", "cpd_time_swamp"} <= rows.keys()
    assert rows["cpd_time_close"]["ours"][-1][1] <= rows["cpd_time_close"]["tensorly"][-1][1] * (1 + 1e-6)
    json.dumps(rows)


def test_measure_is_silent_without_the_peer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    assert measure("cpu") == []
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["cpd", "--device", "cpu", "--out", str(out)])
    monkeypatch.delitem(sys.modules, "collai.emvs.cpd")
    runpy.run_module("collai.emvs.cpd", run_name="__main__", alter_sys=True)
    assert json.loads(out.read_text())["rows"] == {}
