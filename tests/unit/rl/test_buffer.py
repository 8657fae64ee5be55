"""Rollouts: invariants by message, and the laws of select, concat, save and load, bit by bit."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.rl.buffer import Rollouts

OPTIONAL = ("rollout_logp", "entropy", "energy")


def batch(seed: int, rows: int = 4, optional: tuple[str, ...] = OPTIONAL, meta: bool = True) -> Rollouts:
    """A random valid batch: turns of model tokens and tool output, junk where the mask is 0."""
    g = torch.Generator().manual_seed(seed)
    p, t = (int(torch.randint(2, 7, (), generator=g)) for _ in range(2))
    prompt = torch.randint(1, p + 1, (rows, 1), generator=g)
    length = torch.randint(0, t + 1, (rows, 1), generator=g)
    there = torch.arange(t) < length
    turn = torch.where(there, torch.randint(0, 2, (rows, t), generator=g).cumsum(1), -1)
    mask = there & (torch.rand(rows, t, generator=g) > 0.3)
    numbers = {name: torch.where(mask, torch.rand(rows, t, generator=g), torch.nan)
               for name in ("rewards", "old_logp", *optional)}
    return Rollouts(prompt_ids=torch.randint(0, 99, (rows, p), generator=g),
                    prompt_mask=(torch.arange(p) >= p - prompt).long(), ids=torch.randint(0, 99, (rows, t), generator=g),
                    mask=mask.long(), uid=[f"p{i // 2}" if i % 3 else i for i in range(rows)], turn=turn,
                    meta={"text": [f"{seed} {i} ü" for i in range(rows)], "n": [{"k": i / 3} for i in range(rows)]} if meta else None,
                    **numbers)


def same(x: Rollouts, y: Rollouts) -> bool:
    """Every field equal bit by bit, NaN included."""
    for name in Rollouts.__dataclass_fields__:
        a, b = getattr(x, name), getattr(y, name)
        if isinstance(a, torch.Tensor):
            if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
                return False
            if a.numpy().tobytes() != b.contiguous().numpy().tobytes():
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


def snapshot(x: Rollouts) -> Rollouts:
    """A deep copy."""
    tensors = {n: v.clone() for n in Rollouts.__dataclass_fields__ if isinstance(v := getattr(x, n), torch.Tensor)}
    return replace(x, **tensors, uid=list(x.uid), meta=x.meta and json.loads(json.dumps(x.meta)))


rows = st.lists(st.integers(-4, 3), min_size=0, max_size=6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), first=rows, second=rows)
def test_selecting_twice_and_joining_parts_are_single_selections(seed, first, second):
    x = batch(seed)
    before = snapshot(x)
    chosen = [first[k % len(first)] for k in second] if first else []
    assert same(x.select(first).select([k % len(first) for k in second] if first else []), x.select(chosen))
    if first or second:
        assert same(Rollouts.concat([x.select(first), x.select(second)]), x.select(first + second))
    assert same(x, before)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_joining_is_associative_and_pads_prompts_left_and_responses_right(seed):
    x, y, z = (replace(b, uid=[f"{k} {u}" for u in b.uid]) for k, b in enumerate(batch(seed + k, rows=2 + k) for k in range(3)))
    before = [snapshot(b) for b in (x, y, z)]
    whole = Rollouts.concat([x, y, z])
    assert same(whole, Rollouts.concat([Rollouts.concat([x, y]), z]))
    assert whole.uid == x.uid + y.uid + z.uid and whole.meta["text"] == x.meta["text"] + y.meta["text"] + z.meta["text"]
    start = 0
    for b in (x, y, z):
        part = whole.select(range(start, start + len(b)))
        start += len(b)
        gap, width = whole.prompt_ids.shape[1] - b.prompt_ids.shape[1], b.ids.shape[1]
        assert torch.equal(part.prompt_ids[:, gap:], b.prompt_ids) and not part.prompt_mask[:, :gap].any()
        assert torch.equal(part.ids[:, :width], b.ids) and not part.mask[:, width:].any()
        assert (part.turn[:, width:] == -1).all() and torch.equal(part.turn[:, :width], b.turn)
        assert torch.equal(torch.nan_to_num(part.energy[:, :width]), torch.nan_to_num(b.energy))
    assert all(same(b, old) for b, old in zip((x, y, z), before, strict=True))


@pytest.mark.parametrize("index", [2, -1, [0, 3, 0], slice(1, None, 2), range(2), np.array([1, 0]), torch.tensor([3]),
                                   [True, False, True, False], torch.tensor([False, True, True, False]), [], (0, 1), (2,), (),
                                   slice(None, None, -1), slice(-1, 0, -2), np.arange(4)[::-1], torch.tensor([], dtype=torch.long)])
def test_every_kind_of_index_selects_the_rows_it_names(index):
    x = batch(7)
    want = np.arange(4)[index if isinstance(index, int | slice) else np.asarray(index, dtype=None if len(index) else int)].reshape(-1).copy()
    got = x.select(index)
    assert got.meta["n"] == [x.meta["n"][i] for i in want] and got.uid == [x.uid[i] for i in want]
    assert torch.equal(got.ids, x.ids[torch.as_tensor(want)]) and len(got) == len(want)
    got.validate()
    got.ids += 1
    assert len(got) == 0 or not torch.equal(got.ids, x.ids[torch.as_tensor(want)])


@pytest.mark.parametrize("index", [4, [0, 5], [True, False], (0, 4), (True, False)])
def test_rows_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexError):
        batch(0).select(index)


@pytest.mark.parametrize("optional", [(), ("entropy",), OPTIONAL])
@pytest.mark.parametrize("meta", [True, False])
def test_a_stored_batch_comes_back_bit_by_bit(tmp_path, optional, meta):
    for seed in range(5):
        x = batch(seed, optional=optional, meta=meta)
        x.save(tmp_path / "deep" / "x.safetensors")
        assert same(Rollouts.load(str(tmp_path / "deep" / "x.safetensors")), x)
    x.select([]).save(tmp_path / "empty")
    assert same(Rollouts.load(tmp_path / "empty"), x.select([]))


def test_shared_and_strided_tensors_types_and_kinds_of_uid_are_stored_too(tmp_path):
    x = batch(1)
    wide = torch.rand(8, x.ids.shape[1]).bfloat16()
    x = replace(x, old_logp=wide[::2], rollout_logp=wide[::2], mask=x.mask.bool(), prompt_mask=x.prompt_mask.float(),
                uid=np.array([3, 3, 5, 5]), rewards=torch.zeros(4, x.ids.shape[1], requires_grad=True))
    x.save(tmp_path / "x")
    y = Rollouts.load(tmp_path / "x")
    assert torch.equal(y.old_logp, wide[::2]) and y.mask.dtype == torch.bool and y.prompt_mask.dtype == torch.float32
    assert y.uid == [3, 3, 5, 5] and all(type(u) is int for u in y.uid) and not y.rewards.requires_grad
    assert replace(x, uid=torch.tensor([1, 2, 2, 1])).uid == [1, 2, 2, 1]
    assert replace(x, uid=("a", "b", None, 1.5)).uid == ["a", "b", None, 1.5]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    x, y = batch(1), batch(2)
    x.save(tmp_path / "x")

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        y.save(tmp_path / "x")
    assert same(Rollouts.load(tmp_path / "x"), x) and os.listdir(tmp_path) == ["x"]


def test_a_killed_save_leaves_the_old_file(tmp_path):
    x = batch(1)
    x.save(tmp_path / "x")
    code = ("import os, signal, sys, safetensors.torch as s\n"
            "from collai.rl.buffer import Rollouts\n"
            "x = Rollouts.load(sys.argv[1])\n"
            "write = s.save_file\n"
            "s.save_file = lambda t, p: (write(t, p), os.kill(os.getpid(), signal.SIGKILL))\n"
            "x.select([0]).save(sys.argv[1])")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert same(Rollouts.load(tmp_path / "x"), x)


def test_what_cannot_be_stored_or_read_is_refused_by_name(tmp_path):
    x = batch(3)
    with pytest.raises(TypeError, match=r"uid must be text or numbers to be stored, got \('a', 1\)"):
        replace(x, uid=[("a", 1)] * 4).save(tmp_path / "x")
    with pytest.raises(TypeError, match="not JSON serializable"):
        replace(x, meta={"o": [object()] * 4}).save(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no rollouts at .*nothing"):
        Rollouts.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello, this is not it")
    with pytest.raises(ValueError, match="text holds no rollouts"):
        Rollouts.load(tmp_path / "text")
    from safetensors.torch import save_file
    save_file({"ids": torch.zeros(2, 2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other holds no rollouts: 'json'"):
        Rollouts.load(tmp_path / "other")
    for name, text in (("cut", b'{"uid": [1'), ("bytes", b"\xff\xfe"), ("list", b"[1]"), ("none", b'{"uid": null, "meta": null}'),
                       ("unhashable", b'{"uid": [[1], [2]], "meta": null}'), ("meta", b'{"uid": [1, 2], "meta": [1]}')):
        stored = {n: v for n, v in vars(X).items() if isinstance(v, torch.Tensor)}
        save_file(stored | {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} holds no rollouts: "):
            Rollouts.load(tmp_path / name)
    assert len(os.listdir(tmp_path)) == 8


def test_to_moves_every_tensor_and_keeps_the_rest():
    x = batch(4)
    y = x.to("meta")
    assert {v.device.type for v in vars(y).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert y.uid == x.uid and y.meta == x.meta and same(x.to(torch.device("cpu")), x)


def test_the_short_form_says_what_is_there():
    x = batch(5, optional=("energy",))
    b, t = x.ids.shape
    text = f"Rollouts(B={b}, P={x.prompt_ids.shape[1]}, T={t}, groups=4, model tokens={int(x.mask.sum())}, with energy, meta)"
    assert repr(x) == text and len(x) == 4
    assert "with no optional field" in repr(batch(5, optional=(), meta=False))


X = Rollouts(prompt_ids=torch.ones(2, 3).long(), prompt_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), ids=torch.ones(2, 4).long(),
             mask=torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]), uid=[0, 1], turn=torch.tensor([[0, 0, -1, -1], [0, 0, 1, 1]]),
             rewards=torch.zeros(2, 4), old_logp=torch.zeros(2, 4))


def at(name: str, row: int, column: int, value: float) -> torch.Tensor:
    """A field of X with one entry changed."""
    x = getattr(X, name).clone()
    x[row, column] = value
    return x


def test_a_valid_batch_passes_also_with_masks_of_other_kinds_and_zeros_as_turns():
    others = [replace(X, mask=X.mask.bool(), prompt_mask=X.prompt_mask.float()),
              replace(X, turn=torch.zeros(2, 4).long(), rewards=torch.where(X.mask == 1, 0.0, torch.nan)),
              replace(X, energy=torch.full((2, 4), -1e-6))]
    assert all(batch.validate() is None for batch in (X, *others))


@pytest.mark.parametrize(("change", "message"), [
    (lambda: dict(mask=at("mask", 0, 0, 2)), "mask must contain only 0 and 1, got 2"),
    (lambda: dict(prompt_mask=at("prompt_mask", 0, 0, 2)), "prompt_mask must contain only 0 and 1, got 2"),
    (lambda: dict(prompt_mask=at("prompt_mask", 1, 2, 0)), "prompt_mask must be left-padded, got a 0 after a 1 at row 1, column 2"),
    (lambda: dict(turn=at("turn", 1, 1, -1)), "turn must be -1 only at the end of a row, got a turn after it at row 1, column 2"),
    (lambda: dict(turn=at("turn", 0, 1, -1)), "turn must be >= 0 on valid tokens, got -1 at row 0, column 1"),
    (lambda: dict(turn=at("turn", 1, 0, 2)), "turn must not fall along a row, it does at row 1, column 2"),
    (lambda: dict(rewards=at("rewards", 1, 3, float("inf"))), "rewards contain non-finite values at row 1, column 3"),
    (lambda: dict(entropy=at("rewards", 0, 1, float("nan"))), "entropy contain non-finite values at row 0, column 1"),
    (lambda: dict(energy=at("rewards", 0, 1, -0.5)), r"energy must be non-negative \(got min -0.5\)"),
    (lambda: dict(ids=torch.ones(2, 5).long()), r"mask has shape \(2, 4\), ids \(2, 5\): they must be equal"),
    (lambda: dict(prompt_mask=torch.ones(2, 2)), r"prompt_mask has shape \(2, 2\), prompt_ids \(2, 3\)"),
    (lambda: dict(prompt_ids=torch.ones(3, 3).long()), r"prompt_ids has shape \(3, 3\), ids \(2, 4\): they must have as many rows"),
    (lambda: dict(old_logp=torch.zeros(2)), r"old_logp must have 2 dimensions, got shape \(2,\)"),
    (lambda: dict(rewards=torch.zeros(2, 4, device="meta")), "rewards is on meta, ids on cpu: they must be on one device"),
    (lambda: dict(uid=[1]), r"uid has length 1, ids shape \(2, 4\): one entry a row is needed"),
    (lambda: dict(meta={"text": ["a", "b", "c"]}), r"meta\['text'\] has length 3, ids shape \(2, 4\)")])
def test_broken_invariants_are_named_with_field_and_place(change, message):
    with pytest.raises(ValueError, match=message):
        replace(X, **change()).validate()


@pytest.mark.parametrize(("change", "message"), [
    (lambda: dict(ids=torch.ones(2, 4)), "ids must hold integers, got torch.float32"),
    (lambda: dict(turn=torch.zeros(2, 4).bool()), "turn must hold integers, got torch.bool"),
    (lambda: dict(ids=[[1, 1, 1, 1]] * 2), "ids must be a torch.Tensor, got list"),
    (lambda: dict(energy=np.ones((2, 4))), "energy must be a torch.Tensor, got ndarray"),
    (lambda: dict(rewards=None), "rewards must be a torch.Tensor, got NoneType"),
    (lambda: dict(meta={"text": "ab"}), r"meta\['text'\] must be a list, got str"),
    (lambda: dict(uid=[[1], [2]]), r"uid must hold hashable values, got \[1\]"),
    (lambda: dict(uid=[("a", [1]), 2]), r"uid must hold hashable values, got \('a', \[1\]\)"),
    (lambda: dict(uid=torch.tensor([[1, 2], [3, 4]])), r"uid must hold hashable values, got \[1, 2\]"),
    (lambda: dict(meta=["a", "b"]), r"meta must be a dict of lists or None, got \['a', 'b'\]")])
def test_wrong_types_are_named(change, message):
    with pytest.raises(TypeError, match=message):
        replace(X, **change()).validate()


@pytest.mark.parametrize(("others", "message"), [
    (lambda: [], "concat needs at least one batch, got none"),
    (lambda: [X, replace(X, entropy=X.rewards)], "entropy is in 1 of 2 batches"),
    (lambda: [X, X, replace(X, meta={"a": [1, 2]})], "meta is in 1 of 3 batches"),
    (lambda: [replace(X, meta={}), replace(X, meta={"a": [1, 2]})], r"meta\['a'\] is in 1 of 2 batches"),
    (lambda: [X, replace(X, mask=X.mask * 2)], "mask must contain only 0 and 1")])
def test_batches_that_do_not_fit_are_not_joined(others, message):
    with pytest.raises(ValueError, match=message):
        Rollouts.concat(others())


def test_a_uid_stands_for_one_prompt_when_batches_are_joined():
    other = replace(X, prompt_ids=X.prompt_ids + torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match=r"uid 1 stands for two prompts, in rows 1 and 3; give each batch names of its own"):
        Rollouts.concat([X, other])
    shorter = replace(X, prompt_mask=torch.tensor([[0, 1, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="uid 1 stands for two prompts"):
        Rollouts.concat([X, shorter])
    assert Rollouts.concat([X, replace(other, uid=[0, 2])]).uid == [0, 1, 0, 2]
    padded = replace(X, prompt_ids=torch.nn.functional.pad(X.prompt_ids, (2, 0), value=9), prompt_mask=torch.nn.functional.pad(X.prompt_mask, (2, 0)))
    junk = replace(X, prompt_ids=torch.where(X.prompt_mask == 1, X.prompt_ids, 7))
    assert Rollouts.concat([X, padded, junk]).uid == [0, 1] * 3


def test_whole_rows_are_prompts_then_responses_and_what_may_be_attended_to():
    ids, attention = X.inputs()
    assert torch.equal(ids, torch.ones(2, 7).long())
    assert attention.tolist() == [[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert attention.dtype == X.prompt_mask.dtype and replace(X, prompt_mask=X.prompt_mask.bool()).inputs()[1].dtype == torch.bool
    wide = Rollouts.concat([X, replace(batch(2, optional=(), meta=False), uid="abcd")])
    for row, (tokens, seen) in enumerate(zip(*wide.inputs(), strict=True)):
        prompt = wide.prompt_ids[row][wide.prompt_mask[row] == 1]
        assert torch.equal(tokens[seen == 1], torch.cat([prompt, wide.ids[row][wide.turn[row] >= 0]]))
