"""The order of tokens depends on seed, files and settings only; every prediction is in it once an epoch."""

import gc
import itertools
import json
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_core.errors import ConfigError
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.registry import build_model
from apt_train.data import UNSCORED, DataConfig
from tests.apt_train.data.batches import END, loader, predictions, same, sequences


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


@settings(max_examples=15, deadline=None)
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


@settings(max_examples=10, deadline=None)
@given(fields=SETTINGS, cut=st.data())
def test_a_resume_at_any_place_with_any_number_of_ranks_goes_on_exactly(folder, tokenizer, fields, cut):
    config = config_of(folder, **fields)
    whole = list(loader(config, tokenizer))
    done, state = 0, None
    while done < len(whole):
        ranks = cut.draw(st.integers(1, 4))
        steps = cut.draw(st.integers(1, 40))
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


@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("fields", [{"validation_share": 0.0}, {"validation_share": 0.5}])
def test_data_in_which_there_is_nothing_to_predict_are_refused(tmp_path, tokenizer, epochs, fields):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": ""}\n')
    config = DataConfig(paths=(str(path),), epochs=epochs, on_bad_record="skip", **fields)
    with pytest.raises(ConfigError, match=r"data\.paths: no document for train has 2 tokens"):
        loader(config, tokenizer, end_id=None)


def test_copies_of_a_document_are_held_out_together(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    lines = [{"id": copy, "text": f"text {i}"} for copy in range(3) for i in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(paths=(str(path),), validation_share=0.5, epochs=1)
    found = {
        split: Counter(
            tuple(inputs) for batch in loader(config, tokenizer, split=split) for inputs, _ in sequences(batch)
        )
        for split in ("train", "validation")
    }
    assert not found["train"].keys() & found["validation"].keys()
    assert set(found["train"].values()) == set(found["validation"].values()) == {3}


def test_held_out_documents_are_not_searched_for_in_all_files(tmp_path, tokenizer):
    """Evaluation would read a whole large data set each time: here it would come upon a line that cannot be read."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "x" * 50}) + "\n" for i in range(1000)) + "oops\n")
    config = DataConfig(paths=(str(path),), validation_share=0.1, shuffle_mib=0.01, micro_batch_tokens=48, prefetch=1)
    held_out = loader(config, tokenizer, split="validation")
    assert next(held_out).num_scored
    held_out.close()
    with pytest.raises(ConfigError, match=r"a\.jsonl:1001"):
        list(loader(config, tokenizer, split="validation"))


def test_reading_ahead_ends_with_the_loader(folder, tokenizer):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name == "apt-data"]

    data, forgotten = (loader(config_of(folder, prefetch=1), tokenizer) for _ in range(2))
    before = predictions([next(data), next(data)])
    next(forgotten)
    assert len(readers()) == 2
    data.close()
    assert len(readers()) == 1
    (last,) = readers()
    del forgotten
    gc.collect()
    last.join(30)
    assert not last.is_alive()
    again = predictions([next(data), next(data)])
    data.close()
    assert before + again == predictions(itertools.islice(loader(config_of(folder), tokenizer), 4))
