"""Exports, or scores a file, in a separate process, and waits to be killed at a chosen point.

    python killed_export.py export MODEL OUTPUT    # waits after the second file of weights
    python killed_export.py score MODEL INPUT OUTPUT    # waits after the third chunk and part of a line

Prints "ready" when it waits.
"""

import sys
import time
from pathlib import Path

from jaxprm import files
from jaxprm.export.export import export
from jaxprm.hf import writer
from jaxprm.scoring.files import score_file


def wait(*_):
    print("ready", flush=True)
    time.sleep(600)


def wait_after(function, calls: int, then=wait):
    """The function, which calls `then` after its call number `calls`."""
    seen = 0

    def counted(*arguments):
        nonlocal seen
        seen += 1
        result = function(*arguments)
        if seen == calls:
            then(*arguments)
        return result

    return counted


def write_part_of_a_line(target, data):
    target.write(data[: len(data) // 7])
    wait()


def main(verb: str, *paths: str) -> None:
    if verb == "export":
        writer._write_shard = wait_after(writer._write_shard, 2)
        export(*map(Path, paths), max_shard_size="40KB")
    else:
        files.write_all = wait_after(files.write_all, 3, write_part_of_a_line)
        score_file(*map(Path, paths), chunk=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
