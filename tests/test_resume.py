"""A training that was killed, whose disk was full or whose checkpoint was damaged ends with the weights of one that ran through."""

import json
import random
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from valuecot.settings import GRPO, SFT, ModelShape, RewardModel
from valuecot.training import checkpoints
from valuecot.training.checkpoints import SEAL, latest, seal
from valuecot.training.grpo import kept_completions, train_grpo
from valuecot.training.models import conversation, fix, load_model, save_model, scratch_model, train_tokenizer
from valuecot.training.reward import preference_pairs, reward_shape, train_reward
from valuecot.training.sft import train_sft
from valuecot.types import Prompt, Trace

HERE = Path(__file__).parent
SHAPE = ModelShape("scratch", "qwen3_5", 32, 2, 2, 1, 48, 320)
PROMPTS = [Prompt(f"p{i}", f"Should I keep the {thing} that I found?", "home", "care", "honesty", "") for i, thing in enumerate(["ring", "book", "coat", "lamp", "key", "bag", "cup", "hat"])]
TRACES = [Trace(p.id, "standard", "rules", "care", "honesty", ("The user wants to keep it.",), "The user wants to keep it.", f"Ask who lost the {p.text.split()[4]} first.") for p in PROMPTS]
KINDS = "sft", "reward", "grpo"
STEPS = {"sft": 12, "reward": 12, "grpo": 8}
EVERY = 2


def letters(prompts, completions, **columns) -> list[float]:
    return [float(c[-1]["content"].count("e")) for c in completions]


def start(folder: Path) -> Path:
    "A model on disk that all runs begin with."
    fix(0)
    tokenizer = train_tokenizer([p.text + t.response for p, t in zip(PROMPTS, TRACES, strict=True)] * 3, 320, empty_think=True)
    return save_model(scratch_model(SHAPE, tokenizer), tokenizer, folder)


def train(kind: str, begin: Path, place: Path, key: str = "ours", seed: int = 0) -> list[dict]:
    "One training from `begin`, its checkpoints in `place` and its weights beside them."
    device = str(fix(seed))
    model, tokenizer = load_model(begin, device)
    if kind == "sft":
        rows = [conversation(p, t, True) for p, t in zip(PROMPTS, TRACES, strict=True)]
        log = train_sft(model, tokenizer, rows, SFT(3, 2, 1e-2, "cosine", 0.1, 0.0, 1.0, 256, 2, checkpoint_every=EVERY), seed, place, device, key)
    elif kind == "reward":
        fix(seed)
        model = reward_shape(SHAPE, tokenizer)
        log = train_reward(model, tokenizer, preference_pairs(PROMPTS, TRACES, 24, 0), RewardModel("scratch", "response", 24, 2, 4, 1e-2, checkpoint_every=EVERY), seed, place, device, key)
    else:  # two updates a rollout: checkpoints stand between rollouts
        settings = GRPO(2, 8, 4, 0.1, 1e-2, "cosine", 0.1, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 6, 0.0, 1.0, 4, updates_per_rollout=2, checkpoint_every=EVERY)
        log = train_grpo(model, tokenizer, [{"prompt": p.text} for p in PROMPTS], letters, settings, True, seed, place, device, key)
    save_model(model, tokenizer, place.parent / f"{place.name}-weights")
    return log


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place.parent / f"{place.name}-weights" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


COMMAND = """
import os, signal, sys, threading, time
sys.path.insert(0, "tests")
from test_resume import train
from transformers import TrainerCallback
import valuecot.training.checkpoints as checkpoints
kind, begin, place, kill_at, delay = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
def die():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
class Killer(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            threading.Thread(target=die).start()
original = checkpoints.fit
def fit(trainer):
    trainer.add_callback(Killer())
    return original(trainer)
import valuecot.training.sft, valuecot.training.grpo, valuecot.training.reward
for module in (valuecot.training.sft, valuecot.training.grpo, valuecot.training.reward):
    module.fit = fit
from pathlib import Path
train(kind, Path(begin), Path(place))
"""


def killed(kind: str, begin: Path, place: Path, kill_at: int, delay: float) -> int:  # exit status
    "A training that is killed `delay` seconds after update `kill_at` begins."
    return subprocess.run([sys.executable, "-c", COMMAND, kind, str(begin), str(place), str(kill_at), str(delay)], cwd=HERE.parent, capture_output=True).returncode


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    return start(tmp_path_factory.mktemp("begin"))


@pytest.fixture(scope="module")
def through(begin, tmp_path_factory):
    "Weights and history of trainings that ran through."
    found, folder = {}, tmp_path_factory.mktemp("through")
    for kind in KINDS:
        log = train(kind, begin, folder / kind)
        assert max(row["step"] for row in log) == STEPS[kind]
        found[kind] = weights(folder / kind), log
    return found


def check_kill(kind: str, begin: Path, through, place: Path, kill_at: int, delay: float, capsys) -> None:
    assert killed(kind, begin, place, kill_at, delay) == -signal.SIGKILL
    found = latest(place, "ours")
    assert found or kill_at <= EVERY, "an update behind the first checkpoint has one to go on from"
    capsys.readouterr()
    log = train(kind, begin, place)
    assert (f"going on from {found.name}" if found else "") in capsys.readouterr().err
    expected, whole = through[kind]
    assert same(weights(place), expected), f"{kind}, killed {delay:.3f} s into update {kill_at}"
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (log, whole)]
    assert losses[0] == losses[1], "the history is whole, too"


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_with_the_same_bits(kind, begin, through, tmp_path, capsys):
    check_kill(kind, begin, through, tmp_path / kind, kill_at=5, delay=0.0, capsys=capsys)
    assert (tmp_path / kind / f"checkpoint-{STEPS[kind]}" / SEAL).exists()


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_at_any_moment(kind, seed, begin, through, tmp_path, capsys):
    rng = random.Random(f"{kind} {seed}")
    check_kill(kind, begin, through, tmp_path / kind, rng.randrange(1, STEPS[kind]), rng.uniform(0, 0.15), capsys)


def test_another_seed_is_another_run(begin, through, tmp_path):
    train("sft", begin, tmp_path / "again")
    train("sft", begin, tmp_path / "other", seed=1)
    assert same(weights(tmp_path / "again"), through["sft"][0]) and not same(weights(tmp_path / "other"), through["sft"][0])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(begin, through, tmp_path, capsys):
    assert killed("sft", begin, tmp_path / "run", 7, 0.0) == -signal.SIGKILL
    newest = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    train("sft", begin, tmp_path / "run")
    said = capsys.readouterr().err
    assert "checkpoint-6 is not used: a file in it is damaged" in said and "going on from checkpoint-4" in said
    assert same(weights(tmp_path / "run"), through["sft"][0])


def test_half_written_and_foreign_checkpoints_are_not_used(tmp_path, capsys):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    seal(tmp_path / "checkpoint-2", "another's")
    (tmp_path / "checkpoint-4" / SEAL).write_text("{")
    assert latest(tmp_path, "ours") is None
    said = capsys.readouterr().err
    assert said.count("half written") == 2 and "another run: other code, settings, arm, model or seed" in said


def test_a_full_disk_costs_no_run(begin, through, tmp_path, monkeypatch):
    "The third checkpoint meets a disk that takes the weights and nothing more."
    from transformers import Trainer

    written = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if Path(folder).name == "checkpoint-6":
            Path(folder, "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train("sft", begin, tmp_path / "run")
    assert any("checkpoint-6 could not be written" in str(w.message) and "No space left" in str(w.message) for w in said)
    assert not (tmp_path / "run" / "checkpoint-6").exists() and same(weights(tmp_path / "run"), through["sft"][0])


def test_kept_completions_survive_a_kill(tmp_path):
    file = tmp_path / "completions.jsonl"
    rows = [{"step": s, "sample": i, "prompt": "p", "completion": f"{s} {i}", "reward": 0.0} for s in (0, 2) for i in range(2)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    file.write_text(text + json.dumps(rows[2])[:20])
    assert kept_completions(file) == rows
    file.write_text(text + "".join(json.dumps(r) + "\n" for r in rows[2:]))  # update 2 was done again
    assert kept_completions(file) == rows and kept_completions(tmp_path / "none") == []


def nothing(prompts, completions, **columns) -> list[None]:
    return [None] * len(completions)


def test_a_rollout_that_cannot_be_scored_does_not_end_the_run(begin, tmp_path):
    model, tokenizer = load_model(begin, str(fix(0)))
    settings = GRPO(1, 8, 4, 0.1, 1e-2, "cosine", 0.1, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 6, 0.0, 1.0, 4)
    prompts = [{"prompt": p.text} for p in PROMPTS]
    history = checkpoints.history_rows(train_grpo(model, tokenizer, prompts, nothing, settings, True, 0, tmp_path))
    assert {row["value"] for row in history if row["metric"] == "not_scored"} == {1.0} and not any(row["metric"] == "reward" for row in history)
    with pytest.raises(RuntimeError, match="in 2 rollouts in a row no completion could be scored"):
        train_grpo(model, tokenizer, prompts, nothing, replace(settings, patience=2), True, 0, tmp_path)
