"""Plot each caption word's attention over the image patches, and write the maps as numbers and as a web page.

    python3 p3_attention.py <image or folder> <out_dir>                           the embedded model's captions (p2)
    python3 p3_attention.py <image or folder> <out_dir> --model p1                LLaVA's (p1)

For each picture it writes
    <name>.words.png, .pdf     the picture, then one panel per word with its map over the picture
    <name>.layers.png, .pdf    the content words in several layers, to choose a layer
    <name>.npz                 the raw maps of every word, layer and head
and index.html, which shows a word's map when hovering over it. Layers and heads are counted from 1.

The weights are those of the decoder's own forward pass. A word's map is that of the position that *predicts* it, the
previous one; the maps of its tokens are averaged. <start> is not predicted: its panel is the picture itself.
"""

import sys
from dataclasses import replace
from pathlib import Path

from attention import CORRECTIONS, llava_attention, p2_attention
from attention_figures import SCALES, plot_layers, plot_words, render, write_maps
from attention_page import page, page_entry
from captioner import Captioner
from checkpoints import find_weights
from cli import ArgumentParser, UserError, printable, run
from devices import pick_device
from files import check_writable, write_whole
from images import ImageError, list_images, load_image
from llava import SIDE, Llava, LlavaSettings, default_model
from runtime import RUNTIME_HELP, pick_runtime


def layer_or_head(text):
    return text if text == "mean" else int(text)


def main():
    parser = ArgumentParser(description="Plot each caption word's attention over the image.")
    parser.add_argument("images", type=Path, help="an image, or a folder of images, without its subfolders")
    parser.add_argument("out_dir", type=Path, help="folder for the figures, the maps and index.html; created if it does not exist")
    parser.add_argument("--model", default="p2",
                        help="p2; p1, the default LLaVA of p1_llava_infer.py; or a LLaVA's folder or name on the model hub")
    parser.add_argument("--decoder_weights", help="p2: GPT-2 weights (default: the embedded model's)")
    parser.add_argument("--checkpoint", help="p2: checkpoint of p2_train.py (default: the newest trained with the decoder)")
    parser.add_argument("--instruction", default=LlavaSettings.instruction, help="LLaVA: prompt given with the picture")
    parser.add_argument("--beam_size", type=int, help="1: greedy; default: as in captioning, "
                        f"for p2 the checkpoint's, for LLaVA {LlavaSettings.num_beams}")
    parser.add_argument("--layer", type=layer_or_head, default="mean", help="number of the layer to plot, or mean")
    parser.add_argument("--head", type=layer_or_head, default="mean", help="number of the head, or mean")
    parser.add_argument("--rollout", action="store_true",
                        help="p2: trace the maps back through the projection's transformer layers")
    parser.add_argument("--correction", choices=CORRECTIONS, default="none",
                        help="for patches that every word attends to: divide by, or subtract, the mean over words")
    parser.add_argument("--runtime", default="auto", help=f"{RUNTIME_HELP}; for p2")
    parser.add_argument("--scale", choices=SCALES, default="panel", help="colour scale: each panel's own, or one for all")
    arguments = parser.parse_args()
    settings = LlavaSettings(arguments.instruction)
    if arguments.beam_size is not None:
        if arguments.beam_size < 1:
            raise UserError("--beam_size must be at least 1")
        settings = replace(settings, num_beams=arguments.beam_size)
    llava = arguments.model != "p2"
    if llava and (arguments.rollout or arguments.decoder_weights or arguments.checkpoint):
        raise UserError("--rollout, --decoder_weights and --checkpoint are for p2's model, not for LLaVA")
    if arguments.checkpoint and not arguments.decoder_weights:
        raise UserError("--checkpoint needs the --decoder_weights that it was trained with")
    # Check the arguments before loading a model.
    paths = [arguments.images] if arguments.images.is_file() else list_images(arguments.images).values()
    if any(Path(path).resolve().parent == arguments.out_dir.resolve() for path in paths):
        raise UserError(f"{arguments.out_dir} holds the pictures: name another folder for the figures")
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
        model = Captioner.load(checkpoint, decoder_weights, runtime=pick_runtime(arguments.runtime, pick_device())).to(pick_device())
        side = model.encoder.image_size
        generation = model.generation if arguments.beam_size is None else replace(model.generation, beam_size=arguments.beam_size)

    entries, unread = [], 0
    for path in paths:
        try:
            picture = load_image(path, side)  # same size as in p2_infer.py, so that the caption is the same
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
