"""The adjoint against honest retraining."""
