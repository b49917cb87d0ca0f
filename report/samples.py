"""Results of the models in weights/ on the nine pictures of samples/: captions, scores, classes, and attention maps.

    python3 report/samples.py [--without_llava]

Writes report/results/samples.json and the figures attention.jpg (the captioner, five pictures, every word), attention_p1.jpg (LLaVA, the
same), pairs_p2.jpg and pairs_p1.jpg (each model's best and worst pair by the image-text score of our own CLIP), layers.jpg (the
captioner, one picture, every layer) and samples.jpg (the nine side by side). The classes are COCO's 80 categories.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention import favourite_concepts, llava_attention, p2_attention
from attention_figures import plot_layers, plot_words, render
from captioner import Captioner
from chair import KINDS
from checkpoints import find_weights
from cli import ArgumentParser, run
from clip_model import TEMPLATE, average, embed_classes, load_clip, paired_similarity, similarity
from devices import pick_device
from files import read_json, write_json, write_whole
from images import list_images, load_image
from llava import SIDE, Llava, LlavaSettings, default_model
from runtime import pick_runtime

SHOWN = "cameraman", "cat", "coffee", "flower", "temple"  # in the attention figures
LAYERS_OF = "cat"
CLASSIFIED = "cat", "coffee", "raccoon"
DPI = 140
CELL = 180  # pixels of a picture in samples.jpg
COLUMNS = {"p1": 9, "p2": 7}  # panels side by side


def main():
    parser = ArgumentParser(description="Caption, classify and explain the sample pictures.")
    parser.add_argument("--without_llava", action="store_true", help="keep the existing results of LLaVA")
    arguments = parser.parse_args()
    results, figures = ROOT / "report" / "results" / "samples.json", ROOT / "report" / "figures"
    paths = list_images(ROOT / "samples")
    found = read_json(results, "file") if results.exists() else {}
    found |= {"command": "python3 report/samples.py", "data": "the nine pictures of samples/"}
    write_strip(figures / "samples.jpg", [load_image(path) for path in paths.values()])
    clip = load_clip(device=pick_device())
    _, embeddings, _ = clip.encode_images([*paths.values()])

    def describe(attentions):
        scores = paired_similarity(embeddings, clip.encode_texts([attention.caption for attention in attentions.values()]))
        return {name: {"caption": attention.caption, "score": round(float(score), 4),
                       "recognised": [name for name in attention.concepts if not name.startswith("the whole picture")],
                       "concepts": [[word, *favourite] for word, favourite in zip(attention.words, favourite_concepts(attention))]}
                for (name, attention), score in zip(attentions.items(), scores)}

    attentions = {"p2": captioner_attentions(paths)}
    write_figure(figures / "layers.jpg", [plot_layers(load_image(paths[LAYERS_OF]), attentions["p2"][LAYERS_OF])])
    if not arguments.without_llava:
        attentions["p1"] = llava_attentions(paths)
    for model, of_pictures in attentions.items():
        found[model] = describe(of_pictures)
        order = sorted(found[model], key=lambda name: -found[model][name]["score"])
        for name, pictures in ("attention" if model == "p2" else "attention_p1", SHOWN), (f"pairs_{model}", (order[0], order[-1])):
            write_figure(figures / f"{name}.jpg", [plot_words(load_image(paths[picture]), of_pictures[picture], columns=COLUMNS[model])
                                                   for picture in pictures])
    kinds = [line.split(":")[0].strip() for line in KINDS.splitlines() if ":" in line]
    classes = average(embed_classes(clip, kinds, [TEMPLATE]))
    probabilities = (clip.logit_scale * similarity(embeddings, classes)).softmax(-1)
    found["classes"] = {name: [[kinds[i], round(float(row[i]), 4)] for i in row.argsort(descending=True)[:5]]
                        for name, row in zip(paths, probabilities) if name in CLASSIFIED}
    write_json(results, found)


def captioner_attentions(paths):
    decoder, checkpoint = find_weights(None, None)
    device = pick_device()
    model = Captioner.load(checkpoint, decoder, runtime=pick_runtime("auto", device)).to(device)
    return {name: p2_attention(model, [load_image(path, model.encoder.image_size)])[0] for name, path in paths.items()}


def llava_attentions(paths):
    model = Llava(default_model(), attention="eager")
    return {name: llava_attention(model, load_image(path, SIDE), LlavaSettings()) for name, path in paths.items()}


def write_figure(path, figures):
    """Write Matplotlib figures, one below the other, as one JPEG."""
    pictures = [Image.open(io.BytesIO(render(figure, "png", DPI))).convert("RGB") for figure in figures]
    whole = np.full((sum(picture.height for picture in pictures), max(picture.width for picture in pictures), 3), 255, np.uint8)
    y = 0
    for picture in pictures:
        whole[y:y + picture.height, :picture.width] = picture
        y += picture.height
    write_jpeg(path, Image.fromarray(whole))


def write_strip(path, pictures):
    """Write whole pictures side by side in square cells, with white margins."""
    strip = Image.new("RGB", (CELL * len(pictures), CELL), "white")
    for i, picture in enumerate(pictures):
        small = ImageOps.contain(picture, (CELL - 8, CELL - 8))
        strip.paste(small, (CELL * i + (CELL - small.width) // 2, (CELL - small.height) // 2))
    write_jpeg(path, strip)


def write_jpeg(path, picture):
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=82, optimize=True)
    write_whole(path, data.getvalue())
    print(path)


if __name__ == "__main__":
    run(main)
