"""What is asked for: a run, and the place where the work is done (probespecs.py: what is measured of it).

A spec is frozen, strict and complete: its canonical JSON names everything that decides the numbers, and the digest
of that JSON is the name of the run. Machine facts (folders, device, threads) live in `Place` and never in a digest.
"""

import hashlib
import json
import reprlib
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from flatlab.errors import UserError


class Spec(BaseModel):
    """A frozen record that refuses unknown fields and loose types, with one sentence per mistake."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    # Fields younger than the first stores. At its default, which must stay what was done before the field came, such a
    # field is left out of the JSON: runs made before keep their names.
    YOUNG: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _keep_old_names(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = type(self).model_fields
        idle = {name for name in self.YOUNG if getattr(self, name) == usual[name].default}
        return {name: value for name, value in written(self).items() if name not in idle}

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """Return a spec, with one sentence where a field does not do.

        Args:
            fields: by name.

        Raises:
            UserError: where a field is unknown, missing or of the wrong type.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise UserError(_sentence(cls, error)) from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a spec from its JSON.

        Args:
            text: JSON as `canonical` writes it.

        Raises:
            UserError: where a field is unknown, missing or of the wrong type.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(_sentence(cls, error)) from None

    def canonical(self) -> str:
        """Return the JSON with sorted keys and no spaces: equal specs, equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def replace(self, **fields: Any) -> Self:
        """Return a copy with other fields, checked anew."""
        return self.make(**{**dict(self), **fields})


_BOUNDS = {  # pydantic's kinds of error -> what it should have said, with the bound's name
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
}


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    """Say the first mistake of a validation in one sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    if not where:
        return what
    if first["type"] == "extra_forbidden":
        return f"{kind.__name__} has no field {where!r}; it has {', '.join(kind.model_fields)}."
    if first["type"] == "missing":
        return f"{kind.__name__} needs the field {where!r}, and it is missing."
    expected = _BOUNDS.get(first["type"], "").format(**first.get("ctx", {}))
    tail = f"it must be {expected}" if expected else f"{what[0].lower()}{what[1:]}"
    return f"{kind.__name__}: {where}={reprlib.repr(first['input'])} does not do: {tail}."


class QuantSpec(Spec):
    """Learned step size quantization of the weights (Esser et al. 2020; QT-DoG App. B)."""

    kind: Literal["lsq"] = "lsq"
    bits: int = Field(7, ge=2, le=16)
    granularity: Literal["channel", "tensor"] = "channel"
    grad_scale: Literal["shared", "tensor", "none"] = "shared"
    scale_lr: float = Field(1e-5, ge=0)  # the paper is silent; Adam moves a step size of 3e-3 by 0.3 % a step


class StepSpec(Spec):
    """How one update is made: plain gradient, or SAM's two passes (Foret et al. 2021)."""

    kind: Literal["plain", "sam"] = "plain"
    rho: float = Field(0.05, ge=0)  # radius of SAM's ascent, absolute L2


class AverageSpec(Spec):
    """Which weights a run hands over: the trajectory's own, or an average of its iterates.

    `start` and `every` count steps. SWA: iterates from `start` on, each `every`. SMA: all from `start` on.
    SWAD (Cha et al. 2021): `every` is its evaluation interval, `converge`, `tolerance` and `ratio` its N_s, N_e, r.
    """

    kind: Literal["last", "swa", "swad", "sma"] = "last"
    start: int = Field(0, ge=0)
    every: int = Field(1, ge=1)
    converge: int = Field(3, ge=1)
    tolerance: int = Field(6, ge=1)
    ratio: float = Field(0.3, ge=0)
    refresh_batches: int = Field(500, ge=1)  # training batches for the average's BatchNorm statistics, unless frozen
    exact_repo: bool = False  # bug-compatible with khanrc/swad instead of the paper's plain rule


class RunSpec(Spec):
    """One trained network: data, composition, schedule and seeds. The paper's name for it is only a label."""

    YOUNG: ClassVar[tuple[str, ...]] = ("test_share",)
    dataset: str
    held_out: str
    image_size: int = Field(ge=1)
    model: str
    weights: str = "none"  # "none", "imagenet" or "sha256:..." of a file
    freeze_batchnorm: bool = False
    augment: Literal["none", "domainbed"] = "none"  # DomainBed's crops, flips and colours, for training images
    objective: Literal["erm"] = "erm"
    step: StepSpec = StepSpec()
    average: AverageSpec = AverageSpec()
    quantizer: QuantSpec | None = None
    frozen: bool = False  # convolutions (and step sizes) stop training at the switch
    switch: int | None = Field(None, ge=0)  # before this step's update the quantizer or the freezing sets in
    steps: int = Field(ge=1)  # updates 0..steps are made, as in DomainBed's forks: one more than the number says
    eval_every: int = Field(ge=1)
    batch_size: int = Field(32, ge=1)  # images per source domain
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the training's forward passes; all else is fp32
    seed: int = Field(0, ge=0)  # initialisation and batches
    trial_seed: int = Field(0, ge=0)  # split
    holdout: float = Field(0.2, gt=0, lt=1)
    test_share: float = Field(0.0, ge=0, lt=1)  # of each domain, for an in-domain test: neither trained nor selected on
    source: str | None = None  # "sha256:..." of an imported checkpoint, which was not trained here

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.switch is None) != (self.quantizer is None and not self.frozen):
            raise ValueError("A switch step goes with a quantizer or with freezing, and they with it.")
        if self.switch is not None and self.source is None and self.switch > self.steps:
            raise ValueError(
                f"The switch at step {self.switch} lies beyond the end at {self.steps}; "
                "choose --quantize-at of at most --steps."
            )
        if self.average.kind in ("swa", "sma") and self.average.start > self.steps:
            raise ValueError(
                f"{self.average.kind.upper()} would start at step {self.average.start}, beyond the end at {self.steps}."
            )
        return self

    @property
    def label(self) -> str:
        """The composition in a word or two, such as "sam-swad"; the objective where nothing else is unusual."""
        parts = [self.step.kind, self.quantizer.kind if self.quantizer else "", "frozen" if self.frozen else ""]
        unusual = [part for part in [*parts, self.average.kind] if part not in ("", "plain", "last")]
        return "imported" if self.source else "-".join(unusual) or self.objective

    @property
    def trajectory(self) -> "RunSpec":
        """The run whose iterates this one averages: all but the average."""
        return self.replace(average=AverageSpec())

    @property
    def parent(self) -> "RunSpec | None":
        """The trajectory that this one equals up to its switch."""
        if self.switch is None:
            return None
        return self.replace(quantizer=None, frozen=False, switch=None, average=AverageSpec())


class Place(Spec):
    """Machine facts: where the data lie and what computes. Recorded beside a run, never part of its name."""

    data_dir: str | None = None
    weights_file: str | None = None
    cache: str | None = None  # of decoded images; None: the platform's
    device: str = "auto"
    threads: int = Field(1, ge=1)
