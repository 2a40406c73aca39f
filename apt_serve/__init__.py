"""The APT inference server: engine, HTTP and WebSocket API, Ray Serve deployment."""

import os

# Read by OpenMP when torch loads it. By default its threads spin for milliseconds at every barrier; on a machine with
# anything else to do (the event loop, Ray) that makes a step up to ten times slower. This many spins cost microseconds.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
