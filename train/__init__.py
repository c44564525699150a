"""The training application: raw parallel text in, a translation model out. `python -m train`."""
