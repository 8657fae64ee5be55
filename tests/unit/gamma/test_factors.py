"""Properties of `collai.gamma.factors`: every entry has a source and works; unknown names and levels are told with the known."""

import asyncio
import math
import re
from dataclasses import fields, replace

import pytest

from collai.gamma.backends import WorldBackend
from collai.gamma.engines import MASConfig, SASConfig, Trajectory, arun_mas, arun_sas
from collai.gamma.factors import Factor, FactorLibrary, default_library
from collai.gamma.ledger import Budget, Ledger, Usage
from collai.gamma.worlds import CondorcetWorld, HiddenProfileWorld, RelayWorld, SearchWorld

LIBRARY = default_library()
WORLDS = {"decomposability": HiddenProfileWorld(64, 0.6, 8), "dependency_depth": RelayWorld(8, 0.5, 150, 60, 0.03),
          "evidence_dispersion": HiddenProfileWorld(64, 0.6, 8)}
KNOBS = [f for f in LIBRARY if f.kind == "config"]
by_name = pytest.mark.parametrize("factor", KNOBS, ids=lambda f: f.name)


def run(score=1.0, tokens=10, answers=(("a", "a"),), texts=None, messages=()):
    """A trajectory as it would have been measured."""
    rows = [list(row) for row in answers]
    said = [list(row) for row in texts] if texts else [[f"answer: {a}" if a else "" for a in row] for row in rows]
    return Trajectory("a", score, rows, list(messages), Usage(tokens, 0, 1), "done", said)


def test_the_library_holds_what_the_field_turns_and_watches():
    names = {level: [f.name for f in LIBRARY if f.level == level] for level in ("task", "control", "information")}
    assert names["task"] == ["decomposability", "dependency_depth", "tool_density", "answer_type", "difficulty",
                             "evidence_dispersion"]
    assert names["control"] == [
        "topology", "communication", "schedule", "rounds", "scale", "diversity.model", "diversity.memory", "diversity.tools",
        "diversity.role", "aggregation", "budget_split", "termination"]
    assert names["information"] == [
        "message_length", "message_noise", "visibility", "order", "temperature", "memory_window", "trust", "duplicate_filter",
        "content_entropy", "evolution_distance", "redundancy", "message_density", "overhead", "efficiency",
        "error_amplification", "consensus_time"]
    assert len(LIBRARY) == 34 == len({f.name for f in LIBRARY}) == len({f.symbol for f in LIBRARY})


def test_every_entry_has_a_source_a_hypothesis_and_works():
    for f in LIBRARY:
        assert f.refs and all(re.search(r"arXiv:\d{4}\.\d{5}|(19|20)\d\d", ref) for ref in f.refs), f.name
        assert f.hypothesis and f.observable and (f.apply is None) != (f.measure is None)
        assert (f.kind == "measured") == (f.measure is not None) == (not f.levels)


def test_the_defaults_are_the_reference_point():
    assert LIBRARY.configure({}) == MASConfig() == LIBRARY.configure({f.name: f.default for f in KNOBS})


@by_name
def test_every_level_makes_another_team_and_changes_nothing_given(factor):
    before = MASConfig()
    made = [LIBRARY.configure({factor.name: level}, before) for level in factor.levels]
    assert before == MASConfig() and len(set(made)) == len(made) and made[factor.levels.index(factor.default)] == before
    changed = {f.name for config in made for f in fields(MASConfig) if getattr(config, f.name) != getattr(before, f.name)}
    assert 1 <= len(changed) <= 2


def test_every_field_of_a_team_can_be_reached_but_those_of_one_call():
    reached = {f.name for _, _, config in LIBRARY.moves() for f in fields(MASConfig)
               if getattr(config, f.name) != getattr(MASConfig(), f.name)}
    assert {f.name for f in fields(MASConfig)} - reached == {"topology_args", "max_tokens", "min_tokens", "seed"}


def test_moves_differ_from_their_point_in_one_factor():
    moves = LIBRARY.moves()
    assert len(moves) == sum(len(f.levels) - 1 for f in KNOBS)
    assert all(config == LIBRARY.configure({name: level}) != MASConfig() for name, level, config in moves)
    star = MASConfig(topology="star")
    assert ("topology", "none", MASConfig()) in LIBRARY.moves(star)
    assert all(config != star for _, _, config in LIBRARY.moves(star))


def test_every_move_runs_and_spends_what_it_says():
    backend = WorldBackend(HiddenProfileWorld(12, 0.7, 4))
    task = backend.tasks(1)[0]

    async def go():
        for name, level, config in LIBRARY.moves():
            if name == "scale" and level not in (1, 2, 64):
                continue
            ledger, models = Ledger(Budget(tokens=30_000)), {"default": backend, "other": backend}
            done = await arun_mas(task, config, models, ledger)
            assert done.usage == ledger.spent and ledger.reserved == Usage() and done.score in (0, 1), (name, level)

    asyncio.run(go())


@pytest.mark.parametrize(("levels", "expected"), [
    ({"topology": "star", "scale": 5, "rounds": 2}, {"topology": "star", "n_agents": 5, "rounds": 2}),
    ({"communication": "summary(32)"}, {"message": "summary", "message_tokens": 32}),
    ({"diversity.memory": "window(5)"}, {"memory": "window(5)"}),
    ({"memory_window": 3}, {"memory": "window(3)"}),
    ({"diversity.model": ("a", "b", "c")}, {"models": ("a", "b", "c")}),
    ({"diversity.role": ("reader", "judge")}, {"roles": ("reader", "judge")}),
    ({"message_noise": 0.25, "temperature": 0.3}, {"message_noise": 0.25, "temperature": 0.3}),
    ({"trust": (0.9, 0.6, 0.55)}, {"trust": (0.9, 0.6, 0.55), "aggregator": "weighted"}),
])
def test_configure_sets_the_fields(levels, expected):
    assert LIBRARY.configure(levels) == MASConfig(**expected)


def test_configure_starts_where_it_is_told():
    base = MASConfig(topology="random", topology_args=(("p", 0.2),), seed=7)
    assert LIBRARY.configure({"rounds": 2}, base) == replace(base, rounds=2)
    assert LIBRARY.configure({"topology": "star"}, base) == replace(base, topology="star", topology_args=())
    assert LIBRARY.configure({"topology": "random"}, base) == base


@pytest.mark.parametrize(("levels", "words"), [
    ({"colour": "red"}, "no factor 'colour' of a team: topology, communication, schedule"),
    ({"difficulty": 0.4}, "no factor 'difficulty' of a team: topology"),
    ({"topology": "web"}, "factor 'topology' has no level 'web': none, chain, ring, star"),
    ({"rounds": 9}, "factor 'rounds' has no level 9: 1, 2, 3"),
    ({"communication": "summary(0)"}, r"no level 'summary\(0\)'"),
    ({"message_noise": 1.5}, "factor 'message_noise' has no level 1.5: 0.0, 0.1, 0.3"),
    ({"message_length": 0}, "factor 'message_length' has no level 0"),
    ({"trust": (1.0,)}, r"factor 'trust' has no level \(1.0,\)"),
    ({"diversity.model": "other"}, "factor 'diversity.model' has no level 'other': same, mixed"),
])
def test_unknown_factors_and_levels_are_told_with_the_known(levels, words):
    with pytest.raises(KeyError, match=words):
        LIBRARY.configure(levels)


def test_an_unknown_entry_is_told_with_the_known():
    with pytest.raises(KeyError, match="no factor 'colour': decomposability, dependency_depth"):
        LIBRARY["colour"]


@pytest.mark.parametrize("factor", [f for f in LIBRARY if f.kind == "world"], ids=lambda f: f.name)
def test_world_factors_change_a_world(factor):
    world = WORLDS[factor.name]
    before, made = repr(world), [factor.apply(world, level) for level in factor.levels]
    assert repr(world) == before and len(set(made)) == len(made) and made[factor.levels.index(factor.default)] == world


def test_more_dispersed_evidence_makes_readers_worth_more():
    gains = [LIBRARY["evidence_dispersion"].apply(WORLDS["evidence_dispersion"], d).gamma(8) for d in (1, 2, 4, 8)]
    assert gains == sorted(gains) and gains[0] == pytest.approx(1)
    taxes = [LIBRARY["dependency_depth"].apply(WORLDS["dependency_depth"], d).gamma(4000, 4) for d in (2, 8, 16)]
    assert taxes == sorted(taxes, reverse=True)


def test_ratios_of_the_library_are_the_formulas():
    mas = [run(1.0, 30), run(0.5, 50)]
    sas = [run(1.0, 10), run(0.2, 10)]
    value = {name: LIBRARY[name].measure(mas, sas) for name in ("overhead", "efficiency", "error_amplification", "difficulty")}
    assert value == pytest.approx({"overhead": 3.0, "efficiency": 0.75 / 4, "error_amplification": 0.25 / 0.4,
                                   "difficulty": 0.6})
    with pytest.raises(ValueError, match="error of the single agent is zero: the ratio is undefined"):
        LIBRARY["error_amplification"].measure(mas, [run(1.0)])
    with pytest.raises(ValueError, match="token use of the single agent is zero"):
        LIBRARY["overhead"].measure(mas, [run(tokens=0)])


def test_what_is_watched_by_round_is_the_mean_over_runs_that_got_there():
    first = run(answers=(("a", "b"), ("a", "a")), messages=[{"round": 1, "sender": 0, "receiver": 1, "text": "x"}])
    second = run(answers=(("a", "a"),))
    entropy = LIBRARY["content_entropy"].measure([first, second], [])
    assert entropy == pytest.approx([math.log(2) / 2, 0.0])
    distance = LIBRARY["evolution_distance"].measure([first, second], [])
    assert math.isnan(distance[0]) and distance[1] == 0.5
    assert LIBRARY["message_density"].measure([first, second], []) == [0.0, 0.5]
    assert LIBRARY["redundancy"].measure([second], []) == pytest.approx([1.0])


def test_consensus_time_counts_rounds_of_standing_answers():
    runs = [run(answers=(("a", "b"), ("", "A"))), run(answers=(("a", "a"),)), run(answers=(("a", "b"),))]
    assert LIBRARY["consensus_time"].measure(runs, []) == 2
    assert LIBRARY["consensus_time"].measure(runs[2:], []) == math.inf
    assert LIBRARY["consensus_time"].measure([run(answers=(("", ""), ("a", ""), ("", "A"), ("", "")))], []) == 3
    assert LIBRARY["consensus_time"].measure([run(answers=(("", ""),))], []) == math.inf


def test_tool_density_counts_calls_a_reply():
    texts = (("calculate: 1 + 1\nlookup: x\nanswer: 2", "I calculate: no", ""),)
    assert LIBRARY["tool_density"].measure([run(answers=(("2", "no", ""),), texts=texts)], []) == 1.0


def test_answer_type_tells_votes_from_searches():
    async def samples(world):
        backend = WorldBackend(world)
        return [await arun_sas(t, SASConfig(n=8), backend, Ledger(Budget())) for t in backend.tasks(20)]

    kinds = [LIBRARY["answer_type"].measure([], asyncio.run(samples(w))) for w in (CondorcetWorld(0.6), SearchWorld(50))]
    assert kinds == ["cohesive", "coverage"]
    with pytest.raises(ValueError, match="needs a baseline with several samples a task"):
        LIBRARY["answer_type"].measure([], [run(answers=(("a",),))])


def test_the_table_lists_every_entry():
    frame, text = LIBRARY.to_frame(), LIBRARY.markdown()
    assert list(frame.name) == [f.name for f in LIBRARY] and list(frame.columns)[-1] == "refs" and len(frame) == 34
    lines = text.splitlines()
    assert len(lines) == 36 and all(line.count("|") == 8 for line in lines)
    assert "1 to 64; default **3**" in text and "| rounds | T | control | 1 to 8; default **1** |" in text
    assert all(ref in text for f in LIBRARY for ref in f.refs)


def test_a_library_is_open_and_refuses_entries_that_do_not_work():
    good = Factor("mine", "control", "config", (1, 2), 1, lambda c, v: replace(c, seed=v), "x", ("me 2026",), "h", "Γ")
    assert FactorLibrary([good]).configure({"mine": 2}) == MASConfig(seed=2)
    for change, words in (({"level": "cosmic"}, "level of 'mine' must be one of task, control, information, got 'cosmic'"),
                          ({"kind": "idea"}, "kind of 'mine' must be one of config, world, measured, got 'idea'"),
                          ({"refs": ()}, "'mine' needs at least one reference"),
                          ({"apply": None}, "'mine' of kind 'config' needs apply and nothing else"),
                          ({"kind": "measured"}, "'mine' of kind 'measured' needs measure and nothing else"),
                          ({"default": 3}, r"'mine' needs two levels, its default among them, got \(1, 2\) and 3")):
        with pytest.raises(ValueError, match=words):
            replace(good, **change)
    with pytest.raises(ValueError, match="factors need names of their own, 'mine' stands twice"):
        FactorLibrary([good, good])

