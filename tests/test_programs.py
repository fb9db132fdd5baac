"""What a trained model meets outside: transformers, PEFT and TRL open our files; and a second round
of the whole method starts from it. All by the command lines of the README, in the toy world."""

import pytest
import torch

import data
import eval as evaluation
import launch
import tiny
import model as qwen
import train

ORACLE = """import train
def mend(item):
    return train.toy_oracle(item)
"""
pytestmark = pytest.mark.slow  # half a minute, most of it for the base model
SHORT = ("--dtype", "float32", "--seed", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model that errs in sums of three digits."""
    root = tmp_path_factory.mktemp("programs")
    train.write_toy_checkpoint(str(root / "birth"), seed=0)
    data.write_rows(str(root / "corpus.jsonl"), train.toy_corpus(5000, 3, 0.2, 0.8, 0))
    run_train(root / "base", root / "birth", root / "corpus.jsonl", "--loss", "sft", "--lr", 3e-3,
              "--epochs", 2)
    questions = train.toy_questions("Add", 0, 200, 3)
    data.write_rows(str(root / "questions.jsonl"), [
        {"question": question, "answer": evaluation.extract_answer(train.toy_answer(question))}
        for question in questions])
    (root / "mend.py").write_text(ORACLE)
    return root


def run_train(out, model, pairs, *options):
    launch.run(["train.py", "--model", model, "--pairs", pairs, "--out", out, "--checkpointing",
                "none", "--save_dtype", "float32", "--save_every", 0, *options, *SHORT])


def run_round(root, name, model):
    """errors -> corrections -> training; returns the counts of `elicit`."""
    launch.run(["oracle.py", "elicit", "--questions", root / "questions.jsonl", "--model", model,
                "--instruction", "{question}", "--max_tokens", 40, "--out", root / f"{name}-errors",
                *SHORT])
    launch.run(["oracle.py", "rectify", "--errors", root / f"{name}-errors/errors.jsonl",
                "--tokenizer", model, "--function", f"{root}/mend.py:mend", "--out",
                root / f"{name}-pairs"])
    run_train(root / name, model, root / f"{name}-pairs/pairs.jsonl", "--lr", 3e-4, "--beta", 10,
              "--epochs", 4, "--batch_size", 8)
    return data.read_json(str(root / f"{name}-errors/summary.json"))


@pytest.fixture(scope="module")
def first(base):
    return run_round(base, "first", base / "base/model")


def test_a_second_round_starts_from_the_first_ones_model(base, first):
    second = run_round(base, "second", base / "first/model")
    assert second["right"] > first["right"] + 10
    rows = [data.read_log(str(base / f"{name}-pairs/pairs.jsonl")) for name in ("first", "second")]
    assert len(rows[1]) < len(rows[0]) and all(row["is_correct"] for row in rows[1])
    log = data.read_log(str(base / "second/metrics.jsonl"))
    # The reference of the second round is the first one's model: rewards start at 0 again.
    assert log[0]["reward_chosen"] == log[0]["reward_rejected"] == 0


def greedy(folder, questions):
    """Texts by our own sampler."""
    policy = evaluation.open_local_model(str(folder), torch.float32, torch.device("cpu"))
    prompts = [policy.chat.prompt([{"role": "user", "content": text}]) for text in questions]
    done = tiny.generate(policy.model, prompts, [0] * len(prompts), max_tokens=40, temperature=0,
                         end=[policy.chat.im_end])
    return [policy.chat.tokenizer.decode(ids) for ids, _ in done]


def test_transformers_pipeline_writes_the_same_texts(base, first):
    from transformers import AutoTokenizer, pipeline

    questions = train.toy_questions("Add", "pipeline", 20, 3)
    folder = base / "first/model"
    hf = pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    turns = [[{"role": "user", "content": text}] for text in questions]
    texts = [out[0]["generated_text"][-1]["content"] for out in
             hf(turns, max_new_tokens=40, do_sample=False)]
    assert texts == greedy(folder, questions)
    chat = data.load_chat(str(folder), hf.model.config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for turn in turns:
        assert chat.prompt(turn) == tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=False)


def test_an_adapter_of_peft_is_trained_on_top_and_merged_back(base, first, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_pretrained(base / "first/model", dtype=torch.float32)
    tuned = peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    for _ in range(3):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(data.UserError, match="config.json is missing|LoRA adapter"):
        qwen.load_model(str(tmp_path / "adapter"))
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ours = qwen.load_model(str(tmp_path / "merged"))
    with torch.no_grad():
        expected = merged(input_ids=ids).logits[0]
        positions = torch.arange(len(ids[0]))
        spans = [(0, len(ids[0]), len(ids[0]), len(ids[0]))]
        found = ours(ids[0], positions, spans, positions[:-1], ids[0][1:])
    logps = expected[:-1].log_softmax(-1).gather(1, ids[0][1:, None])[:, 0]
    torch.testing.assert_close(found, logps, rtol=0, atol=1e-5)


def test_trls_dpo_trainer_takes_our_pairs_after_a_rename(base, first, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset("json", data_files=str(base / "first-pairs/pairs.jsonl"), split="train",
                        cache_dir=str(tmp_path / "cache"))
    renamed = {"question": "prompt", "gemini_corrected_answer": "chosen",
               "original_answer": "rejected"}
    rows = rows.select_columns(list(renamed)).rename_columns(renamed)
    model = AutoModelForCausalLM.from_pretrained(base / "base/model", dtype=torch.float32)
    trainer = DPOTrainer(
        model=model, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(
            base / "base/model"),
        args=DPOConfig(output_dir=str(tmp_path / "out"), max_steps=2, report_to="none",
                       use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
                       per_device_train_batch_size=4))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and losses[0] == pytest.approx(0.693147, abs=1e-4)
