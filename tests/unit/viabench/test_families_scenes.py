"""The motion, gestalt, general and anomaly families: what is asked about is what was drawn."""
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from collai.viabench.families import FAMILIES, RULES
from collai.viabench.generator import check_quad, draw, quad

SCENES = sorted(name for name, family in FAMILIES.items() if family.category in ("motion", "gestalt", "general", "anomaly"))
VERSIONS = ("impossible_triangle", "impossible_fork", "hermann_grid", "ambiguous_cube", "finger_count", "leg_count")
SIDED = ("ouchi", "proximity_grouping", "figure_ground")
FOOLED = {"rotating_snakes": "Yes", "motion_frames": "Yes", "kanizsa": "The area between the discs", "hermann_grid": "16"}


def shown_text(stimulus, letter):
    return stimulus.options["ABCD".index(letter)]


def centre(mask):
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()]) + 0.5


def direction(mask):
    y, x = np.nonzero(mask)
    _, vectors = np.linalg.eigh(np.cov(np.stack([x, y])))
    return float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))) % 180


def apart(first, second, period=180):
    return abs((first - second + period / 2) % period - period / 2)


def test_all_seventeen_scenes_are_there():
    assert len(SCENES) == 17
    assert {FAMILIES[name].category for name in SCENES} == {"motion", "gestalt", "general", "anomaly"}


@pytest.mark.parametrize("name", SCENES)
@settings(max_examples=2)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_quads_keep_the_counterfactual_design(name, seed, data):
    check_quad(quad(FAMILIES[name], data.draw(st.sampled_from(FAMILIES[name].delta_grid)), seed=seed, size=100))


@pytest.mark.parametrize("name", SCENES)
@settings(max_examples=2)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from((0.0, 0.3, 1.0)))
def test_truth_can_be_measured_in_the_picture(name, seed, strength):
    family = FAMILIES[name]
    for delta in (family.delta_grid[0], 0.0, family.delta_grid[-1]):
        stimulus = draw(family, strength=strength, delta=delta, seed=seed, size=256)
        for key in ("a", "b"):
            truth, mask = stimulus.truth.get(key), stimulus.masks.get(key)
            assert (truth is None) == (mask is None)
            match truth and truth["kind"]:
                case "patch":
                    assert (stimulus.image[mask] == truth["rgb"]).all()
                    assert ndimage.binary_erosion(mask, np.ones((3, 3))).sum() >= 100
                case "disc":
                    y, x = np.mgrid[:256, :256] + 0.5
                    assert (((x - truth["cx"]) ** 2 + (y - truth["cy"]) ** 2 <= truth["r"] ** 2) == mask).all()
                case "angle":
                    assert apart(direction(mask), truth["deg"]) < 2
                case "segment":
                    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                    run = max(abs(truth["x1"] - truth["x0"]), abs(truth["y1"] - truth["y0"]))
                    assert sorted((len(rows), len(columns))) == sorted((truth["width"], run))
                    assert (stimulus.image[mask] == truth["rgb"]).all()


@pytest.mark.parametrize("name", [name for name in SCENES if callable(RULES[name])])
@settings(max_examples=2)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from((0.0, 0.6, 1.0)))
def test_rules_find_the_right_option_from_pixels_and_masks(name, seed, strength):
    family = FAMILIES[name]
    for delta in family.delta_grid:
        stimulus = draw(family, strength=strength, delta=delta, seed=seed, size=256)
        found = family.texts(seed)[family.answer_of(RULES[name](stimulus.image, stimulus.masks))]
        assert found == shown_text(stimulus, stimulus.answer), delta


@pytest.mark.parametrize("name", ["hermann_grid", "finger_count", "leg_count"])
@pytest.mark.parametrize("aa", [False, True])
@settings(max_examples=2)
@given(seed=st.integers(0, 10**6), size=st.integers(64, 200), strength=st.sampled_from((0.0, 0.5, 1.0)))
def test_counts_are_components_of_one_colour(name, aa, seed, size, strength):
    for delta in FAMILIES[name].delta_grid:
        stimulus = draw(FAMILIES[name], strength=strength, delta=delta, seed=seed, size=size, aa=aa)
        count = stimulus.truth["count"]
        n = ndimage.label((stimulus.image == count["rgb"]).all(2), np.ones((3, 3)))[1]
        assert n == count["n"]
        assert str(n) == shown_text(stimulus, stimulus.answer)


@pytest.mark.parametrize("name", ["ouchi", "motion_frames"])
def test_frames_are_equal_exactly_when_nothing_moved(name):
    for delta in FAMILIES[name].delta_grid:
        image = draw(FAMILIES[name], delta=delta, seed=5, size=250).image
        assert (image[:, 10:120] == image[:, 130:240]).all() == (delta == 0)


@pytest.mark.parametrize("seed", range(4))
def test_wheels_turn_by_delta(seed):
    for delta in FAMILIES["rotating_snakes"].delta_grid:
        masks = draw(FAMILIES["rotating_snakes"], delta=delta, seed=seed, size=256).masks
        assert apart(direction(masks["b"]) - direction(masks["a"]), delta) < 3


@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_only_the_frame_has_planes_that_share_the_drawn_edges(delta, seed):
    masks, rows = draw(FAMILIES["impossible_triangle"], delta=delta, seed=seed, size=512).masks, []
    for k, name in enumerate("abc"):
        middle, turn = (centre(masks[name]) - 256) / 256, np.radians(direction(masks[name]))
        for step in (-0.2, 0.2):
            row = np.zeros((3, 3))
            row[k] = (*(middle + step * np.array([np.cos(turn), np.sin(turn)])), 1)
            row[(k + 1) % 3] = -row[k]
            rows.append(row.ravel())
    values = np.linalg.svd(np.array(rows), compute_uv=False)
    assert (values[-1] < 0.02) == (delta == 0)


@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_only_the_impossible_fork_joins_a_face_to_the_ground(delta, strength):
    for seed in range(4):
        stimulus = draw(FAMILIES["impossible_fork"], delta=delta, strength=strength, seed=seed, size=256)
        ground = ndimage.label(stimulus.image.max(2) > 100)[0] == 1
        assert ground[0].all() and ground[-1].all()
        leak = (ground & stimulus.masks["inducer"]).sum() / stimulus.masks["inducer"].sum()
        assert leak > 0.2 if delta else leak < 0.05


@pytest.mark.parametrize("seed", range(6))
def test_a_clock_is_right_only_if_the_hour_hand_agrees_with_the_minutes(seed):
    for delta in FAMILIES["clock_anomaly"].delta_grid:
        masks, turns = draw(FAMILIES["clock_anomaly"], delta=delta, seed=seed, size=512).masks, []
        for name in "ab":
            x, y = centre(masks[name]) - 256
            turns.append(float(np.degrees(np.arctan2(x, -y))) % 360)
        assert apart(turns[1] - turns[0] / 12, delta, 30) < 2


@pytest.mark.parametrize("seed", range(5))
def test_right_shadows_are_parallel_and_right_reflections_as_long_as_the_mast(seed):
    shadows = draw(FAMILIES["wrong_shadow"], delta=0, seed=seed, size=256).masks
    assert max(apart(direction(shadows[name]), direction(shadows["c"])) for name in "ab") < 2
    for delta in (-0.3, 0, 0.3):
        boats = draw(FAMILIES["wrong_reflection"], strength=0, delta=delta, seed=seed, size=256)
        for name, wrong in (("a", delta > 0), ("b", delta < 0)):
            truth = boats.truth[name]
            ink = (boats.image == truth["rgb"]).all(2)[:, int(truth["x0"])]
            mast, mirrored = int(ink[:int(truth["y0"])].sum()), int(ink[int(truth["y0"]):].sum())
            assert (mirrored != mast) == wrong


@pytest.mark.parametrize("name", SCENES)
def test_seeds_give_different_pictures_even_without_inducer(name):
    pictures = [draw(FAMILIES[name], strength=0, delta=0, seed=seed, size=96).image for seed in range(8)]
    assert len({picture.tobytes() for picture in pictures}) == 8


@pytest.mark.parametrize("name", SIDED)
def test_sides_change_with_the_seed(name):
    texts = {FAMILIES[name].texts(seed)[0] for seed in range(12)}
    fooled = {shown_text(s, s.illusion_answer) for s in (draw(FAMILIES[name], delta=0, seed=k, size=96) for k in range(12))}
    assert len(texts) == 2 and fooled == texts


@pytest.mark.parametrize("name", SCENES)
def test_fooled_observers_see_what_is_not_there(name):
    family = FAMILIES[name]
    classic = draw(family, delta=family.delta_grid[0], seed=2, size=96)
    control = draw(family, delta=0, strength=0, seed=2, size=96)
    assert control.illusion_answer is None
    assert classic.illusion_answer != classic.answer
    if name in FOOLED:
        stimulus = draw(family, delta=0, seed=2, size=96)
        assert shown_text(stimulus, stimulus.illusion_answer) == FOOLED[name]


@pytest.mark.parametrize("name", SCENES)
def test_families_travel_to_other_processes(name):
    family = pickle.loads(pickle.dumps(FAMILIES[name]))  # noqa: S301
    first, second = (draw(f, delta=0, seed=9, size=64) for f in (family, FAMILIES[name]))
    assert first.image.tobytes() == second.image.tobytes() and first.options == second.options


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_take_grid_values_only(name):
    with pytest.raises(ValueError, match=r"must be one of .*, got 0\.5"):
        draw(FAMILIES[name], delta=0.5)


def test_too_large_differences_are_named():
    with pytest.raises(ValueError, match=r"delta of clock_anomaly must be in \[-14.0, 14.0\], got 15"):
        draw(FAMILIES["clock_anomaly"], delta=15)
