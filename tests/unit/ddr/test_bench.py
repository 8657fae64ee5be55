"""The bench: which run is which, controls, failures, and the table."""

import json

import numpy as np
import pytest

from collai.ddr import bench as module
from collai.ddr.agents import LLMAgent, tiny_analyst
from collai.ddr.bench import Leaderboard, run_bench
from collai.ddr.checklist import Claim, LeakError, build_checklist
from collai.ddr.explore import BlindAgent
from collai.ddr.sandbox import Budget, Trajectory, Turn
from collai.ddr.worlds import make_world
from collai.eval.llm import ChatServer, OpenAIChat


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


def bench(agents, worlds, folder, **more):
    return run_bench(agents, worlds, folder, workers=1, **more)


def test_scores_of_a_known_report_and_its_controls(worlds, tmp_path):
    board = bench({"oracle": Oracle(worlds, 6), "blind": BlindAgent()}, worlds, tmp_path)
    run = board.runs["oracle", "retail-1-1"]
    assert (run["message_accuracy_item"], run["trajectory_accuracy_item"], run["overall"]) == (0.5, 0.25, 0.375)
    assert (run["at_10"], run["message_precision"], run["message_swapped"], run["turns"], run["tokens_in"]) == (0.5, 1.0, 0.0, 6, 12)
    assert sum(run["right"].values()) == 6 and run["unfaithful"] == 0.0 and run["stop"] == "finish"
    table = board.frame()
    assert list(table.index) == ["oracle", "blind"] and table.specificity["oracle"] == 0.5
    assert (table.lo["oracle"], table.hi["oracle"], table.worlds["oracle"], table.errors["oracle"]) == (0.375, 0.375, 2, 0)
    assert np.isclose(table.chance_corrected["oracle"], (0.5 - run["message_blind"]) / (1 - run["message_blind"]))


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
    assert len(seen) == 8 and len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


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
    lone, other = module._foreign(worlds[:1], 0), module._foreign(worlds, 0)
    assert (lone.template, lone.seed, lone.rows) == ("retail", 2, 1500) and other is worlds[1]
    assert lone.digest == worlds[1].digest  # seed 2 at the same size: the same contents


def test_inputs_are_checked(worlds, tmp_path):
    null = make_world("retail", 3, 1000, plants=[], path=str(tmp_path / "null.duckdb"))
    for agents, some, text in (([], worlds, "at least one agent and one world, got 0 and 2"), ([BlindAgent()], [], "got 1 and 0"),
                               ([BlindAgent()], [null], "world retail-3-1 has nothing planted"),
                               ([BlindAgent()], [worlds[0], worlds[0]], "a world is given twice"),
                               ([BlindAgent(), BlindAgent()], worlds, "two agents are called 'BlindAgent'")):
        with pytest.raises(ValueError, match=text):
            run_bench(agents, some, tmp_path)
    with pytest.raises(TypeError, match=r"agent 'x' has no method run\(env\)"):
        run_bench({"x": 3}, worlds, tmp_path)


def run(overall, **more):
    row = dict.fromkeys(("at_10", "at_25", "at_50", "turns", "tokens_in", "tokens_out", "message_swapped", "message_blind"), 0.0)
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
    board = bench([BlindAgent()], worlds, tmp_path)
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
        board = run_bench({"model": agent, "blind": BlindAgent()}, worlds, tmp_path, workers=2, budget=Budget(turns=3))
    assert all("error" not in run for run in board.runs.values()) and board.frame().turns["model"] == 3
