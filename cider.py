"""CIDEr-D without Java: tokens by a regular expression, statistics of the references built once.

    scorer = CiderScorer([["a dog runs", "the dog is running"], ...])       # references of images 0, 1, ...
    scorer.score([0, 1], ["a dog is running", "two cats"])                  # one number for each candidate

For use inside training. Reports go through pycocoevalcap (p2_evaluate.py), with which this agrees: see its tests.
"""

import math
import re
from functools import lru_cache
from itertools import repeat

import numpy as np

# The PTB tokenizer's words that end in a full stop of their own.
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
    """Tokens of what stands between two spaces. Few are new: captions repeat their words."""
    tokens = (BRACKETS.get(token, token.lower()) for token in TOKEN.findall(word))
    return tuple(token for token in tokens if token not in PUNCTUATION and token.strip("."))


def ptb_tokens(caption):
    """The tokens that pycocoevalcap scores: PTB's, lower case, without punctuation. list of str

    Where it differs from the Java tokenizer: there a single letter or an abbreviation before a full stop depends on
    how the next caption in the file begins; and what captions of photographs hardly hold is split otherwise: tags in
    angle brackets, web addresses, #hashtags and @mentions, smileys, signed numbers, ½, £ and °, '90s, y'all, Ph.D.,
    feet and inches.
    """
    caption = caption.replace("&amp;", "&").replace("&nbsp;", " ").replace("’", "'")
    return [token for word in caption.split() for token in word_tokens(word)]


class CiderScorer:
    """CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726): n up to 4, sigma 6, times 10.

    Args:
        references: for each image, its captions, as they were written. Word weights come from them.
        end: a token that is appended to every caption, references and candidates alike: as a reward, CIDEr without
            one teaches captions that break off ("a man in a"). None for the metric itself.
    """

    def __init__(self, references, end=None):
        self.end = [end] if end else []
        self.numbers = {}  # n-gram -> its number
        captions = [ptb_tokens(caption) + self.end for group in references for caption in group]
        sizes = np.array([len(group) for group in references])
        image = np.repeat(np.arange(len(sizes)), sizes)  # of each caption
        place = np.arange(len(image)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # its place among the image's
        owner, gram, count = self._count(captions, {}, self.numbers)

        # What each image's captions hold of an n-gram, by image and n-gram: keys, and (place, weight) from starts on.
        key = image[owner // 4] * len(self.numbers) + gram
        order = np.argsort(key, kind="stable")
        self.keys, first = np.unique(key[order], return_index=True)
        self.starts = np.append(first, len(key))

        # In how many images each n-gram occurs, however many of their captions hold it.
        occurs = np.bincount(self.keys % len(self.numbers), minlength=len(self.numbers))
        log_images = math.log(len(sizes))
        self.weights = np.append(log_images - np.log(occurs), log_images)  # the last for an n-gram in no reference
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
        """Captions' tokens -> three arrays: 4 * caption + (n - 1), n-gram, how often it occurs there.

        N-grams that are not in `numbers` are entered into `new`, and numbered from there on.
        """
        grams, lengths = [], []
        for tokens in captions:
            shifted = tokens, tokens[1:], tokens[2:], tokens[3:]
            grams += tokens  # a word stands for itself, longer ones are tuples
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
        """CIDEr-D of each caption against the references of its image: numbers and strings -> (len,) float64.

        `ended`: for each caption whether it came to its end, without which `end` is not appended; default: all did.
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
