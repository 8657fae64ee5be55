"""The phone: what an action is, how widgets get their places, and that a reset can't be noticed."""
import json
import math
import re
import sqlite3
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.mobilebench import kernel as k
from collai.mobilebench.kernel import NOTES, Action, App, Event, Route, State, Suite

DIARY = replace(NOTES, name="diary", titles=("日记", "Diary"))
ATTRIBUTES = ("index text resource-id class package content-desc checkable checked clickable enabled focusable focused scrollable "
              "long-clickable password selected bounds").split()
numbers = st.one_of(st.integers(0, 350), st.floats(0, 350, allow_subnormal=False))
words = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
ways = st.sampled_from(["up", "down", "left", "right"])


@st.composite
def actions(draw):
    """Any action that fits the screen."""
    kind = draw(st.sampled_from(k.ACTIONS))
    x, y, x2, y2 = (draw(numbers) for _ in range(4))
    if kind in ("tap", "double_tap", "long_press"):
        return Action(kind, x, y)
    if kind in ("swipe", "scroll", "drag"):
        return draw(st.sampled_from([Action(kind, x, y, x2, y2), Action(kind, direction=draw(ways)), Action(kind, x, y, direction=draw(ways))]))
    if kind in ("type", "answer"):
        return Action(kind, text=draw(words))
    return Action(kind, app=draw(words.filter(bool))) if kind == "open" else Action(kind)


@pytest.fixture(scope="module")
def built():
    """A phone with two apps, built once."""
    suite = Suite([NOTES, DIARY], seed=3, locale="zh")
    yield suite
    suite.close()


@pytest.fixture
def suite(built):
    """The phone in its first state."""
    built.restore(built.initial)
    return built


def press(suite, name, kind="tap"):
    """Press the middle of the widget with an id."""
    x1, y1, x2, y2 = suite.find(name).bounds
    return suite.perform(Action(kind, (x1 + x2) // 2, (y1 + y2) // 2))


def at(suite):
    """App in front, page and arguments."""
    front = suite._phone("front")
    return front, suite._stack_of(front)[-1].page


def any_action(suite, rng):
    """An action of a careless user."""
    live = [w.bounds for w in k.walk(suite.screen().root) if w.on is not None or w.role == "field"]
    x, y = int(rng.integers(360)), int(rng.integers(800))
    if live and rng.random() < 0.7:
        x1, y1, x2, y2 = live[rng.integers(len(live))]
        x, y = (x1 + x2) // 2, (y1 + y2) // 2
    kind = str(rng.choice(["tap", "tap", "tap", "long_press", "double_tap", "swipe", "type", "enter", "back", "home", "wait", "open"]))
    if kind == "swipe":
        return Action(kind, x, y, direction=str(rng.choice(["up", "down", "left", "right"])))
    if kind in ("type", "open"):
        return Action(kind, text=str(rng.choice(["牛奶", "<&>", ""]))) if kind == "type" else Action(kind, app="diary")
    return Action(kind, x, y) if kind in ("tap", "long_press", "double_tap") else Action(kind)


# actions

@given(actions())
def test_an_action_is_read_back_from_its_text_and_from_its_released_form(action):
    assert Action.parse(str(action)) == action == Action.parse(str(action), style="text")
    assert Action.parse(json.dumps(action.to_dict())) == action


@pytest.mark.parametrize("text", ["Action: tap(1, 2)", 'say "Action: x"', "a\nAction: back()", "'); Action: home() --", "tap(1, 2)", '{"action": "home"}',
                                  "\x00\x1f\u2028", "👩‍👩‍👧", ") " * 2000, "\\", "\\n"])
@pytest.mark.parametrize("kind", ["type", "answer", "finish"])
def test_a_text_that_looks_like_an_action_is_read_back(kind, text):
    action = Action(kind, text=text)
    assert Action.parse(str(action)) == action == Action.parse(json.dumps(action.to_dict()))
    assert Action.parse(f"Thought: it's time.\nAction: {action}") == action


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([(360, 800), (1080, 2400)]))
def test_normalised_coordinates_become_whole_px_of_the_screen(x, y, size):
    one = Action.parse(f"tap({x}, {y})", size, coords="0-1")
    assert abs(one.x - x * size[0]) <= 1 and abs(one.y - y * size[1]) <= 1 and isinstance(one.x, int)
    assert Action.parse(f"tap({x * 1000}, {y * 1000})", size, coords="0-1000") == one or abs(x * size[0] % 1 - 0.5) < 1e-6 \
        or abs(y * size[1] % 1 - 0.5) < 1e-6
    one.check(size)


@pytest.mark.parametrize(("text", "action"), [
    ("Thought: I see.\nAction: click(start_box='(120,340)')", Action("tap", 120, 340)),
    ("Action: click(start_box='<|box_start|>(120,340)<|box_end|>')", Action("tap", 120, 340)),
    ("Action: click(point='<point>120 340</point>')", Action("tap", 120, 340)),
    ("Action: click(start_box='[100, 300, 140, 380]')", Action("tap", 120, 340)),
    ("Action: long_press(start_box='(1,2)')", Action("long_press", 1, 2)),
    ("Action: type(content='牛奶, it\\'s (fresh)')", Action("type", text="牛奶, it's (fresh)")),
    ("Action: scroll(start_box='(180,500)', direction='down')", Action("scroll", 180, 500, direction="down")),
    ("Action: drag(start_box='(1,2)', end_box='(3,4)')", Action("drag", 1, 2, 3, 4)),
    ("Action: press_back()", Action("back")), ("Action: press_home()", Action("home")), ("Action: wait(5)", Action("wait")),
    ("Action: open_app(app_name='笔记')", Action("open", app="笔记")),
    ("Action: finished(content='done (all)')", Action("finish", text="done (all)")),
    ('{"action_type": "click", "x": 5, "y": 6}', Action("tap", 5, 6)),
    ('{"action_type": "input_text", "text": "milk", "x": 5, "y": 6}', Action("type", 5, 6, text="milk")),
    ('{"action_type": "navigate_back"}', Action("back")), ('{"action_type": "keyboard_enter"}', Action("enter")),
    ('{"action_type": "open_app", "app_name": "Notes"}', Action("open", app="Notes")),
    ('{"action_type": "status", "goal_status": "complete"}', Action("finish")),
    ('{"action_type": "scroll", "direction": "down"}', Action("scroll", direction="down")),
    ('```json\n{"action": "click", "params": {"position": [5, 6]}}\n```', Action("tap", 5, 6)),
    ('{"action": "terminate", "params": {}}', Action("finish")), ('{"action": "wait_time"}', Action("wait")),
    ('{"thought": "x", "action": {"action": "tap", "params": {"position": [5, 6]}}}', Action("tap", 5, 6)),
    ('<tool_call>\n{"name": "mobile_use", "arguments": {"action": "click", "coordinate": [5, 6]}}\n</tool_call>', Action("tap", 5, 6)),
    ('{"name": "mobile_use", "arguments": {"action": "system_button", "button": "Back"}}', Action("back")),
    ('{"name": "mobile_use", "arguments": {"action": "answer", "text": "7"}}', Action("answer", text="7")),
    ('{"name": "tap", "arguments": "{\\"x\\": 5, \\"y\\": 6}"}', Action("tap", 5, 6)),
    ("swipe(180, 600, 180, 200)", Action("swipe", 180, 600, 180, 200)), ("scroll(down)", Action("scroll", direction="down")),
    ("back()", Action("back")), ("finish()", Action("finish")), ("I tap it (gently): tap(5, 6), then wait (a bit)", Action("tap", 5, 6)),
    ("Action: type(content='a\nb (c)')\n(end)", Action("type", text="a\nb (c)")), ("tap(\n  5,\n  6,\n)", Action("tap", 5, 6)),
    ("Thought: it's there. Action: type(content='Action: go')", Action("type", text="Action: go")),
    ("Action: tap(1, 2)\nAction: tap(5, 6)", Action("tap", 5, 6)), ('{"action": "type", "text": "Action: \\"x\\""}', Action("type", text='Action: "x"')),
    ("Action: type(content='it's ok')", Action("type", text="it's ok")), ("answer(42)", Action("answer", text="42")),
    ("type(3.5)", Action("type", text="3.5")), ("press(5, 6)", Action("tap", 5, 6)), ("press('back')", Action("back")),
    ("click('(5,6)')", Action("tap", 5, 6)), ('{"action": "key", "text": "Home"}', Action("home")),
    ('{"type": "function", "function": {"name": "tap", "arguments": "{\\"x\\": 5, \\"y\\": 6}"}}', Action("tap", 5, 6)),
    ('{"tool_calls": [{"id": "a", "type": "function", "function": {"name": "type", "arguments": {"text": "x"}}}]}', Action("type", text="x")),
    ('{"type": "function_call", "name": "tap", "arguments": " {\\"x\\": 5, \\"y\\": 6}"}', Action("tap", 5, 6)),
    ('{"type": "tool_use", "id": "a", "name": "tap", "input": {"x": 5, "y": 6}}', Action("tap", 5, 6)),
    ('{"name": "tap", "parameters": {"x": 5, "y": 6}}', Action("tap", 5, 6))])
def test_the_styles_of_models_are_read(text, action):
    assert Action.parse(text) == action


@pytest.mark.parametrize(("text", "coords", "message"), [
    ("tap(540, 400)", "absolute", r"tap at \(540, 400\) is outside the screen of 360 x 800"),
    ("tap(-1, 400)", "absolute", r"outside the screen"), ("tap(540, 400)", "0-1", "coordinate 540 does not fit the convention 0-1"),
    ("tap(1540, 400)", "0-1000", "coordinate 1540 does not fit"), ("tap(1)", "absolute", "tap needs x and y, got x=1, y=None"),
    ("tap()", "absolute", "tap needs x and y"), ("nothing here", "absolute", "no action in 'nothing here'"), ("", "absolute", "no action in ''"),
    ("fly(1, 2)", "absolute", "unknown action kind 'fly'; known: tap, double_tap"), ('{"action": "tap"}', "absolute", "tap needs x and y"),
    ('{"action": "tap", "params": {"position": [1]}}', "absolute", r"a point must have two numbers, got \[1\]"),
    ('{"action": "tap", "params": {"position": [NaN, 1]}}', "absolute", "must be finite, got nan"),
    ('{"action": "tap", "x": "a", "y": 1}', "absolute", "must be a number, got 'a'"), ("type()", "absolute", "type needs text, got None"),
    ("swipe(1, 2)", "absolute", "swipe needs a start and an end, or a direction"), ("open()", "absolute", "open needs app"),
    ("tap(import os)", "absolute", "arguments of tap cannot be read"), ("swipe('north')", "absolute", "direction must be up, down, left or right"),
    ("tap(nan, 1)", "absolute", "a point must have two numbers, got 'nan'"), (f"tap(1{'0' * 400}, 1)", "absolute", "coordinate must be finite, got 1000"),
    (f'{{"action": "tap", "x": 1{"0" * 400}, "y": 1}}', "absolute", "coordinate must be finite, got 1000"), ("key(1)", "absolute", "unknown action kind 'key'"),
    ('{"name": "tap", "arguments": "{x"}', "absolute", r"arguments cannot be read: '\{x'"), ('{"a": ' * 5000, "absolute", "no action in"),
    ('type("\ud800")', "absolute", "text must hold whole characters"),
    ('type("' + "\\" * 301, "absolute", "arguments of type cannot be read"),
    ("tap(1, 2)", "percent", "unknown style 'auto' or coords 'percent'"), ("tap(1,2,3,4,5)", "absolute", "too many arguments of tap")])
def test_what_cannot_be_carried_out_is_refused_by_name(text, coords, message):
    with pytest.raises(ValueError, match=message):
        Action.parse(text, coords=coords)


@pytest.mark.parametrize(("arguments", "message"), [
    (("fly",), "unknown action kind 'fly'"), (("tap", math.nan, 1), "x must be finite, got nan"), (("tap", "1", 1), "x must be a number, got '1'"),
    (("tap", True, 1), "x must be a number, got True"), (("swipe", 1, 2, 3), "swipe needs x2 and y2"), ((7,), "unknown action kind 7"),
    (("tap", 10**400, 1), "x must be finite, got 1000"), (("swipe", None, None, 1, 2, None, "up"), "swipe needs a start for its end"),
    (("swipe", 1, 2, None, None, None, []), r"direction must be up, down, left or right, got \[\]"),
    (("type", None, None, None, None, "a\ud800"), "text must hold whole characters, got half of one in 'a")])
def test_a_malformed_action_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Action(*arguments)


def test_published_names_are_mapped_and_written():
    assert Action("click", 1, 2).kind == "tap" and Action("terminate").kind == "finish" and Action("Wait_Time").kind == "wait"
    assert Action("click", 1, 2).to_dict() == {"action": "click", "params": {"position": [1, 2]}}
    assert Action("finish").to_dict() == {"action": "terminate", "params": {}}
    assert Action("swipe", direction="down").points() == (180, 400, 180, 160)
    assert Action("swipe", 10, 10, direction="down").points() == (10, 10, 10, 0)


# text and layout

@given(words, words, st.integers(8, 40))
def test_a_text_is_as_wide_as_its_parts_up_to_rounding(a, b, size):
    whole, parts = k.text_width(a + b, size), k.text_width(a, size) + k.text_width(b, size)
    assert whole <= parts <= whole + 1


@given(words, st.integers(40, 200), st.integers(0, 3))
def test_lines_fit_and_nothing_is_lost(text, width, lines):
    found = k.wrap_text(text, width, 14, lines)
    assert all(k.text_width(line, 14) <= width for line in found) and 1 <= len(found) <= (lines or 999)
    if not lines:
        assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2)), min_size=1, max_size=6), st.integers(0, 600))
def test_a_row_gives_all_the_room_and_takes_only_what_is_missing(children, room):
    sizes, grow = map(list, zip(*children, strict=True))
    found = k._share(sizes, grow, room)
    assert min(found) >= 0 and sum(found) == (room if any(grow) or sum(sizes) > room else sum(sizes))
    if sum(sizes) > room:
        assert all(f <= s for f, s in zip(found, sizes, strict=True))


def placed(tree, width=360, height=776, **ctx):
    """A tree laid out on a screen."""
    box = (0, 24, width, 24 + height)
    assert k._place(tree, box, box, k._Context({**k.THEMES["light"], "accent": "#123456"}, **ctx))
    return tree


def test_containers_put_children_where_they_say():
    a, b, c = k.label("A", id="a"), k.label("B", id="b", grow=1), k.icon("add", id="c")
    placed(k.page(k.row(a, b, c, gap=10, h=50)))
    assert a.box[0] == 0 and b.box[0] == a.box[2] + 10 and c.box == (336, 400, 360, 424)
    cells = [k.label(str(i), h=20) for i in range(5)]
    placed(k.page(k.grid(*cells, columns=3, gap=6)))
    assert [c.box[:2] for c in cells] == [(0, 24), (122, 24), (244, 24), (0, 50), (122, 50)] and cells[0].box[2] == 116
    pin, corner, middle = k.icon("pin", at=(0.25, 0.5)), k.icon("add", anchor="br"), k.label("x", w=100, h=40, anchor="center")
    placed(k.page(k.stack(k.image(1), pin, corner, middle)))
    assert pin.box == (78, 400, 102, 424) and corner.box == (336, 776, 360, 800) and middle.box == (130, 392, 230, 432)


def test_a_scroller_shows_a_part_and_knows_its_length():
    rows = [k.label(str(i), h=100) for i in range(20)]
    tree = placed(k.scroll("list", *rows), offsets={"list": 250})
    assert tree.scrollable and tree.extent == 2000 and [w.text for w in tree.children] == [str(i) for i in range(2, 11)]
    assert tree.children[0].bounds == (0, 24, 360, 74) and tree.children[0].box == (0, -26, 360, 74)
    assert placed(k.scroll("list", *rows), offsets={"list": 9999}).children[-1].box[3] == 800
    assert not placed(k.scroll("list", *rows[:3])).scrollable
    built = []
    tree = placed(k.listing("list", range(1000), lambda i: built.append(i) or k.label(str(i)), 50), offsets={"list": 1010})
    assert built == list(range(20, 36)) and tree.extent == 50_000
    sideways = placed(k.page(k.hscroll("h", *(k.label(str(i), w=90, h=30) for i in range(9)))), offsets={"h": 95}).children[0]
    assert [w.text for w in sideways.children] == ["1", "2", "3", "4", "5"] and sideways.children[0].box[0] == -5


def test_a_field_with_the_cursor_is_scrolled_into_sight():
    tree = k.scroll("form", *(k.row(k.field(f"f{i}"), h=100) for i in range(20)))
    placed(tree, focus="f15")
    assert any(w.id == "f15" and w.focused for w in k.walk(tree))


def test_tokens_languages_and_passwords_are_resolved():
    secret, plain = k.field("p", "abc", password=True), k.icon("add", desc=("加", "Add"), color="accent")
    placed(k.page(k.column(k.row(secret), plain)), lang=1)
    assert secret.shown == ("•••",) and plain.desc == "Add" and plain.color == "#123456"
    with pytest.raises(ValueError, match="unknown icon 'smiley'"):
        k.icon("smiley")


# the hierarchy

def test_the_hierarchy_is_a_dump_with_every_attribute(suite):
    for name in ("launcher", "settings", "notes"):
        suite.perform(Action("open", app=name))
        top = ET.fromstring(suite.hierarchy())  # noqa: S314
        assert top.tag == "hierarchy" and not suite.hierarchy().startswith("<?xml")
        for parent in top.iter():
            x1, y1, x2, y2 = map(int, re.findall(r"\d+", parent.get("bounds", "[0,0][360,800]")))
            for i, node in enumerate(parent):
                a, b, c, d = map(int, re.findall(r"\d+", node.get("bounds")))
                assert list(node.attrib) == ATTRIBUTES and node.get("index") == str(i) and node.get("class").startswith("android.")
                assert x1 <= a < c <= x2 and y1 <= b < d <= y2


@given(st.text(max_size=20) | st.text("<>&\"'\n\t\r\x01\ufffe\x7f牛a", max_size=9))
def test_any_text_can_stand_in_the_hierarchy(text):
    tree = placed(k.page(k.column(k.label(text), k.icon("add", desc=text))))
    found = ET.fromstring(k.hierarchy(k.Screen(tree, None, (), "p", {})))  # noqa: S314
    values = {n.get("text") for n in found.iter("node")} | {n.get("content-desc") for n in found.iter("node")}
    assert re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]", "", text) in values


# the state machine

@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_no_walk_notices_a_reset_or_a_fork(built, seed):
    rng = np.random.default_rng(seed)
    built.restore(built.initial)
    first = built.digest()
    built.perform(Action("open", app="notes"))
    for _ in range(6):
        built.perform(any_action(built, rng))
    middle, twin = built.snapshot(), built.fork()
    script = []
    for _ in range(6):
        script.append(any_action(built, rng))
        assert built.perform(script[-1]) == twin.perform(script[-1])
        assert built.hierarchy() == twin.hierarchy() and built.digest() == twin.digest()
    last = built.digest()
    built.restore(middle)
    for action in script:
        built.perform(action)
    assert built.digest() == last
    built.restore(twin.initial)
    assert built.digest() == first
    twin.close()


@settings(max_examples=12)
@given(st.integers(0, 2**32))
def test_diff_equals_a_comparison_of_all_rows(built, seed):
    rng = np.random.default_rng(seed)
    built.restore(built.initial)
    built.perform(Action("open", app="notes"))
    states = []
    for _ in range(2):
        for _ in range(12):
            built.perform(any_action(built, rng))
        states.append(built.snapshot())
    expected = []
    for name in sorted(built._columns):
        old, new = ({r["id"]: r for r in built.rows(s, name)} for s in states)
        expected += [(name, i, old.get(i), new.get(i)) for i in sorted(old | new) if old.get(i) != new.get(i)]
    assert [tuple(c) for c in built.diff(*states)] == expected
    for name in built._columns:
        total = sum(map(k._row_hash, built._db.execute(f'SELECT * FROM "{name}"'))) % 2**62  # noqa: S608
        assert total == built._db.execute("SELECT sum FROM _table WHERE name = ?", (name,)).fetchone()[0]


@settings(max_examples=12)
@given(st.integers(0, 2**32))
def test_an_action_without_effect_leaves_no_trace(built, seed):
    rng = np.random.default_rng(seed)
    built.restore(built.initial)
    for _ in range(10):
        before = built.digest()
        changed = built.perform(any_action(built, rng))
        assert changed == (built.digest() != before)
        after = built.digest()
        for idle in (Action("finish"), Action("answer", text="x"), Action("tap", 3, 3)):
            assert not built.perform(idle)
        built.hierarchy()
        assert built.digest() == after


def test_equal_arguments_give_equal_phones_whose_snapshots_can_be_exchanged(suite):
    other = Suite([NOTES, DIARY], seed=3, locale="zh")
    assert other.digest() == suite.digest() and Suite([NOTES, DIARY], seed=4).digest() != suite.digest()
    press(suite, "app_notes")
    other.restore(suite.snapshot())
    assert other.hierarchy() == suite.hierarchy() and other.digest() == suite.digest()
    assert Suite([DIARY, NOTES], seed=3).rows(Suite([DIARY, NOTES], seed=3).initial, "notes.note") == suite.rows(suite.initial, "notes.note")


def test_the_rows_of_a_snapshot_can_be_read_and_found_again(suite):
    found = suite.rows(suite.initial, "notes.note", "pinned = ?", 1)
    assert [row["id"] for row in found] == [6] and set(found[0]) == {"id", "title", "body", "done", "pinned"}
    with pytest.raises(LookupError, match="no widget with id='nowhere'"):
        suite.find("nowhere")


def test_snapshots_that_are_not_ours_are_refused_and_change_nothing(suite):
    data, digest = suite.initial, suite.digest()
    foreign, edited = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    foreign.execute("CREATE TABLE t (a)")
    edited.deserialize(data)
    edited.execute("PRAGMA user_version = 7")
    for wrong, message in ((b"", "these 0 bytes are no snapshot"), (b"snapshot" * 99, "no snapshot of a phone"), (data[:-1], "cut off or damaged"),
                           (foreign.serialize(), "no snapshot of a phone"), (edited.serialize(), "schema version 7, this suite has 1"),
                           (data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], "cut off or damaged"), (data + b"x", "cut off or damaged"),
                           (Suite([NOTES], seed=3).initial, "other apps"), (Suite([NOTES, DIARY], locale="en").initial, "another language"),
                           ("text", "a snapshot is bytes, got str")):
        with pytest.raises(ValueError, match=message):
            suite.restore(wrong)
        with pytest.raises(ValueError, match=message):
            suite.diff(data, wrong)
        assert suite.digest() == digest


# what a user can do

def test_a_note_is_written_changed_and_deleted(suite):
    press(suite, "app_notes")
    press(suite, "new")
    assert at(suite) == ("notes", "edit") and press(suite, "save") and suite._phone("toast") == "标题不能为空"
    press(suite, "title")
    assert suite.perform(Action("type", text="喂猫")) and suite.find("title").text == "喂猫"
    press(suite, "body")
    suite.perform(Action("type", text="每天"))
    press(suite, "save")
    new = {"id": 41, "title": "喂猫", "body": "每天", "done": 0, "pinned": 0}
    assert suite.diff(suite.initial, suite.snapshot()) == [k.RowChange("notes.note", 41, None, new)]
    press(suite, "done_41")
    assert suite.diff(suite.initial, suite.snapshot())[0].after == new | {"done": 1}
    press(suite, "note_41", "long_press")
    press(suite, "delete")
    press(suite, "cancel")
    assert at(suite) == ("notes", "home")
    press(suite, "note_41", "long_press")
    press(suite, "delete")
    press(suite, "sure")
    assert suite.diff(suite.initial, suite.snapshot()) == [] and suite._phone("toast") == "已删除"


def test_back_home_and_open_keep_the_routes(suite):
    assert not suite.perform(Action("back")) and not suite.perform(Action("home"))
    suite.perform(Action("open", app="笔记"))
    press(suite, "more")
    suite.perform(Action("home"))
    assert at(suite)[0] == "launcher" and suite.perform(Action("open", app="NOTES")) and at(suite) == ("notes", "about")
    suite.perform(Action("back"))
    assert at(suite) == ("notes", "home") and suite.perform(Action("back")) and at(suite)[0] == "launcher"
    assert not suite.perform(Action("open", app="no such app"))


def test_text_replaces_text_and_enter_closes_the_keyboard(suite):
    suite.perform(Action("open", app="notes"))
    assert not suite.perform(Action("type", text="lost")) and not suite.perform(Action("enter"))
    press(suite, "query")
    assert suite.find("query").focused and suite.find("page").bounds[3] == k.HEIGHT - k.KEYBOARD
    assert not suite.perform(Action("tap", 180, 700)) and suite.perform(Action("type", text="牛奶"))
    assert suite.find("query").text == "牛奶" and not suite.find("query").focused
    assert all("牛奶" in w.text for w in k.walk(suite.find("list")) if w.size == 15)
    x1, y1, x2, y2 = suite.find("query").bounds
    suite.perform(Action("type", (x1 + x2) / 2, (y1 + y2) / 2, text="x"))
    assert suite.find("query").text == "x" and not suite._phone("focus")
    press(suite, "query")
    assert suite.perform(Action("back")) and at(suite) == ("notes", "home")


def test_moves_scroll_and_stop_at_the_ends(suite):
    suite.perform(Action("open", app="notes"))
    assert not suite.perform(Action("swipe", direction="up")) and suite.perform(Action("scroll", direction="down"))
    assert suite.find("list").value == 240 and suite.perform(Action("drag", 180, 300, 180, 540)) and suite.find("list").value == 0
    while suite.perform(Action("swipe", 180, 700, 180, 200)):
        pass
    assert suite.find("list").value == suite.find("list").extent - 624 and suite.find("note_1")
    assert not suite.perform(Action("swipe", direction="left"))


def test_a_flick_that_answers_nothing_lets_the_outer_scroller_move():
    tall = [k.label(str(i), h=100) for i in range(20)]
    card = k.image(1, id="card", h=200, flick="swiped")
    act = lambda s, e: [k.add("line", text=e.direction)] if e.direction in ("left", "right") else []  # noqa: E731
    suite = Suite([App("cards", ("卡", "Cards"), lambda s, r: k.page(k.scroll("all", card, *tall)), act, {"line": "text TEXT"})])
    suite.perform(Action("open", app="cards"))
    assert suite.perform(Action("swipe", 180, 150, direction="left")) and suite.find("all").value == 0
    assert suite.perform(Action("swipe", 180, 150, direction="down")) and suite.find("all").value == 150
    assert [row["text"] for row in suite.rows(suite.snapshot(), "cards.line")] == ["left"]


def test_a_move_that_goes_nowhere_is_no_flick(probe):
    x1, y1, _, _ = probe.find("area").bounds
    before = probe.digest()
    assert not probe.perform(Action("swipe", x1 + 9, y1 + 9, x1 + 9, y1 + 9)) and probe.digest() == before
    assert probe.perform(Action("swipe", x1 + 9, y1 + 9, x1 + 9, y1 + 10)) and lines(probe)[0].startswith("flick flick up")


@pytest.mark.parametrize("text", ["'; DROP TABLE \"notes.note\"; --", "%_\\", "👩‍👩‍👧‍👦🇨🇳", "a\x00b\x01\ufffe", "\u202eabc\u2028", "é" + "\u0301" * 500, "<&>\"']]>",
                                  "长" * 10_000, "a" * 10_000])
def test_any_text_is_kept_as_it_was_typed(suite, text):
    suite.perform(Action("open", app="notes"))
    x1, y1, _, _ = suite.find("query").bounds
    assert suite.perform(Action("type", x1 + 9, y1 + 9, text=text)) and suite.find("query").text == text
    press(suite, "new")
    for name, words in (("title", "T"), ("body", text)):
        x1, y1, _, _ = suite.find(name).bounds
        suite.perform(Action("type", x1 + 9, y1 + 9, text=words))
    press(suite, "save")
    assert [c.after["body"] for c in suite.diff(suite.initial, suite.snapshot())] == [text]
    other, digest = suite.fork(), suite.digest()
    assert other.digest() == digest and other.hierarchy() == suite.hierarchy() and len(ET.fromstring(other.hierarchy()))  # noqa: S314
    other.close()


def test_a_field_takes_ten_thousand_characters(suite):
    suite.perform(Action("open", app="notes"))
    x1, y1, _, _ = suite.find("query").bounds
    suite.perform(Action("type", x1 + 9, y1 + 9, text="😀" * 100_000))
    assert suite.find("query").text == "😀" * 10_000 and "note_" not in suite.hierarchy()


def test_settings_sliders_and_the_shade(suite):
    suite.perform(Action("open", app="settings"))
    x1, y1, x2, y2 = suite.find("brightness").bounds
    suite.perform(Action("tap", x1 + (x2 - x1) // 4, (y1 + y2) // 2))
    assert suite.diff(suite.initial, suite.snapshot())[0].after["value"] in (24, 25)
    suite.perform(Action("swipe", x1 + 4, y1 + 4, x2 - 1, y1 + 4))
    assert suite.diff(suite.initial, suite.snapshot())[0].after["value"] in (99, 100)
    press(suite, "dark")
    assert suite.screen().theme["page"] == k.THEMES["dark"]["page"]
    suite.perform(Action("swipe", 180, 5, 180, 400))
    assert at(suite) == ("shade", "home") and suite.perform(Action("back")) and at(suite) == ("settings", "home")


def act(s: State, e: Event):
    """Handlers of the app below."""
    if e.name == "send":
        return [k.add("line", text=e.fields["say"]), k.write("say", ""), k.notify("New", e.fields["say"], "second", n=1), k.roll()]
    if e.name == "gone":
        return [k.put("line", s.row("line", 99)["id"], text="x")]
    if e.name == "wrong":
        return [k.add("line", text="half"), k.add("line", colour=1)]
    return [k.add("line", text=f"{e.name} {e.kind} {e.direction} {e.arg} {e.at[0]:.1f} {s.luck(1)} {s.next_id('line')} {s.clock}")]


def view(s: State, r: Route):
    """An app with every kind of handler."""
    if r.page == "second":
        return k.page(k.column(k.label(str(r.get("n"))), k.button("on", k.here(n=2), id="here"), k.button("top", k.jump("list", 9), id="jump")))
    if r.page == "missing":
        return k.page(k.label(s.row("line", 99)["text"]))
    area = k.image(1, id="area", double="double", hold="hold", flick="flick", arg=5, h=100)
    keys = [k.button(n, on, id=n) for n, on in (("gone", "gone"), ("wrong", "wrong"), ("missing", k.go("missing")),
            ("notes", k.launch("notes", "about")), ("focus", k.focus("say")), ("none", ()), ("off", "tap"))]
    keys[-1].enabled = False
    return k.page(k.column(area, *keys, k.label(str(s.count("line")), id="count"), k.button("tap", "tap", id="tap")),
                  bottom=k.row(k.field("say", on="send")))


PROBE = App("probe", ("试", "Probe"), view, act, {"line": "text TEXT"}, lambda rng, t: {"line": [{"text": t("一", "one")}]})


@pytest.fixture
def probe():
    """A phone with an app that has every kind of handler, open."""
    suite = Suite([PROBE, NOTES], locale="en")
    suite.perform(Action("open", app="probe"))
    yield suite
    suite.close()


def lines(suite):
    """What the app wrote."""
    return [row["text"] for row in suite.rows(suite.snapshot(), "probe.line")][1:]


def test_every_kind_of_event_reaches_the_app(probe):
    press(probe, "area", "double_tap")
    press(probe, "area", "long_press")
    probe.perform(Action("swipe", 100, 80, 20, 80))
    press(probe, "tap", "double_tap")
    assert lines(probe) == ["double double  5 0.5 0 2 1", "hold hold  5 0.5 0 3 2", "flick flick right 5 0.3 0 4 3",
                            "tap tap  None 0.5 0 5 4", "tap tap  None 0.5 0 6 5"]
    assert not press(probe, "area") and not press(probe, "off") and not press(probe, "none") and not press(probe, "gone")
    assert not press(probe, "tap", "long_press")


def test_a_sent_text_empties_its_field_and_leaves_a_notification(probe):
    assert press(probe, "focus") and probe.perform(Action("type", text="hello"))
    assert lines(probe) == ["hello"] and probe.find("say").text == "" and probe._phone("rng") == 1
    probe.perform(Action("swipe", 180, 5, 180, 400))
    press(probe, "notice_1")
    assert at(probe) == ("probe", "second") and probe.find(text="1") and press(probe, "here") and probe.find(text="2")
    assert not press(probe, "here") and press(probe, "jump") and not press(probe, "jump")
    assert probe._db.execute("SELECT * FROM _scroll").fetchall() == [("probe", 1, "list", 9)]
    assert probe.perform(Action("back")) and probe._db.execute("SELECT * FROM _scroll").fetchall() == []


def test_an_app_launched_by_another_goes_back_to_it(probe):
    press(probe, "notes")
    assert at(probe) == ("notes", "about")
    probe.perform(Action("back"))
    probe.perform(Action("back"))
    assert at(probe) == ("probe", "home") and probe.perform(Action("back")) and at(probe)[0] == "launcher"


def test_what_is_transparent_and_inert_lets_touches_through():
    below, above = k.image(1, on=k.back(), id="below"), k.column(k.label("x", id="words"), pad=20)
    tree = placed(k.page(k.stack(below, above)))
    assert k._path(tree, 180, 400)[0] is below and k._path(tree, 22, 46)[0] is below
    solid = placed(k.page(k.stack(k.image(1, on=k.back()), k.column(k.label("x"), bg="surface", id="card"))))
    assert k._path(solid, 180, 400)[0].id == "card"


def test_a_missing_row_shows_a_page_and_a_failing_handler_changes_nothing(probe):
    press(probe, "missing")
    assert probe.find(text="Nothing here any more") and press(probe, "back")
    before = probe.digest()
    with pytest.raises(ValueError, match="table probe.line has no column 'colour'; it has id, text"):
        press(probe, "wrong")
    assert probe.digest() == before


def test_english_words_are_known_without_a_chinese_font(suite):
    suite.perform(Action("open", app="notes"))
    shown = [suite.english(w.text) for w in k.walk(suite.screen().root)]
    assert "Notes" in shown and "Write the report 1" in shown and suite.english("龙x") == "?x"
    assert not any(ord(c) > 0x2E80 for text in shown for c in text)


# noise

@pytest.mark.parametrize(("kind", "button"), [("popup", "popup_close"), ("permission", "permission_allow"), ("permission", "permission_deny"),
                                              ("network", "retry"), ("banner", "banner_close"), ("message", "heads_up"), ("keyboard", ""),
                                              ("loading", "")])
@pytest.mark.parametrize("dialog", [False, True])
def test_an_overlay_goes_away_by_its_own_button_and_leaves_the_rest_alone(suite, kind, button, dialog):
    suite.perform(Action("open", app="notes"))
    if dialog:
        press(suite, "note_6", "long_press")
    seen, routes = suite.hierarchy(), suite._stack_of("notes")
    suite.disturb(kind, 5)
    assert suite.overlaid(kind) and (suite.hierarchy() != seen or kind == "keyboard")
    if kind in ("popup", "permission", "network"):
        for action in (Action("back"), Action("home"), Action("open", app="diary"), Action("type", text="x"), Action("tap", 180, 790),
                       Action("swipe", direction="down")):
            assert not suite.perform(action)
    assert press(suite, button) if button else suite.perform(Action("back" if kind == "keyboard" else "wait"))
    assert not suite.overlaid(kind) and suite.hierarchy() == seen and suite._stack_of("notes") == routes
    assert suite.diff(suite.initial, suite.snapshot()) == []


def test_a_banner_moves_the_page_and_an_open_keyboard_takes_touches(suite):
    suite.perform(Action("open", app="notes"))
    y = suite.find("note_6").bounds[1]
    suite.disturb("banner")
    assert suite.find("note_6").bounds[1] == y + 72
    suite.calm("banner")
    suite.disturb("keyboard")
    assert not press(suite, "new") and not suite.perform(Action("swipe", 180, 700, 180, 200)) and suite.perform(Action("swipe", 180, 500, 180, 200))
    assert suite.perform(Action("back")) and press(suite, "new")


def test_a_crash_loses_the_routes_but_no_rows(suite):
    suite.perform(Action("open", app="notes"))
    press(suite, "done_6")
    press(suite, "new")
    rows = suite.snapshot()
    suite.disturb("crash")
    assert at(suite)[0] == "launcher" and suite.diff(rows, suite.snapshot()) == []
    suite.perform(Action("open", app="notes"))
    assert at(suite) == ("notes", "home")
    press(suite, "query")
    suite.perform(Action("type", text="x"))
    suite.disturb("crash")
    suite.perform(Action("open", app="notes"))
    assert suite.find("query").text == ""
    with pytest.raises(ValueError, match="unknown disturbance 'fire'; known: banner"):
        suite.disturb("fire")


# what an author can get wrong

@pytest.mark.parametrize(("change", "message"), [
    ({"name": "My App"}, "the name of an app must be a lower-case word, got 'My App'"), ({"name": "settings"}, "two apps have the name 'settings'"),
    ({"icon": "smiley"}, "app 'notes' has the unknown icon 'smiley'"), ({"tables": {}}, "app 'notes' has rows for the unknown table 'note'"),
    ({"rows": lambda rng, t: {"note": [{"titel": 1}]}}, "table notes.note has no column 'titel'"),
    ({"rows": lambda rng, t: {"note": [{"title": [1]}]}}, r"a column holds int, finite float, str or None, got \[1\]")])
def test_a_malformed_app_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Suite([replace(NOTES, **change)])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"locale": "fr"}, "locale must be 'zh' or 'en', got 'fr'"), ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
    ({"apps": ["notes"]}, "apps must be App values, got 'notes'")])
def test_a_malformed_phone_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Suite(**({"apps": [NOTES]} | arguments))


def test_a_seed_may_be_large():
    assert Suite([NOTES], seed=10**30).digest() == Suite([NOTES], seed=10**30).digest() != Suite([NOTES], seed=10**30 + 1).digest()


def test_actions_outside_the_screen_and_other_things_are_refused(suite):
    for action, message in ((Action("tap", 360, 1), r"tap at \(360, 1\) is outside"), (Action("swipe", 1, 1, 5, 800), "outside"), ("back", "must be an Action")):
        with pytest.raises(ValueError, match=message):
            suite.perform(action)


def test_an_unknown_table_or_app_is_refused(suite):
    with pytest.raises(ValueError, match="unknown table 'notes.nota'"):
        suite.rows(suite.initial, "notes.nota")
    with pytest.raises(ValueError, match="unknown app 'nota'"), suite._transaction():
        suite._apply("notes", [k.launch("nota")])
