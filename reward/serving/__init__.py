"""Scoring with an exported reward model: in a script, on files, over HTTP."""
