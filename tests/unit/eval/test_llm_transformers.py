"""`TransformersChat` of `collai.eval.llm` with real classes of transformers: checkpoints made on the spot."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from collai.eval import llm
from collai.eval.llm import Request, TransformersChat, fingerprint

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% for t in m['tool_calls'] or [] %}{{ t['function']['arguments']['x'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"]


def ask(text, **options):
    return Request([{"role": "user", "content": text}], **options)


def outcome(reply):
    return reply.text, reply.finish_reason, reply.usage


@pytest.fixture(scope="module")
def words():
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    table = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table.decoder = decoders.ByteLevel()
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "extra_special_tokens": [SPECIAL[1], SPECIAL[3]]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=table, chat_template=TEMPLATE, **names)


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**sizes, **heads, pad_token_id=0, eos_token_id=2, bos_token_id=None)
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config.update(repetition_penalty=1.7, do_sample=True, temperature=3.0, top_k=5)
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat(folder):
    return TransformersChat(folder, device="cpu", batch_size=5)


def test_batched_is_alone_on_the_cpu_in_float32(chat):
    heats = [(0.0, 1.0), (1.0, 1.0), (0.8, 0.9), (2.0, 1.0)]
    requests = [ask("why? " * (1 + i), temperature=heats[i % 4][0], top_p=heats[i % 4][1], seed=i, max_tokens=5 + 2 * i,
                    stop=("e", "ab") if i % 2 else (), logprobs=i % 3) for i in range(12)]
    together = chat.generate(requests)
    alone = [TransformersChat(chat.model, chat.tokenizer, batch_size=1).generate([r])[0] for r in requests]
    assert list(map(outcome, together)) == list(map(outcome, alone))
    assert list(map(outcome, chat.generate(requests[::-1])[::-1])) == list(map(outcome, together))
    for r, a, b in zip(requests, together, alone, strict=True):
        assert (a.logprobs is None) == (r.logprobs == 0)
        if a.logprobs:
            assert len(a.logprobs) == a.usage.completion_tokens
            assert np.allclose([s[1] for s in a.logprobs], [s[1] for s in b.logprobs], atol=1e-4)
    assert {r.finish_reason for r in together} == {"stop", "length"}


def test_greedy_is_plain_generate_without_the_habits_of_the_checkpoint(chat, words, folder):
    plain = transformers.Qwen3ForCausalLM.from_pretrained(folder)
    plain.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
    for text in ("hello", "a", "naïve 大"):
        ids = words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = plain.generate(**ids, max_new_tokens=15, do_sample=False)[0, ids["input_ids"].shape[1] :]
        reply = chat.generate([ask(text, max_tokens=15)])[0]
        assert reply.text == words.decode(out, skip_special_tokens=True)
        assert reply.usage == llm.TokenUsage(ids["input_ids"].shape[1], len(out))
        assert chat.bound(ask(text, max_tokens=15)) == llm.TokenUsage(ids["input_ids"].shape[1], 15)
    assert chat.model.generation_config.repetition_penalty == 1.7


def test_a_longer_limit_continues_the_same_sampled_text(chat):
    short, long = (chat.generate([ask("tell", temperature=1.0, max_tokens=n, logprobs=1)])[0] for n in (6, 18))
    assert [s[0] for s in long.logprobs[:6]] == [s[0] for s in short.logprobs]


def test_reported_log_probabilities_are_the_scores_of_the_text(chat):
    request = ask("count", temperature=1.3, max_tokens=30, logprobs=3, seed=5)
    reply = chat.generate([request])[0]
    ids = chat.tokenizer.encode(chat.tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True))
    with torch.no_grad():
        for spelled, p, top in reply.logprobs[:12]:
            logp = torch.log_softmax(chat.model(torch.tensor([ids])).logits[0, -1].double(), 0)
            assert np.isclose(max(top.values()), float(logp.max()), atol=1e-4) and len(top) <= 3
            token = min(range(len(logp)), key=lambda i: (abs(float(logp[i]) - p), i))
            assert np.isclose(float(logp[token]), p, atol=1e-4) and chat.tokenizer.decode([token]) == spelled
            ids.append(token)


def test_score_reads_the_template_and_adds_up_over_tokens(chat):
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    scores = chat.score(talk, "ok!")
    text = chat.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) + "ok!"
    ids = torch.tensor([chat.tokenizer.encode(text)])
    with torch.no_grad():
        logp = torch.log_softmax(chat.model(ids).logits[0].double(), -1)
    wanted = [float(logp[-4 + i, ids[0, -3 + i]]) for i in range(3)]
    assert np.allclose(scores, wanted, atol=1e-6) and scores.dtype == np.float64
    assert np.isclose(chat.score(talk, "ok!").sum(), scores.sum())


def test_a_stop_string_may_span_tokens_and_characters_of_many_bytes(chat, monkeypatch):
    forced = [*chat.tokenizer.encode("one 大大 two 大 three"), 2]
    steps = iter(range(100))

    class Forced(llm._Draw):
        def __call__(self, ids, logits):
            at = next(steps) % len(forced)
            return torch.nn.functional.one_hot(torch.full((len(logits),), forced[at]), logits.shape[1]).float()

    monkeypatch.setattr(llm, "_Draw", Forced)
    reply = chat.generate([ask("x", max_tokens=60, stop=("大 t", "never"))])[0]
    assert (reply.text, reply.finish_reason) == ("one 大", "stop")
    assert reply.usage.completion_tokens == len("one 大大 t".encode())
    steps = iter(range(100))
    assert chat.generate([ask("x", max_tokens=60)])[0].text == "one 大大 two 大 three"


def test_tools_and_calls_reach_the_template(chat):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "XYZ"}'}}
    tool = {"type": "function", "function": {"name": "f"}}
    talk = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "done", "tool_call_id": "c"}]
    text = chat.tokenizer.decode(llm._prompt_ids(chat.tokenizer, Request(talk, tools=(tool,))))
    assert text.startswith("<|im_start|>tools\n[{") and "XYZ<|im_end|>" in text and "done" in text
    assert chat.generate([Request(talk, tools=(tool,), max_tokens=2)])[0].usage.prompt_tokens == len(chat.tokenizer.encode(text))


def test_identity_depends_on_weights_and_template_and_not_on_the_folder(chat, folder, tmp_path, words):
    again = TransformersChat(folder, device="cpu")
    assert again.identity() == chat.identity() and chat.identity()["model"] == chat.name == "tiny"
    other = transformers.Qwen3ForCausalLM.from_pretrained(folder)
    other.save_pretrained(tmp_path / "tiny")
    words.save_pretrained(tmp_path / "tiny")
    moved = TransformersChat(tmp_path / "tiny", device="cpu")
    assert moved.identity() == chat.identity()
    half = TransformersChat(tmp_path / "tiny", device="cpu", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half.identity() != chat.identity()
    (tmp_path / "tiny" / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert TransformersChat(tmp_path / "tiny", device="cpu").identity() != chat.identity()
    with torch.no_grad():
        moved.model.model.norm.weight[0] += 1e-3
    assert moved.identity() != chat.identity()
    seen = [again.identity()]
    again.model.config.rms_norm_eps *= 2
    seen.append(again.identity())
    again.tokenizer.chat_template += " "
    assert again.identity() not in seen and seen[0] != seen[1]
    assert fingerprint(ask("a")) == fingerprint(ask("a"))


def test_a_checkpoint_without_a_template_gets_the_plain_text(folder, words):
    bare = transformers.Qwen3ForCausalLM.from_pretrained(folder)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    chat = TransformersChat(bare, plain)
    request = Request([{"role": "system", "content": "ab"}, {"role": "user", "content": "cd"}], max_tokens=3)
    assert chat.generate([request])[0].usage.prompt_tokens == len("ab\ncd")


@pytest.fixture(scope="module")
def seeing(words, tmp_path_factory):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, initializer_range=0.3),
        text_config=transformers.LlamaConfig(**text, vocab_size=260, pad_token_id=0, eos_token_id=2, bos_token_id=None, initializer_range=0.3),
        image_token_index=3, vision_feature_layer=-1)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=words, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",  # noqa: S106
        num_additional_image_tokens=1, chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("models") / "seeing"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return TransformersChat(path, device="cpu")


def show(text, *pictures, **options):
    parts = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}]
    return Request([{"role": "user", "content": parts}], **options)


def test_a_model_that_sees_answers_about_pictures_batched_as_alone(seeing):
    assert type(seeing.model).__name__ == "LlavaForConditionalGeneration"
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    requests = [show("what?" * (1 + i), *pictures[: i % 3], max_tokens=12, temperature=float(i % 2), seed=i, logprobs=1) for i in range(6)]
    groups = [{i % 3 for i in batch} for batch in seeing._batches(requests)]
    assert all(len(counts) == 1 for counts in groups)  # not every processor takes ragged lists of pictures
    together = seeing.generate([*requests, ask("no picture", max_tokens=5)])
    assert [outcome(seeing.generate([r])[0]) for r in requests] == [outcome(r) for r in together[:6]]
    swapped = seeing.generate([dataclasses.replace(requests[1], messages=show("what?what?", pictures[1]).messages)])[0]
    assert not np.isclose(swapped.logprobs[0][1], together[1].logprobs[0][1], atol=1e-3)
    texts = [seeing.generate([show("what?", max_tokens=2)])[0].usage.prompt_tokens, seeing.bound(show("what?", pictures[0])).prompt_tokens]
    assert texts[1] - texts[0] == 4  # 32 x 32 pixels in patches of 16 x 16


def test_greedy_about_a_picture_is_plain_generate(seeing):
    picture = np.random.default_rng(1).integers(0, 256, (33, 60, 3), dtype=np.uint8)
    reply = seeing.generate([show("what?", picture, max_tokens=10)])[0]
    talk = [llm._for_template(m, sees=True) for m in show("what?", picture).messages]
    inputs = seeing.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                  processor_kwargs={"return_tensors": "pt"})
    out = seeing.model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert reply.text == seeing.tokenizer.tokenizer.decode(out, skip_special_tokens=True)


def test_a_score_may_be_about_a_picture(seeing):
    rng = np.random.default_rng(2)
    one, other = (show("what?", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).messages for _ in range(2))
    first = seeing.generate([Request(one, max_tokens=1, logprobs=1)])[0]
    assert not np.isclose(seeing.score(one, "cat").sum(), seeing.score(other, "cat").sum(), atol=1e-4)
    if first.text.isascii() and first.text:
        assert np.isclose(seeing.score(one, first.text)[0], first.logprobs[0][1], atol=1e-4)


def test_pictures_for_a_model_that_reads_only_are_refused(chat):
    with pytest.raises(TypeError, match=r"Qwen3ForCausalLM reads text only, the request has 2 image\(s\)"):
        chat.generate([ask("a"), show("b", *np.zeros((2, 4, 4, 3), np.uint8))])


def small_llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.4, bos_token_id=None, eos_token_id=None, **options)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_of_fixed_shape_say_what_generate_says(attention):
    model, ids = small_llama(attn_implementation=attention), torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        step, said = llm._greedy_step(model, ids, 24)
        for _ in range(15):
            step()
        assert torch.equal(said[:, :21], model.generate(ids, max_new_tokens=16, do_sample=False)) and not said[:, 21:].any()
        assert llm._worst_gap(model, said[:, :21], 5) < 1e-4
        other = said[:, :21].clone()
        other[0, 13] = (other[0, 13] + 1) % 50
        assert llm._worst_gap(model, other, 5) > 1e-2


def test_a_step_can_be_recorded_whole():
    model = small_llama()
    with torch.no_grad():
        step, said = llm._greedy_step(model, torch.tensor([[3, 1, 4]]), 12)
        plain, again = llm._greedy_step(model, torch.tensor([[3, 1, 4]]), 12)
        whole = torch.compile(step, backend="eager", fullgraph=True)  # refuses whatever waits for a value
        for _ in range(4):
            whole()
            plain()
    assert torch.equal(said, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_says_what_generate_says():
    model, ids = small_llama().cuda(), torch.tensor([[3, 1, 4, 1, 5]]).cuda()
    with torch.no_grad():
        step, said = llm._greedy_step(model, ids, 24)
        replay = llm._graphed(step)
        for _ in range(12):
            replay()
        assert torch.equal(said[:, :21], model.generate(ids, max_new_tokens=16, do_sample=False))
