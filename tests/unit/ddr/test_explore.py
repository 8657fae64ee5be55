"""The explorer: its tests equal scipy's, what it says is there, what is not there it does not say."""
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from collai.ddr import explore
from collai.ddr.checklist import Claim, build_checklist, verdict
from collai.ddr.explore import BlindAgent, RandomExplorer, StatExplorer, bh_reject, claim_pvalue, detection_power
from collai.ddr.sandbox import Budget, Env, SqlError
from collai.ddr.worlds import World, make_world

ROWS = 10_000
KINDS = ("trend", "seasonality", "level_shift", "group_difference", "correlation", "interaction", "anomaly_day",
         "missing_not_at_random", "orphan_keys", "lag", "top_share")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small shop with strong plants."""
    return make_world("retail", 3, ROWS, 2.0, KINDS, path=str(tmp_path_factory.mktemp("shop") / "shop.duckdb"))


@pytest.fixture
def env(shop: World) -> Iterator[Env]:
    """Its environment."""
    with Env(shop.db_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def told(shop: World) -> Any:
    """What the explorer finds there."""
    with Env(shop.db_path) as opened:
        return StatExplorer().run(opened)


def test_strong_plants_are_found_and_little_else(shop: World, told: Any) -> None:
    items = build_checklist(shop).items
    right = [verdict(told.claims, item) for item in items].count("CORRECT")
    assert right >= len(items) - 1 and len(told.claims) <= 1.5 * len(items)
    assert told.stop_reason == "finish" and told.report.startswith("FINISH: ") and told.world == shop.digest


def test_a_turn_runs_the_evidence_and_states_its_value(told: Any) -> None:
    for turn in told.turns:
        assert turn.tool == "execute_query" and turn.args["query"] == turn.claims[0].evidence_sql
        assert turn.result["data"][0][0] == pytest.approx(turn.claims[0].value, rel=1e-9)
        assert turn.insight == " ".join(c.text for c in turn.claims)


def test_sentences_give_the_claims_back(shop: World, told: Any) -> None:
    for said in told.claims:
        parsed, = Claim.parse(said.text, shop.schema)
        for name in ("kind", "metric", "by", "segment", "other", "direction", "period"):
            assert getattr(parsed, name) == getattr(said, name) or (name == "period" and said.kind not in (
                "level_shift", "anomaly_day", "seasonality"))


def test_the_same_database_gives_the_same_claims_in_the_same_order(env: Env, told: Any) -> None:
    assert StatExplorer(seed=7).run(env).claims == told.claims


def test_the_budget_ends_the_report(shop: World, told: Any) -> None:
    with Env(shop.db_path, budget=Budget(turns=2)) as opened:
        short = StatExplorer().run(opened)
    assert short.stop_reason == "budget" and short.claims == [c for turn in told.turns[:2] for c in turn.claims]


def test_confidence_is_one_less_the_adjusted_p_value(told: Any) -> None:
    assert all(0.95 <= c.confidence <= 1 for c in told.claims)


def test_no_claim_needs_more_evidence_under_any_dependence(env: Env, told: Any) -> None:
    assert len(StatExplorer(method="by").run(env).claims) <= len(told.claims)


def test_without_explaining_away_one_fact_is_told_many_times(shop: World, told: Any) -> None:
    with Env(shop.db_path, budget=Budget(turns=1000)) as opened:
        raw = StatExplorer(explain_away=False, max_claims=3 * len(told.claims)).run(opened)
    assert len(raw.claims) >= 3 * len(told.claims) - 1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_world_without_plants_gives_next_to_nothing(seed: int, tmp_path: Path) -> None:
    world = make_world("retail", seed, ROWS, 1.0, [], path=str(tmp_path / "null.duckdb"))
    with Env(world.db_path) as opened:
        assert len(StatExplorer().run(opened).claims) == 0


def test_claims_hold_on_the_data_and_their_opposites_do_not(shop: World, env: Env, told: Any) -> None:
    for said in told.claims:
        assert claim_pvalue(said, env.fetch, shop.schema) < 0.01, said.text
        assert claim_pvalue(replace(said, direction=0), env.fetch, shop.schema) == 1.0
        if said.direction and said.kind not in ("anomaly_day", "missing_not_at_random"):
            other = replace(said, direction=-said.direction, value=said.value if said.kind == "lag" else None)
            assert claim_pvalue(other, env.fetch, shop.schema) > 0.5, said.text


def test_an_unknown_column_is_named(shop: World, env: Env) -> None:
    with pytest.raises(ValueError, match=r"unknown metric column 'orders\.amuont'"):
        claim_pvalue(Claim("trend", "orders.amuont", direction=1), env.fetch, shop.schema)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"q": 0.0}, r"q must be in \(0, 1\), got 0\.0"), ({"method": "holm"}, r"method must be 'bh' or 'by', got 'holm'"),
    ({"max_claims": 0}, r"max_claims must be >= 1, got 0")])
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StatExplorer(**wrong)


def test_the_other_edges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seed must be >= 0, got -1"):
        RandomExplorer(-1)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 1\.5"):
        detection_power(0.1, 10.0, 1.5)
    with pytest.raises(ValueError, match=r"n must not be negative, got -1"):
        detection_power(0.1, -1.0, 0.5)
    with pytest.raises(ValueError, match=r"device must be 'cpu' and worlds >= 2, got 'cuda' and 20"):
        explore.measure("cuda")


def test_the_random_control_repeats_itself_and_asks_no_more_than_it_may(shop: World) -> None:
    runs = []
    for _ in range(2):
        with Env(shop.db_path, budget=Budget(turns=8)) as opened:
            runs.append(RandomExplorer(5).run(opened))
    assert runs[0].claims == runs[1].claims and len(runs[0].turns) == 8 and 0 < len(runs[0].claims) <= 4
    items = build_checklist(shop).items
    assert [verdict(runs[0].claims, item) for item in items].count("CORRECT") <= 0.35 * len(items)


def test_the_blind_control_runs_no_query(shop: World, env: Env) -> None:
    said = BlindAgent().run(env)
    assert env.left() == env.budget.turns and said.claims and len(said.claims) <= 100
    assert all(c.value is None for c in said.claims)


def claims_of(world: World) -> list[Claim]:
    """What the checklist of a world asks for, and of another one with the opposite signs."""
    mine = [item.claim for item in build_checklist(world).items]
    return [*mine, *mine, *(replace(c, direction=-c.direction) for c in mine if c.direction)]


def score(claims: Any, checklist: Any) -> float:
    return float(np.mean([verdict(claims, item) == "CORRECT" for item in checklist.items]))


@pytest.fixture(autouse=True, scope="module")
def few_draws() -> Iterator[None]:
    """The blind agent learns from some twenty other worlds, which takes less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "_OTHERS", 20)
        explore._planted.cache_clear()
        yield
    explore._planted.cache_clear()


def test_what_is_seen_elsewhere_is_worth_more_than_the_schema_alone() -> None:
    worth: dict[str, list[float]] = {"schema": [], "elsewhere": []}
    for seed in (30, 31, 32, 33):
        world = make_world("retail", seed=seed, rows=1000)
        with Env(world.db_path, tools=()) as env:
            for name, agent in (("schema", BlindAgent(())), ("elsewhere", BlindAgent(claims_of(world)))):
                found = agent.run(env)
                assert len(found.claims) <= 100 and not any(t.tool for t in found.turns) and found.world == world.digest
                worth[name].append(score(found.claims, build_checklist(world)))
    assert min(worth["elsewhere"]) > 0.7 > 0.3 > np.mean(worth["schema"]) > 0.02


def test_guesses_never_contradict_each_other_and_know_only_the_schema(shop: World) -> None:
    for agent in (BlindAgent(()), BlindAgent((), sign=-1)):
        with Env(shop.db_path, tools=()) as env:
            claims = agent.run(env).claims
        assert len({explore._subject(c) for c in claims}) == len(claims) == 100
        assert all(explore._fits(c, shop.schema) and c.value is None for c in claims)
    assert all(c.direction == -1 for c in claims if c.kind in explore._TWO_SIGNS)


def test_what_was_seen_elsewhere_comes_first(shop: World) -> None:
    seen = [Claim("trend", "orders.amount", direction=-1)] * 3 + [Claim("trend", "orders.amount", direction=1, value=3.0),
            Claim("trend", "orders.nothing", direction=1), Claim("group_difference", "orders.amount", "stores.region", "mars", direction=1)]
    with Env(shop.db_path, tools=()) as env:
        first, *others = BlindAgent(seen).run(env).claims
        asked = BlindAgent(seen, ["How does amount develop over the years?"]).run(env).claims
    assert explore._subject(first)[:2] == ("trend", "orders.amount") and first.direction == -1 and len(others) == 99
    assert [(c.metric, c.by, c.direction) for c in asked] == [("orders.amount", None, -1)]
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 2"):
        BlindAgent(sign=2)


def test_a_database_without_anything_to_guess(tmp_path: Path) -> None:
    with duckdb.connect(str(tmp_path / "x.duckdb")) as db:
        db.execute("CREATE TABLE t AS SELECT 'a' AS name")
    with Env(tmp_path / "x.duckdb", tools=()) as env:
        assert BlindAgent().run(env).claims == []


def test_tables_without_dates_or_keys_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "plain.duckdb"
    with duckdb.connect(str(path)) as db:
        db.execute("CREATE TABLE plain AS SELECT i, sin(i * 12.9898) * 43758.5453 % 1 + (i % 3 = 0)::INT * 0.5 AS y, "
                   "['a', 'b', 'c'][i % 3 + 1] AS g FROM range(600) AS t(i)")
        db.execute("CREATE TABLE empty_one (x DOUBLE, g VARCHAR)")
    with Env(str(path)) as opened:
        found = StatExplorer().run(opened)
    first = next(c for c in found.claims if c.kind == "group_difference" and c.metric == "plain.y")
    assert (first.by, first.segment, first.direction) == ("plain.g", "a", 1)


@settings(max_examples=60)
@given(st.lists(st.floats(-50, 50), min_size=6, max_size=40), st.lists(st.floats(-50, 50), min_size=6, max_size=40))
def test_sums_give_welchs_test(a: list[float], b: list[float]) -> None:
    x, y = np.array(a) + 1e-3 * np.arange(len(a)), np.array(b) + 1e-3 * np.arange(len(b))
    sums = [np.array([f(x), f(y)], float) for f in (len, np.sum, lambda v: (v**2).sum())]
    log_p, t = explore._welch(*sums, np.array([1.0, 0.0]))
    peer = stats.ttest_ind(x, y, equal_var=False)
    assert t[0] == pytest.approx(peer.statistic, rel=1e-5, abs=1e-7)
    assert np.exp(log_p[0]) == pytest.approx(peer.pvalue, rel=1e-4, abs=1e-9)


@given(st.floats(0, 80), st.floats(3, 1e6))
def test_log_p_values_are_the_peers_and_never_minus_infinity(t: float, df: float) -> None:
    log_p = float(explore._log_t(t, df))
    exact = stats.t.logsf(t, df) + np.log(2)
    assert np.isfinite(log_p) and (not exact > -600 or log_p == pytest.approx(exact, rel=2e-3, abs=1e-9))


@pytest.mark.parametrize("t", [38.0, 60.0, 500.0])
def test_log_p_values_go_on_below_the_smallest_float(t: float) -> None:
    assert float(explore._log_t(t, 1e9)) == pytest.approx(stats.norm.logsf(t) + np.log(2), rel=1e-3)


@given(st.floats(0.01, 0.5), st.floats(10, 1e5), st.floats(1e-8, 0.2))
def test_power_grows_with_rows_and_effect(delta: float, n: float, alpha: float) -> None:
    power = detection_power(delta, n, alpha)
    assert alpha * 0.999 <= power <= 1 and detection_power(delta * 1.1, n, alpha) >= power - 1e-12
    assert detection_power(delta, n * 1.1, alpha) >= power - 1e-12


@given(st.lists(st.integers(0, 9), min_size=20, max_size=60), st.integers(0, 2**32 - 1))
def test_the_best_jump_is_the_best_of_all(sizes: list[int], seed: int) -> None:
    n = np.array(sizes, float) + 1
    s = np.random.default_rng(seed).normal(size=len(n)) * n
    at, gain = explore._jump(n, s)
    N, S = n.sum(), s.sum()
    every = [(s[:i + 1].sum() - n[:i + 1].sum() * S / N) ** 2 * N / (n[:i + 1].sum() * (N - n[:i + 1].sum()))
             for i in range(len(n) - 1) if 0.1 * N <= n[:i + 1].sum() <= 0.9 * N]
    assert not every or (gain == pytest.approx(max(every), rel=1e-9) and 0 <= at < len(n) - 1)


def test_least_squares_from_sums_are_scipys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    y = 2 + 0.3 * x + rng.normal(size=300)
    with duckdb.connect() as db:
        db.execute("CREATE TABLE t (x DOUBLE, y DOUBLE)")
        db.executemany("INSERT INTO t VALUES (?, ?)", np.stack([x, y], 1).tolist())
        beta, t, df, _ = explore._ols(lambda sql: db.execute(sql).fetchnumpy(), "t", "TRUE", "y", ["x"])
    line = stats.linregress(x, y)
    assert beta[1] == pytest.approx(line.slope) and t[1] == pytest.approx(line.slope / line.stderr) and df == 298


def test_benjamini_and_hochberg_come_from_eval() -> None:
    from collai.eval import stats as shared
    assert bh_reject is shared.bh_reject


def _days_of(counts: np.ndarray) -> Any:
    """An engine whose only answer is rows a day."""
    return lambda sql: {"t": np.arange(len(counts)), "n": counts}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(30, 700), st.floats(0.1, 0.9), st.integers(5, 80))
def test_steady_days_do_not_stand_out_and_a_surplus_does(seed: int, days: int, share: float, rows: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.binomial(round(rows / share), share, days).astype(float)
    block, = explore._days(_days_of(counts), "t", "d", 10**6)
    assert block.log_p.min() > np.log(1e-6)
    sd = np.sqrt(max(rows * (1 - share), 0.1 * rows))
    counts[days // 2] += 14 * sd + 5
    block, = explore._days(_days_of(np.round(counts)), "t", "d", 10**6)
    assert block.log_p.argmin() == days // 2 and block.log_p.min() < np.log(1e-3)
    found = block.make(days // 2)
    assert found.kind == "anomaly_day" and found.dates == days


def test_counts_that_scatter_less_than_poissons_are_seen_as_such() -> None:
    rng = np.random.default_rng(1)
    for law, ratio in ((rng.poisson(36.0, 2000), 1.0), (rng.binomial(48, 0.75, 2000), 0.25), (np.full(2000, 9), 0.1)):
        scatter = explore._scatter_of_days(law.astype(float), np.full(2000, np.median(law).astype(float)))
        assert ratio * 0.95 <= scatter <= ratio * 1.25


def test_an_ordinary_day_is_not_confirmed(shop: World, env: Env, told: Any) -> None:
    day = next(c for c in told.claims if c.kind == "anomaly_day")
    assert claim_pvalue(day, env.fetch, shop.schema) < 1e-6
    p = [claim_pvalue(replace(day, period=f"2022-03-{d:02d}"), env.fetch, shop.schema) for d in range(1, 29)]
    assert min(p) > 1e-4 and np.median(p) > 0.2


def test_repeats_that_chance_makes_are_no_finding() -> None:
    assert explore._exact("duplicate_rows", "t.k", None, 1.0, 1000.0, 0.5).log_p[0] > np.log(0.3)
    assert explore._exact("duplicate_rows", "t.k", None, 40.0, 1000.0, 0.5).log_p[0] < np.log(1e-9)
    assert explore._exact("orphan_keys", "t.k", "p.k", 1.0, 1000.0).log_p[0] == -700.0


def test_a_question_narrows_the_search_to_what_it_names(shop: World, env: Env) -> None:
    items = [item for item in build_checklist(shop).items if item.claim.kind in ("trend", "lag", "anomaly_day")]
    for item in items:
        said, asked = StatExplorer().run(env.ask(item.question)).claims, explore._asked(item.question, shop.schema)
        assert asked is not None and 1 <= len(said) <= 4 and verdict(said, item) == "CORRECT", item.question
        for claim in said:
            assert not asked.metrics or claim.metric in asked.metrics
            assert not asked.segments or claim.by in {by for by, _ in asked.segments}


@pytest.mark.parametrize(("question", "metrics", "groups", "segments", "tables"), [
    ("Do rating and price go together?", {"orders.rating", "products.price"}, set(), set(), set()),
    ("Does the rating differ by region?", {"orders.rating"}, {"stores.region"}, set(), set()),
    ("Is there a lasting drift of amount in the group with region south?", {"orders.amount"}, set(),
     {("stores.region", "south")}, set()),
    ("Is there a day with too many rows in orders?", set(), set(), set(), {"orders"})])
def test_a_question_is_read(shop: World, question: str, metrics: set[str], groups: set[str],
                            segments: set[tuple[str, str]], tables: set[str]) -> None:
    asked = explore._asked(question, shop.schema)
    assert asked == explore._Asked(*map(frozenset, (metrics, groups, segments, tables)))


def test_a_question_about_nothing_known_leaves_all_open(shop: World) -> None:
    assert explore._asked("Will it rain tomorrow?", shop.schema) is None and explore._asked(None, shop.schema) is None


@pytest.mark.parametrize("agent", [StatExplorer(), RandomExplorer(), BlindAgent()])
def test_columns_that_hold_no_numbers_and_numbers_that_are_none_stop_nobody(agent: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "own.duckdb")
    with duckdb.connect(path) as db:
        db.execute("CREATE TABLE sales AS SELECT DATE '2022-01-01' + CAST(i % 700 AS INTEGER) AS day, "
                   "CASE WHEN i % 97 = 0 THEN 'NaN'::DOUBLE ELSE random() END AS odd, INTERVAL (i) DAY AS wait, [i] AS items, "
                   "{'k': i} AS st, hash(i) % 1000 / 100 + (i % 3 = 0)::INTEGER AS price, (['a', 'b', 'c'])[1 + i % 3] AS kind "
                   "FROM range(3000) t(i)")
    with Env(path) as opened:
        if isinstance(agent, StatExplorer):
            with pytest.warns(UserWarning, match=r"sales.odd holds NaN or infinity and is left out"):
                told = agent.run(opened)
            assert [(c.kind, c.metric, c.segment) for c in told.claims] == [("group_difference", "sales.price", "a")]
        else:
            assert agent.run(opened).turns


def test_evidence_about_an_sqlite_file_is_what_its_claim_says(tmp_path: Path) -> None:
    path = str(tmp_path / "own.sqlite")
    rng = np.random.default_rng(0)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE s (id INTEGER PRIMARY KEY, day DATE, amount REAL, grp TEXT)")
        db.executemany("INSERT INTO s VALUES (?, ?, ?, ?)", [
            (i, str(np.datetime64("2021-01-01") + i % 800), float(rng.normal() + (i % 4 == 0) + i % 800 * 0.005), "abcd"[i % 4])
            for i in range(6000)])
    with Env(path, engine="sqlite") as opened:
        told = StatExplorer().run(opened)
    assert {"trend", "group_difference"} <= {c.kind for c in told.claims}
    for turn in told.turns:
        assert turn.result["data"][0][0] == pytest.approx(turn.claims[0].value)


def test_evidence_that_fails_is_told_as_such(shop: World, env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sql: str, limit: int = 20) -> Any:
        raise SqlError("stopped")

    monkeypatch.setattr(env, "query", fail)
    told = StatExplorer(max_claims=3).run(env)
    assert [turn.result for turn in told.turns] == [{"error": "stopped"}] * len(told.turns) and told.claims
