"""What keeps a run alive and makes it last: checkpoints, faults, files, sharing. Nothing here knows the algorithm."""
