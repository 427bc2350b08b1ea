"""One process or several (torchrun): who am I, on which device, and the few collective operations that trainers need.

Every function works alone too, where it leaves its argument as it is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor


class Process(NamedTuple):
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device
    is_main: bool  # rank 0: the one that writes


def start(device: str = "auto") -> Process:
    """Join the processes that torchrun started, or stand alone. `device`: auto (CUDA if there is one), cpu, cuda, cuda:1, ...

    Raises RuntimeError from torch if a device is asked for that does not exist. End with `stop`.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = (
            False  # ten bits of mantissa are too few for the gradient penalty; blocks that allow it use float16
        )
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Process(rank, world_size, chosen, is_main=rank == 0)


def stop() -> None:
    """Leave the group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in one message a data type.

    A parameter without a gradient counts as zero where another process has one, so all processes then take the same step; one that has
    none anywhere stays without, and the optimiser passes it over as it does in a process alone.
    """
    if not torch.distributed.is_initialized():
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    reached = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8, device=trained[0].device)
    torch.distributed.all_reduce(reached, op=torch.distributed.ReduceOp.MAX)
    trained = [parameter for parameter, flag in zip(trained, reached.tolist(), strict=True) if flag]
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        same = [parameter for parameter in trained if parameter.dtype == dtype]
        for parameter in same:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in same])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for parameter, mean in zip(same, flat.split([parameter.numel() for parameter in same]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))


def average_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor (running means that every process moves by its own samples) with its mean over the processes."""
    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= torch.distributed.get_world_size()


def mean_scalars(values: Mapping[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """The mean of each number over the processes; all give the same names."""
    if not values:
        return {}
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in values.values()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
        numbers /= torch.distributed.get_world_size()
    return dict(zip(values, numbers.tolist(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """True everywhere if it is true anywhere: how processes agree to stop together."""
    if not torch.distributed.is_initialized():
        return flag
    shared = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


class StopSignal:
    """Within `with StopSignal() as stop:`, SIGTERM sets `stop.requested` instead of ending the process.

    A trainer then saves its checkpoint at the end of the step. Only for a program's main thread.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
