"""Integer codes packed as bits, as stored on disk."""

import numpy as np
import numpy.typing as npt

AT_ONCE = 2**20  # codes converted at a time; a multiple of 8, so that parts end on whole bytes

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]


def bits_of(low: int, high: int) -> int:
    """Return the number of bits that the codes from `low` to `high` need."""
    return (high - low).bit_length()


def pack(codes: npt.NDArray[np.integer], low: int, bits: int) -> Bytes:
    """Return `codes - low` as a stream of `bits` bits each, the least significant first.

    Args:
        codes: integers of any shape, from `low` to `low + 2**bits - 1`.
        low: the lowest code.
        bits: bits of each code.
    """
    flat = codes.reshape(-1).astype(np.int64) - low
    parts = [flat[start : start + AT_ONCE] for start in range(0, flat.size, AT_ONCE)]
    shifts = np.arange(bits)
    packed = [np.packbits((part[:, None] >> shifts & 1).astype(np.uint8), bitorder="little") for part in parts]
    return np.concatenate([np.zeros(0, np.uint8), *packed])


def unpack(stream: Bytes, count: int, low: int, bits: int) -> Codes:
    """Return the `count` codes, shape (count,), of a stream that `pack` returned."""
    weights, size = 1 << np.arange(bits), AT_ONCE * bits // 8
    parts = [stream[start : start + size] for start in range(0, stream.size, size)]
    found = []
    for part in parts:
        digits = np.unpackbits(part, bitorder="little")
        found.append(digits[: digits.size // bits * bits].reshape(-1, bits) @ weights)
    return np.concatenate([np.zeros(0, np.int64), *found])[:count] + low
