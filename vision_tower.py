"""Our frozen image encoders, and BLIP-2's, as vision towers of `transformers`. Importing this module registers them with its Auto classes.

    import vision_tower
    model = LlavaForConditionalGeneration.from_pretrained("weights/llava_small")

A tower is either an encoder of encoder.py, optionally with its patches averaged to a coarser grid, so that the language model gets fewer
tokens, and with trained transformer layers on top; or the vision model of a BLIP-2 (Li et al. 2023, https://arxiv.org/abs/2301.12597)
with its Q-Former, whose query tokens do not correspond to patches.

Shapes: B pictures, S pixels a side, N tokens, D channels of each.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BatchFeature,
    Blip2Config,
    Blip2QFormerModel,
    Blip2VisionModel,
    BlipImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import BaseModelOutput

from cli import UserError
from encoder import ImageEncoder, kept_networks, load_encoder
from files import content_hash
from images import resize_to_square
from runtime import CompiledEncoder


class EncoderVisionConfig(PreTrainedConfig):
    """Configuration of an encoder as a tower, with the names that transformers' LLaVA expects.

    Args:
        encoder: a name for encoder.py: a timm model, or several joined by `+`.
        encoder_levels: number of feature maps that become tokens, as in encoder.py.
        image_size: S.
        side: rows and columns of tokens: N is its square.
        hidden_size: D.
        num_hidden_layers: transformer layers on top of the encoder, of D // 64 heads each; 0: none.
        dropout: in these layers, in training.
    """

    model_type = "frozen_image_encoder"

    encoder: str = ""
    encoder_levels: int = 1
    image_size: int = 288
    side: int = 9
    hidden_size: int = 1
    num_hidden_layers: int = 0
    dropout: float = 0.0

    @property
    def patch_size(self):
        """Side length in pixels of a token's image region, rounded down."""
        return self.image_size // self.side


class EncoderVisionModel(PreTrainedModel):
    """An image encoder with the interface of a vision model of `transformers`: pixels from EncoderImageProcessor -> N tokens.

    Weights are random until loaded from a folder; `of_encoder` uses a pretrained encoder.
    """

    config_class = EncoderVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True  # any that the language model uses

    def __init__(self, config):
        super().__init__(config)
        with torch.device("cpu"):  # from_pretrained builds on the meta device, but building an encoder runs it
            self.encoder = load_encoder(config.encoder, config.image_size, config.encoder_levels, "random")
        if config.num_hidden_layers:
            dim = config.hidden_size
            self.entry = nn.Sequential(nn.LayerNorm(self.encoder.dim), nn.Linear(self.encoder.dim, dim))
            self.positions = nn.Parameter(torch.zeros(config.side ** 2, dim))
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(dim, max(1, dim // 64), 4 * dim, config.dropout, "gelu", batch_first=True, norm_first=True)
                for _ in range(config.num_hidden_layers))
            self.norm = nn.LayerNorm(dim)
        self.post_init()

    @classmethod
    def of_encoder(cls, name, image_size=None, side=0, weights=None, layers=0, width=512, dropout=0.0, seed=0):
        """The tower of an encoder by its name. Raises UserError if its patches cannot be averaged to this grid.

        Args:
            side: rows and columns of tokens; 0: the encoder's patches.
            layers, width: number and channels of transformer layers on top of the encoder, randomly initialised with `seed`.
        """
        encoder = load_encoder(name, image_size, weights=weights)
        if encoder.grid[0] != encoder.grid[1] or side > encoder.grid[0]:
            raise UserError(f"{name} has {encoder.grid[0]} x {encoder.grid[1]} patches, of which {side} x {side} tokens cannot be made")
        config = EncoderVisionConfig(encoder=name, encoder_levels=encoder.levels, image_size=encoder.image_size,
                                     side=side or encoder.grid[0], hidden_size=width if layers else encoder.dim,
                                     num_hidden_layers=layers, dropout=dropout)
        torch.manual_seed(seed)
        model = cls(config)
        model.encoder = encoder
        return model.eval()

    def compile_encoder(self):
        """Run the encoder in OpenVINO, which is faster on a CPU: the same tokens to 1e-4. For inference only."""
        encoder, config = self.encoder, self.config
        weights = content_hash({f"{number}.{name}": value for number, part in enumerate(getattr(encoder, "parts", [encoder]))
                                for name, value in part.model.state_dict().items()})
        self.encoder = CompiledEncoder([config.encoder, config.image_size, config.encoder_levels, weights], lambda: encoder, kept_networks())

    def own_parameters(self):
        """The parameters of the layers on top, without the frozen encoder's."""
        return [value for name, value in self.named_parameters() if not name.startswith("encoder.")]

    def _init_weights(self, module):
        """Set the buffers that are in no file: the pixels' mean and standard deviation that an encoder normalises with."""
        if isinstance(module, ImageEncoder):
            module.reset_buffers()

    def forward(self, pixel_values, **options):
        """Pixels from 0 to 255 (B, 3, S, S) -> a BaseModelOutput with tokens (B, N, D), row by row, and each layer's output.

        The encoder's features (B, its tokens, D) are accepted in place of pixels.
        """
        side = self.config.side
        if pixel_values.ndim == 3:
            tokens = pixel_values
        else:
            tokens = self.encoder(pixel_values if self.encoder.runtime == "torch" else pixel_values.to(torch.uint8))
        tokens = tokens[:, self.encoder.num_prefix_tokens:]
        if self.encoder.grid[0] != side:
            grid = tokens.transpose(1, 2).unflatten(2, tuple(self.encoder.grid))
            tokens = F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)
        if not self.config.num_hidden_layers:
            return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))
        states = [self.entry(tokens.to(self.positions.dtype)) + self.positions]
        for layer in self.layers:
            states.append(layer(states[-1]))
        states[-1] = self.norm(states[-1])
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


class QFormerVisionConfig(PreTrainedConfig):
    """Configuration of a tower of BLIP-2's vision model and Q-Former.

    Args:
        blip2: the BLIP-2's configuration, as a dict.
    """

    model_type = "qformer_image_encoder"

    blip2: dict | None = None
    image_size: int = 224
    hidden_size: int = 768
    num_image_tokens: int = 32
    num_hidden_layers: int = 0

    @property
    def patch_size(self):
        """The whole picture, since a query token does not correspond to a region."""
        return self.image_size


class QFormerVisionModel(PreTrainedModel):
    """BLIP-2's vision model and its Q-Former: pixels -> one token per query.

    Its parts have the same names as in a BLIP-2, so that from_pretrained can load them from one.
    """

    config_class = QFormerVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        blip2 = Blip2Config(**config.blip2)
        self.vision_model = Blip2VisionModel._from_config(blip2.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, blip2.num_query_tokens, blip2.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(blip2.qformer_config)
        self.post_init()

    @classmethod
    def of_blip2(cls, name):
        """The tower of a BLIP-2, given by a folder or a name on the model hub."""
        blip2 = AutoConfig.from_pretrained(name)
        config = QFormerVisionConfig(blip2=blip2.to_dict(), image_size=blip2.vision_config.image_size,
                                     hidden_size=blip2.qformer_config.hidden_size, num_image_tokens=blip2.num_query_tokens)
        return cls.from_pretrained(name, config=config, dtype=torch.float32).eval()

    def forward(self, pixel_values, **options):
        """Pixels (B, 3, S, S) -> a BaseModelOutput with tokens (B, N, D) as its last and only state."""
        seen = self.vision_model(pixel_values=pixel_values).last_hidden_state
        tokens = self.qformer(query_embeds=self.query_tokens.expand(len(seen), -1, -1), encoder_hidden_states=seen,
                              encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)).last_hidden_state
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


class EncoderImageProcessor(BaseImageProcessor):
    """Preprocesses a picture for the encoders: the whole of it, resized to a square by resize_to_square, from 0 to 255.

    Args:
        size: {"height": S, "width": S}
    """

    model_input_names = ["pixel_values"]
    do_resize, do_center_crop = True, False

    def __init__(self, size=None, **options):
        super().__init__(**options)
        self.size = size or {"height": 288, "width": 288}

    def preprocess(self, images, return_tensors=None, **options):
        """PIL images, or arrays (rows, columns, 3) of bytes -> {"pixel_values": float32 (B, 3, S, S)}."""
        pictures = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
                    for image in make_flat_list_of_images(self.fetch_images(images))]
        pixels = [resize_to_square(picture.convert("RGB"), self.size["height"]).float().numpy() for picture in pictures]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


for config, model, processor in ((EncoderVisionConfig, EncoderVisionModel, EncoderImageProcessor),
                                 (QFormerVisionConfig, QFormerVisionModel, BlipImageProcessor)):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoImageProcessor.register(config, image_processor_classes=dict.fromkeys(("pil", "torchvision"), processor))
