"""A tuned model that answers."""
