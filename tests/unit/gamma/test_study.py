"""Properties of `collai.gamma.study`: what a study keeps, what it refuses, what trained readers and shared errors come to."""

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.eval.llm import ChatError, ChatRefused, ChatServer
from collai.eval.store import Store, cell_seed
from collai.gamma import study as module
from collai.gamma.attribution import attribute
from collai.gamma.backends import Request, Response, Task, WorldBackend
from collai.gamma.design import full_factorial
from collai.gamma.engines import MASConfig, SASConfig, run_mas, run_sas
from collai.gamma.ledger import Budget, Ledger, Usage
from collai.gamma.metric import collaboration_gain, parity_report, saturated_baseline
from collai.gamma.study import (
    Study,
    StudyResult,
    adder_law,
    decide,
    decide_together,
    fit_condorcet,
    read_signs,
    reader_score,
    sign_tasks,
    train_adder,
    train_reader,
    vote_of_three,
)
from collai.gamma.worlds import CondorcetWorld

quickly = settings(deadline=None, derandomize=True, max_examples=25)
WORLD = CondorcetWorld(0.7, 0.1, 0.3, call_tokens=20)
PAIR = full_factorial(["n_agents", "rounds"])
LEVELS = {"n_agents": (1, 3), "rounds": (1, 2)}
SINGLES = (SASConfig("single"), SASConfig(n=3))


class Counted(WorldBackend):
    """A world that counts its calls, and may kill its process."""

    def __init__(self, world, seed=0, fatal=None):
        super().__init__(world, seed)
        self.calls, self.fatal = 0, fatal

    async def generate(self, requests):
        self.calls += len(requests)
        if self.fatal and self.calls >= self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return await WorldBackend.generate(self, requests)


def study(path, n=8, backend=None, **changed):
    backend = backend or Counted(WORLD)
    given = {"tasks": WorldBackend(WORLD).tasks(n), "design": PAIR, "backend": backend, "budget": Budget(completion_tokens=130),
             "baselines": SINGLES, "base": MASConfig(), "levels": LEVELS, "seeds": 1}
    return Study(path, **given | changed)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    made = study(tmp_path_factory.mktemp("done") / "s.db", 4, seeds=2)
    return made, made.run()


def test_a_study_equals_a_plain_loop_over_all_configurations(done):
    made, result = done
    with Store(made.path, made._spec) as store:
        key = store.fingerprint
    rows, backend = [], WorldBackend(WORLD)
    teams = [MASConfig(n_agents=n, rounds=r) for r in (1, 2) for n in (1, 3)]
    names = ["sas:single", "sas:self_consistency"]
    for system, run, config in [*zip(names, [-1] * 2, SINGLES, strict=True), *(("mas", i, t) for i, t in enumerate(teams))]:
        for replicate, task in itertools.product(range(2), backend.tasks(4)):
            seeded = replace(config, seed=cell_seed(key, (system, run, replicate, task.id)))
            got = (run_mas if system == "mas" else run_sas)(task, seeded, backend, Ledger(Budget(completion_tokens=130)))
            rows.append([task.id, run, system, replicate, got.score, got.usage.prompt_tokens, got.usage.completion_tokens,
                         got.usage.calls, got.usage.seconds, config.fingerprint()])
    assert result.frame.to_numpy().tolist() == rows
    assert made.frame().equals(result.frame)
    assert list(result.frame.columns) == ["task", "run", "system", "replicate", "score", "prompt_tokens",
                                          "completion_tokens", "calls", "seconds", "fingerprint"]
    assert result.missing == 0


def test_finished_cells_are_never_computed_again(tmp_path, done):
    made = study(tmp_path / "s.db", 4, seeds=2)
    first = made.run(max_cells=20)
    spent = made.backend.calls
    assert (len(first.frame), first.missing) == (20, 6 * 4 * 2 - 20)
    second = made.run()
    assert made.backend.calls - spent == second.frame["calls"].sum() - first.frame["calls"].sum()
    assert second.frame.equals(done[1].frame)
    again = made.backend.calls
    made.run()
    assert made.backend.calls == again


def test_a_killed_study_goes_on_where_it_was(tmp_path, done):
    script = ("import sys; sys.path[:0] = [sys.argv[1]]; from test_study import Counted, WORLD, study; "
              "study(sys.argv[2], 4, Counted(WORLD, fatal=30), seeds=2).run()")
    path = tmp_path / "s.db"
    here = os.path.dirname(__file__)
    killed = subprocess.run([sys.executable, "-c", script, here, str(path)], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    made = study(path, 4, seeds=2)
    kept = made.frame()
    assert 0 < len(kept) < 48 and kept["calls"].sum() < 30
    result = made.run()
    assert made.backend.calls == result.frame["calls"].sum() - kept["calls"].sum()
    assert result.frame.equals(done[1].frame)


def test_two_processes_find_the_same_numbers(tmp_path, done):
    made = study(tmp_path / "s.db", 4, WorldBackend(WORLD), seeds=2)
    assert made.run(workers=2).frame.equals(done[1].frame)


class Served:
    """Takes requests one by one, and can't be sent to another process."""

    name, retries = "served", 0

    def __init__(self):
        self.lock, self.threads = threading.Lock(), set()

    def bound(self, request):
        return Usage(0, 1, 1, seconds=2.0)

    async def generate(self, requests):
        return [Response("answer: A", "A", Usage(0, 1, 1, seconds=0.25)) for _ in requests]


def test_served_models_are_asked_from_threads(tmp_path):
    tasks = [Task(str(i), "?", "AB"[i % 2]) for i in range(6)]
    made = study(tmp_path / "s.db", backend=Served(), tasks=tasks, baselines=[SINGLES[1]], budget=Budget(seconds=100))
    result = made.run(workers=4)
    assert result.frame["score"].tolist() == [1.0, 0.0] * 15
    assert (result.frame["seconds"] == result.frame["calls"] / 4).all()


def test_a_mapping_of_backends_serves_one_model_each(tmp_path):
    backends = {"default": WorldBackend(CondorcetWorld(1.0)), "weak": WorldBackend(CondorcetWorld(0.0))}
    made = study(tmp_path / "s.db", backend=Counted(WORLD), baselines=[SINGLES[0]], budget=Budget(calls=9))
    mixed = Study(tmp_path / "m.db", list(made._tasks.values()), full_factorial(["models"]), backends, Budget(calls=9),
                  [SINGLES[0]], levels={"models": (("default",), ("weak",))})
    scores = mixed.run().frame.groupby(["system", "run"])["score"].mean()
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_every_part_of_a_study_is_in_its_fingerprint(tmp_path):
    path = tmp_path / "s.db"
    made = study(path)
    study(path, backend=Counted(WORLD, fatal=10**9))
    tasks = made.backend.tasks(8)
    changed = {"design": full_factorial(["rounds", "n_agents"]), "levels": LEVELS | {"rounds": (1, 3)}, "seeds": 2,
               "base": MASConfig(topology="mesh"), "baselines": SINGLES[:1], "budget": Budget(completion_tokens=131),
               "tasks": [replace(tasks[0], prompt="Other?"), *tasks[1:]], "backend": Counted(WORLD, 1)}
    for name, value in changed.items():
        with pytest.raises(ValueError, match=f"study fingerprint mismatch: .*{name}"):
            study(path, **({"tasks": tasks} | {name: value}))


def test_gamma_attribution_and_parity_are_those_of_their_modules(done):
    made, result = done
    frame, backend = result.frame, made.backend
    order = [task.id for task in backend.tasks(4)]

    def scores(system, run):
        rows = frame[(frame["system"] == system) & (frame["run"] == run)]
        return np.array([[rows[(rows["task"] == i) & (rows["replicate"] == r)]["score"].item() for r in range(2)] for i in order])

    strategies = {name: scores(name, -1) for name in result.systems}
    base, table = saturated_baseline(strategies, folds=4), np.stack([scores("mas", r).mean(1) for r in range(4)], axis=1)
    assert result.baseline().chosen == base.chosen
    given, mine = collaboration_gain(scores("mas", 3), base.scores, level=0.9), result.gamma(3, level=0.9)
    assert replace(mine, ci=given.ci, delta_ci=given.delta_ci, p_value=given.p_value, regime=given.regime) == given
    mine, theirs = result.attribute(n_boot=50), attribute(table, base.scores, PAIR, n_boot=50)
    assert np.array_equal(mine.shapley, theirs.shapley) and np.array_equal(mine.ci, theirs.ci)
    folds = np.array_split(np.random.default_rng(0).permutation(4), 4)
    chosen = {order[i]: name for name, fold in zip(base.chosen, folds, strict=True) for i in fold}

    def usages(run):
        rows = frame[frame["run"] == run]
        rows = rows[[run >= 0 or chosen[t] == s for t, s in zip(rows["task"], rows["system"], strict=True)]]
        return [Usage(int(a), int(b), int(c)) for a, b, c in rows[["prompt_tokens", "completion_tokens", "calls"]].to_numpy()]

    assert result.parity(2) == parity_report(usages(2), usages(-1), made.budget) and len(usages(-1)) == 8


def test_spending_is_that_of_the_agent_that_stands_for_each_task(tmp_path):
    singles = [SASConfig("single"), SASConfig("single", temperature=0.5), *SINGLES]
    for n in (7, 11):
        result = study(tmp_path / f"{n}.db", n, baselines=singles).run()
        chosen = result._chosen()
        assert [result._table(chosen[t], -1)[i, 0] for i, t in enumerate(result.tasks)] == result.baseline().scores.tolist()
        spent = result.frame.set_index(["system", "run", "task"])["calls"]
        assert result.parity(0)["calls"].mean_sas == np.mean([spent[chosen[t], -1, t] for t in result.tasks])


def test_one_task_and_one_baseline_have_a_parity(tmp_path):
    result = study(tmp_path / "s.db", 1, baselines=SINGLES[1:]).run()
    assert (result.parity(1)["calls"].mean_mas, result.parity(1)["calls"].mean_sas) == (3.0, 3.0)


def test_limits_hold_for_the_strongest_of_several(tmp_path):
    rng = np.random.default_rng(0)
    for team, options in ((0.9, {}), (0.5, {"level": 0.8}), (0.3, {"margin": 0.5}), (0.6, {"method": "fieller"})):
        m, *each = ((rng.random(60) < p) * 1.0 for p in (team, 0.6, 0.5, 0.4))
        given = collaboration_gain(m, saturated_baseline({str(i): s for i, s in enumerate(each)}).scores, **options)
        found = module._over_strongest(given, m, [*each, 0 * m], **options)
        loose, level = [collaboration_gain(m, s, **options) for s in each], options.get("level", 0.95)
        tight = [collaboration_gain(m, s, **options | {"level": 1 - (1 - level) / 4}) for s in each]
        for name, point in (("ci", given.gamma), ("delta_ci", given.delta)):
            lo, hi = min(getattr(g, name)[0] for g in loose), min(getattr(g, name)[1] for g in tight)
            assert getattr(found, name) == (min(lo, point), max(hi, point))
        beaten = [g.p_value for g in loose if g.gamma < 1]
        assert found.p_value == (min(1, 4 * min(beaten)) if beaten else max(g.p_value for g in loose))
        assert (found.gamma, found.method, found.n_tasks) == (given.gamma, given.method, 60)
        gain, loss, margin = found.ci[0] > 1, found.ci[1] < 1, options.get("margin", 0.02)
        even = 1 / (1 + margin) < found.ci[0] and found.ci[1] < 1 + margin
        assert found.regime == ("gain" if gain else "loss" if loss else "parity" if even else "undetermined")


def test_intervals_over_the_strongest_hold_it():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        m, *each = ((rng.random(100) < p) * 1.0 for p in (0.75, *[0.6] * 6))
        given = collaboration_gain(m, saturated_baseline({str(i): s for i, s in enumerate(each)}).scores)
        found = module._over_strongest(given, m, each)
        hits += found.ci[0] <= 1.25 <= found.ci[1] and found.ci[0] <= found.gamma <= found.ci[1]
    assert hits >= 188  # 0.97 expected; with the choice as given 0.88


class Picky(WorldBackend):
    """Refuses one task, as a model does whose context is too short."""

    async def generate(self, requests):
        if any(r.task.id == "3" for r in requests):
            raise ChatRefused(400, False, None, "context too long")
        return await WorldBackend.generate(self, requests)


def test_a_refused_task_does_not_hold_up_the_others(tmp_path):
    made = study(tmp_path / "s.db", 12, Picky(WORLD))
    result = made.run()
    assert (len(result.frame), result.missing, len(result.errors)) == (66, 6, 6)
    assert result.errors[0] == {"system": "mas", "run": 0, "replicate": 0, "task": "3",
                                "error": "ChatRefused: context too long"}
    with pytest.raises(ValueError, match="run 0 of 'mas' has 11 of 12 cells.*task '3' failed, `without` leaves it out: "
                                         "ChatRefused: context too long"):
        result.gamma(0)
    kept, tasks = result.without("3"), [t for t in WorldBackend(WORLD).tasks(12) if t.id != "3"]
    assert (kept.missing, kept.errors, len(kept.tasks), len(result.tasks)) == (0, [], 11, 12)
    assert kept.gamma(1).n_tasks == 11 and kept.parity(1)["calls"].max_mas == 3 and kept.attribute(n_boot=9).names
    assert sorted(kept.frame["task"].unique()) == sorted(t.id for t in tasks)
    with pytest.raises(KeyError, match="no task 'x' in the study"):
        result.without("x")
    with pytest.raises(ValueError, match="all 12 would be left out"):
        result.without(*result.tasks)


def test_failed_cells_are_tried_again_after_all_others(tmp_path):
    path = tmp_path / "s.db"
    first = study(path, 12, Picky(WORLD)).run(max_cells=4)
    assert len(first.frame) == 3 and [e["task"] for e in first.errors] == ["3"]
    assert len(study(path, 12, Picky(WORLD)).run(max_cells=4).frame) == 7
    whole = study(path, 12).run()
    assert (whole.missing, whole.errors) == (0, []) and whole.frame.equals(study(tmp_path / "t.db", 12).run().frame)


class Down:
    """A server that bills, or may bill, and never answers."""

    name, retries = "served", 9

    def bound(self, request):
        return Usage(0, 1, 1)

    async def generate(self, requests):
        raise ChatError(None, None, 0.0, "no reply")


def test_an_outage_is_no_score(tmp_path):
    given = {"tasks": [Task(str(i), "?", "AB"[i % 2]) for i in range(3)], "budget": Budget(calls=4), "baselines": SINGLES[1:]}
    result = study(tmp_path / "s.db", backend=Down(), **given).run(workers=2)
    assert (len(result.frame), len(result.errors), result.missing) == (0, 15, 15)
    whole = study(tmp_path / "s.db", backend=Served(), **given).run(workers=2)
    assert whole.missing == 0 and whole.frame["score"].tolist() == [1.0, 0.0, 1.0] * 5
    empty = study(tmp_path / "t.db", backend=Served(), **given | {"budget": Budget(calls=0)}).run()
    assert empty.missing == 0 and not empty.frame[["score", "calls"]].to_numpy().any()


def test_seeds_of_configurations_are_no_part_of_a_study(tmp_path):
    made = study(tmp_path / "s.db")
    again = study(tmp_path / "s.db", base=MASConfig(seed=5), baselines=[replace(one, seed=7) for one in SINGLES])
    assert (again._teams, again._singles) == (made._teams, made._singles)


@pytest.mark.parametrize(("changed", "message"), [
    ({"budget": 500}, "budget must be a Budget, got 500"), ({"base": SASConfig()}, "base must be a MASConfig, got SASConfig"),
    ({"baselines": SASConfig()}, "baselines must be a list of SASConfig, got SASConfig"),
    ({"baselines": [MASConfig()]}, "baselines must be a list of SASConfig, got MASConfig"),
    ({"tasks": Task("a", "?", "x")}, "tasks must be a list of Task, got Task"),
    ({"tasks": "why"}, "tasks must be a list of Task, got 'why'"), ({"tasks": ["why"]}, "tasks must be a list of Task, got 'why'"),
    ({"backend": Counted}, "a backend must be an object with a name, got <class"),
    ({"backend": {"default": Down}}, "a backend must be an object with a name, got <class"),
    ({"backend": object()}, "a backend must be an object with a name, got <object")])
def test_arguments_of_another_kind_leave_no_file(tmp_path, changed, message):
    with pytest.raises(TypeError, match=message):
        study(tmp_path / "s.db", **changed)
    assert not (tmp_path / "s.db").exists()


def test_a_repeated_strategy_is_numbered(tmp_path):
    made = study(tmp_path / "s.db", 2, baselines=[*SINGLES, SASConfig(n=2), SASConfig("single", n=1), SASConfig(n=1)])
    assert made.run(max_cells=0).systems == (
        "sas:single", "sas:self_consistency", "sas:self_consistency#2", "sas:single#2", "sas:self_consistency#3")


def test_one_baseline_and_one_seed_keep_scores_binary(tmp_path):
    result = study(tmp_path / "s.db", 10, baselines=[SINGLES[1]]).run()
    rows = result.frame
    team, alone = (rows[rows["run"] == r]["score"].to_numpy() for r in (1, -1))
    assert result.gamma(1) == collaboration_gain(team, alone)
    assert result.gamma(1).method == "bonett_price"


def test_unfinished_runs_are_named(tmp_path):
    result = study(tmp_path / "s.db", 4).run(max_cells=11)
    assert isinstance(result, StudyResult) and result.missing == 24 - 11
    with pytest.raises(ValueError, match=r"run 0 of 'mas' has 3 of 4 cells: go on with Study.run"):
        result.gamma(0)
    with pytest.raises(ValueError, match=r"run 1 of 'mas' has 0 of 4 cells"):
        result.parity(1)
    for ask in (result.gamma, result.parity):
        with pytest.raises(ValueError, match=r"run must be in \[0, 4\), got 4"):
            ask(4)
    with pytest.raises(ValueError, match="cells"):
        result.attribute()


def test_factors_are_of_the_library_or_fields(tmp_path):
    design = full_factorial({"topology": 3, "message_noise": 2, "max_tokens": 2})
    levels = {"topology": ("none", "star", "mesh"), "message_noise": (0.0, 0.5), "max_tokens": (16, 32)}
    made = study(tmp_path / "s.db", design=design, levels=levels, n=2, base=MASConfig(rounds=2))
    want = [MASConfig(rounds=2, topology=t, message_noise=e, max_tokens=m)
            for m in (16, 32) for e in (0.0, 0.5) for t in levels["topology"]]
    assert made._teams == want
    with pytest.raises(ValueError, match="effects need levels -1"):
        made.run().attribute()


def test_a_team_that_cannot_pay_one_call_abstains(tmp_path):
    result = study(tmp_path / "s.db", n=2, budget=Budget(completion_tokens=19)).run()
    assert not result.frame[["score", "prompt_tokens", "completion_tokens", "calls"]].to_numpy().any()
    assert result.missing == 0


def test_inputs_are_left_alone(tmp_path):
    tasks, levels, singles = Counted(WORLD).tasks(3), {k: list(v) for k, v in LEVELS.items()}, list(SINGLES)
    before = [list(tasks), {k: list(v) for k, v in levels.items()}, list(singles), PAIR.X.copy()]
    made = study(tmp_path / "s.db", tasks=tasks, levels=levels, baselines=singles)
    made.run()
    assert [tasks, levels, singles] == before[:3] and np.array_equal(PAIR.X, before[3])


@pytest.mark.parametrize(("changed", "error", "message"), [
    ({"tasks": []}, ValueError, "a study needs at least one task, got none"),
    ({"tasks": [Task("a", "?", "x"), Task("a", "!", "x")]}, ValueError, "tasks need ids of their own, 'a' stands twice"),
    ({"seeds": 0}, ValueError, "at least one seed and one baseline, got 0 and 2"),
    ({"baselines": []}, ValueError, "at least one seed and one baseline, got 1 and 0"),
    ({"levels": {"n_agents": (1, 3)}}, ValueError, "levels must name the factors of the design, n_agents, rounds; got n_agents"),
    ({"levels": {"n_agents": (1, 3, 5), "rounds": (1, 2)}}, ValueError, r"'n_agents' has 2 levels in the design, got \(1, 3, 5\)"),
    ({"levels": {"n_agents": (1, 3), "rounds": "12"}}, ValueError, "'rounds' has 2 levels in the design, got '12'"),
    ({"levels": {"n_agents": (1, 0), "rounds": (1, 2)}}, ValueError, "n_agents must be >= 1, got 0"),
    ({"design": full_factorial(["colour"]), "levels": {"colour": (1, 2)}}, KeyError, "no factor 'colour': .*topology"),
    ({"design": full_factorial(["topology"]), "levels": {"topology": ("none", "web")}}, KeyError, "no level 'web': none"),
    ({"tasks": [Task("a", "?", "x", scorer=lambda answer, task: 1.0)]}, TypeError, "no canonical form"),
])
def test_bad_studies_are_refused(tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        study(tmp_path / "s.db", **changed)


def enumerated_score(q, window, n, talk, last):
    """Every pattern of clues of every reader, and every outcome of every coin."""
    total = 0.0
    for counts in itertools.product(range(window + 1), repeat=n):
        weight = math.prod(math.comb(window, c) * q**c * (1 - q) ** (window - c) for c in counts)
        total += weight * talked([2 * c - window for c in counts], talk, last)
    return total


def talked(margins, talk, last):
    def outcomes(values):
        choices = [[1] if v > 0 else [-1] if v < 0 else [1, -1] for v in values]
        every = list(itertools.product(*choices))
        return [(votes, 1 / len(every)) for votes in every]

    def final(votes):
        side = votes[-1] if last else sum(votes)
        return 1.0 if side > 0 else 0.5 if side == 0 else 0.0

    score = 0.0
    for votes, chance in outcomes(margins):
        if not talk:
            score += chance * final(votes)
        else:
            score += sum(chance * c * final(again) for again, c in outcomes([m + sum(votes) for m in margins]))
    return score


@pytest.mark.parametrize("talk", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_scores_of_readers_are_those_of_every_pattern(talk, last):
    for q, window, n in itertools.product((0.0, 0.35, 0.7, 1.0), (1, 2, 3), (1, 2, 3)):
        assert math.isclose(reader_score(q, window, n, talk, last), enumerated_score(q, window, n, talk, last), abs_tol=1e-12)


@quickly
@given(st.floats(0, 1), st.integers(0, 5), st.integers(0, 7))
def test_talk_leaves_an_odd_majority_of_odd_readers_as_it_is(q, half, pairs):
    m, n = 2 * half + 1, 2 * pairs + 1
    assert math.isclose(reader_score(q, m, n, talk=True), reader_score(q, m, n), abs_tol=1e-12)


@pytest.mark.parametrize(("changed", "message"), [
    ({"q": 1.1}, r"q must be in \[0, 1\], got 1.1"), ({"window": 0}, "window must be >= 1, got 0"),
    ({"n_agents": 0}, "n_agents must be >= 1, got 0")])
def test_scores_of_impossible_readers_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        reader_score(**{"q": 0.6, "window": 3, "n_agents": 3} | changed)


def test_a_reader_is_given_its_window_and_all_votes():
    talk = [{"role": "system", "content": "clue: what + is"},
            {"role": "user", "content": "Which?\nclue: +\nclue: -\nclue: +\n\nAgent 1, solver, says\nanswer: -"},
            {"role": "assistant", "content": "+"}, {"role": "user", "content": "answer: -\nanswer: ?\nclue: -"}]
    request = Request(Task("t", "?", "+"), 0, "solver", talk, 1, 0.0, 0)
    assert read_signs(request, 2) == "+--+-="
    assert read_signs(request, 9) == "+-+--+-="


def test_tasks_of_signs_are_drawn_as_asked():
    tasks = sign_tasks(4000, 9, 0.8, seed=3)
    agree = np.array([[line == f"clue: {task.target}" for line in task.context] for task in tasks])
    assert abs(agree.mean() - 0.8) < 5 * 0.4 / math.sqrt(agree.size)
    assert abs(np.mean([task.target == "+" for task in tasks]) - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert tasks[:2] == sign_tasks(4000, 9, 0.8, seed=3)[:2] and len({task.id for task in tasks}) == 4000
    for bad, message in (({"n": 0}, "n must be >= 1, got 0"), ({"n_clues": 0}, "n_clues must be >= 1, got 0"),
                         ({"q": -0.1}, r"q must be in \[0, 1\], got -0.1")):
        with pytest.raises(ValueError, match=message):
            sign_tasks(**{"n": 2, "n_clues": 3, "q": 0.7} | bad)


@pytest.fixture(scope="module")
def reader():
    return train_reader(longest=5, steps=80, batch=32)


def test_a_trained_reader_names_the_majority(reader):
    for m in (1, 3, 5):
        signs = np.array(list(itertools.product((-1, 1), repeat=m)), dtype=np.int8)
        assert np.array_equal(decide(reader, signs), np.sign(signs.sum(axis=1)))
    assert reader is train_reader(longest=5, steps=80, batch=32) and not any(p.requires_grad for p in reader.parameters())
    assert len(reader.model.layers) == 1 and reader.config["hidden"] == 32 and reader.config["heads"] == 2


def test_decisions_are_those_of_the_text_that_the_reader_is_given(reader):
    import torch

    from collai.core.tinylm import CharTokenizer

    tokenizer, signs = CharTokenizer(module.SIGNS), np.random.default_rng(0).choice([-1, 1], (20, 4)).astype(np.int8)
    kept = signs.copy()
    said = decide(reader, signs)
    for row, verdict in zip(signs, said, strict=True):
        ids = tokenizer.encode("".join("+" if x > 0 else "-" for x in row) + "=")
        plus, minus = reader(torch.tensor([ids])).logits[0, -1, tokenizer.encode("+-")].tolist()
        assert abs(plus - minus) < 1e-4 or verdict == (1 if plus > minus else -1)
    assert np.array_equal(signs, kept)
    assert decide(reader, np.empty((0, 4), np.int8)).shape == (0,)
    for bad, message in ((np.zeros((2, 3), np.int8), r"signs must be \+1 or -1, got 0"),
                         (np.ones(3, np.int8), r"signs must be \(n, m\), a row a text, got \(3,\)")):
        with pytest.raises(ValueError, match=message):
            decide(reader, bad)


def test_training_takes_the_steps_of_adamw():
    import torch

    rng, rate = np.random.default_rng(0), 0.1
    start, grads = rng.normal(size=5), rng.normal(size=(4, 5))
    w, state = torch.tensor(start), [(torch.zeros(5).double(), torch.zeros(5).double())]
    mean, square, want = np.zeros(5), np.zeros(5), start.copy()
    for t, g in enumerate(grads, 1):
        w.grad = torch.tensor(g)
        module._adamw([w], state, t, rate)
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g * g
        want = want - rate * (0.01 * want + mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.99**t)) + 1e-8))
    assert np.allclose(w.numpy(), want, atol=1e-12) and w.grad is None


@pytest.mark.parametrize(("train", "bad"), [(train_reader, "longest"), (train_reader, "steps"), (train_adder, "batch")])
def test_sizes_of_a_training_are_checked(train, bad):
    with pytest.raises(ValueError, match=f"{bad} must be >= 1, got 0"):
        train(**{bad: 0})


def test_a_served_reader_says_what_the_local_one_says(tmp_path, reader):
    from collai.core.tinylm import CharTokenizer
    from collai.gamma.backends import OpenAIBackend, TransformerBackend

    read, tokenizer = partial(read_signs, window=5), CharTokenizer(module.SIGNS)
    common = {"tasks": sign_tasks(4, 15, 0.7), "design": full_factorial(["n_agents"]), "levels": {"n_agents": (1, 3)},
              "base": MASConfig(temperature=0, max_tokens=1, min_tokens=1), "budget": Budget(calls=9),
              "baselines": [SASConfig("single", temperature=0, max_tokens=1, min_tokens=1)]}
    local = Study(tmp_path / "a.db", backend=TransformerBackend(reader, tokenizer, read=read), **common).run()
    with ChatServer(module.PolicyChat(reader, tokenizer, read), faults=[None, 429, None]) as server:
        backend = OpenAIBackend(base_url=server.base_url, api_key="none", model="local")
        served = Study(tmp_path / "b.db", backend=backend, **common).run(workers=4)
        assert server.billed.completion_tokens == served.frame["completion_tokens"].sum()
    columns = ["task", "run", "system", "score", "prompt_tokens", "completion_tokens", "calls", "fingerprint"]
    assert served.frame[columns].equals(local.frame[columns])


def test_an_adder_states_a_law_for_every_sum():
    import torch

    adder = train_adder(steps=3, batch=8)
    law = adder_law(adder)
    assert law.shape == (10_000, 20) and np.allclose(law.sum(axis=1), 1, atol=1e-12)
    from collai.core.tinylm import CharTokenizer

    tokenizer = CharTokenizer(module.SUMS)
    logits = adder(torch.tensor([tokenizer.encode("27+54=")])).logits[0, -1, tokenizer.encode("abcdefghijklmnopqrst")]
    assert np.allclose(law[2754], torch.softmax(logits.double(), 0).numpy(), atol=1e-6)
    ids, target = module._sum_batch(torch.Generator().manual_seed(0), 50)
    for row, letter in zip(ids.tolist(), target.tolist(), strict=True):
        text = tokenizer.decode(row)
        assert "abcdefghijklmnopqrst"[sum(map(int, text[:-1].split("+"))) // 10] == tokenizer.decode([letter])


def test_moments_are_those_of_a_plain_loop():
    rng = np.random.default_rng(1)
    votes = (rng.random((7, 3, 1)) < 0.3 + 0.5 * rng.random((7, 1, 1))).astype(np.int8) ^ (rng.random((7, 3, 4)) < 0.1)
    kept, n = votes.copy(), len(votes)  # agents with errors of their own, seldom changed
    square = np.mean([votes[i].mean() * votes[j].mean() for i in range(n) for j in range(n) if i != j])
    pairs = list(itertools.product(range(3), range(4)))
    across = np.mean([v[a] * v[b] for v in votes for a in pairs for b in pairs if a[0] != b[0]])
    inside = np.mean([v[a] * v[b] for v in votes for a in pairs for b in pairs if a[0] == b[0] and a[1] != b[1]])
    p, world = votes.mean(), fit_condorcet(votes)
    assert math.isclose(world.p, p) and math.isclose(world.rho_between, (across - square) / (p - square))
    assert math.isclose(world.rho_total, (inside - square) / (p - square))
    assert np.array_equal(votes, kept)


def test_shared_errors_of_a_world_are_found_again():
    world = CondorcetWorld(0.7, 0.2, 0.4)
    found = fit_condorcet(world.sample(40_000, 3, 3, np.random.default_rng(0)))
    for name in ("p", "rho_between", "rho_within"):
        assert abs(getattr(found, name) - getattr(world, name)) < 0.02
    for n in (3, 5):
        assert abs(found.gamma(n) / world.gamma(n) - 1) < 0.01


def test_estimates_outside_the_world_are_put_on_its_edge():
    votes = np.array([[[1, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]], np.int8)  # agents contradict each other
    assert fit_condorcet(votes) == CondorcetWorld(0.5, 0.0, 1.0)


def test_three_answers_are_counted_as_a_plain_loop_counts_them():
    laws = list(np.random.default_rng(0).dirichlet(np.ones(4), (3, 5)))
    truth = np.array([0, 1, 2, 3, 3])
    two, plural = np.zeros(5), np.zeros(5)
    for t, said in itertools.product(range(5), itertools.product(range(4), repeat=3)):
        chance = math.prod(laws[i][t, x] for i, x in enumerate(said))
        counts = [said.count(x) for x in range(4)]
        leaders = [x for x in range(4) if counts[x] == max(counts)]
        two[t] += chance * (counts[truth[t]] >= 2)
        plural[t] += chance * (truth[t] in leaders) / len(leaders)
    found = vote_of_three(laws, truth)
    assert np.allclose(found[0], two, atol=1e-12) and np.allclose(found[1], plural, atol=1e-12)
    with pytest.raises(ValueError, match="three laws are needed, got 2"):
        vote_of_three(laws[:2], truth)


@pytest.mark.parametrize(("votes", "message"), [
    (np.zeros((1, 2, 2)), r"at least two tasks, agents and samples are needed, got \(1, 2, 2\)"),
    (np.zeros((2, 2, 1)), r"got \(2, 2, 1\)"), (np.full((2, 2, 2), 2), "votes must be 0 or 1, got 2"),
    (np.ones((2, 2, 2)), "all votes are 1: their correlation is undefined")])
def test_votes_that_have_no_moments_are_refused(votes, message):
    with pytest.raises(ValueError, match=message):
        fit_condorcet(votes.astype(np.int8))


# --- all readers at once -------------------------------------------------------------------------------------------


def firm_readers(n, **sizes):
    """Readers with weights so large that they rarely waver, and gains that differ."""
    import torch

    from collai.core.tinylm import TinyLM

    made = []
    for seed in range(n):
        shape = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp": 64, **sizes}
        one = TinyLM(5, **shape, seed=seed).requires_grad_(False)
        for weight in one.parameters():
            weight.mul_(8 if weight.ndim > 1 else torch.linspace(0.5, 2, len(weight)))
        made.append(one)
    return made


def all_texts(n, m):
    """Every text of m signs for each of n readers, in an order of its own."""
    texts = np.array(list(itertools.product((-1, 1), repeat=m)), dtype=np.int8)
    return np.stack([np.random.default_rng(i).permutation(texts) for i in range(n)])


@pytest.mark.parametrize("m", [1, 4, 7])
@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 1}, {"heads": 4, "kv_heads": 4, "head_dim": 6, "mlp": 10}])
def test_together_readers_say_what_each_says(m, sizes):
    if sizes.get("kv_heads") == 1:
        with pytest.raises(ValueError, match="readers must have one layer"):
            decide_together(firm_readers(2, **sizes), all_texts(2, m))
        return
    readers, signs = firm_readers(5, **sizes), all_texts(5, m)
    found = decide_together(readers, signs).numpy()
    assert found.dtype == np.int8 and np.array_equal(found, np.stack(list(map(decide, readers, signs))))
    assert np.array_equal(found, module._one_by_one(readers, __import__("torch").from_numpy(signs)).numpy())
    assert m == 1 or len(np.unique(found)) == 2


def test_together_in_parts_is_together(monkeypatch):
    import torch

    readers, signs = firm_readers(2), all_texts(2, 5)
    whole = decide_together(readers, torch.from_numpy(signs))
    cut, sizes = torch.Tensor.split, []
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, dim: sizes.append(size) or cut(self, 7, dim))
    assert torch.equal(decide_together(readers, torch.from_numpy(signs)), whole) and sizes == [2**19]


@pytest.mark.parametrize(("change", "text"), [
    ({"signs": all_texts(2, 3)[0]}, r"signs must be \(2, n, m\), a row a reader, got \(8, 3\)"),
    ({"signs": all_texts(3, 3)}, r"signs must be \(2, n, m\), a row a reader, got \(3, 8, 3\)"),
    ({"signs": np.array([[[1, 0]]] * 2)}, r"signs must be \+1 or -1, got 0"),
    ({"readers": []}, r"readers must have one layer, a key head a head, and all the same sizes, got \[\]"),
    ({"readers": [*firm_readers(1), *firm_readers(1, mlp=32)]}, "readers must have one layer, a key head a head, and all the same sizes"),
    ({"readers": firm_readers(2, layers=2)}, "readers must have one layer, a key head a head, and all the same sizes"),
])
def test_wrong_crowds_of_readers_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        decide_together(**({"readers": firm_readers(2), "signs": all_texts(2, 3)} | change))


def test_the_measurement_of_readers_has_a_row_and_knows_its_devices(monkeypatch):
    row = module._reader_row(firm_readers(2), 2, 16, "cpu", rounds=2)
    assert (row["name"], row["unit"], row["readers"], row["texts"]) == ("readers_cpu", "decisions/s", 4, 16)
    assert row["agreement"] == 1.0 and 0 < row["low"] <= row["measured"] <= row["high"] and row["peer"] > 0
    monkeypatch.setattr(module, "train_reader", lambda seed: seed)
    monkeypatch.setattr(module, "_reader_row", lambda trained, copies, n, device: {"copies": copies * len(trained)})
    assert module.measure("cpu") == [{"copies": 8}]
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        module.measure("tpu")


@pytest.mark.skipif(not __import__("torch").cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_the_processor_says(reader):
    import copy

    import torch

    signs = all_texts(3, 5)
    found = decide_together([copy.deepcopy(reader).to("cuda", torch.bfloat16)] * 3, signs)
    assert found.is_cuda and np.array_equal(found.cpu().numpy(), np.stack([decide(reader, x) for x in signs]))
