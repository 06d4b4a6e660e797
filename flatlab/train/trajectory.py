"""The state of a training: network, optimizer and observers, which can be saved and restored."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatlab import files
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.models.networks import ALIGNED
from flatlab.quant.attach import clamp_scales, quantized_layers
from flatlab.specs.optimizing import rate
from flatlab.specs.quantizers import INQSpec, QuantSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import Run
from flatlab.store.selection import Row
from flatlab.train import averages
from flatlab.train.freezing import Disorder, Freezing, disorder_of
from flatlab.train.objectives import contrast
from flatlab.train.steps import SAGM, SAM, SAQ, Plain, Step
from flatlab.train.switch import Stages, WeightNoise

SCALE_EPS = 1e-12  # Adam's eps for step sizes: their gradients are small, and the usual 1e-8 would shrink updates
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # Adam's three, and SGD's


@dataclass
class Observer:
    """One run that observes the trajectory, and its log so far."""

    run: Run
    average: averages.Average
    rows: list[Row] = field(default_factory=list)

    def log(self, row: Row) -> None:
        """Add a row, with the number of evaluations on the target so far."""
        self.rows.append({**row, "looks": (len(self.rows) + 1) * self.run.spec.target_logged})


class Trajectory:
    """Network, optimizer and observers of one training."""

    def __init__(self, runs: Sequence[Run], domains: loading_data.Domains, place: Place) -> None:
        self.spec: RunSpec = runs[0].spec.trajectory
        self.network = loading_network.network(self.spec, domains.data, place)
        self.optimizer = optimizer_of(self.spec, decaying(self._roles(), self.spec.decayed))
        self.norms: list[Tensor] = []  # of the gradients before they are clipped, since the last row
        if self.spec.clip_norm:
            self.optimizer.register_step_pre_hook(self._clip)
        building = partial(averages.build, switch=self.spec.switch, updates=self.spec.steps + 1)
        self.observers = [Observer(run, building(run.spec.average)) for run in runs]
        self.rows: list[Row] = []  # log of the network itself
        self.losses: list[Tensor] = []  # training loss of each step since the last row
        self.next_step = 0
        self.switched = False
        self.on_step: list[Callable[[int], None]] = []  # called before each update, from the switch on
        self.noise: WeightNoise | None = None
        self.disorder: Disorder | None = None  # of step sizes' gradients, where they are frozen by it

    def _roles(self) -> dict[str, dict[str, nn.Parameter]]:
        return loading_network.roles(self.network)

    def prepare(self, domains: loading_data.Domains) -> None:
        """Compute initial weights that depend on the data (the pretraining of digits-clip), and give them to BMA."""
        if self.spec.model in ALIGNED:
            contrast(self.network, self.spec, domains, next(self.network.parameters()).device)
        for observer in self.observers if self.spec.switch is None else ():
            if isinstance(observer.average, averages.Beta):
                observer.average.update(self.network.state_dict(), -1, lambda: math.nan)

    def _clip(self, *_: Any) -> None:
        self.norms.append(nn.utils.clip_grad_norm_(self.network.parameters(), self.spec.clip_norm or math.inf))

    def rate(self, step: int) -> float:
        """Set the learning rates of all parameter groups for a step; return that of the weights."""
        factor = rate(self.spec, step, self.spec.steps + 1)
        for group in self.optimizer.param_groups if self.spec.scheduled else ():
            group["lr"] = factor * group.setdefault("first_lr", group["lr"])
        return factor * self.spec.lr

    def step_rule(self) -> Step:
        """Return the spec's step rule."""
        step, common = self.spec.step, (self.optimizer, self.network, self._moved())
        match step.kind:
            case "plain":
                return Plain(self.optimizer)
            case "sam":
                return SAM(*common, rho=step.rho)
            case "saq":
                return SAQ(*common, rho=step.rho)
            case _ if self.disorder:
                return Freezing(*common, step=step, disorder=self.disorder)
            case _:
                return SAGM(*common, rho=step.rho, alpha=step.alpha)

    def _moved(self) -> list[nn.Parameter]:
        """Return the parameters that an ascent perturbs; SAQ perturbs quantizers' outputs, not latent weights."""
        fixed = {id(parameter) for parameter in self._roles()["scales"].values()}
        if self.spec.step.perturb == "all":
            fixed = set()
        if self.spec.step.kind == "saq":
            for quantized in quantized_layers(self.network).values():
                fixed |= {id(each) for each in (quantized.latent, *quantized.quantizer.parameters())}
        return [p for group in self._roles().values() for p in group.values() if id(p) not in fixed]

    def switch(self) -> None:
        """Start quantization or weight noise, freezing, or both.

        The latent weights are the same parameters as before, so the optimizer keeps their moments; step sizes are added
        to it as a group of their own. QT-DoG's released code does neither, and so trains neither: `frozen` is that.
        """
        quantizer, scales = self.spec.quantizer, loading_network.quantize(self.network, self.spec)
        if isinstance(quantizer, QuantSpec):
            group = {"params": scales, "role": "scales", "lr": quantizer.scale_lr}
            self.optimizer.add_param_group({**group, "eps": SCALE_EPS, "weight_decay": 0.0})
        if self.spec.step.freezing:
            self.disorder = disorder_of(self.network, self.spec.step.freezing)
        if isinstance(quantizer, INQSpec):
            self.on_step.append(Stages(self.network, self.optimizer, quantizer, start=self.spec.switch or 0))
        if self.spec.noise:
            self.noise = WeightNoise(self.network, self.spec)
            self.on_step.append(self.noise)
        if self.spec.frozen:
            for parameter in [*self._roles()["weights"].values(), *scales]:
                parameter.requires_grad_(False)
                parameter.grad = None  # the optimizer skips parameters without a gradient
        self.switched = True

    def after(self, step: int, validate: Callable[[], float]) -> None:
        """Clamp step sizes to positive values, and pass the weights to the observers, from the switch on."""
        self.next_step = step + 1
        if isinstance(self.spec.quantizer, QuantSpec) and self.switched:
            clamp_scales(self.network)
        if self.observed:
            weights = self.network.state_dict()
            for observer in self.observers:
                observer.average.update(weights, step, validate)

    @property
    def observed(self) -> bool:
        """Whether the observers receive weights: always, or from the switch on if there is one."""
        return self.switched or self.spec.switch is None

    def save(self, path: Path, *, observers: Sequence[Observer]) -> None:
        """Write all that a later process needs to continue with the same bytes."""
        tensors = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam/{moment}/{name}": value for moment, value in moments.items() if value is not None}
        if self.noise:
            tensors |= {f"noise/{name}": value for name, value in self.noise.amplitudes.items()}
        if self.disorder:
            tensors |= {f"disorder/{name}": value for name, value in self.disorder.save().items()}
        notes = {}
        for observer in observers:
            digest = observer.run.spec.digest
            observed, facts = observer.average.save()
            notes[digest] = {"average": facts, "rows": observer.rows}
            tensors |= {f"{digest}/{name}": value for name, value in observed.items()}
        losses, norms = (torch.stack(each).tolist() if each else [] for each in (self.losses, self.norms))
        facts = {"next_step": self.next_step, "rows": self.rows, "losses": losses, "members": notes}
        if norms:
            facts["norms"] = norms
        files.save_arrays(path, arrays(tensors), facts)

    def resume(self, path: Path) -> bool:
        """Restore a state and return True; return False if it lacks one of these runs' averages."""
        saved, facts = files.load_arrays(path)
        if not {observer.run.spec.digest for observer in self.observers} <= facts["members"].keys():
            return False
        self._restore(saved, facts)
        for observer in self.observers:
            digest = observer.run.spec.digest
            mine = {name.removeprefix(f"{digest}/"): a for name, a in saved.items() if name.startswith(f"{digest}/")}
            observer.rows = facts["members"][digest]["rows"]
            observer.average.load(
                ({n: self._tensor(n, a) for n, a in mine.items()}, facts["members"][digest]["average"])
            )
            if self.observed and not mine:  # the last weights are the network's own
                observer.average.update(self.network.state_dict(), self.next_step - 1, lambda: float("nan"))
        return True

    def fork(self, path: Path) -> None:
        """Start from a state of the parent, which equals this trajectory up to the switch."""
        self._restore(*files.load_arrays(path))
        for observer in self.observers:
            for row in self.rows if observer.average.evaluated else []:
                observer.log(row)

    def _restore(self, saved: files.Arrays, facts: dict[str, Any]) -> None:
        if self.spec.switch is not None and facts["next_step"] > self.spec.switch:
            self.switch()
        loading_network.load(
            self.network, {n.removeprefix("network/"): a for n, a in saved.items() if n.startswith("network/")}
        )
        for name, parameter in self.network.named_parameters():
            found = {m: saved[f"adam/{m}/{name}"] for m in MOMENTS if f"adam/{m}/{name}" in saved}
            if found:
                self.optimizer.state[parameter] = {m: self._tensor(name, a) for m, a in found.items()}
        if self.noise:
            self.noise.amplitudes = {n: torch.from_numpy(saved[f"noise/{n}"].copy()) for n in self.noise.amplitudes}
        if self.disorder:
            self.disorder.load({n: torch.from_numpy(saved[f"disorder/{n}"].copy()) for n in self.disorder.save()})
        self.next_step, self.rows = facts["next_step"], facts["rows"]
        device = next(self.network.parameters()).device
        self.losses = list(torch.tensor(facts["losses"], device=device))
        self.norms = list(torch.tensor(facts.get("norms", []), device=device))

    def _tensor(self, name: str, array: Any) -> Tensor:
        # In the memory format of the network's own tensor: the order of sums depends on it.
        own = self.network.state_dict()[name.rsplit("/", 1)[-1]]
        loaded = torch.from_numpy(array.copy()).to(own.device)
        return torch.empty_like(own).copy_(loaded) if loaded.shape == own.shape else loaded


def decaying(roles: Mapping[str, Mapping[str, nn.Parameter]], decayed: str) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer: those of each role, and apart from them those without weight decay.

    Args:
        roles: parameters by role and name.
        decayed: "all", "weights" (all but biases) or "matrices" (neither biases nor other vectors).
    """
    groups: list[dict[str, Any]] = []
    for role, parameters in roles.items():
        exempt = {
            name
            for name, parameter in parameters.items()
            if decayed != "all" and (name.endswith("bias") or (decayed == "matrices" and parameter.ndim < 2))
        }
        for names, changes in ((parameters.keys() - exempt, {}), (exempt, {"weight_decay": 0.0})):
            if names:
                own = [parameter for name, parameter in parameters.items() if name in names]
                groups.append({"params": own, "role": role, **changes})
    return groups


def optimizer_of(spec: RunSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer of a spec for groups of parameters."""
    common: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay, "fused": True}
    match spec.optimizer:
        case "adam":
            return torch.optim.Adam(groups, **common)
        case "adamw":
            return torch.optim.AdamW(groups, **common)
        case "sgd":
            return torch.optim.SGD(groups, momentum=spec.momentum, **common)


def arrays(tensors: dict[str, Tensor]) -> files.Arrays:
    """Return tensors as NumPy arrays on the CPU."""
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
