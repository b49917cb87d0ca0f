"""A web page that shows a word's attention map when hovering over it in the caption."""

import base64
import html
import io
import json
import re

import matplotlib
import numpy as np

from attention import COLOUR_MAP, favourite_concepts
from images import thumbnail

COLOURS = matplotlib.colormaps[COLOUR_MAP]
PAGE = """<!DOCTYPE html>
<html lang="en" class="KIND"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
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
.part h1, .part .about { display: none }
.part body, .part figure { margin: 0 }
small, label { color: #666; font-size: 14px; margin-right: 1em }
</style>
<h1>Where each word looked</h1>
<p class="about">Hover a word, or walk over the words with the Tab key. A word's map is the attention of the position that predicts it,
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


def page_entry(name, picture, attention):
    """The page's data of one picture: its JPEG, its words, and their maps averaged over heads: the layers' mean, then every layer."""
    jpeg = io.BytesIO()
    thumbnail(picture, 640).save(jpeg, "JPEG", quality=85)
    maps = attention.maps.mean(2)  # (W, layers, rows, columns)
    maps = np.concatenate([maps.mean(1, keepdims=True), maps], 1).swapaxes(0, 1)
    maps = maps / maps.max((1, 2, 3), keepdims=True).clip(1e-12)  # normalise each layer to store 16 bits
    left, top, right, bottom = (100 * edge for edge in attention.region)
    concepts = [f"{name} {share:.0%}" for name, share in favourite_concepts(attention)]
    return {"name": name, "words": attention.words, "concepts": concepts, "layers": maps.shape[0] - 1, "rows": maps.shape[2],
            "columns": maps.shape[3], "image": encode64(jpeg.getvalue()),
            "region": f"left:{left}%;top:{top}%;width:{right - left}%;height:{bottom - top}%",
            "maps": encode64((65535 * maps).round().astype("<u2").tobytes())}


def encode64(data):
    return base64.b64encode(data).decode("ascii")


def page(entries, layer="mean", part=False):
    """A self-contained page that shows a word's map when hovering over it: HTML as bytes. `part`: without a heading, to embed it."""
    data = json.dumps(entries, ensure_ascii=False).replace("<", "\\u003c")  # so that no word can close the script element
    colours = ",".join(f"[{r},{g},{b}]" for r, g, b in (255 * COLOURS(range(256))[:, :3]).round().astype(int))
    parts = {"TITLE": html.escape(", ".join(entry["name"] for entry in entries[:3])), "DATA": data,
             "COLOURS": f"[{colours}]", "KIND": "part" if part else "whole", "LAYER": str(0 if layer == "mean" else layer)}
    return re.sub("|".join(parts), lambda part: parts[part[0]], PAGE).encode("utf-8", "replace")
