"""The whole adapted layer: forward, backward by tokens, backward by features."""
