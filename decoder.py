"""GPT-2 in plain PyTorch, with two ways to attend to image tokens, and the parameter-efficient tuning of peft_kinds.py.

Radford et al. 2019, in the layout of its published weights. The text attends to image tokens through a cross-attention sublayer in
every block (fusion "cross"), or they come before it in self-attention ("prefix").

Shapes in the comments: B images, K captions of each (rows R = B * K, an image's captions adjacent), T text tokens,
N image tokens, M positions before the text, C width, H heads of 64, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import loralib
import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from files import content_hash, first_line, read_json, read_weights
from peft_kinds import LoRA, PeftConfig, Prefix, Prompt, at, known, mark

HEAD_WIDTH = 64
FUSIONS = "cross", "prefix"


@dataclass
class DecoderConfig:
    """Sizes of GPT-2 (small by default), and what is added to it for captioning."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    dropout: float = 0.1
    image_dim: int = 0  # width of the image tokens (with fusion "prefix" n_embd); 0: a language model without images
    fusion: str = "cross"
    cross_dim: int = 0  # inner width of cross-attention; 0: n_embd
    peft: PeftConfig = field(default_factory=PeftConfig.off)

    def __post_init__(self):
        self.cross_dim = self.cross_dim or self.n_embd
        if self.fusion == "prefix" and self.image_dim:
            self.image_dim = self.n_embd
        for name in ("n_embd", "cross_dim"):
            if getattr(self, name) % HEAD_WIDTH:
                raise UserError(f"{name} is {getattr(self, name)}, but heads are {HEAD_WIDTH} wide: "
                                "it must be a multiple")
        known("fusion", [self.fusion], FUSIONS)


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
        self.c_attn = LoRA.qkv_linear(config.peft, config.n_embd)
        self.c_proj = LoRA.linear(config.peft, config.n_embd, config.n_embd, "attn_proj")
        self.peft_key, self.peft_value = (at(config.peft, place, config.n_embd) for place in ("key", "value"))
        self.dropout = config.dropout

    def forward(self, x, before=None, cache=None, mask=None, attentions=None):
        """(R, T, C) -> (R, T, C)

        Args:
            before: keys and values (B, H, M, 64) of positions before the text, an image's rows adjacent.
            mask: (T, M + T) boolean, what each position attends to; default: all of M, and the text causally.
            attentions: a list to which the attention weights are appended (R, H, T, M + past + T).
        """
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part) for part in (q, self.peft_key(k), self.peft_value(v)))  # (R, H, T, 64) each
        if cache is not None:
            k, v = cache.append(self, k, v)  # (R, H, past + T, 64)
            if cache.seen is not None:
                mask = F.pad(cache.seen, (before[0].shape[2] if before is not None else 0, 0), value=True)
        if before is not None:
            k, v = (torch.cat([early.repeat_interleave(len(text) // len(early), 0), text], 2)
                    for early, text in zip(before, (k, v)))
        length, seen = q.shape[2], k.shape[2]
        causal = self.causal and mask is None and length > 1  # one new token attends to the whole cache
        if causal and (seen > length or attentions is not None):
            mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
        if attentions is not None:
            attentions.append(attention_weights(q, k, mask))
            y = attentions[-1] @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None,
                                               dropout_p=self.dropout if self.training else 0)
        return F.dropout(self.c_proj(join_heads(y)), self.dropout, self.training)


class CrossAttention(nn.Module):
    """The text attends to image tokens. Initialised as a no-op, so that training starts from the language model."""

    def __init__(self, config):
        super().__init__()
        self.c_q = nn.Linear(config.n_embd, config.cross_dim)
        self.c_kv = nn.Linear(config.image_dim, 2 * config.cross_dim)
        self.c_proj = nn.Linear(config.cross_dim, config.n_embd)
        self.dropout = config.dropout
        mark(self, "cross-attention")

    def start(self):
        # 0.02 suits widths of 768 and more; in a narrow model attention would stay uniform for hundreds of steps.
        for layer in self.c_q, self.c_kv:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.c_proj.weight)

    def keys_values(self, image):
        """(B, N, image_dim) -> keys and values (B, H, N, 64) each"""
        return [split_heads(part) for part in self.c_kv(image).chunk(2, dim=-1)]

    def forward(self, x, keys_values, attentions=None):
        k, v = keys_values
        rows, length, _ = x.shape
        # Nothing is causal here, so an image's K captions are folded into one long query: keys are read once.
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
        self.c_fc = LoRA.linear(config.peft, config.n_embd, 4 * config.n_embd, "mlp")
        self.c_proj = LoRA.linear(config.peft, 4 * config.n_embd, config.n_embd, "mlp")
        self.peft_inner = at(config.peft, "inner", 4 * config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        inner = self.peft_inner(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(self.c_proj(inner), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer layer; with cross-attention between the two sublayers under fusion "cross"."""

    def __init__(self, config, causal=True):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = SelfAttention(config, causal)
        self.adapter_attn = at(config.peft, "attn", config.n_embd)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.adapter_mlp = at(config.peft, "mlp", config.n_embd)
        if config.image_dim and config.fusion == "cross":
            self.ln_cross = mark(nn.LayerNorm(config.n_embd), "cross-attention")
            self.cross = CrossAttention(config)
            self.adapter_cross = at(config.peft, "cross", config.n_embd)

    def forward(self, x, seen=None, cache=None, mask=None, attentions=None):
        """(R, T, C) -> (R, T, C); `seen`: a LayerContext."""
        seen = seen or LayerContext()
        weights = [] if attentions is not None and seen.image else None
        x = x + self.adapter_attn(self.attn(self.ln_1(x), seen.before, cache, mask, weights))
        if weights:
            attentions.append(weights[0][..., seen.image])
        if seen.cross is not None:
            x = x + self.adapter_cross(self.cross(self.ln_cross(x), seen.cross, attentions))
        return x + self.adapter_mlp(self.mlp(self.ln_2(x)))


@dataclass
class LayerContext:
    """What the text attends to in one layer besides itself: pairs of keys and values, with B rows, or one for all."""

    cross: tuple = None  # of cross-attention, (B, H', N, 64) each
    before: tuple = None  # of the positions before the text, (B, H, M, 64) each
    image: slice = None  # the image tokens among the M positions

    def select(self, images):
        """The context of these images only."""
        pairs = ([part[images] if len(part) > 1 else part for part in pair] if pair else None
                 for pair in (self.cross, self.before))
        return LayerContext(*pairs, self.image)


def init_weights(model, n_layer):
    """GPT-2's initialisation: normal with deviation 0.02, smaller for layers that write to the residual stream."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, (SelfAttention, MLP)):
            nn.init.normal_(module.c_proj.weight, std=0.02 / (2 * n_layer) ** 0.5)
        if hasattr(module, "start"):
            module.start()


class Cache:
    """Keys and values of the text so far, in every self-attention layer. Memory is allocated once."""

    beams = 1  # per row
    seen = None  # which of the text's keys each new token attends to; None: all before it

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0  # positions stored, without the current step
        self.stored = {}  # layer -> (2, R, H, max_length * beams, 64), position by position

    def steps(self, tokens):
        """The number of positions of so many new tokens of a row."""
        return tokens

    def append(self, layer, k, v):
        if layer not in self.stored:
            self.stored[layer] = k.new_empty(2, *k.shape[:2], self.max_length * self.beams, HEAD_WIDTH)
        start = self.length * self.beams
        end = start + self.steps(k.shape[2]) * self.beams
        stored = self.stored[layer]
        stored[0, :, :, start:end] = k
        stored[1, :, :, start:end] = v
        return stored[:, :, :, :end].unbind(0)


class BeamCache(Cache):
    """A cache for K beams of each of B images: a row is an image, and its new tokens are those of its beams, all at one position. At the
    first position there is one token, which the beams share.

    When beams are reordered no keys are moved: `seen` (B, 1, K, (length + 1) K) says which of the image's keys belong to each beam's past.
    """

    def __init__(self, images, beams, max_length, device=None):
        super().__init__(max_length)
        self.beams = beams
        self.past = torch.zeros(images, beams, 0, dtype=torch.long, device=device)  # (B, K, length): the beam each past token was written by
        self.look(1)

    def steps(self, tokens):
        return 1

    def look(self, new):
        """Set `seen` for so many new tokens: each attends to its beam's past, and to itself."""
        own = torch.arange(new, device=self.past.device).expand(len(self.past), new)[:, :, None]
        self.seen = F.one_hot(torch.cat([self.past[:, :new], own], 2), self.beams).flatten(2).bool()[:, None]

    def select(self, beams, images=None):
        """Make beam k the continuation of what was beam `beams[b, k]`, including its last token; `images`: keep only these, in this order."""
        if images is not None:
            self.past = self.past[images]
            self.stored = {layer: stored[:, images] for layer, stored in self.stored.items()}
        past = torch.cat([self.past, torch.arange(self.beams, device=beams.device).expand(len(beams), -1)[:, :, None]], 2)
        self.past = past.gather(1, beams[:, :, None].expand(-1, -1, past.shape[2]))
        self.look(self.beams)


class Recorder:
    """In place of a Cache: records the keys and values of every layer, through which gradients flow."""

    seen = None

    def __init__(self):
        self.stored = {}

    def append(self, layer, k, v):
        self.stored[layer] = k, v
        return k, v


def read_gpt2(path):
    """Read a GPT-2 state dict in the Hugging Face layout, without key prefix, causal masks and the tied head. It is this that is hashed.

    Raises UserError for a missing or damaged file, or one whose head is not tied.
    """
    state = read_weights(path, "decoder weights")
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    # Causal masks, which some exports carry as buffers.
    state = {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    head = state.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in state and not torch.equal(head, state["wte.weight"]):
        raise UserError(f"{path} has an output head of its own; GPT-2's is tied to its token embedding")
    return state


def check_architecture(weights, n_embd):
    """Raise UserError if a config.json beside the weights has what shapes do not show: another head width or activation."""
    path = Path(weights).with_name("config.json")
    config = read_json(path, "config of the decoder") if path.is_file() else {}
    if not isinstance(config, dict) or config.get("model_type", "gpt2") != "gpt2":
        return  # it belongs to something else in the same folder
    heads, activation = config.get("n_head"), config.get("activation_function", "gelu_new")
    if isinstance(heads, int) and heads * HEAD_WIDTH != n_embd:
        raise UserError(f"{path} says {heads} heads of {n_embd / heads:g}, but heads are {HEAD_WIDTH} wide here: of this model "
                        "the outputs would be wrong")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise UserError(f"{path} says that the activation is {activation}, but it is gelu_new here: the outputs would be wrong")


class Decoder(nn.Module):
    """GPT-2 with tied input and output embeddings.

    A forward pass maps tokens (R, T) to logits (R, T, V). `token_ids` selects the rows of the head to
    compute, and V is their number: in a small decoder the head is most of the work, and few of the
    50,257 tokens occur in captions.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        peft = config.peft
        self.wte = LoRA.embedding(peft, config.vocab_size, config.n_embd, "wte")
        self.wpe = LoRA.embedding(peft, config.n_positions, config.n_embd, "wpe")
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if LoRA.updates(peft, "head"):
            self.head = LoRA.linear(replace(peft, lora_dropout=0.0), config.n_embd, config.vocab_size, "head", bias=False)
        if peft.prefix_length:
            self.prefix = mark(Prefix(peft, config.n_layer, config.n_embd), Prefix.name)
        if peft.prompt_length:
            self.prompt = mark(Prompt(peft.prompt_length, config.n_embd), Prompt.name)
        init_weights(self, config.n_layer)
        if LoRA.updates(peft, "head"):
            self.head.weight = self.wte.weight  # tied, until one of them is merged
        # {name: kind} of the parameters added for captioning. Collected here, since sharding replaces parameters.
        self.added = {name: parameter.added for name, parameter in self.named_parameters() if hasattr(parameter, "added")}
        self.untied = None  # the head's weights, once the token embedding was merged with its LoRA
        self.weights_hash = None  # content hash of the pretrained weights, which checkpoints record

    @classmethod
    def from_pretrained(cls, path, **options):
        """Load a GPT-2 state dict in the Hugging Face layout and freeze it; sizes come from the shapes.

        Args:
            path: `.bin` or `.safetensors`; keys may start with `transformer.`.
            options: fields of DecoderConfig, or of its PeftConfig, that add to GPT-2 (image_dim, lora_rank, …); what they add is trainable.
        Raises UserError for a file that is missing, damaged, or not GPT-2's.
        """
        state = read_gpt2(path)
        try:
            vocab_size, n_embd = state["wte.weight"].shape
            sizes = dict(vocab_size=vocab_size, n_embd=n_embd, n_positions=len(state["wpe.weight"]),
                         n_layer=1 + max((int(key.split(".")[1]) for key in state if key.startswith("h.")), default=-1))
            if not sizes["n_layer"]:
                raise KeyError("h.0.attn.c_attn.weight")
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(f"{path} does not hold GPT-2 weights in the Hugging Face layout: "
                            f"no {first_line(error)}") from None
        check_architecture(path, n_embd)
        peft = {field.name: options.pop(field.name) for field in fields(PeftConfig) if field.name in options}
        decoder = cls(DecoderConfig(**sizes, **{"peft": PeftConfig.off(**peft)} | options))
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
        return {name for name, _ in self.named_parameters()} - self.added.keys()

    def pretrained_state(self):
        """GPT-2's own tensors in the Hugging Face layout, for saving and for the content hash."""
        state = self.state_dict()
        return {name: state[name].t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                else state[name] for name in sorted(self.pretrained_names())}

    def context(self, image=None):
        """What the text attends to besides itself: image tokens (B, N, image_dim) -> a LayerContext for every layer.

        Computed once per image, whatever the number of its captions. With fusion "prefix" the image tokens, followed by
        the prompt, pass through the layers here, since the text after them does not change them. None: text only.
        """
        config, rows = self.config, 1 if image is None else len(image)
        learned = [None] * len(self.h)
        if config.peft.prefix_length:  # one row for all images
            learned = [tuple(split_heads(part[None]) for part in pair) for pair in self.prefix()]
        cross = [None] * len(self.h)
        early, first, tokens = [], config.peft.prefix_length, 0  # embeddings before the text; their first position; N
        if image is not None and config.fusion == "cross":
            cross = [block.cross.keys_values(image) for block in self.h]
        elif image is not None:
            early, tokens = [image], image.shape[1]
        if config.peft.prompt_length:
            early.append(self.prompt.weight.expand(rows, -1, -1))
        where = slice(first, first + tokens) if tokens else None
        seen = [LayerContext(*pairs, where) for pairs in zip(cross, learned)]
        if early:
            x = F.dropout(torch.cat(early, 1), config.dropout, self.training)
            mask = torch.ones(x.shape[1], first + x.shape[1], dtype=torch.bool, device=x.device).tril(first)
            mask[:tokens, :first + tokens] = True  # image tokens attend to each other, the prompt is causal
            recorder = Recorder()
            for block, layer in zip(self.h, seen):
                x = block(x, LayerContext(layer.cross, layer.before), recorder, mask)
                pair = recorder.stored[block.attn]
                if layer.before is not None:
                    pair = tuple(torch.cat([part.expand(rows, -1, -1, -1), later], 2)
                                 for part, later in zip(layer.before, pair))
                layer.before = pair
        return seen

    def hidden(self, tokens, context=None, cache=None, attentions=None):
        """Tokens (R, T) -> final hidden states (R, T, C).

        Args:
            context: `context` of B images; R = B * K, an image's K captions adjacent. None: text only.
            cache: a Cache: `tokens` then follow it (one token, unless it is empty) and are added to it. Or a BeamCache: a row
                of `tokens` is then an image (R = B), with the newest token of each of its beams.
            attentions: a list to which each layer's attention to the image tokens is appended (R, H, T, N).
        """
        start = cache.length if cache is not None else 0
        new = cache.steps(tokens.shape[1]) if cache is not None else tokens.shape[1]
        if start + new > self.config.n_positions:
            raise ValueError(f"{start + new} tokens, but the decoder has {self.config.n_positions} positions")
        if start and new > 1:
            raise ValueError("a cache that is not empty takes one token at a time")
        context = self.context() if context is None else context
        positions = torch.arange(start, start + new, device=tokens.device)
        x = F.dropout(self.wte(tokens) + self.wpe(positions), self.config.dropout, self.training)
        for block, seen in zip(self.h, context):
            x = block(x, seen, cache, attentions=attentions)
        if cache is not None:
            cache.length += new
        return self.ln_f(x)

    def head_weight(self, token_ids=None):
        """(V, C), or the rows of `token_ids`; including LoRA's update."""
        rows = slice(None) if token_ids is None else token_ids
        if not LoRA.updates(self.config.peft, "head"):
            return (self.untied if self.untied is not None else self.wte.weight)[rows]
        weight = self.head.weight[rows]
        return weight if self.head.merged else weight + self.head.lora_B[rows] @ self.head.lora_A * self.head.scaling

    def forward(self, tokens, image=None, token_ids=None):
        """Tokens (R, T) and image tokens (B, N, image_dim) -> logits (R, T, V)."""
        context = self.context(image) if image is not None else None
        return F.linear(self.hidden(tokens, context), self.head_weight(token_ids))

    def trained_state(self):
        """The trained tensors by name, for a checkpoint. A module with a method `saved` decides itself what to store."""
        state = {name: parameter.detach() for name, parameter in self.named_parameters() if name in self.added}
        for path, module in self.named_modules():
            if hasattr(module, "saved"):
                state = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
                state |= {f"{path}.{name}": value for name, value in module.saved().items()}
        return state

    def lora_layers(self):
        """The layers with a low-rank update that is not merged."""
        kinds = loralib.Linear, loralib.MergedLinear, loralib.Embedding
        return [module for module in self.modules() if isinstance(module, kinds) and module.r and not module.merged]

    def merge_lora(self):
        """Merge the low-rank updates into the weights: the same outputs, faster. For inference only."""
        if any(LoRA.updates(self.config.peft, target) for target in ("wte", "head")):
            # The input embedding and the head are one tensor, but their updates differ.
            untied = self.wte.weight.detach().clone()
            if LoRA.updates(self.config.peft, "head"):
                self.head.weight = nn.Parameter(untied, requires_grad=False)
            else:
                self.untied = untied
        for module in self.lora_layers():
            module.merge_weights = True
            module.train(False)
        return self

    @contextmanager
    def merged_lora(self):
        """A context with merged LoRA, for use during training: afterwards every weight is restored to the bit."""
        before = [(module, module.weight, module.weight.data, module.training) for module in self.lora_layers()]
        for module, _, weight, _ in before:
            module.weight.data = weight.clone()
        self.merge_lora()
        try:
            yield
        finally:
            for module, parameter, weight, training in before:
                parameter.data = weight
                module.weight, module.merged, module.merge_weights = parameter, False, False
                module.train(training)  # its dropout too
            self.untied = None
