"""`python -m train benchmark train|forward|decode`: how fast, how near the machine's limits."""
