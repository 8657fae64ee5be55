"""Bounds against independent computations, and bad inputs, of collai.emvs.crb."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.emvs import crb as module
from collai.emvs.crb import (
    crb,
    direction_bound,
    direction_crb,
    fisher_numeric,
    fixed_scene,
    measure,
    monte_carlo,
    over_bound_db,
    pooled_bound,
    pooled_errors,
    position_crb,
)
from collai.emvs.field import Targets, coarse_std, complex_normal, l_array, simulate, unit_vector

examples = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def scene(rng, n):
    low = np.array([0.4, 0, 0.3, 0] * 2)
    high = np.array([np.pi - 0.4, 2 * np.pi, np.pi / 2 - 0.3, 2 * np.pi] * 2)
    return Targets.from_array(rng.uniform(low, high, (n, 8)))


def case(seed, n_targets, spread=2.0, n_tx=3, n_rx=2, n_pulses=5):
    rng = np.random.default_rng(seed)
    arrays = (spread * rng.normal(size=(n_tx, 3)), spread * rng.normal(size=(n_rx, 3)))
    return scene(rng, n_targets), *arrays, complex_normal((n_pulses, n_targets), rng)


@examples
@given(seeds, st.integers(1, 3), st.sampled_from([0.5, 5.0, 10.0]), st.sampled_from([1.0, 0.3]))
def test_bound_equals_the_inverse_of_the_full_numerical_fisher_matrix(seed, n, spread, wavelength):
    targets, tx, rx, s = case(seed, n, spread * wavelength)
    bound = crb(targets, tx, rx, s, 0.3, wavelength)
    F = fisher_numeric(targets, tx, rx, s, 0.3, wavelength)
    assert F.shape == (8 * n + 2 * s.size,) * 2
    d = 1 / np.sqrt(F.diagonal())
    numeric = (np.linalg.inv(F * np.outer(d, d)) * np.outer(d, d))[: 8 * n, : 8 * n]
    std = np.sqrt(bound.diagonal())
    assert (np.abs(bound - numeric) / np.outer(std, std)).max() < 1e-6


def test_numerical_fisher_matrix_uses_the_mean_of_the_simulated_data():
    targets, tx, rx, s = case(1, 2)
    clean = simulate(targets, tx, rx, len(s), s=s, wavelength=0.7).clean
    mean = module._mean(targets.as_array(), tx, rx, s, 2 * np.pi / 0.7)
    assert np.allclose(mean, clean.ravel())
    # the block of one pulse coefficient is known: 2/sigma^2 times the squared column length 2M * 2N
    F = fisher_numeric(targets, tx, rx, s, 0.5, 0.7)
    assert np.allclose(F.diagonal()[16:], 2 / 0.5 * 2 * 3 * 2 * 2)


@examples
@given(seeds, st.sampled_from([1, 2, 5]), st.sampled_from([1, 4]), st.sampled_from([0.5, 5.0]))
def test_single_target_bound_adds_sensor_and_aperture(seed, n_tx, n_rx, spread):
    targets, tx, rx, s = case(seed, 1, spread, n_tx, n_rx)
    C = direction_crb(crb(targets, tx, rx, s, 0.4), targets)
    sigma_u = np.sqrt(0.4 / (4 * n_tx * n_rx * np.sum(np.abs(s) ** 2)))
    x = targets.as_array()[0]
    assert np.allclose(C[:2, :2], direction_bound(tx, x[0], x[1], sigma_u), rtol=1e-8, atol=1e-9 * C.max())
    assert np.allclose(C[2:, 2:], direction_bound(rx, x[4], x[5], sigma_u), rtol=1e-8, atol=1e-9 * C.max())
    assert np.abs(C[:2, 2:]).max() < 1e-8 * np.abs(C).max()


def test_single_sensor_is_as_good_as_its_poynting_vector():
    targets, tx, rx, _ = case(2, 1, n_tx=1, n_rx=1)
    one = simulate(targets, tx, rx, 30, 3.0, rng=0)
    C = direction_crb(crb(targets, tx, rx, one.s, one.noise_var), targets)
    assert np.allclose(C, coarse_std(1, 1, 30, 3.0) ** 2 * np.eye(4), atol=1e-12)


def test_bound_scales_with_noise_power_units_and_order():
    targets, tx, rx, s = case(3, 3)
    C = crb(targets, tx, rx, s, 1.0)
    assert np.allclose(C, C.T) and np.linalg.eigvalsh(C)[0] > 0
    assert np.allclose(crb(targets, tx, rx, s, 3), 3 * C)
    assert np.allclose(crb(targets, tx, rx, 2j * s, 1.0), C / 4)
    assert np.allclose(crb(targets, 5 * tx, 5 * rx, s, 1.0, 5), C)
    shift = np.array([1.0, 2, 3])  # another origin is another phase of each target's coefficients
    phase = np.exp(-2j * np.pi * targets.unit_t() @ shift)
    assert np.allclose(crb(targets, tx + shift, rx, s * phase, 1.0), C)
    order = [2, 0, 1]
    rows = (8 * np.array(order)[:, None] + np.arange(8)).ravel()
    shuffled = crb(Targets.from_array(targets.as_array()[order]), tx, rx, s[:, order], 1.0)
    assert np.allclose(shuffled, C[np.ix_(rows, rows)])


def test_more_targets_never_help():
    targets, tx, rx, s = case(4, 2)
    alone = crb(Targets.from_array(targets.as_array()[:1]), tx, rx, s[:, :1], 1.0)
    assert np.linalg.eigvalsh(crb(targets, tx, rx, s, 1.0)[:8, :8] - alone)[0] > -1e-12


@pytest.mark.parametrize("change", [
    lambda x: x[[0, 0]], lambda x: x * [0, 1, 1, 1, 1, 1, 1, 1], lambda x: x * [1, 1, 0, 1, 1, 1, 1, 1],
    lambda x: x * [1, 1, 1, 1, 1, 1, 0, 1] + [0, 0, 0, 0, 0, 0, np.pi / 2, 0],
])
def test_scenes_without_a_bound_are_refused(change):
    targets, tx, rx, s = case(5, 2)
    with pytest.raises(np.linalg.LinAlgError, match="Fisher information is singular"):
        crb(Targets.from_array(change(targets.as_array())), tx, rx, s, 1.0)


def test_silent_target_has_no_bound():
    targets, tx, rx, s = case(6, 2)
    with pytest.raises(np.linalg.LinAlgError, match="Fisher information is singular"):
        crb(targets, tx, rx, s * [1, 0], 1.0)


@pytest.mark.parametrize("function", [crb, fisher_numeric])
@pytest.mark.parametrize(("change", "message"), [
    ({"noise_var": 0.0}, "noise_var must be positive"), ({"noise_var": np.nan}, "noise_var must be positive"),
    ({"tx": np.zeros((2, 3))}, "coincident elements"), ({"rx": np.zeros(3)}, r"positions must be \(M, 3\)"),
    ({"wavelength": 0}, "wavelength must be positive"), ({"s": np.ones((4, 3))}, r"s must be \(L, 2\)"),
    ({"s": np.ones((0, 2))}, r"s must be \(L, 2\)"),
])
def test_bad_inputs_are_rejected(function, change, message):
    targets, tx, rx, s = case(7, 2)
    good = {"targets": targets, "tx": tx, "rx": rx, "s": s, "noise_var": 1.0}
    with pytest.raises(ValueError, match=message):
        function(**good | change)


def test_inputs_are_not_changed():
    targets, tx, rx, s = case(8, 2)
    before = [a.copy() for a in (targets.as_array(), tx, rx, s)]
    crb(targets, tx, rx, s, 1.0), fisher_numeric(targets, tx, rx, s, 1.0)
    assert all(np.array_equal(a, b) for a, b in zip(before, (targets.as_array(), tx, rx, s), strict=True))


def test_direction_covariance_is_the_spread_of_the_unit_vectors():
    targets, tx, rx, s = case(9, 2)
    C = 1e-6 * crb(targets, tx, rx, s, 1.0)
    rng = np.random.default_rng(0)
    x = targets.as_array() + rng.multivariate_normal(np.zeros(16), C, 20_000).reshape(-1, 2, 8)
    u = np.concatenate([unit_vector(x[..., 0], x[..., 1]), unit_vector(x[..., 4], x[..., 5])], axis=-1)
    spread = np.var(u, axis=0).reshape(2, 2, 3).sum(-1)
    bound = direction_crb(C, targets).diagonal().reshape(2, 2, 2).sum(-1)
    assert np.allclose(spread, bound, rtol=0.06)


def test_position_bound_is_the_best_fit_of_both_rays():
    # independent: linear weighted least squares of the tangent coordinates, one target
    targets, tx, rx, s = case(10, 1)
    C = crb(targets, tx, rx, s, 0.1)
    x, rho = targets.as_array()[0], (40.0, 70.0)
    W = np.vstack([np.stack([(unit_vector(t + h, p) - unit_vector(t - h, p)) / (2 * h) / r,
                             (unit_vector(t, p + h) - unit_vector(t, p - h)) / (2 * h) / r / np.sin(t)])
                   for (t, p), r in zip((x[:2], x[4:6]), rho, strict=True) for h in (1e-5,)])
    want = np.linalg.inv(W.T @ np.linalg.inv(direction_crb(C, targets)) @ W)
    got = position_crb(C, targets, [rho[0]], [rho[1]])
    assert np.allclose(got, want, rtol=1e-6)
    assert np.allclose(position_crb(C, targets, [80.0], [140.0]), 4 * got)


def test_position_bound_of_several_targets_keeps_their_coupling():
    targets, tx, rx, s = case(11, 2)
    C = crb(targets, tx, rx, s, 0.1)
    P = position_crb(C, targets, [10.0, 20.0], [15.0, 12.0])
    assert P.shape == (6, 6) and np.linalg.eigvalsh(P)[0] > 0 and np.abs(P[:3, 3:]).max() > 0
    with pytest.raises(ValueError, match=r"ranges must be \(2,\) and positive"):
        position_crb(C, targets, [10.0, 0.0], [15.0, 12.0])
    with pytest.raises(ValueError, match=r"ranges must be \(2,\) and positive"):
        position_crb(C, targets, [10.0], [15.0])
    with pytest.raises(ValueError, match=r"covariance must be \(16, 16\)"):
        direction_crb(C[:8, :8], targets)


def test_direction_bound_rejects_bad_inputs():
    with pytest.raises(ValueError, match="sigma_u must be positive"):
        direction_bound(np.eye(3), 1.0, 1.0, -1.0)
    with pytest.raises(ValueError, match="theta out of range"):
        direction_bound(np.eye(3), -1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="coincident elements"):
        direction_bound(np.zeros((2, 3)), 1.0, 1.0, 0.1)


def test_pooled_errors_match_targets_and_turn_on_the_circle():
    targets = fixed_scene()
    x = targets.as_array()
    moved = x.copy()
    moved[:, 0] += 1e-3  # theta_t: squared length 1e-6 at one of two ends, over two axes
    moved[:, 3] += 2 * np.pi + 0.01  # eta_t: one of four polarisation angles
    got = pooled_errors(targets, [x[::-1], moved[[1, 2, 0]]])
    assert np.allclose(got, [[0, 0], [1e-6 / 4, 1e-4 / 4]], rtol=1e-5, atol=1e-20)


def test_pooled_bound_is_the_mean_of_the_diagonals():
    targets = fixed_scene()
    assert np.allclose(targets.as_array()[1, :4], np.deg2rad([20, 50, 22, 48]))
    C = np.diag(np.tile([1.0, 0, 2, 4, 0, 0, 6, 8], 3))
    assert np.allclose(pooled_bound(targets, C), [1 / 4, 20 / 4])


def test_over_bound_is_zero_at_the_bound_and_its_interval_covers():
    db, low, high = over_bound_db(np.full(10, 2.0), 2.0)
    assert (db, low, high) == (0.0, 0.0, 0.0)
    squared = np.random.default_rng(0).chisquare(1, 500) * 4
    db, low, high = over_bound_db(squared, 1.0)
    assert low < db < high and low < 10 * np.log10(4) < high


@pytest.mark.parametrize("fit", ["batched", "single"])
def test_estimates_reach_the_bound_at_high_snr(fit):
    squared, bound = monte_carlo(Targets.from_array(fixed_scene().as_array()[:2]), l_array(2.0), 20, 25, 12, fit)
    assert squared.shape == (12, 2)
    # 96 tangent errors: standard error 0.6 dB; gross errors or a wrong bound miss by far more
    assert abs(over_bound_db(squared[:, 0], bound[0])[0]) < 2
    assert abs(over_bound_db(squared[:, 1], bound[1])[0]) < 4


def test_study_rows_carry_measured_bound_and_the_worst_excess(monkeypatch):
    excess = {-20: 9.0, -15: 4.0, -10: 1.3, -5: 1.1, 0: 1.0, 10: 1.0, 20: 1.0}

    def drawn(targets, array, n_pulses, snr_db, n_trials, fit, rng):
        assert (n_pulses, n_trials, fit) == (100, 1500 if snr_db == -15 else 500, "single")
        bound = np.array([1e-6, 2e-6])
        return np.tile(bound * excess[snr_db], (8, 1)), bound

    monkeypatch.setattr(module, "monte_carlo", drawn)
    rows = {row["name"]: row for row in measure("cpu")}
    assert len(rows) == 15
    assert np.isclose(rows["rmse_over_crb"]["measured"], 10 * np.log10(1.3))
    assert rows["rmse_over_crb"]["snr_db"] == -10
    at_zero = rows["rmse direction 0 dB"]
    assert np.isclose(at_zero["measured"], at_zero["bound"]) and np.isclose(at_zero["bound"], np.rad2deg(1e-3))
    with pytest.raises(ValueError, match="this study runs on the CPU"):
        measure("cuda")
