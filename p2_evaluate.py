"""Score captions, test whether they are better than others, and draw the best and worst.

    python3 p2_evaluate.py --pred_file out.json --images_root images/val --annotation_file val.json
        [--out scores.csv] [--compare other.json] [--rank 5 --rank_by CIDEr]

Metrics against reference captions: CIDEr, BLEU, METEOR, ROUGE-L, and SPICE if its models are present; with OpenAI's CLIP,
CLIPScore and RefCLIPScore; without it, ImageTextScore and RefImageTextScore by our own small CLIP. CHAIR measures how often
captions hallucinate objects.
"""

import csv
import io
import textwrap
from pathlib import Path

from chair import Chair
from cli import ArgumentParser, UserError, run
from clip_model import whole_characters
from dataset import load_references
from files import SUFFIX_KINDS, check_output, read_json, write_json, write_whole
from images import ImageError, load_image
from metrics import clip_scorer, evaluate, text_metrics
from significance import BLEU, DRAWS, compare, paired_bootstrap

PICTURES = ".png", ".jpg", ".pdf", ".svg"


def check_form(predictions, name):
    if not isinstance(predictions, dict):
        raise UserError(f'{name}: not of the form {{"file name without extension": "caption"}}')


def check_predictions(predictions, references, allow_partial=False, name="the predictions"):
    """The keys that can be scored, in the order of `references`.

    Raises UserError unless `predictions` is {key: caption} with exactly the keys of `references` and no empty caption;
    with `allow_partial`, only if nothing is left to score.
    """
    check_form(predictions, name)
    no_text = [key for key, caption in predictions.items() if not isinstance(caption, str)]
    empty = [key for key, caption in predictions.items() if key not in no_text and not caption.strip()]
    problems = {
        "missing": [key for key in references if key not in predictions],
        "not in the annotation file": [key for key in predictions if key not in references],
        "not a string": no_text,
        "empty": empty,
    }
    usable = [key for key in references if key in predictions and key not in no_text and key not in empty]
    if not usable or any(problems.values()) and not allow_partial:
        raise UserError(f"{name}: one caption is needed for each image of the annotation file; "
                        + "; ".join(f"{len(keys)} {problem}: {some(keys)}" for problem, keys in problems.items() if keys))
    return usable


def some(keys):
    """The first five keys, as text."""
    return ", ".join(map(repr, keys[:5])) + (", …" if len(keys) > 5 else "")


def write_scores(path, predictions, corpus, each, keys, chair=None):
    """Write the scores of every image: as CSV, or as JSON with the corpus scores and CHAIR, by the file's suffix."""
    if Path(path).suffix == ".json":
        images = {key: {"caption": predictions[key]} | {name: float(values[i]) for name, values in each.items()}
                  for i, key in enumerate(keys)}
        write_json(path, {"corpus": corpus} | ({"CHAIR": chair} if chair else {}) | {"images": images})
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a lone \r must be quoted
    writer.writerow(["image", "caption", *each])
    writer.writerows([key, predictions[key], *(float(values[i]) for values in each.values())] for i, key in enumerate(keys))
    write_whole(path, table.getvalue().encode("utf-8", "backslashreplace"))


def plot_ranking(path, name, scores, predictions, images, number):
    """Draw the `number` best and worst captions by the metric `name`: image, score, caption and references."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    def lines(text, width, at_most):
        return textwrap.fill(textwrap.shorten(whole_characters(text), width * at_most, placeholder=" …"), width)

    keys = list(images)
    order = scores.argsort(kind="stable")[::-1]
    number = min(number, len(order))
    figure, grid = plt.subplots(2, number, figsize=(3.4 * number, 11), squeeze=False, layout="constrained")
    for row, chosen, title in zip(grid, (order[:number], order[::-1][:number]), ("best", "worst")):
        for rank, (axes, i) in enumerate(zip(row, chosen), 1):
            key = keys[i]
            try:
                axes.imshow(load_image(images[key].path))
            except ImageError as error:
                raise UserError(f"cannot draw {images[key].path}: {error}") from None
            axes.set_axis_off()
            axes.set_title(f"{title} {rank}: {name} {scores[i]:.3f}\n{lines(predictions[key], 38, 6)}", fontsize=10,
                           parse_math=False)
            text = "\n".join(lines(f"– {caption}", 46, 4) for caption in images[key].captions[:8])
            axes.text(0.5, -0.04, text, transform=axes.transAxes, ha="center", va="top", fontsize=8, color="0.35",
                      parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=Path(path).suffix[1:])
    plt.close(figure)
    write_whole(path, picture.getvalue())


def print_difference(name, difference, kind, width):
    """Print one line of a comparison; `width` is that of the name's column."""
    print(f"{name:<{width}}{difference.value:+.4f}  95% interval {difference.low:+.4f} to {difference.high:+.4f}  "
          f"p = {difference.p:.4f}  ({kind})")


def main():
    parser = ArgumentParser(description="Score captions against reference captions.")
    parser.add_argument("--pred_file", required=True, help='predictions: {"file name without extension": "caption"}')
    parser.add_argument("--images_root", help="folder of the images, for CLIPScore or ImageTextScore, and --rank")
    parser.add_argument("--annotation_file", required=True, help="reference captions, in COCO format")
    parser.add_argument("--clip_weights", help="CLIP's weights, or the name of a model "
                        "(default: weights/ViT-B-32.pt, else clip_small)")
    parser.add_argument("--clip_prefix", default="", help='put before each caption for CLIP; Hessel et al. use "A photo depicts "')
    parser.add_argument("--allow_partial", action="store_true", help="score only the images that have a caption")
    parser.add_argument("--out", help="write the scores of every image: .csv or .json")
    parser.add_argument("--compare", metavar="OTHER", help="other predictions: print differences with 95%% intervals")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="draw the N best and worst captions")
    parser.add_argument("--rank_by", default="CIDEr", help="metric to rank by")
    parser.add_argument("--rank_file", default="rank.png", help="where to draw them")
    args = parser.parse_args()
    if args.images_root and not Path(args.images_root).is_dir():
        raise UserError(f"the image folder {args.images_root} does not exist")
    if args.rank and not args.images_root:
        raise UserError("--rank draws the images: name their folder with --images_root")
    if args.rank < 0:
        raise UserError("--rank must be at least 1")
    if args.out and Path(args.out).suffix not in (".csv", ".json"):
        raise UserError(f"--out is {args.out}, but must end in .csv or .json")
    if args.rank and Path(args.rank_file).suffix not in PICTURES:
        raise UserError(f"--rank_file is {args.rank_file}, but must end in {', '.join(PICTURES)}")
    for path in filter(None, [args.out, args.rank_file if args.rank else None]):
        check_output(path, SUFFIX_KINDS[Path(path).suffix], [args.pred_file, args.annotation_file, args.compare])
    files = [args.pred_file] + ([args.compare] if args.compare else [])
    systems = [read_json(file, "predictions file") for file in files]
    for file, predictions in zip(files, systems):  # checked before CLIP is loaded
        check_form(predictions, file)
    clip, lacking = clip_scorer(args.images_root, args.clip_weights, args.clip_prefix)
    names = text_metrics() + (clip.names if clip else [])
    if args.rank and args.rank_by not in names:
        raise UserError(f"--rank_by is {args.rank_by}, but the metrics are {', '.join(names)}")
    references = load_references(args.annotation_file, args.images_root if clip or args.rank else None)
    usable = [set(check_predictions(predictions, references, args.allow_partial, file))
              for predictions, file in zip(systems, files)]
    images = {key: image for key, image in references.items() if all(key in keys for keys in usable)}
    if not images:
        raise UserError("no image has a caption in both predictions")
    (corpus, each, statistics), *others = evaluate(systems, images, clip)

    print(f"CIDEr: {corpus['CIDEr']} | CLIPScore: {corpus.get('CLIPScore', 'n/a')}")
    if lacking:
        print(lacking)
    if clip and (cut := clip.too_long([systems[0][key] for key in images])):
        print(f"{cut} captions are longer than CLIP's {clip.clip.limit} tokens and were cut for it")
    if len(images) < len(references):
        print(f"scored {len(images)} of {len(references)} images")
    width = max(13, 1 + max(map(len, corpus)))
    for name, value in corpus.items():
        if name not in ("CIDEr", "CLIPScore"):
            print(f"{name:<{width}}{value:.4f}")
    captions = [image.captions for image in images.values()]
    chairs = [Chair([predictions[key] for key in images], captions) for predictions in systems]
    print(", ".join(f"{name} {value:.4f}" for name, value in chairs[0].scores().items())
          + " (made-up things of COCO's 80 kinds, against these captions alone)")
    if len(images) == 1:
        print("one image: its CIDEr is 0 by definition, since a word that all images' references have weighs nothing; and there is "
              "no interval of a difference")
        others = []
    for (_, other_each, other_statistics), other_chair in zip(others, chairs[1:]):
        print(f"\nminus {args.compare}, {len(images)} images, {DRAWS:,} bootstrap draws of them:")
        for name, difference in compare(each, other_each, statistics, other_statistics).items():
            kind = "corpus" if name in BLEU else "mean of images"
            print_difference(name, difference, kind, width)
        print_difference("CHAIRs", paired_bootstrap(chairs[0].images - other_chair.images), "lower is better", width)
    if args.out:
        write_scores(args.out, systems[0], corpus, each, list(images), chairs[0].scores())
    if args.rank:
        plot_ranking(args.rank_file, args.rank_by, each[args.rank_by], systems[0], images, args.rank)


if __name__ == "__main__":
    run(main)
