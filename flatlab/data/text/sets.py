"""Sentences as a data set: rows of token ids in named domains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from flatlab.data.domains import Domain, DomainSet, numbered
from flatlab.data.text.tables import Table, classes_of, fingerprint
from flatlab.data.text.tokenizers import Tokenizer
from flatlab.data.text.vocabulary import Vocabulary

LENGTH = 48  # tokens of a sentence; 90 % of the embedded sentences have at most 30 words


@dataclass(frozen=True, eq=False)
class TextSet(DomainSet):
    """Sentences in domains, as token ids of a vocabulary that is built from some of the domains.

    Attributes:
        tables: the sentences of each domain.
        length: number of tokens to which a sentence is truncated or padded.
        vocabulary: the vocabulary; None before `seen_from`.
    """

    tables: dict[str, Table] = field(default_factory=dict)
    length: int = LENGTH
    vocabulary: Vocabulary | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, sentences and labels, independent of the vocabulary."""
        return fingerprint(self.name, self.tables)

    def seen_from(self, sources: tuple[str, ...]) -> "TextSet":
        """Return the sentences as token ids of a vocabulary that is built from these domains."""
        vocabulary = Vocabulary(text for name in sources for text in self.tables[name].texts)
        rows = {
            name: np.stack([vocabulary.encode(text, self.length) for text in table.texts])
            for name, table in self.tables.items()
        }
        return replace(self, domains=self._numbered(rows), vocabulary=vocabulary)

    def cut_by(self, tokenizer: Tokenizer) -> "TextSet":
        """Return the sentences as token ids of a model's own tokenizer."""
        ends = np.cumsum([len(table.texts) for table in self.tables.values()])[:-1]
        texts = [text for table in self.tables.values() for text in table.texts]
        rows = np.split(tokenizer.encode(texts, self.length), ends)
        return replace(self, domains=self._numbered(dict(zip(self.tables, rows, strict=True))))

    def _numbered(self, rows: Mapping[str, npt.NDArray[np.integer]]) -> tuple[Domain, ...]:
        return tuple(replace(domain, images=torch.from_numpy(rows[domain.name])) for domain in self.domains)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Return token ids (N, length) as int64, the dtype of an embedding's inputs."""
        return images.long()


def load(
    dataset: str, found: dict[str, Table], length: int | None, *, classes: tuple[str, ...] | None = None
) -> TextSet:
    """Return sentences as a data set.

    Args:
        dataset: its name.
        found: the sentences of each domain.
        length: tokens of a sentence; None: 48.
        classes: their names in label order; None: those that occur.
    """
    classes = classes or classes_of(found)
    size, domains = length or LENGTH, []
    for name, table in found.items():
        labels = torch.tensor([classes.index(label) for label in table.labels])
        rows = torch.zeros(len(labels), size, dtype=torch.int16)
        domains.append(Domain(name, rows, labels, groups=numbered(table.groups)))
    return TextSet(dataset, tuple(domains), classes, mean=(), std=(), tables=found, length=size)
