"""A model and texts that a user brings: what can be read, what is refused, and that the shares of tokens are lambda_1."""

import csv
import json
import math
from pathlib import Path

import nbformat
import pytest
import torch

import valuecot.flow.plan as plans
from valuecot.data.chats import Chat, chat_of, read_chats
from valuecot.flow.plan import Job, Plan
from valuecot.flow.run import begin, execute
from valuecot.geometry.own_model import run_own_model, shown_numbers, stage
from valuecot.settings import ModelShape, load
from valuecot.store import load_tensors, read_json
from valuecot.training.models import fix, save_model, scratch_model, train_tokenizer
from valuecot.training.own import brought, encode_chat, forecast, own_tokenizer, quarters, rows_of, shape_of, shares_by, window
from valuecot.types import Landscape, Spectrum
from valuecot.view.density import density_figure

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"
SHAPE = ModelShape("scratch", "llama", 16, 1, 2, 1, 24, 300)
TALK = [("user", "May I break the promise?"), ("assistant", "<think>\nA promise is a promise.\n</think>\n\nAsk her first.")]
ROWS = [{"messages": [{"role": role, "content": content} for role, content in TALK]}, {"prompt": "May I? ", "completion": "Ask her first."}, {"text": "She gave her <b>word</b>, and kept it."}]
SMALL = "own_model.examples=3 own_model.k=2 own_model.tol=1e-3 own_model.max_matvecs=60 own_model.probes=2 own_model.density_probes=1 own_model.steps=6 own_model.grid=3"


@pytest.fixture(scope="module")
def brought_model(tmp_path_factory):
    "A folder as somebody else would have saved it."
    fix(0)
    tokenizer = train_tokenizer([row_text for _, row_text in TALK] * 4, 300)
    return save_model(scratch_model(SHAPE, tokenizer), tokenizer, tmp_path_factory.mktemp("own") / "mine")


@pytest.fixture
def chats(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "mine.jsonl"


@pytest.fixture(autouse=True)
def no_study(tmp_path, monkeypatch):
    "Outputs in which nothing was ever run."
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    plans.forget()
    yield
    plans.forget()


# ------------------------------------------------------------------------------ rows


def test_three_forms_are_read(chats):
    found = list(read_chats(chats))
    assert [c.scored for c in found] == [TALK[1][1], "Ask her first.", ROWS[2]["text"]]
    assert [c.line for c in found] == [1, 2, 3] and found[1].prompt == "May I? "


def test_the_last_turn_of_the_assistant_counts_and_what_follows_is_cut():
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))]
    assert chat_of({"messages": turns, "id": 7}, 1, "line 1").messages[-1] == ("assistant", "d")
    assert chat_of({"messages": turns[:2]}, 1, "line 1").scored == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n  \n", "is empty"),
        ('{"text": "a"}\n{"text": "b', r"line 2 is not JSON \(the line has no end: half written\?\)"),
        ("[1, 2]\n", r"line 1 is \[1, 2\]"),
        ('{"question": "a"}\n', r'line 1 has the keys \["question"\]'),
        ('{"prompt": "a"}\n', "line 1 has the keys"),
        ('{"text": 3}\n', "text is 3, not a text"),
        ('{"messages": []}\n', "not a list of turns"),
        ('{"messages": [{"role": "user"}]}\n', "turn 1 is .*without role and content"),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', "has role"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', "turn 1: content is .*not a text"),
        ('{"text": "' + "a" * 80 + '"}{\n', r"line 1 is not JSON: .*\.\.\."),
    ],
)
def test_a_fault_names_the_line_and_what_would_do(tmp_path, text, said):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        list(read_chats(tmp_path / "bad.jsonl"))
    assert '{"messages"' in str(error.value) or "roles are" in str(error.value)


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "zip.jsonl").write_bytes(b"\x1f\x8b\xff\xfe" * 8)
    with pytest.raises(ValueError, match="no UTF-8 text"):
        list(read_chats(tmp_path / "zip.jsonl"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        list(read_chats(tmp_path))
    (tmp_path / "list.jsonl").write_text("[" + "1," * 6_000_000)
    with pytest.raises(ValueError, match="line 1 has more than"):
        list(read_chats(tmp_path / "list.jsonl"))


def test_a_file_is_read_no_further_than_is_needed(tmp_path, brought_model):
    (tmp_path / "long.jsonl").write_text('{"text": "She gave her word."}\n' * 5000 + "broken")
    rows = rows_of(own_tokenizer(brought_model)[0], read_chats(tmp_path / "long.jsonl"), 3, 99)
    assert rows.counts == {"rows read": 3, "used": 3, "of these seen before": 2, "too long": 0, "nothing scored": 0}


# ------------------------------------------------------------------------------ labels


def test_only_the_last_turn_is_scored_and_roles_follow_the_tags(brought_model):
    tokenizer, template = own_tokenizer(brought_model)
    example, roles = encode_chat(tokenizer, Chat(1, tuple(TALK)))
    scored = tokenizer.decode(example["input_ids"][example["labels"] != -100])
    assert scored == "A promise is a promise.\n</think>\n\nAsk her first.<|end|>\n" and template == "the tokenizer's own"
    parts = {role: tokenizer.decode([int(i) for i, r in zip(example["input_ids"], roles, strict=True) if r == role]) for role in dict.fromkeys(roles)}
    assert list(parts) == ["prompt", "reasoning", "response"] and parts["reasoning"] == "A promise is a promise.\n</think>" and "promise?" in parts["prompt"]


def test_a_prompt_is_not_scored_and_a_text_is(brought_model):
    tokenizer = own_tokenizer(brought_model)[0]
    example, roles = encode_chat(tokenizer, Chat(1, prompt="May I? ", completion="Ask her."))
    assert tokenizer.decode(example["input_ids"][example["labels"] != -100]).strip() == "Ask her." and set(roles) == {"prompt", "completion"}
    example, roles = encode_chat(tokenizer, Chat(1, completion="Ask her."))
    assert (example["labels"] != -100).all() and set(roles) == {"text"}


def test_a_model_without_a_template_gets_ours_and_says_so(brought_model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((brought_model / name).read_text())
    assert "since the model brings none" in own_tokenizer(tmp_path)[1]
    example, _ = encode_chat(own_tokenizer(tmp_path)[0], Chat(1, tuple(TALK)))
    assert int((example["labels"] != -100).sum()) > 3


def test_a_template_that_refuses_or_changes_a_turn_names_the_line(brought_model):
    tokenizer = own_tokenizer(brought_model)[0]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 7: the chat template refuses its turns \(user, assistant\): roles must"):
        encode_chat(tokenizer, Chat(7, tuple(TALK)))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% if not loop.last %}|{% endif %}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(ValueError, match="line 7: the chat template changes the assistant's turn"):
        encode_chat(tokenizer, Chat(7, tuple(TALK)))


def test_long_and_empty_rows_are_left_out_and_counted(brought_model):
    tokenizer = own_tokenizer(brought_model)[0]
    chats = [Chat(1, completion="a " * 500), Chat(2), Chat(3, (("user", "a"), ("assistant", " "))), Chat(4, completion="Ask her.")]
    assert rows_of(tokenizer, chats, 9, 50).counts == {"rows read": 4, "used": 1, "of these seen before": 0, "too long": 1, "nothing scored": 2}
    with pytest.raises(ValueError, match="of 3 rows 1 have more than 50 tokens .* and 2 have nothing to score"):
        rows_of(tokenizer, chats[:3], 9, 50)


def test_shares_and_quarters():
    assert [quarters(5).count(q) for q in dict.fromkeys(quarters(5))] == [2, 1, 1, 1] and len(quarters(1)) == 1
    rows = shares_by([[0.5, -0.25], [0.75]], [["a", "b"], ["a"]])
    assert rows == [{"group": "a", "share": 1.25, "tokens": 2}, {"group": "b", "share": -0.25, "tokens": 1}]


# ------------------------------------------------------------------------------ the plan


def test_the_plan_needs_no_weights(brought_model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (brought_model / name).exists():
            (tmp_path / name).write_text((brought_model / name).read_text())
    shape, settings = shape_of(tmp_path), load("test", SMALL)["own_model"]
    rows = rows_of(own_tokenizer(tmp_path)[0], [Chat(1, tuple(TALK))], 1, window(shape, 4096))
    plan = forecast(shape, rows, settings, torch.device("cpu"))
    assert plan.cost.parameters == sum(p.numel() for p in shape.parameters()) and plan.fits and plan.products == 4 * 60 + 2 + 6
    assert {r["what"] for r in plan.rows()} >= {"peak memory", "free memory", "one product, at least"} and all(r["value"] > 0 for r in plan.rows())


def test_the_window_is_the_smaller_of_the_model_s_and_the_settings(brought_model):
    shape = shape_of(brought_model)
    assert window(shape, 99) == 99 and window(shape, 10**9) == shape.config.max_position_embeddings == 4096


# ------------------------------------------------------------------------------ the stage


def start(model, chats, out, more=""):
    return begin(stage, "test", out=str(out), overrides=brought(f"{SMALL} {more}", str(model), str(chats)))


def test_a_model_and_chats_are_all_that_is_needed(brought_model, chats, tmp_path):
    run = start(brought_model, chats, tmp_path / "out")
    assert run.inputs == {}
    made = run_own_model(run)
    found = read_json(run.out / "attribution.json")
    assert found["agrees"] and found["relative_difference"] <= 1e-4
    for by in ("roles", "quarters", "rows"):
        assert math.fsum(row["share"] for row in found[by]) == pytest.approx(1, abs=1e-6)
    assert math.fsum(x for text in found["tokens"] for x in text["shares"] if x is not None) == pytest.approx(1, abs=1e-6)
    assert {row["group"] for row in found["roles"]} == {"reasoning", "response", "completion", "text"}
    assert all(len(t["pieces"]) == len(t["roles"]) == len(t["shares"]) for t in found["tokens"]) and "".join(found["tokens"][2]["pieces"]) == ROWS[2]["text"]
    spectrum, land = load_tensors(run.out / "spectrum.safetensors", Spectrum), load_tensors(run.out / "landscape.safetensors", Landscape)
    assert found["lambda_1"] == float(spectrum.eigenvalues[0]) and land.loss.shape == (3, 3) and float(land.loss[1, 1]) == pytest.approx(land.center, rel=1e-6)
    rows = read_json(run.out / "spectrum.json")["eigenvalues"]
    assert [r["eigenvalue (nats)"] for r in rows[:2]] == spectrum.eigenvalues.tolist() and all(r["relative residual"] <= 1e-3 for r in rows if r["converged"])
    weights = torch.tensor(read_json(run.out / "density.json")["weights"])
    assert weights.sum(-1).tolist() == pytest.approx([1.0])
    assert {p.name for p in run.out.glob("*.png")} == {"density_figure.png", "surface.png", "contours.png", "shares_figure.png"}
    assert "&lt;b&gt;" in "".join(t.text for t in run_texts(made)) and not any("<b>word" in t.text for t in run_texts(made))
    assert "lambda" in shown_numbers(made).text


def run_texts(made):
    from valuecot.geometry.own_model import shown_tokens

    return shown_tokens(made["attribution"], most=3)


def test_lambda_1_is_that_of_a_second_library(brought_model, chats, tmp_path):
    from scipy.sparse.linalg import LinearOperator, eigsh

    from valuecot.curvature import LossHessian
    from valuecot.training.models import load_model

    run_own_model(run := start(brought_model, chats, tmp_path / "out"))
    model, tokenizer = load_model(brought_model)
    rows = rows_of(own_tokenizer(brought_model)[0], read_chats(chats), 3, 4096)
    H = LossHessian(model, rows.examples)
    product = LinearOperator((H.n, H.n), matvec=lambda v: (H @ torch.tensor(v, dtype=torch.float32).flatten()).numpy(), dtype="float32")
    assert read_json(run.out / "attribution.json")["lambda_1"] == pytest.approx(float(eigsh(product, k=1, which="LA", tol=1e-4)[0][0]), rel=2e-3)


def test_plan_only_reads_no_weight(brought_model, chats, tmp_path):
    (tmp_path / "bare").mkdir()
    for file in brought_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    made = run_own_model(run := start(tmp_path / "bare", chats, tmp_path / "out", "own_model.plan_only=yes"))
    assert {p.name for p in run.out.iterdir()} == {"plan.csv", "rows.csv", "record.json"} and "Nothing was measured" in shown_numbers(made).text
    with open(run.out / "plan.csv") as file:
        assert float({r["what"]: r["value"] for r in csv.DictReader(file)}["peak memory"]) > 0
    with pytest.raises(OSError, match="no \\*.safetensors; pickled"):
        run_own_model(start(tmp_path / "bare", chats, tmp_path / "again"))


def test_pickled_weights_are_refused_and_never_opened(brought_model, chats, tmp_path):
    (folder := tmp_path / "pickled").mkdir()
    for file in brought_model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/opened'\ntR.".encode())
    with pytest.raises(OSError, match="pickled"):
        run_own_model(start(folder, chats, tmp_path / "out"))
    assert not (tmp_path / "opened").exists()


def test_a_folder_without_a_model_and_a_model_with_its_own_code_are_refused(brought_model, chats, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(OSError, match="nothing"):
        run_own_model(start(tmp_path / "nothing", chats, tmp_path / "out"))
    (folder := tmp_path / "coded").mkdir()
    for file in brought_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(OSError):
        run_own_model(start(folder, chats, tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_refused_before_it_is_loaded(brought_model, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("valuecot.training.own.free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="lower own_model.token_budget"):
        run_own_model(start(brought_model, chats, tmp_path / "out"))


# ------------------------------------------------------------------------------ settings and keys


def test_the_first_candidate_that_is_there_is_measured(brought_model, tmp_path):
    def chosen(text):
        return load("test", f"own_model.model={text}")["own_model"]

    assert chosen(f"no/such/folder/at/all,{brought_model},base_model").chosen == str(brought_model)
    assert chosen("no/such/folder/at/all,base_model").fallback == ("base_model",)
    assert chosen("Qwen/Qwen2.5-0.5B,base_model").chosen == "Qwen/Qwen2.5-0.5B"
    run = begin(stage, "test", out=str(tmp_path / "x"), overrides="own_model.model=no/such/folder/at/all own_model.chats=README.md")
    with pytest.raises(FileNotFoundError, match="none is there"):
        run_own_model(run)
    with pytest.raises(ValueError, match="own_model.model is empty"):
        chosen("")
    with pytest.raises(ValueError, match="comma"):
        brought("", "a,b", "")


def test_inputs_are_those_that_are_read(brought_model, chats):
    job = Job("geometry", "own_model")

    def inputs(text):
        return [j.stage for j in Plan("test", "geometry", text).inputs(job)]

    assert sorted(inputs("own_model.model=base_model")) == ["base_model", "prompts", "traces"]
    assert inputs(f"own_model.model={brought_model}") == ["prompts", "traces"]
    assert inputs(f"own_model.model=base_model own_model.chats={chats}") == ["base_model"]
    assert inputs(f"own_model.model={brought_model} own_model.chats={chats}") == []
    both = Plan("test", "geometry", "geometry.design.models=qwen,llama own_model.model=base_model")
    assert [j.model for j in both.inputs(job) if j.stage == "base_model"] == ["qwen"]


def test_without_chats_the_study_has_to_be_run_first(brought_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="this stage needs prompts.*make study PROFILE=test"):
        begin(stage, "test", out=str(tmp_path / "out"), overrides=brought("", str(brought_model), ""))


def test_the_key_follows_the_contents_of_the_folder_and_the_file(brought_model, chats, tmp_path):
    (folder := tmp_path / "copy").mkdir()
    for file in brought_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    keys, job = [], Job("geometry", "own_model")
    for path, text in (("config.json", None), ("config.json", "{}"), ("more.txt", "x")):
        if text is not None:
            (folder / path).write_text(text)
        plans.forget()
        keys.append(Plan("test", "geometry", brought("", str(folder), str(chats))).key(job))
    chats.write_text('{"text": "another"}\n')
    plans.forget()
    keys.append(Plan("test", "geometry", brought("", str(folder), str(chats))).key(job))
    assert len({k["files"] for k in keys}) == 4 and len({k["settings"] for k in keys}) == len({k["inputs"] for k in keys}) == 1
    with pytest.raises(FileNotFoundError, match="no such file"):
        Plan("test", "geometry", f"own_model.model=base_model own_model.chats={tmp_path}/none.jsonl").key(job)


# ------------------------------------------------------------------------------ as a user runs it


def test_papermill_needs_a_model_and_chats_alone(brought_model, chats, tmp_path):
    (out := tmp_path / "out").mkdir()
    execute(ROOT / "nbs/geometry/80_own_model.ipynb", out, {"profile": "test", "model": str(brought_model), "chats": str(chats), "out": str(out), "overrides": "own_model.examples=3"})
    notebook = nbformat.read(out / "run.ipynb", 4)
    outputs = json.dumps([o for cell in notebook.cells for o in cell.get("outputs", [])], ensure_ascii=False)
    assert "Shares of tokens sum to" in outputs and "NOT as close" not in outputs and "share of lambda_1" in outputs and (out / "surface.png").exists()
    assert not (out / "run.json").exists()  # a run by hand marks nothing complete


@pytest.mark.skipif(not (SHARED / "lm_stories260K").exists(), reason="no ../shared/data/lm_stories260K here")
def test_stories_by_a_model_that_knows_them(tmp_path):
    stories = json.loads((SHARED / "tinystories" / "tinystories_1000.json").read_text())[:3]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": s[:120]}) + "\n" for s in stories))
    made = run_own_model(start(SHARED / "lm_stories260K", tmp_path / "stories.jsonl", tmp_path / "out", "own_model.examples=2"))
    assert made["curvature"].loss < 3 and made["attribution"]["agrees"] and made["checks"][0]["relative_difference"] < 0.02
    assert made["rows"].set_index("rows")["count"]["used"] == 2


def test_a_density_without_weight_is_refused():
    from valuecot.curvature.stochastic import Density

    with pytest.raises(ValueError, match="no node with a weight"):
        density_figure(Density(torch.zeros(1, 3), torch.zeros(1, 3), 0), 9, {})
