"""One step of a run: what is sent, what comes back, and what happens when the connection is lost in between."""
