"""Properties of `collai.eval.inspect`: what crosses the bridge comes back, scores are equal on both sides, no network."""

import asyncio
import base64
import io
import json
import math
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.eval import inspect as module
from collai.eval.inspect import InspectChat, as_task, chat_as_model, write_log
from collai.eval.llm import ChatError, ChatRefused, Reply, Request, TokenUsage, _noise_seed
from collai.eval.store import Store, run_cells

pytest.importorskip("inspect_ai", reason="the extra [inspect] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning")
quickly = settings(deadline=None, derandomize=True, max_examples=25)
asked = []


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    """Inspect's own files go to a temporary folder; whoever knocks at a network fails."""
    def refuse(self, address):
        if self.family != socket.AF_UNIX:
            asked.append(address)
            raise OSError(f"no network in this test, {address} was asked for")
        return connect(self, address)

    folder, connect, patch = tmp_path_factory.mktemp("inspect"), socket.socket.connect, pytest.MonkeyPatch()
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        patch.setenv(name, str(folder / name))
    patch.setattr(socket.socket, "connect", refuse)
    patch.chdir(folder)
    yield
    patch.undo()
    assert asked == [], "a network was asked for"


class Echo:
    """Answers with the length and the end of what it is asked; counts its requests."""

    name = "echo"

    def __init__(self):
        self.seen, self.threads = [], set()

    def reply(self, request):
        self.seen.append(request)
        text = "".join(part if isinstance(part, str) else part.get("text", "") for part in request.messages[-1]["content"])
        return Reply(f"{len(text)}:{text[-3:]}", "stop", TokenUsage(len(text) + 5, 7, 2), model="echo-1", seconds=0.5)

    async def agenerate(self, requests):
        self.threads.add(threading.current_thread())
        return self.generate(requests)

    def generate(self, requests):
        return [self.reply(request) for request in requests]

    def identity(self):
        return {"provider": "test", "model": "echo"}


def question(text, **more):
    return Request([{"role": "user", "content": text}], **more)


def there_and_back(q):
    return module._request(module._inspect_messages(q.messages), module._tools(q), "auto", module._config(q))


PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": ["é", null]}'}}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
texts = st.text(max_size=6)
pictures = st.integers(0, 99).map(lambda i: {"type": "image", "image": PICTURE + np.uint8(i)})
pieces = st.one_of(texts.map(lambda t: {"type": "text", "text": t}), pictures)
contents = st.one_of(texts, st.lists(pieces, min_size=1, max_size=3))
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}),
    st.just({"role": "assistant", "content": "", "tool_calls": [CALL]}),
    st.just({"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}),
)


fields = st.fixed_dictionaries({
    "messages": st.lists(messages, min_size=1, max_size=4),
    "max_tokens": st.integers(1, 99),
    "temperature": st.sampled_from([0.0, 0.7, 1.3]),
    "top_p": st.sampled_from([1.0, 0.3]),
    "stop": st.lists(st.sampled_from(["\n", "END"]), unique=True),
    "seed": st.one_of(st.none(), st.integers(0, 2**40)),
    "tools": st.sampled_from([(), (TOOL,)]),
    "logprobs": st.integers(0, 3),
})


@given(fields)
@quickly
def test_a_request_comes_back_as_it_was(given_fields):
    request = Request(**given_fields)
    assert there_and_back(request) == request


def test_a_repeated_draw_keeps_its_seed():
    request = question("x", temperature=1.0, seed=3, sample=4)
    assert there_and_back(request).seed == _noise_seed(request) and there_and_back(request).sample == 0


def test_what_a_config_leaves_open_is_the_default_of_a_request():
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    user = [ChatMessageUser(content="x")]
    assert module._request(user, [], "auto", GenerateConfig()) == question("x")
    config = GenerateConfig(num_choices=1, logprobs=True, max_connections=3, timeout=9)
    assert module._request(user, [], "auto", config) == question("x", logprobs=1)


def test_tools_that_are_switched_off_are_not_told():
    user, tools, config = module._inspect_messages(question("x").messages), module._tools(question("x", tools=[TOOL])), module._config(question("x"))
    assert module._request(user, tools, "none", config).tools == ()
    assert len(module._request(user, tools, "auto", config).tools) == 1


def test_pictures_may_be_files_or_of_another_format_and_reasoning_is_left_out(tmp_path):
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ContentImage, ContentReasoning, ContentText
    from PIL import Image

    flat, file = np.full((8, 8, 3), 128, np.uint8), io.BytesIO()
    Image.fromarray(flat).save(tmp_path / "a.png")
    Image.fromarray(flat).save(file, "JPEG")
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [ContentText(text="see"), ContentImage(image=str(tmp_path / "a.png")), ContentImage(image=uri)]
    thought = ChatMessageAssistant(content=[ContentReasoning(reasoning="hm"), ContentText(text="so")])
    ours = Request(module._our_messages([ChatMessageUser(content=parts), thought])).messages
    assert [part["type"] for part in ours[0]["content"]] == ["text", "image", "image"]
    assert all((part["image"] == 128).all() for part in ours[0]["content"][1:])
    assert ours[1]["content"] == [{"type": "text", "text": "so"}]


def test_what_our_chats_have_no_word_for_is_refused():
    from inspect_ai.model import ChatMessageUser, ContentAudio, ContentImage, GenerateConfig

    user = module._inspect_messages(question("x").messages)
    for name, value in {"top_k": 3, "num_choices": 2, "frequency_penalty": 0.5, "logit_bias": {1: 2.0}}.items():
        with pytest.raises(ValueError, match=f"{name} is not supported, got {value}"):
            module._request(user, [], "auto", GenerateConfig(**{name: value}))
    with pytest.raises(ValueError, match="tool_choice must be 'auto' or 'none', got 'any'"):
        module._request(user, module._tools(question("x", tools=[TOOL])), "any", GenerateConfig())
    with pytest.raises(ValueError, match="content must be text or image, got 'audio'"):
        module._our_messages([ChatMessageUser(content=[ContentAudio(audio="a.wav", format="wav")])])
    with pytest.raises(ValueError, match="an image must be a data URI or a local file, got 'https://x/y.png'"):
        module._our_messages([ChatMessageUser(content=[ContentImage(image="https://x/y.png")])])


REPLIES = [
    Reply("hello", "stop", TokenUsage(3, 5, 2), model="m"),
    Reply("hel", "length", TokenUsage(3, 5), model="m"),
    Reply("", "tool_calls", TokenUsage(3, 5), [CALL], model="m"),
    Reply("ab", "stop", TokenUsage(3, 2), (), [("a", -0.5, {"a": -0.5, "x": -1.0}), ("b", 0.0, {})], model="m"),
]


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_comes_back_as_it_was(reply):
    back = module._reply(module._output(reply), question("x", logprobs=2), 0.0)
    assert (back.text, back.finish_reason, back.usage, back.model) == (reply.text, reply.finish_reason, reply.usage, reply.model)
    assert list(back.tool_calls) == list(reply.tool_calls) and back.logprobs == reply.logprobs and not back.cached


def test_logprobs_that_were_not_asked_for_are_left_out():
    assert module._reply(module._output(REPLIES[3]), question("x"), 0.0).logprobs is None


@pytest.mark.parametrize("arguments", ["not json", "[1, 2]", "3"])
def test_arguments_that_are_no_object_become_an_error_for_inspect(arguments):
    call = module._inspect_call({"id": "c", "function": {"name": "add", "arguments": arguments}})
    assert call.arguments == {} and call.parse_error == f"arguments are no JSON object: {arguments}"


def model_of(**fields):
    """An Inspect model whose output has these fields."""
    from inspect_ai.model import ModelOutput, get_model

    output = ModelOutput.from_content("mock", fields.pop("text", "hi"), fields.pop("stop_reason", "stop"))
    return get_model("mockllm/model", custom_outputs=lambda *_: output.model_copy(update=fields))


def test_tokens_are_taken_over_with_those_of_a_provider_cache():
    from inspect_ai.model import ModelUsage

    used = ModelUsage(input_tokens=3, output_tokens=5, total_tokens=23, input_tokens_cache_read=10, input_tokens_cache_write=5,
                      reasoning_tokens=9)
    assert InspectChat(model_of(usage=used)).generate([question("x")])[0].usage == TokenUsage(18, 5, 5)


def test_tokens_that_a_provider_left_out_are_bounded():
    output = module._output(REPLIES[0]).model_copy(update={"usage": None})
    usage = module._reply(output, question("x" * 50, max_tokens=9), 0.0).usage
    assert usage.prompt_tokens > 50 and usage.completion_tokens == 9


@pytest.mark.parametrize(("theirs", "ours"), [("max_tokens", "length"), ("model_length", "length"), ("unknown", "stop")])
def test_reasons_have_our_names(theirs, ours):
    from inspect_ai.model import ModelUsage

    assert InspectChat(model_of(stop_reason=theirs, usage=ModelUsage())).generate([question("x")])[0].finish_reason == ours


def test_a_filtered_or_empty_output_is_refused():
    from inspect_ai.model import ModelOutput, ModelUsage

    with pytest.raises(ChatRefused, match="the provider stopped the reply"):
        InspectChat(model_of(stop_reason="content_filter", usage=ModelUsage())).generate([question("x")])
    with pytest.raises(ChatRefused, match="not today"):
        module._reply(ModelOutput(error="not today"), question("x"), 0.0)


class StatusError(Exception):
    def __init__(self, status_code):
        super().__init__(f"status {status_code}")
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (StatusError(400), ChatRefused, 400),
        (StatusError(404), ChatRefused, 404),
        (StatusError(429), ChatError, 429),
        (StatusError(408), ChatError, 408),
        (StatusError(503), ChatError, 503),
        (ChatError(500, False), ChatError, 500),
        (TimeoutError("late"), TimeoutError, None),
        (ZeroDivisionError("bug"), ZeroDivisionError, None),
    ],
)
def test_errors_with_a_status_arrive_as_ours(error, kind, status):
    def fail(*_):
        raise error

    from inspect_ai.model import get_model

    with pytest.raises(kind) as caught:
        InspectChat(get_model("mockllm/model", custom_outputs=fail)).generate([question("x")])
    assert type(caught.value) is kind and getattr(caught.value, "status", None) == status


def test_a_chat_comes_back_through_both_doors():
    echo = Echo()
    chat = InspectChat(chat_as_model(echo))
    requests = [question(f"question {i}", temperature=0.3 * i, max_tokens=9, seed=i) for i in range(5)]
    replies = chat.generate(requests)
    assert [reply.text for reply in replies] == [reply.text for reply in Echo().generate(requests)]
    assert Counter(map(hash, echo.seen)) == Counter(map(hash, requests))
    assert [reply.usage for reply in replies] == [reply.usage for reply in Echo().generate(requests)]
    assert chat.name == "collai/echo" and replies[0].model == "echo-1" and replies[0].seconds > 0
    assert chat.identity() == {"provider": "inspect", "model": "collai/echo", "config": {}, "chat": echo.identity()}
    assert all(chat.bound(q).prompt_tokens >= r.usage.prompt_tokens for q, r in zip(requests, replies, strict=True))
    assert chat.bound(requests[0]).completion_tokens == 9


def test_generate_works_where_an_event_loop_runs_and_agenerate_inside_it():
    chat = InspectChat(chat_as_model(Echo()))

    async def both():
        return chat.generate([question("abc")])[0].text, (await chat.agenerate([question("abc")]))[0].text

    assert asyncio.run(both()) == ("3:abc", "3:abc")


def test_the_usage_of_a_model_is_always_filled_in_without_a_network():
    output = asyncio.run(chat_as_model(Echo()).generate("hello"))
    usage = output.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens, usage.reasoning_tokens) == (10, 7, 17, 2)
    assert output.completion == "5:llo" and output.model == "echo-1" and output.message.source == "generate"


def test_the_identity_tells_configurations_apart():
    from inspect_ai.model import GenerateConfig, Model

    warm = Model(chat_as_model(Echo()).api, GenerateConfig(temperature=0.5))
    assert InspectChat(warm).identity()["config"] == {"temperature": 0.5}
    assert InspectChat(model_of()).identity()["chat"] is None


@pytest.mark.parametrize("model", [3, None, ["mockllm/model"]])
def test_other_things_are_no_models(model):
    with pytest.raises(TypeError, match=r"model must be a str or an inspect_ai\.model\.Model, got"):
        InspectChat(model)


SAMPLES = [
    {"id": "a", "input": "one", "metadata": {"level": 1}},
    {"id": 2, "input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "three words here"}]},
    {"id": "c", "input": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "image": PICTURE}]}]},
]
TRUTH = {"a": "3:one", 2: "16:ere", "c": "3:xxx"}


def run(task, model, tmp_path, **options):
    from inspect_ai import eval as run_task

    return run_task(task, model=model, log_dir=str(tmp_path / "logs"), display="none", **options)[0]


def exact(key, output, state):
    return float(output == TRUTH[key])


def graded(key, output, state):
    return {"exact": np.bool_(output == TRUTH[key]), "length": np.float32(len(output))}


def twice(key, chat):
    first = chat.generate([question(f"first {key}"), question(f"second {key}", temperature=0.5)])
    return "|".join(reply.text for reply in (*first, *chat.generate([question(first[0].text)])))


def messages_of(sample):
    return [{"role": "user", "content": sample["input"]}] if isinstance(sample["input"], str) else sample["input"]


@pytest.mark.parametrize("solve", [None, twice])
@pytest.mark.parametrize("score", [exact, graded])
def test_scores_are_equal_sample_by_sample_through_eval_and_run_cells(tmp_path, score, solve):
    def cell(sample, seed):
        chat = Echo()
        text = solve(sample["id"], chat) if solve else chat.generate([Request(messages_of(sample))])[0].text
        value = score(sample["id"], text, None)
        return {"score": {k: float(v) for k, v in value.items()} if isinstance(value, dict) else value, "text": text}

    log = run(as_task("words", SAMPLES, score, solve), chat_as_model(Echo()), tmp_path)
    assert log.status == "success", log.error
    with Store(tmp_path / "a.db", "words") as store:
        run_cells(store, {sample["id"]: sample for sample in SAMPLES}, cell)
        ours = dict(zip([2, "a", "c"], store.rows(), strict=True))
    theirs = {sample.id: sample.scores["score"].value for sample in log.samples}
    assert all(sample.messages[-1].text == sample.output.completion for sample in log.samples)
    assert theirs == {key: row["score"] for key, row in ours.items()}
    assert {sample.id: sample.output.completion for sample in log.samples} == {key: row["text"] for key, row in ours.items()}
    metrics = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    values = list(theirs.values())
    columns = {"mean": values} if score is exact else {name: [value[name] for value in values] for name in ("exact", "length")}
    for name, column in columns.items():
        error = metrics["stderr" if name == "mean" else f"{name} stderr"]
        assert abs(metrics[name] - np.mean(column)) < 1e-12 and abs(error - np.std(column, ddof=1) / math.sqrt(3)) < 1e-12


def test_samples_hold_no_truth_and_inputs_are_not_changed(tmp_path):
    samples = [{"id": "a", "input": [{"role": "user", "content": "one"}], "metadata": {"level": [1]}}]
    before = json.dumps(samples)
    log = run(as_task("t", samples, exact), chat_as_model(Echo()), tmp_path)
    assert json.dumps(samples) == before and log.samples[0].target == "" and log.samples[0].metadata == {"level": [1]}
    assert log.samples[0].scores["score"].answer == "3:one" and log.eval.task == "t"
    assert sum(usage.total_tokens for usage in log.stats.model_usage.values()) == 3 + 5 + 7


def test_a_solver_that_never_asks_a_model_needs_none(tmp_path):
    log = run(as_task("t", SAMPLES, lambda key, output, state: len(output), lambda key, chat: f"{key}!"), "none", tmp_path)
    assert log.status == "success" and [sample.scores["score"].value for sample in log.samples] == [2.0, 2.0, 2.0]


def test_the_score_sees_inspects_state_and_runs_beside_the_loop(tmp_path):
    threads = set()

    def score(key, output, state):
        threads.add(threading.current_thread())
        return state.metadata["level"] + state.epoch

    log = run(as_task("t", SAMPLES[:1], score), chat_as_model(Echo()), tmp_path, epochs=3)
    assert [sample.scores["score"].value for sample in log.samples] == [2.0, 3.0, 4.0]
    assert threading.main_thread() not in threads and log.results.scores[0].metrics["mean"].value == 3.0


def test_the_calls_of_an_agent_are_in_its_samples_transcript_also_from_its_own_threads(tmp_path):
    def solve(key, chat):
        with ThreadPoolExecutor(3) as pool:
            return "".join(reply[0].text for reply in pool.map(lambda i: chat.generate([question(f"{key}{i}")]), range(3)))

    log = run(as_task("t", SAMPLES, lambda *_: 1, solve), chat_as_model(Echo()), tmp_path)
    assert log.status == "success", log.error
    for sample in log.samples:
        calls = [event.input[-1].text for event in sample.events if event.event == "model"]
        assert sorted(calls) == [f"{sample.id}{i}" for i in range(3)]
        assert sum(usage.total_tokens for usage in sample.model_usage.values()) == sum(len(text) + 12 for text in calls)


def test_a_judge_made_elsewhere_finds_the_evaluation(tmp_path):
    echo = Echo()
    judge = InspectChat(chat_as_model(echo))

    def score(key, output, state):
        return float(judge.generate([question(f"is {output} right")])[0].text[:2])

    log = run(as_task("t", SAMPLES[:1], score), chat_as_model(Echo()), tmp_path)
    assert log.samples[0].scores["score"].value == 14.0
    assert [event.input[-1].text for event in log.samples[0].events if event.event == "model"] == ["one", "is 3:one right"]
    assert echo.threads == {threading.main_thread()}, "the judge was asked outside the loop of the evaluation"


def test_limits_of_inspect_hold_for_an_agents_loop(tmp_path):
    asked = []

    def endless(key, chat):
        while True:
            asked.append(chat.generate([question("again")])[0].text)

    log = run(as_task("t", SAMPLES[:1], lambda *_: 1, endless), chat_as_model(Echo()), tmp_path, token_limit=100)
    assert log.status == "success" and log.samples[0].limit.type == "token" and 4 <= len(asked) <= 7


def test_generate_inside_the_loop_of_the_evaluation_says_what_to_do():
    chat = InspectChat(chat_as_model(Echo()))

    async def inside():
        chat._home = (asyncio.get_running_loop(), module.contextvars.copy_context())
        return chat.generate([question("x")])

    with pytest.raises(RuntimeError, match="generate would wait for its own thread: await agenerate there"):
        asyncio.run(inside())


@pytest.mark.parametrize(
    ("score", "solve", "message"),
    [
        (lambda *_: float("nan"), None, "score of sample 'a' must be a finite number, got nan"),
        (lambda *_: "good", None, "score of sample 'a' must be a finite number, got 'good'"),
        (lambda *_: {"x": None}, None, "score of sample 'a', 'x', must be a finite number, got None"),
        (lambda *_: 1, lambda key, chat: 3, "solve must return a str, got 3 for sample 'a'"),
    ],
)
def test_a_wrong_result_fails_its_sample_with_its_value(tmp_path, score, solve, message):
    log = run(as_task("t", SAMPLES[:1], score, solve), chat_as_model(Echo()), tmp_path)
    assert log.status == "error" and message in log.error.message


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"id": 1, "input": "x", "target": "y"}], "a sample has id, input and metadata, got the key 'target'"),
        ([{"input": "x"}], "every sample needs an id of its own, a str or an int, got None"),
        ([{"id": True, "input": "x"}], "a str or an int, got True"),
        ([{"id": 1, "input": "x"}, {"id": "1", "input": "y"}], "an id of its own, a str or an int, got '1'"),
        ([{"id": 1, "input": ""}], "sample 1 needs an input, got ''"),
        ([{"id": 1}], "sample 1 needs an input, got None"),
        ([{"id": 1, "input": [{"role": "boss", "content": "x"}]}], "role must be one of"),
        ([], "a task needs at least one sample, got none"),
    ],
)
def test_wrong_samples_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        as_task("t", samples, exact)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="score and solve must be callable, got 3 and None"):
        as_task("t", SAMPLES, 3)
    with pytest.raises(TypeError, match="score and solve must be callable, got .* and 'x'"):
        as_task("t", SAMPLES, exact, "x")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "a.db", "study") as opened:
        for i in range(4):
            row = {"score": i / 4, "right": i > 1, "seconds": 0.5, "input": f"q{i}", "output": f"a{i}", "steps": [i]}
            opened.add(("task", i), row)
        yield opened


def read(path):
    from inspect_ai.log import read_eval_log

    return read_eval_log(str(path))


@pytest.mark.parametrize("kind", ["eval", "json"])
def test_finished_cells_are_a_log_that_inspect_reads(store, tmp_path, kind):
    store._fail('["task", 9]', "TimeoutError", "late", 3)
    write_log(store, tmp_path / f"cells.{kind}", "my task")
    log = read(tmp_path / f"cells.{kind}")
    assert log.status == "success" and log.eval.task == "my task" and log.eval.metadata == {"fingerprint": store.fingerprint}
    assert [sample.id for sample in log.samples] == [f'["task", {i}]' for i in range(4)] == log.eval.dataset.sample_ids
    assert [sample.metadata for sample in log.samples] == store.rows()
    assert [(s.input, s.output.completion, s.target) for s in log.samples] == [(f"q{i}", f"a{i}", "") for i in range(4)]
    assert [message.text for message in log.samples[2].messages] == ["q2", "a2"]
    assert [{name: score.value for name, score in s.scores.items()} for s in log.samples] == [{"score": i / 4} for i in range(4)]
    metrics = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    assert metrics == {"mean": 0.375, "stderr": np.std([0, 0.25, 0.5, 0.75], ddof=1) / 2}
    assert log.results.total_samples == log.results.completed_samples == 4
    assert sorted(p.name for p in tmp_path.iterdir() if "cells" in p.name) == [f"cells.{kind}"]


def test_without_a_score_every_number_is_one_and_gaps_stay_gaps(tmp_path):
    with Store(tmp_path / "a.db", 1) as store:
        store.add(1, {"right": True, "tokens": 7, "text": "x", "score": None})
        store.add(2, {"right": False, "note": None})
        write_log(store, str(tmp_path / "a.json"), "t")
    log = read(tmp_path / "a.json")
    assert [{n: s.value for n, s in sample.scores.items()} for sample in log.samples] == [{"right": 1.0, "tokens": 7.0}, {"right": 0.0}]
    means = {score.name: score.metrics["mean"].value for score in log.results.scores}
    assert means == {"right": 0.5, "tokens": 7.0} and log.samples[0].input == "1" and log.samples[0].messages == []
    assert log.results.scores[1].metrics["stderr"].value == 0.0


def test_scores_by_name_stay_together(tmp_path):
    with Store(tmp_path / "a.db", 1) as store:
        store.add("x", {"score": {"f1": 0.5, "em": False}})
        store.add("y", {"score": {"f1": 1.0, "em": True}})
        write_log(store, tmp_path / "a.eval", "t")
    log = read(tmp_path / "a.eval")
    assert [sample.scores["score"].value for sample in log.samples] == [{"f1": 0.5, "em": 0.0}, {"f1": 1.0, "em": 1.0}]
    assert {n: m.value for n, m in log.results.scores[0].metrics.items() if "std" not in n} == {"f1": 0.75, "em": 0.5}


def test_ids_stay_apart_when_keys_look_alike(tmp_path):
    keys = [1, "1", "a/b", ("a", 1), '["a", 1]']
    with Store(tmp_path / "a.db", 1) as store:
        for key in keys:
            store.add(key, {"score": 1, "text": str(key)})
        write_log(store, tmp_path / "a.eval", "t")
    log = read(tmp_path / "a.eval")
    assert {sample.id: sample.metadata["text"] for sample in log.samples} == {module._key_text(key): str(key) for key in keys}


def test_inspects_viewer_takes_the_log(store, tmp_path):
    from inspect_ai.log import bundle_log_dir, list_eval_logs

    write_log(store, tmp_path / "logs" / "first.eval", "first")
    write_log(store, tmp_path / "logs" / "first.eval", "second")
    assert [log.name.rsplit("/", 1)[1] for log in list_eval_logs(str(tmp_path / "logs"))] == ["first.eval"]
    bundle_log_dir(log_dir=str(tmp_path / "logs"), output_dir=str(tmp_path / "site"))
    assert (tmp_path / "site" / "index.html").is_file()
    assert read(next((tmp_path / "site").rglob("first.eval"))).eval.task == "second"
    listing = json.loads(next((tmp_path / "site").rglob("listing.json")).read_text())
    assert listing["first.eval"]["task"] == "second" and listing["first.eval"]["status"] == "success"


def test_wrong_names_and_empty_stores_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.eval or \.json, got 'cells\.jsonl'"):
        write_log(store, tmp_path / "cells.jsonl", "t")
    with Store(tmp_path / "empty.db", 1) as empty, pytest.raises(ValueError, match=r"empty\.db has no finished cell"):
        write_log(empty, tmp_path / "cells.eval", "t")
    assert not list(tmp_path.glob("*cells*"))


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, store, tmp_path):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    for call in (
        lambda: as_task("t", SAMPLES, exact),
        lambda: InspectChat("mockllm/model"),
        lambda: chat_as_model(Echo()),
        lambda: write_log(store, tmp_path / "a.eval", "t"),
    ):
        with pytest.raises(ImportError, match=r'pip install "collai\[inspect\]"'):
            call()


def test_import_is_light_and_hides_no_module_of_the_standard_library():
    code = (
        "import sys, collai.eval.inspect, inspect; assert inspect.getdoc(print); "
        "print({'torch', 'transformers', 'openai', 'inspect_ai', 'pandas', 'anyio', 'PIL'} & set(sys.modules), inspect.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["set()", "inspect"], done.stderr
