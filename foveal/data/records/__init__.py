"""What a run consumed and what was bad, and the audit of both."""
