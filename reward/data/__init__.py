"""Preference records: read, checked, split, turned into ids."""
