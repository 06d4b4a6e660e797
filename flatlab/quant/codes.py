"""Integer codes of a quantized network's weights, and the neighbouring values on the grid."""

import torch
from torch import Tensor, nn

from flatlab.errors import UserError
from flatlab.quant.attach import Quantized, quantized_layers, tensor_of
from flatlab.quant.codebook import decode


def codes_of(name: str, layer: Quantized) -> Tensor:
    """Return the integer codes of a quantized weight, int32.

    Args:
        name: name of the weight, for the error.
        layer: the layer with its quantizer.

    Raises:
        UserError: the weight is not on its grid.
    """
    codes = layer.quantizer.codes(layer.latent)
    if not torch.equal(decode(codes, layer.quantizer.scale.detach(), layer.quantizer.grid), layer.weight):
        raise UserError(
            f"{name} is not completely on its grid in this checkpoint, as INQ is before its last stage; use the last"
            " checkpoint."
        )
    return codes


def code_neighbours(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the changes of each quantized weight at the next code down and up, by the names of the weights.

    With codes c in [-Q_N, Q_P] and values v(c), they are v(c - 1) - v(c) and v(c + 1) - v(c), in the weight's shape,
    and 0 at the ends of the range.

    Args:
        network: the network with its quantizers, before `bake`.

    Raises:
        UserError: no weight is quantized, or one is not on its grid.
    """
    found = {}
    for name, layer in quantized_layers(network).items():
        key, (low, high) = f"{name}.{tensor_of(layer.layer)}", layer.quantizer.levels
        codes, scale, grid = codes_of(key, layer), layer.quantizer.scale.detach(), layer.quantizer.grid
        down, up = (decode((codes + one).clamp(low, high), scale, grid) - layer.weight for one in (-1, 1))
        found[key] = (down, up)
    if not found:
        raise UserError("The network has no quantized weights: pass it before `bake`, or quantize it with `attach`.")
    return found
