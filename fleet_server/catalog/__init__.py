"""Models, versions, source forms, variants, and the artifact store."""
