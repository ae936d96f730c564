"Scores against scikit-learn, and controls on worlds whose answers are decided by the perspective, or not."

import itertools
import math
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest

from valuecot.judge import (
    HEDGES,
    LABELS,
    binary,
    binary_modular_pluralism,
    blind_ceiling,
    brier,
    by_margin,
    constant,
    correct,
    default_first,
    design_effect,
    distances,
    flip_accuracy,
    hedges,
    jensen_shannon,
    leaders,
    majority,
    margin,
    mcnemar,
    modal,
    neither_enrichment,
    readings,
    sample_shares,
    score,
    score_intervals,
    soft_score,
    steerability_gain,
    swapped,
    total_variation,
)  # fmt: skip


# ---- scores
def answers(seed: int, n: int = 60, labels: tuple = LABELS) -> tuple[list, list]:
    "Gold and predicted, some unscored and some not on offer."
    random = np.random.default_rng(seed)
    gold = random.choice(labels, n, p=random.dirichlet(np.ones(len(labels))))
    said = np.where(random.random(n) < 0.5, gold, random.choice([*labels, "nowhere", "unread"], n))
    return gold.tolist(), [None if p == "unread" else p for p in said.tolist()]


@pytest.mark.parametrize("labels", [LABELS, ("a", "b"), tuple("ABCDEFGHIJK")])
def test_scores_equal_scikit_learn(labels):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    for seed in range(30):
        gold, predicted = answers(seed, 3 + 4 * seed, labels)
        found, theirs = score(gold, predicted, labels), [p or "unread" for p in predicted]
        with warnings.catch_warnings(action="ignore"):
            want = accuracy_score(gold, theirs), balanced_accuracy_score(gold, theirs), f1_score(gold, theirs, labels=labels, average="macro", zero_division=0)
        assert (found.accuracy, found.balanced_accuracy, found.macro_f1) == pytest.approx(want)
        assert (found.n, found.n_scored, found.n_invalid) == (len(gold), len(gold) - predicted.count(None), predicted.count("nowhere"))


def test_every_row_is_in_the_confusion_matrix_once():
    gold, predicted = answers(1, 200)
    found = score(gold, predicted).confusion
    want = Counter(zip(gold, predicted, strict=True))
    for g, counts, unscored, invalid in zip(found.labels, found.counts, found.unscored, found.invalid, strict=True):
        assert list(counts) == [want[g, p] for p in LABELS] and unscored == want[g, None] and invalid == want[g, "nowhere"]
    assert sum(map(sum, found.counts)) + sum(found.unscored) + sum(found.invalid) == 200
    assert "| gold either |" in found._repr_markdown_() and "| not on offer |" in found._repr_markdown_()


def test_what_could_not_be_read_is_wrong_and_never_the_first_label():
    silent = score(["A", "A", "B"], [None, math.nan, "B"], labels="AB")
    assert (silent.accuracy, silent.n_scored, silent.n_invalid) == (pytest.approx(1 / 3), 1, 0) and silent.confusion.unscored == (2, 0)
    beyond = score(["A", "A", "B"], ["D", "a", "B"], labels="AB")
    assert (beyond.accuracy, beyond.n_scored, beyond.n_invalid) == (pytest.approx(1 / 3), 3, 2) and beyond.confusion.invalid == (2, 0)
    assert beyond.confusion.counts == ((0, 0), (0, 1))
    by_row = score(["A", "A"], ["C", "C"], labels="ABC", options=["AB", "ABC"])
    assert by_row.n_invalid == 1 and by_row.confusion.counts[0] == (0, 0, 1)


def test_averages_over_the_right_labels():
    found = score(["support"] * 4, ["support"] * 3 + ["oppose"])
    assert found.balanced_accuracy == 0.75  # over the labels in gold
    assert found.macro_f1 == pytest.approx((6 / 7 + 0 + 0) / 3)  # over all labels given
    assert score([1, 0], [1, 1], labels=(0, 1)).accuracy == 0.5


@pytest.mark.parametrize(
    "gold, predicted, how, said",
    [
        (["neither"], ["either"], {}, "gold.0. is 'neither', none of the labels support, oppose, either"),
        ([None], ["either"], {}, "gold.0. is None"),
        (["AB"], ["A"], {"labels": "ABC"}, "gold.0. is 'AB'"),
        (["either"], [], {}, "1 of gold, 0 of predicted"),
        ([], [], {}, "no rows"),
        (["A"], ["A"], {"labels": "AAB"}, "twice"),
        (["C"], ["A"], {"labels": "ABC", "options": ["AB"]}, "its row offers A, B"),
        (["A"], ["A"], {"labels": "ABC", "options": []}, "0 of options"),
    ],
)
def test_scores_refuse(gold, predicted, how, said):
    with pytest.raises(ValueError, match=said):
        score(gold, predicted, **how)


def test_binary_keeps_rows_by_gold():
    from sklearn.metrics import f1_score

    gold, predicted = answers(4, 300)
    found = binary(gold, predicted)
    rows = [(g, p or "unread") for g, p in zip(gold, predicted, strict=True) if g != "either"]
    g, p = map(list, zip(*rows, strict=True))
    assert found.n == len(rows) and found.macro_f1 == pytest.approx(f1_score(g, p, labels=["support", "oppose"], average="macro"))
    assert found.accuracy == pytest.approx(np.mean([a == b for a, b in rows]))
    assert found.n_invalid == p.count("nowhere")  # "either" is on offer, and wrong
    assert found.confusion.columns == LABELS and sum(c[2] for c in found.confusion.counts) == p.count("either")


def test_modular_pluralism_drops_rows_by_the_answer_too():
    gold, predicted = answers(4, 300)
    found = binary_modular_pluralism(gold, predicted)
    assert found.n == sum(g != "either" and p != "either" for g, p in zip(gold, predicted, strict=True)) < binary(gold, predicted).n
    assert found.accuracy > binary(gold, predicted).accuracy
    for variant in (binary, binary_modular_pluralism):
        with pytest.raises(ValueError, match="none of the labels"):
            variant(["neither"], ["support"])
        with pytest.raises(ValueError, match="no rows"):
            variant(["either"], ["support"])


def test_intervals_are_those_of_the_scores():
    gold, predicted = answers(2, 240)
    clusters = [i // 4 for i in range(240)]
    found, plain = score_intervals(gold, predicted, clusters, draws=301, over="situations"), score(gold, predicted)
    for name, interval in found.items():
        assert interval.estimate == pytest.approx(getattr(plain, name)) and interval.low < interval.estimate < interval.high
        assert (interval.clusters, interval.draws, interval.over) == (60, 301, "situations")


def test_intervals_equal_scores_of_the_drawn_rows():
    from valuecot.stats import bootstrap

    gold, predicted = map(lambda x: np.array(x, dtype=object), answers(7, 30))
    clusters = np.arange(30) // 3
    for name, interval in score_intervals(gold, predicted, clusters, draws=40).items():
        slow = bootstrap(lambda rows, name=name: getattr(score(gold[rows], predicted[rows]), name), clusters, draws=40)
        assert (interval.low, interval.high) == pytest.approx((slow.low, slow.high))


# ---- readings
def test_three_readings_side_by_side():
    said = ["Answer: B", "I think Answer: b.", "Answer: B because", "no idea", "Answer: E", "Answer: A\nAnswer: C", "answer: c"]
    table = {r.reading: r for r in readings(said, list("BBBACCC"), ["ABC"] * 7)}
    lenient, strict, first = table["lenient"], table["strict"], table["default_first"]
    assert [lenient.n_scored, strict.n_scored, first.n_scored] == [6, 3, 7] and lenient.n_invalid == strict.n_invalid == first.n_invalid == 1
    assert lenient.accuracy == pytest.approx(5 / 7) and strict.accuracy == pytest.approx(2 / 7) and first.accuracy == pytest.approx(4 / 7)
    assert (lenient.n_changed, lenient.n_gained, lenient.n_lost) == (0, 0, 0)
    assert (first.n_changed, first.n_gained, first.n_lost) == (3, 1, 2)
    for r in table.values():
        assert r.accuracy * r.n == pytest.approx(lenient.accuracy * r.n + r.n_gained - r.n_lost)
    assert default_first("nothing") == "A" == default_first("Answer: c")


# ---- controls
def world(seed: int, planted: bool, scenarios: int = 150, views: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Gold answers, scenario and perspective of each row; planted: the perspective decides, else the scenario with noise."
    random = np.random.default_rng(seed)
    where, view = np.repeat(np.arange(scenarios), views), np.tile(np.arange(views), scenarios)
    decided = (view + random.integers(0, 3, scenarios)[where]) % 3 if planted else random.integers(0, 3, scenarios)[where]
    noise = random.random(len(where)) < 0.15
    return np.array(LABELS)[np.where(noise, random.integers(0, 3, len(where)), decided)], where, view


def model(seed: int, gold: np.ndarray, where: np.ndarray, reads_perspective: bool) -> np.ndarray:
    "Answers of a model that knows what decides: 80 % of the decided answers, else a guess."
    random = np.random.default_rng(seed + 1000)
    known = gold if reads_perspective else np.array(modal(where, gold, where).predicted)
    return np.where(random.random(len(gold)) < 0.8, known, random.choice(LABELS, len(gold)))


def test_a_planted_effect_is_found():
    for seed in range(5):
        gold, where, _ = world(seed, planted=True)
        seeing, blind = model(seed, gold, where, True), model(seed + 1, gold, where, False)
        gain = steerability_gain(gold, seeing, blind, where)
        assert gain.low > 0.2 and gain.over == "scenarios" and gain.clusters == 150
        assert gain.estimate == pytest.approx(score(gold, seeing).accuracy - score(gold, blind).accuracy)
        assert flip_accuracy(gold, seeing, where).accuracy.low > 0.6 > 0.3 > flip_accuracy(gold, blind, where).accuracy.high
        assert score(gold, seeing).accuracy > blind_ceiling(gold, where).high
        assert mcnemar(correct(gold, seeing), correct(gold, blind), where).pvalue < 1e-6


def test_no_effect_is_found_where_there_is_none():
    hits = 0
    for seed in range(40):
        gold, where, _ = world(seed, planted=False)
        seeing, blind = model(seed, gold, where, False), model(seed + 500, gold, where, False)
        hits += steerability_gain(gold, seeing, blind, where, draws=500).excludes(0)
        assert score(gold, seeing).accuracy < blind_ceiling(gold, where).low
        assert flip_accuracy(gold, np.array(modal(where, gold, where).predicted), where, draws=50).accuracy.estimate == 0  # one answer for a scenario
    assert hits <= 6  # 5 % of 40, and what chance allows: P(more than 6) < 0.5 %


def test_flip_accuracy_counts_pairs():
    for seed in range(10):
        gold, predicted = answers(seed, 40)
        where = np.random.default_rng(seed).integers(0, 9, 40)
        pairs = [(i, j) for i, j in itertools.combinations(range(40), 2) if where[i] == where[j] and gold[i] != gold[j]]
        both = [gold[i] == predicted[i] and gold[j] == predicted[j] for i, j in pairs]
        found = flip_accuracy(gold, predicted, where, draws=50)
        assert found.n_pairs == len(pairs) and found.n_scenarios == len({where[i] for i, _ in pairs})
        assert found.accuracy.estimate == pytest.approx(np.mean(both)) and found.accuracy.n == 40
    none = flip_accuracy(["either"] * 3, ["either"] * 3, [1, 1, 2])
    assert none.n_pairs == 0 and math.isnan(none.accuracy.estimate) and math.isnan(none.accuracy.low)


def test_blind_ceiling_is_the_best_of_all_blind_answers():
    gold, _ = answers(3, 12)
    where = [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3]
    best = max(np.mean([g == choice[w] for g, w in zip(gold, where, strict=True)]) for choice in itertools.product(LABELS, repeat=4))
    found = blind_ceiling(gold, where, over="questions")
    assert found.estimate == pytest.approx(best) and (found.n, found.clusters, found.over) == (12, 4, "questions")
    assert found.estimate == score(gold, modal(where, gold, where).predicted).accuracy


def test_baselines_answer_without_reading():
    assert constant("either", 2).predicted == ("either", "either")
    assert majority(["B", "A", "B", "A"], 1).predicted == ("A",)  # a tie: the first letter
    found = modal(["s", "s", "s", "t"], list("CBCA"), ["t", "u", "s"])
    assert found.predicted == ("A", "C", "C") and found.n_fallback == 1
    with pytest.raises(ValueError, match="no gold answers"):
        majority([], 3)
    with pytest.raises(ValueError, match="rows must line up"):
        modal(["s"], [], ["s"])


def test_a_swapped_perspective():
    gold, where, view = world(0, planted=True)
    other = gold.reshape(-1, 6)[:, [1, 2, 3, 4, 5, 0]].ravel()
    follows, stays = swapped(gold, other, other, where), swapped(gold, other, gold, where)
    n = int((gold != other).sum())
    assert (follows.shown.estimate, follows.original.estimate, follows.preference.estimate) == (1, 0, 1) and stays.preference.estimate == -1
    assert follows.n == n and follows.n_same == len(gold) - n and follows.n_neither == 0
    silent = swapped(gold, other, [None] * len(gold), where)
    assert silent.n_neither == n and silent.shown.estimate == 0


def test_controls_refuse_rows_without_gold():
    for ask in (lambda: steerability_gain([None], [None], ["either"], [1]), lambda: flip_accuracy([None, "either"], [None, None], [1, 1]), lambda: correct([math.nan], ["either"])):
        with pytest.raises(ValueError, match=r"gold\[0\] is"):
            ask()
    assert correct(["either", "either"], [None, math.nan]).tolist() == [False, False]


# ---- unfaithful traces
def test_enrichment_against_gold_and_against_faithful_traces():
    random = np.random.default_rng(0)
    gold = random.choice(LABELS, 900, p=[0.5, 0.34, 0.16])
    faithful = np.where(random.random(900) < 0.25, False, True).astype(object)
    faithful[:30] = None
    planted = np.where((faithful == False) & (random.random(900) < 0.5), "either", gold)  # noqa: E712
    found = neither_enrichment(planted, faithful, gold, np.arange(900) // 6)
    assert found.unfaithful == pytest.approx(np.mean(planted[faithful == False] == "either"))  # noqa: E712
    assert found.above_gold.estimate == pytest.approx(found.unfaithful - np.mean(gold == "either")) and found.above_gold.low > 0.2 and found.above_faithful.low > 0.2
    assert found.above_faithful.estimate == pytest.approx(found.unfaithful - found.faithful) and found.faithful == pytest.approx(np.mean(planted[faithful == True] == "either"))  # noqa: E712
    assert found.n_unjudged == 30 and found.n_unfaithful + found.n_faithful == 870
    blanket = neither_enrichment(np.where(random.random(900) < 0.5, "either", gold), faithful, gold, np.arange(900) // 6)
    assert blanket.above_gold.low > 0.2 and not blanket.above_faithful.excludes(0)  # a model that says it everywhere
    none = neither_enrichment(gold, [True] * 900, gold, None)
    assert math.isnan(none.unfaithful) and math.isnan(none.above_gold.estimate) and none.n_unfaithful == 0


def test_hedges_are_whole_phrases():
    assert {p: n for p, n in hedges("On the other\n hand; WITH RESERVATIONS. It depends, it depends.").items() if n} == {"on the other hand": 1, "with reservations": 1, "it depends": 2}
    assert not any(hedges("on the others hand, hit depends, withreservations").values()) and set(hedges("")) == set(HEDGES)
    assert {"on the other hand", "it is also possible that", "with reservations"} <= set(HEDGES)


# ---- against a survey
def shares(seed: int, letters: str = "ABCD") -> dict[str, float]:
    return dict(zip(letters, np.random.default_rng(seed).dirichlet(np.ones(len(letters))), strict=True))


def test_distances_between_distributions():
    for seed in range(20):
        q, p = shares(seed), shares(seed + 100)
        assert brier(q, p) == pytest.approx(sum(p[k] * sum((q[j] - (j == k)) ** 2 for j in p) for k in p))
        assert brier(p, p) == pytest.approx(1 - sum(x * x for x in p.values())) and brier(q, p) >= brier(p, p)
        middle = {k: (q[k] + p[k]) / 2 for k in p}
        assert jensen_shannon(q, p) == pytest.approx(sum((d[k] * math.log2(d[k] / middle[k])) / 2 for d in (q, p) for k in p))
        assert total_variation(q, p) == pytest.approx(sum(max(0.0, q[k] - p[k]) for k in p)) == pytest.approx(total_variation(p, q))
    assert (jensen_shannon({"A": 1.0}, {"B": 1.0}), total_variation({"A": 1.0}, {"B": 1.0}), brier({"A": 1.0}, {"B": 1.0})) == (1, 1, 2)
    assert jensen_shannon(shares(0), shares(0)) == 0


def test_one_answer_against_a_distribution():
    survey = [{"A": 0.5, "B": 0.5}, {"A": 0.2, "B": 0.5, "C": 0.3}, {"A": 1.0}, {"A": 0.6, "B": 0.4}]
    found = soft_score(["B", "D", "A", None], survey, [1, 2, 3, 4])
    assert found.expected_accuracy.estimate == pytest.approx(1.5 / 4) and found.ceiling == pytest.approx(2.6 / 4) and found.tie_credit.estimate == 0.5
    assert (found.n, found.n_scored, found.n_invalid, found.n_ties) == (4, 3, 1, 1)
    assert leaders(survey[0]) == ("A", "B") and margin(survey[0]) == 0 and margin(survey[2]) == 1 and margin(survey[1]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"survey\[0\] is .*add up to 1"):
        soft_score(["A"], [{"A": 0.6}], [1])
    with pytest.raises(ValueError, match="survey is empty"):
        soft_score([], [], [])


def test_each_row_falls_into_one_margin_stratum():
    survey = [{"A": (1 + x) / 2, "B": (1 - x) / 2} for x in (0.0, 0.04, 0.05, 0.06, 0.1, 0.4, 0.41, 1.0)]
    found = by_margin([True] * 8, survey, range(8), draws=20)
    assert [(s.low, s.high, s.accuracy.n) for s in found] == [(0, 0, 1), (0, 0.05, 2), (0.05, 0.1, 2), (0.2, 0.4, 1), (0.4, 1, 2)]


def test_distances_count_what_has_no_distribution():
    survey = [shares(i) for i in range(6)]
    found = distances([*survey[:5], None], survey, range(6))
    assert (found.n, found.n_scored) == (6, 5) and found.total_variation.estimate == 0 and found.brier.estimate == pytest.approx(found.brier_floor)
    with pytest.raises(ValueError, match="predicted is empty"):
        distances([None], survey[:1], [1])
    assert sample_shares(["A", "B", "B", None, "E"], "ABC") == {"A": 1 / 3, "B": 2 / 3, "C": 0} and sample_shares([None, "E"], "ABC") is None


def test_the_judge_stays_light_and_alone():
    code = "import sys, valuecot.judge; print([m for m in ('scipy', 'sklearn', 'statsmodels', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert design_effect(correct(["A", "B"], ["A", "A"]), [1, 2]).design_effect == 1
