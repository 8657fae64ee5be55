"""Review queue: rules, states and agreement against plain models; kills and torn files; the page in a real browser."""
import http.client
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from io import BytesIO
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from collai.viabench.families import FAMILIES
from collai.viabench.generator import digest, quad
from collai.viabench.review import DECISIONS, STATES, ReviewQueue, auto_review, perceptual_hash

some = settings(max_examples=30, deadline=None)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


def made(name, seed=0, size=128):
    """The items of one quad, as a benchmark holds them."""
    family = FAMILIES[name]
    return [SimpleNamespace(id=f"{name}-{seed}-{i}", hash=digest(s.image)[:16], quad=f"{name}-{seed}", image=s.image, masks=s.masks,
                            family=name, category=s.category, strength=s.strength, delta=s.delta, seed=seed, size=size,
                            question=s.question, options=s.options, answer=s.answer, illusion_answer=s.illusion_answer, truth=s.truth)
            for i, s in enumerate(quad(family, family.delta_grid[-1], seed=seed, size=size))]


ITEMS = made("mueller_lyer") + made("ebbinghaus")


def changed(item, **fields):
    """A copy of an item with other fields."""
    return SimpleNamespace(**(vars(item) | fields))


class Agrees:
    """An oracle that always finds the key right, to save time."""

    def answer(self, item, prompt, options):
        return SimpleNamespace(letter=item.answer)


def filled(path, items=ITEMS):
    """A queue with items."""
    queue = ReviewQueue(path)
    queue.add(items, Agrees())
    return queue


# the automatic reviewers

@some
@given(st.integers(0, 10_000), st.sampled_from([17, 64, 100, 256]))
def test_the_hash_ignores_brightness_and_sees_mirrors(seed, size):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 200, (6, 6)).repeat(-(-size // 6), 0).repeat(-(-size // 6), 1)[:size, :size]
    image = np.repeat(coarse[..., None], 3, 2).astype(np.uint8)
    code = perceptual_hash(image)
    assert code.shape == (512,) and code.dtype == bool
    assert (code != perceptual_hash(image + np.uint8(40))).sum() <= 6
    assert (code != perceptual_hash(image[:, ::-1].copy())).sum() > 20


def test_a_flat_picture_has_no_bits_and_a_ramp_has_half():
    assert not perceptual_hash(np.full((64, 64, 3), 90, np.uint8)).any()
    ramp = np.broadcast_to(np.linspace(0, 255, 170).astype(np.uint8)[None, :, None], (170, 170, 3)).copy()
    assert perceptual_hash(ramp)[:256].all() and not perceptual_hash(ramp)[256:].any()
    with pytest.raises(ValueError, match="at least 17 px each way, got 30 by 16"):
        perceptual_hash(np.zeros((16, 30, 3), np.uint8))


def test_good_items_have_no_flag():
    assert auto_review(ITEMS) == {item.id: {} for item in ITEMS}


def test_a_wrong_key_is_found_by_the_oracle():
    other = next(letter for letter in "AB" if letter != ITEMS[0].answer)
    flags = auto_review([changed(ITEMS[0], answer=other), *ITEMS[1:6]])
    assert flags[ITEMS[0].id]["auto:oracle"] == f"the oracle reads {ITEMS[0].answer} from the pixels, the key says {other}"
    assert not any("auto:oracle" in flags[item.id] for item in ITEMS[1:6])


def test_a_text_that_gives_the_answer_away_is_found():
    lone = [item for item in ITEMS[:6] if item.answer == ITEMS[0].answer]
    text = ITEMS[0].options["ABC".index(ITEMS[0].answer)]
    assert auto_review(lone)[lone[0].id] == {
        "auto:blind": f"{text!r} is right on 100% of the items with this text, chance 33%"}
    slight = ITEMS[:6] * 30 + lone[:1]  # 61 of 181: 33.7 %, within three points of chance
    assert not any("auto:blind" in reasons for reasons in auto_review(slight, Agrees()).values())


def test_the_order_of_the_options_hides_nothing_from_the_blind_reviewer():
    lone = [changed(ITEMS[0], id=str(k), quad=str(k), options=[*np.roll(ITEMS[0].options[:3], k).tolist(), "Not Sure"],
                    answer="ABC"[("ABC".index(ITEMS[0].answer) + k) % 3]) for k in range(3)]
    assert all("auto:blind" in reasons for reasons in auto_review(lone, Agrees()).values())
    fair = [changed(item, answer="A") for item in lone]  # another text right each time
    assert not any("auto:blind" in reasons for reasons in auto_review(fair, Agrees()).values())


def test_near_duplicates_of_another_quad_are_found():
    twin = changed(ITEMS[1], id="twin", quad="other")
    spot = ITEMS[1].image.copy()
    spot[3:5, 3:5] ^= 3
    near = changed(ITEMS[1], id="near", quad="third", image=spot)
    flags = auto_review([*ITEMS, twin, near], Agrees())
    assert flags["twin"]["auto:duplicate"] == flags["near"]["auto:duplicate"] == f"almost the picture of {ITEMS[1].id}"
    tinted = changed(ITEMS[1], id="tinted", quad="other", image=ITEMS[1].image // np.uint8(2))
    same_quad, other_key = changed(ITEMS[1], id="same"), changed(ITEMS[1], id="key", quad="other", answer="D")
    for item in (tinted, same_quad, other_key):
        assert "auto:duplicate" not in auto_review([*ITEMS, item], Agrees())[item.id]


def test_an_ambiguous_difference_is_found():
    least = FAMILIES["mueller_lyer"].delta_min
    for delta, flagged in ((least / 2, True), (-least / 2, True), (0.0, False), (least, False)):
        flags = auto_review([changed(ITEMS[0], delta=delta), *ITEMS[1:6]], Agrees())
        assert ("auto:ambiguous" in flags[ITEMS[0].id]) == flagged


def test_pictures_from_elsewhere_have_no_key_to_check():
    foreign = SimpleNamespace(id="17", hash="x", quad="17", image=np.zeros((40, 70, 3), np.uint8), masks={}, family="", category="",
                              strength=None, delta=None, question="Is it moving?", options=["Yes", "No", "Not Sure"], answer=None)
    assert auto_review([foreign]) == {"17": {"auto:oracle": "no key to check"}}


def test_foreign_pictures_can_be_queued(tmp_path):
    foreign = SimpleNamespace(id="17", hash="x", quad="17", image=np.zeros((40, 70, 3), np.uint8), masks={}, family="", category="",
                              strength=None, delta=None, question="Is it moving?", options=["Yes", "No", "Not Sure"], answer=None)
    queue = ReviewQueue(tmp_path / "q", [foreign])
    assert queue.next("ann").answer is None and queue.decide("17", "reject", "ann") == "auto-checked"


# states, against a plain model

def model_of(steps):
    """State and verdict after decisions (person, decision, text), from the words of the specification."""
    last = {}
    for person, decision, text in steps:
        last[person] = (decision, text if decision == "fix" else "")
    said = list(last.values())
    state = "auto-checked" if len(said) < 2 else "reviewed" if len(said) == 2 else "adjudicated"
    verdict = None if len(said) < 2 or (len(said) == 2 and said[0] != said[1]) else said[-1]
    return state, verdict


@some
@given(st.lists(st.tuples(st.sampled_from(["ann", "bob", "cy"]), st.sampled_from(DECISIONS), st.sampled_from(["one", "two"])), max_size=7))
def test_states_follow_from_the_decisions(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("queue") / "q.jsonl"
    queue, item = filled(path, ITEMS[:2]), ITEMS[0].id
    for k, (person, decision, text) in enumerate(steps):
        assert queue.decide(item, decision, person, text) == model_of(steps[:k + 1])[0]
    for reader in (queue, ReviewQueue(path)):
        assert (reader.entry(item).state, reader.entry(item).verdict) == model_of(steps)
        assert reader.entry(ITEMS[1].id).state == "auto-checked", "nothing is decided that nobody decided"
        offered = reader.next("ann", skip=[ITEMS[1].id])
        assert (offered is None) == (any(s[0] == "ann" for s in steps) or model_of(steps)[1] is not None)


def test_items_stay_pending_without_people(tmp_path):
    queue = filled(tmp_path / "q.jsonl")
    table = queue.summary()
    assert table.loc["all", "pending"] == table.loc["all", "auto-checked"] == len(ITEMS)
    assert table.loc["all", ["reviewed", "adjudicated", *DECISIONS, "flagged"]].sum() == 0
    found = queue.agreement()
    assert found["items"] == 0 and math.isnan(found["fleiss"]) and found["cohen"] == {}
    for name in ("auto:oracle", "auto:me", "", "  "):
        with pytest.raises(ValueError, match="reviewer must be a person's name"):
            queue.decide(ITEMS[0].id, "accept", name)
        with pytest.raises(ValueError, match="reviewer must be a person's name"):
            queue.next(name)


def test_disagreements_come_first_then_flags_then_the_order(tmp_path):
    bad = changed(ITEMS[3], delta=FAMILIES["mueller_lyer"].delta_min / 2)
    queue = filled(tmp_path / "q.jsonl", [*ITEMS[:3], bad, *ITEMS[4:]])
    assert queue.next("ann").id == bad.id and queue.next("ann", skip=[bad.id]).id == ITEMS[0].id
    queue.decide(ITEMS[4].id, "accept", "ann")
    assert queue.next("bob").id == ITEMS[4].id and queue.next("ann").id == bad.id
    queue.decide(ITEMS[4].id, "reject", "bob")
    assert queue.next("cy").id == ITEMS[4].id and queue.next("bob").id == bad.id
    queue.decide(ITEMS[4].id, "accept", "cy")
    assert queue.next("dan").id == bad.id
    for item in [*ITEMS[:3], bad, *ITEMS[5:]]:
        for person in ("ann", "bob"):
            queue.decide(item.id, "accept", person)
    assert queue.next("ann") is None is queue.next("dan")
    table = queue.summary()
    assert table.loc["all", ["auto-checked", "reviewed", "adjudicated", "pending", "flagged"]].tolist() == [0, len(ITEMS) - 1, 1, 0, 1]


def test_an_item_that_is_made_anew_is_pending_again(tmp_path):
    queue = filled(tmp_path / "q.jsonl")
    for person in ("ann", "bob"):
        queue.decide(ITEMS[0].id, "accept", person)
    assert queue.add(ITEMS, Agrees()) == 0 and queue.entry(ITEMS[0].id).state == "reviewed"
    anew = changed(ITEMS[0], hash="anew", question="Which one?")
    assert queue.add([anew, *ITEMS[1:]], Agrees()) == 1
    for reader in (queue, ReviewQueue(queue.path)):
        entry = reader.entry(ITEMS[0].id)
        assert (entry.state, entry.decisions, entry.question) == ("auto-checked", {}, "Which one?")
    with pytest.raises(ValueError, match="changed meanwhile"):
        queue.decide(ITEMS[0].id, "accept", "ann", hash=ITEMS[0].hash)
    late = {"event": "decision", "item": ITEMS[0].id, "hash": ITEMS[0].hash, "reviewer": "cy", "decision": "accept", "note": "", "time": ""}
    with queue.path.open("a") as file:  # by a process that had not read the new item yet
        file.write(json.dumps(late) + "\n")
    assert queue.entry(ITEMS[0].id).decisions == ReviewQueue(queue.path).entry(ITEMS[0].id).decisions == {}


@pytest.mark.parametrize(("arguments", "kind", "text"), [
    (("nothing", "accept", "ann"), KeyError, "no item 'nothing' in .*, it holds 12"),
    ((ITEMS[0].id, "Accept", "ann"), ValueError, "decision must be accept, reject or fix, got 'Accept'"),
    ((ITEMS[0].id, "fix", "ann"), ValueError, "a fix needs its text, got ''"),
    ((ITEMS[0].id, "fix", "ann", " \n"), ValueError, "a fix needs its text")])
def test_bad_decisions_are_named_and_leave_no_trace(tmp_path, arguments, kind, text):
    queue = filled(tmp_path / "q.jsonl")
    before = queue.path.read_bytes()
    with pytest.raises(kind, match=text):
        queue.decide(*arguments)
    assert queue.path.read_bytes() == before


def test_an_item_whose_checks_were_lost_is_shown_to_nobody(tmp_path):
    queue = filled(tmp_path / "q.jsonl", ITEMS[:1])
    first = queue.path.read_bytes().split(b"\n")[0] + b"\n"
    (tmp_path / "half").write_bytes(first)
    half = ReviewQueue(tmp_path / "half")
    assert half.entry(ITEMS[0].id).state == "new" and half.next("ann") is None
    with pytest.raises(ValueError, match="has not been checked yet"):
        half.decide(ITEMS[0].id, "accept", "ann")
    assert half.add(ITEMS[:1], Agrees()) == 1 and half.next("ann").id == ITEMS[0].id


# agreement

@some
@given(st.lists(st.tuples(st.sampled_from(DECISIONS), st.sampled_from(DECISIONS)), min_size=1, max_size=12))
def test_agreement_is_that_of_the_first_two(tmp_path_factory, votes):
    queue = filled(tmp_path_factory.mktemp("queue") / "q.jsonl")
    for item, pair in zip(ITEMS, votes, strict=False):
        for person, decision in zip(("ann", "bob"), pair, strict=True):
            queue.decide(item.id, decision, person, "text")
    queue.decide(ITEMS[0].id, "reject", "cy")  # an adjudicator is no rater
    found, (a, b) = queue.agreement(), zip(*votes, strict=True)
    counts = np.array([[pair.count(d) for d in DECISIONS] for pair in votes])
    p_e, p_o = ((counts.sum(0) / counts.sum()) ** 2).sum(), (counts * (counts - 1)).sum() / (2 * len(votes))
    assert found["items"] == len(votes)
    assert found["fleiss"] == pytest.approx(1.0 if p_e == 1 else (p_o - p_e) / (1 - p_e))
    peer = 1.0 if len({*a, *b}) == 1 else cohen_kappa_score(a, b)
    assert found["cohen"] == {("ann", "bob"): pytest.approx(peer)}
    assert sum(n for n, _ in found["by_category"].values()) == len(votes)


def test_pairs_of_names_have_their_own_kappa(tmp_path):
    queue = filled(tmp_path / "q.jsonl")
    for k, item in enumerate(ITEMS[:8]):
        queue.decide(item.id, "accept", "ann")
        queue.decide(item.id, "reject" if k % 2 else "accept", "bob" if k < 4 else "cy")
    assert set(queue.agreement()["cohen"]) == {("ann", "bob"), ("ann", "cy")}
    assert queue.agreement()["cohen"]["ann", "cy"] == pytest.approx(0)


# the file

def test_a_file_cut_anywhere_keeps_all_whole_events_and_takes_new_ones(tmp_path):
    queue = filled(tmp_path / "q.jsonl", ITEMS[:1])
    whole = len(queue.path.read_bytes())
    queue.decide(ITEMS[0].id, "accept", "ann", "naïve } {")
    data = queue.path.read_bytes()
    for cut in range(whole, len(data) + 1, 7):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(data[:cut])
        reader = ReviewQueue(path)
        assert reader.entry(ITEMS[0].id).decisions == ({"ann": ("accept", "naïve } {")} if cut == len(data) else {})
        reader.decide(ITEMS[0].id, "reject", "bob")
        known = set(ReviewQueue(path).entry(ITEMS[0].id).decisions)
        assert known == ({"ann", "bob"} if cut >= len(data) - 1 else {"bob"})
    path = tmp_path / "no-break"
    path.write_bytes(data[:-1])
    ReviewQueue(path).decide(ITEMS[0].id, "reject", "bob")
    assert set(ReviewQueue(path).entry(ITEMS[0].id).decisions) == {"ann", "bob"}


def test_the_file_only_grows(tmp_path):
    queue = filled(tmp_path / "q.jsonl")
    before = queue.path.read_bytes()
    queue.decide(ITEMS[0].id, "accept", "ann")
    queue.decide(ITEMS[0].id, "fix", "ann", "better")
    after = queue.path.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 2
    event = json.loads(after.split(b"\n")[-2])
    assert event.pop("time").endswith("+00:00")
    assert event == {"event": "decision", "item": ITEMS[0].id, "hash": ITEMS[0].hash, "reviewer": "ann", "decision": "fix", "note": "better"}
    queue.path.write_bytes(before[:100])
    with pytest.raises(ValueError, match="became shorter: a review queue only grows"):
        queue.entries()


@pytest.mark.parametrize("line", [b"5\n", b"[1]\n", b'{"event": "party"}\n', b'{"a": 1}\n'])
def test_a_file_with_something_else_is_refused(tmp_path, line):
    (tmp_path / "other").write_bytes(line)
    with pytest.raises(ValueError, match="is no review queue: it holds"):
        ReviewQueue(tmp_path / "other")


def test_two_queues_on_one_file_see_each_other(tmp_path):
    one = filled(tmp_path / "deep" / "q.jsonl")
    two = ReviewQueue(one.path)
    one.decide(ITEMS[0].id, "accept", "ann")
    assert two.decide(ITEMS[0].id, "reject", "bob") == "reviewed"
    assert one.entry(ITEMS[0].id).decisions == {"ann": ("accept", ""), "bob": ("reject", "")}


def test_threads_write_whole_lines(tmp_path):
    queue = filled(tmp_path / "q.jsonl", ITEMS[:4])
    others = [ReviewQueue(queue.path), queue, queue]

    def work(k, mine):
        for n in range(10):
            mine.decide(ITEMS[n % 4].id, "accept", f"p{k}", f"{k}-{n} " + "x" * 500)
    threads = [threading.Thread(target=work, args=(k, mine)) for k, mine in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line) for line in queue.path.read_bytes().splitlines()]
    assert Counter(e["note"].split()[0] for e in events if e["event"] == "decision") == {f"{k}-{n}": 1 for k in range(3) for n in range(10)}
    assert all(queue.entry(item.id).state == "adjudicated" for item in ITEMS[:4])


WRITER = """
import sys
from collai.viabench.review import ReviewQueue
queue, ids = ReviewQueue(sys.argv[1]), sys.argv[3:]
for k in range(100_000):
    queue.decide(ids[k % len(ids)], "accept", "p" + sys.argv[2], note=f"{sys.argv[2]}-{k}-" + "x" * 300)
    print(f"{sys.argv[2]}-{k}-", flush=True)
"""


def test_killed_writers_lose_and_double_nothing(tmp_path):
    queue, reported, rng = filled(tmp_path / "q.jsonl", ITEMS[:4]), [], np.random.default_rng(5)
    for round_ in range(3):
        command = [sys.executable, "-c", WRITER, str(queue.path)]
        pair = [subprocess.Popen([*command, f"{round_}{side}", *(item.id for item in ITEMS[:4])], stdout=subprocess.PIPE, text=True)
                for side in "xy"]
        for process in pair:
            reported += [process.stdout.readline().strip() for _ in range(int(rng.integers(1, 25)))]
            process.send_signal(signal.SIGKILL)
            reported += [line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
            assert process.wait() == -signal.SIGKILL
            process.stdout.close()
    found = Counter()
    for line in queue.path.read_bytes().split(b"\n")[:-1]:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "decision":
            assert event["note"].endswith("x" * 300)
            found[event["note"].rstrip("x")] += 1
    assert len(reported) >= 6 and set(reported) <= set(found) and set(found.values()) == {1}
    assert len(set(found) - set(reported)) <= 6
    assert queue.decide(ITEMS[0].id, "accept", "after") == "adjudicated"


# the page

@pytest.fixture
def page_of(tmp_path):
    """A served queue and a way to ask it."""
    flagged = changed(ITEMS[0], delta=FAMILIES["mueller_lyer"].delta_min / 2, question="Is <b>this</b> & that equal?")
    queue = filled(tmp_path / "q.jsonl", [flagged, *ITEMS[1:6]])
    with queue.serve() as server:
        place = urlsplit(server.url)

        def ask(path, body=None, method=None, **headers):
            line = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
            line.request(method or ("GET" if body is None else "POST"), path, body, headers)
            reply = line.getresponse()
            found = reply.status, reply.getheader("Content-Type"), reply.read()
            line.close()
            return found
        yield queue, server, ask


def decision(**fields):
    """A decision's body."""
    return json.dumps({"id": ITEMS[1].id, "hash": ITEMS[1].hash, "decision": "accept", "reviewer": "ann", "note": ""} | fields).encode()


JSON = {"Content-Type": "application/json"}


def test_the_page_is_served_whole(page_of):
    _, server, ask = page_of
    assert server.url.startswith("http://127.0.0.1:")
    assert ask("/")[:2] == (200, "text/html; charset=utf-8") and ask("/script.js")[1].startswith("text/javascript")
    status, kind, body = ask(f"/picture?id={quote(ITEMS[1].id)}")
    assert status == 200 and kind.startswith("image/png")
    assert np.array_equal(np.asarray(Image.open(BytesIO(body))), ITEMS[1].image)
    layer = np.asarray(Image.open(BytesIO(ask(f"/overlay?id={ITEMS[1].id}")[2])))
    assert np.array_equal(layer[..., 3] == 200, ITEMS[1].masks["a"] | ITEMS[1].masks["b"])


def test_the_key_and_others_decisions_are_not_sent_unasked(page_of):
    queue, _, ask = page_of
    queue.decide(ITEMS[1].id, "reject", "bob", "secret")
    for path in ("/next?reviewer=ann", f"/item?id={ITEMS[1].id}"):
        shown = json.loads(ask(path)[2])
        assert set(shown["item"]) == {"id", "hash", "question", "options", "flags"} and "secret" not in str(shown)
    assert json.loads(ask(f"/truth?id={ITEMS[1].id}")[2])["answer"] == ITEMS[1].answer


def test_a_decision_arrives(page_of):
    queue, _, ask = page_of
    status, _, body = ask("/decide", decision(decision="fix", note="Wörter"), **JSON)
    assert (status, json.loads(body)) == (200, {"state": "auto-checked"})
    assert queue.entry(ITEMS[1].id).decisions == {"ann": ("fix", "Wörter")}


@pytest.mark.parametrize(("path", "body", "headers", "status", "text"), [
    ("/none", None, {}, 404, "no page /none"), ("/picture?id=x", None, {}, 404, "no item 'x'"), ("/picture", None, {}, 404, "no item ''"),
    ("/", None, {"Host": "evil.test"}, 403, "is not this machine"), ("/decide", decision(), {"Host": "evil.test:80"} | JSON, 403, "evil.test"),
    ("/decide", decision(), {}, 400, "must be JSON"), ("/decide", decision(), {"Content-Type": "text/plain"}, 400, "must be JSON"),
    ("/decide", b"{", JSON, 400, "Expecting"), ("/decide", b"[]", JSON, 400, "object of strings"),
    ("/decide", b'{"id": 3}', JSON, 400, "object of strings"), ("/decide", b'{"id": "x"}', JSON, 400, "must have decision"),
    ("/decide", b"x" * 70_000, JSON, 400, "1 to 65536 bytes"), ("/decide", b"\xff", JSON, 400, "utf-8"), ("/next", None, {}, 400, "person's name"),
    ("/decide", decision(hash="old"), JSON, 400, "changed meanwhile"), ("/decide", decision(id="x"), JSON, 404, "no item 'x'"),
    ("/decide", decision(reviewer="auto:oracle"), JSON, 400, "person's name"), ("/decide", decision(decision="burn"), JSON, 400, "got 'burn'"),
    ("/other", decision(), JSON, 404, "no page /other")])
def test_bad_requests_are_refused_with_a_reason(page_of, path, body, headers, status, text):
    queue, _, ask = page_of
    before = queue.path.read_bytes()
    got, _, said = ask(path, body, **headers)
    assert got == status and text in json.loads(said)["error"], said
    assert queue.path.read_bytes() == before
    assert ask("/")[0] == 200, "and the server goes on"


def test_a_closed_server_frees_its_port(tmp_path):
    queue = filled(tmp_path / "q.jsonl", ITEMS[:1])
    server = queue.serve()
    port = urlsplit(server.url).port
    server.close()
    with queue.serve(port) as again:
        assert urlsplit(again.url).port == port


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with an empty profile."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"the review page was not looked at: no {' or '.join(BROWSERS)} on the PATH (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="the review page was not looked at: playwright is not installed")
    with api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=program, headless=True, args=FLAGS)
        yield context
        context.close()


def test_a_person_reviews_with_keys_in_a_browser(page_of, browser):
    queue, server, _ = page_of
    page, trouble = browser.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda said: trouble.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
    page.on("request", lambda asked: None if asked.url.startswith((server.url, "data:")) else trouble.append(asked.url))
    page.goto(server.url)
    page.locator("#name").fill("ann")
    page.keyboard.press("Enter")

    def at(k):
        page.wait_for_selector(f'body[data-item="{ITEMS[k].id}"][data-busy="false"]')

    def said(k):
        return queue.entry(ITEMS[k].id).decisions.get("ann")
    at(0)
    assert page.locator("#question").text_content() == "Is <b>this</b> & that equal?", "texts are shown, not run"
    assert page.locator("#options li").all_text_contents() == ITEMS[0].options
    assert "auto:ambiguous" in page.locator("#flags").text_content() and "6 of 6 items are pending" in page.locator("#status").text_content()
    assert page.locator("#picture").evaluate("async p => { await p.decode(); return p.naturalWidth; }") == 128
    assert page.locator("#truth").is_hidden() and page.locator("#overlay").is_hidden()
    page.keyboard.press("t")
    page.locator("#truth").wait_for(state="visible")
    assert f"Key: {ITEMS[0].answer}." in page.locator("#truth").text_content() and page.locator("#overlay").is_visible()
    page.wait_for_selector('body[data-busy="false"]')
    page.keyboard.press("t")
    page.locator("#truth").wait_for(state="hidden")
    page.wait_for_selector('body[data-busy="false"]')
    page.keyboard.press("a")
    at(1)
    assert said(0) == ("accept", "")
    page.keyboard.press("r")
    at(2)
    page.keyboard.press("f")
    page.locator("#fix").wait_for(state="visible")
    page.wait_for_selector('body[data-busy="false"]')
    page.keyboard.type("a better text, art")
    page.keyboard.press("Enter")
    at(3)
    assert said(1) == ("reject", "") and said(2) == ("fix", "a better text, art") and said(3) is None
    page.keyboard.press("s")
    at(4)
    page.keyboard.press("u")
    at(2)
    page.keyboard.press("a")
    at(4)
    assert said(2) == ("accept", "") and said(3) is None and page.locator("#fix").is_hidden()
    page.locator('[data-key="r"]').click()
    at(5)
    page.keyboard.press("a")
    page.locator("#work").wait_for(state="hidden")
    assert "Nothing left for you. 6 of 6 items are pending." in page.locator("#status").text_content()
    assert [said(k) and said(k)[0] for k in range(6)] == ["accept", "reject", "accept", None, "reject", "accept"]
    page.close()
    assert not trouble, trouble


def test_a_held_key_and_an_empty_fix_decide_nothing(page_of, browser):
    queue, server, _ = page_of
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    page.locator("#name").fill("ann")
    page.keyboard.press("Enter")
    page.wait_for_selector(f'body[data-item="{ITEMS[0].id}"][data-busy="false"]')
    page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', repeat: true, bubbles: true}))"
                  " || document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', ctrlKey: true, bubbles: true}))")
    page.keyboard.press("f")
    page.locator("#fix").wait_for(state="visible")
    page.wait_for_selector('body[data-busy="false"]')
    page.keyboard.press("Enter")
    page.locator("#status", has_text="a fix needs its text").wait_for()
    page.keyboard.press("Escape")
    page.locator("#fix").wait_for(state="hidden")
    assert not queue.entry(ITEMS[0].id).decisions and page.locator("body").get_attribute("data-item") == ITEMS[0].id
    page.close()


# the notebook view

def test_the_view_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r'the notebook view needs ipywidgets: pip install "collai\[review\]"'):
        filled(tmp_path / "q.jsonl").widget("ann")


def test_the_view_drives_the_queue(tmp_path):
    pytest.importorskip("ipywidgets", reason='the notebook view was not tried: pip install "collai[review]"')
    queue = filled(tmp_path / "q.jsonl", ITEMS[:3])
    view = queue.widget("ann")
    assert ITEMS[0].question in view.question.value and f"A. {ITEMS[0].options[0]}" in view.question.value
    assert np.array_equal(np.asarray(Image.open(BytesIO(view.picture.value))), ITEMS[0].image)
    view.buttons["truth"].click()
    assert f"key {ITEMS[0].answer}" in view.said.value
    view.buttons["fix"].click()
    assert "a fix needs its text" in view.said.value and not queue.entry(ITEMS[0].id).decisions
    view.text.value = "better"
    view.buttons["fix"].click()
    assert queue.entry(ITEMS[0].id).decisions == {"ann": ("fix", "better")} and view.text.value == ""
    view.buttons["later"].click()
    view.buttons["accept"].click()
    assert queue.entry(ITEMS[2].id).decisions == {"ann": ("accept", "")} and not queue.entry(ITEMS[1].id).decisions
    assert view.said.value == "nothing left for you" and all(button.disabled for button in view.buttons.values())
    with pytest.raises(ValueError, match="reviewer must be a person's name"):
        queue.widget("auto:x")


def test_the_module_loads_nothing_heavy():
    code = "import sys, collai.viabench.review; print([n for n in ('torch', 'ipywidgets', 'playwright', 'PIL', 'pandas') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert STATES == ("new", "auto-checked", "reviewed", "adjudicated")


@pytest.mark.parametrize("text", ["hello\n", "1,2\n3,4\nfoo\n", "[1, 2\n", "null\n"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no review queue: it holds"):
        ReviewQueue(path)
    assert path.read_text() == text
