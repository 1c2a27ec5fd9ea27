"""Training: settings, trainer, and everything that a run logs and watches."""
