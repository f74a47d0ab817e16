"""`python -m jaxprm VERB`."""

import sys

from jaxprm.cli import main


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
