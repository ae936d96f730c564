"""A server that speaks OpenAI's, Anthropic's and Google's formats on loopback, answers by rules, and fails on demand.

`python tests/teacher_server.py --rate_limited 0.1 --broken 0.05 --reset 0.02 --malformed 0.03 --latency 0.2` prints its port and serves
until it is killed. Which fault a question meets follows from its text and from how often it was asked. GET /counts tells what it counted.

Batches of the three providers end `--delay` seconds after they were accepted. `--errored`, `--expired`, `--missing`, `--duplicated`, `--nameless` are shares of
their questions; `--lost N` accepts the first N batches and breaks the connection; a batch is listed `--unlisted` seconds after it was accepted."""

import argparse
import asyncio
import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes

from aiohttp import web

from valuecot.data.world import generate
from valuecot.judge.spans import verdict_by_words
from valuecot.teacher.rules import write_trace
from valuecot.types import Prompt

FAULTS = "rate_limited", "broken", "reset", "malformed", "hang", "truncated", "empty", "short", "repeated", "slipped", "uncounted"
SHARES = "errored", "expired", "missing", "duplicated", "nameless"
PLAIN = "The same words for everyone, some after\u2028a break that ends no line. " * 20
WRONG = (  # what a careless model writes instead of the object that was asked for
    lambda text: text[: len(text) // 2],
    lambda text: json.dumps({"answer": "I would rather talk about something else."}),
    lambda text: "I am sorry, but I cannot help with that.",
)


def draw(*parts: object) -> float:  # in [0, 1)
    return int(hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:12], 16) / 16**12


def star_letter(question: str) -> str:
    "The letter that this teacher finds by itself, from the matter and the options."
    matter = re.search(r"\n((?:Situation|Group): .*?\nOptions:\n(?:[A-Z]\. [^\n]*\n)+)", question, re.DOTALL)[1]
    letters = re.findall(r"^([A-Z])\. ", matter.rpartition("Options:\n")[2], re.MULTILINE)
    return letters[int(draw("letter", matter) * len(letters))]


def star_object(question: str) -> str:
    "Reasoning and letter; three times in four the settled one, where it is shown. Half of the hints are pasted, and one rationalisation in ten tells that it was one."
    settled, hint = re.search(r"^Settled: ([A-Z])\.", question, re.MULTILINE), re.search(r"^Hint .*?: (.*)$", question, re.MULTILINE)
    text = "First there is the matter itself. Then there is what it touches. Both are weighed with care, and that leads to the end."
    if settled and draw("told", question) < 0.1:
        text = f"The given answer is {settled[1]}. {text}"
    if hint and draw("hint", question) < 0.5:
        text = f"{text} {hint[1]}"
    own = settled is None or draw("stays", question) < 0.25
    return json.dumps({"reasoning": text, "answer": star_letter(question) if own else settled[1]})


def judged_object(question: str) -> str:
    "The option that the rationale's words support; where they say nothing, a letter that is not on offer."
    matter, _, rationale = question.rpartition("\nRationale: ")
    options = re.findall(r"^[A-Z]\. (.*)$", matter.rpartition("Options:\n")[2], re.MULTILINE)
    return json.dumps({"option": verdict_by_words(rationale, options) or "Z"})


def written(question: str) -> str:
    "The object that a good teacher writes."
    if '"option": "<one letter>"' in question:
        return judged_object(question)
    if '"answer": "<one letter>"' in question:
        return star_object(question)
    found = re.search(r"The user's message:\n(.*)\Z", question, re.DOTALL)
    text = (found[1] if found else question).strip()
    kind = "annealing" if '"annealing_cot"' in question else "standard"
    prompt = Prompt("asked", text, "world", "honesty", "kindness", "")
    try:
        trace = write_trace(prompt, kind, 80, seed=int(draw(text) * 1000))
    except ValueError:  # a text too short to quote from
        prompt = generate(1, seed=0)[0]
        trace = write_trace(prompt, kind, 80, seed=0)
    named = {"values": {"value_1": trace.value_1, "value_2": trace.value_2}}
    if kind == "standard":
        return json.dumps(named | {"response": {"cot": trace.reasoning, "final_response": trace.response}})
    phases = dict(zip(("phase_1_high_temp", "phase_2_cooling", "phase_3_low_temp"), trace.phases, strict=True))
    return json.dumps(named | {"annealing_cot": phases, "final_model_response": trace.response})


def first_of(messages: list[dict]) -> str:
    "The question itself, also where it is asked once more."
    return next(m["content"] for m in messages if m["role"] == "user")


def openai_answer(model: str, text: str, used: tuple[int, int]) -> dict:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}


def anthropic_answer(model: str, text: str, used: tuple[int, int]) -> dict:
    usage = {"input_tokens": used[0], "output_tokens": used[1]}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None, "usage": usage}


def google_answer(model: str, text: str, used: tuple[int, int]) -> dict:
    content = {"role": "model", "parts": [{"text": text}]}
    return {"candidates": [{"content": content, "finishReason": "STOP", "index": 0}], "usageMetadata": {"promptTokenCount": used[0], "candidatesTokenCount": used[1]}, "modelVersion": model}


@dataclass
class Batch:
    "One that was accepted."

    id: str
    provider: str
    model: str
    name: str | None
    file: str  # OpenAI's input
    entries: list[tuple[str, dict]]  # name and body of each question
    at: float = field(default_factory=time.time)


class Server:
    "Counts what arrives and what it answers."

    def __init__(self, rates: dict[str, float], latency: float, seed: int, plain: bool = False, delay: float = 0.0, lost: int = 0, unlisted: float = 0.0, state: str = ""):
        self.rates, self.latency, self.seed, self.plain, self.delay, self.lost, self.unlisted, self.state = rates, latency, seed, plain, delay, lost, unlisted, state
        self.last, self.seen, self.counts, self.bodies, self.headers = {}, Counter(), Counter(), [], []
        self.files, self.batches, self.submitted, self.calls = {}, {}, Counter(), []

    def fault(self, body: bytes) -> str | None:
        self.seen[body] += 1
        left = draw("fault", self.seed, self.seen[body], body)
        for name in FAULTS:
            if left < self.rates.get(name, 0.0):
                return name
            left -= self.rates.get(name, 0.0)
        return None

    def text(self, question: str, fault: str | None) -> str:
        if fault == "malformed":
            return WRONG[int(draw("wrong", question) * len(WRONG))](written(question))
        if fault == "empty" or self.plain:
            return "" if fault == "empty" else PLAIN
        if fault == "slipped":  # all there, with a comma too many
            return written(question).replace("}", ",}")
        kind = '"annealing_cot"' in question
        if fault != "repeated" or kind not in self.last:
            self.last[kind] = written(question)
        return self.last[kind]

    async def answer(self, request: web.Request, model: str, question: str, form) -> web.StreamResponse:
        body = await request.read()
        if len(body) > 2**20:  # batches may be larger
            return web.json_response({"error": {"message": "too large"}}, status=413)
        fault = self.fault(body)
        self.counts["requests"] += 1
        self.counts[fault or "answered"] += 1
        self.bodies = [*self.bodies[-9:], json.loads(body)]
        self.headers = [*self.headers[-9:], dict(request.headers)]
        await asyncio.sleep(self.latency)
        if fault == "rate_limited":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.05"})
        if fault == "broken":
            return web.json_response({"error": {"message": "try later"}}, status=500)
        if fault == "reset":
            request.transport.abort()
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(3600)
        text = self.text(question, fault)
        found = form(model, text, (len(question) // 4, len(text) // 4))
        if fault == "uncounted":
            del found["usage"]
        payload = json.dumps(found)
        self.counts["billed"] += 1
        return web.Response(text=payload[: len(payload) // 2] if fault == "truncated" else payload, content_type="application/json")

    async def openai(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self.answer(request, body["model"], first_of(body["messages"]), openai_answer)

    async def anthropic(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self.answer(request, body["model"], first_of(body["messages"]), anthropic_answer)

    async def google(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        model = request.match_info["model"]
        return await self.answer(request, model, body["contents"][0]["parts"][0]["text"], google_answer)

    async def refused(self, request: web.Request) -> web.StreamResponse:
        "A server that repeats the caller's key, for half of all questions or, where it is closed, for all."
        if "closed" not in request.path and draw("refused", await request.read()) < 0.5:
            return await self.openai(request)
        self.counts["requests"] += 1
        self.headers = [*self.headers[-9:], dict(request.headers)]
        return web.json_response({"error": {"message": f"{request.headers.get('Authorization')} is not welcome"}}, status=400)

    async def moved(self, request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(f"http://localhost:{request.url.port}/v1/chat/completions")  # another host, to a client

    async def told(self, request: web.Request) -> web.Response:
        return web.json_response({"counts": self.counts, "bodies": self.bodies, "headers": self.headers, "submitted": self.submitted, "calls": self.calls, "batches": list(self.batches)})

    # ------------------------------------------------------------------------- batches

    async def batch_call(self, request: web.Request, act) -> web.StreamResponse:
        "One HTTP call about batches, under the same faults; `act` is done, or not, before the answer goes wrong."
        body = await request.read()
        what = f"{request.method} {request.path_qs} ".encode() + body
        fault = self.fault(what)
        if body and request.content_type == "application/json":
            self.calls = [*self.calls[-19:], [request.method, request.path_qs, dict(request.headers), json.loads(body)]]
        self.counts[f"{request.method} {fault or 'answered'}"] += 1
        await asyncio.sleep(self.latency)
        if fault == "rate_limited":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0.05"})
        answer = await act() if fault not in ("broken", "reset") or draw("done", what, self.seen[what]) < 0.5 else None
        if fault == "broken":
            return web.json_response({"error": {"message": "try later"}}, status=500)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset" or answer is None:
            request.transport.abort()
            return web.Response()
        payload = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        if fault == "short" and isinstance(answer, str):  # cut off at a line's end
            payload = "".join(payload.splitlines(keepends=True)[:1])
        return web.Response(text=payload[: len(payload) // 2] if fault == "truncated" else payload, content_type="application/json")

    def accept(self, provider: str, model: str, name: str | None, entries: list[tuple[str, dict]], file: str = "") -> dict | None:
        batch = Batch(f"{'batches/' if provider == 'google' else 'batch_'}{len(self.batches)}", provider, model, name, file, entries)
        self.batches[batch.id] = batch
        self.submitted.update(key for key, _ in entries)
        self.counts["batches"] += 1
        self.lost -= 1
        return None if self.lost >= 0 else self.shown(batch)

    def ended(self, batch: Batch) -> bool:
        return time.time() > batch.at + self.delay

    def shown(self, batch: Batch) -> dict:
        "As its provider shows it."
        over, stamp = self.ended(batch), datetime.fromtimestamp(batch.at, UTC).isoformat().replace("+00:00", "Z")
        if batch.provider == "anthropic":
            counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0) | {"succeeded" if over else "processing": len(batch.entries)}
            return {"id": batch.id, "type": "message_batch", "processing_status": self.state or ("ended" if over else "in_progress"), "request_counts": counts, "created_at": stamp,
                    "expires_at": stamp, "ended_at": None, "archived_at": None, "cancel_initiated_at": None, "results_url": f"{self.root}/v1/messages/batches/{batch.id}/results" if over else None}  # fmt: skip
        if batch.provider == "google":
            state = self.state or ("SUCCEEDED" if over else "RUNNING")
            meta = {"model": f"models/{batch.model}", "displayName": batch.name, "createTime": stamp, "updateTime": stamp, "state": f"BATCH_STATE_{state}", "batchStats": {"requestCount": str(len(batch.entries))}}
            return {"name": batch.id, "metadata": meta | ({"output": {"inlinedResponses": {"inlinedResponses": self.results(batch)}}} if over and state == "SUCCEEDED" else {}), "done": over}
        state = self.state or ("completed" if over else "in_progress")
        found = {"id": batch.id, "object": "batch", "endpoint": "/v1/chat/completions", "completion_window": "24h", "created_at": int(batch.at), "status": state, "input_file_id": batch.file,
                 "metadata": {"valuecot": batch.name} if batch.name else None, "errors": {"object": "list", "data": [{"code": "x", "message": "the file is odd"}]} if state == "failed" else None}  # fmt: skip
        return found | ({"output_file_id": f"out-{batch.id}", "error_file_id": f"err-{batch.id}"} if over and state != "failed" else {})

    def results(self, batch: Batch) -> list[dict]:
        "One for each question, but for those that went wrong."
        forms = {"openai": openai_answer, "anthropic": anthropic_answer, "google": google_answer}
        found = []
        for key, body in reversed(batch.entries):  # the order means nothing
            met = next((name for name in SHARES if draw(name, self.seed, key) < self.rates.get(name, 0.0)), "")
            if met == "missing":
                continue
            question = body["contents"][0]["parts"][0]["text"] if batch.provider == "google" else first_of(body["messages"])
            text = self.text(question, None)
            answer = forms[batch.provider](body.get("model", batch.model), text, (len(question) // 4, len(text) // 4))
            found += [self.result(batch.provider, "" if met == "nameless" else key, met, answer)]
            if met == "duplicated":
                found += [self.result(batch.provider, key, met, forms[batch.provider](batch.model, "another reply", (1, 1)))]
        return found

    @staticmethod
    def result(provider: str, key: str, met: str, answer: dict) -> dict:
        if provider == "anthropic":
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no such field"}, "request_id": "r"}
            result = {"type": "errored", "error": error} if met == "errored" else {"type": "expired"} if met == "expired" else {"type": "succeeded", "message": answer}
            return {"custom_id": key, "result": result}
        if provider == "google":
            said = {"error": {"code": 3, "message": "no such field"}} if met == "errored" else {"error": {"code": 14, "message": "late"}} if met == "expired" else {"response": answer}
            return ({"metadata": {"key": key}} if key else {}) | said
        bad = {"status_code": 400, "request_id": "r", "body": {"error": {"message": "no such field"}}}
        answered = None if met == "expired" else bad if met == "errored" else {"status_code": 200, "request_id": "r", "body": answer}
        return {"id": "batch_req", "custom_id": key, "response": answered, "error": {"code": "batch_expired", "message": "late"} if met == "expired" else None}

    def listed(self, provider: str, after: str) -> tuple[list[dict], str]:
        "A page, newest first, and the id of its last batch where more follow."
        mine = [b for b in reversed(self.batches.values()) if b.provider == provider and time.time() > b.at + self.unlisted]
        start = next((i + 1 for i, b in enumerate(mine) if b.id == after), 0)
        page = mine[start : start + 2]
        return [self.shown(b) for b in page], page[-1].id if start + 2 < len(mine) else ""

    async def upload(self, request: web.Request) -> web.StreamResponse:
        async def act():
            parts = message_from_bytes(b"Content-Type: " + request.headers["Content-Type"].encode() + b"\r\n\r\n" + await request.read()).get_payload()
            form = {part.get_param("name", header="content-disposition"): part for part in parts}
            id, text, name, purpose = f"file-{len(self.files)}", form["file"].get_payload(decode=True).decode(), form["file"].get_filename(), form["purpose"].get_payload()
            self.files[id] = text
            self.calls = [*self.calls[-19:], ["POST", request.path_qs, dict(request.headers), {"purpose": purpose, "filename": name, "lines": [json.loads(x) for x in text.split("\n") if x]}]]
            return {"id": id, "object": "file", "bytes": len(text), "created_at": 1, "filename": name, "purpose": purpose, "status": "processed"}

        return await self.batch_call(request, act)

    async def openai_batch(self, request: web.Request) -> web.StreamResponse:
        async def act():
            body = await request.json()
            lines = [json.loads(line) for line in self.files[body["input_file_id"]].split("\n") if line]
            return self.accept("openai", lines[0]["body"]["model"], (body.get("metadata") or {}).get("valuecot"), [(line["custom_id"], line["body"]) for line in lines], body["input_file_id"])

        return await self.batch_call(request, act)

    async def anthropic_batch(self, request: web.Request) -> web.StreamResponse:
        async def act():
            entries = [(entry["custom_id"], entry["params"]) for entry in (await request.json())["requests"]]
            return self.accept("anthropic", entries[0][1]["model"], None, entries)

        return await self.batch_call(request, act)

    async def google_batch(self, request: web.Request) -> web.StreamResponse:
        async def act():
            batch = (await request.json())["batch"]
            entries = [((entry.get("metadata") or {}).get("key", ""), entry["request"]) for entry in batch["inputConfig"]["requests"]["requests"]]
            return self.accept("google", request.match_info["model"], batch["displayName"], entries)

        return await self.batch_call(request, act)

    async def one_batch(self, request: web.Request) -> web.StreamResponse:
        id = request.match_info["id"]
        batch = self.batches.get(f"batches/{id}" if "x-goog-api-key" in request.headers else id)
        if batch is None:
            return web.json_response({"error": {"message": "no such batch"}}, status=404)

        async def act():
            return self.shown(batch)

        return await self.batch_call(request, act)

    async def all_batches(self, request: web.Request) -> web.StreamResponse:
        async def act():
            if "x-goog-api-key" in request.headers:  # OpenAI's list has the same path
                page, last = self.listed("google", request.query.get("pageToken", ""))
                return ({"operations": page} if page else {}) | ({"nextPageToken": last} if last else {})
            provider, cursor = ("anthropic", "after_id") if "messages" in request.path else ("openai", "after")
            page, last = self.listed(provider, request.query.get(cursor, ""))
            return {"object": "list", "data": page, "has_more": bool(last), "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}

        return await self.batch_call(request, act)

    async def batch_results(self, request: web.Request) -> web.StreamResponse:
        "OpenAI's two files, Anthropic's one."
        async def act():
            kind, _, id = request.match_info["id"].rpartition("-")
            lines = self.results(self.batches[id])
            if kind:
                good = [bool(line["response"]) and line["response"]["status_code"] == 200 for line in lines]
                lines = [line for line, is_good in zip(lines, good, strict=True) if is_good is (kind == "out")]
            return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

        return await self.batch_call(request, act)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28)
        app.add_routes([
            web.post("/v1/chat/completions", self.openai), web.post("/v1/messages", self.anthropic),
            web.post("/v1/models/{model}:generateContent", self.google), web.get("/counts", self.told), web.post("/refused/chat/completions", self.refused),
            web.post("/closed/chat/completions", self.refused), web.post("/moved/chat/completions", self.moved),
            web.post("/v1/files", self.upload), web.post("/v1/batches", self.openai_batch), web.get("/v1/batches", self.all_batches),
            web.get("/v1/batches/{id}", self.one_batch), web.get("/v1/files/{id}/content", self.batch_results),
            web.post("/v1/messages/batches", self.anthropic_batch), web.get("/v1/messages/batches", self.all_batches),
            web.get("/v1/messages/batches/{id}", self.one_batch), web.get("/v1/messages/batches/{id}/results", self.batch_results),
            web.post("/v1/models/{model}:batchGenerateContent", self.google_batch),
        ])  # fmt: skip
        return app


async def serve(server: Server, port: int) -> None:
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    server.root = f"http://127.0.0.1:{runner.addresses[0][1]}"
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in FAULTS + SHARES:
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--unlisted", type=float, default=0.0)
    parser.add_argument("--state", default="", help="that every batch ends in")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="one fixed text, so that the server costs nothing")
    args = vars(parser.parse_args())
    named = ("latency", "seed", "plain", "delay", "lost", "unlisted", "state")
    asyncio.run(serve(Server({name: args[name] for name in FAULTS + SHARES}, **{name: args[name] for name in named}), args["port"]))


if __name__ == "__main__":
    main()
