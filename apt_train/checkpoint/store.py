"""Writes a run's checkpoints and finds the one to go on from.

A checkpoint is a folder ``step-00000120``. All ranks write into ``.step-00000120``, each its own part of weights and
optimizer state (torch's distributed checkpoint, by names that do not depend on parallelism); when all parts are safe on
disk with their checksums, the first rank writes the manifest and renames the folder. So a folder with the final name is
whole, whatever moment the processes died at; that it still is what was written, its checksums tell.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from apt_core.errors import CheckpointError, ConfigError
from apt_core.file_sum import FileSum
from apt_train.checkpoint.manifest import Manifest, sync_file, sync_folder
from apt_train.checkpoint.settings import CheckpointSettings
from apt_train.state import RunState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""In the run's folder."""
REST = "run.pt"
"""What is small and the same on all ranks."""
SETTINGS = "settings.json"
"""The run's."""
_PREFIX = "step-"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A folder that was completed; its files may have been damaged since."""

    folder: Path
    step: int


class CheckpointStore:
    """The checkpoints of one run. All ranks make one and call it alike.

    Args:
        run_folder: shared by all ranks.
        run_settings: of the run, by section; kept with each checkpoint as JSON.
        retry: calls a function that reads or writes files, again where a fault may pass.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        run_folder: Path,
        run_settings: Mapping[str, Any],
        retry: Callable[[Callable[[], None]], None] = lambda call: call(),
    ) -> None:
        self._settings = settings
        self._run_settings: dict[str, Any] = json.loads(json.dumps(run_settings, default=str))
        self._folder = run_folder / FOLDER
        self._retry = retry
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        """Of its own: the writing thread meets the other ranks' while the main threads meet, too."""
        self._rank = dist.get_rank() if self._group is not None else 0
        self._num_ranks = dist.get_world_size() if self._group is not None else 1
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="apt-checkpoint")
        self._running: Future[None] | None = None
        self._last_step = -1

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs behind this many steps."""
        return step > 0 and any(n and step % n == 0 for n in (self._settings.every, self._settings.temporary_every))

    def save_last(self, state: RunState) -> Path:
        """Write the state a run ends with, if it is not there yet; its folder, complete.

        Raises:
            CheckpointError: as ``save``.
        """
        self.save(state, is_last=True)
        self.wait()
        return self._path(state.step)

    def save(self, state: RunState, *, is_last: bool = False) -> None:
        """Wait for the one before, copy the state, and write it, in the background unless ``asynchronous`` is off.

        Raises:
            CheckpointError: this one, or the one before, cannot be written; or the weights are not finite, so that no
                good checkpoint makes way for them.
        """
        self.wait()
        if state.step == self._last_step:
            return
        is_kept = is_last or bool(self._settings.every and state.step % self._settings.every == 0)
        self._require_finite(state)
        tensors, rest = _copied(state)
        self._last_step = state.step
        self._running = self._writer.submit(self._write, tensors, rest, state.step, not is_kept)
        if not self._settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is safe on disk.

        Raises:
            CheckpointError: it cannot be written.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """As ``wait``; ends the writing thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(self, state: RunState) -> StoredCheckpoint | None:
        """Bring the state to where the settings say the run begins; None where nothing is to be restored.

        Raises:
            ConfigError: the checkpoint to go on from does not exist, or there are some where none are expected.
            CheckpointError: it is damaged, and settings allow no older one; names the file.
        """
        self._on_first_rank(self._clear)
        chosen: StoredCheckpoint | None = self._on_first_rank(self._chosen)
        if chosen is None:
            return None
        self._check_settings(chosen.folder)
        tensors, _ = _state_dicts(state)
        reader = FileSystemReader(chosen.folder)
        try:
            with own_faults():
                load_distributed(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"does not fit this run: {error}", file=chosen.folder) from error
        rest = torch.load(chosen.folder / REST, weights_only=True)
        for name, part in state.parts().items():
            part.load_state_dict(tensors[name] if name in tensors else rest[name])
        self._last_step = state.step
        self._on_first_rank(lambda: self._set_aside(state.step))
        return chosen

    def stored(self) -> list[StoredCheckpoint]:
        """All that were completed, the newest first."""
        if not self._folder.is_dir():
            return []
        found = [
            StoredCheckpoint(each, int(each.name.removeprefix(_PREFIX)))
            for each in self._folder.iterdir()
            if each.name.startswith(_PREFIX) and each.name.removeprefix(_PREFIX).isdigit()
        ]
        return sorted(found, key=lambda each: each.step, reverse=True)

    def _clear(self) -> None:
        """Remove what a run that was killed had not finished writing, or removing."""
        for leftover in self._folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(leftover)

    def _check_settings(self, folder: Path) -> None:
        """The model must be the one that was trained; all else may change."""
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        for section in ("model", "lora"):
            for name, now in self._run_settings[section].items():
                if (then := stored[section].get(name)) != now:
                    message = f"is {now!r}, and was {then!r} in the checkpoint to go on from, {folder}"
                    raise ConfigError(message, field=f"{section}.{name}")

    def _set_aside(self, step: int) -> None:
        """What an older checkpoint makes obsolete is kept under another name, so that it is not gone on from."""
        for each in self.stored():
            if each.step > step:
                other = each.folder.with_name(f"aside-{each.folder.name}-{time.time_ns()}")
                log.warning("%s is newer than where the run goes on from, and is now %s", each.folder, other.name)
                each.folder.rename(other)

    def _chosen(self) -> StoredCheckpoint | None:
        resume, stored = self._settings.resume, self.stored()
        if resume == "never":
            if stored:
                message = f"{self._folder} has checkpoints; name another run.folder, or resume"
                raise ConfigError(message, field="checkpoint.resume")
            return None
        if resume != "latest":
            folder = Path(resume)
            if not folder.is_dir():
                raise ConfigError(f"{folder} does not exist", field="checkpoint.resume")
            return self._checked(folder)
        for each in stored:
            try:
                return self._checked(each.folder)
            except CheckpointError as error:
                if not self._settings.allow_older:
                    message = f"{error}; checkpoint.allow_older goes on from the one before"
                    raise CheckpointError(message, file=each.folder) from None
                log.error("a checkpoint cannot be used, going on from the one before: %s", error)
        if stored:
            raise CheckpointError("none of the checkpoints can be used", file=self._folder)
        return None

    def _checked(self, folder: Path) -> StoredCheckpoint:
        manifest = Manifest.read(folder)
        manifest.check(folder)
        return StoredCheckpoint(folder, manifest.step)

    def _path(self, step: int) -> Path:
        return self._folder / f"{_PREFIX}{step:08d}"

    def _require_finite(self, state: RunState) -> None:
        """On all ranks alike, as each may hold other parts of the weights."""
        weights = state.parts()["model"].state_dict()
        bad = [n for n, w in weights.items() if w.is_floating_point() and not bool(_local(w).isfinite().all())]
        gathered: list[Any] = [bad]
        if self._group is not None:
            gathered = [None] * self._num_ranks
            dist.all_gather_object(gathered, bad, group=self._group)
        for name in (name for part in gathered for name in part):
            message = "is not finite: no checkpoint is written, and the ones before stay"
            raise CheckpointError(message, file=f"weights after step {state.step}", field=name)

    def _write(self, tensors: dict[str, Any], rest: dict[str, Any], step: int, is_temporary: bool) -> None:
        """In the writing thread, on all ranks."""
        final = self._path(step)
        unfinished = final.with_name(f".{final.name}")

        def write() -> None:
            self._on_first_rank(lambda: _make_anew(unfinished))
            writer = FileSystemWriter(unfinished)
            with own_faults():
                save_distributed(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            self._on_first_rank(lambda: self._write_rest(rest, unfinished))
            sums = self._own_sums(unfinished)
            self._on_first_rank(lambda: self._complete(unfinished, final, step, is_temporary, sums))

        try:
            self._retry(write)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot be written: {error}", file=final) from error

    def _write_rest(self, rest: dict[str, Any], folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(self._run_settings, indent=1), encoding="utf-8")
        torch.save(rest, folder / REST)
        for name in (SETTINGS, REST):
            sync_file(folder / name)

    def _own_sums(self, folder: Path) -> dict[str, FileSum]:
        """Checksums of all files, each computed by the rank that wrote it."""
        sums: dict[str, FileSum] | OSError
        try:
            names = [f.name for f in folder.iterdir()]
            mine = [n for n in names if n.startswith(f"__{self._rank}_") or (self._rank == 0 and n[:2] != "__")]
            sums = {name: FileSum.of(folder / name) for name in sorted(mine)}
        except OSError as error:
            sums = error
        gathered: list[Any] = [sums]
        if self._group is not None:
            gathered = [None] * self._num_ranks
            dist.all_gather_object(gathered, sums, group=self._group)
        for part in gathered:
            if isinstance(part, OSError):
                raise part
        return {name: each for part in gathered for name, each in part.items()}

    def _complete(
        self, unfinished: Path, final: Path, step: int, is_temporary: bool, sums: Mapping[str, FileSum]
    ) -> None:
        Manifest(step, is_temporary, self._num_ranks, sums).write(unfinished)
        unfinished.rename(final)
        sync_folder(self._folder)
        self._rotate(step)

    def _rotate(self, newest: int) -> None:
        """Remove what is older than the newest, which is known to be good, and not to be kept."""
        kept = 0
        for each in self.stored():
            try:
                is_temporary = Manifest.read(each.folder).is_temporary
            except CheckpointError:
                continue  # not ours to judge
            kept += not is_temporary
            is_surplus = is_temporary or (self._settings.keep and kept > self._settings.keep)
            if each.step < newest and is_surplus:
                _remove(each.folder)

    def _on_first_rank(self, call: Callable[[], Any]) -> Any:
        """What the first rank's call returns or raises, on all ranks."""
        if self._group is None:
            return call()
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = call()
            except (OSError, CheckpointError, ConfigError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _state_dicts(state: RunState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(What holds tensors of the model's size, the rest)."""
    parts = {name: part.state_dict() for name, part in state.parts().items()}
    tensors = {name: parts.pop(name) for name in ("model", "optimizers")}
    return tensors, parts


def _copied(state: RunState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state as it is now, on the processor, whatever later steps do."""
    copied: tuple[dict[str, Any], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, lambda x: x.detach().to("cpu", copy=True), _state_dicts(state)
    )
    return copied


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _make_anew(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


@contextmanager
def own_faults() -> Iterator[None]:
    """Around torch's saving and loading: what it gathers from all ranks becomes the fault of the first of them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # we know who is alone
            yield
    except CheckpointException as error:
        first = min(error.failures)
        raise error.failures[first][0] from error


def _remove(folder: Path) -> None:
    """First take its name, so that no half of a checkpoint is left under it."""
    leaving = folder.with_name(f".{folder.name}.old")
    try:
        folder.rename(leaving)
        shutil.rmtree(leaving)
    except OSError as error:
        log.warning("an old checkpoint cannot be removed: %s", error)
