"""Several processes: the same bytes as with one, no orphans, no deadlocks."""

import logging
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig

from reward import process
from reward.model import group, launching
from reward.model.progress import at_work
from reward.outputs import digest, digests, read_json, write_json
from reward.process import Fault
from stages import preprocess, train
from tests.forked import (
    Forked,
    free_port,
    join_lost_host,
    launch_train,
    require_done,
    run_in_group,
    train_within,
)
from tests.support import SetParams, new_trainer, write_pairs

Bytes = dict[str, str]


@pytest.fixture(autouse=True)
def prepared(workspace: Path, set_params: SetParams) -> None:
    """14 pairs: an epoch has steps of 6, 6 and 2 packs, which 4 processes cannot share evenly."""
    write_pairs(workspace / "data" / "raw" / "pairs.json", 20)
    set_params("preprocess", validation_fraction=0.1, test_fraction=0.2)
    preprocess.main()
    set_params("lora", r=4, lora_dropout=0.1)
    set_params("train", pairs_per_step=6, tokens_per_pack=400, num_train_epochs=2)
    set_params("train", logging_steps=1, eval_steps=2, save_steps=2, optim="adamw_torch")


def result(folder: Path = Path()) -> Bytes:
    """Digests of the outs and of the last checkpoint, without the list of digests in it."""
    [last] = (folder / "models" / "checkpoints").glob("*/step-6")
    found = {
        f"{path.name}/{name}": value
        for path in (folder / train.ADAPTER, folder / train.REPORTS, last)
        for name, value in digests(path).items()
    }
    del found[f"{last.name}/digests.json"]
    return found | {"metrics": digest(folder / train.METRICS)}


def forget() -> None:
    for folder in (train.ADAPTER, train.REPORTS, Path("models/checkpoints")):
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(found: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(found.status() != psutil.STATUS_ZOMBIE)
    return False


def trained(
    size: int, room: int = 10**6, killed: tuple[int, int] | None = None
) -> list[tuple[int | None, str, str]]:
    """Train in `size` processes; return the status, stdout and stderr of each."""
    return run_in_group(size, train_within, room, killed)


def test_bytes_do_not_depend_on_the_number_of_processes() -> None:
    """With dropout, packs that are halved twice, and both more and fewer packs than processes.

    One of four processes is killed, and two resume the run.
    """
    room = 90
    require_done(trained(1, room))
    expected = result()
    forget()

    require_done(trained(2, room))
    assert result() == expected
    forget()

    killed = trained(4, room, killed=(2, 3))
    assert [status for status, _, _ in killed] == [1, 1, -signal.SIGKILL, 1]
    assert not train.ADAPTER.exists()
    assert "memory     ran out" in killed[0][1]
    assert "processes  1 of 4 have work, because" in killed[0][1]
    resumed = trained(2, room)
    require_done(resumed)
    assert "resuming   from step-2" in resumed[0][1]
    assert "have work" not in resumed[0][1]
    assert result() == expected
    forget()

    require_done(trained(4, room))
    assert result() == expected


def test_summing_in_any_order_changes_weights_only_by_rounding(set_params: SetParams) -> None:
    """Without `sum_in_order`, each process sums its own packs."""
    room = 90  # so that each process has several packs of a step
    require_done(trained(1, room))
    [weights] = train.ADAPTER.glob("*.safetensors")
    ordered = load_file(weights)
    forget()
    set_params("train", sum_in_order=False)
    require_done(trained(2, room))
    for name, found in load_file(weights).items():
        torch.testing.assert_close(found, ordered[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("in_order", "sum_of"), [(True, "OrderedSum"), (False, "PlainSum")])
def test_sum_in_order_decides_how_a_step_is_summed(
    set_params: SetParams, monkeypatch: pytest.MonkeyPatch, in_order: bool, sum_of: str
) -> None:
    class Summed(Exception):
        pass

    def begin(name: str) -> None:
        raise Summed(name)

    set_params("train", sum_in_order=in_order)
    for name in ("OrderedSum", "PlainSum"):
        monkeypatch.setattr(group, name, partial(begin, name))
    ours = new_trainer()
    with pytest.raises(Summed, match=sum_of):
        ours.attempt(ours.steps[0])


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        ("python -u -m stages.train", True),
        ("python -m reward.serving.score pairs.json", True),
        ("python -m trl.scripts.grpo -m stages.train", False),
        ("python grpo.py", False),
    ],
)
def test_processes_of_torchrun_are_recognized_by_their_command(command: str, ours: bool) -> None:
    assert process.is_command(command.split()) is ours


def test_process_group_of_a_caller_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy trainer calls the reward function in each of its processes."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert (group.size(), group.rank(), group.leads()) == (1, 0, True)


def test_two_machines_resume_a_run_that_a_killed_process_stopped(
    tmp_path: Path,
) -> None:
    require_done(trained(1))
    expected = result()
    forget()
    with Forked(launch_train, {"PET_NPROC_PER_NODE": "2"}) as killed:
        [launcher] = [
            each for each in psutil.Process().children(recursive=True) if each.pid == killed.pid
        ]
        wait_for(lambda: [*Path("models/checkpoints").glob("*/step-2")])
        ranks = launcher.children()
        ranks[1].kill()
        _, errors = killed.communicate()
    assert killed.returncode == 1
    assert errors == "process 1 was ended by SIGKILL; run the same command again to continue\n"
    assert not any(each.is_running() for each in ranks)

    Path("dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(".", elsewhere, ignore=shutil.ignore_patterns("checkpoints", "elsewhere"))
    port = free_port()
    rendezvous = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_LOCAL_ADDR": "127.0.0.1"}
    rendezvous |= {"PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
    with (
        Forked(launch_train, rendezvous | {"DVC_ROOT": os.fspath(Path.cwd())}) as head,
        chdir(elsewhere),
        Forked(launch_train, rendezvous) as other,
    ):
        printed, errors = head.communicate()
        other_printed, other_errors = other.communicate()
    assert (head.returncode, errors, other.returncode, other_errors) == (0, "", 0, "")
    assert "resuming   from step-" in printed
    assert "processes  1 of 2 have work, because" in printed
    assert re.fullmatch(r"processes  on 2 machines.*\n", other_printed)
    assert result() == expected
    assert not (elsewhere / "models" / "checkpoints").exists()


def test_processes_exit_with_their_launcher() -> None:
    with Forked(launch_train, {"PET_NPROC_PER_NODE": "2"}) as launched:
        launcher = psutil.Process(launched.pid)
        wait_for(lambda: len(launcher.children()) == 2)
        ranks = launcher.children()
        launcher.kill()
        wait_for(lambda: not any(map(is_alive, ranks)))


def test_machine_that_exits_first_causes_no_stack_trace_on_the_others() -> None:
    with Forked(join_lost_host, free_port()) as left:
        _, errors = left.communicate()
    assert (left.returncode, errors) == (0, "")


@pytest.mark.parametrize("host", ["127.0.0.1", "unknown.invalid"])
def test_machines_that_do_not_connect_are_reported(host: str) -> None:
    rendezvous = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_LOCAL_ADDR": "127.0.0.1"}
    rendezvous |= {"PET_RDZV_ENDPOINT": f"{host}:{free_port()}"}
    rendezvous |= {"PET_RDZV_CONF": "join_timeout=1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    start = time.monotonic()
    with Forked(launch_train, rendezvous) as alone:
        _, errors = alone.communicate()
    assert alone.returncode == 1
    found = re.search(
        r"the 2 machines of PET_NNODES did not meet at .* within (\d+) sec.*\n$", errors
    )
    assert found
    assert int(found[1]) <= time.monotonic() - start + 0.5


# --- the number of processes -----------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the options of launches instead of starting them, with two visible GPUs."""
    found: list[Any] = []
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(launching, "launch", found.append)
    return found


@pytest.mark.parametrize(("tokens", "processes"), [(400, 1), (80, 2), ("auto", 2)])
def test_each_visible_gpu_gets_a_process_if_a_step_has_enough_packs(
    set_params: SetParams,
    launched: list[Any],
    capsys: pytest.CaptureFixture[str],
    tokens: int | str,
    processes: int,
) -> None:
    set_params("train", tokens_per_pack=tokens)
    alone: list[bool] = []
    launching.distribute(lambda: alone.append(True), "stages.train", train.useful)
    assert [each.nproc_per_node for each in launched] == [2] * (processes - 1)
    assert alone == [True] * (2 - processes)
    note = "GPUs       1 of 2 have work, because the first step has no more packs; raise"
    assert (note in capsys.readouterr().out) == (processes == 1)


def test_each_gpu_of_several_machines_gets_a_process(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No machine knows how many GPUs the others have. Training says if there are too many."""
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "head:29400")
    launching.distribute(lambda: None, "stages.train", train.useful, machines=True)
    assert [each.nproc_per_node for each in launched] == [2]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("tokens", "processes", "noted"), [("auto", 2, 1), (80, 2, 0), (80, 8, 4)])
def test_processes_without_work_are_noted_once_the_size_of_packs_is_known(
    set_params: SetParams,
    capsys: pytest.CaptureFixture[str],
    tokens: int | str,
    processes: int,
    noted: int,
) -> None:
    set_params("train", tokens_per_pack=tokens)
    ours = new_trainer()
    at_work(ours.steps[0], ours.tokens_per_pack, processes)
    note = (
        f"processes  {noted} of {processes} have work, because the first step has no more packs; "
        "raise train.pairs_per_step or lower train.tokens_per_pack to use more\n"
    )
    assert capsys.readouterr().out == (note if noted else "")


def test_torchrun_variables_set_the_number_of_processes_and_machines(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
    monkeypatch.setenv("PET_NNODES", "3")
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "head:29400")
    launching.distribute(lambda: None, "stages.train", train.useful, machines=True)
    [options] = launched
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("3", 1, 0)
    alone: list[bool] = []
    launching.distribute(lambda: alone.append(True), "stages.evaluate", train.useful)
    assert alone == [True]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PET_NPROC_PER_NODE", "3", "is 3, but 2 GPUs are visible, expected"),
        ("PET_NPROC_PER_NODE", "many", "PET_NPROC_PER_NODE: Unsupported nproc_per_node value"),
        ("PET_NPROC_PER_NODE", "0", "PET_NPROC_PER_NODE is 0, expected at least 1"),
        *(
            (
                "PET_NNODES",
                found,
                f"PET_NNODES is {found}, expected one positive number of machines",
            )
            for found in ("1:4", "0", "-1", "two")
        ),
    ],
)
def test_impossible_number_of_processes_is_refused(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(Fault, match=message):
        launching.distribute(lambda: None, "stages.train", train.useful, machines=True)
    assert not launched


RANKED = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head", "PET_MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "PET_RDZV_BACKEND is not set, PET_RDZV_ENDPOINT is not set; expected c10d and the"),
        (
            {"PET_RDZV_ENDPOINT": "head:29400"},
            "PET_RDZV_BACKEND is not set, PET_RDZV_ENDPOINT is h",
        ),
        ({"PET_RDZV_BACKEND": "c10d"}, "PET_RDZV_BACKEND is c10d, PET_RDZV_ENDPOINT is not set;"),
        ({"PET_RDZV_BACKEND": "foo", "PET_RDZV_ENDPOINT": "a:1"}, "PET_RDZV_BACKEND is foo, PET"),
        ({"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "a:b"}, "^PET_RDZV_ENDPOINT: The port"),
        (RANKED, None),
        ({"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head"}, "expected c10d and the host:port"),
        (
            {
                "PET_NNODES": "2:2",
                "PET_RDZV_BACKEND": "static",
                "PET_RDZV_ENDPOINT": "head:29400",
                "PET_NODE_RANK": "1",
            },
            None,
        ),
        ({"PET_RDZV_BACKEND": "etcd-v2", "PET_RDZV_ENDPOINT": "head:29400"}, None),
    ],
)
def test_several_machines_must_know_where_to_meet(
    launched: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    message: str | None,
) -> None:
    for name, value in ({"PET_NNODES": "2"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Fault, match=message) if message else nullcontext():
        launching.distribute(lambda: None, "stages.train", train.useful, machines=True)
    assert [each.rdzv_endpoint for each in launched] == ([] if message else ["head:29400"])
    assert all(each.nnodes == "2" for each in launched)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what a launch changes in this process."""
    logger = logging.getLogger("torch.distributed")
    for name in ("handlers", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    monkeypatch.setenv(process.LAUNCHER, "")


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ("join_timeout", "variables PET_.*'join_timeout' must have a value"),
        ("join_timeout=soon", "PET_RDZV_CONF: join_timeout is soon, expected a positive number"),
        ("read_timeout=0", "PET_RDZV_CONF: read_timeout is 0, expected a positive number"),
    ],
)
def test_impossible_settings_of_a_rendezvous_are_refused(
    monkeypatch: pytest.MonkeyPatch, conf: str, message: str
) -> None:
    monkeypatch.setenv("PET_RDZV_CONF", conf)
    with pytest.raises(Fault, match=message):
        launching.launch(launching.torchrun_options(["stages.train"], machines=False))


@pytest.mark.parametrize(
    ("given", "join", "read"),
    [
        ({}, 600, 300),
        ({"join_timeout": "5"}, 5, 3),
        ({"join_timeout": "5", "read_timeout": "9"}, 5, 9),
    ],
)
def test_connecting_takes_no_longer_than_joining_unless_requested(
    given: dict[str, str], join: int, read: int
) -> None:
    found = launching.timeouts(given)
    assert (int(found["join_timeout"]), int(found["read_timeout"])) == (join, read)


@pytest.mark.parametrize(
    ("visible", "local", "seen"),
    [
        *((None, "1", "1"), ("2,5", "1", "5"), ("GPU-8f,GPU-3a", "0", "GPU-8f")),
        *(("", "1", ""), ("-1", "0", "-1"), ("-1", "1", "-1"), ("0", "1", "0")),
    ],
)
def test_process_sees_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, local: str, seen: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    process.see_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


# --- failures --------------------------------------------------------------------------------


def failed(folder: Path, exits: dict[int, tuple[int, dict[str, Any] | None]]) -> Any:
    """The error that torchrun raises for these exit statuses and optional messages."""
    failures = {}
    for rank, (status, message) in exits.items():
        errors = folder / f"{rank}.json"
        if message:
            write_json(errors, message)
        failures[rank] = ProcessFailure(rank, 1, status, str(errors))
    return ChildFailedError("train", failures)


def test_fault_in_several_processes_is_reported_once_by_the_first(tmp_path: Path) -> None:
    messages = {rank: {"message": f"fault {rank}", "timestamp": 9 - rank} for rank in (1, 2)}
    error = failed(tmp_path, {0: (1, None), 1: (1, messages[1]), 2: (1, messages[2])})
    assert launching.cause(error, tmp_path) == "fault 2"


@pytest.mark.parametrize(("status", "name"), [(-signal.SIGKILL, "SIGKILL"), (130, "SIGINT")])
def test_process_killed_by_a_signal_is_named(tmp_path: Path, status: int, name: str) -> None:
    """The named process is not one that the launcher stopped afterwards."""
    error = failed(tmp_path, {0: (1, None), 2: (-signal.SIGTERM, None), 3: (status, None)})
    assert launching.cause(error, tmp_path).startswith(f"process 3 was ended by {name}; ")


def test_process_that_ended_by_itself_is_named_before_those_stopped_afterwards(
    tmp_path: Path,
) -> None:
    error = failed(tmp_path, {0: (-signal.SIGTERM, None), 1: (1, None)})
    assert launching.cause(error, tmp_path).startswith("process 1 ended with status 1; ")


@pytest.mark.usefixtures("settings")
def test_no_folder_for_logs_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: list[str] = []

    def elastic_launch(config: LaunchConfig, _: Any) -> Callable[..., None]:
        assert config.logs_specs
        used.append(config.logs_specs.root_log_dir)
        return lambda *_: None

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(launching, "elastic_launch", elastic_launch)
    launching.launch(launching.torchrun_options(["stages.train"], machines=False))
    assert Path(used[0]).parent == temporary
    assert not [*temporary.iterdir()]


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGTERM, SystemExit(143)), (signal.SIGINT, KeyboardInterrupt())],
)
def test_signal_to_the_launcher_decides_how_it_ends(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, expected: BaseException
) -> None:
    def elastic_launch(*_: Any) -> Callable[..., None]:
        def stopped(*_: Any) -> None:
            raise SignalException("stopped", number)

        return stopped

    monkeypatch.setattr(launching, "elastic_launch", elastic_launch)
    with pytest.raises(type(expected)) as caught:
        launching.launch(launching.torchrun_options(["stages.train"], machines=False))
    assert caught.value.args == expected.args


@pytest.mark.usefixtures("settings")
def test_warnings_of_torch_distributed_are_not_shown(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After Ctrl-C, the command itself prints "interrupted"."""

    def elastic_launch(*_: Any) -> Callable[..., None]:
        logging.getLogger("torch.distributed.elastic.agent.server.api").warning("shutting down")
        return lambda *_: None

    monkeypatch.setattr(launching, "elastic_launch", elastic_launch)
    launching.launch(launching.torchrun_options(["stages.train"], machines=False))
    assert caplog.text + capsys.readouterr().err == ""


def test_traceback_of_another_process_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "attempt" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback: a bug\n")
    launching.cause(failed(tmp_path, {1: (1, None)}), tmp_path)
    assert capsys.readouterr().err == "Traceback: a bug\n"


@pytest.mark.parametrize("kind", [Fault, group.Lost])
def test_fault_in_one_of_several_processes_is_left_to_the_parent_or_the_other_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[Fault],
) -> None:
    def faulty() -> None:
        raise kind("what is wrong")

    errors = tmp_path / "error.json"
    monkeypatch.setattr(process, "ERRORS", str(errors))
    with pytest.raises(SystemExit) as caught:
        process.run(faulty)
    assert caught.value.code == 1
    assert capsys.readouterr().err == ""
    assert errors.exists() == (kind is Fault)
    assert kind is not Fault or read_json(errors)["message"] == "what is wrong"


def test_machines_with_different_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [("a", {"code": 1, "inputs": [1]}), ("b", {"code": 1, "inputs": [2]})]
    monkeypatch.setattr(group, "gathered", lambda value: others)
    with pytest.raises(Fault, match="process 1 on b has different inputs than process 0"):
        group.require_same(others[0][1])
