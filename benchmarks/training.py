"""Our SFT and GRPO against plain TRL with the same arguments: CPU time of whole trainings, in alternating pairs.

`make bench ARGS=training`, or `python benchmarks/training.py --pairs 10`. Both sides get one model, one data set, one seed and the same TRL arguments, and end
with the same weights (checked). Ours adds its checks, the record of completions and the stop conditions; with `--checkpoints` also sealed checkpoints every 5 updates.
Results: outputs/bench/training.json."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOTrainer, SFTTrainer

from valuecot.data.world import generate
from valuecot.settings import load
from valuecot.teacher.rules import write_trace
from valuecot.training.arguments import grpo_config, sft_config
from valuecot.training.grpo import train_grpo
from valuecot.training.models import conversation, fix, load_model, parameter_count, save_model, scratch_model, template_options, train_tokenizer
from valuecot.training.sft import train_sft

OUT = Path(__file__).parents[1] / "outputs" / "bench"


def letters(prompts, completions, **columns) -> list[float]:
    return [float(c[-1]["content"].count("e")) for c in completions]


def start(folder: Path, settings):
    "A model of the tiny profile, on disk, with prompts and traces."
    prompts = generate(64, seed=0)
    traces = [write_trace(p, "standard", settings["geometry.traces"].words, 0) for p in prompts]
    fix(0)
    shape = settings["model.llama"]
    tokenizer = train_tokenizer([t for p, trace in zip(prompts, traces, strict=True) for t in (p.text, trace.reasoning, trace.response)], shape.vocab)
    save_model(scratch_model(shape, tokenizer), tokenizer, folder)
    return prompts, traces


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(kind: str, begin: Path, place: Path, rows: list[dict], settings):
    "TRL alone."
    model, tokenizer = load_model(begin)
    if kind == "sft":
        trainer = SFTTrainer(model=model, args=sft_config(settings, 0, place), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    else:
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows])
        trainer = GRPOTrainer(model=model, reward_funcs=[letters], args=grpo_config(settings, template_options(True), 0, place), train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def ours(kind: str, begin: Path, place: Path, rows: list[dict], settings, key: str):
    model, tokenizer = load_model(begin)
    if kind == "sft":
        train_sft(model, tokenizer, rows, settings, 0, place, "cpu", key)
    else:
        train_grpo(model, tokenizer, rows, letters, settings, True, 0, place, "cpu", key)
    return model


def timed(function, *args) -> tuple[float, torch.Tensor]:  # CPU seconds
    fix(0)
    began = time.process_time()
    model = function(*args)
    return time.process_time() - began, weights(model)


def compare(kind: str, begin: Path, rows: list[dict], settings, pairs: int, key: str) -> dict[str, object]:
    "Ratios of ours over plain TRL."
    ratios, seconds = [], []
    for i in range(-1, pairs):  # the first pair warms up
        with tempfile.TemporaryDirectory() as place:
            sides = [(ours, key), (plain,)]
            found = {}
            for function, *more in sides if i % 2 else sides[::-1]:
                found[function.__name__], w = timed(function, kind, begin, Path(place) / function.__name__, rows, settings, *more)
                found[f"{function.__name__} weights"] = w
        if not torch.equal(found["ours weights"], found["plain weights"]):
            raise RuntimeError(f"{kind}: the two sides end with other weights")
        if i >= 0:
            ratios.append(found["ours"] / found["plain"])
            seconds.append((found["ours"], found["plain"]))
    return {"ratio median": round(statistics.median(ratios), 3), "ratio min": round(min(ratios), 3), "ratio max": round(max(ratios), 3), "pairs": pairs, "rows": len(rows), "cpu seconds (ours, plain), medians": [round(statistics.median(s), 2) for s in zip(*seconds, strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--checkpoints", action="store_true", help="ours writes sealed checkpoints every 5 updates")
    args = parser.parse_args()
    every = "geometry.sft.checkpoint_every=5 geometry.grpo.checkpoint_every=5" if args.checkpoints else ""
    settings = load("tiny", f"geometry.sft.epochs=2 geometry.grpo.max_completion_length=64 {every}")
    with tempfile.TemporaryDirectory() as folder:
        begin = Path(folder) / "model"
        prompts, traces = start(begin, settings)
        rows = {"sft": [conversation(p, t, True) for p, t in zip(prompts, traces, strict=True)], "grpo": [{"prompt": p.text} for p in prompts[:48]]}
        found = {kind: compare(kind, begin, rows[kind], settings[f"geometry.{kind}"], args.pairs, "bench" if args.checkpoints else "") for kind in rows}
        found["parameters"] = parameter_count(load_model(begin)[0])
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
