"""The processes that work together, each with its own GPU and its own copy of the model.

A single process is a group of one and runs the same code. Results do not depend on the number of
processes: each process computes some of the packs, and the results are used in the order of the
packs, whichever process computed them.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.functional import pad

from reward.process import LAUNCHER, Fault, one_line

Value = TypeVar("Value")
# How long a process waits for the others. One of them may read, check or write large files alone.
PATIENCE = timedelta(minutes=30)


class Lost(Fault):
    """Another process has ended, so this one cannot continue. The cause is in the other process."""

    elsewhere = True


# This process's rank and the number of processes. torch.distributed may report other numbers,
# because a trainer may call the reward function in each of its own processes, with different texts.
_own: tuple[int, int] | None = None


def size() -> int:
    """The number of processes."""
    return _own[1] if _own else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return _own[0] if _own else 0


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, until all of them are done or `leave`.

    Only the first process prints.
    """
    global _own
    with lost_on_error():
        store, place, count = next(rendezvous("env://", timeout=PATIENCE))
        # The first process must be on the machine where DVC runs, but torchrun orders by address.
        store.set(f"under DVC/{place}", str("DVC_ROOT" in os.environ))
        under_dvc = [store.get(f"under DVC/{each}") == b"True" for each in range(count)]
        first = under_dvc.index(True) if True in under_dvc else 0
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", store),
            rank=(place - first) % count,
            world_size=count,
            timeout=PATIENCE,
        )
    _own = dist.get_rank(), count
    forget_torchrun()
    if not leads():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    yield
    leave()


def leave() -> None:
    """Leave the group once all its processes have come this far; each is then a group of one."""
    global _own
    if _own:
        minimum(0)  # waits for all of them
        dist.destroy_process_group()
        _own = None


def connect() -> None:
    """Let NCCL allocate its own memory while there is some: it would at the first sum on GPUs.

    Raises a Fault if it cannot connect them.
    """
    if size() > 1 and torch.cuda.is_available():
        try:
            dist.all_reduce(torch.zeros(1, device="cuda"))
        except RuntimeError as error:
            raise Fault(f"NCCL cannot connect the GPUs ({one_line(error, 300)})") from None


def forget_torchrun() -> None:
    """Remove torchrun's environment variables.

    Libraries that find them would start distributed training of their own.
    """
    for name in [*os.environ]:
        if name.startswith(("TORCHELASTIC_", "PET_")) or name in (
            *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
            *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
            LAUNCHER,
        ):
            del os.environ[name]


@contextmanager
def lost_on_error() -> Iterator[None]:
    """Raises Lost if another process no longer responds."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Lost(f"another process has ended ({error})") from None


def minimum(value: int) -> int:
    """The minimum of the values that the processes pass."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    with lost_on_error():
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def gathered(value: Value) -> list[Value]:
    """The values that the processes pass, in the order of the processes."""
    found = [value] * size()
    if size() > 1:
        with lost_on_error():
            dist.all_gather_object(found, value)
    return found


def require_same(content: Mapping[str, object]) -> None:
    """Raises a Fault unless all processes, possibly on several machines, have equal content."""
    for place, (host, found) in enumerate(gathered((gethostname(), content))):
        if differing := sorted(name for name in content if found[name] != content[name]):
            raise Fault(
                f"process {place} on {host} has different {', '.join(differing)} than process "
                f"{rank()} on {gethostname()}; use the same files, code and libraries on all "
                "machines"
            )


def from_first(value: Value) -> Value:
    """The value that the first process passes."""
    found = [value]
    if size() > 1:
        with lost_on_error():
            dist.broadcast_object_list(found, src=0)
    return found[0]


def folder_from_first(path: Path | None, home: Path) -> Path | None:
    """The folder that the first process passes, if any; the others get a copy in `home`."""
    content = None
    if leads() and size() > 1 and path:
        content = path.name, {each.name: each.read_bytes() for each in path.iterdir()}
    content = from_first(content)
    if leads() or content is None:
        return path
    name, files = content
    received = home / name
    received.mkdir()
    for file, written in files.items():
        (received / file).write_bytes(written)
    return received


def summed(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in no particular order."""
    if size() > 1:
        with lost_on_error():
            dist.all_reduce(tensor)
    return tensor


class PlainSum:
    """The sum of the tensors of all processes. Each process first adds up its own.

    The order of the additions, and so the rounding, depends on the number of processes. Only one
    tensor per process is communicated.
    """

    def __init__(self) -> None:
        self.own: Tensor | None = None

    def add(self, tensor: Tensor, count: int) -> None:
        """Add this process's tensor if its rank is below `count`: [numbers], fp32."""
        if self.own is None:
            self.own = torch.zeros_like(tensor)
        if rank() < count:
            self.own += tensor

    def total(self) -> Tensor:
        """The sum, in every process."""
        assert self.own is not None
        return summed(self.own)


class OrderedSum:
    """The sum of numbered tensors in the order of their numbers, whichever process computed them.

    A sum of floats depends on the order of its terms, so no process adds up its own tensors.
    Instead, each process is responsible for one slice of the numbers: it receives that slice of
    every tensor and adds the slices in order. `total` then collects the summed slices in every
    process. Each process sends and receives as many numbers as its own tensors have, plus the sum.
    """

    def __init__(self) -> None:
        self.length = 0
        self.slice: Tensor | None = None

    def add(self, tensor: Tensor, count: int) -> None:
        """Add the next `count` tensors, one from each of the first `count` processes.

        The tensors are [numbers], fp32. The other processes pass a tensor of the same length, which
        is ignored. The caller must not use the tensor afterwards.
        """
        self.length = len(tensor)
        for part in exchanged(tensor)[:count]:
            self.slice = part if self.slice is None else self.slice.add_(part)

    def total(self) -> Tensor:
        """The sum, in every process."""
        assert self.slice is not None
        if size() == 1:
            return self.slice
        whole = self.slice.new_empty(size(), len(self.slice))
        with lost_on_error():
            dist.all_gather([*whole], self.slice)
        return whole.flatten()[: self.length]


def exchanged(tensor: Tensor) -> Tensor:
    """This process's slice of every process's tensor: [processes, numbers per slice].

    The tensor is padded with zeros, because all slices must have the same length.
    """
    if size() == 1:
        return tensor[None]
    sliced = pad(tensor, (0, -len(tensor) % size()))
    found = torch.empty_like(sliced)
    with lost_on_error():
        dist.all_to_all_single(found, sliced)
    return found.view(size(), -1)
