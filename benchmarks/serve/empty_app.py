"""The least that Ray Serve can run: what the start of APT on Ray Serve is compared with."""

from __future__ import annotations

from ray import serve
from starlette.requests import Request


class Empty:
    """Answers 200 to everything."""

    async def __call__(self, request: Request) -> str:
        """Answer one request."""
        return ""


app = serve.deployment(ray_actor_options={"num_cpus": 0.1})(Empty).bind()
