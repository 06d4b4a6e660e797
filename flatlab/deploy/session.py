"""An ONNX file, opened by onnxruntime."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flatlab import environment
from flatlab.errors import UserError, reason

EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")  # float32; by default, inputs of matrix products become int8


def saturates() -> bool:
    """Return whether kernels of this processor add pairs of int8 products in 16 bits: x86 without VNNI or AMX."""
    sets = set(environment.facts()["instructions"].split())
    return "avx2" in sets and not sets & {"avx512_vnni", "avx_vnni", "amx_int8"}


def needed() -> None:
    """Import the packages of the extra `deploy`.

    Raises:
        UserError: a package is not installed.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime")):
        raise UserError("ONNX files need packages that are not installed: pip install 'flatlab[deploy]'.")
    import_module("onnxruntime")


def opened(file: Path | bytes, *, threads: int = 1, integers: bool = True) -> Any:
    """Return a session of onnxruntime on the CPU.

    Args:
        file: an ONNX file, or its bytes.
        threads: number of threads of one operator.
        integers: whether integer kernels are used; if not, codes become floats when the file is opened.

    Raises:
        UserError: onnxruntime cannot open the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        given = file if isinstance(file, bytes) else str(file)
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base but this one
        name = "this network" if isinstance(file, bytes) else file
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} cannot run {name}: {reason(error).rstrip('.')}; "
            "write the file again with another --opset, such as 17."
        ) from None
