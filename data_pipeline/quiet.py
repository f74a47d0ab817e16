"""Keeps the start-up messages of TensorFlow and transformers off the terminal. Importing data_pipeline calls it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_VARIABLES = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # "PyTorch was not found"
}


def silence(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that these libraries read when they are imported, where they are not set."""
    for name, value in _VARIABLES.items():
        environment.setdefault(name, value)
