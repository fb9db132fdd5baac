"""Start train.py, oracle.py or eval.py as one process or as several ranks, in 0.1 s each.

A new interpreter takes seconds to import torch. Here each process is forked from a server that has
imported torch and the project already. torchrun itself is started only where it is the subject.
"""

import errno
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from tqdm import tqdm

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
    pkgutil.resolve_name("model.leave")(program.main)


def insert(name, count, fault):
    """From now on the count-th call of "module.function" meets a fault: `die` or `disk_full`."""
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


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    codes = started.wait()
    assert not any(codes), (codes, started.said[-3000:])
    return started.said
