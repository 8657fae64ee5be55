"""Claims, their true values, the grammar and the matcher: parity with plain computations, attacks, and what is refused."""
import inspect
import json
import math
import os
from dataclasses import asdict, replace
from datetime import date, timedelta

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.ddr import checklist as module
from collai.ddr.checklist import (
    Checklist,
    ChecklistItem,
    Claim,
    LeakError,
    build_checklist,
    date_column,
    match,
    truth_sql,
    verdict,
)
from collai.ddr.worlds import KINDS, Plant, Schema, make_world

quick = settings(max_examples=60, deadline=None)

TABLES = {
    "orders": {"order_id": "INTEGER", "customer_id": "INTEGER", "store_id": "INTEGER", "product_id": "INTEGER", "date": "DATE",
               "amount": "DOUBLE", "discount": "DOUBLE", "rating": "DOUBLE", "returned": "INTEGER", "channel": "VARCHAR",
               "ship_days": "DOUBLE"},
    "customers": {"customer_id": "INTEGER", "signup": "VARCHAR", "segment": "VARCHAR"},
    "stores": {"store_id": "INTEGER", "region": "VARCHAR", "format": "VARCHAR", "zone": "VARCHAR"},
    "products": {"product_id": "INTEGER", "category": "VARCHAR", "price": "DOUBLE"},
    "ads": {"date": "DATE", "spend": "DOUBLE"}, "web": {"date": "DATE", "sessions": "DOUBLE"}}
VALUES = {"orders.channel": ("online", "phone"), "customers.signup": ("ads", "organic", "partner", "referral"),
          "customers.segment": ("consumer", "corporate"), "stores.region": ("east", "north", "south", "west"),
          "stores.format": ("mall", "outlet", "street"), "stores.zone": ("1", "10"),
          "products.category": ("garden", "tools", "toys")}
KEYS = {"orders.customer_id": "customers.customer_id", "orders.store_id": "stores.store_id",
        "orders.product_id": "products.product_id"}
UNITS = {"orders.amount": "Value [EUR]", "orders.rating": "Rating [points]", "orders.ship_days": "Time [days]",
         "products.price": "Price [EUR]", "ads.spend": "Spent [EUR]"}
SCHEMA = Schema(TABLES, VALUES, KEYS, UNITS, {"orders": "order_id", "customers": "customer_id", "stores": "store_id",
                                              "products": "product_id", "ads": "date", "web": "date"})
WORDS = {"C": "CORRECT", "I": "INCORRECT", "N": "INSUFFICIENT"}


def fact(kind, metric, value=None, unit="", **fields):
    truth = Claim(kind, metric, value=value, unit=unit, **fields)
    return ChecklistItem(kind, "shop", "?", "!", truth, "SELECT 1", value, unit)


FACTS = {
    "T": fact("trend", "orders.amount", 36.0, "EUR", by="stores.region", segment="north", direction=1),
    "F": fact("trend", "orders.amount", -36.0, "EUR", by="stores.region", segment="south", direction=-1),
    "S": fact("seasonality", "orders.rating", 1.2, "points", period="12"),
    "L": fact("level_shift", "orders.discount", -0.03, by="stores.region", segment="south", direction=-1, period="2023-05-01"),
    "G": fact("group_difference", "orders.rating", 0.15, "points", by="orders.channel", segment="online", direction=1),
    "C": fact("correlation", "orders.amount", 0.35, "ratio", other="products.price", direction=1),
    "I": fact("interaction", "orders.rating", 0.005, "points", other="products.price", by="stores.format", segment="mall",
              given="stores.format", direction=1),
    "P": fact("simpson", "orders.returned", 0.05, by="orders.channel", segment="online", given="customers.segment", direction=1),
    "A": fact("anomaly_day", "orders.date", 60.0, "count", direction=1, period="2023-04-07"),
    "M": fact("missing_not_at_random", "orders.rating", 0.25, "ratio", by="stores.format", segment="mall", direction=1),
    "O": fact("orphan_keys", "orders.store_id", 0.02, "ratio", other="stores.store_id"),
    "K": fact("lag", "web.sessions", 4.0, "days", other="ads.spend", direction=1),
    "H": fact("top_share", "orders.amount", 0.38, "ratio", by="products.category", segment="toys"),
    "V": fact("variance_change", "orders.amount", 1.5, "ratio", by="stores.region", segment="east", direction=1),
    "D": fact("dose_threshold", "orders.rating", 0.2, other="orders.discount", direction=-1),
    "U": fact("duplicate_rows", "orders.order_id", 0.01, "ratio"),
    "Z": fact("trend", "orders.amount", 36.0, "EUR", by="stores.zone", segment="10", direction=1),
}

# the fact, the verdict that a sentence deserves (C right, I wrong, N open), the sentence
ATTACKS = """
T C Amount in the north region rose by about 36 over the three years.
T C From 2021 to 2023 orders' amount climbed from 100 to 136 EUR in the north.
S C Ratings peak in January each year.
L C In the south, discounts fell by 0.03 from 2023-05-01 on.
L C Before 1 June 2023 the discounts in the south were 3 % higher.
G C Online orders have ratings 0.15 points above the rest.
C C The higher the price, the higher the amount.
C C Price rises with amount (r = 0.34, p < 0.001).
I C Only in malls does the rating rise with the price.
P C Overall online orders are returned less often, but the sign reverses within every customer segment.
A C On April 7, 2023 there were 160 orders instead of the usual 100.
M C The share of missing ratings in the mall stores is 25 %.
O C 2 % of orders refer to a store that does not exist in stores.
K C Web sessions follow ad spend with a delay of 4 days.
H C Toys account for 0.38 of the total amount.
V C Amount in the east is 50 % more variable than elsewhere.
D C Once the discount exceeds 0.2, ratings fall.
U C 1 % of orders are duplicates.
T C The amount in the north did not fall but rose.
T I The amount in the north did not rise.
T C It is not true that the amount in the north fell over the years.
T I Amount never rose in the north; it fell.
T C Amount in the north rose, not fell.
G C Ratings of the online channel aren't lower than the rest.
G I There is no difference in ratings between the online channel and the rest.
S I There is no seasonality in ratings.
C I The amount does not depend on the price.
O I No order has an orphaned store id.
U I There are no duplicate orders.
K I Web sessions do not follow ad spend.
M I Ratings are not missing more often in the mall stores.
T I Amount in the north declined by 36.
T N Amount in the north changed over the years.
T N Amount in the north may have risen by 36.
T N Amount in the north rises or falls.
T N Either the amount in the north rose, or it stayed flat.
T N Did the amount in the north rise by 36?
T N If prices fell, the amount in the north rose.
T I Amount in the north rose. Amount in the north fell.
C I Amount falls as price rises.
D I Ratings are higher above a discount of 0.2.
P I Within every customer segment, online orders have lower returns.
T I Amount in the north rose by 45.
T I Amount in the north rose 5 %.
T I Amount in the north rose by 36 percentage points.
T C Amount in the north rose by 0.036k.
T N Amount in the north rose by more than 30.
T N Amount in the north rose by 30 to 40.
L I In the south, discounts fell by 3 percentage points from 2023-05-01 on.
L C In the south, discounts fell by 3 % from 2023-05-01 on.
M I A third of the ratings is missing in mall stores.
M C A quarter of the ratings is missing in mall stores.
K I Ad spend leads web sessions by 5 days.
K I Web sessions respond to ad spend one week later.
H I Toys account for 3.8 % of the total amount.
A I On 2023-04-07 there were 160 more orders than usual.
L I In the south, discounts fell by 0.03 on 2023-07-01.
L N In the south, discounts dropped by 0.03.
S I Ratings peak in June.
A I Orders spiked on 2023-04-08.
T N Amount in the south rose by 36.
T N Amount rose by 36 everywhere except in the north.
T N Discounts in the north rose.
T N Amount in north malls rose by 36.
L N Discounts in the south fell over the three years.
K N Web sessions lead ad spend by 4 days.
I N Ratings rise with price.
P N Online orders have higher returns.
G N Ratings of the phone channel are higher.
O N 2 % of orders refer to a customer that does not exist in customers.
V N Amount in the east is higher than elsewhere.
D N Ratings fall with the discount.
Z C Amount in zone 10 rose by 36.
Z N Amount in zone 1 rose by 36.
Z N Amount in zone 100 rose by 36.
F C Amount in the south fell by 36.
F C Amount in the south did not rise but fell by 36 EUR.
F I Amount in the south stayed flat over the years.
F N The amount of the south is lower than elsewhere.
"""
CASES = [tuple(line.split(" ", 2)) for line in ATTACKS.strip().splitlines()]


def read(text):
    return Claim.parse(text, SCHEMA)


def only(text):
    found = read(text)
    assert len(found) == 1, found
    return found[0]


# --- sentences ------------------------------------------------------------------------------------------------------


def test_there_are_enough_attacks():
    assert len(CASES) >= 60 and {name for name, _, _ in CASES} == set(FACTS)


@pytest.mark.parametrize(("name", "deserved", "text"), CASES, ids=[text for _, _, text in CASES])
def test_every_attack_gets_the_verdict_it_deserves(name, deserved, text):
    assert verdict(read(text), FACTS[name]) == WORDS[deserved], [match(c, FACTS[name]) for c in read(text)]


@pytest.mark.parametrize("text", [
    "", "NO INSIGHT", "The weather was nice.", "Amount is 36.", "Sales rose in the north.", "Amount rose in Paris.",
    "Amount rose in region 7.", "Ratings differ by channel.", "Did amount rise in the north?", "Amount may rise in the north.",
    "Ratings might be lower online.", "Perhaps ratings are lower online.", "Let's check whether ratings are lower online.",
    "I will look at the trend of amount in the north.", "Amount rises or falls in the north.", "Amount barely rose in the north.",
    "Amount in the north is higher than in the south.", "Amount rose everywhere except in the north.",
    "Ratings are lower in north malls.", "Amount rose by 30 to 40 in the north.", "Amount rose by at least 30 in the north.",
    "Amount rose by 36 or 40 in the north.", "Sessions and spend with a delay of 4 days.", "Without discounts rising, amounts fell."])
def test_what_cannot_be_read_without_a_guess_gives_nothing(text):
    assert read(text) == []


def test_values_and_units_of_sentences():
    for said, value, unit in (("by 1,200", 1200, None), ("by 1.2k", 1200, None), ("by 3M", 3e6, None), ("5 %", 5, "percent"),
                              ("by 5 percent", 5, "percent"), ("by 5 percentage points", 5, "percentage_points"),
                              ("by 5 pp", 5, "percentage_points"), ("by 36 EUR", 36, "EUR"), ("by €36", 36, "EUR"),
                              ("by $36", 36, "USD"), ("from 100 to 136", 36, None), ("by about 36.5", 36.5, None),
                              ("by 36 to 136", math.nan, None), ("to 136", None, None)):
        found = read(f"Amount in the north rose {said} over the three years.")
        assert not found if value is not None and math.isnan(value) else (found[0].value, found[0].unit) == (value, unit), said
    assert only("Amount in the south fell by 36 over time.").value == -36


def test_dates_of_sentences():
    for said in ("from 2023-05-01 on", "since 1 May 2023", "after May 1st, 2023", "since May 2023", "on 1st of May 2023"):
        found = only(f"In the south, discounts are lower {said}.")
        assert (found.kind, found.period, found.direction) == ("level_shift", "2023-05-01", -1), said
    assert only("Until 2023-05-01 discounts in the south were higher.").direction == -1
    assert only("Ratings bottom out in June each year.").period == "12"
    assert read("In the south, discounts are lower since 2023-02-30.") == []


def test_who_leads_and_what_depends():
    for text in ("Ad spend leads web sessions by 4 days.", "Sessions lag ad spend by 4 days.", "Sessions trail spend by four days.",
                 "Four days after ad spend rises, web sessions rise.", "Spend affects sessions with a delay of 4 days.",
                 "Spend goes up and sessions respond to spend 4 days later.", "Sessions follow what was spent: spend 4 days earlier."):
        found = [c for c in read(text) if c.kind == "lag"]
        assert [(c.metric, c.other, c.value, c.direction) for c in found] == [("web.sessions", "ads.spend", 4, 1)], text
    assert only("Sessions lead spend by 4 days.").metric == "ads.spend"
    assert only("The effect of price on amount exists only in malls.").other == "products.price"
    assert only("Above a discount of 0.2 ratings fall.").metric == only("Ratings fall above a discount of 0.2.").metric == "orders.rating"


def test_statements_about_the_same_thing_merge():
    found = only("Amount in the north rose over the years. It was 36 EUR. The rise ended late.")
    assert (found.direction, found.value, found.unit) == (1, 36, "EUR")
    assert only("Amount in the north did not fall. Amount in the north rose by 36.").value == 36
    both = read("Amount in the north rose. Amount in the north fell.")
    assert [c.direction for c in both] == [1, -1]
    assert [(c.segment, c.direction) for c in read("Amount rose in the north and fell in the south.")] == [("north", 1), ("south", -1)]
    assert [c.metric for c in read("Ratings and amounts rose in the north.")] == ["orders.rating", "orders.amount"]


@quick
@given(st.text(max_size=60) | st.lists(st.sampled_from(
    "amount rating north mall price not fell rose by 36 % . , since 2023-05-01 may or in the r = -0.3 sessions spend days 4 from to "
    "threshold above each segment null between and 1 10 zone".split()), max_size=14).map(" ".join))
def test_no_text_breaks_the_parser(text):
    for found in read(text):
        assert isinstance(found, Claim) and "." in found.metric


def test_parse_wants_text():
    with pytest.raises(TypeError, match="text must be a string, got int"):
        inspect.unwrap(Claim.parse)(3, SCHEMA)


# --- claims and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "text"), [
    ({"kind": "trends"}, "unknown kind 'trends'; nearest: trend"), ({"metric": ""}, "a trend needs a metric, got ''"),
    ({"direction": 2}, "direction must be -1, 0, 1 or None, got 2"), ({"direction": True}, "direction must be .* got True"),
    ({"value": math.nan}, "value must be finite, got nan"), ({"value": -math.inf}, "value must be finite, got -inf"),
    ({"confidence": 1.5}, r"confidence must be in \[0, 1\], got 1.5"), ({"period": "13"}, "period must be .* got '13'"),
    ({"period": "May"}, "period must be .* got 'May'"), ({"period": "2023-02-01/2023-01-01"}, "period must be")])
def test_malformed_claims_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Claim(**({"kind": "trend", "metric": "orders.amount"} | fields))


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A world with one plant of each kind but simpson, which the default world has."""
    folder = tmp_path_factory.mktemp("worlds")
    kinds = [k for k in KINDS if k != "simpson"]
    return make_world("retail", seed=1, rows=3000, plants=kinds, path=str(folder / "a.duckdb")), \
        make_world("retail", seed=0, rows=20_000, plants=["simpson", "lag"], path=str(folder / "b.duckdb"))


@pytest.fixture(scope="module")
def frames(every):
    with duckdb.connect(every[0].db_path, read_only=True) as db:
        joined = db.execute("SELECT * FROM orders LEFT JOIN stores USING (store_id) LEFT JOIN products USING (product_id) "
                            "LEFT JOIN customers USING (customer_id)").df()
        return joined, db.execute("SELECT * FROM orders").df()


def value_of(world, claim):
    with duckdb.connect(world.db_path, read_only=True) as db:
        return db.execute(truth_sql(claim, world.schema)).fetchone()[0]


def test_true_values_equal_plain_pandas(every, frames):
    world, (j, orders) = every[0], frames
    north, day = j["region"] == "north", (j["date"] - j["date"].min()).dt.days
    known = j["region"].notna()
    kept = north & j["rating"].notna()
    line = np.polyfit(day[kept], j["rating"][kept], 1)[0] * (day[kept].max() - day[kept].min())
    angle = 2 * np.pi * (j["date"].dt.day_of_year - 0.5) / 365.25
    waves = np.linalg.lstsq(np.stack([np.ones(len(j)), np.cos(angle), np.sin(angle)], 1), j["amount"], rcond=None)[0]
    late = j["date"] >= "2022-06-01"
    at = {"by": "stores.region", "segment": "north"}
    counts = orders.groupby("date").size()
    deltas = [(g["amount"][g["region"] == "north"].mean() - g["amount"][g["region"] != "north"].mean(), len(g))
              for _, g in j[known & j["category"].notna()].groupby("category")]
    pair = j[["amount", "price"]].dropna()
    expected = [
        (Claim("trend", "orders.rating", **at), line), (Claim("seasonality", "orders.amount"), np.hypot(waves[1], waves[2])),
        (Claim("level_shift", "orders.amount", **at, period="2022-06-01"),
         j["amount"][north & late].mean() - j["amount"][north & ~late].mean()),
        (Claim("group_difference", "orders.rating", **at), j["rating"][north].mean() - j["rating"][known & ~north].mean()),
        (Claim("correlation", "orders.amount", other="products.price"), pair.corr().iloc[0, 1]),
        (Claim("interaction", "orders.amount", other="products.price", **at),
         np.polyfit(*j[north][["price", "amount"]].dropna().to_numpy().T, 1)[0]),
        (Claim("simpson", "orders.amount", **at, given="products.category"), np.average(*np.transpose(deltas).tolist()[:1],
                                                                                     weights=[n for _, n in deltas])),
        (Claim("anomaly_day", "orders.date", period="2022-06-01"), counts["2022-06-01"] - counts.median()),
        (Claim("missing_not_at_random", "orders.rating", **at), j["rating"][north].isna().mean()),
        (Claim("orphan_keys", "orders.store_id", other="stores.store_id"), 1 - known.mean()),
        (Claim("top_share", "orders.amount", **at), j["amount"][north].sum() / j["amount"][known].sum()),
        (Claim("variance_change", "orders.amount", **at), j["amount"][north].std(ddof=0) / j["amount"][known & ~north].std(ddof=0)),
        (Claim("duplicate_rows", "orders.order_id"), orders.drop(columns="order_id").duplicated().mean())]
    for claim, plain in expected:
        assert value_of(world, claim) == pytest.approx(plain, rel=1e-7, abs=1e-10), claim.kind


def test_lag_and_threshold_find_what_was_planted(every):
    lag = next(p for p in every[1].plants if p.kind == "lag")
    assert value_of(every[1], lag) == lag.params["lag"]
    with duckdb.connect() as db:
        db.execute("CREATE TABLE t AS SELECT i / 1000.0 AS x, CASE WHEN i > 700 THEN 5.0 ELSE 1.0 END AS y FROM range(1001) r(i)")
        schema = Schema({"t": {"x": "DOUBLE", "y": "DOUBLE"}}, {}, {}, {}, {})
        cut = db.execute(truth_sql(Claim("dose_threshold", "t.y", other="t.x"), schema)).fetchone()[0]
    assert cut == pytest.approx(0.7, abs=1 / 256)


@pytest.mark.parametrize(("claim", "text"), [
    (Claim("trend", "orders.amont"), r"unknown metric column 'orders.amont'; nearest: orders.amount, \S+, \S+"),
    (Claim("correlation", "orders.amount", other="x.y"), "unknown metric column 'x.y'"),
    (Claim("simpson", "orders.amount", by="stores.region", segment="north"), "the value of a simpson needs given, got None"),
    (Claim("trend", "orders.amount", by="stores.region"), "a claim by 'stores.region' needs a segment, got None"),
    (Claim("trend", "products.price"), "table 'products' has no date column"),
    (Plant("trends", {"metric": "orders.amount"}), "unknown kind 'trends'; nearest: trend")])
def test_no_sql_for_what_is_not_there(claim, text):
    with pytest.raises(ValueError, match=text):
        truth_sql(claim, SCHEMA)


def test_names_are_quoted_and_days_found():
    schema = Schema({'a"b': {"my date": "DATE", "filed": "TIMESTAMP", "y": "DOUBLE", "g": "VARCHAR"}}, {'a"b.g': ("o'x",)}, {}, {}, {})
    assert date_column(schema, 'a"b') == "filed" and date_column(SCHEMA, "ads") == "date"
    with duckdb.connect() as db:
        db.execute('CREATE TABLE "a""b" ("my date" DATE, filed TIMESTAMP, y DOUBLE, g VARCHAR)')
        db.execute("""INSERT INTO "a""b" SELECT NULL, TIMESTAMP '2020-01-01 05:00:00' + to_days(i::INTEGER), i, 'o''x' FROM range(9) r(i)""")
        claim = Claim("trend", 'a"b.y', by='a"b.g', segment="o'x")
        assert db.execute(truth_sql(claim, schema)).fetchone()[0] == pytest.approx(8)


# --- the matcher ----------------------------------------------------------------------------------------------------

ITEMS = list(FACTS.values())


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i.id)
def test_the_fact_itself_is_right_and_its_denials_are_wrong(item):
    truth = item.claim
    assert match(truth, item).verdict == "CORRECT"
    assert match(replace(truth, value=None), item).verdict == "CORRECT"
    assert match(replace(truth, direction=0), item).verdict == "INCORRECT"
    assert match(replace(truth, value=truth.value * 1.5), item).verdict == "INCORRECT"
    assert match(replace(truth, value=None), replace(item, value_required=True)).verdict == "INSUFFICIENT"
    assert match(replace(truth, metric="orders.ship_days"), item).verdict == "INSUFFICIENT"
    assert match(replace(truth, by="customers.segment", segment="corporate"), item).verdict == "INSUFFICIENT"
    if truth.direction:
        assert match(replace(truth, direction=-truth.direction), item).verdict == "INCORRECT"
        assert match(replace(truth, direction=None), item).verdict == "INSUFFICIENT"
    for other in ITEMS:
        if other is not item and {other.id, item.id} != {"trend"}:
            assert match(other.claim, item).verdict == "INSUFFICIENT"


@quick
@given(st.sampled_from([i for i in ITEMS if i.claim.kind != "lag"]), st.floats(-0.5, 0.5), st.sampled_from([0.0, 0.05, 0.1, 0.3]))
def test_a_value_is_right_within_its_tolerance(item, shift, tolerance):
    item = replace(item, rel_tol=tolerance)
    said = replace(item.claim, value=item.value * (1 + shift))
    if abs(abs(shift) - tolerance) > 1e-9:
        assert (match(said, item).verdict == "CORRECT") == (abs(said.value - item.value) <= max(1e-9, tolerance * abs(item.value)))


@pytest.mark.parametrize(("unit", "claimed", "value", "right"), [
    ("ratio", "percent", 25, True), ("ratio", "percent", 0.25, False), ("percent", "ratio", 0.0025, True), ("ratio", None, 0.25, True),
    ("", "percent", 25, True), ("ratio", "percentage_points", 25, False), ("percentage_points", "percent", 0.25, False),
    ("percentage_points", "percentage_points", 0.25, True), ("EUR", "percent", 0.25, False), ("EUR", "eur", 0.25, True),
    ("days", "day", 0.25, True), ("days", "count", 0.25, False)])
def test_units(unit, claimed, value, right):
    item = replace(FACTS["M"], unit=unit)
    assert (match(replace(item.claim, unit=claimed, value=value), item).verdict == "CORRECT") == right


def test_zero_and_negative_values():
    item = replace(FACTS["F"], value=0.0)
    assert match(replace(item.claim, value=0.0), item).verdict == "CORRECT"
    assert match(replace(item.claim, value=1e-6), item).verdict == "INCORRECT"
    assert match(replace(FACTS["F"].claim, value=36.0), FACTS["F"]).verdict == "CORRECT"   # "fell by 36"
    assert match(replace(FACTS["T"].claim, value=-36.0), FACTS["T"]).verdict == "INCORRECT"


@quick
@given(st.integers(-60, 60), st.integers(0, 11))
def test_periods(days, months):
    shift = FACTS["L"]
    said = (date(2023, 5, 1) + timedelta(days)).isoformat()
    assert match(replace(shift.claim, period=said), shift).verdict == ("CORRECT" if abs(days) <= 45 else "INCORRECT")
    day = FACTS["A"]
    said = (date(2023, 4, 7) + timedelta(days)).isoformat()
    assert match(replace(day.claim, period=said), day).verdict == ("CORRECT" if days == 0 else "INCORRECT")
    peak = replace(FACTS["S"].claim, period=str((12 + months - 1) % 12 + 1))
    assert match(peak, FACTS["S"]).verdict == ("CORRECT" if months in (0, 1, 11) else "INCORRECT")
    for item in (shift, day, FACTS["S"]):
        assert match(replace(item.claim, period=None), item).verdict == "INSUFFICIENT"


def test_conditions_pairs_names_and_kin():
    for name in ("P", "I"):
        assert match(replace(FACTS[name].claim, given=None), FACTS[name]).verdict == "INSUFFICIENT"
    turned = replace(FACTS["C"].claim, metric="products.price", other="orders.amount")
    assert match(turned, FACTS["C"]).verdict == "CORRECT"
    turned = replace(FACTS["K"].claim, metric="ads.spend", other="web.sessions")
    assert match(turned, FACTS["K"]).verdict == "INSUFFICIENT"
    said = replace(FACTS["T"].claim, metric="Amount", segment="\uff2eorth ", by="region")
    assert match(said, FACTS["T"]).verdict == "CORRECT"
    assert match(replace(FACTS["Z"].claim, segment="1"), FACTS["Z"]).verdict == "INSUFFICIENT"
    kin = match(replace(FACTS["T"].claim, kind="level_shift", period="2023-01-01"), FACTS["T"])
    assert kin.verdict == "INSUFFICIENT" and "akin" in kin.reasons[0]
    assert match(replace(FACTS["K"].claim, value=5), FACTS["K"]).verdict == "INCORRECT"
    assert match(replace(FACTS["K"].claim, value=4.3), FACTS["K"]).verdict == "INCORRECT"


@quick
@given(st.lists(st.sampled_from(["right", "wrong", "open"]), max_size=6))
def test_verdicts_of_many_claims(kinds):
    item = FACTS["T"]
    said = {"right": item.claim, "wrong": replace(item.claim, direction=-1), "open": FACTS["S"].claim}
    claims = [said[k] for k in kinds]
    none = "INCORRECT" if "wrong" in kinds else "INSUFFICIENT"
    assert verdict(claims, item) == ("CORRECT" if "right" in kinds and "wrong" not in kinds else none)
    assert verdict(claims, item, "paper") == ("CORRECT" if "right" in kinds else none)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="policy must be 'strict' or 'paper', got 'lenient'"):
        verdict([], FACTS["T"], "lenient")


# --- the checklist --------------------------------------------------------------------------------------------------


def test_items_hold_what_the_data_says(every):
    for world in every:
        checklist = build_checklist(world)
        assert len(checklist.items) == len(world.plants) and checklist.world == world.digest
        with duckdb.connect(world.db_path, read_only=True) as db:
            for item, plant in zip(checklist.items, world.plants, strict=True):
                found = db.execute(item.truth_sql).fetchone()[0]
                assert item.value is None or item.value == item.claim.value == pytest.approx(found, rel=1e-9)  # the order of sums
                assert item.claim.kind == plant.kind and item.claim.metric == plant.params["metric"] and item.difficulty >= 1
                assert item.truth_sql.startswith(("SELECT", "WITH")) and ";" not in item.truth_sql


@pytest.mark.parametrize("template", ["retail", "clinic", "filings", "wearable"])
def test_every_sentence_of_a_checklist_is_read_back(template, tmp_path):
    for seed in range(2 if template == "retail" else 1):
        world = make_world(template, seed=seed, rows=2500, path=str(tmp_path / f"{seed}.duckdb"), plants=[
            k for k in KINDS if k != "simpson" and _has(template, k)])
        for item in build_checklist(world).items:
            for value in (item.value, None):
                claim = replace(item.claim, value=value)
                for wording in (0, 1):
                    question, answer = module._sentences_of(claim, world.schema, wording)
                    assert [match(c, item).verdict for c in Claim.parse(answer, world.schema)] == ["CORRECT"], answer
                    assert Claim.parse(question, world.schema) == [] and "[" not in question + answer


def _has(template, kind):
    try:
        make_world(template, plants=[kind], rows=999)
    except ValueError as error:
        return str(error).startswith("rows")


def test_simpson_is_read_back(every):
    item = build_checklist(every[1]).items[0]
    for wording in (0, 1):
        _, answer = module._sentences_of(item.claim, every[1].schema, wording)
        assert [match(c, item).verdict for c in Claim.parse(answer, every[1].schema)] == ["CORRECT"], answer


def test_nothing_of_the_checklist_is_where_tools_look(every):
    world = every[0]
    before = set(os.listdir(os.path.dirname(world.db_path)))
    checklist = build_checklist(world)
    assert set(os.listdir(os.path.dirname(world.db_path))) == before
    with open(world.db_path, "rb") as file:
        held = file.read()
    assert checklist.canary.encode() not in held and checklist.items[0].answer.encode() not in held
    assert checklist.canary not in "".join(os.environ.values())


def test_the_canary_gives_a_leak_away(every):
    first, second = (build_checklist(w) for w in every)
    assert first.canary == build_checklist(every[0]).canary != second.canary
    first.guard(f"nothing here {second.canary}")
    for text in (first.canary, f"x{first.canary.upper()}y", first.canary.replace("-", ""), first.canary.replace("-", "-\n")):
        with pytest.raises(LeakError, match="the transcript holds the canary of the checklist of world"):
            first.guard(f"I read {text} somewhere")


def test_save_and_load(every, tmp_path):
    checklist, path = build_checklist(every[0]), tmp_path / "list.json"
    checklist.save(path)
    assert Checklist.load(str(path)) == checklist and os.listdir(tmp_path) == ["list.json"]
    data = json.loads(path.read_text())
    data["items"][0]["rel_tol"] = -1
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="rel_tol of item '00-trend' must be finite and not negative, got -1"):
        Checklist.load(path)
    with pytest.raises(FileNotFoundError):
        Checklist.load(tmp_path / "none.json")


def test_a_broken_save_leaves_the_old_file(every, tmp_path, monkeypatch):
    checklist, path = build_checklist(every[1]), tmp_path / "list.json"
    checklist.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Checklist(checklist.items[:1], checklist.world).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["list.json"]


@pytest.mark.parametrize(("fields", "text"), [
    ({"rel_tol": math.nan}, "rel_tol of item 'trend' must be finite and not negative, got nan"),
    ({"abs_tol": math.inf}, "abs_tol of item 'trend' must be finite and not negative, got inf"),
    ({"rel_tol": -0.1}, "rel_tol of item 'trend' must be finite and not negative, got -0.1"),
    ({"value": math.nan}, "value of item 'trend' must be finite, got nan"),
    ({"difficulty": 0}, "difficulty of item 'trend' must be at least 1, got 0")])
def test_bad_items_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        replace(FACTS["T"], **fields)


def test_items_have_names_of_their_own():
    with pytest.raises(ValueError, match="names of items must differ, got 'trend' twice"):
        Checklist([FACTS["T"], FACTS["F"]], "0")
    assert asdict(FACTS["T"])["claim"]["metric"] == "orders.amount"


def test_a_plant_on_a_column_that_is_not_there(every):
    world = replace(every[0], plants=[Plant("trend", {"metric": "orders.amont", "direction": 1})])
    with pytest.raises(ValueError, match=r"unknown metric column 'orders.amont'; nearest: orders.amount"):
        build_checklist(world)


def test_numbers_with_exponents_are_read():
    world = make_world("retail", seed=0, rows=1000)
    (found,) = Claim.parse("Rating tends to rise with price: the correlation is r = 1.5e-02.", world.schema)
    assert (found.kind, found.value) == ("correlation", 0.015)
