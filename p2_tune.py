"""Tune a checkpoint's beam search: beam size, length penalty, and the weight of our CLIP's score in choosing among beams.

    python3 p2_tune.py checkpoints/captioner.safetensors --annotation_file val.json --images_root images/val [--write]

Runs beam search once per beam size, and scores every combination of the other two on its hypotheses, by CIDEr. `--write` records
the best in the checkpoint, as p2_infer.py's default. Use pictures that are not in the final evaluation, and that neither the
captioner nor our CLIP was trained on; for training pictures of our CLIP, use --folds.
"""

import itertools
from dataclasses import asdict, replace

import numpy as np
import torch
from safetensors import safe_open

from captioner import EMBEDDED_DECODER, Captioner, read_metadata, write_checkpoint
from cli import ArgumentParser, UserError, run
from clip_small import Folds
from dataset import read_captions
from devices import pick_device
from features import FeatureCache
from files import check_writable
from generation import GenerationConfig, best_of
from metrics import cider, tokenize
from runtime import pick_runtime


@torch.inference_mode()
def find_hypotheses(model, features, embeddings, beam_size, judged=True, batch_size=100):
    """Each image's beam search hypotheses: lists of (log p, number of tokens including the end, caption, cosine by our CLIP). Without
    `judged`, our CLIP is not used, and the cosines are 0."""
    found = []
    for batch in np.array_split(np.arange(len(features)), -(-len(features) // batch_size)):
        some = features[batch, np.zeros_like(batch)].to(model.token_ids.device).float()
        generation = GenerationConfig(beam_size)
        seen = None
        if judged:
            seen = model.judge.embed_images(some) if embeddings is None else embeddings[batch].to(some.device)
        hypotheses = model.hypotheses(model.image_tokens(some, model.concepts(some, seen)), generation)
        for rows, cosines in zip(hypotheses, model.cosines(seen, hypotheses) if judged else [[0.0] * len(rows) for rows in hypotheses]):
            found.append([(score, min(len(tokens) + 1, generation.max_length), model.text(tokens), cosine)
                          for (score, tokens), cosine in zip(rows, cosines)])
    return found


def needs_clip(model, clip_weights):
    """Whether our CLIP is needed, which not every encoder has."""
    return any(clip_weights) or model.config.meaning > 0 or model.config.concept_source == "clip"


def choose(found, length_penalty, clip_weight):
    """The caption of each image that Captioner.search would choose."""
    return [rows[best_of([score / length**length_penalty for score, length, *_ in rows], [row[3] for row in rows], clip_weight)][2]
            for rows in found]


def write_generation(checkpoint, generation):
    """Record beam search settings in a checkpoint; its tensors stay unchanged."""
    metadata = read_metadata(checkpoint) | {"generation": asdict(generation)}
    with safe_open(checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    write_checkpoint(checkpoint, tensors, metadata)


def main():
    parser = ArgumentParser(description="Tune a checkpoint's beam search.")
    parser.add_argument("checkpoint", help="checkpoint of p2_train.py")
    parser.add_argument("--decoder_weights", default=str(EMBEDDED_DECODER), help="the GPT-2 weights that it was trained with")
    parser.add_argument("--annotation_file", required=True, help="reference captions, in COCO format")
    parser.add_argument("--images_root", required=True, help="folder of their images")
    parser.add_argument("--folds", help="the images' embeddings by p4_clip.py --folds, instead of our CLIP's own")
    parser.add_argument("--cache", default="cache", help="folder for the encoder's features")
    parser.add_argument("--beam_size", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--length_penalty", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--clip_weight", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    parser.add_argument("--write", action="store_true", help="record the best settings in the checkpoint")
    arguments = parser.parse_args()
    if min(arguments.beam_size) < 1:
        raise UserError("--beam_size must be at least 1")
    if arguments.write:
        check_writable(arguments.checkpoint)
    images = [image for image in read_captions(arguments.annotation_file, arguments.images_root) if image.captions]
    if not images:
        raise UserError(f"{arguments.annotation_file} has no captions")
    model = Captioner.load(arguments.checkpoint, arguments.decoder_weights, runtime=pick_runtime("auto", pick_device())).to(pick_device())
    features = FeatureCache(model.encoder, [image.path for image in images], arguments.cache, device=pick_device())
    embeddings = Folds(arguments.folds, model.judge.text_digest).of([image.path for image in images])[:, 0] if arguments.folds else None
    references = tokenize({str(i): image.captions for i, image in enumerate(images)})
    judged, scores = needs_clip(model, arguments.clip_weight), {}
    print("CIDEr    beams  length penalty  CLIP's weight")
    for beam_size in arguments.beam_size:
        found = find_hypotheses(model, features, embeddings, beam_size, judged)
        for length_penalty, clip_weight in itertools.product(arguments.length_penalty, arguments.clip_weight):
            captions = choose(found, length_penalty, clip_weight)
            score, _ = cider(references, tokenize({str(i): [caption] for i, caption in enumerate(captions)}))
            scores[beam_size, length_penalty, clip_weight] = score
            print(f"{score:.4f}  {beam_size:6}  {length_penalty:14g}  {clip_weight:13g}", flush=True)
    best = max(scores, key=scores.get)
    print("best: CIDEr {:.4f} with {} beams, length penalty {:g}, CLIP's weight {:g}".format(scores[best], *best))
    if arguments.write:
        beam_size, length_penalty, clip_weight = best
        write_generation(arguments.checkpoint, replace(model.generation, beam_size=beam_size, length_penalty=length_penalty,
                                                       clip_weight=clip_weight))


if __name__ == "__main__":
    run(main)
