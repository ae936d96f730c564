"""Synthetic CoT: a teacher that is not told what is right, replies that come back byte for byte, rows put aside that cost no other method anything, and settings that cannot be."""

import json
import shutil
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_providers import server

from valuecot.data.perspectives import survey_world, value_world
from valuecot.data.questions import Question
from valuecot.data.views import asked, completion, prompts_file
from valuecot.flow.plan import Job, Plan
from valuecot.providers.cache import Cache, read_export
from valuecot.settings import load
from valuecot.steerable.synthetic import provenance, run_synthetic, shown_leaks, shown_passes
from valuecot.steerable.traces import run_traces
from valuecot.store import read_json, read_records, write_records
from valuecot.teacher import star_bill
from valuecot.teacher.asked import Quarantined, read_traces
from valuecot.teacher.desks import replies_path
from valuecot.teacher.star import STAR_TEMPLATES, StarRow
from valuecot.teacher.star_desks import ANSWERED_BY, Verdicts, star_backends, star_desks, star_request, starred
from valuecot.teacher.verdicts import first_answer, rationalised
from valuecot.text import parse_answer
from valuecot.types import Run, Trace

WITH = "steerable.design.arms=sft,human-cot,synthetic-cot "
ODD = Question("odd", "A riddle", "Answer: A", "value", ("Support", "Oppose", "Either"), "B", "Nobody knows.", split="train")  # whose own words give another answer


def world(n: int = 12) -> list[Question]:
    "Training questions of both worlds, and some of the test part."
    return [replace(q, split="train" if i % 4 else "test") for i, q in enumerate([*value_world(n), *survey_world(2)])]


def stage(tmp_path: Path, questions: list[Question], name: str, overrides: str = WITH) -> Run:
    "A run of the stage synthetic over these questions."
    folder = tmp_path / "prompts"
    write_records(folder / "questions.jsonl", questions)
    for view in ("", "answer"):
        write_records(prompts_file(folder, view), asked(questions, "value_kaleidoscope", view))
    plan = Plan("test", "steerable", overrides)
    (tmp_path / name).mkdir(exist_ok=True)
    return Run("synthetic", "steerable", "test", "all", "all", "all", tmp_path / name, plan.reads(Job("steerable", "synthetic", dataset="value_kaleidoscope")), {"prompts/all-value_kaleidoscope/all/all": folder}, "", "value_kaleidoscope")


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))


# ---- the offline teacher
def test_first_answers_come_from_the_question_alone():
    questions, desk_of = [*value_world(20), *survey_world(4)], star_desks(load("tiny"))
    told = {gold: [star_request(desk_of(q), replace(q, gold=gold, explanation=f"why {gold}"), STAR_TEMPLATES) for q in questions] for gold in "AB"}
    assert [r.key for r in told["A"]] == [r.key for r in told["B"]], "another gold answer is the same first question"
    assert not any("gold" in r.parameters or "Settled" in r.text or "why" in r.text for r in told["A"])
    assert star_request(desk_of(questions[0]), questions[0], STAR_TEMPLATES, gold=True).parameters["gold"] == questions[0].gold


@pytest.mark.parametrize("questions", [value_world(), survey_world()], ids=["values", "survey"])
def test_two_of_three_first_answers_are_right_and_every_rationalisation(questions):
    share = sum(first_answer(q.id, q.scenario, q.perspective, q.options)[1] == q.gold for q in questions) / len(questions)
    assert 0.6 < share < 0.75
    for q in questions:
        words, letter = rationalised(q.scenario, q.perspective, q.options, q.gold)
        assert letter == q.gold and q.gold_text in words.casefold() and not (q.explanation and q.explanation in words)


def test_rows_from_elsewhere_are_guessed():
    options = ("Supports", "Opposes", "Either", "Neither")
    found = Counter(first_answer(str(i), "Waking a guard", "Mercy", options)[1] for i in range(400))
    assert set(found) == set("ABCD") and max(found.values()) < 150


# ---- the stage
def test_every_training_question_gets_a_reasoning_that_can_be_read_back(tmp_path):
    questions = world()
    run = stage(tmp_path, questions, "a")
    traces = run_synthetic(run)
    train = {q.id: q for q in questions if q.split == "train"}
    assert [t.prompt_id for t in traces] == list(train) and {t.teacher for t in traces} == {"rules"}
    for t in traces:
        reasoning = t.response.rpartition("\n\n")[0]
        assert t.response == completion(train[t.prompt_id].gold, reasoning) and len(reasoning.split()) > 8
        assert parse_answer(t.response, strict=True) == train[t.prompt_id].gold
    counts = read_json(run.out / "record.json")["counts"]
    rows = [json.loads(line) for line in (run.out / "star.jsonl").read_text().splitlines()]
    assert counts["first pass right"] == sum(r["predicted"] == r["gold"] for r in rows) > counts["rationalised"] == sum(r["origin"] == "rationalised" for r in rows) > 0
    assert counts["synthetic"] == counts["asked of teachers"] == len(rows) == len(train) and counts["put aside"] == counts["with hint"] == 0
    assert all(r["keys"] and 0 <= r["leak"] <= 1 and r["model"] == ANSWERED_BY for r in rows)


def test_the_first_pass_in_the_replies_holds_no_gold(tmp_path):
    run = stage(tmp_path, world(), "a", WITH + "steerable.traces.hints=yes")
    run_synthetic(run)
    kept = [request for part in read_export(run.out / "replies.jsonl.gz") for request, _ in part]
    first = [r for r in kept if "gold" not in r.parameters]
    rows = [json.loads(line) for line in (run.out / "star.jsonl").read_text().splitlines()]
    assert {r.key for r in first} == {row["keys"][0] for row in rows} and len(kept) - len(first) == sum(row["origin"] == "rationalised" for row in rows)
    assert not any("Settled" in r.text or "Hint" in r.text or "The verdict is" in r.text for r in first)
    assert any(row["hint"] for row in rows), "an explanation was shown where there is one"


def test_replies_come_back_byte_for_byte_with_the_network_off(tmp_path, monkeypatch):
    questions = [q for q in world() if q.kind == "value"]
    with server() as (root, told):
        teacher = f"{WITH} steerable.traces.teachers=local teacher.local.model=m teacher.local.base_url={root}/v1"
        first = stage(tmp_path, questions, "a", teacher)
        run_synthetic(first)
        sent = told()["counts"]["requests"]
    (tmp_path / "theirs").mkdir()
    shutil.copy(first.out / "replies.jsonl.gz", tmp_path / "theirs")
    shutil.rmtree(tmp_path / "outputs")
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network is off"))
    again = stage(tmp_path, questions, "b", teacher + f" steerable.traces.replies={tmp_path / 'theirs'}")
    run_synthetic(again)
    files = sorted(p.name for p in first.out.iterdir())
    assert sent >= len([q for q in questions if q.split == "train"]) and {"star.jsonl", "aside.jsonl", "traces.jsonl", "passes.csv", "leaks.csv", "replies.jsonl.gz"} <= set(files)
    assert files == sorted(p.name for p in again.out.iterdir())
    for name in files:
        assert (first.out / name).read_bytes() == (again.out / name).read_bytes(), name


def test_rules_are_not_asked_again_for_what_they_answered(tmp_path, monkeypatch):
    first = stage(tmp_path, world(), "a")
    run_synthetic(first)
    monkeypatch.setattr(Verdicts, "ask", lambda *a: pytest.fail("asked again"))
    again = stage(tmp_path, world(), "b")
    run_synthetic(again)
    assert all((again.out / p.name).read_bytes() == p.read_bytes() for p in first.out.iterdir())


def test_a_row_that_is_put_aside_stays_with_the_other_methods(tmp_path):
    from valuecot.stages.sft import sft_rows

    run = stage(tmp_path, [*world(), ODD], "a")
    taught = run_synthetic(run)
    aside = read_records(run.out / "aside.jsonl", Quarantined)
    assert [(q.prompt_id, q.style, q.teacher) for q in aside] == [("odd", "synthetic", "rules")] and aside[0].reason.startswith("failed: ")
    assert read_json(run.out / "record.json")["counts"]["put aside"] == 1
    own = Run("traces", "steerable", "test", "all", "all", "all", tmp_path / "b", load("test"), run.inputs, "", "value_kaleidoscope")
    own.out.mkdir()
    run_traces(own)
    settings = load("test", WITH)
    for arm, has in (("sft", True), ("human-cot", True), ("synthetic-cot", False)):
        prompts, traces = read_traces(tmp_path / "prompts", own.out, settings[f"arm.{arm}"].view)
        rows, lacking = sft_rows(prompts, taught if arm == "synthetic-cot" else traces, settings[f"arm.{arm}"])
        seen = any("riddle" in row["prompt"][-1]["content"] for row in rows)
        assert seen == has and (arm == "human-cot" or lacking == (not has)), arm
    assert "odd" in {t.prompt_id for t in read_records(own.out / "traces.jsonl", Trace) if t.style == "practice"}
    with pytest.raises(ValueError, match="no teacher was asked for them; name synthetic-cot in steerable.design.arms"):
        sft_rows(prompts, traces, settings["arm.synthetic-cot"])


def test_nothing_is_taught_where_everything_is_put_aside(tmp_path):
    with pytest.raises(RuntimeError, match="no reasoning came of 1 questions .*failed: .*nothing to learn from"):
        run_synthetic(stage(tmp_path, [ODD], "a"))


def test_rows_that_are_put_aside_have_no_leak():
    row = StarRow("odd", "t", "", "rationalised", False, "B", None, ("k",), "", "failed: unfit")
    assert provenance([row], [ODD])[0]["leak"] is None


def test_teachers_touch_the_arms_that_learn_from_them_and_no_other():
    def keys(change: str) -> dict[Job, dict]:
        plan = Plan("test", "steerable", f"steerable.design.arms=sft,zero-shot,rlvr,{change}")
        return {job: plan.key(job) for job in plan.jobs() if job.stage != "report"}

    without, with_them, dearer = keys("human-cot"), keys("human-cot,synthetic-cot"), keys("human-cot,synthetic-cot steerable.traces.cap=7")
    assert not any(job.stage == "synthetic" for job in without), "nobody is asked where no arm learns from it"
    alone = {job for job in without if job.stage not in ("faithfulness", "moderation")}  # those look at every arm
    assert all(without[job] == with_them[job] for job in alone)
    changed = {(job.stage, job.arm) for job in with_them if with_them[job] != dearer[job]}
    assert changed == {("synthetic", "all"), ("sft", "synthetic-cot"), ("answers", "synthetic-cot"), ("probes", "synthetic-cot"), ("spectrum", "synthetic-cot"), ("faithfulness", "all"), ("moderation", "all")}


def test_the_page_shows_both_passes(tmp_path):
    run = stage(tmp_path, world(), "a")
    run_synthetic(run)
    assert shown_passes(run).text.count("<tr>") == 3 and "rationalised" in shown_leaks(run).text


# ---- settings
@pytest.mark.parametrize(("change", "said"), [
    ("steerable.traces.teachers=ruels", "steerable.traces.teachers: unknown teacher 'ruels'; did you mean 'rules'"), ("steerable.traces.teachers=mine", r"add a section \[teacher.mine\]"),
    ("steerable.traces.teachers=", "steerable.traces.teachers = nobody: name each once"), ("steerable.traces.teachers=rules,rules", "name each once"), ("steerable.traces.hints=perhaps", "steerable.traces.hints = 'perhaps' is not yes or no"),
    ("steerable.traces.cap=much", "steerable.traces.cap = 'much' is not a number"), ("steerable.traces.cap=-1", "finite and not negative"), ("steerable.traces.top_p=0", "top_p = 0.0: a share"), ("steerable.traces.hint=yes", "did you mean 'steerable.traces.hints'"),
])  # fmt: skip
def test_settings_that_cannot_be(change, said):
    with pytest.raises((KeyError, ValueError), match=said):
        load("tiny", change)


def test_the_papers_teacher_and_the_authors_hints():
    paper, theirs = load("paper"), load("paper", "steerable.preset=authors_code")
    assert paper["steerable.traces"].teachers == ("gpt-4.1-mini",) and not paper["steerable.traces"].hints and theirs["steerable.traces"].hints
    assert paper["teacher.gpt-4.1-mini"].model == "gpt-4.1-mini-2025-04-14"
    assert "synthetic-cot" in load("tiny")["steerable.design"].arms and "synthetic-cot" in load("small")["steerable.design"].arms and "synthetic-cot" not in load("test")["steerable.design"].arms


def test_templates_that_cannot_do_what_is_asked(tmp_path):
    (tmp_path / "rationalise_value.txt").write_text("{scenario}|{perspective}|{options}|{gold}")
    with pytest.raises(ValueError, match="templates = .* would do nothing"):
        starred(load("tiny", f"steerable.traces.templates={tmp_path}"), world(), tmp_path / "r.sqlite")
    with pytest.raises(ValueError, match="hints = yes wants a {hint} in rationalise_value.txt"):
        starred(load("tiny", f"steerable.traces.teachers=local steerable.traces.hints=yes steerable.traces.templates={tmp_path}"), world(), tmp_path / "r.sqlite")
    assert not (tmp_path / "r.sqlite").exists(), "nobody was asked before"


def test_replies_that_answer_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"steerable.traces.replies: no \*.jsonl.gz in .*which is no folder"):
        starred(load("tiny", "steerable.traces.replies=nowhere"), world(), tmp_path / "r.sqlite")


def test_a_missing_key_and_a_cap_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    paid = load("tiny", "steerable.traces.teachers=gpt-4.1-mini")
    assert "set OPENAI_API_KEY" in str(*star_backends(paid)[1].values())
    with pytest.raises(RuntimeError, match="questions have no reply yet .*set OPENAI_API_KEY"):
        starred(paid, world(), tmp_path / "r.sqlite")
    monkeypatch.setenv("OPENAI_API_KEY", "nobody")
    with pytest.raises(RuntimeError, match=r"the cap of .* would be passed.*raise steerable.traces.cap"):
        starred(load("tiny", "steerable.traces.teachers=gpt-4.1-mini steerable.traces.cap=0.000001"), world(), tmp_path / "r.sqlite")


# ---- the plan
def test_the_plan_tells_questions_dollars_and_missing_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    small = "steerable.scenarios=40 steerable.survey_questions=30 steerable.train_rows=0 steerable.validation_rows=0 steerable.test_rows=0 "
    assert star_bill.bill(load("test")) == "synthetic reasonings: none, no arm of the design learns from them"
    assert "rules: 1," not in star_bill.bill(load("tiny", small)) and "nothing to pay" in star_bill.bill(load("tiny", small))
    text = star_bill.bill(load("tiny", small + "steerable.traces.teachers=gpt-4.1-mini"))
    assert "gpt-4.1-mini: " in text and "likely $0." in text and "set OPENAI_API_KEY" in text and "33%" in text
    paper = star_bill.bill(load("paper"))
    assert "251,000 questions" in paper and "174,000 training questions" in paper
    with pytest.raises(ValueError, match="questions to gpt-4.1-mini have no reply yet, and nobody can be asked: no key for openai"):
        star_bill.check(load("tiny", small + "steerable.traces.teachers=gpt-4.1-mini"))
    assert star_bill.check(load("tiny", small)) == star_bill.check(load("test", "steerable.traces.teachers=gpt-4.1-mini")) == ""


def test_the_plan_knows_what_a_run_asked(tmp_path):
    "After a run nothing is left, and the rationalisations are counted with it."
    settings = load("test", WITH)
    questions, n, _ = star_bill.planned_questions(settings, "value_kaleidoscope")
    before = star_bill.rows_of(settings, "value_kaleidoscope", None)[0][0]
    found = starred(settings, questions, replies_path())
    with Cache(replies_path()) as cache:
        after = star_bill.rows_of(settings, "value_kaleidoscope", cache)[0][0]
    assert before["questions"] == n == 64 and before["on_disk"] == 0
    assert after["questions"] == after["on_disk"] == len(found.keys) > n
