"""The training loop that all training scripts share: progress, log, saved state, interruption; optimizer, schedule, moving average."""

import contextlib
import hashlib
import json
import math
import os
import signal
import tempfile
import threading
import time
from dataclasses import asdict
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

import torch
from tqdm import tqdm

from cli import UserError
from devices import Processes
from files import check_writable

LOG_STEPS = 20  # updates between lines of the log
SAVE_MINUTES = 5  # between saved states; a killed run loses at most that much, and saving takes about a second


class Run:
    """One training run: its progress, its saved state, its log, and whether it is time to stop.

        run = Run(state_file, same, parameters, optimizer)
        with run:
            for step in run.steps(total):
                loss = …                                   # and its gradients
                run.update(learning_rate, loss=loss.item())
        if not run.stopped:
            run.finish(["loss"])

    With several processes each has a Run; only the main process writes.

    Args:
        state_file: the file of the state to resume from.
        same: plain values that a resumed run must share with the interrupted one.
        parameters: {name: parameter} that are trained.
        optimizer: of these parameters.
        average: a MovingAverage of these parameters, saved with them.
        processes: Processes; None: this one only.
        scaler: GradScaler for fp16.
        clip: maximum gradient norm; 0: no clipping.
        after: called after each optimizer step, before the average is updated.
        max_hours: stop after so many hours; 0: never. since: start of the hours, as time.monotonic() gives it; default: now.
        log, tensorboard: file of the log; folder for TensorBoard, or "".
        first: initial values of `progress`, beside the numbers of updates (`step`) and seconds.
    Attributes: `progress`, a dict of plain values, saved with the state; `about`, values to add to each line of the log; `stopped`, whether
    the run stopped before its end. Raises UserError if the state is of another run.
    """

    def __init__(self, state_file, same, parameters, optimizer, *, average=None, processes=None, scaler=None, clip=1.0, after=None,
                 max_hours=0.0, since=None, log=None, tensorboard="", first=None):
        self.state_file, self.same, self.parameters, self.optimizer = state_file, same, parameters, optimizer
        self.average, self.processes, self.scaler = average, processes or Processes("cpu"), scaler
        self.clip, self.after, self.max_hours, self.stopped = clip, after, max_hours, False
        self.kept = parameters | ({f"average.{name}": value for name, value in average.values.items()} if average else {})
        self.progress = {"step": 0, "seconds": 0.0, **(first or {})}
        found = load_state(state_file, same, optimizer, self.kept, self.processes.device, scaler)
        self.resumed = found is not None
        self.progress |= found or {}
        if average:
            average.steps = self.progress["step"]
        self.before = self.progress["seconds"]
        self.started = time.monotonic()
        self.begun = since or self.started
        self.log_file, self.tensorboard, self.log, self.about = log, tensorboard, None, {}
        self.values, self.items, self.since = {}, 0, self.started  # since the last line of the log

    def __enter__(self):
        self.started = self.saved = self.since = time.monotonic()
        if self.processes.main and self.log_file:
            self.log = TrainingLog(self.log_file, self.progress["step"], self.tensorboard)
        self.interruption = Interruption(self.max_hours, self.begun)
        self.interruption.__enter__()
        return self

    def __exit__(self, *error):
        self.interruption.__exit__(*error)

    @property
    def seconds(self):
        """Training time so far, over all sessions of the run."""
        return self.before + time.monotonic() - self.started

    @contextlib.contextmanager
    def paused(self):
        """A context in which time is not counted."""
        before, started = self.seconds, time.monotonic()
        yield
        self.before, self.started = before, time.monotonic()
        self.since += self.started - started

    def steps(self, end, start=0, description="training", where=""):
        """Yield the numbers of the remaining updates up to `end`, with a progress bar that counts from `start`. Each must be followed by an
        `update`. When it is time to stop, save the state, print a line that mentions `where`, and end."""
        with tqdm(total=end - start, initial=self.progress["step"] - start, desc=description, unit="batch",
                  disable=not self.processes.main) as self.bar:
            while self.progress["step"] < end and not self.stopped:
                yield self.progress["step"]
                self.bar.update()
                self.stopped = bool(self.processes.add(bool(self.interruption)))
                if self.stopped or time.monotonic() - self.saved > 60 * SAVE_MINUTES:
                    self.save()
        if self.stopped and self.processes.main:
            print(f"stopped{where} after {self.progress['step'] - start} of {end - start} batches: the same command goes on from there",
                  flush=True)

    def update(self, learning_rate, items=0, **values):
        """Update the parameters with the gradients, summed over the processes, at this learning rate times each group's factor.

        Args:
            items: number of images, or captions, in the update, for the log.
            values: losses and the like; the log gets their means. Raises UserError, without an update, if one of them or the gradient
                is not finite.
        """
        for name, value in values.items():
            self.values.setdefault(name, []).append(check_finite(value, name))
        self.processes.add_gradients(self.parameters.values())
        norm = step_optimizer(self.optimizer, learning_rate, self.clip, self.scaler)
        if self.after:
            self.after()
        if self.average:
            self.average.update()
        self.progress.update(step=self.progress["step"] + 1, seconds=self.seconds)
        self.items += items
        self.last = {"learning rate": learning_rate, "gradient norm": norm.item()}
        if self.progress["step"] % LOG_STEPS == 0:
            self.note()
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in self.means.items()})

    def note(self):
        """Write a line of the log with the means of the values since the last line, if there were updates."""
        if not self.values:
            return
        values, means = self.last, {name: sum(some) / len(some) for name, some in self.values.items()}
        now = time.monotonic()
        if self.items:
            values = values | {"images per second": self.items / max(1e-9, now - self.since)}
        self.means, self.values, self.items, self.since = means, {}, 0, now
        if self.log:
            self.write(**self.about, **means, **values, seconds=self.progress["seconds"])

    def write(self, **values):
        """Write a line of the log, with the current number of updates."""
        if self.log:
            self.log.write(self.progress["step"], **values)

    def save(self):
        """Write the state to resume from."""
        self.progress["seconds"] = self.seconds
        if self.processes.main:
            save_state(self.state_file, self.same, self.optimizer, self.kept, self.progress, self.scaler)
        self.saved = time.monotonic()

    def finish(self, curves):
        """Plot these values of the log and delete the state. To be called once the result is written."""
        if self.processes.main:
            if self.log:
                self.log.close(curves)
            self.state_file.unlink(missing_ok=True)
        self.processes.wait()


class Interruption:
    """Whether it is time to stop: after SIGTERM, which clusters send before they kill, or after `hours`. A context manager."""

    def __init__(self, hours=0.0, since=None):
        """`since`: start of the hours, as time.monotonic() gives it; default: now."""
        self.end = (time.monotonic() if since is None else since) + 3600 * hours if hours else math.inf
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
    """The log of a run: lines of JSON beside its output, TensorBoard, and finally a plot of the curves.

    Args:
        path: of the lines; the plot gets the same name with .png.
        updates: updates made so far; lines of later ones, left by a run that was killed, are dropped.
        tensorboard: a folder, or "" for none. Raises UserError if the package is missing.
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
        """TensorBoard's SummaryWriter. Raises UserError if the package is missing."""
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
        """Add one line; numbers also go to TensorBoard as scalars, dicts as text. Values that are not finite, which JSON lacks,
        become null."""
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
        """Plot these values of the lines."""
        if self.board:
            self.board.close()
        self.draw(curves)

    def draw(self, curves):
        """Plot these values over the updates, a panel for each that occurs."""
        from matplotlib.figure import Figure  # imported here only, and used without a window

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


def adamw(groups, learning_rate, weight_decay):
    """AdamW with weight decay for matrices only, not for biases and norms.

    `groups`: pairs of parameters and the factor of their learning rate.
    """
    split = []
    for parameters, factor in groups:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for decay, chosen in (weight_decay, lambda p: p.ndim >= 2), (0.0, lambda p: p.ndim < 2):
            if some := list(filter(chosen, parameters)):
                split.append({"params": some, "weight_decay": decay, "factor": factor})
    return torch.optim.AdamW(split, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def cosine(step, total, warmup):
    """Factor of the learning rate at `step` of `total`: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def step_optimizer(optimizer, learning_rate, clip, scaler=None):
    """One update at this learning rate, times each group's factor, with gradients clipped to norm `clip`; 0: no clipping.

    Parameters without gradients are not changed. `scaler`: GradScaler for fp16, which skips an update whose gradients
    overflowed. Returns the norm before clipping. Raises UserError, without an update, if it is not finite.
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


def epoch_order(count, seed, epoch):
    """The order (count,) in which an epoch visits its examples; it depends only on the seed and the epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def step_generator(seed, step):
    """A generator for what a step draws; PyTorch's own, which dropout uses, gets the same seed."""
    torch.manual_seed((seed << 32) + step)
    return torch.Generator().manual_seed((seed << 32) + step)


@torch.no_grad()
def bound_scale(log_scale):
    """Clamp a learned temperature's logarithm in place: similarities are multiplied by 100 at most (CLIP)."""
    log_scale.clamp_(max=math.log(100))


def check_finite(value, what):
    """Return the value, a loss or a gradient's norm. Raises UserError if it is not finite."""
    if not math.isfinite(value):
        raise UserError(f"the {what} is {value}: training diverged and has stopped. The last saved state is intact; try a "
                        "lower learning rate")
    return value


class MovingAverage:
    """Exponential moving average of parameters over the steps, which generalises better than the last step's weights
    (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407; here exponential, as in Tarvainen & Valpola 2017).

    Args:
        parameters: {name: parameter}.
        decay: of the average per step, smaller at the first steps; 0: no average, the parameters themselves.
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
        """A context in which the parameters hold the average."""
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


def comparable(settings, *without):
    """A dataclass's fields except those `without`, as plain values, for `Run`'s `same`."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()
            if name not in without}


def save_state(path, settings, optimizer, parameters, progress, scaler=None):
    """Save everything that a run needs to continue as if it had never stopped, atomically.

    `settings` are compared by load_state; `progress` is a dict of plain values, the number of updates among them.
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


LOCKS = {}  # open lock files, one per output
DAMAGED = "{}, of an unfinished run, is damaged: delete it, or name another output"


def load_state(path, settings, optimizer, parameters, device, scaler=None):
    """Restore what save_state wrote and return its `progress`, or None if there is no state."""
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
        if not isinstance(before, dict):
            raise TypeError
    except Exception:  # for damaged files torch raises almost anything
        raise UserError(DAMAGED.format(path)) from None
    if missing := settings.keys() - before.keys():
        raise UserError(f"{path} was saved by an older version, which had no setting {min(missing)}: delete it, or name another output")
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
        if scaler and state["scaler"]:  # empty if another GPU ran it in bf16
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
    """Check that `output` can be written, does not exist from a finished run, and is not being written by another run (which only the
    main process checks); return the path of the state file beside it."""
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
    """Lock `output` against other processes of this user on this machine until this one ends. Raises UserError if it is locked."""
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


