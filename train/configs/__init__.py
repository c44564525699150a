"""One file per experiment: its docstring has the command, hardware, time and score."""
