"""`python -m tinkerbell_server` runs `tinkerbell serve`."""

import sys

from tinkerbell_server.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
