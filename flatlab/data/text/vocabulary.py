"""A vocabulary of word pieces, built from some sentences alone. Torch-free.

It holds every character that occurs, and the most frequent words and endings of words. A word that it lacks is cut
from the left into the longest pieces that it has, as WordPiece does (Wu et al. 2016, section 4.1).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

SIZE = 4096  # pieces, those below included; fewer where the sentences have fewer
PAD, UNKNOWN, START = 0, 1, 2
ENDINGS = 4  # characters of the longest ending
WORD = re.compile(r"\w+|[^\w\s]")


class Vocabulary:
    """Pieces of words, each with a number.

    Args:
        texts: the sentences that it is built from.
        size: pieces at most.
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
        """How many numbers there are: of the pieces, and of padding, of unknown characters and of the start."""
        return 3 + len(self.numbers)

    def encode(self, text: str, length: int) -> npt.NDArray[np.int16]:
        """Return the numbers (length,) of a sentence's pieces after the start, cut or padded to a length."""
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
    """Return what occurs, the most frequent first; by name where that is equal."""
    return sorted(counts, key=lambda each: (-counts[each], each))
