"""What the positions of a language model of `transformers` may attend to, where they are not simply those before them.

Shapes: B rows, T positions.
"""

import torch


def sliding_window(config):
    """How many positions, itself among them, a layer with a sliding window sees; None: the language model has no such layers."""
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if not types or "sliding_attention" in types else None


def additive_mask(seen):
    """Truth values -> what is added to the scores of attention, of the same shape, in fp32."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, torch.finfo(torch.float32).min)


def attention_mask(config, branches, positions):
    """What may be attended to, as a language model of `transformers` takes it: (B, 1, T, T), or one for each type of layer.

    A position sees those of the picture's part (branch 0) and of its own branch, up to itself; in layers with a sliding
    window, those near it alone.

    Args:
        config: the language model's. branches, positions: (B, T), as `llava_data.Rows.collate` gives them.
    """

    def finish(mask):
        return mask if config._attn_implementation == "sdpa" else additive_mask(mask)  # which alone takes truth values

    one, other = branches[:, None, :, None], branches[:, None, None, :]
    seen = ((other == 0) | (one == other)).tril()
    if not (window := sliding_window(config)):
        return finish(seen)
    near = finish(seen & (positions[:, None, :, None] - positions[:, None, None, :] < window))
    return {"full_attention": finish(seen), "sliding_attention": near} if getattr(config, "layer_types", None) else near
