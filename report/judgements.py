"""Agreement of metrics with people: Kendall's tau between scores and human judgements of Flickr8k's captions.

    python3 report/judgements.py <folder of the Flickr8k texts> [<folder of its images>] [--sets expert crowdflower]

As in Hessel et al. 2021 (https://arxiv.org/abs/2104.08718), section 4. Flickr8k-Expert (ExpertAnnotations.txt): three people graded each
pair of an image and a caption from 1 to 4; every grade is a separate sample, tau-c. CrowdFlower (CrowdFlowerAnnotations.txt): the
fraction of people who said that the caption fits, tau-b. References are the image's own five captions (Flickr8k.token.txt); pairs whose
caption is one of them are left out. With the images, also the image-text score by our own CLIP, or CLIPScore by OpenAI's. Both variants of
tau are printed and written to report/results/judgements.json.
"""

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli import ArgumentParser, UserError, run
from dataset import CaptionedImage
from files import check_writable, write_json
from metrics import clip_scorer, evaluate

FILES = {"expert": "ExpertAnnotations.txt", "crowdflower": "CrowdFlowerAnnotations.txt"}
VARIANT = {"expert": "c", "crowdflower": "b"}  # the paper's choice


def read_lines(path, columns):
    """Rows of a tab-separated file with `columns` columns. Raises UserError."""
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    if not rows or any(len(row) != columns for row in rows):
        raise UserError(f"{path} is not Flickr8k's: {columns} columns between tabs are needed")
    return rows


def read_captions(path):
    """Flickr8k.token.txt -> {image: {number of the caption: caption}}"""
    captions = defaultdict(dict)
    for name, caption in read_lines(path, 2):
        image, _, number = name.partition("#")
        captions[image][number] = caption.strip()
    return dict(captions)


def read_judgements(folder, kind, captions):
    """Pairs with people's grades: [(image, caption, grades), …], without the image's own captions. Raises UserError."""
    pairs = []
    for image, name, *grades in read_lines(folder / FILES[kind], {"expert": 5, "crowdflower": 5}[kind]):
        source, _, number = name.partition("#")
        if image not in captions or number not in captions.get(source, {}):
            raise UserError(f"{FILES[kind]} names {image} and {name}, which Flickr8k.token.txt has not")
        caption = captions[source][number]
        if caption in captions[image].values():
            continue
        try:
            numbers = [float(grade) for grade in grades]
        except ValueError:
            raise UserError(f"{FILES[kind]} grades {image} with {grades}, which are no numbers") from None
        pairs.append((image, caption, numbers if kind == "expert" else numbers[:1]))  # CrowdFlower's first column is the fraction of "yes"
    if not pairs:
        raise UserError(f"{FILES[kind]} holds no pair to judge")
    return pairs


def taus(scores, pairs):
    """Kendall's tau-b and tau-c between the pairs' scores and every single grade."""
    try:
        from scipy.stats import kendalltau
    except ImportError:
        raise UserError("Kendall's tau needs a package: pip install scipy") from None
    repeated = [score for score, (_, _, grades) in zip(scores, pairs) for _ in grades]
    judged = [grade for _, _, grades in pairs for grade in grades]
    return {f"tau-{variant}": float(kendalltau(repeated, judged, variant=variant).statistic) for variant in "bc"}


def judge(pairs, captions, images=None, clip=None):
    """{metric: its taus}. `clip`: a ClipScorer, for the pictures in the folder `images`."""
    keys = [str(i) for i in range(len(pairs))]
    references = {key: CaptionedImage(Path(image), [*captions[image].values()]) for key, (image, _, _) in zip(keys, pairs)}
    (_, scores, _), = evaluate([{key: caption for key, (_, caption, _) in zip(keys, pairs)}], references)
    if clip:
        names = sorted({image for image, _, _ in pairs})
        seen = clip.encode_images([images / name for name in names])[[names.index(image) for image, _, _ in pairs]]
        scores[clip.names[0]] = clip.score(seen, [caption for _, caption, _ in pairs]).tolist()
    return {name: taus(values, pairs) for name, values in scores.items()}


def main():
    parser = ArgumentParser(description="Compare metrics with human judgements of Flickr8k's captions.")
    parser.add_argument("folder", type=Path, help="folder with Flickr8k.token.txt and the files of judgements")
    parser.add_argument("images", type=Path, nargs="?", help="folder of Flickr8k's images, for the image-text score")
    parser.add_argument("--sets", nargs="+", choices=[*FILES], default=[*FILES], help="sets of judgements")
    parser.add_argument("--clip_weights", help="as for p2_evaluate.py")
    parser.add_argument("--results", type=Path, default=ROOT / "report" / "results" / "judgements.json", help="output file")
    arguments = parser.parse_args()
    check_writable(arguments.results)
    captions = read_captions(arguments.folder / "Flickr8k.token.txt")
    judgements = {kind: read_judgements(arguments.folder, kind, captions) for kind in arguments.sets}
    clip, _ = clip_scorer(arguments.images, arguments.clip_weights, "") if arguments.images else (None, None)
    found = {"command": "python3 report/judgements.py <texts> <images>"}
    for kind, pairs in judgements.items():
        found[kind] = {"pairs": len(pairs), "judgements": sum(len(grades) for _, _, grades in pairs),
                       "metrics": judge(pairs, captions, arguments.images, clip)}
        print(f"{kind}: {len(pairs):,} pairs; the paper's variant is tau-{VARIANT[kind]}\n| metric | tau-b | tau-c |\n|---|---|---|")
        for name, values in found[kind]["metrics"].items():
            print(f"| {name} | {values['tau-b']:.3f} | {values['tau-c']:.3f} |")
    write_json(arguments.results, found)


if __name__ == "__main__":
    run(main)
