"""Bytes to values and back: nothing here knows of sockets or threads."""
