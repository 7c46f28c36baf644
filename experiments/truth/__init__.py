"""Runs whose truth is known by honest retraining."""
