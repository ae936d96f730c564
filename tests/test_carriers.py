"""What carries the curvature: splits that add up, slopes told from curvature, words that are labelled whole, snapshots that change nothing."""

import csv
import json
import math
import random
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_resume import PROMPTS, TRACES, letters, same, start
from transformers import TrainerCallback

from valuecot.curvature.decomposition import check_split, split
from valuecot.curvature.plane import quadratic
from valuecot.curvature.slope import edge
from valuecot.flow.plan import Job, Plan
from valuecot.geometry import attribution, carriers
from valuecot.settings import GRPO, SFT, Machine, load
from valuecot.store import load_tensors, read_json, write_json
from valuecot.teacher.asked import read_traces
from valuecot.teacher.styles import STYLES, assemble
from valuecot.training import launch
from valuecot.training.launch import Work, do, read_work
from valuecot.training.models import Target, conversation, encode, laid_out, load_model, target_examples, train_tokenizer
from valuecot.training.places import fifths, pieces, token_places
from valuecot.training.sharpest import sharpest
from valuecot.training.snapshots import keep_snapshots, kept_snapshots, snapshot_steps, take_up
from valuecot.types import Arm, Landscape, Prompt, Spectrum, Trace
from valuecot.view.heat import heat_maps
from valuecot.view.timeline import timeline

ARMS = "base", "standard", "annealing"


# ---- text or weights
def corners(rng: random.Random) -> list[float]:
    return [math.exp(rng.uniform(-3, 8)) for _ in range(4)]


def test_the_parts_of_a_split_sum_to_it_in_every_order():
    rng = random.Random(0)
    for _ in range(200):
        found = check_split(split(*corners(rng)))
        assert found.text_first + found.weights_last == pytest.approx(found.total, abs=1e-12)
        assert found.text_last + found.weights_first == pytest.approx(found.total, abs=1e-12)
        assert found.interaction == pytest.approx(found.weights_first - found.weights_last, abs=1e-12)


def test_equal_texts_leave_all_to_the_weights_and_roles_can_be_exchanged():
    rng = random.Random(1)
    for bb, bo, ob, oo in (corners(rng) for _ in range(50)):
        found, back = split(bb, bo, ob, oo), split(oo, ob, bo, bb)
        assert [back.total, back.text, back.weights] == pytest.approx([-found.total, -found.text, -found.weights], abs=1e-12)
        assert split(bb, bb, ob, ob).text == 0 and split(bb, bo, bb, bo).weights == 0


@pytest.mark.parametrize("values", [(0.0, 1, 1, 1), (1, -2.0, 1, 1), (1, 1, math.inf, 1), (1, 1, 1, math.nan)])
def test_no_logarithm_of_what_is_not_positive(values):
    with pytest.raises(ValueError, match="needs positive eigenvalues"):
        split(*values)


def test_means_of_parts_sum_to_the_mean():
    rng = random.Random(2)
    told = carriers.mean_split([split(*corners(rng)) for _ in range(3)], "subsets")
    assert told["text"].mean + told["weights"].mean == pytest.approx(told["total"].mean, abs=1e-12)
    assert told["text"].n == 3 and told["text"].se > 0 and told["text"].over == "subsets"


def matrix_rows(values: dict, seeds=("0",), subsets=(0,)) -> pd.DataFrame:
    own = {"base": "standard/response", "standard": "standard/completion"}
    return pd.DataFrame([
        {"model": "llama", "arm": arm, "seed": seed, "target": target, "own": own[arm] == target, "subset": subset, "lambda_1": x * (1 + 0.1 * subset + 0.2 * int(seed)), "residual": 1e-3, "loss": 2.0, "gradient_norm": 0.1, "scored_tokens": 9, "prompts": 2, "matvecs": 5, "examples": f"{target}{subset}"}
        for (arm, target), x in values.items() for seed in seeds for subset in subsets
    ])  # fmt: skip


FOUR = {("base", "standard/response"): 8.0, ("base", "standard/completion"): 4.0, ("standard", "standard/response"): 3.0, ("standard", "standard/completion"): 1.0}


@pytest.mark.parametrize("seeds, subsets, over, n", [(("0",), (0,), "subsets", 1), (("0",), (0, 1), "subsets", 2), (("0", "1"), (0, 1), "seeds", 2)])
def test_the_table_of_splits_varies_one_level(seeds, subsets, over, n):
    (row,) = carriers.split_table(matrix_rows(FOUR, seeds, subsets)).to_dict("records")
    assert row["over"] == over and row["n"] == n and math.isnan(row["text SE (log ratio)"]) == (n == 1)
    assert row["total (log ratio)"] == pytest.approx(math.log(8)) and row["text (log ratio)"] == pytest.approx((math.log(2) + math.log(3)) / 2), "a factor of all corners changes no ratio"


def test_a_corner_that_is_missing_or_negative_gives_no_split():
    assert carriers.split_table(matrix_rows({k: v for k, v in FOUR.items() if k != ("standard", "standard/response")})).empty
    assert carriers.split_table(matrix_rows(FOUR | {("base", "standard/response"): -1.0})).empty
    assert "nothing to split" in carriers.shown_split(None, carriers.split_table(matrix_rows({k: v for k, v in FOUR.items() if k[0] == "base"}))).text


def test_arms_on_different_tokens_are_refused():
    rows = matrix_rows(FOUR)
    assert len(carriers.same_tokens(rows)) == 4
    with pytest.raises(ValueError, match="measured on 2 different texts"):
        carriers.same_tokens(rows.assign(examples=["a", "b", "c", "b"]))


# ---- slope or curvature
R = torch.linspace(-0.2, 0.2, 9, dtype=torch.float64)


def surface(slopes, values, axis=R) -> Landscape:
    return Landscape(axis, axis, quadratic(axis, axis, 1.5, torch.tensor(slopes), torch.tensor(values)), 1.5)


@pytest.mark.parametrize("slope, value", [(0.0, 50.0), (2.0, 50.0), (-2.0, 50.0), (-30.0, 4.0), (1.0, -20.0)])
def test_a_quadratic_with_a_slope_is_told_apart(slope, value):
    found = edge(surface([slope, -1.0], [value, 10.0]), torch.tensor([slope, -1.0]), torch.tensor([value, 10.0]))
    by_slope, by_curvature = abs(slope) * 0.2, value * 0.02
    assert [found.slope_rise, found.curvature_rise, found.rise_plus, found.rise_minus] == pytest.approx([by_slope, by_curvature, by_curvature + by_slope, by_curvature - by_slope], abs=1e-6)
    assert found.r_squared == pytest.approx(1, abs=1e-9) and found.points == 81
    assert found.slope_share == pytest.approx(by_slope / (by_slope + abs(by_curvature)))
    assert math.isnan(found.asymmetry) if value < 0 else found.asymmetry == pytest.approx(by_slope / by_curvature, abs=1e-6)


def test_a_surface_that_is_no_quadratic_says_so():
    land = surface([0.0, 0.0], [50.0, 10.0])
    bumpy = replace(land, loss=land.loss + torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double())
    assert edge(bumpy, torch.zeros(2), torch.tensor([50.0, 10.0])).r_squared < 0.7
    holes = land.loss.clone()
    holes[0, 4] = math.inf
    found = edge(replace(land, loss=holes), torch.zeros(2), torch.tensor([50.0, 10.0]))
    assert found.points == 80 and math.isnan(found.rise_minus) and math.isnan(found.asymmetry) and found.rise_plus == pytest.approx(1.0)


@pytest.mark.parametrize("axis", [torch.linspace(-0.2, 0.2, 8), torch.linspace(0.0, 0.4, 9)])
def test_a_grid_without_theta_in_its_middle_is_refused(axis):
    with pytest.raises(ValueError, match="no line through theta"):
        edge(surface([0.0, 0.0], [1.0, 1.0], axis), torch.zeros(2), torch.ones(2))


# ---- which words
ODD = Prompt("p", "Die Katze 🐈 maß «zwei» Äpfel.\nMay I keep it?", "home", "care", "honesty", "")


def trace_of(name: str) -> Trace:
    texts = {1: ("Care 🐈 says keep it.\n\nHonesty says: tell!",), 3: ("'zwei' Äpfel: care says keep.", "Both — can be had.", "Tell the owner.")}[len(STYLES[name].roles)]
    return Trace("p", name, "rules", "Care", "Honesty", texts, assemble(name, texts), "Say «yes» 🐈.\n\nThen give it back.")


@pytest.fixture(scope="module", params=[False, True])
def tokenizer(request):
    return train_tokenizer([ODD.text, *(trace_of(n).reasoning for n in ("standard", "annealing")), "Phase 1 (High Temp)"] * 2, 330, empty_think=request.param)


@pytest.mark.parametrize("name", [n for n, s in STYLES.items() if s.roles])
@pytest.mark.parametrize("thinking, part", [(True, "completion"), (True, "reasoning"), (False, "response"), (True, "text")])
def test_every_scored_token_has_one_place_and_its_text(tokenizer, name, thinking, part):
    trace = trace_of(name)
    layout, labels = laid_out(tokenizer, ODD, trace, thinking), encode(tokenizer, ODD, trace, thinking, part)["labels"]
    places, scored = token_places(layout, trace), (labels != -100).nonzero().flatten().tolist()
    assert len(places) == len(layout.ids) == len(labels)
    found = pieces(layout, scored)
    assert "".join(found) == layout.text[layout.offsets[scored[0]][0] : layout.offsets[scored[-1]][1]], "no character is lost or told twice"
    phased = len(trace.phases) > 1
    inside = {"headers", *(f"phase {i + 1}" if role == "any" else role for i, role in enumerate(STYLES[name].roles))} if phased else {"reasoning"}
    assert {places[i] for i in scored} == {"completion": inside | {"response"}, "reasoning": inside, "response": {"response"}, "text": {"prompt", "response"} | inside}[part]
    if phased and thinking:
        for i, text in enumerate(trace.phases):
            role = STYLES[name].roles[i] if STYLES[name].roles[i] != "any" else f"phase {i + 1}"
            own = [t for t, p in zip(pieces(layout, range(len(places))), places, strict=True) if p == role]
            assert "".join(own).strip() == text


def test_phases_that_the_text_does_not_hold_are_refused(tokenizer):
    trace = trace_of("annealing")
    with pytest.raises(ValueError, match="phase 2 of its annealing trace is not in the text"):
        token_places(laid_out(tokenizer, ODD, trace, True), replace(trace, phases=(trace.phases[0], "Elsewhere.", trace.phases[2])))
    with pytest.raises(ValueError):
        token_places(laid_out(tokenizer, ODD, trace, True), replace(trace, phases=trace.phases[:2]))


def test_fifths_are_even():
    assert fifths(10) == [f"{20 * (i // 2)} to {20 * (i // 2) + 20} %" for i in range(10)] and fifths(0) == [] and fifths(1) == ["0 to 20 %"]


def test_shares_of_groups_sum_to_one_and_a_fair_part_has_ratio_one():
    rows = attribution.grouped("phase", ["a", "b", "b", "c"], [0.25, 0.6, 0.4, -0.25])
    assert sum(r["share"] for r in rows) == pytest.approx(1) and sum(r["tokens"] for r in rows) == 4
    assert {r["name"]: r["per_token_ratio"] for r in rows} == pytest.approx({"a": 1.0, "b": 2.0, "c": -1.0})


def spectrum_of(values, residual: float) -> Spectrum:
    return Spectrum(torch.tensor(values), torch.eye(2), torch.tensor([residual, residual]), torch.ones(2, dtype=torch.bool), 9, "algebraic", 1e-3, 1.0, 0.1, 0.5)


def test_a_sum_that_is_not_the_eigenvalue_is_refused():
    found = spectrum_of([10.0, 5.0], 1e-3)
    assert attribution.allowed(found) == pytest.approx(1e-4 + 2e-6) and attribution.check_sum(10.0005, found) < 1e-4
    with pytest.raises(ArithmeticError, match="are not those of the spectrum"):
        attribution.check_sum(10.002, found)
    with pytest.raises(ArithmeticError):
        attribution.check_sum(math.nan, found)
    assert attribution.allowed(spectrum_of([10.0, 10.0], 1e-3)) == pytest.approx(1.1e-3), "without a gap the residual itself bounds the value"
    worst = max(abs(float(v @ torch.diag(torch.tensor([10.0, 5.0])) @ v) - 10) / 10 for v in (torch.tensor([math.cos(t), math.sin(t)]) for t in (0.001, 0.002)))
    residual = float((torch.diag(torch.tensor([10.0, 5.0])) @ torch.tensor([math.cos(0.002), math.sin(0.002)]) - 10 * torch.tensor([math.cos(0.002), math.sin(0.002)])).norm()) / 10
    assert worst <= 1.01 * residual**2 * 10 / 5, "Rayleigh quotients err by the square of the residual over the gap"


# ---- targets
def test_a_target_says_style_part_and_thinking():
    arm = Arm("a", "A", "standard", "grpo", True, "headers", "response")
    assert Target.read("own", arm) == Target("headers", "response", True) and Target.read("own", arm).name == "headers/response (thinking)"
    assert Target.read("standard/response", arm) == Target("standard", "response", False) and Target.read("annealing/completion", arm) == Target("annealing", "completion", True)


@pytest.mark.parametrize("value, complaint", [("standard", "no style/part"), ("standerd/response", "no style/part"), ("own,own", "name each once"), ("", "at least one"), ("standard/prompt", "no style/part")])
def test_wrong_targets_are_refused(value, complaint):
    with pytest.raises(ValueError, match=complaint):
        load("tiny", f"geometry.matrix.targets={value}")


# ---- snapshots
def test_snapshots_lie_between_the_ends():
    assert snapshot_steps(0, 10) == [] and snapshot_steps(1, 10) == [5] and snapshot_steps(4, 10) == [2, 4, 6, 8] and snapshot_steps(9, 2) == [1] and snapshot_steps(3, 1) == []
    with pytest.raises(ValueError, match="-1 snapshots"):
        snapshot_steps(-1, 10)


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    return start(tmp_path_factory.mktemp("snapshots") / "begin")


def work_of(kind: str, begin, place, count: int) -> Work:
    if kind == "sft":
        settings, rows = SFT(3, 2, 1e-2, "cosine", 0.1, 0.0, 1.0, 256, 2, checkpoint_every=2), [conversation(p, t, True) for p, t in zip(PROMPTS, TRACES, strict=True)]
        return Work("sft", begin, place / "model", place, rows, asdict(settings), True, 0, "ours", snapshots=count)
    settings = GRPO(1, 8, 4, 0.1, 1e-2, "cosine", 0.1, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 6, 0.0, 1.0, 4, checkpoint_every=1)
    return Work("grpo", begin, place / "model", place, [{"prompt": p.text, "gold": "A"} for p in PROMPTS], asdict(settings), True, 0, "ours", reward="format", snapshots=count)


class Dies(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind, steps, killed", [("sft", 12, 8), ("grpo", 4, 3)])
def test_snapshots_change_no_bit_and_survive_a_kill(kind, steps, killed, begin, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "reward_of", lambda *work: letters)  # one that an untrained model can earn
    do(work_of(kind, begin, tmp_path / "without", 0))
    do(work_of(kind, begin, tmp_path / "with", 3))
    assert same(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("without", "with")))
    due = snapshot_steps(3, steps)
    assert keep_snapshots(tmp_path / "with" / "snapshots", tmp_path / "out" / "snapshots", 3, steps) == due == list(kept_snapshots(tmp_path / "out"))
    assert not (tmp_path / "without" / "snapshots").exists()
    first = load_file(kept_snapshots(tmp_path / "out")[due[0]])
    assert not same(first, load_file(kept_snapshots(tmp_path / "out")[due[-1]])), "the weights move"

    fit = launch.fit
    monkeypatch.setattr(launch, "fit", lambda trainer: (trainer.add_callback(Dies(killed)), fit(trainer))[1])
    with pytest.raises(KeyboardInterrupt):
        do(work_of(kind, begin, tmp_path / "killed", 3))
    assert sorted(p.name for p in (tmp_path / "killed" / "snapshots").iterdir()) == sorted(f"step{s}.safetensors" for s in due if s <= killed)
    monkeypatch.setattr(launch, "fit", fit)
    do(work_of(kind, begin, tmp_path / "killed", 3))
    for step in due:
        assert same(*(load_file(tmp_path / name / "snapshots" / f"step{step}.safetensors") for name in ("with", "killed"))), f"snapshot {step}"
    assert same(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("without", "killed")))


def test_a_snapshot_is_the_weights_of_its_update(begin, tmp_path):
    do(work_of("sft", begin, tmp_path, 5))  # update 10 has a checkpoint, too
    model, _ = load_model(begin)
    taken = {k: v.clone() for k, v in take_up(model, tmp_path / "snapshots" / "step10.safetensors").state_dict().items()}
    whole, _ = load_model(tmp_path / "checkpoint-10")
    assert same(taken, dict(whole.state_dict()))
    with pytest.raises(FileNotFoundError, match="update 1 without a snapshot"):
        keep_snapshots(tmp_path / "snapshots", tmp_path / "out", 11, 12)


def test_parted_models_are_refused_and_a_work_survives_the_disk(begin, tmp_path):
    work = work_of("sft", begin, tmp_path, 2)
    write_json(tmp_path / "work.json", work)
    assert read_work(tmp_path / "work.json") == work
    with pytest.raises(ValueError, match="geometry.timeline.snapshots=0"):
        do(replace(work, machine=Machine(2, "fsdp2")))


def test_snapshots_are_asked_of_one_study_alone():
    for study, touched in (("geometry", {"sft", "grpo"}), ("steerable", set())):
        plan, other = Plan("tiny", study), Plan("tiny", study, "geometry.timeline.snapshots=0")
        trained = [j for j in plan.jobs() if j.stage in ("sft", "grpo")]
        assert trained and {j.stage for j in trained if plan.key(j)["settings"] != other.key(j)["settings"]} == touched
    assert load("test", "geometry.timeline.snapshots=0")["geometry.timeline"].snapshots == 0


# ---- pictures
def test_pictures_refuse_what_they_cannot_draw():
    cell = {"panel": "llama", "row": "Base", "column": "standard/response", "value": 1.0, "text": "10", "framed": True}
    assert "Base on standard/response: 10" in heat_maps(pd.DataFrame([cell]), "T", "log").alt
    for rows, complaint in (([cell | {"value": None}], "nothing to draw"), ([cell, cell], "two values for one cell"), ([{"panel": "x"}], "lack the columns")):
        with pytest.raises(ValueError, match=complaint):
            heat_maps(pd.DataFrame(rows), "T", "log")
    point = {"model": "llama", "arm": "base", "seed": "0", "progress": 1.0, "value": 5.0, "snapshot": False}
    figure = timeline(pd.DataFrame([point, point | {"progress": 2.0, "value": math.nan}]), "T", "λ₁")
    assert "1 values are not positive" in figure.caption and len(figure.png(50)) > 1000
    with pytest.raises(ValueError, match="nothing to show"):
        timeline(pd.DataFrame([point | {"value": -1.0}]), "T", "λ₁")


# ---- the study
def folder(outputs, stage: str, arm: str):
    return outputs / f"test/geometry/{stage}/llama/{arm}/seed0"


def spectrum_rows(outputs, arm: str) -> dict[int, dict]:
    return {r["subset"]: r for r in read_json(folder(outputs, "spectrum", arm) / "spectrum.json") if r["instrument"] == "valuecot"}


@pytest.mark.parametrize("arm", ARMS)
def test_the_tokens_sum_to_the_eigenvalue_that_the_spectrum_saved(outputs, arm):
    told = read_json(folder(outputs, "attribution", arm) / "attribution.json")
    row = spectrum_rows(outputs, arm)[0]
    assert told["lambda_1"] == pytest.approx(row["lambda_1"], rel=1e-6) and told["examples"] == row["examples"]
    assert told["relative_difference"] <= told["allowed_difference"]
    for by in ("phase", "prompt", "pair", "place"):
        rows = [r for r in told["rows"] if r["by"] == by]
        assert sum(r["share"] for r in rows) == pytest.approx(1, abs=1e-9) and sum(r["tokens"] for r in rows) == row["scored_tokens"]
    names = {r["name"] for r in told["rows"] if r["by"] == "phase"}
    assert names == {"base": {"response"}, "standard": {"reasoning", "response"}, "annealing": {"headers", "explore", "cool", "converge", "response"}}[arm]
    lines = [json.loads(line) for line in (folder(outputs, "attribution", arm) / "tokens.jsonl").read_text().splitlines()]
    prompts, traces = read_traces(outputs / "test/geometry/prompts/all/all/all", outputs / "test/geometry/traces/all/all/all")
    target = load("test")[f"arm.{arm}"].target
    written = {t.prompt_id: t for t in traces if t.style == target}
    for line in lines:
        assert len(line["pieces"]) == len(line["shares"]) == len(line["groups"]) and written[line["prompt_id"]].response in "".join(line["pieces"])
    assert sum(sum(line["shares"]) for line in lines) == pytest.approx(1, abs=1e-9)


def test_all_arms_are_measured_on_the_same_tokens(outputs):
    rows = [r | {"arm": arm} for arm in ARMS for r in read_json(folder(outputs, "matrix", arm) / "matrix.json")]
    hashes = {}
    for r in rows:
        hashes.setdefault((r["target"], r["subset"]), set()).add(r["examples"])
    assert len(hashes) == 6 and all(len(found) == 1 for found in hashes.values()) and len(rows) == 18
    assert len({next(iter(found)) for found in hashes.values()}) == 6, "different texts have different hashes"
    for r in (r for r in rows if r["own"]):
        assert r["reused"] and r["lambda_1"] == spectrum_rows(outputs, r["arm"])[r["subset"]]["lambda_1"]
    assert all(r["converged"] for r in rows)


def test_a_value_taken_over_is_the_one_that_would_be_measured(outputs):
    settings, arm = load("test"), "standard"
    prompts, traces = read_traces(outputs / "test/geometry/prompts/all/all/all", outputs / "test/geometry/traces/all/all/all")
    model, tokenizer = load_model(outputs / f"test/geometry/grpo/llama/{arm}/seed0/model")
    examples = target_examples(tokenizer, prompts, traces, Target("standard", "completion", True), 0)
    known = [r | {"instrument": "valuecot"} for r in spectrum_rows(outputs, arm).values()]
    taken, measured = sharpest(model, examples, settings["geometry.hessian"], known), sharpest(model, examples, settings["geometry.hessian"])
    assert taken.reused and not measured.reused and measured.lambda_1 == pytest.approx(taken.lambda_1, rel=1e-3)
    assert (measured.loss, measured.gradient_norm) == pytest.approx((taken.loss, taken.gradient_norm), rel=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_the_timeline_runs_from_the_start_to_the_spectrum(outputs, arm):
    rows = read_json(folder(outputs, "timeline", arm) / "timeline.json")
    way = [(r["stage"], r["weights"]) for r in rows]
    assert way == [("base_model", "checkpoint"), *([("sft", "snapshot"), ("sft", "checkpoint")] if arm != "base" else []), ("grpo", "snapshot"), ("grpo", "checkpoint")]
    assert [r["progress"] for r in rows] == sorted(r["progress"] for r in rows) and rows[0]["progress"] == (1 if arm == "base" else 0) and rows[-1]["progress"] == 2
    assert rows[0]["distance"] == 0 and all(r["distance"] > 0 for r in rows[1:] if r["weights"] == "checkpoint") and len({r["examples"] for r in rows}) == 1
    assert rows[-1]["reused"] and rows[-1]["lambda_1"] == spectrum_rows(outputs, arm)[0]["lambda_1"] and not any(r["reused"] for r in rows[:-1])
    if arm != "base":
        assert list(kept_snapshots(folder(outputs, "sft", arm))) == [r["step"] for r in rows if r["stage"] == "sft" and r["weights"] == "snapshot"]
    assert not (folder(outputs, "grpo", arm) / ".trainer").exists()


def test_the_page_holds_tables_that_add_up(outputs):
    page = outputs / "test/geometry/carriers/all/all/all"
    table = {name: list(csv.DictReader(open(page / f"{name}.csv"))) for name in ("matrix", "split", "shares", "sums", "edges", "timeline")}
    assert {r["arm"] for r in table["split"]} == {"standard", "annealing"} and len(table["matrix"]) == 9 and len(table["edges"]) == 3
    mean = {(r["arm"], r["target"]): float(r["lambda_1 (nats)"]) for r in table["matrix"]}
    assert all(x > 0 for x in mean.values())
    for r in table["split"]:
        assert float(r["text (log ratio)"]) + float(r["weights (log ratio)"]) == pytest.approx(float(r["total (log ratio)"]), abs=1e-4) and float(r["text SE (log ratio)"]) >= 0
    for r, arm in zip(table["edges"], ARMS, strict=True):
        land = load_tensors(folder(outputs, "landscape", arm) / "subset0.safetensors", Landscape)
        ends = sorted(float(land.loss[i, land.loss.shape[1] // 2]) - land.center for i in (0, -1))
        assert sorted(float(r[f"measured rise at {side}r (nats)"]) for side in "+-") == pytest.approx(ends, abs=1e-5)
    assert max(float(r["relative difference (1)"]) for r in table["sums"]) < 1e-4
    assert {p.name for p in page.glob("*.png")} >= {"matrix_map.png", "timeline_figure.png"}
    text = json.dumps(read_json(page / "run.ipynb"), ensure_ascii=False)
    assert "Made by: " in text and 'href=\\"run:attribution/llama/annealing/seed0\\"' in text.replace("\\\\", "\\")


def test_every_new_stage_is_a_stage_of_the_first_study_alone():
    for study, expected in (("geometry", {"attribution", "matrix", "timeline", "carriers"}), ("steerable", set())):
        assert {j.stage for j in Plan("tiny", study).jobs()} & {"attribution", "matrix", "timeline", "carriers"} == expected
    assert Job("geometry", "carriers").path == "geometry/carriers/all/all/all"
