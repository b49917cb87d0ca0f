"""Read and write safely: atomic writes, JSON, tensors without executing code, and hashes of contents."""

import hashlib
import io
import json
import os
import pickle
import re
import stat
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cli import UserError

WEIGHTS_FOLDER = Path(__file__).resolve().parent / "weights"
LONGEST_NAME = 255  # bytes, on common file systems


def check_writable(path):
    """Raise UserError unless a file can be created or replaced at `path`. Touches nothing.

    Permission bits are also checked directly, because os.access allows root everything.
    """
    path = Path(path)
    folder = path.parent
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(f"cannot write {path.name[:40]}…: its name has {len(os.fsencode(path.name))} bytes, more than {LONGEST_NAME}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder, name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is not an ordinary file, name one")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: the folder {folder} does not exist, create it first")
    for place in [path, folder] if path.exists() else [folder]:
        mode = place.stat().st_mode
        if not os.access(place, os.W_OK) or not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"cannot write {path}: {place} is read-only")


def check_output(path, kind, reads=()):
    """`check_writable`, and check that no other data is overwritten.

    Args:
        kind: of the file to be written, one of KINDS. Raises UserError if `path` is a file of another kind.
        reads: paths of the inputs, or None. Raises UserError if `path` is one of them.
    """
    check_writable(path)
    if not Path(path).exists():
        return
    for source in filter(None, reads):
        if os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{path} would overwrite {source}, which is an input: name another file")
    content = Path(path).read_bytes()
    if content and not KINDS[kind](content):
        raise UserError(f"{path} exists and is not a {kind} file: name another file, so that it is not overwritten")


def is_json(content):
    try:
        json.loads(content)
        return True
    except (ValueError, RecursionError):
        return False


def is_text(content):
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False
# {kind of file that scripts write: test of a file's content}
KINDS = {"JSON": is_json, "CSV": is_text, "PNG": lambda content: content.startswith(b"\x89PNG"),
         "JPEG": lambda content: content.startswith(b"\xff\xd8"), "PDF": lambda content: content.startswith(b"%PDF"),
         "SVG": lambda content: is_text(content) and b"<svg" in content,
         "safetensors": lambda content: content[8:9] == b"{"}
SUFFIX_KINDS = {".json": "JSON", ".csv": "CSV", ".png": "PNG", ".jpg": "JPEG", ".pdf": "PDF", ".svg": "SVG"}


def write_whole(path, data):
    """Write `data` (bytes) to `path` atomically: no reader sees, and no killed run leaves, half a file."""
    path = Path(os.path.realpath(path))  # a link stays a link
    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        make_ordinary(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def make_ordinary(*paths):
    """Give private files, as mkstemp and safetensors create them, the permissions that open() would give."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        os.chmod(path, 0o666 & ~umask)


def write_json(path, value):
    """Write `value` to `path` as UTF-8 JSON, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    # File names that are not UTF-8 have lone surrogates, for which Python's escapes are the same as JSON's.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def read_json(path, what):
    """Read the JSON file `path`; `what` names it in UserErrors ("captions file"). An object with a duplicate key is an error; the
    json module would keep the last."""
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"the {what} {path} has {next(key for key in keys if keys.count(key) > 1)!r} twice in one object: which is meant?")
        return found

    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"the {what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"the {what} {path} is nested too deep") from None
    except ValueError as error:
        raise UserError(f"the {what} {path} is not JSON: {error}") from None


def read_lines(path, what="text file"):
    """The lines of a UTF-8 text file; `what` names it in UserErrors."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} {path} is not UTF-8") from None


def is_file(path):
    """Whether `path` is a file; False too if that cannot be checked, or the name is too long."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def digest_of(path, algorithm):
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.new(algorithm)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error):
    """The first line of an error's message, at most 200 characters; after a colon at its end, the next line too."""
    return re.sub(r":\s*\n\s*", ": ", str(error).strip()).split("\n")[0][:200] or type(error).__name__


def fingerprint(path):
    """Size in bytes and a checksum of the file; not its date, so that a copied dataset has the same fingerprints."""
    size, checksum = 0, 0
    with suppress(OSError), open(path, "rb") as file:  # an unreadable file is reported when it is encoded
        while part := file.read(2**20):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return size, checksum


def fingerprints(paths):
    """(name, size, checksum) of each file, read in threads."""
    with ThreadPoolExecutor() as pool:
        return [(path.name, *found) for path, found in zip(paths, pool.map(fingerprint, paths))]


# ---- tensors -------------------------------------------------------------------------------------------------------
# torch is imported where it is used, so that scripts that only download files start fast.

# Names of tensors' storage types in pickles -> names of torch dtypes.
STORED = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
          "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
          "BoolStorage": "bool"}


def read_weights(path, what="weights file"):
    """Read a state dict from `.safetensors`, or from a file of torch.save (`.bin`, `.pth`, `.pt`).

    torch.load runs with weights_only=True, so a pickle that would call a function is refused.
    Returns {name: tensor on the CPU}. Raises UserError, also for non-finite values; `what` names the file in it.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UserError(f"the {what} {path} does not exist")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write
            if path.suffix == ".safetensors":
                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        function = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would call {function[1]}" if function else "it is damaged or of another format"
        raise UserError(f"the {what} {path} is not plain tensors and was not loaded: {reason}") from None
    except Exception as error:  # torch raises all kinds of errors for damaged files
        raise UserError(f"the {what} {path} is damaged or of another format: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                for name, value in weights.items()):
        raise UserError(f"the {what} {path} does not hold a state dict (names with tensors)")
    for name, value in weights.items():
        # A tensor whose shape exceeds its storage, or without values, could require any amount of memory.
        if value.layout != torch.strided or value.is_meta or value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise UserError(f"the {what} {path} holds {name} in a form that weights do not have")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"the {what} {path} holds values in {name} that are not numbers: it is damaged")
    return dict(weights)


def uninitialised():
    """A context in which torch.nn.init does nothing: for modules whose weights are loaded next."""
    from torch.overrides import TorchFunctionMode

    class Uninitialised(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__module__", "") == "torch.nn.init":
                return {"tensor": args[0] if args else None, **(kwargs or {})}["tensor"]
            return function(*args, **(kwargs or {}))

    return Uninitialised()


class ArchivedModule:
    """Replaces a module of a TorchScript archive: its attributes without its code."""

    def __setstate__(self, state):
        self.__dict__.update(state)

    def tensors(self, prefix=""):
        """Yield (name, tensor) of its parameters and buffers, named as in a state dict."""
        from torch import Tensor

        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, ArchivedModule):
                yield from value.tensors(f"{prefix}{name}.")


class ArchiveUnpickler(pickle.Unpickler):
    """Reads data.pkl of a TorchScript archive: modules as ArchivedModules, tensors from the archive's records, and nothing else.

    Raises UnpicklingError for any other class or function, without calling it.
    """

    def __init__(self, file, record):
        super().__init__(file)
        self.record = record

    def find_class(self, module, name):
        import torch

        if module.startswith("__torch__"):
            return type(name, (ArchivedModule,), {})
        if module == "torch.jit._pickle":  # type annotations of lists
            return lambda items, *of_type: items
        if module == "torch" and name in STORED:
            return getattr(torch, STORED[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda stored, offset, size, stride, *_: torch.empty(0, dtype=stored[1]).set_(stored[0], offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it would call {module}.{name}")

    def persistent_load(self, entry):
        import torch

        _, kind, key, *_ = entry
        data = bytearray(self.record(f"data/{key}"))
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0), kind


def read_archive(path, what="weights file"):
    """The state dict of a TorchScript archive, OpenAI's format for CLIP, read as data: no module is built, since that would
    run the archive's own code. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            module = ArchiveUnpickler(io.BytesIO(archive.read(f"{inside}data.pkl")), lambda name: archive.read(inside + name)).load()
            return dict(module.tensors())
    except Exception as error:  # damaged archives raise all kinds of errors
        raise UserError(f"the {what} {path} is no TorchScript archive of tensors: {first_line(error)}") from None


def digest(tensors):
    """sha256 over the names, shapes, types and bytes of tensors, recorded in their file to detect flipped bits."""
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_digest(path, what, tensors, recorded):
    """Raise UserError unless the tensors have the recorded digest; None, from older files, is accepted."""
    if recorded is not None and digest(tensors) != recorded:
        raise UserError(f"the {what} {path} is damaged: its tensors are not those that were written")


def content_hash(state_dict):
    """sha256 over the names, shapes and fp32 values of the floating-point tensors, sorted by name.

    The same weights have the same hash in any file format, and in fp16 the same as after conversion to fp32.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach()
        if tensor.is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
