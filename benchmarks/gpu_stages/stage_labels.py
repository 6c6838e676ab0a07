"""benchmarks/label_step.py, size by size: a step on corrected labels beside a plain one, and the operators alone."""

import argparse

import label_step

from gpu_stages.findings import Findings, Setting


def measure(setting: Setting, findings: Findings) -> None:
    """The paper's network at 96², and 512²."""
    network = {"width": 4, "depth": 1, "norm": "group"} if setting.tiny else {"width": 64, "depth": 4, "norm": "none"}
    rounds = 3 if setting.tiny else 9
    arguments = argparse.Namespace(**network, rounds=rounds, device=setting.device)
    for size in ("2x16x16",) if setting.tiny else ("6x96x96", "4x512x512"):
        for name, row in label_step.measure(size, arguments)["rows"].items():
            spread = row.get("ratio") or row.get("over_copy")
            findings.add(
                f"{size} noisy and as many clean images",
                {
                    "what": name,
                    "ms": 1e3 * row["seconds"],
                    "ratio": spread[1] if spread else None,
                    "to": label_step.BESIDE.get(name, "copy") if spread else "",
                    "% of a plain step": 100 * row["of_step"] if "of_step" in row else None,
                },
            )
