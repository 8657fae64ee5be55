"""Unwrapping, polarisation, joint likelihood and batches of `collai.emvs.angles`."""

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.emvs import angles
from collai.emvs.angles import (
    batched_estimate,
    disambiguate,
    estimate,
    information,
    measure,
    polarization_from,
    rank1_split,
    rounding_snr_min,
)
from collai.emvs.field import (
    Targets,
    complex_normal,
    emvs_response,
    manifold,
    polarization_vector,
    random_array,
    simulate,
    steering,
    unit_vector,
)

LOW, HIGH = [0.2, 0.0, 0.1, 0.0] * 2, [2.9, 6.28, 1.4, 6.28] * 2
quick = settings(deadline=None, derandomize=True, max_examples=5)


def ell(spacing):
    return spacing * np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [0, 1, 0], [0, 2, 0]], float)


def shape(kind, spacing, rng):
    if kind == "linear":
        return spacing * np.arange(5)[:, None] * np.array([[0.0, 0.8, 0.6]])
    if kind == "planar":
        return spacing * np.array([[0, 0, 0], [1, 0, 0], [0, 1.1, 0], [2, 1, 0], [1, 2, 0]], float)
    return ell(spacing) if kind == "L" else spacing * (rng.permutation(27)[:5, None] // [9, 3, 1] % 3)


def targets(count, rng):
    return Targets.from_array(rng.uniform(LOW, HIGH, (count, 8)))


def gap(true, est):
    """Largest error of a direction or polarisation vector."""
    x, y = true.as_array(), est.as_array()[true.match(est)]
    out = []
    for i in (0, 4):
        out.append(unit_vector(x[:, i], x[:, i + 1]) - unit_vector(y[:, i], y[:, i + 1]))
        out.append(polarization_vector(x[:, i + 2], x[:, i + 3])
                   - polarization_vector(y[:, i + 2], y[:, i + 3]))
    return max(np.linalg.norm(v, axis=1).max() for v in out)


def noisy_column(seed, positions, sigma_u):
    """Array response, coarse direction and true direction with the errors the theory assumes."""
    rng = np.random.default_rng(seed)
    u = unit_vector(np.arccos(rng.uniform(-1, 1)), rng.uniform(0, 6))
    sigma_a = sigma_u * np.sqrt(len(positions))
    a = steering(positions, u) + sigma_a * complex_normal((len(positions),), rng)
    coarse = u + sigma_u * rng.standard_normal(3)
    return a, coarse / np.linalg.norm(coarse), u


def truth(positions, u, phase):
    return np.round((2 * np.pi * (positions[1:] - positions[0]) @ u - phase) / (2 * np.pi))


@quick
@given(st.integers(0, 999), st.sampled_from(["L", "linear", "planar", "3-D"]),
       st.sampled_from([0.5, 3.0, 10.0]), st.integers(1, 3))
def test_noise_free_targets_come_back(seed, kind, spacing, count):
    rng = np.random.default_rng(seed)
    tx, rx = shape(kind, spacing, rng), shape(kind, spacing, rng)
    true = targets(count, rng)
    data = simulate(true, tx, rx, 8, rng=rng).tensor
    before = data.copy()
    for refine in (True, False):
        est = estimate(data, count, tx, rx, refine=refine)
        assert gap(true, est.targets) <= 1e-7
    assert np.array_equal(before, data)
    assert (np.diff(np.linalg.norm(est.cp.factors[2], axis=0)) <= 0).all()


@quick
@given(st.integers(0, 999), st.sampled_from([2.0, 6.0]))
def test_map_agrees_with_the_exact_search(seed, spacing):
    positions = spacing * np.random.default_rng(seed).permutation(27)[:5, None] // [9, 3, 1] % (3 * spacing)
    a, coarse, _ = noisy_column(seed, positions, 0.02)
    best, exact = (disambiguate(a, positions, coarse, 0.02, method=m) for m in ("map", "lattice"))
    assert np.array_equal(best.integers, exact.integers)
    assert np.isclose(best.cost, exact.cost, atol=0.1)


def test_map_succeeds_where_rounding_fails():
    positions, wins = ell(8.0), {"map": 0, "sequential": 0, "round": 0}
    for seed in range(30):
        a, coarse, u = noisy_column(seed, positions, 0.018)
        for method in wins:
            got = disambiguate(a, positions, coarse, 0.018, method=method)
            wins[method] += np.array_equal(got.integers, truth(positions, u, got.phase))
    assert wins["map"] >= 29 and wins["sequential"] >= 28 and wins["round"] <= 26


def test_fine_part_alone_is_right_when_the_array_is_irregular():
    positions = 7 * np.random.default_rng(3).normal(size=(6, 3))
    a, coarse, u = noisy_column(1, positions, 0.01)
    got = disambiguate(a, positions, coarse, 0.01, method="local_ml")
    assert np.array_equal(got.integers, truth(positions, u, got.phase))


def test_direction_halfway_between_fringes_is_flagged():
    u = unit_vector(0.5, 0.3)
    a = steering(ell(10.0), u)
    halfway = disambiguate(a, ell(10.0), u + np.array([0.05, 0, 0]), 0.03)
    assert halfway.ambiguous and 0 <= halfway.runner_up_cost - halfway.cost < 9
    clear = disambiguate(a, ell(10.0), u, 0.005)
    assert not clear.ambiguous and clear.runner_up_cost - clear.cost > 9
    assert np.allclose(clear.u, u, atol=1e-6)


def test_huge_aperture_stays_inside_the_grid_budget(monkeypatch):
    seen = []
    count = angles._point
    monkeypatch.setattr(angles, "_point", lambda xp, u, t, s: seen.append(s.shape[1]) or count(xp, u, t, s))
    positions = 4e4 * np.random.default_rng(0).normal(size=(5, 3))
    u = unit_vector(1.0, 1.0)
    angles._grid(steering(positions, u)[None], 2 * np.pi * positions, u[None], np.array([0.2]),
                 np.array([0.3]), 1.0)
    assert len(seen) > 3 and sum(seen) <= 4e5


def test_single_element_returns_the_coarse_direction():
    got = disambiguate([1j], [[5, 5, 5]], [0, 0, 2.0], 0.1)
    assert np.array_equal(got.u, [0, 0, 1]) and got.integers.size == 0
    assert got.runner_up_cost == np.inf and not got.ambiguous
    rng = np.random.default_rng(0)
    true = targets(2, rng)
    data = simulate(true, [[0, 0, 0]], [[1, 2, 3]], 6, rng=rng).tensor
    assert gap(true, estimate(data, 2, [[0, 0, 0]], [[1, 2, 3]]).targets) < 1e-7
    batch = batched_estimate(torch.from_numpy(data[None]), 2, [[0, 0, 0]], [[1, 2, 3]])
    assert gap(true, Targets.from_array(batch.params[0].numpy())) < 1e-6
    assert not batch.ambiguous_t.any()


def test_sensor_at_the_pole_with_linear_polarisation_comes_back():
    true = Targets(0.0, 0.0, 0.0, 0.0, np.pi, 0.0, np.pi / 2, 0.0)
    data = simulate(true, ell(4.0), ell(4.0), 6, rng=0)
    est = estimate(data.tensor, 1, ell(4.0), ell(4.0))
    assert np.allclose(est.targets.unit_t(), [[0, 0, 1]], atol=1e-7)
    assert np.allclose(est.targets.unit_r(), [[0, 0, -1]], atol=1e-7)
    assert np.isfinite(est.covariance).all()


@quick
@given(st.integers(0, 999))
def test_split_and_polarisation_invert_the_manifold(seed):
    rng = np.random.default_rng(seed)
    theta, phi, gamma, eta = rng.uniform(LOW[:4], HIGH[:4])
    positions = rng.normal(size=(4, 3))
    c = complex_normal((1,), rng) * manifold(positions, theta, phi, gamma, eta)[:, 0]
    for split in ("svd", "ratio"):
        a, b = rank1_split(c, split)
        assert np.allclose(np.outer(a, b).ravel(), c) and np.isclose(np.mean(abs(a) ** 2), 1)
        assert np.allclose(polarization_from(b, unit_vector(theta, phi)), [gamma, eta])
    assert polarization_from(emvs_response(theta, phi, 0.0, 1.0), unit_vector(theta, phi))[1] == 0


def test_information_equals_the_dense_matrix():
    rng = np.random.default_rng(1)
    x, tx, rx = targets(2, rng).as_array(), rng.normal(size=(3, 3)), rng.normal(size=(2, 3))
    S = complex_normal((5, 2), rng)

    def flat(p):
        left, right = manifold(tx, *p[:, :4].T, 0.5), manifold(rx, *p[:, 4:].T, 0.5)
        return (np.einsum("ik,jk->ijk", left, right).reshape(-1, 2) @ S.T).ravel()

    bumps = 1e-6 * np.eye(16).reshape(16, 2, 8)
    D = np.stack([(flat(x + b) - flat(x - b)) / 2e-6 for b in bumps], 1)
    left, right = manifold(tx, *x[:, :4].T, 0.5), manifold(rx, *x[:, 4:].T, 0.5)
    A = np.einsum("ik,jk->ijk", left, right).reshape(-1, 2)
    nuisance = np.kron(A, np.eye(5))
    free = D - nuisance @ np.linalg.lstsq(nuisance, D, rcond=None)[0]
    H = information(x, tx, rx, S.conj().T @ S, wavelength=0.5)
    assert np.allclose(H, (D.conj().T @ free).real, rtol=1e-6, atol=1e-6 * H.max())


def misfit(est, data):
    """Residual of the data after the best pulses for an estimate."""
    x = est.targets.as_array()
    left, right = manifold(ell(10.0), *x[:, :4].T), manifold(ell(10.0), *x[:, 4:].T)
    A = np.einsum("ik,jk->ijk", left, right).reshape(-1, len(x))
    Y = data.reshape(len(A), -1)
    return np.linalg.norm(Y - A @ np.linalg.lstsq(A, Y, rcond=None)[0])


def test_joint_likelihood_revisits_doubtful_integers():
    rng = np.random.default_rng(2)
    flagged = 0
    for _ in range(3):
        true = targets(2, rng)
        data = simulate(true, ell(10.0), ell(10.0), 20, -11.0, rng=rng).tensor
        joint, alone = (estimate(data, 2, ell(10.0), ell(10.0), refine=r) for r in (True, False))
        flagged += sum(w.ambiguous for w in joint.unwrapped_t + joint.unwrapped_r)

        assert misfit(joint, data) < misfit(alone, data)
        for w, u in zip(joint.unwrapped_t, joint.targets.unit_t(), strict=True):
            assert np.array_equal(w.integers, truth(ell(10.0), u, w.phase))
            assert np.allclose(w.u, u, atol=1e-9)
    assert flagged > 0


def test_likelihood_moves_a_column_from_a_wrong_fringe():
    rng = np.random.default_rng(7)
    true = Targets(0.5, 0.4, 0.6, 1.0, 1.2, 3.0, 0.9, 4.0)
    data = simulate(true, ell(10.0), ell(10.0), 30, 5.0, rng=rng)
    u, v = true.unit_t(), true.unit_r()
    f = emvs_response(*true.as_array()[:, 4:].T)[:, :3]
    wrong = u + np.array([[0.1, 0, 0]])
    wrong[:, 2] = np.sign(u[:, 2]) * np.sqrt(1 - (wrong[:, :2] ** 2).sum())
    rads = [2 * np.pi * (ell(10.0) - ell(10.0).mean(0))] * 2 + [np.eye(8), angles._PICKS]
    state = (wrong, angles._transverse(np, emvs_response(*true.as_array()[:, :4].T), wrong), v, f)
    rows = ([np.array([[*wrong[0], 0.0], [*u[0], 3.0]])], [np.array([[*v[0], 0.0]])])
    moved, behind = angles._rethink(data.tensor, tuple(rads), state, rows, data.noise_var)
    assert np.linalg.norm(moved[0] - u) < 0.01 and behind[0, 0] > 9
    assert rows[0][0][0, 3] == 3.0


def test_covariance_is_the_inverse_information_at_the_estimate():
    rng = np.random.default_rng(3)
    data = simulate(targets(2, rng), ell(2.0), ell(2.0), 8, 10.0, rng=rng)
    for refine in (True, False):
        est = estimate(data.tensor, 2, ell(2.0), ell(2.0), refine=refine)
        x = est.targets.as_array()
        left, right = manifold(ell(2.0), *x[:, :4].T), manifold(ell(2.0), *x[:, 4:].T)
        A = np.einsum("ik,jk->ijk", left, right).reshape(-1, 2)
        S = np.linalg.lstsq(A, data.tensor.reshape(len(A), -1), rcond=None)[0]
        H = information(x, ell(2.0), ell(2.0), S.conj() @ S.T)
        assert np.allclose(est.covariance @ H, est.noise_var / 2 * np.eye(16), atol=1e-6)
        assert abs(est.noise_var / data.noise_var - 1) < 0.05


def test_batch_equals_single_calls_in_both_precisions():
    rng = np.random.default_rng(4)
    tx, rx = ell(3.0), shape("planar", 3.0, rng)
    tensors = np.stack([simulate(targets(2, rng), tx, rx, 10, 8.0, rng=rng).tensor for _ in range(3)])
    for dtype, limit in ((torch.complex128, 3e-4), (torch.complex64, 3e-3)):
        got = batched_estimate(torch.from_numpy(tensors).to(dtype), 2, tx, rx)
        for z in range(3):
            one = estimate(tensors[z], 2, tx, rx)
            assert gap(one.targets, Targets.from_array(got.params[z].double().numpy())) < limit
            assert np.isclose(got.noise_var[z].item(), one.noise_var, rtol=1e-3)
    closed = batched_estimate(torch.from_numpy(tensors), 2, tx, rx, n_refine=0)
    assert closed.params.shape == (3, 2, 8)


def test_rounding_threshold_is_met_by_simulation():
    rng = np.random.default_rng(5)
    db = rounding_snr_min(4.0, 3, 3, 10, p=0.8)
    sigma_u = 1 / np.sqrt(36 * 3 * 3 * 10 * 10 ** (db / 10))
    hits = np.abs(4.0 * sigma_u * rng.standard_normal(20000)) < 0.5
    assert abs(hits.mean() - 0.8) < 0.015
    assert np.isclose(rounding_snr_min(8.0, 3, 3, 10, wavelength=2.0), rounding_snr_min(4.0, 3, 3, 10))


def test_study_pairs_methods_on_the_same_columns():
    rows = angles._table([("L", 5, -5), ("3-D", 5, -5)], 5, ("round", "local_ml", "map"),
                         np.random.default_rng(6))
    for row in rows:
        assert row["map"].shape == row["round"].shape == row["flag"].shape
        assert row["map"].mean() >= 0.9 and row["paired"].all()


def test_cpu_measurement_returns_rows_with_intervals(monkeypatch):
    monkeypatch.setattr(angles, "_CASES", (("L", 2, 0),))
    table = angles._table
    monkeypatch.setattr(angles, "_table", lambda cases, trials, *rest: table(cases, 2, *rest))
    monkeypatch.setattr(angles, "_seconds", lambda call, wait: call() is None or 1.0)
    rows = {row["name"]: row for row in measure("cpu")}
    assert rows["cpu_estimates"]["peer"] == 1.0 and rows["wraps L 2 0 map"]["columns"] == 8
    low, high = rows["wraps L 2 0 map"]["ci"]
    assert low <= rows["wraps L 2 0 map"]["measured"] <= high
    with pytest.raises(ValueError, match="device must be"):
        measure("tpu")


def test_seconds_is_the_median_after_one_warm_up():
    calls = []
    assert angles._seconds(lambda: calls.append(1), lambda: None, 3) >= 0 and len(calls) == 4


def test_error_of_a_batch_matches_targets_first():
    true = targets(3, np.random.default_rng(8))
    params = torch.from_numpy(true.as_array()[[2, 0, 1]][None])
    assert angles._rms_error(params, (true.unit_t()[None], true.unit_r()[None])) < 1e-12


def test_exported_functions_accept_what_they_promise():
    rng = np.random.default_rng(9)
    data = simulate(targets(1, rng), ell(2.0), ell(2.0), 4, 10.0, rng=rng).tensor
    est = beartype(estimate)(data.real.tolist(), 1, ell(2.0).tolist(), ell(2.0), rng=3)
    assert np.isfinite(est.targets.as_array()).all()
    est = beartype(estimate)(data, 1, ell(2.0), ell(2.0), method="sequential")
    a, b = beartype(rank1_split)(est.cp.factors[0][:, 0])
    beartype(polarization_from)(b, est.coarse_t[0])
    beartype(disambiguate)(list(a), ell(2.0), est.coarse_t[0].tolist(), 0.01)
    beartype(information)(est.targets.as_array(), ell(2.0), ell(2.0), [[1.0]])
    beartype(batched_estimate)(torch.from_numpy(data[None]), 1, ell(2.0), ell(2.0).tolist())


DATA = simulate(targets(2, np.random.default_rng(0)), ell(2.0), ell(2.0), 4, 10.0, rng=0).tensor
NAN = np.where(np.arange(DATA.size).reshape(DATA.shape) == 7, np.nan, DATA)


@pytest.mark.parametrize(("change", "text"), [
    ({"X": DATA[0]}, "tensor must be 3-D"), ({"tx": ell(2.0)[:4]}, "tensor shape .* does not match"),
    ({"X": NAN}, "tensor contains non-finite values"), ({"rank": 0}, "rank must be a positive integer"),
    ({"rank": 2.0}, "rank must be a positive integer"), ({"rank": 60}, "not identifiable"),
    ({"X": DATA[..., :1]}, "one pulse cannot separate"), ({"tx": ell(2.0)[:, :2]}, "positions must be"),
    ({"rx": 0 * ell(2.0)}, "coincident elements"), ({"wavelength": 0.0}, "wavelength must be positive"),
    ({"method": "esprit"}, "method must be one of"),
])
def test_estimate_rejects(change, text):
    with pytest.raises(ValueError, match=text):
        estimate(**{"X": DATA, "rank": 2, "tx": ell(2.0), "rx": ell(2.0)} | change)


@pytest.mark.parametrize(("change", "text"), [
    ({"X": torch.from_numpy(DATA)}, "tensor must be 3-D"),
    ({"X": torch.from_numpy(DATA.real[None])}, "tensor must be 3-D"),
    ({"rx": ell(2.0)[:3]}, "does not match"), ({"rank": -1}, "rank must be a positive integer"),
    ({"wavelength": -2.0}, "wavelength must be positive"), ({"tx": 0 * ell(2.0)}, "coincident elements"),
])
def test_batched_estimate_rejects(change, text):
    good = {"X": torch.from_numpy(DATA[None]), "rank": 2, "tx": ell(2.0), "rx": ell(2.0)}
    with pytest.raises(ValueError, match=text):
        batched_estimate(**good | change)


@pytest.mark.parametrize(("change", "text"), [
    ({"a": np.ones(5)}, "array response must be"), ({"a": np.zeros(6)}, "array response must be"),
    ({"u_coarse": [0, 0, 0]}, "coarse direction must be"), ({"sigma_u": 0.0}, "must be positive"),
    ({"sigma_phase": -1.0}, "must be positive"), ({"method": "guess"}, "method must be one of"),
    ({"wavelength": 0.0}, "wavelength must be positive"),
    ({"positions": np.zeros((6, 3))}, "coincident elements"),
])
def test_disambiguate_rejects(change, text):
    good = {"a": np.ones(6), "positions": ell(2.0), "u_coarse": [0, 0, 1], "sigma_u": 0.01}
    with pytest.raises(ValueError, match=text):
        disambiguate(**good | change)


@pytest.mark.parametrize(("call", "text"), [
    (lambda: disambiguate(np.ones(9), np.eye(9)[:, :3] + np.arange(9)[:, None], [0, 0, 1], 0.1, method="lattice"),
     "limited to 8 elements"),
    (lambda: rank1_split(np.ones(7)), "factor column must be"),
    (lambda: rank1_split(np.zeros(6)), "not zero"),
    (lambda: rank1_split(np.ones(6), "mean"), "split must be"),
    (lambda: polarization_from(np.ones(5), np.ones(3)), "need b"),
    (lambda: rounding_snr_min(-1.0, 1, 1, 1), "spacing must be positive"),
    (lambda: rounding_snr_min(1.0, 1, 0, 1), "positive integers"),
    (lambda: rounding_snr_min(1.0, 1, 1, 1, p=1.5), "p must be between"),
    (lambda: rounding_snr_min(1.0, 1, 1, 1, wavelength=0.0), "wavelength must be positive"),
])
def test_helpers_reject(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_targets_that_the_decomposition_mixes_are_flagged_when_they_come_out_wrong():
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(3):
        x = np.array([[0.7, 0.3, 0.5, 1.0, 0.4, 0.2, 0.6, 0.5], [0.7, 0.3, 0.5, 1.0, 1.1, 2.0, 0.9, 2.5]])
        tx, rx = random_array(5, 2.0, rng), random_array(5, 2.0, rng)
        true = Targets.from_array(x)  # one departure and polarisation for both
        got = estimate(simulate(true, tx, rx, 40, 10.0, rng=rng).tensor, 2, tx, rx)
        found = got.targets.as_array()[true.match(got.targets)]
        far = np.abs(Targets.from_array(found).unit_r() - true.unit_r()).max() > 0.05
        wrong += far
        if far:
            assert all(one.ambiguous for one in (*got.unwrapped_t, *got.unwrapped_r))
    assert wrong > 0


def test_a_zero_tensor_has_no_target():
    with pytest.raises(ValueError, match="tensor is zero"):
        estimate(np.zeros((12, 12, 4)), 1, random_array(2, 1.0, np.random.default_rng(0)),
                 random_array(2, 1.0, np.random.default_rng(1)))


def test_information_checks_its_arrays():
    with pytest.raises(ValueError, match="positions must be"):
        information(np.ones((1, 8)), np.ones((3, 2)), np.eye(3), np.eye(1))
    with pytest.raises(ValueError, match="wavelength must be positive"):
        information(np.ones((1, 8)), np.eye(3), np.eye(3), np.eye(1), -1.0)


def test_a_numpy_batch_is_refused():
    with pytest.raises(ValueError, match="tensor must be 3-D"):
        angles.batched_estimate(np.zeros((2, 12, 12, 4), complex), 1, np.eye(3)[:2], np.eye(3)[:2])
