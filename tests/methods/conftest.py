"""Methods on a small data set, built as the trainer builds them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distseg.config.schema import Config
from distseg.data.sample import Annotation, Sample
from distseg.data.splits import split_clean
from distseg.data.streams import Stream
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec
from distseg.meta.placement import Whole
from distseg.meta.reduction import OneProcess
from distseg.methods.context import Context
from distseg.methods.method import Method, build_method

STEPS = 10
BATCH, CLEAN_BATCH, ACCUMULATION = 4, 3, 2


class Built:
    """A method, the ids of its noisy and clean samples, and the names of the streams that it has opened."""

    def __init__(self, method: Method, noisy: set[str], clean: set[str], opened: set[str], network: nn.Module) -> None:
        self.method, self.noisy, self.clean, self.opened, self.network = method, noisy, clean, opened, network


@pytest.fixture
def build(drawn_data: Path) -> Iterator[Callable[..., Built]]:
    streams: list[Stream] = []

    def make(name: str, picked: bool = False, paired: int = 0, **method) -> Built:
        config = Config.model_validate(
            {
                "name": "x",
                "data": {
                    "root": str(drawn_data),
                    "image_size": 16,
                    "clean_count": 4,
                    "pipeline": "torch",
                },
                "method": {"name": name, **method},
                "train": {"steps": STEPS},
            }
        )
        clean, noisy = split_clean(read_samples(config.data), 4, 0)
        other = Annotation("", noisy[0].truth)
        clean = [replace(s, annotations=(other,) if k < paired else ()) for k, s in enumerate(clean)]
        noisy = [replace(sample, picked=picked and number % 2 == 0) for number, sample in enumerate(noisy)]
        opened = set()

        def open_stream(name: str, samples: list[Sample], labels: str, batch_size: int) -> Stream:
            opened.add(name)
            device = torch.device("cpu")
            streams.append(Stream(samples, labels, name, config.data, 0, ShardSpec(), batch_size, ACCUMULATION, device))
            return streams[-1]

        torch.manual_seed(0)
        network = nn.Conv2d(3, 1, 3, padding=1)
        context = Context(
            noisy=noisy,
            clean=clean,
            steps=STEPS,
            batch_size=BATCH,
            clean_batch_size=CLEAN_BATCH,
            accumulation=ACCUMULATION,
            seed=0,
            open_stream=open_stream,
            model=network,
            placement=Whole(network),
            reduction=OneProcess(),
            device=torch.device("cpu"),
        )
        method = build_method(config.method, context)
        return Built(method, {s.id for s in noisy}, {s.id for s in clean}, opened, network)

    yield make
    for stream in streams:
        stream.close()
