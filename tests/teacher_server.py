"""A server that speaks OpenAI's, Anthropic's and Google's formats on loopback, answers by rules, and fails on demand.

`python tests/teacher_server.py --rate_limited 0.1 --broken 0.05 --reset 0.02 --malformed 0.03 --latency 0.2` prints its port and serves
until it is killed. Which fault a question meets follows from its text and from how often it was asked. GET /counts tells what it counted."""

import argparse
import asyncio
import hashlib
import json
import re
from collections import Counter

from aiohttp import web
from valuecot.data.world import generate
from valuecot.teacher.rules import write_trace
from valuecot.types import Prompt

FAULTS = "rate_limited", "broken", "reset", "malformed", "hang", "truncated", "empty"
PLAIN = "The same words for everyone. " * 40
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


def written(question: str) -> str:
    "The object that a good teacher writes."
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


class Server:
    "Counts what arrives and what it answers."

    def __init__(self, rates: dict[str, float], latency: float, seed: int, plain: bool = False):
        self.rates, self.latency, self.seed, self.plain = rates, latency, seed, plain
        self.seen, self.counts, self.bodies, self.headers = Counter(), Counter(), [], []

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
        return "" if fault == "empty" else PLAIN if self.plain else written(question)

    async def answer(self, request: web.Request, model: str, question: str, form) -> web.StreamResponse:
        body = await request.read()
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
        payload = json.dumps(form(model, text, (len(question) // 4, len(text) // 4)))
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

    async def refused(self, request: web.Request) -> web.Response:
        "A server that repeats the caller's key."
        self.counts["requests"] += 1
        self.headers = [*self.headers[-9:], dict(request.headers)]
        return web.json_response({"error": {"message": f"{request.headers.get('Authorization')} is not welcome"}}, status=400)

    async def told(self, request: web.Request) -> web.Response:
        return web.json_response({"counts": self.counts, "bodies": self.bodies, "headers": self.headers})

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([
            web.post("/v1/chat/completions", self.openai), web.post("/v1/messages", self.anthropic),
            web.post("/v1/models/{model}:generateContent", self.google), web.get("/counts", self.told), web.post("/refused/chat/completions", self.refused),
        ])  # fmt: skip
        return app


async def serve(server: Server, port: int) -> None:
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in FAULTS:
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="one fixed text, so that the server costs nothing")
    args = vars(parser.parse_args())
    asyncio.run(serve(Server({name: args[name] for name in FAULTS}, args["latency"], args["seed"], args["plain"]), args["port"]))


if __name__ == "__main__":
    main()
