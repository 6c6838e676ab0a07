"""benchmarks/kernels.py, size by size: bandwidth beside a copy's, and beside eager torch and torch.compile."""

import argparse

import kernels
import torch

from distseg import ops
from gpu_stages.findings import Findings, Setting


def measure(setting: Setting, findings: Findings) -> None:
    """The large sizes first; compiling takes most of the time, and is left out of the rehearsal."""
    beyond_cache = {}
    if setting.device == "cuda":
        beyond_cache = {"L2 MB": torch.cuda.get_device_properties(0).L2_cache_size / 1e6}
    sizes = ["2x8x9"] if setting.tiny else ["64x512x512", "32x96x96"]
    for size in sizes:
        for channels in (1, 8):
            arguments = argparse.Namespace(
                sizes=[size],
                channels=[channels],
                rounds=3 if setting.tiny else 30,
                device=setting.device,
                compile=not setting.tiny,
            )
            for row in kernels.measure(arguments):
                seconds, speedup = row["seconds"]["ours"], row["speedup"]
                findings.add(
                    f"{size}, C = {channels}, {ops.backend(setting.device)}",
                    {
                        "case": row["case"],
                        "MB": row["bytes"] / 1e6,
                        "ms": 1e3 * seconds,
                        "GB/s": row["bytes"] / seconds / 1e9,
                        "× copy": row["over_copy"][1],
                        "eager / ours": speedup["eager"][1],
                        "compiled / ours": speedup["compiled"][1] if "compiled" in speedup else None,
                    }
                    | beyond_cache,
                )
