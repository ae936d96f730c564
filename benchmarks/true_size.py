"""The curvature engine at true size: Qwen3.5-0.8B and Llama-3.2-1B shapes with random weights, 100 texts of 400 tokens.

    python benchmarks/true_size.py product --model qwen          one product in each mode: seconds, peak memory, the planner's forecast
    python benchmarks/true_size.py eigen --model qwen --precision tf32    a certified top 2 of one subset
    python benchmarks/true_size.py plane --model qwen --minutes 8          a 25 x 25 plane in tf32; goes on where it stopped

Each piece writes one JSON file to --out (outputs/reference by default) with card, sizes and versions. `--small` runs the same code on shapes
that a CPU can hold: a rehearsal, whose files say so. Needs a GPU with 80 GB for the true shapes."""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5TextConfig
from valuecot.curvature import Hosted, LossHessian, eigenplane, plane_radius, top_eigenpairs
from valuecot.curvature.planner import predict
from valuecot.store import Journal, digest

ROOT = Path(__file__).parents[1]


def configuration(name: str, small: bool):
    "Text shapes as published (Qwen/Qwen3.5-0.8B, meta-llama/Llama-3.2-1B), or a rehearsal of the same kind."
    if name == "llama":
        true = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
        less = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        return LlamaConfig(**(less if small else true), tie_word_embeddings=True, max_position_embeddings=4096)
    true = {"vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256}
    less = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    linear = {"linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    thin = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return Qwen3_5TextConfig(**(less if small else true), **(thin if small else linear), tie_word_embeddings=True)


def build(name: str, small: bool, device: str) -> tuple[nn.Module, list[dict]]:
    "A model with random weights and examples of random tokens, the last three quarters scored."
    torch.manual_seed(0)
    config = configuration(name, small)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    texts, length = (12, 48) if small else (100, 400)
    examples = []
    for _ in range(texts):
        ids = torch.randint(config.vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 4] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return model.to(device), examples


def warm_up(model: nn.Module, examples: list[dict], steps: int) -> float:
    "A few SGD steps on the texts, so that the loss has directions worth finding; -> loss."
    H = LossHessian(model, examples[:16], token_budget=2048, keep=0)
    for _ in range(steps):
        gradient = H.gradient()
        rate = 0.5 / float(gradient.norm())
        with torch.no_grad():
            for p, g in zip(H.parameters, gradient.split([p.numel() for p in H.parameters]), strict=True):
                p -= rate * g.view_as(p)
    return H.loss


class Meter:
    "Seconds and peak memory of a block of work."

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, work):  # -> result, {"seconds", "peak_gb"}
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        result = work()
        if self.cuda:
            torch.cuda.synchronize()
        return result, {"seconds": round(time.monotonic() - start, 2), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.cuda else None}


MODES = {"float32": {}, "tf32": {"precision": "tf32"}, "bfloat16": {"precision": "bfloat16"}, "difference": {"method": "difference"}}


def product(args, model, examples, meter) -> dict:
    "One product in each mode, beside what the planner foretold."
    with torch.device("meta"):
        ghost = AutoModelForCausalLM.from_config(configuration(args.model, args.small))
    cost = predict(ghost, [len(e["input_ids"]) for e in examples], [int((e["labels"] != -100).sum()) for e in examples], token_budget=args.budget)
    found = {"foretold_gb": round((cost.weights_bytes + cost.product_bytes) / 1e9, 2), "foretold_beside": "the float32 image, held for comparison by the later modes", "product_tflop": round(cost.product_flops / 1e12, 3)}
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(2)).to(model.device)
    v /= v.norm()
    exact = None  # the float32 image, which the others are held against
    for mode, options in MODES.items():
        if mode == "tf32" and model.device.type != "cuda":
            found[mode] = "not measured: needs CUDA"
            continue
        H = LossHessian(model, examples, token_budget=args.budget, keep=0, **options)
        H @ v
        image, spent = meter(lambda H=H: H @ v)
        exact = image if exact is None else exact
        found[mode] = spent | {"relative_difference_from_float32": float((image - exact).norm() / exact.norm())}
    return found


def eigen(args, model, examples, meter) -> dict:
    "A certified top 2 of one subset."
    options = MODES[args.precision]
    H = LossHessian(model, examples, token_budget=args.budget, keep=0 if args.keep_nothing else None, **options)
    found, spent = meter(lambda: top_eigenpairs(Hosted(H) if args.host else H, tol=1e-3, max_matvecs=60, basis=8))
    torch.save(found.eigenvectors.half().cpu(), args.out / f"eigenvectors-{stem(args)}.pt")  # for the plane; not kept in git
    return spent | {
        "precision": args.precision, "eigenvalues": found.eigenvalues.tolist(), "residuals": found.residuals.tolist(), "converged": found.converged.tolist(), "products": found.matvecs,
        "exact_products": found.exact_matvecs, "next_value": found.next_value, "loss": found.loss, "gradient_norm": found.gradient_norm, "warnings": list(found.warnings), "notes": H.notes,
    }  # fmt: skip


def directions(args, model) -> tuple[torch.Tensor, str]:  # (2, n) orthonormal, where they come from
    "Eigenvectors that an `eigen` piece left, or random ones: a plane costs the same."
    vectors = args.out / f"eigenvectors-{stem(args)}.pt"
    if vectors.exists():
        basis, source = torch.load(vectors, weights_only=True).float(), "eigenvectors, held in float16 and made orthonormal"
    else:
        n = sum(p.numel() for p in model.parameters())
        basis, source = torch.randn(2, n, generator=torch.Generator().manual_seed(3)), "random directions: no eigen piece was run before"
    return torch.linalg.qr(basis.T.to(model.device))[0].T.contiguous(), source


def plane(args, model, examples, meter) -> dict:
    "A 25 x 25 plane in tf32, in pieces of --minutes; goes on where it stopped, in the same plane only."
    basis, source = directions(args, model)
    precision = "tf32" if model.device.type == "cuda" else "float32"
    H = LossHessian(model, examples, token_budget=4 * args.budget, precision=precision, keep=0)
    r = plane_radius(args.eigenvalue)
    axis = torch.linspace(-r, r, 5 if args.small else 25)
    key = digest({"examples": H.fingerprint, "radius": r, "points": len(axis), "precision": precision, "loss": round(H.loss, 4), "along": [round(float(v[:1000].sum()), 6) for v in basis]})
    done, deadline, state, land = torch.full((len(axis), len(axis)), float("nan"), dtype=torch.float64), time.monotonic() + 60 * args.minutes, {}, None
    with Journal(args.out / f".plane-{stem(args)}.jsonl", key) as journal:
        for i, j, loss in journal.rows:
            done[i, j] = loss
        before, started, points = int(done.isnan().sum()), time.monotonic(), 0

        def keep(i, j, loss):
            nonlocal points
            journal.add(i, j, loss)
            points += 1
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            land, state = meter(lambda: eigenplane(H, basis, axis, axis, keep, done))
        except TimeoutError:
            pass
    found = {"plane_precision": precision, "directions": source, "radius": r, "points_now": points, "points_left": before - points, "seconds_per_point": round((time.monotonic() - started) / max(points, 1), 3), "complete": before == points}
    return found | state | ({"center": land.center, "range": [float(land.loss.min()), float(land.loss.max())]} if land else {})


def stem(args) -> str:
    return args.model + ("-rehearsal" if args.small else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=["product", "eigen", "plane"])
    parser.add_argument("--model", choices=["qwen", "llama"], default="qwen")
    parser.add_argument("--precision", choices=list(MODES), default="tf32")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="SGD steps before measuring")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--eigenvalue", type=float, default=100.0, help="lambda that sets the plane's radius")
    parser.add_argument("--keep-nothing", action="store_true")
    parser.add_argument("--host", action="store_true", help="the search's vectors in the machine's memory")
    parser.add_argument("--small", action="store_true", help="a rehearsal on shapes that a CPU can hold")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "reference")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise SystemExit("no GPU here: the true shapes are not measured. --small rehearses the same code.")
    args.out.mkdir(parents=True, exist_ok=True)
    model, examples = build(args.model, args.small, device)
    meter = Meter(device)
    loss = warm_up(model, examples, args.steps)
    found = {"product": product, "eigen": eigen, "plane": plane}[args.piece](args, model, examples, meter)
    record = {
        "what": f"{args.piece} · {args.model}" + (" · rehearsal on a small shape, not the true size" if args.small else ""), "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(), "parameters": sum(p.numel() for p in model.parameters()),
        "texts": len(examples), "tokens_per_text": len(examples[0]["input_ids"]), "token_budget": args.budget, "weights": "random, then a few SGD steps", "loss_after_steps": loss, "vectors": "host" if args.host else "device",
    } | found  # fmt: skip
    name = f"true-size-{args.piece}-{args.model}" + (f"-{args.precision}" + ("-host" if args.host else "") if args.piece == "eigen" else "") + ("-rehearsal" if args.small else "") + ".json"
    (args.out / name).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
