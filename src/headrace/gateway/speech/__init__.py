"""How models speak: where they reason, how they call tools, and how the text of an answer is taken apart again."""
