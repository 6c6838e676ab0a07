"""One run a fold, so that each mask is judged by a network that has learned from neither it nor its group."""

from collections.abc import Sequence
from pathlib import Path

from distseg.config.load import config_hash
from distseg.config.schema import Config
from distseg.data.config import FoldConfig
from distseg.data.sample import Sample
from distseg.data.splits import fold_of
from distseg.errors import UserError
from distseg.study.folder import StudyFolder
from distseg.study.plan import StudyRun
from distseg.study.scheduler import run_all, share_machine


def fold_runs(config: Config, noisy: Sequence[Sample], count: int) -> dict[int, StudyRun]:
    """By index the runs of `config` less one of `count` folds each; a fold without a noisy image has none.

    They are not tracked, nor scored at the files' own resolution. Raises UserError where all noisy images are of one
    fold.
    """
    seed = config.data.split_seed
    filled = sorted({fold_of(sample, count, seed) for sample in noisy})
    if len(filled) < 2:
        raise UserError(f"--folds {count}: all noisy images are of one group or fold; take more folds, or none")
    runs = {}
    for index in filled:
        fold_config = FoldConfig(count=count, index=index)
        data = config.data.model_copy(update={"fold": fold_config, "score_own": "never"})
        tracking = config.tracking.model_copy(update={"mlflow": False, "log_model": False})
        fold = config.model_copy(update={"data": data, "tracking": tracking})
        name = f"fold_{index}_of_{count}-{config_hash(fold)}"
        runs[index] = StudyRun(
            config.method.name, data.noise.level, str(data.clean_count), config.seed,
            fold.model_copy(update={"name": name}),
        )  # fmt: skip
    return runs


def train_folds(runs: Sequence[StudyRun], folder: Path, parallel: int) -> int:
    """Make those that have not finished, `parallel` at once, each as one process; an exit code as `run_all`'s."""
    study = StudyFolder(folder)
    study.make()
    return run_all(runs, study, None, 1, share_machine(parallel, 1))
