"""What `flatlab --help` prints. It stands here so that neither the commands nor their library are loaded for it."""

import shutil
import textwrap

OPENING = """How flat is this minimum, is that one flatter, and does it matter out of domain?

Begin with `flatlab reproduce fig3`: it trains five methods on embedded data, measures how flat their minima are, and
draws Figure 3 of QT-DoG (arXiv 2410.06020) with error bars. Every command can be stopped and repeated."""
CLOSING = "`flatlab COMMAND --help` explains a command, with an example."
COMMANDS = {  # the first sentence of each command's own help
    "Figures and tables": {
        "reproduce": "Reproduce a figure or table of the paper: train and measure what is missing, tabulate, draw.",
        "list": "List the figures and tables that can be reproduced, with the work that each still needs.",
    },
    "Training": {
        "train": "Train a method, or any composition of parts, with each domain held out in turn or one of them.",
        "methods": "List the methods and their parts.",
        "replay": "Apply SWA, SMA and SWAD to the checkpoints of `train --keep-every`, and draw SWAD's valley.",
        "ensemble": "Combine finished runs into an ensemble, which is a run itself (QT-DoG, Eq. 6).",
        "import": "Add a checkpoint to the store as a run: one with torchvision's, DomainBed's or SWAD's names, or an "
        "export.",
        "export": "Write a quantized run to a file of integer weights; report its size, or how an ONNX file agrees "
        "with it.",
    },
    "Measurement": {
        "flatness": "Measure how fast the loss rises around trained runs: F on spheres (QT-DoG Eq. 5), with intervals.",
        "hessian": "Measure the Hessian of trained runs: top eigenvalues with bounds, trace with interval, spectral "
        "density.",
        "landscape": "Draw the loss on a plane through trained runs, and compare three estimates of the Hessian trace.",
        "noise": "Test quantization noise for uniformity and symmetry (QT-DoG Figs. 2, 8), or how rounding "
        "raises the loss.",
        "stability": "Report the variability of held-out accuracy, its correlation with validation accuracy, and "
        "selection regret.",
        "audit": "Rescale layers without changing the function, and rank flatness measures by how much they change.",
        "latency": "Time networks on this processor: in torch and onnxruntime, in floats, with integer weights and in "
        "int8.",
        "report": "Write one HTML page, without network: what was measured, in sentences, tables and pictures "
        "to rotate.",
    },
    "Stores and machines": {
        "runs": "List, show, verify, remove and merge the runs of a store.",
        "data": "List and check data sets.",
        "jobs": "List and cancel Slurm arrays, and show their errors.",
        "doctor": "Report the hardware and software that affect speed and results, and how to make runs faster.",
        "selftest": "Check each estimator against closed forms, on each device and dtype of this machine; exit with 1 "
        "if one fails.",
    },
}
OPTIONS = {
    "--version": "Print the version.",
    "--install-completion": "Install completion for the current shell.",
    "--show-completion": "Show completion for the current shell, to copy it or customize the installation.",
    "-h, --help": "Show this message and exit.",
}
NARROWEST, WIDEST = 40, 100  # characters of a line


def page() -> str:
    """Return the page, as wide as the terminal allows."""
    width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
    opening = [textwrap.fill(each, width) for each in OPENING.split("\n\n")]
    indent = 4 + max(len(name) for names in COMMANDS.values() for name in names)
    blocks = [_block(title, names, indent, width) for title, names in COMMANDS.items()]
    blocks.append(_block("Options", OPTIONS, 4 + max(map(len, OPTIONS)), width))
    return "\n\n".join(["Usage: flatlab COMMAND [OPTIONS]", *opening, *blocks, textwrap.fill(CLOSING, width)])


def _block(title: str, meanings: dict[str, str], indent: int, width: int) -> str:
    """Return a title, and below it each word with what it means beside it."""
    below = {"subsequent_indent": " " * indent, "break_on_hyphens": False}
    rows = [
        textwrap.fill(meaning, width, initial_indent=f"  {word}".ljust(indent), **below)  # type: ignore[arg-type]
        for word, meaning in meanings.items()
    ]
    return "\n".join([f"{title}:", *rows])
