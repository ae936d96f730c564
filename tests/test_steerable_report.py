"""The steerable report: what is compared with whom, how divided groups count, and what a reader is shown."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from valuecot.data.perspectives import survey_world, value_world
from valuecot.settings import load
from valuecot.steerable.comparisons import FAMILIES, compared, met
from valuecot.steerable.methods import Benchmark, Method, rules_of
from valuecot.steerable.names import absent, in_order, named, paper_row
from valuecot.steerable.scores import confusion_table, scored
from valuecot.steerable.shown import accuracy_figure, shown_confusions
from valuecot.steerable.soft import distance_rows, margin_table, soft_table

TINY = load("tiny")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def bench(world, *methods: Method, name: str = "value_kaleidoscope") -> Benchmark:
    "Test rows with the rules, and these methods."
    test = [replace(q, split="test") for q in world]
    return Benchmark(name, test, [*rules_of(test, test), *methods])


def values(n: int = 12, decided_by: str = "perspective") -> Benchmark:
    "A method that knows every answer, one that is blind, and a model that always says B."
    test = value_world(n, decided_by=decided_by)
    n = len(test)
    gold, modal = [q.gold for q in test], bench(test).methods[2].predicted
    arms = {"zero-shot": ["B"] * n, "sft": modal, "rlvr": gold, "sft-blind": modal, "rlvr-blind": modal}
    return bench(test, *(Method("llama", arm, 0, list(said), [f"Answer: {x}" for x in said]) for arm, said in arms.items()), Method("gpt-4.1", "prompted", 0, ["A"] * n, ["Answer: A"] * n))


# ---- scores and comparisons
def test_confusions_add_up_and_keep_what_is_no_answer_apart():
    test = value_world(12)
    b = bench(test, Method("llama", "sft", 0, [None, "Z", *(q.gold for q in test[2:])], []))
    table = confusion_table(b, scored(b))
    own = table[table["arm"] == "sft"]
    assert own[["A", "B", "C", "unread", "not on offer"]].to_numpy().sum() == len(test) and (own["unread"].sum(), own["not on offer"].sum()) == (1, 1)
    assert "sft" not in shown_confusions(TINY, b, table).text and f"{len(test) - 2} of {len(test)} right" in shown_confusions(TINY, b, table).text


def test_a_planted_effect_is_found_in_every_family_and_a_null_in_none():
    planted, null = values(40), values(40, "scenario")
    for family in ("sft", "blind"):
        found, none = (compared(b, family).set_index("arm").loc["rlvr"] for b in (planted, null))
        assert found["low"] > 0 and found["p by scenario, Holm"] < 0.01 and found["difference"] > found["detectable (points)"] / 100
        assert none["difference"] == 0 and none["p by scenario"] == 1
    worse = compared(planted, "sft").set_index("arm").loc["zero-shot"]
    assert worse["difference"] < 0, "a loss is shown as a loss"


def test_every_method_meets_whom_its_family_names():
    b = values()
    rlvr, prompted = b.find("llama", "rlvr", 0), b.find("gpt-4.1", "prompted", 0)
    assert {family: [m.arm for m in met(b, rlvr, family)] for family in FAMILIES} == {"sft": ["sft"], "zero_shot": ["zero-shot"], "blind": ["rlvr-blind"], "baselines": ["always A", "majority", "question-modal"], "asked": ["prompted"]}
    assert [m.arm for m in met(b, b.find("llama", "zero-shot", 0), "blind")] == ["sft-blind"] and met(b, b.find("llama", "rlvr-blind", 0), "blind") == []
    assert met(b, prompted, "sft") == met(b, prompted, "asked") == [] and len(compared(b, "baselines")) == 3 * 6
    with pytest.raises(KeyError, match="no family 'best'"):
        met(b, rlvr, "best")


def test_holm_is_over_the_family_and_no_other():
    table = compared(values(), "sft")
    least = table["p by scenario"].idxmin()
    assert table.loc[least, "p by scenario, Holm"] == pytest.approx(min(1, len(table) * table.loc[least, "p by scenario"]))


# ---- names
def test_a_stand_in_carries_its_own_name():
    names = {arm: named(TINY, {"model": model, "arm": arm, "seed": 0}) for model, arm in (("gpt-4.1", "prompted"), ("llama", "personas"), ("llama", "communities"), ("", "majority"))}
    assert names == {"prompted": "gpt-4.1, prompted", "personas": "Modular Pluralism’s procedure, personas of llama", "communities": "Modular Pluralism · llama", "majority": "majority"}
    published = TINY["published.value_kaleidoscope"]
    assert (paper_row(published, "gpt-4.1", "prompted")[0], paper_row(published, "llama", "communities")[0], paper_row(published, "rules", "prompted")) == (76.5, 63.3, None)
    several = load("tiny", "steerable.design.seeds=0,1")
    assert named(several, {"model": "llama", "arm": "rlvr", "seed": 1}) == "RLVR · llama · seed 1" and named(several, {"model": "llama", "arm": "rlvr", "seed": 1}, seed=False) == "RLVR · llama"


def test_what_is_absent_says_why():
    told = absent(TINY, "opinionqa", [Method("llama", "personas", 0, [], [])], {"gpt-4.1": "OPENAI_API_KEY is not set"})
    assert told[-2:] == ["gpt-4.1, prompted (OPENAI_API_KEY is not set)", "Modular Pluralism (steerable.pluralism.communities names personas, no model)"]
    assert "RLVR from base" in told[0] and "Human-written CoT, answer" not in told[0], "an arm without this data set is not absent"
    none = absent(load("tiny", "steerable.pluralism.communities="), "opinionqa", [Method("gpt-4.1", "prompted", 0, [], []), Method("llama", "communities", 0, [], [])], {})
    assert len(none) == 1


def test_the_figure_draws_the_ceiling_and_lists_arms_in_the_registry_s_order():
    from valuecot.steerable.gains import ceilings
    from valuecot.steerable.scores import score_table

    b = values()
    figure = accuracy_figure(TINY, b, score_table(b, scored(b), {}), ceilings([b]).iloc[0], "tiny")
    order = figure.plotly["layout"]["yaxis"]["ticktext"][::-1]
    assert order == [named(TINY, {"model": m.model, "arm": m.arm, "seed": 0}) for m in in_order(TINY, b.methods)] and order[:3] == ["Zero-Shot CoT · llama", "SFT · llama", "RLVR · llama"] and order[-1] == "question-modal"
    assert "blind ceiling" in figure.alt and "best rule" in figure.alt and figure.png()[:4] == b"\x89PNG"


# ---- divided groups
def test_an_answer_is_worth_the_share_that_gives_it(tmp_path):
    world = survey_world(6)
    b = bench(world, Method("llama", "rlvr", 0, [q.gold for q in world], []), Method("llama", "sft", 0, [None] * len(world), []), name="opinionqa")
    table = soft_table(b).set_index("arm")
    assert table.loc["rlvr", "expected_accuracy"] == pytest.approx(table.loc["rlvr", "ceiling"]) and table.loc["sft", "expected_accuracy"] == 0 and table.loc["sft", "answers read"] == 0
    assert (margin_table(b).groupby("arm")["n"].sum() == len(world)).all()
    file = tmp_path / "probes.jsonl"
    equal = [{"id": q.id, "kind": "direct", "shares": dict.fromkeys(q.letters, 1 / len(q.options))} for q in world]
    file.write_text("".join(json.dumps(row) + "\n" for row in equal[:-1]))
    (found,) = distance_rows(b, {"model": "llama"}, file)
    assert (found["shares"], found["n"]) == ("direct", len(world) - 1) and found["brier"] > found["brier floor"]
    assert isinstance(soft_table(values()), pd.DataFrame) and soft_table(values()).empty and margin_table(values()).empty
