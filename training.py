"""What the two training scripts share: optimizer, schedule, precision, and state that survives interruption."""

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, fields
from datetime import timedelta
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import lru_cache
from pathlib import Path

import torch

from cli import UserError, check_writable

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@lru_cache
def pick_device():
    """"cuda" or "cpu". Where there is a GPU of NVIDIA's that PyTorch cannot use, a line on stderr says so."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/proc/driver/nvidia/version").exists():
        print(f"there is a GPU, but this PyTorch, built for CUDA {torch.version.cuda}, cannot use it: is the driver older? On the CPU "
              "everything is many times slower", file=sys.stderr)
    return "cpu"


def pick_precision(device, name="auto", scaled=False):
    """The dtype of autocast: with "auto" bf16 on CUDA, and on a CPU fp32, since without AMX bf16 is slower there.

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
    """Mixed precision in `dtype`, by default pick_precision's; nothing for fp32."""
    dtype = dtype or pick_precision(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


class Processes:
    """The processes of one run: one, or those that `accelerate launch` started, which Accelerate brings together.

    Attributes: `number` of this one, `count`, `device` ("cpu" or "cuda", for autocast as well), `main`.
    """

    def __init__(self, device=None):
        self.number, self.count, self.device = 0, 1, device or pick_device()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState  # not before it is needed: a second or two

            # One may encode, or tokenize, for hours while the others wait.
            state = PartialState(cpu=self.device == "cpu", timeout=timedelta(hours=6))
            self.number, self.count, self.device = state.process_index, state.num_processes, state.device.type
        self.main = self.number == 0

    def wait(self):
        """Until all have come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, rows):
        """The lists of all processes, as one list, on each."""
        if self.count == 1:
            return rows
        parts = [None] * self.count
        torch.distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def add(self, *numbers):
        """Each number's sum over the processes; one number comes back alone."""
        if self.count > 1:
            total = torch.tensor(numbers, dtype=torch.float64 if self.device == "cpu" else torch.float32,
                                 device=self.device)
            torch.distributed.all_reduce(total)
            numbers = total.tolist()
        return numbers[0] if len(numbers) == 1 else numbers

    def share(self, tensors):
        """Make these tensors those of the main process, on each."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, 0)

    def add_gradients(self, parameters):
        """Replace each gradient by its sum over the processes, all in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view_as(gradient))


class Interruption:
    """Whether it is time to stop: after SIGTERM, as a cluster sends it before it kills, or `hours`. A context manager."""

    def __init__(self, hours=0.0):
        self.end = time.monotonic() + 3600 * hours if hours else math.inf
        self.signalled = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.stop)
        return self

    def __exit__(self, *error):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def stop(self, *signal_and_frame):
        self.signalled = True

    def __bool__(self):
        return self.signalled or time.monotonic() > self.end


class TrainingLog:
    """What happened in a run: lines of JSON beside its output, TensorBoard, and in the end a picture of the curves.

    Args:
        path: of the lines; the picture has its name and .png.
        updates: steps already taken; what the file holds of later ones, of a run that was killed, is dropped.
        tensorboard: a folder, or "" for none. Raises UserError where the package is missing.
    """

    def __init__(self, path, updates=0, tensorboard=""):
        self.path, self.board = Path(path), None
        lines = self.path.read_text(encoding="utf-8").splitlines() if updates and self.path.exists() else []
        self.entries = [entry for entry in map(self._entry, lines) if entry and entry["update"] <= updates]
        self.path.write_text("".join(map(self._line, self.entries)), encoding="utf-8")
        if tensorboard:
            self.board = self.find_tensorboard()(tensorboard, purge_step=updates + 1 if updates else None)

    @staticmethod
    def find_tensorboard():
        """Its writer's class. Raises UserError where the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from None
        return SummaryWriter

    @staticmethod
    def _entry(line):
        with contextlib.suppress(ValueError):  # the last line of a killed run can be half a line
            return json.loads(line)

    @staticmethod
    def _line(entry):
        return f"{json.dumps(entry, ensure_ascii=False, allow_nan=False)}\n"

    def write(self, update, **values):
        """Add one line; numbers among the values are TensorBoard's scalars, a dict is its text. What is not finite,
        which JSON cannot say, is null."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        self.entries.append({"update": update} | finite)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._line(self.entries[-1]))
        for name, value in values.items() if self.board else ():
            if isinstance(value, dict):
                self.board.add_text(name, "\n\n".join(f"{key}: {text}" for key, text in value.items()), update)
            elif isinstance(value, (int, float)):
                self.board.add_scalar(name, value, update)

    def close(self, curves):
        """Draw these values of the lines over the updates, one panel each that has any, into the picture."""
        from matplotlib.figure import Figure  # only here, and without a window

        if self.board:
            self.board.close()
        series = {name: [(entry["update"], entry[name]) for entry in self.entries if entry.get(name) is not None]
                  for name in curves}
        series = {name: points for name, points in series.items() if points}
        if not series:
            return  # a run of few steps
        figure = Figure(figsize=(5 * len(series), 3.5), layout="constrained")
        for axes, (name, points) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items()):
            axes.plot(*zip(*points), marker="o" if len(points) < 50 else None, markersize=3, linewidth=1)
            axes.set(title=name, xlabel="updates")
            axes.grid(alpha=0.3)
        figure.savefig(self.path.with_suffix(".png"), dpi=150)


def memory_in_use(device):
    """Bytes: on CUDA the most that were in use so far, on a CPU what this process holds now, without mapped files."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    except OSError:  # not Linux
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


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


def step_optimizer(optimizer, learning_rate, clip, scaler=None):
    """One update at this learning rate, times each group's factor, with gradients clipped to norm `clip`; 0: as they are.

    Parameters without gradients stay as they are. `scaler`: of fp16, which leaves out an update whose gradients
    overflowed. Returns the norm before clipping. Raises UserError, without an update, where it is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if scaler:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    if not scaler:
        check_finite(norm.item(), "gradient")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(value, what):
    """The value, a loss or a gradient's norm. Raises UserError where it is not finite."""
    if not math.isfinite(value):
        raise UserError(f"the {what} is {value}: training has come apart and stops here. What was saved before is good as it was; "
                        "a lower learning rate, or more --warmup, helps")
    return value


class MovingAverage:
    """Exponential moving average of parameters over the steps, which generalises better than the last step alone
    (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407; here with the decay of Tarvainen & Valpola 2017).

    Args:
        parameters: {name: parameter}.
        decay: of the average at each step, less over the first ones; 0: the parameters themselves.
    """

    def __init__(self, parameters, decay):
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()} if decay else {}

    def update(self):
        self.steps += 1
        if self.decay:
            decay = min(self.decay, self.steps / (self.steps + 9))
            torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """Within, the parameters hold the average."""
        pairs = [(self.parameters[name].data, value) for name, value in self.values.items()]
        self._swap(pairs)
        try:
            yield
        finally:
            self._swap(pairs)

    @staticmethod
    def _swap(pairs):
        for parameter, value in pairs:
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)


def what_matters(settings, *without):
    """A dataclass's fields but those `without`, as plain values: what a run that goes on must have in common."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()
            if name not in without}


def save_state(path, settings, optimizer, parameters, progress, scaler=None):
    """Everything that a run needs to go on as if it had never stopped, written whole.

    `settings` are compared by load_state; `progress` is a dict of plain values, the position among them.
    """
    state = {"settings": settings, "optimizer": optimizer.state_dict(), "progress": progress,
             "scaler": scaler.state_dict() if scaler else {},
             "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
             "random": torch.get_rng_state(),
             "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    temporary = Path(path).with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter where a disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}, to go on from ({str(error).splitlines()[0]}): make room and give the same command "
                        "again, which goes on from where it was saved before") from None


LOCKS = {}  # open files, each the lock of an output
DAMAGED = "{}, of an unfinished run, is damaged: delete it, or name another output"


def load_state(path, settings, optimizer, parameters, device, scaler=None):
    """Restore what save_state wrote and return its `progress`, or None if there is nothing to go on from."""
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
        if not isinstance(before, dict):
            raise TypeError
    except Exception:  # there is nothing that torch does not raise for some damaged file
        raise UserError(DAMAGED.format(path)) from None
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise UserError(f"{path} is of an unfinished run with another {changed[0]} ({before.get(changed[0])}, "
                        f"not {settings[changed[0]]}): repeat its settings, delete it, or name another output")
    try:
        for name, parameter in parameters.items():
            if state["parameters"][name].shape != parameter.shape or not state["parameters"][name].isfinite().all():
                raise ValueError
            parameter.detach().copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        if scaler:
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if device == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"])
        progress = state["progress"]
        if not isinstance(progress, dict):
            raise TypeError
    except Exception:
        raise UserError(DAMAGED.format(path)) from None
    return progress


def prepare_output(output, main=True):
    """Check that `output` can be written, that no finished run wrote it, and that no other run does, of which only the main
    process has to make sure; return the state file beside it."""
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
    if main:
        hold(output)
    return state_file


def hold(output):
    """Keep other processes of this user and machine from writing `output` until this one ends. Raises UserError where one does."""
    name = hashlib.sha256(os.fsencode(output.resolve())).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"training-{os.getuid()}-{name}.lock"
    if path in LOCKS:
        return
    lock = open(path, "w")
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"another run is writing {output}: wait for its end, or name another --output") from None
    LOCKS[path] = lock


def check_settings(settings, at_least_one=(), fractions=(), signed=()):
    """Raise UserError unless every number among a dataclass's fields is finite and, but for those `signed`, at least 0; these
    fields at least 1, and those from 0 to below 1."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, (int, float)):
            if not math.isfinite(value):
                raise UserError(f"--{field.name} is {value}, but must be a number")
            least = 1 if field.name in at_least_one else 0
            if value < least and field.name not in signed:
                raise UserError(f"--{field.name} is {value}, but must be at least {least}")
            if field.name in fractions and value >= 1:
                raise UserError(f"--{field.name} is {value}, but must be at least 0 and below 1")
