"""Helpers shared by every package: errors, seeds, files, tables, intervals, progress. Imports no other package."""
