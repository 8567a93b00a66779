"""`python -m attnsteer` is the `attnsteer` command."""

from .cli import main

if __name__ == "__main__":
    main()
