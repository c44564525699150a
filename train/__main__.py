"""`python -m train`: see `train.cli`."""

import signal
import sys

from train.allocator import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    try:
        from train.cli import command  # only now: the restart would import it twice
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

    command()
