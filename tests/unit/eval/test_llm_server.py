"""`OpenAIChat` and `ChatServer` of `collai.eval.llm` through real HTTP, with the real `openai` client."""

import asyncio
import base64
import functools
import gc
import io
import json
import logging
import operator
import pickle
import threading
import time
import urllib.error
import urllib.request
from email.utils import formatdate

import numpy as np
import openai
import pytest
from PIL import Image

from collai.core.tinylm import CharTokenizer, TinyLM
from collai.eval import llm
from collai.eval.llm import (
    BadReply,
    CachedChat,
    ChatError,
    ChatRefused,
    ChatServer,
    ChatTimeout,
    OpenAIChat,
    Reply,
    Request,
    TokenUsage,
    TransformersChat,
)

FAULTS = (None, 429, None, "cut", None, 500, None, "garbage", None, "hang", None, 503)
SECRET = "sk-abcdefghijklmnop"  # noqa: S105


def ask(text, **options):
    return Request([{"role": "user", "content": text}], **options)


def total(replies):
    return functools.reduce(operator.add, (r.usage for r in replies))


class Fixed:
    """Gives one reply to everything, or raises."""

    name = "fixed"

    def __init__(self, reply):
        self.reply, self.seen = reply, []

    def generate(self, requests):
        self.seen += requests
        if isinstance(self.reply, Exception):
            raise self.reply
        return [self.reply for _ in requests]


def raw_server(content, monkeypatch):
    """Serve one fixed body, status 200."""
    monkeypatch.setattr(llm, "_reply_to", lambda server, raw: (200, content, TokenUsage(0, 0)))
    return ChatServer(None)


def test_right_replies_in_the_right_order_and_the_bill_under_every_fault():
    questions = [ask(f"question {i}") for i in range(20)]
    with ChatServer(llm._Echo(0.01), faults=FAULTS, hang_s=6.0) as server:
        replies = OpenAIChat(model="local", base_url=server.base_url, timeout=4.0).generate(questions)
        assert {e["fault"] for e in server.requests} == set(FAULTS)
    assert [r.text for r in replies] == [f"question {i}" for i in range(20)]
    assert total(replies) == server.billed == TokenUsage(20 * 7 + 210, 210)
    assert sum(e["fault"] is None for e in server.requests) == 20 < len(server.requests)
    assert all(r.seconds > 0 and not r.cached and r.model == "local" for r in replies)


@pytest.mark.parametrize(
    ("fault", "kind", "status", "billed", "wait"),
    [
        (400, ChatRefused, 400, False, None),
        (401, ChatRefused, 401, False, None),
        (404, ChatRefused, 404, False, None),
        (408, ChatError, 408, False, None),
        (409, ChatError, 409, False, None),
        (429, ChatError, 429, False, 0.1),
        (500, ChatError, 500, False, None),
        (503, ChatError, 503, False, 0.1),
        ("cut", ChatError, None, None, None),
        ("hang", ChatTimeout, None, None, None),
        ("garbage", BadReply, 200, None, None),
    ],
)
def test_without_retries_every_fault_says_what_it_is_and_is_sent_once(fault, kind, status, billed, wait):
    with ChatServer(llm._Echo(), faults=(fault,), hang_s=2.0) as server:
        chat = OpenAIChat(model="local", base_url=server.base_url, timeout=1.0 if fault == "hang" else 30, max_retries=0)
        with pytest.raises(ChatError) as caught:
            chat.generate([ask("a")])
        assert len(server.requests) == 1 and server.billed == TokenUsage(0, 0)
    error = caught.value
    assert (type(error), error.status, error.billed, error.retry_after) == (kind, status, billed, wait)


def test_a_server_that_is_not_there_has_billed_nothing():
    with ChatServer(llm._Echo()) as server:
        pass
    with pytest.raises(ChatError, match="Connect") as caught:
        OpenAIChat(model="local", base_url=server.base_url, max_retries=0).generate([ask("a")])
    assert caught.value.billed is False and caught.value.status is None


def test_attempts_are_counted_over_faults_of_all_kinds():
    for faults, attempts in (((429, "garbage", 429, None), 4), (("garbage", None), 2), ((503, "garbage"), 4), ((503,), 4)):
        with ChatServer(llm._Echo(), faults=faults) as server:
            chat = OpenAIChat(model="local", base_url=server.base_url, max_retries=3)
            if None in faults:
                assert chat.generate([ask("a")])[0].text == "a"
            else:
                with pytest.raises(ChatError):
                    chat.generate([ask("a")])
            assert len(server.requests) == attempts


def test_a_refused_request_is_not_repeated_and_the_others_finish_first(tmp_path):
    with ChatServer(llm._Echo(0.05), faults=(400,) + (None,) * 50) as server:
        chat = CachedChat(OpenAIChat(model="local", base_url=server.base_url), tmp_path / "c")
        with pytest.raises(ChatRefused, match="fault 400 on schedule"):
            chat.generate([ask(str(i)) for i in range(9)])
        assert len(server.requests) == 9
        assert [r.text for r in chat.generate([ask(str(i)) for i in range(9)])] == [str(i) for i in range(9)]
        assert len(server.requests) == 10 and server.billed == TokenUsage(8 * 9, 9)


def test_plain_code_threads_and_event_loops_may_all_ask_one_chat():
    with ChatServer(llm._Echo(0.01)) as server:
        chat, said = OpenAIChat(model="local", base_url=server.base_url), {}

        async def loop(name):
            inside = chat.generate([ask(f"{name} plain")])
            awaited = await asyncio.gather(*(chat.agenerate([ask(f"{name} {i}")]) for i in range(3)))
            said[name] = [r.text for r in (*inside, *(r for (r,) in awaited))]

        workers = [threading.Thread(target=lambda n=n: asyncio.run(loop(n))) for n in "ab"]
        for w in workers:
            w.start()
        asyncio.run(loop("c"))
        for w in workers:
            w.join()
        assert said == {n: [f"{n} plain", *(f"{n} {i}" for i in range(3))] for n in "abc"}
        assert chat.generate([]) == []


def test_generate_in_the_background_loop_is_an_error_and_not_a_deadlock():
    chat = OpenAIChat(model="local", base_url="http://127.0.0.1:9/v1")

    async def wrong():
        return chat.generate([ask("a")])

    with pytest.raises(RuntimeError, match="await agenerate there"):
        llm._wait(wrong())


def test_no_more_than_concurrency_requests_are_under_way():
    class Busy(llm._Echo):
        now = most = 0

        def generate(self, requests):
            with lock:
                self.now += 1
                self.most = max(self.most, self.now)
            made = super().generate(requests)
            with lock:
                self.now -= 1
            return made

    lock, busy = threading.Lock(), Busy(0.05)
    with ChatServer(busy) as server:
        OpenAIChat(model="local", base_url=server.base_url, concurrency=3).generate([ask(str(i)) for i in range(9)])
    assert busy.most == 3


def test_the_body_holds_sampling_always_and_the_rest_where_it_is_asked_for():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    full = Request([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], 7, 0.5, 0.9, ("a", "b"), 3, (tool,), 2)
    with ChatServer(llm._Echo()) as server:
        OpenAIChat(model="local", base_url=server.base_url, concurrency=1).generate(
            [full, ask("u", temperature=1.0), ask("u", seed=3, sample=1), ask("u", sample=2)])
    bodies = [e["body"] for e in server.requests]
    assert bodies[0] == {"model": "local", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                         "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["a", "b"], "seed": 3, "tools": [tool],
                         "logprobs": True, "top_logprobs": 2}
    assert bodies[1] == {"model": "local", "messages": [{"role": "user", "content": "u"}], "max_tokens": 256,
                         "temperature": 1.0, "top_p": 1.0}  # else a server puts in the habits of its model
    seeds = [b.get("seed") for b in bodies]
    assert len(set(seeds)) == 4 and seeds[:2] == [3, None]


def test_openai_itself_gets_the_newer_name_of_the_limit_and_no_sampling_that_is_its_default(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    chat = OpenAIChat(model="m", api_key=SECRET)
    body = llm._wire_request(ask("a", max_tokens=5, temperature=1), chat.name, chat._openai)
    assert body["max_completion_tokens"] == 5 and not {"max_tokens", "temperature", "top_p"} & set(body)
    body = llm._wire_request(ask("a", temperature=0.5, top_p=0.9), chat.name, chat._openai)
    assert (body["temperature"], body["top_p"]) == (0.5, 0.9)
    assert llm._wire_request(ask("a"), chat.name, chat._openai)["temperature"] == 0


def test_pictures_travel_as_data_uris_and_arrive_as_the_same_pixels():
    array = np.random.default_rng(0).integers(0, 256, (9, 4, 3), dtype=np.uint8)
    parts = [{"type": "text", "text": "what"}, {"type": "image", "image": array}]
    request = Request([{"role": "user", "content": parts}])
    fixed = Fixed(Reply("cat", "stop", TokenUsage(5, 1)))
    with ChatServer(fixed) as server:
        assert OpenAIChat(model="local", base_url=server.base_url).generate([request])[0].text == "cat"
    url = server.requests[0]["body"]["messages"][0]["content"][1]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), array)
    assert fixed.seen == [request]


def test_tool_calls_log_probabilities_and_reasoning_come_through():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    steps = [("a", -0.25, {"a": -0.25, "b": -2.0}), ("ä", -1.5, {"ä": -1.5})]
    fixed = Fixed(Reply("", "tool_calls", TokenUsage(9, 8, 6), (call,), steps))
    with ChatServer(fixed) as server:
        chat = OpenAIChat(model="local", base_url=server.base_url)
        reply = chat.generate([ask("a", logprobs=2)])[0]
        assert (reply.finish_reason, reply.usage, reply.tool_calls, reply.logprobs) == ("tool_calls", TokenUsage(9, 8, 6), (call,), steps)
        talk = [*ask("a").messages, {"role": "assistant", "content": "", "tool_calls": list(reply.tool_calls)},
                {"role": "tool", "content": "2", "tool_call_id": "c1"}]
        chat.generate([Request(talk)])
        assert chat.generate([ask("a")])[0].logprobs is None
    assert fixed.seen[1] == Request(talk)


def test_a_local_model_behind_the_server_says_the_same_as_beside_it():
    words = CharTokenizer("abcdefgh .\n")
    local = TransformersChat(TinyLM(len(words)), words)
    questions = [ask("ab" * (1 + i), temperature=1.0, max_tokens=9, seed=i % 2, sample=i % 3, stop=("c",), logprobs=1) for i in range(6)]
    with ChatServer(local, model="tiny") as server:
        served = OpenAIChat(model="tiny", base_url=server.base_url).generate(questions)
    beside = local.generate(questions)
    assert [(r.text, r.finish_reason, r.usage) for r in served] == [(r.text, r.finish_reason, r.usage) for r in beside]
    assert all(np.isclose(a.logprobs[0][1], b.logprobs[0][1]) for a, b in zip(served, beside, strict=True))


def test_the_bare_client_is_served_too():
    with ChatServer(llm._Echo(), model="echo") as server, openai.OpenAI(base_url=server.base_url, api_key="none") as client:
        made = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hello"}])
        assert made.choices[0].message.content == "hello" and made.usage.total_tokens == 17
        assert [m.id for m in client.models.list()] == ["echo"]
        for wrong in ({"model": "other"}, {"model": "echo", "n": 2}, {"model": "echo", "stream": True}):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **wrong)
        with pytest.raises(openai.BadRequestError, match="ValueError: message 0: role must be one of"):
            client.chat.completions.create(model="echo", messages=[{"role": "robot", "content": "a"}])
        picture = [{"type": "image_url", "image_url": {"url": "http://example.invalid/a.png"}}]
        with pytest.raises(openai.BadRequestError, match="image_url must be a data URI"):
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": picture}])
        assert server.billed == TokenUsage(12, 5)


def test_errors_of_the_chat_behind_become_statuses():
    for error, status in ((TypeError("reads text only"), 400), (RuntimeError("out of memory"), 500)):
        with ChatServer(Fixed(error)) as server, pytest.raises(ChatError, match=str(error)) as caught:
            OpenAIChat(model="local", base_url=server.base_url, max_retries=0).generate([ask("a")])
        assert caught.value.status == status


def test_other_pages_and_methods_are_not_found():
    with ChatServer(llm._Echo()) as server:
        for page, data in (("/v1/other", None), ("/v1/embeddings", b"{}"), ("/", None)):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(server.base_url.removesuffix("/v1") + page, data)  # noqa: S310
        assert server.requests == []
        assert server._listener.server_address[0] == "127.0.0.1"


def test_a_server_that_was_left_answers_nobody_and_does_not_wait_for_what_hangs():
    start, met = time.monotonic(), []

    def hang():
        try:
            chat.generate([ask("b")])
        except ChatError as error:
            met.append(error)

    with ChatServer(llm._Echo(), faults=(None, "hang"), hang_s=30) as server:
        chat = OpenAIChat(model="local", base_url=server.base_url, max_retries=0)
        chat.generate([ask("a")])
        thread = threading.Thread(target=hang)
        thread.start()
        while len(server.requests) < 2 and time.monotonic() < start + 20:
            time.sleep(0.01)
    thread.join()
    with pytest.raises(ChatError):
        chat.generate([ask("c")])
    assert len(met) == 1 and time.monotonic() - start < 20


def test_a_connection_that_was_kept_open_is_not_served_after_the_end():
    with ChatServer(llm._Echo()) as server:
        chat = OpenAIChat(model="local", base_url=server.base_url, max_retries=0)
        chat.generate([ask("a")])
    with pytest.raises(ChatError):
        chat.generate([ask("b")])
    assert server.billed == TokenUsage(8, 1)


@pytest.mark.parametrize("fault", ["explode", 200, 600, 3.5, True])
def test_an_unknown_fault_is_refused(fault):
    with pytest.raises(ValueError, match=f"faults are None, 400 to 599, 'hang', 'cut' or 'garbage', got {fault!r}"):
        ChatServer(llm._Echo(), faults=(None, fault))


def completion(**changes):
    choice = {"finish_reason": "stop", "message": {"content": "hello"}} | changes.pop("choice", {})
    return json.dumps({"model": "m", "choices": [choice], "usage": {"prompt_tokens": 4, "completion_tokens": 2}} | changes).encode()


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b'{"choices": []}', b'{"error": "busy"}', completion(choice={"message": None}), completion(usage={"prompt_tokens": 1}),
     completion()[:-9], completion(choice={"message": {"content": [{"type": "text"}]}}), b"\xff"],
)
def test_a_body_without_a_choice_is_a_bad_reply(body, monkeypatch):
    with raw_server(body, monkeypatch) as server, pytest.raises(BadReply) as caught:
        OpenAIChat(model="local", base_url=server.base_url, max_retries=0).generate([ask("a")])
    assert caught.value.status == 200 and caught.value.billed is None


@pytest.mark.parametrize("reason", ["eos", "abort", None, 3, "length", "tool_calls"])
def test_a_whole_reply_is_kept_whatever_reason_the_server_gives(reason, monkeypatch):
    with raw_server(completion(choice={"finish_reason": reason}), monkeypatch) as server:
        reply = OpenAIChat(model="local", base_url=server.base_url).generate([ask("a")])[0]
        assert len(server.requests) == 1
    assert (reply.text, reply.usage) == ("hello", TokenUsage(4, 2))
    assert reply.finish_reason == (reason if reason in ("length", "tool_calls") else "stop")


def test_log_probabilities_may_come_without_alternatives(monkeypatch):
    steps = {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": None}, {"token": "b", "logprob": -2.0}]}
    with raw_server(completion(choice={"logprobs": steps}), monkeypatch) as server:
        reply = OpenAIChat(model="local", base_url=server.base_url).generate([ask("a", logprobs=1)])[0]
    assert reply.logprobs == [("a", -1.0, {}), ("b", -2.0, {})]


def test_a_server_may_be_entered_twice():
    server = ChatServer(llm._Echo())
    for text in "ab":
        with server:
            assert OpenAIChat(model="local", base_url=server.base_url, max_retries=0).generate([ask(text)])[0].text == text
    assert len(server.requests) == 2


def test_a_filtered_reply_is_refused_and_a_refusal_is_a_text(monkeypatch):
    with raw_server(completion(choice={"finish_reason": "content_filter"}), monkeypatch) as server:
        with pytest.raises(ChatRefused, match="content filter"):
            OpenAIChat(model="local", base_url=server.base_url).generate([ask("a")])
        assert len(server.requests) == 1
    with raw_server(completion(choice={"message": {"content": None, "refusal": "no"}}), monkeypatch) as server:
        assert OpenAIChat(model="local", base_url=server.base_url).generate([ask("a")])[0].text == "no"


class Template:
    """Adds a system message of its own, as templates of known models do."""

    chat_template = "yes"

    def encode(self, text, **_):
        return list(text.encode())

    def apply_chat_template(self, talk, *, tools, **_):
        head = "SYSTEM You are a helpful assistant, trained to be of use.\n" + json.dumps(tools or "")
        return head + "".join(f"<{m['role']}>{m['content']}{m.get('tool_calls', '')}\n" for m in talk)


def test_a_reply_without_usage_is_counted_or_bounded(monkeypatch):
    with raw_server(completion(usage=None), monkeypatch) as server:
        for tokenizer in (Template(), None):
            chat = OpenAIChat(model="local", base_url=server.base_url, tokenizer=tokenizer)
            question = ask("what?", max_tokens=77)
            usage, bound = chat.generate([question])[0].usage, chat.bound(question)
            assert usage.prompt_tokens == bound.prompt_tokens
            assert usage.completion_tokens == (77 if tokenizer is None else 5) and bound.completion_tokens == 77


def test_the_bound_without_a_tokenizer_is_never_below_the_count_of_a_byte_tokenizer():
    counted = OpenAIChat(model="m", base_url="http://127.0.0.1:9/v1", tokenizer=Template())
    bounded = OpenAIChat(model="m", base_url="http://127.0.0.1:9/v1")
    tool = {"type": "function", "function": {"name": "f", "description": "éé"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for text in ("", "a", "大" * 40, "\n\x00😀"):
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": text, "tool_call_id": "c"}]
        for request in (ask(text), ask(text, tools=(tool, tool)), Request(talk)):
            real = counted.bound(request).prompt_tokens
            assert real <= bounded.bound(request).prompt_tokens
    assert counted.bound(ask("a")).prompt_tokens > 1 + 16  # bytes and 16 a message are no bound
    small, large = (Request([{"role": "user", "content": [{"type": "image", "image": np.zeros((n, n, 3), np.uint8)}]}]) for n in (8, 4000))
    assert 50_000 < bounded.bound(small).prompt_tokens < 51_000
    assert 4000**2 // 196 < bounded.bound(large).prompt_tokens
    edge = Request([{"role": "user", "content": [{"type": "image", "image": np.zeros((3143, 3143, 3), np.uint8)}]}])
    assert llm._prompt_bound(edge, None) - llm._prompt_bound(ask(""), None) >= 225**2  # patches of 14 x 14, the last of a row padded


def test_a_wait_is_read_in_all_its_spellings():
    read = llm._retry_after
    assert read({"retry-after": "2"}) == 2.0 and read({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 3 < read({"retry-after": formatdate(time.time() + 5, usegmt=True)}) <= 5
    assert read({"retry-after": formatdate(0, usegmt=True)}) == 0.0
    assert read({}) is None and read({"retry-after": "soon"}) is None


def test_the_key_is_sent_and_appears_nowhere_else(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    fixed = Fixed(RuntimeError(f"bad key {SECRET} given"))
    with ChatServer(fixed) as server:
        chat = OpenAIChat(model="local", base_url=server.base_url, api_key=SECRET, max_retries=0)
        cached = CachedChat(chat, tmp_path / "c")
        with pytest.raises(ChatError, match=r"bad key \[key\] given") as caught:
            cached.generate([ask("a")])
        fixed.reply = Reply("x", "stop", TokenUsage(1, 1))
        cached.generate([ask("a")])
        cached.export(tmp_path / "r.jsonl")
    assert chat._client.api_key == SECRET
    told = [caplog.text, str(caught.value), repr(caught.value), json.dumps(chat.identity()), repr(vars(chat)), json.dumps(server.requests)]
    assert not any(SECRET in text for text in told)
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(TypeError, match="holds a key and connections"):
        pickle.dumps(chat)


def test_a_key_comes_from_the_argument_then_the_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no key: pass api_key, set OPENAI_API_KEY"):
        OpenAIChat(model="m")
    assert OpenAIChat(model="m", base_url="http://127.0.0.1:9/v1")._client.api_key == llm._NO_KEY
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert OpenAIChat(model="m")._client.api_key == SECRET
    assert OpenAIChat(model="m", api_key="mine")._client.api_key == "mine"


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"max_retries": -1}, {"concurrency": 0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"got .*{next(iter(wrong.values()))}"):
        OpenAIChat(model="m", base_url="http://127.0.0.1:9/v1", **wrong)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "collai\[openai\]"'):
        OpenAIChat(model="m", base_url="http://127.0.0.1:9/v1")


def test_a_chat_that_is_gone_closes_its_connections():
    with ChatServer(llm._Echo()) as server:
        chat = OpenAIChat(model="local", base_url=server.base_url)
        chat.generate([ask("a")])
        client = chat._client
        del chat
        gc.collect()
        deadline = time.monotonic() + 5
        while not client.is_closed() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.is_closed()


def test_the_measurement_compares_equal_work_and_refuses_other_devices():
    row = llm._compare("n", "items/s", lambda: time.sleep(0.12) or 10, lambda: time.sleep(0.06) or 10, rounds=3)
    assert 0.2 < row["measured"] < 0.9 and row["low"] <= row["measured"] <= row["high"] and row["rounds"] == 3
    hit = llm._measure_cache(entries=30, reads=20)
    assert 0 < hit["low"] <= hit["measured"] <= hit["high"] and hit["entries"] == 30
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        llm.measure("tpu")
