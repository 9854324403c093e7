"""`python -m jaxserve` is the `jaxserve` command."""

import sys

from jaxserve.cli.main import main

sys.exit(main())
