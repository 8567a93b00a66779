"""lm-eval's own command line, with the model `attnsteer` registered (lm-eval 0.4.13 looks for none in other packages)."""

import sys

from lm_eval.__main__ import cli_evaluate

from ...errors import AttnSteerError


def main() -> int:
    """Run it; 2 after an error of this library. The package that this module is in has registered the model."""
    try:
        cli_evaluate()
    except AttnSteerError as error:
        print(f"attnsteer: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
