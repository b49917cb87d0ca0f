"""CIDEr-D without Java: tokens by a regular expression, statistics of the references built once.

    scorer = CiderScorer([["a dog runs", "the dog is running"], ...])       # references of images 0, 1, ...
    scorer.score([0, 1], ["a dog is running", "two cats"])                  # one number for each candidate

For use inside training. Reports go through pycocoevalcap (p2_evaluate.py), with which this agrees: see its tests.
"""

import math
import re
from collections import Counter
from functools import lru_cache

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


def tokenize(caption):
    """The tokens that pycocoevalcap scores: PTB's, lower case, without punctuation. list of str

    Where it differs from the Java tokenizer: there a single letter or an abbreviation before a full stop depends on
    how the next caption in the file begins.
    """
    caption = caption.replace("&amp;", "&").replace("&nbsp;", " ").replace("’", "'")
    return [token for word in caption.split() for token in word_tokens(word)]


def ngrams(tokens, longest=4):
    """{n-gram: count} for n = 1 … 4, in one list by n."""
    return [Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, longest + 1)]


class CiderScorer:
    """CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726): n up to 4, sigma 6, times 10.

    Args:
        references: for each image, its captions, as they were written. Word weights come from them.
        end: a token that is appended to every caption, references and candidates alike: as a reward, CIDEr without
            one teaches captions that break off ("a man in a"). None for the metric itself.
    """

    def __init__(self, references, end=None):
        self.end = [end] if end else []
        counts = [[ngrams(tokenize(caption) + self.end) for caption in captions] for captions in references]
        frequency = Counter(gram for captions in counts
                            for gram in {gram for caption in captions for grams in caption for gram in grams})
        log_images = math.log(len(counts))
        self.unseen = log_images  # the weight of an n-gram in no reference
        self.weights = {gram: log_images - math.log(number) for gram, number in frequency.items()}
        self.images = [self._index(captions) for captions in counts]

    def _index(self, captions):
        """One image's references: {n-gram: [(which, weight), …]}, norms (R, 4) and lengths (R)."""
        postings, norms = {}, np.zeros((len(captions), 4))
        for which, caption in enumerate(captions):
            for n, grams in enumerate(caption):
                for gram, count in grams.items():
                    weight = count * self.weights[gram]
                    postings.setdefault(gram, []).append((which, weight))
                    norms[which, n] += weight**2
        return postings, np.sqrt(norms), np.array([sum(caption[1].values()) for caption in captions])

    def score(self, images, captions):
        """CIDEr-D of each caption against the references of its image: numbers and strings -> (len,) float64."""
        return np.array([self._score(*self.images[image], tokenize(caption) + self.end)
                         for image, caption in zip(images, captions)])

    def _score(self, postings, norms, lengths, tokens):
        products, norm, weight_of = np.zeros(norms.shape), [0.0] * 4, self.weights.get
        for n, grams in enumerate(ngrams(tokens)):
            for gram, count in grams.items():
                weight = count * weight_of(gram, self.unseen)
                norm[n] += weight**2
                for which, reference in postings.get(gram, ()):
                    products[which, n] += min(weight, reference) * reference
        scale = norms * np.sqrt(norm)
        cosines = np.divide(products, scale, out=products, where=scale != 0)
        length = max(len(tokens) - 1, 0)  # in bigrams, as in the reference implementation
        cosines *= np.exp(-(length - lengths)**2 / 72)[:, None]
        return 10 * cosines.mean()
