"""Figures of attention maps over the picture, with one panel per word or one row per layer; and the raw maps as a file."""

import io

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from attention import COLOUR_MAP, START, favourite_concepts, upsample, word_maps
from files import write_whole
from images import thumbnail

SCALES = "panel", "shared"
COLOURS = matplotlib.colormaps[COLOUR_MAP]


def heat(picture, values, region, low, high):
    """The map over the picture, in colours from `low` to `high`: uint8 (height, width, 3); grey where the model saw nothing"""
    pixels = upsample(values, picture.size, region)
    below = np.asarray(picture.convert("L").convert("RGB"), np.float32) / 255
    colours = COLOURS(((pixels - low) / max(high - low, 1e-12)).clip(0, 1))[..., :3]
    mixed = 0.45 * below + 0.55 * colours
    return (255 * np.where(np.isnan(pixels)[..., None], 0.3 + 0.4 * below, mixed)).round().astype(np.uint8)


def limits(maps, correction):
    """The values at the ends of the colour scale. For differences from the mean it starts at zero."""
    return 0.0 if correction == "subtract" else float(maps.min()), float(maps.max())


def plot_grid(rows, aspect, width, labels=(), bar=None):
    """Pictures in rows -> a matplotlib Figure.

    Args:
        rows: lists of (title, array of pixels, or None for an empty panel).
        aspect: height / width of every picture.
        width: of a panel, in inches.
        labels: of the rows, on their left.
        bar: (minimum, maximum, name) of a common colour scale.
    """
    columns = max(map(len, rows))
    tall = width * min(max(aspect, 0.35), 1.6)  # height of a panel; taller pictures are fitted into it
    gap = 0.06
    titles = [0.24 * lines if lines else gap for lines in  # their height
              (max((len(text.splitlines()) for text, _ in row), default=0) for row in rows)]
    left, right = (0.75 if labels else gap), (0.85 if bar else gap)
    whole = left + columns * (width + gap) - gap + right, len(rows) * tall + sum(titles) + gap
    figure = Figure(figsize=whole)

    def axes_at(x, y, w, h):  # in inches from the upper left
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


def plot_words(picture, attention, layer="mean", head="mean", correction="none", scale="panel", columns=7):
    """The course's figure: the picture as <start>, then one panel per word with its map over the picture, and the concept that it
    attended to most below the word.

    Args:
        layer, head, correction: as for word_maps.
        scale: "panel": each panel's colours range from its minimum to its maximum; "shared": one scale for all, with a
            colour bar.
    """
    picture = thumbnail(picture, 400)  # 1.3 inches in print
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
    """One row per layer, one column per word, each panel with its own colour scale.

    Args:
        words: indices of words; default: the first 7 content words.
        layers: counted from 1; default: all, or 8 evenly spaced ones if there are more, and the mean of all.
    """
    picture = thumbnail(picture, 340)
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
    """A figure as bytes of a "png", "jpg" or "pdf" file; by default in print resolution."""
    data = io.BytesIO()
    quality = {"pil_kwargs": {"quality": 85}} if kind == "jpg" else {}
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # embed TrueType fonts, which publishers require
        figure.savefig(data, format=kind, dpi=dpi, **quality)
    return data.getvalue()


def write_maps(path, attention):
    """Write the raw maps as .npz: maps (words, layers, heads, rows, columns), words, caption, log_probs, region, and the
    concepts' names and shares (words, layers, heads, concepts)."""
    data = io.BytesIO()
    np.savez_compressed(data, maps=attention.maps, words=np.array(attention.words), caption=np.array(attention.caption),
                        log_probs=attention.log_probs, region=np.array(attention.region),
                        concepts=np.array(attention.concepts, dtype=str), shares=attention.shares)
    write_whole(path, data.getvalue())
