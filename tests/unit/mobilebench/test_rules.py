"""Rules: parity with the released behaviour, ordered matching against all assignments, task files, metrics, bad input."""
import csv
import io
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from collai.eval.stats import wilson
from collai.mobilebench import rules
from collai.mobilebench.rules import (
    MobileTask,
    Rule,
    RuleResult,
    classify,
    load_tasks,
    match_rule,
    parse_rule,
    summarize,
)

many = settings(max_examples=300, deadline=None)
END, WAIT = {"action": "terminate", "params": {}}, {"action": "wait"}
LETTERS = "ABCD"


def node(text, bounds="[0,0][100,50]"):
    return f'<node text="{text}" bounds="{bounds}" class="android.widget.TextView" clickable="true" />'


def screen(*texts):
    return '<hierarchy rotation="0">' + "".join(map(node, texts)) + "</hierarchy>"


def tap(x, y):
    return {"action": "click", "params": {"position": [x, y]}}


def has(text):
    return f'//*[@text="{text}"]'


def touched(text):
    return f'//*[@text="{text}" and bbox_contains_point(@bounds,$point)]'


def written(alternatives):
    blocks = ('{"xpath": [' + ",".join(f"'''{xpath}'''" for xpath in xpaths) + "]}" for xpaths in alternatives)
    return " ###".join(blocks)


# ---- the released evaluator, written once more from its description: nothing is shared with the module ----

def released_function(_, bounds, point):
    text = bounds if isinstance(bounds, str) else bounds[0]
    left, top, right, bottom = (int(number) for number in text.replace("][", ",").strip("[]").split(","))
    x, y = (int(number) for number in point.split(","))
    return left <= x <= right and top <= y <= bottom


def released_holds(xml, xpath, action):
    if not xpath:
        return False
    if "$point" in xpath:
        if "position" not in action.get("params", {}):
            return False
        x, y = action["params"]["position"]
        xpath = xpath.replace("$point", f"'{x},{y}'")
    found = etree.fromstring(xml.encode()).xpath(xpath, extensions={(None, "bbox_contains_point"): released_function})
    return bool(found)


def released_flag(text, screens, actions):
    for block in text.split("###"):
        xpaths = block.split("'''")[1::2]
        done = [False] * len(xpaths)
        for t in range(len(screens) - 1, -1, -1):
            for i in range(len(xpaths) - 1, -1, -1):
                if not done[i] and released_holds(screens[t], xpaths[i], actions[t]):
                    done[i] = True
                    break
            if all(done):
                return True
    return False


def released_ratio(text, screens, actions):
    total = []
    for block in text.split("###"):
        xpaths = block.split("'''")[1::2]
        done = [any(released_holds(screens[t], xpath, actions[t]) for t in range(len(screens))) for xpath in xpaths]
        if all(done):
            return 1.0
        total += done
    return sum(total) / len(total) if total else 0.0


POOL = [has(x) for x in LETTERS] + [touched(x) for x in LETTERS] + [
    "", has("A") + " and " + has("B"), f'not({has("C")})', "count(//node) - 2", "string(//node/@text)", "//node/@text",
    'bbox_contains_point(//node[1]/@bounds, "10,10")', f' {has("A")} ', "//*[bbox_contains_point('[0,0][60,60]', $point)]"]


def random_case(rng):
    alternatives = [[POOL[i] for i in rng.integers(len(POOL), size=rng.integers(1, 6))] for _ in range(rng.integers(1, 4))]
    n = int(rng.integers(1, 8))
    screens, actions = [], []
    for _ in range(n):
        texts = rng.choice(list(LETTERS), size=rng.integers(1, 4))
        nodes = "".join(node(x, f"[0,{40 * i}][100,{40 * i + 40}]") for i, x in enumerate(texts))
        screens.append(f"<hierarchy>{nodes}</hierarchy>")
        actions.append(tap(int(rng.integers(130)), 20 * int(rng.integers(8))) if rng.random() < 0.7 else WAIT)
    return written(alternatives), screens, actions


def test_compat_equals_the_released_evaluator_on_three_thousand_random_cases():
    rng, flags, ratios = np.random.default_rng(3), [], set()
    for _ in range(3000):
        text, screens, actions = random_case(rng)
        rule = Rule(tuple(tuple(block.split("'''")[1::2]) for block in text.split("###")))
        result = match_rule(rule, screens, actions)
        assert result.matched == released_flag(text, screens, actions), (text, screens, actions)
        assert result.ratio == released_ratio(text, screens, actions), (text, screens, actions)
        flags.append(result.matched)
        ratios.add(result.ratio)
    assert 0.1 < np.mean(flags) < 0.9 and len(ratios) > 15


def test_an_alternative_without_xpaths_is_fulfilled_in_compat_and_refused_elsewhere():
    rule = Rule(((has("A"),), ()))
    text = written([[has("A")]]) + '###{"xpath": []}'
    assert match_rule(rule, [screen("B")], [END]) == RuleResult(True, 1.0, 1, ())
    assert released_flag(text, [screen("B")], [END]) and released_ratio(text, [screen("B")], [END]) == 1.0
    with pytest.raises(ValueError, match="alternative 2 of 2 has no XPath"):
        parse_rule(text)
    with pytest.raises(ValueError, match="alternative 2 of 2 has no XPath"):
        match_rule(rule, [screen("B")], [END], mode="ordered")


def test_compat_says_where_it_credited():
    result = match_rule(Rule(((has("Z"),), (has("A"), has("B")))), [screen("B"), screen("A"), screen("A", "B")], [WAIT, WAIT, END])
    assert result == RuleResult(True, 1.0, 1, (1, 2))
    result = match_rule(Rule(((has("A"), has("B")), (has("C"), has("D"), has("A")))), [screen("A")], [END])
    assert result == RuleResult(False, 2 / 5, 1, (None, None, 0))


# ---- ordered ----

def every_assignment(truth, names, n):
    for hits in itertools.product([None, *range(n)], repeat=len(names)):
        held = [(i, t) for i, t in enumerate(hits) if t is not None]
        rises = all(a[1] <= b[1] for a, b in itertools.pairwise(held))
        apart = all(a[1] != b[1] for a, b in itertools.combinations(held, 2) if names[a[0]] == names[b[0]])
        if rises and apart and all(truth[names[i]][t] for i, t in held):
            yield hits


@st.composite
def small_tables(draw):
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    names = draw(st.lists(st.sampled_from("ABC"), min_size=m, max_size=m))
    truth = {name: draw(st.lists(st.booleans(), min_size=n, max_size=n)) for name in "ABC"}
    return names, truth, n


def trajectory(truth, n):
    return [screen(*(name for name in truth if truth[name][t])) for t in range(n)], [WAIT] * n


@many
@given(small_tables())
def test_ordered_equals_all_assignments_tried(case):
    names, truth, n = case
    valid = set(every_assignment(truth, names, n))
    best = max(sum(hit is not None for hit in hits) for hits in valid)
    result = match_rule(Rule((tuple(map(has, names)),)), *trajectory(truth, n), mode="ordered")
    assert result.matched == (best == len(names)) and result.ratio == best / len(names)
    assert result.hits in valid and sum(hit is not None for hit in result.hits) == best
    full = [hits for hits in valid if None not in hits]
    assert not full or result.hits == tuple(np.min(full, axis=0))


def test_ordered_rows_equal_the_plain_maximum_on_long_rules():
    rng = np.random.default_rng(5)
    for _ in range(60):
        m, n, kinds = int(rng.integers(1, 40)), int(rng.integers(1, 25)), int(rng.integers(1, 8))
        names = [str(x) for x in rng.integers(kinds, size=m)]
        table = rng.random((kinds, n)) < rng.choice([0.1, 0.4, 0.8])
        truth, previous, row = [table[int(name)].tolist() for name in names], rules._previous(names), [0] * (m + 1)
        for t in range(n):
            plain = [max(row[p] + len({names[i] for i in range(p, j) if truth[i][t]}) for p in range(j + 1)) for j in range(m + 1)]
            row = rules._next_row(row, [line[t] for line in truth], previous)
            assert row == plain
        assert sum(hit is not None for hit in rules._longest(truth, names, previous, n)) == row[-1]


@many
@given(small_tables(), st.integers(0, 4))
def test_a_further_step_never_lowers_the_ordered_ratio(case, cut):
    names, truth, n = case
    screens, actions = trajectory(truth, n)
    rule, k = Rule((tuple(map(has, names)),)), min(cut, n - 1) + 1
    shorter = match_rule(rule, screens[:k], actions[:k], mode="ordered")
    assert shorter.ratio <= match_rule(rule, screens, actions, mode="ordered").ratio


def test_ordered_takes_the_best_alternative():
    rule = Rule(((has("A"), has("Z")), (has("A"), has("B"), has("Z")), (has("Y"),)))
    result = match_rule(rule, [screen("A"), screen("B")], [WAIT, END], mode="ordered")
    assert (result.matched, result.ratio, result.alternative, result.hits) == (False, 2 / 3, 1, (0, 1, None))


def test_identical_xpaths_need_steps_of_their_own():
    thrice = Rule(((has("A"), f" {has('A')}", has("A")),))
    for n in (1, 2, 3, 4):
        result = match_rule(thrice, [screen("A")] * n, [WAIT] * n, mode="ordered")
        assert result.matched == (n >= 3) and result.ratio == min(n, 3) / 3


def test_only_truth_values_and_node_sets_count_when_ordered():
    for xpath, compat, ordered in (("count(//node)", True, False), ("'x'", True, False), ("0", False, False),
                                   ("true()", True, True), ("//node", True, True), ("//none", False, False)):
        rule = Rule(((xpath,),))
        assert match_rule(rule, [screen("A")], [END]).matched is compat
        assert match_rule(rule, [screen("A")], [END], mode="ordered").matched is ordered


# ---- one XPath on one screen ----

@many
@given(st.integers(-5, 120), st.integers(-5, 80))
def test_a_box_contains_its_borders(x, y):
    rule = Rule(((touched("A"),),))
    for action in (tap(x, y), {"action": "click", "params": {"position": (np.int64(x), np.int64(y))}}):
        assert match_rule(rule, [screen("A")], [action]).matched == (0 <= x <= 100 and 0 <= y <= 50)


def test_bounds_may_be_missing_and_points_fractions():
    parent = Rule((("//*[@text='A' and bbox_contains_point(../@bounds,$point)]",),))
    assert not match_rule(parent, [screen("A")], [tap(1, 1)]).matched
    assert not match_rule(Rule((("//*[bbox_contains_point(@bounds,$point)]",),)), [node("A", "")], [tap(1, 1)]).matched
    assert match_rule(Rule(((touched("A"),),)), [screen("A")], [tap(99.5, 0.0)]).matched
    for action in (WAIT, END, {"action": "swipe", "params": {"position": None}}, {"action": "back", "params": None}):
        assert not match_rule(Rule(((f"{touched('A')} or true()",),)), [screen("A")], [action]).matched


def test_forbidden_characters_are_taken_out_and_a_declaration_is_read():
    dump = "<?xml version='1.0' encoding='UTF-8' standalone='yes' ?>\n" + screen("A\x00\x0b&#0;&#x1F;\ud800好")
    assert match_rule(Rule(((has("A好"),),)), [dump], [END]).matched
    assert match_rule(Rule(((has("A"),),)), [screen("&#65;&#x110000;")], [END]).matched


@pytest.mark.parametrize(("screens", "actions", "said"), [
    ([], [], "as many screens as actions, and one at least, got 0 and 0"),
    ([screen("A")], [], "got 1 and 0"),
    ([screen("A"), "<node"], [END, END], r"screen 1 is no XML: .*line 1, column .*it begins '<node'"),
    ([""], [END], "screen 0 is no XML"),
    ([None], [END], "screen 0 must be a string of XML, got None"),
    ([node("A", "[0,0][1]")], [END], r"bounds must be '\[x1,y1\]\[x2,y2\]', got '\[0,0\]\[1\]'"),
    ([screen("A")], [{"name": "tap"}], "action 0 must be like .*got {'name': 'tap'}"),
    ([screen("A")], ["tap(1,2)"], r"action 0 must be like .*got 'tap\(1,2\)'"),
    ([screen("A")], [{"action": "click", "params": [1, 2]}], r"params of action 0 must be a mapping, got \[1, 2\]"),
    ([screen("A")], [tap(math.nan, 1)], r"position of action 0 must be two finite numbers, got \[nan, 1\]"),
    ([screen("A")], [tap(True, 1)], r"two finite numbers, got \[True, 1\]"),
    ([screen("A")], [{"action": "click", "params": {"position": [1]}}], r"two finite numbers, got \[1\]"),
    ([screen("A")], [{"action": "click", "params": {"position": 7}}], "two finite numbers, got 7"),
    ([screen("A")], [tap(10**400, 1)], r"two finite numbers, got \[1000"),
])
def test_a_trajectory_that_cannot_be_judged_is_refused(screens, actions, said):
    for mode in ("compat", "ordered"):
        with pytest.raises(ValueError, match=said):
            match_rule(Rule(((has("A"),),)), screens, actions, mode=mode)


@pytest.mark.parametrize(("rule", "mode", "said"), [
    (Rule(((has("A"),),)), "strict", "mode must be 'compat' or 'ordered', got 'strict'"),
    (Rule(()), "compat", "the rule has no alternative"),
    (written([[has("A")]]), "compat", "rule must be a Rule"),
    (Rule((('//*[contains(@text, "A")',),)), "compat", r"XPath does not compile \(.*\): //\*\[contains"),
    (Rule((("//*[nothing()]",),)), "ordered", r"XPath cannot be evaluated \(.*\): //\*\[nothing"),
    (Rule((("//node[bbox_contains_point('1,2', $point)]",),)), "compat", "bounds must be .*got '1,2'"),
    (Rule((("//node[bbox_contains_point(@bounds, 'here')]",),)), "compat", "a point must be 'x,y', got 'here'"),
    (Rule((("bbox_contains_point(//@bounds, $point)",),)), "compat", "takes one value, got 2"),
])
def test_a_rule_that_cannot_be_asked_is_refused(rule, mode, said):
    with pytest.raises(ValueError, match=said):
        match_rule(rule, [screen("A", "B")], [tap(1, 1)], mode=mode)


def test_an_xpath_that_is_never_reached_need_not_compile():
    rule = Rule(((has("A"),), ("//*[",)))
    assert match_rule(rule, [screen("A")], [END]).matched
    with pytest.raises(ValueError, match="does not compile"):
        match_rule(rule, [screen("B")], [END])


# ---- the language ----

@many
@given(st.lists(st.lists(st.text(alphabet="/*[]@ab=\" ", min_size=1).filter(str.strip), min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_written_is_read_back(alternatives):
    assert parse_rule(written(alternatives)) == Rule(tuple(map(tuple, alternatives)))


def test_the_text_around_the_quotes_is_not_read():
    odd = """{"xpath": ['''//a''' and '''//b''' ]}   ###{"xpath": [ ''' //c ''' ]} """
    assert parse_rule(odd).alternatives == (("//a", "//b"), (" //c ",))
    for bad in ("", "//a", '{"xpath": []}', written([["//a"]]) + "###", "''''''", "'''  '''"):
        with pytest.raises(ValueError, match=r"alternative \d of \d has no XPath"):
            parse_rule(bad)
    with pytest.raises(ValueError, match="a rule must be a string, got None"):
        parse_rule(None)


# ---- task files ----

HEADER = ["task_identifier", "task_app", "task_app_CHN", "adb_home_page", "goal", "golden_steps", "key_nodes"]


SETTINGS = has("设置")


def line(name, xpath=SETTINGS, steps="4"):
    return [name, "shop", "商店", "shop/.Main", "打开设置", steps, written([[xpath]])]


def save(path, rows, encoding="utf-8-sig", header=HEADER):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    path.write_bytes(text.getvalue().encode(encoding))
    return path


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "MobileBench-OL - top12.csv",
         [[*line("shop_0"), "搜索", "easy", ""], [""] * 10, [*line("shop_1", '//*[contains(@text, "a")'), "设置", "hard", "note"]],
         header=[*HEADER, "功能点", "level（easy步数少<5步，是APP的基础操作）", ""])
    save(tmp_path / "top12-reset.csv", [[*line("shop_0", "//*["), "清空", written([[has("空")]])]],
         header=[*HEADER, "reset_query", "reset_xpath"])
    save(tmp_path / "longtail.csv", [[*line("map_0"), "我的", "medium"]],
         header=[*HEADER, "functional_point", "difficulty_level"])
    save(tmp_path / "MobileBench-OL - Long-Horizon.csv", [[*line("shop_long_0", steps="22"), "long-horizon", "", ""]],
         header=[*HEADER, "level（easy）", "", ""])
    save(tmp_path / "MobileBench-OL - Explo_already.csv",
         [[*line("shop_0"), "1", "2", "1", "", "H", "hard"], [*line("shop_1"), "", "1", "", "1", "E", "easy"]],
         header=[*HEADER, "Icon", "HiddenFunction", "Hierarchical", "weight", "explo_level", "level"])
    return tmp_path


def test_the_published_folder_gives_five_subsets(folder):
    tasks = load_tasks(folder, on_error="collect")
    assert [(t.subset, t.identifier, t.level, t.function, t.golden_steps, t.weight) for t in tasks] == [
        ("base", "shop_0", "easy", "搜索", 4, None), ("base", "shop_1", "hard", "设置", 4, None),
        ("long-tail", "map_0", "medium", "我的", 4, None), ("long-horizon", "shop_long_0", "long-horizon", "", 22, None),
        ("gui-reasoning", "shop_0", "H", "", 4, 4.5), ("gui-reasoning", "shop_1", "E", "", 4, 1.0),
        ("noise-robust", "shop_0", "easy", "搜索", 4, None), ("noise-robust", "shop_1", "hard", "设置", 4, None)]
    assert tasks[0] == MobileTask("shop_0", "shop", "商店", "打开设置", "shop/.Main", 4, Rule(((has("设置"),),)),
                                  Rule(((has("空"),),)), "清空", "base", "easy", "搜索")
    assert load_tasks(folder, "noise-robust", on_error="collect") == tasks[-2:]
    assert load_tasks(folder, subset="long-tail") == [tasks[2]]


def test_a_bad_xpath_keeps_its_rule_and_is_reported_with_its_place(folder):
    bad = load_tasks(folder, on_error="collect")[1]
    assert bad.rule == Rule((('//*[contains(@text, "a")',),))
    said = "MobileBench-OL - top12.csv, row 4 (shop_1), column 'key_nodes': XPath does not compile"
    assert len(bad.rule_errors) == 1 and bad.rule_errors[0].startswith(said)
    for path in (folder, folder / "MobileBench-OL - top12.csv"):
        with pytest.raises(ValueError, match=r"row 4 \(shop_1\), column 'key_nodes': XPath does not compile"):
            load_tasks(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "gb18030"])
def test_encodings_of_the_published_files_are_read(tmp_path, encoding):
    task, = load_tasks(save(tmp_path / "top12.csv", [line("shop_0")], encoding))
    assert (task.app_zh, task.goal, task.subset, task.rule_errors) == ("商店", "打开设置", "base", [])
    assert load_tasks(save(tmp_path / "mine.csv", [line("shop_0")], encoding), subset="long-tail")[0].subset == "long-tail"


@pytest.mark.parametrize(("row", "said"), [
    (line("a_0", steps="four"), r"x.csv, row 2 \(a_0\), column 'golden_steps': must be a whole number from 1 on, got 'four'"),
    (line("a_0", steps="0"), "column 'golden_steps': .*got '0'"),
    (line("a_0", steps="2.5"), "column 'golden_steps': .*got '2.5'"),
    (line("a_0", steps="inf"), "column 'golden_steps': .*got 'inf'"),
    (line("a_0", steps=""), "column 'golden_steps': .*got ''"),
    (line(" "), "column 'task_identifier': must not be empty"),
    ([*line("a_0")[:-1], '{"xpath": []}'], r"\(a_0\), column 'key_nodes': alternative 1 of 1 has no XPath"),
    ([*line("a_0")[:-1], ""], "alternative 1 of 1 has no XPath: ''"),
    (line("a_0")[:3], r"row 2 \(a_0\), column 'key_nodes': alternative 1 of 1 has no XPath: ''"),
])
def test_bad_rows_are_named_or_collected(tmp_path, row, said):
    path = save(tmp_path / "x.csv", [row, line("b_0")])
    bad, good = load_tasks(path, on_error="collect")
    assert bad.rule_errors and not good.rule_errors
    with pytest.raises(ValueError, match=said):
        load_tasks(path)


def test_a_rule_keeps_its_good_alternatives_when_errors_are_collected(tmp_path):
    path = save(tmp_path / "x.csv", [[*line("a_0")[:-1], written([["//a"]]) + "###{}"]])
    task, = load_tasks(path, on_error="collect")
    assert task.rule == Rule((("//a",),)) and "alternative 2 of 2 has no XPath" in task.rule_errors[0]


def test_a_bad_reset_rule_is_reported_from_the_reset_file(folder):
    save(folder / "longtail-reset.csv", [[*line("map_0"), "重置", "'''//*['''"]], header=[*HEADER, "reset_query", "reset_xpath"])
    with pytest.raises(ValueError, match=r"longtail-reset.csv, row 2 \(map_0\), column 'reset_xpath': XPath does not compile"):
        load_tasks(folder, "long-tail")


def test_files_and_arguments_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.csv, row 1: column 'goal' is missing, the header is \['task_identifier'"):
        load_tasks(save(tmp_path / "x.csv", [], header=[name for name in HEADER if name != "goal"]))
    (tmp_path / "odd.csv").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match="odd.csv is neither UTF-8 nor GB18030: byte 0xff at 0"):
        load_tasks(tmp_path / "odd.csv")
    (tmp_path / "none.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="none.csv, row 1: column 'task_identifier' is missing"):
        load_tasks(tmp_path / "none.csv")
    long = "x" * (csv.field_size_limit() + 1)
    with pytest.raises(ValueError, match="long.csv, line 2: field larger than field limit"):
        load_tasks(save(tmp_path / "long.csv", [line(long)]))
    with pytest.raises(ValueError, match="subset must be one of base, .*got 'all'"):
        load_tasks(tmp_path, subset="all")
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'collect', got 'skip'"):
        load_tasks(tmp_path, on_error="skip")
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(FileNotFoundError):
            load_tasks(path)


# ---- metrics ----

def test_each_pair_of_answers_has_its_category():
    assert [classify(m, e) for m, e in itertools.product((True, False), repeat=2)] == ["SR", "Overdue", "Premature", "HardFail"]
    assert classify(np.True_, np.False_) == "Overdue"
    for pair in ((1, True), (True, None)):
        with pytest.raises(ValueError, match="must be True or False, got"):
            classify(*pair)


episodes = st.fixed_dictionaries({
    "matched": st.booleans(), "finished": st.booleans(), "n_actions": st.integers(0, 60), "golden_steps": st.integers(1, 31),
    "ratio": st.floats(0, 1), "level": st.sampled_from(["easy", "hard"])}, optional={"app": st.sampled_from(["a", "b", ""])})


@many
@given(st.lists(episodes, min_size=1, max_size=30))
def test_the_summary_equals_plain_counting(rows):
    before = [dict(row) for row in rows]
    found, n = summarize(rows), len(rows)
    solved = [row for row in rows if row["matched"] and row["finished"]]
    assert rows == before
    assert found["SR"] == len(solved) / n and found["matched"] == sum(row["matched"] for row in rows) / n
    assert math.isclose(found["SR"] + found["Overdue"] + found["Premature"] + found["HardFail"], 1)
    assert math.isclose(found["step_ratio_all"], sum(r["n_actions"] + 2 for r in rows) / sum(r["golden_steps"] for r in rows))
    part = sum(r["n_actions"] + 2 for r in solved) / sum(r["golden_steps"] for r in solved) if solved else 0
    assert math.isclose(found["step_ratio_success"], part)
    assert math.isclose(found["sub_ratio"], np.mean([row["ratio"] for row in rows]), abs_tol=1e-12)
    for level, share in found["by_level"].items():
        group = [row in solved for row in rows if row["level"] == level]
        assert share == sum(group) / len(group)
    assert set(found["by_app"]) == {row["app"] for row in rows if row.get("app")} and found["by_function"] == {}
    assert found["ci"]["SR"] == wilson(len(solved), n) and set(found["ci"]) == {"SR", "Overdue", "Premature", "HardFail", "matched"}


@pytest.mark.parametrize(("change", "said"), [
    ({"ratio": 1.5}, r"row 1: ratio must be a finite number in \[0, 1\], got 1.5"),
    ({"ratio": math.nan}, "row 1: ratio must be .*got nan"),
    ({"golden_steps": 0}, r"row 1: golden_steps must be a finite number in \[1, inf\], got 0"),
    ({"n_actions": -1}, "row 1: n_actions must be .*got -1"),
    ({"n_actions": math.inf}, "row 1: n_actions must be .*got inf"),
    ({"n_actions": "3"}, "row 1: n_actions must be .*got '3'"),
    ({"n_actions": 10**400}, "row 1: n_actions must be .*got 1000"),
    ({"matched": 1}, "row 1: matched must be True or False, got 1"),
    ({"finished": None}, "row 1: finished must be True or False, got None"),
])
def test_rows_out_of_range_are_refused(change, said):
    good = {"matched": True, "finished": True, "n_actions": 3, "golden_steps": 3, "ratio": 1.0, "level": "easy"}
    with pytest.raises(ValueError, match=said):
        summarize([good, good | change])


def test_a_summary_needs_rows_with_all_columns():
    with pytest.raises(ValueError, match="rows must hold at least one episode, got 0"):
        summarize([])
    with pytest.raises(ValueError, match="row 0: 'n_actions' is missing, the row has"):
        summarize([{"matched": True, "finished": True}])
    with pytest.raises(ValueError, match="row 0 must be a mapping, got 'SR'"):
        summarize(["SR"])
