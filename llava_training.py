"""Build a LLaVA from two pretrained models, select its trained parameters, compute its loss, and write its folder."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from cli import UserError, option
from dataset import IGNORE
from encoder import architecture_of
from files import content_hash, first_line, make_ordinary, read_weights
from llava import LOADING_ERRORS, without_bos
from masks import attention_mask

CHECKPOINTED = 2e9  # parameters; larger language models are trained through with gradient checkpointing
# Without a chat template: the text before and after each query. An answer ends with the end-of-text token.
LLAMA_FORM = "[INST] ", " [/INST]"
PLAIN_FORM = "", "\n"
FOLDER_README = """\
A LLaVA whose vision tower is a frozen image encoder that `transformers` does not know of itself. With vision_tower.py of the
repository that wrote this folder, and the modules beside it, on Python's path:

    import vision_tower
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Without that import `transformers` ends with an error that names the model type `frozen_image_encoder`.
"""


@dataclass
class LlavaOptions:
    """How a vision model and a language model are joined."""

    projection: str = option("mlp", "linear, or mlp: two layers")
    image_size: int = option(0, "pixels a side; 0: the vision model's own")
    vision_layer: int = option(-1, "whose output is projected; -1: the last")
    side: int = option(0, "of a frozen encoder: average its patches to so many rows and columns of image tokens; 0: do not")
    own_layers: int = option(0, "of a frozen encoder: add so many trained transformer layers on top")
    own_width: int = option(512, "width of those layers")
    own_dropout: float = option(0.1, "in those layers, in training")
    train_vision_layers: int = option(0, "of other vision models: also train so many layers, up to `vision_layer`")
    seed: int = 0


def build(vision_name, language_name, settings):
    """A LlavaForConditionalGeneration of two pretrained models and a fresh projection, and its processor. Raises UserError."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    try:
        vision, image_processor = read_vision(str(vision_name), settings)
        language = AutoModelForCausalLM.from_pretrained(language_name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(language_name)
    except LOADING_ERRORS as error:
        raise UserError(f"{vision_name} with {language_name} cannot be loaded as a vision and a causal language model: "
                        f"{first_line(error)}") from None
    size, patch, prefix_tokens, image_tokens = check_vision(vision, vision_name, settings)
    check_language(language, language_name)
    # No cropping: the whole picture is resized to the square.
    image_processor.do_center_crop, image_processor.do_resize = False, True
    image_processor.size = {"height": size, "width": size}

    torch.manual_seed(settings.seed)  # the embeddings of new tokens and the projection are random
    token = image_token(tokenizer)
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    select = "default" if prefix_tokens else "full"
    config = LlavaConfig(
        vision_config=vision.config, text_config=language.config, image_token_index=tokenizer.convert_tokens_to_ids(token),
        image_seq_length=image_tokens, projector_hidden_act="gelu" if settings.projection == "mlp" else "linear",
        vision_feature_select_strategy=select, vision_feature_layer=settings.vision_layer,
        tie_word_embeddings=language.config.tie_word_embeddings)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, language.model, language.lm_head
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    for layer in projector.linear_1, projector.linear_2:
        layer.reset_parameters()
    if settings.projection == "linear":  # without an activation and with the identity as second layer, two layers are one
        torch.nn.init.eye_(projector.linear_2.weight)
        torch.nn.init.zeros_(projector.linear_2.bias)
    # Not the language model's own, which may sample, or have other end tokens.
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    processor = LlavaProcessor(image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy=select,
                               chat_template=chat_template(tokenizer, language.config.model_type, token),
                               image_token=token, num_additional_image_tokens=prefix_tokens + image_tokens - (size // patch) ** 2)
    return model, processor


def read_vision(name, settings):
    """A vision model by a folder, a name on the hub, a ViT's file or an encoder's name, and its image processor."""
    from timm import is_model
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    from vision_tower import EncoderImageProcessor, EncoderVisionModel, QFormerVisionModel

    if not Path(name).exists() and all(is_model(architecture_of(part)) for part in name.split("+")):
        vision = EncoderVisionModel.of_encoder(name, settings.image_size or None, settings.side, layers=settings.own_layers,
                                               width=settings.own_width, dropout=settings.own_dropout, seed=settings.seed)
        return vision, EncoderImageProcessor()
    if settings.side or settings.own_layers:
        option = "--side" if settings.side else "--own_layers"
        raise UserError(f"{option} is for encoders that are named, such as tf_efficientnet_lite2, and {name} is none")
    with TemporaryDirectory() as folder:
        if Path(name).suffix == ".safetensors":
            from vit_student import write_dinov2

            write_dinov2(name, folder, settings.image_size or 224)
        else:
            folder = name
        if AutoConfig.from_pretrained(folder).model_type == "blip-2":
            return QFormerVisionModel.of_blip2(folder), AutoImageProcessor.from_pretrained(folder)
        vision = AutoModel.from_pretrained(folder, dtype=torch.float32)
        return getattr(vision, "vision_model", vision), AutoImageProcessor.from_pretrained(folder)  # of a CLIP, its vision half


def check_vision(model, name, settings):
    """(image size, patch size, number of tokens before the patches, number of image tokens) of a vision model. Raises UserError if it
    cannot be used."""
    patch, depth = getattr(model.config, "patch_size", None), getattr(model.config, "num_hidden_layers", 0)
    if not isinstance(patch, int) or not hasattr(model.config, "hidden_size"):
        raise UserError(f"{name} has no square patches: it is no vision transformer")
    size = settings.image_size or model.config.image_size
    if size % patch and not is_encoder(model):
        raise UserError(f"--image_size is {size}, but must be a multiple of the patches' {patch} pixels")
    if not -depth - 1 <= settings.vision_layer <= depth:
        raise UserError(f"--vision_layer is {settings.vision_layer}, but {name} has {depth} layers")
    if settings.train_vision_layers > layers_used(depth, settings.vision_layer):
        raise UserError(f"--train_vision_layers is {settings.train_vision_layers}, but --vision_layer comes after "
                        f"{layers_used(depth, settings.vision_layer)} layers of {name}")
    try:
        with torch.inference_mode():
            tokens = model(torch.zeros(1, 3, size, size)).last_hidden_state.shape[1]
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name} does not take {size} pixels: {first_line(error)}") from None
    if tokens == getattr(model.config, "num_image_tokens", None):  # image tokens that are not patches
        return size, patch, 0, tokens
    prefix_tokens = tokens - (size // patch) ** 2
    if prefix_tokens not in (0, 1):
        raise UserError(f"{name} has {prefix_tokens} tokens before those of its patches, where LLaVA knows a class token alone")
    return size, patch, prefix_tokens, tokens - prefix_tokens


def layers_used(depth, vision_layer):
    """The number of layers of the vision model whose output is used."""
    return vision_layer if vision_layer >= 0 else depth + 1 + vision_layer


def check_language(model, name):
    """Raise UserError unless transformers' LLaVA computes with this language model as the model itself does."""
    config, inner = model.config, getattr(model, "model", None)
    if not hasattr(inner, "embed_tokens") or not hasattr(inner, "layers") or not hasattr(model, "lm_head"):
        raise UserError(f"{name} ({config.model_type}) is not built as LLaVA needs it: choose one such as Llama, Qwen or Gemma 3")
    scales = [key for key in ("logit_scale", "logits_scaling", "final_logit_softcapping") if getattr(config, key, None)]
    if scales or model.lm_head.bias is not None:
        raise UserError(f"{name} ({config.model_type}) changes its logits by {scales[0] if scales else 'a bias'}, which LLaVA "
                        "leaves out")
    if strange := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{name} ({config.model_type}) has layers of {min(strange)}, which cannot tell a picture's questions "
                        "apart")


@torch.no_grad()
def fit_projection(model, pixel_values):
    """Adapt the scales of a new projection to the models it connects, using some pictures (B, 3, S, S).

    The channels of the vision tower, and those that enter a tower's own layers, are normalised to mean 0 and deviation 1, since some channels
    of a DINOv2 are ten times as large as others. Image tokens are scaled to the size of word embeddings, which training needs.
    """
    tower = model.model.vision_tower
    if is_encoder(tower) and tower.config.num_hidden_layers:
        seen = []
        with tower.entry[0].register_forward_hook(lambda norm, inputs, output: seen.append(output)):
            tower(pixel_values)
        tower.entry[0].weight /= seen[0].std((0, 1)) + 1e-6
        tower.entry[0].bias -= seen[0].mean((0, 1)) * tower.entry[0].weight
    projector, hidden = model.model.multi_modal_projector, patch_features(model, pixel_values)
    first = projector.linear_1
    first.weight /= hidden.std((0, 1)) + 1e-6
    first.bias -= first.weight @ hidden.mean((0, 1))
    words = model.get_input_embeddings()(torch.arange(min(1000, model.config.text_config.vocab_size)))
    scale_image_tokens(model, words.std() / projector(hidden).std())


@torch.no_grad()
def scale_image_tokens(model, factor):
    """Multiply the projection's output by a factor."""
    projector = model.model.multi_modal_projector
    last = projector.linear_1 if model.config.projector_hidden_act == "linear" else projector.linear_2
    for part in last.weight, last.bias:
        part *= factor


def patch_features(model, pixel_values):
    """Pixels, as the image processor gives them -> the projection's input for each patch (B, N, D), without a class token."""
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    return hidden[:, hidden.shape[1] - model.config.image_seq_length:]


def image_tokens(model, pixel_values):
    """Pixels, as the image processor gives them -> image tokens for the language model (B, N, C)."""
    return model.model.multi_modal_projector(patch_features(model, pixel_values))


def image_token(tokenizer):
    """The placeholder token for a patch: <image>, an unused token of the vocabulary, or else a new one."""
    vocabulary = tokenizer.get_vocab()
    token = next((token for token in ("<image>", "<unused0>", "<|reserved_special_token_0|>") if token in vocabulary), "<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return token


def query_form(tokenizer, kind):
    """The text before and after a query: from the tokenizer's chat template, Llama-2's, or else a line break."""
    if not tokenizer.chat_template:
        return LLAMA_FORM if kind == "llama" else PLAIN_FORM
    said = tokenizer.apply_chat_template([{"role": "user", "content": "QUERY"}], tokenize=False, add_generation_prompt=True)
    before, *after = said.split("QUERY")
    if len(after) != 1:
        raise UserError("the language model's chat template does not give a query as it is: delete it from the tokenizer")
    return without_bos(before, tokenizer), after[0] or "\n"


def chat_template(tokenizer, kind, token):
    """A Jinja chat template for the processor: turns of queries, each with its pictures first, and answers."""
    before, after = (json.dumps(part) for part in query_form(tokenizer, kind))
    end = json.dumps(tokenizer.eos_token)
    return ("{% for message in messages %}{% if message['role'] == 'user' %}{{ " + before + " }}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ " + json.dumps(token) + " }}"
            "{% elif part['text'] %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{{ " + after + " }}"
            "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ " + end + " }}{% endif %}{% endfor %}")


def trained_parameters(model, vision_layers):
    """Freeze everything except the projection, the last `vision_layers` used of the vision tower, and the layers added to a frozen
    encoder. Returns {name: parameter} of these."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    chosen = [*projector.parameters()]
    if model.config.projector_hidden_act == "linear":
        chosen = [*projector.linear_1.parameters()]
    if is_encoder(model.model.vision_tower):
        chosen += model.model.vision_tower.own_parameters()
    elif vision_layers:
        used = layers_used(model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer)
        last = tuple(f".{number}." for number in range(used - vision_layers, used))
        for name, parameter in model.model.vision_tower.named_parameters():
            if any(number in name for number in last) and ("layer." in name or "layers." in name):
                chosen.append(parameter)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_layers(model):
    """Gradient checkpointing of a large language model's layers (Chen et al. 2016, https://arxiv.org/abs/1604.06174): what they compute
    within is computed again for the backward pass, and not kept: the same gradients for a third more work and a fraction of the memory."""
    language = model.model.language_model
    if sum(parameter.numel() for parameter in language.parameters()) < CHECKPOINTED:
        return
    older = getattr(language, "gradient_checkpointing_enable", None)  # its name until transformers 6
    getattr(language, "activation_checkpointing_enable", older)({"use_reentrant": False})
    for layer in language.layers:
        layer.training = True  # which transformers asks for; what is within stays in evaluation mode, without dropout


def answer_loss(model, inputs, likely=None, drawn=None):
    """The weighted sum of the cross-entropies of the answers' tokens, each given its picture and the tokens before it in its branch.

    Args:
        inputs: input_ids, position_ids, branches, labels and weights (B, T), as `llava_data.Rows.collate` gives them; pixel_values (B, 3, S, S).
        likely, drawn: as of `sampled_cross_entropy`; None: the softmax over all tokens.
    The head is computed only for the answers' positions: with a large vocabulary it would cost more than all layers.
    """
    mask = attention_mask(model.config.text_config, inputs["branches"], inputs["position_ids"])
    hidden = model.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask,
                         pixel_values=inputs["pixel_values"], use_cache=False).last_hidden_state[:, :-1]
    labels = inputs["labels"][:, 1:]
    learned = labels != IGNORE
    if likely is None:
        losses = F.cross_entropy(model.lm_head(hidden[learned]).float(), labels[learned], reduction="none")
    else:
        losses = sampled_cross_entropy(hidden[learned], labels[learned], model.lm_head.weight, likely, drawn)
    return losses @ inputs["weights"][:, 1:][learned]


def sampled_cross_entropy(hidden, targets, head, likely, drawn):
    """Cross-entropy with a sampled softmax over the whole vocabulary, for each target: (n).

    The softmax's denominator is exact for the tokens `likely`, and estimated for the others from a uniform sample, `drawn`
    (importance sampling: Bengio and Senécal 2008, https://doi.org/10.1109/TNN.2007.912312).

    Args:
        hidden: (n, C). targets: (n), all of them in `likely`. head: (V, C).
        likely: sorted token ids. drawn: distinct ids of others.
    """
    logits = F.linear(hidden, head[torch.cat([likely, drawn])]).float()
    if len(drawn):
        logits[:, len(likely):] += math.log((len(head) - len(likely)) / len(drawn))
    return F.cross_entropy(logits, torch.searchsorted(likely, targets), reduction="none")


def write_llava(model, processor, folder, trained, training):
    """Write a model of `build` with the trained parameters as a folder of transformers, in fp16, and beside it the trained parameters and
    settings alone; all or nothing."""
    model.load_state_dict(trained, strict=False)
    staging = folder.with_name(f"{folder.name}.tmp")
    for part in model.model.children():
        if not is_encoder(part):  # an encoder stays in fp32, so that its features do not change
            part.half()
    model.lm_head.half()
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    if is_encoder(model.model.vision_tower):
        (staging / "README.md").write_text(FOLDER_README, encoding="utf-8")
    save_file(trained, staging / "trained.safetensors", {"training": json.dumps(training)})
    make_ordinary(*staging.glob("*.safetensors"))
    if folder.exists():
        folder.rmdir()  # it was empty
    staging.rename(folder)
    print(f"wrote {folder}", flush=True)


def check_folder(folder):
    """Raise UserError unless a new folder can be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: delete it or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder.parent}: {error.strerror}") from None


def assemble(vision_name, language_name, trained_file, folder):
    """Write the LLaVA made of two models and the trained.safetensors of an earlier run. Raises UserError."""
    check_folder(folder := Path(folder))
    trained, training = read_trained(trained_file)
    settings = LlavaOptions(**{field.name: training[field.name] for field in fields(LlavaOptions) if field.name in training})
    model, processor = build(vision_name, language_name, settings)
    check_trained(trained_file, trained, training, trained_parameters(model, settings.train_vision_layers),
                  frozen_hash(model, trained), (vision_name, language_name))
    write_llava(model, processor, folder, trained, training)


def read_trained(file):
    """A trained.safetensors -> {name: tensor} and the training settings. Raises UserError."""
    state = read_weights(file, "trained part of a LLaVA")
    with safe_open(file, "pt") as content:
        training = json.loads((content.metadata() or {}).get("training", "{}"))
    if "frozen weights" not in training:
        raise UserError(f"{file} is not the trained part of a LLaVA, as p4_align.py writes it")
    return state, training


def check_trained(file, state, training, parameters, frozen, names):
    """Raise UserError unless the output of `read_trained` matches these parameters, and was trained with these frozen weights."""
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in parameters.items()}:
        raise UserError(f"{file} does not fit {names[0]} with {names[1]}, or other layers were trained")
    if frozen != training["frozen weights"]:
        raise UserError(f"{file} was trained with other weights than those of {names[0]} with {names[1]}")


def frozen_hash(model, trained):
    """content_hash of all frozen weights except position embeddings, whose interpolation differs in bits between machines.

    The same holds for an encoder's folded batch norms, so the encoder's own hash is used.
    """
    tower = model.model.vision_tower
    left_out = ("model.vision_tower.",) if is_encoder(tower) else ()
    weights = content_hash({name: value for name, value in model.state_dict().items()
                            if name not in trained and "position_embedding" not in name and not name.startswith(left_out)})
    return f"{weights} {tower.encoder.weights_hash}" if is_encoder(tower) else weights


def is_encoder(part):
    """Whether a module is an EncoderVisionModel of vision_tower.py."""
    return getattr(part.config, "model_type", "") == "frozen_image_encoder" if hasattr(part, "config") else False
