"""Load-test the server on this machine: requests per second, latency, behaviour at overload.

    python -m benchmarks.serve

Starts reward.serving.serve and sends it pairs from a preference file. The number of concurrent
clients grows, and each client sends its next request as soon as it has an answer. In the last load
every request has its own client and connection, with one text and its prompt, as from OpenRLHF.
Every reward is compared with the reward from the model in this process. Prints a table and writes
it to benchmarks/results/serve.md.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from reward.data.reading import files, read
from reward.data.records import Candidates, Messages, candidates
from reward.process import Fault, command_line, run
from reward.serving.scorer import EXPORT, Scorer
from reward.serving.serve import raise_descriptors

RESULT = Path("benchmarks/results/serve.md")
DATA = Path("data/raw/pairs.json")
OK, BUSY = 200, 503
CLOSE = 1e-5


@dataclass(frozen=True)
class Question:
    """The body of a request, and the expected rewards."""

    body: dict[str, Any]
    rewards: list[float]


@dataclass
class Load:
    """What clients saw: statuses, seconds until the rewards arrived, and wrong rewards."""

    clients: int
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    unanswered: int = 0
    wrong: int = 0
    seconds: float = 0.0


@dataclass
class Measured:
    """What clients saw of a server, its peak memory, and how it ended.

    Memory is in bytes, before and after the last load.
    """

    loads: list[Load]
    before: int
    after: int
    status: int


def main() -> None:
    options = parse()
    raise_descriptors()
    questions, single = prepare(options)
    measured = asyncio.run(measure(options, questions, single))
    report = as_markdown(options, questions, measured)
    print(report)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(report, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = command_line("benchmarks.serve", __doc__)
    parser.add_argument("--model", type=Path, default=EXPORT, help="folder of an exported model")
    parser.add_argument("--data", type=Path, default=DATA, help="preference pairs to send")
    parser.add_argument("--pairs", type=int, default=200, help="number of different pairs")
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="numbers of concurrent clients to test",
    )
    parser.add_argument(
        "--requests", type=int, default=2000, help="maximum number of requests per load"
    )
    parser.add_argument("--seconds", type=float, default=20, help="maximum duration of a load")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the pairs")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[list[Question], list[Question]]:
    """Requests with pairs and with single texts, and the rewards that the model gives here."""
    records = [record for path in files(options.data) for _, record in read(path)]
    drawn = random.Random(options.seed).sample(records, min(options.pairs, len(records)))
    scorer = Scorer(options.model)
    asked = [candidates(record) for record in drawn]
    questions = [question(scorer, each) for each in asked]
    single = [
        Question({"query": [text], "prompts": [as_json(each.prompt)], "labels": [None]}, [reward])
        for each, both in zip(asked, questions, strict=True)
        for text, reward in zip(scorer.render(each), both.rewards, strict=True)
    ]
    return questions, single


def question(scorer: Scorer, asked: Candidates) -> Question:
    prompts = [as_json(asked.prompt)] * len(asked.answers)
    answers = [as_json(answer) for answer in asked.answers]
    rewards = scorer.rewards(*scorer.encode_pairs(prompts, answers))
    return Question({"prompts": prompts, "answers": answers}, rewards)


def as_json(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


# --- load ------------------------------------------------------------------------------------


async def measure(
    options: argparse.Namespace, questions: list[Question], single: list[Question]
) -> Measured:
    """Run every load; return what the clients saw and how the server ended."""
    async with server(options.model) as (url, process):
        await send_all(url, options, questions[:8], clients=1)
        loads = [await send_all(url, options, questions, clients) for clients in options.clients]
        before = peak(process.pid)
        loads.append(await send_all(url, options, single, options.requests))
        after = peak(process.pid)
    return Measured(loads, before, after, process.returncode)


def peak(process: int) -> int:
    """The peak memory of a process so far, in bytes."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


@asynccontextmanager
async def server(model: Path) -> AsyncIterator[tuple[str, "subprocess.Popen[str]"]]:
    """The server in its own process, on a free port; ended with SIGTERM."""
    command = [sys.executable, "-m", "reward.serving.serve", "--model", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            words = process.stdout.readline().split()
            if not words:
                raise Fault("reward.serving.serve did not start; its message is above")
            yield words[1], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


async def send_all(
    url: str, options: argparse.Namespace, questions: list[Question], clients: int
) -> Load:
    """Run this many concurrent clients until all requests are sent or the time is up."""
    load, rest = Load(clients), islice(cycle(questions), options.requests)
    begin = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        running = [
            client(session, url, rest, load, begin + options.seconds) for _ in range(clients)
        ]
        await asyncio.gather(*running)
    load.seconds = time.perf_counter() - begin
    return load


async def client(
    session: aiohttp.ClientSession, url: str, rest: Iterator[Question], load: Load, end: float
) -> None:
    for asked in rest:
        begin = time.perf_counter()
        if begin > end:
            return
        try:
            async with session.post(url, json=asked.body) as response:
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            load.unanswered += 1
            continue
        load.statuses[response.status] += 1
        if response.status == OK:
            load.latencies.append(time.perf_counter() - begin)
            load.wrong += not np.allclose(answer["rewards"], asked.rewards, rtol=0, atol=CLOSE)
        else:
            await asyncio.sleep(0.1)


# --- results ---------------------------------------------------------------------------------


def as_markdown(options: argparse.Namespace, questions: list[Question], measured: Measured) -> str:
    heads = [
        *("clients", "requests/s", "latency ms, median", "95%", "99%", "answered", "turned away"),
        *("no or unexpected answer", "wrong rewards"),
    ]
    lines = [heads, ["---:"] * len(heads), *(cells(load) for load in measured.loads)]
    texts = sum(len(asked.rewards) for asked in questions)
    before, after = (f"{size / 1e9:.2f}" for size in (measured.before, measured.after))
    paragraphs = [
        "# The server under load",
        "Written by `python -m benchmarks.serve`, which says what is measured and how.",
        f"{os.cpu_count()} processors for server and clients; model: {options.model.name}; "
        f"{len(questions)} requests from {options.data.name} with {texts} texts, sent repeatedly; "
        f"at most {options.requests} requests and {options.seconds:g} s per row; aiohttp "
        f"{version('aiohttp')}, torch {version('torch')}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"In the last row, {options.requests} clients each send one text on their own connection, "
        f"all at once. The server's peak memory was {before} GB before this load and {after} GB "
        f"after it. Requests are turned away with status {BUSY} if the queue is full. Rewards are "
        f"wrong if they differ by more than {CLOSE:g} from those of the model in another process. "
        f"At the end the server got SIGTERM and exited with status {measured.status}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def cells(load: Load) -> list[str]:
    answered, busy = load.statuses[OK], load.statuses[BUSY]
    times = np.quantile(load.latencies or [np.nan], [0.5, 0.95, 0.99]) * 1e3
    return [
        f"{load.clients}",
        f"{answered / load.seconds:.1f}",
        *(f"{milliseconds:.0f}" for milliseconds in times),
        f"{answered}",
        f"{busy}",
        f"{load.unanswered + load.statuses.total() - answered - busy}",
        f"{load.wrong}",
    ]


if __name__ == "__main__":
    run(main)
