"""Where each word of a caption looked: its attention over the image patches, as figures, as numbers and as a page.

    python3 p3_attention.py <image or folder> <out_dir>                           the embedded model's captions (p2)
    python3 p3_attention.py <image or folder> <out_dir> --model p1                LLaVA's (p1)

Of each picture it writes
    <name>.words.png, .pdf     the picture, then a panel a word with its map over the picture
    <name>.layers.png, .pdf    the content words in several layers side by side, to pick a layer by
    <name>.npz                 the raw maps of every word, layer and head
and index.html, where hovering a word shows its map. Layers and heads are counted from 1.

The weights are those of the decoder's own forward pass. A word's map is that of the position that *predicts* it, the
one before it; the maps of its tokens are averaged. Nothing predicts <start>: its panel is the picture itself.
"""

import base64
import html
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from attention import CORRECTIONS, START, favourite_concepts, llava_attention, p2_attention, upsample, word_maps
from captioner import Captioner
from checkpoints import find_weights
from cli import ArgumentParser, UserError, printable, run
from devices import pick_device
from files import check_writable, write_whole
from images import ImageError, list_images, load_image
from llava import SIDE, Llava, LlavaSettings, default_model

SCALES = "panel", "shared"
COLOURS = matplotlib.colormaps["inferno"]


# ---- figures ---------------------------------------------------------------------------------------------------


def heat(picture, values, region, low, high):
    """The picture under its map, in colours from `low` to `high`: uint8 (height, width, 3); grey where nothing was seen"""
    pixels = upsample(values, picture.size, region)
    below = np.asarray(picture.convert("L").convert("RGB"), np.float32) / 255
    colours = COLOURS(((pixels - low) / max(high - low, 1e-12)).clip(0, 1))[..., :3]
    mixed = 0.45 * below + 0.55 * colours
    return (255 * np.where(np.isnan(pixels)[..., None], 0.3 + 0.4 * below, mixed)).round().astype(np.uint8)


def limits(maps, correction):
    """The values that the ends of the colour scale stand for. A difference from the mean counts above zero alone."""
    return 0.0 if correction == "subtract" else float(maps.min()), float(maps.max())


def plot_grid(rows, aspect, width, labels=(), bar=None):
    """Pictures in rows -> a matplotlib Figure.

    Args:
        rows: lists of (title, array of pixels, or None for a gap).
        aspect: of every picture, height over width.
        width: of a panel, inches.
        labels: of the rows, on their left.
        bar: (lowest, highest, name) of a colour scale that all share.
    """
    columns = max(map(len, rows))
    tall = width * min(max(aspect, 0.35), 1.6)  # of a panel; a picture longer than that is fitted into it
    gap = 0.06
    titles = [0.24 * lines if lines else gap for lines in  # their height
              (max((len(text.splitlines()) for text, _ in row), default=0) for row in rows)]
    left, right = (0.75 if labels else gap), (0.85 if bar else gap)
    whole = left + columns * (width + gap) - gap + right, len(rows) * tall + sum(titles) + gap
    figure = Figure(figsize=whole)

    def axes_at(x, y, w, h):  # inches from the upper left
        return figure.add_axes((x / whole[0], 1 - (y + h) / whole[1], w / whole[0], h / whole[1]))

    for r, row in enumerate(rows):
        y = r * tall + sum(titles[:r + 1])
        for c, (text, pixels) in enumerate(row):
            if pixels is None:
                continue
            axes = axes_at(left + c * (width + gap), y, width, tall)
            axes.imshow(pixels)
            axes.axis("off")
            axes.annotate(text, (0.5, 1), (0, 2.5), xycoords="axes fraction", textcoords="offset points", ha="center",
                          va="bottom", fontsize=min(9, 125 * width / max([1, *map(len, text.splitlines())])), parse_math=False)
        if labels:
            figure.text((left - 0.08) / whole[0], 1 - (y + tall / 2) / whole[1], labels[r], ha="right", va="center",
                        fontsize=9)
    if bar:
        axes = axes_at(whole[0] - right + 0.1, titles[0], 0.12, whole[1] - titles[0] - gap)
        figure.colorbar(ScalarMappable(Normalize(*bar[:2]), COLOURS), cax=axes)
        axes.tick_params(labelsize=7)
        axes.set_ylabel(bar[2], fontsize=8)
    return figure


def shrink(picture, pixels):
    """A copy of the picture with at most so many pixels on its longer side."""
    picture = picture.copy()
    picture.thumbnail((pixels, pixels), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


def plot_words(picture, attention, layer="mean", head="mean", correction="none", scale="panel", columns=7):
    """The course's figure: the picture as <start>, then a panel a word with its map over the picture; below the word, the
    concept that it attended to most.

    Args:
        layer, head, correction: as for word_maps.
        scale: "panel": each panel has its own colours, from its least to its most attended patch; "shared": one scale
            for all, with its bar.
    """
    picture = shrink(picture, 400)  # 1.3 inches in print
    maps = word_maps(attention, layer, head, correction)
    panels = [(START, np.asarray(picture))]
    titles = [f"{word}\n{name} {share:.0%}" for word, (name, share) in
              zip(attention.words, favourite_concepts(attention, layer, head))] or attention.words
    for title, values in zip(titles, maps):
        low, high = limits(maps if scale == "shared" else values, correction)
        panels.append((title, heat(picture, values, attention.region, low, high)))
    names = {"none": "attention of a patch", "divide": "attention / its mean over words",
             "subtract": "attention − its mean over words"}
    columns = min(columns, len(panels))
    rows = [panels[start:start + columns] for start in range(0, len(panels), columns)]
    bar = (*limits(maps, correction), names[correction]) if scale == "shared" else None
    return plot_grid(rows, picture.height / picture.width, 1.3, bar=bar)


def plot_layers(picture, attention, head="mean", correction="none", words=None, layers=None):
    """Several layers under each other, a column a word, each panel with its own colours.

    Args:
        words: places of words; default: the first 7 content words.
        layers: counted from 1; default: all, of more than 8 every n-th and the last; and their mean.
    """
    picture = shrink(picture, 340)
    words = attention.content_words()[:7] if words is None else words
    words = words or list(range(len(attention.words)))[:7]
    count = attention.maps.shape[1]
    if layers is None:
        layers = [*sorted({round(layer) for layer in np.linspace(1, count, min(count, 8))}), "mean"]
    rows = []
    for layer in layers:
        maps = word_maps(attention, layer, head, correction)
        first = not rows
        rows.append([(START, np.asarray(picture)) if first else ("", None)])
        rows[-1] += [(attention.words[i] if first else "",
                      heat(picture, maps[i], attention.region, *limits(maps[i], correction))) for i in words]
    labels = [layer if layer == "mean" else f"layer {layer}" for layer in layers]
    return plot_grid(rows, picture.height / picture.width, 1.1, labels)


def render(figure, kind, dpi=300):
    """A figure as bytes of a "png", "jpg" or "pdf" file; print resolution unless `dpi` says otherwise."""
    data = io.BytesIO()
    quality = {"pil_kwargs": {"quality": 85}} if kind == "jpg" else {}
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # letters as letters, which publishers ask for
        figure.savefig(data, format=kind, dpi=dpi, **quality)
    return data.getvalue()


# ---- files -----------------------------------------------------------------------------------------------------


def write_maps(path, attention):
    """The raw maps as .npz: maps (words, layers, heads, rows, columns), words, caption, log_probs, region, and of
    concepts the names and shares (words, layers, heads, concepts)."""
    data = io.BytesIO()
    np.savez_compressed(data, maps=attention.maps, words=np.array(attention.words), caption=np.array(attention.caption),
                        log_probs=attention.log_probs, region=np.array(attention.region),
                        concepts=np.array(attention.concepts, dtype=str), shares=attention.shares)
    write_whole(path, data.getvalue())


def page_entry(name, picture, attention):
    """One picture of the page: its JPEG, its words, and their maps in every layer, the mean first, heads averaged."""
    jpeg = io.BytesIO()
    shrink(picture, 640).save(jpeg, "JPEG", quality=85)
    maps = attention.maps.mean(2)  # (W, layers, rows, columns)
    maps = np.concatenate([maps.mean(1, keepdims=True), maps], 1).swapaxes(0, 1)
    maps = maps / maps.max((1, 2, 3), keepdims=True).clip(1e-12)  # so that 16 bits hold them, layer by layer
    left, top, right, bottom = (100 * edge for edge in attention.region)
    concepts = [f"{name} {share:.0%}" for name, share in favourite_concepts(attention)]
    return {"name": name, "words": attention.words, "concepts": concepts, "layers": maps.shape[0] - 1, "rows": maps.shape[2],
            "columns": maps.shape[3], "image": encode64(jpeg.getvalue()),
            "region": f"left:{left}%;top:{top}%;width:{right - left}%;height:{bottom - top}%",
            "maps": encode64((65535 * maps).round().astype("<u2").tobytes())}


def encode64(data):
    return base64.b64encode(data).decode("ascii")


def page(entries, layer="mean"):
    """A page without outside parts, where hovering a word shows its map: HTML as bytes."""
    data = json.dumps(entries, ensure_ascii=False).replace("<", "\\u003c")  # so that no word ends the script
    colours = ",".join(f"[{r},{g},{b}]" for r, g, b in (255 * COLOURS(range(256))[:, :3]).round().astype(int))
    parts = {"TITLE": html.escape(", ".join(entry["name"] for entry in entries[:3])), "DATA": data,
             "COLOURS": f"[{colours}]", "LAYER": str(0 if layer == "mean" else layer)}
    return re.sub("|".join(parts), lambda part: parts[part[0]], PAGE).encode("utf-8", "replace")


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Where each word looked: TITLE</title>
<style>
body { font: 17px/1.5 system-ui, sans-serif; max-width: 700px; margin: 1.5em auto; padding: 0 1em; color: #222 }
figure { margin: 2.5em 0 }
.picture { position: relative; display: inline-block; line-height: 0 }
.picture img { max-width: 100%; transition: filter .1s }
.picture.on img { filter: grayscale(1) }
canvas { position: absolute; opacity: 0; pointer-events: none }
.on canvas { opacity: .62 }
.word { padding: .1em .2em; border-radius: .2em; cursor: pointer }
.word:hover, .word:focus { background: #ffd9a0; outline: none }
small, label { color: #666; font-size: 14px; margin-right: 1em }
</style>
<h1>Where each word looked</h1>
<p>Hover a word, or walk over the words with the Tab key. A word's map is the attention of the position that predicts it,
heads averaged; each map has its own colours, from dark (least) to bright (most). Where the captioner saw concept words, resting
on a word names the one that it attended to most.</p>
<p><label>Layer <select id="layer"></select></label>
<label><input type="checkbox" id="usual"> less the mean over words</label></p>
<main></main>
<script>
const entries = DATA, colours = COLOURS;
const FINE = 12;  // pixels of the canvas to a patch; the browser stretches it over the picture
const layer = document.getElementById("layer"), usual = document.getElementById("usual");
const most = Math.max(...entries.map(entry => entry.layers));
for (let i = 0; i <= most; i++) layer.add(new Option(i ? i : "mean", i));
layer.value = LAYER;
for (const entry of entries) {
  const bytes = Uint8Array.from(atob(entry.maps), letter => letter.charCodeAt(0));
  const maps = new Uint16Array(bytes.buffer), size = entry.rows * entry.columns, count = entry.words.length;
  const figure = document.createElement("figure"), frame = document.createElement("div");
  const image = new Image(), canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
  frame.className = "picture";
  image.src = "data:image/jpeg;base64," + entry.image;
  image.alt = entry.name;
  canvas.width = entry.columns * FINE;
  canvas.height = entry.rows * FINE;
  canvas.style = entry.region;
  frame.append(image, canvas);
  const show = word => {
    const start = Math.min(layer.value, entry.layers) * count * size;
    const values = Array.from(maps.subarray(start + word * size, start + (word + 1) * size));
    if (usual.checked) for (let i = 0; i < size; i++) {
      let sum = 0;
      for (let w = 0; w < count; w++) sum += maps[start + w * size + i];
      values[i] = Math.max(0, values[i] - sum / count);
    }
    const low = Math.min(...values), high = Math.max(...values, low + 1e-9);
    const brush = canvas.getContext("2d"), pixels = brush.createImageData(canvas.width, canvas.height);
    const between = (at, count) => {  // which two patches a pixel lies between, and how far from the first
      const place = Math.min(Math.max((at + 0.5) / FINE - 0.5, 0), count - 1), first = Math.floor(place);
      return [first, Math.min(first + 1, count - 1), place - first];
    };
    for (let y = 0, i = 0; y < canvas.height; y++) {
      const [above, below, down] = between(y, entry.rows);
      for (let x = 0; x < canvas.width; x++, i += 4) {
        const [left, right, across] = between(x, entry.columns);
        const row = r => values[r * entry.columns + left] * (1 - across) + values[r * entry.columns + right] * across;
        const value = row(above) * (1 - down) + row(below) * down;
        pixels.data.set([...colours[Math.round(255 * (value - low) / (high - low))], 255], i);
      }
    }
    brush.putImageData(pixels, 0, 0);
    frame.classList.add("on");
  };
  entry.words.forEach((word, i) => {
    const span = document.createElement("span");
    span.className = "word";
    span.textContent = word;
    span.tabIndex = 0;
    if (entry.concepts.length) span.title = entry.concepts[i];
    span.onmouseenter = span.onfocus = () => show(i);
    span.onmouseleave = span.onblur = () => frame.classList.remove("on");
    caption.append(span, " ");
  });
  const name = document.createElement("small");
  name.textContent = entry.name;
  caption.append(name);
  figure.append(frame, caption);
  document.querySelector("main").append(figure);
}
</script>
</html>
"""


# ---- command line ----------------------------------------------------------------------------------------------


def layer_or_head(text):
    return text if text == "mean" else int(text)


def main():
    parser = ArgumentParser(description="Draw, and write as numbers, where each word of a caption looked.")
    parser.add_argument("images", type=Path, help="an image, or a folder; its own image files count, not those in subfolders")
    parser.add_argument("out_dir", type=Path, help="folder for the figures, the maps and index.html; made if need be")
    parser.add_argument("--model", default="p2",
                        help="p2; p1, the LLaVA that p1_llava_infer.py takes; or a LLaVA's folder or name on the model hub")
    parser.add_argument("--decoder_weights", help="p2: GPT-2 weights (default: the embedded model's)")
    parser.add_argument("--checkpoint", help="p2: what p2_train.py wrote (default: the newest trained with the decoder)")
    parser.add_argument("--instruction", default=LlavaSettings.instruction, help="LLaVA: what it is told beside the picture")
    parser.add_argument("--beam_size", type=int, help="beams of the search, 1: greedy; default: what captions are made with, "
                        f"for p2 as the checkpoint says, for LLaVA {LlavaSettings.num_beams}")
    parser.add_argument("--layer", type=layer_or_head, default="mean", help="of the panels: its number, or mean")
    parser.add_argument("--head", type=layer_or_head, default="mean", help="its number, or mean")
    parser.add_argument("--rollout", action="store_true",
                        help="p2: carry the maps back through the projection's transformer layers")
    parser.add_argument("--correction", choices=CORRECTIONS, default="none",
                        help="for patches that every word attends to: divide by, or subtract, the mean over words")
    parser.add_argument("--scale", choices=SCALES, default="panel", help="of the colours: each panel's own, or one for all")
    arguments = parser.parse_args()
    settings = LlavaSettings(arguments.instruction)
    if arguments.beam_size is not None:
        settings = replace(settings, num_beams=arguments.beam_size)
    llava = arguments.model != "p2"
    if llava and (arguments.rollout or arguments.decoder_weights or arguments.checkpoint):
        raise UserError("--rollout, --decoder_weights and --checkpoint are for p2's model, not for LLaVA")
    if arguments.checkpoint and not arguments.decoder_weights:
        raise UserError("--checkpoint needs the --decoder_weights that it was trained with")
    # Cheap questions first: a mistake shows before a model is loaded.
    paths = [arguments.images] if arguments.images.is_file() else list_images(arguments.images).values()
    try:
        arguments.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {arguments.out_dir}: {error.strerror}") from None
    check_writable(arguments.out_dir / "index.html")
    if llava:
        model = Llava(default_model() if arguments.model == "p1" else arguments.model, attention="eager")
        side = SIDE
    else:
        decoder_weights, checkpoint = find_weights(arguments.decoder_weights, arguments.checkpoint)
        model = Captioner.load(checkpoint, decoder_weights).to(pick_device())
        side = model.encoder.image_size
        generation = model.generation if arguments.beam_size is None else replace(model.generation, beam_size=arguments.beam_size)

    entries, unread = [], 0
    for path in paths:
        try:
            picture = load_image(path, side)  # as p2_infer.py reads it, so that the caption is the same
        except ImageError as error:
            unread += 1
            print(f"skipped {printable(str(path))}: {printable(str(error))}", file=sys.stderr)
            continue
        if llava:
            attention = llava_attention(model, picture, settings)
        else:
            attention, = p2_attention(model, [picture], generation, arguments.rollout)
        choice = {"head": arguments.head, "correction": arguments.correction}
        for name, figure in (("words", plot_words(picture, attention, arguments.layer, scale=arguments.scale, **choice)),
                             ("layers", plot_layers(picture, attention, **choice))):
            for kind in "png", "pdf":
                write_whole(arguments.out_dir / f"{path.stem}.{name}.{kind}", render(figure, kind))
        write_maps(arguments.out_dir / f"{path.stem}.npz", attention)
        entries.append(page_entry(path.name, picture, attention))
        print(f"{path.name}  {attention.caption}")
    if entries:
        write_whole(arguments.out_dir / "index.html", page(entries, arguments.layer))
    if unread:
        print(f"{unread} of {len(paths)} images could not be read", file=sys.stderr)
    return 3 if unread else 0


if __name__ == "__main__":
    run(main)
