"""What a model learned and looked at, made visible: single-file pages, and pictures."""
