"""What a model holds: parameters of an adapter, the adapted linear layer, quantised bases, the path a layer takes."""
