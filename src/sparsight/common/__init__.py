"""Small things that every other package uses: errors, seeds, files, tables, intervals, progress. Imports no package."""
