"""The optimizer's state: what the service has of it, what a program sees and changes, and what a state_dict holds."""
