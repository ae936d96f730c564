"""What `make plan` foretells of training, against trainings that ran: memory, parameters, updates, disk."""

from dataclasses import replace

import pytest
from datasets import Dataset
from transformers import Trainer
from trl.trainer import utils as trl_utils

from valuecot.curvature.planner import Live
from valuecot.settings import Machine, load
from valuecot.training import costs
from valuecot.training import training_costs as foretell
from valuecot.training.arguments import grpo_config, sft_config
from valuecot.training.checkpoints import fit, saving
from valuecot.training.grpo import Trainer as GRPOTrainer
from valuecot.training.grpo import Watched, judge_reward, train_grpo
from valuecot.training.judge import ScalarReward
from valuecot.training.models import (
    conversation,
    fix,
    load_model,
    parameter_count,
    save_model,
    scratch_model,
    template_options,
    train_tokenizer,
)
from valuecot.training.reward import reward_shape
from valuecot.training.sampling import complete
from valuecot.training.sft import Trainer as SFTTrainer
from valuecot.training.sft import train_sft
from valuecot.types import Prompt, Trace

WORDS = "Should I keep the ring that I found? Ask who lost it first. The user wants to keep it. Honesty comes first here."
PROMPT = Prompt("p", "Should I keep the ring that I found? " * 3, "home", "care", "honesty", "open", "heldout", 0)
TRACE = Trace("p", "standard", "rules", "care", "honesty", ("The user wants to keep it.",), "The user wants to keep it. " * 8, "Ask who lost it first. " * 4)
SHORT = replace(TRACE, response="Ask.")
TINY = load("tiny")


def LONG(*changes: dict) -> list:
    "Cases for `make prove`."
    return [pytest.param(change, marks=pytest.mark.prove) for change in changes]


@pytest.fixture(scope="module", params=["llama", "qwen"])
def family(request, tmp_path_factory):
    "Weights of the tiny profile's shape, untrained."
    fix(0)
    record = TINY[f"model.{request.param}"]
    tokenizer = train_tokenizer([WORDS] * 3, record.vocab, empty_think=request.param == "qwen")
    folder = tmp_path_factory.mktemp(request.param)
    save_model(scratch_model(record, tokenizer), tokenizer, folder / "policy")
    save_model(reward_shape(TINY["model.llama"], tokenizer), tokenizer, folder / "judge")
    return folder


@pytest.fixture(autouse=True)
def forgotten():
    "A foretold pass is remembered, also across changes of TRL's tile."
    foretell.training_pass.cache_clear()


def narrow(monkeypatch) -> None:
    "TRL's tile of 32,768 words outweighs all else in a small model; a narrow one lets the layers be seen."
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 512)


def peak(trainer) -> int:
    "Bytes of tensors that were born in a training, at most."
    with Live() as live:
        trainer.train()
    return live.peak


@pytest.mark.parametrize("change", [None, *LONG({}, {"micro_batch": 4}, {"activation_checkpointing": True}, {"precision": "bfloat16"}), {"precision": "bfloat16", "activation_checkpointing": True}], ids=str)
def test_memory_of_fine_tuning(family, change, tmp_path, monkeypatch):
    "Within 5 %; with TRL's own tile, and with a narrow one."
    if change is not None:
        narrow(monkeypatch)
    model, tokenizer = load_model(family / "policy")
    settings = replace(TINY["geometry.sft"], epochs=2, **(change or {}))
    data = Dataset.from_list([conversation(PROMPT, TRACE, True)] * 7 + [conversation(PROMPT, SHORT, True)])  # padded, so a mask is needed
    trainer = SFTTrainer(model=model, args=sft_config(settings, 0, tmp_path), train_dataset=data, processing_class=tokenizer)
    length, shape = max(map(len, trainer.train_dataset["input_ids"])), foretell.shape(model.config)
    foretold = foretell.sft_memory(shape, settings, length, gpu=False)
    measured = shape.weights + peak(trainer)
    assert shape.parameters == parameter_count(model)
    assert foretold == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("change", [None, *LONG({}, {"micro_batch": 4, "kl_coef": 0.0}, {"precision": "bfloat16"})], ids=str)
def test_memory_of_reinforcement_learning(family, change, tmp_path, monkeypatch):
    "As above, with the reference and the judge."
    if change is not None:
        narrow(monkeypatch)
    fix(0)
    model, tokenizer = load_model(family / "policy")
    settings = replace(TINY["geometry.grpo"], batch_size=8, max_completion_length=32, **(change or {}))
    judge = ScalarReward(family / "judge")
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": PROMPT.text}]}] * 4)
    reward = Watched(judge_reward(judge, "response", True), True)
    trainer = GRPOTrainer(model=model, reward_funcs=[reward], args=grpo_config(settings, template_options(True), 0, tmp_path), train_dataset=data, processing_class=tokenizer)
    prompt = len(tokenizer.apply_chat_template(data[0]["prompt"], add_generation_prompt=True, return_dict=True, **template_options(True))["input_ids"])
    shape, scorer = foretell.shape(model.config), foretell.shape(judge.model.config, "judge")
    foretold = foretell.grpo_memory(shape, scorer, settings, prompt, gpu=False)
    measured = shape.weights * (2 if settings.kl_coef else 1) + scorer.weights + peak(trainer)
    assert scorer.parameters == parameter_count(judge.model)
    assert foretold == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_memory_of_generation_and_of_judging(name, tmp_path):
    "Of eight layers, for rows of one length and no end before the longest."
    fix(0)
    record = replace(TINY[f"model.{name}"], layers=8)
    tokenizer = train_tokenizer([WORDS] * 3, record.vocab)
    model = scratch_model(record, tokenizer).eval()
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    judge, prompt = ScalarReward(save_model(reward_shape(record, tokenizer), tokenizer, tmp_path)), len(tokenizer(WORDS)["input_ids"])
    with Live() as live:
        written = complete(model, tokenizer, [WORDS] * 24, 64, 1.0, 24, seed=0)
    assert {tokens for _, tokens, _ in written} == {64}
    assert foretell.generation_bytes(foretell.shape(model.config), 24, prompt, 64) == pytest.approx(live.peak, rel=0.1)
    with Live() as live:
        judge([WORDS * 8] * 24, [WORDS] * 24)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": WORDS * 8}, {"role": "assistant", "content": WORDS}], return_dict=True)["input_ids"]
    assert foretell.judging_bytes(foretell.shape(judge.model.config, "judge"), 24, len(chat)) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("rows, batch, micro, epochs", [(10, 4, 2, 2), (8, 4, 4, 1), (9, 8, 2, 3)])
def test_updates_of_fine_tuning(family, rows, batch, micro, epochs, tmp_path):
    model, tokenizer = load_model(family / "policy")
    settings = replace(TINY["geometry.sft"], epochs=epochs, batch_size=batch, micro_batch=micro)
    log = train_sft(model, tokenizer, [conversation(PROMPT, TRACE, True)] * rows, settings, 0, tmp_path)
    assert max(entry["step"] for entry in log) == foretell.sft_updates(rows, batch, epochs)


@pytest.mark.parametrize("change", [*LONG({"epochs": 2}, {"iterations": 2}), {"updates_per_rollout": 2, "checkpoint_every": 2}, {"batch_unit": "prompts", "batch_size": 2}], ids=str)
def test_updates_of_reinforcement_learning(family, change, tmp_path):
    "Five prompts, two to an update."
    model, tokenizer = load_model(family / "policy")
    settings = replace(TINY["geometry.grpo"], **{"batch_size": 8, "max_completion_length": 4, **change})

    def reward(prompts, completions, **columns) -> list[float]:
        return [float(i) for i in range(len(completions))]

    log = train_grpo(model, tokenizer, [{"prompt": PROMPT.text}] * 5, reward, settings, True, 0, tmp_path)
    assert max(entry["step"] for entry in log) == foretell.grpo_updates(5, settings)


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_disk_of_checkpoints(family, updates, tmp_path, monkeypatch):
    "Counted where there is most: before the oldest goes."
    model, tokenizer = load_model(family / "policy")
    settings, sizes = replace(TINY["geometry.sft"], epochs=updates, batch_size=2), []
    written = Trainer._save_optimizer_and_scheduler

    def counted(self, folder):
        written(self, folder)
        sizes.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".pt") and "rng" not in f.name))

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", counted)
    data = Dataset.from_list([conversation(PROMPT, TRACE, True)] * 2)
    trainer = SFTTrainer(model=model, args=sft_config(settings, 0, tmp_path, **saving(1, "a key")), train_dataset=data, processing_class=tokenizer)
    trainer.key = "a key"
    fit(trainer)
    shape = foretell.shape(model.config)
    assert max(sizes) == pytest.approx(3 * min(3, updates) * shape.weights, rel=0.05)
    assert foretell.disk(shape, updates, 1) == max(3 * min(3, updates), 3 * min(2, updates) + 1) * shape.weights


# ---- the whole
def given(profile: str, overrides: str = "", **machine) -> foretell.Given:
    settings = load(profile, overrides)
    found, _ = costs.training_given(settings, 50)
    return replace(found, machine=replace(found.machine, **machine))


@pytest.fixture
def quick(monkeypatch):
    "A machine that nobody measured."
    monkeypatch.setattr(costs, "machine_here", lambda settings: foretell.Device("a machine", False, 1e15, {"float32": 1e12, "bfloat16": 1e13}, 1e11))


def test_arms_that_share_fine_tuning_are_counted_once():
    settings = load("small")
    jobs = foretell.study_jobs(settings)
    tuned = {job.arm for job in jobs if (job.stage, job.model) == ("sft", "llama")}
    assert {"standard", "half", "answer", "response"} <= tuned and not {"standard-sft", "format", "base", "initial"} & tuned
    assert {job.arm for job in jobs if job.stage == "grpo"} == set(settings["geometry.design"].arms) - {"standard-sft", "annealing-sft", "initial"}
    assert sum(job.stage == "sft" for job in jobs) == len(tuned) * 2 * 3, "models and seeds"


def test_rows_are_all_jobs_and_differ_where_arms_do(quick):
    found = given("test", "geometry.design.arms=base,standard,annealing,half,format,standard-sft,initial geometry.design.seeds=0,1")
    rows = foretell.rows(found)
    assert sum(row.runs for row in rows) == len(foretell.study_jobs(found.settings))
    by = {(row.stage, arm): row for row in rows for arm in row.arms}
    assert by["sft", "standard"] is by["sft", "annealing"] and ("sft", "format") not in by and by["sft", "standard"].runs == 4
    assert by["sft", "half"].cost.updates < by["sft", "standard"].cost.updates
    assert by["grpo", "base"].cost.updates > by["grpo", "standard"].cost.updates > by["grpo", "half"].cost.updates
    assert by["grpo", "format"].cost.memory < by["grpo", "standard"].cost.memory and by["grpo", "format"].cost.seconds < by["grpo", "standard"].cost.seconds
    said = foretell.training_report(found)
    assert "does not fit" not in said and "base, standard and" in said and f"training: {sum(row.runs for row in rows)} runs" in said


def test_what_does_not_fit_is_said_with_a_way_out(quick):
    overrides = "geometry.sft.micro_batch=8 geometry.sft.max_length=4096"
    whole = foretell.sft_cost(given("test", overrides), "llama", "standard").memory
    least = foretell.sft_cost(given("test", overrides.replace("micro_batch=8", "micro_batch=1") + " geometry.sft.activation_checkpointing=yes"), "llama", "standard").memory
    lines = {free: foretell.too_large(foretell.rows(found := given("test", overrides, free=free)), found) for free in (whole - 1, least, least - 1)}
    about = {free: next(line for line in said if "sft of llama" in line) for free, said in lines.items()}
    assert "activation_checkpointing=yes'" in about[whole - 1] and "micro_batch=1 geometry.sft.activation_checkpointing=yes'" in about[least]
    assert "no setting of the study is enough" in about[least - 1] and "several cards" in about[least - 1]


def test_processes_share_weights_gradients_and_optimiser():
    model, settings = foretell.shape(costs.shape_of("llama", TINY["model.llama"])[0]), TINY["geometry.sft"]
    one, copies, parts = (foretell.sft_memory(model, replace(settings, micro_batch=2), 100, False, machine) for machine in (Machine(), Machine(2), Machine(2, "fsdp2")))
    assert one == copies and copies - parts >= 1.5 * model.weights, "ddp holds the whole model in each process"


def test_the_plan_counts_the_processes_of_policies_alone(quick):
    by = {n: {row.stage: row.cost for row in foretell.rows(given("test", f"machine.processes={n}"))} for n in (1, 2)}
    assert {stage: by[1][stage].seconds / by[2][stage].seconds for stage in by[1]} == pytest.approx({"base_model": 1, "reward_model": 1, "sft": 2, "grpo": 2, "samples": 1})


@pytest.mark.prove  # a minute and a half of tensors that hold nothing; the notebook plans models of the same kinds
def test_the_papers_models_are_planned_without_weights_or_network(quick, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the plan opened a connection")

    monkeypatch.setattr("socket.socket.connect", refused)
    found, notes = costs.training_given(load("paper"), 159)
    said = foretell.training_report(found, notes)
    assert "3,212.8 M parameters" in said and "not in the local cache" in said
    lines = [line.split() for line in said.splitlines()]
    assert next(line for line in lines if line[:3] == ["grpo", "qwen", "base"])[3:5] == ["1", "2,292"]
    assert next(line for line in lines if line[:2] == ["sft", "llama"])[4:6] == ["2", "108"]
