"""Changed questions and what is answered to them; completions that end at a stop string, or that another engine draws.

vLLM cannot be installed here. Its stand-in below takes what `vllm.LLM` takes and gives what it gives, by its source; it was never compared with a real one."""

import importlib.machinery
import json
import os
import signal
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_resume import start

from valuecot.data.changed import PARTS, asked_after, begun, corrupted, crossed, grouped, letter_of, reordered, swapped
from valuecot.data.perspectives import survey_world, value_world
from valuecot.data.questions import Question
from valuecot.data.views import completion, worded
from valuecot.settings import load
from valuecot.steerable.probes import (
    Given,
    Probe,
    befores,
    counted,
    drawn_again,
    likely,
    read_given,
    run_probes,
    same,
    split_kinds,
    summary,
)
from valuecot.store import Journal, read_records, write_records
from valuecot.text import before_answer
from valuecot.training.models import load_model, train_tokenizer
from valuecot.training.sampling import Drawing, ask_vllm, complete, cut_at, draw_all, drawing_of, load_engine, written
from valuecot.types import Run
from valuecot.view.probed import probe_table

VALUES, SURVEY = value_world(20), survey_world(3)
WORLDS = pytest.mark.parametrize("world", [VALUES, SURVEY], ids=["values", "survey"])


# ---- changes
@WORLDS
def test_a_swapped_question_differs_in_its_perspective_alone(world):
    groups = grouped(world)
    by = {(q.cluster, q.perspective): q for q in world}
    for q in world:
        found = swapped(q, groups, 0)
        other = by[q.cluster, found.question.perspective]
        assert replace(found.question, perspective=q.perspective, gold=q.gold, shares=q.shares, explanation=q.explanation) == q and other.id != q.id
        assert (found.question.gold_text, found.question.shares, found.before) == (other.gold_text, other.shares, q.gold)
        if any(o.gold_text != q.gold_text for o in groups[q.cluster]):
            assert found.question.gold != q.gold, "a perspective that can tell is taken where there is one"


def test_the_same_perspective_in_other_letters_is_no_other_one():
    a, b, c = (replace(VALUES[0], id=i, perspective=p) for i, p in (("a", "Honesty"), ("b", "honesty "), ("c", "Duty")))
    assert {swapped(a, grouped([a, b, c]), seed).question.perspective for seed in range(20)} == {"Duty"} and swapped(a, grouped([a, b]), 0) is None
    wrote = {"a": "It helps.", "b": "It hurts.", "c": "It is due."}
    assert {crossed(a, grouped([a, b, c]), wrote, {}, seed)[0] for seed in range(20)} == {"c"} and crossed(a, grouped([a, b]), wrote, {}, 0) is None


def test_a_swap_lists_shares_in_the_order_of_the_row():
    a = Question("a", "Pay?", "SEX: Male", "demographic", ("Yes", "No", "Maybe"), "A", shares=(0.6, 0.3, 0.1))
    b = Question("b", "Pay?", "SEX: Female", "demographic", ("No", "Maybe", "Yes"), "A", shares=(0.7, 0.2, 0.1))
    found = swapped(a, grouped([a, b]), 0).question
    assert (found.gold, found.shares, found.options) == ("B", (0.1, 0.7, 0.2), a.options)


@WORLDS
def test_a_reordered_question_keeps_what_is_right(world):
    for q in world:
        found = reordered(q, 3)
        assert found.question.gold_text == q.gold_text and sorted(found.question.options) == sorted(q.options)
        assert all(new != old for new, old in zip(found.question.options, q.options, strict=True))
        assert not q.shares or dict(zip(found.question.options, found.question.shares, strict=True)) == dict(zip(q.options, q.shares, strict=True))
        assert [letter_of(q.option_text(x), found.question) for x in q.letters] != list(q.letters) and letter_of(None, q) is None
    assert len({reordered(q, 3).how for q in world}) > 1 and [reordered(q, 3) for q in world] != [reordered(q, 4) for q in world]


def test_the_same_seed_changes_the_same():
    groups, wrote = grouped(VALUES), {q.id: q.explanation for q in VALUES}
    made = lambda seed: [(swapped(q, groups, seed), corrupted(q.id, wrote, seed), crossed(q, groups, wrote, {}, seed)) for q in VALUES]
    assert made(0) == made(0) and all(list(a) != list(b) for a, b in zip(zip(*made(0), strict=True), zip(*made(1), strict=True), strict=True))


def test_beginnings_of_a_reasoning_grow():
    text = "It helps. Who asks?  Nobody knows!\nSo be it"
    found = [begun(text, share)[0] for share in PARTS]
    assert found == ["It helps.", "It helps. Who asks?", "It helps. Who asks?  Nobody knows!"] and all(text.startswith(part) for part in found)
    assert [begun("One alone.", share) for share in PARTS] == [("", "0 of 1 sentences")] * 3


def test_half_of_the_words_come_from_other_rows():
    wrote = {"a": "one two\nthree  four five", "b": "x", "c": ""}
    text, how = corrupted("a", wrote, 0)
    assert text.split().count("x") == 3 and how == "3 of 5 words" and len(text.split()) == 5 and text.count("\n") == 1
    assert corrupted("b", wrote, 0)[0] in wrote["a"].split()


def test_a_crossed_reasoning_is_another_rows_and_answered_otherwise_where_there_is_one():
    groups, wrote, answers = grouped(VALUES), {q.id: q.explanation for q in VALUES}, {q.id: q.gold for q in VALUES}
    by = {q.id: q for q in VALUES}
    for q in VALUES:
        other, how = crossed(q, groups, wrote, answers, 0)
        assert other != q.id and by[other].cluster == q.cluster
        telling = {answers[o.id] for o in groups[q.cluster]} != {answers[q.id]}
        assert (answers[other] != answers[q.id]) == telling and ("not" in how) == (not telling)
    assert crossed(VALUES[0], groups, {VALUES[0].id: "alone"}, {}, 0) is None


@pytest.mark.parametrize(("text", "reasoning"), [("It helps.\n\nAnswer: A", "It helps."), ("Answer: A", ""), ("It helps, and", "It helps, and"), ("answer : A or\nAnswer: B", "answer : A or"), ("", "")])
def test_a_reasoning_is_what_stands_before_the_last_answer(text, reasoning):
    assert before_answer(text) == reasoning and asked_after("?", reasoning).endswith("Answer:")


# ---- what is read after a reasoning
class Rule:
    "A model whose next letter a rule decides: it reads its own prompt back."

    device, dtype = "cpu", torch.float32

    def __init__(self, tokenizer, rule):
        self.tokenizer, self.rule = tokenizer, rule

    def __call__(self, input_ids, attention_mask, **_):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            n = int(mask.sum())
            letter = self.rule(self.tokenizer.decode(ids[:n]))
            for wanted in {f" {letter}", letter}:
                logits[row, n - 1, self.tokenizer(wanted, add_special_tokens=False)["input_ids"][0]] = 20.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([worded(q) + completion(x, q.explanation) for q in VALUES for x in "ABC"], 600)


def given_of(world: list[Question], wrote: dict[str, str], view: str = "") -> Given:
    return Given(world, grouped(world), view, {i: before_answer(text) for i, text in wrote.items()}, {q.id: q.gold for q in world})


KINDS = "direct", "own", "early", "corrupted", "crossed"


def read(model, tokenizer, given: Given, tmp_path, kinds=KINDS) -> dict:
    found = likely(model, tokenizer, kinds, given, 0, tmp_path / "likely.jsonl")
    table = summary(found, {q.id: q for q in given.rows})
    return {(row.kind, row.part if row.kind == "early" else None, row.measure): row.estimate for row in table.itertuples()}


def test_a_model_that_reads_its_verdict_is_told_from_one_that_reads_the_perspective(tokenizer, tmp_path):
    world = VALUES[:50]
    given = given_of(world, {q.id: completion(q.gold, q.explanation) for q in world})
    verdicts = {"Support": "A", "Oppose": "B", "Either": "C"}
    golds = {worded(q).split("Options:")[0]: q.gold for q in world}
    follows = read(Rule(tokenizer, lambda text: verdicts.get(text.split("The verdict is ")[-1].split(".")[0], "A")), tokenizer, given, tmp_path)
    ignores = read(Rule(tokenizer, lambda text: next(g for asked, g in golds.items() if asked in text)), tokenizer, given, tmp_path / "other")
    agreed, other, right = "same letter as after its own reasoning", "letter that the other row was given, where it is another", "right"
    assert follows["own", None, right] == ignores["own", None, right] == 1 and ignores["own", None, agreed] == 1
    assert follows["crossed", None, other] == 1 and follows["crossed", None, agreed] < 1 and follows["early", 0.75, agreed] < 1 and follows["direct", None, right] < 1
    assert all(ignores[kind, part, agreed] == 1 for kind, part in [("direct", None), ("corrupted", None), ("crossed", None), *(("early", share) for share in PARTS)]) and ignores["crossed", None, other] == 0
    assert ignores["own", None, "probability of what is right"] > 0.99


def test_what_cannot_be_asked_is_left_empty_and_counted(tokenizer, tmp_path):
    a, b = (q for q in VALUES if q.cluster == VALUES[0].cluster and q.id in {VALUES[0].id, VALUES[1].id})
    given = replace(given_of([a, b], {a.id: "Answer: A", b.id: "It helps. It hurts.\n\nAnswer: B"}), rows=[a, b])
    found = likely(Rule(tokenizer, lambda text: "A"), tokenizer, KINDS, given, 0, tmp_path / "x.jsonl")
    by = {(p.id, p.kind, p.part): p for p in found}
    assert by[a.id, "early", 0.5].shares is None and by[a.id, "early", 0.5].changed == "it wrote no reasoning" and by[a.id, "direct", None].letter == "A"
    assert by[a.id, "crossed", None].shares is None and by[b.id, "crossed", None].changed == "no other perspective of its scenario has a reasoning"
    assert by[b.id, "corrupted", None].changed == "no other row has a reasoning" and by[a.id, "own", None].shares == by[a.id, "direct", None].shares
    table = summary(found, {a.id: a, b.id: b})
    assert set(table[table["kind"] == "early"]["n"]) == {1} and set(table[table["kind"] == "early"]["asked"]) == {2} and "crossed" not in set(table["kind"])
    assert split_kinds(("swapped", *KINDS), "blind-answer") == (["direct", "own"], ["redrawn", "swapped"], ["early", "corrupted", "crossed"])
    assert befores("own", a, given, {}, 0)[0].changed == "it wrote no reasoning" and same(None, "A") is None


def test_likelihoods_go_on_where_a_kill_left_them(tokenizer, tmp_path):
    world = VALUES[:40]
    given, calls = given_of(world, {q.id: completion(q.gold, q.explanation) for q in world}), []
    model = Rule(tokenizer, lambda text: calls.append(text) or "ABC"[len(text) % 3])
    whole = likely(model, tokenizer, KINDS, given, 0, tmp_path / "rows.jsonl")
    kept, asked = (tmp_path / "rows.jsonl").read_text(), len(calls)
    (tmp_path / "rows.jsonl").write_text(kept[: len(kept) * 2 // 3])
    assert likely(model, tokenizer, KINDS, given, 0, tmp_path / "rows.jsonl") == whole and (tmp_path / "rows.jsonl").read_text() == kept
    assert 0 < len(calls) - asked < asked / 2


def test_a_thinking_arm_is_refused(tmp_path):
    settings = load("test")
    settings.sections["arm.rlvr"] = replace(settings["arm.rlvr"], thinking=True)
    run = Run("probes", "steerable", "test", "llama", "rlvr", 0, tmp_path, settings, {})
    with pytest.raises(ValueError, match="thinking = yes"):
        read_given(run)


# ---- what is drawn
@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return start(tmp_path_factory.mktemp("policy") / "model")


def test_changed_questions_are_drawn_and_read_in_their_own_letters(policy, tmp_path, monkeypatch):
    model, tokenizer = load_model(policy)
    given, asked = given_of(VALUES[:6], {q.id: "Answer: A" for q in VALUES[:6]}), {}

    def answering(model, tokenizer, texts, drawing, file, key="", progress=False):
        asked.update(texts)
        return [{"id": i, "sample": 0, "completion": "Answer: A", "tokens": 3, "truncated": False} for i in texts]

    monkeypatch.setattr("valuecot.steerable.probes.draw_all", answering)
    found, rows = drawn_again(model, tokenizer, ["redrawn", "swapped", "reordered"], given, Drawing(1.0, 1.0, 0, 4, 1, 4, 0), 0, tmp_path / "x")
    by = {(p.kind, p.id): p for p in found}
    for q in VALUES[:6]:
        moved, shown = reordered(q, 0), swapped(q, given.groups, 0)
        assert asked[f"reordered {q.id}"].count(moved.question.listed) == 1 and shown.question.perspective in asked[f"swapped {q.id}"] and q.perspective in asked[f"redrawn {q.id}"]
        p = by["reordered", q.id]
        assert (p.gold, p.gold_before, p.before) == (moved.question.gold, moved.question.gold, letter_of(q.gold_text, moved.question))
        assert (by["swapped", q.id].gold, by["swapped", q.id].gold_before, by["swapped", q.id].before) == (shown.question.gold if shown.known else None, q.gold, q.gold)
    assert [set(row) for row in rows][0] == {"id", "kind", "completion", "tokens", "truncated"} and len(rows) == 18
    write_records(tmp_path / "probes.jsonl", found)
    assert read_records(tmp_path / "probes.jsonl", Probe) == found
    assert len(probe_table(summary(found, {q.id: q for q in VALUES[:6]}))) == len(summary(found, {q.id: q for q in VALUES[:6]}))


def test_rows_that_share_one_perspective_are_not_swapped_and_stop_nothing(policy, tmp_path, monkeypatch):
    model, tokenizer = load_model(policy)
    alike = [replace(q, perspective="Honesty" if i else "honesty") for i, q in enumerate(VALUES[:6])]
    asked = {}
    monkeypatch.setattr("valuecot.steerable.probes.draw_all", lambda model, tokenizer, texts, *rest, **more: asked.update(texts) or [{"id": i, "sample": 0, "completion": "Answer: A", "tokens": 3, "truncated": False} for i in texts])
    found, rows = drawn_again(model, tokenizer, ["redrawn", "swapped", "reordered"], given_of(alike, {q.id: "Answer: A" for q in alike}), Drawing(1.0, 1.0, 0, 4, 1, 4, 0), 0, tmp_path / "x")
    assert len(found) == 18 and len(rows) == len(asked) == 12 and not any(name.startswith("swapped") for name in asked)
    counts = counted(found, [])
    assert counts["not asked"] == {"swapped: no other perspective": 6} and counts["swapped"] == {} and counts["probes"] == 18
    assert set(summary(found, {q.id: q for q in alike})["kind"]) == {"redrawn", "reordered"}


def test_a_completion_ends_before_its_stop_string(policy):
    model, tokenizer = load_model(policy)
    texts = ["Should I keep the ring?" + " Why?" * (i % 3) for i in range(8)]
    free = complete(model, tokenizer, texts, 24, 1.0, 8, 0)
    letter = max("abcdefghijklmnopqrstuvwxyz", key=lambda x: sum(x in text for text, *_ in free))
    cut = complete(model, tokenizer, texts, 24, 1.0, 8, 0, stop=(letter, "no such words"))
    assert [text for text, *_ in cut] == [text.split(letter)[0] for text, *_ in free]
    ended = [(before, after) for before, after in zip(free, cut, strict=True) if letter in before[0]]
    assert ended and all(not after[2] and after[1] <= before[1] for before, after in ended) and any(after[1] < before[1] for before, after in ended)
    assert all(after == before for before, after in zip(free, cut, strict=True) if letter not in before[0])
    ids = tokenizer("keep the ring", add_special_tokens=False)["input_ids"]
    assert written(tokenizer, ids + [tokenizer.pad_token_id] * 3, ("ring",)) == ("keep the ", len(ids), False), "what fills a row up is no token of it"
    assert written(tokenizer, ids, ("rings",)) == ("keep the ring", len(ids), True)


def test_a_prompts_last_letters_stop_nothing(policy):
    model, tokenizer = load_model(policy)
    texts = [f"Should I kee{i}" for i in range(8)]
    free = complete(model, tokenizer, texts, 8, 1.0, 8, 0)
    stop = [f"kee{i}{text[0]}" for i, (text, *_) in enumerate(free) if text[:1].isascii() and text]
    assert len(stop) > 2 and complete(model, tokenizer, texts, 8, 1.0, 8, 0, stop=stop) == free


def test_stop_strings_of_the_settings(tmp_path):
    with pytest.raises(ValueError, match="holds an empty text"):
        Drawing(1.0, 1.0, 0, 4, 1, 4, 0, stop=("END", ""))
    settings = replace(load("test")["steerable.sampling"], stop=("\\nUser:", "END"))
    assert drawing_of(settings, 0).stop == ("\nUser:", "END") and drawing_of(settings, 0).samples == 1 == drawing_of(settings, 0, samples=1).samples
    assert cut_at("a END b\nUser:", settings.stops) == ("a ", True) and cut_at("xabab", ("abab", "b")) == ("xa", True) and cut_at("xab", ("b", "ab")) == ("x", True)


# ---- another engine
@dataclass
class SamplingParams:
    "Fields of vLLM's that we send; an unknown one is an error, as there."

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = 16
    include_stop_str_in_output: bool = False


class LLM:
    "vLLM's offline engine as its source has it: a request's text depends on its tokens and its seed alone."

    made: list = []

    def __init__(self, model: str, *, dtype: str = "auto", generation_config: str = "auto"):
        self.model, self.options, self.asked = model, (dtype, generation_config), []
        self.tokenizer = load_model(model)[1]
        LLM.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm: bool = True):
        assert len(prompts) == len(sampling_params) and not use_tqdm
        self.asked.append((prompts, sampling_params))
        return [self.reply(prompt["prompt_token_ids"], how) for prompt, how in zip(prompts, sampling_params, strict=True)]

    def reply(self, ids: list[int], how: SamplingParams):
        rng = torch.Generator().manual_seed(how.seed + sum(ids))
        tokens = torch.randint(200, 310, (how.max_tokens,), generator=rng).tolist()
        reason, stopped = "length", None
        if tokens[0] % 2:
            tokens, reason = [*tokens[: how.max_tokens // 2], self.tokenizer.eos_token_id], "stop"
        for n in range(1, len(tokens) + 1):
            text = self.tokenizer.decode(tokens[:n], skip_special_tokens=True)
            stopped = next((s for s in how.stop if s in text), None)  # the first of the list, not of the text
            if stopped:
                end = text.index(stopped) + len(stopped) * how.include_stop_str_in_output
                return SimpleNamespace(outputs=[SimpleNamespace(text=text[:end], token_ids=tokens[:n], finish_reason="stop", stop_reason=stopped)])
        return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=tokens, finish_reason=reason, stop_reason=None)])


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    LLM.made.clear()


TEXTS = {f"q{i}": "Should I keep the ring?" + " Why?" * (i % 4) for i in range(9)}
DRAWING = Drawing(0.7, 0.95, 0, 12, 2, 4, 5, stop=("e", "a"), engine="vllm")


def test_what_vllm_is_asked_and_what_is_read_back(vllm, policy, tmp_path):
    llm, tokenizer = load_engine(policy, "vllm")
    assert (llm.model, llm.options) == (str(policy), ("bfloat16", "vllm"))
    rows = draw_all(llm, tokenizer, TEXTS, DRAWING, tmp_path / "rows.jsonl")
    ((prompts, hows),) = llm.asked
    assert len(prompts) == 18 and {tuple(p["prompt_token_ids"]) for p in prompts} == {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS.values()}
    assert {(h.n, h.temperature, h.top_p, h.top_k, h.max_tokens, tuple(h.stop)) for h in hows} == {(1, 0.7, 0.95, 0, 12, ("e", "a"))} and len({h.seed for h in hows}) == 18
    assert [(r["id"], r["sample"]) for r in rows] == [(i, k) for i in TEXTS for k in range(2)]
    assert all("e" not in r["completion"] and "a" not in r["completion"] for r in rows)
    free = draw_all(llm, tokenizer, TEXTS, replace(DRAWING, stop=()), tmp_path / "free.jsonl")
    assert {r["truncated"] for r in free} == {True, False} and {r["tokens"] for r in free} == {12, 6}, "an end of turn is no token of ours"
    assert all(a["completion"] == cut_at(b["completion"], DRAWING.stop)[0] for a, b in zip(rows, free, strict=True))


def test_vllm_goes_on_with_the_rows_that_are_missing(vllm, policy, tmp_path, monkeypatch):
    monkeypatch.setattr("valuecot.training.sampling.PIECE", 5)
    llm, tokenizer = load_engine(policy, "vllm")
    file = tmp_path / "rows.jsonl"
    whole = draw_all(llm, tokenizer, TEXTS, DRAWING, file)
    assert [len(prompts) for prompts, _ in llm.asked] == [5, 5, 5, 3]
    kept, llm.asked = file.read_text(), []
    file.write_text("".join(kept.splitlines(keepends=True)[:8]) + "[")
    assert draw_all(llm, tokenizer, TEXTS, DRAWING, file) == whole and file.read_text() == kept
    assert [len(prompts) for prompts, _ in llm.asked] == [3, 5, 3], "only what is missing"
    other = draw_all(llm, tokenizer, TEXTS, replace(DRAWING, seed=6), file)
    assert [r["completion"] for r in other] != [r["completion"] for r in whole]


def test_vllm_that_is_not_there_or_gives_up(policy, vllm, monkeypatch):
    llm, tokenizer = load_engine(policy, "vllm")
    monkeypatch.setattr(LLM, "reply", lambda *_: SimpleNamespace(outputs=[SimpleNamespace(text="", token_ids=[], finish_reason="abort", stop_reason=None)]))
    with pytest.raises(RuntimeError, match="for the reason 'abort'"):
        ask_vllm(llm, tokenizer, ["?"], DRAWING, [0])
    monkeypatch.setattr("valuecot.training.sampling.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed here"):
        load_engine(policy, "vllm")


# ---- kill and resume
def run_of(folder: Path, name: str = "out") -> Run:
    "A run of the stage on a policy and answers that were put there."
    settings = load("test", "steerable.probes.rows=0 steerable.sampling.batch_size=4 steerable.sampling.max_completion_length=6")
    inputs = {"prompts/all-value_kaleidoscope/all/all": folder / "prompts", "answers/llama-value_kaleidoscope/rlvr/seed0": folder / "answers", "grpo/llama-value_kaleidoscope/rlvr/seed0": folder}
    (folder / name).mkdir(exist_ok=True)
    return Run("probes", "steerable", "test", "llama", "rlvr", 0, folder / name, settings, inputs, "key", "value_kaleidoscope")


def prepared(folder: Path) -> Path:
    start(folder / "model")
    world = [replace(q, split="test") for q in value_world(4)]
    write_records(folder / "prompts" / "questions.jsonl", world)
    write_records(folder / "answers" / "completions.jsonl", [{"id": q.id, "sample": 0, "completion": completion(q.gold, q.explanation)} for q in world])
    return folder


@pytest.mark.parametrize("rows", [23, 150], ids=["among likelihoods", "among completions"])
def test_probes_killed_and_begun_again_end_as_those_that_ran_through(rows, tmp_path, monkeypatch):
    folder, added = prepared(tmp_path), []
    write = Journal.add

    def dying(journal, *row):
        write(journal, *row)
        added.append(row)
        if len(added) == rows:
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):  # a new interpreter would read its libraries for longer than all the rest takes
        Journal.add = dying
        try:
            run_probes(run_of(folder))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and not (folder / "out" / "probes.jsonl").exists()
    kept = {file: file.read_text() for file in (folder / "out").glob(".trainer/*/*.jsonl")}
    assert sum(len(text.splitlines()) - 1 for text in kept.values()) == rows
    monkeypatch.setattr(Journal, "add", lambda journal, *row: added.append(row) or write(journal, *row))
    again = run_probes(run_of(folder))
    assert len(added) == 20 * (7 + 3) - rows, "only what was missing is written"
    assert run_probes(run_of(folder, "through")).equals(again)
    assert all((folder / "out" / name).read_text() == (folder / "through" / name).read_text() for name in ("probes.jsonl", "probes.csv", "completions.jsonl", "record.json"))
    assert all(file.read_text().startswith(text) for file, text in kept.items()), "what was there stayed"
    counts = json.loads((folder / "out" / "record.json").read_text())["counts"]
    assert counts["rows"] == 20 and sum(counts["swapped"].values()) == 20 and counts["probes"] == 20 * (3 + 7)
