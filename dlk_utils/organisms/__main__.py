"""`python -m dlk_utils.organisms [organism] [runs_dir] [dtype]`: print an organism's held-out figures.

The exit code is 1 if they are not what is required of it.
"""

import sys

from dlk_utils.lab.tables.organism import main

sys.exit(main(*sys.argv[1:]))
