"""How well `distseg audit` finds wrong masks, beside its rivals; and what relabelling by its order is worth.

    python benchmarks/audit.py ranking WORK --isic PATH [--bubil PATH] [--lidc PATH] [--only isic_polygon]
    python benchmarks/audit.py relabel WORK --isic PATH … [--shares 0.01 0.02 0.05 0.1] [--method noisy_only]
    python benchmarks/audit.py weights WORK --isic PATH …
    python benchmarks/audit.py show

Each PATH holds manifest.csv; WORK is for runs and audits. A result is a file in benchmarks/results/audit/, with date
and machine. What has a file is not made again, and what was stopped is taken up.

ranking: trains on masks whose truth is known and kept back, audits by the run (quick) and by three folds (folds), and
holds each score against the Dice of masks and truth: Spearman's correlation, the AUROC of masks with a true Dice below
0.8, and which share of the tenth that a score calls worst belongs to the truly worst tenth.

weights: what the expected Dice would be with another weight of the annotators' evidence, and with pixels that are wrong
independently, of the quick audits in WORK.

relabel: the masks that a score of the quick audit calls worst become references, as if an expert had drawn them again,
and a network is trained on the result by `--method`; test Dice. A random draw joins the clean images, picked ones stay
among the noisy ones; noisy_only learns from these alone, so there the random draw stays among them too.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import describe_machine
from numpy.typing import NDArray
from torch import Tensor

from distseg.cli import audit as audit_command
from distseg.config.load import load_config
from distseg.data.manifest_file import write_manifest
from distseg.data.sample import Annotation, Sample
from distseg.data.splits import split_clean
from distseg.data.survey import survey
from distseg.distributed.launcher import train_command, train_environment
from distseg.files import write_atomically
from distseg.inference.audit.folder import AuditFolder
from distseg.inference.audit.model import fit, logits_of, masks_at
from distseg.labels.quality import expected_dice

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "audit"
BASE = {
    "name": "audit",
    "data": {"image_size": 48, "augment": {"flip": True, "right_angles": True}},
    "model": {"name": "unet", "width": 8, "depth": 3, "norm": "group"},
    "optim": {"name": "adam", "lr": 8e-3, "schedule": "one_cycle"},
    "train": {"steps": 300, "batch_size": 16, "clean_batch_size": 16, "log_every": 50, "validate_every": 100},
    "tracking": {"mlflow": False},
}
TRUE_OR_TRIANGLE = "{kind: mixed, annotators: [{kind: polygon, vertices: 3}, {kind: boundary, alpha: 0}]}"
"""Triangles mixed with true masks, which boundary noise of alpha 0 leaves as they are."""
CASES: dict[str, tuple[str, list[str]]] = {
    "isic_polygon": ("isic", ["data.clean_count=50", f"data.noise={TRUE_OR_TRIANGLE}"]),
    "isic_boundary": ("isic", ["data.clean_count=50", "data.noise={kind: boundary, alpha: 0.7, beta: 0.7}"]),
    "bubil_crowd": ("bubil", ["data.clean_count=10"]),
    "lidc_readers": ("lidc", ["data.clean_count=50"]),
}
"""Which data and keys. boundary(0.7, 0.7) leaves three of ten masks true."""
METHOD = "label_correction"
SCORES = {"expected_dice": 1, "disagreement": -1, "softmin": 1, "random": 1}
"""Columns of an audit's table, and whether good masks are high or low."""
BAD = 0.8
WEIGHTS = (0.0, 0.25, 0.5, 1.0)
FOLDS = 3


@dataclass(frozen=True)
class Place:
    """Where one case with one seed is made."""

    work: Path
    case: str
    seed: int
    data: Path
    more: tuple[str, ...] = ()
    """Keys in place of the case's."""

    @property
    def keys(self) -> list[str]:
        noise = [] if "noise" not in " ".join(CASES[self.case][1]) else [f"data.noise.seed={self.seed}"]
        return [f"data.root={self.data}", *CASES[self.case][1], f"seed={self.seed}", *noise, *self.more]

    @property
    def run(self) -> Path:
        return self.work / "runs" / f"{self.case}-s{self.seed}"

    def audit(self, mode: str) -> Path:
        return self.work / "audits" / f"{self.case}-s{self.seed}-{mode}"


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) from 1; ties share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[place]


def figures_of(score: NDArray[np.float64], true: NDArray[np.float64], id_order: NDArray[np.int64]) -> dict[str, float]:
    """Of scores (n,) that are high for good masks, and true Dice; `id_order` decides between equals."""
    bad = true < BAD
    place = ranks(score)
    below = bad.sum() * (~bad).sum()
    auroc = 1 - (place[bad].sum() - bad.sum() * (bad.sum() + 1) / 2) / below if below else float("nan")
    count = max(1, len(true) // 10)
    worst = np.lexsort((id_order, score))[:count]
    truly = np.lexsort((id_order, true))[:count]
    return {
        "spearman": float(np.corrcoef(place, ranks(true))[0, 1]) if place.std() else 0.0,
        "auroc": float(auroc),
        "precision": len(set(worst.tolist()) & set(truly.tolist())) / count,
        "true_dice_of_worst": float(true[worst].mean()),
    }


def rank_masks(place: Place, modes: Sequence[str]) -> None:
    for mode in modes:
        result = RESULTS / f"{place.case}-s{place.seed}-{mode}.json"
        if result.exists():
            continue
        started = time.monotonic()
        rows = [row for row in audited(place, mode) if row["true_dice"]]
        true = np.array([float(row["true_dice"]) for row in rows])
        order = np.array([round(1e9 * float(row["random"])) for row in rows])
        scores = {name: sign * np.array([float(row[name]) for row in rows]) for name, sign in SCORES.items()}
        content = {
            "machine": describe_machine("cpu"),
            "case": place.case,
            "seed": place.seed,
            "mode": mode,
            "seconds": round(time.monotonic() - started, 1),
            "masks": len(rows),
            "mean_true_dice": float(true.mean()),
            "mean_expected_dice": float(scores["expected_dice"].mean()),
            "mean_absolute_error": float(np.abs(scores["expected_dice"] - true).mean()),
            "scores": {name: figures_of(values, true, order) for name, values in scores.items()},
        }
        write_atomically(result, json.dumps(content, indent=1) + "\n")
        print(f"{result.name}: {json.dumps(content['scores'])}", flush=True)


def weigh(place: Place) -> None:
    result = RESULTS / "weights" / f"{place.case}-s{place.seed}.json"
    if result.exists() or not (place.audit("quick") / "table.csv").exists():
        return
    arguments = audit_command.parse_arguments([str(place.run), "--to", str(place.audit("quick"))], None)
    config, folder = audit_command.configured(arguments), AuditFolder(arguments.to)
    [judge] = [audit_command.judge_of(task, folder) for task in audit_command.find_tasks(arguments, config, folder)]
    decoding = config.data.decoding
    rows = [row for row in audited(place, "quick") if row["true_dice"]]
    true = {(row["id"], row["annotator"]): float(row["true_dice"]) for row in rows}
    found = {}
    for weight in WEIGHTS:
        model = fit([judge], decoding, config.data.class_count, weight)
        expected = {}
        for drawn in judge.drawn:
            relative = logits_of(judge.images, drawn.sample.id)
            masks = masks_at(drawn, (relative.shape[1], relative.shape[2]), decoding)
            posterior = model.posterior(judge.name, relative, masks).softmax(0)
            for name, mask in masks.items():
                drawn_mask = torch.from_numpy(mask)
                expected[drawn.sample.id, name] = (
                    expected_dice(posterior, drawn_mask),
                    pixels_apart(posterior, drawn_mask),
                )
        truth = np.array([*true.values()])
        for place_of, name in enumerate((f"{weight}", f"{weight}, pixels apart")):
            values = np.array([expected[key][place_of] for key in true])
            found[name] = figures_of(values, truth, np.arange(len(true))) | {
                "mean_error": float((values - truth).mean()),
                "mean_absolute_error": float(np.abs(values - truth).mean()),
            }
    content = {"machine": describe_machine("cpu"), "case": place.case, "seed": place.seed, "weights": found}
    result.parent.mkdir(exist_ok=True)
    write_atomically(result, json.dumps(content, indent=1) + "\n")
    print(f"{result.name}: {json.dumps(found)}", flush=True)


def pixels_apart(posterior: Tensor, mask: Tensor) -> float:
    """2 Σ_A P / (|A| + Σ P) of two classes: the expected Dice where pixels are right or wrong independently."""
    marked = float(posterior[1].sum() + (mask == 1).sum())
    return float(2 * posterior[1][mask == 1].sum()) / marked if marked else 1.0


def relabel(place: Place, shares: Sequence[float], method: str) -> None:
    """Train with each share of masks drawn again, by each score's order; 0 comes first and is the same for all."""
    config = load_config(base_config(place.work), [*place.keys, f"method.name={method}"])
    samples = survey(config.data)[0]
    clean, noisy = split_clean([each for each in samples if each.split == "train"], config.data.clean_count, place.seed)
    scored = [each for each in samples if each.split != "train"]
    rows: Sequence[Mapping[str, str]] = []
    for share in (0.0, *shares):
        for name in SCORES if share else ("none",):
            result = RESULTS / "relabel" / f"{place.case}-s{place.seed}-{method}-{name}-{share:g}.json"
            if result.exists():
                continue
            rows = rows or audited(place, "quick")
            ordered = (
                sorted(rows, key=lambda row: (SCORES.get(name, 1) * float(row[name]), row["random"])) if share else []
            )
            again = [row["id"] for row in ordered[: round(share * len(rows))]]
            root = place.work / "relabelled" / result.stem
            drawn = {row["id"]: Path(row["file"]) for row in rows}
            joins_clean = name == "random" and method != "noisy_only"
            write_data(root, clean, noisy, scored, drawn, set(again), set() if joins_clean else set(again))
            keys = [*place.more, "data.clean_count=null", "data.follow_links=true"]
            keys += [f"data.root={root}", f"seed={place.seed}"]
            train(place, root.name, method, keys)
            done = json.loads((place.work / "runs" / root.name / "result.json").read_text())
            content = {
                "machine": describe_machine("cpu"),
                "case": place.case,
                "seed": place.seed,
                "method": method,
                "score": name,
                "share": share,
                "relabelled": len(again),
                **{key: done[key] for key in ("test/dice", "test/jaccard")},
            }
            result.parent.mkdir(exist_ok=True)
            write_atomically(result, json.dumps(content, indent=1) + "\n")
            print(f"{result.name}: test Dice {done['test/dice']:.4f}", flush=True)


def write_data(
    root: Path,
    clean: Sequence[Sample],
    noisy: Sequence[Sample],
    scored: Sequence[Sample],
    drawn: Mapping[str, Path],
    again: set[str],
    picked: set[str],
) -> None:
    """A data set of links: references of the clean images, of those drawn again and of those that are scored on.

    picked: those of `again` that stay among the noisy images.
    """
    links: dict[str, str] = {}

    def linked(path: Path) -> Path:
        folder = links.setdefault(str(path.parent.resolve()), f"files{len(links)}")
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        if not (root / folder).is_symlink():
            (root / folder).symlink_to(path.parent.resolve())
        return root / folder / path.name

    samples = []
    for sample in (*clean, *noisy, *scored):
        known = sample.id not in drawn or sample.id in again
        samples.append(
            Sample(
                sample.id,
                sample.split,
                linked(sample.image),
                linked(sample.truth) if known else None,
                () if known else (Annotation("", linked(drawn[sample.id])),),
                sample.group,
                picked=sample.id in picked,
            )
        )
    write_manifest(root, samples)


def train(place: Place, name: str, method: str, keys: Sequence[str]) -> None:
    if (place.work / "runs" / name / "result.json").exists():
        return
    words = ["--config", str(base_config(place.work)), "--runs-dir", str(place.work / "runs"), "--resume", "auto"]
    call(train_command(0, *words, *keys, f"method.name={method}", f"name={name}"))


def audited(place: Place, mode: str) -> list[dict[str, str]]:
    """The table of an audit; of one that is complete there is nothing to do."""
    train(place, place.run.name, METHOD, place.keys)
    if not (place.audit(mode) / "table.csv").exists():
        words = ["--folds", str(FOLDS)] if mode == "folds" else []
        command = ["-m", "distseg.cli.audit", str(place.run), "--to", str(place.audit(mode)), *words]
        call([sys.executable, *command, "--batch-size", "32"])
    with (place.audit(mode) / "table.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def base_config(work: Path) -> Path:
    path = work / "base.yaml"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        base = BASE | {"data": {"root": "???", **BASE["data"]}}  # type: ignore[dict-item]
        write_atomically(path, json.dumps(base))  # which is YAML
    return path


def call(command: Sequence[str]) -> None:
    done = subprocess.run(command, env=train_environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def summary() -> Iterator[str]:
    """Of what there is, as Markdown: means over seeds, with their standard deviation where there are several."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        found.setdefault((content["case"], content["mode"]), []).append(content)
    yield "| case | judged by | seeds | score | Spearman | AUROC | precision at 10 % | true Dice of these |"
    yield "|---|---|---|---|---|---|---|---|"
    for (case, mode), results in found.items():
        for score in SCORES:
            values = " | ".join(
                over_seeds([each["scores"][score][key] for each in results])
                for key in ("spearman", "auroc", "precision", "true_dice_of_worst")
            )
            yield f"| {case} | {mode} | {len(results)} | {score} | {values} |"
    weights = [json.loads(path.read_text()) for path in sorted((RESULTS / "weights").glob("*.json"))]
    if weights:
        yield ""
        yield "| case, seed | weight | Spearman | AUROC | precision at 10 % | mean error | mean absolute error |"
        yield "|---|---|---|---|---|---|---|"
    keys = ("spearman", "auroc", "precision", "mean_error", "mean_absolute_error")
    for content in weights:
        for weight, figures in content["weights"].items():
            values = " | ".join(f"{figures[key]:.3f}" for key in keys)
            yield f"| {content['case']}, {content['seed']} | {weight} | {values} |"
    test: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for path in sorted((RESULTS / "relabel").glob("*.json")):
        content = json.loads(path.read_text())
        by_share = test.setdefault((content["case"], content["method"], content["score"]), {})
        by_share.setdefault(content["share"], []).append(content["test/dice"])
    if test:
        shares = sorted({share for by_share in test.values() for share in by_share})
        yield ""
        yield f"| case | learned by | order | seeds | {' | '.join(f'{share:.0%} drawn again' for share in shares)} |"
        yield "|---|---|---|---|" + "---|" * len(shares)
    for (case, method, score), by_share in sorted(test.items()):
        seeds = max(map(len, by_share.values()))
        values = " | ".join(over_seeds(by_share[share]) if share in by_share else "" for share in shares)
        yield f"| {case} | {method} | {score} | {seeds} | {values} |"


def over_seeds(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranking", "weights", "relabel", "show"))
    parser.add_argument("work", type=Path, nargs="?")
    for name in ("isic", "bubil", "lidc"):
        parser.add_argument(f"--{name}", type=Path, help="folder with manifest.csv")
    parser.add_argument("--only", choices=CASES, action="append", help="these cases alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", choices=("quick", "folds"), nargs="+", default=["quick", "folds"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--method", default=METHOD, help="that learns from what was drawn again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the config")
    parser.add_argument("--results", type=Path, help="another folder for the results")
    arguments = parser.parse_args()
    if arguments.results:
        globals()["RESULTS"] = arguments.results
    if arguments.what == "show":
        print("\n".join(summary()))
        return
    if arguments.work is None:
        parser.error("give a folder for runs and audits")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for case, (data, _) in CASES.items():
            root = getattr(arguments, data)
            if root is None or (arguments.only and case not in arguments.only):
                continue
            place = Place(arguments.work.resolve(), case, seed, root.resolve(), tuple(arguments.set))
            if arguments.what == "ranking":
                rank_masks(place, arguments.modes)
            elif arguments.what == "weights":
                weigh(place)
            else:
                relabel(place, arguments.shares, arguments.method)


if __name__ == "__main__":
    main()
