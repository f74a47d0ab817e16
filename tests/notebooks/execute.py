"""python execute.py IN.ipynb OUT.ipynb: executes every cell in the current folder; writes OUT even if a cell fails."""

from __future__ import annotations

import sys

import nbclient
import nbformat

if __name__ == "__main__":
    source, output = sys.argv[1:]
    notebook = nbformat.read(source, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3")
    try:
        client.execute()
    finally:
        nbformat.write(notebook, output)
