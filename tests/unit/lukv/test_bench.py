"""Evaluation: any model on RULER and LongBench records, grids from one prefill, files that survive a kill, statistics."""
import json
import multiprocessing
import os
import re
import signal
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from joblib.externals.loky.backend.reduction import dumps, loads
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from collai.lukv import bench
from collai.lukv.bench import COLUMNS, LONGBENCH_ASK, calibration_pairs, evaluate, grid, measure, summary, verdicts
from collai.lukv.profile import BudgetCurve
from collai.lukv.ragged import Compressor, RaggedCache, full_layers
from collai.lukv.scorers import ExpectedAttention, KeyDiff, SnapKV, force_protected
from collai.lukv.tasks import LONGBENCH_NEW_TOKENS, RULER_NEW_TOKENS, ruler_task
from collai.lukv.utility import rank_by_score

torch.set_num_threads(1)
SHAPE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "initializer_range": 0.5}
MODELS = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=1, bos_token_id=None)),
          "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, eos_token_id=[1, 2])),
          "window": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=24,
                                                         max_window_layers=2, eos_token_id=1))}


class Words:
    """Tokenizer of words and single digits; numbers by checksum, so that every process has the same ones."""

    def encode(self, text, add_special_tokens=False):
        return [3 + zlib.crc32(part.encode()) % 253 for part in re.findall(r"\d|\s?[A-Za-z]+|\S", text)]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"<{i}>" for i in ids)


class Starting(Words):
    """The same with a start token, which it puts there unless told not to."""

    bos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [2] * add_special_tokens + super().encode(text)


def model_of(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[kind]().eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


def flat(layers=3, heads=2):
    """Curve that prunes all heads alike."""
    return BudgetCurve(np.repeat(np.arange(1, 100) / 100, layers * heads).reshape(99, layers, heads))


LONG = {"input": "Who?", "context": "Bo sat here. " * 8, "answers": ["Bo", "bo"], "length": 40, "dataset": "hotpotqa",
        "language": "en", "all_classes": None, "_id": "x"}


# --- records -------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["niah_single_1", "niah_multivalue", "vt", "cwe", "fwe"])
def test_a_ruler_record_is_cut_into_context_and_question_and_scored_by_its_metric(task):
    record = ruler_task(task, Words(), 760, 1, 3)[0]
    kept = json.dumps(record)
    kind, context, question = bench._parts(record)
    assert task.startswith(kind) and context + question == record["input"] + record["answer_prefix"]
    assert bench._new_tokens(kind) == RULER_NEW_TOKENS[task]
    assert bench._points(record, kind, " ".join(record["outputs"]).lower()) == 100
    one = bench._points(record, kind, record["outputs"][0])
    assert one == pytest.approx(100 / len(record["outputs"]), abs=0.01)
    assert json.dumps(record) == kept


def test_a_variant_named_in_the_record_is_kept():
    record = ruler_task("niah_multikey_2", Words(), 300, 1, 0)[0]
    assert bench._parts(record)[0] == "niah" and bench._parts(record | {"task": "niah_multikey_2"})[0] == "niah_multikey_2"


def test_every_longbench_task_has_a_question_and_the_official_length():
    assert set(LONGBENCH_ASK) == set(LONGBENCH_NEW_TOKENS)
    for task in LONGBENCH_ASK:
        kind, context, question = bench._parts(LONG | {"dataset": f"{task}_e"})
        assert (kind, context) == (task, LONG["context"]) and ("Who?" in question) == ("{input}" in LONGBENCH_ASK[task])
        assert bench._new_tokens(task) == LONGBENCH_NEW_TOKENS[task]
    assert bench._points(LONG, "hotpotqa", " The Bo.") == 100 and bench._points(LONG, "hotpotqa", "Ana") == 0
    classes = {"dataset": "trec", "answers": ["City"], "all_classes": ["City", "Food"]}
    assert bench._points(LONG | classes, "trec", "\nCity or Food\nFood") == 50


def test_unknown_records_are_refused():
    with pytest.raises(KeyError, match="unknown LongBench task 'poems'; known are narrativeqa"):
        bench._parts(LONG | {"dataset": "poems"})
    with pytest.raises(ValueError, match="no question found"):
        bench._parts({"input": "hello", "outputs": ["x"], "answer_prefix": ""})


def test_a_start_token_comes_before_the_context_only_if_the_tokenizer_puts_it_there():
    assert bench._ids(Starting(), "a b", "cpu", start=True)[0, 0] == 2
    assert bench._ids(Starting(), "a b", "cpu").tolist() == bench._ids(Words(), "a b", "cpu", start=True).tolist()
    silent = Words()
    silent.bos_token_id = 2
    assert bench._ids(silent, "a b", "cpu", start=True)[0, 0] != 2


@pytest.mark.parametrize(("eos", "ends"), [(None, []), (5, [5]), ([5, 6], [5, 6])])
def test_the_answer_stops_before_an_end_token(eos, ends):
    assert bench._ends(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))) == ends
    assert bench._text(Words(), [7, 5, 8], ends) == ("<7>" if ends else "<7> <5> <8>")


# --- evaluate ------------------------------------------------------------------------------------

def test_evaluate_gives_one_row_a_record_with_what_was_asked_and_kept(model):
    records = [*ruler_task("vt", Words(), 260, 2, 0), LONG]
    full = evaluate(model, Words(), records, max_new_tokens=3)
    half = evaluate(model, Words(), records, Compressor(model, KeyDiff(), ratio=0.5), max_new_tokens=3)
    assert list(full) == list(COLUMNS) and full.task.tolist() == ["vt", "vt", "hotpotqa"] and full["index"].tolist() == [0, 1, 2]
    lengths = [len(Words().encode(bench._parts(r)[1])) for r in records]
    assert full.kept.tolist() == [6 * n for n in lengths] and half.kept.tolist() == [6 * (n // 2) for n in lengths]
    assert set(full.budgets) == {"full"} and set(half.budgets) == {"uniform"}
    assert set(full.ratio) == {0.0} and set(half.ratio) == {0.5}
    assert all(len(text.split()) <= 3 for text in full.pred)
    assert model.config._attn_implementation == "sdpa"


def test_the_full_cache_answer_is_that_of_plain_generate(model):
    record = ruler_task("vt", Words(), 260, 1, 1)[0]
    ids = torch.tensor([[i for text in bench._parts(record)[1:] for i in Words().encode(text)]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert evaluate(model, Words(), [record], max_new_tokens=6).pred[0] == bench._text(Words(), out[0, ids.shape[1]:].tolist(), [1])


@pytest.mark.parametrize(("budgets", "ratio", "word"), [(np.full((3, 2), 20), None, "counts"), (flat(), 0.75, "curve"),
                                                         (lambda scores, layer: np.full(2, 9), 0.5, "function")])
def test_the_budgets_column_is_one_word_and_counts_are_measured(model, budgets, ratio, word):
    record = ruler_task("vt", Words(), 260, 1, 1)[0]
    row = evaluate(model, Words(), [record], Compressor(model, KeyDiff(), ratio=ratio, budgets=budgets), max_new_tokens=1).iloc[0]
    total = 6 * len(Words().encode(bench._parts(record)[1]))
    assert row.budgets == word and row.ratio == (pytest.approx(1 - 120 / total) if ratio is None else ratio)


def test_an_interrupt_keeps_the_finished_rows_and_says_how_to_go_on(model, monkeypatch):
    records, answer = ruler_task("vt", Words(), 260, 3, 0), bench._answer

    def stop_at_the_third(*args):
        if args[3] == 2:
            raise KeyboardInterrupt
        return answer(*args)

    whole = evaluate(model, Words(), records, max_new_tokens=2)
    monkeypatch.setattr(bench, "_answer", stop_at_the_third)
    with pytest.warns(UserWarning, match=r"stopped: 2 of 3 records are finished; records\[2:\] are left"):
        first = evaluate(model, Words(), records, Compressor(model, KeyDiff(), ratio=0.0), max_new_tokens=2)
    monkeypatch.undo()
    rest = evaluate(model, Words(), records[len(first):], max_new_tokens=2)
    assert first.pred.tolist() + rest.pred.tolist() == whole.pred.tolist()
    assert first["index"].tolist() + rest["index"].tolist() == [0, 1, 2]
    assert model.config._attn_implementation == "sdpa"


# --- grid ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_a_grid_are_those_of_separate_runs(kind):
    model, scorers = model_of(kind), [KeyDiff(), SnapKV(window=8, kernel=3)]
    curves = dict.fromkeys(("lukv", "lukv_loss"), dict.fromkeys(("KeyDiff", "SnapKV"), flat()))
    size = {"n": 1, "max_seq_length": 260, "seed": 5}
    rows = grid(model, Words(), ["vt"], scorers=scorers, ratios=(0.5, 0.8), curves=curves, max_new_tokens=5, **size)
    record = {"task": "vt"} | ruler_task("vt", Words(), 260, 1, 5)[0]
    assert len(rows) == 1 + 2 * 6 * 2 and rows.pred.nunique() > 4
    for row in rows[rows.budgets != "oracle"].itertuples():
        scorer = {s.name: s for s in scorers}.get(row.scorer)
        budgets = flat() if row.budgets in bench.OURS else row.budgets
        alone = None if scorer is None else Compressor(model, scorer, ratio=row.ratio, budgets=budgets)
        found = evaluate(model, Words(), [record], alone, max_new_tokens=5).iloc[0]
        assert (found.pred, found.kept, found.score) == (row.pred, row.kept, row.score), row
    assert model.config._attn_implementation == "sdpa"


def test_oracle_rows_are_those_of_its_budgets_and_no_budgets_lose_less(model):
    record = {"task": "vt"} | ruler_task("vt", Words(), 260, 1, 5)[0]
    _, context, question = bench._parts(record)
    cache, scores = bench._read(model, bench._ids(Words(), context, "cpu"), [KeyDiff()])
    _, utility = bench._own_future(model, bench._twin(cache), bench._ids(Words(), question, "cpu"), 5, [1])
    forced = force_protected(scores[0], 4, 1)
    best = bench._oracle_budgets(utility, forced, 5, [0.8])[0]
    rows = grid(model, Words(), ["vt"], scorers=[KeyDiff()], allocators=("oracle",), ratios=(0.8,), n=1, max_seq_length=260,
                seed=5, max_new_tokens=5)
    alone = evaluate(model, Words(), [record], Compressor(model, KeyDiff(), budgets=best), max_new_tokens=5).iloc[0]
    assert (alone.pred, alone.kept) == (rows.pred[1], rows.kept[1]) and best.min() >= 5
    assert best.sum() == round(0.2 * utility.numel())
    ranked = rank_by_score(utility, forced).flatten(0, 1).numpy()
    rng = np.random.default_rng(0)
    lost = [sum(u[b:].sum() for u, b in zip(ranked, budgets, strict=True)) for budgets in
            [best.ravel(), *(5 + rng.multinomial(best.sum() - 30, rng.dirichlet(np.full(6, 9.0))) for _ in range(200))]]
    assert lost[0] <= min(lost[1:]) + 1e-12


def test_the_read_cache_is_left_as_it_was_by_the_full_answer(model):
    ids = bench._ids(Words(), "a b c d e f g h " * 6, "cpu")
    cache, _ = bench._read(model, ids, [KeyDiff(sink=2)])
    keys = [layer.tail.keys.clone() for layer in cache.layers]
    twin = bench._twin(cache)
    bench._decode(model, twin, bench._ids(Words(), "what", "cpu"), 1, 4, [])
    assert cache.get_seq_length() == ids.shape[1] and twin.get_seq_length() == ids.shape[1] + 4
    assert all(torch.equal(layer.tail.keys, k) and layer.tail.length == ids.shape[1] for layer, k in zip(cache.layers, keys, strict=True))


def test_rows_that_ended_leave_the_batch_and_change_nothing_for_the_others(model):
    record = ruler_task("vt", Words(), 260, 1, 5)[0]
    asked, sizes = bench._ids(Words(), bench._parts(record)[2], "cpu"), []

    def answers(ends):
        cache, scores = bench._read(model, bench._ids(Words(), bench._parts(record)[1], "cpu"), [KeyDiff()])
        counts = np.stack([np.full((3, 2), b) for b in (8, 16, 24, 32, 40, 48)])
        with Compressor(model, KeyDiff(), ratio=0.0):
            bench._spread(cache, scores, [0] * 6, counts)
            assert torch.equal(cache.lengths(), torch.as_tensor(counts).transpose(0, 1))
            select = RaggedCache.batch_select_indices
            RaggedCache.batch_select_indices = lambda self, rows: (sizes.append(len(rows)), select(self, rows))[1]
            try:
                return bench._decode(model, cache, asked, 6, 12, ends)
            finally:
                RaggedCache.batch_select_indices = select

    free = answers([])
    ends = [free[0][2], free[3][4]]
    bound = answers(ends)
    assert sizes and all(len(row) == 12 for row in free)
    for long, short in zip(free, bound, strict=True):
        assert bench._text(Words(), long, ends) == bench._text(Words(), short, ends)


def test_an_answer_that_ends_at_once_still_has_a_future(model):
    cache, _ = bench._read(model, bench._ids(Words(), "a b c d e f g h " * 6, "cpu"), [KeyDiff(sink=2)])
    tokens, utility = bench._own_future(model, cache, bench._ids(Words(), "what is it", "cpu"), 9, list(range(256)))
    assert len(tokens) == 1 and utility.shape == (3, 2, 48) and float(utility.min()) >= 0 < float(utility.max())


@pytest.mark.parametrize(("wrong", "text"), [
    ({"ratios": (0.0, 0.5)}, r"ratios must be in \(0, 1\), the full cache comes by itself; got \[0.0\]"),
    ({"ratios": (1.0,)}, r"ratios must be in \(0, 1\)"),
    ({"scorers": []}, r"scorers must have different names, got \[\]"),
    ({"scorers": [KeyDiff(), KeyDiff(sink=2)]}, "scorers must have different names, got"),
    ({"allocators": ("lukv",)}, "allocator 'lukv' needs a curve for KeyDiff"),
])
def test_plans_that_cannot_run_are_refused(model, wrong, text):
    with pytest.raises(ValueError, match=text):
        grid(model, Words(), ["vt"], **{"scorers": [KeyDiff()], "n": 1, "max_seq_length": 260} | wrong)


# --- files ---------------------------------------------------------------------------------------

PLAN = {"scorers": [KeyDiff()], "allocators": ("uniform",), "ratios": (0.5,), "max_seq_length": 260, "max_new_tokens": 2}


def run_until_killed(path):
    torch.set_num_threads(1)
    done = bench._record_rows
    bench._record_rows = lambda *args: (time.sleep(0.1), done(*args))[1]
    grid(model_of("llama"), Words(), ["vt"], n=12, path=path, **PLAN)


def test_a_killed_run_goes_on_where_it_was(tmp_path, model):
    path = tmp_path / "deep" / "grid.jsonl"
    child = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(path,))
    child.start()
    while not path.is_file() or path.read_bytes().count(b"\n") < 4:
        assert child.exitcode is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    before = path.read_bytes()
    called = []
    rows = bench._record_rows
    try:
        bench._record_rows = lambda *args: (called.append(1), rows(*args))[1]
        found = grid(model, Words(), ["vt"], n=12, path=path, **PLAN)
    finally:
        bench._record_rows = rows
    finished = before.count(b"\n") - 1
    assert 3 <= finished < 12 and len(called) == 12 - finished and path.read_bytes().startswith(before[:before.rfind(b"\n") + 1])
    assert found.equals(grid(model, Words(), ["vt"], n=12, **PLAN))


@pytest.mark.parametrize("cut", [b'[{"task": "vt", "ind', "[{\"pred\": \"é".encode()[:-1]])
def test_a_cut_last_line_is_dropped(tmp_path, model, cut):
    path = tmp_path / "grid.jsonl"
    first = grid(model, Words(), ["vt"], n=2, path=path, **PLAN)
    whole = path.read_bytes()
    path.write_bytes(whole[:whole[:-1].rfind(b"\n") + 1] + cut)
    assert first.equals(grid(model, Words(), ["vt"], n=2, path=path, **PLAN)) and path.read_bytes() == whole


def test_an_unfinished_first_line_starts_anew(tmp_path, model):
    path = tmp_path / "grid.jsonl"
    path.write_text('{"alloc')
    grid(model, Words(), ["vt"], n=1, path=path, **PLAN)
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("other", [{"ratios": (0.6,)}, {"seed": 1}, {"scorers": [KeyDiff(sink=2)]}, {"max_new_tokens": 3}])
def test_a_file_of_another_grid_is_refused(tmp_path, model, other):
    path = tmp_path / "grid.jsonl"
    grid(model, Words(), ["vt"], n=1, path=path, **PLAN)
    with pytest.raises(ValueError, match=r"grid.jsonl belongs to another grid"):
        grid(model, Words(), ["vt"], n=1, path=path, **PLAN | other)


def test_the_head_of_a_file_tells_models_and_curves_apart(model):
    plan = bench._Plan((KeyDiff(),), ("lukv",), (0.5,), {"lukv": {"KeyDiff": flat()}})
    curve = flat()
    curve.ratios[50, 0] += [0.1, -0.1]
    changed = bench._Plan((KeyDiff(),), ("lukv",), (0.5,), {"lukv": {"KeyDiff": curve}})
    torch.manual_seed(1)
    heads = {bench._head(model, plan, {}), bench._head(model, changed, {}), bench._head(MODELS["llama"](), plan, {})}
    assert len(heads) == 3


def test_work_for_another_process_can_be_sent(model):
    plan = bench._Plan((KeyDiff(), ExpectedAttention()), ("uniform",), (0.5,), {})
    records = [{"task": "vt"} | r for r in ruler_task("vt", Words(), 260, 1, 0)]
    sent = loads(dumps((model, Words(), plan, None, 2, records)))
    assert bench._finish(*sent) == bench._finish(model, Words(), plan, None, 2, records)


# --- statistics ----------------------------------------------------------------------------------

def scores(seed=0, n=60):
    """Rows of three tasks with known means."""
    rng = np.random.default_rng(seed)
    means = {("none", "full", 0.0): (100, 95, 90), ("S", "uniform", 0.8): (60, 95, 20), ("S", "uniform", 0.9): (30, 94, 0),
             ("S", "adakv", 0.8): (70, 95, 84), ("S", "adakv", 0.9): (40, 94, 60), ("S", "lukv", 0.8): (100, 95, 85),
             ("S", "lukv", 0.9): (100, 94, 60), ("S", "oracle", 0.8): (100, 95, 88), ("S", "oracle", 0.9): (100, 95, 80)}
    return [{"task": t, "index": i, "scorer": s, "budgets": a, "ratio": r, "score": 100.0 * (rng.random() < m / 100)}
            for (s, a, r), each in means.items() for t, m in zip("xyz", each, strict=True) for i in range(n)]


def mean_of(rows, task, *setting):
    return np.mean([r["score"] for r in rows if (r["scorer"], r["budgets"], r["ratio"]) == setting and r["task"] in task])


def test_the_summary_holds_means_intervals_and_paired_gains_of_every_task():
    rows = scores()
    found = {row["name"]: row for row in summary(rows)}
    assert len(found) == 4 * 4 + 3
    for allocator in ("uniform", "adakv", "lukv", "oracle"):
        for task, tasks in (*zip("xyz", "xyz", strict=True), ("mean", "xyz")):
            row = found[f"bench_S_{allocator}_{task}"]
            expected = [mean_of(rows, tasks, "none", "full", 0.0), *(mean_of(rows, tasks, "S", allocator, r) for r in (0.8, 0.9))]
            assert np.allclose(row["score"], expected, atol=1e-3) and row["measured"] == row["score"][1]
            assert all(lo <= m <= hi for lo, m, hi in zip(row["lo"], row["score"], row["hi"], strict=True))
            assert row["ratios"] == [0.0, 0.8, 0.9] and row["n"] == 60
    gain = found["bench_gain_S_lukv_uniform"]
    ours, other = (mean_of(rows, "xyz", "S", allocator, 0.8) for allocator in ("lukv", "uniform"))
    assert gain["score"][0] == 0 and gain["measured"] == pytest.approx(ours - other, abs=1e-3)
    json.dumps(list(found.values()))


def test_full_marks_have_wilsons_limit_and_not_a_point():
    mean, lo, hi = bench._interval(np.tile([100.0, 0.0, 100.0], (30, 1)) - np.r_[np.zeros((29, 3)), [[0, 0, 100.0]]])
    z = 1.959963984540054
    assert mean.tolist()[:2] == [100, 0] and lo[0] == pytest.approx(100 * 30 / (30 + z * z)) and hi[0] == 100
    assert hi[1] == pytest.approx(100 * z * z / (30 + z * z)) and lo[1] == 0 and lo[2] < mean[2] < hi[2] == 100


def test_nothing_can_be_kept_of_a_score_of_zero():
    with pytest.raises(ValueError, match="the full cache scores 0"):
        verdicts([row | {"score": 0.0} for row in scores()])


def test_the_verdicts_answer_the_four_questions():
    rows = scores()
    found = {row["name"]: row for row in verdicts(rows)}
    full, lukv = mean_of(rows, "xyz", "none", "full", 0.0), mean_of(rows, "xyz", "S", "lukv", 0.8)
    kept = found["bench_kept_S_lukv"]
    assert kept["measured"] == pytest.approx(lukv / full) and kept["ci"][0] < kept["measured"] < kept["ci"][1]
    assert found["bench_won_S_lukv"] == {"name": "bench_won_S_lukv", "unit": "tasks", "measured": 1, "tasks": ["x"]}
    regret = found["bench_regret_S_lukv"]
    assert regret["measured"] == pytest.approx(mean_of(rows, "xyz", "S", "oracle", 0.8) - lukv)
    assert regret["ci"][0] <= regret["measured"] <= regret["ci"][1]
    share = [1, lukv / full, mean_of(rows, "xyz", "S", "lukv", 0.9) / full]
    right = np.interp(-0.97, -np.array(share), [0, 0.8, 0.9])
    assert share[1] > 0.97 > share[2] and found["bench_saved_S_lukv"]["measured"] == pytest.approx(right)


@pytest.mark.parametrize(("share", "ratio"), [([1, 1, 1], 0.9), ([1, 0.99, 0.96], 0.5 + 0.4 * 2 / 3), ([0.9, 1, 1], 0),
                                              ([1, 0.95, 1], 0.5 * 0.6), ([1, 0.97, 0.5], 0.5), ([1.2, 1.1, 0.97], 0.9)])
def test_the_largest_ratio_is_where_the_share_first_falls_below(share, ratio):
    both = bench._largest_ratio(np.array([share, [1, 1, 1]], dtype=float), [0.0, 0.5, 0.9], 0.97)
    assert both.tolist() == [pytest.approx(ratio), 0.9]


# --- study ---------------------------------------------------------------------------------------

def test_calibration_texts_are_not_test_texts():
    pairs = calibration_pairs(Words(), ("vt", "fwe"), n=2, max_seq_length=300)
    tests = [bench._parts(r)[1:] for t in ("vt", "fwe") for r in ruler_task(t, Words(), 300, 50, 0)]
    assert len(pairs) == 4 and not set(pairs) & set(tests)
    assert pairs == [bench._parts(r)[1:] for t in ("vt", "fwe") for r in ruler_task(t, Words(), 300, 2, 10_000)]


def test_the_study_runs_from_profiles_to_rows_and_again_from_its_files(tmp_path, model, monkeypatch):
    monkeypatch.setattr(bench, "TASKS", ("vt", "fwe"))
    monkeypatch.setattr(bench, "OTHER_TASKS", ("niah_single_1",))
    monkeypatch.setattr(bench, "SCORERS", (KeyDiff(), SnapKV(window=8, kernel=3)))
    monkeypatch.setattr(bench, "_points", lambda record, task, pred: float(zlib.crc32(pred.encode()) % 101))
    size = {"n": 3, "n_changed": 2, "n_choice": 1, "pairs": 1, "max_seq_length": 400, "max_new_tokens": 2, "horizon": 2}
    rows = bench._study(model, Words(), tmp_path, 1, **size)
    names = {row["name"] for row in rows}
    assert len(names) == len(rows) and {"bench_KeyDiff_lukv_mean", "bench_gain_SnapKV_lukv_adakv", "bench_kept_SnapKV_lukv_loss",
                                        "bench_won_KeyDiff_lukv", "bench_ablation_KeyDiff_other_scorer"} <= names
    chosen = {row["name"]: row["measured"] for row in rows if row.get("chosen")}
    assert len(chosen) == 1 and max(chosen.values()) == max(row["measured"] for row in rows if "choice" in row["name"])
    changed = [row for row in rows if "ablation" in row["name"]]
    assert len(changed) == 2 * 4 and all(row["n"] == 2 and row["ci"][0] <= row["measured"] <= row["ci"][1] for row in changed)
    monkeypatch.setattr(bench, "_record_rows", lambda *_: pytest.fail("a finished record was run again"))
    assert bench._study(model, Words(), tmp_path, 1, **size) == rows


def test_sliding_window_layers_are_no_part_of_budgets():
    model = model_of("window")
    cache, scores = bench._read(model, bench._ids(Words(), "a b c d e f g h " * 6, "cpu"), [KeyDiff(sink=2)])
    assert full_layers(model) == [0, 1] and scores.shape == (1, 2, 2, 48)
    bench._spread(cache, scores, [0, 0, 0], np.full((3, 2, 2), 7))
    assert cache.layers[2].keys.shape[0] == 3 and cache.lengths()[:2].unique().tolist() == [7]


def test_measuring_needs_a_known_device():
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")
