"""GenHead: the part-wise, FLAME-deformed tri-plane generator and its training portraits."""
