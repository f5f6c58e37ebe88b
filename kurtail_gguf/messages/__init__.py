"""What a person is told: errors of one line, and progress."""
