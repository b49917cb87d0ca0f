"""Average the weights of checkpoints of one captioner that were trained from the same start.

    python3 p2_average.py checkpoints/both.safetensors checkpoints/one.safetensors checkpoints/other.safetensors --weights 1 1

Weights between those of a model and of its fine-tuned version often combine the strengths of both (Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482). The first checkpoint's beam search settings are kept: p2_tune.py finds the best ones for the average.
"""

import math

import torch

from captioner import read_metadata, recorded_config, write_checkpoint
from cli import ArgumentParser, UserError, run
from files import check_digest, check_output, digest, read_weights


def average(checkpoints, weights):
    """The weighted mean of checkpoints' tensors, and the metadata of a checkpoint with it.

    Tokens that any of them may generate may be generated. Raises UserError for checkpoints of different models, or a damaged one.
    """
    total, described, tensors = sum(weights), [read_metadata(path) for path in checkpoints], []
    for path, metadata in zip(checkpoints, described):
        tensors.append(read_weights(path, "checkpoint"))
        check_digest(path, "checkpoint", tensors[-1], metadata.get("digest"))
        for part, value in parts_of(metadata).items():
            if value != parts_of(described[0])[part]:
                raise UserError(f"{path} and {checkpoints[0]} are of different captioners: their {part} differ")
    first = described[0]
    mean = {name: sum(weight / total * some[name].float() for weight, some in zip(weights, tensors)).half()
            for name in tensors[0] if name != "token_ids"}
    mean["token_ids"] = torch.cat([some["token_ids"] for some in tensors]).unique()
    parts = [{"weight": weight / total, "training": metadata["training"]} for weight, metadata in zip(weights, described)]
    return mean, first | {"digest": digest(mean), "training": {"mean of": parts}, "scores": {}}


def parts_of(metadata):
    """What averaged checkpoints must have in common."""
    return {"options": recorded_config(metadata), "encoder weights": metadata["encoder_hash"], "decoder weights": metadata["decoder_hash"]}


def main():
    parser = ArgumentParser(description="Average checkpoints of one captioner.")
    parser.add_argument("output", help="checkpoint to write")
    parser.add_argument("checkpoints", nargs="+", help="two or more checkpoints of p2_train.py")
    parser.add_argument("--weights", nargs="+", type=float, help="one weight per checkpoint (default: equal)")
    arguments = parser.parse_args()
    weights = arguments.weights or [1.0] * len(arguments.checkpoints)
    if len(arguments.checkpoints) < 2:
        raise UserError("name at least two checkpoints to average")
    if len(weights) != len(arguments.checkpoints) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise UserError("--weights needs a number of at least 0 for each checkpoint, and one above")
    check_output(arguments.output, "safetensors", arguments.checkpoints)
    tensors, metadata = average(arguments.checkpoints, weights)
    write_checkpoint(arguments.output, tensors, metadata)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
