"""Zero-shot classification of the images in a folder with CLIP, OpenAI's or our own.

    python3 p1_clip_classify.py images/ id2label.json labels.csv
        [--template "A photo of a {object}." "A picture of a {object}." …] [--compare] [--bars 0_12.png … --figure bars.png]

As in Radford et al. 2021, section 3.1: an image gets the label whose prompt is most similar. id2label.json has the form
{"<label>": "<class name>"}, the CSV the columns `filename,label`. If file names begin with their label, as in `0_12.png`,
the accuracy is printed. Exit status 0: success; 2: nothing was done, for the reason printed; 3: done, except for unreadable
images, which are listed.
"""

import csv
import io
import sys
from pathlib import Path

from cli import ArgumentParser, UserError, printable, run
from clip_model import (
    ASSIGNMENT_TEMPLATES,
    CLASS_NAME,
    NO_CLIP,
    TEMPLATE,
    average,
    default_clip,
    embed_classes,
    load_clip,
    prompt_name,
    similarity,
    whole_characters,
)
from devices import pick_device
from files import check_output, read_json, write_whole
from images import image_files, load_image
from runtime import RUNTIME_HELP

# Sizes of the bar plot in inches: a cell is an image with its bars to the right.
CELL, GAP, IMAGE, BARS = (6.4, 2.7), 0.2, 2.5, 3.2
COLOUR, TRUE_COLOUR, TRACK = "#4c78a8", "#3a923a", "#ececec"


# ---- labels and prompts ----------------------------------------------------------------------------------------


def read_classes(id2label):
    """{label: class name} from the JSON file `id2label`. Raises UserError."""
    classes = read_json(id2label, "labels file")
    if not isinstance(classes, dict) or not classes or not all(
            isinstance(name, str) and prompt_name(name) for name in classes.values()):
        raise UserError(f'{id2label} is not of the form {{"label": "class name"}}')
    return classes


def true_label(file_name, labels):
    """The label that a name like {label}_{id}.png begins with, the longest of several, or None."""
    parts = file_name.split("_")
    beginnings = ("_".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((beginning for beginning in beginnings if beginning in labels), None)


def predict(images, classifier, labels):
    """The label closest to each image: embeddings (n, D) or (n, Q, D) and (C, D), of length 1 -> n of the C labels."""
    return [labels[i] for i in similarity(images, classifier).argmax(-1).tolist()]


def count_right(predicted, truths):
    """The number of correct labels; `truths` has None if the label is unknown."""
    return sum(label == truth for label, truth in zip(predicted, truths))


# ---- output ----------------------------------------------------------------------------------------------------


def write_labels(path, rows):
    """Write the CSV: [(file name, label), …] under the header filename,label."""
    table = io.StringIO()
    plain, quoted = (csv.writer(table, lineterminator="\n", quoting=kind) for kind in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    plain.writerow(["filename", "label"])
    for row in rows:
        (quoted if "\r" in "".join(row) else plain).writerow(row)  # before Python 3.13, a lone \r is not quoted automatically
    write_whole(path, table.getvalue().encode("utf-8", "backslashreplace"))


def plot_bars(path, shown, names, truths):
    """Write a PNG of images, each beside its five likeliest classes; the true one, if known, is green.

    Args:
        shown: {image path: probabilities (C,)}
        names: of the C classes
        truths: {image path: name of the true class, or None}
    """
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    def line(axes, x, y, text, at_most, **style):
        text = whole_characters(" ".join(text.split()))
        text = text if len(text) <= at_most else text[:at_most - 1] + "…"
        axes.text(x, y, text, va="bottom", parse_math=False, **style)

    columns = 1 if len(shown) < 4 else 2
    rows = -(-len(shown) // columns)
    width, height = columns * CELL[0], rows * CELL[1]
    figure = plt.figure(figsize=(width, height))
    for number, (file, probabilities) in enumerate(shown.items()):
        row, column = divmod(number, columns)
        left, bottom, inside = column * CELL[0] + GAP, (rows - 1 - row) * CELL[1] + GAP, CELL[1] - 2 * GAP
        axes = figure.add_axes((left / width, bottom / height, IMAGE / width, inside / height))
        axes.imshow(load_image(file, 300))
        axes.set_axis_off()
        axes = figure.add_axes(((left + IMAGE + GAP) / width, bottom / height, BARS / width, inside / height))
        axes.set(xlim=(0, 1), ylim=(4.2, -1.3))
        axes.set_axis_off()
        line(axes, 0, -0.85, file.name, 24, fontsize=9, color="0.45")
        truth = truths[file]
        if truth is not None:
            line(axes, 1, -0.85, f"true: {truth}", 24, fontsize=9, color=TRUE_COLOUR, ha="right")
        for rank, i in enumerate(probabilities.argsort(descending=True, stable=True)[:5].tolist()):
            probability = probabilities[i].item()
            axes.barh(rank, 1, 0.26, color=TRACK)
            axes.barh(rank, probability, 0.26, color=TRUE_COLOUR if names[i] == truth else COLOUR)
            line(axes, 0, rank - 0.18, names[i], 36, fontsize=10)
            line(axes, 1, rank - 0.18, f"{probability:.1%}", 6, fontsize=10, ha="right")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)
    write_whole(path, picture.getvalue())


# ---- the script ------------------------------------------------------------------------------------------------


def check_outputs(args, paths):
    """Raise UserError unless both outputs can be written without overwriting an input."""
    if Path(args.output).suffix.lower() != ".csv":
        raise UserError(f"the output {args.output} must end in .csv: the order is <images> <id2label.json> <out.csv>")
    outputs = {args.output: "CSV"}
    if args.bars:
        if Path(args.figure).suffix.lower() != ".png":
            raise UserError(f"--figure is {args.figure}, but must end in .png")
        outputs[args.figure] = "PNG"
    for output, kind in outputs.items():
        check_output(output, kind, [args.id2label, *paths])


def find_images(names, paths):
    """The paths of the images that --bars names. Raises UserError."""
    known = {path.name: path for path in paths}
    missing = [name for name in names if Path(name).name not in known]
    if missing:
        raise UserError(f"--bars: {missing[0]} is not among the images of {paths[0].parent}")
    return [known[name] for name in dict.fromkeys(Path(name).name for name in names)]


def main():
    parser = ArgumentParser(description="Classify the images in a folder with CLIP.")
    parser.add_argument("images", help="folder of images, without its subfolders")
    parser.add_argument("id2label", help='JSON file: {"label": "class name"}')
    parser.add_argument("output", help="CSV file: filename,label")
    parser.add_argument("--template", nargs="+",
                        help=f"prompts with {{object}} or {{}} for the class; several are averaged to one "
                        f"classifier; default: {TEMPLATE}")
    parser.add_argument("--compare", action="store_true", help="print the accuracy of each --template, and of their "
                        "average; without --template, of the assignment's three")
    parser.add_argument("--bars", nargs="+", metavar="NAME", help="plot these images with their five likeliest classes")
    parser.add_argument("--figure", default="bars.png", help="PNG file for --bars")
    parser.add_argument("--runtime", default="auto", help=f"{RUNTIME_HELP}; for our own CLIP")
    parser.add_argument("--clip_weights", help="OpenAI's CLIP, as weights file or name; or folder or name of another "
                        "dual encoder of transformers; or clip_small (default: weights/ViT-B-32.pt, else clip_small)")
    args = parser.parse_args()
    # Check the arguments before loading a model.
    paths = image_files(args.images)
    classes = read_classes(args.id2label)
    labels, names = list(classes), list(classes.values())
    truths = {path: true_label(path.name, classes) for path in paths}
    compared, templates = args.template or ASSIGNMENT_TEMPLATES, args.template or [TEMPLATE]
    for template in templates:
        if not CLASS_NAME.search(template):
            raise UserError(f"the template {template!r} has no {{object}}, where the class's name belongs")
    if args.compare and not any(truths.values()):
        raise UserError(f"--compare needs image names that begin with their label of {args.id2label}, as {labels[0]}_1.png does")
    chosen = find_images(args.bars or [], paths)
    check_outputs(args, paths)
    if args.clip_weights is None and default_clip() is None:
        raise UserError(f"classifying {NO_CLIP}; or `bash hw3_download.sh`, for our own small one")

    clip = load_clip(args.clip_weights, pick_device(), runtime=args.runtime)
    classifier = average(embed_classes(clip, names, templates))
    each = embed_classes(clip, names, compared) if args.compare else None
    read, images, unread = clip.encode_images(paths)
    for path, reason in unread.items():
        print(f"skipped {printable(str(path))}: {printable(reason)}", file=sys.stderr)
    predicted = predict(images, classifier, labels)
    write_labels(args.output, [(path.name, label) for path, label in zip(read, predicted)])
    print(f"{len(read)} labels in {args.output}"
          + (f"; {len(unread)} of {len(paths)} images could not be read" if unread else ""), file=sys.stderr)

    known = [truths[path] for path in read]
    if count := sum(truth is not None for truth in known):
        right = count_right(predicted, known)
        print(f"accuracy {right / count:.4f}: {right} of the {count} images whose names begin with a label")
        if args.compare:
            print("\naccuracy  template")
            for template, one in [*zip(compared, each), ("all of them, averaged", average(each))]:
                print(f"{count_right(predict(images, one, labels), known) / count:<8.4f}  {template}")
    probabilities = (clip.logit_scale * similarity(images, classifier)).softmax(-1)
    likely = dict(zip(read, probabilities))
    if shown := {path: likely[path] for path in chosen if path in likely}:
        plot_bars(args.figure, shown, list(map(prompt_name, names)),
                  {path: truths[path] and prompt_name(classes[truths[path]]) for path in shown})
        print(f"drawn in {args.figure}", file=sys.stderr)
    return 3 if unread else 0


if __name__ == "__main__":
    run(main)
