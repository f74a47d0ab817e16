"""Imports a checkpoint of the shape of Qwen2.5-7B in bfloat16 and exports it again; measures time and host memory.

    python -m benchmarks.import_export [--layers 28] [--devices 1] [--directory DIR] [--keep]

Writes a random checkpoint to disk, a tensor at a time (15.2 GB with all 28 layers, 4.0 GB with 4), and reads it onto
the device, or onto a mesh of virtual devices. Prints seconds and the peak of anonymous host memory against the bound:
parameters + 2 x the largest tensor + 256 MB. The exit status is 1 if the bound is exceeded or a tensor is wrong. Linux
only.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SLACK = 256 << 20  # bytes
SAMPLE_SECONDS = 0.005
SHAPES = {
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "intermediate_size": 18_944,
        "rope_theta": 1e6,
        "tie_embeddings": False,
    },
    # For tests: the same proportions, a fraction of the size.
    "small": {
        "vocab_size": 8192,
        "hidden_size": 768,
        "layers": 12,
        "heads": 12,
        "kv_heads": 4,
        "head_dim": 64,
        "intermediate_size": 3072,
        "rope_theta": 1e6,
        "tie_embeddings": False,
    },
}


class Measured(NamedTuple):
    """Result and duration of a function, and the peak of anonymous memory above its start, in bytes."""

    result: Any
    seconds: float
    peak: int


def anonymous_memory() -> int:
    """Resident bytes of this process without those mapped from files, which the kernel can drop at any time."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def measured(work: Callable[[], Any]) -> Measured:
    """Runs `work` while a thread samples the memory of the process."""
    before, done = anonymous_memory(), threading.Event()
    peak = [before]

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.monotonic()
    try:
        result = work()
    finally:
        seconds = time.monotonic() - began
        done.set()
        thread.join()
    return Measured(result, seconds, max(peak[0], anonymous_memory()) - before)


def random_bfloat16(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of magnitude 1/64 to 1/32 and random sign, determined by the name of the tensor."""
    import ml_dtypes

    rng = np.random.default_rng(zlib.crc32(name.encode()))
    # Random sign and mantissa with a fixed exponent: random bits are fast to draw.
    bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
    return ((bits & 0x807F) | 0x3C80).view(ml_dtypes.bfloat16).reshape(shape)


def make_checkpoint(directory: Path, config) -> int:
    """Writes config.json and sharded weights; returns the bytes of the largest tensor."""
    from jaxprm.hf.config import hf_config
    from jaxprm.hf.names import tensors
    from jaxprm.hf.writer import TensorToWrite, write_weights

    described = hf_config(config, reward=False, pad_id=0, end_id=1, max_length=32_768, dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(described))
    specs = list(tensors(config, reward=False))
    write_weights(
        directory,
        [
            TensorToWrite(spec.name, spec.shape, lambda spec=spec: random_bfloat16(spec.name, spec.shape))
            for spec in specs
        ],
        dtype="bfloat16",
    )
    return max(2 * int(np.prod(spec.shape)) for spec in specs)


def import_checkpoint(directory: Path, config, devices: int):
    """The parameters in bfloat16 on the device, or split over several."""
    import jax
    import jax.numpy as jnp

    from jaxprm import config as config_lib
    from jaxprm.hf import reader
    from jaxprm.model import sharding

    shardings = None
    if devices > 1:
        mesh = sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=devices))
        shapes = sharding.with_shardings(mesh, reader.abstract(config, reward=False))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    _, state = reader.load_transformer(directory, dtype=jnp.bfloat16, shardings=shardings)
    return jax.block_until_ready(state)


def export_checkpoint(directory: Path, config, state) -> None:
    """Writes the parameters as `export` does."""
    from jaxprm.hf import writer

    directory.mkdir()
    ids = {"pad_id": 0, "end_id": 1, "max_length": 32_768}
    writer.write_model(directory, config, state, **ids, dtype="bfloat16")


def wrong_files(source: Path, exported: Path) -> list[str]:
    """Names of files of weights that differ, or that only one directory has."""
    names = {path.name for folder in (source, exported) for path in folder.iterdir() if "safetensors" in path.name}
    return sorted(name for name in names if not _equal(source / name, exported / name))


def _equal(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def wrong_tensors(config, state) -> Iterator[str]:
    """Names of imported tensors that differ from the written ones, among samples of every kind."""
    from jaxprm.hf.names import tensors

    for spec in tensors(config, reward=False):
        # Only the first and the last layer: drawing every tensor again would take as long as writing it did.
        if spec.layer not in (None, 0, config.layers - 1):
            continue
        parameter = state
        for name in spec.path:
            parameter = parameter[name]
        values = parameter[...] if spec.layer is None else parameter[spec.layer]
        ours = np.asarray(values[:, :8] if spec.transposed else values[:8]).view(np.uint16)
        theirs = random_bfloat16(spec.name, spec.shape)[:8].view(np.uint16)
        if not np.array_equal(ours.T if spec.transposed else ours, theirs):
            yield spec.name


def report(name: str, size: int, measurement: Measured, bound: int) -> bool:
    """Prints a line; returns whether the peak is within the bound."""
    kept = measurement.peak <= bound
    print(
        f"{name}: {size / 1e9:.2f} GB in {measurement.seconds:.1f} s; peak anonymous memory "
        f"{measurement.peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB: {'kept' if kept else 'BROKEN'}",
        flush=True,
    )
    return kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="default 7b; small is for tests")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--devices", type=int, default=1, help="virtual devices to split the parameters over")
    parser.add_argument("--directory", type=Path, help="directory for the checkpoint (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.devices > 1:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    import jax  # after the environment is set, which it reads once

    from jaxprm.model.config import TransformerConfig

    config = TransformerConfig(**SHAPES[options.shape])
    config = dataclasses.replace(config, layers=options.layers or config.layers)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="jaxprm-benchmark-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        source = measured(lambda: make_checkpoint(directory, config))
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        print(f"written: {size / 1e9:.2f} GB in {source.seconds:.1f} s ({config.layers} layers)", flush=True)
        jax.block_until_ready(jax.numpy.zeros(8) + 1)  # so that the memory of JAX itself is not counted
        loaded = measured(lambda: import_checkpoint(directory, config, options.devices))
        resident = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.result))
        kept = report("import", size, loaded, resident + 2 * source.result + SLACK)
        wrong = list(wrong_tensors(config, loaded.result))
        written = measured(lambda: export_checkpoint(directory / "exported", config, loaded.result))
        kept &= report("export", size, written, 2 * source.result + SLACK)
        wrong += wrong_files(directory, directory / "exported")
        if wrong:
            print(f"WRONG: {', '.join(wrong)}")
        return 0 if kept and not wrong else 1
    finally:
        shutil.rmtree(directory / "exported", ignore_errors=True)
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
