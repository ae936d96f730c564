"""How long the environment, the study and its parts take; `make bench`. Results go to outputs/bench/budget.json and a table.

Whole-process times on a shared machine are noisy: the ratios are what to quote. `make bench ARGS="imports stages"` runs a choice."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {"environment": 240, "study tiny, warm": 420, "tests": 600}  # seconds, on two cores


def timed(command: list[str], **env: str) -> dict[str, float]:
    "Wall and CPU seconds of one command; an error ends the benchmark."
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(time.monotonic() - start, 1), "cpu_s": round(cpu, 1)}


def imports() -> dict[str, dict]:
    "What a stage pays before it computes."
    names = ["torch", "pandas", "papermill", "seaborn", "valuecot.flow.run", "valuecot.curvature", "valuecot.training.models", "valuecot.training.grpo"]
    return {f"import {name}": timed([sys.executable, "-c", f"import {name}"]) for name in names}


def study(profile: str, cold: bool) -> dict[str, float]:
    "One whole study in an empty outputs folder."
    folder = tempfile.mkdtemp(prefix="valuecot-bench-")
    try:
        extra = {"VALUECOT_COLD": "1"} if cold else {}
        return timed([sys.executable, "-m", "valuecot.flow.study", "run", "--profile", profile, "--study", "geometry"], VALUECOT_OUTPUTS=folder, **extra)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stages() -> dict[str, dict]:
    "The test profile with every job starting cold, and with one process that has imported everything."
    cold, warm = study("test", True), study("test", False)
    return {"study test, cold": cold, "study test, warm": warm | {"cold / warm": round(cold["wall_s"] / warm["wall_s"], 2)}}


def tiny() -> dict[str, dict]:
    return {"study tiny, warm": study("tiny", False)}


def environment() -> dict[str, dict]:
    "A new virtual environment by the Makefile."
    folder = tempfile.mkdtemp(prefix="valuecot-env-")
    try:
        return {"environment": timed(["make", "env", f"VENV={folder}/venv"])}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], capture_output=True)


def tests() -> dict[str, dict]:
    return {"tests": timed(["make", "test"])}


def script(name: str) -> dict[str, dict]:
    "A benchmark of its own, which writes its own table."
    start = time.monotonic()
    if subprocess.run([sys.executable, f"benchmarks/{name}.py"], cwd=ROOT).returncode:
        raise SystemExit(f"benchmarks/{name}.py failed")
    return {name: {"wall_s": round(time.monotonic() - start, 1)}}


def curvature() -> dict[str, dict]:
    "Eigenpairs against other packages."
    return script("curvature")


def asking() -> dict[str, dict]:
    "Questions per second over loopback."
    return script("asking")


def training() -> dict[str, dict]:
    "Our trainings against plain TRL."
    return script("training")


PARTS = {"curvature": curvature, "asking": asking, "training": training, "imports": imports, "stages": stages, "tiny": tiny, "environment": environment, "tests": tests}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(PARTS)
    found: dict[str, dict] = {}
    for name in chosen:
        for label, row in PARTS[name]().items():
            found[label] = row | ({"limit_s": LIMITS[label], "met": row["wall_s"] <= LIMITS[label]} if label in LIMITS else {})
            print(f"{label:<34} " + "  ".join(f"{k} {v}" for k, v in found[label].items()), flush=True)
    out = ROOT / "outputs" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "budget.json").write_text(json.dumps({"python": platform.python_version(), "cores": os.cpu_count(), "rows": found}, indent=1) + "\n")
    print("written to outputs/bench/budget.json")
