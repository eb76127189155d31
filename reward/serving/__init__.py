"""Rewards for others: in a script, of files, over HTTP."""
