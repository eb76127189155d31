"""The server's Prometheus metrics: requests, waiting tokens and response times."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

# The environment variable for the folder in which several processes count together, and whether it
# is set. The library reads it when it is imported.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SHARED = FOLDER in os.environ
# In seconds. OpenRLHF's timeout is 180.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 180)


class Metrics:
    """The metrics of one server, over all its processes."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "reward_requests",
            "Requests for rewards by HTTP status; 503 means that the server was too busy.",
            ["status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "reward_request_seconds",
            "Seconds from the headers of a request to its rewards.",
            buckets=BOUNDS,
            registry=self._registry,
        )
        self.texts = Counter("reward_texts", "Texts scored.", registry=self._registry)
        self.tokens = Counter("reward_tokens", "Tokens scored.", registry=self._registry)
        self.waiting = Gauge(
            "reward_queue_tokens",
            "Tokens waiting for their rewards.",
            multiprocess_mode="livesum",
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        if not SHARED:
            return generate_latest(self._registry)
        every = CollectorRegistry()
        MultiProcessCollector(every)
        return generate_latest(every)
