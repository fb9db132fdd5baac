"""Start train.py, oracle.py or eval.py: in this process, as one of its own, or as several ranks;
compare what two runs leave.

A new interpreter takes seconds to import torch. Here each process is forked in 0.1 s from a server
that has imported torch and the project already. torchrun is started only where it is the subject.
"""

import io
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from tqdm import tqdm

import data
import train

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train"])


def work(argv, environment, folder, fault):
    """One process: the program under its own name, its output in two files of the folder."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    tqdm.set_lock(threading.RLock())  # its semaphores would outlive a process that is killed
    sys.argv = argv
    if fault:
        insert(*fault)
    program = pkgutil.resolve_name(argv[0].removesuffix(".py"))
    pkgutil.resolve_name("model.run_and_exit")(program.main)


def insert(name, count, fault):
    """From now on the count-th call of "module.function" meets a fault: a function below."""
    module, _, function_name = name.rpartition(".")
    function, calls = pkgutil.resolve_name(name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            fault()
        return function(*args, **kwargs)

    setattr(pkgutil.resolve_name(module), function_name, call)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def late():
    time.sleep(1)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Started:
    """A program under way, as `ranks` processes; faults: {rank: arguments of `insert`}."""

    def __init__(self, argv, ranks=1, faults=()):
        self.folder, self.processes, faults = tempfile.mkdtemp(), [], dict(faults)
        environment = dict(os.environ)
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            args = list(map(str, argv)), environment, self.folder, faults.get(rank)
            self.processes.append(SERVER.Process(target=work, args=args))
            self.processes[-1].start()

    @property
    def running(self):
        """Whether no rank has ended yet."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, timeout=300):
        """The exit codes of all ranks, negative for a signal. As torchrun does, ends the others
        half a second after one has failed."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode for process in self.processes)
            if failed or time.monotonic() > end:
                time.sleep(0.5)
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def send(self, number, rank=None):
        """A signal to one rank or to all."""
        for i, process in enumerate(self.processes):
            if rank in (None, i) and process.is_alive():
                os.kill(process.pid, number)

    @property
    def said(self):
        """What stands in stderr so far."""
        path = Path(self.folder, "err")
        return path.read_text(errors="replace") if path.exists() else ""


def run(argv, ranks=1):
    """Run to a good end; returns what it said."""
    started = Started(argv, ranks)
    assert not any(started.wait()), started.said[-3000:]
    return started.said


def program(module, *argv) -> tuple:
    """`python MODULE.py ARGV` in this process: (exit code, its output). An exception that the
    program does not name comes out of here."""
    handler, output = signal.getsignal(signal.SIGTERM), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        try:
            code = module.main()
        except SystemExit as e:
            code = e.code
        finally:
            signal.signal(signal.SIGTERM, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
            _clear_sharding_prop_cache()  # it remembers the groups of meshes
            for bar in list(tqdm._instances):  # an error left it; the next program would draw it
                bar.close()
    return code, output.getvalue()


def files(folder) -> dict:
    """{path: content} of everything below a folder; a folder's content is None."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        contents[str(path.relative_to(folder))] = None if path.is_dir() else path.read_bytes()
    return contents


def metrics(out, name="metrics") -> list:
    """What a run has logged so far, but for times and memory."""
    rows = data.read_log(os.path.join(out, f"{name}.jsonl"))
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_gb")}
            for row in rows]


def last_step(out) -> int:
    """Of the last whole checkpoint, 0 where there is none."""
    return max([int(path[-6:]) for path in train.whole_checkpoints(out)], default=0)


def assert_same_end(one, other):
    """Two runs left the same: the last checkpoint and the exported model to the byte, metrics."""
    last = os.path.relpath(train.whole_checkpoints(one)[-1], one)
    for folder in (last, "model"):
        same = files(one / folder) == files(other / folder)  # kept apart: a diff would be huge
        assert same and files(one / folder), folder
    assert metrics(one) == metrics(other)
