"""Derive questions and answers from captions, to train and test visual question answering.

    python3 p4_questions.py data/val.json questions.json [--number 300]
    python3 p4_questions.py data/train.json instructions.json --each_thing 500

Answers are not annotated: each follows from words that at least two of an image's captions share and none contradicts, so that
they are as correct as captions. Kinds: animal, count, colour, action, presence (yes and no in equal numbers, before
--number samples from them), where, and detail (the captions joined). Each question is asked in one of several wordings.

Output: [{"image": file name, "kind", "query", "answer"}, …]
"""

import random
from collections import Counter
from dataclasses import asdict

from cli import ArgumentParser, UserError, run
from dataset import read_captions
from files import check_output, write_json
from questions import WORDINGS, derive_all


def main():
    parser = ArgumentParser(description="Derive questions and answers from captions.")
    parser.add_argument("captions", help="captions in COCO format")
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--number", type=int, help="sample so many questions; default: all")
    parser.add_argument("--kinds", nargs="+", default=[*WORDINGS], choices=[*WORDINGS], help="only questions of these kinds")
    parser.add_argument("--each_thing", type=int, help="ask about all things in every picture, with at most so many yes, and as "
                        "many no, for each thing; default: one present and one absent thing per picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the wordings and the sampling")
    arguments = parser.parse_args()
    check_output(arguments.output, "JSON", [arguments.captions])
    if arguments.each_thing is not None and arguments.each_thing < 1:
        raise UserError("--each_thing must be at least 1")
    images = read_captions(arguments.captions, None)
    pairs = [(number, question) for number, question in derive_all(images, arguments.seed, arguments.each_thing)
             if question.kind in arguments.kinds]
    if arguments.number is not None:
        if not 0 < arguments.number <= len(pairs):
            raise UserError(f"--number is {arguments.number}, but {len(pairs)} questions can be derived")
        pairs = sorted(random.Random(arguments.seed).sample(pairs, arguments.number), key=lambda pair: pair[0])
    write_json(arguments.output, [{"image": images[number].path.name} | asdict(question) for number, question in pairs])
    print(", ".join(f"{kind} {count}" for kind, count in Counter(question.kind for _, question in pairs).items()))


if __name__ == "__main__":
    run(main)
