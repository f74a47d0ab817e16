"""The sections of an experiment, and how config files are read, overridden and checked."""

import sys
from typing import Any

from jaxprm.config import schema
from jaxprm.config.loading import fingerprint, from_dict, is_plugin, load, mesh_of_sizes, parse_mesh, to_dict
from jaxprm.config.schema import (
    CollectionConfig,
    DataConfig,
    DecoderConfig,
    EndpointConfig,
    EnvironmentConfig,
    Experiment,
    ImitationConfig,
    LabelsConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    PolicyConfig,
    ProgressAdvantageConfig,
    RewardModelConfig,
    SearchConfig,
    Section,
    fingerprint_fields,
)

__all__ = [
    "CollectionConfig",
    "DataConfig",
    "DecoderConfig",
    "EndpointConfig",
    "EnvironmentConfig",
    "Experiment",
    "ImitationConfig",
    "LabelsConfig",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "PolicyConfig",
    "ProgressAdvantageConfig",
    "RewardModelConfig",
    "SearchConfig",
    "Section",
    "fingerprint",
    "fingerprint_fields",
    "from_dict",
    "is_plugin",
    "load",
    "mesh_of_sizes",
    "parse_mesh",
    "to_dict",
]

# Earlier names of the sections, which users' config files may have.
_OLD_NAMES = {
    "Collection": "CollectionConfig",
    "Data": "DataConfig",
    "Endpoint": "EndpointConfig",
    "Environment": "EnvironmentConfig",
    "Imitation": "ImitationConfig",
    "Logging": "LoggingConfig",
    "Lora": "LoraConfig",
    "Mesh": "MeshConfig",
    "Model": "DecoderConfig",
    "Policy": "PolicyConfig",
    "RewardModel": "RewardModelConfig",
    "Search": "SearchConfig",
}


def __getattr__(name: str) -> Any:
    """A section by its earlier name, with a one-line notice on stderr."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    print(f"note: jaxprm.config.{name} is now called {_OLD_NAMES[name]}; the old name still works", file=sys.stderr)
    return getattr(schema, _OLD_NAMES[name])
