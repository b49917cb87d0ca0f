"""Read tensors from disk without executing code, and name them by their content."""

import hashlib
import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from cli import UserError


def read_weights(path, what="weights file"):
    """Read a state dict from `.safetensors`, or from anything torch.save wrote (`.bin`, `.pth`, `.pt`).

    torch.load runs with weights_only=True, so a pickle that would call a function is refused.
    Returns {name: tensor on the CPU}. `what` names the file in the one-line errors.
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
    return dict(weights)


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
