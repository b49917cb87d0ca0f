"""Print captions, and draw images with their captions below.

    python3 hw3_demo.py <images> <captions.json> <picture.png>
"""

import math
import textwrap

import matplotlib
import matplotlib.pyplot as plt

from cli import ArgumentParser, UserError, run
from files import check_output, read_json
from images import ImageError, list_images, load_image

matplotlib.use("Agg")  # no display needed

COLUMNS = 3
CELL = 3.6  # width of a column, inches
PICTURE = 2.5  # height of a picture, inches
FONT_SIZE = 11
WRAP = 40  # characters of that size that fit below a picture


def main():
    parser = ArgumentParser(description="Print captions and draw them below their images.")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("captions", help="JSON file of hw3_2.sh: file name without extension -> caption")
    parser.add_argument("picture", help="PNG to write")
    args = parser.parse_args()
    captions = read_json(args.captions, "captions file")
    if not isinstance(captions, dict):
        raise UserError(f"{args.captions} is not the JSON of hw3_2.sh: image name without extension to caption")
    check_output(args.picture, "PNG", [args.captions])
    files = {stem: path for stem, path in list_images(args.images).items() if stem in captions}
    if not files:
        raise UserError(f"{args.captions} holds no caption of an image in {args.images}")
    width = max(len(path.name) for path in files.values())
    shown = []
    for stem, path in files.items():
        print(f"{path.name:{width}}  {captions[stem]}")
        try:
            shown.append((load_image(path), captions[stem]))
        except ImageError:
            pass  # p2_infer.py has already reported it
    draw(shown, args.picture)
    print(f"drawn in {args.picture}")


def draw(shown, picture):
    """Draw [(image, caption), …] as a grid, each caption wrapped below its image, to the PNG `picture`."""
    texts = [textwrap.fill(caption, WRAP) for _, caption in shown]
    columns = max(1, min(COLUMNS, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    # Leave room for the longest caption below each picture, so that no text overlaps the next row.
    lines = 1.5 + max((text.count("\n") + 1 for text in texts), default=0)
    below = lines * FONT_SIZE * 1.3 / 72
    width, height = columns * CELL, rows * (PICTURE + below)
    figure = plt.figure(figsize=(width, height))
    for i, ((image, _), text) in enumerate(zip(shown, texts)):
        row, column = divmod(i, columns)
        left, bottom = (column + 0.04) * CELL, (rows - 1 - row) * (PICTURE + below) + below
        axes = figure.add_axes((left / width, bottom / height, 0.92 * CELL / width, 0.96 * PICTURE / height))
        axes.imshow(image)
        axes.set_anchor("S")  # align the image with the bottom, next to its caption
        axes.axis("off")
        axes.annotate(text, (0.5, 0), (0, -6), xycoords="axes fraction", textcoords="offset points", ha="center",
                      va="top", fontsize=FONT_SIZE, parse_math=False)  # dollar signs are not math
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
