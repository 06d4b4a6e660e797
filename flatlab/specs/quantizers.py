"""Specs of quantizers, trained or not, and of the weight noise that can replace them."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flatlab.specs.base import Spec

Granularity = Literal["channel", "tensor"]
INQGrid = Literal["uniform", "power-of-two"]
Bits = Annotated[int, Field(ge=2, le=16)]
Amplitude = Annotated[float | None, Field(ge=0, le=1e30)]  # half-width of weight noise; 0 is the limit without noise


class LSQOptions(Spec):
    """Options of LSQ beyond its grid: fields of its spec and of a setting, and options of the command line."""

    later: ClassVar[tuple[str, ...]] = ("signed", "log_scale", "activations", "activation_bits")
    later += ("embeddings", "skip_first", "head")

    signed: bool = Field(True, description="Quantize weights to codes of both signs; else negative weights become 0.")
    log_scale: bool = Field(False, description="Learn the logarithm of each LSQ step size.")
    activations: Literal["none", "signed", "unsigned"] = Field(
        "none", description="Also quantize the layers' inputs with LSQ; unsigned for inputs that follow a ReLU."
    )
    activation_bits: Bits = Field(8, description="Bits of a quantized input.")
    embeddings: bool = Field(False, description="Also quantize embeddings with LSQ, a step size for each row.")
    skip_first: bool = Field(False, description="Leave the first layer (embeddings aside) in floating point under LSQ.")
    head: bool = Field(False, description="Also quantize the head, the last layer, with LSQ.")


class QuantSpec(LSQOptions):
    """Learned step size quantization of the weights (Esser et al. 2020; QT-DoG App. B), optionally of inputs."""

    kind: Literal["lsq"] = "lsq"
    bits: Bits = 7
    granularity: Granularity = "channel"
    grad_scale: Literal["shared", "tensor", "none"] = "shared"
    scale_lr: float = Field(1e-5, ge=0)  # not given in the paper; Adam changes a step size of 3e-3 by 0.3 % a step


class BothSpec(QuantSpec):
    """LSQ of weights and of layers' inputs, from the first step on, as GAQAT and FQAT quantize.

    FOUND in JachinJiang/lsq-net (99005dd), by their first author: step sizes of a weight for each channel, of an input
    one; gradients scaled by the numel of the whole tensor; of the first layer the input alone is quantized, to codes of
    both signs; the classifier is not. There an input's step size starts at 1. INFERRED for GAQAT and FQAT, as are the
    start from the first batch and the count of one sample's features.
    """

    kind: Literal["lsq-both"] = "lsq-both"  # type: ignore[assignment]
    bits: Bits = 4
    grad_scale: Literal["shared", "tensor", "none"] = "tensor"
    activations: Literal["none", "signed", "unsigned"] = "unsigned"
    activation_bits: Bits = 4
    activation_start: Literal["batch", "one"] = "batch"  # an input's step size: from the first batch, or 1
    activation_count: Literal["sample", "batch"] = "sample"  # features in the gradient scale of an input's step size


class INQSpec(Spec):
    """Incremental quantization (Zhou et al. 2017): a growing share of the largest weights is frozen on the grid."""

    kind: Literal["inq"] = "inq"
    bits: Bits = 7
    granularity: Granularity = "channel"
    grid: INQGrid = "uniform"
    fractions: tuple[float, ...] = (0.5, 0.75, 0.875, 1.0)  # frozen after each stage; the first is at the switch
    every: int = Field(ge=1)  # steps from one stage to the next

    @model_validator(mode="after")
    def _ends_whole(self) -> Self:
        if not self.fractions or sorted(self.fractions) != [*self.fractions] or self.fractions[-1] != 1:
            raise ValueError(f"INQ's fractions must increase to 1, as (0.5, 0.75, 0.875, 1.0), got {self.fractions}.")
        if self.fractions[0] <= 0:
            raise ValueError(f"INQ's fractions must be > 0, got {self.fractions}.")
        if self.grid == "power-of-two" and self.bits > 8:
            raise ValueError(f"A grid of powers of two must have 2 to 8 bits, got {self.bits}.")
        return self


class RTNSpec(Spec):
    """Round-to-nearest of a finished run's weights, on the same grid as OBC; nothing is trained."""

    kind: Literal["rtn"] = "rtn"
    bits: Bits = 7
    granularity: Granularity = "channel"


class OBCSpec(Spec):
    """Optimal brain compression of a finished run's weights (Frantar and Alistarh 2022); nothing is trained.

    Calibrated on training images of the source domains. Layers with more than `exact_columns` inputs are quantized in
    the fixed order of GPTQ (Frantar et al. 2023), since the exact order costs rows x columns^3.
    """

    kind: Literal["obc"] = "obc"
    bits: Bits = 7
    granularity: Granularity = "channel"
    images: int = Field(1024, ge=1)  # of the source domains together
    damping: float = Field(0.01, ge=0)  # added to the Hessian's diagonal, as a share of its mean
    exact_columns: int = Field(640, ge=0)


AnyQuantizer = Annotated[QuantSpec | BothSpec | INQSpec | RTNSpec | OBCSpec, Field(discriminator="kind")]


class NoiseSpec(Spec):
    """Uniform noise on the weights that a quantizer would quantize, from the switch on (QT-DoG, Table 15).

    A new draw of U(-a, a) at each step, subtracted again after the gradient, or, if `persistent`, kept. `amplitude`
    is a. If it is None, the expected norm of the noise in each channel is that of rounding to `bits` at the switch:
    for each draw, or, if persistent, for the sum of all draws until the end.
    """

    amplitude: Amplitude = None
    persistent: bool = False
    bits: Bits | None = None
    granularity: Granularity = "channel"

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.amplitude is None) == (self.bits is None):
            raise ValueError(
                "Noise needs either an amplitude, or the bits of the rounding whose norm it has; give one."
            )
        return self
