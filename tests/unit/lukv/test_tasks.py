"""Properties of `collai.lukv.tasks`: the format to the letter, and scores equal to second implementations."""

import json
import math
import re
import string
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import jieba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import zeta
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from collai.lukv import tasks
from collai.lukv.tasks import (
    LONGBENCH_NEW_TOKENS,
    RULER_NEW_TOKENS,
    load_longbench,
    longbench_average,
    longbench_e_score,
    longbench_score,
    ruler_score,
    ruler_task,
    split_context,
)

quickly = settings(deadline=None, derandomize=True, max_examples=60)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLES = [name for name in RULER_NEW_TOKENS if name.startswith("niah")]
ELEVEN = [*NEEDLES, "vt", "cwe", "fwe"]
ESSAY = "The river was high. Nobody crossed it that week! Was it the rain? We waited, read, and slept. "
seeds = st.integers(0, 2**32 - 1)


class Characters:
    """One token a character."""

    def encode(self, text, add_special_tokens=False):
        assert add_special_tokens is False
        return list(text)


class Words:
    """One token a word, digit or mark."""

    def encode(self, text, add_special_tokens=False):
        return re.findall(r"\s?[^\W\d]+|\S|\s", text)


@pytest.fixture(scope="module")
def bpe():
    """Byte-pair tokens learned from the tasks themselves, digits apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    texts = ["".join(sample(name, i, 60)[::2]) for name in ELEVEN for i in range(20)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return tokenizer


def sample(name, seed, units, essay=None, max_seq_length=1024):
    return tasks._sample(name, np.random.default_rng(seed), units, essay, max_seq_length)


def split(name, seed, units, essay=None):
    text, outputs, prefix = sample(name, seed, units, essay)
    context, question, start = split_context({"input": text, "answer_prefix": prefix})
    assert start == prefix and context + question == text
    return context, question, prefix, outputs


# --- the wording

WORDING = {
    ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2"): (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        r"What is the special magic number for ([\w' -]+) mentioned in the provided text\?",
        r" The special magic number for ([\w' -]+) mentioned in the provided text is",
        r"[1-9]\d{6}",
    ),
    ("niah_single_3", "niah_multikey_3"): (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n",
        r"What is the special magic uuid for ([\w' -]+) mentioned in the provided text\?",
        r" The special magic uuid for ([\w' -]+) mentioned in the provided text is",
        r"[0-9a-f-]{36}",
    ),
    ("niah_multivalue", "niah_multiquery"): (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n",
        r"What are all the special magic numbers for ([\w' ,-]+) mentioned in the provided text\?",
        r" The special magic numbers for ([\w' ,-]+) mentioned in the provided text are",
        r"[1-9]\d{6}",
    ),
    ("vt",): (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        r"Question: Find all variables that are assigned the value (\d{5}) in the text above\.",
        r" Answer: According to the chain\(s\) of variable assignment in the text above, "
        r"5 variables are assigned the value (\d{5}), they are: ",
        r"[A-Z]{5}",
    ),
    ("cwe",): (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n1. ",
        r"Question: What are the 10 most common words in the above list\?()",
        r" Answer: The top 10 words that appear most often in the list are:()",
        r"[\w' -]+",
    ),
    ("fwe",): (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. ",
        r"Question: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. "
        r"What are the three most frequently appeared words in the above coded text\?()",
        r" Answer: According to the coded text above, the three most frequently appeared words are:()",
        r"[a-z]{6}",
    ),
}


@pytest.mark.parametrize("name", ELEVEN)
@given(seed=seeds, units=st.integers(53, 90), with_essay=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=12)
def test_a_record_is_worded_as_in_the_benchmark(name, seed, units, with_essay):
    opening, question_form, prefix_form, answer_form = next(v for k, v in WORDING.items() if name in k)
    context, question, prefix, outputs = split(name, seed, units, ESSAY if with_essay else None)
    assert context.startswith(opening) and context.endswith("\n") and not context.endswith("\n\n")
    asked, repeated = re.fullmatch(question_form, question), re.fullmatch(prefix_form, prefix)
    assert asked and repeated and asked[1] == repeated[1]
    assert all(re.fullmatch(answer_form, answer) for answer in outputs)
    assert all(answer in context for answer in outputs)
    if name != "cwe":
        assert not any(answer in question + prefix for answer in outputs)
    assert (
        len(set(outputs))
        == len(outputs)
        == {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(name, 1)
    )


def needles_of(text):
    return re.findall(r"One of the special magic (numbers|uuids) for ([\w' -]+) is: ([\w-]+)\.", text)


@pytest.mark.parametrize("name", NEEDLES)
@given(seed=seeds, units=st.integers(4, 60), with_essay=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=15)
def test_needles_belong_to_the_keys_and_haystacks_are_whole(name, seed, units, with_essay):
    context, question, _, outputs = split(name, seed, units, ESSAY if with_essay else None)
    needles = needles_of(context)
    keys, values = [key for _, key, _ in needles], [value for _, _, value in needles]
    query = re.search(r" for ([\w' ,-]+) mentioned", question)[1]
    asked = query.replace(", and ", ", ").split(", ")
    assert [
        value
        for key in asked
        for _, owner, value in sorted(needles, key=lambda x: outputs.index(x[2]) if x[2] in outputs else 99)
        if owner == key
    ] == outputs
    assert len(set(values)) == len(values)
    body = context.split("\n", 1)[1][:-1]
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert len(set(keys)) == len(needles) == units + 1 == len(body.split("\n"))
    else:
        shape = {"niah_multikey_1": (4, 4), "niah_multivalue": (4, 1), "niah_multiquery": (4, 4)}.get(name, (1, 1))
        assert (len(needles), len(set(keys))) == shape
        hay = re.sub(r"One of the special magic [^\n]*? is: [\w-]+\.(\n| |$)", "", body)
        if with_essay and name != "niah_single_1":
            assert hay.split() == (ESSAY * 60).split()[:units] and "\n" not in body
        else:
            assert hay.strip("\n").split("\n") == [NOISE] * units and body.endswith(NOISE)
    kind = "uuids" if name in ("niah_single_3", "niah_multikey_3") else "numbers"
    assert {found for found, _, _ in needles} == {kind}
    if name == "niah_multikey_3":
        assert all(
            re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", x)
            for x in keys + values
        )


def test_keys_are_an_adjective_and_a_noun_of_the_package():
    from wonderwords import Defaults, RandomWord

    lists = RandomWord(nouns=Defaults.NOUNS, adjectives=Defaults.ADJECTIVES)._categories
    adjectives, nouns = set(lists["adjectives"]), set(lists["nouns"])
    found = {key for seed in range(20) for _, key, _ in needles_of(sample("niah_multikey_2", seed, 40)[0])}
    assert len(found) > 800
    assert all(
        any(key[: m.start()] in adjectives and key[m.end() :] in nouns for m in re.finditer("-", key)) for key in found
    )
    firsts = Counter(key[0] for key in found)
    assert len(firsts) > 18  # drawn from the whole alphabet


def test_several_queries_are_joined_by_commas_and_and():
    _, question, prefix, _ = split("niah_multiquery", 3, 5)
    assert re.search(r"for [\w' -]+, [\w' -]+, [\w' -]+, and [\w' -]+ mentioned", question)
    assert re.search(r"for [\w' -]+, [\w' -]+, [\w' -]+, and [\w' -]+ mentioned", prefix)


def test_needles_stand_everywhere_in_the_noise():
    lines = [split("niah_single_1", seed, 8)[0].split("\n")[1:-1] for seed in range(400)]
    places = Counter(next(i for i, line in enumerate(part) if "magic" in line) for part in lines)
    assert set(places) == set(range(8)) and min(places.values()) > 25


def test_essay_needles_stand_at_the_forty_depths_between_sentences():
    essay = " ".join(f"Sentence number {i}." for i in range(1000))
    depths = np.round(np.linspace(0, 100, 40)).astype(int)
    allowed = {int(1000 * depth / 100) for depth in depths}
    seen = set()
    for seed in range(150):
        context = split("niah_multivalue", seed, 3000, essay)[0]
        before = [len(re.findall("Sentence", context[: m.start()])) for m in re.finditer("One of the", context)]
        assert len(set(before)) == 4 and set(before) <= allowed
        seen |= set(before)
    assert seen == allowed and len(allowed) == 40


def test_an_essay_in_chinese_and_one_without_sentences_are_hidden_in_too():
    for essay in ("河水很高。 没有人过河！ 是雨吗？", "no end of it " * 9):
        context, _, _, outputs = split("niah_multiquery", 1, 30, essay)
        assert all(value in context for value in outputs) and needles_of(context)


@given(seed=seeds, units=st.integers(5, 50))
@quickly
def test_the_chain_is_in_order_and_carries_the_value(seed, units):
    context, question, _, outputs = split("vt", seed, units)
    lines = context.split("\n\n", 1)[1][:-1].split("\n")
    chain = [line for line in lines if line != NOISE]
    value = re.search(r"value (\d{5}) ", question)[1]
    assert lines.count(NOISE) == units and lines[-1] == NOISE
    assert chain == [f"VAR {outputs[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in pairwise(outputs)]


@pytest.mark.parametrize(
    ("limit", "example", "often", "seldom"), [(4095, (20, 3, 1), 6, 1), (4096, (40, 10, 3), 30, 3)]
)
def test_common_words_stand_as_often_as_the_format_says(limit, example, often, seldom):
    text, outputs, prefix = sample("cwe", 5, 70, max_seq_length=limit)
    solved, asked = text.split("?" + prefix)
    answer, rest = asked.split("\nBelow", 1)

    def count(part):
        items = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", part)
        assert [int(i) for i, _ in items] == list(range(1, len(items) + 1))
        return Counter(word for _, word in items)

    shown, listed = count(solved.split("\n")[1]), count(rest.split("\n")[1])
    words, high, low = example
    assert Counter(shown.values()) == {high: 10, low: words - 10}
    assert {word for word, c in shown.items() if c == high} == set(count(answer))
    assert Counter(listed.values()) == {often: 10, seldom: 60}
    assert {word for word, c in listed.items() if c == often} == set(outputs)
    assert set(listed) <= set(tasks._words()[2])


@given(seed=seeds, units=st.integers(53, 3000), limit=st.integers(250, 9000))
@quickly
def test_coded_words_follow_the_zeta_law(seed, units, limit):
    text, outputs, _ = sample("fwe", seed, units, max_seq_length=limit)
    words = Counter(text.split("coded words. ")[1].split("\nQuestion")[0].split(" "))
    expected = [c for k in range(1, limit // 50 + 1) if (c := math.floor(units * k**-2.0 / zeta(2.0)))]
    assert sorted(words.values(), reverse=True) == expected
    assert [word for word, _ in words.most_common(4)] == ["...", *outputs]
    assert words[outputs[2]] > max((c for word, c in words.items() if word not in ("...", *outputs)), default=0)


@pytest.mark.parametrize("name", ELEVEN)
def test_a_longer_record_has_the_same_question_and_a_longer_text(name):
    short, long = (split(name, 11, units) for units in (60, 61))
    assert short[1:] == long[1:]  # same draws: question, prefix and answers do not depend on the units
    assert len(short[0]) <= len(long[0])
    assert split(name, 12, 60)[3] != short[3]


def test_draws_are_distinct_and_the_first_do_not_depend_on_how_many():
    """Three hundred draws from 676 two-letter words repeat for certain."""

    def draw(seed, n):
        rng = np.random.default_rng(seed)
        return tasks._distinct(lambda m: tasks._letters(string.ascii_lowercase, 2, rng, m), n)

    for seed in range(5):
        words = draw(seed, 300)
        assert len(set(words)) == len(words) == 300 and all(re.fullmatch("[a-z]{2}", word) for word in words)
        assert draw(seed, 7)[:5] == words[:5]


def test_needles_are_asked_for_in_another_order_than_they_stand():
    orders = Counter()
    for seed in range(120):
        context, _, _, outputs = split("niah_multiquery", seed, 10)
        orders[tuple(outputs.index(value) for _, _, value in needles_of(context))] += 1
    assert len(orders) > 20  # of the 24 orders
    values = [split("niah_multivalue", seed, 10) for seed in range(60)]
    assert len({tuple(outputs.index(v) for _, _, v in needles_of(context)) for context, _, _, outputs in values}) > 15


# --- the split


def test_the_last_question_counts_and_nothing_is_lost():
    rec = {
        "input": "What is the special magic x\nQuestion: Find all variables\nQuestion: Find all variables!",
        "answer_prefix": " A",
    }
    assert split_context(rec) == (
        "What is the special magic x\nQuestion: Find all variables\n",
        "Question: Find all variables!",
        " A",
    )
    for wording in (
        "What is the special magic",
        "What are all the special magic",
        "Question: What are the 10 most common",
        "Question: Do not provide any explanation.",
        "Answer the question based on the given documents.",
    ):
        assert split_context({"input": f"水 {wording} more", "answer_prefix": ""}) == ("水 ", f"{wording} more", "")
    with pytest.raises(ValueError, match="no question found in input 'no'"):
        split_context({"input": "no", "answer_prefix": ""})


# --- records of a length


@given(top=st.integers(1, 400), start=st.integers(0, 500), high=st.integers(2, 600))
@quickly
def test_the_search_finds_the_largest_that_fits(top, start, high):
    seen = []
    found = tasks._largest(lambda n: (seen.append(n), n <= top)[1], 1, high, start)
    assert found == min(top, high - 1) and all(1 < n < high for n in seen)
    assert len(seen) <= 2 * math.ceil(math.log2(abs(found - start) + 2))


@given(heights=st.lists(st.integers(0, 9), min_size=2, max_size=40), start=st.integers(0, 45))
@quickly
def test_the_search_ends_before_a_misfit_whatever_the_lengths(heights, start):
    heights[0] = 0
    found = tasks._largest(lambda n: heights[n] <= 5, 0, len(heights), start)
    assert heights[found] <= 5 and (found + 1 == len(heights) or heights[found + 1] > 5)


@pytest.mark.parametrize("name", ELEVEN)
def test_a_record_is_as_long_as_the_limit_allows(name):
    """Counted without the search: one unit more would not fit, for a tokenizer that adds up."""
    number = list(RULER_NEW_TOKENS).index(name)
    for tokenizer, limit in ((Characters(), 2600), (Words(), 1000)):
        for record in ruler_task(name, tokenizer, limit, 2, 7):

            def length(units, record=record, tokenizer=tokenizer, limit=limit):
                made = tasks._sample(name, np.random.default_rng([7, number, record["index"]]), units, None, limit)
                return len(tokenizer.encode("".join(made[::2]))) + RULER_NEW_TOKENS[name]

            first = {
                "fwe": 53,
                "cwe": 10,
                "vt": 5,
                "niah_multikey_1": 4,
                "niah_multivalue": 4,
                "niah_multiquery": 4,
            }.get(name, 1)
            units = first
            while length(units + 1) <= limit:
                units += 1
            assert record["length"] == length(units) <= limit


@pytest.mark.parametrize("name", ELEVEN)
def test_records_are_exact_for_a_learned_tokenizer(name, bpe):
    made = ruler_task(name, bpe, 1400, 3, 3)
    assert [record["index"] for record in made] == [0, 1, 2]
    for record in made:
        assert list(record) == ["index", "input", "outputs", "length", "answer_prefix"]
        tokens = len(bpe.encode(record["input"] + record["answer_prefix"], add_special_tokens=False))
        assert 0.85 * 1400 < record["length"] == tokens + RULER_NEW_TOKENS[name] <= 1400
        context, question, prefix = split_context(record)
        assert context + question == record["input"] and prefix == record["answer_prefix"]
        assert ruler_score(name, [" and ".join(record["outputs"])], [record["outputs"]]) == 100.0
        assert json.loads(json.dumps(record)) == record
    assert made == ruler_task(name, bpe, 1400, 3, 3)
    assert made[:1] == ruler_task(name, bpe, 1400, 1, 3)
    other = ruler_task(name, bpe, 1400, 3, 4)
    assert all(a["outputs"] != b["outputs"] for a, b in zip(made, other, strict=True))
    assert len({tuple(record["outputs"]) for record in made}) == 3


def test_records_are_exact_for_the_tokenizer_of_the_small_model():
    shipped = Tokenizer.from_file(str(files("collai.lukv") / "data" / "tokenizer.json"))
    for name in ELEVEN:
        (record,) = ruler_task(name, shipped, 1024, 1, 2)
        tokens = len(shipped.encode(record["input"] + record["answer_prefix"], add_special_tokens=False).ids)
        assert 900 < record["length"] == tokens + RULER_NEW_TOKENS[name] <= 1024


def test_words_of_a_list_are_not_more_than_the_package_has():
    class Constant:
        def encode(self, text, add_special_tokens=False):
            return []

    (record,) = ruler_task("cwe", Constant(), 121, 1, 0)
    assert len(Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", record["input"].split("\n")[-2]))) == len(
        tasks._words()[2]
    )


def test_an_essay_is_a_text_or_a_file(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text(ESSAY, encoding="utf-8")
    made = [ruler_task("niah_single_3", Words(), 700, 2, 0, essay=e) for e in (ESSAY, path, str(path))]
    assert made[0] == made[1] == made[2] and "river" in made[0][0]["input"]
    assert ruler_task("niah_single_1", Words(), 700, 1, 0, essay="x") == ruler_task("niah_single_1", Words(), 700, 1, 0)
    with pytest.raises(FileNotFoundError):
        ruler_task("niah_single_3", Words(), 700, 1, 0, essay=str(path) + "x")
    for empty in ("", " \n "):
        with pytest.raises(ValueError, match="the essay is empty"):
            ruler_task("niah_single_3", Words(), 700, 1, 0, essay=empty)


@pytest.mark.parametrize("name", ["niah", "NIAH_single_1", "", "lcc"])
def test_unknown_ruler_tasks_list_the_known_ones(name):
    for call in (lambda: ruler_task(name, Words(), 1024, 1, 0), lambda: ruler_score(name, ["a"], [["a"]])):
        with pytest.raises(KeyError, match="unknown RULER task") as caught:
            call()
        assert all(known in str(caught.value) for known in (*ELEVEN, "qa_1", "qa_2"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("niah_single_1", 150, 1), "max_seq_length=150 is too short for niah_single_1: its shortest record has "),
        (("fwe", 249, 1), "fwe needs max_seq_length >= 250 for its vocabulary, got 249"),
        (("vt", 1024, 0), "n must be positive, got 0"),
        (("vt", 1024, -3), "n must be positive, got -3"),
        (("qa_1", 1024, 1), "qa_1 needs the path of its SQuAD file as essay"),
        (("qa_2", 1024, 1), "qa_2 needs the path of its HotpotQA file as essay"),
    ],
)
def test_impossible_records_are_refused(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ruler_task(arguments[0], Words(), arguments[1], arguments[2], 0)
    with pytest.raises(ValueError, match="5 needles need at least as many haystack units, got 4"):
        sample("vt", 0, 4)


# --- question answering


@pytest.fixture
def squad(tmp_path):
    data = [
        {
            "title": f"T{a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {a}.{p} tells of thing {a}{p} 在.",
                    "qas": [
                        {
                            "question": f"What does {a}.{p} tell?",
                            "answers": [{"text": f"thing {a}{p}"}, {"text": "THE THING"}],
                            "is_impossible": False,
                        },
                        {"question": "impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(3)
            ],
        }
        for a in range(4)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


@pytest.fixture
def hotpot(tmp_path):
    data = [
        {
            "question": f"Which is {q}?",
            "answer": f"answer{q}",
            "context": [
                [f"Title {q}{i}", [f"First of {q}{i}. ", f"It holds answer{q}." if i == 3 else "More."]]
                for i in range(5)
            ],
        }
        for q in range(4)
    ]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def documents_of(record):
    context = split_context(record)[0]
    return re.findall(r"Document (\d+):\n(.*?)(?=\n\nDocument |\n\n$)", context, re.DOTALL)


RULES = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def test_squad_questions_come_in_order_with_their_own_paragraph(squad):
    made = ruler_task("qa_1", Words(), 200, 12, 5, essay=squad)
    for i, record in enumerate(made):
        a, p = divmod(i, 3)
        context, question, prefix = split_context(record)
        assert record["outputs"] == [f"thing {a}{p}", "THE THING"] and prefix == " Answer:"
        assert context.startswith(RULES + "\n\nThe following are given documents.\n\nDocument 1:\n")
        assert question == f"{RULES}\n\nQuestion: What does {a}.{p} tell?"
        documents = documents_of(record)
        assert [int(n) for n, _ in documents] == list(range(1, len(documents) + 1)) and 3 <= len(documents) < 12
        assert len({text for _, text in documents}) == len(documents)
        same = [text for _, text in documents if text.startswith(f"Paragraph {a}.")]
        assert len(same) == 3 and f"Paragraph {a}.{p} tells of thing {a}{p} 在." in same  # the article before others
        assert record["length"] == len(Words().encode(record["input"] + " Answer:")) + 32 <= 200
    assert [documents_of(r)[0] for r in made] != [
        documents_of(r)[0] for r in ruler_task("qa_1", Words(), 200, 12, 6, essay=squad)
    ]
    assert made[:3] == ruler_task("qa_1", Words(), 200, 3, 5, essay=str(squad))


def test_a_question_alone_has_its_paragraph_only_and_few_documents_repeat(squad):
    rng = np.random.default_rng(0)
    documents, asked = tasks._read_qa("qa_1", squad)
    assert len(documents) == len(asked) == 12
    text, _, prefix = tasks._qa(documents, asked, rng, 1, 4)
    assert [d for _, d in documents_of({"input": text, "answer_prefix": prefix})] == [
        "Paragraph 1.1 tells of thing 11 在."
    ]
    text, _, prefix = tasks._qa(documents, asked, rng, 24, 4)
    assert Counter(Counter(d for _, d in documents_of({"input": text, "answer_prefix": prefix})).values()) == {2: 12}


def test_hotpot_questions_bring_all_their_paragraphs(hotpot):
    for i, record in enumerate(ruler_task("qa_2", Words(), 330, 4, 0, essay=hotpot)):
        texts = [text for _, text in documents_of(record)]
        assert record["outputs"] == [f"answer{i}"]
        for j in range(5):
            assert f"Title {i}{j}\nFirst of {i}{j}. " + (f"It holds answer{i}." if j == 3 else "More.") in texts
        assert ruler_score("qa_2", [f"It is ANSWER{i}"], [record["outputs"]]) == 100.0


def test_other_files_are_refused(squad, hotpot, tmp_path):
    for name, path, kind in (("qa_1", hotpot, "SQuAD"), ("qa_2", squad, "HotpotQA")):
        with pytest.raises(ValueError, match=f"is not a {kind} file: "):
            ruler_task(name, Words(), 400, 1, 0, essay=path)
    with pytest.raises(ValueError, match=r"squad.json has 12 questions, fewer than n=13"):
        ruler_task("qa_1", Words(), 400, 13, 0, essay=squad)
    (tmp_path / "cut.json").write_text('{"data": [')
    with pytest.raises(ValueError, match="is not a SQuAD file"):
        ruler_task("qa_1", Words(), 400, 1, 0, essay=tmp_path / "cut.json")
    with pytest.raises(FileNotFoundError):
        ruler_task("qa_1", Words(), 400, 1, 0, essay=tmp_path / "none.json")


# --- RULER's score

texts = st.text(alphabet="abAB 12é水\n", max_size=12)


@given(pairs=st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1, max_size=5))
@quickly
def test_ruler_score_is_the_mean_of_what_is_found(pairs):
    preds, refs = [p for p, _ in pairs], [r for _, r in pairs]
    found = [[r.casefold() in p.casefold() for r in ref] for p, ref in zip(preds, refs, strict=True)]
    assert ruler_score("vt", preds, refs) == pytest.approx(100 * np.mean([np.mean(f) for f in found]), abs=0.0051)
    assert ruler_score("qa_2", preds, refs) == pytest.approx(100 * np.mean([max(f) for f in found]), abs=0.0051)


@pytest.mark.parametrize(
    ("task", "preds", "refs", "points"),
    [
        ("niah_multivalue", ["1 2 3"], [["1", "2", "3", "4"]], 75.0),
        ("niah_single_3", ["ABCDEF-12"], [["abcdef-12"]], 100.0),
        ("qa_1", ["1912"], [["1911", "1912"]], 100.0),
        ("qa_1", [""], [["x"]], 0.0),
        ("vt", ["a\x00b\x1fc"], [["abc"]], 100.0),
        ("vt", ["a\nb"], [["ab"]], 0.0),
        ("vt", ["a\tb"], [["ab"]], 0.0),
        ("cwe", ["x", "y", "z"], [["x"], ["y"], ["q"]], 66.67),
        ("fwe", ["答案是水"], [["水", "火"]], 50.0),
    ],
)
def test_ruler_scores_by_hand(task, preds, refs, points):
    kept = list(preds), [list(r) for r in refs]
    assert ruler_score(task, preds, refs) == points
    assert (preds, refs) == kept


@pytest.mark.parametrize(
    "score", [lambda p, r: ruler_score("vt", p, r), lambda p, r: longbench_score("lcc", p, r, None)]
)
def test_pairs_that_do_not_match_are_refused(score):
    for preds, refs, text in (
        ([], [], "and one at least, got 0 and 0"),
        (["a"], [], "got 1 and 0"),
        (["a"], [["b"], ["c"]], "got 1 and 2"),
        (["a"], [[]], r"\[0\] must be a list of one text or more, got \[\]"),
        (["a", "b"], [["c"], "d"], r"\[1\] must be a list of one text or more, got 'd'"),
    ):
        with pytest.raises(ValueError, match=text):
            score(preds, refs)


# --- LongBench: metrics against second implementations

TASKS = {
    "qa_f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    "qa_f1_zh": "multifieldqa_zh",
    "rouge": "gov_report qmsum multi_news samsum",
    "rouge_zh": "dureader vcsum",
    "class": "trec lsht",
    "retrieval": "passage_retrieval_en passage_retrieval_zh",
    "count": "passage_count",
    "code": "lcc repobench-p",
}
BY_METRIC = {metric: names.split() for metric, names in TASKS.items()}


def test_there_are_the_21_tasks_and_their_answer_lengths():
    assert sorted(LONGBENCH_NEW_TOKENS) == sorted(task for names in BY_METRIC.values() for task in names)
    lengths = {
        "narrativeqa": 128,
        "qasper": 128,
        "multifieldqa_en": 64,
        "multifieldqa_zh": 64,
        "hotpotqa": 32,
        "2wikimqa": 32,
        "musique": 32,
        "dureader": 128,
        "gov_report": 512,
        "qmsum": 512,
        "multi_news": 512,
        "vcsum": 512,
        "trec": 64,
        "triviaqa": 32,
        "samsum": 128,
        "lsht": 64,
        "passage_count": 32,
        "passage_retrieval_en": 32,
        "passage_retrieval_zh": 32,
        "lcc": 64,
        "repobench-p": 64,
    }
    assert lengths == LONGBENCH_NEW_TOKENS
    assert {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} == RULER_NEW_TOKENS


def bag_f1(found, truth):
    """F1 by removing matches one at a time."""
    left, same = list(truth), 0
    for word in found:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0
    precision, recall = same / len(found), same / len(truth)
    return 2 * precision * recall / (precision + recall)


def plain_words(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in re.split(r"\s+", re.sub(r"\b(?:the|an|a)\b", " ", kept)) if word]


english = st.one_of(
    st.text(alphabet="aAnthe ,.-'bé\n", max_size=25),
    st.lists(st.sampled_from(["a", "An", "an", "the", "The.", "then", "cat", "cat's", "é"]), max_size=6).map(" ".join),
)


@given(pred=english, truths=st.lists(english, min_size=1, max_size=3), task=st.sampled_from(BY_METRIC["qa_f1"]))
@quickly
def test_f1_is_the_overlap_of_bags_of_words(pred, truths, task):
    seen = pred.lstrip("\n").split("\n")[0] if task == "triviaqa" else pred
    best = max(bag_f1(plain_words(seen), plain_words(truth)) for truth in truths)
    assert longbench_score(task, [pred], [truths], None) == round(100 * best, 2)


chinese = st.text(alphabet="中国人民北京大学，。！a b1《》．", max_size=12)


@given(pred=chinese, truth=chinese)
@quickly
def test_chinese_f1_is_over_cut_words_without_punctuation(pred, truth):
    def words(text):
        kept = [re.sub(r"[，。！》\s]", "", word) for word in jieba.cut(text)]  # 《 and ．are not on the official list
        return [word for word in kept if word]

    assert longbench_score("multifieldqa_zh", [pred], [[truth]], None) == round(
        100 * bag_f1(words(pred), words(truth)), 2
    )


def test_punctuation_is_the_official_list():
    removed = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
    assert tasks._ZH_MARKS == set(removed) | set(string.punctuation)


def longest_common(a, b):
    """Length of the longest common subsequence, by the table."""
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b, 1):
            new.append(row[j - 1] + 1 if x == y else max(row[j], new[j - 1]))
        row = new
    return row[-1]


@given(
    pred=st.permutations(list("abcdefgh")),
    truth=st.permutations(list("abcdefgh")),
    n=st.integers(0, 8),
    m=st.integers(1, 8),
)
@quickly
def test_rouge_is_the_longest_common_subsequence(pred, truth, n, m):
    """Texts of one sentence without repeated words: there the package computes the plain definition."""
    pred, truth = pred[:n], truth[:m]
    expected = 0.0
    if common := longest_common(pred, truth):
        precision, recall = common / n, common / m
        expected = 2 * precision * recall / (precision + recall + 1e-8)
    assert longbench_score("qmsum", [" ".join(pred)], [[" ".join(truth)]], None) == round(100 * expected, 2)


def test_texts_that_the_package_cannot_take_score_zero():
    for pred, truth in (("", "a"), ("a", ""), (".", "a"), ("...", "a"), ("", "")):
        assert longbench_score("gov_report", [pred], [[truth]], None) == 0.0
        assert longbench_score("vcsum", [pred], [[truth]], None) == 0.0


def test_texts_too_long_for_the_package_score_zero(monkeypatch):
    """It recurses along the texts; the benchmark counts its failure as 0."""

    def too_deep(*args, **kwargs):
        raise RecursionError("maximum recursion depth exceeded")

    assert longbench_score("gov_report", ["a"], [["a"]], None) > 99
    monkeypatch.setattr("rouge.Rouge.get_scores", too_deep)
    assert longbench_score("gov_report", ["a"], [["a"]], None) == 0.0


def test_chinese_rouge_is_over_cut_words():
    pred, truth = "北京大学的学生", "北京大学的老师"
    words = [list(jieba.cut(x)) for x in (pred, truth)]
    f = 2 * longest_common(*words) / (len(words[0]) + len(words[1]))
    assert 0 < f < 1 and longbench_score("dureader", [pred], [[truth]], None) == pytest.approx(100 * f, abs=0.0051)
    assert longbench_score("qmsum", [pred], [[truth]], None) == 0.0  # uncut, each is one word
    assert longbench_score("vcsum", [truth], [[pred, truth]], None) == 100.0


@pytest.mark.parametrize(
    ("pred", "truth", "points"),
    [
        ("3", "3", 100.0),
        ("3 or 4", "3", 50.0),
        ("33", "3", 0.0),
        ("", "3", 0.0),
        ("none", "3", 0.0),
        ("3.3", "3", 100.0),
        ("03", "3", 0.0),
    ],
)
def test_numbers_are_runs_of_digits(pred, truth, points):
    assert longbench_score("passage_count", [pred], [[truth]], None) == points
    assert longbench_score("passage_retrieval_en", [f"Paragraph {pred}"], [[f"Paragraph {truth}"]], None) == points
    assert longbench_score("passage_retrieval_zh", [f"段落{pred}"], [[f"段落{truth}"]], None) == points


def test_a_retrieval_answer_must_name_a_paragraph():
    for task, truth, word in (
        ("passage_retrieval_en", "段落3", "Paragraph"),
        ("passage_retrieval_zh", "Paragraph 3", "段落"),
    ):
        with pytest.raises(ValueError, match=f"answer '{truth}' names no {word}"):
            longbench_score(task, ["3"], [[truth]], None)


code = st.text(alphabet="ab =()水", max_size=15)


@given(pred=code, truth=code, before=st.sampled_from(["", "\n", "# note\n", "```py\n", "x // y\n", "\n\n# a\n`b`\n"]))
@quickly
def test_code_similarity_is_the_first_real_line_in_whole_percents(pred, truth, before):
    if not before.strip("\n") and not pred:
        pred = "more"  # line breaks at the start go first
    whole = len(pred) + len(truth)
    ratio = round(100 * 2 * longest_common(pred, truth) / whole) if whole else 100
    assert longbench_score("lcc", [before + pred + "\nmore"], [[truth]], None) == round(100 * (ratio / 100), 2)


def test_code_without_a_real_line_is_compared_as_empty():
    assert longbench_score("repobench-p", ["# only a note"], [["x"]], None) == 0.0
    assert longbench_score("repobench-p", ["# only a note"], [[""]], None) == 100.0
    assert longbench_score("lcc", ["abcdefgh"], [["abcdefgx"]], None) == 88.0  # 87.5 rounds to the even 88
    assert longbench_score("lcc", ["\t\nx = 1"], [["x = 1"]], None) == 0.0  # a line of blanks is a line


def classify(pred, truth, classes):
    """The benchmark's loop, which shortens the list it walks over."""
    named = [c for c in classes if c in pred]
    for name in named:
        if name in truth and name != truth:
            named.remove(name)
    return 1 / len(named) if truth in named else 0


names = st.sampled_from(["a", "b", "c", "ab", "bc", "abc", "ca", "abca", "水", "水a"])


@given(pred=st.lists(names, max_size=4).map("".join), truth=names, classes=st.lists(names, min_size=1, max_size=9))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_classification_walks_over_a_list_that_shrinks(pred, truth, classes):
    kept = list(classes)
    for task in ("trec", "lsht"):
        assert longbench_score(task, [pred], [[truth]], classes) == round(100 * classify(pred, truth, classes), 2)
    assert classes == kept


def test_classification_by_hand():
    assert longbench_score("trec", ["ab"], [["ab"]], ["a", "b", "ab"]) == 50.0  # a goes, b is skipped
    assert longbench_score("trec", ["ab"], [["ab"]], ["a", "ab", "b"]) == 100.0
    assert longbench_score("trec", ["x\nab"], [["ab"]], ["ab", "x"]) == 0.0  # first line only
    assert longbench_score("trec_e", ["\n\nab or x"], [["ab"]], ["ab", "x"]) == 50.0
    for classes in (None, []):
        with pytest.raises(ValueError, match=f"lsht needs all_classes, got {re.escape(repr(classes))}"):
            longbench_score("lsht", ["a"], [["a"]], classes)


@pytest.mark.parametrize("task", sorted(LONGBENCH_NEW_TOKENS))
def test_right_answers_score_full_and_empty_ones_nothing(task):
    truth = {"passage_count": "7", "passage_retrieval_en": "Paragraph 7", "passage_retrieval_zh": "段落7"}.get(
        task, "North 北京"
    )
    classes = ["North 北京", "South"]
    full = longbench_score(task, [truth], [["other 1 Paragraph 1 段落1", truth]], classes)
    assert full == pytest.approx(100, abs=1e-4) and longbench_score(task, [""], [[truth]], classes) == 0.0
    assert longbench_score(task, [truth, ""], [[truth], [truth]], classes) == pytest.approx(50, abs=0.01)
    cut = longbench_score(task, ["\n" + truth + "\nsomething else"], [[truth]], classes)
    if task in ("trec", "triviaqa", "samsum", "lsht"):
        assert cut == pytest.approx(100, abs=1e-4)
    elif task in BY_METRIC["qa_f1"] + BY_METRIC["rouge"]:
        assert cut < 90


def test_ranges_of_length_and_the_average():
    preds, answers = ["a b", "b", "c", "b"], [["b"]] * 4
    assert longbench_e_score("qasper", preds, answers, [0, 3999, 4000, 8000]) == {
        "0-4k": 100.0,
        "4-8k": 0.0,
        "8k+": 100.0,
    }
    assert longbench_e_score("hotpotqa_e", preds, answers, [7999, 7999, 7999, 7999])["4-8k"] == 75.0
    assert math.isnan(longbench_e_score("qasper", preds, answers, [1, 1, 1, 1])["8k+"])
    assert longbench_e_score("trec", ["x", "y"], [["x"], ["x"]], [1, 2], ["x", "y"])["0-4k"] == 50.0
    with pytest.raises(ValueError, match="need one length a prediction, got 1 for 4"):
        longbench_e_score("qasper", preds, answers, [1])
    english16 = set(LONGBENCH_NEW_TOKENS) - {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    scores = {task: float(i) for i, task in enumerate(sorted(english16))}
    assert len(english16) == 16 and longbench_average(scores | {"vcsum": 1e6}) == 7.5
    with pytest.raises(KeyError, match="no score for lcc"):
        longbench_average({task: 1.0 for task in english16 - {"lcc"}})


def test_unknown_longbench_tasks_list_the_known_ones(tmp_path):
    for name in ("squad", "qasper_e_e", "trec_x", ""):
        for call in (
            lambda name=name: longbench_score(name, ["a"], [["a"]], None),
            lambda name=name: load_longbench(tmp_path, name),
        ):
            with pytest.raises(KeyError, match="unknown LongBench task") as caught:
                call()
            assert all(task in str(caught.value) for task in LONGBENCH_NEW_TOKENS)


# --- LongBench: files

RECORD = {
    "input": "谁？",
    "context": "a\u2028b\u0085c\nd",
    "answers": ["Ann", "安"],
    "length": 3,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}


def test_files_are_read_by_folder_or_by_name(tmp_path):
    line = json.dumps(RECORD, ensure_ascii=False)
    (tmp_path / "qasper.jsonl").write_text(f"\ufeff{line}\r\n\n{line}", encoding="utf-8")
    (tmp_path / "qasper_e.jsonl").write_text(line + "\n", encoding="utf-8")
    assert load_longbench(tmp_path, "qasper") == [RECORD, RECORD]
    assert (
        load_longbench(str(tmp_path), "qasper_e") == load_longbench(tmp_path / "qasper_e.jsonl", "qasper") == [RECORD]
    )
    with pytest.raises(FileNotFoundError):
        load_longbench(tmp_path, "trec")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("{", "line 3: Expecting"),
        ('{"input": "a"', "line 3: "),
        ("not json", "line 3: "),
        ("[]", "line 3: a record must be an object, got list"),
        ("null", "line 3: a record must be an object, got NoneType"),
        ('{"context": "", "answers": []}', "line 3: 'input' is missing"),
        ('{"input": "", "context": ""}', "line 3: 'answers' is missing"),
        ('{"input": "", "context": "", "answers": "a"}', "line 3: 'answers' must be a list of texts"),
        ('{"input": "", "context": "", "answers": [1]}', "line 3: 'answers' must be a list of texts"),
        ('{"input": 1, "context": "", "answers": []}', "line 3: 'input' and 'context' must be texts"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, bad, text):
    good = json.dumps(RECORD)
    (tmp_path / "lcc.jsonl").write_text(f"{good}\n\n{bad}\n{good}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(text)):
        load_longbench(tmp_path, "lcc")


def test_the_module_loads_without_torch_transformers_and_the_packages_of_metrics():
    check = (
        "import sys, collai.lukv.tasks; heavy = {'torch', 'transformers', 'jieba', 'rouge', 'rapidfuzz', 'wonderwords'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
