"""Noise: drawn alike for every agent, carried out as said, survived as the theorem says, and seen through by a belief."""
import math
import re
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, nbinom

from collai.mobilebench import noise
from collai.mobilebench.devices import LiteDevice
from collai.mobilebench.kernel import NOTES, OVERLAYS, Action, Suite
from collai.mobilebench.noise import (
    KINDS,
    Belief,
    NoiseModel,
    Recovery,
    expected_steps,
    in_time,
    perform_noised,
    same_screen,
    survival,
)
from collai.mobilebench.tasks import SUITE_TASKS


@pytest.fixture(scope="module")
def tasks():
    """A few short tasks of all subsets."""
    return [t for t in SUITE_TASKS(36) if t.golden_steps <= 6]


@pytest.fixture(scope="module")
def device(tasks):
    """Their phone."""
    suite = tasks[0].phone()
    yield LiteDevice(suite)
    suite.close()


@pytest.fixture
def notes():
    """A small phone with one app."""
    suite = Suite([NOTES])
    yield suite
    suite.close()


@given(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 30), st.integers(0, 30))
def test_a_schedule_is_a_function_of_its_names_and_starts_with_the_shorter_one(kind, rate, seed, task, n, more):
    hits = NoiseModel(kind, rate, seed).schedule(n, task)
    drawn = np.random.Generator(np.random.PCG64([seed, zlib.crc32(task.encode("utf-8", "surrogatepass")), KINDS.index(kind)])).random(n)
    assert hits == (drawn < rate).tolist() == NoiseModel(kind, rate, seed).schedule(n + more, task)[:n]
    assert all(type(hit) is bool for hit in hits)


def test_the_kinds_are_the_published_four_and_six_more_in_order():
    assert KINDS == ("repeat", "unexecuted", "delay", "popup", "permission", "banner", "network", "crash", "message", "keyboard")
    assert len({tuple(NoiseModel(kind, 0.5).schedule(64, "a")) for kind in KINDS}) == 10


@pytest.mark.parametrize("make, message", [
    (lambda: NoiseModel("hail"), "unknown noise kind 'hail'; known: repeat"), (lambda: NoiseModel("popup", -0.1), r"in \[0, 1\], got -0\.1"),
    (lambda: NoiseModel("popup", math.nan), r"in \[0, 1\], got nan"), (lambda: NoiseModel("popup", "0.2"), r"in \[0, 1\], got '0\.2'"),
    (lambda: NoiseModel("popup", True), "got True"), (lambda: NoiseModel("popup", seed=-1), "seed must be a whole number, 0 or more, got -1"),
    (lambda: NoiseModel("popup").schedule(-1), "n must be a whole number, 0 or more, got -1"),
    (lambda: NoiseModel("popup").schedule(3, 7), "task_id must be a string, got 7"), (lambda: survival(2.5, 0.1), "got 2.5"),
    (lambda: survival(2, 1.1), r"in \[0, 1\], got 1\.1"), (lambda: expected_steps(-2, 0.1), "got -2"), (lambda: in_time(1, -1, 0.1), "limit must")])
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.integers(0, 40), st.integers(0, 90), st.floats(0.01, 0.99))
def test_formulas_equal_scipy(n, limit, q):
    assert survival(n, q) == pytest.approx(binom.pmf(0, n, q), abs=1e-12)
    assert in_time(n, limit, q) == pytest.approx(binom.sf(n - 1, limit, 1 - q), abs=1e-9)
    if n:
        assert expected_steps(n, q) == pytest.approx(n + nbinom.mean(n, 1 - q))
        assert in_time(n, limit, q) == pytest.approx(nbinom.cdf(limit - n, n, 1 - q), abs=1e-9)


def test_certain_loss_and_no_loss():
    assert (survival(3, 1), survival(3, 0), survival(0, 1)) == (0, 1, 1)
    assert (expected_steps(3, 1), expected_steps(0, 1), expected_steps(3, 0)) == (math.inf, 0, 3)
    assert (in_time(3, 2, 0), in_time(3, 3, 0), in_time(0, 0, 1), in_time(1, 99, 1)) == (0, 1, 1, 0)


class Recorder:
    """A device that writes down what it is asked for."""

    def __init__(self, suite=None):
        self.log = []
        if suite:
            self.suite = suite

    def perform(self, action):
        self.log.append(action)
        return f"done {len(self.log)}"


@pytest.mark.parametrize("kind, times", [("", 1), ("repeat", 2), ("unexecuted", 0), ("popup", 1), ("delay", 1), ("crash", 1)])
def test_an_action_is_carried_out_as_often_as_its_noise_says(kind, times):
    disturbed = []
    recorder = Recorder(SimpleNamespace(disturb=lambda *what: disturbed.append(what)))
    assert len(perform_noised(recorder, Action("back"), kind, 5)) == len(recorder.log) == times
    assert disturbed == {"popup": [("popup", 5)], "delay": [("loading", 5)], "crash": [("crash", 5)]}.get(kind, [])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_the_judge_is_never_hit(kind, notes):
    for action in (Action("finish"), Action("answer", text="7")):
        before = notes.digest()
        assert len(perform_noised(LiteDevice(notes), action, kind)) == 1 and notes.digest() == before


def test_a_phone_without_a_suite_can_only_repeat_or_drop():
    for kind in KINDS:
        if kind in ("repeat", "unexecuted"):
            perform_noised(Recorder(), Action("back"), kind)
        else:
            with pytest.raises(ValueError, match=f"noise '{kind}' needs a device with a suite, got Recorder"):
                perform_noised(Recorder(), Action("back"), kind)
    with pytest.raises(ValueError, match="unknown noise kind 'rain'"):
        perform_noised(Recorder(), Action("back"), "rain")


@given(st.lists(st.integers(-5, 5), min_size=4, max_size=4))
def test_screens_are_equal_up_to_two_pixels(shift):
    xml = '<hierarchy><node text="a" resource-id="x:id/a" bounds="[10,20][30,40]" /></hierarchy>'
    other = xml.replace("[10,20][30,40]", "[{},{}][{},{}]".format(*(v + d for v, d in zip((10, 20, 30, 40), shift, strict=True))))
    assert same_screen(xml, other) == (max(map(abs, shift)) <= 2)


@pytest.mark.parametrize("old, new", [('text="a"', 'text="b"'), ("x:id/a", "x:id/b"), ("<node ", '<node selected="true" '), ("</hierarchy>", "<node /></hierarchy>")])
def test_screens_differ_in_words_ids_states_and_number(old, new):
    xml = '<hierarchy><node text="a" resource-id="x:id/a" bounds="[10,20][30,40]" /></hierarchy>'
    assert not same_screen(xml, xml.replace(old, new))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "keyboard"])
def test_the_belief_names_what_happened(kind, notes):
    device, belief = LiteDevice(notes), Belief(notes.fork())
    for i, action in enumerate((Action("open", app="notes"), Action("tap", 312, 752))):
        perform_noised(device, action, kind if i else "")
        belief.update(action, device.hierarchy())
    true = {"delay": "loading", "repeat": ""}.get(kind, kind)
    assert belief.guesses[0].event == true and belief.guesses[0].cost == (true != "") and belief.lost == 0
    assert any(g.state and _digest(notes, g.state) == notes.digest() for g in belief.guesses) or kind == "repeat"


def _digest(suite, state):
    twin = suite.fork()
    twin.restore(state)
    return twin.digest()


def test_a_keyboard_is_thought_of_when_a_press_in_its_area_does_nothing(notes):
    device, belief = LiteDevice(notes), Belief(notes.fork())
    device.perform(Action("open", app="notes"))
    belief.update(Action("open", app="notes"), device.hierarchy())
    notes.disturb("keyboard")
    device.perform(Action("tap", 312, 752))
    belief.update(Action("tap", 312, 752), device.hierarchy())
    assert {g.event for g in belief.guesses} == {"unexecuted", "keyboard"}


def test_what_nothing_explains_is_counted_and_survived(notes):
    belief = Belief(notes.fork())
    belief.update(Action("open", app="notes"), "<hierarchy><node text='elsewhere' /></hierarchy>")
    assert belief.lost == 1 and len(belief.guesses) == 4


def run(task, device, kind, seed, limit=None, seen=lambda xml: xml):
    """An episode of the recovering agent."""
    device.restore(device.suite.initial)
    agent, done, limit = Recovery(task), [], limit or 40 * task.golden_steps
    hits = NoiseModel(kind, 0.2, seed).schedule(limit, task.identifier)
    while len(done) < limit and (not done or done[-1].kind != "finish"):
        done.append(agent.next(seen(device.hierarchy())))
        perform_noised(device, done[-1], kind if hits[len(done) - 1] else "", len(done) - 1)
    agent.close()
    return task.check(device.suite.initial, device.suite.snapshot(), done).success and done[-1].kind == "finish", done, agent


def test_without_noise_the_plan_is_followed(tasks, device):
    for task in tasks[::9]:
        device.restore(device.suite.initial)
        agent, done = Recovery(task), []
        while not done or done[-1].kind != "finish":
            done.append(agent.next(device.hierarchy()))
            device.perform(done[-1])
        agent.close()
        assert done[:task.golden_steps] == task.oracle_actions() and agent.searches <= len(done) - task.golden_steps


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_survived(kind, tasks, device):
    task = tasks[KINDS.index(kind)]
    good, done, agent = run(task, device, kind, 3)
    assert good and agent.belief.lost == 0, (task.identifier, [str(a) for a in done])


def test_a_browser_that_is_off_by_a_pixel_does_not_confuse(tasks, device):
    def shaken(xml):
        return re.sub(r'bounds="\[(\d+),', lambda m: f'bounds="[{int(m[1]) + 1},', xml)
    good, _, agent = run(tasks[0], device, "unexecuted", 1, seen=shaken)
    assert good and agent.belief.lost == 0


def test_a_wrong_deed_is_taken_back(tasks, device):
    """The state after another task of the app is repaired by that task's undo."""
    from collai.mobilebench.tasks import _every
    task = next(t for t in tasks if t.subset == "base" and not any(a.kind == "answer" for a in t.oracle_actions()))
    agent = Recovery(task)
    for other in sorted((t for t in _every(task.seed, task.locale, task.app) if t.undo), key=lambda t: len(t.undo)):
        if other.template.name not in {name for name, *_ in task.parts}:
            agent.phone.restore(agent.phone.initial)
            noise._walk(agent.phone, task.app, [("open",), *other.plan])
            state = agent.phone.snapshot()
            if noise._judged(agent, state).side_effects:
                break
    way = noise._search(agent, state) or noise._repair(agent, state)
    agent.phone.restore(state)
    for action in way:
        agent.phone.perform(action)
    assert way and noise._judged(agent, agent.phone.snapshot(), way).success
    agent.close()


def test_overlays_are_closed_by_their_own_buttons(notes):
    for kind in OVERLAYS:
        notes.restore(notes.initial)
        notes.disturb(kind, 1)
        action = noise._closing(notes)
        assert action is not None and notes.perform(action) and not notes.overlaid(kind)
    assert noise._closing(notes) is None


@settings(max_examples=20)
@given(st.integers(0, 2**20))
def test_models_are_values(seed):
    model = NoiseModel("popup", 0.3, seed)
    assert replace(model) == model and hash(replace(model)) == hash(model) and replace(model, seed=seed + 1) != model
