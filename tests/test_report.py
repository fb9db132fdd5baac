"""The watched pair of a run, and the report: real runs, then files by hand, hostile ones too."""

import json
import os
import re
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.torch import load_file

import data
import eval as evaluation
import train
from data import UserError
from test_details import resume_here, run_and_stop, same_checkpoints
from test_train import no_process_group_is_left, run, run_here, world

FIXTURES = no_process_group_is_left, world  # pytest looks for them in this module
STEPS = ("--max_steps", "4", "--epochs", "9", "--lr", "1e-3", "--save_every", "1")


class Page(HTMLParser):
    """Checks that every tag is closed where it must be; keeps tags, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text = [], [], ""
        self.feed(self.source)
        self.close()
        assert self.open == []
        used = {(tag, name) for tag, attributes in self.tags for name, _ in attributes}
        assert not {"script", "link", "img", "iframe", "a", "image", "use", "base"} & {t for t, _ in used}
        assert not any(name.startswith("on") or name in ("src", "href", "action") for _, name in used)
        assert not any("//" in (value or "") for _, a in self.tags for _, value in a)
        assert "url(" not in evaluation.CSS and "@import" not in evaluation.CSS

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text

    def lines(self):
        return [dict(a)["points"] for tag, a in self.tags if tag == "polyline"]


# --- the watched pair -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("watched") / "run"
    run_here(world, out, *STEPS)
    return out


def test_watched_pair_is_the_same_on_one_and_two_ranks(world, watched, tmp_path):
    run(world, tmp_path / "two", *STEPS, ranks=2)
    (pair, looks), (other, more) = (evaluation.read_surgery(str(out / "surgery.jsonl"))
                                    for out in (watched, tmp_path / "two"))
    assert [look["step"] for look in looks] == [look["step"] for look in more] == [0, 1, 2, 3, 4]
    assert {k: v for k, v in pair.items() if k != "reference"} == {
        k: v for k, v in other.items() if k != "reference"}
    for a, b in zip(looks, more):
        for key in ("coefficients", "logps", "reward_chosen", "reward_rejected"):
            np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-6 if key == "coefficients" else 3e-5)
    # step 0: nothing on the trunk, half of beta on the branches, to the bit
    trunk, rejected, chosen = (len(pair[part]) for part in evaluation.PARTS)
    half = float(np.float32(0.05))
    assert looks[0]["coefficients"] == [0.0] * trunk + [half] * rejected + [-half] * chosen
    assert looks[0]["reward_chosen"] == looks[0]["reward_rejected"] == 0 < looks[-1]["reward_chosen"]
    # the pair is the file's, of median length, and its figures those of training
    chat = data.load_chat(world["model"], 265)
    forks, _ = data.load_forks(world["pairs"], chat, 8192, 1.0, True)
    (fork,) = (f for f in forks if f.line == pair["line"])
    assert len(fork) == sorted(map(len, forks))[len(forks) // 2] and all(f.ratio <= 1 for f in forks)
    assert pair["chosen_ids"] == fork.chosen.tolist() and sum(pair["change_ratios"]) == len(forks)
    text = "".join(pair["trunk"] + pair["chosen"])
    assert text == data.read_pairs(world["pairs"])[0][fork.line - 1].chosen + "<|im_end|>"
    kept = load_file(watched / "reference.safetensors")["pairs"][forks.index(fork)]
    np.testing.assert_allclose(pair["reference"], kept, atol=1e-4)


def test_looks_survive_a_stop_and_do_not_touch_training(world, watched, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    run_and_stop(monkeypatch, 0, world, out, *STEPS)
    resume_here(out)
    assert (out / "surgery.jsonl").read_bytes() == (watched / "surgery.jsonl").read_bytes()
    resume_here(out)  # a finished run once more
    assert (out / "surgery.jsonl").read_bytes() == (watched / "surgery.jsonl").read_bytes()
    monkeypatch.setattr(train, "look", lambda *_: None)
    run_here(world, tmp_path / "blind", *STEPS)
    assert same_checkpoints(tmp_path / "blind", watched)
    assert not os.path.exists(tmp_path / "blind" / "surgery.jsonl")
    Page(tmp_path / "blind" / "report.html")


@pytest.mark.parametrize("left", [None, '{"step": -1}\n{"step": 1}\n'])
def test_resume_of_a_run_without_its_looks(world, tmp_path, monkeypatch, left):
    out = tmp_path / "old"
    run_and_stop(monkeypatch, 0, world, out, *STEPS)
    os.remove(out / "surgery.jsonl")
    if left is not None:
        (out / "surgery.jsonl").write_text(left)
    resume_here(out)
    pair, looks = evaluation.read_surgery(str(out / "surgery.jsonl"))
    assert pair["reference"] in load_file(out / "reference.safetensors")["pairs"].tolist()
    assert [look["step"] for look in looks] == [2, 3, 4]


def test_positive_only_pairs_are_watched_too(world, tmp_path):
    rows = [json.loads(line) | {"original_answer": ""} for line in open(world["pairs"])]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_here({**world, "pairs": str(pairs)}, tmp_path / "run", "--loss", "sft", "--max_steps", "1")
    pair, looks = evaluation.read_surgery(str(tmp_path / "run" / "surgery.jsonl"))
    assert pair["rejected"] == pair["trunk"] == [] and set(looks[0]["coefficients"]) == {-1.0}
    assert "Pairs trained on" not in Page(tmp_path / "run" / "report.html").text  # there is no change ratio


# --- the page -------------------------------------------------------------------------------------


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


PAIR = {"step": -1, "line": 1, "reference": [-1.0, -2.0], "prompt": ["q"], "trunk": ["a", "b"],
        "rejected": ["x", "s", "y"], "chosen": ["s", "z"], "rejected_ids": [1, 2, 3], "chosen_ids": [2, 4],
        "change_ratios": [0, 3] + [0] * 18, "gamma": 0.6}
LOOK = {"step": 0, "delta": 0.0, "reward_chosen": 0.0, "reward_rejected": None,
        "coefficients": [0.0, 0.0, 0.05, 0.05, 0.05, -0.05, -0.025], "logps": [-1.0] * 7}


def make_run(folder, pair=PAIR, looks=(LOOK,), **figures):
    """Three steps whose figures are lists of three; config.json as far as it is shown."""
    write(folder / "metrics.jsonl", *({"step": 5 * i, **{k: v[i] for k, v in figures.items()}}
                                      for i in range(3)))
    write(folder / "surgery.jsonl", pair, *looks)
    (folder / "config.json").write_text(json.dumps({"options": {"loss": "<b>", "lr": 1e-6}}))
    return str(folder)


def test_known_values_are_where_they_should_be(tmp_path):
    a = make_run(tmp_path / "a", reward_chosen=[0, 1, 2], reward_rejected=[0.0, None, -2.0])
    b = make_run(tmp_path / "b", reward_chosen=[float("nan")] * 3, accuracy=[0.0, 1.0, 0.5])
    evaluation.report([a, b], str(tmp_path / "report.html"))
    page = Page(tmp_path / "report.html")
    # r+ from 0 to 2 and r- to -2 over steps 0 to 10: y is -2 to 2, and 0 in the middle; the gap splits r-
    assert page.lines()[:4] == ["60.0,131.0 265.0,71.5 470.0,12.0", "60.0,131.0 60.0,131.0",
                                "470.0,250.0 470.0,250.0", "60.0,250.0 265.0,12.0 470.0,131.0"]
    assert page.lines()[4].startswith("60.0,250.0 80.5,250.0 80.5,12.0 101.0,12.0 101.0,250.0")  # bars
    for part in ("0 → 2", "0 → −2", "– → –", "loss <b>, lr 1e-06", "acquisition"):
        assert (part in page.text) == (part != "acquisition")  # nobody has a tether: no such chart
    # the branches' one common token is neither deleted nor inserted
    spans = re.findall(r'<(i|del|ins) style="--s0:(\S+)" title="[^"]*" tabindex="-1">(.)</', page.source)
    assert spans[:7] == [("i", "0", "a"), ("i", "0", "b"), ("del", "1", "x"), ("i", "1", "s"),
                         ("del", "1", "y"), ("i", "-1", "s"), ("ins", "-0.5", "z")]
    assert 'title="step: coefficient, log p\n0: −0.025, −1" tabindex="-1">z<' in page.source
    assert "trunk 0, y⁻ 0.05, y⁺ −0.0375" in page.text
    # neither Hover nor a mouse is needed: what a tap focuses shows its title
    assert "Hover" not in page.text and "Point at a token, or tap it" in page.text
    assert ".tokens :focus::after { content: attr(title);" in evaluation.CSS


def test_every_run_names_its_full_colour(tmp_path):
    small = {**LOOK, "coefficients": [c / 10 for c in LOOK["coefficients"]]}
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", looks=[small, {**small, "step": 5}])
    evaluation.report(list(runs), str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    assert re.findall(r"Full colour: a coefficient of (\S+) or (\S+?)Trunk", page.text) == [
        ("0.05", "−0.05"), ("0.005", "−0.005")]
    assert "Every run has a scale of its own" in page.text


@pytest.mark.parametrize("gammas, marks", [
    ((0.6,), [("0.6", "c0")]), ((0.6, 0.6), [("0.6", "ink")]),
    ((0.6, 0.4, None), [("0.6", "c0"), ("0.4", "c1")]), ((0.6, 0.4, 0.6), [("0.6", "ink"), ("0.4", "c1")])])
def test_every_run_has_the_mark_of_its_own_limit(tmp_path, gammas, marks):
    runs = [make_run(tmp_path / str(i), {**PAIR, "gamma": gamma}) for i, gamma in enumerate(gammas)]
    evaluation.report(runs, str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    drawn = [dict(a) for tag, a in page.tags if ("class", "mark") in a]
    assert [(line["x1"], line["style"]) for line in drawn] == [
        (str(60 + 410 * float(gamma)), f"stroke:var(--{colour})") for gamma, colour in marks]


@pytest.mark.parametrize("highest, shown", [(0.5, 2), (1.0, 2), (2.0, 1), (9.0, 0)])
def test_labels_of_narrow_bands_are_left_out(tmp_path, highest, shown):
    run = make_run(tmp_path / "a", tether_chosen=[0.5, 0.1, highest])
    evaluation.report([run], str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    bands = [float(dict(a)["height"]) for tag, a in page.tags if tag == "rect"]
    labels = [name for name in ("acquisition", "saturation") if name in page.text]
    assert len(bands) == 2 and len(labels) == shown == sum(height > 22 for height in bands)


def test_the_tether_of_a_loss_without_one_is_said_to_be_none(tmp_path):
    def caption(*losses):
        runs = [make_run(tmp_path / str(loss), tether_chosen=[0.5, 0.4, 0.3]) for loss in losses]
        for loss in losses:
            write(tmp_path / str(loss) / "config.json", {"options": {"loss": loss}})
        evaluation.report(runs, str(tmp_path / "r.html"))
        source = Page(tmp_path / "r.html").source
        return re.search('aria-label="The tether.*?</svg><div class="soft">(.*?)</div>', source).group(1)

    assert caption("spot-bce", "spot-bco", None) == ""
    assert caption("spot-bce", "sft", "dft") == ("sft: what it would be: this loss has none. "
                                                 "dft: what it would be: this loss has none")
    assert caption("reward-sft") == "reward-sft: λ⁻ is what it would be: this loss has none"
    assert caption("dpo") == "dpo: what it would be: its own coefficient is another, 1 − σ(r⁺ − r⁻) for both"


@pytest.mark.parametrize("file", ["metrics", "eval", "surgery"])
def test_a_torn_last_line_does_not_count(tmp_path, file):
    run = tmp_path / "a"
    make_run(run, loss=[1, 2, 3])
    write(run / "eval.jsonl", {"step": 5, "margin": 0.25})
    path, whole = run / f"{file}.jsonl", evaluation.read_run(str(run), "a")
    lines = path.read_text()
    for torn in ("{", '{"step": 15, "los', " "):
        path.write_text(lines + torn)
        assert evaluation.read_run(str(run), "a") == whole
        path.write_text(lines + torn + "x\n")  # it has its end: not torn, but bad
        with pytest.raises(UserError, match=f"{file}.jsonl: line {lines.count(chr(10)) + 1}: not valid JSON"):
            evaluation.read_run(str(run), "a")
    path.write_text(lines[:-1])  # nothing is missing but the newline
    assert evaluation.read_run(str(run), "a") == whole
    (run / "metrics.jsonl").write_text('{"step": 0')  # killed in its first step
    evaluation.report([str(run)], str(tmp_path / "r.html"))
    assert "lr 1e-06" in Page(tmp_path / "r.html").text


def test_a_newline_in_a_name_is_text(tmp_path):
    evaluation.report([make_run(tmp_path / "a\nb", loss=[1, 2, 3])], str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    assert "<br" not in page.source and "<title>a↵\nb loss: 1 → 3</title>" in page.source


def test_hostile_text_is_inert(tmp_path):
    nasty = ["<script>alert(1)</script>", "\"'><img src=x onerror=y>", "a\u202eb", "\ud800", "\0", "\x1b[0m",
             "\n", "https://x", "&amp;", "</style>"]
    pair = {**PAIR, "prompt": nasty, "trunk": nasty, "rejected": nasty, "chosen": nasty,
            "rejected_ids": list(range(10)), "chosen_ids": list(range(5, 15))}
    nan, inf = float("nan"), float("inf")
    look = {**LOOK, "coefficients": [nan, inf] + [0.1] * 28, "logps": [-inf] * 30}
    run = make_run(tmp_path / "<script>\u202e\"'", pair, [look], loss=[1, inf, 10**400])
    evaluation.report([run], str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    assert not re.search("[\0\x1b\u202e\ud800]", page.source) and "<script" not in page.source
    assert "\\u202e" in page.text and "\\ud800" in page.text and "↵" in page.text and "alert(1)" in page.text


def test_long_pairs_are_cut_to_a_window(tmp_path):
    n = 3000
    pair = {**PAIR, "prompt": ["q"] * n, **{part: ["t"] * n for part in evaluation.PARTS},
            "rejected_ids": list(range(n)), "chosen_ids": list(range(1, n + 1))}
    look = {**LOOK, "coefficients": [0.1] * 3 * n, "logps": [-1.0] * 3 * n}
    many = [{"step": i, "loss": 1.0} for i in range(10_000)]
    folder = make_run(tmp_path / "a", pair, [look] * 11)
    write(tmp_path / "a" / "metrics.jsonl", *many)
    evaluation.report([folder], str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    assert page.source.count(" title=") == 1350
    assert page.text.count("2400 tokens not shown") == 2 and page.text.count("2850 tokens not shown") == 1
    assert len(page.lines()[0].split()) == evaluation.DRAWN_POINTS and len(page.source) < 10**6


def test_evaluations_stand_beside_their_base(tmp_path, capsys):
    def start(*argv):
        work, o = evaluation.parse_command(["report", *map(str, argv)])
        work(o, train.open_ranks(60))
        train.close_ranks()

    def results(mean):
        return {"own": {"questions": 2, "metrics": {"accuracy": [mean, 0.1]}, "asked": {"1": "x", "2": "y"},
                        "scores": {"1": [1.0], "2": [0.0]}}}
    for name, mean in (("base", 0.5), ("spot", 0.625)):
        write(tmp_path / name / "results.json", results(mean))
    run = make_run(tmp_path / "run", loss=[1, 2, 3])
    (tmp_path / "run" / "eval.jsonl").write_text("")
    assert evaluation.read_run(str(tmp_path / "run"), "run").held_out == []
    write(tmp_path / "run" / "eval.jsonl", {"step": 5, "margin": 0.25}, {"step": 10, "margin": 0.75})
    start(run, tmp_path / "base", tmp_path / "spot", "--out", tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    for part in ("50.0 ± 10.0", "62.5 ± 10.0 (+12.5)", "held out, after5 → 10", "0.25 → 0.75"):
        assert part in page.text
    start(run)
    Page(tmp_path / "run" / "report.html")
    assert capsys.readouterr().err == f"written: {tmp_path / 'r.html'}\nwritten: {run}/report.html\n"


def test_errors_are_named(tmp_path):
    def refused(message, *folders):
        with pytest.raises(UserError, match=message):
            evaluation.report(list(map(str, folders)), str(tmp_path / "r.html"))
        assert not os.path.exists(tmp_path / "r.html")

    (tmp_path / "empty").mkdir()
    refused("empty: no run .metrics.jsonl. and no evaluation", tmp_path / "empty")
    good = make_run(tmp_path / "good", loss=[1, 2, 3])
    refused("good is given twice", good, good + "/")
    bad = tmp_path / "bad"
    for file, rows, message in (
            ("metrics.jsonl", ['{"step": 0\n', {"step": 1}], "metrics.jsonl: line 1: not valid JSON"),
            ("metrics.jsonl", [{"step": 0}, {"step": "1"}], "line 2: 'step': a number or null .* found '1'"),
            ("metrics.jsonl", [{"step": 0, "loss": [1]}], r"line 1: 'loss': a number or null .* found \[1\]"),
            ("eval.jsonl", [{"margin": 1}], "eval.jsonl: line 1: 'step': a count of .* found None"),
            ("surgery.jsonl", [{**PAIR, "chosen": ["s", 1]}], "line 1: 'chosen': a list of str expected"),
            ("surgery.jsonl", [{**PAIR, "chosen_ids": [1]}], "line 1: 'chosen_ids': a list of 2 int .*"),
            ("surgery.jsonl", [{**PAIR, "change_ratios": [-1] * 20}], "'change_ratios': a list of 20 int"),
            ("surgery.jsonl", [PAIR, {**LOOK, "logps": [0.0]}], "line 2: 'logps': a list of 7 float .*"),
            ("surgery.jsonl", ['{"step": -1'], "surgery.jsonl: not one whole line"),
            ("config.json", ["["], "config.json: ")):
        make_run(bad, loss=[1, 2, 3])
        write(bad / file, *rows)
        refused(message, bad)
        os.remove(bad / file)


def test_a_report_that_cannot_be_written_loses_no_run(world, tmp_path, capsys):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    run_here(world, tmp_path / "run", "--max_steps", "1")
    assert "report.html could not be written: " in capsys.readouterr().err
    assert os.path.exists(tmp_path / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("error", [MemoryError(), ValueError("odd"), UserError("named")])
def test_whatever_a_report_fails_of_is_said_and_no_more(monkeypatch, error):
    def fail(*_):
        raise error
    monkeypatch.setattr(evaluation, "report", fail)
    said = train.write_report(types.SimpleNamespace(main=True), [], "r.html")
    assert said == f"the report r.html could not be written: {str(error) or 'MemoryError'}"
