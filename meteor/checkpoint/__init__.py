"""Checkpoints that any world size can read: fp32 master weights and optimiser moments by parameter name, no pickle."""
