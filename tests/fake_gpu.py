"""A GPU that is not there: the six files run as written, on tensors without content.

FakeTensorMode keeps shapes, dtypes and devices and computes nothing; torch's "fake" process group
answers at once; torch's unused device type "lazy", which a CPU build's autograd accepts, stands for
"cuda": that word is replaced in the sources. `Watch` sees every operation.
"""

import contextlib
import sys
import traceback
import types
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

NAMES = ("loss", "model", "data", "eval", "oracle", "train")
FILES = {str(Path(__file__).parent.parent / f"{name}.py"): name for name in NAMES}
DEVICE = torch.device("lazy", 0)
dist.Backend.register_backend("fake", fake_pg._create_fake_pg, True, ["cpu", "cuda", "lazy"])


def place() -> str:
    """The running function of the six files and its caller, as "train_step > reduce"."""
    codes = [frame.f_code for frame, _ in traceback.walk_stack(None)]
    names = [code.co_name for code in codes if code.co_filename in FILES]
    return " > ".join(reversed(names[:2]))


class Watch(TorchDispatchMode):
    """Counts what waits for the device, by (kind, place), and the collectives, by name.

    Fails where a collective gets a tensor off the device, or an operation tensors of two devices
    (but for numbers, which a GPU takes). FakeTensorMode refuses what has a shape only with content.
    """

    def call(self, function, *args, **kwargs):
        """(result, waits, collectives) of a call."""
        self.waits, self.collectives = Counter(), Counter()
        return function(*args, **kwargs), self.waits, self.collectives

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: it calls plain operations and collectives
        name, kwargs = func._schema.name, kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name == "aten::_local_scalar_dense" and isinstance(inputs[0], FakeTensor):
            if inputs[0].device == DEVICE:
                self.waits["item", place()] += 1
            return {torch.bool: True, torch.int64: dist.get_world_size()}.get(inputs[0].dtype, 1.0)
        if "c10d" in name:
            self.collectives[name.split("::")[1]] += 1
            assert {t.device for t in inputs} == {DEVICE}, f"{name} in {place()}: off the device"
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            way = inputs[-1].device.type, out.device.type
            background = kwargs.get("non_blocking") or args[2:] == (True,)
            if way == ("lazy", "cpu"):
                self.waits["copy to the CPU", place()] += 1
            if way == ("cpu", "lazy") and not (background and hasattr(inputs[-1], "pinned")):
                self.waits["copy to the device", place()] += 1
            return out
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in inputs + outputs if t.ndim > 0 and t.numel() > 0}
        assert not {"cpu", "lazy"} <= devices, f"{name} in {place()}: tensors on two devices"
        return out


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """As on CUDA in 16 bit: the flash kernel, aligned at the bottom right, which takes no mask."""
    assert q.dtype == torch.bfloat16 and {q.device, k.device, v.device} == {DEVICE}
    assert k.shape == v.shape and enable_gqa and q.shape[1] % k.shape[1] == 0
    if is_causal:
        assert attn_mask is None and q.shape[2] == k.shape[2]
    else:
        assert isinstance(attn_mask, CausalBias) and attn_mask.variant == CausalVariant.LOWER_RIGHT
        assert (attn_mask.seq_len_q, attn_mask.seq_len_kv) == (q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def pin_memory(tensor):
    copy = tensor.clone()
    copy.pinned = True
    return copy


@contextlib.contextmanager
def fake_gpu(monkeypatch, rank, world):
    """One of `world` GPUs: yields the module `train`, Ranks and a Watch. Numbers are any."""
    patch, device = monkeypatch.setattr, mock.MagicMock()  # has streams and events
    device.current_device.return_value, device.device_count.return_value = 0, 8
    patch(torch, "lazy", device, raising=False)
    patch(torch.Tensor, "is_cuda", property(lambda self: self.device == DEVICE))
    patch(torch.Tensor, "pin_memory", pin_memory)
    patch(FakeTensor, "tolist", lambda self, tolist=FakeTensor.tolist: tolist(self.cpu()))
    patch(torch.cuda, "max_memory_allocated", lambda: 0)
    patch(F, "scaled_dot_product_attention", attention)
    for path, name in FILES.items():
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        source = Path(path).read_text(encoding="utf-8").replace('"cuda"', '"lazy"')
        exec(compile(source, path, "exec"), vars(sys.modules[name]))
    train, model = sys.modules["train"], sys.modules["model"]
    for module, name in ((train, "check_step"), (train.data, "append_row"), (model, "read_json"),
                         (model, "write_json")):
        patch(module, name, mock.MagicMock())  # these read, write or judge numbers
    for module, name in (train, "init_device_mesh"), (model, "causal_lower_right"):
        patch(module, name, _disable_current_modes()(getattr(module, name)))  # need content
    dist.init_process_group("fake", rank=rank, world_size=world, store=fake_pg.FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            yield train, model.Ranks(rank, world, DEVICE), watch
        assert not device.synchronize.called and not device.Event().synchronize.called
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it remembers meshes
