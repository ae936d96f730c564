"Rows of the two steerable benchmarks: read, dropped with a reason, written by our own worlds, split without leaks."
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from valuecot.data import opinionqa, perspectives
from valuecot.data.opinionqa import Asked, cleaned, load_survey_folder, survey_question, survey_questions
from valuecot.data.perspectives import survey_world, value_world, weighed
from valuecot.data.question_sources import BENCHMARKS, foreseen_questions, questions_of
from valuecot.data.question_splits import (
    PARTS,
    batteries,
    jaccard,
    leakage,
    scenario_of,
    split_questions,
    subsample,
    twins,
    words_of_question,
)
from valuecot.data.questions import Question, check_questions
from valuecot.data.value_kaleidoscope import label_of, load_value_folder, official_questions, value_questions
from valuecot.judge import blind_ceiling
from valuecot.store import read_records, write_records

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORLDS = {"values": value_world, "survey": survey_world}
PAIR = {"situation": "Helping refugees", "vrd": "Care", "label_text": "Supports", "explanation": "It helps."}
LISTED = {"question": "Question: Do you work?\nOptions: A. Yes B. No\nAnswer:", "options": ["Yes", "No"], "attribute": "SEX_Male", "gold_distribution": [0.7, 0.3]}
ASKED = Asked("Do you work?", ("Yes", "No"), "SEX: Male", (0.7, 0.3))


def ceiling(questions) -> float:
    return blind_ceiling([q.gold_text for q in questions], [q.cluster for q in questions], draws=2).estimate


def real(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no ../shared/data/{name} here")
    return SHARED / name


def put(folder: Path, rows: list, name: str = "rows.json") -> Path:
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


# ---- a question


GOOD = Question("1", "Do you work?", "SEX: Male", "demographic", ("Yes", "No"), "A")


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.6), (-0.5, 1.5), (float("nan"), 1.0), (70.0, 30.0)])
def test_shares_are_one_for_each_option_and_sum_to_one(shares):
    assert replace(GOOD, shares=(0.7, 0.3004)).margin == pytest.approx(0.4, abs=1e-3)
    with pytest.raises(ValueError, match="share"):
        replace(GOOD, shares=shares)
    with pytest.raises(ValueError, match="known are train"):
        replace(GOOD, split="dev")


def test_a_cluster_is_a_situation_or_a_stem_with_its_options():
    value = Question("2", "Telling a lie", "Honesty", "value", ("Support", "Oppose", "Either"), "B")
    assert value.cluster == replace(value, scenario=" telling a Lie ", perspective="Care", gold="A").cluster != replace(value, scenario="Telling lies").cluster
    assert GOOD.cluster == replace(GOOD, perspective="AGE: 65+", options=("No", "Yes")).cluster
    assert GOOD.cluster != replace(GOOD, options=("Yes", "Never")).cluster, "one stem serves several questions"


def test_the_blind_ceiling_is_the_best_answer_per_cluster():
    rows = [replace(GOOD, id=str(i), perspective=str(i), gold="AAB"[i % 3]) for i in range(6)] + [replace(GOOD, id="x", scenario="Do you rest?")]
    assert ceiling(rows) == (4 + 1) / 7
    turned = [replace(q, options=q.options[::-1], gold="BA"["AB".index(q.gold)]) for q in rows]
    assert ceiling(rows[:3] + turned[3:]) == 5 / 7, "the order of options changes letters, not answers"


def test_questions_survive_the_disk(tmp_path):
    rows = [*value_world(5), *survey_world(3)]
    assert read_records(write_records(tmp_path / "q.jsonl", rows), Question) == rows


# ---- Value Kaleidoscope: bad rows


@pytest.mark.parametrize(
    "row, outcome",
    [
        ({"label": "A"}, "A"), ({"label": " c "}, "C"), ({"label_text": "Opposes"}, "B"), ({"valence": "Either"}, "C"), ({"label": "B", "label_text": "Opposes"}, "B"),
        ({}, "dropped: no label"), ({"label": None}, "dropped: no label"), ({"label": float("nan")}, "dropped: no label"), ({"label": ""}, "dropped: no label"),
        ({"label": "D"}, "dropped: label outside the set"), ({"label_text": "Neutral"}, "dropped: label outside the set"), ({"label": 0}, "dropped: label outside the set"), ({"label": "Answer: A"}, "dropped: label outside the set"),
        ({"label": "A", "label_text": "Opposes"}, "dropped: labels disagree"), ({"label": "A", "label_text": "Unsure"}, "dropped: label outside the set"),
    ],
)  # fmt: skip
def test_a_label_is_read_or_its_row_is_dropped(row, outcome):
    assert label_of(row) == outcome


def test_every_row_of_a_folder_is_accounted_for(tmp_path):
    bad = [{"vrd": " "}, {"situation": None}, {"label_text": "Unsure"}, {"label": "B"}, {"split": "dev"}]
    more = [PAIR | {"situation": "helping REFUGEES "}, PAIR | {"vrd": "Order", "explanation": ""}, PAIR | {"vrd": "Thrift"}, PAIR | {"vrd": "Thrift", "label_text": "Opposes"}]
    questions, counts = load_value_folder(put(tmp_path, [PAIR, *(PAIR | row for row in bad), *more]))
    assert counts == {
        "rows": 10, "dropped: label outside the set": 1, "dropped: labels disagree": 1, "dropped: pair repeated": 1, "dropped: pair stated again later, with another answer": 1,
        "dropped: situation or value blank": 2, "dropped: split outside the set": 1, "kept: no explanation": 1, "questions": 3,
    }  # fmt: skip
    assert [(q.perspective, q.gold) for q in questions] == [("Care", "A"), ("Order", "A"), ("Thrift", "B")], "of different labels the last stands"
    check_questions(questions)


def test_bad_labels_never_become_the_first_class(tmp_path):
    with pytest.raises(ValueError, match=r"no question is left of 2 rows; dropped: label outside the set 2"):
        load_value_folder(put(tmp_path, [PAIR | {"label_text": "Unsure"}, PAIR | {"label_text": "?"}]))


def test_an_explanation_is_kept_whichever_file_has_it(tmp_path):
    bare = {k: v for k, v in PAIR.items() if k != "explanation"}
    put(tmp_path, [bare], "a.json")
    put(tmp_path, [PAIR], "b.json")
    (tmp_path / "c.jsonl").write_text(json.dumps(bare) + "\n\n" + json.dumps(bare | {"vrd": "Order"}) + "\n")
    questions, counts = load_value_folder(tmp_path)
    assert [(q.perspective, q.explanation) for q in questions] == [("Care", "It helps."), ("Order", "")] and counts["dropped: pair repeated"] == 2


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("rows.json", "[", "cut off or edited"), ("rows.json", '{"a": 1}', "one JSON list of rows, not dict"), ("rows.json", "[1]", "1 of 1 rows are no objects"), ("rows.json", "[]", "there are: none, the file is empty"),
        ("rows.json", '[{"prompt": "x", "answer": "A"}]', "no column situation, vrd, label or label_text or valence; there are: answer, prompt"), ("notes.txt", "x", "holds no .*there are notes.txt"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [load_value_folder, load_survey_folder])
def test_files_that_hold_no_rows_say_so(tmp_path, name, text, said, load):
    (tmp_path / name).write_text(text)
    said = said.replace("situation, vrd, label or label_text or valence", "question, options, attribute, gold_distribution") if load is load_survey_folder else said
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load(tmp_path)


def test_a_parquet_with_other_columns_names_what_is_missing_and_there(tmp_path):
    pd.DataFrame({"text": ["x"], "prompt": ["y"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="no column situation, vrd, label or label_text or valence; there are: prompt, text"):
        load_value_folder(tmp_path)
    with pytest.raises(ValueError, match="no column reward_model; there are: prompt, text"):
        load_survey_folder(tmp_path)


def test_official_splits_keep_a_situation_on_one_side():
    situations = [f"situation {i}" for i in range(6)]
    explain = {"train": situations[:4], "val": situations[2:5], "test": [situations[3], situations[4].upper()]}

    def read(configuration, split):
        if configuration == "explanation":
            return [{"situation": s} for s in explain[split]]
        return [{"situation": s, "vrd": v, "valence": "Opposes", "explanation": ""} for s in situations for v in ("Care", "Order")]

    questions, counts = official_questions(read)
    assert Counter((q.scenario[-1], q.split) for q in questions) == {("0", "train"): 2, ("1", "train"): 2, ("2", "validation"): 2, ("3", "test"): 2, ("4", "test"): 2}
    assert counts["dropped: split outside the set"] == 2 and counts["kept: situation in several official splits, test before validation before train"] == 4
    assert split_questions(questions) == questions, "official splits stand"


def test_without_access_the_gated_set_is_one_line_that_says_what_to_accept():
    with pytest.raises(PermissionError) as caught:
        questions_of("value_kaleidoscope", "official")
    text = str(caught.value)
    assert "\n" not in text and "accept the AI2 ImpACT licence at https://huggingface.co/datasets/allenai/ValuePrism" in text and "hf auth login" in text and "embedded" in text


def test_without_its_files_the_worksheet_is_one_line_that_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="American_Trends_Panel_W.*or set steerable.opinionqa to a folder") as caught:
        questions_of("opinionqa", "official")
    assert "\n" not in str(caught.value)


# ---- OpinionQA: bad rows


@pytest.mark.parametrize(
    "changed, outcome",
    [
        ({"options": ("Yes",), "shares": (1.0,)}, "dropped: one option"), ({"options": (), "shares": ()}, "dropped: one option"), ({"options": ("Yes", "Refused")}, "dropped: one option"),
        ({"options": ("Yes", " ")}, "dropped: question, group or option blank"), ({"stem": ""}, "dropped: question, group or option blank"), ({"perspective": ""}, "dropped: question, group or option blank"),
        ({"shares": (0.7, 0.2, 0.1)}, "dropped: not one share for each option"), ({"shares": (0.7, 0.7)}, "dropped: shares do not sum to 1"), ({"shares": (1.5, -0.5)}, "dropped: shares do not sum to 1"), ({"shares": (float("nan"), 1.0)}, "dropped: shares do not sum to 1"),
        ({"options": ("Yes", "No", "Refused"), "shares": (0.0, 0.0, 1.0)}, "dropped: nobody answered"), ({"options": tuple(map(str, range(27))), "shares": (1 / 27,) * 27}, "dropped: more options than letters"),
        ({"shares": (), "gold": "C"}, "dropped: answer is no letter of the options"), ({"shares": (), "gold": "a"}, "dropped: answer is no letter of the options"), ({"shares": (), "gold": ""}, "dropped: answer is no letter of the options"),
        ({"shares": (), "gold": "AB"}, "dropped: answer is no letter of the options"), ({"options": ("Yes", "No", "Refused"), "shares": (), "gold": "C"}, "dropped: gold is a refusal"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_question_has_a_reason(changed, outcome):
    assert survey_question(ASKED._replace(**changed)) == outcome


def test_refusals_are_taken_out_before_gold_is():
    q = survey_question(ASKED._replace(options=("Refused", "Yes", "No", "[No answer]"), shares=(0.5, 0.1, 0.3, 0.1)))
    assert (q.options, q.gold) == (("Yes", "No"), "B") and q.shares == pytest.approx((0.25, 0.75))
    assert survey_question(ASKED._replace(options=("DK/Refused", "Yes", "No"), shares=(), gold="C")).gold == "C", "an option that only begins like one stays"
    assert survey_question(ASKED._replace(options=("Refused", "Yes", "No"), shares=(), gold="C")).gold_option == "B. No"


def test_a_tie_takes_the_first_and_is_counted():
    questions, counts = survey_questions([ASKED._replace(options=("a", "b", "c"), shares=(0.2, 0.4, 0.4))], "one row")
    assert questions[0].gold == "B" and questions[0].margin == 0 and counts["kept: tie for the largest share, first taken"] == 1


def test_options_with_commas_and_quotes_come_from_their_own_column(tmp_path):
    row = LISTED | {"options": ["Yes, some", "'No", '""Don\'t want to"', 'The "best"'], "gold_distribution": [0.6, 0.0, 0.0, 0.4], "attribute": "INCOME_$100,000 or more"}
    questions, counts = load_survey_folder(put(tmp_path, [row, LISTED | {"attribute": "EDUCATION_College graduate/some postgrad"}]))
    assert questions[0].options == ("Yes, some", "No", "Don't want to", 'The "best"') and questions[0].scenario == "Do you work?"
    assert [q.perspective for q in questions] == ["INCOME: $100,000 or more", "EDUCATION: College graduate/some postgrad"]
    assert counts["kept: stray quotation marks taken off"] == 1 == counts["kept: share of a damaged option lost"]
    assert load_survey_folder(tmp_path, "drop")[1] == {"rows": 2, "dropped: share of a damaged option lost": 1, "questions": 1}


@pytest.mark.parametrize("option", ["Yes", "Yes, some", "The workers'", "It's fine", '"A" or "B"', "'tis true, isn't it'"])
def test_options_that_are_whole_stay(option):
    assert cleaned(option) == option


def test_pairs_that_stand_twice_are_merged_or_the_last_stands():
    rows = [ASKED, ASKED, ASKED._replace(perspective="SEX: Female"), ASKED._replace(perspective="SEX: Female", shares=(0.4, 0.6)), ASKED._replace(options=("Yes", "Never"))]
    questions, counts = survey_questions(rows, "five rows")
    assert [(q.perspective, q.gold, q.options[1]) for q in questions] == [("SEX: Male", "A", "No"), ("SEX: Female", "B", "No"), ("SEX: Male", "A", "Never")]
    assert counts["dropped: pair repeated"] == 1 == counts["dropped: pair stated again later, with another answer"]


def test_lists_that_are_none_are_dropped(tmp_path):
    questions, counts = load_survey_folder(put(tmp_path, [LISTED, LISTED | {"options": "Yes, No"}, LISTED | {"gold_distribution": None}, {"question": "Do you rest?"}]))
    assert counts == {"rows": 4, "dropped: options or shares are no list": 3, "questions": 1}


def test_the_worksheet_reads_lists_as_python_and_numpy_print_them(tmp_path):
    head = {"question_raw": "Do you work?", "ordinal_refs": "['Yes, some', \"I don't\", 'None']", "attribute": "AGE", "group": "65+"}
    waves = {"W26": "[0.2 0.5\n 0.3]", "W92": "[0.25, 0.25, 0.5]"}
    for wave, shares in waves.items():
        rows = [head | {"D_H": shares}, head | {"attribute": "Overall", "group": "Overall", "D_H": "[1. 0. 0.]"}, head | {"group": "18-29", "ordinal_refs": "['Yes", "D_H": "[1.]"}]
        pd.DataFrame(rows).to_csv(tmp_path / f"American_Trends_Panel_{wave}_default_combined.csv", index=False)
    questions, counts = load_survey_folder(tmp_path)
    assert [(q.perspective, q.gold, q.options) for q in questions] == [("AGE: 65+", "C", ("Yes, some", "I don't", "None")), ("Overall", "A", ("Yes, some", "I don't", "None"))], "the latest wave stands"
    assert counts == {"rows": 6, "dropped: options or shares are no list": 2, "dropped: pair repeated": 1, "dropped: pair stated again later, with another answer": 1, "questions": 2}


def test_prompts_are_parsed_or_dropped(tmp_path):
    text = "Adopt the perspective of:\n- Income Range: $30,000-$50,000\n\nAnswer.\n\nWhich one?\nOne line more\n\nOptions:\n(A) Yes, (B) or so\n(B) No\n\nReasoning:"
    bad = [text.replace("(B) No", "(C) No"), text.replace("Options:", "Choices:"), "x", text.replace("(B) No", "B. No")]
    rows = [{"prompt": [{"role": "user", "content": t}], "reward_model": {"ground_truth": "B"}} for t in (text, *bad)] + [{"prompt": [], "reward_model": {"ground_truth": "B"}}, {"prompt": [{"content": text}], "reward_model": {"ground_truth": "C"}}]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    questions, counts = load_survey_folder(tmp_path)
    q = questions[0]
    assert (q.scenario, q.perspective, q.options, q.gold, q.shares) == ("Which one?\nOne line more", "Income Range: $30,000-$50,000", ("Yes, (B) or so", "No"), "B", ())
    assert counts == {"rows": 7, "dropped: answer is no letter of the options": 1, "dropped: no prompt or no answer": 1, "dropped: prompt in another wording": 4, "questions": 1}


# ---- real rows


def test_real_value_kaleidoscope_has_the_counts_that_were_published():
    questions, counts = load_value_folder(real("valuekaleidoscope"))
    assert Counter(q.gold for q in questions) == {"A": 1734, "B": 1197, "C": 568} and len(questions) == 3499
    assert (len({q.scenario for q in questions}), len({q.cluster for q in questions})) == (1943, 1940)
    assert counts == {"rows": 3499 + 860, "dropped: pair repeated": 860, "kept: no explanation": 3499 - 860, "questions": 3499}
    explained = Counter(q.gold for q in questions if q.explanation)
    assert explained == {"A": 439, "B": 271, "C": 150}


def test_real_opinionqa_has_the_counts_that_were_published():
    folder = real("opinionqa")
    rows = json.loads((folder / "opinionqa_small.json").read_text())
    assert len({(r["question"], *r["options"]) for r in rows}) == 809
    questions, counts = load_survey_folder(folder)
    assert counts == {
        "rows": 3526, "dropped: one option": 16, "dropped: pair repeated": 1, "dropped: pair stated again later, with another answer": 1,
        "kept: share of a damaged option lost": 287, "kept: stray quotation marks taken off": 95, "kept: tie for the largest share, first taken": 44, "questions": 3508,
    }  # fmt: skip

    def bare(options):
        return tuple(o.strip("'\" ") for o in options)

    asked = {(r["question"][10:].partition("\nOptions:")[0].strip(), r["attribute"].replace("_", ": ", 1), bare(r["options"])) for r in rows if len(r["options"]) > 1}
    assert {(q.scenario, q.perspective, bare(q.options)) for q in questions} == asked, "every option as its own column has it"
    kept = [q for q in questions if q.perspective == "RELIG: Jewish" and "unwanted sexual advances" in q.scenario]
    assert [q.gold for q in kept] == ["B"] and kept[0].shares[0] == pytest.approx(0.4238, abs=1e-4)
    assert {q.perspective for q in questions} >= {"INCOME: $100,000 or more", "EDUCATION: College graduate/some postgrad", "INCOME: Less than $30,000"}


def test_real_prompts_are_all_read_and_have_the_ceiling_of_the_notes():
    questions, counts = load_survey_folder(real("opinionqa_train"))
    assert counts == {"rows": 77560, "questions": 77560} and len({q.perspective for q in questions}) == 61
    assert (len({q.scenario for q in questions}), len({q.cluster for q in questions})) == (1235, 1274)
    assert ceiling(questions) == pytest.approx(0.859, abs=5e-4)
    split = split_questions(questions)
    shares = [n / len(split) for n in map(Counter(q.split for q in split).__getitem__, PARTS)]
    assert shares == pytest.approx((0.85, 0.05, 0.10), abs=0.002)


@pytest.mark.parametrize("name, load", [("valuekaleidoscope", load_value_folder), ("opinionqa", load_survey_folder)])
def test_real_rows_split_without_leaks(name, load):
    questions, _ = load(real(name))
    table = leakage({by: split_questions(questions, by) for by in ("question", "battery")})
    assert sum(row["rows"] for row in table[:3]) == sum(row["rows"] for row in table[3:]) == len(questions)
    assert all(row["scenarios in train"] == row["clusters in train"] == 0 for row in table if row["part"] != "train")
    assert all(row["share with a twin in train"] == 0 for row in table[4:])
    twin = table[2]["share with a twin in train"]
    assert twin > 0.2 if name == "opinionqa" else twin < 0.05


# ---- our own worlds


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_the_same_every_time_and_another_for_another_seed(name):
    world = WORLDS[name]
    assert world(30, 5) == world(30, 5) != world(30, 6)


@pytest.mark.parametrize("seed", range(4))
def test_values_decide_in_one_world_and_not_in_the_other(seed):
    planted, null = value_world(150, seed), value_world(150, seed, decided_by="scenario")
    assert [(q.id, q.scenario, q.perspective) for q in planted] == [(q.id, q.scenario, q.perspective) for q in null]
    assert ceiling(planted) < 0.8 and ceiling(null) == 1
    for rows in (planted, null):
        check_questions(rows)
        assert len({q.scenario for q in rows}) == 150 and len({(q.scenario, q.perspective) for q in rows}) == len(rows)
        assert min(Counter(q.gold for q in rows).values()) > 0.1 * len(rows) and set("ABC") == {q.gold for q in rows}
        assert all(q.explanation.endswith(f"The verdict is {q.gold_option[3:]}.") and q.explanation.count(".") == 2 for q in rows)
    assert not any(value in q.explanation for q in null for value in perspectives.VALUES), "the null world derives from the scenario alone"


def test_explanations_name_what_decides_and_nothing_else():
    features = perspectives.MEANS | perspectives.ENDS
    for q in value_world(360):
        means, end = ([f for f, (words, *_) in table.items() if all(part in q.scenario for part in words.split("{}"))] for table in (perspectives.MEANS, perspectives.ENDS))
        counted = weighed(q.perspective, means[0], end[0], "perspective")
        assert len(means) == len(end) == 1 and {s for _, s in counted} == {"A": {1}, "B": {-1}, "C": {1, -1}}[q.gold]
        assert all((f"{name}, which is {'good' if sign > 0 else 'bad'}" in q.explanation) == ((name, sign) in counted) for _, name, sign in (features[means[0]], features[end[0]]))


def test_values_are_many_and_differ_within_a_scenario():
    rows = value_world()
    assert len({q.perspective for q in rows}) >= 12 and len({q.scenario for q in rows}) >= 150
    golds = defaultdict(set)
    for q in rows:
        golds[q.cluster].add(q.gold)
    assert sum(len(g) > 1 for g in golds.values()) > 0.5 * len(golds), "pairs whose gold answers differ are what steering is measured on"
    by_value = defaultdict(Counter)
    for q in rows:
        by_value[q.perspective][q.gold] += 1
    assert sum(max(c.values()) for c in by_value.values()) < 0.6 * len(rows), "the value alone does not tell the answer"


@pytest.mark.parametrize("seed", range(4))
def test_groups_decide_in_one_survey_and_not_in_the_other(seed):
    planted, null = survey_world(144, seed), survey_world(144, seed, "scenario")
    assert [(q.id, q.scenario, q.options) for q in planted] == [(q.id, q.scenario, q.options) for q in null]
    assert ceiling(planted) < 0.7 and ceiling(null) == 1
    for rows in (planted, null):
        check_questions(rows)
        assert len({q.scenario for q in rows}) == 144 and all(q.gold == q.letters[q.shares.index(max(q.shares))] for q in rows)
    for n in range(2, 6):
        golds = Counter(q.gold for q in planted if len(q.options) == n)
        assert len(golds) == n and min(golds.values()) > 0.1 * sum(golds.values())
    assert 0 < sum(q.margin == 0 for q in planted) < 0.05 * len(planted) and sum(0 < q.margin < 0.1 for q in planted) > 0.05 * len(planted)
    assert len({q.perspective for q in planted}) == 12 and len({q.perspective.split(":")[0] for q in planted}) == 5


def test_what_the_worlds_say_is_short_and_of_few_words():
    rows = [*value_world(360), *survey_world(144), *value_world(360, decided_by="scenario")]
    texts = [" ".join((q.scenario, q.perspective, q.explanation, *q.options)) for q in rows]
    assert max(len(" ".join((q.scenario, q.perspective, *q.options)).split()) for q in rows) < 60
    assert len({word for text in texts for word in text.replace(".", " ").replace("?", " ").replace(":", " ").replace(",", " ").lower().split()}) < 300


@pytest.mark.parametrize("make, said", [(lambda: value_world(0), "1 to 360"), (lambda: value_world(361), "1 to 360"), (lambda: survey_world(145), "1 to 144"), (lambda: value_world(decided_by="x"), "known are"), (lambda: survey_world(decided_by="x"), "known are"), (lambda: value_world(values_each=7), "1 to 6")])  # fmt: skip
def test_worlds_that_cannot_be_made_say_why(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---- splits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("least", [0.5, 0.8, 1.0])
def test_twins_are_those_of_all_pairs(seed, least):
    rng = random.Random(seed)
    sets = [frozenset(rng.choices("abcdefghijklmnop"[: 4 + 4 * seed], k=rng.randint(0, 9))) for _ in range(120)]
    assert twins(sets, least) == sorted((i, j) for j in range(120) for i in range(j) if sets[i] and sets[j] and jaccard(sets[i], sets[j]) >= least)


def test_batteries_are_closed_under_twins_and_stems():
    rows = survey_world(144)
    number = batteries(rows)
    assert sorted(Counter(number.values()).values()) == [12] * 12
    other = replace(rows[0], id="x", options=("Completely", "Different", "Words", "Here"), shares=(), gold="A")
    number = batteries([*rows, other])
    assert number[other.cluster] == number[rows[0].cluster]


@pytest.mark.parametrize("by", ["question", "battery"])
@pytest.mark.parametrize("name", WORLDS)
def test_no_scenario_stands_in_two_parts(name, by):
    questions = WORLDS[name]()
    split = split_questions(questions, by, (0.6, 0.15, 0.25), seed=3)
    assert [replace(q, split="") for q in split] == questions and {q.split for q in split} == set(PARTS)
    sides = defaultdict(set)
    for q in split:
        sides[scenario_of(q)].add(q.split)
    assert all(len(s) == 1 for s in sides.values())
    assert {q.id: q.split for q in split_questions(questions[::-1], by, (0.6, 0.15, 0.25), seed=3)} == {q.id: q.split for q in split}, "the order of rows changes nothing"
    assert split_questions(questions, by, (0.6, 0.15, 0.25), seed=4) != split
    number = batteries(questions)
    largest = max(Counter(number[q.cluster] for q in questions).values()) if by == "battery" else 12
    for part, share in zip(PARTS, (0.6, 0.15, 0.25), strict=True):
        assert abs(sum(q.split == part for q in split) - share * len(split)) <= largest


def test_a_battery_split_parts_no_twins_and_a_split_by_question_does():
    town = survey_world(144)
    table = leakage({by: split_questions(town, by, (0.5, 0.2, 0.3)) for by in ("question", "battery")})
    assert [row["share with a twin in train"] for row in table] == [None, 1, 1, None, 0, 0]
    split = split_questions(town, "battery", (0.5, 0.2, 0.3))
    words = {part: {words_of_question(q) for q in split if q.split == part} for part in PARTS}
    assert not any(jaccard(a, b) >= 0.8 for a in words["train"] for b in words["test"])


def test_a_leak_is_an_error():
    rows = survey_world(12)
    with pytest.raises(ValueError, match="scenarios of test are in train too"):
        leakage({"rows": [replace(q, split="train" if i % 2 else "test") for i, q in enumerate(rows)]})


def test_official_splits_move_a_scenario_whole():
    rows = value_questions([PAIR | {"split": "train"}, PAIR | {"situation": "helping refugees", "vrd": "Order", "split": "test"}, PAIR | {"situation": "x", "split": "val"}, PAIR | {"situation": "y", "split": "train"}], "rows")[0]
    assert [q.split for q in split_questions(rows)] == ["test", "test", "validation", "train"]
    with pytest.raises(ValueError, match="1 of 4 rows carry no split"):
        split_questions([replace(rows[0], split=""), *rows[1:]])


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda q: split_questions(q[:12]), "the validation and test split is empty: 12 rows have 1 situations or survey questions.*Use more questions"), (lambda q: split_questions([]), "no questions"),
        (lambda q: split_questions([r for r in q if "museums" not in r.scenario][:24], "battery"), "split is empty.*batteries"), (lambda q: split_questions(q, shares=(0.9, 0.1, 0.0)), "three numbers above 0 that sum to 1"),
        (lambda q: split_questions(q, shares=(0.9, 0.2, 0.1)), "three numbers"), (lambda q: split_questions(q, by="row"), "known are question and battery"), (lambda q: subsample(q, {"train": 10}), "there are 0"),
        (lambda q: subsample(split_questions(q), {"test": 10_000}), "asked for 10000 test rows, there are"), (lambda q: subsample(split_questions(q), {"test": 0}), "asked for 0 test rows"), (lambda q: subsample(split_questions(q), {"test": 5}, whole=True), "each has more"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_says_what_to_change(call, said):
    with pytest.raises(ValueError, match=said):
        call(survey_world())


def test_fewer_rows_keep_the_labels_in_proportion():
    split = split_questions(value_world(), shares=(0.5, 0.2, 0.3))
    few = subsample(split, {"train": 100, "test": 50}, seed=1)
    assert Counter(q.split for q in few) == {"train": 100, "validation": sum(q.split == "validation" for q in split), "test": 50}
    for part, n in (("train", 100), ("test", 50)):
        before, after = (Counter(q.gold for q in rows if q.split == part) for rows in (split, few))
        assert all(abs(after[g] - before[g] * n / before.total()) < 1 for g in "ABC")
    assert {q.id for q in subsample(split[::-1], {"train": 100, "test": 50}, seed=1)} == {q.id for q in few} != {q.id for q in subsample(split, {"train": 100, "test": 50}, seed=2)}
    whole = subsample(split, {"test": 52}, whole=True)
    kept = Counter(q.cluster for q in whole if q.split == "test")
    assert set(kept.values()) == {5} and kept.total() == 50


# ---- one entry


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_one_entry_serves_the_embedded_worlds(benchmark):
    questions, counts = questions_of(benchmark, "embedded", size=20, seed=2, decided_by="scenario")
    assert len({q.cluster for q in questions}) == 20 and ceiling(questions) == 1 and counts["rows"] == counts["questions"] == len(questions)
    assert str(len(questions)) in foreseen_questions(benchmark, "embedded", 20) and "gated" in foreseen_questions("value_kaleidoscope", "official")
    with pytest.raises(FileNotFoundError, match="no folder"):
        questions_of(benchmark, "no/such/folder")
    with pytest.raises(ValueError, match="did you mean"):
        questions_of(benchmark + "s", "embedded")


@pytest.mark.parametrize("benchmark, name, n", [("value_kaleidoscope", "valuekaleidoscope", 3499), ("opinionqa", "opinionqa", 3508)])
def test_one_entry_serves_real_rows(benchmark, name, n):
    questions, counts = questions_of(benchmark, str(real(name)))
    assert len(questions) == counts["questions"] == n and f"{n} questions of {counts['rows']} rows" in foreseen_questions(benchmark, str(real(name)))
    assert opinionqa.WORKSHEET not in str(counts)
