"""SMOKE, QUICK and PAPER: the size of a reproduction, as one frozen record of numbers with their reasons."""

import math
from typing import Any, Literal

from pydantic import Field

from flatlab.errors import UserError, choose, count_of
from flatlab.specs.base import LARGEST_INT, LARGEST_SEED
from flatlab.specs.corruption import Corrupting, under
from flatlab.specs.optimizing import Optimizing
from flatlab.specs.quantizers import Amplitude, Bits, Granularity, INQGrid, LSQOptions
from flatlab.specs.run import FreezeSpec, RunSpec, Share


class Setting(LSQOptions, Optimizing):
    """All that a reproduction needs besides the names of methods; shares of the schedule are shares of its steps."""

    later = ("inq_grid", *LSQOptions.later, "noise_amplitude", "target_logged", "sagm_alpha", "perturb")
    later += ("qat_bits", *(f"freeze_{name}" for name in (*FreezeSpec.model_fields, "share")))
    later += (*Optimizing.later, "epochs", "sizes", "named", "margin", "leave_out", "rows", "corruption")

    name: str
    dataset: str = "digits"
    domains: tuple[str, ...] = ("rot0", "rot15", "rot30", "rot45")
    held_out: tuple[str, ...] = ("rot0", "rot15", "rot30", "rot45")
    corruption: Corrupting = Field(
        None,
        description="Corruption of the held-out domain's images, as NAME:SEVERITY with a severity from 1 to 5, such as "
        "gaussian_noise:3; the error for an unknown name lists those known at the image size.",
    )
    image_size: int = Field(
        16, ge=1, le=4096, description="Height and width of the images in pixels; of sentences, their word pieces."
    )
    model: str = Field("digits-cnn", description="Network.")
    weights: str = "none"
    freeze_batchnorm: bool = Field(False, description="Freeze or update BatchNorm's statistics in training.")
    augment: str = "none"
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the forward passes in training; measurements are fp32."
    )
    test_share: Share = Field(  # images not used to select a checkpoint
        0.2,
        description="Share of each source domain that is used neither for training nor for selection, but for "
        "in-domain test accuracy; with 0, the images of selection give that accuracy.",
    )
    target_logged: bool = True  # False: for tuning, nothing is computed on the held-out domain
    steps: int = Field(ge=1, le=LARGEST_INT, description="Number of training updates.")
    epochs: int | None = Field(
        None,
        ge=1,
        le=LARGEST_INT,
        description="Training's length in place of steps: updates that draw this multiple of the training images.",
    )
    sizes: tuple[int, ...] = ()  # images of each domain, which epochs need
    named: bool = False  # the data set has splits of its own, and all of the source domain is trained on
    eval_every: int = Field(ge=1, le=LARGEST_INT, description="Steps between two evaluations.")
    batch_size: int = Field(32, ge=1, le=10**6, description="Images of each source domain in a batch.")
    lr: float = Field(gt=0, le=1e30, description="Learning rate.")
    bits: Bits = Field(7, description="Bits of a quantized weight.")
    granularity: Granularity = Field(
        "channel", description="Weights that share a step size or noise amplitude: an output channel or a tensor."
    )
    scale_lr: float = 1e-5
    inq_grid: INQGrid = Field(
        "uniform", description="Levels of INQ; power-of-two (Zhou et al. 2017) takes at most 8 bits."
    )
    switch: int | None = Field(  # None: `switch_share` of the steps (QT-DoG App. B: 2,000 of 5,000)
        None,
        ge=0,
        le=LARGEST_INT,
        description="Step at which quantization, noise or freezing begins; if not given, 40 % of the steps, or 0 where "
        "inputs are quantized, too (LSQ, GAQAT, FQAT).",
    )
    switch_share: float = 0.4
    qat_bits: Bits = Field(4, description="Bits of weights and of layers' inputs under the quantizer lsq-both.")
    noise_lr: float | None = Field(None, gt=0)  # half-width of weight noise, in learning rates; None: quantizer's norm
    noise_amplitude: Amplitude = Field(
        None,
        description="Half-width a of the uniform weight noise on (-a, a); if not given, the noise has the norm that "
        "rounding to --bits has.",
    )
    sam_rho: float = Field(  # Foret et al.; SWAD's baselines
        0.05, ge=0, le=1e30, description="Radius of the ascent step of SAM, SAGM, SAQ, GAQAT and FQAT, absolute L2."
    )
    sagm_alpha: float = Field(
        1e-3,
        ge=0,
        le=1e30,
        description="Share of the gradient that SAGM, GAQAT and FQAT subtract from their ascent step.",
    )
    perturb: Literal["weights", "all"] = Field(
        "weights",
        description="What the ascent step moves: weights, or all, which adds step sizes (under SAQ those of inputs).",
    )
    margin: float = Field(0.3, ge=0, le=1e30, description="Margin of CLIPood's margin metric softmax.")
    freeze_every: int | None = Field(  # GAQAT's K; None: `freeze_share` of the steps
        None,
        ge=1,
        le=LARGEST_INT,
        description="Steps over which the disorder of gradients is computed; if not given, 6 % of all steps.",
    )
    freeze_share: float = 0.06
    freeze_threshold: float | None = Field(
        None, ge=0, le=1e30, description="Disorder at which GAQAT (below) and FQAT (above) freeze: 0.3 and 0.45."
    )
    freeze_direction: Literal["low", "high"] | None = Field(
        None, description="Freeze where the disorder is low (GAQAT) or high (FQAT)."
    )
    freeze_top: float | None = Field(
        None, ge=0, le=1, description="Share of units that is frozen, instead of a threshold."
    )
    freeze_trigger: Literal["task", "smooth", "between"] | None = Field(
        None,
        description="Gradient whose disorder (share of steps in which its sign changes) decides: task (the default), "
        "smooth, or between the two.",
    )
    freeze_gradient: Literal["task", "smooth", "both"] | None = Field(
        None,
        description="Gradient that frozen units do not get: task (the default), smooth (of the perturbed loss) or "
        "both; an optimizer's momentum still moves them.",
    )
    freeze_unit: Literal["scale", "channel", "layer"] | None = Field(
        None, description="Unit of a decision: the tensor of step sizes, scale (GAQAT), a channel, or a layer (FQAT)."
    )
    freeze_when: Literal["window", "step"] | None = Field(
        None, description="Decide after each window of steps (GAQAT) or at each step (FQAT)."
    )
    freeze_what: Literal["steps", "weights", "layer"] | None = Field(
        None, description="What is frozen: step sizes, steps (the default), latent weights, or the whole layer."
    )
    freeze_forever: bool = Field(False, description="Never release what GAQAT or FQAT froze.")
    freeze_alternate: bool = Field(
        False, description="Instead of GAQAT's decisions, alternate task and smooth gradient of step sizes."
    )
    freeze_rescale: bool = Field(False, description="Give the gradient that is not frozen the weight 1, not 1/2.")
    swa_every: int = Field(100, ge=1)
    swad_every: int = Field(100, ge=1, le=LARGEST_INT, description="Steps between two validations of SWAD.")
    swad_ratio: float = 0.3
    swad_rule: Literal["paper", "released"] = Field(
        "paper", description="SWAD's averaging interval by Algorithm 1 of the paper, or as in its released code."
    )
    sma_start: int = Field(100, ge=0)
    refresh_batches: int = Field(500, ge=1)  # for BatchNorm statistics of SWA and SWAD, unless frozen
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of initialisation and batches; the first of several.")
    trial_seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the split; the first of several.")
    seeds: int = Field(3, ge=1, le=1000, description="Number of seeds; each changes both the split and the training.")
    members: int | None = Field(None, ge=1)  # of an ensemble; None: as many as the method has
    rises: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # nats, of ERM on the source domains: define radii
    beyond: float = 1.0  # nats: one further radius, for illustration
    num_samples: int | None = Field(100, ge=2)  # directions, each on all images; None: as many as `rel_error` requires
    rel_error: float = 0.02
    block_size: int | None = None  # images per direction, if `num_samples` is None
    images: int | None = None  # of each domain, for measurements
    controls: bool = Field(
        False, description="Add runs that separate quantization from freezing (fig4), or those of CLIPood (table6)."
    )
    leave_out: tuple[str, ...] = ()  # methods of a study
    rows: str = ""  # file with rows of methods that are left out
    others: tuple["Setting", ...] = ()  # settings of further data sets

    @property
    def each(self) -> tuple["Setting", ...]:
        """This setting and those of further data sets, without `others`."""
        return (self.replace(others=()), *self.others)

    @property
    def words(self) -> str:
        """Data, network and seeds, as text for a title; for data other than digits also image size and steps."""
        units = {one.dataset: "word pieces" if _suiting(one.dataset) is TEXT else "pixels" for one in self.each}
        size = {one.dataset: f" at {one.image_size} {units[one.dataset]}, {one.length}" for one in self.each}
        data = ", ".join(f"{one.dataset}, {one.model}{size[one.dataset] * (one.image_size > 16)}" for one in self.each)
        if self.corruption:
            data += f", held-out images{under(self.corruption)}"
        return f"{data}, {count_of(self.seeds, 'seed')}"

    @property
    def length(self) -> str:
        """How long is trained, as text."""
        return f"{self.steps:,} steps" if self.epochs is None else f"epochs: {self.epochs:,}"

    def in_steps(self, held_out: str) -> "Setting":
        """Return the setting with the steps that its epochs take where a domain is held out."""
        if self.epochs is None:
            return self
        sources = [n for name, n in zip(self.domains, self.sizes, strict=True) if name != held_out]
        outside = 0.0 if self.named else float(RunSpec.model_fields["holdout"].default) + self.test_share
        inside = sum(n - int(n * outside) for n in sources)
        updates = self.epochs * math.ceil(inside / (self.batch_size * len(sources)))
        return self.replace(steps=max(1, updates - 1), epochs=None)  # of steps one more is made

    @property
    def interval(self) -> str:
        """The meaning of bars and bands, as text for a caption; one seed has no interval."""
        return "95 % intervals over seeds" if self.seeds > 1 else "none, since one seed has no interval"

    @property
    def tested(self) -> str:
        """The meaning of bars around differences that are tested, filled points among them, as text for a caption."""
        return f"{self.interval}, each alone, filled where p < 0.05 after Holm" if self.seeds > 1 else self.interval

    @property
    def switch_step(self) -> int:
        """The step at which quantization or freezing starts."""
        return round(self.switch_share * self.steps) if self.switch is None else self.switch

    @property
    def freezing(self) -> dict[str, Any]:
        """Fields of a `FreezeSpec`: those that are given."""
        fields = {name: getattr(self, f"freeze_{name}") for name in FreezeSpec.model_fields}
        every = self.freeze_every or max(1, round(self.freeze_share * self.steps))
        return {name: value for name, value in fields.items() if value is not None} | {"every": every}

    @property
    def radii(self) -> tuple[float, ...] | None:
        """The paper's radii for the paper's network; None: radii are chosen by rise."""
        return papers_radii(self)

    @property
    def inq_every(self) -> int:
        """Steps between the stages of INQ, such that the four end when 15 % of the steps are left (750 of 5,000)."""
        return max(1, min(round(0.15 * self.steps), (self.steps - self.switch_step) // 3))

    @property
    def swa_start(self) -> int:
        """First step of SWA: 60 % of the steps; not given in the paper."""
        return round(0.6 * self.steps)


SMOKE = Setting(
    name="smoke",
    steps=10,
    eval_every=3,
    batch_size=8,
    lr=3e-3,
    swa_every=1,
    swad_every=2,
    sma_start=2,
    refresh_batches=2,
    seeds=2,
    members=2,
    rises=(0.02, 0.5),
    num_samples=3,
    images=20,
)

QUICK = Setting(
    name="quick",
    steps=300,
    eval_every=30,
    lr=1e-3,  # in-domain validation above 95 % for every method; see README
    scale_lr=2e-4,  # a fifth of lr, the paper's ratio of 1e-5 to 5e-5
    swa_every=5,
    swad_every=10,
    sma_start=10,
    refresh_batches=50,
    seeds=3,
    members=5,  # the same for all ensembles, so that they are comparable
    num_samples=None,
    rel_error=0.1,  # for one checkpoint; the spread over seeds is larger
    block_size=16,  # fixed, so that all methods share their directions and no number depends on timings
)

PAPER = Setting(
    name="paper",
    dataset="PACS",
    domains=("art_painting", "cartoon", "photo", "sketch"),
    held_out=("art_painting", "cartoon", "photo", "sketch"),
    image_size=224,
    model="resnet50",
    weights="imagenet",
    freeze_batchnorm=True,
    augment="domainbed",
    test_share=0.0,  # the paper's split: its in-domain accuracy is that on the images used for selection
    steps=5000,
    eval_every=300,
    lr=5e-5,
)

TEXT = QUICK.replace(  # not selectable by name: `for_data` uses it for sentences
    dataset="sentences",
    domains=("amazon", "movie", "nyt", "tweets"),
    held_out=("amazon", "movie", "nyt", "tweets"),
    image_size=48,
    model="sentences-transformer",
)

PAPERS_RADII = tuple(float(radius) for radius in range(0, 61, 5))  # QT-DoG's Figure 3, for one network only


def papers_radii(one: Setting | RunSpec) -> tuple[float, ...] | None:
    """Return the radii of the paper's figure if the network is the paper's; else None."""
    own = all(getattr(one, field) == getattr(PAPER, field) for field in ("dataset", "model", "weights", "image_size"))
    return PAPERS_RADII if own else None


SETTINGS = {setting.name: setting for setting in (SMOKE, QUICK, PAPER)}
WILDS_PATCHES = {"image_size": 96, "augment": "none"}  # their own size; colours are not changed, as in WILDS' code
BY_DATASET: dict[str, dict[str, Any]] = {  # exceptions of SWAD and QT-DoG from their default settings
    "VLCS": {"swad_every": 50, "swad_ratio": 0.2},
    "DomainNet": {"steps": 15000, "eval_every": 1000, "switch": 8000, "swad_every": 500},
    # WILDS' (examples/configs): 3 epochs of 30,688 updates, 5 of 9,452, each evaluated once.
    "Amazon": {"steps": 92063, "eval_every": 30688, "batch_size": 8, "lr": 1e-5, "image_size": 512},
    "Camelyon17": {"steps": 47259, "eval_every": 9452, "batch_size": 32, "lr": 1e-3},
}


def for_data(chosen: Setting, dataset: str, *, model: str | None = None, weights: str | None = None) -> Setting:
    """Return a setting for a data set: its default network and learning rates, the schedule of the chosen setting.

    Photographs use the paper's, digits those of QUICK, sentences those of TEXT. BatchNorm statistics are frozen only if
    the network starts from pretrained weights. The paper's learning rate is for pretrained weights: from scratch that
    of the setting is kept.

    Args:
        chosen: the setting whose schedule is kept.
        dataset: name of the data set; all but digits and sentences are photographs.
        model: network, if not the default one.
        weights: initial weights, if not the default ones.

    Raises:
        UserError: if the setting has a corruption of images, and the data set sentences.
    """
    suiting = _suiting(dataset)
    if suiting is TEXT and chosen.corruption:
        raise UserError(f"{dataset} has sentences, not images; leave --corruption {chosen.corruption} out.")
    start = weights or ("none" if model == QUICK.model else suiting.weights)
    changes: dict[str, Any] = {"dataset": dataset, "weights": start, "freeze_batchnorm": start != "none"}
    if _suiting(chosen.dataset) is not suiting:
        fields = ["image_size", "model", "augment"]
        if start != "none" or suiting is not PAPER:
            fields += ["lr", "scale_lr"]
        changes |= {field: getattr(suiting, field) for field in fields}
    if suiting is TEXT and start != "none":
        changes |= {field: getattr(PAPER, field) for field in ("lr", "scale_lr")}
    if dataset.startswith("Camelyon17"):
        changes |= WILDS_PATCHES
    if chosen.name == PAPER.name:
        changes |= BY_DATASET.get(dataset, {})
    return chosen.replace(**changes)


def _suiting(dataset: str) -> Setting:
    """Return the setting whose network and learning rates suit data of this kind."""
    kind = dataset.partition(":")[0]
    return QUICK if dataset == QUICK.dataset else TEXT if kind in (TEXT.dataset, "folder-text", "Amazon") else PAPER


def setting(chosen: str | Setting, **changes: Any) -> Setting:
    """Return a setting with the entries of `changes` that are not None.

    Args:
        chosen: smoke, quick or paper, or a setting.
        changes: fields of `Setting`; None keeps a field.
    """
    known = SETTINGS[choose("setting", chosen, SETTINGS)] if isinstance(chosen, str) else chosen
    return known.replace(**{field: value for field, value in changes.items() if value is not None})
