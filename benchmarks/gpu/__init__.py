"""``make gpu``: everything that only a GPU can tell, in one report."""
