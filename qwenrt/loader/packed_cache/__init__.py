"""Packed weights kept on disk between loads."""
