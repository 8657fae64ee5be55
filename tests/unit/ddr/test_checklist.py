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
from collai.ddr.agents import _HOMES, _plan
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
    "O": replace(fact("orphan_keys", "orders.store_id", 0.02, "ratio", other="stores.store_id"), value_required=True),
    "K": fact("lag", "web.sessions", 4.0, "days", other="ads.spend", direction=1),
    "H": replace(fact("top_share", "orders.amount", 0.38, "ratio", by="products.category", segment="toys"), value_required=True),
    "V": fact("variance_change", "orders.amount", 1.5, "ratio", by="stores.region", segment="east", direction=1),
    "D": fact("dose_threshold", "orders.rating", 0.2, other="orders.discount", direction=-1),
    "U": fact("duplicate_rows", "orders.order_id", 0.01, "ratio"),
    "B": fact("group_difference", "orders.amount", -4.5, "EUR", by="stores.format", segment="mall", direction=-1),
    "Y": fact("seasonality", "orders.amount", 26.0, "EUR", by="stores.region", segment="west", period="7"),
    "N": fact("correlation", "orders.ship_days", -0.14, "ratio", other="products.price", direction=-1),
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
K C Web sessions rise 4 days after ad spend rises.
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
K I Web sessions rise 5 days after ad spend rises.
K I Web sessions rise one week after ad spend rises.
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
    assert len(CASES) >= 60 and {FACTS[name].claim.kind for name, _, _ in CASES} == set(KINDS)


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
                 "Spend goes up and sessions respond to spend 4 days later."):
        found = [c for c in read(text) if c.kind == "lag"]
        said = 1 if text.startswith("Four") else None  # the others do not say whether sessions rise or fall
        assert [(c.metric, c.other, c.value, c.direction) for c in found] == [("web.sessions", "ads.spend", 4, said)], text
    assert only("Sessions lead spend by 4 days.").metric == "ads.spend"
    assert only("The effect of price on amount exists only in malls.").other == "products.price"
    assert only("Above a discount of 0.2 ratings fall.").metric == only("Ratings fall above a discount of 0.2.").metric == "orders.rating"


def test_statements_about_the_same_thing_merge():
    found = only("Amount in the north rose over the years. The rise was 36 EUR. It ended late.")
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
    ({"period": "May"}, "period must be .* got 'May'"), ({"period": "2023-02-01/2023-01-01"}, "period must be"),
    ({"direction": 1.0}, "direction must be -1, 0, 1 or None, got 1.0"), ({"direction": "1"}, "direction must be .* got '1'"),
    ({"value": True}, "value must be a number, got True"), ({"value": "3"}, "value must be a number, got '3'"),
    ({"confidence": True}, "confidence must be a number, got True"),
    ({"tables": "orders"}, "tables must be a sequence of names, got 'orders'"),
    ({"tables": ("orders", 3)}, r"tables must be a sequence of names, got \('orders', 3\)"),
    ({"tables": None}, "tables must be a sequence of names, got None"),
    ({"segment": 10}, "segment must be a string, got 10"), ({"period": 7}, "period must be a string, got 7"),
    ({"text": None}, "text must be a string, got None"), ({"kind": 3}, "unknown kind 3"),
    ({"kind": "lag"}, "a lag needs other, the second column, got None"),
    ({"kind": "correlation", "other": ""}, "a correlation needs other, the second column, got ''")])
def test_malformed_claims_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        inspect.unwrap(Claim.__init__)(Claim.__new__(Claim), **({"kind": "trend", "metric": "orders.amount"} | fields))


def test_numbers_of_numpy_are_numbers():
    claim = Claim("trend", "orders.amount", direction=int(np.int64(1)), value=np.float64(3))
    assert claim.value == 3 and module._is_number(np.int64(1), module.Integral) and not module._is_number(np.bool_(True))


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
    assert match(replace(truth, value=None), item).verdict == ("INSUFFICIENT" if item.value_required else "CORRECT")
    assert match(replace(truth, direction=0), item).verdict == "INCORRECT"
    assert match(replace(truth, value=truth.value * 1.5), item).verdict == "INCORRECT"
    assert match(replace(truth, value=None), replace(item, value_required=True)).verdict == "INSUFFICIENT"
    assert match(replace(truth, metric="orders.customer_id"), item).verdict == "INSUFFICIENT"
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
                claim, deserved = replace(item.claim, value=value), "CORRECT"
                if value is None and item.value_required:
                    deserved = "INSUFFICIENT"
                for wording in (0, 1):
                    question, answer = module._sentences_of(claim, world.schema, wording)
                    assert [match(c, item).verdict for c in Claim.parse(answer, world.schema)] == [deserved], answer
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
    ({"difficulty": 0}, "difficulty of item 'trend' must be at least 1, got 0"),
    ({"difficulty": True}, "difficulty of item 'trend' must be at least 1, got True"),
    ({"value": "3"}, "value of item 'trend' must be a number, got '3'"),
    ({"value": True}, "value of item 'trend' must be a number, got True"),
    ({"rel_tol": None}, "rel_tol of item 'trend' must be finite and not negative, got None")])
def test_bad_items_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        inspect.unwrap(ChecklistItem.__init__)(ChecklistItem.__new__(ChecklistItem), **(vars(FACTS["T"]) | fields))


def test_items_have_names_of_their_own():
    with pytest.raises(ValueError, match="names of items must differ, got 'trend' twice"):
        Checklist([FACTS["T"], FACTS["F"]], "0")
    assert asdict(FACTS["T"])["claim"]["metric"] == "orders.amount"


def test_a_plant_on_a_column_that_is_not_there(every):
    world = replace(every[0], plants=[Plant("trend", {"metric": "orders.amont", "direction": 1})])
    with pytest.raises(ValueError, match=r"unknown metric column 'orders.amont'; nearest: orders.amount"):
        build_checklist(world)


@pytest.mark.parametrize(("plants", "text"), [
    ([Plant("trend", {"direction": 1})], "plant 0, a trend, needs metric, got None"),
    ([Plant("lag", {"metric": "web.sessions"})], "plant 0, a lag, needs other, got None"),
    (["trend"], "plants must be Plant objects, got 'trend'"),
    ([Plant("trends", {"metric": "orders.amount"})], "unknown kind 'trends'; nearest: trend")])
def test_plants_that_lack_something(every, plants, text):
    with pytest.raises(ValueError, match=text):
        inspect.unwrap(build_checklist)(replace(every[0], plants=plants))


def test_what_is_no_world(every):
    with pytest.raises(ValueError, match="world must be a World, got str"):
        inspect.unwrap(build_checklist)("retail")
    with pytest.raises(ValueError, match="world has no database file at '/none.duckdb'"):
        build_checklist(replace(every[0], db_path="/none.duckdb"))


def test_facts_without_direction_or_period_need_their_value(every):
    for item in (item for world in every for item in build_checklist(world).items):
        assert item.value_required == (item.claim.kind in ("top_share", "orphan_keys", "duplicate_rows"))


def test_numbers_with_exponents_are_read():
    world = make_world("retail", seed=0, rows=1000)
    (found,) = Claim.parse("Rating tends to rise with price: the correlation is r = 1.5e-02.", world.schema)
    assert (found.kind, found.value) == ("correlation", 0.015)


# --- sentences that tempt to guess ----------------------------------------------------------------------------------

# the fact, the verdict that a sentence deserves (C right, I wrong, N open: refused or about something else), the sentence
KNOWN = """
# levels and counts
B C Mall stores have the lowest average amount (115.33 EUR).
B C The mall format has the lowest mean amount at 115.33 EUR.
B C Average amount is lowest in mall stores (115.33 EUR on average).
B C Average amount in mall stores is 115.33 EUR, lower than elsewhere.
B C Average amount in mall stores is 115.33 EUR, which is lower than elsewhere.
B C At 115.33 EUR, the average amount in mall stores is lower than elsewhere.
B C Amount in mall stores is lower (mean 115.33, n = 2,512).
B C Amount in mall stores is lower than elsewhere, based on 2512 orders.
B C Amount in mall stores is lower than elsewhere across 2512 orders.
B N Amount in mall stores is lower than elsewhere in 2 of 3 years.
B N Amount is lower in mall stores, the one format with few staff.
B C Amount is lower in mall stores, one of three formats.
B C Of the three formats, mall has the lower amount.
B C The mean amount in mall stores (115.33 EUR) is lower than in other stores (119.86 EUR).
B C Amount in mall stores is lower by 4.5 EUR.
B N Amount in mall stores is lower by 4,5 EUR.
B I Amount in mall stores is lower by 115.33 EUR.
B N Amount in mall stores is lower than 4.
B N Amount in mall stores is no less than 4.5 EUR lower than elsewhere.
# harmless no, not, without
K C Sessions rise 4 days after spend rises, not 6.
K I Sessions rise 6 days after spend rises, not 4.
K C Sessions rise four rather than six days after spend rises.
K C Sessions rise 4 days after spend rises, without exception.
T C Amount in the north rose by 36 without interruption.
L C Discounts in the south dropped by 0.03 on 2023-05-01 and never came back.
L C Discounts in the south dropped on 2023-05-01 without warning.
A C On 2023-04-07 there were 60 more orders than usual; no other day comes close.
A C On 2023-04-07 there were 60 more orders than usual, no other day comes close.
B C Amount in mall stores is lower than elsewhere, which is no accident.
B C Amount in mall stores is lower than elsewhere, without doubt.
B C Amount in mall stores is lower, and it is not due to chance.
Y C Amount in the west peaks in July, not in December.
B C Amount in mall stores is not higher than elsewhere but lower.
B N Neither rating nor amount is lower in mall stores.
B N Amount in mall stores is anything but lower than elsewhere.
# denials by verb and hedges
B N The data rule out lower amounts in mall stores.
B N The idea that mall has lower amounts was refuted.
B N Amount in mall stores ceased to be lower than elsewhere.
B N Amount in mall stores used to be lower than elsewhere.
B N Amount in mall stores was once lower than elsewhere.
B N It is a myth that amounts in mall stores are lower.
B N Amount in mall stores was thought to be lower than elsewhere.
B N Assuming amount is lower in mall stores, rating is higher.
B N The p-value for lower amount in mall stores is 0.4.
B N Amount in mall stores is lower than elsewhere (p = 0.6).
B N Unlike rating, amount is lower in mall stores.
B N In contrast to rating, amount is lower in mall stores.
B N Contrary to the claim that amount is lower in mall stores, it is higher.
B N I failed to confirm lower amounts in mall stores.
B N The data contradict the view that amount in mall stores is lower.
B N The claim that amount in mall stores is lower does not hold.
B N The hypothesis that amount is lower in mall stores is rejected.
B N I was unable to find lower amounts in mall stores.
B N A previous report said amount in mall stores is lower than in the rest.
B N Amount in mall stores is lower than elsewhere, but the difference is not significant.
B N Amount in mall stores is lower than elsewhere. This was refuted.
T N Amount in the north was lower until 2021 and then recovered.
C N Discounts and prices are anything but related.
C N The correlation between amount and price disappears within each category.
# conditions
B N For orders above 100 EUR, amount in mall stores is lower than elsewhere.
B N In 2022, amount in mall stores was lower than elsewhere.
B N Amount is lower in mall stores in 2022.
B N Amount in mall stores is lower on Mondays than in the rest.
B N Amount of returned orders in mall stores is lower than elsewhere.
B N Excluding corporate customers, amount in mall stores is lower than in the rest.
B N After 2022-05-01, amount in mall stores is lower than elsewhere.
B N Among customers older than 60, amount in mall stores is lower than elsewhere.
B N Amount in mall stores is lower than elsewhere only for garden.
B N Amount in mall stores is lower than it was last year.
B N The median amount in mall stores is lower than in the rest.
B N The number of orders in mall stores is lower than elsewhere.
B N Total amount in mall stores is lower than in the rest.
T N Amount in the north fell in 2021 and rose in 2022.
T N Amount in the north rose in 2022.
P N Overall online orders are returned less often, but more often in every customer segment except corporate.
P N In most customer segments online orders are returned more often, although overall less.
I N Only in malls does the rating not rise with the price.
H N In 2021 toys made up 38 % of total amount.
T N Amount of returned orders rose.
# signs, shares, odd ones
K N Spend leads sessions by 4 days.
K N Sessions follow spend by four days.
K I Sessions fall 4 days after spend rises.
H N Toys account for a small share of total amount.
H N Toys account for a negligible fraction of the total amount.
H N Toys contribute little to the total amount.
H N The share of toys in the total amount fell by 38 %.
H N Toys' share of total amount is average.
H N Total amount in toys is lower than in the rest.
H N Everything but toys accounts for 38 % of amount.
H N Every category including toys accounts for an equal share of the total amount.
O N 2 orders have no matching store.
O C 2 % (200) of orders have no matching store.
O N 2 % of the orders have no store, while 98 % do.
O N Fewer than 5 % of orders have no matching store.
O I 20 % of orders have no matching store.
M N The rating column has 27 missing values for mall stores.
M N Rating is missing as often for mall stores as for others.
M N Rating is missing in 25 % of rows in mall stores, no more than elsewhere.
M N 25 % of the missing ratings are in mall stores.
M N Mall stores account for 25 % of missing ratings.
A C There were 200 orders on 2023-04-07, twice the usual number.
A C On 2023-04-07 the number of orders was 60 above the median, which is not normal.
Y N Amount in the west is constant all year except in July, when it rises.
T N Amount in the north rose by 12 EUR a year.
T N Amount in the north rose 3 times as fast as elsewhere.
N C There is a negative correlation between price and ship_days (r = -0.14).
N C There is a negative correlation between price and ship days (r=-0.14).
N C There is a weak negative correlation (r = -0.14) between price and ship_days.
N C Price is negatively correlated with ship_days (-0.14).
N C There is a negative correlation of -0.14 between ship_days and price.
N C The correlation between price and ship_days is -0.14.
N C Correlation between price and ship_days: -0.14
N C Price and ship days have a correlation coefficient of -0.14.
L N Discounts in the south dropped by 27 % on 2023-05-01.
# plain
G C Online orders have higher ratings than the rest, by 0.15 points.
T C In the north region, the amount increased steadily by 36 EUR over the three years.
H C The toys category accounts for 38 % of total order amount.
H C Toys products generate 38 % of total amount.
H C 38 % of all amount comes from the toys category.
H C The share of toys in total amount is 38 %.
H C Toys is the largest category, with 38 % of total amount.
M C In mall stores, 25 % of rating values are NULL.
M C Rating has 25 % missing values in mall stores.
M C Rating is more often missing in mall stores.
M C About a quarter of ratings are missing in mall stores.
Y C Amounts peak in July for stores in the west.
Y C Amounts in the west show a seasonal pattern, peaking in July with an amplitude of about 26.
K C Web sessions drop about 4 days after ad spend drops.
L C On 1 May 2023 discount in the south dropped by 0.03.
L C Discounts in the south fell sharply on 2023-05-01, by 0.03.
L C After May 1, 2023 discounts in the south are lower.
B C Mall stores have a lower average amount (by 4.5 EUR).
B C The average amount in mall stores is 4.5 EUR lower than in other formats.
A C Order volume spiked on 2023-04-07 with 60 more orders than usual.
A C On April 7, 2023 there was an unusual spike in orders.
A C Orders spiked on 2023-04-07 (160 orders vs a median of 100).
B C - **Amount** is *lower* in mall stores.
B C 1. Amount is lower in mall stores than elsewhere, by 4.5 EUR.
I C Ratings rise with price only in mall stores.
P C Within every segment, online customers return more often, although overall they return less.
O C Around 2 % of the store ids in orders have no match in the stores table.
D C Above a discount of 0.2 ratings are lower.
A N On 2023-04-07 orders did not follow the usual pattern: there were 60 more.
Y N Amount in the west peaks in July and not before.
L C Discounts in the south dropped by 0.03 on 2023-05-01 and have not risen since.
C I Price and amount are positively correlated (r = 0.9, p < 0.001).
C C Price and amount are positively correlated (r = 0.35, p < 0.001).
B I Amount in mall stores is lower than elsewhere (by 115 EUR, p < 0.001).
B C Amount in mall stores is lower than elsewhere (by 4.5 EUR, 95 % CI 4.1 to 4.9).
B C Amount in mall stores is lower than elsewhere (t = -12.3, p = 0.002).
B N In July amount in mall stores is lower than elsewhere.
B N There is no difference in amount between mall and street stores.
B N Given that amount in mall stores is lower, rating is higher.
B N The number of returns in mall stores is lower than elsewhere.
B N Since 2022 amount in mall stores is lower than elsewhere.
B N To show that amount in mall stores is lower, more data are needed.
V N On 2023-05-01 amount in the east was more variable than elsewhere.
C N Since 2023-05-01 amount rises with price.
C N Amount rises with price by 15 %.
P N Online orders are not returned less often in any customer segment, although overall less.
T N Amount in the north rose more than elsewhere.
B N The sum of amount in mall stores is lower than elsewhere.
B N Amount per customer is lower in mall stores.
B C Compared with the other formats, amount in mall stores is lower by 4.5 EUR.
B C Amount: mall stores are 4.5 EUR below the rest.
B C Mall orders are smaller in amount, by 4.5 EUR on average.
B C The average amount of mall orders is 4.5 EUR less than that of other orders.
B C There is a difference in amount: mall stores are lower by 4.5 EUR.
B N Mall stores had an average amount of 4.5 EUR, the lowest in 2 regions.
B I Amount in mall stores exceeds the rest by 4.5 EUR.
B I Amount in mall stores does not differ from the rest.
T C Amount in the north shows an increase of 36 EUR over the years.
T C There was a steady growth of amount in the north.
T C Amount trends upward in the north.
T C The trend of amount in the north is positive (+36 EUR).
T I The trend of amount in the north is negative.
T I Amount in the north declined steadily.
T N The trend of amount in the north is unclear.
T N The north might show a rising amount.
S C Ratings are highest in December and lowest in June.
S N Ratings in the mall stores peak in December.
L C A level shift in discount occurred on 2023-05-01 in the south: it dropped by 0.03.
L C Around 2023-05-01 discounts in the south dropped.
L I On 2023-05-01 discounts in the south jumped.
C C Amount tends to rise with price.
C I Amount is negatively correlated with price.
C N Amount is correlated with price in the north.
C N Amount and price are higher in the north.
I C The price affects rating only in mall stores, where rating rises with price.
I N Rating rises with price in mall stores.
A C There was a spike of 60 additional orders on 2023-04-07.
A C 2023-04-07 stands out with 60 more orders than the median.
A I On 2023-04-07 there were fewer orders than usual.
M C Ratings are more frequently missing in mall stores than in other stores.
M I Ratings are missing less often in mall stores.
M I 2 % of ratings are missing in mall stores.
H C Toys account for 38 % of amount.
H I Toys account for 12 % of the total amount.
H N Toys account for 38 % of the total amount of returned orders.
V C Amount varies more in the east than elsewhere.
V I Amount varies less in the east than elsewhere.
V C The standard deviation of amount is higher in the east.
D C When the discount is above 0.2, ratings are lower.
D I Ratings are higher only above a discount of 0.2.
U C Duplicate rows make up 1 % of orders.
U I 10 % of the orders are duplicated.
K C Spend leads sessions by 4 days, and sessions rise with it.
K I Spend leads sessions by 4 days, and sessions fall with it.
G C Ratings of online orders are higher.
G I Ratings of online orders are lower.
G N Ratings of online orders are about the same as in 2021.
P C Within each customer segment online orders are returned more often, but overall less often.
O C 2 % of store ids in orders are orphans.
# quantifiers, other columns, other parts
B N Amount in mall stores is lower than elsewhere, at least in one region.
B N Amount in mall stores is lower than elsewhere in all but one region.
B N Amount in mall stores is lower than elsewhere in 80 % of the regions.
B N Amount in mall stores is lower than elsewhere with 60 % probability.
B N Amount in mall stores is lower than elsewhere at the 40 % level.
B N Amount in mall stores is lower than rating.
B N Lower amounts in mall stores do not show.
B N It is not known that amount in mall stores is lower.
B N We do not find that amount in mall stores is lower.
B N Not all mall stores have lower amounts.
B N Not every mall order has a lower amount.
B N Amount in mall stores is not always lower than elsewhere.
B I Amount in mall stores is lower and higher than elsewhere.
B N The claim is that amount in mall stores is lower.
B N Lower amount in mall stores: not confirmed.
B I No mall store has a lower amount.
B N Amount in mall stores was lower on 2023-04-07 than elsewhere.
B N Amount in mall stores is lower in the north.
B N Amount for the corporate segment is lower in mall stores.
B N The lowest amount of all orders was in a mall store.
B N Amount in mall stores is lower for orders with discount.
B N Amount in mall stores is lower when discount is above 0.2.
B N Amount in mall stores is lower without discount.
B N Amount in mall stores is lower by 4.5 EUR per customer.
B N Amount in mall stores is 4.5 EUR lower than in street stores.
B I Amount in mall stores is 4.5 EUR higher.
B I Amount in mall stores is lower by 45 EUR on average.
B N Amount in mall stores rose by 4.5 EUR.
T N Amount in the north rose by 36 EUR until 2022.
T I Amount in the north rose and fell.
T N Amount in the north rose by 36 EUR in the mall stores.
T I Amount in the north rose by 3.6 EUR.
T I Amount in the north rose from 100 to 120 EUR over the years.
T C Amount in the north rose from 100 EUR to 136 EUR over the years.
T N Amount in the north is rising by 36 EUR a day.
T N Amount in the north rose by 36 EUR, if one believes the data.
T I Amount in the north was stable over the years.
T N Amount in the north rose on 2023-05-01.
L I Discounts in the south rose by 0.03 on 2023-05-01.
L N Discounts in the south dropped on 2023-05-01 only for malls.
L C Discounts in the south dropped from 0.3 on 2023-05-01.
L N Discounts in the south dropped briefly on 2023-05-01.
L N No drop of discounts in the south was visible before 2023-05-01.
C N Amount rises with price until 100 EUR.
C N Amount rises with price, but not significantly.
C I Amount and price are unrelated.
C N Correlation of amount and price is 0.35 in the north.
C I The correlation of amount and price is -0.35.
C N Price correlates with amount.
M N In mall stores 25 % of the ratings are low.
M I In mall stores 75 % of ratings are missing.
M N 75 % of ratings in mall stores are not missing.
M N Ratings are missing in 25 % of the stores.
M N 25 % of mall stores have missing ratings.
O N 2 % of orders have no rating.
O N 2 % of stores have no orders.
O N 98 % of orders have no missing store.
H N Toys account for 38 % of the rows.
H N Toys account for 38 % of the orders.
H N Toys account for 38 % more of the total amount.
H I Toys account for 50 % of the total amount.
H N Toys account for over a third of the total amount.
A N On 2023-04-07 there were 60 orders.
A I On 2023-04-07 there was nothing unusual about orders.
A N On 2023-04-07 there were 60 more orders than on 2023-04-06.
A N On 2023-04-07 there were 60 more orders in mall stores than usual.
A N On 2023-04-07 amount was unusual.
V N Amount in the east is variable.
V I Amount in the east is half as variable as elsewhere.
V I Amount in the east is twice as variable as elsewhere.
D N Above a discount of 0.2 there are 30 ratings.
D I Above a discount of 0.5 ratings fall.
U N 1 % of customers are duplicates.
U N 10 duplicates were found in orders.
K N Sessions rise 4 days after spend.
K N Sessions rise 4 days after spend rises in the north.
K I Sessions fall 4 days after spend rises.
I N Rating rises with price only in street stores.
I I Only in malls does the rating fall with the price.
I N Rating rises with price only in malls and street stores.
P I Within every customer segment, online orders are returned less often.
P N In one customer segment, online orders are returned more often.
"""

UNSEEN = """
# levels, counts
B C Mall stores show the smallest mean amount, namely 80.2 EUR.
B C With 80.2 EUR on average, amount in mall stores is lower than elsewhere.
B C Amount in mall stores is lower than elsewhere, a result from 4100 orders.
B N Amount in mall stores is lower than elsewhere in one year out of three.
B C Out of three formats, the mall has the lowest amount.
B N Amount in mall stores is lower than 120 EUR.
B N Amount in mall stores is lower than elsewhere by 4,7 EUR.
A C With 160 orders against a median of 100, orders spiked on 2023-04-07.
T C Amount in the north rose to 136 EUR over the years.
T N Amount in the north rose over the years in 2 regions of 4.
V N Amount in the east is more variable than in 3 other regions.
# harmless negations
K C Sessions rise 4 days after spend rises, not 9.
K I Sessions rise 9 days after spend rises, not 4.
L C Discounts in the south dropped by 0.03 on 2023-05-01 and did not bounce back.
T C Amount in the north rose without a break over the years.
A C Orders spiked on 2023-04-07, a day like no other.
B C Amount in mall stores is lower than elsewhere, and this is not a coincidence.
Y C Amount in the west peaks in July each year and not in winter.
L C Discounts in the south dropped on 2023-05-01 by 0.03, not 0.05.
M C Ratings are missing in 25 % of the mall rows, not in 5 %.
T C Amount in the north rose steadily by 36, never pausing.
# denials by verb, hedges
B N The figures disprove lower amounts in mall stores.
B N The notion of lower amounts in mall stores has been debunked.
B N Amount in mall stores stopped being lower than elsewhere.
B N Amount in mall stores was formerly lower than elsewhere.
B N It is an old tale that amount is lower in mall stores than elsewhere.
B N Amount in mall stores was believed to be lower than elsewhere.
B N Provided that the sample is fair, amount in mall stores is lower than elsewhere.
B N Amount in mall stores is lower than elsewhere, with a p of 0.5.
B N As opposed to rating, amount is lower in mall stores.
B N One could argue that amount is lower in mall stores.
T N Amount in the north was predicted to rise over the years.
T N Amount in the north pretended to rise over the years.
K N The theory that sessions rise 4 days after spend rises collapsed.
C N The analysis dismissed that amount rises with price.
M N Ratings in mall stores were rumoured to be missing more often.
B N Amount in mall stores is lower than elsewhere according to an unreliable source.
# conditions
B N Amount in mall stores is lower than elsewhere for items over 50 EUR.
B N During 2023 amount in mall stores was lower than elsewhere.
B N Amount in mall stores is lower than elsewhere at weekends.
B N Among refunded orders, amount in mall stores is lower than elsewhere.
B N Leaving out the south, amount in mall stores is lower than elsewhere.
T N Amount in the north rose in the first year and fell in the second.
C N Amount rises with price as long as the discount is small.
T N For new customers amount in the north rose over the years.
K N Sessions rise 4 days after spend rises, but only in summer.
M N On Sundays ratings are missing more often in mall stores.
H N In spring toys account for 38 % of the total amount.
V N Amount in the east is more variable than elsewhere before noon.
# signs, shares, odd ones
K N Sessions trail spend by 4 days.
K N Spend runs ahead of sessions by 4 days.
H N Toys bring in a tiny part of the total amount.
H N Toys hold a typical share of the total amount.
H N The share of toys in the total amount grew by 38 %.
O N 3 orders point to a store that does not exist.
M N There are 25 missing ratings in mall stores.
M N A quarter of the empty ratings belongs to mall stores.
M N Ratings are missing in mall stores just as often as in other stores.
A N On 2023-04-07 there were 160 orders, three times what is usual.
H N Everything apart from toys makes up 38 % of the total amount.
Y N Amount in the west is flat all year, apart from a bump in July.
O N 2 % of orders have no store, the other 98 % have one.
T N Amount in the north rose by 12 EUR per year.
N C Price and ship days are negatively correlated (r = -0.14).
N C The correlation of ship days with price is negative (r = -0.14).
N I Price and ship days are positively correlated (r = 0.14).
L N Discounts in the south dropped by 27 % on 2023-05-01.
# plain claims
T C Over the whole period, amount in the north increased by 36 EUR.
T C Orders from the north show a clear upward trend in amount.
T C The amount in the north has been growing steadily, by about 36 EUR in total.
T C In the north, the average amount went up by 35 EUR between 2021 and 2023.
B C The average amount is 4.5 EUR lower in mall stores than in the other stores.
B C Amounts are lower in malls.
B C On average, orders in mall stores have a lower amount than those elsewhere.
L C Since 2023-05-01 the discount in the south has been lower by 0.03.
L C The discount in the south dropped abruptly on 1 May 2023, by 0.03.
Y C Amount in the west shows a yearly cycle with a peak in July.
Y C In the west, amount follows a seasonal pattern that peaks in July with an amplitude of about 26 EUR.
C C Amount and price are positively correlated, with r = 0.35.
C C There is a positive correlation of 0.35 between price and amount.
C C Higher prices go along with higher amounts.
K C Sessions increase four days after an increase in spend.
K C An increase in ad spend is followed by an increase in sessions 4 days later.
H C Toys make up 38 % of the total amount.
H C About 38 % of the total amount comes from toys.
M C 25 % of ratings are missing in mall stores.
M C In mall stores ratings are missing more often than elsewhere.
O C About 2 % of the orders reference a store_id that is not in stores.
V C Amount is more volatile in the east than in the other regions.
V C The spread of amount in the east is 1.5 times that of the rest.
D C Ratings are lower once the discount exceeds 0.2.
U C 1 % of the rows in orders are duplicates.
A C On 2023-04-07 there were 60 more orders than on a normal day.
"""


def cases(block):
    return [tuple(line.split(" ", 2)) for line in block.strip().splitlines() if not line.startswith("# ")]


@pytest.mark.parametrize(("name", "deserved", "text"), cases(KNOWN), ids=[text for _, _, text in cases(KNOWN)])
def test_no_sentence_is_guessed(name, deserved, text):
    assert verdict(read(text), FACTS[name]) == WORDS[deserved], [match(c, FACTS[name]) for c in read(text)]


def test_sentences_that_no_rule_was_fitted_to():
    found = [(deserved, verdict(read(text), FACTS[name])) for name, deserved, text in cases(UNSEEN)]
    right = sum(WORDS[deserved] == got for deserved, got in found)
    refused = sum(WORDS[deserved] != got == "INSUFFICIENT" for deserved, got in found)
    assert len(found) == 93 and right >= 83 and len(found) - right - refused <= 1


def test_every_phrase_of_the_small_analyst_is_read():
    values = make_world("retail", seed=0, rows=1000, plants=[]).schema
    signs = {"lower": -1, "higher": 1, "falls": -1, "rises": 1, "rarely": -1, "often": 1, "smallest": None, "largest": None}
    for _, _, sentence, words in _plan():
        for dim, table in _HOMES.items():
            for part in values.values[f"{table}.{dim}"]:
                for word in words:
                    text = sentence.format(dim=dim, part=part, word=word)
                    (claim,) = Claim.parse(text, values)
                    assert (claim.by, claim.segment, claim.direction) == (f"{table}.{dim}", part, signs[word]), text
                    assert claim.metric.partition(".")[2] in text and claim.value is None


def test_levels_and_samples_are_no_values():
    for text in ("Mall stores have the lowest average amount (115.33 EUR).", "Amount in mall stores is lower, based on 2512 orders.",
                 "Amount in mall stores is 115.33 EUR, lower than elsewhere.", "Of the three formats, mall has the lower amount."):
        claim = only(text)
        assert (claim.kind, claim.segment, claim.direction, claim.value) == ("group_difference", "mall", -1, None), text
    assert only("The mean amount in mall stores (115.5 EUR) is lower than in other stores (120 EUR).").value == -4.5


def test_a_lag_without_a_sign_has_none():
    assert only("Spend leads sessions by 8 days.").direction is None
    assert only("Sessions fall 8 days after spend rises.").direction == -1
    assert only("Spend leads sessions by 8 days, and sessions tend to fall with it.").direction == -1


def test_a_percent_of_a_column_without_unit_may_be_relative():
    shift = FACTS["L"]
    for value, deserved in ((3, "CORRECT"), (27, "INSUFFICIENT")):
        claim = replace(shift.claim, value=-value, unit="percent")
        assert match(claim, shift).verdict == deserved
        assert match(claim, replace(shift, unit="ratio")).verdict == ("CORRECT" if value == 3 else "INCORRECT")
        assert match(replace(claim, unit="percentage_points"), shift).verdict == "INCORRECT"


def test_what_is_taken_back_is_not_claimed():
    assert read("Amount in mall stores is lower than elsewhere. This was refuted.") == []
    assert len(read("Amount in mall stores is lower than elsewhere. Ratings in the north are higher.")) == 2
