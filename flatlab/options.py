"""What the user chose: the words of a command become a setting, a store and a place, each mistake one sentence."""

import inspect
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatlab.data import catalog
from flatlab.errors import UserError, choose, printable
from flatlab.jsontext import strict_json
from flatlab.mistakes import spoken
from flatlab.words import DEVICES, KNOWN, LIMITS, MODELS, WORDS

if TYPE_CHECKING:  # imported where they are used: `--help` answers before numpy is there
    import pandas as pd

    from flatlab.methods import Method
    from flatlab.runs import RunStore
    from flatlab.settings import Setting
    from flatlab.specs import Place

SETTING_FIELDS: tuple[str, ...] = ("image_size", "model", "freeze_batchnorm", "bits", "steps", "eval_every")
SETTING_FIELDS += ("batch_size", "lr", "precision", "seed", "trial_seed", "seeds", "controls")
SETTING_FIELDS += (
    "granularity",
    "inq_grid",
    "log_scale",
    "activations",
    "activation_bits",
    "noise_amplitude",
    "swad_rule",
)
SETTING_FIELDS += ("test_share",)
SHORT = 8  # digits of a digest on a screen

Needs = tuple[Callable[["Method"], bool], str, str]
_GRID: Needs = (lambda m: m.quantizer != "none" or m.noise != "none", "a quantizer", "add --quantizer lsq")
_LSQ: Needs = (lambda m: m.quantizer == "lsq", "LSQ", "add --quantizer lsq")
NEEDS: dict[str, Needs] = {  # option -> whether a composition uses it; what it lacks else; how to get that
    "bits": _GRID,
    "granularity": _GRID,
    "inq_grid": (lambda m: m.quantizer == "inq", "INQ", "add --quantizer inq"),
    "unsigned": _LSQ,
    "log_scale": _LSQ,
    "activations": _LSQ,
    "activation_bits": _LSQ,
    "noise_amplitude": (lambda m: m.noise != "none", "noise on the weights", "take --method noise"),
    "quantize_at": (lambda m: m.switched, "a quantizer that trains", "add --quantizer lsq"),
    "swad_rule": (lambda m: m.average == "swad", "SWAD", "add --average swad"),
    "select": (lambda m: m.switched, "a switch", "add --quantizer lsq"),
    "combine": (lambda m: m.members > 0, "an ensemble", "take --method eoq"),
}


@dataclass(frozen=True)
class Choices:
    """What the user chose, by the names of the options."""

    given: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option; None where the command does not have it."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.given.get(name)

    def runs(self) -> "RunStore":
        """Return the store."""
        from flatlab.runs import RunStore

        return RunStore(self.store or "runs")

    def folder(self) -> Path | None:
        """Return the data folder: `--data-dir`, or PATH of `folder:PATH`."""
        return self._own() if self.data_dir is None else self.data_dir

    def _own(self) -> Path | None:
        """Return PATH of `folder:PATH`; None for a data set known by name."""
        kind, _, path = str(self.dataset).partition(":")
        if kind.strip().lower() != "folder":
            return None
        if not path.strip():
            raise UserError(
                "A data set of your own goes by its folder: --dataset folder:PATH, PATH/DOMAIN/CLASS/IMAGE."
            )
        return Path(path.strip()).expanduser()

    def name(self) -> str:
        """Return the data set's name; a folder goes by its last part, since where it lies is no part of a run."""
        own = self._own()
        if own is None:
            return catalog.canonical(self.dataset or self._chosen().dataset)
        folder = self.folder()
        if folder is None or not folder.is_dir():
            raise UserError(f"There is no folder {folder}; expected one with DOMAIN/CLASS/IMAGE.")
        return catalog.canonical(f"folder:{own.resolve().name}")

    def _chosen(self) -> "Setting":
        from flatlab.settings import setting

        return setting(self.given.get("setting", "quick"))

    def setting(self) -> "Setting":
        """Return the setting with everything that the user changed; of several data sets, the first with the others."""
        names = [name.strip() for name in (self.datasets or "").split(",") if name.strip()]
        if names and self.dataset:
            raise UserError("Give --dataset or --datasets, not both.")
        if not names:
            return self._setting()
        first, *others = (Choices({**self.given, "dataset": name})._setting() for name in names)
        return first.replace(others=tuple(others))

    def _setting(self) -> "Setting":
        from flatlab.settings import for_data, setting

        dataset, folder = self.name(), self.folder()
        self._check_model(dataset)
        known = catalog.facts(dataset)
        if known is None or known.folder:
            catalog.locate(dataset, folder)
        weights = _weights(self.weights) if self.weights else None
        return setting(
            for_data(self._chosen(), dataset, model=self._model(), weights=weights),
            domains=catalog.domain_names(dataset, folder),
            held_out=catalog.held_out(dataset, folder, self.held_out),
            switch=self.quantize_at,
            signed=False if self.unsigned else None,
            **{**{f: self.given.get(f) for f in SETTING_FIELDS}, "model": self._model(), **self._known()},
        )

    def _known(self) -> dict[str, str]:
        """Return the options that name one of a few, by their proper names."""
        given = {word: self.given[word] for word in KNOWN if self.given.get(word)}
        return {word: choose(word.replace("_", "-"), value, KNOWN[word]) for word, value in given.items()}

    def _model(self) -> str | None:
        return choose("model", self.model, MODELS) if self.model else None

    def _check_model(self, dataset: str) -> None:
        """Refuse what cannot be, before a worker starts."""
        if dataset != "digits":
            return
        model = self._model()
        if model and MODELS[model]:
            raise UserError(
                f"{model} takes images of {MODELS[model]} channels, and digits have 1; "
                "take --model digits-cnn, or another --dataset."
            )
        if self.image_size not in (None, 16):
            raise UserError(f"digits are 16 x 16 pixels; leave --image-size {self.image_size} out.")

    def refuse_idle(self, parts: "Method") -> None:
        """Refuse options that would do nothing in the composition at hand: a typo would go unseen."""
        sized = self.noise_amplitude is not None and parts.quantizer == "none"
        if sized and (self.bits or self.granularity):
            raise UserError("--noise-amplitude says how large the noise is; leave --bits and --granularity out.")
        for word, (used, needed, remedy) in NEEDS.items():
            value = self.given.get(word)
            if value is not None and value is not False and not used(parts):
                said = f"--{word.replace('_', '-')}" + f" {value}" * (value is not True)
                raise UserError(f"{said} does nothing without {needed}; {remedy}, or leave it out.")
        if self.activation_bits is not None and self.activations in (None, "none"):
            raise UserError(
                f"--activation-bits {self.activation_bits} does nothing without quantized activations; add "
                "--activations unsigned (or signed), or leave it out."
            )

    def refuse_controls(self, name: str, *, has_some: bool) -> None:
        """Refuse `--controls` where a figure or table has none."""
        if self.controls and not has_some:
            raise UserError(f"--controls does nothing for {name}; leave it out (fig4 has some).")

    def place(self) -> "Place":
        """Return the machine facts."""
        from flatlab.specs import Place

        choose("device", self.device.partition(":")[0], DEVICES)
        folder = self.folder()
        file = self.weights if self.weights not in (None, "none", "imagenet") else None
        return Place(
            data_dir=str(folder.resolve()) if folder else None,
            weights_file=str(Path(file).resolve()) if file else None,
            cache=str(self.cache.resolve()) if self.cache else None,
            device=self.device,
        )

    def processes(self, jobs: int) -> int:
        """Return how many workers share so many jobs."""
        from flatlab.machine import cores

        usual = 1 if _accelerated(self.device) else cores()
        return max(1, min(jobs, self.workers or usual))

    def answer(self, table: "pd.DataFrame", title: str, formats: dict[str, str] | None = None) -> None:
        """Print a frame: as a table, or as JSON where that was asked for."""
        from flatlab import display

        if self.json:
            typer.echo(table.to_json(orient="records", double_precision=15))
            return
        if "run" in table and display.out.is_terminal:  # as many digits as one types; a pipe gets them all
            table = table.assign(run=table["run"].str[:SHORT])
        display.frame(table, title, formats=formats)

    def answer_facts(self, facts: Any, sentence: str) -> None:
        """Print a sentence, or the facts behind it as JSON where that was asked for."""
        typer.echo(strict_json(facts) if self.json else "\n".join(map(printable, sentence.split("\n"))))


def _accelerated(device: str) -> bool:
    """Return whether the work goes to an accelerator, without asking torch, which takes seconds to load."""
    if device != "auto":
        return not device.startswith("cpu")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    nvidia = Path("/proc/driver/nvidia/version").exists() and not hidden
    return nvidia or (sys.platform, platform.machine()) == ("darwin", "arm64")


def _weights(weights: str) -> str:
    """Return the setting's name for `--weights`: a file goes by its hash."""
    if weights in ("none", "imagenet"):
        return weights
    if not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file; give none, imagenet, or a .safetensors or .pth file.")
    from flatlab.files import file_hash

    return f"sha256:{file_hash(Path(weights))}"


def check_numbers(given: dict[str, Any]) -> None:
    """Refuse numbers out of their range, in the words that the user wrote.

    Args:
        given: values by the names of options.

    Raises:
        UserError: says what was expected.
    """
    for name, (least, most) in LIMITS.items():
        value = given.get(name)
        if value is not None and not least <= value <= (math.inf if most is None else most):
            span = f"from {least} on" if most is None else f"from {least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {value} does not do: give a whole number {span}.")
    share = given.get("test_share")
    if share is not None and not 0 <= share < 1:
        raise UserError(f"--test-share must be at least 0 and below 1, got {share}.")
    for name in ("lr", "noise_amplitude"):
        value = given.get(name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} {value} does not do: give a number above 0, such as 0.001.")


def takes(*words: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options; it receives them as one `Choices`, before its own parameters.

    Args:
        words: names of `WORDS`.
        defaults: other defaults than the usual ones.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            with spoken(debug=given["debug"]):
                check_numbers(given)
                own = {name: given.pop(name) for name in list(given) if name not in words}
                command(Choices(given), **own)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [_parameter(word, defaults.get(word, WORDS[word][1])) for word in words]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap


def _parameter(word: str, default: Any) -> inspect.Parameter:
    kind, _, option = WORDS[word]
    wanted = kind if default is not None else kind | None
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(word, only, default=default, annotation=Annotated[wanted, option])
