"""Benchmark: whole quads, both file formats byte for byte, runs that survive kills, scores against plain recounts."""
import contextlib
import html.parser
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collai.eval.llm import ChatRefused, TokenUsage
from collai.eval.stats import holm, mcnemar_exact, wilson
from collai.viabench import bench
from collai.viabench.bench import (
    Benchmark,
    Results,
    build_benchmark,
    evaluate,
    load_benchmark,
    load_datacv,
    save_result_txt,
    to_inspect_task,
)
from collai.viabench.families import CATEGORIES, FAMILIES, render
from collai.viabench.observers import Reply
from collai.viabench.protocol import PROMPTS, circular_variants, compose, message
from collai.viabench.stats import fit_psychometric


@pytest.fixture(scope="module")
def small():
    """A benchmark of at least 44 items."""
    return build_benchmark(44)


class Says:
    """A model that looks its reply up in a function of the item."""

    takes_item = True

    def __init__(self, letter, name="says"):
        self.letter, self.name, self.seen = letter, name, []

    def answer(self, image, prompt, options):
        self.seen.append((image, prompt, options))
        letter = self.letter(image) if callable(self.letter) else self.letter
        return Reply(f"Answer: {letter}", letter, TokenUsage(3, 2), 0.5)


def truth(items):
    """A model that knows the right text of every item of a benchmark, whatever the order of its options."""
    texts = {item.id: item.options[ord(item.answer) - 65] for item in items}
    return Says(lambda item: chr(65 + item.options.index(texts[item.id])), "truth")


# ---------------------------------------------------------------- building

def test_a_benchmark_has_whole_quads_of_all_categories(small):
    assert len(small) >= 44 and {item.category for item in small} == set(CATEGORIES)
    groups = {}
    for item in small:
        groups.setdefault(item.quad, []).append(item)
    for group in groups.values():
        for strength in (0.0, 1.0):
            some = [item for item in group if item.strength == strength]
            options = [item.options[ord(item.answer) - 65] for item in some]
            assert sorted(options) == sorted(some[0].options[:-1]) and 2 * len(some) == len(group)
    assert len({item.id for item in small}) == len(small)


def test_a_benchmark_is_the_same_every_time_and_another_for_another_seed(small):
    again, other = build_benchmark(1), build_benchmark(1, seed=1)
    assert again.hash == small[: len(again)].hash != other.hash and list(again) == list(small[: len(again)])
    assert {item.hash for item in other}.isdisjoint(item.hash for item in small)


@pytest.mark.parametrize("categories", [("motion",), ("anomaly", "color")])
def test_categories_can_be_chosen(categories):
    made = build_benchmark(1, categories=categories)
    assert {item.category for item in made} == set(categories)


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 900))
def test_categories_stay_within_one_quad_of_each_other(sizes, n):
    table = {str(c): {f"{c}.{i}": k for i, k in enumerate(row)} for c, row in enumerate(sizes)}
    total = dict.fromkeys(table, 0)
    for name, _ in bench._steps(table, n):
        total[name.split(".")[0]] += table[name.split(".")[0]][name]
        assert max(total.values()) - min(total.values()) <= 8
    assert sum(total.values()) >= n and all(total.values())


def test_families_are_asked_about_every_size_of_the_difference():
    for family in FAMILIES.values():
        sizes = bench._magnitudes(family)
        assert sizes and all(abs(d) >= family.delta_min for d in sizes)


def test_pairs_differ_in_the_inducer_alone(small):
    pairs = small.pairs()
    assert len(pairs) == len(small) / 2 and len({i for pair in pairs for i in pair}) == len(small)
    for i, j in pairs:
        lit, dark = small[i], small[j]
        assert (lit.strength, dark.strength, lit.delta, lit.answer) == (1.0, 0.0, dark.delta, dark.answer)
        changed = (lit.image != dark.image).any(2)
        assert not (changed & ~lit.masks["inducer"]).any() and dark.illusion_answer is None


def test_an_item_is_its_stimulus(small):
    for item in small[::7]:
        drawn = render(item.family, strength=item.strength, delta=item.delta, seed=item.seed, size=256)
        assert (item.image == drawn.image).all() and item.image.dtype == np.uint8 and item.image.flags.c_contiguous
        assert item.masks.keys() == drawn.masks.keys() and all((item.masks[k] == drawn.masks[k]).all() for k in drawn.masks)
        assert (item.options, item.answer, item.question) == (drawn.options, drawn.answer, drawn.question)
        assert json.loads(json.dumps(item.truth)) == item.truth
    first = small[0]
    first.image[:] = 0
    assert first.image.any() and first in {first} and first != small[1]


def test_a_slice_is_a_benchmark(small):
    part = small[3:9]
    assert isinstance(part, Benchmark) and [i.id for i in part] == [i.id for i in small][3:9] and part.hash != small.hash


@pytest.mark.parametrize(("call", "text"), [
    (lambda: build_benchmark(0), "n_items must be a whole number >= 1, got 0"),
    (lambda: build_benchmark(2.5), "n_items must be a whole number >= 1, got 2.5"),
    (lambda: build_benchmark(True), "n_items must be a whole number >= 1, got True"),
    (lambda: build_benchmark(6, seed=-1), "seed must be a whole number >= 0, got -1"),
    (lambda: build_benchmark(6, categories=("colour",)), "unknown category 'colour'"),
    (lambda: build_benchmark(6, categories=()), "categories must be different ones"),
    (lambda: build_benchmark(6, categories="color"), "categories must be different ones"),
    (lambda: build_benchmark(6, categories=("color", "color")), "categories must be different ones"),
    (lambda: bench._planes(dict.fromkeys("abcdefghi", np.zeros((2, 2), bool))), "at most 8 masks, got 9"),
])
def test_bad_orders_are_refused(call, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        call()


def test_an_id_twice_is_refused(small):
    with pytest.raises(ValueError, match="comes twice"):
        Benchmark([small[0], small[0]])


# ---------------------------------------------------------------- files

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_saved_and_loaded_is_the_same(small, tmp_path):
    small.save(tmp_path / "a")
    back = load_benchmark(tmp_path / "a")
    assert back.hash == small.hash and [i.id for i in back] == [i.id for i in small]
    back.save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for one, two in zip(small, back, strict=True):
        assert (one.image == two.image).all() and one.masks.keys() == two.masks.keys()
        assert (one.truth, one.options, one.answer, one.quad) == (two.truth, two.options, two.answer, two.quad)


def test_the_export_is_the_challenges_format(small, tmp_path):
    small.save(tmp_path / "a")
    entries = json.loads((tmp_path / "a/val.json").read_text())
    assert list(entries[0]) == ["image_name", "Question", "option"]
    for entry, item in zip(entries, small, strict=True):
        assert entry["option"].startswith("Option: \nA. ") and entry["option"].endswith("Not Sure\n")
        assert f"{entry['Question']}\n{entry['option']}" == message(item.question, item.options)
    public = load_datacv(tmp_path / "a/val.json", tmp_path / "a/images")
    assert all(item.answer is None and not item.truth and not item.masks for item in public)
    public.save(tmp_path / "c")
    one, two = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert one["val.json"] == two["val.json"] and {k: v for k, v in two.items() if k.startswith("images")} == {
        k: v for k, v in one.items() if k.startswith("images")}
    for left, right in zip(small, public, strict=True):
        assert (left.image == right.image).all() and (left.question, left.options) == (right.question, right.options)


@pytest.mark.parametrize(("name", "change"), [
    ("val.json", lambda data: data.replace(b"A. ", b"A.  ", 1)),
    ("truth.json", lambda data: data.replace(b'"answer": "A"', b'"answer": "B"', 1)),
    ("images/0.png", lambda data: bench._encode(np.full((256, 256, 3), 7, np.uint8))),
    ("masks/0.png", lambda data: bench._encode(np.zeros((256, 256), np.uint8))),
])
def test_a_changed_file_is_noticed(small, tmp_path, name, change):
    small[:8].save(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match="is not what was saved"):
        load_benchmark(tmp_path)


def test_lists_of_different_length_are_refused(small, tmp_path):
    small[:2].save(tmp_path)
    (tmp_path / "val.json").write_text(json.dumps(json.loads((tmp_path / "val.json").read_text())[:1]))
    with pytest.raises(ValueError, match="has 1 entries, truth.json 2"):
        load_benchmark(tmp_path)


def real(folder, entries, pixels=None):
    """Files as the challenge has them."""
    pixels = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3) if pixels is None else pixels
    for entry in entries:
        name = entry.get("image_name")
        if isinstance(name, str) and Path(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            Image.fromarray(pixels).save(folder / name)
    (folder / "val.json").write_text(json.dumps(entries))
    return load_datacv(folder / "val.json", folder)


QUIRKS = [
    {"image_name": "17.webp", "Question": "Question:\nIs the image moving or pulsing?", "option": "Option: \nA. Yes\nB. No\nC. Not Sure\n"},
    {"image_name": "3.jpg", "Question": "Find the object that is different from the others, and mark its position",
     "option": "Option: \nA. (3,5)\nB. (2,2)\nC. (1,4)\nD. Not Sure\n"},
    {"image_name": "100.jpeg", "Question": "How many fingers are in the image?", "option": "Option: \nA. 4\nB. 5\nC. 6\nD. 7\n", "extra": 1},
    {"image_name": "0.png", "Question": "Are there parallel lines in the image?", "option": "A. Yes\r\nB. No\r\nC. Not Sure"},
]


def test_the_challenges_quirks_are_read_and_kept(tmp_path):
    (tmp_path / "real").mkdir()
    made = real(tmp_path / "real", QUIRKS)
    assert [item.id for item in made] == ["17", "3", "100", "0"]
    assert made[0].question == "Is the image moving or pulsing?" and made[3].options == ["Yes", "No", "Not Sure"]
    assert made[1].options == ["(3,5)", "(2,2)", "(1,4)", "Not Sure"] and made[1].image.shape == (40, 30, 3)
    made.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/val.json").read_text()) == QUIRKS
    assert all((tmp_path / "out/images" / q["image_name"]).read_bytes() == (tmp_path / "real" / q["image_name"]).read_bytes() for q in QUIRKS)
    assert load_benchmark(tmp_path / "out").hash == made.hash
    asked = Says("C")
    results = evaluate(asked, made)
    assert asked.seen[0][1] == compose(made[0].question, made[0].options, "direct")
    assert np.isnan(results.table().accuracy["overall"]) and results.table().not_sure["overall"] == 0.5
    with pytest.raises(ValueError, match="no item with an answer"):
        results.compare(results)
    with pytest.raises(ValueError, match="4 items have no answer, the first is '17'"):
        to_inspect_task(made)


texts = st.text("abc XYZ(1,2).éß", min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=60)
@given(st.lists(texts, min_size=2, max_size=6, unique=True))
def test_a_block_of_options_is_read_as_it_is_written(options):
    assert bench._options({"option": bench._block(options)}, "here") == options


@pytest.mark.parametrize(("change", "text"), [
    ({"option": "Yes or no?"}, r"entry 0 of val.json \(17.webp\) has no block of options, got 'Yes or no\?'"),
    ({"option": None}, "has no block of options, got None"),
    ({"option": "A. Yes\nC. No\n"}, "options must be lettered A, B"),
    ({"option": "A. Yes\nB.\n"}, "options must be lettered A, B"),
    ({"option": "A. Yes\n"}, "needs two or more different options"),
    ({"option": "A. Yes\nB. Yes\n"}, r"needs two or more different options, got \['Yes', 'Yes'\]"),
    ({"option": "A. Yes\nA. Yes\nB. No\n"}, "options must be lettered A, B, ... and have texts"),
    ({"image_name": "cat.webp"}, "the index of the picture must be a number, got 'cat.webp'"),
    ({"image_name": "-1.webp"}, "the index of the picture must be a number, got '-1.webp'"),
    ({"image_name": "17.gif"}, "needs an image_name like 17.webp"),
    ({"image_name": "../17.webp"}, "needs an image_name like 17.webp"),
    ({"image_name": 17}, "needs an image_name like 17.webp"),
    ({"image_name": "18.webp"}, r"entry 0 of val.json \(18.webp\): the picture is missing"),
    ({"Question": " "}, "has no Question, got ' '"),
])
def test_bad_entries_are_named(tmp_path, change, text):
    real(tmp_path, QUIRKS[:1])
    (tmp_path / "val.json").write_text(json.dumps([QUIRKS[0] | change]))
    with pytest.raises(ValueError, match=text):
        load_datacv(tmp_path / "val.json", tmp_path)


def test_a_list_and_indices_of_their_own_are_needed(tmp_path):
    real(tmp_path, QUIRKS[:1])
    for content, text in (({}, "must hold a list of entries"), ([], "must hold a list"), (["x"], "needs an image_name")):
        (tmp_path / "val.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=text):
            load_datacv(tmp_path / "val.json", tmp_path)
    (tmp_path / "val.json").write_text(json.dumps([QUIRKS[0], QUIRKS[0]]))
    with pytest.raises(ValueError, match="the id '17' comes twice"):
        load_datacv(tmp_path / "val.json", tmp_path)


# ---------------------------------------------------------------- running

@given(st.lists(texts, min_size=2, max_size=6, unique=True), st.integers(0, 5), st.integers(0, 5))
def test_rotations_are_those_of_the_protocol_and_undone(options, r, place):
    k = len(options)
    r, letter = r % k, chr(65 + place % k)
    shown, moved = circular_variants(options, letter)[r]
    assert bench._rotated(options, r) == shown and bench._original(moved, r, k) == letter
    assert bench._original(None, r, k) is None


def test_a_model_sees_the_question_and_never_the_truth(small):
    model = Says("A")
    evaluate(model, small[:6], circular=True)
    for shown, prompt, options in model.seen:
        assert shown.answer is None and shown.illusion_answer is None and shown.truth == {}
        assert shown.options == options and prompt == compose(shown.question, options, "direct")
    arrays = Says("A")
    arrays.takes_item = False
    evaluate(arrays, small[:2], prompt="cot")
    assert (arrays.seen[0][0] == small[0].image).all() and arrays.seen[0][1] == compose(small[0].question, small[0].options, "cot")


def test_known_models_get_known_scores(small):
    right, first = evaluate(truth(small), small, circular=True).table(), evaluate(Says("A"), small, circular=True).table()
    assert (right[["accuracy", "circular", "pair"]] == 1).all(axis=None) and (right["shift"] == 0).all()
    assert first.circular["overall"] == 0 and right.n["overall"] == len(small)
    assert set(right.index) == {*CATEGORIES, "overall"} and right.metric["overall"] == "Overall_ACC" and right.metric["geometric"] == "GSI_ACC"
    count = sum(item.answer == "A" for item in small)
    assert first.accuracy["overall"] == count / len(small) and (first.lo["overall"], first.hi["overall"]) == wilson(count, len(small))


def test_circular_asks_every_rotation(small):
    results = evaluate(Says("B"), small[:5], circular=True)
    assert Counter(row["item"] for row in results.rows) == {item.id: len(item.options) for item in small[:5]}
    letters = {row["letter"] for row in results.rows}
    assert letters == {"B"} and set(results.frame().letter) >= {"A", "B", "C"}


def test_fooled_not_sure_and_invalid_are_counted_as_such(small):
    lit = Benchmark([item for item in small if item.illusion_answer])
    table = {item.id: item.illusion_answer for item in lit}
    assert evaluate(Says(lambda item: table[item.id]), lit).table().fooled["overall"] == 1
    unsure = evaluate(Says(lambda item: chr(64 + len(item.options))), small).table()
    assert unsure.not_sure["overall"] == 1 and unsure.accuracy["overall"] == 0 and unsure.fooled["overall"] == 0
    for letter in (None, "E", "a", ""):
        lost = evaluate(Says(letter), small[:8]).table()
        assert lost.invalid["overall"] == 1 and lost.accuracy["overall"] == 0 and lost.not_sure["overall"] == 0


def test_workers_do_not_change_rows(small):
    part = small[:12]
    model = truth(part)
    alone = evaluate(model, part, circular=True).rows
    assert evaluate(_Module(), part, workers=2).rows == evaluate(_Module(), part).rows
    model.remote = True
    assert evaluate(model, part, circular=True, workers=8).rows == alone


class _Module:
    """A model that can travel to another process."""

    name = "module"

    def answer(self, image, prompt, options):
        letter = chr(65 + int(image.sum()) % len(options))
        return Reply(letter, letter, None, 0.0)


class Batched(_Module):
    """Answers many at once, and draws again."""

    takes_sample = True
    calls = 0

    def answer(self, image, prompt, options, sample=0):
        letter = chr(65 + (int(image.sum()) + sample) % len(options))
        return Reply(letter, letter, None, 0.0)

    def answers(self, images, prompts, options, sample=0):
        self.calls += 1
        return [self.answer(*asked, sample) for asked in zip(images, prompts, options, strict=True)]


def test_batches_change_nothing_and_epochs_are_draws(small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_BATCH", 5)
    model, single = Batched(), Batched()
    single.answers = None
    del single.answers
    batched = evaluate(model, small[:12], epochs=3, out=tmp_path)
    assert model.calls == 3 * 3
    one_by_one = evaluate(type("Single", (Batched,), {"remote": True})(), small[:12], epochs=3)
    assert [row | {"text": ""} for row in batched.rows] == [row | {"text": ""} for row in one_by_one.rows]
    assert {row["epoch"] for row in batched.rows} == {0, 1, 2}
    first = [row for row in batched.rows if row["epoch"] == 0]
    assert [r["letter"] for r in first] != [r["letter"] for r in batched.rows if r["epoch"] == 1]
    table = batched.table()
    assert table.n["overall"] == 12 and table.lo["overall"] <= table.accuracy["overall"] <= table.hi["overall"]
    assert not evaluate(model, small[:12], epochs=3, out=tmp_path).errors and model.calls == 9


def test_a_run_goes_on_where_it_was(small, tmp_path):
    part = small[:12]

    def gives_up(item):
        if item.id == part[7].id:
            raise RuntimeError("gives up")
        return "A"

    with pytest.raises(RuntimeError, match="gives up"):
        evaluate(Says(gives_up), part, out=tmp_path)
    model = Says("A")
    assert evaluate(model, part, out=tmp_path).rows == evaluate(Says("A"), part).rows
    assert len(model.seen) == 12 - 7
    again = Says("A")
    assert len(evaluate(again, part, out=tmp_path, limit=3).rows) == 3 and not again.seen
    evaluate(again, part, out=tmp_path, circular=True)
    assert len(again.seen) == sum(len(item.options) - 1 for item in part)
    evaluate(Says("B", "other"), part, out=tmp_path)
    assert evaluate(again, part, out=tmp_path).rows[0]["letter"] == "A"
    assert evaluate(Says("C"), part, out=tmp_path, resume=False).rows[0]["letter"] == "C"
    assert evaluate(Says("D", "other"), part, out=tmp_path).rows[0]["letter"] == "B"


def test_a_folder_of_another_study_is_refused(small, tmp_path):
    evaluate(Says("A"), small[:3], out=tmp_path)
    with pytest.raises(ValueError, match="study fingerprint mismatch: benchmark"):
        evaluate(Says("A"), small[:4], out=tmp_path)
    with pytest.raises(ValueError, match="study fingerprint mismatch: prompt"):
        evaluate(Says("A"), small[:3], out=tmp_path, prompt="cot")
    assert len(evaluate(Says("A"), small[:4], out=tmp_path, resume=False).rows) == 4


def test_settings_of_a_model_are_part_of_the_key(small, tmp_path):
    for letter in "AB":
        model = Says(letter)
        model.identity = lambda letter=letter: {"letter": letter}
        assert {row["letter"] for row in evaluate(model, small[:3], out=tmp_path).rows} == {letter}


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("too late"), ChatRefused(403, False, None, "no")])
def test_a_failing_endpoint_is_an_error_and_no_wrong_answer(small, tmp_path, error, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    part = small[:6]
    right = truth(part)

    def sometimes(item):
        if item.id == part[2].id:
            raise error
        return right.letter(item)

    results = evaluate(Says(sometimes, "m"), part, out=tmp_path)
    table = results.table()
    assert table.errors["overall"] == 1 and table.accuracy["overall"] == 1 and table.n["overall"] == 5
    assert results.errors[0]["key"][1] == part[2].id and table.errors[part[2].category] == 1
    results.to_html(tmp_path / "page.html")
    assert part[2].id in (tmp_path / "page.html").read_text()
    save_result_txt(results, tmp_path)
    assert (tmp_path / "result.txt").read_text().splitlines()[2] == "2 3"
    right.name = "m"
    assert not evaluate(right, part, out=tmp_path).errors


CHILD = """
import os, sys, time
from collai.viabench.bench import evaluate, load_benchmark
from collai.viabench.observers import Reply

class Slow:
    name = "slow"
    def answer(self, image, prompt, options):
        with open(sys.argv[2] + "/log", "ab") as log:
            log.write(b".")
        while os.stat(sys.argv[2] + "/log").st_size >= 12:
            time.sleep(0.05)  # until it is killed
        return Reply("A", "A", None, 0.0)

evaluate(Slow(), load_benchmark(sys.argv[1]), out=sys.argv[2], workers=int(sys.argv[3]))
"""


def finished(out):
    """Number of replies in the store of a folder that another process writes."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{out}/replies.sqlite?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM cell").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_nine_loses_no_finished_reply(small, tmp_path, workers):
    part = small[:40]
    part.save(tmp_path / "b")
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "b"), str(out), str(workers)]
    env = os.environ | {"PYTHONPATH": str(Path(bench.__file__).parents[2])}
    child = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while not (finished(out) and (out / "log").stat().st_size >= 12):
        assert child.poll() is None, "the child ended early"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    slow = type("Slow", (), {"name": "slow", "answer": lambda self, *asked: (self.seen.append(1), Reply("A", "A", None, 0.0))[1], "seen": []})()
    kept = finished(out)
    results = evaluate(slow, part, out=out)
    assert [row["item"] for row in results.rows] == [item.id for item in part] and not results.errors
    assert kept and len(slow.seen) == 40 - kept, "what was finished is not asked again"


@pytest.mark.parametrize(("call", "text"), [
    (lambda b: evaluate(Says("A"), b, prompt="poem"), "prompt must be one of .*, got 'poem'"),
    (lambda b: evaluate(Says("A"), b, epochs=0), "epochs must be a whole number >= 1, got 0"),
    (lambda b: evaluate(Says("A"), b, workers=0), "workers must be a whole number >= 1, got 0"),
    (lambda b: evaluate(Says("A"), b, limit=0), "limit must be a whole number >= 1, got 0"),
    (lambda b: evaluate(Says("A"), b[:0]), "the benchmark has no item"),
    (lambda b: evaluate(Says("A"), b[:2]).table("colour"), "by must be 'category' or 'family', got 'colour'"),
    (lambda b: evaluate(Says("A"), b[:2]).compare(evaluate(Says("A"), b[4:6])), "no item with an answer in common"),
    (lambda b: to_inspect_task(b, "poem"), "prompt must be one of .*, got 'poem'"),
    (lambda b: save_result_txt(evaluate(Says("A"), b[:2]), "x.txt", on_invalid="E"), "on_invalid must be one of A, B, C, D, got 'E'"),
])
def test_bad_calls_are_refused(small, call, text):
    with pytest.raises(ValueError, match=text):
        call(small)


def test_something_that_does_not_answer_is_refused(small):
    with pytest.raises(TypeError, match="str has none"):
        evaluate("gpt", small)


# ---------------------------------------------------------------- scores

def mixed(items, name="mixed"):
    """A model that is right on about half of the items, by their ids."""
    right = truth(items)
    return Says(lambda item: right.letter(item) if sum(item.id.encode()) % 2 else chr(64 + len(item.options)), name)


def test_tables_equal_a_plain_recount(small):
    results = evaluate(mixed(small), small)
    table, families = results.table(), results.table("family")
    for group, frame in (("category", table), ("family", families)):
        for name in frame.index[:-1]:
            some = [item for item in small if getattr(item, group) == name]
            right = [sum(item.id.encode()) % 2 for item in some]
            assert frame.accuracy[name] == pytest.approx(np.mean(right)) and frame.n[name] == len(some)
            assert (frame.lo[name], frame.hi[name]) == pytest.approx(wilson(sum(right), len(some)))
    both = [all(sum(small[i].id.encode()) % 2 for i in pair) for pair in small.pairs()]
    assert table.pair["overall"] == pytest.approx(np.mean(both))
    assert table["shift"]["overall"] == pytest.approx(
        np.mean([sum(i.id.encode()) % 2 for i in small if not i.strength]) - np.mean([sum(i.id.encode()) % 2 for i in small if i.strength]))


def test_comparisons_equal_a_plain_recount(small):
    one, two = evaluate(mixed(small), small), evaluate(truth(small), small)
    table = one.compare([two, one])
    row, same = table.loc[("truth, direct", "overall")], table.loc[("mixed, direct", "overall")]
    wrong = sum(1 - sum(item.id.encode()) % 2 for item in small)
    assert (row.harm, row["help"], row.effect) == (0, wrong, pytest.approx(wrong / len(small))) and row.lo <= row.effect <= row.hi
    few = evaluate(mixed(small[:6]), small[:6]).compare(evaluate(truth(small), small[:6]))
    assert few.lo.isna().all() and few.effect.notna().all()
    assert row.p == mcnemar_exact(0, wrong) and (same.p, same.effect) == (1, 0)
    overall = table[table.index.get_level_values("category") == "overall"]
    assert list(overall.p_holm) == list(holm(list(overall.p)))
    others = table[table.index.get_level_values("category") != "overall"]
    assert list(others.p_holm) == list(holm(list(others.p))) and len(others) == 12
    back = two.compare(one).loc[("mixed, direct", "overall")]
    assert (back.harm, back["help"], back.p) == (row["help"], row.harm, row.p)


def test_runs_of_other_pictures_are_not_compared(small):
    other = build_benchmark(1, seed=1, categories=("color",))
    renamed = Benchmark([bench.replace(b, id=a.id) for a, b in zip(small[:3], other[:3], strict=True)])
    with pytest.raises(ValueError, match="different benchmarks"):
        evaluate(Says("A"), small[:3]).compare(evaluate(Says("A"), renamed))


def drawn(name, deltas, seeds, size=128):
    """Items of one family."""
    made = [render(name, strength=s, delta=d, seed=r, size=size) for s in (0.0, 1.0) for d in deltas for r in seeds]
    return Benchmark([bench._item(stimulus, f"{stimulus.seed}") for stimulus in made])


def test_psychometric_counts_replies_as_said():
    family = FAMILIES["mueller_lyer"]
    levels = (-0.2, -0.1, 0.0, 0.1, 0.2)
    items = drawn("mueller_lyer", levels, range(4))

    def eye(item):
        texts, bias = family.texts(item.seed), 0.06 * item.strength
        seen = item.delta + bias + (item.seed - 1.5) / 10
        return chr(65 + item.options.index(texts[family.answer_of(0.2 if seen > 0 else -0.2)]))

    fits = evaluate(Says(eye), items).psychometric("mueller_lyer")
    assert list(fits) == [0.0, 1.0] and fits[1.0].pse < fits[0.0].pse
    k = [sum(d + (r - 1.5) / 10 > 0 for r in range(4)) for d in levels]
    assert fits[0.0].pse == pytest.approx(fit_psychometric(np.array(levels), np.array(k), np.full(5, 4)).pse, abs=1e-6)
    equal = evaluate(Says(lambda item: chr(65 + item.options.index(family.texts(item.seed)[2]))), items)
    assert bench._more(items[0], equal.frame().letter[0]) == 0.5
    assert bench._counted({0.1: [0.5, 0.5, 0.5, 1.0], -0.1: [0.0, 0.0], 0.0: [0.5]}) == ([-0.1, 0.1], [0, 2], [2, 3])
    with pytest.raises(ValueError, match="at least 2 levels"):
        evaluate(Says(None), items).psychometric("mueller_lyer")
    with pytest.raises(KeyError, match="no item is of the family 'ponzo', there are mueller_lyer"):
        equal.psychometric("ponzo")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_a_more_and_a_less(name):
    family = FAMILIES[name]
    item = drawn(name, (0.0,), (0,), 256)[0]
    values = [bench._more(item, chr(65 + i)) for i in range(len(item.options))]
    assert values.count(1.0) == 1 and values.count(0.0) == 1 and values[-1] is None
    more = family.texts(0)[family.answer_of(family.delta_grid[-1])]
    assert bench._more(item, chr(65 + item.options.index(more))) == 1.0 and bench._more(item, None) is None


def test_mirage_gets_chains_and_items(small, monkeypatch):
    asked = []
    monkeypatch.setattr("collai.viabench.stats.mirage", lambda texts, items: asked.append((texts, items)) or {"n": len(texts)})
    assert evaluate(Says("A"), small[:5], prompt="cot", circular=True).mirage() == {"n": 5}
    assert asked == [(["Answer: A"] * 5, list(small[:5]))]


class Tags(html.parser.HTMLParser):
    """Collects tags."""

    def __init__(self):
        super().__init__()
        self.tags, self.asked = Counter(), []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.asked += [value for key, value in attrs if key in ("src", "href")]


def test_the_page_shows_replies_as_text(small, tmp_path):
    evil = '<script src="http://evil">alert(1)</script><img src=x onerror=alert(1)>'
    model = Says(lambda item: None, evil)
    model.answer = lambda image, prompt, options: Reply(evil, None, None, 0.0)
    evaluate(model, small[:20]).to_html(tmp_path / "page.html")
    page = Tags()
    page.feed((tmp_path / "page.html").read_text())
    assert not page.tags["script"] and page.tags["table"] == 2 and page.tags["img"] == page.tags["article"] > 0
    assert all(source.startswith("data:image/png;base64,") for source in page.asked)
    assert "&lt;script" in (tmp_path / "page.html").read_text()


def test_the_page_shows_pictures_of_the_challenge(tmp_path):
    made = real(tmp_path, QUIRKS)
    evaluate(Says(None), made).to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "data:image/webp;base64," in text and text.count("data:image/jpeg;base64,") == 2 and text.count("<article>") == 4


def test_the_answer_file_is_the_challenges(tmp_path):
    made = real(tmp_path, QUIRKS)
    letters = {"17": "B", "3": "D", "100": None, "0": "A"}
    model = Says(lambda item: letters[item.id], "my model")
    save_result_txt(evaluate(model, made), tmp_path / "deep/result.txt")
    assert (tmp_path / "deep/result.txt").read_text() == "0 0\n3 3\n17 1\n100 3\n"
    assert json.loads((tmp_path / "deep/model.json").read_text()) == {"model": "my model", "parameters": ""}
    with zipfile.ZipFile(tmp_path / "deep/result.zip") as packed:
        assert packed.namelist() == ["result.txt", "model.json"]
        assert packed.read("result.txt") == (tmp_path / "deep/result.txt").read_bytes()
    save_result_txt(evaluate(model, made, circular=True), tmp_path / "more", on_invalid="A")
    assert (tmp_path / "more/result.txt").read_text() == "0 0\n3 3\n17 1\n100 0\n"
    save_result_txt(evaluate(model, made), tmp_path / "again")
    assert (tmp_path / "again/result.zip").read_bytes() == (tmp_path / "deep/result.zip").read_bytes()


def test_a_letter_beyond_d_has_no_place_in_the_answer_file(tmp_path):
    entry = {"image_name": "1.png", "Question": "Which?", "option": "Option: \nA. a\nB. b\nC. c\nD. d\nE. e\n"}
    with pytest.raises(ValueError, match="the reply to 1 is E"):
        save_result_txt(evaluate(Says("E"), real(tmp_path, [entry])), tmp_path)


# ---------------------------------------------------------------- Inspect, measurement

class Chat:
    """A chat that says B, or something that can't be read."""

    name = "chat"

    def identity(self):
        return {"model": self.name}

    def bound(self, request):
        return TokenUsage(10_000, 8)

    def generate(self, requests):
        from collai.eval.llm import Reply as ChatReply

        return [ChatReply("Answer: B", "stop", TokenUsage(9, 3), [], None, self.name, 0.0, False) for _ in requests]

    async def agenerate(self, requests):
        return self.generate(requests)


def test_inspect_gives_the_same_scores(small, tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai")
    from collai.eval.inspect import chat_as_model

    part = small[:6]
    task = to_inspect_task(part)
    shown = json.dumps([str(sample.metadata) + str(sample.target) for sample in task.dataset])
    assert "answer" not in shown and "truth" not in shown
    [log] = inspect_ai.eval(task, model=chat_as_model(Chat()), log_dir=str(tmp_path), display="none")
    ours = evaluate(Says("B"), part).frame().set_index("item")
    assert len(log.samples) == 6
    for sample in log.samples:
        scores = sample.scores["score"].value
        expected = {name: ours[name][sample.id] for name in ("right", "fooled", "not_sure", "invalid")}
        assert scores == {name: value for name, value in expected.items() if value == value}
    assert all(sample.input[0].content[0].image.startswith("data:image/png;base64,") for sample in to_inspect_task(part).dataset)


def test_the_measurement_gives_rows_for_a_results_file(small, monkeypatch):
    monkeypatch.setattr(bench, "build_benchmark", lambda: small)
    monkeypatch.setattr(bench, "_models", lambda items: [("one", truth(items), "direct"), ("two", Says("A"), "cot")])
    monkeypatch.setattr(bench, "_endpoint", lambda items: {"name": "bench/endpoint", "n": len(items)})
    rows = {row["name"]: row for row in bench.measure("cpu", n=4)}
    assert rows["board/one/overall"]["measured"] == 1 and rows["board/two/motion"]["n"] > 0
    assert rows["bench/constant"]["unit"] == "items/s" and rows["bench/endpoint"]["n"] == 4
    json.dumps(list(rows.values()), allow_nan=False)


def test_the_endpoint_is_asked_by_both_ways(small):
    row = bench._endpoint(small[:6], at_once=3, delay=0.0, rounds=1)
    assert row["n"] == 6 and row["measured"] > 0


def test_results_can_be_made_of_stored_rows(small):
    whole = evaluate(Says("A"), small[:4])
    assert Results(whole.items, "m", "direct", whole.rows, []).table().equals(whole.table()) and "direct" in PROMPTS


# ---- what users ran into

class Told:
    """Answers with one letter, or with whatever it was given."""

    def __init__(self, says):
        self.says = says

    def answer(self, image, prompt, options):
        return Reply(self.says, self.says) if isinstance(self.says, str) else self.says


def test_replies_of_a_model_that_does_not_tell_its_settings_are_taken_over_with_a_warning(tmp_path):
    class Tells(Told):
        def identity(self):
            return {"says": self.says}
    some = build_benchmark(24)
    rows = [evaluate(Tells(letter), some, limit=4, out=tmp_path).rows for letter in "AB"]
    assert [{row["letter"] for row in one} for one in rows] == [{"A"}, {"B"}]
    evaluate(Told("A"), some, limit=4, out=tmp_path)
    with pytest.warns(UserWarning, match="replies of an earlier Told are taken over"):
        assert evaluate(Told("B"), some, limit=4, out=tmp_path).rows[0]["letter"] == "A"


def test_an_unread_reply_is_none_in_the_frame_and_no_opinion_in_a_curve():
    some = Benchmark([item for item in build_benchmark(360) if item.family == "ponzo"])
    silent = evaluate(Told(Reply("?", None)), some)
    assert list(silent.frame().letter) == [None] * len(some)
    with pytest.raises(ValueError, match="at least 2 levels"):
        silent.psychometric("ponzo")


def test_two_runs_of_one_name_are_both_compared():
    some = build_benchmark(24)
    one, two, three = (evaluate(Told(letter), some) for letter in "ABC")
    table = one.compare([two, three])
    assert len(table) == 2 * len(one.compare(two)) and table.index.get_level_values(0).nunique() == 2


def test_a_surrogate_in_a_reply_can_be_written(tmp_path):
    found = evaluate(Told(Reply("nice \ud83d A", "A")), build_benchmark(24), limit=2, out=tmp_path)
    found.to_html(tmp_path / "r.html")
    assert found.rows[0]["text"] == "nice ? A"


@pytest.mark.parametrize("said", [None, 3])
def test_what_is_no_reply_is_named(said):
    with pytest.raises(TypeError, match="answer must return a Reply, got"):
        evaluate(Told(said), build_benchmark(24), limit=1)


def test_a_class_and_what_can_not_be_sent_are_named():
    some = build_benchmark(24)
    with pytest.raises(TypeError, match="got the class Told"):
        evaluate(Told, some)
    locked = Told("A")
    locked.lock = threading.Lock()
    with pytest.raises(TypeError, match="Told can't be sent to 2 worker processes"):
        evaluate(locked, some, workers=2, limit=2)


def test_a_batch_that_fails_costs_only_those_that_fail():
    some, asked = build_benchmark(40), []

    class Batches(Told):
        def answers(self, images, prompts, options):
            asked.append(len(images))
            if any(prompt == bad for prompt in prompts):
                raise TimeoutError("too long")
            return [Reply("A", "A")] * len(images)
    bad = compose(some[5].question, some[5].options, "direct")
    alike = sum(compose(item.question, item.options, "direct") == bad for item in some)
    found = evaluate(Batches("A"), some)
    assert (len(found.errors), len(found.rows)) == (alike, len(some) - alike) and len(asked) > 1


@pytest.mark.parametrize(("entry", "message"), [
    ({"option": "Option: \nA. Yes\nB. No\n(C) Not Sure\n"}, r"not like 'A. Yes', got '\(C\) Not Sure'"),
    ({"option": "A. Yes,\n  really\nB. No"}, "not like 'A. Yes', got '  really'"),
    ({"Question": "Question:\n"}, "has no Question"),
    ({"image_name": "2.png"}, r"the picture can't be read \(UnidentifiedImageError\)"),
])
def test_entries_that_can_not_be_read_whole_are_refused(tmp_path, entry, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("junk")
    good = {"image_name": "1.png", "Question": "Q?", "option": "Option: A. Yes\nB. No\n"}
    (tmp_path / "val.json").write_text("\ufeff" + json.dumps([good]), encoding="utf-8")
    assert load_datacv(tmp_path / "val.json", tmp_path)[0].options == ["Yes", "No"]
    (tmp_path / "val.json").write_text(json.dumps([good | entry]))
    with pytest.raises(ValueError, match=message):
        load_datacv(tmp_path / "val.json", tmp_path)
    with pytest.raises(ValueError, match="holds no JSON in UTF-8"):
        load_datacv(tmp_path / "2.png", tmp_path)


def test_pictures_of_one_name_are_not_saved_over_each_other(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "2.png")
    (tmp_path / "val.json").write_text(json.dumps([{"image_name": "2.png", "Question": "Q?", "option": "A. Yes\nB. No"}]))
    both = Benchmark([*load_datacv(tmp_path / "val.json", tmp_path), *build_benchmark(24)])
    with pytest.raises(ValueError, match=r"two items want the picture 2\.png"):
        both.save(tmp_path / "saved")
