"""Cases, oracles and tools that several test files share."""
