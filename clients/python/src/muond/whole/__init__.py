"""A run that several processes have together: the whole, its shards, and the head that commits its steps."""
