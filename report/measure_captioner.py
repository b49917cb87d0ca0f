"""Score the captions of both validation sets, compared with another captioner's: report/results/captioner.json.

    bash hw3_2.sh coco/images/val output/coco.json          # and flickr8k
    python3 report/measure_captioner.py --data coco flickr8k --captions output/coco.json output/flickr8k.json
        --before before/coco.json before/flickr8k.json

The metrics are p2_evaluate.py's; differences have 95% intervals from the paired bootstrap over the images.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chair import Chair
from cli import ArgumentParser, UserError, run
from dataset import load_references
from files import check_writable, read_json, write_json
from metrics import clip_scorer, evaluate
from significance import compare, paired_bootstrap


def main():
    parser = ArgumentParser(description="Score captions of validation sets, compared with another captioner's.")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders with val.json and images/val")
    parser.add_argument("--captions", nargs="+", required=True, help="predictions of each folder's images")
    parser.add_argument("--before", nargs="+", required=True, help="predictions to compare with")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "results" / "captioner.json", help="output file")
    arguments = parser.parse_args()
    if not len(arguments.data) == len(arguments.captions) == len(arguments.before):
        raise UserError("--data, --captions and --before must name as many")
    check_writable(arguments.results)
    found = {"command": "python3 report/measure_captioner.py --data coco flickr8k --captions <of hw3_2.sh> --before <of the model before>"}
    for folder, captions, before in zip(arguments.data, arguments.captions, arguments.before):
        images = folder / "images" / "val"
        references = load_references(folder / "val.json", images)
        systems = [read_json(file, "predictions file") for file in (captions, before)]
        for file, system in zip((captions, before), systems):
            if missing := [key for key in references if key not in system]:
                raise UserError(f"{file} has no caption for {missing[0]}")
        (corpus, each, statistics), (old, old_each, old_statistics) = evaluate(systems, references, clip_scorer(images, None, "")[0])
        chair, old_chair = (Chair([system[key] for key in references], [image.captions for image in references.values()]) for system in systems)
        differences = compare(each, old_each, statistics, old_statistics) | {"CHAIRs": paired_bootstrap(chair.images - old_chair.images)}
        found[folder.name] = {"images": len(references)} | corpus | chair.scores() | {
            "before": old | old_chair.scores(), "difference": {name: vars(difference) for name, difference in differences.items()}}
    write_json(arguments.results, found)


if __name__ == "__main__":
    run(main)
