"Two groups and several levels, against other libraries, enumeration and simulated worlds in which the truth is known."

import itertools
import math

import numpy as np
import pytest

from valuecot.stats import (
    Mean,
    correlation,
    detectable_difference,
    equivalence,
    error_by_level,
    hierarchical_bootstrap,
    mean_se,
    paired_levels,
    permutation_test,
    welch,
)  # fmt: skip


def two(seed: int, n_a: int = 5, n_b: int = 9, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(0, 1, n_a), random.normal(shift, 3, n_b)


def same(a, b) -> bool:
    "Equal records, nan equal to nan."
    return repr(a) == repr(b)


# ---- Welch
@pytest.mark.parametrize("n_a, n_b", [(2, 2), (3, 3), (4, 20), (50, 7)])
def test_welch_equals_scipy(n_a, n_b):
    from scipy.stats import ttest_ind, ttest_ind_from_stats

    for seed in range(8):
        a, b = two(seed, n_a, n_b)
        found, theirs = welch(mean_se(a, "runs"), mean_se(b, "runs"), 0.9), ttest_ind(a, b, equal_var=False)
        interval = theirs.confidence_interval(0.9)
        assert (found.t, found.df, found.pvalue, found.low, found.high) == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue, interval.low, interval.high))
        stats = ttest_ind_from_stats(a.mean(), a.std(ddof=1), n_a, b.mean(), b.std(ddof=1), n_b, equal_var=False)
        assert found.pvalue == pytest.approx(stats.pvalue) and found.over == "runs" and found.note == ""


def test_the_papers_tables():
    base, standard, annealing = (Mean(m, se, 3, "subsets") for m, se in ((4083.87, 156.53), (1345.65, 15.60), (1218.04, 43.31)))
    found = welch(standard, annealing)
    assert (round(found.t, 2), round(found.df, 1), round(found.pvalue, 3)) == (2.77, 2.5, 0.085)
    assert (round(welch(base, standard).pvalue, 3), round(welch(base, annealing).pvalue, 4)) == (0.003, 0.0016)
    llama = welch(Mean(842.51, 3.68, 3, "subsets"), Mean(809.36, 1.46, 3, "subsets"))
    assert (round(llama.t, 1), round(llama.pvalue, 3)) == (8.4, 0.006)


def test_what_must_not_change_welchs_p():
    a, b = (mean_se(x, "runs") for x in two(3))
    found, mirrored = welch(a, b), welch(b, a)
    assert mirrored.pvalue == found.pvalue and (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    tiny = welch(*(Mean(1e-200 * m.mean, 1e-200 * m.se, m.n, "runs") for m in (a, b)))
    assert (tiny.pvalue, tiny.df) == pytest.approx((found.pvalue, found.df))
    assert welch(a, Mean(b.mean, b.se, b.n, "subsets")).over == "runs; subsets"


@pytest.mark.parametrize("a, b, note", [
    (Mean(3, math.nan, 1, "seeds"), Mean(1, 1, 3, "seeds"), "the first mean has no error (n = 1)"),
    (Mean(3, 1, 3, "seeds"), Mean(1, math.nan, 4, "seeds"), "the second mean has no error (n = 4)"),
    (Mean(3, 1, 1, "seeds"), Mean(1, 1, 3, "seeds"), "the first mean has no error (n = 1)"),
    (Mean(3, 0, 3, "seeds"), Mean(1, 0, 3, "seeds"), "neither mean varied (both errors are 0)"),
    (Mean(math.nan, 1, 3, "seeds"), Mean(1, 1, 3, "seeds"), "the first mean is nan"),
    (Mean(3, 1, 3, "seeds"), Mean(1, math.inf, 3, "seeds"), "the second mean has no error (n = 3)"),
])  # fmt: skip
def test_a_mean_without_an_error_leaves_the_table_going(a, b, note):
    found, alike = welch(a, b), equivalence(a, b, 10)
    assert found.note == alike.note == note and not alike.equivalent and math.isnan(alike.pvalue) and math.isnan(alike.low)
    assert all(math.isnan(x) for x in (found.se, found.t, found.df, found.pvalue, found.low, found.high))
    assert math.isnan(found.difference) or found.difference == 2


def test_one_error_of_zero_is_an_error():
    from scipy.stats import ttest_ind

    found = welch(mean_se([2.0, 2.0, 2.0], "seeds"), mean_se([1.0, 1.5, 0.5], "seeds"))
    assert found.pvalue == pytest.approx(ttest_ind([2.0, 2.0, 2.0], [1.0, 1.5, 0.5], equal_var=False).pvalue) and found.df == 2


@pytest.mark.parametrize("call, said", [
    (lambda: welch(Mean(0, -1, 3, "s"), Mean(0, 1, 3, "s")), "the first mean has se = -1"),
    (lambda: welch(Mean(0, 1, 3, "s"), Mean(0, 1, 3, "s"), level=95), "level = 95"),
    (lambda: equivalence(Mean(0, 1, 3, "s"), Mean(0, 1, 3, "s"), margin=0), "margin = 0"),
    (lambda: equivalence(Mean(0, 1, 3, "s"), Mean(0, 1, 3, "s"), margin=math.nan), "margin = nan"),
    (lambda: equivalence(Mean(0, 1, 3, "s"), Mean(0, 1, 3, "s"), margin=1, level=0.6), "level = 0.6"),
    (lambda: permutation_test([], [1.0]), "a has shape"),
    (lambda: permutation_test([1.0, math.nan], [1.0]), r"a\[1\] is not a finite number"),
    (lambda: permutation_test([1.0, 2.0], [1.0], paired=True), "2 of a, 1 of b"),
    (lambda: detectable_difference(-1, 3, 3), "sd = -1"),
    (lambda: detectable_difference(1, 0, 3), "n_a = 0"),
    (lambda: detectable_difference(1, 3, 3, power=80), "power = 80"),
    (lambda: detectable_difference(1, 3, 3, power=0.05), "reached without any difference"),
    (lambda: correlation([1, 2, 3], [1, 2]), "3 of x, 2 of y"),
    (lambda: correlation([1, 2, math.inf], [1, 2, 3]), r"x\[2\] is not a finite number"),
    (lambda: correlation([1, 2, 3], [1, 2, 3], clusters=["a", None, "b"]), r"clusters\[1\] is None"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# ---- permutation
@pytest.mark.parametrize("n_a, n_b", [(3, 3), (2, 6), (5, 4), (7, 2)])
def test_permutation_equals_scipy(n_a, n_b):
    from scipy.stats import permutation_test as oracle

    for seed in range(5):
        a, b = (np.round(x, 1) for x in two(seed, n_a, n_b))  # rounded: ties
        theirs = oracle((a, b), lambda x, y, axis: np.abs(x.mean(axis) - y.mean(axis)), vectorized=True, alternative="greater", n_resamples=np.inf)
        found = permutation_test(a, b)
        assert found.exact and found.pvalue == pytest.approx(theirs.pvalue) and found.arrangements == found.draws == math.comb(n_a + n_b, n_a)
        assert found.difference == pytest.approx(a.mean() - b.mean()) and found.floor <= found.pvalue <= 1


def test_paired_permutation_equals_enumeration_and_scipy():
    from scipy.stats import permutation_test as oracle

    for seed in range(5):
        a, b = (np.round(x, 1) for x in two(seed, 7, 7))
        sums = [abs(np.dot(signs, a - b)) for signs in itertools.product((-1, 1), repeat=7)]
        found = permutation_test(a, b, paired=True)
        assert found.pvalue == pytest.approx(np.mean(np.array(sums) >= abs((a - b).sum()) - 1e-9)) and found.exact
        theirs = oracle((a, b), lambda x, y, axis: np.abs((x - y).mean(axis)), permutation_type="samples", vectorized=True, alternative="greater", n_resamples=np.inf)
        assert found.pvalue == pytest.approx(theirs.pvalue)


def test_the_floor_is_the_smallest_p():
    assert permutation_test([1, 2, 3], [10, 11, 12]).pvalue == permutation_test([1, 2, 3], [2.5, 1.3, 7]).floor == 0.1
    assert permutation_test([1, 2, 3], [10, 11, 13], paired=True).pvalue == 0.25
    assert permutation_test([1, 2, 3, 9], [1, 2, 3, 4], paired=True).floor == 1.0  # one pair differs: its sign says nothing
    one = permutation_test([5], [1])
    assert (one.pvalue, one.floor, one.exact) == (1, 1, True)
    assert permutation_test([9], [1, 2, 3, 4]).pvalue == 1 / 5  # one against four: five ways
    drawn = permutation_test(np.arange(40), np.arange(40) + 100, draws=199)
    assert (drawn.pvalue, drawn.floor, drawn.exact, drawn.draws) == (1 / 200, 1 / 200, False, 199)


def test_drawn_arrangements_agree_with_all_of_them():
    a, b = two(1, 9, 9)
    for paired, arrangements in ((False, math.comb(18, 9)), (True, 512)):
        exact = permutation_test(a, b, paired, draws=arrangements)
        drawn = permutation_test(a, b, paired, draws=arrangements - 1 if paired else 20_000)
        assert exact.exact and not drawn.exact and drawn.pvalue == pytest.approx(exact.pvalue, abs=4 * math.sqrt(0.25 / drawn.draws))
    assert permutation_test(a, b, draws=500) == permutation_test(a, b, draws=500) != permutation_test(a, b, draws=500, seed=1)


def test_permutation_does_not_see_unit_origin_or_order():
    a, b = two(4)
    found = permutation_test(a, b)
    assert permutation_test(1e6 + 1000 * a, 1e6 + 1000 * b).pvalue == found.pvalue == permutation_test(b, a).pvalue == permutation_test(a[::-1], b).pvalue


def test_permutation_holds_its_level():
    random = np.random.default_rng(0)
    hits = np.mean([permutation_test(x[:4], x[4:]).pvalue <= 0.05 for x in random.exponential(size=(400, 9))])
    assert hits < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


# ---- equivalence
def test_equivalence_equals_statsmodels():
    from statsmodels.stats.weightstats import ttost_ind

    for seed in range(10):
        a, b = two(seed, 12, 20, shift=0.3)
        found = equivalence(mean_se(a, "runs"), mean_se(b, "runs"), margin=1.5, level=0.1)
        assert found.pvalue == pytest.approx(ttost_ind(a, b, -1.5, 1.5, usevar="unequal")[0])
        assert found.equivalent == (found.pvalue < 0.1) == (-1.5 < found.low and found.high < 1.5)


def test_equivalence_by_hand():
    from scipy.stats import t

    found = equivalence(Mean(1.0, 0.3, 10, "s"), Mean(1.2, 0.4, 10, "s"), margin=2.0)
    df = 0.25**2 / (0.09**2 / 9 + 0.16**2 / 9)
    assert found.pvalue == pytest.approx(max(t.sf((-0.2 + 2) / 0.5, df), t.cdf((-0.2 - 2) / 0.5, df)))
    assert (found.low, found.high) == pytest.approx((-0.2 - t.ppf(0.95, df) * 0.5, -0.2 + t.ppf(0.95, df) * 0.5)) and found.equivalent
    assert not equivalence(Mean(1.0, 0.3, 10, "s"), Mean(1.2, 0.4, 10, "s"), margin=0.1).equivalent


# ---- power
@pytest.mark.parametrize("n_a, n_b, power, level", [(3, 3, 0.8, 0.05), (2, 5, 0.5, 0.05), (10, 40, 0.9, 0.01), (300, 200, 0.95, 0.1)])
def test_detectable_difference_equals_statsmodels(n_a, n_b, power, level):
    from statsmodels.stats.power import TTestIndPower

    found = detectable_difference(2.5, n_a, n_b, power, level)
    assert TTestIndPower().power(found / 2.5, n_a, level, ratio=n_b / n_a) == pytest.approx(power, abs=1e-6)


def test_a_detectable_difference_is_found_that_often():
    from scipy.stats import ttest_ind

    delta, random = detectable_difference(1.0, 4, 6), np.random.default_rng(0)
    found = ttest_ind(random.normal(delta, 1, (4, 20_000)), random.normal(0, 1, (6, 20_000))).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 20_000))


def test_detectable_differences_at_the_edges():
    assert detectable_difference(1, 1, 1) == math.inf and detectable_difference(0, 3, 3) == 0 and math.isnan(detectable_difference(math.nan, 3, 3))
    wide = detectable_difference(1, 1, 2)  # one degree of freedom
    assert 19 < wide < 21 and detectable_difference(1, 1, 2, power=0.99) > wide
    assert detectable_difference(3, 5, 7) == pytest.approx(3 * detectable_difference(1, 7, 5))


# ---- correlation
def test_correlation_equals_scipy():
    from scipy.stats import permutation_test as oracle
    from scipy.stats import spearmanr

    for seed, n in ((0, 4), (1, 6), (2, 8)):
        x, y = np.round(np.random.default_rng(seed).normal(size=(2, n)), 1)  # rounded: ties
        found = correlation(x, y, draws=200)
        assert found.rho == pytest.approx(spearmanr(x, y).statistic) and found.exact
        if n < 8:
            theirs = oracle((x,), lambda z, y=y: abs(spearmanr(z, y).statistic), permutation_type="pairings", alternative="greater", n_resamples=np.inf)
            assert found.pvalue == pytest.approx(theirs.pvalue)
    x, y = np.random.default_rng(3).normal(size=(2, 200))
    large = correlation(x, x + 5 * y)
    assert large.rho == pytest.approx(spearmanr(x, x + 5 * y).statistic) and not large.exact and large.floor == 1 / 10_001
    assert large.pvalue == pytest.approx(spearmanr(x, x + 5 * y).pvalue, abs=0.01) and large.low < large.rho < large.high


def test_correlation_of_few_or_of_nothing():
    assert correlation([1, 2, 3], [3, 5, 4], draws=50).floor == pytest.approx(1 / 3)
    for x, y, said in (([1, 2], [1, 2], "2 of rows: two points always lie on a line"), ([1, 1, 1], [1, 2, 3], "x never varies"), ([2, 2, 2], [1, 1, 1], "x and y never varies")):
        found = correlation(x, y)
        assert math.isnan(found.rho) and math.isnan(found.pvalue) and math.isnan(found.low) and said in found.note


def test_correlation_over_clusters_is_that_of_their_means():
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), random.integers(1, 6, 12))
    x, y = random.normal(size=(2, len(clusters)))
    means = [[v[clusters == c].mean() for c in range(12)] for v in (x, y)]
    assert same(correlation(x, y, clusters, draws=300, over="rows"), correlation(*means, draws=300))
    assert correlation(x, y, clusters, draws=300, over="questions").n == 12


def test_correlation_sees_ranks_alone():
    x, y = np.random.default_rng(5).normal(size=(2, 20))
    assert same(correlation(x, y, draws=300), correlation(np.exp(x), 10 * y - 3, draws=300))
    assert correlation(x, -y, draws=300).rho == pytest.approx(-correlation(x, y, draws=300).rho)


# ---- levels
def nested(random, seeds: int = 6, prompts: int = 5, between: float = 1.0, inside: float = 2.0) -> tuple[np.ndarray, dict]:
    seed = np.repeat(np.arange(seeds), prompts)
    return random.normal(0, between, seeds)[seed] + random.normal(0, inside, len(seed)), {"seed": seed, "prompt": np.arange(len(seed))}


def crossed(random, seeds: int = 4, subsets: int = 3, prompts: int = 2) -> tuple[np.ndarray, dict]:
    s, p = (x.ravel() for x in np.meshgrid(np.arange(seeds), np.arange(subsets * prompts), indexing="ij"))
    return random.normal(0, 1, seeds)[s] + random.normal(0, 2, subsets)[p // prompts] + random.normal(size=len(s)), {"seed": s, "subset": p // prompts, "prompt": p}


def test_the_drawn_means_vary_as_the_closed_form_says():
    from valuecot.stats.levels import design_of, replicates, row_counts

    x, levels = nested(np.random.default_rng(0))
    table = x.reshape(6, 5)
    counts = row_counts(design_of(levels), 40_000, np.random.default_rng(1))
    want = table.mean(1).var() / 6 + table.var(1).mean() / 5 / 6  # between drawn seeds, and within each of their copies
    assert (counts.sum(1) == 30).all() and replicates(np.mean, x, counts).var() == pytest.approx(want, rel=0.04)
    plain = {"prompt": np.arange(30)}
    assert replicates(np.mean, x, row_counts(design_of(plain), 40_000, np.random.default_rng(2))).var() == pytest.approx(x.var() / 30, rel=0.04)


def test_crossed_levels_are_drawn_by_themselves():
    from valuecot.stats.levels import design_of, row_counts

    _, levels = crossed(np.random.default_rng(0))
    design = design_of(levels)
    assert [x.parent for x in design] == ["", "", "subset"]
    for counts in row_counts(design, 50, np.random.default_rng(0)).reshape(50, 4, 3, 2):
        assert np.linalg.matrix_rank(counts.reshape(4, 6)) == 1  # seed times prompt
        assert set(counts.sum(0).sum(1) / 4 / 2) <= {0, 1, 2, 3} and counts.sum() == 24  # each copy of a subset brings two prompts


def covers(worlds: int, seeds: int, prompts: int) -> float:
    hits = 0
    for i in range(worlds):
        x, levels = nested(np.random.default_rng([7, i]), seeds, prompts, between=1.0, inside=1.0)
        hits += not hierarchical_bootstrap(x, levels, draws=300, seed=i).excludes(0)
    return hits / worlds


def closed_coverage(seeds: int, prompts: int) -> float:
    "Coverage of a normal interval whose variance is that of the draws."
    from scipy.stats import norm, t

    true = 1 / seeds + 1 / seeds / prompts
    drawn = (1 + 1 / prompts) * (seeds - 1) / seeds / seeds + (1 - 1 / prompts) / prompts / seeds
    return 2 * t.cdf(norm.ppf(0.975) * math.sqrt(drawn / true * seeds / (seeds - 1)) * math.sqrt((seeds - 1) / seeds), seeds - 1) - 1


@pytest.mark.parametrize("seeds", [5, 30])
def test_intervals_over_levels_cover_as_the_closed_form_says(seeds):
    want = closed_coverage(seeds, 5)
    assert covers(200, seeds, 5) == pytest.approx(want, abs=3.5 * math.sqrt(want * (1 - want) / 200) + 0.01)
    assert want > 0.94 if seeds == 30 else want < 0.9


@pytest.mark.prove
def test_intervals_over_levels_cover_in_many_worlds():
    for seeds in (3, 40):
        want = closed_coverage(seeds, 10)
        assert covers(3000, seeds, 10) == pytest.approx(want, abs=0.03 if seeds == 3 else 0.015)


def test_intervals_over_subsets_alone_miss_what_seeds_do():
    missed, whole = 0, 0
    for i in range(60):
        random = np.random.default_rng(i)
        s, p = (x.ravel() for x in np.meshgrid(np.arange(12), np.arange(20), indexing="ij"))
        x = random.normal(0, 1, 12)[s] + random.normal(0, 1, 20)[p]
        missed += hierarchical_bootstrap(x, {"subset": p}, draws=300).excludes(0)
        whole += hierarchical_bootstrap(x, {"seed": s, "subset": p}, draws=300).excludes(0)
    assert missed > whole and whole / 60 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60) + 0.02


def test_a_level_of_one_is_named_and_not_drawn():
    x, levels = crossed(np.random.default_rng(0), seeds=1)
    found = hierarchical_bootstrap(x, levels, draws=200)
    assert found.not_covered == ("seed",) and found.over == "subset, prompt" and found.clusters == 3
    assert found.covers == "drawn again: subset, prompt; not covered: seed" and "3 of subset" in found.note
    without = {k: v for k, v in levels.items() if k != "seed"}
    assert (found.low, found.high) == (hierarchical_bootstrap(x, without, draws=200).low, hierarchical_bootstrap(x, without, draws=200).high)
    nothing = hierarchical_bootstrap([1.0, 2.0], {"seed": [0, 0], "subset": [1, 1]})
    assert math.isnan(nothing.low) and nothing.covers == "drawn again: nothing; not covered: seed, subset" and not nothing.excludes(99)


def test_one_level_is_the_plain_bootstrap():
    from valuecot.stats import bootstrap

    x, levels = nested(np.random.default_rng(0), seeds=30)
    ours = hierarchical_bootstrap(x, {"seed": levels["seed"]}, draws=20_000)
    theirs = bootstrap(lambda rows: x[rows].mean(), levels["seed"], draws=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03) and ours.estimate == pytest.approx(theirs.estimate)


def test_any_statistic_is_that_of_the_drawn_values():
    x, levels = nested(np.random.default_rng(0))
    slow, fast = hierarchical_bootstrap(x, levels, lambda v: float(v.mean()), draws=300), hierarchical_bootstrap(x, levels, draws=300)
    assert (slow.low, slow.high, slow.estimate) == pytest.approx((fast.low, fast.high, fast.estimate))
    assert hierarchical_bootstrap(x, levels, draws=300, seed=1) != fast == hierarchical_bootstrap(x, levels, draws=300)
    order = np.random.default_rng(1).permutation(len(x))
    again = error_by_level(x[order], {k: v[order] for k, v in levels.items()})
    assert [e.se for e in again] == pytest.approx([e.se for e in error_by_level(x, levels)])


def test_errors_of_a_crossed_design_are_those_of_its_margins():
    x, levels = crossed(np.random.default_rng(2))
    seed, subset, prompt = error_by_level(x, levels)
    table = x.reshape(4, 3, 2)
    assert seed.se == pytest.approx(mean_se(table.mean((1, 2)), "seed").se) and (seed.n, seed.df, seed.within) == (4, 3, "")
    assert subset.se == pytest.approx(mean_se(table.mean((0, 2)), "subset").se) and (subset.n, subset.within) == (3, "")
    inside = table.mean(0).var(1, ddof=1) / 2
    assert prompt.se == pytest.approx(math.sqrt(inside.sum()) / 3) and (prompt.n, prompt.df, prompt.within) == (6, 3, "subset")
    assert seed.mean == pytest.approx(x.mean()) and [e.over for e in (seed, subset, prompt)] == ["seed", "subset", "prompt"]


def test_errors_of_a_nested_design_leave_out_what_is_around():
    x, levels = nested(np.random.default_rng(3))
    moved = x + 1000 * levels["seed"]
    a, b = error_by_level(x, levels), error_by_level(moved, levels)
    assert a[1].se == pytest.approx(b[1].se) and b[0].se > 100 * a[0].se and a[1].within == "seed" and a[1].df == 24


def test_students_interval_over_seeds_covers_with_three():
    found = [error_by_level(*nested(np.random.default_rng([9, i]), seeds=3))[0] for i in range(400)]
    assert np.mean([e.low <= 0 <= e.high for e in found]) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 400))


def test_errors_that_a_design_cannot_give():
    alone, only = error_by_level([1.0, 2.0, 3.0], {"seed": [0, 0, 0], "subset": [0, 1, 2]}), error_by_level([1.0, 2.0], {"seed": [0, 1], "subset": ["a", "b"]})
    assert alone[0].note == "one seed: nothing says how others would do" and math.isnan(alone[0].se) and alone[1].se == pytest.approx(1 / math.sqrt(3))
    assert only[1].note == "one subset in a seed: not to be told apart from it" and only[0].se == pytest.approx(0.5)


def test_a_paired_difference_is_narrower_than_that_of_two():
    random = np.random.default_rng(0)
    s, p = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(12), indexing="ij"))
    hard = random.normal(0, 3, 12)[p]
    a, b = (m + hard + random.normal(0, 0.2, 5)[s] + random.normal(0, 0.1, 60) for m in (0.5, 0.0))
    found, alone = paired_levels(a, b, {"seed": s, "subset": p}, apart=("seed",)), hierarchical_bootstrap(a, {"seed": s, "subset": p})
    assert found.estimate == pytest.approx((a - b).mean()) and found.high - found.low < 0.5 * (alone.high - alone.low)
    mirrored = paired_levels(b, a, {"seed": s, "subset": p}, apart=("seed",))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=0.1)
    together, differences = paired_levels(a, b, {"seed": s, "subset": p}), hierarchical_bootstrap(a - b, {"seed": s, "subset": p})
    assert (together.low, together.high) == pytest.approx((differences.low, differences.high))


def test_seeds_apart_have_the_variance_of_two_trainings():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 30))
    twin = a.copy()  # the same spread by seed in both arms, by chance
    apart, paired = paired_levels(a, twin, {"seed": range(30)}, apart=("seed",)), paired_levels(a, twin, {"seed": range(30)})
    assert (paired.low, paired.high) == (0, 0)  # paired by number, nothing seems to vary
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * math.sqrt(2 * a.var() / 30), rel=0.1)
    assert paired_levels(a, b, {"seed": range(30)}, apart=("seed",)).over == "seed"


@pytest.mark.parametrize("call, said", [
    (lambda: hierarchical_bootstrap([1.0], {}), "no levels"),
    (lambda: hierarchical_bootstrap([], {"seed": []}), "shape"),
    (lambda: hierarchical_bootstrap([1.0, 2.0], {"seed": [0, 1, 2]}), "2 of values, 3 of levels"),
    (lambda: hierarchical_bootstrap([1.0, 2.0], {"seed": [0, 1], "subset": [0]}), "2 of seed, 1 of subset"),
    (lambda: hierarchical_bootstrap([1.0, 2.0], {"seed": [0, None]}), r"seed\[1\] is None"),
    (lambda: hierarchical_bootstrap([1.0, math.nan], {"seed": [0, 1]}), r"values\[1\] is not a finite number"),
    (lambda: hierarchical_bootstrap(np.ones(8), {"seed": [0] * 4 + [1] * 4, "subset": [0, 0, 1, 1, 2, 2, 3, 3], "view": [0, 1, 0, 1, 2, 3, 2, 3]}), "subset and view are crossed with each other within seed"),
    (lambda: error_by_level([1.0, 2.0], {"seed": []}), "empty"),
    (lambda: paired_levels([1.0, 2.0], [1.0], {"seed": [0, 1]}), "2 of a, 1 of b"),
    (lambda: paired_levels([1.0, 2.0], [1.0, 3.0], {"seed": [0, 1]}, apart=("subset",)), "apart names subset"),
    (lambda: paired_levels(np.ones(4), np.ones(4), {"seed": [0, 0, 1, 1], "prompt": range(4)}, apart=("seed",)), "prompt lies within another level"),
])  # fmt: skip
def test_designs_that_cannot_be_drawn_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
