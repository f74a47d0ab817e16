"""Every field of an experiment; a config file read, overridden, checked."""

from jaxprm.config.loading import fingerprint, from_dict, is_plugin, load, to_dict
from jaxprm.config.schema import (
    Collection,
    Data,
    Endpoint,
    Environment,
    Experiment,
    Imitation,
    Logging,
    Lora,
    Mesh,
    Model,
    Policy,
    RewardModel,
    Search,
    Section,
    recorded,
)

__all__ = [
    "Collection",
    "Data",
    "Endpoint",
    "Environment",
    "Experiment",
    "Imitation",
    "Logging",
    "Lora",
    "Mesh",
    "Model",
    "Policy",
    "RewardModel",
    "Search",
    "Section",
    "fingerprint",
    "from_dict",
    "is_plugin",
    "load",
    "recorded",
    "to_dict",
]
