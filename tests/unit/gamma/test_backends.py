"""Properties of `collai.gamma.backends`: replies belong to the call, worlds meet their closed forms, bounds hold."""
import asyncio
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.tinylm import CharTokenizer, TinyLM
from collai.eval import llm
from collai.eval.llm import BadReply, ChatError, ChatRefused, ChatServer, ChatTimeout, TransformersChat
from collai.gamma.backends import (
    CachedBackend,
    HFBackend,
    OpenAIBackend,
    Request,
    Response,
    Task,
    TransformerBackend,
    WorldBackend,
    parse_answer,
)
from collai.gamma.ledger import Usage
from collai.gamma.worlds import CondorcetWorld, DebateWorld, HiddenProfileWorld, RelayWorld, SearchWorld, TreeWorld

quickly = settings(deadline=None, derandomize=True, max_examples=60)
WORLDS = {"condorcet": CondorcetWorld(0.6, 0.1, 0.5, call_tokens=90), "counts": HiddenProfileWorld(16, 0.7, 4),
          "votes": HiddenProfileWorld(16, 0.7, 4, "votes", 0.1), "relay": RelayWorld(4, 0.5, 50, 8, 0.1),
          "search": SearchWorld(5), "debate": DebateWorld(0.6, 4.0, 3, nx.complete_graph(3), 0.5)}
LETTERS = CharTokenizer("+-abcdefghijklmnopqrstuvwxyz ?,.:AB0123456789W\n")
each_world = pytest.mark.parametrize("name", WORLDS)


def ask(backend, *requests):
    return asyncio.run(backend.generate(list(requests)))


def call(task, agent="a", said="", **more):
    talk = [{"role": "user", "content": "\n".join([task.prompt, *task.context, *([said] if said else [])])}]
    return Request(task, agent, "solver", more.pop("messages", talk), **{"max_tokens": 64, "temperature": 1.0, "seed": 0} | more)


def below(usage, bound):
    return all(getattr(usage, f.name) <= getattr(bound, f.name) for f in fields(Usage))


def near(scores, truth, sigmas=4):
    assert abs(np.mean(scores) - truth) <= sigmas * math.sqrt(max(truth * (1 - truth), 1e-9) / len(scores)) + 1e-12


@pytest.mark.parametrize(("text", "answer"), [
    ("answer: 4", "4"), ("I think.\nANSWER:  Paris \n", "Paris"), ("answer: 1\nno, Answer: 2", "2"), ("first\n last \n\n", "last"),
    ("", ""), ("  \n", ""), ("answer:", ""), ("answer: a\nb", "a\nb"), ("the answers: none", "the answers: none")])
def test_the_answer_follows_the_last_mark_or_is_the_last_line(text, answer):
    assert parse_answer(text) == answer


def test_the_usual_scorer_compares_after_case_folding_and_others_are_checked():
    task = Task("t", "?", "Straße")
    assert [task.score(x) for x in ("STRASSE", "straße", "strasse.", "")] == [1.0, 1.0, 0.0, 0.0]
    partial = Task("t", "?", "abc", ["x"], lambda answer, t: len(set(answer) & set(t.target)) / 3)
    assert partial.score("ab") == 2 / 3 and partial.context == ("x",)
    with pytest.raises(ValueError, match=r"scores must lie in \[0, 1\], the scorer gave 1.5 for 'z'"):
        Task("t", "?", "a", scorer=lambda answer, t: 1.5).score("z")


def test_requests_that_cannot_be_made_are_refused_and_lists_are_copied():
    task, talk = Task("t", "?", "a"), [{"role": "user", "content": "?"}]
    good = {"messages": talk, "max_tokens": 1, "temperature": 0.0, "seed": 3}
    made = Request(task, "a", "solver", **good)
    talk.append("more")
    assert len(made.messages) == 1 and made.messages[0] == talk[0]
    for change, message in [({"max_tokens": 0}, "max_tokens must be >= 1, got 0"), ({"seed": -1}, "seed must be >= 0, got -1"),
                            ({"round": -1}, "round must be >= 0, got -1"), ({"temperature": math.nan}, "temperature must be finite"),
                            ({"messages": []}, "at least one message, got"), ({"messages": "hi"}, "messages must be a list .* got 'hi'")]:
        with pytest.raises(ValueError, match=message):
            Request(task, "a", "solver", **good | change)


@pytest.mark.parametrize(("fields", "message"), [
    (("A", None, Usage()), "answer must be a str, empty when there is none, got None"),
    ((None, "A", Usage()), "text must be a str, empty when there is none, got None"),
    (("A", "A", None), "usage must be a Usage, got None")])
def test_a_reply_holds_texts_and_its_usage(fields, message):
    with pytest.raises(TypeError, match=message):
        Response(*fields)


@each_world
def test_tasks_are_numbered_and_a_shorter_list_is_the_start_of_a_longer_one(name):
    backend = WorldBackend(WORLDS[name], 7)
    tasks = backend.tasks(6)
    assert [t.id for t in tasks] == list("012345") and backend.tasks(3) == tasks[:3] and len({t.prompt for t in tasks}) == 1
    assert WorldBackend(WORLDS[name], 7).tasks(6) == tasks and WorldBackend(WORLDS[name], 7).name == backend.name
    assert WorldBackend(WORLDS[name], 8).name != backend.name
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        backend.tasks(0)


@each_world
def test_a_reply_depends_on_its_call_alone(name):
    backend = WorldBackend(WORLDS[name], 3)
    requests = [call(t, agent, "answer: A\nanswer: B", sample=k, seed=s, round=r) for t in backend.tasks(3)
                for agent in ("a", "b") for k in (0, 1) for s in (0, 1) for r in (0, 1)]
    together = ask(backend, *requests)
    assert together == [ask(WorldBackend(WORLDS[name], 3), r)[0] for r in requests] == ask(backend, *requests[::-1])[::-1]
    if name != "votes":
        assert len({r.text for r in together}) > 1
    assert all(r.usage.calls == 1 for r in together)


def test_replies_and_names_are_the_same_in_every_process():
    code = ("import asyncio, json\nfrom collai.gamma.backends import *\nfrom collai.gamma.worlds import *\n"
            "b = WorldBackend(HiddenProfileWorld(16, 0.7, 4), 5)\nt = b.tasks(4)\n"
            "rs = [Request(x, 'a', 's', [{'role': 'user', 'content': '\\n'.join(x.context)}], 9, 1.0, 2) for x in t]\n"
            "print(json.dumps([b.name, [r.text for r in asyncio.run(b.generate(rs))]]))")
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout}
    backend = WorldBackend(HiddenProfileWorld(16, 0.7, 4), 5)
    requests = [Request(t, "a", "s", [{"role": "user", "content": "\n".join(t.context)}], 9, 1.0, 2) for t in backend.tasks(4)]
    assert seen == {json.dumps([backend.name, [r.text for r in ask(backend, *requests)]]) + "\n"}


@given(st.sampled_from(sorted(WORLDS)), st.integers(1, 40), st.integers(0, 3), st.lists(st.sampled_from(
    ["answer: A", "answer: plus", "tally 3: +4 -1", "state: done", "state: lost", "tried: 1", "counts: 3.0 1.0", "wörter und mehr"]),
    max_size=6), st.booleans(), st.integers(0, 30))
@quickly
def test_no_call_to_a_world_costs_more_than_its_bound(name, max_tokens, number, said, own, seed):
    backend = WorldBackend(WORLDS[name], 1)
    talk = [{"role": "user", "content": "\n".join(backend.tasks(4)[number].context) or "?"},
            {"role": "assistant" if own else "user", "content": "\n".join(said)}]
    request = call(backend.tasks(4)[number], messages=talk, max_tokens=max_tokens, seed=seed)
    response, bound = ask(backend, request)[0], backend.bound(request)
    assert below(response.usage, bound) and bound.calls == 1
    if name not in ("condorcet", "relay"):
        assert len(response.text.split()) == response.usage.completion_tokens <= max_tokens
    assert response.finish_reason == "stop" or response.answer == ""


def test_a_condorcet_call_is_made_whole_whatever_it_may_write():
    backend = WorldBackend(CondorcetWorld(0.6, call_tokens=90, overhead_tokens=50))
    for limit in (1, 16, 500):
        request = call(backend.tasks(1)[0], max_tokens=limit)
        assert ask(backend, request)[0].usage == backend.bound(request) == Usage(0, 90, 1)
    assert backend.overhead == Usage(0, 50)


def test_votes_have_the_correlations_of_the_world():
    world = CondorcetWorld(0.6, 0.2, 0.5)
    backend = WorldBackend(world)
    tasks = backend.tasks(400)
    votes = np.array([r.answer == t.target for t in tasks for r in ask(backend, *(
        call(t, agent, sample=k, round=q) for agent, k, q in (("a", 0, 0), ("a", 1, 0), ("a", 0, 1), (7, 0, 0))))]).reshape(-1, 4)
    near(votes.ravel()[::4], 0.6)
    seen = np.corrcoef(votes.T)
    inside, between = 0.2 + 0.8 * 0.5, 0.2
    assert np.allclose(seen[0, 1:3], inside, atol=0.2) and np.allclose(seen[:3, 3], between, atol=0.2)


def test_teams_in_closed_form_worlds_score_what_the_world_says():
    world = HiddenProfileWorld(16, 0.7, 4)
    backend, scores, alone = WorldBackend(world, 2), [], []
    for t in backend.tasks(120):
        parts = [replace(t, context=t.context[4 * i : 4 * i + 4]) for i in range(4)]
        said = "\n".join(r.text for r in ask(backend, *(call(part, f"r{i}") for i, part in enumerate(parts))))
        scores.append(ask(backend, call(replace(t, context=()), "judge", said))[0].answer == t.target)
        alone.append(ask(backend, call(t))[0].answer == t.target)
    near(scores, world.phi_mas(4))
    near(alone, world.phi_sas())


def test_votes_over_a_noisy_channel_score_what_the_world_says():
    world = HiddenProfileWorld(15, 0.7, 4, "votes", 0.15)
    backend, scores = WorldBackend(world, 2), []
    for t in backend.tasks(120):
        parts = [replace(t, context=t.context[5 * i : 5 * i + 5]) for i in range(3)]
        replies = ask(backend, *(call(part, f"r{i}") for i, part in enumerate(parts)))
        assert all(r.text == f"answer: {r.answer}" for r in replies)
        said = "\n".join(r.text for r in replies)
        scores.append(ask(backend, call(replace(t, context=()), "judge", said))[0].answer == t.target)
    near(scores, world.phi_mas(3))


def test_a_channel_that_always_flips_turns_every_vote_and_a_hand_over_that_always_fails_loses_the_state():
    flipped, lossy = WorldBackend(HiddenProfileWorld(15, 0.7, 4, "votes", 1.0)), WorldBackend(RelayWorld(2, 1.0, 40, 10, 1.0))
    judged = ask(flipped, *(call(replace(t, context=()), "judge", "answer: plus\nanswer: plus\nanswer: minus") for t in flipped.tasks(5)))
    assert {r.answer for r in judged} == {"minus"}
    task = lossy.tasks(1)[0]
    assert [r.answer for r in ask(lossy, call(task), call(task, said="state: done"))] == ["done", "lost"]


def test_tallies_are_passed_on_and_never_counted_twice():
    backend = WorldBackend(HiddenProfileWorld(4, 1.0, 4))
    task = next(t for t in backend.tasks(20) if t.target == "plus")
    part = replace(task, context=task.context[:2])
    said = ask(backend, call(part, "a", "tally 2: +0 -9"))[0].text
    assert said == "tally 0: +2 -0\ntally 2: +0 -9\nanswer: minus"
    talk = [{"role": "user", "content": "\n".join(part.context)}, {"role": "assistant", "content": said},
            {"role": "user", "content": "tally 0: +2 -0\ntally 2: +0 -1"}]
    assert ask(backend, call(part, "a", messages=talk))[0].text == "tally 0: +2 -0\ntally 2: +0 -1\nanswer: plus"


def test_a_relay_scores_what_the_world_says_and_pays_for_hand_overs():
    world = RelayWorld(4, 0.5, 40, 10, 0.1)
    backend, scores, alone, spent = WorldBackend(world, 4), [], [], []
    for t in backend.tasks(120):
        first, second = (replace(t, context=t.context[2 * i : 2 * i + 2]) for i in range(2))
        one = ask(backend, call(first, "a", max_tokens=100))[0]
        two = ask(backend, call(second, "b", one.text, max_tokens=100))[0]
        scores.append(two.answer == "done")
        spent.append((one.usage + two.usage).tokens)
        alone.append(ask(backend, call(t, max_tokens=220))[0].answer == "done")
    assert set(spent) == {220}
    near(scores, world.phi_mas(220, 2))
    near(alone, world.phi_sas(220))


def test_probes_are_independent_without_messages_and_never_repeated_with_them():
    world = SearchWorld(5)
    backend, alone, board = WorldBackend(world, 1), [], []
    for t in backend.tasks(80):
        alone.append(any(r.answer == t.target for r in ask(backend, *(call(t, sample=k) for k in range(3)))))
        texts = []
        for i in range(5):
            texts.append(ask(backend, call(t, f"a{i}", "\n".join(texts)))[0].text)
        found = [parse_answer(text) == t.target for text in texts]
        assert sum(found) == 1 and ask(backend, call(t, "z", "\n".join(texts)))[0] == Response("all tried", "", Usage(
            len(f"{t.prompt} ".split()) + len("\n".join(texts).split()), 2, 1))
        board.append(any(found[:3]))
    near(alone, world.phi_sas(3))
    near(board, world.phi_mas(3))


def test_debaters_speak_from_their_counts_and_add_only_what_is_new():
    backend = WorldBackend(WORLDS["debate"])
    task = next(t for t in backend.tasks(20) if t.target == "A")
    first = ask(backend, call(task))[0].text
    assert first.startswith("counts: 2.4 1.6\nanswer: ")
    talk = [{"role": "user", "content": "answer: B"}, {"role": "assistant", "content": first}, {"role": "user", "content": "answer: A\nanswer: B"}]
    assert ask(backend, call(task, messages=talk))[0].text.startswith("counts: 3.9 2.6\n")
    near([ask(backend, call(t))[0].answer == t.target for t in backend.tasks(120)], 0.6)


def test_a_cut_reply_has_no_answer():
    backend = WorldBackend(WORLDS["counts"])
    response = ask(backend, call(backend.tasks(1)[0], max_tokens=3))[0]
    assert response.finish_reason == "length" and response.answer == "" and len(response.text.split()) == 3


def test_what_no_world_backend_can_play_is_refused():
    with pytest.raises(TypeError, match="world must be one of CondorcetWorld, .*, got TreeWorld"):
        WorldBackend(TreeWorld(3))
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        WorldBackend(WORLDS["search"], -1)
    backend = WorldBackend(WORLDS["condorcet"])
    with pytest.raises(ValueError, match="target must be one of A, B, got 'Paris'"):
        ask(backend, call(Task("0", "?", "Paris")))


def policy(seed):
    return TinyLM(len(LETTERS), hidden=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32, seed=seed)


TASK = Task("0", "+-+--+++", "A")


def test_a_policy_is_asked_in_batches_and_alone_with_the_same_replies_and_bounds_that_hold():
    backend = TransformerBackend(policy(0), LETTERS)
    requests = [call(TASK, f"a{i % 3}", sample=i, max_tokens=1 + i % 4, temperature=float(i % 2), said="+" * (i % 5)) for i in range(24)]
    together = ask(backend, *requests)
    assert together == [r for one in requests for r in ask(TransformerBackend(policy(0), LETTERS, batch_size=1), one)]
    for request, response in zip(requests, together, strict=True):
        assert below(response.usage, backend.bound(request)) and response.answer == parse_answer(response.text)
        assert response.usage.prompt_tokens == len(request.messages[0]["content"])
    weights = sum(p.numel() for p in policy(0).parameters())
    assert together[0].usage.flops == 2 * weights * together[0].usage.tokens and together[0].usage.calls == 1
    assert len({r.text for r in ask(backend, *(call(TASK, sample=k, max_tokens=4) for k in range(8)))}) == 8
    assert len({r.text for r in ask(backend, *(call(TASK, sample=k, max_tokens=4, temperature=0.0) for k in range(4)))}) == 1


def test_each_agent_or_role_has_its_policy_and_reads_what_it_is_given():
    backend = TransformerBackend({"a": policy(0), "solver": policy(1)}, LETTERS, read=lambda r: r.task.prompt[:4])
    a, b = (call(TASK, agent, said="ignored", temperature=0.0, max_tokens=3) for agent in "ab")
    for request, seed in ((a, 0), (b, 1)):
        alone = TransformerBackend(policy(seed), LETTERS)
        plain = replace(request, messages=[{"role": "user", "content": "+-+-"}])
        assert ask(backend, request) == ask(alone, plain) and backend.bound(request) == alone.bound(plain)
    assert ask(backend, a, b, a) == [*ask(backend, a), *ask(backend, b), *ask(backend, a)]
    with pytest.raises(KeyError, match="no policy for agent 'c' in role 'critic': 'a', 'solver'"):
        backend.bound(replace(a, agent="c", role="critic"))
    names = {TransformerBackend(policy(s), LETTERS, seed=t).name for s, t in ((0, 0), (0, 0), (1, 0), (0, 1))}
    assert len(names) == 3


def test_names_and_cached_replies_follow_weights_that_are_trained(tmp_path):
    import torch

    model = policy(0)
    backend, before = TransformerBackend(model, LETTERS), TransformerBackend(policy(0), LETTERS)
    cached, alone, request = CachedBackend(backend, tmp_path / "c.db"), HFBackend(model, LETTERS), call(TASK, temperature=0.0)
    names = [one.name for one in (backend, cached, alone)]
    assert names[:2] == [before.name] * 2 and ask(cached, request) == ask(before, request)
    with torch.no_grad():
        model.lm_head.weight[LETTERS.encode("+")[0]] += 100.0
    assert ask(cached, request) == ask(backend, request) != ask(before, request) and cached.chat.misses == 2
    assert cached.name == backend.name and not {one.name for one in (backend, cached, alone)} & set(names)


def first_signs(request, n=4):
    """A reader of the first characters of a prompt."""
    return request.task.prompt[:n]


def test_the_name_of_policies_holds_what_they_read():
    def name(read):
        return TransformerBackend(policy(0), LETTERS, read=read).name

    readers = [None, first_signs, partial(first_signs, n=3), partial(first_signs, n=7), partial(partial(first_signs), n=3)]
    names = [name(read) for read in readers]
    assert len(set(names)) == 4 and names[2] == names[4] and name(partial(first_signs, n=7)) == names[3]
    for read in (lambda r: r.task.prompt, partial(lambda r: r.task.prompt), partial(first_signs, n={7})):
        with pytest.raises(TypeError, match=r"read must be a named function, or functools.partial of one with plain .* got .*function"):
            name(read)


@pytest.fixture
def server():
    with ChatServer(TransformersChat(policy(0), LETTERS)) as running:
        yield running


def served(server, **more):
    return OpenAIBackend(base_url=server.base_url, api_key=None, model=server.model, **{"timeout": 20.0, "prices": (3, 5)} | more)


def test_a_served_model_is_billed_what_the_server_counts_and_less_than_the_bound(server):
    backend = served(server)
    requests = [call(TASK, f"a{i}", max_tokens=1 + i % 4) for i in range(4)]
    together = ask(backend, *requests)
    assert [r.text for r in together] == [r.text for one in requests for r in ask(backend, one)]
    for request, response in zip(requests, together, strict=True):
        bound = backend.bound(request)
        assert below(response.usage, bound) and bound.seconds == 20 and bound.completion_tokens == request.max_tokens
        assert 0 < response.usage.seconds <= 20 and response.usage.prompt_tokens == len(TASK.prompt)
        assert response.usage.usd == (3 * response.usage.prompt_tokens + 5 * response.usage.completion_tokens) / 1e6
    assert sum(r.usage.tokens for r in together) * 2 == server.billed.prompt_tokens + server.billed.completion_tokens
    assert backend.batch_size == 1 and backend.retries == 8 and server.model in backend.name


@pytest.mark.parametrize(("fault", "kind", "billed"), [(429, ChatError, False), (500, ChatError, False), (400, ChatRefused, False),
                                                       ("cut", ChatError, None), ("garbage", BadReply, None), ("hang", ChatTimeout, None)])
def test_one_attempt_is_made_and_its_error_says_whether_it_was_billed(fault, kind, billed):
    with ChatServer(TransformersChat(policy(0), LETTERS), faults=(fault,), hang_s=2.0) as running:
        with pytest.raises(kind) as caught:
            ask(served(running, timeout=1.0 if fault == "hang" else 60.0), call(TASK))
        assert caught.value.billed is billed and len(running.requests) == 1


def test_an_attempt_ends_with_the_time_out_even_if_the_server_keeps_talking(server):
    backend = served(server, timeout=0.05)

    async def dripping(questions):
        await asyncio.sleep(5)

    backend.chat.agenerate = dripping
    with pytest.raises(ChatTimeout, match=r"no reply within 0\.05 s") as caught:
        ask(backend, call(TASK))
    assert caught.value.billed is None


class Templated(CharTokenizer):
    """A tokenizer with a chat template of one line a message."""

    chat_template = "yes"

    def apply_chat_template(self, messages, **_):
        return "".join(m["content"] + "\n" for m in messages)


@pytest.mark.parametrize("tokenizer", [None, Templated(LETTERS.alphabet)])
def test_a_reply_without_usage_is_charged_at_the_worst_case(server, monkeypatch, tokenizer):
    whole = llm._write_reply
    monkeypatch.setattr(llm, "_write_reply", lambda reply, model: json.dumps(
        {k: v for k, v in json.loads(whole(reply, model)).items() if k != "usage"}).encode())
    backend, request = served(server, tokenizer=tokenizer), call(TASK, max_tokens=7, said="++")
    usage, bound = ask(backend, request)[0].usage, backend.bound(request)
    assert replace(usage, seconds=0) == replace(bound, seconds=0) and usage.completion_tokens == 7
    said = len(request.messages[0]["content"])
    assert usage.prompt_tokens == said + 1 if tokenizer else usage.prompt_tokens >= said + 16


def test_no_more_attempts_are_under_way_than_allowed(server):
    backend, now, most = served(server, concurrency=3), [0], [0]
    inner = backend.chat.agenerate

    async def counted(questions):
        now[0] += 1
        most[0] = max(most[0], now[0])
        try:
            return await inner(questions)
        finally:
            now[0] -= 1

    backend.chat.agenerate = counted
    ask(backend, *(call(TASK, sample=k, max_tokens=1) for k in range(9)))
    assert most[0] == 3
    with pytest.raises(ValueError, match="retries must be >= 0, got -1"):
        served(server, retries=-1)


class Counting:
    """A backend that counts its calls and can fail."""

    name = "counting"

    def __init__(self):
        self.seen, self.broken = [], False

    def bound(self, request):
        return Usage(9, 9, 1, 1.0, 2.0, 3e15)

    async def generate(self, requests):
        self.seen += requests
        if self.broken:
            raise ChatTimeout(message="gone")
        return [Response(f"text {len(self.seen)}", "", Usage(1, len(self.seen), 1, 0.1, 0.2, 1e15), "length") for _ in requests]


def test_a_reply_is_paid_once_and_comes_back_with_its_recorded_usage(tmp_path):
    inner = Counting()
    backend, again = (CachedBackend(inner, tmp_path / "c.db") for _ in range(2))
    requests = [call(TASK, agent, sample=k) for agent in "ab" for k in (0, 1)]
    first = ask(backend, *requests, requests[0])
    assert len(inner.seen) == 4 and first[0] == first[4] and len({r.text for r in first}) == 4
    assert ask(again, *requests) == first[:4] and len(inner.seen) == 4 and (again.chat.hits, again.chat.misses) == (4, 0)
    other_task = Task("0", TASK.prompt, "B", scorer=lambda answer, task: 0.5)
    assert ask(backend, replace(requests[0], task=other_task)) == first[:1]
    for change in ({"seed": 1}, {"round": 1}, {"max_tokens": 63}, {"temperature": 0.5}, {"role": "critic"}, {"agent": "c"},
                   {"task": replace(TASK, id="1")}, {"messages": [{"role": "user", "content": "other"}]}):
        before = len(inner.seen)
        ask(backend, replace(requests[0], **change))
        assert len(inner.seen) == before + 1, change
    assert backend.name == "counting" and backend.bound(requests[0]) == inner.bound(requests[0])
    assert (backend.batch_size, backend.retries, backend.overhead) == (1, 0, Usage())


def test_errors_are_not_kept_and_the_cache_goes_before_any_backend(tmp_path, server):
    inner = Counting()
    backend, request = CachedBackend(inner, tmp_path / "c.db"), call(TASK)
    inner.broken = True
    with pytest.raises(ChatTimeout):
        ask(backend, request)
    inner.broken = False
    assert ask(backend, request)[0].text == "text 2"
    world = WorldBackend(CondorcetWorld(0.6, overhead_tokens=5))
    for one in (world, TransformerBackend(policy(0), LETTERS), served(server)):
        cached, asked = CachedBackend(one, tmp_path / "c.db"), call(replace(world.tasks(1)[0], prompt="why"))
        first = ask(cached, asked)
        assert ask(CachedBackend(one, tmp_path / "c.db"), asked) == first and cached.name == one.name
        assert below(first[0].usage, cached.bound(asked)) and first[0].usage.calls == 1
    assert CachedBackend(world, tmp_path / "c.db").overhead == Usage(0, 5)
    assert len(server.requests) == 1


def test_a_checkpoint_of_transformers_is_an_agent(tmp_path):
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<|pad|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    table = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=table, chat_template=template, pad_token="<|pad|>", eos_token="<|end|>")  # noqa: S106
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": len(letters)}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "tiny")
    words.save_pretrained(tmp_path / "tiny")
    backend = HFBackend(tmp_path / "tiny", batch_size=3, device="cpu", seed=1)
    requests = [call(TASK, f"a{i}", said="ü" * i, max_tokens=3 + i, temperature=float(i % 3)) for i in range(7)]
    for request, response in zip(requests, ask(backend, *requests), strict=True):
        assert response.usage.prompt_tokens == backend.bound(request).prompt_tokens == len(f"user: {request.messages[0]['content']}".encode()) + 1
        assert below(response.usage, backend.bound(request)) and response.usage.completion_tokens <= request.max_tokens
    assert ask(backend, requests[4]) == ask(backend, *requests)[4:5] and backend.batch_size == 3
    assert backend.name == HFBackend(tmp_path / "tiny", device="cpu", seed=1).name and backend.name.startswith("tiny ")
