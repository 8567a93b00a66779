"""lmms-eval's own command line, with a steered class in the place of the one that `--model` names."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
