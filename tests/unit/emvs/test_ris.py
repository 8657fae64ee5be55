"""Surface phases: certificates, relaxation, rounding, max-min, levels, batches."""
import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from collai.core.claims import load_results, save_results
from collai.emvs import ris
from collai.emvs.ris import batched_ris, measure, ris_cascade, ris_optimize, ris_upper_bound

QUICK = settings(deadline=None, derandomize=True, max_examples=25)
SIZES = st.tuples(st.integers(1, 14), st.integers(1, 6), st.integers(0, 10**6))


def channel(n, k, seed):
    """Independent complex normal entries."""
    return np.random.default_rng(seed).standard_normal((n, 2 * k)).view(complex)


def waves(n, k, seed):
    """Plane waves of modulus one on a line of half-wave pitch."""
    sines = np.random.default_rng(seed).uniform(-1, 1, k)
    return np.exp(1j * np.pi * np.outer(np.arange(n), sines))


# --- cascade -------------------------------------------------------------------------------------

def test_a_cascade_entry_is_the_phase_of_its_two_legs():
    panel, points, end = np.eye(3), np.array([[4.0, 5.0, 6.0], [1.0, -2.0, 3.0]]), np.array([9.0, 0, 1])
    v = beartype(ris_cascade)(panel, points, end, wavelength=0.7)
    for i in range(3):
        for k in range(2):
            path = np.linalg.norm(points[k] - panel[i]) + np.linalg.norm(panel[i] - end)
            assert np.isclose(v[i, k], np.exp(2j * np.pi * path / 0.7))


def test_free_space_amplitude_falls_with_both_distances():
    near, far = (ris_cascade([[0, 0, 0]], [[0, 0, d]], [0, 3, 0], 2.0, "free_space")[0, 0] for d in (5, 10))
    assert np.isclose(abs(near / far), 2) and np.isclose(abs(near), (2 / (4 * np.pi)) ** 2 / 15)


@pytest.mark.parametrize(("args", "text"), [
    (([[0, 0]], [[1, 1, 1]], [2, 2, 2]), r"positions must be \(M, 3\)"),
    (([[0, 0, 0]] * 2, [[1, 1, 1]], [2, 2, 2]), "coincident elements"),
    (([[0, 0, 0]], [[1, 1, 1]], [2, 2, 2], 0.0), "wavelength must be positive"),
    (([[0, 0, 0]], [1, 1, 1], [2, 2, 2]), r"points must be \(K, 3\)"),
    (([[0, 0, 0]], [[1, 1, np.nan]], [2, 2, 2]), r"points must be \(K, 3\)"),
    (([[0, 0, 0]], [[1, 1, 1]], [2, 2]), r"other must be \(3,\)"),
    (([[0, 0, 0]], [[1, 1, 1]], [2, 2, 2], 1.0, "flat"), "amplitude must be 'unit' or 'free_space', got 'flat'"),
    (([[0, 0, 0]], [[0, 0, 0]], [2, 2, 2], 1.0, "free_space"), "a point lies on an element"),
])
def test_bad_cascade_arguments_are_refused(args, text):
    with pytest.raises(ValueError, match=text):
        ris_cascade(*args)


# --- certificate ---------------------------------------------------------------------------------

@QUICK
@given(SIZES, st.floats(-3, 3))
def test_the_bound_is_the_dense_eigenvalue_bound_for_any_dual(size, shift):
    n, k, seed = size
    v, rng = channel(n, k, seed), np.random.default_rng(seed)
    w, y = rng.uniform(0.1, 2, k), rng.standard_normal(n) + shift
    form = v * w @ v.conj().T
    dense = y.sum() + n * max(0.0, np.linalg.eigvalsh(form - np.diag(y))[-1])
    bound = beartype(ris_upper_bound)(v, y, w)
    assert dense - 1e-11 * np.trace(form).real <= bound <= dense + 1e-9 * n * np.trace(form).real


@QUICK
@given(SIZES)
def test_no_phase_vector_beats_the_bound_and_the_solution_is_consistent(size):
    n, k, seed = size
    v = channel(n, k, seed)
    s = beartype(ris_optimize)(v, n_draws=20)
    omega = np.exp(2j * np.pi * np.random.default_rng(seed).random((n, 200)))
    assert np.sum(np.abs(v.conj().T @ omega) ** 2, axis=0).max() <= s.upper_bound
    assert np.allclose(np.abs(s.omega), 1) and np.allclose(s.gains, np.abs(v.conj().T @ s.omega) ** 2)
    assert s.value <= s.sdp_value * (1 + 1e-9) <= s.upper_bound * (1 + 2e-9)
    assert s.upper_bound / s.sdp_value - 1 < 1e-6 and s.value >= np.pi / 4 * s.upper_bound * (1 - 1e-6)
    assert s.upper_bound == ris_upper_bound(v, s.dual, s.weights)
    assert s.sdp_rank <= k and s.sdp_rank**2 <= max(n, 1)
    assert np.isclose(s.gap, (s.upper_bound - s.value) / s.value) and s.seconds > 0


@QUICK
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_one_target_is_solved_exactly_by_aligning(n, seed):
    v = channel(n, 1, seed)
    for objective in ("sum", "maxmin"):
        s = ris_optimize(v, objective=objective)
        assert np.isclose(s.value, np.abs(v).sum() ** 2, rtol=1e-9) and s.gap < 1e-9 and s.sdp_rank == 1


@QUICK
@given(st.integers(3, 60), st.integers(0, 10**6), st.floats(0.05, 1))
def test_two_targets_of_constant_modulus_are_tight(n, seed, weight):
    assert ris_optimize(waves(n, 2, seed), weights=[1, weight]).gap < 1e-6


def test_five_elements_and_three_equal_waves_are_not_tight():
    v = np.exp(1j * np.pi * np.outer(np.arange(5), [-0.4, 0.1, 0.5]))
    s = ris_optimize(v)
    levels = np.exp(2j * np.pi * np.arange(24) / 24)
    grid = np.array([np.ones(24**4), *(levels[i.ravel()] for i in np.indices((24,) * 4))])
    best = np.sum(np.abs(v.conj().T @ grid) ** 2, axis=0).max()
    assert best <= s.value * (1 + 1e-9) < s.sdp_value * 0.99 and s.upper_bound / s.sdp_value - 1 < 1e-6


def test_path_loss_makes_the_certificate_close():
    for seed in range(4):
        s = ris_optimize(ris._scene(256, 4, seed))
        assert s.gap < 1e-6 and s.sdp_rank == 1


def test_a_full_rank_channel_is_certified():
    s = ris_optimize(channel(80, 80, 3))
    assert s.upper_bound / s.sdp_value - 1 < 3e-10 and s.sdp_rank > 1


def test_phases_match_an_independent_local_search():
    v = channel(12, 3, 5)

    def loss(angle):
        omega = np.exp(1j * angle)
        z = v.conj().T @ omega
        return -np.sum(np.abs(z) ** 2), 2 * np.imag(omega.conj() * (v @ z)) * -1

    rng = np.random.default_rng(0)
    best = max(-minimize(loss, rng.uniform(0, 2 * np.pi, 12), jac=True).fun for _ in range(40))
    assert np.isclose(ris_optimize(v).value, best, rtol=1e-6)


def test_a_rank_that_is_too_small_is_raised(monkeypatch):
    monkeypatch.setattr(ris.math, "isqrt", lambda _: -1)
    v = channel(40, 40, 0)
    y, dual = ris._solve_sum(v, 1e-10, np.random.default_rng(0))
    value = np.linalg.norm(v.conj().T @ y) ** 2
    assert y.shape[1] > 1 and ris_upper_bound(v, dual) / value - 1 < 1e-6


# --- symmetries and edges ------------------------------------------------------------------------

def test_weights_are_scaled_columns_and_zero_weight_drops_a_target():
    v, w = channel(20, 3, 1), np.array([0.5, 2.0, 0.0])
    s, scaled = ris_optimize(v, weights=w), ris_optimize(v[:, :2] * np.sqrt(w[:2]))
    assert np.isclose(s.value, scaled.value) and np.isclose(s.value, w @ s.gains)
    assert np.array_equal(s.weights, w)


@pytest.mark.parametrize("options", [{}, {"objective": "maxmin"}, {"bits": 1}])
def test_the_unit_of_the_channel_does_not_matter(options):
    v = channel(15, 3, 2)
    a, b = (ris_optimize(c * v, **options) for c in (1, 2.0**-40))
    assert np.isclose(a.value, b.value * 2.0**80) and np.isclose(a.upper_bound, b.upper_bound * 2.0**80)


def test_an_element_that_sees_nothing_and_a_single_element_work():
    v = channel(8, 2, 4)
    v[3] = 0
    for objective in ("sum", "maxmin"):
        s, without = ris_optimize(v, objective=objective), ris_optimize(np.delete(v, 3, 0), objective=objective)
        assert np.isclose(s.value, without.value) and np.allclose(np.abs(s.omega), 1)
        assert np.isclose(s.upper_bound, without.upper_bound, rtol=1e-3)
    one = ris_optimize([[1.0, 2.0]])
    assert np.isclose(one.value, 5) and one.gap < 1e-9


def test_the_same_call_gives_the_same_phases_and_keeps_its_input():
    v = channel(30, 4, 6)
    before = v.copy()
    assert np.array_equal(ris_optimize(v).omega, ris_optimize(v).omega) and np.array_equal(v, before)
    assert np.isclose(ris_optimize(v, rng=np.random.default_rng(7)).value, ris_optimize(v, rng=7).value)


# --- max-min -------------------------------------------------------------------------------------

@settings(QUICK, max_examples=10)
@given(st.integers(4, 40), st.integers(2, 4), st.integers(0, 10**6))
def test_max_min_lies_between_random_phases_and_its_bound(n, k, seed):
    v = channel(n, k, seed)
    s = ris_optimize(v, objective="maxmin")
    omega = np.exp(2j * np.pi * np.random.default_rng(seed).random((n, 300)))
    assert (np.abs(v.conj().T @ omega) ** 2).min(axis=0).max() <= s.value * (1 + 1e-3)
    assert s.value == s.gains.min() <= s.upper_bound
    assert s.sdp_value <= s.upper_bound <= 1.02 * s.sdp_value
    assert np.isclose(s.weights.sum(), 1) and np.all(s.weights >= 0)


def test_max_min_of_two_orthogonal_beams_reaches_the_best_split():
    v = np.exp(2j * np.pi * np.outer(np.arange(256), [0, 37]) / 256)
    s = ris_optimize(v, objective="maxmin")
    assert np.allclose(s.gains, 4 / np.pi**2 * 256**2, rtol=2e-3) and np.isclose(s.upper_bound, 256**2 / 2, rtol=1e-4)


def test_max_min_gains_are_levelled_to_many_digits():
    s = ris_optimize(ris._scene(256, 2, 1), objective="maxmin")
    assert np.ptp(s.gains) < 1e-3 * s.value


def test_summed_power_starves_a_target_and_max_min_does_not():
    v = ris._scene(256, 3, 0, "unit")
    power, fair = (ris_optimize(v, objective=o) for o in ("sum", "maxmin"))
    assert power.gains.min() < 0.05 * 256**2 < 0.25 * 256**2 < fair.gains.min()
    assert power.gains.sum() > fair.gains.sum()


# --- levels --------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["sum", "maxmin"])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_quantised_phases_lie_on_levels_and_lose_little(bits, objective):
    v = ris._scene(144, 3, 1)
    s, free = ris_optimize(v, objective=objective, bits=bits), ris_optimize(v, objective=objective)
    level = np.angle(s.omega) * 2**bits / (2 * np.pi)
    assert np.allclose(level, np.round(level), atol=1e-9)
    assert 0.95 * np.sinc(2.0**-bits) ** 2 * free.value <= s.value <= s.upper_bound


def test_one_bit_reaches_the_best_of_all_sign_vectors_nearly():
    v = channel(10, 2, 9)
    signs = np.array(np.meshgrid(*[[1, -1]] * 10)).reshape(10, -1)
    best = np.sum(np.abs(v.conj().T @ signs) ** 2, axis=0).max()
    assert 0.9 * best <= ris_optimize(v, bits=1).value <= best * (1 + 1e-9)


# --- reference and refusals ----------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["sum", "maxmin"])
def test_cvxpy_solves_the_same_relaxation(objective):
    v = channel(10, 4, 11)
    ours, peer = (ris_optimize(v, objective=objective, solver=s) for s in ("lowrank", "cvxpy"))
    assert np.isclose(ours.sdp_value, peer.sdp_value, rtol=1e-3)
    assert np.isclose(ours.upper_bound, peer.upper_bound, rtol=1e-3)
    assert np.isclose(ours.value, peer.value, rtol=1e-2)


@pytest.mark.parametrize(("v", "options", "text"), [
    (np.ones(4), {}, r"V must be \(R, K\)"), (np.ones((0, 2)), {}, r"V must be \(R, K\)"),
    ([[1.0, np.inf]], {}, "V must be .* finite"), ([[1, 0], [1, 0]], {}, "zero cascade vector for target 1"),
    (np.ones((4, 2)), {"weights": [1, -0.5]}, "weights must be non-negative"),
    (np.ones((4, 2)), {"weights": [0, 0]}, "weights must be non-negative"),
    (np.ones((4, 2)), {"weights": [1]}, r"weights must be \(2,\)"),
    (np.ones((4, 2)), {"weights": [1, 1], "objective": "maxmin"}, "weights belong to objective 'sum'"),
    (np.ones((4, 2)), {"objective": "mean"}, "objective must be"),
    (np.ones((4, 2)), {"solver": "mosek"}, "solver must be"),
    (np.ones((65, 2)), {"solver": "cvxpy"}, "cvxpy reference limited to 64 elements"),
    (np.ones((4, 2)), {"bits": 0}, "bits must be >= 1"), (np.ones((4, 2)), {"bits": 2.0}, "bits must be >= 1"),
])
def test_bad_problems_are_refused(v, options, text):
    with pytest.raises(ValueError, match=text):
        ris_optimize(v, **options)


@pytest.mark.parametrize("dual", [np.ones(3), [np.nan] * 4])
def test_a_bad_dual_is_refused(dual):
    with pytest.raises(ValueError, match=r"dual must be \(4,\)"):
        ris_upper_bound(np.ones((4, 2)), dual)


# --- batches and measurement ---------------------------------------------------------------------

@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex64, 1e-5), (torch.complex128, 1e-9)])
def test_a_batch_finds_what_single_calls_find(dtype, tolerance):
    v = np.stack([ris._scene(64, 3, s) for s in range(5)])
    v[2, 7] = 0
    omega = beartype(batched_ris)(torch.as_tensor(v, dtype=dtype)).numpy()
    power = np.sum(np.abs(np.einsum("zrk,zr->zk", v.conj(), omega)) ** 2, axis=1)
    best = np.array([ris_optimize(c).value for c in v])
    assert omega.shape == (5, 64) and np.allclose(np.abs(omega), 1, atol=1e-5)
    assert np.all(np.abs(power / best - 1) < tolerance)


def test_a_batch_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"V must be \(Z, R, K\)"):
        batched_ris(torch.ones(3, 2, dtype=torch.complex64))


def test_measured_rows_go_into_a_results_file(tmp_path):
    rows = ris._measure_cpu((16,), 12, (4,), 1) + ris._measure_cuda("cpu", 64, 16, 1)
    save_results(tmp_path / "r.json", rows, "cpu", "test")
    stored = load_results(tmp_path / "r.json")["rows"]
    assert {"ris_16", "ris_fullrank_12", "ris_peer_4", "gpu_ris", "gpu_ris_batch"} <= set(stored)
    assert all(r["measured"] > 0 for r in stored.values())
    assert stored["ris_16"]["gap"] < 1e-6 and stored["gpu_ris"]["gap"] < 1e-6
    assert stored["gpu_ris_batch"]["largest_loss"] < 1e-4


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")
