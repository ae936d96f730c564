"""What is given to others: every trace whole, or nothing of its text."""

import gzip
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from valuecot.flow.run import begin
from valuecot.geometry import release as stage_module
from valuecot.geometry.release import run_release, stage
from valuecot.settings import load
from valuecot.store import read_json, read_records
from valuecot.teacher.release import origin, released
from valuecot.types import Prompt, Trace


@pytest.fixture
def begun(outputs, tmp_path, monkeypatch):
    "The release stage over the finished traces of the test profile."
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    return begin(stage, "test", out=str(tmp_path / "release"))


def words_of(folder) -> str:
    "Every text in a folder, unpacked."
    parquet = [str(load_dataset("parquet", data_files=str(p), split="train", cache_dir=str(folder.parent / "cache")).to_list()) for p in (folder / "data").glob("*.parquet")]
    packed = [gzip.decompress(p.read_bytes()).decode() for p in folder.glob("*.gz")]
    return "\n".join([*parquet, *packed, *(p.read_text() for p in folder.glob("*.md"))])


def test_rows_read_back_are_the_traces(begun):
    run_release(begun)
    traces = {(t.prompt_id, t.style): t for name in ("traces", "controls") for t in read_records(begun.inputs["traces/all/all/all"] / f"{name}.jsonl", Trace)}
    prompts = {p.id: p for p in read_records(begun.inputs["prompts/all/all/all"] / "prompts.jsonl", Prompt)}
    files = {p.stem: str(p) for p in (begun.out / "data").glob("*.parquet")}
    assert set(files) == {"sft", "heldout"}
    found = [row for part in load_dataset("parquet", data_files=files, cache_dir=str(begun.out.parent / "cache")).values() for row in part]
    assert len(found) == len(traces) == read_json(begun.out / "record.json")["counts"]["rows"]
    for row in found:
        trace, prompt = traces[row["prompt_id"], row["style"]], prompts[row["prompt_id"]]
        assert (row["reasoning"], row["response"], tuple(row["phases"]), row["teacher"]) == (trace.reasoning, trace.response, trace.phases, trace.teacher)
        assert (row["prompt"], row["split"], row["value_1"]) == (prompt.text, prompt.split, prompt.value_1)


def test_twice_the_same_bytes(begun, tmp_path):
    run_release(begun)
    again = replace(begun, out=tmp_path / "again")
    again.out.mkdir()
    run_release(again)
    for path in sorted(p.relative_to(begun.out) for p in begun.out.rglob("*") if p.is_file()):
        assert (begun.out / path).read_bytes() == (again.out / path).read_bytes(), path


def test_the_card_is_one_and_names_what_it_must(begun):
    told = run_release(begun)
    data = DatasetCard(told).data.to_dict()
    assert data["license"] == "apache-2.0" and [f["path"] for f in data["configs"][0]["data_files"]] == ["data/heldout.parquet", "data/sft.parquet"]
    for part in ("## Prompts", "## Teachers", "`rules`", "## Counts", "| heldout | rules | annealing |", "## What the audit saw", "## Put aside", "## The same again", "### annealing", "{prompt}"):
        assert part in told, part


def test_without_a_licence_no_text_leaves(begun):
    run = replace(begun, settings=load("test", "geometry.prompts=some/folder"))
    run_release(run)
    said = words_of(run.out)
    prompts = read_records(run.inputs["prompts/all/all/all"] / "prompts.jsonl", Prompt)
    traces = read_records(run.inputs["traces/all/all/all"] / "traces.jsonl", Trace)
    for text in (*(p.text for p in prompts), *(t.reasoning for t in traces), *(t.response for t in traces)):
        assert text not in said and text[:40] not in said
    assert not list(run.out.glob("*.gz")) and traces[0].prompt_id in said and "withheld" in said and "license: other" in said


def test_a_licence_is_stated_known_or_refused():
    assert origin(load("paper")["geometry"])[1] == "mit" and released(load("tiny")["geometry"])
    assert released(load("tiny", "geometry.prompts=a/folder geometry.licence=CC-BY-4.0")["geometry"])
    assert not released(load("tiny", "geometry.prompts=a/folder")["geometry"])
    with pytest.raises(ValueError, match="not known to allow"):
        released(load("tiny", "geometry.prompts=a/folder geometry.licence=cc-by-nd-4.0")["geometry"])


def test_publishing_needs_a_release_a_name_and_a_network(outputs, tmp_path):
    def publish(folder, *words):
        env = os.environ | {"VALUECOT_OUTPUTS": str(folder), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-m", "valuecot.geometry.release", *words], env=env, capture_output=True, text=True)

    assert "usage" in publish(tmp_path, "test").stderr and "usage" in publish(tmp_path, "test", "no-owner").stderr
    none = publish(tmp_path, "test", "owner/name")
    assert none.returncode == 2 and "no release of profile test: run `make study" in none.stderr
    offline = publish(outputs, "test", "owner/name")
    assert offline.returncode == 2 and "nothing was published" in offline.stderr and "Traceback" not in offline.stderr


def test_publishing_sends_the_release_alone_and_in_private(outputs, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    sent = []

    class Hub:
        def create_repo(self, name, **more):
            sent.append((name, more["private"]))

        def upload_folder(self, **more):
            sent.append((more["repo_id"], sorted(p for pattern in more["allow_patterns"] for p in (q.relative_to(more["folder_path"]).as_posix() for q in more["folder_path"].glob(pattern)))))
            return "https://hub/owner/name"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert stage_module.publish("test", "owner/name") == "https://hub/owner/name"
    assert sent == [("owner/name", True), ("owner/name", ["README.md", "data/heldout.parquet", "data/sft.parquet", "replies.jsonl.gz"])]
