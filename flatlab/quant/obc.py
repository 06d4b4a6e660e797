"""OBC, optimal brain compression: weights are quantized one at a time, and the remaining ones compensate the error.

Sources: Frantar and Alistarh 2022 (arXiv 2208.11580), section 4 and its trueobs.py: the exact greedy order of each
row; Frantar et al. 2023 (GPTQ, arXiv 2210.17323), section 3: one fixed order for all rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatlab.errors import UserError
from flatlab.quant.codebook import check_finite, levels, searched_scale

AT_ONCE = (
    2**25,
    2**20,
)  # numbers in the inverse Hessians of rows quantized together: accelerator, CPU (fit its cache)


@dataclass(frozen=True)
class Rounded:
    """A weight that was quantized after training, compared with rounding to the nearest level.

    Attributes:
        codes: integers, in the weight's shape.
        scale: step sizes, shape (C, 1, ...) or ().
        errors: (C,), layer error (w_q - w) H (w_q - w)' of each output row.
        nearest: (C,), that error for rounding to the nearest level.
        order: "exact" (greedy in each row), or "fixed" (GPTQ).
    """

    codes: Tensor
    scale: Tensor
    errors: Tensor
    nearest: Tensor
    order: str

    @property
    def rows_worse(self) -> int:
        """Number of rows with a larger error than rounding to the nearest level, by more than a relative 1e-9."""
        return int((self.errors > self.nearest * (1 + 1e-9)).sum())

    def facts(self) -> dict[str, Any]:
        """Return the layer's summed errors and the number of worse rows, for the log."""
        sums = {"error": float(self.errors.sum()), "error_nearest": float(self.nearest.sum())}
        return {"order": self.order, **sums, "rows": len(self.errors), "rows_worse": self.rows_worse}


@torch.no_grad()
def obc(
    weight: Tensor,
    moments: Tensor,
    *,
    bits: int = 7,
    granularity: str = "channel",
    damping: float = 0.01,
    exact_columns: int = 300,
) -> Rounded:
    """Quantize a weight such that ||W X - W_q X||^2 is small, row by row.

    Args:
        weight: shape (C, ...).
        moments: H, shape (groups, columns, columns), from `second_moments`.
        bits: 2 to 16.
        granularity: "channel" or "tensor", for the step sizes, which `searched_scale` returns.
        damping: added to the diagonal of H, as a fraction of its mean.
        exact_columns: with more columns, GPTQ's fixed order is used, since the exact one costs rows x columns^3.

    Raises:
        UserError: moments do not fit the weight, or moments or weight are not finite.
    """
    check_finite(weight, "The weight")
    check_finite(moments, "Each calibration moment")
    groups, columns = moments.shape[0], weight[0].numel()
    if moments.shape != (groups, columns, columns) or len(weight) % groups:
        raise UserError(
            f"Calibration moments of shape {tuple(moments.shape)} do not fit a weight of shape {tuple(weight.shape)}: "
            f"expected (groups, {columns}, {columns})."
        )
    span, exact = levels(bits), columns <= exact_columns
    scale = searched_scale(weight, bits, granularity=granularity)
    rows = weight.reshape(groups, -1, columns).double()  # (groups, rows, columns)
    steps = scale.double().expand(len(weight), *[1] * (weight.dim() - 1)).reshape(groups, -1, 1)
    quantize = _exactly if exact else _in_order
    parts = []
    for own, step, hessian in zip(rows, steps, moments.double(), strict=True):
        alive, damped = _prepared(hessian, damping)
        parts.append(quantize(own * alive, step, torch.linalg.inv(damped), span))
    codes = torch.stack(parts)
    nearest = (rows / steps).round().clamp(*span)
    errors, plain = (_row_errors(each * steps - rows, moments.double()) for each in (codes, nearest))
    return Rounded(codes.reshape(weight.shape), scale, errors, plain, order="exact" if exact else "fixed")


def _prepared(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return which columns have inputs other than 0, and the damped Hessian; the other columns' weights become 0."""
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    ridge = damping * diagonal.mean() + torch.where(alive, 0.0, 1.0)
    damped = hessian + torch.diag(ridge)
    if torch.linalg.cholesky_ex(damped).info:
        damped = damped + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * diagonal.mean()
    return alive, damped


def _row_errors(difference: Tensor, moments: Tensor) -> Tensor:
    """Return e H e' of each row e of (groups, rows, columns), shape (groups * rows,)."""
    return ((difference @ moments) * difference).sum(-1).reshape(-1)


def _exactly(rows: Tensor, steps: Tensor, inverse: Tensor, span: tuple[int, int]) -> Tensor:
    """Quantize each row greedily: next the weight of least cost, whose error the remaining ones compensate."""
    many = max(1, AT_ONCE[inverse.device.type == "cpu"] // inverse.numel())
    pairs = zip(torch.split(rows, many), torch.split(steps, many), strict=True)
    return torch.cat([_greedily(own, step, inverse.repeat(len(own), 1, 1), span) for own, step in pairs])


def _greedily(rows: Tensor, steps: Tensor, inverse: Tensor, span: tuple[int, int]) -> Tensor:
    """Quantize rows (R, d), each in its own order; `inverse` (R, d, d) is overwritten.

    The cost of a weight is (w - q)^2 / [H^-1]_pp. Weights more than half a step beyond the outer levels are quantized
    first, the farthest one first, before compensation increases their error (trueobs.py).
    """
    rows, each = rows.clone(), torch.arange(len(rows), device=rows.device)
    codes, done = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    for _ in range(rows.shape[1]):
        code = (rows / steps).round().clamp(*span)
        error = (rows - code * steps).masked_fill(done, 0.0)
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        cost = (error.square() / diagonal).masked_fill(done, torch.inf)
        far = error.abs().masked_fill(done, -1.0)
        outside = far.amax(1) > 0.5 * steps[:, 0] * (1 + 1e-9)
        chosen = torch.where(outside, far.argmax(1), cost.argmin(1))
        codes[each, chosen] = code[each, chosen]
        done[each, chosen] = True
        line = inverse[each, chosen]  # (R, d)
        pivot = line[each, chosen].unsqueeze(1)
        rows -= line * (error[each, chosen].unsqueeze(1) / pivot)
        inverse.baddbmm_(line.unsqueeze(2), (line / pivot).unsqueeze(1), alpha=-1)
    return codes


def _in_order(rows: Tensor, steps: Tensor, inverse: Tensor, span: tuple[int, int]) -> Tensor:
    """Quantize the columns from first to last, in all rows at once (GPTQ, algorithm 1)."""
    upper = torch.linalg.cholesky(inverse, upper=True)
    rows, codes = rows.clone(), torch.zeros_like(rows)
    for column in range(rows.shape[1]):
        codes[:, column] = (rows[:, column] / steps[:, 0]).round().clamp(*span)
        error = (rows[:, column] - codes[:, column] * steps[:, 0]) / upper[column, column]
        rows[:, column:] -= error.unsqueeze(1) * upper[column, column:]
    return codes
