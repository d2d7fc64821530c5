"""Checkpoints free of world size: fp32 master weights and optimiser moments by parameter name, manifest last, no pickle."""
