"""`python -m jaxprm VERB`."""

import sys

from jaxprm.cli import main

sys.exit(main())
