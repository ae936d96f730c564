"""Settings, store, text, statistics, plan and keys."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from valuecot.flow import plan as plans
from valuecot.flow.fingerprints import bare
from valuecot.flow.plan import Job, Plan, find_job, why
from valuecot.flow.run import begin, check_complete, clear, execute, locked
from valuecot.flow.study import main as study
from valuecot.settings import load, root
from valuecot.stats import binned, mean_se, wilson
from valuecot.store import load_tensors, plain, read_json, read_records, save_tensors, write_json, write_records
from valuecot.text import completion_text, parse_answer, split_reasoning, well_formed
from valuecot.types import Landscape, Prompt, Rollout

ROOT = Path(__file__).parents[1]


# ---- settings
@pytest.mark.parametrize("profile", ["tiny", "small", "paper", "test"])
def test_every_profile_loads(profile):
    assert load(profile)["geometry.design"].arms


def test_the_paper_profile_holds_the_printed_numbers():
    s = load("paper")
    assert (s["geometry"].sft_prompts, s["geometry"].grpo_prompts, s["geometry"].subsets, s["geometry"].prompts_per_subset) == (1146, 1146, 3, 100)
    sft, grpo, hessian = s["geometry.sft"], s["geometry.grpo"], s["geometry.hessian"]
    assert (sft.epochs, sft.batch_size, sft.learning_rate, sft.schedule, sft.warmup) == (3, 32, 2e-5, "cosine", 0.1)
    assert (grpo.epochs, grpo.batch_size, grpo.group_size, grpo.kl_coef, grpo.learning_rate) == (2, 8, 4, 0.1, 1e-6)
    assert (hessian.top_n, hessian.max_iterations) == (2, 50)


def test_published_numbers_equal_the_reference():
    reference = ROOT.parent / "shared" / "reference" / "paper_results.json"
    if not reference.exists():
        pytest.skip("no ../shared/reference here")
    paper, ours = json.loads(reference.read_text()), load("paper")
    names = {"qwen3.5-0.8b": "qwen", "llama3.2-1b": "llama"}
    for model, arms in paper["geometry"]["top_eigenvalue"].items():
        for arm, pair in arms.items():
            assert list(ours["published.geometry"][f"{names[model]}.{arm}"]) == pair
    for row, values in paper["steerable"]["value_kaleidoscope"].items():
        assert list(ours["published.value_kaleidoscope"][row]) == values["original"] + (values["binary"] or [None] * 3)
    for row, values in paper["steerable"]["opinionqa"].items():
        assert list(ours["published.opinionqa"][row]) == values
    fine, rl = paper["steerable"]["fine_tuning"], paper["steerable"]["grpo"]
    assert (ours["steerable.sft"].batch_size, ours["steerable.sft"].max_grad_norm) == (fine["batch_size"], fine["gradient_clip"])
    assert (ours["steerable.grpo"].kl_coef, ours["steerable.grpo"].learning_rate) == (rl["kl_coefficient"], rl["max_lr"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("geometry.sft.epochs=three", "not a whole number"),
        ("geometry.sft.epochs=-1", "not negative"),
        ("geometry.sft.epochs=0", "at least 1"),
        ("geometry.grpo.group_size=0", "at least 1"),
        ("geometry.hessian.top_n=1", "needs two directions"),
        ("arm.base.grpo=heldout", "never on held-out prompts"),
        ("arm.standard.part=respons", "did you mean 'response'"),
        ("arm.base.part=reasoning", "holds no reasoning"),
        ("geometry.landscape.grid=24", "odd number"),
        ("geometry.sft.learning_rate=inf", "finite"),
        ("geometry.sft.learning_rte=1", "did you mean 'geometry.sft.learning_rate'"),
        ("geometry.grpo.bias_correction_kl=maybe", "not yes or no"),
        ("geometry.grpo.loss_type=grp", "did you mean 'grpo'"),
        ("geometry.grpo.group_size=5", "every group must be whole"),
        ("geometry.design.arms=base,anealing", "did you mean 'annealing'"),
        ("geometry.design.models=gpt", "unknown model"),
        ("geometry.design.seeds=0,0", "name each once"),
        ("geometry.design.arms=", "at least one"),
        ("steerable.probes.kinds=own,early,own", "steerable.probes.kinds = own, early, own: own is named twice"),
        ("steerable.moderation.by=words,words", "steerable.moderation.by = words, words: words is named twice"),
        ("arm.sft.changes=grpo.kl_coef=0", "'grpo.kl_coef=0' reaches nothing, since grpo is empty"),
        ("arm.zero-shot.changes=sft.epochs=2", "'sft.epochs=2' reaches nothing, since sft is empty"),
        ("arm.sft.changes=sft.epochs=3,sft.cycle=1,sft.epochs=4", "sets sft.epochs twice"),
        ("arm.sft.reasoning=0.5", "reasoning = 0.5 reaches nothing, since sft = 'answer'"),
        ("arm.rlvr.reasoning=0", "reasoning = 0.0 reaches nothing, since sft = ''"),
        ("geometry.sft.epochs", "section.key=value"),
        ("teacher.rules.provider=google", "needs its price"),
        ("teacher.rules.provider=openai teacher.rules.input=1", "needs its price"),
        ("teacher.local.base_url=localhost:8000/v1", "begins with http:// or https://"),
        ("teacher.mine.model=x", r"add a section \[teacher.mine\]"),
        ("geometry.traces.teachers=mine", r"add a section \[teacher.mine\]"),
    ],
)
def test_a_wrong_setting_is_refused(overrides, message):
    with pytest.raises((KeyError, ValueError), match=message):
        load("tiny", overrides)


def test_a_price_of_nothing_is_written_or_has_no_seller():
    free = load("tiny", "teacher.rules.provider=openai teacher.rules.input=0 teacher.rules.output=0")["teacher.rules"]
    local = load("tiny")["teacher.transformers"]
    assert (free.input, free.output, local.input, local.output) == (0.0, 0.0, 0.0, 0.0)


def test_a_wrong_file_is_refused(tmp_path):
    text = (ROOT / "settings.ini").read_text()
    for wrong, message in {"[geometry.sft]\nepoch = 3\n": "already exists", "[geometry.sfd]\nepochs = 3\n": "did you mean 'geometry.sft'", "[arm.odd]\nlabel = Odd\n": "lacks"}.items():
        path = tmp_path / "settings.ini"
        path.write_text(wrong + text)
        with pytest.raises(Exception, match=message):
            load("tiny", path=path)


def test_a_stage_sees_only_what_it_declared():
    with pytest.raises(KeyError, match="undeclared"):
        load("tiny").only(["geometry.sft"])["geometry.grpo"]


# ---- store
def test_records_and_tensors_come_back(tmp_path):
    import torch

    rows = [Rollout("a", "x\u2028y\n", None, "b", None, 0.5, 3, False, True)]
    assert read_records(write_records(tmp_path / "r.jsonl", rows), Rollout) == rows
    land = Landscape(torch.arange(3.0), torch.arange(2.0), torch.full((3, 2), math.nan), 0.1)
    back = load_tensors(save_tensors(tmp_path / "l.safetensors", land), Landscape)
    assert torch.equal(back.alphas, land.alphas) and back.loss.isnan().all() and back.center == 0.1


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="not whole JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="line 1: not a Prompt"):
        read_records(tmp_path / "a.jsonl", Prompt)
    assert plain(math.nan) is None


# ---- text and statistics
def test_reasoning_and_answers():
    assert split_reasoning("<think>a</think>b</think>c") == ("a", "b</think>c")
    assert split_reasoning("") == (None, "")
    assert not well_formed("x</think>", opened=True) and not well_formed("<think>a</think>b", opened=True)
    for bad in [("a<think>", "b"), ("a", "b</think>"), ("", "b"), ("a", "  ")]:
        with pytest.raises(ValueError):
            completion_text(*bad)
    assert parse_answer("I say (A). Answer: none") is None
    assert [parse_answer(f"Answer:{x}") for x in ("**B**", " [c]", "\nD", " A1", "", " b")] == ["B", "C", "D", None, None, "B"]
    assert [parse_answer(f"Answer: {x}") for x in ("a 'maybe' case", "a *really* good", "a (maybe)", "a, maybe")] == [None, None, None, "A"]


def test_statistics_against_the_standard_library():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    found = mean_se(values, "seeds")
    assert found.mean == pytest.approx(statistics.mean(values)) and found.se == pytest.approx(statistics.stdev(values) / 5**0.5)
    low, high = wilson(9, 10)
    assert 0.5 < low < 0.9 < high < 1
    with pytest.raises(ValueError):
        wilson(1, 0)
    with pytest.raises(ValueError):
        binned([1], [])
    assert sum(b.n for b in binned(range(17), [1.0] * 17)) == 17


# ---- plan and keys
@pytest.fixture
def tiny():
    return Plan("tiny", "geometry")


def test_every_job_comes_after_its_inputs(tiny):
    jobs = tiny.jobs()
    assert len(set(jobs)) == len(jobs)
    for i, job in enumerate(jobs):
        assert set(tiny.inputs(job)) <= set(jobs[:i])
        assert Job.read(job.path) == job


def test_the_base_arm_starts_from_the_base_model(tiny):
    starts = {arm: [j.stage for j in tiny.inputs(Job("geometry", "grpo", "llama", arm, "seed0"))] for arm in ("base", "standard")}
    assert "base_model" in starts["base"] and "sft" not in starts["base"] and "sft" in starts["standard"]


def test_a_setting_changes_exactly_the_keys_that_depend_on_it(tiny):
    other = Plan("tiny", "geometry", "geometry.grpo.kl_coef=0.2")
    changed = {j.stage for j in tiny.jobs() if tiny.key(j) != other.key(j)}
    assert changed == {"grpo", "samples", "spectrum", "range", "landscape", "attribution", "matrix", "timeline", "carriers", "annealing", "behaviour", "conduct", "arms", "report"}
    only_one_arm = Plan("tiny", "geometry", "arm.annealing.target=standard")
    spectra = {j.arm for j in tiny.jobs() if j.stage == "spectrum" and tiny.key(j) != only_one_arm.key(j)}
    assert spectra == {"annealing"}


def test_a_new_seed_changes_no_key_of_the_old_one(tiny):
    more = Plan("tiny", "geometry", "geometry.design.seeds=0,1")
    assert {j.stage for j in tiny.jobs() if tiny.key(j) != more.key(j)} == {"arms", "carriers", "conduct", "report"}
    assert len(more.jobs()) > len(tiny.jobs())


def test_names_that_do_not_exist(tiny):
    with pytest.raises(KeyError, match="did you mean 'spectrum'"):
        find_job(tiny, "spectrm")
    with pytest.raises(KeyError, match="did you mean 'llama'"):
        find_job(tiny, "spectrum", "lama", "base", 0)
    with pytest.raises(ValueError, match="has no stage 'sft'"):
        find_job(tiny, "sft", "llama", "base", 0)


def test_a_missing_prompts_folder_is_found_before_anything_runs(capsys):
    assert study(["plan", "--profile", "tiny", "--study", "geometry", "--set", "geometry.prompts=no/such/folder"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_an_unknown_study_or_profile_is_named(capsys):
    assert study(["plan", "--study", "geometri"]) == 2 and study(["plan", "--profile", "tinny"]) == 2
    assert "did you mean 'geometry'" in (said := capsys.readouterr().err) and "did you mean 'tiny'" in said


def test_a_target_is_everything_one_stage_or_a_file(capsys):
    from valuecot.flow.study import plans as chosen
    from valuecot.flow.study import targets

    some = chosen("geometry", "tiny", "")
    assert targets(some, "all") == ["all"] and targets(some, "outputs/tiny/x.csv") == ["outputs/tiny/x.csv"]
    assert [t.rsplit("/", 6)[1:] for t in targets(some, "traces")] == [["geometry", "traces", "all", "all", "all", "run.json"]] and len(targets(some, "spectrum")) == 6
    assert study(["run", "--study", "geometry", "--target", "trases"]) == 2 and "unknown target 'trases'; did you mean 'traces'" in capsys.readouterr().err


@pytest.fixture
def copy(tmp_path, monkeypatch):
    "A copy of the project whose notebooks and modules may be edited."
    for name in ("nbs", "valuecot", "settings.ini", "docs"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    monkeypatch.setenv("VALUECOT_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plans.forget()
    yield tmp_path
    plans.forget()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1))


def changed_stages(before: dict) -> set[str]:
    plans.forget()
    plan = Plan("tiny", "geometry")
    return {j.stage for j in plan.jobs() if plan.key(j) != before[j]}


def test_prose_reruns_nothing_and_code_reruns_its_stage_and_what_follows(copy):
    plan = Plan("tiny", "geometry")
    before = {j: plan.key(j) for j in plan.jobs()}
    edit(copy / "nbs/geometry/50_spectrum.ipynb", "How sharp is the loss", "How very sharp is the loss")
    edit(copy / "valuecot/training/models.py", "Seed every generator", "Seed each generator")  # a docstring
    assert changed_stages(before) == set()
    edit(copy / "nbs/geometry/50_spectrum.ipynb", "seed=0, max_matvecs", "seed=1, max_matvecs")
    assert changed_stages(before) == {"spectrum", "range", "landscape", "attribution", "matrix", "timeline", "carriers", "conduct", "report"}


def test_an_imported_module_counts_and_the_view_does_not(copy):
    plan = Plan("tiny", "geometry")
    before = {j: plan.key(j) for j in plan.jobs()}
    with open(copy / "valuecot/view/curves.py", "a") as file:
        file.write("\nNEW = 1\n")
    assert changed_stages(before) == {"arms", "audit", "carriers", "conduct", "own_model", "release", "report"}, "pages, and what is made from one"
    with open(copy / "valuecot/training/sampling.py", "a") as file:
        file.write("\nNEW = 1\n")
    assert {"samples", "base_model", "grpo"} <= changed_stages(before) and "prompts" not in changed_stages(before)


def test_bare_code_keeps_strings_that_are_not_docstrings():
    assert bare('x = "a"') != bare('x = "b"')
    assert bare("def f():\n    'doc'\n    return 'a'") != bare("def f():\n    'doc'\n    return 'b'")


# ---- runs
def test_inputs_must_be_complete_and_untouched(outputs, monkeypatch, tmp_path):
    folder = tmp_path / "test"
    shutil.copytree(outputs / "test", folder)
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path))
    plan = Plan("test", "geometry")
    job = Job("geometry", "traces")
    place = plan.run_file(job).parent
    check_complete("traces/all/all/all", place, plan)
    with open(place / "traces.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="not as its run left it"):
        check_complete("traces/all/all/all", place, plan)
    with pytest.raises(ValueError, match="stale .settings changed"):
        begin(plan.stages["sft"], "test", "llama", "standard", 0, overrides="geometry.traces.words=50")
    whole = (place / "run.json").read_text()
    (place / "run.json").write_text(whole[:50])
    assert why(plan, job) == "its run.json is damaged"
    (place / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="half written.*make study"):
        begin(plan.stages["sft"], "test", "llama", "standard", 0)
    shutil.rmtree(place)
    with pytest.raises(FileNotFoundError, match="does not exist.*20_traces.ipynb"):
        begin(plan.stages["sft"], "test", "llama", "standard", 0)


def test_a_run_by_hand_marks_nothing_complete(outputs, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    run = begin(Plan("test", "geometry").stages["range"], "test", "llama", seed=0)
    assert not run.out.is_relative_to(outputs) and not (run.out / "run.json").exists()


def test_papermill_alone_gives_the_numbers_of_the_pipeline(outputs, tmp_path):
    "By the command that the README names."
    words = ["-m", "papermill", "nbs/geometry/50_spectrum.ipynb", str(tmp_path / "out.ipynb"), "-p", "profile", "test", "-p", "model", "llama", "-p", "arm", "annealing", "-p", "seed", "0", "-p", "out", str(tmp_path / "mine")]
    env = {**os.environ, "VALUECOT_OUTPUTS": str(outputs)}
    env.pop("OMP_NUM_THREADS", None)  # a person's shell does not set it
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = outputs / "test/geometry/spectrum/llama/annealing/seed0/spectrum.json"
    assert (tmp_path / "mine/spectrum.json").read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "mine/run.json").exists()


def test_jupyterlab_gives_the_numbers_of_the_pipeline(outputs, tmp_path, monkeypatch):
    "As a person does it there: the parameters cell edited, all cells run by a kernel in the notebook's folder."
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebook = nbformat.read(ROOT / "nbs/geometry/50_spectrum.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += f'\nprofile, out = "test", {str(tmp_path / "mine")!r}'
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs/geometry")}}).execute()
    theirs = outputs / "test/geometry/spectrum/llama/annealing/seed0/spectrum.json"
    assert (tmp_path / "mine/spectrum.json").read_bytes() == theirs.read_bytes()


def test_an_unknown_parameter_is_refused(tmp_path):
    with pytest.raises(TypeError, match="did you mean 'profile'"):
        execute(ROOT / "nbs/geometry/10_prompts.ipynb", tmp_path, {"profil": "test"})


def test_run_json_says_where_a_number_comes_from(outputs):
    run = read_json(outputs / "test/geometry/grpo/llama/standard/seed0/run.json")
    assert run["counts"]["start"] == "sft/llama/standard/seed0" and run["packages"]["torch"].startswith("2.13")
    assert {"code", "settings", "files", "inputs"} == set(run["key"]) and run["settings"]["geometry.grpo"]["kl_coef"] == 0.1
    text = json.dumps(run)
    assert str(outputs) not in text and str(root()) not in text and str(Path.home()) not in text


def test_nothing_is_left_to_do_after_a_run(outputs, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    plan = Plan("test", "geometry")
    assert [j.label for j in plan.jobs() if why(plan, j)] == []


def test_local_weights_count_for_the_key(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")

    def named() -> str:
        plan = Plan("tiny", "geometry", f"model.llama.source={tmp_path}")
        return plan.key(Job("geometry", "base_model", "llama"))["files"]

    before = named()
    (tmp_path / "model.safetensors").write_bytes(b"two")
    plans.forget()
    assert named() != before


def test_an_edit_during_a_run_is_not_recorded_as_its_result(copy, monkeypatch, tmp_path):
    import valuecot.flow.run as runs

    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "out"))
    plan = Plan("test", "geometry")

    def slow(notebook, out, parameters):
        with open(copy / "valuecot/data/splits.py", "a") as file:
            file.write("\nEDITED = 1\n")

    monkeypatch.setattr(runs, "execute", slow)
    with pytest.raises(RuntimeError, match="edited while it ran"):
        runs.run_stage(plan, Job("geometry", "prompts"))
    assert not plan.run_file(Job("geometry", "prompts")).exists()


def test_a_folder_is_cleared_marker_first(tmp_path):
    for name in ("run.json", "a.jsonl", "failed.ipynb"):
        (tmp_path / name).write_text("x")
    (tmp_path / "model").mkdir()
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_study_in_the_same_place_waits_outside(tmp_path):
    with locked(tmp_path / "lock", wait=False) as first, locked(tmp_path / "lock", wait=False) as second:
        assert first and not second
