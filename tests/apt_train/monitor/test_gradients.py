from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_train.monitor.gradients import Fault, GradientMonitor, GradientReport, GradientSettings, TrainingDivergedError
from tests.apt_train.ranks import spawn

TEXT = (Path(__file__).parents[3] / "ARCHITECTURE.md").read_bytes()
TOKENS = 64
SICK = "model.layers.1.mlp.up_proj.weight"


def tiny_decoder() -> DecoderForCausalLM:
    torch.manual_seed(0)
    return DecoderForCausalLM(
        ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=256,
            hidden_size=24,
            intermediate_size=40,
            num_layers=2,
            num_heads=3,
            num_kv_heads=1,
            head_dim=8,
            max_position_embeddings=TOKENS,
            rms_norm_eps=1e-5,
        )
    )


class Training:
    """Steps of a tiny decoder on bytes of real text, each looked at by a monitor."""

    def __init__(self, settings: GradientSettings | None = None) -> None:
        self.model = tiny_decoder()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.monitor = GradientMonitor(settings)
        self.positions = torch.arange(TOKENS)
        self.metadata = AttentionMetadata.for_full_sequences([TOKENS])
        self.generator = torch.Generator().manual_seed(1)
        self.step = 0

    def run(self, disturb: Callable[[dict[str, nn.Parameter]], None] = lambda parameters: None) -> GradientReport:
        start = int(torch.randint(len(TEXT) - TOKENS - 1, (), generator=self.generator))
        tokens = torch.tensor(list(TEXT[start : start + TOKENS + 1]))
        hidden = self.model(self.model.embed(tokens[:-1]), self.positions, self.metadata)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model.logits(hidden), tokens[1:]).backward()
        disturb(dict(self.model.named_parameters()))
        self.step += 1
        report = self.monitor.check_gradient_flow(self.model, self.step)
        if not report.must_skip:
            self.optimizer.step()
        return report


def scaled(factor: float) -> Callable[[dict[str, nn.Parameter]], None]:
    def disturb(parameters: dict[str, nn.Parameter]) -> None:
        assert parameters[SICK].grad is not None
        parameters[SICK].grad *= factor

    return disturb


def one_nan(parameters: dict[str, nn.Parameter]) -> None:
    assert parameters[SICK].grad is not None
    parameters[SICK].grad[3, 5] = math.nan


def missing(parameters: dict[str, nn.Parameter]) -> None:
    parameters[SICK].grad = None


def test_no_false_alarm_in_500_clean_steps_and_then_every_fault_is_named_within_its_step() -> None:
    training = Training()
    assert not [report for _ in range(500) if (report := training.run()).must_skip]
    faults = [
        (one_nan, Fault.NON_FINITE),
        (scaled(math.inf), Fault.NON_FINITE),
        (scaled(1e4), Fault.EXPLODING),
        (scaled(0.0), Fault.VANISHING),
        (missing, Fault.VANISHING),
        (scaled(1e-7), Fault.VANISHING),
    ]
    for disturb, fault in faults:
        report = training.run(disturb)
        assert [(a.parameter, a.fault) for a in report.anomalies] == [(SICK, fault)]
        assert report.step == training.step
        assert f"step {training.step}" in str(report) and SICK in str(report)
        assert not training.run().must_skip  # nothing was learnt from the sick step


def test_norms_are_those_of_the_gradients() -> None:
    training = Training()
    report = training.run()
    for name, parameter in training.model.named_parameters():
        assert parameter.grad is not None
        assert report.norms[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
    assert report.total_norm == pytest.approx(math.sqrt(sum(n**2 for n in report.norms.values())))


def test_only_non_finite_gradients_are_found_while_the_usual_norms_are_learnt() -> None:
    training = Training(GradientSettings(warmup_steps=10))
    assert training.run(one_nan).must_skip
    training.run()
    assert not training.run(scaled(1e4)).must_skip


def test_a_parameter_that_never_has_a_gradient_is_named_after_the_warm_up() -> None:
    training = Training(GradientSettings(warmup_steps=5))
    reports = [training.run(missing) for _ in range(6)]
    assert [report.must_skip for report in reports] == [False] * 5 + [True]


def test_steps_skipped_in_a_row_stop_the_run_with_a_report() -> None:
    training = Training(GradientSettings(max_skipped_steps=3))
    assert training.run(one_nan).skipped_in_a_row == 1
    assert training.run(one_nan).skipped_in_a_row == 2
    assert training.run().skipped_in_a_row == 0
    training.run(one_nan)
    training.run(one_nan)
    with pytest.raises(TrainingDivergedError, match=f"3 skipped steps in a row; step 6(.|\n)*{SICK}: non-finite"):
        training.run(one_nan)


def test_what_was_learnt_survives_a_resume() -> None:
    settings = GradientSettings(warmup_steps=20)
    before, after = Training(settings), Training(settings)
    for _ in range(30):
        before.run()
    after.model.load_state_dict(before.model.state_dict())
    after.monitor.load_state_dict(before.monitor.state_dict())
    assert after.monitor.state_dict() == before.monitor.state_dict()
    assert [a.parameter for a in after.run(scaled(1e4)).anomalies] == [SICK]


def test_norms_go_to_the_metrics() -> None:
    written: dict[str, float] = {}

    class Writer:
        def scalars(self, step: int, values: dict[str, float]) -> None:
            assert step == 1
            written.update(values)

    training = Training()
    report = training.run()
    training.monitor.log_gradient_norms(report, Writer())  # type: ignore[arg-type]
    assert written["gradient_norm"] == report.total_norm
    assert written[f"gradient_norm/{SICK}"] == report.norms[SICK]


def _norms_of_rank(rank: int, size: int, folder: str) -> None:
    """A model of sharded and plain parameters, and a stage that rank 1 alone has."""
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    parts = nn.ModuleDict({"sharded": nn.Linear(5, 7), "plain": nn.Linear(5, 7), "stage": nn.Linear(5, 7)})
    if rank == 0:
        del parts["stage"]
    fully_shard(parts["sharded"], mesh=mesh)
    x = torch.ones(3, 5)
    monitor = GradientMonitor(GradientSettings(max_skipped_steps=9))
    sum(part(x).square().sum() for part in parts.values()).backward()
    report = monitor.check_gradient_flow(parts, 1)
    parts["sharded"].weight.grad.to_local()[0, 0] = math.nan if rank == 1 else 1.0
    sick = monitor.check_gradient_flow(parts, 2)
    torch.save((report.norms, [a.parameter for a in sick.anomalies]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_norms_of_whole_parameters_and_on_what_is_sick(tmp_path: Path) -> None:
    spawn(_norms_of_rank, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    whole = nn.ModuleDict({"sharded": nn.Linear(5, 7), "plain": nn.Linear(5, 7), "stage": nn.Linear(5, 7)})
    sum(part(torch.ones(3, 5)).square().sum() for part in whole.values()).backward()
    expected = {name: float(p.grad.norm()) for name, p in whole.named_parameters() if p.grad is not None}
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first == second
    norms, sick = first
    assert norms == pytest.approx(expected, rel=1e-5)
    assert sick == ["sharded.weight"]
