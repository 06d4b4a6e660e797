"""A small transformer encoder for sentences, trained from scratch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECES = 4096  # rows of the embedding, one for each token id; 0 is padding
WIDTH, HEADS, HIDDEN, DEPTH = 64, 4, 128, 2


class Block(nn.Module):
    """A pre-norm transformer block: self-attention and a two-layer MLP, each behind a LayerNorm and with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return (N, T, WIDTH) for `x` of that shape; `seen` (N, 1, 1, T) is the attention mask, None for no mask."""
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """From token ids (N, T) to the mean of the encoded tokens (N, WIDTH); padding is left out of the mean.

    Args:
        length: the largest T.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PIECES, WIDTH)
        self.position = nn.Parameter(torch.empty(length, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        for table in (self.embedding.weight, self.position):
            nn.init.normal_(table, std=0.02)  # as BERT's

    def forward(self, pieces: Tensor) -> Tensor:
        """Return the features of sentences (N, WIDTH)."""
        seen = pieces != 0
        x = self.embedding(pieces) + self.position[: pieces.shape[1]]
        for block in self.blocks:
            x = block(x, seen[:, None, None])
        return (self.norm(x) * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)  # type: ignore[no-any-return]


def sentences_transformer(length: int) -> tuple[nn.Module, int]:
    """Return the encoder of sentences, and the width of its features."""
    return Encoder(length), WIDTH
