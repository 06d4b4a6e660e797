"""How a run's network is written to an ONNX file."""

from typing import Annotated, Literal

from pydantic import Field

from flatlab.specs.base import Spec


class OnnxSpec(Spec):
    """How a network becomes an ONNX file."""

    activations: Annotated[
        Literal["float", "int8"], Field(description="Activations of an ONNX file: float or int8.")
    ] = "float"
    calibration: Annotated[
        Literal["min-max", "percentile", "mse"],
        Field(description="How ranges of int8 activations are chosen: min-max, percentile (99.99 %) or mse."),
    ] = "min-max"
    calibration_images: Annotated[
        int,
        Field(
            ge=1, le=2**31, description="Training images of each source domain for the calibration of int8 activations."
        ),
    ] = 128
    reduce_range: Annotated[
        bool,
        Field(
            description="Round int8 activations to 128 levels, so that products of 8-bit weights are summed exactly on "
            "processors without VNNI."
        ),
    ] = False
    opset: Annotated[int, Field(ge=13, le=100, description="Version of an ONNX file's operators.")] = 17
