"""Several processes that train one network together, each on its share of every batch.

    torchrun --nproc_per_node=2 train.py --tasks cls seg

World holds the processes, `parallelize` prepares a network. A mean over the batch is a quotient of two
`all_reduce_sum`s. So every process has the loss of the whole batch, and its gradient once DistributedDataParallel has
averaged the processes': the backward pass of `all_reduce_sum` adds too, over as many equal losses as there are
processes. Imports nothing of ours but files.py.
"""

import contextlib
import copy
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retina.files import InputError, RunError


class AllReduceSum(torch.autograd.Function):
    """Sum a tensor over all processes, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllReduceSum.apply(grad)


class World:
    """The processes of a run, of `rank` 0 to `size` - 1; rank 0 prints and writes. Without torchrun there is one.

    `cpu_group` is for waiting until rank 0 has read a data set. As a context it raises RunError if another process is
    lost.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, cpu_group: dist.ProcessGroup | None = None):
        self.rank, self.size, self.local_rank, self.cpu_group = rank, size, local_rank, cpu_group

    def launcher(self) -> list[str]:
        """What stands before the program's name in the command that starts these processes."""
        return ["python"] if self.size == 1 else ["torchrun", f"--nproc_per_node={self.size}"]

    def __enter__(self) -> "World":
        return self

    def __exit__(self, error_class, error, trace) -> None:
        if self.size == 1:
            return
        if error is None:  # otherwise the others may be waiting somewhere else, and would be waited for here
            dist.destroy_process_group()
        elif isinstance(error, RuntimeError) and not isinstance(error, RunError) and any(
                word in str(error) for word in ("gloo", "NCCL", "Connection", "connection")):
            first = (str(error).splitlines() or [""])[0]
            raise RunError(f"process {self.rank} of {self.size} lost another one, whose own message says why; "
                           f"--resume goes on with a run that has begun ({first[:100]})") from error

    def device(self, wanted: torch.device) -> torch.device:
        """The device of this process. InputError: there are fewer GPUs than processes."""
        if self.size == 1 or wanted.type == "cpu":
            return wanted
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node: process {self.local_rank + 1} of a machine that has "
                             f"{torch.cuda.device_count()} GPUs; expected at most one process for each")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of x over all processes; it has a gradient."""
        return x if self.size == 1 else AllReduceSum.apply(x)

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        return self.all_reduce_sum(torch.tensor(flags, dtype=torch.float32, device=device)).bool().tolist()

    def gather(self, value: Any) -> list | None:
        """The values of all processes by rank, in rank 0; None in the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, in all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.cpu_group)
        return box[0]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do, which then find its work done."""
        if self.size > 1 and self.rank > 0:
            dist.barrier(self.cpu_group)
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier(self.cpu_group)


SINGLE_PROCESS = World()


def init_world() -> World:
    """Connect to the other processes that torchrun has started, if it has."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return SINGLE_PROCESS
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(minutes=10))
    cpu_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=6))
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), cpu_group)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm with the mean and variance of the whole batch; a process may have no photograph.

    torch's SyncBatchNorm does not run on CPUs, and a process without a photograph of a task sends half precision to
    the others, which expect float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.weight.dtype)  # float32
            n = AllReduceSum.apply(wide.new_tensor(wide.numel() / wide.shape[1]))  # values of a channel
            mean = AllReduceSum.apply(wide.sum((0, 2, 3))) / n  # (C,)
            wide = wide - mean[:, None, None]
            variance = AllReduceSum.apply(wide.square().sum((0, 2, 3))) / n
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (wide * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def parallelize(net: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Prepare `net` for several processes: the same parameters, norms over the whole batch.

    -> The module to call in its place in training. It has done one backward pass of zeros, which changes nothing. After
    its first one DistributedDataParallel groups the gradients anew; three or more processes then add them in another
    order, and a resumed run would end otherwise than one that was not stopped.
    """
    if world.size == 1:
        return net
    for module in list(net.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, to_shared_batch_norm(norm))
    parallel = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    before = copy.deepcopy(net.state_dict())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        net.train()
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
        indices = dict.fromkeys(net.heads, torch.zeros(1, dtype=torch.int64, device=device))
        sum(0 * x.sum() for x in parallel(images, indices)[0].values()).backward()
    net.zero_grad(set_to_none=True)
    net.load_state_dict(before)
    return parallel


def to_shared_batch_norm(norm: nn.BatchNorm2d) -> SharedBatchNorm:
    """The same norm, over all processes."""
    other = SharedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        setattr(other, name, tensor)
    return other
