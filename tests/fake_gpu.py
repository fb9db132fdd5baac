"""A GPU that is not there: build, training step and export run as written, on tensors without content.

FakeTensorMode keeps shapes, dtypes and devices and computes nothing. Torch's "fake" process group answers at
once. Torch's otherwise unused device type "lazy", which autograd accepts in a CPU build, stands for "cuda":
the six files are loaded with that word replaced. `Watch` sees every operation, and notes what waits for the
device, what goes into collectives, and what mixes devices.
"""

import contextlib
import os
import sys
import types
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.testing._internal.distributed import fake_pg
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = {name: os.path.join(ROOT, name + ".py") for name in ("loss", "model", "data", "eval", "oracle", "train")}
DEVICE = torch.device("lazy", 0)


def place():
    """Innermost function of the project that is running and its caller, as "train_step > reduce"."""
    names, frame = [], sys._getframe(1)
    while frame and len(names) < 2:
        if frame.f_code.co_filename in SOURCES.values():
            names.insert(0, frame.f_code.co_name)
        frame = frame.f_back
    return " > ".join(names)


class Stream:
    """A stream or an event. That one on the device waits for another costs nothing."""

    device = DEVICE

    def __init__(self, *args, **kwargs):
        pass

    def wait(self, *args):
        return self

    wait_stream = wait_event = record_event = record = wait


def stand_in():
    """The module `torch.lazy`, as FSDP uses `torch.cuda`."""
    module = types.ModuleType("torch.lazy")
    module.Stream = module.Event = Stream
    module.current_device = lambda: 0
    module.current_stream = lambda *args: Stream()
    module.stream = lambda stream: contextlib.nullcontext()
    module.set_device = lambda device: None
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 8
    return module


class Watch(TorchDispatchMode):
    """Counts what waits for the device, by kind and place, and the collectives by name.

    Fails where a collective gets a tensor that is not on the device, or an operation tensors of two devices.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.collectives = Counter(), Counter()

    def take(self):
        """(waits, collectives) since the last call."""
        seen = self.waits, self.collectives
        self.waits, self.collectives = Counter(), Counter()
        return seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: it makes plain operations of this one, collectives too
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = [t.device.type == "lazy" for t in tensors]
        if name.startswith(("c10d::", "_c10d_functional::")):
            self.collectives[name.split("::")[1]] += 1
            assert all(on_device), f"{name} in {place()}: a tensor is not on the device"
        if name == "aten::_local_scalar_dense":
            if on_device[0]:
                self.waits["item", place()] += 1
            return {torch.bool: True, torch.int64: 1}.get(tensors[0].dtype, 1.0)
        out = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            self.watch_copy(name, args, kwargs or {}, tensors[-1], out)
        elif name in ("aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"):
            if on_device[0]:
                self.waits[name, place()] += 1
        else:
            outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            kinds = {t.device.type for t in tensors + outs if t.ndim and t.numel()}
            assert not {"cpu", "lazy"} <= kinds, f"{name} in {place()}: tensors of two devices"
        return out

    def watch_copy(self, name, args, kwargs, source, out):
        way = source.device.type, out.device.type
        if way == ("lazy", "cpu"):
            self.waits["copy to the CPU", place()] += 1
        elif way == ("cpu", "lazy"):
            free = kwargs.get("non_blocking") or name == "aten::copy_" and len(args) > 2 and args[2]
            if not (free and getattr(source, "pinned", False)):
                self.waits["copy from pageable memory", place()] += 1


def pin_memory(self, *args):
    pinned = self.clone()
    pinned.pinned = True
    return pinned


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """scaled_dot_product_attention as CUDA does it in 16 bit: bottom-right causal flash attention."""
    queries, keys = q.shape[2], k.shape[2]
    assert q.device == k.device == v.device == DEVICE and q.dtype == torch.bfloat16
    assert k.shape == v.shape and enable_gqa and q.shape[1] % k.shape[1] == 0
    if is_causal:
        assert attn_mask is None and queries == keys
    else:
        assert isinstance(attn_mask, CausalBias) and attn_mask.variant == CausalVariant.LOWER_RIGHT
        assert (attn_mask.seq_len_q, attn_mask.seq_len_kv) == (queries, keys)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


class Slice:
    """A tensor of a checkpoint, as safetensors gives it."""

    def __init__(self, shape):
        self.shape = shape

    def get_shape(self):
        return list(self.shape)

    def get_dtype(self):
        return "BF16"

    def __getitem__(self, rows):
        return torch.empty(len(range(self.shape[0])[rows]), *self.shape[1:], dtype=torch.bfloat16)


def with_content(function):
    """The function, as it runs on real tensors."""
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)
    return call


def load_sources():
    """The six files as modules, with "cuda" replaced."""
    modules = {}
    for name, path in SOURCES.items():
        module = modules[name] = sys.modules[name] = types.ModuleType(name)
        module.__file__ = path
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read().replace('"cuda"', '"lazy"'), path, "exec"), module.__dict__)
    return SimpleNamespace(**modules)


@contextlib.contextmanager
def fake_gpu(rank, world):
    """The six files on rank `rank` of `world` GPUs: yields (modules, Ranks, Watch)."""
    with contextlib.ExitStack() as stack:
        def patch(*args, **kwargs):
            stack.enter_context(mock.patch.object(*args, **kwargs))

        stack.enter_context(mock.patch.dict(sys.modules, {"torch.lazy": stand_in()}))
        patch(torch, "lazy", sys.modules["torch.lazy"], create=True)
        patch(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "lazy"))
        patch(torch.Tensor, "pin_memory", pin_memory)
        patch(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["lazy"])
        patch(FakeTensor, "tolist", lambda self, tolist=FakeTensor.tolist: tolist(self.cpu()))
        patch(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        patch(torch.cuda, "max_memory_allocated", lambda: 0)
        patch(F, "scaled_dot_product_attention", attention)
        six = load_sources()
        patch(six.train, "canary", lambda *args: None)
        patch(six.train, "init_device_mesh", with_content(six.train.init_device_mesh))
        patch(six.model, "causal_lower_right", with_content(six.model.causal_lower_right))
        reduce = six.model.Ranks.reduce

        def reduce_without_error(self, tensor, op=dist.ReduceOp.SUM):  # the answer to: who failed?
            out = reduce(self, tensor, op)
            return self.world if op == dist.ReduceOp.MIN else out
        patch(six.model.Ranks, "reduce", reduce_without_error)
        dist.Backend.register_backend("fake", fake_pg._create_fake_pg, extended_api=True,
                                      devices=["cpu", "cuda", "lazy"])
        dist.init_process_group("fake", rank=rank, world_size=world, store=fake_pg.FakeStore())
        stack.callback(_clear_sharding_prop_cache)  # it remembers meshes
        stack.callback(dist.destroy_process_group)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        watch = stack.enter_context(Watch())
        yield six, six.model.Ranks(rank, world, DEVICE), watch
