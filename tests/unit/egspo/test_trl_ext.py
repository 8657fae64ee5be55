"""The gate inside TRL's trainer: its weights, whose entropies they come from, its two ends, and several processes."""
import gc
import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.core.claims import load_results
from collai.core.tinylm import CharTokenizer
from collai.egspo.gate import entropy_gate
from collai.egspo.loss import egspo_loss

pytest.importorskip("trl", reason='TRL is not installed: pip install "collai[trl]"')

from datasets import Dataset
from transformers import PrinterCallback, Qwen3ForCausalLM
from trl import GRPOTrainer

from collai.egspo import trl_ext
from collai.egspo.trl_ext import EGSPOTrainer, _fast, _quiet, _qwen3, measure
from collai.rl.trl_ext import OTBGRPOTrainer

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")]
ROOT = Path(__file__).resolve().parents[3]
LENGTH, CHARS = 7, CharTokenizer("0123456789+")
SIZES = {"vocab_size": 13, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16, "rope_theta": 1e4}


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """Every run collects garbage; what was imported until here need not be looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def tiny_model():
    torch.manual_seed(0)
    model = _qwen3(SIZES)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform: entropies differ
    return model


def even(completions, **_):
    return [sum(c in "02468" for c in text) / LENGTH for text in completions]


def trainer(tmp_path, cls=EGSPOTrainer, run=True, model=None, more=None, resume=None, **changes):
    args = {"per_device_train_batch_size": 16, "num_generations": 4, "max_steps": 2, "max_completion_length": LENGTH,
            "learning_rate": 1e-2, "logging_steps": 1, "top_entropy_quantile": 0.3}
    made = cls(model=model or tiny_model(), reward_funcs=even, args=_quiet(str(tmp_path), **args | changes),
               processing_class=_fast(CHARS), train_dataset=Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}"} for i in range(40)]),
               **(more or {}))
    made.remove_callback(PrinterCallback)
    if run:
        made.train(resume_from_checkpoint=resume)
    return made


def parameters(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


class Kept(EGSPOTrainer):
    """Keeps the policy of each generation, and of each loss what went in, its weights and what came out."""

    def _generate_and_score_completions(self, inputs):
        self.policy = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.scored

    def get_high_entropy_mask(self, entropies, mask, threshold):
        self.weight = super().get_high_entropy_mask(entropies, mask, threshold)
        return self.weight

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.losses = [*getattr(self, "losses", []), {**inputs, "logp": self.scored[0].detach(), "now": self.scored[1].detach(),
                                                      "weight": self.weight, "loss": loss.item()}]
        return loss


def dense_entropy(kept):
    """Entropies of the kept batch from full logits under the weights that made it, in float64."""
    model = tiny_model()
    model.load_state_dict(kept.policy)
    ids, seen = (torch.cat([kept.batch[f"prompt_{k}"], kept.batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    log_pi = (model(ids, attention_mask=seen).logits[:, :-1].double() / kept.temperature).log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum(-1)[:, -kept.batch["completion_ids"].shape[1]:]


def rows_of(batch):
    """Prompt and completion of each row: it is found again wherever the shuffle put it."""
    return [tuple(p + c) for p, c in zip(batch["prompt_ids"].tolist(), batch["completion_ids"].tolist(), strict=True)]


def by_rows(batch, values):
    return dict(zip(rows_of(batch), values.tolist(), strict=True))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A trainer after two updates on one batch."""
    return trainer(tmp_path_factory.mktemp("one"), Kept, num_iterations=2, loss_type="bnpo")


@given(st.integers(0, 2**32 - 1), st.integers(0, 12).map(lambda i: i / 10 if i < 10 else (1 - 0.2, 1 - 0.7, 1.0)[i - 10]),
       st.sampled_from([0, 0.1, 1]))
@settings(max_examples=60, deadline=None)
def test_weights_are_trls_mask_with_phi_in_place_of_zero(one, seed, level, phi):
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 9, (2,), generator=g).tolist()
    entropies = torch.rand(rows, columns, generator=g).mul(torch.randint(1, 9, (1,), generator=g)).round(decimals=int(seed % 3))
    mask = (torch.rand(rows, columns, generator=g) < 0.7).long()
    dirty = entropies.masked_fill(mask == 0, float("nan"))
    copies, one.phi = [dirty.clone(), mask.clone()], phi
    ours = EGSPOTrainer.get_high_entropy_mask(one, dirty, mask, level)
    theirs = GRPOTrainer.get_high_entropy_mask(one, entropies, mask, level).float()
    assert ours.dtype == torch.float32 and torch.equal(ours, torch.where(mask == 1, theirs + (1 - theirs) * phi, 0))
    assert torch.equal(dirty.nan_to_num(-9), copies[0].nan_to_num(-9)) and torch.equal(mask, copies[1])


def test_at_the_usual_shares_trls_quantile_is_the_exact_one_of_this_chain(one):
    one.phi, wrong = 0, []
    for n in range(2, 400):
        h = torch.rand(1, n, generator=torch.Generator().manual_seed(n))
        for share in (0.2, 0.1, 0.4):
            ours, exact = (f(h, torch.ones(1, n), 1 - share) for f in (one.get_high_entropy_mask, lambda h, m, q: entropy_gate(h, m, quantile=q)))
            wrong += [(n, share)] if not torch.equal(ours, exact) else []
    assert wrong and {share for _, share in wrong} == {0.4} and wrong[0] == (26, 0.4)


@pytest.mark.parametrize(("loss_type", "agg", "phi"), [("bnpo", "token-mean", "chord"), ("grpo", "seq-mean-token-mean", 0.3)])
def test_every_loss_is_egspo_loss_of_the_same_tensors(tmp_path, loss_type, agg, phi):
    kept = trainer(tmp_path, Kept, more={"phi": phi}, loss_type=loss_type, num_iterations=2, steps_per_generation=2, max_steps=4,
                   gradient_accumulation_steps=1, per_device_train_batch_size=8, learning_rate=0.05, epsilon=0.1)
    assert len(kept.losses) == 4 and kept.losses[0]["completion_mask"].sum(1).min() < LENGTH
    for part in kept.losses:
        loss, metrics = egspo_loss(part["logp"], part["old_per_token_logps"], part["advantages"][:, None].expand_as(part["logp"]),
                                   part["completion_mask"], part["rollout_entropies"], phi=phi, quantile=0.7, clip_low=0.1,
                                   clip_high=0.1, agg=agg)
        assert abs(loss.item() - part["loss"]) < 1e-6
    assert metrics["clip_share_high"] + metrics["clip_share_low"] > 0
    p = kept.losses[-1]["logp"].exp()
    low = kept.losses[-1]["weight"] != 1
    wanted = p * (1 - p) if phi == "chord" else torch.full_like(p, 0.3)
    assert torch.allclose(kept.losses[-1]["weight"][low], (wanted * kept.losses[-1]["completion_mask"])[low], atol=1e-6)


def test_the_gate_stays_at_the_policy_that_sampled(tmp_path):
    kept = trainer(tmp_path, Kept, num_iterations=2, steps_per_generation=2, max_steps=4, gradient_accumulation_steps=1,
                   per_device_train_batch_size=8, learning_rate=0.05)
    mask = kept.batch["completion_mask"]
    assert ((kept.batch["rollout_entropies"] - dense_entropy(kept)) * mask).abs().max() < 1e-5
    home = by_rows(kept.batch, kept.batch["rollout_entropies"])
    moved = 0
    for first, second in zip(kept.losses[:2], kept.losses[2:], strict=True):
        assert all(home[row] == h for row, h in by_rows(first, first["rollout_entropies"]).items())
        assert by_rows(first, first["weight"]) == by_rows(second, second["weight"])
        theirs = [GRPOTrainer.get_high_entropy_mask(kept, part["now"], part["completion_mask"], 0.7) for part in (first, second)]
        moved += int((theirs[0] != theirs[1]).sum())
    assert moved > 0


def test_old_log_probabilities_without_entropies_end_the_run(tmp_path, monkeypatch):
    made = GRPOTrainer._generate_and_score_completions

    def elsewhere(self, inputs):
        batch = made(self, inputs)
        return batch | {"old_per_token_logps": batch["old_per_token_logps"].clone()}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", elsewhere)
    with pytest.raises(RuntimeError, match="gives no entropies, so the gate can't be kept fixed"):
        trainer(tmp_path, num_iterations=2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_used_once_is_gated_by_the_pass_of_its_loss(tmp_path, accumulate):
    kept = trainer(tmp_path, Kept, max_steps=1, gradient_accumulation_steps=accumulate, per_device_train_batch_size=16 // accumulate)
    assert len(kept.losses) == accumulate and "rollout_entropies" not in kept.batch and "old_per_token_logps" not in kept.batch
    home = by_rows(kept.batch, dense_entropy(kept))
    for part in kept.losses:
        mask = part["completion_mask"]
        dense = torch.tensor([home[row] for row in rows_of(part)])
        assert ((part["now"] - dense) * mask).abs().max() < 1e-5
        assert torch.equal(part["weight"] == 1, GRPOTrainer.get_high_entropy_mask(kept, part["now"], mask, 0.7))


def test_a_reference_model_does_not_lend_its_entropies(tmp_path):
    tiny_model().save_pretrained(tmp_path / "policy")  # the reference model is read again from where the policy came
    policy = Qwen3ForCausalLM.from_pretrained(tmp_path / "policy")
    kept = trainer(tmp_path, Kept, model=policy, beta=0.1, num_iterations=2, max_steps=3)  # the second batch is that of a moved policy
    assert ((kept.batch["rollout_entropies"] - dense_entropy(kept)) * kept.batch["completion_mask"]).abs().max() < 1e-5
    assert kept._passes is None and kept._fixed is None and kept._logp is None


def test_phi_one_is_the_plain_trainer_and_phi_zero_the_hard_mask_step_for_step(tmp_path):
    more = {"max_steps": 3, "learning_rate": 3e-3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    plain, hard = (trainer(tmp_path, GRPOTrainer, top_entropy_quantile=share, **more) for share in (1.0, 0.3))
    ends = [trainer(tmp_path, more={"phi": phi}, **more) for phi in (1, 0)]
    for ours, theirs in zip(ends, (plain, hard), strict=True):
        assert torch.equal(parameters(ours), parameters(theirs))
        assert [row["loss"] for row in ours.state.log_history[:-1]] == [row["loss"] for row in theirs.state.log_history[:-1]]
    assert not torch.equal(parameters(plain), parameters(hard))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss_of_trl_lies_on_the_line_between_mask_and_no_mask(one, monkeypatch, loss_type):
    batch = {k: v for k, v in one.losses[1].items() if k not in ("rollout_entropies", "logp", "now", "weight", "loss")}
    monkeypatch.setattr(one, "loss_type", loss_type)
    monkeypatch.setattr(one, "importance_sampling_level", "sequence" if loss_type == "luspo" else "token")

    def gradient(cls, phi, share):
        one.phi, one.top_entropy_quantile = phi, share
        one.model.zero_grad()
        loss = cls._compute_loss(one, one.model, batch)
        loss.backward()
        return torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in one.model.parameters())])

    monkeypatch.setattr(one, "top_entropy_quantile", 0.3)
    monkeypatch.setattr(one, "phi", 0.25)
    ours = gradient(EGSPOTrainer, 0.25, 0.3)
    plain, hard = gradient(GRPOTrainer, 1, 1.0), gradient(EGSPOTrainer, 0, 0.3)
    assert torch.allclose(ours, 0.25 * plain + 0.75 * hard, atol=1e-5 * float(plain.abs().max()) + 1e-8)
    assert (ours - hard).abs().max() > 1e-3 * plain.abs().max()


def with_tool(prompts, trainer):
    """Six tokens of which the tool wrote the third and the sixth."""
    g = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(2, 12, (len(prompts), 6), generator=g).tolist()
    return {"prompt_ids": [trainer.processing_class.encode(p) for p in prompts], "completion_ids": ids, "logprobs": None,
            "env_mask": [[1, 1, 0, 1, 1, 0]] * len(prompts)}


def test_what_a_tool_wrote_has_no_weight_and_no_say_in_the_quantile(tmp_path):
    kept = trainer(tmp_path, Kept, max_steps=2, num_iterations=2, more={"rollout_func": with_tool, "phi": 0.1})
    part = kept.losses[-1]
    weight, wrote = part["weight"], torch.tensor([0, 1, 3, 4])
    assert not weight[:, [2, 5]].any() and weight[:, wrote].unique().tolist() == pytest.approx([0.1, 1.0])
    alone = part["rollout_entropies"][:, wrote]
    assert torch.equal(weight[:, wrote] == 1, alone >= torch.quantile(alone, 0.7))


def test_an_entropy_bonus_is_averaged_with_the_weights(tmp_path):
    made = [trainer(tmp_path, Kept, max_steps=1, loss_type="bnpo", num_iterations=2, entropy_coef=c, more={"phi": 0.2}) for c in (0.0, 0.5)]
    part, w = made[1].losses[0], made[1].losses[0]["weight"]
    bonus = (part["now"] * w).sum() / w.sum()
    assert made[0].losses[0]["loss"] - part["loss"] == pytest.approx(0.5 * bonus.item(), abs=1e-6)


def test_shares_and_weights_are_logged(tmp_path):
    made = trainer(tmp_path, Kept, max_steps=1, more={"phi": 0.2})
    (row,) = [row for row in made.state.log_history if "egspo/high_share" in row]
    weight, mask = made.losses[0]["weight"], made.losses[0]["completion_mask"]
    high = (weight == 1).sum().item() / mask.sum().item()
    assert row["egspo/high_share"] == pytest.approx(high) and abs(high - 0.3) < 0.02
    assert row["egspo/mean_weight"] == pytest.approx(high + 0.2 * (1 - high))


def test_evaluation_is_gated_and_logged_apart(tmp_path):
    made = trainer(tmp_path, Kept, run=False, num_generations_eval=2, per_device_eval_batch_size=8)
    found = made.evaluate(made.train_dataset.select(range(4)))
    assert abs(found["eval_egspo/high_share"] - 0.3) < 0.04 and made.losses[0]["weight"].shape[0] == 8


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    settings = {"max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3}
    whole = trainer(tmp_path, **settings)
    resumed = trainer(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert torch.equal(parameters(whole), parameters(resumed)) and resumed.state.global_step == 4


def test_the_gate_goes_with_the_token_baseline(tmp_path):
    class Both(Kept, OTBGRPOTrainer):
        """Advantages of `collai.rl`, weights of this chain."""

    kept = trainer(tmp_path, Both, num_iterations=2, loss_type="bnpo", more={"otb": {"leave_one_out": True}, "phi": 0.2})
    part = kept.losses[-1]
    assert part["advantages"].shape == part["logp"].shape and part["advantages"].std(dim=1).max() > 0
    loss, _ = egspo_loss(part["logp"], part["old_per_token_logps"], part["advantages"], part["completion_mask"],
                         part["rollout_entropies"], phi=0.2, quantile=0.7)
    assert abs(loss.item() - part["loss"]) < 1e-6
    once = trainer(tmp_path, Both, max_steps=1)  # the baseline scores this batch for itself; it is used once, so nothing is kept
    assert "rollout_entropies" not in once.batch


@pytest.mark.parametrize("phi", [-0.1, 1.1, float("nan"), "chord-state", "CHORD"])
def test_a_bad_phi_is_refused_before_anything_is_loaded(phi):
    with pytest.raises(ValueError, match=rf"phi must be a number in \[0, 1\] or 'chord', got {phi!r}"):
        EGSPOTrainer(model=None, reward_funcs=None, phi=phi)


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_share_that_leaves_nothing_to_attenuate_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match=rf"top_entropy_quantile, .* must be in \[0, 1\), got {share}"):
        trainer(tmp_path, run=False, top_entropy_quantile=share)


def test_outside_of_a_loss_chord_has_no_probabilities(tmp_path):
    made = trainer(tmp_path, run=False, more={"phi": "chord"})
    with pytest.raises(ValueError, match="phi='chord' takes the log-probabilities of the running loss, and none is running"):
        made.get_high_entropy_mask(torch.ones(1, 2), torch.ones(1, 2), 0.8)


def one_of_two(rank, port, folder, queue):
    """One process of two: weights of uneven micro-batches, ours and TRL's."""
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    made = trainer(folder / str(rank), run=False, per_device_train_batch_size=2, ddp_backend="gloo", more={"phi": 0})
    g, found = torch.Generator().manual_seed(rank), []
    for case in range(6):
        entropies = torch.rand(3, 4 + 3 * rank, generator=g).round(decimals=1 + case % 2)
        mask = (torch.rand(entropies.shape, generator=g) < (0 if case == 5 and rank else 0.7)).long()
        theirs = GRPOTrainer.get_high_entropy_mask(made, entropies, mask, 0.1 * case + 0.3)
        found.append((entropies.tolist(), mask.tolist(), made.get_high_entropy_mask(entropies, mask, 0.1 * case + 0.3).tolist(),
                      theirs.float().tolist(), made._metrics["train"]["egspo/high_share"][-1]))
    queue.put((rank, found))


def test_two_processes_share_one_quantile(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    work = [context.Process(target=one_of_two, args=(rank, port, tmp_path, queue)) for rank in range(2)]
    for process in work:
        process.start()
    try:
        (_, a), (_, b) = sorted(queue.get(timeout=60) for _ in range(2))
    finally:
        for process in work:
            process.join(timeout=10)
            process.kill()
    for case, parts in enumerate(zip(a, b, strict=True)):
        level, valid = 0.1 * case + 0.3, [torch.tensor(h)[torch.tensor(m) == 1] for h, m, *_ in parts]
        tau = torch.quantile(torch.cat(valid), level)
        for h, m, ours, theirs, share in parts:
            assert ours == theirs == ((torch.tensor(h) >= tau) & (torch.tensor(m) == 1)).float().tolist()
            assert share == pytest.approx((torch.cat(valid) >= tau).float().mean().item())
        if case == 3:
            assert any(torch.quantile(alone, level) != tau for alone in valid)


def test_measure_times_the_gate_within_the_step(monkeypatch):
    monkeypatch.setattr(trl_ext, "_WORK", {"cpu": (SIZES, 4, (32, 64))})
    threads = torch.get_num_threads()
    rows = measure("cpu", rounds=2)
    assert [row["name"] for row in rows] == ["overhead_trl_32", "overhead_trl_64"] and torch.get_num_threads() == threads
    for row in rows:
        assert 0 < row["low"] <= row["measured"] <= row["high"] < 100 and 0 < row["gate_ms"] < row["step_ms"]
        assert row["parameters"] == parameters(type("", (), {"model": tiny_model()})).numel() and row["rounds"] == 2
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        measure("cpu", rounds=1)


def test_the_stored_overhead_is_complete():
    rows = load_results(ROOT / "nbs/egspo/results/full-cpu.json")["rows"]
    for tokens in trl_ext._WORK["cpu"][2]:
        row = rows[f"overhead_trl_{tokens}"]
        assert row["low"] <= row["measured"] <= row["high"] < 3.4 and row["date"] and "collai.egspo.trl_ext" in row["command"]
        assert row["gate_ms"] / row["step_ms"] == pytest.approx(row["measured"] / 100, rel=0.3) and row["rounds"] >= 10


def test_without_trl_the_import_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "collai.egspo.trl_ext")
    with pytest.raises(ImportError, match=r'collai.egspo.trl_ext needs TRL 1.16: pip install "collai\[trl\]"'):
        importlib.import_module("collai.egspo.trl_ext")
