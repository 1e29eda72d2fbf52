"""FLOPs of one instruction of a compiled program, if it is a matrix product.

A CPU's compiler has `dot`. A TPU's turns every product into a `convolution`, and fuses
some softmaxes and the product after them into a kernel of its own.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from sbr_jax.planning.hlo import Instruction


def flops(instruction: Instruction, operands: Sequence[Instruction]) -> float:
    """FLOPs of one product, 0 for others: 2 for a multiplication and addition."""
    if instruction.opcode == "dot":
        dims = operands[0].arrays[0].dims
        inner = math.prod(dims[i] for i in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * instruction.arrays[0].size * inner
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, operands)
    if instruction.name.startswith("online-softmax"):
        # A kernel of the TPU compiler: softmax(scores [..., S]) values [..., S, F].
        return 2.0 * instruction.arrays[0].size * operands[0].arrays[0].dims[-1]
    return 0.0


def _convolution_flops(
    instruction: Instruction, operands: Sequence[Instruction]
) -> float:
    """FLOPs of a convolution, the form of every product on a TPU.

    A batch of products becomes an axis along which a dilated kernel meets each place
    once. Like XLA, this counts only places where both exist.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    arrays = (operands[0].arrays[0], operands[1].arrays[0], instruction.arrays[0])
    image, kernel, result = (
        dict(zip(names, array.dims, strict=True))
        for names, array in zip(labels.groups(), arrays, strict=True)
    )
    window = _window(instruction.attributes)
    places = 1
    for axis in sorted(label for label in kernel if label.isdigit()):
        own = {name: sizes[int(axis)] for name, sizes in window.items() if sizes}
        places *= _meetings(image[axis], kernel[axis], result[axis], **own)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = image["b"] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * result["f"] * kernel["i"] * places


def _window(attributes: str) -> dict[str, list[int]]:
    """Strides, paddings and dilations of a window by axis; empty if default."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    text = found[1] if found else ""
    parts = dict(re.findall(r"(\w+)=(\S+)", text))
    return {
        name: [int(size.split("_")[0]) for size in parts[name].split("x")]
        for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")
        if name in parts
    }


def _meetings(
    image: int,
    kernel: int,
    result: int,
    *,
    stride: int = 1,
    pad: int = 0,
    lhs_dilate: int = 1,
    rhs_dilate: int = 1,
) -> int:
    """Counts pairs of a result's and a kernel's place that meet the image.

    >>> _meetings(5, 3, 5, pad=1), _meetings(4, 4, 4, stride=3, lhs_dilate=4)
    (13, 4)
    """
    found, last = 0, (image - 1) * lhs_dilate
    starts = np.arange(result) * stride - pad
    for place in range(kernel):
        met = starts + place * rhs_dilate
        inside = (met >= 0) & (met <= last) & (met % lhs_dilate == 0)
        found += int(inside.sum())
    return found
