"""The same training in one process and in two: torchrun, gloo, CPU."""

from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file
from test_resume import PROMPTS, SHAPE, TRACES, start

from valuecot.settings import GRPO, SFT, Machine
from valuecot.store import read_json
from valuecot.training.checkpoints import stored_parameters
from valuecot.training.launch import Work, train
from valuecot.training.models import conversation, fix, load_model, parameter_count, save_model
from valuecot.training.reward import reward_shape

TWO = Machine(processes=2)


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    return start(tmp_path_factory.mktemp("begin"))


@pytest.fixture(scope="module")
def judge(begin, tmp_path_factory):
    fix(1)
    _, tokenizer = load_model(begin)
    return save_model(reward_shape(SHAPE, tokenizer), tokenizer, tmp_path_factory.mktemp("judge"))


def sft(begin, folder, **more) -> Work:
    rows = [conversation(p, t, True) for p, t in zip(PROMPTS, TRACES, strict=True)]
    settings = SFT(2, 4, 1e-2, "cosine", 0.1, 0.0, 1.0, 256, 2)
    return Work("sft", begin, folder / "model", folder / ".trainer", rows, asdict(settings), True, 0, "", **more)


def both_ran(folder) -> None:
    told = [read_json(folder / ".trainer" / f"process-{rank}.json") for rank in (0, 1)]
    assert [(t["rank"], t["world"]) for t in told] == [(0, 2), (1, 2)] and told[0]["pid"] != told[1]["pid"]


def test_two_processes_train_as_one(begin, tmp_path):
    one, two = train(sft(begin, tmp_path / "one")), train(sft(begin, tmp_path / "two", machine=TWO))
    both_ran(tmp_path / "two")
    losses = [[round(row["loss"], 5) for row in log if "loss" in row] for log in (one, two)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-5), "an update sees the same rows"
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4
    names = [sorted(p.name for p in (tmp_path / name / "model").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1], "no pickle beside the weights"
    assert read_json(tmp_path / "two" / "model" / "config.json")["use_cache"]
    assert stored_parameters(tmp_path / "two" / "model") == parameter_count(load_model(tmp_path / "two" / "model")[0])


def test_reinforcement_with_judge_reference_and_save(begin, judge, tmp_path):
    settings = GRPO(1, 8, 4, 0.1, 1e-2, "cosine", 0.1, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 6, 0.0, 1.0, 4)
    work = Work("grpo", begin, tmp_path / "model", tmp_path / ".trainer", [{"prompt": p.text} for p in PROMPTS], asdict(settings), True, 0, "", judge=judge, scope="full", machine=TWO)
    log = train(work)
    both_ran(tmp_path)
    assert [row["step"] for row in log if "reward" in row] == [1, 2, 3, 4] and all("kl" in row and "reward_response" in row for row in log if "reward" in row)
    start, end = (load_file(folder / "model.safetensors") for folder in (begin, tmp_path / "model"))
    moved = max(float((start[name] - end[name]).abs().max()) for name in start)
    assert start.keys() == end.keys() and 0 < moved < 1


@pytest.mark.prove
def test_an_error_in_a_group_is_one_line(begin, tmp_path):
    work = replace(sft(begin, tmp_path, machine=TWO), rows=[])
    with pytest.raises(RuntimeError, match="ValueError: no rows to fine-tune on"):
        train(work)


def test_what_cannot_be_shared_is_refused_before_anything_starts(begin, tmp_path):
    with pytest.raises(ValueError, match="no multiple of 3 processes"):
        train(sft(begin, tmp_path, machine=Machine(processes=3)))
    with pytest.raises(ValueError, match="fsdp2 needs GPUs"):
        train(sft(begin, tmp_path, machine=Machine(sharding="fsdp2")))
