"""Train a small GPT-2 on captions without images, as the captioner's pretrained decoder.

    python3 p2_pretrain_decoder.py --text flickr30k.txt coco.txt --captions data/train.json

Writes a state dict in the Hugging Face layout (fp16), which GPT2LMHeadModel loads as well. The same command
resumes an interrupted run.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save

from cli import ArgumentParser, UserError, add_options, check_settings, option, run, take_options
from dataset import IGNORE, bucketed_batches, clean_caption, collate, read_captions
from decoder import Decoder, DecoderConfig
from devices import Processes, autocast, pick_device
from files import read_lines, write_whole
from tokenizer import END_OF_TEXT, VOCAB_SIZE, BPETokenizer
from training import Run, adamw, cosine, prepare_output


@dataclass
class Settings:
    output: str = "checkpoints/decoder_small.safetensors"
    init: str = option("", "weights of a decoder of the same size to start from; empty: random")
    n_layer: int = 6
    n_embd: int = 256
    n_positions: int = 128
    dropout: float = 0.0
    epochs: int = 1
    batch_size: int = option(64, "captions per batch")
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup: float = option(0.03, "fraction of all steps")
    clip: float = option(1.0, "maximum gradient norm; 0: no clipping")
    held_out: int = option(500, "images at the end of each captions file that are left out, as p2_train.py selects on them")
    min_count: int = option(5, "leave out captions with a token that occurs less often, since each token costs a row of the head")
    seed: int = 0

    def __post_init__(self):
        check_settings(self, ("n_layer", "n_embd", "n_positions", "epochs", "batch_size"), ("dropout", "warmup"))


def read_texts(text_files, caption_files, held_out):
    """Cleaned captions without duplicates: (training texts, held-out texts); no text is in both."""
    texts, kept_out = [], []
    for file in caption_files:
        images = read_captions(file, None)
        if len(images) <= held_out:
            raise UserError(f"{file} has {len(images)} images, no more than the {held_out} that are held out")
        split = len(images) - held_out
        texts += [caption for image in images[:split] for caption in image.captions]
        kept_out += [caption for image in images[split:] for caption in image.captions]
    for file in text_files:
        texts += read_lines(file)
    kept_out = dict.fromkeys(filter(None, map(clean_caption, kept_out)))
    texts = dict.fromkeys(filter(None, map(clean_caption, texts)))
    forbidden = {letters(text) for text in kept_out}
    return [text for text in texts if letters(text) not in forbidden], list(kept_out)


def letters(text):
    """Letters and digits in lower case, to compare captions regardless of case and punctuation."""
    return "".join(character for character in text.lower() if character.isalnum())


def drop_rare(rows, min_count):
    """The token lists in which every token occurs at least `min_count` times overall."""
    counts = Counter(token for row in rows for token in row)
    return [row for row in rows if all(counts[token] >= min_count for token in row)]


class SeenTokens:
    """The exact softmax over the whole vocabulary at the cost of only the tokens that occur.

    A token that never occurs in training is never a target and, as an input, gets no gradient. If its embedding is zero,
    its logit is always 0, and all such tokens together add count * exp(0) to the softmax's denominator: one more term, with
    the logit log(count). So a decoder of only the seen tokens is trained, and `whole_table` extends its embedding table to
    all 50,257 rows, as any GPT-2 expects.
    """

    def __init__(self, rows, vocab_size=VOCAB_SIZE):
        self.ids = torch.tensor(sorted({token for row in rows for token in row} | {END_OF_TEXT}))
        self.column_of = torch.full((vocab_size,), IGNORE)
        self.column_of[self.ids] = torch.arange(len(self.ids))
        self.unseen = vocab_size - len(self.ids)

    def to(self, device):
        self.ids, self.column_of = self.ids.to(device), self.column_of.to(device)
        return self

    def loss(self, decoder, tokens, targets, reduction="mean"):
        """Cross-entropy of next tokens, from ids of tokens and targets (R, T); IGNORE: no target."""
        used = targets != IGNORE
        logits = F.linear(decoder.hidden(self.column_of[tokens])[used], decoder.head_weight()).float()
        denominator = logits.logsumexp(-1)
        if self.unseen:
            denominator = torch.logaddexp(denominator, denominator.new_tensor(math.log(self.unseen)))
        losses = denominator - logits.gather(1, self.column_of[targets[used]][:, None]).squeeze(1)
        return losses.mean() if reduction == "mean" else losses.sum()

    def whole_table(self, table):
        """Embeddings of the seen tokens (len(ids), C) -> of all tokens (vocab_size, C), zero for unseen ones."""
        whole = table.new_zeros(len(self.column_of), table.shape[1])
        whole[self.ids] = table
        return whole


@torch.no_grad()
def start_from(path, decoder, seen):
    """Initialise a decoder with another's weights; tokens that the other never saw keep their random embeddings.

    Returns the hash of those weights. Raises UserError if they are of another size.
    """
    known = Decoder.from_pretrained(path)
    state = known.state_dict()
    table = state.pop("wte.weight")
    sizes = [(model.config.n_layer, model.config.n_embd, model.config.n_positions) for model in (known, decoder)]
    if sizes[0] != sizes[1] or len(table) < VOCAB_SIZE:
        raise UserError(f"{path} is of another size: layers, width and positions are {sizes[0]}, not {sizes[1]}, "
                        f"for {len(table)} tokens")
    decoder.load_state_dict(state, strict=False)
    rows = table[seen.ids]
    decoder.wte.weight.copy_(torch.where(rows.any(1, keepdim=True), rows, decoder.wte.weight))
    return known.weights_hash


@torch.inference_mode()
def perplexity(decoder, seen, rows, device, batch_size=256):
    """Perplexity per token, including <|endoftext|>, on the rows whose tokens all occur in training."""
    decoder.eval()
    total = count = 0
    known = set(seen.ids.tolist())
    rows = sorted((row for row in rows if known.issuperset(row)), key=len)
    for start in range(0, len(rows), batch_size):
        tokens, targets = (x.to(device) for x in collate(rows[start:start + batch_size]))
        with autocast(device):
            total += seen.loss(decoder, tokens, targets, "sum").item()
        count += (targets != IGNORE).sum().item()
    decoder.train()
    return math.exp(total / count) if count else math.nan


def train(settings, text_files, caption_files, device=None):
    """Train and write the decoder. Returns the perplexity on the held-out captions after each epoch; None if interrupted (the
    state for resuming is saved)."""
    device = device or pick_device()
    state_file = prepare_output(settings.output)
    texts, kept_out = read_texts(text_files, caption_files, settings.held_out)
    if not texts:
        raise UserError("there is nothing to train on: name --text or --captions files")
    tokenizer = BPETokenizer()
    limit = settings.n_positions - 1
    rows, held_out_rows = ([row[:limit] for row in tokenizer.encode_batch(part)] for part in (texts, kept_out))

    rows = drop_rare(rows, settings.min_count)
    if not rows:
        raise UserError(f"every caption has a token that occurs fewer than {settings.min_count} times: lower --min_count")

    torch.manual_seed(settings.seed)
    seen = SeenTokens(rows).to(device)
    decoder = Decoder(DecoderConfig(vocab_size=len(seen.ids), n_layer=settings.n_layer, n_embd=settings.n_embd,
                                    n_positions=settings.n_positions, dropout=settings.dropout))
    first = start_from(settings.init, decoder, seen) if settings.init else ""
    decoder.to(device).train()
    parameters = dict(decoder.named_parameters())
    optimizer = adamw([(parameters.values(), 1.0)], settings.learning_rate, settings.weight_decay)
    lengths = [len(row) for row in rows]
    steps = -(-len(rows) // settings.batch_size)
    total = steps * settings.epochs
    print(f"{len(rows)} captions, {sum(lengths)} tokens, {len(seen.ids)} of them different; "
          f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f}M parameters; {device}")

    same = {**asdict(settings), "captions": len(rows), "tokens": sum(lengths), "first weights": first}
    run = Run(state_file, same, parameters, optimizer, processes=Processes(device), clip=settings.clip,
              first={"perplexity": []})
    scores = run.progress["perplexity"]
    with run:
        for epoch in range(len(scores), settings.epochs):
            generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
            batches = bucketed_batches(lengths, settings.batch_size, generator)
            for step in run.steps((epoch + 1) * steps, epoch * steps, f"epoch {epoch + 1}/{settings.epochs}"):
                tokens, targets = (x.to(device) for x in collate([rows[i] for i in batches[step - epoch * steps]]))
                with autocast(device):
                    loss = seen.loss(decoder, tokens, targets)
                loss.backward()
                rate = settings.learning_rate * cosine(step, total, max(1, int(settings.warmup * total)))
                run.update(rate, len(tokens), loss=loss.item())
            if run.stopped:
                return None
            scores.append(perplexity(decoder, seen, held_out_rows, device))
            if held_out_rows:
                print(f"epoch {epoch + 1}: perplexity {scores[-1]:.2f} on the held-out captions whose tokens all occur in training")
            run.save()
    state = decoder.pretrained_state()
    state["wte.weight"] = seen.whole_table(state["wte.weight"])
    # safetensors refuses transposed views, hence the copies; fp16 halves the file.
    state = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in state.items()}
    write_whole(settings.output, save(state, {"format": "pt"}))
    run.finish(["loss"])
    return scores if held_out_rows else []


def main():
    parser = ArgumentParser(description="Train a small GPT-2 as a language model of captions.")
    parser.add_argument("--text", nargs="*", default=[], help="files with one caption a line")
    parser.add_argument("--captions", nargs="*", default=[], help="COCO-format captions files")
    add_options(parser, Settings)
    arguments = parser.parse_args()
    train(take_options(arguments, Settings), arguments.text, arguments.captions)


if __name__ == "__main__":
    run(main)
