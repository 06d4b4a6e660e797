"""A vocabulary of word pieces, built from given sentences. Torch-free.

It contains every character that occurs, and the most frequent words and word endings. Other words are split from the
left into the longest pieces of the vocabulary, as in WordPiece (Wu et al. 2016, section 4.1).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

SIZE = 4096  # pieces, those below included; fewer where the sentences have fewer
PAD, UNKNOWN, START = 0, 1, 2
ENDINGS = 4  # largest number of characters of an ending
WORD = re.compile(r"\w+|[^\w\s]")


class Vocabulary:
    """Word pieces with their token ids.

    Args:
        texts: the sentences from which the vocabulary is built.
        size: largest number of token ids.
    """

    def __init__(self, texts: Iterable[str], size: int = SIZE) -> None:
        words = Counter(word for text in texts for word in words_of(text))
        heads, tails = Counter[str](), Counter[str]()
        for word, count in words.items():
            heads.update({word[0]: count})
            for character in word[1:]:
                tails.update({character: count})
        pieces = [*_ranked(heads), *(f"##{each}" for each in _ranked(tails))][: size - 3]
        pieces += _ranked(words + _endings(words))
        self.numbers = {piece: index for index, piece in enumerate(dict.fromkeys(pieces), 3) if index < size}
        self._cut = cache(self._pieces)

    def __len__(self) -> int:
        """Number of token ids: those of the pieces, of padding, of unknown characters and of the start."""
        return 3 + len(self.numbers)

    def encode(self, text: str, length: int) -> npt.NDArray[np.int16]:
        """Return the token ids (length,) of a sentence, after that of the start, truncated or padded."""
        numbers = [START, *(number for word in words_of(text) for number in self._cut(word))][:length]
        return np.array(numbers + [PAD] * (length - len(numbers)), dtype=np.int16)

    def _pieces(self, word: str) -> list[int]:
        return [self.numbers.get(piece, UNKNOWN) for piece in self._longest(word)]

    def _longest(self, word: str) -> Iterator[str]:
        mark = ""
        while word:
            end = next((end for end in range(len(word), 1, -1) if mark + word[:end] in self.numbers), 1)
            yield mark + word[:end]
            mark, word = "##", word[end:]


def words_of(text: str) -> list[str]:
    """Return the words and punctuation marks of a sentence, in lower case."""
    return WORD.findall(text.lower())


def _endings(words: Counter[str]) -> Counter[str]:
    found = Counter[str]()
    for word, count in words.items():
        for length in range(2, min(ENDINGS, len(word) - 1) + 1):
            found[f"##{word[-length:]}"] += count
    return found


def _ranked(counts: Counter[str]) -> list[str]:
    """Return the keys by decreasing count; ties are in alphabetical order."""
    return sorted(counts, key=lambda each: (-counts[each], each))
