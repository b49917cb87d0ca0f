"""The tokenizer: the same ids as tiktoken's, lossless decoding, `<|endoftext|>` only on request."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cli import UserError
from tokenizer import END_OF_TEXT, BPETokenizer

ROOT = Path(__file__).resolve().parents[1]
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # tiktoken's r50k_base

TEXTS = [
    "", " ", "  ", "\n", "a", "a ", " a", "two  spaces   three", "tab\there\r\n\r\n  next", "ends in space \n ",
    "It's we're I'll they've he'd I'm can't IT'S WE'LL ' s 's''s", "don’t – “quoted” … é e\u0301 ﬁ ß İ ı",
    "3 dogs, 12,345.67 m² ½ Ⅷ ٣ ①", "под дождём", "一只猫坐在垫子上", "ネコ と 犬", "मेरा कुत्ता", "الكلب يجري", "강아지",
    "👩‍👩‍👧‍👦🏽 🇹🇼 ☕️", "zero\0nul \x1b[0m \x7f \x85next\u2028line\u2029par\u00a0nbsp\u3000wide\ufeffbom\u200bzw",
    "\U00010348 \U0001d54f \U0002f800 \U000e0001 \U000f0000 \U0010ffff", "<|endoftext|>", "a <|endoftext|> b<|endoftext|>",
    "http://x.y/z?a=1&b=2#c", "def f(x):\n    return x ** 2\n", "a" * 300, " " * 50 + "x", "Ġ Ċ ĉ", "SolidGoldMagikarp",
]


def random_texts(count, seed=0):
    """Strings of runs drawn from kinds of characters that stress the pattern; no lone surrogates."""
    draw = random.Random(seed)
    planes = lambda low, high: lambda: chr(draw.randrange(low, high))  # noqa: E731
    kinds = [
        planes(0x20, 0x7F), planes(0x00, 0x20), planes(0x80, 0x300), planes(0x300, 0x3000), planes(0x3000, 0xD800),
        planes(0xE000, 0x10000), planes(0x10000, 0x20000), planes(0x20000, 0x110000), planes(0x1F300, 0x1FB00),
        lambda: draw.choice(" \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u180e\u200b\ufeff"),
        lambda: draw.choice(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "’s", "'"]),
        lambda: draw.choice(["a", "dog", " man", " the", "ing", "7", " 42", "!", "...", "<|endoftext|>"]),
    ]
    for _ in range(count):
        yield "".join(kind() for kind in draw.choices(kinds, k=draw.randrange(1, 12)) for _ in range(draw.randrange(1, 6)))


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer()


@pytest.fixture(scope="module")
def reference():
    """tiktoken's GPT-2 from the same two files."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken, the reference tokenizer, is not installed")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(ROOT / "vocab.bpe"), str(ROOT / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT})


def check(bpe, reference, texts):
    """The ids are tiktoken's, one text at a time and batched, and decode to the text they came from."""
    expected = [reference.encode_ordinary(text) for text in texts]
    assert bpe.encode_batch(texts) == expected
    for text, ids in zip(texts, expected):
        assert bpe.encode(text) == ids, repr(text)
        assert bpe.decode(ids) == text


def test_example_of_the_assignment(bpe):
    text = "a kitchen with a sink and many cooking machines and a pot of food"
    assert bpe.encode(text) == [64, 9592, 351, 257, 14595, 290, 867, 10801, 8217, 290, 257, 1787, 286, 2057]


def test_hand_picked_texts(bpe, reference):
    check(bpe, reference, TEXTS)


def test_random_unicode(bpe, reference):
    check(bpe, reference, list(random_texts(5000)))


def test_every_character(bpe, reference):
    """Letters, digits and spaces are the same sets in both libraries (planes 4 and up hold next to none)."""
    characters = [chr(point) for point in [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200)]]
    texts = ["".join(f"a{c}1 {c}" for c in characters[start : start + 64]) for start in range(0, len(characters), 64)]
    assert bpe.encode_batch(texts) == [reference.encode_ordinary(text) for text in texts]


def test_training_captions(bpe, reference, flickr8k):
    captions = [entry["caption"] for entry in json.loads((flickr8k / "train.json").read_text(encoding="utf-8"))["annotations"]]
    assert captions
    check(bpe, reference, captions)


def test_end_of_text_is_ordinary_unless_allowed(bpe, reference):
    text = "<|endoftext|>a dog<|endoftext|><|endoftext|> runs"
    assert END_OF_TEXT not in bpe.encode(text) + bpe.encode(text, allowed_special=[]) + bpe.encode_batch([text])[0]
    expected = reference.encode(text, allowed_special="all")
    assert expected.count(END_OF_TEXT) == 3
    for allowed in ("all", {"<|endoftext|>"}, ["<|endoftext|>"]):
        assert bpe.encode(text, allowed_special=allowed) == expected
    assert bpe.encode("<|endoftext|>", allowed_special="all") == [bpe.eos_id] == [50256]
    assert bpe.decode(expected) == text
    assert len(bpe) == 50257


def test_half_a_surrogate_pair_becomes_a_replacement_character(bpe, reference):
    text = "a\ud83d dog"
    assert bpe.encode(text) == bpe.encode_batch([text])[0] == reference.encode_ordinary(text)
    assert bpe.decode(bpe.encode(text)) == "a\ufffd dog"


def test_decode_takes_lists_arrays_and_tensors(bpe):
    ids = bpe.encode("a dog")
    for tokens in (ids, tuple(ids), np.array(ids), list(np.array(ids)), torch.tensor(ids), list(torch.tensor(ids))):
        assert bpe.decode(tokens) == "a dog"
    assert bpe.decode([]) == bpe.decode(torch.tensor([], dtype=torch.long)) == ""


def test_decode_replaces_what_is_not_utf8(bpe, reference):
    draw = random.Random(1)
    for _ in range(500):
        tokens = [draw.randrange(50257) for _ in range(8)] + [draw.randrange(94, 256) for _ in range(8)]
        assert bpe.decode(tokens) == reference.decode(tokens)
    cut = bpe.encode("🐕")[:-1]
    assert bpe.decode(cut) == "\ufffd"


@pytest.mark.parametrize("tokens", [[50257], [-1], [64, -100], [1.5], ["a"], torch.tensor([[1]]), torch.tensor(3)])
def test_decode_refuses_what_is_no_id(bpe, tokens):
    with pytest.raises(ValueError, match="no token id|flat list"):
        bpe.decode(tokens)


def test_missing_or_broken_files_are_user_errors(tmp_path):
    for argument in ("encoder_file", "vocab_file"):
        good = (ROOT / {"encoder_file": "encoder.json", "vocab_file": "vocab.bpe"}[argument]).read_bytes()
        whole_lines = good[: good.rindex(b"\n", 0, 200_000)] if argument == "vocab_file" else b'{"a": 1}'
        for name, content in {"half": good[:100_001], "lines": whole_lines, "list": b"[1]", "binary": b"\xff\xfe\0"}.items():
            path = tmp_path / f"{argument} {name}"
            path.write_bytes(content)
            with pytest.raises(UserError):
                BPETokenizer(**{argument: path})
        with pytest.raises(UserError, match="does not exist"):
            BPETokenizer(**{argument: tmp_path / "absent"})
