"""Train captioners that differ in one respect under equal conditions, and write report/results/<study>.json.

    python3 report/compare.py peft --data data [--kinds none lora8 --seeds 0 1 2]
    python3 report/compare.py encoders --data data

Trains each kind with `p2_train.py` on the first images of data/train.json, with the same number of steps and otherwise the same
options, and scores the last epoch by beam search on data/val.json; each is compared with the first. Finished runs are not
repeated, so an interrupted study resumes, and more kinds or seeds can be added later.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from captioner import Captioner, caption_features, read_metadata
from cli import ArgumentParser, UserError, run
from dataset import read_captions, write_subset
from devices import pick_device
from features import FeatureCache
from files import read_json, write_json
from generation import GenerationConfig
from metrics import bleu, cider, tokenize
from significance import paired_bootstrap

HYBRID = {"encoder": "tf_efficientnet_lite2", "encoder_levels": 1}
STUDIES = {  # {study: {kind: options of p2_train.py}}
    "peft": {kind: HYBRID | {"image_size": 224} | options for kind, options in {
        "none": {"lora_rank": 0},
        "lora4": {"lora_rank": 4, "lora_alpha": 8},
        "lora8": {"lora_rank": 8, "lora_alpha": 16},
        "adapter64": {"lora_rank": 0, "adapter_dim": 64},
        "prefix100": {"lora_rank": 0, "prefix_length": 100},
        "ia3": {"lora_rank": 0, "ia3": True},
        "image_prefix_lora8": {"lora_rank": 8, "lora_alpha": 16, "fusion": "prefix"},
    }.items()},
    "encoders": {
        "hybrid": HYBRID,
        "hybrid_3_levels": HYBRID | {"encoder_levels": 3},
        "joined": {"encoder": "tf_efficientnet_lite2+tf_efficientnet_lite1", "encoder_levels": 3},
        "vit_small": {"encoder": "vit_small"},
        "vit_small_focus": {"encoder": "vit_small_focus"},
    },
}


def main():
    parser = ArgumentParser(description="Train captioners that differ in one respect under equal conditions.")
    parser.add_argument("study", choices=[*STUDIES], help="in which they differ")
    parser.add_argument("--data", type=Path, default=Path("data"), help="train.json, val.json and images/")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and captions; default: output/<study>")
    parser.add_argument("--decoder", default=str(ROOT / "weights" / "decoder_small.safetensors"), help="GPT-2 weights")
    parser.add_argument("--images", type=int, default=2000, help="number of training images, the first of train.json")
    parser.add_argument("--epochs", type=int, default=4, help="of each run")
    parser.add_argument("--views", type=int, default=2, help="of each image")
    parser.add_argument("--kinds", nargs="*", help="kinds to train in this call; default: all of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds to train in this call")
    parser.add_argument("--results", type=Path, help="output file; default: report/results/<study>.json")
    arguments = parser.parse_args()
    kinds = STUDIES[arguments.study]
    if unknown := set(arguments.kinds or ()) - set(kinds):
        parser.error(f"--kinds has no {min(unknown)}: choose from {', '.join(kinds)}")
    arguments.work = arguments.work or Path("output") / arguments.study
    arguments.results = arguments.results or ROOT / "report" / "results" / f"{arguments.study}.json"
    conditions = {name: getattr(arguments, name) for name in ("images", "epochs", "views")}
    known = arguments.work / "conditions.json"
    if known.exists() and read_json(known, "file") != conditions:
        raise UserError(f"{arguments.work} holds runs under other conditions: delete it, or name another --work")
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_json(known, conditions)
    subset = arguments.work / "data"
    write_subset(arguments.data, subset, arguments.images)
    features = {}
    for kind in kinds if arguments.kinds is None else arguments.kinds:
        for seed in arguments.seeds:
            checkpoint = arguments.work / f"{kind}-{seed}.safetensors"
            captions = checkpoint.with_suffix(".json")
            if captions.exists():
                continue
            train(arguments, subset, kinds[kind], seed, checkpoint)
            model = Captioner.load(checkpoint, arguments.decoder).to(pick_device())
            encoder = model.encoder.name, model.encoder.image_size, model.encoder.dim
            if encoder not in features:
                images = read_captions(arguments.data / "val.json", arguments.data / "images" / "val")
                features[encoder] = FeatureCache(model.encoder, [image.path for image in images], "cache", device=pick_device())
            write_json(captions, caption_features(model, features[encoder], np.arange(len(features[encoder])),
                                                  GenerationConfig(3)))
    write_results(arguments, conditions)


def train(arguments, subset, kind, seed, checkpoint):
    options = {"data": subset, "decoder": arguments.decoder, "output": checkpoint, "epochs": arguments.epochs,
               "views": arguments.views, "seed": seed, "scst_epochs": 0, "selection": 0} | kind
    command = [sys.executable, str(ROOT / "p2_train.py"), *(f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items())]
    if checkpoint.exists() and not checkpoint.with_suffix(".state.pt").exists():
        return  # trained, but not scored yet
    if subprocess.run(command).returncode or checkpoint.with_suffix(".state.pt").exists():
        raise UserError(f"training {checkpoint} did not end: run the same command again")


def write_results(arguments, conditions):
    """Score every finished run, and print a table."""
    images = read_captions(arguments.data / "val.json", None)
    references = tokenize({str(i): image.captions for i, image in enumerate(images)})
    study, runs, scores = STUDIES[arguments.study], [], {}
    for kind in study:
        for file in sorted(arguments.work.glob(f"{kind}-*.json"), key=lambda file: int(file.stem.split("-")[1])):
            captions = read_json(file, "captions file")
            seed = int(file.stem.split("-")[1])
            tokens = tokenize({str(i): [text] for i, text in enumerate(captions)})
            score, scores[kind, seed] = cider(references, tokens)
            metadata = read_metadata(file.with_suffix(".safetensors"))
            last = metadata["scores"]["selection"]
            runs.append({"kind": kind, "seed": seed, "trained_parameters": metadata["trained_parameters"], "CIDEr": score,
                         "BLEU-4": bleu(references, tokens)[3][0], "memory_MB": last["memory"] / 1e6, "loss": last["loss"],
                         "seconds_per_epoch": arguments.images / images_per_second(file.with_suffix(".jsonl")),
                         "different_captions": len(set(captions))})
    if not runs:
        raise UserError(f"there is no run in {arguments.work}")
    kinds = [kind for kind in study if (kind, 0) in scores]
    baseline, differences = [*study][0], {}
    for kind in kinds:
        if kind != baseline and (baseline, 0) in scores:
            found = paired_bootstrap(scores[kind, 0] - scores[baseline, 0])
            differences[kind] = {"value": found.value, "low": found.low, "high": found.high}
    spread = {}
    for kind in kinds:
        values = [entry["CIDEr"] for entry in runs if entry["kind"] == kind]
        if len(values) > 1:
            spread[kind] = {"seeds": len(values), "mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)),
                            "lowest": min(values), "highest": max(values)}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.results, {
        "conditions": conditions | {"validation_images": len(images), "beam_size": 3, "options": study},
        "runs": runs, f"CIDEr_against_{baseline}_95": differences, "CIDEr_over_seeds": spread})
    print(f"| kind | seed | trained | CIDEr | against {baseline}, 95% | BLEU-4 | s/epoch | memory, MB |\n|{'---|' * 8}")
    for entry in runs:
        kind = entry["kind"]
        against = "" if entry["seed"] or kind not in differences else (
            f"{differences[kind]['value']:+.3f} ({differences[kind]['low']:+.3f} to {differences[kind]['high']:+.3f})")
        print(f"| {kind} | {entry['seed']} | {entry['trained_parameters'] / 1e6:.2f}M | {entry['CIDEr']:.3f} | {against} | "
              f"{entry['BLEU-4']:.3f} | {entry['seconds_per_epoch']:.0f} | {entry['memory_MB']:.0f} |")
    for kind, found in spread.items():
        print(f"{kind}, {found['seeds']} seeds: CIDEr {found['mean']:.3f}, deviation {found['deviation']:.3f}")


def images_per_second(log):
    """The median over the log's lines, which is robust to pauses."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return float(np.median([line["images per second"] for line in lines if "images per second" in line]))


if __name__ == "__main__":
    run(main)
