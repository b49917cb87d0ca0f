"""CIDEr-D without Java: a regular expression as the tokenizer, and statistics of the references computed once.

    scorer = CiderScorer([["a dog runs", "the dog is running"], ...])       # references of images 0, 1, ...
    scorer.score([0, 1], ["a dog is running", "two cats"])                  # one number for each candidate

For training. Evaluation uses pycocoevalcap (p2_evaluate.py), with which this agrees: see its tests.
"""

import math
import re
from functools import lru_cache
from itertools import repeat

import numpy as np

# Words that the PTB tokenizer keeps together with a full stop.
ABBREVIATIONS = """jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz ark calif colo conn ct dak fla ga ind kan kans ky la md mich minn mo mont neb nev okla penn tenn va vt wis
    wisc wyo inc co cos corp ltd plc rt bancorp dept bhd assn univ intl sys mr mrs ms dr drs prof profs sen sens rep reps
    atty attys lt col gen messrs gov govs adm rev maj sgt cpl pvt mt capt st ste ave pres lieut hon brig comdr cmdr pfc
    spc supt supts det jr sr bros blvd rd esq etc al seq vs ft"""
CLITIC = r"(?:s|m|d|ll|re|ve)(?![a-z])"
A = r"[^\W_]"  # a letter or digit of any script
TOKEN = re.compile(rf"""
    (?:{"|".join(ABBREVIATIONS.split())})\.(?!{A})
  | [a-z](?:\.[a-z])+(?!{A})\.?                               # u.s.a.
  | (?<!{A})[a-z]\.(?!{A})                                    # an initial
  | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | lem(?=me\b) | gim(?=me\b)
  | dunkin' | '(?:em|til|n|cause|tis|twas)\b'?
  | '{CLITIC}
  | [-+]?[0-9]*(?:[.:,][0-9]+)+                               # 3.5  95,000  12:45
  | [a-z]+(?=n't(?![a-z])) | n't
  | (?-i:[A-Z]+(?:&[A-Z]+)+)(?![A-Z])                         # AT&T
  | {A}+(?:(?:[-_./]|'(?!{CLITIC}|t(?![a-z]))){A}+)*          # t-shirt  o'clock  and/or  statefarm.com
  | \.\.+ | -- | [?!]+ | [!-~£€]                              # other symbols are dropped
""", re.VERBOSE | re.IGNORECASE)
PUNCTUATION = {*"'`.?!,:-;\"", "--"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@lru_cache(maxsize=1 << 17)
def word_tokens(word):
    """Tokens of a string without spaces, cached since captions repeat their words."""
    tokens = (BRACKETS.get(token, token.lower()) for token in TOKEN.findall(word))
    return tuple(token for token in tokens if token not in PUNCTUATION and token.strip("."))


def ptb_tokens(caption):
    """The tokens that pycocoevalcap scores: PTB's, lower case, without punctuation. list of str

    Differences from the Java tokenizer: there, how a single letter or an abbreviation before a full stop is split depends
    on the start of the next caption in the file; and it splits some text otherwise that is rare in captions: tags in angle
    brackets, web addresses, #hashtags and @mentions, smileys, signed numbers, ½, £ and °, '90s, y'all, Ph.D., feet and
    inches.
    """
    caption = caption.replace("&amp;", "&").replace("&nbsp;", " ").replace("’", "'")
    return [token for word in caption.split() for token in word_tokens(word)]


class CiderScorer:
    """CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726): n up to 4, sigma 6, times 10.

    Args:
        references: for each image, its captions, not tokenized. Document frequencies are computed from them.
        end: a token appended to every caption, of references and candidates: as a reward, CIDEr without it teaches
            truncated captions ("a man in a"). None: the metric itself.
    """

    def __init__(self, references, end=None):
        self.end = [end] if end else []
        self.numbers = {}  # n-gram -> its number
        captions = [ptb_tokens(caption) + self.end for group in references for caption in group]
        sizes = np.array([len(group) for group in references])
        image = np.repeat(np.arange(len(sizes)), sizes)  # of each caption
        place = np.arange(len(image)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of each caption, its index among its image's
        owner, gram, count = self._count(captions, {}, self.numbers)

        # Each pair of an image and an n-gram is a key; entries starts[i] to starts[i + 1] of (places, values) give the captions with it.
        key = image[owner // 4] * len(self.numbers) + gram
        order = np.argsort(key, kind="stable")
        self.keys, first = np.unique(key[order], return_index=True)
        self.starts = np.append(first, len(key))

        # Document frequency: the number of images with the n-gram in any caption.
        occurs = np.bincount(self.keys % len(self.numbers), minlength=len(self.numbers))
        log_images = math.log(len(sizes))
        self.weights = np.append(log_images - np.log(occurs), log_images)  # the last is for n-grams in no reference
        values = count * self.weights[gram]
        self.places, self.values = place[owner // 4][order], values[order]

        self.most = sizes.max(initial=0)
        self.norms, self.lengths = np.zeros((len(sizes), 4, self.most)), np.full((len(sizes), self.most), np.inf)
        squares = np.bincount(owner, values**2, minlength=4 * len(captions))
        self.norms[image, :, place] = np.sqrt(squares).reshape(-1, 4)
        self.lengths[image, place] = [max(len(tokens) - 1, 0) for tokens in captions]
        self.sizes = sizes

    @staticmethod
    def _count(captions, numbers, new):
        """Captions' tokens -> three arrays: 4 * caption + (n - 1), index of the n-gram, its count there.

        N-grams that are not in `numbers` are added to `new`, with the indices that follow.
        """
        grams, lengths = [], []
        for tokens in captions:
            shifted = tokens, tokens[1:], tokens[2:], tokens[3:]
            grams += tokens  # unigrams are strings, longer n-grams tuples
            for n in 2, 3, 4:
                grams += zip(*shifted[:n])
            lengths += map(len, shifted)
        found = np.fromiter(map(numbers.get, grams, repeat(-1)), np.int64, len(grams))
        for i in np.flatnonzero(found < 0).tolist():
            found[i] = len(numbers) + new.setdefault(grams[i], len(new))
        total = max(1, len(numbers) + len(new))
        keys = np.repeat(np.arange(len(lengths)), lengths) * total + found
        keys, counts = np.unique(keys, return_counts=True)
        return keys // total, keys % total, counts

    def score(self, images, captions, ended=None):
        """CIDEr-D of each caption against its image's references: image indices and strings -> (len,) float64.

        `ended`: for each caption, whether it is complete, so that `end` is appended; default: all are.
        """
        images, known = np.asarray(images, np.int64), len(self.numbers)
        ended = [True] * len(captions) if ended is None else ended
        rows = [ptb_tokens(caption) + (self.end if whole else []) for caption, whole in zip(captions, ended)]
        owner, gram, count = self._count(rows, self.numbers, {})
        weight = count * self.weights[np.minimum(gram, known)]
        norms = np.sqrt(np.bincount(owner, weight**2, minlength=4 * len(rows))).reshape(-1, 4, 1)

        key = np.where(gram < known, images[owner // 4] * known + gram, -1)
        at = np.searchsorted(self.keys, key)
        hit = np.flatnonzero(self.keys[np.minimum(at, len(self.keys) - 1)] == key)
        at = at[hit]
        number = self.starts[at + 1] - self.starts[at]
        entry = np.repeat(self.starts[at] - np.cumsum(number) + number, number) + np.arange(number.sum())
        hit = np.repeat(hit, number)
        products = np.bincount(owner[hit] * self.most + self.places[entry],
                               np.minimum(weight[hit], self.values[entry]) * self.values[entry],
                               minlength=4 * len(rows) * self.most).reshape(-1, 4, self.most)
        scale = norms * self.norms[images]
        cosines = np.divide(products, scale, out=products, where=scale != 0)
        length = np.array([[max(len(tokens) - 1, 0)] for tokens in rows])  # in bigrams, as in the reference implementation
        penalty = np.exp(-(length - self.lengths[images])**2 / 72)  # 0 where an image has fewer references than others
        return 10 / 4 * (cosines.sum(1) * penalty).sum(1) / self.sizes[images]
