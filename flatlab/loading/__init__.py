"""Loading of what specs describe: domains, networks, checkpoints, exported files."""
