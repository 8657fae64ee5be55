"""The runner: each episode once whatever is killed, the same rows from every run, and what the rows say."""
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from collai.eval.stats import pass_at_k, wilson
from collai.eval.store import Store
from collai.mobilebench import devices, runner
from collai.mobilebench.agents import HeuristicAgent, OracleAgent, RandomAgent, ScriptAgent
from collai.mobilebench.devices import DeviceLost, LiteDevice, Observation, StepInfo, WebDevice, find_browser
from collai.mobilebench.kernel import Action
from collai.mobilebench.noise import KINDS, NoiseModel
from collai.mobilebench.rules import parse_rule
from collai.mobilebench.runner import Results, report, run_episode, run_suite
from collai.mobilebench.tasks import SUITE_TASKS

TASKS = SUITE_TASKS(27)
BASE = [task for task in TASKS if task.subset == "base"]
ROBUST = [task for task in TASKS if task.subset == "noise-robust"]
BROWSER = pytest.mark.skipif(find_browser() is None or find_spec("playwright") is None, reason="no browser")


PHONE = LiteDevice(TASKS[0].phone())
FIRST = PHONE.suite.digest()


@pytest.fixture
def lite():
    return PHONE


def phone():
    """One phone for all runs with one worker: closing it does nothing."""
    return PHONE


def own_phone():
    return LiteDevice(TASKS[0].phone())


def plain(rows):
    """Rows without times and device."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "step_seconds", "device", "screens")} for row in rows]


def suite(out, agent=OracleAgent, tasks=None, **more):
    return run_suite(BASE[:3] if tasks is None else tasks, agent, **{"device_factory": phone, "out": out} | more)


# One episode


@pytest.mark.parametrize("category", ["SR", "Overdue", "Premature", "HardFail"])
def test_an_episode_ends_in_its_category_from_the_first_state_on(lite, category):
    task, waits = BASE[0], [Action("wait")] * 99
    golden = task.oracle_actions()
    script = {"SR": golden, "Overdue": golden + waits, "Premature": [], "HardFail": waits}[category]
    for action in BASE[1].oracle_actions():
        lite.perform(action)  # left by someone else
    episode = run_episode(lite, task, ScriptAgent(script))
    limit = max(3 * task.golden_steps, task.golden_steps + 10)
    assert episode.category == category and episode.verdict.success == (category in ("SR", "Overdue"))
    assert episode.n_actions == len(episode.steps) == len(episode.actions)
    assert episode.n_actions == {"SR": len(golden) + 1, "Premature": 1}.get(category, limit)
    assert episode.finished == (episode.actions[-1].kind == "finish") == (category in ("SR", "Premature"))
    assert (lite.suite.digest() == FIRST) == (category == "Premature")
    assert task.check(lite.suite.initial, lite.snapshot(), episode) == episode.verdict
    assert not episode.timed_out and episode.seconds > 0


def test_an_agent_needs_no_reset_and_one_that_has_it_is_reset_once_an_episode(lite):
    calls = []

    class Counted(ScriptAgent):
        def reset(self, task):
            calls.append(task.identifier)
            super().reset(task)

    assert run_episode(lite, BASE[0], SimpleNamespace(act=lambda seen, goal: Action("finish"))).category == "Premature"
    for task in BASE[:2]:
        run_episode(lite, task, Counted([]))
    assert calls == [task.identifier for task in BASE[:2]]


def test_pictures_are_made_for_readers_and_records_alone(lite, monkeypatch, tmp_path):
    made = []
    draw = devices._png
    monkeypatch.setattr(devices, "_png", lambda image: made.append(1) or draw(image))
    seen = []

    class Looking(ScriptAgent):
        def act(self, observation, goal):
            seen.append(observation.png)
            return super().act(observation, goal)

    n = BASE[0].golden_steps + 1
    run_episode(lite, BASE[0], OracleAgent())
    assert not made
    run_episode(lite, BASE[0], OracleAgent(), record=tmp_path / "all")
    assert len(made) == n + 1
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == sorted(f"{i:03d}.{kind}" for i in range(n + 1) for kind in ("png", "xml"))
    assert (tmp_path / "all/000.xml").read_text().startswith("<hierarchy")
    run_episode(lite, BASE[0], OracleAgent(), screenshots=False, record=tmp_path / "xml")
    assert len(made) == n + 1 and {path.suffix for path in (tmp_path / "xml").iterdir()} == {".xml"}
    run_episode(lite, BASE[0], Looking(BASE[0].oracle_actions()))
    assert len(made) == 2 * n + 1 and all(data[:4] == b"\x89PNG" for data in seen)
    run_episode(lite, BASE[0], Looking([]), screenshots=False)
    assert seen[-1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_agent_meets_the_schedule_of_the_task(lite, kind):
    i, model = KINDS.index(kind) % len(BASE), NoiseModel(kind, 0.5, 3)
    for agent in (ScriptAgent([Action("back"), Action("answer", text="x"), *[Action("home")] * 99]), RandomAgent(1)):
        episode = run_episode(lite, BASE[i], agent, noise=model, max_steps=5)
        schedule = model.schedule(5, BASE[i].identifier)
        for step, hit in zip(episode.steps, schedule, strict=False):
            assert step.noise == (kind if hit and step.action.kind not in ("finish", "answer") else "")


@pytest.mark.parametrize(("more", "text"), [
    ({"max_steps": 0}, "max_steps must be a whole number, 1 or more, got 0"),
    ({"max_steps": True}, "got True"), ({"timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
    ({"noise": "popup"}, "noise must be a NoiseModel or None, got 'popup'")])
def test_bad_terms_are_refused(lite, more, text):
    with pytest.raises(ValueError, match=text):
        run_episode(lite, BASE[0], OracleAgent(), **more)


def test_no_action_and_one_outside_the_screen_are_refused(lite):
    with pytest.raises(ValueError, match="the agent must give an Action, got 'tap'"):
        run_episode(lite, BASE[0], SimpleNamespace(act=lambda seen, goal: "tap"))
    with pytest.raises(ValueError, match="outside the screen"):
        run_episode(lite, BASE[0], ScriptAgent([Action("tap", 900, 10)]))


class Hung:
    """Acts once, then never again, unless it is told to be merely slow."""

    def __init__(self, event=None):
        self.event, self.turns = event, 0

    def act(self, observation, goal):
        self.turns += 1
        while self.turns > 1 and not (self.event and time.sleep(0.3) is None):
            with suppress(Exception):  # what a careless agent does
                time.sleep(0.01)
        return Action("wait")


def test_time_is_up_for_a_hung_agent_and_in_a_thread_for_a_slow_one(lite):
    episode = run_episode(lite, BASE[0], Hung(), timeout=0.2)
    assert episode.timed_out and episode.n_actions <= 1 and episode.category == "HardFail"
    assert run_episode(lite, BASE[0], OracleAgent(), timeout=1e-9).n_actions == 0
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    found = []
    thread = threading.Thread(target=lambda: found.append(run_episode(lite, BASE[0], Hung(event=True), timeout=0.2)))
    thread.start()
    thread.join()
    assert found[0].timed_out and found[0].n_actions <= 1


def test_a_real_phone_starts_the_activity_and_is_judged_by_the_rule_in_order():
    screens = ['<hierarchy><node text="a"/></hierarchy>', '<hierarchy><node text="b"/></hierarchy>']

    class Phone:
        suite, at, started = None, 0, ()

        def start(self, activity):
            self.at, self.started = 0, (*self.started, activity)

        def observe(self):
            return Observation(None, screens[self.at], (360, 800), self.at)

        def perform(self, action):
            self.at = min(1, self.at + 1)
            return StepInfo(self.at, True, 0.0)

    xpaths = [",".join(f"'''//node[@text=\"{c}\"]'''" for c in order) for order in ("ab", "ba")]
    rules = [parse_rule('{"xpath": [' + text + "]}") for text in xpaths]
    device = Phone()
    found = [run_episode(device, SimpleNamespace(identifier="t", goal="g", golden_steps=2, rule=rule, home_activity="a/b"),
                         ScriptAgent([Action("back")])) for rule in rules]
    assert [episode.category for episode in found] == ["SR", "Premature"] and device.started == ("a/b",) * 2
    assert [episode.verdict.progress for episode in found] == [1.0, 0.5]


# Many episodes


def test_rows_have_their_keys_and_a_second_run_runs_nothing(tmp_path):
    made, out = [], tmp_path / "a.db"

    def counted(seed):
        made.append(seed)
        return RandomAgent(seed)

    terms = {"repeats": 2, "max_steps": 3}
    first = suite(out, counted, **terms)
    assert [(row["repeat"], row["task"]) for row in first.rows] == [(r, t.identifier) for r in range(2) for t in BASE[:3]]
    assert sorted(made) == [0, 1] and not first.errors
    assert first.rows[0]["actions"] != first.rows[3]["actions"]  # the repeat is the seed
    assert suite(out, counted, **terms, device_factory=lambda: pytest.fail("no device is needed")).rows == first.rows
    more = suite(out, counted, BASE[:4], **terms)
    assert [row for row in more.rows if row["task"] != BASE[3].identifier] == first.rows
    assert len(Results.load(out).rows) == 8
    again = suite(out, counted, **terms, resume=False)
    assert plain(again.rows) == plain(first.rows) and again.rows[0]["seconds"] != first.rows[0]["seconds"]
    assert len(Results.load(out).rows) == 6


def test_a_folder_holds_the_store_and_rows_equal_single_episodes(tmp_path, lite):
    noise = NoiseModel("popup", 0.3, 5)
    rows = suite(tmp_path, HeuristicAgent, ROBUST[:2], noise=noise, max_steps=5, repeats=2).rows
    assert (tmp_path / "episodes.db").is_file()
    for row in rows:
        task = next(t for t in ROBUST if t.identifier == row["task"])
        model = NoiseModel("popup", 0.3, 5 + row["repeat"])
        episode = run_episode(lite, task, HeuristicAgent(row["repeat"]), noise=model, max_steps=5)
        assert [str(a) for a in episode.actions] == row["actions"] and [s.noise for s in episode.steps] == row["hits"]
        assert (episode.category, episode.verdict.progress) == (row["category"], row["ratio"])


def test_agents_and_noises_share_a_file(tmp_path):
    out = tmp_path / "a.db"
    for agent in (OracleAgent, partial(ScriptAgent, [])):
        for noise in (None, NoiseModel("repeat", 0.2)):
            suite(out, agent, noise=noise)
    found = Results.load(out)
    assert {(row["agent"], row["noise"]) for row in found.rows} == {
        (a, n) for a in ("OracleAgent", "ScriptAgent") for n in ("none", "repeat")}
    assert len(found.rows) == 12 and len(found.table(None)) == 4


@pytest.mark.parametrize(("more", "text"), [
    ({"noise": NoiseModel("popup", 0.3)}, r"another noise.rate \(stored 0.2, given 0.3\)"),
    ({"noise": NoiseModel("popup", 0.2, 1)}, r"another noise.seed \(stored 0, given 1\)"),
    ({"max_steps": 5}, r"another max_steps \(stored None, given 5\)"),
    ({"agent": partial(OracleAgent, recover=True), "name": "OracleAgent"}, "another agent.recover"),
    ({"agent": HeuristicAgent, "name": "OracleAgent"}, "another agent "),
    ({"tasks": [replace(BASE[0], seed=1)]}, "is of another phone"),
    ({"tasks": [replace(BASE[0], locale="en")]}, "is of another phone")])
def test_another_configuration_is_refused(tmp_path, more, text):
    out, terms = tmp_path / "a.db", {"noise": NoiseModel("popup", 0.2), "tasks": BASE[:1]}
    kept = suite(out, **terms)
    with pytest.raises(ValueError, match=f"config hash mismatch.*{text}"):
        suite(out, **terms | more)
    assert suite(out, **terms).rows == kept.rows


def test_a_task_with_another_content_is_refused(tmp_path):
    made = [SimpleNamespace(**{n: getattr(BASE[0], n) for n in ("identifier", "golden_steps", "subset", "level", "check")},
                            goal=goal, oracle_actions=BASE[0].oracle_actions) for goal in ("a", "b")]
    suite(tmp_path / "a.db", tasks=made[:1])
    with pytest.raises(ValueError, match="config hash mismatch.*with another content"):
        suite(tmp_path / "a.db", tasks=made[1:])


@pytest.mark.parametrize(("more", "text"), [
    ({"tasks": []}, "tasks must hold at least one task, got 0"),
    ({"tasks": BASE[:1] * 2}, "identifiers of tasks must differ"),
    ({"tasks": [BASE[0], replace(BASE[1], locale="en")]}, "tasks must be for one phone"),
    ({"n_workers": 0}, "n_workers must be a whole number, 1 or more, got 0"), ({"repeats": 0}, "repeats must be")])
def test_bad_runs_are_refused(tmp_path, more, text):
    with pytest.raises(ValueError, match=text):
        suite(tmp_path / "a.db", **more)


def test_recorded_screens_are_blobs_of_the_cell(tmp_path):
    rows = suite(tmp_path / "a.db", tasks=BASE[:1], record=True).rows
    assert rows[0]["screens"] == rows[0]["n_actions"] + 1
    with Store(tmp_path / "a.db", {"benchmark": "mobilebench", "seed": 0, "locale": "zh"}) as store:
        key = (BASE[0].identifier, 0, "OracleAgent", "none")
        assert store.blob(key, "000.png")[:4] == b"\x89PNG" and store.blob(key, "001.xml").startswith(b"<hierarchy")


# What is lost on the way


class Losing(LiteDevice):
    """Raises in the middle of an episode, as often as there are errors."""

    errors, closed = [], 0

    def perform(self, action):
        if self._step == 2 and Losing.errors:
            raise Losing.errors.pop()
        return super().perform(action)

    def close(self):
        Losing.closed += 1


@pytest.mark.parametrize("error", [DeviceLost("gone"), ConnectionError("cut"), TimeoutError("late")])
def test_infrastructure_is_tried_again_and_the_row_is_the_same(tmp_path, error):
    def lossy():
        return Losing(PHONE.suite)

    Losing.errors, Losing.closed = [error], 0
    found = suite(tmp_path / "a.db", device_factory=lossy)
    assert plain(found.rows) == plain(suite(tmp_path / "b.db").rows) and not found.errors and not Losing.errors
    assert Losing.closed == 1 + isinstance(error, DeviceLost)


def test_an_episode_without_device_is_noted_and_taken_up_later(tmp_path):
    Losing.errors = [DeviceLost("gone")] * 3
    found = suite(tmp_path / "a.db", device_factory=lambda: Losing(PHONE.suite))
    assert [error["key"] for error in found.errors] == [(BASE[0].identifier, 0, "OracleAgent", "none")]
    assert len(found.rows) == 2 and found.errors[0]["tries"] == 3 and not Losing.errors
    later = suite(tmp_path / "a.db")
    assert len(later.rows) == 3 and not later.errors


def test_failures_and_time_outs_of_agents_are_never_tried_again(tmp_path):
    episodes = []

    class Bad(Hung):
        def reset(self, task):
            self.turns = 0
            episodes.append(task.identifier)

    rows = suite(tmp_path / "a.db", Bad, timeout=0.1).rows
    assert len(episodes) == 3 and all(row["timed_out"] and row["category"] == "HardFail" for row in rows)

    def broken():
        return SimpleNamespace(act=lambda seen, goal: 1 / 0, reset=lambda task: episodes.append("broken"))

    with pytest.raises(ZeroDivisionError):
        suite(tmp_path / "b.db", broken)
    assert episodes.count("broken") == 1


def test_an_interrupt_loses_nothing(tmp_path):
    Losing.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        suite(tmp_path / "a.db", RandomAgent, device_factory=lambda: Losing(PHONE.suite), repeats=2, name="R",
              max_steps=4)
    assert plain(suite(tmp_path / "a.db", RandomAgent, repeats=2, name="R", max_steps=4).rows) == plain(
        suite(tmp_path / "b.db", RandomAgent, repeats=2, name="R", max_steps=4).rows)


def killing(folder):
    """A factory of agents, of which one kills its own process in the middle of its first episode."""
    class Deadly(OracleAgent):
        def act(self, observation, goal):
            if observation.step == 2:
                try:
                    os.close(os.open(f"{folder}/killed", os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
                except FileExistsError:
                    pass
            return super().act(observation, goal)

    return Deadly


def make_phone():
    """A factory that worker processes can take."""
    def made():
        from collai.mobilebench.devices import LiteDevice
        from collai.mobilebench.tasks import SUITE_TASKS

        return LiteDevice(SUITE_TASKS(1)[0].phone())

    return made


def test_a_worker_killed_in_an_episode_costs_nothing_but_time(tmp_path):
    found = suite(tmp_path / "a.db", killing(tmp_path), BASE[:4], n_workers=2, device_factory=make_phone(), name="O")
    assert (tmp_path / "killed").exists()
    assert plain(found.rows) == plain(suite(tmp_path / "b.db", tasks=BASE[:4], name="O").rows) and not found.errors
    assert len(Results.load(tmp_path / "a.db").rows) == 4


KILLED = """
import os, signal, sys
from collai.mobilebench.agents import OracleAgent
from collai.mobilebench.devices import LiteDevice
from collai.mobilebench.runner import run_suite
from collai.mobilebench.tasks import SUITE_TASKS

Agent = OracleAgent

class OracleAgent(Agent):
    episodes = 0

    def reset(self, task):
        OracleAgent.episodes += 1
        super().reset(task)

    def act(self, observation, goal):
        if OracleAgent.episodes == 3 and observation.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(observation, goal)

tasks = [task for task in SUITE_TASKS(27) if task.subset == "base"]
run_suite(tasks, OracleAgent, device_factory=lambda: LiteDevice(tasks[0].phone()), out=sys.argv[1], name="O")
"""


def test_a_killed_run_is_taken_up_where_it_was(tmp_path):
    path = tmp_path / "a.db"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = Results.load(path).rows
    found = suite(path, tasks=BASE[:4], name="O").rows
    assert len(kept) == 2 and len(found) == 4 and [row for row in found if row in kept] == found[:2]
    assert plain(found) == plain(suite(tmp_path / "b.db", tasks=BASE[:4], name="O").rows)


def test_threads_give_the_rows_of_one_worker(tmp_path):
    found = suite(tmp_path / "a.db", RandomAgent, n_workers=2, engine="threads", repeats=2, max_steps=3, device_factory=own_phone)
    assert plain(found.rows) == plain(suite(tmp_path / "b.db", RandomAgent, repeats=2, max_steps=3).rows)


@BROWSER
def test_a_browser_killed_in_an_episode_is_replaced_and_the_episode_is_recorded_once(tmp_path):
    webs, killed = [], []

    def web():
        webs.append(WebDevice(TASKS[0].phone()))
        return webs[-1]

    class Deadly(OracleAgent):
        def act(self, observation, goal):
            if observation.step == 2 and not killed:
                killed.append(webs[-1].pid)
                os.kill(webs[-1].pid, signal.SIGKILL)
            return super().act(observation, goal)

    found = suite(tmp_path / "a.db", Deadly, BASE[:1], device_factory=web, name="O")
    assert len(killed) == 1 and len(webs) == 2 and all(web._closed for web in webs) and not found.errors
    assert plain(found.rows) == plain(suite(tmp_path / "b.db", tasks=BASE[:1], name="O").rows)
    assert len(Results.load(tmp_path / "a.db").rows) == 1


# What the rows say


def row(task="t", agent="a", noise="none", repeat=0, category="SR", **more):
    matched, finished = category in ("SR", "Overdue"), category in ("SR", "Premature")
    return {"task": task, "agent": agent, "noise": noise, "repeat": repeat, "category": category, "matched": matched,
            "finished": finished, "n_actions": 4, "golden_steps": 3, "ratio": float(matched), "level": "easy",
            "subset": "base", "app": "x", "function": "search", "side_effects": [], "seconds": 1.0,
            "completion_tokens": None, "prompt_tokens": None, **more}


@settings(max_examples=40)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_unbiased(n, data):
    k, p = data.draw(st.integers(1, n)), data.draw(st.floats(0, 1))
    mean = 0.0
    for c in range(n + 1):
        rows = [row(repeat=r, category="SR" if r < c else "HardFail") for r in range(n)]
        value = Results(rows, []).pass_at(k)[0]["pass_at_k"]
        assert value == pass_at_k(n, c, k)
        mean += value * binom.pmf(c, n, p)
    assert math.isclose(mean, 1 - (1 - p) ** k, abs_tol=1e-9)


def test_pass_at_k_refuses_more_tries_than_repeats():
    rows = [row(repeat=r) for r in range(3)] + [row("u", repeat=r) for r in range(2)]
    with pytest.raises(ValueError, match="k must be at most the repeats of each task, got k=3 for 2 repeats"):
        Results(rows, []).pass_at(3)
    with pytest.raises(ValueError, match="k must be a whole number, 1 or more, got 0"):
        Results(rows, []).pass_at(0)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_noise_drop_pairs_tasks_and_tests_them_exactly(pairs):
    end = {True: "SR", False: "Premature"}
    rows = [row(f"t{i}", category=end[clean]) for i, (clean, _) in enumerate(pairs)]
    rows += [row(f"t{i}", category=end[not clean], repeat=1) for i, (clean, _) in enumerate(pairs)]  # not used
    rows += [row(f"noise_t{i}", noise="popup", category=end[hit]) for i, (_, hit) in enumerate(pairs)]
    rows += [row("alone", noise="popup"), row("t0", agent="other", noise="popup")]
    (line,) = Results(rows, []).noise_drop()
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    assert (line["agent"], line["noise"], line["pairs"], line["b"], line["c"]) == ("a", "popup", len(pairs), b, c)
    assert math.isclose(line["drop"], (b - c) / len(pairs), abs_tol=1e-12)
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert math.isclose(line["p"], expected, rel_tol=1e-9) and line["p_holm"] == line["p"]


def test_the_same_task_is_the_nearer_pair_and_holm_corrects_over_kinds():
    rows = [row("t"), row("noise_t", category="HardFail")]
    rows += [row("noise_t", noise=kind, category="SR") for kind in ("popup", "delay")]
    drop = Results(rows, []).noise_drop()
    assert [(line["noise"], line["b"], line["c"]) for line in drop] == [("popup", 0, 1), ("delay", 0, 1)]
    assert all(line["p_holm"] == min(1.0, 2 * line["p"]) for line in drop)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["SR", "Overdue", "Premature", "HardFail"]), min_size=1, max_size=20))
def test_tables_count(categories):
    rows = [row(f"t{i}", category=c, subset="base" if i % 2 else "long-tail",
                side_effects=["x.y 1"] if c == "HardFail" else []) for i, c in enumerate(categories)]
    found, n = Results(rows, []), len(rows)
    total = found.table()[0]
    assert total["subset"] == "all" and math.isclose(sum(total[c] for c in ("SR", "Overdue", "Premature", "HardFail")), 1)
    assert (total["SR_low"], total["SR_high"]) == wilson(categories.count("SR"), n)
    assert sum(line["n"] for line in found.table()[1:]) == n == found.table(None)[0]["n"]
    claims = categories.count("SR") + categories.count("Premature")
    wrong = categories.count("Premature") / claims if claims else 0.0
    assert total["false_complete_rate"] == wrong and found.false_complete_rate == pytest.approx(wrong)
    assert total["side_effect_rate"] == categories.count("HardFail") / n == found.side_effect_rate
    text = found.markdown()
    assert text.count("\n") == 1 + len(found.table()) and f"| a | none | all | {n} |" in text


def test_markdown_adds_noise_and_repeats_and_columns_are_checked():
    rows = [row(r"a|b", repeat=r, noise=noise, completion_tokens=3, prompt_tokens=5) for r in (0, 1) for noise in ("none", "popup")]
    text = Results(rows, []).markdown(None)
    assert "p_holm" in text and "pass_at_k" in text and Results(rows, []).table(None)[0]["tokens"] == 8
    with pytest.raises(ValueError, match="rows have no column 'colour'"):
        Results(rows, []).table("colour")


# The page


def test_a_page_needs_episodes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no episodes at"):
        report(tmp_path / "none.db")
    with Store(tmp_path / "a.db", "x"):
        pass
    with pytest.raises(ValueError, match="holds no finished episode"):
        report(tmp_path / "a.db")


@BROWSER
def test_the_page_plays_steps_by_keys_without_any_request(tmp_path):
    from playwright.sync_api import sync_playwright

    evil = "</script><script>document.title='hit'</script>"
    task = SimpleNamespace(**{n: getattr(BASE[0], n) for n in ("identifier", "golden_steps", "subset", "level", "check",
                           "apps", "oracle_actions", "seed", "locale", "function")}, goal=evil)
    suite(tmp_path, tasks=[task], record=True)
    suite(tmp_path, partial(ScriptAgent, [Action("scroll", direction="down")]), [task], name="s", noise=NoiseModel("popup", 1))
    page, asked, said = report(tmp_path), [], []
    assert page == tmp_path / "episodes.html" and not list(tmp_path.glob("*.new"))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=list(devices._FLAGS))
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(page.as_uri())
        n = task.golden_steps + 1
        steps = []
        for key in ("", "ArrowRight", "ArrowLeft", "ArrowLeft", "End", "ArrowRight", "Home"):
            if key:
                tab.keyboard.press(key)
            steps.append(tab.inner_text("#step"))
        first = f"step 1 of {n}"
        assert steps == [first, f"step 2 of {n}", first, first, f"end of {n}", f"end of {n}", first]
        assert tab.inner_text("#goal") == evil and tab.title() == "Episodes" and tab.inner_text("#action") == str(task.oracle_actions()[0])
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#mark circle").count() == 1 and tab.evaluate("document.querySelector('#screen img').naturalWidth") == 360
        assert "[" in tab.inner_text("#tree") and tab.inner_text("#verdict").startswith("SR: goal reached")
        tab.keyboard.press("ArrowDown")
        assert tab.inner_text("#verdict").startswith("Premature") and tab.locator("#mark line").count() == 1
        assert tab.inner_text("#action .noise") == "popup" and tab.inner_text("#tree") == "no hierarchy was recorded"
        tab.fill("#find", "nothing like it")
        assert tab.locator("#list button").count() == 0
        browser.close()
    assert not said and [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


# Inspect


@pytest.mark.skipif(find_spec("inspect_ai") is None, reason="no Inspect")
def test_inspect_gives_the_scores_of_the_runner(tmp_path):
    from inspect_ai import eval as inspect_eval

    asked = []

    def agent(client):
        asked.append(client)
        return HeuristicAgent()

    made = runner.inspect_task(BASE[:3], agent, device_factory=own_phone, max_steps=3)
    assert all(BASE[0].goal in str(sample.input) or sample.id != BASE[0].identifier for sample in made.dataset)
    assert all(not sample.target and not sample.metadata for sample in made.dataset)
    log = inspect_eval(made, model="none", log_dir=str(tmp_path), display="none")[0]
    scores = {sample.id: sample.scores["score"].value for sample in log.samples}
    rows = suite(tmp_path / "a.db", HeuristicAgent, max_steps=3).rows
    assert scores == {r["task"]: {"SR": float(r["category"] == "SR"), "ratio": r["ratio"]} for r in rows}
    assert len(asked) == 3 and all(client is not None for client in asked)
    assert json.loads(log.samples[0].output.completion)["category"] in ("SR", "Overdue", "Premature", "HardFail")


# Measurement


def test_measure_gives_rows_of_the_asked_size(monkeypatch):
    monkeypatch.setattr(runner, "find_browser", lambda: None)
    monkeypatch.setattr(runner._Reading, "act", lambda self, seen, goal: self.agent.act(seen, goal))
    monkeypatch.setattr(runner, "SUITE_TASKS", lambda n: BASE[:1])
    monkeypatch.setenv("COLLAI_SOAK", "4 1")
    rows = {r["name"]: r for r in runner.measure("cpu")}
    assert {"runner/lite actions", "runner/lite hierarchy", "runner/lite picture", "runner/lite slope"} <= rows.keys()
    assert all(r["measured"] > 0 for name, r in rows.items() if "slope" not in name) and rows["runner/lite rate"]["episodes"] == 4
    for soak, device in (("5", "cpu"), ("0 1", "cpu"), ("5 1", "cuda")):
        monkeypatch.setenv("COLLAI_SOAK", soak)
        with pytest.raises(ValueError, match="device must be 'cpu' and COLLAI_SOAK two numbers, got"):
            runner.measure(device)
