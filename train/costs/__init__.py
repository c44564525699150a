"""What work costs: operations and bytes, and how many of each a chip can do."""
