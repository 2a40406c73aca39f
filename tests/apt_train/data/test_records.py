"""Files of every format give their documents whole, from any place; what cannot be read is named."""

import bz2
import errno
import gzip
import itertools
import json
import logging
import lzma
import os
import tracemalloc

import psutil
import pyarrow
import pytest
from pyarrow import parquet

from apt_core.errors import ConfigError
from apt_train.config import ModelSettings
from apt_train.data import UNSCORED, DataConfig, records
from apt_train.data.records import read_records
from apt_train.data.sources import find_files
from apt_train.model import ModelSource
from tests.apt_train.data.batches import loader, same, sequences


def documents(config, tokenizer):
    """What the sequences of an epoch say, in order; one each document where none is cut."""
    fields = {"epochs": 1, "shuffle": False, "cut_documents": False}
    data = loader(DataConfig(**(vars(config) | fields)), tokenizer)
    return [tokenizer.decode(inputs) for batch in data for inputs, _ in sequences(batch)]


def test_a_corrupt_line_is_named_or_skipped(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"text": "fine"}\n\n{"text": oops\n{"txt": "x"}\n{"text": 3}\n{"text": "\\ud800"}\n{"text": "last"}\n'
    )
    config = DataConfig(paths=(str(path),), epochs=1, micro_batch_tokens=64, on_bad_record="error")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:3: is not JSON"):
        list(loader(config, tokenizer))
    skipping = loader(DataConfig(paths=(str(path),), epochs=1, micro_batch_tokens=64, on_bad_record="skip"), tokenizer)
    assert len(list(sequences(next(skipping)))) == 2 and skipping.num_skipped == 4


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
    with path.open("wb") as file:
        for _ in range(20):
            file.write((b"word " * 2000 + b"\n\n") * 1000)
    assert path.stat().st_size > 190_000_000
    config = DataConfig(paths=(str(path),), text_documents="paragraph", shuffle_mib=1, prefetch=2)
    data = loader(config, tokenizer)
    process, tokens = psutil.Process(), 0
    before, grown = process.memory_info().rss, 0
    tracemalloc.start()
    while tokens < 3 << 20:  # three windows
        tokens += len(next(data).input_ids)
        grown = max(grown, process.memory_info().rss - before)
    peak = tracemalloc.get_traced_memory()[1]
    data.close()
    tracemalloc.stop()
    assert peak < 60e6 and grown < 150e6


def test_parquet_is_read_from_any_row(tmp_path, tokenizer):
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


def test_a_row_without_text_and_a_damaged_parquet_file_are_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    texts = pyarrow.array(["one", None, "three"])
    parquet.write_table(pyarrow.table({"text": texts}), path)
    config = DataConfig(paths=(str(path),), on_bad_record="skip")
    assert documents(config, tokenizer) == ["one", "three"]
    with pytest.raises(ConfigError, match=r"a\.parquet: row 1: expected a text, found NoneType"):
        documents(DataConfig(paths=(str(path),)), tokenizer)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])
    with pytest.raises(ConfigError, match=r"data\.paths: .*a\.parquet is damaged"):
        documents(config, tokenizer)
    path.write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match=r"data\.paths: .*a\.parquet is no Parquet file"):
        documents(config, tokenizer)


def test_messages_of_parquet_and_jsonl_are_the_same(tmp_path, tokenizer):
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(5)]
    parquet.write_table(pyarrow.table({"chat": chats}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    found = [
        documents(
            DataConfig(paths=(str(tmp_path / name),), content="messages", column="chat", loss_on="assistant"), tokenizer
        )
        for name in ("a.parquet", "a.jsonl")
    ]
    # The last token is a label only.
    assert found[0] == found[1] == [f"[user]q{i};[assistant]a{i}" for i in range(5)]


def test_a_real_chat_template_scores_answers_and_their_end(tmp_path):
    """What is before an answer is tokenized as a server tokenizes the prompt."""
    tokenizer = ModelSource(ModelSettings(source="smollm2-135m-instruct")).tokenizer
    chat = [("user", "Hi"), ("assistant", "Hello, you."), ("user", "Bye"), ("assistant", "Farewell.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    fields = {"content": "messages", "column": "messages", "loss_on": "assistant", "epochs": 1}
    config = DataConfig(paths=(f"{tmp_path}/*",), **fields)
    (batch,) = loader(config, tokenizer, vocab_size=tokenizer.vocab_size)
    inputs, labels = next(sequences(batch))
    scored = [label for label in labels if label != UNSCORED]
    answers = "Hello, you.<|im_end|>\nFarewell.<|im_end|>\n"
    assert tokenizer.decode(scored, skip_special_tokens=False) == answers
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages[:1]), add_special_tokens=False)
    assert inputs[: len(prompt)] == prompt and labels[: len(prompt) - 1] == [UNSCORED] * (len(prompt) - 1)


COMPRESSED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_compressed_files_are_read_like_plain_ones(tmp_path, ending, name):
    line = '{{"text": "{0}"}}\n' if name == "a.jsonl" else "Nr {0}\n\n"
    plain = "".join(line.format(i) for i in range(3000)).encode()
    (tmp_path / name).write_bytes(plain)
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(COMPRESSED[ending](plain))
    config = DataConfig(paths=(f"{tmp_path}/*",), text_documents="paragraph")
    first, second = ([*read_records(f, 0, config)] for f in find_files(config.paths, config, field="data.paths"))
    assert len(first) == 3000 and [r.data for r in first] == [r.data for r in second]
    compressed = second[0].file
    for place in (1, 1500, 2999):
        assert [*read_records(compressed, second[place].begin, config)] == second[place:]
    assert second[2].place == f"{path}:{3 if name == 'a.jsonl' else 5}"
    path.write_bytes(path.read_bytes()[:-200])
    (truncated,) = find_files((str(path),), config, field="data.paths")
    with pytest.raises(ConfigError, match=rf"{name}{ending} is damaged"):
        list(read_records(truncated, 0, config))


@pytest.mark.parametrize(
    ("data", "encoding", "found"),
    [
        (b"\xef\xbb\xbfone\r\n\r\ntwo\r\n \r\n", "utf-8", ["one\r\n\r\n", "two\r\n \r\n"]),
        (b"caf\xe9\n\n\xdf", "latin-1", ["caf\u00e9\n\n", "\u00df"]),
        ("\u65e5\u672c\n\n\U0001f642".encode(), "utf-8", ["\u65e5\u672c\n\n", "\U0001f642"]),
    ],
)
def test_text_is_decoded_as_the_settings_say(tmp_path, tokenizer, data, encoding, found):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    config = DataConfig(paths=(str(path),), text_documents="paragraph", encoding=encoding)
    assert documents(config, tokenizer) == found


def test_text_in_another_encoding_is_named_or_skipped(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\ncaf\xe9\n\nlast")
    config = DataConfig(paths=(str(path),), text_documents="paragraph")
    with pytest.raises(ConfigError, match=r"a\.txt:3: is not utf-8"):
        documents(config, tokenizer)
    skipping = DataConfig(paths=(str(path),), text_documents="paragraph", on_bad_record="skip")
    assert documents(skipping, tokenizer) == ["fine\n\n", "last"]


def test_a_json_file_may_begin_with_a_byte_order_mark(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert documents(DataConfig(paths=(str(path),)), tokenizer) == ["one", "two"]


def test_a_line_that_is_too_long_is_skipped_without_being_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in ("one", "x" * 500, "three")]
    path.write_text("\n".join(lines))
    config = DataConfig(paths=(str(path),), on_bad_record="skip")
    (file,) = find_files(config.paths, config, field="data.paths")
    found = [*read_records(file, 0, config)]
    assert [record.data.strip() for record in found] == [lines[0].encode(), b"", lines[2].encode()]
    assert [*read_records(file, found[1].end, config)] == found[2:]
    assert documents(config, tokenizer) == ["one", "three"]


def test_skipped_records_are_told_of_but_not_each(tmp_path, tokenizer, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + "oops\n" * 99)
    config = DataConfig(paths=(str(path),), on_bad_record="skip", epochs=1)
    data = loader(config, tokenizer)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        list(data)
    assert data.num_skipped == 99
    assert [record.args[0] for record in caplog.records] == [1, 10]
    assert f"{path}:11: is not JSON" in caplog.records[1].getMessage()


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_a_file_that_vanishes_or_changes_during_the_run_is_named(tmp_path, tokenizer, change):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "some words"}\n' * 10)
    data = loader(DataConfig(paths=(f"{tmp_path}/*",), shuffle=False), tokenizer)
    if change == "gone":
        os.remove(tmp_path / "b.jsonl")
    else:
        (tmp_path / "b.jsonl").write_text('{"text": "other words"}\n' * 10)
    message = "cannot be read any more: No such file" if change == "gone" else "has changed since the run began"
    with pytest.raises(ConfigError, match=rf"data\.paths: .*b\.jsonl {message}"):
        next(data)


def test_a_passing_fault_of_the_disk_can_be_tried_again(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(50)))
    config = DataConfig(paths=(str(path),), micro_batch_tokens=32, shuffle_mib=200 / 2**20, epochs=1, prefetch=1)
    whole = list(loader(config, tokenizer))
    data = loader(config, tokenizer)
    real, faults = records._open_plain, itertools.count()

    def faulty(path):
        if next(faults) < 2:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path)

    monkeypatch.setattr(records, "_open_plain", faulty)
    for _ in range(2):
        with pytest.raises(OSError, match="Stale"):
            next(data)
    assert all(same(a, b) for a, b in zip(data, whole, strict=True))
