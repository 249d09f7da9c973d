"""`python -m cutlayer`: the command line."""

import sys

from cutlayer.cli import main

sys.exit(main())
