"""The words of the command line: each option is written once here and means the same thing in every command."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatlab.data import catalog
from flatlab.errors import UserError

if TYPE_CHECKING:  # imported where they are used: `--help` answers before numpy is there
    from flatlab.runs import RunStore
    from flatlab.settings import Setting
    from flatlab.specs import Place

_DATA, _COMPOSITION, _SCHEDULE, _PLACE, _OUTPUT = "Data", "Composition", "Schedule and seeds", "Place", "Output"


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


WORDS: dict[str, tuple[Any, Any, Any]] = {  # name -> type, default, option
    "dataset": (
        str,
        "digits",
        _option(_DATA, "digits (embedded, the default), PACS, ..., or folder:PATH with domain/class/image."),
    ),
    "data_dir": (Path, None, _option(_DATA, "The folder that holds the data set, for all but digits.")),
    "held_out": (str, "all", _option(_DATA, "Domain held out: name, index, or all (the default), each in turn.")),
    "image_size": (int, None, _option(_DATA, "Height and width of the images, in pixels.")),
    "method": (str, "ERM", _option(_COMPOSITION, "erm, sam, swa, swad, sma, qt-dog, ... (`flatlab methods`).")),
    "objective": (str, None, _option(_COMPOSITION, "erm: instead of the method's own.")),
    "step": (str, None, _option(_COMPOSITION, "plain or sam: instead of the method's own.")),
    "average": (str, None, _option(_COMPOSITION, "last, swa, swad or sma: instead of the method's own.")),
    "quantizer": (str, None, _option(_COMPOSITION, "none or lsq: instead of the method's own.")),
    "bits": (int, None, _option(_COMPOSITION, "Bits of a quantized weight, 2 to 16 (7).")),
    "quantize_at": (
        int,
        None,
        _option(_COMPOSITION, "Step at which quantization or freezing sets in (40 % of the steps)."),
    ),
    "exact_repo": (bool, False, _option(_COMPOSITION, "SWAD with the quirks of its released code.", "--exact-repo")),
    "model": (str, None, _option(_COMPOSITION, "digits-cnn, resnet18, resnet50 or mobilenet_v2.")),
    "weights": (str, None, _option(_COMPOSITION, "none, imagenet (torchvision downloads them), or a file.")),
    "freeze_batchnorm": (
        bool,
        None,
        _option(
            _COMPOSITION,
            "Keep BatchNorm's statistics (as the paper, with pretrained weights) or train them.",
            "--freeze-batchnorm/--train-batchnorm",
        ),
    ),
    "setting": (str, "quick", _option(_SCHEDULE, "smoke (seconds), quick (minutes, the default), or paper.")),
    "steps": (int, None, _option(_SCHEDULE, "Updates of a training.")),
    "eval_every": (int, None, _option(_SCHEDULE, "Steps between two evaluations.")),
    "batch_size": (int, None, _option(_SCHEDULE, "Images of each source domain in a batch.")),
    "lr": (float, None, _option(_SCHEDULE, "Learning rate of Adam.")),
    "seed": (int, None, _option(_SCHEDULE, "First seed of initialisation and batches (0).")),
    "trial_seed": (int, None, _option(_SCHEDULE, "First seed of the split (0).")),
    "seeds": (int, None, _option(_SCHEDULE, "How many seeds; each moves both the split and the training.")),
    "device": (str, "auto", _option(_PLACE, "auto (the default), cpu, cuda or mps.")),
    "workers": (int, None, _option(_PLACE, "Processes that share the jobs (one per core, or one on an accelerator).")),
    "store": (Path, None, _option(_PLACE, "Folder of the runs (./runs).", envvar="FLATLAB_STORE")),
    "out": (Path, Path("figures"), _option(_OUTPUT, "Folder of the pictures (./figures).")),
    "dry_run": (bool, False, _option(_OUTPUT, "Only say what would be done, and what it would cost.", "--dry-run")),
    "json": (bool, False, _option(_OUTPUT, "Print the result as JSON.", "--json")),
    "debug": (bool, False, _option(_OUTPUT, "Show the traceback of an error.", "--debug")),
}
RUNNING = ("device", "workers", "store", "dry_run", "json", "debug")
DATA = ("dataset", "data_dir", "held_out", "image_size")
TRAINING: tuple[str, ...] = ("exact_repo", "bits", "quantize_at", "model", "weights", "freeze_batchnorm")
TRAINING += ("setting", "steps", "eval_every", "batch_size", "lr", "seed", "trial_seed", "seeds")
SETTING_FIELDS: tuple[str, ...] = (
    "image_size",
    "model",
    "freeze_batchnorm",
    "bits",
    "steps",
    "eval_every",
    "batch_size",
    "lr",
)
SETTING_FIELDS += ("seed", "trial_seed", "seeds")


@dataclass(frozen=True)
class Choices:
    """What the user chose, by the names of the options."""

    given: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option."""
        try:
            return self.given[name]
        except KeyError:
            raise AttributeError(name) from None

    def runs(self) -> "RunStore":
        """Return the store."""
        from flatlab.runs import RunStore

        return RunStore(self.store or "runs")

    def folder(self) -> Path | None:
        """Return the data folder: `--data-dir`, or PATH of `folder:PATH`."""
        kind, _, path = str(self.dataset).partition(":")
        return Path(path) if kind.lower() == "folder" and path and self.data_dir is None else self.data_dir

    def name(self) -> str:
        """Return the data set's name; a folder goes by its last part, since where it lies is no part of a run."""
        kind, _, path = str(self.dataset).partition(":")
        if kind.lower() == "folder":
            return catalog.canonical(f"folder:{Path(path).resolve().name if path else ''}")
        return catalog.canonical(self.dataset)

    def setting(self) -> "Setting":
        """Return the setting with everything that the user changed."""
        from flatlab.settings import for_images, setting

        chosen, dataset, folder = setting(self.given.get("setting", "quick")), self.name(), self.folder()
        if dataset != "digits":
            catalog.locate(dataset, folder)
            chosen = for_images(chosen, dataset)
        weights = _weights(self.given["weights"]) if self.given.get("weights") else {}
        return setting(
            chosen,
            domains=catalog.domain_names(dataset, folder),
            held_out=catalog.held_out(dataset, folder, self.held_out),
            switch=self.given.get("quantize_at"),
            swad_exact_repo=self.given.get("exact_repo"),
            **{**weights, **{f: self.given[f] for f in SETTING_FIELDS if self.given.get(f) is not None}},
        )

    def place(self) -> "Place":
        """Return the machine facts."""
        from flatlab.specs import Place

        folder = self.folder() if "dataset" in self.given else self.given.get("data_dir")
        weights = self.given.get("weights")
        file = weights if weights not in (None, "none", "imagenet") else None
        return Place(
            data_dir=str(folder.resolve()) if folder else None,
            weights_file=str(Path(file).resolve()) if file else None,
            device=self.device,
        )

    def processes(self) -> int:
        """Return how many workers share the jobs."""
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers} does not do: at least one process is needed.")
        from flatlab.machine import cores

        return int(self.workers or cores())


def _weights(weights: str) -> dict[str, Any]:
    """Return the setting's fields for `--weights`: a file goes by its hash, and frozen statistics go with weights."""
    if weights in ("none", "imagenet"):
        return {"weights": weights} | ({"freeze_batchnorm": True} if weights == "imagenet" else {})
    if not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file; give none, imagenet, or a .safetensors or .pth file.")
    from flatlab.files import file_hash

    return {"weights": f"sha256:{file_hash(Path(weights))}", "freeze_batchnorm": True}


def takes(*words: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options; it receives them as one `Choices`, before its own parameters.

    Args:
        words: names of `WORDS`.
        defaults: other defaults than the usual ones.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            own = {name: given.pop(name) for name in list(given) if name not in words}
            with _spoken(debug=given["debug"]):
                command(Choices(given), **own)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(
                word,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(word, WORDS[word][1]),
                annotation=Annotated[_optional(word, defaults), WORDS[word][2]],
            )
            for word in words
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap


@contextmanager
def _spoken(*, debug: bool) -> Iterator[None]:
    """Turn a mistake into one sentence and exit code 2, and an interrupt into a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from flatlab import display

        display.err.print("Stopped. What is done is kept: the same command goes on from here.", style="yellow")
        raise typer.Exit(130) from None
    except (UserError, OSError) as error:
        if debug:
            raise
        from rich.markup import escape

        from flatlab import display

        sentence = str(error) if isinstance(error, UserError) else f"{error.strerror or error}: {error.filename or ''}"
        display.err.print(f"[red]error:[/] {escape(sentence)}", soft_wrap=True)
        raise typer.Exit(2) from None


def _optional(word: str, defaults: dict[str, Any]) -> Any:
    kind, default, _ = WORDS[word]
    return kind if defaults.get(word, default) is not None else kind | None
