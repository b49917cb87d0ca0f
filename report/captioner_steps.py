"""Ablation: the gain of each step of the captioner, with the same small budget: report/results/captioner_steps.json.

    python3 report/captioner_steps.py --flickr8k flickr8k --coco coco coco_lowres --text caption_text/*.txt --start old.safetensors

Every run starts from the same captioner, trained on Flickr8k alone, and makes the same number of updates with the same batch size: on
Flickr8k; on Flickr8k and COCO; also with concept words; also with captions without pictures. Each is scored on both whole validation
sets: CIDEr, CHAIR, and the recall of things that few training pictures show. Finished runs are not repeated, so an interrupted study
resumes.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from captioner import Captioner, read_metadata
from chair import Chair
from cli import ArgumentParser, UserError, run
from concepts import ClassWords, Concepts
from dataset import Folder, read_captions
from devices import pick_device
from features import FeatureCache
from files import read_json, write_json
from generation import GenerationConfig
from metrics import cider, tokenize
from significance import paired_bootstrap

RARE = 20  # a rare thing is named for fewer training pictures than this
AGREED = 2  # minimum number of references that name a thing which counts as present
BATCH = 8  # images per update
OTHERS, NONE = "another picture's concepts", "no concepts"


class RareThings:
    """The recall of things that the captions of fewer than RARE training pictures name.

    A thing is a noun of WordNet for an ImageNet class or one of its hypernyms; plurals count as singulars.
    """

    def __init__(self, training, validation):
        """Both are lists with each image's captions."""
        self.words = ClassWords.of_imagenet()
        shown = Counter(thing for captions in training for thing in set().union(*map(self.things, captions)))
        self.there = []
        for captions in validation:
            named = Counter(thing for caption in captions for thing in self.things(caption))
            self.there.append({thing for thing, count in named.items() if count >= AGREED and shown[thing] < RARE})

    def things(self, caption):
        return {*self.words.find(caption)}

    def recall(self, captions):
        """One caption per image -> the number of its rare things that the caption names, and the number of all: (n, 2)"""
        return np.array([(len(there & self.things(caption)), len(there)) for there, caption in zip(self.there, captions)])


def steps(arguments):
    """{name: options of p2_train.py}, with the same number of images per epoch."""
    both = [arguments.flickr8k, *arguments.coco]
    share = [f"{arguments.updates * BATCH / len(both) / Folder(folder).train:.6f}" for folder in both]
    alone = f"{arguments.updates * BATCH / Folder(arguments.flickr8k).train:.6f}"
    data = ["--data", *both, "--data_weights", *share]
    concepts = [*data, "--concepts", "8"]
    return {"flickr8k": ["--data", arguments.flickr8k, "--data_weights", alone], "coco": data, "concepts": concepts,
            "text": [*concepts, "--text", *arguments.text]}


def main():
    parser = ArgumentParser(description="Ablation: the gain of each step of the captioner, with the same small budget.")
    parser.add_argument("--flickr8k", required=True, help="folder in the course's layout")
    parser.add_argument("--coco", nargs="+", required=True, help="folders in the course's layout; the first has a val.json")
    parser.add_argument("--text", nargs="+", required=True, help="captions without pictures, one per line")
    parser.add_argument("--start", required=True, help="initial checkpoint of every run")
    parser.add_argument("--decoder", default=str(ROOT / "weights" / "decoder_small.safetensors"), help="its GPT-2 weights")
    parser.add_argument("--updates", type=int, default=400, help="of every run")
    parser.add_argument("--work", type=Path, default=Path("output/captioner_steps"), help="folder for checkpoints and captions")
    parser.add_argument("--cache", default="cache", help="folder of the encoder's features")
    parser.add_argument("--others", nargs="*", default=[], help="more checkpoints to score")
    parser.add_argument("--others_decoder", help="their GPT-2 weights, if other than --decoder")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "results" / "captioner_steps.json")
    arguments = parser.parse_args()
    runs = steps(arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, options in runs.items():
        train(arguments, name, options)
    checkpoints = {"start": arguments.start} | {name: arguments.work / f"{name}.safetensors" for name in runs}
    checkpoints |= {Path(path).stem: path for path in arguments.others}
    arguments.decoders = {path: arguments.others_decoder for path in arguments.others if arguments.others_decoder}
    # Score each checkpoint with its pictures' own concepts, and if it uses concepts, also with other pictures' and with none.
    scored = [(name, path, "") for name, path in checkpoints.items()]
    scored += [(name, path, whose) for name, path in checkpoints.items() for whose in (OTHERS, NONE)
               if read_metadata(path)["model"].get("concepts")]
    training = [image.captions for folder in (arguments.flickr8k, *arguments.coco)
                for image in read_captions(Path(folder) / "train.json", None)]
    results = {"updates": arguments.updates, "images_of_an_update": BATCH, "rare": f"fewer than {RARE} training pictures",
               "runs": {name: " ".join(Path(option).name if "/" in option else option for option in options)
                        for name, options in runs.items()}, "scores": {}}
    for folder in arguments.flickr8k, arguments.coco[0]:
        results["scores"][Path(folder).name] = score(arguments, Path(folder), scored, training)
    write_json(arguments.results, results)


def train(arguments, name, options):
    checkpoint = arguments.work / f"{name}.safetensors"
    unfinished = checkpoint.with_suffix(".state.pt")
    if checkpoint.exists() and not unfinished.exists():
        return
    command = [sys.executable, str(ROOT / "p2_train.py"), "--init", arguments.start, "--decoder", arguments.decoder, "--cache",
               arguments.cache, "--views", "1", "--epochs", "1", "--scst_epochs", "0", "--selection", "0", "--batch_size",
               str(BATCH), "--learning_rate", "8e-4", "--average", "0.99", "--output", str(checkpoint), *options]
    if subprocess.run(command).returncode or unfinished.exists():
        raise UserError(f"training {checkpoint} did not end: run the same command again")


def score(arguments, folder, scored, training):
    """Scores on a folder's val.json, and their differences from the first. `scored`: [(name, checkpoint, whose concepts), …]"""
    images = read_captions(folder / "val.json", folder / "images" / "val")
    references = tokenize({str(i): image.captions for i, image in enumerate(images)})
    rare, found, first = RareThings(training, [image.captions for image in images]), {}, None
    for name, checkpoint, whose in scored:
        file = arguments.work / f"{name}{whose}-{folder.name}.json"
        if not file.exists():
            model = Captioner.load(checkpoint, arguments.decoders.get(checkpoint, arguments.decoder)).to(pick_device())
            features = FeatureCache(model.encoder, [image.path for image in images], arguments.cache, device=pick_device())
            write_json(file, caption(model, features, whose))
        captions = read_json(file, "captions file")
        corpus, each = cider(references, tokenize({str(i): [caption] for i, caption in enumerate(captions)}))
        chair, recall = Chair(captions, [image.captions for image in images]), rare.recall(captions)
        hits = recall.sum(0)
        entry = {"CIDEr": corpus, **chair.scores(), "rare recall": float(hits[0] / max(1, hits[1])), "rare things": int(hits[1])}
        now = {"CIDEr": each, "CHAIRs": chair.images, "rare recall": recall[:, 0] / max(1, recall[:, 1].mean())}
        first = first or now
        entry["against start"] = {metric: vars(paired_bootstrap(values - first[metric])) for metric, values in now.items()}
        found[name + (whose and f", {whose}")] = entry
        print(f"{folder.name:10} {name:10} {whose:26} " + ", ".join(f"{key} {value:.3f}" for key, value in entry.items() if key != "against start")
              + "; CIDEr {value:+.3f} ({low:+.3f} to {high:+.3f})".format(**entry["against start"]["CIDEr"]), flush=True)
    return found


@torch.inference_mode()
def caption(model, features, whose, batch_size=100):
    """Captions of these images by beam search. `whose`: "" for each image's own concepts, or OTHERS, or NONE."""
    device, everyone = model.token_ids.device, np.arange(len(features))
    batches = np.array_split(everyone, -(-len(everyone) // batch_size))

    def features_of(batch):
        return features[batch, np.zeros_like(batch)].to(device).float()

    if whose:
        concepts = [model.concepts(features_of(batch)) for batch in batches]
        numbers, probabilities = (torch.cat(part) for part in list(zip(*concepts))[:2])
        concepts = Concepts(numbers.roll(len(everyone) // 2, 0), probabilities.roll(len(everyone) // 2, 0))
        if whose == NONE:
            concepts = Concepts(numbers, torch.zeros_like(probabilities))
    captions = []
    for batch in batches:
        some = features_of(batch)
        instead = concepts.each(lambda part: part[batch])._replace(meaning=model.concepts(some).meaning) if whose else None
        captions += model.generate(some, GenerationConfig(3), concepts=instead)
    return captions


if __name__ == "__main__":
    run(main)
