"""Caption a folder of images with LLaVA, zero-shot, through `transformers`.

    python3 p1_llava_infer.py images/ captions.json [model] [--instruction "describe the image in one sentence"]
    python3 p1_llava_infer.py images/ table.json [model] --settings configs/p1/prompts.yaml --annotation_file val.json

`model` is a folder or a name on the model hub. The default is LLaVA-1.5-7B if it fits on the GPU and its weights are in
weights/, else the small LLaVA in weights/. The same command resumes an interrupted run: until it is done, its answers are
in <captions.json>.part. Exit status: 0 success; 2 nothing was done, for the reason printed; 3 done, except for unreadable
images, which are listed.

With --settings, captions are generated with every setting in the file, and written beside the table (table.<name>.json),
which has each setting's CIDEr and CLIPScore, or our own CLIP's ImageTextScore.
"""

import hashlib
import os
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

from answers import answer_all, digest_of_model
from cli import ArgumentParser, UserError, add_options, printable, run, take_options
from dataset import load_references
from devices import pick_device
from files import check_output, first_line, write_json
from images import list_images
from llava import Llava, LlavaSettings, default_model
from runtime import RUNTIME_HELP

MANY = 24  # minimum number of images for which compiling the language model saves time

# ---- folders ---------------------------------------------------------------------------------------------------


def caption_images(model, images, settings, output, what, batch_size=8):
    """Caption {stem: path}, reusing answers of an earlier run with the same `what` and batches.

    Returns ({stem: caption}, {path: reason} for unreadable images).
    """
    asked = {stem: (path, settings.instruction) for stem, path in images.items()}
    captions, unread = answer_all(model, asked, settings, output, what, batch_size, "captioning")
    unread = {images[stem]: reason for stem, reason in unread.items()}
    for path, reason in unread.items():
        print(f"skipped {printable(str(path))}: {printable(reason)}", file=sys.stderr)
    return captions, unread


def caption_to_file(model, images, settings, output, what, batch_size):
    """`caption_images`, and write the predictions to `output`; returns the same. The answers also remain in `output`.part."""
    captions, unread = caption_images(model, images, settings, output, what, batch_size)
    write_json(output, captions)
    print(f"{len(captions)} captions in {output}"
          + (f"; {len(unread)} of {len(images)} images could not be read" if unread else ""), file=sys.stderr)
    return captions, unread


# ---- comparing settings ----------------------------------------------------------------------------------------


KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def read_settings(path, defaults):
    """A YAML file {name: {option: value}} -> {name: LlavaSettings}; other options are those of `defaults`."""
    import yaml

    try:
        named = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the settings {path} are not YAML: {first_line(error)}") from None
    known = {field.name for field in fields(LlavaSettings)}
    if not isinstance(named, dict) or not named or not all(isinstance(options, dict) for options in named.values()):
        raise UserError(f"the settings {path} are not a list of `name:` with options under each")
    found = {}
    for name, options in named.items():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise UserError(f"the settings {path} name one {name!r}: letters, digits, _ and - make a file's name")
        if unknown := set(options) - known:
            raise UserError(f"the settings {path} have no option {min(map(str, unknown))}: choose from {', '.join(sorted(known))}")
        for option, value in options.items():
            kind = type(getattr(defaults, option))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"the settings {name} of {path}: {option} is {value!r}, but must be {KINDS[kind]}")
        found[str(name)] = LlavaSettings(**asdict(defaults) | options)
    return found


def compare_settings(every, output, images, references, clip, caption):
    """Caption with each of the settings, score the captions, print and write a table.

    Args:
        every: {name: LlavaSettings}. references: {stem: CaptionedImage}. clip: a ClipScorer or None.
        caption: function of settings and an output file, which returns ({stem: caption}, unread).
    """
    systems, files, unread = [], [], {}
    for name, settings in every.items():
        files.append(output.with_name(f"{output.stem}.{name}.json"))
        captions, bad = caption(settings, files[-1])
        systems.append(captions)
        unread |= bad
    scored = {stem: references[stem] for stem in images if all(captions.get(stem, "").strip() for captions in systems)}
    if len(scored) < len(images):
        print(f"scored on {len(scored)} of {len(images)} images: the others could not be read, or got an empty answer")
    if not scored:
        raise UserError("no image got an answer under every setting: there is nothing to score")
    from metrics import evaluate  # needs Java and CLIP, unlike captioning

    found = evaluate(systems, scored, clip)
    names = ["CIDEr"] + (clip.names[:1] if clip else [])
    table = {name: asdict(settings) | {"images": len(scored), "captions": file.name} | {of: corpus[of] for of in names}
             for (name, settings), file, (corpus, _, _) in zip(every.items(), files, found)}
    write_json(output, table)
    print(f"| setting | instruction | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}")
    for name, entry in table.items():
        print(f"| {name} | {entry['instruction']} | {' | '.join(f'{entry[of]:.3f}' for of in names)} |")
    return unread


# ---- command line ----------------------------------------------------------------------------------------------


def main():
    parser = ArgumentParser(description="Caption a folder of images with LLaVA.")
    parser.add_argument("images", help="folder of images, without its subfolders")
    parser.add_argument("output", type=Path, help="JSON file: file name without extension -> caption")
    parser.add_argument("model", nargs="?", help="folder, or name on the model hub")
    parser.add_argument("--batch_size", type=int, help="images per batch (default: 32 on a CPU, 8 on a GPU)")
    parser.add_argument("--load_in_4bit", action="store_true", help="4-bit weights, a quarter of the memory; on CUDA with bitsandbytes")
    parser.add_argument("--runtime", default="auto", help=RUNTIME_HELP)
    parser.add_argument("--limit", type=int, help="only the first so many images of the folder")
    parser.add_argument("--settings", help="YAML file of several settings to compare")
    parser.add_argument("--annotation_file", help="with --settings: reference captions in COCO's form")
    parser.add_argument("--clip_weights", help="with --settings: CLIP for CLIPScore (default: weights/ViT-B-32.pt, else clip_small)")
    add_options(parser, LlavaSettings)
    arguments = parser.parse_args()
    settings = take_options(arguments, LlavaSettings)
    if arguments.batch_size is None:
        arguments.batch_size = 32 if pick_device() == "cpu" else 8
    if arguments.batch_size < 1 or arguments.limit is not None and arguments.limit < 1:
        raise UserError("--batch_size and --limit must be at least 1")
    if bool(arguments.settings) != bool(arguments.annotation_file):
        raise UserError("--settings and --annotation_file go together")
    # Check the arguments before loading a model.
    images = list_images(arguments.images)
    images = dict(list(images.items())[:arguments.limit])
    check_output(arguments.output, "JSON", [*images.values(), arguments.settings, arguments.annotation_file])
    if arguments.settings:
        every = read_settings(arguments.settings, settings)
        references = load_references(arguments.annotation_file, arguments.images)
        if strange := [stem for stem in images if stem not in references]:
            raise UserError(f"{arguments.annotation_file} has no captions of {strange[0]}")
        from metrics import clip_scorer

        clip, lacking = clip_scorer(arguments.images, arguments.clip_weights, "")
        if lacking:
            print(lacking)
    name = arguments.model or default_model(arguments.load_in_4bit)
    print(f"with {name}", file=sys.stderr)
    model = Llava(name, arguments.load_in_4bit, runtime=arguments.runtime, many=len(images) >= MANY or bool(arguments.settings))
    folder, written = Path(arguments.images).resolve(), []
    same_images = hashlib.sha256(b"\0".join(os.fsencode(folder / path.name) for path in images.values())).hexdigest()
    same_weights = digest_of_model(name)

    def caption(settings, output):
        what = {"model": str(name), "4bit": arguments.load_in_4bit, "batch_size": arguments.batch_size,
                "images": same_images, "weights": same_weights} | asdict(settings)
        written.append(output)
        return caption_to_file(model, images, settings, output, what, arguments.batch_size)

    if arguments.settings:
        unread = compare_settings(every, arguments.output, images, references, clip, caption)
    else:
        _, unread = caption(settings, arguments.output)
    for output in written:  # needed to resume until all are written
        Path(f"{output}.part").unlink()
    return 3 if unread else 0


if __name__ == "__main__":
    run(main)
