"""`evaluate-policies`: policies side by side on the same edits."""
