"""Set finished runs side by side: a table of their test figures, and a picture of what their networks draw.

    python launch/compare.py runs/noisy_only runs/pixel_reweight [--figure comparison.png] [--markdown]

Runs whose configs are equal but for seed and name are also summed up as mean ± standard deviation. The networks are
those of the last checkpoints; the picture shows test images of the first run's data, spread evenly over the split.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distseg.cli.process import say
from distseg.errors import UserError
from distseg.run_folder import RunFolder
from distseg.text import for_terminal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from distseg.config.schema import Config
    from distseg.data.streams import Batch

SHOWN = 5


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders that launch/train.py has finished")
    parser.add_argument("--figure", type=Path, help="where to draw the picture, a PNG")
    parser.add_argument("--allow-import", action="store_true", help="run the code that the runs' model.name names")
    parser.add_argument("--markdown", action="store_true", help="tables as GitHub's markdown")
    arguments = parser.parse_args(argv)
    # Late: help must not wait for what a config needs.
    from distseg.study.comparison import group_runs, read_run
    from distseg.study.tables import groups_table, results_table

    runs = [read_run(run) for run in arguments.runs]
    groups = group_runs(runs)
    say(results_table(runs, arguments.markdown))
    if len(groups) < len(runs):
        say("\nmean ± standard deviation of runs that differ in seed and name only")
        say(("\n" if arguments.markdown else "") + groups_table(groups, arguments.markdown))
    if arguments.figure:
        from distseg.pages.figures import save_png

        save_png(draw(arguments.runs, arguments.allow_import), arguments.figure)
    return 0


def draw(runs: Sequence[Path], allow_import: bool) -> "np.ndarray":
    """(h, w, 3) uint8: validation curves, test images, and each run's prediction on them."""
    import torch

    from distseg.pages.figures import comparison_figure
    from distseg.study.records import read_history
    from distseg.training.checkpoint import load_network

    records = {
        for_terminal(run.name): [
            {"step": record.step, "val/dice": record.validation_dice} for record in read_history(RunFolder(run).metrics)
        ]
        for run in runs
    }
    predictions: dict[str, Tensor] = {}
    examples: tuple[Batch, Tensor] | None = None
    names: tuple[str, ...] = ()
    for run in runs:
        config, network = load_network(run, allow_import)
        examples = examples or load_examples(config, run)
        with torch.inference_mode():
            logits = network.eval()(examples[0].images)
        several = config.data.class_count > 2
        best = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
        predictions[for_terminal(run.name)] = best if several else best > 0
        names = names or config.data.class_names
        if config.data.class_names != names:
            raise UserError(f"{run}: has other classes than {runs[0]}; compare runs of the same ones")
    assert examples is not None  # argparse asks for a run
    batch, masks = examples
    return comparison_figure(records, batch.pictures, masks, batch.masks, predictions, names)


def load_examples(config: "Config", run: Path) -> "tuple[Batch, Tensor]":
    """Some test images with their true masks, and (B, H, W) what an annotator of the training set would have drawn."""
    import numpy as np
    import torch

    from distseg.data.checks import usable_samples
    from distseg.data.noise.write import corrupt
    from distseg.data.streams import evaluation_batches
    from distseg.distributed.ranks import ShardSpec

    usable = usable_samples(config.data, run, check=False)
    test = [sample for sample in usable if sample.split == "test"]
    chosen = [test[i] for i in np.linspace(0, len(test) - 1, min(SHOWN, len(test))).astype(int)]
    [batch] = evaluation_batches(chosen, config.data, ShardSpec(), len(chosen), torch.device("cpu"))
    pictures = batch.pictures.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    masks = [
        corrupt(mask.numpy(), config.data.noise, sample.id, picture)
        for mask, sample, picture in zip(batch.masks, chosen, pictures, strict=True)
    ]
    return batch, torch.from_numpy(np.stack(masks))
