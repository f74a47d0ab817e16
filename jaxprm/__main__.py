"""`python -m jaxprm VERB`."""

import sys

from data_pipeline.terminal import make_output_safe
from jaxprm.cli import main


def run() -> None:
    """The console script."""
    make_output_safe()
    sys.exit(main())


if __name__ == "__main__":
    run()
