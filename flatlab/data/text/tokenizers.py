"""Sentences as token ids of a model's own tokenizer (extra `transformers`)."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flatlab.errors import UserError, reason

LOG = logging.getLogger("flatlab")


def saved_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that `transformers` saved in a folder.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of several types: OSError, ValueError, those of the package tokenizers
        raise UserError(f"The tokenizer in {folder} cannot be read: {reason(error)}") from error


class Tokenizer:
    """A tokenizer that `transformers` saved beside a model.

    Args:
        folder: the model's folder.
        rows: number of rows of the model's embedding.
        padding: the model's padding id.

    Raises:
        UserError: the tokenizer cannot be read, or has another padding id.
    """

    def __init__(self, folder: Path, *, rows: int, padding: int | None) -> None:
        self.folder, self.rows = folder, rows
        self._cut = saved_tokenizer(folder)
        own = self._cut.pad_token_id
        if own is None or own != padding:
            raise UserError(
                f"The tokenizer in {folder} does not fit the model: it pads by {own}, and config.json has "
                f"pad_token_id {padding}; both must name the same number."
            )
        self.padding = own

    def encode(self, texts: Sequence[str], length: int) -> npt.NDArray[np.int32]:
        """Return token ids (n, length) of sentences with the model's special tokens, truncated or padded.

        A warning states how many sentences are truncated.

        Raises:
            UserError: an id exceeds the model's embedding, or a sentence has no token.
        """
        cut = partial(self._cut, truncation=True, verbose=False)
        whole: list[list[int]] = cut(list(texts), max_length=length + 1)["input_ids"]
        for text, pieces in zip(texts, whole, strict=True):
            if not pieces or max(pieces) >= self.rows:
                what = f"the number {max(pieces)}, and the embedding has {self.rows} rows" if pieces else "no piece"
                raise UserError(
                    f"The tokenizer in {self.folder} does not fit the model: it gives {what}, for {text[:40]!r}."
                )
        if longer := [index for index, pieces in enumerate(whole) if len(pieces) > length]:
            kept = cut([texts[index] for index in longer], max_length=length)["input_ids"]
            whole = [*whole]
            for index, pieces in zip(longer, kept, strict=True):
                whole[index] = pieces
            LOG.warning(
                "%d of %d sentences have more than %d word pieces and are cut; a larger --image-size keeps more.",
                *(len(longer), len(whole), length),
            )
        rows = np.full((len(whole), length), self.padding, dtype=np.int32)
        for row, pieces in zip(rows, whole, strict=True):
            row[: len(pieces)] = pieces
        return rows
