"""Single ops against what the machine can do, and against their peers: one registry for processors and GPUs."""
