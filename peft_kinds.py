"""Parameter-efficient fine-tuning: one class per kind. The parameters that a kind adds are trained; pretrained weights stay frozen.

A kind declares `Options`, which become command-line options and are stored in checkpoints, and adds modules to the decoder: `at` a place
within a layer, or before the text. The added parameters are marked with the kind's name; marked parameters are trained. To add a kind,
write its class and add it to KINDS.

Shapes: R rows, T text tokens, C width, P learned positions.
"""

from dataclasses import dataclass, fields

import loralib
import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError, option

SUBLAYERS = "attn", "cross", "mlp"  # places after a layer's sublayers
LORA_TARGETS = "q", "k", "v", "attn_proj", "mlp", "wte", "wpe", "head"
ACTIVATIONS = "key", "value", "inner"  # places within sublayers: keys and values (R, T, C), and inside the MLP (R, T, 4 C)


def mark(module, kind):
    """Mark a module's parameters as added by this kind, hence trained. Returns the module."""
    for parameter in module.parameters():
        parameter.added = kind
    return module


class Kind:
    """Base class, with defaults: nothing is added within layers, and all option values are valid."""

    @classmethod
    def at(cls, config, place, width):
        """The module to apply at a place, to activations of this width, or None."""

    @staticmethod
    def check(config):
        """Raise UserError for invalid options."""


class LoRA(Kind):
    """Low-rank updates of linear layers and embeddings (Hu et al. 2021, https://arxiv.org/abs/2106.09685), by loralib's layers.

    `Decoder.merge_lora` merges them: loralib itself would merge at every eval() and subtract at train(), which accumulates rounding errors,
    so that a resumed run would differ.
    """

    name = "LoRA"
    @dataclass
    class Options:
        lora_rank: int = option(16, "rank of LoRA; 0: none")
        lora_alpha: float = option(32.0, "LoRA's update is scaled by lora_alpha / lora_rank")
        lora_dropout: float = option(0.0, "dropout on the input of LoRA's update")
        lora_targets: tuple = option(("q", "k", "v", "attn_proj", "mlp"), f"layers with LoRA, of {' '.join(LORA_TARGETS)}")

    @staticmethod
    def check(config):
        known("LoRA target", config.lora_targets, LORA_TARGETS)

    @staticmethod
    def updates(config, target):
        """Whether LoRA updates this target."""
        return bool(config.lora_rank) and target in config.lora_targets

    @staticmethod
    def mark(layer):
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_"):
                parameter.added = LoRA.name
        return layer

    @classmethod
    def linear(cls, config, n_in, n_out, target, bias=True):
        """A linear layer, with a low-rank update if LoRA updates `target`."""
        if not cls.updates(config, target):
            return nn.Linear(n_in, n_out, bias)
        return cls.mark(loralib.Linear(n_in, n_out, bias=bias, r=config.lora_rank, lora_alpha=config.lora_alpha,
                                       lora_dropout=config.lora_dropout, merge_weights=False))

    @classmethod
    def qkv_linear(cls, config, width):
        """GPT-2's fused projection to queries, keys and values, with low-rank updates of those among the targets."""
        enabled = [cls.updates(config, target) for target in "qkv"]
        if not any(enabled):
            return nn.Linear(width, 3 * width)
        return cls.mark(loralib.MergedLinear(width, 3 * width, r=config.lora_rank, enable_lora=enabled, lora_alpha=config.lora_alpha,
                                             lora_dropout=config.lora_dropout, merge_weights=False))

    @classmethod
    def embedding(cls, config, rows, width, target):
        if not cls.updates(config, target):
            return nn.Embedding(rows, width)
        return cls.mark(loralib.Embedding(rows, width, r=config.lora_rank, lora_alpha=config.lora_alpha, merge_weights=False))


class Adapter(Kind, nn.Module):
    """A bottleneck after a sublayer, starting as the identity (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751)."""

    name = "adapters"

    @dataclass
    class Options:
        adapter_dim: int = option(0, "bottleneck width of adapters; 0: none")
        adapter_places: tuple = option(SUBLAYERS, f"sublayers followed by an adapter, of {' '.join(SUBLAYERS)}")

    def __init__(self, width, dim):
        super().__init__()
        self.down = nn.Linear(width, dim)
        self.up = nn.Linear(dim, width)

    def start(self):
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + self.up(F.gelu(self.down(x)))

    @classmethod
    def at(cls, config, place, width):
        return cls(width, config.adapter_dim) if config.adapter_dim and place in config.adapter_places else None

    @staticmethod
    def check(config):
        known("place of adapters", config.adapter_places, SUBLAYERS)


class Prefix(Kind, nn.Module):
    """Keys and values of P learned positions in every layer (prefix-tuning: Li and Liang 2021, https://arxiv.org/abs/2101.00190).

    With `prefix_hidden`, they are the output of an MLP, which makes training more stable, as in the paper; it is dropped after training.
    """

    name = "prefix"

    @dataclass
    class Options:
        prefix_length: int = option(0, "positions of prefix-tuning: learned keys and values in every layer; 0: none")
        prefix_hidden: int = option(0, "width of the MLP that computes the prefix in training; 0: none")

    def __init__(self, config, n_layer, width):
        super().__init__()
        self.shape, self.hidden = (n_layer, 2, config.prefix_length, width), config.prefix_hidden
        if self.hidden:
            self.tokens = nn.Embedding(config.prefix_length, width)
            self.mlp = nn.Sequential(nn.Linear(width, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 2 * n_layer * width))
        else:
            self.values = nn.Parameter(0.1 * torch.randn(self.shape))

    def start(self):
        if self.hidden:
            nn.init.normal_(self.tokens.weight)
            nn.init.normal_(self.mlp[0].weight, std=self.mlp[0].in_features**-0.5)

    def forward(self):
        """Keys and values of all layers: (layers, 2, P, C)"""
        if not self.hidden:
            return self.values
        layers, _, length, width = self.shape
        return self.mlp(self.tokens.weight).view(length, layers, 2, width).permute(1, 2, 0, 3)

    def saved(self):
        """The tensors to store in a checkpoint: the MLP's output, not the MLP."""
        with torch.no_grad():
            return {"values": self().detach().contiguous()}


class Prompt(Kind, nn.Embedding):
    """P learned embeddings before the text (prompt tuning: Lester et al. 2021, https://arxiv.org/abs/2104.08691)."""

    name = "prompt"

    @dataclass
    class Options:
        prompt_length: int = option(0, "positions of prompt tuning: learned embeddings before the text; 0: none")


class IA3(Kind, nn.Module):
    """Learned factors for keys, values and the MLP's inner activations, initialised to one (Liu et al. 2022,
    https://arxiv.org/abs/2205.05638): a hundredth of LoRA's parameters."""

    name = "IA3"

    @dataclass
    class Options:
        ia3: bool = option(False, "IA3: learned factors for keys, values and the MLP's inner activations")

    def __init__(self, width):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.factors

    @classmethod
    def at(cls, config, place, width):
        return cls(width) if config.ia3 and place in ACTIVATIONS else None


KINDS = LoRA, Adapter, Prefix, Prompt, IA3


@dataclass
class PeftConfig(*(kind.Options for kind in reversed(KINDS))):
    """The options of all kinds; the defaults are the embedded captioner's."""

    def __post_init__(self):
        for field in fields(PeftConfig):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from the command line or a checkpoint
                setattr(self, field.name, tuple(value))
            elif isinstance(value, (int, float)) and value < 0:
                raise UserError(f"{field.name} is {value}, but must be at least 0")
        for kind in KINDS:
            kind.check(self)

    @classmethod
    def off(cls, **options):
        """A configuration with only these options; without any, no PEFT."""
        return cls(**{"lora_rank": 0} | options)


def known(what, names, choices):
    if unknown := set(names) - set(choices):
        raise UserError(f"unknown {what} {sorted(unknown)[0]}: choose from {', '.join(choices)}")


def at(config, place, width):
    """The modules of all kinds at a place in a layer, for activations of this width, as one; the identity if there are none."""
    modules = [mark(module, kind.name) for kind in KINDS if (module := kind.at(config, place, width)) is not None]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules) if modules else nn.Identity()
