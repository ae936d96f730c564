"""Prompted large models: every row asked once and as it is, whatever comes back; a replay without network or key; models that cannot be asked say so; what it would cost."""

import json
import socket
from collections import Counter
from dataclasses import replace

import pytest
from aiohttp import web
from asked_server import serving

from valuecot.data.perspectives import survey_world, value_world
from valuecot.data.questions import Question
from valuecot.data.views import worded
from valuecot.flow.plan import Job, Plan
from valuecot.judge.methods import answered
from valuecot.providers.cache import Cache, read_export
from valuecot.settings import load
from valuecot.steerable.prompted import run_prompted, shown_models, shown_replies
from valuecot.store import read_json, read_records, write_records
from valuecot.teacher import prompted_bill
from valuecot.teacher.desks import replies_path
from valuecot.types import Answer, Run

KEY = "sk-planted-0123456789abcdef"
OPTIONS = ("Support", "Oppose", "Either")
SAID = {  # scenario -> what the server writes
    "a plain row": "It helps.\n\nAnswer: A", "a lower-case letter": "It helps.\n\nanswer: (b)", "two answers": "Answer: A\n\nNo, wait.\n\nAnswer: C", "no answer": "I cannot say.", "a letter beyond": "Answer: Z",
    "an empty reply": "", "a refusal": None, "a cut": "It is a long", "a bad request": None, "two lines\u2028that are one": "It helps.\u2028So it does.\n\nAnswer: A",
}  # fmt: skip
ROWS = [Question(str(i), scenario, "Honesty", "value", OPTIONS, "A", split="test") for i, scenario in enumerate(SAID)]
LETTERS = ["A", "B", "C", None, "Z", None, None, None, None, "A"]


class Model:
    "OpenAI's chat completions; `closed` refuses everybody's key."

    def __init__(self):
        self.closed, self.asked, self.bodies, self.keys = False, Counter(), [], set()

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        scenario = body["messages"][0]["content"].partition("Situation: ")[2].partition("\nValue:")[0]
        self.asked[scenario] += 1
        self.bodies.append(body)
        self.keys.add(request.headers["Authorization"])
        if self.closed:
            return web.json_response({"error": {"message": f"{request.headers['Authorization']} is not welcome"}}, status=401)
        if scenario == "a bad request":
            return web.json_response({"error": {"message": "no such character"}}, status=400)
        message = {"role": "assistant", "content": SAID[scenario]} | ({"refusal": "I cannot help with that."} if scenario == "a refusal" else {})
        choice = {"index": 0, "finish_reason": "length" if scenario == "a cut" else "stop", "message": message}
        return web.json_response({"model": body["model"], "choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 12}})


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def root(model):
    with serving({"/v1/chat/completions": model.answer}) as found:
        yield found


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def stage(tmp_path, name: str, overrides: str, questions: list[Question] = ROWS) -> Run:
    "A run of the stage over these rows."
    folder = tmp_path / "prompts"
    write_records(folder / "questions.jsonl", [*questions, replace(questions[0], id="train", split="train")])
    plan, job = Plan("test", "steerable", overrides), Job("steerable", "prompted", dataset="value_kaleidoscope")
    (tmp_path / name).mkdir(exist_ok=True)
    return Run("prompted", "steerable", "test", "all", "all", "all", tmp_path / name, plan.reads(job), {"prompts/all-value_kaleidoscope/all/all": folder}, "", "value_kaleidoscope")


def paid(root: str = "", more: str = "") -> str:
    return f"steerable.prompted.models=gpt-4.1 {f'teacher.gpt-4.1.base_url={root}/v1' if root else ''} {more}"


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what is asked, and what comes
def test_every_row_is_asked_as_it_is_and_read_as_any_completion(tmp_path, root, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run = stage(tmp_path, "a", paid(root))
    table = run_prompted(run)
    body = next(b for b in model.bodies if "a plain row" in b["messages"][0]["content"])
    assert body == {"model": "gpt-4.1-2025-04-14", "messages": [{"role": "user", "content": worded(ROWS[0])}], "max_completion_tokens": 512, "temperature": 0.7, "top_p": 0.95}
    assert model.asked == Counter({scenario: 2 if scenario == "an empty reply" else 1 for scenario in SAID}), "an empty reply is asked for once more, no letter is not"
    assert [a.predicted for a in read_records(run.out / "gpt-4.1" / "answers.jsonl", Answer)] == LETTERS
    lines = [json.loads(line) for line in (run.out / "gpt-4.1" / "completions.jsonl").read_text().split("\n")[:-1]]
    assert lines[0] == {"id": "0", "sample": 0, "completion": "It helps.\n\nAnswer: A", "tokens": 12, "truncated": False} and lines[7]["truncated"]
    why = {row["id"]: row["reason"] for row in map(json.loads, (run.out / "gpt-4.1" / "unscored.jsonl").read_text().splitlines())}
    assert list(why) == ["5", "6", "8"] and why["5"].startswith("empty reply") and why["6"] == "refusal" and why["8"].startswith("400")
    told = table.to_dict("records")[0]
    assert (told["rows"], told["replies"], told["letters"], told["not on offer"], told["truncated"], told["tokens"], told["accuracy"]) == (10, 7, 5, 1, 1, 12, 0.2)
    assert read_json(run.out / "record.json")["counts"]["without a reply"] == {"gpt-4.1": 3}
    page = str(shown_models(run, table)) + str(shown_replies(run, table))
    assert "1 x refusal" in page and "It helps." in page and "not run" not in page


def test_what_it_leaves_is_a_method(tmp_path):
    run = stage(tmp_path, "a", "steerable.prompted.models=rules", [replace(q, split="test") for q in value_world(4)])
    run_prompted(run)
    ids = [q.id for q in read_records(run.folder("prompts") / "questions.jsonl", Question) if q.split == "test"]
    later = replace(run, inputs={"prompted/all-value_kaleidoscope/all/all": run.out})
    (method,) = answered(later, "value_kaleidoscope", ids)
    assert (method.model, method.arm, len(method.completions)) == ("rules", "prompted", len(ids)) and None not in method.predicted


def test_a_replay_without_network_or_key_is_the_same_to_the_byte(tmp_path, root, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    first = stage(tmp_path, "a", paid(root))
    run_prompted(first)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "elsewhere"))

    def off(*words, **named):
        raise AssertionError("nobody is asked")

    monkeypatch.setattr(socket.socket, "connect", off)
    second = stage(tmp_path, "b", paid(more=f"steerable.prompted.replies={first.out}"))
    run_prompted(second)
    assert files(first.out) == files(second.out)
    assert len(files(first.out)) == 7
    run_prompted(third := stage(tmp_path, "c", paid()))  # from the cache alone
    assert files(third.out) == files(first.out)


def test_a_planted_key_is_in_no_file(tmp_path, root, model, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model.closed = True
    with pytest.raises(RuntimeError) as error:
        run_prompted(stage(tmp_path, "a", paid(root)))
    model.closed = False
    run_prompted(stage(tmp_path, "a", paid(root)))
    assert model.keys == {f"Bearer {KEY}"}, "it was sent"
    assert KEY not in str(error.value) + "".join(capfd.readouterr())
    assert [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []
    with Cache(replies_path()) as cache:
        assert KEY not in str(cache.ledger()) and cache.ledger()[0]["replies"] == 7
    assert KEY not in str(read_export(tmp_path / "a" / "replies.jsonl.gz"))


# ---- what cannot be asked
def test_a_model_without_its_key_is_not_run_and_the_others_are(tmp_path):
    run = stage(tmp_path, "a", "steerable.prompted.models=rules,gpt-4.1", [replace(q, split="test") for q in survey_world(2)])
    table = run_prompted(run)
    assert {p.name for p in run.out.iterdir() if p.is_dir()} == {"rules"}
    assert read_json(run.out / "record.json")["counts"]["not_run"] == {"gpt-4.1": "OPENAI_API_KEY is not set"}
    page = str(shown_models(run, table))
    assert "not run: OPENAI_API_KEY is not set" in page and "delete steerable/prompted/all-value_kaleidoscope/all/all/run.json" in page


def test_weights_that_are_not_there_are_not_run(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, model, said in (("a", "no/such/model", "no such folder"), ("b", tmp_path / "empty", "tokenizer")):
        run = stage(tmp_path, name, f"steerable.prompted.models=transformers teacher.transformers.model={model}")
        table = run_prompted(run)
        assert said in table["not run"][0] and "\n" not in table["not run"][0] and "not run: " in str(shown_models(run, table)) and "Nobody answered" in str(shown_replies(run, table))


def test_what_may_pass_stops_the_stage_and_loses_nothing(tmp_path, root, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run_prompted(stage(tmp_path, "a", paid(root), ROWS[:4]))
    model.closed = True
    with pytest.raises(RuntimeError, match="6 questions have no reply yet .*401.*what came is kept in replies.sqlite, and the next run asks only for the rest"):
        run_prompted(stage(tmp_path, "b", paid(root)))
    assert not (tmp_path / "b" / "record.json").exists()
    model.closed, model.asked = False, Counter()
    run_prompted(stage(tmp_path, "b", paid(root)))
    assert not set(model.asked) & set(list(SAID)[:4])
    with pytest.raises(RuntimeError, match="raise steerable.prompted.cap"):
        run_prompted(stage(tmp_path, "c", paid(root, "steerable.prompted.temperature=0.5 steerable.prompted.cap=0.00001")))


def test_a_model_that_answers_nothing_is_no_score(tmp_path, root, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(RuntimeError, match="no reply came of 2 rows to gpt-4.1 .*refusal.*nothing to score"):
        run_prompted(stage(tmp_path, "a", paid(root), [ROWS[6], ROWS[8]]))


# ---- settings and the plan
@pytest.mark.parametrize("change, said", [
    ("steerable.prompted.models=gpt4.1", "steerable.prompted.models: unknown entry 'gpt4.1'; did you mean 'gpt-4.1'"), ("steerable.prompted.models=model.llama", r"add a section \[teacher.model.llama\]"),
    ("steerable.prompted.models=rules,rules", "name each once"), ("steerable.faithfulness.judges=model.lama", "did you mean 'model.llama'"), ("steerable.faithfulness.judges=gpt", "steerable.faithfulness.judges: unknown entry"),
    ("steerable.moderation.by=omni", "unknown word"),
])  # fmt: skip
def test_models_and_judges_that_nobody_is(change, said):
    with pytest.raises((KeyError, ValueError), match=said):
        load("tiny", change)


def test_a_stage_reads_the_teachers_that_it_asks_and_no_others():
    job = Job("steerable", "prompted", dataset="opinionqa")
    plans = {change: Plan("tiny", "steerable", f"steerable.prompted.models=rules,gpt-4.1 {change}") for change in ("", "teacher.gpt-4.1.max_tokens=99", "teacher.gpt-4.1-mini.max_tokens=99")}
    assert list(plans[""].reads(job).sections) == ["steerable.prompted", "teacher.rules", "teacher.gpt-4.1"]
    keys = {change: plan.key(job)["settings"] for change, plan in plans.items()}
    assert keys["teacher.gpt-4.1-mini.max_tokens=99"] == keys[""] != keys["teacher.gpt-4.1.max_tokens=99"]
    assert not any(j.stage == "prompted" for j in Plan("tiny", "steerable", "steerable.prompted.models=").jobs())


def test_the_plan_says_what_models_and_judges_would_cost(tmp_path, monkeypatch):
    assert prompted_bill.bill(load("tiny")) == "prompted models, teachers: nothing to pay\n  rules: 240 questions, 0 of them on disk, nothing to pay\njudges of faithfulness: no teacher, nothing to pay"
    paper = prompted_bill.bill(load("paper"))
    assert "gpt-4.1: 31,000 questions" in paper and "claude-sonnet-4.6: 20,000 questions" in paper and "is not run, and the tables say so" in paper
    assert "no teacher" in prompted_bill.bill(load("paper", "steerable.prompted.models="))
    run_prompted(stage(tmp_path, "a", "steerable.prompted.models=rules", prompted_bill.planned_rows(load("test"), "value_kaleidoscope")[0]))
    assert "rules: 24 questions, 24 of them on disk" in prompted_bill.bill(load("test"))
    assert prompted_bill.main(["--set", "steerable.prompted.models=gpt"]) == 2
