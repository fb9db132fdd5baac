"""The watched pair of a run, and the report: real runs, then files written by hand."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.torch import load_file

import data
import eval as evaluation
import tiny
import train
from launch import assert_same_end, metrics, program
from test_details import run_and_stop
from test_train import here, run, run_here

STEPS = ("--max_steps", "4", "--epochs", "9", "--lr", "1e-3", "--save_every", "1")


class Page(HTMLParser):
    """A page whose tags must nest and load nothing; keeps tags and text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text = [], [], ""
        self.feed(self.source)
        self.close()
        assert self.open == [] and "default-src 'none'; style-src 'unsafe-inline'" in self.source
        used = {name for tag, attributes in self.tags for name in (tag, *attributes)}
        assert not used & {"script", "link", "img", "iframe", "a", "use", "base", "src", "href"}
        assert not any(name.startswith("on") for name in used)
        assert "url(" not in evaluation.PAGE and "@import" not in evaluation.PAGE

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text

    def paths(self):
        return [values["d"].replace("h0", "") for tag, values in self.tags if tag == "path"]


def page_of(out, *folders):
    evaluation.report([str(folder) for folder in folders], str(out))
    return Page(out)


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("watched") / "run"
    run_here(world, out, *STEPS)
    return out


def test_watched_pair_is_the_same_on_one_and_two_ranks(world, watched, tmp_path):
    run(world, tmp_path / "two", *STEPS, ranks=2)
    pair, *rows = metrics(watched, "surgery")
    other, *more = metrics(tmp_path / "two", "surgery")
    assert [row["step"] for row in rows] == [row["step"] for row in more] == [0, 1, 2, 3, 4]
    assert pair == other
    for a, b in zip(rows, more):
        np.testing.assert_allclose(a["coefficients"], b["coefficients"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(a["logps"], b["logps"], rtol=0, atol=3e-5)
    # step 0: nothing on the trunk, half of beta on the branches, to the bit
    trunk, rejected, chosen = (len(pair[part]) for part in ("trunk", "rejected", "chosen"))
    half = float(np.float32(0.05))
    assert rows[0]["coefficients"] == [0.0] * trunk + [half] * rejected + [-half] * chosen
    # the pair is the file's, of median length, and its figures those of training
    chat = data.load_chat(world["model"], 265)
    forks, _ = data.load_forks(world["pairs"], chat, 8192, 1.0, True)
    (fork,) = (f for f in forks if f.line == pair["line"])
    assert len(fork) == sorted(map(len, forks))[len(forks) // 2]
    assert len(pair["chosen"]) == len(fork.chosen)
    text = "".join(pair["trunk"] + pair["chosen"])
    assert text == tiny.read_pairs(world["pairs"])[0][fork.line - 1].chosen + "<|im_end|>"
    kept = load_file(watched / "reference.safetensors")
    np.testing.assert_allclose(kept["watched"][0], kept["pairs"][forks.index(fork)], atol=1e-4)


def test_snapshots_survive_a_stop_and_do_not_touch_training(world, watched, tmp_path, monkeypatch):
    whole = (watched / "surgery.jsonl").read_bytes()
    run_and_stop(monkeypatch, 0, world, tmp_path / "stopped", *STEPS)
    for _ in range(2):  # the second time of a finished run
        here("--resume", "--out", tmp_path / "stopped")
    assert (tmp_path / "stopped" / "surgery.jsonl").read_bytes() == whole
    monkeypatch.setattr(train, "snapshot", lambda *_: None)
    run_here(world, tmp_path / "blind", *STEPS)
    assert_same_end(tmp_path / "blind", watched)
    assert "Surgery on one pair" not in Page(tmp_path / "blind" / "report.html").text


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PAIR = {"step": -1, "reference": [-1.0, -2.0], "prompt": ["q"], "trunk": ["a", "b"],
        "rejected": ["x", "s", "y"], "chosen": ["s", "z"]}
FIRST = {"step": 0, "reward_chosen": 0.0, "reward_rejected": None, "logps": [-1.0] * 7,
         "coefficients": [0.0, 0.0, 0.05, 0.05, 0.05, -0.05, -0.025]}
SECOND = {**FIRST, "step": 5, "coefficients": [-0.1, *FIRST["coefficients"][1:]]}


def make_run(folder, pair=PAIR, snapshots=(FIRST, SECOND), **figures):
    """Three steps, whose figures are lists of three; None stands for a key that is missing."""
    rows = [{k: v[i] for k, v in figures.items() if v[i] is not None} for i in range(3)]
    write(folder / "metrics.jsonl", *({"step": 5 * i, **row} for i, row in enumerate(rows)))
    write(folder / "surgery.jsonl", pair, *snapshots)
    write(folder / "config.json", {"options": {"loss": "<b>", "lr": 1e-6}})
    return folder


def test_known_values_are_where_they_should_be(tmp_path):
    a = make_run(tmp_path / "a", reward_chosen=[0, 1, 2], reward_rejected=[0.0, None, -2.0])
    b = make_run(tmp_path / "b", margin=[None] * 3, loss=[0.0, 1.0, 0.5])
    page = page_of(tmp_path / "r.html", a, b)
    # y points down: rewards from -2 to 2 over the steps 0 to 10, none of b; loss, none of a
    assert page.paths() == ["M0,0L5,-1L10,-2", "M0,-0L10,2", "M0,-0L5,-1L10,-0.5"]
    boxes = [values["viewbox"] for tag, values in page.tags if tag == "svg"]
    assert boxes == ["0 -2 10 4.0", "0 -1.0 10 1.0"]
    for part in ("reward_chosen: 0 → 2", "reward_rejected: 0 → -2", "<b>, lr 1e-06", "±0.1"):
        assert part in page.text, part
    # blue below 0, orange above
    spans = re.findall(r'<span style="background:#(\w+)" title="([^"]*)">(.)<', page.source)
    assert [(colour, text) for colour, _, text in spans[:7]] == [
        ("e0690a00", "a"), ("e0690a00", "b"), ("e0690a50", "x"), ("e0690a50", "s"),
        ("e0690a50", "y"), ("1f88cf50", "s"), ("1f88cf28", "z")]
    assert spans[6][1] == "-0.025, -1" and spans[7][0] == "1f88cfa0"  # the trunk after step 5


def test_hostile_text_is_inert(tmp_path):
    nasty = ["<script>alert(1)</script>", "\"'><img src=x onerror=y>", "\n", "&amp;", "</style>"]
    pair = {**PAIR, "prompt": nasty, "trunk": nasty, "rejected": nasty, "chosen": nasty}
    row = {**FIRST, "coefficients": [0.1] * 15, "logps": [-float("inf")] * 15}
    page = page_of(tmp_path / "r.html", make_run(tmp_path / "<script>\"'", pair, [row]))
    assert "<script" not in page.source
    assert all(part in page.text for part in ("alert(1)", "&amp;", "</style>"))


def test_evaluations_and_held_out_pairs_stand_beside_runs(tmp_path):
    for name, mean in (("base", 0.5), ("spot", 0.625)):
        result = {"own": {"metrics": {"accuracy": [mean, 0.1]}, "unanswered": 0}}
        write(tmp_path / name / "results.json", result)
    run = make_run(tmp_path / "run", loss=[1, 2, 3])
    write(run / "eval.jsonl", {"step": 5, "margin": 0.25}, {"step": 10, "margin": 0.75})
    three, out = (run, tmp_path / "base", tmp_path / "spot"), tmp_path / "r.html"
    assert program(evaluation, "report", *three, "--out", out) == (0, "")
    page = Page(out)
    for part in ("| own |\n| --- |\n| 50.0 ± 10.0 |", "62.5 ± 10.0", "metrics.loss: 1 → 3",
                 "eval.margin: 0.25 → 0.75"):
        assert part in page.text, part
    assert "M5,-0.25L10,-0.75" in page.paths()
    assert "Benchmarks" not in page_of(out, run).text
