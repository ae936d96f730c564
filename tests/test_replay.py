"Golden replay: printed numbers come out again to the printed digit, a planted mismatch is flagged, and a file that cannot be read is named."

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from valuecot.companion.replay import HEAD, IN_WORDS, Replayed, binary_row, ours_in_words, printed_as, replay, replay_files, replay_page, write_csv
from valuecot.judge import score
from valuecot.settings import Settings, load
from valuecot.view.efficiency import REWARD, VALIDATION

SHARED = Path(os.environ.get("VALUECOT_SHARED") or Path(__file__).parents[2] / "shared")
NAMES = ("value_kaleidoscope", "opinionqa", "offensiveness")


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no ../shared/{'/'.join(parts)} here")
    return path


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load("tiny")


@pytest.fixture(scope="module")
def rows(settings) -> list[Replayed]:
    return replay(settings)


def one(rows: list[Replayed], *words: str) -> Replayed:
    (found,) = [r for r in rows if all(w in r.item for w in words)]
    return found


def changed(settings: Settings, section: str, **lines) -> Settings:
    return replace(settings, sections=settings.sections | {section: settings[section] | lines})


# ---- from the tables alone
@pytest.mark.parametrize("item, ours, digits, agrees", [
    ("Qwen: standard over annealing CoT, Welch test", 0.085, 3, "no"),
    ("Llama: standard over annealing CoT, Welch test", 0.006, 3, "yes"),
    ("Qwen: base over standard CoT, Welch test", 0.003, 3, "yes"),
    ("Llama: base over standard CoT, Welch test", 0.0008, 4, "yes"),
    ("Qwen: lambda_1 of base over standard CoT", 3.03, 2, "yes"),
    ("Llama: lambda_1 of base over standard CoT", 3.58, 2, "yes"),
    ("Qwen: lambda_1 of standard over annealing CoT", 1.105, 3, "yes"),
    ("Llama: lambda_1 of standard over annealing CoT", 1.041, 3, "yes"),
    ("prompts left to be held out", 600, 0, "yes"),
])  # fmt: skip
def test_the_geometry_papers_numbers(rows, item, ours, digits, agrees):
    found = one(rows, item)
    assert (round(found.ours, digits), found.agrees) == (ours, agrees)


def test_welch_rows_are_scipys(rows, settings):
    from scipy.stats import ttest_ind_from_stats

    table, root3 = settings["published.geometry"], 3**0.5
    for model, label in (("qwen", "Qwen"), ("llama", "Llama")):
        (m1, se1), (m2, se2) = table[f"{model}.standard"], table[f"{model}.annealing"]
        want = ttest_ind_from_stats(m1, se1 * root3, 3, m2, se2 * root3, 3, equal_var=False).pvalue
        assert one(rows, f"{label}: standard over annealing CoT, Welch").ours == pytest.approx(want)


def test_a_gain_that_is_not_beyond_chance_is_said_so(rows):
    note = one(rows, "Qwen: standard over annealing CoT, Welch").note
    assert "not beyond chance at 5 %" in note and "n = 3 subsets of one training run" in note and "from -36 to 292" in note


def test_the_text_cuts_its_digits_off(rows):
    found = {r.paper: (r.agrees, r.note) for r in rows if r.item.endswith("in the text")}
    assert found == {"4083": ("no", "cut off, not rounded"), "1345": ("no", "cut off, not rounded"), "1218": ("yes", "")}


@pytest.mark.parametrize("printed, value, want", [
    ("0.8", 0.84, ("yes", "")), ("0.8", 0.85, ("yes", "")), ("0.8", 0.86, ("no", "cut off, not rounded")), ("0.8", 0.75, ("yes", "")), ("0.8", 0.74, ("no", "")),
    ("0.8", 0.9, ("no", "")), ("77", 77.56, ("no", "cut off, not rounded")), ("91", 91.378, ("yes", "")), ("-0.4", -0.4, ("yes", "")),
])  # fmt: skip
def test_agreement_is_to_the_printed_digit(printed, value, want):
    assert printed_as(printed, value) == want


def test_every_quoted_gain_has_its_row(rows):
    gains = [r for r in rows if r.unit == "points"]
    assert [r.paper for r in gains] == ["-0.4", "1.9", "2.5", "18.0", "2.4", "4.0", "4.6", "7.0", "5.3", "0.8", "13.9", "6.2", "2.3", "0.15"]
    assert {r.agrees for r in gains} == {"yes"} and [ours_in_words(r).removesuffix(" points") for r in gains] == [r.paper for r in gains]


def test_rankings_that_fail_are_flagged_and_named(rows):
    broken = {r.item: (r.ours, r.unit) for r in rows if "cases" in r.unit and r.agrees == "no"}
    assert broken == {
        "synthetic CoT is below SFT, in balanced accuracy": (1, "of 4 cases"), "synthetic CoT is below SFT, in macro-F1": (2, "of 4 cases"), "RLVR is above GPT-4.1, in balanced accuracy": (2, "of 4 cases"),
    }  # fmt: skip
    assert "llama3-8b on value kaleidoscope" in one(rows, "synthetic CoT is below SFT, in macro-F1").note
    assert all(r.agrees == "yes" for r in rows if r.item.endswith(", in accuracy"))


def test_table_4s_overlap_is_told(rows):
    found = one(rows, "do not add up")
    assert (found.ours, found.unit, found.agrees) == (1, "of 9 lines", "yes") and "10.05 overall, 10.2 in its categories" in found.note


def test_macro_f1_can_pass_accuracy_over_two_labels_alone(rows):
    found = one(rows, "macro-F1 above accuracy")
    assert found.agrees == "yes" and "12 of 12 lines do" in found.note and "11 of them lie above their accuracy" in found.note
    random = np.random.default_rng(0)
    for _ in range(20):
        gold = random.choice(["support", "oppose"], 30)
        inside, any_label = random.choice(["support", "oppose"], 30), random.choice(["support", "oppose", "either"], 30)
        good = np.where(random.random(30) < 0.8, gold, any_label)
        for predicted in (any_label, good):
            assert score(list(gold), list(predicted)).macro_f1 <= 2 / 3 + 1e-12
        within = np.where(random.random(30) < 0.8, gold, inside)
        two = score(list(gold), list(within), labels=("support", "oppose"))
        assert two.macro_f1 <= two.accuracy + 1e-12  # no answer outside both: never above


# ---- planted mismatches
def test_planted_mismatches_are_flagged(settings):
    gain = replay(changed(settings, "published.opinionqa", **{"llama3-8b-rlvr": (72.4, 74.5, 68.4)}))
    assert [r.item for r in gain if r.agrees == "no" and r.unit == "points"] == ["llama3-8b-rlvr over llama3-8b-sft, accuracy on opinionqa"]
    order = replay(changed(settings, "published.geometry", **{"llama.annealing": (850.0, 1.46)}))
    assert one(order, "Llama: lambda_1 of standard over annealing").agrees == "no" == one(order, "Llama: standard over annealing CoT, Welch").agrees
    short = replay(changed(settings, "published.offensiveness", **{"llama3-8b-rlvr": (10.5, 0.0, 0.4, 9.8, 0.15, 0.05, 0.0, 0.1)}))
    assert one(short, "do not add up").agrees == "no" and "a category is not printed" in one(short, "do not add up").note
    three = binary_row({"a": (80, 70, 70, 80.7, 81.3, 60.0)})
    assert three.agrees == "no" and "0 of 1 lines do" in three.note


# ---- files of the authors
def test_what_is_not_named_is_not_run_and_says_what_to_name(rows, settings):
    assert replay_files(settings) == {"curves": None, "opinionqa": None}
    waiting = [r for r in rows if r.agrees == "not run"]
    assert len(waiting) == 7 and all(r.ours is None and 'SET="replay.' in r.note for r in waiting)
    assert {r.paper for r in waiting if "Figure 2" in r.source} == {"10-20 %", "25-30 %"}


def test_paths_are_from_the_projects_folder(tmp_path):
    from valuecot.settings import root

    found = replay_files(load("tiny", f"replay.curves=../shared/a.csv replay.opinionqa={tmp_path}"))
    assert found == {"curves": root() / "../shared/a.csv", "opinionqa": tmp_path}
    with pytest.raises(KeyError, match="no setting 'replay.curve'; did you mean 'replay.curves'"):
        load("tiny", "replay.curve=a.csv")


def test_figure_2_from_the_authors_curves(settings):
    rows = replay(settings, curves=shared("reference", "rlvr_training_curves.csv"))
    found = {(r.item.split(":")[0], "first" if "first" in r.item else "kept", r.item.split(" SFT")[0] != r.item): (round(r.ours, 1), r.files.split()[1], r.agrees) for r in rows if "Figure 2" in r.source}
    vk, survey = "Value Kaleidoscope", "OpinionQA"
    assert found == {
        (vk, "first", True): (5.9, "40", "no"), (vk, "kept", True): (5.9, "40", "no"), (vk, "first", False): (8.8, "60", "no"), (vk, "kept", False): (17.7, "120", "yes"),
        (survey, "first", True): (13.3, "40", "no"), (survey, "kept", True): (39.9, "120", "no"), (survey, "first", False): (10.0, "30", "no"), (survey, "kept", False): (23.3, "70", "no"),
    }  # fmt: skip
    assert "17.6 % of the validations" in one(rows, "stays at Human").note and "earlier than printed" in one(rows, "Value Kaleidoscope", "first time", "SFT").note
    assert round(one(rows, "GPU time").ours) == 836


def test_the_surveys_ceiling_from_the_authors_rows(settings):
    rows = replay(settings, opinionqa=shared("data", "opinionqa_train"))
    ceiling, unanimous, effect = one(rows, "ceiling"), one(rows, "one answer for all"), one(rows, "design effect")
    assert (round(ceiling.ours / 100, 3), round(unanimous.ours, 1), round(effect.ours, 1)) == (0.859, 15.5, 10.4)
    assert {r.agrees for r in (ceiling, unanimous, effect)} == {"not printed"} and "the best method of Table 2 has 72.3" in ceiling.note
    (size,), pairs = [r for r in rows if r.item == "training rows"], one(rows, "pairs of")
    assert (size.files, size.agrees, pairs.files, pairs.agrees) == ("77,560 rows", "no", "61 groups", "yes")
    assert one(rows, "questions of the training rows").files == "1,235 texts, 1,274 with their options"


def log(path: Path, last: int = 100, step_of=str, value=lambda step: 0.5 + 0.003 * step, runs=("llama3_vk", "llama3_opinionqa")) -> Path:
    "A log in the form of the authors', whose curve rises to 0.8."
    rows = [(run, VALIDATION, step_of(step), value(step)) for run in runs for step in range(0, last + 1, 10)]
    rows += [(run, name, str(step), 100.0) for run in runs for name in (REWARD, "timing_s/step") for step in range(1, 101)]
    pd.DataFrame(rows, columns=["run", "metric", "step", "value"]).to_csv(path, index=False)
    return path


def test_crossings_of_a_log_by_hand(settings, tmp_path):
    rows = replay(settings, curves=log(tmp_path / "a.csv"))
    human, survey = one(rows, "Value Kaleidoscope", "first time", "Human"), one(rows, "OpinionQA", "first time", "SFT")
    assert (human.ours, human.files, human.agrees) == (100, "update 100 of 100", "no") and "later than printed" in human.note
    assert survey.ours == 60 and one(rows, "GPU time").ours == pytest.approx(8 * 2 * 100 * 100 / 3600)
    early = replay(settings, curves=log(tmp_path / "b.csv", value=lambda step: 0.9 if step >= 20 else 0.1))
    assert [(r.ours, r.agrees) for r in early if r.source == "steerable, Figure 2" and r.item.startswith("Value")] == [(20, "yes")] * 4
    never = replay(settings, curves=log(tmp_path / "c.csv", value=lambda step: 0.1))
    found = one(never, "Value Kaleidoscope", "first time", "SFT")
    assert (found.ours, found.files, found.agrees) == (None, "never", "no") and ours_in_words(found) == "–"


@pytest.mark.parametrize("name", ["curves", "opinionqa"])
def test_a_file_that_is_not_there_is_an_error(settings, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"replay.{name} = .*there is nothing; name the authors'"):
        replay(settings, **{name: tmp_path / "nothing"})


def damage(path: Path, kind: str) -> Path:
    "A log that cannot be used, in one of several ways."
    if kind == "bytes":
        path.write_bytes(b"\xff\xfe\x00run,metric\x80")
    elif kind == "empty":
        path.write_text("")
    elif kind == "columns":
        path.write_text("a,b\n1,2\n")
    elif kind == "other runs":
        log(path, runs=("qwen2p5_vk",))
    elif kind == "half a line":
        text = log(path).read_text()
        path.write_text(text[: text.index("llama3_opinionqa", 900) + 40] + "\n")
    elif kind == "cut":
        log(path, last=60)
    elif kind == "words":
        log(path, value=lambda step: "high" if step == 30 else 0.5)
    return path


@pytest.mark.parametrize("kind, said", [
    ("bytes", "is no CSV that can be read"), ("empty", "is no CSV that can be read"), ("columns", "lacks the columns"), ("other runs", "has no run llama3_vk"),
    ("half a line", "has no run llama3_opinionqa|no numbers|end at"), ("cut", "end at 60 % of its updates: cut off"), ("words", "values of Value Kaleidoscope that are no numbers"),
])  # fmt: skip
def test_a_damaged_log_is_named(settings, tmp_path, kind, said):
    with pytest.raises(ValueError, match=said) as error:
        replay(settings, curves=damage(tmp_path / "curves.csv", kind))
    assert "curves.csv" in str(error.value)


@pytest.mark.parametrize("kind", ["bytes", "columns", "empty folder", "cut"])
def test_a_damaged_training_set_is_named(settings, tmp_path, kind):
    path = tmp_path / "train.parquet"
    if kind == "columns":
        pd.DataFrame({"a": [1]}).to_parquet(path)
    elif kind == "cut":
        pd.DataFrame({"prompt": ["x"] * 100}).to_parquet(path)
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "bytes":
        path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="replay.opinionqa: .* is no OpinionQA training set that can be read"):
        replay(settings, opinionqa=tmp_path if kind == "empty folder" else path)


def survey(path: Path, answers: dict[str, str]) -> Path:
    "A training set in the form of the authors': question and the letters of its groups."
    def row(question: str, group: int, letter: str) -> dict:
        text = f"Think of this group.\n- Age: {group}\n\nWhat do they answer?\n\n{question}\n\nOptions:\n(A) Yes\n(B) No\n\nAnswer:"
        return {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": letter, "style": "rule"}}

    pd.DataFrame([row(q, i, letter) for q, letters in answers.items() for i, letter in enumerate(letters)]).to_parquet(path)
    return path


def test_ceilings_by_hand(settings, tmp_path):
    path = survey(tmp_path / "train.parquet", {"Is it right?": "AAAB", "Is it wrong?": "BBBB", "Is it late?": "AABB"})
    rows, folder = replay(settings, opinionqa=path), replay(settings, opinionqa=tmp_path)
    assert rows == folder
    assert one(rows, "ceiling").ours == pytest.approx(100 * 9 / 12) and one(rows, "one answer for all").ours == pytest.approx(100 / 3)
    assert one(rows, "pairs of").files == "4 groups" and one(rows, "pairs of").agrees == "no"  # 1,498 times four is no 91K


# ---- the page
def test_the_page_shows_every_row_once_and_flags_in_words(rows):
    page = replay_page(rows)
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(page)
    assert page.startswith("# Golden replay\n") and html.count("<table>") == 2 and html.count("<tr>") == len(rows) + 2
    assert html.count("<td>DIFFERS</td>") == sum(r.agrees == "no" for r in rows) == html.split("<h2>The ")[0].count("<li>")
    assert html.count("<td>not run</td>") == 7 and html.count("<th>") == 2 * len(HEAD)
    assert f"{len(rows)} rows: " in page and "6 differ, 7 not run" in page
    assert "p = 0.085" in html and "p = 0.006" in html


def test_what_a_file_said_is_no_markup_on_the_page(rows):
    evil = Replayed("a|b `c` {d} <script>e</script>\n# f", "steerable, $x$ [y](z)", "**1**", "~~2~~ | 3", 0.5, "points|", "no", "{{ g }} <img src=h>")
    page = replay_page([*rows, evil])
    html = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(page)
    assert html.count("<h1>") == 1 and not any(tag in html for tag in ("<script", "<img", "<code", "<a ", "<strong", "<s>")) and html.count("<tr>") == len(rows) + 3
    assert "$x$" not in page and "{d}" not in page and "\\{\\{ g \\}\\}" in page


def test_the_page_of_nothing_is_an_error_and_of_no_mismatch_says_so(rows):
    with pytest.raises(ValueError, match="no rows"):
        replay_page([])
    assert "## What differs\n\nNothing.\n" in replay_page([r for r in rows if r.agrees == "yes"])


def test_numbers_are_shown_with_their_units():
    row = Replayed("i", "s, t", "", "", 0.00001, "p", "yes")
    assert [ours_in_words(replace(row, ours=x)) for x in (0.00001, 0.0848, None, float("nan"))] == ["p below 0.001", "p = 0.085", "–", "–"]
    assert ours_in_words(replace(row, ours=5.891, unit="% of the training data")) == "5.9 % of the training data" and set(IN_WORDS) == {"yes", "no", "not run", "not printed"}


def test_the_csv_holds_every_row_in_full(rows, tmp_path):
    found = list(csv.DictReader(write_csv(rows, tmp_path / "replay.csv").open(encoding="utf-8")))
    assert list(found[0]) == ["item", "source", "paper", "authors_files", "ours", "unit", "agrees", "note"] and len(found) == len(rows)
    for line, row in zip(found, rows, strict=True):
        assert line["item"] == row.item and line["note"] == row.note and (line["ours"] == "" if row.ours is None else float(line["ours"]) == row.ours)
