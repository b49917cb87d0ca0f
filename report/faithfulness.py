"""Did the patches that a word attends to matter for it? Writes report/results/faithfulness.json.

    python3 report/faithfulness.py --data data [--images 200] [--boxes instances_val.json]

Deletion, on the first images of data/val.json, for each content word of the model's own captions: how much its
log-probability falls when a tenth of the picture's pixels is replaced by the picture's mean colour and the picture is
encoded again. The tenth is, for each layer,
    most        where the word's map is largest
    corrected   where the map minus its mean over words is largest
    least       where the map is smallest
and, independent of the layer, sampled several times,
    random      where a map with random patch values is largest
    moved       a "most" of any word and layer of the same picture, shifted randomly: the same shape elsewhere

Pointing game (Zhang et al. 2016, https://arxiv.org/abs/1608.00507), with the boxes of a COCO instances file: is the
peak of a noun's map in a box of its class? The baselines are a random point and the picture's centre.

Words are averaged within a picture, and intervals are bootstrapped over pictures.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention import of_words, p2_attention, peak, teacher_forced, upsample, word_maps
from captioner import Captioner
from checkpoints import find_weights
from cli import ArgumentParser, UserError, run
from dataset import read_captions
from devices import pick_device
from files import check_writable, read_json, write_json
from images import load_picture
from significance import paired_bootstrap

RESULTS = ROOT / "report" / "results" / "faithfulness.json"
AREA = 0.1  # masked fraction of the picture
DRAWS = 5  # samples of each random mask
NOUNS = {  # synonyms of COCO's classes in captions; the class's own name, and plurals with -s, need no entry
    "man": "person", "men": "person", "woman": "person", "women": "person", "boy": "person", "girl": "person",
    "child": "person", "children": "person", "kid": "person", "baby": "person", "people": "person", "lady": "person",
    "guy": "person", "player": "person", "skateboarder": "person", "surfer": "person", "skier": "person",
    "snowboarder": "person", "biker": "person", "climber": "person", "swimmer": "person",
    "bike": "bicycle", "motorbike": "motorcycle", "plane": "airplane", "jet": "airplane", "puppy": "dog", "dogs": "dog",
    "kitten": "cat", "ball": "sports ball", "racket": "tennis racket", "board": "surfboard", "glove": "baseball glove",
    "bat": "baseball bat", "glass": "wine glass", "sofa": "couch", "table": "dining table", "plant": "potted plant",
    "television": "tv", "phone": "cell phone", "hydrant": "fire hydrant", "light": "traffic light", "sign": "stop sign",
    "bear": "bear", "teddy": "teddy bear", "donuts": "donut", "knives": "knife", "sheep": "sheep", "bus": "bus",
}


# ---- deletion --------------------------------------------------------------------------------------------------


def largest(values, area=AREA):
    """A mask of the pixels with the largest `values` (height, width), of exactly this fraction of the area."""
    count = round(area * values.size)
    mask = np.zeros(values.size, bool)
    mask[np.argpartition(-values.ravel(), count - 1)[:count]] = True
    return mask.reshape(values.shape)


def every_layer(attention):
    return ["mean", *range(1, attention.maps.shape[1] + 1)]


def masks_of(attention, side, random):
    """The masks of one picture: {(kind, layer, index of the word): (S, S)}; layer and index are None if they do not matter."""
    masks = {}
    for layer in every_layer(attention):
        raw, corrected = (word_maps(attention, layer, correction=correction) for correction in ("none", "subtract"))
        for word in attention.content_words():
            values = upsample(raw[word], (side, side))
            masks["most", layer, word], masks["least", layer, word] = largest(values), largest(-values)
            masks["corrected", layer, word] = largest(upsample(corrected[word], (side, side)))
    shapes = [mask for (kind, _, _), mask in masks.items() if kind == "most"]
    for draw in range(DRAWS):
        masks[f"random {draw}", None, None] = largest(upsample(random.random(attention.maps.shape[-2:]), (side, side)))
        shape = shapes[random.integers(len(shapes))]
        masks[f"moved {draw}", None, None] = np.roll(shape, random.integers(side, size=2), (0, 1))
    return masks


@torch.inference_mode()
def log_probs_without(model, picture, attention, masks):
    """The words' log-probabilities with the picture hidden by each of the masks (M, S, S): (M, W)"""
    device = model.token_ids.device
    pixels = model.encoder.preprocess(picture)  # (3, S, S)
    mean = pixels.float().mean((1, 2)).round().to(torch.uint8)
    found = []
    for part in torch.from_numpy(masks).split(32):
        images = torch.where(part[:, None], mean[:, None, None], pixels)
        features = model.encoder(images.to(device))
        log_probs = teacher_forced(model, features, [attention.tokens] * len(part))
        found.append(of_words(log_probs, attention.places).cpu())
    return torch.cat(found).numpy()


def deletion(model, picture, attention, random):
    """How much the content words' log-probabilities fall, in nats: {(kind, layer): mean over words}; {} without content words."""
    words = attention.content_words()
    if not words:
        return {}
    masks = masks_of(attention, model.encoder.image_size, random)
    drops = attention.log_probs - log_probs_without(model, picture, attention, np.stack([*masks.values()]))  # (M, W)
    collected = {}
    for (kind, layer, word), row in zip(masks, drops):
        values = row[words] if word is None else row[[word]]
        collected.setdefault((kind.split()[0], layer), []).extend(values)
    return {key: float(np.mean(values)) for key, values in collected.items()}


# ---- pointing --------------------------------------------------------------------------------------------------


def read_boxes(path):
    """COCO instances -> {file name: {class: boxes (n, 4)}}: left, top, right, bottom as fractions of the sides. UserError."""
    data = read_json(path, "boxes file")
    try:
        classes = {category["id"]: category["name"] for category in data["categories"]}
        images = {image["id"]: image for image in data["images"]}
        boxes = {}
        for annotation in data["annotations"]:
            image = images[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            box = np.array([x, y, x + w, y + h]) / [image["width"], image["height"], image["width"], image["height"]]
            boxes.setdefault(image["file_name"], {}).setdefault(classes[annotation["category_id"]], []).append(box)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not in COCO's instances form (images: id, file_name, width, height; annotations: "
                        f"image_id, category_id, bbox; categories: id, name): {type(error).__name__} {error}") from None
    return {name: {kind: np.stack(found) for kind, found in kinds.items()} for name, kinds in boxes.items()}


def class_of(word, classes):
    """The class among `classes` that a caption's word names, or None."""
    word = word.lower()
    for noun in word, word.removesuffix("s"), word.removesuffix("es"):
        if NOUNS.get(noun, noun) in classes:
            return NOUNS.get(noun, noun)
    return None


def inside(boxes, x, y):
    """Which points, as fractions of the sides, are in any of the boxes (n, 4): an array like x and y"""
    x, y = np.asarray(x)[..., None], np.asarray(y)[..., None]
    return ((boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])).any(-1)


def pointing(attention, boxes, side=288):
    """The pointing game on one picture: {("hits", layer): mean over nouns, …, ("chance", None), ("middle", None)}, or {}"""
    nouns = {i: boxes[kind] for i in attention.content_words() if (kind := class_of(attention.words[i], boxes))}
    if not nouns:
        return {}
    centres = (np.arange(side) + 0.5) / side
    found = {("chance", None): np.mean([inside(its, *np.meshgrid(centres, centres)).mean() for its in nouns.values()]),
             ("middle", None): np.mean([inside(its, 0.5, 0.5) for its in nouns.values()])}
    for layer in every_layer(attention):
        maps = word_maps(attention, layer)
        peaks = {i: (np.array(peak(upsample(maps[i], (side, side)))) + 0.5) / side for i in nouns}
        found["hits", layer] = np.mean([inside(its, *peaks[i]) for i, its in nouns.items()])
    return {key: float(value) for key, value in found.items()}


# ---- results ---------------------------------------------------------------------------------------------------


def interval(values):
    """Mean of the pictures' values with its 95% interval."""
    found = paired_bootstrap(values)
    return {"value": found.value, "low": found.low, "high": found.high}


def summarize(pictures, kinds, against):
    """[{(kind, layer): value}, …] -> each kind's mean, and its difference from each kind in `against`, by layer.

    Means of kinds without a layer are under "all".
    """
    columns = {key: np.array([picture[key] for picture in pictures]) for key in pictures[0]}
    results = {"all": {kind: interval(values) for (kind, layer), values in columns.items() if layer is None}}
    for layer in dict.fromkeys(layer for _, layer in columns if layer is not None):
        entry = {kind: interval(columns[kind, layer]) for kind in dict.fromkeys(kind for kind, at in columns if at == layer)}
        for kind in kinds:
            for other in against:
                reference = columns[other, layer if (other, layer) in columns else None]
                entry[f"{kind} - {other}"] = interval(columns[kind, layer] - reference)
        results[str(layer)] = entry
    return results


def show(title, results, columns):
    """Print a Markdown table with one row per layer."""
    print(f"\n{title}\n\n| layer | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for layer, entry in results.items():
        cells = [f"{v['value']:+.3f} ({v['low']:+.3f} to {v['high']:+.3f})" if " - " in name else f"{v['value']:.3f}"
                 for name in columns if (v := entry.get(name) or results["all"].get(name))]
        if layer != "all":
            print(f"| {layer} | {' | '.join(cells)} |")


def main():
    parser = ArgumentParser(description="Did the patches that a word attends to matter for it?")
    parser.add_argument("--data", type=Path, default=Path("data"), help="val.json and images/val/")
    parser.add_argument("--images", type=int, default=200, help="number of images, the first of val.json")
    parser.add_argument("--boxes", help="COCO instances file of these images, for the pointing game")
    parser.add_argument("--decoder_weights", help="GPT-2 weights (default: the embedded model's)")
    parser.add_argument("--checkpoint", help="checkpoint of p2_train.py")
    parser.add_argument("--seed", type=int, default=0, help="of the random masks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="output file")
    arguments = parser.parse_args()
    check_writable(arguments.results)
    boxes = read_boxes(arguments.boxes) if arguments.boxes else {}
    images = read_captions(arguments.data / "val.json", arguments.data / "images" / "val")[:arguments.images]
    if arguments.boxes and not any(image.path.name in boxes for image in images):
        raise UserError(f"{arguments.boxes} has no boxes of these {len(images)} images")
    decoder_weights, checkpoint = find_weights(arguments.decoder_weights, arguments.checkpoint)
    model = Captioner.load(checkpoint, decoder_weights).to(pick_device())
    deleted, pointed, words = [], [], 0
    for number, image in enumerate(tqdm(images, unit="image")):
        picture = load_picture(image.path, model.encoder.image_size)
        attention, = p2_attention(model, [picture])
        words += len(attention.content_words())
        deleted.append(deletion(model, picture, attention, np.random.default_rng((arguments.seed, number))))
        if image.path.name in boxes:
            pointed.append(pointing(attention, boxes[image.path.name]))
    deleted, pointed = ([picture for picture in pictures if picture] for pictures in (deleted, pointed))
    if not deleted:
        raise UserError("the captions have no content words")
    results = {"conditions": {"images": len(deleted), "content_words": words, "area": AREA, "draws": DRAWS,
                              "seed": arguments.seed, "beam_size": model.generation.beam_size, "encoder": model.encoder.name},
               "deletion": summarize(deleted, ("most", "corrected"), ("random", "moved", "least"))}
    show(f"Fall of a content word's log-probability, {len(deleted)} images, {words} words", results["deletion"],
         ["most", "corrected", "random", "moved", "least", "most - random", "most - moved", "most - least"])
    if pointed:
        results["pointing"] = summarize(pointed, ["hits"], ["chance", "middle"])
        results["conditions"]["images_with_boxes"] = len(pointed)
        show(f"Pointing game, {len(pointed)} images", results["pointing"],
             ["hits", "chance", "middle", "hits - chance", "hits - middle"])
    write_json(arguments.results, results)


if __name__ == "__main__":
    run(main)
