"""Losses and metrics of forget and retain data, at the weights as they are."""
