"""Whole jobs: what runs through all rooms, from a trained network to a report."""
