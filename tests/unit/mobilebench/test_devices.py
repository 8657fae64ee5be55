"""Devices: the same phone as pictures, as a page in a browser, and a real phone behind a fake transport."""
import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collai.mobilebench import devices as d
from collai.mobilebench import kernel as k
from collai.mobilebench.kernel import (
    NOTES,
    Action,
    App,
    Suite,
    add,
    back,
    bar,
    bottom_bar,
    button,
    chart,
    check,
    chip,
    column,
    cut,
    dialog,
    field,
    go,
    here,
    hscroll,
    icon,
    image,
    item,
    label,
    listing,
    page,
    progress,
    put,
    row,
    scroll,
    sheet,
    slider,
    spacer,
    stack,
    switch,
    tabs,
    toast,
)
from collai.mobilebench.rules import parse_rule

browser = pytest.mark.skipif(d.find_browser() is None, reason="no Chromium and Playwright here")
KINDS = ("photo", "avatar", "cover", "product", "map")


def first_rows(rng, t):
    things = [{"name": t(f"商品{i}", f"Thing {i}"), "liked": int(i % 3 == 0)} for i in range(1, 25)]
    return {"thing": things, "level": [{"value": 40}]}


def home_page(s, r):
    """Every role and every container."""
    level = s.row("level", 1)["value"]
    arts = hscroll("covers", *(image(i, kind=KINDS[i % 5], w=96, h=96, radius=12, on=go("detail", id=i), id=f"cover_{i}") for i in range(1, 9)),
                   gap=10, pad=(12, 4), h=104)
    chips = row(*(chip(s.t(f"推荐{i}", f"Tip {i}"), here(chip=i), chosen=r.get("chip", 0) == i, id=f"chip_{i}") for i in range(3)), spacer(),
                gap=8, pad=(12, 6))
    knobs = column(
        chart((3, 5, 4, 6, 7), h=60), chart((1, -2, 5), h=40, kind="bars"), chart((), h=20),
        row(icon("volume"), slider("level", level / 100, id="vol"), label(str(level), w=30, align="right"), gap=10), progress(level / 100),
        row(label(s.t("自动", "Auto"), grow=1), switch(here(auto=not r.get("auto", True)), r.get("auto", True), id="auto")),
        gap=10, pad=12, bg="surface", radius=14, border="line")
    things = [item(w["name"], check(put("thing", w["id"], liked=1 - w["liked"]), bool(w["liked"]), id=f"like_{w['id']}"), text="50% & <b>",
                   left=image(w["id"], kind="product", w=48, h=48), id=f"thing_{w['id']}", on=go("detail", id=w["id"]),
                   hold=go("menu", id=w["id"]), double=put("thing", w["id"], liked=1)) for w in s.rows("thing", limit=5)]
    plus = icon("add", bg="accent", radius=28, pad=16, anchor="br", on=go("form"), id="plus", desc=("新建", "New"))
    search = row(field("q", hint=s.t("搜索“商品”", "Search"), on=here(asked=True)), button(s.t("搜索", "Go"), "ask", primary=True, id="ask"), gap=8, pad=8)
    top = column(bar(s.t("集市", "Market"), up=False), search, tabs((s.t("全部", "All"), s.t("关注", "Mine")), r.get("tab", 0), lambda i: here(tab=i)))
    body = stack(scroll("main", arts, chips, knobs, *things, gap=6, flick="refresh"), column(plus, pad=16, anchor="br"),
                 label("9", size=10, bg="danger", radius=8, pad=(4, 1), at=(0.9, 0.1)))
    return page(body, top, bottom_bar((("home", "home", s.t("首页", "Home")), ("list", "list", "")), "home"))


def market_view(s, r):
    if r.page == "home":
        return home_page(s, r)
    if r.page == "list":
        make = lambda w: item(w["name"], icon("star", on=put("thing", w["id"], liked=1), id=f"star_{w['id']}"), on=go("detail", id=w["id"]))  # noqa: E731
        return page(listing("all", s.rows("thing"), make, 52), bar(s.t("列表", "List")))
    if r.page == "menu":
        return sheet(item(s.t("收藏", "Like"), on=(put("thing", r.get("id"), liked=1), back()), id="like"),
                     item(s.t("删除", "Delete"), on=(back(), go("sure", id=r.get("id"))), id="delete"))
    if r.page == "sure":
        yes = button(s.t("删除", "Delete"), (cut("thing", r.get("id")), back(), toast(s.t("已删除", "Deleted"))), id="yes")
        return dialog(s.t("确定？", "Sure?"), s.t("无法恢复。", "No way back."), button(s.t("取消", "No"), back(), id="no"), yes)
    if r.page == "form":
        return page(scroll("form", field("a", "", s.t("名称", "Name")), field("b", "多行\n文字", h=90, lines=0), field("c", "pin", password=True),
                           button("x", "none", enabled=False), label("right", align="right", w=50)), bar("F", button("S", "save", id="save")))
    w = s.row("thing", r.get("id"))
    return page(scroll("detail", image(w["id"], h=400), label("很长的文字。" * 40, lines=3), image(w["id"], kind="map", h=300), label("end")), bar(w["name"]))


def market_act(s, e):
    changes = {"level": [put("level", 1, value=round(100 * e.at[0]))], "refresh": [toast("fresh")], "ask": [toast(e.fields.get("q") or "?")]}
    return changes.get(e.name) or [add("thing", name=e.fields["a"] + e.fields["b"], liked=0), back()]


MARKET = App("market", ("集市", "Market"), market_view, market_act, {"thing": "name TEXT, liked INTEGER", "level": "value INTEGER"},
             first_rows, "shop", "#e11d48")


@pytest.fixture(scope="module")
def suite():
    """A phone with an app that uses every role."""
    built = Suite([NOTES, MARKET], seed=1)
    yield built
    built.close()


@pytest.fixture
def lite(suite):
    device = d.LiteDevice(suite)
    device.restore(suite.initial)
    return device


@pytest.fixture(scope="module")
def page_device(suite):
    """One browser for all tests that do not break it."""
    if d.find_browser() is None:
        pytest.skip("no Chromium and Playwright here")
    with d.WebDevice(suite.fork()) as device:
        yield device


@pytest.fixture
def web(page_device):
    page_device.restore(page_device.suite.initial)
    return page_device


def press(device, name, kind="tap"):
    x1, y1, x2, y2 = device.suite.find(name).bounds
    return device.perform(Action(kind, (x1 + x2) // 2, (y1 + y2) // 2))


def same(a, b):
    """Both devices show the same nodes at the same places in the same state."""
    (rest, bounds), (rest2, bounds2) = d._flat(a.hierarchy()), d._flat(b.hierarchy())
    assert rest == rest2 and np.abs(np.array(bounds) - np.array(bounds2)).max() <= 2
    assert a.suite.digest() == b.suite.digest()


# What both devices promise

def test_the_module_loads_no_picture_browser_or_phone_library():
    code = "import sys, collai.mobilebench.devices; print([m for m in ('PIL', 'playwright', 'uiautomator2', 'adbutils') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_device_keeps_the_very_suite_and_refuses_anything_else(suite, lite):
    assert lite.suite is suite and lite.size == (360, 800)
    for device in (d.LiteDevice, d.WebDevice):
        with pytest.raises(ValueError, match="suite must be a Suite, got 7"):
            device(7)


def test_the_process_adds_nothing_to_the_suite(suite, lite):
    other = suite.fork()
    info = lite.perform(Action("open", app="market"))
    assert other.perform(Action("open", app="market")) and info.changed and info.step == 1 and info.seconds >= 0
    assert lite.hierarchy() == other.hierarchy() and lite.snapshot() == suite.snapshot() and not lite.hierarchy().startswith("<?")
    lite.restore(suite.initial)
    assert suite.digest() == Suite([NOTES, MARKET], seed=1).digest() and lite.observe().step == 0


def test_a_finish_changes_and_counts_nothing(lite):
    before = lite.suite.digest()
    assert lite.perform(Action("finish"))[:2] == (0, False) and lite.suite.digest() == before
    assert lite.perform(Action("answer", text="42"))[:2] == (1, False)


@pytest.mark.parametrize("bad", [Action("tap", 360, 5), Action("swipe", 1, 1, 5, 900), "tap"])
def test_an_action_outside_the_screen_is_refused(lite, bad):
    with pytest.raises(ValueError, match=r"outside the screen of 360 x 800|must be an Action, got 'tap'"):
        lite.perform(bad)


def test_bytes_that_are_no_snapshot_are_refused(lite):
    with pytest.raises(ValueError, match="no snapshot of a phone"):
        lite.restore(b"SQLite? no")


def test_an_observation_stays_what_it_was_and_draws_only_when_read(lite, monkeypatch):
    drawn = []
    monkeypatch.setattr(d, "_render", lambda screen, english, draw=d._render: drawn.append(1) or draw(screen, english))
    seen = lite.observe()
    assert not drawn
    xml, picture = lite.hierarchy(), lite.screenshot()
    lite.perform(Action("open", app="market"))
    assert seen.hierarchy == xml and np.array_equal(Image.open(io.BytesIO(seen.png)), picture) and seen.png is seen.png
    assert len(drawn) == 2 and seen.step == 0 and lite.observe().step == 1
    assert d.Observation(None, "<hierarchy/>").png is None


# Pictures

@pytest.mark.parametrize("name", sorted(k.ICONS))
def test_every_icon_fills_its_box_and_stays_inside(name):
    shapes = d._shapes(d._Figure("icon", name, 0, (), 24, 24, 24, ("#000000",) * 3))
    points = np.array([p for s in shapes for p in s.points])
    half = max(s.width for s in shapes) / 2
    assert points.min() >= half - 0.01 and points.max() <= 24.01 - half
    assert np.ptp(points, axis=0).max() >= 12


def test_no_two_icons_look_alike():
    drawn = {name: d._shapes(d._Figure("icon", name, 0, (), 24, 24, 24, ("#000000",) * 3)) for name in k.ICONS}
    assert set(d._ICONS) == set(k.ICONS) and len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_follows_from_its_number(kind):
    draw = lambda n, w=90, h=60: d._picture.__wrapped__(d._Figure("image", kind, n, (), w, h, 0, ("",) * 3)).tobytes()  # noqa: E731
    assert draw(5) == draw(5) and len({draw(n) for n in range(8)}) == 8 and len(draw(-3, 1, 1)) == 3


def test_a_picture_shows_colours_text_and_what_is_clipped(lite):
    lite.perform(Action("open", app="market"))
    pixels = np.array(lite.screenshot())
    x1, y1, x2, y2 = lite.suite.find("ask").bounds
    assert tuple(pixels[y1 + 5, (x1 + x2) // 2]) == (225, 29, 72) and pixels.shape == (800, 360, 3)
    assert (pixels[y1:y2, x1 + 8:x2 - 8] > 200).all(2).any(), "words on the button"
    old = pixels[:150].copy()
    lite.perform(Action("scroll", direction="down"))
    assert np.array_equal(np.array(lite.screenshot())[24:150], old[24:]), "the bar above a scroller stays"
    assert not np.array_equal(np.array(lite.screenshot()), pixels)


def test_keyboard_dialog_toast_and_dark_theme_are_drawn(lite):
    lite.perform(Action("open", app="market"))
    plain = np.array(lite.screenshot())
    press(lite, "q")
    assert not np.array_equal(np.array(lite.screenshot())[560:], plain[560:])
    lite.restore(lite.suite.initial)
    lite.perform(Action("open", app="settings"))
    press(lite, "dark")
    assert np.array(lite.screenshot()).mean() < 90


def test_round_corners_cut_what_lies_inside(lite):
    lite.perform(Action("open", app="market"))
    lite.perform(Action("scroll", direction="down"))
    press(lite, "thing_2", "long_press")
    x1, y1, _, _ = lite.suite.find("sheet").bounds
    assert lite.screenshot().getpixel((x1, y1 + 9)) != (255, 255, 255) == lite.screenshot().getpixel((x1 + 6, y1 + 9))


@given(st.integers(0, 10_000))
@settings(max_examples=8)
def test_any_screen_of_a_walk_can_be_drawn(seed):
    suite, rng = Suite([NOTES, MARKET]), np.random.default_rng(seed)
    device = d.LiteDevice(suite)
    for _ in range(8):
        device.perform(d.random_action(rng, suite.screen()))
    assert device.screenshot().size == (360, 800)
    suite.close()


def test_without_a_chinese_font_pictures_are_english_and_nothing_else_changes(lite, monkeypatch, caplog):
    lite.perform(Action("open", app="market"))
    chinese = lite.hierarchy()
    d._font_files.cache_clear()
    d._font.cache_clear()
    d._written.cache_clear()
    try:
        monkeypatch.setattr(d, "_CHINESE", ())
        words = []
        monkeypatch.setattr(d, "_written", lambda text, size, bold, draw=d._written: words.append(text) or draw(text, size, bold))
        with caplog.at_level(logging.WARNING):
            lite.screenshot()
            lite.screenshot()
        assert sum("no Chinese font" in r.message for r in caplog.records) == 1
        assert {"Market", "Home", "Go", "Mine"} <= set(words) and not any(map(d._wide, words)) and not any("…" in w for w in words)
        assert lite.hierarchy() == chinese and "集市" in chinese
    finally:
        d._font_files.cache_clear()
        d._font.cache_clear()


def test_a_font_without_chinese_is_found_out():
    files = [f for f in (d._font_files()[0],) if f and d._font_files()[1]]
    assert all(d._has_chinese(f) for f in files)
    latin = [str(p) for p in d.Path("/usr/share/fonts").rglob("DejaVuSans.ttf")]
    assert not any(d._has_chinese(f) for f in latin)


# The browser

def test_a_missing_browser_or_driver_says_what_to_install(suite, monkeypatch):
    with pytest.raises(RuntimeError, match="apt-get install chromium"):
        d.WebDevice(suite, browser="/nowhere/chromium")
    monkeypatch.setenv("COLLAI_CHROMIUM", "/nowhere/else")
    with pytest.raises(RuntimeError, match="no browser at '/nowhere/else': apt-get install chromium"):
        d.WebDevice(suite)
    monkeypatch.delenv("COLLAI_CHROMIUM")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", "/nowhere")
    assert d.find_browser() is None
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(RuntimeError, match=r"pip install playwright==1\.65\.2"):
        d.WebDevice(suite)


@browser
def test_a_program_that_is_no_browser_is_an_infrastructure_error(suite):
    with pytest.raises(d.DeviceLost, match="the browser did not start"):
        d.WebDevice(suite, browser="true")


def test_the_browser_is_looked_for_in_order(monkeypatch, tmp_path):
    pytest.importorskip("playwright")
    for name in ("chromium-browser", "google-chrome", "mine", "asked"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("COLLAI_CHROMIUM", raising=False)
    assert d.find_browser() == str(tmp_path / "chromium-browser")
    monkeypatch.setenv("COLLAI_CHROMIUM", str(tmp_path / "mine"))
    assert d.find_browser() == str(tmp_path / "mine") and d.find_browser("asked") == str(tmp_path / "asked")
    monkeypatch.delenv("COLLAI_CHROMIUM")
    own = tmp_path / "chromium-9999" / "chrome-linux" / "chrome"
    own.parent.mkdir(parents=True)
    own.write_text("")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    assert d.find_browser() == str(own)


@pytest.mark.parametrize("seed", [1, 2])
def test_both_devices_show_the_same_on_random_walks(web, suite, seed):
    found = d.parity(web, d.LiteDevice(suite), walks=2, length=14, seed=seed)
    assert (found.steps, found.screens, found.digests) == (28, 0, 0) and found.pixels <= 2 and found.nodes > 300


def test_every_kind_of_action_gives_the_same_state(web, lite):
    def both(kind, name):
        assert press(web, name, kind).changed == press(lite, name, kind).changed
        same(web, lite)

    def alike(*args, **more):
        a, b = web.perform(Action(*args, **more)), lite.perform(Action(*args, **more))
        assert a[:2] == b[:2]
        same(web, lite)
    alike("open", app="集市")
    both("tap", "q")
    alike("type", text="牛奶 & <b>'\"\r\n\t末")
    both("tap", "ask")
    both("double_tap", "cover_1")
    alike("back")
    alike("swipe", 300, 180, 20.25, 181.5)
    alike("drag", *np.array(lite.suite.find("vol").bounds)[:2].tolist(), 250.4, 500)
    alike("scroll", direction="down")
    alike("scroll", 180, 400, direction="down")
    alike("swipe", 180, 500, 180, 500)
    alike("swipe", 180, 500, 180, 499)
    both("long_press", "thing_3")
    both("tap", "delete")
    both("tap", "yes")
    both("double_tap", "thing_1")
    both("tap", "plus")
    alike("type", 100, 100, text="x")
    for kind in ("enter", "wait", "answer", "home", "finish"):
        alike(kind, text="42" if kind == "answer" else None)
    assert web.suite.rows(web.snapshot(), "market.thing", "id = 3") == []


@pytest.mark.parametrize("text", ["</div><script>phone.remove()</script>", "&#10;&amp;\"'", "a\x00b\x01\x7f\x9f\r\n\t", "\u202eعربى\u2028", "👩‍👩‍👧🇨🇳é́",
                                  "'; DROP TABLE \"market.thing\"; --", "   ", "长" * 3000, "W" * 3000])
def test_odd_texts_are_the_same_in_the_browser(web, lite, text):
    for device in (web, lite):
        device.perform(Action("open", app="market"))
        x1, y1, x2, y2 = device.suite.find("q").bounds
        device.perform(Action("type", (x1 + x2) / 2, (y1 + y2) / 2, text=text))
    assert web.suite.find("q").text == text and web.suite.digest() == lite.suite.digest()
    assert web.hierarchy() == lite.hierarchy() and web.screenshot().size == lite.screenshot().size


def test_the_hierarchy_comes_from_the_live_page(web):
    web.perform(Action("open", app="market"))
    move = "() => { document.querySelector('[data-a*=\"id/ask\"]').style.left = '7px'; return dump() }"
    moved = web._thread.call(lambda: web._page.evaluate(move), 60)
    node = next(n for n in ET.fromstring(moved).iter("node") if n.get("resource-id").endswith(":id/ask"))  # noqa: S314
    assert node.get("bounds").startswith("[7,") and node.get("text") == "搜索"


def test_noise_from_outside_is_seen_and_old_pictures_are_refused(web, lite):
    seen = web.observe()
    assert Image.open(io.BytesIO(seen.png)).size == (360, 800)
    late = web.observe()
    for device in (web, lite):
        device.suite.disturb("popup", 1)
    same(web, lite)
    with pytest.raises(RuntimeError, match="has changed since this observation"):
        _ = late.png
    assert press(web, "popup_close").changed and press(lite, "popup_close").changed
    same(web, lite)


def test_a_picture_of_the_browser_is_like_the_drawn_one(web, lite):
    if not d._font_files()[1]:
        pytest.skip("fonts differ where there is no Chinese one")
    for device in (web, lite):
        device.perform(Action("open", app="market"))
    a, b = (np.array(device.screenshot()).astype(int) for device in (web, lite))
    assert a.shape == b.shape and np.abs(a - b).mean() < 6
    x1, y1, x2, y2 = lite.suite.find("cover_1").bounds
    assert np.abs(a - b)[y1:y2, x1:x2].mean() < 4


def test_a_reset_makes_a_new_epoch_and_the_old_page_is_refused(web):
    old = web._epoch
    web.perform(Action("open", app="market"))
    web.restore(web.suite.initial)
    assert web._epoch == old + 1 and web.observe().step == 0 and web.suite.digest() == Suite([NOTES, MARKET], seed=1).digest()
    assert web._answer("/act", {"epoch": old, "kind": "home"}) == (409, "")


def test_a_finger_of_someone_else_acts_too(web, lite):
    touch = lambda: web._page.touchscreen.tap(45, 200)  # noqa: E731
    assert web._answer("/act", {"epoch": web._epoch, "kind": "swipe", "x": 180, "y": 5.5, "x2": 180, "y2": 900})[0] == 200
    lite.perform(Action("swipe", 180, 5, 180, 799))
    same(web, lite)
    web.restore(web.suite.initial)
    web._thread.call(touch, 60)
    web._count += 1
    web._thread.call(lambda: web._page.evaluate("n => settle(n)", web._count), 60)
    lite.restore(lite.suite.initial)
    lite.perform(Action("tap", 45, 200))
    same(web, lite)


def test_a_touch_that_went_astray_is_no_action(web):
    web._pending = Action("tap", 10, 10)
    with pytest.raises(d.DeviceLost, match="the page felt"):
        web._intended({"kind": "tap", "x": 10, "y": 12.5})
    assert web._intended({"kind": "tap", "x": 10, "y": 12.5}) == Action("tap", 10, 12)


def test_the_server_speaks_to_its_page_alone(web):
    address = f"http://127.0.0.1:{web._server.server_port}"
    with urllib.request.urlopen(f"{address}/?x") as answer:  # noqa: S310
        assert b'id="phone"' in answer.read()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/etc/passwd")  # noqa: S310


def test_it_works_inside_a_running_event_loop(web):
    async def inside():
        return web.perform(Action("open", app="market")).changed
    assert asyncio.run(inside())


@browser
def test_a_fault_of_an_app_is_no_fault_of_the_browser():
    def view(s, r):
        if r.page != "home":
            raise KeyError("broken")
        return page(column(button("x", go("other"), id="x"), button("y", "y", id="y")))
    with d.WebDevice(Suite([App("bad", ("坏", "Bad"), view, lambda s, e: [] if e.arg else 1 / 0)])) as device:
        device.perform(Action("open", app="bad"))
        with pytest.raises(ZeroDivisionError):
            press(device, "y")
        with pytest.raises(KeyError, match="broken"):
            press(device, "x")


@browser
def test_a_killed_browser_is_said_and_the_next_restore_starts_another(suite):
    with d.WebDevice(suite.fork()) as device:
        device.perform(Action("open", app="market"))
        old = device.pid
        os.kill(old, signal.SIGKILL)
        with pytest.raises(d.DeviceLost, match="the browser is gone"):
            for _ in range(50):
                device.perform(Action("tap", 180, 400))
        device.restore(device.suite.initial)
        assert device.pid != old and device.perform(Action("open", app="market")).changed
        same(device, d.LiteDevice(device.suite))
    with pytest.raises(d.DeviceLost, match="closed"):
        device.perform(Action("home"))
    with pytest.raises(d.DeviceLost, match="closed"):
        device.restore(device.suite.initial)
    device.close()


@browser
def test_a_browser_that_hangs_is_given_up_and_closed(suite, monkeypatch):
    device = d.WebDevice(suite.fork())
    os.kill(device.pid, signal.SIGSTOP)
    monkeypatch.setattr(d, "_PATIENCE", 0.5)
    monkeypatch.setattr(d, "_PARTING", 5.0)
    with pytest.raises(d.DeviceLost, match=r"did not answer within 0\.5 s"):
        device.perform(Action("tap", 180, 400))
    pid = device.pid
    device.close()
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    assert device.pid is None and device._thread is None


# A real phone, as far as a fake transport can tell: its dumps are written by hand in a phone's format, nothing here ran on a phone

PAGES = {
    "home": '<node index="0" text="" resource-id="" class="android.widget.FrameLayout" package="com.android.launcher" content-desc="" '
            'checkable="false" checked="false" clickable="false" selected="false" bounds="[0,0][1080,2340]" />',
    "app": '<node index="0" text="无线网络" resource-id="org.example:id/wifi" class="android.widget.TextView" package="org.example" '
           'content-desc="" checkable="false" checked="false" clickable="true" selected="false" bounds="[0,210][1080,378]" />',
    "wifi": '<node index="0" text="已开启" resource-id="org.example:id/state" class="android.widget.Switch" package="org.example" '
            'content-desc="" checkable="true" checked="true" clickable="true" selected="false" bounds="[0,210][1080,378]" />'}


@pytest.fixture
def phone():
    """An object of adbutils that answers with dumps written by hand: uiautomator2's own client runs above it."""
    adbutils = pytest.importorskip("adbutils")
    uiautomator2 = pytest.importorskip("uiautomator2")

    class StandIn(adbutils.AdbDevice):
        def __init__(self):
            super().__init__(adbutils.adb, serial="stand-in")
            self.page, self.calls, self.rooted, self.broken, self.files = "home", [], True, False, {}
            jar = d.Path(uiautomator2.__file__).parent / "assets" / "u2.jar"
            self.digest = hashlib.md5(jar.read_bytes()).hexdigest()  # noqa: S324

        def window_size(self, landscape=None):
            return 1080, 2340

        def app_current(self):
            return adbutils.RunningAppInfo("org.example", ".Main", 7)

        def shell(self, cmdargs, stream=False, **_):
            return self.digest if "md5sum" in cmdargs else self.shell2(cmdargs).output

        def shell2(self, cmdargs, **_):
            line = cmdargs if isinstance(cmdargs, str) else " ".join(cmdargs)
            self.calls.append(line)
            if line.startswith(("am start", "monkey")):
                self.page = "app"
            output = {"pm list packages": "package:org.example\npackage:org.other", "ps": "u0 1 org.example"}.get(line.split(";")[0], "")
            if "tar -C" in line and self.rooted:
                output = base64.b64encode(b"files".ljust(2048)).decode()
            if line.startswith("ime list"):
                output = "com.github.uiautomator/.AdbKeyboard:\n"
            return SimpleNamespace(output=output, returncode=int(line.startswith("su") and not self.rooted))

        def create_connection(self, network, address):
            if self.broken:
                raise adbutils.AdbError("device offline")
            near, far = socket.socketpair()
            threading.Thread(target=self.serve, args=(far,), daemon=True).start()
            return near

        def serve(self, far):
            with far, far.makefile("rb") as lines:
                head = [lines.readline().decode()]
                while head[-1].strip():
                    head.append(lines.readline().decode())
                size = next((int(h.split(":")[1]) for h in head if h.lower().startswith("content-length")), 0)
                answer = self.answer(json.loads(lines.read(size))) if size else b"pong"
                far.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

        def answer(self, call):
            name, params = call["method"], call["params"]
            self.calls.append((name, *params))
            if name == "click" and self.page == "app":
                self.page = "wifi"
            if name == "pressKey":
                self.page = {"home": "home", "back": "app"}.get(params[0], self.page)
            dump = f"<?xml version='1.0' encoding='UTF-8' standalone='yes' ?>\r\n<hierarchy rotation=\"1\">{PAGES[self.page]}</hierarchy>"
            shot = io.BytesIO()
            Image.new("RGB", (1080, 2340), "#336699").save(shot, "JPEG")
            results = {"dumpWindowHierarchy": dump, "takeScreenshot": base64.b64encode(shot.getvalue()).decode(), "getClipboard": self.text(params)}
            return json.dumps({"jsonrpc": "2.0", "id": 1, "result": results.get(name, True)}).encode()

        def text(self, params):
            return next((c[2] for c in reversed(self.calls) if c[0] == "setClipboard"), None)

        @property
        def sync(self):
            return SimpleNamespace(push=lambda src, dst, **_: self.files.update({dst: src.read()}))
    return StandIn()


def test_a_stand_in_for_a_phone_is_driven_through_uiautomator2(phone):
    device = d.AdbDevice(phone)
    assert device.suite is None and device.size == (1080, 2340) and device.hierarchy().startswith("<hierarchy")
    device.start("org.example/.Main")
    assert "am start -n org.example/.Main" in phone.calls and "am force-stop org.example" in phone.calls and phone.page == "app"
    info = device.perform(Action("tap", 540.5, 300))
    assert info[:2] == (1, True) and ("click", 540, 300) in phone.calls and 'checked="true"' in device.hierarchy()
    assert device.perform(Action("long_press", 0.4, 300))[:2] == (2, False) and ("click", 0, 300, 500) in phone.calls
    device.perform(Action("double_tap", 9, 9))
    assert [c[0] for c in phone.calls if "njectInput" in c[0]] == ["injectInputEvent"] * 2
    device.perform(Action("scroll", direction="down"))
    device.perform(Action("drag", 1, 2, 3, 4))
    assert ("swipe", 540, 1170, 540, 468, 100) in phone.calls and ("drag", 1, 2, 3, 4, 100) in phone.calls
    assert device.perform(Action("back")).changed and ("pressKey", "back") in phone.calls
    device.perform(Action("open", app="org.other"))
    assert "monkey -p org.other -c android.intent.category.LAUNCHER 1" in phone.calls
    assert device.perform(Action("finish"))[:2] == (7, False)
    seen = device.observe()
    assert Image.open(io.BytesIO(seen.png)).size == (1080, 2340) == seen.size and seen.step == 7
    with pytest.raises(ValueError, match="outside the screen of 1080 x 2340"):
        device.perform(Action("tap", 1080, 3))
    with pytest.raises(ValueError, match="must be an Action, got None"):
        device.perform(None)
    device.close()


def test_text_clears_the_field_and_ends_with_enter(phone, monkeypatch):
    device, typed = d.AdbDevice(phone), []
    monkeypatch.setattr(type(device._phone), "send_keys", lambda self, text, clear: typed.append((text, clear)))
    device.perform(Action("type", 5, 6, text="牛奶"))
    assert typed == [("牛奶", True)] and phone.calls.index(("click", 5, 6)) < phone.calls.index(("pressKey", "enter"))
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    device.perform(Action("wait"))
    assert slept == [5]


def test_a_phone_is_reset_by_instruction_until_the_rule_holds(phone):
    device, plan = d.AdbDevice(phone), [Action("open", app="org.example/.Main"), Action("tap", 540, 300), Action("finish")]
    agent = SimpleNamespace(act=lambda seen, goal: plan.pop(0), reset=None)
    rule = parse_rule("""{"xpath": ['''//node[@text="已开启" and @checked="true"]''']}""")
    assert device.reset(agent, "打开无线网络", rule) and len(plan) == 1
    plan[:] = [Action("home"), Action("finish")]
    other = parse_rule("""{"xpath": ['''//node[@text="关闭"]''']}""")
    assert not device.reset(agent, "关", other) and not plan
    plan[:] = [Action("back")] * 9
    assert not device.reset(agent, "关", other, max_steps=3) and len(plan) == 6


def test_data_of_an_app_are_kept_and_put_back_where_the_phone_allows(phone):
    device = d.AdbDevice(phone)
    kept = device.snapshot()
    assert kept == b"COLLAIADB1\norg.example\n" + b"files".ljust(2048)
    device.restore(kept)
    assert phone.files["/data/local/tmp/collai.tar"] == b"files".ljust(2048) and phone.page == "app"
    assert phone.calls.index("am force-stop org.example") < next(i for i, c in enumerate(phone.calls) if "tar -xf" in c)
    for wrong in (b"something", None, kept.replace(b"org.example", b"org.example; reboot"), kept[:15]):
        with pytest.raises(ValueError, match="no snapshot of an app's data; it starts with"):
            device.restore(wrong)
    assert not any("reboot" in str(call) for call in phone.calls)
    phone.rooted = False
    with pytest.raises(RuntimeError, match="no root"):
        device.snapshot()
    with pytest.raises(RuntimeError, match="does not take back"):
        device.restore(kept)


def test_a_phone_that_is_gone_is_an_infrastructure_error(phone, monkeypatch):
    device = d.AdbDevice(phone)
    monkeypatch.setattr(device._phone, "jsonrpc_call", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("device offline")))
    with pytest.raises(d.DeviceLost, match="device offline"):
        device.hierarchy()


def test_a_missing_phone_or_driver_says_what_to_install(monkeypatch):
    uiautomator2 = pytest.importorskip("uiautomator2")
    monkeypatch.setattr(uiautomator2, "connect", lambda serial: (_ for _ in ()).throw(ConnectionError("not online")))
    with pytest.raises(RuntimeError, match=r"no phone 'usb1' \(not online\): pip install uiautomator2==3\.7\.1 adbutils==2\.12\.0") as caught:
        d.AdbDevice("usb1")
    assert not isinstance(caught.value, d.DeviceLost)
    with pytest.raises(ValueError, match="serial must be a string or an adbutils.AdbDevice, got 3"):
        d.AdbDevice(3)
    monkeypatch.setitem(sys.modules, "uiautomator2", None)
    with pytest.raises(RuntimeError, match=r"AdbDevice needs uiautomator2: pip install uiautomator2==3\.7\.1"):
        d.AdbDevice("x")


def test_a_screen_that_keeps_moving_is_waited_for(phone, monkeypatch):
    device, dumps = d.AdbDevice(phone), iter(["a", "b", "c", "c", "d"])
    monkeypatch.setattr(device._phone, "dump_hierarchy", lambda: next(dumps))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert d._adb_settle(device) == "c" and next(dumps) == "d"
