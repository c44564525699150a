"""What a model learned and looked at, to be seen: pages of one file, and pictures."""
