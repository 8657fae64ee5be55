"""Baselines, adapters, the small model and the tools, by their real paths: a checkpoint on disk, a server that answers."""
import dataclasses
import json
import pickle
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collai.eval.llm import CachedChat, ChatServer, ReplayChat, Request, TokenUsage
from collai.eval.llm import Reply as ChatReply
from collai.viabench import models
from collai.viabench.families import FAMILIES, RULES
from collai.viabench.generator import draw, orbit
from collai.viabench.models import (
    BlindModel,
    ChatModel,
    HFModel,
    OpenAIModel,
    RandomModel,
    Reply,
    TinyVLM,
    ToolUser,
    train_tinyvlm,
)
from collai.viabench.protocol import compose, message

torch = pytest.importorskip("torch")
QUESTION, OPTIONS = "Which of the two horizontal lines is longer?", ["The upper one", "The lower one", "Both are equally long", "Not Sure"]
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
TEMPLATE = ("{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
            "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA checkpoint with random weights, its tokenizer and its processor, made on the spot."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    special = ["<pad>", "<unk>", "</s>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = Tokenizer(kinds.BPE({token: i for i, token in enumerate([*special, *letters])}, [], unk_token=special[1]))
    table.pre_tokenizer, table.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=table, **names, additional_special_tokens=["<image>"])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, initializer_range=0.3),
        text_config=transformers.LlamaConfig(**text, vocab_size=260, pad_token_id=0, eos_token_id=2, bos_token_id=None, initializer_range=0.3),
        image_token_index=3, vision_feature_layer=-1)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=words, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",  # noqa: S106
        num_additional_image_tokens=1, chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("hub") / "tiny-llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_checkpoint_on_disk_answers_through_its_real_loading_path(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = HFModel(folder, device="cpu", dtype="float32", max_tokens=6)
    assert type(model.chat.model).__name__ == "LlavaForConditionalGeneration" and model.name == "tiny-llava"
    prompt = compose(QUESTION, OPTIONS, "direct")
    one = model.answer(PICTURE, prompt, OPTIONS)
    assert isinstance(one, Reply) and isinstance(one.text, str) and 0 < one.usage.completion_tokens <= 6 and one.seconds > 0
    assert one.letter in (None, "A", "B", "C", "D")
    other = 255 - PICTURE
    many = model.answers([PICTURE, other], [prompt, prompt], [OPTIONS, OPTIONS])
    alone = [one.text, model.answer(other, prompt, OPTIONS).text]
    assert [reply.text for reply in many] == alone  # batched = alone, and greedy: the same again
    assert model.answer(draw(FAMILIES["ponzo"], size=64, delta=FAMILIES["ponzo"].limit), prompt, OPTIONS).usage is not None
    loaded = HFModel(str(folder), device_map="cpu", dtype="float32", max_tokens=6) if _has("accelerate") else HFModel(
        str(folder), device="cpu", dtype="float32", max_tokens=6)
    assert loaded.answer(PICTURE, prompt, OPTIONS).text == one.text
    assert model.identity() != HFModel(folder, device="cpu", dtype="float32", max_tokens=7).identity()


def _has(name):
    import importlib.util
    return importlib.util.find_spec(name) is not None


def test_a_checkpoint_may_be_named_as_on_the_hub_or_is_refused_before_anything_is_asked(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    named = HFModel(f"{folder.parent.name}/tiny-llava", device="cpu", dtype="float32", max_tokens=4)
    assert named.answer(PICTURE, QUESTION, OPTIONS).text == HFModel(folder, device="cpu", max_tokens=4).answer(PICTURE, QUESTION, OPTIONS).text
    with pytest.raises(FileNotFoundError, match="no model in .*nothing-here"):
        HFModel(tmp_path / "nothing-here")
    with pytest.raises(FileNotFoundError, match="config.json"):
        HFModel(tmp_path)
    with pytest.raises(ValueError, match=r"give device or device_map, got 'cpu' and 'auto'"):
        HFModel(folder, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="max_tokens must be an integer >= 1, got 0"):
        HFModel(folder, device="cpu", max_tokens=0)


@pytest.fixture(scope="module")
def tiny():
    return TinyVLM()


@pytest.fixture(scope="module")
def controls():
    return [draw(FAMILIES[name], strength=0.0, delta=delta, seed=5_000_000 + i, size=256)
            for i, name in enumerate(FAMILIES) for delta in orbit(FAMILIES[name], FAMILIES[name].limit)]


def test_the_small_model_behind_a_server_says_what_it_says_alone(tiny, controls):
    some = controls[::5]
    for prompt in ("direct", "cot"):
        asked = [compose(s.question, s.options, prompt) for s in some]
        alone = tiny.answers([s.image for s in some], asked, [s.options for s in some])
        with ChatServer(tiny, model="tinyvlm", faults=(None, 429, None, "garbage")) as server:
            served = OpenAIModel(server.base_url, "tinyvlm", "no-key", max_tokens=40)
            replies = served.answers([s.image for s in some], asked, [s.options for s in some])
            assert server.billed == sum((r.usage for r in replies), TokenUsage(0, 0))
        assert [(r.text, r.letter) for r in replies] == [(r.text, r.letter) for r in alone]
    assert served.remote and served.name == "tinyvlm" and served.answer.__doc__


def test_replies_can_be_cached_and_replayed(tiny, controls, tmp_path):
    stimulus = controls[0]
    prompt = compose(stimulus.question, stimulus.options, "cot")
    cached = CachedChat(tiny, tmp_path / "cache.sqlite")
    first, again = (ChatModel(cached).answer(stimulus, prompt, stimulus.options) for _ in range(2))
    assert (cached.hits, cached.misses) == (1, 1) and first.text == again.text == tiny.answer(stimulus, prompt, stimulus.options).text
    cached.export(tmp_path / "said.jsonl")
    assert ChatModel(ReplayChat(tmp_path / "said.jsonl")).answer(stimulus, prompt, stimulus.options).text == first.text


def test_a_request_that_the_small_model_cannot_take_is_refused(tiny, controls):
    part = [{"type": "image", "image": PICTURE}, {"type": "text", "text": message(QUESTION, OPTIONS)}]
    with pytest.raises(ValueError, match="the request has none"):
        tiny.generate([Request([{"role": "user", "content": "hello"}])])
    with pytest.raises(ValueError, match="neither tools nor log-probabilities"):
        tiny.generate([Request([{"role": "user", "content": part}], logprobs=1)])
    with pytest.raises(ValueError, match="at least 2, all different"):
        tiny.generate([Request([{"role": "user", "content": part[:1]}])])
    s = controls[0]
    parts = [{"type": "image", "image": s.image}, {"type": "text", "text": compose(s.question, s.options, "cot")}]
    cut = tiny.generate([Request([{"role": "user", "content": parts}], 2)])[0]
    assert cut.finish_reason == "length" and cut.usage.completion_tokens == 2


def test_names_and_keys_are_checked_and_no_key_is_kept():
    with pytest.raises(ValueError, match="model must be the name of a model"):
        OpenAIModel("http://127.0.0.1:1/v1")
    model = OpenAIModel("http://127.0.0.1:1/v1", "m", "secret-key")
    assert "secret-key" not in repr(vars(model)) + repr(vars(model.chat)) + json.dumps(model.identity())
    with pytest.raises(ValueError, match="temperature must be finite and >= 0, got -1"):
        ChatModel(model.chat, temperature=-1)


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 3))
def test_a_random_reply_is_a_function_of_its_question(seed, k, sample):
    options = [f"option {i}" for i in range(k)]
    one, again = (RandomModel(seed).answer(PICTURE, QUESTION, options, sample=sample) for _ in range(2))
    assert one == again and one.letter in "ABCDEF"[:k] and one.text == one.letter


def test_random_replies_are_uniform():
    counts = {letter: 0 for letter in "ABCD"}
    for i in range(2000):
        counts[RandomModel(0).answer(PICTURE, f"question {i}", OPTIONS).letter] += 1
    assert all(400 < n < 600 for n in counts.values())  # five standard deviations
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        RandomModel(-1)


def test_the_blind_model_says_what_was_right_most_often_and_follows_the_options():
    texts = [(QUESTION, "B")] * 3 + [(QUESTION, "A")] * 2 + [("Is it moving?", "A")]
    split = [types.SimpleNamespace(question=q, options=OPTIONS if q == QUESTION else ["No", "Yes", "Not Sure"], answer=a) for q, a in texts]
    blind = BlindModel(split)
    assert blind.answer(None, compose(QUESTION, OPTIONS, "cot"), OPTIONS).letter == "B"
    turned = OPTIONS[-1:] + OPTIONS[:-1]
    assert blind.answer(None, message(QUESTION, turned), turned).letter == "C"
    assert blind.answer(None, "Question:\nIs it moving?\nOption: \nA. Yes\nB. No\n", ["Yes", "No"]).letter == "B"
    assert blind.answer(None, "Never seen?", OPTIONS).letter == "A" == BlindModel().answer(None, QUESTION, OPTIONS).letter
    with pytest.raises(ValueError, match="needs its right letter to be learned from, got None"):
        BlindModel([types.SimpleNamespace(question=QUESTION, options=OPTIONS, answer=None)])
    assert blind.identity() != BlindModel(split[:3]).identity()


@pytest.mark.parametrize("model", [RandomModel(), BlindModel()])
def test_options_that_are_no_choice_are_refused(model):
    for options in (["Yes"], ["Yes", "Yes"]):
        with pytest.raises(ValueError, match="options must be at least 2, all different"):
            model.answer(PICTURE, QUESTION, options)


def test_a_picture_of_another_kind_is_refused(tiny):
    for wrong in (PICTURE[..., 0], PICTURE.astype(float), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\)"):
            tiny.answer(wrong, QUESTION, OPTIONS)


class Scripted:
    """A chat that says what it is told, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def generate(self, requests):
        self.asked += requests
        return [ChatReply(self.texts.pop(0), "stop", TokenUsage(10, 2), seconds=0.5) for _ in requests]

    def identity(self):
        return {"model": self.name}


def call(tool, **arguments):
    return json.dumps({"tool": tool, **arguments})


def test_a_chat_with_tools_sees_every_derived_picture_and_every_call_is_logged():
    chat = Scripted(f"I look closer.\n```json\n{call('crop', picture=0, x0=0, y0=0, x1=8, y1=4)}\n```",
                    call("blur", picture=1, sigma=1.5), call("measure_rgb", x0=1, y0=1, x1=2, y1=2), "So it is B.\nAnswer: B")
    user, before = ToolUser(ChatModel(chat)), PICTURE.copy()
    reply = user.answer(PICTURE, QUESTION, OPTIONS)
    assert (PICTURE == before).all() and reply.letter == "B" and reply.usage == TokenUsage(40, 8) and reply.seconds == 2.0
    pictures = [part["image"] for m in chat.asked[-1].messages if not isinstance(m["content"], str) for part in m["content"] if part["type"] == "image"]
    assert [p.shape[:2] for p in pictures] == [(64, 64), (4, 8), (4, 8)] and (pictures[1] == PICTURE[:4, :8]).all()
    assert [m["role"] for m in chat.asked[-1].messages] == ["user"] + ["assistant", "user"] * 3
    assert [entry["call"]["tool"] for entry in user.log] == ["crop", "blur", "measure_rgb"] and user.log[2]["made"] is None
    assert user.log[2]["result"].startswith(f"mean rgb ({PICTURE[1, 1, 0]:.1f}, ")
    assert reply.text.startswith("<think>") and reply.text.count(" -> ") == 3 and reply.text.endswith("Answer: B")


def test_after_the_last_call_the_model_must_answer():
    chat = Scripted(*[call("blur", sigma=1)] * 9)
    user = ToolUser(ChatModel(chat))
    assert user.answer(PICTURE, QUESTION, OPTIONS).letter is None and len(chat.asked) == 7 and len(user.log) == 6
    assert "No call is left: answer now." in chat.asked[-1].messages[-1]["content"][-1]["text"]
    none = Scripted(call("blur", sigma=1))
    assert ToolUser(ChatModel(none), max_calls=0).answer(PICTURE, QUESTION, OPTIONS).letter is None and len(none.asked) == 1


WRONG = [({"tool": "zoom"}, "no tool 'zoom'; there are crop"), ({"tool": "crop", "picture": 3, "x0": 0, "y0": 0, "x1": 2, "y1": 2}, "numbered 0 to 0, got 3"),
         ({"tool": "crop", "x0": 0, "y0": 0, "x1": 65, "y1": 2}, "0 <= x0 < x1 <= 64"), ({"tool": "crop", "x0": 0.5, "y0": 0, "x1": 6, "y1": 2}, "integer"),
         ({"tool": "blur", "sigma": float("nan")}, "sigma must be in"), ({"tool": "blur"}, "missing"), ({"tool": "channel", "channel": "alpha"}, "red, green, blue"),
         ({"tool": "draw_line", "x0": 0, "y0": 0, "x1": 1e9, "y1": 0}, "near the picture"), ({"tool": "draw_line", "x0": 0, "y0": 0, "x1": 9, "y1": 0, "rgb": [1, 2]}, "three codes"),
         ({"tool": ["crop"]}, "no tool"), ({"tool": "crop", "picture": True}, "got True"), ({"tool": "side_by_side", "other": "1"}, "got '1'"),
         ({"tool": "measure_rgb", "x0": 2, "y0": 0, "x1": 2, "y1": 2}, "0 <= x0 < x1"), ({"tool": "blur", "sigma": 10**400}, "error")]


@pytest.mark.parametrize(("wrong", "message_"), WRONG)
def test_a_wrong_call_is_answered_and_counts(wrong, message_):
    chat = Scripted(json.dumps(wrong), "Answer: A")
    user = ToolUser(ChatModel(chat))
    assert user.answer(PICTURE, QUESTION, OPTIONS).letter == "A"
    said = chat.asked[1].messages[-1]["content"][-1]["text"]
    assert said.startswith("error: ") and message_ in said and "5 calls are left." in said and len(user.log) == 1


def test_a_model_that_is_no_chat_is_asked_about_the_newest_picture():
    seen = []

    class Plain:
        name = "plain"

        def answer(self, image, prompt, options):
            seen.append((image, prompt))
            return Reply("C", "C", None, 0.0)

    user = ToolUser(Plain(), first=[{"tool": "channel", "channel": "red"}, {"tool": "crop", "picture": 1, "x0": 0, "y0": 0, "x1": 5, "y1": 6}])
    assert user.answer(PICTURE, compose(QUESTION, OPTIONS), OPTIONS).letter == "C" and user.name == "plain+tools"
    (image, prompt), = seen
    assert image.shape == (6, 5, 3) and (image == PICTURE[:6, :5, :1]).all() and not image.flags.writeable
    assert "picture 2, 5 by 6 pixels" in prompt and prompt.startswith(QUESTION)
    with pytest.raises(ValueError, match="max_calls must be in 0 to 6, got 7"):
        ToolUser(Plain(), max_calls=7)
    with pytest.raises(ValueError, match="first must be at most 6 calls of crop"):
        ToolUser(Plain(), first=[{"tool": "zoom"}])


@given(st.data())
def test_tools_never_change_a_picture_and_make_read_only_ones(data):
    pictures = [np.random.default_rng(i).integers(0, 256, (9, 7 + i, 3), dtype=np.uint8) for i in range(2)]
    kept = [p.copy() for p in pictures]
    x0, y0 = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    box = {"x0": x0, "y0": y0, "x1": data.draw(st.integers(x0 + 1, 7)), "y1": data.draw(st.integers(y0 + 1, 9))}
    extra = {"crop": box, "draw_line": box, "side_by_side": {"other": 1}, "channel": {"channel": data.draw(st.sampled_from(["red", "luminance"]))},
             "blur": {"sigma": data.draw(st.floats(0.1, 5))}, "measure_rgb": box}
    for tool in models._TOOLS:
        made = models._apply(pictures, {"tool": tool, "picture": data.draw(st.integers(0, 1)), **extra[tool]})
        assert isinstance(made, str) or (made.dtype == np.uint8 and not made.flags.writeable)
    assert all((p == k).all() for p, k in zip(pictures, kept, strict=True))


def test_the_blur_keeps_the_mean_and_a_line_is_as_wide_as_asked():
    flat = np.full((32, 32, 3), 77, np.uint8)
    assert (models._apply([flat], {"tool": "blur", "sigma": 3}) == 77).all()
    for width in (1, 2, 5):
        line = models._apply([flat], {"tool": "draw_line", "x0": -5, "y0": 16 + width % 2 / 2, "x1": 40, "y1": 16 + width % 2 / 2, "width": width})
        assert ((line == (255, 0, 0)).all(2).sum(0) == width).all()


@given(st.integers(20, 300), st.integers(20, 300))
def test_shrinking_keeps_the_mean_and_a_flat_picture(h, w):
    rng = np.random.default_rng(h * 1000 + w)
    square = rng.integers(0, 256, (h, h, 3), dtype=np.uint8)
    small = models._shrink(square)
    assert small.shape == (3, 96, 96) and np.allclose(small.mean((1, 2)), square.mean((0, 1)), atol=0.6)
    assert (models._shrink(np.full((h, w, 3), 255, np.uint8)) == 255).all()


def test_shrinking_by_a_whole_number_is_the_mean_of_blocks():
    picture = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    blocks = picture.reshape(96, 2, 96, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(models._shrink(picture) - blocks).max() <= 0.5


def test_the_committed_model_is_small_and_saw_controls_only(tiny):
    assert len(tiny.vocabulary) <= 200 and sum(w.size for key, w in tiny.weights.items() if "running" not in key and "num_" not in key) <= 600_000
    assert models._CHECKPOINT.stat().st_size <= 3 * 1024**2
    assert set(tiny.record["families"]) == set(FAMILIES)
    assert set(tiny.vocabulary) == set(models._vocabulary(FAMILIES.values()))


def test_the_committed_model_reads_unseen_controls_far_above_chance(tiny, controls):
    for prompt, floor in (("direct", 0.8), ("cot", 0.8)):
        asked = [compose(s.question, s.options, prompt) for s in controls]
        replies = tiny.answers([s.image for s in controls], asked, [s.options for s in controls])
        assert np.mean([r.letter == s.answer for r, s in zip(replies, controls, strict=True)]) > floor
        assert np.mean([r.letter is None for r in replies]) < 0.02
    assert sum(r.text.count(" so Answer: ") for r in replies) >= 0.95 * len(replies)


def test_the_small_model_reads_any_order_and_number_of_options(tiny, controls):
    stimulus = controls[0]
    for options in (stimulus.options[::-1], stimulus.options[:2], [*stimulus.options, "Maybe", "It depends"], ["seven", "8"]):
        reply = tiny.answer(stimulus.image, compose("What is this?", options), options)
        assert reply.letter is None or reply.letter in "ABCDEF"[: len(options)]
    assert tiny.answers([], [], []) == []


def test_the_small_model_survives_pickling(tiny, controls):
    stimulus = controls[3]
    prompt = compose(stimulus.question, stimulus.options)
    copied = pickle.loads(pickle.dumps(tiny))  # noqa: S301
    assert copied.answer(stimulus, prompt, stimulus.options).text == tiny.answer(stimulus, prompt, stimulus.options).text
    assert copied.identity() == tiny.identity()


def test_training_is_reproducible_resumable_and_cached(tmp_path, monkeypatch):
    plan = {"steps": 4, "each": 3, "batch": 8, "families": ["ponzo", "finger_count"]}
    whole = train_tinyvlm(1, path=tmp_path / "whole.safetensors", **plan)
    monkeypatch.setattr(models, "_EVERY", 2)
    batch, left = models._batch, [2]

    def breaks(*args):
        if left[0] == 0:
            raise InterruptedError("stopped on purpose")
        left[0] -= 1
        return batch(*args)

    monkeypatch.setattr(models, "_batch", breaks)
    with pytest.raises(InterruptedError, match="on purpose"):
        train_tinyvlm(1, path=tmp_path / "part.safetensors", **plan)
    left[0] = 2
    rest = train_tinyvlm(1, path=tmp_path / "part.safetensors", **plan)
    assert rest.identity() == whole.identity() == TinyVLM(tmp_path / "whole.safetensors").identity()
    assert rest.record["losses"] == whole.record["losses"] and not (tmp_path / "part.state").exists()
    assert train_tinyvlm(1, path=tmp_path / "whole.safetensors", **plan).identity() == whole.identity()  # left[0] is 0: nothing is trained
    with pytest.raises(ValueError, match="was trained with other arguments"):
        train_tinyvlm(2, path=tmp_path / "whole.safetensors", **plan)
    with pytest.raises(ValueError, match="steps, each, batch and families >= 1, got 0, 0, 400"):
        train_tinyvlm(0, steps=0)
    with pytest.raises(KeyError, match="nosuch"):
        train_tinyvlm(0, families=["nosuch"])
    with pytest.raises(FileNotFoundError, match="no checkpoint: .*gone"):
        TinyVLM(tmp_path / "gone.safetensors")


def test_training_shows_controls_only_each_answer_equally_often(monkeypatch):
    drawn = []
    monkeypatch.setattr(models, "draw", lambda family, **kw: drawn.append(kw["strength"]) or draw(family, **kw))
    pictures, texts = models._controls({name: FAMILIES[name] for name in ("ponzo", "munker")}, 60, 0)
    assert set(drawn) == {0.0} and pictures.shape == (120, 3, 96, 96) and pictures.dtype == np.uint8
    right = [text[2] for text in texts[:60]]
    assert min(right.count(option) for option in texts[0][1][:-1]) >= 8


def test_chains_are_true_of_their_pictures():
    for name in ("ponzo", "ebbinghaus", "white", "finger_count"):
        family = FAMILIES[name]
        for seed in range(6):
            for delta in orbit(family, family.limit):
                s = draw(family, strength=0.0, delta=delta, seed=seed, size=256)
                words = models._chain(s, RULES[name])
                right = s.options["ABCD".index(s.answer)]
                if words[0] == "count":
                    assert words == ["count", right]
                elif delta:
                    assert words[-2].lower() in right.lower() and (int(words[1]) > int(words[3])) == (words[0] == words[-2])
                else:
                    assert words[1] == words[3] and words[-1] in ("equal", "same colour")


def test_numbers_are_spelled_digit_by_digit_and_read_back():
    known = {token: i for i, token in enumerate(models._SPECIAL)}
    ids = [i for word in ["left", "128", "right", "7", "equal", "so", "Answer:", "C"] for i in models._ids(known, word)]
    assert models._spell(models._SPECIAL, [*ids, known["<end>"]]) == "left 128 right 7 equal so Answer: C"
    assert models._ids(known, "Row 2, column 13") == [2, known["2"], 2, known["1"], known["3"]]
    many = [dataclasses.replace(family, question=f"question {i}?") for i, family in enumerate(FAMILIES.values()) for _ in range(1)]
    with pytest.raises(ValueError, match="at most 200 tokens, got"):
        models._vocabulary([dataclasses.replace(f, question=f"{f.question} {i}") for i in range(8) for f in many])
