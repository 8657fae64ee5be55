"""generate: TinyLM and a transformers Qwen3 against recomputation without cache, turns, randomness, and bad input."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from scipy.stats import chisquare

from collai.core.tinylm import CharTokenizer, TinyLM
from collai.rl import sample
from collai.rl.sample import generate, load_policy, measure, pick, uniforms
from collai.rl.stats import model_token_stats, token_stats
from collai.rl.tasks import CalcTool, ChainSum, Mixture, Problem, PromptTask

SIZES = {"hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "mlp": 64}


def opinionated(tok, scale=0.3, seed=0, **sizes):
    model, g = TinyLM(len(tok), **(SIZES | sizes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in model.parameters():
            if w.ndim == 2:
                w.normal_(0, scale, generator=g)
    return model


def as_qwen3(model):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    c = model.config
    peer = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c["vocab_size"], hidden_size=c["hidden"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], intermediate_size=c["mlp"], tie_word_embeddings=False))
    peer.load_state_dict(model.state_dict())
    return peer.eval()


class Echo(CalcTool):
    """Replies of many lengths, also none and an empty one."""

    stop = ";"

    def step(self, text):
        return ["9=", "", "12<34+5=", None, "=0"][len(text) % 5]

    def reward(self, problem, transcript):
        return float(len(transcript))


TASK = Echo(3)
TOK = TASK.tokenizer()
PROBLEMS = [Problem("(1+2)*3-4=5"[:size], "", "", TASK) for size in (3, 11, 1, 7)]


@pytest.fixture(scope="module")
def model():
    return opinionated(TOK)


@pytest.fixture(scope="module")
def qwen(model):
    return as_qwen3(model)


def recomputed(policy, batch, **kw):
    attended = (batch.turn >= 0).long()
    return model_token_stats(policy, torch.cat((batch.prompt_ids, batch.ids), 1), torch.cat((batch.prompt_mask, attended), 1),
                             batch.ids.shape[1], mask=batch.mask, **kw)


@pytest.mark.parametrize("name", ["model", "qwen"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_the_cached_pass_equals_a_pass_without_cache(request, name, temperature):
    policy = request.getfixturevalue(name)
    before = [w.clone() for w in policy.parameters()]
    batch = generate(policy, TOK, PROBLEMS, n=5, max_new=30, seed=1, max_turns=4, temperature=temperature)
    batch.validate()
    with torch.no_grad():
        again = recomputed(policy, batch, temperature=temperature or 1.0)
    for mine, other in ((batch.old_logp, again.logp), (batch.entropy, again.entropy), (batch.energy, again.energy)):
        assert (mine - other).abs().max() < 1e-4 and (mine[batch.mask == 0] == 0).all()
        assert mine.dtype == torch.float32
    assert (batch.mask == 0).logical_and(batch.turn >= 0).any() and (temperature == 0 or batch.turn.max() == 3)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_both_models_write_the_same(model, qwen):
    ours, theirs = (generate(m, TOK, PROBLEMS, n=5, max_new=30, seed=2, max_turns=4) for m in (model, qwen))
    same = [a == b for a, b in zip(ours.meta["text"], theirs.meta["text"], strict=True)]
    assert np.mean(same) > 0.9 and len(set(ours.meta["text"])) > 10


def test_turns_follow_the_rules(model):
    batch = generate(model, TOK, PROBLEMS, n=12, max_new=30, seed=3, max_turns=4)
    ends, kinds = {TOK.eos_token_id, *TOK.encode(";")}, set()
    assert batch.uid == [i for i in range(4) for _ in range(12)]
    for row in range(len(batch)):
        ids, mask, turn = (x[row][batch.turn[row] >= 0].tolist() for x in (batch.ids, batch.mask, batch.turn))
        assert batch.meta["text"][row] == TOK.decode(ids)
        assert batch.rewards[row].nonzero().flatten().tolist() == [max(i for i, m in enumerate(mask) if m)] or not TOK.decode(ids)
        assert batch.rewards[row].sum() == len(TOK.decode(ids))
        for number in range(turn[-1] + 1):
            own, reply = ([i for i, t, m in zip(ids, turn, mask, strict=True) if (t, m) == (number, k)] for k in (1, 0))
            said = TASK.step(TOK.decode(own))
            ended = own[-1] in ends
            assert not ends & set(own[:-1])
            if number < turn[-1]:
                assert ended and said is not None and TOK.decode(reply) == said
            else:
                assert not reply
                full = len(ids) == 30 if not ended else said is not None and number < 3 and len(ids) + len(said) >= 30
                assert batch.meta["truncated"][row] == full
                assert full or number == 3 or said is None
                kinds.add((ended, said is None, full, number == 3))
    assert len(kinds) >= 4, "the batch must show several ways to end"


def test_rows_do_not_notice_their_neighbours(model):
    whole = generate(model, TOK, PROBLEMS, n=8, max_new=30, seed=4, max_turns=4)
    part = generate(model, TOK, PROBLEMS[:2], n=8, max_new=30, seed=4, max_turns=4)
    assert np.mean([a == b for a, b in zip(part.meta["text"], whole.meta["text"], strict=False)]) > 0.9
    again = generate(model, TOK, PROBLEMS, n=8, max_new=30, seed=4, max_turns=4)
    assert again.meta == whole.meta and torch.equal(again.old_logp, whole.old_logp)
    assert generate(model, TOK, PROBLEMS, n=8, max_new=30, seed=5, max_turns=4).meta != whole.meta


def test_pieces_of_statistics_give_the_same(model, monkeypatch):
    whole = generate(model, TOK, PROBLEMS, n=8, max_new=30, seed=4, max_turns=4)
    add = sample._Scores.add
    monkeypatch.setattr(sample._Scores, "add", lambda self, *args: (add(self, *args), self.finish()))
    pieces = generate(model, TOK, PROBLEMS, n=8, max_new=30, seed=4, max_turns=4)
    assert (pieces.old_logp - whole.old_logp).abs().max() < 1e-6 and pieces.meta == whole.meta


def test_the_law_of_short_answers(model):
    """Chi-square over all answers of two tokens, cached and batched sampling against calls without cache."""
    class Silent(ChainSum):
        def reward(self, problem, transcript):
            return 0.0

    tok = CharTokenizer("ab ")
    tiny, n = opinionated(tok, 0.5, hidden=16, head_dim=8, mlp=16), 4000
    problems = [Problem(text, "", "", Silent(2)) for text in ("a", "ba b")]
    batch = generate(tiny, tok, problems, n=n, max_new=2, seed=0)
    for k, p in enumerate(problems):
        with torch.no_grad():
            first = tiny(torch.tensor([tok.encode(p.prompt)])).logits[0, -1].softmax(-1)
            second = [tiny(torch.tensor([[*tok.encode(p.prompt), v]])).logits[0, -1].softmax(-1) for v in range(5)]
        law = {(v, w): float(first[v] * second[v][w]) for v in range(5) for w in range(5) if v != 1} | {(1, 0): float(first[1])}
        drawn = [tuple(x) for x in batch.ids[k * n:(k + 1) * n].tolist()]
        expected = np.array(list(law.values())) * n
        counted, rare = np.array([drawn.count(a) for a in law]), expected < 5
        cells = np.array([np.append(x[~rare], x[rare].sum()) for x in (counted, expected)])
        cells = cells[:, cells[1] > 0]
        assert chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue > 1e-6
        assert counted.sum() == n
        assert chisquare(cells[0], np.full(len(cells[0]), n / len(cells[0]))).pvalue < 1e-6


def test_greedy_takes_the_likeliest_token(model):
    batch = generate(model, TOK, PROBLEMS, n=2, max_new=12, seed=0, temperature=0)
    assert batch.meta["text"][::2] == batch.meta["text"][1::2]
    for row in (0, 2, 4, 6):
        text = batch.prompt_ids[row][batch.prompt_mask[row] == 1].tolist()
        for token in batch.ids[row][batch.mask[row] == 1].tolist():
            with torch.no_grad():
                z = model(torch.tensor([text])).logits[0, -1]
            assert z[token] > z.max() - 1e-4
            text.append(token)


def test_problems_of_several_tasks_share_a_batch():
    both, rng = Mixture([ChainSum(3), CalcTool(1)]), np.random.default_rng(0)
    tok = both.tokenizer()
    problems = [both.sample(rng) for _ in range(6)]
    listed = PromptTask([Problem("1+1=", "2")], max_new=5).problems
    batch = generate(opinionated(tok), tok, problems + listed, n=4, max_new=both.max_new, seed=0, max_turns=both.max_turns)
    batch.validate()
    for row, text in enumerate(batch.meta["text"]):
        p = (problems + listed)[row // 4]
        if p.task.stop is None:
            assert batch.turn[row].max() == 0
        assert batch.rewards[row].sum() == p.task.reward(p, text)


def test_rewards_reach_the_last_model_token_and_training_mode_stays():
    task = ChainSum(2, 2)
    tok, rng = task.tokenizer(), np.random.default_rng(0)
    model = TinyLM(len(tok), **SIZES).train()
    batch = generate(model, tok, [task.sample(rng) for _ in range(64)], n=64, max_new=task.max_new, seed=0)
    assert model.training and not batch.old_logp.requires_grad
    assert 0 < batch.rewards.sum() < 200
    earned = [task.reward(Problem("", "", ""), t) for t in batch.meta["text"]]
    assert sum(earned) == 0
    last = batch.mask.shape[1] - 1 - batch.mask.flip(1).argmax(1)
    assert (batch.rewards.sum(1) == batch.rewards[torch.arange(len(batch)), last]).all()
    assert batch.ids.shape[1] == (batch.turn >= 0).sum(1).max()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.integers(0, 2**48 - 1), st.floats(0.1, 5))
def test_a_draw_inverts_the_distribution_function(z, k, temperature):
    u = k / 2**48
    v = int(pick(torch.tensor([z]), torch.tensor([u], dtype=torch.float64), temperature))
    p = torch.softmax(torch.tensor(z, dtype=torch.float64) / temperature, -1).numpy()
    assert p[:v].sum() - 1e-5 <= u <= p[:v + 1].sum() + 1e-5 and 0 <= v < len(z)


def test_impossible_tokens_are_never_drawn_and_broken_logits_are_reported():
    z = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, 5)
    u = torch.tensor([0.0, 0.2, 1 - 2.0**-48], dtype=torch.float64)
    assert pick(z, u, 1.0).tolist() == [1, 1, 3] and pick(z, u, 0).tolist() == [3, 3, 3]
    for bad in (torch.nan, torch.inf):
        assert pick(torch.tensor([[0.0, bad]]), u[:1], 1.0) == pick(torch.tensor([[0.0, bad]]), u[:1], 0) == 2


def test_uniforms_belong_to_their_row_and_step():
    table = uniforms(7, 20, 30)
    assert np.array_equal(uniforms(7, 5, 9), table[:5, :9]) and len(np.unique(table)) == 600
    assert (table >= 0).all() and (table < 1).all() and (table * 2**48 % 1 == 0).all() and abs(table.mean() - 0.5) < 0.06


def test_the_sampled_statistics_are_those_of_the_drawing_distribution():
    tok, task = CharTokenizer("0123456789+=;."), ChainSum(4)
    flat = TinyLM(len(tok), **SIZES)
    torch.nn.init.zeros_(flat.lm_head.weight)
    batch = generate(flat, tok, [task.sample(np.random.default_rng(0))], n=20, max_new=5, seed=0, temperature=0.5)
    on = batch.mask == 1
    assert torch.allclose(batch.old_logp[on], torch.tensor(-np.log(16.0)).float(), atol=1e-5)
    assert torch.allclose(batch.entropy[on], torch.tensor(np.log(16.0)).float(), atol=1e-5)
    assert torch.allclose(batch.energy[on], torch.tensor(15 / 16), atol=1e-5)
    assert torch.allclose(batch.energy[on], token_stats(torch.zeros(int(on.sum()), 16), batch.ids[on]).energy, atol=1e-5)


@pytest.mark.parametrize(("change", "text"), [
    ({"problems": []}, "problems must hold at least one problem, got none"), ({"n": 0}, "n must be an integer >= 1, got 0"),
    ({"max_new": 0}, "max_new must be an integer >= 1, got 0"), ({"seed": -1}, r"seed must be an integer in \[0, 18446744073709551615\], got -1"),
    ({"max_turns": 0}, "max_turns must be an integer >= 1, got 0"), ({"n": 1.0}, "n must be an integer >= 1, got 1.0"),
    ({"seed": 0.5}, "seed must be an integer in .*, got 0.5"), ({"seed": 2**64}, "seed must be an integer in .*, got 18446744073709551616"),
    ({"max_new": True}, "max_new must be an integer >= 1, got True"), ({"max_turns": "2"}, "max_turns must be an integer >= 1, got '2'"), ({"temperature": -1.0}, "finite and not negative, got -1.0"),
    ({"temperature": float("nan")}, "got nan"), ({"problems": [Problem("1", "1")]}, "problem 0 has no task to judge it"),
    ({"problems": [PROBLEMS[0], Problem("", "1", "", TASK)]}, "problem 1 has an empty prompt: ''"),
    ({"problems": [Problem("x", "1", "", TASK)]}, "character 'x' of 'x' is not in the alphabet"),
    ({"problems": [Problem([{"role": "user", "content": "1"}], "1", "", TASK)]}, "problem 0 is a chat, but the tokenizer has no")])
def test_bad_requests_are_refused(model, change, text):
    with pytest.raises(ValueError, match=text):
        generate(**({"model": model, "tok": TOK, "problems": PROBLEMS, "n": 1, "max_new": 4, "seed": 0} | change))


@pytest.mark.parametrize("found", [None, float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named(model, found):
    task = Echo(3)
    task.reward = lambda problem, transcript: found
    with pytest.raises(ValueError, match=f"the reward of Echo must be a finite number, got {found} at row 0"):
        generate(model, TOK, [Problem("1+1=", "2", "", task)], n=1, max_new=4, seed=0)


@pytest.mark.parametrize("problems", [["text"], "text", [PROBLEMS[0], ("1", "2")]])
def test_what_is_no_problem_is_named(model, problems):
    with pytest.raises(TypeError, match=r"problems must hold values Problem\(prompt, answer, task=task\), got ('te?x?t?'|\('1', '2'\))"):
        generate(model, TOK, problems, n=1, max_new=4, seed=0)


def test_whole_numbers_of_numpy_and_the_last_seed_are_taken(model):
    want = generate(model, TOK, PROBLEMS, n=2, max_new=4, seed=2**64 - 1)
    config.update("jaxtyping_disable", True)  # the annotations say int
    try:
        found = generate(model, TOK, PROBLEMS, n=np.int64(2), max_new=np.int32(4), seed=np.uint64(2**64 - 1), max_turns=np.int8(1))
    finally:
        config.update("jaxtyping_disable", False)
    assert torch.equal(found.ids, want.ids)
    for bad in ({"seed": 0.5}, {"seed": -1}, {"seed": 2**64}, {"rows": -1}, {"steps": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be an integer"):
            uniforms(**({"seed": 0, "rows": 1, "steps": 1} | bad))


def test_logits_that_are_not_finite_are_refused(model):
    broken = TinyLM(**model.config).train()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite at row 0, column 0"):
        generate(broken, TOK, PROBLEMS, n=1, max_new=4, seed=0)
    assert broken.training
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")


def test_a_checkpoint_of_transformers_is_a_policy(tmp_path, qwen):
    """Weights and a tokenizer on disk, chat messages, an end token of the generation config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<eos>", "<im_end>", *"0123456789+-*()=<>;.", *"abcdefgh"]
    engine = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words[:qwen.config.vocab_size])}, unk_token="."))  # noqa: S106
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<eos>")  # noqa: S106
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    qwen.generation_config.eos_token_id = [0, 1]
    qwen.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    policy, tok = load_policy(str(tmp_path))
    assert tok.pad_token_id == tok.eos_token_id == 0 and not policy.training
    assert next(policy.parameters()).dtype == torch.float32
    assert next(load_policy(str(tmp_path), dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    chat = Problem([{"role": "user", "content": "1+2"}], "3", "", TASK)
    batch = generate(policy, tok, [chat, Problem("(1+2)*3=", "9", "", TASK)], n=10, max_new=25, seed=0, max_turns=3)
    batch.validate()
    assert batch.prompt_ids[0][batch.prompt_mask[0] == 1].tolist() == tok.encode("1+2=", add_special_tokens=False)
    with torch.no_grad():
        again = recomputed(policy, batch)
    assert (again.logp - batch.old_logp).abs().max() < 1e-4
    stops = {0, 1, tok.encode(";", add_special_tokens=False)[0]}
    own = batch.ids[batch.mask == 1].tolist()
    assert {1} & set(own), "the second end token must occur, or the test tests nothing"
    for row in range(20):
        for number in range(3):
            part = batch.ids[row][(batch.mask[row] == 1) & (batch.turn[row] == number)].tolist()
            assert not stops & set(part[:-1])


def test_a_tokenizer_without_end_token_is_refused(tmp_path, monkeypatch):
    import transformers
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: type("T", (), {"eos_token_id": None}))
    for name in ("./nope", "/no/pe", "~/nope", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder: .*pe|no such folder: a/b/c"):
            load_policy(name)
    for dtype in ("bf16", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be one of torch or its name, such as 'bfloat16', got '{dtype}'"):
            load_policy("somewhere", dtype=dtype)
    with pytest.raises(ValueError, match="the tokenizer of somewhere has no end-of-sequence token"):
        load_policy("somewhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the step is recorded as a CUDA graph")
def test_the_recorded_step_gives_the_same_statistics():
    policy = opinionated(TOK).cuda()
    for seed in (0, 1):  # the second call uses the recording of the first
        batch = generate(policy, TOK, PROBLEMS, n=5, max_new=30, seed=seed, max_turns=4)
        with torch.no_grad():
            again = recomputed(policy, batch)
            policy.lm_head.weight.mul_(1.1)
        assert (again.logp - batch.old_logp).abs().max() < 1e-3
    assert policy in sample._STEPS
