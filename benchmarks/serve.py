"""Load the server on this machine: requests per second, latency, and what happens at overload.

python -m benchmarks.serve

Starts reward.serving.serve, sends it pairs of a preference file from more and more clients at
once, each of which asks again as soon as it is answered, and last from twice as many as it accepts.
Every reward is compared with the one that the model gives in this process. Prints a table and
writes it to benchmarks/results/serve.md.
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
from reward.process import Fault, run
from reward.serving.scorer import Scorer
from reward.serving.serve import EXPORT, MOST

RESULT = Path("benchmarks/results/serve.md")
DATA = Path("data/raw/pairs.json")
OK, BUSY = 200, 503
CLOSE = 1e-5


@dataclass(frozen=True)
class Question:
    """The body of a request, and the rewards that are right."""

    body: dict[str, Any]
    rewards: list[float]


@dataclass
class Load:
    """What some clients saw: statuses, seconds to an answer with rewards, rewards that differ."""

    clients: int
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    unanswered: int = 0
    wrong: int = 0
    seconds: float = 0.0


def main() -> None:
    options = parse()
    questions = prepare(options)
    loads, status = asyncio.run(measure(options, questions))
    report = as_markdown(options, questions, loads, status)
    print(report)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(report, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EXPORT, help="folder of an exported model")
    parser.add_argument("--data", type=Path, default=DATA, help="preference pairs to ask for")
    parser.add_argument("--pairs", type=int, default=200, help="different pairs")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="at once")
    parser.add_argument("--requests", type=int, default=2000, help="at most, for each number")
    parser.add_argument("--seconds", type=float, default=20, help="at most, for each number")
    parser.add_argument("--seed", type=int, default=0, help="of drawing the pairs")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> list[Question]:
    """Pairs drawn from the data, with the rewards that the model gives them here."""
    records = [record for path in files(options.data) for _, record in read(path)]
    drawn = random.Random(options.seed).sample(records, min(options.pairs, len(records)))
    scorer = Scorer(options.model)
    return [question(scorer, candidates(record)) for record in drawn]


def question(scorer: Scorer, asked: Candidates) -> Question:
    prompts = [as_json(asked.prompt)] * len(asked.answers)
    answers = [as_json(answer) for answer in asked.answers]
    rewards = scorer.rewards(*scorer.encode_pairs(prompts, answers))
    return Question({"prompts": prompts, "answers": answers}, rewards)


def as_json(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


# --- load ------------------------------------------------------------------------------------


async def measure(options: argparse.Namespace, questions: list[Question]) -> tuple[list[Load], int]:
    """What each number of clients saw, and the status with which the server ended."""
    async with server(options.model) as (url, process):
        await put(url, options, questions[:8], clients=1)
        loads = [
            await put(url, options, questions, clients) for clients in (*options.clients, 2 * MOST)
        ]
    return loads, process.returncode


@asynccontextmanager
async def server(model: Path) -> AsyncIterator[tuple[str, "subprocess.Popen[str]"]]:
    """The server as a process of its own, on a free port; ended as a person would end it."""
    command = [sys.executable, "-m", "reward.serving.serve", "--model", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            said = process.stdout.readline().split()
            if not said:
                raise Fault(
                    "reward.serving.serve did not start, wanted it to; its sentence is above"
                )
            yield said[1], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


async def put(
    url: str, options: argparse.Namespace, questions: list[Question], clients: int
) -> Load:
    """So many clients at once, until all requests are sent or the time is over."""
    load, rest = Load(clients), islice(cycle(questions), options.requests)
    begin = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        clients_at_work = [
            client(session, url, rest, load, begin + options.seconds) for _ in range(clients)
        ]
        await asyncio.gather(*clients_at_work)
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


def as_markdown(
    options: argparse.Namespace, questions: list[Question], loads: list[Load], status: int
) -> str:
    heads = [
        *("clients", "requests/s", "latency ms, median", "95%", "99%", "answered", "sent away"),
        *("no or another answer", "wrong rewards"),
    ]
    lines = [heads, ["---:"] * len(heads), *(cells(load) for load in loads)]
    texts = sum(len(asked.rewards) for asked in questions)
    paragraphs = [
        "# The server under load",
        "Written by `python -m benchmarks.serve`, which says what is measured and how.",
        f"{os.cpu_count()} processors, for server and clients; {options.model.name} and "
        f"{len(questions)} requests of {options.data.name} with {texts} texts, over and over; at "
        f"most {options.requests} requests and {options.seconds:g} s for each line; aiohttp "
        f"{version('aiohttp')}, torch {version('torch')}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"The server accepts {MOST} requests at once and sends others away with status {BUSY}; a "
        "client that is sent away waits a tenth of a second. Rewards are wrong that are further "
        f"than {CLOSE:g} from those of the model in a process of its own. At the end the server "
        f"got SIGTERM and ended with status {status}.",
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
