"""Plans: the expression language against plain Python and attacks, dependencies against networkx, JSON, and what is refused."""
import json
import math
import os
from dataclasses import FrozenInstanceError, replace
from datetime import date
from itertools import pairwise, permutations

import networkx as nx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collai.futuremind.plan import Condition, Plan, Step, evaluate, expression_names, plan_schema

S1 = Step("S1", "director of the film Lume", (), "x1", "person", "", "first")
S2 = Step("S2", "place of birth of {x1}", ["x1"], ("x2",), "city", "", "first")
GOOD = Plan("where was the director born", ["film Lume"], "x2", "city", "director", "director, then birth",
            [Condition("K1", "x1 directed Lume", "director", (), "x1"), Condition("K2", "x1 was born in x2", "born_in", "x1", "x2")],
            "A", [S1, S2])
DATES = {"x": "4 March 1957", "y": ("1957-03-04",), "z": ["March 5, 1957"], "many": ("a", "B b"), "n": "1,204.5 km", "m": "-3"}


@pytest.mark.parametrize(("text", "value"), [
    ("year(x)", 1957), ("month(y)", 3), ("day(z)", 5), ("x == y", True), ("x != z", True), ("x < z", True), ("z >= y", True),
    ("1950 < x < 1960", True), ("x > 1957", False), ("n > 1204", True), ("m < 0", True), ("-m", 3), ("n - 0.5", 1204.0),
    ("abs(m - 1)", 4), ("count(many)", 2), ("'A' in many", True), ("'b  B' in many", True), ("'c' in many", False), ("many in many", True), ("x <= y", True), ("x < y", False), ("x not in many", True),
    ("many", ("a", "B b")), ("argmin(x, 'X', z, 'Z')", "X"), ("argmax(x, 'X', z, 'Z', 1999, 'W')", "W"), ("argmax(1, 'a', 1, 'b')", "a"),
    ("'yes' if x == y else 'no'", "yes"), ("not (x == y) or count(many) == 2", True), ("x in ('4 march 1957', 'q')", True),
    ("year('in 1903, maybe')", 1903), ("'it''s'", "its"), ("'α' == 'Α'", True)])
def test_values_of_expressions(text, value):
    found = evaluate(text, DATES)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("text", "message"), [
    ("x.upper()", "no function 'x.upper'|Attribute"), ("__import__('os')", "no function '__import__'"), ("eval('1')", "no function 'eval'"),
    ("x[0]", "Subscript"), ("[1]", "List is not"), ("{1}", "Set is not"), ("lambda: 1", "Lambda is not"), ("9 ** 9", "Pow is not"),
    ("'a' * 3", "Mult is not"), ("~1", "Invert is not"), ("x is y", "Is is not"), ("f'{x}'", "JoinedStr is not"), ("None", "constant 'None'"),
    ("1j", "constant '1j'"), ("b'a'", "constant"), ("...", "constant 'Ellipsis'"), ("year(x, y)", "year takes one argument, got 2"),
    ("year(v=x)", "no function 'year'"), ("year(*x)", "Starred"), ("(x, y)", "a tuple may hold constants only"), ("x = 1", "invalid syntax"),
    ("x\n; y", "invalid syntax"), ("'" + "a" * 300 + "'", "constant 'aaaa"), ("1" * 300, "constant '1111"), ("x " * 300, "longer than 500"),
    ("-" * 400 + "1", "more than 200 nodes"), ("(" * 240 + "1" + ")" * 240, "expression"), ("\0", "null bytes"), ("  ", "expression '  '"),
    ("unknown == 1", "variable 'unknown' is not bound"), ("year(many)", r"one value is needed, there are 2: \['a', 'B b'\]"),
    ("many < 3", "one value is needed"), ("'a' < 1", "neither a date nor a number: 'a'"), ("abs(x)", "a date is no number: 1957-03-04"),
    ("day('1957')", "no date in '1957'"), ("year('no')", "no year in 'no'"), ("argmax(1, 'a', 2)", "got 3 arguments"), ("argmin(1, 'a')", "got 2")])
def test_what_is_not_of_the_language_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate(text, DATES)


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(
    ["x", "many", "(", ")", ",", " in ", "<", "==", "'a'", "1", "-", "not ", " and ", "year(", "argmin(", ".", "[", " if ", " else ", "+"]),
    max_size=10).map("".join)))
@example("year(9999999999999999999999)")
@example("1.0e999 + 1")
@example("-many")
def test_any_text_has_a_value_or_is_refused(text):
    try:
        assert isinstance(evaluate(text, DATES), str | int | float | bool | date | tuple)
    except ValueError as error:
        assert str(error)


def test_an_attack_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("open('f', 'w')", "__import__('os').mkdir('f')", "().__class__.__base__.__subclasses__()", "exec('open(\"f\", \"w\")')"):
        with pytest.raises(ValueError, match="expression"):
            evaluate(text, {"x": "1"})
    assert os.listdir(tmp_path) == []


@given(st.dates(date(1000, 1, 1), date(2999, 12, 31)), st.dates(date(1000, 1, 1), date(2999, 12, 31)))
def test_written_forms_of_dates_agree_with_the_calendar(a, b):
    month = a.strftime("%B")
    for text in (a.isoformat(), f"{a.day} {month} {a.year:04d}", f"{month} {a.day}, {a.year:04d}", f"on {a.day} {month.lower()} {a.year:04d}."):
        bound = {"a": text, "b": b.isoformat()}
        assert evaluate("a < b", bound) == (a < b) and (text.startswith("on") or evaluate("a == b", bound) == (a == b))
        assert [evaluate(f"{part}(a)", bound) for part in ("year", "month", "day")] == [a.year, a.month, a.day]
        assert evaluate("abs(year(a) - year(b))", bound) == abs(a.year - b.year)


def test_a_date_that_does_not_exist_is_none():
    with pytest.raises(ValueError, match="no date in '1957-02-30'"):
        evaluate("day(x)", {"x": "1957-02-30"})


def test_names_of_an_expression():
    assert expression_names("argmin(d1, x1, d2, 'd3') == count(x) ") == {"d1", "x1", "d2", "x"}
    assert expression_names("1 + 2") == frozenset()


def test_the_good_plan_is_settled_valid_and_frozen():
    assert GOOD.validate() is None
    assert GOOD.steps == (S1, S2) and S2.needs == ("x1",) and S1.binds == ("x1",) and GOOD.dimensions == ("director",)
    assert GOOD.complexity() == {"steps": 2, "depth": 2, "live": 1, "tokens": max(S1.tokens(), S2.tokens()), "fan_out": 1}
    assert S1.tokens() == len(S1.instruction().replace(":", " :").replace(";", " ;").split())
    assert Step("S", "q", "", "a, {b}").binds == ("a", "b")
    with pytest.raises(FrozenInstanceError):
        GOOD.paradigm = "B"
    assert hash(S1) == hash(replace(S1))


@pytest.mark.parametrize(("change", "message"), [
    ({"paradigm": "D"}, "unknown paradigm 'D'"), ({"paradigm": ""}, "unknown paradigm ''"), ({"steps": ()}, "a plan needs at least one step"),
    ({"steps": [S1, replace(S2, query="")]}, "step S2 has no query"), ({"steps": [S1, replace(S2, query="  ")]}, "step S2 has no query"),
    ({"steps": [S1, replace(S2, needs=["x7"])]}, "step S2 needs 'x7', which no step binds"),
    ({"steps": [S1, replace(S2, query="of {x8}")]}, "step S2 needs 'x8'"), ({"steps": [S1, replace(S2, filter="x > x9")]}, "step S2 needs 'x9'"),
    ({"steps": [S1, replace(S2, filter="x..")]}, "step S2: filter expression"), ({"steps": [S1, replace(S2, stop="limit:x")]}, "step S2: stop"),
    ({"steps": [S1, replace(S2, stop="limit:0")]}, "step S2: stop must be limit:N with N >= 1, got 'limit:0'"),
    ({"steps": [S1, S1]}, "step id 'S1' is used twice"), ({"steps": [replace(S1, id="")]}, "step id '' is empty"),
    ({"steps": [replace(S1, binds=["1x"])]}, "step S1 binds '1x', which is no identifier"),
    ({"steps": [replace(S1, needs="x2"), S2]}, "steps form a cycle: S1→S2→S1"), ({"steps": [replace(S1, needs="S1")]}, "steps form a cycle: S1→S1"),
    ({"conditions": [Condition("K1", ""), Condition("K2", "", "", "x3", "x2"), Condition("K3", "", "", "x2", "x3")]},
     "conditions form a cycle: K2→K3→K2"),
    ({"conditions": [Condition("K2", "", "", ["K3"]), Condition("K3", "", "", ["K2"])]}, "conditions form a cycle: K2→K3→K2"),
    ({"conditions": [Condition(f"K{i}", "", "", f"v{(i - 1) % 3}", f"v{i}") for i in range(3)]}, "conditions form a cycle: K0→K1→K2→K0"),
    ({"conditions": [Condition("K1", ""), Condition("K1", "")]}, "condition id 'K1' is used twice")])
def test_faults_by_message(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change).validate()


def test_a_restriction_comes_after_the_source_and_before_others():
    steps = [Step("S3", "born of {x}", "x", "y"), Step("S2", "is {x} a poet", "x", "x"), Step("S1", "members", (), "x")]
    plan = replace(GOOD, steps=steps, target="y")
    plan.validate()
    assert set(plan.dag("steps").edges) == {("S1", "S2"), ("S1", "S3"), ("S2", "S3")} and plan.complexity()["depth"] == 3
    with pytest.raises(ValueError, match="of must be 'conditions' or 'steps', got 'x'"):
        plan.dag("x")


@settings(max_examples=60)
@given(st.integers(1, 6), st.randoms(use_true_random=False))
def test_dependencies_agree_with_networkx(n, random):
    edges = [(i, j) for i in range(n) for j in range(n) if random.random() < 0.2]
    plan = replace(GOOD, target="words", steps=[
        Step(f"S{j}", "q " + " ".join(f"{{v{i}}}" for i, k in edges if k == j), (), f"v{j}") for j in range(n)])
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(n))
    assert set(plan.dag("steps").edges) == {(f"S{i}", f"S{j}") for i, j in edges}
    if not nx.is_directed_acyclic_graph(graph):
        with pytest.raises(ValueError, match="steps form a cycle: ") as caught:
            plan.validate()
        loop = str(caught.value).partition(": ")[2].split("→")
        assert loop[0] == loop[-1] and len(set(loop)) == len(loop) - 1
        assert all((int(a[1:]), int(b[1:])) in edges for a, b in pairwise(loop))
        return
    plan.validate()
    size = plan.complexity()
    assert size["depth"] == nx.dag_longest_path_length(graph) + 1
    assert size["fan_out"] == max(d for _, d in graph.out_degree()) and size["steps"] == n and 1 <= size["live"] <= n


def test_live_of_a_star_and_of_a_chain():
    star = [Step(f"S{i}", "q", (), f"v{i}") for i in range(5)]
    assert replace(GOOD, steps=[*star, Step("E", "q {v0} {v1} {v2} {v3} {v4}", (), "e")], target="e").complexity()["live"] == 5
    chain = [star[0], *(Step(f"S{i}", f"q {{v{i - 1}}}", (), f"v{i}") for i in range(1, 5))]
    assert replace(GOOD, steps=chain, target="v4").complexity()["live"] == 1
    assert replace(GOOD, steps=chain, target="v4 == v0").complexity()["live"] == 2


words = st.text(max_size=8)
rows = st.lists(st.tuples(words, words, words, st.lists(st.sampled_from(["x1", "x2"]), max_size=2)), max_size=2)


@settings(max_examples=40)
@given(st.lists(words, max_size=2), words, rows, rows)
def test_json_gives_the_plan_back(attributes, target, steps, conditions):
    plan = Plan("o", [a for a in attributes if a], target, "t", (), "m", [Condition(a, b, c, v, v, bool(v)) for a, b, c, v in conditions],
                target, [Step(a, b, v, v, c, b, a) for a, b, c, v in steps])
    assert Plan.from_json(plan.to_json()) == plan == Plan.from_json(json.loads(plan.to_json()))


@pytest.mark.parametrize(("text", "message"), [
    ("nonsense", "a plan must be JSON"), ("[1]", "a plan must be a JSON object, got list"), ("{}", "plan lacks objective, attributes"),
    (GOOD.to_json().replace('"mechanism"', '"mecanism"'), "plan has the unknown key 'mecanism'"),
    (GOOD.to_json().replace('"target": "x2"', '"target": [1]'), r"plan: target must be a text, got list \[1\]"),
    (GOOD.to_json().replace('"query"', '"quiry"', 1), r"steps\[0\] has the unknown key 'quiry'"),
    (GOOD.to_json().replace('"attributes": ["film Lume"]', '"attributes": [3]'), "plan: attributes must hold texts only"),
    (json.dumps(json.loads(GOOD.to_json()) | {"steps": "S1"}), "plan: steps must be a list, got str"),
    (json.dumps(json.loads(GOOD.to_json()) | {"steps": [1]}), r"steps\[0\] must be an object, got int"),
    (json.dumps(json.loads(GOOD.to_json()) | {"conditions": [{"id": "K1"}]}), r"conditions\[0\] lacks text")])
def test_bad_json_by_message(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_null_and_short_forms_in_json_are_settled():
    data = json.loads(GOOD.to_json())
    data["steps"][1] |= {"needs": "x1", "binds": "x2", "filter": None}
    data["steps"][0] |= {"needs": None}
    assert Plan.from_json(data | {"dimensions": {"person": "director"}}) == replace(GOOD, dimensions=["person: director"])
    assert Plan.from_json(data | {"attributes": "film Lume"}) == GOOD


def test_the_schema_describes_what_is_written():
    schema, data = plan_schema(), json.loads(GOOD.to_json())
    assert schema["required"] == list(data) and schema["additionalProperties"] is False
    for name in ("conditions", "steps"):
        assert schema["properties"][name]["items"]["required"] == list(data[name][0])
    schema["properties"].clear()
    assert plan_schema()["properties"]["paradigm"]["enum"] == ["A", "B", "C", "mixed"]
    assert math.isclose(len(plan_schema()["properties"]), 9)


def test_long_numbers_are_read_whole():
    long = {"x": "12345678901234567890", "y": "12345678901234567891", "huge": "9" * 6000}
    assert evaluate("x < y", long) is True and evaluate("y - x", long) == 1
    assert evaluate("huge > x", long) is True
    with pytest.raises(ValueError, match="no finite number: inf"):
        evaluate("huge - 0.5 > 1", long)


def test_json_nested_without_end_is_refused_and_a_flag_must_be_a_flag():
    with pytest.raises(ValueError, match="a plan must be JSON"):
        Plan.from_json("[" * 200_000)
    for flag in ("false", 0, []):
        data = json.loads(GOOD.to_json())
        data["conditions"][0]["unary"] = flag
        with pytest.raises(ValueError, match=r"conditions\[0\]: unary must be true or false, got "):
            Plan.from_json(data)
    data["conditions"][0]["unary"] = None
    assert Plan.from_json(data).conditions[0].unary is False


def test_a_bound_name_can_always_stand_in_braces():
    with pytest.raises(ValueError, match="step S1 binds 'é', which is no identifier"):
        replace(GOOD, conditions=(), steps=[replace(S1, binds="é"), S2]).validate()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from("uvw"), max_size=2), st.sets(st.sampled_from("uvw"), max_size=2)),
                min_size=1, max_size=4))
def test_an_order_that_settles_every_need_exists_exactly_when_there_is_no_cycle(rows):
    items = [Condition(f"K{i}", "", needs=sorted(needs), binds=sorted(binds)) for i, (needs, binds) in enumerate(rows)]
    bound = {name for item in items for name in item.binds}

    def settled(item, name, before):
        binders = [i for i in items if name in i.binds]
        sources = [i for i in binders if name not in i.needs]
        wanted = (sources if name in item.binds else binders) or binders
        return bool(wanted) and all(i in before for i in wanted)
    works = any(all(settled(item, name, order[:k]) for k, item in enumerate(order) for name in item.needs)
                for order in permutations(items))
    try:
        replace(GOOD, conditions=items).validate()
        assert works
    except ValueError as error:
        assert not works and ("form a cycle" in str(error) or not {n for i in items for n in i.needs} <= bound)
@pytest.mark.parametrize(("text", "value"), [
    ("year('997')", 997), ("year('AD 79')", 79), ("year('44 BC')", -44), ("year('12 March 1044 BC')", -1044), ("'44 BC' < '20 BC'", True),
    ("'44 BC' < 'March 5, 1950'", True), ("'2.1 million' > '3000'", True), ("abs('5 thousand')", 5000), ("month('2 Feb 1950')", 2),
    ("day('Sept. 3rd, 1950')", 3), ("'2 Feb 1950' == '1950-02-02'", True), ("'1,204' == 1204", True), ("1 == 1.0", True),
    ("'5 million' == '5,000,000'", True), ("'007' == '7'", False), ("'1.50' == 1.5", True), ("1204 in ('1,204', '7')", True)])
def test_numbers_and_dates_in_their_written_forms(text, value):
    assert evaluate(text, {}) == value


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="no finite number: inf"):
        evaluate("1e400 - 1e400", {})


@pytest.mark.parametrize(("target", "name"), [("zz", "zz"), ("argmin(x1, 'A', d3, 'B')", "d3"), ("x1 == x9", "x9"), ("birth_date", "birth_date"),
                                              ("x2 or director", "director")])
def test_a_target_over_an_unbound_variable_is_refused(target, name):
    with pytest.raises(ValueError, match=f"needs '{name}', which no step binds"):
        replace(GOOD, target=target).validate()


@pytest.mark.parametrize("target", ["", "director", "yes or no", "the director of Lume", "what was first", "abs(year(x1) - 3)"])
def test_words_may_stand_for_a_target(target):
    assert replace(GOOD, target=target).validate() is None


def test_unknown_stop_rules_and_types_are_warned_about():
    assert Step("S", "q", extract=" Person*").extract == "person*"
    for change, message in (({"stop": "never"}, "step S1: stop 'never'"), ({"extract": "dragon"}, "step S1 extracts 'dragon'")):
        with pytest.warns(UserWarning, match=message):
            replace(GOOD, steps=[replace(S1, **change), S2]).validate()


def test_bytes_are_read_as_json():
    assert Plan.from_json(GOOD.to_json().encode()) == GOOD
    with pytest.raises(ValueError, match="plan lacks objective"):
        Plan.from_json(b"{}")
    with pytest.raises(ValueError, match="a plan must be JSON"):
        Plan.from_json(b"\xff{")
