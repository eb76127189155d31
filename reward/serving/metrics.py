"""What Prometheus reads of the server: how much is asked, how much waits, how long it takes."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

# The folder in which several processes count together, and whether this one does: the library
# looks for it at its import.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SHARED = FOLDER in os.environ
# Seconds; OpenRLHF waits for 180.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 180)


class Metrics:
    """The metrics of one server, in all its processes."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "reward_requests",
            "Requests for rewards by the status of their answer; 503 are those sent away.",
            ["status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "reward_request_seconds",
            "Seconds from the head of a request to its rewards.",
            buckets=BOUNDS,
            registry=self._registry,
        )
        self.texts = Counter("reward_texts", "Texts that were scored.", registry=self._registry)
        self.tokens = Counter("reward_tokens", "Their tokens.", registry=self._registry)
        self.waiting = Gauge(
            "reward_queue_tokens",
            "Tokens that wait for their rewards.",
            multiprocess_mode="livesum",
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        if not SHARED:
            return generate_latest(self._registry)
        every = CollectorRegistry()
        MultiProcessCollector(every)
        return generate_latest(every)
