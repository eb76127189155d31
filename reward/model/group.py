"""The processes that work together, each with a GPU and a copy of the model of its own.

A process that works alone is a group of one, and takes the same way. What is computed does not
depend on the number of processes: each of them does some of the packs, and what comes of a pack
has its place in the order of all packs, whoever computed it.
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

from reward.process import LAUNCHER, Fault

Value = TypeVar("Value")
# How long a process waits for the others: one may read, check or write large files alone.
PATIENCE = timedelta(minutes=30)


class Lost(Fault):
    """Another process has ended, so that this one cannot go on: the fault is not here."""

    elsewhere = True


# Rank and number of the processes. Those of torch.distributed may be somebody else's: of a trainer
# that calls the reward function in each of its processes with texts of its own.
_own: tuple[int, int] | None = None


def size() -> int:
    """The number of processes."""
    return _own[1] if _own else 1


def rank() -> int:
    """The place of this process among them, from 0."""
    return _own[0] if _own else 0


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun has started, until they all are done.

    Only the first process prints.
    """
    global _own
    with talking():
        store, place, count = next(rendezvous("env://", timeout=PATIENCE))
        # DVC is at work on the machine whose process is to be the first: torchrun sorts by address.
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
    with alone():
        if not leads():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        yield
        least(0)
    dist.destroy_process_group()
    _own = None


@contextmanager
def alone() -> Iterator[None]:
    """Take away the variables of torchrun.

    Libraries that find them would do their own part of a distributed training, which is not needed.
    """
    for name in [*os.environ]:
        if name.startswith(("TORCHELASTIC_", "PET_")) or name in (
            *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
            *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
            LAUNCHER,
        ):
            del os.environ[name]
    yield


@contextmanager
def talking() -> Iterator[None]:
    """Raises Lost where another process does not answer any more."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Lost(f"another process of the training has ended ({error})") from None


def least(value: int) -> int:
    """The least of the values that the processes give."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    with talking():
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def gathered(value: Value) -> list[Value]:
    """What each of the processes gives, in their order."""
    found = [value] * size()
    if size() > 1:
        with talking():
            dist.all_gather_object(found, value)
    return found


def require_same(content: Mapping[str, object]) -> None:
    """Raises a Fault unless the processes, which may be of several machines, have equal content."""
    for place, (host, found) in enumerate(gathered((gethostname(), content))):
        if differing := sorted(name for name in content if found[name] != content[name]):
            raise Fault(
                f"process {place} on {host} has other {', '.join(differing)} than process {rank()} "
                f"on {gethostname()}; expected the same files, code and libraries on all machines"
            )


def of_first(value: Value) -> Value:
    """What the first process gives."""
    found = [value]
    if size() > 1:
        with talking():
            dist.broadcast_object_list(found, src=0)
    return found[0]


def folder_of_first(path: Path | None, home: Path) -> Path | None:
    """A folder that the first process gives, if it does; the others get its files in `home`."""
    content = None
    if leads() and size() > 1 and path:
        content = path.name, {each.name: each.read_bytes() for each in path.iterdir()}
    content = of_first(content)
    if leads() or content is None:
        return path
    name, files = content
    received = home / name
    received.mkdir()
    for file, written in files.items():
        (received / file).write_bytes(written)
    return received


def summed(tensor: Tensor) -> Tensor:
    """The sum of what the processes give; in which order is not said."""
    if size() > 1:
        with talking():
            dist.all_reduce(tensor)
    return tensor


class PlainSum:
    """The sum of the tensors of all processes, each of which adds up its own first.

    The order, and so the rounding, depends on their number. Only the sum travels.
    """

    def __init__(self) -> None:
        self.own: Tensor | None = None

    def add(self, tensor: Tensor, count: int) -> None:
        """Add this process's tensor, if it is one of the first `count`: [numbers], fp32."""
        if self.own is None:
            self.own = torch.zeros_like(tensor)
        if rank() < count:
            self.own += tensor

    def total(self) -> Tensor:
        """The sum, in every process."""
        if self.own is None:
            raise ValueError("nothing was added")
        return summed(self.own)


class OrderedSum:
    """The sum of numbered tensors in the order of their numbers, whichever process has which.

    Sums of floats depend on the order. So no process adds up what it has: each gets the same slice
    of all tensors, and adds that up. A process sends and receives as much as it has, and the sum.
    """

    def __init__(self) -> None:
        self.length = 0
        self.slice: Tensor | None = None

    def add(self, tensor: Tensor, count: int) -> None:
        """Add the next `count` tensors, one of each of the first processes: [numbers], fp32.

        The other processes give one of the same length, which does not count. It is given away.
        """
        self.length = len(tensor)
        for part in exchanged(tensor)[:count]:
            self.slice = part if self.slice is None else self.slice.add_(part)

    def total(self) -> Tensor:
        """The sum, in every process."""
        if self.slice is None:
            raise ValueError("nothing was added")
        if size() == 1:
            return self.slice
        whole = self.slice.new_empty(size(), len(self.slice))
        with talking():
            dist.all_gather([*whole], self.slice)
        return whole.flatten()[: self.length]


def exchanged(tensor: Tensor) -> Tensor:
    """This process's slice of the tensor of every process: [processes, numbers of a slice]."""
    if size() == 1:
        return tensor[None]
    sliced = pad(tensor, (0, -len(tensor) % size()))
    found = torch.empty_like(sliced)
    with talking():
        dist.all_to_all_single(found, sliced)
    return found.view(size(), -1)
