"""Convolutional networks shared by the generator and the reconstructor."""
