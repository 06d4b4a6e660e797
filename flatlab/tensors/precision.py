"""Products of float32 tensors in float32: torch rounds their factors on some processors, by default."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: Any = torch.backends  # torch's own types lack some of these
KERNELS = [_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul]
KERNELS += [_BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn, _BACKENDS.mkldnn.matmul]


@contextmanager
def float32_in_full() -> Iterator[None]:
    """Switch off TF32 and bfloat16 in products of float32 while the block runs, and restore torch's settings.

    On NVIDIA GPUs convolutions use TF32 by default: factors are rounded to 10 bits in place of 23, by up to
    5e-4 of each, while flatness at small radii is a rise of the loss by 1e-2 nats and less.
    """
    word, before = _word(), [kernel.fp32_precision for kernel in KERNELS]
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for kernel in KERNELS:
        kernel.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = "tf32" in before[:2]
        if word:
            torch.set_float32_matmul_precision(word)
        for kernel, precision in zip(KERNELS, before, strict=True):
            kernel.fp32_precision = precision


def _word() -> str | None:
    """Return torch's old setting of matrix products; None if it disagrees with the new ones, and cannot be read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
