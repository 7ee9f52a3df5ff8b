"""How a device gets its identity and loses it: tokens, registration, approval, certificates, lockout."""
