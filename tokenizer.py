"""GPT-2's byte-level BPE (Radford et al. 2019), from `encoder.json` and `vocab.bpe`, by the `tokenizers` library."""

from functools import cache
from operator import index
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from cli import UserError
from files import read_json

END_OF_TEXT = 50256  # start and end of a caption, and padding
SPECIAL = "<|endoftext|>"
VOCAB_SIZE = 50257


class BPETokenizer:
    """Text to GPT-2 token ids and back; the ids are those of tiktoken's GPT-2 encoding."""

    def __init__(
        self,
        encoder_file=Path(__file__).with_name("encoder.json"),
        vocab_file=Path(__file__).with_name("vocab.bpe"),
    ):
        """Read the vocabulary (`encoder_file`, token to id) and the merges (`vocab_file`). Raises UserError if either is invalid."""
        self._bpe = read_bpe(encoder_file, vocab_file)
        self.eos_id = END_OF_TEXT

    def __len__(self):
        return VOCAB_SIZE

    def encode(self, text, allowed_special=None):
        """Token ids of `text`, a list of ints without start or end token.

        `<|endoftext|>` in the text is encoded as ordinary characters, or, if `allowed_special` is "all" or contains it,
        as the special token's id.
        """
        if allowed_special == "all" or SPECIAL in (allowed_special or ()):
            first, *rest = self.encode_batch(text.split(SPECIAL))
            return first + [token for part in rest for token in (END_OF_TEXT, *part)]
        return self._bpe.encode(well_formed(text)).ids

    def encode_batch(self, texts):
        """`[encode(text) for text in texts]`, in parallel."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast([well_formed(text) for text in texts])]

    def decode(self, tokens):
        """The text of `tokens`, a list, array or tensor of ids (T,). Bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for anything but integers from 0 to 50256.
        """
        try:
            tokens = [index(token) for token in (tokens.tolist() if hasattr(tokens, "tolist") else tokens)]
        except TypeError:
            raise ValueError(f"decode takes one flat list of token ids, not {tokens!r}") from None
        for token in tokens:
            if not 0 <= token < VOCAB_SIZE:  # the library would skip it silently
                raise ValueError(f"{token} is no token id: they run from 0 to {VOCAB_SIZE - 1}")
        return self._bpe.decode(tokens, skip_special_tokens=False)


@cache
def read_bpe(encoder_file, vocab_file):
    """The library's tokenizer from these two files, cached since reading takes a while. Raises UserError if either is invalid."""
    vocab = read_json(encoder_file, "tokenizer file")
    try:
        lines = Path(vocab_file).read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines[1:] if line]  # the first line is a version
    except FileNotFoundError:
        raise UserError(f"the tokenizer file {vocab_file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer file {vocab_file}: {error}") from None
    # A truncated list of merges would load and silently give other ids, so check the count: bytes, merges, end of text.
    whole = isinstance(vocab, dict) and len(vocab) == VOCAB_SIZE and vocab.get(SPECIAL) == END_OF_TEXT
    if not whole or 256 + len(merges) + 1 != VOCAB_SIZE:
        raise UserError(f"{encoder_file} and {vocab_file} are not GPT-2's vocabulary and merges")
    try:
        bpe = Tokenizer(BPE(vocab, merges))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{encoder_file} and {vocab_file} do not fit together: {error}") from None
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def well_formed(text):
    """`text` with lone surrogates, which JSON allows but UTF-8 does not, replaced by U+FFFD, as in tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
