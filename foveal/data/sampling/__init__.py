"""Which sample stands in which slot of which step."""
