"""Training: model assembly and freezing, schedules, engines, the training loop, and export of finished stages."""
