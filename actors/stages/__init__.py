"""Every stage, one file each."""
