"""The step: what it computes does not depend on how its batch is divided."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_train.config import OptimizerSettings
from apt_train.loop import EarlyStopping, Trainer
from apt_train.loss import ModelWithLoss
from apt_train.model import initialise
from apt_train.monitor.gradients import GradientMonitor, GradientSettings
from apt_train.optimizer import build_optimizers
from tests.apt_train.corpus import spans, text_batch

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def new_model(dtype: torch.dtype = torch.float64, config: ModelConfig = CONFIG) -> ModelWithLoss:
    torch.manual_seed(0)
    model = DecoderForCausalLM(config)
    initialise(model, 0.1)
    return ModelWithLoss(model.to(dtype))


def new_trainer(model, *, name="adamw", precision="float64", learning_rate=1e-2, **options) -> Trainer:
    optimizers = build_optimizers(model, OptimizerSettings(name=name))
    return Trainer(
        model, optimizers, lambda step: learning_rate, device=torch.device("cpu"), precision=precision, **options
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learns_real_text(name):
    trainer = new_trainer(new_model(torch.float32), name=name, precision="float32", max_grad_norm=1.0)
    losses = [trainer.step(i, [text_batch(i % 4)]).loss for i in range(40)]
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_learns_in_sixteen_bits(precision):
    trainer = new_trainer(new_model(torch.float32), precision=precision)
    results = [trainer.step(i, [text_batch(i % 4)]) for i in range(40)]
    assert results[-1].loss < 0.6 * results[0].loss
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_loss_and_gradient_are_those_of_whole_logits_of_each_sequence_alone():
    model, batch = new_model(), text_batch(3)
    losses, right = model(batch, with_accuracy=True)
    losses.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected, num_right = torch.zeros((), dtype=torch.float64), 0
    for span in spans(batch):
        alone = replace(
            batch, input_ids=batch.input_ids[span], labels=batch.labels[span], lengths=(len(batch.input_ids[span]),)
        )
        hidden = model.model(model.model.embed(alone.input_ids), alone.positions, alone.metadata())
        logits = model.model.logits(hidden)
        num_right += int((logits.argmax(-1) == alone.labels).sum())
        expected = expected + torch.nn.functional.cross_entropy(logits, alone.labels, reduction="sum")
    expected.backward()
    assert int(right) == num_right
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])


def test_accumulated_micro_batches_weigh_every_token_alike():
    first, second = text_batch(1), text_batch(4, lengths=(5, 3))
    assert first.num_scored != second.num_scored
    model = new_model()
    total = sum(model(batch)[0] for batch in (first, second)) / (first.num_scored + second.num_scored)
    total.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    trainer = new_trainer(model)
    result = trainer.step(0, [first, second])
    assert result.loss == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_gradients_are_clipped_to_their_norm_over_all_parameters():
    model = new_model()
    result = new_trainer(model, max_grad_norm=1e-3).step(0, [text_batch(0)])
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert result.gradient_norm > 1e-2
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    model = new_model()
    trainer = new_trainer(model)
    trainer.step(0, [text_batch(0)])
    model.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    assert trainer.step(1, [text_batch(1)]).is_skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_accuracy_is_the_share_of_scored_tokens_that_were_the_likeliest():
    trainer = new_trainer(new_model(torch.float32), precision="float32")
    batches = [text_batch(0), text_batch(1)]
    results = [trainer.step(i, batches, with_accuracy=i == 39) for i in range(40)]
    assert [result.accuracy for result in results[:-1]] == [None] * 39
    assert results[-1].accuracy > 0.9
    found = trainer.evaluate(batches)
    assert found.accuracy > 0.9
    assert found.num_scored == sum(batch.num_scored for batch in batches)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_a_loss_scale_that_is_too_large_is_lowered_and_stops_nothing():
    model = new_model(torch.float32)
    trainer = new_trainer(model, precision="float16", monitor=GradientMonitor(GradientSettings(max_skipped_steps=2)))
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    results = [trainer.step(i, [text_batch(i % 4)]) for i in range(40)]
    skipped = [result.is_skipped for result in results]
    assert all(skipped[:3]) and not any(skipped[35:])
    assert trainer.scaler.get_scale() < 2.0**38


def test_a_step_without_scored_tokens_has_no_loss():
    batch = text_batch(0)
    result = new_trainer(new_model()).step(0, [replace(batch, labels=torch.full_like(batch.labels, -100))])
    assert (result.loss, result.num_scored, result.gradient_norm) == (0.0, 0, 0.0)


def test_evaluation_is_the_mean_over_tokens_and_leaves_no_gradient():
    model = new_model()
    batches = [text_batch(1), text_batch(4, lengths=(5, 3))]
    with torch.no_grad():
        expected = sum(float(model(b)[0]) for b in batches) / sum(b.num_scored for b in batches)
    trainer = new_trainer(model)
    # Without gradients the norms may be computed by other kernels.
    assert trainer.evaluate(batches).loss == pytest.approx(expected, rel=1e-9)
    assert math.isnan(trainer.evaluate([]).loss)
    assert all(p.grad is None for p in model.parameters())


def test_stops_after_as_many_evaluations_without_improvement():
    stopping = EarlyStopping(patience=2, min_improvement=0.1)
    assert [stopping.should_stop(loss) for loss in (3.0, 2.0, 1.95, 1.8, 1.79, 1.78)] == [False] * 5 + [True]


def test_never_stops_without_patience():
    stopping = EarlyStopping(patience=0, min_improvement=0.0)
    assert not any(stopping.should_stop(1.0) for _ in range(9))
