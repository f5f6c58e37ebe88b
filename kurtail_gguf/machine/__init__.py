"""The machine a conversion runs on: the device that computes, its memory, what a command took."""
