"""APT and its peers on the same weights, side by side: `python -m benchmarks.peers`."""
