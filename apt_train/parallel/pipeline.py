"""Pipeline parallelism (arXiv 1806.03377): each process has some of the layers, and hidden states travel.

All processes of a pipeline read the same micro-batches, so that positions, borders of sequences and labels need not
travel. Micro-batches of a step are padded to one length: shapes are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor

from apt_core.models.decoder import DecoderForCausalLM
from apt_train.loss import Batch, ModelWithLoss
from apt_train.parallel.padding import padded, unscored
from apt_train.parallel.stage import StackedBatches, Stage
from apt_train.parallel.tensor import complete_gradients

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class Pipeline(ModelWithLoss):
    """This process's stages of a model, run together with the others'.

    ``model`` is what is left of the whole one: its parameters have the names they have there, each process has some of
    them, and a tied embedding is on the first and on the last stage's process, the same bit for bit. So a state dict of
    all processes together is that of the whole model, and a layout of a checkpoint is no matter of the pipeline.

    Args:
        whole: the same on all processes; it is taken apart.
        group: the processes of this pipeline, by their place in it.
        schedule: name of one of torch's schedules.
        num_stages: over all processes, at most as many as layers.
        multiple: of which the tokens of a micro-batch must be one; hidden states have T/multiple rows.
    """

    def __init__(
        self, whole: ModelWithLoss, group: dist.ProcessGroup, *, schedule: str, num_stages: int, multiple: int = 1
    ) -> None:
        super().__init__(whole.model)
        self.head_loss = whole.head_loss
        self.group = group
        self._schedule_class = get_schedule_class(schedule)
        self._is_in_rounds = schedule.startswith("Interleaved")
        self._multiple = multiple
        size, rank = group.size(), group.rank()
        self._owners = [_owner(index, size, is_v=schedule == "ZBVZeroBubble") for index in range(num_stages)]
        layers = even_parts(self.model.config.num_layers, num_stages)
        own = [index for index, owner in enumerate(self._owners) if owner == rank]
        self.stages: tuple[Stage, ...] = tuple(Stage(self, layers[index], index, num_stages) for index in own)
        """In a tuple, not as children: their modules are those of ``model``."""
        _keep_only(self.model, self.stages)
        self._schedules: dict[tuple[int, ...], Schedule] = {}

    def backward(
        self, batches: Sequence[Batch], scale: torch.Tensor, *, autocast: torch.dtype | None, with_accuracy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the micro-batches' losses times scale [].

        Returns:
            What `ModelWithLoss.forward` does, summed over all micro-batches; the same on all processes of the pipeline.
        """
        stacked = self._stacked(self._filled_up(batches))
        found: list[torch.Tensor] = []

        def loss(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            found.append(output.detach())
            return (output[0] * scale).to(output.dtype)

        schedule = self._schedule(stacked)
        schedule._loss_fn = loss
        first = (stacked.input_ids,) if self._owners[0] == self.group.rank() else ()
        schedule.step(
            *first,
            target=stacked.labels,
            return_outputs=False,
            positions=stacked.positions,
            cu_seqlens=stacked.cu_seqlens,
            labels=stacked.labels,
            autocast=autocast,
            with_accuracy=with_accuracy,
        )
        complete_gradients(self)
        self._sum_tied_gradients()
        sums = torch.stack(found).double().sum(0) if found else stacked.labels.new_zeros(2, dtype=torch.float64)
        return self._of_last(sums)

    def forward(self, batch: Batch, with_accuracy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the whole model, without gradients; stages compute one after another."""
        stacked = self._stacked([batch])
        rank = self.group.rank()
        autocast = torch.get_autocast_dtype(stacked.labels.device.type) if torch.is_autocast_enabled() else None
        layout = (stacked.positions, stacked.cu_seqlens, stacked.labels)
        x = stacked.input_ids
        for stage in self.stages:
            source, target = stage.index - 1, stage.index + 1
            if source >= 0 and self._owners[source] != rank:
                x = self._hidden(stacked)
                dist.recv(x, group=self.group, group_src=self._owners[source])
            x = stage(x, *layout, autocast=autocast, with_accuracy=with_accuracy)
            if target < len(self._owners) and self._owners[target] != rank:
                dist.send(x.contiguous(), group=self.group, group_dst=self._owners[target])
        return self._of_last(x.double() if rank == self._owners[-1] else x.new_zeros(2, dtype=torch.float64))

    def counted_parameters(self) -> list[nn.Parameter]:
        """Those of ``model``, save for a copy that another process counts."""
        tied = self._tied_weight()
        is_copy = tied is not None and self._owners[0] != self.group.rank()
        return [p for p in self.parameters() if not (is_copy and p is tied)]

    def norm_of_all(self, norm: torch.Tensor) -> torch.Tensor:
        """The L2 norm [] over all stages, of those over the counted parameters of each process."""
        square = norm.detach().double().square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def _stacked(self, batches: Sequence[Batch]) -> StackedBatches:
        longest = max(len(batch.input_ids) for batch in batches)
        num_tokens = -(-longest // self._multiple) * self._multiple
        return StackedBatches.of([padded(batch, num_tokens) for batch in batches])

    def _filled_up(self, batches: Sequence[Batch]) -> list[Batch]:
        """With micro-batches that do not count, where the data has ended before a round of the schedule has."""
        size = self.group.size()
        least = max(len(batches), len(self._owners))
        missing = -(-least // size) * size - len(batches) if self._is_in_rounds else 0
        return [*batches, *[unscored(batches[0])] * missing]

    def _hidden(self, stacked: StackedBatches) -> torch.Tensor:
        """Room for what travels, [T/multiple, C]."""
        weight = next(iter(self.model.parameters()))
        rows = stacked.input_ids.shape[1] // self._multiple
        return torch.empty(rows, self.model.config.hidden_size, dtype=weight.dtype, device=stacked.labels.device)

    def _schedule(self, stacked: StackedBatches) -> Schedule:
        """Of so many micro-batches of such a size."""
        key = tuple(stacked.input_ids.shape)
        if key not in self._schedules:
            stages = [self._torch_stage(stage, stacked) for stage in self.stages]
            is_single = issubclass(self._schedule_class, PipelineScheduleSingle)
            self._schedules[key] = self._schedule_class(
                stages[0] if is_single else stages,
                n_microbatches=key[0],
                loss_fn=lambda output, _: output,
                scale_grads=False,
            )
        return self._schedules[key]

    def _torch_stage(self, stage: Stage, stacked: StackedBatches) -> PipelineStage:
        hidden = self._hidden(stacked).requires_grad_()
        return PipelineStage(
            stage,
            stage.index,
            len(self._owners),
            stacked.labels.device,
            input_args=stacked.input_ids[:1] if stage.index == 0 else hidden,
            output_args=hidden.new_empty(2).requires_grad_() if stage.is_last else hidden,
            group=self.group,
        )

    def _of_last(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(Loss, likeliest labels) [2] of the last stage's process, to all."""
        dist.broadcast(sums, group=self.group, group_src=self._owners[-1])
        return sums[0], sums[1].round().long()

    def _tied_weight(self) -> nn.Parameter | None:
        """The embedding that is the head as well, where this process has either."""
        has_either = any(stage.index == 0 or stage.is_last for stage in self.stages)
        if not has_either or not self.model.config.tie_word_embeddings:
            return None
        return self.model.model.embed_tokens.get_parameter("weight")

    def _sum_tied_gradients(self) -> None:
        """A tied embedding's gradient is that of the first stage plus that of the last."""
        ends = {self._owners[0], self._owners[-1]}
        weight = self._tied_weight()
        if weight is None or weight.grad is None or len(ends) == 1:
            return
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        other = torch.empty_like(gradient)
        (peer,) = ends - {self.group.rank()}
        exchange = [
            dist.P2POp(dist.isend, gradient.contiguous(), group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        gradient += other


def even_parts(num_layers: int, num_stages: int) -> list[range]:
    """Consecutive layers of each stage; the middle gets what is left over, as embedding and head are at the ends."""
    share, rest = divmod(num_layers, num_stages)
    first = (num_stages - rest) // 2
    sizes = [share + (first <= stage < first + rest) for stage in range(num_stages)]
    ends = list(accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _owner(stage: int, size: int, *, is_v: bool) -> int:
    """Which process has a stage: in turns, or there and back (V)."""
    if is_v and (stage // size) % 2:
        return size - 1 - stage % size
    return stage % size


def _keep_only(model: DecoderForCausalLM, stages: Sequence[Stage]) -> None:
    """Take what no stage has from a model; the rest keeps its names."""
    has_head = any(stage.is_last for stage in stages)
    decoder, kept = model.model, {id(module) for stage in stages for module in stage.modules()}
    layers = nn.ModuleList()
    for name, layer in decoder.layers.named_children():
        if id(layer) in kept:
            layers.add_module(name, layer)
    decoder.layers = layers
    for name in ("embed_tokens", "norm"):
        if id(getattr(decoder, name)) not in kept:
            delattr(decoder, name)
    if not has_head:
        model.lm_head = None
