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
from valuecot.providers.requests import Reply
from valuecot.settings import load
from valuecot.store import read_json, read_records, write_json, write_records
from valuecot.teacher.asked import Quarantined
from valuecot.teacher.audit import Finding
from valuecot.teacher.release import COLUMNS, card, origin, released, unsent, upload, without_quotes
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
    for part in ("## Prompts", "## Teachers", "`rules`", "## Counts", "| heldout | rules | annealing |", "## What the audit saw", "## Put aside", "## The same again"):
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


def test_a_reason_may_quote_and_is_withheld_too(begun):
    prompt = read_records(begun.inputs["prompts/all/all/all"] / "prompts.jsonl", Prompt)[0]
    aside = [Quarantined(prompt.id, "annealing", "rules", f"need 4 words, got 3: '{prompt.text[:30]}'", "")]
    with_texts, without = (card(load("test", o), [], aside, 10, {}, "today") for o in ("", "geometry.prompts=some/folder"))
    assert prompt.text[:30] in with_texts and prompt.text[:30] not in without and "withheld, since it may quote" in without


@pytest.mark.parametrize("reason", [
    "empty reply (stop)", "empty reply (content_filter)", "refusal", "refusal (SAFETY)", "cut off: the reply reached its longest length", "no JSON object in the reply", "2 different objects in the reply, one asked",
    "values.value_2 is missing", "values.value_1 has 5 words, at most three allowed; response.cot is blank",
])  # fmt: skip
def test_a_reason_that_quotes_nothing_is_told(reason):
    assert without_quotes(reason) == reason


@pytest.mark.parametrize("reason, told", [
    ("400 'my sister' is too long", "400, the rest is withheld, since"), ("my_sister is not asked for", "withheld, since"), ("empty reply (my sister)x", "withheld, since"), ("values.value_1 is missing; my sister is missing", "withheld, since"),
    ("need 4 words to quote 2 details, got 1: 'my sister'", "withheld, since"), ("ValueError: my sister", "withheld, since"), ("404 at http://my.sister/v1", "404, the rest is withheld, since"), ("no JSON object in the reply\nmy sister", "withheld, since"),
])  # fmt: skip
def test_a_reason_that_may_quote_is_withheld(reason, told):
    assert without_quotes(reason).startswith(told) and "sister" not in without_quotes(reason)


def test_the_reasons_of_this_project_are_known_to_it():
    "Those that the code raises, not a list of their own."
    from valuecot.providers.structured import Malformed, read
    from valuecot.teacher.schemas import AnnealingReply, StandardReply

    reasons = []
    for kind in (StandardReply, AnnealingReply):
        for text in ("nothing", '{"values": 3}', '{"values": {"value_1": "a b c d"}, "response": {"cot": " ", "final_response": "<think>"}, "annealing_cot": {"phase_1_high_temp": 1}, "final_model_response": "x"}'):
            with pytest.raises(Malformed) as error:
                read(Reply(text, "m", 1, 1, "stop"), kind)
            reasons += [part for part in str(error.value).split("; ") if not part.endswith("is not asked for")]
    assert len(reasons) > 12 and [r for r in reasons if without_quotes(r) != r] == []


def test_the_card_describes_every_column_and_what_was_lost(begun):
    told = run_release(begun)
    files = [str(p) for p in (begun.out / "data").glob("*.parquet")]
    columns = load_dataset("parquet", data_files=files, split="train", cache_dir=str(begun.out.parent / "cache")).column_names
    assert list(COLUMNS) == columns and all(f"| `{c}` |" in told for c in columns) and "withheld here" not in told
    for part in ("load_dataset(", "made from standard and annealing: is it length?", "another value pair", "revision ", "written on 20", "A style has fewer rows"):
        assert part in told, part
    aside = [Quarantined(name, "annealing", "rules", "refusal", "") for name in ("a", "a", "b")]
    assert "2 of 8 prompts (25.0 %)" in card(load("test"), [], aside, 8, {}, "today")
    live = card(load("test", "geometry.traces.teachers=gpt-5-nano"), [], [], 8, {}, "today")
    assert "gpt-5-nano, effort as the provider has it, at most 4,096 tokens of a reply" in live


def test_the_card_tells_what_was_asked_and_of_whom():
    "A folder without {words} asks for no length; rules read no template."
    live, rules = load("test", "geometry.traces.teachers=gpt-5-nano"), load("test")
    told = card(live, [], [], 8, {"standard": "Think about {prompt}"}, "today")
    assert "`{words}` is" not in told and "words asked for" not in told and "no length was asked for" in told and "### standard" in told
    assert "`{words}` is 45" in card(live, [], [], 8, {"standard": "Think about {prompt} in {words} words"}, "today")
    assert "How the teachers were asked" not in card(rules, [], [], 8, {"standard": "Think about {prompt}"}, "today")


def test_the_day_of_a_data_set_is_that_of_its_run(tmp_path):
    write_json(tmp_path / "run.json", {"revision": "a" * 40, "dirty": False, "finished": "2024-02-03T04:05:06Z"})
    (tmp_path / "traces.jsonl").write_text("")  # written today, as any copy is
    assert stage_module.made_by(tmp_path) == "written on 2024-02-03 by revision aaaaaaaaaaaa"


def test_findings_in_one_split_alone_still_load(begun, tmp_path):
    findings = read_records(begun.inputs["audit/all/all/all"] / "findings.jsonl", Finding)
    prompts = {p.id: p for p in read_records(begun.inputs["prompts/all/all/all"] / "prompts.jsonl", Prompt)}
    trace = next(t for t in read_records(begun.inputs["traces/all/all/all"] / "traces.jsonl", Trace) if prompts[t.prompt_id].split == "sft")
    only = [f for f in findings if prompts[f.prompt_id].split == "sft"] + [Finding(trace.prompt_id, trace.style, "rules", "refusal", "x")]
    (tmp_path / "audit").mkdir()
    write_records(tmp_path / "audit" / "findings.jsonl", only)
    run_release(replace(begun, inputs=begun.inputs | {"audit/all/all/all": tmp_path / "audit"}))
    files = {p.stem: str(p) for p in (begun.out / "data").glob("*.parquet")}
    found = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert found["sft"].features == found["heldout"].features and any("refusal" in row["audit"] for row in found["sft"])


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

    assert "usage: make publish PROFILE=tiny REPO=owner/name" in publish(tmp_path, "test").stderr and "usage" in publish(tmp_path, "test", "no-owner").stderr
    none = publish(tmp_path, "test", "owner/name")
    assert none.returncode == 2 and "this stage needs release" in none.stderr and "run `make study" in none.stderr
    offline = publish(outputs, "test", "owner/name")
    assert offline.returncode == 2 and "nothing was published" in offline.stderr and "Traceback" not in offline.stderr
    assert "https://huggingface.co did not take it" in offline.stderr and "token with write access" in offline.stderr


@pytest.mark.parametrize("kind, public", [("dataset", False), ("model", False), ("model", True)])
def test_nothing_is_sent_where_more_could_read_it_than_was_said(kind, public, tmp_path, monkeypatch):
    asked = []

    class Hub:
        private = not public

        def create_repo(self, name, repo_type, private, exist_ok):
            asked.append((repo_type, private))

        def repo_info(self, name, repo_type):
            return self

        def upload_folder(self, **more):
            asked.append((more["repo_type"], more["delete_patterns"]))
            return "there"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert upload(kind, "owner/name", tmp_path, public, "told", delete_patterns=["*"]) == "there" and asked == [(kind, not public), (kind, ["*"])]
    Hub.private = public
    with pytest.raises(ValueError, match="owner/name is " + ("private: leave PUBLIC out" if public else "public: make it private first")):
        upload(kind, "owner/name", tmp_path, public, "told")
    assert len(asked) == 3 and unsent(ValueError("owner/name is public")) == "error: nothing was published: owner/name is public"
    assert "did not take it (OSError: no route)" in unsent(OSError("no route")) and "token with write access" in unsent(OSError("no route"))


def test_publishing_sends_the_release_alone_and_in_private(outputs, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    sent = []

    class Hub:
        private = True

        def create_repo(self, name, **more):
            sent.append((name, more["private"]))

        def repo_info(self, name, **more):
            return self

        def upload_folder(self, **more):
            assert more["delete_patterns"] == ["data/*.parquet", "replies.jsonl.gz"]
            sent.append((more["repo_id"], sorted(p for pattern in more["allow_patterns"] for p in (q.relative_to(more["folder_path"]).as_posix() for q in more["folder_path"].glob(pattern)))))
            return "https://hub/owner/name"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert stage_module.publish("test", "owner/name") == "https://hub/owner/name"
    assert sent == [("owner/name", True), ("owner/name", ["README.md", "data/heldout.parquet", "data/sft.parquet", "replies.jsonl.gz"])]
    with pytest.raises(ValueError, match="is stale"):
        stage_module.publish("test", "owner/name", "geometry.licence=mit")
    Hub.private = False
    with pytest.raises(ValueError, match="owner/name is public"):
        stage_module.publish("test", "owner/name")
    assert len([s for s in sent if isinstance(s[1], list)]) == 1
