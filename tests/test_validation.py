"""Looks at validation rows while a policy learns: they change no bit of it, survive a kill, and count what they say."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.torch import load_file
from test_resume import PROMPTS, TRACES, same, start

from valuecot.settings import GRPO, SFT, Machine, load
from valuecot.store import write_json
from valuecot.text import parse_answer
from valuecot.training.launch import Work, do, read_work
from valuecot.training.models import conversation, load_model, render
from valuecot.training.sampling import complete
from valuecot.training.validation import Validation, best_look

ASKED = Validation(tuple(p.text for p in PROMPTS), tuple("AB" * 4), points=3, temperature=0.7, top_p=0.95, top_k=0, longest=12, batch_size=4)


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    return start(tmp_path_factory.mktemp("validation") / "begin")


def work_of(kind: str, begin, place, asked: Validation | None) -> Work:
    if kind == "sft":
        settings, rows = SFT(3, 2, 1e-2, "cosine", 0.1, 0.0, 1.0, 256, 2), [conversation(p, t, True) for p, t in zip(PROMPTS, TRACES, strict=True)]
        return Work("sft", begin, place / "model", place, rows, asdict(settings), True, 0, "ours", validation=asked)
    settings = GRPO(1, 8, 4, 0.1, 1e-2, "cosine", 0.1, "grpo", "group", 0.2, 1, False, 1.0, 1.0, 6, 0.0, 1.0, 4)
    return Work("grpo", begin, place / "model", place, [{"prompt": p.text, "gold": "A"} for p in PROMPTS], asdict(settings), True, 0, "ours", reward="format", validation=asked)


@pytest.mark.parametrize("kind, steps", [("sft", 12), ("grpo", 4)])
def test_looks_change_no_bit_of_a_training(kind, steps, begin, tmp_path):
    with_looks = do(work_of(kind, begin, tmp_path / "a", ASKED))
    do(work_of(kind, begin, tmp_path / "b", None))
    assert same(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab"))
    seen = [row["step"] for row in with_looks if "validation_accuracy" in row]
    assert seen == [round(i * steps / 3) for i in range(4)], "before the first update, evenly, and at the end"
    model, tokenizer = load_model(tmp_path / "a" / "model")
    written = complete(model, tokenizer, [render(tokenizer, p, True) for p in ASKED.prompts], 12, 0.7, 4, 0, 0.95, 0)
    right = sum(parse_answer(text) == gold for (text, _, _), gold in zip(written, ASKED.golds, strict=True)) / 8
    assert [row for row in with_looks if "validation_accuracy" in row][-1]["validation_accuracy"] == right, "the last look is of the weights that are saved"


def test_a_work_survives_the_disk(tmp_path, begin):
    work = work_of("sft", begin, tmp_path, ASKED)
    write_json(tmp_path / "work.json", work)
    assert read_work(tmp_path / "work.json") == work


def test_parted_models_are_refused_before_anything_runs(tmp_path, begin):
    parted = replace(work_of("sft", begin, tmp_path, ASKED), machine=Machine(2, "fsdp2"))
    with pytest.raises(ValueError, match="steerable.validation.points=0"):
        do(parted)


def found(values: list[float], n: int):
    return best_look([{"step": i, "metric": "validation_accuracy", "value": v} for i, v in enumerate(values)], n)


def test_the_best_is_flagged_beyond_chance_alone():
    assert found([0.5, 0.9, 0.5], 100).flagged and found([0.5, 0.9, 0.5], 100).step == 1
    assert not found([0.5, 0.55, 0.5], 100).flagged and not found([0.1, 0.5, 0.9], 100).flagged and not found([0.5], 10).flagged
    assert found([0.9, 0.1, 0.9], 10).step == 0 and not found([0.9, 0.1, 0.9], 10).flagged, "the first of equals"


@pytest.mark.parametrize("looks, n", [(21, 500), (9, 48), (5, 48)])
def test_a_policy_that_does_not_change_is_hardly_ever_flagged(looks, n):
    rng = np.random.default_rng(0)
    flagged = np.mean([found((rng.binomial(n, 0.6, looks) / n).tolist(), n).flagged for _ in range(2000)])
    assert flagged < 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5
    better = np.mean([found([*(rng.binomial(n, 0.6, looks - 2) / n), 0.95, 0.6], n).flagged for _ in range(200)])
    assert better == 1.0


def test_stop_strings_hold_for_looks_too(begin, tmp_path):
    seen = []
    import valuecot.training.validation as module

    look, module.complete = module.complete, lambda *a, stop, **more: seen.append(stop) or [("Answer: A", 3, False)] * len(ASKED.prompts)
    try:
        do(work_of("sft", begin, tmp_path, replace(ASKED, stop=("###",))))
    finally:
        module.complete = look
    assert set(seen) == {("###",)} and len(seen) == 4


def test_no_points_no_looks():
    assert load("test", "steerable.validation.points=0")["steerable.validation"].points == 0
