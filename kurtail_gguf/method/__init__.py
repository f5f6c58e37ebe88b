"""What is done to a model so that four bits are enough. A step is a folder; a way of doing it, a file in it."""
