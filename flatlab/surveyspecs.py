"""What is asked of a run's surroundings: planes, lines, the triangle of traces, the audit of scales."""

from typing import Literal

from pydantic import Field

from flatlab.probing import FORESEEN, PILOT, PRODUCT, Probing, Sizes


class SurfaceSpec(Probing):
    """Loss and accuracy of each domain on a plane through the checkpoint."""

    later = ("every", "recompute")

    metric: Literal["surface"] = "surface"
    # filter-normalised; top eigenvectors; through other runs; principal ones of the run's kept checkpoints
    axes: Literal["random", "hessian", "runs", "trajectory"] = "random"
    through: tuple[str, ...] = ()  # digests: two others that span the plane, or a trajectory of four and more
    every: int | None = Field(None, ge=1)  # steps between the checkpoints of a run's own trajectory
    grid: int = Field(33, ge=2)
    extent: float = Field(1.0, gt=0)  # half the length of each axis; around checkpoints where they span the plane
    refine: float | None = Field(0.05, gt=0)  # share of the height that interpolation may be off by; None: whole grid
    recompute: int | None = Field(None, ge=2)  # images of each seen domain: BatchNorm's statistics anew at each place

    @property
    def spanned(self) -> bool:
        """Whether checkpoints span the plane: the grid then lies around them."""
        return self.axes in ("runs", "trajectory")

    def passes(self, sizes: Sizes) -> float:
        """Return the images that are forwarded at most: refinement saves some.

        Args:
            sizes: images of each domain.
        """
        return _looked_at(self, sizes, self.recompute) * self.grid**2


class ConnectionSpec(Probing):
    """The straight line from the checkpoint to another run's, over the seen domains and over the unseen one."""

    metric: Literal["connection"] = "connection"
    space: Literal["baked"] = "baked"  # both ends are networks as they compute
    to: str  # digest
    grid: int = Field(33, ge=3)
    recompute: int | None = Field(None, ge=2)  # images of each seen domain: BatchNorm's statistics anew at each place

    def passes(self, sizes: Sizes) -> float:
        """Return the images that are forwarded; statistics are computed for the seen domains, and for the unseen one.

        Args:
            sizes: images of each domain.
        """
        return _looked_at(self, sizes, 2 * (self.recompute or 0)) * self.grid


def _looked_at(spec: Probing, sizes: Sizes, recompute: int | None) -> float:
    """Return the images of a place: those evaluated, and those of the seen domains that give statistics."""
    return float(spec.count(sizes) + (recompute or 0) * (len(sizes) - 1))


class TriangleSpec(Probing):
    """The trace of the Hessian in three independent ways."""

    metric: Literal["triangle"] = "triangle"
    space: Literal["baked"] = "baked"  # through rounding there is no curvature
    rel_error: float = Field(0.05, gt=0)

    def passes(self, sizes: Sizes) -> float:
        """Return the images that are forwarded, roughly: products for trace and density, and seven spheres.

        Args:
            sizes: images of each domain.
        """
        return float(self.count(sizes) * PRODUCT * (20 + PILOT + 96) + 7 * FORESEEN / self.rel_error**2)


class AuditSpec(Probing):
    """How measures of flatness move under rescalings that leave the function as it is."""

    metric: Literal["audit"] = "audit"
    space: Literal["baked"] = "baked"
    most: float = Field(4.0, gt=1)
    num_samples: int = Field(20, ge=2)

    def passes(self, sizes: Sizes) -> float:
        """Return the images that are forwarded, roughly: four spheres, a trace and an eigenvalue of three networks.

        Args:
            sizes: images of each domain.
        """
        return float(3 * self.count(sizes) * (4 * self.num_samples + PRODUCT * (20 + PILOT + 10)))
