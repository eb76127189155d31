"""Separate processes that start at once, because the libraries are already imported.

They are forked from a server process that has imported the libraries, and otherwise behave like
subprocess.Popen: output through pipes, signals, an exit status.
"""

import asyncio
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from asyncio import constants
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, chdir, suppress
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from typing import Any, Self, cast

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError

from reward.model import group, launching, scoring, trainer
from reward.model.scoring import rewards
from reward.process import run
from reward.serving import score, serve
from reward.serving.scorer import Ids, Scorer
from stages import evaluate, train
from tests.support import ROOT

FROM_SERVER = get_context("forkserver")
# Seconds until a process that does not exit is killed.
PATIENCE = 60


class Forked:
    """A process that runs a function of this module."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        FROM_SERVER.set_forkserver_preload([__name__])
        with chdir(ROOT):  # the server imports from here
            forkserver.ensure_running()
        ends = [FROM_SERVER.Pipe(duplex=False) for _ in range(2)]
        writers = [writer for _, writer in ends]
        self._process = FROM_SERVER.Process(target=run_redirected, args=(writers, work, arguments))
        self._process.start()
        for writer in writers:
            writer.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in ends)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def pid(self) -> int:
        return cast(int, self._process.pid)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        """Wait for the process to exit; return the rest of its stdout and stderr."""
        patience = threading.Timer(PATIENCE, self._process.kill)
        patience.start()
        found = self.stdout.read(), self.stderr.read()
        self._process.join()
        patience.cancel()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()


def run_redirected(
    writers: list[Connection], work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    run(lambda: work(*arguments))


def score_files(batch: int, *arguments: str) -> None:
    """Run the score command, a few records at a time."""
    keep_threads()
    score.BATCH_CHARACTERS = batch
    sys.argv = ["score", *arguments]
    score.main()


def train_until(step: int) -> None:
    """Run the train stage, which kills itself before this step if there is such a step."""
    original = trainer.RewardTrainer.training_step

    def killing(self: trainer.RewardTrainer, *arguments: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    trainer.RewardTrainer.training_step = killing  # type: ignore[assignment]
    warnings.simplefilter("error")
    keep_threads()
    train.main()


def train_within(room: int, killed: tuple[int, int] | None = None) -> None:
    """Run the train stage; packs of more than `room` tokens run out of memory.

    `killed` is the rank of a process that kills itself, and the step before which it does so.
    """

    def limited(model: Any, batch: Any) -> torch.Tensor:
        found = rewards(model, batch)
        if found.requires_grad and batch.input_ids.shape[1] > room:
            raise torch.OutOfMemoryError
        return found

    vars(trainer)["rewards"] = limited
    train_until(killed[1] if killed and killed[0] == group.rank() else -1)


def evaluate_within(room: int, elsewhere: str) -> None:
    """Run the evaluate stage. Processes other than the first work in the folder `elsewhere`.

    In the first process, packs of more than `room` tokens run out of memory.
    """

    def limited(model: Any, batch: Any) -> torch.Tensor:
        if group.leads() and batch.input_ids.shape[1] > room:
            raise torch.OutOfMemoryError
        return rewards(model, batch)

    if not group.leads():
        os.chdir(elsewhere)
    vars(scoring)["rewards"] = limited
    keep_threads()
    evaluate.main()


def run_in_group(
    size: int, work: Callable[..., None], *arguments: Any
) -> list[tuple[int | None, str, str]]:
    """Run a function in `size` processes; return the status, stdout and stderr of each."""
    port = free_port()
    with ExitStack() as running:
        ranks = [
            running.enter_context(Forked(join, rank, size, port, work, *arguments))
            for rank in range(size)
        ]
        printed = [each.communicate() for each in ranks]
        return [(each.returncode, *texts) for each, texts in zip(ranks, printed, strict=True)]


def join(rank: int, size: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run a function as one of several processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with group.joined():
        work(*arguments)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def require_done(found: Sequence[tuple[int | None, str, str]]) -> None:
    """Require that all processes of a group succeeded, and that only the first one printed."""
    assert [(status, errors) for status, _, errors in found] == [(0, "")] * len(found)
    assert [bool(output) for _, output, _ in found] == [True] + [False] * (len(found) - 1)


def launch_train(environment: dict[str, str]) -> None:
    """Run the train stage as its command does, in separate processes."""
    os.environ |= {"PYTHONPATH": str(ROOT)} | environment
    launching.distribute(train.main, "stages.train", train.useful, machines=True)


def join_lost_host(port: int) -> None:
    """Join a rendezvous whose host is gone when this process leaves."""
    head = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    other = TCPStore("127.0.0.1", port, wait_for_workers=False)
    del head
    with suppress(DistNetworkError):
        other.compare_set("state", "open", "closed")


def keep_threads() -> None:
    """Keep the current thread count, which is that of the tests."""
    torch.set_num_threads = lambda nthreads: None


def say(what: str) -> None:
    """Print a line in one write: print writes in pieces, which several threads would interleave."""
    os.write(1, f"{what}\n".encode())


class Slow:
    """A scorer that prints what it does and takes some seconds for each pack."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode_rendered(self, texts: Sequence[str]) -> list[Ids]:
        say("accepted")
        return [[len(text)] for text in texts]

    def rewards(self, texts: Sequence[Ids], prompts: Sequence[Hashable]) -> list[float]:
        say("scoring")
        time.sleep(self.seconds)
        return [float(ids[0]) for ids in texts]


def serve_slowly(seconds: float) -> None:
    service = serve.Service(cast(Scorer, Slow(seconds)))
    asyncio.run(serve.serve(service, "127.0.0.1", 0))


def serve_with_few_descriptors(most: int) -> None:
    """Serve with few file descriptors; without any, asyncio waits 0.3 s before it accepts again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    vars(constants)["ACCEPT_RETRY_DELAY"] = 0.3
    serve_slowly(0)


class Named(Slow):
    """A scorer whose reward for each text is its process id."""

    def rewards(self, texts: Sequence[Ids], prompts: Sequence[Hashable]) -> list[float]:
        return [float(os.getpid())] * len(texts)


def serve_named(port: int) -> None:
    service = serve.Service(cast(Scorer, Named(0)))
    asyncio.run(serve.serve(service, "127.0.0.1", port, shared=True))
