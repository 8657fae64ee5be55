"""Properties of `collai.eval.llm` that need neither transformers nor a network: digests, requests, sampling, cache, recordings."""

import asyncio
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

from collai.core.tinylm import CharTokenizer, TinyLM
from collai.eval import llm
from collai.eval.llm import (
    BadReply,
    CachedChat,
    ChatError,
    ChatRefused,
    ChatTimeout,
    ReplayChat,
    ReplayMiss,
    Reply,
    Request,
    TokenUsage,
    TransformersChat,
    fingerprint,
    usd,
)

quickly = settings(deadline=None, derandomize=True, max_examples=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2, allow_nan=False) | st.sampled_from(["", "a", "$a", "$$a", "$array"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "$a", "$$a", "$array", "$bytes"]), inner, max_size=3),
    max_leaves=8,
)
PNG = "PNG"


@dataclasses.dataclass
class Spec:
    name: str
    size: int


@dataclasses.dataclass
class Other:
    name: str
    size: int


class Parrot:
    """Repeats the last message; fails on texts that start with "fail"."""

    def __init__(self, name="parrot"):
        self.name, self.asked = name, []

    def generate(self, requests):
        return asyncio.run(self.agenerate(requests))

    async def agenerate(self, requests):
        self.asked += [r.messages[-1]["content"] for r in requests]
        if wrong := [r for r in requests if r.messages[-1]["content"].startswith("fail")]:
            raise ChatError(500, False, None, wrong[0].messages[-1]["content"])
        return [Reply(r.messages[-1]["content"], "stop", TokenUsage(3, 2)) for r in requests]

    def bound(self, request):
        return TokenUsage(9, request.max_tokens)

    def identity(self):
        return {"model": self.name}


def ask(text, **options):
    return Request([{"role": "user", "content": text}], **options)


def show(*pictures):
    return Request([{"role": "user", "content": [{"type": "image", "image": p} for p in pictures]}])


def png(array, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, PNG)
    return file.getvalue()


def tree(x):
    """Canonical text by another way: every node says its own type."""
    if isinstance(x, dict):
        return "D(" + ",".join(f"{k!r}:{tree(x[k])}" for k in sorted(x)) + ")"
    if isinstance(x, list):
        return "L(" + ",".join(map(tree, x)) + ")"
    return f"{type(x).__name__}({x!r})"


@given(values, values)
@quickly
def test_fingerprints_are_equal_exactly_when_the_objects_are(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (tree(a) == tree(b))
    assert fingerprint({"x": a, "y": b}) == fingerprint({"y": b, "x": a})


def test_tagged_values_cannot_be_imitated_by_plain_ones():
    array = np.arange(3)
    seen = {}
    for x in (array, b"ab", len, Spec, Spec("a", 1), Other("a", 1)):
        seen[fingerprint(x)] = x
        plain = llm._canonical(x, "x")
        for _ in range(3):
            key = fingerprint(plain)
            assert key not in seen
            seen[key] = plain
            plain = llm._canonical(plain, "x")


def test_a_fingerprint_knows_dtype_shape_and_order_of_bytes():
    a = np.arange(6, dtype=np.int32).reshape(2, 3)
    keys = [fingerprint(x) for x in (a, a.T, a.astype(np.int64), a.reshape(3, 2), a[::-1], a + 1)]
    assert len(set(keys)) == 6
    assert fingerprint(np.asfortranarray(a)) == keys[0]
    assert fingerprint(np.float32(0.5)) == fingerprint(0.5) != fingerprint(np.array(0.5))
    assert fingerprint((1, [2])) == fingerprint([1, (2,)])
    assert fingerprint(1) != fingerprint(1.0) and fingerprint(True) != fingerprint(1)


def test_a_fingerprint_is_the_same_in_another_process():
    code = "from collai.eval.llm import fingerprint, Request\nprint(fingerprint({'b': [1.5, None], 'a': len}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "11"})
    assert done.stdout.strip() == fingerprint({"a": len, "b": [1.5, None]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": [0, {1}]}, r"obj\['a'\]\[1\] is a set, which has no canonical form"),
        ([math.nan], r"obj\[0\] is nan"),
        ([np.float32("nan")], r"obj\[0\] is nan"),
        (math.inf, "obj is inf"),
        ({1: 2}, "obj has the key 1: keys must be strings"),
        ({"f": lambda: 0}, r"obj\['f'\] is a lambda, local function or bound method"),
        (Spec({1}, 1), r"obj\.name is a set"),
        (np.array([None]), "obj is a ndarray"),
        (np.zeros(2, [("a", "i4"), ("b", "f4")]), "obj is a ndarray"),
        (np.zeros(2, [("a", "i4"), ("b", "f4")])[0], "obj is a void"),
        (np.ma.array([1, 2], mask=[0, 1]), "obj is a MaskedArray"),
        ([np.longdouble(1)], r"obj\[0\] is a longdouble"),
        (np.ones(2, np.longdouble), "obj is a ndarray"),
        (np.datetime64(1, "ns"), "obj is a datetime64"),
        ({"f": {"a": 1}.get}, r"obj\['f'\] is a lambda, local function or bound method"),
        ("x".upper, "obj is a lambda, local function or bound method"),
        (1j, "obj is a complex"),
    ],
)
def test_what_has_no_canonical_form_is_refused_with_its_place(wrong, message):
    with pytest.raises(TypeError, match=message):
        fingerprint(wrong)


def test_usage_adds_up_and_costs_what_the_prices_say():
    total = TokenUsage(10, 5, 2) + TokenUsage(1, 1)
    assert total == TokenUsage(11, 6, 2)
    assert math.isclose(usd(total, (3, 15.0)), (11 * 3 + 6 * 15) / 1e6)
    with pytest.raises(TypeError):
        total + 1
    with pytest.raises(ValueError, match="tokens must be >= 0, got TokenUsage"):
        TokenUsage(-1, 0)
    with pytest.raises(ValueError, match="reasoning tokens are part of the completion"):
        TokenUsage(1, 1, 2)
    for prices in (None, (1,), (-1.0, 2), (1, math.nan)):
        with pytest.raises(ValueError, match="prices must be .per million in, per million out"):
            usd(total, prices)


def test_errors_survive_pickling_and_keep_their_kind():
    for kind in (ChatError, ChatTimeout, ChatRefused, BadReply):
        error = pickle.loads(pickle.dumps(kind(429, False, 1.5, "slow down")))  # noqa: S301
        assert (type(error), error.status, error.billed, error.retry_after, str(error)) == (kind, 429, False, 1.5, "slow down")
        assert isinstance(error, ChatError)
    assert str(ChatError(503)) == "HTTP status 503"


def test_a_picture_is_its_pixels_in_every_form():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    forms = [array, Image.fromarray(array), png(array), png(array, "RGBA"), bytearray(png(array)), np.asfortranarray(array)]
    requests = [show(f) for f in forms]
    assert len(set(requests)) == 1
    assert all(np.array_equal(r.messages[0]["content"][0]["image"], array) for r in requests)
    assert show(array[::-1]) != requests[0] and show(array, array) != requests[0]
    gray = Image.fromarray(array[:, :, 0])
    assert show(gray) == show(np.repeat(array[:, :, :1], 3, axis=2))


def test_a_request_is_a_copy_that_no_later_change_reaches():
    array = np.zeros((2, 2, 3), np.uint8)
    message = {"role": "user", "content": [{"type": "image", "image": array}, {"type": "text", "text": "a"}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    request = Request([message], tools=tools)
    key = fingerprint(request)
    array[:] = 9
    message["content"][1]["text"] = "b"
    tools[0]["function"]["name"] = "g"
    assert fingerprint(request) == key
    with pytest.raises(ValueError, match="read-only"):
        request.messages[0]["content"][0]["image"][0, 0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1


def test_every_field_of_a_request_is_part_of_its_fingerprint():
    one = ask("a")
    other = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.5, "stop": ("x",), "seed": 1, "logprobs": 2, "sample": 1,
             "tools": ({"type": "function"},), "messages": [{"role": "system", "content": "a"}]}
    assert set(other) == {f.name for f in dataclasses.fields(Request)}
    changed = [dataclasses.replace(one, **{name: value}) for name, value in other.items()]
    assert len({one, *changed}) == len(other) + 1
    assert one == ask("a", temperature=0, stop=[], top_p=1) and hash(one) == hash(ask("a")) and one != "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, r"messages must be a list with at least one message, got \[\]"),
        ({"messages": "hello"}, "messages must be a list with at least one message, got 'hello'"),
        ({"messages": [{"role": "robot", "content": ""}]}, "message 0: role must be one of system, user, assistant, tool, got 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0: content must be a str or a list of parts, got None"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "message 0: content must be a str or parts .* got 'video'"),
        ({"messages": [{"role": "user", "content": "", "mood": 1}]}, "message 0: unknown key 'mood'"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, got 0"),
        ({"max_tokens": 2.5}, r"max_tokens must be an integer >= 1, got 2\.5"),
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"temperature": math.nan}, "temperature must be finite and >= 0, got nan"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5"),
        ({"stop": "END"}, "stop must be a sequence of strings that are not empty, got 'END'"),
        ({"stop": ("",)}, "stop must be a sequence of strings that are not empty"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"logprobs": -1}, "logprobs must be an integer >= 0, got -1"),
        ({"sample": -3}, "sample must be an integer >= 0, got -3"),
    ],
)
def test_a_wrong_request_is_refused_with_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request(**({"messages": [{"role": "user", "content": "a"}]} | arguments))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((2, 2, 3)), r"image must be uint8 \(H, W, 3\), got float64 \(2, 2, 3\)"),
        (np.zeros((2, 2), np.uint8), r"got uint8 \(2, 2\)"),
        (np.zeros((2, 2, 4), np.uint8), r"got uint8 \(2, 2, 4\)"),
        (np.zeros((0, 2, 3), np.uint8), r"got uint8 \(0, 2, 3\)"),
        (b"GIF89a", "image bytes must be a PNG, got b'GIF89a'"),
        (Image.new("F", (2, 2)), "image must have 8 bits a channel.*got 'F'"),
        ("a.png", "image must be a PIL image, a uint8 array .* got str"),
    ],
)
def test_a_wrong_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        show(picture)


def test_tools_that_are_no_json_are_refused():
    with pytest.raises(TypeError, match=r"tools\[0\]\['f'\] is a set"):
        ask("a", tools=[{"f": {1}}])


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(0, 2))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_the_lead_of_the_best_score_has_the_law_of_the_proposition(logits, delta):
    w = np.exp(np.array(logits))
    p = w / w.sum()
    law = p / (p + (1 - p) * math.exp(delta))
    t = np.linspace(0, 60 / w.sum(), 20_001)
    for i in range(len(p)):
        density = w[i] * np.exp(-w[i] * t - (w.sum() - w[i]) * math.exp(delta) * t)
        assert math.isclose(law[i], np.trapezoid(density, t), rel_tol=1e-3)
    assert law.sum() >= math.exp(-delta) - 1e-12


def test_drawn_tokens_have_the_probabilities_of_temperature_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
    for heat, top_p in ((1.0, 1.0), (0.5, 1.0), (1.7, 0.8)):
        rows = [ask("q", temperature=heat, top_p=top_p, seed=i) for i in range(100)]
        draw = llm._Draw(rows, "cpu")
        drawn = torch.cat([draw(None, logits.expand(100, 5)).argmax(1) for _ in range(60)])
        p = torch.softmax(logits[0].double() / heat, 0).numpy()
        order = np.argsort(-p)
        p[order[1 + np.searchsorted(np.cumsum(p[order]), top_p - 1e-9) :]] = 0
        p /= p.sum()
        counts = np.bincount(drawn.numpy(), minlength=5)
        assert (counts[p == 0] == 0).all()
        assert chisquare(counts[p > 0], 6000 * p[p > 0]).pvalue > 1e-4


def test_noise_depends_on_the_request_alone():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    rows = [ask("a", temperature=1.0, seed=1), ask("b"), ask("a", temperature=1.0, seed=1, sample=1), ask("c", temperature=1.0, seed=1)]
    draw = llm._Draw(rows, "cpu")
    together = torch.stack([draw(None, logits).argmax(1) for _ in range(20)])
    for i, row in enumerate(rows):
        alone = llm._Draw([row], "cpu")
        assert [int(alone(None, logits[i : i + 1]).argmax()) for _ in range(20)] == together[:, i].tolist()
    assert (together[:, 1] == logits[1].argmax()).all()
    same = llm._Draw(rows, "cpu")
    equal_logits = logits[:1].expand(4, 50)
    columns = torch.stack([same(None, equal_logits).argmax(1) for _ in range(20)]).T.tolist()
    assert len({tuple(columns[i]) for i in (0, 2, 3)}) == 3


def test_seed_and_sample_make_one_seed_and_the_first_sample_keeps_it():
    assert llm._noise_seed(ask("a", seed=5)) == 5 and llm._noise_seed(ask("a")) is None
    made = {llm._noise_seed(ask("a", seed=s, sample=k)) for s, k in itertools.product((None, 0, 1, 2), (1, 2, 3))}
    assert len(made) == 12 and all(0 <= m < 2**48 for m in made)


ALPHABET = CharTokenizer("abcdefgh .\n")


def tiny(seed=0, **options):
    return TransformersChat(TinyLM(len(ALPHABET), seed=seed), ALPHABET, **options)


@given(st.lists(st.tuples(st.text("abcdefgh .", min_size=1, max_size=9), st.sampled_from([0, 0.7, 2.0]), st.integers(1, 12)),
                min_size=1, max_size=7), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=8)
def test_a_local_text_does_not_depend_on_its_batch(cases, batch_size):
    requests = [ask(t, temperature=heat, max_tokens=n, seed=i, stop=("ab", "c"), logprobs=2) for i, (t, heat, n) in enumerate(cases)]
    together = tiny(batch_size=batch_size).generate(requests)
    chat = tiny()
    for reply, request in zip(together, requests, strict=True):
        alone = chat.generate([request])[0]
        assert (reply.text, reply.finish_reason, reply.usage) == (alone.text, alone.finish_reason, alone.usage)
        assert reply.usage.prompt_tokens == len(request.messages[0]["content"]) == chat.bound(request).prompt_tokens
        assert len(reply.logprobs) == reply.usage.completion_tokens <= request.max_tokens == chat.bound(request).completion_tokens
        assert "ab" not in reply.text and "c" not in reply.text


def test_the_plain_loop_is_greedy_decoding_by_hand():
    chat = tiny(seed=3)
    for prompt in ("abc", "h", "a b."):
        reply = chat.generate([ask(prompt, max_tokens=15, logprobs=3)])[0]
        ids = ALPHABET.encode(prompt)
        with torch.no_grad():
            for spelled, p, top in reply.logprobs:
                logp = torch.log_softmax(chat.model(torch.tensor([ids])).logits[0, -1].double(), 0)
                best = logp.topk(3)
                assert spelled == ALPHABET.decode([int(logp.argmax())], skip_special_tokens=False)
                assert np.allclose([p, *top.values()], [float(best.values[0]), *best.values.flip(0).tolist()], atol=1e-5)
                ids.append(int(logp.argmax()))
        new = ids[len(ALPHABET.encode(prompt)) :]
        assert reply.text == ALPHABET.decode(new)
        assert (new[-1] == 1) == (reply.finish_reason == "stop")


def test_a_score_is_the_sum_of_the_log_probabilities_token_by_token():
    chat = tiny(seed=4)
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "cd"}]
    scores = chat.score(messages, "hag.")
    ids = ALPHABET.encode("ab\ncd")
    with torch.no_grad():
        for token, score in zip(ALPHABET.encode("hag."), scores, strict=True):
            logp = torch.log_softmax(chat.model(torch.tensor([ids])).logits[0, -1].double(), 0)
            assert math.isclose(float(logp[token]), score, abs_tol=1e-6)
            ids.append(token)
    assert scores.dtype == np.float64 and scores.shape == (4,)


def test_the_end_token_and_the_stop_string_end_a_text():
    chat = tiny(seed=1)
    tries = chat.generate([ask("a", max_tokens=60, temperature=3.0, seed=i) for i in range(40)])
    seed = next(i for i, r in enumerate(tries) if 8 < len(r.text) == r.usage.completion_tokens - 1)  # no padding was drawn
    free = tries[seed]
    assert free.finish_reason == "stop"
    part = free.text[2:4]
    short = chat.generate([ask("a", max_tokens=60, temperature=3.0, seed=seed, stop=(part,))])[0]
    at = free.text.find(part)
    assert short.text == free.text[:at] and short.finish_reason == "stop"
    assert short.usage.completion_tokens == at + len(part)
    both = chat.generate([ask("a", max_tokens=60, temperature=3.0, seed=seed, stop=(part[1:], part))])[0]
    assert both.text == free.text[: min(at, free.text.find(part[1:]))]
    long = chat.generate([ask("a", max_tokens=3, temperature=3.0, seed=seed)])[0]
    assert (long.text, long.finish_reason, long.usage.completion_tokens) == (free.text[:3], "length", 3)


def test_no_step_is_computed_beyond_the_last_token():
    chat, calls, ends = tiny(), [], set()
    chat.model.register_forward_hook(lambda *_: calls.append(1))
    for seed in range(12):
        calls.clear()
        reply = chat.generate([ask("ab", max_tokens=7, temperature=2.0, seed=seed)])[0]
        assert len(calls) == reply.usage.completion_tokens <= 7
        ends.add(reply.finish_reason)
    assert ends == {"stop", "length"}


def test_weights_of_equal_bytes_and_other_shape_have_another_digest():
    nets = [torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(4, 2, bias=False)]
    nets += [torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)]
    for net in nets:
        torch.nn.init.zeros_(net.weight)
    assert {w.nbytes for net in nets for w in net.parameters()} == {32}
    assert len({llm._weights_digest(net, ALPHABET) for net in nets}) == 3


def test_a_local_model_is_left_as_it_was():
    model = TinyLM(len(ALPHABET))
    model.model.layers[0].eval()
    chat = TransformersChat(model, ALPHABET)
    chat.generate([ask("a", max_tokens=2)])
    chat.score([{"role": "user", "content": "a"}], "b")
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_local_identity_follows_the_weights_and_not_the_object():
    chat, twin, other = tiny(), tiny(), tiny(seed=1)
    assert chat.identity() == twin.identity() != other.identity()
    assert fingerprint(chat.identity())
    before = chat.identity()
    with torch.no_grad():  # as an optimizer does it
        chat.model.lm_head.weight.add_(0.1)
    assert chat.identity() != before
    chat.model.load_state_dict(twin.model.state_dict())
    assert chat.identity() == before
    chat.model.bfloat16()
    assert chat.identity() != before
    assert TransformersChat(TinyLM(len(ALPHABET)), CharTokenizer("hgfedcba .\n")).identity() != before


def test_writes_past_the_version_counter_change_the_identity():
    chat = tiny()
    before = chat.identity()
    for p in chat.model.parameters():
        p.data.mul_(3.0)
    assert chat.identity() == TransformersChat(chat.model, ALPHABET).identity() != before


def test_weights_at_an_address_of_weights_that_are_gone_are_new_ones():
    chat, seen = tiny(), set()
    memory = np.zeros(chat.model.lm_head.weight.shape, np.float32)
    for k in range(1, 5):
        memory[0, 1] = k  # no part of what is looked at, see `_glance`
        chat.model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(memory))
        seen.add(chat.identity()["digest"])
    assert len(seen) == 4


def test_a_model_made_in_inference_mode_has_an_identity_that_follows_it():
    with torch.inference_mode():
        chat = tiny()
    before = chat.identity()
    assert before == tiny().identity()
    with torch.inference_mode():
        chat.model.lm_head.weight[0, 0] += 1
    assert chat.identity() != before


def test_the_digest_of_a_local_model_is_made_once_while_nothing_changes(monkeypatch):
    made, real = [], llm._weights_digest
    monkeypatch.setattr(llm, "_weights_digest", lambda *a: made.append(1) or real(*a))
    chat = tiny()
    assert chat.identity() == chat.identity() and len(made) == 1


def test_a_local_chat_survives_pickling():
    chat = tiny(seed=2)
    copy = pickle.loads(pickle.dumps(chat))  # noqa: S301
    question = ask("abc", temperature=1.0, max_tokens=9)
    assert copy.generate([question])[0].text == chat.generate([question])[0].text
    assert copy.identity() == chat.identity() and copy.name == "TinyLM"


def test_a_local_chat_works_inside_an_event_loop_and_for_no_request():
    chat = tiny()

    async def both():
        return chat.generate([ask("ab", max_tokens=4)]), await chat.agenerate([ask("ab", max_tokens=4)])

    plain, awaited = asyncio.run(both())
    assert plain[0].text == awaited[0].text
    assert chat.generate([]) == []


def test_a_local_chat_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model in .*: it has no config.json"):
        TransformersChat(tmp_path)
    with pytest.raises(ValueError, match="a model needs its tokenizer and stays where it is, got tokenizer=None"):
        TransformersChat(TinyLM(5))
    with pytest.raises(ValueError, match="device='cpu'"):
        tiny(device="cpu")
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        tiny(batch_size=0)
    with pytest.raises(TypeError, match=r"TinyLM reads text only, the request has 1 image\(s\)"):
        tiny().generate([show(np.zeros((2, 2, 3), np.uint8))])
    with pytest.raises(ValueError, match="continuation must have at least one token, got ''"):
        tiny().score([{"role": "user", "content": "a"}], "")
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        tiny().generate([ask("")])


def test_the_cache_asks_once_and_remembers_in_another_chat(tmp_path):
    parrot = Parrot()
    chat = CachedChat(parrot, tmp_path / "deep" / "cache.sqlite")
    first = chat.generate([ask("a"), ask("b"), ask("a")])
    assert [r.text for r in first] == ["a", "b", "a"] and sorted(parrot.asked) == ["a", "b"]
    assert (chat.hits, chat.misses) == (1, 2)
    again = CachedChat(Parrot(), tmp_path / "deep" / "cache.sqlite")
    second = asyncio.run(again.agenerate([ask("b"), ask("a")]))
    assert [r.text for r in second] == ["b", "a"] and not again.chat.asked and (again.hits, again.misses) == (2, 0)
    assert all(r.cached for r in second) and second[0] == dataclasses.replace(first[1], cached=True)
    assert chat.bound(ask("a", max_tokens=4)) == TokenUsage(9, 4) and chat.identity() == {"model": "parrot"} and chat.name == "parrot"


def test_the_cache_keeps_models_and_tags_apart(tmp_path):
    for chat in (Parrot(), Parrot("macaw")):
        for tag in ("", "b"):
            cached = CachedChat(chat, tmp_path / "c", tag)
            cached.generate([ask("a")])
            assert (cached.hits, cached.misses) == (0, 1)


def test_errors_are_never_kept_and_the_other_replies_are(tmp_path):
    chat = CachedChat(Parrot(), tmp_path / "c")
    questions = [ask("fail 1"), *(ask(str(i)) for i in range(5)), ask("fail 2")]
    for _ in range(2):
        with pytest.raises(ChatError, match="fail 1"):
            chat.generate(questions)
    assert sorted(chat.chat.asked) == sorted(["fail 1", "fail 2"] * 2 + list("01234"))


def test_a_cached_reply_keeps_every_field(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    full = Reply("tëxt", "tool_calls", TokenUsage(5, 4, 3), (call,), [("t", -0.5, {"t": -0.5, "u": -1.25})], "m", 1.5)

    class Full(Parrot):
        async def agenerate(self, requests):
            return [full for _ in requests]

    chat = CachedChat(Full(), tmp_path / "c")
    assert chat.generate([ask("a")]) == [full]
    chat.export(tmp_path / "r.jsonl")
    for back in (chat, ReplayChat(tmp_path / "r.jsonl")):
        assert back.generate([ask("a")]) == [dataclasses.replace(full, cached=True)]


def test_the_first_write_wins_among_threads(tmp_path):
    start, said = threading.Barrier(4), {}

    class Slow(Parrot):
        async def agenerate(self, requests):
            await asyncio.to_thread(start.wait)
            return [Reply(self.word, "stop", TokenUsage(1, 1)) for _ in requests]

    def run(i):
        chat = Slow()
        chat.word = str(i)
        said[i] = asyncio.run(CachedChat(chat, tmp_path / "c").agenerate([ask("a")]))[0].text

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(said.values())) == 1


def fill(path, name, out):
    chat = CachedChat(Parrot(), path)
    out.put([r.text for r in chat.generate([ask(f"{i}") for i in range(20)])])


def test_many_processes_open_and_fill_one_new_file(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=fill, args=(tmp_path / "c", i, results)) for i in range(6)]
    for w in workers:
        w.start()
    assert all(results.get(timeout=60) == [str(i) for i in range(20)] for _ in workers)
    for w in workers:
        w.join()
    with sqlite3.connect(tmp_path / "c") as db:
        assert db.execute("SELECT count(*) FROM replies").fetchone() == (20,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_cache_survives_fork_and_pickling(tmp_path):
    chat = CachedChat(Parrot(), tmp_path / "c")
    chat.generate([ask("a")])
    copy = pickle.loads(pickle.dumps(chat))  # noqa: S301
    assert copy.generate([ask("a")])[0].cached
    context = multiprocessing.get_context("fork")
    pipe, far = context.Pipe()

    def work():
        far.send([r.cached for r in chat.generate([ask("a"), ask("b")])])

    child = context.Process(target=work)
    child.start()
    assert pipe.recv() == [True, False]
    child.join()
    assert chat.generate([ask("b")])[0].cached


def test_a_child_that_is_forked_while_threads_use_the_cache_can_use_it(tmp_path):
    chat, questions, stop = CachedChat(Parrot(), tmp_path / "c"), [ask(str(i)) for i in range(20)], threading.Event()
    chat.generate(questions)

    def hammer():
        while not stop.is_set():
            chat.generate(questions)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for t in threads:
        t.start()
    ends = []
    for _ in range(5):
        if not (pid := os.fork()):
            signal.alarm(10)  # ends a child that hangs
            os._exit(0 if chat.generate(questions[:2])[0].cached else 1)
        ends.append(os.waitpid(pid, 0)[1])
    stop.set()
    for t in threads:
        t.join()
    assert ends == [0] * 5


def test_a_request_is_looked_up_once(tmp_path, monkeypatch):
    chat, looked = CachedChat(Parrot(), tmp_path / "c"), []
    get = type(chat)._get
    monkeypatch.setattr(type(chat), "_get", lambda self, source, key: looked.append(key) or get(self, source, key))
    for _ in range(2):
        chat.generate([ask("a"), ask("b")])
    assert len(looked) == 4 and (chat.hits, chat.misses) == (2, 2)


def test_a_cache_made_by_an_earlier_version_opens_and_other_files_are_refused(tmp_path):
    with sqlite3.connect(tmp_path / "old") as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE IF NOT EXISTS replies (source TEXT, request TEXT, reply TEXT, PRIMARY KEY (source, request))\n"
                   "             WITHOUT ROWID")
    chat = CachedChat(Parrot(), tmp_path / "old")
    assert [chat.generate([ask("a")])[0].cached for _ in range(2)] == [False, True]
    with sqlite3.connect(tmp_path / "theirs") as db:
        db.execute("CREATE TABLE t (x)")
    (tmp_path / "text").write_text("some words " * 400)
    for name, reason in (("theirs", "it is another program's database"), ("text", "file is not a database")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match=f"{name} is no cache: {reason}"):
            CachedChat(Parrot(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_processes_that_make_one_file_together_all_succeed(tmp_path):
    for trial in range(10):
        start, pids = time.time() + 0.02, []
        for i in range(4):
            if not (pid := os.fork()):
                while time.time() < start + i * 0.0004:
                    pass
                os._exit(0 if CachedChat(Parrot(), tmp_path / str(trial)) else 1)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4


def test_a_recording_answers_without_the_model(tmp_path):
    chat = CachedChat(Parrot(), tmp_path / "c")
    chat.generate([ask("b"), ask("a")])
    CachedChat(Parrot(), tmp_path / "c", "other").generate([ask("elsewhere")])
    chat.export(tmp_path / "r.jsonl")
    replay = ReplayChat(tmp_path / "r.jsonl")
    assert [r.text for r in replay.generate([ask("a"), ask("b")])] == ["a", "b"]
    assert asyncio.run(replay.agenerate([ask("a")])) == replay.generate([ask("a")])
    assert replay.identity() == {"model": "parrot"} and replay.name == "parrot" and replay.bound(ask("a")) == TokenUsage(3, 2)
    for missing in (ask("elsewhere"), ask("a", seed=1)):
        with pytest.raises(ReplayMiss, match=f"no recorded reply to {missing.messages[0]['content']!r}"):
            replay.generate([missing])
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3


def test_equal_replies_make_equal_recordings(tmp_path):
    for name, order in (("x", "abc"), ("y", "cab")):
        chat = CachedChat(Parrot(), tmp_path / name)
        chat.generate([ask(c) for c in order])
        chat.export(tmp_path / f"{name}.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "y.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_file_that_is_no_recording_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        ReplayChat(tmp_path / "none")
    for text in ("", "no json\n", json.dumps([1]), '{"name": "a"}\n', '{"name": "a", "identity": {}}\n{"request": "x"}\n'):
        (tmp_path / "r").write_text(text)
        with pytest.raises(ValueError, match="was not written by CachedChat.export"):
            ReplayChat(tmp_path / "r")


def test_the_module_loads_no_heavy_package():
    code = ("import sys, collai.eval.llm\n"
            "sys.exit(', '.join({'torch', 'transformers', 'openai', 'PIL', 'inspect_ai', 'pandas'} & sys.modules.keys()) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
