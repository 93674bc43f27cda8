"""`python -m fusionpass` is the command `fusionpass`."""

import sys

from fusionpass.cli import main

sys.exit(main())
