"""One file an experiment: its docstring holds command, hardware, time and score."""
