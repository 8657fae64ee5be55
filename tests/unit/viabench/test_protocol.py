"""Prompts, the reader of replies, circular and grouped accuracy."""
import json
import re
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collai.viabench.protocol import (
    PROMPTS,
    circular_accuracy,
    circular_variants,
    compose,
    extract_choice,
    message,
    pair_accuracy,
    prompt_hash,
)

ROWS = [json.loads(line) for line in (Path(__file__).parents[3] / "nbs/viabench/results/replies.jsonl").read_text(
    encoding="utf-8").splitlines()]
SIDES = ["The left one", "The right one", "They are equal", "Not Sure"]
YES_NO = ["Yes", "No", "Not Sure"]
texts = st.lists(st.text(st.characters(codec="ascii", exclude_characters="\n"), min_size=1).filter(
    lambda text: text.strip()), min_size=2, max_size=6, unique_by=str.strip)


def test_every_tuned_reply_is_read_rightly():
    rows = [row for row in ROWS if row["set"] == "tuned"]
    wrong = [(row["reply"], row["letter"], got) for row in rows
             if (got := extract_choice(row["reply"], row["options"])) != row["letter"]]
    assert len(rows) >= 150 and not wrong


def test_nine_of_ten_held_out_replies_are_read_rightly():
    rows = [row for row in ROWS if row["set"] == "held_out"]
    right = sum(extract_choice(row["reply"], row["options"]) == row["letter"] for row in rows)
    assert len(rows) >= 60 and right >= 0.9 * len(rows)


def test_no_reply_is_in_both_sets():
    keys = [(row["reply"], tuple(row["options"])) for row in ROWS]
    assert len(set(keys)) == len(keys)


@given(st.text(max_size=200), texts)
def test_any_text_gives_a_letter_of_the_options_or_none(reply, options):
    letter = extract_choice(reply, options)
    assert letter is None or letter in [chr(65 + i) for i in range(len(options))]
    assert extract_choice(reply, options) == letter


@given(st.lists(st.sampled_from(["the answer is", "A", "B", "C", "not", "or", ",", ".", "\n", "<think>", "</think>", "{", "}", '"answer":',
                                 "\\boxed{", "yes", "no", "选", "不", "是", "(", ")", "**", "if", "would", "but", "it is"]), max_size=25))
def test_any_order_of_its_own_words_is_survived(words):
    assert extract_choice(" ".join(words), YES_NO) in (None, "A", "B", "C")


@pytest.mark.parametrize("form", ["{}", "({})", "**{}**", "Answer: {}", "The answer is {}.", "\\boxed{{{}}}", '{{"answer": "{}"}}',
                                  "<think>A or B</think>{}", "答案是{}", "I choose option {}", "Final answer:\n\n{}", "not C; it is {}"])
@pytest.mark.parametrize("letter", ["A", "B", "D"])
def test_a_declared_letter_is_read_in_every_form(form, letter):
    assert extract_choice(form.format(letter), SIDES) == letter
    wide = chr(ord(letter) + 0xFEE0)
    assert extract_choice(form.format(wide), SIDES) == letter


@pytest.mark.parametrize("form", ["{}", "({})", "Answer: {}", "\\boxed{{{}}}", '{{"answer": "{}"}}', "答案是{}", "I choose {}."])
def test_a_letter_beyond_the_options_is_invalid(form):
    assert extract_choice(form.format("E"), SIDES) is None
    assert extract_choice(form.format("D"), YES_NO) is None


def test_an_option_text_alone_is_its_letter():
    for options in (SIDES, YES_NO, ["5", "6", "16", "Not Sure"], ["Parallel", "Not parallel", "Not Sure"], ["(3,5)", "(5,3)", "Not Sure"],
                    ["A is longer", "B is longer", "They are equal"], ["是", "否", "不确定"], ["Square 1", "Square 2", "Both are equally light"]):
        for order in permutations(options):
            for i, text in enumerate(order):
                assert extract_choice(text, list(order)) == chr(65 + i), (text, order)
                assert extract_choice(f"Answer: {text}", list(order)) == chr(65 + i), (text, order)
                assert extract_choice(f"{chr(65 + i)}. {text}", list(order)) == chr(65 + i), (text, order)


def test_renaming_letters_renames_the_choice():
    six = [f"text {word}" for word in ("ka", "lo", "mi", "nu", "pe", "ru")]
    for reply in ("The answer is B. Wait, no: it is C.", "D is wrong, E is right.", "Neither B nor C, so E.", "B rather than C"):
        for order in permutations("BCDE"):
            name = dict(zip("BCDE", order, strict=True))
            turned = re.sub(r"(?<![A-Za-z])[B-E](?![A-Za-z])", lambda hit, name=name: name[hit[0]], reply)
            assert extract_choice(turned, six) == name[extract_choice(reply, six)]


def test_a_long_chain_is_read_in_one_pass():
    chain = "The left line spans 41 px, so A is too short, and B is not longer. " * 300
    assert extract_choice(chain + "Answer: C", SIDES) == "C"


@pytest.mark.parametrize(("options", "text"), [(["Yes"], r"options must be 2 to 26 texts, got \['Yes'\]"), ([], "2 to 26 texts"),
                                               (["Yes", "Yes"], "options must differ, got duplicated texts in"),
                                               (["Yes", 3], "options must be texts"), ([str(i) for i in range(27)], "2 to 26 texts")])
def test_bad_options_are_refused(options, text):
    for call in (lambda: extract_choice("A", options), lambda: message("Is it?", options), lambda: circular_variants(options, "A")):
        with pytest.raises(ValueError, match=text):
            call()


def test_a_reply_must_be_a_string():
    with pytest.raises(TypeError, match="reply must be a string, got NoneType"):
        extract_choice(None, YES_NO)


def test_the_message_has_the_form_of_the_challenge():
    assert message("Is it?", YES_NO) == "Is it?\nOption: \nA. Yes\nB. No\nC. Not Sure\n"
    for name, instruction in PROMPTS.items():
        assert compose("Is it?", YES_NO, name) == message("Is it?", YES_NO) + instruction
    assert PROMPTS["direct"] == "Reply with the letter only."


def test_prompts_have_their_own_hashes(monkeypatch):
    hashes = {name: prompt_hash(name) for name in PROMPTS}
    assert len(set(hashes.values())) == len(PROMPTS) and all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes.values())
    monkeypatch.setitem(PROMPTS, "cot", PROMPTS["cot"] + " Please.")
    assert prompt_hash("cot") != hashes["cot"] and prompt_hash("direct") == hashes["direct"]
    with pytest.raises(ValueError, match="prompt must be one of direct, .*got 'zen'"):
        prompt_hash("zen")


@given(texts, st.data())
def test_every_option_visits_every_place_once(options, data):
    at = data.draw(st.integers(0, len(options) - 1))
    before = list(options)
    variants = circular_variants(options, chr(65 + at))
    assert options == before and variants[0] == (before, chr(65 + at))
    for r, (shown, letter) in enumerate(variants):
        assert shown == before[len(before) - r:] + before[:len(before) - r]
        assert shown[ord(letter) - 65] == before[at]
    assert sorted(letter for _, letter in variants) == [chr(65 + i) for i in range(len(options))]


@pytest.mark.parametrize("answer", ["D", "a", "", None])
def test_a_right_letter_beyond_the_options_is_refused(answer):
    with pytest.raises(ValueError, match=f"answer must be one of A, B, C, got {answer!r}"):
        circular_variants(YES_NO, answer)


def test_a_constant_answerer_has_no_circular_accuracy():
    for constant in "ABCD":
        groups = {right: [letter == constant for _, letter in circular_variants(SIDES, right)] for right in "ABCD"}
        assert circular_accuracy(groups) == 0.0
    assert circular_accuracy({1: [True, True], 2: [True, False]}) == 0.5


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1))
def test_labels_and_tuples_of_indices_agree(replies):
    right, labels = [flag for flag, _ in replies], [label for _, label in replies]
    groups = [tuple(i for i, one in enumerate(labels) if one == label) for label in sorted(set(labels))]
    by_label = pair_accuracy(right, labels)
    assert by_label == sum(all(right[i] for i in group) for group in groups) / len(groups)
    if len(groups) != len(right):
        assert pair_accuracy(right, groups) == by_label


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="groups must hold at least one group"):
        circular_accuracy({})
    with pytest.raises(ValueError, match="every group needs at least one reply, got none for 'x'"):
        circular_accuracy({"x": []})
    with pytest.raises(ValueError, match=r"groups must be 2 labels or tuples of indices below 2, got \(0, 2\)"):
        pair_accuracy([True, False], [(0, 2)])
    with pytest.raises(ValueError, match="groups must hold at least one group"):
        pair_accuracy([], [])
