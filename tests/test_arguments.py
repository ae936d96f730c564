"""Every argument of TRL is written out, or left for a reason; a new one, or one with another default, is noticed."""

import dataclasses
import json
from pathlib import Path

import pytest
from trl import GRPOConfig, RewardConfig, SFTConfig

from valuecot.settings import load, notes
from valuecot.training.arguments import (
    CARRIED,
    EVERYWHERE,
    LEFT,
    OURS,
    QUIET,
    RECORDS,
    accumulation,
    completions_per_update,
    defaults,
    grpo_config,
    on_one_card,
    reward_config,
    sft_config,
    side_by_side,
)

CLASSES = {"sft": SFTConfig, "grpo": GRPOConfig, "reward_model": RewardConfig}
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "bf16", "steps_per_generation"}
KNOWN = Path(__file__).parent / "trl_defaults.json"


@pytest.mark.parametrize("kind", CLASSES)
def test_nothing_of_trl_moved(kind):
    "TRL 1.16's names and defaults; on a change: read what it means, decide, and write the file anew."
    now = {name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value) for name, value in defaults(CLASSES[kind]).items()}
    before = json.loads(KNOWN.read_text())[kind]
    assert {k: v for k, v in now.items() if k not in before} == {}, "new arguments"
    assert {k: v for k, v in before.items() if k not in now} == {}, "arguments that are gone"
    assert {k: (before[k], now[k]) for k in before if before[k] != now[k]} == {}, "other defaults"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_argument_is_written_out_or_left_for_a_reason(kind):
    written = set(CARRIED[kind].values()) | EVERYWHERE.keys() | OURS[kind].keys() | QUIET.keys() | BATCH
    names = {f.name for f in dataclasses.fields(CLASSES[kind])}
    undecided = {n for n in names - written if not LEFT.fullmatch(n)}
    assert undecided == set(), "neither passed nor left"
    assert {n for n in EVERYWHERE.keys() | OURS[kind].keys() | set(CARRIED[kind].values()) if n not in names} == set(), "no such argument"


def made(settings, tmp_path):
    return {"sft": sft_config(settings["geometry.sft"], 0, tmp_path), "grpo": grpo_config(settings["geometry.grpo"], {}, 0, tmp_path), "reward_model": reward_config(settings["geometry.reward_model"], 0, tmp_path)}


@pytest.mark.parametrize("profile", ["paper", "tiny"])
def test_what_settings_say_reaches_trl_and_comes_back(profile, tmp_path):
    settings = load(profile, "geometry.sft.precision=float32 geometry.grpo.precision=float32")
    for kind, config in made(settings, tmp_path).items():
        for key, argument in CARRIED[kind].items():
            assert getattr(config, argument) == getattr(settings[f"geometry.{kind}"], key), f"{kind}.{key}"
        for argument, (value, _) in (EVERYWHERE | OURS[kind]).items():
            got = getattr(config, argument)
            assert got == value or argument in ("pad_to_multiple_of", "gradient_checkpointing"), f"{kind}: {argument} became {got}"


def test_the_printed_values_of_the_geometry_paper(tmp_path):
    config = made(load("paper", "geometry.sft.precision=float32 geometry.grpo.precision=float32"), tmp_path)
    sft, grpo = config["sft"], config["grpo"]
    assert (sft.num_train_epochs, sft.learning_rate, sft.lr_scheduler_type, sft.warmup_steps) == (3, 2e-5, "cosine", 0.1)
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 32
    assert (grpo.num_train_epochs, grpo.learning_rate, grpo.lr_scheduler_type, grpo.warmup_steps, grpo.beta, grpo.num_generations) == (2, 1e-6, "cosine", 0.1, 0.1, 4)
    assert grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps == 8 and grpo.loss_type == "grpo" and not grpo.use_bias_correction_kl


def test_the_batch_can_be_read_both_ways(tmp_path):
    by = {unit: load("paper", f"geometry.grpo.precision=float32 geometry.grpo.batch_unit={unit}")["geometry.grpo"] for unit in ("completions", "prompts")}
    assert {unit: completions_per_update(s) for unit, s in by.items()} == {"completions": 8, "prompts": 32}
    config = grpo_config(by["prompts"], {}, 0, tmp_path)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32 and config.generation_batch_size == 32
    four = grpo_config(dataclasses.replace(by["prompts"], updates_per_rollout=4, checkpoint_every=4), {}, 0, tmp_path)
    assert four.generation_batch_size == 128 and four.gradient_accumulation_steps == config.gradient_accumulation_steps


def test_a_cosine_with_a_floor(tmp_path):
    settings = dataclasses.replace(load("tiny")["geometry.sft"], min_learning_rate=2e-6)
    config = sft_config(settings, 0, tmp_path)
    assert config.lr_scheduler_type == "cosine_with_min_lr" and config.lr_scheduler_kwargs == {"min_lr": 2e-6}
    with pytest.raises(ValueError, match="go(es)? with schedule = cosine"):
        sft_config(dataclasses.replace(settings, schedule="linear"), 0, tmp_path)


def test_batches_that_do_not_divide_are_refused():
    assert accumulation(32, 4, "sft", 8) == (4, 1)
    for batch, micro, processes in ((32, 3, 1), (32, 4, 3), (8, 0, 1)):
        with pytest.raises(ValueError, match="choose one that divides it"):
            accumulation(batch, micro, "sft", processes)


def test_every_setting_of_training_has_its_source_on_the_page():
    rows = side_by_side(load("paper", "geometry.sft.precision=float32 geometry.grpo.precision=float32"))
    said = notes()
    for kind in ("sft", "grpo"):
        for key in dataclasses.asdict(load("paper")[f"geometry.{kind}"]):
            if key not in ("min_learning_rate", "cycle", "masking"):  # the second paper's
                assert said.get(f"geometry.{kind}.{key}"), f"settings.ini says nothing of geometry.{kind}.{key}"
    assert {"setting", "printed or ours", "here", "source of what is printed", "argument", "passed here", "TRL's default"} == rows[0].keys()
    assert next(r for r in rows if r["setting"] == "geometry.grpo.kl_coef")["source of what is printed"].startswith("G appendix C")
    silent = {row["setting"] for row in rows if row["source of what is printed"] == RECORDS}
    assert silent <= {f"geometry.{name}" for name in ("sft.min_learning_rate", "grpo.min_learning_rate")}, "every other one has its source in settings.ini"


def test_a_process_that_trains_alone_uses_one_card(tmp_path):
    config = sft_config(load("tiny")["geometry.sft"], 0, tmp_path)
    config._n_gpu = 2
    assert on_one_card(config).n_gpu == 1


def test_a_checkpoint_stands_between_rollouts():
    settings = load("tiny")["geometry.grpo"]
    for change in ({"iterations": 2}, {"updates_per_rollout": 2}):
        with pytest.raises(ValueError, match="inside a rollout"):
            dataclasses.replace(settings, checkpoint_every=5, **change)


# ---- the second paper
def test_the_printed_values_of_the_steerable_paper(tmp_path):
    settings = load("paper", "steerable.sft.precision=float32 steerable.grpo.precision=float32 steerable.grpo.rollouts=transformers")
    sft, grpo = sft_config(settings["steerable.sft"].of("value_kaleidoscope"), 0, tmp_path), grpo_config(settings["steerable.grpo"].of(settings["steerable.sampling"]), {}, 0, tmp_path)
    assert (sft.num_train_epochs, sft.learning_rate, sft.lr_scheduler_type, sft.lr_scheduler_kwargs, sft.max_grad_norm, sft.max_length) == (1, 2e-5, "cosine_with_min_lr", {"min_lr": 2e-6}, 5.0, 384)
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 256 and settings["steerable.sft"].of("opinionqa").max_length == 512
    assert (grpo.num_generations, grpo.beta, grpo.epsilon, grpo.max_grad_norm, grpo.learning_rate, grpo.lr_scheduler_kwargs) == (16, 0.001, 0.2, 3.0, 1.5e-6, {"min_lr": 1.5e-7})
    assert (grpo.temperature, grpo.top_p, grpo.top_k, grpo.max_completion_length) == (0.7, 0.95, 0, 448)
    assert grpo.generation_batch_size == 256 * 16 and grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps == 64 * 16, "four updates of 64 prompts a rollout"


def test_a_preset_lies_between_the_file_and_the_profile():
    ours, printed, theirs = (load("paper", f"steerable.preset={name}")["steerable.sft"] for name in ("ours", "printed", "authors_code"))
    assert ours == printed and (theirs.batch_size, theirs.masking, theirs.cycle, theirs.max_length_opinionqa) == (128, "left-padded", 2.0, 256)
    assert load("paper", "steerable.preset=authors_code steerable.sft.batch_size=64")["steerable.sft"].batch_size == 64
    with pytest.raises(ValueError, match="did you mean 'printed'"):
        load("paper", "steerable.preset=print")


def test_what_is_printed_stands_beside_what_was_passed_here():
    rows = {row["setting"]: row for row in side_by_side(load("tiny", "geometry.grpo.kl_coef=0.05 machine.processes=2"))}
    kl, micro = rows["geometry.grpo.kl_coef"], rows["geometry.sft.micro_batch"]
    assert (kl["printed or ours"], kl["here"], kl["passed here"]) == (0.1, 0.05, 0.05)
    assert (micro["here"], micro["passed here"]) == (8, 4), "two processes share a batch"
