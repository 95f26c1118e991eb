"""`python -m oln_d2`"""

import sys

from oln_d2.cli import main

sys.exit(main())
