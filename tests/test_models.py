"""Models of other people: the same files every time, a clear line where they cannot be had, and a format that trains what is generated."""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from valuecot.settings import ModelShape, load
from valuecot.stages.base_model import run_base_model
from valuecot.stages.reward_model import measured, run_reward_model
from valuecot.store import read_json, read_records, write_records
from valuecot.training.judge import ScalarReward
from valuecot.training.models import (
    check_format,
    choose_template,
    conversation,
    encode,
    fix,
    load_model,
    parameter_count,
    plain,
    render,
    save_model,
    scratch_config,
    scratch_model,
    shape_config,
    train_tokenizer,
)
from valuecot.training.reward import length_bias, reward_shape, right_of
from valuecot.training.weights import fetch, record, recorded
from valuecot.types import Prompt, Run, Trace

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = "Should I keep the ring that I found? Ask who lost it first. The user wants to keep it. Honesty comes first here."
PROMPT = Prompt("p", "Should I keep the ring that I found?", "home", "care", "honesty", "open", "sft", 0)
TRACE = Trace("p", "standard", "rules", "care", "honesty", ("The user wants to keep it.",), "The user wants to keep it.", "Ask who lost it first.")
SMALL = ModelShape("scratch", "llama", 16, 1, 2, 1, 24, 320)


def tiny(folder: Path, seed: int = 0) -> Path:
    "A language model made on the spot."
    fix(seed)
    tokenizer = train_tokenizer([WORDS] * 3, 320)
    return save_model(scratch_model(SMALL, tokenizer), tokenizer, folder)


def judge_in(folder: Path) -> Path:
    "A judge made on the spot."
    fix(0)
    tokenizer = train_tokenizer([WORDS] * 3, 320)
    return save_model(reward_shape(SMALL, tokenizer), tokenizer, folder)


def edit(folder: Path, name: str, **changes) -> Path:
    "Change entries of a JSON file; None removes one."
    values = {k: v for k, v in (read_json(folder / name) | changes).items() if v is not None}
    (folder / name).write_text(json.dumps(values))
    return folder


# ---- a hub of our own
ONE, TWO = "1" * 40, "2" * 40
REFUSALS = {
    "lab/gated": (401, "GatedRepo"), "lab/no-access": (403, "GatedRepo"), "lab/forbidden": (403, ""), "lab/missing": (401, "RepoNotFound"), "lab/gone": (404, "RepoNotFound"), "lab/broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    "As much of the Hugging Face hub as huggingface_hub asks for when it downloads a model."

    repositories: dict[str, dict[str, Path]] = {}  # name -> commit -> folder
    head = ONE

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path, words = self.path.partition("?")[0], self.path.partition("?")[0].strip("/").split("/")
        if path in ("/move", "/close"):  # the owner pushes a commit; the hub goes away
            Hub.head = TWO if path == "/move" else Hub.head
            self.answer(200)
            return threading.Thread(target=self.server.stop).start() if path == "/close" else None
        api, (owner, name, _, revision, *file) = words[0] == "api", words[2:] if words[0] == "api" else words
        source = f"{owner}/{name}"
        status, code = REFUSALS.get(source, (200, ""))
        if status != 200 and not (api and code == "GatedRepo"):  # the list of a gated repository is public
            return self.answer(status, X_Error_Code=code)
        commits = self.repositories.get(source, {ONE: self.repositories["lab/tiny"][ONE]})
        commit = (Hub.head if Hub.head in commits else ONE) if revision == "main" else revision
        if commit not in commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api and words[4] == "revision":
            return self.answer(200, json.dumps({"id": source, "sha": commit, "siblings": []}).encode())
        if api:
            return self.answer(200, json.dumps([{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": f"{i:040x}"} for i, p in enumerate(sorted(commits[commit].iterdir()))]).encode())
        if status != 200:
            return self.answer(status, X_Error_Code=code)
        content = (commits[commit] / file[0]).read_bytes()
        self.answer(200, content, ETag=f'"{commit[0]}{hash(content):x}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


ASK = """
import json, os, sys, urllib.request
from valuecot.training.models import load_model
from valuecot.training.weights import fetch

found = {}
def ask(name, source, revision=""):
    try:
        origin = fetch(source, revision)
        model, _ = load_model(origin.folder)
        found[name] = {"revision": origin.revision, "chosen": origin.chosen, "files": sorted(p.name for p in origin.folder.iterdir()), "sum": float(sum(p.double().sum() for p in model.parameters()))}
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"

tell = lambda word: urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/" + word).read()
ask("first", "lab/tiny")
for name in sys.argv[1:]:
    ask(name, name)
ask("no such revision", "lab/tiny", "v9")
ask("no such path", "../weights/of/mine")
tell("move")
ask("later", "lab/tiny")
ask("named", "lab/tiny", "2" * 40)
tell("close")
ask("offline", "lab/tiny")
ask("offline and never seen", "lab/other")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "What our loading code says to a hub that answers in every way."
    base = tmp_path_factory.mktemp("hub")
    pickled, own = tiny(base / "pickled"), edit(tiny(base / "own"), "config.json", architectures=["GRewardModel"], auto_map={"AutoModel": "own.GRewardModel"})
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (own / "own.py").write_text("raise SystemExit('ran the code of a checkpoint')")
    empty = base / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing yet")
    Hub.head, Hub.repositories = ONE, {"lab/tiny": {ONE: tiny(base / "one", 1), TWO: tiny(base / "two", 2)}, "lab/pickled": {ONE: pickled}, "lab/own-code": {ONE: own}, "lab/empty": {ONE: empty}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.stop = lambda: (server.shutdown(), server.server_close())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(base / "home"), "VALUECOT_OUTPUTS": str(base / "outputs"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", ASK, *REFUSALS, "lab/pickled", "lab/own-code", "lab/empty"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"recorded": read_json(base / "outputs/cache/revisions.json")}


def test_the_first_commit_holds_when_the_owner_pushes_another(asked):
    first, later, named = asked["first"], asked["later"], asked["named"]
    assert first["revision"] == later["revision"] == ONE and first["sum"] == later["sum"] != named["sum"]
    assert named["revision"] == TWO and named["chosen"] == f"named by the setting, which wins over the recorded {ONE}"
    assert asked["recorded"]["lab/tiny"] == ONE and f"lab/tiny@{TWO}" not in asked["recorded"]


def test_a_whole_copy_serves_without_a_hub(asked):
    assert asked["offline"] == asked["later"]


def test_neither_pickles_nor_code_are_downloaded(asked):
    assert set(asked["first"]["files"]) <= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize(
    "name, said",
    {
        "lab/gated": "lab/gated is gated: accept its licence", "lab/no-access": "lab/no-access is gated", "lab/forbidden": "refuses lab/forbidden .status 403.: log in", "lab/missing": "no lab/missing, or it is private",
        "lab/gone": "no lab/gone", "lab/broken": "cannot deliver lab/broken now .status 500.", "no such revision": "lab/tiny has no revision 'v9'", "no such path": "neither a folder nor the name of a repository",
        "offline and never seen": "lab/other is not whole in the local cache and the hub cannot be reached", "lab/pickled": "pickled weights .* are never opened", "lab/own-code": "needs code of its own .GRewardModel., which the study never runs",
        "lab/empty": "holds no model",
    }.items(),
)
def test_what_cannot_be_had_is_told_in_one_line(asked, name, said):
    assert isinstance(asked[name], str), asked[name]
    assert re.search(said, asked[name]) and asked[name].startswith("OSError") and "\n" not in asked[name] and "127.0.0.1" not in asked[name], asked[name]


def test_of_two_first_downloads_one_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        kept = set(pool.map(lambda i: record("lab/tiny", str(i)), range(32)))
    assert len(kept) == 1 and recorded() == {"lab/tiny": kept.pop()}


def test_a_folder_is_known_by_its_files(tmp_path):
    folder = tiny(tmp_path / "m")
    before = fetch(str(folder)).revision
    edit(folder, "generation_config.json", temperature=0.5)
    assert fetch(str(folder)).revision != before
    with pytest.raises(ValueError, match="is a folder, which has no revision 'main'"):
        fetch(str(folder), "main")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "config.json").unlink(), "holds no model"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), "cannot be read"),
        (lambda f: edit(f, "config.json", model_type="llama9", architectures=None), "has no model type 'llama9'"),
        (lambda f: edit(f, "config.json", hidden_size=32), "wants .and"),
        (lambda f: edit(f, "config.json", num_hidden_layers=2), "has no model.layers.1"),
        (lambda f: edit(f, "config.json", architectures=["LlamaForSequenceClassification"]), "a judge and no language model"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda f: train_tokenizer([WORDS + " More words that it has never seen, like marmalade."] * 3, 400).save_pretrained(f), "tokenizer has .* tokens, the model's embedding"),
    ],
)
def test_a_folder_that_holds_no_whole_model_is_refused(tmp_path, spoil, said):
    folder = tiny(tmp_path / "m")
    spoil(folder)
    with pytest.raises((OSError, ValueError), match=said) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


# ---- the judge
def relabel(folder: Path, labels: int) -> Path:
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = labels
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def headless(folder: Path) -> Path:
    "A language model that calls itself a classifier with one label."
    return edit(tiny(folder), "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: relabel(f, 2), "has 2 labels: a reward is one number"),
        (lambda f: tiny(f), "LlamaForCausalLM, which has no head that scores"),
        (lambda f: headless(f), "has no score.weight"),
        (lambda f: edit(f, "config.json", architectures=["OtherRewardModel"], auto_map={"AutoModel": "own.GRewardModel"}), "needs code of its own"),
        (lambda f: edit(f, "tokenizer_config.json", pad_token=None), "has no pad token"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda f: train_tokenizer([WORDS + " Never seen: marmalade."] * 3, 400).save_pretrained(f), "tokenizer has .* tokens, the model's embedding"),
    ],
)
def test_what_is_no_judge_is_refused(tmp_path, spoil, said):
    folder = judge_in(tmp_path / "judge")
    ScalarReward(folder)
    spoil(folder)
    with pytest.raises((OSError, ValueError), match=said):
        ScalarReward(folder)


def pair(chosen: int, rejected: int, good: float, bad: float, name: str) -> dict:
    def say(n: int) -> list[dict]:
        return [{"role": "assistant", "content": " ".join([name] * n)}]

    return {"prompt": [{"role": "user", "content": name}], "chosen": say(chosen), "rejected": say(rejected), "good": good, "bad": bad}


def test_length_bias_is_found_and_its_absence_too():
    counting = [pair(n, m, n, m, str(i)) for i, (n, m) in enumerate([(3, 5), (4, 2), (5, 9), (6, 6), (7, 1)])]
    found = length_bias([*counting, counting[0]])
    assert found["spearman"] == pytest.approx(1) and found["responses"] == 5  # a repeated response counts once
    assert (found["worse_longer"]["accuracy"], found["worse_longer"]["n"], found["worse_shorter"]["accuracy"], found["worse_shorter"]["n"]) == (0.0, 3, 1.0, 2)
    fair = length_bias([pair(n, m, reward, 0, str(i)) for i, (n, m, reward) in enumerate([(1, 2, 2), (2, 1, 1), (3, 9, 2), (4, 1, 1)])])
    assert fair["spearman"] == pytest.approx(-0.4472136) and fair["worse_longer"]["accuracy"] == fair["worse_shorter"]["accuracy"] == 1
    flat = length_bias([pair(3, 3, 1, 1, str(i)) for i in range(3)])
    assert flat["spearman"] is None and flat["worse_longer"] == {"accuracy": None, "ci95": None, "n": 0}
    assert right_of([pair(1, 1, 1, 1, "tie")])["accuracy"] == 0


# ---- stages that take a folder of somebody else's
def a_run(stage: str, out: Path, overrides: str, model: str = "all") -> Run:
    "A stage's run on eight prompts of our own."
    out.mkdir(parents=True)
    prompts = [Prompt(f"p{i}", f"Should I keep the {thing} that I found?", "home", "care", "honesty", "open", split, 0) for i, thing in enumerate(["ring", "book", "coat", "lamp"]) for split in (["sft", "heldout"][i % 2],)]
    traces = [Trace(p.id, style, "rules", "care", "honesty", ("The user wants to keep it.",), "The user wants to keep it.", f"Ask who lost the {p.text.split()[4]} first.") for p in prompts for style in ("standard", "annealing")]
    write_records(out / "prompts.jsonl", prompts), write_records(out / "traces.jsonl", traces)
    return Run(stage, "geometry", "test", model, "all", 0, out, load("test", overrides), {"prompts/all/all/all": out, "traces/all/all/all": out})


def composite(folder: Path) -> Qwen3_5ForConditionalGeneration:
    "What Qwen3.5 is on the hub: a language model with a vision tower."
    fix(0)
    tokenizer = train_tokenizer([WORDS] * 3, 320, empty_think=True)
    text = scratch_config(ModelShape("scratch", "qwen3_5", 32, 4, 2, 1, 48, 320), tokenizer).to_dict() | {"vocab_size": 328}  # more rows than tokens, as there
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)).float().eval()
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return model


def test_a_composite_checkpoint_becomes_its_text_part_once(tmp_path):
    from datasets import Dataset
    from safetensors import safe_open
    from trl import GRPOConfig, GRPOTrainer

    whole = composite(tmp_path / "hub")
    run = a_run("base_model", tmp_path / "out", f"model.qwen.source={tmp_path / 'hub'}", "qwen")
    saved = run_base_model(run).path
    assert read_json(saved / "config.json")["architectures"] == ["Qwen3_5ForCausalLM"] and read_json(saved / "config.json")["model_type"] == "qwen3_5_text"
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "visual" in name] and any("visual" in name for name, _ in whole.named_parameters())
    model, tokenizer = load_model(saved)
    ids = encode(tokenizer, PROMPT, TRACE, True)["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert parameter_count(model) < parameter_count(whole)
    counts = read_json(run.out / "record.json")["counts"]
    assert counts["revision"] == fetch(str(tmp_path / "hub")).revision and counts["template"] == "the tokenizer's own"
    config = GRPOConfig(output_dir=str(tmp_path / "grpo"), use_cpu=True, bf16=False, report_to="none", beta=0.1, num_generations=2, per_device_train_batch_size=2)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": PROMPT.text}]}] * 2)
    trainer = GRPOTrainer(model=model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], args=config, train_dataset=rows, processing_class=tokenizer)
    assert type(trainer.ref_model).__name__ == "Qwen3_5ForCausalLM"


def test_the_chosen_template_is_read_from_disk_by_every_later_stage(tmp_path):
    folder = tiny(tmp_path / "hub")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="brings no chat template: set template = plain .* instruct variant"):
        run_base_model(a_run("base_model", tmp_path / "refused", f"model.llama.source={folder}", "llama"))
    run = a_run("base_model", tmp_path / "out", f"model.llama.source={folder} model.llama.template=plain", "llama")
    _, tokenizer = load_model(run_base_model(run).path)
    assert tokenizer.chat_template == plain and render(tokenizer, "May I?", True) == "<|begin|>user: May I?\nassistant: <think>\n"
    counts = read_json(run.out / "record.json")["counts"]
    assert (counts["template"], counts["end_of_turn"], counts["revision_chosen"]) == ("plain", "<|end|>", "hash of the folder's files")


def test_a_published_judge_is_measured_like_our_own(tmp_path):
    folder = judge_in(tmp_path / "hub")
    run = a_run("reward_model", tmp_path / "out", f"geometry.reward_model.source={folder}")
    saved = run_reward_model(run).path
    counts = read_json(run.out / "record.json")["counts"]
    assert counts["revision"] == fetch(str(folder)).revision and counts["length_bias"]["responses"] == 2
    low, high = counts["accuracy_ci95"]
    assert low <= counts["accuracy"] <= high and sum(f["n"] for f in counts["accuracy_by_fault"].values()) == counts["pairs_held_out"]
    assert ScalarReward(saved)(["May I?"], ["Ask."]) == ScalarReward(folder)(["May I?"], ["Ask."])


def test_the_judge_gets_its_numbers_from_held_out_prompts_alone(tmp_path):
    run = a_run("reward_model", tmp_path / "out", "")
    prompts, traces = read_records(run.out / "prompts.jsonl", Prompt), read_records(run.out / "traces.jsonl", Trace)
    seen = set()
    measured(lambda asked, responses: seen.update(asked) or [0.0] * len(asked), prompts, traces)
    assert seen == {p.text for p in prompts if p.split == "heldout"}


# ---- shapes
@pytest.mark.parametrize("name, millions", {"llama3-8b": 8030.3, "llama3-8b-instruct": 8030.3, "qwen2.5-7b": 7615.6, "qwen2.5-7b-instruct": 7615.6, "qwen": 752.4, "llama": 1235.8}.items())
def test_shapes_have_the_published_number_of_parameters(name, millions):
    shape = load("paper")[f"model.{name}"]
    with torch.device("meta"):
        ghost = AutoModelForCausalLM.from_config(shape_config(shape, vocab_size=shape.vocab))
    assert sum(p.numel() for p in ghost.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_scratch_model_takes_no_template_and_no_revision():
    for wrong in ("model.llama.template=plain", "model.llama.revision=main", "geometry.reward_model.revision=main"):
        with pytest.raises(ValueError, match="source = scratch"):
            load("tiny", wrong)
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        load("paper", "model.llama.template=plane")


# ---- real tokenizers, real templates
def real(tokenizer: str, template: str = ""):
    if not (SHARED / "tokenizers").exists():
        pytest.skip("no ../shared/data here")
    found = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / tokenizer)
    if template:
        found.chat_template = (SHARED / "chat_templates" / f"{template}.jinja").read_text()
    return found


@pytest.mark.parametrize("name, cases", [("qwen2.5", "qwen2"), ("llama3", "llama-bpe")])
def test_the_real_tokenizers_give_the_published_ids(name, cases):
    tokenizer, folder = real(name), SHARED / "tokenizers" / "expected_ids"
    texts = (folder / f"{cases}.inp").read_text().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in (folder / f"{cases}.out").read_text().splitlines()]
    assert [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[: len(ids)]] == ids and len(ids) >= 46


def composed(tokenizer, *parts: str | int) -> list[int]:
    "Ids put together by hand: special tokens by number, texts between them on their own."
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer(part, add_special_tokens=False)["input_ids"])]


THOUGHT = "<think>\nThe user wants to keep it.\n</think>\n\nAsk who lost it first."


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "llama3 plain"])
def test_exact_ids_of_prompt_and_text(name, thinking, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = real(name.split()[0], "meta-llama-Llama-3.1-8B-Instruct" if name == "llama3" else "")
    choose_template(tokenizer, "plain" if "plain" in name else "", name)
    said = THOUGHT if thinking else TRACE.response
    if name == "llama3":
        begin, head, close, turn = 128000, 128006, 128007, 128009
        asked = composed(tokenizer, begin, head, "system", close, "\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", turn, head, "user", close, "\n\n" + PROMPT.text, turn, head, "assistant", close, "\n\n")
        whole = asked + composed(tokenizer, said, turn)
    elif name == "qwen2.5":
        begin, end = 151644, 151645
        asked = composed(tokenizer, begin, "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.", end, "\n", begin, "user\n" + PROMPT.text, end, "\n", begin, "assistant\n")
        whole = asked + composed(tokenizer, said, end, "\n")
    else:
        asked = composed(tokenizer, 128000, f"user: {PROMPT.text}\nassistant:" + (" <think>\n" if thinking else ""))
        whole = asked + composed(tokenizer, said.removeprefix("<think>\n") if thinking else " " + said, 128009)
    ours = encode(tokenizer, PROMPT, TRACE, thinking)
    assert tokenizer(render(tokenizer, PROMPT.text, thinking), add_special_tokens=False)["input_ids"] == asked
    assert ours["input_ids"].tolist() == whole and (ours["labels"] != -100).tolist() == [i >= len(asked) for i in range(len(whole))]
    assert tokenizer.bos_token_id is None or whole.count(tokenizer.bos_token_id) == 1
    config = shape_config(ModelShape("scratch", "llama", 8, 1, 1, 1, 8, 8), vocab_size=len(tokenizer))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=512)
    trainer = SFTTrainer(model=AutoModelForCausalLM.from_config(config), args=args, train_dataset=Dataset.from_list([conversation(PROMPT, TRACE, thinking)]), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"][0].tolist() == whole and batch["labels"][0].tolist() == ours["labels"].tolist()


@pytest.mark.parametrize("thinking", [True, False])
def test_qwen3_5_thinks_or_not_as_it_is_told(thinking):
    "Its own vocabulary is not here: the text is what its template writes."
    tokenizer = real("qwen2.5", "Qwen3.5-0.8B")
    choose_template(tokenizer, "", "Qwen3.5")
    check_format(tokenizer, PROMPT, TRACE)
    asked, text = render(tokenizer, PROMPT.text, thinking), tokenizer.decode(encode(tokenizer, PROMPT, TRACE, thinking)["input_ids"])
    block = "<think>\n" if thinking else "<think>\n\n</think>\n\n"
    assert asked == f"<|im_start|>user\n{PROMPT.text}<|im_end|>\n<|im_start|>assistant\n{block}"
    assert text == asked + (THOUGHT.removeprefix("<think>\n") if thinking else TRACE.response) + "<|im_end|>\n"


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.1-8B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3.5-4B"])
def test_no_prompt_knows_what_day_it_is(name):
    tokenizer = real("llama3" if "llama" in name else "qwen2.5", name)
    check_format(tokenizer, PROMPT, TRACE)
    assert date.today().strftime("%d %b %Y") not in render(tokenizer, PROMPT.text, True)


def test_a_template_that_rewrites_the_turn_is_refused():
    with pytest.raises(ValueError, match="no prefix of the whole text"):
        check_format(real("llama3", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"), PROMPT, TRACE)


def test_a_prompt_that_ends_inside_a_token_is_refused(tmp_path):
    tokenizer = real("llama3")
    choose_template(tokenizer, "plain", "llama3")
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant:'", "'assistant: '")
    with pytest.raises(ValueError, match="reaches across the end of the prompt"):
        encode(tokenizer, PROMPT, TRACE, False)


def test_what_ends_a_turn_ends_generation(tmp_path):
    tokenizer = real("qwen2.5")
    tokenizer.eos_token = "<|endoftext|>"  # as the base model ships it, whose template ends turns otherwise
    choose_template(tokenizer, "", "Qwen2.5 base")
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match="no special token: generation would not know where to stop"):
        choose_template(tokenizer, "", "endless")


@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_tags_of_several_tokens_survive_decoding(name):
    tokenizer = real(name)
    ids = tokenizer(THOUGHT, add_special_tokens=False)["input_ids"]
    assert len(tokenizer("<think>", add_special_tokens=False)["input_ids"]) > 1 and tokenizer.decode(ids, skip_special_tokens=True) == THOUGHT
    choose_template(tokenizer, "plain", name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with pytest.raises(ValueError, match="loses the think tags"):
        check_format(tokenizer, PROMPT, TRACE)


# ------------------------------------------------------------------------- GRM with a head of its own


@pytest.mark.parametrize("widths", [[1], [24, 1], [24, 12, 1]])
def test_a_judge_with_a_head_of_several_layers_is_read_and_saved(tmp_path, widths):
    from transformers import LlamaConfig

    from valuecot.training.judge import GRewardModel, ScalarReward, read_judge
    from valuecot.training.models import fix, save_model, train_tokenizer

    fix(0)
    tokenizer = train_tokenizer(["May I keep the ring? Ask who lost it."] * 3, 320)
    model = GRewardModel(LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1), widths)
    save_model(model, tokenizer, tmp_path / "theirs")
    edit(tmp_path / "theirs", "config.json", dtype="bfloat16")  # as published; scored in float32 all the same
    names = {name for name, _ in model.named_parameters() if name.startswith("v_head")}
    assert names == ({"v_head.summary.weight", "v_head.summary.bias"} if len(widths) == 1 else {f"v_head.summary.{2 * i}.{kind}" for i in range(len(widths)) for kind in ("weight", "bias")})
    judge = ScalarReward(tmp_path / "theirs")
    scores = judge(["May I keep the ring?"] * 2, ["Ask.", "Ask who lost it first, and then decide."])
    text = tokenizer.apply_chat_template([{"role": "user", "content": "May I keep the ring?"}, {"role": "assistant", "content": "Ask."}], tokenize=False)
    state = model.model(input_ids=torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).last_hidden_state[0, -1]
    for i, layer in enumerate(m for m in model.v_head.modules() if isinstance(m, torch.nn.Linear)):
        state = layer(torch.relu(state) if i else state)
    assert scores[0] == pytest.approx(float(state), abs=1e-6) and scores[0] != scores[1]
    save_model(*read_judge(tmp_path / "theirs"), tmp_path / "ours")
    assert ScalarReward(tmp_path / "ours")(["May I keep the ring?"] * 2, ["Ask.", "Ask who lost it first, and then decide."]) == scores


def test_a_head_that_lacks_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig

    from valuecot.training.judge import GRewardModel, read_judge

    GRewardModel(LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), [24, 1]).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for missing, said in {"v_head.summary.0.bias": "is not what a GRewardModel", "v_head.summary.2.weight": "has no v_head.summary that ends in one number"}.items():
        save_file({k: v for k, v in whole.items() if k != missing}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            read_judge(tmp_path)
