"""The spec of the measures that are compared with generalization gaps."""

from typing import Literal

from pydantic import Field

from flatlab.specs.measurement import PRODUCT, MeasurementSpec, Sizes

CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "contrast", "pixelate")
SEVERITIES = 5


class GeneralisationSpec(MeasurementSpec):
    """PAC-Bayes' sigma, adaptive sharpness, distance, margin and rounding penalty of a run on its source domains.

    Also its accuracy on corrupted images of the source domains, those used neither for training nor for selection.
    """

    metric: Literal["generalisation"] = "generalisation"
    rho: float = Field(0.02, gt=0)  # of worst-case adaptive sharpness, relative to each weight
    ascent: int = Field(10, ge=1)  # steps of its search
    drop: float = Field(0.1, gt=0, lt=1)  # of the accuracy, at PAC-Bayes' sigma
    num_samples: int = Field(5, ge=2)  # draws of noise at each sigma
    products: int = Field(16, ge=2)  # with the Hessian, for the penalty of rounding
    corruptions: tuple[str, ...] = CORRUPTIONS  # each at all severities

    def passes(self, sizes: Sizes) -> float:
        """Return the estimated number of images forwarded."""
        of_each = 2 * 12 * self.num_samples + 4 * self.ascent + PRODUCT * self.products
        corrupted = 0.2 * sum(sizes.values()) * SEVERITIES * len(self.corruptions)
        return float(self.count(sizes) * (len(sizes) - 1) / len(sizes) * of_each + corrupted)
