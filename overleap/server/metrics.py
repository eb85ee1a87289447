"""What Prometheus reads at /metrics: a registry of its own, filled by what the server reports.

No key, user or text is a label: only tiers, dialects and reasons, of which there are few. Not logs
(logs.py), not money (reports.py). Read next: app.py, which calls it.
"""

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as generate
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overleap.engine.request import Stats
from overleap.server.usage import Usage

# A short chat is there in milliseconds, a million tokens in minutes.
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LENGTHS = tuple(4**power for power in range(3, 11))  # 64 to 1,048,576


class Metrics:
    """Counters of one server process. Every method may be called from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._engine = _EngineCollector()
        registry.register(self._engine)
        self._requests = Counter(
            "overleap_requests",
            "Requests that were let in, by how they ended.",
            ("dialect", "tier", "reason"),
            registry=registry,
        )
        self._rejected = Counter(
            "overleap_rejections",
            "Requests that were not let in.",
            ("status", "reason"),
            registry=registry,
        )
        self._tokens = Counter(
            "overleap_tokens",
            "Tokens of requests that ended: cache_hit, cache_miss and output.",
            ("kind", "tier"),
            registry=registry,
        )
        self._machine = Counter(
            "overleap_machine_seconds",
            "Time of the machine that requests took.",
            ("tier",),
            registry=registry,
        )
        self._open = Gauge(
            "overleap_requests_open",
            "Requests that were let in and have not ended.",
            ("tier",),
            registry=registry,
        )
        self._draining = Gauge(
            "overleap_draining", "1 while the server takes no new requests.", registry=registry
        )
        self._queue = self._seconds("queue", "From being let in to the first step.", _WAITS)
        self._first = self._seconds(
            "time_to_first_token", "From arrival to the first token.", _WAITS
        )
        self._between = self._seconds("inter_token", "Between tokens of an answer.", _STEPS)
        self._whole = self._seconds("request", "From arrival to the end.", _WAITS)
        self._prompt = Histogram(
            "overleap_prompt_tokens",
            "Prompts by length.",
            ("tier",),
            registry=registry,
            buckets=_LENGTHS,
        )

    def _seconds(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        full = f"overleap_{name}_seconds"
        return Histogram(full, text, ("tier",), registry=self._registry, buckets=tuple(buckets))

    # What happened to a request, in the order in which it happens.

    def rejected(self, status: int, reason: str) -> None:
        """Not let in. reason: a word for the kind of refusal, like auth, rate, quota, overload."""
        self._rejected.labels(str(status), reason).inc()

    def admitted(self, tier: str, prompt_tokens: int) -> None:
        """Let in; `finished` is called for it exactly once."""
        self._open.labels(tier).inc()
        self._prompt.labels(tier).observe(prompt_tokens)

    def started(self, tier: str, queue_s: float) -> None:
        """Its first step began, after so long in the queue."""
        self._queue.labels(tier).observe(queue_s)

    def first_token(self, tier: str, seconds: float) -> None:
        """Its first token came, so long after the request arrived."""
        self._first.labels(tier).observe(seconds)

    def next_token(self, tier: str, seconds: float) -> None:
        """A later token came, so long after the one before it."""
        self._between.labels(tier).observe(seconds)

    def finished(self, dialect: str, tier: str, reason: str, usage: Usage, seconds: float) -> None:
        """It ended: stop, length, abort or error; `usage` is what was settled."""
        self._open.labels(tier).dec()
        self._requests.labels(dialect, tier, reason).inc()
        self._tokens.labels("cache_hit", tier).inc(usage.cache_hit_tokens)
        self._tokens.labels("cache_miss", tier).inc(usage.cache_miss_tokens)
        self._tokens.labels("output", tier).inc(usage.output_tokens)
        self._machine.labels(tier).inc(usage.machine_s)
        self._whole.labels(tier).observe(seconds)

    # The server and its engine as a whole.

    def draining(self, now: bool) -> None:
        """Whether new requests are refused because the server is about to end."""
        self._draining.set(int(now))

    def engine(self, stats: Stats) -> None:
        """The engine's latest account of itself."""
        self._engine.stats = stats

    def render(self) -> bytes:
        """The page, of `content_type`."""
        return generate(self._registry)


class _EngineCollector(Collector):
    """The engine's own counters, read when they are asked for."""

    stats: Stats | None = None

    def collect(self) -> Iterable[Metric]:
        stats = self.stats
        if stats is None:
            return
        for name, text, value in (
            ("queue_length", "Requests that wait for their first step.", stats.waiting),
            ("running", "Requests being read or answered.", stats.running),
            ("kv_pages", "Pages of the cache, each of 128 tokens.", stats.pages),
            ("kv_pages_free", "Those that nothing holds.", stats.pages_free),
            ("cache_bytes", "Bytes of cache in use.", stats.cache_bytes),
            ("cache_allocated_bytes", "Bytes of cache, in use or not.", stats.allocated_bytes),
        ):
            yield GaugeMetricFamily(f"overleap_{name}", text, value)
        yield from _counters(stats)
        if stats.disk is not None:
            yield GaugeMetricFamily(
                "overleap_disk_bytes", "Bytes of prefixes on disk.", stats.disk.bytes
            )


def _counters(stats: Stats) -> Iterable[Metric]:
    disk = stats.disk.hit_tokens if stats.disk is not None else 0
    hits = CounterMetricFamily(
        "overleap_prefix_hit_tokens",
        "Prompt tokens that were not computed, by where they were kept.",
        labels=("storage",),
    )
    # What comes from disk passes through memory and is counted by both.
    hits.add_metric(("memory",), max(0, stats.hit_tokens - disk))
    hits.add_metric(("disk",), disk)
    yield hits
    seconds = CounterMetricFamily(
        "overleap_step_seconds", "Time of steps, by what their tokens were.", labels=("kind",)
    )
    seconds.add_metric(("prefill",), stats.prefill_s)
    seconds.add_metric(("decode",), stats.decode_s)
    yield seconds
    for name, text, value in (
        ("engine_finished", "Requests the engine is done with.", stats.finished),
        ("read_tokens", "Prompt tokens computed.", stats.read_tokens),
        ("generated_tokens", "Tokens chosen.", stats.generated_tokens),
        ("draft_checked", "Proposed tokens that were checked.", sum(stats.speculation.checked)),
        ("draft_accepted", "Those that were right.", sum(stats.speculation.accepted)),
    ):
        yield CounterMetricFamily(f"overleap_{name}", text, value)
