"""The study of the claims: statistics by hand, verdicts from figures made up to give them, its short form."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "tests", "bench"))
import study  # noqa: E402


def made_up(worlds=3, **more):
    """A saved study in which every figure follows from method, rate and world; `more` overrides by title."""
    s = {**study.FULL, "worlds": list(range(worlds)), "rates": [1.0, 2.0, 4.0], "ablation_rates": [2.0]}
    base = {"dev": {"target": 10.0, "others": 100.0},
            "test": {"target": 10.0, "others": 100.0, "variants": 20.0}}
    runs = []
    for title in [*study.METHODS, *study.ABLATIONS]:
        for lr in s["ablation_rates"] if title in study.ABLATIONS else s["rates"]:
            for world in s["worlds"]:
                for seed in (0, 1):
                    figures = {"target": 10 + 20 * lr + seed, "others": 100 - (lr > 2) * 5 * (1 + world)}
                    run = {"title": title, "lr": lr, "world": world, "seed": seed, "dev": figures,
                           "test": {**figures, "variants": 30.0}, "kl": 0.001 * lr * (1 + world),
                           "tracked": {"reward_chosen": 2.0, "reward_rejected": -1.0 - 0.1 * world,
                                       "tether_chosen": 0.1 + 0.01 * world}}
                    look = {"step": 0, "share": {"trunk": 0.5, "matched": 0.25, "divergent": 0.25},
                            "last": {"trunk": 0.0, "matched": 0.3, "divergent": 2.0},
                            "all": {"trunk": 0.1, "matched": 0.1, "divergent": 1.0}}
                    runs.append({**run, "concentration": [look], **more.get(title, {})})
    return {"settings": s, "worlds": [{"world": w, **base} for w in s["worlds"]], "runs": runs}


def test_interval_and_verdict_by_hand():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert [study.verdict(v) for v in ([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [1.0, 2.0, 3.0])] == [
        "holds", "does not hold", "not decided"]


def test_rates_are_picked_by_the_rule_and_seeds_averaged():
    found = study.Study(made_up())
    assert found.pick("SPoT-BCE", 0) == 2.0  # the best target is at 4, at the cost of 5 points elsewhere
    assert found.at("SPoT-BCE", 2.0, 0, "test", "target") == 50.5
    assert found.picked("SPoT-BCE", "kl") == pytest.approx([0.002, 0.004, 0.006])
    assert found.compare("SPoT-BCE", "DPO", [1.0, 2.0], "kl", log=True) == [0, 0, 0]


def test_kl_at_equal_skill_by_hand():
    found = study.Study(made_up())
    # 40 % lies between rate 1 (30.5 %, KL 0.001) and rate 2 (50.5 %, KL 0.002)
    assert found.kl_at("SFT+", 0, 40.5) == pytest.approx(-3 + 0.5 * math.log10(2))
    assert found.kl_at("SFT+", 0, 5) == pytest.approx(-3)  # reached by the smallest rate
    assert found.equal_skill("SFT+", "SPoT-BCE") == [0, 0, 0]


def test_verdicts_follow_from_the_figures(tmp_path):
    saved = made_up(DPO={"tracked": {"reward_chosen": -1.0, "reward_rejected": -3.0, "tether_chosen": 0.7}},
                    **{"SFT+": {"kl": 0.5}})
    by_claim = {}
    for number, text, values in study.claims(study.Study(saved)):
        by_claim.setdefault(number, []).append(study.verdict(values))
    assert by_claim["1"][0] == "holds"  # SFT+ moved a hundred times further
    assert by_claim["2"] == ["does not hold"] * 2 + ["holds"] * 2  # r- is below 0 everywhere
    assert by_claim["3"] == ["holds"] * 2  # 3 / 2 of the margin from y-, r+ lower by 3
    assert by_claim["5"] == ["holds"] * 3  # 0.25 - 0.1
    assert by_claim["7"] == ["holds"] * 2
    # from the file, by the command of the README
    (tmp_path / "study.json").write_text(json.dumps(saved))
    done = subprocess.run([sys.executable, "tests/bench/study.py", "--verdicts", tmp_path / "study.json"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 3 | DPO's margin")]
    assert len(rows) == 1 and rows[0].endswith("| 1 ± 0 | holds |")


def test_kinds_of_rows_by_hand():
    fork = data.make_fork([1, 2], [5, 7, 8, 9], [5, 6, 8, 9])  # one shared token, then 7 for 6
    assert study.row_kinds([fork]) == ["trunk", "rejected divergent", "rejected matched", "rejected matched",
                                       "chosen divergent", "chosen matched", "chosen matched"]


def test_gradients_gather_by_hand():
    look = {"share": {"trunk": 0.5, "matched": 0.25, "divergent": 0.25},
            "last": {"trunk": 0.0, "matched": 0.3, "divergent": 1.0}}
    assert study.concentrated([look], "last") == pytest.approx(1.0)  # 1 to (0.25 * 0.3 / 0.75) = 0.1


@pytest.mark.slow  # a minute
def test_short_form_killed_and_resumed(tmp_path):
    command = [sys.executable, "tests/bench/study.py", "--short", "--out", str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list(tmp_path.glob("runs/*.json"))) < 8:
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*.json")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items())
    again = subprocess.run([*command[:2], "--verdicts", tmp_path / "study.json"], cwd=ROOT,
                           capture_output=True, text=True)
    assert again.stdout == done.stdout and done.stdout.count("\n| ") > 50
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    looks = {r["title"]: r["concentration"] for r in runs if "concentration" in r}
    for title in ("SPoT-BCE", "SPoT-BCO", "DPO"):  # at step 0 nothing acts on the trunk's last hidden states
        assert looks[title][0]["last"]["trunk"] == 0 and looks[title][0]["last"]["divergent"] > 1
    assert looks["SFT+"][0]["last"]["trunk"] > 0
    shares = np.array([list(look["share"].values()) for some in looks.values() for look in some])
    assert np.allclose(shares.sum(1), 1)
