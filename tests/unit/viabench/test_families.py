"""Families: truth against pixels, controls, masks, rules, texts, sides, and what is refused."""
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from collai.viabench.families import CATEGORIES, FAMILIES, RULES, render
from collai.viabench.generator import check_quad, luminance, orbit, quad

LISTED = """simultaneous_contrast white munker checker_shadow cornsweet benary todorovic chromatic_assimilation
rotating_snakes ouchi motion_frames kanizsa proximity_grouping hidden_figure figure_ground mueller_lyer ponzo ebbinghaus
delboeuf vertical_horizontal poggendorff zoellner hering cafe_wall oppel_kundt sander impossible_triangle impossible_fork
hermann_grid ambiguous_cube finger_count odd_one_out wrong_shadow wrong_reflection clock_anomaly leg_count""".split()
some = settings(max_examples=60, deadline=None)
few = settings(max_examples=25, deadline=None)
each = pytest.mark.parametrize("name", FAMILIES)


@st.composite
def drawn(draw, names=tuple(LISTED), sizes=(64, 288), smooth=True):
    """A family with arguments that it can draw."""
    name = draw(st.sampled_from(names))
    f = FAMILIES[name]
    delta = draw(st.sampled_from(f.delta_grid))
    if f.continuous and delta and draw(st.booleans()):
        delta = math.copysign(draw(st.floats(float(f.delta_min), float(f.limit))), delta)
    return name, {"delta": delta, "seed": draw(st.integers(0, 10_000)), "size": draw(st.integers(*sizes)), "aa": smooth and draw(st.booleans())}


def of_kind(kind):
    """Families that have a target of this kind."""
    return tuple(n for n in LISTED if any(render(n, seed=0, size=64).truth.get(t, {}).get("kind") == kind for t in "abc"))


def main_ink(image, mask):
    """Pixels of the most frequent colour under a mask, and that colour."""
    rgb = np.array(Counter(map(tuple, image[mask].tolist())).most_common(1)[0][0])
    return mask & (image == rgb).all(2), rgb


def long_axis(mask):
    """Direction in [0, 180) degrees and elongation of a mask."""
    y, x = np.nonzero(mask)
    values, vectors = np.linalg.eigh(np.cov(x, y))
    return math.degrees(math.atan2(vectors[1, 1], vectors[0, 1])) % 180, math.sqrt(values[1] / max(values[0], 1e-9))


def measured(s):
    """The right option's text by the family's rule, from picture and masks."""
    rule, f = RULES[s.family], FAMILIES[s.family]
    if callable(rule):
        found = rule(s.image, s.masks)
    elif rule[0] == "count":
        mask = s.masks.get("count", np.zeros(s.image.shape[:2], bool))
        if not mask.any():
            return "0"
        rgb = main_ink(s.image, mask)[1]
        return str(ndimage.label((s.image == rgb).all(2), np.ones((3, 3)))[1])
    else:
        (a, rgb_a), (b, rgb_b) = (main_ink(s.image, s.masks[k]) for k in "ab")
        spans = [max(np.ptp(axis) for axis in np.nonzero(m)) + 1 for m in (a, b)]
        turn = (long_axis(a)[0] - long_axis(b)[0] + 90) % 180 - 90
        light = luminance(np.array([rgb_a, rgb_b], np.uint8))
        found = {"light": float(light[0] - light[1]),
                 "rgb": float((rgb_a != rgb_b).any()), "length": float(spans[0] - spans[1]),
                 "size": float(int(a.sum()) - int(b.sum())), "angle": turn if abs(turn) > f.delta_min / 2 else 0.0}[rule[0]]
    return f.texts(s.seed)[f.answer_of(found)]


def test_the_listed_families_are_there():
    assert set(LISTED) == set(FAMILIES) == set(RULES) and len(LISTED) == 36
    assert list(dict.fromkeys(f.category for f in FAMILIES.values())) == list(CATEGORIES)
    assert all(name == f.name for name, f in FAMILIES.items())


@each
def test_grids_ascend_hold_0_and_are_symmetric_where_delta_has_a_sign(name):
    f = FAMILIES[name]
    assert list(f.delta_grid) == sorted(f.delta_grid) and 0 in f.delta_grid and f.limit == max(map(abs, f.delta_grid))
    assert f.delta_min == min(abs(v) for v in f.delta_grid if v)
    if min(f.delta_grid) < 0:
        assert [-v for v in f.delta_grid[::-1]] == list(f.delta_grid)
    assert {f.answer_of(v) for v in f.delta_grid} == set(range(len(f.texts(0))))
    assert pickle.loads(pickle.dumps(f)).name == name  # noqa: S301


@some
@given(drawn(), st.floats(0, 1))
def test_answers_lie_in_the_pixels_and_controls_differ_in_the_inducer_alone(case, strength):
    name, args = case
    shown = [render(name, strength=s, **args) for s in (1.0, strength, 0.0)]
    assert (render(name, strength=strength, **args).image == shown[1].image).all()
    assert (shown[0].image != shown[2].image).any(), "the inducer must be visible"
    for s in shown:
        assert s.image.shape == (args["size"], args["size"], 3) and s.image.dtype == np.uint8 and s.image.flags.c_contiguous
        assert (s.answer, s.options, s.question) == (shown[0].answer, shown[0].options, shown[0].question)
        assert s.options[-1] == "Not Sure" and len(set(s.options)) == len(s.options) in (3, 4)
        assert s.illusion_answer != s.answer and (s.strength > 0 or s.illusion_answer is None)
        assert s.options["ABCD".index(s.answer)] == measured(s)
        assert s.masks.keys() == shown[0].masks.keys() >= {"inducer"} | {k for k in "ab" if k in s.truth}
        for key, mask in s.masks.items():
            assert mask.dtype == bool and (mask == shown[0].masks[key]).all()
            assert key == "inducer" or not (mask & s.masks["inducer"]).any()
        assert (s.image == shown[0].image)[~s.masks["inducer"]].all()


@pytest.mark.parametrize(("name", "strength", "delta", "seed", "size", "aa"), [
    ("sander", 0.5, 0.1, 43, 64, False), ("sander", 1, 0.1, 388017, 67, True), ("sander", 0, 0.1, 251933, 67, True),
    ("hering", 0.8906874281555186, 0, 558988, 81, True), ("poggendorff", 0.8490886981720673, 0, 958127, 73, True),
    ("poggendorff", 0.5010624319134157, 0, 875866, 64, False),
    ("rotating_snakes", 0, 12, 166494, 64, True)])
def test_small_pictures_with_thin_lines_are_measured_rightly(name, strength, delta, seed, size, aa):
    s = render(name, strength=strength, delta=delta, seed=seed, size=size, aa=aa)
    assert s.options["ABCD".index(s.answer)] == measured(s)


def test_fading_squares_never_take_the_colour_of_the_dots():
    for strength in (0.432, 0.4325, 0.433):
        s = render("hermann_grid", strength=strength, delta=4, seed=43, size=64)
        assert s.options["ABCD".index(s.answer)] == measured(s) == "4"


@few
@given(drawn(of_kind("segment"), smooth=False))
def test_segments_are_straight_runs_with_exact_ends(case):
    name, args = case
    for strength in (0.0, 1.0):
        s = render(name, strength=strength, **args)
        for t in (s.truth[k] for k in "ab"):
            (x0, y0, x1, y1), rgb = (t[k] for k in ("x0", "y0", "x1", "y1")), np.array(t["rgb"])
            length = math.hypot(x1 - x0, y1 - y0)
            ux, uy = (x1 - x0) / length, (y1 - y0) / length
            def at(along, ux=ux, uy=uy, x0=x0, y0=y0, image=s.image):
                x, y = x0 + along * ux, y0 + along * uy
                inside = (x >= 0) & (y >= 0) & (x < args["size"]) & (y < args["size"])
                return image[y[inside].astype(int), x[inside].astype(int)].astype(int)
            assert (at(np.arange(1.0, length - 1, 0.5)) == rgb).all()
            if strength == 0:
                beyond = np.concatenate([np.arange(-8.0, -1, 0.5), np.arange(length + 1, length + 8, 0.5)])
                assert (np.abs(at(beyond) - rgb).max(1) >= 128).all()
            if strength == 0 and 0 in (ux, uy):
                line = s.image[int(y0)] if uy == 0 else s.image[:, int(x0)]
                inked = np.nonzero((line == rgb).all(1))[0]
                first, last = (int(v) for v in ((x0, x1) if uy == 0 else (y0, y1)))
                inked = inked[(inked >= first - 8) & (inked < last + 8)]
                assert (inked == np.arange(first, last)).all()


@few
@given(drawn(of_kind("patch"), sizes=(256, 300)), st.floats(0, 1))
def test_patches_have_one_colour_and_room_inside(case, strength):
    name, args = case
    s = render(name, strength=strength, **args)
    for k in "ab":
        assert (s.image[s.masks[k]] == s.truth[k]["rgb"]).all()
        assert ndimage.binary_erosion(s.masks[k], np.ones((3, 3))).sum() >= 100, name
    if args["delta"] == 0:
        assert s.truth["a"]["rgb"] == s.truth["b"]["rgb"]


@few
@given(drawn(of_kind("disc"), smooth=False))
def test_the_mask_of_a_disc_holds_the_pixels_whose_centre_lies_inside(case):
    name, args = case
    s = render(name, **args)
    x, y = np.arange(args["size"]) + 0.5, (np.arange(args["size"]) + 0.5)[:, None]
    for t, mask in ((s.truth[k], s.masks[k]) for k in "abc" if s.truth.get(k, {}).get("kind") == "disc"):
        assert (mask == ((x - t["cx"]) ** 2 + (y - t["cy"]) ** 2 <= t["r"] ** 2)).all()


@few
@given(drawn(of_kind("angle"), sizes=(200, 288)))
def test_masks_of_angles_are_elongated_along_them(case):
    name, args = case
    s = render(name, **args)
    for t, mask in ((s.truth[k], s.masks[k]) for k in "abc" if s.truth.get(k, {}).get("kind") == "angle"):
        deg, ratio = long_axis(mask)
        assert 0 <= t["deg"] < 180 and ratio > 2
        assert abs((deg - t["deg"] + 90) % 180 - 90) < 2.5, (name, deg, t)


@few
@given(drawn(("hermann_grid", "finger_count", "leg_count")), st.floats(0, 1))
def test_counts_are_components_in_the_whole_picture(case, strength):
    s = render(case[0], strength=strength, **case[1])
    count = s.truth["count"]
    assert ndimage.label((s.image == count["rgb"]).all(2), np.ones((3, 3)))[1] == count["n"]
    assert s.options["ABCD".index(s.answer)] == str(count["n"])


@each
def test_quads_keep_the_design(name):
    f = FAMILIES[name]
    for seed, size in ((5, 64), (6, 130)):
        check_quad(quad(f, f.limit, seed=seed, size=size))


@each
def test_each_letter_is_right_equally_often_over_seeds(name):
    f = FAMILIES[name]
    right = Counter(f.order(seed).index(f.answer_of(d)) for seed in range(12) for d in orbit(f, f.delta_min))
    assert set(right.values()) == {12}


def test_the_favoured_side_is_left_for_half_of_the_seeds():
    for name in ("mueller_lyer", "white", "sander", "poggendorff", "ouchi"):
        f = FAMILIES[name]
        firsts = Counter(f.texts(seed)[0] for seed in range(400))
        assert len(firsts) == 2 and max(firsts.values()) < 250
        for seed in range(8):
            s = render(name, delta=-f.delta_min, seed=seed, size=128)
            assert s.options["ABCD".index(s.illusion_answer)] == f.texts(seed)[0]


def test_equal_targets_have_equal_pixels():
    for name in ("mueller_lyer", "ponzo", "ebbinghaus", "delboeuf", "vertical_horizontal", "oppel_kundt", "zoellner", "sander"):
        for seed, size in ((0, 64), (1, 99), (2, 256)):
            masks = render(name, seed=seed, size=size).masks
            assert masks["a"].sum() == masks["b"].sum(), (name, seed, size)


def test_unknown_names_list_near_ones():
    with pytest.raises(KeyError, match="unknown family 'muler_lyer'; nearest: mueller_lyer"):
        render("muler_lyer")
    with pytest.raises(KeyError, match="unknown family 'qqq'; nearest: simultaneous_contrast"):
        render("qqq")


@pytest.mark.parametrize("args,text", [
    ({"strength": -0.1}, r"strength must be in \[0, 1\], got -0.1"), ({"strength": math.nan}, r"strength must be in \[0, 1\], got nan"),
    ({"delta": 0.31}, r"delta of ponzo must be in \[-0.3, 0.3\], got 0.31"), ({"delta": math.nan}, "got nan"),
    ({"size": 63}, r"size must be in \[64, 4096\], got 63"), ({"size": 4097}, "got 4097"), ({"seed": -1}, "seed must be >= 0, got -1"),
    ({"delta": 0.001, "size": 64}, "delta 0.001 is less than 1 px")])
def test_bad_input_is_refused_by_value(args, text):
    with pytest.raises(ValueError, match=text):
        render("ponzo", **args)


def test_discrete_families_take_their_versions_alone():
    with pytest.raises(ValueError, match=r"delta of finger_count must be one of \(-1.0, 0.0, 1.0\), got 0.5"):
        render("finger_count", delta=0.5)
