"""Keeps the start-up messages of libtpu, TensorFlow and transformers off the terminal. Importing jaxprm calls it.

With libtpu installed, as the compiler of `plan`, JAX looks for a TPU. On a machine without one, libtpu prints a page of
errors about variables that only a TPU machine has. JAX then computes on the CPU or the GPU as it would have anyway.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

from data_pipeline import quiet

PCI_DEVICES = Path("/sys/bus/pci/devices")
# PCI vendor, and the class of processing accelerators: Google's network cards have another class.
_GOOGLE, _ACCELERATOR = "0x1ae0", "0x12"
# Without the first two, libtpu asks the metadata server, and locks out a second process that has no TPU either. A TPU
# machine sets the others; without them libtpu prints a page of warnings.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def silence(environment: MutableMapping[str, str] = os.environ, devices: Path = PCI_DEVICES) -> None:
    """Sets the variables that keep the libraries quiet, where they are not set. Call it before JAX computes."""
    quiet.silence(environment)
    if importlib.util.find_spec("libtpu") is not None and not tpu_chips(devices):
        without_tpu(environment)


def without_tpu(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that libtpu wants on a machine without a TPU."""
    for name, value in _NO_TPU.items():
        environment.setdefault(name, value)


def tpu_chips(devices: Path = PCI_DEVICES) -> int:
    """Number of TPU chips that are plugged into this machine, whatever JAX was installed for."""
    count = 0
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        count += vendor == _GOOGLE and kind.startswith(_ACCELERATOR)
    return count
