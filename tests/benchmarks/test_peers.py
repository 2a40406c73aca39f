"""Benchmark of the peers: what is read out of their output, how it is reduced, and how peers are set up and run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from apt_serve.engine.config import EngineConfig
from benchmarks.limits import decode_limit, prefill_limit
from benchmarks.machine import Limits
from benchmarks.peers import llama_cpp, worker
from benchmarks.peers.__main__ import prepare
from benchmarks.peers.apt import Apt, engine_config
from benchmarks.peers.engine import Variant, Weights
from benchmarks.peers.llama_cpp import LlamaCpp, parse_batched_bench
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.process import Command, Line, RunError, run
from benchmarks.peers.report import Metric, median_limits, metrics, print_report, table_rows
from benchmarks.peers.setup import Setup, SetupError
from benchmarks.peers.vllm import Vllm
from benchmarks.peers.weights import shared_weights
from benchmarks.peers.workload import Figures, Job, Observed, Sample, Workload, figures, medians, random_prompts

WORKLOAD = Workload(batches=(1, 4), prompt_len=128, output_len=16, repeats=1)
WEIGHTS = Weights("model-0", "model.gguf", Path("/hf"), Path("/models/Model.Q4_1.gguf"), 49152)
# As llama-batched-bench of llama.cpp 0.5.0-dev printed them.
BATCHED_BENCH = """
{"n_kv_max": 1024, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 15, "pl": 1, "n_kv": 143, "t_pp": 0.441302, \
"speed_pp": 290.050812, "t_tg": 0.452542, "speed_tg": 33.146095, "t": 0.893844, "speed": 159.983170}
{"n_kv_max": 1024, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, \
"n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 15, "pl": 4, "n_kv": 572, "t_pp": 2.056962, \
"speed_pp": 248.910767, "t_tg": 2.213357, "speed_tg": 27.108145, "t": 4.270319, "speed": 133.947845}

"""
# As a worker under vLLM 0.32.0 printed them, among vLLM's own lines.
WORKER = """
(EngineCore pid=9714) INFO 11-22 18:59:12 [utils.py:347] Using LBHNC KV cache layout.
@peers {"event": "first_token"}
@peers {"event": "sample", "batch": 1, "first_s": 0.5144069500001933, "whole_s": 1.7638475110006766}
@peers {"event": "sample", "batch": 4, "first_s": 1.5322416609997163, "whole_s": 2.5397808549996626}
(MainProcess pid=9479) INFO 11-22 19:01:07 [utils.py:628] [shutdown] Process manager: send sigterm to process EngineCore
"""


def lines_of(text: str, at_s: float = 2.0) -> list[Line]:
    return [Line(at_s, line) for line in text.strip("\n").splitlines()]


def figures_of(decode: float = 100.0, **changed: float) -> Figures:
    values = {"prefill": 1000.0, "ttft_s": 0.1, "peak_mib": 500.0, "startup_s": 2.0} | changed
    return Figures(decode={1: decode}, **values)


# What engines print


def test_batched_bench_is_read_with_the_start_taken_from_its_first_line() -> None:
    observed = parse_batched_bench(lines_of(BATCHED_BENCH))
    assert observed.startup_s == pytest.approx(2.0 - 0.452542)
    assert observed.samples == (Sample(1, 0.441302, 0.452542), Sample(4, 2.056962, 2.213357))


def test_the_figures_of_batched_bench_are_those_it_states() -> None:
    result = figures(parse_batched_bench(lines_of(BATCHED_BENCH)), WORKLOAD, peak_mib=1.0)
    assert result.decode == pytest.approx({1: 33.146095, 4: 27.108145}, rel=1e-5)
    assert result.prefill == pytest.approx(248.910767, rel=1e-5)


def test_batched_bench_without_results_is_an_error() -> None:
    with pytest.raises(ValueError, match="no results"):
        parse_batched_bench(lines_of("llama_model_load: error loading model"))


def test_a_worker_is_read_among_its_librarys_own_lines() -> None:
    observed = worker.observed(lines_of(WORKER))
    assert observed.startup_s == 2.0
    assert [(s.batch, s.prefill_s) for s in observed.samples] == [(1, 0.5144069500001933), (4, 1.5322416609997163)]
    assert [s.decode_s for s in observed.samples] == pytest.approx([1.2494405, 1.0075392])


def test_a_worker_that_generated_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        worker.observed(lines_of("INFO starting"))


def test_a_sample_in_which_decoding_took_no_time_is_an_error() -> None:
    text = '@peers {"event": "first_token"}\n@peers {"event": "sample", "batch": 1, "first_s": 2.0, "whole_s": 1.5}'
    with pytest.raises(ValueError, match="too busy"):
        worker.observed(lines_of(text))


def test_what_a_worker_prints_is_what_its_parent_reads(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("model", "bf16", 2, 49152, WORKLOAD)
    calls: list[tuple[int, int]] = []

    def generate(prompts: list[list[int]], output_len: int) -> None:
        calls.append((len(prompts), output_len))
        time.sleep(0.001 * output_len)

    worker.measure(generate, job)
    observed = worker.observed(lines_of(capsys.readouterr().out))
    assert calls == [(1, 1), (1, 4), (4, 4), (1, 1), (1, 16), (4, 1), (4, 16)]
    assert [s.batch for s in observed.samples] == [1, 4]
    assert all(s.decode_s > 0.01 for s in observed.samples)


def test_a_job_survives_the_way_to_another_process() -> None:
    job = Job("model", "bf16", 2, 49152, WORKLOAD)
    assert Job.from_json(job.to_json()) == job


def test_prompts_are_the_same_for_every_engine_and_share_no_prefix() -> None:
    job = Job("model", "bf16", 2, 49152, WORKLOAD)
    prompts = random_prompts(job, 4, seed=1)
    assert prompts == random_prompts(job, 4, seed=1)
    assert {len(prompt) for prompt in prompts} == {128}
    assert len({prompt[0] for prompt in prompts + random_prompts(job, 4, seed=2)}) == 8


# How results are reduced and shown


def test_figures_are_medians_over_the_repeats() -> None:
    samples = [Sample(1, 0.1, d) for d in (0.3, 0.1, 0.2)] + [Sample(4, p, 1.0) for p in (1.0, 3.0, 2.0)]
    result = figures(Observed(5.0, tuple(samples)), WORKLOAD, peak_mib=10.0)
    assert result.decode == pytest.approx({1: 15 / 0.2, 4: 60 / 1.0})
    assert result.prefill == pytest.approx(4 * 128 / 2.0)
    assert (result.ttft_s, result.startup_s, result.peak_mib) == (0.1, 5.0, 10.0)


def test_a_batch_without_a_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch 4"):
        figures(Observed(1.0, (Sample(1, 0.1, 0.1),)), WORKLOAD, peak_mib=1.0)


def test_rounds_are_reduced_to_medians() -> None:
    found = medians([figures_of(decode=d, ttft_s=t) for d, t in ((1.0, 0.3), (9.0, 0.1), (2.0, 0.2))])
    assert found.decode == {1: 2.0}
    assert found.ttft_s == 0.2


DECODE = Metric("decode", lambda f: f.decode[1], lambda limits, bits: limits.read_gb_s * 10)
TTFT = Metric("ttft", lambda f: f.ttft_s * 1e3, None, less_is_better=True)


def test_each_row_says_how_many_times_as_good_apt_is() -> None:
    found = {
        Variant("APT", "int8", 8): figures_of(decode=150.0, ttft_s=0.1),
        Variant("APT", "bfloat16", 16): figures_of(decode=90.0),
        Variant("slow", "q8", 8): figures_of(decode=50.0, ttft_s=0.05),
        Variant("fast", "q8", 8): figures_of(decode=100.0, ttft_s=0.2),
    }
    assert table_rows([DECODE, TTFT], 8, found, Limits(20.0, 200.0)) == [
        ("8", "APT", "int8", "150", "100"),
        ("8", "slow", "q8", "50 3.00x", "50 0.50x"),
        ("8", "fast", "q8", "100 1.50x", "200 2.00x"),
        ("8", "best peer", "", "100 1.50x", "50 0.50x"),
        ("8", "limit", "", "200 0.75x", "-"),
    ]


def test_peers_are_shown_where_apt_has_no_such_precision() -> None:
    found = {Variant("peer", "q4", 4): figures_of(decode=50.0)}
    rows = table_rows([DECODE], 4, found, Limits(20.0, 200.0))
    assert rows == [("4", "peer", "q4", "50"), ("4", "best peer", "", "50"), ("4", "limit", "", "200")]


def test_an_engine_that_is_missing_is_reported_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = {Variant("APT", "int8", 8): [figures_of()], Variant("peer", "q8", 8): []}
    print_report([DECODE], rounds, {8: Limits(20.0, 200.0)}, {"peer q8": "ended with code 1: no compiler"})
    assert "missing: peer q8: ended with code 1: no compiler" in capsys.readouterr().out


def test_limits_are_medians_and_reading_is_alike_at_every_width() -> None:
    rounds = [{16: Limits(10.0, 1.0), 8: Limits(30.0, 5.0)}, {16: Limits(20.0, 3.0), 8: Limits(40.0, 7.0)}]
    assert median_limits(rounds) == {16: Limits(25.0, 2.0), 8: Limits(25.0, 6.0)}


def test_limits_of_the_embedded_model() -> None:
    model = shared_checkpoint_config()
    limits = Limits(read_gb_s=32.0, gemm_gflop_s=400.0)
    one = decode_limit(model, limits, weight_bytes=2, kv_bytes=2, num_streams=1, context=160)
    assert one.tokens_per_s == pytest.approx(32e9 / (134.5e6 * 2 + 160 * 23040), rel=0.01)
    many = decode_limit(model, limits, weight_bytes=2, kv_bytes=2, num_streams=10_000, context=0)
    assert many.tokens_per_s == pytest.approx(400e9 / (2 * 134.5e6), rel=0.01)
    assert prefill_limit(model, limits) == pytest.approx(400e9 / (2 * 106.2e6), rel=0.01)
    assert [m.head for m in metrics(WORKLOAD, model)][:3] == ["decode 1 tok/s", "decode 4 tok/s", "prefill tok/s"]


# Running and setting up


def python(code: str, **environment: str) -> Command:
    return Command((sys.executable, "-c", code), environment)


def test_lines_come_with_their_times_and_the_memory_of_all_processes() -> None:
    child = "import time; x = bytearray(2**25); time.sleep(1)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print("one", flush=True)
time.sleep(0.8)
print("two", flush=True)
child.wait()
"""
    done = run(python(code), timeout_s=30)
    assert [line.text for line in done.lines] == ["one", "two"]
    assert done.lines[1].at_s - done.lines[0].at_s > 0.5
    assert done.peak_mib > 40


def test_a_process_that_fails_is_reported_with_its_last_words() -> None:
    with pytest.raises(RunError, match="code 3: no such weights"):
        run(python("import sys; print('no such weights', file=sys.stderr); sys.exit(3)"), timeout_s=30)


def test_a_process_that_takes_too_long_is_ended_with_its_children() -> None:
    started = time.monotonic()
    with pytest.raises(RunError, match="longer than 1 s"):
        run(python("import subprocess; subprocess.run(['sleep', '60'])"), timeout_s=1)
    assert time.monotonic() - started < 50


def test_a_program_that_is_not_there_is_reported() -> None:
    with pytest.raises(RunError, match="cannot be started"):
        run(Command(("/no/such/program",)), timeout_s=1)


def test_peers_do_not_inherit_how_apt_tunes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    code = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ['OWN'])"
    assert run(python(code, OWN="set"), timeout_s=30).lines[0].text == "None set"


def test_a_step_is_taken_once_and_again_by_another_recipe(tmp_path: Path) -> None:
    taken: list[str] = []
    for recipe in ("a", "a", "b", "b"):
        Setup("peer", tmp_path / "peer").once("build", recipe, lambda recipe=recipe: taken.append(recipe))
    assert taken == ["a", "b"]


def test_a_step_that_failed_is_taken_again(tmp_path: Path) -> None:
    setup = Setup("peer", tmp_path)
    fail = [sys.executable, "-c", "import sys; sys.exit('no compiler here')"]
    for _ in range(2):
        with pytest.raises(SetupError, match="building failed: no compiler here"):
            setup.once("build", "a", lambda: setup.run("building", fail))


def test_a_peer_finds_the_benchmark_and_nothing_else_of_the_repository(tmp_path: Path) -> None:
    folder = Setup("peer", tmp_path).import_folder
    code = """
import importlib.util, sys
import benchmarks.peers.vllm, benchmarks.peers.openvino, benchmarks.peers.llama_cpp
print([name for name in ("apt_core", "apt_serve", "kernels", "torch") if importlib.util.find_spec(name)])
"""
    command = Command((sys.executable, "-S", "-c", code), folder=folder)
    assert run(command, timeout_s=60).lines[0].text == "[]"
    assert Setup("peer", tmp_path).import_folder == folder


# Engines


class Peer:
    """A peer that cannot be installed, or cannot take 8-bit weights."""

    variants = (Variant("peer", "bf16", 16), Variant("peer", "q8", 8), Variant("peer", "q4", 4))

    def __init__(self, *, is_installable: bool) -> None:
        self._is_installable = is_installable

    def install(self) -> None:
        if not self._is_installable:
            raise SetupError("building it needs cmake")

    def convert(self, variant: Variant, weights: Weights) -> None:
        if variant.bits == 8:
            raise SetupError("no such precision")


def test_what_cannot_be_had_is_noted_with_the_reason_and_the_rest_runs() -> None:
    missing: dict[str, str] = {}
    engines = {"good": Peer(is_installable=True), "bad": Peer(is_installable=False)}
    ready = prepare(engines, [16, 8], WEIGHTS, missing)
    assert ready == {Variant("peer", "bf16", 16): engines["good"]}
    assert missing == {"peer q8": "no such precision", "bad": "building it needs cmake"}


def test_llama_cpp_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".sources").write_text(llama_cpp.SOURCES)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="needs cmake"):
        LlamaCpp(tmp_path).install()


def test_apt_runs_in_each_precision_of_its_settings() -> None:
    variants = Apt().variants
    assert {"bfloat16", "float32"} <= {variant.weights for variant in variants}
    for variant in variants:
        config = engine_config(Job("model", variant.weights, 2, 49152, WORKLOAD))
        assert isinstance(config, EngineConfig)
        assert config.dtype == ("float32" if variant.bits == 32 else "bfloat16")


def test_apt_measures_itself_through_the_same_process_as_the_peers() -> None:
    weights = Weights("model", "smollm2-135m-instruct", Path("/hf"), None, 49152)
    workload = Workload((1, 2), prompt_len=8, output_len=4, repeats=1)
    command = Apt().command(Variant("APT", "float32", 32), weights, workload, num_threads=2)
    done = run(command, timeout_s=150)
    result = figures(Apt().observed(done.lines), workload, done.peak_mib)
    assert set(result.decode) == {1, 2}
    assert result.startup_s > result.ttft_s
    assert result.peak_mib > 100


def test_llama_cpp_takes_the_gguf_the_model_came_from_where_it_is_of_that_precision(tmp_path: Path) -> None:
    engine = LlamaCpp(tmp_path)
    models = {
        variant.bits: argument_after("-m", engine.command(variant, WEIGHTS, WORKLOAD, num_threads=2))
        for variant in engine.variants
    }
    assert models[4] == "/models/Model.Q4_1.gguf"
    assert models[8] == str(tmp_path / "models" / "model-0" / "q8_0.gguf")


def test_llama_cpp_repeats_every_batch_in_one_process(tmp_path: Path) -> None:
    workload = Workload((1, 8), prompt_len=128, output_len=64, repeats=2)
    command = LlamaCpp(tmp_path).command(Variant("llama.cpp", "bf16", 16), WEIGHTS, workload, num_threads=2)
    assert argument_after("-npl", command) == "1,8,1,8"
    assert argument_after("-ntg", command) == "63"
    assert argument_after("-c", command) == str(8 * 256)


def test_python_peers_run_in_environments_of_their_own(tmp_path: Path) -> None:
    for engine in (Vllm(tmp_path / "a"), OpenVino(tmp_path / "b")):
        command = engine.command(engine.variants[0], WEIGHTS, WORKLOAD, num_threads=2)
        assert command.argv[0].startswith(str(tmp_path))
        assert Job.from_json(command.argv[-1]).workload == WORKLOAD
        assert command.environment["OMP_NUM_THREADS"] == "2"


def test_the_embedded_model_is_written_once(tmp_path: Path) -> None:
    weights = shared_weights("smollm2-135m-instruct", tmp_path)
    written = (weights.hf_folder / "model.safetensors").stat().st_mtime_ns
    assert shared_weights("smollm2-135m-instruct", tmp_path) == weights
    assert (weights.hf_folder / "model.safetensors").stat().st_mtime_ns == written
    assert weights.hf_folder.parent == tmp_path


def shared_checkpoint_config():
    from apt_core.checkpoint import open_checkpoint

    return open_checkpoint("smollm2-135m-instruct").config


def argument_after(option: str, command: Command) -> str:
    return command.argv[command.argv.index(option) + 1]
