"""The front: OpenAI-style HTTP, server-sent events and WebSocket over an EngineClient."""
