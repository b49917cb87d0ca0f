"""Device, precision, and the processes of one run."""

import contextlib
import os
import sys
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch

from cli import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY = 2 * 2**30  # bytes that images take which are computed at once


@lru_cache
def pick_device():
    """"cuda" or "cpu". Prints a line on stderr if there is an NVIDIA GPU that PyTorch cannot use."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/proc/driver/nvidia/version").exists():
        print(f"there is a GPU, but this PyTorch, built for CUDA {torch.version.cuda}, cannot use it: is the driver older? On the CPU "
              "everything is many times slower", file=sys.stderr)
    return "cpu"


def pick_precision(device, name="auto", scaled=False):
    """The dtype of autocast: "auto" is bf16 on CUDA and fp32 on a CPU, where bf16 is slower without AMX.

    `scaled`: whether gradients are scaled, so that "auto" may be fp16 on a GPU that only emulates bf16. Raises UserError for an
    unknown name.
    """
    if name == "auto":
        name = "bf16" if device == "cuda" else "fp32"
        if scaled and name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "fp16"
    if name not in PRECISIONS:
        raise UserError(f"--precision is {name}: choose from auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def autocast(device, dtype=None):
    """Mixed precision in `dtype`, by default pick_precision's; no autocast for fp32."""
    dtype = dtype or pick_precision(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


class Processes:
    """The processes of one run: one, or those started by `accelerate launch`, which communicate through Accelerate.

    Attributes: `number` of this process, `count`, `device` ("cpu" or "cuda", also for autocast), `main`.
    """

    def __init__(self, device=None):
        self.number, self.count, self.device = 0, 1, device or pick_device()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState  # imported only when needed: it takes a second or two

            # One process may tokenize, or score, for hours while the others wait.
            self.state = PartialState(cpu=self.device == "cpu", timeout=timedelta(hours=6))
            self.number, self.count, self.device = self.state.process_index, self.state.num_processes, self.state.device.type
        self.main = self.number == 0

    def pieces(self, rows, accumulation=1):
        """This process's part of a batch's rows, split into at most so many pieces.

        All processes get the same number of pieces, since they compute in step; pieces are empty if no rows are left.
        """
        mine, size = rows[self.number::self.count], -(-len(rows) // (self.count * accumulation))
        return [mine[start:start + size] for start in range(0, -(-len(rows) // self.count), size)]

    def wait(self):
        """Wait until all processes have reached this point."""
        if self.count > 1:
            self.state.wait_for_everyone()

    def told(self, stop):
        """Whether it is time to stop, by `stop` here or in any process that was asked before. Unlike `add`, it waits for nobody."""
        if self.count == 1:
            return bool(stop)
        from torch.distributed import group

        store = group.WORLD.get_group_store()
        if stop:
            store.set("stop", "yes")
        return bool(stop) or store.check(["stop"])

    def gather(self, rows):
        """Concatenate the lists of all processes, on each of them."""
        if self.count == 1:
            return rows
        from accelerate.utils import gather_object

        return gather_object(rows)

    def add(self, *numbers):
        """Each number's sum over the processes; a single number is returned as it is, not in a list."""
        if self.count > 1:
            dtype = torch.float64 if self.device == "cpu" else torch.float32
            numbers = self.sum(torch.tensor(numbers, dtype=dtype, device=self.device)).tolist()
        return numbers[0] if len(numbers) == 1 else numbers

    @staticmethod
    def sum(tensor):
        """The sum of a tensor over several processes."""
        from accelerate.utils import reduce

        return reduce(tensor, "sum")

    def share(self, tensors):
        """Broadcast these tensors from the main process."""
        if self.count > 1:
            from accelerate.utils import broadcast

            broadcast([tensor.data for tensor in tensors])

    def add_gradients(self, parameters):
        """Replace each gradient by its sum over the processes, all in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count > 1 and gradients:
            flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view_as(gradient))


def at_once(each, most):
    """How many images to compute at a time: at most `most`, and as many as MEMORY holds if each takes so many bytes."""
    return max(1, min(most, MEMORY // each))


def memory_in_use(device):
    """Bytes: on CUDA the peak so far, on a CPU the current memory of this process without mapped files."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    except OSError:  # not Linux
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def shard(layers, whole=()):
    """Shard frozen layers over the processes (FSDP: Zhao et al. 2023, https://arxiv.org/abs/2304.11277), and move each to this process's
    device; the trained parameters, `whole`, are not sharded, and stay where they are."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer, reshard_after_forward=True, ignored_params=set(whole) & set(layer.parameters()))


@contextlib.contextmanager
def unsharded(layers):
    """A context in which sharded layers are gathered on each process."""
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()
