"""The bench: which run is which, controls, failures, and the table."""

import json

import numpy as np
import pytest

from collai.ddr import bench as module
from collai.ddr import explore as known
from collai.ddr.agents import LLMAgent, ReactiveAgent, ReplayAgent, tiny_analyst
from collai.ddr.bench import Leaderboard, run_bench
from collai.ddr.checklist import Claim, LeakError, build_checklist
from collai.ddr.explore import BlindAgent
from collai.ddr.sandbox import Budget, Trajectory, Turn
from collai.ddr.worlds import make_world
from collai.eval.llm import ChatError, ChatRefused, ChatServer, OpenAIChat


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    place = tmp_path_factory.mktemp("worlds")
    return [make_world("retail", seed, rows=1500, path=str(place / f"{seed}.duckdb")) for seed in (1, 2)]


class Oracle:
    """Claims the first `n` truths of its world, one a turn; it was told them."""

    def __init__(self, worlds, n):
        self.n, self.truths = n, {world.digest: [item.claim for item in build_checklist(world).items] for world in worlds}

    def run(self, env):
        claims = self.truths[env.world][: self.n]
        turns = [Turn("", "execute_query", {"query": "SELECT 1 AS x"}, {"data": [[1]]}, "said", [claim], 2, 1) for claim in claims]
        return Trajectory(turns, "all", list(claims[: self.n // 2]), "finish", env.world)


class Says:
    """Says one thing, or fails."""

    def __init__(self, text="", stop="finish"):
        self.text, self.stop = text, stop

    def run(self, env):
        return Trajectory([Turn(insight=self.text)], self.text, [], self.stop, env.world)


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    """The blind agent learns from twenty other worlds, which takes less time."""
    known._planted.cache_clear()
    whole, known._OTHERS = known._OTHERS, 20
    yield
    known._OTHERS = whole
    known._planted.cache_clear()


@pytest.fixture(autouse=True)
def cheap_controls(request, monkeypatch):
    """Controls that cost nothing, where a test is not about them."""
    if "control" not in request.node.name:
        flat = {f"{mode}_{name}": 0.125 for mode in ("message", "trajectory") for name in module._CONTROLS}
        monkeypatch.setattr(module, "_controls", lambda place, checklist, budget: flat)


def bench(agents, worlds, folder, **more):
    return run_bench(agents, worlds, folder, workers=1, **more)


def test_scores_of_a_known_report_and_its_controls(worlds, tmp_path):
    board = bench({"oracle": Oracle(worlds, 6), "blind": BlindAgent(())}, worlds, tmp_path)
    run = board.runs["oracle", "retail-1-1"]
    assert (run["message_accuracy_item"], run["trajectory_accuracy_item"], run["overall"]) == (0.5, 0.25, 0.375)
    assert (run["at_10"], run["message_precision"], run["message_swapped"], run["turns"], run["tokens_in"]) == (0.5, 1.0, 0.0, 6, 12)
    assert sum(run["right"].values()) == 6 and run["unfaithful"] == 0.0 and run["stop"] == "finish"
    table = board.frame()
    assert list(table.index) == ["oracle", "blind"] and table.specificity["oracle"] == 0.5
    assert (table.lo["oracle"], table.hi["oracle"], table.worlds["oracle"], table.errors["oracle"]) == (0.375, 0.375, 2, 0)
    b = [board.runs["oracle", name]["message_blind"] for name in ("retail-1-1", "retail-2-1")]
    assert np.isclose(table.chance_corrected["oracle"], np.mean([(0.5 - x) / (1 - x) for x in b])) and min(b) > 0


def test_turns_count_for_the_early_columns(worlds, tmp_path):
    class Late(Oracle):
        def run(self, env):
            found = super().run(env)
            return Trajectory([Turn(insight="NO INSIGHT")] * 20 + found.turns, "", found.claims, "finish", env.world)

    run = bench({"late": Late(worlds, 12)}, worlds[:1], tmp_path).runs["late", "retail-1-1"]
    assert (run["at_10"], run["at_25"], run["at_50"], run["message_accuracy_item"]) == (0, 5 / 12, 1, 1)


def test_finished_runs_are_kept_and_changed_agents_run_anew(worlds, tmp_path):
    seen = []

    class Counted(Says):
        def run(self, env):
            seen.append(self.text)
            return super().run(env)

    for text in ("a", "a", "b", "a"):
        bench({"x": Counted(text)}, worlds, tmp_path)
    assert seen == ["a", "a", "b", "b"]  # two worlds each
    bench({"x": Counted("a")}, worlds, tmp_path, budget=Budget(turns=5))
    bench({"x": Counted("a")}, worlds, tmp_path, resume=False)
    assert len(seen) == 8 and len((tmp_path / "results.jsonl").read_text().splitlines()) == 6  # those of others stay


def test_two_calls_give_equal_runs_and_trajectories(worlds, tmp_path):
    oracle = {"oracle": Oracle(worlds, 3)}
    one, two = (bench(oracle, worlds, tmp_path) for _ in range(2))
    assert one.runs == two.runs
    found = two.trajectory("oracle", "retail-2-1")
    assert found.world == worlds[1].digest and isinstance(found.turns[0].claims[0], Claim) and len(found.claims) == 1
    with pytest.raises(KeyError):
        two.trajectory("oracle", "retail-9-1")


def test_an_endpoint_that_fails_counts_as_nothing_found_and_is_asked_again(worlds, tmp_path):
    live = Says(stop="error")
    live.client = None
    board = bench({"live": live, "oracle": Oracle(worlds, 2)}, worlds, tmp_path)
    assert "ChatError" in board.runs["live", "retail-1-1"]["error"] and "endpoint failed" in board.runs["live", "retail-1-1"]["error"]
    table = board.frame()
    assert (table.errors["live"], table.overall["live"], table.worlds["live"]) == (2, 0.0, 2)
    assert "error" not in bench({"cut": Says(stop="error")}, worlds, tmp_path).runs["cut", "retail-1-1"]  # a stored session, cut off


def test_an_agent_that_has_seen_the_checklist_stops_the_bench(worlds, tmp_path):
    with pytest.raises(LeakError):
        bench({"spy": Says(build_checklist(worlds[0]).canary)}, worlds[:1], tmp_path)


def test_a_lone_world_is_scored_against_one_of_its_kind(worlds):
    places = [module._place(world) for world in worlds]
    lone, other = module._foreign(places[:1], 0), module._foreign(places, 0)
    assert (lone.world.template, lone.world.seed, lone.world.rows) == ("retail", 2, 1500) and other is places[1]
    assert lone.digest == worlds[1].digest  # seed 2 at the same size: the same contents


def test_inputs_are_checked(worlds, tmp_path):
    null = make_world("retail", 3, 1000, plants=[], path=str(tmp_path / "null.duckdb"))
    for agents, some, text in (([], worlds, "at least one agent and one world, got 0 and 2"), ([BlindAgent(())], [], "got 1 and 0"),
                               ([BlindAgent(())], [null], "world retail-3-1 has nothing planted"),
                               ([BlindAgent(())], [worlds[0], worlds[0]], "a world is given twice"),
                               ([BlindAgent(()), BlindAgent(())], worlds, "two agents are called 'BlindAgent'")):
        with pytest.raises(ValueError, match=text):
            run_bench(agents, some, tmp_path)
    with pytest.raises(TypeError, match=r"agent 'x' has no method run\(env\)"):
        run_bench({"x": 3}, worlds, tmp_path)


def run(overall, **more):
    row = dict.fromkeys(("at_10", "at_25", "at_50", "turns", "tokens_in", "tokens_out", "message_swapped"), 0.0)
    row |= {f"message_{name}": 0.0 for name in module._CONTROLS}
    row |= {f"{mode}_{name}": 0.0 for mode in ("message", "trajectory") for name in module._SHARES}
    return row | {"overall": overall, "unfaithful": None} | more


def test_the_table_is_safe_to_print():
    board = Leaderboard({("a|b<script>", "w"): run(0.5), ("c", "w"): run(0.75, unfaithful=0.25)}, "")
    lines = board.to_markdown().splitlines()
    assert lines[2].startswith("| c | 1 | 75.0 |") and lines[3].startswith("| a\\|b<script> | 1 | 50.0 |")
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1 and "| – |" in lines[3] and "| 25.0 |" in lines[2]
    page = board.to_html()
    assert "<script>" not in page and "a|b&lt;script&gt;" in page and "http" not in page


def test_rows_are_json(worlds, tmp_path):
    board = bench([BlindAgent(())], worlds, tmp_path)
    assert json.loads(json.dumps(board.runs["BlindAgent", "retail-1-1"])) is not None


def test_an_agent_that_breaks_is_a_failed_run_and_stops_nobody(worlds, tmp_path):
    class Broken:
        def run(self, env):
            raise KeyError("mine")

    class Verbose(Says):
        def run(self, env):
            claims = [Claim("trend", "orders.rating", direction=1, value=float(i)) for i in range(101)]
            return Trajectory([Turn(claims=claims)], "", claims, "finish", env.world)

    board = bench({"broken": Broken(), "verbose": Verbose(), "oracle": Oracle(worlds, 6)}, worlds, tmp_path)
    assert board.runs["broken", "retail-1-1"]["error"] == "KeyError: 'mine'"
    assert "claims" in board.runs["verbose", "retail-2-1"]["error"]
    table = board.frame()
    assert table.index[0] == "oracle" and list(table.errors[["oracle", "broken", "verbose"]]) == [0, 2, 2]


def test_evidence_is_recomputed_whatever_is_left_of_the_budget(worlds, tmp_path):
    run = bench({"oracle": Oracle(worlds, 6)}, worlds[:1], tmp_path, budget=Budget(turns=1)).runs["oracle", "retail-1-1"]
    assert run["unfaithful"] == 0.0


def test_early_columns_count_what_was_found_by_then_even_if_it_is_repeated(worlds, tmp_path):
    class Twice(Oracle):
        def run(self, env):
            found = super().run(env)
            return Trajectory(found.turns + [Turn(insight="NO INSIGHT")] * 30 + found.turns, "", [], "finish", env.world)

    assert bench({"twice": Twice(worlds, 3)}, worlds[:1], tmp_path).runs["twice", "retail-1-1"]["at_10"] == 0.25


def test_an_agent_with_a_client_that_cannot_travel_runs_with_two_workers(worlds, tmp_path):
    with ChatServer(tiny_analyst()) as server:
        agent = LLMAgent(OpenAIChat(model="local", base_url=server.base_url, api_key="none"), protocol="text")
        board = run_bench({"model": agent, "blind": BlindAgent(())}, worlds, tmp_path, workers=2, budget=Budget(turns=3))
    assert all("error" not in run for run in board.runs.values()) and board.frame().turns["model"] == 3


# what decides a run


class Plain:
    """An agent with settings of all kinds."""

    level = 1

    def __init__(self, **held):
        self.__dict__.update(held)

    def run(self, env):
        return self.level


def marks(*agents):
    return [module._mark(agent, Budget()) for agent in agents]


def test_whatever_an_agent_holds_has_a_mark(tmp_path):
    (tmp_path / "a").write_text("one")
    loop = {"x": [1]}
    loop["x"].append(loop)
    states = [{"a": np.arange(3)}, {"a": np.arange(3.0)}, {"a": np.array([None, 1], dtype=object)}, {"a": {"x", "y", 3}}, {"a": loop}, {"a": float("nan")},
              {"a": lambda x: x + 1}, {"a": lambda x: x + 2}, {"a": lambda x, y=2: x}, {"a": np.random.default_rng(1)}, {"a": np.random.default_rng(2)},
              {"a": b"x"}, {"a": Plain}, {"a": Plain(b=1)}, {"a": Plain(b=2)}, {"a": tmp_path}, {"a": tmp_path / "a"}, {"a": None}, {}, {"a": frozenset("ab")},
              {"a": Plain().run}, {"a": {2: 1, "2": 1}}, {"a": 1 + 2j}, {"a": ...}, {"a": open}]
    found = marks(*(Plain(**state) for state in states))
    assert len(set(found)) == len(found) and found == marks(*(Plain(**state) for state in states))


def test_a_changed_agent_has_another_mark(tmp_path, monkeypatch):
    def made(n):
        return lambda x: x + n

    def grown(body):
        return type("Grown", (), {"run": body, "level": 1})

    first = marks(Plain(f=made(1)), Plain(), grown(lambda self, env: 1)(), grown(lambda self, env: 2)())
    assert marks(Plain(f=made(1)))[0] == first[0] != marks(Plain(f=made(2)))[0] and first[2] != first[3]  # closures, methods
    monkeypatch.setattr(Plain, "level", 2)
    assert marks(Plain())[0] != first[1]  # values of the class
    (tmp_path / "helper.py").write_text("def help():\n    return 1\n")
    (tmp_path / "mine.py").write_text("class Mine:\n    def run(self, env):\n        return helped()\ndef helped():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine

    before = marks(mine.Mine())
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("return 1", "return 2"))
    assert marks(mine.Mine()) != before  # what its methods call
    Trajectory([], "one").save(tmp_path / "t.json")
    replay = marks(ReplayAgent(tmp_path / "t.json"))
    Trajectory([], "two").save(tmp_path / "t.json")
    assert marks(ReplayAgent(tmp_path / "t.json")) != replay  # the session it replays


def test_running_anew_leaves_a_store_that_others_use(worlds, tmp_path):
    from collai.eval.store import Store

    bench({"x": Says("a"), "y": Says("b")}, worlds[:1], tmp_path)
    with Store(tmp_path / "bench.sqlite", module._SPEC) as other:
        bench({"x": Says("a")}, worlds[:1], tmp_path, resume=False)
        assert {key[0] for key in other.done()} == {"x", "y"}
        assert other.add("more", {}) and "more" in other.done()
    with Store(tmp_path / "bench.sqlite", module._SPEC) as again:
        assert "more" in again.done()


def test_runs_scored_by_other_rules_are_named(worlds, tmp_path):
    from collai.eval.store import Store

    Store(tmp_path / "bench.sqlite", {**module._SPEC, "version": 2}).close()
    with pytest.raises(ValueError, match=r"bench.sqlite can't be gone on with, give another folder: .*version \(stored 2, given 3\)"):
        bench({"x": Says()}, worlds[:1], tmp_path)


# failures of an endpoint


class Cut(Says):
    """A live agent whose endpoint fails."""

    client = None

    def __init__(self, error):
        super().__init__("said", "error")
        self.why, self.tries = error, []

    def identity(self):
        return "cut"

    def run(self, env):
        self.tries.append(1)
        found = super().run(env)
        vars(found)["error"] = self.why
        return found


@pytest.mark.parametrize(("error", "tries"), [(ChatError(503, retry_after=0.01, message="on fire"), 3), (ChatRefused(400, message="too long"), 1)])
def test_a_failed_endpoint_tells_why_and_keeps_its_turns(worlds, tmp_path, error, tries):
    agent = Cut(error)
    run = bench({"cut": agent}, worlds[:1], tmp_path).runs["cut", "retail-1-1"]
    assert len(agent.tries) == tries and str(error) in run["error"] and run["error"].startswith(type(error).__name__) and "after 1 turns" in run["error"]
    (kept,) = (tmp_path / "failed").iterdir()
    assert [t.insight for t in Trajectory.load(kept).turns] == ["said"]
    agent.stop = "finish"
    assert "error" not in bench({"cut": agent}, worlds[:1], tmp_path).runs["cut", "retail-1-1"] and not kept.exists()


# controls, texts, other data


def test_every_score_stands_beside_four_controls(worlds, tmp_path):
    items = build_checklist(worlds[0])
    board = bench({"hunts": Says(), "asked": ReactiveAgent(Says(), items)}, worlds[:1], tmp_path, budget=Budget(turns=10))
    hunts, asked = (board.runs[name, "retail-1-1"] for name in ("hunts", "asked"))
    for mode in ("message", "trajectory"):
        control = {name: hunts[f"{mode}_{name}"] for name in module._CONTROLS}
        assert control == {name: asked[f"{mode}_{name}"] for name in module._CONTROLS}
        assert control["question"] >= control["blind"] > 0 and control["constant"] > 0 and 0 <= control["random"] <= 0.35
        assert np.isclose(hunts[f"{mode}_chance_corrected"], -control["blind"] / (1 - control["blind"]))
        assert np.isclose(asked[f"{mode}_chance_corrected"], -control["question"] / (1 - control["question"]))
    assert {"constant guess", "question only", "blind", "random"} <= set(board.to_markdown().splitlines()[0].replace(" | ", "|").split("|"))


def test_an_agent_that_only_writes_is_read(worlds, tmp_path):
    class Writes(Oracle):
        def run(self, env):
            found = super().run(env)
            turns = [Turn("", "execute_query", {"query": c.evidence_sql}, {}, c.text) for t in found.turns for c in t.claims]
            return Trajectory(turns, " ".join(c.text for c in found.claims), [], "finish", env.world)

    board = bench({"writes": Writes(worlds, 6), "babbles": Says("Lovely weather.")}, worlds[:1], tmp_path)
    writes, babbles = (board.runs[name, "retail-1-1"] for name in ("writes", "babbles"))
    assert (writes["message_accuracy_item"], writes["trajectory_accuracy_item"], writes["at_10"], writes["unfaithful"]) == (0.5, 0.25, 0.5, 0.0)
    assert (babbles["message_accuracy_item"], babbles["valid_insights"], babbles["unfaithful"]) == (0.0, 1.0, None)


def test_a_database_of_ones_own_is_a_world(worlds, tmp_path):
    from collai.ddr.public import load_checklist, real_small, to_ddr_bench

    made = to_ddr_bench(worlds[0], tmp_path / "public")
    lite = made["db_path"], load_checklist(made["qa_file"])
    real = real_small(tmp_path / "real.duckdb")
    board = bench({"blind": BlindAgent(), "quiet": Says()}, [lite, real, worlds[1]], tmp_path, budget=Budget(turns=5))
    assert not board.frame().errors.any() and [world for agent, world in board.runs if agent == "blind"] == ["retail-1-retail-1", "real-real-0", "retail-2-1"]
    assert board.runs["blind", "real-real-0"]["message_swapped"] is not None
    alone = bench({"quiet": Says()}, [real], tmp_path / "alone", budget=Budget(turns=5))
    assert alone.runs["quiet", "real-real-0"]["message_swapped"] is None and np.isnan(alone.frame().specificity["quiet"]) and "–" in alone.to_markdown()


def test_pairs_are_checked(worlds, tmp_path):
    from dataclasses import replace

    own, path = build_checklist(worlds[0]), worlds[0].db_path
    two = replace(own, items=[own.items[0], replace(own.items[1], entity="other")])
    for pair, error, text in (((worlds[1].db_path, own), ValueError, "checklist was built for world"), ((path, two), ValueError, "must have one entity, got 2"),
                              ((path, None), TypeError, "must be a World or a pair"), (3, TypeError, "must be a World or a pair"),
                              ((tmp_path / "no.duckdb", own), FileNotFoundError, "no.duckdb")):
        with pytest.raises(error, match=text):
            run_bench({"x": Says()}, [pair], tmp_path)
    bare = replace(own, items=[replace(item, claim=None) for item in own.items])
    assert "no item has a claim" in bench({"x": Says()}, [(path, bare)], tmp_path).runs["x", f"1-{own.items[0].entity}"]["error"]
