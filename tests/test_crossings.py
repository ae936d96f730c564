"""Sample efficiency and quoted gains: a crossing is a measured point, and the paper's text follows from its tables or is named."""

import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pandas as pd
import plotly.graph_objects as go
import pytest

from valuecot.judge.crossings import crossings
from valuecot.judge.quoted import QUOTED, claims, flagged_parts, quoted_gains
from valuecot.settings import load
from valuecot.types import Run
from valuecot.view import efficiency as view
from valuecot.view import looks as report
from valuecot.view import quoted

CURVES = Path(__file__).parents[2] / "shared" / "reference" / "rlvr_training_curves.csv"
TABLES = ("value_kaleidoscope", "opinionqa", "offensiveness")


@pytest.fixture(scope="module")
def tables():
    settings = load("paper")
    return {name: settings[f"published.{name}"] for name in TABLES}


# ---- crossings
def slowly(points, line):
    "Both crossings from their definitions, point by point."
    points = sorted(points)
    first = next((s for s, v in points if v >= line), None)
    kept = [s for i, (s, _) in enumerate(points) if all(v >= line for _, v in points[i:])]
    return first, kept[0] if kept else None


def test_crossings_are_what_their_definition_says():
    rng = random.Random(0)
    for _ in range(500):
        points = [(s, rng.choice((0.1, 0.5, 0.6, 0.9))) for s in rng.sample(range(50), rng.randint(1, 8))]
        found = crossings(*zip(*points, strict=True), 0.6)
        assert (found.first, found.sustained) == slowly(points, 0.6)
        assert found.outcome == ("never" if found.first is None else "lost" if found.sustained is None else "held" if found.first == found.sustained else "regained")
        assert found.held == sum(found.sustained is not None and s >= found.sustained for s, _ in points)


@pytest.mark.parametrize(("values", "outcome", "first", "sustained", "from_start", "touches"), [
    ([0.1, 0.2, 0.3], "never", None, None, False, False),
    ([0.8, 0.9, 0.8], "held", 0, 0, True, False),
    ([0.8, 0.1, 0.8], "regained", 0, 20, True, False),
    ([0.1, 0.7, 0.2], "lost", 10, None, False, True),
    ([0.1, 0.2, 0.7], "held", 20, 20, False, True),
    ([0.1, 0.7, 0.8], "held", 10, 10, False, False),
    ([0.8, 0.8, 0.1], "lost", 0, None, True, False),
])  # fmt: skip
def test_every_shape_of_curve_has_its_outcome(values, outcome, first, sustained, from_start, touches):
    found = crossings([0, 10, 20], values, 0.7)
    assert (found.outcome, found.first, found.sustained, found.from_start, found.touches_only) == (outcome, first, sustained, from_start, touches)


@pytest.mark.parametrize(("steps", "values", "line", "said"), [
    ([], [], 0.5, "no points"), ([0, 1, 1], [0.1, 0.2, 0.3], 0.5, "step 1 occurs more than once"), ([0, 1], [0.1], 0.5, "line up"),
    ([0, 1], [0.1, math.nan], 0.5, "leave out what was not measured"), ([0, 1], [0.1, 0.2], math.nan, "the line is nan"),
])  # fmt: skip
def test_curves_without_an_answer_are_refused(steps, values, line, said):
    with pytest.raises(ValueError, match=said):
        crossings(steps, values, line)


# ---- Figure 2
@pytest.fixture(scope="module")
def figure2():
    if not CURVES.exists():
        pytest.skip("no ../shared/reference/rlvr_training_curves.csv here")
    return view.published_curves(CURVES), view.published_lines(load("paper")["published.other"])


def test_figure_2s_crossings(figure2):
    table = view.crossing_table(*figure2).set_index(["panel", "line of"]).round(1)
    vk, survey = table.loc["Value Kaleidoscope"], table.loc["OpinionQA"]
    assert vk.loc["sft", "first (%)"] == vk.loc["sft", "sustained (%)"] == 5.9 and vk.loc["sft", "outcome"] == "held"
    assert (vk.loc["human-cot", "first (%)"], survey.loc["sft", "first (%)"], survey.loc["synthetic-cot", "first (%)"]) == (8.8, 13.3, 10.0)
    sustained = vk.loc["human-cot"], survey.loc["sft"], survey.loc["synthetic-cot"]
    assert [row["outcome"] for row in sustained] == ["regained"] * 3
    # 17.6, 38.7 and 22.6 are the share of the validations that come before; the same points in percent of the training data, by the rule of the first crossings, lie a little later
    assert [row["points before sustained (%)"] for row in sustained] == [17.6, 38.7, 22.6]
    assert [row["sustained (%)"] for row in sustained] == [17.7, 39.9, 23.3]


def test_figure_2s_crossings_are_at_these_updates(figure2):
    curves, lines = figure2
    found = {}
    for line in lines.to_dict("records"):
        own = curves[curves["panel"] == line["panel"]]
        at = crossings(own["step"].tolist(), own["accuracy"].tolist(), line["accuracy"])
        found[line["panel"], line["arm"]] = (at.first, at.sustained)
    assert found == {("Value Kaleidoscope", "sft"): (40, 40), ("Value Kaleidoscope", "human-cot"): (60, 120), ("OpinionQA", "sft"): (40, 120), ("OpinionQA", "synthetic-cot"): (30, 70)}


def test_figure_2_is_drawn_twice_with_all_its_points(figure2):
    figure = view.efficiency(*figure2, "Figure 2")
    made = go.Figure(figure.plotly)
    assert sorted(len(t.x) for t in made.data if t.name == "RLVR") == [31, 68]
    assert sum(t.line.dash == "dash" for t in made.data) == 4 and sum(t.mode == "markers" for t in made.data) == 8
    json.dumps(figure.plotly, allow_nan=False)
    axes = [a for a in figure.draw().axes if a.lines]
    assert [len(a.lines[0].get_xdata()) for a in axes] == [68, 31]
    assert matplotlib.image.imread(io.BytesIO(figure.png(60)), format="png").std() > 0
    assert "kept from 39.9 %" in figure.alt and "39.9 %" in axes[1].get_xlabel()


def made_up(accuracy=(0.2, 0.4, 0.6)):
    return pd.DataFrame({"panel": "p", "arm": "rlvr", "percent": [0.0, 50.0, 100.0][: len(accuracy)], "accuracy": accuracy})


def test_a_line_that_is_not_reached_is_said_and_not_marked():
    lines = pd.DataFrame({"panel": ["p"], "arm": ["sft"], "accuracy": [0.9]})
    figure = view.efficiency(made_up(), lines)
    assert "not reached" in figure.alt and not any(t["mode"] == "markers" for t in figure.plotly["data"])
    assert len(figure.png(40)) > 1000
    assert view.crossing_table(made_up(), lines).iloc[0]["points before sustained (%)"] is None


def test_a_curve_alone_is_a_figure_and_no_curve_is_an_error():
    none = pd.DataFrame(columns=["panel", "arm", "accuracy"])
    assert go.Figure(view.efficiency(made_up(), none).plotly).data[0].y[-1] == 60 and len(view.efficiency(made_up(), none).png(40)) > 1000
    with pytest.raises(ValueError, match="no rows"):
        view.efficiency(made_up(()), none)
    with pytest.raises(ValueError, match=r"lack the columns \['percent'\]"):
        view.efficiency(made_up().drop(columns="percent"), none)


def test_logs_of_something_else_are_refused(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("run,metric,step,value\nother,loss,1,2\n")
    with pytest.raises(ValueError, match="no run llama3_vk; it has other"):
        view.published_curves(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns"):
        view.published_curves(file)


# ---- quoted gains
@pytest.mark.parametrize("i", range(len(QUOTED)), ids=[" ".join(q[1:]) for q in QUOTED])
def test_a_quoted_gain_follows_from_the_tables(tables, i):
    (found,) = quoted_gains(tables, [QUOTED[i]])
    assert found.agrees, found


def test_all_gains_of_section_4_are_there(tables):
    assert [g.quoted for g in quoted_gains(tables)] == ["-0.4", "1.9", "2.5", "18.0", "2.4", "4.0", "4.6", "7.0", "5.3", "0.8", "13.9", "6.2", "2.3", "0.15"]


def test_a_changed_table_is_noticed(tables):
    changed = {**tables, "opinionqa": tables["opinionqa"] | {"llama3-8b-rlvr": (72.4, 74.5, 68.4)}}
    (wrong,) = [g for g in quoted_gains(changed) if not g.agrees]
    assert (wrong.quoted, wrong.recomputed, wrong.score) == ("4.6", 4.7, "accuracy")


def test_rankings_hold_in_accuracy_and_the_others_are_named(tables):
    broken = {(c.claim, c.benchmark, c.model, c.score) for c in claims(tables) if not c.holds}
    below, above = "synthetic CoT is below SFT", "RLVR is above GPT-4.1"
    assert broken == {
        (below, "value_kaleidoscope", "llama3-8b", "balanced accuracy"), (below, "value_kaleidoscope", "llama3-8b", "macro-F1"), (below, "value_kaleidoscope", "qwen2.5-7b", "balanced accuracy"),
        (below, "opinionqa", "qwen2.5-7b", "balanced accuracy"), (below, "opinionqa", "qwen2.5-7b", "macro-F1"),
        (above, "value_kaleidoscope", "llama3-8b", "balanced accuracy"), (above, "value_kaleidoscope", "qwen2.5-7b", "balanced accuracy"),
    }  # fmt: skip
    assert not any(c.benchmark == "opinionqa" and c.claim.startswith("human") for c in claims(tables)), "OpinionQA has no human-written CoT"


def test_table_4s_categories_overlap_in_one_line(tables):
    parts = flagged_parts(tables["offensiveness"])
    assert [(p.benchmark, p.method, p.overall, p.parts) for p in parts if p.overlap] == [("value_kaleidoscope", "llama3-8b-rlvr", 10.05, 10.2)] and len(parts) == 9


# ---- in the report
def of_ours(folder: Path, seeds=(0, 1)) -> Run:
    "A run of the report over trainings with looks: RLVR before the first update and after each quarter of 8 updates; SFT with all rows and with a tenth of them."
    settings = load("test", "steerable.design.seeds=0,1")
    group, inputs = settings["steerable.grpo"].group_size, {}

    def left(name: str, counts: dict, looks: list[tuple[int, float]]) -> None:
        place = inputs[name] = folder / name.replace("/", "-")
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps({"counts": counts | {"validation rows": 50}}))
        rows = [{"step": step, "metric": "validation_accuracy", "value": value} for step, value in looks] + [{"step": 1, "metric": "loss", "value": 3.0}]
        (place / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    for seed in seeds:
        left(f"grpo/llama-opinionqa/rlvr/seed{seed}", {"prompts": 64, "completions_per_step": 8 * group}, [(2 * i, 0.2 * i + 0.02 * seed) for i in range(5)])
        left(f"sft/llama-opinionqa/sft/seed{seed}", {}, [(0, 0.1), (5, 0.75), (10, 0.7)])
    left("grpo/llama-opinionqa/rlvr-blind/seed0", {"prompts": 64, "completions_per_step": 8 * group}, [(8, 0.9)])
    left("sft/llama-opinionqa/sft-10/seed0", {}, [(1, 0.5)])
    return Run("report", "steerable", "test", "all", "all", "all", folder, settings, inputs, "key", "all")


def test_rlvrs_own_curve_is_against_rows_learnt_and_a_mean_of_seeds(tmp_path):
    run = of_ours(tmp_path)
    curves, lines = report.efficiency_data(run, report.looks(run))
    rlvr = curves[curves["arm"] == "rlvr"]
    assert rlvr["percent"].tolist() == [0, 25, 50, 75, 100]
    assert rlvr["accuracy"].tolist() == pytest.approx([0.01, 0.21, 0.41, 0.61, 0.81]) and rlvr["se"].tolist() == pytest.approx([0.01] * 5)
    alone = of_ours(tmp_path / "one", seeds=(0,))
    one = report.efficiency_data(alone, report.looks(alone))[0]
    assert one["se"].isna().all() and one.loc[one["arm"] == "rlvr", "accuracy"].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_sft_at_matched_rows_stands_beside_rlvr(tmp_path):
    run = of_ours(tmp_path)
    curves, lines = report.efficiency_data(run, report.looks(run))
    assert curves[curves["arm"] == "sft"][["percent", "accuracy"]].to_numpy().tolist() == [[10, 0.5], [100, pytest.approx(0.7)]]
    assert lines[["panel", "arm", "accuracy"]].to_numpy().tolist() == [["opinionqa", "sft", pytest.approx(0.7)]], "the last look, not the best"
    figure = report.efficiency_figures(run, curves, lines, 50)["efficiency_llama"]
    assert "n = 50 validation rows" in figure.caption and "mean ± SE of k = 2 training seeds" in figure.caption and "first 100.0 %" in figure.alt
    go.Figure(figure.plotly)
    assert len(figure.png(40)) > 1000


def test_the_best_look_stands_beside_the_last(tmp_path):
    run = of_ours(tmp_path)
    table = report.best_looks(report.looks(run)).set_index(["arm", "seed"])
    assert table.loc[("sft", 0), ["last", "best", "at update", "updates"]].tolist() == pytest.approx([0.7, 0.75, 5, 10]) and not table.loc[("sft", 0), "better beyond chance"]
    assert table.loc[("rlvr", 0), ["best", "at update"]].tolist() == [0.8, 8] and (table["rows"] == 50).all()


def test_no_looks_no_figure(tmp_path):
    run = replace(of_ours(tmp_path), inputs={})
    assert report.report_efficiency(run) == {}


def test_the_page_says_what_agrees_and_what_does_not(tmp_path):
    run = of_ours(tmp_path)
    said = quoted.in_words(quoted.quoted_tables(run.settings))
    assert "14 of 14 quoted gains agree." in said and "14 of 14 hold in accuracy" in said
    assert "10.05 % overall and 10.2 % in its categories" in said
