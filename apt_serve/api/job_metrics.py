"""Gauges of batches and jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from apt_serve.jobs.census import Census
from apt_serve.jobs.records import Kind


class JobGauges(Collector):
    """Reads the last census at each scrape. Every replica tells the same, of all replicas and workers."""

    def __init__(self, model_name: str, census: Callable[[], Census]) -> None:
        self._model_name = model_name
        self._census = census

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See Collector."""
        census, now = self._census(), time.time()
        jobs = GaugeMetricFamily("apt:jobs", "Batches and jobs by state.", labels=["model_name", "kind", "state"])
        for (kind, state), number in census.counts.items():
            jobs.add_metric([self._model_name, kind, state], number)
        yield jobs
        text = "How long the oldest that no worker has taken has waited."
        oldest = GaugeMetricFamily("apt:jobs_oldest_waiting_seconds", text, labels=["model_name", "kind"])
        for kind in Kind:
            since = census.waiting_since.get(kind)
            oldest.add_metric([self._model_name, kind], 0.0 if since is None else max(0.0, now - since))
        yield oldest
        text = "Webhooks that have not been delivered and will be tried again."
        webhooks = GaugeMetricFamily("apt:webhooks_waiting", text, labels=["model_name"])
        webhooks.add_metric([self._model_name], census.num_webhooks_due)
        yield webhooks
