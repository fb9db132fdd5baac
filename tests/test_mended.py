"""Faults that were found by reading, each as a test of its whole kind."""

import dataclasses
import shutil

import pytest
import launch

import eval as evaluation
import oracle
import train
from data import UserError, read_log, write_json
from launch import program
from test_report import Page, make_run
from tiny import write_rows


# --- rows and options -----------------------------------------------------------------------------


@pytest.mark.parametrize("ids, arguments", [
    ([], []), (["punctuation:no_comma"], []), (None, None)])
def test_ifeval_rows_without_instructions_are_refused(ids, arguments, tmp_path):
    good = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    bad = {**good, "instruction_id_list": ids, "kwargs": arguments}
    path = write_rows(tmp_path / "i.jsonl", [good, bad])
    with pytest.raises(UserError, match="(?s)line 2: .*two filled lists of one length"):
        evaluation.load_task(f"ifeval={path}", "")


@pytest.mark.parametrize("name, value", [
    ("temperature", "-0.5"), ("limit", "-1"), ("batch_size", "0"), ("workers", "0"),
    ("tries", "0"), ("max_tokens", "0"), ("request_timeout", "nan")])
def test_a_number_too_small_is_refused(name, value):
    least = "0 or more" if value[0] == "-" else "above 0"
    for module, command in ((evaluation, "evaluate --out o --tasks t --server s"),
                            (oracle, "elicit --out o --questions q --server s")):
        command = [*command.split(), "--limit", "0", "--temperature", "0", "--top_k", "0"]
        evaluation.parse_command(command, module.COMMANDS)
        with pytest.raises(UserError, match=f"--{name} is {value}, {least} expected"):
            evaluation.parse_command([*command, f"--{name}", value], module.COMMANDS)


CHANGES = {  # options that change what a local model answers: another value
    "template": "instruct", "dtype": "bfloat16", "temperature": 0.5, "top_p": 0.5, "top_k": 5,
    "max_tokens": 3, "seed": 1}
KEEPS = {"batch_size": 1, "timeout": 99}
OTHERS = {"out", "model", "server", "server_model", "body", "workers", "request_timeout", "tries",
          "given"}


def test_every_option_that_changes_an_answer_is_part_of_the_settings(world, tmp_path):
    options = {field.name for field in dataclasses.fields(evaluation.SamplingOptions)}
    assert options == CHANGES.keys() | KEEPS.keys() | OTHERS
    path = write_rows(tmp_path / "q.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    command = ("--tasks", f"own={path}", "--samples", 1, "--model", world["model"], "--out",
               tmp_path / "out", "--template", "hybrid", "--dtype", "float32", "--max_tokens", 2)
    code, said = program(evaluation, *command)
    assert code == 0, said
    kept = (tmp_path / "out/own/raw-0.jsonl").read_bytes()
    for name, value in (CHANGES | KEEPS).items():
        code, said = program(evaluation, *command, f"--{name}", value)
        assert (code == 1 and "other settings" in said) == (name in CHANGES), (name, said)
    assert (tmp_path / "out/own/raw-0.jsonl").read_bytes() == kept


# --- rectify --------------------------------------------------------------------------------------


def wrong_answers(folder, count):
    return write_rows(folder / "e.jsonl", [{"id": i, "question": f"{i}?", "ground_truth": "2",
                                            "original_answer": "It is 1."} for i in range(count)])


def test_what_one_rank_alone_can_do_is_refused_on_two(world, tmp_path):
    errors = wrong_answers(tmp_path, 5)
    command = ["oracle.py", "rectify", "--errors", errors, "--tokenizer", world["model"]]
    local = ["--model", world["model"], "--dtype", "float32", "--max_tokens", 8]
    started = launch.Started([*command, *local, "--target", 2, "--out", tmp_path / "no"], ranks=2)
    assert started.wait()[0] == 1 and "needs one process" in started.said
    assert started.said.count("error:") == 1 and not (tmp_path / "no").exists()
    for ranks in (1, 2):  # a local Oracle without a target may have more
        launch.run([*command, *local, "--out", tmp_path / f"out{ranks}"], ranks)
    rejected = [(tmp_path / f"out{ranks}/rejected.jsonl").read_text() for ranks in (1, 2)]
    assert rejected[0] == rejected[1] and rejected[0].count("\n") == 5


# --- files of others, and charts ------------------------------------------------------------------


@pytest.mark.parametrize("content, ids", [
    ({"eos_token_id": None}, set()), ({}, set()), ({"eos_token_id": 0}, {0}),
    ({"eos_token_id": 7}, {7}), ({"eos_token_id": [0, 9]}, {0, 9}), ({"eos_token_id": []}, set())])
def test_ids_that_end_an_answer(content, ids, world, tmp_path):
    folder = shutil.copytree(world["model"], tmp_path / "model")
    write_json(str(folder / "generation_config.json"), content)
    local = evaluation.open_local_model(str(folder), None, "cpu")
    assert local.end == ids | {local.chat.im_end}


@pytest.mark.parametrize("count", [1, 2, 10_000])
def test_a_chart_has_every_step(count, tmp_path):
    folder = make_run(tmp_path / "run")
    write_rows(folder / "metrics.jsonl", [{"step": i, "loss": 1 + i} for i in range(count)])
    evaluation.report([str(folder)], str(tmp_path / "r.html"))
    page = Page(tmp_path / "r.html")
    points = page.paths()[0].removeprefix("M").split("L")
    first, last = (tuple(map(float, points[i].split(","))) for i in (0, -1))
    assert first == (0, -1) and last == (count - 1, pytest.approx(-count, rel=1e-3))
    assert f"steps 0 to {count - 1}" in page.text
    assert len(points) == count


# --- runs that are begun or resumed ---------------------------------------------------------------


def train_here(world, out, *more):
    """Exit code and output of a run of three steps."""
    return program(train, "--model", world["model"], "--pairs", world["pairs"], "--out", out,
                   "--dtype", "float32", "--batch_size", 8, "--epochs", 1, "--checkpointing",
                   "none", "--save_every", 1, "--keep", 9, *more)


def test_a_run_that_begins_again_watches_a_pair_of_its_own(world, tmp_path):
    other = {**world, "pairs": write_rows(tmp_path / "p.jsonl", read_log(world["pairs"])[5:17])}
    for pairs, out in (world, "again"), (other, "fresh"):
        assert train_here(pairs, tmp_path / out)[0] == 0
    for name in ("checkpoints", "model"):  # as if killed before the first checkpoint
        shutil.rmtree(tmp_path / "again" / name)
    code, said = train_here(other, tmp_path / "again", "--resume")
    assert code == 0, said
    for name in ("surgery", "metrics"):
        rows = [launch.metrics(tmp_path / out, name) for out in ("again", "fresh")]
        assert rows[0] == rows[1]


def test_a_resumed_run_refuses_pairs_that_are_encoded_in_another_way(world, tmp_path):
    assert train_here(world, tmp_path / "out")[0] == 0
    for name in ("checkpoints/step_000003", "model"):
        shutil.rmtree(tmp_path / "out" / name)
    other = {**world, "model": shutil.copytree(world["model"], tmp_path / "model")}
    (tmp_path / "model/chat_template.jinja").write_text(train.TOY_TEMPLATE)
    code, said = train_here(other, tmp_path / "out", "--resume")
    assert code == 1 and "belongs to other pairs than given, or another tokenizer" in said


def test_what_a_killed_export_has_left_is_not_exported(world, tmp_path):
    (tmp_path / "out/model.tmp").mkdir(parents=True)
    (tmp_path / "out/checkpoints/new").mkdir(parents=True)
    (tmp_path / "out/checkpoints/new/shard_7.safetensors").write_bytes(b"half")
    (tmp_path / "out/model.tmp/model-00001-of-00002.safetensors").write_bytes(b"half")
    assert train_here(world, tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out/model").glob("*.safetensors"))) == 1
    assert not list((tmp_path / "out").glob("checkpoints/*/shard_7*"))


def test_an_export_that_fails_leaves_the_earlier_one(world, tmp_path, monkeypatch):
    assert train_here(world, tmp_path / "out")[0] == 0
    before = launch.files(tmp_path / "out/model")

    def full(*_, **__):
        raise OSError("No space left on device")
    monkeypatch.setattr(train.qwen, "write_tensors", full)
    assert train_here(world, tmp_path / "out", "--resume")[0] == 1
    assert launch.files(tmp_path / "out/model") == before
