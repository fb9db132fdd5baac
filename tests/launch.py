"""Start train.py, oracle.py or eval.py as one process or several ranks, without the seconds that a new
interpreter costs: each process is forked from a server that has imported torch and the project already.

torchrun itself is started by the few tests whose subject it is.
"""

import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "numpy", "tokenizers", "safetensors.torch", "tqdm", "train"])


def work(argv, environment, stdout, stderr):
    """One process: a program under its own name, its output in files."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False)), io.TextIOWrapper(
        os.fdopen(2, "wb", 0, closefd=False), write_through=True)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(argv)
    for name in ("loss", "data", "model", "eval", "oracle", "train"):
        sys.modules.pop(name, None)  # imported anew, as a new interpreter would
    runpy.run_path(argv[0], run_name="__main__")


class Started:
    """Processes under way; `wait` gives the exit code of the first that failed, else 0, and the output."""

    def __init__(self, argv, ranks=1, **environment):
        self.folder = tempfile.mkdtemp()
        self.out, self.err = (os.path.join(self.folder, name) for name in ("out", "err"))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            variables = {**os.environ, "PYTHONPATH": ROOT, **environment}
            if ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                              "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(port)}
            process = SERVER.Process(target=work, args=(list(map(str, argv)), variables, self.out, self.err))
            process.start()
            self.processes.append(process)

    def wait(self, timeout=300):
        """(exit code, stdout, stderr). As torchrun does, ends all when one has failed."""
        until = time.monotonic() + timeout
        while any(p.is_alive() for p in self.processes):
            if any(p.exitcode for p in self.processes) or time.monotonic() > until:
                time.sleep(0.5)
                self.kill()
            time.sleep(0.02)
        codes = [p.exitcode for p in self.processes]
        return next((code for code in codes if code and code > 0), max(codes, key=abs)), *self.output()

    def output(self):
        """What was printed so far: (stdout, stderr)."""
        texts = []
        for path in (self.out, self.err):
            texts.append(open(path, encoding="utf-8", errors="replace").read() if os.path.exists(path) else "")
        return texts

    def send(self, number, rank=None):
        """A signal to one rank or to all."""
        for i, process in enumerate(self.processes):
            if rank in (None, i) and process.is_alive():
                os.kill(process.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)


def run(argv, ranks=1, code=0, **environment):
    """Run to the end; returns what it wrote to stderr."""
    found, out, err = Started(argv, ranks, **environment).wait()
    assert found == code, (found, err[-3000:])
    return err
