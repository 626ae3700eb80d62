"""`python -m minivlm`: the command line for launchers that start a module, such as torchrun."""

import sys

from minivlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
