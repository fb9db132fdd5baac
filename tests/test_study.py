"""The study of the claims: statistics by hand, verdicts from made-up figures, its short form."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import chart
import numpy as np
import pytest
import study
from launch import ROOT, program

YES, NO, UNKNOWN = "holds", "does not hold", "not decided"


def made_up(worlds=3, **by_method):
    """A saved study in which all methods are alike but for `by_method`; worlds differ a little."""
    files = {name: {"chosen": 5.0 + 20 * i, "rejected": 2.0, "change_ratio": 0.2 + 0.1 * i}
             for i, name in enumerate(("pairs", *study.FULL["voices"]))}
    base = {"add": 35.0, "others": 100.0, "words": 6.0, "kl": 0.0, "rows": 490}
    runs = []
    for job in [job for world in range(worlds) for job in study.plan_runs(world, study.FULL)]:
        figures = {
            "add": 90.0 + job["seed"], "others": 99.0, "words": 5.0 + job["world"], "kl": 2.0,
            "log_kl": -3.0, "reward_chosen": 4.0, "reward_rejected": -9.0, "tether_chosen": 0.01,
            "taut": 40.0 - job["world"], "shared": 0.01, "divergent": 0.4,
            "curve": [[step, 0.1 * step, -0.2 * step] for step in range(40)]}
        runs.append({**job, **figures, **by_method.get(job["method"], {})})
    return {"settings": study.FULL, "runs": runs,
            "worlds": [{"world": world, "files": files, **base} for world in range(worlds)]}


def verdicts(**changes):
    """{claim: the verdicts of its parts} of a made-up study."""
    result = {}
    for claim, _, values, _ in study.claims(study.Study(**made_up(**changes))):
        result.setdefault(claim, []).append(study.verdict(values))
    return result


def test_interval_and_verdict_by_hand():
    half = pytest.approx(4.303 / math.sqrt(3))
    assert study.interval(np.array([1.0, 2.0, 3.0])) == (2, half)
    assert study.shown(np.array([1.0, 2.0, 3.0])) == "2.00 ± 2.48"
    for name, values in ((YES, [1.0, 1.1, 1.2]), (NO, [-1.0, -1.1, -1.2]), (UNKNOWN, [0.0, 0.0]),
                         (UNKNOWN, [1.0, 2.0, 3.0]), ("one world, no interval", [5.0])):
        assert study.verdict(np.array(values)) == name
    for name, parts in ((YES, [YES, YES]), (NO, [NO, UNKNOWN]), (UNKNOWN, [UNKNOWN]),
                        ("holds in part", [NO, YES]), ("holds in part", [YES, UNKNOWN])):
        assert study.overall(parts) == name


def test_verdicts_follow_from_the_figures():
    assert verdicts() == {
        1: [UNKNOWN, UNKNOWN, YES] * 4,  # words: 6 ± 2.5 of a base with 6
        2: [NO, NO, YES, YES],  # r- is -9 everywhere
        3: [YES, UNKNOWN] * 2, 4: [UNKNOWN] * 4,  # -r- - r+ is 9 - 4
        5: [YES, UNKNOWN] * 3,  # taut at 39 ± 2.5 % of the steps
        6: [YES, UNKNOWN],  # 90.5 of two seeds against 90 of the first
        7: [YES, UNKNOWN]}  # 0.4 to 0.01
    forgets = verdicts(**{"SFT+": {"log_kl": -2.0, "others": 97.0}, "Reward-SFT": {"words": 0.1}})
    assert forgets[1] == [YES, YES, NO] + [YES] * 9
    sunk = verdicts(DPO={"reward_chosen": -3.0}, BCO={"reward_chosen": 5.0, "log_kl": -2.5})
    assert sunk[3] == sunk[4] == [YES] * 4
    assert set(sum(verdicts(worlds=1).values(), [])) == {"one world, no interval"}


def test_verdicts_command_writes_the_same_bytes_and_keeps_what_was_written_by_hand(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(made_up(worlds=2)))
    (tmp_path / "STUDY.md").write_text("Mine.\n{}old\n{}Mine.\n".format(*study.MARKS))
    seen = []
    for _ in range(2):
        code, output = program(study, "--verdicts", tmp_path / "study.json")
        assert not code, output
        seen.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert seen[0] == seen[1] and len(seen[0]) == 7  # JSON, text, five figures
    text = seen[0]["STUDY.md"].decode()
    assert "old\n" not in text and "manner" not in text  # a column of older studies
    assert text.startswith("Mine.\n" + study.MARKS[0]) and text.endswith(study.MARKS[1] + "Mine.\n")
    assert "| 2 | SFT lifts y-, BCE and BCO sink it | holds in part | 2 of 4 |" in text
    assert all(b">BCE</text>" in seen[0][f"study-{letter}.svg"] for letter in "abcde")


def test_matched_places_by_hand():
    assert study.matched("abcabba", "cbabac") == {1, 2, 3, 4}
    assert study.matched("abc", "xxc") == {2} and study.matched("", "a") == set()


def test_places_of_a_chart_by_hand():
    svg = chart.chart([("title", "x", {"BCE": [(1, 10), (10, 20), (100, 30)]}, "x")])
    points = re.search(r'polyline points="([^"]*)"', svg)[1].split()
    xs, ys = np.array([point.split(",") for point in points], float).T
    assert np.diff(xs).min() > 0 and np.ptp(np.diff(xs)) < 0.2  # 1, 10, 100: equal distances
    assert np.diff(ys).max() < 0 and np.ptp(np.diff(ys)) < 0.2  # more is higher


@pytest.mark.slow  # a minute or two
def test_short_form_killed_and_resumed(tmp_path):
    command = [sys.executable, study.__file__, "--out", str(tmp_path), "--short"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list(tmp_path.glob("runs/*.json"))) < 8:
        assert first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)  # the study alone: its workers end by themselves
    first.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.killpg(first.pid, 0)
            time.sleep(0.1)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert len(list(tmp_path.glob("runs/*.json"))) == 1 + len(study.plan_runs(0, study.SHORT))
