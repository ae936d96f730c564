"""Every arm of the registry trains on the test profile; on tiny, the papers' three are told with their errors over seeds."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from valuecot.flow.plan import Job, Plan, find_job
from valuecot.flow.run import begin
from valuecot.settings import load
from valuecot.stages import grpo, sft
from valuecot.store import read_json
from valuecot.types import Run, Trace

ROOT = Path(__file__).parents[1]
ARMS = {name.split(".", 1)[1]: arm for name, arm in load("test").sections.items() if name.startswith("arm.") and arm.study == "geometry"}
TRAINED: dict[str, Path] = {}  # arm under whose name SFT ran -> its run


@pytest.fixture(scope="module")
def place(outputs, tmp_path_factory):
    return tmp_path_factory.mktemp("arms")


def as_arm(run: Run, plan: Plan, job: Job, policy: tuple[str, Path], out: Path) -> Run:
    "The run of another arm, from a policy that no study has made yet."
    inputs = {name: folder for name, folder in run.inputs.items() if name.split("/")[0] not in ("sft", "base_model", "grpo")}
    return replace(run, arm=job.arm, out=out, settings=plan.reads(job), inputs=inputs | dict([policy]))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains(name, outputs, place, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    arm, plan = ARMS[name], Plan("test", "geometry")
    policy = "base_model/llama/all/all", outputs / "test/geometry/base_model/llama/all/all"
    if arm.sft:
        own = plan.shared(sft.stage, name)
        if own not in TRAINED:
            run = begin(sft.stage, "test", model="llama", arm=own, seed=0, out=str(place / "sft" / own))
            checkpoint, counts = sft.run_sft(run), read_json(run.out / "record.json")["counts"]
            assert checkpoint.steps == -(-counts["rows"] // 8) and counts["rows"] + counts["prompts without a trace"] == round(16 * arm.fraction)
            TRAINED[own] = run.out
        policy = f"sft/llama/{own}/seed0", TRAINED[own]
    if arm.grpo:
        run = as_arm(begin(grpo.stage, "test", model="llama", arm="standard", seed=0), plan, find_job(plan, "grpo", "llama", name, 0), policy, place / "grpo" / name)
        run.out.mkdir(parents=True)
        checkpoint, counts = grpo.run_grpo(run), read_json(run.out / "record.json")["counts"]
        prompts = sum({"sft": 16, "grpo": 8}[split] for split in arm.grpo.split("+")) * arm.fraction
        assert counts["prompts"] == prompts and checkpoint.steps == prompts * 4 // 16 and counts["start"] == policy[0]
        assert (run.out / "completions.jsonl").read_text().count("\n") > 0
        metrics = {row.split('"metric": "')[1].split('"')[0] for row in (run.out / "history.jsonl").read_text().splitlines()}
        assert {"reward", "kl", "entropy", "completion_length", "truncated", "gradient_norm", "not_scored"} <= metrics and ("format_rate" in metrics) == arm.thinking
    if not arm.sft and not arm.grpo:
        assert plan.inputs(find_job(plan, "samples", "llama", name, 0))[-1].stage == "base_model", "an untouched model is sampled as it is"


@pytest.mark.parametrize("name", ["rlvr-blind", "rlvr-format", "rlvr-strict", "human-cot-weighted", "human-cot-half", "sft-10", "sft-left-padded", "sft-half-cosine"])
def test_steerable_arms_that_no_other_test_trains(name, outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    overrides = f"arm.{name}.start="
    arm = load("test", overrides)[f"arm.{name}"]
    monkeypatch.setattr("valuecot.flow.run.check_complete", lambda *named: None)  # the overrides make what is there look stale
    run = begin((sft if arm.sft else grpo).stage, "test", model="llama", arm=name, seed=0, out=str(tmp_path), overrides=overrides, study="steerable", dataset="value_kaleidoscope")
    checkpoint = (sft.run_sft if arm.sft else grpo.run_grpo)(run)
    counts = read_json(run.out / "record.json")["counts"]
    if arm.sft:
        assert counts["rows"] == round(64 * arm.fraction) and checkpoint.steps == -(-counts["rows"] // 16)
    else:
        assert counts["prompts"] == 64 and checkpoint.steps == 4
        values = [json.loads(line) for line in (run.out / "history.jsonl").read_text().splitlines()]
        assert {"reward", "kl"} <= {row["metric"] for row in values} and not any(row["metric"] == "format_rate" for row in values)


def rates(run_out) -> list[float]:
    return [row["value"] for row in map(json.loads, (run_out / "history.jsonl").read_text().splitlines()) if row["metric"] == "learning_rate"]


def test_changes_of_an_arm_reach_its_training_and_no_other(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    monkeypatch.setattr("valuecot.flow.run.check_complete", lambda *named: None)
    found = {}
    for name in ("sft", "sft-half-cosine", "sft-compute"):
        overrides = "arm.sft-compute.changes=sft.epochs=2"
        run = begin(sft.stage, "test", model="llama", arm=name, seed=0, out=str(tmp_path / name), overrides=overrides, study="steerable", dataset="value_kaleidoscope")
        sft.run_sft(run)
        found[name] = rates(run.out)
    assert len(found["sft-compute"]) == 2 * len(found["sft"]), "twice the epochs"
    assert found["sft-half-cosine"][-1] > 2 * found["sft"][-1], "broken off half-way, a cosine ends high"


@pytest.mark.parametrize("change, complaint", [
    ("sft.masking=left", "masking"), ("sft.mask=completion", "mask"), ("epochs=3", "changes no setting of training"), ("sampling.samples=3", "changes no setting of training"),
    ("sft.epochs=0", "at least 1"), ("grpo.minibatch_size=100", "no multiple"),
])  # fmt: skip
def test_a_change_that_cannot_be_made_is_refused_before_anything_runs(change, complaint):
    arm = "rlvr" if change.startswith("grpo") else "sft-compute"
    with pytest.raises((KeyError, ValueError), match=complaint):
        load("test", f"arm.{arm}.changes={change}")


def test_half_a_reasoning_is_half_its_words():
    trace = Trace("0", "human", "rows", "", "", (), "", "One two three\nfour  five six.\n\nAnswer: B")
    assert [sft.shortened(trace, part).response for part in (1.0, 0.5, 0.0)] == [trace.response, "One two three\n\nAnswer: B", "Answer: B"]
    bare = Trace("0", "human", "rows", "", "", (), "", "Answer: B")
    assert sft.shortened(bare, 0.5) == bare


@pytest.mark.prove
def test_three_seeds_on_tiny(tmp_path):
    "Held-out loss, reward, form and KL with intervals, whichever way they fall."
    target = os.path.relpath(tmp_path / "tiny/geometry/arms/all/all/all/run.json", ROOT)
    command = [sys.executable, "-m", "valuecot.flow.study", "run", "--profile", "tiny", "--study", "geometry", "--jobs", "2", "--set", "geometry.design.seeds=0,1,2", "--target", target]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "VALUECOT_OUTPUTS": str(tmp_path)}, check=True, capture_output=True)
    page = tmp_path / "tiny/geometry/arms/all/all/all"
    seeds, runs, arms = (list(csv.DictReader(open(page / f"{name}.csv"))) for name in ("over_seeds", "outcomes", "registry"))
    print((page / "over_seeds.csv").read_text())
    assert len(runs) == 18 and len(seeds) == 6 and all(row["seeds"] == "3" for row in seeds)
    for row in seeds:
        assert float(row["loss SE over seeds"]) > 0 and float(row["reward SE over seeds"]) > 0 and float(row["KL SE over seeds"]) > 0
        assert (row["well_formed"] == "") == (row["arm"] == "base")
    assert {row["arm"] for row in arms if row["runs"] == "not run"} == ARMS.keys() - {"base", "standard", "annealing"}
