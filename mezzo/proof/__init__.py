"""L5: was anything lost? Paired runs under two policies, and a verdict that statistics stands behind."""
