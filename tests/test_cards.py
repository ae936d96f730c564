"""A model card tells what its run recorded, and nothing leaves that may not, or before it is told to."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from valuecot.flow.plan import Plan, left
from valuecot.flow.run import begin, locked, provenance
from valuecot.geometry.prompts import run_prompts
from valuecot.geometry.traces import run_traces
from valuecot.settings import load
from valuecot.stages.base_model import run_base_model
from valuecot.stages.grpo import run_grpo
from valuecot.stages.reward_model import run_reward_model
from valuecot.stages.samples import run_samples
from valuecot.stages.sft import run_sft
from valuecot.stats import wilson
from valuecot.store import hash_file, read_json, write_json
from valuecot.training.cards import card, check_leaving, job_of, lineage, main, publish, read_finished, settings_rows
from valuecot.training.terms import LICENCES, Helper, check_helpers, check_name, helpers, licence_of, papers

ROOT = Path(__file__).parents[1]
MODEL, SFT, NAME = "grpo/llama/standard/seed0", "sft/llama/standard/seed0", "lab/llama-standard"
SMALL = "base_model.documents=16 base_model.samples=1 geometry.samples.prompts=4"
STAGES = {"prompts": run_prompts, "traces": run_traces, "base_model": run_base_model, "reward_model": run_reward_model, "sft": run_sft, "grpo": run_grpo, "samples": run_samples}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Outputs that hold one arm of the test profile, every stage run by its own function."
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VALUECOT_OUTPUTS", str(folder))
        plan = Plan("test", "geometry", SMALL)
        grpo = job_of(plan, MODEL)
        for job in [*lineage(plan, grpo), replace(grpo, stage="samples")]:
            levels = {name: getattr(job, name) for name in ("model", "arm") if getattr(job, name) != "all"} | ({} if job.seed == "all" else {"seed": 0})
            place = plan.run_file(job).parent
            STAGES[job.stage](begin(plan.stages[job.stage], "test", out=str(place), overrides=SMALL, **levels))
            write_json(place / "run.json", provenance(plan, job, plan.key(job), {"profile": "test", **levels}, 1.0))
    return folder


@pytest.fixture
def outputs_of(made, monkeypatch):
    "The same, for one test."
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(made))
    return made


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    "A copy to spoil."
    shutil.copytree(made, tmp_path / "outputs")
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs" / "test" / "geometry"


@pytest.fixture
def found(outputs_of):
    return read_finished(Plan("test", "geometry", SMALL), MODEL)


def look(model: str = MODEL, name: str = NAME, **more) -> str:
    return publish("test", model, name, **{"overrides": SMALL, **more})


# ---- the card
def test_the_head_is_the_hubs_and_names_what_it_must(found):
    head = ModelCard(card(found, NAME, "apache-2.0", "lab/traces")).data
    assert (head.license, head.library_name, head.pipeline_tag, head.datasets, head.base_model) == ("apache-2.0", "transformers", "text-generation", ["lab/traces"], None)
    assert {"valuecot", "grpo", "test"} <= set(head.tags)
    published = replace(found, settings=load("paper"))
    head = ModelCard(card(published, NAME, "llama3.2")).data
    assert (head.base_model, head.license, head.to_dict()["base_model_relation"]) == ("PursuitOfDataScience/llama3.2-1b-thinking", "llama3.2", "finetune")


def test_every_setting_that_was_read_is_told(found):
    told, rows = card(found, NAME, "apache-2.0"), dict((name, value) for name, value, _ in settings_rows(found.runs))
    read = {f"{section}.{key}" for run in found.runs.values() for section, values in run["settings"].items() for key in values if not section.startswith("teacher.")}
    assert set(rows) == read and {"geometry.grpo.kl_coef", "geometry.sft.batch_size", "base_model.documents", "arm.standard.thinking", "geometry.traces.words", "model.llama.hidden"} <= read
    assert rows["geometry.grpo.kl_coef"] == "0.1" and "| geometry.grpo.learning_rate | 0.001 | 1e-06 |" in told and "| base_model.documents | 16 | 2400 |" in told
    assert "| grpo: importance_sampling_level | token |" in told


def test_numbers_are_those_of_the_run(found, made):
    told = card(found, NAME, "apache-2.0")
    place = made / "test" / "geometry"
    measured, own = read_json(place / "samples/llama/standard/seed0/summary.json"), read_json(place / MODEL / "run.json")
    n, cut = measured["prompts"], round(measured["truncated"] * measured["prompts"])
    assert "| completions cut off at the length limit | {:.3f} | {:.3f} to {:.3f} | {} |".format(cut / n, *wilson(cut, n), n) in told
    assert re.search(rf"reward model's score of the response\) \| {measured['reward']:.3f} \| -?\d+\.\d+ to -?\d+\.\d+ \| 4 \|", told)
    low, high = map(float, re.search(r"score of the response\) \| \S+ \| (\S+) to (\S+) \|", told).groups())
    assert (high - low) / 2 == pytest.approx(3.182 * measured["reward_se"], abs=2e-3), "t of 4 prompts"
    last = [json.loads(line) for line in (place / MODEL / "history.jsonl").read_text().splitlines() if '"kl"' in line][-1]
    assert f"| {MODEL} | kl | {last['step']} | {last['value']:.5g} |" in told
    assert own["revision"][:12] in told and f"trl {own['packages']['trl']}" in told and all(f"`{name}` {key}" in told for name, key in own["inputs"].items())


def test_what_was_not_measured_is_said(outputs_of):
    told = card(read_finished(Plan("test", "geometry", SMALL), SFT), NAME, "apache-2.0")
    assert "Not measured" in told and "before its reinforcement learning" in told and "95 % interval" not in told and "judge" not in told.split("## Limits")[1].split("## Uses")[0]


def test_a_small_profile_says_so_first(found):
    for profile, said in {"test": True, "tiny": True, "paper": False}.items():
        told = card(replace(found, settings=load(profile)), NAME, "apache-2.0")
        assert ("no evidence about the papers' claims" in told.split("## What this is")[0]) == said
    told = card(found, NAME, "apache-2.0")
    for part in ("## Limits", "## Uses", "## Misuses", "Decisions about persons", "- Advice", "Teachers of the traces", "`rules`", "Standard CoT", "held out and were never trained on"):
        assert part in told, part


def test_no_place_of_this_machine_is_told(found, tmp_path):
    private = tmp_path / "private" / "weights"
    private.mkdir(parents=True)
    settings = load("test", f"model.llama.source={private} geometry.reward_model.source={private} geometry.traces.replies={private} teacher.local.base_url=http://inside.example:8000/v1 geometry.traces.teachers=local")
    sections = {s: settings.only([s]).values()[s] for s in ("model.llama", "geometry.reward_model", "geometry.traces", "teacher.local")}
    told = card(replace(found, settings=settings, runs=found.runs | {MODEL: found.runs[MODEL] | {"settings": sections}}), NAME, "mit")
    assert str(tmp_path) not in told and "inside.example" not in told and "weights (a folder of the user's)" in told and str(ROOT) not in told


def test_the_code_on_the_card_loads_the_model(found, capsys):
    told = card(found, str(found.folder / "model"), "apache-2.0")
    exec(re.search(r"```python\n(.*?)```", told, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("<|begin|><|user|>")


# ---- licences
def test_what_llama_asks_of_a_name():
    settings = load("paper")
    judged = helpers(settings, settings["arm.base"], "grpo")
    assert [h.licence for h in judged] == ["llama3.2"] and not helpers(settings, settings["arm.format"], "grpo")[0].role.startswith("reward")
    for name, licence in {"lab/Llama-value-conflicts": "llama3.2", "lab/Llama-3-8b-rlvr": "llama3", "lab/Llama-judged-qwen": "apache-2.0"}.items():
        check_name(name, licence, judged)
    for name, licence in {"lab/my-llama": "llama3.2", "lab/Llama-8b": "llama3", "lab/qwen": "apache-2.0"}.items():
        with pytest.raises(ValueError, match="must begin with 'Llama"):
            check_name(name, licence, judged)
    check_name("lab/qwen", "apache-2.0", [])


def test_a_licence_that_forbids_is_obeyed():
    check_helpers("llama3", [Helper("teacher", "meta-llama/Meta-Llama-3-8B-Instruct", "llama3")])
    settings = load("paper", "geometry.traces.teachers=transformers teacher.transformers.model=meta-llama/Meta-Llama-3-8B-Instruct")
    with pytest.raises(ValueError, match="forbids to improve a model of another family"):
        check_helpers("apache-2.0", helpers(settings, settings["arm.standard"], "sft"))
    with pytest.raises(ValueError, match="not known to allow passing changed weights on"):
        licence_of("lab/unknown", "cc-by-nd-4.0")
    with pytest.raises(ValueError, match="is under llama3.2: leave LICENCE empty"):
        licence_of("PursuitOfDataScience/llama3.2-1b-thinking", "mit")


def test_the_agreement_goes_along(tmp_path):
    (tmp_path / "agreement").write_text("Llama 3.2 Community\n License  Agreement\n\nterms")
    beside = papers("llama3.2", str(tmp_path / "agreement"))
    assert beside["Notice"].startswith("Llama 3.2 is licensed under") and beside["LICENSE"].endswith("terms")
    with pytest.raises(ValueError, match="does not begin as the META LLAMA 3"):
        papers("llama3", str(tmp_path / "agreement"))
    with pytest.raises(ValueError, match="AGREEMENT=path"):
        papers("llama3")
    assert "Version 2.0, January 2004" in papers("apache-2.0")["LICENSE"] and papers("cc-by-4.0") == {}
    assert all(terms.title and terms.says for terms in LICENCES.values())


def test_unknown_weights_and_prompts_stay(found, tmp_path):
    unknown = replace(found, settings=load("test", f"model.llama.source={tmp_path}"))
    assert "licence is not known" in card(unknown, NAME, "") and "license: other" in card(unknown, NAME, "")
    with pytest.raises(ValueError, match="not known: find it"):
        check_leaving(unknown, NAME, licence_of(unknown.shape.source), public=False)
    check_leaving(unknown, NAME, licence_of(unknown.shape.source, "mit"), public=False)
    prompts = replace(found, settings=load("test", "geometry.prompts=some/folder"))
    check_leaving(prompts, NAME, "apache-2.0", public=False)
    with pytest.raises(ValueError, match="leave PUBLIC out"):
        check_leaving(prompts, NAME, "apache-2.0", public=True)


# ---- refusals
def test_only_a_complete_current_untouched_run_leaves(copied):
    assert "nothing was sent" in look()
    with pytest.raises(ValueError, match="is stale .settings changed"):
        look(overrides=f"{SMALL} geometry.grpo.kl_coef=0.2")
    weights = copied / MODEL / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match="model.safetensors is not as its run left it"):
        look()
    weights.write_bytes(kept)
    (copied / "traces/all/all/all/run.json").unlink()
    with pytest.raises(FileNotFoundError, match="traces/all/all/all.*half written"):
        look()
    (copied / MODEL / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="needs grpo/llama/standard/seed0.*run `make study"):
        look()


def test_a_run_in_training_waits(outputs_of):
    folder = outputs_of / "test" / "geometry" / MODEL
    with locked(folder.parent / f".{folder.name}.lock"), pytest.raises(RuntimeError, match="is being trained now"):
        look()


def test_files_that_the_run_did_not_leave_stay(copied):
    (copied / MODEL / "model" / "diary.txt").write_text("private")
    listed = look().split(f"to {NAME}, private:")[1]
    assert "diary" not in listed and "model.safetensors" in listed and "LICENSE" in listed and "README.md" in listed
    run = read_json(copied / MODEL / "run.json")
    (copied / MODEL / "model" / "extra.bin").write_bytes(b"pickled")
    write_json(copied / MODEL / "run.json", run | {"files": run["files"] | {"model/extra.bin": "0e93f4a9d1f1b1d8b1e1a4d6cb4a0c5f"}})
    with pytest.raises(ValueError, match="extra.bin is not as its run left it"):
        look()
    write_json(copied / MODEL / "run.json", run | {"files": run["files"] | {"model/extra.bin": hash_file(copied / MODEL / "model" / "extra.bin")}})
    with pytest.raises(ValueError, match="samples/llama/standard/seed0 of profile test is stale"):  # the checkpoint that they came of was another
        look()
    later = copied / "samples/llama/standard/seed0/run.json"
    had = read_json(later)
    write_json(later, had | {"input_files": had["input_files"] | {MODEL: left(copied / MODEL / "run.json")}})
    with pytest.raises(ValueError, match="neither weights in safetensors nor a text"):
        look()


# ---- a hub of our own
class Hub(BaseHTTPRequestHandler):
    "As much of the Hugging Face hub as huggingface_hub asks for when it uploads a model."

    private, files, deleted, objects, asked = True, {"README.md": b"old", "old.safetensors": b"old", ".gitattributes": b""}, [], {}, []
    exists, protocol_version = False, "HTTP/1.1"

    def answer(self, found: object, status: int = 200) -> None:
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        Hub.asked.append(f"GET {self.path}")
        words = self.path.partition("?")[0].strip("/").split("/")
        if "tree" in words:
            return self.answer([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in Hub.files.items()])
        self.answer({"id": NAME, "sha": "1" * 40, "private": Hub.private, "siblings": [{"rfilename": name} for name in Hub.files]})

    def do_PUT(self):
        Hub.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self):
        body, here = self.body(), f"http://127.0.0.1:{self.server.server_port}"
        Hub.asked.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            if not Hub.exists:  # an existing repository stays as it is
                Hub.private = json.loads(body)["visibility"] == "private" and Hub.private
            return self.answer({"url": f"{here}/{NAME}"})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self.answer({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if self.path.endswith("/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [o | {"actions": {"upload": {"href": f"{here}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]]})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                Hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                Hub.files[value["path"]] = Hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                Hub.deleted.append(value["path"])
                Hub.files.pop(value["path"])
        self.answer({"success": True, "commitOid": "2" * 40, "commitUrl": f"{here}/{NAME}/commit/{'2' * 40}"})

    def log_message(self, *words):
        pass


@pytest.fixture
def hub():
    Hub.private, Hub.files, Hub.deleted, Hub.objects, Hub.asked = True, {"README.md": b"old", "old.safetensors": b"old", ".gitattributes": b""}, [], {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked_of(outputs_of, hub, monkeypatch, capsys):
    "What the command says in this process, asking the hub of ours."
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def ask(*words: str) -> tuple[int, str]:
        status = main(["--profile", "test", "--model", MODEL, "--to", NAME, "--set", SMALL, *words])
        return status, "".join(capsys.readouterr())

    return ask


def test_nothing_leaves_until_it_is_told_to(asked_of):
    status, said = asked_of()
    assert status == 0 and "nothing was sent: say SEND=yes" in said and "## Misuses" in said and not Hub.asked


def test_the_hub_gets_the_model_the_card_and_the_licence_in_private(made, hub, tmp_path):
    "By the command itself, with huggingface_hub's own client."
    env = os.environ | {"VALUECOT_OUTPUTS": str(made), "HF_TOKEN": "hf_secret_of_mine", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub}
    call = [sys.executable, "-m", "valuecot.training.cards", "--profile", "test", "--model", MODEL, "--to", NAME, "--set", SMALL, "--send", "yes"]
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr and f"sent: {hub}/{NAME}" in done.stdout and Hub.private and Hub.deleted == ["old.safetensors"]
    place = made / "test" / "geometry" / MODEL / "model"
    assert {p.name: p.read_bytes() for p in place.iterdir()} == {name: data for name, data in Hub.files.items() if name not in ("README.md", "LICENSE", ".gitattributes")}
    for name, data in Hub.files.items():
        (tmp_path / name).write_bytes(data)
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0" and b"Apache License" in Hub.files["LICENSE"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == AutoModelForCausalLM.from_pretrained(place).num_parameters()


def test_a_public_repository_is_never_filled_by_chance(asked_of):
    Hub.private = False
    status, said = asked_of("--send", "yes")
    assert status == 2 and f"{NAME} is public" in said and Hub.files["README.md"] == b"old"
    Hub.private = True
    assert asked_of("--send", "yes", "--public", "yes")[0] == 0 and not Hub.private and b"## Misuses" in Hub.files["README.md"]


def test_a_private_repository_is_not_made_public(asked_of, monkeypatch):
    monkeypatch.setattr(Hub, "exists", True)
    status, said = asked_of("--send", "yes", "--public", "yes")
    assert status == 2 and "is private: leave PUBLIC out" in said and Hub.private and Hub.files["README.md"] == b"old"


def test_without_a_network_it_says_so(asked_of, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, said = asked_of("--send", "yes")
    assert status == 2 and "error: nothing was published" in said and "refused" in said and "Traceback" not in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, said = asked_of("--send", "yes")
    assert status == 2 and "offline" in said.lower()


def test_make_publish_says_what_it_is_told(made):
    said = subprocess.run(["make", "-n", "publish", f"MODEL={MODEL}", f"TO={NAME}", "PROFILE=tiny", "SET=a.b='c d'", "VENV=/nowhere"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"valuecot.training.cards --profile tiny --model '{MODEL}' --to '{NAME}'" in said and "--public 'no' --send 'no'" in said and "release" not in said
    data = subprocess.run(["make", "-n", "publish", f"REPO={NAME}", "VENV=/nowhere"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "valuecot.geometry.release tiny" in data and "cards" not in data
