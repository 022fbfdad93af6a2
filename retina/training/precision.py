"""What makes the same network faster. Most can be used alone.

    tune_malloc          freed memory is kept for the next step                       1.5 times as fast
    channels_last        the channels of a pixel lie side by side in memory           1.2 times
    default_precision    half precision, where the device has units for it            0.8 times, and with
    DepthwiseConv        a faster backward pass in bf16                               1.5 times more
    GroupedMatmul        fewer steps for many experts                                 the layer 1.3 times, of 64 2.3
    fuse_conv_bn         for evaluation: norms inside the convolutions before them    1.1 times
    fetch                results of a GPU are read once they have been computed       not measured

Measured on a training step at 256 pixels (`fuse_conv_bn`: a forward pass at 512), two cores of a Xeon with AMX, torch
2.14; `python tests/benchmark.py` measures it again.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retina.files import InputError


if TYPE_CHECKING:
    from model import Net


# B photographs, C channels, H W image, k side of a kernel


# ---- memory ----

def tune_malloc() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back and faulting it in again.

    Elsewhere than on glibc: nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):
        mallopt(option, value)


# ---- precision ----

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: torch.device) -> str:
    """The fastest precision of DTYPES that a device has units for.

    On a CPU that is AMX or AVX512_BF16; emulated, bf16 is ten times slower than fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Convolutions and matrix products in this precision; weights, sums and losses stay float32."""
    half = DTYPES[precision]
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


# ---- depthwise convolutions ----

class DepthwiseBackward(torch.autograd.Function):
    """Depthwise convolution in bf16 on a CPU: x (B, C, H, W) bf16, kernels (C, 1, k, k) float32.

    Forward, bf16 is fastest. Backward, oneDNN has fast bf16 code for one thing only, the gradient of 3x3 kernels. The
    other two gradients are brought to what is fast. That of x is a forward convolution of the output's gradient with
    the kernels turned by 180 degrees; a stride is undone by zeros between its entries. That of a 5x5 kernel is put
    together from those of its four 3x3 corners. At 256 pixels, layers of B0, one thread: 494 ms in float32, 370 so.
    """

    @staticmethod
    def forward(ctx, x: Tensor, kernels: Tensor, stride: int, padding: int) -> Tensor:
        kernels = kernels.to(x.dtype)
        ctx.save_for_backward(x, kernels)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, kernels, None, stride, padding, groups=len(kernels))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x, kernels), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        side = kernels.shape[2]
        spread = gradient
        if stride > 1:
            height, width = (n + 2 * padding - side + 1 for n in x.shape[2:])  # of an output of stride 1
            spread = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, memory_format=torch.channels_last)
            spread.zero_()
            spread[:, :, ::stride, ::stride] = gradient
        of_x = F.conv2d(spread, kernels.flip(2, 3), None, 1, side - 1 - padding, groups=len(kernels))
        # 3x3 kernels have one corner, and no need of a copy of x
        around, padding = (x, padding) if side == 3 else (F.pad(x, [padding] * 4), 0)
        of_kernels = torch.zeros_like(kernels)
        height, width = (n - side + 3 for n in around.shape[2:])
        for i, j in itertools.product(range(0, side - 2, 2), repeat=2):
            corner = slice(i, i + 3), slice(j, j + 3)
            of_kernels[:, :, *corner] = torch.ops.aten.convolution_backward(
                gradient, around[:, :, i:i + height, j:j + width], kernels[:, :, *corner], None, [stride] * 2,
                [padding] * 2, [1, 1], False, [0, 0], len(kernels), [False, True, False])[1]
        return of_x, of_kernels.float(), None, None


class DepthwiseConv(nn.Conv2d):
    """One kernel for each channel, (B, C, H, W) -> (B, C, H/stride, W/stride); see DepthwiseBackward."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return DepthwiseBackward.apply(x, self.weight, self.stride[0], self.padding[0])


# ---- experts ----

class GroupedMatmul(torch.autograd.Function):
    """Experts.grouped_matmul, see there, as one node of the graph; x and w are of one dtype.

    torch makes two nodes for each expert: the gradient of its part of x is as large as all of x, filled up with zeros,
    and those of all w_i are copied once more. Here each product is written where it belongs. torch's own grouped_mm
    takes neither float64 nor every width, see findings/torch_grouped_mm_on_a_cpu.sh.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, ends: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.ends = ends
        y = x.new_empty(len(x), w.shape[2])
        for x_i, y_i, w_i in zip(x.tensor_split(ends), y.tensor_split(ends), w):
            torch.mm(x_i, w_i, out=y_i)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, w = ctx.saved_tensors
        of_x, of_w = torch.empty_like(x), torch.empty_like(w)
        parts = (t.tensor_split(ctx.ends) for t in (x, gradient, of_x))
        for x_i, g_i, of_x_i, w_i, of_w_i in zip(*parts, w, of_w):
            torch.mm(g_i, w_i.T, out=of_x_i)
            torch.mm(x_i.T, g_i, out=of_w_i)
        return of_x, of_w, None


def channels_last(net: Net) -> Net:
    """Lay out a network's weights for speed, and with them every map; give it our DepthwiseConv and GroupedMatmul."""
    for module in net.modules():
        if type(module) is nn.Conv2d and 1 < module.groups == module.in_channels == module.out_channels \
                and module.bias is None and module.dilation == (1, 1):  # what DepthwiseBackward computes
            module.__class__ = DepthwiseConv
        elif hasattr(module, "grouped_matmul"):
            module.grouped_matmul = GroupedMatmul.apply
    return net.to(memory_format=torch.channels_last)


# ---- evaluation ----

def fuse_conv_bn(net: Net) -> Net:
    """A copy for evaluation whose norms are folded into the convolutions before them: the same function."""
    net = copy.deepcopy(net).eval()
    for module in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i, (one, other) in enumerate(itertools.pairwise(list(module))):
            if isinstance(one, nn.Conv2d) and isinstance(other, nn.BatchNorm2d):
                module[i], module[i + 1] = fuse_conv_bn_eval(one, other), nn.Identity()
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


# ---- a GPU's results ----

def fetch(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy numbers (n,) from a device; -> a function that waits for them, and for nothing queued later."""
    if values.device.type != "cuda":
        return values.tolist
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read():
        done.synchronize()
        return on_host.tolist()
    return read


# ---- device and precision from flags ----

def pick_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one. InputError: a GPU was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA GPU on this machine; use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """InputError: the device cannot compute in this precision."""
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: expected a GPU; on a CPU use fp32, or bf16")
