"""How a whole fleet is, how it was, and what would be done next."""
