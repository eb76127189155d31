"""The server: every accepted request gets its own rewards, whatever other requests arrive."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serve as load
from reward.process import Fault
from reward.serving import queue, serve
from reward.serving.metrics import Metrics
from reward.serving.scorer import Ids, Scorer
from tests.forked import (
    PATIENCE,
    Forked,
    free_port,
    serve_named,
    serve_slowly,
    serve_with_few_descriptors,
)

T = TypeVar("T")
Client = TestClient[Request, Application]
REWARD = "/get_reward"


@pytest.fixture(scope="module")
def scorer(complete: Path) -> Scorer:
    """An exported model, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(complete)
        return Scorer(Path("models/export"))


class Held:
    """A scorer that waits for permission; the reward for a text is the number in the text."""

    def __init__(self) -> None:
        self.encoded = 0
        self.calls: list[list[Ids]] = []
        self.may = threading.Event()

    def encode_rendered(self, texts: Sequence[str]) -> list[Ids]:
        self.encoded += len(texts)
        return [[int(text)] for text in texts]

    def rewards(self, texts: list[Ids], prompts: Sequence[Hashable]) -> list[float]:
        assert len(texts) == len(prompts)
        self.calls.append(texts)
        assert self.may.wait(20)
        return [float(ids[0]) for ids in texts]


@pytest.fixture
def held() -> Iterator[Held]:
    scorer = Held()
    yield scorer
    scorer.may.set()


def served(scorer: Any, work: Callable[[Client], Awaitable[T]], key: str | None = None) -> T:
    """The result of `work` with a server in this process."""
    return served_by(serve.Service(cast(Scorer, scorer), key), work)


def served_by(service: serve.Service, work: Callable[[Client], Awaitable[T]]) -> T:
    async def with_server() -> T:
        async with TestClient(TestServer(service.application())) as client:
            return await asyncio.wait_for(work(client), 60)

    return asyncio.run(with_server())


async def post(client: Client, content: Any) -> tuple[int, Any]:
    response = await client.post(REWARD, json=content)
    return response.status, await response.json()


@asynccontextmanager
async def serving(
    service: serve.Service, capfd: pytest.CaptureFixture[str]
) -> AsyncIterator[tuple[str, int]]:
    """The address of a server in this process, started as by its command."""
    place = "127.0.0.1", free_port()
    running = asyncio.create_task(serve.serve(service, *place))
    await until(lambda: "serving" in capfd.readouterr().out)
    yield place
    signal.raise_signal(signal.SIGTERM)
    await running


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


# --- rewards ---------------------------------------------------------------------------------


def test_prompts_with_answers_get_the_rewards_of_the_model(scorer: Scorer) -> None:
    prompts = ["hi", [{"role": "user", "content": "hi"}], "Why?"]
    answers = ["yes", [{"role": "assistant", "content": "yes"}], ""]
    status, found = served(scorer, lambda c: post(c, {"prompts": prompts, "answers": answers}))
    expected = scorer.rewards(*scorer.encode_pairs(prompts, answers))
    assert status == 200
    assert found["rewards"] == pytest.approx(expected, abs=1e-5)
    assert found["rewards"][0] == found["rewards"][1]


def test_openrlhf_request_gets_the_expected_response(scorer: Scorer) -> None:
    """It sends whole texts with prompts and labels, and reads rewards, scores and extra_logs."""
    query = ["问:hi\n\n答:yes", "问:hi\n\n答:no", "问:一\n\n答:yes"]
    content = {"query": query, "prompts": ["问:hi", "问:hi", "问:一"], "labels": [None, "a", 3]}
    status, found = served(scorer, lambda client: post(client, content))
    expected = scorer.rewards(scorer.encode(query), [0, 1, 2])
    assert (status, found.keys()) == (200, {"rewards", "scores", "extra_logs"})
    assert found["rewards"] == found["scores"] == pytest.approx(expected, abs=1e-5)
    assert found["extra_logs"] == {}
    _, alone = served(scorer, lambda client: post(client, {"query": query}))
    assert alone["rewards"] == pytest.approx(expected, abs=1e-5)


def test_llama_factory_request_gets_the_expected_scores(scorer: Scorer) -> None:
    """The request is what get_rewards_from_server in train/ppo/ppo_utils.py sends."""
    messages = ["问:hi\n\n答:yes", "问:hi\n\n答:no"]
    status, found = served(
        scorer, lambda client: post(client, {"model": "model", "messages": messages})
    )
    expected = scorer.rewards(scorer.encode(messages), [0, 1])
    assert status == 200
    assert found["scores"] == pytest.approx(expected, abs=1e-5)


def test_concurrent_requests_get_their_own_rewards(scorer: Scorer) -> None:
    requests = [
        {
            "prompts": [f"Question {n % 5}"] * size,
            "answers": [f"Answer {n} {k}" for k in range(size)],
        }
        for n, size in enumerate([1, 2, 3, 5] * 10)
    ]

    async def all_at_once(client: Client) -> list[tuple[int, Any]]:
        return await asyncio.gather(*(post(client, request) for request in requests))

    for request, (status, found) in zip(requests, served(scorer, all_at_once), strict=True):
        expected = scorer.rewards(*scorer.encode_pairs(request["prompts"], request["answers"]))
        assert status == 200
        assert found["rewards"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("most", "calls"), [(100, [1, 9]), (4, [1, 4, 4, 1])])
def test_requests_that_arrive_during_scoring_are_batched(
    held: Held, most: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "TOKENS_PER_PACK", most)
    service = serve.Service(cast(Scorer, held))

    async def work(client: Client) -> list[tuple[int, Any]]:
        first = asyncio.create_task(post(client, {"query": ["0"]}))
        await until(lambda: len(held.calls) == 1)
        others = [asyncio.create_task(post(client, {"query": [str(n)]})) for n in range(1, 10)]
        await until(lambda: service._queue.tokens == 10)
        held.may.set()
        return await asyncio.gather(first, *others)

    found = served_by(service, work)
    assert [answer["rewards"] for _, answer in found] == [[float(n)] for n in range(10)]
    assert [len(texts) for texts in held.calls] == calls


# --- limits ----------------------------------------------------------------------------------


def test_hundreds_of_concurrent_requests_are_all_answered(held: Held) -> None:
    """Each has its own connection, like the samples that OpenRLHF sends."""
    held.may.set()
    count = 500
    serve.raise_descriptors()

    async def work(client: Client) -> list[tuple[int, Any]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(number: int) -> tuple[int, Any]:
                content = {"query": [f"{number}"], "prompts": ["p"], "labels": [None]}
                async with session.post(client.make_url(REWARD), json=content) as response:
                    return response.status, await response.json()

            return await asyncio.gather(*map(one, range(count)))

    found = served(held, work)
    assert [(status, answer["rewards"]) for status, answer in found] == [
        (200, [float(number)]) for number in range(count)
    ]


def test_connections_wait_while_the_server_accepts_none(
    held: Held, capfd: pytest.CaptureFixture[str]
) -> None:
    """Until then, only the system answers, and drops those that it has no place for."""
    held.may.set()

    async def work() -> None:
        async with serving(serve.Service(cast(Scorer, held)), capfd) as (host, port):
            for _ in range(5 * serve.ACCEPTS):  # in the server's own thread
                socket.create_connection((host, port), timeout=5).close()
            async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
                assert (await session.post(REWARD, json={"query": ["7"]})).status == 200

    asyncio.run(asyncio.wait_for(work(), 60))


def test_requests_beyond_the_queue_limit_are_refused_and_nothing_is_lost(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MOST", 3)

    async def work(client: Client) -> None:
        accepted = [asyncio.create_task(post(client, {"query": [str(n)]})) for n in range(3)]
        await until(lambda: held.encoded == 3)
        for _ in range(5):
            async with client.post(REWARD, json={"query": ["9"]}) as response:
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
                assert await response.json() == {
                    "error": "3 tokens are waiting, the limit is 3; try again in 1 s"
                }
        assert (await client.get("/health")).status == 200
        held.may.set()
        found = await asyncio.gather(*accepted)
        assert [answer["rewards"] for _, answer in found] == [[0.0], [1.0], [2.0]]
        assert (await post(client, {"query": ["7"]}))[1]["rewards"] == [7.0]

    served(held, work)


def test_retry_after_is_the_time_to_score_the_queue(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token takes 0.12 s of a clock that only scoring moves: nine take 1.08 s."""
    monkeypatch.setattr(queue, "TOKENS_PER_PACK", 2)
    monkeypatch.setattr(queue, "MOST", 9)
    service, original, took = serve.Service(cast(Scorer, held)), held.rewards, 0.0

    def rewards(texts: list[Ids], prompts: Sequence[Hashable]) -> list[float]:
        nonlocal took
        took += 0.12 * len(texts)
        return original(texts, prompts)

    monkeypatch.setattr(held, "rewards", rewards)
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: took))

    async def work(client: Client) -> None:
        held.may.set()
        await post(client, {"query": ["0", "0"]})
        held.may.clear()
        waiting = [asyncio.create_task(post(client, {"query": ["1"] * 3})) for _ in range(3)]
        await until(lambda: service._queue.tokens == 9)
        async with client.post(REWARD, json={"query": ["9"]}) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "2")
        held.may.set()
        await asyncio.gather(*waiting)
        assert took == pytest.approx(0.24 + 1.08)
        assert (await post(client, {"query": ["9"]}))[0] == 200

    served_by(service, work)


def test_total_size_of_bodies_being_read_is_limited(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "READING", 40)
    held.may.set()
    service = serve.Service(cast(Scorer, held))

    async def work(client: Client) -> None:
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(
            b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n" + b" " * 30
        )
        await until(lambda: service._reading == 30)
        async with client.post(REWARD, json={"query": ["7"]}) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert await response.json() == {
                "error": "30 bytes are being read, the limit is 40; try again in 1 s"
            }
        writer.close()
        await writer.wait_closed()
        await until(lambda: service._reading == 0)
        assert (await post(client, {"query": ["7"]}))[0] == 200

    served_by(service, work)


def test_body_that_never_ends_times_out(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "READING", 40)
    monkeypatch.setattr(serve, "PATIENCE", 0.2)
    held.may.set()

    async def work(client: Client) -> None:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(
            b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n" + b" " * 30
        )
        assert (await reader.readline()).split()[1] == b"408"
        writer.close()
        assert (await post(client, {"query": ["7"]}))[0] == 200

    served(held, work)


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /get_reward HTTP/1.1\r\nHost", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["silent", "partial header", "kept alive"],
)
def test_connection_without_a_request_is_closed(
    held: Held, sent: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "IDLE", 0.1)

    async def work() -> bytes:
        async with serving(serve.Service(cast(Scorer, held)), capfd) as place:
            reader, writer = await asyncio.open_connection(*place)
            writer.write(sent)
            try:
                return await asyncio.wait_for(reader.read(), 20)
            finally:
                writer.close()

    received = asyncio.run(asyncio.wait_for(work(), 60))
    assert received.endswith(b'{"status": "ok"}' if sent.endswith(b"\n") else b"")
    assert capfd.readouterr().err == ""


def test_client_that_does_not_read_its_responses_is_dropped(
    held: Held, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise it would delay the end of the server, which waits for responses."""
    monkeypatch.setattr(serve, "PATIENCE", 0.5)
    held.may.set()
    body = json.dumps({"query": ["1"] * serve.TEXTS}).encode()
    request = b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def work() -> None:
        async with serving(serve.Service(cast(Scorer, held)), capfd) as place:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, place)
                with pytest.raises(ConnectionError):
                    await loop.sock_sendall(client, (request + body) * 100)

    asyncio.run(asyncio.wait_for(work(), 60))
    assert capfd.readouterr().err == ""


def test_connection_that_waits_for_its_rewards_is_not_idle(
    held: Held, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "IDLE", 0.1)

    async def work() -> Any:
        async with (
            serving(serve.Service(cast(Scorer, held)), capfd) as (host, port),
            aiohttp.ClientSession(f"http://{host}:{port}") as session,
        ):
            asyncio.get_running_loop().call_later(3 * serve.IDLE, held.may.set)
            async with session.post(REWARD, json={"query": ["7"]}) as response:
                return await response.json()

    assert asyncio.run(asyncio.wait_for(work(), 60))["rewards"] == [7.0]


def test_client_that_disconnects_does_not_affect_others(held: Held) -> None:
    async def work(client: Client) -> None:
        gone = asyncio.create_task(post(client, {"query": ["1"]}))
        await until(lambda: len(held.calls) == 1)
        other = asyncio.create_task(post(client, {"query": ["2"]}))
        gone.cancel()
        await until(lambda: held.encoded == 2)
        held.may.set()
        assert (await other)[1]["rewards"] == [2.0]

    served(held, work)


def test_cancelled_texts_leave_the_queue(held: Held) -> None:
    async def work() -> None:
        waiting = queue.Queue(cast(Scorer, held), Metrics())
        gone = asyncio.create_task(waiting.rewards([[1, 2]], ["p"]))
        await asyncio.sleep(0)
        assert waiting.tokens == 2
        gone.cancel()
        await asyncio.wait([gone])
        assert waiting.tokens == 0
        held.may.set()
        async with waiting.working():
            assert await waiting.rewards([[3]], ["p"]) == [3.0]

    asyncio.run(work())
    assert held.calls == [[[3]]]


def test_texts_of_a_disconnected_client_are_not_scored(
    held: Held, capfd: pytest.CaptureFixture[str]
) -> None:
    async def one(session: aiohttp.ClientSession, text: str) -> Any:
        async with session.post(REWARD, json={"query": [text]}) as response:
            return await response.json()

    async def work() -> None:
        service = serve.Service(cast(Scorer, held))
        async with (
            serving(service, capfd) as (host, port),
            aiohttp.ClientSession(f"http://{host}:{port}") as session,
        ):
            first = asyncio.create_task(one(session, "1"))
            await until(lambda: len(held.calls) == 1)
            gone = asyncio.create_task(one(session, "2"))
            await until(lambda: service._queue.tokens == 2)
            gone.cancel()
            await until(lambda: service._queue.tokens == 1)
            held.may.set()
            await first

    asyncio.run(asyncio.wait_for(work(), 60))
    assert capfd.readouterr() == ("stopped    after 1 request with 1 text\n", "")
    assert held.calls == [[[1]]]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "the body is not JSON: "),
        (b"[" * 100_000, "the body has a value that is nested too deeply"),
        (b'{"query": ["\xff"]}', "the body is not JSON: "),
        (
            b'{"query": ["a"], "query": ["b"]}',
            "the body is not JSON: the key 'query' appears twice in one object",
        ),
        (
            b'{"prompts": [[{"role": "user", "content": "a", "role": "tool"}]], "answers": ["b"]}',
            "the body is not JSON: the key 'role' appears twice in one object",
        ),
        (b"[1]", "the body must be an object with exactly one of query, messages"),
        (b'{"prompts": ["a"]}', "the body must be an object with exactly one of query,"),
        (
            b'{"query": ["a"], "prompts": ["a"], "answers": ["a"]}',
            "the body must be an object with exactly one of query, messages and answers",
        ),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: is not a text"),
        (b'{"query": "a"}', "query must be a list of at least one text"),
        (b'{"query": []}', "query must be a list of at least one text"),
        (
            b'{"query": [' + b"0," * 65_536 + b"0]}",
            "query has 65537 texts, expected at most 65536 per request",
        ),
        (b'{"query": ["a", null]}', "query[1]: is not a text"),
        (b'{"query": ["a", "\\ud800"]}', "query[1]: is not a text"),
        (b'{"query": ["a"]}', "query[0]: the text begins with 'a', expected one rendered with"),
        (b'{"query": ["\\n ", "a"]}', "query[0]: the text is empty"),
        (b'{"query": ["a"], "prompts": ["b", "c"]}', "prompts must be a list of 1 item,"),
        (b'{"answers": ["a"]}', "prompts must be a list of 1 item, one for each text"),
        (
            b'{"prompts": ["a"], "answers": ["b"], "tools": [[], []]}',
            "tools must be a list of 1 item, one for each text",
        ),
        (b'{"prompts": ["a"], "answers": ["b"], "tools": {}}', "tools must be a list of 1 item,"),
        (
            b'{"prompts": ["a"], "answers": ["b"], "tools": [{"name": "add"}]}',
            "answers[0]: 'tools' is an object, expected a list of objects",
        ),
        (
            b'{"prompts": ["a", "b"], "answers": ["c", "d"], "tools": [null, [{"name": "add"}]]}',
            "answers[1]: has tools, but only preprocess.template chat can render such a",
        ),
        (b'{"prompts": [" "], "answers": ["a"]}', "answers[0]: 'prompt' is empty"),
        (
            b'{"prompts": ["a"], "answers": [3]}',
            "answers[0]: 'answer' is a number, expected a string",
        ),
        (
            b'{"prompts": ["a", "b"], "answers": ["c", "' + b"1" * 3000 + b'"]}',
            "answers[1]: the text has 3007 tokens, expected at most 2040",
        ),
    ],
)
def test_bad_request_is_reported(scorer: Scorer, body: bytes, sentence: str) -> None:
    async def work(client: Client) -> tuple[int, Any]:
        response = await client.post(REWARD, data=body)
        return response.status, await response.json()

    status, found = served(scorer, work)
    assert (status, found.keys()) == (400, {"error"})
    assert found["error"].startswith(sentence)
    assert "\n" not in found["error"]


def test_value_of_any_depth_is_a_bad_request(scorer: Scorer) -> None:
    """Python may reach its limit when JSON is read, in what is done with the value, or never."""
    body = '{"prompts": ["a"], "answers": ["b"], "tools": [[{"name": "c", "parameters": %s}]]}'

    async def work(client: Client) -> list[tuple[int, str]]:
        found = []
        for depth in range(960, 1000):
            response = await client.post(REWARD, data=body % ("[" * depth + "]" * depth))
            found.append((response.status, response.content_type))
        return found

    assert set(served(scorer, work)) == {(400, "application/json")}


def test_body_with_a_wrong_encoding_is_reported(held: Held) -> None:
    async def work(client: Client) -> tuple[int, Any]:
        headers = {"Content-Encoding": "gzip"}
        response = await client.post(REWARD, data=b"no gzip", headers=headers)
        return response.status, await response.json()

    status, found = served(held, work)
    assert status == 400
    assert found["error"].startswith("the body cannot be read: ")
    assert "\n" not in found["error"]


BROKEN = (
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n",
    b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\na",
    b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    b"\x16\x03\x01" + bytes(300),
)


def test_request_that_breaks_the_protocol_gets_400_and_leaves_the_log_empty(
    slow: Callable[[float], tuple[Forked, str]],
) -> None:
    process, url = slow(0)
    port = int(url.split(":")[2].split("/")[0])
    for request in BROKEN:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(request)
            assert client.makefile("rb").readline().split()[1] == b"400", request
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("stopped    after 0 requests with 0 texts\n", "")


def test_request_that_is_too_large_is_refused_during_reading(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "LARGEST", 1000)
    found = served(held, lambda client: post(client, {"query": ["1" * 1000]}))
    assert found == (413, {"error": "the body has more than 1000 bytes"})


def test_other_routes_and_methods_are_refused(held: Held) -> None:
    async def work(client: Client) -> list[int]:
        places = [client.get("/"), client.get(REWARD), client.post("/health")]
        return [(await place).status for place in places]

    assert served(held, work) == [404, 405, 405]


@pytest.mark.parametrize("error", [Fault("/secret/path: broken"), RuntimeError("/secret/path")])
def test_scoring_error_reveals_no_path_and_does_not_stop_the_server(
    held: Held, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.may.set()
    original = held.rewards

    def failing(texts: list[Ids], prompts: Sequence[Hashable]) -> list[float]:
        if [13] in texts:
            raise error
        return original(texts, prompts)

    monkeypatch.setattr(held, "rewards", failing)

    async def work(client: Client) -> tuple[int, str, int]:
        response = await client.post(REWARD, json={"query": ["13"]})
        text = await response.text()
        return response.status, text, (await post(client, {"query": ["1"]}))[0]

    status, text, after = served(held, work)
    assert (status, after) == (500, 200)
    assert json.loads(text) == {"error": "the texts cannot be scored"}


def test_tokenizer_that_fails_reveals_no_path_and_is_named_in_the_log(
    held: Held, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: Sequence[str]) -> list[Ids]:
        raise Fault("/secret/tokenizer.json: broken")

    monkeypatch.setattr(held, "encode_rendered", failing)

    async def work(client: Client) -> tuple[int, str]:
        response = await client.post(REWARD, json={"query": ["1"]})
        return response.status, await response.text()

    status, text = served(held, work)
    assert (status, json.loads(text)) == (500, {"error": "the texts cannot be encoded"})
    assert "/secret/tokenizer.json: broken\n" in capsys.readouterr().err


def test_scoring_error_does_not_fail_requests_in_the_same_batch(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = held.rewards

    def failing(texts: list[Ids], prompts: Sequence[Hashable]) -> list[float]:
        found = original(texts, prompts)
        if [13] in texts:
            raise Fault("broken")
        return found

    monkeypatch.setattr(held, "rewards", failing)
    service = serve.Service(cast(Scorer, held))

    async def work(client: Client) -> list[tuple[int, Any]]:
        first = asyncio.create_task(post(client, {"query": ["0"]}))
        await until(lambda: len(held.calls) == 1)
        others = [asyncio.create_task(post(client, {"query": [n]})) for n in ("12", "13", "14")]
        await until(lambda: service._queue.tokens == 4)
        held.may.set()
        return await asyncio.gather(first, *others)

    found = served_by(service, work)
    assert [status for status, _ in found] == [200, 200, 500, 200]
    assert [found[n][1]["rewards"] for n in (1, 3)] == [[12.0], [14.0]]
    assert len(held.calls[1]) == 3


def test_load_test_counts_wrong_rewards_and_refused_requests(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.may.set()
    questions = [
        load.Question({"query": ["1"]}, [1.0]),
        load.Question({"query": ["2"]}, [2.1]),
        load.Question({"query": []}, []),
    ]
    options = Namespace(requests=7, seconds=20)

    async def work(client: Client) -> tuple[load.Load, load.Load]:
        url = str(client.make_url(REWARD))
        seen = await load.send_all(url, options, questions, clients=1)
        monkeypatch.setattr(queue, "MOST", 0)
        return seen, await load.send_all(url, options, questions, clients=3)

    seen, away = served(held, work)
    assert (seen.statuses, seen.wrong, seen.unanswered) == ({200: 5, 400: 2}, 2, 0)
    assert len(seen.latencies) == 5
    assert (away.statuses, away.latencies) == ({503: 7}, [])


# --- metrics ---------------------------------------------------------------------------------


def test_metrics_for_prometheus_count_requests_and_the_queue(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MOST", 3)

    async def scrape(client: Client) -> dict[str, float]:
        async with client.get("/metrics") as response:
            assert response.content_type == "text/plain"
            families = text_string_to_metric_families(await response.text())
        return {
            sample.name + "".join(sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    async def work(client: Client) -> None:
        waiting = asyncio.create_task(post(client, {"query": ["1", "2", "3"]}))
        await until(lambda: len(held.calls) == 1)
        assert (await post(client, {"query": ["4"]}))[0] == 503
        assert (await scrape(client))["reward_queue_tokens"] == 3
        held.may.set()
        await waiting
        assert (await post(client, {"query": []}))[0] == 400
        found = await scrape(client)
        expected = {
            "reward_requests_total200": 1,
            "reward_requests_total400": 1,
            "reward_requests_total503": 1,
            "reward_texts_total": 3,
            "reward_tokens_total": 3,
            "reward_queue_tokens": 0,
            "reward_request_seconds_count": 1,
        }
        assert {name: found[name] for name in expected} == expected

    served(held, work)


# --- the API key -----------------------------------------------------------------------------


KEY = "sesame-1+2"


def basic(password: str) -> str:
    return aiohttp.encode_basic_auth("any", password)


@pytest.mark.parametrize("key", [None, KEY])
def test_web_pages_cannot_use_a_server_without_a_key(held: Held, key: str | None) -> None:
    held.may.set()
    headers = {"Origin": "http://example.com", "Authorization": f"Bearer {KEY}"}

    async def work(client: Client) -> tuple[int, Any]:
        response = await client.post(REWARD, json={"query": ["7"]}, headers=headers)
        return response.status, await response.json()

    found, answer = served(held, work, key)
    assert found == (200 if key else 403)
    assert ("error" in answer) == (key is None)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer open", 401),
        ("Bearer sesame-1+", 401),
        (f"Token {KEY}", 401),
        (KEY, 401),
        ("Bearer \u00e9\u4e2d", 401),
        ("Basic !", 401),
        (basic("open"), 401),
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY}", 200),
        (basic(KEY), 200),
    ],
)
def test_only_requests_with_the_key_are_answered(
    held: Held, header: str | None, status: int
) -> None:
    held.may.set()
    headers = {} if header is None else {"Authorization": header}

    async def work(client: Client) -> tuple[int, Any, int]:
        response = await client.post(REWARD, json={"query": ["7"]}, headers=headers)
        assert (await client.get("/metrics", headers=headers)).status == response.status
        challenge = response.headers.get("WWW-Authenticate")
        assert (challenge == "Bearer") == (status == 401)
        return response.status, await response.json(), (await client.get("/health")).status

    found, answer, health = served(held, work, KEY)
    assert (found, health) == (status, 200)
    assert answer == (
        {"error": "the API key is missing or wrong; send Authorization: Bearer KEY"}
        if status == 401
        else {"rewards": [7.0], "scores": [7.0], "extra_logs": {}}
    )


def test_key_may_be_sent_in_the_url(held: Held) -> None:
    """OpenRLHF and LLaMA-Factory cannot send custom headers."""
    held.may.set()

    async def work(client: Client) -> int:
        url = client.make_url(REWARD).with_user("any").with_password(KEY)
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json={"query": ["7"]}) as r,
        ):
            return r.status

    assert served(held, work, KEY) == 200


@pytest.mark.parametrize(
    ("arguments", "variable", "key"),
    [
        ([], None, None),
        (["--host", "::1"], None, None),
        (["--host", "localhost"], None, None),
        (["--host", "0.0.0.0", "--without-api-key"], None, None),
        (["--host", "0.0.0.0"], "of the environment", "of-the-environment"),
        (["--host", "0.0.0.0", "--api-key", "given"], "of the environment", "given"),
    ],
)
def test_key_comes_from_the_environment_or_the_command_line(
    arguments: list[str], variable: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["serve", *arguments])
    if variable is not None:
        monkeypatch.setenv("REWARD_API_KEY", variable.replace(" ", "-"))
    assert serve.parse().api_key == key


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host is 0.0.0.0, which other machines may reach; set an API key in",
        ),
        (
            ["--host", "::"],
            "--host is ::, which other machines may reach; set an API key",
        ),
        (["--host", ""], "--host is , which other machines may reach; set an API"),
        (["--host", "box"], "--host is box, which other machines may reach; set an API key in"),
        (
            ["--api-key", ""],
            "the API key is empty or has characters other than visible ASCII;",
        ),
        (["--api-key", "a b"], "the API key is empty or has characters other"),
    ],
)
def test_missing_or_invalid_key_is_reported(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["serve", *arguments])
    with pytest.raises(Fault, match=f"^{sentence}"):
        serve.main()


# --- the process -----------------------------------------------------------------------------


@pytest.mark.parametrize("launched", [False, True])
def test_command_serves_the_model_with_its_key_at_its_address(
    held: Held, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.may.set()
    loaded: list[Path] = []
    begun: list[Any] = []

    def load(folder: Path) -> Held:
        loaded.append(folder)
        return held

    async def begin(*arguments: Any) -> None:
        begun.extend(arguments)

    monkeypatch.setattr(serve, "Scorer", load)
    monkeypatch.setattr(serve, "serve", begin)
    monkeypatch.setattr(serve, "LAUNCHED", launched)
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    arguments = ["--model", "export", "--host", "0.0.0.0", "--port", "6000"]
    monkeypatch.setattr("sys.argv", ["serve", *arguments])
    serve.main()
    service, *place = begun
    assert (loaded, place) == ([Path("export")], ["0.0.0.0", 6000, launched])

    async def work(client: Client) -> list[int]:
        sent = [{}, {"Authorization": f"Bearer {KEY}"}]
        return [
            (await client.post(REWARD, json={"query": ["7"]}, headers=headers)).status
            for headers in sent
        ]

    assert served_by(service, work) == [401, 200]


def test_command_raises_the_limit_of_open_files(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begin(*_: Any) -> None:
        pass

    monkeypatch.setattr(serve, "Scorer", lambda _: held)
    monkeypatch.setattr(serve, "serve", begin)
    monkeypatch.setattr("sys.argv", ["serve"])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        serve.main()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def slow() -> Iterator[Callable[[float], tuple[Forked, str]]]:
    """Start a server that takes some seconds for each pack."""
    started: list[Forked] = []

    def start(seconds: float) -> tuple[Forked, str]:
        process = Forked(serve_slowly, seconds)
        started.append(process)
        words = process.stdout.readline().split()
        assert words[0] == "serving", words
        return process, words[1]

    yield start
    for process in started:
        process.end()


async def read_until(process: Forked, what: str) -> None:
    """Read the output of a process up to this line."""
    line = ""
    while line != f"{what}\n":
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), PATIENCE)
        assert line, "the process has ended"


def send_requests(url: str, count: int, process: Forked, *signals: int) -> "asyncio.Task[Any]":
    """Send requests; once all are accepted, send signals while the first is being scored."""

    async def one(session: aiohttp.ClientSession, size: int) -> Any:
        async with session.post(url, json={"query": ["a" * size]}) as response:
            return await response.json()

    async def work() -> list[Any]:
        async with aiohttp.ClientSession() as session:
            tasks = [asyncio.create_task(one(session, size + 1)) for size in range(count)]
            for _ in range(count):
                await read_until(process, "accepted")
            for number in signals:
                await asyncio.sleep(0.3)
                process.send_signal(number)
            return await asyncio.gather(*tasks)

    return asyncio.ensure_future(work())


def test_accepted_requests_are_answered_before_shutdown(
    slow: Callable[[float], tuple[Forked, str]],
) -> None:
    process, url = slow(1.5)

    async def work() -> list[Any]:
        return list(await send_requests(url, 5, process, signal.SIGTERM))

    found = asyncio.run(work())
    assert [answer["rewards"] for answer in found] == [[float(size)] for size in range(1, 6)]
    printed, errors = process.communicate()
    assert process.returncode == 0
    assert printed.splitlines()[-1] == "stopped    after 5 requests with 5 texts"
    assert errors == ""


def test_second_signal_stops_the_server_at_once(
    slow: Callable[[float], tuple[Forked, str]],
) -> None:
    process, url = slow(60)

    async def work() -> None:
        with pytest.raises(aiohttp.ClientError):
            await send_requests(url, 1, process, signal.SIGTERM, signal.SIGINT)

    begin = time.monotonic()
    asyncio.run(work())
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert time.monotonic() - begin < 20


def test_connections_beyond_the_file_descriptors_wait_and_the_log_stays_small() -> None:
    with Forked(serve_with_few_descriptors, 40) as process:
        url = process.stdout.readline().split()[1]
        place = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        clients = [socket.create_connection(place, timeout=20) for _ in range(60)]
        assert process.stderr.readline() == "socket.accept() out of system resource\n"
        last = clients.pop()
        for client in clients:
            client.close()
        last.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        with last, last.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"200"
        process.send_signal(signal.SIGTERM)
        assert len(process.communicate()[1]) < 1 << 16


def test_address_in_use_is_reported(held: Held, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Fault, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*in use"):
            asyncio.run(serve.serve(serve.Service(cast(Scorer, held)), "127.0.0.1", port))
    assert not caplog.records  # such as a traceback of what is still running at the end


@pytest.mark.parametrize(
    ("host", "reason"),
    # Since Python 3.13, asyncio gives no error number for addresses that are not this machine's.
    [("127.0.0.1", "in use"), ("192.0.2.1", "(assign|could not bind on any address)")],
)
def test_address_is_checked_before_the_model_is_loaded(
    host: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Path) -> Scorer:
        raise AssertionError("loaded")

    monkeypatch.setattr(serve, "Scorer", load)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--host", host, "--port", f"{port}", "--without-api-key"]
        monkeypatch.setattr("sys.argv", ["serve", *arguments])
        with pytest.raises(Fault, match=rf"^cannot listen on {host}:{port}: .*{reason}"):
            serve.start()


def test_invalid_host_is_reported(held: Held) -> None:
    with pytest.raises(Fault, match=r"^cannot listen on a\.\.b:0: .*; expected a free"):
        asyncio.run(serve.serve(serve.Service(cast(Scorer, held)), "a..b", 0))


def test_invalid_port_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["serve", "--port", "70000"])
    with pytest.raises(Fault, match="--port is 70000, expected a number from 0 to 65535"):
        serve.main()


# --- several processes -----------------------------------------------------------------------

COUNT = """
from reward.serving.metrics import Metrics

metrics = Metrics()
metrics.texts.inc(2)
print(metrics.exposition().decode())
"""


def test_processes_share_the_requests_to_a_port() -> None:
    port = free_port()
    [kept] = asyncio.run(serve.reserve("127.0.0.1", port, shared=True))
    with kept, Forked(serve_named, port) as first, Forked(serve_named, port) as second:
        for process in (first, second):
            assert process.stdout.readline() == f"serving    http://127.0.0.1:{port}/get_reward\n"

        async def one() -> float:
            url = f"http://127.0.0.1:{port}{REWARD}"
            content = {"query": ["a"]}
            async with (
                aiohttp.ClientSession() as session,
                session.post(url, json=content) as answer,
            ):
                return float((await answer.json())["rewards"][0])

        async def work() -> set[float]:
            return set(await asyncio.gather(*(one() for _ in range(40))))

        assert asyncio.run(work()) == {first.pid, second.pid}
        for process in (first, second):
            process.send_signal(signal.SIGTERM)
            assert "stopped" not in process.communicate()[0]
            assert process.returncode == 0


def test_processes_share_their_metrics(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for total in (2, 4):
        printed = subprocess.run(
            [sys.executable, "-c", COUNT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"reward_texts_total {total}.0\n" in printed


@pytest.fixture
def start_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[..., None]], None]:
    """Starts a server of two processes on a port, which a function begins in place of torchrun."""

    def start(port: int, distribute: Callable[..., None]) -> None:
        for name in ("PROMETHEUS_MULTIPROC_DIR", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
            monkeypatch.setenv(name, "to be restored")
        monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
        monkeypatch.setattr(serve, "distribute", distribute)
        monkeypatch.setattr("sys.argv", ["serve", "--port", f"{port}"])
        serve.start()

    return start


def test_several_processes_start_with_a_metrics_folder_and_time_to_shut_down(
    start_two: Callable[..., None],
) -> None:
    begun: dict[str, Any] = {}

    def distribute(*_: Any, **options: Any) -> None:
        folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        begun.update(options, folder=folder, there=folder.is_dir())

    port = free_port()
    start_two(port, distribute)
    assert (begun["arguments"], begun["together"]) == (["--port", f"{port}"], False)
    assert begun["there"]
    assert not begun["folder"].exists()
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "3600"


@pytest.mark.parametrize("others", [1, 2])
def test_second_server_is_refused_while_the_first_loads_its_model(
    others: int, start_two: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()

    def distribute(*_: Any, **__: Any) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        monkeypatch.setenv("PET_NPROC_PER_NODE", f"{others}")
        with pytest.raises(Fault, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*in use"):
            serve.start()

    start_two(port, distribute)
    assert asyncio.run(serve.reserve("127.0.0.1", port, shared=False)) == []


def test_port_of_a_server_that_has_just_closed_its_connections_can_be_shared() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            before.accept()[0].close()
            assert client.recv(1) == b""
    [kept] = asyncio.run(serve.reserve("127.0.0.1", port, shared=True))
    kept.close()


def test_processes_cannot_share_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setattr("sys.argv", ["serve", "--port", "0"])
    with pytest.raises(Fault, match=r"^--port is 0, but several processes must share"):
        serve.start()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serve", "--port", f"{port}"])
        with pytest.raises(Fault, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*in use"):
            serve.start()


def test_texts_beyond_the_limit_are_refused_after_tokenizing_too() -> None:
    """Requests that are read at the same time have all passed the first check."""

    async def work() -> None:
        full = queue.Queue(cast(Scorer, None), Metrics())
        full.tokens = queue.MOST
        with pytest.raises(queue.Full):
            await asyncio.wait_for(full.rewards([[1]], ["p"]), 1)

    asyncio.run(work())
