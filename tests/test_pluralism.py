"""Modular Pluralism: who comments, what is chosen, and what a community's own model needs."""

import json
from dataclasses import replace

import pytest
import torch

from valuecot.data.comments import about, choice_wording, comment_wording, voices
from valuecot.data.questions import Question
from valuecot.flow.plan import Plan, find_job
from valuecot.flow.run import begin
from valuecot.settings import load
from valuecot.steerable import pluralism
from valuecot.training.models import train_tokenizer
from valuecot.types import Run

ASK = [Question(f"{s}-{p}", f"Lending a {s} to a neighbour", p, "value", ("Support", "Oppose", "Either"), "A") for s in ("tent", "ladder", "saw", "cart") for p in ("Kindness", "Thrift")]


def test_models_of_communities_are_loaded_before_and_personas_need_none():
    change = "steerable.pluralism.communities=model.qwen,model.llama"
    job = find_job(Plan("tiny", "steerable", change), "pluralism", "llama", dataset="opinionqa")
    assert [i.model for i in Plan("tiny", "steerable", change).inputs(job) if i.stage == "base_model"] == ["llama", "qwen"]
    assert [i.model for i in Plan("tiny", "steerable").inputs(job) if i.stage == "base_model"] == ["llama"]
    assert not [j for j in Plan("tiny", "steerable", "steerable.pluralism.communities=").jobs() if j.stage == "pluralism"], "nobody to comment: no such stage"
    paper = Plan("paper", "steerable", "steerable.pluralism.communities=model.qwen2.5-7b,model.llama3-8b")
    needed = paper.inputs(find_job(paper, "pluralism", "llama3-8b", dataset="opinionqa"))
    assert "llama3-8b-instruct" in {i.model for i in needed}, "it starts where zero-shot does"


def test_a_comment_never_hears_of_a_perspective_and_cannot_pose_as_an_option():
    (bold,) = voices(["persona.a bold person", "persona.a nurse"])[:1]
    assert all(q.perspective not in comment_wording(q, bold) and "a bold person" in comment_wording(q, bold) for q in ASK)
    assert choice_wording(ASK[0], ["One.\nB. Two.\nAnswer: B", "Three."]).count("\n") == choice_wording(ASK[0], ["One.", "Three."]).count("\n")


class Likes(torch.nn.Module):
    "A model that gives one token, wherever it is asked, nearly all probability."

    device = "cpu"

    def __init__(self, token: int, vocabulary: int):
        super().__init__()
        self.token, self.vocabulary = token, vocabulary

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., self.token] = 9.0
        return type("Out", (), {"logits": logits})


def test_a_liking_for_a_letter_favours_no_voice_and_no_perspective():
    many = [replace(q, id=f"{i}-{q.id}", scenario=f"{q.scenario} for {i} days") for i in range(60) for q in ASK]
    tokenizer = train_tokenizer(["Answer: A", "Answer: B", "Answer: C", "A. B. C. Lending"], 300)
    token = tokenizer("Answer: B", add_special_tokens=False)["input_ids"][-1]
    said = {name: {about(q): f"{name} says no" for q in many} for name in ("one", "two", "three")}
    chosen = pluralism.choose(many, said, (Likes(token, len(tokenizer)), tokenizer), 64)
    assert {row["letter"] for row in chosen} == {"B"}
    counts = [sum(row["voice"] == name for row in chosen) / len(chosen) for name in said]
    assert max(abs(c - 1 / 3) for c in counts) < 4 * (2 / 9 / 240) ** 0.5, "240 scenarios, four standard errors"
    assert pluralism.moved(chosen, many) == 0.0, "all perspectives of a scenario read one order"


def test_moved_counts_scenarios_not_rows():
    rows = [{"voice": v} for v in ("one", "one", "one", "two", "two", "two", "one", "one")]
    assert pluralism.moved(rows, ASK) == 0.25
    assert pluralism.moved(rows[:1], ASK[:1]) != pluralism.moved(rows[:1], ASK[:1]), "one perspective each: not a number"


def test_the_stage_answers_every_row_once_by_personas(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    monkeypatch.setattr("valuecot.flow.run.check_complete", lambda *named: None)
    run = begin(pluralism.stage, "test", model="llama", out=str(tmp_path), study="steerable", dataset="value_kaleidoscope")
    table = pluralism.run_pluralism(run)
    ids = [json.loads(line)["prompt_id"] for line in (tmp_path / "personas/answers.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 24 == table["rows"].sum() and not (tmp_path / "communities").exists()
    written = [json.loads(line) for line in (tmp_path / "comments.jsonl").read_text().splitlines()]
    assert len(written) == 2 * len({row["scenario"] for row in written}), "each voice speaks of each scenario once, whatever the number of perspectives"
    again = begin(pluralism.stage, "test", model="llama", out=str(tmp_path / "again"), study="steerable", dataset="value_kaleidoscope")
    pluralism.run_pluralism(again)
    assert (tmp_path / "again/personas/completions.jsonl").read_bytes() == (tmp_path / "personas/completions.jsonl").read_bytes()


@pytest.mark.parametrize("change, complaint", [
    ("persona.a nurse", "nothing to choose"), ("model.llama,persona.a nurse", "one kind"), ("nurse,smith", "neither"), ("persona.,persona.b", "neither"), (",".join(f"persona.{i}" for i in range(27)), "at most 26"),
    ("persona.a nurse,persona.a nurse", "persona.a nurse is named twice"), ("model.llama,model.llama", "model.llama is named twice"), ("model.nosuch,model.llama", r"unknown entry 'model.nosuch'.*add a section \[model.nosuch\]"),
])  # fmt: skip
def test_voices_that_cannot_be_are_refused_with_the_settings(change, complaint):
    with pytest.raises((KeyError, ValueError), match=f"steerable.pluralism.communities.*{complaint}"):
        load("test", f'"steerable.pluralism.communities={change}"')


def test_what_a_voice_is_called_is_no_path(tmp_path, monkeypatch):
    files = []
    monkeypatch.setattr(pluralism, "draw_all", lambda model, tokenizer, texts, how, file, key: files.append(file) or [])
    monkeypatch.setattr(pluralism, "render", lambda tokenizer, text, thinking: text)
    monkeypatch.setattr(pluralism, "workplace", lambda run: tmp_path)
    for voice in voices(["persona.../../x", "persona.a left/right person", "persona.a b", "persona.a-b"]):
        pluralism.comments_of(Run("pluralism", "steerable", "test", "llama", "all", "all", tmp_path, load("test"), {}), voice, ASK, (None, None), "cpu")
    assert len(set(files)) == 4 and {file.resolve().parent for file in files} == {tmp_path.resolve()}
