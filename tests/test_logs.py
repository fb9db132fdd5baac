"""What a run says where nobody watches, and the warnings of its log."""

import pytest
import torch
from safetensors.torch import load_file

import launch
import model as qwen
import tiny
import train
from test_train import argv, run_here


def test_in_a_file_progress_is_plain_lines(world, tmp_path):
    lines = launch.run(["train.py", *argv(world, tmp_path / "out")], ranks=2).split("\n")
    assert not any("\r" in line for line in lines) and len(lines) < 30
    bars = [line for line in lines if " of " in line and " in 0" in line]
    assert [bar.split(" in ")[0] for bar in bars] == [
        "reference, pairs: 0 of 3", "reference, pairs: 3 of 3", "out: 0 of 6", "out: 6 of 6"]
    assert "loss=" in bars[-1] and "tether_chosen=0." in bars[-1] and "step/s" in bars[-1]


def test_many_updates_make_few_lines(capsys):
    for rank, quiet, expected in ((0, False, 2), (0, True, 0), (1, False, 0)):
        bar = qwen.Ranks(rank, 2, torch.device("cpu"), quiet).progress(10_000, "counting", "step")
        for _ in range(10_000):
            bar.update()
        bar.close()
        assert len(capsys.readouterr().err.splitlines()) == expected


# --- warnings -------------------------------------------------------------------------------------


def test_the_reference_in_nats_by_hand(world, tmp_path):
    """The log of a run beside its own reference file."""
    said = run_here(world, tmp_path / "out", "--beta", "0.5")
    pairs = -load_file(tmp_path / "out/reference.safetensors")["pairs"]
    chosen, rejected = pairs.T.tolist()
    assert len(pairs) == 24
    for name, nats in (("y+", sorted(chosen)), ("y-", sorted(rejected))):
        assert f"-log pi_ref({name}): median {nats[11]:.1f} nats" in said
    assert f"r+'s bound: {0.5 * sorted(chosen)[11]:.1f}\n" in said
    gaps = {i + 1: a - b for i, (a, b) in enumerate(zip(chosen, rejected))}
    worst = sorted(gaps, key=gaps.get, reverse=True)[:10]
    shown = ", ".join(f"{line} ({gaps[line]:+.1f})" for line in worst)
    assert f"y+ has most nats beyond its y- in lines {shown}\n" in said
    assert "the tether will not hold" not in said and "rewrites" not in said


def test_a_small_beta_is_warned_of_before_and_after(world, tmp_path):
    said = run_here(world, tmp_path / "out", "--beta", "0.01")
    nats = -load_file(tmp_path / "out/reference.safetensors")["pairs"][:, 0]
    median = sorted(nats.tolist())[11]
    assert f"r+'s bound: {0.01 * median:.1f}\n" in said
    assert f"the tether will not hold. With --beta {40 / median:.2g} the bound is 40" in said
    assert "warning: step 5: lambda+ ends at 0.50: pairs still pull" in said
    said = run_here(world, tmp_path / "sft", "--beta", "0.01", "--loss", "sft")
    assert "warning" not in said  # it has no tether


def test_an_oracle_of_many_words_is_warned_of(world, tmp_path):
    rows = [{"question": f"q {i}", "original_answer": "ab", "gemini_corrected_answer":
             "ab and then many more words of its own"} for i in range(8)]
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    said = run_here({**world, "pairs": pairs}, tmp_path / "out")
    assert "warning: y+ has more than 5 times the nats of y-" in said


@pytest.mark.parametrize("figures,expected", [
    ((0.50, 0.50, 0.0, 0), ""), ((0.10, 0.05, -9.9, 5), ""), ((0.03, 0.05, -30.0, 0), ""),
    ((0.10, 0.05, -10.1, 5), "y- has lost 10.1 nats, it had 5.0, and lambda+ is 0.10"),
    ((0.03, 0.30, -1.0, 1), "lambda+ is 0.030 already, lambda- is 0.30"),
    ((0.03, 0.30, -1.0, 10), ""), ((0.03, 0.30, -1.0, 99), ""),
    ((0.06, 0.01, -1.0, 99), "lambda+ ends at 0.06")])
def test_each_warning_comes_once(figures, expected, capsys):
    o = train.Options(beta=1.0, batch_size=1, epochs=1)
    ranks = qwen.Ranks(0, 1, torch.device("cpu"))
    run = train.Run(o, ranks, None, None, [[0]] * 100, None, None, None, rejected_nats=5.0)
    names = ("tether_chosen", "tether_rejected", "reward_rejected", "step")
    for _ in range(2):
        train.watch_tether(run, dict(zip(names, figures)))
    said = capsys.readouterr().err
    assert said.count("warning: ") == bool(expected) and expected in said
