"""Counters and gauges for Prometheus; what is counted of jobs lives in the database, so it survives."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swifti2v.serving.service import Service

STATUSES = ("queued", "in_progress", "completed", "failed", "cancelled")


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "swifti2v_http_requests",
            "Requests.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "swifti2v_http_seconds",
            "Seconds until an answer begins.",
            ("method", "route"),
            registry=self.registry,
        )

    def watch(self, service: Service) -> None:
        """Tell of the jobs and the worker of a server as well."""
        self.registry.register(_Jobs(service))

    def to_text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Jobs(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        now, ended = self._service.store.count(), self._service.store.totals()
        jobs = GaugeMetricFamily("swifti2v_jobs", "Jobs that are kept.", labels=("status",))
        for status in STATUSES:
            jobs.add_metric((status,), now.get(status, 0))
        yield jobs
        total = CounterMetricFamily("swifti2v_jobs_ended", "Jobs that ended.", labels=("status",))
        for status in STATUSES[2:]:
            total.add_metric((status,), ended.get(f"jobs_{status}", 0))
        yield total
        is_up = self._service.worker.pid is not None
        yield GaugeMetricFamily("swifti2v_worker_up", "Whether the worker runs.", value=is_up)


class CountRequests:
    """Middleware that counts requests by route, so that ids do not make series of their own."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count, and hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope.get("route") else "none"
                self._metrics.requests.labels(method, route, message["status"]).inc()
                spent = time.perf_counter() - started
                self._metrics.seconds.labels(method, route).observe(spent)
            await send(message)

        await self._app(scope, receive, send_counted)
