"""What is asked for: a run, and the place where the work is done (measurements.py: what is measured of it).

A spec is frozen, strict and complete: its canonical JSON names everything that decides the numbers, and the digest
of that JSON is the name of the run. Machine facts (folders, device, threads) live in `Place` and never in a digest.
"""

from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from flatlab.specs.base import Spec
from flatlab.specs.quantizers import AnyQuantizer, INQSpec, NoiseSpec, OBCSpec, RTNSpec


class StepSpec(Spec):
    """How one update is made: plain gradient, or SAM's two passes (Foret et al. 2021)."""

    kind: Literal["plain", "sam"] = "plain"
    rho: float = Field(0.05, ge=0)  # radius of SAM's ascent, absolute L2


class AverageSpec(Spec):
    """Which weights a run hands over: the trajectory's own, or an average of its iterates.

    `start` and `every` count steps. SWA: iterates from `start` on, each `every`. SMA: all from `start` on.
    SWAD (Cha et al. 2021): `every` is its evaluation interval, `converge`, `tolerance` and `ratio` its N_s, N_e, r; its
    rule is Algorithm 1 of the paper, or that of the released code (khanrc/swad), which is another one.
    """

    kind: Literal["last", "swa", "swad", "sma"] = "last"
    start: int = Field(0, ge=0)
    every: int = Field(1, ge=1)
    converge: int = Field(3, ge=1)
    tolerance: int = Field(6, ge=1)
    ratio: float = Field(0.3, ge=0)
    refresh_batches: int = Field(500, ge=1)  # training batches for the average's BatchNorm statistics, unless frozen
    rule: Literal["paper", "released"] = "paper"  # SWAD's


class MixSpec(Spec):
    """MixStyle (Zhou et al. 2021): feature statistics mixed between the images of a batch, in training alone."""

    later = ("across",)

    p: float = Field(0.5, ge=0, le=1)  # probability that a stage of a step is mixed
    alpha: float = Field(0.1, gt=0)  # an image's own share is drawn from Beta(alpha, alpha)
    across: bool = False  # the other image is of another domain ("MixStyle w/ domain label"); else any of the batch


class RunSpec(Spec):
    """One trained network: data, composition, schedule and seeds. The paper's name for it is only a label.

    A quantizer that does not train (rtn, obc) makes a derived run: of the same run without it, once that is done.
    """

    later = ("noise", "test_share", "coral_weight", "mixing", "members", "combine", "target_logged")

    dataset: str
    held_out: str
    image_size: int = Field(ge=1)
    model: str
    weights: str = "none"  # "none", "imagenet" or "sha256:..." of a file
    freeze_batchnorm: bool = False
    augment: Literal["none", "domainbed"] = "none"  # DomainBed's crops, flips and colours, for training images
    objective: Literal["erm", "coral"] = "erm"
    coral_weight: float = Field(1.0, ge=0)  # of CORAL's penalty beside the cross-entropy
    mixing: MixSpec | None = None
    step: StepSpec = StepSpec()
    average: AverageSpec = AverageSpec()
    quantizer: AnyQuantizer | None = None
    noise: NoiseSpec | None = None
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
    target_logged: bool = True  # False: the held-out domain is neither evaluated nor logged, as for tuning
    source: str | None = None  # "sha256:..." of an imported checkpoint, which was not trained here
    members: tuple["RunSpec", ...] = ()  # of an ensemble, which is not trained: the rest is as its first member has it
    combine: Literal["logits", "probabilities"] = "logits"  # what an ensemble averages (QT-DoG Eq. 6: logits)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        trained = self.quantizer is not None and not isinstance(self.quantizer, RTNSpec | OBCSpec)
        if (self.switch is None) == (trained or self.frozen or self.noise is not None):
            raise ValueError("A switch step goes with a quantizer, noise or freezing in training, and they with it.")
        if self.noise is not None and trained:
            raise ValueError("Noise stands in a quantizer's place; give one of the two.")
        if self.settled is not None and self.source is None and self.settled > self.steps:
            what = "switch" if self.settled == self.switch else "last stage of INQ"
            raise ValueError(
                f"The {what} at step {self.settled} lies beyond the end at {self.steps}; "
                "choose --quantize-at of at most --steps."
            )
        if self.average.kind in ("swa", "sma") and self.average.start > self.steps:
            raise ValueError(
                f"{self.average.kind.upper()} would start at step {self.average.start}, beyond the end at {self.steps}."
            )
        return self

    @model_validator(mode="after")
    def _members_agree(self) -> Self:
        facts = {(m.dataset, m.held_out, m.image_size) for m in self.members}
        if facts and facts != {(self.dataset, self.held_out, self.image_size)}:
            raise ValueError(
                "The members of an ensemble have one data set, held-out domain and image size, and the ensemble has "
                f"the same; here they are {sorted(facts | {(self.dataset, self.held_out, self.image_size)})}."
            )
        return self

    @property
    def label(self) -> str:
        """The composition in a word or two, such as "sam-swad"; "erm" where nothing is unusual; "erm + 2 x lsq"."""
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
    def trajectory(self) -> "RunSpec":
        """The run whose iterates this one averages: all but the average."""
        return self.replace(average=AverageSpec())

    def iterates(self, every: int) -> range:
        """Return the steps that are multiples of a number and whose weights an average sees: from the switch on."""
        return range(-(-(self.switch or 0) // every) * every, self.steps + 1, every)

    @property
    def derived(self) -> bool:
        """Whether the run is made from its finished parent, without training."""
        return isinstance(self.quantizer, RTNSpec | OBCSpec) and not self.members

    @property
    def made_from(self) -> tuple["RunSpec", ...]:
        """The finished runs that this one is made from: an ensemble's members, a derived one's parent; or none."""
        if self.derived and self.parent and not self.source:
            return (self.parent,)
        return self.members

    @property
    def settled(self) -> int | None:
        """The step from which the network is what its name says: the switch, or the last stage of INQ."""
        if self.switch is not None and isinstance(self.quantizer, INQSpec):
            return self.switch + (len(self.quantizer.fractions) - 1) * self.quantizer.every
        return self.switch

    @property
    def parent(self) -> "RunSpec | None":
        """The run that a derived one is made from; else the trajectory that this one equals up to its switch."""
        if self.derived:
            return self.replace(quantizer=None)
        if self.switch is None or self.members:
            return None
        return self.replace(quantizer=None, noise=None, frozen=False, switch=None, average=AverageSpec())


class Place(Spec):
    """Machine facts: where the data lie and what computes. Recorded beside a run, never part of its name."""

    data_dir: str | None = None
    weights_file: str | None = None
    cache: str | None = None  # of decoded images; None: the platform's
    device: str = "auto"
    threads: int = Field(1, ge=1)
