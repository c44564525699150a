"""What training would need on a machine that is not at hand: compiled for it, never run."""
