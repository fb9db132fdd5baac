"""Each worker of pytest stays on one core, with all processes that it starts: tiny models gain
nothing from two threads, and threads that wait for each other spin on cores they do not have."""

import os

import pytest
import tiny
import torch

cores = sorted(os.sched_getaffinity(0))
number = int(os.environ.get("PYTEST_XDIST_WORKER", f"gw{os.getpid()}").removeprefix("gw"))
os.sched_setaffinity(0, {cores[number % len(cores)]})
torch.set_num_threads(1)
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
    os.environ.pop(name, None)  # of whoever runs the tests


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two random checkpoints and 24 pairs."""
    folder = tmp_path_factory.mktemp("world")
    return {"model": tiny.write_checkpoint(folder / "model"),
            "pairs": tiny.write_pairs(folder / "pairs.jsonl"),
            "untied": tiny.write_checkpoint(folder / "untied", tied=False)}
