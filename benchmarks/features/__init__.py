"""Nets that metrics look through: one with fixed random weights, and those of files that the user gives."""
