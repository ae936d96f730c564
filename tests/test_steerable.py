"""The steerable study: what a model is asked, what is read from it, and a run that is killed again and again."""

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import start

from valuecot.data.perspectives import survey_world, value_world
from valuecot.data.questions import Question
from valuecot.data.views import VIEWS, asked, completion, read_prompts, worded
from valuecot.flow.plan import Job, Plan, split_cell
from valuecot.judge import readings
from valuecot.judge.methods import Benchmark, Method, rules_of
from valuecot.settings import load
from valuecot.steerable.answers import told
from valuecot.text import parse_answer
from valuecot.training.models import load_model
from valuecot.training.sampling import Drawing, draw_all
from valuecot.view.comparisons import compared
from valuecot.view.gains import gains
from valuecot.view.scores import score_row, scored

ROOT = Path(__file__).parents[1]
ASK = Question("q", "Lying to a friend", "Honesty", "value", ("Support", "Oppose", "Either"), "B")


# ---- the plan
def test_a_data_set_is_part_of_a_runs_folder():
    job = Job("steerable", "sft", "llama3-8b", "human-cot", "seed0", "value_kaleidoscope")
    assert job.path == "steerable/sft/llama3-8b-value_kaleidoscope/human-cot/seed0" and Job.read(job.path) == job
    assert split_cell("llama3-8b-instruct") == ("llama3-8b-instruct", "all")


def test_arms_have_their_study_their_data_sets_and_their_start():
    plan = Plan("paper", "steerable")
    jobs = plan.jobs()
    assert not any(j.stage in ("reward_model", "samples", "landscape", "behaviour") for j in jobs), "the first study's stages run where they are needed"
    assert {j.dataset for j in jobs if j.arm == "human-cot"} == {"value_kaleidoscope"}
    needs = {j.arm: {i.model for i in plan.inputs(j) if i.stage == "base_model"} for j in jobs if j.stage in ("sft", "grpo") and j.model == "llama3-8b"}
    assert needs["sft"] == {"llama3-8b"} and needs["rlvr"] == {"llama3-8b-instruct"}
    printed = Plan("paper", "steerable", "steerable.preset=printed")
    assert {i.model for j in printed.jobs() if j.stage == "grpo" for i in printed.inputs(j) if i.stage == "base_model"} == {"llama3-8b", "qwen2.5-7b"}
    assert not {"zero-shot", "sft-blind"} & {j.arm for j in Plan("tiny", "geometry").jobs()}


@pytest.mark.parametrize(("change", "said"), [
    ("steerable.design.arms=standard", "steerable.design.arms"), ("geometry.design.arms=rlvr", "geometry.design.arms"), ("steerable.design.datasets=opinions", "steerable.design.datasets"),
    ("steerable.design.arms=sft-instruct", r"\[model.llama-instruct\]"), ("steerable.split=village", "split"),
])  # fmt: skip
def test_designs_that_cannot_be(change, said):
    with pytest.raises((KeyError, ValueError), match=said):
        load("tiny", change)


# ---- what is asked
@pytest.mark.parametrize("question", [value_world(4)[0], survey_world(2)[0]], ids=["value", "survey"])
def test_a_view_hides_what_it_says(question):
    seen = {view: (question.perspective in worded(question, view), question.scenario in worded(question, view)) for view in VIEWS}
    assert seen == {"": (True, True), "answer": (True, True), "blind": (False, True), "blind-answer": (False, True), "scenario-blind-answer": (True, False)}
    assert all(question.listed in worded(question, view) for view in VIEWS)


def test_views_differ_in_their_words_alone():
    questions = [replace(q, split="train") for q in value_world(6)]
    by = {view: asked(questions, "value_kaleidoscope", view) for view in VIEWS}
    assert len({tuple((p.id, p.gold, p.split) for p in prompts) for prompts in by.values()}) == 1 and len({p.text for prompts in by.values() for p in prompts[:1]}) == len(VIEWS)


def test_prompts_of_a_view_that_is_not_there(tmp_path):
    (tmp_path / "prompts-answer.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="no prompts of view 'deaf'.*'answer'"):
        read_prompts(tmp_path, "deaf")


# ---- what is read
@pytest.mark.parametrize(("text", "letter"), [("Answer: B", "B"), ("answer: b.", "B"), ("Answer: A\nAnswer: C", "C"), ("I would oppose it", None), ("Answer:", None), ("Answer: F", "F"), ("", None), ("Answer: Apples", None)])
def test_a_completion_without_a_letter_is_wrong_and_never_the_first_option(text, letter):
    found = told(ASK, text)
    assert found.predicted == letter and found.gold == "B"
    by = {r.reading: r for r in readings([text], ["A"], ["ABC"])}
    assert by["lenient"].accuracy == (letter == "A") and by["lenient"].n_invalid == (letter == "F")


def test_what_is_learnt_can_be_read_back():
    for q in value_world(5):
        assert parse_answer(completion(q.gold, q.explanation), strict=True) == parse_answer(completion(q.gold)) == q.gold


# ---- the report
def bench(world: list[Question], seen: bool) -> Benchmark:
    "A method that knows everything about its world, and a twin that does not see the perspective."
    test = [replace(q, split="test") for q in world]
    modal = {m.arm: m for m in rules_of(test, test)}["question-modal"]
    wise = [q.gold if seen else p for q, p in zip(test, modal.predicted, strict=True)]
    return Benchmark("value_kaleidoscope", test, [Method("llama", "sft", 0, wise, []), Method("llama", "sft-blind", 0, list(modal.predicted), []), Method("llama", "rlvr", 0, wise, [])])


def gains_of(b: Benchmark):
    "Gain and flips of the method that is first."
    return gains(b, compared(b, "blind")).iloc[0]


def test_a_planted_effect_of_the_perspective_is_found_and_a_null_is_not():
    planted, null = (bench(value_world(120, decided_by=by), True) for by in ("perspective", "scenario"))
    found, none = gains_of(planted), gains_of(null)
    assert found["gain low"] > 0.1 and found["flip accuracy"] == 1
    assert none["gain"] == 0 and none["pairs"] == 0, "in the null world no two perspectives differ"
    blind = gains_of(bench(value_world(120), False))
    assert blind["gain"] == 0 and blind["flip accuracy"] == 0


def test_methods_that_answer_alike_do_not_differ():
    table = compared(bench(value_world(60), True), "sft").set_index("arm")
    assert table.loc["rlvr", "p by scenario"] == 1 and table.loc["rlvr", "difference"] == 0
    assert table.loc["sft-blind", "p by scenario, Holm"] < 0.01


def test_a_row_of_the_paper_stands_beside_the_family_that_stands_in_for_it():
    b = bench(value_world(60), True)
    row = score_row(b, b.methods[0], scored(b)[0], load("tiny")["published.value_kaleidoscope"])
    assert row["paper accuracy (%)"] == 77.1 and row["accuracy"] == 1 and row["accuracy low"] == 1 and row["binary n"] < row["n"]


# ---- many rows, and kills
COMMAND = """
import sys
from pathlib import Path
from valuecot.training.models import load_model
from valuecot.training.sampling import Drawing, draw_all
import valuecot.training.sampling as sampling
import time
whole = sampling.complete
def slowly(*given):
    time.sleep(0.05)
    return whole(*given)
sampling.complete = slowly
model, tokenizer = load_model(sys.argv[1])
texts = {f"q{i}": "Should I keep the ring?" + " Why?" * (i % 7) for i in range(60)}
print("begun", flush=True)
draw_all(model, tokenizer, texts, Drawing(1.0, 0.95, 0, 8, 2, 8, 3), Path(sys.argv[2]))
print("through", flush=True)
"""


@pytest.mark.parametrize("kill", [1, pytest.param(10, marks=pytest.mark.prove)])
def test_inference_killed_again_and_again_ends_with_every_row_once(kill, tmp_path):
    begin, file, rng, kills = start(tmp_path / "model"), tmp_path / "rows.jsonl", random.Random(0), 0
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", COMMAND, str(begin), str(file)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "begun\n"
        try:
            process.wait(rng.uniform(0.02, 0.2) if kills < kill else None)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    model, tokenizer = load_model(begin)
    texts = {f"q{i}": "Should I keep the ring?" + " Why?" * (i % 7) for i in range(60)}
    drawing = Drawing(1.0, 0.95, 0, 8, 2, 8, 3)
    through = draw_all(model, tokenizer, texts, drawing, tmp_path / "through.jsonl")
    found = draw_all(model, tokenizer, texts, drawing, file)
    assert kills == kill and found == through and len({(r["id"], r["sample"]) for r in found}) == 120 == len(found)


def test_a_file_that_was_cut_off_or_is_anothers_costs_its_rows_alone(tmp_path):
    model, tokenizer = load_model(start(tmp_path / "model"))
    texts, drawing, file = {f"q{i}": "Should I keep the ring?" * (i + 1) for i in range(5)}, Drawing(1.0, 1.0, 0, 6, 1, 2, 0), tmp_path / "rows.jsonl"
    whole = draw_all(model, tokenizer, texts, drawing, file)
    kept = file.read_text()
    for cut in (5, 40, len(kept) // 2, len(kept) - 3):
        file.write_text(kept[:cut])
        assert draw_all(model, tokenizer, texts, drawing, file) == whole and file.read_text() == kept
    other = draw_all(model, tokenizer, texts, replace(drawing, seed=1), file)
    assert [row["completion"] for row in other] != [row["completion"] for row in whole], "what was drawn otherwise is not taken up"
    head = file.read_text().splitlines()[0]
    for change in ({"key": "another model"}, {"texts": {i: f"{text} Why?" for i, text in texts.items()}}):
        draw_all(model, tokenizer, change.get("texts", texts), replace(drawing, seed=1), file, change.get("key", ""))
        assert file.read_text().splitlines()[0] != head


def test_a_study_leaves_tables_of_every_method(outputs):
    folder = outputs / "test" / "steerable" / "report"
    lines = (folder / "scores_value_kaleidoscope.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["always A", "majority", "question-modal", "zero-shot", "sft", "rlvr", "sft-blind", "prompted", "personas"]
    record = json.loads((folder / "run.json").read_text())
    assert record["counts"]["methods"] == 6
    for stage, files in {"prompted": ["rules/answers.jsonl"], "pluralism": ["personas/chosen.jsonl"], "probes": ["probes.csv"], "faithfulness": ["judgements.jsonl"], "moderation": ["flags.csv"]}.items():
        runs = list((outputs / "test" / "steerable" / stage).glob("*/*/*/run.json"))
        assert runs and all((run.parent / file).exists() for run in runs for file in files), stage
    assert (folder / "probed.csv").exists() and (folder / "best_looks.csv").exists()
