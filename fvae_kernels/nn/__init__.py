"""Modules: the parameters of an adapter, the adapted linear layer, quantised base layers, and `explain`."""
