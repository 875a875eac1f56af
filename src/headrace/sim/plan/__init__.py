"""What do I need, and what will it cost? Answers from the shapes, the catalogue and the same simulator."""
