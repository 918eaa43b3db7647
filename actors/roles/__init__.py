"""The workers that a run is made of, one file each."""
