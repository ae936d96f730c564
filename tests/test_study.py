"""The whole study on the test profile: pages, tables, warm against cold, kills."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from valuecot.curvature import MatrixOperator
from valuecot.flow.plan import Plan
from valuecot.flow.run import begin, clear
from valuecot.flow.study import show
from valuecot.geometry import landscape
from valuecot.geometry.landscape import surface

ROOT = Path(__file__).parents[1]
TABLES = ("table2.csv", "spectrum.csv", "samples.csv", "curves.csv", "landscape_checks.csv", "prompts.csv", "table3.csv", "table4.csv")


def study(folder: Path, *words: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "valuecot.flow.study", "run", "--profile", "test", "--study", "geometry", *words]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "VALUECOT_OUTPUTS": str(folder), **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "test/geometry/report" / name).read_bytes() for name in TABLES}


def test_the_command_ends_with_the_companion(outputs):
    assert (outputs / "study.txt").read_text().strip().splitlines()[-1].startswith("companion: ")
    index = (outputs / "test/companion/index.html").read_text()
    assert "machinery" in index and "llama" in index


def test_tables_carry_units_and_evidence(outputs):
    rows = list(csv.DictReader(open(outputs / "test/geometry/report/table2.csv")))
    assert [r["arm"] for r in rows] == ["base", "standard", "annealing"]
    assert float(rows[0]["paper lambda_max (nats)"]) == 3012.05 and float(rows[0]["paper SE over 3 subsets (nats)"]) == 64.08
    for r in rows:
        assert float(r["worst residual"]) <= 1e-2 and float(r["lambda_1 (nats)"]) >= float(r["lambda_2 (nats)"]) and r["subsets"] == "3"
        assert r["lambda_1 SE over seeds (nats)"] == "", "one seed has no error over seeds"


def test_landscapes_agree_with_the_spectrum(outputs):
    for r in csv.DictReader(open(outputs / "test/geometry/report/landscape_checks.csv")):
        assert float(r["relative_difference"]) < 0.02 and float(r["center_difference"]) < 1e-5


def test_every_figure_has_its_picture(outputs):
    report = outputs / "test/geometry/report"
    for name in ("figure3", "figure4", "figure4_second_subset", "curves_sft", "curves_grpo"):
        assert (report / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pages_ask_no_other_host(outputs):
    for page in (outputs / "test/companion").rglob("*.html"):
        loads = re.findall(r'<(?:script|link|img|iframe|source)[^>]*?(?:src|href)="(https?:)?//[^"]*"', page.read_text())
        assert not loads, f"{page.name} loads {loads[:3]}"


def test_executed_notebooks_hold_no_path_of_this_machine(outputs):
    for page in (outputs / "test/companion").rglob("*.html"):
        text = page.read_text()
        assert str(ROOT) + "/" not in text and str(Path.home()) + "/" not in text, page.name


def test_a_second_run_does_nothing(outputs):
    made = [*(outputs / "test").rglob("run.json"), outputs / "test/companion/index.html"]
    stamps = {p: p.stat().st_ino for p in made}  # a new run.json is a new file, and so is a new page
    again = study(outputs, "--study", "all")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "Nothing to be done" in said, said
    assert {p: p.stat().st_ino for p in made} == stamps and len(made) > 30


def test_nothing_runs_on_past_its_end(outputs):
    assert not list(outputs.rglob(".trainer")), "checkpoints go when a run is complete"


def test_a_plan_names_only_the_downloads_that_its_models_need():
    assert "needs a download" not in show(Plan("tiny", "geometry"))
    said = show(Plan("paper", "geometry"))
    assert "model.qwen.source = Qwen/Qwen3.5-0.8B" in said and "llama3-8b" not in said


def dry_run(folder: Path, **config: str) -> str:
    words = [sys.executable, "-m", "snakemake", "-n", "--nolock", "--config", "profile=test", "study=geometry,steerable", *(f"{k}={v}" for k, v in config.items())]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "VALUECOT_OUTPUTS": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def planned(said: str) -> set[str]:
    return set(re.findall(r"(?m)^(?:local)?rule (\w+):", said)) - {"all"}


def test_snakemake_says_what_is_stale_and_why(outputs, tmp_path):
    "In a folder that Snakemake has no records of, and with SET: exactly what the keys say."
    shutil.copytree(outputs / "test", tmp_path / "test")
    assert planned(dry_run(tmp_path)) == set()
    said = dry_run(tmp_path, overrides="geometry.landscape.rise=0.5")
    assert planned(said) == {"range", "landscape", "carriers", "report", "companion"} and "stale: range · llama · seed 0: settings changed" in said
    file = tmp_path / "test/geometry/samples/llama/base/seed0/run.json"
    text = json.loads(file.read_text())
    text["key"]["code"] = "0" * 16
    file.write_text(json.dumps(text))
    said = dry_run(tmp_path)
    assert "stale: samples · llama · base · seed 0: code changed" in said and {"samples", "report"} <= planned(said)


@pytest.mark.prove  # the keys themselves are held to it in test_frame and by the dry runs above
def test_a_changed_setting_reruns_what_depends_on_it_and_nothing_else(outputs, tmp_path):
    shutil.copytree(outputs / "test", tmp_path / "test")
    old = {p.parent: p.stat().st_ino for p in (tmp_path / "test/geometry").rglob("run.json")}
    run = study(tmp_path, "--set", "geometry.landscape.rise=0.5")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said[-3000:]
    again = {folder for folder in old if (folder / "run.json").stat().st_ino != old[folder]}
    assert {p.relative_to(tmp_path / "test/geometry").parts[0] for p in again} == {"range", "landscape", "carriers", "report"}


def test_a_failing_stage_keeps_its_notebook_and_the_rest(outputs, tmp_path):
    shutil.copytree(outputs / "test", tmp_path / "test")
    run = study(tmp_path, "--set", "geometry.sft.max_length=8")
    said, _ = run.communicate(timeout=300)
    assert run.returncode != 0 and "raise geometry.sft.max_length" in said and "failed.ipynb" in said
    folder = tmp_path / "test/geometry/sft/llama/standard/seed0"
    assert (folder / "failed.ipynb").exists() and not (folder / "run.json").exists()
    base = "test/geometry/spectrum/llama/base/seed0/run.json"
    assert (tmp_path / base).read_bytes() == (outputs / base).read_bytes(), "the base arm does not need that stage"


@pytest.mark.prove
def test_cold_and_warm_starts_give_the_same_tables(outputs, tmp_path):
    run = study(tmp_path, VALUECOT_COLD="1")
    said, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, said[-3000:]
    assert tables(tmp_path) == tables(outputs)


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_the_tables_are_the_same(outputs, tmp_path, seed):
    rng, kills = random.Random(seed), 0
    for _ in range(6):
        run = study(tmp_path)
        try:
            said, _ = run.communicate(timeout=rng.uniform(15, 60))
            assert run.returncode == 0, said[-3000:]
            break
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL) if rng.random() < 0.5 else run.kill()
            run.communicate()
            kills += 1
            time.sleep(rng.uniform(0, 2))
    else:
        run = study(tmp_path)
        said, _ = run.communicate(timeout=900)
        assert run.returncode == 0, said[-3000:]
    assert kills and tables(tmp_path) == tables(outputs)


@pytest.mark.prove
@pytest.mark.parametrize("stage", ["base_model", "sft", "reward_model", "grpo", "samples", "spectrum", "landscape", "report"])
def test_each_stage_survives_a_kill(outputs, tmp_path, stage):
    "The stage is killed in the middle, its half-written folder stays, and the next run replaces it."
    shutil.copytree(outputs / "test", tmp_path / "test")
    place = {"report": "report", "base_model": "base_model/llama/all/all", "reward_model": "reward_model/all/all/all"}.get(stage, f"{stage}/llama/standard/seed0")
    folder = tmp_path / "test/geometry" / place
    (folder / "run.json").unlink()
    run = study(tmp_path, VALUECOT_COLD="1")
    deadline = time.monotonic() + 120
    while not (folder / "failed.ipynb").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (folder / "run.json").exists() and (folder / "failed.ipynb").exists()
    run = study(tmp_path)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said[-3000:]
    assert tables(tmp_path) == tables(outputs)


# ---- a long grid
class Dying(MatrixOperator):
    "A bowl whose loss can be asked a few times only."

    asked, limit, fingerprint = 0, 10**9, "bowl"

    def evaluate(self) -> float:
        self.asked += 1
        if self.asked > self.limit:
            raise KeyboardInterrupt
        return super().evaluate()


def test_a_killed_landscape_goes_on_from_its_points(tmp_path):
    def bowl() -> Dying:
        return Dying(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([0.3, 0.1]), loss=2.0)

    axis, place = torch.linspace(-1, 1, 5), tmp_path / ".subset0.jsonl"
    whole = surface(bowl(), torch.eye(2), axis, tmp_path / ".whole.jsonl", "key")
    H = bowl()
    H.limit = 12
    with pytest.raises(KeyboardInterrupt):
        surface(H, torch.eye(2), axis, place, "key")
    place.write_bytes(place.read_bytes()[:-3])  # and the last line was cut off
    again = bowl()
    found = surface(again, torch.eye(2), axis, place, "key")
    assert torch.equal(found.loss, whole.loss) and found.center == whole.center
    assert again.asked == 1 + 25 - 10, "the centre, and the points that no whole line told"
    place.write_text(place.read_text().replace("[0, 3,", "[0, }3,"))
    damaged = bowl()
    assert torch.equal(surface(damaged, torch.eye(2), axis, place, "key").loss, whole.loss) and damaged.asked == 1 + 25 - 3
    for vectors, steps, key in ((torch.eye(2), axis, "another key"), (-torch.eye(2), axis, "key"), (torch.eye(2), 2 * axis, "key")):
        other = bowl()
        surface(other, vectors, steps, place, key)
        assert other.asked == 26, "points of another run, plane or range are not gone on from"


def test_a_landscape_stage_killed_in_its_second_grid_keeps_the_first(outputs, tmp_path, monkeypatch):
    def run():
        return begin(landscape.stage, "test", "llama", "standard", 0, out=str(tmp_path))

    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    whole, asked = landscape.run_landscape(run()), []
    assert not list(tmp_path.glob(".subset*"))
    plain = landscape.eigenplane

    def dying(H, vectors, alphas, betas, keep, done):
        def counted(*row):
            keep(*row)
            asked.append(row)
            if len(asked) == 12 and len(alphas) == 3:
                raise KeyboardInterrupt

        return plain(H, vectors, alphas, betas, counted, done)

    monkeypatch.setattr(landscape, "eigenplane", dying)
    with pytest.raises(KeyboardInterrupt):
        landscape.run_landscape(run())
    clear(tmp_path)
    found = landscape.run_landscape(run())
    assert len(asked) == 18 and all(torch.equal(found[k].loss, whole[k].loss) for k in whole), "nine points a grid, each computed once"
