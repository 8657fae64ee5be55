"""Properties of `collai.gamma.design`: designs that hold what their resolution and their alias table promise."""

import math
from itertools import combinations, product

import numpy as np
import pandas as pd
import pyDOE3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collai.gamma.design import Design, fractional_factorial, full_factorial

quickly = settings(deadline=None, derandomize=True, max_examples=25)
FIVE = ["topology", "role", "scale", "protocol", "diversity"]


def columns(design, order):
    """Columns of all effects up to `order`, by multiplying levels."""
    k = len(design.names)
    return {
        ":".join(design.names[i] for i in chosen): design.X[:, chosen].astype(int).prod(axis=1)
        for size in range(1, order + 1)
        for chosen in combinations(range(k), size)
    }


@st.composite
def fractions(draw):
    """A list of generators: basic columns, signs and products in any order."""
    m = draw(st.integers(1, 4))
    letters = "abcd"[:m]
    words = ["".join(c) for n in range(1, m + 1) for c in combinations(letters, n)]
    extra = draw(st.lists(st.sampled_from(words), max_size=4))
    chosen = draw(st.permutations(list(letters) + extra))
    return [("-" if draw(st.booleans()) else "") + g for g in chosen]


@given(st.integers(1, 8))
@quickly
def test_bit_i_of_a_run_says_whether_factor_i_is_high(k):
    design = full_factorial([f"f{i}" for i in range(k)])
    for run in range(2**k):
        assert [x == 1 for x in design.X[run]] == [bool(run >> i & 1) for i in range(k)]
    assert design.X.dtype == np.int8
    assert set(np.unique(design.X)) == {-1, 1}
    assert design.words == []
    assert design.resolution == math.inf
    assert design.alias(k) == {}


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4))
@quickly
def test_numbers_of_levels_give_every_combination_once_with_the_first_factor_fastest(levels):
    design = full_factorial({f"f{i}": n for i, n in enumerate(levels)})
    expected = [combo[::-1] for combo in product(*(range(n) for n in reversed(levels)))]
    assert [tuple(row) for row in design.X] == expected
    assert design.X.dtype == np.int8
    assert (design.words, design.generators, design.alias(), design.resolution) == ([], [], {}, math.inf)


@given(fractions())
@quickly
def test_every_word_is_constant_and_no_other_product_is(generators):
    design = fractional_factorial([f"f{i}" for i in range(len(generators))], generators)
    found = {}
    for name, column in columns(design, len(generators)).items():
        if abs(column.sum()) == len(column):
            found[("-" if column[0] < 0 else "") + name] = name.count(":") + 1
    assert set(design.words) == set(found)
    assert len(design.words) == len(set(design.words)) == 2 ** (len(generators) - int(math.log2(len(design.X)))) - 1
    assert design.resolution == min(found.values(), default=math.inf)
    lengths = [found[word] for word in design.words]
    assert lengths == sorted(lengths)


@given(fractions(), st.integers(1, 4))
@quickly
def test_aliases_are_the_effects_with_the_same_column_up_to_sign(generators, order):
    design = fractional_factorial([f"f{i}" for i in range(len(generators))], generators)
    effects = columns(design, min(order, len(generators)))
    expected = {}
    for name, column in effects.items():
        same = [other for other, c in effects.items() if other != name and abs(c @ column) == len(column)]
        if same:
            expected[name] = same
    assert design.alias(order) == expected
    assert list(design.alias(order)) == list(expected)


@given(fractions())
@quickly
def test_the_columns_are_the_products_of_the_basic_ones(generators):
    design = fractional_factorial([f"f{i}" for i in range(len(generators))], generators)
    bare = [g.removeprefix("-") for g in generators]
    first = {}
    for i, g in enumerate(bare):
        if len(g) == 1:
            first.setdefault(g, i)
    for run, row in enumerate(design.X):
        basic = {c: 1 if run >> bit & 1 else -1 for bit, c in enumerate(first)}
        for x, g, letters in zip(row, generators, bare, strict=True):
            assert x == (-1 if g[0] == "-" else 1) * math.prod(basic[c] for c in letters)


@pytest.mark.parametrize("generators", ["a b ab", "a b c -abc", "a b c d abcd", "a b c ab ac bc abc", "a -b c -abc"])
def test_the_runs_are_those_of_pydoe(generators):
    design = fractional_factorial([f"f{i}" for i in range(len(generators.split()))], generators.split())
    peer = pyDOE3.fracfact(generators)
    assert sorted(map(tuple, design.X.tolist())) == sorted(map(tuple, peer.astype(int).tolist()))
    unsigned = pyDOE3.fracfact(generators.replace("-", ""))  # its alias table overlooks aliases of opposite sign
    chains = [set(line.split(" = ")) for line in pyDOE3.fracfact_aliasing(unsigned)[0] if " = " in line]
    letters = dict(zip(design.names, "abcdefghijkl", strict=False))
    ours = {frozenset("".join(letters[f] for f in e.split(":")) for e in [effect, *others])
            for effect, others in design.alias(len(design.names)).items()}
    inert = {"".join(letters[f] for f in word.removeprefix("-").split(":")) for word in design.words}
    assert {c for c in ours if not c <= inert} == {frozenset(c) for c in chains if not c <= inert}


def test_the_half_fraction_of_five_factors_is_the_one_of_the_textbooks():
    design = fractional_factorial(FIVE, ["a", "b", "c", "d", "abcd"])
    assert design.words == ["topology:role:scale:protocol:diversity"]
    assert design.resolution == 5
    assert design.X.shape == (16, 5)
    assert design.alias() == {}
    assert design.alias(3)["topology:role"] == ["scale:protocol:diversity"]
    assert design.generators == ["a", "b", "c", "d", "abcd"]


def test_words_carry_their_sign_and_stand_in_design_order():
    design = fractional_factorial(list("abcde"), ["a", "b", "c", "-ab", "ac"])
    assert design.words == ["-a:b:d", "a:c:e", "-b:c:d:e"]
    assert design.resolution == 3
    assert design.alias()["a"] == ["b:d", "c:e"]
    assert design.alias()["b:d"] == ["a", "c:e"]
    assert fractional_factorial(list("wxy"), ["-a", "b", "ab"]).words == ["-w:x:y"]


BOX_HUNTER = {3: (4, 8, 8, 8, 8, 16, 16, 16, 16), 4: (None, 8, 16, 16, 16, 16, 32, 32, 32),
              5: (None, None, 16, 32, 64, 64, 128, 128, 128)}  # 3 to 11 factors


@pytest.mark.parametrize("resolution", BOX_HUNTER)
def test_the_fewest_runs_are_those_of_the_published_tables(resolution):
    for k, runs in zip(range(3, 12), BOX_HUNTER[resolution], strict=True):
        if runs:
            design = fractional_factorial([f"f{i}" for i in range(k)], resolution=resolution)
            assert len(design.X) == runs
            assert design.resolution >= resolution
            again = fractional_factorial(design.names, design.generators)
            assert np.array_equal(again.X, design.X)


@pytest.mark.parametrize(("k", "resolution", "runs"), [(17, 5, 256), (18, 6, 512), (15, 7, 1024), (16, 8, 2048), (12, 12, 2048)])
def test_larger_searches_find_the_best_codes(k, resolution, runs):
    design = fractional_factorial([f"f{i}" for i in range(k)], resolution=resolution)
    assert len(design.X) == runs
    assert design.resolution == resolution


def reaches(k, m, resolution):
    """Whether some fraction with 2**m runs has the resolution, by trying all sets of generators."""
    words = [b for b in range(2**m) if b.bit_count() > 1]
    for extra in combinations(words, k - m):
        chosen = [1 << i for i in range(m)] + list(extra)
        sums = {0}
        for size in range(1, resolution):
            sums = {x for c in combinations(chosen, size) if (x := _xor(c)) == 0}
            if sums:
                break
        if not sums:
            return True
    return False


def _xor(values):
    total = 0
    for v in values:
        total ^= v
    return total


@pytest.mark.parametrize(("k", "resolution"), [(k, r) for k in range(3, 8) for r in range(3, k + 1)])
def test_no_fraction_with_half_the_runs_would_do(k, resolution):
    design = fractional_factorial([f"f{i}" for i in range(k)], resolution=resolution)
    m = int(math.log2(len(design.X)))
    assert reaches(k, m, resolution)
    assert not reaches(k, m - 1, resolution)


def test_saturated_designs_have_a_resolution_and_aliases_though_their_words_are_too_many():
    design = fractional_factorial([f"f{i}" for i in range(31)], resolution=3)
    assert design.X.shape == (32, 31)
    assert design.resolution == 3
    assert len(design.alias()["f0"]) == 15
    with pytest.raises(ValueError, match=r"2\^26 words, at most 2\^20 are listed: use alias\(\)"):
        _ = design.words


def test_a_frame_holds_the_runs_and_is_a_copy():
    design = full_factorial(["x", "y"])
    frame = design.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert (list(frame.columns), frame.index.name) == (["x", "y"], "run")
    assert np.array_equal(frame.to_numpy(), design.X)
    frame.iloc[0, 0] = 9
    assert design.X[0, 0] == -1


def test_designs_do_not_change_and_keep_their_inputs():
    names, generators, levels = ["x", "y", "z"], ["a", "b", "-ab"], {"x": 3, "y": 2}
    design = fractional_factorial(names, generators)
    full_factorial(levels)
    assert (names, generators, levels) == (["x", "y", "z"], ["a", "b", "-ab"], {"x": 3, "y": 2})
    with pytest.raises(ValueError, match="read-only"):
        design.X[0, 0] = 1
    names.append("w")
    generators[0] = "c"
    assert (design.names, design.generators) == (["x", "y", "z"], ["a", "b", "-ab"])
    design.words.clear()
    assert design.words == ["-x:y:z"]


@pytest.mark.parametrize(("names", "error", "text"), [
    ([], ValueError, "a design needs at least one factor, got []"),
    ("abc", TypeError, "names must be a list of strings, got the string 'abc'"),
    (["a", 1], TypeError, "a factor's name must be a string, got 1"),
    (["a", "b:c"], ValueError, "must not be empty, hold ':' or start with '-', got 'b:c'"),
    (["a", ""], ValueError, "must not be empty, hold ':' or start with '-', got ''"),
    (["-a"], ValueError, "must not be empty, hold ':' or start with '-', got '-a'"),
    (["a", "b", "a"], ValueError, "factor 'a' is named twice"),
])
def test_bad_names_are_refused(names, error, text):
    for make in (full_factorial, lambda n: fractional_factorial(n, resolution=3)):
        with pytest.raises(error) as caught:
            make(names)
        assert text in str(caught.value)


@pytest.mark.parametrize(("levels", "error", "text"), [
    ({"x": 1}, ValueError, "levels of 'x' must be >= 2, got 1"),
    ({"x": 2.0}, TypeError, "levels of 'x' must be an integer, got 2.0"),
    ({"x": 2, "y": 128}, ValueError, "a factor has at most 127 levels, got 128"),
    ({f"f{i}": 2 for i in range(21)}, ValueError, "the design would have 2097152 runs, at most 1048576 are made"),
])
def test_bad_levels_are_refused(levels, error, text):
    with pytest.raises(error) as caught:
        full_factorial(levels)
    assert text in str(caught.value)


@pytest.mark.parametrize(("generators", "error", "text"), [
    (["a", "b"], ValueError, "2 generators for 3 factors: give one each"),
    ("abc", TypeError, "generators must be a list of strings, got the string 'abc'"),
    (["a", "b", "abc"], ValueError, "generator 'abc' names 'c', which is no basic column (basic: a, b)"),
    (["a", "ab", "-ab"], ValueError, "generator 'ab' names 'b', which is no basic column (basic: a)"),
    (["ab", "ab", "ab"], ValueError, "generator 'ab' names 'a', which is no basic column (basic: none)"),
    (["a", "b", "aba"], ValueError, "generator 'aba' repeats a letter"),
    (["a", "b", "AB"], ValueError, "a generator is lower-case letters with an optional '-' in front, got 'AB'"),
    (["a", "b", ""], ValueError, "a generator is lower-case letters with an optional '-' in front, got ''"),
    (["a", "b", 3], ValueError, "a generator is lower-case letters with an optional '-' in front, got 3"),
])
def test_bad_generators_are_refused(generators, error, text):
    with pytest.raises(error) as caught:
        fractional_factorial(["x", "y", "z"], generators)
    assert text in str(caught.value)


def test_other_bad_requests_are_refused():
    with pytest.raises(ValueError, match="no 2\\^{k-p} design of resolution 6 for 5 factors in 16 runs"):
        fractional_factorial(FIVE, resolution=6)
    with pytest.raises(ValueError, match="resolution must be >= 3, got 2"):
        fractional_factorial(FIVE, resolution=2)
    with pytest.raises(TypeError, match="resolution must be an integer, got 4.0"):
        fractional_factorial(FIVE, resolution=4.0)
    with pytest.raises(ValueError, match="give generators or resolution, got None and None"):
        fractional_factorial(FIVE)
    with pytest.raises(ValueError, match=r"give generators or resolution, got \['a'\] and 3"):
        fractional_factorial(["x"], ["a"], 3)
    with pytest.raises(ValueError, match="resolution 5 is searched for up to 17 factors, got 18: give generators"):
        fractional_factorial([f"f{i}" for i in range(18)], resolution=5)
    with pytest.raises(ValueError, match="resolution 6 is searched for up to 18 factors, got 19: give generators"):
        fractional_factorial([f"f{i}" for i in range(19)], resolution=6)
    with pytest.raises(ValueError, match="the design would have 2097152 runs"):
        fractional_factorial([f"f{i}" for i in range(21)], list("abcdefghijklmnopqrstu"))
    with pytest.raises(ValueError, match="order must be >= 1, got 0"):
        full_factorial(["x"]).alias(0)
    with pytest.raises(TypeError, match="order must be an integer, got 1.5"):
        full_factorial(["x"]).alias(1.5)


def test_a_design_is_not_compared_by_arrays():
    design = full_factorial(["x"])
    assert isinstance(design, Design)
    assert design == design
    assert design != full_factorial(["x"])
