"""The order of tokens depends on seed, files and settings only; every prediction is in it once an epoch."""

import itertools
import json
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.errors import ConfigError
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.registry import build_model
from apt_train.data import UNSCORED, DataConfig, DataLoader
from apt_train.data.records import read_records
from apt_train.data.sources import find_files

END = 256


def loader(config, tokenizer, **more):
    return DataLoader(config, tokenizer, **({"vocab_size": 257, "end_id": END} | more))


def sequences(batch):
    """Inputs and labels of each sequence; padding is left out."""
    bounds = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        if end > begin and (batch.labels[begin:end] != UNSCORED).any():
            yield batch.input_ids[begin:end].tolist(), batch.labels[begin:end].tolist()


def predictions(batches):
    return [
        pair for batch in batches for inputs, labels in sequences(batch) for pair in zip(inputs, labels, strict=True)
    ]


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "labels", "positions", "cu_seqlens"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three JSONL files of texts of 0 to 60 bytes after a number."""
    folder = tmp_path_factory.mktemp("data")
    for file in range(3):
        lines = [json.dumps({"text": f"{file}-{i} " + "x" * (i * 7 % 61)}) for i in range(20)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config_of(folder, **more):
    return DataConfig(
        **(
            {"paths": (f"{folder}/*.jsonl",), "shuffle_mib": 400 / 2**20, "micro_batch_tokens": 48, "max_documents": 8}
            | more
        )
    )


SETTINGS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "micro_batch_tokens": st.sampled_from([7, 48, 300]),
        "max_documents": st.sampled_from([1, 3, 64]),
        "cut_documents": st.booleans(),
        "shuffle": st.booleans(),
        "shuffle_mib": st.sampled_from([1 / 2**20, 400 / 2**20, 1.0]),
        "epochs": st.integers(1, 2),
    }
)


@settings(max_examples=20, deadline=None)
@given(fields=SETTINGS)
def test_every_prediction_is_there_once_an_epoch(folder, tokenizer, fields):
    config = config_of(folder, **fields)
    texts = [json.loads(line)["text"] for path in folder.iterdir() for line in path.read_text().splitlines()]
    expected = Counter()
    for text in texts:
        ids = [*tokenizer.encode(text), END]
        expected.update(itertools.pairwise(ids))
    found = Counter(predictions(loader(config, tokenizer)))
    assert found == Counter({pair: count * config.epochs for pair, count in expected.items()})


@settings(max_examples=20, deadline=None)
@given(fields=SETTINGS, cut=st.data())
def test_a_resume_at_any_place_with_any_number_of_ranks_goes_on_exactly(folder, tokenizer, fields, cut):
    config = config_of(folder, **fields)
    whole = list(loader(config, tokenizer))
    done, state = 0, None
    while done < len(whole):
        ranks = cut.draw(st.integers(1, 4))
        steps = cut.draw(st.integers(1, 6))
        loaders = [loader(config, tokenizer, rank=rank, num_ranks=ranks) for rank in range(ranks)]
        for each in loaders:
            if state is not None:
                each.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(min(steps, -(-(len(whole) - done) // ranks))):
            for batch in [next(each) for each in loaders]:
                if done < len(whole):
                    assert same(batch, whole[done])
                else:
                    assert batch.num_scored == 0
                done += 1
        states = [each.state_dict() for each in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for each in loaders:
            each.close()


def test_shapes_are_fixed_and_sequences_start_at_position_0(folder, tokenizer):
    for batch in loader(config_of(folder, epochs=1, cut_documents=False), tokenizer):
        assert batch.input_ids.shape == batch.labels.shape == batch.positions.shape == (48,)
        assert batch.cu_seqlens.shape == (10,) and batch.cu_seqlens[-1] == 48
        lengths = batch.cu_seqlens.diff()
        assert batch.max_seqlen == lengths.max() and batch.num_scored == (batch.labels != UNSCORED).sum()
        assert batch.positions.tolist() == [p for length in lengths.tolist() for p in range(length)]
        for inputs, labels in sequences(batch):
            assert inputs[1:] == labels[:-1]


def test_epochs_and_seeds_differ_in_order_only(folder, tokenizer):
    batches = list(loader(config_of(folder, epochs=2), tokenizer))
    half = len(batches) // 2
    first, second = predictions(batches[:half]), predictions(batches[half:])
    assert first != second and sorted(first) == sorted(second)
    assert predictions(loader(config_of(folder, epochs=1, seed=9), tokenizer)) != first


def test_packed_documents_get_the_hidden_states_they_get_alone(folder, tokenizer):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
        num_kv_heads=1, architecture="LlamaForCausalLM", rms_norm_eps=1e-5, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = build_model(config, "cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = next(loader(config_of(folder), tokenizer))
    assert len(list(sequences(batch))) > 1
    with torch.no_grad():
        packed = model(model.embed(batch.input_ids), batch.positions, batch.metadata())
        bounds = batch.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(bounds):
            if end > begin:
                ids = batch.input_ids[begin:end]
                alone = model(
                    model.embed(ids), torch.arange(end - begin), AttentionMetadata.for_full_sequences([end - begin])
                )
                torch.testing.assert_close(packed[begin:end], alone, atol=1e-5, rtol=1e-5)


def test_training_and_validation_share_no_document(folder, tokenizer):
    config = config_of(folder, validation_share=0.3, epochs=1)
    everything = Counter(predictions(loader(config_of(folder, epochs=1), tokenizer)))
    train = Counter(predictions(loader(config, tokenizer)))
    held_out = Counter(predictions(loader(config, tokenizer, split="validation")))
    assert train + held_out == everything and 0 < held_out.total() < train.total()


def test_only_the_assistants_words_are_scored(tmp_path, tokenizer):
    turns = [("user", "a"), ("assistant", "BC"), ("user", "d"), ("assistant", "E")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    config = DataConfig(
        paths=(f"{tmp_path}/*",),
        content="messages",
        column="messages",
        loss_on="assistant",
        epochs=1,
        micro_batch_tokens=99,
    )
    (batch,) = loader(config, tokenizer)
    assert tokenizer.decode(batch.labels[batch.labels != UNSCORED].tolist()) == "BC;E;"
    inputs, _ = next(sequences(batch))
    assert tokenizer.decode(inputs) == "[user]a;[assistant]BC;[user]d;[assistant]E"


def test_a_corrupt_line_is_named_or_skipped(folder, tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"text": "fine"}\n\n{"text": oops\n{"txt": "x"}\n{"text": 3}\n{"text": "\\ud800"}\n{"text": "last"}\n'
    )
    config = DataConfig(paths=(str(path),), epochs=1, micro_batch_tokens=64, on_bad_record="error")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:3: is not JSON"):
        list(loader(config, tokenizer))
    skipping = loader(DataConfig(paths=(str(path),), epochs=1, micro_batch_tokens=64, on_bad_record="skip"), tokenizer)
    assert len(list(sequences(next(skipping)))) == 2 and skipping.num_skipped == 4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"paths": ()}, "data.paths"),
        ({"paths": ("/nowhere/*.txt",)}, "data.paths"),
        ({"paths": ("package:nowhere/*.txt",)}, "data.paths"),
        ({"column": "txt"}, "data.paths"),
        ({"end_of_document": "<no>"}, "data.end_of_document"),
        ({"epochs": 0}, "data.epochs"),
        ({"loss_on": "assistant"}, "data.loss_on"),
    ],
)
def test_bad_settings_are_refused_before_training(folder, tokenizer, fields, field):
    with pytest.raises(ConfigError) as caught:
        loader(config_of(folder, **fields), tokenizer)
    assert caught.value.field == field


def test_a_vocabulary_larger_than_the_models_is_refused(folder, tokenizer):
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        loader(config_of(folder), tokenizer, vocab_size=200)


def test_empty_files_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text("\n\n")
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(ConfigError, match=r"data\.paths"):
            loader(DataConfig(paths=(str(tmp_path / name),)), tokenizer)


def test_a_resume_in_another_order_is_refused(folder, tokenizer):
    state = loader(config_of(folder), tokenizer).state_dict()
    with pytest.raises(ConfigError, match=r"data\.seed"):
        loader(config_of(folder, seed=1), tokenizer).load_state_dict(state)


@pytest.mark.parametrize("unit", ["file", "paragraph"])
def test_text_is_read_whole_from_any_place_and_never_cuts_a_character(tmp_path, unit, monkeypatch):
    monkeypatch.setattr("apt_train.data.records.MAX_TEXT_BYTES", 10)
    text = "één alinea\n\nfür\nñandú 日本語日本語日本語\n \n\n🙂🙂🙂🙂 last"
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(paths=(f"{tmp_path}/a.txt",), text_documents=unit)
    (file,) = find_files(config.paths, config, field="data.paths")
    records = list(read_records(file, 0, config))
    assert "".join("".join(r.data.decode() for r in records).split()) == "".join(text.split())
    for i, record in enumerate(records):
        assert [r.data for r in read_records(file, record.end, config)] == [r.data for r in records[i + 1 :]]


def test_a_file_larger_than_the_window_is_never_in_memory(tmp_path, tokenizer):
    path = tmp_path / "big.txt"
    path.write_bytes(b"")
    paragraph = b"word " * 2000 + b"\n\n"
    with path.open("wb") as file:
        for _ in range(20):
            file.write(paragraph * 1000)
    assert path.stat().st_size > 190_000_000
    config = DataConfig(paths=(str(path),), text_documents="paragraph", shuffle_mib=1, prefetch=2)
    data = loader(config, tokenizer)
    tracemalloc.start()
    for _ in range(3):
        next(data)
    peak = tracemalloc.get_traced_memory()[1]
    data.close()
    tracemalloc.stop()
    assert peak < 60e6


def test_parquet_is_read_from_any_row(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [f"row {i}" for i in range(900)]}), path, row_group_size=400)
    config = DataConfig(paths=(str(path),), column="body")
    (file,) = find_files(config.paths, config, field="data.paths")
    values = [record.data.as_py() for record in read_records(file, 0, config)]
    assert values == [f"row {i}" for i in range(900)]
    for begin in (1, 257, 399, 400, 899):
        assert [record.data.as_py() for record in read_records(file, begin, config)] == values[begin:]
    with pytest.raises(ConfigError, match=r"data\.column.*'text'; it has body"):
        loader(DataConfig(paths=(str(path),)), tokenizer)
