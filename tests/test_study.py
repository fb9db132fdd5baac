"""The study of the claims: statistics by hand, verdicts from figures made up to give them, its short form."""

import fcntl
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
    base = {"dev": {"target": 10.0, "others": 100.0}, "rows": {"pairs": 90}, "own questions": 7,
            "test": {"target": 10.0, "others": 100.0, "variants": 20.0}}
    runs = []
    for title in [*study.METHODS, *study.ABLATIONS]:
        for lr in s["ablation_rates"] if title in study.ABLATIONS else s["rates"]:
            for world in s["worlds"]:
                for seed in (0, 1):
                    figures = {"target": 10 + 20 * lr + seed, "others": 100 - (lr > 2) * 5 * (1 + world)}
                    run = {"title": title, "lr": lr, "world": world, "seed": seed, "dev": figures,
                           "test": {**figures, "variants": 30.0}, "kl": 0.001 * lr * (1 + world),
                           "flat": 40.0,
                           "tracked": {"reward_chosen": 2.0, "reward_rejected": -1.0 - 0.1 * world,
                                       "tether_chosen": 0.1 + 0.01 * world},
                           "shift": dict.fromkeys(study.PARTS, 0.5)}
                    look = {"step": 0, "share": {"trunk": 0.5, "matched": 0.25, "divergent": 0.25},
                            "last": {"trunk": 0.0, "matched": 0.3, "divergent": 2.0},
                            "all": {"trunk": 0.1, "matched": 0.1, "divergent": 1.0}}
                    runs.append({**run, "concentration": [look], **more.get(title, {})})
    return {"settings": s, "worlds": [{"world": w, **base} for w in s["worlds"]], "runs": runs}


def test_interval_and_verdict_by_hand():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert study.interval([1.0, None, 2.0, 3.0]) == (mean, half)
    assert [study.verdict(v) for v in ([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [1.0, 2.0, 3.0])] == [
        "holds", "does not hold", "not decided"]
    assert [study.verdict(v) for v in ([], [None], [5.0], [5.0, None])] == ["not decided"] * 4


def test_a_claim_from_its_parts():
    yes, no, open_ = "holds", "does not hold", "not decided"
    assert [study.overall(v) for v in ([yes, yes], [no], [open_, open_], [yes, no], [open_, yes], [no, open_])
            ] == [yes, no, open_, "in part", open_, no]


def test_rates_are_picked_by_the_rule_and_seeds_averaged():
    found = study.Study(made_up())
    assert found.pick("SPoT-BCE", 0) == 2.0  # the best target is at 4, at the cost of 5 points elsewhere
    assert found.at("SPoT-BCE", 2.0, 0, "test", "target") == 50.5
    assert found.picked("SPoT-BCE", "kl") == pytest.approx([0.002, 0.004, 0.006])
    assert found.compare("SPoT-BCE", "DPO", "log kl") == [0, 0, 0]
    # an ablation has the rate 2 alone: 50.5 % against 30
    more = study.Study(made_up(half={"test": {"target": 30.0, "others": 100.0, "variants": 0.0}}))
    assert more.compare("SPoT-BCE", "half", "test", "target") == [20.5] * 3
    apart = made_up()
    apart["runs"] = [run for run in apart["runs"] if run["title"] != "SFT+" or run["lr"] == 1]
    assert study.Study(apart).compare("SFT+", "half", "kl") == [None] * 3  # no rate that both have


def test_figures_at_equal_skill_by_hand():
    found = study.Study(made_up())
    # 40.5 % lies half way between rate 1 (30.5 %, KL 0.001) and rate 2 (50.5 %, KL 0.002)
    assert found.at_skill("SFT+", 0, 40.5, "log kl") == pytest.approx(-3 + 0.5 * math.log10(2))
    assert found.at_skill("SFT+", 0, 70.5, "lost") == pytest.approx(2.5)  # half way to 90.5 %, 5 points less
    assert found.at_skill("SFT+", 0, 30, "lost") is None  # the smallest rate is above it: how far is unknown
    assert found.at_skill("SFT+", 0, 95, "lost") is None  # no rate reaches it
    assert found.equal_skill("SFT+", "SPoT-BCE", "log kl") == [0, 0, 0]
    weak = study.Study(made_up(DPO={"test": {"target": 20.0, "others": 100.0, "variants": 0.0}}))
    assert weak.equal_skill("SFT+", "DPO", "log kl") == [None] * 3  # no level that both cross


def test_a_diverged_run_is_left_out():
    saved = made_up()
    names = {k: saved["runs"][0][k] for k in ("title", "lr", "world", "seed")}
    saved["runs"][0] = {**names, "diverged": "not finite"}
    found = study.Study(saved)
    assert found.rates("SFT") == [1.0, 2.0, 4.0] and found.at("SFT", 1.0, 0, "test", "target") == 31  # seed 1
    saved["runs"][1] = {**saved["runs"][0], "seed": 1}
    assert study.Study(saved).rates("SFT") == [2.0, 4.0]  # at 1 a world has no run
    nothing_moved = made_up(**{"SFT+": {"kl": 0.0}})
    assert study.Study(nothing_moved).at("SFT+", 1.0, 0, "log kl") == -9


def test_verdicts_follow_from_the_figures(tmp_path):
    saved = made_up(DPO={"tracked": {"reward_chosen": -1.0, "reward_rejected": -3.0, "tether_chosen": 0.7}},
                    **{"SFT+": {"kl": 0.5}})
    by_claim = {}
    for number, text, values in study.claims(study.Study(saved)):
        by_claim.setdefault(number, []).append(study.verdict(values))
    assert by_claim["1"] == ["holds"] * 8 + ["not decided"] * 8  # a hundred times further, and lost as much
    assert by_claim["2"] == ["does not hold"] * 2 + ["holds"] * 2  # r- is below 0 everywhere
    assert by_claim["3"] == ["holds"] * 3  # 3 / 2 of the margin from y-, r+ lower by 3
    assert by_claim["4"] == ["not decided"] * 4 and by_claim["6"] == ["not decided"] * 8  # all alike
    assert by_claim["5"] == ["holds"] * 6  # 0.25 - 0.1; at 40 % of the steps
    assert by_claim["7"] == ["holds", "not decided"] * 2  # as much as SFT+'s
    # from the file, by the command of the README
    (tmp_path / "study.json").write_text(json.dumps(saved))
    done = subprocess.run([sys.executable, "tests/bench/study.py", "--verdicts", tmp_path / "study.json"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert "| 1 | not decided | 8 holds, 8 not decided |" in rows and "| 3 | holds | 3 holds |" in rows
    row = [line for line in rows if line.startswith("| 3 | DPO's margin")]
    assert len(row) == 1 and row[0].endswith("| 1.00 ± 0.00 | holds |")


def test_a_margin_that_never_opened_is_no_share():
    saved = made_up(DPO={"tracked": {"reward_chosen": -3.0, "reward_rejected": -1.0, "tether_chosen": 0.7}})
    values = [v for number, text, v in study.claims(study.Study(saved)) if text.startswith("DPO's margin")]
    assert values == [[None] * 3]


@pytest.mark.parametrize("arguments, said", [
    (["--verdicts", "no-such.json"], "no-such.json is missing"), (["--workers", "0"], "from 1 expected"),
    (["--verdicts", ".gitignore"], "ignore")])
def test_bad_arguments_are_named(arguments, said):
    done = subprocess.run([sys.executable, "tests/bench/study.py", *arguments], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_all_runs_take_equally_many_steps():
    rows = {"pairs": 100, "gamma 0.2": 30, "all pairs": 130, "some pairs": 100, "half": 50,
            "direct pairs": 100, "direct": 100, "own": 40}
    jobs = study.plan_jobs({**study.FULL, "worlds": [0]}, {0: {"rows": rows}})
    assert {job["steps"] for job in jobs} == {8}  # two epochs of four batches of 32
    assert len({job["name"] for job in jobs}) == len(jobs) == 2 * (8 * 6 + 8 * 4)
    for job in jobs:
        batches = -(-rows[job["data"]] // 32)
        assert (job["epochs"] - 1) * batches < 8 <= job["epochs"] * batches


def test_kinds_of_rows_by_hand():
    fork = data.make_fork([1, 2], [5, 7, 8, 9], [5, 6, 8, 9])  # one shared token, then 7 for 6
    assert study.row_kinds([fork]) == ["trunk", "rejected divergent", "rejected matched", "rejected matched",
                                       "chosen divergent", "chosen matched", "chosen matched"]


def test_gradients_gather_by_hand():
    look = {"share": {"trunk": 0.5, "matched": 0.25, "divergent": 0.25},
            "last": {"trunk": 0.0, "matched": 0.3, "divergent": 1.0}}
    assert study.concentrated([look], "last") == pytest.approx(1.0)  # 1 to (0.25 * 0.3 / 0.75) = 0.1
    faded = {**look, "last": {"trunk": 0.01, "matched": 0.01, "divergent": 0.01}}  # weighs little
    assert study.concentrated([look, faded], "last") == pytest.approx(math.log10(1.01 / 0.11))


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
    lock = open(tmp_path / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    busy = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert busy.returncode == 1 and "another study" in busy.stderr
    again = subprocess.run([*command[:2], "--verdicts", tmp_path / "study.json"], cwd=ROOT,
                           capture_output=True, text=True)
    assert again.stdout == done.stdout and done.stdout.count("\n| ") > 50
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    looks = {r["title"]: r["concentration"] for r in runs if "concentration" in r}
    for title in ("SPoT-BCE", "SPoT-BCO", "DPO"):  # at step 0 nothing acts on the trunk's last hidden states
        first = looks[title][0]["last"]
        assert first["trunk"] == 0 and first["divergent"] > first["matched"] > 0
    assert looks["SFT+"][0]["last"]["trunk"] > 0
    shares = np.array([list(look["share"].values()) for some in looks.values() for look in some])
    assert np.allclose(shares.sum(1), 1)
