"""Properties of `collai.gamma.engines`: who reads what, who pays what, how one answer comes of many, what Γ the worlds get."""

import asyncio
import itertools
import math
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import matplotlib
import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as type_checks
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from collai.eval import llm
from collai.eval.llm import ChatError, ChatRefused, ChatServer, ChatTimeout
from collai.gamma import engines as module
from collai.gamma.backends import OpenAIBackend, Request, Response, Task, WorldBackend, parse_answer
from collai.gamma.engines import (
    MASConfig,
    SASConfig,
    answer_entropy,
    arun_mas,
    arun_sas,
    evolution_distance,
    plot_gamma_heatmap,
    plot_information,
    plot_pareto,
    run_mas,
    run_sas,
    to_inspect,
    topology,
)
from collai.gamma.ledger import Budget, BudgetExceeded, Ledger, OverrunError, Usage
from collai.gamma.worlds import CondorcetWorld, DebateWorld, HiddenProfileWorld, RelayWorld, SearchWorld

matplotlib.use("Agg")
quickly = settings(deadline=None, derandomize=True, max_examples=20)
TASK = Task("t", "Which?", "yes", tuple(f"piece {k}" for k in range(10)))
FREE = Budget()


class Script:
    """A backend whose replies are written in the test: reads and writes cost a token a word."""

    name, overhead = "script", Usage()

    def __init__(self, reply, batch_size=64, retries=0):
        self.reply, self.batch_size, self.retries, self.seen = reply, batch_size, retries, []

    def words(self, request):
        return sum(len(m["content"].split()) for m in request.messages)

    def bound(self, request):
        return Usage(self.words(request), request.max_tokens, 1)

    async def generate(self, requests):
        self.seen += requests
        texts = [self.reply(r) for r in requests]
        return [Response(t, parse_answer(t), Usage(self.words(r), min(len(t.split()), r.max_tokens), 1))
                for t, r in zip(texts, requests, strict=True)]


def team(config, reply, budget=FREE, task=TASK, **kw):
    """Run a team on a script; whatever happens, nothing stays reserved."""
    backend, ledger = Script(reply, **kw), Ledger(budget)
    try:
        run = run_mas(task, config, backend, ledger)
    finally:
        assert ledger.reserved == Usage()
    assert ledger.spent == run.usage
    return run, backend, ledger


def solo(config, reply, budget=FREE, task=TASK, **kw):
    """Run one agent on a script."""
    backend, ledger = Script(reply, **kw), Ledger(budget)
    try:
        run = run_sas(task, config, backend, ledger)
    finally:
        assert ledger.reserved == Usage()
    assert ledger.spent == run.usage
    return run, backend, ledger


def user(request):
    """All that an agent reads."""
    return "\n".join(m["content"] for m in request.messages if m["role"] == "user")


def vote(request):
    """Agents 0, 1, 2, … say yes, no, yes, …"""
    return f"because\nanswer: {'yes' if request.agent % 2 == 0 else 'no'}"


# topologies and configurations

@given(st.integers(1, 12))
@quickly
def test_topologies_have_the_edges_they_promise(n):
    sizes = {"none": 0, "chain": n - 1, "ring": n if n > 1 else 0, "star": 2 * (n - 1), "tree": 2 * (n - 1),
             "mesh": n * (n - 1)}
    for name, size in sizes.items():
        graph = topology(name, n)
        assert isinstance(graph, nx.DiGraph) and sorted(graph) == list(range(n)) and graph.number_of_edges() == size
    assert set(topology("chain", n).edges()) == {(i, i + 1) for i in range(n - 1)}
    assert set(topology("ring", n).edges()) == {(i, (i + 1) % n) for i in range(n) if n > 1}
    assert set(topology("star", n).edges()) == {edge for i in range(1, n) for edge in ((0, i), (i, 0))}
    for name in ("star", "tree", "mesh", "small_world"):
        edges = set(topology(name, n).edges())
        assert edges == {(j, i) for i, j in edges}
    for name in ("star", "tree", "mesh"):
        assert nx.is_strongly_connected(topology(name, n))
    assert n < 2 or min(d for _, d in topology("small_world", n).degree()) > 0
    for layers in range(1, n + 3):
        assert n < 2 or layers < 2 or min(d for _, d in topology("layered", n, layers=layers).degree()) > 0


def test_layers_speak_forward_and_random_graphs_belong_to_their_seed():
    assert set(topology("layered", 5, layers=2).edges()) == {(i, j) for i in (0, 1, 2) for j in (3, 4)}
    assert nx.is_directed_acyclic_graph(topology("layered", 9, layers=3))
    assert max(d for _, d in topology("tree", 13, branching=3).out_degree()) == 4
    one, other = topology("random", 12, seed=1), topology("random", 12, seed=2)
    assert nx.utils.graphs_equal(one, topology("random", 12, seed=1)) and not nx.utils.graphs_equal(one, other)
    assert topology("random", 30, p=0.0).number_of_edges() == 0
    assert topology("random", 30, p=1).number_of_edges() == 870
    assert 350 < topology("random", 30).number_of_edges() < 520
    assert topology("small_world", 10, k=4, p=0.2).number_of_edges() == 40


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: topology("web", 3), KeyError, "no topology 'web': none, chain, ring"),
    (lambda: topology("ring", 0), ValueError, "n must be >= 1, got 0"),
    (lambda: topology("ring", 2.5), TypeError, "n must be an integer, got 2.5"),
    (lambda: topology("ring", 3, p=0.1), TypeError, "topology 'ring' has no parameter 'p': none"),
    (lambda: topology("random", 3, p=1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
    (lambda: topology("small_world", 3, k=3), ValueError, r"k must be in \[0, 2\] for 3 agents, got 3"),
    (lambda: topology("tree", 3, branching=0), ValueError, "branching must be >= 1, got 0"),
    (lambda: MASConfig(n_agents=0), ValueError, "n_agents must be >= 1, got 0"),
    (lambda: MASConfig(rounds=0), ValueError, "rounds must be >= 1, got 0"),
    (lambda: MASConfig(max_tokens=0), ValueError, "max_tokens must be >= 1, got 0"),
    (lambda: MASConfig(seed=-1), ValueError, "seed must be >= 0, got -1"),
    (lambda: MASConfig(temperature=-0.1), ValueError, "temperature must be finite and >= 0, got -0.1"),
    (lambda: MASConfig(message_noise=1.2), ValueError, r"message_noise must be in \[0, 1\], got 1.2"),
    (lambda: MASConfig(topology="web"), KeyError, "no topology 'web'"),
    (lambda: MASConfig(aggregator="dice"), KeyError, "no aggregator 'dice': majority, weighted"),
    (lambda: MASConfig(memory="window(x)"), KeyError, r"no memory 'window\(x\)': none, own, shared, window\(k\)"),
    (lambda: MASConfig(tools=("hammer",)), KeyError, "no tool 'hammer': calculate, lookup"),
    (lambda: MASConfig(tools=("lookup", ("lookup",))), ValueError, "names or tuples of names, not both"),
    (lambda: MASConfig(roles=()), ValueError, r"roles must be a tuple of at least one name, got \(\)"),
    (lambda: MASConfig(roles="critic"), ValueError, "roles must be a tuple of at least one name, got 'critic'"),
    (lambda: MASConfig(trust=(1.0,)), ValueError, r"trust holds probabilities inside \(0, 1\), got 1.0"),
    (lambda: MASConfig(n_agents=3, topology="small_world", topology_args=(("k", 5),)), ValueError, "got 5"),
    (lambda: MASConfig(topology="random", topology_args={"p": 0.5}), TypeError, "must be pairs of name and value, got {'p': 0.5}"),
    (lambda: MASConfig(topology="random", topology_args=("p", 0.5)), TypeError, r"pairs of name and value, got \('p', 0.5\)"),
    (lambda: run_mas(TASK, SASConfig(), Script(vote), Ledger(FREE)), TypeError, "config must be a MASConfig, got SASConfig"),
    (lambda: run_sas(TASK, MASConfig(), Script(vote), Ledger(FREE)), TypeError, "config must be a SASConfig, got MASConfig"),
    (lambda: run_mas(TASK, MASConfig(), Script(vote), FREE), TypeError, "ledger must be a Ledger, .* got Budget"),
    (lambda: run_sas(TASK, SASConfig(), Script(vote), FREE), TypeError, "ledger must be a Ledger, .* got Budget"),
    (lambda: SASConfig("guess"), KeyError, "no strategy 'guess': single, long"),
    (lambda: SASConfig(n=0), ValueError, "n must be >= 1, got 0"),
])
def test_bad_configurations_are_refused_with_the_value(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_configurations_are_hashable_and_tell_every_field_apart():
    base = MASConfig(roles=["solver", "critic"], topology="random", topology_args=[["p", 0.3]])
    assert hash(base) == hash(MASConfig(roles=("solver", "critic"), topology="random", topology_args=(("p", 0.3),)))
    other = {"n_agents": 4, "topology": "none", "topology_args": (("p", 0.4),), "rounds": 2, "roles": ("solver",),
             "models": ("x",), "memory": "none", "tools": ("lookup",), "message": "rationale", "message_tokens": 65,
             "message_noise": 0.1, "visibility": "all", "schedule": "sequential", "aggregator": "last",
             "budget_split": "proportional", "termination": "quorum", "temperature": 0.5, "max_tokens": 255, "min_tokens": 15,
             "seed": 1, "order": "reverse", "trust": (0.6,), "duplicates": "drop"}
    assert set(other) == {f.name for f in fields(MASConfig)}
    other["topology"], changed = "chain", []
    for name, value in other.items():
        more = {"topology_args": ()} if name == "topology" else {}
        changed.append(replace(base, **{name: value, **more}))
    prints = {c.fingerprint() for c in [base, *changed]}
    assert len(prints) == len(other) + 1 and all(len(p) == 64 for p in prints)


def test_equal_configurations_have_equal_fingerprints():
    whole = MASConfig(1, "random", (("p", 1),), temperature=1, message_noise=0, trust=(np.float64(0.5),))
    parts = MASConfig(True, "random", (("p", 1.0),), temperature=1.0, message_noise=0.0, trust=(0.5,))
    assert whole == parts and whole.fingerprint() == parts.fingerprint()
    assert MASConfig(temperature=1).fingerprint() == MASConfig().fingerprint()
    assert SASConfig(temperature=1).fingerprint() == SASConfig().fingerprint()


def test_fingerprints_are_the_same_in_every_process():
    code = ("from collai.gamma.engines import MASConfig, SASConfig; "
            "print(MASConfig(topology='star').fingerprint(), SASConfig('long').fingerprint())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [MASConfig(topology="star").fingerprint(), SASConfig("long").fingerprint()]


# who reads what

def echo(request):
    """Everyone writes what it has read, in short: the set of agents whose words have reached it."""
    known = {str(request.agent)} | {x for word in user(request).split() if word.startswith("knows:")
                                    for x in word[6:].split(",")}
    return f"knows:{','.join(sorted(known))}\nanswer: {len(known)}"


@given(st.sampled_from(["none", "chain", "ring", "star", "tree", "layered", "mesh", "random"]), st.integers(1, 6),
       st.integers(1, 4), st.sampled_from(["synchronous", "sequential"]))
@quickly
def test_news_travels_as_in_a_plain_loop(name, n, rounds, schedule):
    config = MASConfig(n, name, rounds=rounds, message="rationale", schedule=schedule)
    run, _, _ = team(config, echo)
    graph, known, rows = topology(name, n), [{i} for i in range(n)], []
    for t in range(rounds):
        before = [set(k) for k in known]
        for i in range(n):
            for j in graph.predecessors(i):
                if t or (schedule == "sequential" and j < i):
                    known[i] |= known[j] if schedule == "sequential" else before[j]
        rows.append([str(len(k)) for k in known])
    assert run.answers == rows and run.stopped == "done"
    reads = Counter(m["round"] for m in run.messages)
    edges = graph.number_of_edges()
    forward = sum(j < i for j, i in graph.edges()) if schedule == "sequential" else 0
    assert [reads[t] for t in range(rounds)] == [forward] + [edges] * (rounds - 1)


def asked(config, t, agent, reply=vote, **kw):
    """What one agent is asked in one round."""
    _, backend, _ = team(config, reply, **kw)
    return next(r for r in backend.seen if (r.round, r.agent) == (t, agent))


def test_the_context_is_dealt_in_order_and_completely():
    for n in (1, 3, 4, 10, 12):
        _, backend, _ = team(MASConfig(n), vote)
        parts = [[line for line in user(r).splitlines() if line.startswith("piece")] for r in backend.seen]
        assert [line for part in parts for line in part] == list(TASK.context) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_agent_remembers_what_its_memory_says():
    roles = {memory: [m["role"] for m in asked(MASConfig(3, "mesh", rounds=4, memory=memory), 3, 0).messages]
             for memory in ("none", "own", "shared", "window(2)", "window(9)")}
    turn = ["assistant", "user"]
    assert roles == {"none": ["system", "user"], "own": ["system", "user", *3 * turn], "shared": ["system", "user"],
                     "window(2)": ["system", "user", *2 * turn], "window(9)": ["system", "user", *3 * turn]}
    own = asked(MASConfig(3, "mesh", rounds=3), 2, 0).messages
    assert own[2]["content"] == own[4]["content"] == "because\nanswer: yes"
    assert own[1]["content"].startswith("Which?\npiece 0") and "says" not in own[1]["content"]
    assert own[3]["content"] == "Agent 1, solver, says\nanswer: no\n\nAgent 2, solver, says\nanswer: yes" == own[5]["content"]
    shared = user(asked(MASConfig(3, "none", rounds=3, memory="shared"), 2, 0))
    assert [shared.count(f"Agent {i}, solver, says") for i in range(3)] == [2, 2, 2]
    window = asked(MASConfig(2, "mesh", rounds=4, memory="window(1)"), 3, 0).messages
    assert window[1]["content"].startswith("Which?\npiece 0") and "Agent 1" in window[1]["content"]


def test_without_news_an_agent_is_asked_to_think_again():
    assert [m["content"] for m in asked(MASConfig(2, rounds=2), 1, 0).messages[2:]] == ["because\nanswer: yes", "Think again."]


def talk(request):
    """A reply with all that messages are made of."""
    return ("I start. Some words here\nsize: 3\nsummary: short and good\nanswer: " + ("a" if request.agent else "b"))


def test_messages_carry_what_their_kind_says():
    shown = {}
    for kind in ("none", "answer", "rationale", "summary", "structured", "blackboard"):
        config = MASConfig(3, "chain", rounds=2, message=kind, message_tokens=2)
        shown[kind] = asked(config, 1, 1, talk).messages[-1]["content"]
    assert shown["none"] == "Think again."
    head = "Agent 0, solver, says\n"
    assert shown["answer"] == f"{head}answer: b"
    assert shown["rationale"] == head + talk(Request(TASK, 0, "", [{}], 1, 0, 0))
    assert shown["summary"] == f"{head}summary: short and\nanswer: b"
    assert shown["structured"] == f"{head}size: 3\nsummary: short and good\nanswer: b"
    assert shown["blackboard"].count("I start.") == 2  # agent 2 is not heard on the chain, but stands on the board
    plain = asked(MASConfig(2, "mesh", rounds=2, message="summary", message_tokens=3), 1, 0, lambda r: "a b  c\nanswer: d")
    assert plain.messages[-1]["content"] == "Agent 1, solver, says\nc\nanswer: d"


def test_a_board_is_read_in_full_by_who_forgets():
    kept = {m: user(asked(MASConfig(2, message="blackboard", rounds=3, memory=m), 2, 0)).count("because")
            for m in ("own", "none")}
    assert kept == {"own": 2, "none": 2}
    last = asked(MASConfig(2, message="blackboard", rounds=3), 2, 0).messages[-1]["content"]
    assert last.count("because") == 1  # the rest was read before


def test_visibility_duplicates_and_order():
    def last(**kw):
        return asked(MASConfig(4, rounds=2, **kw), 1, 3).messages[-1]["content"]

    assert last(topology="chain").count("says") == 1 and last(topology="chain", visibility="all").count("says") == 3
    hidden = last(topology="mesh", visibility="anonymous")
    assert hidden.count("A colleague says") == 3 and "Agent" not in hidden
    assert last(topology="mesh").count("answer: yes") == 2 and last(topology="mesh", duplicates="drop").count("says") == 2
    names = {o: [line[:7] for line in last(topology="mesh", order=o).splitlines() if "says" in line]
             for o in ("index", "reverse", "random")}
    assert names["index"] == ["Agent 0", "Agent 1", "Agent 2"] == names["reverse"][::-1] == sorted(names["random"])
    seeds = {tuple(line for line in last(topology="mesh", order="random", seed=s).splitlines() if "says" in line)
             for s in range(20)}
    assert len(seeds) > 3


def test_asynchronous_turns_come_in_an_order_of_their_own_each_round():
    def turns(**kw):
        _, backend, _ = team(MASConfig(5, "ring", rounds=3, schedule="asynchronous", **kw), vote)
        return [[r.agent for r in backend.seen if r.round == t] for t in range(3)]

    first = turns()
    assert all(sorted(order) == list(range(5)) for order in first) and turns() == first
    assert len(set(map(tuple, first))) > 1 and turns(seed=1) != first
    once = MASConfig(5, "mesh", rounds=4, schedule="asynchronous", message="rationale")
    read = [(m["receiver"], m["text"]) for m in team(once, lambda r: f"{r.agent} in {r.round}\nanswer: x")[0].messages]
    assert len(read) == len(set(read)) > 30  # nothing is read twice


def test_the_channel_loses_the_share_of_messages_it_should():
    counts = [len(team(MASConfig(6, "mesh", rounds=6, message_noise=e), vote)[0].messages) for e in (0, 0.3, 1)]
    assert counts[0] == 150 and counts[2] == 0 and abs(counts[1] - 105) < 4 * math.sqrt(150 * 0.21)
    some = MASConfig(6, "mesh", rounds=6, message_noise=0.3)
    assert team(some, vote)[0].messages == team(some, vote)[0].messages != team(replace(some, seed=1), vote)[0].messages


def test_roles_models_and_tools_are_cycled():
    one, two = Script(vote), Script(vote)
    config = MASConfig(5, roles=("solver", "critic"), models=("x", "y"), tools=(("calculate",), ("lookup",), ()))
    run_mas(TASK, config, {"x": one, "y": two}, Ledger(FREE))
    assert [r.agent for r in one.seen] == [0, 2, 4] and [r.agent for r in two.seen] == [1, 3]
    assert {r.role for r in one.seen} == {"solver"} and {r.role for r in two.seen} == {"critic"}
    told = {r.agent: r.messages[0]["content"] for r in one.seen + two.seen}
    assert [("'calculate: ...'" in told[i], "'lookup: ...'" in told[i]) for i in range(4)] == [
        (True, False), (False, True), (False, False), (True, False)]
    with pytest.raises(KeyError, match="no backend for model 'y': default"):
        run_mas(TASK, config, {"default": one, "x": two}, Ledger(FREE))
    with pytest.raises(KeyError, match="no backend for model 'default': x"):
        run_sas(TASK, SASConfig("single"), {"x": one}, Ledger(FREE))


@pytest.mark.parametrize(("line", "result"), [
    ("calculate: (3 + 4) * -2 / 4 % 5", "result of calculate (3 + 4) * -2 / 4 % 5: 1.5"),
    ("calculate: 1 / 0", "no result (division by zero)"),
    ("calculate: __import__('os')", "no result (only numbers and + - * / // %)"),
    ("calculate: 2 ** 9", "no result (only numbers and + - * / // %)"),
    ("calculate: 3 +", "no result (invalid syntax"),
    ("lookup: PIECE 7", "result of lookup PIECE 7: piece 7"),
    ("lookup: piece", "piece 0; piece 1; piece 2; piece 3; piece 4"),
    ("lookup: gold", "nothing found"),
])
def test_a_tool_answers_in_the_next_message(line, result):
    config = MASConfig(1, rounds=2, tools=("calculate", "lookup"))
    assert result in asked(config, 1, 0, lambda r: f"{line}\nanswer: x").messages[-1]["content"]
    silent = asked(replace(config, tools=()), 1, 0, lambda r: f"{line}\nanswer: x").messages[-1]["content"]
    assert silent == "Think again."


# one answer of many

def decide(votes, aggregator, seed=0, name="t", rounds=(), **kw):
    """Answer of a team whose agents say this, and said something before."""
    rows = [*rounds, votes]
    config = MASConfig(len(votes), rounds=len(rows), aggregator=aggregator, seed=seed, **kw)
    return team(config, lambda r: f"answer: {rows[r.round][r.agent]}", task=Task(name, "?", "a"))[0].answer


def test_votes_are_counted_without_regard_to_case_and_silence():
    for rule in ("majority", "plurality", "borda", "weighted"):
        assert decide(["Rome", "", "rome", "Oslo", ""], rule) == "Rome"
        assert decide(["", ""], rule) == ""
    assert decide(["x > 3", "x > 3", "y"], "majority") == "x > 3"


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=7), st.integers(0, 50))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_plurality_names_a_most_frequent_answer(votes, seed):
    winner = module._plurality(votes, seed, TASK)
    assert Counter(votes)[winner] == max(Counter(votes).values())
    assert module._borda(votes, seed, TASK) == module._majority([votes], seed, TASK) or len(set(votes)) > 1


def test_a_tie_falls_to_a_fair_coin_of_seed_and_task():
    names = [str(k) for k in range(400)]
    falls = [module._plurality(["a", "b"], 0, Task(name, "?", "a")) for name in names]
    assert abs(falls.count("a") - 200) < 45
    assert falls == [module._plurality(["a", "b"], 0, Task(name, "!", "b")) for name in names]
    assert falls != [module._plurality(["a", "b"], 1, Task(name, "?", "a")) for name in names]


def test_a_majority_without_more_than_half_goes_into_a_run_off():
    before = ["a", "b", "b", "b", "b"]
    votes = ["a", "a", "c", "b", "d"]  # b and one of c, d follow; c's and d's agents said b before
    wins = Counter(module._majority([before, votes], 0, Task(str(k), "?", "a")) for k in range(60))
    assert wins["b"] > 0 and set(wins) == {"a", "b"}
    assert decide(votes, "majority", rounds=[before]) == module._majority([before, votes], 0, Task("t", "?", "a"))
    assert decide(votes, "plurality", rounds=[before]) == "a"
    assert decide(["a", "a", "a", "b", "c"], "majority", rounds=[["b"] * 5]) == "a"
    assert decide(["a", "a", "b", "c"], "majority") == "a"


@given(st.lists(st.tuples(st.booleans(), st.floats(0.05, 0.95)), min_size=1, max_size=6))
@quickly
def test_weighted_votes_follow_the_posterior(agents):
    votes, trust = ["a" if right else "b" for right, _ in agents], tuple(p for _, p in agents)
    for_a = math.prod(p if v == "a" else 1 - p for v, p in zip(votes, trust, strict=True))
    for_b = math.prod(1 - p if v == "a" else p for v, p in zip(votes, trust, strict=True))
    if len(set(votes)) == 2 and abs(for_a - for_b) > 1e-9 * (for_a + for_b):
        assert decide(votes, "weighted", trust=trust) == ("a" if for_a > for_b else "b")


@given(st.lists(st.permutations("abc").flatmap(lambda p: st.integers(1, 3).map(lambda k: p[:k])), min_size=1, max_size=5))
@quickly
def test_borda_gives_points_for_places(ballots):
    votes = [" > ".join(ballot) for ballot in ballots]
    options = sorted({option for ballot in ballots for option in ballot})
    points = {}
    for option in options:  # against every other option: 1 for a win, 1/2 where the ballot ranks neither
        points[option] = 0.0
        for ballot, other in itertools.product(ballots, options):
            if option != other:
                places = [ballot.index(x) if x in ballot else math.inf for x in (option, other)]
                points[option] += 0.5 if places[0] == places[1] else float(places[0] < places[1])
    winner = decide(votes, "borda")
    assert points[winner] == pytest.approx(max(points.values()))


def test_quorum_last_and_abstentions():
    assert decide(["a", "a", "b"], "quorum") == "a" and decide(["a", "b"], "quorum") == ""
    assert decide(["a", "a", "", "a"], "quorum") == "a" and decide(["a", "", "", "a"], "quorum") == ""
    assert decide(["a", "b", "c"], "last") == "c" and decide(["a", "b", ""], "last") == "b"
    assert decide(["", "", ""], "majority", rounds=[["a", "b", "b"]]) == "b"  # the latest answer stands


def test_the_judge_reads_the_latest_replies_and_decides():
    def reply(r):
        return f"answer: {user(r).count('answer: no')}" if r.role == "judge" else vote(r)

    run, backend, ledger = team(MASConfig(5, aggregator="judge"), reply)
    assert run.answer == "2" and backend.seen[-1].agent == "judge" and "piece" not in user(backend.seen[-1])
    assert list(ledger.to_frame().tail(1)[["event", "agent", "tag"]].iloc[0]) == ["commit", "aggregator", "judge"]
    silent = team(MASConfig(5, aggregator="judge"), lambda r: "" if r.role == "judge" else vote(r))[0]
    assert silent.answer == "yes"  # the vote decides


def test_what_the_judge_reads_fits_what_was_put_aside():
    long = " ".join(f"word{k}" for k in range(200))
    config = MASConfig(4, aggregator="judge", message="rationale", max_tokens=20)
    run, backend, ledger = team(config, lambda r: f"{long}\nanswer: x", Budget(tokens=700))
    frame = ledger.to_frame()
    aside = frame[(frame.event == "reserve") & (frame.agent == "aggregator")].iloc[0]
    assert frame.index[frame.agent == "aggregator"][0] == 0  # before the first round
    assert backend.bound(backend.seen[-1]).prompt_tokens <= aside.prompt_tokens
    assert user(backend.seen[-1]).count("answer: x") == 4 and run.answer == "x"


def test_the_verifier_marks_each_candidate_once():
    marks = {"yes": "0.2", "no": "0.9"}

    def reply(r):
        return f"answer: {marks[user(r).split('candidate: ')[1]]}" if r.role == "verifier" else vote(r)

    run, backend, _ = team(MASConfig(5, aggregator="verifier-best"), reply)
    assert run.answer == "no" and len(backend.seen) == 7
    marks.update(no="0.2")
    assert team(MASConfig(5, aggregator="verifier-best"), reply)[0].answer == "yes"  # equal marks: more votes
    marks.update(yes="no", no="no")
    assert team(MASConfig(5, aggregator="verifier-best"), reply)[0].answer == "no"  # the same answer counts as 1


# when a team stops

def test_a_team_stops_when_it_agrees():
    def settle(r):
        return f"answer: {'x' if r.round >= 2 or r.agent < 2 else r.agent}"

    for rule, rounds, stopped in (("fixed", 6, "done"), ("consensus", 3, "consensus"), ("quorum", 3, "consensus")):
        run, _, _ = team(MASConfig(4, rounds=6, termination=rule), settle)
        assert (len(run.answers), run.stopped) == (rounds, stopped)
    run, _, _ = team(MASConfig(3, rounds=6, termination="quorum"), settle)
    assert (len(run.answers), run.stopped) == (1, "consensus")
    run, _, _ = team(MASConfig(4, rounds=3, termination="consensus"), settle)
    assert (len(run.answers), run.stopped) == (3, "done")  # it would have ended anyway
    run, _, _ = team(MASConfig(3, rounds=2, termination="quorum"), lambda r: "answer: x", Budget(calls=2))
    assert run.answers == [["x", "x", ""]] and run.stopped == "budget"  # agreed, but one agent was not paid


def test_a_confidence_sequence_stops_early_when_sure_and_late_when_not():
    sure = team(MASConfig(8, rounds=8, termination="confidence-sequence"), lambda r: "answer: x")[0]
    assert sure.stopped == "consensus" and 2 <= len(sure.answers) <= 5
    torn = team(MASConfig(8, rounds=8, termination="confidence-sequence"), vote)[0]
    assert torn.stopped == "done" and len(torn.answers) == 8


# one agent

def test_single_and_long_make_one_call():
    run, backend, _ = solo(SASConfig("single", max_tokens=50), lambda r: "answer: yes", Budget(tokens=1000))
    assert (run.score, run.answers, backend.seen[0].max_tokens, run.stopped) == (1.0, [["yes"]], 50, "done")
    assert all(piece in user(backend.seen[0]) for piece in TASK.context)
    _, backend, _ = solo(SASConfig("long", max_tokens=50), lambda r: "answer: yes", Budget(tokens=1000))
    assert backend.seen[0].max_tokens == 1000 - backend.words(backend.seen[0])
    with pytest.raises(ValueError, match="strategy 'long' needs a budget that a longer reply uses up, got no limit"):
        solo(SASConfig("long"), vote)


def test_self_consistency_draws_as_many_samples_as_the_budget_pays_for():
    def reply(r):
        return f"word word answer: {'ab'[r.sample % 2]}"

    run, backend, ledger = solo(SASConfig(max_tokens=30), reply, Budget(calls=7))
    assert [r.sample for r in backend.seen] == list(range(7)) and run.answer == "a" and run.stopped == "budget"
    assert {(r.agent, r.round) for r in backend.seen} == {("solver", 0)} and run.answers == [list("abababa")]
    run, backend, ledger = solo(SASConfig(max_tokens=30), reply, Budget(tokens=1000))
    cost = backend.words(backend.seen[0])
    assert ledger.remaining("tokens") < cost + 16 and [r.max_tokens for r in backend.seen[:-1]] == [30] * (len(backend.seen) - 1)
    run, backend, _ = solo(SASConfig(n=5), reply)
    assert len(backend.seen) == 5 and run.stopped == "done" and run.answer == "a"
    with pytest.raises(ValueError, match="n=None needs a budget that calls use up, got no limit"):
        solo(SASConfig(), reply)
    with pytest.raises(ValueError, match=r"n=None needs a budget that calls use up, got \['usd'\]"):
        solo(SASConfig("reflect"), reply, Budget(usd=1))


def test_a_fixed_number_of_samples_shares_the_budget_equally():
    class Exact(Script):  # every token that may be written is written, and reading is free
        def words(self, request):
            return 0

        async def generate(self, requests):
            return [replace(r, usage=self.bound(q)) for q, r in zip(requests, await super().generate(requests), strict=True)]

    backend = Exact(lambda r: "answer: yes")
    run = run_sas(TASK, SASConfig(n=4, max_tokens=9999), backend, Ledger(Budget(tokens=1000)))
    assert [r.max_tokens for r in backend.seen] == [250] * 4 and run.stopped == "done" and run.usage.tokens == 1000


def test_best_of_n_takes_the_best_mark():
    def reply(r):
        if r.role == "verifier":
            return f"answer: {0.9 if user(r).endswith('c') else 0.1}"
        return f"answer: {'abc'[r.sample % 3]}"

    run, backend, _ = solo(SASConfig("best_of_n", n=4), reply)
    assert run.answer == "c" and len(backend.seen) == 8 and run.answers == [["a", "b", "c", "a"]]
    assert {r.agent for r in backend.seen} == {"solver"}
    assert solo(SASConfig("best_of_n"), reply, Budget(calls=4))[0].answers == [["a", "b"]]


def test_reflect_goes_on_until_the_budget_is_gone():
    run, backend, _ = solo(SASConfig("reflect"), lambda r: f"answer: {r.round}", Budget(calls=5))
    assert run.answer == "4" and run.answers == [["0"], ["2"], ["4"]] and run.stopped == "budget"
    roles = [m["role"] for m in backend.seen[-1].messages]
    assert roles == ["system", "user", *4 * ["assistant", "user"]]
    assert solo(SASConfig("reflect", n=2), lambda r: f"answer: {r.round}")[0].answer == "0"  # a critique is no answer
    assert solo(SASConfig("reflect", n=3), lambda r: "answer:" if r.round else "answer: x")[0].answer == "x"


def test_chunked_reads_everything_once_with_a_note():
    def reply(r):
        return f"note {r.round}\nanswer: {r.round}"

    for n, sizes in ((1, [10]), (3, [4, 3, 3]), (10, [1] * 10), (99, [1] * 10)):
        run, backend, _ = solo(SASConfig("chunked", n=n), reply)
        parts = [[line for line in user(r).splitlines() if line.startswith("piece")] for r in backend.seen]
        assert [line for part in parts for line in part] == list(TASK.context) and list(map(len, parts)) == sizes
        notes = [[m["content"] for m in r.messages if m["role"] == "assistant"] for r in backend.seen]
        assert notes == [[], *([reply(r)] for r in backend.seen[:-1])] and run.answer == str(len(sizes) - 1)
    run, backend, _ = solo(SASConfig("chunked", max_tokens=40), reply, Budget(tokens=700))
    read = [line for r in backend.seen for line in user(r).splitlines() if line.startswith("piece")]
    assert read == list(TASK.context) and 2 <= len(backend.seen) < 10 and run.stopped == "done"
    assert solo(SASConfig("chunked"), reply, task=Task("e", "?", "x"))[0].answers == [["0"]]


# money

@given(st.integers(0, 1500), st.integers(1, 5), st.integers(1, 3),
       st.sampled_from(["majority", "judge", "verifier-best"]),
       st.sampled_from(["equal", "front-loaded", "aggregator-reserve", "proportional"]),
       st.sampled_from(["synchronous", "sequential"]))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_a_team_never_overspends_and_leaves_nothing_reserved(tokens, n, rounds, aggregator, split, schedule):
    config = MASConfig(n, "mesh", rounds=rounds, aggregator=aggregator, budget_split=split, schedule=schedule, max_tokens=60)
    backend, ledger = Script(lambda r: "some words\nanswer: 0.5"), Ledger(Budget(tokens=tokens))
    try:
        run = run_mas(TASK, config, backend, ledger)
    except BudgetExceeded as short:
        assert ledger.spent == Usage() and not backend.seen and short.resource == "tokens"
    else:
        assert run.usage == ledger.spent and run.usage.tokens <= tokens and ledger.peak("tokens") <= tokens
        agents = len(backend.seen) - {"judge": 1}.get(aggregator, 0)
        assert run.stopped == "budget" or agents >= n * rounds
        assert run.answer == "0.5" and all(r.max_tokens >= 16 for r in backend.seen)
    assert ledger.reserved == Usage()


@given(st.integers(0, 1200), st.sampled_from(["single", "long", "self_consistency", "best_of_n", "reflect", "chunked"]),
       st.sampled_from([None, 3]))
@quickly
def test_one_agent_never_overspends_and_leaves_nothing_reserved(tokens, strategy, n):
    backend, ledger = Script(lambda r: "some words\nanswer: 0.5"), Ledger(Budget(tokens=tokens))
    try:
        run = run_sas(TASK, SASConfig(strategy, n, max_tokens=60), backend, ledger)
    except BudgetExceeded:
        assert ledger.spent == Usage() and not backend.seen
    else:
        assert run.usage == ledger.spent and ledger.peak("tokens") <= tokens and run.answer == "0.5"
        assert all(r.max_tokens >= 16 for r in backend.seen)
    assert ledger.reserved == Usage()


def test_shares_divide_what_is_left():
    class Exact(Script):  # every token that may be written is written
        async def generate(self, requests):
            return [replace(r, usage=self.bound(q)) for q, r in zip(requests, await super().generate(requests), strict=True)]

        def words(self, request):
            return 0

    def sizes(split, **kw):
        backend = Exact(lambda r: "answer: yes")
        config = MASConfig(4, budget_split=split, max_tokens=9999, **kw)
        run = run_mas(Task("t", "?", "yes"), config, backend, Ledger(Budget(tokens=1200)))
        assert run.usage.tokens == 1200 and run.stopped == "done"
        return [r.max_tokens for r in backend.seen]

    assert sizes("equal") == [300] * 4 and sizes("equal", rounds=3) == [100] * 12
    assert sizes("front-loaded", rounds=2) == [200] * 4 + [100] * 4
    assert sizes("equal", aggregator="judge") == [240] * 5
    assert sizes("aggregator-reserve", aggregator="judge") == [150] * 4 + [600]
    assert sizes("proportional", topology="star") == [480, 240, 240, 240]


def test_calls_shrink_to_what_is_left_and_stop_below_the_least():
    task = Task("t", "?", "yes")
    cost = Script(vote).words(team(MASConfig(1), vote, task=task)[1].seen[0])
    _, backend, _ = team(MASConfig(1, max_tokens=60), vote, Budget(tokens=cost + 20), task=task)
    assert backend.seen[0].max_tokens == 20
    with pytest.raises(BudgetExceeded, match=f"tokens: requested {cost + 16}, available {cost + 15}"):
        team(MASConfig(1, max_tokens=60), vote, Budget(tokens=cost + 15), task=task)
    _, backend, _ = team(MASConfig(1, max_tokens=8), vote, Budget(tokens=cost + 8), task=task)
    assert backend.seen[0].max_tokens == 8  # no more was wanted
    run, backend, _ = team(MASConfig(3, max_tokens=60), vote, Budget(tokens=2 * cost + 40), task=task)
    assert run.answers == [["yes", "no", ""]] and run.stopped == "budget"
    run, _, _ = team(MASConfig(3, rounds=5), vote, Budget(calls=7))
    assert [sum(map(bool, row)) for row in run.answers] == [3, 3, 1] and run.stopped == "budget"


def test_overhead_is_charged_once_or_nothing_is_spent():
    world = CondorcetWorld(0.6, call_tokens=100, overhead_tokens=250)
    backend = WorldBackend(world)
    task = backend.tasks(1)[0]
    ledger = Ledger(Budget(tokens=700))
    run = run_mas(task, MASConfig(9), backend, ledger)
    assert run.usage == Usage(0, 250 + 400, 4) and run.stopped == "budget"
    for tokens in (200, 349):
        poor = Ledger(Budget(tokens=tokens))
        with pytest.raises(BudgetExceeded):
            run_mas(task, MASConfig(9), backend, poor)
        assert poor.spent == poor.reserved == Usage()
    assert run_sas(task, SASConfig(), backend, Ledger(Budget(tokens=700))).usage == Usage(0, 700, 7)


def faulty(faults, **kw):
    """A script that fails as told, one entry a call."""
    left = list(faults)

    def reply(r):
        fault = left.pop(0) if left else None
        if fault is not None:
            raise fault
        return "answer: yes"

    return Script(reply, batch_size=1, **kw)


def test_every_attempt_is_paid_for_by_itself(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    faults = [ChatError(429, False, 3.0), ChatTimeout(None, None, None), ChatError(500, False)]
    backend, ledger = faulty(faults, retries=3), Ledger(FREE)
    run = run_sas(TASK, SASConfig("single"), backend, ledger)
    whole = backend.bound(backend.seen[0])
    assert run.score == 1 and waits == [3.0, 1.0, 2.0]
    assert list(ledger.to_frame().event) == ["reserve", "release", "reserve", "fail", "reserve", "release", "reserve", "commit"]
    assert ledger.spent == whole + Usage(whole.prompt_tokens, 2, 1) == run.usage and ledger.reserved == Usage()


@pytest.mark.parametrize(("fault", "retries", "spent"), [
    (ChatRefused(400, False), 5, False), (ChatError(503, False), 0, False), (ChatError(None, None), 0, True),
    (RuntimeError("broken"), 5, True)])
def test_a_run_that_fails_says_so_and_settles(fault, retries, spent):
    backend, ledger = faulty([None, fault], retries=retries), Ledger(FREE)
    with pytest.raises(type(fault)):
        run_mas(TASK, MASConfig(3), backend, ledger)
    assert ledger.reserved == Usage() and len(backend.seen) == 3  # the others came to their end
    assert ledger.spent.calls == 2 + spent


def test_an_agent_without_money_for_another_attempt_abstains(monkeypatch):
    monkeypatch.setattr(module, "_WAIT", 0)
    backend, ledger = faulty([ChatTimeout(None, None, None)], retries=5), Ledger(Budget(calls=2))
    run = run_mas(TASK, MASConfig(2), backend, ledger)
    assert sorted(run.answers[0]) == ["", "yes"] and run.stopped == "budget" and run.usage.calls == 2


@pytest.mark.parametrize("config", [
    MASConfig(1), MASConfig(2, rounds=3, termination="consensus"), MASConfig(2, aggregator="judge"),
    MASConfig(2, aggregator="verifier-best"), SASConfig("single"), SASConfig("long"), SASConfig(n=1), SASConfig("best_of_n", 1),
    SASConfig("reflect", 3), SASConfig("chunked", 1)], ids=lambda c: getattr(c, "strategy", f"{c.__class__.__name__} {getattr(c, 'aggregator', '')}"))
def test_a_run_whose_budget_went_into_failed_attempts_raises_their_error(monkeypatch, config):
    monkeypatch.setattr(module, "_WAIT", 0)
    many = isinstance(config, MASConfig)
    n, aside = (config.n_agents, {"judge": 1, "verifier-best": 2}.get(config.aggregator, 0)) if many else (1, 0)
    backend, ledger = faulty([ChatTimeout(None, None, None)] * (2 * n), retries=5), Ledger(Budget(tokens=10**6, calls=2 * n + aside))
    with pytest.raises(ChatTimeout):
        (run_mas if many else run_sas)(Task("t", "?", "", ("a", "b")), config, backend, ledger)
    assert n <= ledger.spent.calls == len(backend.seen) and ledger.reserved == Usage()


@pytest.mark.parametrize("config", [MASConfig(3), MASConfig(2, aggregator="judge"), SASConfig("single"), SASConfig(n=3)],
                         ids=["team", "with judge", "one agent", "samples"])
def test_an_outage_is_an_error_and_no_answer(monkeypatch, config):
    monkeypatch.setattr(module, "_WAIT", 0)
    with ChatServer(llm._Echo(), faults=("cut",)) as server:
        backend = OpenAIBackend(base_url=server.base_url, api_key="k", model="m", timeout=5.0, retries=8)
        ledger = Ledger(Budget(calls=5))
        with pytest.raises(ChatError) as caught:
            (run_mas if isinstance(config, MASConfig) else run_sas)(TASK, config, backend, ledger)
    assert caught.value.billed is None and ledger.reserved == Usage() and ledger.spent.calls >= 4


def test_a_round_without_a_reply_counts(monkeypatch):
    monkeypatch.setattr(module, "_WAIT", 0)
    backend = faulty([ChatTimeout(None, None, None)], retries=1)
    backend.bound = lambda r: Usage(600 if r.round == 0 else 200, 9, 1)
    run = run_mas(TASK, MASConfig(1, rounds=3), backend, Ledger(Budget(prompt_tokens=1000)))
    assert run.answers == [[""], ["yes"], ["yes"]] and (run.answer, run.stopped) == ("yes", "budget")


@pytest.mark.parametrize("config", [MASConfig(1), SASConfig("single")], ids=["team", "one agent"])
def test_a_run_is_refused_only_if_nothing_was_spent(monkeypatch, config):
    ledger = Ledger(Budget(calls=1))

    async def sleep(seconds):  # meanwhile another run takes what was released
        ledger.reserve(Usage(0, 0, 1))

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    with pytest.raises(BudgetExceeded, match="calls: requested 1, available 0"):
        (run_mas if isinstance(config, MASConfig) else run_sas)(TASK, config, faulty([ChatError(429, False)], retries=3), ledger)
    assert ledger.spent == Usage()


def test_a_batch_that_fails_is_charged_in_full_and_a_lie_about_the_bound_is_told():
    class Liar(Script):
        def bound(self, request):
            return Usage(1, 1, 1)

    ledger = Ledger(FREE)
    with pytest.raises(OverrunError):
        run_mas(TASK, MASConfig(3), Liar(vote), ledger)
    assert ledger.reserved == Usage() and ledger.spent.calls == 3

    class Short(Script):
        async def generate(self, requests):
            return (await super().generate(requests))[1:]

    ledger = Ledger(FREE)
    with pytest.raises(ValueError, match="script gave 2 responses to 3 requests"):
        run_mas(TASK, MASConfig(3), Short(vote), ledger)
    assert ledger.reserved == Usage() and ledger.spent.calls == 3


class Odd(Script):
    """Gives back what it is told to, awaited."""

    async def generate(self, requests):
        self.seen += requests
        return self.reply(requests[0])


class Sync(Odd):
    """The same without waiting."""

    def generate(self, requests):
        return self.reply(requests[0])


@pytest.mark.parametrize(("make", "gives", "error", "words"), [
    (Odd, "yes", TypeError, "script gave yes, not a list of Response"),
    (Odd, ["yes"], TypeError, r"script gave \['yes'\], not a list of Response"),
    (Odd, None, TypeError, "script gave None, not a list of Response"),
    (Odd, [], ValueError, "script gave 0 responses to 1 requests"),
    (Sync, [], TypeError, r"generate of script must be awaitable \(async def\), it gave \[\]")])
@pytest.mark.parametrize("size", [1, 8])
def test_a_malformed_reply_is_named_and_charged_in_full(make, gives, error, words, size):
    for run, config in ((run_mas, MASConfig(1)), (run_sas, SASConfig("single"))):
        ledger = Ledger(FREE)
        with pytest.raises(error, match=words):
            run(TASK, config, make(lambda r: gives, batch_size=size), ledger)
        assert ledger.reserved == Usage() and ledger.spent.calls == 1


class Free(Script):
    """Reports less usage than its bound: nothing, or the call alone."""

    async def generate(self, requests):
        found = await super().generate(requests)
        if len(self.seen) > 500:
            raise RuntimeError("goes on for ever")
        return [replace(one, usage=self.usage) for one in found]


@pytest.mark.parametrize("usage", [Usage(), Usage(calls=1)])
@pytest.mark.parametrize("strategy", ["self_consistency", "best_of_n", "reflect"])
def test_calls_that_turn_out_to_be_free_do_not_go_on_for_ever(strategy, usage):
    backend, ledger = Free(lambda r: "answer: yes"), Ledger(Budget(tokens=3000))
    backend.usage = usage
    with pytest.raises(ValueError, match=f"n=None needs a budget that calls use up, script reported Usage.*calls={usage.calls}"):
        run_sas(TASK, SASConfig(strategy), backend, ledger)
    assert ledger.reserved == Usage() and len(backend.seen) <= 64
    assert run_sas(TASK, SASConfig(strategy, n=3), backend, Ledger(Budget(tokens=3000))).answer == "yes"
    assert run_sas(TASK, SASConfig("single"), backend, Ledger(Budget(tokens=3000))).answer == "yes"


def test_a_cancelled_run_leaves_nothing_reserved():
    class Slow(Script):
        async def generate(self, requests):
            await asyncio.sleep(60)

    async def go(size):
        ledger = Ledger(FREE)
        config = MASConfig(3, aggregator="judge")
        work = asyncio.create_task(arun_mas(TASK, config, Slow(vote, batch_size=size), ledger))
        await asyncio.sleep(0.01)
        assert ledger.reserved.calls == 4
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return ledger

    for size in (1, 8):
        ledger = asyncio.run(go(size))
        assert ledger.reserved == Usage() and ledger.spent.calls == 3  # under way: charged; the judge's: given back


def test_ledgers_may_be_shared_by_runs_at_the_same_time():
    async def go():
        ledger, backend = Ledger(Budget(calls=40)), Script(vote)
        runs = [arun_mas(Task(str(k), "?", "yes"), MASConfig(3, rounds=2), backend, ledger) for k in range(10)]
        done = await asyncio.gather(*runs, return_exceptions=True)
        assert ledger.spent.calls == 40 and ledger.reserved == Usage()
        return [run for run in done if not isinstance(run, BudgetExceeded)]

    runs = asyncio.run(go())
    assert sum(run.usage.calls for run in runs) == 40


def test_plain_forms_work_where_a_loop_runs():
    async def inside():
        plain = run_mas(TASK, MASConfig(3), Script(vote), Ledger(FREE))
        awaited = await arun_mas(TASK, MASConfig(3), Script(vote), Ledger(FREE))
        assert plain == awaited
        return run_sas(TASK, SASConfig("single"), Script(lambda r: "answer: yes"), Ledger(FREE)) == await arun_sas(
            TASK, SASConfig("single"), Script(lambda r: "answer: yes"), Ledger(FREE))

    assert asyncio.run(inside())


def test_inputs_are_not_changed_and_batches_change_nothing():
    config = MASConfig(4, "mesh", rounds=3, aggregator="judge", roles=("solver", "critic"))
    reply = lambda r: f"a {r.agent} {r.round}\nanswer: {len(user(r)) % 3}"  # noqa: E731
    before = repr(TASK), repr(config)
    runs = [team(config, reply, Budget(tokens=9000), batch_size=size)[0] for size in (1, 2, 64)]
    assert runs[0] == runs[1] == runs[2] and (repr(TASK), repr(config)) == before


# worlds: the closed form is met

@pytest.fixture
def unchecked():
    """Many runs: without the run-time type checks, which cost ten times the runs themselves."""
    type_checks.update("jaxtyping_disable", True)
    yield
    type_checks.update("jaxtyping_disable", False)


def mean(run, tasks, budget):
    """Mean score, with every book balanced."""
    async def one(task):
        ledger = Ledger(budget)
        done = await run(task, ledger)
        assert ledger.reserved == Usage() and ledger.spent == done.usage
        return done.score

    async def all_of_them():
        return [await one(task) for task in tasks]

    return float(np.mean(asyncio.run(all_of_them())))


def close(measured, exact, n):
    """Within four standard errors."""
    return abs(measured - exact) < 4 * math.sqrt(max(exact * (1 - exact), 1e-4) / n)


@pytest.mark.parametrize("n", [2, 5])
def test_condorcet_votes_agree_with_the_closed_form(n, unchecked):
    world, budget, size = CondorcetWorld(0.65, 0.1, 0.5, overhead_tokens=200), Budget(tokens=200 * n), 150
    backend = WorldBackend(world, 3)
    tasks = backend.tasks(size)
    mas = mean(lambda t, ledger: arun_mas(t, MASConfig(8), backend, ledger), tasks, Budget(tokens=200 * (n + 1)))
    sas = mean(lambda t, ledger: arun_sas(t, SASConfig(), backend, ledger), tasks, budget)
    assert close(mas, world.phi_mas(n), size) and close(sas, world.phi_sas(n), size)


@pytest.mark.parametrize(("message", "flip", "team_"), [
    ("counts", 0.0, MASConfig(8, aggregator="judge", message="rationale")),
    ("counts", 0.0, MASConfig(8, "star", rounds=2, message="structured", schedule="synchronous", aggregator="judge")),
    ("votes", 0.05, MASConfig(8, aggregator="judge")), ("votes", 0.0, MASConfig(8))])
def test_hidden_profiles_agree_with_the_closed_form(message, flip, team_, unchecked):
    world, size = HiddenProfileWorld(16, 0.6, 2, message, flip), 120
    backend = WorldBackend(world, 1)
    tasks = backend.tasks(size)
    run = mean(lambda t, ledger: arun_mas(t, team_, backend, ledger), tasks, Budget(tokens=20_000))
    assert close(run, world.phi_mas(8), size)


def test_one_reader_agrees_with_the_closed_form_whole_and_in_pieces(unchecked):
    world, size = HiddenProfileWorld(16, 0.6, 2), 150
    backend = WorldBackend(world, 2)
    tasks = backend.tasks(size)
    for config, exact in ((SASConfig("single"), world.phi_sas()), (SASConfig("chunked", n=8), world.phi_sas(8))):
        assert close(mean(lambda t, ledger, c=config: arun_sas(t, c, backend, ledger), tasks, FREE), exact, size)


def test_a_relay_pays_for_its_messages_as_the_closed_form_says(unchecked):
    world, size, budget = RelayWorld(8, 0.5, 150, 60, 0.05), 200, Budget(tokens=4000)
    backend = WorldBackend(world, 1)
    tasks = backend.tasks(size)
    chain = MASConfig(4, "chain", schedule="sequential", aggregator="last", message="structured", max_tokens=910)
    assert close(mean(lambda t, ledger: arun_mas(t, chain, backend, ledger), tasks, budget), world.phi_mas(4000, 4), size)
    alone = mean(lambda t, ledger: arun_sas(t, SASConfig("long"), backend, ledger), tasks, budget)
    assert close(alone, world.phi_sas(4000), size)
    ledger = Ledger(budget)
    assert run_mas(tasks[0], chain, backend, ledger).usage == Usage(360, 3640, 4)


def test_a_board_searches_without_repeating(unchecked):
    world, size = SearchWorld(8), 150
    backend = WorldBackend(world, 1)
    tasks = backend.tasks(size)
    board = MASConfig(4, message="blackboard", schedule="sequential")
    assert close(mean(lambda t, ledger: arun_mas(t, board, backend, ledger), tasks, FREE), world.phi_mas(4), size)
    assert close(mean(lambda t, ledger: arun_sas(t, SASConfig(n=4), backend, ledger), tasks, FREE), world.phi_sas(4), size)


def test_a_debate_is_a_martingale(unchecked):
    world, size = DebateWorld(0.6, 2, 4, nx.complete_graph(4)), 150
    backend = WorldBackend(world, 1)
    runs = [run_mas(t, MASConfig(4, "mesh", rounds=3), backend, Ledger(FREE)) for t in backend.tasks(size)]
    right = np.array([[[a == t.target for a in row] for row in run.answers]
                      for run, t in zip(runs, backend.tasks(size), strict=True)], float)
    for t in range(3):
        agents = right[:, t].mean(1)
        assert abs(agents.mean() - 0.6) < 4 * agents.std() / math.sqrt(size)
    exact, pairs = world.correlation(2), right - 0.6
    seen = (pairs[:, 2, 0] * pairs[:, 2, 1]).mean() / 0.24
    assert abs(seen - exact[2][0, 1]) < 4 / math.sqrt(size)


# information

@given(st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=8).filter(any))
@quickly
def test_entropy_is_scipys(answers):
    given_ = [a for a in answers if a]
    counts = list(Counter(given_).values())
    assert answer_entropy(answers) == pytest.approx(entropy(counts), abs=1e-12)
    most = math.log(min(len(given_), 3))
    assert answer_entropy(answers, normalize=True, n_options=3) == pytest.approx(entropy(counts) / most if most else 0, abs=1e-12)
    assert 0 <= answer_entropy(answers, normalize=True) <= 1 + 1e-12


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 99))
@quickly
def test_distances_are_scipys(n, k, seed):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(k), n), rng.dirichlet(np.ones(k), n)
    before = p.copy()
    assert evolution_distance(p, q, "js") == pytest.approx(np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)]))
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(p, q, strict=True)]
    assert evolution_distance(p, q, "cosine") == pytest.approx(1 - np.mean(cosines))
    assert evolution_distance(p, p, "js") == evolution_distance(list("ab"), list("ab")) == 0 and (p == before).all()
    assert evolution_distance(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), "js") == pytest.approx(math.log(2))
    assert evolution_distance(["a", "b", "c", "d"], ["a", "c", "b", "d"]) == 0.5


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: answer_entropy(["", ""]), ValueError, r"at least one answer, got \['', ''\]"),
    (lambda: answer_entropy(["a", "b"], n_options=1), ValueError, "n_options must be >= 2, the distinct answers, got 1"),
    (lambda: evolution_distance(["a"], ["a", "b"]), ValueError, "one shape, an entry an agent, got 1 and 2"),
    (lambda: evolution_distance([], []), ValueError, "got 0 and 0"),
    (lambda: evolution_distance(["a"], ["a"], "hamming"), KeyError, "no metric 'hamming': flip, cosine, js"),
    (lambda: evolution_distance(np.zeros((2, 2)), np.ones((2, 2)), "cosine"), ValueError, "must not be zero, row 0 is"),
    (lambda: evolution_distance(np.ones((1, 2)), np.ones((1, 2)), "js"), ValueError, r"sum to 1, got \[1. 1.\]"),
    (lambda: evolution_distance(np.ones(2), np.ones(2), "js"), ValueError, r"one shape, an entry an agent, got \(2,\)"),
    (lambda: plot_gamma_heatmap(np.ones((1, 2)), ["a"], ["b"]), ValueError, "must hold 1 x 1 values > 0"),
    (lambda: plot_gamma_heatmap(np.zeros((1, 1)), ["a"], ["b"]), ValueError, r"values > 0, got \[\[0.0\]\]"),
    (lambda: plot_pareto([1], [1, 2], ["a"]), ValueError, "one length, got 1, 2, 1"),
    (lambda: plot_information([1.0], []), ValueError, "one length, got 1 and 0"),
])
def test_bad_measurements_are_refused_with_the_value(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_information_describes_each_round():
    rows = [["a", "b", "", "A"], ["a", "a", "b", ""], ["", "", "", ""]]

    def reply(r):
        return f"w{r.agent} same\nanswer: {rows[r.round][r.agent]}"

    frame = team(MASConfig(4, "ring", rounds=3), reply)[0].information()
    assert list(frame.columns) == ["round", "H", "D", "redundancy", "density"]
    # standing answers: a b - a, then a a b a, then the same
    expected = [entropy([2, 1]), entropy([3, 1]), entropy([3, 1])]
    assert np.allclose(frame.H, expected) and math.isnan(frame.D[0]) and list(frame.D[1:]) == [0.5, 0]
    assert list(frame.density) == [0, 0.75, 0.75]  # a reply without an answer sends no message
    words = [set(f"w{i} same answer: {rows[0][i].lower()}".split()) for i in range(4)]
    cosine = np.mean([len(a & b) / math.sqrt(len(a) * len(b)) for a, b in itertools.combinations(words, 2)])
    assert frame.redundancy[0] == pytest.approx(cosine)
    alone = team(MASConfig(1), lambda r: "")[0].information()
    assert alone[["H", "D", "redundancy", "density"]].isna().all(axis=None)


def test_plots_show_what_they_are_given():
    ax = plot_gamma_heatmap(np.array([[1.0, 2.0], [0.5, np.nan]]), ["a", "b"], ["x", "y"])
    assert [t.get_text() for t in ax.texts] == ["1.00", "2.00", "0.50"]
    ax = plot_pareto([1, 2, 3, 4], [0.5, 0.4, 0.7, 0.6], ["a", "b", "a", "c"], "calls")
    frontier = ax.lines[-1]
    assert list(frontier.get_xdata()) == [1, 3] and list(frontier.get_ydata()) == [0.5, 0.7] and "calls" in ax.get_xlabel()
    ax = plot_information([1.0, 0.5], [math.nan, 0.2])
    assert [a.get_ylim()[0] for a in ax.figure.axes] == [0, 0]
    assert all(a.get_ylim()[1] > 1.04 * top for a, top in zip(ax.figure.axes, (1.0, 0.2), strict=True))  # no marker is cut
    assert list(ax.lines[0].get_ydata()) == [1.0, 0.5] and plot_information([1.0], [0.0], ax) is ax
    matplotlib.pyplot.close("all")


# the bridge to Inspect AI

@pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning")
def test_inspect_scores_a_team_as_we_do(tmp_path, monkeypatch):
    pytest.importorskip("inspect_ai", reason="the extra [inspect] is not installed")
    from collai.eval.inspect import chat_as_model
    from collai.eval.llm import Reply, TokenUsage

    class Chat:
        name = "counting"

        def text(self, messages):
            return f"answer: {'yes' if sum(len(m['content']) for m in messages) % 2 else 'no'}"

        async def agenerate(self, requests):
            return [Reply(self.text(r.messages), "stop", TokenUsage(5, 2)) for r in requests]

    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    from inspect_ai import eval as evaluate

    tasks = [Task(f"q{k}", "?" * (k + 1), "yes") for k in range(2)]
    for config in (MASConfig(2, "mesh", rounds=2, roles=("solver", "critic")), SASConfig("reflect", n=3)):
        log = evaluate(to_inspect(tasks, config, Budget(tokens=9000)), model=chat_as_model(Chat()), display="none",
                       log_dir=str(tmp_path), score_display=False)[0]
        assert log.status == "success", log.error
        run = run_mas if isinstance(config, MASConfig) else run_sas
        ours = {t.id: run(t, config, Script(lambda r: Chat().text(r.messages)), Ledger(FREE)).score for t in tasks}
        assert {s.id: s.scores["score"].value for s in log.samples} == ours
    with pytest.raises(ValueError, match=r"tasks need ids of their own, got \['a', 'a'\]"):
        to_inspect([Task("a", "?", "x")] * 2, config)
