"""A rank of a command: `torchrun command_rank.py train CONFIG …`."""

import sys

from patience import unhurried
from ranks import gloo_threads
from tutelage.cli import main

HELD = 99
"""Exit code of a rank that did what it should and holds its process group still."""

if __name__ == "__main__":
    unhurried()  # what is told of a slow start is no first line
    code = main(sys.argv[1:])
    sys.exit(HELD if gloo_threads() else code)
