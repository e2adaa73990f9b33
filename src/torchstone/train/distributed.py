"""Processes that train together: ranks of torchrun, each with its rows of every global batch.

The global batch of a step is one list of sequences, whatever the number of processes; rank r of w takes rows
[r·B/w, (r+1)·B/w). Gradients are summed over ranks and divided by the number of targets in the global batch, so that
the update equals that of one process up to float error.

On CPUs the back end is gloo, on GPUs nccl. The GPU path (nccl, pinned batches, copies that do not wait) has not been
run on GPUs yet.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.train.precision import default_device

TIMEOUT = timedelta(minutes=30)  # of one exchange; the leading rank may build data while the others wait


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True for the one process that writes files and shows progress."""
        return self.rank == 0

    def rows(self, sequences: int) -> tuple[int, int]:
        """This rank's rows of a global batch; raises ConfigError if ranks cannot share it evenly."""
        if sequences % self.size:
            raise ConfigError(
                f"batch.sequences = {sequences} cannot be shared by {self.size} processes; make it a multiple of "
                f"{self.size}, or start another number of processes."
            )
        share = sequences // self.size
        return self.rank * share, (self.rank + 1) * share

    def place(self, batch: Batch) -> Batch:
        """The batch on this rank's device; a GPU copies it from pinned memory while the host goes on."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        return batch.map(Tensor.pin_memory).to(self.device)

    def total(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, values_n: Tensor) -> Tensor:
        """The ranks' values, joined in the order of ranks, which is that of the global batch; their numbers may differ."""
        if self.size == 1:
            return values_n
        counts = torch.zeros(self.size, dtype=torch.long, device=values_n.device)
        counts[self.rank] = len(values_n)
        dist.all_reduce(counts)
        padded = values_n.new_zeros(int(counts.max()))
        padded[: len(values_n)] = values_n
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts.tolist(), strict=True)])

    def any(self, flag: bool) -> bool:
        """True if the flag is set on any rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over ranks by DDP."""
        if self.size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def world(device: torch.device | None = None) -> Iterator[World]:
    """The world that torchrun describes in the environment, or a single process.

    A group is joined once and left when the process ends: a second group of the same processes finds the first one's
    keys in torchrun's store and may hang. A group that the caller has joined already is used and left alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = device or default_device()
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    yield World(dist.get_rank(), size, chosen)


def _leave() -> None:
    """Leave the group. What DDP holds of it is freed first: freed after it, at the end of the process, it aborts."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
