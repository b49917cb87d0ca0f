"""Attention masks for language models of `transformers` that are not simply causal.

Shapes: B rows, T positions.
"""

import torch


def sliding_window(config):
    """The number of positions, including its own, to which a layer with a sliding window attends; None: there are no such layers."""
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if not types or "sliding_attention" in types else None


def additive_mask(seen):
    """A boolean mask -> an additive mask of the same shape, in fp32."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, torch.finfo(torch.float32).min)


def attention_mask(config, branches, positions):
    """The mask of rows with branches, in the form that `transformers` takes: (B, 1, T, T), or one for each type of layer.

    A position attends to the picture's part (branch 0) and to its own branch, up to itself; in layers with a sliding
    window only to positions within that.

    Args:
        config: the language model's. branches, positions: (B, T), as `llava_data.Rows.collate` gives them.
    """

    def finish(mask):
        return mask if config._attn_implementation == "sdpa" else additive_mask(mask)  # only sdpa takes boolean masks

    one, other = branches[:, None, :, None], branches[:, None, None, :]
    seen = ((other == 0) | (one == other)).tril()
    if not (window := sliding_window(config)):
        return finish(seen)
    near = finish(seen & (positions[:, None, :, None] - positions[:, None, None, :] < window))
    return {"full_attention": finish(seen), "sliding_attention": near} if getattr(config, "layer_types", None) else near
