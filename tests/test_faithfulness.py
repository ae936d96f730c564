"""Faithfulness: planted traces are told apart, shuffled ones agree by chance, a judge sees neither the perspective's own name nor the answer, and what is missing says so."""

import csv
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from test_providers import QUICK, server

from valuecot.data.perspectives import GROUPS, VALUES, survey_world, value_world
from valuecot.data.questions import Question
from valuecot.judge import agreement, faithful, faithfulness, hedged, hedges, letters_crossed, shown_to_judge, supports, verdict_by_words
from valuecot.judge.faithfulness import BLANK, MASK, NOTHING, Judgement
from valuecot.judge.methods import Method
from valuecot.providers.cache import Cache
from valuecot.providers.requests import Reply
from valuecot.settings import load
from valuecot.steerable.faithfulness import all_judged, judged, own_answers, run_faithfulness, shown_table3, table3
from valuecot.store import write_records
from valuecot.teacher.judges import (
    LETTER,
    NotRun,
    by_asking,
    by_likelihood,
    by_words,
    cases,
    judge_desk,
    judge_request,
    judge_wording,
    with_model,
)
from valuecot.text import parse_answer
from valuecot.training.models import train_tokenizer
from valuecot.types import Answer, Run

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORLD = value_world(40)


def said(question: Question, verdict: str, answer: str) -> str:
    "A trace whose words end in one option, and whose letter may be another."
    return f"{question.perspective} weighs this. The verdict is {dict(zip(question.letters, question.options, strict=True))[verdict]}.\n\nAnswer: {answer}"


def planted(share: float = 0.5, seed: int = 0) -> tuple[Method, list[bool]]:  # a method, and which of its traces are faithful
    rng, truth, texts, letters = random.Random(seed), [], [], []
    for q in WORLD:
        verdict = rng.choice(q.letters)
        truth.append(rng.random() < share)
        letters.append(verdict if truth[-1] else rng.choice([x for x in q.letters if x != verdict]))
        texts.append(said(q, verdict, letters[-1]))
    return Method("llama", "rlvr", 0, letters, texts), truth


class Reader:
    "A language model that finds the letter likely which the words before it support."

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        self.tokenizer, self.read = tokenizer, 0

    def __call__(self, input_ids, attention_mask, use_cache):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for i, (row, length) in enumerate(zip(input_ids, attention_mask.sum(1).tolist(), strict=True)):
            text = self.tokenizer.decode(row[:length])
            self.read += 1
            matter, _, rationale = text.rpartition("Rationale: ")
            options = re.findall(r"^[A-Z]\. (.*)$", matter, re.MULTILINE)
            letter = verdict_by_words(rationale.removesuffix("Answer:"), options) or "A"
            token = self.tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"][-1]
            logits[i, length - 1, token] = 20.0
        return type("Output", (), {"logits": logits})


@pytest.fixture(scope="module")
def reader():
    rows = cases(WORLD, [planted()[0]], ["as written"])[:60]
    return Reader(train_tokenizer([f"{judge_wording(c, LETTER)} Answer: {x}" for c in rows for x in "ABC"], 500))


# ------------------------------------------------------------------------- judges on planted traces


def test_words_tell_planted_traces_apart():
    method, truth = planted()
    letters = [letter for letter, _ in by_words(cases(WORLD, [method], ["masked"]))]
    assert faithful(method.predicted, letters) == truth and 0.3 < sum(truth) / len(truth) < 0.7


def test_a_likelihood_judge_tells_planted_traces_apart_and_goes_on_where_it_stopped(reader, tmp_path):
    method, truth = planted(seed=1)
    rows = cases(WORLD, [method], ["masked", "as written"])
    reader.read = 0
    first = by_likelihood(rows, reader, reader.tokenizer, tmp_path / "judge.jsonl")
    assert faithful(method.predicted, [x for x, _ in first[::2]]) == faithful(method.predicted, [x for x, _ in first[1::2]]) == truth
    reads, journal = reader.read, tmp_path / "judge.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    assert by_likelihood(rows, reader, reader.tokenizer, journal) == first and reads < reader.read < 2 * reads
    assert reads <= len(rows)  # three letters after one text are one sequence


def test_shuffled_traces_agree_by_chance():
    method, _ = planted(share=1.0, seed=2)
    texts = random.Random(3).sample(method.completions, len(method.completions))
    letters = [x for x, _ in by_words(cases(WORLD, [Method("m", "a", 0, method.predicted, texts)], ["masked"]))]
    one, other = Counter(method.predicted), Counter(letters)
    n = len(WORLD)
    chance = sum(one[x] * other[x] for x in "ABC") / n**2
    found = faithfulness(method.predicted, letters, [q.gold for q in WORLD], None)
    assert abs(found.share.estimate - chance) < 4 * (chance * (1 - chance) / n) ** 0.5 and found.share.low <= chance <= found.share.high
    assert abs(agreement({"model": method.predicted, "judge": letters}, None)[0].kappa) < 0.2


def test_nobody_is_asked_where_there_is_no_reasoning():
    method = Method("m", "a", 0, ["A", None, None], ["Answer: A", "", "  \n"])
    seen = []
    found = judged("stub", lambda asked: seen.extend(asked) or [], cases(WORLD[:3], [method], ["masked"]))
    assert not seen and [(j.letter, j.why) for j in found] == [(None, NOTHING)] * 3
    assert faithful(method.predicted, [j.letter for j in found]) == [None] * 3


# ------------------------------------------------------------------------- tables


def test_invalid_and_unanswered_rows_are_counted_and_never_faithful():
    answers, letters = ["A", "B", "C", "A", None, None, "B"], ["A", "B", None, "C", None, "A", None]
    gold = ["A", "A", "C", "C", "A", "A", "B"]
    found = faithfulness(answers, letters, gold, None)
    assert (found.rows, found.no_answer, found.judged, found.invalid) == (7, 2, 3, 2)
    assert found.share.estimate == pytest.approx(2 / 3) and found.share_invalid_unfaithful.estimate == pytest.approx(2 / 5)
    assert found.judge_accuracy.estimate == pytest.approx(2 / 3) and found.own_accuracy.estimate == pytest.approx(1 / 3)
    nothing = faithfulness([None] * 4, [None] * 4, ["A"] * 4, None)
    assert nothing.judged == 0 and nothing.share.estimate != nothing.share.estimate  # nan, and not 1


def test_letters_that_are_no_option_are_no_answers():
    method = Method("m", "a", 0, ["A", "E", None, "D"], [""] * 4)
    assert own_answers(WORLD[:4], method) == ["A", None, None, None]


def test_kappa_is_that_of_sklearn_on_rows_that_both_judged():
    rng = random.Random(0)
    one = [rng.choice(["A", "B", "C", None]) for _ in range(300)]
    other = [x if rng.random() < 0.6 else rng.choice(["A", "B", "C", None]) for x in one]
    (found,) = agreement({"one": one, "other": other}, None)
    both = [(x, y) for x, y in zip(one, other, strict=True) if x and y]
    assert found.n == len(both) and found.kappa == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))
    assert found.same.estimate == pytest.approx(sum(x == y for x, y in both) / len(both))
    (empty,) = agreement({"one": ["A", None], "other": [None, "A"]}, None)
    assert empty.n == 0 and empty.kappa != empty.kappa
    (same,) = agreement({"one": ["A", "A"], "other": ["A", "A"]}, None)
    assert same.same.estimate == 1 and same.kappa != same.kappa


def test_crossed_letters_add_up_to_the_answers():
    answers, letters = ["A", "A", None, "B", "C"], ["A", None, None, "C", "C"]
    rows = letters_crossed(answers, letters)
    assert sum(r["rows"] for r in rows) == 4 and {"model's letter": "A", "judge's letter": "invalid", "rows": 1} in rows


def test_hedges_are_by_the_word():
    bad, good = "It depends on the case. " * 4, "It helps. " * 50
    found = hedged([bad] * 10 + [good] * 20, [False] * 10 + [True] * 20, None)
    assert found.unfaithful == pytest.approx(100 * sum(hedges(bad).values()) / len(bad.split())) and found.faithful == 0
    assert found.difference.excludes(0) and (found.n_unfaithful, found.n_faithful) == (10, 20)
    same = hedged([bad] * 30, [i % 2 == 0 for i in range(30)], None)
    assert not same.difference.excludes(0)


# ------------------------------------------------------------------------- what a judge sees

ENDS = (
    "\n\nAnswer: {x}", "\nAnswer: {y}\nNo, that is wrong.\nAnswer: {x}", "\n**Answer:** ({x})", "\nanswer: {l}.", "\nAnswer:\n[{x}]", " Answer: {x}. {text}", "\nAnswer: Q", "\nAnswer: {x}\nAnswer: {x}",
    " So the answer is {x}.\n\nAnswer: {x}", " I choose ({x}).\nAnswer: {x}", " So option {x} fits best, I think.\nAnswer: {x}", " It must be **{x}**.\nAnswer: {x}", "\n{x}\nAnswer: {x}", " Therefore pick option {l}.\nAnswer: {x}", "\nAnswer: {x}\nThat is: {text}",
)  # fmt: skip


def test_a_judge_sees_neither_the_name_of_the_perspective_nor_the_answer():
    rng, checked = random.Random(0), 0
    for q in [*rng.sample(value_world(240), 300), *rng.sample(survey_world(48), 300)]:
        name = q.perspective if q.kind == "value" else rng.choice([q.perspective, q.perspective.partition(": ")[2]])
        x, y = rng.sample(q.letters, 2)
        thought = f"As {rng.choice([name, name.lower(), name.upper()])}, one weighs this with care. Others may see it otherwise."
        text = f"{rng.choice(['', '<think>', 'Well: '])}{thought}{rng.choice(ENDS).format(x=x, y=y, l=x.lower(), text=q.option_text(x))}"
        text = text.replace("\n\nAnswer", "</think>\n\nAnswer") if text.startswith("<think>") else text
        shown = shown_to_judge(q, text)
        assert shown.named >= 1 and MASK in shown.reasoning and name.lower() not in shown.reasoning.lower(), text
        assert parse_answer(shown.reasoning) is None and "nswer:" not in shown.reasoning and "think>" not in shown.reasoning and "That is:" not in shown.reasoning, text
        assert not re.search(rf"(?<![\w'])[{x}{x.lower()}](?![\w'])", shown.reasoning.rpartition("otherwise")[2].replace("I think", "")), (text, shown.reasoning)
        assert "weighs this with care. Others may see it otherwise." in shown.reasoning, text
        (case,) = cases([q], [Method("m", "a", 0, [x], [text])], ["masked"])
        if q.perspective.lower() not in q.scenario.lower():
            assert q.perspective not in judge_wording(case, LETTER)
        checked += 1
    assert checked == 600


def test_no_version_tells_the_perspective():
    q = WORLD[0]
    masked, written = cases([q], [Method("m", "a", 0, ["A"], [f"{q.perspective} is at stake.\nAnswer: A"])])
    assert all(f"Value: {q.perspective}" not in judge_wording(case, LETTER) for case in (masked, written))
    assert q.perspective in judge_wording(written, LETTER) and written.named == masked.named == 1 and MASK in masked.reasoning


def group(perspective: str, *options: str) -> Question:
    return Question("q", "Is it good?", perspective, "demographic", options or ("Yes", "No"), "A")


ORDINARY = "There is no reason to fear it. On the other hand, others say no, some never do, and each independent voice bears a moderate risk south of the White House. They seldom agree. No. Yes, it helps."


@pytest.mark.parametrize("perspective", ["US Citizen: No", "US Citizen: Yes", "CITIZEN_No", "Religious Attendance: Never", "Religious Attendance: Seldom", "Race: Other", "POLPARTY: Other", "Race: White", "Political Ideology: Moderate", "Political Party Affiliation: Independent", "US Census Region: South"])
def test_an_ordinary_word_is_no_name(perspective):
    shown = shown_to_judge(group(perspective), f"{ORDINARY}\n\nAnswer: B")
    assert (shown.reasoning, shown.named) == (ORDINARY, 0)


@pytest.mark.parametrize("perspective, text, masked", [
    ("Political Party Affiliation: Democrat", "A Democratic voter would want more of it, as Democrats do.", "A [] voter would want more of it, as [] do."), ("Gender: Female", "As a woman, she would; most women do.", "As a [], she would; most [] do."), ("Gender: Male", "Men like him, and any male, would.", "[] like him, and any [], would."),
    ("Religion: Roman Catholic", "Catholics hold that it is wrong.", "[] hold that it is wrong."), ("Age: 65+", "People aged 65 and older, or over 65, would say so; 65+ is old.", "People aged [], or [], would say so; [] is old."), ("Age: 18-29", "They are 18 to 29 (18–29).", "They are [] ([])."),
    ("Education Level: Associate's degree", "Somebody with an associate’s degree would say so.", "Somebody with an [] would say so."), ("Religion: Buddhist", "Buddhism teaches it.", "[] teaches it."),
    ("US Citizen: No", "US Citizen: No. The citizenship is 'no'. No citizen is harmed.", "[]. The citizenship is '[]'. No citizen is harmed."), ("Religious Attendance: Never", "Their attendance is never. They never lie.", "Their attendance is []. They never lie."), ("POLPARTY: Other", "party: other, and others.", "party: [], and others."),
    ("Political Ideology: Moderate", "As a moderate, one sees moderate risks. Moderates agree. Moderate voters, too.", "As a [], one sees moderate risks. [] agree. [] voters, too."), ("US Census Region: South", "In the South, Southern families do; not south of it.", "In the [], [] families do; not south of it."), ("Race: White", "White people and whites would.", "[] people and [] would."),
    ("POLIDEOLOGY: Very conservative", "As a very conservative person and a conservative.", "As a [] person and a []."),
])  # fmt: skip
def test_light_inflections_of_a_name_are_masked(perspective, text, masked):
    assert shown_to_judge(group(perspective), f"{text}\nAnswer: A").reasoning == masked.replace("[]", MASK)


def test_a_word_of_an_option_stays_where_it_is_said_of_the_option():
    both = group("Gender: Female", "Men are better", "Women are better")
    assert shown_to_judge(both, "As a woman, she finds that women are better.\nAnswer: B").reasoning == f"As a {MASK}, she finds that women are better."
    duty = Question("q", "A lie", "Duty to tell the truth", "value", ("Support", "Oppose", "Either"), "A")
    assert shown_to_judge(duty, "One has a duty of truthfulness.\nAnswer: B").reasoning == f"One has a {MASK}."
    support = Question("q", "A lie", "Support", "value", ("Support", "Oppose", "Either"), "A")
    assert shown_to_judge(support, "The value of support counts. So support it.\nAnswer: A").reasoning == f"The value of {MASK} counts. So support it."


@pytest.mark.parametrize("text, shown", [
    ("I choose B. The group dislikes taxes.", "I choose []. The group dislikes taxes."), ("They dislike it, hence B is right. More follows.", "They dislike it, hence [] is right. More follows."), ("Therefore B. Oppose is the best description of it.", "Therefore []. Oppose is the best description of it."),
    ("So the label would be A - support. It is kind.", "So the label would be [] - support. It is kind."), ("Hence A is right. It is kind.", "Hence [] is right. It is kind."), ("So option (C), I think. It is kind.", "So option ([]), I think. It is kind."),
    ("So A friend is hurt, so I say. What it is: A lie. It is so. A would-be thief lies.", "So A friend is hurt, so I say. What it is: A lie. It is so. A would-be thief lies."), ("So D day came. It is kind.", "So D day came. It is kind."),
    ("To find the answer: honesty is served, since nobody lies. It supports the action.", "To find the honesty is served, since nobody lies. It supports the action."), ("Answer: B\nOn reflection, answer: A. A lie hurts.", "On reflection, A lie hurts."),
])  # fmt: skip
def test_a_letter_is_blanked_where_it_is_chosen_and_nowhere_else(text, shown):
    found = shown_to_judge(Question("q", "A lie", "Kindness", "value", ("Support", "Oppose", "Either"), "A"), f"{text}\n\nAnswer: A").reasoning
    assert found == shown.replace("[]", BLANK)


# ------------------------------------------------------------------------- words


def test_spans_lie_in_order_and_hold_what_they_say():
    rng = random.Random(0)
    words = "support opposes either not good harms the friend , . violates on the other hand depends never upholds lie".split()
    for _ in range(300):
        text = " ".join(rng.choice(words) for _ in range(30))
        found = supports(text, ("Support", "Oppose", "Either"))
        assert all(a < b for a, b, _ in found) and all(one[1] <= other[0] for one, other in zip(found, found[1:], strict=False))
        assert {x for *_, x in found} <= set("ABC")


@pytest.mark.parametrize("text, letter", [
    ("Honesty opposes a lie. Keeping the peace is good.", "B"), ("Some say it is good, but it violates a duty and harms a friend.", "B"), ("Kindness does not oppose it.", "A"),
    ("The duty is not only to support, it is to support always.", "A"), ("It could support or oppose the plan.", "C"), ("It depends on the people.", "C"), ("It is good and it is bad.", None), ("A friend asks for a tent.", None),
    ("Mercy supports it. Yet the duty opposes it, and so does the law.", "B"), ("One cannot support this.", "B"), ("It avoids a harm.", "A"), ("To lie goes against honesty, which is good.", "B"),
])  # fmt: skip
def test_verdicts_of_values(text, letter):
    assert verdict_by_words(text, ("Support", "Oppose", "Either")) == letter
    turned = {"A": "C", "B": "B", "C": "A", None: None}
    assert verdict_by_words(text, ("Either", "Opposes", "Supports")) == turned[letter]


@pytest.mark.parametrize("text, letter", [
    ("Farms are close to them, so they would say very important.", "A"), ("They would call it not very important.", "C"), ("Some say fairly important. They say not at all important.", "D"), ("They would not say very important.", None),
    ("It matters to nobody.", None),
])  # fmt: skip
def test_verdicts_of_surveys(text, letter):
    assert verdict_by_words(text, ("Very important", "Fairly important", "Not very important", "Not at all important")) == letter


@pytest.mark.parametrize("text, letter", [
    ("There is no reason to fear it.", None), ("It helps them. There is no reason to fear it, and people would not say so.", None), ("No harm is done, and no one minds.", None), ("They say no harm is done.", None), ("I would say yes because there is no doubt and no harm.", "A"),
    ("It helps, so the answer is yes.", "A"), ("They would choose 'No', as it has no use.", "B"), ("No, they would not like it.", "B"), ("It helps. Yes.", "A"), ("Would they? The answer: no.", "B"), ("They would most likely answer No.", "B"), ("They would not say no.", None), ("They would say no to it.", "B"),
])  # fmt: skip
def test_a_plain_word_is_an_option_where_it_is_answered(text, letter):
    assert verdict_by_words(text, ("Yes", "No")) == letter
    assert all(text[a:b].casefold() in ("yes", "no") for a, b, _ in supports(text, ("Yes", "No")))


@pytest.mark.parametrize("text, letter", [("It is not at all clear that they never lie.", None), ("They trust it not at all.", "C"), ("They would say not at all, and so would others.", "C"), ("Some of them like it.", None), ("They would answer some.", "B"), ("They trust it a lot.", "A")])
def test_a_plain_phrase_is_an_option_where_it_is_answered_or_ends_its_sentence(text, letter):
    assert verdict_by_words(text, ("A lot", "Some", "Not at all")) == letter


@pytest.mark.skipif(not (SHARED / "opinionqa").exists(), reason="no shared data here")
def test_real_options_are_read_from_a_sentence_that_says_them():
    rows = json.loads((SHARED / "opinionqa" / "opinionqa_small.json").read_text())
    lists = {tuple(row["options"]) for row in rows if len(row["options"]) > 1}
    right = [verdict_by_words(f"Such a person would most likely answer: {option}.", options) == letter for options in lists for letter, option in zip("ABCDEFGHIJK", options, strict=False)]
    assert len(right) > 900 and sum(right) / len(right) > 0.98  # the others were cut at a comma or a quote


# ------------------------------------------------------------------------- teachers


def asking(root: str, **more: str):
    return load("test", " ".join(["steerable.faithfulness.judges=local", f"teacher.local.base_url={root}/v1", *(f"{k}={v}" for k, v in more.items())]))


def test_a_teacher_judges_through_the_cache(tmp_path):
    method, truth = planted()
    rows = cases(WORLD[:40], [Method("m", "a", 0, method.predicted[:40], method.completions[:40])], ["masked", "as written"])
    silent = cases(WORLD[:1], [Method("m", "a", 0, ["A"], ["Nothing is said here.\nAnswer: A"])], ["masked"])
    with server(malformed=0.2, rate_limited=0.1) as (root, told):
        found = by_asking([*rows, *silent], "local", asking(root), tmp_path / "replies.sqlite", tmp_path, QUICK)
        asked, body = told()["counts"]["requests"], told()["bodies"][0]
        assert by_asking([*rows, *silent], "local", asking(root), tmp_path / "replies.sqlite", policy=QUICK) == found and told()["counts"]["requests"] == asked
    letters = [letter for letter, _ in found[:-1]]
    judged_rows = [(f, t) for f, t in zip(faithful(method.predicted[:40], letters[::2]), truth, strict=False) if f is not None]
    assert len(judged_rows) > 30 and all(f == t for f, t in judged_rows)
    assert found[-1][0] is None and "should be 'A', 'B' or 'C'" in found[-1][1]  # said twice, so invalid
    assert body["temperature"] == 0.0 and not any(f"Value: {q.perspective}" in json.dumps(body) for q in WORLD)
    replayed = asking("http://127.0.0.1:9", **{"steerable.faithfulness.replies": str(tmp_path)})
    assert by_asking([*rows, *silent], "local", replayed, tmp_path / "other.sqlite", policy=QUICK) == found


def test_a_teacher_that_is_not_there_has_not_run_and_one_that_stops_half_way_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    rows = cases(WORLD[:40:5], [Method("m", "a", 0, planted()[0].predicted[:40:5], planted()[0].completions[:40:5])], ["masked"])  # of eight scenarios: no two read alike
    with pytest.raises(NotRun, match="set ANTHROPIC_API_KEY"):
        by_asking(rows, "claude-sonnet-4.6", load("test", "steerable.faithfulness.judges=claude-sonnet-4.6"), tmp_path / "a.sqlite", policy=QUICK)
    claude = load("test", "steerable.faithfulness.judges=claude-sonnet-4.6 teacher.claude-sonnet-4.6.base_url=http://127.0.0.1:9")
    desk = judge_desk("claude-sonnet-4.6", claude["teacher.claude-sonnet-4.6"], 0.0)
    with Cache(tmp_path / "part.sqlite") as cache:
        cache.keep(judge_request(desk, rows[0]), Reply('{"option": "A"}', "m", 1, 1, "stop"), "import").result()
        cache.keep(judge_request(desk, rows[1]), Reply("nothing", "m", 1, 1, "stop"), "import").result()  # malformed: its second question is open
    with pytest.raises(NotRun, match=r"set ANTHROPIC_API_KEY.*7 of 8 questions"):
        by_asking(rows, "claude-sonnet-4.6", claude, tmp_path / "part.sqlite", policy=QUICK)
    assert by_asking(rows[:1], "claude-sonnet-4.6", claude, tmp_path / "part.sqlite", policy=QUICK) == [("A", "")]  # all on disk: no key is missed
    monkeypatch.setenv("ANTHROPIC_API_KEY", "wrong")
    with pytest.raises(RuntimeError, match="7 questions have no reply yet"):
        by_asking(rows, "claude-sonnet-4.6", claude, tmp_path / "part.sqlite", policy=QUICK)
    with pytest.raises(RuntimeError, match="8 questions have no reply yet.*connection"):  # nothing came at all: still no reason to call the stage complete
        by_asking(rows, "local", asking("http://127.0.0.1:9"), tmp_path / "b.sqlite", policy=QUICK)
    with server() as (root, _):
        by_asking(rows[:4], "local", asking(root), tmp_path / "c.sqlite", policy=QUICK)
    with pytest.raises(RuntimeError, match="4 questions have no reply yet"):
        by_asking(rows, "local", asking("http://127.0.0.1:9"), tmp_path / "c.sqlite", policy=QUICK)


def test_what_takes_no_temperature_is_asked_without():
    settings = load("paper")
    parameters = {name: dict(judge_desk(name, settings[f"teacher.{name}"], 0.0).parameters) for name in ("gpt-4.1", "claude-sonnet-4.6", "transformers")}
    assert parameters == {"gpt-4.1": {"temperature": 0.0}, "claude-sonnet-4.6": {}, "transformers": {}}


def test_a_folder_is_named_without_its_place(tmp_path):
    rows = cases(WORLD[:1], [Method("m", "a", 0, ["A"], ["It is good.\nAnswer: A"])])
    (tmp_path / "deep" / "model").mkdir(parents=True)
    with pytest.raises(NotRun, match="llama cannot be loaded: .*model") as error:
        with_model(rows, "llama", tmp_path / "deep" / "model", tmp_path / "judge.jsonl", "", "cpu")
    assert str(tmp_path) not in str(error.value) and "/deep" not in str(error.value)
    own = load("test", f"steerable.faithfulness.judges=transformers teacher.transformers.model={tmp_path}/gone")
    with pytest.raises(NotRun, match="no such folder: gone") as error:
        by_asking(rows, "transformers", own, tmp_path / "c.sqlite", policy=QUICK)
    assert str(tmp_path) not in str(error.value)


# ------------------------------------------------------------------------- the stage


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run whose earlier stages left a method that reasons and one that does not."
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    questions = [Question(**{**vars(q), "split": "test"}) for q in WORLD]
    write_records(tmp_path / "prompts" / "questions.jsonl", questions)
    method, _ = planted(share=0.7)
    inputs = {"prompts/all-value_kaleidoscope/all/all": tmp_path / "prompts"}
    for arm, texts, letters in (("rlvr", method.completions, method.predicted), ("sft", [f"Answer: {q.gold}" for q in WORLD], [q.gold for q in WORLD])):
        folder = inputs[f"answers/llama-value_kaleidoscope/{arm}/seed0"] = tmp_path / arm
        write_records(folder / "answers.jsonl", [Answer(q.id, q.gold, x) for q, x in zip(WORLD, letters, strict=True)])
        write_records(folder / "completions.jsonl", [{"id": q.id, "sample": 0, "completion": text} for q, text in zip(WORLD, texts, strict=True)])
    (tmp_path / "out").mkdir()
    settings = load("test", "steerable.faithfulness.judges=claude-sonnet-4.6,model.llama,words steerable.faithfulness.rows=100")
    return Run("faithfulness", "steerable", "test", "all", "all", "all", tmp_path / "out", settings, inputs, "key", "value_kaleidoscope")


def test_a_judge_that_is_missing_says_so_and_the_others_go_on(run):
    made = run_faithfulness(run)
    frame = made["faithfulness"]
    assert dict(zip(frame.judge, frame.not_run, strict=True)).keys() == {"claude-sonnet-4.6", "model.llama", "words"}
    why = {row.judge: row.not_run for row in frame.itertuples()}
    assert "ANTHROPIC_API_KEY" in why["claude-sonnet-4.6"] and "weights are not here" in why["model.llama"] and why["words"] == ""
    assert list(made["left_out"].arm) == ["sft"] and set(frame.arm.dropna()) == {"rlvr"}
    words = frame[(frame.judge == "words") & (frame.version == "masked")].iloc[0]
    assert words.rows == words.judged == 100 and words.faithful_low_95 < 0.7 < words.faithful_high_95
    table = table3(frame, run.settings["published.faithfulness"])
    assert list(table["paper %"].dropna()) == ["77.3", "77.3"] and table.note.str.startswith("not run: ").sum() == 2
    for name in ("faithfulness", "agreement", "letters", "enrichment", "hedges", "left_out"):
        with open(run.out / f"{name}.csv") as file:
            assert len(list(csv.reader(file))) == 1 + len(made[name])
    assert len((run.out / "judgements.jsonl").read_text().splitlines()) == 200
    page = shown_table3(run, frame).text
    assert "delete steerable/faithfulness/all-value_kaleidoscope/all/all/run.json below the outputs of test" in page and "does not see" not in page and "takes no temperature" not in page
    assert json.loads((run.out / "summary.json").read_text())["takes no temperature"] == []


def test_a_judge_that_takes_no_temperature_is_named(run, monkeypatch):
    monkeypatch.setattr("valuecot.steerable.faithfulness.by_asking", lambda asked, **how: [("A", "")] * len(asked))
    made = run_faithfulness(run)
    assert json.loads((run.out / "summary.json").read_text())["takes no temperature"] == ["claude-sonnet-4.6"]
    assert "claude-sonnet-4.6 takes no temperature: not greedy." in shown_table3(run, made["faithfulness"]).text
    ones = Run(**{**vars(run), "settings": load("test", "steerable.faithfulness.judges=claude-sonnet-4.6 steerable.faithfulness.temperature=1")})
    assert "takes no temperature" not in shown_table3(ones, made["faithfulness"]).text


def test_a_stage_without_any_judge_completes(run, tmp_path):
    alone = Run(**{**vars(run), "settings": load("test", "steerable.faithfulness.judges=model.llama")})
    made = run_faithfulness(alone)
    assert list(made["faithfulness"].not_run) and (run.out / "judgements.jsonl").read_text() == ""
    assert not len(made["agreement"]) and not len(made["hedges"]) and json.loads((run.out / "summary.json").read_text())["judges"] == 0


def test_judges_are_asked_in_the_order_of_the_settings(run):
    found, not_run = all_judged(run, cases(WORLD[:3], [planted()[0].__class__("m", "a", 0, ["A"] * 3, ["It is good.\nAnswer: A"] * 3)], ["masked"]))
    assert [type(j) for j in found] == [Judgement] * 3 and list(not_run) == ["claude-sonnet-4.6", "model.llama"]


def test_names_of_the_worlds_are_masked_everywhere():
    for name in [*VALUES, *GROUPS]:
        q = Question("q", "A plan", name, "value" if name in VALUES else "demographic", ("Yes", "No"), "A")
        assert shown_to_judge(q, f"For {name}, and for {name.lower()}.\nAnswer: A").named == 2
