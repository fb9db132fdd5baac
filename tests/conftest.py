"""Each worker of pytest stays on one core, with all processes that it starts: tiny models gain
nothing from two threads, and threads that wait for each other spin on cores they do not have."""

import os

import torch

cores = sorted(os.sched_getaffinity(0))
number = int(os.environ.get("PYTEST_XDIST_WORKER", f"gw{os.getpid()}").removeprefix("gw"))
os.sched_setaffinity(0, {cores[number % len(cores)]})
torch.set_num_threads(1)
