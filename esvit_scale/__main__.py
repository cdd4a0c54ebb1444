"""`python -m esvit_scale`: the command line."""

import sys

from esvit_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
