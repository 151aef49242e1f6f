"""Helpers of the callbacks that need Lightning's Trainer."""
