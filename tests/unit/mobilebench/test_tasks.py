"""Tasks: sizes and levels, oracles and scripts of known truth, errors of building, what an episode may be."""
import json
import pickle
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.mobilebench import goals, tasks
from collai.mobilebench.apps import MANIFESTS, AppSuite
from collai.mobilebench.goals import Say, Template, Want
from collai.mobilebench.kernel import Action
from collai.mobilebench.tasks import SUBSETS, SUITE_TASKS, SuiteTask

NAME, KIND = MANIFESTS[0].name, MANIFESTS[0].kind


def template(name, want, plan=(), undo=None, number=1):
    """A template whose instances differ by nothing but their number."""
    return Template(name, "mine", lambda db, m: [{"n": n} for n in range(number)], lambda p: (f"做{p['n']}", f"Do {p['n']}"),
                    lambda p, m: list(plan), lambda p: want(p), undo=undo)


@pytest.fixture(scope="module")
def few():
    """A few tasks of all subsets."""
    return SUITE_TASKS(12, seed=0, locale="en")


@pytest.fixture
def task(few):
    return next(t for t in few if t.subset == "base" and all(isinstance(w, Want) for w in t.wants))


# ---- sizes ----

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5000), st.lists(st.integers(1, 400), min_size=1, max_size=7))
def test_shares_are_whole_and_near(n, sizes):
    shares = {str(i): s for i, s in enumerate(sizes)}
    found = tasks._apportion(n, shares)
    assert sum(found.values()) == n and list(found) == list(shares)
    assert all(abs(found[name] - n * s / sum(sizes)) < 1 for name, s in shares.items())


def test_a_small_suite_has_all_subsets(few):
    assert len(few) == len({t.identifier for t in few}) == 12
    assert Counter(t.subset for t in few) == tasks._apportion(12, tasks._SIZES)
    assert {t.subset for t in few} <= set(SUBSETS) and {t.level for t in few} <= set(tasks.LEVELS)
    assert all(t.golden_steps == len(t.oracle_actions()) and t.apps == (t.app,) and t.plan[0] == ("open",) for t in few)
    noisy = [t for t in few if t.subset == "noise-robust"]
    assert [t.identifier[6:] for t in noisy] == [t.identifier for t in few if t.subset == "base"][:len(noisy)]


def test_equal_arguments_give_equal_tasks_and_others_other_ones(few):
    again = SUITE_TASKS(12, seed=0, locale="en")
    assert again == few and again is not few
    tasks._suite_tasks.cache_clear()
    assert [(t.identifier, t.goal, t.actions) for t in SUITE_TASKS(12, 0, "en")] == [(t.identifier, t.goal, t.actions) for t in few]


@pytest.mark.parametrize("n", [0, -3, 1.5, True, "5", None])
def test_the_number_of_tasks_is_a_whole_number(n):
    with pytest.raises(ValueError, match=f"n must be a whole number, 1 or more, got {n!r}"):
        SUITE_TASKS(n)


def test_wrong_seed_and_language_are_refused():
    with pytest.raises(ValueError, match="locale must be 'zh' or 'en', got 'fr'"):
        SUITE_TASKS(1, locale="fr")
    with pytest.raises(ValueError, match="seed must be a whole number, 0 or more, got -1"):
        SUITE_TASKS(1, seed=-1)


def pool(app, **classes):
    """Instances of classes, one template for each."""
    return [goals._Instance(app, template(name, lambda p: [])._replace(function=name), {"n": i}, i)
            for name, count in classes.items() for i in range(count)]


def test_the_choice_meets_the_shares_even_if_an_app_lacks_a_class():
    pools = [pool("b", x=6, y=6), pool("c", x=1, y=6), pool("a", x=6)]
    taken = tasks._chosen(pools, 9, {"x": 1, "y": 2}, lambda o: o.template.function)
    assert [len(some) for some in taken] == [3, 3, 3]
    assert Counter(o.template.function for some in taken for o in some) == {"x": 3, "y": 6}
    assert all(len({id(o) for o in some}) == 3 for some in taken)
    first = tasks._chosen(pools, 9, {"x": 2, "y": 1}, lambda o: o.template.function, [[], [pools[1][5]], []])
    assert first[1][0] is pools[1][5]
    with pytest.raises(ValueError, match="a has 6 instances, 10 are needed"):
        tasks._chosen(pools, 30, {"x": 1, "y": 1}, lambda o: o.template.function)


def test_levels_follow_the_golden_length(few):
    some = [SuiteTask(f"t{9 - g}_{i}", 0, "en", "", g, "base", "", "mine", 0.0, ("a",), (), ()) for i in range(3) for g in (9, 2, 5, 7)]
    ranked = tasks._ranked(some, "base")
    assert Counter(t.level for t in ranked) == tasks._apportion(12, dict(zip(tasks.LEVELS, (97, 99, 114), strict=True)))
    order = [tasks.LEVELS.index(t.level) for t in sorted(ranked, key=lambda t: t.golden_steps)]
    assert order == sorted(order) and [t.identifier for t in ranked] == [t.identifier for t in some]


# ---- a task ----

def test_a_task_travels_and_is_known_by_its_name(task):
    twin = pickle.loads(pickle.dumps(task))  # noqa: S301
    assert twin == task and hash(twin) == hash(task) and twin.actions == task.actions and twin.wants == task.wants
    assert twin.plan == task.plan and twin.may == task.may and twin.undo == task.undo


def test_every_task_gets_a_phone_of_its_own(task):
    phone, other = task.phone(), task.phone()
    first = AppSuite(task.seed, task.locale).digest()
    phone.perform(Action("open", app=task.app))
    assert isinstance(phone, AppSuite) and phone.digest() != first == other.digest() and other.initial == phone.initial


def test_an_oracle_succeeds_and_its_scripts_are_told_apart(task):
    phone = task.phone()
    scripts = task.adversarial()
    kept = [(name, tuple(actions), expected) for name, actions, expected in scripts]
    assert len(scripts) >= 3 and len({name for name, _, _ in scripts}) == len(scripts)
    for name, actions, expected in [("oracle", task.oracle_actions(), True), *scripts]:
        phone.restore(phone.initial)
        for action in actions:
            phone.perform(action)
        verdict = task.check(phone.initial, phone.snapshot(), actions)
        assert verdict.success == expected, (name, verdict.reason)
        if name in ("side_effect", "elsewhere"):
            assert verdict.side_effects and verdict.progress == 1.0 and "side effect" in verdict.reason
    task.adversarial()[0][1].clear()
    assert [(name, tuple(actions), expected) for name, actions, expected in task.adversarial()] == kept


def test_a_snapshot_of_another_phone_is_refused(task):
    with pytest.raises(ValueError, match="of a phone with other apps or another language"):
        task.check(AppSuite(task.seed, task.locale, [NAME]).initial, task.phone().initial)
    with pytest.raises(ValueError, match="no snapshot of a phone"):
        task.check(task.phone().initial, b"x" * 5000)


def test_the_last_answer_counts_whatever_form_an_episode_has(few):
    said = [Action("answer", text="one"), Action("wait"), Action("answer", text="two"), Action("finish")]
    for episode in (said, tuple(said), SimpleNamespace(actions=said), SimpleNamespace(answer="two"),
                    SimpleNamespace(steps=[SimpleNamespace(action=a) for a in said])):
        assert tasks._answer_of(episode) == "two"
    for episode in ((), None, [Action("wait")], SimpleNamespace(actions=[])):
        assert tasks._answer_of(episode) == ""


# ---- errors of building ----

@pytest.fixture
def swapped(monkeypatch):
    """Put templates into the place of those of the first archetype."""
    def swap(*made):
        monkeypatch.setitem(tasks.TEMPLATES, KIND, made)
        monkeypatch.setattr(tasks, "_ACTIONS", {})
        return tasks._every(0, "zh", NAME)
    return swap


SWITCH = [Want("switch", "put", 1, {"checked": 0})]


@pytest.mark.parametrize("plan, want, message", [
    ([("tap", "nowhere")], SWITCH, r'task odd\({"n": 0}\) of .* cannot be solved: no way to widget'),
    ([], [Say(("",))], r'task odd\({"n": 0}\) of .* is true from the start'), ([], SWITCH, r"is judged a failure: not met: Want")])
def test_a_bad_instance_is_an_error_that_names_it(swapped, plan, want, message):
    one = swapped(template("odd", lambda p: want, plan))
    with pytest.raises(ValueError, match=message):
        tasks._task(0, "zh", "base", list(one))


def test_templates_that_make_no_long_task_are_an_error(swapped):
    swapped(template("a", lambda p: SWITCH), template("b", lambda p: SWITCH))
    with pytest.raises(ValueError, match="no long-horizon task in .* out of 2 templates; last problem: length"):
        tasks._long(0, "zh", NAME, 1)


# ---- all tasks ----

BULK = """
import json, sys
from collections import Counter
from collai.mobilebench.tasks import SUITE_TASKS
tasks = SUITE_TASKS(int(sys.argv[2]), 0, sys.argv[1])
phone, wrong, runs = tasks[0].phone(), [], Counter()
for i, task in enumerate(tasks):
    scripts = task.adversarial() if i % 20 == 0 and task.subset != "noise-robust" else []
    if task.subset == "noise-robust":
        continue
    for name, actions, truth in [("oracle", task.oracle_actions(), True), *scripts]:
        phone.restore(phone.initial)
        for action in actions:
            phone.perform(action)
        verdict = task.check(phone.initial, phone.snapshot(), actions)
        runs[name] += 1
        if verdict.success != truth:
            wrong.append((task.identifier, name, verdict.reason))
        if name == "oracle" and task.check(phone.initial, phone.initial).success:
            wrong.append((task.identifier, "idle", ""))
print(json.dumps({"wrong": wrong, "runs": runs, "names": len({t.identifier for t in tasks}),
                  "subsets": Counter(t.subset for t in tasks), "apps": len({t.app for t in tasks}),
                  "levels": Counter(f"{t.subset} {t.level}" for t in tasks)}))
"""


@pytest.mark.parametrize("locale, n", [("zh", 1080), ("en", 108)])
def test_all_oracles_succeed_in_the_full_suite(locale, n):
    """In a process of its own: run-time type checks would make it a hundred times slower. Noise-robust tasks have the base plans."""
    done = subprocess.run([sys.executable, "-c", BULK, locale, str(n)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sizes = tasks._apportion(n, tasks._SIZES)
    assert found["wrong"] == [] and found["names"] == n and found["subsets"] == sizes
    assert found["runs"]["oracle"] == n - sizes["noise-robust"]
    if n == 1080:
        assert found["apps"] == len(MANIFESTS) == 80
        for subset, counts in tasks._RANKS.items():
            assert [found["levels"][f"{subset} {level}"] for level in tasks.LEVELS] == list(counts)
