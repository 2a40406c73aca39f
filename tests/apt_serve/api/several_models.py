"""A server of three tiny models with different weights, all on real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.served_models import ServedModels
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.engine.client import EngineClient
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.factory import make_engine
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from apt_serve.models.config import ModelsConfig
from apt_serve.models.engine_loader import EngineLoader
from apt_serve.records.config import RecordsConfig
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.published import base_folder, reweigh

TOKEN = "correct-horse-battery-staple"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
PROMPT = "The quick brown fox"
NAMES = ("a", "b", "c")
"""The first is the default model."""


@dataclass(frozen=True)
class TinyModels:
    """Checkpoints on disk, and how each continues the prompt."""

    configs: dict[str, EngineConfig]
    answers: dict[str, str]

    @classmethod
    def make(cls, folder: Path) -> TinyModels:
        configs, answers = {}, {}
        for seed, name in enumerate(NAMES):
            source = str(base_folder(folder / name))
            reweigh(folder / name, seed)
            configs[name] = EngineConfig(source, dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)
            llm = LLM(source, dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)
            answers[name] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0].text
        assert len(set(answers.values())) == len(NAMES)
        return cls(configs, answers)

    def server_config(self, folder: Path, **settings: Any) -> ServerConfig:
        """Settings of a server that keeps its records in a folder."""
        return ServerConfig(
            model=replace(self.configs["a"], name="a"),
            models=ModelsConfig(**({"others": {name: self.configs[name] for name in NAMES[1:]}} | settings)),
            admin=AdminConfig(token=TOKEN),
            records=RecordsConfig(folder=str(folder)),
        )


class SlowLoader(EngineLoader):
    """Loads take a while, so that a test can act meanwhile."""

    load_s = 1.0

    async def load(self, name: str) -> EngineClient:
        await asyncio.sleep(self.load_s)
        return await super().load(name)


@dataclass(frozen=True)
class Served:
    """A running server of several models."""

    http: httpx.Client
    app: FastAPI
    config: ServerConfig

    def complete(self, model: str | None, **fields: Any) -> httpx.Response:
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
        return self.http.post("/v1/completions", json=body if model is None else body | {"model": model})

    def text(self, model: str | None, **fields: Any) -> str:
        response = self.complete(model, **fields)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def states(self) -> dict[str, dict[str, Any]]:
        """What /admin/models says of each model."""
        [replica] = self.http.get("/admin/models", headers=ADMIN).raise_for_status().json()["replicas"]
        return {model["name"]: model for model in replica["models"]}

    def loaded(self) -> set[str]:
        return {name for name, model in self.states().items() if model["state"] == "loaded"}

    def wait_idle(self) -> None:
        """Until no request holds or waits for any model; one that is lost keeps this from returning."""
        wait_until(lambda: all(s["requests"] == s["waiting"] == 0 for s in self.states().values()), timeout_s=20)

    def metric(self, name: str, **labels: str) -> float | None:
        value: float | None = self.app.state.api.metrics.registry.get_sample_value(f"apt:{name}", labels)
        return value


@contextmanager
def serve(config: ServerConfig, *, is_slow: bool = False) -> Iterator[Served]:
    """A server until the block ends."""
    metrics = PrometheusMetrics(config.model.served_name)
    engine = make_engine(config.model, metrics)
    models = None
    if is_slow:
        configs = {name: config.models.engine_config(name, config.model) for name in config.models.others}
        models = ServedModels(config, engine, metrics, SlowLoader(configs, metrics.sink))
    app = create_app(config, engine, metrics, models=models)
    with LiveServer(app) as server, httpx.Client(base_url=server.base_url, timeout=60) as http:
        yield Served(http, app, config)
        if app.state.api.models.others:
            Served(http, app, config).wait_idle()
