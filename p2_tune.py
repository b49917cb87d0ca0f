"""How are a checkpoint's captions best searched for? Beam size, length penalty, and what our CLIP's choice among beams counts.

    python3 p2_tune.py checkpoints/captioner.safetensors --annotation_file val.json --images_root images/val [--write]

Searches once for each beam size and scores every combination of the others on what was found, by CIDEr. `--write` records the
best in the checkpoint, so that p2_infer.py takes it unless told otherwise. Do it on pictures that are not those of the final
score, and that neither the captioner nor our CLIP was trained on: for the pictures that our CLIP learnt from, name --folds.
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
def find_hypotheses(model, features, embeddings, beam_size, batch_size=100):
    """What beam search finds for each image: lists of (log p, tokens' number with the end, caption, cosine in our CLIP's space)."""
    found = []
    for batch in np.array_split(np.arange(len(features)), -(-len(features) // batch_size)):
        some = features[batch, np.zeros_like(batch)].to(model.token_ids.device).float()
        generation = GenerationConfig(beam_size)
        seen = model.judge.embed_images(some) if embeddings is None else embeddings[batch].to(some.device)
        hypotheses = model.hypotheses(model.image_tokens(some, model.concepts(some, seen)), generation)
        for rows, cosines in zip(hypotheses, model.cosines(seen, hypotheses)):
            found.append([(score, min(len(tokens) + 1, generation.max_length), model.text(tokens), cosine)
                          for (score, tokens), cosine in zip(rows, cosines)])
    return found


def choose(found, length_penalty, clip_weight):
    """The caption of each image that Captioner.search would choose."""
    return [rows[best_of([score / length**length_penalty for score, length, *_ in rows], [row[3] for row in rows], clip_weight)][2]
            for rows in found]


def write_generation(checkpoint, generation):
    """Record in a checkpoint how its captions are searched for; its tensors stay as they are."""
    metadata = read_metadata(checkpoint) | {"generation": asdict(generation)}
    with safe_open(checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    write_checkpoint(checkpoint, tensors, metadata)


def main():
    parser = ArgumentParser(description="Find out how a checkpoint's captions are best searched for.")
    parser.add_argument("checkpoint", help="what p2_train.py wrote")
    parser.add_argument("--decoder_weights", default=str(EMBEDDED_DECODER), help="the GPT-2 weights that it was trained with")
    parser.add_argument("--annotation_file", required=True, help="captions that people wrote, in COCO's form")
    parser.add_argument("--images_root", required=True, help="the folder of their images")
    parser.add_argument("--folds", help="embeddings of these images that p4_clip.py --folds wrote, instead of what our CLIP says of them")
    parser.add_argument("--cache", default="cache", help="folder of the encoder's features")
    parser.add_argument("--beam_size", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--length_penalty", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--clip_weight", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    parser.add_argument("--write", action="store_true", help="record the best in the checkpoint")
    arguments = parser.parse_args()
    if min(arguments.beam_size) < 1:
        raise UserError("--beam_size must be at least 1")
    if arguments.write:
        check_writable(arguments.checkpoint)
    images = read_captions(arguments.annotation_file, arguments.images_root)
    model = Captioner.load(arguments.checkpoint, arguments.decoder_weights, runtime=pick_runtime("auto", pick_device())).to(pick_device())
    features = FeatureCache(model.encoder, [image.path for image in images], arguments.cache, device=pick_device())
    embeddings = Folds(arguments.folds, model.judge.text_digest).of([image.path for image in images])[:, 0] if arguments.folds else None
    references = tokenize({str(i): image.captions for i, image in enumerate(images)})
    scores = {}
    print("CIDEr    beams  length penalty  CLIP's weight")
    for beam_size in arguments.beam_size:
        found = find_hypotheses(model, features, embeddings, beam_size)
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
