"""`python -m pyvolume`: the same as the `pyvolume` command."""

import sys

from pyvolume.cli import main

if __name__ == "__main__":
    sys.exit(main())
