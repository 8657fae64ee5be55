"""Agents: what they read, what they write, and the loops with a server, a person and a browser."""
import json
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collai.eval.llm import ChatError, ChatServer, OpenAIChat, Reply, TokenUsage
from collai.mobilebench.agents import (
    PROMPTS,
    HeuristicAgent,
    HumanAgent,
    OracleAgent,
    RandomAgent,
    ScriptAgent,
    VLMAgent,
    elements,
    list_elements,
    read_reply,
)
from collai.mobilebench.devices import LiteDevice, Observation, find_browser
from collai.mobilebench.kernel import NOTES, OVERLAYS, Action, Suite


@pytest.fixture(scope="module")
def suite():
    """A small phone."""
    phone = Suite([NOTES], locale="en")
    yield phone
    phone.close()


@pytest.fixture
def device(suite):
    """The small phone on the launcher."""
    suite.restore(suite.initial)
    return LiteDevice(suite)


class Fixed:
    """A chat that says what it is given."""

    name = "fixed"

    def __init__(self, *said):
        self.said, self.asked = list(said), []

    def generate(self, requests):
        self.asked += requests
        said = self.said.pop(0)
        if isinstance(said, Exception):
            raise said
        return [Reply(said, "stop", TokenUsage(10, 3))]


def task(identifier="a", actions=()):
    return SimpleNamespace(identifier=identifier, oracle_actions=lambda: list(actions))


def test_a_script_is_played_then_finished_and_played_again():
    agent = ScriptAgent([Action("back"), Action("home")])
    for _ in range(2):
        agent.reset(task())
        assert [agent.act(None, "").kind for _ in range(4)] == ["back", "home", "finish", "finish"]
    with pytest.raises(ValueError, match="a script holds actions, got 'tap'"):
        ScriptAgent(["tap"])


def test_an_oracle_needs_a_task():
    agent = OracleAgent()
    with pytest.raises(ValueError, match=r"an OracleAgent needs reset\(task\) before act"):
        agent.act(None, "")
    agent.reset(task(actions=[Action("wait")]))
    assert [agent.act(None, "").kind for _ in range(2)] == ["wait", "finish"]


def test_elements_read_words_state_and_place(device):
    device.perform(Action("open", app="notes"))
    found = {e.id: e for e in elements(device.hierarchy()) if e.id}
    assert found["new"].press and found["query"].edit and found["list"].scroll and found["note_40"].hold
    assert found["note_40"].words.startswith("Return books 5") and "done_40" in found and found["new"].middle == (312, 752)
    with pytest.raises(ValueError, match="the hierarchy is no XML"):
        elements("<hierarchy>")


@pytest.mark.parametrize("name", ["random", "heuristic"])
def test_the_same_seed_and_task_give_the_same_actions_in_any_order(name, device):
    agent = {"random": RandomAgent, "heuristic": HeuristicAgent}[name](4)
    def play(identifier):
        device.restore(device.suite.initial)
        agent.reset(task(identifier))
        done = []
        for _ in range(12):
            done.append(agent.act(device.observe(), "Open Notes. Pin the note “Buy milk 5”."))
            done[-1].check((360, 800))
            device.perform(done[-1])
        return done
    first = {i: play(i) for i in "abc"}
    assert {i: play(i) for i in "cab"} == first


def test_the_heuristic_solves_what_words_can_solve(device):
    agent = HeuristicAgent()
    for goal in ("Open Notes. Pin the note “Water the plants 5”.", "打开“笔记”，置顶“Water the plants 5”。"):
        device.restore(device.suite.initial)
        agent.reset(task())
        assert agent.act(device.observe(), goal) == Action("open", app="Notes" if goal.startswith("Open") else "笔记")
        device.perform(Action("open", app="notes"))
        x, y = next(e.middle for e in elements(device.hierarchy()) if e.id == "note_39")
        assert str(agent.act(device.observe(), goal)).endswith(f"({x}, {y})")


@pytest.mark.parametrize("kind", [k for k in OVERLAYS if k not in ("keyboard", "loading")])
def test_the_heuristic_closes_what_is_in_the_way(kind, device):
    device.suite.disturb(kind)
    device.perform(HeuristicAgent().act(device.observe(), "Open Notes."))
    assert not device.suite.overlaid(kind)


@given(st.integers(0, 359), st.integers(0, 799), st.sampled_from(["absolute", "0-1", "0-1000"]), st.sampled_from(["json", "ui-tars", "text"]))
def test_a_point_comes_back_in_every_form_and_convention(x, y, coords, name):
    scale = {"absolute": None, "0-1": 1, "0-1000": 1000}[coords]
    a, b = (x, y) if scale is None else (x / 360 * scale, y / 800 * scale)
    said = {"json": json.dumps({"action": "click", "params": {"position": [a, b]}}), "ui-tars": f"Thought: x\nAction: click(start_box='({a},{b})')",
            "text": f"tap({a}, {b})"}[name]
    got = read_reply(said, replace(PROMPTS[name], coords=coords), SimpleNamespace(size=(360, 800), hierarchy="<hierarchy />"))
    assert abs(got.x - x) <= 1 and abs(got.y - y) <= 1


@pytest.mark.parametrize("name, text, message", [
    ("json", '{"action": "click", "params": {"position": [500, 400]}}', "outside the screen"), ("ui-tars", "Action: click(start_box='(1001,4)')", "does not fit the convention 0-1000"),
    ("text", "let me think", "no action in"), ("android-world", '{"action_type": "click", "index": 99}', "no element 99; the screen has"),
    ("android-world", '{"action_type": "fly"}', "unknown action kind 'fly'")])
def test_wrong_replies_are_refused(name, text, message, device):
    with pytest.raises(ValueError, match=message):
        read_reply(text, PROMPTS[name], device.observe())


def test_a_number_stands_for_the_middle_of_an_element(device):
    seen = elements(device.hierarchy())
    for i, e in enumerate(seen):
        assert f"[{i}] " in list_elements(device.hierarchy())
        got = read_reply(f'Action: {{"action_type": "click", "index": {i}}}', PROMPTS["android-world"], device.observe())
        assert (got.x, got.y) == e.middle


def test_an_unread_reply_waits_and_is_told_to_the_model(device):
    chat = Fixed("no idea", "tap(10, 30)", "finish()")
    agent = VLMAgent(chat, "text")
    assert [agent.act(device.observe(), "g").kind for _ in range(3)] == ["wait", "tap", "finish"]
    assert agent.unread == 1 and agent.usage == TokenUsage(30, 9) and "1. not understood: no action in 'no idea'" in chat.asked[1].messages[1]["content"]
    assert "2. tap(10, 30)" in chat.asked[2].messages[1]["content"]
    agent.reset(task())
    assert agent.unread == 0 and agent.usage == TokenUsage(0, 0)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_style_shows_what_it_says_and_states_its_convention(name, device):
    drawn = []
    seen = Observation(lambda: drawn.append(1) or device.observe().png, device.hierarchy(), (360, 800), 0)
    chat, style = Fixed("finish()"), PROMPTS[name]
    VLMAgent(chat, name).act(seen, "Buy milk")
    system, user = chat.asked[0].messages
    text = user["content"] if isinstance(user["content"], str) else user["content"][0]["text"]
    assert bool(drawn) == style.picture and ("Elements:" in text) == style.listing and "Goal: Buy milk" in text
    assert {"absolute": "px; the screen is 360 x 800", "0-1000": "thousandths"}[style.coords] in system["content"]


def test_a_broken_server_is_not_the_agents_fault(device):
    with pytest.raises(ChatError):
        VLMAgent(Fixed(ChatError(503)), "text").act(device.observe(), "g")
    with pytest.raises(ValueError, match="unknown prompt style 'morse'; known: json, ui-tars, android-world, text"):
        VLMAgent(Fixed(), "morse")


def test_a_served_model_acts_through_http_and_the_bill_is_the_usage(device):
    with ChatServer(Fixed('{"action": "open", "params": {"app_name": "notes"}}', '{"action": "terminate"}'), faults=(429, None, None)) as server:
        agent = VLMAgent(OpenAIChat(model="local", base_url=server.base_url, api_key="none"), "json")
        assert [agent.act(device.observe(), "g").kind for _ in range(2)] == ["open", "finish"]
        assert server.billed == agent.usage == TokenUsage(20, 6)


def ask(agent, path, body=None, kind="application/json"):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(agent.address + path, data, {"Content-Type": kind})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        return reply.read()


def until_open(agent):
    while not (now := json.loads(ask(agent, "state")))["open"]:
        pass
    return now


@pytest.fixture
def human():
    """A page, closed at the end."""
    agent = HumanAgent()
    yield agent
    agent.close()


def start(agent, device):
    """Let the agent act in a thread; what it does lands in the list."""
    got = []
    thread = threading.Thread(target=lambda: got.append(agent.act(device.observe(), "Buy milk")))
    thread.start()
    return thread, got


def test_a_person_acts_over_http_and_what_does_not_fit_is_refused(human, device):
    assert b"<title>phone</title>" in ask(human, "") and json.loads(ask(human, "state")) == {"turn": 0, "open": False}
    thread, got = start(human, device)
    now = until_open(human)
    assert now["goal"] == "Buy milk" and now["size"] == [360, 800] and now["picture"] and ask(human, "screen.png")[:4] == b"\x89PNG"
    for body, kind, message in (({"turn": 1, "action": "tap(999, 1)"}, "application/json", "outside the screen"), ({"turn": 0, "action": "back()"}, "application/json",
                                "turn 0 is over"), ({"turn": 1}, "application/json", "action"), ({"turn": 1, "action": "back()"}, "text/plain", "takes JSON")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(human, "act", body, kind)
        assert caught.value.code == 400 and message in json.loads(caught.value.read())["error"]
    ask(human, "act", {"turn": 1, "action": 'type("牛奶")'})
    thread.join()
    assert got == [Action("type", text="牛奶")]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(human, "else")


def test_a_closed_page_ends_the_wait(device):
    agent, raised = HumanAgent(), []

    def wait():
        try:
            agent.act(device.observe(), "g")
        except RuntimeError as error:
            raised.append(str(error))
    thread = threading.Thread(target=wait)
    thread.start()
    until_open(agent)
    agent.close()
    thread.join()
    assert raised == ["the page of the human agent was closed"]


@pytest.mark.skipif(find_browser() is None, reason="no browser")
def test_a_person_presses_moves_and_types_in_a_browser(human, device):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.goto(human.address)
        for turn, (do, action) in enumerate((
                (lambda: page.mouse.click(*place(page, 100, 200)), Action("tap", 100, 200)), (lambda: drag(page), Action("swipe", 100, 500, 100, 300)),
                (lambda: (page.fill("#t", "milk"), page.click("[data-k=type]")), Action("type", text="milk")),
                (lambda: page.click("[data-k=finish]"), Action("finish"))), 1):
            thread, got = start(human, device)
            page.wait_for_selector(f'img[src$="?{turn}"]')
            page.wait_for_function("document.querySelector('#s img').naturalWidth === 360")
            do()
            thread.join()
            assert got == [action]
        browser.close()


def place(page, x, y):
    box = page.locator("#s img").bounding_box()
    return box["x"] + x + 0.5, box["y"] + y + 0.5


def drag(page):
    page.mouse.move(*place(page, 100, 500))
    page.mouse.down()
    page.mouse.move(*place(page, 100, 300))
    page.mouse.up()
