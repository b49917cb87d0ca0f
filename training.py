"""One training loop for every script that trains: progress, log, state on disk, interruption; optimizer, schedule, moving average."""

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
SAVE_MINUTES = 5  # between states to go on from: a killed run loses no more, and writing one takes a second


class Run:
    """One training: the place that it has come to, its state on disk, its log, and whether it is time to stop.

        run = Run(state_file, same, parameters, optimizer)
        with run:
            for step in run.steps(total):
                loss = …                                   # leaves gradients
                run.update(learning_rate, loss=loss.item())
        if not run.stopped:
            run.finish(["loss"])

    Each of several processes has one; the main one writes.

    Args:
        state_file: where it is kept what to go on from.
        same: plain values that a run which goes on must have in common with the one that was interrupted.
        parameters: {name: parameter} that are trained.
        optimizer: theirs.
        average: a MovingAverage of theirs, kept too.
        processes: Processes; None: this one alone.
        scaler: of fp16.
        clip: norm that gradients are clipped to; 0: as they are.
        after: called after each step of the optimizer, before the average.
        max_hours: until it stops by itself; 0: never.
        log: file of its log; its folder for TensorBoard, or "".
        first: what `progress` holds at the very beginning, beside the number of updates (`step`) and of seconds.
    Attributes: `progress`, a dict of plain values, which is kept; `about`, what each line of the log is to say besides; `stopped`, whether
    it was time before the end. Raises UserError where the state is of another run.
    """

    def __init__(self, state_file, same, parameters, optimizer, *, average=None, processes=None, scaler=None, clip=1.0, after=None,
                 max_hours=0.0, log=None, tensorboard="", first=None):
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
        self.created = self.started = time.monotonic()
        self.log_file, self.tensorboard, self.log, self.about = log, tensorboard, None, {}
        self.values, self.items, self.since = {}, 0, self.started  # since the last line of the log

    def __enter__(self):
        self.started = self.saved = self.since = time.monotonic()
        if self.processes.main and self.log_file:
            self.log = TrainingLog(self.log_file, self.progress["step"], self.tensorboard)
        self.interruption = Interruption(self.max_hours, self.created)
        self.interruption.__enter__()
        return self

    def __exit__(self, *error):
        self.interruption.__exit__(*error)

    @property
    def seconds(self):
        """That training took so far, over all its parts."""
        return self.before + time.monotonic() - self.started

    @contextlib.contextmanager
    def paused(self):
        """Within, time does not count."""
        before, started = self.seconds, time.monotonic()
        yield
        self.before, self.started = before, time.monotonic()
        self.since += self.started - started

    def steps(self, end, start=0, description="training", where=""):
        """Numbers of the updates that are left up to `end`, with a progress bar that counts from `start`. Each must be followed by an
        `update`. Where it is time, the state is saved, a line says so, and `where`, and no more come."""
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
        """Make a step of the gradients that are there, summed over the processes, at this learning rate times each group's factor.

        Args:
            items: how many images, or captions, it learnt from, for the log.
            values: of losses and the like; the log has their means. Raises UserError, without an update, where one, or the gradient, is
                not finite.
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
        """Write a line of the log with the means of what the updates since the last line gave, unless there were none."""
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
        """Write a line of the log, at this number of updates."""
        if self.log:
            self.log.write(self.progress["step"], **values)

    def save(self):
        """Write the state to go on from."""
        self.progress["seconds"] = self.seconds
        if self.processes.main:
            save_state(self.state_file, self.same, self.optimizer, self.kept, self.progress, self.scaler)
        self.saved = time.monotonic()

    def finish(self, curves):
        """Draw these values of the log, and delete the state: what came of the run is written."""
        if self.processes.main:
            if self.log:
                self.log.close(curves)
            self.state_file.unlink(missing_ok=True)
        self.processes.wait()


class Interruption:
    """Whether it is time to stop: after SIGTERM, as a cluster sends it before it kills, or `hours`. A context manager."""

    def __init__(self, hours=0.0, since=None):
        """`since`: when the hours began, of time.monotonic(); default: now."""
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
        """Draw the picture: these values of the lines."""
        if self.board:
            self.board.close()
        self.draw(curves)

    def draw(self, curves):
        """Draw these values over the updates, one panel each that has any."""
        from matplotlib.figure import Figure  # only here, and without a window

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
                        "a lower learning rate helps")
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


def comparable(settings, *without):
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
    if missing := settings.keys() - before.keys():
        raise UserError(f"{path} is of an unfinished run of an older form, which knew no {min(missing)}: delete it, or name another output")
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


