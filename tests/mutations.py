"""Randomly damaged files are either read, or refused with a one-line error, quickly and without much memory.

    python3 tests/mutations.py --pictures 1000 --weights 300 --states 300 --jsons 300 --kills 60

Prints the failures, and exits with status 1 if there are any. test_mutations.py runs the same with few of each.
"""

import argparse
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import timm
import torch
from conftest import VIT, finish, start
from PIL import Image
from safetensors.torch import load_file, save_file

import dataset
import p1_clip_classify
import p2_evaluate
from captioner import Captioner
from cli import UserError
from clip_small import ClipSmall
from dataset import read_captions
from decoder import Decoder, DecoderConfig
from files import read_json
from images import FORMATS, ImageError, load_image
from training import adamw, load_state, save_state

SLOWEST = 10.0  # seconds a file
MOST_MEMORY = 2e9  # bytes above what was in use before
TRAINING = ("--encoder", VIT, "--image_size=32", "--projection_dim=64", "--lora_rank=2", "--decoder=decoder.safetensors", "--views=1",
            "--epochs=6", "--scst_epochs=0", "--batch_size=3", "--selection=0")


def mutate(data, random):
    """Bytes with one to three of: bytes changed, a piece cut off, left out, doubled, zeroed, or noise put in."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        if len(data) < 2:
            break
        start, stop = sorted(random.integers(0, len(data), 2).tolist())
        stop = min(stop, start + 4096)
        match random.integers(6):
            case 0:
                for at in random.integers(0, len(data), random.integers(1, 30)):
                    data[at] = random.integers(256)
            case 1:
                del data[start:]
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = data[start:stop]
            case 4:
                data[start:stop] = bytes(stop - start)
            case 5:
                data[start:start] = random.bytes(random.integers(1, 200))
    return bytes(data)


def pictures(count, seed, folder):
    """Yield (name, function) of mutated pictures of every format that is read."""
    random = np.random.default_rng(seed)
    pixels = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((160, 120))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = {}
    for kind, mode, options in (("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True}), ("PNG", "RGBA", {}),
                                ("PNG", "P", {}), ("PNG", "1", {}), ("BMP", "RGB", {}), ("GIF", "P", {}), ("WEBP", "RGB", {}),
                                ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "I;16", {}), ("TIFF", "F", {}), ("AVIF", "RGB", {})):
        if kind in FORMATS:
            file = io.BytesIO()
            image = pixels.convert("L").convert("I").convert("I;16") if mode == "I;16" else pixels.convert(mode)
            image.save(file, kind, **options)
            whole[f"{kind.lower()}-{mode.replace(';', '')}"] = file.getvalue()
    for number in range(count):
        name = [*whole][number % len(whole)]
        path = folder / f"{number}.{name.split('-')[0]}"
        path.write_bytes(mutate(whole[name], random))
        yield name, lambda: load_image(path, 288)


def weights(count, seed, folder):
    """Yield (name, function) of mutated weights and checkpoints."""
    from test_captioner import make_captioner

    random = np.random.default_rng(seed)
    model = make_captioner(folder, vocab_size=300, projection_layers=0)
    model.save(folder / "checkpoint.safetensors")
    save_file({name: value.contiguous() for name, value in model.decoder.pretrained_state().items()}, folder / "decoder.safetensors")
    whole = {name: (folder / name).read_bytes() for name in ("checkpoint.safetensors", "decoder.safetensors", "decoder.bin")}
    for number in range(count):
        name = [*whole][number % len(whole)]
        path = folder / f"{number}-{name}"
        data = whole[name]
        # The header is a small part of such a file, and where most can go wrong.
        head = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else 2000
        path.write_bytes(mutate(data[:head], random) + data[head:] if random.random() < 0.6 else mutate(data, random))
        if name.startswith("checkpoint"):
            yield name, lambda: Captioner.load(path, folder / "decoder.bin", model.encoder)
        elif number % 2:
            yield name, lambda: Decoder.from_pretrained(path)
        else:
            yield f"clip {name}", lambda: ClipSmall.load(path, object(), object())


def states(count, seed, folder):
    """Yield (name, function) of mutated states of unfinished runs."""
    random = np.random.default_rng(seed)
    layer = torch.nn.Linear(20, 30)
    parameters = dict(layer.named_parameters())
    optimizer = adamw([(layer.parameters(), 1.0)], 1e-3, 0.1)
    layer(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    save_state(folder / "whole.state.pt", {"seed": 0}, optimizer, parameters, {"epoch": 1})
    whole = (folder / "whole.state.pt").read_bytes()
    for number in range(count):
        path = folder / f"{number}.state.pt"
        path.write_bytes(mutate(whole, random))
        fresh = torch.nn.Linear(20, 30)
        yield "state", lambda: load_state(path, {"seed": 0}, adamw([(fresh.parameters(), 1.0)], 1e-3, 0.1), dict(fresh.named_parameters()), "cpu")


def jsons(count, seed, folder):
    """Yield (name, function) of mutated captions, predictions and labels."""
    random = np.random.default_rng(seed)
    captions = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)],
                "annotations": [{"id": i, "image_id": i % 5, "caption": f"A dog number {i}"} for i in range(9)]}
    predictions, labels = {str(i): "A dog" for i in range(5)}, {"0": "dog", "1": "cat"}
    (folder / "captions.json").write_text(json.dumps(captions))
    references = dataset.load_references(folder / "captions.json")
    values = [None, True, -1, 1e308, "", "\ud800", [], {}, [[]], {"id": {}}, "x" * 300]

    def change(value):
        """The same with one part replaced, somewhere inside."""
        if isinstance(value, (dict, list)) and value and random.random() < 0.8:
            keys = [*value] if isinstance(value, dict) else [*range(len(value))]
            key = keys[random.integers(len(keys))]
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = change(value[key])
            return copy
        return values[random.integers(len(values))]

    for number in range(count):
        name, whole = [("captions", captions), ("predictions", predictions), ("labels", labels)][number % 3]
        path = folder / f"{number}.json"
        if random.random() < 0.5:
            path.write_bytes(mutate(json.dumps(whole).encode(), random))
        else:
            path.write_text(json.dumps(change(whole)))
        yield name, {"captions": lambda: read_captions(path, folder),
                     "predictions": lambda: p2_evaluate.check_predictions(read_json(path, "file"), references),
                     "labels": lambda: p1_clip_classify.read_classes(path)}[name]


def try_all(kind, count, seed=0):
    """Call what `kind` yields. Returns how often each was read or refused, and a line for each thing that went wrong."""
    outcomes, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, (name, function) in enumerate(kind(count, seed, Path(folder))):
            start = time.monotonic()
            try:
                with redirect_stderr(io.StringIO()):
                    function()
                outcomes[name, "read"] += 1
            except (UserError, ImageError):
                outcomes[name, "refused"] += 1
            except Exception as error:
                wrong.append(f"{name}, number {number} of seed {seed}: {type(error).__name__}: {error}")
            if (seconds := time.monotonic() - start) > SLOWEST:
                wrong.append(f"{name}, number {number} of seed {seed}: {seconds:.0f} s")
        memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if memory > MOST_MEMORY:
            wrong.append(f"{kind.__name__}: {memory / 1e9:.1f} GB more memory")
    return outcomes, wrong


def kills(count, seed=0):
    """Kill a small training in the current folder again and again, which must end with the bytes of one that was left alone. Returns
    (kills, lines of what went wrong)."""
    random, wrong, killed, number = np.random.default_rng(seed), [], 0, 0
    prepare_training(Path.cwd())

    def begin(output):
        process, = start(*TRAINING, f"--output={output}", before="import training; training.SAVE_MINUTES = 0")
        return process

    finish([begin("first.safetensors")])  # the one that imports
    began = time.monotonic()
    finish([begin("whole.safetensors")])
    alone = time.monotonic() - began
    while killed < count:
        output, number = f"{number}.safetensors", number + 1
        while True:
            process = begin(output)
            process.join(alone * random.uniform(0.5, 1.2) if killed < count else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            killed += 1
        said = Path("process0.err").read_text()
        ended = not process.exitcode or "is there already" in said  # it was killed behind its end
        if not ended or not same_tensors(output, "whole.safetensors"):
            wrong.append(f"{output} differs after kills: {said[-300:]}")
    return killed, wrong


def same_tensors(*files):
    one, other = (load_file(file) for file in files)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def prepare_training(folder):
    """Pictures, captions, an encoder and a decoder for a training with the options `TRAINING`, which saves after every step."""
    torch.manual_seed(0)
    save_file(timm.create_model(VIT, img_size=32, num_classes=0).state_dict(), folder / f"{VIT}.safetensors")
    decoder = Decoder(DecoderConfig(n_positions=48, n_embd=64, n_layer=1))
    save_file({name: value.contiguous() for name, value in decoder.pretrained_state().items()}, folder / "decoder.safetensors")
    (folder / "data/images/train").mkdir(parents=True)
    images, annotations = [], []
    for i, colour in enumerate(["red", "green", "blue", "white"] * 3):
        Image.new("RGB", (40, 40), colour).save(folder / f"data/images/train/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        annotations.append({"id": i, "image_id": i, "caption": f"a {colour} picture"})
    (folder / "data/train.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def main():
    parser = argparse.ArgumentParser(description="Damage files by chance and see what happens.")
    for name, count in {"pictures": 1000, "weights": 300, "states": 300, "jsons": 300, "kills": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    for kind in pictures, weights, states, jsons:
        outcomes, wrong = try_all(kind, getattr(arguments, kind.__name__), arguments.seed)
        counts = Counter()
        for (_, outcome), number in outcomes.items():
            counts[outcome] += number
        print(f"{kind.__name__}: {counts['read']} read, {counts['refused']} refused in a line, {len(wrong)} wrong", flush=True)
        print("\n".join(wrong[:20]), end="\n" if wrong else "")
        failed |= bool(wrong)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        killed, wrong = kills(arguments.kills, arguments.seed)
    print(f"kills: {killed}, {len(wrong)} wrong")
    print("\n".join(wrong))
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
