"""The language model of a small LLaVA on a CPU through OpenVINO: the same outputs as PyTorch's, in half of its time or less.

The key-value cache stays in OpenVINO from step to step, and texts that have ended take no more time. `transformers` generates
with it in the same way as with PyTorch's model.

Shapes: B rows, T new tokens of each, S cached tokens, C channels, V tokens of the vocabulary.
"""

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from cli import UserError
from files import first_line
from masks import additive_mask, sliding_window
from runtime import Network, infer, kept_signal_stack

MOST_PARAMETERS = 1_000_000_000  # of a language model; while it is compiled, its weights are in memory twice
FIXED_INPUTS = 5  # of Step, before the keys and values


def folded_attention(module, query, key, value, mask, scaling=None, dropout=0.0, **options):
    """Grouped-query attention that treats the query heads of a key head as further positions, so that keys are not copied.

    (B, heads, T, d), (B, key heads, S + T, d) twice, (B, 1, T, S + T) -> (B, T, heads, d), None, the interface of `transformers`.
    """
    batch, heads, length, dim = query.shape
    shared = heads // key.shape[1]
    found = nn.functional.scaled_dot_product_attention(query.reshape(batch, heads // shared, shared * length, dim), key, value,
                                                       attn_mask=mask.repeat(1, 1, shared, 1), scale=scaling)
    return found.reshape(batch, heads, length, dim).transpose(1, 2).contiguous(), None


AttentionInterface.register("folded", folded_attention)


class Past:
    """A traceable cache of key and value tensors: selects their `rows`, and each layer appends its new ones."""

    def __init__(self, tensors, rows):
        self.tensors, self.rows = list(tensors), rows

    def get_seq_length(self, *layer):
        return self.tensors[0].shape[2]

    def update(self, key, value, layer, *options):
        places = 2 * layer, 2 * layer + 1
        for place, new in zip(places, (key, value)):
            self.tensors[place] = torch.cat([self.tensors[place].index_select(0, self.rows), new], 2)
        return [self.tensors[place] for place in places]


class Step(nn.Module):
    """One forward pass of a language model, in a form that OpenVINO can convert."""

    def __init__(self, language):
        super().__init__()
        self.language, self.by_type = language, bool(getattr(language.config, "layer_types", None))

    def forward(self, embeddings, positions, full, near, rows, *past):
        """(B, T, C), (B, T), additive masks (B, 1, T, S + T) for layers with full and with sliding-window attention, (B), and cached keys
        and values (previous rows, key heads, S, d) -> (B, T, C), and keys and values (B, key heads, S + T, d)"""
        past = Past(past, rows)
        mask = {"full_attention": full, "sliding_attention": near} if self.by_type else torch.minimum(full, near)
        hidden = self.language(inputs_embeds=embeddings, position_ids=positions, use_cache=True, past_key_values=past,
                               attention_mask=mask).last_hidden_state
        return hidden, *past.tensors


class CompiledCache(Cache):
    """The cache in OpenVINO as seen by `transformers`: its length, and the rows to select in the next pass.

    Args:
        compiled: the CompiledLanguageModel's network.
    """

    is_compileable = False

    def __init__(self, compiled):
        super().__init__(layers=[])
        self.request, self.length, self.rows, self.alive = compiled.create_infer_request(), 0, None, None

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, beam_idx):
        """Select these rows of the last pass in the next one."""
        self.rows = beam_idx


class CompiledLanguageModel(nn.Module):
    """The language model of a LLaVA (without its head) in OpenVINO, with its embedding in PyTorch. For inference only.

    Args:
        language: the model of `transformers`, which must not be used afterwards.
        pad: id of the token that `generate` appends to texts that have ended.
    Raises UserError if OpenVINO cannot run it.
    """

    def __init__(self, language, pad):
        from openvino._offline_transformations import apply_make_stateful_transformation

        super().__init__()
        self.config, self.embed_tokens, self.pad = language.config, language.embed_tokens, pad
        config, kinds = self.config, set(getattr(self.config, "layer_types", None) or ())
        if strange := kinds - {"full_attention", "sliding_attention"}:
            raise UserError(f"it has layers of {min(strange)}")
        heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.window = sliding_window(config)
        language.set_attn_implementation("folded")
        count, rows, new, old = 2 * config.num_hidden_layers, 2, 3, 5  # example sizes; all but the first vary
        examples = (torch.zeros(rows, new, config.hidden_size), torch.arange(old, old + new).expand(rows, new), torch.zeros(rows, 1, new, old + new),
                    torch.zeros(rows, 1, new, old + new), torch.arange(rows), *[torch.zeros(rows, heads, old, dim)] * count)
        shapes = ([-1, -1, config.hidden_size], [-1, -1], [-1, 1, -1, -1], [-1, 1, -1, -1], [-1], *[[-1, heads, -1, dim]] * count)
        try:
            model = Network.trace(Step(language), examples, shapes)
            names = {}
            for number in range(count):
                before, after = model.inputs[FIXED_INPUTS + number], model.outputs[1 + number]
                names[f"past {number}"] = f"present {number}"
                before.get_tensor().set_names({f"past {number}"})
                after.get_tensor().set_names({f"present {number}"})
            apply_make_stateful_transformation(model, names)
            self.compiled = compile_model(model, KV_CACHE_PRECISION="f32")
        except (RuntimeError, IndexError, TypeError) as error:
            raise UserError(first_line(error)) from None

    def get_input_embeddings(self):
        return self.embed_tokens

    def new_cache(self):
        """A new past_key_values for `generate`, one for each text or batch."""
        return CompiledCache(self.compiled)

    def forward(self, inputs_embeds, past_key_values=None, attention_mask=None, position_ids=None, **options):
        """Embeddings (B, T, C) of the tokens after the cached ones -> a BaseModelOutputWithPast, like the language model's.

        The output for texts that have ended is zeros.
        """
        cache = self.new_cache() if past_key_values is None else past_key_values
        (batch, new, _), old = inputs_embeds.shape, cache.length
        if position_ids is None:
            position_ids = torch.arange(old, old + new)
        position_ids = position_ids.expand(batch, new)
        alive = torch.ones(batch, dtype=torch.bool)
        if cache.rows is not None:
            rows, cache.rows = cache.rows, None
        elif new == 1 and old:
            alive = (inputs_embeds[:, 0] != self.embed_tokens(torch.tensor(self.pad))).any(-1)
            if not alive.any():
                alive[0] = True
            rows = (cache.alive.cumsum(0) - 1)[alive]  # OpenVINO caches only those that were alive in the last pass
        else:
            rows = torch.arange(batch)
        cache.alive = alive
        ones = torch.ones(batch, old + new, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        full = self.mask(ones[alive], new)
        near = full if self.window is None or old + new <= self.window else self.mask(ones[alive], new, self.window)
        found = infer(cache.request, (inputs_embeds[alive], position_ids[alive].long(), full, near, rows.long()))
        cache.length = old + new
        if not alive.all():
            hidden = torch.zeros_like(inputs_embeds)
            hidden[alive] = found
            found = hidden
        else:
            found = found.clone()
        return BaseModelOutputWithPast(last_hidden_state=found, past_key_values=cache)

    @staticmethod
    def mask(ones, new, window=None):
        """Which tokens (B, S + T) are not padding -> additive mask for the last T queries: (B, 1, T, S + T)"""
        total = ones.shape[1]
        places = torch.arange(total)
        distance = places[total - new:, None] - places
        seen = distance >= 0
        if window:
            seen &= distance < window
        return additive_mask(seen & ones[:, None, None])


class CompiledHead(nn.Module):
    """A linear layer without bias in OpenVINO; rows of zeros, of texts that have ended, are not computed.

    Args:
        weight: (V, C)
    """

    def __init__(self, weight):
        import openvino
        from openvino import opset13

        super().__init__()
        hidden = opset13.parameter([-1, weight.shape[1]], openvino.Type.f32)
        logits = opset13.matmul(hidden, opset13.constant(weight.float().numpy(), shared_memory=True), False, True)
        self.compiled, self.size = compile_model(openvino.Model([logits], [hidden])), len(weight)

    def forward(self, hidden):
        """(B, T, C) -> (B, T, V)"""
        rows = hidden.reshape(-1, hidden.shape[-1])
        alive = rows.any(-1)
        found = infer(self.compiled.create_infer_request(), (rows[alive],))  # a new request's output is never overwritten
        if not alive.all():
            logits = torch.empty(len(rows), self.size)
            logits[alive], logits[~alive] = found, 0.0
            found = logits
        return found.unflatten(0, hidden.shape[:-1])


def compile_model(model, **options):
    """OpenVINO's model, compiled for a CPU in full precision."""
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                                                        "INFERENCE_NUM_THREADS": torch.get_num_threads(), **options})


def compile_language(model, pad):
    """Run the language model of a LlavaForConditionalGeneration in OpenVINO. Raises UserError, and changes nothing, if that fails.

    Args:
        pad: id of the token that `generate` appends to texts that have ended.
    """
    before = model.model.language_model.config._attn_implementation
    try:
        with kept_signal_stack():
            compiled = CompiledLanguageModel(model.model.language_model, pad)
            head = CompiledHead(model.lm_head.weight.detach())
    except UserError:
        model.model.language_model.set_attn_implementation(before)
        raise
    model.model.language_model, model.lm_head = compiled, head
