"""Directions that span a line or a plane through a point, with points marked in it and the variance explained.

Every plane contains the point of its landscape, so that the value at the origin is its loss. BatchNorm's running
statistics are those of that network everywhere; only weights move.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray, Normalisation
from flatlab.errors import UserError, count_of
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.flatness.perturbations import check_normalisation, draw_direction, scale_to_weights
from flatlab.results.spectrum import Spectrum, Which

SAME = 1e-6  # of the longest step: checkpoints that are nearer to a line than that span no plane


@dataclass(frozen=True, eq=False, kw_only=True)
class Directions:
    """Directions through a landscape's point w: the place at coordinates (a, b) is w + a u + b v.

    Attributes:
        vectors: (D, P).
        labels: (D,) what each axis means, with units.
        marks: (K, D) coordinates of points of interest, such as checkpoints, projected onto the plane.
        mark_labels: (K,) their names.
        distances: (K,) Euclidean distances of these points from the plane.
        explained: (D,) share of a trajectory's variance along each axis; NaN for other directions.
        connected: whether the marks are a path.
    """

    vectors: Tensor
    labels: tuple[str, ...]
    marks: FloatArray
    mark_labels: tuple[str, ...] = ()
    distances: FloatArray
    explained: FloatArray
    connected: bool = False

    @property
    def cosine(self) -> float:
        """The cosine of the first two directions; random ones are not orthogonalised."""
        u, v = self.vectors[:2].double()
        return float(u @ v / (u.norm() * v.norm()))


def random_directions(
    landscape: Landscape, *, count: int = 2, seed: int = 0, normalisation: Normalisation = "filter"
) -> Directions:
    """Draw Gaussian directions; by default each filter has the norm of the weights' (Li et al. 2018, section 4).

    BatchNorm and biases are fixed, as in the authors' examples (`ignore="biasbn"`). They are the directions of
    `sphere_flatness`: models of one architecture share them.
    """
    kind = check_normalisation(normalisation, landscape)
    vectors = torch.stack([draw_direction(landscape, seed, k, normalisation=kind) for k in range(count)])
    unit = "L2" if kind == "none" else f"share of each {kind}'s norm"
    return _bare(vectors, [f"random direction {k + 1} ({unit})" for k in range(count)])


def eigen_directions(
    landscape: Landscape, *, count: int = 2, which: Which = "LA", seed: int = 0, spectrum: Spectrum | None = None
) -> Directions:
    """Return eigenvectors of the Hessian, of unit length: directions of largest (with "SA", most negative) curvature.

    Args:
        landscape: around the point.
        count: number of directions.
        which: end of the spectrum, as in `hessian_spectrum`.
        seed: of its starting vector.
        spectrum: a given spectrum with its vectors, instead of a new one.

    Raises:
        UserError: if the given spectrum has no vectors, too few, or those of another model.
    """
    found = spectrum or hessian_spectrum(landscape, k=count, which=which, seed=seed, vectors=True)
    if found.eigenvectors is None or found.eigenvectors.shape[1] < count:
        raise UserError(f"The spectrum has fewer than {count} vectors: hessian_spectrum(k={count}, vectors=True).")
    vectors = torch.stack([checked(landscape, vector) for vector in found.eigenvectors.T[:count]])
    return _bare(vectors, [f"eigenvector of λ = {value:.3g} (L2)" for value in found.eigenvalues[:count]])


def given_directions(
    landscape: Landscape, vectors: Sequence[Tensor], *, normalisation: Normalisation = "none"
) -> Directions:
    """Return the user's own flat vectors (P,) as directions, unchanged or scaled to the weights.

    Raises:
        UserError: if one is of another model, zero, or not finite.
    """
    rows = [checked(landscape, vector) for vector in vectors]
    if not rows:
        raise UserError("vectors must be one flat vector for a line, two for a plane, got none.")
    if normalisation != "none":
        rows = [scale_to_weights(row, landscape, check_normalisation(normalisation, landscape)) for row in rows]
    return _bare(torch.stack(rows), [f"direction {k + 1}" for k in range(len(rows))])


def plane_through(
    landscape: Landscape, second: Tensor, third: Tensor, *, names: Sequence[str] = ("1", "2", "3")
) -> Directions:
    """Span the plane through three checkpoints, the landscape's own first, with orthonormal axes (Garipov et al. 2018).

    Coordinates are Euclidean distances: the first checkpoint is (0, 0), the second (|w2 - w1|, 0).

    Raises:
        UserError: if a checkpoint is of another model, or the three lie on a line.
    """
    steps = [checked(landscape, each, zero=True).double() - landscape.point.double() for each in (second, third)]
    u = steps[0] / _length(steps[0], "The second checkpoint is the first one: three points span a plane.", steps)
    rest = steps[1] - (steps[1] @ u) * u
    rest -= (rest @ u) * u  # twice is enough
    v = rest / _length(rest, "The three checkpoints lie on one line, and span no plane: name others.", steps)
    basis = torch.stack([u, v])
    found = _bare(basis.to(landscape.point), [f"distance along {names[0]} to {names[1]} (L2)", "distance across (L2)"])
    return _marked(landscape, found, [landscape.point, second, third], list(names))


def trajectory_directions(
    landscape: Landscape, points: Sequence[Tensor], *, count: int = 2, names: Sequence[str] | None = None
) -> Directions:
    """Return the principal directions of a training's iterates, of unit length, through the landscape's point.

    Args:
        landscape: usually around the last iterate.
        points: iterates (P,), in order; each is marked at its projection, with its distance from the plane.
        count: number of directions.
        names: of the iterates.

    Raises:
        UserError: if there are fewer iterates than directions, or they span too little.
    """
    if len(points) <= count:
        raise UserError(f"{count} principal directions need at least {count + 1} checkpoints, got {len(points)}.")
    rows = torch.stack([checked(landscape, point, zero=True).double() for point in points])
    rows = rows - rows.mean(dim=0)
    # The Gram matrix (T, T) has the same spectrum as the covariance (P, P), and fits in memory.
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    if not values[count - 1] > SAME**2 * values[0]:
        raise UserError(
            f"The checkpoints do not span {count_of(count, 'direction')}: they lie on a line, or are the same."
        )
    basis = (vectors[:, :count].T @ rows) / values[:count, None].sqrt()
    explained = (values[:count] / values.sum()).cpu().numpy()
    labels = [f"PC {k + 1}, {share:.1%} of the variance (L2)" for k, share in enumerate(explained)]
    found = _bare(basis.to(landscape.point), labels)
    marked = _marked(landscape, found, points, list(names or map(str, range(len(points)))))
    return Directions(**{**vars(marked), "explained": explained.astype(np.float64), "connected": True})


def _bare(vectors: Tensor, labels: Sequence[str]) -> Directions:
    count = len(vectors)
    return Directions(
        vectors=vectors,
        labels=tuple(labels),
        marks=np.zeros((0, count)),
        distances=np.zeros(0),
        explained=np.full(count, np.nan),
    )


def _marked(landscape: Landscape, plane: Directions, points: Sequence[Tensor], names: Sequence[str]) -> Directions:
    """Mark points in a plane with orthonormal axes, each at its projection."""
    basis = plane.vectors.double()
    steps = torch.stack([checked(landscape, p, zero=True).to(basis) - landscape.point.to(basis) for p in points])
    coordinates = steps @ basis.T
    away = torch.linalg.vector_norm(steps - coordinates @ basis, dim=1)
    marks, distances = (each.cpu().numpy().astype(np.float64) for each in (coordinates, away))
    return Directions(**{**vars(plane), "marks": marks, "mark_labels": tuple(names), "distances": distances})


def checked(landscape: Landscape, vector: Tensor, *, zero: bool = False) -> Tensor:
    """Return a direction, or a checkpoint, which may be zero, as (P,) in the dtype and on the device of the point.

    Raises:
        UserError: if it is of another model, zero throughout, or not finite.
    """
    try:
        flat = landscape.as_point(vector)
    except UserError:
        raise UserError(
            f"A direction or checkpoint of shape {tuple(vector.shape)} is not of this landscape's model, whose points"
            f" have shape ({landscape.num_params},): take those of the same architecture and `params`."
        ) from None
    if not torch.isfinite(flat).all() or not (zero or flat.any()):
        raise UserError(
            "A direction or checkpoint must be finite, and a direction not zero throughout: check the file it is from."
        )
    return flat


def _length(vector: Tensor, sentence: str, steps: Sequence[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector)
    if not length > SAME * max(torch.linalg.vector_norm(step) for step in steps):
        raise UserError(sentence)
    return length
