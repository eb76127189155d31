"""Serve an exported reward model over HTTP, in the format of OpenRLHF's remote reward models.

    python -m reward.serving.serve --port 5000

POST /get_reward takes a JSON object in one of two forms. The first has `query`, which some clients
call `messages`: a list of whole texts, that is, prompts with their answers, already rendered. Each
is scored with the ending that it would have had in training. Optional `prompts` tell the server
which texts share a prompt. The second form has `prompts` and `answers`, texts or lists of messages,
and optionally `tools`, a list for each text, which the model's own template renders. The response
has `rewards`, one for each text. GET /health responds as long as the server runs, and GET /metrics
returns metrics for Prometheus.

If an API key is set, with the environment variable REWARD_API_KEY or --api-key, the server only
answers requests that send it, as `Authorization: Bearer KEY` or as the password of
`http://any:KEY@host`.

There is one process for each visible GPU, and all of them share the port. Concurrent requests are
scored together. The first SIGTERM or SIGINT ends the server after it has answered all accepted
requests. A second one ends it at once.
"""

import argparse
import asyncio
import hmac
import ipaddress
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from reward.data.reading import unique_keys
from reward.data.records import TOOLS, BadRecord, require_all_read, require_no_context
from reward.model.launching import distribute, torchrun_options
from reward.process import LAUNCHED, Fault, command_line, counted, one_line, run, threads
from reward.serving.metrics import FOLDER, Metrics
from reward.serving.queue import Full, Queue, Unscored
from reward.serving.scorer import EXPORT, Ids, Misfit, Scorer

# The most bytes and texts of a request, and the most bytes of all requests not yet tokenized.
LARGEST, TEXTS, READING = 1 << 23, 1 << 16, 1 << 28
# The number of requests that are tokenized at the same time.
READERS = 2
# The connections that may wait to be accepted. The system reduces this to its own limit.
BACKLOG = (1 << 16) - 1
# The connections that asyncio accepts at a time. Without file descriptors, it fails as many times.
ACCEPTS = 16
# The seconds in which a body must arrive and a response must be read, and in which accepted
# requests are answered at the end.
PATIENCE, GRACE = 30.0, 3600.0
# The seconds after which a connection is closed if no complete header arrives. A proxy must close
# idle connections first, or a request may meet the end of one; nginx does so after 60 s.
IDLE = 75.0

# The environment variable for the API key. Other users of the machine can see arguments.
KEY = "REWARD_API_KEY"
REWARD, HEALTH = "/get_reward", "/health"
# The keys of a request that can hold its texts.
NAMES = ("query", "messages", "answers")

# Headers of an error that tell the client what to do.
KEPT = ("Allow", "Retry-After", "WWW-Authenticate")

# For the server's own errors. What breaks the protocol is the client's fault, and only it is told.
LOG = logging.getLogger("reward.serving.serve")
LOG.addFilter(
    lambda record: (
        not record.exc_info
        or not isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError)
    )
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def main() -> None:
    """Serve, in this process."""
    options = parse()
    torch.set_num_threads(threads())
    raise_descriptors()
    scorer = Scorer(options.model)
    asyncio.run(serve(Service(scorer, options.api_key), options.host, options.port, LAUNCHED))


def parse() -> argparse.Namespace:
    """The command line. Raises a Fault for a bad port or key, or if a key is needed and missing."""
    parser = command_line("reward.serving.serve", __doc__)
    parser.add_argument(
        "--model", type=Path, default=EXPORT, help=f"folder of an exported model ({EXPORT})"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port; 0 means any free port (5000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY),
        help=f"key that clients must send; {KEY} is safer, because other users can see arguments",
    )
    parser.add_argument(
        "--without-api-key",
        action="store_true",
        help="answer everyone, even if other machines can reach the address",
    )
    options = parser.parse_args()
    if not 0 <= options.port < 1 << 16:
        raise Fault(f"--port is {options.port}, expected a number from 0 to 65535")
    if options.api_key is not None and not re.fullmatch("[!-~]+", options.api_key):
        raise Fault(
            "the API key is empty or has characters other than visible ASCII; choose another key"
        )
    if options.api_key is None and not options.without_api_key and not is_local(options.host):
        raise Fault(
            f"--host is {options.host}, which other machines may reach; set an API key in {KEY}, "
            "or pass --without-api-key"
        )
    return options


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def raise_descriptors() -> None:
    """Raise this process's limit of open files, and so of connections, as far as allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS rejects an unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(service: "Service", host: str, port: int, shared: bool = False) -> None:
    """Serve until a signal arrives. If `shared`, other processes use the same address.

    Raises a Fault if the address cannot be bound.
    """
    runner = web.AppRunner(
        service.application(),
        access_log=None,
        logger=LOG,
        shutdown_timeout=GRACE,
        keepalive_timeout=IDLE,
        # The texts of a client that has disconnected are not scored.
        handler_cancellation=True,
    )
    await runner.setup()
    try:
        async with binding(host, port, shared) as sockets:
            for each in sockets:
                await web.SockSite(runner, each, backlog=ACCEPTS).start()
                each.listen(BACKLOG)  # after asyncio, which listens with its own backlog
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, partial(end, ended, number))
        address, found = runner.addresses[0][:2]
        place = f"[{address}]" if ":" in address else address
        print(f"serving    http://{place}:{found}{REWARD}", flush=True)
        await ended.wait()
    finally:
        await runner.cleanup()
    if not shared:  # a shared process does not know the numbers of the others
        texts = counted(service.texts, "text")
        print(f"stopped    after {counted(service.requests, 'request')} with {texts}")


@asynccontextmanager
async def binding(host: str, port: int, shared: bool = False) -> AsyncIterator[list[socket.socket]]:
    """A socket for each address of a host, to listen on.

    If `shared`, other processes may bind the same addresses. Raises a Fault if one cannot be bound.
    """
    try:
        server = await asyncio.get_running_loop().create_server(
            asyncio.Protocol, host, port, reuse_port=shared or None, start_serving=False
        )
        with closing(server):
            sockets = [each.dup() for each in server.sockets]
        yield sockets
    except (OSError, UnicodeError) as error:  # a bad address, or a host name that is not valid
        reason = getattr(error, "strerror", None) or error
        raise Fault(
            f"cannot listen on {host}:{port}: {reason}; expected a free address of this machine"
        ) from None


async def reserve(host: str, port: int, shared: bool) -> list[socket.socket]:
    """Sockets that keep an address for processes that will share it; without `shared`, none.

    Processes that share an address do not notice whether others use it, such as those of another
    server that is still loading its model. These sockets keep others out, and as they do not
    listen, they get no connections. Raises a Fault for an address that cannot be bound.
    """
    async with binding(host, port) as alone:
        with ExitStack() as stack:
            for each in alone:
                stack.enter_context(each).listen()
            if not shared:
                return []
            for each in alone:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, True)
            async with binding(host, port, shared=True) as kept:
                for each in kept:
                    # Otherwise another server could bind the address, too, until somebody listens.
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
                return kept


def end(ended: asyncio.Event, number: int) -> None:
    """Shut down gracefully at the first signal, immediately at the second."""
    if ended.is_set():
        os._exit(128 + number)
    ended.set()


# --- requests --------------------------------------------------------------------------------


class Refused(Exception):
    """A bad request. One sentence says what is wrong."""


class Service:
    """The routes and the queue behind them."""

    def __init__(self, scorer: Scorer, key: str | None = None) -> None:
        """Without a key, everyone may send requests."""
        self.requests = self.texts = 0
        self._scorer = scorer
        self._key = key
        self._metrics = Metrics()
        self._queue = Queue(scorer, self._metrics)
        self._reading = 0
        self._readers = ThreadPoolExecutor(max_workers=READERS)

    def application(self) -> web.Application:
        application = web.Application(
            middlewares=[written, self.counted, errors_as_json, self.authorized]
        )
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
        """Count requests for rewards in the metrics."""
        begin = time.monotonic()
        response = await handler(request)
        if request.path == REWARD:
            self._metrics.requests.labels(response.status).inc()
            if response.status == web.HTTPOk.status_code:
                self._metrics.seconds.observe(time.monotonic() - begin)
        return response

    @web.middleware
    async def authorized(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Require the key, if there is one, for everything except /health.

        Without a key, refuse what web pages send, so that none can use the server of whoever
        looks at it.
        """
        if self._key is None and "Origin" in request.headers:
            raise web.HTTPForbidden(
                text="requests from web pages need an API key, and this server has none"
            )
        sent = sent_key(request.headers.get("Authorization", ""))
        if self._key is None or request.path == HEALTH or equal(sent, self._key):
            return await handler(request)
        raise web.HTTPUnauthorized(
            text="the API key is missing or wrong; send Authorization: Bearer KEY",
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
        except RecursionError:
            sentence = "the body has a value that is nested too deeply"
            raise web.HTTPBadRequest(text=sentence) from None
        except Full as full:
            raise web.HTTPServiceUnavailable(
                text=str(full), headers={"Retry-After": f"{full.seconds}"}
            ) from None
        except Unscored as unscored:
            raise web.HTTPInternalServerError(text=str(unscored)) from None
        except Fault as fault:  # from the tokenizer, with details of this machine
            print(fault, file=sys.stderr)
            raise web.HTTPInternalServerError(text="the texts cannot be encoded") from None
        self.requests += 1
        self.texts += len(texts)
        return web.json_response({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytearray]:
        """The body of a request; its bytes count against READING while the context lasts.

        Raises Full, Refused or an HTTP error if the body does not arrive or is too large.
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
                        sentence = f"{self._reading} bytes are being read, the limit is {READING}"
                        raise Full(sentence, self._queue.seconds())
                    body += part
                    self._reading += len(part)
        except TimeoutError:
            raise web.HTTPRequestTimeout(
                text=f"the body did not arrive within {PATIENCE:g} s"
            ) from None
        except web.RequestPayloadError as error:
            raise Refused(f"the body cannot be read: {one_line(error)}") from None
        else:
            yield body
        finally:
            self._reading -= len(body)

    async def _working(self, application: web.Application) -> AsyncIterator[None]:
        async with self._queue.working():
            yield
        self._readers.shutdown(wait=False)


def sent_key(header: str) -> str:
    """The key in an Authorization header, or an empty string.

    Trainers that cannot set headers send the password in their URL, as Basic authentication.
    """
    scheme, _, content = header.partition(" ")
    if scheme.lower() == "bearer":
        return content.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return b64decode(content).decode().partition(":")[2]
    return ""


def equal(sent: str, key: str) -> bool:
    """Whether two keys are equal, in a time that does not reveal where they differ."""
    return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), key.encode())


@web.middleware
async def written(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Write responses, and close the connection of a client that does not read its own in time."""
    response = await handler(request)
    try:
        async with asyncio.timeout(PATIENCE):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport:
            request.transport.abort()
    except ConnectionError:
        pass  # the client is gone
    return response


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as JSON: {"error": sentence}."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kept = {name: error.headers[name] for name in KEPT if name in error.headers}
        return web.json_response({"error": error.text}, status=error.status, headers=kept)


def read(scorer: Scorer, body: bytearray) -> tuple[list[Ids], Sequence[Hashable]]:
    """The ids of a request's texts, and for each a value that is equal for equal prompts.

    The value is a hash of the prompt, so long prompts take no memory in the queue. If two prompts
    had the same hash, less would be shared, but the rewards would still be right. Raises Refused,
    RecursionError for a value that is nested too deeply, and a Fault if the tokenizer fails.
    """
    try:
        content = json.loads(body, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict) or len(names := [key for key in NAMES if key in content]) != 1:
        raise Refused("the body must be an object with exactly one of query, messages and answers")
    [name] = names
    texts: Any = content[name]
    prompts: Any = content.get("prompts")
    if not isinstance(texts, list) or not texts:
        raise Refused(f"{name} must be a list of at least one text")
    if len(texts) > TEXTS:
        raise Refused(f"{name} has {len(texts)} texts, expected at most {TEXTS} per request")
    free = name != "answers" and prompts is None
    if not free:
        require_each("prompts", prompts, texts)
    try:
        if name == "answers":
            require_all_read(content)
            require_no_context(content)
            if (tools := content.get(TOOLS)) is not None:
                require_each(TOOLS, tools, texts)
            ids, asked = scorer.encode_pairs(prompts, texts, tools)
            return ids, [hash(prompt) for prompt in asked]
        ids = scorer.encode_rendered(whole_texts(texts))
        return ids, [object() if free else hash(json.dumps(prompt)) for prompt in prompts or texts]
    except Misfit as error:
        raise Refused(f"{name}[{error.index}]: {error}") from None
    except BadRecord as error:
        raise Refused(f"the body: {error}") from None


def require_each(name: str, found: Any, texts: list[Any]) -> None:
    """Raises Refused unless a list has one item for each text."""
    if not isinstance(found, list) or len(found) != len(texts):
        raise Refused(f"{name} must be a list of {counted(len(texts), 'item')}, one for each text")


def whole_texts(texts: list[Any]) -> list[str]:
    """The texts unchanged. Raises Misfit for an item that is not text."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise Misfit(index, "not_text", "is not a text") from None
    return texts


# --- processes -------------------------------------------------------------------------------


def start() -> None:
    """Serve in this process or in one for each visible GPU, with a common folder for the metrics.

    Before any process loads the model, raises a Fault for an address that cannot be bound, or that
    several processes cannot share.
    """
    options, module = parse(), "reward.serving.serve"
    go = partial(distribute, main, module, arguments=sys.argv[1:], together=False)
    if LAUNCHED:
        go()
        return
    several = torchrun_options([module], machines=False).nproc_per_node > 1
    if several and options.port == 0:
        raise Fault("--port is 0, but several processes must share a port; choose one")
    with ExitStack() as stack:
        for each in asyncio.run(reserve(options.host, options.port, several)):
            stack.enter_context(each)
        if several:
            folder = stack.enter_context(TemporaryDirectory())
            os.environ |= {FOLDER: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{GRACE:.0f}"}
        go()


if __name__ == "__main__":
    run(start)
