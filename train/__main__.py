"""`python -m train`: see `train.cli`."""

from train.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    from train.cli import command  # not before: it would be imported twice

    command()
