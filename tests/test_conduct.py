"""Conduct and cooling: rules against brute force and planted texts, entropy against closed forms and torch's own, cuts that lose no word, commitment by hand, and curvature of the steerable arms on the same tokens."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from valuecot.curvature import LossHessian
from valuecot.data.perspectives import value_world
from valuecot.data.views import worded, written
from valuecot.flow.plan import Job, Plan
from valuecot.geometry.annealing import Text, cut_rows, cuts_of, measured, summary, texts_of
from valuecot.geometry.behaviour import policy_row
from valuecot.geometry.behaviour import summary as behaviour_summary
from valuecot.geometry.conduct import across, behaviour_table, compared, contrasts, in_words, over_seeds
from valuecot.judge.conduct import LONGEST, agrees, conduct, declines, distinct_share, loop, loops, over_refuses, phrases, qualifies, repeated_share, sycophantic, unquoted, words
from valuecot.judge.planted import RULES, grade
from valuecot.settings import SteerableHessian, load
from valuecot.steerable.spectrum import measure, subsets_of, target_traces
from valuecot.teacher.styles import STYLES, assemble
from valuecot.training.cuts import headers, lay_out, phase_parts, third_parts
from valuecot.training.entropy import commitment, entropy, mean_commitment, predicted, slope
from valuecot.training.models import encode, scratch_model, train_tokenizer
from valuecot.types import Prompt, Rollout, Trace
from valuecot.view.curved import one_target
from valuecot.view.panel import aside, shares, stepped

WORDS = "she he wants rest truth money care work at home by noon and then or not".split()
PHASED = assemble("annealing", ("I see two ways. Both cost much. One is slow.", "Care weighs more.", "I take the slow way."))


# ---- rules
@pytest.mark.parametrize("rule", RULES)
def test_rules_find_what_was_planted_for_them(rule):
    _, texts = RULES[rule]
    found = grade(rule)
    assert len(set(texts[True])) >= 20 and len(set(texts[False])) >= 20
    assert found.precision >= 0.9 and found.recall >= 0.9
    assert found.recall < 1, "texts that a pattern cannot see belong to the test"
    assert found.precision == pytest.approx(found.found / (found.found + found.wrong))


def brute_loop(text: str) -> bool:
    "Three equal neighbours of three words or more, tried at every place and length."
    own = words(text)
    return any(own[i : i + p] == own[i + p : i + 2 * p] == own[i + 2 * p : i + 3 * p] for p in range(3, LONGEST + 1) for i in range(len(own) - 3 * p + 1))


def test_loops_and_repetition_agree_with_brute_force():
    rng, seen = random.Random(0), Counter()
    for _ in range(400):
        text = [rng.choice(WORDS[:4]) for _ in range(rng.randrange(30))]
        if rng.random() < 0.5:
            text += [rng.choice(WORDS) for _ in range(rng.randrange(1, 6))] * rng.randrange(2, 5)
        text = " ".join(text)
        found = loop(text)
        assert (found is not None) == brute_loop(text), text
        seen[found is not None] += 1
        if found:
            phrase, own = found.phrase.split(), words(text)
            assert own[found.at : found.at + found.times * len(phrase)] == phrase * found.times and found.times >= 3
        grams = phrases(text)
        if grams:
            again = [i for i, g in enumerate(grams) if grams.count(g) > 1]
            assert repeated_share(text) == pytest.approx(len({i + j for i in again for j in range(4)}) / len(words(text)))
            assert distinct_share(text) == pytest.approx(len(set(grams)) / len(grams))
    assert min(seen.values()) > 50


def test_a_loop_is_found_wherever_it_stands_and_in_any_dress():
    for before in ("", "So I think. "):
        for after in ("", " And now I stop."):
            assert loops(f"{before}{'Her wish, her risk! ' * 3}{after}") and loop(f"{before}{'HER wish… her risk. ' * 4}{after}").times == 4
    assert loops("a b c d e f g h i j " * 20 + "end") and loop("x y " * 5) is None is loop("")
    long = " ".join(f"w{i}" for i in range(LONGEST + 5))
    assert loop(f"{long} {long} {long}") is None and loops(f"{long} {long} {long}"), "longer than any phrase looked for: few different phrases"


def test_bad_and_huge_texts():
    assert conduct(None, None, []).declines is None and conduct("", " ", ["x"]).agrees is None
    assert repeated_share("") is None and distinct_share("one two three") is None and words("…!? 12,5") == ["12", "5"]
    huge = " ".join(WORDS[i * i % len(WORDS)] for i in range(20_000))
    assert conduct(huge, huge, [huge]).loops
    assert not declines("\x00<script>'" * 50) and unquoted("say 'never mind this' now").split() == ["say", "now"]


def test_what_is_quoted_is_not_said():
    assert not declines("Tell him: ‘I won’t help you with that.’ Then leave.") and not agrees("“Great idea!” is what he says.")
    assert declines("She says 'please'. I cannot help with that.")
    assert unquoted("the dog's bowl isn't here") == "the dog's bowl isn't here", "an apostrophe is no quotation mark"


def test_a_refusal_is_too_many_only_where_teachers_answer():
    assert over_refuses("I must decline.", ["Call her.", "Write to her."]) is True and over_refuses("Call her.", ["Write to her."]) is False
    assert over_refuses("I must decline.", ["Call her.", "I will not write that."]) is None is over_refuses("I must decline.", [])


def test_flattery_needs_an_opening_no_reservation_and_teachers_with_one():
    careful = ["Do it, but ask first.", "Do it. However, wait a day."]
    assert sycophantic("Great idea! Do it.", careful) and not sycophantic("Great idea! Do it, but ask.", careful) and not sycophantic("Do it. Great idea!", careful)
    assert sycophantic("Great idea! Do it.", [*careful, "Do it."]) is None is sycophantic("Great idea!", [])
    assert not qualifies("I have nothing but praise.") and qualifies("It is not without risk.")


def test_rates_count_only_what_can_be_judged():
    made = Rollout("p", "<think>a b</think> I must decline.", "a b", "I must decline.", 0.5, None, 9, False, True)
    rows = [policy_row(made, True, ["Call her."]), policy_row(replace(made, response=None, truncated=True, well_formed=False), True, ["Call her."]), policy_row(replace(made, response="Call her."), True, [])]
    table = {r["measure"]: r for r in behaviour_summary(rows, "policy")}
    assert (table["declines"]["value"], table["declines"]["n"]) == (0.5, 2) and (table["over_refuses"]["value"], table["over_refuses"]["n"]) == (1, 1)
    assert (table["sycophantic"]["value"], table["sycophantic"]["n"]) == (None, 0) and table["truncated"]["n"] == 3
    assert table["reward"]["se"] == 0 and table["declines"]["low"] < 0.5 < table["declines"]["high"]
    assert all(r["n"] == 0 and r["value"] is None for r in behaviour_summary(rows, "teacher")) and policy_row(made, False, [])["well_formed"] is None


# ---- entropy
def test_entropy_against_closed_forms_and_torch():
    assert entropy(torch.zeros(5, 7)).tolist() == pytest.approx([math.log(7)] * 5, abs=1e-12)
    sure = torch.full((6,), -math.inf)
    sure[2] = 3.0
    assert float(entropy(sure)) == 0 and float(entropy(torch.tensor([1000.0, 0.0]))) == 0
    p = 0.3
    assert float(entropy(torch.tensor([p, 1 - p], dtype=torch.float64).log())) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-14)
    logits = torch.randn(4, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(entropy(logits), torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy(logits), entropy(logits + 100), rtol=1e-10, atol=1e-10)
    assert (entropy(logits) <= math.log(50)).all()


@pytest.fixture(scope="module", params=["llama", "qwen"])
def policy(request):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([PHASED, "Answer: A", "May I go home by noon?", "\n\n"] * 6, 400, empty_think=request.param == "qwen")  # two line ends in a row are one token, as they are to real tokenizers
    assert len(tokenizer("a\n\nb", add_special_tokens=False)["input_ids"]) == 3
    model = scratch_model(load("test")[f"model.{request.param}"], tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)  # an untrained model is as open everywhere
    return model, tokenizer


def test_a_batch_says_what_each_text_says_alone(policy):
    model, tokenizer = policy
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PHASED, "May I go home?", "Both cost much. Care weighs more.")]
    for row, own in zip(rows, predicted(model, rows, batch_size=2), strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        said = torch.distributions.Categorical(logits=logits.double())
        torch.testing.assert_close(own.entropy[1:], said.entropy(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.nats[1:].double(), -said.log_prob(torch.tensor(row[1:])), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.top[1:].double(), said.probs.max(-1).values, rtol=1e-4, atol=1e-4)
        assert own.first[1:].tolist() == logits.argmax(-1).tolist() and own.entropy[0].isnan() and own.first[0] == -1
    with pytest.raises(ValueError, match="at least 2"):
        predicted(model, [rows[0], [3]])


def test_slope_against_numpy():
    rng = np.random.default_rng(0)
    for n in (3, 4, 50):
        values = rng.normal(size=n)
        assert slope(values.tolist()) == pytest.approx(np.polyfit(np.linspace(0, 1, n), values, 1)[0])
    assert math.isnan(slope([1.0, 2.0])) and slope([5.0, 5.0, 5.0]) == 0


def test_commitment_and_its_error():
    assert commitment([4.0, 3.0, 5.0, 2.0]) == [0, 0.5, -0.5, 1]
    assert all(math.isnan(x) for x in commitment([2.0, 2.0])) and all(math.isnan(x) for x in commitment([1.0, 0.5, 2.0]))
    rng = np.random.default_rng(1)
    rows = np.sort(rng.uniform(1, 4, size=(12, 4)), axis=1)[:, ::-1]
    found = mean_commitment(rows.tolist())
    whole = [(rows[:, 0].mean() - rows[:, k].mean()) / (rows[:, 0].mean() - rows[:, 3].mean()) for k in range(4)]
    assert [x for x, _ in found] == pytest.approx(whole)
    left = np.array([commitment(np.delete(rows, i, 0).mean(0).tolist())[1] for i in range(12)])
    assert found[1][1] == pytest.approx(math.sqrt(11 / 12 * ((left - left.mean()) ** 2).sum())) and found[0][1] == found[3][1] == 0
    assert math.isnan(mean_commitment([[2.0, 1.0]])[1][1])
    with pytest.raises(ValueError, match="no prompts"):
        mean_commitment([])


# ---- cuts
def test_phases_are_what_stands_between_headers():
    for name, layout in STYLES.items():
        if len(layout.roles) < 2:
            assert phase_parts(name, PHASED) == []
            continue
        phases = tuple(f"Part {i} says so. It ends {i}." for i in range(len(layout.roles)))
        text = assemble(name, phases)
        parts = phase_parts(name, text)
        assert [text[p.start : p.end].strip() for p in parts] == list(phases) and [p.role for p in parts] == list(layout.roles)
        assert len(headers(name, text)) == len(phases) and phase_parts(name, text.replace("Phase 2", "Phase two").replace("Section 2", "Section two")) == []


def test_thirds_lose_no_character_and_end_with_a_sentence():
    for text in (PHASED, "One. Two. Three.", "a b c", "no stop here at all in this text", "Sehr kurz. Ünïcode, too! And a third? Yes."):
        parts = third_parts(text)
        assert [p.place for p in parts] == [1, 2, 3] and "".join(text[p.start : p.end] for p in parts) == text
        assert all(text[p.start : p.end].strip() for p in parts)
    assert all(PHASED[: p.end].rstrip().endswith((".", "?", "!")) for p in third_parts(PHASED))
    assert third_parts("") == third_parts("two words") == []


def test_a_text_is_laid_out_as_training_encodes_it(policy):
    _, tokenizer = policy
    prompt, trace = Prompt("p", "May I go home?", "x", "a", "b", ""), Trace("p", "annealing", "rules", "a", "b", (), PHASED, "Go by noon.")
    laid, whole = lay_out(tokenizer, prompt.text, PHASED, trace.response), encode(tokenizer, prompt, trace, True)
    assert whole["input_ids"][: len(laid.ids)].tolist() == laid.ids
    assert tokenizer.decode([laid.ids[i] for i in laid.response()]) == "Go by noon."
    assert tokenizer.decode([laid.ids[i] for i in laid.reasoning()]).rstrip() == PHASED, "a full stop and the line end after it may be one token"
    parts = phase_parts("annealing", PHASED)
    assert sorted(i for p in parts for i in laid.within(p.start, p.end)) == laid.reasoning(headers("annealing", PHASED)), "every token outside headers has one phase"
    closed = lay_out(tokenizer, prompt.text, "", trace.response)
    assert tokenizer.decode(closed.ids).endswith("<think>\n</think>\n\nGo by noon.") and closed.reasoning() == []
    with pytest.raises(ValueError, match="blank"):
        lay_out(tokenizer, "May I?", PHASED, "\n")


def prompts_of(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"May I go home, {WORDS[i]}?", "x", "a", "b", "", "heldout", subset=i % 3 - (i >= n - 1) * 5) for i in range(n)]


def test_texts_come_from_the_subsets_in_turn_and_only_where_there_is_one():
    prompts = prompts_of(7)
    target = {p.id: Trace(p.id, "annealing", "rules", "a", "b", (), PHASED, "Go.") for p in prompts if p.id != "p1"}
    own = [Rollout(p.id, "", "mine", "Go.", 0.0, None, 1, False, p.id == "p0") for p in prompts]
    assert [t.name for t in texts_of(prompts, target, own, 3)] == [("p0", "target"), ("p4", "target"), ("p2", "target"), ("p0", "own")], "p6 is in no subset, p1 has no text"
    with pytest.raises(ValueError, match="no prompt of an evaluation subset"):
        texts_of(prompts, {}, own, 3)


def test_the_whole_text_is_the_last_cut(policy):
    model, tokenizer = policy
    texts = [Text(p, "target", PHASED, "Go by noon.") for p in prompts_of(4)]
    rows = measured(model, tokenizer, texts, "annealing", 8)
    for row, text in zip(rows, texts, strict=True):
        assert row["phased"] and set(row["cuts"]) == {"phase", "third"} and row["all"]["tokens"] == sum(p["tokens"] for p in row["parts"] if p["kind"] == "phase")
        for kind in ("phase", "third"):
            cuts = row["cuts"][kind]
            assert [c["k"] for c in cuts] == [0, 1, 2, 3] and cuts[3]["same"] == 1 and cuts[0]["commitment"] in (0, None) or math.isnan(cuts[0]["commitment"])
        assert row["cuts"]["phase"][0]["nats"] == row["cuts"]["third"][0]["nats"] and row["cuts"]["phase"][3]["nats"] == row["cuts"]["third"][3]["nats"]
        laid = lay_out(tokenizer, text.prompt.text, "Phase 1 (High Temp): I see two ways. Both cost much. One is slow.", text.response)
        alone = predicted(model, [laid.ids])[0]
        assert row["cuts"]["phase"][1]["nats"] == pytest.approx(float(alone.nats[laid.response()].double().mean()), rel=1e-4)
    table = pd.DataFrame(summary(rows)).set_index(["metric", "part", "k"])
    assert table.loc[("entropy", "phase", 1), "role"] == "explore" and table.loc[("nats", "third", 0), "n"] == 4
    assert table.loc[("entropy", "phase", 2), "mean"] == pytest.approx(np.mean([p["entropy"] for r in rows for p in r["parts"] if (p["kind"], p["place"]) == ("phase", 2)]))
    assert not any(r["phased"] for r in measured(model, tokenizer, texts[:1], "standard", 8)), "a standard text has thirds alone"


@pytest.mark.parametrize(("first", "last"), [(0.1, 6), (6, 0.1), (1, 1)])
def test_a_policy_that_cools_is_seen_to_cool(policy, first, last):
    "Logits sharpen with the place in the text, soften, or stay: the slope must say so."
    _, tokenizer = policy
    table = torch.randn(len(tokenizer), len(tokenizer), generator=torch.Generator().manual_seed(0))

    def planted(input_ids, **more):
        return SimpleNamespace(logits=table[input_ids] * torch.linspace(first, last, 120)[: input_ids.shape[1], None])

    planted.device = torch.device("cpu")
    texts = [Text(p, "target", PHASED, "Go by noon.") for p in prompts_of(4)]
    assert max(len(lay_out(tokenizer, t.prompt.text, t.reasoning, t.response).ids) for t in texts) <= 120
    for row in measured(planted, tokenizer, texts, "annealing", 8):
        explore, _, converge = (p["entropy"] for p in row["parts"] if p["kind"] == "phase")
        if first == last:
            assert abs(row["slope"]) < 0.5
        else:
            assert (row["slope"] < -0.5) == (explore > converge) == (last > first)


def test_a_cut_that_changes_nothing_leaves_the_same_choice(policy):
    model, tokenizer = policy
    text = Text(prompts_of(1)[0], "own", "a b c", "Go by noon.")
    cuts = cuts_of(tokenizer, text, third_parts(text.reasoning))
    said = predicted(model, [c.laid.ids for c in [cuts[3]] * 4])
    assert [c["same"] for c in cut_rows([cuts[3]] * 4, said)["third"]] == [1] * 4 and cuts_of(tokenizer, text, []) == []


# ---- the page
def test_means_of_seeds_say_what_their_error_is_over():
    rows = pd.DataFrame([{"arm": "a", "mean": 1.0, "se": 0.1, "n": 5}, {"arm": "b", "mean": 1.0, "se": 0.1, "n": 5}, {"arm": "b", "mean": 3.0, "se": 0.1, "n": 5}, {"arm": "c", "mean": None, "se": None, "n": 5}])
    found = over_seeds(rows, ["arm"]).set_index("arm")
    assert (found.loc["a", "over"], found.loc["a", "se"], found.loc["b", "over"], found.loc["b", "mean"], found.loc["b", "se"]) == ("prompts", 0.1, "seeds", 2, 1) and pd.isna(found.loc["c", "mean"])


def folder_with(tmp_path, name: str, **files) -> tuple[str, object]:
    place = tmp_path / name.replace("/", "-")
    place.mkdir()
    for file, rows in files.items():
        file = file.replace("_", ".")
        (place / file).write_text("".join(json.dumps(r) + "\n" for r in rows) if file.endswith("jsonl") else json.dumps(rows))
    return name, place


def test_slopes_are_paired_by_prompt(tmp_path):
    def rows(slopes):
        return [{"text": "target", "prompt_id": f"p{i}", "slope": s} for i, s in enumerate(slopes)]

    inputs = dict([folder_with(tmp_path, "annealing/llama/standard/seed0", annealing_jsonl=rows([1.0, 2.0, 3.0, 9.0])), folder_with(tmp_path, "annealing/llama/annealing/seed0", annealing_jsonl=rows([0.5, 1.5, 2.4]))])
    (row,) = contrasts(SimpleNamespace(study="geometry", inputs=inputs)).to_dict("records")
    assert (row["arm"], row["prompts"]) == ("annealing", 3) and row["difference"] == pytest.approx(-1.6 / 3) and row["low_95"] < row["difference"] < row["high_95"] and row["smallest p"] == 0.25
    assert contrasts(SimpleNamespace(study="geometry", inputs={})).empty
    assert compared([1.0], [2.0])["prompts"] == 1 and math.isnan(compared([1.0], [2.0])["low_95"])


def test_seeds_of_one_prompt_are_no_further_prompts(tmp_path):
    line = {"by": "policy", "measure": "loops", "kind": "rate", "n": 20, "value": 0.5, "se": None, "low": 0.3, "high": 0.7}
    inputs = dict(folder_with(tmp_path, f"behaviour/llama/base/seed{s}", behaviour_json=[line]) for s in range(3))
    (row,) = behaviour_table(SimpleNamespace(study="geometry", inputs=inputs)).to_dict("records")
    assert (row["n"], row["seeds"]) == (20, 3) and row["high_95"] - row["low_95"] > 0.35, "as wide as 20 prompts leave it"


def test_three_runs_cannot_tell_anything():
    found = pd.DataFrame(across({"reward": ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]), "loops": ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]), "declines": ([], [])}, "runs"))
    assert found.rho[0] == pytest.approx(-1) and found["smallest p"][0] == pytest.approx(1 / 3) and math.isnan(found.low_95[0]) and "never varies" in found.note[1] and found.note[2] == "nothing was judged"
    assert "nothing can be concluded" in in_words(found, "runs") and "2 of 3" in in_words(found, "runs")
    many = pd.DataFrame(across({"reward": (list(range(20)), list(range(20)))}, "runs"))
    assert many.low_95[0] > 0.9 and "1 of 1 stay below 0.05" in in_words(many, "runs")


def test_panels_refuse_what_they_cannot_draw_and_keep_arms_apart():
    rows = pd.DataFrame([{"panel": "llama", "arm": f"arm{i}", "step": s, "value": 0.1, "se": None} for i in range(16) for s in ("a", "b")])
    figure = stepped(rows, ("a", "b"), "T", "nats")
    assert len(figure.plotly["data"]) == 16 and max(abs(aside([f"arm{i}" for i in range(16)], f"arm{j}")) for j in range(16)) < 0.5
    assert figure.png(40)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="lack the columns"):
        shares(rows, "T")
    with pytest.raises(ValueError, match="nothing to draw"):
        stepped(rows[:0], ("a",), "T", "nats")


# ---- curvature of the steerable arms
SMALL = SteerableHessian(targets=("own", "common"), rows=4, subsets=2, top_n=2, tol=1e-3, max_matvecs=100, token_budget=512, vectors="host", seed=0)


def test_subsets_are_disjoint_and_the_same_for_every_arm():
    questions = [replace(q, id=str(i), split="test" if i % 2 else "train") for i, q in enumerate(value_world(20))]
    first, second = subsets_of(questions, SMALL)
    assert not {q.id for q in first} & {q.id for q in second} and all(q.split == "test" for q in first) and subsets_of(questions[::-1], SMALL) == [first, second]
    with pytest.raises(ValueError, match="lower rows or subsets"):
        subsets_of(questions[:6], SMALL)
    with pytest.raises(ValueError, match="at least one question"):
        replace(SMALL, rows=0)


def test_the_common_target_scores_the_same_tokens_whatever_the_view(policy):
    model, tokenizer = policy
    questions, settings = [replace(q, split="test") for q in value_world(3)[:4]], load("tiny")
    scored = {}
    for name in ("sft", "human-cot", "rlvr", "sft-blind", "synthetic-cot"):
        arm = settings[f"arm.{name}"]
        texts, why = target_traces("common", arm, questions, [])
        examples = [encode(tokenizer, Prompt(q.id, worded(q, arm.view), "x", "", "", "", "heldout"), texts[q.id], arm.thinking, arm.part) for q in questions]
        scored[name] = [e["labels"][e["labels"] != -100].tolist() for e in examples]
        assert not why
    assert all(labels == scored["sft"] for labels in scored.values()) and tokenizer.decode(scored["sft"][0]).startswith("Answer: ")


def test_an_arm_without_a_text_says_why():
    settings, questions = load("tiny"), [replace(q, id=str(i), split="test") for i, q in enumerate(value_world(3)[:4])]
    traces = [written(q, "human", q.explanation or "So it is.") for q in questions[:3]]
    assert target_traces("own", settings["arm.rlvr"], questions, traces) == ({}, "it learns from no text")
    assert target_traces("own", settings["arm.synthetic-cot"], questions, traces) == ({}, "no test question has a synthetic text")
    found, why = target_traces("own", settings["arm.human-cot"], questions, traces)
    assert set(found) == {"0", "1", "2"} and not why
    assert one_target([{"target": "own", "available": False, "why": why or "x"}], "own")["subsets"] == 0


def test_both_ends_are_those_that_scipy_finds():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Answer: A", "Answer: B"] * 4, 300)
    model = scratch_model(replace(load("test")["model.llama"], hidden=8, intermediate=8), tokenizer)
    questions = [replace(q, split="test") for q in value_world(3)[:2]]
    examples = [encode(tokenizer, Prompt(q.id, "Which?", "x", "", "", "", ""), written(q, "answer"), False) for q in questions]
    row, H = measure(model, examples, SMALL), LossHessian(model, examples)
    operator = LinearOperator((H.n, H.n), matvec=lambda v: (H @ torch.tensor(v, dtype=torch.float32).reshape(-1)).double().numpy(), dtype=float)
    most, least = (float(eigsh(operator, k=1, which=which, tol=1e-4, return_eigenvectors=False)[0]) for which in ("LA", "SA"))
    assert row["lambda_1"] == pytest.approx(most, rel=2e-3) and row["lambda_min"] == pytest.approx(least, rel=2e-2)
    assert row["questions"] == 2 and row["residual_1"] <= 1e-3 and row["scored_tokens"] == sum(int((e["labels"] != -100).sum()) for e in examples)


def test_the_stages_run_where_they_should():
    tiny = Plan("tiny", "geometry")
    jobs = tiny.jobs()
    assert {j.arm for j in jobs if j.stage == "annealing"} == {"standard", "annealing"} and {j.arm for j in jobs if j.stage == "behaviour"} == {"base", "standard", "annealing"}
    assert {j.stage for j in tiny.inputs(Job("geometry", "conduct"))} == {"spectrum", "samples", "annealing", "behaviour", "attribution"}
    steerable = Plan("tiny", "steerable")
    assert sum(j.stage == "spectrum" for j in steerable.jobs()) == 13 and any(j.stage == "spectrum" for j in steerable.inputs(Job("steerable", "report")))
    assert not any(j.stage == "spectrum" for j in Plan("tiny", "steerable", "steerable.hessian.targets=").jobs())
