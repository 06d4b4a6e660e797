"""A folder in which `transformers` saved a model: its content hash, its configuration, its weights. Torch-free."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flatlab.errors import UserError, count_of

PREFIXES = ("hf:", "clip:")
CONFIG = "config.json"
TOKENIZER = (  # files that define the tokenizer; those that exist are hashed
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def is_saved(model: str) -> bool:
    """Whether a model is such a folder: written `hf:PATH` by a user and `hf:NAME@HASH` in specs; or `clip:...`."""
    return model.strip().lower().startswith(PREFIXES)


def path_of(written: str) -> Path:
    """Return PATH of `hf:PATH`."""
    return Path(written.partition(":")[2].strip()).expanduser()


def named(written: str) -> str:
    """Return `hf:NAME@HASH` for `hf:PATH`: the last part of the path, and a hash of configuration and tokenizer.

    The weights are not hashed here: a spec identifies them by a hash of their own.

    Raises:
        UserError: the folder, its configuration or its tokenizer is missing, or transformers is not installed.
    """
    kind, folder = written.partition(":")[0].strip().lower(), path_of(written)
    return f"{kind}:{folder.absolute().name}@{_hash(folder)}"


def _hash(folder: Path) -> str:
    config = config_of(folder)
    tokenizer = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    if not tokenizer:
        raise UserError(f"{folder} has no tokenizer: expected tokenizer.json or vocab.txt beside {CONFIG}.")
    if find_spec("transformers") is None:
        raise UserError("This network needs a package that is not installed: pip install 'flatlab[transformers]'.")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in tokenizer:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def checked(model: str, folder: str | None) -> Path:
    """Return the folder of a spec's model after comparing its content with the spec's hash.

    Args:
        model: `hf:NAME@HASH`.
        folder: the folder, or None if none was given.

    Raises:
        UserError: no folder was given, or its content has another hash.
    """
    digest = model.rpartition("@")[2]
    if folder is None:
        raise UserError(f"This run's network is {model}, whose folder is not known: write --model-dir PATH.")
    if (found := _hash(Path(folder))) != digest:
        raise UserError(f"The configuration or tokenizer in {folder} (@{found}) is not that of the run, {model}.")
    return Path(folder)


def config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder.

    Raises:
        UserError: there is no config.json, or it has no model_type.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"A network of transformers must be a folder with {CONFIG} and tokenizer, got {folder}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} must be JSON, and is not: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} must have the entry model_type, as transformers writes it.")
    return config


def weights_in(folder: Path) -> Path:
    """Return the file that holds a folder's weights.

    Raises:
        UserError: there is no such file, or the weights are split over several.
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None and (shards := sorted(folder.glob("*-of-*"))):
        raise UserError(
            f"{folder} has its weights in {count_of(len(shards), 'file')}; write them as one: "
            "model.save_pretrained(PATH, max_shard_size='1TB')."
        )
    if found is None:
        raise UserError(f"{folder} has no weights: expected {' or '.join(WEIGHTS)}, or write --weights none.")
    return found
