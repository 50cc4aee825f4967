"""The network: families and variants, the builder, its layers, weights, size and scaling."""
