"""GPT-2 in plain PyTorch, with cross-attention to image tokens and LoRA.

Radford et al. 2019, in the layout of its published weights. Shapes in the comments:
B images, K captions of each (rows R = B * K, an image's captions adjacent), T text tokens, N image tokens,
C width, H heads of 64, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import loralib
import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from weightfiles import content_hash, first_line, read_weights

HEAD_WIDTH = 64


@dataclass
class DecoderConfig:
    """Sizes of GPT-2 (small by default), and what is added to it for captioning."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    dropout: float = 0.1
    image_dim: int = 0  # width of the image tokens; 0: a language model without cross-attention
    cross_dim: int = 0  # inner width of cross-attention; 0: n_embd
    lora_rank: int = 0  # 0: no LoRA
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple = ("q", "v")  # of q, k, v, attn_proj, mlp

    def __post_init__(self):
        self.cross_dim = self.cross_dim or self.n_embd
        self.lora_targets = tuple(self.lora_targets)
        for name in ("n_embd", "cross_dim"):
            if getattr(self, name) % HEAD_WIDTH:
                raise UserError(f"{name} is {getattr(self, name)}, but heads are {HEAD_WIDTH} wide: "
                                "it must be a multiple")
        unknown = set(self.lora_targets) - {"q", "k", "v", "attn_proj", "mlp"}
        if unknown:
            raise UserError(f"unknown LoRA target {sorted(unknown)[0]}: choose from q, k, v, attn_proj, mlp")


def linear(config, n_in, n_out, target=None):
    """A linear layer; loralib's, with its low-rank update, where `target` is one of the LoRA targets.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685. Merging is left to `Decoder.merge_lora`: loralib's own
    merges at every eval() and subtracts at train(), which drifts and would make a resumed run differ.
    """
    if not config.lora_rank or target not in config.lora_targets:
        return nn.Linear(n_in, n_out)
    return loralib.Linear(n_in, n_out, r=config.lora_rank, lora_alpha=config.lora_alpha,
                          lora_dropout=config.lora_dropout, merge_weights=False)


def qkv_linear(config):
    """GPT-2's fused projection to queries, keys and values, LoRA on those among the targets."""
    enabled = [name in config.lora_targets for name in "qkv"]
    if not config.lora_rank or not any(enabled):
        return nn.Linear(config.n_embd, 3 * config.n_embd)
    return loralib.MergedLinear(config.n_embd, 3 * config.n_embd, r=config.lora_rank, enable_lora=enabled,
                                lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, merge_weights=False)


def split_heads(x):
    """(B, T, C) -> (B, H, T, 64)"""
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


def join_heads(x):
    """(B, H, T, 64) -> (B, T, C)"""
    return x.transpose(1, 2).flatten(2)


def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(64)), written out: (B, H, T, 64), (B, H, S, 64) -> (B, H, T, S)"""
    scores = q @ k.transpose(-2, -1) / HEAD_WIDTH**0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention: causal over text, with a cache of keys and values; or over a set of tokens."""

    def __init__(self, config, causal=True):
        super().__init__()
        self.causal = causal
        self.c_attn = qkv_linear(config)
        self.c_proj = linear(config, config.n_embd, config.n_embd, "attn_proj")
        self.dropout = config.dropout

    def forward(self, x, cache=None):
        q, k, v = (split_heads(part) for part in self.c_attn(x).chunk(3, dim=-1))  # (R, H, T, 64) each
        if cache is not None:
            k, v = cache.append(self, k, v)  # (R, H, past + T, 64)
        causal = self.causal and q.shape[2] > 1  # one new token sees all of the cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=self.dropout if self.training else 0)
        return F.dropout(self.c_proj(join_heads(y)), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Text attends to image tokens. Starts as a no-op, so that training begins from the language model."""

    def __init__(self, config):
        super().__init__()
        self.c_q = nn.Linear(config.n_embd, config.cross_dim)
        self.c_kv = nn.Linear(config.image_dim, 2 * config.cross_dim)
        self.c_proj = nn.Linear(config.cross_dim, config.n_embd)
        self.dropout = config.dropout

    def keys_values(self, image):
        """(B, N, image_dim) -> keys and values (B, H, N, 64) each"""
        return [split_heads(part) for part in self.c_kv(image).chunk(2, dim=-1)]

    def forward(self, x, keys_values, attentions=None):
        k, v = keys_values
        rows, length, _ = x.shape
        # Nothing is causal here, so an image's K captions fold into one long query: keys are read once.
        q = split_heads(self.c_q(x.reshape(len(k), -1, x.shape[-1])))  # (B, H, K * T, 64)
        if attentions is not None:
            weights = attention_weights(q, k)
            attentions.append(weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1))  # (R, H, T, N)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0)
        y = self.c_proj(join_heads(y)).view(rows, length, -1)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = linear(config, config.n_embd, 4 * config.n_embd, "mlp")
        self.c_proj = linear(config, 4 * config.n_embd, config.n_embd, "mlp")
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer layer; with cross-attention between the two sublayers where there are image tokens."""

    def __init__(self, config, causal=True):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = SelfAttention(config, causal)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        if config.image_dim:
            self.ln_cross = nn.LayerNorm(config.n_embd)
            self.cross = CrossAttention(config)

    def forward(self, x, keys_values=None, cache=None, attentions=None):
        x = x + self.attn(self.ln_1(x), cache)
        if keys_values is not None:
            x = x + self.cross(self.ln_cross(x), keys_values, attentions)
        return x + self.mlp(self.ln_2(x))


def init_weights(model, n_layer):
    """GPT-2's: normal with deviation 0.02, smaller where a layer writes to the residual stream."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, (SelfAttention, MLP)):
            nn.init.normal_(module.c_proj.weight, std=0.02 / (2 * n_layer) ** 0.5)
        if isinstance(module, CrossAttention):
            # 0.02 suits width 768 and more; in a narrow model it leaves attention uniform for hundreds of steps.
            for layer in module.c_q, module.c_kv:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(module.c_proj.weight)


class Cache:
    """Keys and values of the text so far, in every self-attention layer. Memory is taken once."""

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0  # tokens held, before the step under way
        self.stored = {}  # layer -> (2, R, H, max_length, 64)

    def append(self, layer, k, v):
        if layer not in self.stored:
            self.stored[layer] = k.new_empty(2, *k.shape[:2], self.max_length, HEAD_WIDTH)
        end = self.length + k.shape[2]
        stored = self.stored[layer]
        stored[0, :, :, self.length:end] = k
        stored[1, :, :, self.length:end] = v
        return stored[:, :, :, :end].unbind(0)

    def select(self, rows):
        """Keep these rows in this order: beams that survived, images that are not finished."""
        for layer, stored in self.stored.items():
            kept = stored.new_empty(2, len(rows), *stored.shape[2:])
            kept[:, :, :, :self.length] = stored[:, rows, :, :self.length]
            self.stored[layer] = kept


def read_gpt2(path):
    """A GPT-2 state dict in the Hugging Face layout, without prefix, causal masks and the tied head: what is hashed.

    Raises UserError for a file that is missing or damaged, or whose head is not tied.
    """
    state = read_weights(path, "decoder weights")
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    # Causal masks, which some exports carry as buffers.
    state = {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    head = state.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in state and not torch.equal(head, state["wte.weight"]):
        raise UserError(f"{path} has an output head of its own; GPT-2's is tied to its token embedding")
    return state


class Decoder(nn.Module):
    """GPT-2 with tied input and output embeddings.

    A forward pass maps tokens (R, T) to logits (R, T, V). `token_ids` names the rows of the head to
    compute, so V is their number: in a small decoder the head is most of the work, and few of the
    50,257 tokens ever occur in captions.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        init_weights(self, config.n_layer)
        self.weights_hash = None  # content hash of the pretrained weights, which checkpoints record

    @classmethod
    def from_pretrained(cls, path, **options):
        """Load a GPT-2 state dict in the Hugging Face layout and freeze it; sizes come from the shapes.

        Args:
            path: `.bin` or `.safetensors`; keys may start with `transformer.`.
            options: fields of DecoderConfig that add to GPT-2 (image_dim, lora_rank, …); what they add is trainable.
        Raises UserError for a file that is missing, damaged, or not GPT-2's.
        """
        state = read_gpt2(path)
        try:
            vocab_size, n_embd = state["wte.weight"].shape
            sizes = dict(vocab_size=vocab_size, n_embd=n_embd, n_positions=len(state["wpe.weight"]),
                         n_layer=1 + max(int(key.split(".")[1]) for key in state if key.startswith("h.")))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(f"{path} does not hold GPT-2 weights in the Hugging Face layout: "
                            f"no {first_line(error)}") from None
        decoder = cls(DecoderConfig(**sizes, **options))
        decoder.weights_hash = content_hash(state)
        for key, value in state.items():
            # Hugging Face keeps these as Conv1D, (in, out).
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                value = value.t()
            state[key] = value.float().contiguous()
        expected = decoder.pretrained_names()
        wrong = expected ^ state.keys()
        if wrong:
            side = "lacks" if min(wrong) in expected else "also holds"
            raise UserError(f"{path} does not hold GPT-2 weights in the Hugging Face layout: it {side} {min(wrong)}")
        try:
            decoder.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UserError(f"{path} does not hold GPT-2 weights of one size: {first_line(error)}") from None
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name not in expected)
        return decoder

    def pretrained_names(self):
        """Names of GPT-2's own parameters, without what was added for captioning."""
        return {name for name, _ in self.named_parameters() if ".cross." not in name
                and ".ln_cross." not in name and ".lora_" not in name}

    def pretrained_state(self):
        """GPT-2's own tensors in the Hugging Face layout, for saving and for the content hash."""
        state = self.state_dict()
        return {name: state[name].t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                else state[name] for name in sorted(self.pretrained_names())}

    def keys_values(self, image):
        """Image tokens (B, N, image_dim) -> cross-attention keys and values of every layer, computed once."""
        return [block.cross.keys_values(image) for block in self.h]

    def hidden(self, tokens, keys_values=None, cache=None, attentions=None):
        """Tokens (R, T) -> final hidden states (R, T, C).

        Args:
            keys_values: of B images; R = B * K, an image's K captions adjacent. None: text alone.
            cache: a Cache: `tokens` are then those after it (one, unless it is empty), and it grows by them.
            attentions: a list that receives each layer's cross-attention weights (R, H, T, N).
        """
        start = cache.length if cache is not None else 0
        if start + tokens.shape[1] > self.config.n_positions:
            raise ValueError(f"{start + tokens.shape[1]} tokens, but the decoder has {self.config.n_positions} positions")
        if start and tokens.shape[1] > 1:
            raise ValueError("a cache that is not empty takes one token at a time")
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, keys_values[i] if keys_values else None, cache, attentions)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x)

    def head_weight(self, token_ids=None):
        """(V, C), or the rows of `token_ids`"""
        return self.wte.weight if token_ids is None else self.wte.weight[token_ids]

    def forward(self, tokens, image=None, token_ids=None):
        """Tokens (R, T) and image tokens (B, N, image_dim) -> logits (R, T, V)."""
        keys_values = self.keys_values(image) if image is not None else None
        return F.linear(self.hidden(tokens, keys_values), self.head_weight(token_ids))

    def lora_layers(self):
        """The layers with a low-rank update that is not folded in."""
        return [module for module in self.modules()
                if isinstance(module, (loralib.Linear, loralib.MergedLinear)) and module.r and not module.merged]

    def merge_lora(self):
        """Fold the low-rank updates into the weights: the same outputs, faster. For inference only."""
        for module in self.lora_layers():
            module.merge_weights = True
            module.train(False)
        return self

    @contextmanager
    def merged_lora(self):
        """`merge_lora` for a while, as within training: afterwards every weight is what it was, to the bit."""
        before = [(module, module.weight.data, module.training) for module in self.lora_layers()]
        for module, weight, _ in before:
            module.weight.data = weight.clone()
        self.merge_lora()
        try:
            yield
        finally:
            for module, weight, training in before:
                module.weight.data, module.merged, module.merge_weights = weight, False, False
                module.train(training)  # its dropout too
