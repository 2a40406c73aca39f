"""The server over HTTP: `python -m benchmarks.serve`."""
