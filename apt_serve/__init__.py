"""The APT inference server: engine, HTTP and WebSocket API, Ray Serve deployment."""
