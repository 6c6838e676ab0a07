"""Compile every kernel for a GPU that need not be there: `compile_ahead.py 90` prints a line of JSON per variant.

The operators are called on CPU tensors with the launches recorded instead of run, so that what is compiled is what a
call would launch: the same arguments, constants and options, specialised as the launcher of Triton does.
"""

import itertools
import json
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from distseg import kernels
from distseg.labels.distances import INSIDE_EDGES, MOST_CLASSES, OUTSIDE_EDGES, bin_count

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands for a kernel: `recorder[grid](…)` keeps the arguments."""

    def __init__(self, kernel: JITFunction, launches: dict[str, tuple]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(0 < size < 2**31 for size in grid)
        return self.record

    def record(self, *arguments, num_warps: int, enable_fp_fusion: bool, **constants) -> None:
        signature, constexprs, attributes = {}, {}, {}
        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
        for place, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constexprs[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        described = {name: str(value) for name, value in constants.items()}
        self.launches.setdefault(source.hash(), (self.kernel.__name__, signature, described, source, options))


def record_launches() -> list[tuple]:
    launches: dict[str, tuple] = {}
    for name, kernel in list(vars(kernels).items()):
        if isinstance(kernel, JITFunction):
            setattr(kernels, name, Recorder(kernel, launches))
    variants = [
        *itertools.product((torch.float32, torch.bfloat16), (1, 8), (torch.contiguous_format,), (torch.uint8,)),
        (torch.float32, 8, torch.channels_last, torch.uint8),
        (torch.float32, 3, torch.contiguous_format, torch.int64),
        (torch.float16, 1, torch.contiguous_format, torch.uint8),
        (torch.float32, 32, torch.contiguous_format, torch.uint8),
        (torch.float32, 150, torch.contiguous_format, torch.uint8),
    ]
    for dtype, channels, layout, labels in variants:
        logits = torch.zeros(2, channels, 96, 96, dtype=dtype).contiguous(memory_format=layout)
        masks, weights, vector = torch.zeros(2, 96, 96, dtype=labels), torch.zeros(2, 96, 96), torch.zeros(2)
        kernels.alignment(logits, logits, masks, True)
        kernels.pixel_loss(logits, masks)
        kernels.weighted_loss(logits, masks, weights, vector, vector, True)
        kernels.weighted_loss_double_backward(logits, masks, weights, vector, vector, vector, logits, True)
        classes, slopes = torch.zeros(2, max(2, channels)), torch.zeros(2, channels)
        kernels.dice_cross_entropy_sums(logits, masks, weights, vector, vector, classes)
        kernels.dice_cross_entropy_gradient(logits, masks, weights, vector, vector, classes, slopes, slopes)
        kernels.rescale_(logits, vector)
        labelled = min(max(2, channels), MOST_CLASSES)
        bins, annotators = torch.zeros(2, 2, 96, 96, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
        tables = torch.zeros(3, labelled, bin_count(labelled))
        kernels.correct_labels(logits[:, :labelled], masks, bins, annotators, tables, torch.zeros(labelled))
    kernels.alignment(logits, logits, masks, False)
    kernels.dice_cross_entropy_sums(logits, masks, None, vector, vector, classes)
    kernels.dice_cross_entropy_gradient(logits, masks, None, vector, vector, classes, slopes, slopes)
    kernels.weighted_loss(logits, masks, None, vector, vector, False)
    kernels.weighted_loss_double_backward(logits, masks, None, vector, vector, vector, logits, False)
    for classes, labels in ((2, torch.uint8), (2, torch.int64), (41, torch.uint8)):
        for side in (96, 2048):
            drawn = torch.zeros(2, side, side, dtype=labels)
            for area in (0, side * side // 16):
                kernels.signed_distance_bins(drawn, classes, [*OUTSIDE_EDGES], [*INSIDE_EDGES], area)
    for cell in (1, 3, 8, 96):
        kernels.positive_part(weights, masks, cell)
    kernels.normalise(weights, masks, vector, vector)
    kernels.normalise(None, masks, vector, vector)
    return list(launches.values())


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL … of the one function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [line] = [line for line in out.splitlines() if "REG:" in line]
    return {name: int(value) for name, value in (word.split(":") for word in line.split() if word.count(":") == 1)}


def main(capability: int) -> None:
    for name, signature, constants, source, options in record_launches():
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        used = resources(compiled.asm["cubin"])
        print(json.dumps({"kernel": name, "constants": constants, "signature": list(signature.values()), **used}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
