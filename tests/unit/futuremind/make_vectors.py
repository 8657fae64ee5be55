"""Record what the official scripts of 2WikiMultihopQA, HotpotQA and MuSiQue answer, as test vectors.

The scripts are not part of this repository. Take them from the datasets' own repositories, Alab-NII/2wikimultihop
(2wikimultihop_evaluate_v1.1.py at 209e761), hotpotqa/hotpot (hotpot_evaluate_v1.py at 4c0fa5e) and
StonyBrookNLP/musique (evaluate_v1.0.py and metrics/ at 24cc5b2), then

    python tests/unit/futuremind/make_vectors.py 2wikimultihop_evaluate_v1.1.py hotpot_evaluate_v1.py MUSIQUE_FOLDER

The file `nbs/futuremind/results/official_scores.json` is written anew. Its row `scores` holds inputs, not seeds.
`texts`, `em`, `f1` (F1, precision, recall), `musique_em`, `musique_f1`: every text as prediction (row) against every
text as gold (column). `wiki2`, `hotpot`, `musique`: lists of {pred, gold, aliases, printed, raw}, `printed` as the
script prints it, `raw` from the same script with its rounding switched off. Only questions with both ids are given to
2Wiki's script, which needs them, and only whole twins to MuSiQue's.
"""
import contextlib
import importlib.util
import io
import json
import platform
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

FILE = Path(__file__).parents[3] / "nbs" / "futuremind" / "results" / "official_scores.json"
TEXTS = ["", " ", "the", "The the.", "yes", "Yes.", "no", "No!", "noanswer", "yes no", "not", "know", "a.n. other",
         "An other",
         "Mira Olden", "mira  olden", "Olden Mira", "Mira Olden Olden", "the Mira Olden", "Mira-Olden", "Mira Olden's",
         "“Mira” Olden",
         "1,200", "1200", "4 March 1957", "March 4, 1957", "1957", "ÉCOLE", "école", "İzmir", "a b a b", "b a b",
         "no no", "is it no"]
VERSIONS = {"2wikimultihop": "209e761 (v1.1)", "hotpot": "4c0fa5e (v1)", "musique": "24cc5b2 (v1.0)"}
NAMES = [text for text in TEXTS if text.strip()]


def load(path):
    """Import a script by its path, with json in the place of ujson."""
    sys.modules.setdefault("ujson", json)
    spec = importlib.util.spec_from_file_location(f"official_{Path(path).stem.replace('.', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(function, *contents):
    """Printed and unrounded scores of a script that reads files."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(i)) for i in range(len(contents))]
        for exact in (False, True):
            for path, content in zip(paths, contents, strict=True):
                path.write_text(content)
            if exact:
                function.__globals__["round"] = lambda value, digits: value
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                found = function(*map(str, paths))
            function.__globals__.pop("round", None)
            text = said.getvalue()
            results.append(found or json.loads(text[text.index("{"):].replace("'", '"')))
    return dict(zip(("printed", "raw"), results, strict=True))


def some(draw, things, most):
    """A few of the things, in any order."""
    return draw.sample(things, draw.randint(0, min(most, len(things))))


def wiki2(draw, n):
    """Random questions, predictions and aliases in 2WikiMultihopQA's form; some predictions are missing."""
    aliases = {f"Q{i}": some(draw, TEXTS, 3) for i in range(8)}
    pred, gold = {"answer": {}, "sp": {}, "evidence": {}}, []
    facts = [[title, i] for title in ("Lorn", "lorn", "The Fenn", "Ödd") for i in (0, 1)]
    for i in range(n):
        evidences = [[draw.choice(NAMES), draw.choice(["director", "the mother"]), draw.choice(NAMES)]
                     for _ in range(draw.randint(0, 4))]
        ids = [[f"Q{draw.randint(0, 9)}", r, f"Q{draw.randint(0, 9)}"] for _, r, _ in evidences]
        gold.append({"_id": str(i), "answer": draw.choice(TEXTS), "answer_id": draw.choice(["",
                                                                                            f"Q{draw.randint(0, 9)}"]),
                     "supporting_facts": some(draw, facts, 4), "evidences": evidences,
                     "evidences_id": draw.choice([[], ids])})
        said = [draw.choice([triple, [draw.choice(TEXTS), r, draw.choice(TEXTS)]]) for triple in evidences
                for r in (triple[1],)]
        said += [[s.upper(), r, name] for (s, r, o), (_, _, o_id) in zip(evidences, ids, strict=True)
                 for name in (o, *aliases.get(o_id, []))]
        for task, value in (("answer", draw.choice([gold[-1]["answer"], draw.choice(TEXTS)])),
                            ("evidence", draw.choice([said, some(draw, said, 4)])),
                            ("sp", draw.choice([gold[-1]["supporting_facts"], some(draw, facts, 4)]))):
            if draw.random() < 0.88:
                pred[task][str(i)] = value
    return pred, gold, aliases


def by_hand():
    """A prediction between two aliases: best precision with one, best recall with the other."""
    gold = {"_id": "q", "answer": "Mira Olden Fenn", "answer_id": "Q1", "supporting_facts": [["Lorn", 0]],
            "evidences": [["Lorn", "director", "Mira Olden Fenn"]], "evidences_id": [["Q2", "director", "Q1"]]}
    pred = {"answer": {"q": "mira olden"}, "sp": {"q": [["lorn", 0]]},
            "evidence": {"q": [["Lorn", "director", "Olden"]]}}
    return pred, [gold], {"Q1": ["Olden"]}


def musique(draw, n, full):
    """Random records and predictions in MuSiQue's form, with twins if `full`."""
    pred, gold = [], []
    for i in range(n):
        for answerable in (True, False) if full else (True,):
            paragraphs = [{"idx": k, "is_supporting": draw.random() < 0.4} for k in range(5)]
            gold.append({"id": f"2hop__{i}", "answer": draw.choice(TEXTS), "answer_aliases": some(draw, TEXTS, 3),
                         "paragraphs": paragraphs, "answerable": answerable})
            support = [p["idx"] for p in paragraphs if p["is_supporting"]]
            pred.append({"id": f"2hop__{i}", "predicted_answer": draw.choice([gold[-1]["answer"], draw.choice(TEXTS)]),
                         "predicted_support_idxs": draw.choice([support, some(draw, range(5), 4)]),
                         "predicted_answerable": answerable if draw.random() < 0.8 else not answerable})
    return pred, gold


def lines(rows):
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(wiki2_path, hotpot_path, musique_folder):
    """Run the three scripts and write the file."""
    sys.path.insert(0, musique_folder)
    ours, other, third = load(wiki2_path), load(hotpot_path), load(Path(musique_folder, "evaluate_v1.0.py"))
    answer, draw = sys.modules["metrics.answer"], random.Random(0)  # noqa: S311
    grid = [(pred, gold) for pred in TEXTS for gold in TEXTS]
    held = {"texts": TEXTS, "em": [int(other.exact_match_score(*pair)) for pair in grid],
            "f1": [list(other.f1_score(*pair)) for pair in grid],
            "musique_em": [answer.compute_exact(gold, pred) for pred, gold in grid],
            "musique_f1": [answer.compute_f1(gold, pred) for pred, gold in grid], "wiki2": [], "hotpot": [],
            "musique": []}
    assert held["f1"] == [list(ours.f1_score(*pair)) for pair in grid]
    for n in [0] + [1] * 15 + [3] * 8 + [25]:
        pred, gold, aliases = wiki2(draw, n) if n else by_hand()
        table = lines({"Q_id": key, "aliases": names[:1], "demonyms": names[1:]} for key, names in aliases.items())
        held["wiki2"].append({"pred": pred, "gold": gold, "aliases": aliases,
                              **both(ours.eval, json.dumps(pred), json.dumps(gold), table)})
        held["hotpot"].append({"pred": pred, "gold": gold, **both(other.eval, json.dumps(pred), json.dumps(gold))})
        pred, gold = musique(draw, max(n, 1), full=len(held["musique"]) % 2 == 1)
        held["musique"].append({"pred": pred, "gold": gold, **both(third.evaluate, lines(pred), lines(gold))})
    run = {"device": "cpu", "date": date.today().isoformat(),
           "versions": VERSIONS | {"python": platform.python_version()},
           "command": "python tests/unit/futuremind/make_vectors.py 2wikimultihop_evaluate_v1.1.py "
                      "hotpot_evaluate_v1.py MUSIQUE_FOLDER"}
    stored = {"runs": {"official": run}, "rows": {"scores": {"run": "official", **held}}}
    FILE.write_text(json.dumps(stored, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
