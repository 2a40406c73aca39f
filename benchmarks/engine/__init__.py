"""The engine alone, offline: `python -m benchmarks.engine`."""
