"""The fields common to all measurements, and the estimate of their cost."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from flatlab.specs.base import LARGEST_INT, LARGEST_SEED, Spec
from flatlab.specs.corruption import Corrupting, under

FORESEEN = 20  # images needed for one radius at a relative error of 1; the pilot gives a better estimate
PRODUCT = 10  # cost of a Hessian-vector product, in forward passes
PILOT = 64  # products that a trace usually needs, beyond its basis
Sizes = Mapping[str, int]  # images of each domain


class MeasurementSpec(Spec):
    """The fields common to all measurements: which checkpoint, on which images."""

    later: ClassVar[tuple[str, ...]] = ("corruption",)

    metric: str
    checkpoint: Literal["selected", "last"] = Field(
        "selected", description="Checkpoint: selected (by source validation accuracy) or last."
    )
    split: Literal["in", "out"] = "in"
    images: int | None = Field(
        None, ge=1, le=LARGEST_INT, description="Maximum number of images of each domain; all if not given."
    )
    space: Literal["baked", "latent", "codes"] = Field(
        "baked",
        description="Weights of a quantized run: baked (quantized), latent (before quantization) or, of flatness, "
        "codes (a random share of them moves by one).",
    )
    params: str | None = Field(
        None, description="Pattern of parameter names, such as 'features.0*'; all parameters if not given."
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the random directions.")
    corruption: Corrupting = Field(
        None,
        description="Corruption of all images, as NAME:SEVERITY with a severity from 1 to 5, such as gaussian_noise:3.",
    )

    def count(self, sizes: Sizes) -> int:
        """Return the number of images evaluated."""
        return sum(min(size, self.images or size) for size in sizes.values())

    def passes(self, sizes: Sizes) -> float:
        """Return the estimated number of images forwarded, for plans and progress bars; by default each once.

        Args:
            sizes: number of images of each domain.
        """
        return float(self.count(sizes))

    @property
    def under(self) -> str:
        """The corruption, as text after the name of a domain; empty without one."""
        return under(self.corruption)

    @property
    def pilots(self) -> tuple[tuple[str, "MeasurementSpec"], ...]:
        """Measurements of other runs that this one requires, each with its run's digest."""
        return ()
