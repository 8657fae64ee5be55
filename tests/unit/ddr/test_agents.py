"""The loop of a language model on a database, stored sessions, questions, and the probability of stopping."""

import csv
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.tinylm import CharTokenizer, TinyLM
from collai.ddr import agents as module
from collai.ddr.agents import (
    LLMAgent,
    ReactiveAgent,
    ReplayAgent,
    TogetherChat,
    is_finish,
    read_log,
    self_termination,
    tiny_analyst,
    transcript,
)
from collai.ddr.checklist import build_checklist
from collai.ddr.sandbox import Budget, Env, Trajectory, Turn
from collai.ddr.worlds import make_world
from collai.eval.llm import ChatError, ChatServer, OpenAIChat, Reply, Request, TokenUsage, TransformersChat


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("retail", seed=5, rows=2000, path=str(tmp_path_factory.mktemp("world") / "w.duckdb"))


class Script:
    """A chat that says what it was told to say, and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def generate(self, requests):
        self.asked += requests
        said = [self.replies.pop(0) for _ in requests]
        if any(isinstance(s, Exception) for s in said):
            raise next(s for s in said if isinstance(s, Exception))
        return [s if isinstance(s, Reply) else Reply(s, "stop", TokenUsage(10, 3)) for s in said]


def native(name, args, text="so", more=()):
    calls = [{"id": "c1", "type": "function", "function": {"name": name, "arguments": args}}, *more]
    return Reply(text, "tool_calls", TokenUsage(10, 3), tuple(calls))


QUERY = json.dumps({"query": "SELECT count(*) AS n FROM orders"})
SPOKEN = f'First.\nACTION: {{"tool": "execute_query", "args": {QUERY}}}'


# --- the end ----------------------------------------------------------------------------------------------------------


@given(st.text(alphabet="FINISH: \n\tax"), st.text(alphabet=" \n\t"))
def test_only_a_message_that_begins_with_it_is_the_end(text, blank):
    assert is_finish(blank + "FINISH:" + text)
    assert is_finish(text) == text.lstrip().startswith("FINISH:")


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tools", "text"])
def test_a_session_from_first_call_to_report(world, protocol):
    call = native("execute_query", QUERY) if protocol == "tools" else SPOKEN
    chat = Script(call, "There are 2,000 orders.", "FINISH: Orders: 2,000.")
    with Env(world.db_path, tools=("sql",), entity="shop 7") as env:
        found = LLMAgent(chat, protocol=protocol).run(env)
    (turn,) = found.turns
    assert (found.stop_reason, found.report, found.world) == ("finish", "Orders: 2,000.", world.digest)
    assert turn.tool == "execute_query" and turn.result["cols"] == ["n"] and turn.insight == "There are 2,000 orders."
    assert (turn.tokens_in, turn.tokens_out) == (30, 9)  # two requests of the turn, and the report
    first, insight, last = chat.asked
    assert "shop 7" in first.messages[1]["content"] and bool(first.tools) == (protocol == "tools")
    assert not insight.tools and len(insight.messages) == 2 and "2,000 orders" not in str(last.messages)
    assert last.messages[-1]["role"] == ("tool" if protocol == "tools" else "user") and len(last.messages) == 4


def test_only_the_first_call_of_a_message_is_made(world):
    second = {"id": "c2", "type": "function", "function": {"name": "describe_table", "arguments": '{"table_name": "web"}'}}
    chat = Script(native("get_database_info", "{}", more=(second,)), "FINISH: none")
    with Env(world.db_path, tools=("sql",)) as env:
        found = LLMAgent(chat).run(env)
    assert [t.tool for t in found.turns] == ["get_database_info"] and found.turns[0].insight == "NO INSIGHT"
    sent = [m for m in chat.asked[-1].messages if m.get("tool_calls")]
    assert [c["id"] for c in sent[0]["tool_calls"]] == ["c1"] and len(chat.asked) == 2  # no request for a description


def test_wrong_calls_are_answered_and_take_a_turn(world):
    chat = Script(native("execute_query", "{oops"), native("fly", "{}"), native("execute_query", '{"query": "DROP TABLE web"}'),
                  native("execute_query", '{"query": "SELECT nope FROM web"}'), "FINISH:")
    with Env(world.db_path, tools=("sql",), budget=Budget(turns=9)) as env:
        found = LLMAgent(chat).run(env)
        assert env.left() == 5
    errors = [t.result["error"] for t in found.turns]
    assert "no JSON" in errors[0] and "fly" in errors[1] and "only one SELECT" in errors[2] and "nope" in errors[3]
    assert all(t.insight == "NO INSIGHT" and not t.claims for t in found.turns)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_model_that_calls_nothing_is_reminded_and_then_asked_for_its_report(world, retries):
    chat = Script(*["Hm."] * (retries + 1), "FINISH: nothing found")
    with Env(world.db_path, tools=("sql",)) as env:
        found = LLMAgent(chat, max_retries=retries).run(env)
    assert (found.stop_reason, found.report) == ("exhausted", "nothing found")
    assert len(found.turns) == 1 and found.turns[0].tokens_in == 10 * (retries + 2)
    assert sum(m["content"] == module._AGAIN for m in chat.asked[-1].messages) == retries


def test_a_reminder_that_helps_starts_the_count_anew(world):
    chat = Script("Hm.", SPOKEN, "NO INSIGHT", "Hm.", "FINISH: done")
    with Env(world.db_path, tools=("sql",)) as env:
        found = LLMAgent(chat, protocol="text", max_retries=1).run(env)
    assert found.stop_reason == "finish" and len(found.turns) == 1


@pytest.mark.parametrize("budget", [Budget(turns=2), Budget(tokens=52)])
def test_a_spent_budget_ends_with_a_summary(world, budget):
    chat = Script(*[SPOKEN, "NO INSIGHT"] * 2, "All of it.")
    with Env(world.db_path, tools=("sql",), budget=budget) as env:
        found = LLMAgent(chat, protocol="text").run(env)
    assert (found.stop_reason, found.report, len(found.turns)) == ("budget", "All of it.", 2)


def test_what_a_model_invents_after_its_call_is_dropped(world):
    chat = Script(SPOKEN + '\nRESULT: {"data": [[7]]}', "NO INSIGHT", "FINISH:")
    with Env(world.db_path, tools=("sql",)) as env:
        found = LLMAgent(chat, protocol="text").run(env)
    assert "[[7]]" not in str(chat.asked[-1].messages) and found.turns[0].result["count"] == 1


def test_an_endpoint_that_fails_leaves_the_turns_until_then(world):
    chat = Script(SPOKEN, "Amount in the north region rose.", ChatError(503))
    with Env(world.db_path, tools=("sql",)) as env:
        found = LLMAgent(chat, protocol="text").run(env)
    assert (found.stop_reason, found.report, len(found.turns)) == ("error", "", 1) and found.turns[0].claims


def test_a_session_over_http_with_failures_in_between(world):
    faults = (429, None, 500, None, "garbage", None, "cut", None)
    with ChatServer(tiny_analyst(), faults=faults) as server, Env(world.db_path, tools=("sql",), budget=Budget(turns=3)) as env:
        chat = OpenAIChat(model="local", base_url=server.base_url, api_key="none")
        found = LLMAgent(chat, protocol="text").run(env)
    with Env(world.db_path, tools=("sql",), budget=Budget(turns=3)) as env:
        alone = LLMAgent(tiny_analyst(), protocol="text").run(env)
    told = [[(t.reasoning, t.result, t.insight) for t in trajectory.turns] for trajectory in (found, alone)]
    assert told[0] == told[1] and found.stop_reason == "budget"


@pytest.mark.parametrize(("wrong", "text"), [({"protocol": "json"}, "protocol must be 'tools' or 'text', got 'json'"),
                                             ({"max_retries": -1}, "max_retries must be >= 0, got -1")])
def test_settings_are_checked(wrong, text):
    with pytest.raises(ValueError, match=text):
        LLMAgent(None, **wrong)


def test_the_small_model_is_trained_or_loaded():
    with pytest.raises(ValueError, match="retrain must be >= 0, got -3"):
        tiny_analyst(retrain=-3)
    one, two = tiny_analyst(), tiny_analyst()
    assert one.identity() == two.identity() and one.name == "tiny-analyst"


# --- ready to stop ----------------------------------------------------------------------------------------------------


def a_session(n, rng):
    words = ["sales", "fall", "in", "the", "north", "1.5", "rise"]
    turns = [Turn(" ".join(rng.choice(words, 4)), "execute_query", {"query": "SELECT " + str(rng.integers(99))},
                  {"data": [[int(rng.integers(999))]]}) for _ in range(n)]
    return Trajectory(turns, "", [], "finish")


LETTERS = CharTokenizer("".join(chr(c) for c in range(32, 127)) + "\n…")


def qwen(attention):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(LETTERS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, attn_implementation=attention)
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "ours"])
def test_one_pass_equals_a_pass_a_turn(attention):
    model = TinyLM(len(LETTERS), seed=1) if attention == "ours" else qwen(attention)
    session = a_session(4, np.random.default_rng(0))
    assert module._packs(model)
    found = self_termination(model, LETTERS, session)
    plain = self_termination(lambda ids: model(ids), LETTERS, session)
    assert found.dtype == np.float64 and found.shape == (4,) and np.abs(found - plain).max() < 1e-3 and (found < 0).all()


def test_prefixes_that_are_not_nested_share_what_they_can():
    class Forgetful:
        """A template that shows only the last result, as templates that hide earlier thoughts do."""

        chat_template = "yes"

        def apply_chat_template(self, talk, add_generation_prompt, tokenize):
            return "\n".join(m["content"][-12:] for m in talk[:-1]) + "\n" + talk[-1]["content"]

        def encode(self, text, add_special_tokens=False):
            return LETTERS.encode(text)

    model, session = TinyLM(len(LETTERS), seed=2), a_session(5, np.random.default_rng(1))
    prefixes = module._prefixes(Forgetful(), session)
    assert prefixes[0] != prefixes[-1][: len(prefixes[0])]
    plain = self_termination(lambda ids: model(ids), Forgetful(), session, stop="STOP")
    assert np.abs(self_termination(model, Forgetful(), session, stop="STOP") - plain).max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_tree_holds_every_branch_once(data):
    ids = st.lists(st.integers(0, 3), min_size=1, max_size=8)
    prefixes, stop = data.draw(st.lists(ids, min_size=1, max_size=4)), data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    tree, places, branches = module._tree(prefixes, stop)
    for prefix, (fork, begin, end) in zip(prefixes, branches, strict=True):
        path = [*range(fork), *range(begin, end)]
        assert [tree[i] for i in path] == [*prefix, *stop] and [places[i] for i in path] == list(range(len(path)))
    assert len(tree) == max(map(len, prefixes)) + sum(end - begin for _, begin, end in branches)


def test_no_turns_and_no_stop_text():
    model = TinyLM(len(LETTERS))
    assert self_termination(model, LETTERS, Trajectory([], "", [], "finish")).shape == (0,)
    with pytest.raises(ValueError, match="stop must have at least one token, got ''"):
        self_termination(model, LETTERS, a_session(1, np.random.default_rng(0)), stop="")


def test_a_tokenizer_with_its_own_first_token_adds_none():
    class Eager:
        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + LETTERS.encode(text)

    model, session = TinyLM(len(LETTERS), seed=3), a_session(2, np.random.default_rng(2))
    assert (self_termination(model, Eager(), session) == self_termination(model, LETTERS, session)).all()


def test_the_transcript_is_what_the_model_was_shown(world):
    chat = Script(SPOKEN, "NO INSIGHT", "FINISH:")
    with Env(world.db_path, tools=("sql",)) as env:
        found = LLMAgent(chat, protocol="text").run(env)
    assert transcript(found, tools=("sql",)) == [{"role": m["role"], "content": m["content"]} for m in chat.asked[-1].messages]


# --- stored sessions --------------------------------------------------------------------------------------------------


def log(folder, insights=(("a", "ra", "NO INSIGHT"), ("b", "rb", "Amount in the north region rose.")), stats=None):
    def table(name, head, rows):
        with open(folder / f"{name}_20260203_101010.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])

    table("insights", ["timestamp", "assistant_message", "user_message", "insight"], [["", *row] for row in insights])
    talk = []
    for said, result, _ in insights:
        talk += [["", "agent", said, json.dumps({"tool": "execute_query", "arguments": {"query": said}}), ""],
                 ["", "environment", "Tool execution result: " + result, "", json.dumps({"data": [[result]]})]]
    table("chat_messages", ["timestamp", "role", "content", "tool_call", "tool_result"], [*talk, ["", "agent", "FINISH: x", "", ""]])
    table("message_stats", ["timestamp", "role", "prompt_tokens", "completion_tokens", "generation_time"],
          [["", role, 5 + i, 2, 0.5] for i, _ in enumerate(insights) for role in ("assistant", "user", "insight_generation")])
    if stats is not None:
        (folder / "session_stats_20260203_101010.json").write_text(json.dumps(stats))


def test_a_public_session_is_read_with_calls_claims_and_tokens(tmp_path, world):
    log(tmp_path, stats={"final_summary": "FINISH: Amount in the north region rose.", "completed": True})
    found = read_log(tmp_path, world.schema, "w")
    assert [(t.tool, t.args, t.result, t.tokens_in, t.tokens_out, t.seconds) for t in found.turns] == [
        ("execute_query", {"query": "a"}, {"data": [["ra"]]}, 5, 2, 0.5), ("execute_query", {"query": "b"}, {"data": [["rb"]]}, 6, 2, 0.5)]
    assert [len(t.claims) for t in found.turns] == [0, 1] and found.claims[0].direction == 1
    assert (found.stop_reason, found.report, found.world) == ("finish", "Amount in the north region rose.", "w")
    assert not read_log(tmp_path).claims  # without a schema nothing is parsed


def test_a_session_that_was_cut_off_says_so(tmp_path, world):
    log(tmp_path)
    found = read_log(tmp_path, world.schema)
    assert (found.stop_reason, found.report, len(found.turns)) == ("error", "", 2)
    for name in ("chat_messages", "message_stats"):
        (tmp_path / f"{name}_20260203_101010.csv").unlink()
    found = read_log(tmp_path, world.schema)
    assert [(t.tool, t.result, t.tokens_in) for t in found.turns] == [("", "ra", 0), ("", "rb", 0)]


def test_the_newest_session_is_read_and_a_missing_one_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no insights_"):
        read_log(tmp_path)
    log(tmp_path)
    later = tmp_path / "insights_20270101_000000.csv"
    later.write_text("timestamp,assistant_message,user_message,insight\n,x,y,z\n")
    assert [t.insight for t in read_log(tmp_path).turns] == ["z"]
    with pytest.raises(FileNotFoundError, match="no trajectory at"):
        ReplayAgent(tmp_path / "none")


def test_a_saved_trajectory_is_replayed(tmp_path, world):
    with Env(world.db_path, tools=("sql",), budget=Budget(turns=4)) as env:
        found = LLMAgent(tiny_analyst(), protocol="text").run(env)
        found.save(tmp_path / "t.json")
        assert ReplayAgent(tmp_path / "t.json").run(env) == found


# --- questions --------------------------------------------------------------------------------------------------------


def test_every_question_is_a_session_with_the_whole_budget(world):
    seen = []

    class Curious:
        def run(self, env):
            seen.append((env.question, env.left()))
            env.query("SELECT 1 AS x")
            return Trajectory([Turn(insight=env.question)], env.question, [], "budget" if len(seen) == 2 else "finish", env.world)

    checklist = build_checklist(world)
    with Env(world.db_path, tools=("sql",), budget=Budget(turns=3)) as env:
        found = ReactiveAgent(Curious(), checklist).run(env)
        assert env.question is None and env.left() == 3
    assert seen == [(item.question, 3) for item in checklist.items] and len(found.turns) == len(checklist.items)
    assert found.stop_reason == "budget" and found.report.count("\n") == len(checklist.items) - 1


def test_a_model_is_told_the_question(world):
    chat = Script("FINISH: none")
    with Env(world.db_path, tools=("sql",)) as env:
        LLMAgent(chat).run(env.ask("Which day stands out?"))
    assert "Which day stands out?" in chat.asked[0].messages[1]["content"]


def test_lessons_end_in_what_the_loop_reads(world):
    with Env(world.db_path, tools=("sql",)) as env:
        lessons = module._Lessons(make_world("retail", 0, 1000, plants=[]).schema.values, [env.call("get_database_info", {})])
    rng = np.random.default_rng(0)
    for _ in range(40):
        said = lessons.sample(rng).demo
        call = module._spoken_call(said)
        assert is_finish(said) or call is None or call[1] in ("execute_query", "get_database_info")
    assert lessons.step("anything") is None


def test_a_call_without_arguments_is_one():
    assert module._native_call(Reply(" x ", "tool_calls", TokenUsage(1, 1), ({"function": {"name": "list_files"}},))) == ("x", "list_files", {})
    assert module._spoken_call('ACTION: {"tool": "list_files"}') == ("", "list_files", {})
    assert replace(Turn(), tool="x").tool == "x"


# --- evidence, failures -----------------------------------------------------------------------------------------------


def test_claims_of_a_turn_bear_its_query(world, tmp_path):
    chat = Script(SPOKEN, "Amount in the north region rose.", 'So.\nACTION: {"tool": "execute_code", "args": {"code": "1"}}',
                  "The mean rating is lower in region south than in the rest.",
                  "FINISH: Amount in the north region rose. The mean rating is higher in region east than in the rest.")
    with Env(world.db_path) as env:
        found = LLMAgent(chat, protocol="text").run(env)
    sql = "SELECT count(*) AS n FROM orders"
    assert [[c.evidence_sql for c in t.claims] for t in found.turns] == [[sql], [None]]  # code is no query
    assert [c.evidence_sql for c in found.claims] == [sql, None]  # nothing was said about the east
    log(tmp_path, stats={"final_summary": "Amount in the north region rose.", "completed": True})
    replayed = read_log(tmp_path, world.schema)
    assert replayed.turns[1].claims[0].evidence_sql == replayed.claims[0].evidence_sql == "b"


def test_why_a_session_was_cut_off_is_told(world):
    error = ChatError(503, message="the house is on fire")
    with Env(world.db_path, tools=("sql",)) as env:
        cut = LLMAgent(Script(SPOKEN, "NO INSIGHT", error), protocol="text").run(env)
        asked = ReactiveAgent(LLMAgent(Script(*["FINISH:"] * 11, error), protocol="text"), build_checklist(world)).run(env)
        whole = LLMAgent(Script("FINISH:"), protocol="text").run(env)
    assert cut.error is error and len(cut.turns) == 1 and asked.error is error and not hasattr(whole, "error")


# --- agents that never look -------------------------------------------------------------------------------------------


def test_agents_that_are_served_together_hear_what_each_would_hear_alone():
    model, words = module._measured_model("cpu", small=True), module._Bytes()
    rules = "x" * 40
    def talk(i, rules=rules):
        return Request([{"role": "system", "content": rules}, {"role": "user", "content": f"shop {i}" * (i + 1)}], max_tokens=5)
    alone = [TransformersChat(model, words).generate([talk(i)])[0].text for i in range(6)]
    together = TogetherChat(model, words)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            found = list(pool.map(lambda i: together.generate([talk(i)])[0].text, range(6)))
            assert found == alone
    assert [r.text for r in together.generate([talk(i) for i in range(6)])] == alone and together.reused >= 6 * 40
    before = together.reused
    assert together.generate([talk(3)])[0].text == alone[3] and together.reused == before + 40 + len("\nshop ")  # one alone reuses, too
    assert together.generate([talk(1, "other rules"), talk(0)])[1].text == alone[0]
    assert pickle.loads(pickle.dumps(together)).generate([talk(2)])[0].text == alone[2]  # noqa: S301
    with pytest.raises(TypeError, match="needs generate, TinyLM has none"):
        TogetherChat(TinyLM(len(LETTERS)), LETTERS)


def test_states_that_can_not_lie_in_one_place_grow():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, head_dim=16, sliding_window=16, eos_token_id=None, bos_token_id=None)
    model, words = MistralForCausalLM(config).eval(), module._Bytes()
    asked = [Request([{"role": "system", "content": "y" * 40}, {"role": "user", "content": f"shop {i}"}], max_tokens=5) for i in range(4)]
    together = TogetherChat(model, words)
    assert [r.text for r in together.generate(asked)] == [TransformersChat(model, words).generate([r])[0].text for r in asked]
    assert together.reused >= 4 * 40 and module._spread(together._decoder.kept.popitem()[1], config, 4, 99)[1] == {}


def test_a_request_that_fails_is_an_error_for_who_asked():
    together = TogetherChat(module._measured_model("cpu", small=True), module._Bytes())
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        together.generate([Request([{"role": "user", "content": ""}])])
    assert together.generate([Request([{"role": "user", "content": "x"}], max_tokens=2)])[0].usage.completion_tokens == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=18, max_size=24), min_size=1, max_size=4), st.integers(0, 24))
def test_a_common_beginning_leaves_each_row_something_to_read(rows, n):
    kept = [tuple(rows[0][:n])] if n else []
    found = module._beginning(rows, kept)
    assert all(tuple(row[: len(found)]) == found and len(found) < len(row) for row in rows)
    assert not found or found in kept or (len(found) >= 16 and len(rows) > 1)


def test_the_measurement_runs_small(monkeypatch):
    monkeypatch.setattr(module, "_long_session", lambda turns: a_session(3, np.random.default_rng(0)))
    one, many, stop = module.measure("cpu", small=True)
    assert (one["name"], many["name"], stop["name"]) == ("agents/decode_one", "agents/in_flight", "agents/one_pass")
    assert many["agents"] == 6 and many["reused"] > 0 and stop["gap"] < 1e-3 and min(r["measured"] for r in (one, many, stop)) > 0
