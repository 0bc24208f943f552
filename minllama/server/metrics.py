"""What `/metrics` tells Prometheus; the names are part of the interface, and pinned by a test."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and times of one server; safe to use from several threads.

    Attributes:
        registry: of this server alone.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"minllama_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"minllama_{name}", meaning, registry=registry)

        def seconds(name: str, meaning: str, *labels: str) -> Histogram:
            name = f"minllama_{name}_seconds"
            return Histogram(name, meaning, labels, buckets=SECONDS, registry=registry)

        self.requests = counter("requests", "Requests that were answered.", "route", "status")
        self.request_seconds = seconds(
            "request", "Time from a request's headers to the end of its answer.", "route"
        )
        self.first_token_seconds = seconds(
            "time_to_first_token", "Time from a request's admission to its first token, or result."
        )
        self.between_tokens_seconds = seconds(
            "time_between_tokens", "Time between two tokens of a request."
        )
        self.in_flight = gauge("requests_in_flight", "Requests without a complete answer.")
        self.queue = gauge("queue_length", "Requests that wait for their first token.")
        self.running = gauge("sequences_running", "Sequences that get tokens.")
        self.batch = Histogram(
            *("minllama_batch_size", "Sequences that a step continued."),
            buckets=BATCHES,
            registry=registry,
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, cached ones included.")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that a cache had.")
        self.cache_hits = counter("prefix_cache_hits", "Prompts that shared a cached prefix.")
        self.generated_tokens = counter("generated_tokens", "Tokens that were generated.")
        self.evaluated_texts = counter(
            "evaluated_texts", "Texts that were classified, scored or embedded."
        )
        self.evaluation_batch = Histogram(
            *("minllama_evaluation_batch_size", "Texts that a step evaluated together."),
            buckets=BATCHES,
            registry=registry,
        )
        self.cache_bytes = gauge("cache_bytes", "Keys and values of running sequences.")
        self.prefix_cache_bytes = gauge("prefix_cache_bytes", "Keys and values of prefixes.")
        self.cancellations = counter(
            "cancellations", "Requests that ended before their answer was complete.", "reason"
        )
        self.rejections = counter(
            "rejections", "Requests that were refused: by queue, rate or shutdown.", "reason"
        )

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
