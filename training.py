"""What the two training scripts share: optimizer, schedule, precision, and state that survives interruption."""

import contextlib
import math
import os
import pickle
from pathlib import Path

import torch

from cli import UserError, check_writable


def pick_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(device):
    """bf16 on CUDA. On a CPU fp32: without AMX, bf16 there is many times slower."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def adamw(groups, learning_rate, weight_decay):
    """AdamW that decays matrices only: not biases and norms.

    `groups`: pairs of parameters and what their learning rate is to be multiplied by.
    """
    split = []
    for parameters, factor in groups:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for decay, chosen in (weight_decay, lambda p: p.ndim >= 2), (0.0, lambda p: p.ndim < 2):
            if some := list(filter(chosen, parameters)):
                split.append({"params": some, "weight_decay": decay, "factor": factor})
    return torch.optim.AdamW(split, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def cosine(step, total, warmup):
    """Factor of the learning rate at `step` of `total`: a linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def step_optimizer(optimizer, learning_rate, clip):
    """One update at this learning rate, times each group's factor, with gradients clipped to norm `clip`.

    Parameters without gradients stay as they are. Returns the norm before clipping.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def save_state(path, settings, optimizer, parameters, progress):
    """Everything that a run needs to go on as if it had never stopped, written whole.

    `settings` are compared by load_state; `progress` is a dict of plain values, the position among them.
    """
    state = {"settings": settings, "optimizer": optimizer.state_dict(), "progress": progress,
             "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
             "random": torch.get_rng_state(),
             "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    temporary = Path(path).with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(path, settings, optimizer, parameters, device):
    """Restore what save_state wrote and return its `progress`, or None if there is nothing to go on from."""
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{path}, of an unfinished run, is damaged: delete it, or name another --output") from None
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise UserError(f"{path} is of an unfinished run with another {changed[0]} ({before.get(changed[0])}, "
                        f"not {settings[changed[0]]}): repeat its settings, delete it, or name another --output")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if device == "cuda" and state["cuda_random"] is not None:
        torch.cuda.set_rng_state(state["cuda_random"])
    return state["progress"]


def prepare_output(output):
    """Check that `output` can be written, and that no finished run wrote it; return the state file beside it."""
    output = Path(output)
    state_file = output.with_suffix(".state.pt")
    if output.suffix != ".safetensors":
        raise UserError(f"--output is {output}, but should end in .safetensors")
    if output.exists() and not state_file.exists():
        raise UserError(f"{output} is there already: delete it or name another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {output.parent}: {error.strerror}") from None
    check_writable(output)
    return state_file


def check_settings(settings, at_least_one, fractions):
    """Raise UserError unless these fields of a dataclass are at least 1, and those from 0 to below 1."""
    for name in at_least_one:
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} is {getattr(settings, name)}, but must be at least 1")
    for name in fractions:
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"--{name} is {getattr(settings, name)}, but must be at least 0 and below 1")
