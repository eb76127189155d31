"""Run a stage in several processes, on one or more machines. The stage calls torchrun itself.

The number of processes is set in torchrun's environment variables, not in params.yaml, because it
does not change a byte of the result. By default there is one process for each visible GPU.

    CUDA_VISIBLE_DEVICES=0,1 dvc repro
    PET_NPROC_PER_NODE=2 dvc repro
    PET_NNODES=2 PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=head:29400 python -m stages.train
"""

import logging
import math
import os
import signal
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import elastic_launch

from reward.model import group
from reward.process import LAUNCHED, LAUNCHER, Fault, processors

# The number of seconds within which all machines must join.
PATIENCE = 600
# The ways in which torch lets machines meet at an endpoint.
BACKENDS = ("c10d", "etcd", "etcd-v2")


def distribute(
    main: Callable[[], None],
    module: str,
    useful: Callable[[int], int] = lambda gpus: gpus,
    machines: bool = False,
    arguments: Sequence[str] = (),
    together: bool = True,
) -> None:
    """Call `main` in the requested number of processes, by default one for each visible GPU.

    Each process runs `module` with `arguments`, and the module must call this function again. Given
    the number of GPUs, `useful` returns how many of them there is work for, by default all. It is
    not called on several machines, because no machine knows how many GPUs the others have.
    `machines` allows a stage to run on several machines. With `together` the processes form one
    group. Otherwise each is a group of one.
    """
    if LAUNCHED:
        if together:
            with group.joined():
                main()
        else:
            group.forget_torchrun()
            main()
        return
    options = torchrun_options([module, *arguments], machines)
    here, several = options.nproc_per_node, int(options.nnodes) > 1
    if "PET_NPROC_PER_NODE" not in os.environ and here > 1 and not several:
        here = options.nproc_per_node = useful(here)
    if here > 1 or several:
        launch(options)
    else:
        main()


def torchrun_options(command: Sequence[str], machines: bool) -> Namespace:
    """The options of torchrun, with its environment variables, for a module and its arguments.

    Raises a Fault if the number of processes or machines is impossible, or machines cannot meet.
    """
    gpus = torch.cuda.device_count()
    options = run.parse_args(["--module", *command])
    given = os.environ.get("PET_NNODES", "1") if machines else "1"
    least, _, most = given.partition(":")
    if not least.isdecimal() or int(least) < 1 or (most or least) != least:
        raise Fault(f"PET_NNODES is {given}, expected one positive number of machines, not a range")
    options.nnodes = least
    options.max_restarts = 0
    try:
        count = os.environ.get("PET_NPROC_PER_NODE", str(max(1, gpus)))
        options.nproc_per_node = run.determine_local_world_size(count)
    except ValueError as error:
        raise Fault(f"PET_NPROC_PER_NODE: {error}, expected a positive integer") from None
    if options.nproc_per_node < 1:
        raise Fault(f"PET_NPROC_PER_NODE is {options.nproc_per_node}, expected at least 1")
    if 0 < gpus < options.nproc_per_node:
        raise Fault(
            f"PET_NPROC_PER_NODE is {options.nproc_per_node}, but {gpus} GPUs are visible, "
            "expected at most one process for each"
        )
    if int(options.nnodes) == 1:
        options.rdzv_backend, options.rdzv_endpoint = "c10d", "localhost:0"
        options.rdzv_id, options.local_addr = str(uuid.uuid4()), "127.0.0.1"
    else:
        require_endpoint(options)
    return options


def require_endpoint(options: Namespace) -> None:
    """Raises a Fault unless torchrun's variables say where the machines meet.

    That is a backend of torch, such as c10d, and an endpoint. As some schedulers set it, it may
    also be the rank of each machine and the address and port of the first, for the static backend.
    """
    ranked = options.rdzv_backend == "static" and "PET_NODE_RANK" in os.environ
    if ranked and {"PET_MASTER_ADDR", "PET_MASTER_PORT"} <= os.environ.keys():
        options.rdzv_endpoint = run.get_rdzv_endpoint(options)
    if not options.rdzv_endpoint or not (ranked or options.rdzv_backend in BACKENDS):
        found = ", ".join(
            f"{name} is {os.environ.get(name, 'not set')}"
            for name in ("PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT")
        )
        raise Fault(
            f"PET_NNODES is {options.nnodes}, but {found}; expected c10d and the host:port of one "
            "of the machines"
        )
    try:
        parse_rendezvous_endpoint(options.rdzv_endpoint, 0)
    except ValueError as error:
        raise Fault(f"PET_RDZV_ENDPOINT: {error}") from None


def launch(options: Namespace) -> None:
    """Start the processes and wait until they end. Raises a Fault if one of them fails."""
    # torch.distributed's warnings take many lines for what a Fault says in one. Each of its modules
    # sets its own level, so the warnings are stopped at the logger that they all propagate to.
    logger = logging.getLogger("torch.distributed")
    logger.handlers, logger.propagate = [logging.NullHandler()], False
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, processors() // int(options.nproc_per_node)))
    )
    os.environ[LAUNCHER] = str(os.getpid())
    # Logs get their folder below. Without this, torch makes another one, which stays.
    options.log_dir = os.devnull
    try:
        config, command, arguments = run.config_from_args(options)
    except ValueError as error:
        raise Fault(f"the variables PET_* of torchrun: {error}") from None
    config.rdzv_configs = timeouts(config.rdzv_configs)
    start = time.monotonic()
    if int(options.nnodes) > 1:
        print(f"processes  on {options.nnodes} machines, which meet at {options.rdzv_endpoint}")
    with TemporaryDirectory() as logs:
        quiet = dict.fromkeys(range(1, config.nproc_per_node), Std.ALL)
        config.logs_specs = DefaultLogsSpecs(logs, redirects=quiet)
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            raise Fault(cause(error, Path(logs))) from None
        except RendezvousError as error:
            reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
            raise Fault(
                f"the {options.nnodes} machines of PET_NNODES did not meet at "
                f"{options.rdzv_endpoint} within {time.monotonic() - start:.0f} seconds"
                f"{reason and f' ({reason})'}; check the address, and run the same command on each "
                "of them"
            ) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)


def timeouts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a rendezvous, with timeouts in seconds where `given` has none.

    Connecting takes up to twice `read_timeout`, because torch tries IPv6 and then IPv4. Raises a
    Fault if a timeout is not a positive integer.
    """
    for name in ("join_timeout", "read_timeout"):
        if name in given and not (given[name].isdecimal() and int(given[name])):
            raise Fault(
                f"PET_RDZV_CONF: {name} is {given[name]}, expected a positive number of seconds"
            )
    join = int(given.get("join_timeout", PATIENCE))
    return {"join_timeout": join, "read_timeout": math.ceil(join / 2)} | dict(given)


def cause(error: ChildFailedError, logs: Path) -> str:
    """Why the processes on this machine ended, in a sentence; also prints their tracebacks."""
    failures: Mapping[int, Any] = error.failures
    reported = [each for each in failures.values() if "timestamp" in each.error_file_data]
    if reported:
        return str(min(reported, key=lambda each: each.timestamp).message)
    for each in failures.values():
        for log in logs.rglob(f"{each.local_rank}/stderr.log"):
            sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
    # Name the process that ended first, not those that the launcher then ended with SIGTERM.
    ended = {rank: signal_of(each.exitcode) for rank, each in failures.items()}
    rank, name = min(ended.items(), key=lambda item: (item[1] == "SIGTERM", item[1] is None))
    if name:
        return f"process {rank} was ended by {name}; run the same command again to continue"
    return (
        f"process {rank} ended with status 1; if there is no message above, a process on "
        "another machine ended first"
    )


def signal_of(status: int) -> str | None:
    """The name of the signal that ended a process with this status, if one did."""
    if status < 0:
        return signal.Signals(-status).name
    known = (signal.SIGINT, signal.SIGPIPE)  # with which `run` ends
    return next((each.name for each in known if status == 128 + each), None)
