"""Specs of a run, and of the place where it is computed (for measurements see measurements.py).

A spec is frozen, strict and complete: its canonical JSON contains everything that determines the numbers, and the
digest of that JSON identifies the run. Machine facts (folders, device, threads) are in `Place`, never in a digest.
"""

import os
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from flatlab.specs.base import Spec
from flatlab.specs.corruption import Corrupting, under
from flatlab.specs.optimizing import Optimizing
from flatlab.specs.quantizers import AnyQuantizer, INQSpec, NoiseSpec, OBCSpec, QuantSpec, RTNSpec

Share = Annotated[float, Field(ge=0, lt=1)]
StepKind = Literal["plain", "sam", "sagm", "saq", "gaqat", "fqat"]


class FreezeSpec(Spec):
    """Which step sizes get no task gradient in a step of SAGM, by the disorder of their gradients.

    Disorder is the share of steps in which a gradient's sign differs from its last one (of `between`: in which the
    task gradient's differs from that of the perturbed loss); zeros are skipped.

    The defaults are those of "GAQAT (our reading)" (arXiv 2412.05551), whose text could not be read. FOUND (abstract):
    task and perturbed loss give step sizes conflicting gradients, a metric of disorder, selective freezing. REVIEW
    (public reviews): the disorder of the task gradient, every K steps, below a threshold, freezes the task gradient
    until the next decision. INFERRED: K as 6 % of the steps, the threshold 0.3, one decision for a whole step-size
    tensor, and the rest of the options.
    """

    every: int = Field(ge=1)  # K, in steps
    threshold: float = Field(0.3, ge=0)
    direction: Literal["low", "high"] = "low"  # frozen where the disorder is below the threshold, or above it
    top: float | None = Field(None, ge=0, le=1)  # instead of a threshold: the share of units that is frozen
    trigger: Literal["task", "smooth", "between"] = "task"
    gradient: Literal["task", "smooth", "both"] = "task"  # that frozen units do not get
    unit: Literal["scale", "channel", "layer"] = "scale"  # frozen together
    when: Literal["window", "step"] = "window"  # each K steps, over these; or each step, over a mean of decay 1 - 1/K
    what: Literal["steps", "weights", "layer"] = "steps"  # frozen: step sizes, latent weights, or both
    forever: bool = False  # frozen units are not released
    alternate: bool = False  # no decision: task and smooth gradient alternate, K steps each
    rescale: bool = False  # the remaining gradient has weight 1, not 1/2

    @model_validator(mode="after")
    def _whole_layers(self) -> Self:
        if self.what != "steps" and self.unit != "layer":
            raise ValueError(f"Freezing {self.what} needs the unit layer, got {self.unit}: write --freeze-unit layer.")
        return self


# "FQAT (our reading)" (arXiv 2509.00859): FOUND (abstract): layers are frozen, decided at each training step, by a
# disorder that identifies unstable ones. INFERRED: the decaying mean, the threshold 0.45, that high is unstable.
FREEZING: dict[str, dict[str, Any]] = {
    "gaqat": {},
    "fqat": {"unit": "layer", "when": "step", "direction": "high", "threshold": 0.45},
}


class StepSpec(Spec):
    """How one update is made: plain gradient, or two passes.

    SAM (Foret et al. 2021), SAGM (Wang et al. 2023), SAQ (Liu et al. 2021: SAM at the quantized weight), and SAGM whose
    gradients of step sizes are frozen in part: GAQAT and FQAT.
    """

    later = ("alpha", "perturb", "freezing")

    kind: StepKind = "plain"
    rho: float = Field(0.05, ge=0)  # radius of the ascent, absolute L2
    alpha: float = Field(1e-3, ge=0)  # SAGM's
    perturb: Literal["weights", "all"] = "weights"  # all: step sizes, too
    freezing: FreezeSpec | None = None  # of GAQAT and FQAT

    @property
    def unquantized(self) -> "StepSpec":
        """The rule that makes the same updates in a network that is not quantized."""
        if self.kind == "saq":
            return StepSpec(kind="sam", rho=self.rho)
        return self.replace(kind="sagm", perturb="weights", freezing=None) if self.freezing else self

    @model_validator(mode="after")
    def _frozen_by_rule(self) -> Self:
        if (self.kind in FREEZING) != (self.freezing is not None):
            raise ValueError(f"The step rules {', '.join(FREEZING)} need `freezing`, and only they; got {self.kind}.")
        return self


class AverageSpec(Spec):
    """Which weights a run returns: the trajectory's own, or an average of its iterates.

    `start` and `every` count steps. SWA: iterates from `start` on, every `every` steps. SMA: all from `start` on.
    SWAD (Cha et al. 2021): `every` is its evaluation interval, `converge`, `tolerance` and `ratio` its N_s, N_e, r; its
    rule is Algorithm 1 of the paper, or that of the released code (khanrc/swad), which differs. BMA (Shu et al. 2023,
    CLIPood): all iterates, weighted by the density of Beta(`beta`, `beta`) over the training.
    """

    later = ("beta",)

    kind: Literal["last", "swa", "swad", "sma", "bma"] = "last"
    start: int = Field(0, ge=0)
    every: int = Field(1, ge=1)
    converge: int = Field(3, ge=1)
    tolerance: int = Field(6, ge=1)
    ratio: float = Field(0.3, ge=0)
    refresh_batches: int = Field(500, ge=1)  # training batches for the average's BatchNorm statistics, unless frozen
    rule: Literal["paper", "released"] = "paper"  # SWAD's
    beta: float = Field(0.5, gt=0, le=1e3)  # BMA's


class MixSpec(Spec):
    """MixStyle (Zhou et al. 2021): feature statistics mixed between the images of a batch, during training only."""

    later = ("across",)

    p: float = Field(0.5, ge=0, le=1)  # probability that a stage of a step is mixed
    alpha: float = Field(0.1, gt=0)  # an image's own share is drawn from Beta(alpha, alpha)
    across: bool = False  # mix with an image of another domain ("MixStyle w/ domain label"); else any of the batch


class StopSpec(Spec):
    """Training ends at the first evaluation at which the training images are fitted well enough.

    Their mean cross-entropy is that of the network in evaluation mode, each source domain weighing the same.
    """

    loss: float = Field(gt=0)  # nats
    after: int = Field(0, ge=0)  # first step at which it may end: with a parent, not before the switch


class RunSpec(Optimizing):
    """One trained network: data, composition, schedule and seeds. The paper's name of it is only a label.

    A quantizer that is not trained (rtn, obc) makes a derived run, computed from the finished run without it.
    """

    later: ClassVar[tuple[str, ...]] = ("noise", "test_share", "coral_weight", "mixing", "members", "combine")
    later += ("target_logged", "stop", *Optimizing.later, "margin", "corruption")

    dataset: str
    held_out: str
    corruption: Corrupting = None  # of all images of the held-out domain
    image_size: int = Field(ge=1)
    model: str  # one of the names in models/networks.py, "timm:NAME", or "hf:NAME@HASH" (models/saved.py)
    weights: str = "none"  # "none", "imagenet" or "sha256:..." of a file
    freeze_batchnorm: bool = False
    augment: Literal["none", "domainbed"] = "none"  # DomainBed's crops, flips and colours, for training images
    objective: Literal["erm", "coral", "mms"] = "erm"
    coral_weight: float = Field(1.0, ge=0)  # of CORAL's penalty, relative to the cross-entropy
    margin: float = Field(0.3, ge=0)  # of the margin metric softmax
    mixing: MixSpec | None = None
    step: StepSpec = StepSpec()
    average: AverageSpec = AverageSpec()
    quantizer: AnyQuantizer | None = None
    noise: NoiseSpec | None = None
    frozen: bool = False  # convolutions (and step sizes) stop training at the switch
    switch: int | None = Field(None, ge=0)  # quantizing or freezing starts before the update of this step
    steps: int = Field(ge=1)  # updates 0..steps, one more than this number, as in DomainBed's forks
    eval_every: int = Field(ge=1)
    stop: StopSpec | None = None  # the number of steps is then the largest
    batch_size: int = Field(32, ge=1)  # images per source domain
    lr: float = Field(gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward passes in training; all else is fp32
    seed: int = Field(0, ge=0)  # initialisation and batches
    trial_seed: int = Field(0, ge=0)  # split
    holdout: float = Field(0.2, gt=0, lt=1)
    test_share: Share = 0.0  # of each domain, for an in-domain test: not for training or selection
    target_logged: bool = True  # False: the held-out domain is neither evaluated nor logged, as for tuning
    source: str | None = None  # "sha256:..." of an imported checkpoint, which was not trained here
    members: tuple["RunSpec", ...] = ()  # of an ensemble, which is not trained; other fields are the first member's
    combine: Literal["logits", "probabilities"] = "logits"  # averaged by an ensemble (QT-DoG Eq. 6: logits)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        trained = self.quantizer is not None and not isinstance(self.quantizer, RTNSpec | OBCSpec)
        if (self.switch is None) == (trained or self.frozen or self.noise is not None):
            raise ValueError("A quantizer, noise or freezing in training needs a switch step, and only they have one.")
        if self.noise is not None and trained:
            raise ValueError("Noise replaces a quantizer; give one of the two.")
        if self.step != self.step.unquantized and not trained:
            raise ValueError(
                f"The step rule {self.step.kind} needs a quantizer in training; add --quantizer lsq, or choose --step "
                f"{self.step.unquantized.kind}."
            )
        if self.step.freezing and not isinstance(self.quantizer, QuantSpec):
            raise ValueError(
                f"The step rule {self.step.kind} needs learned step sizes, got the quantizer {self.quantizer.kind}; "  # type: ignore[union-attr]
                "add --quantizer lsq, or choose --step sagm."
            )
        if self.settled is not None and self.source is None and self.settled > self.steps:
            what = "switch" if self.settled == self.switch else "last stage of INQ"
            raise ValueError(
                f"The {what} must be at a step <= {self.steps} (--steps), got {self.settled}: choose a smaller "
                "--quantize-at."
            )
        if self.stop and (self.average.kind != "last" or self.stop.after < (self.settled or 0)):
            raise ValueError(
                f"Training to a loss needs the last weights and no stop before the switch at step {self.settled}, got "
                f"the average {self.average.kind} and stop.after={self.stop.after}."
            )
        if self.warmup > self.steps:
            raise ValueError(f"The warm-up must end at a step <= {self.steps} (--steps), got --warmup {self.warmup}.")
        if self.average.kind in ("swa", "sma") and self.average.start > self.steps:
            raise ValueError(
                f"{self.average.kind.upper()} must start at a step <= {self.steps}, got {self.average.start}."
            )
        return self

    @model_validator(mode="after")
    def _some_are_trained_on(self) -> Self:
        if self.holdout + self.test_share >= 1:
            raise ValueError(
                f"The shares for validation ({self.holdout:g}) and test ({self.test_share:g}) must sum to less than 1: "
                "choose a smaller --test-share."
            )
        return self

    @model_validator(mode="after")
    def _members_agree(self) -> Self:
        whole: tuple[RunSpec, ...] = (self, *self.members)
        facts = {(each.dataset, each.target, each.image_size) for each in whole}
        if len(facts) > 1:
            raise ValueError(
                "An ensemble and its members must have the same data set, held-out domain and image size, got "
                f"{sorted(facts)}."
            )
        return self

    @property
    def label(self) -> str:
        """A short name of the composition, such as "sam-swad" or "erm + 2 x lsq"; "erm" for the defaults."""
        if self.members:
            counts = Counter(f"({each.label})" if each.members else each.label for each in self.members)
            return " + ".join(
                f"{count} x {label}" if count > 1 or len(counts) == 1 else label for label, count in counts.items()
            )
        mixed = "" if self.mixing is None else "mixstyle-across" if self.mixing.across else "mixstyle"
        parts = [self.objective, mixed, self.step.kind]
        parts += [self.quantizer.kind if self.quantizer else "", "frozen" if self.frozen else ""]
        parts += ["noise" if self.noise else "", self.average.kind]
        unusual = [part for part in parts if part not in ("", "erm", "plain", "last")]
        return "imported" if self.source else "-".join(unusual) or "erm"

    @property
    def target(self) -> str:
        """The held-out domain, and the corruption of its images, as text."""
        return f"{self.held_out}{under(self.corruption)}"

    @property
    def saved(self) -> bool:
        """Whether the network is one that transformers saved in a folder."""
        return self.model.startswith(("hf:", "clip:"))

    @property
    def trajectory(self) -> "RunSpec":
        """The run whose iterates this one averages: the same spec without the average."""
        return self.replace(average=AverageSpec())

    def iterates(self, every: int) -> range:
        """Return the steps from the switch on that are multiples of a number: those whose weights are averaged."""
        return range(-(-(self.switch or 0) // every) * every, self.steps + 1, every)

    @property
    def derived(self) -> bool:
        """Whether the run is computed from its finished parent, without training."""
        return isinstance(self.quantizer, RTNSpec | OBCSpec) and not self.members

    @property
    def made_from(self) -> tuple["RunSpec", ...]:
        """The finished runs this one is computed from: members of an ensemble, parent of a derived run; or none."""
        if self.derived and self.parent and not self.source:
            return (self.parent,)
        return self.members

    @property
    def settled(self) -> int | None:
        """The step from which the network is fully quantized or frozen: the switch, or the last stage of INQ."""
        if self.switch is not None and isinstance(self.quantizer, INQSpec):
            return self.switch + (len(self.quantizer.fractions) - 1) * self.quantizer.every
        return self.switch

    @property
    def parent(self) -> "RunSpec | None":
        """The run that a derived run is computed from; else the trajectory that equals this one up to its switch."""
        if self.derived:
            return self.replace(quantizer=None)
        if self.switch is None or self.members:
            return None
        before = {"step": self.step.unquantized, "average": AverageSpec()}
        return self.replace(quantizer=None, noise=None, frozen=False, switch=None, **before)


def _written(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Location = Annotated[str | None, BeforeValidator(_written)]  # a path, as text or os.PathLike; kept as text


class Place(Spec):
    """Machine facts: location of the data, device and threads. Recorded with a run, never part of its digest."""

    later = ("model_dir",)

    data_dir: Location = None
    model_dir: Location = None  # folder of a network that transformers saved
    weights_file: Location = None
    cache: Location = None  # folder of decoded images; None: the platform's default
    device: str = "auto"
    threads: int = Field(1, ge=1)
