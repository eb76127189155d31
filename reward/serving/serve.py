"""Serve an exported reward model over HTTP, in the format of OpenRLHF's remote reward models.

    python -m reward.serving.serve --port 5000

POST /get_reward takes a JSON object with `query`: whole texts, which are scored as they are, and
whose `prompts`, if they are given too, say which of them begin alike. Or with `prompts` and
`answers`, texts or lists of messages, which the model's own template renders. It answers with
`rewards`, one a text. GET /health answers as long as the server does.

What several clients ask for at once is scored together. The first SIGTERM or SIGINT ends the
server when all that was accepted is answered, the second one at once.
"""

import argparse
import asyncio
import json
import os
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from reward.model.packing import into_packs
from reward.process import Fault, processors, run
from reward.serving.scorer import TOKENS_PER_PACK, Ids, Misfit, Scorer

EXPORT = Path("models/export")
# Bytes of a request, and requests that are accepted at once.
LARGEST, MOST = 1 << 23, 256
# Seconds in which a body has to arrive, and in which all that was accepted is answered at the end.
PATIENCE, GRACE = 30.0, 3600.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Job:
    """The texts of a request, and where their rewards are awaited."""

    texts: list[Ids]
    prompts: Sequence[Hashable]
    rewards: asyncio.Future[list[float]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    def succeed(self, rewards: list[float]) -> None:
        """Hand over the rewards, unless nobody waits for them any more."""
        if not self.rewards.done():
            self.rewards.set_result(rewards)

    def fail(self) -> None:
        """Have the request answered by an error that says nothing of this machine."""
        if not self.rewards.done():
            self.rewards.set_exception(
                web.HTTPInternalServerError(text="the texts cannot be scored")
            )


def main() -> None:
    options = parse()
    torch.set_num_threads(processors())
    scorer = Scorer(options.model)
    asyncio.run(serve(Service(scorer), options.host, options.port))


def parse() -> argparse.Namespace:
    """The command line. Raises a Fault for what is no port."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=EXPORT, help=f"folder of an exported model ({EXPORT})"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=5000, help="port; 0 for any that is free (5000)"
    )
    options = parser.parse_args()
    if not 0 <= options.port < 1 << 16:
        raise Fault(f"--port is {options.port}, wanted a number from 0 to 65535")
    return options


async def serve(service: "Service", host: str, port: int) -> None:
    """Answer until a signal comes. Raises a Fault where the address cannot be had."""
    # With cancellation what a client that is gone has asked for is not scored.
    runner = web.AppRunner(
        service.application(), access_log=None, shutdown_timeout=GRACE, handler_cancellation=True
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except (OSError, UnicodeError) as error:  # no address, or a name that none can have
        raise Fault(
            f"{host}:{port} cannot be had: {getattr(error, 'strerror', error)}; wanted a free "
            "address of this machine"
        ) from None
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, partial(end, ended, number))
    address, found = runner.addresses[0][:2]
    place = f"[{address}]" if ":" in address else address
    print(f"serving    http://{place}:{found}/get_reward", flush=True)
    await ended.wait()
    await runner.cleanup()
    print(f"stopped    {service.requests} requests with {service.texts} texts were answered")


def end(ended: asyncio.Event, number: int) -> None:
    """End in order, or, where that has begun, at once."""
    if ended.is_set():
        os._exit(128 + number)
    ended.set()


# --- requests --------------------------------------------------------------------------------


class Refused(Exception):
    """What is wrong with a request, in a sentence."""


class Service:
    """The routes, and the queue behind them."""

    def __init__(self, scorer: Scorer) -> None:
        self.requests = self.texts = 0
        self._scorer = scorer
        self._open = 0
        self._waiting: list[Job] = []
        self._arrived = asyncio.Event()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=LARGEST, middlewares=[errors_as_json])
        application.add_routes(
            [web.post("/get_reward", self.get_reward), web.get("/health", self.health)]
        )
        application.cleanup_ctx.append(self._working)
        return application

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def get_reward(self, request: web.Request) -> web.Response:
        if self._open >= MOST:
            raise web.HTTPServiceUnavailable(
                text=f"{MOST} requests are waiting, wanted fewer; try again",
                headers={"Retry-After": "1"},
            )
        self._open += 1
        try:
            async with asyncio.timeout(PATIENCE):
                body = await request.read()
            texts, prompts = await asyncio.to_thread(read, self._scorer, body)
            rewards = await self._scored(texts, prompts)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"no whole body came in {PATIENCE:g} s") from None
        except web.RequestPayloadError as error:
            raise web.HTTPBadRequest(text=f"the body cannot be read: {error}") from None
        except Refused as refused:
            raise web.HTTPBadRequest(text=str(refused)) from None
        finally:
            self._open -= 1
        self.requests += 1
        self.texts += len(texts)
        return web.json_response({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    async def _scored(self, texts: list[Ids], prompts: Sequence[Hashable]) -> list[float]:
        job = Job(texts, prompts, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        return await job.rewards

    async def _working(self, application: web.Application) -> AsyncIterator[None]:
        """One thread that scores, as long as the server runs."""
        pool = ThreadPoolExecutor(max_workers=1)
        task = asyncio.create_task(self._work(pool))
        yield
        task.cancel()
        # Beside this thread, which has to hear of a second signal.
        await asyncio.to_thread(pool.shutdown)

    async def _work(self, pool: ThreadPoolExecutor) -> None:
        """Score what has come while the last texts were scored, as much as a pack holds."""
        while True:
            await self._arrived.wait()
            waiting = [job for job in self._waiting if not job.rewards.done()]
            packs = into_packs([job.tokens for job in waiting], TOKENS_PER_PACK)
            count = len(packs[0]) if packs else 0
            self._waiting = waiting[count:]
            if not self._waiting:
                self._arrived.clear()
            if count:
                await self._score(pool, waiting[:count])

    async def _score(self, pool: ThreadPoolExecutor, jobs: list[Job]) -> None:
        """Score jobs together, and one by one where that fails: one must not fail the others."""
        texts = [ids for job in jobs for ids in job.texts]
        prompts = [prompt for job in jobs for prompt in job.prompts]
        loop = asyncio.get_running_loop()
        try:
            rewards = iter(await loop.run_in_executor(pool, self._scorer.rewards, texts, prompts))
        except Exception as error:  # of a model, or a bug
            if len(jobs) > 1:
                for job in jobs:
                    await self._score(pool, [job])
                return
            traceback.print_exception(error, limit=0 if isinstance(error, Fault) else None)
            jobs[0].fail()
            return
        for job in jobs:
            job.succeed(list(islice(rewards, len(job.texts))))


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What went wrong as {"error": sentence}."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kept = {
            name: error.headers[name] for name in ("Allow", "Retry-After") if name in error.headers
        }
        return web.json_response({"error": error.text}, status=error.status, headers=kept)


def read(scorer: Scorer, body: bytes) -> tuple[list[Ids], Sequence[Hashable]]:
    """The ids of a request's texts, and what is equal for those that begin alike.

    Raises Refused.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None
    keys = set(content) if isinstance(content, dict) else set()
    if ("query" in keys) == ("answers" in keys):
        raise Refused("the body has no query and no answers, or both; wanted an object with one")
    name = "query" if "query" in keys else "answers"
    texts, prompts = content[name], content.get("prompts")
    if not isinstance(texts, list) or not texts:
        raise Refused(f"{name} is no list, or an empty one; wanted one of texts")
    free = name == "query" and prompts is None
    if not free and not (isinstance(prompts, list) and len(prompts) == len(texts)):
        raise Refused(f"prompts is no list of {len(texts)} prompts, wanted one for each text")
    try:
        if name == "answers":
            return scorer.encode_pairs(prompts, texts)
        alike = [object() for _ in texts] if free else [json.dumps(prompt) for prompt in prompts]
        return scorer.encode_rendered(whole_texts(texts)), alike
    except Misfit as error:
        raise Refused(f"{name}[{error.index}]: {error}") from None


def whole_texts(texts: list[Any]) -> list[str]:
    """The same. Raises Misfit for what is no text."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise Misfit(index, "not_text", "is no text, wanted one") from None
    return texts


if __name__ == "__main__":
    run(main)
