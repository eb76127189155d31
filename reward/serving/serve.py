"""Serve an exported reward model over HTTP, in the format of OpenRLHF's remote reward models.

    python -m reward.serving.serve --port 5000

POST /get_reward takes a JSON object with `query`: whole texts, which are scored with the ending of
training, and whose `prompts`, if they are given too, say which of them begin alike. Or with
`prompts` and `answers`, texts or lists of messages, which the model's own template renders. It
answers with `rewards`, one a text. GET /health answers as long as the server does, GET /metrics
tells Prometheus what was asked.

With an API key, in the environment variable REWARD_API_KEY or as --api-key, it answers those alone
who send it: as `Authorization: Bearer KEY`, or as the password of `http://any:KEY@host`.

GPUs in sight have a process each, all behind the one port.

What several clients ask for at once is scored together. The first SIGTERM or SIGINT ends the
server when all that was accepted is answered, the second one at once.
"""

import argparse
import asyncio
import hmac
import ipaddress
import json
import os
import re
import resource
import signal
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from reward.model.launching import distribute, torchrun_options
from reward.process import LAUNCHED, Fault, run, threads
from reward.serving.metrics import FOLDER, Metrics
from reward.serving.queue import Full, Queue, Unscored
from reward.serving.scorer import Ids, Misfit, Scorer

EXPORT = Path("models/export")
# Bytes and texts of a request, and bytes of all requests whose texts have no ids yet.
LARGEST, TEXTS, READING = 1 << 23, 1 << 16, 1 << 28
# Requests whose texts are turned into ids at the same time.
READERS = 2
# Connections that may wait to be accepted; the system grants as many as it allows.
BACKLOG = (1 << 16) - 1
# Seconds in which a body has to arrive, and in which all that was accepted is answered at the end.
PATIENCE, GRACE = 30.0, 3600.0

# The environment variable of the API key: others on this machine see arguments.
KEY = "REWARD_API_KEY"
REWARD, HEALTH = "/get_reward", "/health"
# The keys of a request that may hold its texts.
NAMES = ("query", "messages", "answers")

# Headers of an error that say what to do about it.
KEPT = ("Allow", "Retry-After", "WWW-Authenticate")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def main() -> None:
    """Serve, in this process."""
    options = parse()
    torch.set_num_threads(threads())
    raise_descriptors()
    scorer = Scorer(options.model)
    asyncio.run(serve(Service(scorer, options.api_key), options.host, options.port, LAUNCHED))


def parse() -> argparse.Namespace:
    """The command line. Raises a Fault for what is no port or no key, and where one is needed."""
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
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY),
        help=f"what clients have to send; better in {KEY}, because others here see arguments",
    )
    parser.add_argument(
        "--without-api-key", action="store_true", help="answer anyone, on other addresses too"
    )
    options = parser.parse_args()
    if not 0 <= options.port < 1 << 16:
        raise Fault(f"--port is {options.port}, wanted a number from 0 to 65535")
    if options.api_key is not None and not re.fullmatch("[!-~]+", options.api_key):
        raise Fault(
            "the API key is empty, or has spaces or more than ASCII; expected visible ASCII"
        )
    if options.api_key is None and not options.without_api_key and not is_local(options.host):
        raise Fault(
            f"--host is {options.host}, which others may reach; expected an API key in {KEY}, or "
            "--without-api-key"
        )
    return options


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def raise_descriptors() -> None:
    """Have this process open as many files, and so connections, as the system lets it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # on macOS, where none may be unlimited
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(service: "Service", host: str, port: int, shared: bool = False) -> None:
    """Answer until a signal comes, at an address that may be shared with other processes.

    Raises a Fault where the address cannot be had.
    """
    # With cancellation what a client that is gone has asked for is not scored.
    runner = web.AppRunner(
        service.application(), access_log=None, shutdown_timeout=GRACE, handler_cancellation=True
    )
    await runner.setup()
    with had(host, port):
        await web.TCPSite(runner, host, port, backlog=BACKLOG, reuse_port=shared or None).start()
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, partial(end, ended, number))
    address, found = runner.addresses[0][:2]
    place = f"[{address}]" if ":" in address else address
    print(f"serving    http://{place}:{found}{REWARD}", flush=True)
    await ended.wait()
    await runner.cleanup()
    if not shared:  # it knows nothing of the others
        print(f"stopped    {service.requests} requests with {service.texts} texts were answered")


@contextmanager
def had(host: str, port: int) -> Iterator[None]:
    """Raises a Fault where an address cannot be had."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # no address, or a name that none can have
        raise Fault(
            f"{host}:{port} cannot be had: {getattr(error, 'strerror', error)}; wanted a free "
            "address of this machine"
        ) from None


async def require_free(host: str, port: int) -> None:
    """Raises a Fault for an address in use, which processes that share it would not notice."""
    with had(host, port):
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    server.close()
    await server.wait_closed()


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

    def __init__(self, scorer: Scorer, key: str | None = None) -> None:
        """Without a key everyone is answered."""
        self.requests = self.texts = 0
        self._scorer = scorer
        self._key = key
        self._metrics = Metrics()
        self._queue = Queue(scorer, self._metrics)
        self._reading = 0
        self._readers = ThreadPoolExecutor(max_workers=READERS)

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self.counted, errors_as_json, self.authorized])
        application.add_routes(
            [
                web.post(REWARD, self.get_reward),
                web.get(HEALTH, self.health),
                web.get("/metrics", self.metrics),
            ]
        )
        application.cleanup_ctx.append(self._working)
        return application

    @web.middleware
    async def counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Have requests for rewards in the metrics."""
        begin = time.monotonic()
        response = await handler(request)
        if request.path == REWARD:
            self._metrics.requests.labels(response.status).inc()
            if response.status == web.HTTPOk.status_code:
                self._metrics.seconds.observe(time.monotonic() - begin)
        return response

    @web.middleware
    async def authorized(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer those alone who have the key, where there is one; health is everyone's."""
        sent = sent_key(request.headers.get("Authorization", ""))
        if self._key is None or request.path == HEALTH or equal(sent, self._key):
            return await handler(request)
        raise web.HTTPUnauthorized(
            text="no API key, or another one; expected Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer"},
        )

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def metrics(self, request: web.Request) -> web.Response:
        headers = {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
        return web.Response(body=self._metrics.exposition(), headers=headers)

    async def get_reward(self, request: web.Request) -> web.Response:
        try:
            self._queue.require_room()
            async with self._body(request) as body:
                loop = asyncio.get_running_loop()
                texts, prompts = await loop.run_in_executor(self._readers, read, self._scorer, body)
            rewards = await self._queue.rewards(texts, prompts)
        except Refused as refused:
            raise web.HTTPBadRequest(text=str(refused)) from None
        except Full as full:
            raise web.HTTPServiceUnavailable(
                text=str(full), headers={"Retry-After": f"{full.seconds}"}
            ) from None
        except Unscored as unscored:
            raise web.HTTPInternalServerError(text=str(unscored)) from None
        self.requests += 1
        self.texts += len(texts)
        return web.json_response({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytearray]:
        """The body of a request, whose bytes count as long as the context lasts.

        Raises Full, Refused and the errors of HTTP for what does not arrive, or is too large.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(PATIENCE):
                async for part in request.content.iter_any():
                    if len(body) + len(part) > LARGEST:
                        raise web.HTTPRequestEntityTooLarge(
                            LARGEST, text=f"the body has more than {LARGEST} bytes"
                        )
                    if self._reading + len(part) > READING:
                        sentence = f"{self._reading} bytes are being read, at most {READING} may be"
                        raise Full(sentence, self._queue.seconds())
                    body += part
                    self._reading += len(part)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"no whole body came in {PATIENCE:g} s") from None
        except web.RequestPayloadError as error:
            raise Refused(f"the body cannot be read: {error}") from None
        else:
            yield body
        finally:
            self._reading -= len(body)

    async def _working(self, application: web.Application) -> AsyncIterator[None]:
        async with self._queue.working():
            yield
        self._readers.shutdown(wait=False)


def sent_key(header: str) -> str:
    """The key that an Authorization header holds; empty where it holds none.

    Trainers that send no header of their own send the password of their URL, as Basic.
    """
    scheme, _, content = header.partition(" ")
    if scheme.lower() == "bearer":
        return content.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return b64decode(content).decode().partition(":")[2]
    return ""


def equal(sent: str, key: str) -> bool:
    """Whether two keys are equal, in a time that tells nothing of where they differ."""
    return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), key.encode())


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What went wrong as {"error": sentence}."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kept = {name: error.headers[name] for name in KEPT if name in error.headers}
        return web.json_response({"error": error.text}, status=error.status, headers=kept)


def read(scorer: Scorer, body: bytearray) -> tuple[list[Ids], Sequence[Hashable]]:
    """The ids of a request's texts, and what is equal for those that begin alike.

    It is a hash of the prompt, so that the length of prompts takes no memory of the queue: where
    two had the same, less would be computed once, and the rewards were right. Raises Refused.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(content, dict) or len(names := [key for key in NAMES if key in content]) != 1:
        raise Refused(
            "the body has none of query, messages and answers, or several; expected an object "
            "with one of them"
        )
    [name] = names
    texts: Any = content[name]
    prompts: Any = content.get("prompts")
    if not isinstance(texts, list) or not texts:
        raise Refused(f"{name} is no list, or an empty one; wanted one of texts")
    if len(texts) > TEXTS:
        raise Refused(f"{name} has {len(texts)} texts, at most {TEXTS} may come at once")
    free = name != "answers" and prompts is None
    if not free and not (isinstance(prompts, list) and len(prompts) == len(texts)):
        raise Refused(f"prompts is no list of {len(texts)} prompts, wanted one for each text")
    try:
        if name == "answers":
            ids, asked = scorer.encode_pairs(prompts, texts)
            return ids, [hash(prompt) for prompt in asked]
        ids = scorer.encode_rendered(whole_texts(texts))
        return ids, [object() if free else hash(json.dumps(prompt)) for prompt in prompts or texts]
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


# --- processes -------------------------------------------------------------------------------


def start() -> None:
    """Serve in this process, or in one for each GPU in sight, which count in a common folder.

    Raises a Fault for an address that several processes cannot share.
    """
    options, module = parse(), "reward.serving.serve"
    go = partial(
        distribute, main, module, lambda gpus: gpus, arguments=sys.argv[1:], together=False
    )
    if LAUNCHED or torchrun_options([module], machines=False).nproc_per_node == 1:
        go()
        return
    if options.port == 0:
        raise Fault("--port is 0 for several processes, expected the port that they share")
    asyncio.run(require_free(options.host, options.port))
    with TemporaryDirectory() as folder:
        os.environ |= {FOLDER: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{GRACE:.0f}"}
        go()


if __name__ == "__main__":
    run(start)
