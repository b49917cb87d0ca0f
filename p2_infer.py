"""Caption a folder of images.

    python3 p2_infer.py images/ captions.json [decoder_weights [checkpoint]]
    accelerate launch --num_processes 8 p2_infer.py …       each process captions a part of the folder

Default: the embedded model in weights/. With decoder weights but no checkpoint: the newest checkpoint in checkpoints/
that was trained with them. Exit status 0: success; 2: nothing was done, one line says why; 3: done, except for some
unreadable images, which are named.
"""

import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from captioner import Captioner, caption_folder, read_metadata, recorded_generation
from checkpoints import find_weights
from cli import ArgumentParser, UserError, add_options, run, take_options
from dataset import read_captions
from devices import Processes
from files import check_output, read_json, write_json
from generation import GenerationConfig
from images import list_images
from runtime import RUNTIME_HELP, pick_runtime


class Recorded:
    """An option's default while the checkpoint is not read yet, as --help prints it."""

    def __str__(self):
        return "the checkpoint's"


def read_datastore(path):
    """The captions in a file in COCO format, or of the form {name: caption}. Raises UserError."""
    data = read_json(path, "datastore")
    if isinstance(data, dict) and "annotations" in data:
        captions = [caption for image in read_captions(path, None) for caption in image.captions]
    else:
        captions = [*data.values()] if isinstance(data, dict) else []
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f'{path} is neither a captions file in COCO\'s form nor {{"file name": "caption"}}')
    return captions


def main():
    parser = ArgumentParser(description="Caption a folder of images.")
    parser.add_argument("images", help="folder of images, without its subfolders")
    parser.add_argument("output", help="JSON file: file name without extension -> caption")
    parser.add_argument("decoder_weights", nargs="?", help="GPT-2 weights, .bin or .safetensors")
    parser.add_argument("checkpoint", nargs="?", help="checkpoint of p2_train.py")
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch")
    parser.add_argument("--datastore", help="file of captions, in COCO format or predictions: what the captions closest to a picture, "
                        "by our CLIP, mention is recognised too")
    parser.add_argument("--cache", default="cache", help="folder for the datastore's embeddings")
    parser.add_argument("--all_tokens", action="store_true", help="allow all tokens, not only those in the training captions")
    parser.add_argument("--runtime", default="auto", help=RUNTIME_HELP)
    add_options(parser, GenerationConfig)
    parser.set_defaults(**dict.fromkeys(("beam_size", "length_penalty", "clip_weight"), Recorded()))
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    # Cheap checks first, so that errors show before a model is loaded.
    images = list_images(arguments.images)
    check_output(arguments.output, "JSON", [*images.values(), arguments.decoder_weights, arguments.checkpoint, arguments.datastore])
    datastore = read_datastore(arguments.datastore) if arguments.datastore else None
    decoder_weights, checkpoint = find_weights(arguments.decoder_weights, arguments.checkpoint)
    recommended = asdict(recorded_generation(read_metadata(checkpoint)))
    if arguments.sample:
        recommended["clip_weight"] = 0.0  # it applies to beam search only
    parser.set_defaults(**recommended)
    generation = take_options(parser.parse_args(), GenerationConfig)
    processes = Processes()
    model = Captioner.load(checkpoint, decoder_weights, all_tokens=arguments.all_tokens, runtime=pick_runtime(arguments.runtime, processes.device))
    if generation.clip_weight:
        _ = model.judge  # loads our CLIP, so that missing files show before the work
    if arguments.decoder_weights and not arguments.checkpoint:
        print(f"with the checkpoint {checkpoint}", file=sys.stderr)
    model.to(processes.device)
    if datastore:
        model.retrieve(datastore, arguments.cache)
    captions, unread = caption_folder(model, images, generation, arguments.batch_size, processes.device, processes)
    if processes.main:
        try:
            write_json(arguments.output, captions)
        except (OSError, UserError):  # such as a full disk: do not lose the work
            with suppress(OSError, UserError):
                rescued = Path(tempfile.mkdtemp()) / Path(arguments.output).name
                write_json(rescued, captions)
                print(f"{arguments.output} could not be written: the captions are in {rescued}", file=sys.stderr)
            raise
    processes.wait()  # a launcher stops all processes as soon as one exits with a status other than 0
    if not processes.main:
        return
    print(f"{len(captions)} captions in {Path(arguments.output)}"
          + (f"; {len(unread)} of {len(images)} images could not be read" if unread else ""), file=sys.stderr)
    return 3 if unread else 0


if __name__ == "__main__":
    run(main)
