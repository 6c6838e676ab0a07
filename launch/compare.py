"""Set finished runs side by side: a table of their test figures, and a picture of what their networks draw.

    python launch/compare.py runs/noisy_only runs/pixel_reweight [--figure comparison.png] [--markdown]

`--figure` builds the runs' networks. Those of a run with an imported `model.name` are code that its config names: they
need --allow-import.

Runs of one method, for instance with several seeds, are also summed up as mean ± standard deviation. The networks are
those of the last checkpoints; the picture shows test images of the first run's data, spread evenly over the split.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from distseg.data.checks import usable_samples
from distseg.data.noise import corrupt
from distseg.data.streams import Batch, evaluation_batches
from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError
from distseg.evaluation.report import comparison_figure, results_table, save_png, seeds_table
from distseg.tracking import jsonl
from distseg.training.checkpoint import load_network

SHOWN = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that launch/train.py has finished")
    parser.add_argument("--figure", type=Path, help="where to draw the picture, a PNG")
    parser.add_argument("--markdown", action="store_true", help="tables as GitHub's markdown")
    parser.add_argument("--allow-import", action="store_true", help="run the code that the runs' model.name names")
    arguments = parser.parse_args()
    try:
        results = [read_result(run) for run in arguments.runs]
        print(results_table(results, arguments.markdown))
        if len({result["method"] for result in results}) < len(results):
            print("\n" + seeds_table(results, arguments.markdown))
        if arguments.figure:
            save_png(draw(arguments.runs, arguments.allow_import), arguments.figure)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_result(run: Path) -> dict:
    try:
        return json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{run}: has no readable result.json; give folders of finished runs") from None


@torch.inference_mode()
def draw(runs: list[Path], allow_import: bool) -> np.ndarray:
    """(h, w, 3) uint8: validation curves, test images, and each run's prediction on them."""
    predictions = {}
    for run in runs:
        config, network = load_network(run, allow_import)
        if not predictions:
            batch, masks = load_examples(config, run)
        logits = network.eval()(batch.images)
        predictions[run.name] = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1) > 0
    records = {run.name: jsonl.read(run / "metrics.jsonl") for run in runs}
    return comparison_figure(records, batch.pictures, masks, batch.true_masks, predictions)


def load_examples(config, run: Path) -> tuple[Batch, torch.Tensor]:
    """Some test images with their true masks, and (B, H, W) what an annotator of the training set would have drawn."""
    usable = usable_samples(config.data, config.seed, run, check=False)
    test = [sample for sample in usable if sample.split == "test"]
    chosen = [test[i] for i in np.linspace(0, len(test) - 1, min(SHOWN, len(test))).astype(int)]
    [batch] = evaluation_batches(chosen, config.data, ShardSpec(), len(chosen), torch.device("cpu"))
    pictures = batch.pictures.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    masks = [
        corrupt(mask.numpy(), config.data.noise, sample.id, picture)
        for mask, sample, picture in zip(batch.true_masks, chosen, pictures, strict=True)
    ]
    return batch, torch.from_numpy(np.stack(masks))


if __name__ == "__main__":
    sys.exit(main())
