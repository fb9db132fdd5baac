"""What a run says where nobody watches, and the warnings of its log."""

import os
import subprocess
import sys

import pytest
import torch

import launch
import model as qwen
import tiny


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    return ["train.py", "--model", tiny.write_checkpoint(root / "model"), "--pairs",
            tiny.write_pairs(root / "pairs.jsonl"), "--dtype", "float32", "--batch_size", 8,
            "--max_change_ratio", 1, "--lr", 1e-4, "--out"]


def test_in_a_file_progress_is_plain_lines(command, tmp_path):
    lines = launch.run([*command, tmp_path / "out"], ranks=2).split("\n")
    assert not any("\r" in line for line in lines) and len(lines) < 30
    bars = [line for line in lines if " of " in line and " in 0" in line]
    assert [bar.split(" in ")[0] for bar in bars] == [
        "reference: 0 of 3", "reference: 3 of 3", "spot-bce: 0 of 6", "spot-bce: 6 of 6"]
    assert "loss=" in bars[-1] and "tether=0." in bars[-1] and "step/s" in bars[-1]


def test_without_bars_the_results_are_said(command, tmp_path):
    argv = [sys.executable, *map(str, command), tmp_path / "out"]  # tqdm reads it at its import
    said = subprocess.run(argv, cwd=launch.ROOT, env={**os.environ, "TQDM_DISABLE": "1"},
                          check=True, capture_output=True, text=True).stderr
    assert " of 6" not in said and "step 0: sum of |reward| 0.0" in said and "done: " in said


def test_many_updates_make_few_lines(capsys):
    for rank, quiet, expected in ((0, False, 2), (0, True, 0), (1, False, 0)):
        bar = qwen.Ranks(rank, 2, torch.device("cpu"), quiet).progress(10_000, "counting", "step")
        for _ in range(10_000):
            bar.update()
        bar.close()
        assert len(capsys.readouterr().err.splitlines()) == expected


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = qwen.Ranks(0, 1, torch.device("cpu")).progress(3, "counting", "step")
    bar.update(3)
    bar.close()
    assert "\r" in capsys.readouterr().err
