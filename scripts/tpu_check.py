"""Refuses a worker that does not see its TPU chips. Run on all workers of a slice at once: alone it waits for the rest.

python scripts/tpu_check.py DEVICES WORKERS

DEVICES is jax.device_count() of the whole slice, WORKERS the number of its hosts. A jax without libtpu falls back to
the CPU without a word, and a slice that lost a host can look like a smaller one: both are cheaper to find here than
after an hour of a run.
"""

import sys


def problem(platforms: list[str], local: int, devices: int, workers: int) -> str | None:
    """What is wrong with what this worker sees, or None.

    platforms: of every device of the slice. local: the number of this host's devices.
    """
    if wrong := sorted(set(platforms) - {"tpu"}):
        return f"sees no TPU but platform {', '.join(wrong)}: is jax[tpu] installed, and no other process on the chips?"
    if local != devices // workers:
        return f"sees {local} of its own {devices // workers} chips: delete the machine and create it again"
    if len(platforms) != devices:
        return f"sees {len(platforms)} chips in the slice, expected {devices}: is the accelerator the one asked for?"
    return None


def main(arguments: list[str]) -> int:
    devices, workers = map(int, arguments)
    import jax

    try:
        if workers > 1:
            # The default of 300 seconds is too short when the other hosts still install.
            jax.distributed.initialize(initialization_timeout=1800)
        found = problem([one.platform for one in jax.devices()], jax.local_device_count(), devices, workers)
    except RuntimeError as error:
        found = f"sees no TPU: {' '.join(str(error).split())}"
    print(found or f"sees {jax.local_device_count()} of {devices} chips")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
