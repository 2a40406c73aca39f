"""Small whole runs for tests: a tiny new model, the tokenizer that is installed, and a text of the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SICK = "model.layers.1.mlp.up_proj.weight"
CONFIG = """
[run]
folder = "{folder}/run"
steps = {steps}
micro_batches = 2
device = "cpu"

[model]
hidden_size = 16
intermediate_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1

[data]
paths = ["{root}/ARCHITECTURE.md", "{root}/README.md"]
text_documents = "paragraph"
validation_share = 0.1
micro_batch_tokens = 64

[monitor]
warmup_steps = 8

[metrics]
print_every = 1
"""


def write_config(folder: Path, steps: int) -> str:
    """The path of a file of settings; the run writes to the folder run."""
    path = folder / "config.toml"
    path.write_text(CONFIG.format(folder=folder, steps=steps, root=ROOT))
    return str(path)
