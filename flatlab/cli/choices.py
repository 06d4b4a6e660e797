"""What the user chose: the words of a command become a setting, a store and a place, each mistake one sentence."""

import inspect
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatlab.cli import checks
from flatlab.cli.errors import spoken
from flatlab.cli.options import KNOWN, MODELS, WORDS, flag
from flatlab.data import catalog
from flatlab.errors import UserError, choose, printable

if TYPE_CHECKING:  # imported where they are used: `--help` answers before numpy is there
    import pandas as pd

    from flatlab.specs.run import Place
    from flatlab.specs.settings import Setting
    from flatlab.store.runs import Run, RunStore

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
    "swad_every",
    "sam_rho",
)
SETTING_FIELDS += ("test_share",)
SHORT = 8  # digits of a digest on a screen


@dataclass(frozen=True)
class Choices:
    """What the user chose, by the names of the options; `written` are those that stand on the command line."""

    given: dict[str, Any]
    written: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option; None where the command does not have it."""
        if name not in WORDS:
            raise AttributeError(f"{name!r} is not an option")
        return self.given.get(name)

    def without(self, name: str) -> "Choices":
        """Return the choices with an option as if it had not been written."""
        return replace(self, given={**self.given, name: WORDS[name][1]}, written=self.written - {name})

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Refuse options that were written and have no effect.

        Args:
            names: of the options.
            why: such as "with --axes line".

        Raises:
            UserError: names the first of them.
        """
        for name in names:
            if name in self.written:
                raise UserError(f"{flag(name)} does nothing {why}; leave it out.")

    def named(self, words: Sequence[str]) -> "list[Run]":
        """Return the runs that words name, among those that `--held-out` and `--seed` leave."""
        from flatlab.cli.names import named

        return named(self.runs(), words, held_out=self.held_out, seed=self.seed)

    def found(self, words: Sequence[str]) -> "list[Run]":
        """Return such runs, of which none may be unfinished."""
        found = self.named(words)
        for run in found:
            run.check_done()
        return found

    def runs(self) -> "RunStore":
        """Return the store."""
        from flatlab.store.runs import RunStore

        return RunStore(self.store or "runs")

    def folder(self) -> Path | None:
        """Return the data folder: `--data-dir`, or PATH of `folder:PATH`."""
        return self._own() if self.data_dir is None else self.data_dir

    def _own(self) -> Path | None:
        """Return PATH of `folder:PATH`; None for a data set known by name."""
        kind, _, path = str(self.dataset).partition(":")
        if kind.strip().lower() != "folder":
            return None
        if self.data_dir is not None:
            raise UserError("--data-dir does nothing with --dataset folder:PATH, which names the folder; leave it out.")
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
        from flatlab.specs.settings import setting

        return setting(self.given.get("setting", "quick"))

    def setting(self) -> "Setting":
        """Return the setting with everything that the user changed; of several data sets, the first with the others."""
        if self.datasets is None:
            return self._setting()
        names = [name.strip() for name in self.datasets.split(",")]
        if self.dataset:
            raise UserError("Give --dataset or --datasets, not both.")
        if len({catalog.canonical(name) for name in names}) < len(names):
            raise UserError(f"--datasets must name each data set once, got {self.datasets}.")
        first, *others = (replace(self, given={**self.given, "dataset": name})._setting() for name in names)
        return first.replace(others=tuple(others))

    def _setting(self) -> "Setting":
        from flatlab.specs.settings import for_data, setting

        dataset, folder = self.name(), self.folder()
        self._check_model(dataset)
        known = catalog.facts(dataset)
        several = "," in (self.datasets or "")  # --data-dir is then of those that have a folder
        if known is None or known.folder or (folder is not None and not several):  # of embedded data, one is refused
            catalog.locate(dataset, folder)
        weights = checks.weights(self.weights) if self.weights else None
        return setting(
            for_data(self._chosen(), dataset, model=self._model(), weights=weights),
            domains=catalog.domain_names(dataset, folder),
            held_out=catalog.held_out(dataset, folder, self.held_out),
            switch=self.quantize_at,
            signed=False if self.unsigned else None,
            target_logged=False if self.no_target else None,
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

    def place(self) -> "Place":
        """Return the machine facts."""
        from flatlab.specs.run import Place

        folder = self.folder()
        file = self.weights if self.weights not in (None, "none", "imagenet") else None
        place = Place(
            data_dir=str(folder.resolve()) if folder else None,
            weights_file=str(Path(file).expanduser().resolve()) if file else None,
            cache=str(self.cache.resolve()) if self.cache else None,
            device=checks.device(self.device),
        )
        if place.device.partition(":")[0] not in ("auto", "cpu"):
            from flatlab.loading import data as loading_data

            loading_data.device(place)  # refuses one that is absent, before the work; torch is loaded for that alone
        return place

    def processes(self, jobs: int) -> int:
        """Return how many workers share so many jobs."""
        from flatlab.environment import cores

        usual = 1 if _accelerated(self.device) else cores()
        return max(1, min(jobs, self.workers or usual))

    def answer(self, table: "pd.DataFrame", title: str, formats: dict[str, str] | None = None) -> None:
        """Print a frame: as a table, or as JSON where that was asked for."""
        from flatlab.cli import display

        if self.json:
            typer.echo(table.to_json(orient="records", double_precision=15))
            return
        if "run" in table and display.out.is_terminal:  # as many digits as one types; a pipe gets them all
            table = table.assign(run=table["run"].str[:SHORT])
        display.frame(table, title, formats=formats)

    def answer_facts(self, facts: Any, sentence: str) -> None:
        """Print a sentence, or the facts behind it as JSON where that was asked for."""
        from flatlab.files import strict_json

        typer.echo(strict_json(facts) if self.json else "\n".join(map(printable, sentence.split("\n"))))


def _accelerated(device: str) -> bool:
    """Return whether the work goes to an accelerator, without asking torch, which takes seconds to load."""
    if device != "auto":
        return not device.startswith("cpu")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    nvidia = Path("/proc/driver/nvidia/version").exists() and not hidden
    return nvidia or (sys.platform, platform.machine()) == ("darwin", "arm64")


def takes(*words: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options; it receives them as one `Choices`, before its own parameters.

    Args:
        words: names of `WORDS`.
        defaults: other defaults than the usual ones.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(context: typer.Context, **given: Any) -> None:
            with spoken(debug=given["debug"]):
                given = checks.check(given)
                written = frozenset(filter(partial(_is_written, context), given))
                own = {name: given.pop(name) for name in list(given) if name not in words}
                command(Choices(given, written), **own)

        only = inspect.Parameter.KEYWORD_ONLY
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [inspect.Parameter("context", only, annotation=typer.Context)]
        parameters += [p.replace(kind=only) for p in own]
        parameters += [_parameter(word, defaults.get(word, WORDS[word][1])) for word in words]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap


def _is_written(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(word: str, default: Any) -> inspect.Parameter:
    kind, _, option = WORDS[word]
    wanted = kind if default is not None else kind | None
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(word, only, default=default, annotation=Annotated[wanted, option])
