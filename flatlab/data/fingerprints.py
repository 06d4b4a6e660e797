"""The fingerprint of the available data, which is compared with that of finished runs before they are used.

It is computed from the bytes once, and kept in the cache of images under the files' names, sizes and times; torch is
loaded only for the first fingerprint of the embedded digits.
"""

import contextlib
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

from flatlab import files
from flatlab.data import cache, catalog
from flatlab.data.text import tables


def at_hand(dataset: str, data_dir: str | None, kept: str | None) -> str | None:
    """Return the current fingerprint of a data set; None if its folder is not given or does not exist.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data.
        kept: the cache's folder; None: the platform's.

    Raises:
        UserError: if the folder lacks a domain or class.
    """
    folder = Path(kept) if kept else cache.default_folder()
    name = catalog.canonical(dataset)
    if name == "digits":
        return _digits(folder)
    if name == "sentences":
        return tables.fingerprint(name, tables.embedded())
    if data_dir is None or not Path(data_dir).is_dir():
        return None
    if catalog.is_text(name):
        return tables.fingerprint(name, catalog.sentences(name, Path(data_dir)))
    return cache.fingerprint(dataset, data_dir=Path(data_dir), cache=folder)


def _digits(folder: Path) -> str:
    """Return the digits' fingerprint, computed once for each version of the code and packages that render them."""
    versions = [version(name) for name in ("scikit-learn", "scipy", "numpy", "torch")]
    source = Path(__file__).with_name("digits.py").read_text()
    key = hashlib.sha256(repr((versions, platform.machine(), source)).encode()).hexdigest()[:16]
    path = folder / f"digits-{key}.json"
    if path.exists():
        return str(files.read_record(path)["fingerprint"])
    from flatlab.data import digits

    found = digits.load().fingerprint
    with contextlib.suppress(OSError):  # if the cache is not writable, it is computed at each call
        folder.mkdir(parents=True, exist_ok=True)
        files.write_record(path, {"fingerprint": found})
    return found
