"""Questions in batches: against a server that speaks the providers' queues, loses answers and breaks on demand; the providers' own packages are the judges."""

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from teacher_server import Server

from valuecot.providers.asking import Live, Policy, ask_all
from valuecot.providers.batches import QUEUES, Batched, cut
from valuecot.providers.cache import TABLES, Cache, export_replies
from valuecot.providers.prices import Price
from valuecot.providers.requests import Failed, Request
from valuecot.providers.wire import WIRES

HERE = Path(__file__).parent
KEY = "sk-planted-0123456789abcdef"
PRICE = Price(0.05, 0.40, batch=0.5)
PROVIDERS = tuple(QUEUES)
BASE = {"openai": "/v1", "anthropic": "", "google": ""}
pytestmark = pytest.mark.filterwarnings("ignore:batch valuecot-")  # one test asks for the warning
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@contextmanager
def queue_server(plain: bool = True, latency: float = 0.0, **rates):  # -> base URL, the server itself
    "The server of teacher_server.py in a thread, so that a test can turn its knobs."
    knobs = {k: rates.pop(k) for k in ("delay", "lost", "unlisted", "state") if k in rates}
    server, loop = Server(rates, latency, seed=0, plain=plain, **knobs), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> web.AppRunner:
        runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.root = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def end(runner: web.AppRunner) -> None:  # calls that hang, too
        await runner.cleanup()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    runner = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    try:
        yield server.root, server
    finally:
        asyncio.run_coroutine_threadsafe(end(runner), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for wire in WIRES.values():
        monkeypatch.setenv(wire.key or "SERVER_API_KEY", KEY)


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "replies.sqlite") as found:
        yield found


def questions(n: int, provider: str = "openai", word: str = "fair") -> list[Request]:
    return [Request(provider, "m", (("user", f"Question {i}: what is {word} here, and why?"),), 300) for i in range(n)]


def quick(**changed) -> Policy:
    return Policy(**{"tries": 8, "first_wait": 0.01, "rng": random.Random(0)} | changed)


def batched(provider: str, root: str, **options) -> Batched:
    return Batched(provider, PRICE, root + BASE[provider], **{"poll": 0.02, "grace": 0.05, "timeout": 5.0} | options)


def ask(requests, root: str, cache: Cache, policy: Policy | None = None, **options):
    provider = requests[0].provider if requests else "openai"
    return asyncio.run(ask_all(requests, {f"{provider}/m": batched(provider, root, **options)}, cache, policy or quick()))


def states(cache: Cache) -> list[str]:
    return [row[0] for row in cache.db.execute("SELECT state FROM batches ORDER BY at")]


def submitted(server: Server) -> set[int]:  # how often questions were submitted
    return set(server.submitted.values())


# ------------------------------------------------------------------------- formats, judged by the providers' own packages


def openai_client(root):
    return pytest.importorskip("openai").OpenAI(base_url=f"{root}/v1", api_key=KEY, max_retries=0)


def sdk_openai(root, requests, name, batch_id):
    client = openai_client(root)
    lines = [{"custom_id": r.key, "method": "POST", "url": "/v1/chat/completions", "body": sdk_bodies("openai", r)} for r in requests]
    file = client.files.create(file=(f"{name}.jsonl", "".join(json.dumps(x) + "\n" for x in lines).encode(), "application/jsonl"), purpose="batch")
    client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"valuecot": name})
    batch = client.batches.retrieve(batch_id)
    found = [json.loads(line) for line in client.files.content(batch.output_file_id).text.split("\n") if line]
    listed = {b.id for b in client.batches.list(limit=100)}
    return {x["custom_id"]: x["response"]["body"]["choices"][0]["message"]["content"] for x in found}, listed, batch.status


def sdk_anthropic(root, requests, name, batch_id):
    client = pytest.importorskip("anthropic").Anthropic(base_url=root, api_key=KEY, max_retries=0)
    client.messages.batches.create(requests=[{"custom_id": r.key, "params": sdk_bodies("anthropic", r)} for r in requests])
    batch = client.messages.batches.retrieve(batch_id)
    found = {x.custom_id: x.result.message.content[0].text for x in client.messages.batches.results(batch_id)}
    return found, {b.id for b in client.messages.batches.list(limit=1000)}, batch.processing_status


def sdk_google(root, requests, name, batch_id):
    client = pytest.importorskip("google.genai").Client(api_key=KEY, http_options={"base_url": root})
    client.batches.create(model="m", src=[sdk_bodies("google", r) | {"metadata": {"key": r.key}} for r in requests], config={"display_name": name})
    batch = client.batches.get(name=batch_id)
    found = {x.metadata["key"]: x.response.text for x in batch.dest.inlined_responses}
    return found, {b.name for b in client.batches.list(config={"page_size": 100})}, batch.state.value


def sdk_bodies(provider: str, r: Request) -> dict:
    "One question as its package wants it, by hand and not by our wire."
    turns = [{"role": role, "content": text} for role, text in r.messages]
    if provider == "openai":
        form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}
        return {"model": "m", "messages": turns, "max_completion_tokens": 300, "reasoning_effort": "low", "response_format": form}
    if provider == "anthropic":
        return {"model": "m", "messages": turns[1:], "system": turns[0]["content"], "max_tokens": 300, "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}}
    config = {"system_instruction": r.messages[0][1], "max_output_tokens": 300, "response_mime_type": "application/json", "response_json_schema": SCHEMA, "thinking_config": {"thinking_level": "low"}}
    return {"contents": [{"role": "user", "parts": [{"text": r.messages[1][1]}]}], "config": config}


SDKS = {"openai": sdk_openai, "anthropic": sdk_anthropic, "google": sdk_google}
HEADERS = "authorization", "x-goog-api-key", "x-api-key", "anthropic-version"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_batches_are_those_of_the_providers_own_package(provider, cache):
    "Path, body and headers of what leaves, and the replies that come back."
    requests = [Request(provider, "m", (("system", "Be brief."), ("user", f"Question {i}?")), 300, {"effort": "low"}, SCHEMA) for i in range(3)]
    with queue_server() as (root, server):
        assert ask(requests, root, cache).replied == 3
        ours, (id, *_) = list(server.calls), server.batches
        theirs, listed, state = SDKS[provider](root, requests, cache.db.execute("SELECT name FROM batches").fetchone()[0], id)
        sent = [[method, path, {k.lower(): v for k, v in headers.items() if k.lower() in HEADERS}, body] for method, path, headers, body in server.calls]
    assert theirs == {r.key: cache.reply(r).text for r in requests} and len(listed) == 2 and id in listed
    half = len(ours)
    assert half == (2 if provider == "openai" else 1) and len(sent) == 2 * half
    for mine, yours in zip(sent[:half], sent[half:], strict=True):
        if provider == "openai" and "input_file_id" in mine[3]:
            assert (mine[3].pop("input_file_id"), yours[3].pop("input_file_id")) == ("file-0", "file-1")
        assert mine == yours
    assert QUEUES[provider].ended[0] == state.removeprefix("JOB_STATE_")


# ------------------------------------------------------------------------- replies, errors, money


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_question_ends_once(provider, cache):
    "Errors mean what they mean alone; what the queue dropped is free; what is missing may have been billed."
    requests = questions(40, provider)
    with queue_server(errored=0.2, expired=0.2, missing=0.2, duplicated=0.3) as (root, server):
        tally = ask(requests, root, cache, quick(tries=2), largest=15)
        assert submitted(server) == {1} and server.counts["batches"] == 3
    by_reason = {word: [f for f in tally.failures if f.reason.startswith(word)] for word in ("400", "expired" if provider != "google" else "503", "missing from the batch")}
    assert all(by_reason.values()) and sum(map(len, by_reason.values())) == len(tally.failures) == 40 - tally.replied > 0
    assert all(f.lasting == (word == "400") and f.tries == 1 for word, some in by_reason.items() for f in some)
    replied = [r for r in requests if cache.reply(r)]
    assert len(replied) == tally.replied and all(cache.reply(r).text != "another reply" for r in replied)
    row, missing = cache.ledger()[0], by_reason["missing from the batch"]
    bill = sum(PRICE.of(cache.reply(r), batch=True) for r in replied) + sum(PRICE.most(r, batch=True) for r in requests if r.key in {f.key for f in missing})
    assert (row["sent"], row["replies"], row["unanswered"]) == (40, tally.replied, 0) and round(cache.spent * 1e9) == bill
    assert {row[0] for row in cache.db.execute("SELECT source FROM replies")} == {"batch"} and set(states(cache)) == {"ended"}
    assert cache.db.execute("SELECT COUNT(*) FROM held").fetchone() == (0,)


def test_a_reply_without_a_name_belongs_to_nobody(cache):
    "Google's order is no help, so nothing is guessed from it."
    with queue_server(nameless=0.5) as (root, _):
        tally = ask(questions(20, "google"), root, cache, quick(tries=2))
    assert 0 < tally.replied < 20 and all(f"{len(tally.failures)} results came without a name" in f.reason for f in tally.failures)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_trouble_on_the_line_costs_time_and_nothing_else(provider, cache):
    "Every call may be limited, broken, reset or cut, before or after it was done."
    with queue_server(rate_limited=0.15, broken=0.15, reset=0.15, truncated=0.15, short=0.1, hang=0.02, delay=0.1, unlisted=0.05) as (root, server):
        tally = ask(questions(48, provider), root, cache, quick(tries=20, longest_wait=0.1), largest=6, grace=0.2, timeout=0.5)
        assert (tally.replied, tally.failures) == (48, []) and submitted(server) == {1} and server.counts["batches"] == 8
        met = {fault for key in server.counts for fault in [key.partition(" ")[2]] if fault}
    assert {"rate_limited", "broken", "reset", "truncated"} <= met and cache.ledger()[0]["sent"] == 48


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_batch_whose_answer_was_lost_is_found_and_not_sent_again(provider, cache):
    "Others have batches of the same size; the list has several pages."
    with queue_server(lost=2, unlisted=0.1) as (root, server):
        for i in range(3):
            server.accept(provider, "m", f"theirs-{i}", [(r.key, WIRES[provider].body(r)) for r in questions(5, provider, f"theirs {i}")])
        server.lost = 2
        tally = ask(questions(10, provider), root, cache, largest=5, grace=0.5)
        assert tally.replied == 10 and submitted(server) == {1} and server.counts["batches"] == 5


def test_what_was_refused_is_free_and_lies_in_no_question(cache):
    with queue_server() as (root, server):
        tally = ask(questions(4), f"{root}/nowhere", cache)
        assert [f.reason[:3] for f in tally.failures] == ["404"] * 4 and not any(f.lasting for f in tally.failures)
        assert (cache.spent, cache.ledger()[0]["failures"], states(cache)) == (0, {"404": 4}, ["withdrawn"])
        assert ask(questions(4), root, cache).replied == 4


@pytest.mark.parametrize("provider, state, reason", [
    ("openai", "failed", "failed in the batch queue (the file is odd)"), ("openai", "cancelled", "400|cancelled|reply"), ("google", "FAILED", "failed in the batch queue"),
    ("google", "EXPIRED", "expired in the batch queue"),
])  # fmt: skip
def test_a_batch_that_failed_as_a_whole_is_free(provider, state, reason, cache):
    with queue_server(state=state, missing=1.0 if state == "cancelled" else 0.0) as (root, _):
        tally = ask(questions(3, provider), root, cache)
    assert {f.reason for f in tally.failures} == {"cancelled in the batch queue" if state == "cancelled" else reason} and not any(f.lasting for f in tally.failures)
    assert cache.spent == 0 and states(cache) == ["ended"]


def test_a_state_that_is_new_to_us_leaves_the_batch_open(cache):
    with queue_server(state="resting") as (root, server):
        tally = ask(questions(3), root, cache)
        assert all("unknown state 'resting'" in f.reason for f in tally.failures) and states(cache) == ["open"] and cache.spent > 0
        server.state = ""
        assert ask(questions(3), root, cache).replied == 3 and submitted(server) == {1}


def test_a_batch_that_the_provider_lost_is_never_paid_again_unasked(cache):
    with queue_server(delay=60) as (root, server):
        name = begin_and_stop(cache, root, questions(3))
        server.batches = {}
        tally = ask(questions(3), root, cache)
        assert all("404" in f.reason and name in f.reason for f in tally.failures) and server.counts["batches"] == 1
        most = cache.spent
        cache.withdraw_batch(name, "given-up", None).result()
        server.delay = 0
        assert ask(questions(3), root, cache).replied == 3 and cache.spent > most and cache.ledger()[0]["failures"] == {"given-up": 3}


def begin_and_stop(cache: Cache, root: str, requests: list[Request], **changed) -> str:  # name of the batch that is open now
    "A run that is stopped (Ctrl-C) while it waits."

    async def run():
        work = asyncio.create_task(ask_all(requests, {requests[0].who: batched(requests[0].provider, root)}, cache, quick(**changed)))
        while not cache.open_batches(requests[0].provider, "m") or cache.open_batches(requests[0].provider, "m")[0].state != "open":
            await asyncio.sleep(0.01)
        work.cancel()
        await asyncio.wait([work])

    asyncio.run(run())
    return cache.open_batches(requests[0].provider, "m")[0].name


def test_a_batch_that_nobody_waits_for_is_read_where_it_is_ready(cache):
    with queue_server(delay=60) as (root, server):
        begin_and_stop(cache, root, questions(3))
        others = questions(3, word="kind")
        server.delay = 0
        assert ask(others, root, cache).replied == 3
        assert all(cache.reply(r) for r in questions(3)) and states(cache) == ["ended"] * 2


def test_what_left_with_a_batch_is_not_asked_live_as_well(cache):
    with queue_server(delay=60) as (root, server):
        name = begin_and_stop(cache, root, questions(3))
        live = Live("openai", PRICE, f"{root}/v1")
        tally = asyncio.run(ask_all(questions(5), {live_name: live for live_name in ["openai/m"]}, cache, quick()))
        assert tally.replied == 2 and len(tally.failures) == 3 and all(name in f.reason and "batched = yes" in f.reason for f in tally.failures)
        server.delay = 0
        assert ask(questions(5), root, cache).replied == 3


def test_a_batch_that_leaves_in_this_moment_is_not_withdrawn(cache):
    cache.begin_batch("valuecot-x", "openai", "m").result()
    cache.hold("valuecot-x", questions(1)[0], 5, None).result()
    cache.mark_batch("valuecot-x", "leaving").result()
    assert cache.withdraw_batch("valuecot-x", "withdrawn", only="made").result()[0] == 0
    assert len(cache.held("valuecot-x")) == 1 and cache.ledger()[0]["unanswered"] == 1
    assert cache.withdraw_batch("valuecot-x", "given-up", None).result()[0] == 1 and not cache.held("valuecot-x")


def test_nobody_sleeps_for_a_day_over_a_batch():
    from valuecot.providers.batches import patiently

    async def once():
        raise Failed("429 come back", again=True, wait=86_400.0)

    with pytest.raises(Failed) as error:
        asyncio.run(asyncio.wait_for(patiently(once, Policy()), 20))
    assert error.value.reason == "429 come back, asks to wait 1,440 minutes"


def test_nothing_to_ask_sends_nothing(cache):
    with queue_server() as (root, server):
        assert ask([], root, cache).replied == 0
        assert ask(questions(3), root, cache).replied == 3
        calls = dict(server.counts)
        assert ask(questions(3), root, cache).known == 3 and server.counts == calls
        assert ask([*questions(4), *questions(4)], root, cache).repeated == 1 and submitted(server) == {1}


def test_a_cap_is_never_passed(cache):
    most = PRICE.most(questions(1)[0], batch=True) / 1e9
    with queue_server() as (root, server):
        tally = ask(questions(30), root, cache, quick(cap=10.5 * most), largest=4)
        assert (tally.replied, tally.unasked, tally.failures) == (10, 20, []) and cache.spent <= 10.5 * most and sum(server.submitted.values()) == 10
        assert ask(questions(30), root, cache, quick(cap=cache.spent)).unasked == 20 and sum(server.submitted.values()) == 10
        assert ask(questions(30), root, cache, quick(cap=1.0)).replied == 20
        server.delay = 60
        begin_and_stop(cache, root, questions(30, word="kind"), cap=cache.spent + 10.5 * most)
        assert len(cache.open_batches("openai", "m")[0].held) == 10


def test_parts_stay_within_both_limits():
    entries = [(r, {"text": "ä" * i}) for i, r in enumerate(questions(50))]
    for count, size in ((7, 10**6), (50, 2000), (3, 1500)):
        parts = list(cut(entries, count, size))
        assert [e for part in parts for e in part] == entries and all(len(part) <= count for part in parts)
        assert all(len(json.dumps([e for _, e in part])) <= size for part in parts)
    assert list(cut([], 7, 100)) == [] and [len(p) for p in cut(entries[-2:], 7, 10)] == [1, 1]


def test_limits_are_below_the_documented_ones():
    "OpenAI and Anthropic by their packages' words and reference, Google's 20 MB by its guide."
    openai = pytest.importorskip("openai")
    said = openai.resources.batches.Batches.create.__doc__
    assert f"{QUEUES['openai'].count:,}" in said and f"{QUEUES['openai'].size // 10**6} MB" in said
    assert QUEUES["anthropic"].count <= 100_000 and QUEUES["anthropic"].size <= 256 * 10**6 and QUEUES["google"].size <= 20 * 10**6


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_export_is_that_of_a_live_run(provider, cache, tmp_path):
    with queue_server() as (root, _), Cache(tmp_path / "live.sqlite") as live:
        ask(questions(6, provider), root, cache)
        asyncio.run(ask_all(questions(6, provider), {f"{provider}/m": Live(provider, PRICE, root + BASE[provider])}, live, quick()))
        assert cache.spent == pytest.approx(live.spent / 2, rel=1e-4)
        export_replies(cache, tmp_path / "a.jsonl.gz"), export_replies(live, tmp_path / "b.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_batches_and_live_questions_in_one_collection(cache):
    "Two teachers, one in batches; a reply that does not fit is asked once more in a second batch."
    from valuecot.data.world import generate
    from valuecot.teacher.asked import Desk, collect, wanted

    desks = [Desk("patient", "anthropic", "m", 600), Desk("quick", "server", "n", 600)]
    prompts = generate(20, seed=0)
    wants = list(wanted(prompts, ("standard", "annealing"), lambda p: desks[prompts.index(p) % 2], 60))
    with queue_server(plain=False, delay=0.1) as (root, server):
        backends = {"anthropic/m": batched("anthropic", root), "server/n": Live("server", PRICE, f"{root}/v1")}
        found = collect(wants, backends, cache, quick(), progress=True)
        assert len(found.traces) == 40 and found.tally.replied == 40 and {t.teacher for t in found.traces} == {"patient", "quick"}
        assert server.counts["requests"] == 20 and server.counts["batches"] == 1 and submitted(server) == {1}
        assert collect(wants, {}, cache).traces == found.traces
    assert {row["provider"]: row["sent"] for row in cache.ledger()} == {"anthropic": 20, "server": 20}


def test_a_cache_of_before_keeps_working(tmp_path):
    old = sqlite3.connect(tmp_path / "old.sqlite")
    old.executescript("\n".join(line for line in TABLES.splitlines() if "batches" not in line and "held" not in line))
    old.execute("INSERT INTO sends(key, provider, model, at, most, cost) VALUES ('k', 'openai', 'm', 0, 5, 3)")
    old.commit(), old.close()
    with Cache(tmp_path / "old.sqlite") as cache, queue_server() as (root, _):
        assert cache.spent == 3e-9 and ask(questions(2), root, cache).replied == 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_key_is_in_no_file_and_no_message(provider, tmp_path, capfd):
    with Cache(tmp_path / "replies.sqlite") as cache, queue_server(rate_limited=0.2) as (root, server):
        ask(questions(5, provider), root, cache)
        lost = ask(questions(8, provider), f"{root}/{KEY}", cache)
        assert KEY in json.dumps(server.calls)  # it was sent
        said = repr(lost) + repr(cache.ledger()) + repr(batched(provider, root))
    assert len(lost.failures) == 3 and KEY not in said and KEY not in "".join(capfd.readouterr())
    assert all(KEY.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


# ------------------------------------------------------------------------- settings


def test_the_settings_name_who_is_asked_in_batches():
    from valuecot.settings import load
    from valuecot.teacher.asked import wanted
    from valuecot.teacher.desks import backends, desk_of, estimate

    one_by_one, batched = (load("paper", f"teacher.gpt-5-nano.batched={word}")["teacher.gpt-5-nano"] for word in ("no", "yes"))
    (live,), (many,) = (backends([m])[0].values() for m in (one_by_one, batched))
    assert isinstance(many, Batched) and not isinstance(live, Batched) and (many.price, many.connections) == (live.price, live.connections)
    with pytest.raises(ValueError, match="batched = yes"):
        load("paper", "teacher.local.batched=yes")
    from valuecot.data.world import generate

    wants = list(wanted(generate(4, seed=0), ("standard",), lambda p: desk_of("gpt-5-nano", batched), 60))
    full, half = (estimate(wants, {"gpt-5-nano": m}, None, 60)[0] for m in (one_by_one, batched))
    assert half["usd_at_most"] == pytest.approx(full["usd_at_most"] / 2, rel=1e-4) and half["usd_likely"] == pytest.approx(full["usd_likely"] / 2, rel=1e-4)


# ------------------------------------------------------------------------- kills

ASKER = """
import sys
from valuecot.providers.asking import Policy, ask
from valuecot.providers.batches import Batched
from valuecot.providers.cache import Cache
from valuecot.providers.prices import Price
from valuecot.providers.requests import Request
root, path, provider, base, n = sys.argv[1:]
questions = [Request(provider, "m", (("user", f"Question {i}: what is fair here, and why?"),), 300) for i in range(int(n))]
with Cache(path) as cache:
    ask(questions, {f"{provider}/m": Batched(provider, Price(0.05, 0.40, batch=0.5), root + base, poll=0.02, grace=0.5, largest=10)}, cache, Policy(tries=30, first_wait=0.01, longest_wait=0.1))
"""


def asker(root: str, path: Path, provider: str, n: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", ASKER, root, str(path), provider, BASE[provider], str(n)])


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_end(path: Path, provider: str, n: int, server: Server) -> None:
    with Cache(path) as cache:
        row, requests = cache.ledger()[0], questions(n, provider)
        assert all(cache.reply(r) for r in requests) and cache.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (n,)
        assert submitted(server) == {1} and len(server.submitted) == n
        assert (row["replies"], row["unanswered"]) == (n, 0) and round(cache.spent * 1e9) == sum(PRICE.of(cache.reply(r), batch=True) for r in requests)
        assert not cache.open_batches(provider, "m")


def killed_run(folder: Path, provider: str, n: int, kills: int, seed: int, **faults) -> None:
    rng, path = random.Random(seed), folder / "replies.sqlite"
    with queue_server(latency=0.01, delay=0.3, unlisted=0.1, **faults) as (root, server):
        for _ in range(kills):
            process, begun = asker(root, path, provider, n), sum(server.counts.values())
            while sum(server.counts.values()) == begun and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            kill(process)
        assert asker(root, path, provider, n).wait() == 0
        check_end(path, provider, n, server)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_killed_run_pays_each_question_once(provider, tmp_path):
    killed_run(tmp_path, provider, 40, 3, seed=PROVIDERS.index(provider), rate_limited=0.05, broken=0.05)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_run_killed_between_acceptance_and_its_record_finds_the_batch(provider, tmp_path):
    "The server is slow: it accepts when nobody listens any more."
    path = tmp_path / "replies.sqlite"
    with queue_server(latency=0.2, delay=0.1) as (root, server), Cache(path) as cache:
        process = asker(root, path, provider, 10)
        while not any("atch" in path for _, path, *_ in server.calls) and process.poll() is None:
            time.sleep(0.002)
        kill(process)
        assert [b.state for b in cache.open_batches(provider, "m")] == ["leaving"] and not server.batches
        time.sleep(0.3)
        assert len(server.batches) == 1 and states(cache) == ["leaving"]
        server.latency = 0.0
        assert asker(root, path, provider, 10).wait() == 0
        assert states(cache) == ["ended"]
        check_end(path, provider, 10, server)


def test_a_batch_that_never_left_leaves_anew(tmp_path):
    "Killed while its file goes up: the reservation is withdrawn, and the cap has room for the next one."
    path = tmp_path / "replies.sqlite"
    with queue_server(latency=0.3) as (root, server), Cache(path) as cache:
        process = asker(root, path, "openai", 10)
        while not any(b.held for b in cache.open_batches("openai", "m")) and process.poll() is None:
            time.sleep(0.002)
        kill(process)
        assert states(cache) == ["made"] and not server.batches
        server.latency = 0.0
        tally = ask(questions(10), root, cache, quick(cap=1.01 * cache.spent))
        assert (tally.replied, tally.unasked, states(cache)) == (10, 0, ["withdrawn", "ended"]) and submitted(server) == {1}


def test_a_batch_that_another_run_withdrew_does_not_leave(cache):
    async def run():
        work = asyncio.create_task(ask_all(questions(3), {"openai/m": batched("openai", root)}, cache, quick()))
        while not any(b.held for b in cache.open_batches("openai", "m")):
            await asyncio.sleep(0.002)
        cache.withdraw_batch(cache.open_batches("openai", "m")[0].name, "withdrawn")
        return await work

    with queue_server(latency=0.1) as (root, server):
        tally = asyncio.run(run())
        assert all("another run" in f.reason for f in tally.failures) and len(tally.failures) == 3 and not server.batches and cache.spent == 0


def test_a_batch_that_was_not_accepted_leaves_anew_and_says_so(cache):
    cache.begin_batch("valuecot-lost", "anthropic", "m")
    for r in questions(3, "anthropic"):
        cache.hold("valuecot-lost", r, 1000, None)
    cache.mark_batch("valuecot-lost", "leaving").result()
    with queue_server() as (root, server), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        server.accept("anthropic", "m", None, [(r.key, WIRES["anthropic"].body(r)) for r in questions(3, "anthropic", "theirs")])
        assert ask(questions(3, "anthropic"), root, cache).replied == 3
        assert any("valuecot-lost with 3 questions is not in the list" in str(w.message) for w in said)
        assert submitted(server) == {1} and cache.ledger()[0]["failures"] == {"withdrawn": 3}


@pytest.mark.prove
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("seed", range(3))
def test_four_hundred_questions_ten_kills_all_faults(provider, seed, tmp_path):
    killed_run(tmp_path, provider, 400, 10, seed, rate_limited=0.1, broken=0.1, reset=0.05, truncated=0.05)
