"""What a training would need on a machine that is not there: compiled for it, never run."""
