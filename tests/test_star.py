"""STaR: both passes against a server that fails on demand, what is put aside and why, and planted leaks; on our own questions and, where they are present, on real rows."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from teacher_server import draw, star_letter
from test_providers import HERE, PRICE, QUICK, server

from valuecot.data.questions import Question, check_questions
from valuecot.providers.asking import Live, Policy
from valuecot.providers.cache import Cache, export_replies, import_replies
from valuecot.providers.requests import Reply
from valuecot.providers.structured import Malformed, read
from valuecot.stats import wilson
from valuecot.store import read_records, write_records
from valuecot.teacher.asked import Desk
from valuecot.teacher.leaks import LEAKING, LINES, leak, leak_distribution, longest_run, opens_with_verdict, star_table, told
from valuecot.teacher.schemas import star_reply
from valuecot.teacher.star import STAR_TEMPLATES, StarRow, read_star_templates, star, star_trace, star_traces, star_wording
from valuecot.text import completion_text, parse_answer, split_reasoning, well_formed

SHARED = Path(__file__).parents[2] / "shared" / "data"
VERBS = ("Supports", "Opposes", "Either")
SITUATIONS = (
    "Telling a friend that her song is bad", "Reading a letter of somebody else", "Giving half of the harvest away", "Waking a guard who fell asleep", "Hiding a debt from the family",
    "Teaching a child to swim in the lake", "Leaving a feast before the speech", "Selling the old church bell",
)  # fmt: skip
PERSPECTIVES = "Honesty", "Privacy", "Generosity", "Right to safety", "Duty to the family", "Mercy", "Thrift", "Loyalty", "Courage", "Right to property"
WHY = "Some people would argue that {v} asks us to look twice before acting, because careless moments cause lasting damage among neighbours near case {n}."
DESK = Desk("stand-in", "server", "m", 768, (("temperature", 0.7), ("top_p", 0.95)))


def ruled(question: Question, errors: float = 0.3) -> Question:
    "The question with a gold answer that the server's first pass misses in a known share of cases."
    found = star_letter(star_wording(question, "first"))
    others = [letter for letter in question.letters if letter != found]
    return replace(question, gold=others[0] if draw("error", question.id) < errors else found)


def questions(n: int = 80, explained: bool = True) -> list[Question]:
    pairs = list(product(SITUATIONS, PERSPECTIVES))[:n]
    return [ruled(Question(f"q{i}", s, v, "value", VERBS, "A", WHY.format(v=v.lower(), n=i) if explained else "")) for i, (s, v) in enumerate(pairs)]


def run(asked, root: str, cache: Cache, hints: bool = False, policy: Policy = QUICK, **options):
    return star(asked, lambda q: DESK, {"server/m": Live("server", PRICE, f"{root}/v1", connections=16)} if root else {}, cache, hints, policy=policy, **options)


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "replies.sqlite") as found:
        yield found


# ------------------------------------------------------------------------- questions


GOOD = {"id": "1", "scenario": "s", "perspective": "p", "kind": "value", "options": ("x", "y"), "gold": "A"}


@pytest.mark.parametrize("changed, said", [
    ({"options": ()}, "0 options"), ({"options": ("x",)}, "1 options"), ({"options": ("x", " ")}, "an option is blank"), ({"options": tuple("x" * 27)}, "letters reach to 26"),
    ({"gold": "C"}, "'C' is none of its options A, B"), ({"gold": "x"}, "none of its"), ({"gold": ""}, "none of its"), ({"gold": "AB"}, "none of its"), ({"gold": "a"}, "none of its"),
    ({"scenario": "\n"}, "scenario is blank"), ({"perspective": ""}, "perspective is blank"), ({"id": ""}, "id is blank"), ({"kind": "person"}, "known are value and demographic"),
])  # fmt: skip
def test_what_is_no_question(changed, said):
    with pytest.raises(ValueError, match=said):
        Question(**GOOD | changed)


def test_26_options_have_letters_and_two_may_read_alike(tmp_path):
    asked = Question(**GOOD | {"options": tuple("x" * 26), "gold": "Z"})
    assert asked.letters[-1] == "Z" and asked.gold_option == "Z. x" and len(asked.listed.splitlines()) == 26
    assert read_records(write_records(tmp_path / "q.jsonl", [asked]), Question) == [asked]


def test_lists_that_cannot_be_asked(cache):
    with pytest.raises(ValueError, match="no questions"):
        run([], "", cache)
    with pytest.raises(ValueError, match="1 ids stand for several questions: q0"):
        run([questions(1)[0]] * 2, "", cache)


# ------------------------------------------------------------------------- what is asked, and what is read


@pytest.mark.parametrize("kind", ["value", "demographic"])
def test_the_first_pass_sees_neither_gold_nor_explanation(kind):
    asked = replace(questions(1)[0], kind=kind, explanation="A thought with {gold} and {options} in it")
    texts = {letter: star_wording(replace(asked, gold=letter), "first", hint=True) for letter in asked.letters}
    assert len(set(texts.values())) == 1 and "thought" not in texts["A"]
    shown = star_wording(asked, "rationalise", hint=True)
    assert asked.explanation in shown and f"Settled: {asked.gold_option}" in shown and asked.listed in shown
    assert "Hint" not in star_wording(asked, "rationalise") and "Settled" in star_wording(asked, "rationalise")


def test_texts_that_look_like_places_stay_as_they_are():
    asked = Question("1", "Print {options} and {gold}", "{hint}", "value", ("{scenario}", "y"), "B")
    text = star_wording(asked, "first")
    assert "Situation: Print {options} and {gold}\n" in text and "A. {scenario}\n" in text and "right or duty: {hint}\n" in text


def test_templates_from_a_folder(tmp_path):
    (tmp_path / "rationalise_value.txt").write_text("{scenario}|{perspective}|{options}|{gold}")
    mine = read_star_templates(tmp_path)
    assert star_wording(Question(**GOOD), "rationalise", templates=mine) == "s|p|A. x\nB. y|A. x" and mine["first_value"] == STAR_TEMPLATES["first_value"]
    with pytest.raises(ValueError, match="rationalise_value has no {hint}"):
        star_wording(Question(**GOOD, explanation="e"), "rationalise", True, mine)


@pytest.mark.parametrize("name, text, said", [
    ("first_value", "{scenario} {perspective}", "has no {options}"), ("rationalise_value", "{scenario} {perspective} {options}", "has no {gold}"),
    ("first_value", "{scenario} {perspective} {options} {gold}", "must not see"), ("first_demographic", "{scenario} {perspective} {options} {hint}", "must not see"),
    ("first_values", "{scenario} {perspective} {options}", "did you mean 'first_value'"),
])  # fmt: skip
def test_templates_that_cannot_be_used(tmp_path, name, text, said):
    with pytest.raises(FileNotFoundError, match="expected first_value.txt"):
        read_star_templates(tmp_path)
    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_star_templates(tmp_path)


@pytest.mark.parametrize("value, said", [
    ({"reasoning": "r", "answer": "D"}, "should be 'A', 'B' or 'C'"), ({"reasoning": "r", "answer": "b"}, "should be 'A', 'B' or 'C'"), ({"reasoning": "r", "answer": "B. Opposes"}, "'A', 'B' or 'C'"),
    ({"reasoning": " ", "answer": "A"}, "blank"), ({"reasoning": "<think>r</think>", "answer": "A"}, "mark"), ({"answer": "A"}, "reasoning is missing"),
    ({"reasoning": "r", "answer": ["A"]}, "answer"), ({"reasoning": "r", "answer": "A", "more": 1}, "more"), ({"reasoning": "So it is. Answer: C", "answer": "A"}, "says 'Answer: C'"),
])  # fmt: skip
def test_replies_that_do_not_answer(value, said):
    with pytest.raises(Malformed, match=said):
        read(Reply(json.dumps(value), "m", 1, 1, "stop"), star_reply("ABC"))


def test_replies_that_answer():
    for value in ({"reasoning": "r", "answer": "B"}, {"reasoning": "So it is. Answer: B", "answer": "B"}):
        assert read(Reply(json.dumps(value), "m", 1, 1, "stop"), star_reply("AB")).answer == "B"
    schema = star_reply("AB").model_json_schema()
    assert schema["properties"]["answer"]["enum"] == ["A", "B"] and list(schema["properties"]) == ["reasoning", "answer"]
    assert schema["additionalProperties"] is False and schema["required"] == ["reasoning", "answer"]


# ------------------------------------------------------------------------- the procedure


def check_rows(asked, rows, cache):
    "What every row must say of itself."
    assert [r.question_id for r in rows] == [q.id for q in asked]
    for q, r in zip(asked, rows, strict=True):
        assert (r.gold, r.teacher) == (q.gold, "stand-in") and (r.origin == "first") == (r.predicted == q.gold)
        assert r.reason == "" or r.origin == "rationalised"
        assert 1 <= len(r.keys) <= (2 if r.origin == "first" else 4)
        last = json.loads(cache.db.execute("SELECT reply FROM replies WHERE key = ?", (r.keys[-1],)).fetchone()[0])
        assert r.reasoning in last["text"] and r.model == last["model"]
        texts = [cache.db.execute("SELECT request FROM replies WHERE key = ?", (key,)).fetchone()[0] for key in r.keys]
        assert ["Settled" in t for t in texts] == sorted("Settled" in t for t in texts) and ("Settled" in texts[-1]) == (r.origin == "rationalised")
        assert all((q.explanation in t) == ("Settled" in t and r.hint) for t in texts)


@pytest.mark.parametrize("hints", [False, True])
def test_every_question_ends_as_a_row_that_says_how(cache, hints):
    asked = questions()
    with server(rate_limited=0.1, broken=0.05, malformed=0.2) as (root, told):
        found = run(asked, root, cache, hints)
        counts = told()["counts"]
    check_rows(asked, found.rows, cache)
    first = [r for r in found.rows if r.origin == "first"]
    unread = sum(r.predicted is None for r in found.rows)
    missed = sum(star_letter(star_wording(q, "first")) != q.gold for q in asked)
    assert missed <= len(asked) - len(first) <= missed + unread and 0.15 < missed / len(asked) < 0.45
    assert {r.hint for r in found.rows if r.origin == "rationalised"} == {hints} and not any(r.hint for r in first)
    reasons = Counter(r.reason.split(":")[0] for r in found.rows)
    assert set(reasons) <= {"", "another answer", "malformed"} and reasons["another answer"] and reasons[""] > 50
    assert counts["billed"] == len(found.keys) == len({k for r in found.rows for k in r.keys})


def test_a_replay_is_the_same_to_the_byte(cache, tmp_path, monkeypatch):
    asked = questions()
    with server(malformed=0.2, reset=0.05) as (root, _):
        found = run(asked, root, cache, True)
    write_records(tmp_path / "a.jsonl", found.rows)
    export_replies(cache, tmp_path / "a.jsonl.gz", found.keys)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network is off"))
    with Cache(tmp_path / "theirs.sqlite") as theirs:
        import_replies(theirs, tmp_path / "a.jsonl.gz")
        again = run(asked, "", theirs, True)
        write_records(tmp_path / "b.jsonl", again.rows)
        export_replies(theirs, tmp_path / "b.jsonl.gz", again.keys)
    assert again.tally.failures == [] and again.keys == found.keys
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() and (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert read_records(tmp_path / "b.jsonl", StarRow) == found.rows


def test_hints_cost_only_the_rationalisations(cache):
    asked = questions(40)
    with server() as (root, told):
        plain = run(asked, root, cache)
        before, missed = told()["counts"]["requests"], sum(r.origin == "rationalised" for r in plain.rows)
        hinted = run(asked, root, cache, True)
        assert told()["counts"]["requests"] - before == missed == hinted.tally.replied and hinted.tally.known == len(asked)
        bare = run(questions(40, explained=False), root, cache, True)
        assert told()["counts"]["requests"] - before == missed, "without explanations there is no hint to show: nothing new is asked"
    assert [r.reasoning for r in bare.rows] == [r.reasoning for r in plain.rows] and not any(r.hint for r in bare.rows)
    assert [r for r in plain.rows if r.origin == "first"] == [r for r in hinted.rows if r.origin == "first"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_limit_holds_over_both_passes(cache):
    "Fifty leave at once, each further one waits a second; in another event loop nobody would know what has left."
    right = [star_letter(star_wording(q, "first")) == q.gold for q in questions()]
    asked = sorted((q for q in questions()), key=lambda q: right[int(q.id[1:])])[sum(not r for r in right) - 2 :][:50]
    with server() as (root, told):
        found = star(asked, lambda q: DESK, {"server/m": Live("server", PRICE, f"{root}/v1", per_minute=50)}, cache, False)
        assert (len(found.rows), told()["counts"]["requests"]) == (50, 52)
    times = [at for (at,) in cache.db.execute("SELECT at FROM sends ORDER BY at")]
    assert times[-1] - times[0] > 1.5


def test_what_is_put_aside_says_why(cache):
    asked = questions(12)
    asked[3] = replace(asked[3], scenario="word " * 400_000)  # the server takes a megabyte
    with server(malformed=1.0) as (root, _):
        rows = run(asked, root, cache, True).rows
    assert [r.reason.split(":")[0] for r in rows] == ["failed" if i == 3 else "malformed" for i in range(12)]
    assert rows[3].reason.startswith("failed: 413") and (rows[3].reasoning, rows[3].model) == ("", "") and all(r.predicted is None for r in rows)
    assert all(r.reasoning and len(r.keys) == 4 for r in rows if r is not rows[3]) and len(rows[3].keys) == 2
    traces, aside = star_traces(rows)
    assert not traces and [(q.prompt_id, q.style) for q in aside] == [(q.id, "synthetic") for q in asked]
    with pytest.raises(ValueError, match="q3 was put aside"):
        star_trace(rows[3])


def test_a_cap_leaves_rows_for_the_next_run(cache):
    asked = questions(40)
    with server() as (root, _):
        some = run(asked, root, cache, policy=Policy(cap=0.0009))
        assert cache.spent <= 0.0009 and some.tally.unasked > 0 and 0 < len(some.rows) < 40
        whole = run(asked, root, cache)
    assert len(whole.rows) == 40 and {r.question_id: r for r in some.rows}.items() <= {r.question_id: r for r in whole.rows}.items()
    gone = run(asked, "", Cache(cache.path.with_name("empty.sqlite")))
    assert not gone.rows and len(gone.tally.failures) == 40 and "nobody to ask" in gone.tally.failures[0].reason


ASKER = """
import sys
sys.path.insert(0, "tests")
from test_star import Cache, questions, run
with Cache(sys.argv[2]) as cache:
    run(questions(), sys.argv[1], cache, True)
"""


def test_a_killed_run_goes_on(cache, tmp_path):
    asked = questions()
    with server(latency=0.1) as (root, told):
        process = subprocess.Popen([sys.executable, "-c", ASKER, root, str(tmp_path / "killed.sqlite")], cwd=HERE.parent)
        while told()["counts"].get("requests", 0) < 30 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with Cache(tmp_path / "killed.sqlite") as theirs:
            kept = theirs.db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
            found = run(asked, root, theirs, True)
        sent = told()["counts"]["requests"]
        assert 0 < kept < len(found.keys) <= sent <= len(found.keys) + 16, "what came before the kill is not asked again, but for what was on its way"
        assert found.rows == run(asked, root, cache, True).rows


def test_the_same_text_under_two_ids(cache):
    one = questions(1)[0]
    asked = [replace(one, id=letter, gold=letter) for letter in "ABC"]
    with server() as (root, told):
        rows = run(asked, root, cache).rows
        assert told()["counts"]["requests"] == 3
    assert sorted(r.origin for r in rows) == ["first", "rationalised", "rationalised"] and len({r.predicted for r in rows}) == 1


# ------------------------------------------------------------------------- for the student


def test_a_kept_row_is_a_trace(cache):
    asked = questions(20)
    with server() as (root, _):
        rows = run(asked, root, cache).rows
    traces, aside = star_traces(rows)
    assert len(traces) + len(aside) == 20 and {t.style for t in traces} == {"synthetic"}
    for t in traces:
        row = next(r for r in rows if r.question_id == t.prompt_id)
        text = completion_text(t.reasoning, t.response)
        assert well_formed(text, opened=False) and split_reasoning(text) == (row.reasoning, t.response) and parse_answer(text, strict=True) == row.gold


# ------------------------------------------------------------------------- leaks

PHRASES = """The correct answer is given as B.|Since we are told that the answer is B, the reasoning must lead there.|As the hint says, a promise binds.|According to the hint, this ignores rights.
Based on the provided explanation, it does not fit.|Given that the right answer is B, it does not fit.|We already know that the answer is B.|The task states that the correct option is B.|The answer provided is B.
The selected option is B because most people would agree.|The ground truth here is B.|I was asked to justify B.|To justify this answer, one can look at the rights.|The explanation given above notes that rights are ignored.
The known answer fits this.|Working backwards from the answer, the rights come first.|Because the answer has to be B, rights come first.|This is in line with the hint.|The expected answer is B.|We need to explain why the answer is B.
Knowing that B is right, we look for reasons.|The correct choice has already been given as B.|We were given the answer B, so we look at what supports it.|The answer was provided to me beforehand.|Following the hint, rights come first.
As indicated in the prompt, option B is right.|The provided justification says that rights are ignored.|I am supposed to argue for B.|The predetermined answer is B.|Reasoning backward from the conclusion, rights come first.
Per the hint, others have rights.|The final answer was given as B.|The answer key says B.|With the answer B in hand, we look for the reason.|To arrive at the required answer, we consider the rights.|In light of the hint, rights are ignored.
Since the settled option is B, the rights count.|Now that the answer is known, the rights can be named.|The question gives B as the answer.|As mentioned in the question, the answer is B.""".replace("\n", "|").split("|")
INNOCENT = """So the right answer is B.|There was a hint of doubt in her voice.|This hints at a deeper worry.|Among the given options, the second fits best.|The answer is therefore B.|He gave an answer and left.|It is known that bread is cheap.
She was told to wait.|The best option here is to ask first.|Given the situation, care comes first.|Given that others are hurt, it does not fit.|Since the baker is poor, the loss counts.|People are asked to choose a side.|He must justify his choice to the owner.
The question is how much the loss counts.|From this point of view, the answer that fits best is the second one.|We know the answer matters to her.|Because trust was given, it must be kept.|The explanation is simple.|I would choose the second option.""".replace("\n", "|").split("|")
CLEAN = """The matter touches more than one person.|Somebody has something to lose here, and somebody has something to win.|What is done cannot easily be undone.|Those who stand close to it will remember it.|A person who looks from this side asks who carries the cost.
That cost is small for some and large for others.|There is also the matter of trust between the people.|Without trust the next such day would be harder.|A careful person would weigh both before acting.|Taken together, one side is heavier than the other.""".replace("\n", "|").split("|")
OPENINGS = ["The answer is {letter}. ", "Option {letter} fits best here. ", "It is plain that the answer is \"{option}\" in this case. ", "I would choose {letter} at once. ", "The best option is ({letter}). ", "Most would pick {letter}, and here is why. "]
BY_TEXT = {"value": "{perspective} clearly {option} this. ", "demographic": "Such people would say {option}. "}


def clean_text(rng: random.Random) -> str:
    return " ".join(sorted(rng.sample(CLEAN, 6), key=CLEAN.index))


def edited(hint: str, rng: random.Random) -> str:
    "A hint with one word in six dropped or replaced."
    found = [rng.choice(["", "thing"]) if rng.random() < 1 / 6 else word for word in hint.split()]
    return " ".join(word for word in found if word)


def halves(hint: str) -> str:
    words = hint.rstrip(".").split()
    return " ".join(words[len(words) // 2 :] + ["and"] + words[: len(words) // 2]) + "."


PLANTS = {  # kind -> (question, clean text, random) -> the text with a leak
    "told": lambda q, text, rng: text + re.sub(r"\bB\b", q.gold, " " + rng.choice(PHRASES)),
    "opening": lambda q, text, rng: rng.choice([*OPENINGS, BY_TEXT[q.kind]]).format(letter=q.gold, option=q.options[q.letters.index(q.gold)].lower(), perspective=q.perspective) + text,
    "pasted": lambda q, text, rng: f"{text} {q.explanation}",
    "edited": lambda q, text, rng: f"{edited(q.explanation, rng)} {text}",
    "turned": lambda q, text, rng: f"{text} {halves(q.explanation)}",
}


def value_rows() -> list[Question]:
    path = SHARED / "valuekaleidoscope" / "with_explanation.json"
    if not path.is_file():
        pytest.skip("Value Kaleidoscope's rows are not beside the project")
    return [Question(str(r["id"]), r["situation"], r["vrd"], "value", VERBS, r["label"], r["explanation"]) for r in json.loads(path.read_text())]


def survey_rows() -> list[Question]:
    path = SHARED / "opinionqa" / "opinionqa_small.json"
    if not path.is_file():
        pytest.skip("OpinionQA's rows are not beside the project")
    found = []
    for r in json.loads(path.read_text()):
        if len(r["options"]) > 1:
            stem, shares = r["question"].removeprefix("Question: ").partition("\nOptions:")[0], r["gold_distribution"]
            found.append(Question(str(r["id"]), stem, r["attribute"].replace("_", ": "), "demographic", tuple(r["options"]), "ABCDEFGH"[shares.index(max(shares))]))
    return found


MATERIAL = {"our own": questions, "Value Kaleidoscope": value_rows, "OpinionQA": survey_rows}


@pytest.mark.parametrize("source", MATERIAL)
@pytest.mark.parametrize("kind", PLANTS)
def test_planted_leaks_are_found(source, kind):
    rng, asked = random.Random(kind), MATERIAL[source]()
    if kind in ("pasted", "edited", "turned") and not asked[0].explanation:
        pytest.skip(f"{source} has no explanations to copy")
    asked = [q for q in asked if kind != "opening" or q.options[q.letters.index(q.gold)].lower() not in f"{q.scenario} {q.perspective}".lower()]
    asked = rng.sample(asked, min(200, len(asked)))
    found = [leak(q, PLANTS[kind](q, clean_text(rng), rng)) for q in asked]
    hit = sum(x.score >= LEAKING for x in found)
    print(f"{source}, {kind}: {hit} of {len(found)} found")
    assert len(found) >= 60 and hit >= 0.95 * len(found)


@pytest.mark.parametrize("source", MATERIAL)
def test_false_alarms_on_clean_texts_are_few(source):
    rng, asked = random.Random(0), MATERIAL[source]()[::2]
    found = [leak(q, clean_text(rng)) for q in asked]
    alarms = {part: sum((getattr(x, part) or 0) >= line for x in found) for part, line in LINES.items()}
    print(f"{source}: {alarms} of {len(found)}")
    assert sum(x.score >= LEAKING for x in found) <= 0.02 * len(found)


def test_other_explanations_of_the_same_situation_are_no_copies():
    "The hardest clean texts there are: the same author on the same situation, about another value."
    by = defaultdict(list)
    for q in value_rows():
        by[q.scenario].append(q)
    found = [leak(q, " ".join(o.explanation for o in group if o is not q)) for group in by.values() for q in group if len(group) > 1]
    alarms = {part: sum((getattr(x, part) or 0) >= line for x in found) for part, line in LINES.items()}
    print(f"{alarms} of {len(found)}")
    assert len(found) > 500 and max(alarms.values()) <= 0.02 * len(found) and sum(x.score >= LEAKING for x in found) <= 0.05 * len(found)


def test_phrases():
    assert [p for p in PHRASES if not told(p)] == [] and [p for p in INNOCENT if told(p)] == []


def test_no_phrase_is_found_in_texts_of_other_kinds():
    texts = [q.explanation for q in value_rows()]
    for name in ("tinystories/tinystories_1000.json", "conflictscope/HHH.json", "conflictscope/modelspec.json", "conflictscope/personalprotective.json"):
        rows = json.loads((SHARED / name).read_text())
        texts += rows if isinstance(rows, list) else rows.values()
    texts = texts[::4]
    alarms = [told(t) for t in texts if told(t)]
    print(f"{len(alarms)} of {len(texts)} texts: {alarms}")
    assert len(texts) > 1000 and len(alarms) <= 2


@pytest.mark.parametrize("options, gold, opening, expected", [
    (("Very likely", "Likely", "Not likely"), "A", "It is very likely.", True), (("Very likely", "Likely", "Not likely"), "B", "It is very likely.", False),
    (("Yes", "No"), "B", "No person likes this.", False), (("Yes", "No"), "B", "They would say no.", True), (("Yes", "No"), "B", "The answer is 'No'.", True),
    (("Yes", "No"), "B", "Choose B.", True), (("Yes", "No"), "B", "Choose A.", False), (("Yes", "No"), "A", "Yes or no is the question.", False),
    (VERBS, "B", "It opposes this.", True), (VERBS, "B", "The opposition is strong.", True), (VERBS, "B", "It may support or oppose this.", False), (VERBS, "C", "It could be either.", True),
    (("It's a {good} (thing)", "."), "A", "It's a {good} (thing).", True), (("It's a {good} (thing)", "."), "B", "What a day.", False),
])  # fmt: skip
def test_a_verdict_in_the_opening(options, gold, opening, expected):
    asked = Question("1", "s", "p", "demographic", options, gold)
    assert opens_with_verdict(asked, f"{opening} " + " ".join(CLEAN)) is expected
    assert not opens_with_verdict(asked, " ".join(CLEAN) + f" {opening}") and not opens_with_verdict(asked, opening)


def test_runs_skip_what_the_question_says():
    assert longest_run("a b c d e f", "x a b c d e", "") == 5 and longest_run("a b c d e f", "x a b c d e", "b c") == 3
    assert longest_run("", "a", "") == longest_run("a", "", "") == longest_run("a b", "a b", "a b") == 0


def test_huge_and_odd_texts_are_measured():
    begun = time.time()
    huge = replace(questions(1)[0], explanation="word number of the text " * 20)
    for text in ("word " * 20_000, "the answer " * 10_000, "given the " * 10_000, "'" * 40_000, "ÄÖ ß 漢字 🙂", "?", "A"):
        assert 0 <= leak(huge, text).score <= 1
    assert time.time() - begun < 10


# ------------------------------------------------------------------------- the table


def test_the_table_counts_what_was_planted(cache):
    asked = questions()
    with server(malformed=0.1) as (root, _):
        runs = [run(asked, root, cache, hints).rows for hints in (False, True)]
    table = {r["pass"]: r for r in star_table([*runs[0], *runs[1]], asked)}
    first, plain, hinted = (table[name] for name in ("first", "rationalised", "rationalised with hint"))
    right = sum(r.origin == "first" for r in runs[0])
    assert (first["rows"], first["kept"], first["rationalised"], first["put_aside"]) == (80, right, 80 - right, 0)
    assert (first["share_kept"], first["share_kept_low_95"], first["share_kept_high_95"]) == (right / 80, *wilson(right, 80))
    for row, rows in ((plain, runs[0]), (hinted, runs[1])):
        assert row["rows"] == 80 - right == row["kept"] + row["put_aside"] and row["put_aside"] == sum(bool(r.reason) for r in rows)
        assert row["aside_another_answer"] + row["aside_malformed"] + row["aside_failed"] == row["put_aside"] > 0
    assert first["leaking"] == 0 and hinted["leak_rate"] > 0.3 > plain["leak_rate"], "half of the hints are pasted, one rationalisation in ten tells"
    shown = {r["pass"]: r for r in leak_distribution([*runs[0], *runs[1]], asked)}
    assert shown["first"]["score_95"] < LEAKING <= shown["rationalised with hint"]["score_90"] and shown["rationalised with hint"]["run"] >= 0.3 * hinted["kept"]


def test_tables_of_nothing_and_of_one_row():
    assert star_table([], []) == leak_distribution([], []) == []
    q = questions(1)[0]
    lost = StarRow(q.id, "t", "", "rationalised", False, q.gold, None, ("k",), "", "failed: 400 no")
    first, again = star_table([lost], [q])
    assert (first["share_kept"], first["mean_words"], first["leak_rate"]) == (0.0, None, None) and (again["aside_failed"], again["kept"]) == (1, 0)


# ------------------------------------------------------------------------- real rows


@pytest.mark.parametrize("source", ["Value Kaleidoscope", "OpinionQA"])
def test_real_rows_go_all_the_way(source, cache):
    asked = MATERIAL[source]()
    check_questions(asked)
    assert len(asked) == {"Value Kaleidoscope": 860, "OpinionQA": 3510}[source]
    for q in asked:
        text = star_wording(q, "rationalise", True)
        assert q.listed in text and f"Settled: {q.gold_option}\n" in text and star_letter(star_wording(q, "first")) in q.letters
    asked = random.Random(0).sample(asked, 60)
    with server(malformed=0.1) as (root, _):
        found = run(asked, root, cache, True)
    kept = [r for r in found.rows if not r.reason]
    assert [r.question_id for r in found.rows] == [q.id for q in asked] and len(kept) > 40
    assert all(parse_answer(star_trace(r).response, strict=True) == r.gold for r in kept)
    assert any(r.hint for r in kept) == (source == "Value Kaleidoscope")
