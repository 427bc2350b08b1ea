"""Reconstructor architectures, one file each."""
