"""What can happen to a checkpoint on disk."""

import shutil


def flip_a_bit(checkpoint):
    path = max((checkpoint / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(checkpoint):
    for path in (checkpoint / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leave_out(checkpoint):
    shutil.rmtree(checkpoint / "optimizer")


def swap(checkpoint):
    """Put in intact files, but those of the previous step."""
    shutil.rmtree(checkpoint / "params")
    before = checkpoint.parent / str(int(checkpoint.name) - 1)
    shutil.copytree(before / "params", checkpoint / "params")
