"""From specs to things: domains, networks, checkpoints, exported files."""
