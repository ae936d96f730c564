"""SFT and GRPO at true size: Qwen3.5-0.8B and Llama-3.2-1B shapes with random weights, a judge of GRM's shape, the paper profile's settings.

    python benchmarks/true_size_training.py sft --model qwen
    python benchmarks/true_size_training.py grpo --model llama --precision float32

Each piece runs a few updates by the study's own trainers and writes one JSON file to --out (outputs/reference by default) with peak memory, seconds and tokens
per second, card, sizes and versions. Random weights never end a completion, so generation runs to its limit: a ceiling for time. `--small` runs the same code on
shapes that a CPU can hold: a rehearsal, whose files say so. The true shapes need a GPU with 80 GB."""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, TrainerCallback
from true_size import configuration

from valuecot.data.world import generate
from valuecot.settings import load
from valuecot.teacher.rules import write_trace
from valuecot.training.checkpoints import fit
from valuecot.training.grpo import grpo_trainer, judge_reward
from valuecot.training.judge import ScalarReward
from valuecot.training.models import conversation, fix, load_model, opens_thinking, parameter_count, save_model, train_tokenizer
from valuecot.training.sft import sft_trainer

ROOT = Path(__file__).parents[1]


class Clock(TrainerCallback):
    "Seconds of each update."

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(round(time.monotonic() - self.began, 3))


def start(args, folder: Path, device: str):
    "Model and judge with random weights on disk, prompts and traces of the small world."
    fix(0)
    prompts = generate(args.rows, seed=0)
    traces = [write_trace(p, "annealing", 130, 0) for p in prompts]
    tokenizer = train_tokenizer([t for p, trace in zip(prompts, traces, strict=True) for t in (p.text, trace.reasoning, trace.response)], 1024, empty_think=args.model == "qwen")
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = configuration(args.model, args.small)
    config.update(special)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(model, tokenizer, folder / "model")
    del model
    if args.piece == "grpo":
        grm = dict(vocab_size=128257, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128)
        less = dict(vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        with torch.device(device):
            judge = AutoModelForSequenceClassification.from_config(LlamaConfig(**(less if args.small else grm), num_labels=1, **special), dtype=torch.float32)
        save_model(judge, tokenizer, folder / "judge")
    return prompts, traces


def run(args, folder: Path, device: str) -> dict[str, object]:
    prompts, traces = start(args, folder, device)
    settings = load("paper")[f"geometry.{args.piece}"]
    settings = replace(settings, epochs=1, precision=args.precision, **({"patience": 0} if args.piece == "grpo" else {}))
    if args.micro:
        settings = replace(settings, micro_batch=args.micro)
    if args.small and args.piece == "grpo":
        settings = replace(settings, max_completion_length=24)
    model, tokenizer = load_model(folder / "model", device)
    if args.piece == "sft":
        rows = [conversation(p, t, True) for p, t in zip(prompts, traces, strict=True)]
        trainer = sft_trainer(model, tokenizer, rows, settings, 0, folder / "out", device)
        tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset) / len(rows) * settings.batch_size
    else:
        judge = ScalarReward(folder / "judge", device)
        rows = [{"prompt": p.text} for p in prompts]
        trainer = grpo_trainer(model, tokenizer, rows, judge_reward(judge, "response", opens_thinking(tokenizer, True)), settings, True, 0, folder / "out", device)
        tokens = settings.batch_size * settings.max_completion_length  # written by the policy, none ends early
    clock = Clock()
    trainer.add_callback(clock)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    log = fit(trainer)
    later = clock.seconds[1:] or clock.seconds  # the first one warms up
    step = sum(later) / len(later)
    return {
        "parameters": parameter_count(model), "updates": len(clock.seconds), "seconds_per_update": round(step, 3), "seconds_of_each": clock.seconds, "tokens_per_update": round(tokens), "tokens_per_second": round(tokens / step, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None, "last_loss": next(row["loss"] for row in reversed(log) if "loss" in row),
        "settings": {k: getattr(settings, k) for k in ("batch_size", "micro_batch", "precision", "activation_checkpointing")} | ({"group_size": settings.group_size, "max_completion_length": settings.max_completion_length} if args.piece == "grpo" else {"max_length": settings.max_length}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=["sft", "grpo"])
    parser.add_argument("--model", choices=["qwen", "llama"], default="qwen")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--micro", type=int, default=0, help="sequences per pass; 0: as the paper profile")
    parser.add_argument("--rows", type=int, default=0, help="prompts; 0: enough for four updates")
    parser.add_argument("--small", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "reference")
    args = parser.parse_args()
    args.rows = args.rows or (128 if args.piece == "sft" else 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise SystemExit("the true shapes need a GPU; --small rehearses them on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder), device)
    args.out.mkdir(parents=True, exist_ok=True)
    head = {"piece": args.piece, "model": args.model, "rehearsal on small shapes": args.small, "card": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}", "torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    path = args.out / f"training-{args.piece}-{args.model}-{args.precision}{'-small' if args.small else ''}.json"
    path.write_text(json.dumps(head | found, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
