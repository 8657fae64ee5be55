"""Tasks: grammar, tools, chances of guessers, mixtures, and prompts from files."""
import importlib.util
import json
import sys
import threading
from collections import Counter

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collai.rl import tasks
from collai.rl.tasks import CalcTool, ChainSum, Mixture, Problem, PromptTask, load_prompts

VERL = {"data_source": "sums", "prompt": [{"role": "user", "content": "1/2 + 1/4?"}],
        "reward_model": {"style": "rule", "ground_truth": "3/4"}, "extra_info": {"index": 7, "tags": ["a", "b"]}}


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


@given(st.integers(2, 12), st.integers(2, 36), st.integers(0, 2**32))
def test_sums_are_right_in_every_base(terms, base, seed):
    task = ChainSum(terms, base)
    p = task.sample(np.random.default_rng(seed))
    a = [int(x, base) for x in p.prompt.removesuffix("=").split("+")]
    assert len(a) == terms and int(p.answer, base) == sum(a)
    assert [int(x, base) for x in p.demo.removesuffix(".").split(";")] == np.cumsum(a)[1:].tolist()
    assert task.reward(p, p.demo) == task.reward(p, p.answer + ".") == 1.0 and p.task is task
    assert task.tokenizer().decode(task.tokenizer().encode(p.prompt + p.demo)) == p.prompt + p.demo
    assert len(p.demo) + 1 <= task.max_new


def test_the_testbed_has_the_sizes_it_is_known_by():
    task = ChainSum(4)
    assert (task.max_new, task.max_turns, task.key, len(task.tokenizer())) == (14, 1, "chainsum-4-10", 16)
    tool = CalcTool(3, 1)
    assert (tool.max_turns, tool.key, tool.stop, len(tool.tokenizer())) == (4, "calctool-3-1", ">", 22)


def test_terms_are_uniform():
    rng = np.random.default_rng(0)
    counts = Counter("".join(ChainSum(4).sample(rng).prompt for _ in range(2500)).replace("+", "").replace("=", ""))
    assert sorted(counts) == list("0123456789") and all(abs(n - 1000) < 5 * 30 for n in counts.values())
    signs = Counter(c for _ in range(2000) for c in CalcTool(3).sample(rng).prompt if c in "+-*")
    assert all(abs(n - 2000) < 5 * 37 for n in signs.values()) and len(signs) == 3


@pytest.mark.parametrize("text", ["", "21", "14;19;20.", "21;", "021.", "21.21.", ";21.", "14;;21.", " 21.", "21.\n", "²1."])
def test_a_transcript_outside_the_grammar_earns_nothing(text):
    assert ChainSum(4).reward(Problem("8+6+5+2=", "21"), text) == 0.0


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32))
def test_a_demonstration_is_what_model_and_tool_write(depth, digits, seed):
    task = CalcTool(depth, digits)
    p = task.sample(np.random.default_rng(seed))
    assert int(p.answer) == eval(p.prompt.removesuffix("="))  # noqa: S307
    said, rest = "", p.demo
    while ">" in rest:
        turn, rest = rest[:rest.index(">") + 1], rest[rest.index(">") + 1:]
        reply = task.step(turn)
        assert rest.startswith(reply) and task.step(said + turn) == reply
        said, rest = said + turn + reply, rest[len(reply):]
    assert task.step(rest) is None and task.reward(p, said + rest) == 1.0
    assert len(p.demo) + 1 <= task.max_new and p.demo.count(">") == depth == task.max_turns - 1


@pytest.mark.parametrize("turn", ["", "12.", "<3*4", "3*4>", "<3*4>.", "<3/4>", "<3**4>", "<3>", "<3*4><1+1>", "12<3*4>", "<+1*2>"])
def test_wrong_syntax_has_no_reply(turn):
    assert CalcTool(3).step(turn) is None


@pytest.mark.parametrize("digits", [1000, 2200, 5000])
@pytest.mark.parametrize("sign", ["*", "+"])
def test_a_call_of_endless_numbers_has_no_reply(digits, sign):
    nines = 10**digits - 1
    reply = CalcTool(32, 6).step(f"1=1;<{'9' * digits}{sign}{'9' * digits}>")
    assert reply is None if digits > 1000 else reply == f"={nines**2 if sign == '*' else 2 * nines};"


def test_outcomes_count_and_not_the_way():
    p, task = Problem("(3-6)*2=", "-6"), CalcTool(2)
    assert [task.reward(p, x) for x in ("-6.", "<3-6>=-3;<-3*2>=-6;-6.", "<9+9>=18;-6.")] == [1.0] * 3
    assert [task.reward(p, x) for x in ("6.", "<3-6>=-3;", "<3-6>-6.", "=-3;-6.", "<3-6>=-3;-6", "-6.-6.")] == [0.0] * 6


@pytest.mark.parametrize(("make", "text"), [
    (lambda: ChainSum(1), r"terms must be an integer in \[2, 64\], got 1"), (lambda: ChainSum(4, 37), r"base .* \[2, 36\], got 37"),
    (lambda: ChainSum(True), "terms .* got True"), (lambda: ChainSum(2.0), "terms .* got 2.0"),
    (lambda: CalcTool(0, 1), r"depth must be an integer in \[1, 32\], got 0"), (lambda: CalcTool(3, 7), r"digits .* got 7"),
    (lambda: Mixture([]), "tasks must hold at least one task, got none"),
    (lambda: PromptTask([]), "problems must hold at least one problem, got none"),
    (lambda: PromptTask([Problem("a", "b")], max_new=0), "max_new .* got 0")])
def test_bad_parameters_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_mixture_keeps_each_problem_with_its_task():
    both, rng = Mixture([ChainSum(12), CalcTool(6)]), np.random.default_rng(0)
    problems = [both.sample(rng) for _ in range(200)]
    assert 60 < sum(isinstance(p.task, CalcTool) for p in problems) < 140
    assert all(both.reward(p, p.demo) == 1.0 and both.reward(p, "x") == 0.0 for p in problems)
    assert both.tokenizer().encode("".join(p.prompt + p.demo for p in problems))
    assert (both.max_turns, both.max_new) == (7, CalcTool(6).max_new)


def test_jsonl_and_parquet_give_the_same_problems(tmp_path):
    pandas.DataFrame([VERL]).to_parquet(tmp_path / "a.parquet")
    lines, table = load_prompts(write(tmp_path / "a.jsonl", VERL, "", "  ")), load_prompts(str(tmp_path / "a.parquet"))
    assert lines == table == [Problem(VERL["prompt"], "3/4", data_source="sums")]
    assert lines[0].extra == table[0].extra == VERL["extra_info"]
    json.dumps([table[0].prompt, table[0].extra])


def test_plain_rows_are_read_and_make_a_task(tmp_path):
    problems = load_prompts(write(tmp_path / "a.jsonl", {"prompt": "2+2=", "answer": 4, "demo": "4."}, {"prompt": "é", "answer": "-1.5"}))
    assert [(p.answer, p.demo) for p in problems] == [("4", "4."), ("-1.5", "")]
    task = problems[0].task
    assert task is problems[1].task and isinstance(task, PromptTask) and task.problems == problems
    rng = np.random.default_rng(0)
    assert {task.sample(rng).prompt for _ in range(40)} == {"2+2=", "é"}
    assert task.step("4.") is None and task.tokenizer().encode("2+2=é4.")


def test_the_key_of_prompts_tells_their_tasks_apart():
    """Stored runs are found again by it."""
    one, other = Problem("1+1=", "2"), Problem("1+1=", "3")
    keys = [PromptTask(*args).key for args in (([one],), ([other],), ([one, other],), ([other, one],), ([one], 7),
                                               ([Problem("1+1=", "2", "2.")],), ([Problem([{"role": "user", "content": "1+1="}], "2")],))]
    assert len(set(keys)) == 7 and PromptTask([one], 1024).key == keys[0] and keys[4].startswith("prompts-7-")


def test_a_json_file_holds_an_array_or_a_row_a_line(tmp_path):
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text("\n " + json.dumps([VERL, {"prompt": "1", "answer": 1}], indent=2), encoding="utf-8")
    assert load_prompts(array) == load_prompts(write(lines, VERL, {"prompt": "1", "answer": 1}))
    for text, reason in (('[{"prompt": "1",\n"answer": ]', r"no JSON \(.*at line 2, column 11"), ("[7]", "row 0: a row must be an object, got 7"),
                         ("[]", "holds no prompt")):
        array.write_text(text)
        with pytest.raises(ValueError, match=f"array.json.*{reason}"):
            load_prompts(array)
    lines.write_text('{"prompt": "1", "answer": "1"}\n{"prompt')
    with pytest.raises(ValueError, match=r"lines.json, line 2: no JSON \(.* at column 2\)"):
        load_prompts(lines)


def test_an_expert_s_chat_ends_in_its_demonstration(tmp_path):
    talk = [{"role": "user", "content": "1/2+1/4?"}, {"role": "assistant", "content": "\\boxed{3/4}"}]
    pandas.DataFrame([{"messages": talk, "answer": "3/4"}]).to_parquet(tmp_path / "a.parquet")
    (table,) = load_prompts(tmp_path / "a.parquet")
    with_answer, without = load_prompts(write(tmp_path / "a.jsonl", {"messages": talk, "answer": "3/4"}, {"messages": talk}))
    assert with_answer == table == Problem(talk[:1], "3/4", "\\boxed{3/4}") and without == Problem(talk[:1], "", "\\boxed{3/4}")


@pytest.mark.parametrize(("row", "reason"), [
    *[({"messages": m, "answer": "1"}, "line 2: messages must be a chat that the assistant ends, got")
      for m in ("hi", [], [{"role": "assistant", "content": "1"}], [{"role": "user", "content": "1"}] * 2, ["a", "b"])],
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "1"}]}, "chat messages need role and content"),
    ("{'prompt'", r"line 2: no JSON \(.* at column 2\)"), ("3", "line 2: a row must be an object, got 3"),
    ({"answer": "1"}, "line 2: prompt must be text or chat messages and not empty, got None"),
    ({"prompt": "", "answer": "1"}, "not empty, got ''"), ({"prompt": [], "answer": "1"}, r"not empty, got \[\]"),
    ({"prompt": [{"role": "user"}], "answer": "1"}, "chat messages need role and content, both text, got"),
    ({"prompt": "1"}, "line 2: answer or reward_model.ground_truth must be text or a number, got None"),
    *[(f'{{"prompt": "1", "answer": {x}}}', f"must be text or a number, got {y}")
      for x, y in (("NaN", "None"), ("Infinity", "inf"), ("-Infinity", "-inf"), ("null", "None"))],
    ('{"prompt": "1", "reward_model": {"ground_truth": NaN}}', "must be text or a number, got nan"),
    ({"prompt": "1", "answer": ""}, "line 2: answer or reward_model.ground_truth must not be empty, got ''"),
    ({"prompt": "1", "reward_model": {"ground_truth": " "}}, "must not be empty, got ' '"),
    ({"prompt": "1", "answer": True}, "got True"), ({"prompt": "1", "reward_model": {}}, "got None"),
    ({"prompt": "1", "reward_model": "rule"}, "reward_model must be an object, got 'rule'"),
    ({"prompt": "1", "answer": "1", "extra_info": "x"}, "extra_info must be an object, got 'x'")])
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, row, reason):
    with pytest.raises(ValueError, match=rf"a.jsonl, .*{reason}"):
        load_prompts(write(tmp_path / "a.jsonl", {"prompt": "1", "answer": "1"}, row))


@pytest.mark.parametrize("columns", [
    {"answer": ["1", None]}, {"answer": [1.0, float("nan")]}, {"answer": pandas.array([1, None], dtype="Int64")},
    {"reward_model": [{"ground_truth": "1"}, {"ground_truth": None}]}, {"reward_model": [{"ground_truth": "1"}, None]},
    {"reward_model": [{"ground_truth": 1.0}, {"ground_truth": float("nan")}]}])
def test_a_table_s_missing_answer_is_named(tmp_path, columns):
    pandas.DataFrame({"prompt": ["a", "b"], **columns}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 1: answer or reward_model.ground_truth must be text or a number, got (None|nan)"):
        load_prompts(tmp_path / "a.parquet")


def test_what_a_table_lacks_stays_empty_and_whole_numbers_stay_whole(tmp_path):
    talk = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    pandas.DataFrame({"prompt": ["a", "b", None], "answer": pandas.array([1, None, None], dtype="Int64"), "demo": [None, "y", None],
                      "reward_model": [None, {"ground_truth": "7"}, None], "data_source": [None, "x", float("nan")],
                      "extra_info": [{"a": 1}, None, None], "messages": [None, None, talk]}).to_parquet(tmp_path / "a.parquet")
    found = load_prompts(tmp_path / "a.parquet")
    assert found == [Problem("a", "1"), Problem("b", "7", "y", data_source="x"), Problem(talk[:1], "", "d")]
    assert [p.extra for p in found] == [{"a": 1}, {}, {}]
    text = '{"prompt": "1", "answer": 1, "demo": NaN, "data_source": NaN, "extra_info": NaN}'
    assert load_prompts(write(tmp_path / "a.jsonl", text)) == [Problem("1", "1")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_skipped_and_other_encodings_are_named(tmp_path, name):
    path, good = tmp_path / name, b'{"prompt": "\xc3\xa9", "answer": "1"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert load_prompts(path) == [Problem("é", "1")]
    path.write_bytes(good + b'{"prompt": "\xe9", "answer": "1"}')
    with pytest.raises(ValueError, match=f"{name}, line 2: no UTF-8 text at character 13$"):
        load_prompts(path)


def test_bad_files_are_refused(tmp_path):
    pandas.DataFrame([{"prompt": "1", "answer": "1"}, {"prompt": None, "answer": "1"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 1: prompt must be"):
        load_prompts(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.jsonl holds no prompt"):
        load_prompts(write(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"must be a .jsonl, .json or .parquet file, got x.csv"):
        load_prompts("x.csv")
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "none.jsonl")


SAME = ["\\boxed{3/4}", "so $\\frac{3}{4}$.", "\\boxed{0.75}"]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="the extra math (math-verify) is not installed")
def test_math_verify_compares_values_also_in_a_thread():
    p, found = Problem("", "3/4"), []
    task = PromptTask([p])
    tasks._comparison.cache_clear()
    worker = threading.Thread(target=lambda: found.extend(task.reward(p, x) for x in SAME))
    worker.start()
    worker.join()
    assert found == [task.reward(p, x) for x in SAME] == [1.0] * 3
    assert [task.reward(p, x) for x in ("\\boxed{4/3}", "", "no idea")] == [0.0] * 3


def test_without_math_verify_strings_are_compared_with_one_warning(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    tasks._comparison.cache_clear()
    p = Problem("", "3/4")
    task = PromptTask([p])
    with pytest.warns(UserWarning, match="math-verify is not installed") as said:
        assert [task.reward(p, x) for x in SAME] == [1.0, 0.0, 0.0]
        assert [task.reward(p, x) for x in (" 3/4\n", "\\boxed{1} then \\boxed{3/4}", "\\boxed{3/4} then \\boxed{1}")] == [1.0, 1.0, 0.0]
    assert len(said) == 1
    nested = Problem("", "\\frac{3}{4}")
    assert PromptTask([nested]).reward(nested, "\\boxed{\\frac{3}{4}}") == 1.0
    tasks._comparison.cache_clear()
