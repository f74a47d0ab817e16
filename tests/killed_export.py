"""Exports, or scores a file, in a process of its own that stops to be killed where the test wants it.

    python killed_export.py export MODEL OUTPUT    # stops after the second file of weights
    python killed_export.py score MODEL INPUT OUTPUT    # stops after the third chunk, with half a line more

Prints "ready" when it has stopped.
"""

import sys
import time
from pathlib import Path

from jaxprm import files
from jaxprm.export.export import export
from jaxprm.hf import writer
from jaxprm.scoring.files import score_file


def stop(*_):
    print("ready", flush=True)
    time.sleep(600)


def stop_after(function, calls: int, last=stop):
    """The function, which stops when it has been called so often."""
    seen = 0

    def counted(*arguments):
        nonlocal seen
        seen += 1
        result = function(*arguments)
        if seen == calls:
            last(*arguments)
        return result

    return counted


def half_a_line(target, data):
    target.write(data[: len(data) // 7])
    stop()


def main(verb: str, *paths: str) -> None:
    if verb == "export":
        writer._write_shard = stop_after(writer._write_shard, 2)
        export(*map(Path, paths), max_shard_size="40KB")
    else:
        files.write_all = stop_after(files.write_all, 3, half_a_line)
        score_file(*map(Path, paths), chunk=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
