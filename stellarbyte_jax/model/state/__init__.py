"""What goes into the model as an argument and comes back as a result: caches and segment memory."""
