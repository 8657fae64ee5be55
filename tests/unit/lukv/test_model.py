"""Training rows, the training loop with its resume, and the shipped model."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.lukv import model as module
from collai.lukv.model import (
    ANSWER,
    DATA,
    EOS_ID,
    MIX,
    PAD_ID,
    PLAN,
    REPEAT,
    REST,
    SKIP,
    Rows,
    Stage,
    TrainConfig,
    exact_answers,
    load_tiny,
    load_tokenizer,
    main,
    new_model,
    text_rows,
    token_needles,
    token_repeats,
    train_tiny,
    train_tokenizer,
    write_model,
)

TOY = TrainConfig(layers=1, width=32, heads=2, ffn=64, row_tokens=512, warmup=2, stages=(Stage(64, 6, {"tokens": 1, "repeat": 1}),))


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@given(st.integers(64, 700), st.integers(0, 2**31), st.booleans())
@settings(max_examples=25)
def test_every_question_repeats_a_needle_of_its_row(length, seed, once):
    ids, kinds = token_needles(3, length, 2048, np.random.default_rng(seed), once=once)
    assert ids.shape == kinds.shape == (3, length) and ids.min() >= 2 and ids.max() < 2048
    for row, kind in zip(ids, kinds, strict=True):
        answers = int((kind == ANSWER).sum())
        body, asked = row[:length - answers // 4 * 6], row[length - answers // 4 * 6:].reshape(-1, 6)
        needles = {int(body[i + 1]): body[i + 2:i + 6].tolist() for i in np.flatnonzero(body == 2)}
        assert (asked[:, 0] == 3).all() and len(needles) == len(asked)
        assert all(needles[int(q[1])] == q[2:].tolist() for q in asked)
        assert not once or len({int(q[1]) for q in asked}) == len(asked)
        assert set(np.unique(kind)) == {ANSWER, SKIP}


@given(st.integers(16, 300), st.integers(0, 2**31))
@settings(max_examples=25)
def test_a_repeated_block_is_repeated_to_the_end(length, seed):
    ids, kinds = token_repeats(2, length, 2048, np.random.default_rng(seed))
    for row, kind in zip(ids, kinds, strict=True):
        block = int((kind == SKIP).sum())
        assert (row[block:] == row[:-block]).all() and (kind[:block] == SKIP).all() and (kind[block:] == REPEAT).all()


@pytest.mark.parametrize("name", [name for name in MIX if name not in ("tokens", "repeat")])
def test_text_rows_hold_a_question_and_its_answer(name):
    tokenizer = load_tokenizer()
    ids, kinds = text_rows(name, 3, 1024, tokenizer, np.random.default_rng(3), dense=0.5)
    assert set(np.unique(kinds)) <= {REST, ANSWER, SKIP}
    for row, kind in zip(ids, kinds, strict=True):
        used = int((kind != SKIP).sum())
        assert (row[used:] == PAD_ID).all() and (kind[:used] != SKIP).all() and row[used - 1] == EOS_ID
        answer = tokenizer.decode(row[kind == ANSWER].tolist(), skip_special_tokens=False).split("<eos>")[0]
        words = [w.split(". ")[-1].strip(" ,") for w in answer.replace(" ", ",").split(",") if w.strip(" ,")]
        context = tokenizer.decode(row[:int(np.flatnonzero(kind == ANSWER)[0])].tolist())
        assert all(word in context for word in words if not word.rstrip(".").isdigit() or name.startswith("niah"))


def test_a_step_gives_the_same_rows_whatever_was_asked_before():
    config = TrainConfig(row_tokens=2048, stages=(Stage(512, 2, {"vt": 1, "tokens": 1}), Stage(1024, 2, MIX)))
    tokenizer = load_tokenizer()
    one, other = Rows(config, tokenizer), Rows(config, tokenizer)
    in_order = [one[i] for i in range(len(one))]
    backwards = [other[i] for i in reversed(range(len(other)))][::-1]
    assert len(in_order) == 4
    for (ids, kinds), (ids2, kinds2) in zip(in_order, backwards, strict=True):
        assert torch.equal(ids, ids2) and torch.equal(kinds, kinds2)
    assert not torch.equal(in_order[0][0], in_order[1][0])


def test_a_text_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="cwe does not fit into 300 tokens"):
        text_rows("cwe", 1, 300, load_tokenizer(), np.random.default_rng(0))


def test_more_questions_join_all_values_of_a_key():
    context = ("One of the special magic numbers for a-b is: 12.\nOne of the special magic numbers for a-b is: 34.\n"
               "One of the special magic words for c-d is: e-f.\n")
    pairs = module._more_questions(context, "niah_multivalue", np.random.default_rng(0), 20)
    assert {answer for _, answer in pairs} == {" 12, 34", " e-f"}
    assert {question.split("?")[0] for question, _ in pairs} == {
        "\nWhat are all the special magic numbers for a-b mentioned in the provided text",
        "\nWhat is the special magic word for c-d mentioned in the provided text"}
    assert module._more_questions("no needle here", "niah_single_1", np.random.default_rng(0), 3) == []


@pytest.mark.parametrize("steps", [0, 7, -1])
def test_steps_outside_the_plan_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps must be in \[1, 6\], the length of the plan, got {steps}"):
        train_tiny(TOY, "cpu", steps)


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match=r"steps must be in \[1, 0\]"):
        train_tiny(replace(TOY, stages=()))


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has 2048 tokens, the model only 100"):
        load_tokenizer(100)


def test_training_lowers_the_loss_and_does_not_touch_global_randomness():
    before = torch.random.get_rng_state()
    config = replace(TOY, lr=1e-2, stages=(Stage(512, 12, {"vt": 1}),))
    model = train_tiny(config)
    assert torch.equal(before, torch.random.get_rng_state())
    ids, kinds = (t.long() for t in Rows(config, load_tokenizer())[0])
    with torch.no_grad():
        assert module._loss(model, ids, kinds)[0] < module._loss(new_model(config), ids, kinds)[0] - 0.5
    assert not model.training and model.log[-1]["step"] == 12


def test_the_learning_rate_rises_holds_and_falls():
    config = TrainConfig(warmup=10, decay=0.25)
    factors = [module._lr_factor(step, 100, config) for step in range(100)]
    assert factors[:2] == [0.1, 0.2] and factors[10:75] == [1.0] * 65
    assert np.isclose(factors[99], 1 / 25) and np.all(np.diff(factors[75:]) < 0)


def test_worker_processes_write_the_same_rows(tmp_path):
    alone, helped = train_tiny(TOY), train_tiny(replace(TOY, workers=1))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), helped.parameters(), strict=True))


KILLED = """
import torch; torch.set_num_threads(1)
from collai.lukv import model as m
save = m._save
m._save = lambda *args: (save(*args), print("saved", flush=True))
m.SAVE_EVERY = 2
config = m.TrainConfig(layers=1, width=32, heads=2, ffn=64, row_tokens=512, warmup=2, folder={folder!r},
                       stages=(m.Stage(64, 6, {{"tokens": 1, "repeat": 1}}),))
step = m._step
m._step = lambda *args: (step(*args), __import__("time").sleep({pause}))[0]
m.train_tiny(config)
"""


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path):
    folder = str(tmp_path / "run")
    run = [sys.executable, "-c", KILLED.format(folder=folder, pause=0.5)]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "saved\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] in (2, 4)
    resumed, straight = train_tiny(replace(TOY, folder=folder)), train_tiny(TOY)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


def test_the_shipped_model_is_what_its_record_says(tiny):
    model, tokenizer = tiny
    record = json.loads((DATA / "training.json").read_text())
    for name, wanted in record["sha256"].items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == wanted
        assert (DATA / name).stat().st_size < 16 * 2**20
    assert record["log"][-1]["step"] == sum(stage.steps for stage in PLAN)
    assert sum(p.numel() for p in model.parameters()) == 5_639_424 and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.encode("The grass is green.", add_special_tokens=False) == load_tokenizer().encode(
        "The grass is green.", add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["collai-lu-6m.safetensors", "tokenizer.json"])
def test_a_changed_file_is_refused(name, tmp_path, monkeypatch):
    for file in ("collai-lu-6m.safetensors", "tokenizer.json", "training.json"):
        data = (DATA / file).read_bytes()
        (tmp_path / file).write_bytes(data + b" " if file == name else data)
    monkeypatch.setattr(module, "DATA", tmp_path)
    with pytest.raises(RuntimeError, match=rf"{name} is not the file that was trained"):
        load_tiny()


@given(st.text(max_size=60))
@settings(max_examples=50)
def test_any_text_survives_the_tokenizer(text):
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_names_and_numbers_are_split_alike_everywhere():
    tokenizer = load_tokenizer()
    assert tokenizer.encode("WRHOI", add_special_tokens=False).tokens == list("WRHOI")
    assert tokenizer.encode("is: 9071211.", add_special_tokens=False).tokens[2:] == ["Ġ9", *"071211", "."]


def test_a_tokenizer_is_learnt_from_the_tasks():
    tokenizer = train_tokenizer(vocab=400, n=40)
    assert tokenizer.get_vocab_size() == 400 and tokenizer.token_to_id("<eos>") == EOS_ID
    assert "Ġspecial" in tokenizer.get_vocab()


def test_the_model_finds_needles_and_exactness_is_what_greedy_decoding_gives(tiny):
    model, tokenizer = tiny[0], load_tokenizer()
    assert exact_answers(model, tokenizer, "niah_single_1", 512, n=2, seed=5) == 1.0
    ids, kinds = (torch.from_numpy(a) for a in text_rows("niah_multiquery", 3, 512, tokenizer, np.random.default_rng((5, 512)), dense=0.0))
    right = 0
    for row, kind in zip(ids, kinds, strict=True):
        answer = row[kind == ANSWER]
        prompt = row[None, :int((kind == ANSWER).nonzero()[0])]
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False)
        right += torch.equal(said[0, prompt.shape[1]:], answer)
    assert exact_answers(model, tokenizer, "niah_multiquery", 512, n=3, seed=5) == right / 3


def test_what_was_trained_is_written_and_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TrainConfig", lambda **given: replace(TOY, vocab=2048, **given))
    main(["--device", "cpu", "--out", str(tmp_path), "--workers", "0", "--steps", "2"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["log"][-1]["step"] == 2 and set(record["sha256"]) == {"collai-lu-6m.safetensors", "tokenizer.json"}
    monkeypatch.setattr(module, "DATA", tmp_path)
    model, _ = load_tiny()
    assert model.config.hidden_size == 32
    write_model(tmp_path, train_tiny(TOY, "cpu", 1))
    assert load_tiny()[0].config.hidden_size == 32


def test_the_gate_is_measured_into_a_results_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIX", {"niah_single_1": 1, "tokens": 1})
    monkeypatch.setattr(module, "exact_answers", lambda model, tokenizer, name, length, n, seed: 0.5)
    main(["--measure", "--device", "cpu", "--out", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert rows["model_exact_niah_single_1"]["right"] == 100 and rows["model_exact_niah_single_1"]["n"] == 200
