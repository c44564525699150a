"""What work costs in operations and bytes, and how much of both chips can do."""
