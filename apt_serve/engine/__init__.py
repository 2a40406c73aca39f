"""The engine: continuous batching over a paged KV cache. Knows nothing of HTTP, pydantic or Ray."""
