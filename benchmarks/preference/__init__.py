"""A step of a preference loss against TRL's trainers."""
