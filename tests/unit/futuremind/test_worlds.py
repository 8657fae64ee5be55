"""Worlds: documents against graph, every guarantee by literal search and brute force, proofs that notice damage, bad input."""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.futuremind.worlds import (
    COMPARATIVES,
    DERIVED,
    KINDS,
    QUESTION_FORMS,
    QUESTION_TYPES,
    RELATIONS,
    Doc,
    Question,
    evaluate_form,
    make_world,
    prove_hops,
)

few = settings(max_examples=5, deadline=None)
CHAINS = ("bridge", "compositional", "inference")
SHAPES = {"2hop": 2, "3hop1": 3, "3hop2": 3, "4hop1": 4, "4hop2": 4, "4hop3": 4}
worlds = st.builds(lambda seed, size: (seed, size), st.integers(0, 10**6), st.integers(40, 120))


@cache
def world_of(seed=0, entities=300):
    return make_world(seed, entities)


def edges(world):
    return [(s, r, o) for s, o, r in world.graph.edges(keys=True)]


def forms_of(world):
    return {n: (n, *d["aliases"]) for n, d in world.graph.nodes(data=True)}


def texts(docs):
    return {d.title: " ".join([d.title, *d.sentences]) for d in docs}


def gold(question):
    return list(dict.fromkeys(title for title, _ in question.supporting_facts))


def entities(form):
    """Question entities, found another way than the module does."""
    flat = json.dumps(form)
    words = set(RELATIONS) | {"rel", "inv", "and", "argmin", "argmax", "same", "diff_years", "count"}
    return [w for w in dict.fromkeys(re.findall(r'"([^"]+)"', flat)) if w not in words]


def brute(facts, form):
    """Second evaluator over a plain list of facts."""
    if isinstance(form, str):
        return {form}
    op, *rest = form
    if op in ("rel", "inv"):
        ends = brute(facts, rest[1])
        pairs = [(s, o) if op == "rel" else (o, s) for s, r, o in facts if r == rest[0]]
        return {there for here, there in pairs if here in ends}
    if op == "and":
        return set.intersection(*(brute(facts, f) for f in rest))
    if op == "count":
        return {str(len(brute(facts, rest[0])))}
    if op in ("argmin", "argmax"):
        dates = {}
        for e in rest[1]:
            at = {e}
            for name in [rest[0]] if isinstance(rest[0], str) else rest[0]:
                at = {o for s, r, o in facts if r == name and s in at}
            dates[e] = min(at)
        return {(min if op == "argmin" else max)(dates, key=dates.get)}
    (a,), (b,) = brute(facts, rest[0]), brute(facts, rest[1])
    return {"yes" if a == b else "no"} if op == "same" else {str(abs(int(a[:4]) - int(b[:4])))}


def check(world, question):
    """All guarantees of one answerable question."""
    facts, names, text = edges(world), forms_of(world), texts(world.docs)
    docs = {d.title: d for d in world.docs}
    assert brute(facts, question.logical_form) == {question.answer} == evaluate_form(world.graph, question.logical_form)
    titles = gold(question)
    assert len(titles) == question.hops
    for e in question.evidences:
        assert tuple(e) in facts
    for title, i in question.supporting_facts:
        shown = text[title]
        assert 0 < i < len(docs[title].sentences)
        assert any(title in (s, o) and any(f in shown for f in (*names[s], *forms(o, names))) for s, _, o in question.evidences)
    proof = prove_hops(world, question)
    subsets = {frozenset(c) for k in range(1, len(titles) + 1) for c in combinations(titles, k)}
    assert set(proof.decidable_without) == subsets and not any(proof.decidable_without.values())
    assert proof.min_docs == question.hops and proof.disconnected
    asked = entities(question.logical_form)
    assert all(e in question.question for e in asked)
    assert not any(f in text[t] for e in asked for f in names[e] for t in titles if t != e)
    if question.type in CHAINS:
        answers = [question.answer, *question.aliases]
        assert question.evidences[0][0] in asked
        assert any(a in text[titles[-1]] for a in answers)
        assert not any(a in x and f in x for x in text.values() for e in asked for f in names[e] for a in answers)
    if question.type == "bridge":
        assert SHAPES[question.id.split("__")[0]] == question.hops


def forms(node, names):
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", node):
        return names[node]
    year, month, day = node.split("-")
    word = ("January February March April May June July August September October November December").split()[int(month) - 1]
    return [node, f"{day} {word} {year}", f"{word} {day}, {year}"]


# ---- the tables

def test_relations_have_the_names_and_the_wording_that_the_specification_asks_for():
    asked = "director spouse father mother born_in birth_date death_date country works_for founder seat prize author release_date capital"
    assert set(asked.split()) <= set(RELATIONS) and len(RELATIONS) >= 14
    assert all(len(set(r.sentences)) >= 3 for r in RELATIONS.values())
    assert all(len(forms) >= 2 for forms in QUESTION_FORMS.values())
    assert all(a in RELATIONS and b in RELATIONS for a, b in DERIVED.values()) and set(COMPARATIVES) <= set(RELATIONS)
    assert all(RELATIONS[n].object == "date" for n in COMPARATIVES)


# ---- documents

@few
@given(worlds)
def test_documents_say_the_graph_and_no_name_lies_inside_another(args):
    world = make_world(*args)
    titles = [d.title for d in world.docs]
    assert len(titles) == len(set(titles)) == args[1]
    nodes = {n: d for n, d in world.graph.nodes(data=True) if d["kind"] != "date"}
    assert set(titles) == set(nodes) and {d["kind"] for d in nodes.values()} == set(KINDS)
    alias = {a: n for n, d in nodes.items() for a in d["aliases"]}
    assert len(alias) == round(0.2 * args[1])
    read = [f for f in world._reading().where if f.relation != "alias"]
    assert sorted((alias.get(s, s), r, alias.get(o, o)) for s, r, o in read) == sorted(edges(world))
    names = [f.lower() for f in (*nodes, *alias)]
    assert sum(a in b for a in names for b in names) == len(names)
    for doc in world.docs:
        assert len(doc.mentions) == len(set(doc.mentions)) and all(m in nodes for m in doc.mentions)
        text = " ".join(doc.sentences)
        named = {n for n in nodes if n != doc.title and any(f in text for f in (n, *nodes[n]["aliases"]))}
        assert named == set(doc.mentions)  # so noise names nobody


def test_single_valued_relations_are_single_valued_and_dates_are_unique():
    world = world_of()
    counts = Counter((s, r) for s, r, _ in edges(world) if not RELATIONS[r].listed)
    assert max(counts.values()) == 1
    dates = Counter(o for _, r, o in edges(world) if RELATIONS[r].object == "date")
    assert max(dates.values()) == 1 and all(10 <= int(d[-2:]) <= 28 for d in dates)
    assert all(world.graph.nodes[o]["kind"] == RELATIONS[r].object for _, r, o in edges(world))


def test_the_standard_world_has_the_size_and_the_traits_that_were_asked_for():
    world = world_of()
    sentences = [s for d in world.docs for s in d.sentences]
    assert len(world.docs) == 300 and 1350 <= len(sentences) <= 1650
    assert len({s.split()[-1] for s in world.graph if world.graph.nodes[s]["kind"] == "person"}) < 80  # shared surnames
    assert sum(s.startswith(("He ", "She ", "It ", "His ", "Her ", "Its ")) for s in sentences) > 300
    written = [len(re.findall(p, " ".join(sentences))) for p in (r"\d{4}-\d\d-\d\d", r"\d\d [A-Z]\w+ \d{4}", r"[A-Z]\w+ \d\d, \d{4}")]
    assert min(written) > 30
    words = {n for d in world.docs for n in d.title.split()}
    near = [(a, b) for a, b in combinations(sorted(words), 2) if len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1]
    assert len(near) > 5


def test_noise_and_aliases_follow_their_rates():
    plain, full = make_world(3, 60, noise=0, alias_rate=0), make_world(3, 60, noise=1, alias_rate=1)
    idle = [sum(len(d.sentences) for d in w.docs) - len(set(w._reading().where.values())) for w in (plain, full)]
    assert idle == [60, 60]  # first sentences that tell no alias; noise
    assert not any(d["aliases"] for _, d in plain.graph.nodes(data=True))
    assert all(d["aliases"] for _, d in full.graph.nodes(data=True) if d["kind"] != "date")


def test_the_same_arguments_give_the_same_world_in_every_process():
    code = ("import sys; from collai.futuremind.worlds import *; w = make_world(5, 60); "
            "print(hash(()), [d.sentences for d in w.docs], [(q.id, q.question, q.evidences) for q in w.questions(21, seed=2)]); "
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    runs = [subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": h}, capture_output=True, text=True,
                           check=True).stdout.split(" ", 1)[1] for h in ("1", "2")]
    assert runs[0] == runs[1]
    assert make_world(5, 60).docs == make_world(5, 60).docs != make_world(6, 60).docs


# ---- questions

@few
@given(worlds, st.integers(0, 99))
def test_every_guarantee_holds_by_brute_force(args, seed):
    world = world_of(*args)
    found = world.questions(14, seed=seed)
    assert {q.type for q in found} == set(QUESTION_TYPES)
    for q in found:
        check(world, q)


@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_every_type_passes_in_the_standard_world(kind):
    world = world_of()
    found = world.questions(16, types=[kind], hops=(2, 5), seed=4)
    assert {q.type for q in found} == {kind} and len({q.question for q in found}) == len({q.id for q in found}) == 16
    for q in found[:8]:
        check(world, q)


@few
@given(st.integers(1, 45), st.integers(0, 9), st.sampled_from([(2, 4), (2, 2), (3, 3), (4, 4), (2, 3), (3, 5)]))
def test_exactly_n_distinct_questions_in_equal_shares(n, seed, hops):
    found = world_of().questions(n, hops=hops, seed=seed)
    assert len(found) == n == len({q.question for q in found}) == len(set(found))
    assert all(hops[0] <= q.hops <= hops[1] for q in found)
    shares = Counter(q.type for q in found).values()
    assert max(shares) - min(shares) <= 1
    assert found == world_of().questions(n, hops=hops, seed=seed)


def test_two_hundred_mixed_questions_of_every_number_of_hops():
    for n, hops in ((200, (2, 4)), (100, (2, 2)), (100, (3, 3)), (100, (4, 4))):  # the notebook draws 200 of each
        shares = Counter(q.type for q in world_of().questions(n, hops=hops))
        assert max(shares.values()) - min(shares.values()) <= 1
    shapes = {q.id.split("__")[0] for q in world_of().questions(60, types=["bridge"])}
    assert shapes == set(SHAPES)


def test_the_error_says_how_many_exist():
    world = world_of(8, 40)
    with pytest.raises(ValueError, match=r"5000 questions asked, \d+ exist of types inference with 2 to 4 hops") as caught:
        world.questions(5000, types=["inference"])
    most = int(re.search(r"asked, (\d+) exist", str(caught.value)).group(1))
    assert len(world.questions(most, types=["inference"], seed=3)) == most
    with pytest.raises(ValueError, match=f"{most + 1} questions asked, {most} exist"):
        world.questions(most + 1, types=["inference"], seed=1)
    with pytest.raises(ValueError, match="0 exist"):
        world.questions(1, types=["inference"], hops=(3, 4))


@few
@given(worlds)
def test_twins_lack_one_document_and_cannot_be_decided(args):
    world = world_of(*args)
    for q, twin in zip(world.questions(14), world.questions(14, unanswerable=True), strict=True):
        lost = set(gold(q)) - set(gold(twin))
        assert len(lost) == 1 and q.answerable and not twin.answerable
        assert (twin.id, twin.question, twin.answer, twin.evidences) == (q.id, q.question, q.answer, q.evidences)
        assert [d for d in world.docs if d.title not in lost] == world.context(twin) and world.context(q) == world.docs
        proof = prove_hops(world, twin)
        assert proof.min_docs == 0 and not any(proof.decidable_without.values())
        assert len(proof.decidable_without) == 2 ** (q.hops - 1) - 1


def test_a_form_survives_json():
    for q in world_of().questions(35, seed=1):
        form = json.loads(json.dumps(q.logical_form))
        assert evaluate_form(world_of().graph, form) == {q.answer}
        again = Question(q.id, q.question, q.answer, q.aliases, q.type, q.hops, q.supporting_facts, q.evidences, form)
        assert prove_hops(world_of(), again) == prove_hops(world_of(), q)


# ---- the proof notices damage

@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_a_deleted_sentence_makes_the_question_undecidable(kind):
    world = make_world(11, 80)
    docs = {d.title: d for d in world.docs}
    for q in world.questions(3, types=[kind], hops=(2, 5)):
        before = prove_hops(world, q)
        for title, i in q.supporting_facts:
            kept = docs[title].sentences.pop(i)
            proof = prove_hops(world, q)
            assert proof.min_docs == 0 and not any(proof.decidable_without.values())
            docs[title].sentences.insert(i, kept)
        assert prove_hops(world, q) == before


def test_a_copied_fact_frees_its_document_and_no_other():
    world = make_world(12, 80, alias_rate=0)
    docs = {d.title: d for d in world.docs}
    for q in world.questions(30, types=["bridge", "compositional", "inference", "comparison"]):
        titles = gold(q)
        s, r, o = q.evidences[1]
        home = titles[1]
        if s != home:
            continue
        said = RELATIONS[r].sentences[1].replace("{s}", s).replace("{o}", o)
        outside = next(d for d in world.docs if d.title not in titles)
        outside.sentences.append(said)
        proof = prove_hops(world, q)
        assert [t for t, decided in proof.decidable_without.items() if decided] == [frozenset([home])]
        assert proof.min_docs == q.hops
        outside.sentences.pop()
        docs[titles[0]].sentences.append(said)
        assert prove_hops(world, q).min_docs == q.hops - 1
        docs[titles[0]].sentences.pop()


def test_a_name_in_the_wrong_place_is_seen_in_any_sentence():
    world = make_world(13, 80)
    docs = {d.title: d for d in world.docs}
    for q in world.questions(10, types=CHAINS):
        first, last = docs[gold(q)[0]], docs[gold(q)[-1]]
        for place, name in ((last, q.evidences[0][0]), (first, q.answer), *((first, a) for a in q.aliases)):
            place.sentences.append(f"Someone mentioned {name} once.")
            assert not prove_hops(world, q).disconnected
            place.sentences.pop()
        assert prove_hops(world, q).disconnected
    for q in [*world.questions(2, types=["bridge"], hops=(4, 4)), *world.questions(2, types=["bridge_comparison"])]:
        middle = docs[next(t for t in gold(q)[1:] if t not in entities(q.logical_form))]  # holds no answer: (c) alone
        middle.sentences.append(f"Someone mentioned {q.evidences[0][0]} once.")
        assert not prove_hops(world, q).disconnected
        middle.sentences.pop()


def test_a_document_that_leaves_is_missed():
    world = make_world(14, 60)
    q = world.questions(1, types=["bridge"], hops=(3, 3))[0]
    world.docs = [d for d in world.docs if d.title != gold(q)[2]]
    assert prove_hops(world, q).min_docs == 0


def test_an_alias_is_understood_only_where_its_own_document_is_there():
    world = make_world(15, 60, alias_rate=0)
    q = world.questions(1, types=["inference"])[0]
    docs = {d.title: d for d in world.docs}
    middle, (title, i) = q.evidences[0][2], q.supporting_facts[0]
    world.graph.nodes[middle]["aliases"] = ("Nobody Known",)
    docs[title].sentences[i] = docs[title].sentences[i].replace(middle, "Nobody Known")
    world._cache.clear()
    assert prove_hops(world, q).min_docs == 0
    docs[middle].sentences[0] = docs[middle].sentences[0].replace(f"{middle} is", f"{middle}, also known as Nobody Known, is")
    assert prove_hops(world, q).min_docs == 2


# ---- bad input

@pytest.mark.parametrize(("arguments", "text"), [
    ({"entities": 39}, "entities must be >= 40, got 39"), ({"seed": -1}, "seed must be >= 0, got -1"),
    ({"noise": -0.1}, r"noise must be in \[0, 1\], got -0.1"), ({"noise": float("nan")}, r"noise must be in \[0, 1\], got nan"),
    ({"alias_rate": 2}, r"alias_rate must be in \[0, 1\], got 2")])
def test_a_world_out_of_range_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        make_world(**arguments)


@pytest.mark.parametrize(("arguments", "text"), [
    ({"n": 0}, "n must be >= 1, got 0"), ({"n": 3, "types": ["tree"]}, "unknown question type 'tree'; the types are bridge, "),
    ({"n": 3, "types": []}, "types is empty"), ({"n": 3, "hops": (3, 2)}, r"1 <= least <= most, got \(3, 2\)"),
    ({"n": 3, "hops": (0, 2)}, r"got \(0, 2\)"), ({"n": 3, "hops": (2,)}, r"got \(2,\)"), ({"n": 3, "hops": (6, 9)}, "0 exist")])
def test_a_demand_that_makes_no_sense_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        world_of(8, 40).questions(**arguments)


def test_forms_and_questions_that_do_not_fit_are_refused():
    graph = world_of(8, 40).graph
    for form, text in ((("or", "A", "B"), "unknown operator 'or' in a logical form; the operators are rel, inv, and, "),
                       (("rel", "uncle", world_of(8, 40).docs[0].title), "unknown relation 'uncle'")):
        with pytest.raises(ValueError, match=text):
            evaluate_form(graph, form)
    assert evaluate_form(graph, ("rel", "father", "Nobody")) == frozenset()
    with pytest.raises(ValueError, match="question 'x' has no logical form"):
        prove_hops(world_of(8, 40), Question("x", "?", "!"))
    with pytest.raises(ValueError, match="question 'x' names 'Nobody', which is not in the world"):
        prove_hops(world_of(8, 40), Question("x", "?", "!", logical_form=("rel", "father", "Nobody")))


def test_one_type_may_be_given_by_name_and_records_are_plain():
    q = world_of(8, 40).questions(2, types="bridge")[0]
    assert q.type == "bridge" and repr(world_of(8, 40)).startswith("World(40 documents, ")
    assert json.loads(json.dumps([q.supporting_facts, q.evidences, q.aliases])) == [q.supporting_facts, q.evidences, q.aliases]
    assert Doc("A", ["A is a city."]).mentions == []


# ---- (b) once more, without the module's reading and its evaluator

def left_open(told, form):
    """What a form can be when only the given facts are told; None if nothing bounds it, or part of it is unknown."""
    if isinstance(form, str):
        return {form}
    op, *rest = form
    if op in ("rel", "inv"):
        ends = left_open(told, rest[1])
        found = [{o if op == "rel" else s for s, r, o in told if r == rest[0] and (s if op == "rel" else o) == e} for e in ends or ()]
        return set().union(*found) if found and all(found) else None
    if op == "and":
        known = [v for v in (left_open(told, f) for f in rest) if v is not None]
        return set.intersection(*known) if known else None
    parts = [(rest[0], e) for e in rest[1]] if op in ("argmin", "argmax") else rest
    if op in ("argmin", "argmax"):
        parts = []
        for e in rest[1]:
            for name in [rest[0]] if isinstance(rest[0], str) else rest[0]:
                e = ("rel", name, e)
            parts.append(e)
    if any(left_open(told, part) is None for part in parts):
        return None
    return brute(told, form)


@few
@given(worlds)
def test_no_subset_of_the_gold_documents_can_be_spared_by_another_decider(args):
    world = world_of(*args)
    home = {(s, r, o): o if RELATIONS[r].listed else s for s, r, o in edges(world)}
    for q in world.questions(28, hops=(2, 5)):
        titles = gold(q)
        assert left_open(list(home), q.logical_form) == {q.answer}
        assert {home[tuple(e)] for e in q.evidences} == set(titles)
        for k in range(1, len(titles) + 1):
            for gone in combinations(titles, k):
                told = [fact for fact, title in home.items() if title not in gone]
                found = left_open(told, q.logical_form)
                assert found != {q.answer}, (q, gone)
def test_a_text_is_no_list_of_sentences():
    with pytest.raises(TypeError, match="sentences of 'a' must be a list of texts, got the text 'One sentence.'"):
        Doc("a", "One sentence.")
