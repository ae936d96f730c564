"Statistics against other libraries, enumeration and simulated worlds in which the truth is known."

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from valuecot.stats import (
    bootstrap,
    bootstrap_sums,
    cluster_codes,
    cluster_sums,
    design_effect,
    exact_binomial,
    flip_test,
    holm,
    mcnemar,
    minimum_detectable_effect,
    paired_interval,
    share,
)  # fmt: skip


# ---- McNemar
def pairs(seed: int, n: int, agree: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    a = random.random(n) < 0.6
    return a, np.where(random.random(n) < agree, a, random.random(n) < 0.5)


@pytest.mark.parametrize("agree", [0.0, 0.5, 0.95, 1.0])
def test_exact_test_equals_statsmodels(agree):
    from statsmodels.stats.contingency_tables import mcnemar as oracle

    for seed in range(25):
        a, b = pairs(seed, 5 + 7 * seed, agree)
        table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
        found = mcnemar(a, b)
        assert found.pvalue == pytest.approx(oracle(table, exact=True).pvalue, rel=1e-9)
        assert (found.b, found.c) == (table[0][1], table[1][0]) and found.difference == pytest.approx(a.mean() - b.mean())


def test_no_discordant_row_gives_one():
    assert mcnemar([True, False], [True, False]).pvalue == 1 == mcnemar([True, False], [True, False], ["q", "q"]).pvalue
    assert mcnemar([True, False], [False, True], ["q", "q"]).pvalue == 1  # one row gained, one lost, in one question


def test_cluster_permutation_equals_enumeration():
    for seed in range(12):
        a, b = pairs(seed, 30, 0.4)
        clusters = np.random.default_rng(seed + 100).integers(0, 8, 30)
        count = 0
        for swap in itertools.product([False, True], repeat=8):
            swapped = np.array(swap)[clusters]
            first, second = np.where(swapped, b, a), np.where(swapped, a, b)
            count += abs(int(first.sum()) - int(second.sum())) >= abs(int(a.sum()) - int(b.sum()))
        assert mcnemar(a, b, clusters).pvalue == pytest.approx(count / 2**8, rel=1e-12)


def test_what_must_not_change_p():
    a, b = pairs(3, 200, 0.6)
    clusters, order = np.random.default_rng(0).integers(0, 30, 200), np.random.default_rng(1).permutation(200)
    found, mirrored = mcnemar(a, b, clusters), mcnemar(b, a, clusters)
    assert mirrored.pvalue == pytest.approx(found.pvalue) and mirrored.difference == -found.difference and (mirrored.b, mirrored.c) == (found.c, found.b)
    assert mcnemar(a[order], b[order], clusters[order]).pvalue == pytest.approx(found.pvalue)
    assert mcnemar(a, b, [("set", int(c)) for c in clusters]) == found and mcnemar(a, b, range(200)).pvalue == pytest.approx(mcnemar(a, b).pvalue)
    assert mcnemar(a.astype(int).tolist(), b.astype(float), clusters) == found


def test_drawn_signs_agree_with_the_exact_distribution():
    differences = np.random.default_rng(0).integers(-4, 6, 40)
    exact, _ = flip_test(differences)
    drawn, said = flip_test(differences, limit=0, draws=50_000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 50_000)) and "50000 draws of signs, seed 0" in said
    assert flip_test(differences, limit=0, draws=500)[0] == flip_test(differences, limit=0, draws=500)[0] != flip_test(differences, seed=1, limit=0, draws=500)[0]
    assert flip_test(np.full(40, 3), limit=0, draws=99)[0] == pytest.approx(1 / 100)  # the data count as one draw: never 0


@pytest.mark.parametrize(
    "a, b, clusters, said",
    [
        ([True, None], [True, True], None, r"correct_a\[1\] is None"),
        ([True, True], [True, math.nan], None, r"correct_b\[1\] is nan"),
        ([0.5], [1], None, r"correct_a\[0\] is 0.5"),
        (["True"], [True], None, "want True or False"),
        ([True], [2], None, r"correct_b\[0\] is 2"),
        ([[True]], [[True]], None, "want True or False"),
        ([True, True], [True], None, "2 of correct_a, 1 of correct_b"),
        ([True, True], [True, True], ["q"], "1 of clusters"),
        ([True, True], [True, True], ["q", None], r"clusters\[1\] is"),
        ([True, True], [True, True], [1.0, math.nan], r"clusters\[1\] is"),
        ([], [], None, "correct_a is empty"),
    ],
)
def test_rows_that_cannot_be_compared(a, b, clusters, said):
    with pytest.raises(ValueError, match=said):
        mcnemar(a, b, clusters)


def worlds_without_effect(block: int, worlds: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Differences of two equally good methods (worlds, rows); sixty clusters of 20 to 50 rows, in blocks of rows that are copies of each other; 50: whole clusters."
    random = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(60), np.resize([20, 30, 40, 50], 60))
    copies = clusters if block == 50 else np.arange(len(clusters)) // block
    signs = random.choice([-1, 0, 1], p=[0.3, 0.4, 0.3], size=(worlds, copies.max() + 1)).astype(np.int8)
    return signs[:, copies], clusters, copies


def false_positives(block: int, worlds: int, seed: int = 0) -> tuple[float, float, float]:
    "Measured design effect, and shares of worlds that the exact and the clustered test call different."
    rows, clusters, _ = worlds_without_effect(block, worlds, seed)
    by_cluster = cluster_sums(rows.T.astype(int), clusters).T
    iid = np.mean([exact_binomial(int((w == 1).sum()), int((w == -1).sum())) < 0.05 for w in rows])
    clustered = np.mean([flip_test(d)[0] < 0.05 for d in by_cluster])
    return float(np.median([design_effect(w, clusters).design_effect for w in rows[:50]])), float(iid), float(clustered)


@pytest.mark.parametrize("block, effect", [(1, 1), (10, 10), (50, 40)])
def test_the_clustered_test_holds_its_level(block, effect):
    measured, iid, clustered = false_positives(block, worlds=600)
    assert measured == pytest.approx(effect, rel=0.15)
    assert abs(clustered - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 600)
    assert iid < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600) if effect == 1 else iid > 0.4


@pytest.mark.prove
@pytest.mark.parametrize("block, effect", [(1, 1), (10, 10), (50, 40)])
def test_the_clustered_test_holds_its_level_in_many_worlds(block, effect):
    _, iid, clustered = false_positives(block, worlds=4000, seed=1)
    assert abs(clustered - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 4000) and (iid < 0.06 if effect == 1 else iid > 0.4)


# ---- intervals
def lumpy(seed: int, clusters: int = 60) -> tuple[np.ndarray, np.ndarray]:
    "Right or wrong with a share of 0.6 that differs between clusters of unequal size."
    random = np.random.default_rng(seed)
    codes = np.repeat(np.arange(clusters), random.integers(5, 30, clusters))
    return random.random(len(codes)) < random.beta(3, 2, clusters)[codes], codes


def test_both_bootstraps_draw_the_same_rows():
    correct, codes = lumpy(0)
    slow = bootstrap(lambda rows: correct[rows].mean(), codes, draws=200, seed=5)
    assert slow == bootstrap_sums(share, codes, correct, np.ones(len(codes)), draws=200, seed=5)
    assert slow != bootstrap(lambda rows: correct[rows].mean(), codes, draws=200, seed=6)


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap as oracle

    values = np.random.default_rng(0).exponential(size=80)
    theirs = oracle((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    ours = bootstrap_sums(share, None, values, np.ones(80), draws=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01) and ours.over == "rows"


def coverage(worlds: int, draws: int, clustered: bool) -> float:
    hit = 0
    for seed in range(worlds):
        correct, codes = lumpy(seed)
        found = bootstrap_sums(share, codes if clustered else None, correct, np.ones(len(codes)), draws=draws)
        hit += not found.excludes(0.6)
    return hit / worlds


def test_intervals_over_clusters_cover():
    assert 0.91 < coverage(400, 400, clustered=True) < 0.98
    assert coverage(100, 200, clustered=False) < 0.8


@pytest.mark.prove
def test_intervals_over_clusters_cover_in_many_worlds():
    assert 0.93 < coverage(3000, 1000, clustered=True) < 0.96


def test_paired_interval_is_that_of_the_difference():
    correct, codes = lumpy(1)
    other = correct ^ (np.random.default_rng(0).random(len(codes)) < 0.05)
    found = paired_interval(correct, other, codes, over="questions")
    assert found.estimate == pytest.approx(correct.mean() - other.mean()) and found.low <= found.estimate <= found.high
    assert found.over == "questions" and found.clusters == 60 and found.draws == 2000
    mirrored = paired_interval(other, correct, codes)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_intervals_of_degenerate_data():
    one = bootstrap_sums(share, ["q"] * 3, [1, 0, 1], np.ones(3))
    assert math.isnan(one.low) and math.isnan(one.high) and one.estimate == pytest.approx(2 / 3) and not one.excludes(5)
    same = paired_interval([True, False, True], [True, False, True], [1, 2, 3])
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    rare = bootstrap_sums(share, range(3), [0, 0, 1], [0, 0, 1])  # a third of the draws hold no such row
    assert rare.estimate == 1 and rare.draws < 2000
    none = bootstrap_sums(share, range(3), [0, 0, 0], [0, 0, 0])
    assert math.isnan(none.estimate) and math.isnan(none.low) and none.draws == 0
    with pytest.raises(ValueError, match="n > 0"):
        bootstrap_sums(share, [], [], [])
    with pytest.raises(ValueError, match="rows must line up, got 2 of clusters, 3 of columns"):
        bootstrap_sums(share, "ab", [1, 1, 1], [1, 1, 1])
    with pytest.raises(ValueError, match="no rows"):
        bootstrap(len, [])


# ---- design effect
def test_a_planted_correlation_is_found():
    random = np.random.default_rng(0)
    for icc in (0.0, 0.1, 0.4):
        codes = np.repeat(np.arange(800), random.integers(2, 20, 800))
        values = math.sqrt(icc) * random.normal(size=800)[codes] + math.sqrt(1 - icc) * random.normal(size=len(codes))
        found = design_effect(values, codes)
        assert found.icc == pytest.approx(icc, abs=0.04)
        assert found.effective_n == pytest.approx(found.n / found.design_effect) and found.mean_size > len(codes) / 800


def test_correlation_of_equal_clusters_is_that_of_an_analysis_of_variance():
    from scipy.stats import f_oneway

    values = np.random.default_rng(0).normal(size=(7, 5)) + np.arange(7)[:, None]
    F = f_oneway(*values).statistic
    assert design_effect(values.ravel(), np.repeat(np.arange(7), 5)).icc == pytest.approx((F - 1) / (F + 4))


def test_design_effect_is_the_ratio_of_variances():
    rows, clusters, _ = worlds_without_effect(10, worlds=2000, seed=2)
    ratio = rows.mean(1).var() / (0.6 / rows.shape[1])
    assert ratio == pytest.approx(np.mean([design_effect(w, clusters).design_effect for w in rows[:100]]), rel=0.1)


def test_design_effect_of_degenerate_data():
    assert design_effect([1, 0, 1], "abc").design_effect == 1
    assert math.isnan(design_effect([1, 0, 1], "aaa").design_effect) and math.isnan(design_effect([1, 1, 1], "aab").effective_n)
    assert design_effect([1, 0, 1, 0], "aabb").design_effect == 1  # correlated below zero: counts as none
    with pytest.raises(ValueError, match="rows must line up"):
        design_effect([1.0], "ab")


def test_clusters_are_numbered_in_order_of_appearance():
    assert cluster_codes(["b", "a", "b", ("a", 1)]).tolist() == [0, 1, 0, 2]


# ---- many tests, few rows
def test_holm_by_its_definition():
    random = np.random.default_rng(0)
    for n in (1, 2, 11):
        pvalues = {f"row {i}": p for i, p in enumerate(random.random(n) ** 3)}
        ranked = sorted(pvalues, key=pvalues.get)
        want, running = {}, 0.0
        for i, name in enumerate(ranked):
            running = max(running, min(1.0, (n - i) * pvalues[name]))
            want[name] = running
        assert holm(pvalues) == pytest.approx(want) and list(holm(pvalues)) == list(pvalues)
    assert holm({}) == {}
    for wrong in (None, math.nan, 1.2, -0.1):
        with pytest.raises(ValueError, match="p of 'x' is"):
            holm({"x": wrong})


def test_the_detectable_effect_is_found_four_times_in_five():
    from scipy.stats import binom

    n, psi = 3000, 0.2
    delta = minimum_detectable_effect(n, psi) / 100
    b, c, _ = np.random.default_rng(0).multinomial(n, [(psi + delta) / 2, (psi - delta) / 2, 1 - psi], size=20_000).T
    power = np.mean(2 * binom.cdf(np.minimum(b, c), b + c, 0.5) < 0.05)
    assert power == pytest.approx(0.8, abs=0.02)


def test_the_detectable_effect_counts_clusters():
    random, n, psi, block = np.random.default_rng(0), 6000, 0.2, 10
    delta = minimum_detectable_effect(n, psi, design_effect=block) / 100
    clusters = random.choice([block, -block, 0], p=[(psi + delta) / 2, (psi - delta) / 2, 1 - psi], size=(300, n // block))
    assert np.mean([flip_test(d)[0] < 0.05 for d in clusters]) == pytest.approx(0.8, abs=0.07)


def test_detectable_effects_at_the_edges():
    delta, z = minimum_detectable_effect(50, 0.5) / 100, (1.959964, 0.841621)
    assert (z[0] * 0.5**0.5 + z[1] * (0.5 - delta**2) ** 0.5) ** 2 / delta**2 == pytest.approx(50, rel=1e-5)  # Connor's equation
    assert minimum_detectable_effect(10**6, 0.3) < minimum_detectable_effect(1000, 0.3) < minimum_detectable_effect(1000, 0.3, 10)
    assert minimum_detectable_effect(20, 0.05) == math.inf == minimum_detectable_effect(2, 1.0)
    assert minimum_detectable_effect(100, 0.0) == math.inf  # methods that never disagree
    with pytest.raises(ValueError, match="need n > 0"):
        minimum_detectable_effect(0, 0.3)


def test_statistics_stay_light():
    code = "import sys, valuecot.stats; print([m for m in ('scipy', 'statsmodels', 'pandas', 'sklearn', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
