"""Run frozen networks on a CPU through OpenVINO: the same outputs as PyTorch, faster, and later starts need not build the PyTorch network.

A network is traced and compiled once and stored in weights/openvino, under a name derived from its weights and all versions; damaged or
outdated files are rebuilt. PyTorch is used if OpenVINO is not installed, or with `--runtime torch`.
"""

import ctypes
import hashlib
import json
import logging
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from cli import UserError
from files import digest_of, first_line, read_json, write_json, write_whole
from images import resize_to_square

RUNTIMES = "auto", "openvino", "torch"
PREFERRED = "openvino"  # what "auto" means on a CPU
RUNTIME_HELP = "of networks on a CPU: auto (openvino if it is installed), openvino or torch"
# OpenVINO's binding initialises itself when it first converts an array; two threads that do so at the same time deadlock.
CONVERTING = threading.Lock()
MOST = 12  # stored networks; older ones are deleted
STEP = 2  # images per call of a stream
# Attributes of an encoder that its users need: stored beside its network.
FACTS = "name", "image_size", "levels", "dim", "grid", "num_prefix_tokens", "num_tokens", "weights_hash", "class_names", "class_ids"


def pick_runtime(name, device):
    """Resolve `--runtime` to "openvino" or "torch". Raises UserError for an unknown name, and for "openvino" if it cannot be used.

    If "auto" finds no OpenVINO on a CPU, a line on stderr says so.
    """
    if name not in RUNTIMES:
        raise UserError(f"--runtime is {name}: choose from {', '.join(RUNTIMES)}")
    if name == "openvino" and device != "cpu":
        raise UserError("--runtime openvino is for the CPU, and this runs on a GPU")
    if name == "torch" or device != "cpu" or name == "auto" and PREFERRED == "torch":
        return "torch"
    try:
        import openvino  # noqa: F401
        return "openvino"
    except (ImportError, OSError) as error:  # not installed, or its libraries do not load
        if name == "openvino":
            raise UserError(f"openvino cannot be imported ({first_line(error)}): pip install openvino, or say --runtime torch") from None
        print("PyTorch encodes, since openvino cannot be imported: with it, pictures take two thirds of the time", file=sys.stderr)
        return "torch"


class SignalStack(ctypes.Structure):
    """stack_t of Linux's sigaltstack."""

    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack(new=None):
    """This thread's signal stack, by Linux's sigaltstack; `new` replaces it."""
    old = SignalStack()
    ctypes.CDLL(None).sigaltstack(ctypes.byref(new) if new else None, ctypes.byref(old))
    return old


@contextmanager
def kept_signal_stack():
    """Restore the thread's signal stack after OpenVINO's initialisation, which installs one and later frees it while it is in use, so that
    the next SIGTERM would kill the program immediately (seen with OpenVINO 2026.4 on Linux)."""
    if sys.platform != "linux":
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        signal_stack(before)


@contextmanager
def quiet():
    """Disable log messages below errors: tracing reads every attribute, and some of `transformers` then log warnings."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class Network:
    """A PyTorch module on the CPU through OpenVINO, with one output.

    Args:
        of: JSON value that identifies the module and its weights; with all packages' versions, it determines the stored file's name.
        build: () -> module, examples, shapes, facts, called if the network is not stored: example inputs to trace it with, each
            input's shape, with -1 for dimensions that vary, and a JSON dict to store beside it.
        folder: where it is stored.
        streams: calls that run in parallel, each on its share of the threads.
    Attributes: `facts`. Raises UserError for a module that OpenVINO cannot convert.
    """

    def __init__(self, of, build, folder, streams=1):
        import openvino

        versions = [version(package) for package in ("openvino", "torch", "timm", "transformers") if find_spec(package)]
        sources = [digest_of(Path(__file__).with_name(name), "sha256") for name in ("encoder.py", "runtime.py")]
        name = hashlib.sha256(json.dumps([of, versions, sources]).encode()).hexdigest()[:16]
        self.file = Path(folder) / f"{name}.openvino"
        self.core = openvino.Core()
        self.options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        try:
            with kept_signal_stack():
                self.compiled = self.read() or self.make(*build())
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot take this network ({first_line(error)}): say --runtime torch") from None
        self.own = threading.local()  # each thread's inference request

    def read(self):
        """The stored network, or None if there is none, or it is damaged."""
        try:
            kept, content = read_json(self.file.with_suffix(".json"), "record"), self.file.read_bytes()
            if kept["sha256"] == hashlib.sha256(content).hexdigest():
                self.facts = kept["facts"]
                os.utime(self.file)  # the networks used last are kept
                return self.core.import_model(content, "CPU", self.options)
        except (UserError, OSError, LookupError, TypeError, RuntimeError):
            pass
        return None

    def make(self, module, examples, shapes, facts):
        """Trace and compile the module, and store it if possible."""
        self.facts = json.loads(json.dumps(facts))
        compiled = self.core.compile_model(self.trace(module, examples, shapes), "CPU", self.options)
        content = compiled.export_model().getvalue()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, content)
            write_json(self.file.with_suffix(".json"), {"sha256": hashlib.sha256(content).hexdigest(), "facts": self.facts})
            for old in sorted(self.file.parent.glob("*.openvino"), key=lambda file: -file.stat().st_mtime)[MOST:]:
                old.with_suffix(".json").unlink(missing_ok=True)
                old.unlink(missing_ok=True)
        except (OSError, UserError) as error:
            print(f"the network for OpenVINO cannot be kept in {self.file.parent}, so that every start makes it anew: "
                  f"{first_line(error)}", file=sys.stderr)
        return compiled

    @staticmethod
    def trace(module, examples, shapes):
        """The module as an OpenVINO model, by its frontend directly, because `convert_model` sends telemetry over the network."""
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with torch.no_grad(), warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # about branches on shapes, for which `shapes` are right
            traced = torch.jit.trace(module, examples, check_trace=False)
            graph = TorchScriptPythonDecoder(traced, example_input=examples if len(examples) > 1 else examples[0])
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(graph))
        model.reshape(dict(zip(model.inputs, map(openvino.PartialShape, shapes))))
        return model

    def __call__(self, *inputs):
        """Tensors on the CPU -> tensor"""
        with CONVERTING:
            if not hasattr(self.own, "request"):
                self.own.request = self.compiled.create_infer_request()
        return infer(self.own.request, inputs).clone()


def infer(request, inputs):
    """Tensors on the CPU -> the network's first output, a tensor that the next call with this request may overwrite."""
    import openvino

    with CONVERTING:
        shared = [openvino.Tensor(part.contiguous().numpy(), shared_memory=True) for part in inputs]
        for number, part in enumerate(shared):
            request.set_input_tensor(number, part)
        request.start_async()
    request.wait()
    with CONVERTING:
        return torch.from_numpy(request.get_output_tensor(0).data)


class Classifier(nn.Module):
    """An encoder's `class_probabilities` as a module, for tracing."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, features):
        return self.encoder.class_probabilities(features)


class CompiledEncoder(nn.Module):
    """An ImageEncoder or JoinedEncoder through OpenVINO, with its attributes; its outputs to 1e-4, and bit for bit independent of the batch.

    Args:
        of: JSON value that identifies the encoder, see Network.
        build: () -> the encoder, called if its networks are not stored.
        folder: where they are stored.
    """

    runtime = "openvino"

    def __init__(self, of, build, folder):
        super().__init__()
        made = []  # the encoder, once it is built

        def encoder():
            if not made:
                made.append(build())
            return made[0]

        def tokens():
            size = encoder().image_size
            facts = {name: getattr(encoder(), name) for name in FACTS}
            first = {name: getattr(encoder().first, name) for name in ("name", "weights_hash")}
            return encoder(), (torch.zeros(2, 3, size, size, dtype=torch.uint8),), [[-1, 3, size, size]], {**facts, "first": first}

        def classes():
            shape = encoder().num_tokens, encoder().dim
            return Classifier(encoder()), (torch.zeros(2, *shape),), [[-1, *shape]], {}

        streams = torch.get_num_threads()  # one thread per stream, without synchronisation within layers
        self.network, self.pool = Network(["tokens", of], tokens, folder, streams), ThreadPoolExecutor(streams)
        self.facts = self.network.facts
        self.classifier = Network(["classes", of], classes, folder) if self.class_names else None

    def __getattr__(self, name):
        if name in FACTS:
            value = self.facts[name]
            return tuple(value) if name == "grid" else value
        return super().__getattr__(name)

    @cached_property
    def first(self):
        """A JoinedEncoder's first part, with its name and hash; any other encoder itself."""
        return self if self.facts["first"]["name"] == self.name else SimpleNamespace(**self.facts["first"])

    @property
    def device(self):
        return torch.device("cpu")

    def preprocess(self, image):
        """RGB PIL image of any size -> uint8 tensor (3, S, S): the whole image, resized to a square, bicubic."""
        return resize_to_square(image, self.image_size)

    def class_probabilities(self, features):
        """Tokens (B, N, D) -> (B, classes)"""
        return self.classifier(features)

    def forward(self, images):
        """uint8 images (B, 3, S, S) -> tokens (B, N, D)"""
        return torch.cat([*self.pool.map(self.network, images.split(STEP))])
