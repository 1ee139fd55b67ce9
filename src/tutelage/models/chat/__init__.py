"""Chat templates, what they write between turns, and how calls of tools are written."""
