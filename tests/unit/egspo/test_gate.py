"""Entropy gate: the exact quantile against numpy and torch, ties, masks, scopes, two real processes, and bad inputs by message."""
import math
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collai.egspo import gate as module
from collai.egspo.gate import RunningQuantile, attenuation, entropy_gate
from collai.rl.stats import TokenStats

LEVELS = st.sampled_from([0, 0.07, 0.25, 0.5, 0.8, 0.9, 1]) | st.floats(0, 1)


def case(seed: int, rows: int = 4, columns: int = 9, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies with garbage under the mask, and the mask; some rows are empty."""
    g = torch.Generator().manual_seed(seed)
    H = torch.randint(0, 4, (rows, columns), generator=g) / 4 if ties else 3 * torch.rand(rows, columns, generator=g)
    mask = torch.rand(rows, columns, generator=g) < (0.3, 0.7, 1.0)[seed % 3]
    if seed % 4 == 0:
        mask[seed % rows] = False
    junk = torch.tensor([math.nan, math.inf, -math.inf, -7.0])[torch.randint(4, mask.shape, generator=g)]
    return torch.where(mask, H, junk), mask


def rank_of(level: float, n: int) -> int:
    """Lowest rank, from 0, that is at or above the quantile's place; whole places are whole."""
    place = level * (n - 1)
    return round(place) if abs(place - round(place)) < 1e-12 * max(n, 1) else math.ceil(place)


def by_sorting(H: list[float], level: float) -> list[float]:
    """Gate of one group in Python numbers."""
    cut = sorted(H)[rank_of(level, len(H))] if H else 0
    return [float(h >= cut) for h in H]


def by_loop(H: torch.Tensor, mask: torch.Tensor, level: float, scope: str) -> list[list[float]]:
    """Gate of a batch in Python numbers."""
    out = [[0.0] * H.shape[1] for _ in H]
    places = [[(i, t) for t in range(H.shape[1]) if mask[i, t]] for i in range(len(H))]
    for group in (places if scope == "sequence" else [[place for row in places for place in row]]):
        for (i, t), g in zip(group, by_sorting([float(H[i, t]) for i, t in group], level), strict=True):
            out[i][t] = g
    return out


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 8, width=32) | st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40), LEVELS, st.integers(0, 5))
@example([1.0, 2.0], 1.0, 0)
@example([0.25] * 7, 0.3, 2)
def test_threshold_is_the_quantile_of_numpy_and_torch_among_sentinels(values, level, sentinels):
    x = torch.tensor(values)
    padded = torch.cat((x, torch.full((sentinels,), -1.0)))[torch.randperm(len(x) + sentinels, generator=torch.Generator().manual_seed(1))]
    tau, cut = module._threshold(padded, len(x), level)
    assert tau == pytest.approx(np.quantile(x.double().numpy(), level), rel=1e-9, abs=1e-9)
    assert tau == pytest.approx(float(torch.quantile(x, level)), rel=1e-4, abs=1e-5)
    assert cut in values and (x >= cut).float().tolist() == by_sorting(x.tolist(), level)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.data())
def test_both_ways_to_select_give_a_value_and_the_next(values, data):
    place = data.draw(st.integers(0, len(values) - 1))
    flat, ordered = torch.tensor(values, dtype=torch.float32), [*sorted(values), math.inf]
    for select in (module._select, module._select_top):
        assert select(flat, place) == (ordered[place], ordered[place + 1])
    assert flat.tolist() == values


@pytest.mark.parametrize("place", [0, 1, 2500, 3999, 4998, 4999])
def test_a_selection_from_many_values_is_that_of_a_sort(place):
    flat = torch.rand(5000, generator=torch.Generator().manual_seed(place))
    want = (*flat.sort().values.tolist(), math.inf)[place:place + 2]
    assert module._select(flat, place) == module._select_top(flat, place) == want


def test_whole_places_are_not_lost_to_binary_rounding():
    x = torch.arange(101.0)[None]
    for percent in range(101):
        assert entropy_gate(x, torch.ones(1, 101), quantile=percent / 100).sum() == 101 - percent
        assert entropy_gate(x, torch.ones(1, 101), quantile=percent / 100, scope="sequence").sum() == 101 - percent


def test_more_tokens_than_torch_quantile_takes():
    n = 2**24 + 7
    order = (torch.arange(n) * 7919) % n  # every number below n once
    x = (order + 0x3F800000).int().view(torch.float32)[None]  # the n next floats from 1 on: no ties
    gate = entropy_gate(x, torch.ones(1, n, dtype=torch.bool))
    assert torch.equal(gate[0] > 0, order >= math.ceil(0.8 * (n - 1)))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_the_gate_equals_a_plain_loop_whatever_stands_under_the_mask(scope, kind):
    for seed in range(60):
        H, mask = case(seed, ties=seed % 2 == 0)
        level = (0, 0.3, 0.5, 0.8, 1)[seed % 5]
        found = entropy_gate(H, mask.to(kind), quantile=level, scope=scope)
        assert found.dtype == torch.float32 and found.tolist() == by_loop(H, mask, level, scope)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 400), LEVELS, st.integers(0, 10**6))
def test_the_share_of_high_tokens_is_one_minus_the_level_up_to_one_token(n, level, seed):
    x = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float()[None]
    high = float(entropy_gate(x, torch.ones(1, n), quantile=level).sum())
    assert high >= 1 and (1 - level) * (n - 1) - 1e-6 < high <= (1 - level) * (n - 1) + 1 + 1e-6


def test_ties_with_the_threshold_are_high():
    x = torch.tensor([[0.5, 0.5, 0.5, 0.1, 0.9]])
    assert entropy_gate(x, torch.ones(1, 5), quantile=0.5).tolist() == [[1, 1, 1, 0, 1]]
    assert entropy_gate(x * 0 + 0.3, torch.ones(1, 5)).tolist() == [[1] * 5]


def test_the_ends_of_the_level():
    H, mask = case(5)
    assert torch.equal(entropy_gate(H, mask, quantile=0), mask.float())
    assert torch.equal(entropy_gate(H, mask, quantile=1), (mask & (H == H[mask].max())).float())


@pytest.mark.parametrize("scope", ["batch", "sequence", "running"])
def test_without_valid_tokens_the_gate_is_zero(scope):
    for shape in ((2, 3), (0, 3), (2, 0)):
        state = RunningQuantile(0.8) if scope == "running" else None
        gate = entropy_gate(torch.full(shape, math.nan), torch.zeros(shape), scope=scope, state=state)
        assert gate.shape == shape and gate.sum() == 0 and gate.dtype == torch.float32
        assert state is None or state.value is None


def test_rounding_below_zero_counts_as_zero():
    x = torch.tensor([[-0.0, -1e-7, 0.0, -9e-7]])
    assert entropy_gate(x, torch.ones(1, 4), quantile=0.9).tolist() == [[1] * 4]
    assert entropy_gate(x, torch.ones(1, 4), quantile=1, scope="sequence").tolist() == [[1] * 4]
    x[0, 2] = 0.5
    assert entropy_gate(x, torch.ones(1, 4), quantile=0.5).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_compared_as_they_are(dtype):
    H, mask = case(7)
    H = H.to(dtype)
    for scope in ("batch", "sequence"):
        assert torch.equal(entropy_gate(H, mask, scope=scope), entropy_gate(H.double(), mask, scope=scope))
    near = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert entropy_gate(near, torch.ones(1, 2), quantile=0.9).tolist() == [[0, 1]]


@pytest.mark.parametrize("scope", ["batch", "sequence", "running"])
def test_a_soft_gate_is_a_logistic_function_of_the_distance(scope):
    H, mask = case(8)
    H[0] = torch.where(mask[0], H[0], 1.0)
    state = RunningQuantile(0.6) if scope == "running" else None
    found = entropy_gate(H, mask, quantile=0.6, scope=scope, soft=0.25, state=state)
    for i in range(len(H)):
        peers = H[i][mask[i]] if scope == "sequence" else H[mask]
        for t in range(H.shape[1]):
            tau = np.quantile(peers.double().numpy(), 0.6) if len(peers) else 0
            want = 1 / (1 + math.exp(-(float(H[i, t]) - tau) / 0.25)) if mask[i, t] else 0
            assert found[i, t].item() == pytest.approx(want, abs=1e-6)


def test_nothing_is_changed_and_no_gradient_flows():
    H, mask = case(1)
    H.requires_grad_()
    before = H.detach().clone()
    for options in ({}, {"scope": "sequence"}, {"soft": 0.1}):
        assert not entropy_gate(H, mask, **options).requires_grad
    assert torch.equal(before.nan_to_num(), H.detach().nan_to_num())
    logp = torch.zeros(1, 2, requires_grad=True)
    for phi in (0.5, "chord", "chord-state"):
        assert not attenuation(logp, phi, moments=(logp + 1, logp)).requires_grad


def test_the_running_average_has_its_closed_form_and_starts_with_the_first_batch():
    state, d = RunningQuantile(0.75, decay=0.6), 0.6
    assert math.isnan(state.update(torch.ones(1, 2), torch.zeros(1, 2)))
    quantiles, values = [], []
    for seed in range(12):
        H, mask = case(seed + 20)
        quantiles.append(np.quantile(H[mask].double().numpy(), 0.75))
        values.append(state.update(H, mask))
        want = d**seed * quantiles[0] + sum((1 - d) * d ** (seed - j) * quantiles[j] for j in range(1, seed + 1))
        assert values[-1] == pytest.approx(want, rel=1e-9)
    assert state.update(torch.ones(1, 2), torch.zeros(1, 2)) == values[-1] == state.value


def test_the_running_scope_updates_and_then_compares():
    H, mask = case(30)
    state, twin = RunningQuantile(0.5), RunningQuantile(0.5)
    state.value = twin.value = 0.4
    gate = entropy_gate(H, mask, quantile=0.5, scope="running", state=state)
    assert twin.update(H, mask) == state.value != 0.4
    assert torch.equal(gate, (mask & (H >= state.value)).float())
    first = RunningQuantile(0.5)
    assert torch.equal(entropy_gate(H, mask, quantile=0.5, scope="running", state=first), entropy_gate(H, mask, quantile=0.5))


def test_equal_entropies_stay_high_under_the_running_average():
    state, x = RunningQuantile(0.8), torch.full((1, 3), 0.3)
    for _ in range(50):
        assert entropy_gate(x, torch.ones(1, 3), scope="running", state=state).sum() == 3


def test_a_running_average_goes_on_from_its_state():
    state = RunningQuantile(0.8, decay=0.5)
    state.update(*case(3))
    other = RunningQuantile(0.8, decay=0.5)
    other.load_state_dict(state.state_dict())
    assert state.state_dict() == {"quantile": 0.8, "decay": 0.5, "value": state.value}
    assert other.update(*case(4)) == state.update(*case(4)) == state.value
    for wrong, text in ((RunningQuantile(0.7, decay=0.5), "the state has quantile 0.8, this average 0.7"),
                        (RunningQuantile(0.8), "the state has decay 0.5, this average 0.9")):
        with pytest.raises(ValueError, match=text):
            wrong.load_state_dict(state.state_dict())


def one_of_two(rank: int, port: int, queue: multiprocessing.Queue) -> None:
    """One process: gates of three batches, whose valid tokens are spread unevenly, joined with accelerate."""
    from accelerate import PartialState
    from accelerate.utils import gather
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    PartialState._reset_state()
    assert PartialState(cpu=True, backend="gloo").num_processes == 2
    state, found = RunningQuantile(0.8), []

    def equal(x: torch.Tensor) -> torch.Tensor:
        sizes = gather(torch.tensor([x.numel()])).tolist()
        assert x.ndim == 1 and sizes == [sizes[0]] * 2 and sizes[0], "collectives need flat tensors of one length"
        return gather(x)

    for H, mask in spread(rank):
        found += [entropy_gate(H, mask, gather=equal), entropy_gate(H, mask, quantile=0.1, soft=0.3, gather=equal),
                  entropy_gate(H, mask, scope="running", state=state, gather=equal)]
    queue.put((rank, [x.tolist() for x in found], state.value))


def spread(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a process: other shapes and counts in each; none at all in the first one of rank 1; none anywhere at last."""
    batches = [case(seed, rows=2 + rank, columns=4 + 3 * rank) for seed in (1, 2, 5)]
    H, mask = batches[0]
    last = batches[2][0], torch.zeros_like(batches[2][1])
    return [(H, mask & (rank == 0)), batches[1], batches[2], last]


def test_two_processes_share_a_threshold():
    pytest.importorskip("accelerate")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    work = [context.Process(target=one_of_two, args=(rank, port, queue)) for rank in range(2)]
    for process in work:
        process.start()
    try:
        (_, first, tau), (_, second, other) = sorted(queue.get(timeout=60) for _ in range(2))
    finally:
        for process in work:
            process.join(timeout=10)
            process.kill()
    assert tau == other
    state = RunningQuantile(0.8)
    for k, both in enumerate(zip(spread(0), spread(1), strict=True)):
        H, mask = (torch.cat([x.flatten() for x in pair])[None] for pair in zip(*both, strict=True))
        wants = (entropy_gate(H, mask), entropy_gate(H, mask, quantile=0.1, soft=0.3), entropy_gate(H, mask, scope="running", state=state))
        for j, want in enumerate(wants):
            parts = [torch.tensor(x[3 * k + j]).flatten() for x in (first, second)]
            assert torch.allclose(torch.cat(parts)[None], want, atol=0 if j != 1 else 1e-7, rtol=0)
    assert tau == state.value


def test_attenuations_are_their_formulas():
    g = torch.Generator().manual_seed(0)
    pi = torch.randn(6, 5, generator=g, dtype=torch.float64).softmax(1)
    assert attenuation(pi.log(), "chord").tolist() == [pytest.approx([p * (1 - p) for p in row]) for row in pi.tolist()]
    moments = tuple(pi.pow(k).sum(1, keepdim=True) for k in (2, 3))
    state = attenuation(pi.log()[:, :1], "chord-state", moments=moments)
    assert torch.allclose(state, (pi * attenuation(pi.log(), "chord")).sum(1, keepdim=True), atol=1e-15)
    assert attenuation(pi.bfloat16(), 1).dtype == torch.float32 and attenuation(pi, 1).dtype == torch.float64
    assert (attenuation(pi, 0.3) == 0.3).all() and (attenuation(pi.half(), 1) == 1).all()
    edge = torch.tensor([[1e-6, 0.0, -math.inf]])  # probability above 1 by rounding, 1, 0
    assert attenuation(edge, "chord").tolist() == [[0, 0, 0]]
    tiny = torch.tensor([[1.0, 0.5, 0.0]])
    assert attenuation(edge, "chord-state", moments=(tiny, tiny + 1e-7)).tolist() == [[0, 0, 0]]


OK = torch.ones(2, 3)


@pytest.mark.parametrize(("change", "message"), [
    (dict(quantile=1.01), r"quantile must be in \[0, 1\], got 1.01"), (dict(quantile=-0.1), "quantile .* got -0.1"),
    (dict(quantile=math.nan), "quantile .* got nan"), (dict(scope="row"), "unknown scope 'row', use one of 'batch', 'sequence', 'running'"),
    (dict(soft=0), "soft must be positive, got 0"), (dict(soft=math.nan), "soft must be positive, got nan"),
    (dict(scope="running"), "scope 'running' and a state belong together, got scope 'running' and state None"),
    (dict(state=RunningQuantile(0.8)), "scope 'running' and a state belong together, got scope 'batch'"),
    (dict(scope="running", state=RunningQuantile(0.7)), "quantile is 0.8, that of the state 0.7: they must be equal"),
    (dict(entropy=-OK), r"entropy must be non-negative \(got min -1\)"),
    (dict(entropy=-2e-6 * OK), r"entropy must be non-negative \(got min -2e-06\)"),
    (dict(entropy=OK * math.nan), "entropy contain non-finite values at row 0, column 0"),
    (dict(entropy=torch.tensor([[1, 1, 1], [1, math.inf, 1]])), "entropy contain non-finite values at row 1, column 1"),
    (dict(entropy=OK[:, :2]), r"entropy has shape \(2, 2\), mask \(2, 3\): they must be equal"),
    (dict(mask=2 * OK), "mask must contain only 0 and 1"), (dict(mask=OK * math.nan), "mask must contain only 0 and 1"),
    (dict(mask=OK[0], entropy=OK[0]), r"mask must be \(B, T\), got shape \(3,\)")])
def test_the_gate_refuses_bad_input_and_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        entropy_gate(**(dict(entropy=OK, mask=OK) | change))


def test_what_is_no_tensor_is_refused_with_its_fields():
    stats = TokenStats(entropy=OK)
    for call in (lambda: entropy_gate(stats, OK), lambda: attenuation(stats, 0.1), lambda: RunningQuantile(0.5).update(stats, OK)):
        with pytest.raises(TypeError, match=r"(entropy|logp) must be a torch.Tensor, got TokenStats; take one of its fields: .logp, .entropy"):
            call()
    with pytest.raises(TypeError, match="mask must be a torch.Tensor, got list"):
        entropy_gate(OK, [[1, 1, 1]] * 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: RunningQuantile(2), r"quantile must be in \[0, 1\], got 2"),
    (lambda: RunningQuantile(0.5, decay=1), r"decay must be in \[0, 1\), got 1"),
    (lambda: RunningQuantile(0.5, decay=-0.1), "decay .* got -0.1"),
    (lambda: RunningQuantile(0.5).update(-OK, OK), "entropy must be non-negative"),
    (lambda: RunningQuantile(0.5).update(OK, OK / 2), "mask must contain only 0 and 1"),
    (lambda: attenuation(OK, 1.1), r"phi must be in \[0, 1\], got 1.1"), (lambda: attenuation(OK, math.nan), "phi .* got nan"),
    (lambda: attenuation(OK, "mean"), r"unknown phi 'mean', use a number in \[0, 1\] or one of 'chord', 'chord-state'"),
    (lambda: attenuation(OK, "chord-state"), r"phi 'chord-state' needs moments=\(sum_sq, sum_cube\)"),
    (lambda: attenuation(OK, "chord-state", moments=(OK, OK[:1])), r"moments have shape \(1, 3\), logp \(2, 3\)")])
def test_the_other_functions_refuse_bad_input_and_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("options, text", [
    (dict(quantile="0.8"), "quantile must be a number, got '0.8'"), (dict(quantile=None), "quantile must be a number, got None"),
    (dict(soft="1"), "soft must be a number, got '1'"),
    (dict(scope="running", state={"value": 1.0}), "state must be a RunningQuantile, got dict")])
def test_options_of_another_type_are_named(options, text):
    with pytest.raises(TypeError, match=text):
        entropy_gate.__wrapped__(torch.ones(1, 2), torch.ones(1, 2), **options)


@pytest.mark.parametrize("phi, moments, text", [
    (None, None, "phi must be a number, got None"), (torch.tensor(0.1), None, "phi must be a number, got tensor"),
    ("chord-state", torch.ones(2, 1, 2), r"moments must be the pair \(sum_sq, sum_cube\), got Tensor"),
    ("chord-state", (), r"moments must be the pair \(sum_sq, sum_cube\), got tuple"),
    ("chord-state", ([1.0], [1.0]), "sum_sq must be a torch.Tensor, got list")])
def test_attenuations_and_moments_of_another_type_are_named(phi, moments, text):
    with pytest.raises(TypeError, match=text):
        getattr(module._check_phi, "__wrapped__", module._check_phi)(phi, moments)


@pytest.mark.parametrize("state, text", [
    ({"quantile": 0.8, "value": 1.0}, "the state has no 'decay'"),
    ({"quantile": 0.8, "decay": 0.9, "value": math.nan}, "must be an entropy or None, got nan"),
    ({"quantile": 0.8, "decay": 0.9, "value": -4.0}, "must be an entropy or None, got -4.0")])
def test_a_state_that_is_no_state_is_refused(state, text):
    average = RunningQuantile(0.8)
    with pytest.raises(ValueError, match=text):
        average.load_state_dict(state)
    assert average.value is None
