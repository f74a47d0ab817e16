"""Fails on a worker that does not see its TPU chips. Run it on all workers of a slice at once, as they wait for others.

python scripts/tpu_check.py DEVICES WORKERS

DEVICES is jax.device_count() of the whole slice, WORKERS the number of its hosts. A jax without libtpu uses the CPU
without a warning, and a slice that lost a host can look like a smaller one. Both are cheaper to detect here than an
hour into a run.
"""

import sys


def problem(platforms: list[str], local: int, devices: int, workers: int) -> str | None:
    """An error message if this worker sees the wrong devices, else None.

    platforms: one per device of the slice. local: number of devices of this host.
    """
    if wrong := sorted(set(platforms) - {"tpu"}):
        return f"sees no TPU but platform {', '.join(wrong)}: is jax[tpu] installed, and are the chips free?"
    if local != devices // workers:
        return f"sees {local} of its {devices // workers} chips: delete the machine and create it again"
    if len(platforms) != devices:
        return (
            f"sees {len(platforms)} chips in the slice, expected {devices}: is this the accelerator that was requested?"
        )
    return None


def main(arguments: list[str]) -> int:
    devices, workers = map(int, arguments)
    import jax

    try:
        if workers > 1:
            # The default of 300 seconds is too short: other hosts may still be installing packages.
            jax.distributed.initialize(initialization_timeout=1800)
        platforms = [device.platform for device in jax.devices()]
        message = problem(platforms, jax.local_device_count(), devices, workers)
    except RuntimeError as error:
        message = f"sees no TPU: {' '.join(str(error).split())}"
    print(message or f"sees {jax.local_device_count()} of {devices} chips")
    return 1 if message else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
