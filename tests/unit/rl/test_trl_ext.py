"""The token baseline inside TRL's trainer: the numbers, what TRL does with them, and several processes."""
import importlib
import multiprocessing
import os
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collai.rl.adv import bounded_energy, otb_advantage

pytest.importorskip("trl", reason='TRL is not installed: pip install "collai[trl]"')

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from collai.rl.trl_ext import OTBGRPOTrainer

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")]
LENGTH, DIGITS = 7, "0123456789"


def tiny_model():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform: energies differ
    return model


def tokenizer():
    pieces = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *DIGITS, "+"])}
    raw = Tokenizer(models.WordLevel(pieces, "<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **{"pad_token": "<pad>", "eos_token": "<eos>"})


def even(completions, **_):
    return [sum(c in "02468" for c in text) / LENGTH for text in completions]


def long(completions, **_):
    return [float(len(text) > 3) for text in completions]


def trainer(tmp_path, cls=OTBGRPOTrainer, rewards=even, otb=None, run=True, model=None, more=None, **changes):
    args = {"output_dir": str(tmp_path), "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
            "activation_checkpointing": False, "per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 2,
            "max_completion_length": LENGTH, "learning_rate": 1e-2, "logging_steps": 1} | changes
    made = cls(model=model or tiny_model(), reward_funcs=rewards, args=GRPOConfig(**args), processing_class=tokenizer(),
               train_dataset=Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}"} for i in range(40)]),
               **({"otb": otb} if issubclass(cls, OTBGRPOTrainer) else {}), **(more or {}))
    made.remove_callback(PrinterCallback)
    if run:
        made.train()
    return made


def by_hand(r, n):
    """Formula (rl.7.2) with the zero tail, one group at a time, float64."""
    out = torch.zeros_like(r["rewards"]).double()
    for start in range(0, len(out), n):
        g = [i for i in range(start, start + n) if r["mask"][i].any()]
        if not g:
            continue
        m = r["mask"][g].double()
        to_go = (r["rewards"][g] * m).flip(1).cumsum(1).flip(1)
        weight = (r["energy"][g].double() * m * r.get("is_weights", torch.ones_like(out))[g] ** 2).cumsum(1) * m
        base = ((to_go * weight).sum(0) / (weight.sum(0) + 1e-8)).repeat(len(g), 1)
        if len(g) > 1:
            ends = (m * torch.arange(1, m.shape[1] + 1)).amax(1)
            base[ends.argmax(), int(ends.sort().values[-2]):] = 0
        out[g] = (to_go - (base if len(g) > 1 else 0)) * m
    return out


class Kept(OTBGRPOTrainer):
    """Keeps what goes into the loss and what came out of the generation."""

    def _generate_and_score_completions(self, inputs):
        self.policy = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.batch = super()._generate_and_score_completions(inputs)
        self.losses = []
        return self.batch

    def _compute_loss(self, model, inputs):
        self.losses.append(inputs)
        return super()._compute_loss(model, inputs)


def dense_energy(kept):
    """Energies of the kept batch from full logits under the weights that made it, in float64."""
    model = tiny_model()
    model.load_state_dict(kept.policy)
    ids, seen = (torch.cat([kept.batch[f"prompt_{k}"], kept.batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    logits = model(ids, attention_mask=seen).logits[:, :-1].double() / kept.temperature
    pi = logits.softmax(-1)[:, -kept.batch["completion_ids"].shape[1]:]
    hit = torch.nn.functional.one_hot(kept.batch["completion_ids"], 13)
    return ((hit - pi) ** 2).sum(-1)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6))
def test_energy_of_a_head_stays_in_its_bounds_and_is_near_the_truth(logits):
    z = torch.tensor(logits, dtype=torch.float64)
    pi = z.softmax(0)
    true = ((1 - pi[0]) ** 2 if pi[0] < 0.5 else pi[1:].sum() ** 2) + (pi[1:] ** 2).sum()
    logp = z.log_softmax(0)[0].float()
    e = bounded_energy(logp, (pi ** 2).sum().float())
    rest = torch.expm1(logp) ** 2
    assert rest <= e <= 2 * rest and abs(e - true) < 5e-7


@pytest.mark.parametrize("n", [2, 8])
def test_advantages_are_the_formula_and_follow_their_tokens_through_the_shuffle(tmp_path, n):
    kept = trainer(tmp_path, Kept, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=n)
    r = kept.last_rollout
    assert {k: tuple(x.shape) for k, x in r.items()} == dict.fromkeys(("advantages", "energy", "mask", "rewards"), tuple(r["mask"].shape))
    assert (r["advantages"] - by_hand(r, n)).abs().max() < 1e-6 and r["advantages"].abs().max() > 0.05
    assert torch.equal(r["advantages"], otb_advantage(r["rewards"], r["mask"], [i // n for i in range(16)], r["energy"]).advantages)
    place = {tuple(p + c): a for p, c, a in zip(kept.batch["prompt_ids"].tolist(), kept.batch["completion_ids"].tolist(),
                                                r["advantages"].tolist(), strict=True)}
    assert len(kept.losses) == 2
    for part in kept.losses:
        for p, c, a in zip(part["prompt_ids"].tolist(), part["completion_ids"].tolist(), part["advantages"].tolist(), strict=True):
            assert place[tuple(p + c)] == a


def test_energy_mask_and_rewards_are_those_of_the_generation(tmp_path):
    kept = trainer(tmp_path, Kept, rewards=[even, long], reward_weights=[2.0, 0.5], temperature=1.3)
    r, mask = kept.last_rollout, kept.batch["completion_mask"]
    assert torch.equal(r["mask"], mask) and mask.sum(1).min() < mask.shape[1]
    assert ((r["energy"] - dense_energy(kept)) * mask).abs().max() < 2e-6 and not r["energy"][mask == 0].any()
    text = kept.processing_class.batch_decode(kept.batch["completion_ids"], skip_special_tokens=True)
    total = [2 * a + 0.5 * b for a, b in zip(even(text), long(text), strict=True)]
    for row, m, value in zip(r["rewards"], mask, total, strict=True):
        assert row.nonzero().flatten().tolist() in ([], [int(m.sum()) - 1]) and abs(row.sum().item() - value) < 1e-6
    shown = list(kept._logs["advantages"])
    assert torch.allclose(torch.tensor(shown), r["advantages"].sum(1) / mask.sum(1), atol=1e-6)


@pytest.mark.parametrize("changes", [{"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 1},
                                     {"beta": 0.1}, {"steps_per_generation": 2, "beta": 0.1, "gradient_accumulation_steps": 1}])
def test_one_pass_of_the_policy_scores_a_generation(tmp_path, changes):
    calls = []

    class Counted(Kept):
        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            if self._scored is not None:
                calls.append(model is self.model)
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    tiny_model().save_pretrained(tmp_path / "policy")  # the reference model is read again from where the policy came
    policy = Qwen3ForCausalLM.from_pretrained(tmp_path / "policy")
    kept = trainer(tmp_path, Counted, model=policy, max_steps=1, per_device_train_batch_size=8, **changes)
    assert sum(calls) == 1 and len(calls) == 1 + ("beta" in changes)
    assert ("old_per_token_logps" in kept.batch) == ("steps_per_generation" in changes)
    assert ((kept.last_rollout["energy"] - dense_energy(kept)) * kept.last_rollout["mask"]).abs().max() < 2e-6


def test_options_reach_the_estimator(tmp_path):
    options = {"leave_one_out": True, "weighting": "token", "finished": "keep", "prior": torch.linspace(0, 1, LENGTH + 3), "prior_strength": 1.0}
    r = trainer(tmp_path, otb=options, max_steps=1).last_rollout
    cut = options | {"prior": options["prior"][: r["mask"].shape[1]]}
    wanted = otb_advantage(r["rewards"], r["mask"], [i // 4 for i in range(16)], r["energy"], **cut)
    assert torch.equal(wanted.advantages, r["advantages"]) and (wanted.advantages - by_hand(r, 4)).abs().max() > 1e-3


@pytest.mark.parametrize(("otb", "message"), [
    ({"leave_two_out": True}, "unknown otb option 'leave_two_out', use one of 'weighting', 'align', 'leave_one_out', 'finished', 'prior'"),
    ({"is_weights": None}, "unknown otb option 'is_weights'"), ({"weighting": "square"}, "unknown weighting 'square'"),
    ({"eps": -1.0}, "eps"), ({"prior": torch.zeros(2, 2), "prior_strength": 1.0}, r"prior must have shape \(2,\), got \(2, 2\)"),
    ({"prior": [0.5], "prior_strength": 1.0}, r"prior must be None, 'batch' or a tensor of shape \(T,\), got \[0.5\]"),
    ([], r"options of otb must be a mapping of keywords, got \[\]")])
def test_bad_options_are_refused_before_anything_runs(otb, message):
    with pytest.raises(ValueError, match=message):
        OTBGRPOTrainer(model=None, reward_funcs=None, otb=otb)


def test_a_prior_shorter_than_the_longest_response_is_refused_before_anything_is_generated(tmp_path):
    short = {"prior": torch.zeros(LENGTH - 1), "prior_strength": 1.0}
    with pytest.raises(ValueError, match=f"prior has {LENGTH - 1} columns, max_completion_length is {LENGTH}: it must cover"):
        trainer(tmp_path, run=False, otb=short)
    assert trainer(tmp_path, run=False, otb=short | {"prior": torch.zeros(LENGTH)}).last_rollout is None


def test_rewards_normalised_before_the_sum_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be 'sum_then_normalize', got 'normalize_then_sum'"):
        trainer(tmp_path, run=False, multi_objective_aggregation="normalize_then_sum")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss_of_trl_takes_token_advantages(tmp_path, loss_type):
    made = trainer(tmp_path, max_steps=1, loss_type=loss_type, importance_sampling_level="sequence" if loss_type == "luspo" else "token",
                   off_policy_mask_threshold=0.5)
    moved = [(a - b).abs().max() for a, b in zip(made.model.parameters(), tiny_model().parameters(), strict=True)]
    assert max(moved) > 1e-4 and all(torch.isfinite(x) for x in moved)


def test_uniform_weights_and_equal_lengths_train_as_trl_does(tmp_path):
    def fixed(prompts, trainer):
        g = torch.Generator().manual_seed(5)
        ids = torch.randint(2, 12, (len(prompts), 5), generator=g).tolist()
        return {"prompt_ids": [tokenizer().encode(p) for p in prompts], "completion_ids": ids, "logprobs": None}
    ours = trainer(tmp_path, otb={"weighting": "uniform", "zero_tail": False}, max_steps=1, more={"rollout_func": fixed})
    theirs = trainer(tmp_path, GRPOTrainer, max_steps=1, scale_rewards="none", more={"rollout_func": fixed})
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_rollout_nobody_could_score_leaves_its_group(tmp_path):
    def some(completions, **_):
        return [None if i % 4 == 1 else v for i, v in enumerate(even(completions))]
    r = trainer(tmp_path, rewards=some, max_steps=1).last_rollout
    assert not r["mask"][1::4].any() and not r["advantages"][1::4].any() and r["mask"][0::4].any()
    assert (r["advantages"] - by_hand(r, 4)).abs().max() < 1e-6


def with_tool(prompts, trainer, ratio=False):
    """Six tokens of which the tool wrote the third and, at the end, the sixth."""
    g = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(2, 12, (len(prompts), 6), generator=g).tolist()
    mask = [[1, 1, 0, 1, 1, 0]] * len(prompts)
    return {"prompt_ids": [trainer.processing_class.encode(p) for p in prompts], "completion_ids": ids,
            "logprobs": [[-2.0] * 6] * len(prompts) if ratio else None, "env_mask": mask}


def test_what_a_tool_wrote_is_masked_and_the_reward_sits_before_it(tmp_path):
    r = trainer(tmp_path, max_steps=1, otb={"align": "token"}, more={"rollout_func": with_tool}).last_rollout
    assert (r["mask"] == torch.tensor([1, 1, 0, 1, 1, 0])).all()
    assert set(r["rewards"].nonzero()[:, 1].tolist()) == {4} and not r["advantages"][:, [2, 5]].any() and not r["energy"][:, [2, 5]].any()
    again = otb_advantage(r["rewards"], r["mask"], [i // 4 for i in range(16)], r["energy"], align="token").advantages
    assert torch.equal(again, r["advantages"])


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_importance_ratios_of_trl_weigh_the_energy(tmp_path, mode):
    made = trainer(tmp_path, run=False, max_steps=1, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=2.0,
                   more={"rollout_func": lambda p, t: with_tool(p, t, ratio=True)})
    made.use_vllm, made._last_loaded_step = True, -1  # TRL's ratios without an engine
    made.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    made.train()
    r = made.last_rollout
    assert r["is_weights"].shape == r["mask"].shape and r["is_weights"][r["mask"] == 1].std() > 0
    assert (r["advantages"] - by_hand(r, 4)).abs().max() < 1e-6
    plain = otb_advantage(r["rewards"], r["mask"], [i // 4 for i in range(16)], r["energy"]).advantages
    assert (r["advantages"] - plain).abs().max() > 1e-3


def test_evaluation_has_groups_of_its_own_size(tmp_path):
    made = trainer(tmp_path, run=False, num_generations_eval=2, per_device_eval_batch_size=8)
    made.evaluate(made.train_dataset.select(range(4)))
    r = made.last_rollout
    assert len(r["mask"]) == 8 and (r["advantages"] - by_hand(r, 2)).abs().max() < 1e-6


def one_of_two(rank, port, folder, queue):
    """One process of a run whose groups lie half here, half there."""
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kept = trainer(folder / str(rank), Kept, run=False, per_device_train_batch_size=2, num_generations=4, ddp_backend="gloo",
                   more={"rollout_func": lambda p, t: uneven(p, t, rank)})
    kept.model.train()
    kept._prepare_inputs(next(iter(kept.get_train_dataloader())))  # no backward pass: autograd doesn't survive a fork
    queue.put((rank, {k: v.tolist() for k, v in kept.last_rollout.items()}, kept.batch["advantages"].tolist()))


def uneven(prompts, trainer, rank):
    """Responses of 3 tokens in the first process, 5 in the second."""
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 12, (len(prompts), 3 + 2 * rank), generator=g).tolist()
    return {"prompt_ids": [trainer.processing_class.encode(p) for p in prompts], "completion_ids": ids, "logprobs": None}


def test_two_processes_share_a_group(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    work = [context.Process(target=one_of_two, args=(rank, port, tmp_path, queue)) for rank in range(2)]
    for process in work:
        process.start()
    try:
        (_, a, rows_a), (_, b, rows_b) = sorted(queue.get(timeout=60) for _ in range(2))
    finally:
        for process in work:
            process.join(timeout=10)
            process.kill()
    r = {k: torch.tensor(v) for k, v in a.items()}
    assert a == b and r["mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5] * 2
    assert (r["advantages"] - by_hand(r, 4)).abs().max() < 1e-6 and r["advantages"].abs().max() > 0.05
    assert rows_a == [row[:3] for row in a["advantages"][:2]] and rows_b == b["advantages"][2:]


def test_without_trl_the_import_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "collai.rl.trl_ext")
    with pytest.raises(ImportError, match=r'collai.rl.trl_ext needs TRL 1.16: pip install "collai\[trl\]"'):
        importlib.import_module("collai.rl.trl_ext")
