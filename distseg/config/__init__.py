"""What an experiment is: see schema.py for the keys."""

from distseg.config.load import changed_keys, dump_config, flatten_config, load_config
from distseg.config.schema import AugmentConfig, Config, DataConfig, NoiseConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "NoiseConfig",
    "changed_keys",
    "dump_config",
    "flatten_config",
    "load_config",
]
