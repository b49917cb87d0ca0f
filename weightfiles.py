"""Read tensors from disk without executing code, and name them by their content."""

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

from cli import UserError


def read_weights(path, what="weights file"):
    """Read a state dict from `.safetensors`, or from anything torch.save wrote (`.bin`, `.pth`, `.pt`).

    torch.load runs with weights_only=True, so a pickle that would call a function is refused.
    Returns {name: tensor on the CPU}. `what` names the file in the one-line errors. What is not finite is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the {what} {path} does not exist")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on pickles that it did not write
            if path.suffix == ".safetensors":
                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        function = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {function[1]}" if function else "it is damaged or of another format"
        raise UserError(f"the {what} {path} is not plain tensors and was not loaded: {reason}") from None
    except Exception as error:  # there is nothing that torch does not raise for some damaged file
        raise UserError(f"the {what} {path} is damaged or of another format: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                for name, value in weights.items()):
        raise UserError(f"the {what} {path} does not hold a state dict (names with tensors)")
    for name, value in weights.items():
        # A tensor that says that it is larger than what is stored of it, or has no values, could ask for any amount of memory.
        if value.layout != torch.strided or value.is_meta or value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise UserError(f"the {what} {path} holds {name} in a form that weights do not have")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"the {what} {path} holds values in {name} that are not numbers: it is damaged")
    return dict(weights)


# What pickles call the types of stored tensors.
STORED = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
          "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
          "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class ArchivedModule:
    """What stands for a module of a TorchScript archive: its attributes, and none of its code."""

    def __setstate__(self, state):
        self.__dict__.update(state)

    def tensors(self, prefix=""):
        """(name, tensor) of its parameters and buffers, named as in a state dict."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value
            elif isinstance(value, ArchivedModule):
                yield from value.tensors(f"{prefix}{name}.")


class ArchiveUnpickler(pickle.Unpickler):
    """Reads data.pkl of a TorchScript archive: modules as ArchivedModules, tensors from the archive's records, and nothing else.

    A class or function that it does not know is never called: UnpicklingError.
    """

    def __init__(self, file, record):
        super().__init__(file)
        self.record = record

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return type(name, (ArchivedModule,), {})
        if module == "torch.jit._pickle":  # marks of a list's type
            return lambda items, *of_type: items
        if module == "torch" and name in STORED:
            return STORED[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda stored, offset, size, stride, *_: torch.empty(0, dtype=stored[1]).set_(stored[0], offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it would call {module}.{name}")

    def persistent_load(self, entry):
        _, kind, key, *_ = entry
        data = bytearray(self.record(f"data/{key}"))
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0), kind


def read_archive(path, what="weights file"):
    """The state dict of a TorchScript archive, such as OpenAI publishes CLIP as, read as data: no module is built, since an
    archive's own code would run. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            module = ArchiveUnpickler(io.BytesIO(archive.read(f"{inside}data.pkl")), lambda name: archive.read(inside + name)).load()
            return dict(module.tensors())
    except Exception as error:  # there is nothing that a damaged archive does not raise
        raise UserError(f"the {what} {path} is no TorchScript archive of tensors: {first_line(error)}") from None


def first_line(error):
    """What an error says, as far as one line holds it; a line that ends in a colon runs on into the next."""
    return re.sub(r":\s*\n\s*", ": ", str(error).strip()).split("\n")[0][:200] or type(error).__name__


def dinov2_names(depth=12):
    """Pairs of names of a DINOv2 ViT's tensors: timm's, and those of Meta's models on the model hub, as a tuple.

    Three of the latter make one of timm's where the projections to queries, keys and values are joined. The position
    embedding is not among them, since not every file holds it whole.
    """
    pairs = [("cls_token", ("embeddings.cls_token",))]
    for kind in "weight", "bias":
        pairs += [(f"patch_embed.proj.{kind}", (f"embeddings.patch_embeddings.projection.{kind}",)),
                  (f"norm.{kind}", (f"layernorm.{kind}",))]
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
            pairs.append((f"{ours}.attn.qkv.{kind}", tuple(
                f"{theirs}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))))
            pairs.append((f"{ours}.attn.proj.{kind}", (f"{theirs}.attention.output.dense.{kind}",)))
            pairs += [(f"{ours}.{part}.{kind}", (f"{theirs}.{part}.{kind}",)) for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")]
    return pairs + [(f"blocks.{i}.ls{k}.gamma", (f"encoder.layer.{i}.layer_scale{k}.lambda1",))
                    for i in range(depth) for k in (1, 2)]


def digest(tensors):
    """sha256 over the names, shapes, types and bytes of tensors: what a file of them records, so that flipped bits are noticed."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_digest(path, what, tensors, recorded):
    """Raise UserError unless the tensors are those that were written; files of before there were digests record None."""
    if recorded is not None and digest(tensors) != recorded:
        raise UserError(f"the {what} {path} is damaged: its tensors are not those that were written")


def content_hash(state_dict):
    """sha256 over the names, shapes and fp32 values of the floating-point tensors, sorted by name.

    The same weights hash alike from any file format, and an fp16 file like the fp32 tensors it loads to.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach()
        if tensor.is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
