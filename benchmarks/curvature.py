"""Top eigenpairs at an equal true residual: valuecot against PyHessian, curvlinops + ARPACK and hessian-eigenthings.

`make bench ARGS=curvature` runs it on prompts that the project wrote; `python benchmarks/curvature.py --prompts FOLDER` on a folder in
ConflictScope's format. One run compares on one model, one weighting, the same texts. CPU time of the process is what counts; residuals are
measured by exact products of `LossHessian`, whoever found the vectors. Results: outputs/bench/curvature.json and a table."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from valuecot.curvature import LossHessian, eigenplane, top_eigenpairs
from valuecot.curvature.krylov import norm
from valuecot.curvature.loss import steady
from valuecot.curvature.peers import Stacked, judged, loader, row_weighted, untouched
from valuecot.data.conflictscope import load_folder
from valuecot.data.world import generate
from valuecot.training.models import fix, train_tokenizer

ROOT = Path(__file__).parents[1]
OUT = ROOT / "outputs" / "bench"
TOL = 1e-3


# ----------------------------------------------------------------------------------- models and texts


def texts_of(folder: str) -> list[str]:
    "Prompts of a folder, or of the embedded world."
    return [p.text for p in (load_folder(folder) if folder else generate(2000, seed=0))]


def tokenized(tokenizer, texts: list[str], longest: int) -> list[dict]:
    "Examples, every third cut shorter so that padding matters."
    rows = [torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"][:longest]) for t in texts]
    rows = [ids[: max(len(ids) * (2 + i % 3) // 4, 8)] for i, ids in enumerate(rows)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in rows]


def family(name: str, vocabulary: int) -> nn.Module:
    "About 0.9M parameters."
    shape = {"vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    linear = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "head_dim": 32}
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape, **linear, layer_types=layers, tie_word_embeddings=True))


def trained(name: str, tokenizer, texts: list[str], steps: int, folder: Path) -> nn.Module:
    "The family after `steps` AdamW steps; made once."
    if (folder / "config.json").exists():
        return (LlamaForCausalLM if name == "llama" else Qwen3_5ForCausalLM).from_pretrained(folder)
    model, rows = family(name, len(tokenizer)), tokenized(tokenizer, texts, 128)
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        picked = [rows[i] for i in torch.randint(len(rows), (16,), generator=generator)]
        ids = nn.utils.rnn.pad_sequence([r["input_ids"] for r in picked], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([r["labels"] for r in picked], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, loss {float(loss):.3f} after {steps} steps", flush=True)
    model.save_pretrained(folder)
    return model


# ----------------------------------------------------------------------------------- contestants: each returns values, vectors, products, CPU seconds


def cpu(work):  # -> result, CPU seconds
    start = time.process_time()
    return work(), time.process_time() - start


def ours(model, examples, seed, **options) -> dict:
    def run():
        return top_eigenpairs(LossHessian(model, examples, **options), tol=TOL, seed=seed)

    found, seconds = cpu(run)
    _, residuals = judged(LossHessian(model, examples), found.eigenvalues.tolist(), found.eigenvectors)  # by products that are not its own
    return {"values": found.eigenvalues.tolist(), "residual": float(residuals.max()), "products": found.matvecs, "exact products": found.exact_matvecs, "cpu_s": seconds}


class Watched:
    "PyHessian whose every product is also a measurement."

    def __init__(self, model, examples, batch_size):
        from pyhessian import hessian

        watch = self
        watch.residuals: list[tuple[int, float]] = []

        class Peer(hessian):
            def dataloader_hv_product(self, v):
                value, Hv = super().dataloader_hv_product(v)
                start = time.process_time()
                flat, image = (torch.cat([x.detach().flatten() for x in xs]) for xs in (v, Hv))
                along = float(flat.double() @ image.double())
                pair = sys._getframe(1).f_locals["computed_dim"]  # which pair its loop is at
                watch.residuals.append((pair, norm(image - along * flat) / abs(along)))
                watch.overhead += time.process_time() - start
                return value, Hv

        self.overhead = 0.0
        scored = sum(int((e["labels"][1:] != -100).sum()) for e in examples)
        self.peer = Peer(Stacked(model), row_weighted(len(examples), scored, "token"), dataloader=loader(examples, batch_size), cuda=False)


def pyhessian(model, examples, seed, tol, iterations, batch_size=10) -> dict:
    "PyHessian by its own stop, and where its true residual first passed TOL."
    with untouched(model, seed):
        watched = Watched(model, examples, batch_size)
        (values, parts), seconds = cpu(lambda: watched.peer.eigenvalues(maxIter=iterations, tol=tol, top_n=2))
    seconds -= watched.overhead
    vectors = torch.stack([torch.cat([p.detach().flatten() for p in part]) for part in parts])
    _, residuals = judged(LossHessian(model, examples), values, vectors)
    spent = len(watched.residuals)
    return {"values": values, "residual": float(residuals.max()), "products": spent, "cpu_s": seconds, "first at tolerance": first_at(watched.residuals), "cpu_per_product": seconds / spent}


def first_at(residuals: list[tuple[int, float]]) -> int | None:  # None where a pair never passed
    "Products that its loop would have spent, had it stopped each pair at a true residual of TOL."
    counts = [next((i + 1 for i, r in enumerate([r for p, r in residuals if p == pair]) if r <= TOL), None) for pair in (0, 1)]
    return None if None in counts else sum(counts)


class Silu(nn.Module):
    "curvlinops differentiates forwards over backwards, for which torch has no rule of SiLU's backward."

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def curvlinops(model, examples, seed, batch_size=10) -> dict:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, X):
            return self.model(input_ids=X["input_ids"], attention_mask=X["attention_mask"], use_cache=False).logits

    scored, spent = sum(int((e["labels"][1:] != -100).sum()) for e in examples), 0

    class Loss(nn.Module):
        reduction = "sum"

        def forward(self, logits, labels):
            return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum") / scored

    batches = [({"input_ids": x[:, 0], "attention_mask": x[:, 1]}, y) for x, y in loader(examples, batch_size)]
    swapped = [(m, m.act_fn) for m in model.modules() if isinstance(getattr(m, "act_fn", None), nn.Module)]
    for module, _ in swapped:
        module.act_fn = Silu()
    silu, F.silu = F.silu, lambda x, inplace=False: x * torch.sigmoid(x)
    try:
        with steady(model):
            wrapped = Logits()
            H = HessianLinearOperator(wrapped, Loss(), list(wrapped.parameters()), batches, batch_size_fn=lambda X: len(X["input_ids"]), check_deterministic=False)
            A = H.to_scipy(dtype=np.float32)
            plain = A._matvec if hasattr(A, "_matvec") else A.matvec
            from scipy.sparse.linalg import LinearOperator

            def matvec(v):
                nonlocal spent
                spent += 1
                return plain(v)

            n = sum(p.numel() for p in model.parameters())
            start = torch.randn(n, generator=torch.Generator().manual_seed(seed)).numpy()  # the one that our search begins with
            (values, vectors), seconds = cpu(lambda: eigsh(LinearOperator((n, n), matvec, dtype=np.float32), k=2, which="LM", tol=TOL, ncv=8, v0=start))
    finally:
        F.silu = silu
        for module, act in swapped:
            module.act_fn = act
    _, residuals = judged(LossHessian(model, examples), values.tolist(), torch.from_numpy(vectors.T.copy()))
    return {"values": values[::-1].tolist(), "residual": float(residuals.max()), "products": spent, "cpu_s": seconds}


def eigenthings(model, examples, seed, batch_size=10) -> dict:
    from hessian_eigenthings import HessianOperator, lanczos

    scored, batches = sum(int((e["labels"][1:] != -100).sum()) for e in examples), loader(examples, batch_size)
    rows = [{"input_ids": x[:, 0], "attention_mask": x[:, 1], "labels": y} for x, y in batches]

    def loss(m, b):
        logits = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), b["labels"][:, 1:], reduction="sum") * (len(rows) / scored)

    class Counted(HessianOperator):
        spent = 0

        def matvec(self, v):
            self.spent += 1
            return super().matvec(v)

    with steady(model):
        H = Counted(model, rows, loss)
        found, seconds = cpu(lambda: lanczos(H, k=2, max_iter=20, tol=TOL, seed=seed))
    _, residuals = judged(LossHessian(model, examples), found.eigenvalues.tolist(), found.eigenvectors)
    return {"values": found.eigenvalues.tolist(), "residual": float(residuals.max()), "products": H.spent, "cpu_s": seconds}


CONTESTANTS = {
    "valuecot, exact": lambda m, e, s: ours(m, e, s),
    "valuecot, exact, nothing kept": lambda m, e, s: ours(m, e, s, keep=0),
    "valuecot, differences": lambda m, e, s: ours(m, e, s, method="difference"),
    "valuecot, forward differences": lambda m, e, s: ours(m, e, s, method="forward-difference"),
    "PyHessian, its default": lambda m, e, s: pyhessian(m, e, s, 1e-3, 50),
    "PyHessian, tightened": lambda m, e, s: pyhessian(m, e, s, 1e-9, 60),
    "curvlinops + ARPACK": curvlinops,
    "hessian-eigenthings, Lanczos 20": eigenthings,
}


# ----------------------------------------------------------------------------------- what one product and one plane cost


def best_of(work, repeats: int = 3) -> float:
    work()
    return min(cpu(work)[1] for _ in range(repeats))


def unit_costs(model, examples, natural) -> dict:
    "Ratios of CPU time: products to gradients, buckets to dataset order, a plane to its forward passes."
    H, kept = LossHessian(model, examples, keep=0), LossHessian(model, examples)
    v = torch.randn(H.n, generator=torch.Generator().manual_seed(0))
    kept @ v

    def gradient():
        with steady(model):
            for batch in H.batches:
                torch.autograd.grad(H.batch_loss(batch), H.parameters)

    one = best_of(gradient)
    found = {"product, graph kept / gradient": best_of(lambda: kept @ v) / one, "product / gradient": best_of(lambda: H @ v) / one, "graph MB": kept.graphs.held / 1e6}
    kept.release()
    bucketed, ordered = LossHessian(model, natural, keep=0), LossHessian(model, natural, keep=0)
    from valuecot.curvature.examples import pad

    ordered.batches = [pad(ordered.pairs, list(range(i, min(i + 8, len(natural)))), "token", ordered.device) for i in range(0, len(natural), 8)]
    found["dataset order / bucketed"] = best_of(lambda: ordered @ v, 2) / best_of(lambda: bucketed @ v, 2)
    some = LossHessian(model, examples[:10], keep=0)
    plane = torch.linalg.qr(torch.randn(some.n, 2, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
    axis = torch.linspace(-0.01, 0.01, 25)

    def bare(scored: bool):
        with steady(model, twice=False), torch.no_grad():
            for _ in range(126):
                for batch in some.batches:
                    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
                    if scored:
                        F.cross_entropy(logits[:, batch.columns].flatten(0, 1)[batch.places], batch.targets, reduction="sum")

    fifths = [axis[i::5] for i in range(5)]  # five columns each: short pieces, side by side, against a noisy machine
    times = [(cpu(lambda part=part: eigenplane(some, plane, axis, part))[1], cpu(lambda: bare(True))[1], cpu(lambda: bare(False))[1]) for part in fifths * 4]
    found["25 x 25 plane / bare losses"] = statistics.median(a / b for a, b, _ in times)
    found["25 x 25 plane / bare logits"] = statistics.median(a / c for a, _, c in times)
    return {k: round(x, 3) for k, x in found.items()}


def summary(rows: list[dict]) -> dict:
    "Median and range of each contestant over start vectors."
    found = {}
    for name in CONTESTANTS:
        mine = [r for r in rows if r["name"] == name]
        if mine and "error" not in mine[0]:
            found[name] = {key: {"median": statistics.median(xs), "min": min(xs), "max": max(xs)} for key in ("products", "cpu_s", "residual") if (xs := [r[key] for r in mine])}
    return found


RATIOS = {  # between contestants: at least or at most, the aim, the floor that a prototype reached
    "PyHessian products / ours": (">=", 3.0, 2.7),
    "ours / curvlinops products": ("<=", 1.0, 1.0),
    "PyHessian time / exact mode": (">=", 5.0, 3.0),
    "curvlinops time / exact mode": (">=", 1.5, 1.3),
    "PyHessian time / fastest certified mode": (">=", 8.0, 4.5),
    "curvlinops time / fastest certified mode": (">=", 2.5, 1.9),
}
UNITS = {  # of one product, one plane
    "product, graph kept / gradient": ("<=", 2.1, 2.1),
    "product / gradient": ("<=", 3.1, 3.1),
    "dataset order / bucketed": (">=", 1.4, 1.4),
    "25 x 25 plane / bare losses": ("<=", 1.03, 1.06),
}


def fastest_mode(rows: list[dict]) -> str | None:
    "Our mode with the smallest median CPU time among those that reached TOL from every start vector; None where none did."
    by: dict[str, list[dict]] = {}
    for r in rows:
        if r["name"].startswith("valuecot") and "error" not in r:
            by.setdefault(r["name"], []).append(r)
    certified = {name: statistics.median(r["cpu_s"] for r in own) for name, own in by.items() if all(r["residual"] <= TOL for r in own)}
    return min(certified, key=certified.get, default=None)


def ratios(rows: list[dict]) -> dict[str, list[float]]:  # one for each start vector
    """Side by side at the same true residual. PyHessian is stopped by an oracle as soon as both of its pairs have it; where it never has,
    what it spent is a lower bound. A peer that stopped by itself above TOL is not compared."""
    found = {name: [] for name in RATIOS}
    fastest = fastest_mode(rows)
    for seed in sorted({r["seed"] for r in rows}):
        by = {r["name"]: r for r in rows if r["seed"] == seed and "error" not in r}
        exact, peer, other = by.get("valuecot, exact"), by.get("PyHessian, tightened"), by.get("curvlinops + ARPACK")
        if exact is None or fastest is None:
            continue
        modes = [("exact mode", exact)] * (exact["residual"] <= TOL) + [("fastest certified mode", by[fastest])]
        if other and other["residual"] <= TOL:
            found["ours / curvlinops products"].append(exact["products"] / other["products"])
            for mode, row in modes:
                found[f"curvlinops time / {mode}"].append(other["cpu_s"] / row["cpu_s"])
        if peer:
            needed = peer["first at tolerance"] or peer["products"]
            found["PyHessian products / ours"].append(needed / exact["products"])
            for mode, row in modes:
                found[f"PyHessian time / {mode}"].append(needed * peer["cpu_per_product"] / row["cpu_s"])
    return found


def verdicts(rows: list[dict], units: dict) -> list[dict]:
    "Each aim beside what was measured."
    measured, found = ratios(rows) | {name: [value] for name, value in units.items()}, []
    for name, (sense, aim, floor) in (RATIOS | UNITS).items():
        if xs := measured.get(name):
            middle, sign = statistics.median(xs), 1 if sense == ">=" else -1
            verdict = "reached" if sign * middle >= sign * aim else "floor held, aim missed" if sign * middle >= sign * floor else "missed"
            found.append({"ratio": name, "median": round(middle, 3), "range": [round(min(xs), 3), round(max(xs), 3)], "n": len(xs), "aim": f"{sense} {aim}", "floor": f"{sense} {floor}", "verdict": verdict})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", default="", help="folder in ConflictScope's format; the embedded world if left out")
    parser.add_argument("--families", nargs="+", default=["llama", "qwen"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), help="contestants")
    parser.add_argument("--no-units", action="store_true")
    args = parser.parse_args()
    fix(0)
    texts = texts_of(args.prompts)
    held_out, training = texts[: args.texts], texts[args.texts :]
    tokenizer = train_tokenizer(training, 1024, empty_think=False)
    OUT.mkdir(parents=True, exist_ok=True)
    record = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(), "prompts": "given folder" if args.prompts else "embedded world", "texts": args.texts, "tolerance": TOL, "families": {}}
    for name in args.families:
        model = trained(name, tokenizer, training, args.steps, OUT / "models" / f"{name}-{'folder' if args.prompts else 'world'}-{args.steps}").eval()
        examples, natural = tokenized(tokenizer, held_out, 128), tokenized(tokenizer, held_out[:40], 512)
        rows = []
        for seed in range(args.seeds):
            for contestant in args.only:
                try:
                    row = CONTESTANTS[contestant](model, examples, seed)
                except ImportError as error:
                    row = {"error": f"not installed: {error.name}"}
                rows.append({"name": contestant, "seed": seed} | row)
                print(name, json.dumps(rows[-1]), flush=True)
        units = {} if args.no_units else unit_costs(model, examples, natural)
        print(name, json.dumps(units), flush=True)
        record["families"][name] = {"parameters": sum(p.numel() for p in model.parameters()), "scored tokens": sum(len(e["labels"]) - 1 for e in examples), "rows": rows, "summary": summary(rows), "units": units, "aims": verdicts(rows, units)}
        (OUT / "curvature.json").write_text(json.dumps(record, indent=1) + "\n")
        for line in record["families"][name]["aims"]:
            print(f"{name:<6} {line['ratio']:<42} {line['median']:>7} {line['range']!s:<18} aim {line['aim']:<8} floor {line['floor']:<8} {line['verdict']}", flush=True)
    print("written to outputs/bench/curvature.json")


if __name__ == "__main__":
    sys.exit(main())
