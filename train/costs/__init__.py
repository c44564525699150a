"""What work costs: operations, bytes, and what chips can do of them."""
