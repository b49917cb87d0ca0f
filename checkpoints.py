"""Find the weights to use, and initialise a captioner from another's checkpoint."""

from pathlib import Path

import torch.nn.functional as F

from captioner import EMBEDDED_CHECKPOINT, EMBEDDED_DECODER, check_hash, read_metadata
from cli import UserError
from decoder import read_gpt2
from files import content_hash, read_weights

CHECKPOINT_FOLDERS = Path("checkpoints"), Path(__file__).resolve().parent / "checkpoints"


def find_weights(decoder_weights=None, checkpoint=None):
    """The decoder weights and the checkpoint to use. Default: the embedded model's; for given decoder weights, the newest checkpoint in
    checkpoints/ that was trained with them. Raises UserError."""
    if decoder_weights is None:
        return EMBEDDED_DECODER, EMBEDDED_CHECKPOINT
    if checkpoint is None:
        decoder_hash = content_hash(read_gpt2(decoder_weights))
        checkpoint = newest_checkpoint(decoder_hash)
        if checkpoint is None and read_metadata(EMBEDDED_CHECKPOINT)["decoder_hash"] == decoder_hash:
            checkpoint = EMBEDDED_CHECKPOINT
    if checkpoint is None:
        raise UserError(f"no checkpoint in checkpoints/ was trained with {decoder_weights}: train one with "
                        f"`python3 p2_train.py --decoder {decoder_weights}` or name one")
    return decoder_weights, checkpoint


def newest_checkpoint(decoder_hash, folders=CHECKPOINT_FOLDERS):
    """The newest checkpoint trained with these decoder weights, or None. Searches checkpoints/ here and beside this module."""
    paths = [path for folder in folders for path in Path(folder).glob("*.safetensors") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if read_metadata(path)["decoder_hash"] == decoder_hash:
                return path
        except (UserError, KeyError):
            continue  # not a checkpoint
    return None


def start_from(model, checkpoint, decoder_weights):
    """Initialise a captioner with a checkpoint's trained weights. Returns notes on what differs, a line each. Raises UserError if the
    models do not match.

    The checkpoint's encoder may be this one with fewer levels, or the first of the encoders joined here: its channels come first,
    and the projection's weights for the others start at zero. The checkpoint may lack concepts and meanings, and its decoder
    may have other weights of the same shapes.
    """
    metadata, encoder, lines = read_metadata(checkpoint), model.encoder, []
    known = encoder.first if metadata["model"]["encoder"] == encoder.first.name else encoder
    check_hash(checkpoint, metadata, "encoder", known.weights_hash, known.name)
    if metadata["decoder_hash"] != model.decoder.weights_hash:
        lines.append(f"{checkpoint} was trained with other decoder weights than {decoder_weights}: it is used only as a starting point")
    try:
        state = read_weights(checkpoint, "checkpoint")
        if known is encoder.first and metadata["model"].get("encoder_levels", 1) <= encoder.levels:
            weight = state["projection.input.weight"]
            state["projection.input.weight"] = F.pad(weight, (0, encoder.dim - weight.shape[1]))
            if weight.shape[1] < encoder.dim:
                lines.append(f"{checkpoint} knows {weight.shape[1]} of the encoder's {encoder.dim} channels: the weights of the others "
                             "start at zero")
        for part in "concepts", "meaning":
            if not metadata["model"].get(part):
                state |= {name: value for name, value in model.trained_parameters().items()
                          if name.startswith(f"projection.{part}.")}
        if (centres := state.pop("centres", None)) is not None and model.centres is not None:
            model.centres.copy_(centres)
        model.load_trained({name: value for name, value in state.items() if name != "token_ids"})
    except (KeyError, RuntimeError):
        raise UserError(f"the checkpoint {checkpoint} has other model options: {metadata['model']}") from None
    return lines
