"""The steerable report: what is compared with whom, how divided groups count, and what a reader is shown."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest

from valuecot.data.perspectives import survey_world, value_world
from valuecot.judge.methods import Benchmark, Method, rules_of
from valuecot.settings import load
from valuecot.stats import holm
from valuecot.types import Run
from valuecot.view.answers import answer_pages
from valuecot.view.browser import packed
from valuecot.view.comparisons import FAMILIES, compared, met
from valuecot.view.gains import ceilings
from valuecot.view.judged import left, shown_faithful, silent
from valuecot.view.names import absent, in_order, named, paper_row
from valuecot.view.review import main, read_review, review_counts, review_sheet, said_of
from valuecot.view.samples import pairs, shown_samples, speaker
from valuecot.view.scores import confusion_table, score_table, scored
from valuecot.view.shown import accuracy_figure, shown_comparisons, shown_confusions
from valuecot.view.soft import distance_rows, margin_table, soft_table
from valuecot.view.spans import sided

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


def test_rules_that_answer_alike_share_a_line():
    b = values(6, "scenario")
    other = replace(b.methods[0], arm="question-modal", predicted=["B"] * len(b.questions))
    found = compared(replace(b, methods=[*b.methods[:1], replace(b.methods[0], arm="majority"), other, b.find("llama", "rlvr", 0)]), "baselines")
    assert shown_comparisons(TINY, found)["against"].tolist() == ["always A, majority", "question-modal"]
    assert found["tests"].tolist() == [2, 2, 2], "the correction counts two tests, not three"
    p = dict(zip(found["against"], found["p by scenario"], strict=True))
    assert dict(zip(found["against"], found["p by scenario, Holm"], strict=True)) == pytest.approx(dict(zip(p, [holm({"a": p["always A"], "b": p["question-modal"]})[x] for x in "aab"], strict=True)))


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


# ---- words that take sides
def plain(text: str) -> str:
    "What a reader sees of HTML, marks left out."
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<sup>.</sup>", "", text.replace("<br>", "\n"))))


def test_spans_are_escaped_and_change_no_word():
    text = f"It is good {HOSTILE}, and bad\nall the same & more."
    shown = sided(text, [(6, 10, "A"), (text.index("bad"), text.index("bad") + 3, "B")]).text
    assert "<script" not in shown and "<img" not in shown and plain(shown) == text
    assert shown.count("<span style=") == 2 and "solid" in shown and "dashed" in shown and "<sup>A</sup>" in shown
    with pytest.raises(ValueError, match="do not overlap"):
        sided(text, [(6, 10, "A"), (8, 12, "B")])


def test_a_sample_is_a_pair_whose_right_answers_differ_and_both_right_comes_first():
    b = values(12)
    m = b.find("llama", "rlvr", 0)
    half = replace(m, predicted=[p if i % 3 else "Z" for i, p in enumerate(m.predicted)])
    for method in (m, half):
        found = pairs(b, method, 100)
        wrong = [sum(method.predicted[i] != b.gold[i] for i in pair) for pair in found]
        assert found and wrong == sorted(wrong) and all(b.gold[i] != b.gold[j] and b.questions[i].scenario == b.questions[j].scenario for i, j in found)
    assert pairs(b, half, 1)[0] == pairs(b, half, 100)[0] and speaker(b) is m
    assert "no scenario has two perspectives" in shown_samples(TINY, values(12, "scenario")).text


# ---- the sheet
def judged(b: Benchmark, arm: str = "rlvr", letters: str = "ABC") -> list[dict]:
    return [{"judge": name, "version": "masked", "model": "llama", "arm": arm, "seed": 0, "id": q.id, "letter": letter} for name in ("one", "two") for q, letter in zip(b.questions, letters * len(b.questions), strict=False)]


def test_the_sheet_holds_unfaithful_traces_of_one_method_drawn_by_a_seed():
    b = values(20)
    m = b.find("llama", "rlvr", 0)
    sheet = review_sheet(b, m, judged(b) + judged(b, "sft"))
    letters = said_of(judged(b), m)["one"]
    assert len(sheet) == 20 and all(letters[i] != dict(zip([q.id for q in b.questions], m.predicted, strict=True))[i] for i in sheet["id"])
    assert {"judge one, masked", "judge two, masked"} < set(sheet) and "judge one" not in sheet
    assert sheet.equals(review_sheet(b, m, judged(b))) and set(sheet["id"]) != set(review_sheet(b, m, judged(b), seed=1)["id"])
    assert (sheet[["reviewer", "date", "sees both sides", "clear stance", "note"]] == "").all(axis=None)
    assert review_sheet(b, m, []).empty and review_sheet(b, m, [row | {"letter": None} for row in judged(b)]).empty, "an invalid judgement is not unfaithful"
    mad = replace(m, completions=["=HYPERLINK(1)"] * len(m.completions))
    assert review_sheet(b, mad, judged(b))["trace"].unique().tolist() == ["'=HYPERLINK(1)"]


def test_a_filled_sheet_is_read_back_and_counted(tmp_path, capsys):
    b, file = values(20), tmp_path / "filled.csv"
    sheet = review_sheet(b, b.find("llama", "rlvr", 0), judged(b))
    filled = sheet.copy()
    filled.loc[:4, ["reviewer", "date", "sees both sides", "clear stance"]] = ["Ada", "2026-11-22", "YES", "no"]
    filled.to_csv(file, index=False, lineterminator="\r\n")
    counts = review_counts(read_review(file, sheet), len(sheet)).set_index("question")
    assert counts.loc["sees both sides", ["yes", "reviewed", "of"]].tolist() == [5, 5, 20] and counts.loc["clear stance", "yes"] == 0
    sheet.to_csv(tmp_path / "review.csv", index=False)
    assert main([str(tmp_path / "review.csv"), str(file)]) == 0 and "| sees both sides | 5 | 5 | 20 |" in capsys.readouterr().out
    assert main([str(file.with_name("gone.csv")), str(file)]) == 1 and main([]) == 2
    assert counts.loc["sees both sides", "low 95"] == pytest.approx(0.5655, abs=1e-3) and counts["reviewers"].unique().tolist() == ["Ada"]


@pytest.mark.parametrize(("change", "said"), [
    ({"reviewer": " "}, "has no reviewer"), ({"clear stance": "maybe"}, "want yes or no"), ({"sees both sides": ""}, "want yes or no"), ({"date": "22.11."}, "is no date"), ({"id": "other"}, "not of this run"), ({"trace": "Edited."}, "another trace"),
])  # fmt: skip
def test_a_sheet_that_cannot_be_counted_says_which_row(change, said, tmp_path):
    b, file = values(20), tmp_path / "filled.csv"
    sheet = review_sheet(b, b.find("llama", "rlvr", 0), judged(b))
    filled = sheet.assign(reviewer="Ada", date="2026-11-22", **{"sees both sides": "yes", "clear stance": "no"})
    for column, value in change.items():
        filled.loc[3, column] = value
    filled.to_csv(file, index=False)
    with pytest.raises(ValueError, match=said):
        read_review(file, sheet)
    sheet.to_csv(file, index=False)
    with pytest.raises(ValueError, match="is not filled in"):
        read_review(file, sheet)


# ---- all answers
def test_every_answer_is_an_entry_and_nothing_in_it_is_markup():
    b = values(6)
    mad = replace(b, questions=[replace(q, perspective=q.perspective + HOSTILE) for q in b.questions], methods=[*b.methods[:3], Method("llama", "rlvr", 0, [None, "Z", *["A"] * (len(b.gold) - 2)], [HOSTILE + "\n\nAnswer: A"] * len(b.gold))])
    browser, said = answer_pages(TINY, [mad], {mad.name: judged(mad)})
    page = browser._repr_mimebundle_()["text/html"]
    assert len(browser.entries) == len(b.gold) and "<script>alert" not in page and "<img" not in page and not any("<script" in e.body.text or "<img" in e.body.text for e in browser.entries)
    marks = [e.marks for e in browser.entries]
    assert {m["outcome"][0] for m in marks} == {"right", "wrong", "unread", "not on offer"} and marks[0]["answered"] == ("no letter",) and marks[0]["judge one, masked"] == ("no answer to judge",)
    assert {m["judge two, masked"][0] for m in marks[2:]} == {"faithful", "unfaithful"} and f"{len(b.gold)} answers to {len(b.gold)} of {len(b.gold)} questions." in said


def test_a_page_of_answers_stays_below_its_size():
    b = values(40)
    whole, _ = answer_pages(TINY, [b], {})
    part, said = answer_pages(TINY, [b], {}, block=6000)
    assert len(packed(part.rows())) <= 6000 < len(packed(whole.rows())) and f"of {len(b.gold)} questions, drawn by hash" in said
    assert len(part.entries) % 6 == 0 and [e.title for e in part.entries] == [e.title for e in answer_pages(TINY, [b], {}, block=6000)[0].entries], "a question comes with all its answers, and the same ones each time"
    assert answer_pages(TINY, [replace(b, methods=b.methods[:3])], {}) == (None, "No method wrote a completion.")


# ---- tables of other stages
def test_tables_3_and_4_stand_beside_the_paper_s(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "faithfulness.csv").write_text("dataset,judge,version,model,arm,seed,rows,judged,invalid,faithful,faithful_low_95,faithful_high_95,not_run\nopinionqa,words,masked,llama,rlvr,0,60,58,2,0.5,0.4,0.6,\nopinionqa,words,as written,llama,rlvr,0,60,41,19,0.6,0.5,0.7,\nopinionqa,claude,,,,,,,,,,,no key\n")
    run = Run("report", "steerable", "tiny", "all", "all", "all", tmp_path, TINY, {"faithfulness/all-opinionqa/all/all": folder}, "", "all")
    ((key, table),) = shown_faithful(TINY, left(run, "faithfulness", "faithfulness")).items()
    assert key == ("opinionqa", "words") and table["paper"].tolist() == ["70.3"] and table["method"].tolist()[0] == "RLVR · llama" and silent(left(run, "faithfulness", "faithfulness")).startswith("claude (no key). To run") and table["masked (95 %)"].tolist()[0] == "50.0 (40.0 to 60.0)"
    assert table[["masked: judged, invalid", "as written: judged, invalid"]].to_numpy().tolist() == [["58 of 60, 2", "41 of 60, 19"]]
    assert "delete steerable/faithfulness/all-opinionqa/all/all/run.json below" in silent(left(run, "faithfulness", "faithfulness")) and silent(pd.DataFrame()) == ""
    assert left(run, "moderation", "flags").empty and left(run, "faithfulness", "nothing").empty


READER = """
const box = document.querySelector(".vc-browser"), told = [], search = box.querySelector(".vc-search"), lists = Object.fromEntries([...box.querySelectorAll("select")].map(s => [s.name, s]));
const note = () => told.push([".vc-title", "output"].map(s => box.querySelector(s).textContent).join("|"));
const wait = setInterval(() => {
  if (!box.querySelector("output").textContent) return;
  clearInterval(wait);
  search.value = "harmless word"; search.dispatchEvent(new Event("input")); note();
  search.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})); note();
  box.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"})); note();
  lists["outcome"].value = "unread"; lists["outcome"].dispatchEvent(new Event("change")); note();
  search.value = "harmless absent"; search.dispatchEvent(new Event("input")); note();
  document.body.textContent = "TOLD" + JSON.stringify(told) + "RAN" + (window.ran || "nothing") + "END";
}, 20);
"""


def test_a_reader_searches_and_filters_from_a_file_and_no_text_runs(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed")
    b = values(2)
    texts = [f"{'A harmless' if i < 3 else 'Another'} word <script>window.ran = 1</script><img src=x onerror='window.ran = 2'>" for i in range(len(b.gold))]
    b = replace(b, methods=[Method("llama", "rlvr", 0, [None, "Z", *b.gold[2:]], texts)])
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{answer_pages(TINY, [b], {})[0]._repr_mimebundle_()['text/html']}<script>{READER}</script></body>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert json.loads(re.search("TOLD(.*)RAN", dom)[1]) == ["RLVR · llama: unread|1 of 3", "RLVR · llama: unread|1 of 3", "RLVR · llama: not on offer|2 of 3", "RLVR · llama: unread|1 of 1", "Nothing has all of these.|none"]
    assert "RANnothingEND" in dom
