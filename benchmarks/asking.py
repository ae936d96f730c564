"""Questions per second against the rate that latency and connections allow, and memory over many questions.

`make bench ARGS=asking`, or `python benchmarks/asking.py --questions 20000`. The server is the tests' own, on loopback, and answers every
question after 200 ms with one fixed text; every sending and every reply is on disk (fsynced) before anyone goes on. Results:
outputs/bench/asking.json. Client and server share the machine, so on a busy one the ratio is a lower bound."""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from valuecot.providers.asking import Live, ask_all
from valuecot.providers.cache import Cache
from valuecot.providers.prices import Price
from valuecot.providers.requests import Request

ROOT = Path(__file__).parents[1]
OUT = ROOT / "outputs" / "bench"


def questions(n: int, run: str):  # -> generator, so that memory is not theirs
    "Questions of about 2,000 characters."
    for i in range(n):
        yield Request("server", "m", (("user", f"{run} {i}: " + "What is fair here? " * 100),), 500)


def measure(n: int, latency: float, connections: int, port: int) -> dict[str, float]:
    "One batch of `n` questions into a cache of its own."
    with tempfile.TemporaryDirectory() as folder, Cache(Path(folder) / "replies.sqlite") as cache:
        live = Live("server", Price(0.05, 0.4), f"http://127.0.0.1:{port}/v1", connections=connections)
        start, cpu = time.monotonic(), time.process_time()
        tally = asyncio.run(ask_all(questions(n, str(n)), {"server/m": live}, cache))
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    if tally.replied != n:
        raise RuntimeError(f"{tally.replied} of {n} questions were answered: {tally.failures[:3]}")
    theory = n * latency / connections
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"questions": n, "seconds": round(seconds, 2), "theory_s": round(theory, 2), "share of the theoretical rate": round(theory / seconds, 3), "cpu_ms per question": round(1e3 * cpu / n, 3), "peak MB so far": round(peak, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=20000)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--connections", type=int, default=64)
    args = parser.parse_args()
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "teacher_server.py"), "--plain", f"--latency={args.latency}"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        rows = [measure(n, args.latency, args.connections, port) for n in (max(args.questions // 10, args.connections), args.questions)]
    finally:
        server.kill()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "asking.json").write_text(json.dumps({"latency_s": args.latency, "connections": args.connections, "runs": rows}, indent=1) + "\n")
    for row in rows:
        print(row)
    print("written to outputs/bench/asking.json")


if __name__ == "__main__":
    main()
