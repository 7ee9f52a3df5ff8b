"""Trained nets and labelled data that packages carry: fetched once, checked by SHA-256, not part of this repository."""
