"""`python -m train`: see `train.cli`."""

import sys

from train.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    from train.cli import main  # not before: it would be imported twice

    sys.exit(main())
