"""Questions, the cache of replies, prices and asking: against a server that speaks the providers' formats and fails on demand."""

import asyncio
import gzip
import json
import multiprocessing
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pyarrow.parquet
import pytest
from cache_filler import fill
from pydantic import BaseModel, ConfigDict

from valuecot.companion import pages
from valuecot.data.world import generate
from valuecot.providers.asking import Backend, Live, Policy, ask_all, seconds
from valuecot.providers.cache import Cache, Writer, export_replies, import_replies
from valuecot.providers.prices import Price, usd
from valuecot.providers.requests import Failed, Failure, Reply, Request, as_request, canonical
from valuecot.providers.structured import Malformed, read
from valuecot.providers.wire import WIRES, read_reply
from valuecot.settings import load
from valuecot.teacher.asked import Desk, Quarantined, by_reason, collect, commonest, outcome, wanted, with_traces
from valuecot.teacher.audit import audit
from valuecot.teacher.rules import write_trace
from valuecot.teacher.schemas import AnnealingReply, StandardReply
from valuecot.types import Prompt

HERE = Path(__file__).parent
DATA = load("test")["geometry"]
ASKED = 2 * (DATA.sft_prompts + DATA.heldout_prompts)  # two styles of each
KEY = "sk-planted-0123456789abcdef"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
PRICE = Price(0.05, 0.40)
PINNED = {"standard": "f8042a33ef079c26", "annealing": "7e4c65b33be2c0ae"}
QUICK = Policy(tries=8, first_wait=0.01, rng=random.Random(0))


@contextmanager
def server(**options):  # -> base URL, a function that tells its counts
    "The server of teacher_server.py in a process of its own."
    flags = [f"--{k}={v}" for k, v in options.items()]
    process = subprocess.Popen([sys.executable, str(HERE / "teacher_server.py"), *flags], stdout=subprocess.PIPE, text=True)
    try:
        root = f"http://127.0.0.1:{int(process.stdout.readline())}"
        yield root, lambda: json.loads(urllib.request.urlopen(f"{root}/counts", timeout=10).read())
    finally:
        process.kill()
        process.wait()


def questions(n: int, **changed) -> list[Request]:
    return [Request(**{"provider": "server", "model": "m", "messages": (("user", f"Question {i}: what is fair here, and why?"),), "max_tokens": 300} | changed) for i in range(n)]


def ask(requests, root: str, cache: Cache, policy: Policy = QUICK, **options):
    async def run():
        return await ask_all(requests, {"server/m": Live("server", PRICE, f"{root}/v1", **{"connections": 8} | options)}, cache, policy)

    return asyncio.run(run())


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "replies.sqlite") as found:
        yield found


# ------------------------------------------------------------------------- questions


def test_all_that_can_change_the_answer_is_in_the_name():
    base = {"provider": "server", "model": "m", "messages": (("user", "q"),), "max_tokens": 9, "parameters": {"temperature": 1.0}, "schema": SCHEMA, "sample": 0}
    changes = {"provider": "openai", "model": "n", "messages": (("system", "s"), ("user", "q")), "max_tokens": 10, "parameters": {"temperature": 0.0}, "schema": {}, "sample": 1}
    names = {Request(**base).key} | {Request(**base | {k: v}).key for k, v in changes.items()}
    assert len(names) == 1 + len(changes)
    assert Request(**base).key == Request(**base | {"parameters": dict(base["parameters"])}).key == as_request(Request(**base).text).key


def test_the_order_of_parameters_changes_nothing():
    one, two = (questions(1, parameters=dict(p))[0] for p in ([("temperature", 1.0), ("seed", 3)], [("seed", 3), ("temperature", 1.0)]))
    assert one.key == two.key


@pytest.mark.parametrize("changed, said", [
    ({"messages": ()}, "last message"), ({"messages": (("assistant", "x"),)}, "last message"), ({"messages": (("user", " \n"),)}, "blank"),
    ({"messages": (("boss", "x"), ("user", "y"))}, "none of system"), ({"max_tokens": 0}, "no room"),
])  # fmt: skip
def test_questions_that_cannot_be_asked(changed, said):
    with pytest.raises(ValueError, match=said):
        questions(1, **changed)


# ------------------------------------------------------------------------- formats, judged by the providers' own packages


def sdk_openai(root, request):
    openai = pytest.importorskip("openai")
    found = openai.OpenAI(base_url=f"{root}/v1", api_key=KEY, max_retries=0).chat.completions.create(
        model=request.model, messages=[{"role": r, "content": t} for r, t in request.messages], max_completion_tokens=request.max_tokens, temperature=1.0, top_p=0.9, seed=3,
        reasoning_effort="low", response_format={"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}},
    )  # fmt: skip
    return found.choices[0].message.content, (found.usage.prompt_tokens, found.usage.completion_tokens)


def sdk_anthropic(root, request):
    anthropic = pytest.importorskip("anthropic")
    turns = [{"role": r, "content": t} for r, t in request.messages if r != "system"]
    found = anthropic.Anthropic(base_url=root, api_key=KEY, max_retries=0).messages.create(
        model=request.model, max_tokens=request.max_tokens, system=request.messages[0][1], messages=turns, output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}
    )
    return found.content[0].text, (found.usage.input_tokens, found.usage.output_tokens)


def sdk_google(root, request):
    genai = pytest.importorskip("google.genai")
    turns = [{"role": {"user": "user", "assistant": "model"}[r], "parts": [{"text": t}]} for r, t in request.messages if r != "system"]
    how = {"system_instruction": request.messages[0][1], "temperature": 1.0, "top_p": 0.9, "seed": 3, "max_output_tokens": request.max_tokens, "response_mime_type": "application/json",
           "response_json_schema": SCHEMA, "thinking_config": {"thinking_level": "low"}}  # fmt: skip
    client = genai.Client(api_key=KEY, http_options={"base_url": root})  # named: a client that is collected closes its connection
    found = client.models.generate_content(model=request.model, contents=turns, config=how)
    return found.text, (found.usage_metadata.prompt_token_count, found.usage_metadata.candidates_token_count)


SDKS = {"openai": (sdk_openai, "/v1"), "anthropic": (sdk_anthropic, ""), "google": (sdk_google, "")}


@pytest.mark.parametrize("provider", SDKS)
def test_bodies_and_replies_are_those_of_the_providers_own_package(provider, cache, monkeypatch):
    "What their package sends and reads, ours sends and reads."
    monkeypatch.setenv(WIRES[provider].key, KEY)
    talk = (("system", "Be brief."), ("user", "Which value comes first here?"), ("assistant", "Safety."), ("user", "And what about the other one, and why?"))
    known = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "effort": "low"} if provider != "anthropic" else {"effort": "low"}
    request = Request(provider, "some-model", talk, 300, known, SCHEMA)
    sdk, path = SDKS[provider]
    with server() as (root, told):
        theirs = sdk(root, request)
        tally = asyncio.run(ask_all([request], {request.who: Live(provider, PRICE, root + path)}, cache, QUICK))
        bodies, headers = told()["bodies"], told()["headers"]
    ours = cache.reply(request)
    assert tally.replied == 1 and (ours.text, (ours.input_tokens, ours.output_tokens)) == theirs
    assert bodies[0] == bodies[1]
    said = [{k.lower(): v for k, v in h.items() if k.lower() in ("authorization", "x-goog-api-key", "anthropic-version", "x-api-key")} for h in headers]
    assert said[0] == said[1]


@pytest.mark.parametrize("provider, body", [
    ("openai", {"choices": [{"message": {"content": None}, "finish_reason": "length"}], "usage": {"prompt_tokens": 1, "completion_tokens": 9}, "model": "m"}),
    ("openai", {"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 9}, "model": "m"}),
    ("anthropic", {"content": [], "stop_reason": "max_tokens", "usage": {"input_tokens": 1, "output_tokens": 9}, "model": "m"}),
    ("anthropic", {"content": [{"type": "text", "text": "I"}], "stop_reason": "refusal", "usage": {"input_tokens": 1, "output_tokens": 9}, "model": "m"}),
    ("google", {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 1}}),
    ("google", {"candidates": [{"finishReason": "MAX_TOKENS", "content": {"role": "model"}}], "usageMetadata": {"promptTokenCount": 1, "thoughtsTokenCount": 9}}),
])  # fmt: skip
def test_no_words_are_a_failure_that_was_billed(provider, body):
    with pytest.raises(Failed, match="empty|refusal") as error:
        read_reply(provider, body)
    assert error.value.billed and not error.value.again


@pytest.mark.parametrize("provider", WIRES)
@pytest.mark.parametrize("body", [{}, [], None, "text", {"choices": [{}]}, {"content": "x"}, {"candidates": [None]}])
def test_answers_of_another_shape_are_tried_again(provider, body):
    with pytest.raises(Failed) as error:
        read_reply(provider, body)
    assert error.value.again or "refusal" in error.value.reason


# ------------------------------------------------------------------------- asking


def test_every_question_ends_once_under_all_faults(cache):
    with server(rate_limited=0.1, broken=0.05, reset=0.02, truncated=0.03) as (root, told):
        tally = ask(questions(300), root, cache, connections=16)
        counts = told()["counts"]
    assert (tally.replied, tally.failures, tally.unasked) == (300, [], 0)
    row = cache.ledger()[0]
    assert row["sent"] == counts["requests"] and row["replies"] == counts["answered"] == 300 and row["unanswered"] == 0
    assert row["failures"] == {"429": counts["rate_limited"], "500": counts["broken"], "connection": counts["reset"], "malformed": counts["truncated"]}
    assert min(counts[f] for f in ("rate_limited", "broken", "reset", "truncated")) > 0
    assert row["usd"] == pytest.approx(cache.spent)


def test_what_is_on_disk_is_not_asked_again(cache):
    with server() as (root, told):
        ask(questions(20), root, cache)
        tally = ask([*questions(25), *questions(25)], root, cache)
        assert (tally.known + tally.repeated, tally.replied) == (45, 5) and told()["counts"]["requests"] == 25


def test_refusals_are_recorded_and_not_repeated(cache):
    with server() as (root, told):
        lost = asyncio.run(ask_all(questions(3), {"server/m": Live("server", PRICE, f"{root}/nowhere")}, cache, QUICK))
        assert [f.tries for f in lost.failures] == [1, 1, 1] and all(f.reason.startswith("404") for f in lost.failures)
        assert cache.spent == 0 and cache.ledger()[0]["failures"] == {"404": 3}
        assert ask(questions(3), root, cache).replied == 3  # a failure is no reply: it is asked again


def test_a_blank_reply_is_never_passed_on(cache):
    with server(empty=1.0) as (root, _):
        tally = ask(questions(4), root, cache)
    assert len(tally.failures) == 4 and all("empty" in f.reason for f in tally.failures)
    assert all(cache.reply(q) is None for q in questions(4)) and cache.spent > 0


def test_a_server_that_hangs_times_out(cache):
    with server(hang=1.0) as (root, _):
        tally = ask(questions(3), root, cache, Policy(tries=2, first_wait=0.01), timeout=0.3)
    assert [f.reason for f in tally.failures] == ["timeout"] * 3 and cache.ledger()[0]["sent"] == 6
    assert cache.spent == pytest.approx(6 * PRICE.most(questions(1)[0]) / 1e9)  # may have been billed


def test_a_server_that_is_not_there(cache):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        tally = ask(questions(2), f"http://127.0.0.1:{closed.getsockname()[1]}", cache, Policy(tries=2, first_wait=0.01))
        port = closed.getsockname()[1]
    assert [f.reason for f in tally.failures] == [f"connection (ClientConnectorError): does a server run at http://127.0.0.1:{port}/v1/chat/completions?"] * 2
    assert cache.ledger()[0]["failures"] == {"connection": 4} and cache.spent == 0  # nobody was reached, so nobody can charge


def test_a_server_that_does_not_take_the_call_costs_nothing(cache):
    "Its queue of connections is full: the handshake never ends."
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()), socket.socket() as second:
        second.setblocking(False)
        second.connect_ex(full.getsockname())
        tally = ask(questions(2), f"http://127.0.0.1:{full.getsockname()[1]}", cache, Policy(tries=1), timeout=0.8)
    assert [f.reason for f in tally.failures] == ["timeout"] * 2 and cache.spent == 0


def test_an_address_that_holds_nothing_is_named_without_its_secrets(cache, monkeypatch):
    def reason(base):
        return asyncio.run(ask_all(questions(1), {"server/m": Live("server", PRICE, base)}, cache, QUICK)).failures[0].reason

    with server() as (root, _):
        bare, nowhere, named = reason(root), reason(f"{root}/v1/nowhere"), reason(root.replace("//", "//me:word@"))
        monkeypatch.setenv("SERVER_API_KEY", KEY)
        secret = reason(f"{root}/{KEY}")
    assert bare.startswith(f"404 at {root}/chat/completions, is /v1 missing from base_url?") and nowhere.startswith(f"404 at {root}/v1/nowhere/chat/completions 404")
    assert named == bare and KEY not in secret and "/[key]/chat" in secret


def test_a_wait_is_as_long_as_asked_and_grows():
    policy = Policy(first_wait=0.5, longest_wait=4.0, rng=random.Random(1))
    assert all(3.0 <= policy.wait(1, 3.0) <= 3.5 for _ in range(50))
    longest = [max(policy.wait(tried, None) for _ in range(400)) for tried in range(1, 8)]
    assert longest == sorted(longest[:4]) + longest[4:] and max(longest) <= 4.0 and longest[3] > 3.5
    assert [seconds(x) for x in ("2", "-1", None, "soon", "inf", "nan", "Wed, 21 Oct 2020 07:28:00 GMT")] == [2.0, 0.0, None, None, None, None, 0.0]
    assert 50 < seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60


def test_a_limit_per_minute_is_kept(cache):
    "A leaky bucket of 60 per minute gives 60 at once; the next come one by one."
    with server() as (root, _):
        start = time.monotonic()
        ask(questions(62), root, cache, per_minute=60, connections=32)
    assert time.monotonic() - start > 1.5


class Broken(Backend):
    "A backend with a mistake of its own."

    connections, price = 4, PRICE

    async def ask(self, request):
        if request.messages[0][1].startswith("Question 3"):
            raise ZeroDivisionError("of its own making")
        return Reply("fine", "m", 1, 1, "stop")

    async def close(self):
        pass


def test_a_mistake_in_a_backend_ends_one_question_and_not_the_batch(cache):
    tally = asyncio.run(ask_all(questions(20), {"server/m": Broken()}, cache, QUICK))
    assert tally.replied == 19 and [f.reason for f in tally.failures] == ["ZeroDivisionError: of its own making"] and not tally.failures[0].lasting
    assert cache.ledger()[0]["failures"] == {"ZeroDivisionError": 1}


@pytest.mark.parametrize("text, tokens", [("half a \ud83d", 5), ("fine", None), ("fine", -1), ("fine", "5")])
def test_an_answer_that_no_file_can_hold_is_malformed(text, tokens):
    body = {"model": "m", "choices": [{"finish_reason": "stop", "message": {"content": text}}], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}
    with pytest.raises(Failed, match="malformed answer") as error:
        read_reply("server", body)
    assert error.value.again and error.value.billed


def test_a_paid_text_without_a_count_is_kept_at_the_most_it_can_cost(cache):
    "Some servers report no usage: the text is bought once."
    with server(uncounted=1.0) as (root, told):
        tally = ask(questions(3), root, cache)
        assert (tally.replied, told()["counts"]["requests"]) == (3, 3)
    row = cache.ledger()[0]
    assert cache.spent == row["usd_unsettled"] == pytest.approx(3 * PRICE.most(questions(1)[0]) / 1e9) and row["unanswered"] == 0
    assert cache.reply(questions(1)[0]).output_tokens is None


def test_one_reply_that_cannot_be_written_spoils_no_other(cache, monkeypatch):
    commit, gate = Writer.commit, threading.Event()
    monkeypatch.setattr(Writer, "commit", staticmethod(lambda db, jobs: (gate.wait(), commit(db, jobs))))
    jobs = [cache.keep(questions(1, sample=i)[0], Reply("half \ud83d" if i == 7 else "whole", "m", 1, 1, "stop"), "live") for i in range(20)]
    gate.set()
    assert [i for i, job in enumerate(jobs) if job.exception(10)] == [7]
    assert cache.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (19,)


def test_a_wait_that_was_given_up_does_not_stop_the_writer(cache):
    for i in range(50):
        cache.keep(questions(1, sample=i)[0], Reply("a", "m", 1, 1, "stop"), "live").cancel()
    assert cache.keep(questions(1, sample=99)[0], Reply("a", "m", 1, 1, "stop"), "live").result(timeout=10)[0] == 1
    assert cache.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (51,), "a reply is written also where nobody waits for it"


def test_a_run_that_is_stopped_keeps_what_came(cache, monkeypatch):
    "Ctrl-C, on a slow disk: in-flight questions stay in the ledger, replies are on disk before the caller goes on."
    commit, keep, came = Writer.commit, cache.keep, []
    monkeypatch.setattr(Writer, "commit", staticmethod(lambda db, jobs: (time.sleep(0.2), commit(db, jobs))))
    monkeypatch.setattr(cache, "keep", lambda *values: (came.append(values), keep(*values))[1])

    async def run():
        work = asyncio.create_task(ask_all(questions(400), {"server/m": Live("server", PRICE, f"{root}/v1", connections=8)}, cache, QUICK))
        while len(came) < 10:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return cache.db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    with server(latency=0.05) as (root, told):
        kept = asyncio.run(run())
        assert 10 <= kept == len(came) < 400 and cache.ledger()[0]["unanswered"] <= 8
        monkeypatch.undo()
        assert ask(questions(400), root, cache).known == kept


def test_other_peoples_replies_are_not_mixed_with_ones_own(cache, tmp_path):
    with Cache(tmp_path / "theirs.sqlite") as theirs:
        for i in range(3):
            theirs.keep(questions(3)[i], Reply(f"theirs {i}", "m", 1, 1, "stop"), "live").result()
        export_replies(theirs, tmp_path / "theirs.jsonl.gz")
    cache.keep(questions(1)[0], Reply("mine", "m", 1, 1, "stop"), "live").result()
    with pytest.raises(ValueError, match="holds other replies to 1 questions .*nothing was imported"):
        import_replies(cache, tmp_path / "theirs.jsonl.gz")
    assert cache.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (1,)


def test_a_cache_that_cannot_be_opened_is_not_called_broken(tmp_path):
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(OSError, match="cannot be opened .*untouched"):
        Cache(tmp_path / "folder.sqlite")


def test_nobody_to_ask(cache):
    tally = asyncio.run(ask_all(questions(2), {}, cache))
    assert len(tally.failures) == 2 and "not in the cache" in tally.failures[0].reason


# ------------------------------------------------------------------------- money


def test_a_cap_is_never_passed(cache):
    most = PRICE.most(questions(1)[0]) / 1e9
    with server(latency=0.01) as (root, told):
        tally = ask(questions(60), root, cache, Policy(cap=10.5 * most), connections=8)
        assert 10 <= tally.replied < 60 and tally.replied + tally.unasked == 60
        assert cache.spent <= 10.5 * most and told()["counts"]["requests"] == tally.replied
        assert ask(questions(60), root, cache, Policy(cap=cache.spent)).replied == 0
        assert ask(questions(60), root, cache, Policy(cap=1.0)).unasked == 0


@pytest.mark.parametrize("room", [1.5, 3.5])
def test_reservations_fill_a_cap_only_while_they_last(cache, room):
    "A question reserves a hundred times what it costs: with room for one or three at a time, all are answered below the cap."
    long = questions(40, max_tokens=30_000)
    cap = room * PRICE.most(long[0]) / 1e9
    with server(latency=0.01) as (root, told):
        tally = ask(long, root, cache, Policy(cap=cap), connections=8)
        assert (tally.replied, tally.unasked, told()["counts"]["requests"]) == (40, 0, 40)
    assert cache.spent <= cap


def test_nobody_waits_for_room_that_cannot_come(cache):
    "Refused at the same time with nothing under way; and beside questions that stay at the most they can cost."
    most = PRICE.most(questions(1)[0]) / 1e9
    with server(hang=1.0) as (root, told):
        start = time.monotonic()
        assert ask(questions(30), root, cache, Policy(cap=0.9 * most)).unasked == 30 and time.monotonic() - start < 5
        tally = ask(questions(30), root, cache, Policy(tries=1, cap=2.9 * most), timeout=0.3)
        assert (len(tally.failures), tally.unasked) == (2, 28) and told()["counts"]["requests"] == 2 and cache.spent <= 2.9 * most


def test_room_that_comes_while_a_question_is_refused_is_seen(cache, monkeypatch):
    "The only one under way ends before the refusal is heard: its room must not be missed."
    first, second = questions(2, max_tokens=4000)
    send, released = cache.send, threading.Event()

    def slow(request, most, cap):  # the refusal is heard late
        job = send(request, most, cap)
        job.result(10)
        released.set() if request is second else None
        return job

    class Quick(Backend):
        connections, price = 2, PRICE

        async def ask(self, request):
            while request is first and not released.is_set():
                await asyncio.sleep(0.001)
            return Reply("fine", "m", 1, 1, "stop")

        async def close(self):
            pass

    monkeypatch.setattr(cache, "send", slow)
    tally = asyncio.run(ask_all([first, second], {"server/m": Quick()}, cache, Policy(cap=1.5 * PRICE.most(first) / 1e9)))
    assert (tally.replied, tally.unasked) == (2, 0)


def test_amounts_keep_their_digits():
    assert [usd(a) for a in (0, 2.5e-7, 0.0105, 0.25, 3, 12345.678)] == ["$0.00", "$0.00000025", "$0.0105", "$0.25", "$3.00", "$12,345.68"]


def test_a_bound_is_above_the_bill():
    for text in ("q", "Ä" * 50, "word " * 400, "🙂" * 30, '"\\\n' * 40):
        request = Request("server", "m", (("user", text),), 100, schema=SCHEMA)
        assert PRICE.most(request) >= PRICE.cost(len(text.encode()), 100)
    assert PRICE.cost(1_000_000, 1_000_000) == 450_000_000 and Price(0.0333, 0).cost(1, 0) == 34  # rounded up


# ------------------------------------------------------------------------- the cache


def test_many_processes_write_at_once(tmp_path):
    path = str(tmp_path / "replies.sqlite")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fill, args=(path, questions(20 * i + 40)[20 * i :])) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    with Cache(path) as cache:
        assert all(w.exitcode == 0 for w in workers)
        assert cache.db.execute("SELECT COUNT(*), COUNT(DISTINCT key) FROM replies").fetchone() == (100, 100)
        row = cache.ledger()[0]
        assert (row["sent"], row["replies"], row["usd"]) == (160, 160, 160 * 7 / 1e9)


def test_an_export_replays_byte_for_byte(cache, tmp_path, monkeypatch):
    with server() as (root, _):
        ask(questions(12), root, cache)
    assert export_replies(cache, tmp_path / "a.jsonl.gz") == 12
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network is off"))
    with Cache(tmp_path / "theirs.sqlite") as theirs:
        assert (import_replies(theirs, tmp_path / "a.jsonl.gz"), import_replies(theirs, tmp_path / "a.jsonl.gz")) == (12, 0)
        assert asyncio.run(ask_all(questions(12), {}, theirs)).known == 12
        assert all(theirs.reply(q) == cache.reply(q) for q in questions(12))
        export_replies(theirs, tmp_path / "b.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert export_replies(cache, tmp_path / "c.jsonl.gz", [q.key for q in questions(5)]) == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: gzip.compress(b""), lambda b: b"no gzip", lambda b: b[:30] + bytes(10) + b[40:]])
def test_a_damaged_export_changes_nothing(cache, tmp_path, damage):
    cache.keep(questions(1)[0], Reply("mine", "m", 1, 1, "stop"), "live").result()
    export_replies(cache, tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(damage((tmp_path / "a.jsonl.gz").read_bytes()))
    with Cache(tmp_path / "theirs.sqlite") as theirs:
        with pytest.raises(ValueError, match="(the file is empty|it was cut off|BadGzipFile|error|Error).*nothing was imported") as error:
            import_replies(theirs, tmp_path / "a.jsonl.gz")
        size = (tmp_path / "a.jsonl.gz").stat().st_size
        assert ("the file is empty" in str(error.value)) == (size == 0) and "unpack" not in str(error.value)
        assert theirs.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (0,)


def test_the_first_reply_stays(cache):
    q = questions(1)[0]
    for text in ("one", "two"):
        cache.keep(q, Reply(text, "m", 1, 1, "stop"), "live").result()
    assert cache.reply(q).text == "one"


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "replies.sqlite").write_bytes(b"this is a text, not a database" * 100)
    with pytest.raises(ValueError, match="no cache of replies"):
        Cache(tmp_path / "replies.sqlite")


def test_a_full_disk_is_told_to_everyone_who_waits(cache):
    cache.writer.write("PRAGMA max_page_count = 1").exception()
    jobs = [cache.keep(q, Reply("long " * 4000, "m", 1, 1, "stop"), "live") for q in questions(30)]
    errors = {type(j.exception(timeout=30)) for j in jobs}
    assert sqlite3.OperationalError in errors


# ------------------------------------------------------------------------- what a reply holds


class Choice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: str
    why: str


WHOLE = '{"value": "duty", "why": "it was promised, {really}, \\"twice\\", as [they] say:,}"}'


@pytest.mark.parametrize("text", [
    WHOLE, f"```json\n{WHOLE}\n```", f"Here you are:\n\n{WHOLE}\n\nAnything else?", WHOLE[:-1] + ",}", WHOLE[:-1] + " ,\n }", f"{{not json}} {WHOLE}", f"{WHOLE}\n{WHOLE}",
    f'{{"thoughts": "first"}}\n{WHOLE}', "\ufeff" + WHOLE,
])  # fmt: skip
def test_what_is_all_there_is_read(text):
    assert read(Reply(text, "m", 1, 1, "stop"), Choice) == Choice(**json.loads(WHOLE))


COT = {"values": {"value_1": "duty", "value_2": "mercy"}, "response": {"cot": "He 'promised it', and that counts, {really}.", "final_response": "Keep it."}}
PHASED = {"values": COT["values"], "annealing_cot": dict.fromkeys(("phase_1_high_temp", "phase_2_cooling", "phase_3_low_temp"), "So, [on]."), "final_model_response": "Keep it."}


@pytest.mark.parametrize("kind, whole", [(StandardReply, COT), (AnnealingReply, PHASED)])
@pytest.mark.parametrize("slip", [
    lambda text: text, lambda text: text[:-1] + ",}", lambda text: text.replace('"}', '",}'), lambda text: text.replace("}, ", ",}, "), lambda text: re.sub('"([^"]*)"', "“\\1”", text),
    lambda text: re.sub('"([^"]*)"', "“\\1”", text.replace("}}", "},}")),
])  # fmt: skip
def test_an_object_in_an_object_is_read_as_a_whole_with_its_slips(kind, whole, slip):
    "The inner one can be read as it stands, and is not what was asked for."
    assert read(Reply(f"Here:\n{slip(json.dumps(whole))}", "m", 1, 1, "stop"), kind) == kind(**whole)


def test_curly_quotes_and_line_breaks_are_read():
    assert read(Reply("{“value”: “duty”, “why”: “it was\npromised”,}", "m", 1, 1, "stop"), Choice).why == "it was\npromised"
    assert read(Reply('{"value": "duty", "why": "she said “go”, and “stay”"}', "m", 1, 1, "stop"), Choice).why == "she said “go”, and “stay”"


@pytest.mark.parametrize("text, said", [
    ("", "no JSON"), ("I cannot help with that.", "no JSON"), ('{"value": "duty"}', "why is missing"), ('{"value": "duty", "why": 3}', "why"), ("[1, 2]", "no JSON"),
    ('{"value": "duty", "why": "x", "more": 1}', "more"), (WHOLE + WHOLE.replace("duty", "care"), "2 different objects"), ("null", "no JSON"), ("{" * 3000, "no JSON"),
])  # fmt: skip
def test_what_is_not_there_is_not_invented(text, said):
    with pytest.raises(Malformed, match=said):
        read(Reply(text or " ", "m", 1, 1, "stop"), Choice)


def test_no_beginning_of_a_reply_passes_for_the_whole():
    for end in range(1, len(WHOLE)):
        with pytest.raises(Malformed):
            read(Reply(WHOLE[:end], "m", 1, 1, "stop"), Choice)
    with pytest.raises(Malformed, match="cut off"):
        read(Reply(WHOLE, "m", 1, 1, "length"), Choice)


def desk() -> Desk:
    return Desk("stand-in", "server", "m", max_tokens=600)


def traced(n: int, root: str, cache: Cache, policy: Policy = QUICK, connections: int = 16):
    wants = list(wanted(generate(n, seed=0), ("standard", "annealing"), lambda p: desk(), 60))
    found = collect(wants, {"server/m": Live("server", PRICE, f"{root}/v1", connections=connections)} if root else {}, cache, policy)
    return found.traces, found.aside, found.tally


def test_every_prompt_ends_as_a_trace_or_a_reason(cache):
    with server(malformed=0.25, slipped=0.2) as (root, told):
        traces, aside, tally = traced(60, root, cache)
        counts = told()["counts"]
    assert counts["slipped"] > 10
    assert len(traces) + len(aside) == 120 and len({(t.prompt_id, t.style) for t in traces} | {(q.prompt_id, q.style) for q in aside}) == 120
    assert 0 < len(aside) < 25 and counts["requests"] == 120 + counts["malformed"] - len(aside)  # each that did not fit was asked once more
    assert all(q.reason and q.text for q in aside) and sum(row["count"] for row in by_reason(aside)) == len(aside)
    assert all(t.phases and t.response and t.teacher == "stand-in" for t in traces)
    assert traced(60, "", cache)[:2] == (traces, aside)  # with nobody to ask


def test_a_server_that_repeats_its_replies_is_seen_by_the_audit(cache):
    "Every reply is well formed: only beside the others does it look odd."
    with server(repeated=0.15) as (root, told):
        traces, aside, _ = traced(100, root, cache)
        repeated = told()["counts"]["repeated"]
    found = [f for f in audit(generate(100, seed=0), traces, 80) if f.kind == "near-duplicate"]
    clean = [f for f in audit(generate(100, seed=0), [write_trace(p, s, 80, 0) for p in generate(100, seed=0) for s in ("standard", "annealing")], 80) if f.kind == "near-duplicate"]
    assert len(traces) == 200 and not aside and repeated > 15
    assert 0.95 * repeated <= len(found) <= repeated + 0.05 * len(traces) and len(clean) <= 0.05 * len(traces)


def test_an_empty_reply_is_asked_for_once_more_and_then_put_aside_and_replays(cache, tmp_path):
    with server(empty=0.4) as (root, told):
        traces, aside, tally = traced(30, root, cache)
        counts, spent = told()["counts"], cache.spent
        first = cache.db.execute("SELECT COUNT(*) FROM failures WHERE json_extract(request, '$.sample') = 0").fetchone()[0]
        assert first > 15 and counts["requests"] == 60 + first and 0 < len(aside) < first and not tally.failures
        assert len(traces) + len(aside) == 60 and all(q.reason.startswith("empty reply") for q in aside)
        assert outcome(traces, aside) == f"{len(traces)} traces, {len(aside)} put aside: {len(aside)} x empty reply (stop)"
        assert traced(30, root, cache)[:2] == (traces, aside) and told()["counts"]["requests"] == counts["requests"] and cache.spent == spent
    export_replies(cache, tmp_path / "all.jsonl.gz")
    with Cache(tmp_path / "other.sqlite") as other:
        import_replies(other, tmp_path / "all.jsonl.gz")
        again = traced(30, "", other)
        assert again[:2] == (traces, aside) and not again[2].failures
        export_replies(other, tmp_path / "again.jsonl.gz")
    assert (tmp_path / "all.jsonl.gz").read_bytes() == (tmp_path / "again.jsonl.gz").read_bytes()


def test_what_was_refused_for_free_is_asked_again_where_somebody_is_there(cache):
    with server() as (root, told):
        tally = asyncio.run(ask_all(questions(6), {"server/m": Live("server", PRICE, f"{root}/closed")}, cache, QUICK))
        assert all(f.lasting for f in tally.failures) and cache.spent == 0
        assert [f.reason for f in asyncio.run(ask_all(questions(6), {}, cache)).failures] == [f.reason for f in tally.failures]  # a replay
        assert ask(questions(6), root, cache).replied == 6


def test_a_cap_leaves_the_rest_unasked_and_says_how_many(cache):
    with server() as (root, _):
        traces, aside, tally = traced(40, root, cache, Policy(cap=0.005))
    assert cache.spent <= 0.005 and tally.unasked > 0 and len(traces) + tally.unasked == 80 and not aside


# ------------------------------------------------------------------------- the stage


def stage_run(outputs, folder: Path, base_url: str, monkeypatch, extra: str = ""):
    "The traces stage of the test profile with a teacher behind `base_url`."
    from valuecot.flow.run import begin
    from valuecot.geometry.traces import run_traces, stage

    monkeypatch.setenv("VALUECOT_OUTPUTS", str(outputs))
    run = begin(stage, "test", out=str(folder), overrides=f"geometry.traces.teachers=local teacher.local.base_url={base_url} teacher.local.model=m {extra}")
    return run_traces(run)


@pytest.fixture
def prompts_only(outputs, tmp_path):
    "An outputs folder of one's own that holds the prompts."
    shutil.copytree(outputs / "test" / "geometry" / "prompts", tmp_path / "outputs" / "test" / "geometry" / "prompts")
    return tmp_path / "outputs"


def test_the_stage_asks_a_server_and_replays_without_it(prompts_only, tmp_path, monkeypatch):
    with server(rate_limited=0.1, malformed=0.1) as (root, told):
        first = stage_run(prompts_only, tmp_path / "a", f"{root}/v1", monkeypatch)
        sent = told()["counts"]["requests"]
        again = stage_run(prompts_only, tmp_path / "b", f"{root}/v1", monkeypatch)
        assert told()["counts"]["requests"] == sent and again == first
    (tmp_path / "exported").mkdir()
    shutil.copy(tmp_path / "a" / "replies.jsonl.gz", tmp_path / "exported")
    shutil.copytree(prompts_only / "test", tmp_path / "elsewhere" / "test")
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network is off"))
    stage_run(tmp_path / "elsewhere", tmp_path / "c", "http://127.0.0.1:1/v1", monkeypatch, f"geometry.traces.replies={tmp_path / 'exported'}")
    for name in ("traces.jsonl", "controls.jsonl", "quarantine.jsonl", "replies.jsonl.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name
    assert {t.teacher for t in first} == {"local"} and len(first) > 50


def test_replies_that_answer_nothing_are_an_error(cache, tmp_path):
    from valuecot.geometry.traces import take

    wants = list(wanted(generate(2, seed=0), ("standard",), lambda p: desk(), 60))
    with pytest.raises(FileNotFoundError, match=r"no \*.jsonl.gz in .*which is no folder"):
        take(cache, tmp_path / "none", wants)
    (tmp_path / "theirs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*.jsonl.gz in "):
        take(cache, tmp_path / "theirs", wants)
    with Cache(tmp_path / "theirs.sqlite") as theirs:
        for who, said in (("fake", r"they are for server/fake, the study asks server/m$"), ("m", "server/m, the study asks server/m with other prompts, words")):
            theirs.keep(questions(1, model=who)[0], Reply("fine", who, 1, 1, "stop"), "live").result()
            export_replies(theirs, tmp_path / "theirs" / "replies.jsonl.gz", [questions(1, model=who)[0].key])
            with pytest.raises(ValueError, match=f"1 replies were read, none answers these questions: .*{said}"):
                take(cache, tmp_path / "theirs", wants)
        assert cache.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (0,)
        theirs.keep(wants[0].request, Reply("fine", "m", 1, 1, "stop"), "live").result()
        export_replies(theirs, tmp_path / "theirs" / "replies.jsonl.gz")
    take(cache, tmp_path / "theirs", wants)
    assert cache.reply(wants[0].request).text == "fine"


def test_two_files_of_which_the_second_does_not_agree_change_nothing(cache, tmp_path):
    from valuecot.geometry.traces import take

    wants = list(wanted(generate(3, seed=0), ("standard",), lambda p: desk(), 60))
    (tmp_path / "theirs").mkdir()
    for name, places, text in (("a", (0, 1), "a"), ("b", (1, 2), "b")):
        with Cache(tmp_path / f"{name}.sqlite") as theirs:
            for i in places:
                theirs.keep(wants[i].request, Reply(text, "m", 1, 1, "stop"), "live").result()
            export_replies(theirs, tmp_path / "theirs" / f"{name}.jsonl.gz")
    with pytest.raises(ValueError, match="1 questions of .*a.jsonl.gz, .*b.jsonl.gz, or these do not agree.*nothing was imported"):
        take(cache, tmp_path / "theirs", wants)
    cache.keep(wants[2].request, Reply("mine", "m", 1, 1, "stop"), "live").result()
    with pytest.raises(ValueError, match="nothing was imported"):
        take(cache, tmp_path / "theirs", wants)
    assert cache.db.execute("SELECT COUNT(*) FROM replies").fetchone() == (1,)


def test_different_reasons_are_counted_apart_and_kept_whole():
    long = "values.value_1 has 4 words, at most three allowed; values.value_2 is {}"
    aside = [Quarantined(str(i), "standard", "t", long.format("missing" if i < 3 else "blank"), "") for i in range(5)]
    assert [(r["reason"][-7:], r["count"]) for r in by_reason(aside)] == [("s blank", 2), ("missing", 3)]
    assert outcome([], aside) == f"0 traces, 5 put aside: 3 x {long.format('missing')}; 2 x {long.format('blank')}"
    assert commonest((str(i) for i in range(4)), most=2) == "1 x 0; 1 x 1; ..."


def test_the_ledger_names_what_went_wrong(cache):
    from valuecot.teacher.desks import backends, questions, teachers_of

    settings = load("tiny")
    collect(questions(settings, [Prompt("short", "Hm.", "", "care", "honesty", "")]), backends(teachers_of(settings).values())[0], cache)
    assert cache.ledger()[0]["failures"] == {"unfit": 2}


def test_the_stage_says_what_is_missing_and_keeps_what_came(prompts_only, tmp_path, monkeypatch):
    with server() as (root, told):
        with pytest.raises(RuntimeError, match="cap of .* raise geometry.traces.cap"):
            stage_run(prompts_only, tmp_path / "a", f"{root}/v1", monkeypatch, "teacher.local.output=100 geometry.traces.cap=0.8")
        some = told()["counts"]["requests"]
        assert 0 < some < 60 and not (tmp_path / "a" / "traces.jsonl").exists()
        with pytest.raises(RuntimeError, match="questions have no reply yet .*404"):
            stage_run(prompts_only, tmp_path / "a", f"{root}/nowhere", monkeypatch)
        stage_run(prompts_only, tmp_path / "a", f"{root}/v1", monkeypatch)
        assert told()["counts"]["answered"] == ASKED  # none of them twice


def test_arms_are_compared_on_the_same_prompts():
    prompts = generate(4, seed=0)
    traces = [t for p in prompts for t in (write_trace(p, "standard", 60, 0), write_trace(p, "annealing", 60, 0))]
    lost = Quarantined(prompts[1].id, "annealing", "somebody", "refusal", "")
    left, kept = with_traces(prompts, [t for t in traces if (t.prompt_id, t.style) != (prompts[1].id, "annealing")], [lost])
    assert [p.id for p in left] == [prompts[i].id for i in (0, 2, 3)] and len(kept) == 6


def test_questions_keep_their_names():
    "A changed key would ask, and pay, for everything again: no docstring and no other version of pydantic may do that."
    prompt = Prompt("p", "I promised my son a dog, and my landlord allows none.", "x", "loyalty", "honesty", "")
    keys = {style: desk().question(prompt, style, 60, {style: "Think about {prompt} in {words} words."}).key[:16] for style in ("standard", "annealing")}
    assert keys == PINNED
    reply = Reply('{"values": {"value_1": "a b c d"}, "more": 1, "response": "x"}', "m", 1, 1, "stop")
    with pytest.raises(Malformed) as error:
        read(reply, StandardReply)
    assert str(error.value) == "values.value_1 has 4 words, at most three allowed; values.value_2 is missing; response is no object; more is not asked for"


# ------------------------------------------------------------------------- keys


def test_a_key_is_in_no_file_and_no_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    with Cache(tmp_path / "replies.sqlite") as cache, server(rate_limited=0.2) as (root, told):
        ask(questions(10), root, cache)
        lost = asyncio.run(ask_all(questions(12)[10:], {"server/m": Live("server", PRICE, f"{root}/{KEY}")}, cache, QUICK))  # the server repeats its path
        assert told()["headers"][-1].get("Authorization") == f"Bearer {KEY}"  # it was sent
        export_replies(cache, tmp_path / "all.jsonl.gz")
        said = repr(lost) + canonical([cache.ledger()]) + repr(Live("server", PRICE, root))
    assert KEY not in said and KEY not in "".join(capfd.readouterr())
    assert all(KEY.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


# ------------------------------------------------------------------------- kills

ASKER = """
import sys
sys.path.insert(0, "tests")
from test_providers import Cache, Policy, traced
with Cache(sys.argv[2]) as cache:
    traced(int(sys.argv[3]), sys.argv[1], cache, Policy(tries=12, first_wait=0.01))
"""
CONNECTIONS = 16


def killed_run(path: Path, n: int, kills: int, seed: int, **faults) -> dict[str, int]:
    "Counts of the server after a run that was killed at random moments and then left to end."
    rng = random.Random(seed)
    with server(latency=0.02, **faults) as (root, told):
        command = [sys.executable, "-c", ASKER, root, str(path), str(n)]
        for _ in range(kills):
            begun, process = told()["counts"].get("requests", 0), subprocess.Popen(command, cwd=HERE.parent)
            while told()["counts"].get("requests", 0) == begun and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, cwd=HERE.parent, check=True)
        return told()["counts"]


def check_kills(folder: Path, n: int, kills: int, seed: int, **faults) -> None:
    counts = killed_run(folder / "replies.sqlite", n, kills, seed, **faults)
    with Cache(folder / "replies.sqlite") as cache:
        traces, aside, tally = traced(n, "", cache)
        row = cache.ledger()[0]
    ended = [(t.prompt_id, t.style) for t in traces] + [(q.prompt_id, q.style) for q in aside]
    assert len(ended) == len(set(ended)) == 2 * n and all(q.reason for q in aside)
    print(f"{kills} kills: server counted {counts['requests']}, ledger {row['sent']} sent, {row['unanswered']} of them unanswered; {len(traces)} traces, {len(aside)} aside")
    assert row["unanswered"] <= CONNECTIONS * kills, "no more than what was on its way"
    assert row["sent"] - row["unanswered"] <= counts["requests"] <= row["sent"], "every sending was logged before it left"


def test_a_killed_run_goes_on_and_knows_what_it_sent(tmp_path):
    check_kills(tmp_path, 60, 2, seed=0, rate_limited=0.1, broken=0.05, malformed=0.05)


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_prompts_ten_kills_all_faults(tmp_path, seed):
    check_kills(tmp_path, 1000, 10, seed, rate_limited=0.1, broken=0.05, reset=0.02, malformed=0.03)


def test_a_key_is_hidden_also_where_a_message_is_cut(monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    live = Live("server", PRICE, "http://localhost:1/v1")
    for place in range(150, 210):
        assert "sk-pl" not in live.refused(400, None, "x" * place + KEY).reason
    assert live.refused(400, None, "the prompt is too long").lasting and not live.refused(400, None, "API key not valid").lasting and not live.refused(400, None, "your credit balance is too low").lasting
    told = '{"error": {"message": "flagged: who keeps the balance, and may I give him credit, with her permission?"}}'
    assert live.refused(400, None, told).lasting, "the question's own words say nothing about the account"


EMPTY_ACCOUNT = json.dumps({"error": {"message": "You exceeded your current quota, please check your plan and billing details. " + "See the documents. " * 12, "type": "insufficient_quota", "code": "insufficient_quota"}})
GOOGLES = json.dumps({"error": {"code": 429, "message": "You exceeded your current quota, please check your plan and billing details.", "status": "RESOURCE_EXHAUSTED"}})


def test_a_limit_and_an_outage_keep_the_providers_words():
    live = Live("server", PRICE, "http://localhost:1/v1")
    found = live.refused(429, "2", '{"error": {"message": "60 requests per minute"}}')
    assert (found.again, found.wait, found.kind) == (True, 2.0, "429") and "60 requests per minute" in found.reason
    assert "overloaded until 9" in live.refused(503, None, "overloaded until 9").reason
    empty, passing = live.refused(429, None, EMPTY_ACCOUNT), live.refused(429, None, GOOGLES)
    assert not empty.again and not empty.lasting and "exceeded your current quota" in empty.reason
    assert passing.again, "Google says so of a limit per minute"


def test_nobody_sleeps_for_a_day(cache):
    "Retry-After: 86400 ends the question for this run, with the provider's words and wish; a minute is waited for."
    class Far(Backend):
        connections, price = 4, PRICE

        async def ask(self, request):
            raise Failed("429 come back", again=True, wait=86_400.0)

        async def close(self):
            pass

    tally = asyncio.run(asyncio.wait_for(ask_all(questions(2), {"server/m": Far()}, cache, Policy()), 20))
    assert [(f.reason, f.tries, f.lasting) for f in tally.failures] == [("429 come back, asks to wait 1,440 minutes", 1, False)] * 2
    assert 60 <= Policy().again(Failed("429", again=True, wait=60.0), 1) <= 61 and Policy().again(Failed("429", again=True), 6) is None


def test_what_a_gateway_breaks_off_may_have_been_paid_for():
    live = Live("server", PRICE, "http://localhost:1/v1")
    assert [live.refused(status, None, "").billed for status in (408, 429, 500, 502, 503, 504, 524)] == [False, False, False, True, False, True, True]
    assert all(live.refused(status, None, "").again for status in (408, 409, 429, 500, 502, 503, 504, 524))


def test_two_teachers_that_ask_one_model_in_two_ways_are_refused():
    from valuecot.teacher.desks import backends

    one = replace(load("tiny")["teacher.rules"], provider="server", model="m", base_url="http://localhost:1/v1")
    assert list(backends([one, one])[0]) == ["server/m"]
    with pytest.raises(ValueError, match="two teachers ask server/m in different ways"):
        backends([one, replace(one, effort="low")])


def test_a_batch_costs_what_the_settings_say_and_nothing_less_by_itself():
    from valuecot.settings import TeacherModel

    assert Price(1.0, 1.0).batch == TeacherModel("openai", "m", input=1.0, output=1.0).batch == 1.0


@pytest.mark.parametrize("name", ["rules", "transformers"])
def test_an_effort_that_nobody_makes_is_refused_before_anything_is_asked(name):

    with pytest.raises(ValueError, match=f"effort = low does nothing with provider = {name}"):
        load("tiny", f"teacher.{name}.effort=low")


def test_a_parameter_that_is_unknown_lies_in_the_settings_and_not_in_the_question():
    from valuecot.providers.local import how

    for refuses in (how, WIRES["anthropic"].body):
        with pytest.raises(Failed, match="takes no colour") as error:
            refuses(questions(1, parameters={"colour": "red"})[0])
        assert not error.value.lasting and not error.value.again


FEW = "geometry.sft_prompts=20 geometry.grpo_prompts=1 geometry.heldout_prompts=15 geometry.traces.teachers="


@pytest.fixture
def billed(tmp_path, monkeypatch, capsys):
    "`python -m valuecot.teacher.bill` in an outputs folder of one's own: its status and what it said."
    from valuecot.teacher import bill

    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return lambda *words: (bill.main([*words[:-1], "--set", FEW + words[-1]]), "".join(capsys.readouterr()))


def test_a_key_or_folder_that_will_be_missing_is_told_before_a_study_begins(billed, tmp_path, monkeypatch):
    from valuecot.teacher.bill import planned_prompts
    from valuecot.teacher.desks import questions, replies_path

    status, said = billed("check", "gpt-5-nano")
    assert status == 2 and "70 questions to gpt-5-nano have no reply yet, and nobody can be asked: no key for openai: set OPENAI_API_KEY" in said
    assert billed("check", f"gpt-5-nano geometry.traces.replies={tmp_path}") == (0, "") and billed("check", "rules") == (0, "")
    for words in (("check",), ()):
        status, said = billed(*words, "transformers teacher.transformers.model=models/of/mine")
        assert status == 2 and "no such folder: models/of/mine" in said
    settings = load("tiny", FEW + "gpt-5-nano")
    with Cache(replies_path()) as cache:
        for want in questions(settings, planned_prompts(settings)[0]):
            job = cache.keep(want.request, Reply("fine", "m", 1, 1, "stop"), "live")
        job.result()
    assert billed("check", "gpt-5-nano") == (0, "")  # all replies are here: a replay needs no key


def test_a_reply_that_was_refused_and_paid_for_is_no_question_left(billed):
    "The stage puts it aside and asks nobody again; what was refused for free is asked again, where somebody can be."
    from valuecot.teacher.bill import planned_prompts
    from valuecot.teacher.desks import estimate, questions, replies_path, teachers_of

    settings = load("tiny", FEW + "gpt-5-nano")
    wants, models = questions(settings, planned_prompts(settings)[0]), teachers_of(settings)
    with Cache(replies_path()) as cache:
        for want in wants[1:]:
            cache.keep(want.request, Reply("fine", "m", 1, 1, "stop"), "live")
        cache.refuse(wants[0].request, Failure(wants[0].request.key, "refusal", 1, True, billed=True)).result()
        assert estimate(wants, models, cache, 45)[0]["on_disk"] == 70
    assert billed("check", "gpt-5-nano") == (0, "")
    with Cache(replies_path()) as cache:
        cache.refuse(wants[0].request, Failure(wants[0].request.key, "400 too long", 1, True)).result()
        able = estimate(wants, models, cache, 45)[0]
        assert (able["on_disk"], able["usd_at_most"] > 0) == (69, True) and estimate(wants, models, cache, 45, unable=["gpt-5-nano"])[0]["on_disk"] == 70
    assert billed("check", "gpt-5-nano") == (0, "")


@pytest.mark.parametrize("form", [("--set={}",), ("--set", "{}"), ("--se", "{}")])
def test_a_check_looks_at_the_study_that_it_is_asked_about(form, billed, capsys):
    "The traces of the plain profile are there; those of another teacher are not, however SET is written."
    from valuecot.flow.plan import Job, Plan
    from valuecot.store import write_json
    from valuecot.teacher import bill

    plan, traces = Plan("tiny", "geometry"), Job("geometry", "traces")
    for job in (Job("geometry", "prompts"), traces):
        write_json(plan.run_file(job), {"key": plan.key(job)})
    assert bill.why(plan, traces) == "" and bill.main(["check"]) == 0
    status, said = bill.main(["check", *(word.format(FEW + "gpt-5-nano") for word in form)]), capsys.readouterr().err
    assert status == 2 and "set OPENAI_API_KEY" in said


def test_a_plan_says_what_it_downloads_and_whether_the_cap_is_wide_enough(billed):
    assert "needs a download, unless it was downloaded before: teacher.transformers.model = Qwen/Qwen2.5-7B-Instruct" in billed("transformers")[1]
    assert "the cap leaves" not in billed("gpt-5-nano")[1] and "the cap leaves" not in billed("rules geometry.traces.cap=0")[1]
    assert "the cap leaves $0.001, less than the likely $0.0" in billed("gpt-5-nano geometry.traces.cap=0.001")[1]
    assert "the cap leaves $0.02, less than the most that it may cost, $0.12" in billed("gpt-5-nano geometry.traces.cap=0.02")[1]


def test_a_folder_of_a_model_has_the_same_name_with_and_without_it(tmp_path):
    from valuecot.teacher.desks import model_name

    model = replace(load("tiny")["teacher.transformers"], model=str(tmp_path / "mine"))
    absent = model_name(model)
    (tmp_path / "mine").mkdir()
    assert absent == model_name(model) and absent.startswith("mine-") and model_name(replace(model, model="owner/name")) == "owner/name"


def test_a_redirect_does_not_take_the_key_along(cache, monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    with server() as (root, told):
        tally = asyncio.run(ask_all(questions(2), {"server/m": Live("server", PRICE, f"{root}/moved")}, cache, QUICK))
        assert [f.reason[:3] for f in tally.failures] == ["307", "307"] and told()["counts"].get("requests", 0) == 0


def unpacked(path: Path) -> bytes:
    "A file, and what it holds where it is packed."
    raw = path.read_bytes()
    if path.suffix == ".gz":
        return raw + gzip.decompress(raw)
    return raw + pyarrow.parquet.read_table(path).to_pandas().to_csv().encode() if path.suffix == ".parquet" else raw


FORKED = """
import os, sys
import valuecot.geometry.audit, valuecot.geometry.release, valuecot.geometry.traces
from valuecot.flow.run import main
from valuecot.flow.warm import use_here

for name in ("traces", "audit", "release"):  # each in a fork, as the stages of a study run
    if not (child := os.fork()):
        use_here()
        os._exit(main(["test", f"geometry/{name}/all/all/all", sys.argv[1]]))
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} failed")
"""


def test_a_key_is_in_no_file_of_a_study(prompts_only, monkeypatch):
    "Stages, their notebooks and logs, the release and the pages, where a server wants the key and repeats it in its refusals."
    monkeypatch.setenv("SERVER_API_KEY", KEY)
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(prompts_only))
    with server(rate_limited=0.2) as (root, told):
        overrides = f"geometry.traces.teachers=rules,local teacher.local.base_url={root}/refused teacher.local.model=m"
        done = subprocess.run([sys.executable, "-c", FORKED, overrides], capture_output=True, text=True)
        assert done.returncode == 0 and KEY not in done.stdout + done.stderr, done.stdout + done.stderr
        assert told()["headers"][-1].get("Authorization") == f"Bearer {KEY}"
        pages.build(prompts_only / "test", None, "companion.notebooks=no")
    files = [p for p in prompts_only.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} >= {".sqlite", ".gz", ".parquet", ".ipynb", ".html", ".json", ".jsonl", ".csv"}
    said = {p: unpacked(p) for p in files}
    assert [p for p, text in said.items() if KEY.encode() in text] == []
    assert sum(b"Bearer [key] is not welcome" in text for text in said.values()) > 5  # the refusal itself is everywhere


def test_a_study_whose_teachers_all_refuse_stops_and_says_why(prompts_only, tmp_path, monkeypatch):
    with server() as (root, told):
        with pytest.raises(RuntimeError, match=f"no trace came of {ASKED} questions to local .*is not welcome"):
            stage_run(prompts_only, tmp_path / "a", f"{root}/closed", monkeypatch)
        with pytest.raises(RuntimeError, match="questions to local .*its prompts would be missing from every arm"):
            stage_run(prompts_only, tmp_path / "b", f"{root}/closed", monkeypatch, "geometry.traces.teachers=rules,local")


# ------------------------------------------------------------------------- on this machine


def test_the_rules_answer_as_any_teacher_and_write_what_they_always_wrote(cache):
    from valuecot.teacher.desks import backends, questions, teachers_of

    settings, prompts = load("tiny"), generate(40, seed=3)
    found = collect(questions(settings, prompts), backends(teachers_of(settings).values())[0], cache)
    words = settings["geometry.traces"].words
    assert found.traces == [write_trace(p, style, words, 0) for p in prompts for style in ("standard", "annealing")]
    again = collect(questions(settings, prompts), {}, cache)
    assert again.traces == found.traces and cache.spent == 0


def test_other_rules_are_another_teacher(cache):
    from valuecot.teacher.desks import WRITTEN_BY, RulesDesk

    prompt = generate(1, seed=3)[0]
    ours, old = (RulesDesk("rules", "rules", name).question(prompt, "standard", 60) for name in (WRITTEN_BY, "rules-00000000"))
    assert ours.key != old.key
    with pytest.raises(ValueError, match="40 to 150 words, asked for 20"):
        RulesDesk("rules", "rules", WRITTEN_BY).question(prompt, "standard", 20)


STORIES = Path(__file__).parents[2] / "shared" / "data" / "lm_stories260K"


def test_a_real_model_on_this_machine_answers_the_same_alone_and_in_a_round(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from valuecot.providers.local import Local

    if not STORIES.exists():
        pytest.skip("../shared/data/lm_stories260K is not here")
    asked = [Request("transformers", "stories", (("user", text),), 12) for text in ("Once upon a time", "Lily and Ben went to the park. They", "The dog was big. One day", "Tim had a red car")]
    found = []
    for connections in (1, 4):
        with Cache(tmp_path / f"{connections}.sqlite") as cache:
            tally = asyncio.run(ask_all(asked, {"transformers/stories": Local(str(STORIES), connections)}, cache, QUICK))
            assert tally.replied == 4, tally.failures
            found.append([cache.reply(q) for q in asked])
    assert found[0] == found[1]
    tokenizer, model = AutoTokenizer.from_pretrained(STORIES), AutoModelForCausalLM.from_pretrained(STORIES).eval()
    ids = tokenizer(asked[2].messages[0][1] + "\n\n", return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found[0][2].text == tokenizer.decode(written, skip_special_tokens=True) and found[0][2].finish == "length"


def test_out_of_memory_a_round_is_halved(tmp_path, monkeypatch):
    from valuecot.providers.local import Local

    backend, sizes = Local("anything", 8), []
    backend.model = object()

    def generate(requests, arguments):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise RuntimeError("CUDA out of memory")
        return [Reply("a", "m", 1, 1, "stop")] * len(requests)

    monkeypatch.setattr(backend, "generate", generate)
    assert len(backend.answers(questions(8), {})) == 8 and sizes == [8, 4, 2, 2, 4, 2, 2]
    monkeypatch.setattr(backend, "generate", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert all(isinstance(e, RuntimeError) for e in backend.answers(questions(2), {}))
