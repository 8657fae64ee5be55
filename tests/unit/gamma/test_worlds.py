"""Worlds with a known gain: closed forms against plain enumeration, simulators against closed forms, and what is refused."""
import json
import math
import os
from fractions import Fraction
from itertools import pairwise, permutations, product

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.gamma import worlds
from collai.gamma.worlds import (
    CondorcetWorld,
    DebateWorld,
    FactorialWorld,
    HiddenProfileWorld,
    RelayWorld,
    SearchWorld,
    TreeWorld,
    count_votes,
    majority_accuracy,
)

share = st.floats(0, 1).map(lambda x: round(x, 4))
quick = settings(max_examples=25, deadline=None)


def close(found, phi, n, sigmas=5.0):
    """A share of n tasks is within so many standard errors of its probability."""
    assert abs(found - phi) <= sigmas * math.sqrt(phi * (1 - phi) / n) + 1e-12


def plain_majority(n, p):
    """Sum over numbers of right votes, in fractions; a tie counts half."""
    p = Fraction(p)
    law = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    return sum(x for k, x in enumerate(law) if 2 * k > n) + (law[n // 2] / 2 if n % 2 == 0 else 0)


def half_won(votes):
    """1 for a majority of right votes, 1/2 for a tie."""
    return (np.sign(2 * sum(votes) - len(votes)) + 1) / 2


# --- votes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "value"), [(3, 0.648), (5, 0.68256), (15, 0.786897), (51, 0.926471)])
def test_known_majorities(n, value):
    assert majority_accuracy(n, 0.6) == pytest.approx(value, abs=6e-7)


@quick
@given(st.integers(0, 40), share)
def test_a_majority_is_its_sum(n, p):
    assert majority_accuracy(n, p) == pytest.approx(float(plain_majority(n, p)), abs=1e-13)


@quick
@given(st.integers(1, 300), share)
def test_an_even_jury_is_worth_the_odd_one_below_and_sides_are_symmetric(j, p):
    assert majority_accuracy(2 * j, p) == majority_accuracy(2 * j - 1, p)
    assert majority_accuracy(j, p) + majority_accuracy(j, 1 - p) == pytest.approx(1, abs=1e-13)


def test_no_vote_is_a_coin_and_sure_votes_are_sure():
    assert [majority_accuracy(0, p) for p in (0, 0.3, 1)] == [0.5] * 3
    assert [majority_accuracy(n, p) for n in (1, 4, 99) for p in (0, 1)] == [0, 1] * 3
    assert majority_accuracy(10**6, 0.51) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("call", "text"), [
    (lambda: majority_accuracy(-1, 0.5), "n must be >= 0, got -1"),
    (lambda: majority_accuracy(3, 1.2), r"p must be in \[0, 1\], got 1.2"),
    (lambda: majority_accuracy(3, math.nan), r"p must be in \[0, 1\], got nan"),
    (lambda: CondorcetWorld(-0.1), r"p must be in \[0, 1\], got -0.1"),
    (lambda: CondorcetWorld(0.6, 1.5), r"rho_between must be in \[0, 1\], got 1.5"),
    (lambda: CondorcetWorld(0.6, 0.1, -1), r"rho_within must be in \[0, 1\], got -1"),
    (lambda: CondorcetWorld(0.6, call_tokens=0), "call_tokens must be >= 1, got 0"),
    (lambda: CondorcetWorld(0.6, overhead_tokens=-5), "overhead_tokens must be >= 0, got -5"),
    (lambda: CondorcetWorld(0.6).phi_sas(0), "n_samples must be >= 1, got 0"),
    (lambda: CondorcetWorld(0.6).phi_mas(0), "n_agents must be >= 1, got 0"),
    (lambda: CondorcetWorld(0.6).phi_mas(2, 0), "samples must be >= 1, got 0"),
    (lambda: CondorcetWorld(0).gamma(3), "single-agent score is zero: Γ is undefined; use delta"),
    (lambda: CondorcetWorld(0.6, overhead_tokens=50).gamma_budget(249),
     "tokens must pay for one call and the overhead, 250, got 249"),
    (lambda: CondorcetWorld(0.6).sample(0, 1, 1, np.random.default_rng()), "n_tasks must be >= 1, got 0"),
    (lambda: count_votes(CondorcetWorld(0.6), 0, 1), "n_tasks must be >= 1, got 0"),
    (lambda: count_votes(CondorcetWorld(0.6), 1, 1, seed=-1), "seed must be >= 0, got -1"),
    (lambda: count_votes(CondorcetWorld(0.6), 1, 1, seed=2**63), r"seed must be below 2\*\*63, got 9223372036854775808"),
    (lambda: count_votes(CondorcetWorld(0.6), 1, 1, device="tpu"), "device must be 'cpu' or 'cuda', got 'tpu'"),
    (lambda: HiddenProfileWorld(0, 0.6, 8), "n_clues must be >= 1, got 0"),
    (lambda: HiddenProfileWorld(8, 1.6, 8), r"q must be in \[0, 1\], got 1.6"),
    (lambda: HiddenProfileWorld(8, 0.6, -1), "window must be finite and >= 0, got -1"),
    (lambda: HiddenProfileWorld(8, 0.6, 8, "mail"), "message must be 'counts' or 'votes', got 'mail'"),
    (lambda: HiddenProfileWorld(8, 0.6, 8, "votes", 2), r"flip must be in \[0, 1\], got 2"),
    (lambda: HiddenProfileWorld(8, 0.6, 8, flip=0.1), "flip belongs to message 'votes', got 0.1 with 'counts'"),
    (lambda: HiddenProfileWorld(64, 0.6, 8).phi_mas(7), "n_clues must be divisible by n_agents, got 64 and 7"),
    (lambda: HiddenProfileWorld(64, 0.6, 8).phi_sas(3), "n_clues must be divisible by chunks, got 64 and 3"),
    (lambda: RelayWorld(0, 0.5, 150), "depth must be >= 1, got 0"),
    (lambda: RelayWorld(8, 1.5, 150), r"s0 must be in \[0, 1\], got 1.5"),
    (lambda: RelayWorld(8, 0.5, 0), "tau must be > 0, got 0"),
    (lambda: RelayWorld(8, 0.5, 150, -1), "message_tokens must be finite and >= 0, got -1"),
    (lambda: RelayWorld(8, 0.5, 150, 0, 1.1), r"handoff_loss must be in \[0, 1\], got 1.1"),
    (lambda: RelayWorld(8, 0.5, 150, 60).phi_mas(839, 8), "tokens must pay for the messages, 840, got 839"),
    (lambda: RelayWorld(8, 0.5, 150).phi_sas(math.inf), "tokens must be finite and >= 0, got inf"),
    (lambda: RelayWorld(8, 0.5, 150).verified(0.5, 1.2, 0, 1), r"detect must be in \[0, 1\], got 1.2"),
    (lambda: RelayWorld(8, 0.5, 150).verified(0.5, 1, 0, -1), "retries must be >= 0, got -1"),
    (lambda: RelayWorld(8, 0, 150).gamma(0, 2), "single-agent score is zero"),
    (lambda: SearchWorld(0), "n_candidates must be >= 1, got 0"),
    (lambda: SearchWorld(5).gamma(0), "single-agent score is zero"),
    (lambda: TreeWorld(4), "fan_in must be odd, got 4"),
    (lambda: TreeWorld(1), "fan_in must be >= 3, got 1"),
    (lambda: TreeWorld(3, 1.1), r"fidelity must be in \[0, 1\], got 1.1"),
    (lambda: TreeWorld(3, 1, -0.5), r"rho must be in \[0, 1\], got -0.5"),
    (lambda: TreeWorld(3).step(1.5), r"x must be in \[-1, 1\], got 1.5"),
    (lambda: TreeWorld(3).accuracy(0.6, -1), "depth must be >= 0, got -1"),
    (lambda: DebateWorld(1.1, 1, 2, nx.path_graph(2)), r"p must be in \[0, 1\], got 1.1"),
    (lambda: DebateWorld(0.6, 0, 2, nx.path_graph(2)), "concentration must be > 0, got 0"),
    (lambda: DebateWorld(0.6, 1, 2, nx.path_graph(2), -1), "beta must be finite and >= 0, got -1"),
    (lambda: DebateWorld(0.6, 1, 3, nx.path_graph(2)), r"graph must have the nodes 0 to 2, got \[0, 1\]"),
    (lambda: DebateWorld(0.6, 1, 2, nx.path_graph(2), 0.5).correlation(1), r"need beta 0 and p inside \(0, 1\), got 0.5 and 0.6"),
    (lambda: worlds.measure("tpu"), "device must be 'cpu' or 'cuda', got 'tpu'"),
])
def test_what_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), [
    (lambda: majority_accuracy(2.5, 0.5), r"n must be an integer, got 2\.5"),
    (lambda: CondorcetWorld(0.6).phi_sas("3"), "n_samples must be an integer, got '3'"),
    (lambda: SearchWorld(2.0), r"n_candidates must be an integer, got 2\.0"),
])
def test_what_is_no_integer(call, text):
    with pytest.raises(TypeError, match=text):
        call()


# --- shared errors -------------------------------------------------------------------------------------------------


def enumerated(p, between, within, n, r):
    """Joint law of all votes, by every flag and every draw."""
    law = {}
    for shared, *flags in product((0, 1), repeat=n + 1):
        weight = between if shared else 1 - between
        for flag in flags:
            weight *= within if flag else 1 - within
        for bits in product((0, 1), repeat=n * r):
            votes = [bits[0] if shared else bits[g * r] if flags[g] else bits[g * r + k] for g in range(n) for k in range(r)]
            chance = weight * math.prod(p if b else 1 - p for b in bits)
            law[tuple(votes)] = law.get(tuple(votes), 0) + chance
    return law


@pytest.mark.parametrize(("n", "r"), [(1, 4), (2, 2), (3, 2), (2, 3), (5, 1)])
@pytest.mark.parametrize(("p", "between", "within"), [(0.6, 0.1, 0.5), (0.3, 0.25, 0.0), (0.8, 0.0, 0.7), (0.5, 1.0, 0.2)])
def test_scores_of_a_team_and_of_one_agent_are_those_of_the_joint_law(p, between, within, n, r):
    world, law = CondorcetWorld(p, between, within), enumerated(p, between, within, n, r)
    assert world.phi_mas(n, r) == pytest.approx(sum(w * half_won(v) for v, w in law.items()), abs=1e-13)
    if n == 1:
        assert world.phi_sas(r) == pytest.approx(world.phi_mas(1, r), abs=1e-13)


def test_correlations_of_pairs_of_votes():
    world, law = CondorcetWorld(0.6, 0.1, 0.5), enumerated(0.6, 0.1, 0.5, 2, 2)
    for other, rho in ((1, world.rho_total), (2, world.rho_between)):
        both = sum(w for v, w in law.items() if v[0] and v[other])
        assert (both - 0.36) / 0.24 == pytest.approx(rho, abs=1e-12)


@pytest.mark.parametrize(("n", "value"), [(3, 1.034749), (9, 1.090970), (101, 1.221382)])
def test_known_gains_of_diversity(n, value):
    world = CondorcetWorld(0.6, 0.1, 0.5)
    assert world.gamma(n) == pytest.approx(value, abs=6e-7)
    assert world.gamma_limit() == pytest.approx(1.230769, abs=6e-7)


@quick
@given(st.floats(0.01, 1), share, st.integers(1, 60), st.integers(1, 6))
def test_without_private_diversity_there_is_no_gain_at_all(p, between, n, r):
    assert CondorcetWorld(p, between).gamma(n, r) == 1.0


@quick
@given(st.floats(0.5, 1), share, share, st.integers(1, 60))
def test_the_gain_lies_between_one_and_its_limit(p, between, within, n):
    world = CondorcetWorld(p, between, within)
    assert 1 - 1e-12 <= world.gamma(n) <= world.gamma_limit() + 1e-12


@pytest.mark.parametrize("world", [
    CondorcetWorld(0.6, 0.1, 0.5), CondorcetWorld(0.3, 0.1, 0.5), CondorcetWorld(0.5, 0.1, 0.5), CondorcetWorld(0.4, 0.2),
    CondorcetWorld(0.4, 0.0, 0.5), CondorcetWorld(0.7, 1.0, 0.5), CondorcetWorld(0.7, 0.0, 1.0)], ids=str)
def test_many_agents_come_close_to_the_limit(world):
    assert world.gamma(4001) == pytest.approx(world.gamma_limit(), abs=1e-9)


def test_many_samples_of_many_agents_by_plain_convolution():
    world, law = CondorcetWorld(0.55, 0.05, 0.3), np.ones(1)
    group = [0.7 * math.comb(6, k) * 0.55**k * 0.45 ** (6 - k) + 0.3 * (0.45 * (k == 0) + 0.55 * (k == 6)) for k in range(7)]
    for _ in range(20):
        law = np.convolve(law, group)
    assert world.phi_mas(20, 6) == pytest.approx(0.05 * 0.55 + 0.95 * (law[61:].sum() + law[60] / 2), abs=1e-12)


def test_a_budget_buys_samples_after_the_overhead():
    world = CondorcetWorld(0.6, 0.1, 0.5, call_tokens=200, overhead_tokens=500)
    assert world.gamma_budget(2999) == pytest.approx(world.phi_mas(12) / world.phi_sas(14), abs=1e-15)
    assert CondorcetWorld(0.6, 0.1, call_tokens=7).gamma_budget(70) == 1.0
    assert CondorcetWorld(0.6, 0.1, 0.0, 200, 1000).gamma_budget(3000) < 1


@pytest.mark.parametrize(("n", "r"), [(7, 1), (4, 3), (1, 6)])
def test_drawn_votes_follow_the_closed_form(n, r):
    world, rng = CondorcetWorld(0.6, 0.1, 0.5), np.random.default_rng(1)
    votes = world.sample(20_000, n, r, rng)
    assert votes.shape == (20_000, n, r) and votes.dtype == np.int8 and set(np.unique(votes)) <= {0, 1}
    margin = 2 * votes.sum((1, 2)) - n * r
    close(((np.sign(margin) + 1) / 2).mean(), world.phi_mas(n, r), 20_000)
    close(votes[:, 0, 0].mean(), 0.6, 20_000)


# --- counting votes ------------------------------------------------------------------------------------------------


def philox_loop(seed, counter):
    """Ten rounds on Python integers."""
    c, k = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("word", "seed", "found"), [
    ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1")])
def test_the_generator_gives_its_published_words(word, seed, found):
    assert " ".join(f"{int(x):08x}" for x in worlds._philox(seed, tuple(word))) == found


CASES = [(CondorcetWorld(0.6), 15, 1), (CondorcetWorld(0.6, 0.1), 8, 1), (CondorcetWorld(0.6, 0.1, 0.5), 3, 5),
         (CondorcetWorld(0.7, 0.0, 0.5), 3, 4), (CondorcetWorld(1.0, 0.2, 0.5), 2, 3), (CondorcetWorld(0.3, 1.0, 1.0), 2, 2),
         (CondorcetWorld(0.5), 1, 1), (CondorcetWorld(0.45, 0.3, 0.2), 2, 6)]


def counted(world, n_tasks, n, r, seed, chunk=2**30):
    """Tasks won and tied, one draw at a time."""
    plan, won, tied = worlds._plan(world, n, r), 0, 0
    for task in range(n_tasks):
        total = 0
        for group in range(plan.groups):
            words = [x for call in range(plan.calls)
                     for x in philox_loop(seed, (task % chunk, group * plan.calls + call, task // chunk, 0))]
            hits = sum(x <= plan.right for x in words[:plan.votes])
            total += plan.votes * (words[-1] <= plan.inner[0]) if words[-1] <= plan.inner[1] else hits
        last = philox_loop(seed, (task % chunk, plan.groups * plan.calls, task // chunk, 0))[3]
        total = n * r * (last <= plan.outer[0]) if last <= plan.outer[1] else total
        won, tied = won + (2 * total > n * r), tied + (2 * total == n * r)
    return won, tied


@pytest.mark.parametrize(("world", "n", "r"), CASES, ids=str)
def test_counts_are_those_of_a_plain_loop(world, n, r):
    seed = 5 + 2**40
    assert count_votes(world, 150, n, r, seed) == counted(world, 150, n, r, seed)


@pytest.mark.parametrize(("world", "n", "r"), CASES, ids=str)
def test_counts_follow_the_closed_form(world, n, r):
    won, tied = count_votes(world, 40_000, n, r, seed=3)
    close((won + tied / 2) / 40_000, world.phi_mas(n, r), 40_000)


def test_tasks_beyond_one_launch_have_draws_of_their_own(monkeypatch):
    world, whole = CondorcetWorld(0.6, 0.1, 0.5), count_votes(CondorcetWorld(0.6, 0.1, 0.5), 200, 3, 3)
    monkeypatch.setattr(worlds, "_CHUNK", 64)
    assert count_votes(world, 200, 3, 3) == counted(world, 200, 3, 3, 0, 64) != whole
    assert count_votes(world, 64, 3, 3) == counted(world, 64, 3, 3, 0)
    assert count_votes(world, 5000, 3, 3, seed=1) != count_votes(world, 5000, 3, 3, seed=2)


def test_votes_that_are_never_right_win_nothing():
    assert count_votes(CondorcetWorld(0.0, 0.5, 0.5), 100, 4, 2) == (0, 0)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(worlds, "_why_no_gpu", lambda: "there is no GPU")
    with pytest.raises(ValueError, match="device 'cuda' is not usable here: there is no GPU"):
        count_votes(CondorcetWorld(0.6), 10, 3, device="cuda")


def test_the_reason_is_the_first_missing_thing(monkeypatch):
    import sys

    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert worlds._why_no_gpu() == "the package triton is not installed"
    monkeypatch.setitem(sys.modules, "triton", torch)
    assert worlds._why_no_gpu() == "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worlds._why_no_gpu() is None


def triton_device():
    """Where the kernel can run: a GPU, the processor by Triton's interpreter, or nowhere."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError:
        return None
    return "cuda" if torch.cuda.is_available() else "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


@pytest.fixture
def _index_of_arrays(monkeypatch):
    """Triton 3.6's interpreter takes int() of an array with one entry, which numpy refuses from 2.4 on."""
    if triton_device() == "cpu":
        from triton.runtime import interpreter
        patch = interpreter._patch_lang_tensor

        def repaired(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", repaired)


def test_sizes_of_the_kernel_are_constants_by_the_text_of_their_annotation():
    sizes = ("GROUPS", "VOTES", "CALLS", "INNER", "OUTER", "BLOCK")
    assert worlds._votes_kernel.__annotations__ == dict.fromkeys(sizes, "tl.constexpr")


@pytest.mark.skipif(triton_device() is None, reason="the kernel needs the package triton, and either a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize(("world", "n", "r"), CASES, ids=str)
@pytest.mark.usefixtures("_index_of_arrays")
def test_the_kernel_counts_what_arrays_count(monkeypatch, world, n, r):
    monkeypatch.setattr(worlds, "_CHUNK", 300)  # three launches
    plan, seed = worlds._plan(world, n, r), 9 + 2**35
    found = worlds._count_triton(plan, 700, seed, triton_device(), block=64, programs=3)
    assert found == worlds._count_numpy(plan, 700, seed)


def test_limits_are_signed_words():
    assert [worlds._signed(x) for x in (-1, 0, 2**31 - 1, 2**31, 2**32 - 1)] == [-1, 0, 2**31 - 1, -(2**31), -1]


# --- hidden profile ------------------------------------------------------------------------------------------------


def reader(total, part, window, q):
    """Majority of the used clues, in a plain sum."""
    u = min(1, window / part)
    return sum(math.comb(total, k) * u**k * (1 - u) ** (total - k) * float(plain_majority(k, Fraction(q)))
               for k in range(total + 1))


@pytest.mark.parametrize(("window", "mas", "sas"), [(8, 0.946309, 0.712549), (32, 0.946309, 0.872387), (64, 0.946309, 0.946309)])
def test_known_scores_with_counts(window, mas, sas):
    world = HiddenProfileWorld(64, 0.6, window)
    assert world.phi_mas(8) == pytest.approx(mas, abs=6e-7) and world.phi_sas() == pytest.approx(sas, abs=6e-7)
    assert world.gamma(8) == pytest.approx({8: 1.328, 32: 1.084735, 64: 1.0}[window], abs=6e-4)


@pytest.mark.parametrize(("window", "gamma"), [(8, 1.206), (32, 0.985), (64, 0.908)])
def test_known_gains_with_votes(window, gamma):
    world = HiddenProfileWorld(64, 0.6, window, "votes", 0.05)
    assert world.phi_mas(8) == pytest.approx(0.859514, abs=6e-7)
    assert world.gamma(8) == pytest.approx(gamma, abs=6e-4)


@pytest.mark.parametrize(("clues", "n", "window"), [(12, 3, 2), (12, 4, 3.5), (12, 1, 5), (6, 6, 0), (10, 2, 20)])
def test_readers_are_plain_sums(clues, n, window):
    counts, votes = (HiddenProfileWorld(clues, 0.65, window, *rest) for rest in ((), ("votes", 0.1)))
    assert counts.phi_sas() == pytest.approx(reader(clues, clues, window, 0.65), abs=1e-12)
    assert counts.phi_sas(n) == counts.phi_mas(n) == pytest.approx(reader(clues, clues // n, window, 0.65), abs=1e-12)
    right = reader(clues // n, clues // n, window, 0.65)
    assert votes.phi_mas(n) == pytest.approx(float(plain_majority(n, 0.9 * right + 0.1 * (1 - right))), abs=1e-12)


@quick
@given(st.sampled_from([1, 2, 3, 4, 6, 12, 24]), st.floats(0.5, 1), st.sampled_from(["counts", "votes"]), share)
def test_a_team_never_beats_an_agent_that_uses_every_clue(n, q, message, flip):
    world = HiddenProfileWorld(24, q, 24, message, flip if message == "votes" else 0.0)
    assert world.gamma(n) <= 1 + 1e-12
    if message == "counts":
        assert world.gamma(n) == 1.0


@quick
@given(st.sampled_from([1, 2, 4, 8, 16]), st.floats(0, 64), st.floats(0.5, 1))
def test_an_agent_with_a_running_count_is_as_good_as_the_team(n, window, q):
    assert HiddenProfileWorld(64, q, window).gamma(n, chunks=n) == 1.0


@pytest.mark.parametrize("world", [HiddenProfileWorld(24, 0.6, 6), HiddenProfileWorld(24, 0.6, 6, "votes", 0.1),
                                   HiddenProfileWorld(24, 0.6, 40, "votes"), HiddenProfileWorld(24, 0.6, 0)], ids=str)
def test_decisions_of_readers_follow_the_closed_form(world):
    mas, sas = world.sample(20_000, 4, np.random.default_rng(2))
    assert mas.dtype == sas.dtype == np.int8 and mas.shape == sas.shape == (20_000,)
    close(mas.mean(), world.phi_mas(4), 20_000)
    close(sas.mean(), world.phi_sas(), 20_000)


def test_both_systems_read_the_same_clues():
    mas, sas = HiddenProfileWorld(25, 0.6, 25).sample(500, 5, np.random.default_rng(0))
    assert (mas == sas).all()


# --- relay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "value"), [(1, 0.865902), (2, 0.827176), (4, 0.750997), (8, 0.602989)])
def test_known_relays(n, value):
    world = RelayWorld(8, 0.5, 150, 60, 0.03)
    assert world.phi_mas(4000, n) == pytest.approx(value, abs=6e-7)
    assert world.gamma(4000, n) == pytest.approx(value / 0.865902, abs=2e-6)


@quick
@given(st.integers(1, 9), share, st.floats(1, 500), st.floats(0, 90), share, st.integers(1, 8))
def test_messages_never_pay(depth, s0, tau, message, loss, n):
    world = RelayWorld(depth, s0, tau, message, loss)
    assert world.phi_mas(2000, n) <= world.phi_sas(2000)


def test_free_messages_cost_nothing():
    assert RelayWorld(8, 0.5, 150).gamma(4000, 8) == 1.0
    assert RelayWorld(3, 0.5, 150).success(0) == 0.5 and RelayWorld(3, 1.0, 150).phi_sas(0) == 1.0


def tries(s, detect, alarm, retries):
    """Chance of success, by following every outcome of the tries."""
    if retries == 0:
        return s
    return s * (1 - alarm) + (s * alarm + (1 - s) * detect) * tries(s, detect, alarm, retries - 1)


@quick
@given(share, share, share, st.integers(0, 6))
def test_a_verified_step_follows_its_tree_of_outcomes(s, detect, alarm, retries):
    found = RelayWorld(3, 0.5, 150).verified(s, detect, alarm, retries)
    assert found == pytest.approx(tries(s, detect, alarm, retries), abs=1e-12)


def test_a_verifier_that_refuses_everything_leaves_the_last_try():
    world = RelayWorld(3, 0.5, 150)
    assert world.verified(0.3, 1, 1, 4) == 0.3
    assert world.verified(0.3, 1, 0, 60) == pytest.approx(1, abs=1e-8)


def test_drawn_relays_follow_the_closed_form():
    world = RelayWorld(6, 0.4, 150, 30, 0.05)
    mas, sas = world.sample(20_000, 2000, 4, np.random.default_rng(3))
    assert mas.dtype == sas.dtype == np.int8
    close(mas.mean(), world.phi_mas(2000, 4), 20_000)
    close(sas.mean(), world.phi_sas(2000), 20_000)


# --- search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "value"), [(2, 1.333333), (10, 1.535340), (100, 1.577367)])
def test_known_gains_of_a_blackboard(k, value):
    assert SearchWorld(k).gamma(k) == pytest.approx(value, abs=1.1e-6)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 3), (2, 3), (3, 2), (4, 4), (4, 6)])
def test_searches_by_every_sequence_of_probes(k, n):
    world = SearchWorld(k)
    assert world.phi_sas(n) == pytest.approx(np.mean([0 in probes for probes in product(range(k), repeat=n)]), abs=1e-12)
    assert world.phi_mas(n) == pytest.approx(np.mean([0 in order[:n] for order in permutations(range(k))]), abs=1e-12)


def test_the_ceiling_is_approached_from_below_and_met_at_as_many_probes_as_candidates():
    peaks = [SearchWorld(k).gamma(k) for k in (1, 2, 5, 30, 1000, 10**6)]
    assert all(a < b for a, b in pairwise(peaks)) and peaks[-1] < math.e / (math.e - 1)
    assert peaks[-1] == pytest.approx(math.e / (math.e - 1), abs=1e-6)
    assert max(range(1, 60), key=SearchWorld(20).gamma) == 20
    assert SearchWorld(5).phi_sas(0) == SearchWorld(5).phi_mas(0) == SearchWorld(1).phi_sas(0) == 0


def test_drawn_searches_follow_the_closed_form():
    world = SearchWorld(12)
    mas, sas = world.sample(20_000, 8, np.random.default_rng(4))
    assert mas.dtype == sas.dtype == np.int8
    close(mas.mean(), world.phi_mas(8), 20_000)
    close(sas.mean(), world.phi_sas(8), 20_000)
    assert world.sample(50, 12, np.random.default_rng(0))[0].all() and not world.sample(50, 0, np.random.default_rng(0))[0].any()


# --- tree ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "slope"), [(3, 1.5), (5, 1.875), (7, 2.1875), (9, 2.4609375)])
def test_known_slopes(b, slope):
    assert TreeWorld(b).alpha == slope
    assert TreeWorld(b).step(1e-9) == pytest.approx(slope * 1e-9, rel=1e-9)


def test_the_slope_of_a_wide_node_is_a_number():
    for b in (1025, 4001):  # b C(b-1, (b-1)/2) / 2^(b-1) grows like sqrt(2 b / pi)
        assert TreeWorld(b).alpha == pytest.approx(math.sqrt(2 * b / math.pi), rel=1 / b)
        assert TreeWorld(b, 0.5, 0.25).alpha == pytest.approx(0.5 * (0.25 + 0.75 * TreeWorld(b).alpha), rel=1e-12)


@quick
@given(st.sampled_from([3, 5, 9, 31]), share, share, st.floats(-1, 1))
def test_a_level_is_a_majority_of_flipped_messages(b, g, rho, x):
    majority = 2 * majority_accuracy(b, (1 + g * x) / 2) - 1
    assert TreeWorld(b, g, rho).step(x) == pytest.approx(rho * g * x + (1 - rho) * majority, abs=1e-12)


@pytest.mark.parametrize(("g", "x"), [(0.7, 0.539949), (0.9, 0.979908), (2 / 3 + 1e-9, None), (1.0, 1.0)])
def test_known_fixed_points(g, x):
    exact = math.sqrt((3 * g - 2) / g**3)
    assert TreeWorld(3, g).fixed_point() == pytest.approx(exact, abs=1e-9 if x else 1e-6)
    assert x is None or exact == pytest.approx(x, abs=6e-7)


@quick
@given(st.sampled_from([3, 5, 7]), share, share)
def test_a_fixed_point_is_fixed_and_everything_above_falls(b, g, rho):
    world = TreeWorld(b, g, rho)
    x = world.fixed_point()
    assert world.step(x) == pytest.approx(x, abs=1e-12)
    assert (x > 0) == (world.alpha > 1 or (g == 1))
    assert all(world.step(y) <= y + 1e-12 for y in np.linspace(x, 1, 20))


def test_washed_out_signals_and_trees_that_copy():
    assert TreeWorld(3, 2 / 3).fixed_point() == TreeWorld(3, 0.6).fixed_point() == TreeWorld(5, 0.0).fixed_point() == 0.0
    assert TreeWorld(3, 1.0, 1.0).fixed_point() == 1.0 and TreeWorld(3, 0.99, 1.0).fixed_point() == 0.0
    assert TreeWorld(3).exponent == pytest.approx(0.369070, abs=6e-7) and TreeWorld(3, 0.0).exponent == -math.inf


@pytest.mark.parametrize("world", [TreeWorld(3, 0.8, 0.2), TreeWorld(5, 0.7), TreeWorld(3, 1.0, 1.0)], ids=str)
def test_drawn_trees_follow_the_closed_form(world):
    found = world.sample(0.6, 3, 5000, np.random.default_rng(5))
    assert found.dtype == np.int8
    close(found.mean(), world.accuracy(0.6, 3), 5000)
    assert world.accuracy(0.6, 0) == 0.6 and world.accuracy(0.4, 4) == pytest.approx(1 - world.accuracy(0.6, 4), abs=1e-12)


# --- debate --------------------------------------------------------------------------------------------------------

ARROWS = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2), (2, 2)])


def debated(world, rounds):
    """Law of the beliefs after some rounds, by every sequence of answers."""
    hears = [[j for j in range(world.n_agents) if j != i and (world.graph.has_edge(j, i))] for i in range(world.n_agents)]
    start = tuple((world.concentration * world.p, world.concentration * (1 - world.p)) for _ in range(world.n_agents))
    states = [(1.0, start)]
    for _ in range(rounds):
        after = []
        for chance, counts in states:
            beliefs = [a / (a + b) for a, b in counts]
            for said in product((0, 1), repeat=world.n_agents):
                weight = chance * math.prod(b if y else 1 - b for y, b in zip(said, beliefs, strict=True))
                heard = [(sum(said[j] for j in who), len(who)) for who in hears]
                after.append((weight, tuple((a + (1 + world.beta) * h, b + n - h)
                                            for (a, b), (h, n) in zip(counts, heard, strict=True))))
        states = after
    return [(w, np.array([a / (a + b) for a, b in counts])) for w, counts in states]


@pytest.mark.parametrize("graph", [nx.path_graph(3), nx.complete_graph(3), ARROWS], ids=["path", "mesh", "arrows"])
def test_beliefs_keep_their_mean_and_answers_correlate_as_computed(graph):
    world = DebateWorld(0.6, 2.0, 3, graph)
    for rounds in (0, 1, 2):
        law = debated(world, rounds)
        mean = sum(w * b for w, b in law)
        assert mean == pytest.approx(0.6, abs=1e-12)
        cov = sum(w * np.outer(b - 0.6, b - 0.6) for w, b in law) / 0.24
        np.fill_diagonal(cov, 1)
        assert world.correlation(2)[rounds] == pytest.approx(cov, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_drawn_debates_follow_the_enumerated_law(beta):
    world = DebateWorld(0.6, 2.0, 3, ARROWS, beta)
    beliefs = world.simulate(2, 20_000, np.random.default_rng(6))
    assert beliefs.shape == (3, 20_000, 3) and beliefs.dtype == np.float64 and (beliefs[0] == 0.6).all()
    for t in (1, 2):
        law = debated(world, t)
        mean = sum(w * b for w, b in law)
        spread = np.sqrt(sum(w * (b - mean) ** 2 for w, b in law) / 20_000)
        assert (abs(beliefs[t].mean(0) - mean) <= 5 * spread).all()
        assert beliefs[t].std(0) == pytest.approx(spread * math.sqrt(20_000), rel=0.05)


def test_an_edge_without_direction_goes_both_ways_and_nobody_hears_itself():
    loop = nx.Graph([(0, 1), (1, 1)])
    assert (DebateWorld(0.6, 1, 2, loop)._ears() == [[0, 1], [1, 0]]).all()
    assert (DebateWorld(0.6, 1, 3, ARROWS)._ears() == [[0, 0, 1], [1, 0, 0], [1, 1, 0]]).all()
    alone = DebateWorld(0.6, 1, 2, nx.empty_graph(2))
    assert (alone.simulate(3, 4, np.random.default_rng(0)) == 0.6).all()
    assert (alone.correlation(3) == np.eye(2)).all()


# --- planted factors -----------------------------------------------------------------------------------------------


def test_the_reference_world_has_the_written_shapley_values():
    world = FactorialWorld.reference()
    assert world.names == ("topology", "role", "scale", "protocol", "diversity")
    assert world.shapley() == pytest.approx([0.225, 0.175, 0, -0.06, 0.14], abs=1e-12)
    assert world.phi([0] * 5) == pytest.approx(0.35) and world.log_gamma([0] * 5) == pytest.approx(math.log(0.35 / 0.45))
    assert world.log_gamma([1] * 5) - world.log_gamma([0] * 5) == pytest.approx(0.48, abs=1e-12)


def test_shapley_values_are_means_over_orders():
    world = FactorialWorld(["a", "b", "c", "d"], 0.2, [0.1, -0.2, 0.3, 0],
                           {("a", "b"): 0.2, ("a", "c", "d"): -0.15, ("a", "b", "c", "d"): 0.1}, 0.3, 0.2)
    total = np.zeros(4)
    for order in permutations(range(4)):
        x = np.zeros(4)
        for i in order:
            before, x[i] = world.log_gamma(x), 1
            total[i] += world.log_gamma(x) - before
    assert world.shapley() == pytest.approx(total / 24, abs=1e-12)


def test_drawn_scores_follow_the_planted_means():
    world, X = FactorialWorld.reference(), np.array([[0, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    given = X.copy()
    Y, sas = world.sample(X, 20_000, np.random.default_rng(7))
    assert Y.shape == (20_000, 3) and sas.shape == (20_000,) and (X == given).all()
    assert set(np.unique(Y)) == set(np.unique(sas)) == {0.0, 1.0}
    for found, x in zip(Y.T, X, strict=True):
        close(found.mean(), world.phi(x), 20_000)
    close(sas.mean(), 0.45, 20_000)
    product_mean = world.phi(X[0]) * 0.45 * (1 + 0.5**2 / 3)  # a task's ease is shared
    close((Y[:, 0] * sas).mean(), product_mean, 20_000)


def planted(**changes):
    fields = {"names": ("a", "b"), "base": 0.3, "main": (0.1, 0.2), "interactions": {("a", "b"): 0.1}, "phi_sas": 0.4, "spread": 0.2}
    return FactorialWorld(**(fields | changes))


@pytest.mark.parametrize(("changes", "text"), [
    ({"names": ("a", "a")}, r"names must be 1 to 20 different factors, got \('a', 'a'\)"),
    ({"main": (0.1,)}, "main has 1 entries, names 2: they must be equal"),
    ({"interactions": {("a",): 0.1}}, r"an interaction names at least two different factors, got \('a',\)"),
    ({"interactions": {("a", "a"): 0.1}}, r"at least two different factors, got \('a', 'a'\)"),
    ({"base": 1.2}, r"base must be in \[0, 1\], got 1.2"),
    ({"base": 0.0}, "base and phi_sas must be > 0, got 0.0 and 0.4"),
    ({"spread": 1.5}, r"spread must be in \[0, 1\], got 1.5"),
    ({"base": 0.7}, r"success probability above 1: 1\.25"),
    ({"phi_sas": 0.9}, r"success probability above 1: 1\.08"),
    ({"main": (math.nan, 0.0)}, "success probability above 1: nan")])
def test_planted_worlds_that_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        planted(**changes)


def test_the_largest_probability_is_looked_for_among_all_configurations():
    planted(base=0.5, main=(0.4, -0.4), interactions={})
    with pytest.raises(ValueError, match="success probability above 1"):
        planted(base=0.6, main=(0.4, -0.4), interactions={})


def test_an_unknown_factor_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match="unknown factor 'z'; known: a, b"):
        planted(interactions={("a", "z"): 0.1})


@pytest.mark.parametrize(("x", "text"), [
    ([1, -1], "a configuration holds 0 and 1 only, got -1"), ([0.5, 0], "holds 0 and 1 only, got 0.5"),
    ([math.nan, 0], "holds 0 and 1 only, got nan"),
    ([1, 0, 1], r"a configuration has 2 entries, got an array of shape \(1, 3\)")])
def test_configurations_that_are_refused(x, text):
    for call in (planted().phi, planted().log_gamma, lambda x: planted().sample([x], 5, np.random.default_rng())):
        with pytest.raises(ValueError, match=text):
            call(x)


def test_a_planted_world_keeps_its_own_copy():
    names, main, pairs = ["a", "b"], [0.1, 0.2], {("a", "b"): 0.1}
    world = planted(names=names, main=main, interactions=pairs)
    before = world.phi([1, 1])
    names[0], main[0], pairs[("a", "b")] = "z", 5.0, 3.0
    assert world.phi([1, 1]) == before and world.names == ("a", "b")


# --- measurement ---------------------------------------------------------------------------------------------------


def test_every_closed_form_is_fast():
    rows = {row["name"]: row["measured"] for row in worlds._form_rows(15)}
    assert list(rows) == [f"closed_form_{name}" for name in worlds._closed_forms()] and len(rows) == 13
    assert 0 < max(rows.values()) < 5  # goal 1 ms; the run-time type checks take their share


def test_rows_of_the_vote_simulation_have_a_peer_and_an_error():
    first, second = worlds._vote_rows("cpu", 2000, 2)
    assert first["name"] == "votes_independent_cpu_2000" and first["measured"] > 0 and first["peer"] > 0
    assert second["name"] == "votes_shared_cpu_2000" and "peer" not in second
    assert all(abs(row["standard_errors_from_closed_form"]) < 5 for row in (first, second))
    json.dumps([first, second])


def test_torch_counts_the_same_share():
    import torch
    torch.manual_seed(0)
    close(worlds._eager(30_000, 15, 0.6, "cpu", most=7000), majority_accuracy(15, 0.6), 30_000)


def test_the_measurement_on_a_processor_has_all_rows(monkeypatch):
    monkeypatch.setattr(worlds, "_form_rows", lambda: [{"name": "form"}])
    monkeypatch.setattr(worlds, "_vote_rows", lambda *given: [{"name": given}])
    assert worlds.measure("cpu") == [{"name": "form"}, {"name": ("cpu", 2**19, 5)}]
