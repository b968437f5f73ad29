"""``python -m fisherscope``."""

import sys

from .cli import main

if __name__ == "__main__":  # the processes of a sweep import it, too
    sys.exit(main())
