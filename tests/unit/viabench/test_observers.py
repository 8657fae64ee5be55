"""Properties, parity and bad inputs of collai.viabench.observers."""
import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

from collai.core.claims import measure_main
from collai.eval.llm import TokenUsage, fingerprint
from collai.viabench import observers as module
from collai.viabench.families import FAMILIES, RULES
from collai.viabench.generator import Canvas, draw
from collai.viabench.observers import (
    BlurObserver,
    CentroidObserver,
    MotionObserver,
    ODOGObserver,
    PixelOracle,
    Reply,
    TiltObserver,
    odog,
    odog_batch,
)

RESULTS = Path(__file__).parents[3] / "nbs" / "viabench" / "results"
OBSERVERS = (PixelOracle, ODOGObserver, CentroidObserver, BlurObserver, TiltObserver, MotionObserver)
few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def picture(seed, n=32):
    return np.random.default_rng(seed).random((n, n))


def direct_odog(image, extent):
    """The definition, written out: 42 filters, padding by one half, 'valid' convolutions."""
    n = len(image)
    x, y = np.meshgrid(np.linspace(-extent / 2, extent / 2, n), np.linspace(-extent / 2, extent / 2, n))

    def gauss(sx, sy, t):
        a = np.cos(t) ** 2 / (2 * sx**2) + np.sin(t) ** 2 / (2 * sy**2)
        b = -np.sin(2 * t) / (4 * sx**2) + np.sin(2 * t) / (4 * sy**2)
        c = np.sin(t) ** 2 / (2 * sx**2) + np.cos(t) ** 2 / (2 * sy**2)
        g = np.exp(-(a * x**2 + 2 * b * x * y + c * y**2))
        return g / g.sum()

    sigmas = [3 / math.sqrt(2) * 2.0**k for k in range(-6, 1)]
    raw = [(1 / (4 * s * math.sqrt(2 * math.log(2)))) ** 0.1 for s in sigmas]
    weights = [round(w / raw[3], 5) for w in raw]
    padded = np.pad(image, (n // 2 - 1, n // 2), constant_values=0.5)
    total = np.zeros((n, n))
    for turn in np.deg2rad([0, 30, 60, 90, 120, 150]):
        part = sum(w * fftconvolve(padded, gauss(s, s, turn) - gauss(s, 2 * s, turn), "valid")
                   for w, s in zip(weights, sigmas, strict=True))
        rms = np.sqrt(np.mean(part**2))
        total += part / rms if rms > 0 else 0
    return total


def published(name):
    with np.load(RESULTS / "rhs2007.npz") as stored:
        i = list(stored["names"]).index(name)
        return stored["images"][i] / 2, stored["masks"][i]


def effect(name, predict):
    image, mask = published(name)
    brightness = predict(image)
    return brightness[mask == 1].mean() - brightness[mask == 2].mean()


# ------------------------------------------------------------------ ODOG
@pytest.mark.parametrize(("n", "extent"), [(32, 32.0), (50, 8), (64, 3.5)])
def test_six_kernels_equal_forty_two_filters(n, extent):
    image = picture(n, n)
    wanted = direct_odog(image, extent)
    assert np.abs(odog(image, extent) - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_published_pictures_equal_the_definition_and_white_has_its_known_value():
    image, _ = published("WE_thick")
    wanted = direct_odog(image, 32.0)
    assert np.abs(odog(image) - wanted).max() <= 1e-12 * np.abs(wanted).max()
    assert effect("WE_thick", odog) == pytest.approx(4.8960, abs=5e-5)


def test_white_contrast_and_todorovic_go_the_way_people_see_them():
    assert effect("WE_thin_wide", odog) > 1 and effect("sbc_large", odog) > 5 and effect("todorovic_in_large", odog) < -1


@given(seeds, st.floats(0.01, 20.0))
@few
def test_contrast_has_no_effect_and_polarity_turns_the_sign(seed, alpha):
    image = picture(seed)
    brightness = odog(image)
    bound = 1e-11 * np.abs(brightness).max()
    assert np.abs(odog(0.5 + alpha * (image - 0.5)) - brightness).max() <= bound
    assert np.abs(odog(1 - image) + brightness).max() <= bound


@given(seeds)
@few
def test_transposing_the_picture_transposes_the_result(seed):
    image = picture(seed)
    assert np.allclose(odog(np.ascontiguousarray(image.T)), odog(image).T, atol=1e-11)


def test_every_orientation_has_unit_power_where_it_sees_something():
    image = picture(3, 64)
    parts = [module.fft.irfft2(module.fft.rfft2(image - 0.5, (96, 96)) * one, (96, 96))[:64, :64]
             for one in module._spectra(64, 32.0)[1]]
    whole = sum(part / np.sqrt(np.mean(part**2)) for part in parts)
    assert len(parts) == 6 and np.allclose(whole, odog(image), atol=1e-12)


def test_grey_gives_zero_a_coarse_grid_is_finite_and_the_input_stays():
    grey = np.full((32, 32), 0.5)
    assert not odog(grey).any() and np.isfinite(odog(picture(1), 1e6)).all()
    image = picture(2)
    before = image.copy()
    odog(image)
    assert (image == before).all() and (odog(image) == odog(before)).all()
    assert odog(image.astype(np.float32)).dtype == np.float64


def test_large_pictures_leave_no_kernels_behind(monkeypatch):
    made = []
    monkeypatch.setattr(module, "_kernels", lambda n, extent: made.append(n) or np.zeros((6, n, n)))
    before = module._spectra.cache_info().currsize
    odog(np.full((1026, 1026), 0.5, np.float32), 31.0)
    assert made == [1026] and module._spectra.cache_info().currsize == before


BAD = [(np.zeros((32, 34)), "image must be square, got shape (32, 34)"), (np.zeros((33, 33)), "n must be even and >= 32, got 33"),
       (np.zeros((30, 30)), "n must be even and >= 32, got 30"), (np.zeros(32), "image must have 2 dimensions, got shape (32,)"),
       (np.zeros((1, 32, 32)), "image must have 2 dimensions, got shape (1, 32, 32)"),
       (np.full((32, 32), np.nan), "image must be finite, got nan at row 0, column 0")]


@pytest.mark.parametrize(("image", "text"), BAD)
def test_odog_says_what_is_wrong_with_a_picture(image, text):
    with pytest.raises(ValueError) as error:
        odog(image)
    assert str(error.value) == text


@pytest.mark.parametrize("extent", [0, -1.0, math.inf, math.nan])
def test_an_extent_must_be_a_positive_number(extent):
    for call in (lambda: odog(picture(0), extent), lambda: odog_batch(picture(0)[None], extent)):
        with pytest.raises(ValueError, match="extent_deg must be a finite number > 0, got"):
            call()


# ------------------------------------------------------------------ batch
@given(seeds, st.integers(1, 5), st.sampled_from([32, 36, 64]))
@few
def test_a_batch_equals_single_pictures(seed, count, n):
    images = np.stack([picture(seed + i, n) for i in range(count)])
    images[0] = 0.5 + 0.003 * (images[0] - 0.5)  # faint
    wanted = np.stack([odog(one) for one in images])
    double = odog_batch(images)
    assert double.dtype == torch.float64 and np.abs(double.numpy() - wanted).max() < 1e-10
    single = odog_batch(torch.as_tensor(images, dtype=torch.float32))
    wanted = np.stack([odog(one) for one in images.astype(np.float32).astype(float)])
    assert single.dtype == torch.float32 and np.abs(single.numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_grey_picture_stays_zero_beside_a_strong_one_and_empty_batches_work():
    both = odog_batch(np.stack([np.full((32, 32), 0.5), picture(5)]).astype(np.float32))
    assert not both[0].any() and both[1].any()
    assert odog_batch(torch.zeros(0, 32, 32)).shape == (0, 32, 32)


def test_chunks_do_not_change_a_batch(monkeypatch):
    images = np.stack([picture(i) for i in range(7)])
    whole = odog_batch(images)
    monkeypatch.setattr(module, "_ROOM", {"cuda": 1, "cpu": 1})  # one pair at a time
    assert torch.allclose(odog_batch(images, device="cpu"), whole, atol=1e-12)


def test_the_fused_steps_fall_back_to_torch_without_triton(monkeypatch):
    module._compiled.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert module._compiled() is None
    module._compiled.cache_clear()
    images = torch.as_tensor(picture(0, 64)[None])
    spectra = module._device_spectra(64, 32.0, "cpu", True)
    monkeypatch.setattr(module, "_compiled", lambda: None)
    assert torch.equal(module._run_pairs(images, spectra, 1, True), module._run_pairs(images, spectra, 1, False))


def test_a_batch_says_what_is_wrong_with_it():
    for images, text in ((np.zeros((32, 32)), "image must have 3 dimensions, got shape (32, 32)"),
                         (np.zeros((2, 32, 33)), "image must be square, got shape (2, 32, 33)"),
                         (np.zeros((2, 31, 31)), "n must be even and >= 32, got 31"),
                         (np.zeros((2, 32, 32), np.int64), "image must hold floats in [0, 1], got dtype int64"),
                         (np.stack([picture(0), np.full((32, 32), np.nan)]), "images must be finite, image 1 is not")):
        with pytest.raises(ValueError) as error:
            odog_batch(images)
        assert str(error.value) == text
    with pytest.raises(ValueError, match="image must hold floats"):
        odog(np.zeros((32, 32), np.uint8))


# ------------------------------------------------------------------ replies, oracle
def test_a_reply_is_frozen_and_holds_what_was_said():
    reply = Reply("B.", "B", TokenUsage(3, 1), 0.5)
    assert (reply.text, reply.letter, reply.usage.prompt_tokens, reply.seconds) == ("B.", "B", 3, 0.5)
    assert Reply("?", None).usage is None
    with pytest.raises(FrozenInstanceError):
        reply.letter = "A"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_is_right_on_every_family(name):
    family, oracle = FAMILIES[name], PixelOracle()
    for i, delta in enumerate((family.delta_grid[0], 0, family.delta_grid[-1])):
        shown = draw(family, strength=(1.0, 0.5, 0.0)[i], delta=delta, seed=11 * i + 1, size=256)
        assert oracle.answer(shown, "", shown.options).letter == shown.answer


def test_the_oracle_never_reads_the_truth_and_follows_the_order_of_the_options():
    shown = draw(FAMILIES["ebbinghaus"], delta=0.1, seed=4, size=128)
    blank = replace(shown, answer="", illusion_answer=None, truth={}, delta=0.0, strength=0.0)
    assert PixelOracle().answer(blank, "x", shown.options).letter == shown.answer
    turned = shown.options[1:] + shown.options[:1]
    letter = PixelOracle().answer(shown, "", turned).letter
    assert turned["ABCD".index(letter)] == shown.options["ABCD".index(shown.answer)]
    assert PixelOracle().answer(shown, "", ["yes", "Not Sure"]).letter == "B"
    unsure = PixelOracle().answer(shown, "", ["yes", "no"])
    assert (unsure.text, unsure.letter) == ("", None)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_a_bare_picture_needs_its_stimulus(kind):
    shown = draw(FAMILIES["white"], delta=0.1, seed=2, size=128)
    assert kind([shown]).answer(shown.image, "", shown.options).letter == kind().answer(shown, "", shown.options).letter
    with pytest.raises(ValueError, match="needs the masks: pass the stimulus"):
        kind().answer(shown.image, "", shown.options)


def item(family, image, **masks):
    return SimpleNamespace(family=family, image=image, masks=masks, seed=0, category=FAMILIES[family].category)


def boxes(n=64):
    a, b = np.zeros((2, n, n), bool)
    a[10:13, 5:25], b[30:33, 5:35] = True, True
    image = np.full((n, n, 3), 200, np.uint8)
    image[a | b] = (10, 20, 30)
    return image, a, b


def test_lengths_areas_colours_and_directions_are_measured_in_the_picture():
    image, a, b = boxes()
    oracle = PixelOracle()
    assert oracle.percept(item("mueller_lyer", image, a=a, b=b)) == pytest.approx((20 - 30) / 25)
    assert oracle.percept(item("delboeuf", image, a=a, b=b)) == pytest.approx(2 * (60**0.5 - 90**0.5) / (60**0.5 + 90**0.5))
    assert oracle.percept(item("munker", image, a=a, b=b)) == 0 and oracle.percept(item("white", image, a=a, b=b)) == 0
    image[b] = (11, 20, 30)
    assert oracle.percept(item("munker", image, a=a, b=b)) == 1 and oracle.percept(item("white", image, a=a, b=b)) < 0
    image[10:13, 20:25] = 200  # the rest of the mask is what counts
    assert oracle.percept(item("mueller_lyer", image, a=a, b=b)) == pytest.approx((15 - 30) / 22.5)


@given(st.floats(-80, 80), st.floats(-80, 80))
@few
def test_directions_are_those_drawn(first, second):
    canvas = Canvas(200)
    for name, y, deg in (("a", 50, first), ("b", 150, second)):
        dx, dy = 40 * math.cos(math.radians(deg)), 40 * math.sin(math.radians(deg))
        with canvas.layer(name):
            canvas.segment(100 - dx, y - dy, 100 + dx, y + dy, 5, (0, 0, 0))
    percept = PixelOracle().percept(item("rotating_snakes", canvas.image, a=canvas.mask("a"), b=canvas.mask("b")))
    wanted = (first - second + 90) % 180 - 90
    close = abs((percept - wanted + 90) % 180 - 90)
    assert close < 1.5 or (percept == 0 and abs(wanted) < 8)


def test_components_are_counted_with_corners_joined_over_the_whole_picture():
    image = np.zeros((64, 64, 3), np.uint8)
    image[2:4, 2:4] = image[4:6, 4:6] = image[40:42, 40:42] = image[50, 50] = 9
    mask = np.zeros((64, 64), bool)
    mask[2:4, 2:4] = True
    shown = item("hermann_grid", image, count=mask)
    assert PixelOracle().percept(shown) == 3 and PixelOracle().says(shown) == "3"
    assert PixelOracle().says(item("hermann_grid", image)) == "0"


def test_an_unknown_rule_is_refused(monkeypatch):
    image, a, b = boxes()
    monkeypatch.setitem(RULES, "white", ("taste",))
    with pytest.raises(ValueError, match="rule must be one of length, size, angle, rgb, light, count, got 'taste'"):
        PixelOracle().percept(item("white", image, a=a, b=b))


# ------------------------------------------------------------------ perceptual observers
@pytest.mark.parametrize("kind", OBSERVERS)
def test_an_observer_has_a_name_and_an_identity_that_holds_its_settings(kind):
    one = kind()
    json.dumps(one.identity())
    assert one.takes_item and one.identity()["name"] == one.name
    if kind is not PixelOracle:
        assert fingerprint(kind(criterion=0.123).identity()) != fingerprint(one.identity())


@pytest.mark.parametrize(("kind", "family"), [(ODOGObserver, "mueller_lyer"), (CentroidObserver, "white"), (BlurObserver, "ponzo"),
                                              (TiltObserver, "kanizsa"), (MotionObserver, "zoellner")])
def test_no_opinion_is_said_to_be_not_sure(kind, family):
    shown = draw(FAMILIES[family], seed=1, size=96)
    assert kind().percept(shown) is None
    assert shown.options["ABCD".index(kind().answer(shown, "", shown.options).letter)] == "Not Sure"


@pytest.mark.parametrize(("kind", "family"), [
    (ODOGObserver, "simultaneous_contrast"), (ODOGObserver, "white"), (ODOGObserver, "todorovic"), (ODOGObserver, "munker"),
    (CentroidObserver, "mueller_lyer"), (TiltObserver, "zoellner"), (TiltObserver, "hering"), (MotionObserver, "rotating_snakes")])
def test_an_inducer_fools_the_observer_and_its_absence_does_not(kind, family):
    for seed in (100, 101, 102):
        illusion, control = (draw(FAMILIES[family], strength=s, seed=seed, size=256) for s in (1.0, 0.0))
        assert kind().answer(illusion, "", illusion.options).letter == illusion.illusion_answer
        assert kind().answer(control, "", control.options).letter == control.answer


@pytest.mark.parametrize("kind", [ODOGObserver, CentroidObserver, BlurObserver, TiltObserver, MotionObserver])
def test_real_differences_are_seen_without_an_inducer(kind):
    family = FAMILIES[{"ODOG": "white", "centroid": "mueller_lyer", "motion energy": "motion_frames"}.get(kind.name, "zoellner")]
    for delta in (family.delta_grid[0], family.delta_grid[-1]):
        shown = draw(family, strength=0.0, delta=delta, seed=9, size=256)
        assert kind().answer(shown, "", shown.options).letter == shown.answer


def test_odog_as_observer_averages_large_pictures_and_takes_odd_ones():
    small, large = (ODOGObserver().percept(draw(FAMILIES["simultaneous_contrast"], seed=3, size=n)) for n in (256, 512))
    assert large == pytest.approx(small, rel=0.1)
    odd = draw(FAMILIES["simultaneous_contrast"], seed=3, size=97)
    assert ODOGObserver().percept(odd) > 1
    assert ODOGObserver(linear=True).percept(odd) != ODOGObserver().percept(odd)
    with pytest.raises(ValueError, match="extent_deg must be a finite number > 0, got -1"):
        ODOGObserver(extent_deg=-1)


@given(st.floats(10, 100), st.floats(10, 100), st.floats(0, 1.5))
@few
def test_centroid_shift_is_the_mean_over_the_ink_in_the_disc(f, r, theta):
    t = (np.arange(20_000) + 0.5) / 20_000
    for outward, sign in ((True, 1), (False, -1)):
        fin, shaft = sign * t * f * math.cos(theta), -t * r
        inside = t * f <= r
        weight = np.concatenate([2 * f * inside, np.full(len(t), r)])
        mean = np.average(np.concatenate([fin, shaft]), weights=weight)
        assert module._centroid_shift(f, r, theta, outward) == pytest.approx(mean, abs=2e-3 * r)
    gap = module._centroid_shift(r, r, theta, True) - module._centroid_shift(r, r, theta, False)
    assert 2 * gap == pytest.approx(4 / 3 * r * math.cos(theta))


@given(st.floats(5, 85))
@few
def test_blur_and_tilt_see_a_lone_line_as_it_is(deg):
    canvas = Canvas(256)
    dx, dy = 70 * math.cos(math.radians(deg)), 70 * math.sin(math.radians(deg))
    with canvas.layer("a"):
        canvas.segment(128 - dx, 128 - dy, 128 + dx, 128 + dy, 4, (0, 0, 0))
    for one in (BlurObserver(), TiltObserver()):
        gx, gy = module._gradients(canvas.image, one.blur * 256)
        assert one._direction(gx, gy, canvas.mask("a"), 256) % 180 == pytest.approx(deg, abs=1.5)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.2, 3.0))
@few
def test_four_steps_drive_the_correlator_as_the_theorem_says(levels, power):
    row = np.repeat(np.tile(np.array(levels), 3), 4)[None]
    g = [level**power for level in levels]
    wanted = ((levels[0] - levels[2]) * (g[1] - g[3]) - (levels[1] - levels[3]) * (g[0] - g[2])) / 4
    assert module._correlate(row, row, 4, 1, power).mean() == pytest.approx(wanted, abs=1e-12)
    assert module._correlate(row, row, 4, 1, 1.0).mean() == pytest.approx(0, abs=1e-12)
    moved = np.roll(np.sin(2 * np.pi * np.arange(48) / 24) + 1, 2)[None]
    assert module._correlate(np.roll(moved, -2, 1), moved, 3, 1, 1.0).mean() > 0  # to the right is positive


# ------------------------------------------------------------------ measurement
def test_the_measurement_writes_rows_with_bound_and_peer(monkeypatch, tmp_path):
    cpu, batch = module._measure_cpu, module._measure_batch
    monkeypatch.setattr(module, "_measure_cpu", lambda n, repeats: cpu(32, 1))
    monkeypatch.setattr(module, "_measure_batch", lambda device, n, sizes, pairs: batch(device, 32, (2, 3), (1,)))
    monkeypatch.setattr(module, "_copy_rate", lambda device, size: 1e9)
    measure_main(module.measure, ["--device", "cpu", "--out", str(tmp_path / "r.json"), "--commit", "c0ffee"])
    stored = json.loads((tmp_path / "r.json").read_text())
    assert {run["commit"] for run in stored["runs"].values()} == {"c0ffee"}
    row = stored["rows"]["cpu_odog_batch 32 x 3"]
    assert row["low"] <= row["measured"] <= row["high"] and row["peer"] > 0 and row["bound"] == 1e9 / module._traffic(32)
    assert stored["rows"]["odog_difference 32"]["measured"] < 1e-12 and stored["rows"]["cpu_odog_error 32"]["measured"] < 1e-4
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        module.measure("tpu")


def test_the_stored_run_on_the_gpu_meets_its_goals():
    rows = json.loads((RESULTS / "h200.json").read_text())["rows"]
    assert rows["cuda_odog_batch 256 x 1024"]["measured"] >= 64_000 and rows["cuda_odog_error 256"]["measured"] <= 1e-4
    assert json.loads((RESULTS / "full-cpu.json").read_text())["rows"]["odog_speedup 256"]["measured"] >= 40
