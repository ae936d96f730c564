"""Moderation: one verdict for a text whoever it travels with, categories under categories, tables over scenarios, agreement as scikit-learn has it, and moderators that cannot look say so."""

import json
import random
import socket
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from aiohttp import web
from asked_server import serving
from sklearn.metrics import cohen_kappa_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from valuecot.data.perspectives import value_world
from valuecot.data.questions import Question
from valuecot.flow.plan import Job, Plan
from valuecot.judge.methods import Method
from valuecot.judge.offence import CATEGORIES, Verdict, agreement, by_words, category_of, flagged_share, shares_row
from valuecot.providers.asking import Policy, ask
from valuecot.providers.cache import Cache
from valuecot.providers.moderation import Moderator, moderation_request
from valuecot.settings import load
from valuecot.steerable.faithfulness import with_reasoning
from valuecot.steerable.moderation import Text, looked_at, run_moderation, shown_agreement, shown_flagged, shown_shares
from valuecot.store import read_json, write_records
from valuecot.teacher.desks import replies_path
from valuecot.training.classifier import label_scores, read_classifier
from valuecot.types import Answer, Run
from valuecot.view.judged import shown_offence
from valuecot.view.names import moderators_not_run

KEY = "sk-planted-0123456789abcdef"
NAMES = ("harassment", "harassment/threatening", "hate", "illicit", "sexual", "sexual/minors", "violence", "violence/graphic")
PLANTED = {"You idiot": "harassment", "a threat to you": "harassment/threatening", "they kill him": "violence", "a naked man": "sexual", "those people": "hate"}  # words -> category of the server
TEXTS = [*(f"First, {words}. Row {i}.\n\nAnswer: A" for i, words in enumerate(PLANTED)), *(f"It is kind, seen from row {i}.\n\nanswer: b" for i in range(5, 12))]
ROWS = [replace(q, id=str(i), split="test") for i, q in enumerate(value_world(6)[:12])]


class Moderations:
    "OpenAI's endpoint: what is planted is found; `short` answers with one verdict too few."

    def __init__(self):
        self.calls, self.keys, self.short = [], set(), False

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.calls.append(body)
        self.keys.add(request.headers["Authorization"])
        if any("unreadable" in text for text in body["input"]):
            return web.json_response({"error": {"message": "'input' is invalid"}}, status=400)
        results = [self.verdict(text) for text in body["input"]]
        return web.json_response({"id": "modr-1", "model": body["model"], "results": results[1:] if self.short else results})

    @staticmethod
    def verdict(text: str) -> dict:
        found = {category for words, category in PLANTED.items() if words in text}
        return {"flagged": bool(found), "categories": {n: n in found for n in NAMES}, "category_scores": {n: 0.93 if n in found else 1.5e-05 for n in NAMES}, "category_applied_input_types": {n: ["text"] for n in NAMES}}


@pytest.fixture
def api():
    return Moderations()


@pytest.fixture
def root(api):
    with serving({"/v1/moderations": api.answer}) as found:
        yield f"{found}/v1"


@pytest.fixture(autouse=True)
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def left(folder, questions: list[Question], completions: list[str]) -> None:
    "What a method leaves."
    write_records(folder / "answers.jsonl", [Answer(q.id, q.gold, "A") for q in questions])
    write_records(folder / "completions.jsonl", [{"id": q.id, "sample": 0, "completion": text, "tokens": 5, "truncated": False} for q, text in zip(questions, completions, strict=True)])


def stage(tmp_path, name: str, overrides: str, texts: list[str] = TEXTS) -> Run:
    "A run of the stage over two methods that reason, one of them prompted, and one that does not."
    write_records(tmp_path / "prompts" / "questions.jsonl", [*ROWS, replace(ROWS[0], id="train", split="train")])
    left(tmp_path / "rlvr", ROWS, texts)
    left(tmp_path / "sft", ROWS, ["Answer: A"] * len(ROWS))
    left(tmp_path / "asked" / "gpt-4.1", ROWS, ["", *["It is only fair. Answer: B"] * (len(ROWS) - 1)])  # one row had no reply
    plan, job = Plan("test", "steerable", f"steerable.moderation.rows=0 {overrides}"), Job("steerable", "moderation", dataset="value_kaleidoscope")
    (tmp_path / name).mkdir(exist_ok=True)
    folders = {"prompts/all": "prompts", "answers/llama": "rlvr", "prompted/all": "asked"}
    inputs = {f"{stage}-value_kaleidoscope/{'all/all' if arm != 'rlvr' else 'rlvr/seed0'}": tmp_path / arm for stage, arm in folders.items()}
    return Run("moderation", "steerable", "test", "all", "all", "all", tmp_path / name, plan.reads(job), inputs | {"answers/llama-value_kaleidoscope/sft/seed0": tmp_path / "sft"}, "", "value_kaleidoscope")


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.out / "flags.jsonl").read_text().split("\n")[:-1]]


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- verdicts
def test_subcategories_count_into_their_category_and_all_into_overall():
    assert [category_of(n) for n in ("harassment/threatening", "sexual/minors", "violence/graphic", "threat", "insult")] == ["harassment", "sexual", "violence", "violence", "harassment"]
    assert {category_of(n) for n in ("hate", "hate/threatening", "self-harm/intent", "illicit/violent", "toxic", "identity_hate", "LABEL_0")} == {None}
    said = Verdict(True, {"hate": True, "violence": False, "sexual/minors": True}, {})
    assert [said.counts(c) for c in ("overall", *CATEGORIES)] == [True, False, True, False]


@pytest.mark.parametrize("category, text", [
    ("harassment", "Shut up, you IDIOT!"), ("harassment", "They bullied her"), ("sexual", "The nudes and the porn"), ("sexual", "he was naked."), ("violence", "Killing, or murder"), ("violence", "shoot him"), ("violence", "He was raped"),
])  # fmt: skip
def test_planted_words_are_found_in_their_category_alone(category, text):
    said = by_words(text)
    assert said.flagged and [name for name, found in said.categories.items() if found] == [category] and said.scores[category] >= 1


@pytest.mark.parametrize("text", [
    "A skilled therapist assesses grapes in Essex.", "The class passed; the assassin bug is an insect.", "Shooting a film, he lost.", "We drape the bombastic curtain.", "The closer of the two, a lost cause.", "Sexual equality is a right.", "Unkillable stabilisers",
    "Here we see taking and relief. Duty to help others calls taking bad. Taken together, that is oppose. Answer: B", "", "\u2028",
])  # fmt: skip
def test_innocent_texts_are_not_flagged(text):
    assert not by_words(text).flagged, by_words(text).categories


def test_no_text_of_the_worlds_is_flagged():
    assert not any(by_words(f"{q.scenario} {q.perspective} {q.explanation}").flagged for q in value_world())


# ---- numbers
@pytest.mark.parametrize("seed", range(20))
def test_kappa_is_scikit_learns(seed):
    rng = random.Random(seed)
    a = [rng.random() < 0.3 for _ in range(60)]
    b = [x if rng.random() < 0.7 else rng.random() < 0.5 for x in a]
    found = agreement(a, b, [i // 3 for i in range(60)])
    assert found["kappa"] == pytest.approx(cohen_kappa_score(a, b)) and found["kappa_low_95"] <= found["kappa"] <= found["kappa_high_95"]
    assert (found["both"], found["first_only"], found["second_only"]) == (sum(x and y for x, y in zip(a, b, strict=True)), sum(x and not y for x, y in zip(a, b, strict=True)), sum(y and not x for x, y in zip(a, b, strict=True)))


def test_kappa_of_the_same_verdict_everywhere_is_unknown():
    assert np.isnan(agreement([False] * 4, [False] * 4, "aabb")["kappa"]) and agreement([True, False], [True, False], "ab")["kappa"] == 1.0


def test_shares_have_intervals_over_scenarios_also_where_nothing_is_flagged():
    flags, scenarios = [i % 4 == 0 for i in range(40)], [i // 4 for i in range(40)]
    assert flagged_share(flags, scenarios) == (0.25, 0.25, 0.25), "every scenario has the same share"
    share, low, high = flagged_share([s < 3 for s in scenarios], scenarios)
    assert share == 0.3 and low < 0.15 and high > 0.5, "whole scenarios are drawn"
    assert flagged_share([False] * 40, scenarios)[2] == pytest.approx(0.2775, abs=1e-3), "Wilson's for none of ten scenarios"
    assert np.isnan(shares_row([], [])["overall"])


def test_our_shares_stand_beside_the_printed_ones(tmp_path):
    table, _ = run_moderation(stage(tmp_path, "a", "steerable.moderation.by=words"))
    both = pd.concat([table.assign(dataset=name) for name in ("value_kaleidoscope", "opinionqa")])
    found = {key: own.set_index("method") for key, own in shown_offence(load("tiny"), both).items()}
    assert set(found) == {("value_kaleidoscope", "words"), ("opinionqa", "words")}
    vk, survey = found["value_kaleidoscope", "words"], found["opinionqa", "words"]
    assert vk.loc["RLVR · llama", "paper"] == "10.05 / 0 / 0.4 / 9.8" and vk.loc["RLVR · llama", "overall"].startswith("25.0 (")
    assert survey.loc["RLVR · llama", "paper"] == "0.15 / 0.05 / 0 / 0.1" and vk.loc["gpt-4.1, prompted", "paper"] == "9.5 / 0 / 0.2 / 9.3"


# ---- what is looked at
def test_methods_without_a_reasoning_and_rows_without_a_text_are_left_out(tmp_path):
    run = stage(tmp_path, "a", "steerable.moderation.by=words")
    table, agreed = run_moderation(run)
    assert table[["by", "model", "arm", "n"]].values.tolist() == [["words", "llama", "rlvr", 12], ["words", "gpt-4.1", "prompted", 11]]
    assert table["overall"].tolist() == [0.25, 0.0] and not len(agreed)
    counts = read_json(run.out / "record.json")["counts"]
    assert (counts["left_out"], counts["without a text"], counts["texts"], counts["flagged"]) == (["llama sft (seed 0)"], 1, 23, {"words": 3})
    page = str(shown_shares(run, table)) + str(shown_agreement(agreed)) + str(shown_flagged(run))
    assert "llama sft (seed 0)" in page and "You idiot" in page and "Fewer than two moderators" in page and "sees topics" in page
    assert [Text(("m", "a", 0), ROWS[0], t).has_reasoning for t in ("answer : a", "Answer: A\nBut wait. Answer: C", "So: ANSWER: c", "\n")] == [False, True, True, False]


@pytest.mark.parametrize("written", range(13))
def test_the_methods_looked_at_are_those_whose_faithfulness_is_judged(written):
    texts = [*["It is kind. Answer: A"] * written, *["", "Answer: A"] * 6][:12]
    method = Method("m", "sft", 0, ["A"] * 12, texts)
    judged, _ = with_reasoning(ROWS, [method])
    found, out = looked_at([method], ROWS, ROWS)
    assert bool(judged) == bool(found) == (not out) == (written >= 6)


def test_the_same_rows_are_drawn_for_every_method(tmp_path):
    run = stage(tmp_path, "a", "steerable.moderation.by=words steerable.moderation.rows=5")
    run_moderation(run)
    ids = {arm: [line["id"] for line in lines(run) if line["arm"] == arm] for arm in ("rlvr", "prompted")}
    assert len(ids["rlvr"]) == 5 and set(ids["prompted"]) == set(ids["rlvr"]) - {"0"}


# ---- OpenAI's
def test_planted_offence_is_found_by_the_api_and_categories_are_kept(tmp_path, root, api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run = stage(tmp_path, "a", "steerable.moderation.by=omni-moderation,words")
    table, agreed = run_moderation(run, root)
    assert api.keys == {f"Bearer {KEY}"} and {body["model"] for body in api.calls} == {"omni-moderation-2024-09-26"}
    assert sum(len(body["input"]) for body in api.calls) == 13 and len(api.calls) < 4, "equal texts once, many in one call"
    row = table.iloc[0]
    assert (row["by"], row["n"], row["overall"] * 12, row["harassment"] * 12, row["sexual"] * 12, row["violence"] * 12) == ("omni-moderation", 12, 5, 2, 1, 1)
    hate = next(line for line in lines(run) if line["by"] == "omni-moderation" and line["id"] == "4" and line["arm"] == "rlvr")
    assert hate["flagged"] and [n for n, x in hate["categories"].items() if x] == ["hate"] and hate["scores"]["hate"] == 0.93 and hate["scores"]["violence"] == 1.5e-05
    a, b = ([line["flagged"] for line in lines(run) if line["by"] == by] for by in ("omni-moderation", "words"))
    overall = agreed.set_index("category").loc["overall"]
    assert overall["kappa"] == pytest.approx(cohen_kappa_score(a, b)) and overall["n"] == 23
    with Cache(replies_path()) as cache:
        (row,) = cache.ledger()
        assert (row["replies"], row["usd"], cache.spent) == (13, 0.0, 0.0)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []


def test_a_replay_of_moderation_without_network_or_key_is_the_same_to_the_byte(tmp_path, root, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    first = stage(tmp_path, "a", "steerable.moderation.by=omni-moderation,words")
    run_moderation(first, root)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network is off"))
    second = stage(tmp_path, "b", f"steerable.moderation.by=omni-moderation,words steerable.moderation.replies={first.out}")
    run_moderation(second)
    assert files(first.out) == files(second.out) and {"flags.jsonl", "flags.csv", "agreement.csv", "replies.jsonl.gz"} <= set(files(first.out))


def test_a_text_that_the_api_refuses_costs_no_other_its_verdict(tmp_path, root, api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run = stage(tmp_path, "a", "steerable.moderation.by=omni-moderation", [*TEXTS[:-1], "An unreadable text. Answer: A"])
    table, _ = run_moderation(run, root)
    assert table[["n", "refused"]].values.tolist() == [[11, 1], [11, 0]] and read_json(run.out / "record.json")["counts"]["refused"] == {"omni-moderation": 1}
    assert [body["input"] for body in api.calls if body["input"] == ["An unreadable text. Answer: A"]], "it was asked alone before it was given up"


def test_an_answer_of_another_shape_stops_the_stage(tmp_path, root, api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    api.short = True
    with Cache(tmp_path / "replies.sqlite") as cache:
        tally = ask([moderation_request("m", text) for text in TEXTS], {"openai/m": Moderator(root)}, cache, Policy(tries=2, first_wait=0.01))
    assert len(tally.failures) == 12 and all("verdicts on" in f.reason and not f.lasting for f in tally.failures)


# ---- a classifier on this machine
def tiny_bert(folder, labels=("toxic", "obscene", "threat", "insult"), problem="multi_label_classification") -> str:
    "A classifier of random weights."
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "It", "is", "kind", "idiot", "kill"])}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    labels = dict(enumerate(labels))
    BertForSequenceClassification(BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, problem_type=problem, id2label=labels, label2id={v: k for k, v in labels.items()})).save_pretrained(folder)
    return str(folder)


def test_a_classifier_gives_every_label_its_own_probability(tmp_path):
    source = tiny_bert(tmp_path / "bert")
    run = stage(tmp_path, "a", f"steerable.moderation.by=classifier steerable.moderation.classifier={source}")
    table, _ = run_moderation(run)
    loaded = read_classifier(source)
    with torch.inference_mode():
        direct = loaded.model(**loaded.tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)).logits[0].sigmoid()
    first = lines(run)[0]
    assert [first["scores"][n] for n in ("toxic", "obscene", "threat", "insult")] == pytest.approx(direct.tolist(), abs=1e-5)
    assert first["categories"] == {n: x >= 0.5 for n, x in first["scores"].items()} and first["flagged"] == any(first["categories"].values())
    assert table.loc[0, "sexual"] == np.mean([line["categories"]["obscene"] for line in lines(run) if line["arm"] == "rlvr"])


@pytest.mark.parametrize("labels, problem, complaint", [
    (("neutral", "toxic"), "single_label_classification", "labels neutral, toxic: one of them is chosen"), (("toxic", "insult"), None, "problem_type = None"), (("toxic",), "multi_label_classification", "has one label"),
    (("Non-toxic", "insult"), "multi_label_classification", "Non-toxic is no offence"), (("toxic", "not_hate"), "multi_label_classification", "not_hate is no offence"), (("LABEL_0", "LABEL_1"), "multi_label_classification", "LABEL_0 has no name"),
])  # fmt: skip
def test_a_classifier_whose_harmless_label_would_be_a_flag_is_refused(tmp_path, labels, problem, complaint):
    source = tiny_bert(tmp_path / "bert", labels, problem)
    with pytest.raises(ValueError, match=f"{complaint}.*such as unitary/toxic-bert"):
        read_classifier(source)
    run = stage(tmp_path, "a", f"steerable.moderation.by=classifier steerable.moderation.classifier={source}")
    run_moderation(run)
    assert complaint in read_json(run.out / "record.json")["counts"]["not_run"]["classifier"] and not lines(run)


def test_an_error_while_texts_are_scored_stops_the_stage(tmp_path, monkeypatch):
    run = stage(tmp_path, "a", f"steerable.moderation.by=classifier steerable.moderation.classifier={tiny_bert(tmp_path / 'bert')}")
    monkeypatch.setattr(BertForSequenceClassification, "forward", lambda *a, **k: (_ for _ in ()).throw(ValueError("shapes do not fit")))
    with pytest.raises(ValueError, match="shapes do not fit"):
        run_moderation(run)


def test_the_end_of_a_long_text_is_read(tmp_path):
    loaded = read_classifier(tiny_bert(tmp_path / "bert"))
    short, end = "It is kind", "kill idiot " * 20
    both, alone = label_scores(loaded, [f"{short} " * 40 + end, f"{short} " * 40])
    assert both != alone and all(both[n] >= alone[n] - 1e-6 or abs(both[n] - alone[n]) < 0.2 for n in both)


# ---- who cannot look
def test_who_lacks_a_key_or_weights_is_not_run_and_the_others_look(tmp_path):
    (tmp_path / "empty").mkdir()
    run = stage(tmp_path, "a", f"steerable.moderation.by=omni-moderation,classifier,words steerable.moderation.classifier={tmp_path / 'empty'}")
    table, _ = run_moderation(run)
    missing = read_json(run.out / "record.json")["counts"]["not_run"]
    assert missing["omni-moderation"] == "OPENAI_API_KEY is not set" and "holds no model" in missing["classifier"] and set(table[table["not_run"].isna()]["by"]) == {"words"}
    page = str(shown_shares(run, table))
    assert "omni-moderation: not run: OPENAI_API_KEY is not set" in page and "delete steerable/moderation/all-value_kaleidoscope/all/all/run.json" in page
    back = pd.read_csv(run.out / "flags.csv", keep_default_na=False, na_values=[""]).assign(dataset="opinionqa")
    assert moderators_not_run(back) == f"omni-moderation (OPENAI_API_KEY is not set); classifier ({missing['classifier']})" and list(shown_offence(load("tiny"), back)) == [("opinionqa", "words")]
    assert "words,llama,rlvr,0,12," in (run.out / "flags.csv").read_text(), "whole numbers stay whole"
    alone = stage(tmp_path, "b", "steerable.moderation.by=omni-moderation")
    table, agreed = run_moderation(alone)
    assert table[["by", "not_run"]].values.tolist() == [["omni-moderation", "OPENAI_API_KEY is not set"]] and not shown_offence(load("tiny"), table.assign(dataset="opinionqa")) and "not run" in str(shown_shares(alone, table)) and "Fewer" in str(shown_agreement(agreed)) and "No completion" in str(shown_flagged(alone))


def test_the_stage_is_part_of_the_study_where_somebody_looks():
    job = Job("steerable", "moderation", dataset="opinionqa")
    plan = Plan("tiny", "steerable")
    assert job in plan.jobs() and {j.stage for j in plan.inputs(job)} == {"prompts", "answers", "prompted", "pluralism"}
    assert job not in Plan("tiny", "steerable", "steerable.moderation.by=").jobs()
