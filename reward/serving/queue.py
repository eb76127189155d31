"""The queue of requests: limited in tokens, and scored in packs, first come, first served."""

import asyncio
import math
import time
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import islice

from reward.process import Fault
from reward.serving.metrics import Metrics
from reward.serving.scorer import TOKENS_PER_PACK, Ids, Scorer

# The most tokens that may wait before a request is refused: about 2,000 texts of 2,048 tokens.
MOST = 1 << 22
# The decay, per pack, of the weight of earlier packs in the measured rate.
FADING = 0.9


class Full(Exception):
    """The queue is full. Says why, and after how many seconds to try again."""

    def __init__(self, sentence: str, seconds: int) -> None:
        super().__init__(f"{sentence}; try again in {seconds} s")
        self.seconds = seconds


class Unscored(Exception):
    """The model cannot score the texts."""


class Job:
    """The texts of a request and the future of their rewards."""

    def __init__(self, texts: list[Ids], prompts: Sequence[Hashable]) -> None:
        self.texts, self.prompts = texts, prompts
        self.tokens = sum(map(len, texts))
        self.rewards: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

    def succeed(self, rewards: list[float]) -> None:
        """Deliver the rewards, unless the request was cancelled."""
        if not self.rewards.done():
            self.rewards.set_result(rewards)

    def fail(self) -> None:
        """Deliver an error without details of this machine, unless the request was cancelled."""
        if not self.rewards.done():
            self.rewards.set_exception(Unscored("the texts cannot be scored"))


class Queue:
    """The jobs, and the single thread that scores them."""

    def __init__(self, scorer: Scorer, metrics: Metrics) -> None:
        # The tokens of all jobs without rewards.
        self.tokens = 0
        self._scorer = scorer
        self._metrics = metrics
        self._waiting: OrderedDict[Job, None] = OrderedDict()
        self._arrived = asyncio.Event()
        # The tokens and the seconds of the last packs, with decaying weights.
        self._scored, self._took = 0.0, 0.0

    def require_room(self) -> None:
        """Raises Full if no more tokens may wait."""
        if self.tokens >= MOST:
            raise Full(f"{self.tokens} tokens are waiting, the limit is {MOST}", self.seconds())

    def seconds(self) -> int:
        """The seconds until everything that waits is scored, at the rate of the last packs.

        It is at least 1, and 1 before the first pack.
        """
        pace = self._took / self._scored if self._scored else 0.0
        return max(1, math.ceil(self.tokens * pace))

    async def rewards(self, texts: list[Ids], prompts: Sequence[Hashable]) -> list[float]:
        """The reward of each text; the common prefix of texts with equal prompts is computed once.

        Shapes [texts]. Raises Full and Unscored. If the caller is cancelled, its job is removed.
        """
        self.require_room()
        job = Job(texts, prompts)
        self._count(job.tokens)
        self._waiting[job] = None
        self._arrived.set()
        try:
            return await job.rewards
        finally:
            self._count(-job.tokens)
            self._waiting.pop(job, None)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self._metrics.waiting.inc(tokens)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Score the waiting jobs while the context lasts."""
        pool = ThreadPoolExecutor(max_workers=1)
        task = asyncio.create_task(self._work(pool))
        try:
            yield
        finally:
            task.cancel()
            # In another thread, because this one must react to a second signal.
            await asyncio.to_thread(pool.shutdown)

    async def _work(self, pool: ThreadPoolExecutor) -> None:
        """Score the jobs that arrived during the last pack, as many at a time as fit in a pack."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while jobs := self._next():
                begin = time.monotonic()
                await self._score(pool, jobs)
                tokens = sum(job.tokens for job in jobs)
                self._scored = FADING * self._scored + tokens
                self._took = FADING * self._took + time.monotonic() - begin

    def _next(self) -> list[Job]:
        """Take the jobs that have waited longest, as many as fit in a pack and at least one."""
        jobs: list[Job] = []
        room = TOKENS_PER_PACK
        while self._waiting:
            job = next(iter(self._waiting))
            room -= job.tokens
            if jobs and room < 0:
                break
            jobs.append(job)
            self._waiting.popitem(last=False)
        return jobs

    async def _score(self, pool: ThreadPoolExecutor, jobs: list[Job]) -> None:
        """Score jobs together or, if that fails, one by one, so that a bad one fails alone."""
        texts = [ids for job in jobs for ids in job.texts]
        prompts = [prompt for job in jobs for prompt in job.prompts]
        loop = asyncio.get_running_loop()
        try:
            rewards = iter(await loop.run_in_executor(pool, self._scorer.rewards, texts, prompts))
        except Exception as error:  # from the model, or a bug
            if len(jobs) > 1:
                for job in jobs:
                    await self._score(pool, [job])
                return
            traceback.print_exception(error, limit=0 if isinstance(error, Fault) else None)
            jobs[0].fail()
            return
        self._metrics.texts.inc(len(texts))
        self._metrics.tokens.inc(sum(map(len, texts)))
        for job in jobs:
            job.succeed(list(islice(rewards, len(job.texts))))
