"""The run on eight GPUs without a GPU: build, load, reference pass, steps, evaluation, look, export.

What each rank does is the program as written, at the width of Qwen3-8B, on tensors without content.
"""

import random
from collections import Counter
from unittest import mock

import pytest
import torch
from fake_gpu import Slice, fake_gpu

CASES = [  # rank, ranks, --shard_size, tied, --loss, --checkpointing
    (0, 1, 0, False, "spot-bce", "full"),
    (0, 8, 0, True, "spot-bco", "full"),
    (7, 8, 0, False, "dpo", "none"),
    (0, 8, 4, False, "reward-sft", "full"),
    (7, 8, 4, True, "sft", "full"),
    (7, 8, 0, False, "dft", "full"),
]
# All that a step waits for the device: for the sums over ranks, and, after the update, to hear whether
# another rank failed.
STEP_WAITS = {("copy to the CPU", "share_totals > reduce"): 1, ("copy to the CPU", "together > reduce"): 1}


def make_forks(data, count, all_pairs):
    """Forks of some 1600 tokens; unless `all_pairs`, every other has no rejected answer."""
    rng, forks = random.Random(0), []
    for i in range(count):
        prompt, common, rejected, chosen = ([rng.randrange(1000) for _ in range(rng.randint(n, 2 * n))]
                                            for n in (200, 400, 250, 250))
        rejected = common + [1001] + rejected if all_pairs or i % 2 else None
        forks.append(data.make_fork(prompt, common + [1002] + chosen, rejected, i + 1, 0.5))
    return forks


def make_run(six, ranks, watch, layers, shard_size, tied, objective, checkpointing):
    """A Run as `prepare` makes it. Loading waits for each copy from the file, and once more."""
    config = six.model.Config(151936, 4096, 12288, layers, 32, 8, 128, 1e-6, 1e6, tied)
    o = six.train.Options(loss=objective, shard_size=shard_size, checkpointing=checkpointing,
                          batch_size=4 * ranks.world, tokens_per_pack=4000)
    with torch.device("meta"):
        shapes = {six.model.hf_name(n): p.shape for n, p in six.model.Qwen3(config).named_parameters()}
    stored = {name: ("model.safetensors", Slice(shape)) for name, shape in shapes.items()}
    watch.take()
    with mock.patch.object(six.model, "open_tensors", lambda folder: stored):
        policy, mesh = six.train.build_policy("folder", config, o, ranks)
    waits, collectives = watch.take()
    assert waits == {("copy from pageable memory", "build_policy > load_weights"): len(stored),
                     ("copy to the CPU", "build_policy > load_weights"): 1}
    assert not collectives
    forks = make_forks(six.data, 5 * ranks.world, objective in six.loss.PAIR_OBJECTIVES)
    run = six.train.Run(o, ranks, config, "folder", forks, forks[:5], {}, policy, mesh,
                        six.train.make_optimizer(policy, o))
    run.peak_flops = six.train.peak_flops(ranks.device, torch.bfloat16)
    assert run.peak_flops == 989e12
    return run


def count_packs(six, run, batches, forks):
    """Packs that each rank computes, dummies included: from the plan of all ranks."""
    lengths = list(map(len, forks))
    return sum(len(six.data.split_batch(batch, lengths, run.ranks.world, run.o.tokens_per_pack))
               for batch in batches)


def count_units(run):
    """FSDP's: the blocks, the root, and untied both tables."""
    return run.config.num_hidden_layers + (1 if run.config.tie_word_embeddings else 3)


def check_scoring(six, run, watch, forks, batches, function, *args):
    """Run a forward pass over all forks. It waits once, and gathers the root's weights once."""
    watch.take()
    scores = function(run, *args)
    waits, collectives = watch.take()
    assert waits == {("copy to the CPU", f"{function.__name__} > reduce"): 1}
    gathers = count_packs(six, run, batches, forks) * (count_units(run) - 1) + 1
    assert collectives == Counter(allreduce_=1, _allgather_base_=gathers if run.ranks.world > 1 else 0)
    return scores


def check_step(six, run, watch, batch):
    """Train a step as the loop does. Each unit is gathered forward and, but for the root, backward again,
    and its gradients are scattered: in each pack, on every rank, whatever ran before."""
    world = run.ranks.world
    watch.take()
    with run.ranks.together():
        totals = six.train.train_step(run, batch, 1e-6)
        six.train.finish_step(run, batch, totals, 1e-6, seconds=1.0)
    waits, collectives = watch.take()
    assert waits == STEP_WAITS
    packs, units = count_packs(six, run, [batch], run.forks), count_units(run)
    expected = Counter(allreduce_=2)
    if world > 1:
        replicas = run.o.shard_size not in (0, world)
        expected += Counter(_allgather_base_=packs * (2 * units - 1), _reduce_scatter_base_=packs * units,
                            allreduce_=packs * units * replicas, all_reduce=1, wait_tensor=1)  # and the norm
    assert collectives == expected


def check_export(six, run, watch):
    """Every tensor is gathered on all ranks, and written whole by the main one."""
    written = {}

    def write(path, shapes, dtype, tensors):
        for (name, shape), tensor in zip(shapes, tensors):
            assert tensor.shape == shape and tensor.dtype == dtype
            written[name] = tuple(shape)
    watch.take()
    with mock.patch.multiple(six.model, write_safetensors=write, write_json=mock.DEFAULT,
                             read_json=lambda path: {}), mock.patch("os.makedirs"):
        six.model.export(run.policy, "out", "folder", main=run.ranks.main)
    _, collectives = watch.take()
    shapes = {six.model.hf_name(n): tuple(p.shape) for n, p in run.policy.named_parameters()}
    assert written == (shapes if run.ranks.main else {})
    gathers = len(shapes) if run.ranks.world > 1 else 0
    assert collectives == Counter(all_gather_into_tensor=gathers, wait_tensor=gathers)


def rehearse(layers, rank, world, *options):
    with fake_gpu(rank, world) as (six, ranks, watch):
        train, run = six.train, make_run(six, ranks, watch, layers, *options)
        batches = six.data.epoch_batches(len(run.forks), run.o.batch_size, 0, 0)
        held_out = train.fixed_batches(run.eval_forks, run.o)
        run.reference = check_scoring(six, run, watch, run.forks, batches, train.score_all, run.forks, batches,
                                      "reference")
        run.eval_reference = torch.zeros(len(run.eval_forks), 2, dtype=torch.float64)
        check_step(six, run, watch, batches[0])
        if rank > 0:
            assert [len(pack.rows) for pack in run.packs(run.forks, batches[0][:1])] == [0]
        check_step(six, run, watch, batches[0][:1])
        check_scoring(six, run, watch, run.eval_forks, held_out, train.evaluate)
        check_step(six, run, watch, batches[1])
        with mock.patch.multiple(six.data, append_row=mock.DEFAULT,
                                 read_log=lambda path: [{"reference": [0.0, 0.0]}]):
            train.look(run, "surgery.jsonl")
        check_step(six, run, watch, batches[0][:1])
        shards = run.o.shard_size or world
        parts = [part for part, *_ in train.checkpoint_tensors(run).values()]
        assert sum(part.numel() for part in parts) * shards == 3 * sum(p.numel() for p in run.policy.parameters())
        assert {(part.dtype, part.device.type) for part in parts} == {(torch.float32, "lazy")}
        check_export(six, run, watch)


@pytest.mark.parametrize("case", CASES)
def test_two_layers(case):
    rehearse(2, *case)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 7])
def test_all_layers(rank):
    rehearse(36, rank, 8, 0, False, "spot-bce", "full")
