"""The run on eight GPUs without a GPU, at the width of Qwen3-8B: each rank's part, as written."""

from collections import Counter
from unittest import mock

import pytest
import torch
from fake_gpu import fake_gpu

CASES = [  # layers, rank, ranks, --shard_size, tied, --loss, --checkpointing
    (2, 0, 1, 0, False, "dft", "full"),
    (2, 0, 8, 0, True, "spot-bco", "full"),
    (2, 7, 8, 0, False, "dpo", "none"),
    (2, 0, 8, 4, False, "spot-bce", "full"),
    (2, 7, 8, 4, True, "sft", "full"),
    (2, 7, 8, 0, True, "reward-sft", "none"),
    pytest.param((36, 7, 8, 0, False, "spot-bce", "full"), marks=pytest.mark.slow),
]
LOAD, SUMS = "build_policy > load_weights", ("copy to the CPU", "train_step > reduce")
# All that a step waits for: the sums over ranks, and, after the update, whether a rank failed.
STEP = Counter({SUMS: 1, ("copy to the CPU", "together > reduce"): 1})


def stored(shape):
    """A tensor of a checkpoint as safetensors gives it."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    tensor.get_shape = lambda: list(shape)
    tensor.get_dtype = lambda: "BF16"
    return tensor


def make_run(train, ranks, watch, layers, shard_size, tied, objective, checkpointing):
    """A Run as `prepare` makes it. Loading waits for each copy."""
    config = train.qwen.Config(151936, 4096, 12288, layers, 32, 8, 128, 1e-6, 1e6, tied)
    o = train.Options(loss=objective, shard_size=shard_size, checkpointing=checkpointing,
                      batch_size=3 * ranks.world, tokens_per_pack=1200)
    with torch.device("meta"):
        weights = train.qwen.Qwen3(config).named_parameters()
    tensors = {train.qwen.hf_name(name): stored(p.shape) for name, p in weights}
    with mock.patch.object(train.qwen, "open_tensors", lambda folder: tensors):
        policy, waits, collectives = watch.call(train.build_policy, "", config, o, ranks)
    assert not collectives and waits == {("copy to the device", LOAD): len(tensors)}
    forks = []
    for i in range(4 * ranks.world):
        ids = list(range(100 + 10 * (i % 7)))
        paired = objective in train.loss.PAIR_OBJECTIVES or i % 2 == 0
        rejected = ids + [1002] + ids[:50] if paired else []
        forks.append(train.data.make_fork(ids, ids + [1001] + ids, rejected, i))
    return train.make_run(o, ranks, policy, forks, forks[:3])


def count_packs_and_units(train, run, batches):
    """Packs are as many on every rank: one without work has dummies. Units are FSDP's."""
    lengths = [len(fork) for fork in run.train_set.forks]
    plans = [train.split_batch(batch, lengths, run.ranks.world, 1200) for batch in batches]
    config = run.policy.config
    tables = 0 if config.tie_word_embeddings else 2
    return sum(len(plan) for plan in plans), config.num_hidden_layers + tables + 1


def check_scoring(train, run, watch, batches, function, *args):
    """A pass without gradients waits once; its first pack gathers the root for all packs."""
    result, waits, collectives = watch.call(function, run, *args)
    assert waits == {("copy to the CPU", f"{function.__name__} > reduce"): 1}
    packs, units = count_packs_and_units(train, run, batches)
    gathers = packs * (units - 1) + 1 if run.ranks.world > 1 else 0
    assert collectives == Counter(allreduce_=1, _allgather_base_=gathers)
    return result


def check_step(train, run, watch, batch):
    """Each pack gathers each unit forward and, but the root, backward, and scatters gradients."""
    @run.ranks.together()
    def step():
        totals = train.train_step(run, batch, 1e-6)
        train.finish_step(run, batch, totals, 1e-6, seconds=1.0)

    _, waits, collectives = watch.call(step)
    assert waits == STEP
    packs, units = count_packs_and_units(train, run, [batch])
    expected = Counter(allreduce_=2)
    if run.ranks.world > 1:
        expected.update(_allgather_base_=packs * (2 * units - 1), all_reduce=1, wait_tensor=1,
                        _reduce_scatter_base_=packs * units)  # all_reduce: the gradient's norm
    if run.o.shard_size:  # replicas add their gradients
        expected["allreduce_"] += packs * units
    assert collectives == expected


def check_files(train, run, watch, out):
    """A checkpoint has this rank's weights and moments; export gathers each tensor on all ranks."""
    shapes, written = [p.shape for p in run.policy.parameters()], []
    parts = [train.qwen.rows_here(t)[0] for t in train.checkpoint_tensors(run).values()]
    count = sum(part.numel() for part in parts if part.is_cuda and part.dtype == torch.float32)
    assert count * (run.o.shard_size or run.ranks.world) == 3 * sum(s.numel() for s in shapes)

    def write(path, tensors):
        written.extend(tensor.shape for tensor in tensors.values())
    with mock.patch.object(train.qwen, "write_tensors", write):
        _, _, collectives = watch.call(train.qwen.export, run.policy, out, "", run.ranks)
    assert written == (shapes if run.ranks.main else [])
    gathers = len(shapes) if run.ranks.world > 1 else 0
    del collectives["allreduce_"]  # after each file: did it get written?
    assert collectives == Counter(all_gather_into_tensor=gathers, wait_tensor=gathers)


@pytest.mark.parametrize("case", CASES)
def test_one_rank(case, monkeypatch, tmp_path):
    layers, rank, world, *options = case
    with fake_gpu(monkeypatch, rank, world) as (train, ranks, watch):
        run = make_run(train, ranks, watch, layers, *options)
        batches = run.train_set.batches
        one_pair = batches[0][:1]
        run.train_set.reference = run.held_out.reference = check_scoring(
            train, run, watch, batches, train.score_all, run.train_set, "reference")
        check_step(train, run, watch, batches[0])
        assert rank == 0 or [len(pack.rows) for pack in run.packs(run.train_set, one_pair)] == [0]
        check_scoring(train, run, watch, [range(3)], train.score_held_out)
        check_step(train, run, watch, one_pair)
        run.watched.reference = run.train_set.reference[:1]
        train.snapshot(run)
        check_step(train, run, watch, batches[1])
        check_files(train, run, watch, str(tmp_path))
