"""Tokens, trainers and rewards: what is trained is what is generated and measured; a planted effect is found, a null one is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerState

from valuecot.flow.plan import Plan
from valuecot.settings import GRPO, SFT, ModelShape, load
from valuecot.text import well_formed
from valuecot.training import costs
from valuecot.training.arguments import accumulation, grpo_config, sft_config
from valuecot.training.checkpoints import fit
from valuecot.training.grpo import StopWhenIdle, check_prompts, fitting, format_reward, grpo_trainer, judge_reward, train_grpo
from valuecot.training.judge import check_rewards, visible
from valuecot.training.models import (
    conversation,
    encode,
    fix,
    load_model,
    opens_thinking,
    render,
    save_model,
    scratch_model,
    targets,
    train_tokenizer,
)
from valuecot.training.reward import faults, preference_pairs
from valuecot.training.sampling import complete
from valuecot.training.sft import check_rows, left_padded_row, response_mask, sft_trainer, train_sft
from valuecot.types import Arm, Prompt, Trace

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = "Should I keep the ring that I found? Ask who lost it first. The user wants to keep it. Honesty comes first here."
PROMPT = Prompt("p", "Should I keep the ring that I found?", "home", "care", "honesty", "open", "heldout", 0)
TRACE = Trace("p", "standard", "rules", "care", "honesty", ("The user wants to keep it.",), "The user wants to keep it.", "Ask who lost it first.")


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def family(request, tmp_path_factory):
    fix(0)
    tokenizer = train_tokenizer([WORDS] * 3, 320, empty_think=request.param == "qwen3_5")
    model = scratch_model(ModelShape("scratch", request.param, 32, 2, 2, 1, 48, 320), tokenizer)
    return save_model(model, tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("thinking", [True, False])
def test_prompt_is_a_prefix_and_trl_trains_the_tokens_that_curvature_scores(family, thinking, tmp_path):
    from datasets import Dataset
    from trl import SFTTrainer

    model, tokenizer = load_model(family)
    ours = encode(tokenizer, PROMPT, TRACE, thinking)
    settings = SFT(1, 1, 1e-3, "cosine", 0.0, 0.0, 1.0, 256, 1)
    trainer = SFTTrainer(model=model, args=sft_config(settings, 0, tmp_path), train_dataset=Dataset.from_list([conversation(PROMPT, TRACE, thinking)]), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"][0][: len(ours["input_ids"])].tolist() == ours["input_ids"].tolist()
    assert batch["labels"][0][: len(ours["labels"])].tolist() == ours["labels"].tolist()
    text = tokenizer.decode(ours["input_ids"][ours["labels"] != -100])
    assert ("keep it.\n</think>" in text) == thinking and text.endswith("Ask who lost it first.<|end|>\n") and "<|user|>" not in text


def test_generation_starts_where_training_did(family):
    _, tokenizer = load_model(family)
    for thinking in (True, False):
        ours = encode(tokenizer, PROMPT, TRACE, thinking)
        start = tokenizer(render(tokenizer, PROMPT.text, thinking), add_special_tokens=False)["input_ids"]
        assert ours["input_ids"][: len(start)].tolist() == start and ours["labels"][len(start)] != -100
        assert start.count(tokenizer.bos_token_id) == 1


def test_think_tags_survive_decoding(family):
    _, tokenizer = load_model(family)
    ids = tokenizer("<think>\na\n</think>\n\nb", add_special_tokens=False)["input_ids"]
    assert well_formed(tokenizer.decode(ids, skip_special_tokens=True), opened=False)


def test_batched_generation_equals_one_by_one(family):
    model, tokenizer = load_model(family)
    texts = [render(tokenizer, t, True) for t in ("Should I?", "Should I keep the ring that I found? Ask who lost it first.", "The user")]
    together = complete(model, tokenizer, texts, 12, 0.0, 3, seed=0)
    assert together == [complete(model, tokenizer, [t], 12, 0.0, 1, seed=0)[0] for t in texts]


def test_same_seed_same_bits(family, tmp_path):
    settings = SFT(2, 2, 1e-2, "cosine", 0.1, 0.0, 1.0, 256, 2)
    weights = []
    for _ in range(2):
        fix(3)
        model, tokenizer = load_model(family)
        train_sft(model, tokenizer, [conversation(PROMPT, TRACE, True)] * 4, settings, 3, tmp_path)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_micro_batches_do_not_change_the_update(family, tmp_path):
    rows = [conversation(Prompt(f"p{i}", PROMPT.text * (i % 3 + 1), "h", "a", "b", ""), TRACE, True) for i in range(4)]
    weights = []
    for micro in (4, 2):
        fix(0)
        model, tokenizer = load_model(family)
        train_sft(model, tokenizer, rows, SFT(1, 4, 1e-3, "constant_with_warmup", 0.0, 0.0, 1.0, 256, micro), 0, tmp_path)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, atol=2e-5)


# ---- planted and null effects
def run_grpo(family, reward, tmp_path, seed=0):
    fix(seed)
    model, tokenizer = load_model(family)
    settings = GRPO(1, 32, 8, 0.01, 1e-2, "constant_with_warmup", 0.0, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 10, 0.0, 1.0, 32)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    log = train_grpo(model, tokenizer, [{"prompt": PROMPT.text}] * 80, reward, settings, True, seed, tmp_path)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return [e["reward"] for e in log if "reward" in e], float((after - before).norm())


def test_a_reward_within_reach_rises_and_a_constant_one_teaches_nothing(family, tmp_path):
    planted = lambda prompts, completions, **_: [float(c[-1]["content"].count("e")) for c in completions]
    constant = lambda prompts, completions, **_: [1.0] * len(completions)
    reward, moved = run_grpo(family, planted, tmp_path)
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 1, f"the planted reward did not rise: {reward}"
    flat, drifted = run_grpo(family, constant, tmp_path)
    assert set(flat) == {1.0} and drifted < 0.01 * moved, f"a constant reward moved the weights by {drifted} (planted: {moved})"


# ---- rewards
def test_a_reward_that_is_no_number_stops_the_run(family, tmp_path):
    with pytest.raises(ValueError, match="was nan for the prompt"):
        check_rewards([float("nan")], ["May I?"])
    bad = lambda prompts, completions, **_: [float("nan")] * len(completions)
    with pytest.raises(ValueError, match="reward was nan"):
        run_grpo(family, bad, tmp_path)


def test_the_judge_sees_what_the_user_sees():
    seen = []
    judge = lambda prompts, responses: seen.append(list(responses)) or [1.0] * len(responses)
    reward = judge_reward(judge, "response", opened=True)
    chat = lambda text: [{"role": "assistant", "content": text}]
    reward([[{"role": "user", "content": "q"}]] * 2, [chat("a</think>b"), chat("never closed")])
    assert seen == [["b", ""], ["a</think>b", "never closed"]]
    assert visible("plain", opened=False) == "plain"


def test_preference_pairs_share_the_faults():
    prompts = [Prompt(f"p{i}", f"May I keep ring {i}?", "h", "a", "b", "") for i in range(5)]
    traces = [Trace(p.id, "standard", "rules", "a", "b", ("x",), "x", f"Ask the owner of ring {i} first, please.") for i, p in enumerate(prompts)]
    rows = preference_pairs(prompts, traces, 40, 0)
    assert {f: sum(r["fault"] == f for r in rows) for f in faults} == dict.fromkeys(faults, 8)
    assert all(r["chosen"] != r["rejected"] for r in rows) and rows == preference_pairs(prompts, traces, 40, 0)
    with pytest.raises(ValueError, match="at least two prompts"):
        preference_pairs(prompts[:1], traces[:1], 4, 0)


# ---- bad input
def test_bad_rows_are_refused(family, tmp_path):
    model, tokenizer = load_model(family)
    with pytest.raises(ValueError, match="raise geometry.sft.max_length"):
        check_rows([conversation(PROMPT, TRACE, True)], tokenizer, 8)
    with pytest.raises(ValueError, match="no rows"):
        train_sft(model, tokenizer, [], load("tiny")["geometry.sft"], 0, tmp_path)
    with pytest.raises(ValueError, match="lower grpo.batch_size"):
        train_grpo(model, tokenizer, [{"prompt": "one"}], lambda **_: [], load("tiny")["geometry.grpo"], True, 0, tmp_path)
    with pytest.raises(ValueError, match="choose one that divides"):
        accumulation(8, 3, "geometry.grpo")
    arm = Arm("standard", "Standard", "standard", "grpo", True, "annealing", "completion")
    with pytest.raises(ValueError, match="0 have a annealing trace"):
        targets(tokenizer, [PROMPT], [TRACE], arm, 0)
    broken = Trace("p", "standard", "rules", "care", "honesty", ("a</think>",), "a</think>", "b")
    with pytest.raises(ValueError, match="marks its border"):
        encode(tokenizer, PROMPT, broken, True)


def test_grpo_writes_out_what_trl_would_default(tmp_path):
    config = grpo_config(load("paper")["geometry.grpo"], {}, 0, tmp_path)
    assert (config.loss_type, config.beta, config.use_bias_correction_kl, config.lr_scheduler_type, config.epsilon_high) == ("grpo", 0.1, False, "cosine", None)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8 and config.num_generations == 4


# ---- real templates
@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "meta-llama-Llama-3.2-3B-Instruct"])
def test_real_chat_templates_keep_the_prefix_and_the_date(name):
    tokenizers = SHARED / "tokenizers"
    if not tokenizers.exists():
        pytest.skip("no ../shared/data here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers / ("qwen2.5" if "Qwen" in name else "llama3"))
    tokenizer.chat_template = (SHARED / "chat_templates" / f"{name}.jinja").read_text()
    text = render(tokenizer, PROMPT.text, True)
    assert text.endswith("<think>\n") == ("Qwen" in name)
    example = encode(tokenizer, PROMPT, TRACE, True)
    scored = tokenizer.decode(example["input_ids"][example["labels"] != -100])
    assert "The user wants to keep it.\n</think>" in scored and "Ask who lost it first." in scored
    parts = {part: encode(tokenizer, PROMPT, TRACE, True, part)["labels"] != -100 for part in ("prompt", "reasoning", "response", "text")}
    assert (parts["prompt"].int() + parts["reasoning"].int() + parts["response"].int()).eq(1).all() and parts["text"].all()
    assert tokenizer.decode(example["input_ids"][parts["response"]]).strip().startswith("Ask who lost it first.")
    assert tokenizer.decode(example["input_ids"][parts["reasoning"]]).rstrip().endswith("</think>")
    bare = encode(tokenizer, PROMPT, TRACE, False, "reasoning")
    assert (bare["labels"] == -100).all(), "a text without reasoning"
    assert opens_thinking(tokenizer, True) == ("Qwen" in name)
    if "Llama" in name:
        assert "26 Jul 2024" in text and example["input_ids"].tolist().count(tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == 1


# ---- costs
def test_the_plan_knows_the_papers_shapes():
    settings = load("paper")
    for name, millions, tied in (("qwen", 752.4, True), ("llama", 1235.8, True)):
        config, source = costs.shape_of(name, settings[f"model.{name}"])
        with torch.device("meta"):
            ghost = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in ghost.parameters()) / 1e6 == pytest.approx(millions, abs=0.1) and config.tie_word_embeddings == tied
        assert source.startswith("shape of")


def test_the_plan_says_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(costs, "memory_here", lambda: ("a card", 2e6, 1e12))
    said = costs.report(load("tiny", "geometry.hessian.vectors=device"), 60)
    assert said.count("does not fit: a card has 2.0 MB free") == said.count("geometry.hessian.vectors=host moves") == 2
    monkeypatch.setattr(costs, "memory_here", lambda: ("a card", 1e12, 1e6))
    assert costs.report(load("tiny"), 60).count("does not fit: the vectors need") == 2
    monkeypatch.setattr(costs, "memory_here", lambda: ("a card", 1e12, 1e12))
    assert "does not fit" not in costs.report(load("tiny"), 60)


def test_a_wrong_plan_is_one_line(capsys, tmp_path):
    assert costs.main(["--profile", "tinny"]) == 2 and "did you mean 'tiny'" in capsys.readouterr().err
    assert costs.main(["--set", f"model.llama.source={tmp_path}"]) == 2 and "holds no model" in capsys.readouterr().err


# ---- rewards that cannot lie
def group_of(family, tmp_path, reward, **more):
    fix(0)
    model, tokenizer = load_model(family)
    settings = GRPO(1, 8, 4, 0.0, 1e-2, "constant_with_warmup", 0.0, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 6, 0.0, 1.0, 8, **more)
    return grpo_trainer(model, tokenizer, [{"prompt": PROMPT.text}] * 16, reward, settings, True, 0, tmp_path)


def test_what_cannot_be_scored_teaches_nothing_and_measures_nobody(family, tmp_path):
    "Advantages with a None in a group are those of the group without it."
    values = iter([1.0, 0.0, None, 1.0, None, None, None, None] * 8)
    trainer = group_of(family, tmp_path, lambda completions, **_: [next(values) for _ in completions])
    log = fit(trainer)
    assert log[0]["reward"] == pytest.approx(2 / 3) and log[0]["not_scored"] == pytest.approx(5 / 8)
    advantages = list(trainer._logs["advantages"])[-8:]
    scored = torch.tensor([1.0, 0.0, 1.0])
    expected = ((scored - scored.mean()) / (scored.std() + 1e-4)).tolist()
    assert [advantages[i] for i in (0, 1, 3)] == pytest.approx(expected, abs=1e-3)
    assert [advantages[i] for i in (2, 4, 5, 6, 7)] == [0.0] * 5


def test_training_that_teaches_nothing_stops_and_says_why(family, tmp_path):
    with pytest.raises(RuntimeError, match="stopped at update 3: in 3 rollouts in a row every completion was cut off: raise max_completion_length"):
        fit(group_of(family, tmp_path, lambda completions, **_: [float(len(c[-1]["content"])) for c in completions], patience=3))
    collapsed = TrainerState(global_step=7, log_history=[{"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 0.5}] * 2)
    with pytest.raises(RuntimeError, match="stopped at update 7: in 2 rollouts in a row every group had one and the same reward"):
        StopWhenIdle(2).on_log(None, collapsed, None)
    StopWhenIdle(3).on_log(None, collapsed, None)  # not yet
    fit(group_of(family, tmp_path, lambda completions, **_: [0.5] * len(completions)))  # patience 0: it goes on


def test_long_prompts_follow_the_rule(family):
    model, tokenizer = load_model(family)
    base = load("tiny")["geometry.grpo"]
    rows = [{"prompt": PROMPT.text}, {"prompt": PROMPT.text * 20}]
    assert fitting(model.config, tokenizer, rows, base, True) == rows
    with pytest.raises(ValueError, match="1 of 2 prompts are longer than 60 tokens"):
        fitting(model.config, tokenizer, rows, replace(base, max_prompt_length=60), True)
    assert fitting(model.config, tokenizer, rows, replace(base, max_prompt_length=60, long_prompts="drop"), True) == rows[:1]
    with pytest.raises(ValueError, match="do not fit the model's window of 4096"):
        fitting(model.config, tokenizer, rows, replace(base, max_prompt_length=4000), True)
    with pytest.raises(ValueError, match="1 of 2 prompts are empty"):
        check_prompts([*rows[:1], {"prompt": " "}], base)
    with pytest.raises(ValueError, match="empty completion"):
        check_rows([{"prompt": [], "completion": [{"role": "assistant", "content": " "}], "chat_template_kwargs": {}}], tokenizer, 100)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_weighed_response_counts_as_often(family, tmp_path, weight):
    "Against the loss written out by hand; with weight 1 it is TRL's own."
    model, tokenizer = load_model(family)
    rows = [conversation(Prompt(f"p{i}", PROMPT.text * (i + 1), "h", "a", "b", ""), TRACE, True) for i in range(3)]
    trainer = sft_trainer(model, tokenizer, rows, SFT(1, 3, 1e-3, "cosine", 0.0, 0.0, 1.0, 512, 3), 0, tmp_path, answer_weight=weight)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    found = float(trainer.compute_loss(model, dict(batch)))
    labels, response = batch["labels"][:, 1:], response_mask(batch["labels"], tokenizer)[:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert found == pytest.approx(float(((1 + (weight - 1) * response) * nll).sum() / (labels != -100).sum()), rel=1e-5)
    assert tokenizer.decode(batch["labels"][0][response_mask(batch["labels"], tokenizer)[0]]).strip() == "Ask who lost it first.<|end|>"


def test_form_alone_can_be_rewarded(family, tmp_path):
    trainer = group_of(family, tmp_path, format_reward(opened=True))
    log = fit(trainer)
    assert all(row["reward"] == pytest.approx(row["format_rate"]) for row in log if "reward" in row)


def test_arms_that_learn_the_same_share_a_run():
    plan = Plan("test", "geometry", "geometry.design.arms=standard-sft,standard,initial,half")
    jobs = {j.label for j in plan.jobs()}
    assert {"sft · llama · standard · seed 0", "sft · llama · half · seed 0", "samples · llama · standard-sft · seed 0", "samples · llama · initial · seed 0"} <= jobs
    assert not {j for j in jobs if j.startswith(("sft", "grpo")) and ("standard-sft" in j or "initial" in j)}
    by = {j.arm: plan.inputs(j) for j in plan.jobs() if j.stage == "samples"}
    starts = {arm: next(j.label for j in needs if j.stage in ("grpo", "sft", "base_model")) for arm, needs in by.items()}
    assert starts == {"standard-sft": "sft · llama · standard · seed 0", "standard": "grpo · llama · standard · seed 0", "initial": "base_model · llama", "half": "grpo · llama · half · seed 0"}


def test_the_authors_mask_hides_padding_and_little_of_the_prompt(family, tmp_path):
    model, tokenizer = load_model(family)
    row = conversation(PROMPT, TRACE, True)
    whole = encode(tokenizer, PROMPT, TRACE, True)
    size, prompt = len(whole["input_ids"]), int((whole["labels"] == -100).sum())
    for longest, hidden in ((size + prompt, 0), (size + prompt - 7, 7), (size, prompt)):
        found = left_padded_row(row, tokenizer, longest)
        assert found["input_ids"] == whole["input_ids"].tolist() and found["labels"].count(-100) == hidden
    settings = SFT(1, 2, 1e-3, "cosine", 0.0, 0.0, 1.0, size + prompt, 2, masking="left-padded")
    trainer = sft_trainer(model, tokenizer, [row] * 2, settings, 0, tmp_path)
    assert trainer.train_dataset[0]["labels"] == whole["input_ids"].tolist(), "all of the prompt is learnt"


def test_the_authors_cosine_is_broken_off(family, tmp_path):
    "Half of a cosine from 2e-5 to 2e-6 ends at 1.1e-5; one that fits the training ends near its floor."
    rates = {}
    for cycle in (1.0, 2.0):
        model, tokenizer = load_model(family)
        settings = SFT(10, 2, 2e-5, "cosine", 0.0, 0.0, 1.0, 256, 2, min_learning_rate=2e-6, cycle=cycle)
        log = fit(sft_trainer(model, tokenizer, [conversation(PROMPT, TRACE, True)] * 4, settings, 0, tmp_path))
        rates[cycle] = [row["learning_rate"] for row in log if "learning_rate" in row]
    assert rates[2.0][-1] == pytest.approx(1.1e-5, rel=0.1) and rates[1.0][-1] < 3e-6 and rates[1.0][0] == rates[2.0][0] == 2e-5


def test_vllm_is_asked_for_only_where_it_is(family, tmp_path):
    with pytest.raises(ValueError, match="vLLM is not installed here"):
        group_of(family, tmp_path, lambda completions, **_: [0.0] * len(completions), rollouts="vllm")
