"""Properties of `collai.gamma.ledger`: spent and reserved stay within the budget, whoever calls, and whoever is killed."""
import asyncio
import math
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core import sqlite
from collai.gamma import ledger as module
from collai.gamma.ledger import Budget, BudgetExceeded, Ledger, LedgerError, OverrunError, Reservation, Usage

RESOURCES = ("tokens", "prompt_tokens", "completion_tokens", "calls", "usd", "seconds", "flops")
FIELDS = RESOURCES[1:]
quickly = settings(deadline=None, derandomize=True, max_examples=40)
small = st.integers(0, 6)
tenths = st.integers(0, 6).map(lambda k: k / 10)
usages = st.builds(Usage, small, small, small, tenths, tenths, small.map(float))
limits = st.one_of(st.none(), st.integers(0, 20))
budgets = st.builds(Budget, limits, limits, limits, limits, st.one_of(st.none(), st.integers(0, 20).map(lambda k: k / 10)))
moves = st.lists(st.tuples(st.sampled_from(["reserve", "commit", "release", "fail", "fail None"]), st.integers(0, 2),
                           st.integers(0, 5), usages), max_size=20)
ONE = Usage(1, 1, 1)


def amount(usage, resource):
    parts = {"usd": 10**12, "seconds": 10**9}.get(resource, 1)
    return Fraction(round(getattr(usage, resource) * parts), parts)


class Plain:
    """The same book as a plain loop over exact fractions."""

    def __init__(self, budget, parent=None):
        self.cap = {r: Fraction(str(getattr(budget, r))) for r in RESOURCES if getattr(budget, r) is not None}
        self.parent, (self.spent, self.held, self.peak) = parent, (dict.fromkeys(RESOURCES, Fraction(0)) for _ in range(3))

    def line(self):
        return [self, *(self.parent.line() if self.parent else [])]

    def left(self, resource):
        return min((max(one.cap[resource] - one.spent[resource] - one.held[resource], 0) for one in self.line()
                    if resource in one.cap), default=math.inf)

    def reserve(self, usage):
        short = [r for r in RESOURCES if amount(usage, r) > self.left(r)]
        if not short:
            self.move(usage, 1, Usage())
        return short[0] if short else None

    def move(self, reserved, sign, charged):
        for one in self.line():
            for r in RESOURCES:
                one.held[r] += sign * amount(reserved, r)
                one.spent[r] += amount(charged, r)
                one.peak[r] = max(one.peak[r], one.held[r] + one.spent[r])


def play(ledgers, plain, script):
    open_ones = []
    for what, who, which, usage in script:
        if what == "reserve":
            short = plain[who].reserve(usage)
            if short is None:
                open_ones.append((who, ledgers[who].reserve(usage)))
            else:
                left = float(plain[who].left(short))
                with pytest.raises(BudgetExceeded) as caught:
                    ledgers[who].reserve(usage)
                seen = caught.value.resource, caught.value.requested, caught.value.available
                assert seen == (short, float(amount(usage, short)), left)
        elif open_ones:
            who, held = open_ones.pop(which % len(open_ones))
            fits = all(amount(usage, r) <= amount(held.usage, r) for r in RESOURCES)
            charged = {"release": Usage(), "fail None": held.usage}.get(what, usage)
            plain[who].move(held.usage, -1, charged)
            rest = {"commit": (usage,), "fail": (usage,)}.get(what, ())
            try:
                getattr(ledgers[who], what.split()[0])(held, *rest)
                assert fits or what in ("release", "fail None")
            except OverrunError:
                assert not fits
            assert held.settled and held.actual == charged
        yield


@pytest.mark.parametrize("where", ["memory", "file"])
def test_every_sequence_of_moves_gives_the_numbers_of_a_plain_loop_at_every_step(where, tmp_path):
    count = iter(range(10**6))

    @given(st.lists(budgets, min_size=3, max_size=3), moves)
    @settings(quickly, max_examples=10 if where == "memory" else 4)
    def check(caps, script):
        path = tmp_path / "a.db" if where == "file" else None
        root = Ledger(caps[0], path, str(next(count)))
        ledgers, plain = [root, root.child(caps[1])], [Plain(caps[0])]
        plain.append(Plain(caps[1], plain[0]))
        ledgers.append(ledgers[1].child(caps[2]))
        plain.append(Plain(caps[2], plain[1]))
        for _ in play(ledgers, plain, script):
            for ledger, one in zip(ledgers, plain, strict=True):
                for r in RESOURCES:
                    assert getattr(ledger.spent, r) == float(one.spent[r]) and getattr(ledger.reserved, r) == float(one.held[r])
                    assert ledger.peak(r) == float(one.peak[r]) and ledger.remaining(r) == float(one.left(r))
        for ledger in ledgers:
            frame = ledger.to_frame()
            charged = frame[frame["event"].isin(["commit", "fail"])]
            assert all(math.isclose(charged[name].sum(), getattr(ledger.spent, name), abs_tol=1e-9) for name in FIELDS)

    check()


@pytest.fixture(params=["memory", "file"])
def make(request, tmp_path):
    return lambda budget, run="r": Ledger(budget, None if request.param == "memory" else tmp_path / "book.db", run)


def test_usages_are_added_and_subtracted_field_by_field():
    a, b = Usage(5, 4, 3, 0.5, 2.0, 1e9), Usage(1, 2, 3, 0.25, 1.0, 5e8)
    assert a + b == Usage(6, 6, 6, 0.75, 3.0, 1.5e9) and a - b == Usage(4, 2, 0, 0.25, 1.0, 5e8)
    assert a.tokens == 9 and Usage().tokens == 0 and sum([a, b], Usage()) == a + b
    with pytest.raises(ValueError, match="prompt_tokens must be finite and >= 0, got -4"):
        b - a
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(AttributeError):
        a.calls = 2


@pytest.mark.parametrize("kind", [Usage, Budget])
def test_amounts_that_are_none_are_refused(kind):
    for name, value in [("calls", -1), ("usd", -0.1), ("seconds", math.nan), ("flops", math.inf)]:
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got {value}"):
            kind(**{name: value})
    for name, value, what in [("calls", 1.5, "an integer"), ("prompt_tokens", "3", "an integer"), ("usd", "3", "a number")]:
        with pytest.raises(TypeError, match=f"{name} must be {what}, got {value!r}"):
            kind(**{name: value})


def test_amounts_that_would_overflow_are_refused():
    for call in (lambda: Usage(usd=1e300), lambda: Budget(seconds=1e300), lambda: Usage(flops=10**400), lambda: Budget(calls=10**400)):
        with pytest.raises(ValueError, match=r"(usd|seconds|flops|calls) must be at most 1e\+200, got 1"):
            call()
    ledger = Ledger(Budget(usd=1.0))
    ledger.commit(ledger.reserve(Usage(flops=1e200, calls=10**199)), Usage(flops=1e200))
    assert ledger.spent == Usage(flops=1e200)
    with pytest.raises(BudgetExceeded, match=r"usd: requested 1e\+200, available 1"):
        ledger.reserve(Usage(usd=1e200))
    assert sum(part.usd for part in Budget(usd=1e200).split(2)) == 1e200


@given(st.integers(0, 10**6), st.lists(st.one_of(st.integers(0, 9), st.floats(0, 5)), min_size=1, max_size=9))
@quickly
def test_parts_of_a_budget_sum_to_it_and_are_within_one_of_their_share(total, weights):
    if not any(weights):
        weights[0] = 1
    given_weights = list(weights)
    parts = Budget(tokens=total, usd=total / 10**6).split(len(weights), weights)
    whole = sum(map(Fraction, weights))
    for name, unit in (("tokens", 1), ("usd", 10**12)):
        counts = [round(getattr(part, name) * unit) for part in parts]
        cap = total if unit == 1 else total * 10**6
        assert sum(counts) == cap
        shares = [cap * Fraction(w) / whole for w in weights]
        assert all(math.floor(s) <= c <= math.ceil(s) for c, s in zip(counts, shares, strict=True))
        up = [s - math.floor(s) for c, s in zip(counts, shares, strict=True) if c > s]
        down = [s - math.floor(s) for c, s in zip(counts, shares, strict=True) if c <= s and s != int(s)]
        assert not up or not down or min(up) >= max(down)
    assert weights == given_weights and parts[0].calls is None


def test_equal_parts_of_seven():
    assert [b.tokens for b in Budget(tokens=7).split(3)] == [3, 2, 2]
    assert [b.calls for b in Budget(calls=5).split(2, [0, 1])] == [0, 5]
    for n, weights in [(2, [1]), (2, [0, 0]), (2, [1, -1]), (2, [1, math.inf])]:
        with pytest.raises(ValueError, match="weights must be 2 numbers >= 0, not all zero, got"):
            Budget(tokens=7).split(n, weights)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        Budget(tokens=7).split(0)


def test_three_times_ten_cents_are_thirty(make):
    ledger = make(Budget(usd=0.3))
    for _ in range(3):
        ledger.commit(ledger.reserve(Usage(usd=0.1)), Usage(usd=0.1))
    assert ledger.spent.usd == 0.3 and ledger.remaining("usd") == 0
    exact = make(Budget(usd=1.001), "other")  # 1.001e12 is not a whole number as a float
    exact.commit(exact.reserve(Usage(usd=1.001)), Usage(usd=1.001))
    assert exact.spent.usd == 1.001


def test_numbers_beyond_64_bits_stay_exact(make):
    ledger = make(Budget(flops=3e21))
    ledger.commit(ledger.reserve(Usage(flops=2e21)), Usage(flops=1e21 + 2**20))
    assert ledger.spent.flops == 1e21 + 2**20 and ledger.peak("flops") == 2e21
    with pytest.raises(BudgetExceeded, match=r"flops: requested 2e\+21, available 2e\+21"):
        ledger.reserve(Usage(flops=2e21))


def test_the_first_short_resource_is_named_and_nothing_changes(make):
    ledger = make(Budget(tokens=10, prompt_tokens=3, calls=0, usd=1.0))
    with pytest.raises(BudgetExceeded, match="prompt_tokens: requested 4, available 3") as caught:
        ledger.reserve(Usage(4, 4, 1, 2.0), key="k", agent="a", tag="t")
    assert (caught.value.resource, caught.value.requested, caught.value.available) == ("prompt_tokens", 4, 3)
    assert ledger.spent == ledger.reserved == Usage() and ledger.peak("tokens") == 0
    frame = ledger.to_frame()
    assert frame[["event", "key", "agent", "tag", *FIELDS]].values.tolist() == [["refuse", "k", "a", "t", 4, 4, 1, 2.0, 0, 0]]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_a_ledger_above_can_refuse_and_the_least_is_what_is_available(make):
    root = make(Budget(tokens=10))
    child = root.child(Budget(tokens=100, calls=5))
    child.commit(child.reserve(Usage(3, 4)), Usage(3, 3))
    assert (root.spent, child.remaining("tokens"), child.remaining("calls"), root.remaining("calls")) == (Usage(3, 3), 4, 5, math.inf)
    with pytest.raises(BudgetExceeded, match="tokens: requested 5, available 4"):
        child.reserve(Usage(5))
    held = child.reserve(Usage(4))
    assert root.reserved == held.usage and root.remaining("tokens") == 0
    assert list(child.to_frame()["event"]) == list(root.to_frame()["event"]) == ["reserve", "commit", "refuse", "reserve"]
    other = root.child(Budget())
    assert other.to_frame().empty and other.spent == Usage()


def test_a_named_child_is_the_same_ledger_each_time(make):
    root, cap = make(Budget(tokens=30)), Budget(tokens=9)
    child = root.child(cap, "solver")
    child.commit(child.reserve(Usage(5), key="k"), Usage(4))
    again = root.child(cap, "solver")
    assert again.spent == Usage(4) and again.reserve(Usage(5), key="k").actual == Usage(4) and again.remaining("tokens") == 5
    others = [root.child(cap), root.child(cap), root.child(cap, "critic"), child.child(cap, "solver")]
    for other in others:
        assert other.spent == Usage() and not other.reserve(Usage(1), key="k").settled
    assert root.reserved == Usage(4) and child.reserved == Usage(1)
    with pytest.raises(ValueError, match=r"child 'solver' of run 'r' has Budget\(tokens=9, .*, got Budget\(tokens=8"):
        root.child(Budget(tokens=8), "solver")


def test_a_restarted_team_does_not_pay_again(tmp_path):
    for settled in (False, True):
        for agent in ("solver", "critic"):
            child = Ledger(Budget(tokens=30), tmp_path / "book.db", "1").child(Budget(tokens=9), agent)
            held = child.reserve(Usage(5), key="task 1")
            assert held.settled == settled
            if not settled:
                child.commit(held, Usage(4))
    assert child.spent == Usage(4) and Ledger(Budget(tokens=30), tmp_path / "book.db", "1").spent == Usage(8)
    assert Ledger(Budget(), tmp_path / "book.db", "solver").spent == Usage()


def test_a_committed_key_is_replayed_without_a_charge(make):
    ledger = make(Budget(tokens=10))
    first = ledger.reserve(Usage(4, 4), key="call 1", agent="a")
    assert not first.settled and first.actual is None
    with pytest.raises(LedgerError, match=r"key 'call 1' has an open reservation \(\d+\) of process"):
        ledger.reserve(Usage(1), key="call 1")
    ledger.commit(first, Usage(4, 2))
    again = ledger.reserve(Usage(100), key="call 1")
    assert again.settled and again.actual == Usage(4, 2) and again.usage == Usage(4, 4) and again.agent == "a"
    assert ledger.spent == Usage(4, 2) and ledger.reserved == Usage()
    with pytest.raises(LedgerError, match=r"\(key 'call 1'\) is settled already: commit"):
        ledger.commit(again, Usage())
    assert not ledger.child(Budget()).reserve(Usage(1), key="call 1").settled


@pytest.mark.parametrize("end", ["release", "fail"])
def test_a_key_without_a_result_is_free_again(make, end):
    ledger = make(Budget(tokens=10))
    getattr(ledger, end)(ledger.reserve(Usage(4), key="k"))
    assert ledger.spent == (Usage() if end == "release" else Usage(4))
    second = ledger.reserve(Usage(4), key="k")
    assert not second.settled
    ledger.commit(second, Usage(1))
    assert ledger.reserve(Usage(4), key="k").actual == Usage(1)


@pytest.mark.parametrize("first", ["commit", "release", "fail"])
def test_a_second_settlement_is_refused_and_changes_nothing(make, first):
    ledger = make(Budget(tokens=10))
    held = ledger.reserve(Usage(4))
    ends = {"commit": lambda: ledger.commit(held, Usage(2)), "release": lambda: ledger.release(held), "fail": lambda: ledger.fail(held)}
    ends[first]()
    spent = ledger.spent
    for end in ends.values():
        with pytest.raises(LedgerError, match=f"is settled already: {first}"):
            end()
    assert ledger.spent == spent and ledger.reserved == Usage() and len(ledger.to_frame()) == 2


def test_only_the_ledger_that_reserved_settles(make):
    root = make(Budget(tokens=10))
    child = root.child(Budget())
    held = child.reserve(Usage(1))
    for other in (root, root.child(Budget())):
        with pytest.raises(LedgerError, match=r"reservation \d+ is not of this ledger"):
            other.commit(held, Usage())
    with pytest.raises(LedgerError, match="reservation 99 is not of this ledger"):
        child.release(Reservation(99, None, "", "", Usage()))
    assert not held.settled and child.reserved == Usage(1)


def test_an_overrun_is_recorded_and_then_raised(make):
    ledger = make(Budget(tokens=10, usd=1))
    held = ledger.reserve(Usage(2, 2, usd=0.5), key="k")
    with pytest.raises(OverrunError, match=r"\(key 'k'\) was exceeded: tokens by 5, completion_tokens by 6, usd by 0.25"):
        ledger.commit(held, Usage(1, 8, usd=0.75))
    assert held.settled and ledger.spent == Usage(1, 8, usd=0.75) and ledger.reserved == Usage() and ledger.peak("tokens") == 9
    frame = ledger.to_frame()
    assert list(frame["event"]) == ["reserve", "commit", "overrun"] and list(frame["completion_tokens"]) == [2, 8, 6]
    assert ledger.reserve(Usage(), key="k").actual == Usage(1, 8, usd=0.75) and issubclass(OverrunError, LedgerError)
    with pytest.raises(OverrunError):
        ledger.fail(ledger.reserve(Usage(1)), Usage(20))
    assert ledger.remaining("tokens") == 0 and ledger.spent.tokens == 29


def test_what_is_no_usage_budget_or_resource_is_refused(make):
    ledger = make(Budget(tokens=10))
    for bad in (lambda: ledger.reserve(3), lambda: ledger.commit(ledger.reserve(ONE), (1, 1))):
        with pytest.raises(TypeError, match="usage must be a Usage, got"):
            bad()
    for bad in (lambda: Ledger({"tokens": 3}), lambda: ledger.child(3)):
        with pytest.raises(TypeError, match="budget must be a Budget, got"):
            bad()
    for bad in (ledger.peak, ledger.remaining):
        with pytest.raises(KeyError, match="no resource 'dollars': tokens, prompt_tokens"):
            bad("dollars")
    assert ledger.reserved == ONE


def hammer(ledger, paid, tries):
    for i in range(tries):
        try:
            held = ledger.reserve(Usage(2, 3, 1))
        except BudgetExceeded:
            continue
        if i % 5 == 4:
            ledger.release(held)
        elif i % 5 == 3:
            ledger.fail(held)
            paid.append(5)
        else:
            ledger.commit(held, Usage(2, 1, 1))
            paid.append(3)


def test_sixty_four_threads_never_exceed_the_cap_and_lose_nothing(make):
    ledger, paid = make(Budget(tokens=700)), []
    child = ledger.child(Budget(tokens=250))
    threads = [threading.Thread(target=hammer, args=((ledger, child)[i % 2], paid, 6)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.spent.tokens == sum(paid) and ledger.reserved == Usage()
    assert 695 < ledger.peak("tokens") <= 700 and child.peak("tokens") <= 250 and (ledger.to_frame()["event"] == "refuse").any()


def test_coroutines_can_use_it(make):
    ledger = make(Budget(tokens=30))

    async def call(i):
        held = ledger.reserve(Usage(4), key=str(i))
        await asyncio.sleep(0)
        ledger.commit(held, Usage(3))

    async def everything():
        return await asyncio.gather(*map(call, range(8)), return_exceptions=True)

    errors = [e for e in asyncio.run(everything()) if e is not None]
    assert len(errors) == 1 and isinstance(errors[0], BudgetExceeded) and ledger.spent == Usage(21)


WORK = """
import itertools, random, sys, time
from collai.gamma.ledger import *
ledger = Ledger(Budget(tokens=int(sys.argv[2])), sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in itertools.count() if sys.argv[4] == "a" else range(int(sys.argv[3])):  # a goes on until it is killed
    try:
        held = ledger.reserve(Usage(2, 3, 1), key=f"{sys.argv[4]}/{i}", agent=sys.argv[4])
    except BudgetExceeded:
        time.sleep(0.001)
        continue
    time.sleep(0.001 * random.random())
    ledger.commit(held, Usage(2, 1, 1))
"""


def start(path, cap, n, name):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", WORK, path, str(cap), str(n), name], **pipes)


def begin(*workers):
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()


def test_four_processes_share_one_cap_and_a_killed_one_is_charged_by_recover(tmp_path):
    path = str(tmp_path / "book.db")
    ledger, mine = Ledger(Budget(tokens=600), path), Ledger(Budget(tokens=600), path)
    held = mine.reserve(Usage(7))
    workers = [start(path, 600, 120, name) for name in "abcd"]
    begin(*workers)
    while ledger.spent.tokens < 60:
        time.sleep(0.001)
    workers[0].send_signal(signal.SIGKILL)
    assert [w.communicate()[0] is not None and w.returncode for w in workers] == [-signal.SIGKILL, 0, 0, 0]
    frame = ledger.to_frame()
    left = int((frame["event"] == "reserve").sum() - (frame["event"] == "commit").sum())
    assert left in (1, 2) and ledger.reserved.tokens == 7 + 5 * (left - 1)  # the killed one held a reservation, or did not
    charged = int(frame.loc[frame["event"] == "commit", "prompt_tokens"].sum())
    assert ledger.spent.tokens == charged // 2 * 3 and 590 < ledger.peak("tokens") <= 600
    assert ledger.recover() == left - 1 and ledger.reserved == Usage(7) and ledger.recover() == 0
    assert ledger.spent.tokens == charged // 2 * 3 + 5 * (left - 1)
    mine.release(held)


def test_a_dead_process_keeps_its_reservation_until_recover(tmp_path):
    path = str(tmp_path / "book.db")
    code = ("import os, sys; from collai.gamma.ledger import *\n"
            "ledger = Ledger(Budget(tokens=10), sys.argv[1]).child(Budget(tokens=9))\n"
            "ledger.reserve(Usage(6), key='k'); os.kill(os.getpid(), 9)")
    done = subprocess.Popen([sys.executable, "-c", code, path])
    ledger = Ledger(Budget(tokens=10), path)
    os.waitid(os.P_PID, done.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie: its number is still taken
    with pytest.raises(BudgetExceeded, match="tokens: requested 5, available 4"):
        ledger.reserve(Usage(5))
    other = ledger.child(Budget())
    assert other.recover() == 0 and ledger.reserved == Usage(6)
    assert ledger.recover() == 1 and ledger.spent == Usage(6) and ledger.reserved == Usage()
    assert list(ledger.to_frame()["event"]) == ["reserve", "refuse", "fail"]
    done.wait()


def test_a_kill_inside_a_transaction_leaves_the_book_as_it_was(tmp_path):
    path = str(tmp_path / "book.db")
    ledger = Ledger(Budget(tokens=10), path)
    ledger.commit(ledger.reserve(Usage(2)), Usage(1))
    code = ("import os, sys; from collai.gamma import ledger as m\n"
            "book = m.Ledger(m.Budget(tokens=10), sys.argv[1])\n"
            "m._FileRows.open = lambda *_: os.kill(os.getpid(), 9)\n"
            "book.reserve(m.Usage(6))")
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert (ledger.spent, ledger.reserved, ledger.peak("tokens"), ledger.recover()) == (Usage(1), Usage(), 2, 0)
    ledger.reserve(Usage(9))


def test_a_number_that_the_system_gave_away_again_does_not_keep_the_dead_alive():
    me = module._me()
    assert module._alive(me) and not module._alive(f"{me.rsplit('/', 1)[0]}/1")
    assert module._alive(f"{os.getpid()} ") and not module._alive(f"{2**22 + 1} ")


def test_a_run_is_continued_with_its_own_budget_only(tmp_path):
    path = tmp_path / "new" / "book.db"
    Ledger(Budget(tokens=10, usd=0.1), path).reserve(Usage(3))
    assert Ledger(Budget(tokens=10, usd=0.1), path).reserved == Usage(3)
    assert Ledger(Budget(tokens=5), path, "other").remaining("tokens") == 5
    with pytest.raises(ValueError, match=r"run 'default' of .*book.db has Budget\(tokens=10, .*, got Budget\(tokens=11"):
        Ledger(Budget(tokens=11), path)


def test_many_may_make_the_file_at_once(tmp_path):
    for trial in range(3):
        made, path, gate = [], tmp_path / f"{trial}.db", threading.Barrier(8)

        def enter(made=made, path=path, gate=gate):
            gate.wait()
            made.append(Ledger(Budget(tokens=10), path).reserve(Usage(1)))

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 8 and Ledger(Budget(tokens=10), path).reserved == Usage(8)


def test_files_of_others_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    for text, content in [("it is another program's database", path.read_bytes()), ("file is not a database", b"x" * 5_000)]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"other.db is no ledger: {text}"):
            Ledger(Budget(), path)
        assert path.read_bytes() == content


def test_a_pickled_ledger_uses_the_same_book_and_one_without_a_file_stays_home(tmp_path):
    ledger = Ledger(Budget(tokens=10), tmp_path / "book.db").child(Budget(tokens=4))
    copy = pickle.loads(pickle.dumps(ledger))  # noqa: S301
    copy.reserve(Usage(3))
    assert ledger.reserved == Usage(3) and ledger.remaining("tokens") == 1
    with pytest.raises(TypeError, match="a ledger without a path cannot leave its process: give it a path"):
        pickle.dumps(Ledger(Budget()))


def test_a_forked_process_opens_the_file_anew(tmp_path):
    ledger = Ledger(Budget(tokens=10), tmp_path / "book.db")
    ledger.reserve(Usage(1))
    if not (pid := os.fork()):
        try:
            ledger.commit(ledger.reserve(Usage(5)), Usage(4))
            os._exit(0)
        except BaseException:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0 and ledger.spent == Usage(4) and ledger.recover() == 0 and ledger.reserved == Usage(1)


def test_threads_of_a_forked_child_keep_the_book_and_the_cap(tmp_path):
    for trial in range(2):
        ledger, done = Ledger(Budget(tokens=400), tmp_path / f"{trial}.db"), []
        ledger.commit(ledger.reserve(Usage(1)), Usage(1))
        if not (pid := os.fork()):
            signal.alarm(30)
            gate = threading.Barrier(8)

            def work(gate=gate, ledger=ledger, done=done):
                gate.wait()
                hammer(ledger, done, 20)
                done.append("without an error")

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(8 - done.count("without an error"))
        hammer(ledger, [], 5)
        assert os.waitpid(pid, 0)[1] == 0
        frame = ledger.to_frame()
        charged = frame[frame["event"].isin(["commit", "fail"])]
        assert (charged["prompt_tokens"] + charged["completion_tokens"]).sum() == ledger.spent.tokens <= 400
        assert ledger.reserved == Usage() and 390 < ledger.peak("tokens") <= 400


def test_a_busy_file_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    ledger = Ledger(Budget(tokens=10), tmp_path / "book.db")
    other = sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.1, lambda: other.execute("ROLLBACK"))
    timer.start()
    ledger.reserve(Usage(1))
    timer.join()
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite, "_PATIENCE", 0.05)
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        ledger.reserve(Usage(1))
    other.execute("ROLLBACK")
    assert ledger.reserved == Usage(1)
    other.close()


def test_reservations_say_what_they_are():
    assert repr(Reservation(3, "k", "a", "t", Usage(1))).endswith("open)")
    assert "settled, actual=Usage(prompt_tokens=1" in repr(Reservation(3, "k", "a", "t", Usage(2), Usage(1)))


def test_the_measurement_gives_both_rates(monkeypatch):
    assert module._in_memory(50) > 0 and module._through_file(40) > 0
    rates = iter(range(1, 10))
    monkeypatch.setattr(module, "_in_memory", lambda n: float(next(rates)))
    monkeypatch.setattr(module, "_through_file", lambda n: 3.0)
    rows = module.measure("cpu")
    assert [(row["name"], row["measured"], row["low"], row["high"]) for row in rows] == [
        ("ledger_memory", 5.0, 1.0, 9.0), ("ledger_file", 3.0, 3.0, 3.0)]
    with pytest.raises(ValueError, match="device must be 'cpu', got 'cuda'"):
        module.measure("cuda")
