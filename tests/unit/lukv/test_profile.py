"""Budget curves: the file and its checks, calibration texts, the protocol of one pair, both averages, resuming."""
import json
import multiprocessing
import time
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from collai.lukv import profile as module
from collai.lukv.allocate import allocate, budget_curve
from collai.lukv.profile import (
    BudgetCurve,
    average_curve,
    budget_loss,
    measure,
    pair_utility,
    profile_model,
    read_calibration,
)
from collai.lukv.ragged import Compressor
from collai.lukv.scorers import KeyDiff, SnapKV, force_protected
from collai.lukv.utility import oracle_importance, rank_by_score

PERCENT = np.arange(101)[:, None, None] / 100


class Bytes:
    """Tokenizer with a token a byte."""

    def encode(self, text, add_special_tokens=False):
        assert add_special_tokens is False
        return [byte % 96 for byte in text.encode()]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)


class Words(Bytes):
    """Tokenizer with a token a word."""

    def encode(self, text, add_special_tokens=False):
        return [sum(word.encode()) % 96 for word in text.split()]


def tiny(model=LlamaForCausalLM, config=LlamaConfig, layers=2, seed=0, **more):
    torch.manual_seed(seed)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "initializer_range": 0.4,
             "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return model(config(**shape | more)).eval()


def curve_of(spread, **meta):
    """Rows with exact means, uneven over heads by a given spread of mean zero."""
    return BudgetCurve((PERCENT + 4 * PERCENT * (1 - PERCENT) * spread)[1:100], meta)


PAIRS = [(f"{i} black cats sat on {i + 3} mats, " * 4, f" how many {c}?") for i, c in enumerate("abcde")]
SPREAD = np.array([[0.1, -0.05, 0.02], [-0.12, 0.06, -0.01]])


# ---------------------------------------------------------------- the curve

@pytest.mark.parametrize("name", ["a.npy", "a.npz", "new/folder/b.npy"])
def test_a_saved_curve_comes_back_with_its_metadata(tmp_path, name):
    curve = curve_of(SPREAD, model="m", scorer="KeyDiff", scorer_params={}, T=500, sink=4, window=1)
    curve.save(tmp_path / name)
    again = BudgetCurve.load(str(tmp_path / name))
    assert np.array_equal(again.ratios, curve.ratios) and again.meta == curve.meta | {"format": 1}
    assert not list(tmp_path.rglob("*.new"))


def test_the_peer_reads_our_array_and_we_read_the_peers(tmp_path):
    curve_of(SPREAD).save(tmp_path / "ours.npy")
    array = np.load(tmp_path / "ours.npy", allow_pickle=False)
    assert array.shape == (99, 2, 3) and array.dtype == np.float64
    np.save(tmp_path / "theirs.npy", array.astype(np.float32))
    theirs = BudgetCurve.load(tmp_path / "theirs.npy")
    assert theirs.meta == {} and np.allclose(theirs.ratios, array) and theirs.budgets(100, 0.5).sum() == 300


def test_a_curve_keeps_copies():
    ratios, meta = curve_of(SPREAD).ratios.copy(), {"T": 500}
    curve = BudgetCurve(ratios, meta)
    ratios[:], meta["T"] = 0, 1
    assert curve.ratios.mean() > 0.4 and curve.meta == {"T": 500}


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_interpolated_rows_have_the_right_mean_and_grow(a, b):
    low, high = (curve_of(SPREAD).at(r) for r in sorted((a, b)))
    assert abs(low.mean() - min(a, b)) < 1e-8 and np.all(low <= high + 1e-9)
    assert low.min() >= 0 and high.max() <= 1


def test_whole_percents_are_the_rows_themselves():
    curve = curve_of(SPREAD)
    assert all(np.array_equal(curve.at(p / 100), curve.ratios[p - 1]) for p in range(1, 100))
    assert np.allclose(curve.at(0.875), (curve.ratios[86] + curve.ratios[87]) / 2) and np.all(curve.at(0.0) == 0)
    assert np.allclose(curve.at(0.995), (curve.ratios[98] + 1) / 2, atol=1e-12) and np.allclose(curve.at(0.004), 0.4 * curve.ratios[0])


@given(T=st.integers(1, 3000), ratio=st.floats(0, 0.999), sink=st.integers(0, 6), window=st.integers(0, 40))
def test_budgets_meet_the_total_exactly_or_say_why_not(T, ratio, sink, window):
    curve = curve_of(SPREAD, sink=sink, window=window)
    total, low = round((1 - ratio) * 6 * T), min(T, max(1, sink + window))
    if total < 6 * low:
        with pytest.raises(ValueError, match=rf"budget B={total} outside \[{6 * low}, {6 * T}\]"):
            curve.budgets(T, ratio)
        return
    budgets = curve.budgets(T, ratio)
    assert budgets.dtype == np.int64 and budgets.sum() == total and budgets.min() >= low and budgets.max() <= T


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.875, 0.9, 0.993])
def test_rounding_as_the_peer_does(ratio):
    curve, T = curve_of(SPREAD, sink=4, window=60), 333
    row = curve.ratios[min(max(round(100 * ratio) - 1, 0), 98)]
    for layer, kept in zip(row, curve.budgets(T, ratio, rounding="kvpress"), strict=True):
        ideal = (1 - layer) * T
        left, want = round(ideal.sum()) - int(np.floor(ideal).sum()), np.floor(ideal).astype(int)
        want[np.argsort(-(ideal - want), kind="stable")[:left]] += 1
        assert np.array_equal(kept, np.clip(want, 1, T))
    assert np.all(curve.budgets(T, 0.0, rounding="kvpress") == T)


def test_callers_may_ask_for_another_total_and_floor():
    curve = curve_of(SPREAD, sink=4, window=1)
    assert curve.budgets(100, 0.8, total=200).sum() == 200 and curve.budgets(100, 0.97, floor=2).min() >= 2


def test_layers_that_are_never_compressed_keep_everything_and_do_not_count():
    budgets = curve_of(SPREAD, layers=[1]).budgets(200, 0.8)
    assert np.all(budgets[0] == 200) and budgets[1].sum() == 120


@pytest.mark.parametrize(("ratios", "text"), [
    (np.zeros((98, 2, 2)), r"^budget curve must have shape \(99, L, Hkv\)"),
    (np.zeros((99, 4)), r"^budget curve must have shape \(99, L, Hkv\)"),
    (np.zeros((99, 0, 2)), r"^budget curve must have shape \(99, L, Hkv\)"),
    (1 - curve_of(SPREAD).ratios, "^not a prune-ratio curve: row 1 %"),
    (100 * curve_of(SPREAD).ratios, r"^not a prune-ratio curve: .*outside \[0, 1\]"),
    (curve_of(SPREAD).ratios - 0.02, "^not a prune-ratio curve: "),
    (np.full((99, 1, 1), np.nan), "^not a prune-ratio curve: "),
    (np.minimum(PERCENT[1:100] + 0.011, 1), "^not a prune-ratio curve: row 1 % prunes 2.10 %"),
    (np.minimum(PERCENT[1:100], 0.88), "^not a prune-ratio curve: row 90 % prunes 88.00 %")])
def test_what_is_no_curve_is_refused(ratios, text):
    with pytest.raises(ValueError, match=text):
        BudgetCurve(ratios)


def test_floors_of_the_metadata_excuse_low_rows():
    bound = np.minimum(np.broadcast_to(PERCENT[1:100], (99, 1, 2)), 0.64)
    BudgetCurve(bound, {"T": 100, "sink": 4, "window": 32})
    BudgetCurve(bound, {"T": 100, "floor": 36})
    BudgetCurve(np.minimum(bound, 0.899), {"T": 100, "sink": 4, "window": 32})
    for meta in ({"T": 120, "sink": 4, "window": 32}, {"T": 1000, "sink": 4, "window": 32}, {}):
        with pytest.raises(ValueError, match="not a prune-ratio curve: row 66 %"):
            BudgetCurve(bound, meta)
    BudgetCurve(np.minimum(np.broadcast_to(PERCENT[1:100], (99, 1, 2)), 0.9))


@pytest.mark.parametrize("ratio", [-0.01, 1.0, 1.5, float("nan")])
def test_ratios_outside_the_unit_interval_are_refused(ratio):
    for ask in (lambda: curve_of(SPREAD).at(ratio), lambda: curve_of(SPREAD).budgets(10, ratio)):
        with pytest.raises(ValueError, match=r"^ratio must be in \[0, 1\)"):
            ask()


def test_bad_lengths_and_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="T must be at least 1 token, got 0"):
        curve_of(SPREAD).budgets(0, 0.5)
    for use in (curve_of(SPREAD).save, BudgetCurve.load):
        with pytest.raises(ValueError, match=r"must end in \.npy or \.npz, got 'a\.txt'"):
            use(tmp_path / "a.txt")


# ---------------------------------------------------------------- model and scorer

def test_the_model_and_the_scorer_are_compared():
    model = tiny()
    model.config._name_or_path = "somewhere/Small-1B/"
    curve = curve_of(np.array([[0.1, -0.1], [0.0, 0.0]]), model="Small-1B", scorer="SnapKV", sink=4, window=32,
                     scorer_params={"kernel": 7, "pool": "max"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve.check(model)
        curve.check(model, SnapKV(window=32, kernel=7, pool="max"))
        curve.check(model, KeyDiff(), strict=False)
        BudgetCurve(curve.ratios).check(model, KeyDiff())
    with pytest.raises(ValueError, match="made for scorer 'SnapKV', not for 'KeyDiff'"):
        curve.check(model, KeyDiff())
    with pytest.warns(UserWarning, match=r"other scorer parameters .*'kernel': \(7, 5\).*'pool'.*'window': \(32, 64\)|"
                                         r"other scorer parameters .*'window': \(32, 64\).*'kernel': \(7, 5\)"):
        curve.check(model, SnapKV())
    model.config._name_or_path = "Other"
    with pytest.warns(UserWarning, match="made for model 'Small-1B', not for 'Other'"):
        curve.check(model)
    with pytest.raises(ValueError, match=r"^budget curve must have shape \(99, L, Hkv\)"):
        curve_of(SPREAD).check(model)


def test_the_compressor_spends_what_the_curve_says_and_warns():
    model = tiny()
    curve = profile_model(model, Bytes(), PAIRS[:2], KeyDiff(), new_tokens=3)
    ids = torch.arange(90)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressor = Compressor(model, KeyDiff(), ratio=0.7, budgets=curve)
    with compressor:
        assert np.array_equal(compressor.prefill(ids).lengths()[:, 0].numpy(), curve.budgets(90, 0.7))
    with pytest.warns(UserWarning, match="other scorer parameters"):
        Compressor(model, KeyDiff(sink=5), ratio=0.7, budgets=curve)
    with pytest.raises(ValueError, match="made for scorer"):
        Compressor(model, SnapKV(window=8), ratio=0.7, budgets=curve)
    Compressor(model, SnapKV(window=8), ratio=0.7, budgets=curve, strict=False)


# ---------------------------------------------------------------- calibration texts

def test_calibration_files_are_read_as_released(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"context": "从前有一只猫。", "questions": ["谁？", "何时？"]}, {"context": "A cat.", "input": "Who?", "questions": None},
            {"context": "x", "input": " y", "answer_prefix": " z"}]
    file.write_text("\n" + "\n \n".join(json.dumps(r, ensure_ascii=i > 0) for i, r in enumerate(rows)), encoding="utf-8")
    assert read_calibration(file) == [("从前有一只猫。", "\n谁？\n回答："), ("从前有一只猫。", "\n何时？\n回答："),
                                      ("A cat.", "\nWho?\nAnswer:"), ("x", " y z")]
    file.write_text("\n".join(json.dumps({"context": f"c{i}", "questions": ["a", "b"]}) for i in range(230)), encoding="utf-8")
    assert len(read_calibration(str(file))) == 400 and len(read_calibration(file, limit=3)) == 6


@pytest.mark.parametrize(("line", "text"), [
    ("{bad", "Expecting"), ("[1]", "not a JSON object"), ('{"questions": ["a"]}', "'context' must be"),
    ('{"context": 3, "input": "a"}', "'context' must be"), ('{"context": "a"}', "needs 'questions'"),
    ('{"context": "a", "questions": []}', "needs 'questions'"), ('{"context": "a", "questions": ["b", 1]}', "needs 'questions'"),
    ('{"context": "a", "questions": "b"}', "needs 'questions'"), ('{"context": "a", "input": null}', "needs 'questions'"),
    ('{"context": "a", "input": "b", "answer_prefix": 1}', "'answer_prefix' must be")])
def test_a_malformed_line_is_named(tmp_path, line, text):
    file = tmp_path / "a.jsonl"
    file.write_text('{"context": "a", "input": "b"}\n\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^line 3: {text}"):
        read_calibration(file)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"no calibration pairs in a\.jsonl"):
        read_calibration(tmp_path / "a.jsonl")


# ---------------------------------------------------------------- one pair

def reference(model, context, question, scorer, n, **options):
    """Ranked utilities by eager attention: every weight of every step is there, nothing streams."""
    model.set_attn_implementation("eager")
    ids, T = [Bytes().encode(context + question)], len(Bytes().encode(context))
    rows = []
    with torch.no_grad():
        out = model(torch.tensor(ids), use_cache=True)
        for _ in range(n):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True, output_attentions=True)
            rows.append([a[0, :, 0, :T] for a in out.attentions])
    found = []
    seen = {}

    def keep(module, args, kwargs, _):
        cache = kwargs["past_key_values"].layers[module.layer_idx]
        seen[module.layer_idx] = (module, kwargs["hidden_states"], cache.keys, cache.values, kwargs["position_embeddings"])

    hooks = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([ids[0][:T]]), use_cache=True)
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(model.model.layers):
        u = oracle_importance(torch.stack([r[i] for r in rows]), out.past_key_values.layers[i].values[0, :, :T],
                              layer.self_attn.o_proj.weight, num_kv_heads=2, **options)
        s = scorer.score(*seen[i])[0]
        found.append(rank_by_score(u, force_protected(s, scorer.sink, scorer.window)))
    model.set_attn_implementation("sdpa")
    return torch.stack(found).numpy()


@pytest.mark.parametrize("scorer", [KeyDiff(), SnapKV(window=8)], ids=lambda s: s.name)
@pytest.mark.parametrize(("kind", "options"), [
    ((LlamaForCausalLM, LlamaConfig), {}), ((Qwen3ForCausalLM, Qwen3Config), {"reduce_time": "sum", "norm": "none"}),
    ((MistralForCausalLM, MistralConfig), {"reduce_group": "mean"})])
def test_the_protocol_equals_one_written_with_full_attention_weights(kind, options, scorer):
    model = tiny(*kind, **({"sliding_window": None} if kind[0] is MistralForCausalLM else {}))
    ours = pair_utility(model, Bytes(), *PAIRS[0], scorer, new_tokens=5, **options)
    theirs = reference(model, *PAIRS[0], scorer, 5, **options)
    assert ours.dtype == np.float32 and np.allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def test_the_scorer_sees_the_context_alone_and_the_model_is_left_as_it_was():
    model, lengths = tiny(), []

    class Spy(KeyDiff):
        def score(self, module, hidden_states, keys, values, position_embeddings):
            lengths.append(keys.shape[2])
            return super().score(module, hidden_states, keys, values, position_embeddings)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    pair_utility(model, Bytes(), *PAIRS[0], Spy(), new_tokens=3, do_sample=True)
    assert lengths == [len(Bytes().encode(PAIRS[0][0]))] * 2
    assert model.config._attn_implementation == "sdpa" and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_sampling_repeats_with_its_seed_only():
    model = tiny()
    runs = [pair_utility(model, Bytes(), *PAIRS[0], KeyDiff(), new_tokens=6, do_sample=True, temperature=t, seed=s)
            for t, s in ((5.0, 0), (5.0, 0), (5.0, 1), (1e-4, 0))]
    greedy = pair_utility(model, Bytes(), *PAIRS[0], KeyDiff(), new_tokens=6, seed=9)
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2]) and np.array_equal(runs[3], greedy)


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_token_ends_the_continuation(as_list):
    model = tiny()
    ids = torch.tensor([Bytes().encode(PAIRS[0][0])])
    free = module._continue(model, ids, module._Horizon(8))
    end = next(t for t in free[1:] if t != free[0])
    model.generation_config.eos_token_id = [end, 95] if as_list else end
    stopped = module._continue(model, ids, module._Horizon(8))
    assert stopped == free[:free.index(end)] and len(free) == 8
    model.generation_config.eos_token_id = free[0]
    assert module._continue(model, ids, module._Horizon(8))[0] == free[0]


def test_a_tokenizer_that_opens_texts_with_a_token_does_so_once():
    class Opening(Bytes):
        bos_token_id = 90

        def encode(self, text, add_special_tokens=True):
            return [90] * add_special_tokens + [byte % 96 for byte in text.encode()]

    context, question = module._pair_ids(Opening(), ("ab", "c"), "cpu")
    assert context.tolist() == [[90, 1, 2]] and question.tolist() == [[3]]
    silent = Bytes()
    silent.bos_token_id = None
    assert module._pair_ids(silent, ("ab", "c"), "cpu")[0].tolist() == [[1, 2]]


def test_a_plain_function_may_score():
    def late(module, hidden_states, keys, values, position_embeddings):
        return torch.arange(keys.shape[2], dtype=torch.float32).expand(keys.shape[:3])

    curve = profile_model(tiny(), Bytes(), PAIRS[:1], late, new_tokens=2)
    assert curve.meta["scorer"] == "late" and curve.meta["sink"] == curve.meta["window"] == 0


# ---------------------------------------------------------------- many pairs

def test_both_aggregates_are_what_they_say():
    model, lengths = tiny(), {len(c) for c, _ in PAIRS}
    assert len(lengths) == 1
    us = [pair_utility(model, Bytes(), *pair, KeyDiff(), new_tokens=4) for pair in PAIRS]
    budget = profile_model(model, Bytes(), iter(PAIRS), KeyDiff(), new_tokens=4)
    loss = profile_model(model, Bytes(), PAIRS, KeyDiff(), new_tokens=4, aggregate="mean_loss")
    flat = [u.reshape(4, -1) for u in us]
    assert np.allclose(budget.ratios, np.mean([budget_curve(u, 2, 2, sink=4, window=1) for u in flat], axis=0), atol=1e-12)
    assert np.array_equal(loss.ratios, budget_curve(np.mean(flat, axis=0, dtype=np.float64), 2, 2, sink=4, window=1))
    assert not np.allclose(budget.ratios, loss.ratios)
    summed = profile_model(model, Bytes(), PAIRS[:1], KeyDiff(), new_tokens=4, reduce_time="sum", norm="none")
    u = pair_utility(model, Bytes(), *PAIRS[0], KeyDiff(), new_tokens=4, reduce_time="sum", norm="none")
    assert np.array_equal(summed.ratios, budget_curve(u.reshape(4, -1), 2, 2, sink=4, window=1)) and summed.meta["norm"] == "none"
    assert np.allclose(budget.ratios[:90].mean(axis=(1, 2)), np.arange(1, 91) / 100, atol=1 / lengths.pop())


def test_layers_may_be_kept_equal():
    curve = profile_model(tiny(), Bytes(), PAIRS[:2], KeyDiff(), new_tokens=2, layerwise=False)
    assert np.allclose(curve.ratios[:90].mean(axis=2), np.arange(1, 91)[:, None] / 100, atol=0.01) and curve.meta["layerwise"] is False


def test_metadata_tell_where_a_curve_comes_from(tmp_path):
    model = tiny()
    model.config._name_or_path = "some/where/Tiny"
    pairs = [("ab" * 60, "?"), ("ab" * 40, "?")]
    curve = profile_model(model, Bytes(), pairs, SnapKV(window=8, kernel=3), new_tokens=2, seed=3, do_sample=True)
    want = {"format": 1, "model": "Tiny", "scorer": "SnapKV", "scorer_params": {"kernel": 3, "pool": "avg"}, "T": 80, "T_max": 120, "sink": 4,
            "window": 8, "floor": 12, "pairs": 2, "seed": 3, "new_tokens": 2, "do_sample": True, "aggregate": "mean_budget"}
    assert want.items() <= curve.meta.items()
    curve.save(tmp_path / "c.npz")
    assert BudgetCurve.load(tmp_path / "c.npz").meta == curve.meta


def test_a_file_and_its_pairs_give_the_same_curve(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"context": c, "input": q, "answer_prefix": ""}) + "\n" for c, q in PAIRS))
    curves = [profile_model(tiny(), Bytes(), given, KeyDiff(), new_tokens=2) for given in (PAIRS, file, str(file))]
    assert all(np.array_equal(c.ratios, curves[0].ratios) for c in curves)


def test_layers_with_a_sliding_window_are_left_out():
    model = tiny(Qwen3ForCausalLM, Qwen3Config, layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    curve = profile_model(model, Bytes(), PAIRS[:2], KeyDiff(), new_tokens=2)
    assert curve.meta["layers"] == [0, 1] and np.allclose(curve.ratios[:, 2], np.arange(1, 100)[:, None] / 100)
    budgets = curve.budgets(90, 0.8)
    assert np.all(budgets[2] == 90) and budgets[:2].sum() == 72
    with pytest.raises(ValueError, match="all layers have a sliding window"):
        profile_model(tiny(MistralForCausalLM, MistralConfig, sliding_window=16), Bytes(), PAIRS[:1], KeyDiff())


@pytest.mark.parametrize(("change", "text"), [
    ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"), ({"aggregate": "median"}, "aggregate must be .* got 'median'"),
    ({"do_sample": True, "temperature": 0.0}, "temperature must be positive"), ({"pairs": []}, "no calibration pairs"),
    ({"pairs": [PAIRS[0], ("a", 1)]}, r"pair 1 must be \(context, question\)"), ({"pairs": ["ab"]}, r"pair 0 must be \(context, question\)"),
    ({"pairs": [("Hi", "Who?")]}, r"context of 2 tokens is too short for scorer KeyDiff \(needs > 4\)")])
def test_bad_settings_are_refused(change, text):
    settings_ = {"pairs": PAIRS[:1]} | change
    with pytest.raises(ValueError, match=text):
        profile_model(tiny(), Bytes(), settings_.pop("pairs"), KeyDiff(), **settings_)


# ---------------------------------------------------------------- averages

@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_in_sample_no_static_allocation_beats_the_mean_of_losses(seed):
    rng = np.random.default_rng(seed)
    P, H, T = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(1, 6))
    u = rng.random((P, 1, H, T)) ** 3
    B = int(rng.integers(0, H * T + 1))
    star = allocate(u[:, 0].mean(axis=0), B)
    every = [np.array([b]) for b in product(range(T + 1), repeat=H) if sum(b) == B]
    losses = np.array([[budget_loss(x, b) for b in every] for x in u])
    ours = np.mean([budget_loss(x, star.budgets) for x in u])
    assert losses.min(axis=1).mean() <= losses.mean(axis=0).min() + 1e-12 <= ours + 2e-12
    assert ours <= losses.mean(axis=0).min() + star.gap_bound[0] + 1e-12


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_common_grid_keeps_sums_and_points(T, grid, seed):
    u = np.random.default_rng(seed).random((2, T))
    new = module._on_grid(u, grid)
    kept = np.pad(np.cumsum(u, axis=1), ((0, 0), (1, 0)))
    want = [np.interp(np.arange(1, grid + 1) * T / grid, np.arange(T + 1), row) for row in kept]
    assert new.shape == (2, grid) and new.min() >= 0 and np.allclose(np.cumsum(new, axis=1), want)


def test_equal_texts_make_both_averages_equal():
    u = np.random.default_rng(0).random((2, 2, 50)) ** 6
    a, b = (average_curve([u, u, u], sink=2, window=1, aggregate=way) for way in ("mean_budget", "mean_loss"))
    assert np.allclose(a, b, atol=0.02) and np.allclose(a, budget_curve(u.reshape(4, 50), 2, 2, sink=2, window=1))
    for way in ("mean_budget", "mean_loss"):
        with pytest.raises(ValueError, match="no utilities to average"):
            average_curve([], aggregate=way)
    with pytest.raises(ValueError, match="aggregate must be"):
        average_curve([u], aggregate="mode")


def test_budget_loss_is_the_evicted_tail():
    u = np.arange(12.0).reshape(1, 2, 6)
    assert budget_loss(u, np.array([[6, 0]])) == u[0, 1].sum() and budget_loss(u, np.array([[4, 5]])) == 4 + 5 + 11
    for bad in ([[7, 0]], [[-1, 0]], [[1], [2]]):
        with pytest.raises(ValueError, match=r"budgets must be \(1, 2\), from 0 to 6"):
            budget_loss(u, np.array(bad))


# ---------------------------------------------------------------- stop and go on

class Slow(KeyDiff):
    """A scorer that leaves time to be killed."""

    name = "Slow"

    def score(self, module, hidden_states, keys, values, position_embeddings):
        time.sleep(0.02)
        return super().score(module, hidden_states, keys, values, position_embeddings)


def test_a_killed_profile_goes_on_where_it_stopped(tmp_path):
    model = tiny()
    pairs = [(f"{i} black cats sat on {i + 3} mats, " * 4, f" how many {i}?") for i in range(16)]
    job = multiprocessing.get_context("fork").Process(target=profile_model, args=(model, Bytes(), pairs, Slow()),
                                                      kwargs={"new_tokens": 2, "cache": tmp_path})
    job.start()
    for _ in range(6000):
        if len(list(tmp_path.glob("*.npy"))) >= 2:
            break
        time.sleep(0.01)
    job.kill()
    job.join()
    done = {f: (f.stat().st_mtime_ns, np.load(f).shape) for f in tmp_path.glob("*.npy")}
    assert job.exitcode == -9 and 2 <= len(done) < 16
    resumed = profile_model(model, Bytes(), pairs, Slow(), new_tokens=2, cache=tmp_path)
    assert all(f.stat().st_mtime_ns == t for f, (t, _) in done.items()) and len(list(tmp_path.glob("*.npy"))) == 16
    whole = profile_model(model, Bytes(), pairs, Slow(), new_tokens=2)
    assert np.array_equal(resumed.ratios, whole.ratios) and resumed.meta == whole.meta


def test_what_changes_the_utilities_is_never_read_from_the_cache(tmp_path):
    pairs, count = PAIRS[:1], 0
    for model, scorer, options in ((tiny(), KeyDiff(), {}), (tiny(seed=1), KeyDiff(), {}), (tiny(), KeyDiff(sink=5), {}), (tiny(), SnapKV(window=8), {}),
                                   (tiny(), SnapKV(window=8, kernel=3), {}), (tiny(), KeyDiff(), {"new_tokens": 3}), (tiny(), KeyDiff(), {"do_sample": True}),
                                   (tiny(), KeyDiff(), {"do_sample": True, "seed": 1})):
        for more in ({}, {"aggregate": "mean_loss"}, {"layerwise": False}):
            profile_model(model, Bytes(), pairs, scorer, cache=tmp_path, **{"new_tokens": 2} | options | more)
        count += 1
        assert len(list(tmp_path.iterdir())) == count
    profile_model(tiny(), Bytes(), pairs, KeyDiff(), new_tokens=2, seed=5, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == count


# ---------------------------------------------------------------- the study

def test_gains_lie_between_equal_and_own():
    rng = np.random.default_rng(0)
    us = [(rng.random((2, 2, 80)) ** 8 * np.array([[[1.0], [0.1]], [[3.0], [0.02]]])).astype(np.float32) for _ in range(12)]
    curve = BudgetCurve(average_curve(us[:6], sink=1, window=0), {"T": 80, "sink": 1, "window": 0})
    losses = module._held_out({"curve": curve}, us[6:], 0.8, 1)
    assert np.all(losses["own"] <= np.minimum(losses["equal"], losses["curve"]) + 1e-9)
    mean, low, high = module._gain(losses, "curve")
    assert 0.5 < low <= mean <= high <= 1 and module._gain(losses, "own")[0] == 1 and module._gain(losses, "equal")[0] == 0


def test_the_full_cache_diverges_from_itself_by_nothing():
    model = tiny()
    pair = module._pair_ids(Bytes(), PAIRS[0], "cpu")
    T = pair[0].shape[1]
    uneven = np.array([[T // 3, 6], [9, T // 2]])
    found = module._divergence(model, pair, [5, 6, 7], KeyDiff(), {"all": np.full((2, 2), T), "few": np.full((2, 2), T // 4), "uneven": uneven})
    assert abs(found["all"]) < 1e-6 < min(found["few"], found["uneven"])
    asked, options = torch.cat([pair[1], torch.tensor([[5, 6]])], dim=1), {"logits_to_keep": 3}
    with torch.no_grad(), Compressor(model, KeyDiff(), budgets=uneven) as compressor:
        part = model(asked, past_key_values=compressor.prefill(pair[0]), **options).logits.double().log_softmax(-1)
    with torch.no_grad():
        whole = model(torch.cat([pair[0], asked], dim=1), **options).logits.double().log_softmax(-1)
    assert np.isclose(found["uneven"], float((whole.exp() * (whole - part)).sum(-1).mean()), rtol=1e-3)


def test_the_study_yields_rows_that_a_results_file_takes(tmp_path, monkeypatch):
    model = tiny()
    study = module._Study(model, Words(), tmp_path, n_train=1, n_new=2, length=250, tasks=("vt",), new_tokens=2)
    monkeypatch.setattr(module, "_SCORERS", (KeyDiff(), SnapKV(window=8)))
    rows = [module._measure_gain(study, KeyDiff()), module._measure_transfer(study, KeyDiff(), (220, 250)), module._measure_scorers(study),
            module._measure_variants(study, KeyDiff())]
    assert [r["name"] for r in rows] == ["profile_gain_KeyDiff", "profile_length", "profile_scorers", "profile_divergence"]
    again = json.loads(json.dumps(rows))
    assert all(np.isfinite(r["measured"]) for r in again) and set(again[3]["kinds"]) == {*module._VARIANTS, "equal", "adakv", "own"}
    assert len(again[0]["evicted"]["own"][0]) == len(module._RATIOS)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")
