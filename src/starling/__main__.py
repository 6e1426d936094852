"""`python -m starling`."""

import sys

from starling.cli import main

if __name__ == "__main__":  # workers started by spawn import this module again
    sys.exit(main())
