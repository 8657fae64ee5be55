"""Rasteriser against plain geometry, masks against brute force, the design's invariants, and what is refused."""
import math
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collai.viabench.generator import (
    CATEGORIES,
    LETTERS,
    Canvas,
    Family,
    blind_ceiling,
    check_quad,
    digest,
    draw,
    family_rng,
    luminance,
    mix,
    orbit,
    pair_sizes,
    patch,
    quad,
    to_linear,
    to_png,
    to_srgb,
)

some = settings(max_examples=40, deadline=None)
INK, PAPER = (0, 0, 0), (255, 255, 255)


def paint_bars(canvas, rng, strength, delta):
    """Two bars with flags that grow with the strength, on a paper of random grey."""
    n, grey = canvas.size, int(rng.integers(200, 250))
    canvas.fill((grey, grey, grey))
    lengths, truth = pair_sizes(0.4 * n, delta), {}
    for name, length, y in zip("ab", lengths, (n // 3, 2 * n // 3), strict=True):
        x0 = (n - length) // 2
        with canvas.layer("inducer"):
            canvas.polygon([(x0, y - 0.2 * n * strength), (x0 + 0.1 * n * strength, y), (x0, y + 0.2 * n * strength)], (30, 60, 90))
        with canvas.layer(name):
            truth[name] = canvas.segment(x0, y, x0 + length, y, canvas.px(0.02), (20, 20, 20))
    return truth | {"delta": 2 * (lengths[0] - lengths[1]) / sum(lengths)}


def paint_plates(canvas, rng, strength, delta):
    """Two plates of nearly one grey on a ramp."""
    n, codes = canvas.size, [128 + round(20 * delta), 128 - round(20 * delta)]
    canvas.fill((128, 128, 128))
    with canvas.layer("inducer"):
        canvas.gradient(0, 0, n, n, mix((128,) * 3, INK, strength), mix((128,) * 3, PAPER, strength))
    for name, x, code in zip("ab", (n // 4, 3 * n // 4), codes, strict=True):
        with canvas.layer(name):
            canvas.rect(x - n // 8, n // 2 - n // 8, x + n // 8, n // 2 + n // 8, (code,) * 3)
    return {"a": patch((codes[0],) * 3), "b": patch((codes[1],) * 3), "delta": float(codes[0] - codes[1])}


BARS = Family("bars", "geometric", "Which bar is longer?", ("upper", "lower", "neither"), (-0.2, -0.1, 0.0, 0.1, 0.2), 0.1, paint_bars,
              lambda d: 2 if d == 0 else int(d < 0), lambda d: 0, True, "relative length")
PLATES = Family("plates", "color", "Are the plates of one grey?", lambda seed: ("Yes", f"No, {seed} is not"), (-1, 0, 1), 1,
                paint_plates, lambda d: int(d != 0), lambda d: 1, False, "step of grey")
BOTH = (BARS, PLATES)


def inked(size, paint, aa=False):
    """Share of ink in each pixel."""
    canvas = Canvas(size, aa)
    paint(canvas)
    return 1 - to_linear(canvas.image)[..., 0]


def test_every_code_survives_the_way_to_light_and_back():
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_srgb(to_linear(codes)), codes)
    assert to_linear(codes)[[0, 10, 128, 255]] == pytest.approx([0, 10 / 255 / 12.92, 0.2158605, 1], abs=1e-7)


def test_luminance_is_that_of_rec_709():
    assert luminance(np.uint8([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]])) == pytest.approx(
        np.array([[0.2126, 0.7152, 0.0722, 1.0]]))


@some
@given(st.integers(0, 1023), st.integers(0, 1023), st.integers(1, 400), st.booleans())
def test_a_disc_paints_the_pixels_whose_centres_it_holds(x, y, r, aa):
    cx, cy, r = x / 16, y / 16, r / 16
    centre = np.arange(64) + 0.5
    inside = (centre - cx) ** 2 + (centre[:, None] - cy) ** 2 <= r * r
    canvas = Canvas(64, aa)
    with canvas.layer("a"):
        truth = canvas.disc(cx, cy, r, INK)
    assert np.array_equal(canvas.mask("a"), inside)
    assert aa or np.array_equal(canvas.image[..., 0] == 0, inside)
    assert (truth["cx"], truth["cy"], truth["r"]) == (cx, cy, r)


@some
@given(st.lists(st.tuples(st.integers(-20, 80), st.integers(-20, 80)), min_size=3, max_size=7))
def test_a_polygon_paints_what_matplotlib_calls_inside(points):
    from matplotlib.path import Path
    got = inked(64, lambda c: c.polygon(points, INK)) == 1
    x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    winding = np.zeros((64, 64), int)  # even-odd by crossings, counted edge by edge
    for (xa, ya), (xb, yb) in zip(points, [*points[1:], points[0]], strict=True):
        side = (xb - xa) * (y - ya) - (yb - ya) * (x - xa)
        winding += ((ya <= y) & (y < yb) & (side > 0)) | ((yb <= y) & (y < ya) & (side < 0))
    edge = np.zeros((64, 64), bool)
    for (xa, ya), (xb, yb) in zip(points, [*points[1:], points[0]], strict=True):
        edge |= np.abs((xb - xa) * (y - ya) - (yb - ya) * (x - xa)) < 1e-9
    assert np.array_equal(got[~edge], (winding % 2 == 1)[~edge])
    if len(points) == 3:  # for a triangle winding and parity agree, so the peer can be asked
        peer = Path([*points, points[0]]).contains_points(np.c_[x.ravel(), y.ravel()]).reshape(64, 64)
        assert np.array_equal(got[~edge], peer[~edge])


@some
@given(st.floats(5, 59), st.floats(5, 59), st.floats(0, math.pi), st.floats(1, 9))
def test_smooth_edges_equal_sampling_every_pixel(x, y, angle, width):
    dx, dy = 100 * math.cos(angle), 100 * math.sin(angle)
    got = inked(64, lambda c: c.capsule(x - dx, y - dy, x + dx, y + dy, width, INK), aa=True)
    fine = (np.arange(256) + 0.5) / 4
    strip = np.abs((fine - x) * math.sin(angle) - (fine[:, None] - y) * math.cos(angle)) <= width / 2
    assert np.abs(got - strip.reshape(64, 4, 64, 4).mean((1, 3))).max() < 0.03  # codes are whole numbers


@pytest.mark.parametrize(("paint", "area"), [
    (lambda c: c.ring(64, 64, 20, 40, INK), math.pi * 1200), (lambda c: c.sector(64, 64, 10, 50, -30, 90, INK), math.pi * 2400 / 3),
    (lambda c: c.arc(64, 64, 40, 100, 190, 8, INK), math.pi * 160), (lambda c: c.ellipse(60, 66, 50, 20, INK, deg=30), math.pi * 1000),
    (lambda c: c.capsule(20, 30, 100, 90, 10, INK), 1000 + math.pi * 25), (lambda c: c.segment(20, 30, 100, 90, 10, INK), 1000),
    (lambda c: c.rect(10.5, 20.25, 60, 50, INK), 49.5 * 29.75), (lambda c: c.polygon([(10, 10), (110, 20), (60, 100)], INK), 4250),
    (lambda c: c.grating(0, 0, 128, 128, 16, INK, PAPER), 128 * 64), (lambda c: c.fill(INK), 128 * 128),
    (lambda c: c.grating(8, 0, 128, 128, 16, INK, PAPER, deg=90), 120 * 64)])
def test_areas_are_those_of_geometry(paint, area):
    assert inked(128, paint, aa=True).sum() == pytest.approx(area, rel=2e-3)


@pytest.mark.parametrize("shape", [
    lambda c, x, y: c.disc(x + 20, y + 20, 9.5, INK), lambda c, x, y: c.segment(x + 4, y + 9, x + 31, y + 9, 3, INK),
    lambda c, x, y: c.segment(x + 4, y + 9, x + 25, y + 24, 3, INK), lambda c, x, y: c.ring(x + 20, y + 20, 5, 9, INK),
    lambda c, x, y: c.polygon([(x + 3, y + 4), (x + 30, y + 9), (x + 12, y + 28)], INK), lambda c, x, y: c.letter("B", x + 16, y + 16, 21, INK),
    lambda c, x, y: c.arrow(x + 4, y + 4, x + 28, y + 20, 2, INK)])
def test_equal_targets_at_whole_pixels_are_equal(shape):
    here, there = inked(96, lambda c: shape(c, 0, 0)), inked(96, lambda c: shape(c, 37, 21))
    assert here.any() and np.array_equal(np.roll(here, (21, 37), (0, 1)), there)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ends", [(10, 20, 41, 20), (41, 20, 10, 20), (20, 10, 20, 41)])
def test_a_segment_on_the_grid_has_exactly_its_length(ends, width):
    canvas = Canvas(64)
    with canvas.layer("a"):
        truth = canvas.segment(*ends, width, INK)
    row, column = np.nonzero(canvas.mask("a"))
    assert canvas.mask("a").sum() == 31 * width
    flat = ends[1] == ends[3]
    low, high = (column, row)[not flat].min(), (column, row)[not flat].max() + 1
    assert sorted((truth["x0"], truth["x1"]) if flat else (truth["y0"], truth["y1"])) == [low, high]
    assert ((row if flat else column) + 0.5).mean() == (truth["y0"] if flat else truth["x0"])
    assert truth["rgb"] == [0, 0, 0] and all(type(truth[k]) in (int, float) for k in ("x0", "x1", "y0", "y1", "width"))


def test_rows_of_a_segment_are_centred_on_its_pixel():
    canvas = Canvas(64)
    canvas.segment(10, 20, 41, 20, 3, INK)
    canvas.segment(50, 30, 50, 60, 2, INK)
    dark = canvas.image[..., 0] == 0
    assert np.flatnonzero(dark[:, 15]).tolist() == [19, 20, 21] and np.flatnonzero(dark[40]).tolist() == [49, 50]


def test_angles_run_clockwise_from_the_right():
    dark = inked(128, lambda c: c.arc(64, 64, 40, 80, 190, 8, INK)) == 1
    assert dark[104, 63] and dark[63, 24] and dark[92, 36] and not dark[24, 64] and not dark[64, 104] and not dark[92, 92]


def test_stripes_begin_with_the_first_colour():
    canvas = Canvas(64)
    canvas.grating(8, 4, 64, 64, 16, INK, (200, 0, 0))
    assert canvas.image[10, [7, 8, 15, 16, 23, 24], 0].tolist() == [255, 0, 0, 200, 200, 0]
    canvas.grating(8, 4, 64, 64, 16, (0, 0, 0), (200, 0, 0), deg=90, phase=0.5)
    assert canvas.image[[4, 11, 12, 19, 20], 30, 0].tolist() == [200, 200, 0, 0, 200]
    canvas.grating(0, 0, 64, 64, 32, (200, 0, 0), (0, 0, 0), wave="sine")
    assert canvas.image[0, :, 0].argmax() in (7, 8) and canvas.image[0, :32, 0].argmin() in (23, 24)


def test_numbers_of_numpy_are_taken_and_come_out_as_pythons():
    canvas = Canvas(64)
    truth = canvas.disc(np.int64(20), np.float64(20.5), np.int32(4), INK)
    assert [type(truth[k]) for k in ("cx", "cy", "r")] == [int, float, int]


def test_colours_may_be_functions_and_blend_in_light():
    canvas = Canvas(64)
    canvas.gradient(0, 0, 64, 64, (0, 0, 0), (252, 126, 63))
    assert np.all(np.diff(canvas.image[5, :, 0].astype(int)) >= 0) and canvas.image[5, 32].tolist() == [128, 64, 32]
    canvas.fill(PAPER)
    canvas.rect(0, 0, 10, 10, INK, alpha=0.5)
    assert canvas.image[3, 3].tolist() == [188, 188, 188]  # half the light of white


def test_a_paste_copies_where_its_mask_holds_and_stays_inside():
    canvas, array = Canvas(64), np.zeros((4, 6, 3), np.uint8)
    where = np.zeros((4, 6), bool)
    where[1:3, 2:4] = True
    canvas.paste(50, 60, array, where)
    assert (canvas.image == 0).all(2).sum() == 4 and (canvas.image[61:63, 52:54] == 0).all()
    with pytest.raises(ValueError, match=r"6 by 4 pixels at \(60, 60\) leave the picture of 64"):
        canvas.paste(60, 60, array)


def test_every_glyph_is_drawn_and_they_differ():
    pictures = {letter: digest(draw_letter(letter)) for letter in "ABCD0123456789"}
    assert len(set(pictures.values())) == 14


def draw_letter(letter):
    canvas = Canvas(64)
    canvas.letter(letter, 32, 32, 40, INK)
    assert 40 < (canvas.image[..., 0] == 0).sum() < 2000
    return canvas.image


def test_the_last_painter_owns_a_pixel():
    canvas = Canvas(64)
    with canvas.layer("inducer"):
        canvas.rect(0, 0, 40, 40, INK)
    with canvas.layer("a"):
        canvas.rect(10, 10, 20, 20, PAPER)
    canvas.rect(0, 0, 5, 5, PAPER)
    assert canvas.mask("inducer").sum() == 1600 - 100 - 25 and canvas.mask("a").sum() == 100 and not canvas.mask("b").any()
    with canvas.layer("inducer", reach=True):
        canvas.rect(60, 60, 64, 64, INK)
    assert canvas.mask("inducer").sum() == 1600 - 100 - 25 + 16 and (canvas.image[60:, 60:] == 255).all()
    with canvas.layer("a"):
        canvas.rect(60, 60, 64, 64, PAPER, alpha=0.5)
    assert canvas.mask("inducer")[60:, 60:].all(), "what shines through is still the inducer's"


@some
@given(st.sampled_from(BOTH), st.floats(0, 1), st.integers(0, 2), st.integers(0, 50), st.booleans(), st.sampled_from([64, 97, 128]))
def test_the_control_differs_inside_the_mask_only(family, strength, which, seed, aa, size):
    delta = family.delta_grid[which]
    control = draw(family, strength=0, delta=delta, seed=seed, size=size, aa=aa)
    other = draw(family, strength=strength, delta=delta, seed=seed, size=size, aa=aa)
    full = draw(family, strength=1, delta=delta, seed=seed, size=size, aa=aa)
    for stimulus in (other, full):
        assert not ((stimulus.image != control.image).any(2) & ~control.masks["inducer"]).any()
        for name, mask in control.masks.items():
            assert np.array_equal(mask, stimulus.masks[name])
    assert not (control.masks["inducer"] & (control.masks["a"] | control.masks["b"])).any()
    assert control.answer == other.answer and control.illusion_answer is None


def paint_spot(canvas, rng, strength, delta):
    """A disc on a surround that fades, its edges between pixels."""
    canvas.fill((128, 128, 128))
    if strength:
        with canvas.layer("inducer"):
            canvas.rect(8, 8, 50, 50, mix((128,) * 3, INK, strength))
    with canvas.layer("a"):
        canvas.disc(30.3, 30.4, 10.2, (90, 90, 90))
    return {"a": patch((90, 90, 90))}


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_smooth_edges_of_a_target_belong_to_what_shines_through(strength):
    shown = draw(replace(BARS, paint=paint_spot), strength=strength, size=64, aa=True)
    assert not (shown.masks["a"] & shown.masks["inducer"]).any() and (shown.image[shown.masks["a"]] == 90).all()
    assert shown.masks["a"].sum() == pytest.approx(math.pi * 9.7**2, abs=20)
    assert (shown.masks["a"] | shown.masks["inducer"]).sum() == 42 * 42


@some
@given(st.sampled_from(BOTH), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_equal_arguments_give_equal_bits(family, seed, strength):
    one, two = (draw(family, strength=strength, delta=family.delta_grid[-1], seed=seed, size=64) for _ in range(2))
    assert digest(one.image) == digest(two.image) and one.options == two.options and one.truth == two.truth
    assert one.image.dtype == np.uint8 and one.image.shape == (64, 64, 3) and one.image.flags.c_contiguous


def test_the_painters_numbers_depend_on_name_and_seed_alone():
    first = family_rng("bars", 3).integers(0, 1 << 60)
    assert first == family_rng("bars", 3).integers(0, 1 << 60)
    assert len({first, family_rng("bars", 4).integers(0, 1 << 60), family_rng("bar", 3).integers(0, 1 << 60)}) == 3
    assert family_rng("bars", 0).integers(0, 1 << 60) == 575061089619609311, "the same on every machine and in every version"


@some
@given(st.floats(20, 500), st.floats(-0.5, 0.5), st.integers(1, 3))
def test_sizes_are_whole_fair_and_swap(mean, delta, step):
    try:
        a, b = pair_sizes(mean, delta, step)
    except ValueError:
        assert 0 < abs(delta) <= step / mean * (1 + 1e-9)
        return
    assert pair_sizes(mean, -delta, step) == (b, a) and a % step == b % step == 0
    assert (a > b, a < b) == (delta > 0, delta < 0)


@pytest.mark.parametrize("family", BOTH)
def test_letters_are_balanced_over_the_orders(family):
    k = len(family.texts(0))
    for start in (0, 5):
        orders = Counter(family.order(seed) for seed in range(start, start + math.factorial(k)))
        assert set(orders.values()) == {1} and len(orders) == math.factorial(k)
        assert all(sorted(order) == list(range(k)) for order in orders)
    shown = draw(family, seed=9, size=64)
    assert shown.options == [*(family.texts(9)[i] for i in family.order(9)), "Not Sure"]
    assert family.order(9)[LETTERS.index(shown.answer)] == family.answer_of(0)


@pytest.mark.parametrize(("family", "delta", "expected"), [
    (BARS, 0.1, (0.1, -0.1, 0)), (BARS, -0.15, (-0.15, 0.15, 0)), (BARS, 0, (0.1, -0.1, 0)), (PLATES, 1, (1, 0)), (PLATES, -1, (-1, 0)),
    (PLATES, 0, (1, 0)), (replace(BARS, delta_grid=(0, 1, 2), continuous=False, answer_of=int), 1, (1, 0, 2)),
    (replace(BARS, delta_grid=(-2, -1, 0), continuous=False, answer_of=lambda d: -int(d)), 0, (-2, 0, -1))])
def test_an_orbit_makes_each_option_right_once(family, delta, expected):
    assert orbit(family, delta) == expected


def test_an_option_that_is_never_right_is_named():
    with pytest.raises(ValueError, match="bars: no delta makes 'neither' right"):
        orbit(replace(BARS, answer_of=lambda d: int(d < 0)), 0.1)


@some
@given(st.lists(st.tuples(st.sampled_from(BOTH), st.integers(0, 40)), min_size=1, max_size=5))
def test_text_alone_scores_chance(wanted):
    items = [stimulus for family, seed in wanted for stimulus in quad(family, family.delta_grid[-1], seed=seed, size=64)]
    best, chance = blind_ceiling(items)
    assert best == pytest.approx(chance, abs=1e-12)
    assert chance == pytest.approx(np.mean([1 / (len(item.options) - 1) for item in items]))
    assert blind_ceiling(items[:1])[0] == 1
    assert blind_ceiling([*items[:2], items[2]]) == (pytest.approx(2 / 3), pytest.approx(1 / (len(items[0].options) - 1)))


@pytest.mark.parametrize("family", BOTH)
def test_good_quads_pass(family):
    for seed in range(4):
        one = quad(family, family.delta_grid[-1], seed=seed, size=96)
        check_quad(one)
        assert [s.strength for s in one] == [1, 0] * (len(one) // 2)
        assert Counter(s.answer for s in one) == dict.fromkeys(LETTERS[:len(one) // 2], 2)


def broken(change):
    """A quad of plates whose second picture, the control, was changed."""
    one = quad(PLATES, 1, seed=1, size=64)
    return [one[0], replace(one[1], **change(one)), *one[2:]]


def stain(array, mask):
    """A copy with another code at the first pixel of a mask."""
    array = array.copy()
    array[tuple(np.argwhere(mask)[0])] = 7
    return array


@pytest.mark.parametrize(("change", "text"), [
    (lambda q: {"seed": 2}, "plates: seed must be the same, got 1 and 2"), (lambda q: {"question": "What?"}, "question must be the same"),
    (lambda q: {"options": q[1].options[::-1]}, "options must be the same"), (lambda q: {"answer": "C"}, "answer must be the same"),
    (lambda q: {"image": q[1].image.astype(float)}, r"must be C-contiguous uint8 \(64, 64, 3\), got float64"),
    (lambda q: {"image": q[1].image[:, ::-1]}, "must be C-contiguous"), (lambda q: {"image": q[1].image[:32]}, r"got uint8 \(32, 64, 3\)"),
    (lambda q: {"illusion_answer": "AB".replace(q[1].answer, "")}, "illusion letter [AB] at strength 0"),
    (lambda q: {"strength": 0.5, "illusion_answer": q[1].answer}, r"illusion letter ([AB]) at strength 0\.5, right \1"),
    (lambda q: {"image": stain(q[1].image, q[1].masks["a"])}, r"patch a is not everywhere \[148, 148, 148\]"),
    (lambda q: {"masks": q[1].masks | {"inducer": ~q[1].masks["b"]}}, "target a meets the mask of the inducer"),
    (lambda q: {"masks": q[1].masks | {"a": np.zeros((64, 64), bool)}}, "target a has no pixel"),
    (lambda q: {"masks": q[1].masks | {"c": np.zeros((64, 64), bool)}}, r"masks differ between strengths 1\.0 and 0\.0"),
    (lambda q: {"truth": q[1].truth | {"delta": 3.0}}, r"truth\['delta'\] must be the same"),
    (lambda q: {"truth": q[1].truth | {"count": {"n": 3, "rgb": [0, 0, 0]}}}, r"truth\['count'\] must be the same")])
def test_a_broken_rule_is_named(change, text):
    with pytest.raises(ValueError, match=text):
        check_quad(broken(change))


def leak(paint):
    """A painter whose strength moves something that is no inducer."""
    def painted(canvas, rng, strength, delta):
        truth = paint(canvas, rng, strength, delta)
        canvas.disc(8 + 6 * strength, 8, 3, (9, 9, 9))
        return truth
    return painted


def late(paint):
    """A painter whose inducer reaches further at half strength than at full."""
    def painted(canvas, rng, strength, delta):
        truth = paint(canvas, rng, strength, delta)
        if 0 < strength < 1:
            with canvas.layer("inducer"):
                canvas.disc(8, 8, 3, (9, 9, 9))
        return truth
    return painted


def test_a_painter_that_breaks_the_design_is_found():
    with pytest.raises(ValueError, match=r"bars, delta 0.1: \d+ pixels outside the inducer differ between strengths 1.0 and 0.0"):
        check_quad(quad(replace(BARS, paint=leak(paint_bars)), 0.1, size=64))
    wide = replace(BARS, paint=late(paint_bars))
    with pytest.raises(ValueError, match=r"bars, delta 0.1: masks differ between strengths 1.0 and 0.5"):
        check_quad([draw(wide, strength=s, delta=d, size=64) for d in orbit(wide, 0.1) for s in (1.0, 0.5)])
    with pytest.raises(ValueError, match="patches differ at delta 0"):
        check_quad(quad(replace(PLATES, paint=lambda c, r, s, d: paint_plates(c, r, s, d or 1) | {"delta": d}), 1, size=64))
    with pytest.raises(ValueError, match=r"right letters at strength 0.0 are \['A', 'B'\], not each option once"):
        one = quad(BARS, 0.1, size=64)
        check_quad([s for s in one if s.answer != "C" or s.strength == 1][::-1])
    with pytest.raises(ValueError, match="stimuli is empty"):
        check_quad([])


@pytest.mark.parametrize(("call", "text"), [
    (lambda: draw(BARS, strength=math.nan), r"strength must be in \[0, 1\], got nan"),
    (lambda: draw(BARS, strength=-0.1), r"strength must be in \[0, 1\], got -0.1"),
    (lambda: draw(BARS, strength=True), r"strength must be in \[0, 1\], got True"),
    (lambda: draw(BARS, delta=0.21), r"delta of bars must be in \[-0.2, 0.2\], got 0.21"),
    (lambda: draw(BARS, delta=math.nan), r"delta of bars must be in \[-0.2, 0.2\], got nan"),
    (lambda: draw(replace(BARS, delta_grid=(0, 1)), delta=-0.5), r"delta of bars must be in \(0, 1\), got -0.5"),
    (lambda: draw(PLATES, delta=0.5), r"delta of plates must be one of \(-1, 0, 1\), got 0.5"),
    (lambda: draw(BARS, size=63), r"size must be in \[64, 4096\], got 63"), (lambda: draw(BARS, size=4097), r"size must be in .* got 4097"),
    (lambda: draw(BARS, seed=-1), "seed must be >= 0, got -1"), (lambda: draw(BARS, delta=1e-4, size=64), r"delta 0.0001 is less than 1 px"),
    (lambda: draw(replace(BARS, paint=lambda c, r, s, d: {"delta": -d}), delta=0.1), r"bars at size 512: delta 0.1 was drawn as -0.1"),
    (lambda: replace(BARS, category="colour"), f"category must be one of {', '.join(CATEGORIES)}, got 'colour'"),
    (lambda: replace(BARS, delta_grid=(0.1, 0)), r"delta_grid must ascend and hold 0, got \(0.1, 0\)"),
    (lambda: replace(BARS, delta_grid=(0.1,)), r"delta_grid must ascend and hold 0, got \(0.1,\)"),
    (lambda: replace(BARS, options=("a",)), r"2 or 3 different options beside 'Not Sure', got \('a',\)"),
    (lambda: replace(BARS, options=("a", "Not Sure")), r"got \('a', 'Not Sure'\)"),
    (lambda: to_srgb([math.nan]), r"linear light must be in \[0, 1\], got nan"), (lambda: to_linear([1]), "codes must be uint8, got int64"),
    (lambda: blind_ceiling([]), "items is empty"),
    (lambda: Canvas(64).grating(0, 0, 9, 9, 3, INK, PAPER, wave="saw"), "wave must be 'square' or 'sine', got 'saw'")])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_seeds_and_sizes_are_whole_numbers():
    with pytest.raises(TypeError):
        draw(BARS, seed=1.5)
    with pytest.raises(TypeError):
        draw(BARS, size="64")


def test_minus_zero_is_zero():
    assert math.copysign(1, draw(BARS, delta=-0.0, size=64).delta) == 1


def test_the_fooled_letter_is_given_only_when_it_is_wrong_and_there_is_an_inducer():
    for delta, strength, fooled in ((0.0, 1.0, True), (-0.1, 1.0, True), (0.1, 1.0, False), (0.0, 0.0, False), (0.0, 0.01, True)):
        shown = draw(BARS, delta=delta, strength=strength, size=128)
        assert (shown.illusion_answer is not None) == fooled
        assert not fooled or shown.options[LETTERS.index(shown.illusion_answer)] == "upper"


@pytest.mark.parametrize("size", [64, 256, 1024, 4096])
def test_pictures_scale(size):
    shown = draw(BARS, delta=0.2, size=size)
    assert shown.masks["a"].sum(1).max() == shown.truth["a"]["x1"] - shown.truth["a"]["x0"]
    assert shown.truth["delta"] == pytest.approx(0.2, abs=3 / (0.4 * size))


def test_a_png_keeps_every_code():
    image = draw(PLATES, delta=1, size=64).image
    assert np.array_equal(np.asarray(Image.open(BytesIO(to_png(image)))), image)
    other = image.copy()
    other[0, 0, 0] ^= 1
    assert digest(other) != digest(image) != digest(image.reshape(32, 128, 3))
