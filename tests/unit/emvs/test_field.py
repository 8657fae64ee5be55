"""Properties, parity and bad inputs of collai.emvs.field."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from collai.emvs.field import (
    Recording,
    Targets,
    angles_from_unit,
    check_match,
    check_positions,
    check_rank,
    check_tensor,
    check_wavelength,
    coarse_std,
    complex_normal,
    emvs_matrix,
    emvs_response,
    l_array,
    load_geometry,
    load_iq,
    manifold,
    matched_filter,
    orthonormal_code,
    polarization_vector,
    poynting,
    random_array,
    save_iq,
    simulate,
    steering,
    swerling,
    unit_vector,
)

examples = settings(max_examples=20, deadline=None, derandomize=True)
elevation = st.floats(0, np.pi)
turn = st.floats(-10, 10)
auxiliary = st.floats(0, np.pi / 2)
EIGHT = np.array([[0.3, 1.0, 0.2, 2.0, 0.5, 1.5, 0.7, 1.0], [1.2, 4.0, 0.3, 1.0, 2.0, 0.2, 0.1, 3.0]])


def random_targets(rng, n):
    top = [np.pi, 2 * np.pi, np.pi / 2, 2 * np.pi] * 2
    return Targets.from_array(rng.uniform(0, 1, (n, 8)) * top)


@examples
@given(elevation, turn)
def test_angles_come_back_from_their_unit_vector(theta, phi):
    u = unit_vector(theta, phi)
    th, ph = angles_from_unit(3.5 * u)
    assert 0 <= th <= np.pi and 0 <= ph < 2 * np.pi
    assert np.allclose(unit_vector(th, ph), u, atol=1e-11)


@pytest.mark.parametrize(("u", "angles"), [
    ([0, 0, 1], (0, 0)), ([0, 0, -5], (np.pi, 0)), ([0, 1e-14, 1], (1e-14, 0)), ([-1, 0, 0], (np.pi / 2, np.pi)),
    ([1, -1e-300, 0], (np.pi / 2, 0)),
])
def test_poles_and_the_cut_have_a_fixed_name(u, angles):
    assert np.allclose(angles_from_unit(u), angles, atol=1e-13)


@examples
@given(elevation, turn, auxiliary, turn)
def test_response_is_the_rotated_dipole_of_a_plane_wave(theta, phi, gamma, eta):
    # independent way: build the wave along +z, then rotate the whole field
    turn_ = Rotation.from_euler("ZY", [phi, theta]).as_matrix()
    e = turn_ @ [np.sin(gamma) * np.exp(1j * eta), np.cos(gamma), 0]
    u = turn_ @ [0, 0, 1]
    b = emvs_response(theta, phi, gamma, eta)
    assert np.allclose(b, np.concatenate([e, np.cross(u, e)]), atol=1e-12)
    assert np.allclose(u, unit_vector(theta, phi), atol=1e-12)


@examples
@given(elevation, turn, auxiliary, turn, st.complex_numbers(min_magnitude=1e-3, max_magnitude=1e3))
def test_poynting_finds_the_direction_of_every_polarisation(theta, phi, gamma, eta, factor):
    b = factor * emvs_response(theta, phi, gamma, eta)
    assert np.allclose(poynting(b), unit_vector(theta, phi), atol=1e-12)


@examples
@given(elevation, turn, auxiliary, turn)
def test_sensor_matrix_is_orthogonal_and_gives_the_polarisation_back(theta, phi, gamma, eta):
    F, g = emvs_matrix(theta, phi), polarization_vector(gamma, eta)
    assert np.allclose(F.T @ F, 2 * np.eye(2), atol=1e-12)
    assert np.allclose(F.T @ emvs_response(theta, phi, gamma, eta) / 2, g, atol=1e-12)


def test_angle_functions_broadcast_and_accept_lists():
    assert unit_vector([[0.1], [0.2]], [1, 2, 3]).shape == (2, 3, 3)
    assert emvs_response([0.1, 0.2], 1, [[0.3]], 2).shape == (1, 2, 6)
    assert poynting(emvs_response([[0.1, 0.2]], 1, 0, 0)).shape == (1, 2, 3)
    assert steering([[0, 0, 0]], unit_vector([[0.1, 0.2]], 1)).shape == (1, 2, 1)
    assert manifold(np.eye(3), [0.1, 0.2], 1, 0.5, [1, 2]).shape == (18, 2)
    assert manifold(np.eye(3), 0.1, 1, 0.5, 1).shape == (18, 1)


def test_manifold_is_the_kronecker_product_element_by_element():
    rng = np.random.default_rng(0)
    p, x = rng.normal(size=(4, 3)), EIGHT[:, :4]
    C = manifold(p, *x.T, wavelength=0.3)
    for k in range(2):
        a = np.exp(2j * np.pi / 0.3 * p @ unit_vector(*x[k, :2]))
        assert np.allclose(C[:, k], np.kron(a, emvs_response(*x[k])))
    assert np.allclose(C, manifold(p / 0.3, *x.T))


def test_targets_keep_order_copy_and_freeze():
    source = EIGHT.copy()
    t = Targets.from_array(source)
    source[:] = 0
    assert len(t) == 2
    assert np.array_equal(t.as_array(), EIGHT)
    assert np.array_equal(t.eta_r, EIGHT[:, 7])
    assert np.allclose(t.unit_t(), unit_vector(EIGHT[:, 0], EIGHT[:, 1]))
    assert np.allclose(t.unit_r(), unit_vector(EIGHT[:, 4], EIGHT[:, 5]))
    with pytest.raises(AttributeError):
        t.theta_t = np.zeros(2)


@examples
@given(st.integers(0, 1000), st.integers(1, 6))
def test_match_undoes_any_permutation_under_small_errors(seed, n):
    rng = np.random.default_rng(seed)
    t = random_targets(rng, n)
    x = t.as_array()
    perm = rng.permutation(n)
    noisy = x[perm] + 1e-7 * rng.normal(size=(n, 8))
    noisy[:, [0, 4]] = np.clip(noisy[:, [0, 4]], 0, np.pi)
    noisy[:, [2, 6]] = np.clip(noisy[:, [2, 6]], 0, np.pi / 2)
    order = t.match(Targets.from_array(noisy))
    assert np.abs(noisy[order] - x).max() < 1e-5


def test_match_uses_polarisation_when_directions_agree():
    x = EIGHT[[0, 0]].copy()
    x[1, 2] = 1.3
    assert Targets.from_array(x).match(Targets.from_array(x[::-1])).tolist() == [1, 0]


@pytest.mark.parametrize(("change", "message"), [
    ({0: -0.1}, "theta out of range"), ({4: 3.2}, "theta out of range"), ({2: 2.0}, "gamma out of range"),
    ({6: np.nan}, "gamma out of range"), ({1: np.inf}, "phi out of range"), ({3: [[1, 2]]}, r"eta_t must be \(K,\)|must be \(K,\)"),
])
def test_targets_reject_angles_out_of_range(change, message):
    angles = [change.get(i, 0.5) for i in range(8)]
    with pytest.raises(ValueError, match=message):
        Targets(*angles)


def test_match_rejects_another_number_of_targets():
    t = Targets.from_array(EIGHT)
    with pytest.raises(ValueError, match="cannot match 2 targets with 1"):
        t.match(Targets.from_array(EIGHT[:1]))


@examples
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.floats(-30, 30))
def test_simulated_tensor_is_the_sum_of_rank_one_terms_at_the_exact_snr(seed, m, n, pulses, snr_db):
    rng = np.random.default_rng(seed)
    t, tx, rx = random_targets(rng, 2), rng.normal(size=(m, 3)), rng.normal(size=(n, 3))
    seen = simulate(t, tx, rx, pulses, snr_db, rng=seed, gains=[2, 0.5j])
    loop = sum(np.multiply.outer(np.multiply.outer(seen.Ct[:, k], seen.Cr[:, k]), seen.s[:, k]) for k in range(2))
    assert seen.tensor.shape == (6 * m, 6 * n, pulses)
    assert np.allclose(seen.clean, loop)
    assert np.isclose(10 * np.log10(np.mean(np.abs(seen.clean) ** 2) / seen.noise_var), snr_db)
    assert np.array_equal(seen.tensor, simulate(t, tx, rx, pulses, snr_db, rng=seed, gains=[2, 0.5j]).tensor)


def test_noise_has_the_stated_variance_and_is_circular():
    t = Targets.from_array(EIGHT)
    seen = simulate(t, np.eye(3), np.eye(3), 200, 0.0, rng=1)
    noise = (seen.tensor - seen.clean) / np.sqrt(seen.noise_var)
    assert abs(np.mean(np.abs(noise) ** 2) - 1) < 6 / np.sqrt(noise.size)
    assert abs(np.mean(noise**2)) < 6 / np.sqrt(noise.size)


def test_noise_free_data_and_given_coefficients_are_exact():
    t, s = Targets.from_array(EIGHT), np.arange(6).reshape(3, 2) + 1j
    seen = simulate(t, np.eye(3), np.eye(3)[:2], 3, s=s)
    assert seen.noise_var == 0 and np.array_equal(seen.tensor, seen.clean) and np.array_equal(seen.s, s)
    assert seen.tensor is not seen.clean


def test_gains_multiply_the_coefficients_and_the_data():
    t = Targets.from_array(EIGHT[:1])
    plain, lifted = (simulate(t, np.eye(3), np.eye(3), 4, gains=g, rng=2) for g in (None, [3j]))
    assert np.allclose(lifted.s, 3j * plain.s) and np.allclose(lifted.clean, 3j * plain.clean)


def test_fresh_entropy_differs_between_calls():
    t = Targets.from_array(EIGHT)
    a, b = (simulate(t, np.eye(3), np.eye(3), 2).s for _ in range(2))
    assert not np.array_equal(a, b)


def test_swerling_one_is_constant_up_to_its_doppler():
    s = swerling(30, 2, doppler=[0.25, 0], rng=0)
    assert np.allclose(s[1:, 0] / s[:-1, 0], 1j) and np.allclose(s[:, 1], s[0, 1])
    with pytest.raises(ValueError, match=r"doppler must be \(2,\)"):
        swerling(30, 2, doppler=[0.1])
    with pytest.raises(ValueError, match="n_targets must be a positive integer"):
        swerling(30, True)


@pytest.mark.parametrize(("bad", "message"), [
    ({"tx": [[0, 0]]}, r"positions must be \(M, 3\)"), ({"rx": np.zeros((2, 3))}, "coincident elements 0 and 1"),
    ({"tx": [[0, 0, np.nan]]}, r"positions must be \(M, 3\)"), ({"wavelength": -1}, "wavelength must be positive"),
    ({"n_pulses": 1.5}, "n_pulses must be a positive integer"), ({"s": np.ones(3)}, r"s must be \(4, 2\)"),
    ({"gains": 1}, r"gains must be \(2,\)"),
])
def test_simulate_rejects_bad_inputs(bad, message):
    good = {"targets": Targets.from_array(EIGHT), "tx": np.eye(3), "rx": np.eye(3), "n_pulses": 4}
    with pytest.raises(ValueError, match=message):
        simulate(**good | bad)


@pytest.mark.parametrize(("X", "rank", "arrays", "message"), [
    (np.ones((6, 6)), 1, (), r"tensor must be 3-D \(6M, 6N, L\)"),
    (np.ones((6, 6, 0)), 1, (), r"tensor must be 3-D \(6M, 6N, L\)"),
    (np.ones((6, 12, 3)), 0, (np.eye(3)[:1], np.eye(3)[:1]), r"tensor shape \(6, 12, 3\) does not match"),
    (np.full((6, 6, 3), np.inf), 0, (), "tensor contains non-finite values"),
    (np.ones((6, 6, 3)), 0, (), "rank must be a positive integer"),
    (np.ones((6, 6, 3)), True, (), "rank must be a positive integer"),
    (np.ones((6, 6, 3)), 2.0, (), "rank must be a positive integer"),
    (np.ones((6, 6, 1)), 2, (), "not identifiable: one pulse cannot separate 2"),
    (np.ones((2, 2, 3)), 3, (), "not identifiable: rank 3"),
])
def test_tensor_check_rejects_in_order(X, rank, arrays, message):
    with pytest.raises(ValueError, match=message):
        check_tensor(X, rank, *arrays)


def test_checks_pass_good_input_without_copying_or_changing_it():
    X = np.ones((6, 6, 3), complex)
    assert check_tensor(X, 2, [[0, 0, 0]], [[1, 0, 0]]) is X
    assert check_tensor(np.ones((6, 6, 3), int), 1).dtype == complex
    assert check_match((6, 6, 1), [[0, 0, 0]], [[0, 0, 0]]) is None
    assert check_match((6, 6, 1), np.array(3), [[0, 0, 0]]) is None  # not an array of positions: the next check says so
    assert check_rank(np.int64(2)) == 2 and check_rank(1, (6, 6, 1)) == 1
    p = [[0.0, 0, 0], [0, 0, 1e-9]]
    assert check_positions(p).shape == (2, 3) and check_wavelength(2) == 2.0


@pytest.mark.parametrize(("call", "message"), [
    (lambda: unit_vector(4, 0), "theta out of range"), (lambda: emvs_matrix(-1, 0), "theta out of range"),
    (lambda: polarization_vector(-0.1, 0), "gamma out of range"), (lambda: angles_from_unit([1, 2]), "directions must be"),
    (lambda: angles_from_unit([0, 0, 0]), "directions must be non-zero"), (lambda: steering(np.eye(3), 1.0), "directions must be"),
    (lambda: poynting(np.ones(5)), "responses must be"), (lambda: poynting(np.zeros(6)), "power flow is zero"),
    (lambda: coarse_std(0, 1, 1, 0), "n_tx must be a positive integer"), (lambda: check_wavelength(np.nan), "wavelength must be positive"),
    (lambda: orthonormal_code(6, 5), "length must be at least"), (lambda: orthonormal_code(6, 12), "power of two"),
    (lambda: orthonormal_code(6, 8, "walsh"), "kind must be"), (lambda: matched_filter(np.ones((6, 8)), np.ones((6, 8))), "received must be"),
    (lambda: matched_filter(np.ones((6, 8, 1)), np.ones((6, 8))), "waveforms must be orthonormal"),
])
def test_functions_reject_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_coarse_std_is_the_error_of_a_rank_one_fit():
    rng = np.random.default_rng(3)
    t, tx, rx = random_targets(rng, 1), rng.normal(size=(3, 3)), rng.normal(size=(2, 3))
    one = simulate(t, tx, rx, 8, 20.0, rng=rng)
    X = one.clean + np.sqrt(one.noise_var) * complex_normal((1500, *one.clean.shape), rng)
    Y = X.reshape(1500, 18, -1)
    factor = np.linalg.eigh(Y @ Y.conj().swapaxes(1, 2))[1][..., -1]
    b = np.linalg.svd(factor.reshape(-1, 3, 6), full_matrices=False)[2][:, 0]
    error = (poynting(b) - t.unit_t()) @ emvs_matrix(t.theta_t, t.phi_t)[0, :3]
    assert np.abs(np.sqrt((error**2).mean(0)) / coarse_std(3, 2, 8, 20.0) - 1).max() < 0.09


@pytest.mark.parametrize("kind", ["hadamard", "dft"])
def test_matched_filter_inverts_the_waveforms_and_keeps_noise_white(kind):
    rng = np.random.default_rng(4)
    W = orthonormal_code(12, 16, kind)
    assert np.allclose(np.abs(W), 0.25)
    Y = complex_normal((12, 6, 5), rng)
    assert np.allclose(matched_filter(np.einsum("mnl,mp->npl", Y, W), W), Y)
    # the filter as a matrix on one pulse: rows are orthonormal, so the noise covariance stays a multiple of I
    basis = np.eye(16).reshape(1, 16, 16)
    A = matched_filter(basis, W)[:, 0]
    assert np.allclose(A @ A.conj().T, np.eye(12))


def test_npz_recordings_come_back_exactly(tmp_path):
    rng = np.random.default_rng(5)
    W, iq = orthonormal_code(12, 16), complex_normal((6, 16, 5), rng)
    full = Recording(matched_filter(iq, W), iq, W, np.eye(3)[:2], np.eye(3)[:1], 0.1)
    save_iq(tmp_path / "a.npz", full)
    back = load_iq(str(tmp_path / "a.npz"))
    for name, value in vars(full).items():
        assert np.array_equal(getattr(back, name), value), name
    np.savez(tmp_path / "b.npz", iq=iq, waveforms=W, tx=full.tx, rx=full.rx)
    assert np.allclose(load_iq(tmp_path / "b.npz").tensor, full.tensor)
    assert load_iq(tmp_path / "b.npz").wavelength == 1.0
    np.savez(tmp_path / "c.npz", tensor=full.tensor, tx=full.tx, rx=full.rx, wavelength=0.1)
    assert load_iq(tmp_path / "c.npz").iq is None


def test_sigmf_recordings_come_back_to_half_a_step(tmp_path):
    iq = complex_normal((12, 10, 3), np.random.default_rng(6)) * 1e-4
    save_iq(tmp_path / "r.sigmf-meta", Recording(None, iq, None, None, np.eye(3)[:2], 0.125))
    back = load_iq(tmp_path / "r.sigmf-data")
    step = max(np.abs(iq.real).max(), np.abs(iq.imag).max()) / 32767
    assert max(np.abs((back.iq - iq).real).max(), np.abs((back.iq - iq).imag).max()) <= 0.51 * step
    assert back.wavelength == 0.125 and back.tx is None and back.tensor is None
    assert (tmp_path / "r.sigmf-data").stat().st_size == 12 * 10 * 3 * 4


def test_foreign_sigmf_uses_the_carrier_and_one_pulse(tmp_path):
    raw = np.arange(2 * 6 * 4, dtype="<i2")
    raw.tofile(tmp_path / "f.sigmf-data")
    head = {"core:datatype": "ci16_le", "core:num_channels": 6, "emvs:rx": [[0, 0, 0]]}
    meta = {"global": head, "captures": [{"core:frequency": 3e9}]}
    (tmp_path / "f.sigmf-meta").write_text(json.dumps(meta))
    back = load_iq(tmp_path / "f.sigmf-meta")
    assert back.iq.shape == (6, 4, 1) and np.isclose(back.wavelength, 0.0999308)
    assert back.iq[1, 0, 0] * 2**15 == 2 + 3j and back.iq[0, 1, 0] * 2**15 == 12 + 13j


@pytest.mark.parametrize(("change", "message"), [
    ({"core:datatype": "cf32_le"}, "only ci16_le recordings"), ({"core:num_channels": 3}, "recording has 3 channels"),
    ({"emvs:samples_per_pulse": 3}, "4 samples are no whole number of pulses of 3"),
])
def test_sigmf_descriptions_that_disagree_are_rejected(tmp_path, change, message):
    np.zeros(48, "<i2").tofile(tmp_path / "f.sigmf-data")
    head = {"core:datatype": "ci16_le", "core:num_channels": 6, "emvs:rx": [[0, 0, 0]], "emvs:wavelength": 1.0}
    (tmp_path / "f.sigmf-meta").write_text(json.dumps({"global": head | change}))
    with pytest.raises(ValueError, match=message):
        load_iq(tmp_path / "f.sigmf-data")


@pytest.mark.parametrize(("entries", "message"), [
    ({"rx": np.eye(3)}, "recording needs `rx` and"), ({"tensor": np.ones((6, 6, 1))}, "recording needs `rx` and"),
    ({"tensor": np.ones((6, 6, 1)), "rx": np.eye(3)[:1]}, "recording with a transmitter needs `tx`"),
    ({"tensor": np.ones((6, 6, 1)), "rx": np.eye(3), "tx": np.eye(3)}, "tensor shape .* does not match"),
    ({"iq": np.ones((6, 4)), "rx": np.eye(3)[:1]}, r"iq must be \(6, P, L\)"),
    ({"iq": np.ones((6, 4, 1)), "rx": np.eye(3)[:1], "wavelength": 0}, "wavelength must be positive"),
])
def test_incomplete_recordings_are_rejected(tmp_path, entries, message):
    np.savez(tmp_path / "x.npz", **entries)
    with pytest.raises(ValueError, match=message):
        load_iq(tmp_path / "x.npz")


def test_unknown_files_are_rejected(tmp_path):
    record = Recording(np.ones((6, 6, 1)), None, None, np.eye(3)[:1], np.eye(3)[:1], 1.0)
    with pytest.raises(ValueError, match=r"recording must be \.npz"):
        load_iq(tmp_path / "x.wav")
    with pytest.raises(ValueError, match=r"recording must be \.npz"):
        save_iq(tmp_path / "x.wav", record)
    with pytest.raises(ValueError, match="SigMF files hold receive-only recordings"):
        save_iq(tmp_path / "x.sigmf-data", record)
    with pytest.raises(FileNotFoundError):
        load_iq(tmp_path / "none.npz")


@pytest.mark.parametrize(("text", "positions", "wavelength"), [
    ("x,y,z\n0,0,0\n1,0,0.5\n", [[0, 0, 0], [1, 0, 0.5]], 1.0),
    ("# two elements\nwavelength, 0.03\n\nZ, name, X, Y\n1,a,2,3\n4,b,5,6\n", [[2, 3, 1], [5, 6, 4]], 0.03),
])
def test_geometry_files_are_read(tmp_path, text, positions, wavelength):
    (tmp_path / "g.csv").write_text(text)
    p, w = load_geometry(tmp_path / "g.csv")
    assert np.array_equal(p, positions) and w == wavelength


@pytest.mark.parametrize(("text", "message"), [
    ("", "geometry file needs columns x, y, z"), ("0,0,0\n", "geometry file needs columns x, y, z"),
    ("x,y,z\n1,2\n", "rows without 3 values"), ("x,y,z\n1,2,a\n", "could not convert"),
    ("x,y,z\n", r"positions must be \(M, 3\)"), ("wavelength,0\nx,y,z\n0,0,0\n", "wavelength must be positive"),
    ("wavelength\nx,y,z\n0,0,0\n", "could not convert"),
])
def test_bad_geometry_files_are_rejected(tmp_path, text, message):
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_geometry(tmp_path / "g.csv")


def test_lists_and_scalars_are_accepted_everywhere(tmp_path):
    p, x = [[0, 0, 0], [0, 0, 1]], [0.3, 1, 0.2, 2, 0.5, 1.5, 0.7, 1]
    seen = simulate(Targets(*x), p, p, 4, 10, 1, s=[[1]] * 4, gains=[1], rng=1)
    assert np.allclose(manifold(p, *x[:4]), seen.Ct)
    assert np.array_equal(check_tensor(seen.tensor.tolist(), 1, p, p), seen.tensor)
    assert np.allclose(steering(p, unit_vector(0.3, 1).tolist(), 1), seen.Ct[::6, 0] / seen.Ct[0, 0])
    assert np.allclose(poynting(emvs_response(*x[:4]).tolist()), unit_vector(0.3, 1))
    assert check_positions(p).dtype == float
    code = orthonormal_code(12, 16)
    sent = np.einsum("mnl,mp->npl", seen.tensor, code)
    assert np.allclose(matched_filter(sent.tolist(), code.tolist()), seen.tensor)
    save_iq(str(tmp_path / "a.npz"), Recording(seen.tensor, None, None, np.array(p), np.array(p), 1))
    assert np.array_equal(load_iq(str(tmp_path / "a.npz")).tensor, seen.tensor)


def test_inputs_are_never_changed():
    rng = np.random.default_rng(7)
    arrays = [rng.normal(size=(2, 3)), complex_normal((3, 2), rng), np.ones(2), complex_normal((12, 16, 1), rng)]
    before = [a.copy() for a in arrays]
    p, s, gains, received = arrays
    simulate(Targets.from_array(EIGHT), p, p, 3, 0.0, s=s, gains=gains, rng=rng)
    matched_filter(received, orthonormal_code(6, 16))
    poynting(received[:6, :6, 0]), angles_from_unit(p), check_tensor(received, 1)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_l_array_has_its_corner_and_spacing():
    p = l_array(2.0)
    assert p.shape == (6, 3) and np.array_equal(p.max(axis=0), [6, 4, 0])
    assert np.isclose(np.linalg.norm(p[:, None] - p[None], axis=-1)[np.triu_indices(6, 1)].min(), 2)


def test_random_arrays_keep_their_distance():
    p = random_array(8, 0.5, np.random.default_rng(0))
    gap = np.linalg.norm(p[:, None] - p, axis=2)[np.triu_indices(8, 1)]
    assert p.shape == (8, 3) and gap.min() >= 0.5


def test_complex_and_flat_positions_are_refused():
    with pytest.raises(ValueError, match=r"positions must be \(M, 3\) and real"):
        check_positions(1j * np.eye(3))
    check_match((6, 6, 2), np.zeros(3), np.zeros((1, 3)))  # left to check_positions, which says what is wrong


def test_pulses_that_are_not_finite_are_refused():
    targets = Targets.from_array(np.full((1, 8), 0.5))
    with pytest.raises(ValueError, match="s must be finite"):
        simulate(targets, np.eye(3), np.eye(3), 2, s=[[np.nan], [1.0]])
